"""Sorts the rows of a fold into slices by their prompts, and computes the mean score of each slice."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from kutils.data.datasets import PromptImages
from kutils.data.pair_facts import facts_path, read_facts
from kutils.data.prompt_bank import PromptBank
from kutils.system.tables import read_table

SLICES = ("words", "source", "kind", "similarity")
GENERATOR = "generator"  # one more way, if a data set was imported
UNKNOWN = "unknown"
MOST_BINS = 6  # bins of the number of words
BIN_WIDTHS = (1, 2, 5, 10, 20, 50, 100)
KINDS = ("sentence", "phrases", "tags")
MOST_NAMES = 20  # slices by source or kind; the rest is "others"
OTHERS = "others"
PHRASES, TAGS = 2, 6  # least number of comma-separated parts of such a prompt
COSINES = (0.5, 0.6, 0.7, 0.8, 0.9)
BLOCK = 65_536  # training prompts in memory at a time: 100 MB


def label_rows(data: PromptImages, rows: np.ndarray, fold: int, most: int = 4000) -> pd.DataFrame:
    """Sort rows into slices by their prompts, in four ways; in five if a data set records the images' generators.

    Args:
        rows: int [n], row numbers over all data sets.
        fold: the validation fold; all other rows are training rows.
        most: distinct prompts whose nearest training prompt is searched for; if there are more, a random sample.
    Returns: one row per given row, ordered categoricals, the names of `slicings`:
        words: number of words, in at most MOST_BINS bins of a round width chosen for these prompts;
        source: the column `source` of the row's TSV, or the name of the data set; of more than MOST_NAMES, the rare
            ones are "others", the last slice;
        kind: the column `kind` of the row's TSV; where there is none, "sentence" (no comma), "phrases" (2 to 5 parts
            between commas) or "tags" (6 parts or more); more than MOST_NAMES as for sources;
        similarity: cosine of the prompt and the nearest training prompt; missing if the prompt is not in the sample, or
            if there is no training row;
        generator: of the image, as recorded by its import, or "unknown"; more than MOST_NAMES as for sources.
    Raises: ValueError for a TSV that can no longer be read.
    """
    rows = np.asarray(rows)
    prompts = data.prompts.take(pa.array(rows))
    sources, kinds = table_columns(data, rows, prompt_kinds(prompts))
    labels = pd.DataFrame(
        {
            "words": bin_words(pc.count_substring_regex(prompts, r"\S+").to_numpy()),
            "source": common_names(sources),
            "kind": common_names(kinds, KINDS),
            "similarity": bin_cosines(nearest_training_cosines(data, rows, fold, most)),
        }
    )
    if GENERATOR in slicings(data):
        labels[GENERATOR] = common_names(imported_column(data, rows, GENERATOR, np.full(len(rows), UNKNOWN, object)))
    return labels


def slicings(data: PromptImages) -> tuple[str, ...]:
    """The ways in which rows of data sets can be sorted."""
    imported = any(facts_path(data.root / f"{name}.tsv").is_file() for name in data.names)
    return (*SLICES, GENERATOR) if imported else SLICES


def imported_column(data: PromptImages, rows: np.ndarray, column: str, values: np.ndarray) -> np.ndarray:
    """`values` (object [n]), replaced by the column of the import's metadata for rows of imported data sets."""
    number, values = data.origin(rows)[0], values.copy()
    for index in np.unique(number):
        of_set = np.flatnonzero(number == index)
        images = data.images.take(pa.array(rows[of_set]))
        known = read_facts(data.root / f"{data.names[index]}.tsv", images, [column])[column]
        values[of_set] = np.where(known == "", values[of_set], known)
    return values


def slice_means(cosines: pd.DataFrame, labels: pd.Series) -> pd.DataFrame:
    """Average cosines over every slice.

    Args:
        cosines: a row per image and a column per model.
        labels: the slice of each image, in the same order; an image without one is left out.
    Returns: index: slices with at least one image, in the order of the categories; columns: images (their number), and
        each model's mean cosine.
    Raises: ValueError if there are not as many labels as rows.
    """
    if len(cosines) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(cosines)} rows of cosines; there must be one for each")
    grouped = cosines.astype(np.float64).groupby(
        pd.Series(labels.array, cosines.index, name=labels.name), observed=True
    )
    means = grouped.mean()
    means.insert(0, "images", grouped.size())
    return means


