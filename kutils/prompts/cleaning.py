"""Decides which prompts are kept (length, language, no repetition), and reports what was dropped and changed."""

import functools
import hashlib
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from kutils.prompts.syntax import tidy
from kutils.system.errors import first_line

NUM_EXAMPLES = 3  # in a report, of each reason
EXAMPLE_CHARACTERS = 300
MAX_CHARACTERS = 10_000  # a longer line is no prompt, and the patterns take quadratic time
CLIP_TOKENS = 77  # limit of Stable Diffusion, including two special tokens

# frequent words, without those that are also English (pour, sin, met, under) or parts of names (de, la, van, di, der)
FOREIGN_WORDS = {
    "Spanish": "una con en y para por que su sus como muy pero sobre entre hasta desde estilo mujer hombre",
    "Portuguese": "uma com em um n\u00e3o para por que ao na nos pelo pela sobre entre estilo mulher homem \u00e9",
    "French": "une un dans avec sur et des aux est qui par sans sous femme homme tr\u00e8s \u00e0 au",
    "Italian": "una un uno con che nel nella sul sulla gli sono alla dello donna uomo stile \u00e8",
    "German": "und mit ein eine einem einen einer auf im ist f\u00fcr nicht vor unter \u00fcber das dem frau",
    "Dutch": "een het en voor uit niet onder naast zijn aan vrouw",
    "Swedish and Danish": "och og med ett som p\u00e5 inte ikke kvinna kvinde av",
    "Polish": "na si\u0119 nie jest oraz kobieta przy pod",
    "Indonesian": "yang dengan seorang untuk pada dari sebuah",
    "Turkish": "bir ve ile i\u00e7in gibi \u00e7ok olan",
}
FOREIGN_WORDS = {language: frozenset(words.split()) for language, words in FOREIGN_WORDS.items()}
ENGLISH_WORDS = """
the of and with at by from is are it its this that there his her their who which on to for as into over through near
behind front she he wearing looking standing sitting style painting portrait photo art
"""
ENGLISH_WORDS = frozenset(ENGLISH_WORDS.split())


@dataclass(frozen=True)
class CleaningSettings:
    """Limits of `Cleaner`.

    Raises: ValueError for limits out of range.
    """

    min_words: int = 3  # one or two words hardly describe an image
    max_words: int = 75  # CLIP reads 75 tokens, and a word takes at least one
    min_latin: float = 0.8  # share of Latin letters among all letters; 0: any script
    english: bool = True  # apply `foreign_language`

    def __post_init__(self):
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(
                f"min_words={self.min_words}, max_words={self.max_words}: give 0 <= min_words <= max_words"
            )
        if not 0 <= self.min_latin <= 1:
            raise ValueError(f"min_latin={self.min_latin}: a share is 0 to 1")


class SourceEntry(NamedTuple):
    """One line, row or item of a source."""

    number: int  # line, row or item, from 1
    text: str
    flaw: str = ""  # why the source's reader rejects it; empty if it does not


def prompt_key(prompt: str) -> bytes:
    """A hash of 12 bytes, the same for prompts that differ only in case, white space or punctuation at the end.

    All white space is ignored, since some collections write "8 k , art" for "8k, art".
    """
    folded = "".join(unicodedata.normalize("NFC", prompt).casefold().split())
    letters = folded.rstrip(string.punctuation + "\u2026\u201d\u2019\u3002") or folded
    return hashlib.blake2b(letters.encode(), digest_size=12).digest()


def count_words(prompt: str) -> int:
    """The number of words, separated by white space, that hold a letter or digit."""
    return sum(word.isalnum() or any(map(str.isalnum, word)) for word in prompt.split())


@functools.lru_cache(maxsize=65536)
def is_latin(letter: str) -> bool:
    """Whether a letter belongs to the Latin script."""
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")


def latin_share(prompt: str) -> float:
    """Share of Latin letters among the letters, 0 to 1; 0 without any letter."""
    letters = [character for character in prompt if character.isalpha()]
    return sum(map(is_latin, letters)) / len(letters) if letters else 0.0


def foreign_language(prompt: str) -> str | None:
    """Guess whether a prompt is in another language than English; in doubt it counts as English.

    A prompt counts as foreign if it has at least two different words of one list of FOREIGN_WORDS, and more of them
    than of ENGLISH_WORDS; or if it has no English word, and accents on more than an eighth of its letters. Names do not
    count, and short prompts that consist of nouns pass.

    Returns: the language, or "accents"; None for a prompt that may be English.
    """
    words = {word.strip(string.punctuation) for word in prompt.casefold().split()}
    num_english = len(words & ENGLISH_WORDS)
    language, num_foreign = max(
        ((language, len(words & foreign)) for language, foreign in FOREIGN_WORDS.items()), key=lambda pair: pair[1]
    )
    if num_foreign >= 2 and num_foreign > num_english:
        return language
    if not prompt.isascii() and not num_english:
        letters = [character for character in prompt if character.isalpha()]
        if sum(not letter.isascii() for letter in letters) > len(letters) / 8:
            return "accents"
    return None


def load_token_counter(folder: Path | str) -> Callable[[list[str]], list[int]]:
    """Open a CLIP tokenizer.

    Args:
        folder: of the tokenizer's files, such as `tokenizer/` of a Stable Diffusion download.
    Returns: a function that counts the tokens of each prompt of a list, the two special ones included.
    Raises: ValueError if transformers cannot read the tokenizer, or if its limit is not CLIP's 77 tokens.
    """
    from transformers import AutoTokenizer  # takes seconds to import

    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer {folder}: there is no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # bad files raise errors of several classes
        raise ValueError(f"tokenizer {folder}: transformers cannot read it ({first_line(error)})") from error
    if tokenizer.model_max_length != CLIP_TOKENS:
        raise ValueError(f"tokenizer {folder} takes {tokenizer.model_max_length} tokens; CLIP's takes {CLIP_TOKENS}")

    def count_tokens(prompts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(prompts, truncation=False, verbose=False)["input_ids"]]

    return count_tokens


