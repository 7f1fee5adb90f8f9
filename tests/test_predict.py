"""Predictions against the network by hand: any image, any batch size, any number of ranks; and a whole ensemble."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import unit_rows
from PIL import Image

from kutils import blending, checkpoints, devices, ensemble, models, predict, transforms

ALONE = devices.Ranks(0, 1, torch.device("cpu"))


def save_images(folder):
    """Twelve readable files of many kinds, a truncated one, an empty one, and files that are no images."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    pixels = [random.integers(0, 256, (40 + number, 50, 3)).astype(np.uint8) for number in range(12)]
    pictures = [Image.fromarray(values) for values in pixels]
    pictures[0].save(folder / "b.png")
    pictures[1].save(folder / "a.JPG", quality=90)
    pictures[2].convert("CMYK").save(folder / "c.jpeg")
    pictures[3].save(folder / "d.webp")
    pictures[4].quantize(8).save(folder / "e.gif")
    pictures[5].save(folder / "f.gif", save_all=True, append_images=[pictures[5].rotate(90)])
    pictures[6].convert("RGBA").save(folder / "g.png")
    Image.fromarray(random.integers(0, 65536, (30, 30)).astype(np.uint16)).save(folder / "h.png")
    pictures[8].convert("L").save(folder / "i.tiff")
    pictures[9].save(folder / "j.bmp")
    pictures[10].save(folder / "k.dotted.name.png")
    pictures[11].save(folder / "l.webp", save_all=True, append_images=[pictures[11].rotate(180)])
    (folder / "m.png").write_bytes((folder / "b.png").read_bytes()[:200])
    (folder / "n.jpg").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / "below").mkdir()
    pictures[0].save(folder / "below" / "z.png")


@pytest.fixture
def images(tmp_path):
    save_images(tmp_path / "images")
    return predict.find_images(tmp_path / "images")


@pytest.fixture
def model_and_recipe(tiny_recipe):
    torch.manual_seed(1)
    recipe = tiny_recipe(amp_dtype="float32")
    return models.build_model(recipe).eval(), recipe


def by_hand(model, recipe, files):
    pixels = [transforms.resize_square(transforms.decode_rgb(path), recipe.input_size) for path in files]
    with torch.no_grad():
        return model(transforms.normalize(torch.stack(pixels), recipe.mean, recipe.std)).numpy()


def test_images_are_found_whatever_their_extension(images):
    assert [path.name for path in images] == [
        "a.JPG", "b.png", "c.jpeg", "d.webp", "e.gif", "f.gif", "g.png", "h.png", "i.tiff", "j.bmp",
        "k.dotted.name.png", "l.webp", "m.png", "n.jpg",
    ]  # fmt: skip


def test_two_files_of_one_name_are_refused(tmp_path, images):
    (tmp_path / "images" / "c.png").write_bytes(b"")
    with pytest.raises(predict.PredictionError, match=r"c\.jpeg and c\.png have the same id 'c'"):
        predict.find_images(tmp_path / "images")
    with pytest.raises(predict.PredictionError, match="no folder of images"):
        predict.find_images(tmp_path / "nowhere")


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_image_is_predicted_once_and_a_broken_one_is_named(images, model_and_recipe, batch_size):
    embeddings, unreadable = predict.predict(*model_and_recipe, images, ALONE, batch_size=batch_size)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings[:12], by_hand(*model_and_recipe, images[:12]), atol=1e-6)
    assert np.isnan(embeddings[12:]).all()
    assert [path.name for path in unreadable] == ["m.png", "n.jpg"]
    assert "m.png cannot be decoded" in unreadable[images[12]] and "n.jpg is empty" in unreadable[images[13]]


def test_loader_processes_and_no_images(images, model_and_recipe, tiny_recipe):
    model, _ = model_and_recipe
    recipe = tiny_recipe(amp_dtype="float32", num_workers=2)
    embeddings, _ = predict.predict(model, recipe, images[:12], ALONE, batch_size=5)
    np.testing.assert_allclose(embeddings, by_hand(model, recipe, images[:12]), atol=1e-6)
    embeddings, unreadable = predict.predict(model, recipe, [], ALONE)
    assert embeddings.shape == (0, 384) and unreadable == {}


