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
# # Import pairs: downloaded images with their prompts become a data set
#
# **What it does.** Reads pairs of image and prompt as they can be downloaded (tars, Parquet, folders, lists), shows
# them, makes a data set of them, and shows what was rejected and why.
# `papermill notebooks/import_pairs.ipynb working/runs/import_pairs.ipynb -p sources downloads/sd-4.4M/cc -p name sd44m`
#
# **What it needs.** Files that were downloaded. Without any, the data set `shapes` is made, exported as tars and
# imported again: a small example of all steps.
#
# **How long it takes.** The shapes: two to three minutes on two CPU cores. Packing a pair of 512 px takes about 15 ms
# on a core. Prompts are encoded if the source has no embeddings: minutes per million on a GPU.

# %% tags=["parameters"]
sources: str = ""  # files, folders or patterns, as "downloads/sd-4.4M/cc/*-{000..012}.tar"; empty: the shapes
name: str = "imported"  # of the data set to make below input/
options: str = "--pack 448"  # options of `kutils import`: a limit, near-duplicates, which pairs
num_prompts: int = 1000  # prompts of the shapes, if there are no sources
threshold: float = 0.7  # cosine from which prompts are similar, and belong to one fold
num_folds: int = 10  # number of folds, 2..10

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
# ## What do the sources hold?
# The first pairs, before anything is written. If a text is not the prompt that its image was made from, name the right
# field: `options="--prompt-key prompt"`. `kutils import --help` lists all options.

# %%
import shlex

from kutils.data import pair_import, preparation
from kutils.system import paths
from kutils.views import image_plots

if not sources:
    arguments = ["--shapes-dataset", "shapes", "--num-prompts", str(num_prompts), "--images-per-prompt", "2"]
    launch.run_module("kutils", "generate", *arguments)
    launch.run_module("kutils", "export", "shapes", "--format", "webdataset")
chosen = shlex.split(sources) or [str(paths.working_dir() / "exports" / "shapes-webdataset")]
images, prompts = pair_import.preview(chosen, shlex.split(options), count=8)
image_plots.image_grid(images, prompts, columns=4);

# %% [markdown]
# ## What becomes a data set?
# Prompts are cleaned like lists of prompts; the source's embeddings are used if a sample agrees with the encoder. The
# same call after a kill continues with the source file that it was reading.

# %%
launch.run_module("kutils", "import", *chosen, "--output", str(paths.input_dir() / name), *shlex.split(options));

# %% [markdown]
# ## What was rejected, and why?
# Each with file and key. A few are normal; if there are many, look at the first ones in the source.

# %%
from kutils.system.tables import read_table

faults = read_table(paths.input_dir() / f"{name}.faults.tsv", ["file", "key", "reason"])
print(f"{faults.num_rows:,} set apart")
faults.slice(0, 10).to_pandas()

# %% [markdown]
# ## Which generators made the images, and where are they from?
# Scores by generator and source appear in the report of a run, and in `explore`.

# %%
import pandas as pd

pairs = pd.read_parquet(paths.input_dir() / f"{name}.pairs.parquet", columns=["generator", "source"])
pairs.value_counts(["generator", "source"]).head(10).to_frame("pairs").reset_index()

# %% [markdown]
# ## Do the images show their prompts?
# As they were kept: random rows of the data set.

# %%
image_plots.image_grid(*preparation.random_examples([name], count=8), columns=4);

# %% [markdown]
# ## Which prompts belong to one fold?
# Similar prompts share a fold; the report measures the leakage. The notebook `prepare_data` shows more.

# %%
from kutils.prompts import folds
from kutils.views import data_plots

report = preparation.prepare_datasets([name], threshold, num_folds)
print(folds.format_leakage(report))
data_plots.fold_report(report);

# %% [markdown]
# ## What is next?
# The data set can be checked, and trained on.

# %%
print(f"kutils check input/{name}.tsv")
print(f"cd working && bash dist_train.sh 8 conf/sd44m_convnext_large_stage1.yaml datasets={name}")