class Cleaner:
    """Collects clean prompts source by source, and counts what it drops and changes, with examples.

    Args:
        count_tokens: from `load_token_counter`; None: no limit in tokens.
        excluded: prompts to leave out, such as those of an earlier set.

    The results so far are `prompts`, `sources` (of each prompt) and `num_read`, the number of entries.
    """

    def __init__(
        self,
        settings: CleaningSettings | None = None,
        count_tokens: Callable[[list[str]], list[int]] | None = None,
        excluded: Iterable[str] = (),
    ):
        self.settings = settings or CleaningSettings()
        self.count_tokens = count_tokens
        self.excluded = set(map(prompt_key, excluded))
        self.seen: set[bytes] = set()
        self.prompts: list[str] = []
        self.sources: list[str] = []
        self.num_read = 0
        self.changed: dict[str, dict] = {}
        self.dropped: dict[str, dict] = {}

    def add(self, entries: Sequence[SourceEntry], place: str, source: str, limit: int | None = None) -> None:
        """Clean a batch of a source.

        Args:
            entries: in the order of the source; the first of equal prompts is kept.
            place: origin of the entries in examples, such as the name of the file.
            source: value of the prompts' column `source`.
            limit: stop once so many prompts have been kept in all calls; later entries count as not read.
        """
        candidates = []
        for entry in entries:
            text, kinds, flaw = self.examine(entry)
            candidates.append((entry, text, kinds, flaw, prompt_key(text)))
        new = [text for _, text, _, flaw, key in candidates if not flaw and key not in self.seen]
        num_tokens = dict(zip(new, self.count_tokens(new), strict=True)) if self.count_tokens and new else {}
        for entry, text, kinds, flaw, key in candidates:
            if limit is not None and len(self.prompts) >= limit:
                return
            self.num_read += 1
            if not flaw and key in self.excluded:
                flaw = "in an excluded file"
            elif not flaw and key in self.seen:
                flaw = "duplicate"
            elif not flaw and num_tokens.get(text, 0) > CLIP_TOKENS:
                flaw = "too many tokens"
            if flaw:
                count_case(self.dropped, flaw, {"place": f"{place}:{entry.number}", "prompt": excerpt(entry.text)})
                continue
            for kind in kinds:
                count_case(self.changed, kind, {"before": excerpt(entry.text), "after": excerpt(text)})
            self.seen.add(key)
            self.prompts.append(text)
            self.sources.append(source)

    def examine(self, entry: SourceEntry) -> tuple[str, list[str], str]:
        """Tidy an entry: its text, the kinds of change, and the flaw for which it is dropped, or an empty text."""
        too_long = len(entry.text) > MAX_CHARACTERS
        text, kinds = ("", []) if too_long else tidy(entry.text)
        return text, kinds, entry.flaw or ("too many characters" if too_long else self.flaw(text))

    def flaw(self, text: str) -> str:
        """The flaw for which a tidied prompt is dropped, apart from being a duplicate; empty if it has none."""
        if not text:
            return "empty"
        if "\ufffd" in text:
            return "damaged characters"
        num_words = count_words(text)
        if num_words < self.settings.min_words:
            return "too few words"
        if num_words > self.settings.max_words:
            return "too many words"
        if not any(map(str.isalpha, text)):
            return "no letters"
        if not text.isascii() and latin_share(text) < self.settings.min_latin:
            return "another script"
        return "another language" if self.settings.english and foreign_language(text) else ""

    def report(self) -> dict:
        """The report, ready for JSON.

        Returns: counts `read` and `kept`; the `settings`; `dropped`, reason -> count and examples (these counts and
            `kept` add up to `read`); `changed`, kind of change -> count and examples of kept prompts.
        """
        order = {"key": lambda item: (-item[1]["count"], item[0])}
        return {
            "read": self.num_read,
            "kept": len(self.prompts),
            "settings": asdict(self.settings) | {"max_tokens": CLIP_TOKENS if self.count_tokens else None},
            "dropped": dict(sorted(self.dropped.items(), **order)),
            "changed": dict(sorted(self.changed.items(), **order)),
        }


def count_case(counts: dict[str, dict], reason: str, example: dict) -> None:
    """Count a case of a reason, and keep it as an example if it is one of the first."""
    case = counts.setdefault(reason, {"count": 0, "examples": []})
    case["count"] += 1
    if len(case["examples"]) < NUM_EXAMPLES:
        case["examples"].append(example)


def excerpt(text: str) -> str:
    """A text as an example: shortened, and without surrogates, which cannot be written to a file."""
    text = text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "..."
    return text.encode(errors="backslashreplace").decode()


def format_cleaning(report: dict) -> str:
    """The report as lines to print."""
    lines = [f"{report['read']:,} read, {report['kept']:,} kept"]
    for part in ("dropped", "changed"):
        total = f"{report['read'] - report['kept']:,} dropped" if part == "dropped" else "changed (of those kept)"
        lines.append(f"{total}{':' if report[part] else ''}")
        for reason, case in report[part].items():
            lines.append(f"  {case['count']:>9,}  {reason}")
            for example in case["examples"]:
                if part == "dropped":
                    lines.append(f"{'':13}{example['place']}  {example['prompt']!r}")
                else:
                    lines += [f"{'':13}- {example['before']!r}", f"{'':13}+ {example['after']!r}"]
    return "\n".join(lines)
