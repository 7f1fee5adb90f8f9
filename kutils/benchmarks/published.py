"""Holds the published pipeline, written out plainly: what tests and the benchmark compare with.

Images are decoded by Pillow and augmented as Pillow images by torchvision's first transforms; the network runs in NCHW
under float16 autocast with a loss scaler, MADGRAD is timm's loop over parameters, SAM two such loops around it. Needs
torch, torchvision and timm.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from timm.optim import MADGRAD
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

# published names of parameters without weight decay. Not among them: ConvNeXt's norms in the stem and between stages,
# its layer scales, the ViT's class token, EVA02's class token, positions, and norms 1 and 2 of each block
NO_DECAY = re.compile(
    r"bias|layer_?norm|LayerNorm|position(al)?_embedding|ln_(pre|post|1|2)\.weight|(act|norm)\.weight"
)


def training_transform(size: int, mean, std) -> transforms.Compose:
    """Crop of half to all of the area, four colour changes of 0.05, bicubic; as stage 1 of the recipes."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size, scale=(0.5, 1.0), ratio=(0.9, 1.1), interpolation=InterpolationMode.BICUBIC
            ),
            transforms.ColorJitter(0.05, 0.05, 0.05, 0.05),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def plain_transform(size: int, mean, std) -> transforms.Compose:
    """Resize to the square; as stage 2 and validation."""
    return transforms.Compose(
        [
            transforms.Resize((size, size), interpolation=InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def augment_as(image: Image.Image, size: int, box: dict, factors: list[float], order: list[int]) -> Image.Image:
    """What the augmentation makes of an image for given draws; Pillow truncates to whole levels after each change.

    Args:
        box: top, left, height, width of the crop.
        factors: of brightness, contrast, saturation and hue.
        order: of these four.
    """
    change = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    image = F.resized_crop(image, **box, size=[size, size], interpolation=InterpolationMode.BICUBIC)
    for number in order:
        image = change[number](image, factors[number])
    return image


def load_image(path: Path, transform: transforms.Compose) -> Tensor:
    """float32 [3, S, S], the network's input."""
    with Image.open(path) as image:
        return transform(image.convert("RGB"))


def decay_groups(network: nn.Module, names: dict[str, str]) -> list[dict]:
    """MADGRAD's groups: the parameters with weight decay, and those without."""
    groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in network.named_parameters():
        groups[bool(NO_DECAY.search(names.get(name, name)))]["params"].append(parameter)
    return groups


class Trainer:
    """One process's training of a network: `update` takes a batch, `evaluate` one of validation.

    Args:
        network: on its device, in torch's own memory format.
        weight_decay: decoupled; timm's momentum takes a tenth of it away.
        rho: SAM's radius; 0: no SAM.
        half: float16 autocast with a loss scaler, as published; False: float32. Either way with TF32.
        names: own name -> published name of the parameters; None: they are the same.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        weight_decay: float,
        rho: float = 0.0,
        half: bool = True,
        names: dict[str, str] | None = None,
    ):
        self.network, self.rho = network.train(), rho
        self.device = next(network.parameters()).device
        self.autocast = torch.autocast(self.device.type, torch.float16, enabled=half)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        groups = decay_groups(network, names or {})
        self.optimizer = MADGRAD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay, decoupled_decay=True)
        self.criterion = nn.CosineEmbeddingLoss()

    def backward(self, images: Tensor, targets: Tensor) -> Tensor:
        with self.autocast:
            predicted = self.network(images)
            loss = self.criterion(predicted, targets, torch.ones(len(targets), device=self.device))
        self.scaler.scale(loss).backward()
        return loss

    def update(self, images: Tensor, targets: Tensor) -> float:
        """One optimiser update with float32 [B, 3, S, S] and [B, 384] from the host; the loss, read at once."""
        images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        loss = self.backward(images, targets)
        if self.rho > 0:
            with moved_uphill(self.network, self.rho):
                self.optimizer.zero_grad()
                self.backward(images, targets)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, images: Tensor, targets: Tensor) -> Tensor:
        """Cosines of one batch from the host, float32 [B] on the host."""
        self.network.eval()
        with self.autocast:
            predicted = self.network(images.to(self.device, non_blocking=True))
        self.network.train()
        return nn.functional.cosine_similarity(predicted.float(), targets.to(self.device)).cpu()


@contextmanager
def moved_uphill(network: nn.Module, rho: float) -> Iterator[None]:
    """Weights moved by rho along the gradient inside the block, put back from a copy after it (Foret et al. 2021)."""
    parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
    norm = torch.norm(torch.stack([parameter.grad.norm(p=2) for parameter in parameters]), p=2)
    scale, kept = rho / (norm + 1e-12), []
    with torch.no_grad():
        for parameter in parameters:
            kept.append(parameter.detach().clone())
            parameter.add_(parameter.grad * scale)
    yield
    for parameter, before in zip(parameters, kept, strict=True):
        parameter.data = before
