"""Measures loss, speed and waiting for data between two log lines, over all ranks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.profiler import record_function

from kutils.system.ranks import Ranks


@dataclass(frozen=True)
class Interval:
    """Measurements of the updates between two log lines, over all ranks; equal on every rank."""

    loss: float  # mean
    images: int
    updates: int
    seconds: float  # of the slowest rank
    data_wait: float  # share of the time, mean over ranks
    bad: list[tuple[int, str]]  # images that could not be read: row and reason
    gpu_memory_gb: float | None  # peak of allocated memory of a rank since its start, in 10**9 bytes; None on a CPU
    first: bool  # whether it is the first of its epoch, which waited for the data loader to start

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def updates_per_second(self) -> float:
        return self.updates / self.seconds


class Meter:
    """Measures the updates of an epoch, interval by interval.

    Losses stay on the device until `close`, which alone synchronises. Waiting for data counts only while the device is
    idle: a GPU may still work on the previous update while the host waits for the next images.
    """

    def __init__(self, device: torch.device):
        self.device, self.first = device, True
        self.done = None  # event: the device has finished the previous update
        self.reset()

    def reset(self) -> None:
        self.losses, self.images, self.bad = [], 0, []
        self.waits, self.began = [], time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the block as a wait for an update's batches."""
        began = time.monotonic()
        with record_function("waiting for data"):
            yield
        self.waits.append((time.monotonic() - began, self.done, mark(self.device)))

    def add(self, loss: torch.Tensor, batches: list[dict]) -> None:
        """Count one update: its mean loss (on the device) and its local batches."""
        self.losses.append(loss)
        self.images += sum(len(batch["row"]) for batch in batches)
        self.bad += [item for batch in batches for item in batch["bad"]]
        self.done = mark(self.device)

    def waited(self) -> float:
        """Seconds that the device has waited for data; synchronises with it."""
        if self.done is not None:
            self.done.synchronize()
        return sum(
            seconds if done is None else min(seconds, done.elapsed_time(ready) / 1000)
            for seconds, done, ready in self.waits
        )

    def close(self, ranks: Ranks, step: int) -> Interval:
        """End the interval: combine its measurements over all ranks, and begin the next one.

        Args:
            step: updates done so far, for the error's message.
        Raises: ValueError on every rank if a loss is not finite, naming each such rank and its first such update.
        """
        losses = torch.stack(self.losses)
        first_broken = (~torch.isfinite(losses)).int().argmax()  # 0 if all are finite; not used then
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) / 1e9 if on_gpu else 0.0
        counts = [float(self.images), float(len(self.bad)), self.waited(), time.monotonic() - self.began, memory]
        own = torch.cat([torch.stack([losses.mean(), first_broken]), torch.tensor(counts, device=self.device)])
        gathered = ranks.gather_vectors(own)
        broken = torch.nonzero(~torch.isfinite(gathered[:, 0])).flatten().tolist()
        if broken:
            begin = step - len(self.losses) + 1
            where = ", ".join(f"rank {rank} at update {begin + int(gathered[rank, 1])}" for rank in broken)
            raise ValueError(
                f"the loss or a gradient is not finite on {where}; the best checkpoint is untouched. "
                "A lower lr or amp_dtype=float32 may help"
            )
        images, num_bad, waited, seconds, memory = gathered[:, 2:].unbind(dim=1)
        bad = ranks.gather_objects(self.bad) if num_bad.any() else []
        interval = Interval(
            loss=float(gathered[:, 0].mean()),
            images=int(images.sum()),
            updates=len(self.losses),
            seconds=float(seconds.max()),
            data_wait=float((waited / seconds).mean()),
            bad=[item for items in bad for item in items],
            gpu_memory_gb=round(float(memory.max()), 2) if on_gpu else None,
            first=self.first,
        )
        self.first = False
        self.reset()
        return interval


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event in the GPU's stream, for timing; None on a CPU, whose work is done when a call returns."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
