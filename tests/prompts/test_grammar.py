"""Prompts of the grammar: distinct, reproducible, English; prompts joined across topics."""

import math
import re

import numpy as np
import pytest
from fixtures.datasets import unit_rows

from kutils.prompts import grammar
from kutils.prompts.cleaning import Cleaner, SourceEntry
from kutils.prompts.grammar import article, compose_prompts, join_prompts, plural
from kutils.prompts.grammar_words import PATTERNS, WORDS
from kutils.system.tables import read_table, write_table


@pytest.fixture(scope="module")
def prompts():
    return compose_prompts(20_000, seed=3)


def test_distinct_and_the_same_for_the_same_seed(prompts):
    assert len(set(prompts)) == 20_000
    assert compose_prompts(500, seed=3) == prompts[:500]
    assert len(set(compose_prompts(500, seed=4)) & set(prompts)) < 25
    assert compose_prompts(0) == []
    with pytest.raises(ValueError, match="-1 prompts"):
        compose_prompts(-1)


def test_the_grammar_has_hundreds_of_millions_of_prompts():
    def count(name):
        if name in WORDS:
            return len(WORDS[name].split(","))
        slots = [re.findall(r"\{(\w+)(?::s)?\}", option) for option in PATTERNS[name]]
        return sum(math.prod(map(count, option)) for option in slots)

    assert count("scene") > 1e9 and count("prompt") > count("scene")


def test_every_word_and_pattern_is_used():
    named = {slot for options in PATTERNS.values() for option in options for slot in re.findall(r"\{(\w+)", option)}
    assert named | {"prompt"} == WORDS.keys() | PATTERNS.keys()
    for name, text in WORDS.items():
        words = [" ".join(word.split()) for word in text.split(",")]
        assert len(set(words)) == len(words) and all(words), name


def test_prompts_are_clean_english(prompts):
    cleaner = Cleaner()
    cleaner.add([SourceEntry(number, prompt) for number, prompt in enumerate(prompts)], "generated", "templates")
    report = cleaner.report()
    assert not report["changed"]
    assert set(report["dropped"]) <= {"too few words", "duplicate"} and report["kept"] > 19_000
    for prompt in prompts:
        assert not re.search(r"[{}@]|  | ,|^\W*$", prompt), prompt
        assert not re.search(
            r"\ba (?!one-)[aio]|\ban [^aeiouh8]|\ba (umb|ups|hour|8)|\ban (uni|one-|uk|eu)", prompt.lower()
        ), prompt


def test_articles_and_plurals():
    sounds = {"a": ["unicorn", "ukulele", "one-eyed", "European", "ship"]}
    sounds["an"] = ["hour", "umbrella", "onion", "8", "upside-down", "uninteresting", "astronaut"]
    for expected, words in sounds.items():
        assert {article(word) for word in words} == {expected}
    nouns = [
        "fox",
        "old man",
        "fairy",
        "monkey",
        "octopus",
        "koi fish",
        "wheel of cheese",
        "witch",
        "greek hero",
        "lamp",
    ]
    expected = "foxes|old men|fairies|monkeys|octopuses|koi fish|wheels of cheese|witches|greek heroes|lamps"
    assert [plural(noun) for noun in nouns] == expected.split("|")


def clustered(num_topics=4, per_topic=10):
    """Prompts whose embeddings lie close to their topic's direction; the topic is the first word."""
    centers = unit_rows(num_topics, seed=5)
    topics = np.repeat(np.arange(num_topics), per_topic)
    rows = centers[topics] + 0.01 * unit_rows(len(topics), seed=6)
    prompts = [f"A topic{topic} scene number {number}." for number, topic in enumerate(topics)]
    return prompts, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_two_prompts_of_different_topics_are_joined():
    prompts, embeddings = clustered()
    joined = join_prompts(prompts, embeddings, 200, num_clusters=4, seed=1)
    assert len(set(joined)) == 200
    pairs = set()
    for text in joined:
        first, second = re.findall(r"topic(\d) scene number (\d+)", text)
        assert first[0] != second[0]
        pairs.add(frozenset((first[1], second[1])))
        assert re.fullmatch(r"A topic\d scene number \d+\W.*a topic\d scene number \d+", text)
    assert len(pairs) == 200
    assert join_prompts(prompts, embeddings, 50, num_clusters=4, seed=1) == joined[:50]
    assert join_prompts(prompts, embeddings, 50, num_clusters=4, seed=2) != joined[:50]


