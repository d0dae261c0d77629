"""An exported file: its description, and its network in ONNX Runtime or OpenVINO."""

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.header import check_header

KEY = "dualtoken-vit"  # of the description in the metadata of an ONNX file
FORMAT = "dualtoken-vit export 1"
NEEDED = {"model", "model_args", "recipe", "metrics", "category_ids", "export"}  # and what `header` lists
Arrays = dict[str, np.ndarray]


def is_exported(path: str | Path) -> bool:
    """Whether a file's name is that of an exported file, not of a checkpoint."""
    return str(path).lower().endswith(".onnx")


def _onnxruntime(path: Path, options: dict[str, Any], optimise: bool = True) -> Any:
    """The file's ONNX Runtime session."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise InputError(f"onnxruntime is not installed: pip install onnxruntime, to use {path}") from error
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # errors are raised; do not print them too
    settings.add_session_config_entry("session.set_denormal_as_zero", "1")
    if threads := options.get("threads"):
        settings.intra_op_num_threads = threads
    if not optimise:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def _run_onnxruntime(path: Path, options: dict[str, Any]) -> Callable[[np.ndarray], Arrays]:
    session = _onnxruntime(path, options)
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, session.run(names, {"image": image}), strict=True))


def _antialiased(op: Any) -> bool:
    return op.get_type_name() == "Interpolate" and op.get_attributes()["antialias"]


def _shrinks(op: Any) -> bool:
    """Whether a resize of known shape makes (B, C, H, W) smaller: else antialiasing changes nothing."""
    return any(new < old for old, new in zip(op.get_input_shape(0), op.get_output_shape(0), strict=True))


def _run_openvino(path: Path, options: dict[str, Any]) -> Callable[[np.ndarray], Arrays]:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise InputError("openvino is not installed: pip install openvino, or use --runtime onnxruntime") from error
    settings = {"INFERENCE_PRECISION_HINT": "f32"}  # else it computes in bfloat16 where the processor can
    if threads := options.get("threads"):
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    core = openvino.Core()
    model = core.read_model(path)
    antialiased = any(map(_antialiased, model.get_ops()))
    first: list[tuple[int, ...]] = []
    lock = Lock()  # a compiled network has one buffer for its outputs: another thread would overwrite them

    @lru_cache(maxsize=64)  # a service may get any size
    def compiled(shape: tuple[int, ...] | None) -> Any:
        """The network for images of this shape; None: of any."""
        network = model.clone()
        if shape:
            network.reshape(list(shape))
        if any(_shrinks(op) for op in network.get_ops() if _antialiased(op)):
            raise InputError("OpenVINO ignores antialiasing (grid_resize=antialias): use --runtime onnxruntime")
        return core.compile_model(network, "CPU", settings)

    def run(image: np.ndarray) -> Arrays:
        with lock:
            # For one shape, that of the first call, OpenVINO takes up to a fifth less time than for any.
            if not first and model.is_dynamic():
                first.append(image.shape)
            found = compiled(image.shape if antialiased or image.shape in first else None)(image)
            return {name: value.copy() for output, value in found.items() for name in output.names}

    return run


RUNTIMES = {"onnxruntime": _run_onnxruntime, "openvino": _run_openvino}
"""name -> function of a file and options that returns its network: `image` -> outputs by name."""


def _load(path: Path, load: Callable[[], Any]) -> Any:
    """What `load` returns; an InputError where it cannot read the file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return load()
    except InputError:
        raise
    except Exception as error:  # each runtime has its own
        if os.path.getsize(path) == 0 or "arse" in str(error) or "INVALID_PROTOBUF" in str(error):
            raise InputError(
                f"{path} cannot be read as an ONNX file: it is truncated, damaged or of another format"
            ) from error
        raise InputError(f"{path} does not run here: {first_line(error)[:200]}") from error


@lru_cache
def _metadata(path: Path, state: tuple[int, ...] | None) -> str | None:
    """The JSON in a file, None without one. Reading takes a third of the time to the first answer: it is done once."""
    session = _load(path, lambda: _onnxruntime(path, {"threads": 1}, optimise=False))
    return session.get_modelmeta().custom_metadata_map.get(KEY)


def read_description(path: str | Path) -> dict[str, Any]:
    """The JSON that describes an exported file: task, class_names, preprocessing, export, ...

    Raises:
        InputError: for a file that is missing, damaged, of another program, or of another version of this one.
    """
    path = Path(path)
    state = path.stat() if path.is_file() else None
    text = _metadata(path, state and (state.st_ino, state.st_size, state.st_mtime_ns))
    if text is None:
        raise InputError(
            f"{path} is an ONNX file of another program: it has no description of task, classes and preprocessing; "
            "write it with dualtoken-vit export"
        )
    try:
        found = json.loads(text)
        known = found["format"] == FORMAT and found.keys() >= NEEDED
    except (ValueError, TypeError, KeyError, RecursionError):  # the last for JSON of too many levels
        known = False
    if not known:
        raise InputError(f"{path} was written by another version of dualtoken-vit; export it again")
    check_header(found, path)
    return found


class InputFailed(InputError):
    """A runtime could not compute the outputs for an input, for example for lack of memory."""


class ExportedModel:
    """The network of an exported file; see `deploy.graphs` for its inputs and outputs.

    Args:
        path: the file
        runtime: one of `RUNTIMES`
        threads: CPU threads; None: the runtime's default

    Raises:
        InputError: as `read_description`, and for a runtime that is unknown or not installed.
    """

    def __init__(self, path: str | Path, runtime: str = "onnxruntime", threads: int | None = None):
        if runtime not in RUNTIMES:
            raise InputError(f"--runtime {runtime}: choose one of {', '.join(RUNTIMES)}")
        self.path = Path(path)
        self.description = read_description(path)
        self._run = _load(self.path, lambda: RUNTIMES[runtime](self.path, {"threads": threads}))

    def __call__(self, image: np.ndarray) -> Arrays:
        """The outputs by name for images (B, C, H, W) float32 in [0, 1]; `InputFailed` where there are none."""
        try:
            return self._run(np.ascontiguousarray(image, dtype=np.float32))
        except Exception as error:
            size = "x".join(map(str, image.shape))
            raise InputFailed(f"{self.path} fails on an input of {size}: {first_line(error)[:200]}") from error
