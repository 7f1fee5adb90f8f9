"""Runs the whole pipeline at small scale, from data to submission, and prints one table of scores.

It executes the notebooks as a user would, in folders of its own below `working/demo/<scale>/`. A second call reuses
existing data, finished runs and their checkpoints.
"""

import argparse
import base64
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kutils.ensemble.blending import mean_cosine
from kutils.ensemble.weights import load_ensemble
from kutils.generation import shapes
from kutils.generation.image_sets import image_seed
from kutils.kaggle.submission import SUBMISSION_HEADER
from kutils.prompts import embedding
from kutils.runs import finished, launch
from kutils.system import paths
from kutils.system.constants import EMBEDDING_DIM
from kutils.system.tables import read_table

FAMILIES = ("lite0", "tiny_vit")
FOLD = 0
ENSEMBLE_SLACK = 0.002  # the ensemble may be this much below its best member on the unseen half
PAPERMILL_CHATTER = (
    r"\s*|(Executing|Ending) Cell .*|<Figure.*>|<IPython.core.display.HTML object>|The controls of this view .*|"
    r"\[IPKernelApp\] (WARNING \| Kernel is running over TCP|ERROR \| KeyboardInterrupt caught).*"
)
NUM_TEST_IMAGES = 64  # images of prompts that are in no data set, in a folder like the competition's


@dataclass(frozen=True)
class Scale:
    """How much is made and trained; `overrides` of recipes by model and stage."""

    num_prompts: int
    images_per_prompt: int
    overrides: dict[tuple[str, int], str]
    margins: dict[str, float]  # by family: cosine above the mean-prompt baseline that its models must reach
    minutes: int  # on two CPU cores, without installing the environment


LONGER = {
    ("tiny_vit", 1): "epochs=60",
    ("tiny_vit", 2): "epochs=4",
}
SCALES = {
    "quick": Scale(4000, 2, {}, {"lite0": 0.12, "tiny_vit": 0.05}, 15),
    # more images and epochs, not more prompts: the denser their graph, the more a fold is of objects of its own
    "full": Scale(4000, 4, LONGER, {"lite0": 0.12, "tiny_vit": 0.10}, 40),
}


class Demo:
    """One run of the demo: its folders, and the seconds of its steps."""

    def __init__(self, scale_name: str):
        self.notebooks = paths.repository_path("notebooks")
        self.root = paths.working_dir() / "demo"
        self.folder = self.root / scale_name
        self.scale = SCALES[scale_name]
        self.seconds: dict[str, float] = {}
        os.environ["KUTILS_INPUT"] = str(self.folder / "input")
        os.environ["KUTILS_WORKING"] = str(self.folder)

    def execute(self, step: str, notebook: str, **parameters) -> None:
        """Run a notebook by papermill; the executed copy goes to `notebooks/<step>.ipynb`, its figures to
        `figures/`."""
        print(f"\n=== {step}", flush=True)
        began = time.monotonic()
        record = self.folder / "notebooks" / f"{step}.ipynb"
        record.parent.mkdir(parents=True, exist_ok=True)
        given = [text for name, value in parameters.items() for text in ("-p", name, str(value))]
        command = [
            "papermill",
            str(self.notebooks / f"{notebook}.ipynb"),
            str(record),
            *given,
            "--log-output",
            "--no-progress-bar",
        ]
        launch.run_module(*command, hide=PAPERMILL_CHATTER)
        self.seconds[step] = round(time.monotonic() - began, 1)
        save_figures(record, self.folder / "figures")

    def train(self, model: str, stage: int) -> finished.RunResult:
        """Train (stage 1) or refine (stage 2) a model; returns the run's result."""
        notebook = "train" if stage == 1 else "refine"
        parameters = {"model": model, "fold": FOLD} | ({"stage": stage} if stage > 1 else {})
        overrides = self.scale.overrides.get((model, stage), "")
        if overrides:
            parameters["overrides"] = overrides
        self.execute(f"{notebook}_{model}", notebook, **parameters)
        return finished.read_result(launch.plan_run(model, stage, FOLD, overrides).folder)

    def make_test_images(self) -> tuple[Path, list[str]]:
        """Make a folder of test images, like the competition's, of prompts that are not in the data set; returns the
        folder and the prompts."""
        known = set(read_table(paths.input_dir() / "shapes.tsv", ["prompt"])["prompt"].to_pylist())
        fresh = [prompt for prompt in shapes.generate_prompts(2 * NUM_TEST_IMAGES, seed=1) if prompt not in known]
        fresh, folder = fresh[:NUM_TEST_IMAGES], paths.input_dir() / "competition" / "images"
        for number, prompt in enumerate(fresh):
            with paths.atomic_path(folder / f"{number:04d}.png") as temporary:
                shapes.render(prompt, image_seed(prompt, 0)).save(temporary)
        with paths.atomic_path(folder.parent / "sample_submission.csv") as temporary:
            rows = [f"0000_{dimension},0.0" for dimension in range(EMBEDDING_DIM)]
            temporary.write_text("\n".join([SUBMISSION_HEADER, *rows, ""]))
        return folder, fresh


def save_figures(record: Path, folder: Path) -> None:
    """Write the figures of an executed notebook as PNG files."""
    outputs = [output for cell in json.loads(record.read_text())["cells"] for output in cell.get("outputs", [])]
    figures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    for number, figure in enumerate(figures, start=1):
        with paths.atomic_path(folder / f"{record.stem}_{number}.png") as temporary:
            temporary.write_bytes(base64.b64decode(figure))


