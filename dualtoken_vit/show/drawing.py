"""Drawings of images: beside their classes, with their objects or labels, and contact sheets."""

from collections.abc import Callable, Sequence
from colorsys import hsv_to_rgb
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from dualtoken_vit.files import atomic_write, guard
from dualtoken_vit.show.text import fit_names, fit_text

Top = list[tuple[str, float]]  # class names and their probabilities, most likely first
Text = str | tuple[str, ...]  # or names, the first of which are shown

# Sizes in pixels, for display at half size.
SIDE = 448  # of the square that holds the image on a card
PANEL = 448  # width of the bars beside it
MARGIN = 40
ROW = 80  # height of a class: its name and its bar
THUMB = 224
COLUMNS, ROWS = 6, 6  # of a contact sheet
LABELLED = 12  # images on a contact sheet of labels
INK, MUTED, TRACK, FIRST, OTHER = "#1f2933", "#6b7785", "#e9edf2", "#2f6fde", "#a9c3ee"


def save_image(image: Image.Image | Callable[[], Image.Image], path: Path) -> bool:
    """Write a drawing, or what a function draws, as PNG atomically; a failure of either is a warning on stderr.

    Returns whether it was written.
    """
    with guard(path):
        drawing = image() if callable(image) else image
        with atomic_write(path) as file:
            drawing.save(file, "PNG", compress_level=3)  # half the time of the default 6, files 1 % larger
        return True
    return False


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image in RGB, scaled so that its long side is `side` pixels."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _row(
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
    width: int,
    size: int,
    text: Text,
    share: float | None,
    first: bool = True,
) -> None:
    """A text in a line of `width` pixels and, if there is a `share`, its number at the right and its bar below."""
    color = INK if first else MUTED
    value, font = fit_text("" if share is None else f"{share:.1%}", size, bold=first)
    draw.text((x + width, y), value, color, font, anchor="ra")
    names = (text,) if isinstance(text, str) else text
    shown, font = fit_names(names, size, width - font.getlength(value) - size, bold=first)
    draw.text((x, y), shown, color, font)
    if share is not None:
        top, height = y + round(1.55 * size), size // 2
        draw.rounded_rectangle((x, top, x + width, top + height), height // 2, TRACK)
        if share * width >= 1:
            right = x + max(height, round(share * width))
            draw.rounded_rectangle((x, top, right, top + height), height // 2, FIRST if first else OTHER)


def draw_card(image: Image.Image, title: str, top: Top) -> Image.Image:
    """An image beside its title and a bar for each class."""
    head = 56
    height = max(SIDE, head + ROW * len(top)) + 2 * MARGIN
    card = Image.new("RGB", (SIDE + PANEL + 3 * MARGIN, height), "white")
    draw = ImageDraw.Draw(card)
    img = fit(image, SIDE)
    card.paste(img, (MARGIN + (SIDE - img.width) // 2, (height - img.height) // 2))
    x, y = SIDE + 2 * MARGIN, (height - head - ROW * len(top)) // 2
    text, font = fit_text(title, 22, PANEL)
    draw.text((x, y), text, MUTED, font)
    for rank, (name, probability) in enumerate(top):
        _row(draw, x, y + head + ROW * rank, PANEL, 26, name, probability, rank == 0)
    return card


def color_of(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class. Hues are a golden section of the circle apart, so that neighbouring classes differ.

    Similar hues return after 5, 8 and 13 classes, with another brightness or saturation: values from a search for the
    largest distance in CIELAB between any two of the first 12 and of the first 21 classes.
    """
    saturation, brightness = (0.8, 0.45, 0.9)[label // 2 % 3], (0.8, 1.0, 0.5)[label % 3]
    red, green, blue = hsv_to_rgb(0.58 + label * 0.618034, saturation, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def palette(num_classes: int) -> list[int]:
    """The colours of the classes as a PIL palette: R, G, B of class 0, of class 1, ..."""
    return [part for label in range(num_classes) for part in color_of(label)]


def draw_objects(image: Image.Image, objects: dict[str, Any], class_names: Sequence[str]) -> Image.Image:
    """An image with its objects: boxes in the colour of the class, with names, scores and masks if available.

    With a single class, each object has its own colour and no name.

    Args:
        image: the image; the drawing's long side is between 800 and 1600 pixels
        objects: arrays or tensors: boxes (N, 4) XYXY in pixels of the image, labels (N,); optionally scores (N,) and
            masks (N, [1,] H, W)
        class_names: by label
    """
    long = max(image.size)
    scale = min(max(long, 800), 1600) / long
    canvas = fit(image, round(long * scale))
    draw = ImageDraw.Draw(canvas)
    labels = objects["labels"].tolist()
    single = len(class_names) == 1
    colors = [color_of(index if single else label) for index, label in enumerate(labels)]
    if len(objects.get("masks", ())):
        for mask, color in zip(objects["masks"].reshape(-1, image.height, image.width), colors, strict=True):
            pixels = Image.fromarray(255 * np.asarray(mask, dtype=np.uint8))
            shape = pixels.resize(canvas.size, Image.Resampling.NEAREST)
            inside = shape.filter(ImageFilter.MinFilter(5)).point(lambda value: round(0.55 * value))
            canvas.paste(color, mask=ImageChops.subtract(shape, inside))  # opaque outline, 45 % inside
    width, size = max(2, round(max(canvas.size) / 350)), max(14, round(max(canvas.size) / 65))
    scores = objects["scores"].tolist() if "scores" in objects else [None] * len(colors)
    rows = zip((objects["boxes"] * scale).tolist(), labels, scores, colors, strict=True)
    for (left, top, right, bottom), index, score, color in reversed(list(rows)):  # the highest score on top
        draw.rectangle((left, top, right, bottom), outline=color, width=width)
        name = "" if single else class_names[index]
        text, font = fit_text(name if score is None else f"{name} {score:.0%}".strip(), size, canvas.width // 3)
        if not text:
            continue
        _, _, text_width, text_height = font.getbbox(text)
        x = max(0, min(left, canvas.width - text_width - 4))
        y = top - text_height - 4 if top > text_height + 4 else top
        draw.rectangle((x, y, x + text_width + 4, y + text_height + 4), color)
        draw.text((x + 2, y + 1), text, INK if sum(color) > 380 else "white", font)
    return canvas


def spread(items: Sequence[Any]) -> Sequence[Any]:
    """At most `LABELLED` of the items, at equal distances, for `draw_labelled`."""
    return items[:: max(1, ceil(len(items) / LABELLED))]


def draw_labelled(drawings: Sequence[Image.Image]) -> Image.Image:
    """A contact sheet of images with their labels, large enough to check these."""
    cell, columns, gap = 640, 3, 8
    shown = [fit(drawing, cell - gap) for drawing in drawings]
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    bottoms = list(accumulate(max(each.height for each in row) + gap for row in rows))
    page = Image.new("RGB", (columns * cell, bottoms[-1]), "white")
    for top, row in zip((0, *bottoms), rows, strict=False):
        for column, drawing in enumerate(row):
            page.paste(drawing, (column * cell, top))
    return page


Panel = tuple[str, Image.Image, np.ndarray | None]  # title, image, and the labels (H, W) to draw over it


def draw_scene(panels: Sequence[Panel], class_names: Sequence[str]) -> Image.Image:
    """Images side by side, covered by their labels in the colours of the classes, above a legend.

    The long side of each image becomes 480 to 1280 pixels. Pixels whose label is no class keep the image's colour. The
    legend lists the classes present, those with the most pixels in the first label map first. If there is only one
    label map, it shows their shares of it.
    """
    gap, size = 16, 20
    sides = [max(image.size) for _, image, _ in panels]
    shown = [fit(image, min(max(side, 480), 1280)) for (_, image, _), side in zip(panels, sides, strict=True)]
    head = 32 if any(title for title, _, _ in panels) else 0
    maps = [labels for _, _, labels in panels if labels is not None]
    counts = [np.bincount(labels.ravel(), minlength=256)[: len(class_names)] for labels in maps]
    shares = counts[0] / maps[0].size if maps else np.zeros(len(class_names))
    present = [index for index in np.argsort(-shares, kind="stable").tolist() if any(one[index] for one in counts)]
    numbers = [f" {shares[index]:.1%}" if len(maps) == 1 else "" for index in present]
    legend = [fit_text(class_names[index] + number, size, 280) for index, number in zip(present, numbers, strict=True)]
    width = sum(img.width for img in shown) + gap * (len(shown) - 1)
    cell = max((round(font.getlength(text)) + 56 for text, font in legend), default=1)
    columns = max(1, width // cell)
    height = head + max(img.height for img in shown)
    page = Image.new("RGB", (max(width, cell), height + gap + 32 * ceil(len(legend) / columns)), "white")
    draw = ImageDraw.Draw(page)
    x = 0
    for (title, _, labels), img in zip(panels, shown, strict=True):
        text, font = fit_text(title, size, img.width)
        draw.text((x, 2), text, INK, font)
        page.paste(img if labels is None else _overlay(img, labels, len(class_names)), (x, head))
        x += img.width + gap
    for place, (index, (text, font)) in enumerate(zip(present, legend, strict=True)):
        x, y = place % columns * cell, height + gap + place // columns * 32
        draw.rectangle((x, y, x + 24, y + 24), color_of(index))
        draw.text((x + 34, y), text, INK, font)
    return page


def _overlay(image: Image.Image, labels: np.ndarray, num_classes: int) -> Image.Image:
    """The image under the colours of its labels (H, W)."""
    indices = Image.fromarray(labels.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    opacity = indices.point([153 * (value < num_classes) for value in range(256)])  # 60 %
    indices.putpalette(palette(256))
    return Image.composite(indices.convert("RGB"), image, opacity)


def sheet_name(page: int) -> str:
    return "sheet.png" if page == 1 else f"sheet-{page}.png"


class Sheet:
    """Contact sheets sheet.png, sheet-2.png, ... in a folder: a grid of images, each with its file and a caption."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cells: list[tuple[Image.Image, str, Text, float | None]] = []
        self.page = 1

    def add(self, image: Image.Image, file: str, caption: Text, share: float | None) -> None:
        """Add an image; write the page if this fills it."""
        with guard(self._path):
            self.cells.append((fit(image, THUMB), file, caption, share))
        if len(self.cells) == COLUMNS * ROWS:
            self.close()

    def close(self) -> None:
        """Write the current page unless it is empty."""
        if self.cells:
            save_image(self._draw, self._path)
            self.page += 1
            self.cells.clear()

    @property
    def _path(self) -> Path:
        return self.folder / sheet_name(self.page)

    def _draw(self) -> Image.Image:
        gap, below = 28, 84
        width, height = THUMB + gap, THUMB + below + gap
        columns = min(COLUMNS, len(self.cells))
        page = Image.new("RGB", (columns * width + gap, ceil(len(self.cells) / columns) * height + gap), "white")
        draw = ImageDraw.Draw(page)
        for index, (image, file, caption, share) in enumerate(self.cells):
            x, y = gap + index % columns * width, gap + index // columns * height
            page.paste(image, (x + (THUMB - image.width) // 2, y + (THUMB - image.height) // 2))
            name, font = fit_text(file, 14, THUMB)
            draw.text((x, y + THUMB + 8), name, MUTED, font)
            _row(draw, x, y + THUMB + 30, THUMB, 18, caption, share)
        return page
