"""Exported files against PyTorch, timm and the checkpoints they come from."""

import ctypes
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copy
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import timm
import torch
from helpers import edit, near
from PIL import Image
from tiny_files import classifier_file
from tiny_graphs import MEAN, ONE_STAGE, SHALLOW, STD, broken, detector, noise, raw_plan

from dualtoken_vit import create_segmenter, load_model, load_predictor
from dualtoken_vit.bounds import parse_size
from dualtoken_vit.checkpoint import store_preprocessing
from dualtoken_vit.cli import run
from dualtoken_vit.deploy import graphs
from dualtoken_vit.deploy.convert import ConversionError, silent, to_onnx
from dualtoken_vit.deploy.export import _verify, export
from dualtoken_vit.deploy.mobile import run_litert, to_litert
from dualtoken_vit.deploy.plans import Plan
from dualtoken_vit.deploy.verify import difference, expected
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.resizing import Transform
from dualtoken_vit.paper import named
from dualtoken_vit.paper.attention import recording
from dualtoken_vit.paper.benchmark import benchmark
from dualtoken_vit.runtime.session import KEY, ExportedModel

ABOUT = {
    "versions": {"dualtoken-vit": "0"},
    "format": "dualtoken-vit export 1",
    "task": "classification",
    "model": "dualtoken_vit_tiny",
    "model_args": {},
    "metrics": {},
    "class_names": ["a"],
    "preprocessing": {"input_size": [3, 32, 32], "mean": MEAN, "std": STD},
    "export": {"size": None, "raw": False},
    "recipe": {},
    "category_ids": [],
}


def onnx_file(folder: Path, plan: Plan) -> ExportedModel:
    (path := folder / "model.onnx").write_bytes(to_onnx(plan, 3, ABOUT))
    return ExportedModel(path)


SWITCHES = [
    {"token_grid": 0},
    {"token_mlp": "mix", "token_grid": 5, "grid_resize": "antialias"},
    {"global_tokens": "normal", "downsampling": "onestep"},
    {"global_tokens": "normal_star", "local_attention": "window"},
    "lightvit_tiny",
    "mobilenetv2_100",
]


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_of_the_network_at_any_size(switch, tmp_path):
    torch.manual_seed(0)
    name, args = ("dualtoken_vit_tiny", SHALLOW | switch) if isinstance(switch, dict) else (switch, {})
    args |= SHALLOW if name == "lightvit_tiny" else {}
    model = timm.create_model(name, num_classes=5, **args).eval()
    network = onnx_file(tmp_path, Plan(graphs.Classifier(model, MEAN, STD), ("logits",), (64, 64)))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    for shape in ((1, 3, 64, 64), (3, 3, 97, 131), (2, 3, 160, 33)):
        x = noise(*shape)
        with torch.inference_mode():
            expected = model((x - mean) / std).numpy()
        assert np.abs(network(x.numpy())["logits"] - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "args"), [("deeplabv3", {}), ("pspnet", {}), ("lraspp", {}), ("deeplabv3", {"output_stride": 16})]
)
def test_segmenters_at_any_size(kind, args, tmp_path):
    torch.manual_seed(0)
    model = create_segmenter(kind, "dualtoken_vit_tiny", 4, width=16, **SHALLOW, **args).eval()
    network = onnx_file(tmp_path, Plan(model, ("logits",), (64, 96)))
    for shape in ((2, 3, 64, 96), (1, 3, 97, 131), (3, 3, 33, 70)):
        x = noise(*shape)
        with torch.inference_mode():
            expected = model(x).numpy()
        found = network(x.numpy())["logits"]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_STAGE)
