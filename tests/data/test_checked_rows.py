"""Rows with checksums of their own: what is damaged is named when it is read, and what is not read costs nothing."""

import os

import numpy as np
import pyarrow as pa
import pytest
from fixtures.datasets import unit_rows

from kutils.data import bank_files, checked_rows
from kutils.data.checked_rows import CheckedRows, row_sums
from kutils.data.prompt_bank import PromptBank
from kutils.system import arrow, checksums

FACTORS = [
    sum(int(byte) * int(factor) for byte, factor in zip(row, checked_rows.FACTORS, strict=True))
    for row in checked_rows.BYTE_FACTORS
]


@pytest.mark.parametrize("rows", [unit_rows(3), unit_rows(3).astype(np.float16), (127 * unit_rows(2)).astype(np.int8)])
def test_a_row_sum_is_that_of_python_integers(rows):
    for row, value in zip(rows, row_sums(rows), strict=True):
        expected = sum(int(byte) * factor for byte, factor in zip(row.view(np.int8), FACTORS, strict=False))
        assert (expected - int(value)) % 2**64 == 0


def test_a_change_of_one_byte_always_shows():
    """A byte changes by less than 2 ** 8; its factor has at most 55 factors of 2, so that no product is 0."""
    assert len(FACTORS) == 1536 and all(factor % 2**56 for factor in FACTORS)


def test_rows_that_change_places_or_become_zero_are_noticed():
    rows = unit_rows(50)
    for damage in (rows[::-1], np.roll(rows, 1, axis=1), np.zeros_like(rows), -rows):
        assert (row_sums(rows) != row_sums(damage)).all()


def test_only_what_is_read_is_compared_and_once(monkeypatch):
    rows = unit_rows(10)
    sums = row_sums(rows)
    rows[7, 3] += 1e-7
    checked = CheckedRows(rows, sums, lambda row: f"row {row} is bad")
    compared = []
    monkeypatch.setattr(checked_rows, "row_sums", lambda some: compared.append(len(some)) or row_sums(some))
    np.testing.assert_array_equal(checked[:5], rows[:5])
    np.testing.assert_array_equal(checked[np.array([2, 9, 4, 6])], rows[[2, 9, 4, 6]])
    assert compared == [5, 2]
    for some in (slice(3, 9), np.array([1, 7]), slice(None)):
        with pytest.raises(checksums.Damaged, match="row 7 is bad"):
            checked[some]


def damages(content: bytes, count: int):
    """The content with a bit turned, and with 512 bytes of zeros, at places all over it."""
    for place in np.linspace(0, len(content), count, endpoint=False).astype(int):
        changed = bytearray(content)
        changed[place] ^= 64
        yield bytes(changed)
        end = min(place + 512, len(content))
        yield content[:place] + bytes(end - place) + content[end:]


@pytest.fixture
def bank_path(tmp_path, monkeypatch):
    """A bank of 600 prompts in three batches, with short rows, around 12 centres."""
    monkeypatch.setattr(bank_files, "SHORTENED", 1)
    monkeypatch.setattr("kutils.data.prompt_bank.BLOCK_PROMPTS", 256)
    rows = unit_rows(12)[np.arange(600) % 12] + 0.7 * unit_rows(600, 1)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    PromptBank([f"prompt {number}" for number in range(600)], rows, np.arange(600)).save(tmp_path / "bank.arrow")
    return tmp_path / "bank.arrow"


def answer(path):
    bank = PromptBank.load(path)
    (indices,), (cosines,) = bank.nearest(unit_rows(1), 5)
    return bank.texts(indices), cosines.tolist(), bank.rows[indices].tolist(), bank.vectors(indices).tolist()


