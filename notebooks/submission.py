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
# # Submission: the offline Kaggle kernel
#
# **What it does.** Predicts every image of the competition with all models of an ensemble, one at a time, and writes
# `submission.csv`. A complete file is there before the first model runs, and gets better with every family.
# `papermill notebooks/submission.ipynb working/runs/submission.ipynb -p images FOLDER`
#
# **What it needs.** No network, and no package beyond Kaggle's own. A folder of images, the ensemble's weights
# (`notebooks/ensemble`) and its checkpoints. On Kaggle the three are found among the notebook's inputs, where
# `make kaggle-code`, `make kaggle-weights` and `make kaggle-push` put them.
#
# **How long it takes.** The tiny models: seconds. The 18 large ones: hours on Kaggle's GPUs, within the budget below:
# what does not fit is left out, so that least is lost.

# %% tags=["parameters"]
images: str = ""  # folder of images; empty: the competition's, found below the inputs
ensemble: str = ""  # JSON file of the weights; empty: the one below working/models or, on Kaggle, the inputs
models: str = ""  # folder of the checkpoints; empty: found likewise
output: str = ""  # the file to write; empty: working/submission.csv (a former one is kept as .bak)
hours: float = 8.5  # time for all models; Kaggle ends the notebook after 9
batch_size: int = 64  # images at a time on each GPU; halved where the memory is full
tta: str = "none"  # views of an image that are averaged: none, flip, five_crops
cache_gb: float = 24.0  # of decoded images, in files of the temporary folder

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
# ## What is there?
# Versions, devices and inputs. What is missing stops here, with the tree of what is there.

# %%
import time

import torch
from kutils.data import prompt_bank
from kutils.ensemble import blending, within_budget, image_cache
from kutils.ensemble import weight_files
from kutils.kaggle import mounts, submission
from kutils.system import devices, paths
from kutils.views import figures, image_plots, score_plots
from kutils.ensemble.fit import bank_path, describe, load_ensemble, load_neighbours

began = time.monotonic()
print(f"{mounts.describe_machine()}\n{devices.describe_gpus()}")
image_files = image_cache.find_images(images or mounts.find_images_folder(paths.input_dir()), same_name_is_error=False)
ids = [path.stem for path in image_files]
folders = weight_files.weight_folders(models)
ensemble_path = Path(ensemble) if ensemble else weight_files.find_ensemble(folders)
fitted = load_ensemble(ensemble_path)
print(f"{len(image_files):,} images, {len(fitted.members())} models\n{describe(fitted)}")

# %% [markdown]
# ## Predict
# The first file holds the mean training embedding for every image; each model makes it better. It is replaced only by a
# whole one, so that a valid file is there whenever this is stopped.

# %%
output_path = Path(output) if output else paths.working_dir() / "submission.csv"
submission.set_previous_aside(output_path)
submission.write_submission(output_path, ids, within_budget.mean_embeddings(fitted, len(ids)))
files = weight_files.find_checkpoints(fitted.files(), folders, beside=ensemble_path)
checkpoint_files = {member: files[member.checkpoint] for member in fitted.members()}
neighbours = load_neighbours(fitted, files)

# %%
hours_left = hours - (time.monotonic() - began) / 3600
options = {"hours": hours_left, "batch_size": batch_size, "tta": tta, "cache_gb": cache_gb, "bank": neighbours}
for state in within_budget.predict_ensemble(fitted, checkpoint_files, image_files, **options):
    submission.write_submission(output_path, ids, state.embeddings)
    weights = ", ".join(f"{family} {weight:.3f}" for family, weight in state.weights.items())
    print(f"{output_path.name}: {len(state.seconds)} models; {weights or 'the mean embedding'}", flush=True)

# %% [markdown]
# ## Will it be scored?
# The file is read back: rows, ids and their order, finite values, unit length. What follows are figures, which no error
# of theirs must cost it.

# %%
print(f"{submission.check_submission(output_path, ids):,} rows are as the competition wants them")
unreadable = {path.name: reason for path, reason in state.unreadable.items()}
told = {"images": len(ids), "gpus": torch.cuda.device_count(), "seconds": state.seconds, "weights": state.weights}
told |= {"left_out": state.dropped, "unreadable": unreadable}
paths.write_json(submission.submission_report_path(output_path), told)
for name, reason in unreadable.items():
    print(f"it holds the mean embedding for {name}: {reason}")

# %% [markdown]
# ## Where did the time go?
# Seconds per model, loading included; their sum must stay within the budget.

# %%
with figures.print_errors():
    if state.seconds:
        score_plots.bar_times(state.seconds, title=f"Prediction of {len(image_files):,} images")

# %% [markdown]
# ## What does it mean?
# Some images, and the nearest prompts to what was predicted, of the few that travel with the weights: they should say
# what is to be seen, as far as so few can.

# %%
with figures.print_errors():
    if bank_path(ensemble_path).is_file() and image_files:
        bank = prompt_bank.PromptBank.load(bank_path(ensemble_path))
        titles = [f"{name}: {words}" for name, words in zip(ids[:8], bank.describe(state.embeddings[:8]), strict=True)]
        image_plots.image_grid(image_files[:8], titles, columns=4)

# %% [markdown]
# ## Do the families agree?
# Mean cosine between the families' predictions of an image. Shown are those on which they differ most: the ensemble is
# least sure of them.

# %%
with figures.print_errors():
    if len(state.families) > 1 and image_files:
        agreement = blending.agreement(state.families)
        least = agreement.argsort()[:8]
        titles = [f"{ids[i]}: {agreement[i]:.3f}" for i in least]
        image_plots.image_grid([image_files[i] for i in least], titles, columns=4)
