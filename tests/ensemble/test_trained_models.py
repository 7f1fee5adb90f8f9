"""Trained models asked about images: predictions by the networks' own output, and the command's tables."""

import dataclasses
import json
import os
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fixtures.datasets import unit_rows
from fixtures.ensembles import by_hand, write_ensemble
from fixtures.finished_runs import RESULT

from kutils.__main__ import run as run_command
from kutils.data.prompt_bank import PromptBank
from kutils.ensemble import trained_models, weights
from kutils.ensemble.members import Member
from kutils.models import checkpoints, networks
from kutils.system import paths

NAMES = ("0003_1.png", "0017_0.png")


@pytest.fixture
def images(workspace):
    return [workspace / "input" / "toy_images" / name for name in NAMES]


@pytest.fixture
def trained(workspace, tiny_recipe):
    """Two finished runs of random weights, a_fold0 and b_fold0, the later: the networks and recipes by name."""
    built = {}
    for number, (name, input_size) in enumerate([("a", 32), ("b", 48)]):
        torch.manual_seed(number)
        recipe = tiny_recipe(prefix=name, save_dir=name, input_size=input_size)
        model = networks.build_model(recipe).eval()
        path = workspace / "working" / "models" / name / f"{name}_fold0_best_cossim.pth"
        facts = {"fold": 0, "folds_hashes": {}, "epoch": 1, "cosine_similarity": 0.5 + number / 10}
        checkpoints.save_checkpoint(path, model, recipe, **facts)
        run = workspace / "working" / "runs" / f"{name}_fold0"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(recipe.to_yaml())
        score = facts["cosine_similarity"]
        replace(RESULT, checkpoint=f"{name}/{path.name}", cosine_similarity=score).write(run)
        os.utime(run / "result.json", (number, number))
        built[run.name] = (model, recipe)
    return built


@pytest.fixture
def fitted(workspace, trained):
    """An ensemble of both in working/models/."""
    folder = workspace / "working" / "models"
    families = {}
    for name in ("a", "b"):
        checkpoint = f"{name}/{name}_fold0_best_cossim.pth"
        families[name] = [Member(f"{name}.yaml", 0, checkpoint, paths.sha256_of(folder / checkpoint))]
    path = write_ensemble(folder, families, {"a": 0.3, "b": 0.7}, unit_rows(1)[0])
    content = json.loads(path.read_text()) | {"folds_hash": json.dumps({"toy": ""})}
    path.unlink()
    (folder / "ensemble_ab.json").write_text(json.dumps(content))
    return folder / "ensemble_ab.json"


# ---------------------------------------------------------------- models


def test_models_of_finished_runs_are_found(workspace, trained):
    found = trained_models.find_models()
    assert [model.name for model in found] == ["a_fold0", "b_fold0"] and [model.score for model in found] == [0.5, 0.6]
    assert all(model.checkpoint.is_file() for model in found)
    assert trained_models.find_models(["b*", "a_fold0", "*_fold0"]) == found[::-1]
    (by_file,) = trained_models.find_models([str(found[0].checkpoint)])
    assert (by_file.name, by_file.score) == ("a_fold0_best_cossim", 0.5)
    twice = [found[0].checkpoint, workspace / found[1].checkpoint.name, workspace / "ensemble.pth"]
    for path in twice[1:]:
        path.write_bytes(found[1].checkpoint.read_bytes())
    twice.append(found[1].checkpoint)
    names = [model.name for model in trained_models.find_models([*map(str, twice)])]
    assert names == ["a_fold0_best_cossim", *map(str, twice[1:])]
    with pytest.raises(ValueError, match="no finished run 'c_fold0'"):
        trained_models.find_models(["c_fold0"])
    with pytest.raises(ValueError, match=r"no checkpoint at c.pth"):
        trained_models.find_models(["c.pth"])


def test_a_run_moved_aside_keeps_its_own_checkpoint(workspace, trained):
    runs, folder = workspace / "working" / "runs", workspace / "working" / "models" / "a"
    (runs / "a_fold0").rename(runs / "a_fold0.1")
    content = (folder / "a_fold0_best_cossim.pth").read_bytes()
    (runs / "a_fold0.1" / "a_fold0_best_cossim.pth").write_bytes(content)
    (model,) = trained_models.find_models(["a_fold0.1"])
    assert model.checkpoint.parent == runs / "a_fold0.1"


def test_a_run_without_its_checkpoint_is_told_where_it_is_asked_for(workspace, trained):
    (workspace / "working" / "models" / "a" / "a_fold0_best_cossim.pth").unlink()
    assert [model.name for model in trained_models.find_models()] == ["b_fold0"]
    with pytest.raises(ValueError, match=r"a_fold0 has finished, but .* is not there any more; train it again"):
        trained_models.find_models(["a_fold0"])


