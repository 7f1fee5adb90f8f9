"""Networks: what the head sees, freezing, patch modes."""

import numpy as np
import pytest
import timm
import torch

from kutils.models import heads, layers
from kutils.models.networks import build_model, stride_patches
from kutils.runs import recipes


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("backbone", "head", "size", "features"),
    [
        ("test_convnext", "pooled", 32, 64),
        ("test_vit", "pooled", 32, 64),
        ("test_convnext", "pooled_stages", 32, 64 + 48 + 64),
        ("test_vit", "pooled_stages", 32, 3 * 64),
        ("eva02_tiny_patch14_224", "cls_avg", 56, 384),
        ("eva02_tiny_patch14_224", "cls_only", 56, 192),
    ],
)
def test_output_is_a_unit_vector(tiny_recipe, backbone, head, size, features):
    model = build_model(tiny_recipe(backbone=backbone, head=head, input_size=size)).eval()
    assert model.fc.weight.shape == (384, features) and model.fc.bias is None
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images(size))
    assert output.dtype == torch.float32 and output.shape == (2, 384)
    torch.testing.assert_close(output.norm(dim=1), torch.ones(2))


def test_tokens_of_the_last_block_by_hand(tiny_recipe):
    model = build_model(tiny_recipe(backbone="eva02_tiny_patch14_224", head="cls_avg", input_size=56)).eval()
    caught = []
    model.backbone.blocks[-1].register_forward_hook(lambda module, inputs, output: caught.append(output))
    features = heads.features(model.backbone, images(56), "cls_avg")
    tokens = caught[0]  # [2, 1 + 16, 192]: no norm comes after it
    assert tokens.shape == (2, 17, 192)
    torch.testing.assert_close(features[:, :192], tokens[:, 0])
    torch.testing.assert_close(features[:, 192:], tokens[:, 1:].mean(dim=1))


def test_xavier_head():
    weight = heads.linear_head(1024).weight
    assert weight.std().item() == pytest.approx((2 / (1024 + 384)) ** 0.5, rel=0.01)


def test_batch_statistics_that_are_held_stay_and_are_used(tiny_recipe):
    model = build_model(tiny_recipe(backbone="test_efficientnet", hold_batch_statistics=True))
    loose = build_model(tiny_recipe(backbone="test_efficientnet"))
    loose.load_state_dict(model.state_dict())
    before = {name: value.clone() for name, value in model.backbone.named_buffers()}
    with torch.no_grad():
        expected = model.eval()(images(32))
    for network in (model, loose):
        network.freeze_backbone()
        network.train()
        network.unfreeze()
        network.train()
    torch.testing.assert_close(model(images(32)), expected)
    assert not torch.allclose(loose(images(32)), expected, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.named_buffers())
    model(images(32)).sum().backward()
    assert model.backbone.bn1.weight.grad is not None  # its scale and shift are trained
    with pytest.raises(ValueError, match="hold_batch_statistics=true: ConvNeXt has no BatchNorm; leave it out"):
        build_model(tiny_recipe(hold_batch_statistics=True))


