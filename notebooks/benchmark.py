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
# # Benchmark: what does it cost?
#
# **What it does.** Measures speed and memory on this machine beside the plain way to do the same, and keeps the numbers
# in `working/benchmark/results.json`. `papermill notebooks/benchmark.ipynb working/runs/benchmark.ipynb`; it runs as a
# script too: `python notebooks/benchmark.py`.
#
# **What it needs.** Linux. `open_5m_rows`: 12 GB of disk below `working/`, and 20 GB of memory for the plain way, which
# is left out where there is less.
#
# **How long it takes.** On two CPU cores `open_5m_rows` four minutes, `predict_ensemble` one (with 16,000 images, ten),
# `embed_prompts` and `similar_pairs` four each, `nearest_prompts`, `folds` and `check_images` less than one,
# `packed_shards` two.

# %% tags=["parameters"]
sections: str = "all"  # or what to measure, as "embed_prompts,similar_pairs"; a wrong name lists them
rows: int = 0  # rows of the made data sets together; 0 is all 5,059,104
repeats: int = 3  # of every measurement
prompts: int = 60000  # that are embedded and compared; 120000 adds a fourth point to the curve
prompts_path: str = ""  # a prompts file to take them from; empty is the grammar of kutils.templates
bank: int = 1000000  # random embeddings among which the nearest are looked up, 1.6 GB of disk
images: int = 2000  # that are predicted, checked or packed; the competition has about 16,000
keep_data: bool = False  # leave the made data sets in working/benchmark/input/ for the next time

# %% tags=["active-py"]
globals().setdefault("In", [])  # a script has no list of executed cells; in the notebook this is no code

# %%
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("kutils") is None:  # not installed: the clone around this notebook, or the code data set on Kaggle
    mounted = (path.parent.parent for path in Path("/kaggle/input").glob("**/kutils/paths.py"))
    nearby = (Path.cwd(), Path.cwd().parent, *mounted)
    sys.path[:0] = [str(folder) for folder in nearby if (folder / "kutils" / "paths.py").is_file()][:1]
from kutils import launch

launch.check_parameters(In)  # noqa: F821 (IPython's list of executed cells)

# %% [markdown]
# ## What will be measured, and where?
# Numbers of different machines do not compare: every entry names its own.

# %%
from kutils import benchmark

chosen = benchmark.choose(sections)
print(f"{', '.join(chosen)} on {benchmark.machine_name()}")

# %% [markdown]
# ## What do five million rows cost each rank?
# Six data sets of the published sizes, opened by a process of its own each time, with nothing of them in memory yet.
# The plain way: pandas parses every table, NumPy reads all embeddings. The first opening builds the index (it checks
# every row and hashes the folds, which the plain way does not); later ones, and all other ranks, map it.

# %%
if "open_5m_rows" in chosen:
    benchmark.save(benchmark.open_5m_rows(rows, repeats, keep_data))

# %% [markdown]
# ## What does decoding once save?
# Three tiny models over files of 512 px, of which each is decoded once and kept; the plain way, and all else the same:
# each model decodes them again. Large models save as many seconds, and a smaller share.

# %%
from kutils import benchmark_prediction

if "predict_ensemble" in chosen:
    benchmark.save(benchmark_prediction.predict_ensemble(images, repeats))

# %% [markdown]
# ## How fast are prompts embedded, and how exactly?
# By `SentenceTransformer.encode` in float32, and here in bfloat16 and float32. The smallest cosine between bfloat16 and
# float32 says what the speed costs.

# %%
from kutils import benchmark_embedding, benchmark_similarity

embeddings = None
if {"embed_prompts", "similar_pairs", "folds"} & set(chosen):
    texts, embeddings = benchmark_similarity.embedded_prompts(prompts_path, prompts)
if "embed_prompts" in chosen:
    benchmark.save(benchmark_embedding.embed_prompts(texts[:4000], repeats))

# %% [markdown]
# ## How long does it take to find all similar pairs?
# Exactly all at cosine >= 0.7, beside FAISS, which searches exactly too and in float32 (up to 60,000 prompts). The time
# grows with the square of the number, the memory beyond embeddings and pairs does not grow.

# %%
if "similar_pairs" in chosen:
    benchmark.save(benchmark_similarity.measure_similar_pairs(embeddings, repeats))
    benchmark.save(benchmark_similarity.measure_seed_scale(repeats))

# %% [markdown]
# ## How fast are the nearest of a million prompts found?
# All are compared, block by block in a mapped file, beside FAISS's exact search of what it holds in memory. The first
# look-up waits for the disk.

# %%
if "nearest_prompts" in chosen:
    benchmark.save(benchmark_similarity.measure_nearest(bank, repeats))

# %% [markdown]
# ## What do folds leak?
# Prompts with a similar one in another fold: of a balanced partition, of greedy leader groups, of random rows.

# %%
if "folds" in chosen:
    benchmark.save(benchmark_similarity.measure_folds(embeddings, repeats))

# %% [markdown]
# ## Do two processes check images twice as fast as one?
# Every file is read, hashed and decoded, as `python -m kutils.check` does it.

# %%
from kutils import benchmark_data

if "check_images" in chosen:
    benchmark.save(benchmark_data.check_images(images, repeats))

# %% [markdown]
# ## What does packing save in training?
# An epoch through the loader of training, from shards of 448 px and from files of 768 px, none of them in memory yet.

# %%
if "packed_shards" in chosen:
    benchmark.save(benchmark_data.packed_shards(images, repeats))

# %% [markdown]
# ## What was found?
# Medians; `ratio` is how many times less time or memory than the plain way. Memory is what a process holds alone, in
# MB: of a rank beyond its imports, of a worker all that is its own, decoding included. Eight ranks pay it eight times,
# as they would the plain way's. Mapped files are not in it: the system keeps one copy of them for all.

# %%
print(benchmark.format_results())
