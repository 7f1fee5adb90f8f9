"""kernel-metadata.json: the client ignores unknown keys in silence and defaults to internet on, so that we look."""

import json
import re

import pytest

from kutils.kaggle.metadata import KERNEL_KEYS, slugify
from kutils.system import paths

FOLDER = paths.repository_root() / "kernel-metadata"
KERNELS = sorted(FOLDER.glob("*/kernel-metadata.json"))
DATASETS = sorted(FOLDER.glob("*/dataset-metadata.json"))
COMPETITIONS = {"submission": ["stable-diffusion-image-to-prompts"], "train": []}


def test_kernels_and_data_sets_are_described():
    assert [path.parent.name for path in KERNELS] == ["submission", "train"]
    assert [path.parent.name for path in DATASETS] == ["code", "weights"]
    assert {source for path in KERNELS for source in json.loads(path.read_text())["dataset_sources"]} == {
        json.loads(path.read_text())["id"] for path in DATASETS
    }


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: path.parent.name)
def test_a_data_set_has_what_the_client_wants(path):
    values = json.loads(path.read_text())
    owner, slug = values["id"].split("/")
    assert set(values) == {"id", "title", "licenses"} and owner == "INSERT_KAGGLE_NAME_HERE"
    assert 6 <= len(slug) <= 50 and 6 <= len(values["title"]) <= 50
    assert len(values["licenses"]) == 1 and set(values["licenses"][0]) == {"name"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.parent.name)
def test_the_metadata_is_what_the_client_reads(path):
    values = json.loads(path.read_text())
    assert set(values) <= set(KERNEL_KEYS)
    for key in ("is_private", "enable_gpu", "enable_internet"):
        assert values[key] in ("true", "false")
    assert values["enable_internet"] == "false"  # a version saved with internet on cannot be submitted
    assert values["enable_gpu"] == "true" and values["machine_shape"] == "NvidiaTeslaT4"
    assert values["language"] == "python" and values["kernel_type"] == "notebook"
    assert values["competition_sources"] == COMPETITIONS[path.parent.name]
    for key in ("dataset_sources", "competition_sources", "kernel_sources", "model_sources"):
        assert isinstance(values[key], list) and all(isinstance(source, str) for source in values[key])

    # names: one owner everywhere, the placeholder in what is committed; the title gives the slug
    owner, slug = values["id"].split("/")
    assert owner == "INSERT_KAGGLE_NAME_HERE" and len(slug) >= 5
    assert slugify(values["title"]) == slug
    for source in values["dataset_sources"]:
        assert re.fullmatch(rf"{owner}/[a-z0-9-]{{6,50}}", source)

    # the client joins code_file to the metadata's folder, and only uploads that file
    notebook = (path.parent / values["code_file"]).resolve()
    assert notebook.parent == paths.repository_root() / "notebooks"
    content = json.loads(notebook.read_text())
    assert content["metadata"]["kernelspec"]["name"] == "python3"  # without it the kernel dies at once
    assert notebook.stat().st_size < 500_000
