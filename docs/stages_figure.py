"""Draws images/stages.png, one image on its way through the network: `python docs/stages_figure.py`."""

from pathlib import Path

import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

import dualtoken_vit  # noqa: F401  registers the models with timm
from dualtoken_vit.data.shapes import scene
from dualtoken_vit.paper.attention import recording

IMAGE = scene("val", 15, 224)[0]
PLACE = (0.3, 0.65)  # row and column of the token whose attention is drawn, as shares of the image
BOX = "#e5007d"
COLUMNS = ("image", "in the stem", "stem", "stage 1", "stage 2", "stage 3")
TEXTS = (
    ("Colours", "the first three principal components\nof the channels, for each map by itself"),
    ("Downsampled map", "of the last block of the stage,\non which self-attention runs"),
    ("Attention", "of the boxed image token\nto the global tokens, in that block"),
    ("Global tokens", "at first, as for every image,\nand after each stage"),
)


@torch.inference_mode()
def follow() -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The rows of the figure, from T (mix) with the package's weights.

    X inside the stem, after it and after each stage (h, w, C); the downsampled map (h, w, C) and the attention
    (H, W, 7, 7) in the last block of each stage; G at the start and after each stage (7, 7, C).
    """
    model = timm.create_model("dualtoken_vit_tiny_mix", pretrained=True).eval()
    x, downsampled, g = [], [], [model.token_embed]
    model.stem.stride4.register_forward_hook(lambda layer, args, out: x.append(out.permute(0, 2, 3, 1)))
    model.stem.norm.register_forward_hook(lambda layer, args, out: x.append(out))
    for stage in model.stages:
        stage.blocks[-1].downsample.register_forward_hook(lambda layer, args, out: downsampled.append(out))
        stage.register_forward_hook(lambda layer, args, out: x.append(out[0]))
        stage.register_forward_hook(lambda layer, args, out: g.append(out[1]))
    cfg = model.pretrained_cfg
    with recording(model) as maps:
        model(normalize(pil_to_tensor(IMAGE)[None] / 255, cfg["mean"], cfg["std"]))
    attention = [maps[f"stages.{i}.blocks.{len(stage.blocks) - 1}"] for i, stage in enumerate(model.stages)]
    grids = [tokens.unflatten(1, (7, 7)) for tokens in g]
    return tuple([each[0] for each in row] for row in (x, downsampled, attention, grids))


def colours(tokens: Tensor) -> Tensor:
    """Tokens (h, w, C) as colours (h, w, 3): their first three principal components, each of equal spread."""
    centred = tokens.flatten(0, 1) - tokens.mean((0, 1))
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    found = centred @ (axes * axes.sum(1, keepdim=True).sign()).T  # the sign of a component is arbitrary
    return (0.5 + found / found.std(0) / 4).clamp(0, 1).unflatten(0, tokens.shape[:2])


def panel(axes: Axes, image: object, caption: str, **style: object) -> None:
    axes.axis("on")
    axes.imshow(image, interpolation="nearest", **style)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(caption, fontsize=8, labelpad=3)


def draw() -> Figure:
    x, downsampled, attention, g = follow()
    figure = Figure(figsize=(9, 6.7))
    cells = figure.subplots(4, 6)
    figure.subplots_adjust(0.005, 0.03, 0.995, 0.965, wspace=0.08, hspace=0.22)
    for axes in cells.flat:
        axes.axis("off")
    for axes, title in zip(cells[0], COLUMNS, strict=True):
        axes.set_title(title, fontsize=9)
    for axes, (head, text) in zip((cells[1, 0], cells[1, 2], cells[2, 2], cells[3, 1]), TEXTS, strict=True):
        edge, align = (0, "left") if axes is cells[1, 0] else (0.95, "right")
        axes.text(edge, 0.6, head, fontsize=9, weight="bold", ha=align, transform=axes.transAxes)
        axes.text(edge, 0.54, text, fontsize=8, ha=align, va="top", transform=axes.transAxes)
    panel(cells[0, 0], IMAGE, f"{IMAGE.height}x{IMAGE.width}x3")
    for axes, tokens in zip((*cells[0, 1:], *cells[1, 3:], *cells[3, 2:]), (*x, *downsampled, *g), strict=True):
        panel(axes, colours(tokens), "x".join(map(str, tokens.shape)))
    for above, axes, maps in zip(cells[0, 3:], cells[2, 3:], attention, strict=True):
        row, column = (int(share * side) for share, side in zip(PLACE, maps.shape[:2], strict=True))
        above.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, color=BOX, linewidth=1.5))
        own = maps[row, column]
        panel(axes, own, f"7x7, at most {own.max():.0%}", vmin=0, cmap="magma")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("images") / "stages.png", dpi=200, metadata={"Software": None})
