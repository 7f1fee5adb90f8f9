"""Measures an update, SAM and validation, compared with the published step.

On a GPU the five networks of the recipes, on a CPU the tiny ones. Weights are random: they do not change the time.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kutils.benchmarks import flops, measuring, published
from kutils.data import transforms
from kutils.models import networks
from kutils.models.published import published_names
from kutils.runs import recipes
from kutils.runs.recipes import Recipe
from kutils.system import devices
from kutils.system.constants import EMBEDDING_DIM
from kutils.system.ranks import Ranks
from kutils.training import engine, network_input, optimizers

ON_GPU = ("convnext_large", "convnext_xxlarge", "vit_large", "eva02_large_clsavg", "eva02_large_clsonly")
ON_CPU = ("tiny_convnext", "tiny_vit")
RHO = 0.05  # of SAM, as published


def model_names(chosen: str) -> list[str]:
    """The models of a comma-separated list; empty: the five networks on a GPU, the tiny ones on a CPU."""
    return recipes.split_names(chosen) or list(ON_GPU if torch.cuda.is_available() else ON_CPU)


# ---------------------------------------------------------------- the two ways


class Ours:
    """Training of a recipe's network as `kutils.training.train` does it."""

    def __init__(self, recipe: Recipe, device: torch.device):
        torch.manual_seed(recipe.seed)
        self.device, self.dtype = device, devices.autocast_dtype(recipe.amp_dtype, device)
        self.network = networks.build_model(recipe).to(device, memory_format=torch.channels_last).train()
        self.recipe, self.optimizer = recipe, optimizers.build_optimizer(self.network, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def update(self, batch: dict, rho: float = 0.0) -> Tensor:
        recipe = dataclasses.replace(self.recipe, sam_rho=rho)
        return engine.update(self.network, [batch], self.optimizer, self.scaler, recipe, self.dtype)

    def evaluate(self, batches: Sequence[dict]) -> None:
        rows = sum(len(batch["image"]) for batch in batches)
        ranks = Ranks(0, 1, self.device)
        engine.evaluate(self.network, batches, self.recipe, self.dtype, ranks, total=rows)


def published_trainer(recipe: Recipe, device: torch.device, half: bool):
    """The same training in the published way, under float16 autocast or in float32."""
    torch.manual_seed(recipe.seed)
    network = networks.build_model(recipe).to(device)
    decay = recipe.weight_decay / 0.9  # timm's momentum takes a tenth of it away
    return published.Trainer(network, recipe.lr, decay, recipe.sam_rho, half, published_names(network))


def benchmark_recipe(model: str) -> Recipe:
    """Stage 1 of a model with random weights; on a CPU in float32 and without augmentation, which `loader` measures."""
    overrides = [] if torch.cuda.is_available() else ["amp_dtype=float32", "augment=none"]
    return recipes.load_recipe(recipes.find_recipe(model, 1), ["pretrained=false", "device=auto", *overrides])


def random_batch(recipe: Recipe, device: torch.device, seed: int = 0) -> dict:
    """Random images and targets as the loader hands them over: in pinned memory, if they go to a GPU."""
    random = torch.Generator().manual_seed(seed)
    count, size = recipe.max_local_batch_size, recipe.input_size
    image = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=random)
    jitter = [transforms.random_crop_and_jitter(image[0, :, :8, :8], 8, (seed, number))[1] for number in range(count)]
    common = torch.full((EMBEDDING_DIM,), EMBEDDING_DIM**-0.5)  # prompts are alike: the loss falls
    target = nn.functional.normalize(common + 0.08 * torch.randn(count, EMBEDDING_DIM, generator=random), dim=1)
    batch = {"image": image, "jitter": torch.stack(jitter), "target": target, "row": torch.arange(count), "bad": []}
    if device.type == "cuda":
        batch |= {key: value.pin_memory() for key, value in batch.items() if key != "bad"}
    return batch


def published_input(batch: dict, recipe: Recipe, device: torch.device) -> Tensor:
    """The batch as the published loader hands it over: float32, normalised."""
    images = network_input.normalize(batch["image"], recipe.mean, recipe.std).contiguous()
    return images.pin_memory() if device.type == "cuda" else images


