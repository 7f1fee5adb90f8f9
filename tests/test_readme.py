"""The README names what is there, and nothing else."""

import re

import pytest
from fixtures import recipe_table

from kutils.runs import recipes
from kutils.system.paths import repository_root

ROOT = repository_root()
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README.split("```text\n")[-1].split("```")[0]


def test_tree_has_every_module_and_notebook():
    parts = TREE.split("\nkutils/ ")
    modules = set(re.findall(r"\b(\w+\.py)\b", parts[1].split("\nconf/")[0]))
    assert modules == {path.name for path in (ROOT / "kutils").glob("*.py")} - {"__init__.py"}
    notebooks = set(re.findall(r"^  (\w+) ", parts[0].split("\nnotebooks/ ")[1], re.MULTILINE))
    assert notebooks == {path.stem for path in (ROOT / "notebooks").glob("*.py")}


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:conf|notebooks|input|working)/[\w.-]+\.(?:yaml|py|ipynb|sh)", README)))
)
def test_named_file_exists(path):
    assert (ROOT / path).is_file()


def test_every_link_and_picture_leads_somewhere():
    found = re.findall(r"\]\(([^)\s]+)", README) + re.findall(r"\b(?:src|srcset|href)=[\"']([^\"'\s]+)", README)
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    relative = {link.partition("#")[::2] for link in found if not re.match(r"\w+:", link)}
    assert {path for path, _ in relative if path and not (ROOT / path).exists()} == set()
    assert {anchor for path, anchor in relative if not path} <= anchors and relative


def test_no_time_is_left_out():
    assert re.findall(r"\bTIME_\w+", README) == []


def test_figures_and_make_targets_exist():
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert figures and all((ROOT / figure).is_file() for figure in figures)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert named and named <= targets


def test_the_table_of_recipes_is_what_the_recipes_say():
    rows = [recipe_table.row(path) for path in recipe_table.seed_recipes()]
    assert len(rows) == 12
    assert "\n".join([recipe_table.HEADER, *rows]) in README, "python tests/fixtures/recipe_table.py prints the table"


@pytest.mark.parametrize("path", recipe_table.seed_recipes(), ids=lambda path: path.stem[:50])
def test_the_head_of_a_recipe_says_the_same(path):
    recipe = recipes.load_recipe(path)
    flops = recipe_table.forward_flops(recipe_table.build(recipe), recipe)
    head = path.read_text().split("\nprefix:")[0]
    assert f"{recipe_table.images_per_epoch(recipe):,} images per epoch" in head
    assert f"{flops / 1e9:.0f} GFLOP" in head
    assert f"About {recipe_table.describe_hours(recipe_table.hours(recipe, flops))} h per fold" in head


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*_24gb_*.yaml")), ids=lambda path: path.stem)
def test_a_preset_for_one_gpu_is_the_recipe_for_eight_in_smaller_batches(path):
    preset = recipes.load_recipe(path)
    recipe = recipes.load_recipe(recipes.find_recipe(preset.model.removesuffix("_24gb"), preset.stage))
    names = {"prefix", "save_dir", "model", "initialize_from"}
    memory = {"max_local_batch_size", "gradient_checkpointing", "sam_gradient"}
    differing = {key for key, value in vars(recipe).items() if value != getattr(preset, key)}
    assert differing <= names | memory
    assert preset.global_batch_size % preset.max_local_batch_size == 0
    if preset.stage > 1:
        before = recipes.load_recipe(recipes.find_recipe(preset.model, preset.stage - 1))
        assert preset.initial_checkpoint(2) == before.checkpoint_path(2)