def test_the_newest_ensemble_is_chosen_where_none_is_named(fitted):
    other = fitted.with_name("older.json")
    other.write_text(fitted.read_text())
    os.utime(other, (1, 1))
    assert trained_models.choose_models([], "") == ([], (fitted, weights.load_ensemble(fitted)))
    assert trained_models.choose_models([], str(other))[1][0] == other
    models, none = trained_models.choose_models(["a_fold0"], "")
    assert [model.name for model in models] == ["a_fold0"] and none is None


def test_images_are_embedded_as_by_the_networks(images, trained, fitted):
    found = trained_models.embed_images(
        trained_models.find_models(), images, ensemble=weights.load_ensemble(fitted), device="cpu"
    )
    a, b = (by_hand(*trained[name], images) for name in ("a_fold0", "b_fold0"))
    total = 0.3 * a + 0.7 * b
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    assert list(found) == ["a_fold0", "b_fold0", "ensemble"]
    for rows, expected in zip(found.values(), (a, b, total), strict=True):
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_an_ensemble_finds_the_prompts_of_its_neighbours(workspace, images, trained, fitted):
    plain = weights.load_ensemble(fitted)
    (a,) = plain.families["a"]
    file = weights.neighbours_path(fitted)
    PromptBank(["x", "y", "z"], unit_rows(3)).save(file, np.float16)
    pulled = dataclasses.replace(
        plain,
        families=plain.families | {"b": [dataclasses.replace(a, neighbours=2, temperature=0.1)]},
        neighbours_bank=file.name,
        neighbours_sha256=paths.sha256_of(file),
    )
    found = trained_models.embed_images([], images, ensemble=pulled, device="cpu")["ensemble"]
    rows = by_hand(*trained["a_fold0"], images)
    expected = 0.3 * rows + 0.7 * PromptBank.load(file).knn(rows, 2, 0.1)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    elsewhere = workspace / "elsewhere" / "e.json"
    elsewhere.parent.mkdir()
    file.rename(elsewhere.with_name(file.name))
    again = trained_models.embed_images([], images, ensemble=pulled, ensemble_path=elsewhere, device="cpu")["ensemble"]
    np.testing.assert_array_equal(again, found)
    with pytest.raises(ValueError, match=r"ensemble_ab.neighbours.arrow"):
        trained_models.embed_images([], images, ensemble=pulled, device="cpu")


def test_an_image_that_cannot_be_read_is_named(workspace, images, trained, fitted):
    (workspace / "broken.jpg").write_bytes(b"no image")
    everything = [*images, workspace / "broken.jpg"]
    for asked, of in ((trained_models.find_models(["a_fold0"]), None), ([], weights.load_ensemble(fitted))):
        with pytest.raises(ValueError, match=r"broken.jpg is no image"):
            trained_models.embed_images(asked, everything, ensemble=of, device="cpu")


def test_a_member_that_fails_is_named(images, fitted, monkeypatch):
    real = checkpoints.load_model

    def failing(path, *arguments):
        if path.name.startswith("a_"):
            raise RuntimeError("no such layer")
        return real(path, *arguments)

    monkeypatch.setattr(checkpoints, "load_model", failing)
    with pytest.raises(ValueError, match="a fold 0: it failed: no such layer"):
        trained_models.embed_images([], images, ensemble=weights.load_ensemble(fitted), device="cpu")


def test_models_of_one_name_are_refused(images, trained):
    (model,) = trained_models.find_models(["a_fold0"])
    for same in ([model, model], [dataclasses.replace(model, name="ensemble")]):
        with pytest.raises(ValueError, match=rf"are called {same[0].name}; rename one"):
            trained_models.embed_images(same, images, device="cpu")


def test_a_table_of_neighbours():
    basis = np.eye(384, dtype=np.float32)
    bank = PromptBank(["a cat", "a dog", "a tree"], basis[:3])
    table = trained_models.neighbours_table(0.6 * basis[0] + 0.8 * basis[2], bank, k=2)
    assert table["rank"].tolist() == [1, 2] and table["prompt"].tolist() == ["a tree", "a cat"]
    assert table["cosine"].tolist() == pytest.approx([0.8, 0.6])


# ---------------------------------------------------------------- command


def told(capsys, *arguments) -> str:
    trained_models.main([*map(str, arguments), "--device", "cpu"])
    return capsys.readouterr().out


def nearest_lines(rows, count):
    """What the command prints of one prediction, from all cosines."""
    cosines = np.load(paths.input_dir() / "toy.npy")[::2] @ rows
    order = np.argsort(-cosines)[:count]
    return [f'   {rank}  {cosines[i]:7.4f}  toy prompt "{i}, with a comma' for rank, i in enumerate(order, start=1)]


