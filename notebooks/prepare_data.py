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
# # Prepare data: embeddings, folds, and figures
#
# **What it does.** Embeds the prompts of a data set if that has not been done, assigns ten folds that keep similar
# prompts together, and shows the content.
# `papermill notebooks/prepare_data.ipynb working/runs/prepare_data.ipynb -p dataset shapes`
#
# **What it needs.** `input/<name>.tsv` (columns `image`, `prompt`, `fold`; fold -1 before folds are assigned) and its
# images. The data set `shapes` needs nothing: its prompts and pictures are made here.
#
# **How long it takes.** The shapes: two to three minutes on two CPU cores. Real prompts: most of it is embedding,
# minutes per million on a GPU.

# %% tags=["parameters"]
dataset: str = "shapes"  # a data set of input/; several, folded together, as "cc3m,lexica"
num_prompts: int = 4000  # prompts of `shapes`, where it is not there yet
images_per_prompt: int = 2  # images of each, where `shapes` is not there yet
threshold: float = 0.7  # cosine from which prompts are similar
num_folds: int = 10  # number of folds, 2..10
method: str = ""  # stratified, partition, components, leader, kmeans; empty: that of the folds there, else stratified
check_images: int = 20000  # images to decode; 0 is all
refold: bool = False  # replace folds that are there; their checkpoints can then not be refined

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
# ## Is everything there?
# Prompts without embeddings are embedded, and rows without folds get some. Existing ones are kept.

# %%
from kutils.data import preparation
from kutils.prompts import folds
from kutils.system import paths
from kutils.views import data_plots, image_plots, score_plots

names = [name.strip() for name in dataset.split(",")]
if names == ["shapes"] and not (paths.input_dir() / "shapes.folds.json").is_file():
    counts = ["--num-prompts", str(num_prompts), "--images-per-prompt", str(images_per_prompt)]
    launch.run_module("kutils", "generate", "--shapes-dataset", "shapes", *counts)
    refold = True  # by this notebook's threshold and method
report = preparation.prepare_datasets(names, threshold, num_folds, method, refold=refold)

# %% [markdown]
# ## What do the rows look like?
# Image paths are relative to `input/`; the embedding of row i is row i of the `.npy` file.

# %%
from kutils.system.tables import read_table

table = read_table(paths.input_dir() / f"{names[0]}.tsv", ["image", "prompt", "fold"])
print(f"{table.num_rows:,} rows")
table.slice(0, 6).to_pandas()

# %% [markdown]
# ## Are images, prompts and folds in order?
# A row is bad if its image cannot be read, or also belongs to another prompt. `kutils check input/<name>.tsv` examines
# all images and moves bad rows to a quarantine table. The message of a problem says how to solve it.

# %%
from kutils.data import checking

tsv_paths = [paths.input_dir() / f"{name}.tsv" for name in names]
checked = checking.check_datasets(tsv_paths, images=check_images)
print(checking.format_checks(checked))

# %% [markdown]
# ## How large are the images, and how many has a prompt?
# Training draws one image per prompt and epoch: more images of a prompt add variety, not weight.

# %%
data_plots.image_counts([item.report for item in checked]);

# %% [markdown]
# ## Do the images show their prompts?
# Random images with their prompts. If they do not match, image paths and prompts are misaligned.

# %%
images, prompts = preparation.random_examples(names, count=8)
image_plots.image_grid(images, prompts, columns=4);

# %% [markdown]
# ## How long are the prompts?
# The text encoder reads 256 tokens, about 190 words, and no more, as the competition's did.

# %%
from kutils.data.prompt_bank import PromptBank

bank = PromptBank.from_datasets(names)
data_plots.prompt_lengths(bank.prompts.to_pylist());

# %% [markdown]
# ## How similar are the prompts to each other?
# Random pairs lie far below the threshold. The share of nearest neighbours above it is the share of prompts that
# would leak in a random split.

# %%
score_plots.similarity_histogram(preparation.cosines_between(bank), threshold=threshold);

# %% [markdown]
# ## Are the folds even, and what leaks between them?
# A leaked prompt has a similar one in another fold. If there are many, trust the cosine on clean rows more than the one
# on all rows: training reports both.

# %%
print(folds.format_leakage(report))
data_plots.fold_report(report);

# %% [markdown]
# ## What is next?
# The data set can be trained on.

# %%
changes = "" if names == ["shapes"] else f' -p overrides "datasets={",".join(names)}"'
model = "convnext_large" if changes else "lite0"
print(f"papermill notebooks/train.ipynb working/runs/train_{model}_fold0.ipynb -p model {model} -p fold 0{changes}")
