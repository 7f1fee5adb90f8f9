"""The nearest prompts to an embedding: what a prediction means, in words."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from kutils import checkpoints, config, paths, transforms
from kutils.config import EMBEDDING_DIM
from kutils.dataset_index import map_embeddings
from kutils.datasets import load_datasets
from kutils.devices import pick_device
from kutils.similarity import unit_rows
from kutils.tables import read_table

BLOCK_PROMPTS, BLOCK_QUERIES = 65_536, 256  # of one matrix product: 100 MB of embeddings, 67 MB of cosines


class PromptBank:
    """Prompts to be looked up by embedding.

    Args:
        prompts: n texts, at least one.
        embeddings: float32 [n, 384], unit rows; a memory map is read block by block.
    Raises: ValueError if the two do not fit together.
    """

    def __init__(self, prompts: Sequence[str], embeddings: np.ndarray):
        if not len(prompts) or embeddings.shape != (len(prompts), EMBEDDING_DIM):
            raise ValueError(
                f"{len(prompts)} prompts with embeddings {list(embeddings.shape)}: a bank needs [prompts, "
                f"{EMBEDDING_DIM}] and at least one prompt"
            )
        self.prompts, self.embeddings = prompts, embeddings

    @classmethod
    def from_datasets(cls, names: Sequence[str], most: int | None = None, seed: int = 0) -> "PromptBank":
        """Every distinct prompt of data sets in `input/`, in order of first appearance; or so many of them, drawn.

        Raises: DataError or TableError as `load_datasets` does.
        """
        data = load_datasets(names, need_folds=False)
        _, rows = np.unique(data.prompt_codes, return_index=True)
        if most is not None and most < len(rows):
            rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
        return cls(data.prompts.take(pa.array(rows)).to_pylist(), data.targets(rows))

    @classmethod
    def from_table(cls, tsv_path: Path) -> "PromptBank":
        """Every row of a prompts file or data set with its .npy beside it; the embeddings are mapped.

        Raises: TableError or DataError.
        """
        prompts = read_table(tsv_path, ["prompt"])["prompt"]
        return cls(prompts.to_pylist(), map_embeddings(tsv_path.with_suffix(".npy"), len(prompts)))

    def save(self, path: Path) -> None:
        """Write an .npz of `prompts` and `embeddings` in float16, atomically; replaced if it is there."""
        with paths.atomic_path(path) as temporary:
            np.savez_compressed(
                temporary, prompts=np.array(self.prompts), embeddings=self.embeddings.astype(np.float16)
            )

    @classmethod
    def load(cls, path: Path) -> "PromptBank":
        """Read what `save` wrote; ValueError if it is none."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                return cls(saved["prompts"].tolist(), saved["embeddings"].astype(np.float32))
        except Exception as error:  # NumPy and zipfile raise errors of many kinds
            raise ValueError(f"{path} holds no prompts ({error})") from error

    def nearest(self, queries: np.ndarray, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """The k prompts of highest cosine for each query, best first: all are compared, in blocks of bounded memory.

        Args:
            queries: float32 [q, 384], unit rows.
            k: number of prompts; all of them where the bank holds fewer.
        Returns: indices into `prompts` int64 [q, k], cosines float32 [q, k].
        Raises: ValueError for queries of another shape, not finite or not of unit length, or k below 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least one prompt")
        if queries.ndim != 2 or queries.shape[1] != EMBEDDING_DIM:
            raise ValueError(f"queries are {list(queries.shape)}, not [queries, {EMBEDDING_DIM}]")
        queries = unit_rows(queries)
        parts = queries.split(BLOCK_QUERIES)
        cosines, indices = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, len(self.prompts), BLOCK_PROMPTS):
            block = torch.from_numpy(np.array(self.embeddings[start : start + BLOCK_PROMPTS], np.float32)).T
            best = [torch.topk(part @ block, min(k, block.shape[1])) for part in parts]
            cosines = torch.cat([cosines, torch.cat([top.values for top in best])], dim=1)
            indices = torch.cat([indices, torch.cat([top.indices for top in best]) + start], dim=1)
            cosines, order = torch.topk(cosines, min(k, cosines.shape[1]))
            indices = indices.gather(1, order)
        return indices.numpy(), cosines.numpy()

    def describe(self, queries: np.ndarray, k: int = 2, width: int = 64) -> list[str]:
        """The nearest prompts of each query with their cosines, as one line for a title; long prompts are cut."""
        told = []
        for row, values in zip(*self.nearest(queries, k), strict=True):
            prompts = (textwrap.shorten(self.prompts[index], width, placeholder=" ...") for index in row)
            told.append(" / ".join(f"{prompt} ({cosine:.2f})" for prompt, cosine in zip(prompts, values, strict=True)))
        return told


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    """Print the nearest prompts to what a model predicts for each image; ValueError naming what cannot be read."""
    recipe = config.load_recipe(args.config) if args.config else None
    model, recipe, _ = checkpoints.load_model(args.checkpoint, recipe)
    bank = PromptBank.from_datasets(args.datasets.split(",") if args.datasets else recipe.datasets)
    device = pick_device(args.device)
    model.to(device)
    for path in args.images:
        image = transforms.resize_square(transforms.decode_rgb(path), recipe.input_size)
        predicted = model(transforms.normalize(image[None].to(device), recipe.mean, recipe.std))
        indices, cosines = bank.nearest(predicted.cpu().numpy(), args.k)
        print(path)
        for index, cosine in zip(indices[0], cosines[0], strict=True):
            print(f"  {cosine:7.4f}  {bank.prompts[index]}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kutils.retrieval",
        description="Print, for each image, the prompts nearest to the embedding that a model predicts.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file")
    parser.add_argument("--checkpoint", required=True, type=Path, help="trained model")
    parser.add_argument("--config", help="recipe (default: the one in the checkpoint)")
    parser.add_argument("--datasets", metavar="A,B", help="data sets to take prompts from (default: the recipe's)")
    parser.add_argument("-k", type=int, default=5, help="prompts per image (default: 5)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: auto)")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error


if __name__ == "__main__":
    main()
