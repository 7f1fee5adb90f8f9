"""Defines the keys of a recipe: type, default, help text, and which values go together."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from kutils.system import paths

AUGMENT_BEFORE = {True: "published", False: "none"}  # values of `augment` in recipes of earlier versions
# not allowed in names; surrogates, which stand for bytes that are not UTF-8, are
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class ConfigError(ValueError):
    """An invalid recipe or override; the message names the key and says what to do."""


def setting(text: str, default=dataclasses.MISSING, choices: tuple = ()):
    """A recipe key: its help text, its default (none: required in every recipe) and, if they are few, its values."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a training run except the fold. Each recipe file in `conf/` holds one."""

    prefix: str = setting("stem of the names of the run folder and checkpoints")
    save_dir: str = setting("folder of the checkpoints below model_dir")
    model: str = setting("name for `-p model`: one recipe per model and stage")
    stage: int = setting(
        "1: from pretrained weights, 2: SAM from stage 1, 3: one more epoch from stage 2", choices=(1, 2, 3)
    )
    train_folds: tuple[int, ...] = setting("validation folds that dist_train.sh runs, one after the other")
    datasets: tuple[str, ...] = setting("data sets: input/<name>.tsv and .npy, concatenated")
    backbone: str = setting("timm model name")
    pretrained: bool | str = setting(
        "true: from the hub, package: from an installed Python package, false: random, or the path of a weights file",
        True,
    )
    initialize_from: str | None = setting("checkpoint to start from; {fold}: the fold; relative to model_dir", None)
    head: str = setting(
        "features of the backbone that the linear head gets",
        "pooled",
        choices=("pooled", "pooled_stages", "clip_projection", "cls_avg", "cls_only"),
    )
    head_init: str = setting(
        "random weights of the linear head, or ridge regression on the frozen backbone's features: one pass over the "
        "training images, in place of frozen epochs",
        "xavier",
        choices=("xavier", "ridge"),
    )
    head_width: int = setting(
        "hidden units of a head Linear - BatchNorm - ReLU - Linear (unknown to the published code); 0: one Linear", 0
    )
    head_keys: int = setting(
        "for few training pairs: random training images; the last Linear sees an image's likeness to each, in place of "
        "features; needs head_init=ridge; the published code cannot read it; 0: none",
        0,
    )
    drop_path_rate: float = setting("stochastic depth, rising linearly over the blocks", 0.0)
    patch_mode: str = setting(
        "ViT above its own resolution: strided patches (as published) or interpolated position embeddings",
        "interpolated",
        choices=("strided", "interpolated"),
    )
    input_size: int = setting("side of the square input, px")
    mean: tuple[float, float, float] = setting("channel means of the normalisation, for pixels in [0, 1]")
    std: tuple[float, float, float] = setting("channel standard deviations of the normalisation")
    augment: bool | str = setting(
        "published (or true): random resized crop and colour jitter; weak: crop, light RandAugment and erasing; "
        "none (or false): resize to the square",
        choices=("published", "weak", "none"),
    )
    epochs: int = setting("epochs; in each, one image per prompt")
    warmup_epochs: int = setting("epochs in which the rate goes from warmup_lr to lr", 0)
    freeze_epochs: int = setting("epochs at the start in which only the head is trained", 0)
    freeze_blocks: int = setting("number of lowest blocks of the backbone to freeze, with everything before them", 0)
    loss: str = setting(
        "1 - cosine similarity, as published, or the angle in radians", "cosine", choices=("cosine", "angular")
    )
    lr: float = setting("learning rate at the start of the cosine")
    warmup_lr: float = setting("learning rate of the first update of the warm-up", 0.0)
    min_lr: float = setting("learning rate at the end of the cosine")
    optimizer: str = setting("MADGRAD, as published, or AdamW", "madgrad", choices=("madgrad", "adamw"))
    layer_decay: float = setting("layer-wise decay of the learning rate: factor from a layer to the one below", 1.0)
    hold_batch_statistics: bool = setting(
        "BatchNorm uses the running statistics of the pretrained weights, also in training", False
    )
    ema_decay: float = setting(
        "decay of an exponential moving average of the weights, which is validated and saved too; smaller in the first "
        "updates; 0: none",
        0.0,
    )
    weight_decay: float = setting("decoupled weight decay; none on 1-D parameters, position and class embeddings", 0.0)
    clip_grad: float = setting("largest norm of an update's gradient (gradient clipping); 0: no clipping", 0.0)
    sam_rho: float = setting("radius of the SAM perturbation; 0: no SAM", 0.0)
    sam_gradient: str = setting(
        "SAM perturbs by the gradient of each local batch (results depend on its size and the number of ranks), or by "
        "that of the global batch, as the published code did (less memory, and results do not depend on the split)",
        "local",
        choices=("local", "averaged"),
    )
    global_batch_size: int = setting("images per optimiser update over all ranks")
    max_local_batch_size: int = setting("most images per rank and forward pass; larger batches are accumulated")
    gradient_checkpointing: bool = setting("less memory for about a third more time", False)
    compile: bool = setting(
        "torch.compile the network: minutes at the start, then faster steps on a GPU; if it fails, training goes on "
        "without it, with a warning",
        False,
    )
    amp_dtype: str = setting(
        "autocast; auto: bfloat16 where the device has it, float16 on older GPUs, else float32",
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    seed: int = setting("seed of weights, sampling and augmentation", 71)
    device: str = setting("auto: GPU if there is one, else CPU", "auto", choices=("auto", "cuda", "cpu"))
    num_workers: int = setting("data loader processes per rank; 0: in the training process", 8)
    resume: str = setting(
        "auto: continue an interrupted run; never: start over, and move a previous run of this name aside",
        "auto",
        choices=("auto", "never"),
    )
    checkpoint_every_steps: int = setting("save the resume state every so many updates; 0: only by time and epoch", 0)
    checkpoint_every_minutes: float = setting("save the resume state every so many minutes; 0: only by epoch", 15.0)
    profile_steps: int = setting("updates to profile with torch.profiler; 0: none", 0)
    model_dir: str = setting("folder of published checkpoints; empty: working/models", "")
    run_dir: str = setting("folder of run folders; empty: working/runs", "")

    def __post_init__(self):
        object.__setattr__(self, "augment", AUGMENT_BEFORE.get(self.augment, self.augment))
        for item in dataclasses.fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(f"{item.name} is {value!r}; it can be {', '.join(map(str, choices))}")
            if isinstance(value, str) and UNSEEN.search(value):
                raise ConfigError(f"{item.name} is {value!r}, which holds a character that cannot be seen; remove it")
        for name in ("prefix", "save_dir"):
            value = getattr(self, name)
            if not paths.is_safe_relative(value) or (name == "prefix" and "/" in value):
                raise ConfigError(f"{name} is {value!r}; it names a file or folder below another and cannot leave it")
        start = self.initialize_from
        if start is not None and not Path(start).is_absolute() and not paths.is_safe_relative(start):
            raise ConfigError(f"initialize_from is {start!r}; give a path below model_dir, or an absolute one")
        for name in ("epochs", "input_size", "global_batch_size", "max_local_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        numbers = ("lr", "min_lr", "warmup_lr", "weight_decay", "sam_rho", "drop_path_rate", "warmup_epochs")
        for name in (
            *numbers,
            "freeze_epochs",
            "freeze_blocks",
            "head_width",
            "head_keys",
            "clip_grad",
            "num_workers",
            "checkpoint_every_steps",
            "checkpoint_every_minutes",
            "profile_steps",
            "seed",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a finite number of at least 0")
        if not self.datasets:
            raise ConfigError("datasets is empty; name at least one data set of input/, as in datasets=cc3m,lexica")
        if any(not paths.is_safe_relative(name) for name in self.datasets):
            raise ConfigError(f"datasets is {', '.join(self.datasets)}; each is a name below input/, without ..")
        if len(set(self.datasets)) < len(self.datasets):
            raise ConfigError(f"datasets names one twice: {', '.join(self.datasets)}")
        if any(not 0 <= fold <= 9 for fold in self.train_folds):
            raise ConfigError(f"train_folds is {self.train_folds}; folds are 0 to 9")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ConfigError(
                f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}; lower it or raise them"
            )
        if self.sam_rho == 0 and self.sam_gradient != "local":
            raise ConfigError(f"sam_gradient={self.sam_gradient} is for SAM, and sam_rho=0 is none; leave it out")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay is {self.layer_decay}; it must be above 0 and at most 1")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}; it must be 0 or more, and below 1")
        if self.freeze_epochs >= self.epochs and (self.freeze_blocks or self.layer_decay < 1):
            key = f"freeze_blocks={self.freeze_blocks}" if self.freeze_blocks else f"layer_decay={self.layer_decay}"
            raise ConfigError(
                f"{key} has no effect: freeze_epochs={self.freeze_epochs} of epochs={self.epochs} freeze the whole "
                "backbone; leave one out"
            )
        if self.head_init == "ridge" and self.head_width:
            raise ConfigError(
                f"head_init=ridge fits one Linear, and head_width={self.head_width} has two; leave one of them out"
            )
        if self.head_keys and self.head_width:
            raise ConfigError(
                f"head_keys={self.head_keys} and head_width={self.head_width} are two kinds of head; leave one out"
            )
        if self.head_keys and self.head_init != "ridge" and self.initialize_from is None:
            raise ConfigError(
                f"head_keys={self.head_keys}: the keys are set by head_init=ridge or come with a checkpoint; set "
                "head_init=ridge or initialize_from"
            )
        if self.head_width and self.max_local_batch_size == 1:
            raise ConfigError(
                f"head_width={self.head_width} has a BatchNorm, which needs two images or more at a time, and "
                "max_local_batch_size is 1; raise it"
            )
        if self.head_init == "ridge" and self.initialize_from is not None:
            raise ConfigError(
                "head_init=ridge would replace the head of the checkpoint that initialize_from names; leave one out"
            )
        if self.stage > 1 and self.initialize_from is None:
            raise ConfigError(f"stage {self.stage} starts from a checkpoint; set initialize_from")

    def checkpoint_path(self, fold: int, kind: str = "best_cossim") -> Path:
        """`<model_dir>/<save_dir>/<prefix>_fold<k>_<kind>.pth`; kind is `best_cossim` or `epoch<n>`."""
        return self.models_folder() / self.save_dir / f"{self.prefix}_fold{fold}_{kind}.pth"

    def last_checkpoints(self, fold: int) -> dict[str, Path]:
        """The checkpoints of the last epoch: `raw` weights and, with `ema_decay`, their `ema`."""
        kind = f"epoch{self.epochs}"
        paths_of = {"raw": self.checkpoint_path(fold, kind)}
        return paths_of | ({"ema": self.checkpoint_path(fold, f"{kind}_ema")} if self.ema_decay else {})

    def models_folder(self) -> Path:
        return Path(self.model_dir).absolute() if self.model_dir else paths.working_dir() / "models"

    def run_folder(self, fold: int) -> Path:
        """`<run_dir>/<prefix>_fold<k>`: config, metrics, logs, resume state and predictions of one run."""
        root = Path(self.run_dir).absolute() if self.run_dir else paths.working_dir() / "runs"
        return root / f"{self.prefix}_fold{fold}"

    def initial_checkpoint(self, fold: int) -> Path | None:
        """The checkpoint that this fold starts from; None without `initialize_from`."""
        if self.initialize_from is None:
            return None
        return self.models_folder() / self.initialize_from.replace("{fold}", str(fold))

    def values(self) -> dict:
        """Every key with its value, in YAML's and JSON's types."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.values(), sort_keys=False, default_flow_style=None, width=120)


def spelled_now(values: dict) -> dict:
    """Convert values in a recipe of an earlier version to those of `Recipe`."""
    return values | (
        {"augment": AUGMENT_BEFORE.get(values["augment"], values["augment"])} if "augment" in values else {}
    )
