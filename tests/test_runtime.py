"""Predictors of exported files, against PyTorch's own: files here have hand-made graphs, which need no export."""

import errno
import json
import os
import shutil
import subprocess
import sys
import venv
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import tyro
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image
from timm.data import create_transform
from torch import nn
from torchvision.ops import batched_nms

from dualtoken_vit import cli, cli_runtime, load_predictor
from dualtoken_vit.arguments import Predict
from dualtoken_vit.deploy.quantise import quantise
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.resizing import Transform, paste_mask
from dualtoken_vit.models.segmenters import segment
from dualtoken_vit.predict import predict
from dualtoken_vit.recipes import Detection, SegmentationInput, to_dict
from dualtoken_vit.runtime import predictor as runtime
from dualtoken_vit.runtime.session import FORMAT, KEY, ExportedModel
from dualtoken_vit.show.drawing import MARGIN, SIDE

NAMES = ["a", "b", "c"]
WEIGHT = np.random.default_rng(0).normal(size=(3, 3, 3, 3)).astype(np.float32)


def description(task, **export):
    return {
        "format": FORMAT,
        "task": task,
        "model": "dualtoken_vit_tiny",
        "model_args": {},
        "metrics": {},
        "class_names": NAMES,
        "category_ids": [1, 2, 3] if task == "detection" else [],
        "preprocessing": {"input_size": (3, 64, 64), "mean": [0.5] * 3, "std": [1.0] * 3, "crop_pct": 0.875}
        | {"interpolation": "bicubic"},
        "recipe": {"data": {"image_size": None if task == "segmentation" else 64}},
        "export": {"size": None, "raw": False, **export},
    }


@pytest.mark.parametrize(
    ("task", "args", "options"),
    [
        ("classification", ["--top-k", "2"], {"top_k": 2, "image_size": 64}),
        ("multilabel", ["--threshold", "0.3"], {"threshold": 0.3, "image_size": 64}),
        ("multilabel", [], {"threshold": None}),
        ("segmentation", ["--image-size", "48"], {"image_size": 48}),
        ("detection", ["--tile", "96"], {"tile": 96, "overlap": 0.2}),
        ("detection", ["--tile", "96", "--overlap", "0.5"], {"tile": 96, "overlap": 0.5}),
    ],
)
def test_arguments_without_pytorch(tmp_path, monkeypatch, task, args, options):
    monkeypatch.setattr(runtime, "read_description", lambda path: description(task))
    found = cli_runtime.parse(tmp_path / "model.onnx", ["a.png", *args])
    assert options.items() <= found.items()
    assert found["images"] == [Path("a.png")]


def test_overlap_without_tiles_and_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "read_description", lambda path: description("detection"))
    with pytest.raises(InputError, match="--overlap is that of tiles: give --tile too"):
        cli_runtime.parse(tmp_path / "model.onnx", ["a.png", "--overlap", "0.3"])


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("task", ["classification", "multilabel", "detection", "segmentation"])
def test_help_without_pytorch_has_the_text_of_every_option(tmp_path, monkeypatch, capsys, task, raw):
    """That which tyro shows where the train extra is installed."""
    about = description(task, raw=raw)
    monkeypatch.setattr(runtime, "read_description", lambda path: about)
    with pytest.raises(SystemExit):
        cli_runtime.parse(tmp_path / "model.onnx", ["--help"])
    shown = "".join(capsys.readouterr().out.split())
    options = runtime.default_options(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other public description of its flags
        parser = tyro.extras.get_parser(Predict[type(options)], default=Predict((), options))
    texts = {action.dest: action.help.partition(" (default")[0] for action in parser._actions}
    assert len(texts) > 7
    for name in texts.keys() - {"help", "device"}:
        assert len(texts[name]) > 20
        assert "".join(texts[name].split()) in shown
        assert f"--{name.rpartition('.')[2].replace('_', '-')}" in shown or name == "images"


def save(path, nodes, outputs, about, constants=None):
    """An ONNX file of these nodes."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 3, "h", "w"])],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if about is not None:
        text = about if isinstance(about, str) else json.dumps(about)
        model.metadata_props.append(onnx.StringStringEntryProto(key=KEY, value=text))
    onnx.save(model, path)
    return path


@pytest.fixture
def classifier(tmp_path):
    """Logits: ten times the mean of each channel."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Mul", ["flat", "ten"], ["logits"]),
    ]
    outputs, constants = [("logits", TensorProto.FLOAT, ["b", 3])], {"ten": np.float32(10)}
    return save(tmp_path / "classifier.onnx", nodes, outputs, description("classification"), constants)


