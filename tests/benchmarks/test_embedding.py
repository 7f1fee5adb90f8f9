"""The benchmark's section on embedding, in little: names, units and what must hold on any machine."""

import numpy as np

from kutils.benchmarks import embedding
from kutils.generation import shapes


def test_embedding_is_measured_beside_the_plain_way_in_both_dtypes():
    entries = embedding.measure_embedding(shapes.generate_prompts(64), repeats=1)
    assert [entry.name for entry in entries] == ["embed_prompts", "embed_prompts_float32", "embed_prompts_cosine"]
    rounded, exact, cosine = entries
    assert rounded.unit == exact.unit == "s per 1,000 prompts" and rounded.reference == exact.reference
    for entry in (rounded, exact):
        np.testing.assert_allclose(entry.ratio, entry.reference / entry.ours)
    assert 0.9995 <= cosine.ours < 0.9999999 and cosine.ratio is None
