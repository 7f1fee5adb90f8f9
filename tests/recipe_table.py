"""The README's table of recipes, worked out from the recipes themselves: `python tests/recipe_table.py` prints it."""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from kutils.models.networks import PromptEmbedder, build_model
from kutils.runs import recipes
from kutils.runs.recipes import Recipe

PROMPTS = {  # distinct prompts of the six data sets of the publication; a tenth of them validates
    "cc3m": 249_593,
    "lexica": 67_101,
    "diffusiondb": 326_035,
    "cc3m_part2": 1_166_852,
    "diffusiondb_part2": 1_371_480,
    "mscoco": 197_527,
}
PEAK_FLOPS, UTILISATION = 312e12, 0.40  # A100, dense bfloat16; a guess of what training reaches of it
HEADER = (
    "| recipe | parameters, million | last feature map or tokens | GFLOP per image | images per epoch | epochs | "
    "updates per epoch on 8 GPUs | hours on 8 x A100 (estimate) |\n|---|---|---|---|---|---|---|---|"
)


def build(recipe: Recipe) -> PromptEmbedder:
    """The network without memory ("meta")."""
    with torch.device("meta"):
        return build_model(recipe, pretrained=False)


def forward_flops(network: PromptEmbedder, recipe: Recipe) -> int:
    """Floating point operations of one image's forward pass, two per multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, recipe.input_size, recipe.input_size, device="meta"))
    return counter.get_total_flops()


def grid(network: PromptEmbedder, recipe: Recipe) -> str:
    """`16 x 16 + 1 tokens` of a ViT, `12 x 12` of a ConvNeXt."""
    with torch.no_grad():
        features = network.backbone.forward_features(
            torch.zeros(1, 3, recipe.input_size, recipe.input_size, device="meta")
        )
    if features.ndim == 4:
        return f"{features.shape[2]} x {features.shape[3]}"
    side = round((features.shape[1] - 1) ** 0.5)
    assert side * side + 1 == features.shape[1]
    return f"{side} x {side} + 1 tokens"


def images_per_epoch(recipe: Recipe) -> int:
    """One per training prompt."""
    return sum(PROMPTS[name] for name in recipe.datasets) * 9 // 10


def hours(recipe: Recipe, flops: int, peak_flops: float = 8 * PEAK_FLOPS) -> float:
    """Forward 1, backward 2, recomputing the forward pass 1; SAM doubles all; a frozen backbone goes forward alone."""
    trained = (3 + recipe.gradient_checkpointing) * (2 if recipe.sam_rho else 1)
    passes = recipe.freeze_epochs + (recipe.epochs - recipe.freeze_epochs) * trained
    return images_per_epoch(recipe) * flops * passes / (UTILISATION * peak_flops) / 3600


def describe_hours(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def row(path: Path) -> str:
    recipe = recipes.load_recipe(path)
    network = build(recipe)
    million = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    flops = forward_flops(network, recipe)
    images = images_per_epoch(recipe)
    cells = (
        f"{recipe.model}, stage {recipe.stage}",
        f"{million:.1f}",
        grid(network, recipe),
        f"{flops / 1e9:.0f}",
        f"{images:,}",
        str(recipe.epochs),
        f"{images // recipe.global_batch_size:,}",
        describe_hours(hours(recipe, flops)),
    )
    return f"| {' | '.join(cells)} |"


def seed_recipes() -> list[Path]:
    return [path for _, path in sorted(recipes.recipe_files().items()) if "_madgrad_" in path.name]


if __name__ == "__main__":
    print(HEADER)
    for path in seed_recipes():
        print(row(path))
