"""Reads recipes strictly: one complete YAML file each; `key=value` changes pass the same checks."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from pathlib import Path

import yaml

from kutils.runs.published_names import hint
from kutils.runs.recipe_keys import ConfigError, Recipe
from kutils.system import paths

FROM_PACKAGE = "package"  # of the key `pretrained`
HINTS = typing.get_type_hints(Recipe)


class UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML would silently use the last value."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"line {node.start_mark.line + 1}: given twice: {', '.join(twice)}")
        return super().construct_mapping(node, deep)


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' if a known name is close, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def split_names(text: str | float) -> list[str]:
    """Split a notebook's parameter such as `a, b` at its commas; an empty text gives an empty list.

    Papermill turns a single number, as in `-p seeds 0`, into one.
    """
    return [name.strip() for name in str(text).split(",") if name.strip()]


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; ConfigError (naming the file) for anything else."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no `key: value` lines")
    return values


def unknown_key(name: str) -> str:
    """The end of an error about an unknown key: its name here if it is the published code's, else the nearest key."""
    return hint(name) or nearest(name, HINTS)


def convert(key: str, value, hint):
    """Convert `value`, from YAML or the command line, to the type `hint`; ConfigError if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # bool | str, str | None
        if value is None or (value in ("", "null", "none") and type(None) in arguments):
            if type(None) in arguments:
                return None
        elif bool in arguments and (isinstance(value, bool) or str(value).lower() in ("true", "false")):
            return convert(key, value, bool)
        elif isinstance(value, str):
            return value
    elif origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and (arguments[-1] is Ellipsis or len(items) == len(arguments)):
            return tuple(convert(key, item.strip() if isinstance(item, str) else item, arguments[0]) for item in items)
        if isinstance(items, int) and not isinstance(items, bool) and arguments[-1] is Ellipsis:
            return (convert(key, items, arguments[0]),)
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-5 as text
            if hint is float or number == int(number):
                return hint(number) if hint is float else int(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif hint is str and isinstance(value, str):
        return value
    wanted = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ConfigError(f"{key} is {value!r}; it takes {wanted}")


def parse_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """`key=value` texts to a dict; ConfigError for a text without `=`, an unknown key or a key given twice."""
    values: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} is no override; write key=value, for example epochs=1")
        if key not in HINTS:
            raise ConfigError(f"a recipe has no key {key!r}{unknown_key(key)}")
        if key in values:
            raise ConfigError(f"{key} is given twice: {values[key]} and {value}")
        values[key] = value
    return values


def find_config(name: str | Path) -> Path:
    """The recipe file: the path as given, else the same path or file name in the repository's `conf/`."""
    given = Path(name)
    if given.is_file():
        return given.absolute()
    candidates = [given, paths.repository_root() / given, paths.conf_dir() / given.name]
    for path in candidates:
        if path.is_file():
            return path.absolute()
    known = [path.name for path in sorted(paths.conf_dir().glob("*.yaml"))]
    places = ", ".join(map(str, dict.fromkeys(candidates)))
    raise ConfigError(f"no recipe file {name}{nearest(given.name, known)} (looked at {places})")


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read one recipe file and apply `key=value` overrides; ConfigError as `from_values` raises it."""
    path = find_config(path)
    return from_values(read_yaml(path) | parse_overrides(overrides), path)


def from_values(values: dict, source: Path) -> Recipe:
    """Make a recipe from values in the types of YAML, JSON and overrides.

    Raises: ConfigError naming source, key and value: unknown key (with the nearest known one), wrong type, missing key,
        or a combination that makes no sense.
    """
    for key in values:
        if key not in HINTS:
            raise ConfigError(f"{source}: a recipe has no key {key!r}{unknown_key(str(key))}")
    missing = [
        item.name
        for item in dataclasses.fields(Recipe)
        if item.default is dataclasses.MISSING and item.name not in values
    ]
    if missing:
        raise ConfigError(f"{source} lacks {', '.join(missing)}")
    try:
        return Recipe(**{key: convert(key, value, HINTS[key]) for key, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def recipe_files() -> dict[tuple[str, int], Path]:
    """(model, stage) -> file, over all recipes in `conf/`."""
    files: dict[tuple[str, int], Path] = {}
    for path in sorted(paths.conf_dir().glob("*.yaml")):
        values = read_yaml(path)
        if "backbone" not in values:  # an ensemble, not a recipe
            continue
        key = (str(values.get("model")), int(values.get("stage", 1)))
        if key in files:
            raise ConfigError(f"{path} and {files[key]} are both for model {key[0]}, stage {key[1]}")
        files[key] = path
    return files


def find_recipe(model: str, stage: int) -> Path:
    """The recipe file of a model and stage; ConfigError naming the nearest model or the stages there are."""
    files = recipe_files()
    if (model, stage) in files:
        return files[model, stage]
    stages = sorted(known_stage for known, known_stage in files if known == model)
    if stages:
        raise ConfigError(
            f"model {model!r} has recipes for stages {', '.join(map(str, stages))}, none for stage {stage}"
        )
    known = sorted({known for known, _ in files})
    raise ConfigError(f"no recipe for model {model!r}{nearest(model, known)} (there are {', '.join(known)})")


def describe_keys() -> str:
    """Every recipe key with its type, default and meaning: the text of `--help`."""
    lines = []
    for item in dataclasses.fields(Recipe):
        hint = HINTS[item.name]
        kind = hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)
        default = "required" if item.default is dataclasses.MISSING else f"default {item.default!r}"
        choices = f" one of {', '.join(map(str, item.metadata['choices']))};" if item.metadata["choices"] else ""
        lines.append(f"  {item.name}: {item.metadata['help']} ({kind};{choices} {default})")
    return "\n".join(lines)
