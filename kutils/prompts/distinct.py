"""Reads the distinct prompts of several data sets, with their embeddings, sources and folds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.system.embedding_files import EMBEDDING_DIM, describe_mismatch, open_embeddings
from kutils.system.output import quoted
from kutils.system.tables import check_rows, read_table

MOST_SOURCES = 50  # the most frequent sources, which are balanced over folds; all others count as one source


@dataclass(frozen=True)
class DistinctPrompts:
    """The distinct prompts of several files."""

    tables: dict[Path, pa.Table]
    codes: dict[Path, np.ndarray]  # int32 [rows of the file]: the number of each row's distinct prompt
    prompts: pa.Array  # [distinct]
    num_rows: np.ndarray  # int64 [distinct]: number of rows with the prompt, over all files
    sources: np.ndarray  # int64 [distinct], codes from 0 of column `source`, else of the file; rare ones share one
    embeddings: np.ndarray  # float32 [distinct, 384]


def read_distinct(tsv_paths: Sequence[Path]) -> DistinctPrompts:
    """Read data sets, or prompts files without images, with the embeddings beside them.

    Raises: ValueError naming file and row, also if rows of one prompt differ in their embeddings.
    """
    tables, maps = {}, {}
    for path in tsv_paths:
        table = read_table(path, ["prompt"])
        if "image" in table.column_names:
            table = read_table(path, ["image", "prompt", "fold"])
        elif "fold" not in table.column_names:
            table = table.append_column("fold", pa.array(np.full(table.num_rows, -1, np.int8)))
        check_rows(path, table)
        if problem := describe_mismatch(path, table["prompt"]):
            raise ValueError(problem)
        tables[path] = table
        maps[path] = open_embeddings(path.with_suffix(".npy"), tables[path].num_rows)
    prompts = pa.chunked_array([chunk for table in tables.values() for chunk in table["prompt"].chunks])
    encoded = prompts.combine_chunks().dictionary_encode()
    all_codes = encoded.indices.to_numpy()
    starts = np.cumsum([table.num_rows for table in tables.values()])[:-1]
    codes = dict(zip(tables, np.split(all_codes, starts), strict=True))
    embeddings = np.empty((len(encoded.dictionary), EMBEDDING_DIM), np.float32)
    for path in tables:
        embeddings[codes[path]] = maps[path]
    for path in tables:
        check_agreement(path, codes[path], maps[path], embeddings)
    sources = sources_of(tables, all_codes)
    return DistinctPrompts(tables, codes, encoded.dictionary, np.bincount(all_codes), sources, embeddings)


def sources_of(tables: dict[Path, pa.Table], codes: np.ndarray) -> np.ndarray:
    """The source of each distinct prompt: that of its first row. Returns: as in `DistinctPrompts`."""
    columns = [
        table["source"].combine_chunks() if "source" in table.column_names else pa.repeat(path.stem, table.num_rows)
        for path, table in tables.items()
    ]
    numbers = pa.concat_arrays([column.cast(pa.string()) for column in columns]).dictionary_encode().indices.to_numpy()
    numbers = numbers[np.unique(codes, return_index=True)[1]]
    place = np.empty(numbers.max() + 1, np.int64)
    place[np.argsort(-np.bincount(numbers), kind="stable")] = np.arange(len(place))
    return np.minimum(place, MOST_SOURCES)[numbers]


def check_agreement(tsv_path: Path, codes: np.ndarray, rows: np.ndarray, embeddings: np.ndarray) -> None:
    """Raise ValueError if rows of one prompt have different embeddings: then an .npy file does not fit its table."""
    for start in range(0, len(codes), 65536):
        cosine = np.einsum("nd,nd->n", rows[start : start + 65536], embeddings[codes[start : start + 65536]])
        if (cosine < 0.99).any():  # other devices and precisions stay far above
            row = start + int(np.argmax(cosine < 0.99))
            raise ValueError(
                f"{tsv_path.with_suffix('.npy')}, row {row} (line {row + 2} of the TSV): the same prompt has another "
                f"embedding elsewhere (cosine {cosine[row - start]:.3f}), so that one of the files is not of its "
                f"prompts; make them again: python input/gen_prompt_embedding.py {tsv_path} --overwrite"
            )


def existing_folds(distinct: DistinctPrompts) -> np.ndarray:
    """int8 [distinct]: the fold that each prompt already has, -1 for none.

    Raises: ValueError if a prompt is in two folds, or if no prompt has a fold.
    """
    folds = np.full(len(distinct.num_rows), -1, np.int8)
    for path, table in distinct.tables.items():
        np.maximum.at(folds, distinct.codes[path], table["fold"].to_numpy())
    for path, table in distinct.tables.items():
        own = table["fold"].to_numpy()
        torn = np.flatnonzero((own >= 0) & (own != folds[distinct.codes[path]]))
        if len(torn):
            row = int(torn[0])
            raise ValueError(
                f"{path}, line {row + 2}: the prompt {quoted(table['prompt'][row].as_py())} is in the folds "
                f"{own[row]} and {folds[distinct.codes[path][row]]}; assign all folds anew, without --keep"
            )
    if folds.max() < 1:
        raise ValueError("there are no folds that could be kept; leave out --keep")
    return folds
