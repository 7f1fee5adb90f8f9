"""Nearest prompts against plain NumPy, and the bank of a data set."""

import numpy as np
import pytest
import torch
from conftest import make_dataset, unit_rows

from kutils import checkpoints, models, retrieval, transforms
from kutils.datasets import DataError
from kutils.retrieval import PromptBank
from kutils.tables import write_table


def brute_force(embeddings, queries, k):
    """All cosines in float64, sorted."""
    cosines = queries.astype(np.float64) @ embeddings.astype(np.float64).T
    order = np.argsort(-cosines, axis=1)[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


@pytest.mark.parametrize(
    ("num_prompts", "num_queries", "k"), [(100, 7, 5), (64, 1, 1), (65, 33, 3), (3, 2, 5), (100, 0, 5)]
)
def test_nearest_is_what_all_cosines_say(monkeypatch, num_prompts, num_queries, k):
    monkeypatch.setattr(retrieval, "BLOCK_PROMPTS", 32)  # 65 prompts: a last block of one, smaller than k
    monkeypatch.setattr(retrieval, "BLOCK_QUERIES", 4)
    embeddings, queries = unit_rows(num_prompts, seed=1), unit_rows(num_queries, seed=2)
    indices, cosines = PromptBank([f"prompt {n}" for n in range(num_prompts)], embeddings).nearest(queries, k)
    expected_indices, expected_cosines = brute_force(embeddings, queries, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(cosines, expected_cosines, atol=1e-6)
    assert indices.shape == (num_queries, min(k, num_prompts))
    assert indices.dtype == np.int64 and cosines.dtype == np.float32


def test_a_prompt_is_nearest_to_itself_and_a_mixture_to_its_larger_part():
    embeddings = np.eye(384, dtype=np.float32)[:3]
    bank = PromptBank(["a cat", "a dog", "a tree"], embeddings)
    indices, cosines = bank.nearest(np.stack([embeddings[1], 0.6 * embeddings[0] + 0.8 * embeddings[2]]), k=2)
    assert bank.prompts[indices[0, 0]] == "a dog" and cosines[0].tolist() == [1, 0]
    assert [bank.prompts[index] for index in indices[1]] == ["a tree", "a cat"]
    assert cosines[1].tolist() == pytest.approx([0.8, 0.6])


def test_bank_of_data_sets_holds_every_prompt_once(workspace):
    make_dataset(workspace / "input", "other", num_prompts=15)
    bank = PromptBank.from_datasets(["toy", "other"])
    expected = [
        f'{name} prompt "{number}, with a comma'
        for name, count in (("toy", 40), ("other", 15))
        for number in range(count)
    ]
    assert bank.prompts == expected
    np.testing.assert_array_equal(
        bank.embeddings[:40], np.load(workspace / "input" / "toy.npy")[::2]
    )  # two images each
    np.testing.assert_array_equal(bank.embeddings[40:], np.load(workspace / "input" / "other.npy")[::2])


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.zeros((2, 383)), 5, r"\[2, 383\], not \[queries, 384\]"),
        (np.zeros(384), 5, r"\[384\], not"),
        (np.full((1, 384), np.nan), 5, "row 0 of the embeddings has length nan"),
        (np.stack([unit_rows(1)[0], 2 * unit_rows(1)[0]]), 5, "row 1 of the embeddings has length [12]"),
        (unit_rows(1), 0, "k is 0"),
    ],
)
def test_bad_queries_are_refused(queries, k, message):
    with pytest.raises(ValueError, match=message):
        PromptBank(["a", "b"], unit_rows(2)).nearest(queries, k)


@pytest.mark.parametrize(("prompts", "rows"), [(["a"], 2), ([], 0)])
def test_bank_and_embeddings_have_to_fit(prompts, rows):
    with pytest.raises(ValueError, match=r"a bank needs \[prompts, 384\]"):
        PromptBank(prompts, unit_rows(rows))


@pytest.fixture
def checkpoint(workspace, tiny_recipe):
    """A network of random weights, and the same in a file."""
    recipe = tiny_recipe(amp_dtype="float32")
    torch.manual_seed(0)
    model = models.build_model(recipe).eval()
    facts = {"fold": 0, "folds_hashes": {}, "epoch": 1, "cosine_similarity": 0.5}
    checkpoints.save_checkpoint(workspace / "model.pth", model, recipe, **facts)
    (workspace / "recipe.yaml").write_text(recipe.to_yaml())
    return model, recipe, workspace / "model.pth"


