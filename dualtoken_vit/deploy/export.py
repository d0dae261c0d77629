"""The command `export`: a trained network as one file for other runtimes, verified against PyTorch."""

import hashlib
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import is_dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

import dualtoken_vit
from dualtoken_vit import recipes
from dualtoken_vit.bounds import parse_size
from dualtoken_vit.checkpoint import Checkpoint, locate
from dualtoken_vit.data.threads import track, working
from dualtoken_vit.deploy.convert import ConversionError, quiet, to_onnx
from dualtoken_vit.deploy.mobile import TARGETS
from dualtoken_vit.deploy.plans import Plan, plan
from dualtoken_vit.deploy.verify import IMAGES, TOLERANCE, batches, difference, expected, load_images
from dualtoken_vit.errors import InputError, pip_install
from dualtoken_vit.files import atomic_write, printable
from dualtoken_vit.predictors import load_model, stored_recipe
from dualtoken_vit.runtime.base import to_image
from dualtoken_vit.runtime.predictor import load_predictor as load_exported
from dualtoken_vit.runtime.session import FORMAT, Arrays, ExportedModel

CALIBRATION = 32  # images of a folder for int8
NEEDED = {"onnx": ("onnx", "onnxscript"), "litert": ("litert_torch",), "coreml": ("coremltools",)}
PACKAGES = "torch", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime"


def export(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    size: str | None = None,
    raw: bool = False,
    attention: bool = False,
    images: str | Path | None = None,
    int8: Literal["dynamic", "static"] | None = None,
    fp16: bool = False,
    format: Literal["onnx", "litert", "coreml"] = "onnx",
) -> Path:
    """Write a trained network as one file, verified against PyTorch; returns its path.

    The input `image` is float32 (B, C, H, W), RGB or grey in [0, 1]. Outputs: classification and multilabel `logits`
    (B, classes); segmentation `logits` (B, classes, H, W); detection `boxes` (100, 4) in pixels, `scores`, `labels`,
    padded with -1, and `masks` (100, 1, 28, 28) for Mask R-CNN. Detectors take one image of a fixed size, the others
    any size.

    Args:
        checkpoint: the best.safetensors of a run, or a name as for `read_checkpoint`
        others: as on the command line, `arguments.Export`

    Raises:
        InputError: for a checkpoint or option that cannot be used, or if the file differs from PyTorch.
    """
    checkpoint, images = Path(checkpoint), Path(images) if images else None
    suffix = ".onnx" if format == "onnx" else TARGETS[format].suffix
    beside = checkpoint.with_name(f"model{suffix}") if checkpoint.exists() else f"{checkpoint}{suffix}"
    out = Path(out or beside)
    if out.suffix.lower() != suffix:
        raise InputError(f"--out {out}: name a file that ends with {suffix}")
    if out.is_dir():
        raise InputError(f"--out {out}: a folder; remove it or name another file")
    if format != "onnx" and (raw or attention or int8 or fp16):
        raise InputError(f"--format {format}: --raw, --attention, --int8 and --fp16 are for onnx; leave them out")
    if int8 and fp16:
        raise InputError("--int8, --fp16: give one of them")
    if int8 == "static" and images is None:
        raise InputError("--int8 static needs --images FOLDER, to measure the range of the activations")
    _check_packages(format)
    model: Any
    model, about = load_model(checkpoint)
    sides = parse_size(size, "--size", 32) if size else None
    if sides is None and about.task == "detection":
        if tile := about.recipe.get("data", {}).get("tile"):
            sides = model.transform.usual([(tile, tile)])
        elif images is not None:
            loaded = load_images(images, about.preprocessing["input_size"][0], CALIBRATION)
            sides = model.transform.usual(image.size for image in loaded)
        elif stored := about.preprocessing.get("usual_size"):
            sides = tuple(stored)
    chosen = plan(model, about, sides, raw, attention)
    if format != "onnx":
        return _mobile(format, out, chosen, about, checkpoint, images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        try:
            _convert(file, chosen, about, checkpoint, images)
        except ConversionError as error:
            if chosen.fixed or about.task in ("detection", "segmentation"):
                raise
            print(f"for any size, {error}; for one size:")
            chosen = replace(chosen, fixed=True)
            _convert(file, chosen, about, checkpoint, images)
        if int8 or fp16:
            file = _smaller(file, f"int8-{int8}" if int8 else "float16", images)
        data = file.read_bytes()
    with atomic_write(out) as target:
        target.write(data)
    height, width = chosen.size
    takes = f"images of {width}x{height}" if chosen.fixed else "images of any size"
    if chosen.one and sides is None:
        takes += "; in images that are not square, objects become smaller than in training: give --images FOLDER"
    print(f"{printable(out)}: {len(data) / 1e6:.1f} MB, takes {takes}")
    return out


def _check_packages(format: str) -> None:
    """An InputError if a package is missing that writes this format."""
    for package in NEEDED[format]:
        if find_spec(package) is None:
            needed, how = package, pip_install("export" if format == "onnx" else format)
            if format == "litert":
                needed += ", and torch below 2.15"
                how += "; then pip install --upgrade typing-extensions"
            raise InputError(f"--format {format} needs {needed}: {how}")


def _mobile(format: str, out: Path, chosen: Plan, about: Checkpoint, checkpoint: Path, images: Path | None) -> Path:
    """Write a LiteRT or Core ML file for one image of one size."""
    if about.task == "detection":
        raise InputError(f"--format {format}: for classifiers and segmenters; export a detector to onnx")
    target, chosen = TARGETS[format], replace(chosen, fixed=True, one=True)
    channels, description = about.preprocessing["input_size"][0], describe(chosen, about, checkpoint)
    inputs = batches(chosen, channels, images)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=out.parent)  # on the same disk, so that it can be renamed
    except OSError as error:
        raise InputError(f"cannot write {printable(out)}: {error.strerror}") from error
    with beside as folder:
        file = Path(folder, out.name)
        print(f"converting to {format}", file=sys.stderr, flush=True)
        target.convert(chosen, channels, description, file)
        if target.run is None:
            print(f"not verified: {format} does not run here")
        else:
            _verify(partial(target.run, file, chosen.outputs), chosen, inputs)
        file.replace(out)
    print(f"{printable(out)}: takes one image of {chosen.size[1]}x{chosen.size[0]}")
    return out


