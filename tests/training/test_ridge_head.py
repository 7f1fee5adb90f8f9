"""The head in closed form, against scikit-learn's ridge regression on features that are worked out beside it."""

import numpy as np
import pytest
import torch
from fixtures.datasets import make_dataset
from PIL import Image
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from kutils import __main__
from kutils.data import datasets, transforms
from kutils.models import checkpoints
from kutils.models.heads import linear_head
from kutils.models.networks import build_model
from kutils.system.ranks import Ranks
from kutils.system.tables import read_table, write_table
from kutils.training import engine, network_input, ridge_head

ALONE = Ranks(0, 1, torch.device("cpu"))
KEPT = {"head_init": "ridge", "lr": 0.0, "min_lr": 0.0, "epochs": 1}  # a rate of 0: the head stays what was fitted


@pytest.fixture
def data(workspace):
    """150 prompts of two images each, whose embeddings depend on the first image's mean colour, and on chance."""
    make_dataset(workspace / "input", "ridges", num_prompts=150, images_per_prompt=2)
    images = read_table(workspace / "input" / "ridges.tsv", ["image"])["image"].to_pylist()
    colours = np.stack([np.asarray(Image.open(workspace / "input" / image)).mean((0, 1)) for image in images[::2]])
    random = np.random.default_rng(0)
    embeddings = (colours / 100 - 1) @ random.normal(size=(3, 384)) + random.normal(size=(150, 384))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.save(workspace / "input" / "ridges.npy", np.repeat(embeddings, 2, axis=0).astype(np.float32))
    return datasets.load_datasets(["ridges"])


def features_of(model, data, rows) -> np.ndarray:
    images = [transforms.resize_square(transforms.decode_rgb(data.image_path(row)), 32) for row in rows]
    with torch.no_grad():
        return model.eval().features(network_input.normalize(torch.stack(images), (0.5,) * 3, (0.5,) * 3)).numpy()


