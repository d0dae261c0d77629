"""Slow readings of the same files by other means: PIL, numpy, json, csv, ElementTree, pycocotools. They only assert."""

import contextlib
import csv
import io
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image

Objects = Counter[tuple[str, str, tuple[int, ...]]]
"""How often there is an object: name of the image file, class, box in hundredths of a pixel."""


def pixels(path: Path) -> Image.Image | None:
    """The image where it can be decoded; None where not."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except Exception:
        return None


def box(values: Any) -> tuple[int, ...]:
    """left, top, width, height, rounded."""
    return tuple(round(100 * float(value)) for value in values)


def _json(path: Path) -> Any:
    """What a JSON file has, in whichever encoding; undecodable bytes as the system keeps those of names."""
    content = path.read_bytes()
    return json.loads(content.decode(json.detect_encoding(content), "surrogateescape"))


def objects_of(kind: str, root: Path) -> Objects:
    """All objects of a folder in one of the label formats; raises anything where it makes no sense."""
    return Counter(READERS[kind](root))


def _coco(root: Path):
    for path in sorted((root / "annotations").glob("*.json")):
        coco = _json(path)
        names = {one["id"]: one["name"] for one in coco["categories"]}
        images = {one["id"]: os.path.basename(one["file_name"]) for one in coco["images"]}
        for one in coco["annotations"]:
            yield images[one["image_id"]], names[one["category_id"]], box(one["bbox"])


def _yolo(root: Path):
    content = yaml.safe_load((root / "data.yaml").read_text())
    names = content["names"] if isinstance(content["names"], dict) else dict(enumerate(content["names"]))
    for split in {"train", "val"} & content.keys():
        for path in sorted((root / "images" / split).iterdir()):
            width, height = Image.open(path).size
            labels = root / "labels" / split / f"{path.stem}.txt"
            for line in labels.read_text(encoding="utf-8-sig").splitlines() if labels.exists() else ():
                if line.strip():
                    number, *values = line.split()
                    xs, ys = ([float(v) * side for v in values[k::2]] for k, side in ((0, width), (1, height)))
                    if len(values) == 4:
                        (x, across), (y, down) = xs, ys
                        corners = x - across / 2, y - down / 2, across, down
                    else:
                        corners = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
                    yield path.name, str(names[int(number)]), box(corners)


def _voc(root: Path):
    for split in ("train", "val"):
        for name in (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split("\n"):
            if not name.strip():
                continue
            tree = ElementTree.parse(root / "Annotations" / f"{name.strip().split()[0]}.xml")
            for one in tree.findall("object"):
                edges = [float(one.find("bndbox").findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")]
                corners = edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1]
                yield os.path.basename(tree.findtext("filename").strip()), one.findtext("name").strip(), box(corners)


def _csv(root: Path):
    for split in ("train", "val"):
        with open(root / split / "_annotations.csv", newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                if not any((row["class"], row["xmin"])):
                    continue
                left, top, right, bottom = (float(row[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
                yield (
                    os.path.basename(row["filename"].strip()),
                    row["class"].strip(),
                    box((left, top, right - left, bottom - top)),
                )


def _labelme(root: Path):
    for path in sorted(root.glob("*.json")):
        content = _json(path)
        for shape in content["shapes"]:
            points = np.array(shape["points"], dtype=float)
            low, high = points.min(0), points.max(0)
            yield os.path.basename(content["imagePath"]), shape["label"].strip(), box((*low, *(high - low)))


READERS = {"coco": _coco, "yolo": _yolo, "voc": _voc, "csv": _csv, "labelme": _labelme}


def average_precision(labels: Path, results: Path) -> float:
    """COCO's AP of boxes by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = _json(labels)  # COCO itself reads UTF-8 alone
        for one in truth.dataset["annotations"]:  # pycocotools needs both
            one.setdefault("iscrowd", 0)
            if one.get("area") is None:
                one["area"] = one["bbox"][2] * one["bbox"][3]
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return float(evaluation.stats[0])


def label_maps(folder: Path) -> dict[str, np.ndarray]:
    """The label maps that `predict --out` drew, by the image's name."""
    return {
        path.name.removesuffix(".labels.png"): np.asarray(Image.open(path)) for path in folder.rglob("*.labels.png")
    }


def mean_iou(found: dict[str, np.ndarray], masks: Path, order: list[int]) -> tuple[float, float]:
    """Mean IoU over the classes that occur, and pixel accuracy; `order` has the trained class of each label."""
    pairs: Counter[tuple[int, int]] = Counter()
    for image, labels in found.items():
        truth = np.asarray(Image.open(masks / image)).astype(int)
        pairs.update(
            (order[a], b) for a, b in zip(truth.ravel().tolist(), labels.ravel().tolist(), strict=True) if a != 255
        )
    hits = {label: count for (label, other), count in pairs.items() if label == other}
    unions = {k: sum(count for pair, count in pairs.items() if k in pair) for k in {k for pair in pairs for k in pair}}
    shares = [hits.get(k, 0) / union for k, union in unions.items()]
    return float(np.mean(shares)), sum(hits.values()) / pairs.total()


def visible_files(folder: Path) -> tuple[int, int]:
    """How many distinct regular files a folder tree shows without hidden ones: those named as images, and others."""
    Image.init()
    known = tuple(Image.registered_extensions())
    seen: set[str] = set()
    count = [0, 0]
    for here, folders, files in os.walk(os.fsencode(folder), followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        for name in files:
            path = os.path.realpath(os.path.join(here, name))
            if name.startswith(b".") or path in seen:
                continue
            seen.add(path)
            count[not os.fsdecode(name).lower().endswith(known)] += 1
    return count[0], count[1]


def counted(text: str, pattern: str) -> int:
    """The number that a message names, 0 where there is none."""
    found = re.search(pattern, text)
    return int(found[1].replace(",", "")) if found else 0
