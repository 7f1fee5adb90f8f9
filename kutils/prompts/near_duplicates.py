"""Leaves near-duplicates out of a list of prompts: prompts that are similar to an earlier one that is kept."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kutils.prompts.embedding import embed_table
from kutils.prompts.encoder import ENCODER_DTYPES
from kutils.prompts.similarity import SimilarPairs, check_threshold, similar_pairs, strips_folder
from kutils.system.devices import pick_device
from kutils.system.embedding_files import open_embeddings, take_embeddings
from kutils.system.output import quoted
from kutils.system.ranks import Ranks, join_workers
from kutils.system.tables import holds, read_table, write_table

MOST_EXAMPLES = 3  # near-duplicates shown in a report


def greedy_leaders(num_prompts: int, pairs: SimilarPairs) -> np.ndarray:
    """Make each prompt, in order, a leader, or a follower of the most similar earlier leader if there is one.

    Args:
        pairs: similar ones, in any order, with first < second.
    Returns: int64 [num_prompts], the row of each prompt's leader; a leader has its own row.
    """
    leaders = np.arange(num_prompts)
    order = np.lexsort((pairs.first, pairs.second))
    first, second, cosine = pairs.first[order], pairs.second[order], pairs.cosine[order]
    bounds = np.flatnonzero(np.diff(second, prepend=-1, append=-1))  # where pairs of the next `second` begin
    for begin, end in pairwise(bounds):
        earlier = first[begin:end]
        is_leader = leaders[earlier] == earlier
        if is_leader.any():
            leaders[second[begin]] = earlier[np.argmax(np.where(is_leader, cosine[begin:end], -1))]
    return leaders


def renumber(pairs: SimilarPairs, order: np.ndarray) -> SimilarPairs:
    """Renumber the rows of pairs by their place in `order` (int [n], a permutation), with first < second again."""
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    ends = place[pairs.first], place[pairs.second]
    return SimilarPairs(np.minimum(*ends), np.maximum(*ends), pairs.cosine)


def deduplicate(
    embeddings: np.ndarray,
    threshold: float = 0.9,
    *,
    kept: np.ndarray | None = None,
    priority: np.ndarray | None = None,
    device: str = "auto",
    ranks: Ranks | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Choose prompts such that no two of them have cosine >= threshold, and every other prompt has it with a chosen
    one.

    Adding prompts later gives the same result: choosing from A, and then from B with the choice of A as `kept`, chooses
    the same prompts as choosing from A and B together.

    Args:
        embeddings: float32 [n, D], unit rows.
        threshold: in (0, 1].
        kept: float32 [m, D], prompts chosen earlier, which stay; prompts close to one of them are left out.
        priority: int [n]: prompts are considered in ascending order of these numbers, then of rows. None: in row order.
        device, ranks, progress: as in `similar_pairs`.
    Returns: int64 [n], for each prompt the chosen prompt that it resembles: a row of `kept`, or m + a row of
        `embeddings`; for a chosen prompt m + its own row. Valid on the main rank; on the others all prompts count as
        chosen.
    Raises: ValueError for a threshold out of range, or a row that is not finite or not of unit length.
    """
    ranks = ranks or Ranks(0, 1, pick_device(device))
    num_kept = 0 if kept is None else len(kept)
    order = np.arange(len(embeddings)) if priority is None else np.argsort(priority, kind="stable")
    options = {"ranks": ranks, "progress": progress}
    with ExitStack() as stack:  # keeps the files of both searches until both are done
        folder = stack.enter_context(strips_folder(embeddings, threshold, ranks=ranks))
        within = renumber(similar_pairs(embeddings, threshold, folder=folder, **options), order)
        first, second, cosine = within.first + num_kept, within.second + num_kept, within.cosine
        if num_kept:
            folder = stack.enter_context(strips_folder(kept, threshold, "against", folder.name, ranks=ranks))
            place = np.argsort(order) + num_kept
            between = similar_pairs(kept, threshold, others=embeddings, folder=folder, **options)
            first = np.concatenate([between.first, first])
            second = np.concatenate([place[between.second], second])
            cosine = np.concatenate([between.cosine, cosine])
    leaders = greedy_leaders(num_kept + len(embeddings), SimilarPairs(first, second, cosine))
    row_of = np.concatenate([np.arange(num_kept), order + num_kept])
    result = np.empty(len(embeddings), np.int64)
    result[order] = row_of[leaders[num_kept:]]
    return result


