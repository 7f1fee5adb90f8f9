"""Notebooks: built from their scripts, thin, and they run: from any folder, with figures, and failing loudly."""

import ast
import json
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import jupytext
import numpy as np
import papermill
import pytest
from fixtures import tiny_diffusion
from fixtures.datasets import make_dataset
from fixtures.notebooks import assert_readable, execute, figures, printed
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from kutils.runs import launch
from kutils.system.paths import repository_root
from kutils.system.tables import read_table, write_table

ROOT = repository_root()
NOTEBOOKS = ROOT / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))
TOOLS = Path(sys.executable).parent
FAST = (
    "datasets=toy epochs=1 warmup_epochs=0 freeze_epochs=0 input_size=32 backbone=test_convnext num_workers=0 "
    "global_batch_size=16 max_local_batch_size=16 device=cpu"
)

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def cells(path: Path) -> list[tuple[str, str, list[str]]]:
    """(type, source, tags) of every cell of a notebook or of its script."""
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in jupytext.read(path).cells]


def code_cells(path: Path) -> list[str]:
    return [source for kind, source, _ in cells(path) if kind == "code"]


def parameters(path: Path) -> list[ast.stmt]:
    (source,) = [source for _, source, tags in cells(path) if "parameters" in tags]
    return ast.parse(source).body


# ---------------------------------------------------------------- what is in them


def test_every_script_has_its_notebook_and_every_notebook_its_script():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {script.stem for script in SCRIPTS}
    assert {"prepare_data", "train", "refine", "ensemble", "submission"} <= {script.stem for script in SCRIPTS}


@each_script
def test_notebook_is_built_from_its_script(script):
    assert cells(script) == cells(script.with_suffix(".ipynb")), "run `make notebooks`"


@each_script
def test_notebook_is_free_of_outputs_and_names_its_kernel(script):
    notebook = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert set(cell["metadata"]) <= {"tags"}


@pytest.mark.slow
def test_building_again_changes_no_byte(tmp_path):
    for path in [*NOTEBOOKS.glob("*.py"), *NOTEBOOKS.glob("*.ipynb"), NOTEBOOKS / "jupytext.toml"]:
        shutil.copy(path, tmp_path)
    executed = tmp_path / "train.ipynb"  # as Jupyter saves it after a run
    notebook = json.loads(executed.read_text())
    notebook["metadata"]["language_info"] = {"name": "python", "version": "3.11.7"}
    notebook["cells"][1] |= {"execution_count": 1, "metadata": {"tags": ["parameters"], "scrolled": True}}
    notebook["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["1"]}]
    executed.write_text(json.dumps(notebook))
    rule = (ROOT / "Makefile").read_text().split("build_notebooks = ")[1].split("\n\n")[0].replace("\\\n", "")
    command = rule.replace("$(bin)", str(TOOLS)).replace("$(1)", str(tmp_path))
    subprocess.run(["bash", "-c", command], check=True, capture_output=True)
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), "run `make notebooks`"


@each_script
def test_header_says_what_it_does_needs_and_takes(script):
    kind, source, _ = cells(script)[0]
    assert kind == "markdown" and source.startswith("# ")
    for field in ("**What it does.**", "**What it needs.**", "**How long it takes.**"):
        assert source.count(field) == 1
    assert f"papermill notebooks/{script.stem}.ipynb working/runs/" in source


@each_script
def test_parameters_are_typed_literals_with_help(script):
    kind, source, tags = cells(script)[1]
    assert kind == "code" and tags == ["parameters"]
    for line, statement in zip(source.splitlines(), parameters(script), strict=True):
        assert isinstance(statement, ast.AnnAssign) and len(line.partition("  # ")[2]) > 5, line
        assert type(ast.literal_eval(statement.value)).__name__ == statement.annotation.id, line
    listed = papermill.inspect_notebook(str(script.with_suffix(".ipynb")))  # `papermill --help-notebook` shows these
    assert list(listed) == [statement.target.id for statement in parameters(script)], "a help text holds a `=`"


