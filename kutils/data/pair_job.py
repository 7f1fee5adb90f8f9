"""Defines the options of `kutils import`, the settings of an import (`Job`) and the counts of its result."""

import argparse
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from kutils.data.pair_formats import FORMS
from kutils.data.pairs import Condition, Keys, parse_condition
from kutils.data.shards import IMAGE_FORMATS, QUALITY, Encoding
from kutils.prompts.cleaning import CleaningSettings, count_case

IMAGES_PER_FOLDER = 1000  # a folder with millions of files is slow to list
EMBEDDINGS = ("auto", "encode", "later")


@dataclass(frozen=True)
class Job:
    """How pairs become rows, the same for all parts of an import."""

    name: str  # of the data set
    keys: Keys
    where: tuple[Condition, ...]
    packed: bool  # into shards; else each image is a file
    encoding: Encoding | None  # None: images are kept as they are
    verify: bool  # decode images that are kept as they are
    settings: CleaningSettings | None  # None: prompts are taken as they are
    tokenizer: str  # folder of CLIP's; empty: no limit in tokens
    limit: int  # most pairs; 0: no limit
    with_embeddings: bool  # take those of the source
    generator: str  # of all pairs; empty: from each pair's fields
    source: str
    fold_key: str  # field with folds; empty: all folds are -1

    def image_name(self, number: int, row: int, suffix: str) -> str:
        """Path of an image below `input/`: row `row` of part `number`."""
        return f"{self.name}_images/{number:05d}/{self.file_name(row, suffix)}"

    def file_name(self, row: int, suffix: str) -> str:
        return f"{row // IMAGES_PER_FOLDER:03d}/{row % IMAGES_PER_FOLDER:03d}{suffix}"