def test_a_wide_head_by_hand(tiny_recipe):
    """Linear, BatchNorm over the batch, ReLU, Linear, unit length, in NumPy."""
    model = build_model(tiny_recipe(head_width=20)).train()
    assert [name for name, _ in model.fc.named_parameters()] == ["0.weight", "1.weight", "1.bias", "3.weight"]
    with torch.no_grad():
        model.fc[1].weight.uniform_(0.5, 2)
        model.fc[1].bias.uniform_(-1, 1)
        features = model.features(images(32, count=6)).numpy()
        output = model(images(32, count=6)).numpy()
    weights = {name: value.numpy() for name, value in model.fc.state_dict().items()}
    assert weights["0.weight"].shape == (20, model.num_features) and weights["3.weight"].shape == (384, 20)
    hidden = features @ weights["0.weight"].T
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5) * weights["1.weight"] + weights["1.bias"]
    expected = np.maximum(hidden, 0) @ weights["3.weight"].T
    np.testing.assert_allclose(output, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("backbone", ["test_convnext", "test_efficientnet"])
def test_pooled_stages_by_timms_own_feature_maps(tiny_recipe, backbone):
    model = build_model(tiny_recipe(backbone=backbone, head="pooled_stages")).eval()
    maps = timm.create_model(backbone, features_only=True).eval()
    maps.load_state_dict(
        {
            name: model.backbone.state_dict()[name.replace("stages_", "stages.").replace("stem_", "stem.")]
            for name in maps.state_dict()
        }
    )
    with torch.no_grad():
        features, stages = model.features(images(64)), maps(images(64))
        expected = [model.backbone(images(64)), *(stage.mean((2, 3)) for stage in stages[-2:])]
    torch.testing.assert_close(features, torch.cat(expected, dim=1))
    assert features.shape[1] == model.num_features


def test_a_head_of_keys_by_hand(tiny_recipe):
    """exp(3 (cosine - 1)) of centred features and keys, in NumPy; the same under autocast."""
    model = build_model(tiny_recipe(head_keys=5, head_init="ridge")).eval()
    own, asked = np.random.default_rng(0).normal(2, 1, (2, 5, model.num_features)).astype(np.float32)
    model.fc.set_keys(torch.from_numpy(own))
    keys, queries = own - own.mean(0), asked - own.mean(0)
    cosines = queries @ keys.T / np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(keys, axis=1))
    expected = np.exp(3 * (cosines - 1))
    likeness = model.fc.likeness(torch.from_numpy(asked))
    np.testing.assert_allclose(likeness.detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(
        model.project(torch.from_numpy(asked)).detach().numpy(),
        expected @ model.last_linear.weight.detach().numpy().T,
        atol=1e-5,
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.fc.likeness(torch.from_numpy(asked)), likeness)
    assert {name for name in model.state_dict() if name.startswith("fc.")} == {
        "fc.centre",
        "fc.keys.weight",
        "fc.values.weight",
    }


LOWEST = {  # by hand: backbone, frozen blocks, the parameters that stay
    ("test_vit", 2): ("cls_token", "pos_embed", "patch_embed.", "norm_pre.", "blocks.0.", "blocks.1."),
    ("test_efficientnet", 1): ("conv_stem.", "bn1.", "blocks.0.0."),
    ("test_convnext", 1): ("stem.", "stages.0.blocks.0."),
}


@pytest.mark.parametrize(("backbone", "blocks"), LOWEST)
def test_frozen_blocks_by_hand(tiny_recipe, backbone, blocks):
    model = build_model(tiny_recipe(backbone=backbone, freeze_blocks=blocks))
    model.freeze_backbone()
    model.unfreeze()
    model.train()
    before = {name: value.clone() for name, value in model.backbone.named_buffers()}
    model(images(32)).sum().backward()
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(LOWEST[backbone, blocks]), name
    for name, value in model.backbone.named_buffers():  # BatchNorm's statistics
        assert torch.equal(value, before[name]) == name.startswith(LOWEST[backbone, blocks]), name
    assert model.fc.weight.grad is not None


def test_more_frozen_blocks_than_there_are_and_blocks_that_nobody_knows_are_refused(tiny_recipe):
    assert not any(p.requires_grad for p in build_model(tiny_recipe(backbone="test_vit", freeze_blocks=6)).lowest)
    with pytest.raises(ValueError, match="freeze_blocks=7: backbone VisionTransformer has 6 blocks; lower it"):
        build_model(tiny_recipe(backbone="test_vit", freeze_blocks=7))
    with pytest.raises(ValueError, match="freeze_blocks=1 needs a backbone of known layers; Conv2d has none"):
        layers.lowest_parameters(torch.nn.Conv2d(3, 4, 1), 1)


def test_a_frozen_backbone_gets_no_gradient_and_stays_in_evaluation_mode(tiny_recipe):
    model = build_model(tiny_recipe(drop_path_rate=0.5))
    model.freeze_backbone()
    model.train()
    assert not model.backbone.training and model.fc.training
    torch.testing.assert_close(model(images(32)), model(images(32)))  # no drop path
    model(images(32)).sum().backward()
    assert model.fc.weight.grad is not None and all(p.grad is None for p in model.backbone.parameters())
    model.unfreeze()
    model.train()
    assert model.backbone.training
    model(images(32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


def test_every_trainable_parameter_gets_a_gradient(tiny_recipe):
    """DDP waits for each of them."""
    model = build_model(tiny_recipe(backbone="eva02_tiny_patch14_224", head="cls_avg", input_size=56))
    model(images(56)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "features"),
    [
        ("convnext_large", 768),
        ("vit_large", 768),
        ("convnext_xxlarge", 1024),
        ("eva02_large_clsavg", 2048),
        ("eva02_large_clsonly", 1024),
    ],
)
def test_the_five_networks_of_the_recipes(model, features):
    """Built without memory ("meta"): names, sizes and shapes are those of the recipes."""
    recipe = recipes.load_recipe(recipes.find_recipe(model, 1))
    with torch.device("meta"):
        network = build_model(recipe, pretrained=False)
        output = network(torch.zeros(1, 3, recipe.input_size, recipe.input_size))
    assert output.shape == (1, 384) and network.fc.in_features == features
    rates = [module.drop_prob for module in network.modules() if type(module).__name__ == "DropPath"]
    assert max(rates, default=0.0) == pytest.approx(recipe.drop_path_rate)
    if recipe.head == "clip_projection":  # CLIP's projection has no bias
        assert network.backbone.get_classifier().bias is None


def test_strided_patches_keep_the_grid(tiny_recipe):
    with torch.device("meta"):
        vit = build_model(recipes.load_recipe(recipes.find_recipe("vit_large", 1)), pretrained=False).backbone
        assert vit.patch_embed(torch.zeros(1, 3, 336, 336)).shape == (1, 256, 1024)
        assert vit.pos_embed.shape == (1, 257, 1024) and vit.patch_embed.proj.stride == (21, 21)
    recipe = recipes.load_recipe(recipes.find_recipe("vit_large", 1), ["patch_mode=interpolated"])
    with torch.device("meta"):
        assert build_model(recipe, pretrained=False).backbone.pos_embed.shape == (1, 577, 1024)  # 24 x 24 + 1
    for size, said in ((225, "no multiple of the 10 x 10 tokens"), (80, "below the ViT's own 160")):
        with pytest.raises(ValueError, match=said):
            stride_patches(timm.create_model("test_vit"), size)
