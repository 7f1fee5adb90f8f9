"""Defines a pair of image and prompt from a source, the names of its fields, and conditions to select pairs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kutils.prompts.table_forms import PROMPT_COLUMNS

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"))
MOST_BYTES = 1 << 28  # of an image file, and of any file that is read at once: 256 MB
# names of fields, searched for in this order, ignoring case
PROMPT_KEYS = (*PROMPT_COLUMNS, "txt", "p")
IMAGE_KEYS = ("image", "image_path", "file_name", "filename", "image_file", "img", "img_path", "path", "file")
EMBEDDING_KEYS = ("embs", "embedding", "embeddings", "emb", "prompt_embedding", "text_embedding")
GENERATOR_KEYS = ("generator", "model", "model_name")
SEED_KEYS = ("seed", "se")
SOURCE_KEYS = ("source",)
OPERATORS = {
    "=": lambda order: order == 0,
    "!=": lambda order: order != 0,
    "<": lambda order: order < 0,
    "<=": lambda order: order <= 0,
    ">": lambda order: order > 0,
    ">=": lambda order: order >= 0,
}


class Pair(NamedTuple):
    """What a source holds under one key."""

    key: str
    image: bytes | Path  # content of an image file, or its path
    prompt: object  # a text; None where there is none
    fields: Mapping[str, object]  # other fields of the source: model, seed, nsfw, ...
    embedding: np.ndarray | None  # of the prompt, from the source
    prompt_key: str  # the field or file of the prompt


class Fault(NamedTuple):
    """Why something in a source is no pair; an empty key stands for the whole file."""

    key: str
    reason: str


@dataclass(frozen=True)
class Keys:
    """Which fields of a source to read; empty: the first known name that exists."""

    prompt: str = ""
    image: str = ""
    embedding: str = ""
    image_root: str = ""  # base folder of relative image paths; empty: the folder of the file that names them


def find_key(names: Iterable[str], known: Sequence[str], asked: str = "") -> str | None:
    """The name that was asked for, or the first known one that exists, ignoring case; None if there is none."""
    if asked:
        return asked if asked in names else None
    lower = {name.lower(): name for name in names}
    return next((lower[name] for name in known if name in lower), None)


def text_of(fields: Mapping[str, object], known: Sequence[str]) -> str:
    """The value under the first known name, as a text; empty if there is none."""
    value = fields.get(find_key(fields, known))
    return "" if value is None or isinstance(value, (Mapping, list)) else str(value)


def list_keys(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


# ---------------------------------------------------------------- which pairs are wanted


@dataclass(frozen=True)
class Condition:
    """A condition on a field."""

    key: str
    operator: str
    value: str

    def holds(self, fields: Mapping[str, object]) -> bool:
        """Whether a pair meets the condition; False without the field. Numbers are compared as numbers."""
        value = fields.get(self.key)
        if value is None:
            return False
        try:
            first, second = float(value), float(self.value)  # True is 1
        except (TypeError, ValueError):
            first, second = str(value).casefold(), self.value.casefold()
        return OPERATORS[self.operator]((first > second) - (first < second))


def parse_condition(text: str) -> Condition:
    """`model=sd-2.0`, `nsfw!=true`, `image_nsfw<0.3`; ValueError for anything else."""
    match = re.fullmatch(r"\s*([^=<>!]+?)\s*(=|!=|<=|>=|<|>)\s*(.*?)\s*", text, re.DOTALL)
    if not match:
        raise ValueError(f"--where {text!r}: give KEY=VALUE, KEY!=VALUE, KEY<NUMBER or KEY>NUMBER")
    value = {"true": "1", "false": "0"}.get(match[3].lower(), match[3])
    return Condition(match[1], match[2], value)
