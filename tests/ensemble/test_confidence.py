"""What a prediction's length says: by hand, and for trained runs against their own predictions."""

import numpy as np
import pytest

from kutils import __main__
from kutils.data import datasets
from kutils.ensemble import confidence, trained_models
from kutils.ensemble.confidence import Confidence


def test_a_length_by_hand():
    """A hundred validation images; the cosine of the i-th shortest prediction is i / 100."""
    order = np.random.default_rng(0).permutation(100)
    known = Confidence.measure(3, order + 1.0, order / 100)
    assert known.shorter(0.5) == 0 and known.shorter(50.5) == 0.5 and known.shorter(1000) == 1
    assert known.expected(50.5) == pytest.approx(np.arange(45, 55).mean() / 100)
    assert known.expected(0) == pytest.approx(np.arange(10).mean() / 100)  # the shortest tenth, and below the longest
    assert known.expected(1000) == pytest.approx(np.arange(90, 100).mean() / 100)
    assert known.describe(50.5) == (
        "confidence: longer than 50% of the predictions of fold 3; there, predictions of such a length have a mean "
        "cosine of 0.49 with the true prompts (all: 0.49)"
    )


def test_few_validation_images_are_no_error():
    known = Confidence.measure(0, np.array([2.0, 1.0]), np.array([0.4, 0.2]))
    assert known.expected(1.5) == pytest.approx(0.4) and known.expected(9) == 0.4 and known.expected(0) == 0.2


def test_a_run_is_asked_with_the_confidence_of_its_validation(finished, capsys):
    """The length of an image's prediction is that of what the head gives; its place among the others by counting."""
    (model,) = trained_models.find_models(["first_fold0"])
    data = datasets.load_datasets(["toy"])
    rows = np.flatnonzero(data.folds == 0)
    image = data.image_path(rows[3])
    predicted = trained_models.embed_images([model], [image], device="cpu", unit_rows=False)["first_fold0"]
    with np.load(model.folder / "fold0_predictions.npz") as saved:
        lengths, embeddings = saved["lengths"], saved["embeddings"]
    assert np.linalg.norm(predicted[0]) == pytest.approx(lengths[3], rel=1e-4)
    np.testing.assert_allclose(predicted[0] / np.linalg.norm(predicted[0]), embeddings[3], atol=1e-5)
    known = confidence.of_run(model.folder)
    cosines = np.einsum("nd,nd->n", embeddings, np.load(finished / "input" / "toy.npy")[rows])
    assert known.lengths.tolist() == sorted(lengths.tolist())
    np.testing.assert_allclose(known.cosines, cosines[np.argsort(lengths)], atol=1e-6)

    assert __main__.run("ask", [str(image), "--model", "first_fold0", "-k", "2"]) == 0
    share = np.mean(lengths < lengths[3])
    shown = capsys.readouterr().out
    assert f"confidence: longer than {share:.0%} of the predictions of fold 0" in shown
    assert f"(all: {cosines.mean():.2f})" in shown


def test_a_run_of_an_earlier_version_is_asked_without(finished, capsys):
    (model,) = trained_models.find_models(["first_fold0"])
    path = model.folder / "fold0_predictions.npz"
    with np.load(path) as saved:
        former = {name: saved[name] for name in saved.files if name != "lengths"}
    content = path.read_bytes()
    try:
        np.savez(path, **former)
        assert confidence.of_run(model.folder) is None
        image = finished / "input" / "toy_images" / "0003_1.png"
        assert __main__.run("ask", [str(image), "--model", "first_fold0", "-k", "2"]) == 0
        assert "confidence" not in capsys.readouterr().out
    finally:
        path.write_bytes(content)