def cosines(predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return (predicted * targets).sum(1) / np.linalg.norm(predicted, axis=1) / np.linalg.norm(targets, axis=1)


def test_the_head_is_that_of_ridge_regression_with_the_penalty_that_suits_held_out_prompts(data, tiny_recipe):
    recipe = tiny_recipe(datasets=("ridges",))
    torch.manual_seed(0)
    model = build_model(recipe)
    rows = data.training_rows(3)
    fit = ridge_head.fit_head(model, data, rows, 3, recipe, torch.float32, ALONE)
    assert model.training
    features, targets = features_of(model, data, rows).astype(np.float64), data.targets(rows)
    expected = Ridge(alpha=fit.penalty, fit_intercept=False).fit(features, targets).coef_
    expected *= np.sqrt(2 / sum(expected.shape)) / np.sqrt((expected**2).mean())  # of random weights
    np.testing.assert_allclose(fit.weight.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert fit.images == len(rows) == 270 and fit.bad == []

    held = data.folds[rows] == 4  # of the fold after the one that is validated on
    scale = (features[~held] ** 2).sum(0).mean()
    scores = []
    for penalty in ridge_head.PENALTIES * scale:
        ridge = Ridge(alpha=penalty, fit_intercept=False).fit(features[~held], targets[~held])
        scores.append(cosines(ridge.predict(features[held]), targets[held]).mean())
    assert fit.cosine == pytest.approx(max(scores), abs=1e-5)
    assert fit.penalty == pytest.approx(ridge_head.PENALTIES[int(np.argmax(scores))] * scale, rel=1e-5)
    assert 0 < np.argmax(scores) < len(scores) - 1, "the best penalty lies at the grid's end, and shows nothing"


def test_a_scaled_head_is_of_the_size_of_a_random_one_and_keeps_its_predictions():
    """An optimiser's first steps then change it as little as a random head, however long the features are."""
    torch.manual_seed(0)
    features, fitted = 300 * torch.randn(50, 32), torch.randn(384, 32).double() * 1e-5
    scaled = ridge_head.scaled_as_random(fitted)
    assert scaled.square().mean().sqrt().item() == pytest.approx(linear_head(32).weight.std().item(), rel=0.03)
    before, after = (torch.nn.functional.normalize(features.double() @ head.T) for head in (fitted, scaled))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(("keys", "weight"), [(0, "fc.weight"), (270, "fc.values.weight")])
def test_the_first_steps_of_adamw_leave_the_closed_form_what_it_was(workspace, data, tiny_recipe, keys, weight):
    """An epoch at 1e-4 moves the head by a few hundredths of its length, and not by all of it."""
    common = {"datasets": ("ridges",), "head_init": "ridge", "head_keys": keys, "optimizer": "adamw", "epochs": 1}
    heads = {}
    for name, lr in (("fitted", 0.0), ("trained", 1e-4)):
        assert start(write(workspace, tiny_recipe(prefix=name, lr=lr, min_lr=0.0, **common))) == 0
        content = checkpoints.read(workspace / f"working/models/tiny/{name}_fold0_epoch1.pth")
        heads[name] = content["model"][weight]
    change = (heads["trained"] - heads["fitted"]).norm() / heads["fitted"].norm()
    assert 0 < change < 0.05


def test_a_head_whose_keys_are_all_training_images_is_kernel_ridge_regression(data, tiny_recipe):
    recipe = tiny_recipe(datasets=("ridges",), head_init="ridge", head_keys=270, max_local_batch_size=7)
    torch.manual_seed(0)
    model = build_model(recipe)
    rows = data.training_rows(3)
    fit = ridge_head.fit_head(model, data, rows, 3, recipe, torch.float32, ALONE)
    with torch.no_grad():
        model.last_linear.weight.copy_(fit.weight)
    features, targets = features_of(model, data, rows).astype(np.float64), data.targets(rows)
    others = features_of(model, data, data.validation_rows(3)).astype(np.float64)

    def kernel(one, other):
        one, other = one - features.mean(0), other - features.mean(0)
        cosine = one @ other.T / np.outer(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
        return np.exp(3 * (cosine - 1))

    regression = KernelRidge(alpha=fit.penalty, kernel="precomputed").fit(kernel(features, features), targets)
    expected = regression.predict(kernel(others, features))
    with torch.no_grad():
        predicted = model.embed(torch.from_numpy(others).float()).numpy()
    assert cosines(predicted, expected).min() > 0.9999
    held = data.folds[rows] == 4
    scores = []
    for penalty in np.logspace(-3, 2, 26):
        part = KernelRidge(alpha=penalty, kernel="precomputed")
        part.fit(kernel(features[~held], features[~held]), targets[~held])
        scores.append(cosines(part.predict(kernel(features[held], features[~held])), targets[held]).mean())
    assert fit.cosine == pytest.approx(max(scores), abs=1e-3)


def test_keys_are_some_training_images_of_any_batch_size(data, tiny_recipe):
    rows, heads = data.training_rows(3), []
    for size in (3, 50):
        recipe = tiny_recipe(datasets=("ridges",), head_init="ridge", head_keys=40, max_local_batch_size=size)
        torch.manual_seed(0)
        model = build_model(recipe)
        fit = ridge_head.fit_head(model, data, rows, 3, recipe, torch.float32, ALONE)
        heads.append((model.fc.keys.weight.detach(), fit.weight))
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-3, atol=1e-4)
    features = features_of(model, data, rows)
    centred = features - model.fc.centre.numpy()
    found = model.fc.keys.weight.detach().numpy() @ (centred / np.linalg.norm(centred, axis=1, keepdims=True)).T
    assert len(set(found.argmax(1))) == 40 and found.max(1).min() > 0.9999
    with pytest.raises(ValueError, match="head_keys=271 is more than the 270 training images; lower it"):
        recipe = tiny_recipe(datasets=("ridges",), head_init="ridge", head_keys=271)
        ridge_head.fit_head(build_model(recipe), data, rows, 3, recipe, torch.float32, ALONE)


def test_held_out_rows_are_whole_prompts(data, workspace):
    rows = data.training_rows(9)
    assert set(data.folds[rows[ridge_head.held_out(data, rows, 9)]]) == {0}
    table = read_table(workspace / "input" / "toy.tsv", ["image", "prompt", "fold"])
    folds = [0 if fold == 0 else 1 for fold in table["fold"].to_pylist()]
    write_table(workspace / "input" / "toy.tsv", {**table.to_pydict(), "fold": folds})
    toy = datasets.load_datasets(["toy"])  # one training fold: some of its prompts
    rows = toy.training_rows(0)
    held = ridge_head.held_out(toy, rows, 0)
    codes = toy.prompt_codes[rows]
    assert 0 < held.sum() < len(rows) / 3 and not set(codes[held]) & set(codes[~held])


def start(path, *overrides) -> int:
    return __main__.run("train", ["--config", str(path), "--fold", "0", *overrides])


def write(workspace, recipe):
    path = workspace / f"{recipe.prefix}.yaml"
    path.write_text(recipe.to_yaml())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("keys", [0, 100])
def test_a_run_starts_from_it_on_one_rank_or_two(workspace, data, tiny_recipe, start_ranks, capsys, keys):
    broken = data.image_path(int(data.training_rows(0)[5]))
    broken.write_bytes(b"")
    common = {**KEPT, "datasets": ("ridges",), "max_local_batch_size": 4, "head_keys": keys}
    alone, both = (write(workspace, tiny_recipe(prefix=name, **common)) for name in ("alone", "both"))
    assert start(alone) == 0
    assert "head in closed form from 270 images: penalty " in capsys.readouterr().out
    start_ranks("kutils", "train", "--config", both, "--fold", 0, num_ranks=2).run()
    read = [checkpoints.read(workspace / f"working/models/tiny/{name}_fold0_epoch1.pth") for name in ("alone", "both")]
    weights = [content["model"]["fc.values.weight" if keys else "fc.weight"] for content in read]
    recipe = tiny_recipe(head_init="ridge", head_keys=keys)
    torch.manual_seed(recipe.seed)
    network = build_model(recipe)
    fit = ridge_head.fit_head(network, data, data.training_rows(0), 0, recipe, torch.float32, ALONE)
    torch.testing.assert_close(weights[0], fit.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
    for name in ("alone", "both"):
        assert broken.name in (workspace / f"working/runs/{name}_fold0/unreadable_images.tsv").read_text()


def test_a_run_that_was_cut_does_not_fit_the_head_again(workspace, tiny_recipe, monkeypatch):
    common = {"head_init": "ridge", "optimizer": "adamw", "layer_decay": 0.5}
    whole, cut = (write(workspace, tiny_recipe(prefix=name, **common)) for name in ("whole", "cut"))
    assert start(whole) == 0

    def stop(*arguments, **options):
        raise ValueError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "update", stop)
        assert start(cut) == 1
    monkeypatch.setattr(ridge_head, "fit_head", stop)
    assert start(cut) == 0
    one, other = (
        checkpoints.read(workspace / f"working/models/tiny/{name}_fold0_epoch2.pth") for name in ("whole", "cut")
    )
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


@pytest.mark.parametrize("keys", [0, 20])
def test_features_that_are_not_finite_are_refused(data, tiny_recipe, keys):
    recipe = tiny_recipe(head_init="ridge", head_keys=keys)
    model = build_model(recipe)
    with torch.no_grad():
        model.backbone.stem[0].bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="features of test_convnext are not finite; train with amp_dtype=float32"):
        ridge_head.fit_head(model, data, data.training_rows(0), 0, recipe, torch.float32, ALONE)