def test_the_setup_cell_is_the_same_everywhere():
    assert len({code_cells(script)[1] for script in SCRIPTS}) == 1
    assert code_cells(SCRIPTS[0])[1].endswith(
        "launch.check_parameters(In)  # noqa: F821 (IPython's list of executed cells)"
    )


@each_script
def test_notebook_is_thin(script):
    sources = code_cells(script)
    assert len(sources) <= 14
    for source in sources:
        assert len(source.splitlines()) <= 15, source
        tree = ast.parse(source)  # so there is no magic and no `!` either
        forbidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not any(isinstance(node, forbidden) for node in ast.walk(tree)), source


@each_script
def test_every_section_asks_and_says_something(script):
    sections = [source for kind, source, _ in cells(script)[1:] if kind == "markdown"]
    for source in sections:
        title, _, text = source.partition("\n")
        assert title.startswith("## ") and text.strip(), source
    assert any(section.split("\n")[0].endswith("?") for section in sections)


@each_script
def test_a_cell_shows_no_value_that_says_nothing(script):
    """A figure would be shown twice, and a command's True below its output."""
    for source in code_cells(script):
        last = ast.parse(source).body[-1]
        text = ast.unparse(last)
        if isinstance(last, ast.Expr) and (text.partition(".")[0].endswith("plots") or "run_module(" in text):
            assert source.endswith(";"), source


# ---------------------------------------------------------------- what they do


