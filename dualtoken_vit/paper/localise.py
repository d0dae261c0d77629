"""How well attention maps say where things are: the paper's claim about position-aware global tokens, measured.

An image token on a labelled object reads from global tokens. If these carry positions, it should read from what was
gathered on the same object; chance is what a map that reads everywhere alike would give. Every map is taken to the
places of X_ga, where global information is gathered: position-aware tokens are X_ga resized, normal ones are mixtures
of it (see `attention.recording`). So both kinds are judged on the same grid.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torchvision.transforms import v2

from dualtoken_vit.checkpoint import load_model
from dualtoken_vit.data.coco import CocoDataset, DetectionDataset, ShapeScenes
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError
from dualtoken_vit.machine import pick_device
from dualtoken_vit.models.backbone import check_size
from dualtoken_vit.models.layers import resize_grid
from dualtoken_vit.models.two_stream import STRIDE
from dualtoken_vit.paper.attention import blocks_of, recording
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.plots import save_figure

__all__ = ["Place", "localise", "measure", "places_of"]


@dataclass(frozen=True)
class Place:
    """What the tokens on one object read from, in one block; shares of 1."""

    on_object: float
    """Share of their attention that lies on the object."""
    chance: float
    """Share of the places that the object covers: `on_object` of a map that reads everywhere alike."""
    highest: float
    """How often the place that they read most from lies on the object (in parts, where it does in parts)."""
    own: float
    """How often no other place is nearer to the token than that."""


@dataclass(frozen=True)
class Score:
    """A block's `Place`s: the mean over the images of the mean over an image's objects."""

    checkpoint: str
    block: str
    images: int
    objects: int
    on_object: float
    error: float
    """Standard error of `on_object` less `chance`, over the images."""
    chance: float
    highest: float
    own: float
    own_chance: float
    """One in the number of places, on average."""

    @property
    def lift(self) -> float:
        """How many times as much attention lies on the object as chance would put there."""
        return self.on_object / self.chance


def cells(x: Tensor, stride: int) -> Tensor:
    """The mean of x (C, Y, X) over cells of `stride` pixels, as the network pools: the last ones may be partial."""
    return F.avg_pool2d(x[None], stride, ceil_mode=True, count_include_pad=False)[0]


def gathered(attended: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map over global tokens (H, W, h, w) as one over the places of X_ga that these were resized from.

    Each token passes what it is given on to the places that it is interpolated from, in their shares.

    Args:
        attended: what each image token reads from each global token
        grid: rows and columns of X_ga
    """
    if attended.shape[2:] == grid:
        return attended
    places = torch.eye(math.prod(grid), dtype=attended.dtype).unflatten(1, grid)[
        ..., None
    ]  # (places, rows, columns, 1)
    shares = resize_grid(places, attended.shape[2])[..., 0]  # (places, h, w); global tokens form a square
    return torch.einsum("abhw,phw->abp", attended, shares).unflatten(2, grid)


def places_of(attended: Tensor, cover: Tensor) -> Place:
    """Judge the map of an image by one object in it.

    The tokens on an object are those of whose cell it covers at least a half, or, of a small one, the cell that it
    covers most of.

    Args:
        attended: (H, W, h, w), what each image token reads from each global token; each adds up to 1
        cover: (Y, X), 1 where the object is in the image that the network sees
    """
    cover = cover[None].to(attended.dtype)
    (rows, columns), (height, width) = attended.shape[:2], cover.shape[1:]
    stride = next(s for s in (8, 16, 32) if (math.ceil(height / s), math.ceil(width / s)) == (rows, columns))
    tokens, places = cells(cover, stride)[0], cells(cover, STRIDE)[0]
    maps = gathered(attended, tuple(places.shape)).flatten(2)  # (H, W, h * w)
    on = tokens >= min(0.5, tokens.max().item())
    best = maps[on].argmax(1)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    middle = torch.stack((y, x))
    apart = torch.cdist(cells(middle, stride)[:, on].T, cells(middle, STRIDE).flatten(1).T)  # (N, h * w) pixels
    return Place(
        on_object=(maps[on] @ places.flatten()).mean().item(),
        chance=places.mean().item(),
        highest=places.flatten()[best].mean().item(),
        own=(apart.gather(1, best[:, None])[:, 0] <= apart.amin(1) + 1e-3).float().mean().item(),
    )