@pytest.fixture
def segmenter(tmp_path):
    """A convolution 3x3 as in the fixture `network`."""
    node = helper.make_node("Conv", ["image", "weight"], ["logits"], pads=[1, 1, 1, 1])
    outputs = [("logits", TensorProto.FLOAT, ["b", 3, "h", "w"])]
    return save(tmp_path / "segmenter.onnx", [node], outputs, description("segmentation"), {"weight": WEIGHT})


@pytest.fixture
def network():
    net = nn.Conv2d(3, 3, 3, padding=1, bias=False).eval()
    net.weight.data = torch.from_numpy(WEIGHT.copy())
    net.num_classes = 3
    return net


@pytest.fixture
def image():
    """93x71 pixels, smooth enough that few pixels are close between two classes."""
    noise = np.random.default_rng(1).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((93, 71), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(93, 71), (71, 93), (40, 300), (64, 64), (73, 73)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(("crop", "how"), [(0.875, "bicubic"), (1.0, "bilinear")])
def test_classification_preprocessing_is_timms_to_the_bit(classifier, image, size, crop, how):
    predictor = runtime.load_predictor(classifier, crop_pct=crop, interpolation=how)
    ours = predictor.preprocess(image.resize(size))
    reference = create_transform(64, crop_pct=crop, interpolation=how, mean=(0, 0, 0), std=(1, 1, 1))
    assert np.array_equal(ours, reference(image.resize(size)).numpy())


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_classifier(classifier, image, name):
    result = runtime.load_predictor(classifier, name, top_k=2)(image)
    cropped = create_transform(64, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))(image)
    shares, labels = (10 * cropped.mean((1, 2))).softmax(0).topk(2)
    assert result.labels.tolist() == labels.tolist()
    assert result.names == tuple(NAMES[label] for label in labels)
    assert result.probabilities == pytest.approx(shares.numpy(), abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": 20},  # below the smallest side, 32
        {"image_size": 50},
        {"image_size": 100},
        {"mode": "slide", "window": 40, "window_stride": 30},
        {"scales": (0.75, 1.0, 1.25), "flip": True},
    ],
    ids=str,
)
def test_a_segmenter_predicts_as_in_pytorch(segmenter, network, image, options):
    found = runtime.load_predictor(segmenter, **options)(image).labels
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    labels = segment(network, [x], SegmentationInput(**options))[0].numpy()
    assert found.shape == labels.shape == (71, 93)
    assert (found == labels).mean() > 0.999  # the others are ties but for rounding


@pytest.mark.parametrize("antialias", [0, 1])
def test_openvino_refuses_what_it_computes_otherwise(tmp_path, antialias):
    """It ignores the attribute antialias of Resize, which matters where the map becomes smaller."""
    sizes = {"none": np.float32([]), "sizes": np.int64([1, 3, 40, 40])}
    node = helper.make_node(
        "Resize", ["image", "none", "none", "sizes"], ["logits"], mode="linear", antialias=antialias
    )
    outputs = [("logits", TensorProto.FLOAT, ["b", 3, "h", "w"])]
    file = save(tmp_path / "resize.onnx", [node], outputs, description("segmentation"), sizes)
    onnxruntime, openvino = ExportedModel(file), ExportedModel(file, "openvino")
    for side in (32, 40, 24):
        x = np.random.default_rng(0).random((1, 3, side, side), np.float32)
        assert openvino(x)["logits"] == pytest.approx(onnxruntime(x)["logits"], abs=1e-5)
    x = np.random.default_rng(0).random((1, 3, 80, 80), np.float32)
    if antialias:
        with pytest.raises(InputError, match=r"1x3x80x80: OpenVINO ignores antialiasing .* use --runtime onnxruntime"):
            openvino(x)
    else:
        assert openvino(x)["logits"] == pytest.approx(onnxruntime(x)["logits"], abs=1e-5)


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static"])
def test_int8_of_a_network_without_linear_layers_is_refused(segmenter, tmp_path, precision):
    inputs = [np.random.default_rng(0).random((1, 3, 32, 32), np.float32)]
    with pytest.raises(InputError, match="--int8: this network has no linear layers"):
        quantise(segmenter, tmp_path / "smaller.onnx", precision, inputs)


