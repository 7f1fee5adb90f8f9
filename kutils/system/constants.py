"""Holds the size of an embedding, for modules that must not load more than torch."""

EMBEDDING_DIM = 384  # all-MiniLM-L6-v2
