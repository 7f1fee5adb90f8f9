"""Stores prompts with their embeddings in one file, and finds those nearest to an embedding.

A bank is one memory-mapped Arrow file: a million prompts open in a millisecond, and processes share its pages.
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kutils.data.datasets import PromptImages, load_datasets
from kutils.data.index import cache_path, fingerprint
from kutils.prompts.shortening import exact_products
from kutils.prompts.similar_blocks import unit_rows
from kutils.system import arrow
from kutils.system.devices import pick_device
from kutils.system.embedding_files import EMBEDDING_DIM, open_embeddings
from kutils.system.progress import progress_bar
from kutils.system.tables import read_table

KIND = "kutils prompt bank"  # a fact that the file carries
BLOCK_PROMPTS, BLOCK_QUERIES = 65_536, 256  # of one matrix product: 100 MB of embeddings, 67 MB of cosines
KNN_NEIGHBOURS, KNN_TEMPERATURE = 20, 0.05


class PromptBank:
    """Prompts with their embeddings, among which the nearest to an embedding are found. Mapped columns stay mapped.

    Args:
        prompts: n texts, at least one.
        embeddings: float32 or float16 [n, 384], unit rows.
        rows: int64 [n]: the first row of each prompt in its data sets; None for prompts of no data set.
    Raises: ValueError if they do not fit together.
    """

    def __init__(
        self,
        prompts: Sequence[str] | pa.Array | pa.ChunkedArray,
        embeddings: np.ndarray | pa.ChunkedArray,
        rows: np.ndarray | None = None,
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
        self.prompts = prompts.cast(pa.large_string())  # ChunkedArray [n]
        self.embeddings = pa.chunked_array([as_lists(embeddings)]) if isinstance(embeddings, np.ndarray) else embeddings
        self.rows = rows

    def __len__(self) -> int:
        return len(self.prompts)

    # ------------------------------------------------------------ where a bank comes from

    @classmethod
    def from_datasets(cls, names: Sequence[str], most: int | None = None, seed: int = 0) -> "PromptBank":
        """The distinct prompts of data sets in `input/`, in order of first appearance.

        A bank of all prompts is written once below `working/cache/`, block by block, and mapped from then on. If it
        cannot be written, it is kept in memory. It takes 1.5 GB per million prompts. Another order of the names makes
        another bank, since `rows` follow that order.

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
        current = fingerprint(data.root, names)
        facts = {"fingerprint": current, "datasets": list(names)}

        def batches() -> pa.RecordBatchReader:
            return pa.RecordBatchReader.from_batches(schema(np.float32, facts), batches_of(data, rows))

        return cls.of_table(arrow.map_once(cache_path(data.root, names, ".bank.arrow"), current, batches))

    @classmethod
    def from_table(cls, tsv_path: Path) -> "PromptBank":
        """Every row of a prompts file or data set with its .npy beside it; the embeddings are checked and mapped.

        Raises: ValueError naming the row whose embedding is not of unit length.
        """
        prompts = read_table(tsv_path, ["prompt"])["prompt"]
        return cls(prompts, open_embeddings(Path(tsv_path).with_suffix(".npy"), len(prompts)))

    @classmethod
    def of_table(cls, table: pa.Table) -> "PromptBank":
        """The bank in a file's table: columns prompt, embedding and, for prompts of data sets, row."""
        rows = table["row"].to_numpy() if "row" in table.column_names else None
        return cls(table["prompt"], table["embedding"], rows)

    @classmethod
    def load(cls, path: Path) -> "PromptBank":
        """Map the file of a bank; ValueError if it holds none."""
        try:
            table = arrow.map_table(path)
            kind = arrow.facts_of(table).get("kind")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} holds no prompts ({error})") from error
        if kind != KIND:
            raise ValueError(f"{path} holds no prompts: it is another Arrow file")
        return cls.of_table(table)

    def save(self, path: Path, dtype: type = np.float32, keep: np.ndarray | None = None) -> None:
        """Write the bank to a file, atomically; replaced if it is there.

        Args:
            dtype: of the embeddings: float32, or float16 (half the size, errors of 1e-4).
            keep: bool [n], the prompts to write; None: all.
        """
        form = schema(dtype, {}, self.rows is not None)

        def batches() -> Iterator[pa.RecordBatch]:
            for start, block in self.blocks():
                part = np.arange(start, start + len(block))
                part = part if keep is None else part[keep[part]]
                prompts = self.prompts[start : start + len(block)].combine_chunks().take(pa.array(part - start))
                columns = [prompts, as_lists(block.numpy()[part - start].astype(dtype))]
                columns += [] if self.rows is None else [pa.array(self.rows[part])]
                yield pa.record_batch(columns, schema=form)

        arrow.write_batches(path, form, batches())

    # ------------------------------------------------------------ what a bank holds

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The prompts of some numbers."""
        return [self.prompts[int(index)].as_py() for index in indices]

    def vectors(self, indices: np.ndarray) -> np.ndarray:
        """The embeddings of some prompts.

        Args:
            indices: int [...], numbers of prompts.
        Returns: float32 [..., 384], a copy.
        Raises: IndexError for a number out of range.
        """
        indices = np.asarray(indices)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"prompts {indices.min()} to {indices.max()} of {len(self)}, which count from 0")
        rows = np.empty((*indices.shape, EMBEDDING_DIM), np.float32)
        for start, block in self.blocks():
            here = (indices >= start) & (indices < start + len(block))
            rows[here] = block.numpy()[indices[here] - start]
        return rows

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All embeddings in order, in blocks: the number of the first, and [at most BLOCK_PROMPTS, 384], not copied."""
        start = 0
        for chunk in self.embeddings.chunks:
            for offset in range(0, len(chunk), BLOCK_PROMPTS):
                values = chunk[offset : offset + BLOCK_PROMPTS].flatten()
                block = torch.from_dlpack(values).view(-1, EMBEDDING_DIM)  # from_numpy refuses read-only arrays
                yield start, block
                start += len(block)

    # ------------------------------------------------------------ looking up

    @torch.inference_mode()
    def nearest(
        self, queries: np.ndarray, k: int = 5, device: str = "cpu", exclude: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k prompts of highest cosine for each query; all are compared, block by block.

        Args:
            queries: float32 [q, 384], unit rows.
            k: number of prompts; all prompts if there are fewer.
            exclude: bool [n]: prompts to leave out.
        Returns: numbers of prompts int64 [q, k] and their cosines float32 [q, k]; the nearest first, and of equal
            cosines the lower number first.
        Raises: ValueError for queries of another shape, not finite or not of unit length, k below 1, or `exclude` of
            another length or of all prompts.
        """
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least one prompt")
        if queries.ndim != 2 or queries.shape[1] != EMBEDDING_DIM:
            raise ValueError(f"queries are {list(queries.shape)}, not [queries, {EMBEDDING_DIM}]")
        excluded = torch.zeros(len(self), dtype=torch.bool) if exclude is None else torch.tensor(exclude)
        if excluded.shape != (len(self),) or excluded.all():
            raise ValueError(f"exclude is {list(excluded.shape)}; it leaves some of {len(self)} prompts out, not all")
        place = pick_device(device)
        queries = unit_rows(queries).to(place)
        count = min(k, len(self) - int(excluded.sum()))
        cosines = torch.empty(len(queries), 0, device=place)
        indices = torch.empty(len(queries), 0, dtype=torch.int64, device=place)
        bar = progress_bar(len(self), "prompt", "looking up neighbours", delay=5, leave=False)
        with exact_products(), bar:
            for start, block in self.blocks():
                block = block.to(place).float().T
                omitted = excluded[start : start + block.shape[1]].nonzero()[:, 0].to(place)
                best = []
                for part in queries.split(BLOCK_QUERIES):
                    products = part @ block
                    products[:, omitted] = -torch.inf
                    best.append(largest(products, k))
                cosines = torch.cat([cosines, torch.cat([values for values, _ in best])], dim=1)
                indices = torch.cat([indices, torch.cat([columns for _, columns in best]) + start], dim=1)
                cosines, order = cosines.sort(dim=1, descending=True, stable=True)  # those of earlier blocks first
                cosines, indices = cosines[:, :count], indices.gather(1, order)[:, :count]
                bar.update(block.shape[1])
        return indices.cpu().numpy(), cosines.cpu().numpy()

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


def largest(products: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, largest first, and their columns, both [rows, k]; of equal ones the first."""
    count = min(k, products.shape[1])
    values, columns = products.topk(
        min(k + 1, products.shape[1]), dim=1
    )  # one more, to see whether the k-th has equals
    if count < values.shape[1]:
        for row in (values[:, count - 1] == values[:, count]).nonzero()[:, 0].tolist():
            columns[row] = products[row].sort(descending=True, stable=True).indices[: count + 1]
    columns = columns[:, :count].sort(dim=1).values
    values, order = products.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def as_lists(embeddings: np.ndarray) -> pa.FixedSizeListArray:
    """Arrow's form of [n, 384]; contiguous rows are not copied."""
    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), EMBEDDING_DIM)


def schema(dtype: type, facts: dict, has_rows: bool = True) -> pa.Schema:
    """The schema of a bank's file, with its facts."""
    fields = {"prompt": pa.large_string(), "embedding": pa.list_(pa.from_numpy_dtype(dtype), EMBEDDING_DIM)}
    fields |= {"row": pa.int64()} if has_rows else {}
    return arrow.with_facts(pa.schema(fields), {"kind": KIND, **facts})


def batches_of(data: PromptImages, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Prompts and embeddings of rows (int64 [n]), one block in memory at a time."""
    with progress_bar(len(rows), "prompt", "collecting prompts", delay=5, leave=False) as bar:
        for start in range(0, len(rows), BLOCK_PROMPTS):
            part = rows[start : start + BLOCK_PROMPTS]
            prompts = data.prompts.take(pa.array(part)).combine_chunks()
            columns = {"prompt": prompts, "embedding": as_lists(data.targets(part)), "row": pa.array(part)}
            yield pa.record_batch(columns)
            bar.update(len(part))
