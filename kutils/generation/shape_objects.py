"""Draws the objects of the built-in renderer: each a few flat parts on the square from -1 to 1, y downwards."""

from PIL import Image, ImageColor, ImageDraw

# a part: kind, tone, numbers. polygon: x, y of each corner; line: width, then x, y of each end; others: a bounding box
# (left, top, right, bottom), arcs and chords with start and end in degrees, clockwise from three o'clock
# a tone: of the object's own colour (body, dark, light), or a fixed colour by name
GLYPHS: dict[str, tuple[tuple, ...]] = {
    "apple": (
        ("ellipse", "body", -0.75, -0.45, 0.2, 0.85),
        ("ellipse", "body", -0.2, -0.45, 0.75, 0.85),
        ("line", "saddlebrown", 0.12, 0, -0.4, 0.1, -0.85),
        ("ellipse", "forestgreen", 0.1, -0.9, 0.55, -0.65),
    ),
    "balloon": (
        ("line", "dimgray", 0.05, 0, 0.3, 0.1, 0.6, -0.1, 0.95),
        ("ellipse", "body", -0.6, -0.95, 0.6, 0.4),
        ("polygon", "dark", 0, 0.3, -0.15, 0.52, 0.15, 0.52),
        ("ellipse", "light", -0.35, -0.75, -0.1, -0.35),
    ),
    "bird": (
        ("polygon", "dark", -0.5, 0.1, -1, -0.2, -0.95, 0.3),
        ("ellipse", "body", -0.65, -0.3, 0.5, 0.5),
        ("ellipse", "body", 0.2, -0.65, 0.75, -0.1),
        ("polygon", "orange", 0.7, -0.45, 1, -0.3, 0.7, -0.22),
        ("polygon", "dark", -0.3, 0, 0.25, 0, -0.35, -0.85),
        ("ellipse", "black", 0.48, -0.48, 0.6, -0.36),
        ("line", "orange", 0.07, -0.1, 0.5, -0.1, 0.85),
        ("line", "orange", 0.07, 0.15, 0.45, 0.15, 0.85),
    ),
    "boat": (
        ("line", "saddlebrown", 0.1, 0, 0.3, 0, -0.95),
        ("polygon", "white", 0.08, -0.9, 0.08, 0.15, 0.8, 0.15),
        ("polygon", "light", -0.08, -0.7, -0.08, 0.15, -0.6, 0.15),
        ("polygon", "body", -0.95, 0.3, 0.95, 0.3, 0.6, 0.85, -0.6, 0.85),
    ),
    "butterfly": (
        ("ellipse", "body", -0.95, -0.85, -0.05, 0.1),
        ("ellipse", "body", 0.05, -0.85, 0.95, 0.1),
        ("ellipse", "dark", -0.75, 0, -0.05, 0.8),
        ("ellipse", "dark", 0.05, 0, 0.75, 0.8),
        ("ellipse", "light", -0.65, -0.55, -0.35, -0.2),
        ("ellipse", "light", 0.35, -0.55, 0.65, -0.2),
        ("ellipse", "black", -0.1, -0.7, 0.1, 0.75),
        ("line", "black", 0.05, 0, -0.65, -0.3, -0.98),
        ("line", "black", 0.05, 0, -0.65, 0.3, -0.98),
    ),
    "cactus": (
        ("line", "body", 0.32, 0, 0.75, 0, -0.8),
        ("line", "body", 0.24, 0, 0.2, -0.6, 0.2, -0.6, -0.4),
        ("line", "body", 0.24, 0, -0.05, 0.6, -0.05, 0.6, -0.6),
        ("line", "dark", 0.05, 0, 0.7, 0, -0.75),
        ("polygon", "sienna", -0.5, 0.6, 0.5, 0.6, 0.35, 0.98, -0.35, 0.98),
    ),
    "candle": (
        ("polygon", "body", -0.25, -0.3, 0.25, -0.3, 0.25, 0.8, -0.25, 0.8),
        ("polygon", "light", -0.25, -0.3, 0.05, -0.3, 0, 0.1, -0.1, -0.1, -0.25, 0.2),
        ("ellipse", "dark", -0.6, 0.7, 0.6, 0.95),
        ("line", "black", 0.05, 0, -0.3, 0, -0.5),
        ("ellipse", "orange", -0.18, -0.95, 0.18, -0.4),
        ("ellipse", "yellow", -0.09, -0.75, 0.09, -0.42),
    ),
    "car": (
        ("polygon", "dark", -0.55, -0.05, -0.3, -0.5, 0.35, -0.5, 0.6, -0.05),
        ("polygon", "lightcyan", -0.4, -0.05, -0.22, -0.38, 0, -0.38, 0, -0.05),
        ("polygon", "lightcyan", 0.08, -0.05, 0.08, -0.38, 0.28, -0.38, 0.45, -0.05),
        ("polygon", "body", -0.95, -0.05, 0.8, -0.05, 0.97, 0.15, 0.97, 0.45, -0.95, 0.45),
        ("ellipse", "black", -0.75, 0.2, -0.25, 0.7),
        ("ellipse", "black", 0.25, 0.2, 0.75, 0.7),
        ("ellipse", "silver", -0.6, 0.35, -0.4, 0.55),
        ("ellipse", "silver", 0.4, 0.35, 0.6, 0.55),
    ),
    "castle": (
        ("polygon", "body", -0.6, -0.1, 0.6, -0.1, 0.6, 0.9, -0.6, 0.9),
        ("polygon", "dark", -0.95, -0.5, -0.45, -0.5, -0.45, 0.9, -0.95, 0.9),
        ("polygon", "dark", 0.45, -0.5, 0.95, -0.5, 0.95, 0.9, 0.45, 0.9),
        ("polygon", "light", -1, -0.5, -0.7, -0.97, -0.4, -0.5),
        ("polygon", "light", 0.4, -0.5, 0.7, -0.97, 1, -0.5),
        ("polygon", "black", -0.2, 0.9, -0.2, 0.4, 0, 0.2, 0.2, 0.4, 0.2, 0.9),
    ),
    "cat": (
        ("line", "body", 0.14, 0.45, 0.75, 0.85, 0.5, 0.75, 0),
        ("ellipse", "body", -0.5, 0, 0.5, 0.97),
        ("polygon", "body", -0.5, -0.4, -0.48, -0.97, -0.1, -0.65),
        ("polygon", "body", 0.5, -0.4, 0.48, -0.97, 0.1, -0.65),
        ("ellipse", "body", -0.52, -0.75, 0.52, 0.15),
        ("ellipse", "light", -0.25, 0.3, 0.25, 0.9),
        ("ellipse", "yellow", -0.32, -0.5, -0.08, -0.22),
        ("ellipse", "yellow", 0.08, -0.5, 0.32, -0.22),
        ("ellipse", "black", -0.24, -0.46, -0.16, -0.26),
        ("ellipse", "black", 0.16, -0.46, 0.24, -0.26),
        ("polygon", "hotpink", -0.08, -0.12, 0.08, -0.12, 0, -0.02),
    ),
    "crown": (
        ("polygon", "body", -0.9, 0.6, -0.95, -0.5, -0.45, 0.05, 0, -0.75, 0.45, 0.05, 0.95, -0.5, 0.9, 0.6),
        ("polygon", "dark", -0.9, 0.45, 0.9, 0.45, 0.9, 0.75, -0.9, 0.75),
        ("ellipse", "light", -1, -0.65, -0.8, -0.45),
        ("ellipse", "light", 0.8, -0.65, 1, -0.45),
        ("ellipse", "light", -0.12, -0.92, 0.12, -0.68),
        ("ellipse", "red", -0.12, 0.1, 0.12, 0.35),
    ),
    "fish": (
        ("polygon", "dark", 0.45, 0, 0.98, -0.5, 0.85, 0, 0.98, 0.5),
        ("polygon", "dark", -0.2, -0.3, 0.1, -0.8, 0.4, -0.2),
        ("ellipse", "body", -0.9, -0.5, 0.6, 0.5),
        ("chord", "light", -0.9, -0.5, 0.6, 0.5, 120, 240),
        ("ellipse", "white", -0.7, -0.25, -0.42, 0.03),
        ("ellipse", "black", -0.63, -0.18, -0.5, -0.05),
        ("polygon", "dark", -0.1, 0.05, 0.25, -0.1, 0.25, 0.25),
    ),
    "flower": (
        ("line", "forestgreen", 0.1, 0, 0, 0, 0.95),
        ("ellipse", "forestgreen", 0.02, 0.5, 0.55, 0.75),
        ("ellipse", "body", -0.25, -0.95, 0.25, -0.35),
        ("ellipse", "body", -0.25, -0.15, 0.25, 0.45),
        ("ellipse", "body", -0.75, -0.5, -0.1, 0),
        ("ellipse", "body", 0.1, -0.5, 0.75, 0),
        ("ellipse", "yellow", -0.22, -0.47, 0.22, -0.03),
    ),
    "guitar": (
        ("line", "saddlebrown", 0.14, 0, 0.1, 0, -0.9),
        ("ellipse", "body", -0.38, -0.2, 0.38, 0.4),
        ("ellipse", "body", -0.52, 0.2, 0.52, 0.97),
        ("ellipse", "black", -0.15, 0.2, 0.15, 0.5),
        ("polygon", "dark", -0.15, -0.98, 0.15, -0.98, 0.12, -0.7, -0.12, -0.7),
        ("line", "white", 0.03, 0, -0.9, 0, 0.75),
    ),
    "hat": (
        ("ellipse", "dark", -0.98, 0.25, 0.98, 0.75),
        ("polygon", "body", -0.5, 0.45, -0.42, -0.8, 0.42, -0.8, 0.5, 0.45),
        ("ellipse", "body", -0.5, 0.3, 0.5, 0.6),
        ("ellipse", "light", -0.42, -0.9, 0.42, -0.68),
        ("line", "light", 0.16, -0.48, 0.25, 0.48, 0.25),
    ),
    "heart": (
        ("ellipse", "body", -0.95, -0.75, 0.05, 0.25),
        ("ellipse", "body", -0.05, -0.75, 0.95, 0.25),
        ("polygon", "body", -0.86, 0.02, 0, -0.3, 0.86, 0.02, 0, 0.95),
        ("ellipse", "light", -0.65, -0.5, -0.35, -0.2),
    ),
    "house": (
        ("polygon", "saddlebrown", 0.35, -0.9, 0.6, -0.9, 0.6, -0.2, 0.35, -0.2),
        ("polygon", "body", -0.7, -0.1, 0.7, -0.1, 0.7, 0.9, -0.7, 0.9),
        ("polygon", "dark", -0.95, -0.1, 0, -0.85, 0.95, -0.1),
        ("polygon", "saddlebrown", -0.15, 0.35, 0.15, 0.35, 0.15, 0.9, -0.15, 0.9),
        ("polygon", "lightyellow", -0.55, 0.1, -0.25, 0.1, -0.25, 0.4, -0.55, 0.4),
        ("polygon", "lightyellow", 0.25, 0.1, 0.55, 0.1, 0.55, 0.4, 0.25, 0.4),
    ),
    "key": (
        ("ellipse", "body", -0.95, -0.45, -0.1, 0.4),
        ("ellipse", "black", -0.7, -0.2, -0.35, 0.15),
        ("line", "body", 0.2, -0.15, 0, 0.95, 0),
        ("line", "body", 0.16, 0.55, 0, 0.55, 0.4),
        ("line", "body", 0.16, 0.87, 0, 0.87, 0.45),
    ),
    "mushroom": (
        ("polygon", "wheat", -0.25, 0, 0.25, 0, 0.35, 0.9, -0.35, 0.9),
        ("chord", "body", -0.95, -0.85, 0.95, 0.95, 180, 360),
        ("ellipse", "light", -0.6, -0.4, -0.3, -0.15),
        ("ellipse", "light", -0.15, -0.75, 0.2, -0.4),
        ("ellipse", "light", 0.35, -0.4, 0.65, -0.1),
    ),
    "robot": (
        ("line", "dimgray", 0.06, 0, -0.6, 0, -0.95),
        ("ellipse", "red", -0.1, -1, 0.1, -0.8),
        ("polygon", "body", -0.45, -0.7, 0.45, -0.7, 0.45, -0.1, -0.45, -0.1),
        ("polygon", "dark", -0.6, -0.02, 0.6, -0.02, 0.6, 0.65, -0.6, 0.65),
        ("line", "body", 0.16, -0.75, 0, -0.85, 0.55),
        ("line", "body", 0.16, 0.75, 0, 0.85, 0.55),
        ("line", "body", 0.2, -0.3, 0.65, -0.3, 0.97),
        ("line", "body", 0.2, 0.3, 0.65, 0.3, 0.97),
        ("ellipse", "cyan", -0.3, -0.55, -0.08, -0.33),
        ("ellipse", "cyan", 0.08, -0.55, 0.3, -0.33),
        ("line", "black", 0.07, -0.25, -0.22, 0.25, -0.22),
        ("polygon", "light", -0.3, 0.15, 0.3, 0.15, 0.3, 0.45, -0.3, 0.45),
    ),
    "rocket": (
        ("polygon", "orange", -0.2, 0.6, 0.2, 0.6, 0, 0.99),
        ("polygon", "dark", -0.25, 0.15, -0.65, 0.7, -0.25, 0.6),
        ("polygon", "dark", 0.25, 0.15, 0.65, 0.7, 0.25, 0.6),
        ("polygon", "body", -0.28, 0.62, -0.3, -0.3, 0, -0.97, 0.3, -0.3, 0.28, 0.62),
        ("polygon", "light", -0.22, -0.47, 0, -0.97, 0.22, -0.47),
        ("ellipse", "lightcyan", -0.15, -0.3, 0.15, 0),
    ),
    "skull": (
        ("polygon", "body", -0.4, 0.2, 0.4, 0.2, 0.36, 0.9, -0.36, 0.9),
        ("ellipse", "body", -0.75, -0.9, 0.75, 0.5),
        ("ellipse", "black", -0.5, -0.35, -0.1, 0.1),
        ("ellipse", "black", 0.1, -0.35, 0.5, 0.1),
        ("polygon", "black", 0, 0.1, -0.1, 0.32, 0.1, 0.32),
        ("line", "black", 0.05, -0.15, 0.55, -0.15, 0.9),
        ("line", "black", 0.05, 0.15, 0.55, 0.15, 0.9),
    ),
    "snowman": (
        ("ellipse", "white", -0.6, 0, 0.6, 0.98),
        ("ellipse", "white", -0.42, -0.6, 0.42, 0.2),
        ("line", "body", 0.2, -0.38, 0.02, 0.38, 0.02),
        ("line", "body", 0.16, 0.25, 0.05, 0.35, 0.5),
        ("polygon", "body", -0.3, -0.98, 0.3, -0.98, 0.3, -0.5, -0.3, -0.5),
        ("line", "body", 0.12, -0.5, -0.5, 0.5, -0.5),
        ("ellipse", "black", -0.2, -0.38, -0.08, -0.26),
        ("ellipse", "black", 0.08, -0.38, 0.2, -0.26),
        ("polygon", "orange", 0, -0.25, 0, -0.1, 0.5, -0.12),
    ),
    "spider": (
        *(
            ("line", "dark", 0.07, side * 0.2, 0.1, side * 0.65, elbow, side * 0.95, foot)
            for side in (-1, 1)
            for elbow, foot in ((-0.65, -0.3), (-0.25, 0.05), (0.2, 0.5), (0.45, 0.95))
        ),
        ("ellipse", "body", -0.5, -0.1, 0.5, 0.75),
        ("ellipse", "body", -0.28, -0.5, 0.28, 0),
        ("ellipse", "white", -0.2, -0.38, -0.04, -0.22),
        ("ellipse", "white", 0.04, -0.38, 0.2, -0.22),
    ),
    "teapot": (
        ("arc", "body", 0.25, -0.35, 0.98, 0.45, 270, 90),
        ("polygon", "body", -0.4, 0.25, -0.98, -0.4, -0.8, -0.45, -0.35, -0.05),
        ("ellipse", "body", -0.6, -0.5, 0.6, 0.75),
        ("ellipse", "dark", -0.35, -0.62, 0.35, -0.38),
        ("ellipse", "light", -0.12, -0.82, 0.12, -0.58),
    ),
    "tree": (
        ("polygon", "saddlebrown", -0.15, 0.2, 0.15, 0.2, 0.2, 0.97, -0.2, 0.97),
        ("ellipse", "dark", -0.85, -0.4, 0.05, 0.45),
        ("ellipse", "dark", -0.05, -0.4, 0.85, 0.45),
        ("ellipse", "body", -0.6, -0.95, 0.6, 0.2),
    ),
    "umbrella": (
        ("line", "dimgray", 0.08, 0, -0.2, 0, 0.75),
        ("arc", "dimgray", 0, 0.5, 0.4, 0.95, 0, 180),
        ("chord", "body", -0.97, -0.8, 0.97, 1, 180, 360),
        ("chord", "light", -0.35, -0.8, 0.35, 1, 180, 360),
    ),
    "whale": (
        ("polygon", "dark", 0.6, 0, 0.98, -0.65, 0.7, -0.5, 0.5, -0.7),
        ("chord", "body", -0.95, -0.75, 0.95, 0.75, 0, 180),
        ("ellipse", "body", -0.95, -0.45, 0.5, 0.6),
        ("chord", "light", -0.9, -0.5, 0.4, 0.7, 40, 140),
        ("ellipse", "black", -0.65, -0.05, -0.52, 0.08),
        ("line", "deepskyblue", 0.08, -0.3, -0.5, -0.3, -0.9, -0.5, -0.98),
        ("line", "deepskyblue", 0.08, -0.3, -0.9, -0.1, -0.98),
    ),
}
OUTLINE = (25, 25, 30)


