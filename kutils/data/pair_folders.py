"""Reads pairs from folders and zip files: DiffusionDB's parts, images with text files or with prompts inside."""

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import UnidentifiedImageError

from kutils.data.pair_tars import suffix_of
from kutils.data.pairs import IMAGE_SUFFIXES, MOST_BYTES, PROMPT_KEYS, Fault, Keys, Pair, find_key

DIFFUSIONDB = {"p": "prompt", "se": "seed", "c": "cfg", "st": "step", "sa": "sampler"}  # short key -> full name
TEXT_SUFFIXES = ("txt", "caption", "prompt")


class Files:
    """The files of one folder (not of folders below it), or all files of a zip file."""

    def __init__(self, path: Path):
        """Open it; ValueError if it is neither."""
        self.path, self.archive = path, None
        if not path.is_dir():
            try:
                self.archive = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"{path} is no zip file, or is cut off ({error})") from error

    def names(self) -> list[str]:
        """All names, sorted; hidden files are left out."""
        if self.archive:
            names = [info.filename for info in self.archive.infolist() if not info.is_dir()]
        else:
            names = [entry.name for entry in self.path.iterdir() if entry.is_file()]
        return sorted(name for name in names if not PurePosixPath(name).name.startswith("."))

    def size(self, name: str) -> int:
        return self.archive.getinfo(name).file_size if self.archive else (self.path / name).stat().st_size

    def read(self, name: str) -> bytes | Fault:
        """Content of a file, or the fault that prevents reading it."""
        try:
            if self.size(name) > MOST_BYTES:
                return Fault(name, f"it has more than {MOST_BYTES:,} bytes")
            return self.archive.read(name) if self.archive else (self.path / name).read_bytes()
        except (KeyError, FileNotFoundError):
            return Fault(name, "there is no such file")
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:  # RuntimeError: a password
            return Fault(name, f"it cannot be read ({error})")

    def image(self, name: str) -> bytes | Path | Fault:
        """The path of an image in a folder, or the content of one in a zip file."""
        return self.read(name) if self.archive else self.path / name


def is_image(name: str) -> bool:
    return suffix_of(name) in IMAGE_SUFFIXES


def stem_of(name: str) -> str:
    return name.rpartition(".")[0]


def recognise(path: Path) -> str | None:
    """The form of a folder or zip file: diffusiondb, texts or embedded; None if it has no image."""
    files = Files(path)
    names = files.names()
    images = [name for name in names if is_image(name)]
    if find_records(files, names) is not None:
        return "diffusiondb"
    texts = {stem_of(name) for name in names if suffix_of(name) in TEXT_SUFFIXES}
    if any(stem_of(name) in texts for name in images):
        return "texts"
    return "embedded" if images else None


# ---------------------------------------------------------------- DiffusionDB


def find_records(files: Files, names: list[str]) -> dict[str, dict] | None:
    """The JSON file of a part: name of an image -> its fields; None if there is no such file."""
    name = next((name for name in names if name.endswith(".json") and suffix_of(name) == "json"), None)
    # a part's JSON file has the part's name
    if name is None or stem_of(PurePosixPath(name).name) != files.path.name.removesuffix(".zip"):
        return None
    content = files.read(name)
    try:
        records = json.loads(content) if isinstance(content, bytes) else None
    except (ValueError, RecursionError):
        return {}
    usable = isinstance(records, dict) and all(isinstance(value, dict) for value in records.values())
    return records if usable else None


def read_diffusiondb(path: Path, keys: Keys) -> Iterator[Pair | Fault]:
    """The pairs of one part: 1,000 images and a JSON file with the prompt and settings of each."""
    files = Files(path)
    names = files.names()
    records = find_records(files, names)
    if not records:
        yield Fault("", f"there is no JSON file of the name {path.name.removesuffix('.zip')}.json, or it is broken")
        return
    images = {PurePosixPath(name).name: name for name in names if is_image(name)}
    for name in sorted(records.keys() | images.keys()):
        if name not in images:
            yield Fault(name, "there is no such file")
        elif name not in records:
            yield Fault(name, "no text: the JSON file does not name it")
        else:
            fields = records[name] | {DIFFUSIONDB.get(key, key): value for key, value in records[name].items()}
            key = find_key(fields, PROMPT_KEYS, keys.prompt)
            prompt, image = fields.get(key), files.image(images[name])
            if isinstance(image, Fault) or prompt is None:
                yield image if isinstance(image, Fault) else Fault(name, f"no text (keys: {', '.join(fields)})")
            else:
                yield Pair(name, image, prompt, fields, None, key)


