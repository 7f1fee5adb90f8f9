"""The pipeline: what is loaded, whether an image depends on its seed alone, and what happens to bad images."""

import math
import shutil
import sys

import diffusers
import numpy as np
import pytest
import torch
from fixtures import tiny_diffusion

from kutils.generation import diffusion
from kutils.generation.diffusion import Sampler
from kutils.generation.image_sets import image_seed
from kutils.generation.settings import DiffusionSettings

CPU = torch.device("cpu")
PROMPTS = ['a "red" cat', "two dogs", "a cat, in the rain", "x", "an owl"]
FAST = {"size": 64, "save_size": 32, "steps": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_diffusion.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make_sampler(folder):
    def make(model=folder, **changes) -> Sampler:
        settings = DiffusionSettings(**(FAST | {"model": str(model)} | changes))
        return Sampler(diffusion.load_pipeline(settings, CPU), settings)

    return make


def levels_apart(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(int) - second).max())


def test_images_repeat_and_do_not_depend_on_their_batch(make_sampler):
    sampler = make_sampler()
    numbers = [0, 0, 1, 2, 0]
    first, again = sampler(PROMPTS, numbers), sampler(PROMPTS, numbers)
    sampler.batch_size = 1
    alone = sampler(PROMPTS[::-1], numbers[::-1])[::-1]
    for image, same, single in zip(first, again, alone, strict=True):
        assert not image.outcome and image.pixels.shape == (64, 64, 3) and image.pixels.dtype == np.uint8
        assert np.array_equal(image.pixels, same.pixels)
        # the noise is the same to the last bit; matrix products of another shape round otherwise: 1 of 255 was seen
        assert levels_apart(image.pixels, single.pixels) <= 2
    other = sampler(PROMPTS[:1], [1])[0]
    assert np.abs(first[0].pixels.astype(int) - other.pixels).mean() > 20


def test_noise_is_one_generators_draw_per_image(make_sampler):
    sampler = make_sampler()
    noise = sampler.noise([5, 2**62, 5])
    for row, seed in zip(noise, (5, 2**62, 5), strict=True):
        assert torch.equal(row, torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)))
    half = make_sampler(dtype="float16").noise([5])
    assert half.dtype == torch.float16 and torch.equal(half, noise[:1].half())


def test_images_are_those_of_the_plain_library(folder, make_sampler):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert isinstance(pipeline.scheduler, diffusers.DDIMScheduler)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++"
    )
    generators = [torch.Generator().manual_seed(image_seed(prompt, 0)) for prompt in PROMPTS[:2]]
    expected = pipeline(
        PROMPTS[:2], generator=generators, num_inference_steps=4, guidance_scale=3.0, height=64, width=64
    ).images
    found = make_sampler(steps=4, guidance=3.0)(PROMPTS[:2], [0, 0])
    for image, sample in zip(expected, found, strict=True):
        assert levels_apart(np.asarray(image), sample.pixels) <= 1
    without = make_sampler(steps=4, guidance=1.0)(PROMPTS[:2], [0, 0])
    assert levels_apart(without[0].pixels, found[0].pixels) > 2


def test_slicing_and_upcasting_change_rounding_alone(make_sampler):
    plain = make_sampler()(PROMPTS, [0] * 5)
    for changes in ({"attention_slicing": True}, {"upcast_attention": True}):
        changed = make_sampler(**changes)
        for image, same in zip(changed(PROMPTS, [0] * 5), plain, strict=True):
            assert levels_apart(image.pixels, same.pixels) <= 2
    attention = changed.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    seen = []
    softmax = torch.Tensor.softmax
    torch.Tensor.softmax = lambda scores, dim: seen.append(scores.dtype) or softmax(scores, dim)
    try:
        attention.to(torch.bfloat16)(torch.randn(1, 4, 32, dtype=torch.bfloat16))
    finally:
        torch.Tensor.softmax = softmax
    assert seen == [torch.float32]


