"""Folds and de-duplication of data sets on disk: reads tables and embeddings, writes fold columns and reports."""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils import paths
from kutils.config import EMBEDDING_DIM
from kutils.dataset_index import check_rows, open_embeddings
from kutils.folding import METHODS, assign, format_report, leakage_report, leaked_prompts, report_warnings
from kutils.prompts import embed_table
from kutils.similarity import GroupingError, check_threshold, deduplicate, similar_pairs
from kutils.tables import folds_hash, read_table, write_table

MAX_FOLDS = 10  # a fold is one digit everywhere: in the table, in the recipes, in the names of checkpoints


@dataclass(frozen=True)
class DistinctPrompts:
    """The prompts of several data sets, each once."""

    tables: dict[Path, pa.Table]
    codes: dict[Path, np.ndarray]  # int32 [rows of the set]: which distinct prompt a row has
    num_rows: np.ndarray  # int64 [distinct], over all sets
    embeddings: np.ndarray  # float32 [distinct, 384]


def read_distinct(tsv_paths: Sequence[Path]) -> DistinctPrompts:
    """Read data sets with the embeddings beside them.

    Raises: TableError, DataError (naming file and row), GroupingError if rows of one prompt differ in their embeddings.
    """
    tables, maps = {}, {}
    for path in tsv_paths:
        tables[path] = read_table(path, ["image", "prompt", "fold"])
        check_rows(path, tables[path])
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
    """Raise GroupingError where a row's embedding is not its prompt's: the sign of an .npy file of other rows."""
    for start in range(0, len(codes), 65536):
        cosine = np.einsum("nd,nd->n", rows[start : start + 65536], embeddings[codes[start : start + 65536]])
        if (cosine < 0.99).any():  # another device or precision stays far above
            row = start + int(np.argmax(cosine < 0.99))
            raise GroupingError(
                f"{tsv_path.with_suffix('.npy')}, row {row} (line {row + 2} of the TSV): the same prompt has another "
                f"embedding elsewhere (cosine {cosine[row - start]:.3f}), so that one of the files is not of its "
                f"prompts; make them again: python input/gen_prompt_embedding.py {tsv_path} --overwrite"
            )


def assign_folds(
    tsv_paths: Sequence[Path | str],
    threshold: float = 0.7,
    num_folds: int = 10,
    method: str = "partition",
    seed: int = 0,
    *,
    device: str = "auto",
    progress: bool = True,
) -> dict:
    """Give the prompts of all data sets folds together, and rewrite the fold columns in place.

    Per data set, the former table is kept as `<name>.tsv.bak`, `<name>.clean.npz` marks the rows without a similar
    prompt in another fold, and `<name>.folds.json` holds the report. The reports go first and come last: after a kill
    in between there are none, `read_report` says so, and the same call again completes the work.

    Args:
        tsv_paths: data sets with their .npy beside them.
        threshold: cosine from which prompts are similar, in (0, 1].
        num_folds: 2 to 10.
        method: partition, components or leader.
        seed: of the partition.
    Returns: the report, with the folds hash of every data set.
    Raises: TableError, DataError or GroupingError, before anything is written.
    """
    tsv_paths = [Path(path) for path in tsv_paths]
    check_threshold(threshold)
    if not 2 <= num_folds <= MAX_FOLDS:
        raise GroupingError(f"{num_folds} folds: give 2 to {MAX_FOLDS}")
    if method not in METHODS:
        raise GroupingError(f"method {method!r}: choose one of {', '.join(METHODS)}")
    if len({path.stem for path in tsv_paths}) < len(tsv_paths):
        raise GroupingError(f"two data sets have one name: {', '.join(map(str, tsv_paths))}")
    distinct = read_distinct(tsv_paths)
    num_prompts = len(distinct.num_rows)
    if num_prompts < num_folds:
        raise GroupingError(f"{num_prompts} distinct prompts cannot fill {num_folds} folds; ask for fewer folds")
    pairs = similar_pairs(distinct.embeddings, threshold, device=device, progress=progress)
    folds = assign(distinct.num_rows, pairs, num_folds, method, seed)
    report = {"method": method, "threshold": threshold, "num_folds": num_folds, "seed": seed}
    report |= leakage_report(folds, distinct.num_rows, pairs, num_folds)
    report["warnings"] = report_warnings(report)
    write_folds(distinct, folds, ~leaked_prompts(folds, pairs), report)
    return report


