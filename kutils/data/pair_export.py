"""Exports a data set as tars or Parquet files that others can download: `kutils export NAME --format webdataset`."""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from kutils.data import transforms
from kutils.data.pair_facts import facts_path, read_facts
from kutils.data.pair_images import SUFFIXES
from kutils.data.shards import have_no_files, open_shards, record_path, shards_folder
from kutils.data.transforms import ImageError
from kutils.system import paths
from kutils.system.chunks import ChunkFiles
from kutils.system.embedding_files import EMBEDDING_DIM, describe_mismatch, open_embeddings
from kutils.system.progress import progress_bar
from kutils.system.tables import check_rows, read_table

VERSION = 1  # of the files' layout
PAIRS_PER_FILE = {"webdataset": 10_000, "parquet": 5_000}
GROUP_BYTES = 1 << 26  # images per row group of Parquet: 64 MB, which a reader holds in memory
KNOWN = ("generator", "seed", "source")  # columns that an import has recorded
COLUMNS = {
    "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "prompt": pa.string(),
    "fold": pa.int8(),
    **dict.fromkeys(KNOWN, pa.string()),
    "embedding": pa.list_(pa.float32(), EMBEDDING_DIM),
}


class ExportedRows:
    """The rows of a data set in the form of an export.

    Args:
        tsv_path: of the data set; images are read from its shards if there are no files.
        with_embeddings: include those of the .npy file beside it.
    Raises: ValueError for a table, embeddings or shards that do not fit together.
    """

    def __init__(self, tsv_path: Path, with_embeddings: bool):
        self.root, self.table = tsv_path.parent, read_table(tsv_path, ["image", "prompt", "fold"])
        check_rows(tsv_path, self.table)
        self.shards = open_shards(tsv_path, self.table["image"]) if have_no_files(tsv_path) else None
        self.facts = read_facts(tsv_path, self.table["image"], KNOWN)
        self.embeddings = None
        if with_embeddings:
            if problem := describe_mismatch(tsv_path, self.table["prompt"]):
                raise ValueError(problem)
            self.embeddings = open_embeddings(tsv_path.with_suffix(".npy"), len(self))

    def __len__(self) -> int:
        return self.table.num_rows

    def image(self, row: int) -> tuple[bytes, str]:
        """Content and suffix of a row's image; ImageError naming it if it cannot be read."""
        path = self.root / self.table["image"][row].as_py()
        try:
            content = self.shards.read(row) if self.shards else path.read_bytes()
            return content, SUFFIXES[transforms.read_header(content, "image", tuple(SUFFIXES))[0]]
        except (OSError, ImageError) as error:
            raise ImageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error

    def read(self, rows: range) -> Iterator[dict]:
        """Rows one by one, with the keys of COLUMNS; the embedding is float32 [384], or None."""
        for row in rows:
            content, suffix = self.image(row)
            record = {"image": {"bytes": content, "path": f"{row:09d}{suffix}"}}
            record |= {key: self.table[key][row].as_py() for key in ("prompt", "fold")}
            record |= {key: values[row] for key, values in self.facts.items()}
            yield record | {"embedding": None if self.embeddings is None else self.embeddings[row]}


def write_tar(path: Path, rows: Iterator[dict]) -> None:
    """Write rows as webdataset's samples; the keys are the numbers of the rows."""
    with paths.atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            key, _, suffix = row["image"]["path"].partition(".")
            files = {"txt": row["prompt"].encode(), suffix: row["image"]["bytes"]}
            if row["embedding"] is not None:
                stream = io.BytesIO()
                np.save(stream, row["embedding"])
                files["embs.npy"] = stream.getvalue()
            known = {key: row[key] for key in ("fold", *KNOWN) if row[key] != ""}
            files["json"] = json.dumps(known).encode()
            for name, content in files.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_parquet(path: Path, rows: Iterator[dict], with_embeddings: bool) -> None:
    """Write rows in the layout of the hub's image data sets: a column of images with their content."""
    columns = {name: kind for name, kind in COLUMNS.items() if with_embeddings or name != "embedding"}
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    schema = pa.schema(columns).with_metadata({"huggingface": json.dumps(features)})
    with paths.atomic_path(path) as temporary, parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        pending, size = [], 0
        for row in rows:
            pending.append({name: row[name] for name in columns})
            size += len(row["image"]["bytes"])
            if size >= GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(pending, schema))
                pending, size = [], 0
        if pending:
            writer.write_table(pa.Table.from_pylist(pending, schema))


