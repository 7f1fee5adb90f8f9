"""Colour jitter is that of torchvision, and normalisation that by hand, in batches of any size."""

import pytest
import torch
import torchvision.transforms.v2.functional as F

from kutils.data import transforms
from kutils.training import network_input


def test_batched_jitter_is_torchvisions_image_by_image():
    random = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 9, 7, generator=random)
    images[0] = 0.5  # grey: no hue
    images[1, :, 0] = 0.0
    jitter = torch.stack(
        [transforms.random_crop_and_jitter(torch.zeros(3, 8, 8, dtype=torch.uint8), 8, (n,))[1] for n in range(12)]
    )
    jitter[:, :3] += torch.linspace(-0.5, 0.9, 12)[:, None]  # far beyond the recipe's 0.05, so that clamping is met
    jitter[:, 3] *= 9
    operations = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    expected = []
    for image, drawn in zip(images, jitter, strict=True):
        for number in drawn[4:].long().tolist():
            image = operations[number](image, float(drawn[number]))
        expected.append(image)
    torch.testing.assert_close(network_input.color_jitter(images, jitter), torch.stack(expected), rtol=0, atol=4e-6)


def test_a_batch_is_prepared_the_same_in_parts_of_any_size(monkeypatch):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 6, 8), dtype=torch.uint8, generator=random)
    jitter = torch.stack([transforms.random_crop_and_jitter(images[0], 8, (71, n))[1] for n in range(5)])
    whole = network_input.normalize(images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), jitter)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    for one, drawn, expected in zip(images, jitter, whole, strict=True):
        single = network_input.normalize(one[None], (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), drawn[None])
        torch.testing.assert_close(single[0], expected, rtol=0, atol=2e-6)
    monkeypatch.setattr(network_input, "CACHED_VALUES", 2 * 3 * 6 * 8)
    in_parts = network_input.normalize(images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), jitter)
    torch.testing.assert_close(in_parts, whole, rtol=0, atol=2e-6)


def test_normalisation_by_hand():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    values = network_input.normalize(images, (0.0, 0.2, 0.5), (1.0, 0.5, 0.25)).flatten()
    assert values.tolist() == pytest.approx([0.0, 0.0, 2.0], abs=1e-6)
