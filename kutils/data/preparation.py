"""Makes data sets ready for training (embeddings, folds), and summarises what they hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kutils.data.datasets import load_datasets
from kutils.data.prompt_bank import PromptBank
from kutils.prompts import collection, embedding, grammar
from kutils.prompts import folds as prompt_folds
from kutils.prompts.partition import leakage_report, report_warnings
from kutils.prompts.similarity import similar_pairs
from kutils.runs.recipes import nearest
from kutils.system import paths
from kutils.system.tables import read_table

GRAMMAR = "templates"  # the source of prompts that no file holds
MOST_QUERIES = 2_000  # prompts whose nearest neighbours are looked up


class PromptLists(NamedTuple):
    """Prompts files of one name in `input/`: all clean prompts, those kept, and the near-duplicates of those."""

    all: Path
    kept: Path
    rest: Path


def prompt_lists(name: str) -> PromptLists:
    """The three files of a name. Raises: ValueError for a name that is no file name."""
    if not paths.is_safe_relative(name) or "/" in name:
        raise ValueError(f"{name!r} cannot name lists below {paths.input_dir()}")
    return PromptLists(*(paths.input_dir() / f"{name}{part}.tsv" for part in (".all", ".prompts", "_part2.prompts")))


def collect_prompts(
    lists: PromptLists, files: str, *, column: str = "", num_prompts: int = 4000, overwrite: bool = False
) -> dict:
    """Write the list of all clean prompts, from files or from the grammar.

    Args:
        files: of any kind that `kutils sources` reads, separated by commas; "": prompts of the grammar.
        column: of the prompts, where there are several that may be meant.
        num_prompts: of the grammar.
        overwrite: write over another list of this name.
    Returns: the report of `sources.make_prompts_file`.
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
    """Whether a row of these files has a fold. Raises: ValueError."""
    tables = [read_table(path, ["prompt"]) for path in tsv_paths]
    return any("fold" in table.column_names and (table["fold"].to_numpy() >= 0).any() for table in tables)


def prepare(
    names: Sequence[str],
    threshold: float = 0.7,
    num_folds: int = 10,
    method: str = "partition",
    *,
    refold: bool = False,
) -> dict:
    """Embed the prompts of data sets where that has not been done, and assign folds where there are none.

    Embeddings and folds that are there are kept, those made elsewhere too; embeddings of other prompts than the table's
    (the record beside them says so) are made again.

    Args:
        names: data sets of `input/`, folded together; threshold, num_folds, method: as in `grouping.assign_folds`.
        refold: replace folds that are there. Checkpoints of the former folds can then not be refined any more.
    Returns: the report of the folds.
    Raises: ValueError naming file and row; ValueError where the folds that are there are
        not those asked for.
    """
    tsv_paths = [paths.input_dir() / f"{name}.tsv" for name in names]
    for path in tsv_paths:
        if not path.is_file():
            close = nearest(path.stem, [found.stem for found in path.parent.glob("*.tsv")])
            made = f"kutils generate PROMPTS.tsv --images-per-prompt 3 --output input/{path.stem}"
            raise ValueError(f"{path} is not there{close}; from a list of prompts it is made by: {made}")
    folds = np.concatenate([read_table(path, ["image", "prompt", "fold"])["fold"].to_numpy() for path in tsv_paths])
    for path in tsv_paths:
        record = paths.read_record(path.with_suffix(".npy.json"))
        if not path.with_suffix(".npy").is_file() or record is not None:
            embedding.embed_table(path, dtype=(record or {}).get("dtype", "float32"))
    if refold or (folds < 0).all():
        return prompt_folds.assign_folds(tsv_paths, threshold, num_folds, method)
    if (folds < 0).any():
        raise ValueError(
            f"{(folds < 0).sum():,} of {len(folds):,} rows have no fold and the others have one; folds are assigned to "
            "all rows together: refold=True replaces those that are there"
        )
    if not all(prompt_folds.fold_report_path(path).is_file() for path in tsv_paths):
        files = " ".join(map(str, tsv_paths))
        print("no report came with these folds; they are kept as they are. To report on them, and to mark the rows")
        print(
            f"without a similar prompt in another fold:  kutils folds {files} --keep",
            flush=True,
        )
        return report_on_folds(tsv_paths, threshold)
    asked = {"threshold": threshold, "num_folds": num_folds, "method": method}
    for path in tsv_paths:
        report = prompt_folds.read_fold_report(path)
        differing = [f"{key} {report[key]}, not {value}" for key, value in asked.items() if report[key] != value]
        if not set(names) <= set(report["datasets"]):
            differing.append(f"{', '.join(report['datasets'])} alone, not {', '.join(names)} together")
        if differing:
            raise ValueError(
                f"{path} has folds already, made with {'; '.join(differing)}. Ask for what is there, or replace it "
                "with refold=True (checkpoints of the former folds can then not be refined any more)"
            )
    return report


def report_on_folds(tsv_paths: Sequence[Path], threshold: float) -> dict:
    """The report of folds that are there already, whoever assigned them; nothing is written.

    Raises: ValueError if a prompt is in two folds.
    """
    load_datasets([path.stem for path in tsv_paths])
    distinct = prompt_folds.read_distinct(tsv_paths)
    folds = np.empty(len(distinct.num_rows), np.int8)
    for path, table in distinct.tables.items():
        folds[distinct.codes[path]] = table["fold"].to_numpy()
    num_folds = int(folds.max()) + 1
    pairs = similar_pairs(distinct.embeddings, threshold, progress=True)
    report = {"method": "their maker", "threshold": threshold, "num_folds": num_folds}
    report |= leakage_report(folds, distinct.num_rows, pairs, num_folds)
    return report | {"warnings": report_warnings(report)}


def random_examples(names: Sequence[str], count: int = 8, seed: int = 0) -> tuple[list[Path], list[str]]:
    """Random images of data sets, of different prompts as far as there are so many, and their prompts."""
    data = load_datasets(names, need_folds=False)
    rows = np.random.default_rng(seed).permutation(len(data))[: 20 * count]
    image_of = {data.prompts[int(row)].as_py(): data.image_path(int(row)) for row in rows}
    chosen = list(image_of)[:count]
    return [image_of[prompt] for prompt in chosen], chosen


def cosines_between(bank: PromptBank, seed: int = 0) -> dict[str, np.ndarray]:
    """How similar prompts are: `random pairs`, and `nearest other prompt` of a sample, looked up among all.

    Args:
        bank: of at least two prompts.
        seed: of the samples.
    Returns: two float32 arrays, of 5 x MOST_QUERIES and up to MOST_QUERIES cosines.
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
