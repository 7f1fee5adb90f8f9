"""Where the time goes: a profile's trace and shares, waiting judged over some time, advice that fits the machine."""

import dataclasses
import gzip
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from kutils.data import datasets
from kutils.runs import folders
from kutils.system import devices as system_devices
from kutils.system.ranks import Ranks
from kutils.training import engine, profiling, train
from kutils.training.meter import Interval, Meter

ALONE = Ranks(0, 1, torch.device("cpu"))


def marks(path):
    """Labels of a trace with their begin and end, by name; steps of the profiler are `ProfilerStep`."""
    with gzip.open(path, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    found = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            span = event["ts"], event["ts"] + event["dur"]
            found.setdefault(event["name"].split("#")[0], []).append(span)
    return found, events


def losses(workspace, name):
    lines = folders.read_metrics(workspace / "working" / "runs" / f"{name}_fold0" / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_profile_holds_its_updates_with_their_parts_and_changes_nothing(workspace, tiny_recipe, capsys):
    changes = {"epochs": 3, "drop_path_rate": 0.2, "sam_rho": 0.05, "max_local_batch_size": 4}
    train.train(tiny_recipe(prefix="plain", save_dir="plain", **changes), 0, ALONE)
    assert "profiled" not in capsys.readouterr().out
    train.train(tiny_recipe(prefix="seen", save_dir="seen", profile_steps=2, **changes), 0, ALONE)
    assert len(losses(workspace, "plain")) == 12 and losses(workspace, "seen") == losses(workspace, "plain")
    folder = workspace / "working" / "runs" / "seen_fold0" / "profile"
    assert [path.name for path in folder.iterdir()] == ["trace.json.gz"]
    found, events = marks(folder / "trace.json.gz")
    # updates 6 and 7, with two accumulated batches, each once more for SAM
    counts = {"ProfilerStep": 2, "waiting for data": 2, "optimiser": 2}
    counts |= dict.fromkeys(["augmentation and copy", "forward", "backward"], 2 * 2 * 2)
    assert {name: len(found[name]) for name in counts} == counts and set(profiling.PARTS) == set(counts) - {
        "ProfilerStep"
    }
    for name in profiling.PARTS:
        for begin, end in found[name]:
            assert any(first <= begin and end <= last for first, last in found["ProfilerStep"])
    shares = profiling.shares(events)
    total = sum(end - begin for begin, end in found["ProfilerStep"])
    for name in profiling.PARTS:
        assert shares[name] == pytest.approx(sum(end - begin for begin, end in found[name]) / total)
    assert 0.5 < sum(shares.values()) <= 1 and min(shares.values()) > 0
    told = capsys.readouterr().out
    assert f"2 updates profiled: waiting for data {shares['waiting for data']:.0%}, augmentation and copy" in told
    table = told.split("operation\n")[1].split(f"{folder / 'trace.json.gz'} opens in https://ui.perfetto.dev")[0]
    percents = [float(line.split("%")[0]) for line in table.splitlines()]
    assert len(percents) == 10 and percents == sorted(percents, reverse=True) and sum(percents) <= 100.5
    assert "aten::convolution_backward" in table


@pytest.mark.slow
def test_a_profile_goes_over_the_end_of_an_epoch_without_its_evaluation(workspace, tiny_recipe, monkeypatch):
    real = engine.evaluate

    def slow(*arguments, **options):
        time.sleep(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(engine, "evaluate", slow)
    train.train(tiny_recipe(prefix="over", profile_steps=5), 0, ALONE)
    found, events = marks(workspace / "working" / "runs" / "over_fold0" / "profile" / "trace.json.gz")
    assert len(found["ProfilerStep"]) == 5 and len(found["evaluation"]) == 1
    assert sum(profiling.shares(events).values()) > 0.5  # of half a second and more it would be a fifth


@pytest.mark.slow
def test_what_is_left_is_profiled_and_an_earlier_trace_stays(workspace, tiny_recipe, capsys, monkeypatch):
    recipe = tiny_recipe(prefix="short", profile_steps=100, checkpoint_every_steps=1)
    real, calls = engine.update, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    train.train(dataclasses.replace(recipe, prefix="whole", epochs=1), 0, ALONE)
    assert "updates left: 4; profiled: 4, after a warm-up of 0" in capsys.readouterr().out
    monkeypatch.setattr(engine, "update", cut)
    with pytest.raises(KeyboardInterrupt):
        train.train(dataclasses.replace(recipe, profile_steps=1), 0, ALONE)  # update 6 of 8
    train.train(dataclasses.replace(recipe, profile_steps=9), 0, ALONE)
    assert "updates left: 1; profiled: 1, after a warm-up of 0" in capsys.readouterr().out
    folder = workspace / "working" / "runs"
    paths = [folder / "whole_fold0" / "profile" / "trace.json.gz"]
    paths += [folder / "short_fold0" / "profile" / name for name in ("trace.json.gz", "trace.2.json.gz")]
    assert [len(marks(path)[0]["ProfilerStep"]) for path in paths] == [4, 1, 1]


def mark(name, begin, end, cat="user_annotation", **args):
    return {"name": name, "cat": cat, "ts": float(begin), "dur": float(end - begin), "args": args}


def test_shares_of_a_gpu_are_its_own_time_by_what_launched_the_work():
    """Two updates of 100 us; the GPU is late, overlaps a transfer with kernels, and evaluates in between."""
    events = [
        mark("ProfilerStep#5", 0, 100),
        mark("waiting for data", 0, 10),
        mark("augmentation and copy", 10, 15),
        mark("forward", 15, 20),
        mark("backward", 20, 30),
        mark("optimiser", 30, 32),
        mark("ProfilerStep#6", 100, 300),
        mark("evaluation", 100, 200),
        mark("forward", 200, 220),
        # launches, from whatever thread, and what they launched
        mark("cudaMemcpyAsync", 11, 12, "cuda_runtime", correlation=1),
        mark("Memcpy HtoD", 12, 22, "gpu_memcpy", correlation=1),
        mark("cudaLaunchKernel", 16, 17, "cuda_runtime", correlation=2),
        mark("gemm", 22, 42, "kernel", correlation=2),
        mark("cuLaunchKernelEx", 21, 22, "cuda_driver", correlation=3),
        mark("gemm", 42, 72, "kernel", correlation=3),
        mark("cudaLaunchKernel", 22, 23, "cuda_runtime", correlation=4),
        mark("ncclAllReduce", 60, 82, "kernel", correlation=4),  # on another stream
        mark("cudaLaunchKernel", 31, 32, "cuda_runtime", correlation=5),
        mark("madgrad", 82, 92, "kernel", correlation=5),
        mark("cudaLaunchKernel", 110, 111, "cuda_runtime", correlation=6),
        mark("gemm", 120, 190, "kernel", correlation=6),  # of the evaluation
        mark("cudaLaunchKernel", 201, 202, "cuda_runtime", correlation=7),
        mark("gemm", 205, 245, "kernel", correlation=7),
        mark("Memset", 246, 247, "gpu_memset", correlation=8),  # launched where nobody looked
    ]
    shares = profiling.shares(events)
    expected = {"waiting for data": 10, "augmentation and copy": 10, "forward": 60, "backward": 40, "optimiser": 10}
    expected |= {"idle": 200 - 80 - 40 - 1}
    assert shares == pytest.approx({name: length / 200 for name, length in expected.items()})
    told = profiling.describe_shares(shares, 2)
    assert told == (
        "2 updates profiled: waiting for data 5% of the time; of the GPU's, augmentation and copy 5%, forward 30%, "
        "backward 20%, optimiser 5%, idle 40%"
    )


def average(key, count, own, launched=0, device=DeviceType.CPU, annotation=False):
    """What the profiler says of all calls of an operation, or of a kernel; times in us."""
    times = {"self_cpu_time_total": own, "self_device_time_total": launched}
    return SimpleNamespace(key=key, count=count, device_type=device, is_user_annotation=annotation, **times)


def test_costly_operations_count_by_their_own_time():
    forward, matrix = average("forward", 1, 9000, annotation=True), average("aten::mm", 2, 1000, 3000)
    copy = average("aten::copy_", 12, 3000)
    lines = profiling.costly_operations([forward, matrix, copy]).splitlines()
    assert lines[0].split() == ["share", "of", "CPU", "time", "ms", "calls", "operation"]
    assert [line.split() for line in lines[1:]] == [
        ["75.0%", "3.0", "12", "aten::copy_"],
        ["25.0%", "1.0", "2", "aten::mm"],
    ]
    kernels = [average("gemm", 2, 0, 3000, DeviceType.CUDA), average("by hand", 1, 0, 1000, DeviceType.CUDA)]
    kernels.append(average("forward", 1, 0, 4000, DeviceType.CUDA, annotation=True))
    lines = profiling.costly_operations([forward, copy, matrix, *kernels]).splitlines()
    assert "GPU" in lines[0] and lines[1].split() == ["75.0%", "3.0", "2", "aten::mm"]


# ---------------------------------------------------------------- waiting


def interval(share, seconds=1.0, updates=1):
    counts = {"loss": 0.5, "images": 8, "bad": [], "gpu_memory_gb": None, "first": False}
    return Interval(data_wait=share, seconds=seconds, updates=updates, **counts)


def test_waiting_is_judged_over_20_seconds_or_updates_and_told_once():
    wait = profiling.DataWait()
    assert [wait.add(interval(share)) for share in [1.0] + 18 * [0.0]] == 19 * [None]
    assert wait.add(interval(0.9)) is None  # 1.9 of 20 s
    assert [wait.add(interval(0.2, 9.0, 3)) for _ in range(2)] == [None, None]
    assert wait.add(interval(0.5, 2.0, 1)) == pytest.approx((0.2 * 18 + 0.5 * 2) / 20)
    assert all(wait.add(interval(1.0, 100.0, 100)) is None for _ in range(3))


@pytest.mark.parametrize(
    ("cores", "ranks", "workers", "said"),
    [
        (2, 1, 2, "2 cores for 1 rank: none is left for more than num_workers=2."),
        (1, 1, 0, "1 core for 1 rank: num_workers=1 instead of 0 would help."),
        (2, 1, 1, "2 cores for 1 rank: num_workers=2 instead of 1 would help."),
        (96, 8, 8, "96 cores for 8 ranks: num_workers=12 instead of 8 would help."),
        (96, 8, 4, "96 cores for 8 ranks: num_workers=8 instead of 4 would help."),
        (96, 8, 12, "96 cores for 8 ranks: none is left for more than num_workers=12."),
        (None, None, 4, "More num_workers than 4 help where there are cores for them."),
    ],
)
def test_advice_fits_the_machine(workspace, tiny_recipe, cores, ranks, workers, said):
    recipe = tiny_recipe(num_workers=workers, datasets=("toy", "more toys"), input_size=384)
    packing = f"kutils shards {workspace}/input/toy.tsv '{workspace}/input/more toys.tsv' --size 448"
    assert profiling.waiting_advice(recipe, 0.347, cores, ranks) == (
        f"35% of the time went by in waiting for images. {said} Images packed at the size of training load faster: "
        f"{packing}"
    )
    (workspace / "input" / "toy.shards").mkdir()
    left = profiling.waiting_advice(recipe, 0.347, cores, ranks)
    assert left.endswith(f"load faster: kutils shards '{workspace}/input/more toys.tsv' --size 448")
    (workspace / "input" / "more toys.shards").mkdir()
    assert profiling.waiting_advice(recipe, 0.347, cores, ranks).endswith(
        f"{said} The images are packed already: a faster disk or more cores would help."
    )


@pytest.mark.parametrize("slow", ["images", "network"])
def test_a_run_that_waits_says_once_what_to_change(workspace, tiny_recipe, monkeypatch, capsys, slow):
    real, now = engine.update, [0.0]
    example = {"image": torch.zeros(3, 32, 32, dtype=torch.uint8), "jitter": torch.zeros(8), "bad": []}
    example["target"] = torch.nn.functional.normalize(torch.ones(384), dim=0)

    def load(self, index):
        now[0] += 0.004 if slow == "images" else 0.0004
        return example | {"row": index[1]}

    def update(*arguments):
        now[0] += 0.02 if slow == "network" else 0.01
        return real(*arguments)

    monkeypatch.setattr(datasets.TrainingImages, "__getitem__", load)
    monkeypatch.setattr(engine, "update", update)
    monkeypatch.setattr("kutils.training.meter.time", SimpleNamespace(monotonic=lambda: now[0]))
    # 9 updates of 4 images an epoch; the first interval of each, one update, does not count
    train.train(tiny_recipe(augment=False, epochs=6, global_batch_size=4), 0, ALONE)
    told = [line for line in capsys.readouterr().out.splitlines() if "waiting for images" in line]
    assert len(told) == (slow == "images")
    if told:
        cores = system_devices.usable_cores()
        assert f"{cores} core" in told[0] and "for 1 rank: num_workers=1 instead of 0" in told[0]
        assert f"kutils shards {workspace}/input/toy.tsv --size 37" in told[0]


class Event:
    """A point in a GPU's work as `torch.cuda.Event` gives it, on a clock of the test."""

    def __init__(self, at):
        self.at = at

    def synchronize(self):
        pass

    def elapsed_time(self, later):  # ms
        return 1000 * (later.at - self.at)


def test_a_wait_counts_as_far_as_the_gpu_had_nothing_to_do(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("kutils.training.meter.time.monotonic", lambda: now[0])
    points = iter([2.0, 5.0, 6.0, 9.0, 9.0, 10.0, 13.0, 14.0])  # the GPU begins and is done, update by update
    monkeypatch.setattr("kutils.training.meter.mark", lambda device: Event(next(points)))
    meter = Meter(torch.device("cpu"))
    batch = [{"row": torch.arange(4), "bad": []}]
    for waited in (2.0, 3.0, 0.5, 1.0):
        with meter.waiting():
            now[0] += waited
        meter.add(torch.tensor(0.5), batch)
    # nothing done before: 2; 5 to 6: 1 of 3; 9 to 9: 0 of 0.5; 10 to 13, where the host did more than wait: 1
    assert meter.waited() == pytest.approx(2 + 1 + 0 + 1)
    now[0] = 16.0
    closed = meter.close(ALONE, step=4)
    assert closed.data_wait == pytest.approx(4 / 16) and closed.updates == 4 and closed.seconds == 16 and closed.first
    assert closed.gpu_memory_gb is None and np.isclose(closed.images_per_second, 1)
