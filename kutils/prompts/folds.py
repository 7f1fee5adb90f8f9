"""Assigns folds to data sets on disk: reads their tables and embeddings, writes fold columns and reports."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.prompts.clean_marks import clean_mark_path, write_clean_mark
from kutils.prompts.distinct import DistinctPrompts, existing_folds, read_distinct
from kutils.prompts.fold_methods import CUTTING, FOLD_METHODS, assign, heavy_prompts
from kutils.prompts.leakage import STRATA, format_leakage, leakage_report, report_warnings
from kutils.prompts.partition import extend_folds, leaked_prompts
from kutils.prompts.similarity import SimilarPairs, check_threshold, similar_pairs, strips_folder
from kutils.prompts.stratified import topics_of
from kutils.system import checksums, locks, paths
from kutils.system.devices import pick_device
from kutils.system.output import quoted
from kutils.system.ranks import Ranks, join_workers
from kutils.system.tables import MAX_FOLDS, folds_hash, read_table, write_table


def assign_folds(
    tsv_paths: Sequence[Path | str],
    threshold: float = 0.7,
    num_folds: int | None = None,
    method: str = FOLD_METHODS[0],
    seed: int = 0,
    *,
    keep: bool = False,
    device: str = "auto",
    ranks: Ranks | None = None,
    progress: bool = True,
) -> dict | None:
    """Assign folds to the prompts of all files together, and write the fold columns in place.

    For each file, the previous table becomes `<name>.tsv.bak`, `<name>.clean.npz` marks the rows without a similar
    prompt in another fold, and `<name>.folds.json` holds the report. Old reports are removed first and new ones written
    last. So after a kill there are none; `read_fold_report` says so, and the same call completes the work.

    Args:
        tsv_paths: data sets, or prompts files (which get a column `fold`), each with its .npy file.
        threshold: cosine from which prompts are similar, in (0, 1].
        num_folds: 2 to 10; None: 10, or the existing number with `keep`.
        method: one of FOLD_METHODS. stratified cuts groups of similar prompts into parts, so that every fold has its
            share of each source and topic; partition cuts as little as it can; the others keep groups whole.
        seed: of stratified, partition and kmeans.
        keep: assign folds only to prompts without one (-1); the others stay where they are.
        device: auto, cpu or cuda; without effect if ranks are given.
        ranks: share the search for similar pairs; the main rank does everything else.
    Returns: the report, with the folds hash of every file; None on ranks other than the main one.
    Raises: ValueError, before anything is written.
    """
    tsv_paths = [Path(path) for path in tsv_paths]
    check_settings(tsv_paths, threshold, num_folds, method, keep)
    ranks = ranks or Ranks(0, 1, pick_device(device))
    with locks.held(tsv_paths, ranks):
        distinct = read_distinct(tsv_paths)
        previous = existing_folds(distinct) if keep else None
        if keep and num_folds not in (None, previous.max() + 1):
            raise ValueError(f"there are {previous.max() + 1} folds, not {num_folds}; leave out --folds, or --keep")
        num_folds = int(previous.max()) + 1 if keep else num_folds or MAX_FOLDS
        num_prompts = len(distinct.num_rows)
        if num_prompts < num_folds:
            raise ValueError(f"{num_prompts} distinct prompts cannot fill {num_folds} folds; ask for fewer folds")
        with strips_folder(distinct.embeddings, threshold, ranks=ranks) as folder:
            pairs = similar_pairs(distinct.embeddings, threshold, folder=folder, ranks=ranks, progress=progress)
            if not ranks.is_main:
                return None
            if keep:
                path = folder / f"extended-{seed}.npz"
                previous, folds = extend_once(path, previous, distinct.num_rows, pairs, seed)
            else:
                strata = distinct.embeddings, distinct.sources
                folds = assign(distinct.num_rows, pairs, num_folds, method, seed, *strata)
            method = kept_method(tsv_paths, method) if keep else method
            report = {"method": method, "threshold": threshold, "num_folds": num_folds, "seed": seed}
            report |= {"added_prompts": int((previous < 0).sum())} if keep else {}
            report |= describe_folds(distinct, folds, pairs, num_folds)
            if not keep and method in CUTTING:
                report["warnings"] += heavy_warnings(distinct, folds, num_folds)
            write_folds(distinct, folds, ~leaked_prompts(folds, pairs), report)
        return report


def describe_folds(distinct: DistinctPrompts, folds: np.ndarray, pairs: SimilarPairs, num_folds: int) -> dict:
    """The leakage between folds (int8 [distinct]), each fold's distance from all rows, and warnings, ready for JSON."""
    strata = dict(zip(STRATA, (distinct.sources, topics_of(distinct.embeddings)), strict=True))
    report = leakage_report(folds, distinct.num_rows, pairs, num_folds, strata)
    return report | {"warnings": report_warnings(report)}


def heavy_warnings(distinct: DistinctPrompts, folds: np.ndarray, num_folds: int) -> list[str]:
    """A warning for each prompt with more rows than a fold's even share, which therefore has a fold of its own."""
    share = distinct.num_rows / distinct.num_rows.sum()
    return [
        f"fold {folds[prompt]} holds one prompt alone, {quoted(distinct.prompts[prompt].as_py())}: it has "
        f"{share[prompt]:.1%} of the rows, more than an even share; take some of its rows out"
        for prompt in heavy_prompts(distinct.num_rows, num_folds)
    ]


