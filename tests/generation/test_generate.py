"""Images from prompts: the same whatever the order of work, complete after a kill, nothing overwritten."""

import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from fixtures.datasets import unit_rows
from PIL import Image

from kutils.data import datasets
from kutils.generation import generate, shapes
from kutils.generation.image_sets import ImageSet
from kutils.prompts import embedding
from kutils.prompts import folds as prompt_folds
from kutils.system.paths import read_record, write_json
from kutils.system.tables import hash_prompts, read_table, write_table

PROMPTS = ["a red apple", 'two "blue" hats, in falling snow', "a cat under a starry night sky"]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_set_is_in_the_format_of_the_recipes(tmp_path):
    path = generate.generate_images(PROMPTS, tmp_path / "set", images_per_prompt=2, size=32, num_workers=1)
    table = read_table(path, ["image", "prompt", "fold"])
    assert path == tmp_path / "set.tsv"
    assert table["prompt"].to_pylist() == [prompt for prompt in PROMPTS for _ in range(2)]
    assert table["fold"].to_pylist() == [-1] * 6
    images = [Image.open(tmp_path / name) for name in table["image"].to_pylist()]
    assert {image.size for image in images} == {(32, 32)}
    differences = np.abs(np.asarray(images[0], float) - np.asarray(images[1], float)).mean()
    assert differences > 3  # two images of one prompt are two pictures


def test_image_depends_on_its_prompt_alone(tmp_path):
    generate.generate_images(PROMPTS, tmp_path / "a", images_per_prompt=1, size=32, num_workers=2)
    generate.generate_images(PROMPTS[::-1], tmp_path / "b", images_per_prompt=1, size=32, num_workers=1)
    first = (tmp_path / "a_images/00000/0000000_0.jpg").read_bytes()
    assert first == (tmp_path / "b_images/00000/0000002_0.jpg").read_bytes()
    assert generate.image_seed("a red apple", 0) != generate.image_seed("a red apple", 1)
    assert 0 <= generate.image_seed("x", 3) < 2**63


def test_what_is_missing_is_made_again_and_the_rest_is_kept(tmp_path, monkeypatch):
    generate.generate_images(PROMPTS, tmp_path / "set", images_per_prompt=2, size=32, num_workers=1)
    whole = files_of(tmp_path)
    (tmp_path / "set.tsv").unlink()
    (tmp_path / "set_images/00000/0000001_1.jpg").unlink()
    generate.generate_images(PROMPTS, tmp_path / "set", images_per_prompt=2, size=32, num_workers=1)
    assert files_of(tmp_path) == whole

    table = read_table(tmp_path / "set.tsv", ["image"])
    folds = {name: table[name] for name in table.column_names} | {"fold": [3] * 6}
    write_table(tmp_path / "set.tsv", folds)
    monkeypatch.setattr(generate, "render_missing", None)  # nothing is left to make
    generate.generate_images(PROMPTS, tmp_path / "set", images_per_prompt=2, size=32)
    assert read_table(tmp_path / "set.tsv", ["fold"])["fold"].to_pylist() == [3] * 6


@pytest.fixture
def embedded(tmp_path):
    """A prompts file with two rows of one prompt, and embeddings that are as good as an encoder's."""
    table = {"prompt": [*PROMPTS, PROMPTS[0]], "source": ["me"] * 4}
    write_table(tmp_path / "p.tsv", table)
    np.save(tmp_path / "p.npy", unit_rows(3)[[0, 1, 2, 0]])
    record = {"encoder": "all-MiniLM-L6-v2", "rows": 4, "prompts_sha256": hash_prompts(pa.array(table["prompt"]))}
    write_json(tmp_path / "p.npy.json", record)
    return tmp_path / "p.tsv"


def test_embeddings_of_the_prompts_become_those_of_the_data_set(embedded, capsys):
    path, command = embedded.with_name("set.tsv"), [str(embedded), "--output", str(embedded.with_name("set"))]
    command += ["--images-per-prompt", "2", "--size", "32", "--workers", "1"]
    generate.main(command)
    assert "set.npy: embeddings copied from" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), unit_rows(3)[[0, 0, 1, 1, 2, 2]])
    embedding.embed_table(path)  # the same encoder has nothing to do
    generate.main(command)
    said = capsys.readouterr().out
    assert "set.npy is up to date (6 rows)" in said and "copied" not in said

    (embedded.parent / "set_images/00000/0000001_0.jpg").unlink()
    generate.main([*command[:-4], "--table-only"])  # five images: another table
    np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), unit_rows(3)[[0, 0, 1, 2, 2]])
    table = read_table(path, [])
    write_table(path, dict(zip(table.column_names, table.columns, strict=True)) | {"fold": [1, 1, 1, 1, 1]})
    path.with_suffix(".npy").unlink()
    generate.main([*command[:-4], "--table-only"])  # the table stays, and gets its embeddings
    np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), unit_rows(3)[[0, 0, 1, 2, 2]])
    assert set(read_table(path, ["fold"])["fold"].to_pylist()) == {1}


