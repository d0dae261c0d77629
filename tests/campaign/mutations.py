"""Damaged input: a command ends in time, without a traceback, skips nothing silently, and measures what is there."""

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from campaign import mutators, readers
from campaign.core import Case, Outcome, Verdict, run
from campaign.crashes import whole
from campaign.world import SIDE, best, training
from campaign.writes import half

ENDED = {0: "accepted", 1: "problems reported", 2: "rejected"}


def verdict(group: str, what: str, outcome: Outcome, fault: str = "") -> Verdict:
    """The verdict on a command, whose own faults come before one found by comparison."""
    return Verdict(group, what, ENDED.get(outcome.status or 0, "stopped"), outcome.fault or fault)


def _json(outcome: Outcome) -> Any:
    """The object that a command printed with --json."""
    return json.loads(outcome.out.strip().splitlines()[-1])


SUFFIXES = (
    "png jpg gif bmp tif webp ppm tga ico icns jp2 j2k pcx sgi dds avif mpo im blp xbm msp qoi apng jfif dib pgm pfm"
)
MODES = {"blp": "P", "xbm": "1", "msp": "1", "pgm": "L", "pfm": "F"}  # of formats without RGB


def _image(rng: Random, path: Path) -> Path:
    """A valid image of some format, mode and options, with the extension of the format."""
    suffix = rng.choice(SUFFIXES.split())
    path = path.with_name(f"{path.name}.{suffix}")
    side = 64 if suffix in ("ico", "icns") else rng.randrange(8, 40)
    image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
    mode = MODES.get(suffix) or rng.choice(["RGB"] * 3 + ["L", "P", "RGBA", "CMYK", "1", "I;16", "LA"])
    options: dict[str, Any] = rng.choice(
        [{}, {}, {"compression": "tiff_lzw"}, {"progressive": True}, {"lossless": True}]
    )
    if suffix in ("png", "tif", "jpg", "webp") and rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(1, 9)
        options |= {"exif": exif}
    for each in (mode, MODES.get(suffix, "RGB"), "L"):
        try:
            image.convert(each).save(path, **options)
            return path
        except (OSError, ValueError, KeyError, TypeError):
            options = {}
    image.convert("RGB").save(path, "PNG")  # its name is then that of another format
    return path


def image(rng: Random, world: Path, folder: Path) -> Verdict:
    """A damaged image among sound ones."""
    command = rng.choice(["predict"] * 4 + ["check-data", "evaluate", "train"])
    root = folder / "photos"
    shutil.copytree(world / "photos", root)
    place = root / rng.choice(["train", "val"]) / "red"
    path = _image(rng, place / "odd")
    for _ in range(rng.choice([1, 1, 1, 2])):
        kind, content = mutators.damage(rng, path.read_bytes())
        path.write_bytes(content)
    what = f"{path.name}: {kind} -> {command}"
    found = readers.pixels(path)
    fault = ""
    if command == "predict":
        plain = found is not None and found.mode in ("RGB", "L") and found.getexif().get(0x0112, 1) == 1
        if found is not None and plain and "transparency" not in found.info:
            found.convert("RGB").save(place / "copy.bmp")
        outcome = run("predict", best(world, "classification"), place, "--json", folder=folder)
        if not outcome.fault and outcome.status != 2:
            record = _json(outcome)
            results = {Path(one["image"]).name: one["classes"] for one in record["predictions"]}
            bad = {Path(one["image"]).name for one in record["unreadable"]}
            there = {each.name for each in place.iterdir()}
            copy, own = (results.get(name) for name in ("copy.bmp", path.name))
            if results.keys() | bad != there:
                fault = f"silently skipped {sorted(there - results.keys() - bad)}"
            elif (path.name in bad) < (found is None):
                fault = "PIL cannot decode what was predicted for"
            elif plain and copy and own and _differ(copy, own):
                fault = "another prediction than for the same pixels in a BMP"
    else:
        more: dict[str, Any] = {"optim__epochs": 1}
        if command == "check-data":
            outcome = run("check-data", "folder", "--data.root", root, "--data.image-size", SIDE, folder=folder)
        elif command == "evaluate":
            outcome = run("evaluate", best(world, "classification"), "--data.root", root, "--json", folder=folder)
        else:
            outcome = run(*training("classification", world, folder / "run", data__root=root, **more), folder=folder)
        met = command != "evaluate" or "val" in path.parts
        if found is None and outcome.status == 0 and met:
            fault = "accepted an image that PIL cannot decode"
        elif outcome.status and path.name not in outcome.out + outcome.err:
            fault = "does not name the image"
    return verdict("images", what, outcome, fault)


