"""Makes a data set of images from prompts by the built-in renderer or a diffusion model: `kutils generate`."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from kutils.generation import rendering
from kutils.generation.image_sets import ImageSet, read_prompts
from kutils.generation.settings import DiffusionSettings

SUFFIXES = {"shapes": rendering.SUFFIX, "diffusers": ".webp"}  # of the images, by backend


def generate_by_diffusion(image_set: ImageSet, settings: DiffusionSettings, overwrite: bool) -> None:
    """Make a data set by `kutils.generation.sampling`, as one rank of torchrun or alone."""
    from kutils.generation import sampling
    from kutils.system.ranks import join_workers  # these load PyTorch; rendering does without

    sampling.sample_dataset(image_set, settings, join_workers(settings.device), overwrite=overwrite)


def write_table_only(image_set: ImageSet, backend: str, overwrite: bool) -> None:
    """Write the table of the images made so far."""
    image_set.check_record(image_set.record(backend=backend))
    missing = image_set.missing()
    is_new = image_set.update_table(missing, overwrite=overwrite)
    counts = f"{len(image_set) - len(missing):,} of {len(image_set):,} images are there"
    print(f"{image_set.tsv_path} {'written' if is_new else 'left as it is'}: {counts}")


def generate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kutils generate",
        description="Make a data set of images from prompts: OUTPUT.tsv and OUTPUT_images/, and OUTPUT.npy where "
        "the prompts are embedded in float32. The same command again makes missing images.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "prompts", nargs="?", default=None, type=Path, metavar="PROMPTS.tsv", help="prompts file, header prompt source"
    )
    backend_help = "the built-in renderer, or a diffusion model (pip install -e '.[generate]'); default: shapes"
    parser.add_argument("--backend", choices=tuple(SUFFIXES), default="shapes", help=backend_help)
    parser.add_argument("--output", default=None, type=Path, metavar="input/NAME", help="the data set to make")
    parser.add_argument("--images-per-prompt", type=int, help="default: 3, or 2 for --shapes-dataset")
    size_help = f"side of the images, px; default: 128, or {DiffusionSettings.size} by diffusion"
    parser.add_argument("--size", type=int, help=size_help)
    parser.add_argument("--workers", type=int, help="processes of the built-in renderer; default: one per core")
    table_help = "only write the table of the images made so far"
    parser.add_argument("--table-only", action="store_true", default=False, help=table_help)
    overwrite_help = "also replace a table with folds; it is kept as .bak"
    parser.add_argument("--overwrite", action="store_true", default=False, help=overwrite_help)
    group = parser.add_argument_group(
        "a diffusion model, on one GPU, or as ranks: torchrun --nproc-per-node 8 -m kutils generate ..."
    )
    for item in dataclasses.fields(DiffusionSettings):
        flag, text = f"--{item.name.replace('_', '-')}", item.metadata["help"]
        if isinstance(item.default, bool):
            group.add_argument(flag, action="store_true", help=text)
        elif item.name != "size":  # both backends have it
            text += f"; default: {item.default}" if item.default != "" else ""
            group.add_argument(flag, type=type(item.default), choices=item.metadata["choices"] or None, help=text)
    group = parser.add_argument_group("the built-in data set, with embeddings and folds")
    group.add_argument(
        "--shapes-dataset", default=None, metavar="NAME", help="make input/NAME from the renderer's own prompts"
    )
    group.add_argument("--num-prompts", type=int, help="prompts of --shapes-dataset; default: 4000")
    group.add_argument("--seed", type=int, help="random seed of the prompts of --shapes-dataset; default: 0")
    return parser


def chosen_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """The given options for making images; a parser error for one that would have no effect."""
    of_diffusion = {item.name for item in dataclasses.fields(DiffusionSettings)}
    of_dataset = {"size", "num_prompts", "seed"}
    options = {name: value for name, value in vars(args).items() if name in of_diffusion | of_dataset | {"workers"}}
    if args.shapes_dataset is not None:
        kind, used = "--shapes-dataset", of_dataset
    else:
        kind = f"--backend {args.backend} with PROMPTS.tsv"
        used = of_diffusion if args.backend == "diffusers" else {"size", "workers"}
    for name in options.keys() - used:
        parser.error(f"--{name.replace('_', '-')} is not for {kind}; leave it out")
    if args.table_only and options:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        parser.error(f"--table-only makes no image; leave out what says how to make them: {names}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    parser = generate_parser()
    args = parser.parse_args(argv)
    if (args.prompts is None) == (args.shapes_dataset is None):
        parser.error("give either PROMPTS.tsv with --output, or --shapes-dataset NAME")
    if args.prompts is not None and args.output is None:
        parser.error("where to? give --output input/NAME")
    if args.shapes_dataset is not None and (args.backend != "shapes" or args.table_only or args.overwrite):
        parser.error("--shapes-dataset goes without --backend diffusers, --table-only and --overwrite")
    options = chosen_options(parser, args)
    if args.shapes_dataset is not None:
        count = getattr(args, "images_per_prompt", 2)
        rendering.make_shapes_dataset(args.shapes_dataset, images_per_prompt=count, **options)
        return 0
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.table_only:
            raise ValueError("--table-only goes without torchrun")
        if args.backend != "diffusers":
            raise ValueError("only --backend diffusers makes images on several ranks; start this without torchrun")
    prompts, columns = read_prompts(args.prompts)
    count = getattr(args, "images_per_prompt", 3)
    image_set = ImageSet(args.output, prompts, count, SUFFIXES[args.backend], columns, args.prompts)
    if args.table_only:
        write_table_only(image_set, args.backend, args.overwrite)
    elif args.backend == "diffusers":
        generate_by_diffusion(image_set, DiffusionSettings(**options), args.overwrite)
    else:
        options["num_workers"] = options.pop("workers", 0)
        rendering.render_dataset(image_set, **options, overwrite=args.overwrite)
    return 0