@pytest.mark.parametrize("case", ["of another encoder", "without a record", "bfloat16"])
def test_embeddings_that_are_there_stay_and_rounded_ones_are_not_taken(embedded, case):
    path, npy, record = (embedded.with_name(f"set{suffix}") for suffix in (".tsv", ".npy", ".npy.json"))
    generate.generate_images(PROMPTS, embedded.with_name("set"), images_per_prompt=1, size=32, num_workers=1)
    if case == "bfloat16":
        source = embedded.with_suffix(".npy.json")
        write_json(source, read_record(source) | {"dtype": "bfloat16"})
    else:
        np.save(npy, unit_rows(3, seed=5))
    if case == "of another encoder":
        write_json(record, {"encoder": "mine", "rows": 3, "prompts_sha256": hash_prompts(pa.array(PROMPTS))})
    before = files_of(embedded.parent)
    columns = {"images_per_prompt": 1, "size": 32, "prompts_path": embedded}
    assert generate.generate_images(PROMPTS, embedded.with_name("set"), **columns) == path
    assert files_of(embedded.parent) == before


def test_another_data_set_of_the_same_name_is_not_touched(tmp_path):
    generate.generate_images(PROMPTS, tmp_path / "set", images_per_prompt=1, size=32, num_workers=1)
    before = files_of(tmp_path)
    with pytest.raises(generate.GenerateError, match=r"set.tsv was made with size 32 \(now 48\)"):
        generate.generate_images(PROMPTS, tmp_path / "set", images_per_prompt=1, size=48)
    with pytest.raises(generate.GenerateError, match="prompts_sha256"):
        generate.generate_images(PROMPTS[::-1], tmp_path / "set", images_per_prompt=1, size=32)
    write_table(tmp_path / "own.tsv", {"image": ["a.png"], "prompt": ["a"], "fold": [0]})
    with pytest.raises(generate.GenerateError, match=r"own.tsv was not made by this command"):
        generate.generate_images(PROMPTS, tmp_path / "own", images_per_prompt=1, size=32)
    (tmp_path / "own.tsv").unlink()
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "none"), (["a cat", "a cat"], "twice"), (["a cat", "nothing known"], "'nothing known' names nothing")],
)
def test_bad_prompts_stop_it_before_anything_is_written(tmp_path, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate.generate_images(prompts, tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_seeds_are_what_they_were():
    # printf "0\ta red apple" | sha256sum, its first 63 bits: the pictures of the demo depend on it
    assert generate.image_seed("a red apple", 0) == 6306634311379651740
    seeds = {generate.image_seed("x", number, attempt) for number in range(5) for attempt in range(3)}
    assert len(seeds) == 15


def test_names_and_what_is_missing(tmp_path):
    prompts = [f"prompt {row}" for row in range(2001)]
    image_set = ImageSet(tmp_path / "many", prompts, 3, ".webp")
    assert image_set.name(3 * 1999 + 2) == "many_images/00001/0001999_2.webp"
    assert image_set.prompt(3 * 1999 + 2) == ("prompt 1999", 2)
    there = [0, 1, 5, 3 * 1000, 3 * 2000 + 2]
    for image in there:
        image_set.path(image).parent.mkdir(parents=True, exist_ok=True)
        image_set.path(image).touch()
    folder = tmp_path / "many_images" / "00000"
    for stranger in ("0000001_3.webp", "0002001_0.webp", "0000002_0.jpg", "notes.txt"):  # of no image of this set
        (folder / stranger).touch()
    old, young = folder / ".0000002_0.1234abcd.partial.webp", folder / ".0000002_1.1234abcd.partial.webp"
    for leftover in (old, young):
        leftover.touch()
    os.utime(old, (time.time() - 3600,) * 2)
    assert image_set.missing().tolist() == [image for image in range(6003) if image not in there]
    assert not old.exists() and young.exists()  # the young one may be of an image that is being written


def test_the_table_follows_the_images_and_keeps_what_it_would_lose(tmp_path):
    image_set = ImageSet(tmp_path / "set", ["a", 'b "c"'], 2, ".webp", {"source": pa.array(["me", "you"])})
    assert image_set.update_table(np.array([1]))
    table = read_table(image_set.tsv_path, ["image", "prompt", "fold", "source"])
    assert table["image"].to_pylist() == [
        f"set_images/00000/{name}.webp" for name in ("0000000_0", "0000001_0", "0000001_1")
    ]
    assert table["prompt"].to_pylist() == ["a", 'b "c"', 'b "c"'] and table["source"].to_pylist() == [
        "me",
        "you",
        "you",
    ]
    assert image_set.update_table(np.array([], np.int64))  # nothing of anybody's was in it
    assert not image_set.update_table(np.array([], np.int64))
    whole = read_table(image_set.tsv_path, ["image"])
    columns = {name: whole[name] for name in whole.column_names} | {"fold": [0, 0, 1, 1]}
    write_table(image_set.tsv_path, columns)
    folded = image_set.tsv_path.read_bytes()
    assert not image_set.update_table(np.array([], np.int64))
    with pytest.raises(generate.GenerateError, match=r"4 rows, and 3 images are there; .* --overwrite"):
        image_set.update_table(np.array([2]))
    assert image_set.tsv_path.read_bytes() == folded
    assert image_set.update_table(np.array([2]), overwrite=True)
    assert (tmp_path / "set.tsv.bak").read_bytes() == folded
    assert read_table(image_set.tsv_path, ["fold"])["fold"].to_pylist() == [-1] * 3
    with pytest.raises(generate.GenerateError, match="no image of these prompts"):
        image_set.update_table(np.arange(4))


def test_prompts_come_with_their_sources_and_folds(tmp_path):
    path = tmp_path / "p.tsv"
    write_table(path, {"prompt": ["b", 'a "b', "b"], "source": ["x", "y", "z"], "fold": [3, 1, 3]})
    prompts, columns = generate.read_prompts(path)
    assert prompts == ["b", 'a "b']
    assert {name: values.to_pylist() for name, values in columns.items()} == {"source": ["x", "y"], "fold": [3, 1]}
    write_table(path, {"prompt": ["b", "a"]})
    assert generate.read_prompts(path) == (["b", "a"], {})
    path.write_text("prompt\tsource\nb\tx\n \ty\n")
    with pytest.raises(generate.GenerateError, match=r"p.tsv, line 3: the prompt is empty"):
        generate.read_prompts(path)
    with pytest.raises(ValueError, match="is not there"):
        generate.read_prompts(tmp_path / "none.tsv")


def test_folds_of_the_prompts_become_those_of_the_images(tmp_path):
    prompts = shapes.generate_prompts(2)
    write_table(tmp_path / "p.tsv", {"prompt": prompts, "fold": [4, 0]})
    command = [str(tmp_path / "p.tsv"), "--output", str(tmp_path / "set"), "--images-per-prompt", "2", "--size", "32"]
    generate.main(command)
    table = read_table(tmp_path / "set.tsv", ["image", "prompt", "fold"])
    assert table["fold"].to_pylist() == [4, 4, 0, 0]

    # a table of some of the images, with nothing but those folds, is replaced; one with other folds is not
    (tmp_path / table["image"][1].as_py()).unlink()
    generate.main([*command[:-2], "--table-only"])
    assert read_table(tmp_path / "set.tsv", ["fold"])["fold"].to_pylist() == [4, 0, 0]
    write_table(tmp_path / "set.tsv", {"image": ["x"], "prompt": prompts[:1], "fold": [5]})
    with pytest.raises(ValueError, match=r"set.tsv has values or columns of its own and 1 rows"):
        generate.main(command)


def test_folds_that_the_prompts_have_by_now_come_into_the_table(tmp_path):
    rows, folds = {"source": pa.array(["me", "you"])}, {"fold": pa.array([4, 0], pa.int8())}
    none = np.array([], np.int64)
    assert ImageSet(tmp_path / "set", ["a", "b"], 2, ".webp", rows).update_table(none)
    later = ImageSet(tmp_path / "set", ["a", "b"], 2, ".webp", rows | folds)
    assert later.update_table(none) and not later.update_table(none, overwrite=True)
    assert read_table(later.tsv_path, ["fold"])["fold"].to_pylist() == [4, 4, 0, 0]
    assert not later.tsv_path.with_name("set.tsv.bak").exists()


@pytest.mark.parametrize(
    "edit", [{"fold": [1, 1, 0, 0]}, {"prompt": ["a", "a", "c", "c"]}, {"source": ["my"] * 4}, {"mine": [1, 2, 3, 4]}]
)
def test_edits_of_a_table_are_kept(tmp_path, edit):
    image_set = ImageSet(tmp_path / "set", ["a", "b"], 2, ".webp", {"source": pa.array(["me", "you"])})
    none = np.array([], np.int64)
    image_set.update_table(none)
    made = image_set.tsv_path.read_bytes()
    table = read_table(image_set.tsv_path, [])
    write_table(image_set.tsv_path, {name: table[name] for name in table.column_names} | edit)
    edited = image_set.tsv_path.read_bytes()
    with pytest.raises(
        generate.GenerateError, match=r"4 rows, and 3 images are there; .* with the folds of the prompts"
    ):
        image_set.update_table(np.array([0]))
    if "prompt" in edit:
        with pytest.raises(generate.GenerateError, match="--overwrite"):
            image_set.update_table(none)
    else:
        assert not image_set.update_table(none)
    assert image_set.tsv_path.read_bytes() == edited
    assert image_set.update_table(none, overwrite=True)
    assert image_set.tsv_path.read_bytes() == made and (tmp_path / "set.tsv.bak").read_bytes() == edited


def test_a_damaged_record_and_a_leftover_that_vanishes(tmp_path, monkeypatch):
    image_set = ImageSet(tmp_path / "set", ["a"], 1, ".webp")
    image_set.path(0).parent.mkdir(parents=True)
    image_set.path(0).touch()
    for content in ('{"steps": 2', "3"):
        (image_set.folder / "generation.json").write_text(content)
        with pytest.raises(generate.GenerateError, match=r"generation.json is damaged .*restore it, or choose another"):
            image_set.check_made_alike({})
    leftover = image_set.path(0).with_name(".0000000_0.12345678.partial.webp")
    leftover.touch()

    def renamed_meanwhile():
        leftover.unlink(missing_ok=True)
        return 0.0

    monkeypatch.setattr("kutils.generation.image_sets.time.time", renamed_meanwhile)
    assert not len(image_set.missing()) and not leftover.exists()


def test_arguments_that_would_not_count_are_refused(tmp_path, capsys, monkeypatch):
    write_table(tmp_path / "p.tsv", {"prompt": PROMPTS})
    command = [str(tmp_path / "p.tsv"), "--output", str(tmp_path / "set")]
    for arguments, said in (
        ([*command, "--seed", "3"], "--seed is not for --backend shapes with PROMPTS.tsv"),
        ([*command, "--num-prompts", "3"], "--num-prompts is not for"),
        (["--shapes-dataset", "x", "--workers", "3"], "--workers is not for --shapes-dataset"),
        ([*command, "--table-only", "--size", "32"], "leave out what says how to make them: --size"),
        ([*command, "--table-only", "--backend", "diffusers", "--steps", "3"], "how to make them: --steps"),
    ):
        with pytest.raises(SystemExit):
            generate.main(arguments)
        assert said in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options, said in ((["--table-only"], "--table-only goes without torchrun"), ([], "only --backend diffusers")):
        with pytest.raises(ValueError, match=said):
            generate.main([*command, *options])


def test_embedded_data_set_is_ready_for_training(workspace):
    path = generate.make_shapes_dataset("little", num_prompts=60, images_per_prompt=2, size=32)
    data = datasets.load_datasets(["little"])
    assert len(data) == 120 and set(data.folds.tolist()) == set(range(10))
    assert prompt_folds.read_fold_report(path)["prompts"] == 60
    before = files_of(workspace / "input")
    generate.make_shapes_dataset("little", num_prompts=60, images_per_prompt=2, size=32)
    assert files_of(workspace / "input") == before
    report_path, own = prompt_folds.fold_report_path(path), np.arange(120) // 2 % 3
    report_path.unlink()
    table = read_table(path, ["image", "prompt"])
    write_table(path, {"image": table["image"], "prompt": table["prompt"], "fold": own})
    generate.make_shapes_dataset("little", num_prompts=60, images_per_prompt=2, size=32)
    assert datasets.load_datasets(["little"]).folds.tolist() == own.tolist()  # folds of someone else stay
    with pytest.raises(generate.GenerateError, match="cannot name a data set"):
        generate.make_shapes_dataset("../little")


def test_command(tmp_path):
    write_table(tmp_path / "p.tsv", {"prompt": [*PROMPTS, PROMPTS[0]], "source": ["me"] * 4})
    command = [sys.executable, "-m", "kutils", "generate"]
    options = ["p.tsv", "--output", "set", "--images-per-prompt", "1", "--size", "32"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 images of 3 prompts" in done.stdout
    assert read_table(tmp_path / "set.tsv", ["source"])["source"].to_pylist() == ["me"] * 3
    (tmp_path / "set_images" / "00000" / "0000001_0.jpg").unlink()
    (tmp_path / "set.tsv").unlink()
    done = subprocess.run([*command, *options[:-2], "--table-only"], cwd=tmp_path, capture_output=True, text=True)
    assert "2 of 3 images are there" in done.stdout, done.stderr
    assert read_table(tmp_path / "set.tsv", ["prompt"])["prompt"].to_pylist() == [PROMPTS[0], PROMPTS[2]]
    done = subprocess.run([*command, *options, "--steps", "3"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--steps is not for --backend shapes" in done.stderr
    done = subprocess.run([*command, "p.tsv"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--output" in done.stderr
    write_table(tmp_path / "bad.tsv", {"prompt": ["abstract"], "source": ["me"]})
    done = subprocess.run([*command, "bad.tsv", "--output", "bad"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "names nothing that can be drawn" in done.stderr and "Traceback" not in done.stderr
