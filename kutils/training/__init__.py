"""The training loop and its parts: losses, SAM, optimizer, resume, evaluation, out-of-fold predictions."""