# ---------------------------------------------------------------- the section


def measure_training(model: str, repeats: int = 5) -> list[measuring.Entry]:
    """An update of one network, its memory, FLOP utilisation, SAM, optimiser and validation, beside the published ones.

    Args:
        model: of a recipe of stage 1, whose batch per GPU and input size are taken.
    Returns: no entry, and a line that says so, where the GPU's memory does not hold both ways.
    """
    recipe, device = benchmark_recipe(model), devices.pick_device("auto")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as training does
    try:
        return measure_updates(model, recipe, device, repeats)
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        print(f"{model} is left out: the memory of {torch.cuda.get_device_name()} does not hold it twice", flush=True)
        return []


def measure_updates(model: str, recipe: Recipe, device: torch.device, repeats: int) -> list[measuring.Entry]:
    batch, images_per_update = random_batch(recipe, device), recipe.max_local_batch_size
    images, targets = published_input(batch, recipe, device), batch["target"]
    half = device.type == "cuda"
    ours, our_memory = with_memory(device, lambda: Ours(recipe, device), lambda trainer: trainer.update(batch))
    theirs, their_memory = with_memory(
        device, lambda: published_trainer(recipe, device, half), lambda trainer: trainer.update(images, targets)
    )

    def seconds(work: Callable[[], object]) -> Callable[[], float]:
        count = measuring.repetitions(work, device)
        return lambda: measuring.timed(work, count, device)

    def their_update(rho: float) -> None:
        theirs.rho = rho
        theirs.update(images, targets)

    plain, sharp, their_plain, their_sharp = measuring.alternate(
        repeats,
        seconds(lambda: ours.update(batch)),
        seconds(lambda: ours.update(batch, RHO)),
        seconds(lambda: their_update(0.0)),
        seconds(lambda: their_update(RHO)),
    )
    for parameter in itertools.chain(ours.network.parameters(), theirs.network.parameters()):
        parameter.grad = torch.full_like(parameter, 1e-6)
    optimizer, their_optimizer = measuring.alternate(
        repeats, seconds(ours.optimizer.step), seconds(theirs.optimizer.step)
    )
    for trainer in (ours, theirs):
        trainer.optimizer.zero_grad()
    evaluation, their_evaluation = measuring.alternate(
        repeats, seconds(lambda: ours.evaluate([batch])), seconds(lambda: theirs.evaluate(images, targets))
    )

    def rates(times: Sequence[float]) -> list[float]:
        return [images_per_update / value for value in times]

    entries = [
        measuring.make_entry(f"step_{model}", "images/s", rates(plain), rates(their_plain), more=True),
        measuring.make_entry(
            f"sam_overhead_{model}",
            "x plain step",
            [a / b for a, b in zip(sharp, plain, strict=True)],
            [a / b for a, b in zip(their_sharp, their_plain, strict=True)],
        ),
        measuring.make_entry(f"optimizer_{model}", "s", optimizer, their_optimizer),
        measuring.make_entry(f"validation_{model}", "images/s", rates(evaluation), rates(their_evaluation), more=True),
    ]
    operations, (peak, origin) = flops.training_flops(recipe), flops.peak_flops(ours.dtype, device)
    entries.append(
        measuring.make_entry(
            f"mfu_{model}",
            f"% of {peak / 1e12:,.3g} TFLOP/s ({origin})",
            [100 * operations * rate / peak for rate in rates(plain)],
            [100 * operations * rate / peak for rate in rates(their_plain)],
            more=True,
        )
    )
    if device.type == "cuda":
        entries.append(measuring.make_entry(f"step_memory_{model}", "GB", [our_memory / 1e9], [their_memory / 1e9]))
    return entries


def with_memory(device: torch.device, build: Callable, use: Callable) -> tuple[object, int]:
    """What `build` returns, and the most bytes that it and two uses of it held on a GPU; 0 on a CPU."""
    if device.type != "cuda":
        return build(), 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    built = build()
    for _ in range(2):
        use(built)
    torch.cuda.synchronize(device)
    return built, torch.cuda.max_memory_allocated(device) - before
