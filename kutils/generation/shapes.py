"""Makes prompts of a small visual language, and renders pictures that show what they say.

It replaces a diffusion model, so that the whole pipeline runs on a laptop. Every known word of a prompt is visible in
its picture, so that a network can learn it. Prompts and pictures depend only on their seeds.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from kutils.generation import shape_objects, shape_scenes
from kutils.prompts.grammar import plural
from kutils.system.output import quoted

# each meaning with its wordings; no wording has two meanings
OBJECTS = {
    "apple": ("apple",),
    "balloon": ("balloon", "hot air balloon"),
    "bird": ("bird", "sparrow"),
    "boat": ("sailboat", "sailing ship", "boat"),
    "butterfly": ("butterfly",),
    "cactus": ("cactus",),
    "candle": ("candle",),
    "car": ("car", "vintage car", "automobile"),
    "castle": ("castle", "medieval fortress"),
    "cat": ("cat", "kitten"),
    "crown": ("crown", "royal crown"),
    "fish": ("fish", "goldfish"),
    "flower": ("flower", "blossom"),
    "guitar": ("guitar", "acoustic guitar"),
    "hat": ("top hat", "hat"),
    "heart": ("heart",),
    "house": ("house", "cottage"),
    "key": ("key", "skeleton key"),
    "mushroom": ("mushroom", "toadstool"),
    "robot": ("robot", "android"),
    "rocket": ("rocket", "spaceship"),
    "skull": ("skull",),
    "snowman": ("snowman",),
    "spider": ("spider", "tarantula"),
    "teapot": ("teapot",),
    "tree": ("tree", "oak tree"),
    "umbrella": ("umbrella", "parasol"),
    "whale": ("whale",),
}
COLOURS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "lemon yellow"),
    "green": ("green", "emerald green"),
    "turquoise": ("turquoise", "teal"),
    "blue": ("blue", "cobalt blue"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "magenta"),
    "brown": ("brown", "chocolate brown"),
    "black": ("black", "jet black"),
    "white": ("white", "ivory"),
    "gray": ("gray", "silver"),
}
RGB = {
    "red": (222, 30, 38),
    "orange": (250, 130, 20),
    "yellow": (250, 220, 40),
    "green": (45, 160, 60),
    "turquoise": (50, 200, 195),
    "blue": (35, 80, 215),
    "purple": (130, 45, 175),
    "pink": (250, 110, 185),
    "brown": (125, 72, 35),
    "black": (38, 38, 42),
    "white": (246, 246, 242),
    "gray": (150, 152, 158),
}
SIZES = {"small": ("small", "tiny", "little"), "large": ("large", "huge", "giant")}
COUNTS = {
    1: ("a", "one", "a single"),
    2: ("two", "a pair of"),
    3: ("three", "a trio of"),
    4: ("four",),
    5: ("five",),
    6: ("six", "half a dozen"),
}
RELATIONS = {
    "next to": ("next to", "beside", "side by side with"),
    "above": ("above", "floating above", "on top of"),
    "below": ("below", "underneath"),
    "inside": ("inside", "within", "enclosed by"),
}
BACKGROUNDS = {
    "night": ("under a starry night sky", "at midnight in the moonlight", "among the stars of outer space"),
    "ocean": ("on the waves of the ocean", "in the open sea", "in deep water"),
    "meadow": ("in a grassy meadow", "on a sunny hill in spring", "in the countryside"),
    "desert": ("in the desert", "among sand dunes", "in the Sahara"),
    "snow": ("in falling snow", "in a winter blizzard", "on a snowy day"),
    "sunset": ("at sunset", "at dusk, glowing horizon", "in the evening light, setting sun"),
    "bricks": ("in front of a brick wall", "against an old wall of bricks"),
    "city": ("in a big city", "with skyscrapers in the background", "in downtown Manhattan"),
    "forest": ("in a dark forest", "deep in the woods", "between tall pines"),
    "plain": ("on a plain background", "in a studio"),
}
STYLES = {
    "pencil": ("pencil sketch", "graphite drawing", "hand-drawn sketch on paper"),
    "watercolor": ("watercolor painting", "aquarelle", "soft watercolor illustration"),
    "oil": ("oil painting", "impasto painting on canvas", "painting by Vincent van Gogh"),
    "pixel": ("pixel art", "8-bit video game sprite", "retro game screenshot"),
    "blurred": ("blurry photo", "out of focus photograph", "blurred snapshot with shallow depth of field"),
    "neon": ("neon sign", "glowing neon artwork", "cyberpunk neon lights"),
    "comic": ("comic book panel", "pop art poster", "cartoon with bold ink lines"),
    "vintage": ("old sepia photograph", "faded vintage postcard", "daguerreotype"),
    "clean": ("flat vector illustration", "clip art", "children's book illustration"),
}
EXTRAS = (
    "highly detailed",
    "trending on artstation",
    "4k",
    "beautiful composition",
    "award winning",
    "mysterious mood",
)
VOCABULARY = {
    "object": OBJECTS,
    "colour": COLOURS,
    "size": SIZES,
    "count": COUNTS,
    "relation": RELATIONS,
    "background": BACKGROUNDS,
    "style": STYLES,
}


@dataclass(frozen=True)
class Thing:
    """Some objects of one kind. None: the prompt does not say; then the colour is random and the size medium."""

    name: str
    colour: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for; `relation` is that of the first thing to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str = "plain"
    style: str = "clean"


def meanings() -> dict[str, tuple[str, str | int]]:
    """Every wording, in lower case -> its part of speech and meaning."""
    table = {}
    for part, words in VOCABULARY.items():
        for meaning, wordings in words.items():
            for wording in wordings:
                table[wording.lower()] = (part, meaning)
                if part == "object":
                    table[plural(wording).lower()] = (part, meaning)
    return table | {"an": ("count", 1)}


MEANINGS = meanings()
WORDINGS = re.compile(rf"\b({'|'.join(sorted(map(re.escape, MEANINGS), key=len, reverse=True))})\b", re.IGNORECASE)


def parse(prompt: str) -> Scene:
    """Parse a prompt: matches the longest known wordings from left to right and ignores other words.

    Raises: ValueError if it names no object of OBJECTS.
    """
    things, adjectives, scene = [], {}, {}
    for match in WORDINGS.finditer(prompt):
        part, meaning = MEANINGS[match[1].lower()]
        if part == "object":
            things.append(Thing(meaning, **adjectives))
            adjectives = {}
        elif part in ("relation", "background", "style"):
            scene.setdefault(part, meaning)
        else:
            adjectives[part] = meaning
    if not things:
        raise ValueError(f"{quoted(prompt)} names nothing that can be drawn; the renderer knows {', '.join(OBJECTS)}")
    return Scene(tuple(things), **scene)


def generate_prompts(count: int, seed: int = 0) -> list[str]:
    """Distinct prompts of the language, the same for the same seed; a longer list begins with the shorter one.

    Raises: ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"{count} prompts cannot be made")
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[compose(rng)] = None
    return list(prompts)