def test_prompts_that_differ_in_case_or_punctuation_alone_are_joined_once():
    prompts, embeddings = clustered(2, 3)
    again = [prompt.upper().rstrip(".") for prompt in prompts]
    joined = join_prompts([*prompts, *again], np.concatenate([embeddings, embeddings]), 4, num_clusters=2)
    assert joined == join_prompts(prompts, embeddings, 4, num_clusters=2)
    with pytest.raises(ValueError, match="6 prompts of at most 20 words make 9 pairs"):
        join_prompts([*prompts, *again], np.concatenate([embeddings, embeddings]), 5, num_clusters=2)


def test_joined_prompts_fit_into_the_limit_and_names_keep_their_capital():
    prompts, embeddings = clustered(2, 3)
    prompts[0] = "word " * 21
    prompts[5] = "Paris at night"
    joined = join_prompts(prompts, embeddings, 3, num_clusters=2)  # 2 x 3 pairs are left
    assert not any("word word" in text for text in joined)
    assert grammar.lower_start("Paris at night") == "Paris at night" and grammar.lower_start("The end") == "the end"
    with pytest.raises(ValueError, match=r"5 prompts of at most 20 words make 6 pairs .* not 4"):
        join_prompts(prompts, embeddings, 4, num_clusters=2)
    with pytest.raises(ValueError, match="only 6 prompts for 7 clusters; give --clusters 6 or fewer"):
        join_prompts(prompts, embeddings, 1, num_clusters=7)
    for count, clusters, rows in ((1, 1, 6), (1, 2, 5), (-1, 2, 6)):
        with pytest.raises(ValueError, match="give at least 2 clusters"):
            join_prompts(prompts, embeddings[:rows], count, num_clusters=clusters)


def test_the_commands(tmp_path, capsys):
    output = tmp_path / "made.tsv"
    grammar.main(["--count", "30", "--seed", "7", "--output", str(output)])
    table = read_table(output, ["prompt", "source"])
    assert table["prompt"].to_pylist() == compose_prompts(30, 7)
    assert set(table["source"].to_pylist()) == {"templates"}
    with pytest.raises(ValueError, match="with other content"):
        grammar.main(["--count", "31", "--output", str(output)])
    with pytest.raises(SystemExit):
        grammar.main(["--count", "3", "--clusters", "2", "--output", str(tmp_path / "x.tsv")])
    assert "--clusters is of --join" in capsys.readouterr().err
    arguments = ["--join", str(output), "--clusters", "5", "--count", "20", "--output"]
    grammar.main([*arguments, str(tmp_path / "joined.tsv")])  # embeds the prompts first
    joined = read_table(tmp_path / "joined.tsv", ["prompt"])
    assert joined.num_rows == 20 and set(joined["source"].to_pylist()) == {"joined"}
    assert np.load(output.with_suffix(".npy")).shape == (30, 384)
    with pytest.raises(ValueError, match="both read and written"):
        grammar.main([*arguments, str(output), "--overwrite"])
    write_table(tmp_path / "few.tsv", {"prompt": ["a cat"], "source": ["me"]})
    with pytest.raises(ValueError, match="give at least 2 clusters"):
        grammar.main(["--join", str(tmp_path / "few.tsv"), "--count", "1", "--output", str(tmp_path / "x.tsv")])
