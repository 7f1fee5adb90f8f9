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
# **What it does.** Measures speed and memory on this machine beside the published pipeline or the plain way to do the
# same, and keeps the numbers in `working/benchmark/results.json`.
# `kutils benchmark --sections loader,step` runs it; its options are the parameters below. As a script, `python
# notebooks/benchmark.py`, the sections `loader`, `step` and `differences` need torch, torchvision and timm alone.
#
# **What it needs.** Linux. On a GPU, if there is one, the five networks of the recipes are measured, else the two tiny
# ones. `open_5m_rows`: 12 GB of disk below `working/`, and 20 GB of memory for the plain way, which is left out where
# there is less.
#
# **How long it takes.** On two CPU cores `quick` (loader, step, differences, predict_ensemble, nearest_prompts) five
# minutes; besides, `open_5m_rows` six, `embed_prompts` and `similar_pairs` five each, `packed_shards` and
# `import_pairs` two, `folds` and `check_images` one.

# %% tags=["parameters"]
sections: str = "quick"  # what to measure: quick, all, or some, as "loader,step"; a wrong name lists them
repeats: int = 5  # of every measurement, ours and the other by turns
models: str = ""  # of recipes, as "convnext_large,vit_large", whose steps are measured; empty is all
pictures: str = ""  # folder of images for the loader, resized to 512 px; empty is made ones
images: int = 1000  # that are predicted, checked or packed; the competition has about 16,000
bank: int = 250000  # random embeddings among which the nearest are looked up, 1.9 KB of disk and memory each
rows: int = 0  # rows of the made data sets together; 0 is all 5,059,104
keep_data: bool = False  # leave the made data sets in working/benchmark/input/ for the next time
prompts: int = 60000  # that are embedded and compared; 120000 adds a fourth point to the curve
prompts_path: str = ""  # a prompts file to take them from; empty is the grammar of kutils.prompts.grammar

# %% tags=["active-py"]
globals().setdefault("In", [])  # a script has no list of executed cells; in the notebook this is no code

# %%
import sys
from importlib.util import find_spec
from pathlib import Path

here = Path(globals().get("__file__", "notebook")).absolute()  # a notebook knows the current folder alone
clones = [folder for folder in here.parents if (folder / "kutils" / "__main__.py").is_file()]
if not clones and find_spec("kutils") is None:  # neither in a clone nor installed: the code data set on Kaggle
    clones = [path.parent.parent for path in Path("/kaggle/input").glob("**/kutils/__main__.py")]
sys.path[:0] = map(str, clones[:1])  # this clone's kutils, whichever is installed
from kutils.runs import launch

launch.check_parameters(In)  # noqa: F821 (IPython's list of executed cells)

# %% [markdown]
# ## What will be measured, and where?
# Numbers of different machines do not compare: every entry names its own.

# %%
from kutils.benchmarks import measuring

chosen = measuring.choose_sections(sections)
print(f"{', '.join(chosen)} on {measuring.machine_name()}")

# %% [markdown]
# ## How fast do images become the network's input?
# On one core, from files of 512 px to 384 px, with training's crop and colour jitter, and plain. `host` is what data
# loader processes do, `all` has the device's part on the same core, too. The published pipeline does all in them.

# %%
from kutils.benchmarks import loader

if "loader" in chosen:
    measuring.save_entries(loader.measure_loading(pictures, repeats))

# %% [markdown]
# ## How fast is an update?
# `step` is one of stage 1 with all that belongs to it on the device; `mfu` how much of the arithmetic that the device
# could do is forward and backward of it; `sam_overhead` how many times as long an update with SAM takes. The published
# step: float16 autocast with a loss scaler (float32 on a CPU), NCHW, MADGRAD parameter by parameter, each loss read.

# %%
from kutils.benchmarks import step

if "step" in chosen:
    for model in step.model_names(models):
        measuring.save_entries(step.measure_training(model, repeats))

# %% [markdown]
# ## What do these ways change?
# Pixels beside Pillow's, whose colour changes round to whole numbers after each of four operations; and losses of the
# tiny networks over 20 updates beside the published step's, in float32 with the same images: what is left is rounding.

# %%
from kutils.benchmarks import differences

if "differences" in chosen:
    measuring.save_entries(differences.measure_differences(step.ON_CPU))

