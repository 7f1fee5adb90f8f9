"""Counts the operations of a network's training, and says how many a device could do."""

import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from kutils.benchmarks import measuring
from kutils.models import networks
from kutils.runs.recipes import Recipe

PEAKS = {  # dense bfloat16 (float16 where there is none) TFLOP/s of NVIDIA's data sheets, by what a GPU's name holds
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "T4": 65,
    "V100": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def training_flops(recipe: Recipe) -> int:
    """Floating-point operations of forward and backward for one image, two per multiply-add; nothing is recomputed.

    Three times those of forward, as usual (Chowdhery et al. 2022, appendix B): torch counts the backward of a depthwise
    convolution as of a full one. Counted over tensors without values, so that a network of any size takes no memory.
    """
    with torch.device("meta"), torch.no_grad():
        network = networks.build_model(dataclasses.replace(recipe, gradient_checkpointing=False)).eval()
        images = torch.empty(1, 3, recipe.input_size, recipe.input_size)
        with FlopCounterMode(display=False) as counter:
            network(images)
    return 3 * counter.get_total_flops()


def peak_flops(dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    """Operations per second that the device could do, and where that number is from.

    Of a GPU that is known, the data sheet's; else what a large matrix product reaches.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, teraflops in PEAKS.items():
            if all(word in name for word in part.split()):
                return teraflops * 1e12, "data sheet"
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    count = measuring.repetitions(lambda: matrix @ matrix, device)
    return 2 * size**3 / min(
        measuring.timed(lambda: matrix @ matrix, count, device) for _ in range(3)
    ), "a matrix product"
