"""Checks the folders of data sets and kernels before they are sent to Kaggle.

The client silently ignores a misspelt key, leaves out a folder, and accepts a notebook that ends at once. The rules are
from the source code of kaggle 2.2.5.
"""

import difflib
import fnmatch
import json
import os
import re
from pathlib import Path

USER = "[A-Za-z0-9][A-Za-z0-9-]*"  # the name of an account, as in kaggle.com/USER
MAX_NOTEBOOK_BYTES = 1_000_000
KERNEL_KEYS = (
    *("id", "id_no", "title", "code_file", "language", "kernel_type", "is_private", "enable_gpu", "enable_tpu"),
    *("enable_internet", "machine_shape", "dataset_sources", "competition_sources", "kernel_sources", "model_sources"),
    *("keywords", "docker_image", "docker_image_pinning_type"),
)
REQUIRED_KEYS = ("id", "title", "code_file", "language", "kernel_type", "machine_shape")
SOURCES = tuple(key for key in KERNEL_KEYS if key.endswith("_sources"))
FLAGS = {"is_private": True, "enable_gpu": False, "enable_internet": True}  # and what the client takes if one is absent
CREDENTIALS = ("kaggle.json", "access_token*", "credentials*.json", "*.netrc", "_netrc", ".env", ".env.*", "*.pem")
CREDENTIALS += ("id_rsa", "id_ecdsa", "id_ed25519", ".git-credentials", ".pypirc", ".npmrc")
NO_DATA = ("__pycache__", ".git", ".cache", ".huggingface", ".ipynb_checkpoints")  # the client leaves out three of them


class KaggleError(ValueError):
    """An error of Kaggle or its client, or one that it would raise; the message says what to do."""


def check_dataset(folder: Path, message: str) -> str:
    """Check the folder of a data set; returns its owner/slug.

    Raises: KaggleError naming everything that is wrong with the folder.
    """
    path = folder / "dataset-metadata.json"
    values = read_metadata(path)
    ref, title, licences = (values.get(key) or "" for key in ("id", "title", "licenses"))
    inside = [place for entry in contents(folder) for place in all_below(entry)]
    checks = [
        (message.strip(), "the message is empty"),
        (
            re.fullmatch(USER + "/[a-z0-9-]{6,50}", ref),
            f"id {ref!r} is not owner/slug with a slug of 6 to 50 letters",
        ),
        (6 <= len(title) <= 50, f"title {title!r} does not have 6 to 50 characters"),
        (len(licences) == 1 and "name" in licences[0], 'licenses is not one licence, [{"name": "CC0-1.0"}]'),
        ("id_no" not in values, "id_no would be taken instead of id"),
        (any(place.is_file() for place in inside), "there is nothing to upload"),
    ]
    for place in inside:
        unwanted = place.name in NO_DATA or any(fnmatch.fnmatch(place.name.lower(), name) for name in CREDENTIALS)
        checks.append((not unwanted, f"{place} does not belong into a data set"))
        checks.append((not place.is_symlink(), f"{place} is a symbolic link; put what it leads to in its place"))
    refuse(path, [fault for passed, fault in checks if not passed])
    return ref


def contents(folder: Path) -> list[Path]:
    """The entries of a folder that become files or archives of the data set."""
    apart = re.compile(r"dataset-metadata\.json|dataset-cover-image\.\w+")
    return sorted(entry for entry in folder.iterdir() if not apart.fullmatch(entry.name))


def all_below(entry: Path) -> list[Path]:
    """A file, or a folder and everything below it. Like the client, this follows no links to folders."""
    return [entry] + [Path(base, name) for base, folders, files in os.walk(entry) for name in folders + files]


def read_metadata(path: Path) -> dict:
    """Read a JSON object; KaggleError for other content, or if it still has a placeholder for the user's name."""
    try:
        text = path.read_text(encoding="utf-8")
        values = dict(json.loads(text))
    except OSError as error:
        raise KaggleError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise KaggleError(f"{path} is no JSON object: {error}") from None
    placeholder = re.search(r"INSERT_\w+", text)
    refuse(path, [f"put your own value in place of {placeholder[0]}"] if placeholder else [])
    return values


