"""Predictions against the network by hand: any image, batch size, number of devices or ranks, at one size or two."""

import contextlib
import dataclasses
import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from fixtures.datasets import unit_rows
from fixtures.ensembles import by_hand, write_ensemble
from torch.nn.functional import normalize

from kutils.__main__ import run as run_command
from kutils.ensemble import image_cache, predict
from kutils.models import checkpoints, networks
from kutils.training import network_input

CPU = torch.device("cpu")


@pytest.fixture
def model_and_recipe(tiny_recipe):
    torch.manual_seed(1)
    recipe = tiny_recipe(amp_dtype="float32")
    return networks.build_model(recipe).eval(), recipe


def cache(recipe, images, **options):
    return image_cache.PixelCache(images, recipe.input_size, **options)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("num_devices", [1, 3])
def test_every_image_is_predicted_once_and_a_broken_one_is_named(images, model_and_recipe, batch_size, num_devices):
    model, recipe = model_and_recipe
    squares = cache(recipe, images)
    embeddings = predict.predict(model, recipe, squares, [CPU] * num_devices, batch_size=batch_size)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings[:12], by_hand(*model_and_recipe, images[:12]), atol=1e-6)
    assert np.isnan(embeddings[12:]).all()
    assert "m.png cannot be decoded" in squares.bad[12] and "n.jpg is empty" in squares.bad[13]


def test_some_of_the_images_in_an_order_of_their_own(images, model_and_recipe):
    model, recipe = model_and_recipe
    embeddings = predict.predict(model, recipe, cache(recipe, images), [CPU], positions=[13, 4, 0], batch_size=2)
    np.testing.assert_allclose(embeddings[1:], by_hand(model, recipe, [images[4], images[0]]), atol=1e-6)
    assert np.isnan(embeddings[0]).all()
    assert predict.predict(model, recipe, cache(recipe, []), [CPU]).shape == (0, 384)


def test_the_devices_work_at_the_same_time(images, model_and_recipe, monkeypatch):
    model, recipe = model_and_recipe
    both = threading.Barrier(2, timeout=60)  # broken, and an error, unless two are inside at once

    def waiting(self, inputs):
        both.wait()
        return self.model(inputs)

    monkeypatch.setattr(predict.Predictor, "forward", waiting)
    embeddings = predict.predict(model, recipe, cache(recipe, images[:12]), [CPU] * 2, batch_size=3)
    np.testing.assert_allclose(embeddings, by_hand(model, recipe, images[:12]), atol=1e-6)


def test_an_error_on_a_device_is_raised(images, model_and_recipe, monkeypatch):
    model, recipe = model_and_recipe

    def failing(self, inputs):
        raise RuntimeError("an unhappy device")

    monkeypatch.setattr(predict.Predictor, "forward", failing)
    for batch_size in (4, 64):
        with pytest.raises(RuntimeError, match="unhappy"):
            predict.predict(model, recipe, cache(recipe, images), [CPU] * 2, batch_size=batch_size)


# ---------------------------------------------------------------- two resolutions


def at_two_sizes(model, recipe, files, larger):
    """The mean of a network's output at the recipe's size and at a larger one, by hand."""
    total = by_hand(model, recipe, files) + by_hand(model, dataclasses.replace(recipe, input_size=larger), files)
    return total / np.linalg.norm(total, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [(32, [32, 64]), (320, [320, 384]), (384, [384, 448]), (448, [448, 512])],  # 1.15 times, in steps of 32
)
def test_the_second_size_is_larger_and_a_multiple_of_the_network_s_steps(tiny_recipe, size, sizes):
    recipe = tiny_recipe(input_size=size)
    assert predict.input_sizes(networks.build_model(recipe), recipe, "two_resolutions") == sizes
    assert predict.input_sizes(networks.build_model(recipe), recipe, "none") == [size]


def test_predictions_at_two_sizes_are_averaged(images, model_and_recipe):
    model, recipe = model_and_recipe
    caches = [image_cache.PixelCache(images, size) for size in (32, 64)]
    embeddings = predict.predict_at_sizes(model, recipe, caches, [CPU], batch_size=5)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings[:12], at_two_sizes(model, recipe, images[:12], 64), atol=1e-6)
    assert np.isnan(embeddings[12:]).all()
    assert np.abs(embeddings[:12] - by_hand(model, recipe, images[:12])).max() > 1e-3
    one = predict.predict_at_sizes(model, recipe, caches[:1], [CPU])
    np.testing.assert_array_equal(one, predict.predict(model, recipe, caches[0], [CPU]))


