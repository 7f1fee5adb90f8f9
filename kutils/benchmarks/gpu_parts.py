"""Runs one part of `kutils gpu-check` in a process of its own, and saves each result at once.

A part is a generator of entries, measured recipes and notes. What it lacks on this machine makes it "skipped".
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from kutils.benchmarks import gpu_ranks, gpu_training, measuring
from kutils.benchmarks.gpu_report import MeasuredRecipe, Setting, Skipped
from kutils.system import paths
from kutils.system.constants import EMBEDDING_DIM

PAIRS = (1_000_000, 3_378_588)  # rows; the second as many as the six published sets have prompts
THRESHOLD, NEIGHBOURS = 0.7, 10
COMPARED = 20_000  # rows among which a GPU must find what the CPU finds
SPARE_BYTES = 3 * 10**9  # of a GPU's memory that are left when it has to halve its batches
TRAINING_ROWS = 200  # of the run that is killed


def run_part(name: str, setting: Setting) -> None:
    """Run a part, and save its record into the results' folder at its start, after every result and at its end."""
    record = {"part": name, "status": "running", "reason": "", "seconds": 0.0}
    record |= {"card": setting.card, "tiny": setting.tiny}
    record |= {"entries": [], "recipes": [], "notes": []}
    began = time.monotonic()

    def save(**changes) -> None:
        record.update(changes, seconds=time.monotonic() - began)
        paths.write_json(setting.folder / f"{name}.json", record)

    save()
    try:
        for item in PARTS[name](setting):
            if isinstance(item, str):
                record["notes"].append(item)
            else:
                kind = "recipes" if isinstance(item, MeasuredRecipe) else "entries"
                record[kind].append(dataclasses.asdict(item))
            save()
        save(status="done")
    except (Skipped, ModuleNotFoundError) as error:
        missing = getattr(error, "name", None)
        save(status="skipped", reason=f"no {missing}" if missing else str(error))
    except Exception as error:
        traceback.print_exc()
        save(status="failed", reason=f"{type(error).__name__}: {error}".splitlines()[0])


# ---------------------------------------------------------------- tests


class Outcomes:
    """A plugin of pytest that notes how each test ended."""

    def __init__(self):
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.outcome + (f": {report.longrepr[2]}" if report.skipped else "")

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            message = str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()
            self.of[report.nodeid] = f"{'skipped' if 'ModuleNotFoundError' in message else 'failed'}: {message}"


