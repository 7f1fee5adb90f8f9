"""Assigns folds to data sets on disk: reads their tables and embeddings, writes fold columns and reports."""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.prompts.clean_marks import clean_mark_path, write_clean_mark
from kutils.prompts.leakage import format_leakage, leakage_report, report_warnings
from kutils.prompts.partition import FOLD_METHODS, assign, extend_folds, leaked_prompts
from kutils.prompts.similarity import SimilarPairs, check_threshold, similar_pairs, strips_folder
from kutils.system import checksums, locks, paths
from kutils.system.devices import pick_device
from kutils.system.embedding_files import EMBEDDING_DIM, describe_mismatch, open_embeddings
from kutils.system.output import quoted
from kutils.system.ranks import Ranks, join_workers
from kutils.system.tables import MAX_FOLDS, check_rows, folds_hash, read_table, write_table


@dataclass(frozen=True)
class DistinctPrompts:
    """The distinct prompts of several files."""

    tables: dict[Path, pa.Table]
    codes: dict[Path, np.ndarray]  # int32 [rows of the file]: the number of each row's distinct prompt
    num_rows: np.ndarray  # int64 [distinct]: rows with the prompt, over all files
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
    return DistinctPrompts(tables, codes, np.bincount(all_codes), embeddings)


def check_agreement(tsv_path: Path, codes: np.ndarray, rows: np.ndarray, embeddings: np.ndarray) -> None:
    """Raise ValueError if a row's embedding is not that of its prompt, as in an .npy file of other rows."""
    for start in range(0, len(codes), 65536):
        cosine = np.einsum("nd,nd->n", rows[start : start + 65536], embeddings[codes[start : start + 65536]])
        if (cosine < 0.99).any():  # another device or precision stays far above
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


def assign_folds(
    tsv_paths: Sequence[Path | str],
    threshold: float = 0.7,
    num_folds: int | None = None,
    method: str = "partition",
    seed: int = 0,
    *,
    keep: bool = False,
    device: str = "auto",
    ranks: Ranks | None = None,
    progress: bool = True,
) -> dict | None:
    """Assign folds to the prompts of all files together, and write the fold columns in place.

    For each file, the previous table becomes `<name>.tsv.bak`, `<name>.clean.npz` marks the rows without a similar
    prompt in another fold, and `<name>.folds.json` holds the report. The reports are removed first and written last:
    after a kill there are none, `read_fold_report` says so, and the same call completes the work.

    Args:
        tsv_paths: data sets, or prompts files (which get a column `fold`), with their .npy beside them.
        threshold: cosine from which prompts are similar, in (0, 1].
        num_folds: 2 to 10; None: 10, or the existing number with `keep`.
        method: partition, components, leader or kmeans.
        seed: of partition and kmeans.
        keep: assign folds only to prompts without one (-1); the others stay where they are.
        device: auto, cpu or cuda; without effect if ranks are given.
        ranks: search for similar pairs together; the main one does all else.
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
                folds = assign(distinct.num_rows, pairs, num_folds, method, seed, distinct.embeddings)
            report = {"method": method, "threshold": threshold, "num_folds": num_folds, "seed": seed}
            report |= {"added_prompts": int((previous < 0).sum())} if keep else {}
            report |= leakage_report(folds, distinct.num_rows, pairs, num_folds)
            report["warnings"] = report_warnings(report)
            write_folds(distinct, folds, ~leaked_prompts(folds, pairs), report)
        return report


def check_settings(tsv_paths: Sequence[Path], threshold: float, num_folds: int | None, method: str, keep: bool) -> None:
    """Raise ValueError for arguments of `assign_folds` that are out of range or exclude each other."""
    check_threshold(threshold)
    if num_folds is not None and not 2 <= num_folds <= MAX_FOLDS:
        raise ValueError(f"{num_folds} folds: give 2 to {MAX_FOLDS}")
    if method not in FOLD_METHODS:
        raise ValueError(f"method {method!r}: choose one of {', '.join(FOLD_METHODS)}")
    if keep and method != "partition":
        raise ValueError(f"method {method} cannot keep folds; new prompts are added by partition alone")
    if len({path.stem for path in tsv_paths}) < len(tsv_paths):
        raise ValueError(f"two data sets have one name: {', '.join(map(str, tsv_paths))}")


def extend_once(
    path: Path, previous: np.ndarray, num_rows: np.ndarray, pairs: SimilarPairs, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Give folds to new prompts, and save the result before the first table is written.

    After a kill between two tables some new prompts already have folds. The next call then finds here which prompts
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
        except ValueError as error:  # the folds that were written already are kept
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
        if not np.array_equal(table["fold"].to_numpy(), folds[codes]):  # otherwise the older .bak stays
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
        "--method", choices=FOLD_METHODS, default="partition", help="how similar prompts are kept together"
    )
    parser.add_argument("--seed", type=int, default=0, help="of partition and kmeans")
    parser.add_argument("--keep", action="store_true", help="leave folds as they are, and add the prompts without one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    args = parser.parse_args(argv)
    ranks = join_workers(args.device)
    num_folds = getattr(args, "folds", None)
    report = assign_folds(args.files, args.threshold, num_folds, args.method, args.seed, keep=args.keep, ranks=ranks)
    if ranks.is_main:
        print(format_leakage(report))
    return 0
