"""Stores prompts with their embeddings, and finds those nearest to an embedding.

A bank is a memory-mapped Arrow file, whose pages processes share. A large one has a shortened embedding of each prompt,
which rules most prompts out early. Banks of data sets leave the full embeddings in the .npy files.
"""

import textwrap
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kutils.data import bank_files
from kutils.data.bank_files import (
    CHECKED,
    KIND,
    RowChecksums,
    ShortRows,
    Targets,
    as_lists,
    column,
    part_of,
    short_rows,
)
from kutils.data.checked_rows import check_texts
from kutils.data.datasets import load_datasets
from kutils.data.index import cache_path, fingerprint
from kutils.data.nearest import BLOCK_QUERIES, Block, Nearest
from kutils.prompts.shortening import exact_products
from kutils.prompts.similar_blocks import check_lengths
from kutils.system import arrow
from kutils.system.devices import pick_device
from kutils.system.embedding_files import EMBEDDING_DIM, open_embeddings
from kutils.system.progress import progress_bar
from kutils.system.tables import read_table

BLOCK_PROMPTS = 65_536  # looked at together: 100 MB of embeddings
BANK_VERSION = 3  # of a cache of data sets; 1 held the embeddings, 2 no checksums of rows
KNN_NEIGHBOURS, KNN_TEMPERATURE = 20, 0.05