def test_a_damaged_bank_answers_as_a_whole_one_or_says_what_is_damaged(bank_path):
    whole, content, said = answer(bank_path), bank_path.read_bytes(), []
    for damaged in damages(content, 100):
        bank_path.write_bytes(damaged)
        try:
            assert answer(bank_path) == whole
        except ValueError as error:
            assert "bank.arrow" in str(error)
            said.append("at start" if "holds no prompts" in str(error) else "when read")
    assert 5 < said.count("at start") < 50 and 20 < said.count("when read") < 180
    bank_path.write_bytes(content)
    unread = [part.rows.unread.mean() for part in PromptBank.load(bank_path).parts]
    assert unread == [1, 1, 1]  # no embedding is read at the start


def test_a_prompt_that_is_damaged_is_never_shown(bank_path):
    content = bank_path.read_bytes()
    assert content.count(b"prompt 321") == 1
    bank_path.write_bytes(content.replace(b"prompt 321", b"Prompt 321"))
    bank = PromptBank.load(bank_path)
    assert bank.texts([320, 322]) == ["prompt 320", "prompt 322"]
    for read in (lambda: bank.texts([5, 321]), lambda: bank.prompts):
        with pytest.raises(ValueError, match=r"bank.arrow is damaged: the checksum of a prompt does not fit"):
            read()


@pytest.mark.parametrize("short", [True, False])
def test_a_bank_of_before_is_read_and_compared_as_a_whole(bank_path, short):
    """It has one checksum for all, and none of rows."""
    table = arrow.map_table(bank_path)
    table = table.drop([name for name in table.column_names if name.endswith("_sum")])
    table = table if short else table.drop(["short", "short_error"])
    before = bank_path.with_name("before.arrow")
    arrow.write_batches(before, table.schema, table.to_batches())
    assert answer(before) == answer(bank_path)
    assert PromptBank.load(before).sums is None
    content = bytearray(before.read_bytes())
    content[len(content) // 2] ^= 1
    before.write_bytes(content)
    with pytest.raises(ValueError, match=r"before.arrow holds no prompts \(.*checksum does not fit"):
        PromptBank.load(before)


def test_damaged_embeddings_of_data_sets_are_named_with_their_row(workspace):
    PromptBank.from_datasets(["toy"])
    path = workspace / "input" / "toy.npy"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) - 384 * 4 * (80 - 26) + 5] ^= 8  # row 26, the first of prompt 13
    with path.open("r+b") as stream:
        stream.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # a bad disk changes no times
    bank = PromptBank.from_datasets(["toy"])
    assert bank.vectors([12, 14]).shape == (2, 384)
    for read in (lambda: bank.vectors([13]), lambda: bank.nearest(unit_rows(1), 1)):
        with pytest.raises(ValueError, match=r"toy.npy is damaged: row 26 is not what .*bank.arrow was made of"):
            read()


def test_a_file_leaves_out_the_columns_whose_rows_are_checked(tmp_path):
    """Of all its batches, and nothing else."""
    schema = pa.schema({"number": pa.int64(), "text": pa.large_string(), "row": pa.list_(pa.int8(), 16)})
    rows = [np.arange(16 * number, 16 * number + 48, dtype=np.int8) for number in (1, 4)]
    batches = [
        pa.record_batch(
            [
                pa.array(range(3)),
                pa.array(["Ahorn", "", "Eiche"], pa.large_string()),
                bank_files.as_lists(some.reshape(3, 16)),
            ],
            schema=schema,
        )
        for some in rows
    ]
    arrow.write_batches(path := tmp_path / "a.arrow", schema, batches, left_out=["text", "row", "none"], most_batches=3)
    content = path.read_bytes()
    spans = arrow.spans_of(path, ["text", "row"])
    assert [content[first:end].rstrip(b"\0") for first, end in spans] == [b"AhornEiche"] * 2 + [
        bytes(some) for some in rows
    ]
    for place in range(0, len(content), 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        if any(first <= place < end for first, end in spans):
            checksums.check_arrow(path)
        else:
            with pytest.raises(checksums.Damaged):
                checksums.check_arrow(path)
    with pytest.raises(AssertionError, match="no room for 4 spans"):
        arrow.write_batches(path, schema, batches, left_out=["text", "row"])
