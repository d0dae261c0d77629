"""What a network attends to: the maps of the Global Broadcast, drawn as in the paper's Figures 1 and 4.

    with recording(model) as maps:
        logits = model(x)
    maps["stages.2.blocks.5"]    # (B, H, W, h, w): how much each image token (H, W) reads from each place (h, w)

A map is the mean over the heads. Position-aware global tokens are a grid themselves. Normal ones have no place of their
own; each stands for the places of X_ga that it was gathered from, in the shares in which it was.
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

from dualtoken_vit.checkpoint import Checkpoint, load_model
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.data.transforms import classification_eval
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, printable
from dualtoken_vit.machine import pick_device
from dualtoken_vit.models.backbone import check_size
from dualtoken_vit.models.dualtoken import Block, PositionAwareFusion
from dualtoken_vit.models.layers import Attention
from dualtoken_vit.predict import find_images, none_readable, save_record, tell_unreadable
from dualtoken_vit.recipes import Data
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.plots import save_figure

__all__ = ["attention", "blocks_of", "gradient_importance", "recording", "replacement_importance"]

RECORD = "attention.json"  # marks a folder as one that `attention` wrote
HIGHEST = 8  # global tokens that Figure 4 marks
ROWS = 8  # images on the pages of all of them
TOGETHER = 64  # replacements in a batch


def blocks_of(model: nn.Module) -> dict[str, Block]:
    """The Dual Token Blocks of a network by name, from the first to the last.

    Raises:
        InputError: for a network that has none.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    if not blocks:
        raise InputError("the network has no Dual Token Blocks: only a DualToken-ViT has such maps")
    return blocks


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward pass leaves every block's map in the dict, by the block's name: (B, H, W, h, w).

    What an image token reads from the h * w places adds up to 1.

    Fused attention gives no map, so what is recorded goes the unfused way meanwhile.

    Raises:
        InputError: for a network without Dual Token Blocks.
    """
    maps: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, block in blocks_of(model).items():
            _watch(block, stack, lambda found, name=name: maps.__setitem__(name, found))
        yield maps


def _watch(block: Block, stack: ExitStack, keep: Callable[[Tensor], None]) -> None:
    """Call `keep` with the map of each forward pass of a block, until the stack is closed."""
    seen: dict[str, Any] = {}

    def note(key: str) -> Callable:
        return lambda module, args, out: seen.__setitem__(key, out.mean(1))  # over the heads

    def note_grid(fusion: nn.Module, args: tuple, out: Tensor) -> None:
        x_ga = args[0]  # (B, h, w, C)
        seen["grid"] = [fusion.grid] * 2 if isinstance(fusion, PositionAwareFusion) else x_ga.shape[1:3]

    def assemble(broadcast: nn.Module, args: tuple, out: Tensor) -> None:
        found = seen["broadcast"]  # (B, H * W, M)
        if "fusion" in seen:
            found = found @ seen["fusion"]  # (B, M, h * w): where each token was gathered
        keep(found.unflatten(1, args[0].shape[1:3]).unflatten(3, seen["grid"]).detach())

    for key, module in (("broadcast", block.broadcast_attn), ("fusion", block.fusion)):
        if isinstance(module, Attention):
            stack.callback(setattr, module, "fused_attn", module.fused_attn)
            module.fused_attn = False
            stack.callback(module.attn_drop.register_forward_hook(note(key)).remove)
    stack.callback(block.fusion.register_forward_hook(note_grid).remove)
    stack.callback(block.broadcast_attn.register_forward_hook(assemble).remove)


def _log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """(B, classes), in float32 or better."""
    logits = model(x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def gradient_importance(model: nn.Module, block: Block, x: Tensor) -> Tensor:
    """How much each image token that enters a block speaks for the class that is predicted.

    To first order, what the log-probability of that class would lose if the token were the mean token of its image:
    the gradient with respect to the token times the token's difference from the mean.

    Args:
        model: in evaluation mode
        block: of it
        x: (B, C, H, W)

    Returns:
        (B, h, w), of the block's map.
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
    """What the log-probability of the predicted class loses when an image token that enters a block is replaced.

    By the mean token of its image: what `gradient_importance` foretells, measured, in a forward pass a token.

    Args:
        model: in evaluation mode
        block: of it
        x: (B, C, H, W)

    Returns:
        (B, h, w), of the block's map.
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
            places: list[int] = []  # none: the network as it is
            before, best = _log_probabilities(model, image[None]).max(-1)
            after = []
            for start in range(0, math.prod(size), TOGETHER):
                places = list(range(start, min(start + TOGETHER, math.prod(size))))
                after.append(_log_probabilities(model, image.expand(len(places), -1, -1, -1))[:, best])
            lost.append((before - torch.cat(after)).reshape(size))
    return torch.stack(lost)


def highest(grid: np.ndarray, count: int = HIGHEST) -> np.ndarray:
    """Which places of a map (h, w) are its `count` highest -> (h, w) bool."""
    chosen = np.zeros(grid.size, dtype=bool)
    chosen[np.argsort(-grid, axis=None, kind="stable")[:count]] = True
    return chosen.reshape(grid.shape)


@dataclass(frozen=True)
class Seen:
    """What a network attends to in one image."""

    title: str
    image: Image.Image
    """As the network saw it."""
    label: str
    """The class that it predicts, with its probability."""
    token: tuple[int, int]
    """Row and column of the key token among the block's image tokens."""
    maps: dict[str, np.ndarray]
    """(H, W, h, w) by block."""
    block: str
    """The block in question."""

    @property
    def map(self) -> np.ndarray:
        return self.maps[self.block]


