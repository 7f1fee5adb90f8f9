# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ablation: what does each change of the recipe add?
#
# **What it does.** Trains a network with the published settings, then with one change at a time, then with all of them,
# several seeds each, and compares them on the same images. Each run is an ordinary run folder in `working/runs/`.
# Finished runs are not trained again: the same call continues after an interruption.
# `papermill notebooks/ablation.ipynb working/runs/ablation.ipynb -p config lite0_stage1.yaml -p seeds 0,1,2`
#
# **What it needs.** Data sets with folds; `shapes_small` (700 images of 64 px) and `shapes` are made if missing.
#
# **How long it takes.** Runs times the time of one: as it stands, 45 runs of 15 seconds of a CPU core, so a quarter of
# an hour. `-p base "datasets=shapes epochs=2 lr=6e-4"` is larger: some minutes a run. `-p config tiny_vit_stage1.yaml`
# has another network.

# %% tags=["parameters"]
config: str = "lite0_stage1.yaml"  # recipe whose network and data are trained, of conf/
base: str = ""  # keys of all runs beside the published settings; empty: 700 images of 64 px, three epochs at 1e-3
changes: str = ""  # names of changes, separated by commas; all@1e-4 is `all` at another rate; empty: all of them
seeds: str = "0,1,2"  # of weights, order and augmentation
folds: str = "0"  # validation folds, separated by commas

# %%
import sys
from importlib.util import find_spec
from pathlib import Path

here = Path(globals().get("__file__", "notebook")).absolute()  # a notebook knows only the current folder
clones = [folder for folder in here.parents if (folder / "kutils" / "__main__.py").is_file()]
if not clones and find_spec("kutils") is None:  # neither in a clone nor installed: the code data set on Kaggle
    clones = [path.parent.parent for path in Path("/kaggle/input").glob("**/kutils/__main__.py")]
sys.path[:0] = map(str, clones[:1])  # this clone's kutils, not an installed one
from kutils.runs import launch

launch.check_parameters(In)  # noqa: F821 (IPython's list of executed cells)

# %% [markdown]
# ## Which runs are compared?
# The first run has no change: the published settings. The others change the keys in the table.

# %%
from kutils.ensemble import ablation
from kutils.runs import recipes

numbers = [[int(number) for number in recipes.split_names(text)] for text in (seeds, folds)]
trials = ablation.plan_trials(config, base or ablation.SMALL, recipes.split_names(changes), *numbers)
for name, keys in {trial.change: trial.keys for trial in trials}.items():
    print(f"{name}: {keys or 'the published settings'}")

# %% [markdown]
# ## Training
# One run after the other, in this process.

# %%
ablation.make_missing_datasets(trials[0].run.recipe)
ablation.run_trials(trials)

# %% [markdown]
# ## What is each change worth?
# The difference to the published settings on the same images, averaged over seeds, with its 95 % interval by bootstrap
# over prompts. If the interval contains 0, the change has no significant effect on these images.

# %%
from kutils.views import score_plots

table = ablation.gains(trials)
print(ablation.as_markdown(table))

# %% [markdown]
# ## Is training worth more than the head in closed form?
# The same table, of differences to that head on the same images.

# %%
if "head_alone" in table.index:
    print(ablation.as_markdown(ablation.gains(trials, "head_alone"), "head_alone"))

# %%
score_plots.bar_scores(table["cosine"].astype(float).to_dict(), title=f"Means over seeds {seeds}, folds {folds}");
