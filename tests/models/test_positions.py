"""Position embeddings go from the grid of one stage to that of the next."""

import pytest
import timm
import torch
import torch.nn.functional as F

from kutils import __main__
from kutils.models import checkpoints, positions, published
from kutils.models.networks import build_model


@pytest.mark.parametrize(
    ("backbone", "head", "prefix", "small", "large"),
    [("test_vit", "pooled", 1, 64, 96), ("eva02_tiny_patch14_224", "cls_avg", 1, 56, 84)],
)
def test_resampled_by_hand(tiny_recipe, backbone, head, prefix, small, large):
    """Bicubic interpolation of the grid alone, by torch; the class token's embedding stays. What timm's own loader
    makes of the same weights is the same."""
    options = {"backbone": backbone, "head": head}
    before, after = (build_model(tiny_recipe(**options, input_size=size)) for size in (small, large))
    weights = published.to_published(before)
    resampled, done = positions.resample_positions(after, weights)
    sides = [model.backbone.patch_embed.grid_size[0] for model in (before, after)]
    assert done == f"{sides[0]} x {sides[0]} to {sides[1]} x {sides[1]} tokens"
    name = published.published_names(after)["backbone.pos_embed"]
    own = weights[name].reshape(1, -1, weights[name].shape[-1])
    grid = own[:, prefix:].reshape(1, sides[0], sides[0], -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (sides[1], sides[1]), mode="bicubic", antialias=True, align_corners=False)
    expected = torch.cat([own[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(resampled[name].reshape(expected.shape), expected)
    assert all(resampled[other] is weights[other] for other in weights if other != name)
    published.load_published(after, resampled)
    filtered = timm.create_model(backbone, num_classes=0, img_size=large)
    state = {key.removeprefix("backbone."): value for key, value in before.state_dict().items() if "backbone." in key}
    module = timm.models.vision_transformer if backbone == "test_vit" else timm.models.eva
    theirs = module.checkpoint_filter_fn(state, filtered)["pos_embed"]
    torch.testing.assert_close(after.backbone.pos_embed.detach(), theirs)


def test_what_fits_or_is_of_another_network_stays(tiny_recipe):
    small, other = build_model(tiny_recipe(backbone="test_vit")), build_model(tiny_recipe())
    weights = published.to_published(small)
    assert positions.resample_positions(small, weights) == (weights, "")
    assert positions.resample_positions(other, weights) == (weights, "")
    odd = weights | {"backbone.pos_embed": torch.zeros(1, 8, 64)}  # no square and a class token
    assert positions.resample_positions(small, odd)[1] == ""


def test_a_stage_with_a_larger_input_starts_from_the_one_before(workspace, tiny_recipe, capsys, monkeypatch):
    """At a rate of nearly 0 its weights are those of the stage before, at the other size."""
    monkeypatch.setattr(__main__, "ensure_report", lambda folder: None)
    first = tiny_recipe(backbone="test_vit", epochs=1)
    changes = {"initialize_from": "tiny/tiny_fold{fold}_best_cossim.pth", "input_size": 64, "prefix": "larger"}
    second = tiny_recipe(backbone="test_vit", epochs=1, stage=2, lr=1e-12, min_lr=0.0, **changes)
    for recipe in (first, second):
        path = workspace / f"{recipe.prefix}.yaml"
        path.write_text(recipe.to_yaml())
        assert __main__.run("train", ["--config", str(path), "--fold", "0"]) == 0
    assert "tiny_fold0_best_cossim.pth resampled from 2 x 2 to 4 x 4 tokens" in capsys.readouterr().out
    models = workspace / "working" / "models" / "tiny"
    before = checkpoints.read(models / "tiny_fold0_best_cossim.pth")["model"]
    after, recipe, _ = checkpoints.load_model(models / "larger_fold0_best_cossim.pth")
    assert recipe.input_size == 64 and after.backbone.pos_embed.shape == (1, 17, 64)
    for name, value in published.to_published(after).items():
        if name != "backbone.pos_embed":
            torch.testing.assert_close(value, before[name], atol=2e-5, rtol=0)
