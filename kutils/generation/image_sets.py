"""Describes a data set of images to make: names, seeds, missing images, and its table."""

import hashlib
import os
import re
import shutil
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
RECORD = "generation.json"  # in the folder of images: settings and hash of the prompts


def image_seed(prompt: str, number: int, attempt: int = 0) -> int:
    """Seed of a prompt's image `number`, 0 to 2**63 - 1: the same on every machine and in any order of work.

    Args:
        attempt: gives another seed, if the image of the first one was bad.
    """
    text = f"{number}\t{prompt}" + (f"\t{attempt}" if attempt else "")  # no prompt holds a tab
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_prompts(path: Path) -> tuple[list[str], dict[str, pa.Array]]:
    """Read a prompts file: its distinct prompts in order, and the columns `source` and `fold` of these, if it has them.

    Raises: ValueError for a table that cannot be read or has no prompts, or naming the line of an empty prompt.
    """
    table = read_table(path, ["prompt"])
    prompts = table["prompt"].to_pylist()
    if not prompts:
        raise ValueError(f"{path} holds no prompts, only a header; give it some, or name another file")
    first_rows = {}
    for row, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"{path}, line {row + 2}: the prompt is empty; remove the row or give it a prompt")
        first_rows.setdefault(prompt, row)
    rows = pa.array(list(first_rows.values()), pa.int64())
    columns = [name for name in ("source", "fold") if name in table.column_names]
    return list(first_rows), {name: table[name].take(rows).combine_chunks() for name in columns}


def holds_nothing(path: Path) -> bool:
    """Whether this is a folder without files, except temporary ones: a killed call can leave it before the record."""
    return path.is_dir() and all(".partial" in entry.name for entry in path.iterdir())


