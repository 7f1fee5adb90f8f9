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
# # Refine: stages 2 and 3
#
# **What it does.** Stage 2 continues from stage 1's best checkpoint of the same fold with sharpness-aware minimisation
# (SAM), all data sets and no augmentation; stage 3 adds one epoch to stage 2.
# `papermill notebooks/refine.ipynb working/runs/refine_lite0_fold0.ipynb -p model lite0 -p fold 0`
#
# **What it needs.** The checkpoint of the stage before, trained on the same folds, and the recipe's data sets in
# `input/`.
#
# **How long it takes.** The tiny models: one to two minutes on two CPU cores. The large ones: see the comment at the
# top of each recipe in `conf/`; a step costs twice one of stage 1.

# %% tags=["parameters"]
model: str = "lite0"  # a model that has a recipe in conf/
stage: int = 2  # 2: SAM from stage 1; 3: one more epoch from stage 2
fold: int = 0  # validation fold, 0..9
num_processes: int = 0  # ranks on this machine; 0: one per visible GPU, or one on the CPU
overrides: str = ""  # keys of the recipe to change, as for dist_train.sh
recipe: str = ""  # a recipe file of conf/ instead of a model's own
hours: float = 0.0  # time limit, after which it saves and stops, to be continued later; 0: no limit
planned: str = ""  # file of a run planned by dist_train.sh, instead of model, fold, overrides and recipe

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
# ## What will run?
# The recipe of this model, with the overrides applied. A wrong model, key or value is an error that names the nearest
# valid one.

# %%
from kutils.runs import finished
from kutils.views import image_plots, score_plots, training_plots

run = launch.plan_run(model, stage, fold, overrides, recipe, planned)
print(run.config_path.name, *run.overrides)
print(run.recipe.to_yaml())

# %% [markdown]
# ## Train
# One rank per GPU; rank 0 prints here, and the run folder has the log of every rank. Run again, the notebook shows a
# finished fold and continues an interrupted one. The data set `shapes` of the tiny recipes is made first if it is
# missing. On Kaggle, data sets and a previous version's output are found among the notebook's inputs.

# %%
from kutils.kaggle import mounts

run = mounts.prepare_training(run)
launch.ensure_datasets(run.recipe)
launch.train_on_ranks(run, num_processes, hours)
result = finished.read_result(run.folder)  # None if the hours were over before

# %% [markdown]
# ## Did it learn, and did it stop too early?
# Loss and validation cosine should flatten together with the learning rate; a cosine that still rises suggests more
# epochs; a cosine that falls together with the loss is overfitting.

# %%
if run.metrics_path.is_file():
    training_plots.learning_curve(run.metrics_path, baseline=result.mean_prompt_baseline if result else None)

# %%
if result:
    print(result.summary())
    print(f"{result.gain:+.4f} over the mean prompt, in {result.seconds:.0f} s")
    print(f"all of it in one page: {run.folder / 'report.html'}")

# %% [markdown]
# ## What did the network get?
# Training images as the network gets them (no augmentation in these stages), with their prompts.

# %%
from kutils.training import examples

images, prompts = examples.training_examples(run.recipe, run.fold)
image_plots.image_grid(images, prompts, columns=4);

# %% [markdown]
# ## How good is a single prediction?
# The cosine of every validation image with its own prompt; the score is their mean.

# %%
if result:
    table = examples.validation_table(run.recipe, run.fold, run.folder)
    score_plots.similarity_histogram(table["cosine"], threshold=None)
    print(table["cosine"].describe(percentiles=[0.05, 0.5, 0.95]).round(4).to_frame().T.to_string())

# %% [markdown]
# ## Where is it right, and where is it wrong?
# Best and worst validation images: the true prompt, and the prompt of all data sets that is nearest to the
# prediction.

# %%
if result:
    shown = examples.choose_extremes(table, run.recipe, count=4)
    image_plots.best_and_worst(shown)
