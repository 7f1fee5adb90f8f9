"""Images from prompts: a diffusion model, or the built-in renderer."""
