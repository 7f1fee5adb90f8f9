"""Chooses the device and the precision, and connects the ranks of a run."""

import datetime
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from kutils.system.children import SAVING_SECONDS, end_with_parent

WORK_SECONDS = 7 * 24 * 3600  # that workers wait for the one that has most left to do


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run. A run without torchrun is one rank, and none of the methods communicates."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, set on every rank if it is on one: a synchronisation with the device where there are several."""
        return self.gather_vectors(torch.tensor(flags, dtype=torch.float32, device=self.device)).any(dim=0).tolist()

    def gather_objects(self, value) -> list:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_vectors(self, vector: torch.Tensor) -> torch.Tensor:
        """[D] of every rank -> [world_size, D] on the CPU, on every rank: one synchronisation with the device."""
        if self.world_size == 1:
            return vector[None].cpu()
        gathered = vector.new_empty(self.world_size * len(vector))
        dist.all_gather_into_tensor(gathered, vector)
        return gathered.view(self.world_size, -1).cpu()

    def gather_interleaved(self, local: torch.Tensor, total: int) -> np.ndarray:
        """Rows dealt as rank, rank + world_size, ... put back in order.

        Args:
            local: [n, D] on the rank's device; n may differ by one between ranks.
            total: number of rows over all ranks.
        Returns: [total, D], each row exactly once, on every rank.
        """
        if self.world_size == 1:
            return local.cpu().numpy()
        longest = -(-total // self.world_size)
        padded = local.new_zeros(longest, local.shape[1])
        padded[: len(local)] = local
        gathered = local.new_empty(self.world_size * longest, local.shape[1])
        dist.all_gather_into_tensor(gathered, padded)
        ordered = gathered.view(self.world_size, longest, -1).transpose(0, 1).reshape(-1, local.shape[1])
        return ordered[:total].cpu().numpy()


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda` or `cpu` to the device of this process (GPU number = local rank).

    Raises: ValueError if `cuda` is asked for and there are fewer GPUs than ranks on this machine.
    """
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if num_ranks > torch.cuda.device_count():  # on every rank alike, or the others would wait for the one without
        raise ValueError(
            f"each of {num_ranks} ranks on this machine needs a GPU of its own, and {torch.cuda.device_count()} are "
            "visible; start fewer ranks, or compute on the CPU: device=cpu, or --device cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def describe_gpus() -> str:
    """Names and memory of the visible GPUs, or that there is none."""
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
    """Also of cuBLAS and cuDNN, which say it as an error of their own."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error) or "out of memory" in str(error)


def join_ranks(device_name: str, *, backend: str | None = None, wait_seconds: float = 2 * SAVING_SECONDS) -> Ranks:
    """Join the process group that torchrun's variables describe; alone without them.

    Args:
        device_name: auto, cuda or cpu.
        backend: what the ranks talk through; None: NCCL on GPUs, else gloo.
        wait_seconds: how long one waits for the others, as all do for rank 0 while it saves.
    """
    device = pick_device(device_name)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32: 10 bits of mantissa, as bfloat16 has 7
    if world_size > 1:
        backend = backend or ("nccl" if device.type == "cuda" else "gloo")
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=wait_seconds))
    return Ranks(rank, world_size, device)


def join_workers(device_name: str) -> Ranks:
    """Join as ranks that share long work and exchange little: they wait for the slowest, and there is no TF32.

    They talk through gloo, so that a GPU that fails does not keep them from it, and end when their torchrun is killed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # else one would go on holding its GPU
        end_with_parent()
    ranks = join_ranks(device_name, backend="gloo", wait_seconds=WORK_SECONDS)
    torch.set_float32_matmul_precision("highest")  # TF32 is off by 1e-3
    torch.backends.cudnn.allow_tf32 = False  # convolutions, which are allowed it by default
    return ranks


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def device_name(ranks: Ranks) -> str:
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"


def machine_facts(ranks: Ranks) -> dict:
    """What loading can be judged by: cores, ranks_per_machine, and gpu_gb (10**9 bytes) where there is a GPU."""
    facts = {"cores": usable_cores(), "ranks_per_machine": int(os.environ.get("LOCAL_WORLD_SIZE", 1))}
    if ranks.device.type == "cuda":
        facts["gpu_gb"] = torch.cuda.get_device_properties(ranks.device).total_memory / 1e9
    return facts


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
