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

    def close(self, ranks: Ranks, step: int, stop: bool, save: bool) -> dict:
        """Sum over ranks and begin anew.

        Args:
            step: updates done so far, for the message.
            stop, save: this rank was asked to stop; it is time to save the state. One rank is enough for either.
        Returns: loss (mean over the interval and ranks), images, images_per_second, data_wait (share of this rank's
            time), bad (row, reason) of every rank, stop, save.
        Raises: NonFiniteLossError on every rank, naming steps and rank.
        """
        counts = [float(self.images), float(len(self.bad)), float(stop), float(save)]
        mine = torch.cat([torch.stack(self.losses).mean()[None], torch.tensor(counts, device=self.device)])
        gathered = ranks.gather_vectors(mine)
        broken = torch.nonzero(~torch.isfinite(gathered[:, 0])).flatten().tolist()
        if broken:
            raise NonFiniteLossError(
                f"the loss is not finite on rank {', '.join(map(str, broken))} between updates "
                f"{step - len(self.losses) + 1} and {step}; the best checkpoint is untouched. "
                "A lower lr or amp_dtype=float32 may help"
            )
        _, images, num_bad, stops, saves = gathered.sum(dim=0).tolist()
        bad = ranks.gather_objects(self.bad) if num_bad else []
        seconds = time.monotonic() - self.began
        report = {
            "loss": float(gathered[:, 0].mean()),
            "images": int(images),
            "images_per_second": images / seconds,
            "data_wait": self.waited / seconds,
            "bad": [item for items in bad for item in items],
            "stop": stops > 0,
            "save": saves > 0,
        }
        self.reset()
        return report
