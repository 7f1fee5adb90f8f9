"""Embeds prompts in memory, or the prompts of whole tables on several ranks; continues after a kill."""

import argparse
import os
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kutils.prompts.encoder import ENCODER_DTYPES, TextEncoder, check_dtype, encoder_name, load_encoder
from kutils.system import devices, locks, paths
from kutils.system.chunks import ChunkFiles
from kutils.system.embedding_files import EMBEDDING_DIM, are_whole, record_embeddings, reserve
from kutils.system.progress import progress_bar
from kutils.system.ranks import Ranks, join_workers
from kutils.system.tables import hash_prompts, read_table

CHUNK_PROMPTS = 4096  # distinct prompts; a kill loses a chunk per rank; the encoder sorts by length within a chunk


def first_empty(prompts: pa.Array | pa.ChunkedArray) -> int:
    """The row of the first prompt that is null or only white space; -1 if there is none."""
    return pc.index(pc.fill_null(pc.equal(pc.utf8_trim_whitespace(prompts), ""), True), True).as_py()


def encode_prompts(
    prompts: Sequence[str] | pa.Array | pa.ChunkedArray,
    encoder: TextEncoder | None = None,
    batch_size: int = 64,
    progress: bool = True,
    dtype: str = "float32",
) -> np.ndarray:
    """Embed prompts in the order given; each distinct one is encoded once.

    Args:
        prompts: n texts. The encoder truncates those of more than 256 tokens; one warning counts them.
        encoder: None: the packaged all-MiniLM-L6-v2.
        batch_size: prompts of 32 tokens per forward pass.
        dtype: float32 or bfloat16, of the computation.
    Returns: float32 [n, 384], unit rows.
    Raises: ValueError naming the row of an empty prompt; ValueError for another dtype.
    """
    check_dtype(dtype)
    values = prompts if isinstance(prompts, (pa.Array, pa.ChunkedArray)) else pa.array(prompts, pa.string())
    if (row := first_empty(values)) >= 0:
        raise ValueError(f"the prompt of row {row} is empty; remove the row or give it a prompt")
    if not len(values):
        return np.empty((0, EMBEDDING_DIM), np.float32)
    encoder = encoder or load_encoder()
    distinct, codes = distinct_prompts(values)
    embeddings = np.empty((len(distinct), EMBEDDING_DIM), np.float32)
    num_truncated = 0
    with progress_bar(len(distinct), "prompt", "embedding", disable=not progress) as bar:
        for start in range(0, len(distinct), CHUNK_PROMPTS):
            chunk = distinct[start : start + CHUNK_PROMPTS].to_pylist()
            num_truncated += encoder.count_truncated(chunk)
            embeddings[start : start + len(chunk)] = encoder.encode(chunk, batch_size, dtype)
            bar.update(len(chunk))
    warn_of_truncated(num_truncated, len(distinct), encoder)
    return embeddings[codes]


