"""Data sets by the built-in renderer: the same in any order of work, complete after a kill, nothing overwritten."""

import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from fixtures.forked_python import REAL_PYTHON
from PIL import Image

from kutils.data import datasets
from kutils.generation import rendering, shapes
from kutils.generation.image_sets import ImageSet, image_seed
from kutils.prompts import folds as prompt_folds
from kutils.system import paths, processes
from kutils.system.paths import is_running
from kutils.system.tables import read_table, write_table

PROMPTS = ["a red apple", 'two "blue" hats, in falling snow', "a cat under a starry night sky"]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def render(prompts, output, images_per_prompt=1, size=32, num_workers=0):
    """Make a data set, in this process unless there are workers."""
    image_set = ImageSet(output, prompts, images_per_prompt, ".jpg")
    with pytest.MonkeyPatch.context() as patch:
        if not num_workers:
            patch.setattr(processes, "run_jobs", lambda function, jobs, *_, **__: [function(*job) for job in jobs])
        return rendering.render_dataset(image_set, size=size, num_workers=num_workers)


def test_data_set_is_in_the_format_of_the_recipes(tmp_path):
    path = render(PROMPTS, tmp_path / "set", images_per_prompt=2)
    table = read_table(path, ["image", "prompt", "fold"])
    assert path == tmp_path / "set.tsv"
    assert table["prompt"].to_pylist() == [prompt for prompt in PROMPTS for _ in range(2)]
    assert table["fold"].to_pylist() == [-1] * 6
    images = [Image.open(tmp_path / name) for name in table["image"].to_pylist()]
    assert {image.size for image in images} == {(32, 32)}
    differences = np.abs(np.asarray(images[0], float) - np.asarray(images[1], float)).mean()
    assert differences > 3  # two images of one prompt are two pictures


def test_image_depends_on_its_prompt_alone(tmp_path):
    render(PROMPTS, tmp_path / "a", num_workers=2)
    render(PROMPTS[::-1], tmp_path / "b")
    first = (tmp_path / "a_images/00000/0000000_0.jpg").read_bytes()
    assert first == (tmp_path / "b_images/00000/0000002_0.jpg").read_bytes()
    assert image_seed("a red apple", 0) != image_seed("a red apple", 1)
    assert 0 <= image_seed("x", 3) < 2**63


def test_what_is_missing_is_made_again_and_the_rest_is_kept(tmp_path, monkeypatch):
    render(PROMPTS, tmp_path / "set", images_per_prompt=2)
    whole = files_of(tmp_path)
    (tmp_path / "set.tsv").unlink()
    (tmp_path / "set_images/00000/0000001_1.jpg").unlink()
    render(PROMPTS, tmp_path / "set", images_per_prompt=2)
    assert files_of(tmp_path) == whole

    table = read_table(tmp_path / "set.tsv", ["image"])
    folds = {name: table[name] for name in table.column_names} | {"fold": [3] * 6}
    write_table(tmp_path / "set.tsv", folds)
    monkeypatch.setattr(rendering, "render_images", None)  # nothing is left to make
    render(PROMPTS, tmp_path / "set", images_per_prompt=2)
    assert read_table(tmp_path / "set.tsv", ["fold"])["fold"].to_pylist() == [3] * 6


def test_another_data_set_of_the_same_name_is_not_touched(tmp_path):
    render(PROMPTS, tmp_path / "set")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"set.tsv was made with size 32 \(now 48\)"):
        render(PROMPTS, tmp_path / "set", size=48)
    with pytest.raises(ValueError, match="prompts_sha256"):
        render(PROMPTS[::-1], tmp_path / "set")
    write_table(tmp_path / "own.tsv", {"image": ["a.png"], "prompt": ["a"], "fold": [0]})
    with pytest.raises(ValueError, match=r"own.tsv was not made by this command"):
        render(PROMPTS, tmp_path / "own")
    (tmp_path / "own.tsv").unlink()
    assert files_of(tmp_path) == before


def test_a_call_that_was_cut_before_its_record_goes_on(tmp_path, monkeypatch):
    def cut(path, content):
        with paths.atomic_path(path):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(paths, "save_record", cut)
        render(PROMPTS, tmp_path / "set")
    assert (tmp_path / "set_images").is_dir()
    (tmp_path / "set_images" / ".generation.1234abcd-1-ab12.partial.json").write_text("{")  # of a kill
    render(PROMPTS, tmp_path / "set")
    (tmp_path / "own_images").mkdir()
    (tmp_path / "own_images" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"own_images was not made by this command"):
        render(PROMPTS, tmp_path / "own")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "none"), (["a cat", "a cat"], "twice"), (["a cat", "nothing known"], "'nothing known' names nothing")],
)
def test_bad_prompts_stop_it_before_anything_is_written(tmp_path, prompts, message):
    with pytest.raises(ValueError, match=message):
        render(prompts, tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_embedded_data_set_is_ready_for_training(workspace):
    path = rendering.make_shapes_dataset("little", num_prompts=60, images_per_prompt=2)
    data = datasets.load_datasets(["little"])
    assert len(data) == 120 and set(data.folds.tolist()) == set(range(10))
    assert prompt_folds.read_fold_report(path)["prompts"] == 60
    before = files_of(workspace / "input")
    rendering.make_shapes_dataset("little", num_prompts=60, images_per_prompt=2)
    assert files_of(workspace / "input") == before
    report_path, own = prompt_folds.fold_report_path(path), np.arange(120) // 2 % 3
    report_path.unlink()
    table = read_table(path, ["image", "prompt"])
    write_table(path, {"image": table["image"], "prompt": table["prompt"], "fold": own})
    rendering.make_shapes_dataset("little", num_prompts=60, images_per_prompt=2)
    assert datasets.load_datasets(["little"]).folds.tolist() == own.tolist()  # folds of someone else stay
    with pytest.raises(ValueError, match="cannot name a data set"):
        rendering.make_shapes_dataset("../little")


def test_a_kill_ends_the_processes_too(tmp_path):
    write_table(tmp_path / "p.tsv", {"prompt": shapes.generate_prompts(2000)})
    command = [REAL_PYTHON, "-m", "kutils", "generate", "p.tsv", "--output", "set", "--workers", "2"]
    parent = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_until(lambda: list(tmp_path.rglob("*.jpg")) and len(workers_of(parent.pid)) == 2)
    workers = workers_of(parent.pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(is_running, workers)))


def workers_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_until(done):
    deadline = time.monotonic() + 300
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