# ---------------------------------------------------------------- texts beside images, or inside


def read_texts(path: Path, keys: Keys, first: int, count: int) -> Iterator[Pair | Fault]:
    """Images with a text file of the same stem; the first part also reports texts without an image."""
    files = Files(path)
    names = files.names()
    images = [name for name in names if is_image(name)]
    suffixes = (keys.prompt,) if keys.prompt else TEXT_SUFFIXES
    texts = {stem_of(name): name for name in reversed(names) if suffix_of(name) in suffixes}
    if first == 0:
        stems = {stem_of(name) for name in images}
        yield from (Fault(name, "no image of this name") for stem, name in sorted(texts.items()) if stem not in stems)
    previous = stem_of(images[first - 1]) if first else None
    for position in range(first, min(first + count, len(images))):
        name = images[position]
        following = stem_of(images[position + 1]) if position + 1 < len(images) else None
        if stem_of(name) in (previous, following):
            yield Fault(name, "two images of one name")
        elif (text := texts.get(stem_of(name))) is None:
            yield Fault(name, "no text file of this name")
        else:
            content, image = files.read(text), files.image(name)
            fault = next((item for item in (content, image) if isinstance(item, Fault)), None)
            yield fault or Pair(name, image, content.decode("utf-8-sig", errors="replace"), {}, None, suffix_of(text))
        previous = stem_of(name)


def read_embedded(path: Path, keys: Keys, first: int, count: int) -> Iterator[Pair | Fault]:
    """Images with the prompt in their metadata, as A1111, ComfyUI, InvokeAI, NovelAI and Fooocus write it."""
    parser = metadata_parser()
    files = Files(path)
    for name in [name for name in files.names() if is_image(name)][first : first + count]:
        content = files.read(name)
        yield content if isinstance(content, Fault) else read_prompt(name, content, parser)


def metadata_parser():
    """The parser of generators' metadata; ValueError if its package is missing."""
    try:
        from sd_parsers import ParserManager
    except ImportError as error:
        raise ValueError(
            "images that carry their prompt are read by sd-parsers, which is missing: pip install -e '.[import]'"
        ) from error
    return ParserManager()


def read_prompt(name: str, content: bytes, parser) -> Pair | Fault:
    """The pair in an image: its prompt, generator, model, seed and sampler."""
    from sd_parsers import Eagerness

    try:
        # the slow search looks for prompts hidden in pixels
        parsed = parser.parse(io.BytesIO(content)) or parser.parse(io.BytesIO(content), Eagerness.EAGER)
    except UnidentifiedImageError:  # its message holds a memory address, which differs between runs
        return Fault(name, "it is no image of a known format")
    except Exception as error:  # damaged metadata can raise any error
        return Fault(name, f"it cannot be read ({type(error).__name__}: {error})")
    prompts = list(dict.fromkeys(prompt.value for prompt in parsed.prompts if prompt.value)) if parsed else []
    if len(prompts) != 1:
        several = f"{len(prompts)} different prompts in one image"
        return Fault(name, several if prompts else "no text: no generator has written its prompt into it")
    fields = {"tool": parsed.generator.value if parsed.generator else ""}
    for sampler in parsed.samplers[:1]:
        model = sampler.model.name if sampler.model else None
        fields |= {"seed": sampler.parameters.get("seed", ""), "sampler": sampler.name, "model": model or ""}
    fields["generator"] = fields.get("model") or fields["tool"]
    return Pair(name, content, prompts[0], fields, None, fields["tool"])
