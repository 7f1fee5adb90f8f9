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
# # Prepare prompts: collect, clean, choose, embed, fold
#
# **What it does.** Makes a clean list of prompts from files of any kind, or from a grammar; leaves out near-duplicates;
# embeds the others and assigns ten folds that keep similar prompts together. This is done before images are made.
# `papermill notebooks/prepare_prompts.ipynb working/runs/prepare_prompts.ipynb -p sources captions.csv -p name mine`
#
# **What it needs.** Text, CSV, TSV, Parquet or JSON files, gzipped or not; the published caption files of COCO,
# Conceptual Captions and VizWiz. Without any, prompts come from a grammar.
#
# **How long it takes.** Most of it is embedding: on two CPU cores two minutes per 60,000 short prompts, a third of that
# in bfloat16; long prompts take several times as long.

# %% tags=["parameters"]
sources: str = ""  # files of prompts, in order of preference, as "a.csv,b.txt"; empty: prompts of a grammar
name: str = "templates"  # name of the lists: input/<name>.all.tsv, <name>.prompts.tsv and <name>_part2.prompts.tsv
column: str = ""  # column or key of the prompts, if it is not recognised
num_prompts: int = 4000  # prompts of the grammar
against: str = ""  # earlier lists, as "input/a.prompts.tsv,input/b.prompts.tsv"; what resembles them is left out
duplicates: float = 0.9  # cosine from which prompts are near-duplicates
threshold: float = 0.7  # cosine from which prompts are similar, and belong to one fold
num_folds: int = 10  # number of folds, 2..10
method: str = "stratified"  # stratified, partition, components, leader or kmeans
overwrite: bool = False  # replace lists of this name with other content
embedding_dtype: str = "float32"  # or bfloat16: faster, and exact enough to find near-duplicates

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
# Of equal prompts the first is kept. Notation of image generators is removed; texts that cannot be prompts are dropped.
# If the examples below show good prompts, give other limits: `kutils sources --help`.

# %%
from kutils.data import preparation
from kutils.prompts import cleaning
from kutils.views import data_plots, score_plots

lists = preparation.prompt_lists(name)
options = {"column": column, "num_prompts": num_prompts, "overwrite": overwrite}
cleaned = preparation.collect_prompts(lists, sources, **options)
print(cleaning.format_cleaning(cleaned))

# %%
dropped = {reason: case["count"] for reason, case in cleaned["dropped"].items()}
title = f"{cleaned['read']:,} entries read, {cleaned['kept']:,} kept; the others"
score_plots.bar_counts(dropped or {"dropped": 0}, title=title, unit="entries");

# %% [markdown]
# ## How many are near-duplicates?
# A prompt that resembles an earlier one adds little. Near-duplicates become part 2 of the data set, with one image per
# prompt, for the training on all data.

# %%
from kutils.prompts import near_duplicates

earlier = [Path(path.strip()) for path in against.split(",") if path.strip()]
options = {"against": earlier, "dtype": embedding_dtype, "overwrite": overwrite}
chosen = near_duplicates.deduplicate_table(lists.all, lists.kept, lists.rest, duplicates, **options)
print(near_duplicates.format_dedup(chosen, lists.kept, lists.rest))

# %% [markdown]
# ## Which folds keep similar prompts together?
# A leaked prompt has a similar one in another fold, so that its validation score is too high. Prompts of earlier lists
# keep their folds.

# %%
from kutils.prompts import folds

files = [lists.kept, *earlier]
keep = preparation.have_folds(earlier)
report = folds.assign_folds(files, threshold, None if keep else num_folds, method, keep=keep)
print(folds.format_leakage(report))

# %%
data_plots.fold_report(report);

# %% [markdown]
# ## How long are the prompts?
# The text encoder reads 256 tokens, about 190 words; Stable Diffusion reads 77 tokens, about 55 words.

# %%
from kutils.data.prompt_bank import PromptBank

bank = PromptBank.from_table(lists.kept)
data_plots.prompt_lengths(bank.prompts.to_pylist());

# %% [markdown]
# ## How similar are the remaining prompts?
# No nearest neighbour is above the threshold of near-duplicates. The share above the folds' threshold is the share of
# prompts that would leak in a random split.

# %%
score_plots.similarity_histogram(preparation.cosines_between(bank), threshold=threshold);

# %% [markdown]
# ## What is next?
# Images of the prompts that were kept, in their folds.

# %%
print(f"kutils generate {lists.kept} --backend diffusers --images-per-prompt 3 --output input/{name}")
