"""Lists of prompts, cleaning, the grammar, the text encoder, similar pairs, near-duplicates, folds."""
