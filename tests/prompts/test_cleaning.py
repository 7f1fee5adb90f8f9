"""What cleaning changes and drops, case by case; and what must hold for any text."""

import json
import time
import unicodedata

import fixtures
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kutils.prompts.cleaning import (
    Cleaner,
    CleaningSettings,
    SourceEntry,
    count_words,
    foreign_language,
    format_cleaning,
    latin_share,
    load_token_counter,
    prompt_key,
)
from kutils.prompts.syntax import tidy

COMPETITION = json.loads((fixtures.DATA / "competition_embeddings.json").read_text())


def clean(*prompts, settings=None, **options):
    cleaner = Cleaner(settings, **options)
    cleaner.add([SourceEntry(number, prompt) for number, prompt in enumerate(prompts, start=1)], "file", "source")
    return cleaner


def reasons(cleaner):
    return {reason: case["count"] for reason, case in cleaner.report()["dropped"].items()}


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        ("  a\tcat \u00a0 on\r\na mat ", "a cat on a mat", ["white space"]),
        ("a\x00cat\x1b and\x7fdog", "a cat and dog", ["control characters"]),
        ("zero\u200bwidth, \ufeffmark, soft\u00adhyphen", "zerowidth, mark, softhyphen", ["invisible characters"]),
        ("cafe\u0301", "caf\u00e9", ["unicode normal form"]),
        ("a lone \ud800surrogate", "a lone surrogate", ["invisible characters"]),
        ("AT&amp;T &quot;sign&quot; &#233;", 'AT&T "sign" \u00e9', ["HTML"]),
        ("&amp;lt;b&amp;gt;bold&amp;lt;/b&amp;gt;", "bold", ["HTML"]),
        ("a cat<br/>and <i>a dog</i>", "a cat and a dog", ["HTML"]),
        ("https://i.x.com/a.png?b=1 a cat in a hat", "a cat in a hat", ["URLs"]),
        ("a (red:1.2) cat", "a red cat", ["attention weights"]),
        ("a (red:2), ((fluffy)) cat", "a red, fluffy cat", ["attention weights"]),
        ("a [very [old]] house", "a very old house", ["attention weights"]),
        ("(((masterpiece))), [blurry], {{sharp}} photo", "masterpiece, blurry, sharp photo", ["attention weights"]),
        ("((a (very:1.1) old house:1.3))", "a very old house", ["attention weights"]),
        ("a [cat|dog] in [spring:winter:0.5]", "a cat, dog in spring, winter", ["attention weights"]),
        ("a cat <lora:add_detail:0.8>, fluffy", "a cat, fluffy", ["attention weights"]),
        ("Lovecraft:: ocean::2 night::-0.5", "Lovecraft, ocean, night", ["attention weights"]),
        ("a castle --ar 16:9 --v 4", "a castle", ["generator parameters"]),
        ("a castle --no trees, people --s 750 --style raw", "a castle", ["generator parameters"]),
        ("a castle \u2014ar 2:3 \u2014c 30 \u2014v 4", "a castle", ["generator parameters"]),
        ("a castle, --v 4--q 2", "a castle", ["generator parameters"]),
        ("a castle -W 1024 -n 9 -i", "a castle", ["generator parameters"]),
        ("a_castle_on_a_hill_-W_1024", "a castle on a hill", ["underscores", "generator parameters"]),
        ("a cat, Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1", "a cat", ["generator parameters"]),
        ("a cat Clip skip: 2, Model: x", "a cat", ["generator parameters"]),
        ("a cat Negative prompt: blurry, bad Steps: 20, Sampler: DDIM", "a cat", ["negative prompt"]),
        ("the devil\\'s \\(old\\) staff", "the devil's (old) staff", ["backslashes"]),
    ],
)
def test_what_is_no_word_is_taken_away(before, after, kinds):
    assert tidy(before) == (after, kinds)


@pytest.mark.parametrize(
    "caption",
    [
        "A cat (Felis catus) on a mat",
        "still from the movie Succession (1972), in colour",
        "a clock (at 12:30) and a verse (John 3:16)",
        "the film (a remake of Psycho (1960)) on a screen",
        "(masterpiece), a portrait of an old man (about 80)",
        "life shows no trend -- only a change",
        "a woman \u2014 her arms wide \u2014 in the rain",
        "a state-of-the-art x-ray, f/1.4, 35 mm, 16:9",
        "AT&T and fish & chips, &nothing else",
        "a robot like r2-d2, mdjrny-v4 style, by @some_one",
        "a t-shirt with <3 and 2 < 3 > 1",
        "three steps: one, two, three",
        "family \U0001f468\u200d\U0001f469\u200d\U0001f467 at the beach",
        "a sign that says \"Donuts. It's what's for dinner!\"",
        "the website www.example.com on a laptop",
        "covid - 19, 6 0 s style, 8 k",
        *(entry["prompt"] for entry in COMPETITION["prompts"]),
    ],
)
def test_ordinary_captions_stay_and_are_kept(caption):
    assert tidy(caption) == (caption, [])
    assert clean(caption).prompts == [caption]


