"""The paper's Tables 2 to 9 beside this implementation: sizes are counted, accuracies are read from results.

Only the published figures are stored (`PUBLISHED`).
"""

import json as jsonlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import dualtoken_vit  # noqa: F401  registers the models
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.detectors import DETECTORS, create_detector
from dualtoken_vit.models.segmenters import SEGMENTERS, create_segmenter
from dualtoken_vit.paper.counting import Counts, count
from dualtoken_vit.recipes import RECIPES, Detection, Model, Segmentation, model_kwargs
from dualtoken_vit.show.console import table_text

__all__ = ["PUBLISHED", "Published", "Row", "compare", "read_studies", "tables"]


@dataclass(frozen=True)
class Published:
    """One row of the paper's tables."""

    table: str
    network: str
    key: str
    """How to build it here: a recipe, a timm name, or KIND:NAME for a detector or segmenter; "" if unavailable."""
    params: str
    """In millions."""
    flops: str
    """In billions."""
    score: str
    """Top-1 on ImageNet-1k, box AP (/ mask AP) on COCO, or mIoU on ADE20K, in percent."""


# fmt: off
_PRINTED: dict[str, tuple[tuple[str, str, str, str, str], ...]] = {
    "Table 2": (
        ("MobileNetV2 (1.4)", "mobilenetv2_140", "6.9", "0.6", "74.7"),
        ("MobileViTv1-XXS", "mobilevit_xxs", "1.3", "0.4", "69.0"),
        ("MobileViTv2-0.5", "mobilevitv2_050", "1.4", "0.5", "70.2"),
        ("PVTv2-B0", "pvt_v2_b0", "3.4", "0.6", "70.5"),
        ("EdgeViT-XXS", "", "4.1", "0.6", "74.4"),
        ("DualToken-ViT-T (mix)", "in1k-tiny-mix", "5.8", "0.5", "75.4"),
        ("RegNetY-800M", "regnety_008", "6.3", "0.8", "76.3"),
        ("DeiT-Ti", "deit_tiny_patch16_224", "5.7", "1.3", "72.2"),
        ("T2T-ViT-7", "", "4.3", "1.1", "71.7"),
        ("SimViT-Micro", "", "3.3", "0.7", "71.1"),
        ("MobileViTv1-XS", "mobilevit_xs", "2.3", "1.0", "74.8"),
        ("TNT-Ti", "", "6.1", "1.4", "73.9"),
        ("LVT", "", "5.5", "0.9", "74.8"),
        ("EdgeViT-XS", "", "6.7", "1.1", "77.5"),
        ("XCiT-T12", "xcit_tiny_12_p16_224", "6.7", "1.3", "77.1"),
        ("LightViT-T", "lightvit_tiny", "9.4", "0.7", "78.7"),
        ("DualToken-ViT-S (mix)", "in1k-small-mix", "11.4", "1.0", "79.4"),
        ("DualToken-ViT-S", "in1k-small", "11.9", "1.1", "79.5"),
    ),
    "Table 3": (  # 1x, then 3x with several sizes
        ("ResNet-18", "mask-rcnn:resnet18", "31", "207", "34.0/31.2, 36.9/33.6"),
        ("ResNet-50", "mask-rcnn:resnet50", "44", "260", "38.0/34.4, 41.0/37.1"),
        ("ResNet-101", "mask-rcnn:resnet101", "101", "493", "40.4/36.4, 42.8/38.5"),
        ("PVTv1-T", "", "33", "208", "36.7/35.1, 39.8/37.4"),
        ("PVTv1-S", "", "44", "245", "40.4/37.8, 43.0/39.9"),
        ("PVTv2-B0", "mask-rcnn:pvt_v2_b0", "24", "196", "38.2/36.2"),
        ("LightViT-T", "mask-rcnn:lightvit_tiny", "28", "187", "37.8/35.9, 41.5/38.4"),
        ("DualToken-ViT-S (mix)", "coco-mask-rcnn-1x", "30", "191", "41.1/38.1, 43.7/39.9"),
    ),
    "Table 4": (
        ("ResNet-18", "retinanet:resnet18", "21.3", "181", "31.8"),
        ("ResNet-50", "retinanet:resnet50", "37.7", "239", "36.3"),
        ("PVTv1-T", "", "23.0", "221", "36.7"),
        ("PVTv2-B0", "retinanet:pvt_v2_b0", "13.0", "178", "37.2"),
        ("ConT-M", "", "27.0", "217", "37.9"),
        ("MF-508M", "", "17.9", "168", "38.0"),
        ("DualToken-ViT-S", "coco-retinanet-1x", "20.0", "170", "40.3"),
    ),
    "Table 5": (  # DeepLabv3, then PSPNet
        ("MobileNetV2", "deeplabv3:mobilenetv2_100", "18.7", "75.4", "34.1"),
        ("MobileViTv2-1.0", "deeplabv3:mobilevitv2_100", "13.4", "56.4", "37.0"),
        ("DualToken-ViT-S", "ade20k-deeplabv3", "26.3", "68.4", "39.0"),
        ("MobileNetV2", "pspnet:mobilenetv2_100", "13.7", "53.1", "29.7"),
        ("MobileViTv2-1.0", "pspnet:mobilevitv2_100", "9.4", "40.3", "36.5"),
        ("DualToken-ViT-S", "ade20k-pspnet", "21.7", "58.3", "38.8"),
    ),
    "Table 6": (
        ("normal global tokens", "table6-normal", "13.0", "0.99", "79.2"),
        ("normal* global tokens", "table6-normal-star", "13.4", "0.98", "79.0"),
        ("position-aware global tokens", "table6-position", "11.9", "1.05", "79.5"),
    ),
    "Table 7": (
        ("no global tokens", "table7-grid-0", "10.8", "0.99", "79.2"),
        ("3x3 global tokens", "table7-grid-3", "11.9", "0.93", "79.1"),
        ("4x4 global tokens", "table7-grid-4", "11.9", "0.95", "79.2"),
        ("5x5 global tokens", "table7-grid-5", "11.9", "0.98", "79.4"),
        ("6x6 global tokens", "table7-grid-6", "11.9", "1.01", "79.3"),
        ("7x7 global tokens", "table7-grid-7", "11.9", "1.05", "79.5"),
        ("8x8 global tokens", "table7-grid-8", "11.9", "1.10", "79.3"),
    ),
    "Table 8": (
        ("window self-attention", "table8-window", "10.8", "0.92", "78.6"),
        ("Conv Encoder", "table8-conv", "11.4", "1.04", "79.4"),
    ),
    "Table 9": (
        ("one-step downsampling", "table9-onestep", "11.3", "1.01", "79.2"),
        ("step-wise downsampling", "table9-stepwise", "11.4", "1.04", "79.4"),
    ),
}
# fmt: on
PUBLISHED = [Published(table, *row) for table, rows in _PRINTED.items() for row in rows]

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
    counts: Counts | None
    """None if neither timm nor this project has the network."""
    flops: int | None
    """By the rule of the row's table."""
    measured: str
    """Top-1 by this project in percent, mean over seeds, and the numbers of the studies."""


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
    """Read the study-*.json files that `study` wrote below a folder, sorted by path.

    Raises:
        InputError: for a damaged file.
    """
    studies = []
    for path in sorted(folder.glob("**/study-*.json")):
        try:
            found = jsonlib.loads(path.read_text(encoding="utf-8"))
            study = {"file": str(path), "table": found["table"], "networks": []}
            study |= {key: found["budget"][key] for key in ("text", "base")}
            for one in found["networks"]:
                model = Model(one["model"]["name"], tuple(one["model"]["args"]))
                study["networks"].append({"key": one["key"], "model": model, "mean": float(one["mean"])})
            studies.append(study)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a result of `study` ({error!r}); repair or remove it") from error
    return studies


