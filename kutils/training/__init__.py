"""The training loop and its parts: losses, SAM, optimiser, resuming, evaluation, out-of-fold predictions."""