@dataclass
class Counts:
    """Counts of imported and rejected pairs, of one part or of several."""

    read: int = 0
    unwanted: int = 0  # excluded by --where
    pairs: int = 0
    faults: dict[str, int] = field(default_factory=dict)  # kind -> number
    dropped: dict[str, dict] = field(default_factory=dict)  # as in the report of `cleaning`
    changed: dict[str, dict] = field(default_factory=dict)
    shard_rows: list[int] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        for name in ("read", "unwanted", "pairs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults = dict(Counter(self.faults) + Counter(other.faults))
        for cases, others in ((self.dropped, other.dropped), (self.changed, other.changed)):
            for reason, case in others.items():
                for example in case["examples"]:
                    count_case(cases, reason, example)
                cases[reason]["count"] += case["count"] - len(case["examples"])


# ---------------------------------------------------------------- options of the command


def parse_pack(text: str) -> int | str:
    if text != "keep" and not text.isdigit():
        raise ValueError
    return text if text == "keep" else int(text)


def make_parser() -> argparse.ArgumentParser:
    limits = CleaningSettings()
    forms = "\n".join(f"  {name:12}{text}" for name, text in FORMS.items())
    parser = argparse.ArgumentParser(
        prog="kutils import",
        description="Make a data set of downloaded pairs of image and prompt: NAME.tsv, images or shards, NAME.npy. "
        "Rejected pairs are listed in NAME.faults.tsv; NAME.pairs.parquet has the metadata of each pair. The same "
        "command continues after a kill. torchrun starts it on several nodes.",
        epilog=f"forms:\n{forms}\n\nFolds are assigned next: kutils folds input/NAME.tsv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="files, folders, or patterns as 'sd-4.4M/cc/*-{000..012}.tar'")
    add("--output", type=Path, required=True, metavar="input/NAME", help="the data set to make")
    add("--format", choices=tuple(FORMS), default="", help="form of the sources (default: recognised by the content)")
    group = parser.add_argument_group("what is read")
    add = group.add_argument
    known = "default: prompt, caption, text, ..., or the text file"
    add("--prompt-key", default="", metavar="KEY", help=f"field, column or ending of the prompt ({known})")
    add("--image-key", default="", metavar="KEY", help="field, column or ending of the image; of Parquet also 'A,B'")
    add("--embedding-key", default="", metavar="KEY", help="field or column of the prompt's embedding")
    add("--image-root", default="", metavar="FOLDER", help="base of relative image paths (default: the list's folder)")
    condition = "take only pairs that meet this: model=X, nsfw!=true, image_nsfw<0.3; several must all hold"
    add("--where", nargs="+", default=[], metavar="KEY=VALUE", help=condition)
    add("--limit", type=int, default=0, metavar="N", help="stop after so many pairs (default: 0, no limit)")
    add("--generator", default="", metavar="NAME", help="generator of all pairs (default: each pair's field `model`)")
    add("--source", default="", metavar="NAME", help="source of all pairs (default: each pair's field, or its file)")
    add("--fold-key", default="", metavar="KEY", help="field with folds 0 to 9, as of an export (default: -1)")
    group = parser.add_argument_group("how images are kept")
    add = group.add_argument
    pack = "pack into shards: SIZE px of the shorter side (448), or `keep` images as they are; default: a file each"
    add("--pack", type=parse_pack, metavar="SIZE|keep", help=pack)
    add("--image-format", choices=IMAGE_FORMATS, default="webp", help="format of packed images (default: webp)")
    add("--quality", type=int, default=None, help=f"of packed images, 1 to 100 (default: {QUALITY}; png has none)")
    add("--verify", action="store_true", help="also decode images that are kept unchanged")
    group = parser.add_argument_group("prompts")
    add = group.add_argument
    add("--raw-prompts", action="store_true", help="do not clean prompts; only line breaks and tabs become spaces")
    add("--min-words", type=int, default=limits.min_words, help=f"reject shorter prompts (default: {limits.min_words})")
    add("--max-words", type=int, default=limits.max_words, help=f"reject longer prompts (default: {limits.max_words})")
    add(
        "--min-latin",
        type=float,
        default=limits.min_latin,
        help=f"share of Latin letters (default: {limits.min_latin})",
    )
    add("--any-language", action="store_true", help="also keep prompts that seem not to be English")
    add("--tokenizer", default="", metavar="FOLDER", help="of CLIP's tokenizer: reject prompts above 77 tokens")
    dedup = "cosine such as 0.9: leave out near-duplicates of earlier prompts (default: 0.0, none)"
    add("--dedup", type=float, default=0.0, metavar="COSINE", help=dedup)
    auto = "auto: the source's if a sample agrees with the encoder, else encoded; default: auto"
    add("--embeddings", choices=EMBEDDINGS, default="auto", help=auto)
    group = parser.add_argument_group("work")
    add = group.add_argument
    add("--overwrite", action="store_true", help="replace another import of this name")
    add("--workers", type=int, default=None, help="processes (default: one per core)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where prompts are encoded (default: auto)")
    return parser


def make_job(args: argparse.Namespace) -> Job:
    """How pairs become rows, by the command's arguments.

    Raises: ValueError for arguments that are invalid or contradict each other.
    """
    size = args.pack if isinstance(args.pack, int) else None
    if size is None and (args.quality is not None or args.image_format != "webp"):
        raise ValueError("--quality and --image-format are of images that are encoded: give --pack SIZE")
    cleaning = CleaningSettings(args.min_words, args.max_words, args.min_latin, not args.any_language)
    if args.raw_prompts and (cleaning != CleaningSettings() or args.tokenizer):
        raise ValueError("--raw-prompts goes without limits to prompts")
    if args.limit < 0 or (args.workers is not None and args.workers < 1):
        raise ValueError("--limit is 0 or more, --workers 1 or more")
    name = args.output.name
    if not re.fullmatch(r"[^\s/\\.~][^\s/\\]*", name):
        raise ValueError(f"--output {args.output}: {name!r} cannot name a data set")
    quality = (None if args.image_format == "png" else QUALITY) if args.quality is None else args.quality
    encoding = None if size is None else Encoding(size, args.image_format, quality)
    return Job(
        name=name,
        keys=Keys(args.prompt_key, args.image_key, args.embedding_key, args.image_root),
        where=tuple(map(parse_condition, args.where)),
        packed=args.pack is not None,
        encoding=encoding,
        verify=args.verify or args.pack is None,
        settings=None if args.raw_prompts else cleaning,
        tokenizer=args.tokenizer,
        limit=args.limit,
        with_embeddings=False,
        generator=args.generator,
        source=args.source,
        fold_key=args.fold_key,
    )
