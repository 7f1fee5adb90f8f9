"""Gives each model its colour, marker and line, in every figure alike."""

import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from kutils.views.figures import BLUE, COLORS, GREEN, GREY, ORANGE, PINK, SKY, VIOLET


class ModelStyle(NamedTuple):
    """How a model is drawn everywhere: `axes.plot(x, y, **model_style(name)._asdict())`."""

    color: str
    linestyle: str
    marker: str


# families that are drawn together have different colours; the tiny ones have those of what they stand for
FAMILIES = {
    "convnext_large": (BLUE, "o"),
    "tiny_convnext": (BLUE, "o"),
    "convnext_xxlarge": (SKY, "D"),
    "vit_large": (ORANGE, "s"),
    "tiny_vit": (ORANGE, "s"),
    "eva02_large_clsonly": (PINK, "v"),
    "eva02_large_clsavg": (GREEN, "^"),
    "eva02_large": (GREEN, "^"),
    "ensemble": (VIOLET, "*"),
    "mean prompt": (GREY, "x"),
    "baseline": (GREY, "x"),
}
MARKERS = "oDsv^PX<>"
LINES = ("-", "--", "-.", ":")
STAGES = {1: "-", 2: "--", 3: "-."}


def model_style(name: str) -> ModelStyle:
    """Colour and marker of a model's family, and the line style of its stage; the same in every session.

    Args:
        name: of a family, a recipe, or a run, such as `tiny_vit_stage2_fold0`; ways of weighting ("family weights") are
            ensembles. Another name gets the colour of a checksum of what comes before its stage and fold.
    """
    family = family_of(name)
    if family:
        color, marker = FAMILIES[family]
    else:
        own = re.sub(r"(_24gb)?_(stage|fold)\d.*", "", name)
        checksum = zlib.crc32(own.encode())
        color, marker = COLORS[checksum % len(COLORS)], MARKERS[checksum // len(COLORS) % len(MARKERS)]
    return ModelStyle(color, STAGES.get(stage_of(name), "-"), marker)


def model_styles(names: Sequence[str]) -> dict[str, ModelStyle]:
    """The style of each model of one figure; one that would look like one before it gets another line and marker."""
    found: dict[str, ModelStyle] = {}
    for name in names:
        own = model_style(name)
        looks = zip(LINES[1:] * len(MARKERS), MARKERS * len(LINES), strict=False)
        others = (ModelStyle(own.color, *look) for look in looks)
        found[name] = next((style for style in (own, *others) if style not in found.values()), own)
    return found


def model_color(name: str) -> str:
    """The colour of `model_style`."""
    return model_style(name).color


def family_of(name: str) -> str | None:
    """The family of FAMILIES that a recipe, a run, or a way of weighting is of; None for all others."""
    known = [family for family in FAMILIES if re.match(rf"{family}(?![a-z0-9])", name)]
    return max(known, key=len) if known else "ensemble" if name.endswith(" weights") else None


def stage_of(name: str) -> int:
    """1, 2 or 3 of a recipe or run, whose published names tell it by their data sets and epochs; 1 for all others."""
    told = re.search(r"_stage(\d)", name)
    if told:
        return int(told[1])
    return 1 if "_8data_" not in name else 3 if re.search(r"_1epoch_fold\d", name) else 2
