"""Averages loss and speed since the last log line, over all ranks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.profiler import record_function

from kutils.system.ranks import Ranks


class Interval:
    """What is counted between two log lines; losses stay on the device until `close`, the only synchronisation.

    Time spent waiting for data counts as far as the device had nothing to do meanwhile: a GPU still works on the update
    before when the host asks for the next one's images.
    """

    def __init__(self, device: torch.device):
        self.device, self.done = device, None
        self.reset()

    def reset(self) -> None:
        self.losses, self.images, self.bad = [], 0, []
        self.waits, self.began = [], time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for an update's batches."""
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

    def close(self, ranks: Ranks, step: int) -> dict:
        """Sum over ranks and begin anew; every rank gets the same.

        Args:
            step: updates done so far, for the message.
        Returns: loss (mean over the interval and ranks), images, updates, seconds (of the slowest rank),
            images_per_second, updates_per_second, data_wait (share of the time, mean over ranks), bad (row, reason),
            and on GPUs gpu_memory_gb: the most that a rank has held since it started, in 10**9 bytes.
        Raises: ValueError on every rank, naming each broken rank and its first broken update.
        """
        losses = torch.stack(self.losses)
        first_broken = (~torch.isfinite(losses)).int().argmax()  # of no interest where the mean is finite
        on_gpu = self.device.type == "cuda"
        held = torch.cuda.max_memory_allocated(self.device) / 1e9 if on_gpu else 0.0
        counts = [float(self.images), float(len(self.bad)), self.waited(), time.monotonic() - self.began, held]
        mine = torch.cat([torch.stack([losses.mean(), first_broken]), torch.tensor(counts, device=self.device)])
        gathered = ranks.gather_vectors(mine)
        broken = torch.nonzero(~torch.isfinite(gathered[:, 0])).flatten().tolist()
        if broken:
            begin = step - len(self.losses) + 1
            where = ", ".join(f"rank {rank} at update {begin + int(gathered[rank, 1])}" for rank in broken)
            raise ValueError(
                f"the loss or a gradient is not finite on {where}; the best checkpoint is untouched. "
                "A lower lr or amp_dtype=float32 may help"
            )
        images, num_bad, waited, seconds, held = gathered[:, 2:].unbind(dim=1)
        bad = ranks.gather_objects(self.bad) if num_bad.any() else []
        report = {
            "loss": float(gathered[:, 0].mean()),
            "images": int(images.sum()),
            "updates": len(self.losses),
            "seconds": float(seconds.max()),
            "images_per_second": float(images.sum() / seconds.max()),
            "updates_per_second": len(self.losses) / float(seconds.max()),
            "data_wait": float((waited / seconds).mean()),
            "bad": [item for items in bad for item in items],
        }
        if on_gpu:
            report["gpu_memory_gb"] = round(float(held.max()), 2)
        self.reset()
        return report


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A point in the GPU's work, to be timed; None on a CPU, whose work is done when a call returns."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
