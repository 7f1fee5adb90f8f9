"""Reads what an import has written about each pair: generator, seed, source, file and key."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet


def facts_path(tsv_path: Path) -> Path:
    """The Parquet file beside an imported table; there is none beside others."""
    return tsv_path.with_suffix(".pairs.parquet")


def read_facts(tsv_path: Path, images: pa.Array | pa.ChunkedArray, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """What is known of images, by their paths in the table, whatever rows it has by now.

    Returns: object [images] of texts per column, empty where nothing is known.
    """
    if not facts_path(tsv_path).is_file():
        return {name: np.full(len(images), "", object) for name in columns}
    pairs = parquet.read_table(facts_path(tsv_path), columns=["image", *columns], page_checksum_verification=True)
    places = pc.index_in(images.cast(pa.large_string()), value_set=pairs["image"].cast(pa.large_string()))
    return {name: pairs[name].take(places).fill_null("").to_numpy() for name in columns}
