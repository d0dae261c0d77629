"""The paper's Tables 2 to 9 beside this implementation: sizes are counted, accuracies are read from results.

Only the published figures are stored, in published.csv.
"""

import csv
import json as jsonlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from dualtoken_vit.data.threads import track
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.detectors import DETECTORS, create_detector
from dualtoken_vit.models.segmenters import SEGMENTERS, create_segmenter
from dualtoken_vit.paper.counting import Counts, count
from dualtoken_vit.paper.modern import WHAT_IS_LISTED, modern_table
from dualtoken_vit.recipes import RECIPES, Detection, Model, Segmentation, model_kwargs
from dualtoken_vit.show.console import table_text


@dataclass(frozen=True)
class Published:
    """One row of the paper's tables."""

    table: str
    network: str
    key: str  # how to build it here: a recipe, a timm name, or KIND:NAME of a detector or segmenter; "": unavailable
    params: str  # in millions
    flops: str  # in billions
    score: str  # Top-1 on ImageNet-1k, box AP (/ mask AP) on COCO, or mIoU on ADE20K, in percent


_ROWS = files(__package__).joinpath("published.csv").read_text(encoding="utf-8").splitlines()
PUBLISHED = [Published(**row) for row in csv.DictReader(_ROWS)]
"""In the paper's order. Table 3 has the scores of schedules 1x and 3x; Table 5 DeepLabv3, then PSPNet."""

DENSE = ("Table 3", "Table 4", "Table 5")  # detectors and segmenters
OUTPUT_STRIDES = {"mobilenetv2_100": 8}  # dilated backbones of Table 5

WHAT_IS_COUNTED = """\
Parameters and FLOPs are counted in this run; "paper" is the published figure.
MACs   multiply-accumulates of convolutions, linear layers and attention products (Q K^T, and its product with V).
FLOPs  as the paper counts them: one MAC is one FLOP, plus, by fvcore's rules, 5 per element of a LayerNorm,
       2 of a BatchNorm and 4 of a bilinear resize. Activations, softmax, pooling and additions are not counted.
       Classification (Tables 2, 6 to 9): one image of 224x224 pixels, 1000 classes. For other networks Table 2 quotes
       their own papers, which count differently (LightViT's 0.7 excludes attention products).
       Detection (3, Mask R-CNN; 4, RetinaNet): 1280x800 pixels, 80 classes, 1,000 proposals, 100 detections, without
       attention products, as in the paper for DualToken-ViT. The paper's PVTv2-B0 includes them: compare with MACs.
       Segmentation (5, DeepLabv3 and PSPNet): 512x512, 150 classes, without attention products. MobileNetV2 is dilated
       to output stride 8, which the paper's FLOPs imply; the other backbones keep stride 32.
=      rounds to the published figure.
published  by the paper, in percent: top-1 on ImageNet-1k; box/mask AP on COCO, 1x and 3x; mIoU on ADE20K.
measured   top-1 by this project, mean over seeds; the numbers in parentheses refer to the studies below the table.
       "T": DualToken-ViT-T in place of S.
"""


@dataclass(frozen=True)
class Row:
    """One network: published, counted and measured."""

    published: Published
    counts: Counts | None  # None if neither timm nor this project has the network
    flops: int | None  # by the rule of the row's table
    measured: str  # Top-1 by this project in percent, mean over seeds, and the numbers of the studies


def bare(model: Model) -> Model:
    """Name and arguments of the network, without drop rates and initial weights, which do not affect counts."""
    return Model(name=model.name, args=model.args)


def model_of(key: str) -> Model:
    """The network of a row's key: a recipe's, or a timm model."""
    return RECIPES[key].model if key in RECIPES else Model(name=key)