def test_the_run_finished_last_is_asked(images, trained, capsys):
    said = told(capsys, *images, "-k", 3)
    expected = ["nearest of 40 prompts of toy"]
    for image, rows in zip(images, by_hand(*trained["b_fold0"], images), strict=True):
        expected += ["", f"{image}, by b_fold0 (mean cosine 0.6000 on its fold)", *nearest_lines(rows, 3)]
    assert said.splitlines() == expected


def test_an_image_whose_name_is_no_text_is_asked(images, trained, capsys, tmp_path):
    name = os.fsencode(tmp_path) + b"/a\xff.png"
    shutil.copy(os.fsencode(images[0]), name)
    sys.stdout.reconfigure(errors="backslashreplace")  # as the command does
    said = told(capsys, os.fsdecode(name), "-k", 1, "--csv", tmp_path / "asked.csv")
    shown = f"{tmp_path}/a\\udcff.png"
    assert f"{shown}, by b_fold0" in said and pd.read_csv(tmp_path / "asked.csv")["image"].tolist() == [shown]


def test_the_ensemble_is_asked_where_there_is_one(images, trained, fitted, capsys):
    said = told(capsys, images[0], "-k", 2)
    rows = 0.3 * by_hand(*trained["a_fold0"], images[:1])[0] + 0.7 * by_hand(*trained["b_fold0"], images[:1])[0]
    assert f"{images[0]}, by the ensemble ensemble_ab of 2 models" in said
    assert said.splitlines()[-2:] == nearest_lines(rows / np.linalg.norm(rows), 2)
    assert told(capsys, images[0], "--ensemble", fitted, "-k", 2) == said


def test_several_models_a_bank_and_a_file(workspace, images, trained, fitted, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    prompts = ["a very long prompt that goes on and on until it reaches another line", "=a \x1b[31m dog", "a tree"]
    PromptBank(prompts, unit_rows(3)).save(workspace / "own.arrow", np.float16)
    options = ["--bank", workspace / "own.arrow", "--csv", workspace / "n.csv"]
    said = told(capsys, *images, "--model", "*_fold0", "--ensemble", fitted, *options)
    assert said.startswith(f"nearest of 3 prompts of {workspace / 'own.arrow'}\n")
    assert max(len(line) for line in said.splitlines() if ", by " not in line and "nearest" not in line) <= 60
    assert "a very long prompt that goes on and on until\n               it reaches another line\n" in said
    table = pd.read_csv(workspace / "n.csv")
    assert list(table) == ["image", "model", "rank", "cosine", "prompt"] and len(table) == 2 * 3 * 3
    assert table["model"].unique().tolist() == ["a_fold0", "b_fold0", "ensemble_ab"]
    cosines = by_hand(*trained["a_fold0"], images) @ unit_rows(3).T
    first = table[(table["model"] == "a_fold0") & (table["image"] == str(images[1]))]
    cells = [prompts[0], f"'{prompts[1]}", prompts[2]]
    assert first["prompt"].tolist() == [cells[i] for i in np.argsort(-cosines[1])]
    np.testing.assert_allclose(first["cosine"], np.sort(cosines[1])[::-1], atol=1e-3)
    one, other = workspace / "best.pth", workspace / "ensemble.pth"
    for path, name in ((one, "a"), (other, "b")):
        path.write_bytes((workspace / "working" / "models" / name / f"{name}_fold0_best_cossim.pth").read_bytes())
    options = ["--model", one, "--model", other, "--csv", workspace / "m.csv", "-k", 1]
    assert f"{images[0]}, by {other} (mean" in told(capsys, images[0], *options)
    assert pd.read_csv(workspace / "m.csv")["model"].tolist() == ["best", str(other)]
    assert run_command("ask", [str(images[0]), "--csv", str(workspace / "n.csv")]) == 1
    assert "n.csv exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.png"], "no image at no.png"),
        (["toy.tsv"], "toy.tsv is no image"),
        (["toy.png", "--datasets", "nothing"], "data set 'nothing': nothing.tsv and nothing.npy not in"),
        (["toy.png", "--bank", "nothing.arrow"], "nothing.arrow holds no prompts"),
        (["toy.png", "--prompts", "nothing.tsv"], "nothing.tsv is not there"),
        (["toy.png", "--model", "a_fold1"], "no finished run 'a_fold1' in .*; did you mean 'a_fold0'"),
        (["toy.png", "--ensemble", "nothing.json"], "nothing.json: No such file"),
        (["toy.png", "-k", "0"], "-k is 0"),
    ],
)
def test_command_names_what_is_missing(workspace, images, trained, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(workspace / "input")
    images[0].rename("toy.png")
    assert run_command("ask", [*arguments, "--device", "cpu"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_nothing_trained_says_how_to(images, workspace, capsys):
    assert run_command("ask", [str(images[0])]) == 1
    message = r"nothing is trained yet in .*: make train MODEL=tiny_vit FOLD=0"
    assert re.search(message, capsys.readouterr().err)


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        trained_models.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 5)" in text and "(default: those of the models)" in text and "None" not in text