def test_weights_are_known_by_what_they_are(folder, make_sampler, tmp_path):
    digest = diffusion.weights_sha256(make_sampler().pipeline)
    copied = shutil.copytree(folder, tmp_path / "under_another_name")
    assert diffusion.weights_sha256(make_sampler(copied).pipeline) == digest
    other = tiny_diffusion.save(tmp_path / "other", seed=1)
    assert diffusion.weights_sha256(make_sampler(other).pipeline) != digest

    def predict_velocity(pipeline):
        pipeline.scheduler.register_to_config(prediction_type="v_prediction")

    velocity = make_sampler(tiny_diffusion.save(tmp_path / "velocity", predict_velocity))
    assert velocity.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert diffusion.weights_sha256(velocity.pipeline) != digest

    pipeline = make_sampler().pipeline
    tensors = {f"text_model.{key}": value for key, value in pipeline.text_encoder.state_dict().items()}
    pipeline.text_encoder.state_dict = lambda: tensors  # as other versions of transformers name them
    assert diffusion.weights_sha256(pipeline) == digest
    pipeline.scheduler.register_to_config(timestep_spacing="trailing")
    assert diffusion.weights_sha256(pipeline) != digest
    pipeline = make_sampler().pipeline
    pipeline.tokenizer.add_tokens(["castle"])
    assert diffusion.weights_sha256(pipeline) != digest


def test_a_prompt_that_is_too_long_is_cut_without_a_word(make_sampler, capfd, caplog):
    make_sampler()(["a very long prompt about a cat in the rain"], [0])
    assert "".join(capfd.readouterr()) == "" and not caplog.records


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 100}, "--size 100: give a multiple of 8"),
        ({"size": 8, "save_size": 8}, "--size 8"),
        ({"save_size": 65}, "--save-size 65: give 1 to 64"),
        ({"quality": 0}, "--quality 0"),
        ({"steps": 0}, "--steps 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"guidance": math.nan}, "--guidance nan"),
    ],
)
def test_a_wrong_setting_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        DiffusionSettings(**(FAST | changes))


def test_what_is_no_pipeline_is_named(folder, make_sampler, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no pipeline: it holds no model_index.json"):
        make_sampler(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"--model nobody/nothing: it is no folder here, and the hub"):
        make_sampler("nobody/nothing")
    with pytest.raises(ValueError, match=r"--revision main is of a model on the hub"):
        make_sampler(revision="main")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"damaged cannot be loaded; is it whole"):
        make_sampler(damaged)
    with pytest.raises(ValueError, match=r"--variant fp16"):
        make_sampler(variant="fp16")
    unet = diffusers.UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(ValueError, match="is a DDPMPipeline; give a StableDiffusionPipeline"):
        make_sampler(tmp_path / "ddpm")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[generate\]'"):
        make_sampler()


# ---------------------------------------------------------------- bad images, full memory


def test_what_is_wrong_with_an_image():
    flat = torch.tensor([1.0, 0.2, 0.0])[:, None, None].expand(3, 64, 64)  # its colours differ, its pixels do not
    assert diffusion.describe_problem(flat) == "blank (standard deviation 0.0 of 255)"
    assert diffusion.describe_problem(torch.zeros(3, 64, 64)) == "black (standard deviation 0.0 of 255)"
    assert diffusion.describe_problem(torch.full((3, 64, 64), torch.inf)) == "not finite"
    ramp = torch.linspace(0, 1, 256).expand(3, 256, 256)  # range / sqrt(12) is its standard deviation
    assert diffusion.describe_problem(0.5 + ramp * 6.8 / 255).startswith("blank (standard deviation 2.0")
    assert diffusion.describe_problem(0.5 + ramp * 7.0 / 255) == ""
    spotted = flat.clone()
    spotted[0, 0, 0] = torch.nan
    assert diffusion.describe_problem(spotted) == "not finite"


@pytest.mark.parametrize(
    ("breaks", "dtype", "reason"),
    [
        (tiny_diffusion.blacken, "float32", "black (standard deviation 0.0 of 255); another seed: black"),
        (tiny_diffusion.spoil, "bfloat16", "not finite; float32: not finite; another seed: not finite"),
    ],
    ids=["black", "nan"],
)
def test_an_image_that_never_turns_out_is_given_up(make_sampler, tmp_path, breaks, dtype, reason):
    sampler = make_sampler(tiny_diffusion.save(tmp_path / "broken", breaks), dtype=dtype)
    used = []
    sample = sampler.sample
    sampler.sample = lambda prompts, seeds: used.append((sampler.pipeline.unet.dtype, *seeds)) or sample(prompts, seeds)
    (image,) = sampler(["a cat"], [2])
    assert image.pixels is None and image.outcome == "failed" and image.reason.startswith(reason)
    first, second = image_seed("a cat", 2), image_seed("a cat", 2, attempt=1)
    assert first != second
    if dtype == "float32":
        assert used == [(torch.float32, first), (torch.float32, second)]
    else:
        assert used == [(torch.bfloat16, first), (torch.float32, first), (torch.bfloat16, second)]


