"""Writes prompts with their embeddings as one file to search in: `kutils bank`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kutils.data.prompt_bank import PromptBank


def from_arguments(args: argparse.Namespace, datasets: Sequence[str] = ()) -> tuple[PromptBank, str]:
    """Open the bank that --bank, --prompts or --datasets names.

    Args:
        datasets: taken if none of the three is given.
    Returns: the bank, and a description of it.
    Raises: ValueError or OSError, if the bank cannot be opened or made.
    """
    if getattr(args, "bank", None):
        bank, source = PromptBank.load(args.bank), str(args.bank)
    elif args.prompts:
        bank, source = PromptBank.from_table(args.prompts), str(args.prompts)
    else:
        names = [name.strip() for name in args.datasets.split(",")] if args.datasets else list(datasets)
        bank, source = PromptBank.from_datasets(names), ", ".join(names)
    return bank, f"{len(bank):,} prompts of {source}"


def main(argv: Sequence[str] | None = None) -> int:
    """`kutils bank`."""
    parser = argparse.ArgumentParser(
        prog="kutils bank",
        description="Write the distinct prompts of data sets, or the rows of a prompts file, with their embeddings "
        "into one file for kutils ask to search.",
    )
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--datasets", metavar="A,B", help="data sets of input/")
    sources.add_argument("--prompts", type=Path, metavar="FILE.tsv", help="prompts file with its .npy beside it")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.arrow",
        help="file to write; an existing one is not overwritten",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16"),
        help="precision of the embeddings (default: float32)",
    )
    args = parser.parse_args(argv)
    if args.output.exists():
        raise ValueError(f"{args.output} exists; remove it or give another --output")
    bank, description = from_arguments(args)
    bank.save(args.output, np.dtype(args.dtype).type)
    print(f"{args.output}: {description}, {args.output.stat().st_size / 1e6:,.1f} MB")
    return 0