def test_float16_files_are_valid(segmenter, tmp_path):
    """Their nodes are in order, as ONNX demands; not every runtime sorts them."""
    quantise(segmenter, file := tmp_path / "smaller.onnx", "float16")
    onnx.checker.check_model(onnx.load(file), full_check=True)
    x = np.random.default_rng(0).random((1, 3, 40, 50), np.float32)
    (found,) = ReferenceEvaluator(onnx.load(file)).run(None, {"image": x})
    assert found == pytest.approx(ExportedModel(segmenter)(x)["logits"], abs=1e-2)


def test_openvino_takes_any_size_after_the_first(segmenter):
    openvino, onnxruntime = (ExportedModel(segmenter, name) for name in ("openvino", "onnxruntime"))
    for shape in ((2, 3, 40, 50), (1, 3, 33, 71), (3, 3, 48, 32), (2, 3, 40, 50)):
        x = np.random.default_rng(0).random(shape, dtype=np.float32)
        assert openvino(x)["logits"] == pytest.approx(onnxruntime(x)["logits"], abs=1e-5)


def test_a_label_map_is_the_argmax_of_the_logits(segmenter, image):
    predictor = runtime.load_predictor(segmenter)
    x = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    labels = predictor(image).labels
    assert np.array_equal(labels, predictor.model(x)["logits"][0].argmax(0))
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize("size", [(30, 40), (70, 150), (71, 93)], ids="{0[0]}x{0[1]}".format)
def test_resizing_is_torchs(image, size):
    x = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    tensor = torch.from_numpy(x)[None]
    for ours, antialias in ((runtime.shrink, True), (runtime.resize, False)):
        reference = F.interpolate(tensor, size, mode="bilinear", antialias=antialias)[0].numpy()
        assert ours(x, size) == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_suppression_is_torchvisions(ties):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 100, (300, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(1, 40, (300, 2))), 1).astype(np.float32)
    scores, labels = rng.random(300, dtype=np.float32), rng.integers(0, 3, 300)
    if ties:  # the first of several boxes is the best
        scores, boxes[150:] = np.round(scores, 1), boxes[:150]
    keep = batched_nms(*map(torch.from_numpy, (boxes, scores, labels)), 0.5)
    assert 20 < len(keep) < 280
    assert runtime.suppress(boxes, scores, labels, 0.5).tolist() == keep.tolist()


def test_masks_are_pasted_as_in_pytorch():
    rng = np.random.default_rng(0)
    masks = rng.random((4, 28, 28), dtype=np.float32)
    boxes = np.array([[3, 4, 30.5, 41], [-5, -3, 20, 20], [50, 30, 99, 88], [10, 10, 10.2, 40]], np.float32)
    canvas = torch.zeros(4, 1, 60, 80, dtype=torch.bool)
    for place, mask, box in zip(canvas, masks, boxes.tolist(), strict=True):
        paste_mask(place, torch.from_numpy(mask)[None], box)
    assert (runtime.paste(masks, boxes, (60, 80)) == canvas[:, 0].numpy()).mean() > 0.9999
    assert canvas.any()


def detections(boxes, scores, labels):
    """Nodes whose outputs do not depend on the image."""
    constants = {"boxes_": np.float32(boxes), "scores_": np.float32(scores), "labels_": np.int64(labels)}
    nodes = [helper.make_node("Identity", [f"{name}_"], [name]) for name in ("boxes", "scores", "labels")]
    nodes.append(helper.make_node("ReduceMean", ["image"], ["unused"]))
    kinds = zip(("boxes", "scores", "labels"), (1, 1, 7), ([4, 4], [4], [4]), strict=True)
    return nodes, list(kinds), constants


