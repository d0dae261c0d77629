"""Attention maps of the Global Broadcast, drawn as in the paper's Figures 1 and 4.

    with recording(model) as maps:
        logits = model(x)
    maps["stages.2.blocks.5"]    # (B, H, W, h, w): attention of each image token (H, W) to each position (h, w)

A map is the mean over the heads. Position-aware global tokens form a grid. Normal global tokens have no position; their
attention is distributed over the positions of X_ga by the attention weights with which they aggregated them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef

from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, printable
from dualtoken_vit.models.dualtoken import Block, PositionAwareFusion
from dualtoken_vit.models.layers import Attention
from dualtoken_vit.predict import find_images, none_readable, save_record, tell_unreadable
from dualtoken_vit.predictors import load_predictor
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.plots import save_figure
from dualtoken_vit.tasks.classification import ClassificationPredictor

__all__ = ["attention", "blocks_of", "gradient_importance", "recording", "replacement_importance"]

RECORD = "attention.json"  # marks an output folder of `attention`
HIGHEST = 8  # number of global tokens marked in Figure 4
ROWS = 8  # images in figure-1.png and figure-4.png
TOGETHER = 64  # replaced tokens per batch


def blocks_of(model: nn.Module) -> dict[str, Block]:
    """The Dual Token Blocks of a network by name, in order.

    Raises:
        InputError: if the network has none.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    if not blocks:
        raise InputError("the network has no Dual Token Blocks; use a DualToken-ViT")
    return blocks


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Context in which each forward pass stores the map of every block in the returned dict, by block name.

    A map is (B, H, W, h, w). The attention of an image token to the h * w positions sums to 1. Fused attention does not
    return its weights, so it is disabled in the recorded layers within the context.

    Raises:
        InputError: for a network without Dual Token Blocks.
    """
    maps: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, block in blocks_of(model).items():
            _watch(block, stack, lambda found, name=name: maps.__setitem__(name, found))
        yield maps


def _watch(block: Block, stack: ExitStack, keep: Callable[[Tensor], None]) -> None:
    """Call `keep` with the map of each forward pass of a block until the stack is closed."""
    seen: dict[str, Any] = {}

    def note(key: str) -> Callable:
        return lambda module, args, out: seen.__setitem__(key, out.mean(1))  # over the heads

    def note_grid(fusion: nn.Module, args: tuple, out: Tensor) -> None:
        x_ga = args[0]  # (B, h, w, C)
        seen["grid"] = [fusion.grid] * 2 if isinstance(fusion, PositionAwareFusion) else x_ga.shape[1:3]

    def assemble(broadcast: nn.Module, args: tuple, out: Tensor) -> None:
        found = seen["broadcast"]  # (B, H * W, M)
        if "fusion" in seen:
            found = found @ seen["fusion"]  # (B, M, h * w): positions that each token aggregated
        keep(found.unflatten(1, args[0].shape[1:3]).unflatten(3, seen["grid"]).detach())

    for key, module in (("broadcast", block.broadcast_attn), ("fusion", block.fusion)):
        if isinstance(module, Attention):
            stack.callback(setattr, module, "fused_attn", module.fused_attn)
            module.fused_attn = False
            stack.callback(module.attn_drop.register_forward_hook(note(key)).remove)
    stack.callback(block.fusion.register_forward_hook(note_grid).remove)
    stack.callback(block.broadcast_attn.register_forward_hook(assemble).remove)


def _log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """(B, num_classes), in float32 or higher precision."""
    logits = model(x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def gradient_importance(model: nn.Module, block: Block, x: Tensor) -> Tensor:
    """First-order contribution of each input token of a block to the predicted class.

    It estimates the decrease of the log-probability of that class if the token were replaced by the mean token of its
    image: the gradient with respect to the token times the difference between the token and the mean.

    Args:
        model: network in evaluation mode
        block: one of its blocks
        x: images (B, C, H, W)

    Returns:
        (B, h, w), at the resolution of the block.
    """
    inputs: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with hook, torch.enable_grad():
        best = _log_probabilities(model, x.requires_grad_()).amax(-1)
        (gradient,) = torch.autograd.grad(best.sum(), inputs)
    tokens = inputs[0].detach()
    return (gradient * (tokens - tokens.mean((1, 2), keepdim=True))).sum(-1)


@torch.inference_mode()
def replacement_importance(model: nn.Module, block: Block, x: Tensor) -> Tensor:
    """Decrease of the log-probability of the predicted class when an input token of a block is replaced.

    The replacement is the mean token of the image. This measures what `gradient_importance` estimates, and takes one
    forward pass per token.

    Args:
        model: network in evaluation mode
        block: one of its blocks
        x: images (B, C, H, W)

    Returns:
        (B, h, w), at the resolution of the block.
    """

    def replace(module: nn.Module, args: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        tokens, g = args
        size[:] = tokens.shape[1:3]
        if places:
            tokens = tokens.clone()
            mean = tokens[0].mean((0, 1))
            for one, place in zip(tokens, places, strict=True):
                one[divmod(place, size[1])] = mean
        return tokens, g

    lost, size = [], [0, 0]
    with block.register_forward_pre_hook(replace):
        for image in x:
            places: list[int] = []  # none for the unmodified network
            before, best = _log_probabilities(model, image[None]).max(-1)
            after = []
            for start in range(0, math.prod(size), TOGETHER):
                places = list(range(start, min(start + TOGETHER, math.prod(size))))
                after.append(_log_probabilities(model, image.expand(len(places), -1, -1, -1))[:, best])
            lost.append((before - torch.cat(after)).reshape(size))
    return torch.stack(lost)


def highest(grid: np.ndarray, count: int = HIGHEST) -> np.ndarray:
    """Mask (h, w) of the `count` highest values of a map (h, w)."""
    chosen = np.zeros(grid.size, dtype=bool)
    chosen[np.argsort(-grid, axis=None, kind="stable")[:count]] = True
    return chosen.reshape(grid.shape)


@dataclass(frozen=True)
class Seen:
    """The attention of a network in one image."""

    title: str
    image: Image.Image
    """The input of the network, without normalisation."""
    label: str
    """The predicted class and its probability."""
    token: tuple[int, int]
    """Row and column of the key token in the block."""
    maps: dict[str, np.ndarray]
    """Maps (H, W, h, w) by block name."""
    block: str
    """Name of the selected block."""

    @property
    def map(self) -> np.ndarray:
        return self.maps[self.block]


def _plain(axes: Axes, title: str = "") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)


def _show_image(axes: Axes, seen: Seen, boxed: bool, title: str) -> None:
    """Draw the image, optionally with a box around the key token."""
    axes.imshow(seen.image)
    if boxed:
        (height, width), (row, column) = seen.map.shape[:2], seen.token
        down, across = seen.image.height / height, seen.image.width / width
        axes.add_patch(Rectangle((column * across, row * down), across, down, fill=False, color="red", linewidth=2))
    _plain(axes, title)


def _mosaic(maps: np.ndarray, gap: int = 1) -> np.ndarray:
    """Sub-images (H, W, h, w) arranged in one array, separated by NaN, which is drawn white."""
    height, width, h, w = maps.shape
    page = np.full((height * (h + gap) - gap, width * (w + gap) - gap), np.nan)
    for row in range(height):
        for column in range(width):
            top, left = row * (h + gap), column * (w + gap)
            page[top : top + h, left : left + w] = maps[row, column]
    return page


def draw_key_tokens(seen: Sequence[Seen]) -> Figure:
    """Figure 1, one row per image: the image with its key token boxed, and the attention of that token."""
    figure = Figure(figsize=(5.2, 2.6 * len(seen)), layout="constrained")
    for (left, right), one in zip(figure.subplots(len(seen), 2, squeeze=False), seen, strict=True):
        _show_image(left, one, True, one.label)
        heat = right.imshow(one.map[one.token], cmap="viridis")
        _plain(right, "attention to the global tokens")
        figure.colorbar(heat, ax=right, shrink=0.8, format=lambda share, _: f"{share:.1%}").ax.tick_params(labelsize=7)
    return figure


def draw_maps(seen: Sequence[Seen], most: int = 7) -> Figure:
    """Figure 4, one row per image: the image, the map of every token, their highest values, the mean of all maps.

    Args:
        seen: one per row
        most: maximum number of maps per side; more image tokens are averaged down to that number
    """
    figure = Figure(figsize=(11, 2.9 * len(seen)), layout="constrained")
    for row, one in zip(figure.subplots(len(seen), 4, squeeze=False), seen, strict=True):
        size = [min(side, most) for side in one.map.shape[:2]]
        tokens = torch.from_numpy(one.map).permute(2, 3, 0, 1)  # (h, w, H, W)
        maps = F.adaptive_avg_pool2d(tokens, size).permute(2, 3, 0, 1).numpy()
        marks = np.stack([[highest(grid) for grid in line] for line in maps]).astype(float)
        mean = maps.mean((0, 1))
        _show_image(row[0], one, False, one.label)
        row[1].imshow(_mosaic(maps), cmap="viridis")
        _plain(row[1], "map of each token")
        row[2].imshow(_mosaic(marks), cmap="Reds", vmin=0, vmax=1)
        _plain(row[2], f"its {HIGHEST} highest values")
        row[3].imshow(mean, cmap="viridis")
        for top, left in zip(*highest(mean).nonzero(), strict=True):
            row[3].add_patch(Rectangle((left - 0.5, top - 0.5), 1, 1, fill=False, color="red", linewidth=1.5))
        _plain(row[3], f"mean of all maps, its {HIGHEST} highest values")
    return figure


def draw_blocks(seen: Seen, columns: int = 6) -> Figure:
    """The image, and the mean map of each block."""
    names = list(seen.maps)
    rows = math.ceil((len(names) + 1) / columns)
    figure = Figure(figsize=(1.9 * columns, 2.1 * rows), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).flat
    _show_image(cells[0], seen, False, seen.label)
    for axes, name in zip(cells[1:], names, strict=False):
        axes.imshow(seen.maps[name].mean((0, 1)), cmap="viridis")
        _plain(axes, name.removeprefix("stages.").replace(".blocks.", ", block "))
    for axes in cells[len(names) + 1 :]:
        axes.axis("off")
    return figure


def _numbers(token: str) -> tuple[int, int]:
    row, comma, column = token.partition(",")
    if not (comma and row.strip().isdecimal() and column.strip().isdecimal()):
        raise InputError(f"--token {token}: must be ROW,COL, starting at 0, for example 1,2")
    return int(row), int(column)


def load_classifier(checkpoint: Path, device: str, image_size: int | None) -> ClassificationPredictor:
    """The predictor of a classification checkpoint, at another image size if one is given.

    Raises:
        InputError: for a checkpoint of another task.
    """
    predictor = load_predictor(checkpoint, device, **({} if image_size is None else {"image_size": image_size}))
    if not isinstance(predictor, ClassificationPredictor):
        raise InputError(f"{checkpoint} is not a classifier; give the best.safetensors of a classification run")
    return predictor


class Viewer:
    """A classifier and one of its blocks, for `attention`."""

    def __init__(self, predictor: ClassificationPredictor, block: int):
        self.predictor, self.model = predictor, predictor.model
        model = predictor.model
        self.blocks = blocks_of(model)
        if not -len(self.blocks) <= block < len(self.blocks):
            raise InputError(f"--block {block}: the network has blocks 0 to {len(self.blocks) - 1} (-1 is the last)")
        self.block = list(self.blocks)[block]

    def image(self, x: Tensor) -> Image.Image:
        """An input of the network (C, H, W) as an image."""
        mean, std = (torch.tensor(self.predictor.preprocessing[key])[:, None, None] for key in ("mean", "std"))
        pixels = ((x.cpu() * std + mean).clamp(0, 1) * 255).round().byte()
        return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())

    def look(self, title: str, x: Tensor, token: tuple[int, int] | None) -> tuple[Seen, dict[str, Any]]:
        """The maps of an image (C, H, W), and its entry in the record."""
        x = x[None].to(self.predictor.device)
        with torch.inference_mode(), recording(self.model) as maps:
            probability, best = self.predictor.forward(x).softmax(-1).max(-1)
        name = self.predictor.class_names[best.item()]
        entry: dict[str, Any] = {"image": title, "class": name, "probability": round(probability.item(), 6)}
        height, width = maps[self.block].shape[1:3]
        if token is None:
            estimated, lost = (
                importance(self.model, self.blocks[self.block], x).flatten()
                for importance in (gradient_importance, replacement_importance)
            )
            token = divmod(lost.argmax().item(), width)
            entry["gradient_token"] = list(divmod(estimated.argmax().item(), width))
            entry["agreement"] = round(spearman_corrcoef(estimated, lost).item(), 3) if len(lost) > 1 else 1.0
        elif not (token[0] < height and token[1] < width):
            grid = f"{height}x{width} image tokens, 0,0 to {height - 1},{width - 1}"
            raise InputError(f"--token {token[0]},{token[1]}: {self.block} has {grid}")
        entry["token"] = list(token)
        found = {key: value[0].cpu().numpy() for key, value in maps.items()}
        return Seen(title, self.image(x[0]), f"{name} {probability.item():.0%}", token, found, self.block), entry


def attention(
    checkpoint: Path,
    images: tuple[Path, ...],
    out: Path = Path("runs", "attention"),
    block: int = -1,
    token: str | None = None,
    every_block: bool = False,
    image_size: int | None = None,
    device: str = "auto",
    json: bool = False,
) -> bool:
    """Draw the attention of image tokens to global tokens in a trained classifier, as in the paper's Figures 1 and 4.

    For each image, writes NAME.key.png (the key token and its map), NAME.maps.png (the maps of all tokens) and the maps
    as NAME.npy (H, W, h, w); for several images also figure-1.png and figure-4.png with the first 8. The key token is
    the input token of the block whose replacement by the mean token of the image decreases the log-probability of the
    predicted class most. The table compares it with the estimate from the gradient.

    Args:
        checkpoint: The best.safetensors of a classification run of a DualToken-ViT.
        images: Image files, and folders to search for them, subfolders included.
        out: Folder for the drawings: a new one, or an output folder of this command.
        block: Index of the block, starting at 0; -1 is the last.
        token: ROW,COL of the token to show instead of the key token, starting at 0.
        every_block: Also draw the mean map of every block, NAME.blocks.png, and save the maps of every block as
            NAME.BLOCK.npy.
        image_size: Input size of the network in pixels; by default as in training.
        device: auto, or any of torch's: cpu, cuda, mps.
        json: Print one JSON object on stdout instead of the table, and nothing else there.

    Returns:
        Whether every image could be read; unreadable images are reported on stderr.

    Raises:
        InputError: if no image can be read, for a checkpoint of another task or network, or an unknown block or token.
    """
    place = _numbers(token) if token is not None else None
    sources = find_images(images, out, RECORD)
    viewer = Viewer(load_classifier(checkpoint, device, image_size), block)

    record: dict[str, Any] = {"checkpoint": str(checkpoint), "block": viewer.block, "images": [], "unreadable": []}
    first: list[Seen] = []
    loaded = in_threads(viewer.predictor.load, [source.path for source in sources], len(sources), "attention", 16)
    for source, (_, x, error) in zip(sources, loaded, strict=True):
        if x is None:
            record["unreadable"].append({"image": str(source.path), "reason": str(error)})
            continue
        seen, entry = viewer.look(printable(source.path), x, place)
        if not record["images"]:  # otherwise an interrupted run leaves a folder that the next run rejects
            save_record(record, out / RECORD)
        record["images"].append(entry)
        first += [seen] * (len(first) < ROWS)
        stem = out / source.place
        save_figure(draw_key_tokens([seen]), stem.with_name(f"{stem.name}.key.png"), dpi=200)
        save_figure(draw_maps([seen]), stem.with_name(f"{stem.name}.maps.png"), dpi=200)
        arrays = {"": seen.map}
        if every_block:
            save_figure(draw_blocks(seen), stem.with_name(f"{stem.name}.blocks.png"), dpi=200)
            arrays |= {f".{name}": found for name, found in seen.maps.items()}
        for name, found in arrays.items():
            with atomic_write(stem.with_name(f"{stem.name}{name}.npy")) as file:
                np.save(file, found)
    if not first:
        raise InputError(none_readable(record["unreadable"]))
    if len(first) > 1:
        save_figure(draw_key_tokens(first), out / "figure-1.png", dpi=150)
        save_figure(draw_maps(first), out / "figure-4.png", dpi=150)
    save_record(record, out / RECORD)
    if json:
        print(dumps(record))
    else:
        _print(record["images"])
        print(f"block {list(viewer.blocks).index(viewer.block)}, {viewer.block}; drawings in {out}")
    return tell_unreadable(record["unreadable"], len(sources))


def _print(rows: list[dict[str, Any]]) -> None:
    """Print a table with one row per image."""
    columns = ["<image", "<class", "probability", "key token"]
    columns += ["by gradient", "rank correlation"] * ("agreement" in rows[0])
    lines = []
    for row in rows:
        cells = [row["image"], row["class"], f"{row['probability']:.1%}", "{}, {}".format(*row["token"])]
        if "agreement" in row:
            cells += ["{}, {}".format(*row["gradient_token"]), f"{row['agreement']:+.2f}"]
        lines.append(cells)
    print(table_text(columns, [lines]))
