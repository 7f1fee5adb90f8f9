"""The benchmark: entries and their arithmetic, the data it makes, and one section from end to end in little."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.forked_python import REAL_PYTHON

from kutils.__main__ import run
from kutils.benchmarks import data as benchmark_data
from kutils.benchmarks import measuring, prediction, rows
from kutils.data import datasets, transforms
from kutils.runs import all_folds, launch
from kutils.system.paths import repository_root

ROOT = repository_root()


def test_an_entry_is_made_of_medians():
    made = measuring.make_entry("open", "s", [3.0, 2.0, 4.0], [30.0, 60.0])
    assert (made.ours, made.reference, made.ratio) == (3, 45, 15) and made.spread == pytest.approx(2 / 3)
    rate = measuring.make_entry("pace", "images/s", [30.0, 20.0, 40.0], [3.0, 6.0], more=True)
    assert rate.ratio == 30 / 4.5
    alone = measuring.make_entry("open", "s", [0.5])
    assert alone.reference is None and alone.ratio is None and alone.spread == 0
    assert re.search(r"\d+ cores, \d+ GB", made.machine)


def test_results_of_several_sections_stay_side_by_side(workspace):
    assert measuring.read_results() == []
    measuring.save_entries([measuring.make_entry("one", "s", [1.0]), measuring.make_entry("two", "MB", [2.0], [4.0])])
    measuring.save_entries([measuring.make_entry("three", "s", [3.0]), measuring.make_entry("one", "s", [9.0])])
    assert [(item["name"], item["ours"]) for item in measuring.read_results()] == [("one", 9), ("two", 2), ("three", 3)]
    machine, head, *lines = measuring.format_results().splitlines()
    assert machine == measuring.machine_name() and head.split()[:3] == ["name", "unit", "ours"] and len(lines) == 3
    assert lines[0].split() == ["one", "s", "9.00", "0%"]
    assert lines[1].split() == ["two", "MB", "2.00", "4.00", "2.00", "0%"]
    measuring.save_entries([replace(measuring.make_entry("four", "s", [3e-5]), machine="a GPU")])
    lines = measuring.format_results().splitlines()
    assert len(lines) == 8 and lines[lines.index("a GPU") + 2].split() == ["four", "s", "3e-05", "0%"]


def test_an_unknown_section_names_the_nearest():
    assert measuring.choose_sections(" open_5m_rows ,") == ["open_5m_rows"]
    assert measuring.choose_sections("all") == list(measuring.SECTIONS)
    assert measuring.choose_sections("quick") == list(measuring.QUICK) and set(measuring.QUICK) < set(
        measuring.SECTIONS
    )
    with pytest.raises(ValueError, match="no section 'open_5m_row'; did you mean 'open_5m_rows'"):
        measuring.choose_sections("open_5m_row")


@pytest.mark.slow
def test_private_memory_is_what_was_written():
    """In a process of its own: what others have left here may be freed meanwhile."""
    code = """
import time
import numpy as np
from kutils.benchmarks import measuring
before = measuring.private_megabytes()
with measuring.peak_megabytes() as peak:
    held = np.ones(25_000_000, np.uint8)
    dropped = np.ones(50_000_000, np.uint8)
    full, deadline = measuring.anonymous_megabytes(), time.monotonic() + 60
    while peak[0] < full - 1 and time.monotonic() < deadline:  # a look of the measurement
        time.sleep(0.01)
    del dropped
