"""What a run counts between two lines of its log, summed over ranks."""

import time

import torch

from kutils.devices import Ranks


class NonFiniteLossError(ValueError):
    """The loss became infinite or NaN."""


class Interval:
    """What is counted between two log lines; losses stay on the device until `close`, the only synchronisation."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.losses, self.images, self.bad = [], 0, []
        self.waited, self.began = 0.0, time.monotonic()

    def add(self, loss: torch.Tensor, batches: list[dict], waited: float) -> None:
        """Count one update: its mean loss (on the device), its local batches, the seconds spent waiting for them."""
        self.losses.append(loss)
        self.images += sum(len(batch["row"]) for batch in batches)
        self.bad += [item for batch in batches for item in batch["bad"]]
        self.waited += waited

    def close(self, ranks: Ranks, step: int) -> dict:
        """Sum over ranks and begin anew; every rank gets the same.

        Args:
            step: updates done so far, for the message.
        Returns: loss (mean over the interval and ranks), images, images_per_second, updates_per_second, data_wait
            (share of the time, mean over ranks), bad (row, reason).
        Raises: NonFiniteLossError on every rank, naming each broken rank and its first broken update.
        """
        losses = torch.stack(self.losses)
        first_broken = (~torch.isfinite(losses)).int().argmax()  # of no interest where the mean is finite
        counts = [float(self.images), float(len(self.bad)), self.waited, time.monotonic() - self.began]
        mine = torch.cat([torch.stack([losses.mean(), first_broken]), torch.tensor(counts, device=self.device)])
        gathered = ranks.gather_vectors(mine)
        broken = torch.nonzero(~torch.isfinite(gathered[:, 0])).flatten().tolist()
        if broken:
            begin = step - len(self.losses) + 1
            where = ", ".join(f"rank {rank} at update {begin + int(gathered[rank, 1])}" for rank in broken)
            raise NonFiniteLossError(
                f"the loss or a gradient is not finite on {where}; the best checkpoint is untouched. "
                "A lower lr or amp_dtype=float32 may help"
            )
        images, num_bad, waited, seconds = gathered[:, 2:].unbind(dim=1)
        bad = ranks.gather_objects(self.bad) if num_bad.any() else []
        report = {
            "loss": float(gathered[:, 0].mean()),
            "images": int(images.sum()),
            "images_per_second": float(images.sum() / seconds.max()),
            "updates_per_second": len(self.losses) / float(seconds.max()),
            "data_wait": float((waited / seconds).mean()),
            "bad": [item for items in bad for item in items],
        }
        self.reset()
        return report
