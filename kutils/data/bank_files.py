"""Defines the columns of a bank's file: prompts, embeddings, row numbers, and short rows with their shortening."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kutils.data.checked_rows import CheckedRows, row_sums, text_sums
from kutils.data.datasets import PromptImages
from kutils.data.nearest import Block, choose_shortening
from kutils.prompts.shortening import Shortening
from kutils.system import arrow
from kutils.system.embedding_files import EMBEDDING_DIM, make_again
from kutils.system.progress import progress_bar

KIND = "kutils prompt bank"  # a fact that the file carries
SHORT_KEY = b"shortening"  # of the file's metadata
SHORTENED = 8192  # prompts from which a file holds short rows
SAMPLE_PROMPTS = 4096  # by which the way to shorten them is chosen
CHECKED = ("prompt", "embedding", "short")  # columns whose rows have checksums of their own


@dataclass(frozen=True)
class Targets:
    """The embeddings of some rows of data sets, which stay in their .npy files until they are indexed."""

    data: PromptImages
    rows: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: np.ndarray | slice) -> np.ndarray:
        return self.data.targets(self.rows[indices])

    def path_of(self, index: int) -> tuple[Path, int]:
        """The .npy file of one of the embeddings, and its row there."""
        (number,), (row,) = self.data.origin(self.rows[index : index + 1])
        return self.data.root / f"{self.data.names[number]}.npy", int(row)


@dataclass(frozen=True)
class ShortRows:
    """The short rows of a bank, and how they were made."""

    how: Shortening
    rows: pa.ChunkedArray  # int8 lists [n]
    errors: np.ndarray  # float32 [n]


@dataclass(frozen=True)
class RowChecksums:
    """The checksums of a file's rows."""

    source: str  # the file, in messages
    prompts: np.ndarray  # uint32 [n]
    embeddings: np.ndarray  # int64 [n]
    short: np.ndarray | None  # int64 [n]

    @classmethod
    def of_table(cls, table: pa.Table, source: str) -> "RowChecksums | None":
        """Those of a file's table; None for a file of before, which has one checksum for all."""
        if "prompt_sum" not in table.column_names:
            return None
        return cls(source, *(column(table, name) for name in ("prompt_sum", "embedding_sum", "short_sum")))


def as_lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    """Arrow's form of [n, D]; contiguous rows are not copied."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def column(table: pa.Table, name: str) -> np.ndarray | None:
    """A column of numbers, [n]; None if there is none. Arrow's own `to_numpy` would import pandas, in 0.15 s."""
    if name not in table.column_names:
        return None
    return np.concatenate([torch.from_dlpack(chunk).numpy() for chunk in table[name].chunks])


def as_tensor(rows: pa.ChunkedArray) -> Tensor:
    """The inverse, [n, D]; not copied where they lie in one chunk."""
    whole = rows.chunk(0) if rows.num_chunks == 1 else rows.combine_chunks()
    return torch.from_dlpack(whole.flatten()).view(len(whole), -1)  # from_numpy refuses read-only arrays


def part_of(
    embeddings: pa.ChunkedArray | Targets, short: ShortRows | None, sums: RowChecksums | None, span: slice
) -> Block:
    """Some rows of a bank, which are read where they are indexed, and compared with their checksums the first time."""

    def describe(row: int) -> str:
        return f"{sums.source} is damaged: prompt {span.start + row} is another now; remove the file, and make it again"

    def describe_target(row: int) -> str:
        path, row = targets.path_of(row)
        return f"{path} is damaged: row {row} is not what {sums.source} was made of; {make_again(path)}"

    if isinstance(embeddings, Targets):
        targets = Targets(embeddings.data, embeddings.rows[span])
        rows = CheckedRows(targets, sums and sums.embeddings[span], describe_target)
    else:
        rows = CheckedRows(as_tensor(embeddings[span]).numpy(), sums and sums.embeddings[span], describe)
    if short is None:
        return Block(span.start, rows)
    heads = CheckedRows(as_tensor(short.rows[span]).numpy(), sums and sums.short[span], describe)
    return Block(span.start, rows, heads, float(short.errors[span].max(initial=0)))


