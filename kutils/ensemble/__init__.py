"""Several models as one: members, weights, prediction within a time budget, nearest prompts of an image."""
