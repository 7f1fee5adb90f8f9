"""Does a data set's every image decode? Asked before the first step, since every validation row must be scored."""

import numpy as np
import torch
from torch.utils.data import DataLoader

from kutils import transforms
from kutils.datasets import DataError, PromptImages
from kutils.devices import Ranks


class DecodeCheck(torch.utils.data.Dataset):
    """position -> what is wrong with the image of that row, or an empty text."""

    def __init__(self, data: PromptImages, rows: np.ndarray):
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> str:
        try:
            transforms.decode_rgb(self.data.image_path(int(self.rows[position])))
        except transforms.ImageError as error:
            return str(error)
        return ""


def unreadable(data: PromptImages, rows: np.ndarray, num_workers: int = 0) -> list[str]:
    """Decode the images of the given rows; what is wrong with each that cannot be read, in row order."""
    loader = DataLoader(
        DecodeCheck(data, rows),
        batch_size=64,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # the loader's own seed must not come from the generator of drop path
    )
    return [message for batch in loader for message in batch if message]


def check_images(data: PromptImages, rows: np.ndarray, num_workers: int, ranks: Ranks) -> None:
    """Decode the images of all rows once, shared among ranks and workers.

    Raises: DataError on every rank, listing the first ten that cannot be read.
    """
    own = unreadable(data, rows[ranks.rank :: ranks.world_size], num_workers)
    found = [message for messages in ranks.gather_objects(own) for message in messages]
    if found:
        listed = "\n  ".join(found[:10])
        raise DataError(
            f"{len(found)} of {len(rows)} validation images cannot be read, and every row must be scored; "
            f"make them anew or remove their rows:\n  {listed}"
        )