def refuse(where: Path | str, faults: list[str]) -> None:
    """Raise a KaggleError with all faults, if there are any."""
    if faults:
        raise KaggleError(f"{where}: {'; '.join(faults)}")


def check_kernel(folder: Path, allow_internet: bool) -> dict:
    """Check the folder of a kernel; returns its metadata.

    Raises: KaggleError naming everything that is wrong with the metadata or the notebook.
    """
    path = folder / "kernel-metadata.json"
    values = read_metadata(path)
    refuse(path, [f"{key} is missing" for key in REQUIRED_KEYS if not values.get(key)])
    faults = []
    for key in sorted(set(values) - set(KERNEL_KEYS)):
        nearest = difflib.get_close_matches(key, KERNEL_KEYS, 1, cutoff=0)[0]
        faults.append(f"the client ignores {key!r}; did you mean {nearest!r}?")
    ref, slug = values["id"], slugify(values["title"])
    offline = allow_internet or not (values.get("competition_sources") and described(values)["enable_internet"])
    checks = [
        (
            re.fullmatch(USER + r"/[\w-]{5,}", ref),
            f"id {ref!r} is not owner/slug with a slug of 5 letters or more",
        ),
        (slug == ref.rpartition("/")[2].lower(), f"the title gives the slug {slug!r}, unlike the id {ref!r}"),
        (values["language"] == "python", f"language is {values['language']!r}, not 'python'"),
        (values["kernel_type"] == "notebook", f"kernel_type is {values['kernel_type']!r}, not 'notebook'"),
        (offline, 'a version with internet cannot be submitted: write "enable_internet": "false"'),
    ]
    faults += [fault for passed, fault in checks if not passed]
    notebook = folder / values["code_file"]
    try:
        if notebook.stat().st_size >= MAX_NOTEBOOK_BYTES:
            faults.append(f"{notebook} is larger than Kaggle takes, 1 MB: strip its outputs")
        elif not json.loads(notebook.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"]:
            raise KeyError("name")
    except OSError as error:
        faults.append(f"{notebook} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        faults.append(f"{notebook} is no notebook with metadata.kernelspec.name, without which a run ends at once")
    refuse(path, faults)
    return values


def slugify(title: str) -> str:
    """The slug that Kaggle and its client make from a title of ASCII letters."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=\d),(?=\d)", "", title.lower())).strip("-")


def described(values: dict) -> dict[str, bool | str | set[str]]:
    """The settings that a run depends on, normalised: flags, machine, sources."""
    flags = {key: str(values.get(key, default)).lower() == "true" for key, default in FLAGS.items()}
    sources = {key: {source_name(key, name) for name in values.get(key) or []} for key in SOURCES}
    return flags | {"machine_shape": values.get("machine_shape") or ""} | sources


def source_name(key: str, name: str) -> str:
    """A normalised source: Kaggle may report `datasets/owner/slug` for `owner/slug`, or leave out a version."""
    parts = name.lower().split("/")
    if key == "competition_sources":
        return parts[-1]
    if key == "model_sources":
        return "/".join(parts[-5:])  # owner/model/framework/variation/version
    prefixed = len(parts) > 2 and parts[0] in ("code", "dataset", "datasets")
    return "/".join(parts[1:3] if prefixed else parts[:2])


def compare_metadata(wanted: dict, saved: dict) -> str:
    """How the metadata that Kaggle has saved differs from the wanted; `saved as described` if it does not.

    Kaggle reports the machine of the last session. Before the first session it reports none, which counts as equal.
    """
    faults, saved = [], described(saved)
    for key, value in described(wanted).items():
        if isinstance(value, set):
            faults += [f"{source} is not in {key}" for source in sorted(value - saved[key])]
            faults += [f"{source} is in {key} unasked" for source in sorted(saved[key] - value)]
        elif saved[key] != value and saved[key] != "":
            faults.append(f"{key} is {saved[key]}, not {value}")
    return "; ".join(faults) or "saved as described"
