"""Pretrained weights: from files, folders and a model hub (a small one on this machine), and clear errors."""

import http.server
import os
import subprocess
import threading

import pytest
import safetensors.torch
import timm
import torch
from fixtures.forked_python import REAL_PYTHON
from fixtures.payload import Payload

from kutils import __main__
from kutils.models import pretrained
from kutils.models.networks import build_model
from kutils.models.pretrained import create_backbone
from kutils.system.paths import repository_root

ROOT = repository_root()
TAGGED = "test_convnext.r160_in1k"


@pytest.fixture(scope="module")
def source():
    """A network whose weights are recognised: one bias is 0.125."""
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", pretrained=False)
    with torch.no_grad():
        model.stem[0].bias.fill_(0.125)
    return model


@pytest.mark.parametrize("suffix", pretrained.SUFFIXES)
@pytest.mark.parametrize("as_folder", [False, True])
def test_weights_from_a_file_or_a_folder(tmp_path, tiny_recipe, source, suffix, as_folder):
    path = tmp_path / f"test_convnext{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    model = build_model(tiny_recipe(pretrained=str(tmp_path if as_folder else path)))
    assert torch.equal(model.backbone.stem[0].weight, source.stem[0].weight)
    assert (model.backbone.stem[0].bias == 0.125).all()


@pytest.mark.parametrize(("content", "said"), [(None, "no such file"), (b"rubbish", "could not be loaded from")])
def test_weights_that_cannot_be_had(tmp_path, tiny_recipe, content, said):
    path = tmp_path / "weights.safetensors"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        build_model(tiny_recipe(pretrained=str(path)))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("classes", [0, 7, 1000])
def test_a_last_layer_of_any_size_is_taken_off(tmp_path, tiny_recipe, classes):
    source = timm.create_model("test_vit", num_classes=classes)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = build_model(tiny_recipe(backbone="test_vit", input_size=160, pretrained=str(tmp_path / "w.pth")))
    assert "state_dict" not in model.backbone.pretrained_cfg
    names = [name for name in source.state_dict() if not name.startswith("head.")]
    assert list(model.backbone.state_dict()) == names
    assert all(torch.equal(model.backbone.state_dict()[name], source.state_dict()[name]) for name in names)


def test_weights_of_another_network(tmp_path, tiny_recipe, source):
    """timm alone would start from random weights without a word: it is not strict when the last layer is left out."""
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"weights of test_vit could not be loaded from .*w\.pth"):
        build_model(tiny_recipe(backbone="test_vit", pretrained=str(tmp_path / "w.pth")))


def test_no_code_of_a_weights_file_is_run(tmp_path):
    torch.save({"x": Payload(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError):
        create_backbone("test_convnext", str(tmp_path / "evil.pth"), keep_projection=False)
    assert not (tmp_path / "owned").exists()


def test_a_folder_without_the_file_says_what_it_holds(tmp_path, tiny_recipe):
    (tmp_path / "other.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"holds no test_convnext.safetensors .* but other.safetensors; kutils pretrained"
    ):
        build_model(tiny_recipe(pretrained=str(tmp_path)))


def test_the_hub_out_of_reach(tiny_recipe):
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(ValueError, match=r"from the model hub: .*\n.*pretrained=PATH takes a weights file or a folder"):
        build_model(tiny_recipe(backbone=TAGGED, pretrained=True))


def test_unknown_backbone(tiny_recipe):
    with pytest.raises(ValueError, match="has no model 'convnext_gigantic'; it has convnext"):
        build_model(tiny_recipe(backbone="convnext_gigantic"))
    with pytest.raises(ValueError, match="has no weights 'r16' of test_convnext; it has r160_in1k"):
        build_model(tiny_recipe(backbone="test_convnext.r16"))


def test_which_weights_the_recipes_need():
    wanted = pretrained.wanted_backbones([])
    published = {
        name: [model for model in models if "_24gb" not in model and not model.startswith(("sd44m_", "beyond_"))]
        for name, models in wanted.items()
    }
    beyond = [model for models in wanted.values() for model in models if model.startswith("beyond_")]
    assert len(beyond) == 8 and all(models for models in wanted.values())
    published = {name: models for name, models in published.items() if models}
    assert published == {
        "convnext_large_mlp.clip_laion2b_ft_soup_320": ["convnext_large"],
        "convnext_xxlarge.clip_laion2b_rewind": ["convnext_xxlarge"],
        "vit_large_patch14_clip_224.laion2b": ["vit_large"],
        "eva02_large_patch14_448.mim_m38m_ft_in22k": ["eva02_large_clsavg", "eva02_large_clsonly"],
    }
    assert list(pretrained.wanted_backbones(["vit_large"])) == ["vit_large_patch14_clip_224.laion2b"]
    for name in pretrained.wanted_backbones([]):
        assert timm.get_pretrained_cfg(name).hf_hub_id, name


@pytest.fixture
def hub(source):
    """A model hub on the loopback that holds the weights of one network; its address."""
    content = safetensors.torch.save(source.state_dict())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            known = self.path == f"/timm/{TAGGED}/resolve/main/model.safetensors"
            self.send_response(200 if known else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"1234"')
            self.send_header("Content-Length", str(len(content) if known else 0))
            self.end_headers()
            return known

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_download_from_a_hub_for_a_machine_without_network(hub, source, tmp_path):
    """The hub's own client fetches; the second time nothing is asked for; the folder then serves offline."""
    folder = tmp_path / "weights"
    code = "import sys, pathlib\nfrom kutils.models import pretrained\n"
    code += "for name in sys.argv[2:]:\n    pretrained.download(pathlib.Path(sys.argv[1]), name)"
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    environment |= {
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }

    def run(*names):
        command = [REAL_PYTHON, "-c", code, str(folder), *names]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    assert run(TAGGED).returncode == 0
    path = folder / f"{TAGGED}.safetensors"
    before = path.stat().st_mtime_ns
    backbone = create_backbone(TAGGED, str(folder), keep_projection=False)
    assert torch.equal(backbone.stem[0].weight, source.stem[0].weight)
    environment["HF_HUB_OFFLINE"] = "1"
    failed = run(TAGGED, "test_vit.r160_in1k")
    assert path.stat().st_mtime_ns == before
    assert "ValueError: test_vit.r160_in1k could not be fetched from timm/test_vit.r160_in1k" in failed.stderr
    assert [file.name for file in folder.iterdir()] == [path.name]


def test_the_command_names_what_it_does_and_what_is_wrong(tmp_path, capsys, monkeypatch):
    def fetched(folder, name):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.safetensors").write_bytes(bytes(20_000_000))
        return folder / f"{name}.safetensors"

    monkeypatch.setattr(pretrained, "download", fetched)
    assert pretrained.main([str(tmp_path), "eva02_large_clsonly"]) == 0
    assert "eva02_large_patch14_448.mim_m38m_ft_in22k.safetensors: 0.02 GB" in capsys.readouterr().out
    assert __main__.run("pretrained", [str(tmp_path), "vit_lrge"]) == 1
    assert "did you mean 'vit_large'" in capsys.readouterr().err