def _convert(file: Path, chosen: Plan, about: Checkpoint, checkpoint: Path, images: Path | None) -> None:
    """Write the file; ConversionError if it cannot be made or differs from PyTorch."""
    channels = about.preprocessing["input_size"][0]
    inputs = batches(chosen, channels, images)  # first: a folder without images is found at once
    with working("converting to ONNX"):
        file.write_bytes(to_onnx(chosen, channels, describe(chosen, about, checkpoint)))
    try:
        _verify(ExportedModel(file), chosen, inputs)
    except ConversionError:
        raise
    except InputError as error:  # the graph is made for the size that it was traced with
        raise ConversionError(str(error).replace(str(file), "the file")) from error


def _verify(network: Callable[[np.ndarray], Arrays], chosen: Plan, inputs: list[np.ndarray]) -> None:
    """Print the largest difference to PyTorch; ConversionError where it is above `TOLERANCE`."""
    found = [
        difference(expected(chosen, image), network(image), max(image.shape[2:]))
        for image in track(inputs, len(inputs), "verifying")
    ]
    worst = float(np.max(found))  # NaN if one is
    shapes = ", ".join(dict.fromkeys("x".join(map(str, image.shape)) for image in inputs))
    report = f"largest difference to PyTorch {worst:.1e} of the largest output, at {shapes}"
    if not worst <= TOLERANCE:
        raise ConversionError(f"{report}: above {TOLERANCE:g}, the file is not kept")
    print(report)


def _smaller(file: Path, precision: Any, images: Path | None) -> Path:
    """A smaller version of a file, beside it; prints how far its predictions agree."""
    from dualtoken_vit.deploy.quantise import agreement, network_inputs, quantise

    before = load_exported(file)
    if images is not None:
        some = load_images(images, before.channels, CALIBRATION)
    else:
        shape = (*(before.export["size"] or (256, 256)), 3)
        noise = np.random.default_rng(0).integers(0, 256, (IMAGES, *shape), dtype=np.uint8)
        some = [to_image(each, before.channels) for each in noise]
    smaller = file.with_name("smaller.onnx")
    with quiet():
        quantise(file, smaller, precision, network_inputs(before, some) if precision == "int8-static" else ())
    titles = {"predicting, float32": before, f"predicting, {precision}": load_exported(smaller)}
    results = [[each(image) for image in track(some, len(some), title)] for title, each in titles.items()]
    agree = agreement(*results)
    sizes = " to ".join(f"{each.stat().st_size / 1e6:.1f}" for each in (file, smaller))
    hint = "" if images else "; these are noise: give --images FOLDER for real ones"
    print(f"{precision}: {sizes} MB; compared with the float32 file: {agree}{hint}")
    return smaller


def describe(chosen: Plan, about: Checkpoint, checkpoint: Path) -> dict[str, Any]:
    """The JSON in the file. Nothing in it names a place on this machine."""
    recipe = stored_recipe(checkpoint, about)
    free, default = recipes.free_on_resume(type(recipe)), type(recipe)()
    sections: dict[str, Any] = {name: section for name, section in vars(recipe).items() if is_dataclass(section)}
    for name, section in sections.items():
        own = [field for field in vars(section) if f"{name}.{field}" in free]
        sections[name] = replace(section, **{field: getattr(getattr(default, name), field) for field in own})
    recipe = replace(recipe, **sections | {"model": replace(recipe.model, name=about.model, checkpoint=None)})
    preprocessing = dict(about.preprocessing)
    if about.task not in ("detection", "segmentation"):
        preprocessing["input_size"] = (preprocessing["input_size"][0], *chosen.size)
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {
        "format": FORMAT,
        "task": about.task,
        "model": about.model,
        "model_args": about.model_args,
        "class_names": about.class_names,
        "category_ids": about.category_ids,
        "preprocessing": preprocessing,
        "recipe": recipes.to_dict(recipe),
        "metrics": about.metrics,
        "sha256": hashlib.sha256(locate(checkpoint).read_bytes()).hexdigest(),
        "export": {"size": chosen.size if chosen.fixed else None, "raw": False, "precision": "float32", **chosen.about},
        "versions": {"dualtoken-vit": dualtoken_vit.__version__, **found},
    }
