"""Build the browser demo: the page, ONNX Runtime Web and the exported networks as one folder of static files.

python web/build_page.py [--classifier CHECKPOINT] [--segmenter CHECKPOINT] [--out DIR]
"""

import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import tyro

from dualtoken_vit.checkpoint import license_of
from dualtoken_vit.deploy.export import export
from dualtoken_vit.errors import InputError
from dualtoken_vit.predictors import default_options, read_header
from dualtoken_vit.runtime.session import read_description
from dualtoken_vit.show.drawing import color_of

HERE = Path(__file__).parent
PAGE = "index.html", "style.css", "icon.svg", "app.js", "image.js", "network.js", "sw.js"
RUNTIME = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
NOTICES = "LICENSE", "ThirdPartyNotices.txt"  # the package for Python has those of the same sources
FILES = "files.js"  # the last file that is written: what the service worker keeps
LARGEST = 20e6  # bytes of a segmenter's file
Precision = Literal["float32", "fp16", "int8"]


def build(
    classifier: Path = Path("dualtoken_vit_tiny_mix"),
    segmenter: Path | None = None,
    precision: Precision = "int8",
    images: Path | None = None,
    out: Path = HERE / "dist",
) -> None:
    """Build the browser demo as a folder of static files.

    Args:
        classifier: checkpoint of a DualToken-ViT, or the name of one whose weights come with the package
        segmenter: checkpoint whose segmentation the page can show
        precision: of the weights
        images: folder of images to verify the exported files with; by default noise
        out: the folder, which is replaced if it holds an earlier build

    Raises:
        InputError: for a network or folder that cannot be used; an earlier build is then kept.
    """
    if out.exists() and not (out / FILES).is_file():
        raise InputError(f"--out {out}: exists and is no earlier build; name another folder")
    source = HERE / "node_modules" / "onnxruntime-web" / "dist"
    if not source.is_dir():
        raise InputError(f"{source} is missing; run make web, or npm ci in {HERE}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".") as folder:
        new = Path(folder, "new")
        (new / "ort").mkdir(parents=True)
        about: dict[str, Any] = {"classifier": _export(classifier, "classification", new, precision, images)}
        about["segmenter"] = segmenter and _export(segmenter, "segmentation", new, precision, images)
        (new / "networks.json").write_text(json.dumps(about))
        for name in PAGE:
            shutil.copy(HERE / name, new)
        for name in RUNTIME:
            shutil.copy(source / name, new / "ort")
        kept = sorted(path for path in new.rglob("*") if path.is_file())
        version = hashlib.sha256(b"".join(path.read_bytes() for path in kept)).hexdigest()
        names = ["./", *(path.relative_to(new).as_posix() for path in kept)]
        for name in NOTICES:
            shutil.copy(str(files("onnxruntime") / name), new / "ort")
        (new / FILES).write_text(f"const VERSION = {version[:16]!r};\nconst FILES = {json.dumps(names)};\n")
        if out.exists():
            out.rename(Path(folder, "old"))
        new.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB; to try it: python -m http.server --directory {out}")


def _export(checkpoint: Path, task: str, folder: Path, precision: Precision, images: Path | None) -> dict[str, Any]:
    """Export a network into the folder; returns what the page needs to know of it."""
    flag = "classifier" if task == "classification" else "segmenter"
    header = read_header(checkpoint)
    if header.task != task or header.preprocessing["input_size"][0] != 3:
        raise InputError(f"--{flag} {checkpoint}: a network for {header.task}; the page needs one for {task} in RGB")
    file = export(
        checkpoint,
        folder / f"{flag}.onnx",
        attention=task == "classification",
        images=images,
        int8="dynamic" if precision == "int8" else None,
        fp16=precision == "fp16",
    )
    description, size = read_description(file), file.stat().st_size
    names = description["preprocessing"].get("label_descriptions") or description["class_names"]
    about = dict(
        asdict(default_options(file)),
        file=file.name,
        bytes=size,
        model=description["model"],
        precision=description["export"]["precision"],
        class_names=names,
        license=license_of(checkpoint),
    )
    if task == "classification":
        temperature = description["preprocessing"].get("temperature", 1.0)
        return about | {"temperature": temperature, "top1": description["metrics"].get("val_top1")}
    if size > LARGEST:
        raise InputError(f"--segmenter {checkpoint}: {size / 1e6:.0f} MB is too much for a page; use LR-ASPP or int8")
    return about | {"colours": [color_of(label) for label in range(len(names))]}


if __name__ == "__main__":
    try:
        tyro.cli(build)
    except InputError as error:
        sys.exit(f"error: {error}")
