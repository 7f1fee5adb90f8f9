"""Data sets as training reads them: index, sampler, transforms, shards, checks, prompt banks."""
