"""The benchmark of importing, in little: what is timed is a whole import, and the plain ways do the same work."""

import io
from pathlib import Path

import pytest
from fixtures.datasets import use_folders
from PIL import Image

from kutils.benchmarks import importing
from kutils.data import pair_parts, shards
from kutils.data.pair_tars import read_tar
from kutils.data.pairs import Keys
from kutils.system import processes


@pytest.fixture
def little(monkeypatch, tmp_path):
    use_folders(monkeypatch, tmp_path)
    for name, value in {"NUM_PICTURES": 3, "KEPT_SIZE": 32, "SIZE": 64, "PACKED_SIZE": 48, "PACKED_PER_TAR": 5}.items():
        monkeypatch.setattr(importing, name, value)
    monkeypatch.setattr(importing, "KEPT_PER_TAR", 40)


def test_tars_hold_pairs_of_the_twelfth_places_form(little, tmp_path):
    first, second = map(Path, importing.make_tars(tmp_path / "tars", 7, size=40, pairs_per_tar=5))
    pairs = [pair for path in (first, second) for pair in read_tar(path, Keys())]
    assert len(pairs) == len({pair.prompt for pair in pairs}) == 7 and len(list(read_tar(second, Keys()))) == 2
    for pair in pairs:
        with Image.open(io.BytesIO(pair.image)) as picture:
            assert (picture.format, picture.size) == ("WEBP", (40, 40))
        assert pair.embedding.dtype == "float16" and pair.embedding.shape == (384,)
    assert importing.parse_all([str(first), str(second)]) == 7


def test_the_plain_way_packs_every_pair(little, tmp_path):
    tars = importing.make_tars(tmp_path / "tars", 6, size=64, pairs_per_tar=5)
    assert importing.pack_by_pillow(tars, tmp_path / "plain") == 6
    sizes = {Image.open(path).size for path in (tmp_path / "plain").iterdir()}
    assert len(list((tmp_path / "plain").iterdir())) == 6 and sizes == {(48, 48)}


def test_imports_are_measured_beside_the_plain_ways(little, tmp_path, monkeypatch):
    packed = []
    write_part = pair_parts.write_part

    def note(number, part, job, folder):
        counts = write_part(number, part, job, folder)
        packed.append((job.encoding, sum(counts.shard_rows), len(list(folder.glob("0*.arrow")))))
        return counts

    def run_here(function, jobs, num_workers, **options):
        return run_jobs(function, jobs, 0, **options)

    run_jobs = processes.run_jobs
    monkeypatch.setattr(processes, "run_jobs", run_here)
    monkeypatch.setattr(pair_parts, "write_part", note)
    entries = {entry.name: entry for entry in importing.measure_import(pairs=20, repeats=1)}
    assert set(entries) == {"import_keep", "import_pack", "import_pack_2_processes"}
    for entry in entries.values():
        assert entry.unit == "pairs/s" and entry.ratio == entry.ours / entry.reference
    # 100 small pairs in three tars; 20 in four, by one process, by two, and by one again
    encoding = shards.Encoding(48, "webp", shards.QUALITY)
    assert packed == [(None, 40, 1), (None, 40, 1), (None, 20, 1)] + 3 * 4 * [(encoding, 5, 1)]
    assert not (tmp_path / "working" / "benchmark" / "import").exists()