def tones(colour: tuple[int, int, int]) -> dict[str, tuple[int, int, int]]:
    """The object's own colour, and a darker and a lighter version of it."""
    return {
        "body": colour,
        "dark": tuple(int(0.6 * value) for value in colour),
        "light": tuple(int(0.5 * value + 127) for value in colour),
    }


def draw_object(name: str, colour: tuple[int, int, int], size: int) -> Image.Image:
    """An object in a colour: RGBA [size, size] px, transparent around it.

    Args:
        name: a key of GLYPHS.
        colour: RGB, 0 to 255.
    """
    image = Image.new("RGBA", (size, size))
    canvas = ImageDraw.Draw(image)
    own = tones(colour)
    edge = max(1, size // 60)

    def px(numbers):
        return [(0.5 + 0.48 * number) * size for number in numbers]

    for kind, tone, *numbers in GLYPHS[name]:
        fill = own.get(tone) or ImageColor.getrgb(tone)
        if kind == "line":
            width = max(1, round(0.48 * numbers[0] * size))
            canvas.line(px(numbers[1:]), OUTLINE, width + 2 * edge, joint="curve")
            canvas.line(px(numbers[1:]), fill, width, joint="curve")
        elif kind == "polygon":
            canvas.polygon(px(numbers), fill, OUTLINE, edge)
        elif kind == "ellipse":
            canvas.ellipse(px(numbers), fill, OUTLINE, edge)
        elif kind == "chord":
            canvas.chord(px(numbers[:4]), *numbers[4:], fill, OUTLINE, edge)
        else:
            canvas.arc(px(numbers[:4]), *numbers[4:], fill, max(2, size // 14))
    return image
