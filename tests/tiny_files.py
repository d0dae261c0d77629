"""Exported files with hand-made graphs, which need no export, a tiny checkpoint, and an image."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tiny_graphs import MEAN, STD

from dualtoken_vit.checkpoint import save_checkpoint
from dualtoken_vit.recipes import RECIPES, to_dict
from dualtoken_vit.runtime.session import FORMAT, KEY

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


def save_classifier(path):
    """Logits: ten times the mean of each channel."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Mul", ["flat", "ten"], ["logits"]),
    ]
    outputs, constants = [("logits", TensorProto.FLOAT, ["b", 3])], {"ten": np.float32(10)}
    return save(path, nodes, outputs, description("classification"), constants)


def save_segmenter(path, **about):
    """A convolution 3x3 with the weights WEIGHT; changes of its description."""
    node = helper.make_node("Conv", ["image", "weight"], ["logits"], pads=[1, 1, 1, 1])
    outputs = [("logits", TensorProto.FLOAT, ["b", 3, "h", "w"])]
    return save(path, [node], outputs, description("segmentation") | about, {"weight": WEIGHT})


def smooth_image():
    """93x71 pixels, smooth enough that few pixels are close between two classes."""
    noise = np.random.default_rng(1).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((93, 71), Image.Resampling.BICUBIC)


def classifier_file(path, model, args):
    """An untrained classifier as if of a run on this machine's files."""
    recipe = to_dict(RECIPES["folder"])
    recipe["data"] |= {"root": str(Path.cwd()), "image_size": 64}
    recipe["model"] |= {"checkpoint": str(Path.home() / "best.safetensors")}
    recipe["distill"] |= {"teacher": str(Path.home() / "teacher.safetensors")}
    shape = {"input_size": (3, 64, 64), "mean": MEAN, "std": STD, "crop_pct": 1.0, "interpolation": "bicubic"}
    names, metrics = ("blue", "green", "red"), {"top1": 0.5}
    save_checkpoint(
        path,
        model,
        task="classification",
        class_names=names,
        preprocessing=shape,
        recipe=recipe,
        metrics=metrics,
        model_args=args,
    )
    return path