def test_what_overflows_in_half_precision_is_made_in_float32(make_sampler, tmp_path):
    def overflow(pipeline):  # activations of 1e5 and more; what follows normalises them
        pipeline.vae.decoder.conv_in.weight *= 3e5

    model = tiny_diffusion.save(tmp_path / "loud", overflow)
    sampler = make_sampler(model, dtype="float16")
    before = {key: value.clone() for key, value in sampler.pipeline.vae.state_dict().items()}
    images = sampler(PROMPTS[:2], [0, 0])
    assert [(image.outcome, image.reason) for image in images] == [("float32", "not finite")] * 2
    assert sampler.pipeline.unet.dtype == torch.float16
    assert all(torch.equal(value, before[key]) for key, value in sampler.pipeline.vae.state_dict().items())
    whole = make_sampler(model)(PROMPTS[:2], [0, 0])
    for image, expected in zip(images, whole, strict=True):  # the weights are rounded, no more
        assert not expected.outcome and np.abs(image.pixels.astype(int) - expected.pixels).mean() < 3


def test_another_seed_is_the_last_attempt(make_sampler):
    sampler = make_sampler()
    unlucky = image_seed("two dogs", 0)
    sample = sampler.sample

    def stand_in(prompts, seeds):
        made = sample(prompts, seeds)
        return [(image, "black" if seed == unlucky else "") for (image, _), seed in zip(made, seeds, strict=True)]

    sampler.sample = stand_in
    images = sampler(PROMPTS, [0] * 5)
    assert [image.outcome for image in images] == ["", "another seed", "", "", ""]
    assert images[1].reason == "black"
    ((expected, _),) = sample(["two dogs"], [image_seed("two dogs", 0, attempt=1)])
    assert levels_apart(images[1].pixels, expected) <= 2


def test_a_full_memory_halves_the_batch(make_sampler, capsys):
    sampler = make_sampler(batch_size=8)
    sizes = []
    sample = sampler.sample

    def stand_in(prompts, seeds):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(prompts, seeds)

    sampler.sample = stand_in
    images = sampler(PROMPTS, [0] * 5)
    assert sizes == [5, 3, 2, 2, 1] and sampler.batch_size == 2
    assert capsys.readouterr().out.count("the memory is full, going on with") == 2
    for image, expected in zip(images, make_sampler()(PROMPTS, [0] * 5), strict=True):
        assert levels_apart(image.pixels, expected.pixels) <= 2

    def always_full(prompts, seeds):
        raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED")

    sampler.sample = always_full
    with pytest.raises(ValueError, match="one image of 64 px does not fit into the memory: --attention-slicing"):
        sampler(PROMPTS, [0] * 5)

    def broken(prompts, seeds):
        raise RuntimeError("shapes differ")

    sampler.sample = broken
    with pytest.raises(RuntimeError, match="shapes differ"):
        sampler(PROMPTS, [0] * 5)


def test_a_retry_that_does_not_fit_leaves_another_seed(make_sampler):
    sampler = make_sampler(dtype="bfloat16")
    sample = sampler.sample

    def stand_in(prompts, seeds):
        if sampler.pipeline.unet.dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [
            (image, "black" * (seed != lucky)) for (image, _), seed in zip(sample(prompts, seeds), seeds, strict=True)
        ]

    sampler.sample, lucky = stand_in, None
    (image,) = sampler(["x"], [0])
    assert image.outcome == "failed"
    assert image.reason == "black; float32: does not fit into the memory; another seed: black"
    lucky = image_seed("x", 0, attempt=1)
    (image,) = sampler(["x"], [0])
    assert image.outcome == "another seed" and image.reason == "black; float32: does not fit into the memory"
    assert sampler.pipeline.unet.dtype == torch.bfloat16


@pytest.mark.gpu
def test_half_precision_on_a_gpu(folder, make_sampler):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    settings = DiffusionSettings(**(FAST | {"model": str(folder), "device": "cuda"}))
    sampler = Sampler(diffusion.load_pipeline(settings, torch.device("cuda", 0)), settings)
    assert sampler.dtype == torch.float16
    on_gpu, on_cpu = sampler(PROMPTS, [0] * 5), make_sampler()(PROMPTS, [0] * 5)
    sampler.batch_size = 1
    for image, expected, alone in zip(on_gpu, on_cpu, sampler(PROMPTS, [0] * 5), strict=True):
        assert not image.outcome and np.abs(image.pixels.astype(int) - expected.pixels).mean() < 4
        assert np.abs(image.pixels.astype(int) - alone.pixels).mean() < 4
