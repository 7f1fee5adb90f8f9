"""Gives each model its colour, marker and line, in every figure alike."""

import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from kutils.views.figures import BLUE, COLORS, GREEN, GREY, ORANGE, PINK, SKY, VIOLET


class ModelStyle(NamedTuple):
    """How to draw a model: `axes.plot(x, y, **model_style(name)._asdict())`."""

    color: str
    linestyle: str
    marker: str


# families in one figure have different colours; a tiny recipe has the colour of the large one that it imitates
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
        name: of a family, a recipe, or a run, such as `tiny_vit_stage2_fold0`, or a method of weighting ("family
            weights"). For another name, a checksum of what comes before its stage and fold chooses the colour.
    """
    if family := family_of(name):
        color, marker = FAMILIES[family]
    else:
        checksum = zlib.crc32(re.sub(r"(_24gb)?_(stage|fold)\d.*", "", name).encode())
        color, marker = COLORS[checksum % len(COLORS)], MARKERS[checksum // len(COLORS) % len(MARKERS)]
    return ModelStyle(color, STAGES.get(stage_of(name), "-"), marker)


def model_styles(names: Sequence[str]) -> dict[str, ModelStyle]:
    """The styles of the models of one figure; where two would look alike, the second gets another line and marker."""
    styles: dict[str, ModelStyle] = {}
    for name in names:
        first = model_style(name)
        looks = zip(LINES[1:] * len(MARKERS), MARKERS * len(LINES), strict=False)
        others = (ModelStyle(first.color, *look) for look in looks)
        styles[name] = next((style for style in (first, *others) if style not in styles.values()), first)
    return styles


def model_color(name: str) -> str:
    """The colour of `model_style`."""
    return model_style(name).color


def family_of(name: str) -> str | None:
    """The family in FAMILIES of a recipe, a run, or a method of weighting; None for another name."""
    known = [family for family in FAMILIES if re.match(rf"{family}(?![a-z0-9])", name)]
    return max(known, key=len) if known else "ensemble" if name.endswith(" weights") else None


def stage_of(name: str) -> int:
    """The stage in the name of a recipe or run; published names say it by their data sets and epochs; 1 by default."""
    if match := re.search(r"_stage(\d)", name):
        return int(match[1])
    return 1 if "_8data_" not in name else 3 if re.search(r"_1epoch_fold\d", name) else 2