PIECES = r"""
( ) [ ] { } (( )) :1.2 :2 : :: | \ \( \) , . -- --ar --no --v 16:9 4 - -n -i _ a_b_c & &amp; &amp;lt; &lt; &#9; &#xd800;
< > <b> <lora:x:1> https://x.y Steps: 20 Sampler: Seed: Negative prompt: e cat a
"""
PIECES = PIECES.split()
PIECES += ["\u2014v", "\u0301", "\ud800", "\u200b", "\t", "\n", "\x00", "\x85", "\u2028", "\ufeff", " "]
SYNTAX = st.lists(st.sampled_from(PIECES), max_size=12)
WITHOUT_CHANCE = settings.get_profile("ci")  # the same texts each time, and no limit of 200 ms for one
ANY_TEXT = st.one_of(
    st.text(st.characters(), max_size=60),
    SYNTAX.map("".join),
    SYNTAX.map(" ".join),
)


@WITHOUT_CHANCE
@given(ANY_TEXT)
@example("\\(\\(a\\)\\)")
@example("&amp;" * 5 + "#9;")
@example("[a|b:0.5]]")
def test_tidied_text_is_one_clean_line_and_stays_as_it_is(text):
    once, _ = tidy(text)
    assert tidy(once) == (once, [])
    assert once == " ".join(once.split())
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in once)
    assert unicodedata.is_normalized("NFC", once)
    once.encode()


@WITHOUT_CHANCE
@given(st.lists(ANY_TEXT, max_size=20))
def test_what_is_kept_and_dropped_is_what_was_read(texts):
    cleaner = clean(*texts)
    assert cleaner.num_read == len(texts) == len(cleaner.prompts) + sum(reasons(cleaner).values())
    assert clean(*cleaner.prompts).prompts == cleaner.prompts  # cleaned again, nothing changes
    json.dumps(cleaner.report(), ensure_ascii=False).encode()
    format_cleaning(cleaner.report()).encode()


