"""The pages name what is there: files, links, commands with their options, notebooks, keys; and they stay short."""

import ast
import contextlib
import dataclasses
import importlib.util
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import timm
from fixtures import recipe_table, rooms_page

from kutils import __main__ as kutils
from kutils.benchmarks import measuring
from kutils.runs import recipes
from kutils.system.paths import repository_root

ROOT = repository_root()
MOST_LINES = {
    "README.md": 150,
    "notebooks/README.md": 70,
    "conf/README.md": 110,
    "conf/BEYOND.md": 90,
    "conf/PAIRS.md": 40,
    "input/README.md": 120,
    "working/README.md": 60,
    "kernel-metadata/README.md": 60,
    "kutils/README.md": 120,
    "tests/README.md": 40,
    "kutils/benchmarks/README.md": 115,
}
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in MOST_LINES}
KEYS = {item.name for item in dataclasses.fields(recipes.Recipe)}
KEY_NAMES = KEYS | {"key"}  # `key=value` stands for any
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
OTHERS_OPTIONS = {"--nnodes", "--nproc-per-node", "--signal"}  # of torchrun and Slurm
every_page = pytest.mark.parametrize("page", PAGES)


def code(text: str) -> list[str]:
    """Lines of code: those of blocks, continued ones joined, and what stands between backquotes."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return lines + re.findall(r"`([^`]+)`", re.sub(r"^ *```\w*\n.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def words(line: str) -> list[str]:
    with contextlib.suppress(ValueError):  # a quotation mark of its own
        return shlex.split(line.replace(r"\|", "|"), comments=True)
    return []


def kutils_commands(text: str) -> list[list[str]]:
    """The words after every `kutils`, or `-m kutils`, up to the end of that command."""
    found = []
    for line in code(text):
        parts = words(line)
        for number, word in enumerate(parts):
            if word == "kutils" or word.endswith("bin/kutils"):
                rest = parts[number + 1 :]
                ends = [index for index, part in enumerate(rest) if part in ("||", "&&", "|") or part.endswith(";")]
                found.append(rest[: ends[0]] if ends else rest)
    return found


@cache
def help_of(*command: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        kutils.main([*command, "--help"])
    return output.getvalue()


def subcommands_of(command: str) -> list[str]:
    names = re.search(r"\{([\w,]+)\} \.\.\.", help_of(command))
    return names[1].split(",") if names else []


@cache
def all_help() -> str:
    texts = [help_of(command) for command in kutils.COMMANDS]
    return "\n".join(texts + [help_of(name, each) for name in kutils.COMMANDS for each in subcommands_of(name)])


def has_option(text: str, option: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text) is not None


def values(notebook: str) -> set[str]:
    """Names in a notebook's cell of parameters."""
    source = (ROOT / "notebooks" / f"{notebook}.py").read_text(encoding="utf-8")
    cell = source.split('# %% tags=["parameters"]')[1].split("# %%")[0]
    return {node.target.id for node in ast.parse(cell).body}


def rows(text: str, head: str) -> list[list[str]]:
    """Cells of the table whose head begins with `head`."""
    table = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


@every_page
def test_a_page_is_short(page):
    assert len(PAGES[page].splitlines()) <= MOST_LINES[page]


def test_every_folder_page_is_held_to_these_rules_and_named_by_the_readme():
    pages = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("[!.]*/README.md")}
    assert pages <= set(PAGES)
    assert all(f"]({page})" in PAGES["README.md"] for page in PAGES if page != "README.md")


@every_page
def test_links_and_pictures_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)", PAGES[page]):
        path, _, anchor = link.partition("#")
        if not re.match(r"\w+:", link):
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in headings}


@every_page
def test_named_files_and_modules_exist(page):
    text = PAGES[page]
    folders = r"conf|notebooks|input|working|tests|kutils|kernel-metadata|\.ci|\.github"
    named = set(re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]+\.(?:yaml|py|ipynb|sh|md|json|webp)\b", text))
    made = {name for name in named if re.match("working/.*/", name) or Path(name).stem in ("OUT", "RECIPE", "STAGE2")}
    assert {name for name in named - made if not (ROOT / name).is_file()} == set()
    modules = set(re.findall(r"\bkutils(?:\.\w+)+", text))
    assert {name for name in modules if importlib.util.find_spec(name) is None} == set()
    patterns = [name for name in code(text) if re.fullmatch(r"[\w*/.-]*\*[\w*/.-]*\.yaml", name)]
    assert all(list((ROOT / "conf").glob(name)) for name in patterns)