def deduplicate_table(
    tsv_path: Path | str,
    kept_path: Path | str,
    rest_path: Path | str,
    threshold: float = 0.9,
    *,
    against: Sequence[Path | str] = (),
    priority: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "auto",
    ranks: Ranks | None = None,
    overwrite: bool = False,
) -> dict | None:
    """Split a prompts file into prompts without near-duplicates, and the rest (the recipes' part 2 sets).

    The prompts are embedded first if that has not been done, and both parts get their embeddings. Both parts have the
    columns and the order of the input. A part that exists with the same rows stays as it is, folds included.

    Args:
        tsv_path: the prompts file to split.
        kept_path: for the prompts without near-duplicates.
        rest_path: for all others.
        threshold: cosine from which prompts are near-duplicates, in (0, 1].
        against: prompts files of earlier calls. They are not changed, and prompts that resemble theirs are left out.
        priority: sources (values of the column `source`) whose prompts are considered first, in this order; the other
            sources follow. Empty: the order of the rows.
        dtype: of the embedding, as in `embed_table`.
        device: auto, cpu or cuda; without effect if ranks are given.
        ranks: share the search for similar pairs.
    Returns: numbers `kept` and `rest` of prompts; `examples`, pairs of a prompt that is left out and the one that it
        resembles; `sources`, name -> [kept, rest], if the table has this column. None on ranks other than the main one.
    Raises: ValueError, before anything but embeddings is written.
    """
    check_threshold(threshold)
    files = [Path(path).resolve() for path in (tsv_path, kept_path, rest_path, *against)]
    if len(set(files)) < len(files):
        raise ValueError("PROMPTS.tsv, --kept, --rest and those of --against have to be different files")
    ranks = ranks or Ranks(0, 1, pick_device(device))
    table = read_table(tsv_path, ["prompt", "source"] if priority else ["prompt"])
    order = rank_sources(table, priority, tsv_path) if priority else None
    earlier = [read_table(path, ["prompt"])["prompt"] for path in against]
    embeddings, *earlier_embeddings = [
        open_embeddings(embed_table(path, dtype=dtype, ranks=ranks), len(prompts))
        for path, prompts in zip((tsv_path, *against), (table["prompt"], *earlier), strict=True)
    ]
    leaders = deduplicate(
        embeddings,
        threshold,
        kept=np.concatenate(earlier_embeddings) if earlier else None,
        priority=order,
        ranks=ranks,
        progress=True,
    )
    if not ranks.is_main:
        return None
    keep = leaders == sum(map(len, earlier)) + np.arange(table.num_rows)
    write_parts(table, keep, kept_path, rest_path, overwrite)
    for path in (kept_path, rest_path):
        take_embeddings(tsv_path, path)
    return dedup_report(table, keep, leaders, earlier)


def write_parts(
    table: pa.Table, keep: np.ndarray, kept_path: Path | str, rest_path: Path | str, overwrite: bool
) -> None:
    """Write the rows of a table that are kept, and the others, each to its file.

    Args:
        keep: bool [rows].
    Raises: ValueError for a file with other rows, before either is written.
    """
    parts = {kept_path: table.filter(pa.array(keep)), rest_path: table.filter(pa.array(~keep))}
    finished = [path for path, part in parts.items() if Path(path).exists() and holds(path, part)]
    for path in parts:
        if Path(path).exists() and path not in finished and not overwrite:
            raise ValueError(f"{path} is there already, with other prompts; delete it, or give --overwrite")
    for path, part in parts.items():
        if path not in finished:  # a finished file may have got folds since
            write_table(path, part)