@dataclass(frozen=True)
class ImageSet:
    """`<output>.tsv` and `<output>_images/`: image i is number i % images_per_prompt of prompt i // images_per_prompt.

    Args:
        output: the data set's name below `input/`, as in `input/shapes`.
        prompts: distinct texts.
        suffix: of the image files, with the dot.
        columns: further columns of the table, by prompt: `source`, and `fold` (int8) where there are folds already.
        prompts_path: the prompts file, whose embeddings become those of the data set; None if there is no such file.
    Raises: ValueError for no prompt, a repeated prompt, or no image of each.
    """

    output: Path
    prompts: Sequence[str] = field(repr=False)
    images_per_prompt: int
    suffix: str
    columns: Mapping[str, pa.Array] = field(default_factory=dict, repr=False)
    prompts_path: Path | None = None

    def __post_init__(self):
        if self.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt={self.images_per_prompt}: it must be at least 1")
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise ValueError("the prompts are none, or one is there twice; give each once")
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
        """Find the images whose files are missing: int64, ascending. Removes temporary files of killed runs."""
        present = np.zeros(len(self), bool)
        pattern = re.compile(rf"(\d+)_(\d+){re.escape(self.suffix)}")
        for folder in sorted(self.folder.glob("[0-9]*")):  # listed: to look for millions of files takes minutes
            with os.scandir(folder) as entries:
                for entry in entries:
                    if match := pattern.fullmatch(entry.name):
                        row, number = int(match[1]), int(match[2])
                        if row < len(self.prompts) and number < self.images_per_prompt:
                            present[row * self.images_per_prompt + number] = True
                    elif ".partial" in entry.name and paths.is_left_over(Path(entry.path)):
                        Path(entry.path).unlink(missing_ok=True)
        return np.flatnonzero(~present)

    # ---------------------------------------------------------------- how the images are made

    def record(self, **settings) -> dict:
        """Everything that determines the images, settings and prompts, as stored in `generation.json`."""
        counts = {"images_per_prompt": self.images_per_prompt, "num_prompts": len(self.prompts)}
        return settings | counts | {"prompts_sha256": hash_prompts(pa.array(self.prompts))}

    def previous_record(self) -> dict:
        """Read the record of the existing images; empty if there are none.

        Raises: ValueError for files of this name without a record, or with a damaged one.
        """
        path = self.folder / RECORD
        if path.is_file():
            try:
                return paths.read_json(path)
            except ValueError as error:
                raise ValueError(f"{error}; restore it, or choose another name") from error
        for other in (self.tsv_path, self.folder):
            if other.exists() and not holds_nothing(other):
                raise ValueError(f"{other} was not made by this command; choose another name")
        return {}

    def check_record(self, record: dict) -> None:
        """Raise ValueError if images of this name exist with another record."""
        previous = self.previous_record()
        differing = [key for key in record if previous and previous.get(key) != record[key]]
        if differing:
            values = ", ".join(f"{key} {previous.get(key)} (now {record[key]})" for key in differing)
            raise ValueError(
                f"{self.tsv_path} was made with {values}; choose another name, or delete it with {self.folder}"
            )

    # ---------------------------------------------------------------- the table

    def update_table(self, missing: np.ndarray, *, overwrite: bool = False) -> bool:
        """Write the table of the existing images, with the folds of their prompts or -1, and its embeddings.

        A previous table is replaced if everything in it can be made again, such as a table of half of the images, or
        one made before the prompts had folds. An edited table is kept if it lists the same images.

        Returns: whether the table was written.
        Raises: ValueError for an edited table of other images; nothing is changed then.
        """
        is_new = self.replace_table(missing, overwrite)
        self.copy_embeddings()
        return is_new

    def replace_table(self, missing: np.ndarray, overwrite: bool) -> bool:
        """Write the table as `update_table` says; returns whether it was written."""
        images = np.delete(np.arange(len(self)), missing)
        if not len(images):
            raise ValueError(f"{self.folder} holds no image of these prompts, so there is no table to write")
        table = self.make_table(images)
        if self.tsv_path.is_file():
            previous = read_table(self.tsv_path, ["image", "prompt", "fold"])
            if previous.equals(table):
                return False
            if self.is_edited(previous):
                if not overwrite and previous.select(["image", "prompt"]).equals(table.select(["image", "prompt"])):
                    return False
                self.back_up(previous.num_rows, len(images), overwrite)
        write_table(self.tsv_path, {name: table[name] for name in table.column_names})
        return True

    def make_table(self, images: np.ndarray) -> pa.Table:
        """The table of some images: `image`, `prompt`, `fold` (-1 without folds), and the further columns."""
        rows = pa.array(images // self.images_per_prompt)
        columns = {
            "image": pa.array([self.name(image) for image in images]),
            "prompt": pa.array(self.prompts).take(rows),
            "fold": pa.array(np.full(len(images), -1, np.int8)),
        }
        return pa.table(columns | {name: values.take(rows) for name, values in self.columns.items()})

    def is_edited(self, table: pa.Table) -> bool:
        """Whether a table has an image, prompt, column or value that this set does not have; folds of -1 are
        ignored."""
        names = pa.array([self.name(image) for image in range(len(self))])
        images = pc.index_in(table["image"], names)
        expected = self.make_table(np.arange(len(self)))
        if images.null_count or not set(table.column_names) <= set(expected.column_names):
            return True
        has_folds = not pc.all(pc.equal(table["fold"], -1)).as_py()
        columns = [name for name in table.column_names if name != "fold" or has_folds]
        return not table.select(columns).equals(expected.select(columns).take(images))

    def back_up(self, num_rows: int, num_images: int, overwrite: bool) -> None:
        """Keep an edited table as .bak; ValueError if `overwrite` was not given."""
        if not overwrite:
            raise ValueError(
                f"{self.tsv_path} has values or columns of its own and {num_rows:,} rows, and {num_images:,} images "
                "are there; it stays as it is. --overwrite writes it anew with the folds of the prompts file, or none, "
                "and keeps this one as .bak; embed and fold the new one then (checkpoints of the previous folds cannot "
                "be refined any more)"
            )
        with paths.atomic_path(self.tsv_path.with_name(f"{self.tsv_path.name}.bak")) as temporary:
            shutil.copy2(self.tsv_path, temporary)

    def copy_embeddings(self) -> None:
        """Copy the embeddings of the prompts file, if it has some in float32 and the table has none of its prompts.

        Embeddings in bfloat16 are exact enough to find near-duplicates, but not to train on.
        """
        if self.prompts_path is None or is_embedded(self.tsv_path):
            return
        source = self.prompts_path.with_suffix(".npy")
        record = paths.read_record(source.with_suffix(".npy.json")) or {}
        if "dtype" not in record and take_embeddings(self.prompts_path, self.tsv_path):
            print(f"{self.tsv_path.with_suffix('.npy')}: embeddings copied from {source}", flush=True)