@every_page
def test_commands_and_their_options_exist(page):
    for command in kutils_commands(PAGES[page]):
        if command[:1] in ([], ["COMMAND"]) or command[0].startswith("-"):
            continue
        assert command[0] in kutils.COMMANDS, f"kutils {' '.join(command)}"
        text = help_of(command[0])
        if subcommands := subcommands_of(command[0]):
            names = command[1].split("|") if len(command) > 1 else subcommands
            assert set(names) <= set(subcommands), f"kutils {' '.join(command)}"
            text = help_of(command[0], names[0])
        wrong = [word for word in command if re.match(r"--?[a-z]", word) and not has_option(text, word.split("=")[0])]
        assert not wrong, f"kutils {' '.join(command)} has no {wrong}"


@every_page
def test_options_keys_and_variables_exist(page):
    """Those that stand alone between backquotes, and keys after a command."""
    sources = MAKEFILE + "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kutils").rglob("*.py"))
    for line in code(PAGES[page]):
        parts = words(line)
        if parts and re.match(r"--[a-z]", parts[0]):
            option = parts[0].split("=")[0]
            assert option in OTHERS_OPTIONS or has_option(all_help(), option), line
        runs = {"kutils", "dist_train.sh", "overrides"} & set(parts)
        for word in parts if runs or re.fullmatch(r"\w+=\S+", line) else []:
            if key := re.match(r"([A-Za-z_]\w*)=", word):
                name = key[1]
                assert name in KEY_NAMES if name.islower() else re.search(rf"\b{name}\b", sources), line


@every_page
def test_notebooks_have_the_parameters_that_papermill_is_given(page):
    for line in code(PAGES[page]):
        parts = words(line)
        notebooks = [Path(word).stem for word in parts if re.fullmatch(r"notebooks/\w+\.ipynb", word)]
        every = {name for path in (ROOT / "notebooks").glob("*.py") for name in values(path.stem)}
        for flag, name, value in zip(parts, parts[1:], parts[2:], strict=False):
            if flag in ("-p", "-r") and "make" not in parts:
                assert name in (values(notebooks[0]) if notebooks else every), line
                if name == "model":
                    assert recipes.find_recipe(value, 1)
                if name == "sections":
                    assert set(value.split(",")) <= set(measuring.SECTIONS), line


@every_page
def test_make_targets_and_their_variables_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for line in code(PAGES[page]):
        parts = words(line)
        for number, word in enumerate(parts):
            if word == "make":
                names = [part for part in parts[number + 1 :] if "=" not in part]
                assert set(names) <= targets, line
                variables = {part.split("=")[0] for part in parts[number + 1 :] if "=" in part}
                assert all(f"$({name})" in MAKEFILE or f"{name} ?=" in MAKEFILE for name in variables), line


def test_every_command_and_every_target_for_users_stands_on_a_page():
    named = {command[0] for text in PAGES.values() for command in kutils_commands(text) if command}
    assert set(kutils.COMMANDS) - {"train-folds", "demo"} <= named  # dist_train.sh and make start these
    everything = "".join(PAGES.values())
    targets = re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE)
    assert [name for name in targets if not re.search(rf"\bmake {name}\b", everything)] == []


def test_the_page_of_notebooks_has_each_with_its_parameters():
    table = rows(PAGES["notebooks/README.md"], "notebook")
    page = {cells[0].strip("`"): set(re.findall(r"`(\w+)`", cells[2])) for cells in table}
    assert page == {path.stem: values(path.stem) for path in (ROOT / "notebooks").glob("*.py")}


def test_the_page_of_recipes_has_every_key():
    named = [name for cells in rows(PAGES["conf/README.md"], "keys") for name in re.findall(r"`(\w+)`", cells[0])]
    assert sorted(named) == sorted(KEYS)


def test_the_page_of_rooms_is_what_the_docstrings_say():
    assert PAGES["kutils/README.md"] == rooms_page.page(), "run `make pages`"
    assert rows(PAGES["README.md"], "room") == rooms_page.rooms()


@pytest.mark.slow
def test_the_table_of_recipes_is_what_the_recipes_say():
    record = recipe_table.measured()
    lines = [recipe_table.row(path, record) for path in recipe_table.seed_recipes()]
    assert len(lines) == 12
    table = "\n".join([recipe_table.header(record), *lines])
    assert table in PAGES["conf/README.md"], "python tests/fixtures/recipe_table.py prints the table"