@pytest.fixture
def bare_kernel(tmp_path, monkeypatch):
    """A Python without kutils, as where nobody has run pip: a kernel named `bare`, and a way to run a piece of code."""
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    environment = {"PYTHONPATH": ":".join(libraries)}  # folders of PYTHONPATH are searched, their .pth files not read
    folder = tmp_path / "share" / "jupyter" / "kernels" / "bare"
    folder.mkdir(parents=True)
    command = [sys.executable, "-S", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "bare", "language": "python", "env": environment}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))

    def run(code: str, cwd: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-S", "-c", code]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)

    return run


def test_the_setup_cell_finds_kutils_in_a_clone_and_on_kaggle(tmp_path, bare_kernel):
    kaggle = tmp_path / "kaggle" / "input" / "datasets" / "owner" / "code"
    shutil.copytree(ROOT / "kutils", kaggle / "kutils", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "working").mkdir()
    setup = code_cells(NOTEBOOKS / "train.py")[1].replace("/kaggle/input", str(tmp_path / "kaggle" / "input"))
    code = f"In = ['']\n{setup}\nimport kutils\nprint(kutils.__path__[0])"
    for folder, found in ((ROOT, ROOT), (NOTEBOOKS, ROOT), (tmp_path / "working", kaggle)):
        done = bare_kernel(code, folder)
        assert done.stdout.strip() == str(found / "kutils"), done.stderr
    nowhere = bare_kernel(code.replace(str(tmp_path / "kaggle"), "/nowhere"), tmp_path / "working")
    assert "No module named 'kutils'" in nowhere.stderr
    other = shutil.copytree(kaggle, tmp_path / "clone")  # another one than is installed, here as PYTHONPATH
    (other / "notebooks").mkdir()
    installed = f"import sys\nsys.path.append({str(ROOT)!r})\n{code}"
    for folder in (other, other / "notebooks"):
        assert bare_kernel(installed, folder).stdout.strip() == str(other / "kutils")
    assert bare_kernel(installed, tmp_path / "working").stdout.strip() == str(ROOT / "kutils")
    (other / "notebooks" / "script.py").write_text(installed)
    done = bare_kernel(f"import runpy; runpy.run_path({str(other / 'notebooks' / 'script.py')!r})", tmp_path)
    assert done.stdout.strip() == str(other / "kutils"), done.stderr


@each_script
def test_an_unknown_parameter_is_refused_and_the_nearest_is_named(script):
    """By the setup cell's call: the setup cell is the same everywhere."""
    name = parameters(script)[0].target.id
    cells_so_far = ["", code_cells(script)[0], f"# Parameters\n{name}s = 1\n"]
    with pytest.raises(ValueError, match=f"no parameter '{name}s'; did you mean '{name}'"):
        launch.check_parameters(cells_so_far)


def test_an_unknown_parameter_stops_a_notebook_at_once(workspace):
    with pytest.raises(PapermillExecutionError, match="no parameter 'models'; did you mean 'model'"):
        execute("train", workspace / "out.ipynb", models="x")
    assert [path.name for path in (workspace / "working").iterdir()] == []


@pytest.mark.slow
def test_train_runs_and_shows_what_a_reader_wants(workspace, bare_kernel):
    executed = execute("train", workspace / "out.ipynb", model="tiny_convnext", fold=0, overrides=FAST)
    assert_readable(figures(executed), 4)  # curves, training images, histogram, best and worst
    assert "tiny_convnext_stage1 fold 0: cosine 0." in printed(executed)
    run = workspace / "working" / "runs" / "tiny_convnext_stage1_fold0"
    assert (run / "result.json").is_file() and list((run / "logs").rglob("stdout.log"))

    # again, the short form: from notebooks/, without an output path, and where kutils is not installed
    command = [TOOLS / "papermill", "train.ipynb", "-k", "bare", "-p", "model", "tiny_convnext", "-p", "fold", "0"]
    command += ["-r", "overrides", FAST]
    done = subprocess.run(command, cwd=NOTEBOOKS, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads(done.stdout)["cells"]
    assert "already finished" in printed(again)
    assert_readable(figures(again), 4)


@pytest.mark.slow
def test_a_training_that_fails_fails_the_notebook(workspace):
    (workspace / "input" / "toy_images" / "0000_0.png").write_bytes(b"no image")  # of fold 0
    with pytest.raises(PapermillExecutionError, match="1 of 8 validation images cannot be read"):
        execute("train", workspace / "out.ipynb", model="tiny_convnext", fold=0, overrides=FAST)
    assert not list((workspace / "working").rglob("result.json"))
    assert not list((workspace / "working").rglob("*.pth"))


def test_missing_data_sets_of_a_large_recipe_are_named_in_seconds(workspace):
    began = time.monotonic()
    with pytest.raises(PapermillExecutionError) as failure:
        execute("train", workspace / "out.ipynb", model="convnext_large", fold=0)
    assert time.monotonic() - began < 300
    for said in ("cc3m.tsv", "lexica.tsv", "diffusiondb.tsv", "kutils generate", "datasets="):
        assert said in str(failure.value)


@pytest.mark.slow
def test_prepare_prompts_collects_cleans_chooses_and_folds(workspace):
    """Two lists, one after the other: the second leaves out what the first kept, and joins its folds."""
    inputs = workspace / "input"
    things = [
        f"a {color} {thing}" for color in ("red", "blue") for thing in ("boat", "horse", "castle", "robot", "tree")
    ]
    first = [f"{thing} on a beach at sunset" for thing in things]
    (inputs / "one.txt").write_text(
        "\n".join([*first, first[0].upper(), f"{first[1]}!", "cat", "un gato con una flor"])
    )
    (inputs / "two.csv").write_text(
        "id,caption\n" + "".join(f'1,"{thing}, oil painting"\n' for thing in (*first, *things))
    )
    values = {"num_folds": 2, "duplicates": 0.97, "embedding_dtype": "float32"}
    executed = execute("prepare_prompts", inputs / "one.ipynb", sources=str(inputs / "one.txt"), name="one", **values)
    assert_readable(figures(executed), 4)  # what was dropped, folds, lengths, similarities
    said = printed(executed)
    assert "14 read, 10 kept" in said and "another language" in said and "10 prompts kept in" in said
    assert "kutils generate" in said and "one.prompts.tsv --backend diffusers" in said
    kept = read_table(inputs / "one.prompts.tsv", ["prompt", "source", "fold"])
    assert kept["prompt"].to_pylist() == first and sorted(kept["fold"].to_pylist()) == [0] * 5 + [1] * 5
    before = (inputs / "one.prompts.tsv").read_bytes()

    values |= {"name": "two", "against": str(inputs / "one.prompts.tsv"), "threshold": 0.8}
    said = printed(execute("prepare_prompts", inputs / "two.ipynb", sources=str(inputs / "two.csv"), **values))
    assert (inputs / "one.prompts.tsv").read_bytes() == before
    counts = [read_table(inputs / f"{name}.tsv", ["prompt"]).num_rows for name in ("two.prompts", "two_part2.prompts")]
    assert sum(counts) == 20 and f"{counts[0]:,} prompts kept in" in said
    assert set(read_table(inputs / "two.prompts.tsv", ["fold"])["fold"].to_pylist()) == {0, 1}


@pytest.mark.slow
def test_generate_images_makes_a_data_set_and_looks_at_it(workspace, tmp_path):
    executed = execute("generate_images", workspace / "out.ipynb", num_prompts=10, images_per_prompt=2, size=64)
    assert_readable(figures(executed), 3)  # of different prompts, of the same prompt, brightness and contrast
    said = printed(executed)
    assert "10 prompts, 20 images, 20 of them missing" in said and "0 images failed" in said
    assert "20 images of 10 prompts, 20 of them new" in said and "-p dataset drawn" in said
    table = read_table(workspace / "input" / "drawn.tsv", ["image", "prompt", "fold", "source"])
    assert table.num_rows == 20 and table["source"][0].as_py() == "shapes"

    # by a diffusion model, of a prompts file
    write_table(tmp_path / "prompts.tsv", {"prompt": ['a "red" cat', "two dogs"]})
    values = {"model": str(tiny_diffusion.save(tmp_path / "tiny")), "steps": 2, "size": 64, "num_processes": 2}
    values |= {"prompts_path": str(tmp_path / "prompts.tsv"), "options": "--save-size 48 --batch-size 2"}
    values |= {"backend": "diffusers", "output": "sampled"}
    executed = execute("generate_images", workspace / "out.ipynb", **values)
    assert_readable(figures(executed), 3)
    assert "6 images of 2 prompts, 6 of them new" in printed(executed)
    folder = workspace / "input" / "sampled_images" / "00000"
    assert {Image.open(path).size for path in folder.iterdir()} == {(48, 48)} and len(list(folder.iterdir())) == 6
    assert list((workspace / "working" / "runs" / "generate_sampled" / "logs").rglob("stdout.log"))

    # stopped before the first image
    executed = execute(
        "generate_images", workspace / "out.ipynb", **values | {"output": "none", "hours": 1e-5, "num_processes": 1}
    )
    assert not figures(executed)
    assert "6 of 6 are missing" in printed(executed) and "no image is there yet" in printed(executed)


@pytest.mark.slow
def test_prepare_data_embeds_folds_and_shows(workspace):
    make_dataset(workspace / "input", "mine", num_prompts=30)
    (workspace / "input" / "mine.npy").unlink()
    path = workspace / "input" / "mine.tsv"
    table = read_table(path, ["image", "prompt"])
    prompts = [
        prompt.replace("mine", "a cost of $5, $\\frac{1}{2}$ or 100 %") for prompt in table["prompt"].to_pylist()
    ]
    write_table(path, {"image": table["image"], "prompt": prompts, "fold": [-1] * 60})
    executed = execute("prepare_data", workspace / "out.ipynb", dataset="mine", num_folds=5, cwd=NOTEBOOKS)
    assert_readable(figures(executed), 5)  # images and their sizes, lengths, similarities, folds
    assert "60 looked at, 60 decode" in printed(executed) and "0 bad rows, 0 problems" in printed(executed)
    assert "datasets=mine" in printed(executed)
    assert set(read_table(path, ["fold"])["fold"].to_numpy()) == set(range(5))
    assert np.load(path.with_suffix(".npy")).shape == (60, 384)
