"""Says where the repository, `input/` and `working/` are; writes files atomically."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from kutils.system import checksums

COMMIT_FILE = "COMMIT"  # in the code data set on Kaggle: the commit that it was made from
# temporary names: hash of the machine and id of the writing process; earlier versions used 8 random hex digits
PARTIAL = re.compile(r"\.(?P<machine>[0-9a-f]{8})(-(?P<process>\d+)-[0-9a-f]{4})?\.partial")
FOREIGN_SECONDS = 24 * 3600  # a temporary file of another machine, unchanged for so long, counts as left over


def on_kaggle() -> bool:
    """True inside a Kaggle notebook, interactive or batch."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def code_root() -> Path:
    """The folder that holds `kutils/`: a clone, the unpacked code data set on Kaggle, or `site-packages`."""
    return Path(__file__).resolve().parents[2]


def is_clone(folder: Path) -> bool:
    """Whether a folder holds the repository, or its code data set on Kaggle: the package with the recipes."""
    return (folder / "kutils" / "__main__.py").is_file() and (folder / "conf").is_dir()


def repository_path(name: str) -> Path:
    """A file or folder of the repository, such as `notebooks/train.ipynb`.

    Raises: ValueError if it does not exist, as in a package that was installed without a clone.
    """
    path = code_root() / name
    if not is_clone(code_root()) or not path.exists():
        raise ValueError(
            f"this needs a clone: {name} is not beside the package in {code_root()}; clone the repository, and run the "
            "command in there"
        )
    return path


def repository_root() -> Path:
    """The folder that holds `kutils/` and `conf/`: the clone, or the unpacked code data set on Kaggle."""
    return conf_dir().parent


def conf_dir() -> Path:
    return repository_path("conf")


def input_dir() -> Path:
    """The folder of data sets: `KUTILS_INPUT` if set, `/kaggle/input` on Kaggle, else the clone's `input/`.

    Raises: ValueError where the package is installed without a clone and the current folder has no `input/`.
    """
    return data_folder("input")


def working_dir() -> Path:
    """The folder of results: `KUTILS_WORKING` if set, `/kaggle/working` on Kaggle, else the clone's `working/`.

    Raises: ValueError where the package is installed without a clone and the current folder has no `working/`.
    """
    return data_folder("working")


def data_folder(name: str) -> Path:
    """The folder `input` or `working`; without a clone it is the one in the current folder, never one in
    site-packages."""
    if variable := os.environ.get(f"KUTILS_{name.upper()}"):
        return Path(variable).absolute()
    if on_kaggle():
        return Path("/kaggle", name)
    if is_clone(code_root()):
        return code_root() / name
    if (folder := Path.cwd() / name).is_dir():
        return folder
    raise ValueError(
        f"kutils is installed without a clone, and {folder} is not there: make that folder, or set KUTILS_INPUT to the "
        "folder of data sets and KUTILS_WORKING to the folder of results"
    )


def missing_datasets(names: Iterable[str]) -> str:
    """Lines naming the files that data sets lack in `input/`, and the commands that make them; empty if none is
    missing."""
    root, names, lines, new_tables = input_dir(), list(names), [], False
    for name in names:
        tsv, npy = root / f"{name}.tsv", root / f"{name}.npy"
        absent = [path.name for path in (tsv, npy) if not path.is_file()]
        if absent:
            lines.append(f"data set {name!r}: {' and '.join(absent)} not in {root}")
        if not tsv.is_file():
            new_tables = True
            lines.append(f"  kutils generate PROMPTS.tsv --output input/{name}  (or a table of your own)")
        if not npy.is_file():
            lines.append(f"  python input/gen_prompt_embedding.py input/{name}.tsv")
    if new_tables:  # all in one call, else a prompt could be in two folds
        lines.append(f"then  kutils folds {' '.join(f'input/{name}.tsv' for name in names)}")
    if lines:
        lines.append("or train on other data sets with datasets=NAME,NAME; datasets=shapes is made on the spot")
    return "\n".join(lines)