def distinct_prompts(values: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The distinct prompts in order of first appearance, and int32 [n], the index of each row's prompt among them."""
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    encoded = values.dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy()


def warn_of_truncated(num_truncated: int, num_prompts: int, encoder: TextEncoder) -> None:
    """Warn once if the encoder reads only the beginning of some prompts."""
    if num_truncated:
        warnings.warn(
            f"{num_truncated:,} of {num_prompts:,} distinct prompts are longer than {encoder.max_tokens} tokens; "
            "the encoder reads only their beginning, as the competition's did",
            stacklevel=3,
        )


def embed_table(
    tsv_path: Path | str,
    encoder: TextEncoder | str | None = None,
    *,
    device: str = "auto",
    batch_size: int = 64,
    dtype: str = "float32",
    overwrite: bool = False,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Path:
    """Write `<name>.npy` beside `<name>.tsv`: float32 [rows, 384], one row per row of the table, atomically.

    `<name>.npy.json` records the prompts (as a hash) and the encoder of the embeddings. If the record fits, nothing is
    computed. (Row counts and file times do not identify the prompts: shuffling keeps the count, and assigning folds
    rewrites the table.) An .npy file without a record may come from elsewhere; it is saved as `<name>.npy.bak`.

    The next call with the same prompts, encoder and arguments continues an interrupted one, and gives the same bytes.
    Finished chunks are kept in a hidden folder beside the table, which can grow to the size of the result.

    Args:
        tsv_path: a data set or a prompts file; only its `prompt` column matters.
        encoder: a loaded one, or what `load_encoder` takes.
        device: auto, cpu or cuda; without effect if ranks are given.
        batch_size: prompts of 32 tokens per forward pass.
        dtype: of the computation, float32 or bfloat16; for bfloat16, a file made in float32 is up to date, too.
        ranks: share the chunks; each of them calls this. None: this process alone.
    Returns: path of the .npy file.
    Raises: ValueError naming the line of an empty prompt, for an encoder that cannot be loaded, or where another
        process writes these embeddings; OSError on a full disk, mostly before the work.
    """
    check_dtype(dtype)
    ranks = ranks or Ranks(0, 1, devices.pick_device(device))
    options = {"device": device, "batch_size": batch_size, "dtype": dtype, "overwrite": overwrite, "progress": progress}
    with locks.held([Path(tsv_path).with_suffix(".npy")], ranks):
        return embed_alone(Path(tsv_path), encoder, ranks, **options)


def embed_alone(
    tsv_path: Path,
    encoder: TextEncoder | str | None,
    ranks: Ranks,
    *,
    device: str,
    batch_size: int,
    dtype: str,
    overwrite: bool,
    progress: bool,
) -> Path:
    """The work of `embed_table`, called while its lock is held."""
    npy_path = tsv_path.with_suffix(".npy")
    prompts = read_table(tsv_path, ["prompt"])["prompt"]
    if (row := first_empty(prompts)) >= 0:
        raise ValueError(f"{tsv_path}, line {row + 2}: the prompt is empty; remove the row or give it a prompt")
    to_load = encoder is None or isinstance(encoder, (str, os.PathLike))
    name = encoder_name(encoder) if to_load else encoder.name
    in_float32 = {"encoder": name, "rows": len(prompts), "prompts_sha256": hash_prompts(prompts)}
    record = in_float32 if dtype == "float32" else in_float32 | {"dtype": dtype}
    previous = paths.read_record(npy_path.with_suffix(".npy.json"))
    say = print if ranks.is_main else lambda _: None
    if npy_path.is_file() and not overwrite:
        if any(ranks.gather_objects(ranks.is_main and any(are_whole(npy_path, each) for each in (record, in_float32)))):
            say(f"{npy_path} is up to date ({len(prompts):,} rows)")
            return npy_path
        say(f"{npy_path} is damaged, or of other prompts, encoder or dtype, or that is not known: making it again")
    encoder = load_encoder(encoder, device) if to_load else encoder
    distinct, codes = distinct_prompts(prompts)
    # everything that determines the bytes: batches lie within a chunk, and devices round differently
    work = record | {"batch_size": batch_size, "chunk_prompts": CHUNK_PROMPTS, "device": ranks.device.type}
    chunks = ChunkFiles(npy_path, work, -(-len(distinct) // CHUNK_PROMPTS))
    ranks.barrier()  # every rank has looked at the files before one of them changes any
    try:
        if ranks.is_main:
            chunks.open()
            reserve_rows(chunks, len(prompts))
        ranks.barrier()
        encode_chunks(chunks, distinct, encoder, batch_size, dtype, ranks, progress)
        if ranks.is_main:
            num_truncated = assemble(chunks, codes)
            publish_rows(chunks, record, keep_existing=previous is None and not overwrite)
            warn_of_truncated(num_truncated, len(distinct), encoder)
    except BaseException:
        if ranks.is_main and chunks.folder.is_dir() and len(chunks.missing()) == chunks.count:
            chunks.remove()
        raise
    ranks.barrier()
    say(f"{npy_path}: {len(prompts):,} rows embedded by {name}")
    return npy_path


def encode_chunks(
    chunks: ChunkFiles,
    distinct: pa.Array,
    encoder: TextEncoder,
    batch_size: int,
    dtype: str,
    ranks: Ranks,
    progress: bool,
) -> None:
    """Encode the missing chunks, shared among the ranks; returns on every rank once all chunks exist."""
    # rank 0's list on all ranks, since chunks are being saved meanwhile
    missing = ranks.gather_objects(chunks.missing() if ranks.is_main else None)[0]

    def num_finished(missing: list[int]) -> int:  # distinct prompts, of all ranks
        return min(len(distinct), CHUNK_PROMPTS * (chunks.count - len(missing)))

    options = {"initial": num_finished(missing), "disable": not (progress and ranks.is_main)}
    with progress_bar(len(distinct), "prompt", "embedding", **options) as bar:
        for number in missing[ranks.rank :: ranks.world_size]:
            chunk = distinct[number * CHUNK_PROMPTS : (number + 1) * CHUNK_PROMPTS].to_pylist()
            embeddings = encoder.encode(chunk, batch_size, dtype)
            chunks.save(number, embeddings=embeddings, num_truncated=encoder.count_truncated(chunk))
            bar.update(num_finished(chunks.missing()) - bar.n)
        while left := chunks.missing():  # not a barrier, which would time out: another rank may need an hour longer
            if not rows_path(chunks).is_file():
                raise FileNotFoundError(f"{chunks.folder} was removed, maybe by another run; start again")
            bar.update(num_finished(left) - bar.n)
            time.sleep(0.2)
        bar.update(len(distinct) - bar.n)
    ranks.barrier()


def rows_path(chunks: ChunkFiles) -> Path:
    """The file of all rows while it is being made."""
    return chunks.folder / "rows.npy"


def reserve_rows(chunks: ChunkFiles, num_rows: int) -> None:
    """Make the file of all rows, float32 [num_rows, 384]; OSError if it or the missing chunks do not fit the disk."""
    if not rows_path(chunks).is_file():  # else a second run would truncate the file that a first one is writing
        with paths.atomic_path(rows_path(chunks)) as temporary:
            np.lib.format.open_memmap(temporary, "w+", np.float32, (num_rows, EMBEDDING_DIM))
            reserve(temporary)
    needed = 4 * EMBEDDING_DIM * CHUNK_PROMPTS * len(chunks.missing())
    paths.check_room(chunks.path.parent, needed, "this includes prompts that are not embedded yet")


def assemble(chunks: ChunkFiles, codes: np.ndarray) -> int:
    """Write the embedding of every row of the table to the disk.

    Args:
        codes: int [rows], the index of each row's distinct prompt.
    Returns: how many distinct prompts the encoder has truncated.
    """
    out = np.load(rows_path(chunks), mmap_mode="r+")  # in memory, 5 M rows would take 7.8 GB
    order = np.argsort(codes, kind="stable")  # rows of one chunk side by side
    bounds = np.searchsorted(codes[order], CHUNK_PROMPTS * np.arange(chunks.count + 1))
    num_truncated = 0
    for number, (begin, end) in enumerate(pairwise(bounds)):
        rows, chunk = order[begin:end], chunks.load(number)
        out[rows] = chunk["embeddings"][codes[rows] - number * CHUNK_PROMPTS]
        num_truncated += int(chunk["num_truncated"])
    out.flush()
    return num_truncated


def publish_rows(chunks: ChunkFiles, record: dict, keep_existing: bool) -> None:
    """Move the finished file to its final name, write its record, and remove the chunks.

    Args:
        keep_existing: save an existing .npy file as .bak.
    """
    npy_path = chunks.path
    record_path = npy_path.with_suffix(".npy.json")
    if npy_path.is_file() and keep_existing:
        npy_path.replace(npy_path.with_suffix(".npy.bak"))
    record_path.unlink(missing_ok=True)  # so that a kill never leaves a record beside a file that it does not describe
    rows_path(chunks).replace(npy_path)
    record_embeddings(npy_path, record)
    chunks.remove()


def main(argv: Sequence[str] | None = None) -> int:
    """`kutils embed`."""
    parser = argparse.ArgumentParser(
        prog="kutils embed",
        description="Embed the prompts of TSV files: FILE.npy beside each FILE.tsv, float32 [rows, 384], in row order. "
        "Started again after a kill, it continues. torchrun starts it on several GPUs or nodes.",
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
    parser.add_argument("--batch-size", default=64, type=int, help="prompts of 32 tokens per forward pass")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=ENCODER_DTYPES,
        help="precision of the computation; bfloat16 is faster (cosine > 0.9995 with float32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="embed again even if FILE.npy is up to date")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: give 1 or more")
    options = {"device": args.device, "batch_size": args.batch_size, "dtype": args.dtype, "overwrite": args.overwrite}
    ranks = join_workers(args.device)
    for path in args.files:
        embed_table(path, getattr(args, "encoder", None), ranks=ranks, **options)
    return 0
