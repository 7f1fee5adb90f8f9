"""Samples the rows of each epoch for all ranks: one random image per prompt, determined by seed and epoch."""

from collections.abc import Iterator

import numpy as np

DRAWN_PROMPTS = 65_536  # prompts whose images are drawn at a time: all together would take 24 MB
WINDOW_BLOCKS = 32  # shards that an epoch mixes: 65,536 rows, 3 GB of images in the system's memory at 448 px


class EpochSampler:
    """One image per prompt and epoch, drawn from (seed, epoch): the same for any number of ranks.

    A prompt counts once over all data sets. The last, incomplete global batch of an epoch is left out. This is the
    batch sampler of a data loader that is used for all epochs: `set_epoch` selects the epoch of its next pass.

    Args:
        data: the data sets, whose `prompt_codes` are used.
        rows: int, the training rows.
        global_batch_size: rows of one optimiser update.
        local_batch_size: rows of one forward pass on one rank.
        world_size: number of ranks. An update takes global_batch_size / (world_size * local_batch_size) forward passes
            on each.
        block_rows: rows that lie together on the disk. The rows of WINDOW_BLOCKS random blocks are shuffled together,
            and such windows follow each other, so that the disk is read nearly in sequence. 0: all rows are shuffled
            together, which is also the result if one window holds all of them.
    Raises: ValueError if the prompts do not fill one global batch.
    """

    def __init__(self, data, rows, seed, *, global_batch_size, local_batch_size, rank=0, world_size=1, block_rows=0):
        self.seed, self.rank, self.world_size, self.block_rows = seed, rank, world_size, block_rows
        self.global_batch_size, self.local_batch_size = global_batch_size, local_batch_size
        self.set_epoch(0)
        codes = data.prompt_codes[rows]
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
        self.grouped_rows = np.asarray(rows, np.int32)[order]  # images of one prompt side by side
        del order  # int64; every rank keeps the arrays of this object, and 4.5 million rows of it are 36 MB
        starts = np.flatnonzero(np.diff(codes, prepend=np.int32(-1))).astype(np.int32)
        self.group_starts = np.append(starts, np.int32(len(codes)))  # [number of prompts + 1]
        self.num_prompts = len(starts)
        self.steps_per_epoch = self.num_prompts // global_batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{self.num_prompts} training prompts do not fill one global batch of {global_batch_size}; "
                "set a smaller global_batch_size"
            )

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """int32 [number of prompts]: the epoch's rows in the order in which they are trained on."""
        random = np.random.default_rng([self.seed, epoch])
        chosen = np.empty(self.num_prompts, np.int32)
        for start in range(0, self.num_prompts, DRAWN_PROMPTS):  # the same random numbers as one call for all
            bounds = self.group_starts[start : start + DRAWN_PROMPTS + 1]
            offsets = random.integers(0, np.diff(bounds))
            chosen[start : start + DRAWN_PROMPTS] = self.grouped_rows[bounds[:-1] + offsets]
        random.shuffle(chosen)
        if self.block_rows:
            blocks = chosen // self.block_rows
            windows = random.permutation(int(blocks.max()) + 1) // WINDOW_BLOCKS
            chosen = chosen[np.argsort(windows[blocks], kind="stable")]
        return chosen

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Select the epoch of the next pass, and the optimiser update at which it starts."""
        self.epoch, self.first_step = epoch, first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches(self.epoch, self.first_step)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Local batches of (epoch, row) for this rank, from the given optimiser update of the epoch on."""
        rows = self.epoch_rows(epoch)
        stride = self.world_size * self.local_batch_size
        for step in range(first_step, self.steps_per_epoch):
            for start in range(0, self.global_batch_size, stride):
                begin = step * self.global_batch_size + start + self.rank * self.local_batch_size
                yield [(epoch, int(row)) for row in rows[begin : begin + self.local_batch_size]]