def _heads(detector: Any, x: Tensor) -> None:
    """Run all parts of a detector on an image with exactly 1000 proposals and 100 detections."""
    maps = list(detector.backbone(x).values())
    if hasattr(detector, "head"):  # RetinaNet
        detector.head(maps)
        return
    detector.rpn.head(maps)
    regions = detector.roi_heads
    regions.box_predictor(regions.box_head(x.new_empty(1000, 256, 7, 7)))
    regions.mask_predictor(regions.mask_head(x.new_empty(100, 256, 14, 14)))


@cache  # some networks are in several tables
def _count(kind: str, model: Model) -> Counts:
    """Count a network, or the detector or segmenter `kind` over it."""
    kwargs = model_kwargs(model)
    with torch.device("meta"):
        if kind in DETECTORS:
            return count(create_detector(kind, model.name, 80, **kwargs), (3, 800, 1280), _heads)
        if kind in SEGMENTERS:
            kwargs["output_stride"] = OUTPUT_STRIDES.get(model.name)
            return count(create_segmenter(kind, model.name, 150, **kwargs), (3, 512, 512))
        return count(timm.create_model(model.name, **kwargs))


def _counts(key: str) -> Counts | None:
    """Count the network of a row's key, if available."""
    if not key:
        return None
    kind, _, name = key.rpartition(":")
    recipe = RECIPES.get(key)
    if isinstance(recipe, Detection):
        kind = recipe.detector
    elif isinstance(recipe, Segmentation):
        kind = recipe.segmenter
    return _count(kind, bare(model_of(name)))


def read_studies(folder: Path) -> list[dict[str, Any]]:
    """The study-*.json files that `study` wrote below a folder, sorted by path; an InputError for a damaged one."""
    studies = []
    for path in sorted(folder.glob("**/study-*.json")):
        try:
            found = jsonlib.loads(path.read_text(encoding="utf-8"))
            study = {"file": str(path), "table": found["table"], "networks": []}
            study |= {key: found["budget"][key] for key in ("text", "base")}
            for one in found["networks"]:
                model = Model(one["model"]["name"], tuple(one["model"]["args"]))
                study["networks"].append({"model": model, "mean": float(one["mean"])})
            studies.append(study)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: not a result of `study` ({error!r}); repair or remove it") from error
    return studies


def _networks(row: Published) -> dict[Model, str]:
    """The classifier of a row, and in an ablation the same of T, which is smaller; what their accuracies begin with.

    Table 2 has rows of its own for T.
    """
    if not row.key or row.table in DENSE:
        return {}
    model = bare(model_of(row.key))
    tiny = replace(model, name=model.name.replace("_small", "_tiny"))
    return ({} if row.table == "Table 2" else {tiny: "T "}) | {model: ""}


def _measured(row: Published, studies: Sequence[dict[str, Any]]) -> str:
    """Measured accuracies of a classifier; in an ablation also those of a smaller model in its place."""
    networks = _networks(row)
    found: dict[str, list[str]] = {}  # accuracy -> numbers of the studies, which may share runs
    for number, study in enumerate(studies, start=1):
        for network in study["networks"]:
            if network["model"] in networks:
                found.setdefault(f"{networks[network['model']]}{100 * network['mean']:.1f}", []).append(str(number))
    return "; ".join(f"{top1} ({', '.join(numbers)})" for top1, numbers in found.items())


def _published(only: Sequence[int] = ()) -> list[Published]:
    """The rows of the paper's tables, or of those with these numbers; an InputError for one that the paper has not."""
    known = [int(row.table.removeprefix("Table ")) for row in PUBLISHED]
    if unknown := [number for number in only if number not in known]:
        raise InputError(f"--only {unknown[0]}: give numbers of the paper's tables, {min(known)} to {max(known)}")
    return [row for row, number in zip(PUBLISHED, known, strict=True) if not only or number in only]