def _differ(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    shares, others = ({each["class"]: each["probability"] for each in classes} for classes in (one, other))
    return any(abs(share - others[name]) > 1e-4 for name, share in shares.items())


LABELS = {  # of each format: the files whose text or JSON is changed
    "coco": "annotations/*.json",
    "yolo": "labels/*/*.txt data.yaml",
    "voc": "Annotations/*.xml ImageSets/Main/*.txt",
    "csv": "*/_annotations.csv",
    "labelme": "*.json",
}


def _change(rng: Random, path: Path) -> str:
    """Damage a text or JSON file; returns what was done."""
    content = path.read_bytes()
    how = rng.choice(["bytes", "meaning", "meaning", "meaning"])
    if how == "bytes":
        kind, content = mutators.damage(rng, content)
    elif path.suffix == ".json":
        kind, value = mutators.change(rng, json.loads(content))
        content = mutators.dump(rng, value)
    else:
        kind, text = mutators.spoil(rng, content.decode())
        content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(content)
    return f"{path.name}: {kind}"


def labels(kind: str) -> Case:
    """Damaged labels of objects in one of the formats."""

    def case(rng: Random, world: Path, folder: Path) -> Verdict:
        root = folder / "data"
        shutil.copytree(world / ("objects" if kind == "coco" else kind), root)
        path = rng.choice(sorted(each for pattern in LABELS[kind].split() for each in root.glob(pattern)))
        what = _change(rng, path)
        command = rng.choice(["convert", "convert", "check-data", "evaluate"])
        holdout = ("--data.holdout", 0.4) if kind == "labelme" else ()
        out = folder / "out"
        fault = ""
        if command == "convert":
            outcome = run("convert", root, out, "--to", "coco", "--format", kind, folder=folder)
            if outcome.status == 0:
                fault = _other_objects(kind, root, out)
            elif out.exists():
                fault = "left a folder behind"
        elif command == "check-data":
            outcome = run("check-data", "coco", "--data.root", root, "--data.format", kind, *holdout, folder=folder)
        else:
            more = ("--data.root", root, "--data.format", kind, *holdout, "--out", out, "--json")
            outcome = run("evaluate", best(world, "detection"), *more, folder=folder)
            if outcome.status == 0 and kind == "coco":
                expected = readers.average_precision(
                    root / "annotations" / "instances_val.json", out / "detections-box.json"
                )
                found = _json(outcome)["box"]["AP"]
                if abs(found - expected) > 1e-9:
                    fault = f"AP {found}, but {expected} by pycocotools"
        return verdict(f"{kind} labels", f"{what} -> {command}", outcome, fault)

    return case


def _other_objects(kind: str, root: Path, out: Path) -> str:
    try:
        expected = readers.objects_of(kind, root)
    except Exception as error:
        return f"converted what a plain reader cannot read: {type(error).__name__}: {error}"
    found = readers.objects_of("coco", out)
    missing, new = expected - found, found - expected
    return f"objects differ: missing {list(missing)[:2]}, new {list(new)[:2]}" if missing or new else ""


def masks(rng: Random, world: Path, folder: Path) -> Verdict:
    """A damaged mask or class file."""
    root = folder / "masks"
    shutil.copytree(world / "masks", root)
    path = rng.choice([*sorted((root / "annotations" / "val").iterdir()), root / "classes.txt"])
    if path.suffix == ".txt":
        what = _change(rng, path)
    elif rng.random() < 0.5:
        kind, content = mutators.damage(rng, path.read_bytes())
        path.write_bytes(content)
        what = f"mask: {kind}"
    else:  # a mask of another kind
        mask = Image.open(path).copy()
        mode = rng.choice(["P", "RGB", "1", "I", "LA", "F", "I;16"])
        if rng.random() < 0.3:
            mask = mask.resize((rng.randrange(1, 60), rng.randrange(1, 60)))
        if rng.random() < 0.3:
            mask = mask.point(lambda value: rng.choice([0, 1, value, 6, 7, 8, 254, 255]))
        kind = "TIFF" if mode == "F" else rng.choice(["PNG", "TIFF"])
        mask.convert(mode).save(path, "TIFF" if mode == "I" else kind)
        what = f"mask: mode {mode}"
    command = rng.choice(["evaluate", "evaluate", "check-data", "train"])
    fault = ""
    if command == "evaluate":
        network = best(world, "segmentation")
        outcome = run("evaluate", network, "--data.root", root, "--json", folder=folder)
        if outcome.status == 0:
            drawn = run("predict", network, root / "images" / "val", "--out", folder / "drawn", folder=folder)
            maps = readers.label_maps(folder / "drawn")
            names = (root / "classes.txt").read_text(encoding="utf-8-sig").split("\n")
            trained = (world / "masks" / "classes.txt").read_text().split()
            order = [trained.index(name.strip()) for name in names if name.strip()]
            found, expected = _json(outcome), readers.mean_iou(maps, root / "annotations" / "val", order)
            pair = found["miou"], found["pixel_accuracy"]
            if drawn.status or max(abs(a - b) for a, b in zip(pair, expected, strict=True)) > 1e-6:
                fault = f"mIoU and accuracy {pair}, but {expected} by counting pixels"
    elif command == "check-data":
        outcome = run("check-data", "masks", "--data.root", root, folder=folder)
    else:
        outcome = run(*training("segmentation", world, folder / "run", data__root=root, optim__epochs=1), folder=folder)
    return verdict("masks and class files", f"{what} -> {command}", outcome, fault)


def table(rng: Random, world: Path, folder: Path) -> Verdict:
    """A damaged table of labels."""
    root = folder / "tags"
    shutil.copytree(world / "tags", root)
    what = _change(rng, path := root / "val.csv")
    command = rng.choice(["evaluate", "check-data"])
    fault = ""
    if command == "check-data":
        outcome = run("check-data", "multilabel", "--data.root", root, folder=folder)
    else:
        outcome = run("evaluate", best(world, "multilabel"), "--data.root", root, "--json", folder=folder)
        if outcome.status == 0:
            rows = [row for row in path.read_text(encoding="utf-8-sig").splitlines()[1:] if row.strip(' ,"')]
            count = len({row.partition(",")[0].strip() for row in rows})
            if _json(outcome)["images"] != count:
                fault = f"{_json(outcome)['images']} images, but {count} in the table"
    return verdict("tables", f"{what} -> {command}", outcome, fault)


def recipe(rng: Random, world: Path, folder: Path) -> Verdict:
    """The damaged recipe.json of a run that is resumed."""
    out = folder / "run"
    shutil.copytree(world / "runs" / "classification", out)
    what = _change(rng, out / "recipe.json")
    return verdict("recipes", what, run("train", "--resume", "--out", out, folder=folder))


def last(rng: Random, world: Path, folder: Path) -> Verdict:
    """A damaged last.ckpt: the run goes on as if it was not, or it is rejected."""
    half(world)
    finished, _ = whole(world, "classification", 1)
    out = folder / "run"
    shutil.copytree(world / "half", out)
    before = (out / "last.ckpt").read_bytes()
    fault = ""
    if rng.random() < 0.6:
        what, content = mutators.damage(rng, before)
        (out / "last.ckpt").write_bytes(content)
        outcome = run("train", "--resume", "--out", out, folder=folder)
        ends = (torch.load(folder / "last.ckpt") for folder in (out, finished)) if outcome.status == 0 else ({}, {})
        if not _same(*({key: end.get(key) for key in ("state_dict", "optimizer_states")} for end in ends)):
            fault = "went on from other values than were saved"
    else:
        what, state = _change_state(rng, torch.load(out / "last.ckpt"))
        torch.save(state, out / "last.ckpt")
        outcome = run("train", "--resume", "--out", out, folder=folder)
    return verdict("last.ckpt", what, outcome, fault)


def _change_state(rng: Random, state: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """One entry of a checkpoint removed or with another value."""
    path, holder = [], state
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        path.append(str(key))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or rng.random() < 0.15:
            break
        holder = holder[key]
    if rng.random() < 0.3:
        del holder[key]
        return f"removed {'.'.join(path)}", state
    holder[key] = rng.choice([*mutators.VALUES, torch.zeros(3), torch.full((2, 2), float("nan"))])
    return f"set {'.'.join(path)}", state


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def weights(rng: Random, world: Path, folder: Path) -> Verdict:
    """A damaged best.safetensors."""
    source, path = best(world, rng.choice(["classification", "segmentation"])), folder / "best.safetensors"
    if rng.random() < 0.5:
        what, content = mutators.damage(rng, source.read_bytes())
        if rng.random() < 0.5:  # in the header
            start = rng.randrange(3000)
            what, content = (
                "header: " + what,
                mutators.damage(rng, source.read_bytes()[:start])[1] + source.read_bytes()[start:],
            )
        path.write_bytes(content)
    else:
        with safe_open(source, "pt") as file:
            metadata = {key: value for key, value in file.metadata().items() if key != "sha256"}
        tensors = load_file(source)
        key = rng.choice([*metadata, *metadata, "tensor"])
        if key == "tensor":
            name = rng.choice(list(tensors))
            tensors[name] = rng.choice(
                [torch.zeros(0), torch.zeros(3, 3), tensors[name].double(), tensors[name] * float("nan")]
            )
            what = f"tensor {name}"
        elif key == "format":
            metadata.pop(key)
            what = "no format"
        else:
            what, value = mutators.change(rng, {key: json.loads(metadata[key])})
            metadata[key] = json.dumps(value[key] if isinstance(value, dict) and key in value else value)
        save_file(tensors, path, metadata)
    photos = world / "photos" / "val" / "red"
    command = rng.choice(["predict", "evaluate", "export", "train"])
    if command == "predict":
        outcome = run("predict", path, photos, "--json", folder=folder)
    elif command == "export":
        outcome = run("export", path, "--out", folder / "model.onnx", folder=folder)
        if outcome.status and (folder / "model.onnx").exists():
            return verdict("best.safetensors", f"{what} -> export", outcome, "left a file behind")
    elif command == "evaluate":
        outcome = run("evaluate", path, "--json", folder=folder)
    else:
        more = ("--model.checkpoint", path)
        outcome = run(*training("classification", world, folder / "run", *more, optim__epochs=1), folder=folder)
    return verdict("best.safetensors", f"{what} -> {command}", outcome)


def onnx(rng: Random, world: Path, folder: Path) -> Verdict:
    """A damaged exported file."""
    source, path = world / f"{rng.choice(['classification', 'segmentation', 'detection'])}.onnx", folder / "model.onnx"
    content = source.read_bytes()
    if rng.random() < 0.5:
        what, content = mutators.damage(rng, content)
    else:
        import onnx

        model = onnx.load_from_string(content)
        entry = next(one for one in model.metadata_props if one.key == "dualtoken-vit")
        what, value = mutators.change(rng, json.loads(entry.value))
        entry.value = json.dumps(value)
        content = model.SerializeToString()
    path.write_bytes(content)
    runtime = rng.choice(["onnxruntime", "onnxruntime", "openvino"])
    outcome = run("predict", path, world / "photos" / "val" / "red", "--json", "--runtime", runtime, folder=folder)
    return verdict("ONNX files", f"{source.stem}: {what} -> {runtime}", outcome)


def tree(rng: Random, world: Path, folder: Path) -> Verdict:
    """Oddities in a folder tree: each file is used or mentioned."""
    root = folder / "photos"
    shutil.copytree(world / "photos", root)
    place = root / "val" / "red"
    what = ", ".join(mutators.litter(rng, place) for _ in range(rng.choice([1, 1, 2, 4])))
    command = rng.choice(["predict", "predict", "check-data", "evaluate", "train"])
    fault = ""
    if command == "predict":
        out = folder / "out"
        outcome = run("predict", best(world, "classification"), place, "--json", "--out", out, folder=folder)
        if not outcome.fault and outcome.status != 2:
            record, (images, others) = _json(outcome), readers.visible_files(place)
            used, bad = len(record["predictions"]), len(record["unreadable"])
            said = readers.counted(outcome.err, r"skipped files that are not images: ([\d,]+)")
            drawn = sum(len(files) for _, _, files in os.walk(os.fsencode(out / "red")))
            if (used + bad, said) != (images, others):
                fault = (
                    f"{used} predicted, {bad} unreadable and {said} skipped of {images} images and {others} other files"
                )
            elif drawn != used:
                fault = f"{drawn} drawings of {used} images"
    elif command == "check-data":
        outcome = run("check-data", "folder", "--data.root", root, "--data.image-size", SIDE, folder=folder)
    elif command == "evaluate":
        outcome = run("evaluate", best(world, "classification"), "--data.root", root, "--json", folder=folder)
    else:
        outcome = run(
            *training("classification", world, folder / "run", data__root=root, optim__epochs=1), folder=folder
        )
    return verdict("folder trees", f"{what} -> {command}", outcome, fault)


CASES: list[Case] = [
    *(image, labels("coco"), masks, labels("yolo"), image, tree, labels("voc"), labels("csv")),
    *(image, recipe, labels("labelme"), last, tree, weights, onnx, table),
]
COUNT = 1000
EXPECTED = (
    "no traceback, nothing longer than 60 s, nothing skipped silently, no metric that differs from a slow reading"
)
