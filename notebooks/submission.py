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
# `submission.csv`. A complete file exists before the first model runs, and improves with every model.
# `papermill notebooks/submission.ipynb working/runs/submission.ipynb -p images FOLDER`
#
# **What it needs.** No network, and no package that Kaggle lacks. A folder of images, the ensemble's weights
# (`notebooks/ensemble`) and its checkpoints. On Kaggle the three are found among the notebook's inputs, where
# `make kaggle-code`, `make kaggle-weights` and `make kaggle-push` put them.
#
# **How long it takes.** The tiny models: seconds. The 18 large ones: hours on Kaggle's GPUs, within the budget below.
# If the time is too short, the models with the least effect on the ensemble are left out.

# %% tags=["parameters"]
images: str = ""  # folder of images; empty: the competition's, found below the inputs
ensemble: str = ""  # JSON file of the weights; empty: the last one below working/models or, on Kaggle, the inputs
models: str = ""  # folder of the checkpoints; empty: searched for like the weights
output: str = ""  # the file to write; empty: working/submission.csv (a previous one becomes .bak)
hours: float = 8.5  # time for all models; Kaggle ends the notebook after 9
batch_size: int = 64  # images at a time on each GPU; halved where the memory is full
tta: str = "none"  # two_resolutions: predict at each network's size and at a larger one, and average
cache_gb: float = 24.0  # cache of decoded images, in temporary files

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
# ## What is there?
# Versions, devices and inputs. If an input is missing, the error here lists the folders.

# %%
import time

import torch
from kutils.data import prompt_bank
from kutils.ensemble import blending, image_cache, weights, within_budget
from kutils.kaggle import mounts, submission
from kutils.system import devices, paths
from kutils.views import figures, image_plots, score_plots

began = time.monotonic()
print(f"{mounts.describe_machine()}\n{devices.describe_gpus()}")

# %%
image_files = image_cache.find_images(images or mounts.find_images_folder(paths.input_dir()), same_name_is_error=False)
ids = [path.stem for path in image_files]
folders = weights.weight_folders(models)
ensemble_path = Path(ensemble) if ensemble else weights.find_ensemble(folders)
fitted = weights.load_ensemble(ensemble_path)
print(f"{len(image_files):,} images, {len(fitted.members())} models of {ensemble_path}\n{fitted.summary()}")

# %% [markdown]
# ## Predict
# The first file holds the mean training embedding for every image; each model improves it. It is replaced
# atomically, so that a valid file exists whenever the notebook is stopped.

# %%
output_path = Path(output) if output else paths.working_dir() / "submission.csv"
submission.set_previous_aside(output_path)
submission.write_submission(output_path, ids, within_budget.mean_embeddings(fitted, len(ids)))
checkpoint_files, neighbours = weights.find_members(fitted, folders, beside=ensemble_path)

# %%
hours_left = hours - (time.monotonic() - began) / 3600
options = {"hours": hours_left, "batch_size": batch_size, "tta": tta, "cache_gb": cache_gb, "bank": neighbours}
for state in within_budget.predict_ensemble(fitted, checkpoint_files, image_files, **options):
    submission.write_submission(output_path, ids, state.embeddings)
    shares = ", ".join(f"{family} {weight:.3f}" for family, weight in state.weights.items())
    print(f"{output_path.name}: {len(state.seconds)} models; {shares or 'the mean embedding'}", flush=True)

# %% [markdown]
# ## Will it be scored?
# The file is read back and checked: rows, ids and their order, finite values, unit length. A figure that fails does not
# affect the file.

# %%
print(f"{submission.check_submission(output_path, ids):,} rows are as the competition wants them")
unreadable = {path.name: reason for path, reason in state.unreadable.items()}
report = {"images": len(ids), "gpus": torch.cuda.device_count(), "seconds": state.seconds, "weights": state.weights}
report |= {"left_out": state.dropped, "unreadable": unreadable}
paths.write_json(submission.submission_report_path(output_path), report)
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
# ## What do the predictions mean?
# Some images with the prompts nearest to their predictions, among the few thousand prompts that are stored with the
# weights. They should roughly describe the images.

# %%
with figures.print_errors():
    if weights.bank_path(ensemble_path).is_file() and image_files:
        bank = prompt_bank.PromptBank.load(weights.bank_path(ensemble_path))
        titles = [f"{name}: {words}" for name, words in zip(ids[:8], bank.captions(state.embeddings[:8]), strict=True)]
        image_plots.image_grid(image_files[:8], titles, columns=4)

# %% [markdown]
# ## Do the families agree?
# Mean cosine between the families' predictions of an image. On the images on which they differ most, the
# ensemble is least certain.

# %%
with figures.print_errors():
    if len(state.families) > 1 and image_files:
        agreement = blending.agreement(state.families)
        least = agreement.argsort()[:8]
        titles = [f"{ids[i]}: {agreement[i]:.3f}" for i in least]
        image_plots.image_grid([image_files[i] for i in least], titles, columns=4)