def check_settings(tsv_paths: Sequence[Path], threshold: float, num_folds: int | None, method: str, keep: bool) -> None:
    """Raise ValueError for arguments of `assign_folds` that are out of range or exclude each other."""
    check_threshold(threshold)
    if num_folds is not None and not 2 <= num_folds <= MAX_FOLDS:
        raise ValueError(f"{num_folds} folds: give 2 to {MAX_FOLDS}")
    if method not in FOLD_METHODS:
        raise ValueError(f"method {method!r}: choose one of {', '.join(FOLD_METHODS)}")
    if keep and method not in CUTTING:
        raise ValueError(f"method {method} cannot keep folds; new prompts are added by {' or '.join(CUTTING)} alone")
    if len({path.stem for path in tsv_paths}) < len(tsv_paths):
        raise ValueError(f"two data sets have one name: {', '.join(map(str, tsv_paths))}")


def extend_once(
    path: Path, previous: np.ndarray, num_rows: np.ndarray, pairs: SimilarPairs, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Give folds to new prompts, and save the result before the first table is written.

    If a kill comes between two tables, some new prompts already have folds. The next call then reads here which prompts
    were new, and continues with the same result.

    Args:
        previous: int8 [prompts], folds in the tables, -1 for none.
        num_rows: as in `extend_folds`, like pairs and seed.
    Returns: the folds before the first call and after it, both int8 [prompts].
    """
    if path.is_file():
        try:
            saved = checksums.read_arrays(path, ("former", "folds"))
            first, folds = saved["former"], saved["folds"]
        except ValueError as error:  # folds in the tables are kept
            print(f"warning: {error}; prompts that have no fold yet are assigned anew", flush=True)
            first = folds = previous[:0]
        if (
            len(folds) == len(previous)
            and np.array_equal(np.where(previous < 0, previous, folds), previous)
            and (previous[first >= 0] >= 0).all()
        ):
            return first, folds
    folds = extend_folds(previous, num_rows, pairs, int(previous.max()) + 1, seed)
    with paths.atomic_path(path) as temporary:
        np.savez(temporary, former=previous, folds=folds)
    return previous, folds


def write_folds(distinct: DistinctPrompts, folds: np.ndarray, clean: np.ndarray, report: dict) -> None:
    """Write fold columns, marks of clean rows and, last, the reports.

    Args:
        folds: int8 [distinct].
        clean: bool [distinct].
        report: receives `datasets`, the rows and the folds hash of each file.
    """
    report["datasets"] = {}
    for path, table in distinct.tables.items():
        rows = {"rows": table.num_rows, "folds_hash": folds_hash(table["prompt"], folds[distinct.codes[path]])}
        report["datasets"][path.stem] = rows
        fold_report_path(path).unlink(missing_ok=True)
        clean_mark_path(path).unlink(missing_ok=True)
    for path, table in distinct.tables.items():
        codes = distinct.codes[path]
        if not np.array_equal(table["fold"].to_numpy(), folds[codes]):  # unchanged folds keep the older .bak
            with paths.atomic_path(path.with_name(path.name + ".bak")) as temporary:
                shutil.copy2(path, temporary)
            column = pa.array(folds[codes])
            write_table(path, {name: column if name == "fold" else table[name] for name in table.column_names})
        write_clean_mark(path, clean[codes], report["datasets"][path.stem]["folds_hash"])
    for path in distinct.tables:
        own = {"folds_hash": report["datasets"][path.stem]["folds_hash"], **report}
        paths.save_record(fold_report_path(path), own)


def fold_report_path(tsv_path: Path | str) -> Path:
    """The file for the report on a data set's folds."""
    return Path(tsv_path).with_suffix(".folds.json")


def read_fold_report(tsv_path: Path | str) -> dict:
    """The report that was written with a data set's folds.

    Raises: ValueError if there is none, or if the table has other folds now.
    """
    path = fold_report_path(tsv_path)
    again = f"assign folds again: kutils folds {tsv_path}"
    if not path.is_file():
        raise ValueError(f"{path} is not there (never made, or cut off while being made); {again}")
    try:
        report = paths.read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); {again}") from error
    table = read_table(tsv_path, ["prompt", "fold"])
    if report["folds_hash"] != folds_hash(table["prompt"], table["fold"].to_numpy()):
        raise ValueError(f"{path} describes other folds than those in {tsv_path}; {again}")
    return report


def kept_method(tsv_paths: Sequence[Path], otherwise: str) -> str:
    """The method of the existing folds according to their report, else `otherwise`."""
    for path in tsv_paths:
        try:
            return read_fold_report(path)["method"]
        except ValueError:
            continue
    return otherwise


def main(argv: Sequence[str] | None = None) -> int:
    """`kutils folds`."""
    parser = argparse.ArgumentParser(
        prog="kutils folds",
        description="Assign folds to the rows of data sets so that similar prompts share one, and report what leaks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="NAME.tsv", help="data sets, each with NAME.npy beside it"
    )
    parser.add_argument("--threshold", type=float, default=0.7, help="cosine from which prompts are similar")
    parser.add_argument(
        "--folds",
        type=int,
        default=argparse.SUPPRESS,
        help="number of folds, 2 to 10 (default: 10, or as many as there are with --keep)",
    )
    parser.add_argument(
        "--method",
        choices=FOLD_METHODS,
        default=FOLD_METHODS[0],
        help="stratified: every fold has its share of each source and topic; partition: least leakage; the others "
        "never cut a group of similar prompts",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of stratified, partition and kmeans")
    parser.add_argument("--keep", action="store_true", help="keep existing folds, and assign only prompts without one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    args = parser.parse_args(argv)
    ranks = join_workers(args.device)
    num_folds = getattr(args, "folds", None)
    report = assign_folds(args.files, args.threshold, num_folds, args.method, args.seed, keep=args.keep, ranks=ranks)
    if ranks.is_main:
        print(format_leakage(report))
    return 0
