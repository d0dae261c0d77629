"""Load a checkpoint, run it on pictures, say and draw what it sees."""

import os
import sys
from dataclasses import dataclass
from functools import cache
from itertools import islice
from json import dumps
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from dualtoken_vit.checkpoint import atomic_write, load_model
from dualtoken_vit.data.classification import in_threads, picture_files
from dualtoken_vit.data.images import eval_transform, load_image
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Data

RECORD = "predictions.json"  # marks a folder as one that `predict` wrote
Top = list[tuple[str, float]]  # class and probability, most likely first


@dataclass(frozen=True)
class Picture:
    """A picture to look at and the name of its drawing, relative to the output folder."""

    path: Path
    drawing: str


def predict(
    checkpoint: Path,
    images: tuple[Path, ...],
    out: Path | None = None,
    json: bool = False,
    top_k: int = 5,
    batch_size: int = 32,
    device: str = "auto",
) -> bool:
    """Classify pictures; print a table, or one JSON object.

    Args:
        checkpoint: A best.safetensors of a classification run.
        images: Picture files, and folders to search for them, subfolders included.
        out: Folder for a drawing of each picture, contact sheets of all of them, and predictions.json.
        json: Print one JSON object on stdout instead of the table, and nothing else there.
        top_k: Classes to name for each picture (all of them, if there are fewer).
        batch_size: Pictures that go through the network at once.
        device: auto, or any of torch's: cpu, cuda, mps.

    Returns:
        Whether every picture could be read; those that could not are named on stderr.

    Raises:
        InputError: where there is no picture, none can be read, or `out` holds other things.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}={value}: must be at least 1")
    pictures = find_pictures(images, out)
    model, loaded = load_model(checkpoint)
    if loaded.task != "classification":
        raise InputError(f"{checkpoint}: a model for {loaded.task}; predict takes classification")
    target = _device(device)
    model = model.to(target).eval()
    preprocessing = loaded.preprocessing
    channels, size, _ = preprocessing["input_size"]
    data = Data(image_size=size, crop_pct=preprocessing["crop_pct"], interpolation=preprocessing["interpolation"])
    transform = eval_transform(data, tuple(preprocessing["mean"]), tuple(preprocessing["std"]))

    def look(picture: Picture) -> tuple[Tensor, Image.Image | None] | InputError:
        try:
            image = load_image(picture.path, channels, printable(picture.path))
        except InputError as error:
            return error
        return transform(image), _fit(image, SIDE) if out else None  # no more: many wait in memory for their turn

    predictions: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []
    sheet = Sheet(out) if out and len(pictures) > 1 else None
    if out and not (out / RECORD).exists():  # else a run that is cut short leaves a folder that the next one refuses
        _save_record({"checkpoint": str(checkpoint), "predictions": [], "unreadable": []}, out)
    looked = zip(pictures, in_threads(look, pictures, len(pictures), "predicting"), strict=True)
    while chunk := list(islice(looked, batch_size)):
        read = []
        for picture, seen in chunk:
            if isinstance(seen, InputError):
                unreadable.append({"picture": str(picture.path), "reason": str(seen)})
            else:
                read.append((picture, *seen))
        if not read:
            continue
        tops = classify(model, torch.stack([pixels for _, pixels, _ in read]).to(target), loaded.class_names, top_k)
        for (picture, _, image), top in zip(read, tops, strict=True):
            classes = [{"class": name, "probability": probability} for name, probability in top]
            predictions.append({"picture": str(picture.path), "classes": classes})
            if out:
                save_image(draw_card(image, picture.path.name, top), out / picture.drawing)
            if sheet:
                sheet.add(image, top)
    if not predictions:
        raise InputError(f"none of the {len(pictures)} pictures can be read; the first: {unreadable[0]['reason']}")
    if sheet:
        sheet.close()

    record = {"checkpoint": str(checkpoint), "predictions": predictions, "unreadable": unreadable}
    if out:
        _save_record(record, out)
    if json:
        print(dumps(record))
    else:
        print_table(predictions)
    for one in unreadable:
        print(one["reason"], file=sys.stderr)
    if unreadable:
        print(f"{len(unreadable)} of {len(pictures)} pictures could not be read", file=sys.stderr)
    return not unreadable


def _save_record(record: dict[str, Any], out: Path) -> None:
    with atomic_write(out / RECORD, "w") as file:
        file.write(dumps(record, indent=2) + "\n")


def find_pictures(images: tuple[Path, ...], out: Path | None = None) -> list[Picture]:
    """The files among `images` and the pictures in the folders among them, each once, in order.

    Drawings are named after the pictures, x.jpg.png for x.jpg, in the folders' own tree; where two would have one
    name, or one that of a picture, a number is added. The output folder is not searched.

    Raises:
        InputError: where something does not exist, nothing is found, or `out` holds other things.
    """
    _check_out(out, images)
    found: dict[str, tuple[Path, Path]] = {}  # absolute path: as given, place in the output
    for given in images:
        if given.is_dir():
            inside = [path for path in map(Path, picture_files(given)) if not (out and _is_in(path, out))]
            if not inside:
                raise InputError(f"{given}: no pictures in this folder")
            base = given.resolve().name
            for path in inside:
                found.setdefault(os.path.abspath(path), (path, base / path.relative_to(given)))
        elif given.exists():
            found.setdefault(os.path.abspath(given), (given, Path(given.name)))
        else:
            raise InputError(f"{given}: no such file or folder")
    if not found:
        raise InputError("no pictures given; name picture files or folders of them")

    taken = {_sheet_name(page + 1) for page in range(ceil(len(found) / (COLUMNS * ROWS)))}
    pictures = []
    for path, place in found.values():
        number = 1
        drawing = f"{place}.png"
        while drawing.casefold() in taken or (out and os.path.abspath(out / drawing) in found):
            number += 1
            drawing = f"{place}-{number}.png"
        taken.add(drawing.casefold())
        pictures.append(Picture(path, drawing))
    return pictures


def _is_in(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _check_out(out: Path | None, images: tuple[Path, ...]) -> None:
    """Refuse an output folder that is not this command's own: nothing of the user's may be overwritten there."""
    if out is None or not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out}: a file; name a folder")
    if any(given.resolve() == out.resolve() for given in images):
        raise InputError(f"--out {out}: the pictures are read from there; name another folder")
    if any(out.iterdir()) and not (out / RECORD).exists():
        raise InputError(
            f"--out {out}: the folder holds other files; name a new one, for example {out / 'predictions'}"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"device={name}: not on this machine; use auto or cpu") from None


@torch.inference_mode()
def classify(model: nn.Module, batch: Tensor, class_names: tuple[str, ...], top_k: int) -> list[Top]:
    """The `top_k` most likely classes of each picture of batch (B, C, S, S)."""
    probabilities = model(batch).float().softmax(-1).cpu()
    if probabilities.isnan().any():
        raise InputError("the network answers with what are not numbers; take another checkpoint")
    probabilities, classes = probabilities.topk(min(top_k, len(class_names)))
    return [
        [(class_names[index], probability) for index, probability in zip(*row, strict=True)]
        for row in zip(classes.tolist(), probabilities.tolist(), strict=True)
    ]


def print_table(predictions: list[dict[str, Any]]) -> None:
    """The name of each picture beside its classes, a line each, with their probabilities."""
    table = Table("picture", "class", "", box=box.SIMPLE_HEAD)
    table.columns[0].overflow = "fold"
    for prediction in predictions:
        name = printable(prediction["picture"])
        for rank, one in enumerate(prediction["classes"]):
            style = "dim" if rank else "bold"
            share = Text(f"{one['probability']:.1%}", style, justify="right")
            table.add_row(Text("" if rank else name), Text(one["class"], style), share)
        table.add_section()
    Console().print(table)


def printable(path: str | Path) -> str:
    """A file's name for people: bytes that are no UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic_write(path) as file:
        image.save(file, "PNG")


