"""Holds the size of an embedding, for modules that must import nothing but torch."""

EMBEDDING_DIM = 384  # all-MiniLM-L6-v2