def test_a_detector_of_fixed_size_returns_pixels_of_the_image(tmp_path):
    """An image of 50x100 fills the left half of an input of 64x64 at scale 0.64."""
    boxes = [[0, 0, 32, 64], [8, 8, 16, 16], [16, 16, 64, 64], [-1] * 4]
    nodes, outputs, constants = detections(boxes, [0.9, 0.8, 0.3, -1], [2, 0, 1, -1])
    about = description("detection", size=[64, 64], score_threshold=0.05)
    path = save(tmp_path / "detector.onnx", nodes, outputs, about, constants)
    result = load_predictor(path, score=0.2)(Image.new("RGB", (50, 100)))
    assert result.names == ("c", "a", "b")
    assert result.scores.tolist() == pytest.approx([0.9, 0.8, 0.3])
    assert result.boxes.tolist() == [[0, 0, 50, 100], [12.5, 12.5, 25, 25], [25, 25, 50, 100]]
    assert len(load_predictor(path)(Image.new("RGB", (50, 100)))) == 2
    with pytest.raises(InputError, match=r"--score 0.01: the file has the objects above 0.05 only"):
        load_predictor(path, score=0.01)
    with pytest.raises(InputError, match="image_size: not an option of this predictor; there are score"):
        load_predictor(path, image_size=100)


def test_evaluate_takes_tiles(tmp_path, capsys):
    """The graph finds one object, at the same place in every image: one in each of the two tiles of an image."""
    nodes, outputs, constants = detections([[8, 8, 40, 40], *[[-1] * 4] * 3], [0.9, -1, -1, -1], [0, -1, -1, -1])
    about = description("detection", size=[64, 64], score_threshold=0.05) | {"recipe": to_dict(Detection())}
    path = save(tmp_path / "detector.onnx", nodes, outputs, about, constants)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (128, 64)).save(tmp_path / "images" / "0.png")
    boxes = [{"id": i, "image_id": 1, "category_id": 1, "bbox": [8 + 64 * i, 8, 32, 32]} for i in (0, 1)]
    coco = {
        "images": [{"id": 1, "file_name": "0.png", "width": 128, "height": 64}],
        "annotations": [box | {"area": 1024, "iscrowd": 0} for box in boxes],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)],
    }
    (tmp_path / "val.json").write_text(json.dumps(coco))
    data = ["--data.images", tmp_path / "images", "--data.val-json", tmp_path / "val.json", "--data.workers", 0]
    found = []
    for tiles in ([], ["--tile", 64, "--overlap", 0]):
        assert cli.run([*map(str, ("evaluate", path, *data, *tiles, "--json"))]) == 0
        found.append(json.loads(capsys.readouterr().out)["box"]["AP"])
    assert found == [0, 1]
    assert cli.run([*map(str, ("predict", path, tmp_path / "images", "--tile", 64, "--overlap=0", "--json"))]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [one["bbox"] for one in record["annotations"]] == [box["bbox"] for box in boxes]


def test_boxes_in_the_padding_are_no_objects(tmp_path):
    """An image of 50x100 fills the left half of an input of 64x64: nothing is left of boxes in the right half."""
    boxes = [[40, 8, 60, 30], [8, 8, 16, 16], [24, 0, 48, 64], [32, 0, 40, 8]]
    nodes, outputs, constants = detections(boxes, [0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1])
    about = description("detection", size=[64, 64], score_threshold=0.05)
    path = save(tmp_path / "detector.onnx", nodes, outputs, about, constants)
    result = load_predictor(path, score=0.2)(Image.new("RGB", (50, 100)))
    assert result.boxes.tolist() == [[12.5, 12.5, 25, 25], [37.5, 0, 50, 100]]
    assert result.scores.tolist() == pytest.approx([0.8, 0.7])


@pytest.mark.parametrize("most", [300, 150])
def test_a_detector_of_any_size_resizes_as_in_pytorch(tmp_path, most):
    about = description("detection", raw=True, score_threshold=0.05, multiple=32, nms_threshold=0.5)
    about["export"] |= {"anchors": 1, "strides": [8], "candidates": 9, "detections": 9}
    nodes, outputs, constants = detections([[0] * 4] * 4, [0] * 4, [0] * 4)
    path = save(tmp_path / "detector.onnx", nodes, outputs, about, constants)
    predictor = load_predictor(path, image_size=200, max_size=most)
    reference = Transform(200, most, (), (0, 0, 0), (1, 1, 1))
    for size in ((100, 120), (333, 90), (480, 640), (31, 1000)):
        resized, frame = predictor.fit(size)
        assert resized == reference.fit(size, 200)
        assert frame == reference.padded(torch.zeros(3, *size))


def test_a_batch_a_folder_and_an_unreadable_image(classifier, photos):
    predictor = load_predictor(classifier)
    results = predictor(photos / "val")
    assert [result.name for result in results] == ["c"] * 6 + ["b"] * 6 + ["a"] * 6  # blue, green, red
    (photos / "val" / "bad.jpg").write_text("no image")
    predictions = list(predictor.stream([photos / "val" / "bad.jpg", photos / "val" / "red" / "0.jpg"]))
    assert "cannot be read as an image" in str(predictions[0].error)
    assert predictions[1].result.name == "a"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "it is truncated, damaged or of another format"),
        (lambda path: path.write_text("weights"), "it is truncated, damaged or of another format"),
        (lambda path: path.write_bytes(b""), "it is truncated, damaged or of another format"),
        (lambda path: path.unlink(), "no such file"),
        (
            lambda path: save(path, [helper.make_node("Identity", ["image"], ["y"])], [("y", 1, None)], None),
            "is an ONNX file of another program",
        ),
        (
            lambda path: save(
                path, [helper.make_node("Identity", ["image"], ["y"])], [("y", 1, None)], {"format": "2"}
            ),
            "was written by another version of dualtoken-vit; export it again",
        ),
        (
            lambda path: save(path, [helper.make_node("Identity", ["image"], ["y"])], [("y", 1, None)], ["task"]),
            "was written by another version of dualtoken-vit; export it again",
        ),
        (
            lambda path: save(path, [helper.make_node("Identity", ["image"], ["y"])], [("y", 1, None)], "[" * 200_000),
            "was written by another version of dualtoken-vit; export it again",
        ),
    ],
)
def test_other_files_are_rejected_in_one_line(classifier, spoil, message):
    spoil(classifier)
    with pytest.raises(InputError, match=message) as caught:
        load_predictor(classifier)
    assert str(classifier) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "shapes", "export"),
    [
        ("classification", {"logits": (1, 3)}, {}),
        ("multilabel", {"logits": (1, 3)}, {}),
        ("segmentation", {"logits": (1, 3, 71, 93)}, {}),
        ("detection", {"boxes": (2, 4), "scores": (2,), "labels": (2,)}, {"size": (64, 64), "score_threshold": 0.0}),
        ("detection", {"boxes": (1, 2, 4), "scores": (1, 2, 3)}, {"raw": True, "score_threshold": 0.0, "multiple": 32}),
    ],
    ids=["classification", "multilabel", "segmentation", "detection", "raw detection"],
)
def test_a_network_that_produces_nan(image, task, shapes, export):
    def network(image):
        return {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}

    network.description = about = description(task, **export)
    kind = runtime.predictor_class(about)
    predictor = kind(network, kind.make_options(**kind.stored_options(about)))
    with pytest.raises(InputError, match="the network produced NaN or Inf; use another checkpoint"):
        predictor(image)
    if task in ("detection", "segmentation"):  # as `evaluate` calls it
        with pytest.raises(InputError, match="the network produced NaN or Inf; use another checkpoint"):
            predictor.forward([predictor.preprocess(image)], check=True)


