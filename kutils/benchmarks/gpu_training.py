"""Measures training on a GPU for `kutils gpu-check`: updates, memory, SAM, compiling, the loader.

Each part is a generator: what it has yielded is saved, whatever happens after. With `tiny` the same lines run with
stand-ins of the networks, on a CPU too.
"""

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch.utils.data import DataLoader

from kutils.benchmarks import flops, measuring, step
from kutils.benchmarks import loader as benchmark_loader
from kutils.benchmarks.gpu_report import MeasuredRecipe, Setting
from kutils.runs import recipes
from kutils.runs.recipes import Recipe
from kutils.system import devices
from kutils.system.ranks import Ranks
from kutils.training import engine, profiling

STAND_INS = {"convnext_large": "tiny_convnext", "convnext_xxlarge": "tiny_convnext"}  # tiny_vit for the others
PROFILED = 5  # updates
USABLE = 0.92  # share of a GPU's memory that one process can fill: the rest is CUDA's own, and gaps
WORKERS = (8, 16)
PACKED_SIZE = 448  # px, of images in shards


def untrained_recipe(model: str, stage: int, setting: Setting, *changes: str) -> Recipe:
    """A recipe of `conf/` with random weights; with `tiny` a stand-in in batches of four."""
    overrides = ["pretrained=false", f"device={setting.device}", *changes]
    if setting.tiny:
        model = STAND_INS.get(model, "tiny_vit")
        overrides += ["max_local_batch_size=4", "input_size=32"]
        overrides += ["amp_dtype=float32"] if setting.device == "cpu" and not changes else []
    return recipes.load_recipe(recipes.find_recipe(model, stage), overrides)


def build_step(recipe: Recipe, device: torch.device) -> step.Ours:
    with device:  # drawing 847 million random weights takes a CPU 10 s
        return step.Ours(recipe, device)


def prepare_device(setting: Setting) -> torch.device:
    """The first device, with the precision of training."""
    torch.set_float32_matmul_precision("high")
    if setting.tiny:
        measuring.LEAST_SECONDS = 0.0  # of this process alone
        torch.set_num_threads(1)
    return torch.device(setting.device, 0) if setting.device == "cuda" else torch.device("cpu")


def in_turns(
    setting: Setting, device: torch.device, *works: Callable[[], object], repeats: int = 4
) -> list[list[float]]:
    """Seconds that each takes, several times, by turns."""

    def timer(work: Callable[[], object]) -> Callable[[], float]:
        count = 1 if setting.tiny else measuring.repetitions(work, device)
        return lambda: measuring.timed(work, count, device)

    return measuring.alternate(1 if setting.tiny else repeats, *map(timer, works))


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- updates of a network


def network(model: str, setting: Setting) -> Iterator:
    """Updates of stage 1 and of stage 2 beside the published ones; SAM beside a plain update."""
    device = prepare_device(setting)
    yield from stage_one(model, setting, device)
    free_memory(device)
    yield from stage_two(model, setting, device)
    if model == "convnext_large":
        free_memory(device)
        yield from half_precision(model, setting, device)
        yield from profile(model, setting, device)


def stage_one(model: str, setting: Setting, device: torch.device) -> Iterator:
    recipe, ours, peak = build_fitting(untrained_recipe(model, 1, setting), device)
    batch, count = step.random_batch(recipe, device), recipe.max_local_batch_size
    (alone,) = in_turns(setting, device, lambda: ours.update(batch), repeats=2)
    yield measured_recipe(model, 1, ours, batch, peak, alone)
    operations, (most, origin) = flops.training_flops(recipe), flops.peak_flops(ours.dtype, device)
    unit = f"% of {most / 1e12:,.3g} TFLOP/s ({origin})"
    utilisation = [100 * operations * count / seconds / most for seconds in alone]
    yield measuring.make_entry(f"mfu_{model}", unit, utilisation, more=True)
    yield from beside_published(f"step_{model}", recipe, ours, batch, setting, alone)


def beside_published(
    name: str, recipe: Recipe, ours: step.Ours, batch: dict, setting: Setting, alone: list[float]
) -> Iterator:
    """Images per second of our update and of the published one, by turns; of `alone` where the memory is too small.

    Args:
        alone: seconds of our update, measured without the other.
    """
    device, count, rho = ours.device, len(batch["image"]), recipe.sam_rho
    try:
        with device:
            theirs = step.published_trainer(recipe, device, half=device.type == "cuda")
        images = step.published_input(batch, recipe, device)
        updates = (lambda: ours.update(batch, rho), lambda: theirs.update(images, batch["target"]))
        times = in_turns(setting, device, *updates)
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        yield f"{name}: the memory does not hold the published update beside ours in batches of {count}"
        times = [alone, []]
    rates = ([count / seconds for seconds in way] for way in times)
    yield measuring.make_entry(name, f"images/s, batch {count}", *rates, more=True)


