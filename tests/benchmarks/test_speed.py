"""The benchmark's sections on loading and training, in little, and the published pipeline beside which they stand."""

import os
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from torch import nn

from kutils.benchmarks import differences, flops, loader, measuring, published, step
from kutils.data import transforms
from kutils.models import networks
from kutils.models.published import published_names
from kutils.runs.recipes import find_recipe, load_recipe
from kutils.system.paths import repository_root
from kutils.training import losses

ROOT = repository_root()


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(loader, "NUM_PICTURES", 2)
    monkeypatch.setattr(measuring, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(differences, "UPDATES", 6)


def by_name(entries) -> dict:
    assert len({entry.name for entry in entries}) == len(entries)
    return {entry.name: entry for entry in entries}


# ---------------------------------------------------------------- the published pipeline


def test_the_published_augmentation_is_that_of_the_recipe():
    """For the same draws the published transform and ours cut the same box and change colours alike."""
    (picture,) = loader.random_pictures(1, size=96)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    box, factors, order = transforms.draw_augmentation(image, (71, 0, 5))
    torch.default_generator.manual_seed(int(np.random.SeedSequence((71, 0, 5)).generate_state(1, np.uint64)[0] >> 1))
    theirs = published.training_transform(64, (0, 0, 0), (1, 1, 1))(picture)  # draws in the same order
    again = np.asarray(published.augment_as(picture, 64, box, factors, order), np.float32)
    np.testing.assert_allclose(255 * theirs.permute(1, 2, 0).numpy(), again, atol=1e-3)


def test_the_published_trainer_trains():
    """With SAM it goes along the gradient at the perturbed weights, and weights are back in their place after it."""
    network = TinyNetwork()
    trainer = published.Trainer(network, lr=1e-2, weight_decay=0.0, half=False)
    random = torch.Generator().manual_seed(0)
    images, targets = torch.randn(16, 3, 4, 4, generator=random), torch.randn(16, 8, generator=random)
    first = [trainer.update(images, targets) for _ in range(30)]
    assert first[-1] < 0.8 * first[0]
    expected = losses.cosine_embedding_loss(network(images), targets)
    assert trainer.update(images, targets) == pytest.approx(expected.item(), abs=1e-6)
    before = network.fc.weight.detach().clone()
    trainer.backward(images, targets)
    norm = torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).norm()
    moved = before + 0.05 * network.fc.weight.grad / norm
    with published.moved_uphill(network, 0.05):
        torch.testing.assert_close(network.fc.weight.detach(), moved)
    torch.testing.assert_close(network.fc.weight.detach(), before)
    cosines = trainer.evaluate(images, targets)
    torch.testing.assert_close(cosines, losses.cosine_similarity(network(images), targets).detach())


def test_weights_come_back_to_the_last_bit():
    """w + e - e differs from w by rounding in most weights."""
    network = TinyNetwork()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 0.123)
    with published.moved_uphill(network, 0.05):
        moved = [parameter.detach().clone() for parameter in network.parameters()]
    assert any(not torch.equal(one - (one - old), old) for one, old in zip(moved, before, strict=True))
    assert all(torch.equal(parameter, old) for parameter, old in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("model", "without", "missed"),
    [
        (
            "convnext_large",
            {"backbone.stages.0.blocks.0.norm.weight", "backbone.head.norm.weight", "backbone.stem.0.bias"},
            {"backbone.stem.1.weight", "backbone.stages.1.downsample.0.weight", "backbone.stages.0.blocks.0.gamma"},
        ),
        (
            "vit_large",
            {"backbone.pos_embed", "backbone.blocks.0.norm1.weight", "backbone.norm.weight"},
            {"backbone.cls_token", "backbone.head.weight"},
        ),
        (
            "eva02_large_clsavg",
            {"backbone.blocks.0.mlp.norm.weight", "backbone.blocks.0.norm1.bias"},
            {"backbone.cls_token", "backbone.pos_embed", "backbone.blocks.0.norm1.weight", "fc.weight"},
        ),
    ],
)
def test_decay_is_that_of_the_published_list(model, without, missed):
    """What the list means to exempt and misses is decayed, as it was."""
    recipe = load_recipe(find_recipe(model, 1), ["pretrained=false"])
    with torch.device("meta"):
        network = networks.build_model(recipe)
    groups = published.decay_groups(network, published_names(network))
    decayed, exempt = ({id(parameter) for parameter in group["params"]} for group in groups)
    parameters = dict(network.named_parameters())
    assert {id(parameters[name]) for name in without} <= exempt and {id(parameters[name]) for name in missed} <= decayed
    if model.startswith("eva02"):
        assert sum(id(parameters[name]) in decayed for name in parameters if ".norm" in name) == 48


class TinyNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.fc = nn.Conv2d(3, 6, 4), nn.Linear(6, 8)

    def forward(self, images):
        return self.fc(torch.tanh(self.backbone(images)).flatten(1))


# ---------------------------------------------------------------- the sections


