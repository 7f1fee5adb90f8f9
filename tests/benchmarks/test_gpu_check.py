"""The check of a GPU: every part with stand-ins and few packages, parts that break, the arithmetic of its report."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures import recipe_table

from kutils.__main__ import run
from kutils.benchmarks import embedding, gpu_check, gpu_parts, gpu_report, gpu_training, measuring, step
from kutils.benchmarks.gpu_report import MeasuredRecipe, Setting
from kutils.runs import recipes
from kutils.system.paths import is_running, repository_root

ROOT = repository_root()
ABSENT = (
    "madgrad",
    "sentence_transformers",
    "diffusers",
    "papermill",
    "jupytext",
    "pymetis",
    "open_clip",
    "matplotlib",
)
ABSENT += ("scipy", "sklearn", "tensorboard", "faiss")
CPU = torch.device("cpu")


@pytest.fixture
def setting(tmp_path):
    return Setting("cpu", True, "no GPU", 0, tmp_path)


def by_name(items: list[dict], key: str = "name") -> dict[str, dict]:
    assert len({item[key] for item in items}) == len(items)
    return {item[key]: item for item in items}


# ---------------------------------------------------------------- every part


def check_without(packages: tuple[str, ...], folder: Path, *arguments: str) -> tuple[str, dict]:
    """The command with stand-ins, where packages cannot be imported: what it prints, and its `gpu.json`."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({packages!r})\n")
    command = [sys.executable, "-m", "kutils", "gpu-check", "--device", "cpu", "--tiny", "--minutes", "20", *arguments]
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run(
        [*command, "--output", str(folder / "results")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads((folder / "results" / "gpu.json").read_text())


def test_training_is_measured_with_torch_torchvision_and_timm_alone(tmp_path):
    parts = ("vit_large", "several_gpus", "loader")
    _, content = check_without((*ABSENT, "pyarrow", "pandas", "pytest"), tmp_path, "--parts", ",".join(parts))
    assert {item["part"]: (item["status"], item["reason"]) for item in content["parts"]} == {
        "vit_large": ("done", ""),
        "several_gpus": ("done", ""),
        "loader": ("skipped", "no pyarrow"),
    }


def test_every_part_runs_with_stand_ins_and_few_packages(tmp_path):
    printed, content = check_without(ABSENT, tmp_path, "--price", "2")
    parts = by_name(content["parts"], "part")
    assert list(parts) == list(gpu_check.PARTS) and content["tiny"]
    assert {name: item["reason"] for name, item in parts.items() if item["status"] != "done"} == {
        "embedding": "no sentence_transformers"
    }
    entries = by_name(content["entries"])
    networks = ("convnext_large", "vit_large", "eva02_large_clsavg", "convnext_xxlarge")
    expected = {
        f"{kind}_{model}" for model in networks for kind in ("step", "mfu", "sam", "sam_step", "sam_checkpointing")
    }
    expected |= {"gpu_tests", "float16_convnext_large", "compiling_convnext_large", "compiled_convnext_large"}
    kinds = ("plain", "sam_local", "sam_averaged")
    expected |= {f"{what}_2_{kind}" for what in ("ranks", "scaling") for kind in kinds}
    expected |= {"wait_shards_1", "wait_webp_1", "similar_pairs_1000000", "similar_pairs_3378588"}
    expected |= {"nearest_of_3378588_1", "nearest_of_3378588_256", "similar_pairs_fused"}
    expected |= {"predict_ensemble_float16", "predict_float16_cosine", "resume"}
    assert set(entries) == expected
    assert entries["step_vit_large"]["reference"] > 0 and entries["predict_float16_cosine"]["ours"] > 0.99
    advice = by_name(content["advice"], "recipe")
    assert len(advice) == 12 and all(item["cost"] == 2 * item["gpu_hours"] > 0 for item in advice.values())
    output = tmp_path / "results"
    page = (output / "gpu.md").read_text()
    assert page in printed and "Stand-ins were run" in page
    assert "test_half_precision" not in page and "test_diffusion.py: skipped: " in page  # diffusers is absent
    assert "test_an_update_does_not_wait_for_a_gpu[plain-False]: skipped" in page
    assert "5 updates profiled" in page and not list(output.glob("made_*"))


def test_the_parts_are_those_that_have_a_limit(setting):
    assert set(gpu_check.PARTS) == set(gpu_parts.PARTS)


def test_embedding_is_measured_where_its_packages_are(setting, monkeypatch):
    entry = measuring.make_entry("embed_prompts", "s", [1.0])
    monkeypatch.setattr(embedding, "measure_embedding", lambda texts, repeats: [entry] * len(set(texts)))
    assert list(gpu_parts.embedding(setting)) == [entry] * 64


# ---------------------------------------------------------------- parts that break


def test_what_breaks_loses_nothing_of_the_others(setting, monkeypatch, capsys):
    """All parts have minutes but the one that hangs, which has 10 s; the last would need days."""
    names = ("done", "killed", "crashed", "raised", "hung", "lacking", "importing", "late")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests'}:{ROOT}")
    monkeypatch.setattr(gpu_check, "MODULE", "fixtures.breaking_parts")
    monkeypatch.setattr(gpu_check, "PARTS", dict.fromkeys(names, 120) | {"hung": 10, "late": 10**6})
    monkeypatch.setattr(gpu_check, "STOP_SECONDS", 0.3)
    (setting.folder / "late.json").write_text('{"of": "an earlier call"}')
    gpu_check.check(setting, names, gpu_check.MINUTES)
    records = gpu_check.read_records(setting)
    assert [record["part"] for record in records] == list(names)
    outcomes = {record["part"]: (record["status"], record["reason"]) for record in records}
    assert outcomes["done"] == ("done", "")
    assert outcomes["killed"] == ("failed", "it was ended by SIGKILL")
    assert outcomes["crashed"] == (
        "failed",
        "it ended with exit code 7 and no result; its last line: what it said last",
    )
    assert outcomes["raised"] == ("failed", "ValueError: wrong")
    assert outcomes["hung"] == ("failed", "it took more than its 10 s")
    assert outcomes["lacking"] == ("skipped", "one GPU")
    assert outcomes["importing"] == ("skipped", "no package_that_is_not_there")
    assert outcomes["late"][0] == "skipped" and outcomes["late"][1].startswith("not started: ")
    assert not is_running(int((setting.folder / "child.pid").read_text()))

    page = gpu_check.save_results(setting.folder, {"card": "no GPU"}, records, price=0)
    assert "| killed | failed |" in page and "it took more than its 10 s" in page and "a note" in page
    content = json.loads((setting.folder / "gpu.json").read_text())
    before = ("before_the_kill", "before_the_crash", "before_the_limit", "before_the_import")
    assert [item["name"] for item in content["entries"]] == ["first", *before]
    assert [item["recipe"] for item in content["advice"]] == ["convnext_large, stage 1", "vit_large, stage 1"]
    assert "5 of 8, hung: failed after " in capsys.readouterr().out


def test_what_was_measured_is_written_at_an_interrupt(tmp_path, monkeypatch, capsys):
    def interrupted(setting, chosen, minutes):
        record = {"part": "tests", "card": setting.card, "tiny": True, "seconds": 1.0, "reason": ""}
        record |= {"entries": [], "recipes": [], "notes": []}
        for name, changes in (
            ("tests", {"status": "done"}),
            ("pairs", {"status": "running"}),
            ("resume", {"card": "x"}),
        ):
            (tmp_path / f"{name}.json").write_text(json.dumps(record | {"part": name} | changes))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "check", interrupted)
    monkeypatch.setattr(gpu_check, "interrupt_once", lambda message: None)
    assert run("gpu-check", ["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 130
    page = (tmp_path / "gpu.md").read_text()
    assert "| tests | done | 1 |" in page and "| pairs | failed | 1 | it was stopped |" in page
    assert "| resume |" not in page  # of another card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "pair"], "no part 'pair'; did you mean 'pairs'"),
        (["--device", "cpu"], "--device cpu --tiny runs every part with stand-ins"),
        (["--device", "cpu", "--tiny", "--minutes", "0"], "--minutes 0: give more than 0"),
        ([], "no GPU is visible"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("gpu-check", [*arguments, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- memory, hours, targets


def test_a_batch_that_does_not_fit_is_halved(setting, monkeypatch):
    recipe, tried = gpu_training.untrained_recipe("vit_large", 1, setting), []

    def with_memory(device, make, use):
        use(make())
        tried.append(make.args[0].max_local_batch_size)
        if tried[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "trainer", 5

    monkeypatch.setattr(step, "with_memory", with_memory)
    fits = 1
    smaller, trainer, peak = gpu_training.build_fitting(recipe, CPU)
    assert tried == [4, 2, 1] and (smaller.max_local_batch_size, trainer, peak) == (1, "trainer", 5)
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        gpu_training.build_fitting(recipe, CPU)


def test_the_batch_that_a_memory_holds():
    """10 GB of weights and 1 GB per image: 0.92 * 80 = 73.6 GB leave 63.6."""
    assert gpu_training.most_images(32, 42 * 10**9, 26 * 10**9, 80 * 10**9) == 63
    assert gpu_training.most_images(32, 10**9, 10**9, 80 * 10**9) is None


def test_hours_and_cost_of_recipes():
    """ConvNeXt-L, stage 1: 578,456 images in 15 epochs, of which 3 go forward alone, a third of the work."""
    measured = [
        MeasuredRecipe("convnext_large", 1, 32, 500.0, 40.0, 100),
        MeasuredRecipe("eva02_large_clsavg", 2, 16, 100.0, 9, None),
    ]
    advice = by_name(gpu_report.recipe_costs(list(map(dataclasses.asdict, measured)), price=3.0), "recipe")
    first = advice["convnext_large, stage 1"]
    assert first["gpu_hours"] == pytest.approx(578_456 * 13 / 500 / 3600) and first["batch"] == 64
    assert first["cost"] == pytest.approx(3 * first["gpu_hours"])
    epoch = 3_040_729 / 100 / 3600
    hours = {name: item["gpu_hours"] for name, item in advice.items() if name.startswith("eva02")}
    stages = {"clsavg, stage 2": 3, "clsavg, stage 3": 1, "clsonly, stage 2": 3}
    assert hours == {f"eva02_large_{name}": pytest.approx(epochs * epoch) for name, epochs in stages.items()}
    assert len(advice) == 4 and advice["eva02_large_clsavg, stage 3"]["batch"] == 16


def test_targets_say_what_falls_short():
    ours = {"step_convnext_large": ([90.0], [50.0]), "sam_convnext_large": ([2.2], []), "wait_shards_8": ([1.0], [])}
    entries = [dataclasses.asdict(measuring.make_entry(name, "", *values, more=True)) for name, values in ours.items()]
    lines = {item["target"].split(":")[0]: (item["measured"], item["met"]) for item in gpu_report.targets(entries)}
    assert lines == {
        "step_convnext_large": (1.8, True),
        "sam_convnext_large": (2.2, False),
        "wait_shards_8": (1.0, True),
    }


def test_the_table_of_recipes_takes_measured_hours(monkeypatch, tmp_path):
    """Those of the committed record, named by its card; what was not measured stays an estimate and says so."""
    update = dataclasses.asdict(MeasuredRecipe("convnext_large", 1, 32, 500.0, 40.2, 100))
    record = {"machine": {"card": "NVIDIA X"}, "tiny": False, "recipes": [update]}
    monkeypatch.setattr(gpu_report, "RECORD", tmp_path / "gpu.json")
    assert recipe_table.measured() is None
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    assert recipe_table.measured() == record
    head, rule = recipe_table.header(record).splitlines()
    assert "| hours on 8 x NVIDIA X, each as fast as one | memory of its batch, GB |" in head
    path = recipes.find_recipe("convnext_large", 1)
    row = recipe_table.row(path, record)
    assert row.endswith("| 0.5 | 40 (32 images) |") and head.count("|") == rule.count("|") == row.count("|")
    other = recipe_table.row(recipes.find_recipe("convnext_large", 2), record)
    assert other.endswith("| 6.8 on 8 x A100 (estimate) |  |") and recipe_table.row(path).endswith("| 1.3 |")
    (tmp_path / "gpu.json").write_text(json.dumps(record | {"tiny": True}))
    with pytest.raises(AssertionError, match="holds stand-ins"):
        recipe_table.measured()
