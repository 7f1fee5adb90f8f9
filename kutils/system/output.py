"""Prints texts of others safely: control characters are escaped, long texts cut, and a lost stdout stops no work."""

import contextlib
import errno
import io
import os
import re
import sys

SHOWN_CHARACTERS = 300  # of a prompt or a name that is printed
LINE_CHARACTERS = 2000  # of a line of an error
# what a terminal obeys or turns around, and halves of characters; tabs and line breaks stay
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
BAR_MOVES = re.compile("(\r|\x1b\\[A)")  # of a progress bar


def escape_controls(text: str) -> str:
    """A text with backslash escapes in place of what a terminal would obey; line breaks and tabs stay."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def cut(text: str) -> str:
    """The first SHOWN_CHARACTERS of a prompt or a name, for a person."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def quoted(text: str) -> str:
    """A prompt or a name in quotes as part of a line: cut, and escaped as Python does it."""
    return repr(cut(text))


def as_cell(value: object) -> object:
    """A value of a CSV made for people: a text that a spreadsheet would take for a formula begins with a quote.

    Tables that are read back here hold their texts as they are.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def shorten_lines(text: str) -> str:
    """An error's message, escaped; of a line of more than LINE_CHARACTERS the middle is left out."""
    half = LINE_CHARACTERS // 2
    lines = (line if len(line) <= LINE_CHARACTERS else f"{line[:half]} ... {line[-half:]}" for line in text.split("\n"))
    return escape_controls("\n".join(lines))


class SafeStream(io.TextIOWrapper):
    """A text stream that escapes control characters and takes any character in any encoding.

    Where its file takes no more (a closed pipe, a full disk), what is printed is dropped, and the work goes on.
    """

    lost: OSError | None = None  # why something was dropped

    def write(self, text: str) -> int:
        parts = BAR_MOVES.split(text) if self is sys.stderr else [text]
        safe = "".join(part if number % 2 else escape_controls(part) for number, part in enumerate(parts))
        with self.dropping():
            super().write(safe)
        return len(text)

    def flush(self) -> None:
        with self.dropping():
            super().flush()

    @contextlib.contextmanager
    def dropping(self):
        try:
            yield
        except OSError as error:
            self.lost = self.lost or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # what is still in the buffer goes there, too
            os.close(nowhere)


def make_safe() -> None:
    """Let this process print through SafeStream."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not one of a notebook or a test, and not None: it may be closed
            stream.flush()
            raw = io.FileIO(stream.fileno(), "w", closefd=False)
            file = raw if stream.write_through else io.BufferedWriter(raw)
            buffering = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, SafeStream(file, stream.encoding, "backslashreplace", "\n", **buffering))


def lost_error() -> OSError | None:
    """Why stdout was lost; None if it was not, or if its reader did not want more."""
    sys.stdout and sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    return None if lost is None or lost.errno == errno.EPIPE else lost
