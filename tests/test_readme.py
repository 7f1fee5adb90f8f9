"""The README names what is there, and nothing else."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README.split("```text\n")[-1].split("```")[0]


def test_tree_has_every_module_and_notebook():
    parts = TREE.split("\nkutils/ ")
    modules = set(re.findall(r"\b(\w+\.py)\b", parts[1].split("\nconf/")[0]))
    assert modules == {path.name for path in (ROOT / "kutils").glob("*.py")} - {"__init__.py"}
    notebooks = set(re.findall(r"^  (\w+) ", parts[0].split("\nnotebooks/ ")[1], re.MULTILINE))
    assert notebooks == {path.stem for path in (ROOT / "notebooks").glob("*.py")}


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:conf|notebooks|input|working)/[\w.-]+\.(?:yaml|py|ipynb|sh)", README)))
)
def test_named_file_exists(path):
    assert (ROOT / path).is_file()


def test_figures_and_make_targets_exist():
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert figures and all((ROOT / figure).is_file() for figure in figures)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert named and named <= targets
