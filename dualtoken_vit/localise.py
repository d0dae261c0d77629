"""How well attention maps say where things are: the paper's claim about position-aware global tokens, measured.

An image token on a labelled object reads from global tokens. Where these have places, as position-aware ones do, they
should be those of the object; chance is what a map that reads everywhere alike would give. Normal global tokens stand
for the places that they were gathered from (see `attention.recording`), so both kinds can be compared.
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

from dualtoken_vit.attention import blocks_of, recording
from dualtoken_vit.checkpoint import load_model
from dualtoken_vit.data.classification import in_threads
from dualtoken_vit.data.coco import CocoPictures, ObjectPictures, ShapeScenes
from dualtoken_vit.errors import InputError
from dualtoken_vit.plots import save_figure
from dualtoken_vit.predict import pick_device
from dualtoken_vit.tables import print_table

__all__ = ["Place", "localise", "measure", "places_of"]


@dataclass(frozen=True)
class Place:
    """What the tokens on one object attend to, in one block; shares of 1."""

    on_object: float
    """Share of their attention that lies on the object."""
    chance: float
    """Share of the picture that the object covers: `on_object` of a map that reads everywhere alike."""
    highest: float
    """How often the place that they read most from lies on the object (in parts, where it does in parts)."""
    own: float
    """How often that is the place of the token itself."""


@dataclass(frozen=True)
class Score:
    """The mean of a block's `Place`s over the objects."""

    checkpoint: str
    block: str
    objects: int
    on_object: float
    error: float
    """Standard error of `on_object` less `chance`, over the objects."""
    chance: float
    highest: float
    own: float
    own_chance: float
    """One in the number of places."""

    @property
    def lift(self) -> float:
        """How many times as much attention lies on the object as chance would put there."""
        return self.on_object / self.chance


