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
# **What it needs.** No network. A folder of images, the ensemble's weights (`notebooks/ensemble`) and its checkpoints.
# On Kaggle the three are found among the notebook's inputs, which `kernel-metadata/submission/kernel-metadata.json`
# lists: put your Kaggle name in its three places that say `INSERT_KAGGLE_NAME_HERE`.
#
# **How long it takes.** The tiny models: seconds. The 18 large ones: hours on Kaggle's GPUs, within the budget below.

# %% tags=["parameters"]
images: str = ""  # folder of images; empty: the competition's, found below the inputs
ensemble: str = ""  # JSON file of the weights; empty: the one below working/models or, on Kaggle, the inputs
models: str = ""  # folder of the checkpoints; empty: found likewise
output: str = ""  # the file to write; empty: working/submission.csv
hours: float = 8.5  # time for all models; Kaggle ends the notebook after 9

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
# ## What is there?
# Versions, devices and inputs. What is missing stops here, with the tree of what is there.

# %%
import torch
from kutils import blending, mounts, paths, plots, predict, submission
from kutils.ensemble import describe, load_ensemble

print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, GPUs: {torch.cuda.device_count()}")
image_files = predict.find_images(images or mounts.find_images_folder(paths.input_dir()))
folders = mounts.weight_folders(models)
fitted = load_ensemble(ensemble or mounts.find_ensemble(folders))
checkpoint_files = mounts.find_checkpoints(fitted.members(), folders)
output_path = Path(output) if output else paths.working_dir() / "submission.csv"
print(f"{len(image_files):,} images, {len(checkpoint_files)} models\n{describe(fitted)}")

# %% [markdown]
# ## Predict
# The first file holds the mean training embedding for every image; each family of models makes it better. It is
# replaced only by a whole one, so that a valid file is there whenever this is stopped.

# %%
ids = [path.stem for path in image_files]
for state in predict.predict_ensemble(fitted, checkpoint_files, image_files, hours):
    submission.write_submission(output_path, ids, state.embeddings)
    print(f"{output_path}: {', '.join(state.families) or 'mean embedding'}", flush=True)
for name, reason in (state.dropped | {path.name: reason for path, reason in state.unreadable.items()}).items():
    print(f"left out: {name}: {reason}")

# %% [markdown]
# ## Will it be scored?
# The file is read back: rows, ids and their order, finite values, unit length.

# %%
print(f"{submission.check_submission(output_path, ids):,} rows are as the competition wants them")

# %% [markdown]
# ## Where did the time go?
# Seconds per model, loading included; their sum must stay within the budget.

# %%
if state.seconds:
    plots.timing(state.seconds, title=f"Prediction of {len(image_files):,} images")

# %% [markdown]
# ## Do the families agree?
# Mean cosine between the families' predictions of an image. Shown are those on which they differ most: the ensemble is
# least sure of them.

# %%
if len(state.families) > 1 and image_files:
    agreement = blending.agreement(state.families)
    least = agreement.argsort()[:8]
    plots.image_grid([image_files[i] for i in least], [f"{ids[i]}: {agreement[i]:.3f}" for i in least], columns=4)
