"""Connects the ranks of a run, and exchanges values between them."""

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from kutils.system.children import SAVING_SECONDS, end_with_parent
from kutils.system.devices import pick_device

WORK_SECONDS = 7 * 24 * 3600  # that ranks wait for the slowest one


@dataclass(frozen=True)
class Ranks:
    """This process as one of a run's ranks. Without torchrun there is one rank, and no method communicates."""

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
        """For each flag, whether it is set on any rank; with several ranks this synchronises with the device."""
        return self.gather_vectors(torch.tensor(flags, dtype=torch.float32, device=self.device)).any(dim=0).tolist()

    def gather_objects(self, value) -> list:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_vectors(self, vector: torch.Tensor) -> torch.Tensor:
        """Gather a vector [D] of every rank as [world_size, D] on the CPU, on every rank; synchronises with the device
        once."""
        if self.world_size == 1:
            return vector[None].cpu()
        gathered = vector.new_empty(self.world_size * len(vector))
        dist.all_gather_into_tensor(gathered, vector)
        return gathered.view(self.world_size, -1).cpu()

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace the tensor, on the rank's device, by its sum over all ranks (all-reduce)."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def copy_from_main(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors, on the rank's device, by those of the main rank (broadcast)."""
        for tensor in tensors if self.world_size > 1 else ():
            dist.broadcast(tensor, 0)

    def gather_interleaved(self, local: torch.Tensor, total: int) -> np.ndarray:
        """Gather rows of which each rank has every world_size-th, starting at its number, and put them in order.

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


def join_ranks(device_name: str, *, backend: str | None = None, wait_seconds: float = 2 * SAVING_SECONDS) -> Ranks:
    """Join the process group that torchrun's environment variables describe; without them, be the only rank.

    Args:
        device_name: auto, cuda or cpu.
        backend: of torch.distributed; None: NCCL on GPUs, else gloo.
        wait_seconds: timeout of collective operations; others wait for rank 0 while it saves.
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
    """Join as ranks that share long work and exchange little: with a long timeout and without TF32.

    They communicate by gloo, which works even if a GPU fails, and end when their torchrun is killed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # else it would keep holding its GPU
        end_with_parent()
    ranks = join_ranks(device_name, backend="gloo", wait_seconds=WORK_SECONDS)
    torch.set_float32_matmul_precision("highest")  # TF32 has errors of 1e-3
    torch.backends.cudnn.allow_tf32 = False  # allowed for convolutions by default
    return ranks


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