def schema(dtype: type | None, facts: dict, has_rows: bool = True, shortening: Shortening | None = None) -> pa.Schema:
    """The schema of a bank's file, with its facts; dtype None: without embeddings."""
    fields = {"prompt": pa.large_string(), "prompt_sum": pa.uint32(), "embedding_sum": pa.int64()}
    fields |= {} if dtype is None else {"embedding": pa.list_(pa.from_numpy_dtype(dtype), EMBEDDING_DIM)}
    fields |= {"row": pa.int64()} if has_rows else {}
    if shortening is not None:
        fields |= {"short": pa.list_(pa.int8(), shortening.width), "short_error": pa.float32(), "short_sum": pa.int64()}
    form = arrow.with_facts(pa.schema(fields), {"kind": KIND, **facts})
    return form if shortening is None else form.with_metadata({**form.metadata, SHORT_KEY: to_bytes(shortening)})


def read_batches(bank, dtype: type | None, facts: dict, keep: np.ndarray | None = None) -> pa.RecordBatchReader:
    """The batches of a file with this bank, with short rows if it is large.

    Args:
        dtype: of the embeddings; None: the file holds none.
        facts: for the schema to carry.
        keep: as for `save`.
    """
    how = None
    if len(bank) >= SHORTENED:
        sample = bank.vectors(np.unique(np.linspace(0, len(bank) - 1, SAMPLE_PROMPTS, dtype=int)))
        how = choose_shortening(torch.from_numpy(sample).double())
    form = schema(dtype, facts, bank.rows is not None, how)

    def batches() -> Iterator[pa.RecordBatch]:
        with progress_bar(len(bank), "prompt", "collecting prompts", delay=5, leave=False) as bar:
            for start, block in bank.blocks():
                part = np.arange(start, start + len(block))
                part = part if keep is None else part[keep[part]]
                prompts = bank.prompts[start : start + len(block)].combine_chunks().take(pa.array(part - start))
                vectors = block.numpy()[part - start].astype(dtype or np.float32)
                yield batch_of(form, prompts, vectors, None if bank.rows is None else bank.rows[part], how)
                bar.update(len(block))

    return pa.RecordBatchReader.from_batches(form, batches())


def batch_of(
    form: pa.Schema, prompts: pa.Array, vectors: np.ndarray, rows: np.ndarray | None, how: Shortening | None
) -> pa.RecordBatch:
    """Some rows of a bank's file, with their checksums.

    Args:
        form: as `schema` makes it.
        vectors: [n, 384] in the dtype of the file.
        rows, how: as `schema` was told that they are there.
    """
    columns = {"prompt": prompts, "prompt_sum": text_sums(prompts), "embedding_sum": row_sums(vectors), "row": rows}
    if "embedding" in form.names:
        columns["embedding"] = as_lists(vectors)
    if how is not None:
        short, errors = (part.numpy() for part in how.round(torch.from_numpy(vectors).double()))
        columns |= {"short": as_lists(short), "short_error": errors, "short_sum": row_sums(short)}
    return pa.record_batch([pa.array(columns[name]) for name in form.names], schema=form)


def short_rows(table: pa.Table) -> ShortRows | None:
    """The short rows of a file's table; None if it holds none."""
    if "short" not in table.column_names:
        return None
    how = from_bytes(table.schema.metadata[SHORT_KEY])
    return ShortRows(how, table["short"], column(table, "short_error"))


def to_bytes(how: Shortening) -> bytes:
    """A shortening to int8 as the bytes of an .npz file."""
    arrays = {} if how.axes is None else {"axes": how.axes.numpy(), "turn": how.turn.numpy()}
    stream = io.BytesIO()
    np.savez(stream, scale=how.scale, width=how.width, **arrays)
    return stream.getvalue()


def from_bytes(content: bytes) -> Shortening:
    """The shortening that `to_bytes` wrote."""
    with np.load(io.BytesIO(content)) as arrays:
        axes, turn = (torch.from_numpy(arrays[name]) if name in arrays else None for name in ("axes", "turn"))
        return Shortening(axes, turn, torch.int8, float(arrays["scale"]), int(arrays["width"]))