def test_a_vit_that_resamples_its_positions_takes_two_sizes(images, tiny_recipe):
    recipe = tiny_recipe(backbone="test_vit", amp_dtype="float32")  # timm makes this one with dynamic_img_size
    model = networks.build_model(recipe).eval()
    sizes = predict.input_sizes(model, recipe, "two_resolutions")
    assert sizes == [32, 48]  # in steps of its patches of 16 px
    caches = [image_cache.PixelCache(images[:4], size) for size in sizes]
    expected = at_two_sizes(model, recipe, images[:4], 48)
    np.testing.assert_allclose(predict.predict_at_sizes(model, recipe, caches, [CPU]), expected, atol=1e-6)


def test_a_network_of_one_size_says_so(tiny_recipe):
    recipe = tiny_recipe(backbone="vit_tiny_patch16_224")
    model = networks.build_model(recipe)
    with pytest.raises(
        ValueError, match=r"vit_tiny_patch16_224 takes images of one size, 32 px: predict with tta none"
    ):
        predict.input_sizes(model, recipe, "two_resolutions")
    assert predict.sizes_of_member(model, recipe, "two_resolutions") == [32]
    for sizes in (predict.input_sizes, predict.sizes_of_member):
        assert sizes(model, recipe, "none") == [32]
    with pytest.raises(ValueError, match="tta is 'flip'; it can be none, two_resolutions"):
        predict.input_sizes(model, recipe, "flip")


# ---------------------------------------------------------------- memory, precision, time


