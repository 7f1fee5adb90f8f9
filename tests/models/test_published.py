"""The published checkpoint layout, against open_clip's own networks."""

import open_clip
import pytest
import torch
from fixtures.published_networks import PublishedNetwork, published_network, visual_tower

from kutils.models import checkpoints, published
from kutils.models.networks import build_model
from kutils.runs import recipes

MODELS = ["convnext_large", "convnext_xxlarge", "vit_large", "eva02_large_clsavg", "eva02_large_clsonly"]


@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_of_the_five_networks(model):
    """Built without memory ("meta"): what is written is, name by name, what the published code would load strictly."""
    with torch.device("meta"):
        reference = published_network(model)
        network = build_model(recipes.load_recipe(recipes.find_recipe(model, 1)), pretrained=False)
    names = published.published_names(network)
    shapes = {
        names[name]: published.to_published_shape(names[name], v).shape for name, v in network.state_dict().items()
    }
    assert shapes == {name: value.shape for name, value in reference.state_dict().items()}
    assert published.differences(network, reference.state_dict()) == []


SMALL_VIT = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"
SMALL_TOWER = {"layers": 10, "width": 256, "patch_size": 16}  # the same network for open_clip
SMALL = {  # the same kinds of network, small enough for every test run: timm's name; open_clip's, changed; features
    "vit": (SMALL_VIT, "ViT-B-32", SMALL_TOWER, 512),
    "convnext": ("convnext_base.clip_laion2b", "convnext_base_w", {}, 640),
}


@pytest.fixture(params=SMALL)
def pair(request, tiny_recipe, tmp_path):
    """An open_clip network saved as the published code would, the file, and a recipe for it."""
    backbone, name, changes, features = SMALL[request.param]
    torch.manual_seed(0)
    reference = PublishedNetwork(visual_tower(name, **changes), features).eval()
    with torch.no_grad():  # zeros and ones would not show a mix-up
        for parameter in reference.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"model": reference.state_dict()}, tmp_path / "published.pth")
    recipe = tiny_recipe(backbone=backbone, head="clip_projection", input_size=224, patch_mode="strided")
    if request.param == "convnext":
        recipe = tiny_recipe(backbone=backbone, head="clip_projection", input_size=64)
    return reference, tmp_path / "published.pth", recipe


def test_a_published_checkpoint_gives_the_published_embeddings_and_goes_back(pair, tmp_path):
    reference, path, recipe = pair
    model, _, facts = checkpoints.load_model(path, recipe)
    assert facts == {}
    images = torch.randn(3, 3, recipe.input_size, recipe.input_size)
    with torch.no_grad():
        ours, theirs = model(images), reference(images)
    assert ((ours * theirs).sum(dim=1) > 0.99999).all()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    checkpoints.save_checkpoint(tmp_path / "ours.pth", model, recipe, fold=0)
    written = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    original = reference.state_dict()
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)
    reference.load_state_dict(written, strict=True)


def test_a_checkpoint_of_another_network_is_named_in_the_words_of_the_file(pair, tiny_recipe):
    _, path, recipe = pair
    with pytest.raises(ValueError, match="of another network: it lacks") as caught:
        checkpoints.load_model(path, tiny_recipe())
    assert str(path) in str(caught.value)
    content = torch.load(path, weights_only=True)
    first = next(iter(content["model"]))
    content["model"][first] = torch.zeros(5)
    content["model"]["backbone.surplus"] = torch.zeros(1)
    del content["model"]["fc.weight"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"lacks fc.weight; has backbone.surplus too; .* is \[5\], not \["):
        checkpoints.load_model(path, recipe)


@pytest.mark.slow
def test_an_open_clip_file_serves_as_pretrained_weights(tiny_recipe, tmp_path):
    """The file of the whole open_clip model, text tower included, through `pretrained=PATH`."""
    torch.manual_seed(0)
    text = {"layers": 1, "width": 64, "heads": 2, "vocab_size": 100}
    clip = open_clip.CLIP(512, SMALL_TOWER, text).eval()
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    recipe = tiny_recipe(
        backbone=SMALL_VIT,
        head="clip_projection",
        input_size=224,
        pretrained=str(tmp_path / "open_clip_pytorch_model.bin"),
    )
    model = build_model(recipe).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(images), clip.visual(images), atol=1e-4, rtol=1e-4)
    # at another resolution its position embeddings are resampled: 14 x 14 tokens become 20 x 20
    larger = build_model(tiny_recipe(**{**vars(recipe), "input_size": 320})).eval()
    assert larger.backbone.pos_embed.shape == (1, 401, 256) and larger(torch.randn(1, 3, 320, 320)).shape == (1, 384)
    assert torch.equal(larger.backbone.blocks[0].norm1.weight, model.backbone.blocks[0].norm1.weight)
