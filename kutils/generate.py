"""Images from prompts: a data set in the format of the recipes, resumable, each image decided by its prompt alone."""

import argparse
import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pyarrow as pa

from kutils import paths, shapes
from kutils.progress import progress_bar
from kutils.tables import hash_prompts, read_table, write_table

CHUNK_PROMPTS = 32  # rendered by a worker between two reports
PROMPTS_PER_FOLDER = 1000  # a folder with millions of files is slow to list
JPEG_QUALITY = 92
RECORD = "generation.json"  # in the folder of images: what they were made from


class GenerateError(ValueError):
    """A data set that cannot be made as asked; the message says what to do."""


def image_seed(prompt: str, number: int) -> int:
    """Seed of a prompt's image `number`, 0 to 2**63 - 1: the same on every machine and in any order of work."""
    return int.from_bytes(hashlib.sha256(f"{number}\t{prompt}".encode()).digest()[:8], "big") >> 1


def image_name(dataset: str, prompt_row: int, number: int) -> str:
    """Path below `input/` of image `number` of the prompt in row `prompt_row`."""
    return f"{dataset}_images/{prompt_row // PROMPTS_PER_FOLDER:05d}/{prompt_row:07d}_{number}.jpg"


def render_missing(jobs: list[tuple[str, int, Path]], size: int) -> int:
    """Render and save the images (prompt, number, path) that are not there yet; how many jobs there were."""
    for prompt, number, path in jobs:
        if not path.is_file():
            with paths.atomic_path(path) as temporary:
                shapes.render(prompt, image_seed(prompt, number), size).save(temporary, quality=JPEG_QUALITY)
    return len(jobs)


def generate_images(
    prompts: Sequence[str], output: Path | str, *, images_per_prompt: int = 3, size: int = 128, num_workers: int = 0
) -> Path:
    """Make `<output>_images/` and `<output>.tsv` (fold -1) from prompts by the built-in renderer.

    Run again after a kill, it makes what is missing; a data set that is complete stays as it is, folds included.

    Args:
        prompts: distinct texts, each with at least one object that `kutils.shapes` knows.
        output: the data set's name below `input/`, as in `input/shapes`.
        size: side of the images, px.
        num_workers: processes; 0: one per core.
    Returns: path of the table, its rows in the order of the prompts.
    Raises: GenerateError for repeated prompts or a data set that was made from something else; ShapesError naming the
        first prompt that cannot be drawn, before any image is made.
    """
    output = Path(output).absolute()
    tsv_path, folder = output.with_name(f"{output.name}.tsv"), output.with_name(f"{output.name}_images")
    if min(images_per_prompt, size) < 1:
        raise GenerateError(f"images_per_prompt={images_per_prompt}, size={size}: both must be at least 1")
    if not prompts or len(set(prompts)) < len(prompts):
        raise GenerateError("the prompts are none, or one is there twice; give each once")
    for prompt in prompts:
        shapes.parse(prompt)
    record = {"backend": "shapes", "images_per_prompt": images_per_prompt, "size": size, "num_prompts": len(prompts)}
    record["prompts_sha256"] = hash_prompts(pa.array(prompts))
    check_made_alike(tsv_path, folder, record)
    paths.write_json(folder / RECORD, record)
    jobs = [
        (prompt, number, output.parent / image_name(output.name, row, number))
        for row, prompt in enumerate(prompts)
        for number in range(images_per_prompt)
    ]
    missing = [job for job in jobs if not job[2].is_file()]
    if not missing and tsv_path.is_file():
        print(f"{tsv_path} is complete ({len(jobs):,} images)")
        return tsv_path
    step = CHUNK_PROMPTS * images_per_prompt
    chunks = [missing[start : start + step] for start in range(0, len(missing), step)]
    workers = min(num_workers or os.cpu_count() or 1, max(1, len(chunks)))
    # not fork: a notebook's process may hold threads of PyTorch
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        progress_bar(len(missing), "image", "rendering") as bar,
    ):
        for done in as_completed([pool.submit(render_missing, chunk, size) for chunk in chunks]):
            bar.update(done.result())
    if not tsv_path.is_file():
        images = [str(path.relative_to(output.parent)) for _, _, path in jobs]
        write_table(tsv_path, {"image": images, "prompt": [job[0] for job in jobs], "fold": [-1] * len(jobs)})
    print(f"{tsv_path}: {len(jobs):,} images of {len(prompts):,} prompts, {len(missing):,} of them new")
    return tsv_path


def check_made_alike(tsv_path: Path, folder: Path, record: dict) -> None:
    """Raise GenerateError where a data set of this name is there and was not made as `record` says."""
    record_path = folder / RECORD
    if record_path.is_file():
        former = json.loads(record_path.read_text())
        differing = [key for key in record if former.get(key) != record[key]]
        if differing:
            told = ", ".join(f"{key} {former.get(key)} (now {record[key]})" for key in differing)
            raise GenerateError(f"{tsv_path} was made with {told}; choose another name, or delete it with {folder}")
    elif tsv_path.exists() or folder.exists():
        found = tsv_path if tsv_path.exists() else folder
        raise GenerateError(f"{found} was not made by this command; choose another name")


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
    from kutils import grouping, preparation  # these load PyTorch; rendering alone does without

    if not paths.is_safe_relative(name) or "/" in name:
        raise GenerateError(f"{name!r} cannot name a data set below {paths.input_dir()}")
    prompts = shapes.generate_prompts(num_prompts, seed)
    output = paths.input_dir() / name
    tsv_path = generate_images(prompts, output, images_per_prompt=images_per_prompt, size=size)
    print(grouping.format_report(preparation.prepare([name])))
    return tsv_path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kutils.generate",
        description="Make a data set of images from prompts: OUTPUT.tsv and OUTPUT_images/. Embed and group it next.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "prompts", nargs="?", type=Path, metavar="PROMPTS.tsv", help="prompts file, header prompt source"
    )
    parser.add_argument("--backend", choices=("shapes",), default="shapes", help="what draws: the built-in renderer")
    parser.add_argument("--output", type=Path, metavar="input/NAME", help="the data set to make")
    parser.add_argument("--images-per-prompt", type=int, help="default: 3, or 2 for --shapes-dataset")
    parser.add_argument("--size", type=int, default=128, help="side of the images, px")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    shapes_group = parser.add_argument_group("the embedded data set, with embeddings and folds")
    shapes_group.add_argument(
        "--shapes-dataset", metavar="NAME", help="make input/NAME from the renderer's own prompts"
    )
    shapes_group.add_argument("--num-prompts", type=int, default=4000, help="prompts of --shapes-dataset")
    shapes_group.add_argument("--seed", type=int, default=0, help="of the prompts of --shapes-dataset")
    args = parser.parse_args(argv)
    if (args.prompts is None) == (args.shapes_dataset is None):
        parser.error("give either PROMPTS.tsv with --output, or --shapes-dataset NAME")
    if args.prompts is not None and args.output is None:
        parser.error("where to? give --output input/NAME")
    try:
        if args.shapes_dataset is not None:
            sizes = {"num_prompts": args.num_prompts, "images_per_prompt": args.images_per_prompt or 2}
            make_shapes_dataset(args.shapes_dataset, **sizes, size=args.size, seed=args.seed)
        else:
            prompts = list(dict.fromkeys(read_table(args.prompts, ["prompt"])["prompt"].to_pylist()))
            options = {"images_per_prompt": args.images_per_prompt or 3, "size": args.size, "num_workers": args.workers}
            generate_images(prompts, args.output, **options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error


if __name__ == "__main__":
    main()
