"""Descriptions in files that may come from anywhere: what is wrong with them is named before it is used."""

import json
from copy import deepcopy

import onnx
import pytest
from onnx import TensorProto, helper
from test_predict import checkpoint  # noqa: F401  a fixture

from dualtoken_vit.errors import InputError
from dualtoken_vit.header import check_header
from dualtoken_vit.predictors import read_header
from dualtoken_vit.runtime.classification import Classifier
from dualtoken_vit.runtime.detection import AnySizeDetector
from dualtoken_vit.runtime.segmentation import Segmenter
from dualtoken_vit.runtime.session import FORMAT, KEY

SOUND = {
    "task": "detection",
    "model": "dualtoken_vit_tiny",
    "model_args": {"num_classes": 2},
    "class_names": ["a", "b"],
    "category_ids": [1, -7],
    "preprocessing": {"input_size": [3, 64, 96], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "thresholds": None},
    "recipe": {"data": {}},
    "metrics": {},
    "export": {
        "size": None,
        "raw": True,
        "score_threshold": 0.0,
        "multiple": 32,
        "anchors": 9,
        "strides": [8, 16],
        "candidates": 1000,
        "nms_threshold": 0.5,
        "detections": 300,
    },
}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("task", None, "task is None: must be str"),
        ("class_names", ["a", {}], "class_names is"),
        ("class_names", ["a"], "category_ids: 2, but 1 expected"),
        ("class_names", [], "category_ids: 2, but 0 expected"),
        ("category_ids", [1], "category_ids: 1, but 2 expected"),
        ("category_ids", [1, 2.5], "category_ids is"),
        ("model_args", {"num_classes": 3}, "model_args.num_classes: 3, but 2 expected"),
        ("recipe", [], "recipe is"),
        ("recipe.data", 3, "recipe.data is 3: must be dict"),
        ("recipe.model", "x", "recipe.model is 'x': must be dict"),
        ("preprocessing.input_size", [2, 64, 64], "preprocessing.input_size has 2 channels"),
        ("preprocessing.input_size", [3, 64, 10**9], "preprocessing.input_size is .* out of range"),
        ("preprocessing.input_size", [3, 64], "preprocessing.input_size is"),
        ("preprocessing.mean", [0.5], "preprocessing.mean: 1, but 3 expected"),
        ("preprocessing.std", [0.2, 0.2, 0.0], "preprocessing.std is .* out of range"),
        ("preprocessing.mean", [0.5, 0.5, float("nan")], "preprocessing.mean is .* out of range"),
        ("preprocessing.thresholds", [0.5], "preprocessing.thresholds: 1, but 2 expected"),
        ("preprocessing.label_descriptions", ["a"], "preprocessing.label_descriptions: 1, but 2 expected"),
        ("preprocessing.crop_pct", 0, "preprocessing.crop_pct is 0: out of range"),
        ("preprocessing.held_out", 1, "preprocessing.held_out is 1: must be str"),
        ("preprocessing.usual_size", [64], "preprocessing.usual_size is"),
        ("preprocessing.temperature", "1", "preprocessing.temperature is '1': must be float"),
        ("export.size", [10**400, 64], "export.size is"),
        ("export.raw", 1, "export.raw is 1: must be bool"),
        ("export.anchors", 0, "export.anchors is 0: out of range"),
    ],
)
def test_a_damaged_entry_is_named(place, value, message):
    check_header(SOUND, "a.onnx")
    found = deepcopy(SOUND)
    *parents, name = place.split(".")
    holder = found[parents[0]] if parents else found
    holder[name] = value
    with pytest.raises(
        InputError, match=rf"^a\.onnx has a damaged description, or one of another version .*: {message}"
    ):
        check_header(found, "a.onnx")


def test_a_missing_entry_is_named():
    for place in ("task", "class_names", "preprocessing.input_size", "export.size", "export.multiple"):
        found = deepcopy(SOUND)
        *parents, name = place.split(".")
        del (found[parents[0]] if parents else found)[name]
        with pytest.raises(InputError, match=f"lacks {name}"):
            check_header(found, "a.onnx")


def test_of_a_checkpoint(checkpoint, tmp_path):  # noqa: F811
    content = checkpoint.read_bytes()
    names = json.dumps(json.dumps(["ant", "bee", "cat [x]", "dog"]))[1:-1].encode()
    assert content.count(names) == 1
    (file := tmp_path / "best.safetensors").write_bytes(content.replace(names, names.replace(b'\\"dog\\"', b"    123")))
    with pytest.raises(InputError, match=r"class_names is .* must be tuple"):
        read_header(file)


@pytest.mark.parametrize("name", ["recipe", "category_ids", "export"])
def test_of_an_exported_file_without_an_entry(name, tmp_path):
    about = {"format": FORMAT, **{key: value for key, value in SOUND.items() if key != name}}
    image, logits = (helper.make_tensor_value_info(key, TensorProto.FLOAT, [1]) for key in ("image", "logits"))
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["logits"])], "same", [image], [logits])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    helper.set_model_props(model, {KEY: json.dumps(about)})
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InputError, match=r"a\.onnx was written by another version of dualtoken-vit; export it again"):
        read_header(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Classifier, {"image_size": 10**400}, "--image-size 1000"),
        (Classifier, {"crop_pct": float("nan")}, "--crop-pct nan: must be from 0.01 to 1"),
        (Classifier, {"interpolation": 3}, "--interpolation 3: must be"),
        (Segmenter, {"image_size": 2**31}, "--image-size 2147483648: must be from 1 to 16384"),
        (Segmenter, {"scales": [1.0, "x"]}, "--scales"),
        (Segmenter, {"scales": [1e308]}, "--scales"),
        (Segmenter, {"flip": None}, "--flip None: must be bool"),
        (AnySizeDetector, {"score": float("inf")}, "--score inf: must be from 0 to 1"),
        (AnySizeDetector, {"max_size": True}, "--max-size True: must be int"),
    ],
)
def test_stored_options_of_another_type_or_range(kind, options, message):
    with pytest.raises(InputError, match=message):
        kind.make_options(**options)
