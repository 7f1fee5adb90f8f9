"""Selects images of a run to show: training images as the network gets them, best and worst predictions."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from kutils.data import datasets
from kutils.data.prompt_bank import PromptBank
from kutils.runs.recipes import Recipe
from kutils.training import network_input
from kutils.training.out_of_fold import predictions_path, read_predictions

MOST_PROMPTS = 200_000  # searched for the nearest prompt: 300 MB of embeddings


def training_examples(recipe: Recipe, fold: int, count: int = 8) -> tuple[list[np.ndarray], list[str]]:
    """Draw training images as the network gets them in the first epoch, and their prompts.

    Returns: uint8 [S, S, 3] arrays with crop and colour jitter, and the prompts.
    """
    data = datasets.load_datasets(recipe.datasets)
    rows = data.training_rows(fold)
    chosen = np.random.default_rng(recipe.seed).choice(rows, min(count, len(rows)), replace=False)
    examples = datasets.collate([datasets.TrainingImages(data, rows, recipe)[0, int(row)] for row in chosen])
    images = network_input.normalize(
        examples["image"], (0, 0, 0), (1, 1, 1), examples["jitter"] if recipe.augment == "published" else None
    )
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return list(pixels), [data.prompts[int(row)].as_py() for row in examples["row"]]


def validation_table(recipe: Recipe, fold: int, run_folder: Path) -> pd.DataFrame:
    """One row per validation image, worst first: row, image (path), prompt, cosine, clean, and the predicted embedding.

    Raises: ValueError if the predictions are of other data than that in `input/`.
    """
    data = datasets.load_datasets(recipe.datasets)
    rows = data.validation_rows(fold)
    saved = read_predictions(run_folder, fold, names=("embeddings", "targets_hash"))
    embeddings = saved["embeddings"]
    if saved["targets_hash"] != data.hash_targets(rows):
        path = predictions_path(run_folder, fold)
        raise ValueError(f"{path} was made for other validation rows than those of fold {fold} now")
    table = pd.DataFrame(
        {
            "row": rows,
            "image": [str(data.image_path(int(row))) for row in rows],
            "prompt": data.prompts.take(pa.array(rows)).to_pylist(),
            "cosine": np.einsum("nd,nd->n", embeddings, data.targets(rows)),
            "clean": data.clean[rows] if data.clean is not None else None,
            "embedding": list(embeddings),
        }
    )
    return table.sort_values("cosine", ignore_index=True)


def choose_extremes(table: pd.DataFrame, recipe: Recipe, count: int = 4) -> pd.DataFrame:
    """Choose the best and the worst predictions of a validation table, and find the prompts nearest to them.

    Args:
        table: of `validation_table`; the best rows come from its better half, the worst from the other half.
        count: number of best rows, each of another prompt, and of worst rows; fewer if the table is small.
    Returns: rows of the table, the best first, then the worst first. `image` is a path, or an image that is packed and
        has no file. Two columns are added: best (bool), and nearest: the prompt nearest to the prediction, among those
        of all data sets, or among MOST_PROMPTS random ones.
    """
    half = len(table) // 2
    worst = table[:half].drop_duplicates("prompt").head(count)
    best = table[half:][::-1].drop_duplicates("prompt").head(count)
    chosen = pd.concat([best.assign(best=True), worst.assign(best=False)])
    data = datasets.load_datasets(recipe.datasets)
    chosen["image"] = [data.picture(int(row)) for row in chosen["row"]]
    bank = PromptBank.from_datasets(recipe.datasets, most=MOST_PROMPTS)
    indices, _ = bank.nearest(np.stack(chosen["embedding"]), k=1)
    return chosen.assign(nearest=bank.texts(indices[:, 0]))
