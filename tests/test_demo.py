"""The demo's own arithmetic; the pipeline itself is run by `make demo`."""

import base64
import json

import numpy as np
import pytest
from fixtures.datasets import unit_rows

from kutils import demo
from kutils.kaggle.submission import write_submission

SCORES = {"mean_prompt_baseline": 0.5, "models": {"lite0 stage 1": 0.621, "tiny_vit stage 1": 0.551}, "ensemble": 0.559}
SCORES |= {"ensemble_members": {"a": 0.56, "b": 0.55}}


def test_scores_that_are_good_enough_pass():
    demo.check_scores(SCORES, demo.SCALES["quick"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"lite0 stage 1": 0.62, "tiny_vit stage 1": 0.549}}, r"tiny_vit stage 1 has 0.5490"),
        ({"models": {"lite0 stage 2": 0.619, "tiny_vit stage 1": 0.56}}, r"lite0 stage 2 has 0.6190"),
        ({"models": {"lite0": float("nan")}}, r"lite0 has nan"),
        ({"ensemble": 0.557}, r"ensemble has 0.5570.*best member 0.5600"),
    ],
)
def test_scores_that_are_not_good_enough_stop_it(change, message):
    with pytest.raises(ValueError, match=message):
        demo.check_scores(SCORES | change, demo.SCALES["quick"])


def test_submission_is_scored_as_the_competition_does(tmp_path):
    truth, noise = unit_rows(5, seed=1), unit_rows(5, seed=2)
    write_submission(tmp_path / "s.csv", [str(number) for number in range(5)], truth)
    assert demo.score_submission(tmp_path / "s.csv", truth) == pytest.approx(1, abs=1e-5)
    expected = np.mean([truth[number] @ noise[number] for number in range(5)])
    assert demo.score_submission(tmp_path / "s.csv", noise) == pytest.approx(expected, abs=1e-5)


def test_figures_are_taken_out_of_a_notebook(tmp_path):
    png = base64.b64encode(b"a figure").decode()
    cells = [{"outputs": [{"data": {"image/png": png, "text/plain": "x"}}, {"name": "stdout"}]}, {"source": "text"}]
    (tmp_path / "train.ipynb").write_text(json.dumps({"cells": cells}))
    demo.save_figures(tmp_path / "train.ipynb", tmp_path / "figures")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["train_1.png"]
    assert (tmp_path / "figures" / "train_1.png").read_bytes() == b"a figure"
