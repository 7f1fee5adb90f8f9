"""Makes data sets ready for training (embeddings, folds), and summarises their content."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from kutils.data.datasets import load_datasets
from kutils.data.prompt_bank import PromptBank
from kutils.prompts import collection, embedding, grammar
from kutils.prompts import folds as prompt_folds
from kutils.prompts.distinct import read_distinct
from kutils.prompts.similarity import similar_pairs
from kutils.runs.recipes import nearest
from kutils.system import paths
from kutils.system.tables import read_table

GRAMMAR = "templates"  # value of `source` for prompts of the grammar
MOST_QUERIES = 2_000  # prompts whose nearest neighbours are searched for


class PromptLists(NamedTuple):
    """Prompts files of one name in `input/`."""

    all: Path  # all clean prompts
    kept: Path  # those that remain without near-duplicates
    rest: Path  # the near-duplicates


def prompt_lists(name: str) -> PromptLists:
    """The three files of a name; ValueError for a name that is no file name."""
    if not paths.is_safe_relative(name) or "/" in name:
        raise ValueError(f"{name!r} cannot name lists below {paths.input_dir()}")
    return PromptLists(*(paths.input_dir() / f"{name}{part}.tsv" for part in (".all", ".prompts", "_part2.prompts")))


def collect_prompts(
    lists: PromptLists, files: str, *, column: str = "", num_prompts: int = 4000, overwrite: bool = False
) -> dict:
    """Write the list of all clean prompts, from files or from the grammar.

    Args:
        files: what `kutils sources` reads, separated by commas; empty: prompts of the grammar.
        column: with the prompts; empty: the first of the usual names.
    Returns: the report of `collection.make_prompts_file`.
    Raises: ValueError, before anything is written.
    """
    if files:
        options = {"column": column} if column else {}
        names = [name.strip() for name in files.split(",")]
        return collection.make_prompts_file(names, lists.all, overwrite=overwrite, **options)
    made = grammar.compose_prompts(num_prompts)
    collection.write_prompts(lists.all, made, [GRAMMAR] * len(made), overwrite=overwrite)
    return {"read": len(made), "kept": len(made), "dropped": {}, "changed": {}}


def have_folds(tsv_paths: Sequence[Path]) -> bool:
    """Whether a row of these files has a fold; ValueError for a table that cannot be read."""
    tables = [read_table(path, ["prompt"]) for path in tsv_paths]
    return any("fold" in table.column_names and (table["fold"].to_numpy() >= 0).any() for table in tables)


def prepare_datasets(
    names: Sequence[str],
    threshold: float = 0.7,
    num_folds: int = 10,
    method: str = "",
    *,
    refold: bool = False,
) -> dict:
    """Embed the prompts of data sets and assign folds, if this has not been done.

    Existing embeddings and folds are kept, also those from elsewhere. Embeddings are made again if their record says
    that they are of other prompts.

    Args:
        method: of `folds.assign_folds`; empty: its default for new folds; existing folds of any method are accepted.
        refold: replace existing folds. Checkpoints of the old folds can then no longer be refined.
    Returns: the report of the folds.
    Raises: ValueError naming file and row, or if the existing folds differ from those asked for.
    """
    tsv_paths = [paths.input_dir() / f"{name}.tsv" for name in names]
    for path in tsv_paths:
        if not path.is_file():
            close = nearest(path.stem, [file.stem for file in path.parent.glob("*.tsv")])
            command = f"kutils generate PROMPTS.tsv --images-per-prompt 3 --output input/{path.stem}"
            raise ValueError(f"{path} is not there{close}; from a list of prompts it is made by: {command}")
    folds = np.concatenate([read_table(path, ["image", "prompt", "fold"])["fold"].to_numpy() for path in tsv_paths])
    for path in tsv_paths:
        record = paths.read_record(path.with_suffix(".npy.json"))
        if not path.with_suffix(".npy").is_file() or record is not None:
            embedding.embed_table(path, dtype=(record or {}).get("dtype", "float32"))
    if refold or (folds < 0).all():
        return prompt_folds.assign_folds(tsv_paths, threshold, num_folds, method or prompt_folds.FOLD_METHODS[0])
    if (folds < 0).any():
        raise ValueError(
            f"{(folds < 0).sum():,} of {len(folds):,} rows have no fold and the others have one; folds are assigned to "
            "all rows together: refold=True replaces those that are there"
        )
    if not all(prompt_folds.fold_report_path(path).is_file() for path in tsv_paths):
        print("no report came with these folds; they are kept as they are. To report on them, and to mark the rows")
        files = " ".join(map(str, tsv_paths))
        print(f"without a similar prompt in another fold:  kutils folds {files} --keep", flush=True)
        return report_on_folds(tsv_paths, threshold)
    settings = {"threshold": threshold, "num_folds": num_folds} | ({"method": method} if method else {})
    return matching_report(tsv_paths, settings)


def matching_report(tsv_paths: Sequence[Path], settings: dict) -> dict:
    """The report that was written with the folds of these data sets.

    Args:
        settings: values that the folds must have been made with.
    Raises: ValueError if they were made with others, or without one of these data sets.
    """
    names = [path.stem for path in tsv_paths]
    for path in tsv_paths:
        report = prompt_folds.read_fold_report(path)
        differing = [f"{key} {report[key]}, not {value}" for key, value in settings.items() if report[key] != value]
        if not set(names) <= set(report["datasets"]):
            differing.append(f"{', '.join(report['datasets'])} alone, not {', '.join(names)} together")
        if differing:
            raise ValueError(
                f"{path} has folds already, made with {'; '.join(differing)}. Ask for what is there, or replace it "
                "with refold=True (checkpoints of the previous folds can then not be refined any more)"
            )
    return report


def report_on_folds(tsv_paths: Sequence[Path], threshold: float) -> dict:
    """Measure the leakage between existing folds, also those from elsewhere; nothing is written.

    Returns: a report as of `folds.assign_folds`.
    Raises: ValueError if a prompt is in two folds.
    """
    load_datasets([path.stem for path in tsv_paths])
    distinct = read_distinct(tsv_paths)
    folds = np.empty(len(distinct.num_rows), np.int8)
    for path, table in distinct.tables.items():
        folds[distinct.codes[path]] = table["fold"].to_numpy()
    num_folds = int(folds.max()) + 1
    pairs = similar_pairs(distinct.embeddings, threshold, progress=True)
    report = {"method": "their maker", "threshold": threshold, "num_folds": num_folds}
    return report | prompt_folds.describe_folds(distinct, folds, pairs, num_folds)


def random_examples(names: Sequence[str], count: int = 8, seed: int = 0) -> tuple[list[Path | Image.Image], list[str]]:
    """Random images of data sets, of different prompts as far as possible, and their prompts."""
    data = load_datasets(names, need_folds=False)
    rows = np.random.default_rng(seed).permutation(len(data))[: 20 * count]
    row_of = {data.prompts[int(row)].as_py(): int(row) for row in rows}
    chosen = list(row_of)[:count]
    return [data.picture(row_of[prompt]) for prompt in chosen], chosen


def cosines_between(bank: PromptBank, seed: int = 0) -> dict[str, np.ndarray]:
    """Sample how similar prompts are to each other.

    Args:
        bank: of at least two prompts.
    Returns: `random pairs`, float32 [5 * MOST_QUERIES] cosines of pairs of different prompts; `nearest other prompt`,
        float32 [at most MOST_QUERIES], of prompts of a sample with the nearest of all others.
    Raises: ValueError for a bank of one prompt.
    """
    count = len(bank)
    if count < 2:
        raise ValueError("one distinct prompt has no other to be compared with")
    random = np.random.default_rng(seed)
    first = random.integers(0, count, 5 * MOST_QUERIES)
    second = (first + random.integers(1, count, len(first))) % count  # never the prompt itself
    pairs = np.einsum("nd,nd->n", bank.vectors(first), bank.vectors(second))
    queries = random.permutation(count)[:MOST_QUERIES]
    _, cosines = bank.nearest(bank.vectors(queries), k=2)  # the nearest is the prompt itself
    return {"random pairs": pairs, "nearest other prompt": cosines[:, 1]}
