"""What `explore` shows is what the files say: nearest prompts, predictions side by side, an image of one's own."""

import json
import shutil

import nbformat
import numpy as np
import pytest
import torch
from fixtures.datasets import TINY, make_dataset, unit_rows, use_folders
from fixtures.notebooks import NOTEBOOKS, execute
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from PIL import Image

from kutils import __main__
from kutils.data import datasets, shards, transforms
from kutils.ensemble import blending, fit, validated
from kutils.models import checkpoints
from kutils.runs.finished import read_result
from kutils.runs.recipes import Recipe
from kutils.system.tables import read_table, write_table
from kutils.training import network_input, train
from kutils.views import exploration, widgets
from kutils.views.exploration import Exploration

NETWORKS = {"convnext": "test_convnext", "vit": "test_vit"}
RUNS = ["convnext_fold0", "vit_fold0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """input/ and working/ with two networks trained on fold 0 for one epoch, and one of them on fold 1 too."""
    root = tmp_path_factory.mktemp("exploration")
    (root / "input").mkdir()
    make_dataset(root / "input")
    with pytest.MonkeyPatch.context() as patch:
        use_folders(patch, root)
        for name, backbone in NETWORKS.items():
            recipe = Recipe(**TINY | {"prefix": name, "save_dir": name, "backbone": backbone, "epochs": 1})
            (root / f"{name}.yaml").write_text(recipe.to_yaml())
            for fold in (0, 1) if name == "vit" else (0,):
                assert train.main(["--config", str(root / f"{name}.yaml"), "--fold", str(fold)]) == 0
    return root


@pytest.fixture
def world(trained, monkeypatch):
    """The trained runs, to be looked at only."""
    use_folders(monkeypatch, trained)
    return trained


@pytest.fixture
def broken(trained, tmp_path, monkeypatch):
    """A copy of the trained runs, to be broken."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    use_folders(monkeypatch, tmp_path)
    return tmp_path


def saved_predictions(root, name, fold=0):
    with np.load(root / "working" / "runs" / f"{name}_fold{fold}" / f"fold{fold}_predictions.npz") as saved:
        return saved["row"], saved["embeddings"]


def test_models_stand_side_by_side_on_the_same_rows(world):
    explored = Exploration.open()
    assert explored.data.names == ("toy",) and explored.validated_folds() == [0, 1]
    of = explored.validated(0)
    targets = np.load(world / "input" / "toy.npy")
    for name, run in zip(NETWORKS, RUNS, strict=True):
        rows, embeddings = saved_predictions(world, name)
        np.testing.assert_array_equal(of.rows, np.sort(rows))
        np.testing.assert_array_equal(of.predictions[run], embeddings[np.argsort(rows)])
        expected = (embeddings * targets[rows]).sum(axis=1)[np.argsort(rows)]
        np.testing.assert_allclose(of.cosines[run], expected, atol=1e-6)
        score = read_result(world / "working" / "runs" / run).cosine_similarity
        assert of.scores()[run] == pytest.approx(score, abs=1e-6)
    together = of.predictions[RUNS[0]] + of.predictions[RUNS[1]]
    together /= np.linalg.norm(together, axis=1, keepdims=True)
    np.testing.assert_allclose(of.predictions[validated.MEAN], together, atol=1e-6)
    assert of.single_models == RUNS
    assert list(explored.validated(1).predictions) == ["vit_fold1"]


def test_only_the_named_runs_are_looked_at(world):
    assert list(Exploration.open("toy", "vit_*").validated(0).predictions) == ["vit_fold0"]
    with pytest.raises(ValueError, match="no finished run 'vit_fld0'"):
        Exploration.open("toy", "vit_fld0")


@pytest.mark.parametrize("sort", ["worst", "best", "disagreement", "random"])
def test_examples_come_in_the_order_asked_for(world, sort):
    explored = Exploration.open("toy")
    of = explored.validated(0)
    shown = explored.examples(0, "vit_fold0", sort, count=3)
    assert len(shown) == 3 and shown["prompt"].is_unique
    cosines = of.cosines["vit_fold0"]
    agreement = np.einsum("nd,nd->n", of.predictions[RUNS[0]], of.predictions[RUNS[1]])
    extreme = {"worst": cosines.min(), "best": cosines.max(), "disagreement": agreement.min()}
    column = "agreement" if sort == "disagreement" else "cosine"
    if sort != "random":
        assert shown[column][0] == pytest.approx(extreme[sort], abs=1e-6)
        assert shown[column].is_monotonic_decreasing if sort == "best" else shown[column].is_monotonic_increasing
    table = np.load(world / "input" / "toy.npy")
    for row in shown.itertuples():
        number = int(row.image.name[:4])
        assert row.prompt == f'toy prompt "{number}, with a comma' and number % 10 == 0
        nearest = int(np.argmax(table @ of.predictions["vit_fold0"][row.position])) // 2
        assert row.nearest == f'toy prompt "{nearest}, with a comma'


def test_disagreement_tells_what_each_model_took_an_image_for(world):
    explored = Exploration.open("toy")
    of = explored.validated(0)
    table = np.load(world / "input" / "toy.npy")
    rows = explored.disagreement(0, count=2)
    assert len(rows) == 2 and rows["agreement"].is_monotonic_increasing
    for row in rows.itertuples():
        assert list(row.nearest_by_model) == RUNS
        for name, text in row.nearest_by_model.items():
            nearest = int(np.argmax(table @ of.predictions[name][row.position])) // 2
            assert text == f'toy prompt "{nearest}, with a comma'
    with pytest.raises(ValueError, match="there is one model alone"):
        explored.disagreement(1)


def test_slices_of_all_images_weigh_to_the_score(world):
    explored = Exploration.open("toy")
    for by in ("words", "source", "kind", "similarity"):
        scores = explored.slice_scores(0, by)
        assert scores["images"].sum() == 8
        for name, score in explored.validated(0).scores().items():
            assert np.average(scores[name], weights=scores["images"]) == pytest.approx(score, abs=1e-6)
    with pytest.raises(ValueError, match="slice is 'colour'; it can be words, source, kind, similarity"):
        explored.slice_scores(0, "colour")


def test_search_finds_the_nearest_prompts_and_only_those_of_a_fold(world, monkeypatch):
    explored = Exploration.open("toy")
    table = np.load(world / "input" / "toy.npy")[::2]
    query = unit_rows(1, seed=5)
    monkeypatch.setattr(exploration.embedding, "encode_prompts", lambda texts, encoder, progress: query)
    monkeypatch.setattr(exploration, "load_encoder", lambda: "an encoder")
    cosines = (table @ query[0]).ravel()
    for fold in (-1, 3):
        allowed = np.arange(40) if fold < 0 else np.arange(3, 40, 10)
        expected = allowed[np.argsort(-cosines[allowed])][:4]
        found = explored.search("any words", fold, count=4)
        assert found["prompt"].tolist() == [f'toy prompt "{number}, with a comma' for number in expected]
        assert [path.name for path in found["image"]] == [f"{number:04d}_0.png" for number in expected]
        assert found["fold"].tolist() == [number % 10 for number in expected]
        np.testing.assert_allclose(found["cosine"], cosines[expected], atol=1e-6)
    with pytest.raises(ValueError, match="type some words"):
        explored.search("  ")


def test_near_duplicates_are_the_closest_pairs(broken):
    embeddings = np.load(broken / "input" / "toy.npy")
    embeddings[6:8] = embeddings[20]  # prompt 3 is prompt 10 in other words
    close = embeddings[30] + 0.1 * embeddings[50]  # prompt 15 is near to prompt 25
    embeddings[50:52] = close / np.linalg.norm(close)
    np.save(broken / "input" / "toy.npy", embeddings)
    twins = Exploration.open("toy").near_duplicates(count=2)
    assert [path.name[:4] for path in twins["image_a"]] == ["0003", "0015"]
    assert [path.name[:4] for path in twins["image_b"]] == ["0010", "0025"]
    assert twins["cosine"].tolist() == pytest.approx([1.0, float(embeddings[30] @ embeddings[50])], abs=1e-6)
    assert twins["fold_a"].tolist() == [3, 5] and twins["fold_b"].tolist() == [0, 5]


def test_the_map_keeps_neighbours_together(broken):
    """Four tight clusters of prompts stay four clusters in the plane."""
    centres, noise = unit_rows(4, seed=7), unit_rows(40, seed=8)
    embeddings = np.repeat(centres, 10, axis=0) + 0.1 * noise
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.save(broken / "input" / "toy.npy", np.repeat(embeddings, 2, axis=0))
    points, labels = Exploration.open("toy").map_points(most=100)
    assert points.shape == (40, 2) and labels["source"] == ["toy"] * 40
    assert labels["fold"] == [str(number % 10) for number in range(40)]
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    nearest = np.argsort(distances, axis=1)[:, 1]
    assert (nearest // 10 == np.arange(40) // 10).mean() > 0.9


def test_an_image_of_ones_own_is_asked_about(world, tmp_path):
    explored = Exploration.open("toy")
    image = tmp_path / "mine.png"
    shutil.copy(world / "input" / "toy_images" / "0007_1.png", image)
    told, sure = explored.ask(image, 0, count=3)
    assert list(told) == [validated.MEAN, *RUNS]
    table = np.load(world / "input" / "toy.npy")[::2]
    predicted = []
    for name in NETWORKS:
        path = next((world / "working" / "models" / name).glob("*fold0_best_cossim.pth"))
        model, recipe, _ = checkpoints.load_model(path)
        pixels = transforms.resize_square(transforms.decode_rgb(image), recipe.input_size)
        with torch.no_grad():
            predicted.append(model(network_input.normalize(pixels[None], recipe.mean, recipe.std)).numpy())
    predicted.insert(0, blending.average(predicted))
    for rows, shown in zip(predicted, told.values(), strict=True):
        cosines = table @ rows[0]
        expected = np.argsort(-cosines)[:3]
        assert shown["prompt"].tolist() == [f'toy prompt "{number}, with a comma' for number in expected]
        np.testing.assert_allclose(shown["cosine"], cosines[expected], atol=2e-3)  # amp
    assert sure["model"].tolist() == [validated.MEAN, *RUNS]
    with pytest.raises((ValueError, OSError), match=r"none.png"):
        explored.ask(tmp_path / "none.png", 0)


def test_the_confidence_in_an_image_counts_the_shorter_predictions_of_the_fold(world, capsys):
    """For a validation image, whose prediction's length is among the saved ones; `kutils ask` says the same."""
    explored = Exploration.open("toy")
    of = explored.validated(0)
    place = 2
    image = explored.data.image_path(int(of.rows[place]))
    _, sure = explored.ask(image, 0, count=1)
    texts = dict(zip(sure["model"], sure["confidence"], strict=True))
    for name in RUNS:
        with np.load(world / "working" / "runs" / name / "fold0_predictions.npz") as saved:
            lengths = saved["lengths"][np.argsort(saved["row"])]
        share, mean = np.mean(lengths < lengths[place]), of.cosines[name].mean()
        near = np.mean(lengths < lengths[place] * 1.001) - share  # float rounding may count the image itself
        assert any(
            f"longer than {part:.0%} of the predictions of fold 0" in texts[name] for part in (share, share + near)
        )
        assert f"(all: {mean:.2f})" in texts[name]
        assert __main__.run("ask", [str(image), "--model", name, "-k", "1"]) == 0
        assert texts[name] in capsys.readouterr().out
    pair = of.predictions[RUNS[0]] + of.predictions[RUNS[1]]
    share = np.mean(np.linalg.norm(pair, axis=1) < np.linalg.norm(pair[place]) - 1e-4)
    assert f"longer than {share:.0%}" in texts[validated.MEAN]
    explored.validated(0).lengths.pop("vit_fold0")  # a run of a former version
    assert explored.ask(image, 0, count=1)[1]["model"].tolist() == [validated.MEAN, "convnext_fold0"]


def test_without_models_it_says_how_to_make_them(workspace, capsys):
    explored = Exploration.open("toy")
    assert explored.validated_folds() == [] and not explored.has_models(0)
    said = capsys.readouterr().out
    assert "no finished run was validated on fold 0 of toy" in said and "papermill notebooks/train.ipynb" in said


def test_scores_and_baseline_are_of_the_same_rows(broken, capsys):
    """A run that was validated on more images is compared on those that both were validated on."""
    make_dataset(broken / "input", "other", num_prompts=20)
    data = datasets.load_datasets(["toy", "other"])
    rows = data.validation_rows(0)
    folder = broken / "working" / "runs" / "vit_fold0"
    shutil.copytree(folder, folder.with_name("more_fold0"))
    number, row = data.origin(rows)
    saved = {"dataset": np.array(data.names)[number], "row": row, "embeddings": unit_rows(len(rows), 9), "fold": 0}
    saved |= {"targets_hash": data.hash_targets(rows), "folds_hash": json.dumps(data.folds_hashes)}
    np.savez(folder.with_name("more_fold0") / "fold0_predictions.npz", **saved)
    explored = Exploration.open("toy,other", "vit_fold0,more_fold0")
    assert explored.has_models(0)
    said = capsys.readouterr().out
    assert "vit_fold0, more_fold0 are compared on the 8 images of fold 0 that all were validated on" in said
    of = explored.validated(0)
    assert len(of.rows) == 8 and of.rows.max() < 80
    training = np.concatenate([np.load(broken / "input" / f"{name}.npy") for name in ("toy", "other")])[data.folds != 0]
    mean = training.sum(axis=0) / np.linalg.norm(training.sum(axis=0))
    assert of.baseline == pytest.approx(float((data.targets(of.rows) @ mean).mean()), abs=1e-6)


def test_folds_assigned_anew_are_noticed(broken, capsys):
    table = read_table(broken / "input" / "toy.tsv", ["image", "prompt", "fold"])
    write_table(
        broken / "input" / "toy.tsv",
        {"image": table["image"], "prompt": table["prompt"], "fold": (table["fold"].to_numpy() + 3) % 10},
    )
    assert not Exploration.open("toy").has_models(0)
    assert "vit_fold0 is left out: prompts were assigned to other folds since" in capsys.readouterr().out


@pytest.mark.slow
def test_the_fitted_ensemble_is_shown_with_what_its_fit_has_not_seen(broken, capsys):
    """Its members that stand for the nearest training prompts included."""
    (broken / "ensemble.yaml").write_text(
        "method: family\nfamilies:\n"
        f"  vit:\n    - {{recipe: {broken}/vit.yaml, fold: 0}}\n"
        f"  near:\n    - {{recipe: {broken}/convnext.yaml, fold: 0, neighbours: 3}}\n"
    )
    fitted, path = fit.fit(broken / "ensemble.yaml")
    explored = Exploration.open("toy")
    assert explored.has_models(0)
    assert f"on the others it has {fitted.scores['chosen']:.4f}" in capsys.readouterr().out
    of = explored.validated(0)
    table, folds = np.load(broken / "input" / "toy.npy")[::2], np.arange(40) % 10
    own = of.predictions["convnext_fold0"] @ table[folds != 0].T
    chosen = np.argsort(-own, axis=1)[:, :3]
    weights = np.exp(np.take_along_axis(own, chosen, axis=1) / 0.05)
    near = np.einsum("nk,nkd->nd", weights, table[folds != 0][chosen])
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    both = fitted.weights["vit"] * of.predictions["vit_fold0"] + fitted.weights["near"] * near
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    np.testing.assert_allclose(of.predictions["ensemble"], both, atol=2e-3)  # its prompts are kept in float16
    image = broken / "input" / "toy_images" / "0001_0.png"
    told, sure = explored.ask(image, 0)
    assert list(told) == sure["model"].tolist() == ["ensemble", "convnext_fold0", "vit_fold0"]
    next((broken / "working" / "models" / "vit").glob("*fold0_best*.pth")).unlink()  # the rest goes on
    explored.predicted.clear()
    told, sure = explored.ask(image, 0)
    assert list(told) == sure["model"].tolist() == ["convnext_fold0"]
    said = capsys.readouterr().out
    assert "ensemble is left out: " in said and "vit_fold0 is left out: " in said
    path.unlink()


def test_without_a_text_encoder_prompts_that_hold_the_words_stand_for_them(world, monkeypatch, capsys):
    def absent():
        raise ImportError("No module named 'sentence_transformers'")

    monkeypatch.setattr(exploration, "load_encoder", absent)
    explored = Exploration.open("toy")
    assert explored.search('"17, PROMPT', count=1)["prompt"].tolist() == ['toy prompt "17, with a comma']
    assert capsys.readouterr().out.count("no text encoder (No module named 'sentence_transformers')") == 1
    with pytest.raises(ValueError, match="no prompt contains one of the words 'zebra'"):
        explored.search("zebra")


@pytest.mark.slow
def test_packed_images_are_shown_where_their_files_are_gone(broken):
    shards.pack(broken / "input" / "toy.tsv", shards.Encoding(32, "png", None), num_workers=0, progress=False)
    shutil.rmtree(broken / "input" / "toy_images")
    explored = Exploration.open("toy")
    shown = explored.examples(0, "vit_fold0", count=2)
    assert [image.size for image in shown["image"]] == [(32, 32)] * 2


def test_an_ensemble_that_is_gone_is_an_error_in_words(workspace):
    with pytest.raises(ValueError, match="no ensemble is fitted"):
        exploration.predict_image(workspace / "any.png", None)


def test_a_photo_is_turned_as_its_record_asks(tmp_path):
    lying = Image.new("RGB", (40, 20), "red")
    record = lying.getexif()
    record[0x0112] = 6
    lying.save(tmp_path / "photo.jpg", exif=record)
    lying.save(tmp_path / "plain.png")
    assert widgets.upright(tmp_path / "plain.png", tmp_path) == tmp_path / "plain.png"
    with Image.open(widgets.upright(tmp_path / "photo.jpg", tmp_path)) as turned:
        assert turned.size == (20, 40)


def test_a_value_that_is_no_choice_is_named():
    with pytest.raises(ValueError, match="sort is 'bst'; it can be worst, best"):
        widgets.dropdown("sort", ["worst", "best"], "bst")


def test_runs_of_other_data_are_left_out_and_named(broken, capsys):
    path = broken / "working" / "runs" / "vit_fold0" / "fold0_predictions.npz"
    with np.load(path) as saved:
        content = dict(saved)
    np.savez(path, **content | {"targets_hash": "0"})
    explored = Exploration.open("toy")
    assert explored.has_models(0) and list(explored.validated(0).predictions) == ["convnext_fold0"]
    assert "vit_fold0 is left out: its data sets have other rows or prompts now" in capsys.readouterr().out
    np.savez(path, **content | {"folds_hash": json.dumps({"toy": "0", "more": "1"})})
    explored = Exploration.open("toy")
    assert not Exploration.open("toy", "vit_fold0").has_models(0)
    assert "it was validated on more too; look at datasets=toy,more" in capsys.readouterr().out
    path.write_bytes(b"no file")
    assert explored.has_models(0)
    assert f"vit_fold0 is left out: {path} cannot be read" in capsys.readouterr().out


def test_controls_change_what_is_shown_and_say_what_is_wrong():
    """In a notebook: a plain output is replaced when a control changes; an error does not end it."""
    first = """
from kutils.views import widgets
from IPython.display import Markdown
asked = []
def show(words, count):
    asked.append((words, count))
    if not words:
        raise ValueError("no <words>")
    print("looked up")
    return [Markdown(f"{words} {count}"), "second"]
words, count = widgets.text_field("words", "cat"), widgets.slider("images", 2, 5)
box = widgets.live(show, words=words, count=count)
"""
    second = 'words.value = "dog"\ncount.value = 4'
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(first), nbformat.v4.new_code_cell(second)])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    shown = [output for output in outputs if output.output_type == "display_data"]
    assert [output.data.get("text/markdown") for output in shown] == [None, "dog 4", None]
    controls = shown[0].data
    assert "application/vnd.jupyter.widget-view+json" in controls
    assert controls["text/plain"].startswith("The controls of this view (words, images) work where a kernel runs")

    third = 'words.value = ""\nprint(asked)\nprint(box.children[1].value)'
    notebook.cells.append(nbformat.v4.new_code_cell(third))
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert "[('cat', 2), ('dog', 2), ('dog', 4), ('', 4)]" in notebook.cells[2].outputs[0].text
    assert "<strong>no &lt;words&gt;</strong>" in notebook.cells[2].outputs[0].text
    assert "dog 4" not in str(notebook.cells[0].outputs)


