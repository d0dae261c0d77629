"""Files that a stranger may have sent: none of them runs code, leads out of its folder or fills the memory."""

import io
import json
import os
import pickle
import socket
import zipfile
import zlib

import pytest
import torch
from PIL import Image
from test_predict import checkpoint  # noqa: F401  a fixture
from tiny_runs import recipe

from dualtoken_vit import cli, train
from dualtoken_vit.data.coco import read_coco
from dualtoken_vit.errors import InputError


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def malicious(kind: str, path, marker) -> None:
    """A pickle as it is, torch's zip archive of one, torch's older format, or a state dict that hides one."""
    payload = Payload(marker)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif kind == "state dict":
        torch.save({"state_dict": {"head.weight": torch.zeros(2)}, "extra": payload}, path)
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=kind == "zip")


KINDS = ["pickle", "zip", "old", "state dict"]


def test_the_payload_works(tmp_path):
    for number, kind in enumerate(KINDS):
        path, marker = tmp_path / f"{number}.pth", tmp_path / f"marker{number}"
        malicious(kind, path, marker)
        if kind == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert marker.is_dir()


COMMANDS = {
    "evaluate": "evaluate {file}",
    "predict": "predict {file} {images}",
    "attention": "attention {file} {images} --out {out}",
    "localise": "localise {file} --images {images} --json {file}",
    "export": "export {file} --out {out}.onnx",
    "benchmark": "benchmark onnxruntime:{file}",
    "checkpoint": "train folder --data.root {root} --model.checkpoint {file} --out {out}",
    "teacher": "train folder --data.root {root} --distill.teacher {file} --out {out}",
    "annotations": "train coco --data.images {images} --data.train-json {file} --data.val-json {file} --out {out}",
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt", ".onnx"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_unpickles_a_file(photos, tmp_path, command, suffix):
    for number, kind in enumerate(KINDS):
        file, marker = tmp_path / f"{number}{suffix}", tmp_path / f"marker{number}"
        malicious(kind, file, marker)
        images = photos / "val" / "red"
        args = COMMANDS[command].format(file=file, images=images, root=photos, out=tmp_path / f"out{number}")
        with pytest.raises((InputError, SystemExit)) as error:
            cli.run(args.split())
        assert not marker.exists()
        if isinstance(error.value, InputError):
            assert "\n" not in str(error.value)
            assert str(file) in str(error.value)
        assert not (tmp_path / f"out{number}").exists()


def test_last_ckpt_is_not_unpickled(photos, tmp_path):
    out = tmp_path / "run"
    train(recipe(photos, optim={"epochs": 1}), out)
    for number, kind in enumerate(KINDS):
        marker = tmp_path / f"marker{number}"
        malicious(kind, out / "last.ckpt", marker)
        with pytest.raises(InputError, match=r"last\.ckpt"):
            train(recipe(photos, optim={"epochs": 1}), out, resume=True)
        assert not marker.exists()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png", "../images-2/x.png"])
def test_file_names_stay_in_the_folder(tmp_path, name):
    images = [
        {"id": 1, "file_name": "a/x.png", "width": 4, "height": 4},
        {"id": 2, "file_name": name, "width": 4, "height": 4},
    ]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"images": images, "categories": [], "annotations": []}))
    coco, problems = read_coco(path, tmp_path / "images").sift(masks=False)
    assert [image["id"] for image in coco["images"]] == [1]
    assert problems == [f"image 2: its file_name {name!r} leads out of the folder of the images"]


def test_decompression_bombs(checkpoint, tmp_path, capsys):  # noqa: F811
    """A PNG of 400 megapixels in 50 kB, and an image with a compressed comment of 200 MB."""
    rows = zlib.compress(bytes(20_001 * 20_000), 9)
    header = (20_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    large = tmp_path / "large.png"
    large.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    assert large.stat().st_size < 1_000_000
    with pytest.raises(InputError, match=r"large\.png: more than [\d,]+ pixels; shrink or remove it"):
        cli.run(["predict", str(checkpoint), str(large)])

    plain = io.BytesIO()
    Image.new("RGB", (40, 30)).save(plain, "PNG")
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9))
    content = plain.getvalue()
    (tmp_path / "text.png").write_bytes(content[:33] + text + content[33:])
    with pytest.raises(InputError, match=r"text\.png: cannot be read as an image"):
        cli.run(["predict", str(checkpoint), str(tmp_path / "text.png")])


def test_a_checkpoint_that_claims_to_be_huge(tmp_path):
    """The header of a safetensors file, or an entry of torch's archive, of many gigabytes."""
    file = tmp_path / "best.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=r"best\.safetensors cannot be read"):
        cli.run(["evaluate", str(file)])
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(100_000_000))
    with pytest.raises(InputError, match=r"a\.pth cannot be read"):
        cli.run(["train", "demo", "--model.checkpoint", str(tmp_path / "a.pth"), "--out", str(tmp_path / "run")])


@pytest.mark.slow
def test_no_command_opens_a_connection(photos, tmp_path, monkeypatch, capsys):
    attempts, connect = [], socket.socket.connect  # a list: an error could be caught

    def refuse(self, address):
        if self.family == getattr(socket, "AF_UNIX", None):  # between a process and its data workers
            return connect(self, address)
        attempts.append(address)
        raise OSError("no network here")

    def refuse_name(host, *args, **kwargs):
        attempts.append(host)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse_name)
    network = "depths=(1,1,1) dims=(8,16,32) num_heads=(1,2,4) head_hidden_size=64"
    run = tmp_path / "run"
    best = run / "best.safetensors"
    for args in (
        f"train folder --data.root {photos} --model.args {network} --data.image-size 32 --optim.epochs 1 --out {run}",
        f"train folder --out {run} --resume",
        f"evaluate {best} --json",
        f"predict {best} {photos}/val --out {tmp_path / 'drawn'}",
        f"attention {best} {photos}/val/red --out {tmp_path / 'maps'}",
        f"export {best} --out {tmp_path / 'm.onnx'}",
        f"predict {tmp_path / 'm.onnx'} {photos}/val/red",
        f"check-data folder --data.root {photos} --out {tmp_path / 'check'}",
    ):
        assert cli.run(args.split()) == 0, args
        assert not attempts, args
