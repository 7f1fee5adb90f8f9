"""Makes prompts from a grammar like the competition's, or joins two prompts of different topics.

The built-in renderer cannot draw these prompts; `kutils.generation.shapes` makes those that it can draw.
"""

import argparse
import functools
import random
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from kutils.prompts.cleaning import count_words, prompt_key
from kutils.prompts.collection import positive, write_prompts
from kutils.prompts.grammar_words import PATTERNS, PLURALS, WORDS
from kutils.system.tables import read_table

SKEW = 2.2  # word floor(n * u**SKEW) of n is drawn, u uniform: the first tenth of a list makes 35 % of the draws
SLOT = re.compile(r"\{(\w+)(:s)?\}")
ARTICLE = re.compile(r"@ (\w+)")
JOINS = ("{} and {}", "{}, next to {}", "{} beside {}", "{} with {}", "{}, {}", "{}, near {}")
JOINED_WORDS = 20  # most words of a prompt to join: CLIP would truncate two long ones
ENDS = " .,;:!-"


def article(word: str) -> str:
    """The indefinite article before a word, by its sound: an hour, a unicorn."""
    lower = word.lower()
    if re.match(r"hour|honest|heir", lower):
        return "an"
    return "a" if lower[0] not in "aeiou8" or re.match(r"uni(?!n)|u[bkst][aeiu]|eu|one", lower) else "an"


def plural(noun: str) -> str:
    """The plural of a noun or of a phrase that ends in its noun."""
    if noun in PLURALS:
        return PLURALS[noun]
    first, gap, last = noun.rpartition(" ")
    if last in PLURALS:
        return first + gap + PLURALS[last]
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(?:s|x|z|ch|sh)$", noun) else "s")


@functools.cache
def compile_grammar() -> Callable[[random.Random], str]:
    """A function that makes one random prompt from WORDS and PATTERNS."""
    words = {name: [" ".join(word.split()) for word in text.split(",")] for name, text in WORDS.items()}
    parts = {
        option: [piece for piece in re.split(r"(\{\w+(?::s)?\})", option) if piece]
        for options in PATTERNS.values()
        for option in options
    }
    chances = {name: (list(options), list(accumulate(options.values()))) for name, options in PATTERNS.items()}
    slots = {piece: SLOT.fullmatch(piece) for pieces in parts.values() for piece in pieces}

    def expand(name: str, rng: random.Random) -> str:
        if name in words:
            options = words[name]
            return options[int(len(options) * rng.random() ** SKEW)]
        options, cumulative = chances[name]
        (option,) = rng.choices(options, cum_weights=cumulative)
        text = ""
        for piece in parts[option]:
            slot = slots[piece]
            word = expand(slot[1], rng) if slot else piece
            text += plural(word) if slot and slot[2] else word
        return text

    return lambda rng: ARTICLE.sub(lambda match: f"{article(match[1])} {match[1]}", expand("prompt", rng))


