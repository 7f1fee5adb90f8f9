"""Gives imported pairs their embeddings: those of the source if they agree with the encoder, else encoded ones."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.data.checking import SAME_COSINE
from kutils.data.pair_parts import part_folder
from kutils.prompts import embedding
from kutils.prompts.encoder import TextEncoder
from kutils.prompts.near_duplicates import deduplicate
from kutils.system import arrow, paths
from kutils.system.chunks import ChunkFiles
from kutils.system.embedding_files import EMBEDDING_DIM, map_embeddings
from kutils.system.output import quoted
from kutils.system.ranks import Ranks
from kutils.system.tables import write_table

COMPARED_PROMPTS = 1024  # distinct prompts to encode, whose embeddings are compared with the source's


def part_batches(chunks: ChunkFiles, number: int) -> Iterator[pa.RecordBatch]:
    """The rows of a finished part, one shard at a time."""
    yield from arrow.map_table(part_folder(chunks, number) / "rows.arrow").to_batches()


def row_batches(chunks: ChunkFiles, numbers: Iterable[int]) -> Iterator[pa.RecordBatch]:
    """The rows of finished parts, in order."""
    for number in numbers:
        yield from part_batches(chunks, number)


def write_embeddings(chunks: ChunkFiles, numbers: list[int], from_source: bool, ranks: Ranks) -> dict | None:
    """Write `all.npy` among the chunks: float32 [rows, 384] of all rows of finished parts.

    Args:
        from_source: whether the source has embeddings, at least for some rows.
        ranks: all call this, and encode together.
    Returns: on the main rank a report: prompts compared, their smallest cosine, prompts encoded, and why.
    Raises: EncoderError; OSError on a full disk.
    """
    report, codes, table = None, None, chunks.folder / "encode.tsv"
    encoder = None
    if ranks.is_main:
        report = {"compared": 0, "why": "the source has none"}
        if from_source:
            encoder = embedding.load_encoder(device=ranks.device.type)
            report = compare(chunks, numbers, encoder)
        distinct, codes = find_missing(chunks, numbers, every=bool(report["why"]))
        report["encoded"] = len(distinct)
        if len(distinct):
            write_table(table, {"prompt": distinct})
    if ranks.gather_objects(len(distinct) if ranks.is_main else None)[0]:
        embedding.embed_table(table, encoder, ranks=ranks)
    if ranks.is_main:
        encoded = map_embeddings(table.with_suffix(".npy"), len(distinct)) if len(distinct) else None
        write_rows(chunks.folder / "all.npy", len(codes), fill(chunks, numbers, codes, encoded))
    ranks.barrier()
    return report


def compare(chunks: ChunkFiles, numbers: list[int], encoder: TextEncoder) -> dict:
    """Encode a sample of prompts that have an embedding in the source, and compare.

    The sample is the prompts with the smallest hashes, so it does not depend on the number and order of parts. `why` in
    the result says why the source's embeddings are not used; it is empty if they are.
    """
    sample: dict[bytes, tuple[str, np.ndarray]] = {}
    for batch in row_batches(chunks, numbers):
        vectors = batch.column("embedding")
        for position in np.flatnonzero(vectors.is_valid().to_numpy(zero_copy_only=False)).tolist():
            prompt = batch.column("prompt")[position].as_py()
            digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
            sample.setdefault(digest, (prompt, vectors[position].values.to_numpy()))
        sample = dict(sorted(sample.items())[:COMPARED_PROMPTS])
    if not sample:
        return {"compared": 0, "why": "no prompt has one in the source, or all were changed"}
    prompts, expected = zip(*sample.values(), strict=True)
    encoded = embedding.encode_prompts(list(prompts), encoder, progress=False)
    cosines = np.einsum("nd,nd->n", encoded, np.stack(expected))
    worst, differing = int(np.argmin(cosines)), int((cosines < SAME_COSINE).sum())
    report = {"compared": len(prompts), "smallest_cosine": round(float(cosines[worst]), 6), "why": ""}
    if differing:
        report["why"] = (
            f"{differing:,} of {len(prompts):,} prompts have other embeddings in the source than by {encoder.name}, "
            f"cosine {cosines[worst]:.3f} for {quoted(prompts[worst])}"
        )
    return report


def find_missing(chunks: ChunkFiles, numbers: list[int], every: bool) -> tuple[pa.Array, np.ndarray]:
    """The distinct prompts to encode, and the index of each row's prompt among them, int32 [rows]; -1 for none.

    Args:
        every: encode all prompts, also those with an embedding in the source.
    """
    places: dict[str, int] = {}
    codes = [np.empty(0, np.int32)]
    for batch in row_batches(chunks, numbers):
        missing = np.ones(len(batch), bool) if every else batch.column("embedding").is_null().to_numpy(False)
        codes.append(np.full(len(batch), -1, np.int32))
        prompts = batch.column("prompt").filter(pa.array(missing)).to_pylist()
        codes[-1][missing] = [places.setdefault(prompt, len(places)) for prompt in prompts]
    return pa.array(list(places), pa.string()), np.concatenate(codes)


def fill(chunks: ChunkFiles, numbers: list[int], codes: np.ndarray, encoded: np.ndarray | None) -> Iterator[np.ndarray]:
    """Embeddings of the rows in blocks: the source's, or those of `encoded` (float32 [n, 384]) that `codes` name."""
    start = 0
    for batch in row_batches(chunks, numbers):
        column, own = batch.column("embedding"), codes[start : start + len(batch)]
        block = np.zeros((len(batch), EMBEDDING_DIM), np.float32)
        block[column.is_valid().to_numpy(False)] = column.flatten().to_numpy(False).reshape(-1, EMBEDDING_DIM)
        if (own >= 0).any():
            block[own >= 0] = encoded[own[own >= 0]]
        yield block
        start += len(batch)


def write_rows(path: Path, num_rows: int, blocks: Iterable[np.ndarray]) -> None:
    """Write an .npy file of float32 [num_rows, 384], block by block and atomically."""
    with paths.atomic_path(path) as temporary, temporary.open("wb") as stream:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, EMBEDDING_DIM)}
        np.lib.format.write_array_header_1_0(stream, shape)
        for block in blocks:
            stream.write(np.ascontiguousarray(block, np.float32).data)


def keep_leaders(chunks: ChunkFiles, numbers: list[int], threshold: float, ranks: Ranks) -> np.ndarray:
    """bool [rows]: whether the row's prompt is no near-duplicate of an earlier one; equal for all images of a prompt.

    Args:
        threshold: cosine from which prompts are near-duplicates.
        ranks: all call this; the result is valid on the main rank.
    """
    prompts = pa.chunked_array([batch.column("prompt") for batch in row_batches(chunks, numbers)], pa.string())
    _, codes = embedding.distinct_prompts(prompts)
    _, first = np.unique(codes, return_index=True)
    embeddings = np.load(chunks.folder / "all.npy", mmap_mode="r")[first]
    leaders = deduplicate(embeddings, threshold, ranks=ranks, progress=ranks.is_main)
    return (leaders == np.arange(len(first)))[codes]