def _plain(axes: Axes, title: str = "") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)


def _show_image(axes: Axes, seen: Seen, boxed: bool, title: str) -> None:
    """The image, the key token boxed if asked for."""
    axes.imshow(seen.image)
    if boxed:
        (height, width), (row, column) = seen.map.shape[:2], seen.token
        down, across = seen.image.height / height, seen.image.width / width
        axes.add_patch(Rectangle((column * across, row * down), across, down, fill=False, color="red", linewidth=2))
    _plain(axes, title)


def _mosaic(maps: np.ndarray, gap: int = 1) -> np.ndarray:
    """Sub-images (H, W, h, w) side by side in one array, white (nan) between them."""
    height, width, h, w = maps.shape
    page = np.full((height * (h + gap) - gap, width * (w + gap) - gap), np.nan)
    for row in range(height):
        for column in range(width):
            top, left = row * (h + gap), column * (w + gap)
            page[top : top + h, left : left + w] = maps[row, column]
    return page


def draw_key_tokens(seen: Sequence[Seen]) -> Figure:
    """Figure 1, a row an image: the image with its key token boxed, and that token's map over the global tokens."""
    figure = Figure(figsize=(5.2, 2.6 * len(seen)), layout="constrained")
    for (left, right), one in zip(figure.subplots(len(seen), 2, squeeze=False), seen, strict=True):
        _show_image(left, one, True, one.label)
        heat = right.imshow(one.map[one.token], cmap="viridis")
        _plain(right, "read from the global tokens")
        figure.colorbar(heat, ax=right, shrink=0.8, format=lambda share, _: f"{share:.1%}").ax.tick_params(labelsize=7)
    return figure


