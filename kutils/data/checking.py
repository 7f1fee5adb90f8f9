"""Checks whether data sets are fit for training: images, duplicates, embeddings, prompts and folds.

`kutils check input/<name>.tsv ...` decodes every image. Training checks only the validation images before its first
step, since every validation row must be scored.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kutils.data import image_files
from kutils.data.bad_rows import PooledRows, by_dataset, find_bad_rows, in_two_folds, set_apart
from kutils.data.validation_check import MOST_LISTED
from kutils.prompts import embedding
from kutils.system import embedding_files, locks, paths
from kutils.system.embedding_files import make_again, open_embeddings
from kutils.system.output import quoted

SAME_COSINE = 0.999  # smallest cosine of a prompt embedded again; other devices and precisions stay above it
ODD_IMAGES = {"blank": "blank", "animated": "animated", "sixteen_bit": "with 16 bits", "alpha": "with transparency"}


@dataclass(frozen=True)
class CheckedDataset:
    """The result of checking one data set."""

    path: Path  # of the TSV
    table: pa.Table
    bad: np.ndarray  # int32 [rows], number of the reason; 0: the row is good
    reasons: list[str]
    report: dict  # the content of `<name>.check.json`

    @property
    def is_in_order(self) -> bool:
        """No bad row, and no problem of the whole set."""
        return not self.bad.any() and not self.report["problems"]


def check_datasets(
    tsv_paths: Sequence[Path | str],
    *,
    images: int = 0,
    input_size: int = 384,
    verify_embeddings: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> list[CheckedDataset]:
    """Check data sets together; nothing is written.

    A row is bad if its image cannot be read, its prompt is empty, its image path leaves the folder, or its image (the
    same path or the same content) also belongs to a row with another prompt. A problem concerns a whole set:
    embeddings that do not fit the table, prompts in two folds.

    Args:
        tsv_paths: the data sets that are to be trained on together.
        images: number of images to decode, drawn at random from all sets; 0: all.
        input_size: px, of the network; images with a shorter side are counted.
        verify_embeddings: number of prompts of each set to embed again and compare; 0: none.
        num_workers: processes that decode; None: one per core.
    Raises: ValueError for a table that cannot be read, or that changes meanwhile.
    """
    tsv_paths = [Path(path) for path in tsv_paths]
    status = [path.stat() for path in tsv_paths if path.is_file()]  # PooledRows raises the error for a missing one
    rows = PooledRows(tsv_paths)
    findings = find_bad_rows(rows, images, num_workers or os.cpu_count() or 1, progress)
    torn, checked = in_two_folds(rows), []
    for path, table, before, part in zip(tsv_paths, rows.tables, status, by_dataset(rows, findings), strict=True):
        own, examined, facts = part
        report = {"rows": table.num_rows, "bad_rows": int((rows.bad[own] > 0).sum()), "problems": [], "warnings": []}
        report["images"] = {"looked_at": examined, "input_size": input_size, "decoded": len(facts)}
        report["images"] |= image_files.summarize_facts(facts, input_size)
        report["same_image_path"] = int(findings.same_path[own].sum())
        report["same_image_content"] = int(findings.same_content[own].sum())
        report |= summarize_prompts(table)
        report["problems"] += fold_problems(table, torn[own], tsv_paths)
        check_embeddings(path, table, np.flatnonzero(rows.bad[own] == 0), verify_embeddings, report)
        report["warnings"] += find_warnings(report)
        if (path.stat().st_mtime_ns, path.stat().st_size) != (before.st_mtime_ns, before.st_size):
            raise ValueError(f"{path} has changed while it was checked; check it again")
        checked.append(CheckedDataset(path, table, rows.bad[own], list(rows.reasons), report))
    return checked


def summarize_prompts(table: pa.Table) -> dict:
    """Count a table's prompts, images per prompt, and rows per fold.

    Returns: `prompts`, distinct ones; `images_per_prompt`, number of images -> prompts that have so many; `folds`,
        fold -> rows; `control_characters`, rows with some in their prompt.
    """
    images = table["prompt"].value_counts().field("counts").to_numpy()
    numbers, prompts_of = np.unique(images, return_counts=True)
    folds, rows_of = np.unique(table["fold"].to_numpy(), return_counts=True)
    odd = pc.sum(pc.match_substring_regex(table["prompt"], r"\p{Cc}")).as_py()
    return {
        "prompts": len(images),
        "images_per_prompt": dict(zip(map(str, numbers.tolist()), prompts_of.tolist(), strict=True)),
        "folds": dict(zip(map(str, folds.tolist()), rows_of.tolist(), strict=True)),
        "control_characters": odd,
    }


def fold_problems(table: pa.Table, torn: np.ndarray, tsv_paths: Sequence[Path]) -> list[str]:
    """The message about prompts in two folds; an empty list if there are none.

    Args:
        torn: bool [rows]: the row's prompt is in two folds.
        tsv_paths: all data sets that were checked together.
    """
    if not torn.any():
        return []
    first, count = int(np.argmax(torn)), pc.count_distinct(table["prompt"].filter(pa.array(torn))).as_py()
    return [
        f"{count:,} prompts are in two folds, here or in another of the data sets; the first is "
        f"{quoted(table['prompt'][first].as_py())} (line {first + 2}). Assign folds to all data sets in one call: "
        f"kutils folds {' '.join(map(str, tsv_paths))}"
    ]


def check_embeddings(path: Path, table: pa.Table, good: np.ndarray, num_verified: int, report: dict) -> None:
    """Check the .npy file beside a table: its shape, lengths, the record of its prompts, and a sample of its rows.

    Args:
        good: int64, rows whose prompts may be embedded again.
        report: receives `embeddings` (fit, missing or wrong), and a problem or a warning.
    """
    npy_path, record = path.with_suffix(".npy"), paths.read_record(path.with_suffix(".npy.json"))
    if not npy_path.is_file():
        report["embeddings"] = "missing"
        report["warnings"].append(f"{npy_path} is not there yet: python input/gen_prompt_embedding.py {path}")
        return
    try:
        embeddings = open_embeddings(npy_path, table.num_rows)
    except ValueError as error:
        problem = str(error)
    else:
        problem = embedding_files.describe_mismatch(path, table["prompt"])
        if not problem and num_verified and len(good):
            rows = np.sort(np.random.default_rng(0).permutation(good)[:num_verified])
            problem = embed_again(npy_path, table["prompt"].take(pa.array(rows)), embeddings[rows], rows, record)
        elif record is None:
            unknown = "has no record of its prompts; --verify-embeddings 256 compares a sample"
            report["warnings"].append(f"{npy_path} {unknown}")
    report["embeddings"] = "wrong" if problem else "fit"
    report["problems"] += [problem] if problem else []


def embed_again(
    npy_path: Path, texts: pa.ChunkedArray, expected: np.ndarray, rows: np.ndarray, record: dict | None
) -> str:
    """Compare prompts, embedded again, with the embeddings on disk.

    Args:
        texts: [n] prompts.
        expected: float32 [n, 384], their rows of the file.
        rows: int64 [n], the numbers of these rows.
        record: names the encoder; None: all-MiniLM-L6-v2.
    Returns: the message about prompts that differ; empty if all agree.
    """
    name = (record or {}).get("encoder", embedding.encoder_name(None))
    encoder = embedding.load_encoder(None if name == embedding.encoder_name(None) else name)
    cosines = np.einsum("nd,nd->n", embedding.encode_prompts(texts, encoder, progress=False), expected)
    differing, worst = int((cosines < SAME_COSINE).sum()), int(np.argmin(cosines))
    if not differing:
        return ""
    return (
        f"{npy_path}: of {len(rows):,} prompts embedded again {differing:,} differ, most in row {rows[worst]} (line "
        f"{rows[worst] + 2} of the TSV), cosine {cosines[worst]:.3f}; {make_again(npy_path)}"
    )


def find_warnings(report: dict) -> list[str]:
    """Messages about properties that do not prevent training but may be unwanted."""
    images = report["images"]
    counts = {
        "blank images": images["blank"],
        f"images have a side below {images['input_size']} px and would be enlarged": images["too_small"],
        "rows have the image path of another row, and its prompt": report["same_image_path"],
        "rows have an image of the same content as another row, and its prompt": report["same_image_content"],
        "rows have control characters in their prompt": report["control_characters"],
        "rows have no fold yet (-1): kutils folds assigns them": report["folds"].get("-1", 0),
    }
    return [f"{count:,} {what}" for what, count in counts.items() if count]


def format_checks(checked: Sequence[CheckedDataset]) -> str:
    """The results as lines to print: counts, problems, warnings, and the first bad rows."""
    lines = []
    for item in checked:
        report, images = item.report, item.report["images"]
        size = images["bytes"]
        lines += [
            f"{item.path}: {report['rows']:,} rows, {report['prompts']:,} prompts",
            f"  images: {images['looked_at']:,} looked at, {images['decoded']:,} decode, {size['total'] / 1e6:,.1f} MB"
            + (f", {size['smallest']:,} to {size['largest']:,} bytes" if images["decoded"] else ""),
            *(f"  {key}: {format_counts(images[key])}" for key in ("sizes", "formats", "modes")),
            f"  of them: {', '.join(f'{images[key]:,} {name}' for key, name in ODD_IMAGES.items())}",
            f"  prompts with 1, 2, ... images: {format_counts(report['images_per_prompt'])}",
            f"  rows per fold: {format_counts(report['folds'])}",
        ]
        lines += [f"  problem: {text}" for text in report["problems"]]
        lines += [f"  warning: {text}" for text in report["warnings"]]
        bad = np.flatnonzero(item.bad)
        for row in bad[:MOST_LISTED].tolist():
            lines.append(f"  bad: line {row + 2}, {item.table['image'][row]}: {item.reasons[item.bad[row]]}")
        if len(bad) > MOST_LISTED:
            lines.append(f"  bad: {len(bad) - MOST_LISTED:,} more rows")
        lines.append(f"  {len(bad):,} bad rows, {len(report['problems'])} problems")
    return "\n".join(lines)


def format_counts(counts: dict[str, int]) -> str:
    """Names with their counts in one line."""
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"


def main(argv: Sequence[str] | None = None) -> int:
    """`kutils check`; returns 0 if all data sets are in order, else 1."""
    parser = argparse.ArgumentParser(
        prog="kutils check",
        description="Check data sets that will be trained on together: does every image decode, does an image have two "
        "prompts, do embeddings and folds fit?",
        epilog="Writes NAME.check.json beside each NAME.tsv. Bad rows go to NAME.quarantine.tsv with their line and a "
        "reason, all others to the data set NAME.checked (datasets=NAME.checked trains on it); NAME itself is never "
        "changed. A run that was stopped has written nothing, and starts anew. Exit status: 0 if no set has bad "
        "rows or a problem, 1 if one has, or cannot be read.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="NAME.tsv", help="data sets")
    parser.add_argument("--images", type=int, default=0, help="number of images to decode, drawn at random; 0: all")
    parser.add_argument("--input-size", type=int, default=384, help="px; smaller images are counted")
    verify = "number of prompts of each set to embed again and compare; 0: none"
    parser.add_argument("--verify-embeddings", type=int, default=0, metavar="N", help=verify)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes")
    args = parser.parse_args(argv)
    if min(args.images, args.verify_embeddings) < 0 or min(args.input_size, args.workers) < 1:
        parser.error("--images and --verify-embeddings are 0 or more, --input-size and --workers 1 or more")
    with locks.held(args.files):
        checked = check_datasets(
            args.files,
            images=args.images,
            input_size=args.input_size,
            verify_embeddings=args.verify_embeddings,
            num_workers=args.workers,
        )
        outcomes = [format_checks(checked)]
        for item in checked:
            paths.write_json(item.path.with_suffix(".check.json"), item.report)
            fits = item.report["embeddings"] == "fit"
            outcomes.append(set_apart(item.path, item.table, item.bad, item.reasons, fits))
    print(*outcomes, sep="\n")
    return int(not all(item.is_in_order for item in checked))