def stage_two(model: str, setting: Setting, device: torch.device) -> Iterator:
    recipe, ours, peak = build_fitting(untrained_recipe(model, 2, setting), device)
    batch, rho = step.random_batch(recipe, device), recipe.sam_rho
    sharp, plain = in_turns(setting, device, lambda: ours.update(batch, rho), lambda: ours.update(batch), repeats=3)
    yield measured_recipe(model, 2, ours, batch, peak, sharp)
    unit = f"x plain update, batch {recipe.max_local_batch_size}"
    yield measuring.make_entry(f"sam_{model}", unit, [a / b for a, b in zip(sharp, plain, strict=True)])
    yield from beside_published(f"sam_step_{model}", recipe, ours, batch, setting, sharp)
    free_memory(device)
    if setting.tiny or recipe.gradient_checkpointing:
        del ours
        free_memory(device)
        try:
            whole = build_step(dataclasses.replace(recipe, gradient_checkpointing=False), device)
            (without,) = in_turns(setting, device, lambda: whole.update(batch), repeats=2)
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            yield f"{model}, stage 2: without checkpointing the memory does not hold batches of {len(batch['image'])}"
        else:
            unit = "x plain update without checkpointing"
            yield measuring.make_entry(f"sam_checkpointing_{model}", unit, [value / min(without) for value in sharp])


