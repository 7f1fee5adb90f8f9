"""Imports pairs of image and prompt from downloads: `kutils import SOURCE ... --output input/NAME`."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2.functional import to_pil_image

from kutils.data import pair_embeddings, pair_parts, pair_results
from kutils.data.pair_formats import find_parts
from kutils.data.pair_job import Counts, Job, make_job, make_parser
from kutils.data.pair_outcome import Outcome
from kutils.data.pair_parts import import_part, leading_parts
from kutils.data.pair_plan import make_plan
from kutils.data.pair_results import Result
from kutils.data.pairs import Fault
from kutils.data.transforms import decode_bytes
from kutils.prompts.cleaning import format_cleaning
from kutils.prompts.similarity import check_threshold
from kutils.system import devices, locks, paths, processes
from kutils.system.progress import progress_bar
from kutils.system.ranks import Ranks, join_workers


def preview(sources: Sequence[str], options: Sequence[str] = (), count: int = 8) -> tuple[list, list[str]]:
    """The first pairs of sources as an import with these options would take them; nothing is written.

    Args:
        options: command-line options of `kutils import`.
        count: number of pairs.
    Returns: Pillow images as they will be kept, and cleaned prompts.
    Raises: ValueError if there is no such pair.
    """
    args = make_parser().parse_args([*sources, "--output", "input/preview", *options])
    job, images, prompts = make_job(args), [], []
    for part in find_parts(sources, args.format, job.keys):
        for item in Outcome(part, job).examine_all(Counts()):
            if not isinstance(item, Fault):
                row, content, _ = item
                images.append(to_pil_image(decode_bytes(content, row["key"])))
                prompts.append(row["prompt"])
            if len(images) == count:
                return images, prompts
    if not images:
        raise ValueError(f"{', '.join(sources)}: no pair could be used; `kutils import` says why")
    return images, prompts


def import_pairs(
    sources: Sequence[str],
    output: Path | str,
    job: Job,
    *,
    form: str = "",
    embeddings: str = "auto",
    dedup: float = 0.0,
    overwrite: bool = False,
    num_workers: int | None = None,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> dict | None:
    """Make a data set of the pairs in sources: table, images or shards, embeddings, and metadata of each pair.

    The next call with the same sources and settings continues an interrupted one, and gives the same bytes; finished
    parts are kept in a hidden folder beside the table. The folds are -1: `kutils folds` assigns them.

    Args:
        sources: as `find_parts` takes them.
        output: path without a suffix, as in `input/sd44m`.
        job: how pairs become rows.
        form: a key of FORMS; empty: recognised.
        embeddings: auto: those of the source, if a sample has cosines of 0.999 with the encoder's; encode: encode all
            prompts; later: write none.
        dedup: leave out prompts with at least this cosine to an earlier one; 0: none.
        overwrite: replace another import of this name.
        num_workers: processes; None: one per core.
        ranks: share the parts, and all call this; None: this process alone.
    Returns: the record; None on ranks that are not the main one.
    Raises: ValueError, DataError, EncoderError; OSError on a full disk, mostly before the work.
    """
    ranks = ranks or Ranks(0, 1, devices.pick_device("auto"))
    output, plan = Path(output).absolute(), None
    if dedup:
        check_threshold(dedup)
    if dedup and embeddings == "later":
        raise ValueError("--dedup compares embeddings: leave --embeddings later out")
    if ranks.is_main:
        output.parent.mkdir(parents=True, exist_ok=True)
    with locks.held([output.with_name(f"{output.name}.tsv")], ranks):
        if ranks.is_main:
            plan = make_plan(sources, output, job, form, embeddings, dedup, overwrite)
        result, stage = ranks.gather_objects(plan)[0]
        if stage == "work":
            work_parts(result, num_workers, ranks, progress)
            finish(result, embeddings, dedup, ranks)
        if not ranks.is_main:
            return None
        if stage == "done":
            print(f"{result.path('.tsv')} is up to date")
            result.chunks.remove()
        else:
            pair_results.publish(result)
        return paths.read_record(result.path(".import.json"))


def work_parts(result: Result, num_workers: int | None, ranks: Ranks, progress: bool) -> None:
    """Import the missing parts, shared among ranks and processes; returns on every rank once all parts exist."""
    chunks, job = result.chunks, result.job
    # rank 0's list on all ranks, since parts are being saved meanwhile
    missing = ranks.gather_objects(chunks.missing() if ranks.is_main else None)[0]
    jobs = [(number, result.parts[number], job, chunks) for number in missing[ranks.rank :: ranks.world_size]]
    cores = max(1, devices.usable_cores() // ranks.world_size) if num_workers is None else num_workers
    workers = min(cores, len(jobs))
    total = sum(result.parts[number].pairs for number, *_ in jobs)
    total = min(total, job.limit or total)
    one_thread = functools.partial(torch.set_num_threads, 1)
    with progress_bar(total, "pair", "importing", disable=not (progress and ranks.is_main)) as bar:
        for _ in processes.run_jobs(
            import_part, jobs, workers if workers > 1 else 0, advance=bar.update, prepare=one_thread
        ):
            pass
    while leading_parts(chunks, job.limit) is None:  # not a barrier, which would time out
        time.sleep(0.2)
        if not chunks.folder.is_dir():
            raise FileNotFoundError(f"{chunks.folder} was removed, maybe by another run; start again")
    ranks.barrier()


def finish(result: Result, embeddings: str, dedup: float, ranks: Ranks) -> None:
    """Embed the finished parts' prompts, choose the rows, and build the data set's files."""
    chunks, numbers = result.chunks, leading_parts(result.chunks, result.job.limit)
    counts = pair_results.sum_counts(chunks, numbers)
    if not counts.pairs:
        message = no_pairs(result, counts)
        ranks.barrier()
        if ranks.is_main:
            chunks.remove()
        raise ValueError(message)
    facts = {"sources": [part.name for part in result.parts], "settings": result.work["settings"]}
    if embeddings != "later":
        facts["embeddings"] = pair_embeddings.write_embeddings(chunks, numbers, result.job.with_embeddings, ranks)
    keep = pair_embeddings.keep_leaders(chunks, numbers, dedup, ranks) if dedup else np.ones(counts.pairs, bool)
    if ranks.is_main:
        keep[result.job.limit or len(keep) :] = False
        chosen = dataclasses.replace(result, numbers=numbers, keep=None if keep.all() else keep)
        pair_results.build(chosen, embeddings != "later", facts)
    ranks.barrier()


def no_pairs(result: Result, counts: Counts) -> str:
    """Why nothing was imported."""
    lines = [f"none of {counts.read:,} pairs could be imported, {counts.unwanted:,} of them by --where"]
    lines += [f"  {count:,} times: {kind}" for kind, count in counts.faults.items()]
    for number in range(result.chunks.count):
        with pair_parts.faults_path(result.chunks, number).open(encoding="utf-8") as faults:
            lines += ["  " + ", ".join(line.rstrip("\n").split("\t")) for line in islice(faults, 3)]
        if len(lines) > 8:
            break
    return "\n".join(lines)


def format_record(record: dict, output: Path) -> str:
    """The report of an import as lines to print."""
    faults = sum(record["faults"].values())
    lines = [f"{output}.tsv: {record['pairs']:,} pairs of {record['read']:,} read"]
    lines += [f"  {record['unwanted']:,} not wanted by --where"] if record["unwanted"] else []
    lines += [f"  {record['left_out']:,} near-duplicates, or beyond --limit"] if record["left_out"] else []
    if faults:
        lines.append(f"  {faults:,} set apart in {output}.faults.tsv:")
        lines += [f"  {count:>9,}  {kind}" for kind, count in sorted(record["faults"].items(), key=lambda kv: -kv[1])]
    if embedded := record.get("embeddings"):
        line = f"embeddings: {embedded['encoded']:,} prompts were encoded"
        if embedded["compared"]:
            line += f", {embedded['compared']:,} compared (smallest cosine {embedded['smallest_cosine']:.4f})"
        lines.append(line + (f": {embedded['why']}" if embedded["why"] else ""))
    read = record["read"] - record["unwanted"]
    kept = read - sum(case["count"] for case in record["dropped"].values())
    if record["dropped"] or record["changed"]:
        lines += ["prompts: " + format_cleaning(record | {"read": read, "kept": kept})]
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    job = make_job(args)
    record = import_pairs(
        args.sources,
        args.output,
        job,
        form=args.format,
        embeddings=args.embeddings,
        dedup=args.dedup,
        overwrite=args.overwrite,
        num_workers=args.workers,
        ranks=join_workers(args.device),
    )
    if record is not None:
        print(format_record(record, args.output))
    return 0