@pytest.mark.slow
@pytest.mark.parametrize("path", recipe_table.beyond_recipes(), ids=lambda path: path.stem)
def test_a_recipe_beyond_says_its_licence_and_cost_in_its_head_and_on_the_page(path):
    """Worked out from the recipe; the licence is the one that timm names, and another page's where that is in doubt."""
    facts, recipe = recipe_table.beyond_facts(path), recipes.load_recipe(path)
    assert f"| {' | '.join(facts.values())} |" in PAGES["conf/BEYOND.md"], "python tests/fixtures/recipe_table.py"
    assert timm.get_pretrained_cfg(recipe.backbone).license in facts["licence"].lower()
    head = " ".join(line.removeprefix("# ") for line in path.read_text().split("\nprefix:")[0].splitlines())
    assert f"{facts['million']} million parameters, {facts['gflop']} GFLOP forward per image." in head
    assert f": {facts['rtx']} on one RTX 4090 (165 TFLOP/s), {facts['a100']} on 8 x A100." in head
    assert f"{recipe_table.images_per_epoch(recipe):,} images per epoch" in head
    trained = f"The lowest {recipe.freeze_blocks} blocks of 40 stay frozen: {facts['trained']} million"
    assert (trained in head) == (recipe.freeze_blocks > 0)
    weights = (8 * float(facts["million"]) + 12 * float(facts["trained"])) / 1000
    said = float(re.search(r"the average take ([\d.]+) GB", head)[1])
    assert said == pytest.approx(weights, abs=0.06)


@pytest.mark.parametrize("path", recipe_table.seed_recipes(), ids=lambda path: path.stem[:50])
def test_the_head_of_a_recipe_says_the_same(path):
    recipe = recipes.load_recipe(path)
    flops = recipe_table.forward_flops(recipe_table.build(recipe), recipe.input_size)
    head = path.read_text().split("\nprefix:")[0]
    assert f"{recipe_table.images_per_epoch(recipe):,} images per epoch" in head
    assert f"{flops / 1e9:.0f} GFLOP" in head
    assert f"About {recipe_table.describe_hours(recipe_table.hours(recipe, flops))} h per fold" in head


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*_24gb_*.yaml")), ids=lambda path: path.stem)
def test_a_preset_for_one_gpu_is_the_recipe_for_eight_in_smaller_batches(path):
    preset = recipes.load_recipe(path)
    recipe = recipes.load_recipe(recipes.find_recipe(preset.model.removesuffix("_24gb"), preset.stage))
    names = {"prefix", "save_dir", "model", "initialize_from"}
    memory = {"max_local_batch_size", "gradient_checkpointing"}
    differing = {key for key, value in vars(recipe).items() if value != getattr(preset, key)}
    assert differing <= names | memory
    assert preset.global_batch_size % preset.max_local_batch_size == 0
    if preset.stage > 1:
        before = recipes.load_recipe(recipes.find_recipe(preset.model, preset.stage - 1))
        assert preset.initial_checkpoint(2) == before.checkpoint_path(2)


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("sd44m_*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_for_downloaded_pairs_is_the_publications_on_another_data_set(path):
    own = recipes.load_recipe(path)
    recipe = recipes.load_recipe(recipes.find_recipe(own.model.removeprefix("sd44m_"), own.stage))
    differing = {key for key, value in vars(recipe).items() if value != getattr(own, key)}
    assert differing <= {"prefix", "save_dir", "model", "datasets", "initialize_from"} and own.datasets == ("sd44m",)
    assert path.stem == own.prefix == f"{own.model}_stage{own.stage}"
    if own.stage > 1:
        before = recipes.load_recipe(recipes.find_recipe(own.model, own.stage - 1))
        assert own.initial_checkpoint(2) == before.checkpoint_path(2)
    flops, images = recipe_table.forward_flops(recipe_table.build(recipe), recipe.input_size), 3_960_000
    hours = recipe_table.hours(recipe, flops) * images / recipe_table.images_per_epoch(recipe)
    head = path.read_text().split("\nprefix:")[0]
    assert f"About {recipe_table.describe_hours(hours)} h per fold" in head and f"{images:,} images per epoch" in head
    assert f"{flops / 1e9:.0f} GFLOP" in head and f"conf/{path.name}" in head


def test_there_is_a_recipe_for_downloaded_pairs_of_each_network():
    models = {recipes.load_recipe(path).model for path in recipe_table.seed_recipes()}
    names = {f"sd44m_{model}_stage{stage}.yaml" for model in models for stage in (1, 2)}
    assert names == {path.name for path in (ROOT / "conf").glob("sd44m_*.yaml")} and len(names) == 10
