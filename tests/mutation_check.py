"""Are the tests sharp? Puts faults into a copy of the repository, one at a time; the tests named must fail.

`python tests/mutation_check.py [WORD ...]`: every fault of mutations.toml, or those whose fault or file holds a word.
Each entry there names the file, a text that stands in it exactly once, its replacement, and the tests that should catch
it; without `tests`, those of the file's room.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
from fixtures import forked_python
from install_check import ROOT, copy_repository

LIST = Path(__file__).with_name("mutations.toml")
LOADED_ONCE = ("torch", "torchvision.transforms.v2", "timm", "sentence_transformers", "sklearn.cluster", "pandas",
    "pyarrow", "matplotlib.pyplot", "papermill", "hypothesis")  # fmt: skip
TIMEOUT_SECONDS = 600  # of the tests of one fault


def read_mutations(words: list[str]) -> list[dict]:
    """The entries that hold one of the words, or all.

    Raises: ValueError naming every entry that no longer fits its file.
    """
    mutations = tomllib.loads(LIST.read_text(encoding="utf-8"))["mutation"]
    stale = []
    for mutation in mutations:
        count = (ROOT / mutation["file"]).read_text(encoding="utf-8").count(mutation["text"])
        if count != 1:
            stale.append(f"{mutation['fault']}: its text stands {count} times in {mutation['file']}")
        mutation.setdefault("tests", [f"tests/{mutation['file'].split('/')[1]}"])
    if stale:
        raise ValueError("\n".join(stale))
    chosen = [m for m in mutations if any(word in m["fault"] or word in m["file"] for word in words)]
    return chosen if words else mutations


def run_tests(copy: Path, tests: list[str], log: Path, seconds: float = TIMEOUT_SECONDS) -> int:
    """Pytest's exit code for some tests of the copy, in a forked process: the libraries are loaded already."""
    child = os.fork()
    if not child:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.setpgid(0, 0)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path[0] = str(copy)  # it was the folder of this script
        del sys.modules["__main__"].__file__  # or children of tests would import this script
        os._exit(pytest.main(["-x", "-q", "--durations=0", "-p", "no:cacheprovider", *tests]))
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return pytest.ExitCode.TESTS_FAILED  # they would never have passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only faults whose description or file holds one of these")
    try:
        mutations = read_mutations(parser.parse_args().words)
    except ValueError as error:
        print(f"error: these entries of {LIST.name} are stale:\n{error}", file=sys.stderr)
        return 1
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before the libraries are loaded
    sys.dont_write_bytecode = True  # a file that changes twice in a second would be taken for the one before
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    assert os.environ["FORKED_PYTHON"] == forked_python.FOLDER  # one server for all of them
    for name in LOADED_ONCE:
        importlib.import_module(name)
    survivors, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kutils_mutations_") as folder:
        copy, log = Path(folder) / "repository", Path(folder) / "log"
        copy_repository(copy)
        every = sorted({test for mutation in mutations for test in mutation["tests"]})
        if run_tests(copy, every, log, 6 * TIMEOUT_SECONDS):
            print(f"{log.read_text()[:9000]}\nerror: the tests fail without any fault", file=sys.stderr)
            return 1
        print(f"{time.monotonic() - began:6.1f} s  without a fault every test passes", flush=True)
        for mutation in mutations:
            began_one = time.monotonic()
            path = copy / mutation["file"]
            source = path.read_text(encoding="utf-8")
            path.write_text(source.replace(mutation["text"], mutation["replacement"]), encoding="utf-8")
            code = run_tests(copy, mutation["tests"], log)
            path.write_text(source, encoding="utf-8")
            outcome = {0: "SURVIVED", 1: "caught"}.get(code, f"pytest ended with {code}")
            print(f"{time.monotonic() - began_one:6.1f} s  {outcome}: {mutation['fault']}", flush=True)
            if code != 1:
                survivors.append(mutation["fault"])
                print(log.read_text()[-2000:] if code else "", end="")
    print(f"{len(mutations)} faults, {len(mutations) - len(survivors)} caught, {time.monotonic() - began:.0f} s")
    return 1 if survivors or not mutations else 0


if __name__ == "__main__":
    sys.exit(main())