print(measuring.private_megabytes() - before, peak[0] - before, held.any())
"""
    done = subprocess.run([REAL_PYTHON, "-c", code], check=True, timeout=300, capture_output=True, text=True)
    held, peak, _ = done.stdout.split()
    assert float(held) == pytest.approx(25, abs=5) and float(peak) == pytest.approx(75, abs=8)


def test_sizes_are_as_published_and_shrink_to_the_disk(capsys):
    sizes = rows.choose_sizes(0, 10**12)
    assert sizes == {name: count for name, (count, _) in rows.MADE_SETS.items()}
    assert sum(sizes.values()) == 5_059_104
    assert sum(count // images for count, images in rows.MADE_SETS.values()) == 3_378_588
    assert 9_990 <= sum(rows.choose_sizes(10_000, 10**12).values()) <= 10_000 and not capsys.readouterr().out
    small = sum(rows.choose_sizes(0, rows.SPARE_BYTES + 2_000 * rows.ROW_BYTES).values())
    assert 1_990 <= small <= 2_000 and "5,059,104 rows do not fit" in capsys.readouterr().out
    with pytest.raises(ValueError, match="too few"):
        rows.choose_sizes(0, 10**9)


def test_made_sets_are_data_sets(workspace):
    root = workspace / "input"
    shutil.rmtree(root)
    sizes = rows.choose_sizes(20_000, 10**12)
    rows.make_datasets(root, sizes)
    data = datasets.load_datasets(list(sizes))  # checks folds, lengths and rows
    assert len(data) == sum(sizes.values())
    images = np.bincount(np.bincount(data.prompt_codes))
    assert images[1] == sizes["cc3m_part2"] + sizes["diffusiondb_part2"]
    assert images[3] > 0.99 * sum(sizes[name] // 3 for name in ("cc3m", "lexica", "diffusiondb", "mscoco"))
    assert 50 < np.mean([len(prompt) for prompt in data.prompts.to_pylist()]) < 75
    made = (root / "cc3m.npy").stat().st_mtime_ns
    rows.make_datasets(root, sizes)
    assert (root / "cc3m.npy").stat().st_mtime_ns == made  # kept
    rows.make_datasets(root, rows.choose_sizes(10_000, 10**12))
    assert len(np.load(root / "cc3m.npy")) == 10_000 * 748_781 // 5_059_104


@pytest.mark.slow
def test_the_section_from_end_to_end(workspace):
    entries = {item.name: item for item in rows.measure_opening(rows=4_000, repeats=1)}
    assert len(entries) == 8 and {item.unit for item in entries.values()} == {"s", "MB"}
    assert entries["open_5m_rows"].ours < entries["open_5m_rows_first"].ours
    assert entries["open_5m_rows_rank"].ours < 20 and 5 < entries["open_5m_rows_worker"].ours < 400
    assert entries["open_5m_rows"].ratio == entries["open_5m_rows"].reference / entries["open_5m_rows"].ours
    assert entries["open_5m_rows"].ours < entries["first_step_5m_rows"].ours < 600
    assert list((workspace / "working" / "benchmark").iterdir()) == []  # the data sets are gone
    assert not multiprocessing.active_children()


def test_the_notebook_runs_as_a_script(workspace):
    """Everything but the measurements, which take minutes."""
    script = (ROOT / "notebooks" / "benchmark.py").read_text(encoding="utf-8")
    (workspace / "benchmark.py").write_text(re.sub(r'sections: str = "[^"]*"', 'sections: str = ""', script))
    measuring.save_entries([measuring.make_entry("kept", "s", [1.0])])
    done = subprocess.run([sys.executable, workspace / "benchmark.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "kept" in done.stdout and measuring.machine_name() in done.stdout


def test_the_command_hands_its_options_to_the_notebook(workspace, monkeypatch):
    handed = []
    monkeypatch.setattr(all_folds, "execute", lambda *arguments: handed.append(arguments))
    monkeypatch.chdir(workspace)
    arguments = ["--sections", "loader,step", "--pictures", "mine", "--repeats", "2", "--keep-data"]
    assert run("benchmark", arguments) == 0
    ((notebook, values),) = handed
    assert notebook == workspace / "working" / "benchmark" / "benchmark.ipynb" and notebook.parent.is_dir()
    given = {"sections": "loader,step", "pictures": str(workspace / "mine"), "repeats": 2, "keep_data": True}
    assert given.items() <= values.items()
    assert (values["prompts"], values["prompts_path"], values["models"]) == (60000, "", "")  # as in the notebook


def test_the_prediction_of_an_ensemble_is_measured_both_ways(workspace, monkeypatch):
    whole, decoded = transforms.decode_rgb, []
    monkeypatch.setattr(transforms, "decode_rgb", lambda path: decoded.append(path) or whole(path))
    # a clock of which each decoding takes a second, and nothing else any time
    monkeypatch.setattr(prediction, "time", SimpleNamespace(monotonic=lambda: len(decoded)))
    (measured,) = prediction.measure_prediction(num_images=40, repeats=1)  # fewer than a batch: decoded here
    assert len(decoded) == 40 + 3 * 40 and len(set(decoded)) == 40
    assert (measured.name, measured.ours, measured.reference, measured.ratio) == ("predict_ensemble", 40, 120, 3)
    assert not list((workspace / "working" / "benchmark").iterdir())


def test_the_check_of_images_is_measured_with_two_processes_and_one(workspace):
    (measured,) = benchmark_data.measure_check(images=300, repeats=1)
    assert measured.name == "check_images" and measured.ratio == measured.reference / measured.ours
    assert not list((workspace / "working" / "benchmark").iterdir())


@pytest.mark.slow
def test_an_epoch_from_shards_is_measured_beside_one_from_files(workspace, monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)  # it would wait for all that other programs write
    monkeypatch.setattr(launch, "run_module", lambda _, command, *arguments: run(command, arguments))
    packed, imported = benchmark_data.measure_shards(images=32, repeats=1)
    assert packed.name == "packed_shards" and packed.ratio == packed.reference / packed.ours
    assert imported.name == "imported_shards" and imported.reference == packed.ours
    assert not list((workspace / "working" / "benchmark").iterdir())
