"""How well attention maps localise objects: a measurement of the paper's claim about position-aware global tokens.

An image token on a labelled object attends to global tokens. If these carry positions, it should attend to information
from the same object; chance is the result of uniform attention. All maps are converted to the positions of X_ga, the
grid of global aggregation: position-aware tokens are a resized X_ga, normal tokens are mixtures of its positions (see
`attention.recording`). Both types are therefore evaluated on the same grid.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, astuple, dataclass
from functools import partial
from itertools import groupby
from json import dumps
from operator import attrgetter, itemgetter
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import sem
from torch import Tensor, nn
from torchvision.transforms import v2

from dualtoken_vit.data.coco import read_coco
from dualtoken_vit.data.detection import DetectionDataset, draw_scenes
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import counted, kept, printable
from dualtoken_vit.models.layers import resize_grid
from dualtoken_vit.models.two_stream import STRIDE
from dualtoken_vit.paper.attention import blocks_of, load_classifier, recording
from dualtoken_vit.recipes import Device
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.plots import save_figure

SHARES = (
    "on object %",
    "+-",
    "chance %",
    "lift",
    "control %",
    "+-",
    "peak on object %",
    "peak at token %",
    "its chance %",
)
EXPLANATION = """\
on object       share of the attention of an object's tokens on the object; +-: standard error of its
                difference from chance
chance          share of the positions that the object covers; lift: on object / chance
control         on object, with the objects of the image before in place of those of the image: above chance where
                attention prefers the places of objects in all images; +-: standard error of its difference
