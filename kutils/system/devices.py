"""Chooses the device and precision to compute in, and describes the machine."""

import os

import torch


def pick_device(name: str) -> torch.device:
    """The device of this process for `auto`, `cuda` or `cpu` (GPU number = local rank).

    Raises: ValueError if `cuda` is asked for and there are fewer GPUs than ranks on this machine.
    """
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if num_ranks > torch.cuda.device_count():  # on every rank, else the others wait for the one without
        raise ValueError(
            f"each of {num_ranks} ranks on this machine needs a GPU of its own, and {torch.cuda.device_count()} are "
            "visible; start fewer ranks, or compute on the CPU: device=cpu, or --device cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def describe_gpus() -> str:
    """Names and memory of the visible GPUs, or "no GPU is visible"."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} with {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus) or "no GPU is visible"


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of matrix products; float32 means no autocast.

    `auto` is bfloat16 where the hardware has it, float16 on older GPUs (T4, V100), float32 on a CPU without bfloat16
    instructions, where emulating it costs more than it saves.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    has_bfloat16 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, also by the errors of cuBLAS and cuDNN, which have other types."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error) or "out of memory" in str(error)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def machine_facts(device: torch.device) -> dict:
    """Facts for advice on data loading: cores, ranks_per_machine and, on a GPU, gpu_gb (10**9 bytes)."""
    facts = {"cores": usable_cores(), "ranks_per_machine": int(os.environ.get("LOCAL_WORLD_SIZE", 1))}
    if device.type == "cuda":
        facts["gpu_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return facts


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
