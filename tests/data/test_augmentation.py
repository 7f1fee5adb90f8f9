"""Weak augmentation: decided by its key, never a flip, and weak."""

import torch

from kutils.data import augmentation, transforms


def test_weak_augmentation_is_decided_by_its_key_and_never_flips():
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[0, :, :40], image[2, :, 40:] = 200, 200  # red on the left, blue on the right
    state = torch.get_rng_state()
    drawn = [augmentation.augment_weakly(image, 32, (71, 0, row)) for row in range(40)]
    assert torch.equal(torch.get_rng_state(), state), "drop path and augmentation share no random numbers"
    assert all(one.shape == (3, 32, 32) and one.dtype == torch.uint8 for one in drawn)
    assert torch.equal(drawn[3], augmentation.augment_weakly(image, 32, (71, 0, 3)))
    assert len({one.numpy().tobytes() for one in drawn}) > 35
    redness = torch.stack([one[0].float() - one[2].float() for one in drawn])
    assert (redness[..., :8].mean(dim=(1, 2)) > 30).all() and (redness[..., 24:].mean(dim=(1, 2)) < -30).all()


def test_weak_augmentation_keeps_most_of_an_image_and_erases_at_times():
    """A ramp from 0 to 240 across: a crop of 80 % of the area, at ratios to 1.1, keeps 76 % of the width and more."""
    ramp = torch.linspace(0, 240, 96).to(torch.uint8).expand(3, 96, 96).contiguous()
    white = torch.full((3, 96, 96), 250, dtype=torch.uint8)
    crops, erased = [], []
    for row in range(60):
        with transforms.drawing_by((71, 0, row)):
            crops.append(augmentation.weak_augmentation(96).transforms[0](ramp)[0])
        with transforms.drawing_by((71, 1, row)):
            erased.append((augmentation.weak_augmentation(96).transforms[2](white) == augmentation.GREY).float().mean())
    widths = torch.stack([(crop[:, -1].float() - crop[:, 0].float()).mean() for crop in crops]) / 240
    assert widths.min() > 0.74 and widths.max() <= 1.0 and widths.std() > 0.02
    shares = torch.stack(erased)
    assert 0.1 < (shares > 0).float().mean() < 0.45 and shares.max() < 0.11 and shares[shares > 0].min() > 0.015
