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
# # Explore: data, models, and an image of your own
#
# **What it does.** Shows what is in the data sets, where the models are good and where they fail, and what they predict
# for your own image. In Jupyter the views have widgets; with papermill, parameters choose what they show.
# `papermill notebooks/explore.ipynb working/runs/explore.ipynb -p search "a red boat"`
#
# **What it needs.** A data set in `input/` with embeddings (`shapes` is made if there is none), and for the second half
# finished runs of `train` or `refine`: `make train` takes three minutes.
#
# **How long it takes.** Half a minute on two CPU cores, most of it for the map of prompts.

# %% tags=["parameters"]
datasets: str = ""  # of input/, as "cc3m,lexica"; empty: those of the run finished last, or shapes
models: str = ""  # finished runs, as "tiny_vit_*,lite0_*"; empty: all
fold: int = 0  # validation fold whose images are shown
search: str = "a small red boat at sunset"  # words to look for among the prompts
search_fold: int = -1  # search only this fold; -1: all folds
model: str = ""  # whose predictions are shown; empty: the best
sort: str = "worst"  # worst, best, random or disagreement
slice: str = "similarity"  # words, source, kind or similarity
image: str = ""  # an image file of your own; empty: one on which the models disagree
count: int = 8  # images or prompts per view
map_prompts: int = 2000  # prompts of the map, drawn at random

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
# ## What is there?
# The data sets with their distinct prompts, and the finished runs.

# %%
from kutils.views import data_plots, html_tables, image_plots, score_plots, widgets
from kutils.views.exploration import Exploration

explored = Exploration.open(datasets, models)
print(explored.summary())
score_plots.bar_counts(explored.sources(), title="Images by source", unit="images");

# %% [markdown]
# ## How long are the prompts?
# The text encoder reads the first 256 tokens of a prompt, about 190 words.

# %%
data_plots.prompt_lengths(explored.bank.prompts.to_pylist());

# %% [markdown]
# ## Which prompts are similar?
# Points close together are similar prompts; large distances mean nothing. If folds keep similar prompts together,
# clusters have one colour; random folds are mixed everywhere.

# %%
points, labels = explored.map_points(map_prompts)
data_plots.prompt_map(points, labels, title=f"{len(points):,} prompts by similarity");

# %% [markdown]
# ## Which prompts are nearly the same?
# The most similar pairs, with an image of each. Two such prompts in one fold do no harm. In two folds, the
# model is validated on nearly the same prompt that it was trained on.

# %%
twins = explored.near_duplicates(count=4)
image_plots.pairs(twins)
html_tables.show(twins[["cosine", "fold_a", "fold_b", "prompt_a", "prompt_b"]])

# %% [markdown]
# ## How much leaks between the folds?
# The share of a fold's prompts that have a similar one in another fold; scores on clean rows leave them out.

# %%
if report := explored.fold_report():
    data_plots.fold_report(report)

# %% [markdown]
# ## Which images match some words?
# The prompts nearest to the words, by embedding, not by spelling; and an image of each.

# %%
widgets.search(explored, search, search_fold, count)

# %% [markdown]
# ## How good are the models?
# The cosine of every prediction with its prompt, for every finished run that was validated on these images, and for the
# ensemble, whose few weights were fitted on half of them.

# %%
if has_models := explored.has_models(fold):
    validated = explored.validated(fold)
    score_plots.bar_scores(validated.scores(), baseline=validated.baseline)
    score_plots.similarity_histogram(dict(validated.cosines.items()))

# %% [markdown]
# ## Where are they right, and where are they wrong?
# Images of different prompts, each with its true prompt and the prompt nearest to the model's prediction.

# %%
if has_models:
    widgets.examples(explored, fold, model, sort, count)

# %% [markdown]
# ## What are they good at?
# Scores by the length of the prompts, their source and kind, and their similarity to the nearest training prompt:
# images of prompts that resemble training prompts are easier.

# %%
if has_models:
    widgets.browse_slices(explored, fold, slice)

# %% [markdown]
# ## Where do the models disagree?
# The prompt nearest to each model's prediction. An ensemble gains most where its members err in different ways.

# %%
if has_models and len(validated.single_models) > 1:
    image_plots.disagreement(explored.disagreement(fold))

# %% [markdown]
# ## What do they predict for your own image?
# Give its path, or upload it: the nearest prompts by every model, with their cosines. A prompt above 0.7 is about the
# same thing; if all are far below, no prompt of these data sets describes the image. The table says how sure each
# model is, by the length of its prediction.

# %%
if has_models:
    widgets.own_image(explored, fold, image, count)