def _covers(target: dict) -> Tensor:
    """(N, Y, X): the masks of the objects, or their boxes, filled."""
    if "masks" in target:
        return target["masks"].float()
    height, width = target["boxes"].canvas_size
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    left, top, right, bottom = (side[:, None, None] for side in target["boxes"].T)
    return ((x >= left) & (x < right) & (y[:, None] >= top) & (y[:, None] < bottom)).float()


@torch.inference_mode()
def measure(model: nn.Module, images: DetectionDataset, name: str = "") -> list[Score]:
    """Judge every block's maps by every object; objects of less than a pixel there are left out.

    Args:
        model: a DualToken-ViT in evaluation mode
        images: with a `transform` that makes the network's input
        name: of the network, for the scores

    Raises:
        InputError: for another network, or images without objects.
    """
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {block: [] for block in blocks_of(model)}  # of each image (objects, 4)
    sizes: list[int] = []
    for x, target in in_threads(images.__getitem__, range(len(images)), len(images), name, 16):
        covers = [cover for cover in _covers(target) if cover.any()]
        if not covers:
            continue
        with recording(model) as maps:
            model(x[None].to(device))
        for block, attended in maps.items():
            places = [places_of(attended[0].float().cpu(), cover) for cover in covers]
            found[block].append(torch.tensor([[p.on_object, p.chance, p.highest, p.own] for p in places]))
        sizes.append(math.prod(math.ceil(side / STRIDE) for side in x.shape[1:]))
    if not sizes:
        raise InputError(f"{images.name}: no objects; nothing to judge attention by")
    scores = []
    for block, places in found.items():
        means = torch.stack([one.double().mean(0) for one in places])  # (images, 4)
        gain = means[:, 0] - means[:, 1]
        on_object, chance, highest, own = means.mean(0).tolist()
        scores.append(
            Score(
                checkpoint=name,
                block=block,
                images=len(places),
                objects=sum(map(len, places)),
                on_object=on_object,
                error=gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else math.nan,
                chance=chance,
                highest=highest,
                own=own,
                own_chance=sum(1 / size for size in sizes) / len(sizes),
            )
        )
    return scores


