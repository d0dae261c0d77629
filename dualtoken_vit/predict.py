"""Load a checkpoint, run it on images, say and draw what it sees."""

import os
import sys
from dataclasses import dataclass, fields
from itertools import islice
from json import dumps
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torchvision.ops import box_area
from torchvision.transforms.v2.functional import pil_to_tensor

from dualtoken_vit.checkpoint import Checkpoint, load_model
from dualtoken_vit.data.folders import image_files
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.data.transforms import classification_eval
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, printable
from dualtoken_vit.machine import pick_device
from dualtoken_vit.models.backbone import check_size
from dualtoken_vit.models.segmenters import View, segment
from dualtoken_vit.recipes import Data
from dualtoken_vit.show.drawing import (
    COLUMNS,
    ROWS,
    SIDE,
    Sheet,
    Top,
    draw_card,
    draw_objects,
    draw_scene,
    fit,
    palette,
    save_image,
    sheet_name,
)
from dualtoken_vit.tasks.coco_eval import to_results

RECORD = "predictions.json"  # marks a folder as one that `predict` wrote


def labels_name(drawing: str) -> str:
    """The file of an image's labels beside its drawing: x.jpg.labels.png for x.jpg.png."""
    return f"{drawing.removesuffix('.png')}.labels.png"


@dataclass(frozen=True)
class Source:
    """An image to look at and the name of its drawing, relative to the output folder."""

    path: Path
    drawing: str


class Classifier:
    """A classification network as `predict` uses one: it names the `top_k` likeliest classes of each image."""

    batch_size = 32
    ahead = 256
    """Images that may wait in memory for their turn."""

    def __init__(self, model: nn.Module, loaded: Checkpoint, top_k: int, image_size: int | None):
        self.model, self.class_names, self.top_k = model, loaded.class_names, min(top_k, len(loaded.class_names))
        preprocessing = loaded.preprocessing
        self.channels, size, _ = preprocessing["input_size"]
        data = Data(
            image_size=image_size or size,
            crop_pct=preprocessing["crop_pct"],
            interpolation=preprocessing["interpolation"],
        )
        if image_size:
            check_size(model, self.channels, image_size)
        self.transform = classification_eval(data, tuple(preprocessing["mean"]), tuple(preprocessing["std"]))
        self.predictions: list[dict[str, Any]] = []

    def prepare(self, image: Image.Image) -> tuple[Tensor, Image.Image]:
        """What the network takes, and what is drawn of the image."""
        return self.transform(image), fit(image, SIDE)

    @torch.inference_mode()
    def look(self, images: list[Tensor]) -> list[Top]:
        """The likeliest classes of each image (C, S, S)."""
        device = next(self.model.parameters()).device
        probabilities = self.model(torch.stack(images).to(device)).float().softmax(-1).cpu()
        if probabilities.isnan().any():
            raise InputError("the network answers with what are not numbers; take another checkpoint")
        probabilities, classes = probabilities.topk(self.top_k)
        return [
            [(self.class_names[index], probability) for index, probability in zip(*row, strict=True)]
            for row in zip(classes.tolist(), probabilities.tolist(), strict=True)
        ]

    def keep(self, path: Path, image: Image.Image, top: Top) -> None:
        """Note what is in an image for `record` and `table`."""
        classes = [{"class": name, "probability": probability} for name, probability in top]
        self.predictions.append({"image": str(path), "classes": classes})

    def draw(self, title: str, image: Image.Image, top: Top) -> tuple[Image.Image, Image.Image, tuple[str, float]]:
        """A drawing of what is in an image, a small one for the contact sheet, and the text and share under that."""
        return draw_card(image, title, top), image, top[0]

    def record(self) -> dict[str, Any]:
        """All that was kept, for JSON."""
        return {"predictions": self.predictions}

    def table(self) -> Table:
        """The name of each image beside its classes, a line each, with their probabilities."""
        table = Table("image", "class", "", box=box.SIMPLE_HEAD)
        table.columns[0].overflow = "fold"
        for prediction in self.predictions:
            name = printable(prediction["image"])
            for rank, one in enumerate(prediction["classes"]):
                style = "dim" if rank else "bold"
                share = Text(f"{one['probability']:.1%}", style, justify="right")
                table.add_row(Text("" if rank else name), Text(one["class"], style), share)
            table.add_section()
        return table


