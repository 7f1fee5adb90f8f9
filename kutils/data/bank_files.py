"""The columns of a bank's file: prompts, embeddings, rows, and short rows with the way they were made."""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from kutils.data.datasets import PromptImages
from kutils.data.nearest import BankShortening
from kutils.prompts.shortening import Shortening
from kutils.system import arrow
from kutils.system.embedding_files import EMBEDDING_DIM

KIND = "kutils prompt bank"  # a fact that the file carries
SHORT_KEY = b"shortening"  # of the file's metadata


@dataclass(frozen=True)
class Targets:
    """The embeddings of some rows of data sets, which stay in their .npy files until they are indexed."""

    data: PromptImages
    rows: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: np.ndarray | slice) -> np.ndarray:
        return self.data.targets(self.rows[indices])


def as_lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    """Arrow's form of [n, D]; contiguous rows are not copied."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def as_tensor(rows: pa.ChunkedArray) -> Tensor:
    """The inverse, [n, D]; not copied where they lie in one chunk."""
    whole = rows.chunk(0) if rows.num_chunks == 1 else rows.combine_chunks()
    return torch.from_dlpack(whole.flatten()).view(len(whole), -1)  # from_numpy refuses read-only arrays


def part_of(embeddings: pa.ChunkedArray | Targets, span: slice) -> np.ndarray | Targets:
    """Some of the embeddings, [n, D], which are read where they are indexed."""
    if isinstance(embeddings, Targets):
        return Targets(embeddings.data, embeddings.rows[span])
    return as_tensor(embeddings[span]).numpy()


def schema(dtype: type | None, facts: dict, has_rows: bool = True, shortening: Shortening | None = None) -> pa.Schema:
    """The schema of a bank's file, with its facts; dtype None: without embeddings."""
    fields = {"prompt": pa.large_string()}
    fields |= {} if dtype is None else {"embedding": pa.list_(pa.from_numpy_dtype(dtype), EMBEDDING_DIM)}
    fields |= {"row": pa.int64()} if has_rows else {}
    fields |= (
        {} if shortening is None else {"short": pa.list_(pa.int8(), shortening.width), "short_error": pa.float32()}
    )
    form = arrow.with_facts(pa.schema(fields), {"kind": KIND, **facts})
    return form if shortening is None else form.with_metadata({**form.metadata, SHORT_KEY: to_bytes(shortening)})


def short_rows(table: pa.Table) -> tuple[pa.ChunkedArray, BankShortening] | None:
    """The short rows of a file's table, int8 lists [n], and how they were made; None if it holds none."""
    if "short" not in table.column_names:
        return None
    how = from_bytes(table.schema.metadata[SHORT_KEY])
    return table["short"], BankShortening(how, pc.max(table["short_error"]).as_py())


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