def dedup_report(table: pa.Table, keep: np.ndarray, leaders: np.ndarray, earlier: list[pa.ChunkedArray]) -> dict:
    """The report of `deduplicate_table`.

    Args:
        keep: bool [rows].
        leaders: int64 [rows], the result of `deduplicate`.
        earlier: prompts of the files of earlier calls.
    """
    prompts = pa.chunked_array([chunk for column in (*earlier, table["prompt"]) for chunk in column.chunks])
    left_out = np.flatnonzero(~keep)
    rows = left_out[:: max(1, len(left_out) // MOST_EXAMPLES)][:MOST_EXAMPLES]
    report = {"kept": int(keep.sum()), "rest": len(left_out)}
    report["examples"] = [(table["prompt"][int(row)].as_py(), prompts[int(leaders[row])].as_py()) for row in rows]
    if "source" in table.column_names:
        groups = pa.table({"source": table["source"], "keep": keep}).group_by("source", use_threads=False)
        counts = groups.aggregate([("keep", "sum"), ("keep", "count")]).to_pylist()  # in order of first appearance
        report["sources"] = {row["source"]: [row["keep_sum"], row["keep_count"] - row["keep_sum"]] for row in counts}
    return report


def rank_sources(table: pa.Table, priority: Sequence[str], tsv_path: Path | str) -> np.ndarray:
    """int32 [rows]: the position of each row's source in `priority`; len(priority) for other sources.

    Raises: ValueError for a source that no row has.
    """
    names = table["source"].unique().to_pylist()
    if missing := [name for name in priority if name not in names]:
        raise ValueError(f"{tsv_path} has no prompts of the source {missing[0]!r}; it has {', '.join(names)}")
    places = pc.index_in(table["source"], value_set=pa.array(priority))
    return pc.fill_null(places, len(priority)).to_numpy()


def format_dedup(report: dict, kept_path: Path, rest_path: Path) -> str:
    """The report of `deduplicate_table` as lines to print."""
    lines = [f"{report['kept']:,} prompts kept in {kept_path}, {report['rest']:,} near-duplicates in {rest_path}"]
    if len(report.get("sources", {})) > 1:
        lines += [f"  {name}: {kept:,} kept, {rest:,} not" for name, (kept, rest) in report["sources"].items()]
    lines += [f"  {quoted(left_out)} resembles {quoted(kept)}" for left_out, kept in report["examples"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """`kutils dedup`."""
    parser = argparse.ArgumentParser(
        prog="kutils dedup",
        description="Leave out prompts that resemble an earlier one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    unset = {"default": argparse.SUPPRESS}
    parser.add_argument("file", type=Path, metavar="PROMPTS.tsv", help="prompts file, in order of preference")
    parser.add_argument("--threshold", type=float, default=0.9, help="cosine from which prompts are near-duplicates")
    for name, text in (("--kept", "without near-duplicates"), ("--rest", "the near-duplicates")):
        parser.add_argument(name, type=Path, required=True, **unset, help=f"prompts file to write: {text}")
    against = "prompts files of earlier calls: leave out prompts that resemble one of theirs"
    parser.add_argument("--against", nargs="+", type=Path, default=[], metavar="KEPT.tsv", help=against)
    priority = "sources whose prompts are considered first"
    parser.add_argument("--priority", nargs="+", default=[], metavar="SOURCE", help=priority)
    dtype = "precision of the encoder, if the prompts are not embedded yet"
    parser.add_argument("--dtype", default="float32", choices=ENCODER_DTYPES, help=dtype)
    parser.add_argument("--overwrite", action="store_true", help="replace --kept and --rest files with other prompts")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    args = parser.parse_args(argv)
    ranks = join_workers(args.device)
    report = deduplicate_table(
        args.file,
        args.kept,
        args.rest,
        args.threshold,
        against=args.against,
        priority=args.priority,
        dtype=args.dtype,
        ranks=ranks,
        overwrite=args.overwrite,
    )
    if ranks.is_main:
        print(format_dedup(report, args.kept, args.rest))
    return 0
