"""What is printed: escaped, cut, in any encoding, and to a stdout that takes nothing."""

import os
import subprocess
from pathlib import Path

import pytest
from fixtures.datasets import make_dataset
from fixtures.forked_python import REAL_PYTHON

from kutils.system import output

ROOT = Path(__file__).parents[2]
EVIL = "\x1b]0;title\x07\x1b[31mred\x9b\u202etxt\u2028\r\ndone\ttab \u96ea \udcff"


def test_what_a_terminal_would_obey_is_escaped_and_all_else_stays():
    escaped = output.escape_controls(EVIL)
    assert escaped == ("\\x1b]0;title\\x07\\x1b[31mred\\x9b\\u202etxt\\u2028\\r\ndone\ttab \u96ea \\udcff")
    assert output.escape_controls("a caf\u00e9, \u96ea\n\tand \U0001f468\u200d\U0001f469 x") == (
        "a caf\u00e9, \u96ea\n\tand \U0001f468\u200d\U0001f469 x"
    )
    assert output.quoted("it's \x1b\n") == '"it\'s \\x1b\\n"'
    assert output.quoted("x" * 100_000) == f"'{'x' * 300}...'"
    long = output.shorten_lines("first\n" + "a" * 5000 + "; do this")
    assert long == "first\n" + "a" * 1000 + " ... " + "a" * 991 + "; do this"


@pytest.mark.parametrize(
    ("value", "cell"), [("=1+1", "'=1+1"), ("@x", "'@x"), ("-a", "'-a"), ("+a", "'+a"), (-1.5, -1.5)]
)
def test_a_cell_of_a_csv_for_people_is_no_formula(value, cell):
    assert output.as_cell(value) == cell
    assert output.as_cell("a = b") == "a = b"


PRINT = f"""
import sys
from kutils.system import output
output.make_safe()
print({EVIL!r})
print({EVIL!r} * 9999, flush=True)
print("\\r50%\\x1b[A\\x1b[2J", file=sys.stderr)
open("done", "w").close()
print(repr(output.lost_error()), file=sys.stderr)
"""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1", "utf-16"])
def test_any_encoding_takes_all_and_bars_may_move(tmp_path, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = [REAL_PYTHON, "-c", PRINT]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=True)
    line = done.stdout.decode(encoding).split("\n")[1]
    snow = "\u96ea" if encoding.startswith("utf") else "\\u96ea"
    assert line == f"done\ttab {snow} \\udcff"
    assert done.stderr.decode(encoding) == "\r50%\x1b[A\\x1b[2J\nNone\n"


@pytest.mark.parametrize(("target", "lost"), [("/dev/full", "No space left"), ("a closed pipe", "None")])
def test_a_stdout_that_takes_nothing_stops_no_work(tmp_path, target, lost):
    reading, writing = os.pipe()
    os.close(reading)
    if target == "/dev/full":
        os.close(writing)
        writing = os.open(target, os.O_WRONLY)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [REAL_PYTHON, "-c", PRINT]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path, env=environment)
    os.close(writing)
    assert (tmp_path / "done").is_file() and done.returncode == 0
    assert lost in done.stderr.decode().splitlines()[-1]


def test_a_command_has_written_its_results_whatever_becomes_of_its_output(tmp_path):
    (tmp_path / "input").mkdir()
    make_dataset(tmp_path / "input", num_prompts=4, images_per_prompt=1)
    environment = os.environ | {"KUTILS_INPUT": str(tmp_path / "input"), "PYTHONPATH": str(ROOT)}
    command = [REAL_PYTHON, "-m", "kutils", "check", str(tmp_path / "input" / "toy.tsv"), "--workers", "1"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "input" / "toy.check.json").is_file()
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        "error: what was printed is lost ([Errno 28] No space left on device); what was written is whole"
    )
