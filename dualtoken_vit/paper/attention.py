"""Attention maps of the Global Broadcast, drawn as in the paper's Figures 1 and 4.

    with recording(model) as maps:
        logits = model(x)
    maps["stages.2.blocks.5"]    # (B, H, W, h, w): attention of each image token (H, W) to each position (h, w)

A map is the mean over the heads. Position-aware global tokens form a grid. Normal global tokens have no position; their
attention is distributed over the positions of X_ga by the attention weights with which they aggregated them.
"""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from scipy.stats import rankdata
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef

from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, kept, printable, write_json
from dualtoken_vit.models.dualtoken import Block, PositionAwareFusion
from dualtoken_vit.models.layers import Attention
from dualtoken_vit.predict import files_in, find_images, none_readable, tell_older, tell_unreadable
from dualtoken_vit.predictors import load_predictor
from dualtoken_vit.recipes import Device, Runtime
from dualtoken_vit.runtime.exported import ExportedPredictor
from dualtoken_vit.runtime.session import is_exported
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.plots import save_figure
from dualtoken_vit.tasks.classification import ClassificationPredictor

RECORD = "attention.json"  # marks an output folder of `attention`
HIGHEST = 8  # number of global tokens marked in Figure 4
SIDE = 7  # maps per side in Figure 4; more image tokens are averaged down to that number
ROWS = 8  # images in figure-1.png and figure-4.png
COLUMNS = 6  # panels per row in NAME.blocks.png
TOGETHER = 64  # replaced tokens per batch


