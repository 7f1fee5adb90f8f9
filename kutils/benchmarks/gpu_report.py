"""Writes the result of `kutils gpu-check`: measurements, targets, and hours and cost per recipe. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
TARGETS = (  # on an H100 or H200: entry, what of it, at least or at most, bound
    ("step_convnext_large", "ratio", "at least", 1.5, "times the published step"),
    ("mfu_convnext_large", "ours", "at least", 40, "% of the matrix peak"),
    ("sam_convnext_large", "ours", "at most", 2.1, "times a plain update"),
    ("wait_shards_8", "ours", "at most", 2, "% of waiting with 8 workers, from shards"),
    ("similar_pairs_3378588", "ours", "at most", 60, "s for all pairs among 3,378,588 prompts at 0.7"),
)
SAME_NETWORK = {"eva02_large_clsonly": "eva02_large_clsavg"}  # but for the head: one measurement serves both
BATCH_NOTE = (
    "The batch to take is what the memory would hold, by the peaks of the measured batch and of half of it. Hours are "
    "the images of a fold by the measured speed."
)
RECORD = Path(__file__).with_name("gpu.json")  # of the GPU whose numbers the pages quote, where one was measured


class Skipped(Exception):
    """A part that this machine cannot run; the message says what it lacks."""


@dataclass(frozen=True)
class Setting:
    """How all parts are run."""

    device: str  # cuda or cpu
    tiny: bool  # stand-ins instead of the networks and sizes that are to be measured
    card: str  # name of the GPU
    gpus: int
    folder: Path  # of results; a part's own files lie there too


@dataclass(frozen=True)
class MeasuredRecipe:
    """An update of a recipe's network on one GPU."""

    model: str
    stage: int
    batch: int  # images per update: the recipe's own per GPU, or halved until the memory held it
    images_per_second: float
    memory_gb: float  # the most that tensors took, 10**9 bytes; 0 on a CPU
    most_images: int | None  # that the memory would hold; None: not known


# ---------------------------------------------------------------- hours


def images_per_epoch(recipe: Recipe) -> int:
    """One per training prompt."""
    return sum(PROMPTS[name] for name in recipe.datasets) * 9 // 10


def gpu_hours(recipe: Recipe, images_per_second: float) -> float:
    """Hours of one GPU for a fold; an epoch with a frozen backbone goes forward alone, a third of the work or less."""
    frozen = recipe.freeze_epochs / (3 + recipe.gradient_checkpointing)
    return images_per_epoch(recipe) * (recipe.epochs - recipe.freeze_epochs + frozen) / images_per_second / 3600


def measurement_of(recipe: Recipe, measured: Iterable[dict]) -> dict | None:
    """The measured update that is the recipe's: of its network, stage 3 being as stage 2; None if there is none."""
    wanted = SAME_NETWORK.get(recipe.model, recipe.model), min(recipe.stage, 2)
    return next((item for item in measured if (item["model"], item["stage"]) == wanted), None)


def seed_recipes() -> list[Path]:
    """Files of the twelve recipes of the publication, by model and stage."""
    return [path for _, path in sorted(recipes.recipe_files().items()) if "_madgrad_" in path.name]


def batch_for(recipe: Recipe, found: dict) -> int:
    """Images per GPU: the largest power of two, up to the global batch, that the memory holds."""
    most = found["most_images"] or found["batch"]
    return min(recipe.global_batch_size, 2 ** (max(1, most).bit_length() - 1))


def recipe_costs(measured: Sequence[dict], price: float) -> list[dict]:
    """For each recipe that was measured: batch per GPU, hours and cost of a fold.

    Args:
        measured: MeasuredRecipe as dicts.
        price: of one GPU for an hour; 0: not known.
    """
    lines = []
    for recipe in map(recipes.load_recipe, seed_recipes()):
        if (found := measurement_of(recipe, measured)) is None:
            continue
        hours = gpu_hours(recipe, found["images_per_second"])
        line = {
            "recipe": f"{recipe.model}, stage {recipe.stage}",
            "batch": batch_for(recipe, found),
            "gpu_hours": hours,
        }
        line |= {key: found[key] for key in ("images_per_second", "memory_gb")} | {"measured_batch": found["batch"]}
        lines.append(line | ({"cost": hours * price} if price else {}))
    return lines


def targets(entries: Iterable[dict]) -> list[dict]:
    """Each target that something was measured for: what was asked for, what was measured, and whether it is met."""
    by_name, lines = {entry["name"]: entry for entry in entries}, []
    for name, key, sense, bound, text in TARGETS:
        value = by_name.get(name, {}).get(key)
        if value is not None:
            met = value >= bound if sense == "at least" else value <= bound
            lines.append({"target": f"{name}: {sense} {bound:g} {text}", "measured": value, "met": met})
    return lines


# ---------------------------------------------------------------- the page


def summary(machine: dict, parts: Sequence[dict], price: float = 0.0) -> dict:
    """All that was measured as one record.

    Args:
        parts: records of parts, in their order.
        price: of one GPU for an hour; 0: not known.
    """
    entries = [entry for part in parts for entry in part["entries"]]
    measured = [item for part in parts for item in part["recipes"]]
    content = {"machine": machine, "tiny": any(part["tiny"] for part in parts)}
    content |= {"parts": [{key: part[key] for key in ("part", "status", "reason", "seconds")} for part in parts]}
    content |= {"targets": targets(entries), "recipes": measured, "price_per_hour": price}
    content |= {"advice": recipe_costs(measured, price), "entries": entries}
    return content | {"notes": [note for part in parts for note in part["notes"]]}


def markdown(content: dict) -> str:
    """The record as tables for `kutils/benchmarks/README.md`."""
    machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    lines = [f"## One GPU command: `make gpu` on {content['machine']['card']}", "", machine + "."]
    if content["tiny"]:
        lines += ["", "**Stand-ins were run: no number below is one of the network or size that its row names.**"]
    parts = [(item["part"], item["status"], f"{item['seconds']:.0f}", item["reason"]) for item in content["parts"]]
    lines += ["", *table(("part", "status", "seconds", "why"), parts)]
    asked = [(item["target"], number(item["measured"]), "met" if item["met"] else "**falls short**")
             for item in content["targets"]]  # fmt: skip
    if asked:
        lines += ["", *table(("target", "measured", ""), asked)]
    measured = [
        (item["name"], item["unit"], *map(number, (item["ours"], item["reference"], item["ratio"])))
        for item in content["entries"]
    ]
    if measured:
        lines += ["", *table(("what", "unit", "here", "published or plain", "times as good"), measured)]
    if content["advice"]:
        lines += ["", *table(*cost_rows(content))]
        lines += ["", BATCH_NOTE]
    for note in content["notes"]:
        lines += ["", f"```text\n{note}\n```" if "\n" in note else note]
    return "\n".join(lines) + "\n"


def cost_rows(content: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = ("recipe", "images/s", "memory, GB", "measured batch", "batch to take", "hours per fold, one GPU")
    rows = []
    for item in content["advice"]:
        numbers = (item["images_per_second"], item["memory_gb"], item["measured_batch"], item["batch"])
        rows.append((item["recipe"], *map(number, numbers), number(item["gpu_hours"])))
    if content["price_per_hour"]:
        head += (f"cost per fold at {content['price_per_hour']:g} per hour",)
        rows = [(*row, f"{item['cost']:,.0f}") for row, item in zip(rows, content["advice"], strict=True)]
    return head, rows


def number(value: float | None) -> str:
    """A number with three significant digits, large ones without decimals; empty for None."""
    if value is None:
        return ""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]
