"""Networks of similar cost that the paper does not compare with, half of them published after it."""

import csv
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import timm
import torch

import dualtoken_vit.models  # noqa: F401  registers the models
from dualtoken_vit.data.threads import track
from dualtoken_vit.paper.counting import Counts, count
from dualtoken_vit.show.console import table_text

WHAT_IS_LISTED = """\
Parameters and MACs are counted in this run, with 1000 classes, at the image size of the published accuracy.
top-1      published on ImageNet-1k, in percent; * trained by distillation, which alone gains 1 to 2.5 points.
"""


class Modern(NamedTuple):
    """A network with its published accuracy."""

    network: str
    key: str  # timm's name
    size: int  # side of the images, in pixels
    score: str  # published top-1 on ImageNet-1k, in percent
    distilled: bool
    source: str  # of the network and its accuracy; an arXiv number starts with year and month
    counts: Counts


@cache
def modern() -> tuple[Modern, ...]:
    """The networks, counted, in the order of their multiply-accumulates; DualToken-ViT is among them."""
    text = files(__package__).joinpath("modern.csv").read_text(encoding="utf-8")
    rows, found = list(csv.DictReader(text.splitlines())), []
    for row in track(rows, len(rows), "counting"):
        size, distilled = int(row.pop("size")), bool(row.pop("distilled"))
        with torch.device("meta"):
            counts = count(timm.create_model(row["key"], num_classes=1000), (3, size, size))
        found.append(Modern(**row, size=size, distilled=distilled, counts=counts))
    return tuple(sorted(found, key=lambda one: one.counts.macs))


def modern_table(markdown: bool = False) -> str:
    """The networks as a table for the terminal, or as Markdown."""
    cells = []
    for one in modern():
        counts = f"{one.counts.params / 1e6:.2f}", f"{one.counts.macs / 1e9:.3f}"
        score = one.score + ("*" if one.distilled else " ")
        cells.append((one.network, one.key, str(one.size), *counts, score, one.source))
    columns = ("<network", "<timm model", "pixels", "params M", "MACs G", "top-1 ", "<source")
    return table_text(columns, [cells], markdown)
