"""Conversion to LiteRT and Core ML: one image of a fixed size, classifiers and segmenters."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dualtoken_vit.deploy.convert import ConversionError, example, quiet, silent
from dualtoken_vit.deploy.plans import Plan
from dualtoken_vit.errors import first_line
from dualtoken_vit.runtime.session import KEY, Arrays


class Target(NamedTuple):
    suffix: str
    convert: Callable[[Plan, int, dict[str, Any], Path], None]  # graph, channels, description, file
    run: Callable[[Path, tuple[str, ...], np.ndarray], Arrays] | None  # file, names of outputs, image; None: not here


@silent()
def to_litert(plan: Plan, channels: int, description: dict[str, Any], file: Path) -> None:
    """Write a LiteRT file; its description is an associated file, in a ZIP archive at the end.

    Raises:
        ConversionError: if the graph cannot be converted.
    """
    try:
        import litert_torch

        with quiet():
            # litert-torch 0.10 reads the weights of a channels-last network in the wrong order.
            graph = plan.graph.eval().to(memory_format=torch.contiguous_format)
            litert_torch.convert(graph, (example(plan, channels),)).export(str(file))
    except Exception as error:  # of any kind
        raise ConversionError(f"the network cannot be converted to LiteRT: {first_line(error)[:300]}") from error
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{KEY}.json", json.dumps(description))


@silent()
def run_litert(file: Path, outputs: tuple[str, ...], image: np.ndarray) -> Arrays:
    """The outputs of a LiteRT file by name."""
    from ai_edge_litert.interpreter import Interpreter

    network = Interpreter(str(file))
    network.allocate_tensors()
    network.set_tensor(network.get_input_details()[0]["index"], image)
    network.invoke()
    found = (network.get_tensor(each["index"]) for each in network.get_output_details())
    return dict(zip(outputs, found, strict=True))


@silent()
def to_coreml(plan: Plan, channels: int, description: dict[str, Any], file: Path) -> None:
    """Write a Core ML package for iOS 17 and macOS 14 or later, which only a Mac can run.

    Raises:
        ConversionError: if the graph cannot be converted.
    """
    try:
        import coremltools

        with quiet(), torch.no_grad():
            program = torch.export.export(plan.graph.eval(), (example(plan, channels),)).run_decompositions({})
            for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
                source = node.args[0]  # coremltools does not know aliases
                node.replace_all_uses_with(source)
                program.graph_signature.replace_all_uses(node.name, source.name)
                program.graph.erase_node(node)
            model = coremltools.convert(
                program,
                inputs=[coremltools.TensorType(name="image", shape=(1, channels, *plan.size))],
                outputs=[coremltools.TensorType(name=name) for name in plan.outputs],
                minimum_deployment_target=coremltools.target.iOS17,
                compute_precision=coremltools.precision.FLOAT32,
            )
    except Exception as error:  # of any kind
        raise ConversionError(f"the network cannot be converted to Core ML: {first_line(error)[:300]}") from error
    model.user_defined_metadata[KEY] = json.dumps(description)
    model.save(str(file))


TARGETS = {
    "litert": Target(".tflite", to_litert, run_litert),
    "coreml": Target(".mlpackage", to_coreml, None),
}