def compose_prompts(count: int, seed: int = 0) -> list[str]:
    """Distinct random prompts of the grammar.

    The same seed gives the same prompts, and a longer list begins with the shorter one.

    Raises: ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"{count} prompts cannot be made")
    compose, rng = compile_grammar(), random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[compose(rng)] = None
    return list(prompts)


def join_prompts(
    prompts: Sequence[str], embeddings: np.ndarray, count: int, *, num_clusters: int = 100, seed: int = 0
) -> list[str]:
    """Join pairs of prompts of different topics to new prompts: "X and Y", "X, next to Y", ...

    Topics are clusters of the embeddings (mini-batch k-means). Prompts of more than JOINED_WORDS words are not used,
    nor those that differ from an earlier one only in case or punctuation (`prompt_key`). The same input and seed give
    the same prompts, and a longer list begins with the shorter one.

    Args:
        prompts: n texts.
        embeddings: float32 [n, D], their unit rows.
        num_clusters: number of topics, at least 2.
    Returns: distinct prompts.
    Raises: ValueError for sizes that do not fit, or if there are too few pairs for `count` prompts.
    """
    first_row = {}
    for row, prompt in enumerate(prompts):
        first_row.setdefault(prompt_key(prompt), row)
    if len(first_row) < len(prompts) == len(embeddings):
        distinct = list(first_row.values())
        prompts, embeddings = [prompts[row] for row in distinct], embeddings[distinct]
    if 2 <= len(prompts) < num_clusters:
        raise ValueError(
            f"only {len(prompts)} prompts for {num_clusters} clusters; give --clusters {len(prompts)} or fewer"
        )
    if count < 0 or not 2 <= num_clusters <= len(prompts) or len(embeddings) != len(prompts):
        raise ValueError(
            f"{count} prompts of {len(prompts)} with {len(embeddings)} embeddings in {num_clusters} clusters: give at "
            "least 2 clusters and a prompt for each"
        )
    from sklearn.cluster import MiniBatchKMeans  # seconds to import

    topics = MiniBatchKMeans(num_clusters, random_state=seed, n_init=1, batch_size=4096).fit_predict(embeddings)
    short = [row for row, prompt in enumerate(prompts) if prompt.strip(ENDS) and count_words(prompt) <= JOINED_WORDS]
    sizes = np.bincount(topics[short], minlength=num_clusters).astype(object)  # Python's integers cannot overflow
    num_pairs = (sum(sizes) ** 2 - sum(sizes**2)) // 2
    if count > num_pairs // 2:
        raise ValueError(
            f"{len(short)} prompts of at most {JOINED_WORDS} words make {num_pairs:,} pairs of different clusters: ask "
            f"for half of them at most, not {count:,}"
        )
    rng = random.Random(seed)
    joined: dict[frozenset[int], str] = {}
    while len(joined) < count:
        first, second = (short[int(rng.random() * len(short))] for _ in range(2))
        join = JOINS[int(rng.random() * len(JOINS))]
        if topics[first] != topics[second]:
            text = join.format(prompts[first].strip(ENDS), lower_start(prompts[second].strip(ENDS)))
            joined.setdefault(frozenset((first, second)), text)
    return list(joined.values())


def lower_start(prompt: str) -> str:
    """A prompt as the later part of a sentence: a first word such as "The" loses its capital, a name does not."""
    first = prompt.split(" ")[0]
    return (
        first.lower() + prompt[len(first) :] if first in ("A", "An", "The", "Two", "Three", "Some", "Many") else prompt
    )


def join_table(tsv_path: Path | str, count: int, *, num_clusters: int = 100, seed: int = 0) -> list[str]:
    """Apply `join_prompts` to a prompts file, which is embedded first if that has not been done.

    Raises: ValueError.
    """
    from kutils.prompts.embedding import embed_table  # loads PyTorch

    prompts = read_table(tsv_path, ["prompt"])["prompt"].to_pylist()
    embeddings = np.load(embed_table(tsv_path), mmap_mode="r")
    return join_prompts(prompts, embeddings, count, num_clusters=num_clusters, seed=seed)


def main(argv: Sequence[str] | None = None) -> int:
    """`kutils templates`."""
    parser = argparse.ArgumentParser(
        prog="kutils templates",
        description="Make prompts from a grammar, or by joining two prompts of different topics.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    unset = {"default": argparse.SUPPRESS}
    parser.add_argument("--count", type=positive, required=True, **unset, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--output", type=Path, required=True, metavar="PROMPTS.tsv", **unset, help="to write")
    parser.add_argument("--name", **unset, help="for the column `source` (default: templates, or joined)")
    parser.add_argument("--join", type=Path, metavar="PROMPTS.tsv", **unset, help="join prompts of this file instead")
    parser.add_argument("--clusters", type=int, **unset, help="topics among the prompts to join (default: 100)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output with other content")
    args = parser.parse_args(argv)
    given = vars(args)
    if "clusters" in given and "join" not in given:
        parser.error("--clusters is of --join; leave it out, or give both")
    if "join" in given:
        if args.join.resolve() == args.output.resolve():
            raise ValueError(f"{args.output} is both read and written; choose another output")
        prompts = join_table(args.join, args.count, num_clusters=given.get("clusters", 100), seed=args.seed)
    else:
        prompts = compose_prompts(args.count, args.seed)
    source = given.get("name", "joined" if "join" in given else "templates")
    write_prompts(args.output, prompts, [source] * len(prompts), overwrite=args.overwrite)
    return 0