def blocks_of(model: nn.Module, name: str = "the network") -> dict[str, Block]:
    """The Dual Token Blocks of a network by name, in order; an InputError, which calls it `name`, if it has none."""
    blocks = {key: module for key, module in model.named_modules() if isinstance(module, Block)}
    if not blocks:
        raise InputError(f"{name} has no Dual Token Blocks; use a DualToken-ViT")
    return blocks


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Context in which each forward pass stores the map of every block in the returned dict, by block name.

    A map is (B, H, W, h, w). The attention of an image token to the h * w positions sums to 1. Fused attention does not
    return its weights, so it is disabled in the recorded layers within the context. Raises as `blocks_of`.
    """
    maps: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, block in blocks_of(model).items():
            _record(name, block, maps, stack)
        yield maps


def _record(name: str, block: Block, maps: dict[str, Tensor], stack: ExitStack) -> None:
    """Store the map of each forward pass of a block in `maps` until the stack is closed."""
    seen: dict[nn.Module, Tensor] = {}  # outputs: X_ga, and the weights of attention, (B, heads, queries, keys)

    def keep(layer: nn.Module, args: Any, out: Tensor) -> None:
        seen[layer] = out

    def keep_map(broadcast: nn.Module, args: tuple[Tensor, Tensor], out: Tensor) -> None:
        fusion, (_, h, w, _) = block.fusion, seen[block.aggregate_attn].shape
        grid = (fusion.grid, fusion.grid) if isinstance(fusion, PositionAwareFusion) else (h, w)
        found = seen[block.broadcast_attn.attn_drop].mean(1)  # over the heads: (B, H * W, M)
        if isinstance(fusion, Attention):
            found = found @ seen[fusion.attn_drop].mean(1)  # (B, M, h * w): positions that each token aggregated
        maps[name] = found.unflatten(1, args[0].shape[1:3]).unflatten(3, grid).detach()

    for layer in (block.broadcast_attn, block.fusion):
        if isinstance(layer, Attention):
            stack.callback(setattr, layer, "fused_attn", layer.fused_attn)
            layer.fused_attn = False  # type: ignore[misc]  # final in TorchScript only
            stack.enter_context(layer.attn_drop.register_forward_hook(keep))
    stack.enter_context(block.aggregate_attn.register_forward_hook(keep))
    stack.enter_context(block.broadcast_attn.register_forward_hook(keep_map))


def _log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """(B, num_classes), in float32 or higher precision."""
    logits = model(x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def gradient_importance(model: nn.Module, block: Block, x: Tensor) -> Tensor:
    """First-order contribution of each input token of a block to the predicted class.

    It estimates the decrease of the log-probability of that class if the token were replaced by the mean token of its
    image: the gradient with respect to the token times the difference between the token and the mean. For images
    (B, C, H, W) and one of the blocks of a network in evaluation mode, returns (B, h, w) at the block's resolution.
    """
    inputs: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with hook, torch.enable_grad():
        best = _log_probabilities(model, x.detach().requires_grad_()).amax(-1)
        (gradient,) = torch.autograd.grad(best.sum(), inputs)
    tokens = inputs[0].detach()
    return (gradient * (tokens - tokens.mean((1, 2), keepdim=True))).sum(-1)


@torch.inference_mode()
def replacement_importance(model: nn.Module, block: Block, x: Tensor) -> Tensor:
    """Decrease of the log-probability of the predicted class when an input token of a block is replaced.

    The replacement is the mean token of the image. This measures what `gradient_importance` estimates, with the same
    arguments and shapes, and takes one forward pass per token.
    """
    size: tuple[int, int]

    def replace(module: nn.Module, args: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        nonlocal size
        tokens, g = args  # (len(places), h, w, C) of one image
        size = (tokens.shape[1], tokens.shape[2])
        tokens = tokens.flatten(1, 2).clone()
        tokens[torch.arange(len(places)), places] = tokens[0].mean(0)
        return tokens.unflatten(1, size), g

    lost = []
    with block.register_forward_pre_hook(replace):
        for image in x:
            places = torch.arange(0)  # none: the unmodified network
            before, best = _log_probabilities(model, image[None]).max(-1)
            after = []
            for places in torch.arange(math.prod(size)).split(TOGETHER):
                after.append(_log_probabilities(model, image.expand(len(places), -1, -1, -1))[:, best])
            lost.append((before - torch.cat(after)).reshape(size))
    return torch.stack(lost)


def highest(maps: np.ndarray, count: int = HIGHEST) -> np.ndarray:
    """Mask of the `count` highest values of each map (..., h, w)."""
    ranks = rankdata(-maps.reshape(*maps.shape[:-2], -1), "ordinal", axis=-1)
    return ranks.reshape(maps.shape) <= count


@dataclass(frozen=True)
class Seen:
    """The attention of a network in one image."""

    image: np.ndarray  # the input of the network (Y, X, 3) without normalisation, between 0 and 1
    label: str  # the predicted class and its probability
    token: tuple[int, int]  # row and column of the key token in the block
    map: np.ndarray  # map (H, W, h, w) of the selected block
    maps: dict[str, np.ndarray]  # maps of all blocks by name


def _panel(axes: Axes, image: np.ndarray, title: str, **style: Any) -> AxesImage:
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    return axes.imshow(image, **style)


def _mark(axes: Axes, row: int, column: int) -> None:
    """Draw a box around a cell of a map."""
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, color="red", linewidth=2))


def _mosaic(maps: np.ndarray) -> np.ndarray:
    """Sub-images (H, W, h, w) arranged in one array, separated by NaN, which is drawn white."""
    height, width, h, w = maps.shape
    separated = np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    return separated.swapaxes(1, 2).reshape(height * (h + 1), width * (w + 1))[:-1, :-1]


def _scale(maps: Sequence[np.ndarray]) -> dict[str, float]:
    """One colour scale for all maps of a figure, so that they can be compared."""
    return {"vmin": min(each.min() for each in maps), "vmax": max(each.max() for each in maps)}


def _colour_bar(figure: Figure, heat: AxesImage, axes: Any) -> None:
    bar = figure.colorbar(heat, ax=axes, shrink=0.8, aspect=30, format=lambda share, _: f"{share:.2%}")
    bar.set_label("attention, one scale for all maps", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def draw_key_tokens(seen: Sequence[Seen]) -> Figure:
    """Figure 1, one row per image: the image with its key token boxed, and the attention of that token."""
    figure = Figure(figsize=(6, 2.6 * len(seen)), layout="constrained")
    cells, scale = figure.subplots(len(seen), 2, squeeze=False), _scale([one.map[one.token] for one in seen])
    for (left, right), one in zip(cells, seen, strict=True):
        sides = [side / tokens for side, tokens in zip(one.image.shape[:2], one.map.shape[:2], strict=True)]
        stride = 2 ** math.ceil(math.log2(max(sides)))  # the last tokens may reach beyond the image
        height, width = (side / stride for side in one.image.shape[:2])
        _panel(left, one.image, one.label, extent=(-0.5, width - 0.5, height - 0.5, -0.5))  # in units of image tokens
        _mark(left, *one.token)
        heat = _panel(right, one.map[one.token], "attention to the global tokens", **scale)
    _colour_bar(figure, heat, cells)
    return figure


def draw_maps(seen: Sequence[Seen]) -> Figure:
    """Figure 4, one row per image: the image, the map of every token, their highest values, the mean of all maps."""
    figure = Figure(figsize=(11.8, 2.9 * len(seen) + 0.4), layout="constrained")
    cells, every = figure.subplots(len(seen), 4, squeeze=False), []
    for one in seen:
        rows, columns = (min(side, SIDE) for side in one.map.shape[:2])
        tokens = torch.from_numpy(one.map).permute(2, 3, 0, 1)  # (h, w, H, W)
        every.append(F.adaptive_avg_pool2d(tokens, (rows, columns)).permute(2, 3, 0, 1).numpy())
    scale = _scale(every)
    for row, one, maps in zip(cells, seen, every, strict=True):
        marks = highest(maps).astype(float)
        mean = maps.mean((0, 1))
        _panel(row[0], one.image, one.label)
        heat = _panel(row[1], _mosaic(maps), "map of each token", **scale)
        _panel(row[2], _mosaic(marks), f"its {HIGHEST} highest values", cmap="Reds", vmin=0, vmax=1)
        _panel(row[3], mean, f"mean of all maps, its {HIGHEST} highest values", **scale)
        for place in np.argwhere(highest(mean)):
            _mark(row[3], *place)
    _colour_bar(figure, heat, cells)
    return figure


def draw_blocks(seen: Seen) -> Figure:
    """The image, and the mean map of each block."""
    means = {
        name.removeprefix("stages.").replace(".blocks.", ", block "): m.mean((0, 1)) for name, m in seen.maps.items()
    }
    rows, scale = math.ceil((1 + len(means)) / COLUMNS), _scale([*means.values()])
    figure = Figure(figsize=(1.9 * COLUMNS + 0.8, 2.1 * rows), layout="constrained")
    cells = figure.subplots(rows, COLUMNS, squeeze=False)
    first, *others = cells.flat
    _panel(first, seen.image, seen.label)
    for axes, (title, image) in zip(others, means.items(), strict=False):
        heat = _panel(axes, image, title, **scale)
    for axes in others[len(means) :]:
        axes.axis("off")
    _colour_bar(figure, heat, cells)
    return figure


def _parse_token(token: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", token)
    if not match:
        raise InputError(f"--token {token}: must be ROW,COL, starting at 0, for example 1,2")
    return int(match[1]), int(match[2])


def load_classifier(checkpoint: Path, device: str, **options: Any) -> ClassificationPredictor:
    """A DualToken-ViT classifier with these options of prediction; an InputError for another task or network."""
    if is_exported(checkpoint):
        raise InputError(f"{checkpoint} is an exported file; give the best.safetensors of a classification run")
    predictor = load_predictor(checkpoint, device, **options)
    if not isinstance(predictor, ClassificationPredictor):
        raise InputError(f"{checkpoint} is not a classifier; give the best.safetensors of a classification run")
    blocks_of(predictor.model, f"{checkpoint}: the network")
    return predictor


def _examine(predictor: Any, block: str, x: Any, token: tuple[int, int] | None) -> tuple[Seen, dict[str, Any]]:
    """The attention in an input of the network (C, H, W), and its entry in the record; None: the key token."""
    model = predictor.model
    if isinstance(predictor, ExportedPredictor):
        outputs = {key: torch.from_numpy(value) for key, value in model(x[None]).items()}
        logits = outputs["logits"] / predictor.preprocessing.get("temperature", 1.0)
        maps = {block: outputs["attention"]}
        x, mean, std = torch.from_numpy(x), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    else:
        x = x.to(predictor.device)
        with torch.inference_mode(), recording(model) as maps:
            logits = predictor.forward(x[None])
        mean, std = (torch.tensor(predictor.preprocessing[key])[:, None, None] for key in ("mean", "std"))
    probability, best = logits.softmax(-1).max(-1)
    name = predictor.titles[int(best)]
    entry: dict[str, Any] = {"class": name, "probability": round(probability.item(), 6)}
    height, width = maps[block].shape[1:3]
    if token is None:
        estimated, lost = (
            importance(model, blocks_of(model)[block], x[None]).flatten()
            for importance in (gradient_importance, replacement_importance)
        )
        token = divmod(int(lost.argmax()), width)
        entry["gradient_token"] = divmod(int(estimated.argmax()), width)
        entry["agreement"] = round(spearman_corrcoef(estimated, lost).item(), 3) if len(lost) > 1 else 1.0
    elif not (token[0] < height and token[1] < width):
        grid = f"{height}x{width} image tokens, 0,0 to {height - 1},{width - 1}"
        raise InputError(f"--token {token[0]},{token[1]}: {block} has {grid}")
    entry["token"] = token
    pixels = (x.cpu() * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    found = {key: value[0].cpu().numpy() for key, value in maps.items()}
    shown = re.sub(r"^n\d{8}_", "", predictor.titles[int(best)].partition(",")[0]).replace("_", " ")
    return Seen(pixels, f"{shown} {probability.item():.0%}", token, found[block], found), entry


def attention(
    checkpoint: Path,
    images: tuple[Path, ...],
    out: Path = Path("runs", "attention"),
    block: int = -1,
    token: str | None = None,
    every_block: bool = False,
    image_size: int | None = None,
    device: Device = "auto",
    runtime: Runtime | None = None,
    json: bool = False,
) -> bool:
    """Draw the attention of image tokens to global tokens in a trained classifier, as in the paper's Figures 1 and 4.

    For each image, writes NAME.key.png (the key token and its map), NAME.maps.png (the maps of all tokens) and the maps
    as NAME.npy (H, W, h, w); for several images also figure-1.png and figure-4.png with the first 8. The key token is
    the input token of the block whose replacement by the mean token of the image decreases the log-probability of the
    predicted class most. The table compares it with the estimate from the gradient.

    Args:
        checkpoint: A DualToken-ViT classifier: a best.safetensors, the name of one in the package, or a file of export
            --attention (last block only; needs --token).
        images: Image files, and folders to search for them.
        out: Folder for the drawings: a new one, or an output folder of this command.
        block: Index of the block from 0; -1: the last.
        token: ROW,COL of the token to show instead of the key token, starting at 0.
        every_block: Also draw the mean map of every block, NAME.blocks.png, and save their maps as NAME.BLOCK.npy.
        image_size: Input size in pixels; by default as in training.
        device: auto: an accelerator if there is one, else the CPU.
        runtime: Of an exported file; by default onnxruntime.
        json: Print one JSON object on stdout instead of the table, and nothing else there.

    Returns:
        Whether every image could be read; unreadable images are reported on stderr.

    Raises:
        InputError: if no image can be read, for a checkpoint of another task or network, or an unknown block or token.
    """
    checkpoint, images, out = Path(checkpoint), tuple(map(Path, images)), Path(out)
    place = _parse_token(token) if token is not None else None
    sources = find_images(images, out, RECORD)
    before, written = files_in(out), [out / RECORD]
    given: dict[str, Any] = {"image_size": image_size, "runtime": runtime}
    options = {key: value for key, value in given.items() if value is not None}
    predictor: Any
    if is_exported(checkpoint):
        predictor = load_predictor(checkpoint, device, **options)
        if "attention" not in predictor.export:
            raise InputError(f"{checkpoint} has no attention maps; write it with dualtoken-vit export --attention")
        if place is None:
            need = "is needed with an exported file: the key token is found in a checkpoint only"
            raise InputError(f"--token ROW,COL {need}")
        blocks = [predictor.export["attention"]]
    else:
        predictor = load_classifier(checkpoint, device, **options)
        blocks = list(blocks_of(predictor.model))
    if not -len(blocks) <= block < len(blocks):
        raise InputError(f"--block {block}: the network has blocks 0 to {len(blocks) - 1} (-1 is the last)")
    name = blocks[block]

    record: dict[str, Any] = {"checkpoint": str(checkpoint), "block": name, "images": [], "unreadable": []}
    first: list[Seen] = []
    finish = partial(_finish, record, out, json)
    load = in_threads(predictor.load, [source.path for source in sources], len(sources), "attention", 16)
    with kept(finish, record["images"]), closing(load) as loaded:
        for source, (_, x, error) in zip(sources, loaded, strict=True):
            if x is None:
                record["unreadable"].append({"image": str(source.path), "reason": str(error)})
                continue
            seen, entry = _examine(predictor, name, x, place)
            if not (out / RECORD).exists():  # otherwise an interrupted run leaves a folder that the next run rejects
                write_json(record, out / RECORD)
            record["images"].append({"image": printable(source.path), **entry})
            first += [seen] * (len(first) < ROWS)
            figures = {"key.png": partial(draw_key_tokens, [seen]), "maps.png": partial(draw_maps, [seen])}
            arrays = {"npy": seen.map}
            if every_block:
                figures["blocks.png"] = partial(draw_blocks, seen)
                arrays |= {f"{key}.npy": found for key, found in seen.maps.items()}
            written += [Path(f"{out / source.place}.{end}") for end in (*figures, *arrays)]
            for end, draw in figures.items():
                save_figure(draw, Path(f"{out / source.place}.{end}"), dpi=200)
            for end, found in arrays.items():
                with atomic_write(f"{out / source.place}.{end}") as file:
                    np.save(file, found)
    if not first:
        raise InputError(none_readable(record["unreadable"]))
    finish()
    if len(first) > 1:
        save_figure(partial(draw_key_tokens, first), out / "figure-1.png", dpi=200)
        save_figure(partial(draw_maps, first), out / "figure-4.png", dpi=200)
        written += [out / "figure-1.png", out / "figure-4.png"]
    if (count := len(record["images"])) > ROWS:
        print(f"figure-1.png and figure-4.png show the first {ROWS} of {count} images", file=sys.stderr)
    if not json:
        print(f"block {blocks.index(name)}, {name}; drawings in {out}")
    tell_older(out, before, [*written, *(source.path for source in sources)])
    return tell_unreadable(record["unreadable"], len(sources))


def _finish(record: dict[str, Any], out: Path, json: bool) -> None:
    """Print the record, or a table with one row per image; then write it: the disk may be full."""
    if json:
        print(dumps(record))
    else:
        _print(record["images"])
    write_json(record, out / RECORD)


def _print(entries: list[dict[str, Any]]) -> None:
    """Print a table with one row per image."""
    columns = ("<image", "<class", "probability", "key token", "by gradient", "rank correlation")
    rows = []
    for one in entries:
        rows.append([one["image"], one["class"], f"{one['probability']:.1%}", "{}, {}".format(*one["token"])])
        if "agreement" in one:  # not with --token
            rows[-1] += ["{}, {}".format(*one["gradient_token"]), f"{one['agreement']:+.2f}"]
    print(table_text(columns[: len(rows[0])], [rows]))
