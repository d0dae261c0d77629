"""Conversion of a graph to ONNX."""

import ctypes
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dualtoken_vit.deploy.plans import Plan
from dualtoken_vit.errors import InputError, first_line, lacks_memory
from dualtoken_vit.runtime.session import KEY


class ConversionError(InputError):
    """The converter does not take a graph."""


def example(plan: Plan, channels: int) -> torch.Tensor:
    """The input that a graph is traced with."""
    return torch.rand(1 if plan.one else 2, channels, *(plan.size if plan.fixed else plan.trace))


@contextmanager
def quiet() -> Iterator[None]:
    """The converters warn of internals."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _flush() -> None:
    """Write what is buffered: by Python, and by libraries in C, whose buffer would outlive `silent`."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is printed, not even by libraries in C, unless an error ends it: stderr then gets all of it."""
    if sys.stdout is None or sys.stderr is None:  # closed: their numbers may be those of other files
        yield
        return
    with tempfile.TemporaryFile() as log:
        _flush()
        kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        failed = False
        try:
            yield
        except Exception:
            failed = True
            raise
        finally:
            _flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            if failed:
                log.seek(0)
                sys.stderr.write(log.read().decode(errors="replace"))


def to_onnx(plan: Plan, channels: int, description: dict[str, Any]) -> bytes:
    """The graph as an ONNX file without external data; a ConversionError if it cannot be converted."""
    import onnx

    axes = {} if plan.one else {0: "batch"}
    if not plan.fixed:
        axes |= {2: "height", 3: "width"}
    try:
        with quiet(), torch.inference_mode():
            program = torch.onnx.export(
                plan.graph.eval(),
                (example(plan, channels),),
                dynamo=True,
                dynamic_shapes=(axes,) if axes else None,
                input_names=["image"],
                output_names=list(plan.outputs),
                verbose=False,
            )
    except Exception as error:  # of any kind, at any depth
        cause = error.__cause__ or error
        if lacks_memory(cause):
            raise cause from None
        raise ConversionError(f"the network cannot be converted to ONNX: {first_line(cause)[:300]}") from error
    assert program is not None
    model = program.model_proto
    strip(model)
    model.metadata_props.append(onnx.StringStringEntryProto(key=KEY, value=json.dumps(description)))
    model.producer_name, model.producer_version = KEY, description["versions"]["dualtoken-vit"]
    return model.SerializeToString()


def strip(message: Any) -> None:
    """Remove documentation and metadata from an ONNX message and all in it: source paths and stack traces."""
    for descriptor, value in message.ListFields():
        if descriptor.name in ("metadata_props", "doc_string"):
            message.ClearField(descriptor.name)
        elif descriptor.message_type is not None:
            for each in value if descriptor.is_repeated else (value,):
                strip(each)