def build_fitting(recipe: Recipe, device: torch.device) -> tuple[Recipe, step.Ours, int]:
    """Training in the recipe's batches, halved until the memory holds them, and its peak of memory in bytes.

    Raises: torch.OutOfMemoryError where one image does not fit.
    """
    while True:
        batch = step.random_batch(recipe, device)
        try:
            make, use = partial(build_step, recipe, device), partial(step.Ours.update, batch=batch, rho=recipe.sam_rho)
            return recipe, *step.with_memory(device, make, use)
        except RuntimeError as error:
            if recipe.max_local_batch_size == 1 or not devices.is_out_of_memory(error):
                raise
        recipe = dataclasses.replace(recipe, max_local_batch_size=recipe.max_local_batch_size // 2)
        free_memory(device)  # out of `except`, whose traceback holds memory
        print(f"out of memory: going on with batches of {recipe.max_local_batch_size}", flush=True)


def measured_recipe(model: str, stage: int, ours: step.Ours, batch: dict, peak: int, seconds: list[float]):
    """Speed and memory, and the batch that the memory would hold, from the peaks of this batch and of half of it."""
    count, most = len(batch["image"]), None
    if ours.device.type == "cuda" and count > 1:
        half = {key: value[: count // 2] for key, value in batch.items()}
        torch.cuda.reset_peak_memory_stats(ours.device)
        ours.update(half, ours.recipe.sam_rho)
        torch.cuda.synchronize(ours.device)
        total = torch.cuda.get_device_properties(ours.device).total_memory
        most = most_images(count, peak, torch.cuda.max_memory_allocated(ours.device), total)
    return MeasuredRecipe(model, stage, count, count / sorted(seconds)[len(seconds) // 2], peak / 1e9, most)


def most_images(count: int, peak: int, half_peak: int, total: int) -> int | None:
    """Images that a memory holds at once, by the peaks of `count` and of half as many; None where they are alike."""
    per_image = (peak - half_peak) / (count - count // 2)
    return count + int((USABLE * total - peak) // per_image) if per_image > 0 else None


def half_precision(model: str, setting: Setting, device: torch.device) -> Iterator:
    """An update in float16 with a loss scaler, beside bfloat16."""
    recipe = untrained_recipe(model, 1, setting)
    rounded, halved = (dataclasses.replace(recipe, amp_dtype=name) for name in ("bfloat16", "float16"))
    batch, trainers = step.random_batch(recipe, device), [build_step(each, device) for each in (halved, rounded)]
    times = in_turns(setting, device, *(lambda each=each: each.update(batch) for each in trainers), repeats=2)
    loss, scale = float(trainers[0].update(batch)), trainers[0].scaler.get_scale()
    rates = ([len(batch["image"]) / seconds for seconds in way] for way in times)
    yield measuring.make_entry(f"float16_{model}", "images/s, beside bfloat16", *rates, more=True)
    yield f"{model} in float16: loss {loss:.4f}, scale {scale:g}"
    if not loss < 2 or scale < 1:
        raise ValueError(f"training in float16 broke down: loss {loss}, scale {scale}")


def profile(model: str, setting: Setting, device: torch.device) -> Iterator[str]:
    """What the time of updates goes by in, as `profile_steps` of a recipe shows it."""
    ours, lines = build_step(untrained_recipe(model, 1, setting), device), []
    batch, total = step.random_batch(ours.recipe, device), PROFILED + sum(profiling.WARMUP)
    profiler = profiling.UpdateProfiler(setting.folder, PROFILED, total, device, lines.append)
    for _ in range(total):
        ours.update(batch)
        profiler.step()
    yield f"profile of {model}:\n" + "\n".join(lines)


def compiled(model: str, setting: Setting) -> Iterator:
    """An update of a compiled network beside one that is not; with `tiny` all but the compiler runs."""
    device = prepare_device(setting)
    recipe = untrained_recipe(model, 1, setting)
    eager, ours, batch = build_step(recipe, device), build_step(recipe, device), step.random_batch(recipe, device)
    began = time.monotonic()
    with torch.compiler.set_stance("force_eager") if setting.tiny else nullcontext():
        size = recipe.max_local_batch_size
        if not engine.compile_network(ours.network, size, recipe, ours.dtype, Ranks(0, 1, device)):
            raise ValueError("the network could not be compiled; the log says why")
        yield measuring.make_entry(f"compiling_{model}", "s", [time.monotonic() - began])
        times = in_turns(setting, device, lambda: ours.update(batch), lambda: eager.update(batch), repeats=2)
    rates = ([size / seconds for seconds in way] for way in times)
    yield measuring.make_entry(f"compiled_{model}", "images/s, beside eager", *rates, more=True)


# ---------------------------------------------------------------- the loader


def loading(setting: Setting) -> Iterator:
    """Share of the time that updates of ConvNeXt-L wait for the loader of training: from WebP files and from shards."""
    from kutils.benchmarks import data  # needs PyArrow

    device, folder = prepare_device(setting), setting.folder / "made_images"
    recipe = untrained_recipe("convnext_large", 1, setting)
    rows = 16 * recipe.max_local_batch_size if setting.tiny else 64 * recipe.max_local_batch_size
    pictures = benchmark_loader.random_pictures(2 if setting.tiny else benchmark_loader.NUM_PICTURES)
    data.make_sets(folder, pictures, rows, PACKED_SIZE)
    ours = build_step(recipe, device)
    for name, kind in (("packed", "shards"), ("files", "webp")):
        dataset = data.open_dataset(folder, name, rows)
        some_workers = [1] if setting.tiny else [min(number, devices.usable_cores()) for number in WORKERS]
        for num_workers in dict.fromkeys(some_workers):
            seconds = 0.2 if setting.tiny else 6.0
            some = dataclasses.replace(recipe, num_workers=num_workers)
            waited, rate = waiting(dataset, some, ours, seconds)
            yield measuring.make_entry(
                f"wait_{kind}_{num_workers}", f"% of the time, at {rate:,.0f} images/s", [waited]
            )


def waiting(dataset, recipe: Recipe, ours: step.Ours, seconds: float) -> tuple[float, float]:
    """Per cent of the time that is waited for batches, and images per second."""
    from kutils.data import datasets  # needs PyArrow
    from kutils.data.sampler import EpochSampler
    from kutils.training.loading import loader_options

    rows, size = dataset.training_rows(0), recipe.max_local_batch_size
    sizes = {"global_batch_size": size, "local_batch_size": size}
    sampler = EpochSampler(dataset, rows, recipe.seed, **sizes, block_rows=dataset.block_rows)
    loader = DataLoader(
        datasets.TrainingImages(dataset, rows, recipe),
        batch_sampler=itertools.chain.from_iterable(map(sampler.batches, itertools.count())),
        multiprocessing_context="fork",
        **loader_options(recipe, Ranks(0, 1, ours.device)),
    )
    batches, waited, updates = iter(loader), 0.0, 0
    for _ in range(2 + 2 * recipe.num_workers):  # what the workers have prepared meanwhile does not count
        ours.update(next(batches))
    measuring.synchronize(ours.device)
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        batch = next(batches)
        waited += time.perf_counter() - now
        ours.update(batch)
        measuring.synchronize(ours.device)  # else the time that the device still needs would be waited for
        updates += 1
    return 100 * waited / (now - began), updates * size / (now - began)
