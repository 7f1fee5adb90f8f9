"""The average of the weights: by hand, in a run's files, and on two ranks."""

import numpy as np
import pytest
import torch
from fixtures.sam_on_ranks import toy_batch

from kutils import __main__
from kutils.data import datasets, transforms
from kutils.models import checkpoints, published
from kutils.models.networks import build_model
from kutils.runs.folders import read_metrics
from kutils.training import averaging, engine, network_input, optimizers


def test_by_hand(tiny_recipe):
    """Each float of the state, BatchNorm's statistics too, in float64: e = d e + (1 - d) w, with the decay of update n
    at most 1 - n ** -0.75; whole numbers are copied. SAM's perturbed weights leave no trace."""
    recipe = tiny_recipe(backbone="test_efficientnet", ema_decay=0.5, sam_rho=0.05, augment="none")
    network = build_model(recipe).train()
    average = averaging.start_average(network, recipe)
    optimizer, scaler = optimizers.build_optimizer(network, recipe), torch.amp.GradScaler("cpu", enabled=False)
    expected = {}
    for step in range(1, 6):
        engine.update(network, [toy_batch(step, size=32, dimension=384)], optimizer, scaler, recipe, torch.float32)
        average.update(network, step)
        decay = min(0.5, 1 - step**-0.75)
        for name, value in network.state_dict().items():
            now = value.numpy().astype(np.float64)
            expected[name] = expected[name] * decay + now * (1 - decay) if step > 1 else now
    counts = [name for name in expected if name.endswith("num_batches_tracked")]
    statistics = [name for name in expected if name.endswith("running_var")]
    assert counts and statistics
    for name, value in average.module.state_dict().items():
        if name in counts:
            assert value == 5
        else:
            np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    moved = (average.module.state_dict()[statistics[-1]] - network.state_dict()[statistics[-1]]).abs().max()
    assert moved > 1e-6  # the network's own are others


def test_without_the_key_there_is_none(tiny_recipe):
    network = build_model(tiny_recipe())
    assert averaging.start_average(network, tiny_recipe()) is None
    assert averaging.validated_models(network, None) == {"raw": network}


@pytest.fixture
def trained(workspace, tiny_recipe, start_ranks):
    """Train a recipe on some ranks; returns its run folder and the folder of its checkpoints."""

    def run(name, ranks, **changes):
        path = workspace / f"{name}.yaml"
        path.write_text(tiny_recipe(prefix=name, **changes).to_yaml())
        start_ranks("kutils", "train", "--config", str(path), "--fold", "0", num_ranks=ranks).run()
        working = workspace / "working"
        return working / "runs" / f"{name}_fold0", working / "models" / "tiny"

    return run


def predict(path) -> np.ndarray:
    """The embeddings of fold 0 by a checkpoint, plainly."""
    data = datasets.load_datasets(["toy"])
    model, recipe, _ = checkpoints.load_model(path)
    images = [transforms.resize_square(data.decode_image(row), 32) for row in np.flatnonzero(data.folds == 0)]
    with torch.no_grad():
        return model(network_input.normalize(torch.stack(images), recipe.mean, recipe.std)).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_both_are_validated_and_saved_and_the_better_one_is_the_best(workspace, trained, ranks):
    """BatchNorm's statistics, in the head, differ between ranks: rank 0's are saved, and all predict by them."""
    run, models = trained("both", ranks, ema_decay=0.8, head_width=12, max_local_batch_size=4, lr=3e-3)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "cosine_similarity" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["cosine_similarity"] == max(line["cosine_similarity_raw"], line["cosine_similarity_ema"])
        assert line["cosine_similarity_raw"] != line["cosine_similarity_ema"]
    data = datasets.load_datasets(["toy"])
    targets = data.targets(np.flatnonzero(data.folds == 0))
    for kind, name in (("raw", "both_fold0_epoch2.pth"), ("ema", "both_fold0_epoch2_ema.pth")):
        content = checkpoints.read(models / name)
        assert content["weights"] == kind and content["cosine_similarity"] == lines[-1][f"cosine_similarity_{kind}"]
        cosine = (predict(models / name) * targets).sum(axis=1).mean()
        assert cosine == pytest.approx(content["cosine_similarity"], abs=1e-5)
    best = checkpoints.read(models / "both_fold0_best_cossim.pth")
    assert best["cosine_similarity"] == max(line["cosine_similarity"] for line in lines)
    saved = np.load(run / "fold0_predictions.npz")
    np.testing.assert_allclose(saved["embeddings"], predict(models / "both_fold0_best_cossim.pth"), atol=2e-5)
    assert (workspace / "working" / "runs" / "both_fold0" / "result.json").is_file()


@pytest.mark.slow
def test_ranks_have_the_average_of_one_process(trained):
    changes = {"ema_decay": 0.8, "max_local_batch_size": 4, "augment": "none"}
    states = []
    for name, ranks in (("alone", 1), ("two", 2)):
        _, models = trained(name, ranks, **changes)
        states.append(checkpoints.read(models / f"{name}_fold0_epoch2_ema.pth")["model"])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=2e-4, rtol=1e-3)


def test_a_previous_run_is_moved_aside_with_both_of_its_files(workspace, tiny_recipe, monkeypatch):
    monkeypatch.setattr(__main__, "ensure_report", lambda folder: None)
    path = workspace / "tiny.yaml"
    path.write_text(tiny_recipe(epochs=1, ema_decay=0.9).to_yaml())
    for overrides in ([], ["resume=never"]):
        assert __main__.run("train", ["--config", str(path), "--fold", "0", *overrides]) == 0
    aside = workspace / "working" / "runs" / "tiny_fold0.1"
    assert {file.name for file in aside.glob("*.pth")} == {
        "tiny_fold0_best_cossim.pth",
        "tiny_fold0_epoch1.pth",
        "tiny_fold0_epoch1_ema.pth",
    }
    weights = checkpoints.read(aside / "tiny_fold0_epoch1_ema.pth")["model"]
    assert set(weights) == set(published.to_published(build_model(tiny_recipe())))