def prompt_kinds(prompts: pa.ChunkedArray) -> np.ndarray:
    """object [n]: "sentence", "phrases" or "tags", by the number of parts between commas that are not blank."""
    parts = pc.count_substring_regex(prompts, r"[^,\s][^,]*").to_numpy()
    return np.array(KINDS, object)[np.digitize(parts, (PHRASES, TAGS))]


def table_columns(data: PromptImages, rows: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source and kind of each row, both object [n], from the TSVs.

    If a TSV has no source, it is that of the import, else the set's name; if it has no kind, it is taken from `kinds`.
    """
    number, local = data.origin(rows)
    sources = imported_column(data, rows, "source", np.array(data.names, object)[number])
    columns = {"source": sources, "kind": kinds.copy()}
    for index in np.unique(number):
        of_set = number == index
        table = read_table(data.root / f"{data.names[index]}.tsv", [])
        for name in columns.keys() & set(table.column_names):
            values = table[name].take(pa.array(local[of_set])).to_numpy(zero_copy_only=False)
            columns[name][of_set] = np.where(values == "", columns[name][of_set], values)
    return columns["source"], columns["kind"]


def common_names(values: np.ndarray, first: Sequence[str] = ()) -> pd.Categorical:
    """Categories: those of `first`, then the MOST_NAMES most common by name, and last "others" for the rest."""
    counts = Counter(values.tolist())
    common = sorted(counts, key=lambda name: (-counts[name], name))[:MOST_NAMES]
    names = [*first, *sorted(set(common) - {*first, OTHERS})]
    others = [OTHERS] if set(counts) - set(names) else []
    series = pd.Series(values)
    return pd.Categorical(series.where(series.isin(names), OTHERS), [*names, *others], ordered=True)


def bin_words(words: np.ndarray) -> pd.Categorical:
    """Bins of one width for the middle 90 % of prompts; the first and the last bin take the rest."""
    if not len(words):
        return pd.Categorical([], [], ordered=True)
    low, high = (int(value) for value in np.percentile(words, [5, 95], method="nearest"))
    for width in (*BIN_WIDTHS, high):
        first, last = -(-low // width), -(-high // width)  # bin k: (k - 1) * width + 1 to k * width words
        if last - first < MOST_BINS:
            break
    ends = width * np.arange(first, last)
    starts = [1, *ends + 1]
    names = [f"{start} to {end}" if start < end else f"{end}" for start, end in zip(starts, ends, strict=False)]
    names.append(f"{starts[-1]} or more")
    return pd.Categorical.from_codes(np.digitize(words, ends, right=True), names, ordered=True)


def bin_cosines(cosines: np.ndarray) -> pd.Categorical:
    """Bins of 0.1 from 0.5 on; NaN is missing."""
    names = [f"below {COSINES[0]}", *(f"{low} to {high}" for low, high in pairwise(COSINES))]
    codes = np.where(np.isnan(cosines), -1, np.digitize(cosines, COSINES))
    return pd.Categorical.from_codes(codes, [*names, f"{COSINES[-1]} or more"], ordered=True)


def nearest_training_cosines(data: PromptImages, rows: np.ndarray, fold: int, most: int) -> np.ndarray:
    """Cosine of each row's prompt and the nearest training prompt: float32 [n]; NaN for prompts outside the sample."""
    codes, first, numbers = np.unique(data.prompt_codes[rows], return_index=True, return_inverse=True)
    chosen = np.arange(len(codes))
    if most < len(codes):
        chosen = np.sort(np.random.default_rng(0).choice(chosen, most, replace=False))
    training = data.training_rows(fold)
    _, once = np.unique(data.prompt_codes[training], return_index=True)
    training = np.sort(training[once])  # a prompt counts once; in the order of the files
    cosines = np.full(len(codes), np.nan, np.float32)
    queries = data.targets(rows[first[chosen]])
    for start in range(0, len(training), BLOCK):
        block = training[start : start + BLOCK]
        bank = PromptBank(data.prompts.take(pa.array(block)), data.targets(block))
        cosines[chosen] = np.fmax(cosines[chosen], bank.nearest(queries, k=1)[1][:, 0])
    return cosines[numbers]
