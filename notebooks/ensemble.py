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
# # Ensemble: how much does each family count?
#
# **What it does.** Fits one weight per family of models on predictions of images that no member has trained on, and
# scores the result on images that the fit has not seen either.
# `papermill notebooks/ensemble.ipynb working/runs/ensemble_tiny.ipynb -p config conf/ensemble_tiny.yaml`
#
# **What it needs.** The members that the configuration names, trained: their checkpoints, and the out-of-fold
# predictions in the run folders of those validated on fold 0.
#
# **How long it takes.** Seconds.

# %% tags=["parameters"]
config: str = "conf/ensemble_tiny.yaml"  # families, members and method
output: str = ""  # JSON file of the weights; empty: working/models/<config>.json (a previous one becomes .bak)
seed: int = 0  # of the two halves of fold 0

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
# ## Is the ensemble better than its models?
# Fold 0 is split into two halves by topic (clusters of its prompts). Every method of weighting is fitted on one half
# and scored on the other, compared with equal weights.

# %%
from kutils.ensemble import blending, fit
from kutils.views import score_plots

fitted, path = fit.fit(config, output, seed)
print(f"{fitted.summary()}\nwrote {path}")

# %%
methods = {f"{method} weights": fitted.scores[method] for method in blending.METHODS}
title = f"Fold 0, {fitted.rows['unseen']:,} unseen images"
score_plots.bar_scores(fitted.scores["members"] | methods, baseline=fitted.scores["baseline"], title=title);

# %%
best = max(fitted.scores["members"], key=fitted.scores["members"].get)
gain = fitted.scores["chosen"] - fitted.scores["members"][best]
print(f"{fitted.method} weights: {fitted.scores['chosen']:.4f}, {gain:+.4f} over the best family alone ({best})")

# %% [markdown]
# ## Which models are in it?
# A model's score is from its training, on its own validation fold; scores of different folds are not comparable.

# %%
import pandas as pd

members = [(family, each) for family, of in fitted.families.items() for each in of]
rows = [(family, Path(each.recipe).stem, each.fold, each.neighbours, each.score) for family, each in members]
pd.DataFrame(rows, columns=["family", "recipe", "fold", "neighbours", "network's cosine on its fold"]).round(4)

# %% [markdown]
# ## How much weight does each family get?
# A family that makes the same errors as another one gets little weight, even if it is good alone.

# %%
score_plots.bar_weights(fitted.mean_weights());

# %% [markdown]
# ## What would be lost without one family?
# The same fit with one family left out, on the same unseen images: a family without a loss need not be
# run.

# %%
without = pd.Series(fitted.leave_one_out, name="score without it", dtype=float).to_frame()
without.assign(loss=fitted.scores["family"] - without["score without it"]).style.format("{:.4f}")

# %% [markdown]
# ## Do the families make the same errors?
# Correlation of the families' errors (prediction minus truth, over all dimensions): the lower, the more
# averaging gains.

# %%
correlations = pd.DataFrame(fitted.error_correlations)
correlations.style.format("{:.3f}").background_gradient(cmap="Blues", vmin=0, vmax=1)