def score_submission(path: Path, truth: np.ndarray) -> float:
    """Mean cosine of a submission's rows with the embeddings of the prompts, as the competition computes it."""
    values = np.loadtxt(path, delimiter=",", skiprows=1, usecols=1, dtype=np.float32)
    return mean_cosine(values.reshape(truth.shape), truth)


def run_demo(scale_name: str) -> dict:
    """Everything in order; writes `working/demo/scores.json`.

    Returns: what is in that file.
    Raises: CommandFailed where a notebook fails; ValueError where a score is not what it should be.
    """
    demo, results = Demo(scale_name), {}
    sizes = {"num_prompts": demo.scale.num_prompts, "images_per_prompt": demo.scale.images_per_prompt}
    demo.execute("prepare_data", "prepare_data", **sizes)
    for model in FAMILIES:
        results[f"{model} stage 1"] = demo.train(model, 1)
        results[f"{model} stage 2"] = demo.train(model, 2)
    demo.execute("ensemble", "ensemble", config="conf/ensemble_tiny.yaml")
    fitted = load_ensemble(paths.working_dir() / "models" / "ensemble_tiny.json")
    images, test_prompts = demo.make_test_images()
    demo.execute("submission", "submission", images=images)
    demo.execute("compare", "compare")
    demo.execute("ladder", "ladder", fold=FOLD)
    demo.execute("explore", "explore", models="*_stage2_*", image=min(images.iterdir()), count=5)
    submission_path = paths.working_dir() / "submission.csv"
    truth = embedding.encode_prompts(test_prompts, progress=False)
    scores = {
        "scale": scale_name,
        "mean_prompt_baseline": next(iter(results.values())).mean_prompt_baseline,
        "models": {name: result.cosine_similarity for name, result in results.items()},
        "models_clean": {name: result.cosine_similarity_clean for name, result in results.items()},
        "ensemble": fitted.scores["chosen"],
        "ensemble_members": fitted.scores["members"],
        "submission_cosine": score_submission(submission_path, truth),
        "submission_baseline": mean_cosine(np.tile(fitted.mean_embedding, (len(truth), 1)), truth),
        "submission_rows": truth.size,
        "seconds": demo.seconds | {"total": round(sum(demo.seconds.values()), 1)},
    }
    paths.write_json(demo.root / "scores.json", scores)
    print(format_scores(scores, demo))
    check_scores(scores, demo.scale)
    return scores


def format_scores(scores: dict, demo: Demo) -> str:
    """The table of scores and times that is printed at the end."""
    baseline = scores["mean_prompt_baseline"]
    lines = [f"\n{'validation, fold 0':32}{'cosine':>8}{'gain':>9}{'clean rows':>12}"]
    lines.append(f"{'mean prompt (baseline)':32}{baseline:>8.4f}")
    for name, score in scores["models"].items():
        clean = scores["models_clean"][name]
        name = name.replace("stage 2", "stage 2 (SAM)")
        lines.append(f"{name:32}{score:>8.4f}{score - baseline:>+9.4f}" + (f"{clean:>12.4f}" if clean else ""))
    lines.append(f"\n{'unseen half of fold 0':32}{'cosine':>8}")
    lines += [f"{name:32}{score:>8.4f}" for name, score in scores["ensemble_members"].items()]
    lines.append(f"{'ensemble':32}{scores['ensemble']:>8.4f}")
    lines.append(f"\n{f'submission, {NUM_TEST_IMAGES} new prompts':32}{'cosine':>8}")
    lines.append(f"{'mean prompt (baseline)':32}{scores['submission_baseline']:>8.4f}")
    lines.append(f"{'submission.csv':32}{scores['submission_cosine']:>8.4f}{scores['submission_rows']:>9,} rows")
    lines.append("\n" + (paths.working_dir() / "ladder" / "ladder.txt").read_text().rstrip())
    lines.append(f"\n{'step':32}{'seconds':>8}")
    lines += [f"{step:32}{seconds:>8.0f}" for step, seconds in scores["seconds"].items()]
    lines.append(f"\nexecuted notebooks, figures and submission.csv: {demo.folder}")
    lines.append(f"scores: {demo.root / 'scores.json'}")
    return "\n".join(lines)


def check_scores(scores: dict, scale: Scale) -> None:
    """Raise ValueError unless every model is well above the baseline and the ensemble is not below its best member."""
    for name, score in scores["models"].items():
        margin = scale.margins[name.split()[0]]
        if not score >= scores["mean_prompt_baseline"] + margin:
            raise ValueError(f"{name} has {score:.4f}, less than {margin} above the mean-prompt baseline")
    best = max(scores["ensemble_members"].values())
    if not scores["ensemble"] >= best - ENSEMBLE_SLACK:
        raise ValueError(f"the ensemble has {scores['ensemble']:.4f} on the unseen half, its best member {best:.4f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kutils demo",
        description="The whole pipeline at small scale on the CPU: data, training, ensemble, submission, scores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    times = ", ".join(f"{name}: at most {scale.minutes} minutes on two cores" for name, scale in SCALES.items())
    parser.add_argument("--scale", choices=tuple(SCALES), default="quick", help=times)
    run_demo(parser.parse_args(argv).scale)
    return 0
