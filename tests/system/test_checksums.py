"""Damage of three kinds (cut, one bit, zeros) is noticed in every kind of file that is read back."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from kutils.data import shards
from kutils.models import checkpoints
from kutils.system import arrow, checksums, embedding_files, paths
from kutils.system.chunks import ChunkFiles


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes, place: float = 0.5) -> bytes:
    changed = bytearray(content)
    changed[int(len(content) * place)] ^= 16
    return bytes(changed)


def zero(content: bytes) -> bytes:
    start = len(content) // 3
    return content[:start] + bytes(min(2048, len(content) - start)) + content[start + 2048 :]


DAMAGES = (cut, flip, zero)


def arrow_file(path):
    schema = arrow.with_facts(pa.schema({"number": pa.int64()}), {"fingerprint": {"a": 1}})
    arrow.write_batches(path, schema, [pa.record_batch([pa.array(range(1, 2000))], schema=schema)])
    return lambda: arrow.map_table(path)["number"].to_pylist()


def arrays_file(path):
    np.savez(path, numbers=np.arange(1, 2000))
    return lambda: checksums.read_arrays(path)["numbers"].tolist()


def torch_file(path):
    checkpoints.save(path, {"model": {"w": torch.arange(1, 2000)}})
    return lambda: checkpoints.read(path)["model"]["w"].tolist()


def half_file(path):
    checkpoints.save_half(path, {"model": {"w": torch.arange(1, 2000)}, "fold": 0})
    return lambda: checkpoints.read(path)["model"]["w"].tolist()


def json_file(path):
    paths.save_record(path, {"numbers": list(range(1, 2000)), "text": "x" * 4000, 3: "a key that JSON makes a text"})
    return lambda: paths.read_json(path)["numbers"]


FILES = [(arrow_file, "a.arrow"), (arrays_file, "a.npz"), (torch_file, "a.pth")]
FILES += [(half_file, "a.safetensors"), (json_file, "a.json")]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("write", "name"), FILES)
def test_damage_is_noticed_and_named(tmp_path, write, name, damage):
    path = tmp_path / name
    read = write(path)
    assert read() == list(range(1, 2000))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=name):
        read()


def test_every_bit_of_an_arrow_file_counts(tmp_path):
    arrow_file(path := tmp_path / "a.arrow")
    whole = path.read_bytes()
    for place in np.linspace(0, 1, 300, endpoint=False):
        path.write_bytes(flip(whole, place))
        with pytest.raises(checksums.Damaged):
            checksums.check_arrow(path)


def test_blocks_and_what_lies_between_them_count(tmp_path, monkeypatch):
    """Small blocks, several threads; two blocks that change their places are noticed, too."""
    monkeypatch.setattr(checksums, "BLOCK", 256)
    arrow_file(path := tmp_path / "a.arrow")
    checksums.check_arrow(path)
    whole = path.read_bytes()
    for place in np.linspace(0, 1, 100, endpoint=False):
        path.write_bytes(flip(whole, place))
        with pytest.raises(checksums.Damaged):
            checksums.check_arrow(path)
    start = len(whole) // 2
    path.write_bytes(
        whole[:start] + whole[start + 256 : start + 512] + whole[start : start + 256] + whole[start + 512 :]
    )
    with pytest.raises(checksums.Damaged):
        checksums.check_arrow(path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_was_hashed_at_once_is_checked_as_before(tmp_path, monkeypatch, damage):
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "MARK", checksums.FORMER_MARK)
        patch.setattr(checksums, "BLANK", checksums.FORMER_MARK + checksums.BLANK[len(checksums.MARK) :])
        patch.setattr(checksums, "hash_blocks", checksums.hash_at_once)
        read = arrow_file(path := tmp_path / "a.arrow")
    content = path.read_bytes()
    assert checksums.FORMER_MARK in content and checksums.MARK not in content and read() == list(range(1, 2000))
    path.write_bytes(damage(content))
    with pytest.raises(ValueError, match=r"a\.arrow"):
        read()


def test_files_of_before_are_read(tmp_path):
    schema = arrow.with_facts(pa.schema({"number": pa.int64()}), {"a": 1})
    with pa.ipc.new_file(tmp_path / "a.arrow", schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([1])], schema=schema))
    assert arrow.map_table(tmp_path / "a.arrow")["number"].to_pylist() == [1]
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    assert paths.read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_chunk_is_made_again(tmp_path, damage, capsys):
    chunks = ChunkFiles(tmp_path / "result", {"a": 1}, 2)
    chunks.open()
    for number in range(2):
        chunks.save(number, rows=np.arange(500))
    path = chunks.folder / "000001.npz"
    path.write_bytes(damage(path.read_bytes()))
    chunks.open()
    assert chunks.missing() == [1] and str(path) in capsys.readouterr().out


@pytest.mark.parametrize("damage", [flip, zero])
def test_a_shard_gives_whole_images_or_none(tmp_path, damage):
    """One image of three is hit; the layout of the file is covered by the file's own checksum."""
    images = [bytes([number]) * 5000 for number in (1, 2, 3)]
    folder = tmp_path / "set.shards"
    shards.write_images(shards.shard_path(folder, 0), images, {"version": 1})
    path = shards.shard_path(folder, 0)
    assert [shards.Shards(folder, [0]).read(row) for row in range(3)] == images
    whole = path.read_bytes()
    start = whole.index(images[1])
    path.write_bytes(whole[:start] + damage(images[1]) + whole[start + 5000 :])
    packed = shards.Shards(folder, [0])
    assert packed.read(0) == images[0] and packed.read(2) == images[2]
    with pytest.raises(OSError, match=r"00000\.arrow is damaged in image 1"):
        packed.read(1)
    path.write_bytes(flip(whole, 0.01))
    with pytest.raises(OSError, match=r"00000\.arrow is damaged"):
        shards.Shards(folder, [0]).read(0)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_embeddings_are_not_taken_for_whole(tmp_path, damage, capsys):
    npy, rows = tmp_path / "set.npy", np.random.default_rng(0).standard_normal((20, 384)).astype(np.float32)
    np.save(npy, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    record = {"rows": 20, "prompts_sha256": "x"}
    paths.save_record(npy.with_suffix(".npy.json"), record)  # as it was written before there were hashes
    assert embedding_files.are_whole(npy, record)
    assert set(paths.read_json(npy.with_suffix(".npy.json"))) == {*record, "rows_sha256"}
    npy.write_bytes(damage(npy.read_bytes()))
    assert not embedding_files.are_whole(npy, record) and str(npy) in capsys.readouterr().out


def test_a_low_bit_of_an_embedding_counts(tmp_path):
    """It changes no length by more than the tolerance: the hash alone tells."""
    npy = tmp_path / "set.npy"
    np.save(npy, np.eye(20, 384, dtype=np.float32))
    embedding_files.record_embeddings(npy, {"rows": 20})
    content = bytearray(npy.read_bytes())
    content[-1] ^= 1
    npy.write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.npy is damaged.*make it again"):
        embedding_files.open_embeddings(npy, 20)