class Detector:
    """A detector as `predict` uses one: it finds the objects of each image whose score is above `score`."""

    batch_size = 4
    ahead = 16

    def __init__(self, model: nn.Module, loaded: Checkpoint, score: float, image_size: int | None):
        self.model, self.class_names = model, loaded.class_names
        model.score_thresh = score  # before masks are drawn, which takes memory
        if image_size:
            model.transform.min_size = (image_size,)
            model.transform.max_size = max(model.transform.max_size, image_size)
        self.category_ids = loaded.category_ids
        self.channels = loaded.preprocessing["input_size"][0]
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.class_names, strict=True)]
        self.coco: dict[str, list[dict[str, Any]]] = {"images": [], "categories": categories, "annotations": []}

    def prepare(self, image: Image.Image) -> tuple[Tensor, Image.Image]:
        return pil_to_tensor(image), image

    @torch.inference_mode()
    def look(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """The objects of each image (C, H, W) uint8, as `detectors` gives them."""
        device = next(self.model.parameters()).device
        found = self.model([image.to(device) / 255 for image in images])
        return [{key: value.cpu() for key, value in one.items()} for one in found]

    def keep(self, path: Path, image: Image.Image, objects: dict[str, Tensor]) -> None:
        images, annotations = self.coco["images"], self.coco["annotations"]
        width, height = image.size
        images.append({"id": len(images) + 1, "file_name": str(path), "width": width, "height": height})
        areas = objects["masks"].flatten(1).sum(1) if "masks" in objects else box_area(objects["boxes"])
        for one, area in zip(to_results(len(images), objects, self.category_ids), areas.tolist(), strict=True):
            annotations.append({"id": len(annotations) + 1, **one, "area": area, "iscrowd": 0})

    def draw(
        self, title: str, image: Image.Image, objects: dict[str, Tensor]
    ) -> tuple[Image.Image, Image.Image, tuple[str, None]]:
        drawing = draw_objects(image, objects, self.class_names)
        count = len(objects["labels"])
        return drawing, drawing, (f"{count} object{'s' * (count != 1)}", None)

    def record(self) -> dict[str, Any]:
        """A COCO file, with scores."""
        return self.coco

    def table(self) -> Table:
        """The objects of each class in each image, with their best score."""
        table = Table("image", "class", "objects", "best", box=box.SIMPLE_HEAD)
        table.columns[0].overflow = "fold"
        names = dict(zip(self.category_ids, self.class_names, strict=True))
        scores: dict[int, dict[str, list[float]]] = {image["id"]: {} for image in self.coco["images"]}
        for one in self.coco["annotations"]:
            scores[one["image_id"]].setdefault(names[one["category_id"]], []).append(one["score"])
        for image in self.coco["images"]:
            name, rows = printable(image["file_name"]), scores[image["id"]] or {"nothing": []}
            for number, (label, found) in enumerate(rows.items()):
                cells = (str(len(found) or ""), f"{max(found):.1%}" if found else "")
                table.add_row(Text("" if number else name), Text(label), *cells)
            table.add_section()
        return table


class Segmenter:
    """A segmenter as `predict` uses one: it finds the class of every pixel, looking as the checkpoint's recipe says."""

    batch_size = 4
    ahead = 16

    def __init__(self, model: nn.Module, loaded: Checkpoint, view: dict[str, Any]):
        self.model, self.class_names = model, loaded.class_names
        stored = {field.name: loaded.recipe["data"][field.name] for field in fields(View)}
        self.view = View(**stored | view)
        self.channels = loaded.preprocessing["input_size"][0]
        self.predictions: list[dict[str, Any]] = []

    def prepare(self, image: Image.Image) -> tuple[Tensor, Image.Image]:
        return pil_to_tensor(image), image

    def look(self, images: list[Tensor]) -> list[np.ndarray]:
        """The labels (H, W) uint8 of each image (C, H, W) uint8."""
        device = next(self.model.parameters()).device
        found = segment(self.model, [image.to(device) / 255 for image in images], self.view)
        return [labels.byte().cpu().numpy() for labels in found]

    def keep(self, path: Path, image: Image.Image, labels: np.ndarray) -> None:
        self.predictions.append({"image": str(path), "classes": self._shares(labels)})

    def _shares(self, labels: np.ndarray) -> list[dict[str, Any]]:
        """The classes that are in an image, with their share of it, the most frequent first."""
        shares = np.bincount(labels.ravel(), minlength=len(self.class_names)) / labels.size
        order = np.argsort(-shares, kind="stable").tolist()
        return [{"class": self.class_names[k], "share": round(shares[k].item(), 6)} for k in order if shares[k] > 0]

    def draw(
        self, title: str, image: Image.Image, labels: np.ndarray
    ) -> tuple[Image.Image, Image.Image, tuple[str, None]]:
        drawing = draw_scene([("", image, labels)], self.class_names)
        return drawing, drawing, (title, None)

    def label_image(self, labels: np.ndarray) -> Image.Image:
        """The labels as a palette image, whose indices are places in the list of classes."""
        image = Image.fromarray(labels)
        image.putpalette(palette(len(self.class_names)))
        return image

    def record(self) -> dict[str, Any]:
        """The classes in the order of their labels, and all that was kept, for JSON."""
        return {"classes": list(self.class_names), "predictions": self.predictions}

    def table(self) -> Table:
        """The classes of each image, a line each, with their share of it."""
        table = Table("image", "class", "share of the pixels", box=box.SIMPLE_HEAD)
        table.columns[0].overflow = "fold"
        for prediction in self.predictions:
            name = printable(prediction["image"])
            for number, one in enumerate(prediction["classes"]):
                share = Text(f"{one['share']:.1%}", justify="right")
                table.add_row(Text("" if number else name), Text(one["class"]), share)
            table.add_section()
        return table


def predict(
    checkpoint: Path,
    images: tuple[Path, ...],
    out: Path | None = None,
    json: bool = False,
    top_k: int | None = None,
    score: float | None = None,
    image_size: int | None = None,
    mode: Literal["whole", "slide"] | None = None,
    window: int | None = None,
    window_stride: int | None = None,
    scales: tuple[float, ...] | None = None,
    flip: bool | None = None,
    batch_size: int | None = None,
    device: str = "auto",
) -> bool:
    """Say and draw what a network sees in images; print a table, or one JSON object.

    Args:
        checkpoint: A best.safetensors of a run.
        images: Image files, and folders to search for them, subfolders included.
        out: Folder for a drawing of each image (segmentation: and its labels as a palette PNG), contact sheets of
            all of them, and predictions.json.
        json: Print one JSON object on stdout instead of the table, and nothing else there.
        top_k: Classification: classes to name for each image, by default 5 (all of them, if there are fewer).
        score: Detection: only objects with a score above this, 0 to 1, are drawn and told; by default 0.5.
        image_size: Side of the images that a classifier sees, otherwise their short side, in pixels. Without it, and
            without what follows, images are looked at as in training's validation.
        mode: Segmentation: the whole image at once, or windows over it.
        window: Segmentation: side of the windows in pixels.
        window_stride: Segmentation: pixels from one window to the next.
        scales: Segmentation: sizes to look at an image in, relative to image_size.
        flip: Segmentation: look at the mirror image too.
        batch_size: Images that go through the network at once; by default 32, in detection and segmentation 4.
        device: auto, or any of torch's: cpu, cuda, mps.

    Returns:
        Whether every image could be read; those that could not are named on stderr.

    Raises:
        InputError: where there is no image, none can be read, or `out` holds other things.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size), ("image_size", image_size), ("window", window)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: must be at least 1")
    if score is not None and not 0 <= score <= 1:
        raise InputError(f"score={score}: must be between 0 and 1")
    imgs = find_images(images, out)
    model, loaded = load_model(checkpoint)
    views = dict(mode=mode, window=window, window_stride=window_stride, scales=scales, flip=flip)
    given = {name: value for name, value in views.items() if value is not None}
    for task, options in (
        ("classification", {"top_k": top_k}),
        ("detection", {"score": score}),
        ("segmentation", views),
    ):
        for name, value in options.items():
            if value is not None and loaded.task != task:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} is for {task}, but {checkpoint} is of {loaded.task}; leave it out")
    model = model.to(pick_device(device)).eval()
    predictor = {
        "classification": lambda: Classifier(model, loaded, top_k or 5, image_size),
        "detection": lambda: Detector(model, loaded, 0.5 if score is None else score, image_size),
        "segmentation": lambda: Segmenter(model, loaded, given | ({"image_size": image_size} if image_size else {})),
    }[loaded.task]()

    def read(img: Image) -> tuple[Tensor, Any] | InputError:
        try:
            return predictor.prepare(load_image(img.path, predictor.channels, printable(img.path)))
        except InputError as error:
            return error

    record: dict[str, Any] = {"checkpoint": str(checkpoint), **predictor.record(), "unreadable": []}
    sheet = Sheet(out) if out and len(imgs) > 1 else None
    if out and not (out / RECORD).exists():  # else a run that is cut short leaves a folder that the next one refuses
        save_record(record, out / RECORD)
    pairs = zip(imgs, in_threads(read, imgs, len(imgs), "predicting", predictor.ahead), strict=True)
    while chunk := list(islice(pairs, batch_size or predictor.batch_size)):
        good = []
        for img, found in chunk:
            if isinstance(found, InputError):
                record["unreadable"].append({"image": str(img.path), "reason": str(found)})
            else:
                good.append((img, *found))
        if not good:
            continue
        seen = predictor.look([pixels for _, pixels, _ in good])
        for (img, _, image), what in zip(good, seen, strict=True):
            predictor.keep(img.path, image, what)
            if out:
                drawing, small, caption = predictor.draw(img.path.name, image, what)
                save_image(drawing, out / img.drawing)
                if isinstance(predictor, Segmenter):
                    save_image(predictor.label_image(what), out / labels_name(img.drawing))
                if sheet:
                    sheet.add(small, *caption)
    if len(record["unreadable"]) == len(imgs):
        raise InputError(none_readable(record["unreadable"]))
    if sheet:
        sheet.close()

    record |= predictor.record()
    if out:
        save_record(record, out / RECORD)
    if json:
        print(dumps(record))
    else:
        Console().print(predictor.table())
    return tell_unreadable(record["unreadable"], len(imgs))


def none_readable(unreadable: list[dict[str, str]]) -> str:
    """What to say where all the images are unreadable."""
    return f"none of the {len(unreadable)} images can be read; the first: {unreadable[0]['reason']}"


def tell_unreadable(unreadable: list[dict[str, str]], total: int) -> bool:
    """Name the unreadable images on stderr; returns whether there are none."""
    for one in unreadable:
        print(one["reason"], file=sys.stderr)
    if unreadable:
        print(f"{len(unreadable)} of {total} images could not be read", file=sys.stderr)
    return not unreadable


def save_record(record: dict[str, Any], path: Path) -> None:
    """Write what was found as JSON."""
    with atomic_write(path, "w") as file:
        file.write(dumps(record, indent=2) + "\n")


def find_images(images: tuple[Path, ...], out: Path | None = None, record: str = RECORD) -> list[Source]:
    """The files among `images` and the images in the folders among them, each once, in order.

    Drawings are named after the images, x.jpg.png for x.jpg, in the folders' own tree; where two would have one
    name, or one that of an image, a number is added. The output folder is not searched; it must be new or empty, or
    have the file `record`, by which a command knows its own folder again.

    Raises:
        InputError: where something does not exist, nothing is found, or `out` holds other things.
    """
    _check_out(out, images, record)
    found: dict[str, tuple[Path, Path]] = {}  # absolute path: as given, place in the output
    for given in images:
        if given.is_dir():
            inside = [path for path in map(Path, image_files(given)) if not (out and _is_in(path, out))]
            if not inside:
                raise InputError(f"{given}: no images in this folder")
            base = given.resolve().name
            for path in inside:
                found.setdefault(os.path.abspath(path), (path, base / path.relative_to(given)))
        elif given.exists():
            found.setdefault(os.path.abspath(given), (given, Path(given.name)))
        else:
            raise InputError(f"{given}: no such file or folder")
    if not found:
        raise InputError("no images given; name image files or folders of them")

    taken = {sheet_name(page + 1) for page in range(ceil(len(found) / (COLUMNS * ROWS)))}
    imgs = []
    for path, place in found.values():
        number = 1
        drawing = f"{place}.png"
        while any(
            name.casefold() in taken or (out and os.path.abspath(out / name) in found)
            for name in (drawing, labels_name(drawing))
        ):
            number += 1
            drawing = f"{place}-{number}.png"
        taken |= {drawing.casefold(), labels_name(drawing).casefold()}
        imgs.append(Source(path, drawing))
    return imgs


def _is_in(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _check_out(out: Path | None, images: tuple[Path, ...], record: str) -> None:
    """Refuse an output folder that is not this command's own: nothing of the user's may be overwritten there."""
    if out is None or not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out}: a file; name a folder")
    if any(given.resolve() == out.resolve() for given in images):
        raise InputError(f"--out {out}: the images are read from there; name another folder")
    if any(out.iterdir()) and not (out / record).exists():
        raise InputError(
            f"--out {out}: the folder holds other files; name a new one, for example {out / Path(record).stem}"
        )
