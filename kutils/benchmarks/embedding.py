"""Measures how fast and how exactly prompts are embedded, compared with sentence-transformers."""

import time
from collections.abc import Sequence

from kutils.benchmarks import measuring
from kutils.prompts import embedding


def measure_embedding(texts: Sequence[str], repeats: int = 3) -> list[measuring.Entry]:
    """Embed on the device at hand: by `SentenceTransformer.encode` in float32, and here in both dtypes.

    Args:
        texts: distinct prompts, some thousand of the kinds that are to be embedded.
    Returns: `embed_prompts` (bfloat16) and `embed_prompts_float32`, seconds per 1,000 prompts; `embed_prompts_cosine`,
        the smallest cosine between bfloat16 and plain float32.
    """
    texts = list(texts)
    encoder = embedding.load_encoder()
    ways = {
        "plain": lambda: encoder.model.encode(texts, normalize_embeddings=True, show_progress_bar=False),
        "float32": lambda: embedding.encode_prompts(texts, encoder, progress=False),
        "bfloat16": lambda: embedding.encode_prompts(texts, encoder, progress=False, dtype="bfloat16"),
    }
    seconds = {name: [] for name in ways}
    embeddings = {name: way() for name, way in ways.items()}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.monotonic()
            way()
            seconds[name].append((time.monotonic() - began) / len(texts) * 1000)
    cosines = (embeddings["bfloat16"] * embeddings["plain"]).sum(axis=1)
    unit = "s per 1,000 prompts"
    return [
        measuring.make_entry("embed_prompts", unit, seconds["bfloat16"], seconds["plain"]),
        measuring.make_entry("embed_prompts_float32", unit, seconds["float32"], seconds["plain"]),
        measuring.make_entry("embed_prompts_cosine", "smallest cosine", [float(cosines.min())]),
    ]
