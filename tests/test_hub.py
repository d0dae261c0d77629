"""Trained networks on the Hugging Face Hub, with a server on this machine in its place."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from dualtoken_vit import load_predictor
from dualtoken_vit.checkpoint import read_checkpoint, save_checkpoint
from dualtoken_vit.errors import InputError
from dualtoken_vit.hub import model_card, push_to_hub, save_for_hub
from dualtoken_vit.models.segmenters import create_segmenter
from dualtoken_vit.recipes import RECIPES, ClassificationInput, to_dict
from dualtoken_vit.tasks.classification import data_config

ARGS = dict(dims=(16, 32, 32), depths=(1, 1, 1), head_hidden_size=32)
NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("dualtoken_vit_tiny", num_classes=3, **ARGS).eval()
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    save_checkpoint(
        path,
        model,
        task="classification",
        class_names=NAMES,
        preprocessing=data_config(model, ClassificationInput(image_size=64, crop_pct=1.0), 3),
        recipe=to_dict(RECIPES["folder"]),
        metrics={"epoch": 3, "val_top1": 0.875, "val_loss": 0.5},
        model_args=ARGS,
    )
    return path


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that uploads and downloads of small files need, for one repository."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    refuses = False

    @property
    def hub(self):
        return f"http://{self.headers['Host']}"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        found = {}
        if self.refuses:
            return self.answer(400, b'{"error": "no"}')
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            found = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"commitUrl": f"{self.hub}/me/pets/commit/1", "commitOid": "1" * 40}
        elif self.path == "/api/repos/create":
            found = {"url": f"{self.hub}/me/pets", "name": "me/pets"}
        return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def do_GET(self):
        name = self.path.partition("/resolve/main/")[2]
        if name in self.files:
            tag = hashlib.sha1(self.files[name]).hexdigest()
            return self.answer(200, self.files[name], ETag=f'"{tag}"', X_Repo_Commit="1" * 40)
        if name:
            return self.answer(404, X_Error_Code="EntryNotFound")
        found = {"id": "me/pets", "sha": "1" * 40, "siblings": [{"rfilename": name} for name in self.files]}
        return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    do_HEAD = do_GET


@pytest.fixture
def hub():
    """The address of a server in place of the Hub, which starts empty."""
    Hub.files, Hub.refuses = {}, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_files_of_a_repository(checkpoint, tmp_path):
    save_for_hub(checkpoint, tmp_path / "repo", "me/pets", about="Trained on pets.", license="mit")
    assert {path.name for path in (tmp_path / "repo").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    config = json.loads((tmp_path / "repo/config.json").read_text())
    assert config["architecture"] == "dualtoken_vit_tiny"
    assert config["label_names"] == [*NAMES]
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in config["model_args"].items()}
    assert args.items() >= ARGS.items()
    card = ModelCard.load(tmp_path / "repo/README.md")  # the Hub's own reader
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "timm",
        "image-classification",
    )
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.875)
    assert "Trained on pets." in card.text
    assert "- classes: `cat`, `dog`, `owl`\n- `val_top1`: 0.875\n- `val_loss`: 0.5\n" in card.text
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        save_for_hub(checkpoint, tmp_path / "repo", "me/pets")


def test_what_a_file_says_is_no_markdown(checkpoint):
    """Names are shown literally in one line, and metrics that are no finite numbers are left out."""
    names = ("a\n# b", "<img src=x>", "[`c`](http://d)")
    metrics = {"val_top1": "high", "val_loss": float("nan"), "val_n": 10**400, "val_m": None, "val_\n# e": 2, "step": 1}
    card = model_card(replace(read_checkpoint(checkpoint), class_names=names, metrics=metrics, model="`<b>"), "me/pets")
    shown = "- network: `<b>`\n- input: 64x64 pixels\n- classes: `a\\n# b`, `<img src=x>`, `[c](http://d)`\n"
    assert f"## Details\n\n{shown}- `val_\\n# e`: 2\n\n## Use" in card
    assert ModelCard(card).data.eval_results is None


def test_other_tasks_have_a_card_and_weights(tmp_path):
    model = create_segmenter("lraspp", "dualtoken_vit_tiny", 2, **ARGS).eval()
    save_checkpoint(
        tmp_path / "best.safetensors",
        model,
        task="segmentation",
        class_names=("sky", "ground"),
        preprocessing=data_config(model.backbone.model, ClassificationInput(image_size=64), 3),
        recipe=to_dict(RECIPES["masks-lite"]),
        metrics={"val_miou": 0.5},
        model_args={"segmenter": "lraspp", **ARGS},
    )
    save_for_hub(tmp_path / "best.safetensors", tmp_path / "repo", "me/ground")
    assert {path.name for path in (tmp_path / "repo").iterdir()} == {"README.md", "model.safetensors"}
    card = ModelCard.load(tmp_path / "repo/README.md")
    assert card.data.pipeline_tag == "image-segmentation"
    assert load_predictor(tmp_path / "repo/model.safetensors").class_names == ("sky", "ground")


def test_what_was_pushed_is_loaded_by_name(checkpoint, hub, tmp_path):
    """The address of the Hub is read when its client is imported: in a process of its own."""
    Image.new("RGB", (80, 60), (200, 30, 90)).save(tmp_path / "image.png")
    code = f"""
import json, timm, torch
from huggingface_hub import hf_hub_download
from dualtoken_vit import load_predictor
from dualtoken_vit.hub import push_to_hub

address = push_to_hub({str(checkpoint)!r}, "me/pets", token="hf_none")
model = timm.create_model("hf-hub:me/pets", pretrained=True).eval()
x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
found = load_predictor(hf_hub_download("me/pets", "model.safetensors"))({str(tmp_path / "image.png")!r})
config = timm.data.resolve_model_data_config(model)
print(json.dumps([address, model(x).tolist(), found.probabilities.tolist(), config["input_size"]]))
"""
    env = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    address, logits, probabilities, size = json.loads(done.stdout.splitlines()[-1])
    assert address == f"{hub}/me/pets/commit/1"
    assert set(Hub.files) == {"README.md", "config.json", "model.safetensors"}
    assert Hub.files["model.safetensors"] == checkpoint.read_bytes()
    x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    own = load_predictor(checkpoint)
    torch.testing.assert_close(torch.tensor(logits), own.model(x).detach(), rtol=1e-5, atol=1e-5)
    assert probabilities == pytest.approx(own(tmp_path / "image.png").probabilities.tolist(), abs=1e-6)
    assert size == [3, 64, 64]


def test_errors_of_the_hub_are_one_line(checkpoint, hub, monkeypatch, closed):
    Hub.refuses = True
    monkeypatch.setattr("dualtoken_vit.hub.HfApi", lambda token: HfApi(hub, token=token))
    with pytest.raises(InputError, match=r"^me/pets: cannot upload: Bad request"):
        push_to_hub(checkpoint, "me/pets", token="hf_none")
    monkeypatch.setattr("dualtoken_vit.hub.HfApi", lambda token: HfApi(closed, token=token))
    with pytest.raises(InputError, match=f"^me/pets: cannot upload: {closed} cannot be reached; check network and"):
        push_to_hub(checkpoint, "me/pets", token="hf_none")
    with pytest.raises(InputError, match="no such checkpoint"):
        push_to_hub(Path("nothing.safetensors"), "me/pets")
