"""Prompts without images: lists, cleaning, grammar, text encoder, similar pairs, near-duplicates, folds."""
