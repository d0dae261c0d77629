"""Images for people: an image beside its classes or with its objects, contact sheets."""

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from dualtoken_vit.files import atomic_write, printable

Top = list[tuple[str, float]]  # class and probability, most likely first


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic_write(path) as file:
        image.save(file, "PNG")


# Sizes in pixels, twice what they are meant to be seen at.
SIDE = 448  # of the square that an image is fitted into
PANEL = 448  # width of the bars beside it
MARGIN = 40
ROW = 80  # height of a class: its name, its bar
THUMB = 224
COLUMNS, ROWS = 6, 6  # of a contact sheet
LABELLED = 12  # images on a contact sheet of labels
INK, MUTED, TRACK, FIRST, OTHER = "#1f2933", "#6b7785", "#e9edf2", "#2f6fde", "#a9c3ee"


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def fit(image: Image.Image, side: int) -> Image.Image:
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
    """The image, beside it its name and a bar for each class."""
    head = 56
    height = max(SIDE, head + ROW * len(top)) + 2 * MARGIN
    card = Image.new("RGB", (SIDE + PANEL + 3 * MARGIN, height), "white")
    draw = ImageDraw.Draw(card)
    img = fit(image, SIDE)
    card.paste(img, (MARGIN + (SIDE - img.width) // 2, (height - img.height) // 2))
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


def color_of(label: int) -> tuple[int, int, int]:
    """A colour for a class: hues a golden section of the circle apart, so that neighbours differ.

    Hues come near again after 5, 8 and 13 classes, but not with the same brightness and saturation.
    """
    saturation, brightness = (0.75, 0.45, 1.0)[label // 3 % 3], (0.95, 0.75, 0.55)[label % 3]
    return tuple(round(255 * part) for part in hsv_to_rgb(0.58 + label * 0.618034, saturation, brightness))


def draw_objects(image: Image.Image, objects: dict[str, Tensor], class_names: Sequence[str]) -> Image.Image:
    """An image with its objects: boxes in the colour of the class, names, scores and masks where there are any.

    Names and colours of a single class would say nothing: then objects differ in colour, and have no names.

    Args:
        image: The image; drawn with its long side between 800 and 1600 pixels.
        objects: boxes (N, 4) XYXY in the image's pixels, labels (N,); scores (N,) and masks (N, [1,] H, W) if known.
        class_names: By label.
    """
    long = max(image.size)
    scale = min(max(long, 800), 1600) / long
    canvas = fit(image, round(long * scale))
    labels = objects["labels"].tolist()
    alone = len(class_names) == 1
    colors = [color_of(index if alone else label) for index, label in enumerate(labels)]
    if len(objects.get("masks", ())):
        pixels = np.asarray(canvas).astype(np.float32)
        for mask, color in zip(objects["masks"].reshape(-1, image.height, image.width), colors, strict=True):
            shape = Image.fromarray(255 * mask.numpy().astype(np.uint8)).resize(canvas.size, Image.Resampling.NEAREST)
            inside, core = (np.asarray(each) > 0 for each in (shape, shape.filter(ImageFilter.MinFilter(5))))
            pixels[inside] = 0.55 * pixels[inside] + 0.45 * np.array(color)
            pixels[inside & ~core] = color  # an outline, or a mask on a thing of one colour is not seen
        canvas = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    width = max(2, round(max(canvas.size) / 350))
    font = _font(max(14, round(max(canvas.size) / 65)))
    scores = objects["scores"].tolist() if "scores" in objects else [None] * len(colors)
    rows = zip((objects["boxes"] * scale).tolist(), labels, scores, colors, strict=True)
    for corners, label, score, color in reversed(list(rows)):  # the best on top
        draw.rectangle(corners, outline=color, width=width)
        name = "" if alone else printable(class_names[label])
        text = name if score is None else f"{name} {score:.0%}".strip()
        if not text:
            continue
        _, _, right, bottom = font.getbbox(text)
        x = max(0, min(corners[0], canvas.width - right - 4))
        y = corners[1] - bottom - 4 if corners[1] > bottom + 4 else corners[1]
        draw.rectangle((x, y, x + right + 4, y + bottom + 4), color)
        draw.text((x + 2, y + 1), text, INK if sum(color) > 380 else "white", font)
    return canvas


def spread(items: Sequence[Any]) -> Sequence[Any]:
    """Some of the items, from all over them: what `draw_labelled` has room for."""
    return items[:: max(1, ceil(len(items) / LABELLED))]


def draw_labelled(drawings: Sequence[Image.Image]) -> Image.Image:
    """A contact sheet of images with their labels, large enough to judge these."""
    cell, columns, gap = 640, 3, 8
    page = Image.new("RGB", (columns * cell, ceil(len(drawings) / columns) * cell), "white")
    for index, drawing in enumerate(drawings):
        page.paste(fit(drawing, cell - gap), (index % columns * cell, index // columns * cell))
    return page


def palette(num_classes: int) -> list[int]:
    """The colours of the classes as PIL takes a palette."""
    return [part for label in range(num_classes) for part in color_of(label)]


Panel = tuple[str, Image.Image, np.ndarray | None]  # title, image, and the labels (H, W) of its pixels, to lie over it


def draw_scene(panels: Sequence[Panel], class_names: Sequence[str]) -> Image.Image:
    """Images side by side, each under its labels in the colours of the classes, and a legend below.

    Labels that are no class are left as the image is. The legend has the classes that are in a panel, in the order
    of their share of the first labels' pixels, which it gives if these are the only ones.
    """
    gap = 16
    sides = [max(image.size) for _, image, _ in panels]
    shown = [fit(image, min(max(side, 480), 1280)) for (_, image, _), side in zip(panels, sides, strict=True)]
    font = _font(20)
    head = 32 if any(title for title, _, _ in panels) else 0
    maps = [labels for _, _, labels in panels if labels is not None]
    counts = [np.bincount(labels.ravel(), minlength=256)[: len(class_names)] for labels in maps]
    shares = counts[0] / maps[0].size if maps else np.zeros(len(class_names))
    present = [label for label in np.argsort(-shares, kind="stable").tolist() if any(one[label] for one in counts)]
    names = [_shorten(class_names[label], font, 200) for label in present]
    texts = [f"{name} {shares[k]:.1%}" for name, k in zip(names, present, strict=True)] if len(maps) == 1 else names
    width = sum(img.width for img in shown) + gap * (len(shown) - 1)
    cell = max((round(font.getlength(text)) + 56 for text in texts), default=1)
    columns = max(1, width // cell)
    height = head + max(img.height for img in shown)
    page = Image.new("RGB", (max(width, cell), height + gap + 32 * ceil(len(texts) / columns)), "white")
    draw = ImageDraw.Draw(page)
    x = 0
    for (title, _, labels), img in zip(panels, shown, strict=True):
        if labels is not None:
            img = _under(img, labels, len(class_names))
        draw.text((x, 2), _shorten(title, font, img.width), INK, font)
        page.paste(img, (x, head))
        x += img.width + gap
    for place, (label, text) in enumerate(zip(present, texts, strict=True)):
        x, y = place % columns * cell, height + gap + place // columns * 32
        draw.rectangle((x, y, x + 24, y + 24), color_of(label))
        draw.text((x + 34, y), text, INK, font)
    return page


def _under(image: Image.Image, labels: np.ndarray, num_classes: int) -> Image.Image:
    """The image with the colours of its labels over it."""
    labels = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    colors = np.array([color_of(label) for label in range(256)], dtype=np.float32)
    pixels = np.asarray(image).astype(np.float32)
    mixed = np.where((labels < num_classes)[..., None], 0.4 * pixels + 0.6 * colors[labels], pixels)
    return Image.fromarray(mixed.astype(np.uint8))


def sheet_name(page: int) -> str:
    return "sheet.png" if page == 1 else f"sheet-{page}.png"


class Sheet:
    """Contact sheets, sheet.png, sheet-2.png, ...: many images on a page, each over a name and a bar for a share."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cells: list[tuple[Image.Image, str, float | None]] = []
        self.page = 0

    def add(self, image: Image.Image, name: str, share: float | None) -> None:
        self.cells.append((fit(image, THUMB), name, share))
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
        for i, (image, name, share) in enumerate(self.cells):
            x, y = gap + i % columns * width, gap + i // columns * height
            page.paste(image, (x + (THUMB - image.width) // 2, y + (THUMB - image.height) // 2))
            font, percent = _font(18, True), "" if share is None else f"{share:.0%}"
            room = THUMB - _font(18).getlength(percent) - 12
            draw.text((x, y + THUMB + 12), _shorten(name, font, room), INK, font)
            if share is not None:
                draw.text((x + THUMB, y + THUMB + 12), percent, MUTED, _font(18), anchor="ra")
                _bar(draw, x, y + THUMB + 42, THUMB, 8, share, FIRST)
        self.page += 1
        save_image(page, self.folder / sheet_name(self.page))
        self.cells.clear()