def compare(studies: Sequence[dict[str, Any]] = (), published: Sequence[Published] = PUBLISHED) -> list[Row]:
    """Rows of the paper's tables with the counts of every network and the accuracies from `read_studies`."""
    rows = []
    for row in track(published, len(published), "counting"):
        counts = _counts(row.key)
        flops = None if counts is None else counts.flops - (row.table in DENSE) * counts.attention
        rows.append(Row(row, counts, flops, _measured(row, studies)))
    return rows


def difference(found: float, printed: str) -> str:
    """Difference from the published figure in percent, followed by = if `found` rounds to that figure."""
    digits = len(printed.partition(".")[2])
    same = f"{found:.{digits}f}" == printed
    percent = round(100 * (found / float(printed) - 1), 1) + 0.0  # adding 0 turns -0.0 into 0.0
    return f"{percent:+.1f} {'=' if same else ' '}"


def _cells(row: Row) -> tuple[str, ...]:
    it = row.published
    if row.counts is None or row.flops is None:
        return (it.table, "", it.network, "", it.params, "", "", it.flops, "", "", it.score, "")
    params, flops, macs = row.counts.params / 1e6, row.flops / 1e9, row.counts.macs / 1e9
    digits = 3 if flops < 10 else 1
    params_cells = (f"{params:.3f}", it.params, difference(params, it.params))
    flops_cells = (f"{flops:.{digits}f}", it.flops, difference(flops, it.flops), f"{macs:.{digits}f}")
    return (it.table, it.key, it.network, *params_cells, *flops_cells, it.score, row.measured)


def tables(
    *,
    only: tuple[int, ...] = (),
    json: bool = False,
    markdown: bool = False,
    modern: bool = False,
    results: Path | None = None,
) -> None:
    """Print the paper's Tables 2 to 9 beside this implementation: parameters, FLOPs and accuracies.

    Parameters and FLOPs are counted. Accuracies are the paper's and those measured by `study`.

    Args:
        only: numbers of the paper's tables; none: all.
        json: print one JSON object.
        markdown: print the table as Markdown.
        modern: print the networks of similar cost that the paper does not compare with, half of them newer.
        results: folder with the study-*.json files of `study`; by default `results`, if it exists.

    Raises:
        InputError: for a missing folder, a damaged file in it, or a table that the paper does not have.
    """
    if results is not None and not results.is_dir():
        raise InputError(f"--results {results}: no such folder")
    if modern:
        if json or results or only:
            raise InputError("--modern: has no --json, --results or --only; leave them out")
        print(WHAT_IS_LISTED)
        print(modern_table(markdown))
        return
    folder = results or Path("results")
    shown, studies, missing = _published(only), read_studies(folder), "study-*.json"
    if only and studies:
        networks = {model for row in shown for model in _networks(row)}
        studies = [study for study in studies if any(each["model"] in networks for each in study["networks"])]
        missing = "study of these networks"
    rows = compare(studies, shown)
    if json:
        printed = [asdict(row) for row in rows]
        found = [{key: study[key] for key in ("file", "table", "text", "base")} for study in studies]
        print(jsonlib.dumps({"what_is_counted": WHAT_IS_COUNTED, "rows": printed, "studies": found}, indent=2))
        return
    print(f"```\n{WHAT_IS_COUNTED}```\n" if markdown else WHAT_IS_COUNTED)
    width = 12 if studies else 11  # without the measured accuracies
    tables_of_paper = groupby(rows, key=lambda row: row.published.table)
    groups = ([_cells(row)[:width] for row in group] for _, group in tables_of_paper)
    columns = ["<table", "<recipe or model", "<network", "params M", "paper", "diff %", "FLOPs G", "paper", "diff %"]
    columns += ["MACs G", "published"] + ["<measured"] * bool(studies)
    print(table_text(columns, groups, markdown))
    if not studies:
        print(f"no measured accuracies: {folder} has no {missing}; --results names another folder")
    for number, study in enumerate(studies, start=1):
        print(f"{'- ' if markdown else ''}({number}) {study['text']}: {study['file']}")
