"""Fitting an ensemble of trained runs: the JSON file by independent NumPy, and everything that must be refused."""

import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from fixtures.datasets import TINY, make_dataset, use_folders

from kutils.__main__ import run as run_command
from kutils.data.prompt_bank import PromptBank
from kutils.ensemble import blending, fit
from kutils.ensemble.members import Member, add_checkpoint, read_config
from kutils.ensemble.weights import load_ensemble, write_ensemble
from kutils.models import checkpoints
from kutils.runs.recipes import ConfigError, Recipe, load_recipe
from kutils.system.tables import read_table, write_table
from kutils.training import train

FAMILIES = {"convnext": "test_convnext", "vit": "test_vit"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """input/ and working/ with two families trained on fold 0 for one epoch, and one of them on fold 1 too."""
    root = tmp_path_factory.mktemp("ensemble")
    (root / "input").mkdir()
    make_dataset(root / "input", num_prompts=120)
    with pytest.MonkeyPatch.context() as patch:
        use_folders(patch, root)
        for name, backbone in FAMILIES.items():
            recipe = Recipe(**TINY | {"prefix": name, "save_dir": name, "backbone": backbone, "epochs": 1})
            path = root / f"{name}.yaml"
            path.write_text(recipe.to_yaml())
            for fold in (0, 1) if name == "vit" else (0,):
                assert train.main(["--config", str(path), "--fold", str(fold)]) == 0
    return root


@pytest.fixture
def world(trained, tmp_path, monkeypatch):
    """A copy of the trained runs, to be broken, and a writer of ensemble files."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    use_folders(monkeypatch, tmp_path)
    write_config(tmp_path)
    return tmp_path


def write_config(root, method="family", **folds):
    members = {
        name: [{"recipe": str(root / f"{name}.yaml"), "fold": fold} for fold in folds.get(name, [0])]
        for name in FAMILIES
    }
    (root / "ensemble_toy.yaml").write_text(yaml.safe_dump({"method": method, "families": members}))
    return root / "ensemble_toy.yaml"


def predictions_path(root, name):
    return root / "working" / "runs" / f"{name}_fold0" / "fold0_predictions.npz"


def change_predictions(root, name, **changes):
    path = predictions_path(root, name)
    with np.load(path) as saved:
        content = dict(saved)
    np.savez(path, **content | changes)


def test_the_file_holds_weights_members_scores_and_the_mean_prompt(world, capsys):
    config = write_config(world, vit=[0, 1])
    output = world / "ensemble_toy.json"
    assert run_command("ensemble", ["fit", "--config", str(config), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    content = json.loads(output.read_text())
    assert content["kind"] == "kutils ensemble" and content["method"] == "family"

    # members, with what they are known by
    vit = content["families"]["vit"]
    assert [member["fold"] for member in vit] == [0, 1] and len(content["families"]["convnext"]) == 1
    for member in [*vit, *content["families"]["convnext"]]:
        checkpoint = world / "working" / "models" / member["checkpoint"]
        assert member["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        result = world / "working" / "runs" / f"{checkpoint.name.removesuffix('_best_cossim.pth')}" / "result.json"
        assert member["score"] == json.loads(result.read_text())["cosine_similarity"]

    # the mean training embedding, weights and scores of the unseen half by plain NumPy
    table = read_table(world / "input" / "toy.tsv", ["fold"])
    folds, prompts = table["fold"].to_numpy(), np.array(table["prompt"].to_pylist())
    embeddings = np.load(world / "input" / "toy.npy")
    mean = embeddings[folds != 0].mean(axis=0)
    mean /= np.linalg.norm(mean)
    np.testing.assert_allclose(content["mean_embedding"], mean, atol=1e-6)
    rows = {name: np.load(predictions_path(world, name))["embeddings"] for name in FAMILIES}
    targets, numbers = embeddings[folds == 0], pd.factorize(prompts[folds == 0])[0]
    topics = blending.topics(targets, numbers)
    weights, report = blending.fit_and_score(rows, targets, topics)
    assert content["weights"] == pytest.approx(weights["family"])
    assert sum(content["weights"].values()) == pytest.approx(1)
    unseen = ~blending.split_groups(topics, 0)
    assert content["rows"] == {"fit": int((~unseen).sum()), "unseen": int(unseen.sum())} == {"fit": 12, "unseen": 12}
    assert content["over_equal"] == report["over_equal"] and set(report["over_equal"]) == {"family", "dimension"}
    scores = content["scores"]
    total = sum(content["weights"][name] * rows[name] for name in FAMILIES)
    expected = np.sum(total * targets, axis=1) / np.linalg.norm(total, axis=1)
    assert scores["chosen"] == scores["family"] == pytest.approx(expected[unseen].mean(), abs=1e-6)
    assert scores["members"]["vit"] == pytest.approx(np.sum(rows["vit"] * targets, axis=1)[unseen].mean(), abs=1e-6)
    assert scores["baseline"] == pytest.approx((targets @ mean)[unseen].mean(), abs=1e-6)
    assert "family weights" in shown and "equal ones on rows that the fit has not seen" in shown
    bank = PromptBank.load(output.with_name("ensemble_toy.prompts.arrow"))
    assert set(bank.prompts.to_pylist()) == set(prompts.tolist())
    np.testing.assert_allclose(bank.vectors([0, 1, 2]), embeddings[[0, 2, 4]], atol=1e-3)
    assert f"{scores['family']:.4f}   chosen" in shown and f"{scores['baseline']:.4f}" in shown
    assert content["folds_hash"] == str(np.load(predictions_path(world, "vit"))["folds_hash"])
    assert load_ensemble(output).members()[2] == Member(**vit[1])


@pytest.mark.parametrize("method", ["equal", "dimension"])
def test_other_methods(world, method):
    fitted, path = fit.fit(write_config(world, method=method))
    assert path == world / "working" / "models" / "ensemble_toy.json"
    assert fitted.scores["chosen"] == fitted.scores[method]
    assert np.shape(fitted.weights["vit"]) == {"equal": (), "dimension": (384,)}[method]
    assert sum(fitted.mean_weights().values()) == pytest.approx(1)
    assert load_ensemble(path) == fitted


def test_a_member_may_stand_for_the_nearest_prompts_outside_of_fold_0(world, capsys):
    write_config(world, vit=[0, 1])
    values = yaml.safe_load((world / "ensemble_toy.yaml").read_text())
    pulled = [entry | {"neighbours": 3, "temperature": 0.2} for entry in values["families"]["vit"]]
    values["families"]["vit_nearest"] = pulled
    (world / "ensemble_toy.yaml").write_text(yaml.safe_dump(values))
    fitted, path = fit.fit(world / "ensemble_toy.yaml")
    assert [member.name for member in fitted.families["vit_nearest"]] == [
        "vit fold 0 (3 nearest)",
        "vit fold 1 (3 nearest)",
    ]

    table = read_table(world / "input" / "toy.tsv", ["fold"])
    folds, embeddings = table["fold"].to_numpy()[::2], np.load(world / "input" / "toy.npy")[::2]  # two images each
    known = embeddings[folds != 0]
    rows = np.load(predictions_path(world, "vit"))["embeddings"]
    cosines = rows @ known.T
    nearest = np.argsort(-cosines, axis=1)[:, :3]
    weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / 0.2)
    mean = np.einsum("nk,nkd->nd", weights, known[nearest])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    targets = np.load(world / "input" / "toy.npy")[table["fold"].to_numpy() == 0]
    unseen = ~blending.split_groups(blending.topics(targets, np.arange(24) // 2), 0)
    score = np.sum(mean * targets, axis=1)[unseen].mean()
    assert fitted.scores["members"]["vit_nearest"] == pytest.approx(score, abs=1e-6)

    (file,) = path.parent.glob("*.neighbours.arrow")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.name == fitted.neighbours_bank == f"ensemble_toy.{sha256[:12]}.neighbours.arrow"
    assert fitted.neighbours_sha256 == sha256
    bank = PromptBank.load(file)
    prompts = np.array(table["prompt"].to_pylist()[::2])
    assert bank.prompts.to_pylist() == prompts[folds != 0].tolist() and len(bank) == 108
    np.testing.assert_allclose(bank.vectors(np.arange(108)), known, atol=1e-4)
    assert load_ensemble(path) == fitted
    assert fitted.files()[file.name] == fitted.neighbours_sha256 and len(fitted.files()) == 1 + 2 + 1
    capsys.readouterr()
    write_ensemble(fitted, path)
    content = json.loads(path.read_text())
    for key in ("neighbours_bank", "neighbours_sha256", "checksum"):
        del content[key]
    path.write_text(json.dumps(content))  # as it was written before there were neighbours
    assert load_ensemble(path).neighbours_bank == ""


def test_rows_without_a_prediction_have_no_neighbours():
    basis = np.eye(384, dtype=np.float32)
    member = Member("x.yaml", 0, neighbours=1)
    rows = np.stack([basis[1], np.full(384, np.nan, np.float32)])
    pulled = member.apply_neighbours(rows, PromptBank(["a", "b"], basis[[0, 1]]))
    np.testing.assert_array_equal(pulled, rows)
    assert Member("x.yaml", 0).apply_neighbours(rows, None) is rows
    with pytest.raises(match=r"x fold 0 \(1 nearest\): the prompts"):
        member.apply_neighbours(rows, None)


def test_a_previous_file_that_differs_becomes_bak(world):
    _, path = fit.fit(world / "ensemble_toy.yaml")
    first = path.read_bytes()
    fit.fit(world / "ensemble_toy.yaml")
    assert path.read_bytes() == first and not path.with_name("ensemble_toy.json.bak").exists()
    fit.fit(world / "ensemble_toy.yaml", seed=1)
    assert path.read_bytes() != first and path.with_name("ensemble_toy.json.bak").read_bytes() == first


def test_the_neighbours_of_a_previous_file_stay(world):
    """Of three fits with other prompts each, and one without neighbours: what the last file and its .bak name stays."""
    values = yaml.safe_load((world / "ensemble_toy.yaml").read_text())
    values["families"]["vit"][0]["neighbours"] = 3
    (world / "ensemble_near.yaml").write_text(yaml.safe_dump(values))
    output, banks = world / "models" / "e\u00e4.json", []

    def refit(name):
        fitted, _ = fit.fit(world / name, output)
        banks.append(fitted.neighbours_bank)
        return {path.name for path in output.parent.glob("*.neighbours.arrow")}

    def loaded(path):
        fitted = load_ensemble(path)
        assert (
            fitted.neighbours_sha256
            == hashlib.sha256((output.parent / fitted.neighbours_bank).read_bytes()).hexdigest()
        )

    output.parent.mkdir()
    others = {"e\u00e4.x.neighbours.arrow", "f.0123456789ab.neighbours.arrow"}  # of other ensembles
    for name in (*others, "e\u00e4.neighbours.arrow"):  # the last as it was named before
        (output.parent / name).write_bytes(b"")
    assert refit("ensemble_near.yaml") == {*banks, *others}
    assert refit("ensemble_near.yaml") == {*banks, *others} and len(set(banks)) == 1  # the same
    real = fit.in_fold
    for fold in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit, "in_fold", lambda bank, names, _, fold=fold: real(bank, names, fold))
            assert refit("ensemble_near.yaml") == {*banks[-2:], *others}
        loaded(output)
        loaded(f"{output}.bak")
    assert refit("ensemble_toy.yaml") == {banks[-2], *others} and banks[-1] == ""
    loaded(f"{output}.bak")
    assert refit("ensemble_near.yaml") == {banks[-1], *others}


def test_a_file_that_cannot_be_written_is_one_line(world, capsys):
    (world / "file").write_text("")
    arguments = ["fit", "--config", str(world / "ensemble_toy.yaml"), "--output", str(world / "file" / "x.json")]
    assert run_command("ensemble", arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said and said.count("\n") == 1


def test_a_network_is_its_checkpoint(world):
    vit = world / "vit.yaml"
    (world / "below").mkdir()
    spelt = [add_checkpoint(Member(str(path), 0)) for path in (vit, world / "below" / ".." / "vit.yaml")]
    other = add_checkpoint(Member(str(vit), 1))
    assert spelt[0].network == spelt[1].network != other.network
    assert len({Member(*given).network for given in (("x", 0), ("x", 0), ("x", 1), ("y", 0))}) == 3


def refused(world, capsys):
    """The error of a fit that must fail and write nothing."""
    assert run_command("ensemble", ["fit", "--config", str(world / "ensemble_toy.yaml")]) == 1
    assert not list((world / "working" / "models").glob("*.json"))
    return capsys.readouterr().err


def test_members_validated_on_different_folds_rows_or_targets_are_refused(world, capsys):
    saved = dict(np.load(predictions_path(world, "vit")))
    change_predictions(world, "vit", folds_hash=json.dumps({"toy": "0" * 64}))
    said = refused(world, capsys)
    assert "different folds" in said and str(predictions_path(world, "convnext")) in said
    assert str(predictions_path(world, "vit")) in said
    change_predictions(world, "vit", folds_hash=saved["folds_hash"], row=saved["row"] + 1)
    assert "different rows" in refused(world, capsys)
    change_predictions(world, "vit", row=saved["row"], targets_hash="0" * 64)
    assert "different targets" in refused(world, capsys)
    change_predictions(world, "vit", targets_hash=saved["targets_hash"], fold=1)
    assert "was validated on fold 1" in refused(world, capsys)


def test_a_member_that_has_trained_on_fold_0_is_refused(world, capsys):
    models = world / "working" / "models" / "vit"
    shutil.copy(models / "vit_fold1_best_cossim.pth", models / "vit_fold0_best_cossim.pth")
    assert "was validated on fold 1, not 0" in refused(world, capsys)


def test_a_checkpoint_of_other_folds_than_its_predictions_is_refused(world, capsys):
    path = world / "working" / "models" / "vit" / "vit_fold0_best_cossim.pth"
    content = checkpoints.read(path)
    path.unlink()
    checkpoints.save(path, content | {"folds_hashes": {"toy": "0" * 64}})
    assert "other folds of toy" in refused(world, capsys)


def test_data_that_changed_since_is_refused(world, capsys):
    table = read_table(world / "input" / "toy.tsv", ["fold"]).to_pydict()
    write_table(world / "input" / "toy.tsv", table | {"fold": [(fold + 1) % 10 for fold in table["fold"]]})
    assert "toy: other prompts or folds now" in refused(world, capsys)
    write_table(world / "input" / "toy.tsv", table)
    embeddings = np.load(world / "input" / "toy.npy")
    np.save(world / "input" / "toy.npy", np.roll(embeddings, 1, axis=1))
    assert "toy: other rows or embeddings now" in refused(world, capsys)


def test_what_is_missing_is_named_with_the_command_that_makes_it(world, capsys):
    predictions_path(world, "vit").write_bytes(b"PK\x03\x04 half a file")
    assert "fold0_predictions.npz cannot be read" in refused(world, capsys)
    predictions_path(world, "vit").unlink()
    said = refused(world, capsys)
    assert "fold0_predictions.npz is not there" in said and f"--config {world}/vit.yaml --fold 0" in said
    write_config(world, convnext=[0, 3])
    assert "convnext_fold3_best_cossim.pth is not there" in refused(world, capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metod": "equal"}, "no key 'metod'; did you mean 'method'?"),
        ({"method": "best"}, "method is 'best'; it can be equal, family, dimension"),
        ({"families": {}}, "families holds no"),
        ({"families": {"vit": "vit.yaml"}}, "vit is no list of members"),
        ({"families": {"vit": [{"recipe": "vit.yaml", "folds": 0}]}}, "no key 'folds'; did you mean 'fold'?"),
        ({"families": {"vit": [{"recipe": "vit.yaml"}]}}, "a member of vit lacks fold"),
        ({"families": {"vit": [{"recipe": "vit.yaml", "fold": 10}]}}, "with a fold of 0 to 9"),
        ({"families": {"vit": [{"recipe": "vit.yaml", "fold": True}]}}, "with a fold of 0 to 9"),
        ({"families": {"vit": [{"recipe": "vit.yaml", "fold": 0, "neighbour": 3}]}}, "did you mean 'neighbours'?"),
        (
            {"families": {"vit": [{"recipe": "vit.yaml", "fold": 0, "neighbours": 0}]}},
            "neighbours is 0; it is a number",
        ),
        (
            {"families": {"vit": [{"recipe": "vit.yaml", "fold": 0, "temperature": -1}]}},
            "temperature is -1.0; it is above",
        ),
        (
            {"families": {"vit": [{"recipe": "vit.yaml", "fold": 0, "neighbours": 5, "temperature": float("inf")}]}},
            "temperature is inf; it is above 0 and finite",
        ),
        (
            {"families": {"vit": [{"recipe": "vit.yaml", "fold": 0, "neighbours": 5, "temperature": True}]}},
            "temperature is True; it takes float",
        ),
        (
            {"families": {"vit": [{"recipe": "vit.yaml", "fold": 0, "temperature": 0.1}]}},
            "temperature is 0.1 without neighbours",
        ),
        (
            {
                "families": {
                    "vit": [{"recipe": "vit.yaml", "fold": 0}, {"recipe": "vit.yaml", "fold": 1, "neighbours": 5}]
                }
            },
            "members of vit differ in neighbours or temperature",
        ),
        ({"families": {"vit": [{"recipe": "vit.yaml", "fold": 1}]}}, "vit has 0 members validated on fold 0"),
        (
            {"families": {"vit": [{"recipe": f"{name}.yaml", "fold": 0} for name in ("a", "b")]}},
            "vit has 2 members validated on fold 0: a fold 0, b fold 0",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(tmp_path, change, said):
    values = {"method": "family", "families": {"vit": [{"recipe": "vit.yaml", "fold": 0}]}}
    (tmp_path / "ensemble_x.yaml").write_text(yaml.safe_dump(values | change))
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path / "ensemble_x.yaml")
    assert said in str(caught.value) and "ensemble_x.yaml" in str(caught.value)


def test_a_temperature_in_powers_of_ten_is_a_number(world):
    entry = "{recipe: %s, fold: 0, neighbours: 5, temperature: 1e-5}" % (world / "vit.yaml")
    (world / "ensemble_x.yaml").write_text(f"method: family\nfamilies:\n  vit:\n  - {entry}\n")
    _, families = read_config(world / "ensemble_x.yaml")
    assert families["vit"][0].temperature == 1e-5


def test_a_recipe_that_is_not_there_or_named_twice(world):
    text = (world / "ensemble_toy.yaml").read_text()
    (world / "ensemble_toy.yaml").write_text(text.replace("vit.yaml", "vti.yaml"))
    with pytest.raises(ConfigError, match="no recipe file"):
        read_config(world / "ensemble_toy.yaml")
    (world / "ensemble_toy.yaml").write_text(text.replace("vit.yaml", "convnext.yaml"))
    with pytest.raises(match="same recipe and fold twice"):
        read_config(world / "ensemble_toy.yaml")


def test_the_ensemble_in_conf_is_read():
    method, families = read_config("conf/ensemble_tiny.yaml")
    assert method == "family" and {name: len(members) for name, members in families.items()} == {
        "lite0": 1,
        "tiny_vit": 1,
    }


def test_the_published_ensemble_has_its_eighteen_models():
    _, families = read_config("conf/ensemble_seed.yaml")
    assert {name: [member.fold for member in members] for name, members in families.items()} == {
        "convnext_large": [0, 1, 2, 3],
        "vit_large": [0, 3, 4, 8],
        "convnext_xxlarge": [0, 1, 6, 7, 6],
        "eva02_large": [0, 2, 5, 9, 2],
    }
    recipes = [(load_recipe(member.recipe), member.fold) for members in families.values() for member in members]
    names = [recipe.checkpoint_path(fold).relative_to(recipe.models_folder()).as_posix() for recipe, fold in recipes]
    prefix = "eval02_large/eva02_large_cls"  # the folder is spelt so where it was published
    suffix = "_8data_noaug_input448_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0"
    assert names[13:] == [
        f"{prefix}avg{suffix}_3epoch_fold0_best_cossim.pth",
        f"{prefix}avg{suffix}_3epoch_fold2_best_cossim.pth",
        f"{prefix}only{suffix}_3epoch_fold5_best_cossim.pth",
        f"{prefix}only{suffix}_3epoch_fold9_best_cossim.pth",
        f"{prefix}avg{suffix}_1epoch_fold2_best_cossim.pth",
    ]
    assert len(set(names)) == 18 and all(fold in recipe.train_folds for recipe, fold in recipes)