def test_rows_of_several_data_sets_are_found_by_set_and_row(workspace):
    make_dataset(workspace / "input", "other", num_prompts=20)
    data = datasets.load_datasets(["toy", "other"])
    rows = data.rows_of(np.array(["other", "toy", "other"]), np.array([3, 5, 0]))
    assert rows.tolist() == [83, 5, 80]


@pytest.mark.slow
def test_the_notebook_shows_everything_without_controls_too(broken):
    make_dataset(broken / "input", "toy")
    target = broken / "explore.ipynb"
    values = {"search": "a red house", "slice": "words", "count": 4}
    execute("explore", target, cwd=NOTEBOOKS, **values)
    notebook = nbformat.read(target, 4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 10  # no report of folds, and one slice alone
    assert all(len(output.metadata["image/png"]["alt"]) > 20 for output in pictures)
    told = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "toy: 80 images of 40 prompts, folds 0 to 9; 3 finished runs" in told
    page, _ = HTMLExporter(template_name="classic").from_filename(str(target))  # as a viewer without a kernel shows it
    assert "No description has been provided" not in page and page.count("<table class=") == 4


@pytest.mark.slow
def test_the_notebook_shows_data_where_nothing_was_trained(workspace):
    target = workspace / "explore.ipynb"
    execute("explore", target, cwd=NOTEBOOKS, datasets="toy", map_prompts=30)
    cells = nbformat.read(target, 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert any("no finished run was validated on fold 0 of toy" in output.get("text", "") for output in outputs)
