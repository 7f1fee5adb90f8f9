"""Loads a Stable Diffusion pipeline, samples images in batches, and samples bad images again.

Each image's noise is drawn on the CPU by its own generator, so it does not depend on batch, rank and order.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kutils.generation.image_sets import image_seed
from kutils.generation.settings import DiffusionSettings
from kutils.system.devices import is_out_of_memory
from kutils.system.errors import first_line

# Standard deviation over an image, in levels of 255, of its most varied colour channel; below it an image shows
# nothing. A single colour has 0, and a smooth gradient over 7 levels from edge to edge has 2.
BLANK_STD = 2.0


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


# ---------------------------------------------------------------- the pipeline


def import_diffusers():
    """Import the optional package diffusers, and let it and transformers print errors only."""
    try:
        import diffusers  # takes seconds to import
    except ImportError as error:
        raise ValueError(
            f"images by a diffusion model need the package diffusers ({error}): pip install -e '.[generate]'"
        ) from error
    from transformers.utils import logging

    for package in (diffusers.utils.logging, logging):
        package.set_verbosity_error()
        package.disable_progress_bar()
    return diffusers


def locate(settings: DiffusionSettings) -> Path:
    """Find the folder of the pipeline; downloads one of the hub, unless the cache has it.

    Raises: ValueError if neither a folder nor the hub has it, or diffusers is missing.
    """
    diffusers = import_diffusers()
    folder = Path(settings.model)
    if folder.is_dir():
        if settings.revision:
            raise ValueError(f"--revision {settings.revision} is of a model on the hub; {folder} is a folder")
        return folder
    options = {"revision": settings.revision or None, "variant": settings.variant or None, "safety_checker": None}
    try:
        return Path(diffusers.DiffusionPipeline.download(settings.model, **options, use_safetensors=True))
    except Exception as error:  # of the hub, the network or the files: dozens of classes
        raise ValueError(
            f"--model {settings.model}: it is no folder here, and the hub does not have it in safetensors, asks for an "
            "account, or cannot be reached; on a machine with network, download it (hf download "
            f"{settings.model} --local-dir FOLDER) and give --model FOLDER ({first_line(error)})"
        ) from error


def load_pipeline(settings: DiffusionSettings, device: torch.device):
    """Load a `StableDiffusionPipeline` with DPM-Solver++ (Lu et al. 2022), without its safety checker, on the device.

    Raises: ValueError for anything but a Stable Diffusion pipeline that makes images from text.
    """
    diffusers = import_diffusers()
    folder = locate(settings)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is no pipeline: it holds no model_index.json; give a folder that diffusers' save_pretrained "
            "wrote, or a download of the whole hub repository"
        )
    options = {"variant": settings.variant or None, "torch_dtype": pick_dtype(settings.dtype, device)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `torch_dtype` is what all versions since 0.35 understand
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                folder, **options, use_safetensors=True, safety_checker=None, local_files_only=True
            )
    except Exception as error:  # of diffusers, transformers, safetensors: dozens of classes
        raise ValueError(
            f"{folder} cannot be loaded; is it whole, in safetensors, and of --variant {settings.variant or 'none'}? "
            f"({first_line(error)})"
        ) from error
    if not isinstance(pipeline, diffusers.StableDiffusionPipeline):
        raise ValueError(f"{folder} is a {type(pipeline).__name__}; give a StableDiffusionPipeline")
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++"
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # decodes one image at a time: the activations of a whole batch are too large
    if settings.upcast_attention:
        upcast_attention(pipeline.unet)
    if settings.attention_slicing:
        pipeline.enable_attention_slicing()
    return pipeline.to(device)


def upcast_attention(unet: torch.nn.Module) -> None:
    """Compute attention scores in float32; torch's fused attention ignores diffusers' flag for this."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for module in unet.modules():
        if isinstance(module, Attention):
            module.upcast_attention = True
            module.set_processor(AttnProcessor())


