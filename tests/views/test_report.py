"""A run's report: one file that needs nothing else, with the run's numbers, whatever has become of its data."""

import base64
import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from fixtures.datasets import use_folders
from fixtures.finished_runs import FAST, SCRIPT
from PIL import Image

from kutils.__main__ import run as run_command
from kutils.data import datasets
from kutils.runs import recipes
from kutils.runs.finished import FinishedRun, read_result, read_run
from kutils.system import paths
from kutils.system.tables import read_table, write_table
from kutils.training import examples
from kutils.views import html_page, report


class Page(HTMLParser):
    """Tags with their attributes, texts, and what stands below every heading."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open, self.sections = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if (self.open and self.open[-1] in ("style", "script")) or not data.strip():
            return
        text = data if "pre" in self.open else " ".join(data.split())  # as a browser shows it
        self.texts.append(text)
        if self.open[-1] == "h2":
            self.sections[text] = []
        elif self.sections:
            list(self.sections.values())[-1].append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read_page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """A copy of `trained`, to be looked at only: its runs with their reports."""
    root = tmp_path_factory.mktemp("reported") / "root"
    shutil.copytree(trained, root)
    with pytest.MonkeyPatch.context() as patch:
        use_folders(patch, root)
        assert run_command("report", ["*"]) == 0
    return root


def test_a_page_needs_nothing_else(reported):
    folder = reported / "working" / "runs" / "first_fold0"
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = read_page(folder)
    assert not re.search(r"https?:|url\(|@import|src='/|href='[^#]", text)
    assert len(text) < 3e6 and not page.all("link")
    (policy,) = [each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "sha256-" in policy
    assert "unsafe" not in policy.split("script-src")[1] and text.count("<script") == 1
    images = page.all("img")
    assert len(images) == 4 + 6  # curves, histogram, slices, speed; three best and three worst of six prompts
    for image in images:
        assert len(image["alt"]) > 20
        kind, _, content = image["src"].removeprefix("data:image/").partition(";base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        assert picture.format.lower() == kind and np.asarray(picture.convert("L")).std() > 1
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids) and {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert len(page.all("a")) == len(page.sections) == 8


def test_the_numbers_are_those_of_the_run(reported, monkeypatch):
    use_folders(monkeypatch, reported)
    folder = reported / "working" / "runs" / "first_fold0"
    result = json.loads((folder / "result.json").read_text())
    page = read_page(folder)
    score, base = result["cosine_similarity"], result["mean_prompt_baseline"]
    for number in (f"{score:.4f}", f"{base:.4f}", f"{score - base:+.4f}"):
        assert number in page.texts
    row = page.texts.index("all rows")
    assert page.texts[row + 1 : row + 4] == [str(result["validation_rows"]), f"{score:.4f}", f"{score - base:+.4f}"]
    told = page.sections["Scores by slice"]
    data = datasets.load_datasets(["toy"])
    rows = data.validation_rows(0)
    with np.load(folder / "fold0_predictions.npz") as saved:
        cosines = (saved["embeddings"] * data.targets(rows)).sum(axis=1)
    short = rows // 2 % 20 < 10  # prompts 0, 10, ..., 50: those of tens 0, 2 and 4
    for name, own in (("short", cosines[short]), ("long", cosines[~short])):
        position = told.index(name)
        assert told[position + 1 : position + 3] == [str(len(own)), f"{own.mean():.4f}"]
    expected = []
    for title, order in (("Best", np.argsort(-cosines)[:6]), ("Worst", np.argsort(cosines)[:6])):
        prompts = dict.fromkeys(rows[order] // 2)  # two images each; 12 in all, six better and six worse ones
        first = [next(index for index in order if rows[index] // 2 == prompt) for prompt in prompts][: report.EXAMPLES]
        expected += [title, *(f"cosine {cosines[index]:.3f}" for index in first)]
    shown = page.sections["Best and worst"]
    assert [text for text in shown if text in ("Best", "Worst") or text.startswith("cosine ")] == expected


def test_the_histogram_says_its_quantiles(reported, monkeypatch):
    use_folders(monkeypatch, reported)
    page = read_page(reported / "working" / "runs" / "first_fold0")
    run = read_run(reported / "working" / "runs" / "first_fold0")
    ordered = sorted(examples.validation_table(run.recipe, 0, run.folder)["cosine"])
    assert len(ordered) == 12  # between two values the quantiles are interpolated: places 0.55, 5.5 and 10.45
    low, middle, high = (
        ordered[place] + share * (ordered[place + 1] - ordered[place])
        for place, share in ((0, 0.55), (5, 0.5), (10, 0.45))
    )
    caption = (
        f"Histogram of 12 cosines: median {middle:.3f}, 5th percentile {low:.3f}, 95th percentile {high:.3f}, "
        f"from {ordered[0]:.3f} to {ordered[-1]:.3f}."
    )
    assert page.sections["Scores"][-1] == caption and caption in [image["alt"] for image in page.all("img")]


def test_the_figures_say_what_they_show(reported):
    """In the texts for those who do not see them, too."""
    folder = reported / "working" / "runs" / "first_fold0"
    page, run = read_page(folder), read_run(folder)
    curves, _, slice_means, speed = [image["alt"] for image in page.all("img") if "prompt:" not in image["alt"]]
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    assert curves == (
        f"Curves over {run.result.updates} updates: the training loss goes from {losses[0]:.3f} to {losses[-1]:.3f}, "
        f"the validation cosine reaches {run.result.cosine_similarity:.4f} in epoch {run.result.best_epoch}; the mean "
        f"prompt has {run.result.mean_prompt_baseline:.4f}."
    )
    told = page.sections["Scores by slice"]
    short, long = (float(told[told.index(name) + 2]) for name in ("short", "long"))
    best, worst = ("short", "long") if short > long else ("long", "short")
    assert (
        f"by kind, best for {best} ({max(short, long):.4f}) and worst for {worst} ({min(short, long):.4f})"
        in slice_means
    )
    pace, waiting = run.pace
    assert f"{pace:,.0f} on average; {waiting:.1%} of the time" in speed


def test_the_best_and_the_worst_image_of_a_prompt_are_two(finished):
    """With two prompts of four images each, all best and worst images are of both, and no image is among both."""
    rows = np.arange(8)
    table = pd.DataFrame({"row": rows, "prompt": list("aababbab"), "cosine": rows / 10})
    table["embedding"] = list(np.load(finished / "input" / "toy.npy")[:8])
    recipe = read_run(finished / "working" / "runs" / "first_fold0").recipe
    chosen = examples.choose_extremes(table, recipe, count=4)
    assert chosen["row"].tolist() == [7, 6, 0, 2] and chosen["best"].tolist() == [True, True, False, False]
    assert examples.choose_extremes(table, recipe, count=1)["row"].tolist() == [7, 0]
    assert examples.choose_extremes(table[:1], recipe)["best"].tolist() == [True]


def test_a_prompt_is_text(reported):
    text = (reported / "working" / "runs" / "first_fold0" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and f"true: {SCRIPT}" in Page(text).texts


def test_the_configuration_is_held_against_the_recipe_and_the_command_makes_it_again(reported):
    page = read_page(reported / "working" / "runs" / "second_fold0")
    environment = json.loads((reported / "working" / "runs" / "second_fold0" / "environment.json").read_text())
    assert environment["config"] == "conf/tiny_convnext_stage1.yaml"
    assert environment["overrides"] == ["prefix=second", *FAST, "lr=1e-4", "seed=3"]
    told = page.sections["Configuration"]
    assert "differ from conf/tiny_convnext_stage1.yaml: " in told[0] and "lr" in told[0].split(": ")[1].split(", ")
    position = told.index("lr")
    assert told[position : position + 3] == ["lr", "0.0001", "0.005"]
    (command,) = [text for text in page.sections["Run it again"] if "python -m kutils train" in text]
    command = command.splitlines()[-1]
    assert shlex.split(command)[:4] == ["python", "-m", "kutils", "train"]
    arguments = shlex.split(command)[4:]
    assert arguments[:4] == ["--config", "conf/tiny_convnext_stage1.yaml", "--fold", "0"]
    saved = recipes.load_recipe(reported / "working" / "runs" / "second_fold0" / "config.yaml")
    assert recipes.load_recipe(arguments[1], arguments[4:]) == saved


def test_a_run_whose_data_has_changed_says_so(finished):
    folder = finished / "working" / "runs" / "first_fold0"
    path = finished / "input" / "toy.npy"
    np.save(path, np.roll(np.load(path), 2, axis=0))
    assert report.write_report(folder) == folder / "report.html"
    page = read_page(folder)
    for section in ("Scores", "Scores by slice", "Best and worst"):
        assert any("was made for other validation rows" in text for text in page.sections[section])
    assert f"{read_result(folder).cosine_similarity:.4f}" in page.texts and len(page.all("img")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost", ["toy.tsv", "toy_images", "predictions", "environment.json", "damaged environment.json", "metrics.jsonl"]
)
def test_what_is_gone_is_said(finished, lost):
    folder = finished / "working" / "runs" / "first_fold0"
    if lost == "toy_images":
        (finished / "input" / "toy_images").rename(finished / "elsewhere")
        said = ["input/toy_images/0"]
    elif lost == "toy.tsv":
        (finished / "input" / lost).unlink()
        said = ["Not shown: data set 'toy': toy.tsv not in"]
    elif lost == "damaged environment.json":
        (folder / "environment.json").write_bytes(b'{"started": "20')
        said = ["Not shown: environment.json is gone or damaged."]
    else:
        (folder / ("fold0_predictions.npz" if lost == "predictions" else lost)).unlink()
        said = ["fold0_predictions.npz"] if lost == "predictions" else [f"Not shown: {lost}"]
    report.write_report(folder)
    page = read_page(folder)
    for text in said:
        assert any(text in each for each in page.texts), text
    assert f"{read_result(folder).cosine_similarity:.4f}" in page.texts


def test_waiting_and_unreadable_images_are_told(finished):
    folder = finished / "working" / "runs" / "first_fold0"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"data_wait": 0.25} if "data_wait" in line else {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    replace(read_result(folder), unreadable_images=1).write(folder)
    write_table(folder / "unreadable_images.tsv", {"row": ["7"], "image": ['toy_images/"x.png'], "reason": ["cut"]})
    report.write_report(folder)
    page = read_page(folder)
    speed = " ".join(page.sections["Speed"])
    cores = json.loads((folder / "environment.json").read_text())["cores"]
    assert "25% of the time" in speed and f"{cores} core" in speed and "num_workers=1 instead of 0" in speed
    assert f"kutils shards {finished}/input/toy.tsv --size 37" in speed and "GPU memory" not in speed
    assert 'toy_images/"x.png' in page.sections["Unreadable images"]


def test_the_memory_of_a_gpu_and_a_machine_that_nobody_told(finished):
    folder = finished / "working" / "runs" / "first_fold0"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line, held in zip((line for line in lines if "data_wait" in line), (7.5, 61.23, 61.23), strict=False):
        line |= {"gpu_memory_gb": held, "data_wait": 0.9}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = json.loads((folder / "environment.json").read_text())
    paths.write_json(folder / "environment.json", environment | {"gpu_gb": 79.6})
    values = report.speed_values(read_run(folder))
    assert values["speed_numbers"]["GPU memory, at most"] == "61.2 of 80 GB"
    for name in ("cores", "ranks_per_machine"):
        del environment[name]
    paths.write_json(folder / "environment.json", environment)
    values = report.speed_values(read_run(folder))
    assert values["speed_numbers"]["GPU memory, at most"] == "61.2 GB"
    assert "More num_workers than 0 help where there are cores for them." in values["advice"]


def test_pace_counts_an_interval_by_its_time(finished):
    run = read_run(finished / "working" / "runs" / "first_fold0")  # batches of 16
    logged = [
        {"epoch": 1, "step": 10, "images_per_second": 160.0, "data_wait": 0.1},  # 1 s
        {"epoch": 1, "step": 20, "cosine_similarity": 0.5},
        {"epoch": 2, "step": 30, "images_per_second": 80.0, "data_wait": 0.4},  # 320 images: 4 s
    ]
    pace, waiting = FinishedRun(run.folder, run.recipe, run.result, {}, logged).pace
    assert pace == pytest.approx(480 / 5) and waiting == pytest.approx((0.1 * 1 + 0.4 * 4) / 5)
    assert np.isnan(FinishedRun(run.folder, run.recipe, run.result, {}, []).pace).all()
    with pytest.raises(ValueError, match="holds no finished run"):
        read_run(finished)


def test_a_second_start_writes_what_is_missing_and_an_error_costs_no_run(finished, monkeypatch, capsys):
    folder = finished / "working" / "runs" / "first_fold0"
    arguments = ["--config", "conf/tiny_convnext_stage1.yaml", "--fold", "0", "prefix=first", *FAST]
    assert run_command("train", arguments) == 0 and (folder / "report.html").is_file()
    written = (folder / "report.html").stat().st_mtime_ns
    assert run_command("train", arguments) == 0 and (folder / "report.html").stat().st_mtime_ns == written
    (folder / "report.html").unlink()

    def broken(*arguments, **values):
        raise RuntimeError("no room")

    monkeypatch.setattr(html_page, "fill_template", broken)
    capsys.readouterr()
    assert run_command("train", arguments) == 0 and not (folder / "report.html").exists()
    assert f"no report (RuntimeError: no room); make it with: kutils report {folder}" in capsys.readouterr().out


def test_command(finished, capsys):
    folders = [finished / "working" / "runs" / name for name in ("first_fold0", "second_fold0", "first_fold1")]
    assert run_command("report", []) == 0
    assert capsys.readouterr().out.split() == [str(folders[2] / "report.html")]  # the last one
    assert run_command("report", ["*_fold0"]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.html") for folder in folders[:2]]
    assert run_command("report", ["frst_fold0"]) == 1
    assert re.search(r"error: no finished run 'frst_fold0' .*; did you mean 'first_fold0'", capsys.readouterr().err)


def test_a_bad_run_costs_the_others_no_report(finished, capsys):
    lacking, damaged, good = (
        finished / "working" / "runs" / name for name in ("first_fold0", "second_fold0", "first_fold1")
    )
    edited = lacking.with_name("edited_fold0")
    shutil.copytree(lacking, edited)
    lines = [json.loads(line) for line in (edited / "metrics.jsonl").read_text().splitlines()]
    del lines[1]["lr"]
    (edited / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths.write_json(lacking / "result.json", {"fold": 0})
    (damaged / "result.json").write_text("{")
    assert run_command("report", ["*"]) == 1
    printed = capsys.readouterr()
    assert printed.out.split() == [str(good / "report.html")]
    assert f"{lacking}/result.json lacks prefix" in printed.err and f"{damaged}/result.json is damaged" in printed.err
    assert f"{edited}/metrics.jsonl, line 2 has no number for lr; remove the line" in printed.err
    assert len(printed.err.splitlines()) == 3


def test_a_resumed_run_says_when(finished):
    folder = finished / "working" / "runs" / "first_fold0"
    environment = json.loads((folder / "environment.json").read_text())
    times = {"started": "2026-01-01 10:00:00", "resumed": "2026-01-02 11:00:00"}
    paths.write_json(folder / "environment.json", environment | times)
    report.write_report(folder)
    texts = " ".join(read_page(folder).texts)
    assert "Started 2026-01-01 10:00:00 (last resumed 2026-01-02 11:00:00), trained for" in texts


def test_what_a_report_looks_through_is_bounded(finished, monkeypatch):
    run = read_run(finished / "working" / "runs" / "first_fold0")
    table = examples.validation_table(run.recipe, 0, run.folder)
    monkeypatch.setattr(examples, "MOST_PROMPTS", 1)
    assert examples.choose_extremes(table, run.recipe)["nearest"].nunique() == 1


def test_a_validation_table_tells_its_rows(finished):
    run = read_run(finished / "working" / "runs" / "first_fold0")
    table = examples.validation_table(run.recipe, 0, run.folder)
    data = datasets.load_datasets(["toy"])
    assert sorted(table["row"]) == data.validation_rows(0).tolist() and table["cosine"].is_monotonic_increasing
    prompts = read_table(finished / "input" / "toy.tsv", ["prompt"])["prompt"]
    assert [prompts[row].as_py() for row in table["row"]] == table["prompt"].tolist()
