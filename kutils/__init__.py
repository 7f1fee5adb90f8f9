"""From a generated image back to the meaning of its prompt: the parts that the notebooks and commands share."""