def is_safe_relative(path: str) -> bool:
    """True if `path` is relative and stays in the folder it is joined to: no `..`, root, drive, backslash or NUL."""
    parts = PurePosixPath(path).parts
    is_inside = bool(parts) and not path.startswith("/") and ".." not in parts and ":" not in parts[0]
    return is_inside and "\\" not in path and "\0" not in path


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_room(folder: Path, needed_bytes: float, advice: str) -> int:
    """The free bytes of a folder's disk; OSError with `advice` if there are less than needed.

    Files that killed processes left unfinished there are removed first.
    """
    remove_leftovers(folder)
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        text = f"about {needed_bytes / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free; {advice}"
        raise OSError(errno.ENOSPC, text, str(folder))
    return free


def check_output(path: Path, needed_bytes: float, option: str) -> None:
    """Raise OSError or ValueError if an output file cannot be written; called before the work starts.

    Args:
        option: the command's option that names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written; give another {option}")
    check_room(path.parent, needed_bytes, f"give another {option}")


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write a JSON file, atomically; an existing file is replaced."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_record(path: str | os.PathLike, content: dict) -> None:
    """Write a JSON file with a checksum, atomically; an existing file is replaced."""
    write_json(path, checksums.with_checksum(content))


def read_json(path: Path) -> dict:
    """Read a JSON object and check its checksum, which is removed; ValueError naming the file if it is damaged."""
    try:
        return checksums.without_checksum(json.loads(path.read_text(encoding="utf-8")), path)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise checksums.Damaged(f"{path} is damaged ({error})") from error


def read_record(path: Path) -> dict | None:
    """Read a JSON object; None if it is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` with the same suffix and the id of this process."""
    writer = f"{machine_hash()}-{os.getpid()}-{secrets.token_hex(2)}"
    return path.with_name(f".{path.stem}.{writer}.partial{path.suffix}")


@functools.cache
def machine_hash() -> str:
    """8 hex digits, equal for processes that see each other's process ids: same boot, same container."""
    facts = [platform.node()]
    with contextlib.suppress(OSError):  # Linux alone has these
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:8]


def is_left_over(path: Path) -> bool:
    """Whether a file or folder with a temporary name was left by a process that has ended.

    A process of another machine cannot be seen; it counts as ended once its file has not changed for a day.
    """
    if not (match := PARTIAL.search(path.name)):
        return False
    try:
        if match["machine"] == machine_hash():
            return not is_running(int(match["process"]))
        return time.time() - path.stat().st_mtime > FOREIGN_SECONDS
    except OSError:  # it has just been renamed
        return False


def is_running(process: int) -> bool:
    """Whether a process is running; a zombie is not."""
    with contextlib.suppress(OSError):  # no /proc
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders that ended processes left in a folder, by `atomic_path` or `atomic_folder`."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        partial = [Path(entry.path) for entry in entries if ".partial" in entry.name]
        for path in filter(is_left_over, partial):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@functools.cache
def remove_leftovers_once(folder: Path, process: int) -> None:
    """`remove_leftovers`, once in each process: a folder may hold a million images."""
    remove_leftovers(folder)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give an empty folder beside `path`; rename it to `path` when the block ends, delete it when the block raises.

    If `path` already exists with content, the block has to remove it. Parent folders are made.
    """
    path = Path(path)
    temporary = temporary_name(path)
    temporary.mkdir(parents=True)
    remove_leftovers_once(path.parent, os.getpid())
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` when the block ends, delete it when the block raises.

    A reader sees the previous file or the complete new one, even after a kill or on a full disk. The temporary name
    keeps the suffix, which NumPy and PyTorch look at. Parent folders are made. An OSError names the file. If `path` is
    a symbolic link, its target is replaced.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers_once(path.parent, os.getpid())
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # the rename must not reach the disk before the content
        temporary.replace(path)
    except OSError as error:
        if error.errno and error.filename is None:  # as on a full disk: `write` names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