def _measured(row: Published, studies: Sequence[dict[str, Any]]) -> str:
    """Measured accuracies of a classifier; in an ablation also those of a smaller model in its place."""
    if not row.key or row.table in DENSE:
        return ""
    found: dict[str, list[str]] = {}  # accuracy -> numbers of the studies, which may share runs
    for number, study in enumerate(studies, start=1):
        for network in study["networks"]:
            top1 = f"{100 * network['mean']:.1f}"
            if network["model"] == bare(model_of(row.key)):
                found.setdefault(top1, []).append(str(number))
            elif network["key"] == row.key and row.table == study["table"] != "Table 2":
                found.setdefault(f"{study['base'][0].upper()} {top1}", []).append(str(number))
    return "; ".join(f"{top1} ({', '.join(numbers)})" for top1, numbers in found.items())


def compare(studies: Sequence[dict[str, Any]] = ()) -> list[Row]:
    """The rows of the paper's tables with the counts of every network and the accuracies from `read_studies`."""
    rows = []
    for row in PUBLISHED:
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


def tables(*, json: bool = False, markdown: bool = False, results: Path | None = None) -> None:
    """Print the paper's Tables 2 to 9 beside this implementation: parameters, FLOPs and accuracies.

    Parameters and FLOPs are counted. Accuracies are the paper's and those measured by `study`.

    Args:
        json: print one JSON object.
        markdown: print the table as Markdown.
        results: folder with the study-*.json files of `study`; by default `results`, if it exists.

    Raises:
        InputError: for a missing folder or a damaged file in it.
    """
    if results is not None and not results.is_dir():
        raise InputError(f"--results {results}: no such folder")
    studies = read_studies(results or Path("results"))
    rows = compare(studies)
    if json:
        printed = [asdict(row) for row in rows]
        found = [{key: study[key] for key in ("file", "table", "text", "base")} for study in studies]
        print(jsonlib.dumps({"what_is_counted": WHAT_IS_COUNTED, "rows": printed, "studies": found}, indent=2))
        return
    print(f"```\n{WHAT_IS_COUNTED}```\n" if markdown else WHAT_IS_COUNTED)
    groups = (map(_cells, group) for _, group in groupby(rows, key=lambda row: row.published.table))
    columns = ("<table", "<recipe or model", "<network", "params M", "paper", "diff %", "FLOPs G", "paper", "diff %")
    print(table_text((*columns, "MACs G", "published", "<measured"), groups, markdown))
    for number, study in enumerate(studies, start=1):
        print(f"{'- ' if markdown else ''}({number}) {study['text']}: {study['file']}")
