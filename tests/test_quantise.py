"""Exported files of less precision: int8 and float16."""

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from PIL import Image
from tiny_files import description, save

from dualtoken_vit import load_predictor
from dualtoken_vit.cli import run
from dualtoken_vit.deploy.quantise import agreement, quantise
from dualtoken_vit.errors import InputError
from dualtoken_vit.results import Classes, LabelMap, Labels, Objects
from dualtoken_vit.runtime.session import ExportedModel


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static"])
def test_int8_of_a_network_without_linear_layers_is_refused(segmenter, tmp_path, precision):
    inputs = [np.random.default_rng(0).random((1, 3, 32, 32), np.float32)]
    with pytest.raises(InputError, match="--int8: this network has no linear layers"):
        quantise(segmenter, tmp_path / "smaller.onnx", precision, inputs)


def test_an_image_s_result_does_not_depend_on_its_batch(tmp_path):
    """Dynamic quantisation takes the range of a whole input: beside a white image, a dark one would be all zeros."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    outputs, weight = [("logits", 1, ["b", 3])], 100 * np.eye(3, dtype=np.float32)
    file = save(tmp_path / "a.onnx", nodes, outputs, description("classification"), {"weight": weight})
    quantise(file, small := tmp_path / "small.onnx", "int8-dynamic")
    predictor, dark = load_predictor(small), Image.new("RGB", (64, 64), (0, 0, 1))
    first, alone = predictor([dark, Image.new("RGB", (64, 64), "white")])[0], predictor(dark)
    assert alone.name == "c"
    assert first.probabilities.tolist() == alone.probabilities.tolist()
    assert alone.probabilities == pytest.approx(load_predictor(file)(dark).probabilities, abs=0.01)


def test_float16_files_are_valid(segmenter, tmp_path):
    """Their nodes are in order, as ONNX demands; not every runtime sorts them."""
    quantise(segmenter, file := tmp_path / "smaller.onnx", "float16")
    onnx.checker.check_model(onnx.load(file), full_check=True)
    x = np.random.default_rng(0).random((1, 3, 40, 50), np.float32)
    (found,) = ReferenceEvaluator(onnx.load(file)).run(None, {"image": x})
    assert found == pytest.approx(ExportedModel(segmenter)(x)["logits"], abs=1e-2)


def test_the_agreement_of_two_files():
    def objects(boxes, labels):
        return Objects(("",) * len(labels), np.array(labels), np.float32(boxes).reshape(-1, 4), np.ones(len(labels)))

    first, second = (Classes(("",), np.array([label]), np.ones(1)) for label in (0, 1))
    assert agreement([first, first, second], [first, second, second]) == "same class on 2 of 3 images"
    none, both = (Labels((), np.array(labels, int), np.ones(2), np.ones(2)) for labels in ([], [1, 0]))
    turned = Labels((), np.array([0, 1]), np.ones(2), np.ones(2))
    assert agreement([none, both, both], [none, turned, none]) == "same labels on 2 of 3 images"
    labels = np.zeros((4, 5), np.uint8)
    maps = [LabelMap(("a", "b"), each) for each in (labels, labels, np.eye(4, 5, dtype=np.uint8))]
    assert agreement(maps[:2], maps[1:]) == "same label for 90.00% of the pixels of 2 images"  # 100 % and 80 %
    ours = objects([[0, 0, 10, 10], [20, 20, 30, 30], [50, 0, 60, 10]], [0, 1, 1])
    theirs = objects([[0, 0, 10, 6], [20, 20, 30, 24], [50, 0, 60, 10]], [0, 1, 0])  # IoU 0.6, IoU 0.4, another class
    found = agreement([ours, objects([], [])], [theirs, objects([], [])])
    assert found == "66.67% of the objects in 2 images found by both (same class, IoU of at least 0.5)"  # 1/3 and 1
    assert agreement([objects([], [])], [objects([], [])]) == "no objects in 1 image"


@pytest.mark.slow
@pytest.mark.parametrize("option", [["--int8"], ["--int8", "static"], ["--fp16"]], ids=" ".join)
def test_smaller_files(checkpoint, exported, photos, option, tmp_path, capsys):
    images, out = str(photos / "val"), tmp_path / "small.onnx"
    assert run(["export", str(checkpoint), "--out", str(out), "--images", images, *option]) == 0
    assert "MB; compared with the float32 file: same class on 18 of 18 images" in capsys.readouterr().out
    assert out.stat().st_size < 0.65 * exported.stat().st_size
    before, after = (load_predictor(path)(photos / "val") for path in (checkpoint, out))
    gaps = [
        np.abs(a.probabilities[np.argsort(a.labels)] - b.probabilities[np.argsort(b.labels)]).max()
        for a, b in zip(before, after, strict=True)
    ]
    assert max(gaps) < 0.02
    assert ExportedModel(out).description["export"]["precision"].startswith(("int8", "float16"))