def export_pairs(
    tsv_path: Path,
    folder: Path,
    form: str,
    *,
    pairs_per_file: int = 0,
    with_embeddings: bool = True,
    progress: bool = True,
) -> Path:
    """Write a data set as files that `kutils import` and other tools read; images are copied unchanged.

    The same call continues an interrupted one. The folder appears when it is complete. The same data set gives the same
    bytes.

    Args:
        tsv_path: of the data set.
        folder: to write.
        form: webdataset or parquet.
        pairs_per_file: 0: PAIRS_PER_FILE.
        with_embeddings: write those of the prompts.
        progress: show a bar of pairs.
    Returns: the folder.
    Raises: ValueError for a data set that cannot be used, an image that cannot be read, or another folder of this name;
        OSError on a full disk.
    """
    rows, name = ExportedRows(tsv_path, with_embeddings), tsv_path.stem
    count = pairs_per_file or PAIRS_PER_FILE[form]
    firsts = range(0, len(rows), count)
    files = [tsv_path, tsv_path.with_suffix(".npy"), facts_path(tsv_path), record_path(shards_folder(tsv_path))]
    status = [[path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None for path in files]
    work = {"version": VERSION, "form": form, "files": status, "count": count, "embeddings": with_embeddings}
    record = folder / "export.json"
    if folder.exists():
        if (paths.read_record(record) or {}).get("work") != work:
            raise ValueError(f"{folder} is there already, and is another export or none; choose another --output")
        print(f"{folder} is up to date ({len(rows):,} pairs)")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    chunks = ChunkFiles(folder, work, len(firsts))
    chunks.open()
    check_export_room(rows, folder.parent, (len(chunks.missing()) / max(1, len(firsts))))
    built = chunks.folder / "files"
    with progress_bar(len(rows), "pair", f"exporting {name}", disable=not progress) as bar:
        missing = set(chunks.missing())
        for number, first in enumerate(firsts):
            own = range(first, min(first + count, len(rows)))
            if number in missing and form == "webdataset":
                write_tar(built / f"{name}-{number:06d}.tar", rows.read(own))
            elif number in missing:
                path = built / f"{name}-{number:05d}-of-{len(firsts):05d}.parquet"
                write_parquet(path, rows.read(own), with_embeddings)
            chunks.save(number, pairs=len(own))
            bar.update(len(own))
    paths.save_record(built / record.name, {"pairs": len(rows), "work": work})
    built.replace(folder)
    chunks.remove()
    return folder


def check_export_room(rows: ExportedRows, folder: Path, share: float) -> None:
    """Raise OSError if the disk has too little room for a share of the export, estimated from the first images."""
    some = [len(row["image"]["bytes"]) for row in islice(rows.read(range(len(rows))), 64)]
    pair_bytes = sum(some) / len(some) + 4 * EMBEDDING_DIM + 4096
    paths.check_room(folder, share * len(rows) * pair_bytes, "choose another --output")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kutils export",
        description="Write a data set as tars or Parquet files, to share it: unchanged images, prompts, embeddings, "
        "folds, and metadata of each pair. The same command continues after a kill.",
        epilog="`kutils import FOLDER --output input/NAME --pack keep --raw-prompts --fold-key fold` gives the same "
        "rows, pixels, embeddings and folds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="a data set of input/, or the path of its table")
    parser.add_argument("--format", choices=tuple(PAIRS_PER_FILE), required=True, help="webdataset: tars of samples")
    folder = "folder to write (default: working/exports/NAME-FORMAT)"
    parser.add_argument("--output", type=Path, default=argparse.SUPPRESS, metavar="FOLDER", help=folder)
    counts = ", ".join(f"{form}: {count:,}" for form, count in PAIRS_PER_FILE.items())
    parser.add_argument("--pairs-per-file", type=int, default=0, metavar="N", help=f"0: {counts}")
    parser.add_argument("--no-embeddings", action="store_true", help="leave the prompts' embeddings out")
    args = parser.parse_args(argv)
    if args.pairs_per_file < 0:
        parser.error("--pairs-per-file is 0 or more")
    path = Path(args.name) if args.name.endswith(".tsv") else paths.input_dir() / f"{args.name}.tsv"
    default = paths.working_dir() / "exports" / f"{path.stem}-{args.format}"
    options = {"pairs_per_file": args.pairs_per_file, "with_embeddings": not args.no_embeddings}
    written = export_pairs(path, getattr(args, "output", default).absolute(), args.format, **options)
    size = sum(file.stat().st_size for file in written.iterdir())
    print(f"{written}: {size / 1e6:,.1f} MB")
    return 0
