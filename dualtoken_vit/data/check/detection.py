"""The report on images with objects."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from faster_coco_eval.core import mask as rle

from dualtoken_vit.data.check.report import (
    Facts,
    copy_notes,
    count_table,
    image_lines,
    in_both,
    missing_classes,
    print_report,
    read_facts,
    rotation_notes,
)
from dualtoken_vit.data.detection import (
    MIN_SIDE,
    AnnotatedImages,
    DetectionDataset,
    decode_masks,
    degenerate,
    first_images,
    read_split,
    segmentation_fault,
    sift,
    size_fault,
)
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.recipes import Detection
from dualtoken_vit.show.drawing import draw_labelled, draw_objects, save_image, spread

_SLACK = 2.0  # pixels by which boxes may exceed the image, and masks their box: annotators round


class _Checked(NamedTuple):
    """A split after reading its annotations and images."""

    split: AnnotatedImages  # with its valid entries only
    broken: list[str]  # a line on each other entry
    facts: list[Facts]  # on each valid image
    odd: dict[str, list[str]]  # what is odd about valid annotations: kind to lines


def check(recipe: Detection, out: Path) -> bool:
    """`check_splits` of a recipe's data, with a contact sheet in OUT/labels.png.

    Raises:
        InputError: if the files are not named, or are not COCO files.
    """
    splits = {split: read_split(recipe.data, split) for split in ("train", "val")}
    return check_splits(splits, recipe.detector == "mask-rcnn", out / "labels.png", recipe.data.limit)


def check_splits(
    splits: Mapping[str, AnnotatedImages], masks: bool, sheet: Path | None = None, limit: int | None = None
) -> bool:
    """Read every annotation and image once and print a report.

    Problems are: everything that stops training (broken entries and references, images that are missing, unreadable or
    of another size, no objects), boxes that exceed the image by more than 2 pixels or have no area, mostly boxes below
    a pixel, segmentations that do not fit, categories of one split only, and images in both splits. Objects per class
    and size, crowds, images without objects or rotated by EXIF, and copies are only reported.

    Args:
        splits: the data, by name of the split
        masks: whether each annotation must have a segmentation; existing ones are always checked
        sheet: PNG file for a contact sheet of images of the first split with their labels
        limit: read only the first images of each split

    Returns:
        Whether there is no problem.
    """
    found = {name: _read(name, split, masks, limit) for name, split in splits.items()}
    facts = {name: one.facts for name, one in found.items()}
    class_names = {name: [each["name"] for each in one.split.coco["categories"]] for name, one in found.items()}
    table = count_table(class_names, {name: _objects(one) for name, one in found.items()})
    lines = [*image_lines(facts), *(line for name, one in found.items() for line in _summary(name, one))]
    lines += [f"note: {line}" for line in (*copy_notes(facts), *rotation_notes(facts, "boxes and masks"))]
    if sheet is not None:
        name, one = next(iter(found.items()))
        lines.append(_contact_sheet(one, sheet) or f"no image of {name} has labels to draw")
    images = [fact.problem for one in found.values() for fact in one.facts if fact.problem]
    odd = [kind for one in found.values() for kind in one.odd.values()]
    idle = [line for name, one in found.items() if (line := _idle(name, one))]
    many = [*(one.broken for one in found.values()), *odd, in_both(facts)]
    return print_report(table, lines, [*missing_classes(class_names), *idle, *images], many)


def _read(name: str, split: AnnotatedImages, masks: bool, limit: int | None) -> _Checked:
    coco, broken = sift(split.coco, masks)
    split = split._replace(coco=first_images(coco, limit))
    images = {image["id"]: image for image in split.coco["images"]}

    def look(image: dict) -> Facts:
        facts = read_facts(split.path(image), split.source(image))
        return facts if facts.problem else facts._replace(problem=size_fault(facts.name, facts.size, image, split.name))

    facts = list(in_threads(look, images.values(), len(images), f"reading {name}"))
    odd = defaultdict(list)
    for annotation in split.coco["annotations"]:
        for kind, text in _oddities(annotation, images[annotation["image_id"]]):
            odd[kind].append(f"{kind}: {split.name}: annotation {annotation['id']} {text}")
    return _Checked(split, [f"{split.name}: {line}" for line in broken], facts, odd)


def _oddities(annotation: dict, image: dict) -> Iterator[tuple[str, str]]:
    """What does not stop training but is probably a mistake: (kind, text)."""
    left, top, width, height = annotation["bbox"]
    place = f"{width:g}x{height:g} at ({left:g}, {top:g}) in an image of {image['width']}x{image['height']}"
    outside = max(-left, -top, left + width - image["width"], top + height - image["height"])
    if min(width, height) <= 0:
        yield "box without area", f"is {place}"
        return
    if outside > _SLACK:
        yield "box outside the image", f"is {place}"
    elif degenerate(annotation, image):  # reported with the counts
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
        yield "mask outside its box", f"has a mask of {across:g}x{down:g} at ({x:g}, {y:g}), but its box is {place}"


def _objects(checked: _Checked) -> Counter[str]:
    """The number of objects of each class, without crowds."""
    coco = checked.split.coco
    names = {category["id"]: category["name"] for category in coco["categories"]}
    return Counter(names[one["category_id"]] for one in coco["annotations"] if not one.get("iscrowd"))


def _summary(name: str, checked: _Checked) -> Iterator[str]:
    coco = checked.split.coco
    images = {image["id"]: image for image in coco["images"]}
    objects = [one for one in coco["annotations"] if not one.get("iscrowd")]
    crowds = len(coco["annotations"]) - len(objects)
    masks = sum(bool(one.get("segmentation")) for one in coco["annotations"])
    most = Counter(one["image_id"] for one in objects)
    counts = _objects(checked)
    areas = [one["bbox"][2] * one["bbox"][3] for one in objects]
    small, large = sum(area < 32**2 for area in areas), sum(area >= 96**2 for area in areas)
    empty = len(images) - len(most)
    yield f"{name}: {len(images)} images, {empty} without objects; up to {max(most.values(), default=0)} in one"
    yield f"{name}: {len(areas)} objects, {small} below 32x32 px, {large} of 96x96 and more; {crowds} crowds"
    yield f"{name}: {masks} of the {len(coco['annotations'])} annotations have a segmentation"
    unused = [one["name"] for one in coco["categories"] if not counts[one["name"]]]
    if unused:
        yield f"note: {len(unused)} of the {len(coco['categories'])} categories of {name} have no object"
    tiny = [one["id"] for one in coco["annotations"] if degenerate(one, images[one["image_id"]])]
    if tiny:
        ids = ", ".join(map(str, tiny[:5])) + (", ..." if len(tiny) > 5 else "")
        yield f"note: {name}: not trained on, below {MIN_SIDE:g} px in the image: {len(tiny)} annotations ({ids})"


def _idle(name: str, checked: _Checked) -> str:
    """What is wrong with a split that has no, or hardly any, objects to train on; "" if nothing."""
    coco = checked.split.coco
    images = {image["id"]: image for image in coco["images"]}
    objects = [one for one in coco["annotations"] if not one.get("iscrowd")]
    tiny = sum(degenerate(one, images[one["image_id"]]) for one in objects)
    if len(objects) == tiny and not checked.broken:  # otherwise reported already
        return f"no objects: {checked.split.name} has none of a pixel or more"
    if 2 * tiny > len(objects):
        return f"tiny boxes: {tiny} of the {len(objects)} of {name} are below a pixel: bbox must be in pixels"
    return ""


def _drawable(annotation: dict, image: dict) -> dict:
    """The annotation, with an empty mask if its own cannot be drawn."""
    if annotation.get("segmentation") and not segmentation_fault(annotation["segmentation"], image):
        return annotation
    size = [image["height"], image["width"]]
    return annotation | {"segmentation": {"size": size, "counts": [math.prod(size)]}}


def _contact_sheet(checked: _Checked, path: Path) -> str:
    """Draw images with their labels from all over a split; returns a line for the report, "" without labels."""
    split, coco = checked.split, checked.split.coco
    pairs = zip(coco["images"], checked.facts, strict=True)
    good = {image["id"]: image for image, fact in pairs if not fact.problem}
    chosen = spread(list(dict.fromkeys(one["image_id"] for one in coco["annotations"] if one["image_id"] in good)))
    if not chosen:
        return ""
    shown = [one for one in coco["annotations"] if one["image_id"] in chosen]
    drawable = coco | {
        "images": [good[image_id] for image_id in chosen],
        "annotations": [_drawable(one, good[one["image_id"]]) for one in shown],
    }
    dataset = DetectionDataset(split._replace(coco=drawable), masks=True)
    drawings = []
    for index in range(len(dataset)):
        objects, crowds = dataset[index][1], dataset.objects(index)[1]
        labels = torch.full((len(crowds),), len(dataset.class_names))
        objects["boxes"] = torch.cat([objects["boxes"], objects["crowd"]])
        objects["labels"] = torch.cat([objects["labels"], labels])
        objects["masks"] = torch.cat([objects["masks"], decode_masks(crowds, dataset.images[index])])
        drawings.append(draw_objects(dataset.image(index), objects, (*dataset.class_names, "crowd")))
    save_image(draw_labelled(drawings), path)
    return f"{len(chosen)} images with their labels: {path}"