def draw_maps(seen: Sequence[Seen], most: int = 7) -> Figure:
    """Figure 4, a row an image: it; the map of every image token; their highest global tokens; the mean of all maps.

    Args:
        seen: one a row
        most: sub-images a side; a finer map of image tokens is averaged down to so many
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
        _plain(row[1], "map of the token at each place")
        row[2].imshow(_mosaic(marks), cmap="Reds", vmin=0, vmax=1)
        _plain(row[2], f"its {HIGHEST} highest")
        row[3].imshow(mean, cmap="viridis")
        for top, left in zip(*highest(mean).nonzero(), strict=True):
            row[3].add_patch(Rectangle((left - 0.5, top - 0.5), 1, 1, fill=False, color="red", linewidth=1.5))
        _plain(row[3], f"mean of all, its {HIGHEST} highest")
    return figure


def draw_blocks(seen: Seen, columns: int = 6) -> Figure:
    """What the image tokens read on average in each block, beside the image."""
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
        raise InputError(f"--token {token}: give ROW,COL, counted from 0, for example 1,2")
    return int(row), int(column)


class Viewer:
    """A classifier as `attention` uses one."""

    def __init__(self, model: nn.Module, loaded: Checkpoint, block: int, image_size: int | None):
        self.model, self.class_names = model, loaded.class_names
        self.blocks = blocks_of(model)
        if not -len(self.blocks) <= block < len(self.blocks):
            raise InputError(
                f"--block {block}: there are {len(self.blocks)}, 0 to {len(self.blocks) - 1} (-1: the last)"
            )
        self.block = list(self.blocks)[block]
        preprocessing = loaded.preprocessing
        self.channels, size, _ = preprocessing["input_size"]
        if image_size is not None:
            check_size(model, self.channels, image_size)
        self.mean, self.std = (tuple(preprocessing[key]) for key in ("mean", "std"))
        data = Data(
            image_size=image_size or size,
            crop_pct=preprocessing["crop_pct"],
            interpolation=preprocessing["interpolation"],
        )
        self.transform = classification_eval(data, self.mean, self.std)

    def image(self, x: Tensor) -> Image.Image:
        """The image (C, H, W) that the network sees, for people."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = ((x.cpu() * std + mean).clamp(0, 1) * 255).round().byte()
        return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())

    def look(self, title: str, x: Tensor, token: tuple[int, int] | None) -> tuple[Seen, dict[str, Any]]:
        """The maps of an image (C, H, W), and what is to be told of it."""
        x = x[None].to(next(self.model.parameters()).device)
        with torch.inference_mode(), recording(self.model) as maps:
            probability, best = self.model(x).float().softmax(-1).max(-1)
        name = self.class_names[best.item()]
        told: dict[str, Any] = {"image": title, "class": name, "probability": round(probability.item(), 6)}
        height, width = maps[self.block].shape[1:3]
        if token is None:
            foretold, lost = (
                importance(self.model, self.blocks[self.block], x).flatten()
                for importance in (gradient_importance, replacement_importance)
            )
            token = divmod(lost.argmax().item(), width)
            told["gradient_token"] = list(divmod(foretold.argmax().item(), width))
            told["agreement"] = round(spearman_corrcoef(foretold, lost).item(), 3) if len(lost) > 1 else 1.0
        elif not (token[0] < height and token[1] < width):
            here = f"{height}x{width} image tokens here, 0,0 to {height - 1},{width - 1}"
            raise InputError(f"--token {token[0]},{token[1]}: {self.block} has {here}")
        told["token"] = list(token)
        found = {key: value[0].cpu().numpy() for key, value in maps.items()}
        return Seen(title, self.image(x[0]), f"{name} {probability.item():.0%}", token, found, self.block), told


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
    """Draw what the image tokens of a trained classifier read from the global tokens, as the paper's Figures 1 and 4.

    Writes for each image NAME.key.png (the key token boxed, beside its map), NAME.maps.png (the maps of all tokens)
    and the maps as NAME.npy (H, W, h, w); of several images also figure-1.png and figure-4.png of the first 8. The
    key token is the one that enters the block and whose replacement by the mean token of the image costs the class
    that is predicted most of its log-probability; the table compares what the gradient says.

    Args:
        checkpoint: A best.safetensors of a classification run of a DualToken-ViT.
        images: Image files, and folders to search for them, subfolders included.
        out: Folder for the drawings: a new one, or one that this command made.
        block: Which block's maps, counted from 0; -1 is the last.
        token: ROW,COL of the token to show in place of the key token, counted from 0.
        every_block: Also draw what is read on average in every block, NAME.blocks.png, and save all their maps as
            NAME.BLOCK.npy.
        image_size: Side of the images that the network sees, in pixels; by default as in training.
        device: auto, or any of torch's: cpu, cuda, mps.
        json: Print one JSON object on stdout instead of the table, and nothing else there.

    Returns:
        Whether every image could be read; those that could not are named on stderr.

    Raises:
        InputError: where no image can be read, for another kind of checkpoint, a block or token that is not there.
    """
    place = _numbers(token) if token is not None else None
    imgs = find_images(images, out, RECORD)
    model, loaded = load_model(checkpoint)
    if loaded.task != "classification":
        raise InputError(f"{checkpoint} is of {loaded.task}; give the best.safetensors of a classification run")
    viewer = Viewer(model.to(pick_device(device)).eval(), loaded, block, image_size)

    def read(path: Path) -> Tensor | InputError:
        try:
            return viewer.transform(load_image(path, viewer.channels, printable(path)))
        except InputError as error:
            return error

    record: dict[str, Any] = {"checkpoint": str(checkpoint), "block": viewer.block, "images": [], "unreadable": []}
    first: list[Seen] = []
    pixels = in_threads(read, [image.path for image in imgs], len(imgs), "looking", 16)
    for image, x in zip(imgs, pixels, strict=True):
        if isinstance(x, InputError):
            record["unreadable"].append({"image": str(image.path), "reason": str(x)})
            continue
        seen, told = viewer.look(printable(image.path), x, place)
        if not record["images"]:  # or a run that is cut short leaves a folder that the next one refuses
            save_record(record, out / RECORD)
        record["images"].append(told)
        first += [seen] * (len(first) < ROWS)
        stem = out / image.drawing.removesuffix(".png")
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
        print(f"block {list(viewer.blocks).index(viewer.block)}, {viewer.block}; drawings: {out}")
    return tell_unreadable(record["unreadable"], len(imgs))


def _print(rows: list[dict[str, Any]]) -> None:
    """What was told of each image, a line each."""
    columns = ["<image", "<class", "probability", "key token"]
    columns += ["by gradient", "rank correlation"] * ("agreement" in rows[0])
    lines = []
    for row in rows:
        cells = [row["image"], row["class"], f"{row['probability']:.1%}", "{}, {}".format(*row["token"])]
        if "agreement" in row:
            cells += ["{}, {}".format(*row["gradient_token"]), f"{row['agreement']:+.2f}"]
        lines.append(cells)
    print(table_text(columns, [lines]))