def places_of(attended: Tensor, cover: Tensor) -> Place:
    """Judge one map by one object.

    The tokens on an object are those of whose cell it covers at least a half, or, of a small one, the cell that it
    covers most of.

    Args:
        attended: (H, W, h, w), what each image token reads from each place; each adds up to 1
        cover: (Y, X), 1 where the object is in the picture, at any resolution
    """
    (H, W, h, w), cover = attended.shape, cover[None].to(attended)
    tokens, places = F.adaptive_avg_pool2d(cover, (H, W))[0], F.adaptive_avg_pool2d(cover, (h, w))[0]
    on = tokens >= min(0.5, tokens.max().item())
    maps = attended[on].flatten(1)  # (N, h * w)
    best = maps.argmax(1)
    rows, columns = on.nonzero().T
    own = (rows * 2 + 1) * h // (2 * H) * w + (columns * 2 + 1) * w // (2 * W)  # where the middle of its cell is
    return Place(
        on_object=(maps @ places.flatten()).mean().item(),
        chance=places.mean().item(),
        highest=places.flatten()[best].mean().item(),
        own=(best == own).float().mean().item(),
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
def measure(model: nn.Module, pictures: ObjectPictures, name: str = "") -> list[Score]:
    """Judge every block's maps by every object.

    Args:
        model: a DualToken-ViT in evaluation mode
        pictures: with a `transform` that makes the network's input
        name: of the network, for the scores

    Raises:
        InputError: for another network, or pictures without objects.
    """
    device = next(model.parameters()).device
    found: dict[str, list[Place]] = {block: [] for block in blocks_of(model)}
    grids: dict[str, tuple[int, int]] = {}
    for x, target in in_threads(pictures.__getitem__, range(len(pictures)), len(pictures), f"looking {name}", 16):
        with recording(model) as maps:
            model(x[None].to(device))
        for cover in _covers(target):
            if not cover.any():  # less than a pixel in what the network sees
                continue
            for block, attended in maps.items():
                found[block].append(places_of(attended[0].float().cpu(), cover))
                grids[block] = tuple(attended.shape[3:])
    if not grids:
        raise InputError(f"{pictures.name}: no objects; nothing to judge attention by")
    scores = []
    for block, places in found.items():
        on, chance, highest, own = (
            torch.tensor([getattr(place, key) for place in places], dtype=torch.float64)
            for key in ("on_object", "chance", "highest", "own")
        )
        error = (on - chance).std().item() / math.sqrt(len(places)) if len(places) > 1 else math.nan
        scores.append(
            Score(
                checkpoint=name,
                block=block,
                objects=len(places),
                on_object=on.mean().item(),
                error=error,
                chance=chance.mean().item(),
                highest=highest.mean().item(),
                own=own.mean().item(),
                own_chance=1 / math.prod(grids[block]),
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
        right.plot([100 * score.own for score in rows], ".-", label=name)
    left.axhline(1, color="grey", linestyle=":")
    right.plot([100 * score.own_chance for score in rows], ":", color="grey", label="chance")
    left.set(ylabel="attention on the object / chance")
    right.set(ylabel="reads most from its own place (%)")
    for axes in (left, right):
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    return figure


def _pictures(images: Path | None, annotations: Path | None, masks: bool, limit: int | None) -> ObjectPictures:
    if (images is None) != (annotations is None):
        raise InputError("--images DIR and --annotations FILE go together; without both, shapes are drawn")
    if images is None or annotations is None:
        return ShapeScenes("val", 128, count=limit)
    return CocoPictures(images, annotations, masks, limit=limit)


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

    An image token on an object reads from global tokens: how much of that, and how often most of it, comes from places
    on the same object? Chance is what reading everywhere alike would give. Give several checkpoints to compare them,
    for example of position-aware and of normal global tokens.

    Args:
        checkpoints: best.safetensors of classification runs of DualToken-ViTs.
        images: Folder of pictures with labelled objects; without one, scenes of shapes are drawn, with masks.
        annotations: COCO json of these pictures.
        masks: The objects are their masks, not their boxes.
        image_size: Short side of the pictures that the network sees, in pixels; by default as in training.
        limit: Only the first so many pictures.
        device: auto, or any of torch's: cpu, cuda, mps.
        plot: PNG to draw the figures against the blocks in.
        json: Print one JSON object and nothing else.
        markdown: Print the table as Markdown.

    Raises:
        InputError: for another kind of checkpoint, or pictures that cannot be used.
    """
    scores: list[Score] = []
    for checkpoint in checkpoints:
        model, loaded = load_model(checkpoint)
        if loaded.task != "classification":
            raise InputError(f"{checkpoint} is of {loaded.task}; give the best.safetensors of a classification run")
        blocks_of(model)
        preprocessing = loaded.preprocessing
        channels, size, _ = preprocessing["input_size"]
        pictures = _pictures(images, annotations, masks, limit)
        pictures.channels = channels
        pictures.transform = v2.Compose(
            [
                v2.Resize(image_size or size, antialias=True),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(preprocessing["mean"], preprocessing["std"]),
            ]
        )
        name = str(checkpoint.parent) if checkpoint.name == "best.safetensors" else str(checkpoint)
        scores += measure(model.to(pick_device(device)).eval(), pictures, name)
    if plot is not None:
        save_figure(draw(scores), plot, dpi=150)
    if json:
        print(dumps({"objects": scores[0].objects, "scores": [asdict(s) | {"lift": s.lift} for s in scores]}))
        return
    columns = ("<network", "<block", "on object %", "+-", "chance %", "lift", "highest %", "own place %", "chance %")
    groups: dict[str, list[tuple[str, ...]]] = {}
    for s in scores:
        percents = (s.on_object, s.error, s.chance)
        rest = (s.highest, s.own, s.own_chance)
        cells = (s.checkpoint, s.block, *(f"{100 * share:.1f}" for share in percents), f"{s.lift:.2f}")
        groups.setdefault(s.checkpoint, []).append((*cells, *(f"{100 * share:.1f}" for share in rest)))
    print_table(columns, groups.values(), markdown)
    print(
        f"{scores[0].objects} objects. on object: share of the attention of an object's tokens that lies on it; +-: "
        "standard error of the\ndistance from chance; lift: the share over chance; highest: how often the place read "
        "most from lies on it;\nown place: how often that is the token's own."
    )
