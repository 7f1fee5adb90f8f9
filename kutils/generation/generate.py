"""Makes a data set of images from prompts; continues when interrupted, and each image has its own seed.

By the built-in renderer, or by a diffusion model: alone, or as ranks of torchrun.
"""

import argparse
import dataclasses
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.generation import shapes
from kutils.generation.image_sets import RECORD, DiffusionSettings, GenerateError, ImageSet, image_seed, read_prompts
from kutils.system import children, paths
from kutils.system.progress import progress_bar

CHUNK_PROMPTS = 32  # rendered by a worker between two reports
JPEG_QUALITY = 92
SUFFIXES = {"shapes": ".jpg", "diffusers": ".webp"}  # of the images, by backend


def render_missing(jobs: list[tuple[str, int, Path]], size: int) -> int:
    """Render and save the images (prompt, number, path) that are not there yet; how many jobs there were."""
    for prompt, number, path in jobs:
        if not path.is_file():
            with paths.atomic_path(path) as temporary:
                shapes.render(prompt, image_seed(prompt, number), size).save(temporary, quality=JPEG_QUALITY)
    return len(jobs)


def generate_images(
    prompts: Sequence[str],
    output: Path | str,
    *,
    images_per_prompt: int = 3,
    size: int = 128,
    num_workers: int = 0,
    columns: Mapping[str, pa.Array] | None = None,
    prompts_path: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Make `<output>_images/` and `<output>.tsv` from prompts by the built-in renderer.

    Run again after a kill, it makes what is missing; a data set that is complete stays as it is, folds included.

    Args:
        prompts: distinct texts, each with at least one object that `kutils.generation.shapes` knows.
        output: the data set's name below `input/`, as in `input/shapes`.
        size: side of the images, px.
        num_workers: processes; 0: one per core.
        columns, prompts_path, overwrite: as in `ImageSet`.
    Returns: path of the table, its rows in the order of the prompts.
    Raises: GenerateError for repeated prompts or a data set that was made from something else; ShapesError naming the
        first prompt that cannot be drawn, before any image is made.
    """
    image_set = ImageSet(Path(output), prompts, images_per_prompt, SUFFIXES["shapes"], columns or {}, prompts_path)
    if size < 1:
        raise GenerateError(f"size={size}: it must be at least 1")
    for prompt in prompts:
        shapes.parse(prompt)
    record = image_set.record(backend="shapes", size=size)
    image_set.check_made_alike(record)
    paths.write_json(image_set.folder / RECORD, record)
    missing = image_set.missing()
    step = CHUNK_PROMPTS * images_per_prompt
    chunks = [
        [(*image_set.prompt(image), image_set.path(image)) for image in missing[start : start + step]]
        for start in range(0, len(missing), step)
    ]
    if chunks:
        # not fork: a notebook's process may hold threads of PyTorch
        with (
            ProcessPoolExecutor(
                min(num_workers or os.cpu_count() or 1, len(chunks)), multiprocessing.get_context("spawn")
            ) as pool,
            progress_bar(len(missing), "image", "rendering") as bar,
        ):
            for done in as_completed([pool.submit(render_missing, chunk, size) for chunk in chunks]):
                bar.update(done.result())
    if image_set.update_table(np.array([], np.int64), overwrite=overwrite) or len(missing):
        counts = f"{len(image_set):,} images of {len(prompts):,} prompts, {len(missing):,} of them new"
        print(f"{image_set.tsv_path}: {counts}")
    else:
        print(f"{image_set.tsv_path} is complete ({len(image_set):,} images)")
    return image_set.tsv_path


def make_shapes_dataset(
    name: str = "shapes", *, num_prompts: int = 4000, images_per_prompt: int = 2, size: int = 128, seed: int = 0
) -> Path:
    """The embedded data set, ready for training: prompts, images, embeddings and folds below `input/`.

    What is there already is kept, so that a call that was cut goes on.

    Args:
        seed: of the prompts.
    Returns: path of the table.
    Raises: GenerateError where a data set of this name was made otherwise.
    """
    from kutils.data import preparation
    from kutils.prompts import folds  # these load PyTorch; rendering alone does without

    if not paths.is_safe_relative(name) or "/" in name:
        raise GenerateError(f"{name!r} cannot name a data set below {paths.input_dir()}")
    prompts = shapes.generate_prompts(num_prompts, seed)
    output = paths.input_dir() / name
    tsv_path = generate_images(prompts, output, images_per_prompt=images_per_prompt, size=size)
    print(folds.format_leakage(preparation.prepare([name])))
    return tsv_path


def generate_by_diffusion(image_set: ImageSet, settings: DiffusionSettings, overwrite: bool) -> None:
    """Make a data set by `kutils.generation.sampling`, as one rank of torchrun or alone."""
    from kutils.generation import sampling
    from kutils.system.ranks import join_workers  # these load PyTorch; rendering does without

    children.interrupt_once()
    sampling.generate_images(image_set, settings, join_workers(settings.device), overwrite=overwrite)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kutils generate",
        description="Make a data set of images from prompts: OUTPUT.tsv and OUTPUT_images/, and OUTPUT.npy where "
        "the prompts are embedded in float32. Run again, it makes what is missing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "prompts", nargs="?", default=None, type=Path, metavar="PROMPTS.tsv", help="prompts file, header prompt source"
    )
    backend_help = "what draws: the built-in renderer, or a diffusion model (pip install -e '.[generate]')"
    parser.add_argument("--backend", choices=tuple(SUFFIXES), default="shapes", help=backend_help)
    parser.add_argument("--output", default=None, type=Path, metavar="input/NAME", help="the data set to make")
    parser.add_argument("--images-per-prompt", type=int, help="default: 3, or 2 for --shapes-dataset")
    parser.add_argument(
        "--size",
        type=int,
        help=f"side of the images, px; default: 128, or {DiffusionSettings.size} by diffusion",
    )
    parser.add_argument("--workers", type=int, help="processes of the built-in renderer; default: one per core")
    parser.add_argument(
        "--table-only", action="store_true", default=False, help="write the table of the images that are there so far"
    )
    parser.add_argument(
        "--overwrite", action="store_true", default=False, help="replace a table with folds too, and keep it as .bak"
    )
    diffusion_group = parser.add_argument_group(
        "a diffusion model, on one GPU, or as ranks: torchrun --nproc-per-node 8 -m kutils generate ..."
    )
    for item in dataclasses.fields(DiffusionSettings):
        flag, text = f"--{item.name.replace('_', '-')}", item.metadata["help"]
        if isinstance(item.default, bool):
            diffusion_group.add_argument(flag, action="store_true", help=text)
        elif item.name != "size":  # both backends have it
            text += f"; default: {item.default}" if item.default != "" else ""
            diffusion_group.add_argument(
                flag, type=type(item.default), choices=item.metadata["choices"] or None, help=text
            )
    shapes_group = parser.add_argument_group("the embedded data set, with embeddings and folds")
    shapes_group.add_argument(
        "--shapes-dataset", default=None, metavar="NAME", help="make input/NAME from the renderer's own prompts"
    )
    shapes_group.add_argument("--num-prompts", type=int, help="prompts of --shapes-dataset; default: 4000")
    shapes_group.add_argument("--seed", type=int, help="of the prompts of --shapes-dataset; default: 0")
    return parser


def run(args: argparse.Namespace, options: dict) -> None:
    """Do what the arguments say; `options` are those of one backend that were given."""
    counts = {"images_per_prompt": getattr(args, "images_per_prompt", 2 if args.shapes_dataset else 3)}
    if args.shapes_dataset is not None:
        make_shapes_dataset(args.shapes_dataset, **counts, **options)
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.table_only:
            raise GenerateError("--table-only goes without torchrun")
        if args.backend != "diffusers":
            raise GenerateError("only --backend diffusers makes images on several ranks; start this without torchrun")
    prompts, columns = read_prompts(args.prompts)
    suffix = SUFFIXES[args.backend]
    image_set = ImageSet(args.output, prompts, counts["images_per_prompt"], suffix, columns, args.prompts)
    settings = DiffusionSettings(**options) if args.backend == "diffusers" else None
    if settings and not args.table_only:
        generate_by_diffusion(image_set, settings, args.overwrite)
        return
    if args.table_only:
        image_set.check_made_alike(image_set.record(backend=args.backend))
        missing = image_set.missing()
        is_new = image_set.update_table(missing, overwrite=args.overwrite)
        told = "written" if is_new else "left as it is"
        print(f"{image_set.tsv_path} {told}: {len(image_set) - len(missing):,} of {len(image_set):,} images are there")
    else:
        options["num_workers"] = options.pop("workers", 0)
        options |= {"columns": columns, "prompts_path": args.prompts, "overwrite": args.overwrite}
        generate_images(prompts, args.output, **counts, **options)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.prompts is None) == (args.shapes_dataset is None):
        parser.error("give either PROMPTS.tsv with --output, or --shapes-dataset NAME")
    if args.prompts is not None and args.output is None:
        parser.error("where to? give --output input/NAME")
    if args.shapes_dataset is not None and (args.backend != "shapes" or args.table_only or args.overwrite):
        parser.error("--shapes-dataset goes without --backend diffusers, --table-only and --overwrite")
    of_diffusion = {item.name for item in dataclasses.fields(DiffusionSettings)}
    of_shapes = {"size", "workers"} if args.shapes_dataset is None else {"size", "num_prompts", "seed"}
    possible = of_diffusion | {"workers", "num_prompts", "seed"}
    options = {name: value for name, value in vars(args).items() if name in possible}
    for name in set(options) - (of_shapes if args.backend == "shapes" else of_diffusion):
        kind = "--shapes-dataset" if args.shapes_dataset is not None else f"--backend {args.backend} with PROMPTS.tsv"
        parser.error(f"--{name.replace('_', '-')} is not for {kind}; leave it out")
    if args.table_only and options:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        parser.error(f"--table-only makes no image; leave out what says how to make them: {told}")
    run(args, options)
    return 0
