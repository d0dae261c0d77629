"""How well attention maps localise objects: a measurement of the paper's claim about position-aware global tokens.

An image token on a labelled object attends to global tokens. If these carry positions, it should attend to information
from the same object; chance is the result of uniform attention. All maps are converted to the positions of X_ga, the
grid of global aggregation: position-aware tokens are a resized X_ga, normal tokens are mixtures of its positions (see
`attention.recording`). Both types are therefore evaluated on the same grid.
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

from dualtoken_vit.data.detection import DetectionDataset, draw_scenes, read_coco
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.layers import resize_grid
from dualtoken_vit.models.two_stream import STRIDE
from dualtoken_vit.paper.attention import blocks_of, load_classifier, recording
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.plots import save_figure

__all__ = ["Place", "localise", "measure", "places_of"]


@dataclass(frozen=True)
class Place:
    """The attention of the tokens on one object in one block; all values are between 0 and 1."""

    on_object: float
    """Share of their attention on the object."""
    chance: float
    """Share of the positions that the object covers, which is `on_object` of uniform attention."""
    highest: float
    """Mean coverage by the object of the position with the highest attention."""
    own: float
    """Share of the tokens for which no other position is closer than that of the highest attention."""


@dataclass(frozen=True)
class Score:
    """The `Place`s of a block: means over the objects of an image, then over the images."""

    checkpoint: str
    block: str
    images: int
    objects: int
    on_object: float
    error: float
    """Standard error of `on_object` minus `chance` over the images."""
    chance: float
    highest: float
    own: float
    own_chance: float
    """`own` of uniform attention: one divided by the number of positions, mean over the images."""

    @property
    def lift(self) -> float:
        """Attention on the object relative to chance."""
        return self.on_object / self.chance


def cells(x: Tensor, stride: int) -> Tensor:
    """Mean of x (C, Y, X) over cells of `stride` pixels. As in the network, the last cells may be partial."""
    return F.avg_pool2d(x[None], stride, ceil_mode=True, count_include_pad=False)[0]


def gathered(attended: Tensor, grid: tuple[int, int]) -> Tensor:
    """Convert a map over global tokens (H, W, h, w) to a map over the positions of X_ga that they were resized from.

    The attention to a token is distributed over these positions by their interpolation weights.

    Args:
        attended: attention of each image token to each global token
        grid: rows and columns of X_ga
    """
    if attended.shape[2:] == grid:
        return attended
    places = torch.eye(math.prod(grid), dtype=attended.dtype).unflatten(1, grid)[
        ..., None
    ]  # (places, rows, columns, 1)
    shares = resize_grid(places, attended.shape[2])[..., 0]  # (places, h, w); the grid of global tokens is square
    return torch.einsum("abhw,phw->abp", attended, shares).unflatten(2, grid)


def places_of(attended: Tensor, cover: Tensor) -> Place:
    """Evaluate the map of an image for one object.

    The tokens on an object are those whose cell it covers by at least half; for a small object, the cell that it covers
    most.

    Args:
        attended: (H, W, h, w), attention of each image token to each global token; sums to 1 per image token
        cover: (Y, X), mask of the object in the input of the network
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
    """Masks of the objects (N, Y, X), or their filled boxes."""
    if "masks" in target:
        return target["masks"].float()
    height, width = target["boxes"].canvas_size
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    left, top, right, bottom = (side[:, None, None] for side in target["boxes"].T)
    return ((x >= left) & (x < right) & (y[:, None] >= top) & (y[:, None] < bottom)).float()


