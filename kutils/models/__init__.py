"""The network of a recipe: backbone, head, pretrained weights, checkpoints in the published layout."""