def test_all_anchors_at_any_size(kind, tmp_path):
    chosen = raw_plan(detector(kind, image_size=64))
    graph, network = chosen.graph.eval(), onnx_file(tmp_path, chosen)
    for shape in ((1, 3, 64, 96), (2, 3, 160, 128), (1, 3, 97, 131)):
        x = noise(*shape)
        with torch.inference_mode():
            boxes, scores = graph(x)
        found = network(x.numpy())
        assert found["boxes"] == pytest.approx(boxes.numpy(), abs=1e-3)
        assert found["scores"] == pytest.approx(scores.numpy(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fcos", "ssdlite"])
def test_the_file_of_a_detector_is_its_graph(kind, tmp_path):
    graph = graphs.DenseGraph(detector(kind, image_size=64, max_size=96)).eval()
    names = ("boxes", "scores", "labels")
    network = onnx_file(tmp_path, Plan(graph, names, (64, 96), fixed=True, one=True))
    x = noise(1, 3, 64, 96)
    with torch.inference_mode():
        expected = dict(zip(names, (value.numpy() for value in graph(x)), strict=True))
    assert (expected["labels"] >= 0).sum() > 20
    assert difference(expected, network(x.numpy()), 96) < 1e-5
    assert np.isnan(network(broken(x).numpy())["scores"]).all()


@pytest.mark.slow
def test_a_mask_rcnn_with_and_without_objects(tmp_path):
    model = detector("mask-rcnn", image_size=64, max_size=96)
    images = [noise(1, 3, 64, 96), torch.zeros(1, 3, 64, 96)]
    with torch.inference_mode():
        highest = [model(list(image))[0]["scores"].max().item() for image in images]
    model.score_thresh = sum(highest) / 2
    outputs = "boxes", "scores", "labels", "masks"
    plan = Plan(graphs.MaskGraph(model).eval(), outputs, (64, 96), fixed=True, one=True)
    networks = [onnx_file(tmp_path, plan), ExportedModel(tmp_path / "model.onnx", "openvino")]
    counts = []
    for image in images:
        ours = expected(plan, image.numpy())
        counts.append((ours["labels"] >= 0).sum())
        for network in networks:
            assert difference(ours, network(image.numpy()), 96) < 1e-4
    assert min(counts) == 0 < max(counts)
    # OpenVINO's ReLU makes 0 of NaN, so that there may be none in its outputs.
    assert np.isnan(networks[0](broken(images[0]).numpy())["scores"]).all()


@pytest.mark.slow
def test_the_file_describes_itself_and_names_no_place(checkpoint, exported):
    model = onnx.load(exported)
    about = json.loads({entry.key: entry.value for entry in model.metadata_props}[KEY])
    assert about["class_names"] == ["blue", "green", "red"]
    assert about["metrics"] == {"top1": 0.5}
    assert about["export"] | {"attention": ""} == {"size": None, "raw": False, "precision": "float32", "attention": ""}
    assert (about["recipe"]["data"]["root"], about["recipe"]["model"]["checkpoint"]) == ("", None)
    data = exported.read_bytes()
    for place in (Path.cwd(), Path.home(), checkpoint.parent, Path(torch.__file__).parents[1]):
        assert str(place).encode() not in data
    onnx.checker.check_model(model)


@pytest.mark.slow
def test_attention_maps_are_those_of_pytorch(checkpoint, exported):
    model, _ = load_model(checkpoint)
    network = ExportedModel(exported)
    for shape in ((1, 3, 64, 64), (2, 3, 97, 131)):
        x = noise(*shape)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
        with torch.inference_mode(), recording(model) as maps:
            model((x - mean) / std)
        expected = list(maps.values())[-1].numpy()
        assert network(x.numpy())["attention"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_the_commands_take_the_file(checkpoint, exported, photos, capsys):
    results = []
    for path in (checkpoint, exported):
        assert run(["evaluate", str(path), "--data.root", str(photos), "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[1] == near(results[0], 1e-4)
    before, after = (load_predictor(path)(photos / "val") for path in (checkpoint, exported))
    assert [one.labels.tolist() for one in before] == [one.labels.tolist() for one in after]
    assert run(["predict", str(exported), str(photos / "val"), "--json", "--runtime", "openvino"]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert [one["classes"][0]["class"] for one in found] == [one.name for one in after]
    shares = [one["classes"][0]["probability"] for one in found]
    assert shares == pytest.approx([one.probability for one in after], abs=1e-4)
    with pytest.raises(InputError, match=r"--precision bf16-mixed: .* has a precision of its own; leave it out"):
        run(["evaluate", str(exported), "--data.root", str(photos), "--precision", "bf16-mixed"])


@pytest.mark.slow
def test_export_evaluates_the_file_on_the_data_of_the_run(checkpoint, photos, tmp_path, capsys):
    """Without --data.root: the checkpoint knows its data, the exported file has no paths."""
    path, here = tmp_path / "best.safetensors", str(Path.cwd())
    edit(checkpoint, path, metadata=lambda found: {k: value.replace(here, str(photos)) for k, value in found.items()})
    assert run(["export", str(path), "--evaluate"]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.partition(": ")[0] for line in lines] == [str(path), str(tmp_path / "model.onnx")]
    assert run(["evaluate", str(path), "--data.root", str(photos)]) == 0
    expected = capsys.readouterr().out.splitlines()[-1]
    assert [expected.startswith(line.partition(": ")[2]) for line in lines] == [True, True]


@pytest.mark.slow
def test_a_file_of_another_size_is_evaluated_as_it_predicts(checkpoint, photos, tmp_path, capsys):
    out, data = tmp_path / "model.onnx", ["--data.root", str(photos)]
    assert run(["export", str(checkpoint), "--out", str(out), "--size", "96", "--evaluate", *data]) == 0
    before, after = (line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()[-2:])
    assert before == after
    results = []
    for path, *size in ((checkpoint, "--data.image-size", "96"), (out,), (checkpoint,)):
        assert run(["evaluate", str(path), *data, *size, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[1] == near(results[0], 1e-4)
    assert abs(results[2]["loss"] - results[0]["loss"]) > 1e-3  # the size makes a difference


@pytest.mark.slow
def test_attention_divides_by_the_temperature(checkpoint, photos, tmp_path, capsys):
    path, found = tmp_path / "best.safetensors", []
    copy(checkpoint, path)
    store_preprocessing(path, temperature=4.0)
    file = export(str(path), str(tmp_path / "calibrated.onnx"), attention=True)
    capsys.readouterr()
    image = str(photos / "val" / "red" / "0.jpg")
    for each in (path, file, checkpoint):
        assert run(["attention", str(each), image, "--token", "1,0", "--out", str(tmp_path / each.stem), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["images"][0]["probability"])
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert abs(found[2] - found[0]) > 1e-2


@pytest.mark.slow
def test_attention_and_benchmark_take_the_file(checkpoint, exported, photos, tmp_path, capsys):
    maps = []
    image = str(photos / "val" / "red" / "0.jpg")
    for path, *runtime in ((checkpoint,), (exported,), (exported, "--runtime", "openvino")):
        out = tmp_path / str(len(maps))
        assert run(["attention", str(path), image, "--token", "1,0", "--out", str(out), *runtime]) == 0
        maps.append(np.load(out / "0.jpg.npy"))
    for others in maps[1:]:
        assert others == pytest.approx(maps[0], abs=1e-5)
    with pytest.raises(InputError, match="--runtime openvino: for files that dualtoken-vit export wrote"):
        run(["attention", str(checkpoint), image, "--runtime", "openvino", "--out", str(tmp_path / "other")])
    with pytest.raises(InputError, match="--token ROW,COL is needed with an exported file"):
        run(["attention", str(exported), image, "--out", str(tmp_path / "other")])
    (result,) = benchmark(
        (f"onnxruntime:{exported}",), input_sizes=("64",), batch_sizes=(2,), modes=("eager",), rounds=1, memory=False
    )
    model = timm.create_model("dualtoken_vit_tiny", num_classes=3, **SHALLOW)
    assert result.params == sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(InputError, match="--train: onnxruntime:"):
        benchmark((f"onnxruntime:{exported}",), train=True)
    with pytest.raises(
        InputError, match=re.escape(f"onnxruntime:{exported}: exported files run on the CPU in a precision of their")
    ):
        benchmark((f"onnxruntime:{exported}",), precision=("float32", "bfloat16"))
    with pytest.raises(InputError, match=re.escape(f"onnxruntime:{exported} is given twice")):
        benchmark((f"onnxruntime:{exported}",) * 2)


def test_what_converters_print_is_shown_after_an_error_only(capfd, monkeypatch):
    @silent()
    def convert(error=None):
        os.write(2, b"converting\n")
        if os.name == "posix":
            ctypes.CDLL(None).printf(b"in C\n")
        subprocess.run([sys.executable, "-c", "print('done')"], check=True)
        if error:
            raise error

    for _ in range(2):
        print("ours")
        convert()
    print("the last")
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("ours\nours\nthe last\n", "")
    with pytest.raises(ValueError, match="no"):
        convert(ValueError("no"))
    assert sorted(capfd.readouterr().err.splitlines()) == ["converting", "done", *["in C"] * (os.name == "posix")]
    monkeypatch.setattr(sys, "stdout", None)  # closed
    convert()
    assert sorted(capfd.readouterr().err.splitlines()) == ["converting"]


def test_a_file_in_the_place_of_a_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("dualtoken_vit.deploy.export.NEEDED", {"litert": ()})
    (tmp_path / "file").write_text("")
    for out in ("file/model.tflite", "file/more/model.tflite"):
        with pytest.raises(InputError, match=r"cannot write .*model\.tflite: "):
            export(checkpoint, tmp_path / out, format="litert")


@pytest.mark.slow
def test_litert_files(checkpoint, tmp_path):
    pytest.importorskip("litert_torch")
    file = tmp_path / "model.tflite"
    # In a process of its own: pytest's sys.stdout is not the file 1, which the converter's prints are kept from.
    command = [sys.executable, "-m", "dualtoken_vit", "export", checkpoint, "--format", "litert", "--out", file]
    printed = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    assert [line.partition(" ")[0] for line in printed.stdout.splitlines()] == ["largest", f"{file}:"]
    assert [line.split()[0] for line in printed.stderr.splitlines()] == ["converting", "verifying"]
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read(f"{KEY}.json"))["class_names"] == ["blue", "green", "red"]
    classifier = graphs.Classifier(load_model(checkpoint)[0], MEAN, STD)
    torch.manual_seed(0)
    segmenter = create_segmenter("pspnet", "dualtoken_vit_tiny", 4, width=16, **SHALLOW).eval()
    to_litert(Plan(segmenter, ("logits",), (64, 96), one=True, fixed=True), 3, ABOUT, tmp_path / "segmenter.tflite")
    for path, model, width in ((file, classifier, 64), (tmp_path / "segmenter.tflite", segmenter, 96)):
        x = noise(1, 3, 64, width)
        with torch.inference_mode():
            expected = model(x).numpy()
        found = run_litert(path, ("logits",), x.numpy())["logits"]
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_coreml_files(checkpoint, tmp_path):
    """Their description everywhere, and on a Mac, which alone can run them, their logits."""
    coremltools = pytest.importorskip("coremltools")
    file = export(checkpoint, tmp_path / "model.mlpackage", format="coreml")
    about = coremltools.models.MLModel(str(file), skip_model_load=True).get_spec().description
    (image,), (logits,) = about.input, about.output
    assert (image.name, list(image.type.multiArrayType.shape)) == ("image", [1, 3, 64, 64])
    assert (logits.name, list(logits.type.multiArrayType.shape)) == ("logits", [1, 3])
    assert json.loads(about.metadata.userDefined[KEY])["class_names"] == ["blue", "green", "red"]
    if sys.platform == "darwin":
        x = noise(1, 3, 64, 64)
        with torch.inference_mode():
            expected = graphs.Classifier(load_model(checkpoint)[0], MEAN, STD)(x).numpy()
        found = coremltools.models.MLModel(str(file)).predict({"image": x.numpy()})["logits"]
        assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    with pytest.raises(InputError, match=r"model.mlpackage: a folder; remove it"):
        export(checkpoint, file, format="coreml")


def test_options_that_cannot_be_used(checkpoint, tmp_path, monkeypatch):
    other = tmp_path / "kept.onnx"
    other.write_text("kept")
    for options, message in (
        ({"raw": True}, "--raw: only RetinaNet, FCOS and SSDLite"),
        ({"size": "64x32"}, "--size 64x32: classifiers take square images"),
        ({"size": "8"}, "--size 8: give pixels as 224"),
        ({"size": "x"}, "--size x: give pixels as 224"),
        ({"int8": "static"}, "--int8 static needs --images FOLDER"),
        ({"int8": "dynamic", "fp16": True}, "--int8, --fp16: give one of them"),
        ({"out": tmp_path / "model.pb"}, "name a file that ends with .onnx"),
        ({"out": tmp_path}, "name a file that ends with .onnx"),
        ({"images": tmp_path / "none"}, "--images .*none: not a folder of images"),
    ):
        with pytest.raises(InputError, match=message):
            export(checkpoint, **({"out": other} | options))
    for command in (["export", str(tmp_path / "best.safetensors")], ["export", str(tmp_path / "a"), "--int8"]):
        with pytest.raises(InputError, match="no such checkpoint"):
            run(command)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match="--format onnx needs onnxscript: pip install"):
        export(checkpoint, other)
    for format, module, suffix in (("litert", "litert_torch", ".tflite"), ("coreml", "coremltools", ".mlpackage")):
        monkeypatch.setitem(sys.modules, module, None)
        message = rf'--format {format} needs {module}.*: pip install -e "\.\[{format}\]"'
        with pytest.raises(InputError, match=message):
            export(checkpoint, tmp_path / f"model{suffix}", format=format)
    assert other.read_text() == "kept"
    assert not list(tmp_path.glob("model.*"))


def test_the_size_for_most_images():
    """The short side is resized to 320 unless the long one would exceed 512; then both are padded to a multiple."""
    model, multiple = detector("ssdlite", image_size=320, max_size=512), 32
    sizes = (480, 640), (640, 480), (1280, 960), (2000, 500)
    assert model.transform.size_divisible == multiple
    assert model.transform.usual(sizes) == (320, 448)  # 640x480 -> 427x320, twice
    assert model.transform.usual(sizes[-1:]) == (128, 512)


@pytest.mark.parametrize(("stored", "size"), [({"usual_size": [64, 96]}, (64, 96)), ({}, None)])
def test_a_detector_s_file_has_the_size_of_most_training_images(tmp_path, monkeypatch, stored, size):
    module = sys.modules["dualtoken_vit.deploy.export"]
    about = SimpleNamespace(task="detection", preprocessing={"input_size": [3, 64, 64]} | stored, recipe={})
    model = SimpleNamespace(transform=Transform(64, 96, (), (0, 0, 0), (1, 1, 1)))
    monkeypatch.setattr(module, "load_model", lambda path: (model, about))

    def planned(model, about, size, *options):
        raise InputError(f"size {size}")

    monkeypatch.setattr(module, "plan", planned)
    with pytest.raises(InputError, match=re.escape(f"size {size}")):
        export(tmp_path / "best.safetensors")
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=re.escape("size (64, 96)")):  # 64 x 96 of a short side of 64
        export(tmp_path / "best.safetensors", images=tmp_path)
    with pytest.raises(InputError, match=re.escape("size (40, 50)")):
        export(tmp_path / "best.safetensors", images=tmp_path, size="50x40")
    about.recipe = {"data": {"tile": 640}}
    with pytest.raises(InputError, match=re.escape("size (64, 64)")):  # that of tiles, not of images
        export(tmp_path / "best.safetensors", images=tmp_path)


def test_sizes():
    assert parse_size("224", "--size") == (224, 224)
    assert parse_size("640x480", "--size") == (480, 640)


@pytest.mark.slow
def test_a_network_whose_graph_is_of_one_size(tmp_path, capsys):  # MobileViT folds the map into patches
    torch.manual_seed(0)
    model = timm.create_model("mobilevit_xxs", num_classes=3).eval()
    file = export(classifier_file(tmp_path / "best.safetensors", model, {}))
    assert "takes images of 64x64" in capsys.readouterr().out
    x = noise(2, 3, 64, 64)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    with torch.inference_mode():
        wanted = model((x - mean) / std).numpy()
    np.testing.assert_allclose(ExportedModel(file)(x.numpy())["logits"], wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_file_that_differs_is_not_kept(checkpoint, tmp_path, monkeypatch):
    from dualtoken_vit.deploy import export as module

    monkeypatch.setattr(module, "to_onnx", lambda *args: b"")
    monkeypatch.setattr(module, "ExportedModel", lambda path: lambda image: {"logits": np.zeros((len(image), 3))})
    with pytest.raises(InputError, match=r"above 0.0001, the file is not kept"):
        export(checkpoint, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_nan_in_any_output_is_a_difference():
    ones, bad = np.ones((1, 2), np.float32), np.array([[1, np.nan]], np.float32)
    for ours, theirs in (((ones, ones), (ones, bad)), ((ones, bad), (ones, ones))):
        names = "logits", "attention"
        assert not difference(dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True)), 32) < np.inf


def test_nan_for_any_image_is_refused():
    class Doubled(torch.nn.Module):
        def forward(self, image):
            return image.mean((1, 2, 3))[:, None] * 2

    def network(image):
        outputs = {"logits": image.mean((1, 2, 3))[:, None] * 2}
        return outputs if len(image) == 1 else {"logits": outputs["logits"] * np.nan}

    images = [np.ones((count, 3, 32, 32), np.float32) for count in (1, 3)]
    with pytest.raises(ConversionError, match="nan"):
        _verify(network, Plan(Doubled(), ("logits",), (32, 32)), images)


@pytest.mark.parametrize("threads", [(1, 2), (2, 1)])
def test_exported_files_have_the_threads_that_are_measured(exported, monkeypatch, threads):
    built = []

    def build(file, runtime, count):
        built.append(count)
        return ExportedModel(file, runtime, count)

    monkeypatch.setattr(named, "ExportedModel", build)
    quick = dict(batch_sizes=(1,), modes=("eager",), rounds=1, visit_seconds=0, memory=False)
    benchmark((f"onnxruntime:{exported}",), input_sizes=("64",), threads=threads, **quick)
    assert built[-2:] == list(threads)
