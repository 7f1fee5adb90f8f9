"""kernel-metadata.json: the client ignores unknown keys in silence and defaults to internet on, so that we look."""

import json
import re

import pytest

from kutils import paths

FOLDER = paths.repository_root() / "kernel-metadata"
KERNELS = sorted(FOLDER.glob("*/kernel-metadata.json"))
# every key that `kaggle kernels push` reads (kaggle 2.2.5)
KEYS = {
    *("id", "id_no", "title", "code_file", "language", "kernel_type", "is_private", "enable_gpu", "enable_tpu"),
    *("enable_internet", "machine_shape", "dataset_sources", "competition_sources", "kernel_sources", "model_sources"),
    *("keywords", "docker_image", "docker_image_pinning_type"),
}


def test_the_submission_kernel_is_described():
    assert FOLDER / "submission" / "kernel-metadata.json" in KERNELS


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.parent.name)
def test_the_metadata_is_what_the_client_reads(path):
    values = json.loads(path.read_text())
    assert set(values) <= KEYS
    for key in ("is_private", "enable_gpu", "enable_internet"):
        assert values[key] in ("true", "false")
    assert values["enable_internet"] == "false"  # a version saved with internet on cannot be submitted
    assert values["enable_gpu"] == "true" and values["machine_shape"] == "NvidiaTeslaT4"
    assert values["language"] == "python" and values["kernel_type"] == "notebook"
    assert values["competition_sources"] == ["stable-diffusion-image-to-prompts"]
    for key in ("dataset_sources", "competition_sources", "kernel_sources", "model_sources"):
        assert isinstance(values[key], list) and all(isinstance(source, str) for source in values[key])

    # names: one owner everywhere, the placeholder in what is committed; the title gives the slug
    owner, slug = values["id"].split("/")
    assert owner == "INSERT_KAGGLE_NAME_HERE" and len(slug) >= 5
    assert re.sub(r"[^a-z0-9]+", "-", values["title"].lower()) == slug
    for source in values["dataset_sources"]:
        assert re.fullmatch(rf"{owner}/[a-z0-9-]{{6,50}}", source)

    # the client joins code_file to the metadata's folder, and only uploads that file
    notebook = (path.parent / values["code_file"]).resolve()
    assert notebook.parent == paths.repository_root() / "notebooks"
    content = json.loads(notebook.read_text())
    assert content["metadata"]["kernelspec"]["name"] == "python3"  # without it the kernel dies at once
    assert notebook.stat().st_size < 500_000
