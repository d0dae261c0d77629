"""The report on images with objects."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from dualtoken_vit.data.check import report
from dualtoken_vit.data.coco import (
    MIN_SIDE,
    AnnotatedImages,
    clip,
    decode_masks,
    degenerate,
    entry_name,
    segmentation_fault,
    size_fault,
)
from dualtoken_vit.data.detection import DetectionDataset, read_split
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.data.transforms import detection_train
from dualtoken_vit.files import counted, printable
from dualtoken_vit.recipes import Detection
from dualtoken_vit.show.drawing import draw_objects, spread

_SLACK = 2.0  # pixels by which boxes may exceed the image, and masks their box: annotators round


class _Checked(NamedTuple):
    """A split after reading its annotations and images."""

    split: AnnotatedImages  # with its valid entries only
    broken: list[str]  # a line on each other entry
    facts: list[report.Facts]  # on each valid image
    odd: dict[str, list[str]]  # what is odd about valid annotations: kind to lines
    objects: list[dict]  # the valid annotations except crowds
    tiny: list[dict]  # those of which less than a pixel is in the image

    def counts(self) -> Counter[str]:
        """The number of objects of each class."""
        names = {category["id"]: category["name"] for category in self.split.coco["categories"]}
        return Counter(names[one["category_id"]] for one in self.objects)


def check(recipe: Detection, out: Path, augmented: bool = False) -> bool:
    """Read every annotation and image once, print a report, and draw some images with their labels as OUT/labels.png.

    Returns whether there is no problem. Problems are: everything that stops training (broken entries and references,
    images that are missing, unreadable or of another size, no objects), boxes that exceed the image by more than 2
    pixels or have no area, mostly boxes below a pixel, segmentations that do not fit, categories of val only, and
    images in both splits. Objects per class and size, crowds, images without objects or rotated by EXIF, and copies are
    only reported. An InputError if the files are not named, or are not COCO files.
    """
    splits = {name: read_split(recipe.data, name) for name in ("train", "val")}
    found = {name: _read(name, split, recipe) for name, split in splits.items()}
    facts = {name: one.facts for name, one in found.items()}
    class_names = {name: [each["name"] for each in one.split.coco["categories"]] for name, one in found.items()}
    table = report.count_table(class_names, {name: one.counts() for name, one in found.items()})
    lines = [line for name, one in found.items() for line in _summary(name, one)]
    drawings = _augmented(recipe, found["train"]) if augmented else _drawings(found["train"])
    lines.append(report.contact_sheet(drawings, out / "labels.png", augmented))
    notes = [line for name, one in found.items() for line in _notes(name, one)]
    if absent := [name for name in class_names["train"] if name not in class_names["val"]]:
        shown = ", ".join(map(printable, absent[:5])) + (", ..." if len(absent) > 5 else "")
        notes.append(f"{len(absent)} of the {len(class_names['train'])} categories of train are not in val: {shown}")
    idle = [line for name, one in found.items() for line in _idle(name, one)]
    broken = [line for one in found.values() for line in one.broken]
    many = [broken, *(kind for one in found.values() for kind in one.odd.values())]
    unseen = [f"class missing: train/{name}" for name in sorted({*class_names["val"]} - {*class_names["train"]})]
    problems = [*unseen, *idle]
    return report.print_report(table, facts, lines, notes, problems, many, "boxes and masks")


def _read(name: str, split: AnnotatedImages, recipe: Detection) -> _Checked:
    coco, broken = split.sift(recipe.detector == "mask-rcnn", recipe.data.limit)
    split = split._replace(coco=coco, problems=(), choose=None)
    images = {image["id"]: image for image in split.coco["images"]}

    def look(image: dict) -> report.Facts:
        facts = report.read_facts(split.path(image), split.source(image))
        fault = facts.problem or size_fault(facts.name, facts.size, image, split.name)
        return facts._replace(problem=fault)

    facts = list(in_threads(look, images.values(), len(images), f"reading {name}"))
    annotations, odd = split.coco["annotations"], defaultdict(list)
    for annotation in annotations:
        for kind, text in _oddities(annotation, images[annotation["image_id"]]):
            odd[kind].append(f"{kind}: {split.name}: {entry_name('annotations', annotation)} {text}")
    objects = [one for one in annotations if not one.get("iscrowd")]
    tiny = [one for one in annotations if degenerate(one, images[one["image_id"]])]
    return _Checked(split, [f"{split.name}: {line}" for line in broken], facts, odd, objects, tiny)


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
    if fault := segmentation_fault(segmentation, image):
        yield "broken segmentation", f"cannot be drawn: {fault}"
        return
    mask = rle.segmToRle(segmentation, image["width"], image["height"])
    if not rle.area(mask):
        yield "empty mask", "has a segmentation that covers no pixel"
        return
    x, y, across, down = rle.toBbox(mask).tolist()
    if max(left - x, top - y, x + across - left - width, y + down - top - height) > _SLACK:
        yield "mask outside its box", f"has a mask of {across:g}x{down:g} at ({x:g}, {y:g}), but its box is {place}"


def _summary(name: str, checked: _Checked) -> Iterator[str]:
    annotations, objects, images = checked.split.coco["annotations"], checked.objects, len(checked.facts)
    most = Counter(one["image_id"] for one in objects)
    areas = [one["bbox"][2] * one["bbox"][3] for one in objects]
    small, large = sum(area < 32**2 for area in areas), sum(area >= 96**2 for area in areas)
    crowds, masks = len(annotations) - len(objects), sum(bool(one.get("segmentation")) for one in annotations)
    empty, highest = images - len(most), max(most.values(), default=0)
    yield f"{name}: {counted(images, 'image')}, {empty} without objects; up to {highest} in one"
    sized = f"{counted(len(areas), 'object')}, {small} below 32x32 px, {large} of 96x96 and more"
    yield f"{name}: {sized}; {counted(crowds, 'crowd')}"
    if masks:
        yield f"{name}: {masks} of the {len(annotations)} annotations {'has' if masks == 1 else 'have'} a segmentation"


def _notes(name: str, checked: _Checked) -> Iterator[str]:
    yield from checked.split.notes
    classes, tiny = len(checked.split.coco["categories"]), checked.tiny
    if unused := classes - len(checked.counts()):
        yield f"{unused} of the {classes} categories of {name} {'has' if unused == 1 else 'have'} no object"
    if tiny:
        ids = ", ".join(str(one.get("where") or one["id"]) for one in tiny[:5]) + (", ..." if len(tiny) > 5 else "")
        yield f"{name}: not trained on, below {MIN_SIDE:g} px in the image: {counted(len(tiny), 'annotation')} ({ids})"


def _idle(name: str, checked: _Checked) -> Iterator[str]:
    """What is wrong with a split that has no, or hardly any, objects to train on."""
    objects, tiny = len(checked.objects), sum(not one.get("iscrowd") for one in checked.tiny)
    if objects == tiny and not checked.broken:  # otherwise reported already
        yield f"no objects: {checked.split.name} has none of a pixel or more"
    elif 2 * tiny > objects:
        yield f"tiny boxes: {tiny} of the {objects} of {name} are below a pixel: bbox must be in pixels"


def _drawings(checked: _Checked) -> Iterator[Image.Image]:
    """Images with their labels from all over a split; a broken segmentation leaves its box alone."""
    split, coco = checked.split, checked.split.coco
    names = {category["id"]: category["name"] for category in coco["categories"]}
    labels = {category: label for label, category in enumerate(names)}
    pairs = zip(coco["images"], checked.facts, strict=True)
    of_image: dict[int, list[dict]] = {image["id"]: [] for image, fact in pairs if not fact.problem}
    for one in coco["annotations"]:
        if min(one["bbox"][2:]) > 0:  # others cannot be drawn, and are reported
            of_image.get(one["image_id"], []).append(one)
    for image in spread([image for image in coco["images"] if of_image.get(image["id"])]):
        ones, blank = of_image[image["id"]], {"size": [image["height"], image["width"]]}
        blank["counts"] = [image["height"] * image["width"]]
        shapes = [one.get("segmentation") or blank for one in ones]
        shapes = [blank if segmentation_fault(shape, image) else shape for shape in shapes]
        objects = {
            "boxes": torch.tensor([clip(one, image) for one in ones]),
            "labels": torch.tensor([len(names) if one.get("iscrowd") else labels[one["category_id"]] for one in ones]),
            "masks": decode_masks([{"segmentation": shape} for shape in shapes], image),
        }
        yield draw_objects(load_image(split.source(image)), objects, (*names.values(), "(crowd)"))


def _augmented(recipe: Detection, checked: _Checked) -> Iterator[Image.Image]:
    """Samples of training, from all over a split."""
    masks = recipe.detector == "mask-rcnn"
    good = [image for image, fact in zip(checked.split.coco["images"], checked.facts, strict=True) if not fact.problem]
    if not good or not checked.split.coco["categories"]:
        return
    train = DetectionDataset(checked.split._replace(choose=lambda _: good), masks, recipe.model.in_chans)
    train.transform = detection_train(recipe.augment, train if masks else None)
    for index in spread(range(len(train))):
        image, target = report.sample(train, index, recipe.run.seed)
        yield draw_objects(to_pil_image(image), target, train.class_names)