def test_a_classifier_of_small_images_takes_their_size(tmp_path, classifier):
    model = onnx.load(classifier)
    about = description("classification")
    about["preprocessing"]["input_size"] = (3, 24, 24)
    helper.set_model_props(model, {KEY: json.dumps(about)})
    onnx.save(model, path := tmp_path / "small.onnx")
    assert load_predictor(path)(Image.new("RGB", (30, 30), "red")).names[0] == NAMES[0]
    with pytest.raises(InputError, match="--image-size 25: must be from 32 to 16384"):
        load_predictor(path, image_size=25)


def test_options_are_checked(classifier, segmenter, monkeypatch):
    for path, options, message in (
        (classifier, {"top_k": 0}, "--top-k 0: must be at least 1"),
        (classifier, {"image_size": 8}, "--image-size 8: must be from 32 to 16384"),
        (classifier, {"score": 1}, "score: not an option"),
        (classifier, {"runtime": "tensorrt"}, "--runtime tensorrt: choose one of onnxruntime, openvino"),
        (classifier, {"device": "cuda"}, "--device cuda: exported files run on the CPU"),
        (segmenter, {"window": 40, "window_stride": 50}, "--window-stride 50: must be at most the window"),
    ):
        with pytest.raises(InputError, match=message):
            load_predictor(path, **options)
    with pytest.raises(InputError, match="--runtime openvino: for files that dualtoken-vit export wrote"):
        load_predictor("best.safetensors", runtime="openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="openvino is not installed: pip install openvino"):
        load_predictor(classifier, runtime="openvino")


BLOCK = """
import sys
for name in ("torch", "timm", "torchvision", "lightning", "rich", "tyro", "annotated_types", "matplotlib", "scipy"):
    sys.modules[name] = None
"""


def test_older_label_maps_are_counted(segmenter, tmp_path, capsys):
    """Beside the older drawing and the contact sheet."""
    images = tmp_path / "a.png", tmp_path / "b.png"
    for path in images:
        Image.new("RGB", (40, 32)).save(path)
    assert predict(segmenter, images, tmp_path / "out", json=True)
    assert "older" not in capsys.readouterr().err
    assert predict(segmenter, images[:1], tmp_path / "out", json=True)
    assert "older files, which this run did not write: 3, for example b.png.labels.png\n" in capsys.readouterr().err


def test_a_checkpoint_needs_pytorch(tmp_path):
    with pytest.raises(InputError, match=r"best\.safetensors: a checkpoint needs PyTorch; dualtoken-vit export writes"):
        runtime.load_predictor(tmp_path / "best.safetensors")


def test_without_torch(classifier, image, tmp_path, capsys):
    """In a process that cannot import torch: the same predictions and drawings, from Python and on the command line."""
    image.save(tmp_path / "image.png")
    args = ["predict", str(classifier), str(tmp_path / "image.png"), "--json"]
    code = (
        f"{BLOCK}from dualtoken_vit import load_predictor\n"
        f"result = load_predictor({str(classifier)!r})({str(tmp_path / 'image.png')!r})\n"
        "print(result.labels.tolist(), result.probabilities.tolist())\n"
        f"sys.argv = {['dualtoken-vit', *args, '--out', str(tmp_path / 'bare')]!r}\n"
        "from dualtoken_vit.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    result = load_predictor(classifier)(tmp_path / "image.png")
    assert first == f"{result.labels.tolist()} {result.probabilities.tolist()}"
    assert cli.run([*args, "--out", str(tmp_path / "full")]) == 0
    assert second == capsys.readouterr().out.strip()
    bare, full = (np.asarray(Image.open(tmp_path / name / "image.png.png")) for name in ("bare", "full"))
    assert bare.shape == full.shape
    assert np.array_equal(bare[:, : SIDE + MARGIN], full[:, : SIDE + MARGIN])  # beside it there is text, in other fonts


def test_errors_of_the_system_end_with_one_line_without_pytorch(classifier, monkeypatch, capsys):
    def ended(*args):
        with pytest.raises(SystemExit) as end:
            cli_runtime.main([*args], "")
        return end.value.code, capsys.readouterr().err

    def fill():
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **options):
        raise MemoryError

    long = f"dualtoken-vit: error: {'a' * 100}...: File name too long\n"
    assert ended("predict", str(classifier), "a" * 300) == (2, long)
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", SimpleNamespace(write=len, flush=fill))
        full = "dualtoken-vit: error: cannot write: No space left on device; what was saved is kept\n"
        assert ended("--version") == (2, full)
    monkeypatch.setattr(cli_runtime, "predict", fail)
    memory = "dualtoken-vit: error: out of memory; give smaller images, batches or networks\n"
    assert ended("predict", str(classifier), "a.png") == (2, memory)


def test_the_command_predicts_without_importing_torch(classifier, image, tmp_path):
    """Where it is installed: its import would take most of the time."""
    image.save(tmp_path / "image.png")
    args = ["predict", str(classifier), str(tmp_path / "image.png"), "--json", "--device", "cpu"]
    code = (
        "import sys, dualtoken_vit_command\n"
        f"sys.argv = {['dualtoken-vit', *args]!r}\n"
        "try: dualtoken_vit_command.main()\n"
        "finally: print([name for name in ('torch', 'timm', 'lightning') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    record, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    (entry,) = json.loads(record)["predictions"]
    result = load_predictor(classifier)(image)
    assert [one["probability"] for one in entry["classes"]] == pytest.approx(result.probabilities.tolist(), abs=1e-6)


@pytest.mark.slow
def test_the_runtime_extra_alone_is_enough(classifier, image, tmp_path):
    """A wheel of this tree in an empty environment, without torch, predicts the same."""
    image.save(tmp_path / "image.png")
    root, source = Path(__file__).parents[1], tmp_path / "source"
    shutil.copytree(root / "dualtoken_vit", source / "dualtoken_vit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "dualtoken_vit_command.py"):
        shutil.copy(root / name, source)
    venv.create(tmp_path / "env", with_pip=True)
    (programs,) = (path for path in (tmp_path / "env").iterdir() if path.name in ("bin", "Scripts"))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(program: str, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([programs / program, *args], capture_output=True, text=True, cwd=tmp_path, env=env)

    installed = call("pip", "install", f"{source}[runtime]")
    if "Failed to establish a new connection" in installed.stderr:
        pytest.skip("no network for pip")
    assert installed.returncode == 0, installed.stderr
    listed = {line.partition("=")[0].lower() for line in call("pip", "list", "--format=freeze").stdout.splitlines()}
    assert {"dualtoken-vit", "numpy", "onnxruntime", "pillow"} <= listed
    assert not listed & {"torch", "timm", "torchvision", "lightning", "matplotlib", "rich"}
    weights = list((root / "dualtoken_vit" / "weights").iterdir())
    packed = {path.name: path.read_bytes() for path in (tmp_path / "env").rglob("dualtoken_vit/weights/*")}
    assert packed == {path.name: path.read_bytes() for path in weights}
    done = call("dualtoken-vit", "predict", str(classifier), "image.png", "--json", "--out", "out")
    assert (done.returncode, done.stderr) == (0, "")
    (entry,) = json.loads(done.stdout)["predictions"]
    result = load_predictor(classifier)(image)
    assert [one["class"] for one in entry["classes"]] == list(result.names)
    assert [one["probability"] for one in entry["classes"]] == pytest.approx(result.probabilities.tolist(), abs=1e-6)
    assert (tmp_path / "out" / "image.png.png").is_file()
    for args in (["train"], ["predict", "best.safetensors", "image.png"]):
        refused = call("dualtoken-vit", *args)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert "is not installed; install the train extra" in refused.stderr
    helped = [call("dualtoken-vit", *args) for args in ([], ["--help"], ["predict"], ["predict", "--help"])]
    assert [(done.returncode, done.stdout) for done in helped] == [(0, f"{cli_runtime.USAGE}\n")] * 4


def test_an_image_on_which_the_runtime_fails_does_not_stop_the_others(segmenter, monkeypatch):
    predictor = load_predictor(segmenter)
    compute = predictor.model._run

    def run(image):
        if image.shape[2] > 50:
            raise MemoryError("bad allocation")
        return compute(image)

    monkeypatch.setattr(predictor.model, "_run", run)
    images = [Image.new("RGB", size, "red") for size in ((40, 32), (64, 64), (32, 40))]
    first, failed, last = predictor.stream(images)
    assert first.result.labels.shape == (32, 40)
    assert last.result.labels.shape == (40, 32)
    assert "fails on an input of 1x3x64x64: bad allocation" in str(failed.error)
    with pytest.raises(InputError, match="bad allocation"):
        predictor(images[1])


@pytest.mark.parametrize(("option", "value"), [("image_size", 0), ("image_size", -1), ("window", 0)])
def test_sizes_of_segmenters(segmenter, option, value):
    with pytest.raises(InputError, match=option.replace("_", "[-_]")):
        load_predictor(segmenter, **{option: value})


def test_batches_of_none(segmenter):
    with pytest.raises(InputError, match="batch_size=0: must be at least 1"):
        load_predictor(segmenter)(Image.new("RGB", (32, 32)), 0)


def test_a_name_that_is_too_long(segmenter):
    with pytest.raises(InputError, match="aaa"):
        load_predictor(segmenter)("a" * 300)


@pytest.mark.parametrize(("args", "expected"), [([], True), (["--no-flip"], False), (["--flip"], True)])
def test_a_stored_switch_can_be_turned_off(tmp_path, args, expected):
    node = helper.make_node("Conv", ["image", "weight"], ["logits"], pads=[1, 1, 1, 1])
    outputs = [("logits", TensorProto.FLOAT, ["b", 3, "h", "w"])]
    about = description("segmentation")
    about = about | {"recipe": about["recipe"] | {"data": {"flip": True}}}
    path = save(tmp_path / "segmenter.onnx", [node], outputs, about, {"weight": WEIGHT})
    assert cli_runtime.parse(path, ["a.png", *args])["flip"] is expected
