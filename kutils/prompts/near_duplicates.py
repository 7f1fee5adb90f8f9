"""Leaves near-duplicates out of a list of prompts: those close to a prompt that was kept before."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.prompts.embedding import embed_table
from kutils.prompts.encoder import ENCODER_DTYPES
from kutils.prompts.similarity import SimilarPairs, check_threshold, similar_pairs, strips_folder
from kutils.system.devices import pick_device
from kutils.system.embedding_files import open_embeddings, take_embeddings
from kutils.system.ranks import Ranks, join_workers
from kutils.system.tables import holds, read_table, write_table

MOST_EXAMPLES = 3  # of near-duplicates that are shown


def greedy_leaders(num_prompts: int, pairs: SimilarPairs) -> np.ndarray:
    """In order, make each prompt a leader unless an earlier leader is similar; else it follows the most similar one.

    Args:
        pairs: in any order, with first < second.
    Returns: int64 [num_prompts], the leader's row; its own for a leader.
    """
    leaders = np.arange(num_prompts)
    order = np.lexsort((pairs.first, pairs.second))
    first, second, cosine = pairs.first[order], pairs.second[order], pairs.cosine[order]
    bounds = np.flatnonzero(np.diff(second, prepend=-1, append=-1))  # where the pairs of another second one begin
    for begin, end in pairwise(bounds):
        earlier = first[begin:end]
        is_leader = leaders[earlier] == earlier
        if is_leader.any():
            leaders[second[begin]] = earlier[np.argmax(np.where(is_leader, cosine[begin:end], -1))]
    return leaders


def renumber(pairs: SimilarPairs, order: np.ndarray) -> SimilarPairs:
    """Pairs of rows renumbered by their place in `order` (int [n], a permutation), with first < second again."""
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
    """Choose prompts so that no two have cosine >= threshold, and each left out is that close to a chosen one.

    Adding prompts later changes nothing: the prompts chosen of A, and those of B with A's as `kept`, are the ones that
    would be chosen of A and B together.

    Args:
        embeddings: float32 [n, D], unit rows.
        threshold: in (0, 1].
        kept: float32 [m, D], prompts chosen before, which stay; those close to one of them are left out.
        priority: int [n]: prompts of smaller numbers are considered first; those of one number, and all where there is
            none, in row order.
        device, ranks, progress: as in `similar_pairs`.
    Returns: int64 [n], m + its own row for a prompt that is chosen; for one left out, whom it resembles: a row of
        `kept`, or m + a row of these. With several ranks on the main one; on the others all are chosen.
    Raises: ValueError for another threshold, or a row that is not finite or not of unit length.
    """
    ranks = ranks or Ranks(0, 1, pick_device(device))
    num_kept = 0 if kept is None else len(kept)
    order = np.arange(len(embeddings)) if priority is None else np.argsort(priority, kind="stable")
    options = {"ranks": ranks, "progress": progress}
    with ExitStack() as stack:  # strips of both searches are there until both are done
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
    """Split a prompts file in two: those that no earlier kept one resembles, and the rest (the recipe's part 2 sets).

    Embeds the prompts first where that has not been done; the embeddings come along. Both files have the columns of the
    input and its order; one that is there with the same rows stays as it is, folds included.

    Args:
        against: prompts files that were kept before, which stay as they are; what resembles one of theirs is left out.
        priority: sources (of the column `source`) in the order in which their prompts are considered; those of other
            sources follow. Without, the order of the rows.
        dtype: of the embedding, as in `embed_table`.
        device, ranks: as in `assign_folds`.
        overwrite: write over other content of the two files; without, a second call has to lead to the same.
    Returns: kept and rest (numbers of prompts), sources (name -> [kept, rest]; where there is such a column), examples
        (a prompt left out, the one that it resembles); None on ranks that are not the main one.
    Raises: ValueError, before anything but the embeddings is written.
    """
    check_threshold(threshold)
    files = [Path(path).resolve() for path in (tsv_path, kept_path, rest_path, *against)]
    if len(set(files)) < len(files):
        raise ValueError("PROMPTS.tsv, --kept, --rest and those of --against have to be different files")
    ranks = ranks or Ranks(0, 1, pick_device(device))
    table = read_table(tsv_path, ["prompt", "source"] if priority else ["prompt"])
    place = rank_sources(table, priority, tsv_path) if priority else None
    known = [read_table(path, ["prompt"])["prompt"] for path in against]
    own, *former = [
        open_embeddings(embed_table(path, dtype=dtype, ranks=ranks), count)
        for path, count in zip((tsv_path, *against), (table.num_rows, *map(len, known)), strict=True)
    ]
    leaders = deduplicate(
        own,
        threshold,
        kept=np.concatenate(former) if former else None,
        priority=place,
        ranks=ranks,
        progress=True,
    )
    if not ranks.is_main:
        return None
    num_known = sum(map(len, known))
    keep = leaders == num_known + np.arange(table.num_rows)
    parts = {kept_path: table.filter(pa.array(keep)), rest_path: table.filter(pa.array(~keep))}
    there = [path for path, part in parts.items() if Path(path).exists() and holds(path, part)]
    for path in parts:
        if Path(path).exists() and path not in there and not overwrite:
            raise ValueError(f"{path} is there already, with other prompts; delete it, or give --overwrite")
    for path, part in parts.items():
        if path not in there:  # else it may have folds by now
            write_table(path, part)
    for path in parts:
        take_embeddings(tsv_path, path)
    every = pa.chunked_array([chunk for prompts in (*known, table["prompt"]) for chunk in prompts.chunks])
    rows = np.flatnonzero(~keep)[:: max(1, int((~keep).sum()) // MOST_EXAMPLES)][:MOST_EXAMPLES]
    report = {"kept": int(keep.sum()), "rest": int((~keep).sum())}
    report["examples"] = [(table["prompt"][int(row)].as_py(), every[int(leaders[row])].as_py()) for row in rows]
    if "source" in table.column_names:
        sources = table["source"].combine_chunks().dictionary_encode()
        codes, names = sources.indices.to_numpy(), sources.dictionary.to_pylist()
        counts = (np.bincount(codes[chosen], minlength=len(names)).tolist() for chosen in (keep, ~keep))
        report["sources"] = {name: list(both) for name, *both in zip(names, *counts, strict=True)}
    return report


def rank_sources(table: pa.Table, priority: Sequence[str], tsv_path: Path | str) -> np.ndarray:
    """int [rows]: the place of each row's source in `priority`; ValueError for one that no row has."""
    sources = table["source"].combine_chunks().dictionary_encode()
    names = sources.dictionary.to_pylist()
    if missing := [name for name in priority if name not in names]:
        raise ValueError(f"{tsv_path} has no prompts of the source {missing[0]!r}; it has {', '.join(names)}")
    place = {name: number for number, name in enumerate(priority)}
    return np.array([place.get(name, len(priority)) for name in names])[sources.indices.to_numpy()]


def format_dedup(report: dict, kept_path: Path, rest_path: Path) -> str:
    """The result of `deduplicate_table` as lines for people."""
    lines = [f"{report['kept']:,} prompts kept in {kept_path}, {report['rest']:,} near-duplicates in {rest_path}"]
    if len(report.get("sources", {})) > 1:
        lines += [f"  {name}: {kept:,} kept, {rest:,} not" for name, (kept, rest) in report["sources"].items()]
    lines += [f"  {left_out!r} resembles {kept!r}" for left_out, kept in report["examples"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kutils dedup",
        description="Leave out prompts that resemble an earlier one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    unset = {"default": argparse.SUPPRESS}
    parser.add_argument("file", type=Path, metavar="PROMPTS.tsv", help="prompts file, the most wanted first")
    parser.add_argument("--threshold", type=float, default=0.9, help="cosine from which prompts are near-duplicates")
    for name, text in (("--kept", "one of each neighbourhood"), ("--rest", "all others")):
        parser.add_argument(name, type=Path, required=True, **unset, help=f"prompts file to write: {text}")
    against = "prompts files kept earlier: leave out what resembles one of theirs"
    parser.add_argument("--against", nargs="+", type=Path, default=[], metavar="KEPT.tsv", help=against)
    priority = "sources whose prompts come before those of others"
    parser.add_argument("--priority", nargs="+", default=[], metavar="SOURCE", help=priority)
    dtype = "of the embedding, where it is still to be made"
    parser.add_argument("--dtype", default="float32", choices=ENCODER_DTYPES, help=dtype)
    parser.add_argument("--overwrite", action="store_true", help="write over other prompts in these two")
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
