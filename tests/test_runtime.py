"""Predictors of exported files, against PyTorch's own: files here have hand-made graphs, which need no export."""

import json
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import openvino
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from PIL import Image, ImageSequence
from timm.data import create_transform
from tiny_files import NAMES, WEIGHT, description, save
from torch import nn
from torchvision.ops import batched_nms

from dualtoken_vit import cli, load_predictor
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.resizing import Transform, paste_mask
from dualtoken_vit.models.segmenters import segment
from dualtoken_vit.predict import predict
from dualtoken_vit.recipes import Detection, SegmentationInput, to_dict
from dualtoken_vit.runtime import arrays
from dualtoken_vit.runtime import predictor as runtime
from dualtoken_vit.runtime.boxes import suppress
from dualtoken_vit.runtime.detection import paste
from dualtoken_vit.runtime.session import KEY, RUNTIMES, ExportedModel


@pytest.fixture
def network():
    net = nn.Conv2d(3, 3, 3, padding=1, bias=False).eval()
    net.weight.data = torch.from_numpy(WEIGHT.copy())
    net.num_classes = 3
    return net


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


def test_openvino_takes_any_size_after_the_first(segmenter):
    openvino, onnxruntime = (ExportedModel(segmenter, name) for name in ("openvino", "onnxruntime"))
    for shape in ((2, 3, 40, 50), (1, 3, 33, 71), (3, 3, 48, 32), (2, 3, 40, 50)):
        x = np.random.default_rng(0).random(shape, dtype=np.float32)
        assert openvino(x)["logits"] == pytest.approx(onnxruntime(x)["logits"], abs=1e-5)


@pytest.mark.parametrize("name", RUNTIMES)
def test_threads_may_share_a_predictor(segmenter, classifier, name):
    """As in a web service. One image for each thread, whose results differ."""
    images = [Image.new("RGB", (64, 48), color) for color in ("red", "lime", "blue", "yellow")]
    for path in (classifier, segmenter):
        predictor = load_predictor(path, runtime=name)
        expected = [predictor(image).labels.tolist() for image in images]
        assert expected[0] != expected[1]
        with ThreadPoolExecutor(4) as pool:
            found = [result.labels.tolist() for result in pool.map(predictor, images * 50)]
        assert found == expected * 50


def test_openvino_keeps_few_networks_of_one_size(tmp_path, monkeypatch):
    """With antialiasing each size has its own, which a service that takes any image would collect."""
    sizes = {"none": np.float32([]), "scales": np.float32([1, 1, 1, 1])}
    node = helper.make_node("Resize", ["image", "none", "scales"], ["logits"], mode="linear", antialias=1)
    outputs = [("logits", TensorProto.FLOAT, ["b", 3, "h", "w"])]
    file = save(tmp_path / "resize.onnx", [node], outputs, description("segmentation"), sizes)
    compile_model, alive = openvino.Core.compile_model, []

    def compiled(*args):
        alive.append(weakref.ref(network := compile_model(*args)))
        return network

    monkeypatch.setattr(openvino.Core, "compile_model", compiled)
    network = ExportedModel(file, "openvino")
    for side in (*range(32, 132), 131, 130):
        x = np.random.default_rng(0).random((1, 3, side, side), np.float32)
        assert np.array_equal(network(x)["logits"], x)
    assert len(alive) == 100
    assert sum(each() is not None for each in alive) == 64


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
    for ours, antialias in ((arrays.shrink, True), (arrays.resize, False)):
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
    assert suppress(boxes, scores, labels, 0.5).tolist() == keep.tolist()


def test_masks_are_pasted_as_in_pytorch():
    rng = np.random.default_rng(0)
    masks = rng.random((4, 28, 28), dtype=np.float32)
    boxes = np.array([[3, 4, 30.5, 41], [-5, -3, 20, 20], [50, 30, 99, 88], [10, 10, 10.2, 40]], np.float32)
    canvas = torch.zeros(4, 1, 60, 80, dtype=torch.bool)
    for place, mask, box in zip(canvas, masks, boxes.tolist(), strict=True):
        paste_mask(place, torch.from_numpy(mask)[None], box)
    assert (paste(masks, boxes, (60, 80)) == canvas[:, 0].numpy()).mean() > 0.9999
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


def test_an_image_of_a_file_is_taken_as_it_is(classifier, tmp_path):
    """Threads cannot share its file, and an animation goes on while its frames are collected."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    predictor = load_predictor(classifier)
    with Image.open(tmp_path / "a.png") as image:
        repeated = predictor([image] * 8)
    alone = predictor(tmp_path / "a.png").probabilities.tolist()
    assert [result.probabilities.tolist() for result in repeated] == [alone] * 8
    colors = "red", "lime", "blue"
    first, *others = (Image.new("RGB", (40, 40), color) for color in colors)
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    for collect in (predictor, lambda each: [one.result for one in predictor.stream(each)]):
        with Image.open(tmp_path / "a.gif") as animation:
            assert [result.name for result in collect(ImageSequence.Iterator(animation))] == ["a", "b", "c"]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with Image.open(tmp_path / "b.png") as image:
        failed, last = predictor.stream([image, tmp_path / "a.png"])
    assert "cannot be read as an image" in str(failed.error)
    assert last.result.probabilities.tolist() == alone


def test_an_image_that_would_take_gigabytes_does_not_stop_the_others(classifier, tmp_path):
    Image.new("RGB", (1, 40_000), "red").save(tmp_path / "strip.png")
    good = Image.new("RGB", (40, 40), "lime")
    first, strip, last = load_predictor(classifier, image_size=224).stream([good, tmp_path / "strip.png", good])
    assert first.result.name == last.result.name == "b"
    assert str(strip.error).startswith(
        f"{tmp_path / 'strip.png'}: 1x40000 pixels would be 2,621,440,000 once the short"
    )


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


def test_older_label_maps_are_counted(segmenter, tmp_path, capsys):
    """Beside the older drawing and the contact sheet."""
    images = tmp_path / "a.png", tmp_path / "b.png"
    for path in images:
        Image.new("RGB", (40, 32)).save(path)
    assert predict(segmenter, images, tmp_path / "out", json=True)
    assert "older" not in capsys.readouterr().err
    assert predict(segmenter, images[:1], tmp_path / "out", json=True)
    assert "older files, which this run did not write: 3, for example b.png.labels.png\n" in capsys.readouterr().err


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