class SmallMemory(torch.nn.Module):
    """A network that runs out of memory above a batch size, and returns each image's mean and number of pixels."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error, self.sizes = most, error, []

    def forward(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) > self.most:
            raise self.error
        return pixels.mean(dim=(2, 3))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_the_batch_is_halved_until_it_fits_and_stays_so(capsys, tiny_recipe, error):
    model, squares = SmallMemory(3, error), torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    predictor = predict.Predictor(model, tiny_recipe(amp_dtype="float32"), CPU, 64)  # 64 is more than there are
    expected = normalize(network_input.normalize(squares, (0.5,) * 3, (0.5,) * 3).mean(dim=(2, 3)), dim=1)
    np.testing.assert_allclose(predictor(squares), expected, atol=1e-6)
    assert model.sizes == [8, 4, 2, 2, 2, 2]
    np.testing.assert_allclose(predictor(squares[:3]), expected[:3], atol=1e-6)
    assert model.sizes[6:] == [2, 1]
    assert "going on with 2 images" in capsys.readouterr().out
    with pytest.raises(RuntimeError):
        predict.Predictor(SmallMemory(0, error), tiny_recipe(), CPU, 4)(squares)


def test_another_error_is_no_reason_to_halve(tiny_recipe):
    model = SmallMemory(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        predict.Predictor(model, tiny_recipe(), CPU, 4)(torch.zeros(4, 3, 4, 4, dtype=torch.uint8))
    assert model.sizes == [4]


def test_what_overflows_in_half_precision_is_predicted_in_full_alone(images, model_and_recipe, tiny_recipe):
    model, _ = model_and_recipe
    recipe = tiny_recipe(amp_dtype="bfloat16")
    forward, seen = model.forward, []

    def overflowing(inputs):
        seen.append((torch.is_autocast_enabled("cpu"), len(inputs)))
        rows = forward(inputs)
        if seen[-1][0]:
            rows[1] = torch.inf
        return rows

    model.forward = overflowing
    embeddings = predict.predict(model, recipe, cache(recipe, images[:5]), [CPU])
    assert seen == [(True, 5), (False, 1)]
    model.forward = forward
    expected = by_hand(model, recipe, images[:5])
    np.testing.assert_allclose(embeddings[1], expected[1], atol=1e-6)
    assert np.einsum("nd,nd->n", embeddings, expected).min() > 0.999


def test_a_model_without_finite_predictions_is_an_error(images, model_and_recipe):
    model, recipe = model_and_recipe
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"12 images have no finite prediction, .*a.JPG is the first"):
        predict.predict(model, recipe, cache(recipe, images), [CPU], batch_size=5)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_failed_model_leaves_the_memory_at_once(images, tiny_recipe, monkeypatch, batch_size):
    recipe = tiny_recipe(amp_dtype="float32")
    model = networks.build_model(recipe).eval()
    weights = weakref.ref(model.fc.weight)

    def failing(self, inputs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(predict.Predictor, "forward", failing)
    gc.disable()  # nothing but the counts of references
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            predict.predict(model, recipe, cache(recipe, images), [CPU], batch_size=batch_size)
        del model
        assert weights() is None
    finally:
        gc.enable()


def test_after_the_deadline_it_stops(images, model_and_recipe):
    past = time.monotonic() - 1
    model, recipe = model_and_recipe
    with pytest.raises(predict.OutOfTime, match="of 14 images were done"):
        predict.predict(model, recipe, cache(recipe, images), [CPU], batch_size=5, deadline=past)


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path, images, model_and_recipe):
    """Arguments of a run on the readable images, and its output."""
    model, recipe = model_and_recipe
    for path in images[12:]:
        path.unlink()
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    checkpoints.save_checkpoint(tmp_path / "model.pth", model, recipe, fold=0)
    output = tmp_path / "preds.npz"
    arguments = ["--config", tmp_path / "r.yaml", "--checkpoint", tmp_path / "model.pth"]
    return [str(value) for value in [*arguments, "--images", tmp_path / "images", "--output", output]], output


def test_the_command_writes_names_and_embeddings_and_overwrites_nothing(command, images, model_and_recipe, capsys):
    arguments, output = command
    assert run_command("predict", arguments) == 0
    with np.load(output, allow_pickle=False) as saved:
        assert saved["ids"].tolist() == [*"abcdefghij", "k.dotted.name", "l"]
        assert saved["embeddings"].dtype == np.float32
        np.testing.assert_allclose(saved["embeddings"], by_hand(*model_and_recipe, images[:12]), atol=1e-6)
    before = output.read_bytes()
    assert run_command("predict", arguments) == 1
    assert "exists; remove it" in capsys.readouterr().err and output.read_bytes() == before


def test_an_unreadable_image_is_an_error_or_gets_the_fallback(command, tmp_path, capsys):
    arguments, output = command
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    assert run_command("predict", arguments) == 1
    said = capsys.readouterr().err
    assert "1 of 13 images cannot be read" in said and "bad.png is no image" in said and not output.exists()
    mean = unit_rows(1, seed=8)[0]
    path = write_ensemble(tmp_path, {}, {}, mean)
    assert run_command("predict", [*arguments, "--fallback", str(path)]) == 0
    saved = np.load(output)
    np.testing.assert_array_equal(saved["embeddings"][saved["ids"].tolist().index("bad")], mean)
    assert "warning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["lr_=3"], "no key 'lr_'; did you mean 'lr'?"),
        (["--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--config", "nowhere.yaml"], "no recipe file nowhere.yaml"),
        (["--images", "nowhere"], "no folder of images at nowhere"),
        (["--output", "preds.csv"], "it is an .npz file"),
        (["backbone=test_vit"], "is of another network"),
    ],
)
def test_bad_arguments_say_what_is_wrong(command, capsys, extra, said):
    arguments, output = command
    assert run_command("predict", [*arguments, *extra]) == 1
    assert said in capsys.readouterr().err and not output.exists()


def test_an_empty_folder_is_an_error_of_the_command(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run_command("predict", [*command[0], "--images", str(tmp_path / "empty")]) == 1
    assert "holds no image" in capsys.readouterr().err


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        predict.main(["--help"])
    shown = capsys.readouterr().out
    assert "--fallback" in shown and "num_workers" in shown and "input_size" in shown


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(command, images, model_and_recipe, start_ranks):
    arguments, output = command
    start_ranks("kutils", "predict", *arguments, "--batch-size", "4", num_ranks=2).run()
    np.testing.assert_allclose(np.load(output)["embeddings"], by_hand(*model_and_recipe, images[:12]), atol=1e-6)


def test_the_command_averages_two_resolutions(command, images, model_and_recipe):
    arguments, output = command
    assert run_command("predict", [*arguments, "--tta", "two_resolutions"]) == 0
    np.testing.assert_allclose(
        np.load(output)["embeddings"], at_two_sizes(*model_and_recipe, images[:12], 64), atol=1e-6
    )


# ---------------------------------------------------------------- on GPUs


@pytest.fixture
def gpus():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return predict.local_devices(torch.device("cuda"), world_size=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gpus_predict_what_the_cpu_predicts(gpus, images, tiny_recipe, dtype):
    recipe = tiny_recipe(amp_dtype=dtype, num_workers=2, backbone="test_vit")
    model = networks.build_model(recipe).eval()
    expected = by_hand(model, recipe, images[:12])
    for device_list in (gpus, [gpus[0]] * 2):  # the second: two models on one GPU
        for batch_size in (3, 64):  # with 3, processes decode, forked after CUDA has started
            predicted = predict.predict(model, recipe, cache(recipe, images), device_list, batch_size=batch_size)
            assert np.einsum("nd,nd->n", predicted[:12], expected).min() > 0.9999
    model.cpu()


@pytest.mark.gpu
def test_a_full_gpu_halves_the_batch(gpus, images, tiny_recipe, capsys):
    recipe = tiny_recipe(amp_dtype="float32", input_size=512, backbone="test_convnext")
    model = networks.build_model(recipe).eval()
    expected = by_hand(model, recipe, images[:12])
    squares = cache(recipe, images * 20)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(gpus[0]).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6e9 / total, gpus[0])
    try:
        predicted = predict.predict(model, recipe, squares, gpus[:1], batch_size=256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpus[0])
    np.testing.assert_allclose(predicted[:12], expected, atol=1e-3)
    assert "the memory is full" in capsys.readouterr().out