peak on object  how often the position with the highest attention lies on the object; compare with chance
peak at token   how often no other position is closer to the token than that position"""


@dataclass(frozen=True)
class Place:
    """The attention of the tokens on one object in one block; all values are between 0 and 1."""

    on_object: float  # share of their attention on the object
    chance: float  # share of the positions that the object covers, which is `on_object` of uniform attention
    highest: float  # mean coverage by the object of the position with the highest attention
    own: float  # share of the tokens for which no other position is closer than that of the highest attention


@dataclass(frozen=True)
class Score(Place):
    """The `Place`s of a block: means over the objects of an image, then over the images."""

    checkpoint: str
    block: str
    images: int
    objects: int
    error: float | None  # standard error of `on_object` minus `chance` over the images; None for one image
    own_chance: float  # `own` of uniform attention: one divided by the number of positions, mean over the images
    control: float | None  # `on_object` with the objects of the image before, for all but the first; None for one image
    control_error: float | None  # standard error of `on_object` minus `control`; None below three images

    @property
    def lift(self) -> float:
        """Attention on the object relative to chance."""
        return self.on_object / self.chance


def cells(x: Tensor, stride: int) -> Tensor:
    """Mean of x (C, Y, X) over cells of `stride` pixels. As in the network, the last cells may be partial."""
    return F.avg_pool2d(x[None], stride, ceil_mode=True, count_include_pad=False)[0]


def gathered(attended: Tensor, grid: tuple[int, int], antialias: bool = False) -> Tensor:
    """Convert a map over global tokens (H, W, h, w) to a map over the positions of X_ga that they were resized from.

    The attention to a token is distributed over these positions, rows and columns `grid`, by their interpolation
    weights; `antialias` as in the network's resize.
    """
    if attended.shape[2:] == grid:
        return attended
    places = torch.eye(math.prod(grid), dtype=attended.dtype).reshape(-1, *grid, 1)
    shares = resize_grid(places, attended.shape[2], antialias)[..., 0]  # (positions, h, w); global tokens: h = w
    return torch.einsum("abhw,phw->abp", attended, shares).unflatten(2, grid)


def places_of(attended: Tensor, cover: Tensor) -> Place:
    """Evaluate the map of an image for one object.

    The tokens on an object are those whose cell it covers by at least half; for a small object, the cell that it covers
    most. `attended` (H, W, h, w) is the attention of each image token to each position of X_ga, which sums to 1 for
    each image token, and `cover` (Y, X) the mask of the object in the input of the network.
    """
    cover = cover[None].to(attended.dtype)
    height, width = cover.shape[1:]
    stride = next(s for s in (8, 16, 32) if (math.ceil(height / s), math.ceil(width / s)) == attended.shape[:2])
    tokens, places = cells(cover, stride)[0], cells(cover, STRIDE)[0].flatten()
    on = tokens >= min(0.5, tokens.max().item())
    maps = attended[on].flatten(1)  # (N, h * w)
    best = maps.argmax(1)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    middle = torch.stack((y, x))
    apart = torch.cdist(cells(middle, stride)[:, on].T, cells(middle, STRIDE).flatten(1).T)  # (N, h * w) pixels
    return Place(
        on_object=(maps @ places).mean().item(),
        chance=places.mean().item(),
        highest=places[best].mean().item(),
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
def measure(
    model: nn.Module, images: DetectionDataset, name: str = "", correct: Sequence[str] | None = None
) -> list[Score]:
    """Evaluate the maps of every block for every object; objects without a pixel in the input are skipped.

    `model` is a DualToken-ViT in evaluation mode, called `name` in the scores, and the `transform` of `images` returns
    its input. With `correct`, the names of the classes of `model`, only objects of the predicted class count. An
    InputError for another network, or where no object is left.
    """
    device, blocks = next(model.parameters()).device, blocks_of(model)
    found: dict[str, list[np.ndarray]] = {name: [] for name in blocks}  # a mean `Place` per image
    others: dict[str, list[float]] = {name: [] for name in blocks}  # `on_object` of the control, from the second image
    before: list[Tensor] = []  # the objects of the image before
    positions: list[int] = []  # of X_ga, per image
    objects = 0
    load = in_threads(images.__getitem__, range(len(images)), len(images), name, 16)
    with closing(load) as loaded:  # ends the bar, which a traceback would keep alive
        for x, target in loaded:
            pairs = zip(_covers(target), target["labels"], strict=True)
            covers = [(cover, label) for cover, label in pairs if cover.any()]
            if not covers:
                continue
            grid = (math.ceil(x.shape[1] / STRIDE), math.ceil(x.shape[2] / STRIDE))
            with recording(model) as maps:
                best = int(model(x[None].to(device)).argmax())
            if correct is not None:
                covers = [(cover, label) for cover, label in covers if images.class_names[label] == correct[best]]
                if not covers:
                    continue
            for key, attended in maps.items():
                over_places = gathered(attended[0].float().cpu(), grid, getattr(blocks[key].fusion, "antialias", False))
                found[key].append(np.mean([astuple(places_of(over_places, cover)) for cover, _ in covers], axis=0))
                if before:
                    same_size = [F.interpolate(cover[None, None], x.shape[1:], mode="area")[0, 0] for cover in before]
                    others[key].append(mean(places_of(over_places, cover).on_object for cover in same_size))
            before = [cover for cover, _ in covers]
            positions.append(math.prod(grid))
            objects += len(covers)
    if not objects:
        kind = "no objects" if correct is None else "no objects of the predicted class"
        raise InputError(f"{images.name}: {kind}, which are needed to evaluate attention")
    number, own_chance, scores = len(positions), mean(1 / count for count in positions), []
    for key, places in found.items():
        values = np.stack(places)  # (images, 4)
        score = Score(
            **vars(Place(*values.mean(0).tolist())),
            checkpoint=name,
            block=key,
            images=number,
            objects=objects,
            error=float(sem(values[:, 0] - values[:, 1])) if number > 1 else None,
            own_chance=own_chance,
            control=float(np.mean(others[key])) if number > 1 else None,
            control_error=float(sem(values[1:, 0] - others[key])) if number > 2 else None,
        )
        scores.append(score)
    return scores


def draw(scores: Sequence[Score]) -> Figure:
    """By block: lift on the objects and on those of the control; how often the attention is highest at the token."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = {}
    for name, group in groupby(scores, attrgetter("checkpoint")):
        rows = list(group)
        errors = [(score.error or 0) / score.chance for score in rows]
        line = left.errorbar(range(len(rows)), [score.lift for score in rows], errors, fmt=".-", capsize=2)[0]
        controls = [math.nan if score.control is None else score.control / score.chance for score in rows]
        left.plot(controls, "--", color=line.get_color())
        (lines[name],) = right.plot([100 * score.own for score in rows], ".-")
        right.plot([100 * score.own_chance for score in rows], ":", color=lines[name].get_color())
    left.axhline(1, color="grey", linestyle=":")
    left.set(ylabel="attention on object / chance (dashed: control)")
    right.set(ylabel="highest attention at own position (%)")
    for axes in (left, right):
        axes.set_xlabel("block (dotted: chance)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    right.legend(lines.values(), map(printable, lines), fontsize=8)  # a line's own label may not start with "_"
    return figure


def localise(
    checkpoints: tuple[Path, ...],
    images: Path | None = None,
    annotations: Path | None = None,
    masks: bool = False,
    correct: bool = False,
    image_size: int | None = None,
    limit: int | None = None,
    device: Device = "auto",
    plot: Path | None = None,
    json: bool = False,
    markdown: bool = False,
) -> None:
    """Measure how well attention maps localise objects, in every block.

    An image token on an object attends to global tokens: how much of this attention, and how often its maximum, lies on
    the same object? Chance is the result of uniform attention. Compare with the control, the objects of the image
    before: attention follows the objects only where it is higher than this. Give several checkpoints to compare them,
    for example with position-aware and with normal global tokens.

    Args:
        checkpoints: The best.safetensors of classification runs of DualToken-ViTs, or names of networks whose weights
            come with the package.
        images: Folder of images with labelled objects; by default, scenes of shapes with masks are drawn.
        annotations: COCO JSON file of these images.
        masks: Use the masks of the objects instead of their boxes. Drawn shapes always use masks.
        correct: Use only the objects whose category has the name of the predicted class.
        image_size: Short side of the input in pixels; by default as in training. Larger inputs resolve more positions,
            because global aggregation has a stride of 32.
        limit: Use only the first LIMIT images.
        device: auto: an accelerator if there is one, else the CPU.
        plot: PNG file for a plot of the results by block.
        json: Print one JSON object and nothing else.
        markdown: Print the table as Markdown.

    Raises:
        InputError: for a checkpoint of another task or network, or images that cannot be used.
    """
    if not checkpoints:
        raise InputError("no checkpoint given; give the best.safetensors of one or more runs")
    checkpoints = tuple(map(Path, checkpoints))
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: must be at least 1")
    if images and annotations:
        dataset = DetectionDataset(read_coco(annotations, images), masks, limit=limit)
    elif images or annotations:
        raise InputError("--images DIR and --annotations FILE go together; without both, shapes are drawn")
    else:
        dataset = DetectionDataset(draw_scenes("val", 128, limit), masks=True)
    options = {} if image_size is None else {"image_size": image_size}
    predictors = {checkpoint: load_classifier(checkpoint, device, **options) for checkpoint in checkpoints}
    sizes = sorted({str(predictor.options.image_size) for predictor in predictors.values()})
    if len(sizes) > 1:
        raise InputError(f"the networks differ in input size ({', '.join(sizes)} pixels); give one --image-size")
    scores: list[Score] = []
    finish = partial(_print, scores, len(dataset), json, markdown)
    with kept(finish, scores):
        for checkpoint, predictor in predictors.items():
            resize, scale = v2.Resize(predictor.options.image_size), v2.ToDtype(torch.float32, scale=True)
            normalize = v2.Normalize(predictor.preprocessing["mean"], predictor.preprocessing["std"])
            dataset.channels, dataset.transform = predictor.channels, v2.Compose([resize, scale, normalize])
            name = str(checkpoint.parent) if checkpoint.name == "best.safetensors" else str(checkpoint)
            scores += measure(predictor.model, dataset, name, predictor.class_names if correct else None)
    finish()
    if plot is not None:
        save_figure(partial(draw, scores), plot, dpi=150)


def _print(scores: Sequence[Score], images: int, json: bool, markdown: bool) -> None:
    if json:
        print(dumps({"scores": [asdict(score) | {"lift": score.lift} for score in scores]}))
        return
    rows = []
    for s in scores:
        shares = (s.on_object, s.error, s.chance, s.control, s.control_error)
        lift = ["" if share is None else f"{100 * share:.2f}" for share in shares]
        place = [f"{100 * share:.1f}" for share in (s.highest, s.own, s.own_chance)]
        rows.append((s.checkpoint, s.block, *lift[:3], f"{s.lift:.2f}", *lift[3:], *place))
    groups = [list(group) for _, group in groupby(rows, itemgetter(0))]
    print(table_text(("<network", "<block", *SHARES), groups, markdown))
    print("\nMeans over the images with an object that counts:")
    for name, score in {s.checkpoint: s for s in scores}.items():  # with `correct` the networks differ
        print(f"{name}: {counted(score.objects, 'object')} in {score.images} of {counted(images, 'image')}")
    print(f"\n{EXPLANATION}")