# %% [markdown]
# ## What does decoding once save?
# Three tiny models over files of 512 px, of which each is decoded once and kept; the plain way, and all else the same:
# each model decodes them again. Large models save as many seconds, and a smaller share.

# %%
if "predict_ensemble" in chosen:
    from kutils.benchmarks import prediction

    measuring.save_entries(prediction.measure_prediction(images, repeats))

# %% [markdown]
# ## How fast are the nearest of many prompts found?
# All are compared, block by block in a mapped file, beside FAISS's exact search of what it holds in memory. The first
# look-up waits for the disk.

# %%
if "nearest_prompts" in chosen:
    from kutils.benchmarks import similarity

    measuring.save_entries(similarity.measure_nearest(bank, repeats))

# %% [markdown]
# ## What do five million rows cost each rank?
# Six data sets of the published sizes, opened by a process of its own each time, with nothing of them in memory yet.
# The plain way: pandas parses every table, NumPy reads all embeddings. The first opening builds the index (it checks
# every row and hashes the folds, which the plain way does not); later ones, and all other ranks, map it.

# %%
if "open_5m_rows" in chosen:
    from kutils.benchmarks import rows as benchmark_rows

    measuring.save_entries(benchmark_rows.measure_opening(rows, repeats, keep_data))

# %% [markdown]
# ## How fast are prompts embedded, and how exactly?
# By `SentenceTransformer.encode` in float32, and here in bfloat16 and float32. The smallest cosine between bfloat16 and
# float32 says what the speed costs.

# %%
if {"embed_prompts", "similar_pairs", "grown_pairs", "folds"} & set(chosen):
    from kutils.benchmarks import embedding, similarity

    texts, embeddings = similarity.embedded_prompts(prompts_path, prompts)
if "embed_prompts" in chosen:
    measuring.save_entries(embedding.measure_embedding(texts[:4000], repeats))

# %% [markdown]
# ## How long does it take to find all similar pairs, and what do folds leak?
# Exactly all at cosine >= 0.7 and 0.9, beside FAISS, which searches exactly too and in float32 (up to 60,000 prompts).
# The time grows with the square of the number, the memory beyond embeddings and pairs does not grow. `grown_pairs`: up
# to 3.4 M prompts, of which a share of the blocks is searched; ten minutes and 12 GB of memory. A prompt leaks
# that has a similar one in another fold: of a balanced partition, of greedy leader groups, of random rows.

# %%
if "similar_pairs" in chosen:
    measuring.save_entries(similarity.measure_similar_pairs(embeddings, repeats))
if "grown_pairs" in chosen:
    measuring.save_entries(similarity.measure_growth(embeddings))
if "folds" in chosen:
    measuring.save_entries(similarity.measure_leakage(embeddings, repeats))

# %% [markdown]
# ## What do checking, packing and importing of images cost, and save?
# `check_images`: every file is read, hashed and decoded, by two processes and by one. `packed_shards`: an epoch through
# the loader of training, from shards of 448 px and from files of 768 px, none of them in memory yet; and from shards
# that an import has packed, beside those of `kutils shards`. `import_pairs`: small pairs whose bytes are kept, beside
# webdataset's own loop, which splits tars into samples and no more; lossless images of 512 px packed at 448 px, beside
# Pillow's open, resize, save; and by two processes, beside one.

# %%
if {"check_images", "packed_shards", "import_pairs"} & set(chosen):
    from kutils.benchmarks import data, importing
if "check_images" in chosen:
    measuring.save_entries(data.measure_check(images, repeats))
if "packed_shards" in chosen:
    measuring.save_entries(data.measure_shards(images, repeats))
if "import_pairs" in chosen:
    measuring.save_entries(importing.measure_import(images, repeats))

# %% [markdown]
# ## What was found?
# Medians; `ratio` is how many times better than the published or plain way: faster, or less. Memory is what a process
# holds alone, in MB: of a rank beyond its imports, of a worker all that is its own, decoding included. Eight ranks pay
# it eight times, as they would the plain way's. Mapped files are not in it: the system keeps one copy for all.

# %%
print(measuring.format_results())

# %%
if find_spec("matplotlib") and any(entry["ratio"] for entry in measuring.read_results()):
    from kutils.views import score_plots

    score_plots.benchmark_ratios(measuring.read_results())