class PromptBank:
    """Prompts with their embeddings, among which the nearest to an embedding are found. Mapped columns stay mapped.

    Args:
        prompts: n texts, at least one.
        embeddings: float32 or float16 [n, 384], unit rows.
        rows: int64 [n]: the first row of each prompt in its data sets; None for prompts of no data set.
        short: a short row of each prompt; None: there are none.
        sums: their checksums, with which they are compared when they are first read; None: nothing is compared.
    Raises: ValueError if they do not fit together.
    """

    def __init__(
        self,
        prompts: Sequence[str] | pa.Array | pa.ChunkedArray,
        embeddings: np.ndarray | pa.ChunkedArray | Targets,
        rows: np.ndarray | None = None,
        short: ShortRows | None = None,
        sums: RowChecksums | None = None,
    ):
        shape = list(embeddings.shape) if isinstance(embeddings, np.ndarray) else [len(embeddings), EMBEDDING_DIM]
        if not len(prompts) or shape != [len(prompts), EMBEDDING_DIM]:
            raise ValueError(
                f"{len(prompts)} prompts with embeddings {shape}: a bank needs [prompts, {EMBEDDING_DIM}] and at least "
                "one prompt"
            )
        if not isinstance(prompts, (pa.Array, pa.ChunkedArray)):
            prompts = pa.array(prompts, pa.large_string())
        prompts = prompts if isinstance(prompts, pa.ChunkedArray) else pa.chunked_array([prompts])
        self.unchecked_prompts = prompts.cast(pa.large_string())
        self.embeddings = pa.chunked_array([as_lists(embeddings)]) if isinstance(embeddings, np.ndarray) else embeddings
        self.rows, self.short, self.sums = rows, short, sums

    def __len__(self) -> int:
        return len(self.unchecked_prompts)

    # ------------------------------------------------------------ where a bank comes from

    @classmethod
    def from_datasets(cls, names: Sequence[str], most: int | None = None, seed: int = 0) -> "PromptBank":
        """The distinct prompts of data sets in `input/`, in order of first appearance.

        Prompts and short rows of a bank of all prompts are written once below `working/cache/`, and mapped from then
        on. If they cannot be written, they are kept in memory. They take about 0.3 GB per million prompts; the
        embeddings stay in the .npy files. Another order of the names makes another bank, since `rows` follow that
        order.

        Args:
            most: draw so many prompts if there are more; None: all.
        Raises: ValueError as `load_datasets` does.
        """
        data = load_datasets(names, need_folds=False)
        codes = data.prompt_codes  # in order of first appearance
        rows = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=np.int32(-1)))
        if most is not None and most < len(rows):
            rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
            return cls(data.prompts.take(pa.array(rows)), data.targets(rows), rows)
        current = fingerprint(data.root, names) | {"bank": BANK_VERSION}
        facts = {"fingerprint": current, "datasets": list(names)}
        targets = Targets(data, rows)

        def batches() -> pa.RecordBatchReader:
            return bank_files.read_batches(cls(data.prompts.take(pa.array(rows)), targets, rows), None, facts)

        path, most_batches = cache_path(data.root, names, ".bank.arrow"), -(-len(rows) // BLOCK_PROMPTS)
        return cls.of_table(arrow.map_once(path, current, batches, ["short"], most_batches), path, targets)

    @classmethod
    def from_table(cls, tsv_path: Path) -> "PromptBank":
        """Every row of a prompts file or data set with its .npy beside it; the embeddings are checked and mapped.

        Raises: ValueError naming the row whose embedding is not of unit length.
        """
        prompts = read_table(tsv_path, ["prompt"])["prompt"]
        return cls(prompts, open_embeddings(Path(tsv_path).with_suffix(".npy"), len(prompts)))

    @classmethod
    def of_table(cls, table: pa.Table, path: Path, embeddings: Targets | None = None) -> "PromptBank":
        """The bank in a file's table, whose columns `bank_files.schema` names.

        Args:
            path: of the file, for messages.
            embeddings: of a table without them.
        """
        embeddings = table["embedding"] if embeddings is None else embeddings
        sums = RowChecksums.of_table(table, str(path))
        return cls(table["prompt"], embeddings, column(table, "row"), short_rows(table), sums)

    @classmethod
    def load(cls, path: Path) -> "PromptBank":
        """Map the file of a bank. Rows that are damaged are named when they are first read.

        Raises: ValueError if it holds no bank.
        """
        try:
            table = arrow.map_table(path)
            kind = arrow.facts_of(table).get("kind")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} holds no prompts ({error})") from error
        if kind != KIND:
            raise ValueError(f"{path} holds no prompts: it is another Arrow file")
        if "embedding" not in table.column_names:
            raise ValueError(f"{path} holds no embeddings: it is a cache of data sets; give --datasets instead")
        return cls.of_table(table, path)

    def save(self, path: Path, dtype: type = np.float32, keep: np.ndarray | None = None) -> None:
        """Write the bank to a file, atomically; replaced if it is there.

        Args:
            dtype: of the embeddings: float32, or float16 (half the size, errors of 1e-4).
            keep: bool [n], the prompts to write; None: all.
        """
        reader = bank_files.read_batches(self, dtype, {}, keep)
        arrow.write_batches(path, reader.schema, reader, left_out=CHECKED, most_batches=len(self.parts))

    # ------------------------------------------------------------ what a bank holds

    @cached_property
    def prompts(self) -> pa.ChunkedArray:
        """All prompts, large_string [n]; Damaged as for `texts`."""
        if self.sums is not None:
            check_texts(self.unchecked_prompts, self.sums.prompts, self.sums.source)
        return self.unchecked_prompts

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The prompts of some numbers; Damaged if one is not as it was written."""
        texts = [self.unchecked_prompts[int(index)] for index in indices]
        if self.sums is not None:
            check_texts(texts, self.sums.prompts[np.asarray(indices, int)], self.sums.source)
        return [text.as_py() for text in texts]

    def vectors(self, indices: np.ndarray) -> np.ndarray:
        """The embeddings of some prompts.

        Args:
            indices: int [...], numbers of prompts.
        Returns: float32 [..., 384], a copy.
        Raises: IndexError for a number out of range; Damaged for an embedding that is not as it was written.
        """
        indices = np.asarray(indices)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"prompts {indices.min()} to {indices.max()} of {len(self)}, which count from 0")
        rows = np.empty((*indices.shape, EMBEDDING_DIM), np.float32)
        for part in self.parts:
            here = (indices >= part.start) & (indices < part.start + len(part.rows))
            if here.any():
                rows[here] = part.rows[indices[here] - part.start]
        return rows

    def spans(self) -> Iterator[slice]:
        """The prompts in order, at most BLOCK_PROMPTS at a time, and of one chunk of the embeddings."""
        columns = [range(len(self))] if isinstance(self.embeddings, Targets) else self.embeddings.chunks
        start = 0
        for chunk in columns:
            for offset in range(0, len(chunk), BLOCK_PROMPTS):
                yield slice(start + offset, start + min(offset + BLOCK_PROMPTS, len(chunk)))
            start += len(chunk)

    @cached_property
    def parts(self) -> list[Block]:
        """The spans with their embeddings and short rows, which are compared with their checksums when first read."""
        return [part_of(self.embeddings, self.short, self.sums, span) for span in self.spans()]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All embeddings in order: the number of the first, and [at most BLOCK_PROMPTS, 384]; mapped ones stay so."""
        for part in self.parts:
            yield part.start, torch.from_numpy(part.rows[:])

    # ------------------------------------------------------------ looking up

    @torch.inference_mode()
    def nearest(
        self, queries: np.ndarray, k: int = 5, device: str = "cpu", exclude: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k prompts of highest cosine for each query, exactly: as float64 decides, rounded to float32.

        A large bank's short rows rule most prompts out; on a GPU, and without short rows, all are compared.

        Args:
            queries: float32 [q, 384], unit rows.
            k: number of prompts; all prompts if there are fewer.
            exclude: bool [n]: prompts to leave out.
        Returns: numbers of prompts int64 [q, k] and their cosines float32 [q, k]; the nearest first, and of equal
            cosines the lower number first.
        Raises: ValueError for queries of another shape, not finite or not of unit length, k below 1, or `exclude` of
            another length or of all prompts; Damaged if what is looked at is not as it was written.
        """
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least one prompt")
        if queries.ndim != 2 or queries.shape[1] != EMBEDDING_DIM:
            raise ValueError(f"queries are {list(queries.shape)}, not [queries, {EMBEDDING_DIM}]")
        excluded = torch.zeros(len(self), dtype=torch.bool) if exclude is None else torch.tensor(exclude)
        if excluded.shape != (len(self),) or excluded.all():
            raise ValueError(f"exclude is {list(excluded.shape)}; it leaves some of {len(self)} prompts out, not all")
        place = pick_device(device)
        check_lengths(torch.from_numpy(np.asarray(queries, np.float32)), 0)
        exact = queries / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
        how = self.short.how if self.short is not None and place.type == "cpu" else None
        best = Nearest(exact, min(k, len(self) - int(excluded.sum())), how, place)
        bar = progress_bar(len(self), "prompt", "looking up neighbours", delay=5, leave=False)
        with exact_products(), bar:
            for part in self.parts:
                best.look_at(part, excluded[part.start : part.start + len(part.rows)].numpy())
                bar.update(len(part.rows))
        return best.indices, best.cosines

    def captions(self, queries: np.ndarray, k: int = 2, width: int = 64) -> list[str]:
        """The nearest prompts of each query with their cosines, as the title of a figure; long prompts are cut."""
        titles = []
        for row, values in zip(*self.nearest(queries, k), strict=True):
            prompts = (textwrap.shorten(text, width, placeholder=" ...") for text in self.texts(row))
            titles.append(
                " / ".join(f"{prompt} ({cosine:.2f})" for prompt, cosine in zip(prompts, values, strict=True))
            )
        return titles

    def knn(
        self,
        queries: np.ndarray,
        k: int = KNN_NEIGHBOURS,
        temperature: float = KNN_TEMPERATURE,
        device: str = "cpu",
        exclude: np.ndarray | None = None,
    ) -> np.ndarray:
        """The weighted mean of the nearest prompts' embeddings, which pulls a prediction towards known prompts.

        The weight of a prompt is the softmax of cosine / temperature over the k nearest (as in Wu et al. 2018,
        https://arxiv.org/abs/1805.01978, where the nearest vote for classes).

        Args:
            queries: as for `nearest`, like k, device and exclude.
            temperature: above 0; near 0 the nearest prompt alone counts.
        Returns: float32 [q, 384], unit rows.
        Raises: ValueError as `nearest` does, or for the temperature.
        """
        return self.weighted_mean(*self.nearest(queries, k, device, exclude), temperature)

    def weighted_mean(self, indices: np.ndarray, cosines: np.ndarray, temperature: float) -> np.ndarray:
        """The means that `knn` returns, from the numbers and cosines that `nearest` returns."""
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it is above 0, such as {KNN_TEMPERATURE}")
        weights = torch.from_numpy(cosines / temperature).softmax(dim=1)
        rows = np.empty((len(indices), EMBEDDING_DIM), np.float32)
        for start in range(0, len(indices), BLOCK_QUERIES):
            part = slice(start, start + BLOCK_QUERIES)
            mean = torch.einsum("qk,qkd->qd", weights[part], torch.from_numpy(self.vectors(indices[part])))
            rows[part] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return rows


def in_fold(bank: PromptBank, names: Sequence[str], fold: int) -> np.ndarray:
    """bool [n]: whether each prompt of the bank of these data sets is in a fold; ValueError for sets without folds."""
    return load_datasets(names).folds[bank.rows] == fold
