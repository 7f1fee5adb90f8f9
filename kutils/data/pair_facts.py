"""Reads the metadata that an import has written for each pair: generator, seed, source, file and key."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet


def facts_path(tsv_path: Path) -> Path:
    """The path of the Parquet file beside an imported table; other tables have none."""
    return tsv_path.with_suffix(".pairs.parquet")


def read_facts(tsv_path: Path, images: pa.Array | pa.ChunkedArray, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Metadata of images, looked up by their paths, since the table's rows may have changed.

    Returns: column -> object [images] of texts, empty if unknown.
    """
    if not facts_path(tsv_path).is_file():
        return {name: np.full(len(images), "", object) for name in columns}
    pairs = parquet.read_table(facts_path(tsv_path), columns=["image", *columns], page_checksum_verification=True)
    places = pc.index_in(images.cast(pa.large_string()), value_set=pairs["image"].cast(pa.large_string()))
    return {name: pairs[name].take(places).fill_null("").to_numpy() for name in columns}
