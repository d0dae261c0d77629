"""Smaller ONNX files: int8 weights, or float16, and how far their predictions agree with the float32 file.

int8 applies to products with constant weights only: quantising everything else costs far more accuracy than it saves
space. `static` also fixes the range of the activations, from images; `dynamic` computes it in each run.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from PIL import Image
from torchvision.ops import box_iou

from dualtoken_vit.data.threads import track, working
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import counted
from dualtoken_vit.results import Classes, LabelMap, Labels, Objects
from dualtoken_vit.runtime.exported import ExportedPredictor
from dualtoken_vit.runtime.session import KEY

Precision = Literal["float32", "float16", "int8-dynamic", "int8-static"]
PRODUCTS = ["MatMul", "Gemm"]
NOTHING = "--int8: this network has no linear layers, which are what it makes smaller; use --fp16"
SAME_IOU = 0.5  # from which on two boxes of one class are the same object


class _Reader(CalibrationDataReader):
    def __init__(self, inputs: Sequence[np.ndarray]):
        self.inputs: Iterator[np.ndarray] = iter(track(inputs, len(inputs), "calibrating"))

    def get_next(self) -> Any:
        image = next(self.inputs, None)
        return None if image is None else {"image": image}


def network_inputs(predictor: ExportedPredictor[Any], images: Sequence[Image.Image]) -> list[np.ndarray]:
    """What the predictor gives its network for these images."""
    network: Any = predictor.model
    found: list[np.ndarray] = []

    def record(image: np.ndarray) -> Any:
        found.append(image)
        return network(image)

    predictor.model = record  # type: ignore[assignment]
    for image in track(images, len(images), "calibration images"):
        predictor.forward([predictor.preprocess(image)])
    predictor.model = network
    return found


def quantise(source: Path, target: Path, precision: Precision, inputs: Sequence[np.ndarray] = ()) -> None:
    """Write a smaller version of a file.

    Args:
        inputs: of the network, for int8-static

    Raises:
        InputError: for int8, if the network has no linear layers.
    """
    if precision == "float16":
        with working("converting to float16"):
            smaller = OnnxModel(convert_float_to_float16(onnx.load(source), keep_io_types=True))
            smaller.topological_sort()  # the converter appends its casts at the end, which not every runtime accepts
            onnx.save(smaller.model, target)
    elif precision == "int8-dynamic":
        with working("quantising"):
            quantize_dynamic(source, target, PRODUCTS, per_channel=True)
    else:
        prepared = target.with_suffix(".prepared")
        with working("optimising"):
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        constants = {weight.name for weight in graph.initializer}
        products = [node.name for node in graph.node if node.op_type in PRODUCTS and node.input[1] in constants]
        if not products:  # else ONNX Runtime would quantise every layer
            raise InputError(NOTHING)
        quantize_static(
            prepared,
            target,
            _Reader(inputs),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            nodes_to_quantize=products,
            extra_options={"OpTypesToExcludeOutputQuantization": PRODUCTS},
        )
    model = onnx.load(target)
    if precision == "int8-dynamic" and not any(node.op_type == "MatMulInteger" for node in model.graph.node):
        raise InputError(NOTHING)
    for entry in model.metadata_props:
        if entry.key == KEY:
            description = json.loads(entry.value)
            description["export"]["precision"] = precision
            entry.value = json.dumps(description)
    onnx.save(model, target)


def agreement(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    """How far two lists of results for the same images agree, in words; shares are the mean over the images."""
    mean, count = float(np.mean([*map(_agreement, ours, theirs)])), len(ours)
    images = counted(count, "image")
    if isinstance(ours[0], Classes | Labels):
        what = "class" if isinstance(ours[0], Classes) else "labels"
        return f"same {what} on {round(mean * count)} of {images}"
    if isinstance(ours[0], LabelMap):
        return f"same label for {mean:.2%} of the pixels of {images}"
    if not any(map(len, (*ours, *theirs))):
        return f"no objects in {images}"
    return f"{mean:.2%} of the objects in {images} found by both (same class, IoU of at least {SAME_IOU})"


def _agreement(ours: Any, theirs: Any) -> float:
    """The share of two results for an image that agrees: top class, labels, labels of pixels, or objects."""
    if isinstance(ours, Classes):
        return float(ours.labels[0] == theirs.labels[0])
    if isinstance(ours, Labels):
        return float({*ours.labels.tolist()} == {*theirs.labels.tolist()})
    if isinstance(ours, LabelMap):
        return float((ours.labels == theirs.labels).mean())
    assert isinstance(ours, Objects)
    if not len(ours) + len(theirs):
        return 1.0
    overlap = box_iou(torch.from_numpy(ours.boxes), torch.from_numpy(theirs.boxes)).numpy()
    same = (overlap >= SAME_IOU) & (ours.labels[:, None] == theirs.labels)
    return float(same.any(1).sum() + same.any(0).sum()) / (len(ours) + len(theirs))