class SmallMemory(torch.nn.Module):
    """A network that runs out of memory above a batch size, and returns each image's mean and number of pixels."""

    def __init__(self, most):
        super().__init__()
        self.most, self.sizes = most, []

    def forward(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pixels.mean(dim=(2, 3))


def test_the_batch_is_halved_until_it_fits_and_stays_so(capsys):
    model = SmallMemory(most=3)
    forward, pixels = predict.HalvingForward(model, 8), torch.rand(8, 3, 4, 4)
    torch.testing.assert_close(forward(pixels), pixels.mean(dim=(2, 3)))
    assert model.sizes == [8, 4, 2, 2, 2, 2]
    torch.testing.assert_close(forward(pixels[:3]), pixels[:3].mean(dim=(2, 3)))
    assert model.sizes[6:] == [2, 1]
    assert "going on with 2 images" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        predict.HalvingForward(SmallMemory(most=0), 4)(pixels)


def test_what_overflows_in_half_precision_is_predicted_in_full(images, model_and_recipe, tiny_recipe):
    model, _ = model_and_recipe
    recipe = tiny_recipe(amp_dtype="bfloat16")
    forward, overflows = model.forward, []

    def overflowing(pixels):
        overflows.append(torch.is_autocast_enabled("cpu"))
        return forward(pixels) * (torch.nan if overflows[-1] else 1)

    model.forward = overflowing
    embeddings, _ = predict.predict(model, recipe, images[:5], ALONE)
    assert overflows == [True, False]
    model.forward = forward
    np.testing.assert_allclose(embeddings, by_hand(model, recipe, images[:5]), atol=1e-6)


def test_after_the_deadline_it_stops_unless_it_is_done(images, model_and_recipe):
    past = time.monotonic() - 1
    with pytest.raises(predict.OutOfTime, match="5 of 14 images were done"):
        predict.predict(*model_and_recipe, images, ALONE, batch_size=5, deadline=past)
    embeddings, _ = predict.predict(*model_and_recipe, images, ALONE, batch_size=14, deadline=past)
    assert np.isfinite(embeddings[:12]).all()


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
    assert predict.main(arguments) == 0
    with np.load(output, allow_pickle=False) as saved:
        assert saved["ids"].tolist() == [*"abcdefghij", "k.dotted.name", "l"]
        assert saved["embeddings"].dtype == np.float32
        np.testing.assert_allclose(saved["embeddings"], by_hand(*model_and_recipe, images[:12]), atol=1e-6)
    before = output.read_bytes()
    assert predict.main(arguments) == 1
    assert "exists; remove it" in capsys.readouterr().err and output.read_bytes() == before


def test_an_unreadable_image_is_an_error_or_gets_the_fallback(command, tmp_path, capsys):
    arguments, output = command
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    assert predict.main(arguments) == 1
    said = capsys.readouterr().err
    assert "1 of 13 images cannot be read" in said and "bad.png is no image" in said and not output.exists()
    mean = unit_rows(1, seed=8)[0]
    path = write_ensemble(tmp_path, {}, {}, mean)
    assert predict.main([*arguments, "--fallback", str(path)]) == 0
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
    assert predict.main([*arguments, *extra]) == 1
    assert said in capsys.readouterr().err and not output.exists()


def test_an_empty_folder_is_an_error_of_the_command(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert predict.main([*command[0], "--images", str(tmp_path / "empty")]) == 1
    assert "holds no image" in capsys.readouterr().err


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        predict.main(["--help"])
    shown = capsys.readouterr().out
    assert "--fallback" in shown and "num_workers" in shown and "input_size" in shown


def test_two_ranks_write_what_one_writes(command, images, model_and_recipe):
    arguments, output = command
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "kutils.predict", *arguments, "--batch-size", "4"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(np.load(output)["embeddings"], by_hand(*model_and_recipe, images[:12]), atol=1e-6)


# ---------------------------------------------------------------- an ensemble


def write_ensemble(folder, families, weights, mean, scores=None, rows=None):
    """The file of an ensemble that was never fitted."""
    fitted = ensemble.Ensemble(
        method="family",
        families=families,
        weights=weights,
        mean_embedding=[float(value) for value in mean],
        scores=scores or {},
        leave_one_out={},
        error_correlations={},
        rows=rows or {},
        folds_hash="{}",
        targets_hash="",
    )
    (folder / "weights.json").write_text(json.dumps({"kind": ensemble.KIND, **asdict(fitted)}))
    return folder / "weights.json"


@pytest.fixture
def members(tmp_path, tiny_recipe):
    """Two families, a of two members and b of one, and c without weight: the fitted ensemble, files and models."""
    families, files, built = {}, {}, {}
    for seed, (family, fold) in enumerate([("a", 0), ("a", 1), ("b", 0), ("c", 0)]):
        torch.manual_seed(seed)
        recipe = tiny_recipe(prefix=family, input_size=32 if family == "a" else 48, amp_dtype="float32", device="cuda")
        member = ensemble.Member(f"{family}.yaml", fold, f"{family}_{fold}.pth", str(seed))
        built[member.name] = (models.build_model(recipe).eval(), recipe)
        files[member] = tmp_path / f"{family}_{fold}.pth"
        checkpoints.save_checkpoint(files[member], *built[member.name], fold=fold)
        families.setdefault(family, []).append(member)
    weights = {"b": 0.3, "a": 0.7, "c": 0.0}
    fitted = ensemble.load_ensemble(write_ensemble(tmp_path, families, weights, unit_rows(1, seed=8)[0]))
    return fitted, files, built


def states(*arguments, **options):
    """(families, embeddings) of every state, copied, and the last state."""
    seen = []
    for state in predict.predict_ensemble(*arguments, **options):
        seen.append((list(state.families), state.embeddings.copy()))
    return seen, state


def test_an_ensemble_gets_better_family_by_family(images, members):
    fitted, files, built = members
    seen, state = states(fitted, files, images)
    assert [families for families, _ in seen] == [[], ["a"], ["a", "b"]]  # the largest weight first, c not at all
    mean = np.array(fitted.mean_embedding, np.float32)
    np.testing.assert_array_equal(seen[0][1], np.tile(mean, (14, 1)))
    rows = {name: by_hand(*model, images[:12]) for name, model in built.items()}
    a = rows["a fold 0"] + rows["a fold 1"]
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    np.testing.assert_allclose(seen[1][1][:12], a, atol=1e-6)
    total = 0.7 * a + 0.3 * rows["b fold 0"]
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(seen[2][1][:12], total, atol=1e-6)
    np.testing.assert_array_equal(seen[2][1][12:], np.tile(mean, (2, 1)))
    assert [path.name for path in state.unreadable] == ["m.png", "n.jpg"]
    assert list(state.seconds) == ["a fold 0", "a fold 1", "b fold 0"] and state.dropped == {
        "c fold 0": "its weight is 0"
    }


def test_no_time_leaves_the_mean_embedding(images, members):
    fitted, files, _ = members
    seen, state = states(fitted, files, images, hours=0)
    assert len(seen) == 1 and set(state.dropped) == {"a fold 0", "a fold 1", "b fold 0", "c fold 0"}
    np.testing.assert_allclose(np.linalg.norm(seen[0][1], axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("error", [predict.OutOfTime("3 of 14"), torch.OutOfMemoryError("full")])
def test_a_model_that_does_not_finish_is_dropped_and_the_others_count(images, members, monkeypatch, error):
    fitted, files, built = members
    whole, calls = predict.predict, []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:  # the second member of a
            raise error
        return whole(*arguments, **options)

    monkeypatch.setattr(predict, "predict", failing)
    _, state = states(fitted, files, images[:12])
    assert "a fold 1" in state.dropped and list(state.families) == ["a", "b"]
    rows = {name: by_hand(*model, images[:12]) for name, model in built.items()}
    expected = blending.combine({"a": rows["a fold 0"], "b": rows["b fold 0"]}, fitted.weights)
    np.testing.assert_allclose(state.embeddings, expected, atol=1e-6)


def test_an_empty_folder_is_predicted(members):
    fitted, files, _ = members
    seen, _ = states(fitted, files, [])
    assert seen[-1][0] == ["a", "b"] and seen[-1][1].shape == (0, 384)
