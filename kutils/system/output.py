"""Prints foreign texts safely: escapes control characters, cuts long texts, and continues if stdout is lost."""

import contextlib
import errno
import io
import os
import re
import sys

SHOWN_CHARACTERS = 300  # printed of a prompt or a name
LINE_CHARACTERS = 2000  # printed of a line of an error
# control characters, marks of writing direction, and lone surrogates; not tabs and line breaks
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
BAR_MOVES = re.compile("(\r|\x1b\\[A)")  # cursor movements of a progress bar


def escape_controls(text: str) -> str:
    """Replace control characters by backslash escapes; line breaks and tabs stay."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def cut(text: str) -> str:
    """The first SHOWN_CHARACTERS of a prompt or a name, for a person."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def quoted(text: str) -> str:
    """A prompt or a name in quotes as part of a line: cut, and escaped as Python does it."""
    return repr(cut(text))


def as_cell(value: object) -> object:
    """A value for a CSV that people open: a text that a spreadsheet would run as a formula gets a quote in front.

    Tables that this package reads back hold their texts unchanged.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def shorten_lines(text: str) -> str:
    """An error's message, escaped; lines of more than LINE_CHARACTERS lose their middle."""
    half = LINE_CHARACTERS // 2
    lines = (line if len(line) <= LINE_CHARACTERS else f"{line[:half]} ... {line[-half:]}" for line in text.split("\n"))
    return escape_controls("\n".join(lines))


class SafeStream(io.TextIOWrapper):
    """A text stream that escapes control characters and takes any character in any encoding.

    If its file cannot be written (a closed pipe, a full disk), output is dropped and the program continues.
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
            os.dup2(nowhere, self.fileno())  # the rest of the buffer goes there
            os.close(nowhere)


def make_safe() -> None:
    """Let this process print through SafeStream."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not a notebook's or a test's stream, nor None (closed)
            stream.flush()
            raw = io.FileIO(stream.fileno(), "w", closefd=False)
            file = raw if stream.write_through else io.BufferedWriter(raw)
            buffering = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, SafeStream(file, stream.encoding, "backslashreplace", "\n", **buffering))


def lost_error() -> OSError | None:
    """The error that made stdout drop output; None if there was none, or if the reader closed the pipe."""
    sys.stdout and sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    return None if lost is None or lost.errno == errno.EPIPE else lost