def test_command_prints_the_nearest_prompts_to_each_image(workspace, checkpoint, capsys):
    model, recipe, path = checkpoint
    images = [workspace / "input" / "toy_images" / name for name in ("0003_1.png", "0017_0.png")]
    retrieval.main([*map(str, images), "--checkpoint", str(path), "-k", "2", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    pixels = torch.stack(
        [transforms.resize_square(transforms.decode_rgb(image), recipe.input_size) for image in images]
    )
    with torch.no_grad():
        predicted = model(transforms.normalize(pixels, recipe.mean, recipe.std)).numpy()
    order, cosines = brute_force(np.load(workspace / "input" / "toy.npy")[::2], predicted, 2)
    expected = []
    for number, image in enumerate(images):
        expected.append(str(image))
        for row, cosine in zip(order[number], cosines[number], strict=True):
            expected.append(f'  {cosine:7.4f}  toy prompt "{row}, with a comma')
    assert lines == expected

    make_dataset(workspace / "input", "other", num_prompts=15)
    arguments = ["--checkpoint", str(path), "--config", str(workspace / "recipe.yaml"), "--datasets", "other,toy"]
    retrieval.main([str(images[0]), *arguments, "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.png"], "no.png: No such file"),
        (["no.png", "--datasets", "nothing"], "data set 'nothing': nothing.tsv and nothing.npy not in"),
        (["no.png", "--config", "nothing.yaml"], "no recipe file nothing.yaml"),
        (["no.png", "--checkpoint", "nothing.pth"], "no checkpoint at nothing.pth"),
    ],
)
def test_command_names_what_is_missing(checkpoint, arguments, message):
    with pytest.raises(SystemExit, match=message):
        retrieval.main(["--checkpoint", str(checkpoint[2]), "--device", "cpu", *arguments])


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        retrieval.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 5)" in text and "(default: the recipe's)" in text and "None" not in text


def test_a_bank_is_saved_with_few_digits_and_read_again(tmp_path):
    prompts, embeddings = ["a cat", 'a "quoted" dog', "ein Bär"], unit_rows(3)
    retrieval.PromptBank(prompts, embeddings).save(tmp_path / "bank.npz")
    bank = retrieval.PromptBank.load(tmp_path / "bank.npz")
    assert bank.prompts == prompts and bank.embeddings.dtype == np.float32
    np.testing.assert_allclose(bank.embeddings, embeddings, atol=1e-4)
    assert bank.nearest(embeddings, k=1)[0].ravel().tolist() == [0, 1, 2]
    (tmp_path / "bank.npz").write_bytes(b"PK half a file")
    with pytest.raises(ValueError, match=r"bank.npz holds no prompts"):
        retrieval.PromptBank.load(tmp_path / "bank.npz")


def test_a_bank_of_some_prompts_is_drawn(workspace):
    whole = retrieval.PromptBank.from_datasets(["toy"])
    some = retrieval.PromptBank.from_datasets(["toy"], most=10, seed=1)
    assert len(whole.prompts) == 40 and len(set(some.prompts)) == 10
    for prompt, embedding in zip(some.prompts, some.embeddings, strict=True):
        np.testing.assert_array_equal(embedding, whole.embeddings[whole.prompts.index(prompt)])
    assert some.prompts == retrieval.PromptBank.from_datasets(["toy"], most=10, seed=1).prompts


def test_the_nearest_prompts_become_a_title():
    bank = PromptBank(["a cat", "a very long prompt of a dog that nobody would want to read to its end"], unit_rows(2))
    (told,) = bank.describe(bank.embeddings[1:], k=2, width=24)
    cosine = float(bank.embeddings[0] @ bank.embeddings[1])
    assert told == f"a very long prompt ... (1.00) / a cat ({cosine:.2f})"
    assert PromptBank(["alone"], unit_rows(1)).describe(unit_rows(1)) == ["alone (1.00)"]


def test_bank_of_a_prompts_file(tmp_path):
    write_table(tmp_path / "p.tsv", {"prompt": ["a cat", "a dog"], "source": ["x", "y"]})
    np.save(tmp_path / "p.npy", unit_rows(2))
    bank = PromptBank.from_table(tmp_path / "p.tsv")
    assert bank.prompts == ["a cat", "a dog"] and np.array_equal(bank.embeddings, unit_rows(2))
    np.save(tmp_path / "p.npy", unit_rows(3))
    with pytest.raises(DataError, match=r"p.npy is float32 \[3, 384\], its TSV needs float32 \[2, 384\]"):
        PromptBank.from_table(tmp_path / "p.tsv")