def compose(rng: np.random.Generator) -> str:
    """One random prompt: one or two things, usually a background and a style, in one of four orders."""

    def wording(part: str) -> str:
        words = VOCABULARY[part]
        options = words[list(words)[rng.integers(len(words))]]
        return options[rng.integers(len(options))]

    def noun_phrase(most: int) -> str:
        count = int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.6, 0.1, 0.1, 0.08, 0.06, 0.06])) if most > 1 else 1
        noun = wording("object")
        size = wording("size") if rng.random() < 0.3 else ""
        colour = wording("colour") if rng.random() < 0.85 else ""
        words = join_parts(" ", size, colour, plural(noun) if count > 1 else noun)
        options = COUNTS[count]
        number = options[rng.integers(len(options))]
        return f"an {words}" if number == "a" and words[0] in "aeiou" else f"{number} {words}"

    subject = noun_phrase(6)
    if rng.random() < 0.4:
        subject = f"{noun_phrase(1)} {wording('relation')} {noun_phrase(1)}"
    background = wording("background") if rng.random() < 0.85 else ""
    style = wording("style") if rng.random() < 0.85 else ""
    extra = EXTRAS[rng.integers(len(EXTRAS))] if rng.random() < 0.15 else ""
    order = rng.integers(4)
    scene = join_parts(" ", subject, background)
    if style and order == 0:
        article = "an" if style[0] in "aeiou8" else "a"
        return join_parts(", ", f"{article} {style} of {scene}", extra)
    if style and order == 1:
        return join_parts(", ", style, scene, extra)
    if order == 2:
        return join_parts(", ", subject, background, style, extra)
    return join_parts(", ", scene, style, extra)