# The drawings: sizes in pixels, twice what they are meant to be seen at.
SIDE = 448  # of the square that a picture is fitted into
PANEL = 448  # width of the bars beside it
MARGIN = 40
ROW = 80  # height of a class: its name, its bar
THUMB = 224
COLUMNS, ROWS = 6, 6  # of a contact sheet
INK, MUTED, TRACK, FIRST, OTHER = "#1f2933", "#6b7785", "#e9edf2", "#2f6fde", "#a9c3ee"


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _fit(image: Image.Image, side: int) -> Image.Image:
    """`image` in RGB, enlarged or shrunk to touch the sides of a square."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`text`, cut with an ellipsis in the middle where it is wider than `width`: names often differ in their ends."""
    text = printable(text)
    keep = len(text)
    short = text
    while font.getlength(short) > width and keep > 2:
        keep -= 1
        short = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    return short


def _bar(draw: ImageDraw.ImageDraw, x: int, y: int, width: int, height: int, share: float, color: str) -> None:
    draw.rounded_rectangle((x, y, x + width, y + height), height // 2, TRACK)
    if share * width >= 1:
        draw.rounded_rectangle((x, y, x + max(height, round(share * width)), y + height), height // 2, color)


def draw_card(image: Image.Image, title: str, top: Top) -> Image.Image:
    """The picture, beside it its name and a bar for each class."""
    head = 56
    height = max(SIDE, head + ROW * len(top)) + 2 * MARGIN
    card = Image.new("RGB", (SIDE + PANEL + 3 * MARGIN, height), "white")
    draw = ImageDraw.Draw(card)
    picture = _fit(image, SIDE)
    card.paste(picture, (MARGIN + (SIDE - picture.width) // 2, (height - picture.height) // 2))
    x, y = SIDE + 2 * MARGIN, (height - head - ROW * len(top)) // 2
    draw.text((x, y), _shorten(title, _font(22), PANEL), MUTED, _font(22))
    for rank, (name, probability) in enumerate(top):
        y_row = y + head + ROW * rank
        font, color = _font(26, rank == 0), INK if rank == 0 else MUTED
        share = f"{probability:.1%}"
        draw.text((x, y_row), _shorten(name, font, PANEL - font.getlength(share) - 24), color, font)
        draw.text((x + PANEL, y_row), share, color, font, anchor="ra")
        _bar(draw, x, y_row + 40, PANEL, 14, probability, FIRST if rank == 0 else OTHER)
    return card


def _sheet_name(page: int) -> str:
    return "sheet.png" if page == 1 else f"sheet-{page}.png"


class Sheet:
    """Contact sheets, sheet.png, sheet-2.png, ...: many pictures on a page, each over its likeliest class."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cells: list[tuple[Image.Image, str, float]] = []
        self.page = 0

    def add(self, image: Image.Image, top: Top) -> None:
        self.cells.append((_fit(image, THUMB), *top[0]))
        if len(self.cells) == COLUMNS * ROWS:
            self.close()

    def close(self) -> None:
        """Write the page that is under way, if there is anything on it."""
        if not self.cells:
            return
        gap, caption = 28, 64
        width, height = THUMB + gap, THUMB + caption + gap
        columns = min(COLUMNS, len(self.cells))
        page = Image.new("RGB", (columns * width + gap, ceil(len(self.cells) / columns) * height + gap), "white")
        draw = ImageDraw.Draw(page)
        for i, (picture, name, probability) in enumerate(self.cells):
            x, y = gap + i % columns * width, gap + i // columns * height
            page.paste(picture, (x + (THUMB - picture.width) // 2, y + (THUMB - picture.height) // 2))
            font, share = _font(18, True), f"{probability:.0%}"
            room = THUMB - _font(18).getlength(share) - 12
            draw.text((x, y + THUMB + 12), _shorten(name, font, room), INK, font)
            draw.text((x + THUMB, y + THUMB + 12), share, MUTED, _font(18), anchor="ra")
            _bar(draw, x, y + THUMB + 42, THUMB, 8, probability, FIRST)
        self.page += 1
        save_image(page, self.folder / _sheet_name(self.page))
        self.cells.clear()