@pytest.mark.parametrize(
    "piece", ["(", "[", "[a", "a ", "--no ", ", ", ":", " ", "_a", " -n 1", "\\", "<b ", "seed: a, ", "&amp;"]
)
def test_long_odd_texts_take_no_time(piece):
    text = piece * (9_000 // len(piece))
    began = time.process_time()
    for odd in (text + "x:1.2)", "<" + text, text + text.replace("[", "]")):
        tidy(odd[:10_000])
    assert time.process_time() - began < 5  # 0.2 s measured for the worst
    assert reasons(clean("a cat " * 2000)) == {"too many characters": 1}


def test_limits_in_words():
    settings = CleaningSettings(min_words=2, max_words=4)
    cleaner = clean("cat", "a cat", "a cat , - . on mats", "one two three four five", settings=settings)
    assert cleaner.prompts == ["a cat", "a cat , - . on mats"]
    assert reasons(cleaner) == {"too few words": 1, "too many words": 1}
    assert count_words("r2-d2 & 'c3po' -- 8k!") == 3
    with pytest.raises(ValueError, match="min_words=5, max_words=4"):
        CleaningSettings(min_words=5, max_words=4)
    with pytest.raises(ValueError, match=r"min_latin=2"):
        CleaningSettings(min_latin=2)


def test_other_scripts_by_the_share_of_latin_letters():
    half = "abcd \u0430\u0431\u0432\u0433 and"
    assert latin_share("abcd \u0430\u0431\u0432\u0433 12!") == 0.5
    assert latin_share("\u00fc\u00f1\u0142") == 1 and latin_share("12") == 0
    cleaner = clean(half, "1 2 3 4", "a poster with the word \u96ea", "\u96ea \u306e \u732b")
    assert cleaner.prompts == ["a poster with the word \u96ea"]
    assert reasons(cleaner) == {"another script": 2, "no letters": 1}
    assert len(clean(half, settings=CleaningSettings(min_latin=0.5)).prompts) == 1


@pytest.mark.parametrize(
    ("prompt", "language"),
    [
        ("un gato en la playa con una mujer", "Spanish"),
        ("un chat noir dans le jardin avec des fleurs", "French"),
        ("eine Katze auf dem Tisch und ein Hund", "German"),
        ("een kat op het dak", "Dutch"),
        ("uma mulher com um chap\u00e9u", "Portuguese"),
        ("una donna con un cappello nella citt\u00e0", "Italian"),
        ("g\u00fcne\u015f bat\u0131m\u0131nda k\u00fc\u00e7\u00fck k\u00f6y", "accents"),
        ("portrait of Leonardo de la Vega by Vincent van Gogh", None),
        ("el ni\u00f1o, painting by Diego Velazquez", None),
        ("by Zdzis\u0142aw Beksi\u0144ski and Fran\u00e7ois Schuiten", None),
        ("die hard movie poster", None),
        ("dan met van gogh, pour sin on op art till dawn, under per se", None),
        ("a sign that says una cerveza por favor, on a wall of the bar", None),
        ("red car, blue sky, 8k", None),
    ],
)
def test_language(prompt, language):
    assert foreign_language(prompt) == language
    assert reasons(clean(prompt)) == ({"another language": 1} if language else {})
    assert len(clean(prompt, settings=CleaningSettings(english=False)).prompts) == 1


def test_duplicates_by_case_white_space_and_end():
    cleaner = clean(
        "A cat, 8 k", "a  CAT , 8k.", "a cat 8k", "Stra\u00dfe am Meer", "STRASSE AM MEER!!", "a cat, 8k \u201d"
    )
    assert cleaner.prompts == ["A cat, 8 k", "a cat 8k", "Stra\u00dfe am Meer"]
    assert reasons(cleaner) == {"duplicate": 3}
    assert prompt_key("???") != prompt_key("!!!")


def test_the_first_source_wins_and_an_excluded_prompt_is_said_to_be_so():
    cleaner = Cleaner(excluded=["a green dog runs"])
    cleaner.add([SourceEntry(1, "a red dog runs"), SourceEntry(2, "A green dog runs.")], "a.txt", "a")
    cleaner.add([SourceEntry(1, "A RED DOG RUNS"), SourceEntry(2, "a blue dog runs")], "b.txt", "b")
    assert list(zip(cleaner.prompts, cleaner.sources, strict=True)) == [
        ("a red dog runs", "a"),
        ("a blue dog runs", "b"),
    ]
    dropped = cleaner.report()["dropped"]
    assert dropped["in an excluded file"]["examples"] == [{"place": "a.txt:2", "prompt": "A green dog runs."}]
    assert dropped["duplicate"]["examples"] == [{"place": "b.txt:1", "prompt": "A RED DOG RUNS"}]


def test_a_prompt_that_was_dropped_makes_no_later_one_a_duplicate():
    counts = {"a b c": 78, "A B C": 77}
    cleaner = clean("a b c", "A B C", count_tokens=lambda prompts: [counts[prompt] for prompt in prompts])
    assert cleaner.prompts == ["A B C"] and reasons(cleaner) == {"too many tokens": 1}


def test_three_examples_per_reason_and_damaged_text():
    cleaner = clean(*(f"{number}" for number in range(5)), "a caf\ufffd at night", "x" * 400)
    dropped = cleaner.report()["dropped"]
    assert dropped["too few words"]["count"] == 6
    assert [case["prompt"] for case in dropped["too few words"]["examples"]] == ["0", "1", "2"]
    assert dropped["damaged characters"]["count"] == 1
    text = format_cleaning(cleaner.report())
    assert "7 read, 0 kept" in text and "file:6  'a caf\ufffd at night'" in text


@pytest.fixture
def clip_tokenizer(tmp_path):
    """A folder with a tokenizer of CLIP's kind whose words are single letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77)
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


def test_the_limit_of_77_tokens(clip_tokenizer):
    count_tokens = load_token_counter(clip_tokenizer)
    assert count_tokens(["a b c", "abc"]) == [5, 5]  # with the two special ones
    fits, too_long = "ab " * 37 + "a", "ab " * 38
    assert count_tokens([fits, too_long]) == [77, 78]
    cleaner = clean(fits, too_long, count_tokens=count_tokens)
    assert cleaner.prompts == [fits] and reasons(cleaner) == {"too many tokens": 1}
    assert cleaner.report()["settings"]["max_tokens"] == 77


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        load_token_counter(tmp_path / "missing")
    with pytest.raises(ValueError, match="transformers cannot read it"):
        load_token_counter(tmp_path)