def draw(scores: Sequence[Score]) -> Figure:
    """Lift on the objects, and how often a token reads most from its own place, against the blocks."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(score.checkpoint for score in scores):
        rows = [score for score in scores if score.checkpoint == name]
        errors = [score.error / score.chance for score in rows]
        left.errorbar(range(len(rows)), [score.lift for score in rows], errors, fmt=".-", capsize=2, label=name)
        (line,) = right.plot([100 * score.own for score in rows], ".-", label=name)
        right.plot([100 * score.own_chance for score in rows], ":", color=line.get_color())
    left.axhline(1, color="grey", linestyle=":")
    left.set(ylabel="attention on the object / chance")
    right.set(ylabel="reads most from its own place (%)")
    for axes in (left, right):
        axes.set_xlabel("block (dotted: chance)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    return figure


def _images(images: Path | None, annotations: Path | None, masks: bool, limit: int | None) -> DetectionDataset:
    if (images is None) != (annotations is None):
        raise InputError("--images DIR and --annotations FILE go together; without both, shapes are drawn")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: must be at least 1")
    if images is None or annotations is None:
        return ShapeScenes("val", 128, count=limit)
    return CocoDataset(images, annotations, masks, limit=limit)


def localise(
    checkpoints: tuple[Path, ...],
    images: Path | None = None,
    annotations: Path | None = None,
    masks: bool = False,
    image_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    plot: Path | None = None,
    json: bool = False,
    markdown: bool = False,
) -> None:
    """Measure how well attention maps say where objects are, in every block.

    An image token on an object reads from global tokens: how much of that, and how often most of it, was gathered on
    the same object? Chance is what reading everywhere alike would give. Give several checkpoints to compare them, for
    example of position-aware and of normal global tokens.

    Args:
        checkpoints: best.safetensors of classification runs of DualToken-ViTs.
        images: Folder of images with labelled objects; without one, scenes of shapes are drawn, with masks.
        annotations: COCO json of these images.
        masks: The objects are their masks, not their boxes (those of drawn shapes are always masks).
        image_size: Short side of the images that the network sees, in pixels; by default as in training. The finer
            the better places can be told apart: global information is gathered on a grid of stride 32.
        limit: Only the first so many images.
        device: auto, or any of torch's: cpu, cuda, mps.
        plot: PNG to draw the figures against the blocks in.
        json: Print one JSON object and nothing else.
        markdown: Print the table as Markdown.

    Raises:
        InputError: for another kind of checkpoint, or images that cannot be used.
    """
    if not checkpoints:
        raise InputError("no checkpoint is given; give the best.safetensors of one or more runs")
    networks = []
    for checkpoint in checkpoints:
        model, loaded = load_model(checkpoint)
        if loaded.task != "classification":
            raise InputError(f"{checkpoint} is of {loaded.task}; give the best.safetensors of a classification run")
        try:
            blocks_of(model)
        except InputError as error:
            raise InputError(f"{checkpoint}: {error}") from error
        channels, size, _ = loaded.preprocessing["input_size"]
        size = size if image_size is None else image_size
        check_size(model, channels, size)
        networks.append((checkpoint, model, loaded.preprocessing, channels, size))
    if len(sizes := {size for *_, size in networks}) > 1:
        raise InputError(
            f"the networks see {' and '.join(map(str, sorted(sizes)))} pixels: give one --image-size for all"
        )
    imgs = _images(images, annotations, masks, limit)
    scores: list[Score] = []
    for checkpoint, model, preprocessing, channels, size in networks:
        imgs.channels = channels
        imgs.transform = v2.Compose(
            [
                v2.Resize(size, antialias=True),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(preprocessing["mean"], preprocessing["std"]),
            ]
        )
        name = str(checkpoint.parent) if checkpoint.name == "best.safetensors" else str(checkpoint)
        scores += measure(model.to(pick_device(device)), imgs, name)
    if plot is not None:
        save_figure(draw(scores), plot, dpi=150)
    if json:
        print(dumps({"scores": [asdict(s) | {"lift": s.lift} for s in scores]}))
        return
    columns = (
        "<network",
        "<block",
        "on object %",
        "+-",
        "chance %",
        "lift",
        "highest %",
        "own place %",
        "its chance %",
    )
    groups: dict[str, list[tuple[str, ...]]] = {}
    for s in scores:
        lift = [f"{100 * share:.2f}" for share in (s.on_object, s.error, s.chance)]
        place = [f"{100 * share:.1f}" for share in (s.highest, s.own, s.own_chance)]
        groups.setdefault(s.checkpoint, []).append((s.checkpoint, s.block, *lift, f"{s.lift:.2f}", *place))
    print(table_text(columns, groups.values(), markdown))
    print(f"\n{scores[0].objects} objects in {scores[0].images} of {len(imgs)} images; means over the images.")
    print(
        "on object    share of what an object's tokens read that lies on it; +-: standard error of its lead on chance\n"
        "chance       share of the places that the object covers; lift: the former over this\n"
        "highest      how often the place read most from lies on the object, to be compared with chance\n"
        "own place    how often that place is the token's own, or as near to it as any"
    )