def write_folds(distinct: DistinctPrompts, folds: np.ndarray, clean: np.ndarray, report: dict) -> None:
    """Write fold columns, clean marks and, last, the reports; adds `datasets` to the report."""
    report["datasets"] = {}
    for path, table in distinct.tables.items():
        rows = {"rows": table.num_rows, "folds_hash": folds_hash(table["prompt"], folds[distinct.codes[path]])}
        report["datasets"][path.stem] = rows
        report_path(path).unlink(missing_ok=True)
        path.with_suffix(".clean.npz").unlink(missing_ok=True)
    for path, table in distinct.tables.items():
        codes = distinct.codes[path]
        if not np.array_equal(table["fold"].to_numpy(), folds[codes]):  # else the same work again: keep the older .bak
            with paths.atomic_path(path.with_name(path.name + ".bak")) as temporary:
                shutil.copy2(path, temporary)
            column = pa.array(folds[codes])
            write_table(path, {name: column if name == "fold" else table[name] for name in table.column_names})
        with paths.atomic_path(path.with_suffix(".clean.npz")) as temporary:
            np.savez(temporary, clean=clean[codes], folds_hash=np.array(report["datasets"][path.stem]["folds_hash"]))
    for path in distinct.tables:
        own = {"folds_hash": report["datasets"][path.stem]["folds_hash"], **report}
        paths.write_json(report_path(path), own)


def report_path(tsv_path: Path | str) -> Path:
    return Path(tsv_path).with_suffix(".folds.json")


def read_report(tsv_path: Path | str) -> dict:
    """The report written with a data set's folds.

    Raises: GroupingError if there is none or the table has other folds by now.
    """
    path = report_path(tsv_path)
    again = f"assign folds again: python -m kutils.grouping folds {tsv_path}"
    if not path.is_file():
        raise GroupingError(f"{path} is not there (never made, or cut off while being made); {again}")
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise GroupingError(f"{path} cannot be read ({error}); {again}") from error
    table = read_table(tsv_path, ["prompt", "fold"])
    if report["folds_hash"] != folds_hash(table["prompt"], table["fold"].to_numpy()):
        raise GroupingError(f"{path} describes other folds than those in {tsv_path}; {again}")
    return report


def deduplicate_table(
    tsv_path: Path | str,
    kept_path: Path | str,
    rest_path: Path | str,
    threshold: float = 0.9,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> tuple[int, int]:
    """Split a prompts file in two: those that no earlier kept one resembles, and the rest (the recipe's part 2 sets).

    Embeds the prompts first where that has not been done. Both files have the columns of the input.

    Args:
        overwrite: write over other content of the two files; without, a second call has to lead to the same.
    Returns: number of rows kept, number of the rest.
    Raises: TableError, PromptError, EncoderError or GroupingError, before anything but the embeddings is written.
    """
    check_threshold(threshold)
    if len({Path(path).resolve() for path in (tsv_path, kept_path, rest_path)}) < 3:
        raise GroupingError("PROMPTS.tsv, --kept and --rest have to be three different files")
    table = read_table(tsv_path, ["prompt"])
    embeddings = open_embeddings(embed_table(tsv_path, device=device), table.num_rows)
    keep = deduplicate(embeddings, threshold, device=device, progress=True)
    parts = {kept_path: table.filter(pa.array(keep)), rest_path: table.filter(pa.array(~keep))}
    for path, part in parts.items():
        if Path(path).exists() and not overwrite and not read_table(path, []).equals(part.combine_chunks()):
            raise GroupingError(f"{path} is there already, with other prompts; delete it, or give --overwrite")
    for path, part in parts.items():
        write_table(path, dict(zip(part.column_names, part.columns, strict=True)))
    return int(keep.sum()), int((~keep).sum())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kutils.grouping", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    folds = commands.add_parser("folds", help="assign folds to the rows of data sets", **defaults)
    folds.add_argument(
        "files", nargs="+", type=Path, metavar="NAME.tsv", help="data sets, each with NAME.npy beside it"
    )
    folds.add_argument("--threshold", type=float, default=0.7, help="cosine from which prompts are similar")
    folds.add_argument("--folds", type=int, default=10, help="number of folds, 2 to 10")
    folds.add_argument("--method", choices=METHODS, default="partition", help="how similar prompts are kept together")
    folds.add_argument("--seed", type=int, default=0, help="of the partition")
    dedup = commands.add_parser("dedup", help="leave out prompts that resemble an earlier one", **defaults)
    dedup.add_argument("file", type=Path, metavar="PROMPTS.tsv", help="prompts file, the most wanted first")
    dedup.add_argument("--threshold", type=float, default=0.9, help="cosine from which prompts are near-duplicates")
    for name, text in (("--kept", "one of each neighbourhood"), ("--rest", "all others")):
        dedup.add_argument(
            name, type=Path, required=True, default=argparse.SUPPRESS, help=f"prompts file to write: {text}"
        )
    dedup.add_argument("--overwrite", action="store_true", help="write over other prompts in these two")
    for command in (folds, dedup):
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    args = parser.parse_args(argv)
    try:
        if args.command == "folds":
            report = assign_folds(args.files, args.threshold, args.folds, args.method, args.seed, device=args.device)
            print(format_report(report))
        else:
            options = {"device": args.device, "overwrite": args.overwrite}
            kept, rest = deduplicate_table(args.file, args.kept, args.rest, args.threshold, **options)
            print(f"{kept:,} prompts kept in {args.kept}, {rest:,} near-duplicates in {args.rest}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error


if __name__ == "__main__":
    main()
