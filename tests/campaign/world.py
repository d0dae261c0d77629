"""The tiny files that all cases work on: data of every task in every format, a run of each task, exported files."""

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from helpers import save_scenes as save_masks
from PIL import Image

from campaign.core import finish, run, start
from dualtoken_vit import cli
from dualtoken_vit.data.detection import save_scenes

TASKS = ("classification", "detection", "segmentation", "multilabel")
SIDE = 32
NETWORK = ("--model.args", "dims=(8,16,32)", "depths=(1,1,1)", "num_heads=(1,2,4)")
COMMON = {
    "data.image-size": SIDE,
    "data.workers": 0,
    "optim.batch-size": 4,
    "optim.epochs": 2,
    "optim.warmup-steps": 1,
    "run.device": "cpu",
    "run.save-every": 1,
}
OWN: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "classification": ("folder", ("head_hidden_size=32",), {"data.root": "photos"}),
    "multilabel": ("multilabel", ("head_hidden_size=32",), {"data.root": "tags"}),
    "detection": (
        "coco",
        ("--detector", "ssdlite", "--model.name", "dualtoken_vit_tiny"),
        {
            "data.images": "objects/images",
            "data.train-json": "objects/annotations/instances_train.json",
            "data.val-json": "objects/annotations/instances_val.json",
            "data.max-size": SIDE,
        },
    ),
    "segmentation": ("masks", ("--data.crop-size", "32", "32"), {"data.root": "masks", "width": 8}),
}


def training(task: str, world: Path, out: Any, *more: Any, **changed: Any) -> list[str]:
    """The arguments of a training of a few steps; `changed` has fields such as optim__epochs."""
    recipe, first, own = OWN[task]
    own = {
        key: world / value if key.startswith("data.") and isinstance(value, str) else value
        for key, value in own.items()
    }
    fields = COMMON | own | {key.replace("__", ".").replace("_", "-"): value for key, value in changed.items()}
    given = [text for key, value in fields.items() for text in (f"--{key}", str(value))]
    return ["train", recipe, *NETWORK, *first, *given, "--out", str(out), *map(str, more)]


def study(world: Path, out: Any) -> list[str]:
    """The arguments of a comparison of two networks, in a training of one epoch each."""
    given = {"data.root": world / "photos", "data.image-size": SIDE, "data.workers": 0, "optim.batch-size": 4}
    options = (str(text) for key, value in given.items() for text in (f"--{key}", value))
    return ["study", "mlp", "--out", str(out), "--seeds", "1", "--base", "tiny", *options]


def best(world: Path, task: str) -> Path:
    """The checkpoint of the task's run."""
    return world / "runs" / task / "best.safetensors"


def build(world: Path) -> None:
    """Write all of it, unless the same code has done so: what it writes is what cases are compared with."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(cli.__file__).parent.rglob("*.py"))))
    done = world / "done"
    if done.is_file() and done.read_text() == code.hexdigest():
        return
    shutil.rmtree(world, ignore_errors=True)
    world.mkdir(parents=True)
    written = finish(start(_data, world, folder=world), world)
    assert written.status == 0, written.err
    for task in TASKS:
        ended = run(*training(task, world, world / "runs" / task, optim__epochs=1), folder=world, limit=300)
        assert ended.status == 0, ended.err
    for to in ("yolo", "voc"):
        assert run("convert", world / "objects", world / to, "--to", to, folder=world).status == 0
    for task in TASKS:
        ended = run("export", best(world, task), "--out", world / f"{task}.onnx", folder=world, limit=300)
        assert ended.status == 0, ended.err
    done.write_text(code.hexdigest())


def _data(world: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder := world / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (24 + 4 * index, 32, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    save_scenes(world / "objects", SIDE, train=8, val=3)
    save_masks(world / "masks", SIDE, train=8, val=3)
    (world / "tags" / "images").mkdir(parents=True)
    (world / "csv").mkdir()
    (world / "labelme").mkdir()
    for split in ("train", "val"):
        coco = json.loads((world / "objects" / "annotations" / f"instances_{split}.json").read_text())
        names = {one["id"]: one["name"] for one in coco["categories"]}
        tags: dict[str, list[str]] = {one["file_name"]: [] for one in coco["images"]}
        sources = {one["id"]: one["file_name"] for one in coco["images"]}
        boxes = []
        for one in coco["annotations"]:
            left, top, width, height = one["bbox"]
            name, file = names[one["category_id"]], sources[one["image_id"]]
            tags[file].append(name)
            boxes.append([Path(file).name, SIDE, SIDE, name, left, top, left + width, top + height])
        (world / "csv" / split).mkdir()
        rows = [["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"], *boxes]
        _table(world / "csv" / split / "_annotations.csv", rows)
        for file in tags:
            for folder in (world / "csv" / split, world / "labelme", world / "tags" / "images"):
                shutil.copyfile(world / "objects" / "images" / file, folder / Path(file).name)
            shapes = [
                {"label": row[3], "shape_type": "rectangle", "points": [row[4:6], row[6:]], "group_id": None}
                for row in boxes
                if row[0] == Path(file).name
            ]
            content = {"shapes": shapes, "imagePath": Path(file).name, "imageWidth": SIDE, "imageHeight": SIDE}
            (world / "labelme" / Path(file).name).with_suffix(".json").write_text(json.dumps(content, indent=1))
        every = [["file", "labels"]] + [
            [f"images/{Path(file).name}", ",".join(set(labels))] for file, labels in tags.items()
        ]
        _table(world / "tags" / f"{split}.csv", every)


def _table(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
