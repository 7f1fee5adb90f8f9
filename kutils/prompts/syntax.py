"""Tidies the text of one prompt: odd characters, HTML, and the notation of image generators."""

import html
import re
import unicodedata
from collections.abc import Callable

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# soft hyphen, zero-width and direction marks, byte-order mark, lone surrogates; the joiners of emoji stay
INVISIBLE = re.compile(
    "[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
# only with a semicolon: Python also decodes "&not" in "&nothing"
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
TAG = re.compile(r"</?(?:a|b|br|div|em|font|i|img|p|span|strong|u)\b[^<>]{0,300}>", re.IGNORECASE)
URL = re.compile(r"\bhttps?://\S+", re.IGNORECASE)
NEGATIVE = re.compile(r"\bnegative[ _]prompts?\s*:.*", re.IGNORECASE | re.DOTALL)

# Stable Diffusion's web interface writes its settings behind a prompt: "Steps: 20, Sampler: Euler a, CFG scale: 7, ..."
SETTING = (
    r"(?:steps|sampler|schedule type|cfg scale|seed|size|model(?: hash)?|vae(?: hash)?|denoising strength|clip skip)"
)
SETTINGS_TAIL = re.compile(
    rf"\b(?:steps:\s*\d+\s*(?:,\s*[a-z ]{{1,30}}:|$)|{SETTING}:\s*[^,:]{{1,60}},\s*{SETTING}:).*",
    re.IGNORECASE | re.DOTALL,
)
# Midjourney's: "--ar 16:9 --v 4 --no text, frame"; programs for typing make one long dash of two hyphens
NUMBER = r"-?\d[\d.:x/]*"
FLAG = (
    r"(?:ar|aspect|beta|c|chaos|creative|fast|h|hd|height|iw|n|niji|q|quality|ratio|relax|s|seed|sameseed|steps|stop|style|"
    r"stylize|test|testp|tile|upanime|upbeta|uplight|upscale|v|version|video|w|weird|width)"
)
PARAMETER = re.compile(
    rf"(?<![\w-])(?:--no\b(?:(?!\s--).)*|--{FLAG}\b(?:[\s=]+(?:{NUMBER}|raw|cute|expressive|scenic|original)(?!\w))?"
    rf"|--[a-z]+[\s=]+{NUMBER}|[\u2013\u2014]{FLAG}[\s=]+{NUMBER})",
    re.IGNORECASE,
)
# Latent diffusion's first scripts: "a cat -W 1024 -n 9 -i", sometimes kept as a file name, with underscores for spaces
DREAM_TAIL = re.compile(r"(?:\s-(?:[WHSCns]\s?\d[\d.]*|i))+$")
JOINED = re.compile(r"(?<!\S)(?:[^\s_]+_+){2}\S*")
EXTRA_NETWORK = re.compile(r"<\s*(?:lora|lyco|hypernet|ti)\s*:[^<>]{0,200}>", re.IGNORECASE)
# (word:1.2) and (word:2), but not (12:30), (John 3:16) or (Day: 2)
WEIGHT = re.compile(r"(?:(?<=[^\W\d_]):[+-]?\d|\s*:\s*[+-]?\d{0,2}\.\d+)\s*(?=[)\]])")
EMPHASIS = re.compile(rf"(?<!\\)(?:\({{2}}|\[{{2}}|\{{{{2}}|\((?=[^()]{{1,300}}{WEIGHT.pattern}))")
BRACKET = re.compile(r"(?<!\\)[()\[\]{}]")
SQUARE = re.compile(r"(?<!\\)\[([^\[\]]*)(?<!\\)\]")
EDIT_STEP = re.compile(r":\s*\d*\.?\d+\s*$")
MULTI_PROMPT = re.compile(r"\s*:{2,}(?:\s?-?\d+(?:\.\d+)?(?![\w.]))?\s*")
ESCAPED = re.compile(r"\\{1,4}(['\"()\[\]{}])")
# a prompt without any of these needs no tidying; most have none
SUSPECT = re.compile(r"[\\(\[{<&_\u2013\u2014]|--|::|\w ?:|\s-[A-Za-z]")


def strip_html(text: str) -> str:
    """Replace HTML entities by their characters, and tags by spaces."""
    return TAG.sub(" ", ENTITY.sub(lambda entity: html.unescape(entity[0]), text))


def strip_urls(text: str) -> str:
    """Remove web addresses."""
    return close_gaps(text, URL.sub(" ", text))


def strip_negative_prompt(text: str) -> str:
    """Remove "Negative prompt: ..." up to the end."""
    return close_gaps(text, NEGATIVE.sub("", text))


def strip_parameters(text: str) -> str:
    """Remove the settings that image generators append to a prompt or read from it."""
    return close_gaps(text, DREAM_TAIL.sub("", PARAMETER.sub(" ", SETTINGS_TAIL.sub("", text))))


def strip_weights(text: str) -> str:
    """Remove the notation of attention weights, and leave the words.

    Parentheses also occur in plain English. So they are removed only from a prompt with double parentheses or a weight,
    and then all of them, since a generator reads all as weights.
    """
    plain = MULTI_PROMPT.sub(", ", EXTRA_NETWORK.sub(" ", text))
    emphasised = EMPHASIS.search(plain) is not None
    plain = SQUARE.sub(open_square, plain)
    if emphasised or SQUARE.search(plain):  # some are left: brackets within brackets
        plain = BRACKET.sub("", WEIGHT.sub("", plain))
    return close_gaps(text, plain)


def open_square(match: re.Match) -> str:
    """The words of `[word]`, `[one|other]` and `[from:to:0.5]`."""
    words = EDIT_STEP.sub("", match[1])
    return re.sub(r"\s*[|:]\s*" if words != match[1] else r"\s*\|\s*", ", ", words).strip(" ,")


def close_gaps(before: str, after: str) -> str:
    """Remove from `after` the commas, gaps and empty parentheses that are left over from a removal."""
    if after == before:
        return after
    after = re.sub(r"\(\s*\)", "", after)
    return re.sub(r"(?:\s*,)+", ",", after).strip(" ,")


SYNTAX: dict[str, Callable[[str], str]] = {
    "HTML": strip_html,
    "URLs": strip_urls,
    "underscores": lambda text: JOINED.sub(lambda words: words[0].replace("_", " "), text),
    "negative prompt": strip_negative_prompt,
    "generator parameters": strip_parameters,
    "attention weights": strip_weights,
    "backslashes": lambda text: ESCAPED.sub(r"\1", text),
}
CHARACTERS: dict[str, Callable[[str], str]] = {
    "invisible characters": lambda text: INVISIBLE.sub("", text),
    "control characters": lambda text: CONTROL.sub(" ", text),
    "unicode normal form": lambda text: unicodedata.normalize("NFC", text),
}


def tidy(text: str) -> tuple[str, list[str]]:
    """Make a prompt one line of plain words: NFC, single spaces, no control characters, no notation of generators.

    Tidying a tidied prompt changes nothing.

    Returns: the text, possibly empty, and the kinds of change (keys of CHARACTERS and SYNTAX, "white space").
    """
    kinds: dict[str, None] = {}
    single = " ".join(text.split())
    if single != text:
        kinds["white space"] = None
    previous = None
    while single != previous:  # entities and brackets can be nested
        previous = single
        steps = {} if single.isascii() and single.isprintable() else CHARACTERS
        steps = steps | SYNTAX if SUSPECT.search(single) else steps
        for kind, step in steps.items():
            changed = step(single)
            if changed != single:
                kinds[kind] = None
            single = changed
        single = " ".join(single.split())
    return single, list(kinds)
