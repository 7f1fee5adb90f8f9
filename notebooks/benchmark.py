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
# **What it does.** Measures speed and memory on this machine, compared with the published pipeline or a plain
# implementation, and keeps the numbers in `working/benchmark/results.json`.
# `papermill notebooks/benchmark.ipynb working/runs/benchmark.ipynb -p sections loader,step`, or `kutils benchmark
# --sections loader,step`, whose options are the parameters below. As a script, `python notebooks/benchmark.py`, the
# sections `loader`, `step` and `differences` need only torch, torchvision and timm.
#
# **What it needs.** Linux. On a GPU, if there is one, the five networks of the recipes are measured, else the two tiny
# ones. `open_5m_rows`: 12 GB of disk below `working/`, and 20 GB of memory for the plain implementation, which is left
# out if there is less.
#
# **How long it takes.** On two CPU cores `quick` (loader, step, differences, predict_ensemble, nearest_prompts) five
# minutes; besides, `grown_pairs` ten, `open_5m_rows` six, `embed_prompts` and `similar_pairs` five each,
# `packed_shards` and `import_pairs` two, `folds` and `check_images` one.

# %% tags=["parameters"]
sections: str = "quick"  # what to measure: quick, all, or some, as "loader,step"; a wrong name lists them
repeats: int = 5  # of every measurement, alternating ours and the other
models: str = ""  # of recipes, as "convnext_large,vit_large", whose steps are measured; empty is all
pictures: str = ""  # folder of images for the loader, resized to 512 px; empty: synthetic ones
images: int = 1000  # images to predict, check or pack; the competition has about 16,000
bank: int = 250000  # random embeddings to search, 1.9 KB of disk and memory each
rows: int = 0  # rows of the synthetic data sets together; 0 is all 5,059,104
keep_data: bool = False  # keep the synthetic data sets in working/benchmark/input/ for the next time
prompts: int = 60000  # prompts to embed and compare; 120000 adds a fourth point to the curve
prompts_path: str = ""  # a prompts file to take them from; empty is the grammar of kutils.prompts.grammar

# %% tags=["active-py"]
globals().setdefault("In", [])  # a script has no list of executed cells; in the notebook this is no code

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
# ## What will be measured, and where?
# Numbers of different machines are not comparable: every entry names its machine.

# %%
from kutils.benchmarks import measuring

chosen = measuring.choose_sections(sections)
print(f"{', '.join(chosen)} on {measuring.machine_name()}")

# %% [markdown]
# ## How fast do images become the network's input?
# On one core, from files of 512 px to 384 px, with training's crop and colour jitter, and without. `host` is the work
# of data loader workers; `all` adds the device's part, on the same core. The published pipeline does all in the
# workers.

# %%
from kutils.benchmarks import loader

if "loader" in chosen:
    measuring.save_entries(loader.measure_loading(pictures, repeats))

# %% [markdown]
# ## How fast is an update?
# `step` is an update of stage 1 on the device; `mfu` is the model FLOPs utilisation of its forward and backward pass;
# `sam_overhead` is how many times as long an update with SAM takes. The published step uses float16 autocast with a
# loss scaler (float32 on a CPU), NCHW, and MADGRAD in a loop over parameters, and reads each loss.

# %%
from kutils.benchmarks import step

if "step" in chosen:
    for model in step.model_names(models):
        measuring.save_entries(step.measure_training(model, repeats))

# %% [markdown]
# ## How do the results differ?
# Pixels are compared with Pillow's, which rounds to whole levels after each of four colour operations. Losses of the
# tiny networks over 20 updates are compared with the published step's, in float32 on the same images; they differ by
# rounding.

# %%
from kutils.benchmarks import differences

if "differences" in chosen:
    measuring.save_entries(differences.measure_differences(step.ON_CPU))

# %% [markdown]
# ## What does decoding once save?
# Three tiny models predict files of 512 px. Here each file is decoded once and cached; in the plain implementation each
# model decodes it again. Large models save the same number of seconds, but a smaller share.

# %%
if "predict_ensemble" in chosen:
    from kutils.benchmarks import prediction

    measuring.save_entries(prediction.measure_prediction(images, repeats))

# %% [markdown]
# ## How fast are the nearest of many prompts found?
# The search is exact, in a memory-mapped file. It is compared with FAISS's exact search in memory. The first search
# waits for the disk.

# %%
if "nearest_prompts" in chosen:
    from kutils.benchmarks import similarity

    measuring.save_entries(similarity.measure_nearest(bank, repeats))

# %% [markdown]
# ## What do five million rows cost each rank?
# Six data sets of the published sizes, opened by a new process each time, with an empty page cache. In the plain
# implementation, pandas parses every table and NumPy reads all embeddings. The first opening builds the index (it
# checks every row and hashes the folds, which the other does not); later ones, and all other ranks, map it.

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
# All pairs at cosine >= 0.7 and 0.9, compared with FAISS's exact search in float32 (up to 60,000 prompts). The time
# grows with the square of the number of prompts; memory grows only by the embeddings and pairs. `grown_pairs`: up to
# 3.4 M prompts, of which a share of the blocks is searched; ten minutes and 12 GB of memory. A prompt leaks if it has a
# similar one in another fold: of a balanced partition, of greedy leader groups, of random rows.

# %%
if "similar_pairs" in chosen:
    measuring.save_entries(similarity.measure_similar_pairs(embeddings, repeats))
if "grown_pairs" in chosen:
    measuring.save_entries(similarity.measure_growth(embeddings))
if "folds" in chosen:
    measuring.save_entries(similarity.measure_leakage(embeddings, repeats))

# %% [markdown]
# ## How fast are checking, packing and importing of images?
# `check_images`: every file is read, hashed and decoded, by two processes and by one. `packed_shards`: an epoch through
# the training loader, from shards of 448 px and from files of 768 px, with an empty page cache; and from shards that an
# import has packed, compared with those of `kutils shards`. `import_pairs`: small pairs whose bytes are kept, beside
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
# ## Results
# Medians; `ratio` is how many times faster, or smaller, than the published or plain implementation. Memory is private
# memory in MB: of a rank without its imports, of a worker with decoding. Each of eight ranks needs it. Memory-mapped
# files are not included: the system keeps one copy for all processes.

# %%
print(measuring.format_results())

# %%
if find_spec("matplotlib") and any(entry["ratio"] for entry in measuring.read_results()):
    from kutils.views import score_plots

    score_plots.benchmark_ratios(measuring.read_results())
