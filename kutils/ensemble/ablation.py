"""Trains a recipe with one change at a time and with all, and measures what each is worth on the same images."""

import dataclasses
import re
import shlex
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kutils.data import datasets
from kutils.ensemble import bootstrap
from kutils.runs import finished, launch, recipes
from kutils.runs.finished import FinishedRun
from kutils.runs.launch import Run
from kutils.runs.recipes import Recipe
from kutils.system import devices, locks, paths
from kutils.system.ranks import Ranks
from kutils.training import examples
from kutils.training.train import train

BASE = "seed"  # name of the recipe without a change
SMALL_SET = "shapes_small"  # 700 rendered images of 64 px in four folds: what two CPU cores can train on many times
SMALL = f"datasets={SMALL_SET} input_size=64 epochs=3 lr=1e-3"  # keys for a run in 15 seconds
# the published settings, shortened: the head alone at first, MADGRAD, one rate for all layers
PUBLISHED = (
    "optimizer=madgrad layer_decay=1 head_init=xavier augment=published loss=cosine warmup_epochs=1 freeze_epochs=1 "
    "warmup_lr=1e-2 sam_rho=0 ema_decay=0 clip_grad=0 head_width=0 freeze_blocks=0"
)
RIDGE = "head_init=ridge warmup_epochs=0 freeze_epochs=0"
STAGE_2 = "stage=2 initialize_from={seed} warmup_epochs=0 freeze_epochs=0 lr={tenth}"
CHANGES = {  # name -> changed keys; {seed}: checkpoint of `seed`, {tenth}: of the rate, {larger}: half as many px more
    BASE: "",
    "adamw": "optimizer=adamw",
    "layer_decay": "layer_decay=0.75",
    "ema": "ema_decay=0.9998",
    "ridge": RIDGE,
    "head_width": "head_width=1536",
    "freeze_blocks": "freeze_blocks=2",
    "clip_grad": "clip_grad=1",
    "augment_weak": "augment=weak",
    "augment_none": "augment=none",
    "angular": "loss=angular",
    "second_stage": STAGE_2,
    "larger_input": f"{STAGE_2} input_size={{larger}}",
    "all": f"optimizer=adamw layer_decay=0.75 ema_decay=0.9998 {RIDGE} clip_grad=1 augment=weak",
    "head_alone": "head_init=ridge epochs=1 warmup_epochs=0 freeze_epochs=1 lr=0 min_lr=0 augment=none",
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of an ablation: a change and its keys, a seed and a fold."""

    change: str
    keys: str
    seed: int
    run: Run


def plan_trials(
    config: str | Path, base: str = "", changes: Sequence[str] = (), seeds: Sequence[int] = (0, 1, 2), folds=(0,)
) -> list[Trial]:
    """Plan the runs: every change with every seed and fold, the seed's recipe first.

    Args:
        config: recipe file whose network and data are trained with the published settings.
        base: further keys of all runs, such as "lr=3e-4 epochs=2"; those of a change win.
        changes: names of CHANGES, each with or without a learning rate: "all", "all@1e-4"; empty: all.
    Raises: ConfigError for a key or value that does not exist; ValueError for an unknown change, naming the nearest.
    """
    order = list(CHANGES)
    for name in changes:
        if (stem := name.partition("@")[0]) not in order:
            raise ValueError(f"no change {stem!r}{recipes.nearest(stem, order)} (there are {', '.join(order)})")
    chosen = sorted({BASE, *(changes or order)}, key=lambda name: (order.index(name.partition("@")[0]), name))
    shared = recipes.parse_overrides(shlex.split(PUBLISHED)) | recipes.parse_overrides(shlex.split(base))
    recipe = recipes.load_recipe(config, [f"{key}={value}" for key, value in shared.items()])
    series = re.sub(r"\W", "_", f"ablation_{recipes.load_recipe(config).prefix}_{'_'.join(recipe.datasets)}")
    trials = []
    for seed in seeds:
        start = f"{series}/{series}_{BASE}_seed{seed}_fold{{fold}}_best_cossim.pth"
        for name in chosen:
            change, _, rate = name.partition("@")
            keys = CHANGES[change].format(seed=start, tenth=recipe.lr / 10, larger=recipe.input_size * 3 // 2)
            keys += f" lr={rate}" if rate else ""
            own = f"seed={seed} prefix={series}_{name.replace('@', '_lr')}_seed{seed} save_dir={series}"
            values = shared | recipes.parse_overrides(shlex.split(keys)) | recipes.parse_overrides(shlex.split(own))
            overrides = [f"{key}={value}" for key, value in values.items()]
            trials += [Trial(name, keys.strip(), seed, launch.plan(config, fold, overrides)) for fold in folds]
    return trials


def make_missing_datasets(recipe: Recipe) -> None:
    """Make `shapes_small` where the recipe names it and it is missing; other data sets as `launch.ensure_datasets`."""
    if SMALL_SET in recipe.datasets and not (paths.input_dir() / f"{SMALL_SET}.folds.json").is_file():
        size = ["--num-prompts", "700", "--images-per-prompt", "1", "--size", "64"]
        launch.run_module("kutils", "generate", "--shapes-dataset", SMALL_SET, *size)
        launch.run_module("kutils", "folds", str(paths.input_dir() / f"{SMALL_SET}.tsv"), "--folds", "4")
    launch.ensure_datasets(recipe)


def run_trials(trials: Sequence[Trial]) -> list[FinishedRun]:
    """Train what is not finished yet, in this process, one run after the other; each is an ordinary run folder.

    Raises: ValueError as training does; after Ctrl-C or SIGTERM, which save first, the same call goes on from there.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, trial in enumerate(trials, start=1):
        run = trial.run
        print(f"run {number} of {len(trials)}: {run.recipe.prefix}, fold {run.fold}", flush=True)
        ranks = Ranks(0, 1, devices.pick_device(run.recipe.device))
        try:
            with locks.held([run.folder], ranks):
                train(run.recipe, run.fold, ranks, config=str(run.config_path), overrides=list(run.overrides))
        finally:  # training looks for these signals in its own way
            for signal_number, handler in handlers.items():
                signal.signal(signal_number, handler)
        for trained in run.recipe.last_checkpoints(run.fold).values():
            trained.unlink(missing_ok=True)  # the best one stays
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    runs = [finished.read_run(trial.run.folder) for trial in trials]
    by_commit = Counter((run.environment.get("git_commit") or "unknown")[:8] for run in runs)
    if len(by_commit) > 1:
        counts = ", ".join(f"{count} by {commit}" for commit, count in by_commit.items())
        print(
            f"warning: the runs were trained by different commits ({counts}), and differences may come from the code; "
            f"a run whose folder is moved away from {runs[0].folder.parent} is trained again",
            flush=True,
        )
    return runs


def cosines_of(trial: Trial) -> pd.Series:
    """Validation cosine of each image, float64, by its row; ValueError if data have changed since."""
    table = examples.validation_table(trial.run.recipe, trial.run.fold, trial.run.folder)
    return table.set_index("row")["cosine"].sort_index().astype(np.float64)


def gains(trials: Sequence[Trial], against: str = BASE) -> pd.DataFrame:
    """What each change is worth: means over seeds, and the difference to one of them on the same images.

    The interval is by bootstrap over prompts, of each image's mean over seeds. `spread` is the standard deviation
    of the differences that single seeds have.

    Returns: index: changes in the order of CHANGES; keys, cosine, difference, low, high, spread, runs, seconds.
    """
    groups: dict[str, dict[int, list[Trial]]] = {}
    for trial in trials:
        groups.setdefault(trial.change, {}).setdefault(trial.seed, []).append(trial)
    by_change = {
        name: pd.DataFrame({seed: pd.concat(map(cosines_of, own)) for seed, own in seeds.items()})
        for name, seeds in groups.items()
    }
    base = by_change[against]
    data = datasets.load_datasets(trials[0].run.recipe.datasets)
    prompts = data.prompt_codes[base.index.to_numpy()]
    lines = {}
    for name, cosines in by_change.items():
        difference = (cosines - base).mean(axis=1)
        low, high = bootstrap.interval(difference.to_numpy(), prompts)
        results = [finished.read_result(trial.run.folder) for own in groups[name].values() for trial in own]
        lines[name] = {
            "keys": next(trial.keys for trial in trials if trial.change == name),
            "cosine": float(cosines.to_numpy().mean()),
            "difference": float(difference.mean()),
            "low": low,
            "high": high,
            "spread": float((cosines - base).mean().std(ddof=1)) if cosines.shape[1] > 1 else np.nan,
            "runs": len(results),
            "seconds": float(np.mean([result.seconds for result in results])),
        }
    return pd.DataFrame(lines).T.rename_axis("change")


def as_markdown(table: pd.DataFrame, against: str = BASE) -> str:
    """The table as a page holds it; `against` has no difference."""
    lines = [
        "| change | keys | runs | cosine | difference | 95 % interval | deviation of seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in table.iterrows():
        keys = " ".join(f"`{key}`" for key in row["keys"].split()) or "the published settings"
        own = f"| {name} | {keys} | {row['runs']} | {row['cosine']:.4f} "
        if name == against:
            lines.append(f"{own}| | | |")
        else:
            spread = "" if np.isnan(row["spread"]) else f"{row['spread']:.4f} "
            own += f"| {row['difference']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} "
            lines.append(f"{own}| {spread}|")
    return "\n".join(lines)