def gpu_tests(setting: Setting) -> Iterator:
    """The tests marked `gpu`."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("no pytest")
    import pytest

    root, outcomes = paths.repository_root(), Outcomes()
    os.chdir(root)
    files = [path for path in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    options = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest.main([*options, *map(str, files)], plugins=[outcomes])
    passed = [name for name, outcome in outcomes.of.items() if outcome == "passed"]
    yield measuring.make_entry("gpu_tests", "tests passed", [len(passed)])
    yield "\n".join(f"{name}: {outcome}" for name, outcome in outcomes.of.items())
    failed = [name for name, outcome in outcomes.of.items() if outcome.startswith("failed")]
    if failed or not outcomes.of:
        raise ValueError(f"{len(failed)} of {len(outcomes.of)} failed: {', '.join(failed)}")


# ---------------------------------------------------------------- prompts


def similar_rows(setting: Setting) -> Iterator:
    """All similar pairs among made rows, and the ten nearest of them."""
    from kutils.benchmarks.similarity import measure_fused
    from kutils.prompts import similarity

    device, sizes = gpu_training.prepare_device(setting), (2_000, 6_000) if setting.tiny else PAIRS
    rows = made_rows(sizes[-1], device)
    some = rows[: min(COMPARED, sizes[0])]
    here, there = (similarity.similar_pairs(some, THRESHOLD, device=name) for name in (setting.device, "cpu"))
    if not all(np.array_equal(a, b) for a, b in zip(here[:2], there[:2], strict=True)):
        raise ValueError(f"{setting.device} finds {len(here.first):,} pairs, the CPU others: {len(there.first):,}")
    for size, full_size in zip(sizes, PAIRS, strict=True):
        began = time.monotonic()
        found = similarity.similar_pairs(rows[:size], THRESHOLD, device=setting.device)
        seconds = time.monotonic() - began
        yield measuring.make_entry(f"similar_pairs_{full_size}", f"s, {len(found.first):,} pairs", [seconds])
        gpu_training.free_memory(device)
    yield from nearest_rows(rows, setting)
    yield measure_fused(rows[: sizes[0]], setting.device)


def made_rows(count: int, device: torch.device) -> np.ndarray:
    """float32 [count, 384], unit rows, in groups of five neighbours."""
    random, rows = torch.Generator(device).manual_seed(0), np.empty((count, EMBEDDING_DIM), np.float32)
    for start in range(0, count, 100_000):
        size = min(100_000, count - start)
        centres = torch.randn(-(-size // 5), EMBEDDING_DIM, device=device, generator=random)
        block = centres.repeat_interleave(5, dim=0)[:size]
        block = block + 0.5 * torch.randn(size, EMBEDDING_DIM, device=device, generator=random)
        rows[start : start + size] = torch.nn.functional.normalize(block, dim=1).cpu().numpy()
    return rows


def nearest_rows(rows: np.ndarray, setting: Setting) -> Iterator:
    """Seconds for the ten nearest rows of one embedding, and of 256."""
    import pyarrow as pa

    from kutils.data.prompt_bank import PromptBank

    bank = PromptBank(pa.array(np.arange(len(rows))).cast(pa.large_string()), rows)
    for count in (1, 256):
        chosen = np.linspace(0, len(rows) - 1, count, dtype=int)
        began = time.monotonic()
        found, _ = bank.nearest(rows[chosen], NEIGHBOURS, device=setting.device)
        seconds = time.monotonic() - began
        if not np.array_equal(found[:, 0], chosen):
            raise ValueError("rows are not the nearest to themselves")
        yield measuring.make_entry(f"nearest_of_{PAIRS[-1]}_{count}", "s", [seconds])


def embedding(setting: Setting) -> Iterator:
    """Prompts per second, by sentence-transformers and here."""
    from kutils.benchmarks import embedding as benchmark_embedding
    from kutils.generation import shapes

    if importlib.util.find_spec("sentence_transformers") is None:
        raise Skipped("no sentence_transformers")
    texts = shapes.generate_prompts(64 if setting.tiny else 8000)
    yield from benchmark_embedding.measure_embedding(texts, repeats=1 if setting.tiny else 2)


# ---------------------------------------------------------------- prediction


def prediction(setting: Setting) -> Iterator:
    """An ensemble of two networks in float16; and a GPU whose memory is full."""
    from kutils.benchmarks import prediction as benchmark_prediction
    from kutils.ensemble import image_cache, predict, within_budget
    from kutils.models import checkpoints

    device, folder = gpu_training.prepare_device(setting), setting.folder / "made_predictions"
    count, half = (40, "bfloat16") if setting.tiny else (2048, "float16")
    benchmark_prediction.make_images(folder / "images", count)
    images = image_cache.find_images(folder / "images")
    models = {
        name: gpu_training.untrained_recipe(name, 1, setting, f"amp_dtype={half}")
        for name in ("convnext_large", "vit_large")
    }
    fitted, files = benchmark_prediction.make_ensemble(folder, models)
    began = time.monotonic()
    *_, state = within_budget.predict_ensemble(fitted, files, images, device=setting.device)
    if state.dropped:
        raise ValueError(f"models were left out: {state.dropped}")
    yield measuring.make_entry("predict_ensemble_float16", f"s, {count} images", [time.monotonic() - began])
    recipe = models["convnext_large"]
    model, _, _ = checkpoints.load_model(folder / "convnext_large.pth", recipe)
    workers = min(8, os.cpu_count() or 1)
    pixels = image_cache.PixelCache(images, recipe.input_size, budget_bytes=2e9, num_workers=workers)
    run_model = functools.partial(predict.predict, model, pixels=pixels, device_list=[device], progress=False)
    first = {"positions": range(min(64, count))}
    halved = run_model(recipe, **first)
    exact = run_model(dataclasses.replace(recipe, amp_dtype="float32"), **first)
    smallest = float(np.einsum("nd,nd->n", halved, exact).min())
    yield measuring.make_entry("predict_float16_cosine", "smallest cosine with float32", [smallest])
    yield from when_full(run_model, recipe, halved, device)


def when_full(run_model: Callable, recipe, expected: np.ndarray, device: torch.device) -> Iterator[str]:
    """Predict in batches larger than what the memory has left: it has to halve them, and to predict the same."""
    gpu_training.free_memory(device)
    output, taken = io.StringIO(), None
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        taken = torch.empty(max(0, free - SPARE_BYTES), dtype=torch.uint8, device=device)
    with contextlib.redirect_stdout(output):
        rows = run_model(recipe, batch_size=1024)
    del taken
    print(output.getvalue(), flush=True)
    if device.type == "cuda" and "the memory is full" not in output.getvalue():
        raise ValueError(f"batches of 1,024 images fitted into {SPARE_BYTES / 1e9:.0f} GB: nothing was halved")
    if (smallest := float(np.einsum("nd,nd->n", rows[: len(expected)], expected).min())) < 0.999:
        raise ValueError(f"other batches give other predictions: cosine {smallest:.5f}")
    yield f"memory full: {'; '.join(output.getvalue().splitlines()) or 'only on a GPU'}"


# ---------------------------------------------------------------- a run that is killed


def resuming(setting: Setting) -> Iterator:
    """A training run that is killed by SIGKILL and then resumed to its end."""
    folder = setting.folder / "made_run"
    make_training_rows(folder / "input")
    torch.set_num_threads(1)  # of tiny work
    os.environ |= {"KUTILS_INPUT": str(folder / "input"), "KUTILS_WORKING": str(folder / "working")}
    changes = ["datasets=made", "epochs=2", "warmup_epochs=0", "global_batch_size=8", "max_local_batch_size=8"]
    changes += ["checkpoint_every_steps=4", "num_workers=1", f"device={setting.device}"]
    run_folder = folder / "working" / "runs" / "tiny_vit_stage1_fold0"
    killed = start_training(changes)
    while killed.is_alive() and not (run_folder / "resume.pt").is_file():
        time.sleep(0.005)
    killed.kill()
    killed.join()
    if killed.exitcode != -signal.SIGKILL:
        raise ValueError(f"the run ended before it was killed, with exit code {killed.exitcode}; the log says why")
    began = time.monotonic()
    resumed = start_training(changes)
    resumed.join()
    lines = (run_folder / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [item["step"] for item in map(json.loads, lines) if "loss" in item]
    log = (setting.folder / "resume.log").read_text("utf-8", errors="replace")
    if resumed.exitcode or "going on after update" not in log or steps != sorted(set(steps)):
        raise ValueError(f"the run did not go on: exit code {resumed.exitcode}, updates logged {steps}")
    yield measuring.make_entry("resume", "s", [time.monotonic() - began])


def start_training(changes: list[str]) -> multiprocessing.Process:
    """Train in a forked process: CUDA has not started in this one."""
    if importlib.util.find_spec("tensorboard") is None:  # which this run does without
        board = types.SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)
        sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=lambda *_, **__: board)
    from kutils.training import train

    arguments = ["--config", "tiny_vit_stage1.yaml", "--fold", "0", *changes]
    process = multiprocessing.get_context("fork").Process(target=train.main, args=(arguments,))
    process.start()
    return process


def make_training_rows(folder: Path) -> None:
    """The data set `made`: images of noise."""
    from PIL import Image

    from kutils.system.tables import write_table

    random = np.random.default_rng(0)
    (folder / "made_images").mkdir(parents=True, exist_ok=True)
    names = [f"made_images/{number:03d}.png" for number in range(TRAINING_ROWS)]
    for name in names:
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name)
    rows = random.standard_normal((TRAINING_ROWS, EMBEDDING_DIM)).astype(np.float32)
    np.save(folder / "made.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    folds = np.arange(TRAINING_ROWS, dtype=np.int8) % 10
    write_table(folder / "made.tsv", {"image": names, "prompt": names, "fold": folds})


PARTS: dict[str, Callable[[Setting], Iterator]] = {
    "tests": gpu_tests,
    "convnext_large": functools.partial(gpu_training.network, "convnext_large"),
    "several_gpus": gpu_ranks.several_gpus,
    "vit_large": functools.partial(gpu_training.network, "vit_large"),
    "eva02_large": functools.partial(gpu_training.network, "eva02_large_clsavg"),
    "convnext_xxlarge": functools.partial(gpu_training.network, "convnext_xxlarge"),
    "loader": gpu_training.loading,
    "pairs": similar_rows,
    "prediction": prediction,
    "resume": resuming,
    "embedding": embedding,
    "compile": functools.partial(gpu_training.compiled, "convnext_large"),
}
