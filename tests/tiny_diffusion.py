"""A Stable Diffusion pipeline with every part a real one has, of random weights: its images are coloured noise."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 16  # that the text encoder reads; 77 in a real one


def build(seed: int = 0) -> StableDiffusionPipeline:
    """64 px: latents of 8 x 8; the tokenizer knows letters, and the pipeline comes with another scheduler than ours."""
    torch.manual_seed(seed)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 4  # random weights alone give a gray that is nearly even
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(folder: Path, change=None, seed: int = 0) -> Path:
    """Build and save to `folder`; `change` may break the pipeline before."""
    pipeline = build(seed)
    if change is not None:
        with torch.no_grad():
            change(pipeline)
    pipeline.save_pretrained(folder)
    return folder


def blacken(pipeline) -> None:
    """The decoder gives -1 everywhere: black."""
    pipeline.vae.decoder.conv_out.weight.zero_()
    pipeline.vae.decoder.conv_out.bias.fill_(-1)


def spoil(pipeline) -> None:
    """The decoder gives NaN."""
    pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