def test_loading_is_measured_for_three_formats(workspace, little):
    entries = by_name(loader.measure_loading(repeats=1))
    ways = [f"{name}{augmented}{part}" for name in ("webp", "jpeg", "png") for augmented in ("", "_plain")
            for part in ("_host", "_all")]  # fmt: skip
    assert list(entries) == [f"loader_{way}" for way in ways]
    assert {entry.unit for entry in entries.values()} == {"images/s"}
    for entry in entries.values():
        assert entry.ours > 0 and entry.ratio == entry.ours / entry.reference
    assert not list((workspace / "working" / "benchmark").iterdir())


def test_loading_takes_pictures_of_ones_own(workspace, tmp_path):
    for number in range(60):
        Image.new("L", (30 + number, 40), number).save(tmp_path / f"{number:02d}.png")
    chosen = loader.read_pictures(tmp_path)
    assert len(chosen) == loader.NUM_PICTURES and {image.size for image in chosen} == {(512, 512)}
    assert chosen[1].getpixel((5, 5)) == (2, 2, 2) and {image.mode for image in chosen} == {"RGB"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        loader.read_pictures(tmp_path / "empty")


def test_made_pictures_take_as_many_bytes_as_real_ones(workspace):
    with loader.picture_files("webp") as files:
        assert 40_000 < np.mean([path.stat().st_size for path in files]) < 55_000


def test_a_step_is_measured_beside_the_published_one(workspace, little):
    entries = by_name(step.measure_training("tiny_vit", repeats=1))
    assert set(entries) == {f"{name}_tiny_vit" for name in ("step", "sam_overhead", "optimizer", "validation", "mfu")}
    for name, entry in entries.items():
        better = entry.ours / entry.reference if name.startswith(("step", "validation", "mfu")) else 1
        worse = entry.reference / entry.ours if name.startswith(("sam", "optimizer")) else 1
        assert entry.ratio == pytest.approx(better * worse)
    assert "a matrix product" in entries["mfu_tiny_vit"].unit and entries["mfu_tiny_vit"].ours > 0


def test_what_a_gpu_cannot_hold_is_left_out_and_said(monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "measure_updates", full)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert step.measure_training("tiny_vit") == [] and "tiny_vit is left out" in capsys.readouterr().out


def test_differences_are_those_of_rounding(workspace, little):
    entries = {name: entry.ours for name, entry in by_name(differences.measure_differences(["tiny_vit"])).items()}
    assert entries["difference_decode"] == 0 and entries["difference_resize"] < 2
    assert 0.3 < entries["difference_augmented"] < 3
    assert 0.9 < entries["difference_darker"] < 2  # half a level for each of the operations but hue
    assert entries["difference_loss_tiny_vit"] < 1e-5 and entries["difference_loss_sam_tiny_vit"] < 1e-5
    assert 1e-7 < entries["difference_loss_bfloat16_tiny_vit"] < 0.01


def test_the_losses_that_are_compared_fall(workspace, little):
    """Losses that stay where they are would agree whatever the optimiser does."""
    recipe = step.benchmark_recipe("tiny_vit")
    losses = differences.our_losses(recipe, torch.device("cpu"), rho=0.0)
    assert losses[-1] < losses[0] - 0.05


def test_operations_of_training_are_counted_without_memory():
    """ConvNeXt-L at 384 px: 101.1 billion multiply-adds forward (Liu et al. 2022, table 1)."""
    operations = flops.training_flops(step.benchmark_recipe("convnext_large"))
    assert operations == pytest.approx(6 * 101.1e9, rel=0.01)


def test_the_peak_of_a_known_gpu_is_its_data_sheets(monkeypatch):
    device = torch.device("cuda", 0)
    for name, teraflops in (("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA L40S", 362),
                            ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121), ("Tesla T4", 65)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(torch.bfloat16, device) == (teraflops * 1e12, "data sheet")


# ---------------------------------------------------------------- what it needs


def needed_by(*names: str) -> set[str]:
    """Distributions that these need, themselves included, by their metadata."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def test_loading_and_training_are_measured_with_torch_torchvision_and_timm_alone(tmp_path):
    """The notebook as a script, where no other package can be imported: all but the measurements themselves."""
    needed = needed_by("torch", "torchvision", "timm")
    packages = metadata.packages_distributions()
    missing = [
        name for name, owners in packages.items() if not {owner.lower().replace("_", "-") for owner in owners} & needed
    ]
    missing = [
        name
        for name in missing
        if name not in ("kutils", "_distutils_hack", "__pycache__", "setuptools", "pkg_resources")
    ]
    assert {"pandas", "pyarrow", "madgrad", "sklearn", "scipy"} <= set(missing)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({missing!r})\n")
    script = (ROOT / "notebooks" / "benchmark.py").read_text(encoding="utf-8")
    (tmp_path / "benchmark_script.py").write_text(script.replace('sections: str = "quick"', 'sections: str = ""'))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "KUTILS_WORKING": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "benchmark_script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
