"""Collects prompts from text, tables, Parquet, JSON and caption files into one clean prompts file."""

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa

from kutils.prompts.cleaning import Cleaner, CleaningSettings, format_cleaning, load_token_counter
from kutils.prompts.formats import READERS, describe_source, read_source
from kutils.prompts.table_forms import PROMPT_COLUMNS
from kutils.system import paths
from kutils.system.progress import progress_bar
from kutils.system.tables import holds, read_table, write_table

BATCH_ENTRIES = 10_000  # cleaned at a time


def default_name(path: Path) -> str:
    """The name of a file without its suffixes: `captions` for captions.txt.gz."""
    return path.with_suffix("").stem if path.suffix.lower() == ".gz" else path.stem


def gather(
    sources: Sequence[Path],
    cleaner: Cleaner,
    *,
    name: str | None = None,
    limit: int | None = None,
    progress: bool = True,
    **options,
) -> list[dict]:
    """Read sources one after the other into a cleaner.

    Args:
        name: for the column `source`; None: the name of each file.
        limit: stop once so many prompts are kept.
    Returns: for each source that was opened: `file`, `source`, and the numbers `read` and `kept`.
    """
    counts = []
    with progress_bar(0, "entry", "reading", disable=not progress) as bar:
        for path in sources:
            if limit is not None and len(cleaner.prompts) >= limit:
                break
            before = cleaner.num_read, len(cleaner.prompts)
            entries = read_source(path, **options)
            if progress and (form := describe_source(path, **options)):
                bar.write(f"{path.name}: read as {form}", sys.stdout)
            while batch := list(islice(entries, BATCH_ENTRIES)):
                cleaner.add(batch, path.name, name or default_name(path), limit)
                bar.update(len(batch))
                if limit is not None and len(cleaner.prompts) >= limit:
                    break
            read, kept = cleaner.num_read - before[0], len(cleaner.prompts) - before[1]
            counts.append({"file": str(path), "source": name or default_name(path), "read": read, "kept": kept})
    return counts


def write_prompts(output: Path, prompts: Sequence[str], sources: Sequence[str], *, overwrite: bool = False) -> None:
    """Write a prompts file; a file with the same prompts and sources stays as it is, folds included.

    Args:
        prompts: n texts.
    Raises: ValueError if the file has other content and `overwrite` is False.
    """
    table = {"prompt": pa.array(prompts, pa.string()), "source": pa.array(sources, pa.string())}
    if output.exists() and not overwrite:
        if not holds(output, pa.table(table)):
            raise ValueError(f"{output} is there already, with other content; choose another name, or give --overwrite")
        print(f"{output} is up to date ({len(prompts):,} prompts)")
        return
    write_table(output, table)
    print(f"{output}: {len(prompts):,} prompts")


def make_prompts_file(
    sources: Sequence[Path | str],
    output: Path | str,
    *,
    settings: CleaningSettings | None = None,
    tokenizer: Path | str | None = None,
    exclude: Sequence[Path | str] = (),
    overwrite: bool = False,
    **options,
) -> dict:
    """Collect prompts into `output` (header prompt source), and report in `<output>.report.json`.

    The same input gives the same bytes.

    Args:
        sources: files in order of preference: of equal prompts the first is kept.
        tokenizer: folder of CLIP's tokenizer, to leave out prompts that Stable Diffusion would truncate; None: no
            limit.
        exclude: prompts files whose prompts are left out.
    Returns: the report.
    Raises: ValueError, before anything is written.
    """
    sources, output = [Path(path) for path in sources], Path(output)
    if output.resolve() in {path.resolve() for path in [*sources, *map(Path, exclude)]}:
        raise ValueError(f"{output} is both read and written; choose another output")
    excluded = [prompt for path in exclude for prompt in read_table(path, ["prompt"])["prompt"].to_pylist()]
    cleaner = Cleaner(settings, load_token_counter(tokenizer) if tokenizer else None, excluded)
    counts = gather(sources, cleaner, **options)
    report = {"sources": counts, **cleaner.report()}
    if not cleaner.prompts:
        raise ValueError(f"no prompt is left for {output}:\n{format_cleaning(report)}")
    write_prompts(output, cleaner.prompts, cleaner.sources, overwrite=overwrite)
    paths.write_json(f"{output}.report.json", report)
    return report


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """`kutils sources`."""
    limits = CleaningSettings()
    parser = argparse.ArgumentParser(
        prog="kutils sources",
        description="Collect prompts from files into one clean prompts file, and report what was left out or changed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    unset = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help="files in order of preference: of equal prompts the first is kept",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="PROMPTS.tsv", **unset, help="to write")
    parser.add_argument("--name", **unset, help="for the column `source` (default: the name of each file)")
    parser.add_argument(
        "--column", **unset, help=f"column or key (default: the first in the file of {', '.join(PROMPT_COLUMNS)})"
    )
    parser.add_argument(
        "--format", default="auto", choices=("auto", *READERS), help="json: a list, or COCO's or VizWiz's captions"
    )
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave bad lines out and count them")
    parser.add_argument("--min-words", type=int, default=limits.min_words, help="shorter prompts are left out")
    parser.add_argument("--max-words", type=int, default=limits.max_words, help="longer prompts are left out")
    parser.add_argument("--min-latin", type=float, default=limits.min_latin, help="smallest share of Latin letters")
    parser.add_argument("--any-language", action="store_true", help="also keep prompts that seem not to be English")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        **unset,
        help="of CLIP's tokenizer: leave out prompts above 77 tokens",
    )
    parser.add_argument("--limit", type=positive, **unset, help="stop after so many prompts (default: no limit)")
    parser.add_argument(
        "--exclude",
        nargs="+",
        type=Path,
        default=[],
        metavar="OTHER.tsv",
        help="prompts files whose prompts are left out",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a PROMPTS.tsv with other content")
    args = parser.parse_args(argv)
    given = {key: value for key, value in vars(args).items() if key in ("name", "column", "limit", "tokenizer")}
    settings = CleaningSettings(args.min_words, args.max_words, args.min_latin, not args.any_language)
    report = make_prompts_file(
        args.sources,
        args.output,
        settings=settings,
        source_format=args.format,
        skip_bad_lines=args.skip_bad_lines,
        exclude=args.exclude,
        overwrite=args.overwrite,
        **given,
    )
    print(format_cleaning(report))
    return 0
