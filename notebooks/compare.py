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
# # Compare: which run is better, on what, and is the difference significant?
#
# **What it does.** Shows finished runs beside each other: scores and cost, curves, differences between their
# configurations, scores by slice, and the difference to the best run on the same images with its uncertainty.
# `papermill notebooks/compare.ipynb working/runs/compare.ipynb -p runs "tiny_vit*, lite0_stage1_fold0"`
#
# **What it needs.** Finished runs in `working/runs/`, and for the last sections the data sets they were validated on,
# unchanged.
#
# **How long it takes.** Seconds; with data sets of millions of rows, minutes.

# %% tags=["parameters"]
runs: str = ""  # names of runs, also with *, or run folders, separated by commas; empty: all that are finished
group: str = ""  # letter of the validation rows that are compared image by image; empty: those of most runs
most: int = 12  # runs in a figure, the best of their group first

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
# ## Which runs are there?
# Runs with the same letter were validated on the same images, so their scores are comparable. A click on a column's
# head sorts. Clean rows have no similar training prompt; waiting is the share of time spent waiting for data.

# %%
from kutils.ensemble import comparison
from kutils.views import html_tables, score_plots, training_plots

finished = comparison.select_runs(runs)
chosen = comparison.pick_group(finished, group)[: max(1, most)]
print(comparison.groups_text(finished))
html_tables.show(comparison.runs_table(finished), html_tables.RUN_FORMATS, f"{len(finished)} finished runs")

# %% [markdown]
# ## How did they get there?
# Loss and validation cosine over the share of each run's updates, for short and long runs alike. From here on, only the
# runs of one letter are compared.

# %%
training_plots.run_curves(chosen);

# %%
scores = {run.name: run.result.cosine_similarity for run in chosen}
score_plots.bar_scores(scores, baseline=chosen[0].result.mean_prompt_baseline, title=f"Fold {chosen[0].fold}");

# %% [markdown]
# ## What differs between them?
# Keys of the configuration with several values among these runs; names and keys that change no result are left out.

# %%
html_tables.show(comparison.configurations(chosen), caption="Configurations")

# %% [markdown]
# ## Is the best one really better?
# The mean difference to the best run over the same images, and its 95 % confidence interval; images of one prompt are
# not counted as independent. If the interval contains 0, the difference is not significant. Wins is the share of images
# where a run is better than the best one. If the data sets have changed since, the notebook stops here.

# %%
same = comparison.same_rows(chosen)
html_tables.show(same.against_best(), html_tables.DIFFERENCE_FORMATS, f"{len(same.cosines):,} images")

# %% [markdown]
# ## On which prompts is each run good?
# Mean cosine by the words of the prompt, its source and kind, and its similarity to the nearest training prompt.

# %%
sliced = same.by_slice()
if any(len(part) > 1 for part in sliced.values()):
    score_plots.slice_scores(sliced, same.cosines.astype(float).mean().to_dict())

# %%
html_tables.show(comparison.join_slices(sliced), caption="Mean cosine by slice")