@torch.inference_mode()
def measure(model: nn.Module, images: DetectionDataset, name: str = "") -> list[Score]:
    """Evaluate the maps of every block for every object; objects without a pixel in the input are skipped.

    Args:
        model: a DualToken-ViT in evaluation mode
        images: dataset whose `transform` returns the input of the network
        name: name of the network in the scores

    Raises:
        InputError: for another network, or a dataset without objects.
    """
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {block: [] for block in blocks_of(model)}  # (objects, 4) per image
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
        raise InputError(f"{images.name}: no objects, which are needed to evaluate attention")
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
    """Lift on the objects, and how often the attention of a token is highest at its own position, by block."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(score.checkpoint for score in scores):
        rows = [score for score in scores if score.checkpoint == name]
        errors = [score.error / score.chance for score in rows]
        left.errorbar(range(len(rows)), [score.lift for score in rows], errors, fmt=".-", capsize=2, label=name)
        (line,) = right.plot([100 * score.own for score in rows], ".-", label=name)
        right.plot([100 * score.own_chance for score in rows], ":", color=line.get_color())
    left.axhline(1, color="grey", linestyle=":")
    left.set(ylabel="attention on object / chance")
    right.set(ylabel="highest attention at own position (%)")
    for axes in (left, right):
        axes.set_xlabel("block (dotted: chance)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    return figure


def _dataset(images: Path | None, annotations: Path | None, masks: bool, limit: int | None) -> DetectionDataset:
    if (images is None) != (annotations is None):
        raise InputError("--images DIR and --annotations FILE go together; without both, shapes are drawn")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: must be at least 1")
    if images is None or annotations is None:
        return DetectionDataset(draw_scenes("val", 128, limit), masks=True)
    return DetectionDataset(read_coco(annotations, images), masks, limit=limit)


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
    """Measure how well attention maps localise objects, in every block.

    An image token on an object attends to global tokens: how much of this attention, and how often its maximum, lies on
    the same object? Chance is the result of uniform attention. Give several checkpoints to compare them, for example
    with position-aware and with normal global tokens.

    Args:
        checkpoints: The best.safetensors of classification runs of DualToken-ViTs.
        images: Folder of images with labelled objects; by default, scenes of shapes with masks are drawn.
        annotations: COCO JSON file of these images.
        masks: Use the masks of the objects instead of their boxes. Drawn shapes always use masks.
        image_size: Short side of the input in pixels; by default as in training. Larger inputs resolve more positions,
            because global aggregation has a stride of 32.
        limit: Use only the first LIMIT images.
        device: auto, or any of torch's: cpu, cuda, mps.
        plot: PNG file for a plot of the results by block.
        json: Print one JSON object and nothing else.
        markdown: Print the table as Markdown.

    Raises:
        InputError: for a checkpoint of another task or network, or images that cannot be used.
    """
    if not checkpoints:
        raise InputError("no checkpoint given; give the best.safetensors of one or more runs")
    predictors = {checkpoint: load_classifier(checkpoint, device, image_size) for checkpoint in checkpoints}
    for checkpoint, predictor in predictors.items():
        try:
            blocks_of(predictor.model)
        except InputError as error:
            raise InputError(f"{checkpoint}: {error}") from error
    if len(sizes := {predictor.options.image_size for predictor in predictors.values()}) > 1:
        raise InputError(
            f"the networks differ in input size ({', '.join(map(str, sorted(sizes)))} pixels); give one --image-size"
        )
    dataset = _dataset(images, annotations, masks, limit)
    scores: list[Score] = []
    for checkpoint, predictor in predictors.items():
        dataset.channels = predictor.channels
        dataset.transform = v2.Compose(
            [
                v2.Resize(predictor.options.image_size, antialias=True),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(predictor.preprocessing["mean"], predictor.preprocessing["std"]),
            ]
        )
        name = str(checkpoint.parent) if checkpoint.name == "best.safetensors" else str(checkpoint)
        scores += measure(predictor.model, dataset, name)
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
        "peak on object %",
        "peak at token %",
        "its chance %",
    )
    groups: dict[str, list[tuple[str, ...]]] = {}
    for s in scores:
        lift = [f"{100 * share:.2f}" for share in (s.on_object, s.error, s.chance)]
        place = [f"{100 * share:.1f}" for share in (s.highest, s.own, s.own_chance)]
        groups.setdefault(s.checkpoint, []).append((s.checkpoint, s.block, *lift, f"{s.lift:.2f}", *place))
    print(table_text(columns, groups.values(), markdown))
    print(f"\n{scores[0].objects} objects in {scores[0].images} of {len(dataset)} images; means over the images.")
    print(
        "on object       share of the attention of an object's tokens on the object; +-: standard error of its\n"
        "                difference from chance\n"
        "chance          share of the positions that the object covers; lift: on object / chance\n"
        "peak on object  how often the position with the highest attention lies on the object; compare with chance\n"
        "peak at token   how often no other position is closer to the token than that position"
    )
