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
# # Ladder: what is a score worth?
#
# **What it does.** Compares finished models with predictions without a model, with those of a frozen backbone, and with
# those that know another image of the same prompt. Every rung has its 95 % interval. The command `kutils ladder` does
# the same.
# `papermill notebooks/ladder.ipynb working/runs/ladder.ipynb -p names shapes -p fold 0`
#
# **What it needs.** A data set with folds; finished runs of the fold, if they are to be in the table.
#
# **How long it takes.** A minute or two on two CPU cores for 8,000 pictures: the frozen backbone runs once on each.

# %% tags=["parameters"]
names: str = "shapes"  # data sets of input/, separated by commas
fold: int = 0  # validation fold
runs: str = ""  # names of finished runs, also with *, separated by commas; empty: all of this fold
config: str = "conf/lite0_stage1.yaml"  # recipe whose pretrained backbone gives the frozen rungs
most: int = 20000  # images of each kind; larger sets are sampled by prompt

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
# ## Which predictions are compared?
# Images of one prompt are not independent: intervals are by bootstrap over prompts. Shuffled pairs are a control:
# a score above the mean prompt would show an error of the measurement.

# %%
from kutils.ensemble import ladder
from kutils.runs import recipes
from kutils.system import paths
from kutils.views import ladder_plots

recipe = recipes.load_recipe(config)
rungs = ladder.climb(recipes.split_names(names), fold, recipes.split_names(runs), recipe, most)
table = ladder_plots.format_ladder(rungs)
print(table)

# %% [markdown]
# ## How high is each rung, what would more prompts bring, and which predictions can be trusted?
# The dotted part of the learning curve is an extrapolation. The last panel leaves out predictions with small norms
# first.

# %%
ladder_plots.draw_ladder(rungs);

# %%
saved = ladder_plots.save_ladder(rungs, paths.working_dir() / "ladder")
print(saved)