def weights_sha256(pipeline) -> str:
    """Hex SHA-256 of everything in a pipeline that determines pixels: weights, vocabulary, scheduler; not its name."""
    digest = hashlib.sha256()
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    other = [scheduler, pipeline.tokenizer.get_vocab(), pipeline.vae.config.scaling_factor]
    digest.update(json.dumps(other, sort_keys=True).encode())
    for name in ("text_encoder", "unet", "vae"):
        # only some versions of transformers have the prefix
        tensors = {
            key.removeprefix("text_model."): value for key, value in getattr(pipeline, name).state_dict().items()
        }
        for key, tensor in sorted(tensors.items()):
            digest.update(f"{name}.{key}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- images


@dataclass(frozen=True)
class Sample:
    """One image, or why there is none.

    Attributes:
        pixels: uint8 [size, size, 3]; None if every attempt failed.
        outcome: empty if the first attempt was good, else `float32`, `another seed` or `failed`.
        reason: what was wrong with the attempts that failed.
    """

    pixels: np.ndarray | None
    outcome: str = ""
    reason: str = ""


class Sampler:
    """Makes images of any prompts by a pipeline, in batches that fit into its memory.

    A bad image (not finite, or blank: see BLANK_STD) is made again in float32, in case half precision overflowed, and
    then with another seed.
    """

    def __init__(self, pipeline, settings: DiffusionSettings):
        self.pipeline, self.settings = pipeline, settings
        self.dtype, self.batch_size = pipeline.unet.dtype, settings.batch_size

    def __call__(self, prompts: Sequence[str], numbers: Sequence[int]) -> list[Sample]:
        """One Sample per prompt and image number, in the same order.

        Raises: ValueError if one image alone does not fit into the memory.
        """
        seeds = [image_seed(prompt, number) for prompt, number in zip(prompts, numbers, strict=True)]
        images = self.sample_batches(prompts, seeds)
        return [
            Sample(pixels) if not problem else self.retry(prompt, number, problem)
            for prompt, number, (pixels, problem) in zip(prompts, numbers, images, strict=True)
        ]

    def sample_batches(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[np.ndarray, str]]:
        """`sample` in batches; if the memory is full, starts again with batches of half the size."""
        while True:
            size = self.batch_size
            try:
                parts = [
                    self.sample(prompts[start : start + size], seeds[start : start + size])
                    for start in range(0, len(prompts), size)
                ]
                return [image for part in parts for image in part]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise ValueError(
                        f"one image of {self.settings.size} px does not fit into the memory: --attention-slicing, "
                        f"--dtype float16 or a smaller --size take less ({first_line(error)})"
                    ) from error
            self.batch_size = (min(size, len(prompts)) + 1) // 2  # outside of `except`, whose traceback holds memory
            torch.cuda.empty_cache()
            message = f"the memory is full, going on with {self.batch_size} images at a time"
            print(f"{self.pipeline.device}: {message}", flush=True)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[np.ndarray, str]]:
        """Make one batch: uint8 [size, size, 3] of each image, and what is wrong with it (empty if nothing)."""
        side = self.settings.size
        images = self.pipeline(
            list(prompts),
            latents=self.noise(seeds),
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            height=side,
            width=side,
            output_type="pt",  # [B, 3, H, W] in 0..1; NaN stays NaN
        ).images.float()
        problems = [describe_problem(image) for image in images]
        pixels = images.nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return list(zip(pixels.cpu().numpy(), problems, strict=True))

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """[B, C, size / 8, size / 8] standard normal, drawn in float32: equal for every dtype except for rounding."""
        side = self.settings.size // self.pipeline.vae_scale_factor
        shape = (self.pipeline.unet.config.in_channels, side, side)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise).to(self.pipeline.unet.dtype)

    def retry(self, prompt: str, number: int, problem: str) -> Sample:
        """Make an image again whose first attempt had a problem: in float32, and with another seed."""
        reasons = [problem]
        if self.dtype != torch.float32:  # else it would be the same image again
            pixels, problem = self.sample_in_float32(prompt, image_seed(prompt, number))
            if not problem:
                return Sample(pixels, "float32", reasons[0])
            reasons.append(f"float32: {problem}")
        ((pixels, problem),) = self.sample([prompt], [image_seed(prompt, number, attempt=1)])
        if not problem:
            return Sample(pixels, "another seed", "; ".join(reasons))
        return Sample(None, "failed", "; ".join([*reasons, f"another seed: {problem}"]))

    def sample_in_float32(self, prompt: str, seed: int) -> tuple[np.ndarray | None, str]:
        """`sample` one image with the pipeline in float32, then convert it back, which restores the weights exactly."""
        try:
            self.pipeline.to(torch.float32)
            return self.sample([prompt], [seed])[0]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None, "does not fit into the memory"
        finally:
            self.pipeline.to(self.dtype)


def describe_problem(image: Tensor) -> str:
    """What is wrong with float [3, H, W] in 0..1; empty if nothing is."""
    if not image.isfinite().all():
        return "not finite"
    std = float(image.flatten(1).std(dim=1).max() * 255)
    if std < BLANK_STD:
        return f"{'black' if image.mean() < 0.02 else 'blank'} (standard deviation {std:.1f} of 255)"
    return ""