def join_parts(separator: str, *parts: str) -> str:
    """The parts that are not empty, with the separator between them."""
    return separator.join(filter(None, parts))


def render(prompt: str, seed: int, size: int = 128) -> Image.Image:
    """The picture of a prompt: RGB [size, size] px. Position, rotation, hue, noise and unspecified properties are
    random.

    Raises: ValueError if the prompt names no known object.
    """
    scene = parse(prompt)
    rng = np.random.default_rng(seed)
    large = 2 * size  # drawn twice as large, which smooths the edges
    image = shape_scenes.BACKGROUNDS[scene.background](large, rng)
    for thing, (left, top, right, bottom), scale in layout(scene, rng):
        colour = thing.colour or list(RGB)[rng.integers(len(RGB))]
        columns = math.ceil(math.sqrt(thing.count))
        rows = math.ceil(thing.count / columns)
        cell_width, cell_height = (right - left) / columns, (bottom - top) / rows
        scale *= {"small": 0.55, "large": 1.3}.get(thing.size, 0.88) * min(cell_width, cell_height)
        for number in range(thing.count):
            shade = np.array(RGB[colour]) + rng.normal(0, 12, 3)
            glyph = shape_objects.draw_object(
                thing.name, tuple(shade.clip(0, 255).astype(int).tolist()), max(8, int(scale * large))
            )
            glyph = glyph.rotate(rng.normal(0, 6), Image.Resampling.BILINEAR)
            x = left + (number % columns + 0.5 + rng.uniform(-0.06, 0.06)) * cell_width
            y = top + (number // columns + 0.5 + rng.uniform(-0.06, 0.06)) * cell_height
            image.paste(glyph, (int(x * large) - glyph.width // 2, int(y * large) - glyph.height // 2), glyph)
    return shape_scenes.STYLES[scene.style](image.reduce(2), rng)


def layout(scene: Scene, rng: np.random.Generator) -> list[tuple[Thing, tuple[float, float, float, float], float]]:
    """Things in the order to draw, each with its box (left, top, right, bottom; parts of the picture) and filling."""
    things = scene.things
    if len(things) == 1:
        x, y = rng.uniform(-0.08, 0.08, 2)
        return [(things[0], (0.04 + x, 0.06 + y, 0.96 + x, 0.98 + y), 0.9)]
    if scene.relation == "inside" and len(things) == 2:
        return [(things[1], (0.0, 0.0, 1.0, 1.0), 1.1), (things[0], (0.3, 0.35, 0.7, 0.75), 1.1)]
    cells = [(number / len(things), (number + 1) / len(things)) for number in range(len(things))]
    if scene.relation in ("above", "below"):
        boxes = [(0.1, top, 0.9, bottom) for top, bottom in cells[:: -1 if scene.relation == "below" else 1]]
    else:
        boxes = [(left, 0.2, right, 0.95) for left, right in cells[:: rng.choice([1, -1])]]
    return [(thing, box, 1.1) for thing, box in zip(things, boxes, strict=True)]
