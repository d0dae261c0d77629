"""The report on images with objects: what is in COCO json files, and what would stop or spoil a training run."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from faster_coco_eval.core import mask as rle

from dualtoken_vit.data.check.classification import (
    Facts,
    copy_notes,
    count_table,
    image_lines,
    in_both,
    look_at,
    missing_classes,
    report,
    turned_notes,
)
from dualtoken_vit.data.coco import (
    MIN_SIDE,
    DetectionDataset,
    coco_paths,
    decode_masks,
    degenerate,
    first_images,
    read_coco,
    segmentation_fault,
    sift,
    size_fault,
)
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Detection
from dualtoken_vit.show.drawing import draw_labelled, draw_objects, save_image, spread

_SLACK = 2.0  # pixels by which boxes may reach out of the image, and masks out of the box: annotators round


class _Split(NamedTuple):
    """A COCO json and its images, once they were looked at."""

    path: str
    coco: dict[str, list[dict]]  # the sound entries
    broken: list[str]  # a line on each of the others
    facts: list[Facts]  # one a sound image
    odd: dict[str, list[str]]  # what is odd in sound annotations: kind to lines


def check_detection_data(recipe: Detection, out: Path) -> bool:
    """`check_coco` of a recipe's data; its contact sheet is OUT/labels.png.

    Raises:
        InputError: where the files are not named, or no COCO files.
    """
    if recipe.data.dataset != "coco":
        raise InputError(f"--data.dataset {recipe.data.dataset}: drawn by the program; there is nothing to check")
    splits = {split: coco_paths(recipe.data, split) for split in ("train", "val")}
    return check_coco(splits, recipe.detector == "mask-rcnn", out / "labels.png", recipe.data.limit)


def check_coco(
    splits: dict[str, tuple[str | Path, str | Path]],
    masks: bool,
    sheet: str | Path | None = None,
    limit: int | None = None,
) -> bool:
    """Read every annotation and image once and print what is found.

    Problems are whatever training would stop at (broken entries and references, images that are missing, unreadable
    or of another size, no objects), boxes that reach more than 2 pixels out of the image, have no area or, for the
    most part, less than a pixel, segmentations that do not fit, categories of one split only, and images that are in
    both. Objects a class and size, crowds, images without objects or turned by EXIF, and copies are only told.

    Args:
        splits: Name of a split: the folder of its images, and its json.
        masks: Whether each annotation must have a segmentation; those that there are, are checked anyhow.
        sheet: Where to draw some images of the first split with their labels, as PNG.
        limit: Look only at the first so many images of each split.

    Returns:
        True where there is no problem.

    Raises:
        InputError: for a json that is missing, not JSON, or no COCO file.
    """
    found = {name: _look(name, folder, path, masks, limit) for name, (folder, path) in splits.items()}
    facts = {name: split.facts for name, split in found.items()}
    class_names = {name: tuple(one["name"] for one in split.coco["categories"]) for name, split in found.items()}
    table = count_table(class_names, {name: _objects(split) for name, split in found.items()})
    told = [line for name, split in found.items() for line in (*image_lines(name, split.facts), *_told(name, split))]
    told += [f"note: {line}" for line in (*copy_notes(facts), *turned_notes(facts, "boxes and masks"))]
    if sheet is not None:
        name, split = next(iter(found.items()))
        told.append(_contact_sheet(split, Path(sheet)) or f"no image of {name} has labels to draw")
    images = [fact.problem for split in found.values() for fact in split.facts if fact.problem]
    odd = [lines for split in found.values() for lines in split.odd.values()]
    idle = [line for name, split in found.items() if (line := _idle(name, split))]
    many = [*(split.broken for split in found.values()), *odd, in_both(facts)]
    return report(table, told, [*missing_classes(class_names), *idle, *images], many)


def _look(name: str, folder: str | Path, path: str | Path, masks: bool, limit: int | None) -> _Split:
    coco, broken = sift(read_coco(path), masks)
    coco = first_images(coco, limit)

    def look(image: dict) -> Facts:
        img = os.path.join(folder, image["file_name"])
        facts = look_at(img, img)
        return facts if facts.problem else facts._replace(problem=size_fault(img, facts.size, image, str(path)))

    facts = list(in_threads(look, coco["images"], len(coco["images"]), f"reading {name}"))
    images = {image["id"]: image for image in coco["images"]}
    odd = defaultdict(list)
    for annotation in coco["annotations"]:
        for kind, text in _oddities(annotation, images[annotation["image_id"]]):
            odd[kind].append(f"{kind}: {path}: annotation {annotation['id']} {text}")
    return _Split(str(path), coco, [f"{path}: {line}" for line in broken], facts, odd)


def _oddities(annotation: dict, image: dict) -> Iterator[tuple[str, str]]:
    """What training would get along with, but is hardly meant: (kind, text)."""
    left, top, width, height = annotation["bbox"]
    place = f"{width:g}x{height:g} at ({left:g}, {top:g}) in an image of {image['width']}x{image['height']}"
    outside = max(-left, -top, left + width - image["width"], top + height - image["height"])
    if min(width, height) <= 0:
        yield "box of no area", f"is {place}"
        return
    if outside > _SLACK:
        yield "box outside the image", f"is {place}"
    elif degenerate(annotation, image):  # told with the counts
        return
    if annotation.get("area") is not None and annotation["area"] <= 0:
        yield "no area", f"has area {annotation['area']}"
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return
    fault = segmentation_fault(segmentation, image)
    if fault:
        yield "broken segmentation", f"cannot be drawn: {fault}"
        return
    mask = rle.segmToRle(segmentation, image["width"], image["height"])
    if not rle.area(mask):
        yield "empty mask", "has a segmentation that covers no pixel"
        return
    x, y, across, down = rle.toBbox(mask).tolist()
    if max(left - x, top - y, x + across - left - width, y + down - top - height) > _SLACK:
        yield "mask outside its box", f"has a mask of {across:g}x{down:g} at ({x:g}, {y:g}), and its box is {place}"


def _objects(split: _Split) -> Counter:
    """Objects a class, crowds left out."""
    names = {category["id"]: category["name"] for category in split.coco["categories"]}
    return Counter(names[one["category_id"]] for one in split.coco["annotations"] if not one.get("iscrowd"))


def _told(name: str, split: _Split) -> Iterator[str]:
    images = {image["id"]: image for image in split.coco["images"]}
    objects = [one for one in split.coco["annotations"] if not one.get("iscrowd")]
    crowds = len(split.coco["annotations"]) - len(objects)
    masks = sum(bool(one.get("segmentation")) for one in split.coco["annotations"])
    most = Counter(one["image_id"] for one in objects)
    counts = _objects(split)
    areas = [one["bbox"][2] * one["bbox"][3] for one in objects]
    small, large = sum(area < 32**2 for area in areas), sum(area >= 96**2 for area in areas)
    empty = len(images) - len(most)
    yield f"{name}: {len(images)} images, {empty} without objects; up to {max(most.values(), default=0)} in one"
    yield f"{name}: {len(areas)} objects, {small} below 32x32 px, {large} of 96x96 and more; {crowds} crowds"
    yield f"{name}: {masks} of the {len(split.coco['annotations'])} annotations have a segmentation"
    unused = [one["name"] for one in split.coco["categories"] if not counts[one["name"]]]
    if unused:
        yield f"note: {len(unused)} of the {len(split.coco['categories'])} categories of {name} have no object"
    tiny = [one["id"] for one in split.coco["annotations"] if degenerate(one, images[one["image_id"]])]
    if tiny:
        ids = ", ".join(map(str, tiny[:5])) + (", ..." if len(tiny) > 5 else "")
        yield f"note: {name}: not trained on, below {MIN_SIDE:g} px in the image: {len(tiny)} annotations ({ids})"


def _idle(name: str, split: _Split) -> str:
    """What to say of a split that has nothing, or little, to learn from."""
    images = {image["id"]: image for image in split.coco["images"]}
    objects = [one for one in split.coco["annotations"] if not one.get("iscrowd")]
    tiny = sum(degenerate(one, images[one["image_id"]]) for one in objects)
    if len(objects) == tiny and not split.broken:  # else these are told already
        return f"no objects: {split.path} has none of a pixel or more"
    if 2 * tiny > len(objects):
        return f"tiny boxes: {tiny} of the {len(objects)} of {name} are below a pixel: bbox must be in pixels"
    return ""


def _drawable(annotation: dict, image: dict) -> dict:
    """The annotation, with an empty mask if it has none that can be drawn."""
    if annotation.get("segmentation") and not segmentation_fault(annotation["segmentation"], image):
        return annotation
    size = [image["height"], image["width"]]
    return annotation | {"segmentation": {"size": size, "counts": [math.prod(size)]}}


def _contact_sheet(split: _Split, path: Path) -> str:
    """Draw images with labels from all over a split; returns what to tell."""
    pairs = zip(split.coco["images"], split.facts, strict=True)
    good = {image["id"]: (image, fact.name) for image, fact in pairs if not fact.problem}
    labelled = list(dict.fromkeys(one["image_id"] for one in split.coco["annotations"] if one["image_id"] in good))
    chosen = spread(labelled)
    if not chosen:
        return ""
    images, paths = zip(*(good[image_id] for image_id in chosen), strict=True)
    shown = (one for one in split.coco["annotations"] if one["image_id"] in chosen)
    annotations = [_drawable(one, good[one["image_id"]][0]) for one in shown]
    coco = {"images": images, "categories": split.coco["categories"], "annotations": annotations}
    dataset = DetectionDataset(coco, paths, paths, split.path, masks=True)
    drawings = []
    for index in range(len(dataset)):
        objects, crowds = dataset[index][1], dataset.objects(index)[1]
        labels = torch.full((len(crowds),), len(dataset.class_names))
        objects["boxes"] = torch.cat([objects["boxes"], objects["crowd"]])
        objects["labels"] = torch.cat([objects["labels"], labels])
        objects["masks"] = torch.cat([objects["masks"], decode_masks(crowds, images[index])])
        drawings.append(draw_objects(dataset.image(index), objects, (*dataset.class_names, "crowd")))
    save_image(draw_labelled(drawings), path)
    return f"{len(chosen)} images with their labels: {path}"
