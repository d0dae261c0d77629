"""Tiled detection, with a detector that finds bright rectangles exactly: the connected components of scipy."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from tiny_graphs import detector, noise, raw_plan
from torch import nn
from torchvision.ops import nms

from dualtoken_vit.deploy import graphs
from dualtoken_vit.runtime.boxes import suppress
from dualtoken_vit.runtime.detection import AnySizeDetector, Detector
from dualtoken_vit.runtime.tiles import detect_in_tiles, starts
from dualtoken_vit.tasks.detection import DetectionOptions, DetectionPredictor


class Components(nn.Module):
    """Boxes, masks and labels (0 or 1, by colour) of bright components; the score is their share of 10,000 pixels."""

    def __init__(self, masks=False):
        super().__init__()
        self.transform, self.masks, self.shapes = nn.Identity(), masks, []
        self.batches, self.heads = [], ()

    def forward(self, images):
        return [{key: torch.from_numpy(value) for key, value in each.items()} for each in self.arrays(images)]

    def arrays(self, images):
        self.batches.append(len(images))
        return [self.detect(image) for image in images]

    def detect(self, image):
        self.shapes.append(tuple(image.shape[1:]))
        parts, _ = ndimage.label(image.sum(0).numpy() > 0)
        found = {"boxes": [], "labels": [], "scores": [], "masks": []}
        for index, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
            found["boxes"].append([columns.start, rows.start, columns.stop, rows.stop])
            found["labels"].append(int(image[1, rows.start, columns.start] > 0))
            found["scores"].append((parts == index).sum() / 10_000)
            found["masks"].append(parts == index)
        size = image.shape[1:]
        shapes = {"boxes": (-1, 4), "masks": (-1, 1, *size)}
        arrays = {key: np.array(value, np.int64 if key == "labels" else np.float32) for key, value in found.items()}
        arrays = {key: value.reshape(shapes.get(key, (-1,))) for key, value in arrays.items()}
        return {
            key: value.astype(bool) if key == "masks" else value
            for key, value in arrays.items()
            if self.masks or key != "masks"
        }


def scattered(height, width, count=40, largest=20, seed=0):
    """An image with separate rectangles of two colours."""
    generator, image, taken = (
        np.random.default_rng(seed),
        np.zeros((3, height, width), np.float32),
        np.zeros((height, width), bool),
    )
    for _ in range(count):
        h, w = generator.integers(2, largest + 1, 2)
        top, left = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
        place = slice(top, top + h), slice(left, left + w)
        if not taken[max(top - 1, 0) : top + h + 1, max(left - 1, 0) : left + w + 1].any():
            taken[place] = True
            image[int(generator.integers(2))][place] = 1
    return torch.from_numpy(image)


def as_set(found):
    masks = (
        [np.flatnonzero(mask).tolist() for mask in found["masks"]] if "masks" in found else [()] * len(found["labels"])
    )
    rows = zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), masks, strict=True)
    return sorted((*box, label, score, tuple(mask)) for box, label, score, mask in rows)


def test_starts():
    assert starts(100, 40, 10) == [0, 30, 60]
    assert starts(105, 40, 10) == [0, 30, 60, 65]
    assert starts(40, 40, 10) == starts(3, 40, 10) == [0]
    for length, side, overlap in ((1000, 64, 12), (333, 50, 0), (127, 64, 63)):
        found = starts(length, side, overlap)
        covered = np.zeros(length, int)
        for start in found:
            covered[start : start + side] += 1
        assert covered.min() >= 1
        assert found[-1] + side == length
        assert all(b - a <= side - overlap for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("height", "width"), [(200, 310), (64, 64), (50, 400), (133, 127)])
def test_objects_smaller_than_the_overlap_are_found_as_in_the_whole_image(height, width, masks):
    image = scattered(height, width)
    whole = Components(masks).detect(image)
    model = Components(masks)
    found = detect_in_tiles(model.arrays, image, 64, 0.35, batch_size=4)  # 22 pixels
    assert as_set(found) == as_set(whole)
    assert len(found["labels"]) > 3
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
    assert set(model.shapes) == {(min(height, 64), min(width, 64))}
    assert max(model.batches) <= 4


@pytest.mark.parametrize("width", range(16, 21))
def test_an_object_at_the_edges_of_two_tiles_is_found_once(width):
    """Tiles at 0 and 80 of 100 pixels, which share 20."""
    for left in range(78, 103 - width):
        image = torch.zeros(3, 40, 180)
        image[0, 10:20, left : left + width] = 1
        found = detect_in_tiles(Components().arrays, image, 100, 0.2, 4)
        assert found["boxes"].tolist() == [[left, 10, left + width, 20]]


def test_a_tile_larger_than_the_image_changes_nothing():
    """Not even among boxes that overlap more than those of two tiles may: detectors have thresholds of their own."""
    boxes, scores = np.float32([[0, 0, 10, 10], [0, 0, 10, 17]]), np.float32([0.5, 0.9])  # IoU 0.59

    def detect(tiles):
        return [{"boxes": boxes, "labels": np.zeros(2, int), "scores": scores}]

    found = detect_in_tiles(detect, torch.zeros(3, 40, 60), 64, 0.2)
    assert (found["boxes"].tolist(), found["scores"].tolist()) == (boxes[::-1].tolist(), scores[::-1].tolist())


def test_without_overlap_objects_are_cut():
    image = torch.zeros(3, 40, 80)
    image[0, 10:20, 30:50] = 1
    assert len(detect_in_tiles(Components().arrays, image, 40, 0.0, 4)["labels"]) == 2
    image[0, 10:20, 42:50] = 0  # 10 pixels in one tile, 2 in the other
    found = detect_in_tiles(Components().arrays, image, 48, 0.25, 4)
    assert found["boxes"].tolist() == [[30, 10, 42, 20]]


@pytest.mark.parametrize(("shift", "count"), [(2, 1), (5, 2)])
def test_boxes_of_two_tiles_are_one_object_above_an_iou_of_a_half(shift, count):
    """A box of 10 pixels and the same box `shift` pixels to the right have an IoU of 2 / 3 and of 1 / 3."""

    def detect(tiles):
        boxes = [np.float32([[30, 10, 40, 20]]), np.float32([[6 + shift, 10, 16 + shift, 20]])]  # tiles at 0 and 24
        return [{"boxes": box, "labels": np.array([0]), "scores": np.float32([0.9])} for box in boxes]

    assert len(detect_in_tiles(detect, torch.zeros(3, 48, 72), 48, 0.5, 2)["labels"]) == count


def test_an_object_as_large_as_a_tile_is_kept():
    image = torch.zeros(3, 64, 200)
    image[1, 10:60, 5:195] = 1
    found = detect_in_tiles(Components().arrays, image, 64, 0.25, 4)
    assert found["boxes"][:, 0].min() == 5
    assert found["boxes"][:, 2].max() == 195


def test_nothing_found():
    found = detect_in_tiles(Components(masks=True).arrays, torch.zeros(3, 100, 100), 64, 0.2, 4)
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
        "masks": (0, 1, 100, 100),
    }


def test_the_predictor_takes_tiles():
    image = scattered(150, 210)
    picture = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
    model = Components(masks=True)
    options = {"input_size": (3, 0, 0)}
    one, tiled = (
        DetectionPredictor(model, ("red", "green"), options, DetectionOptions(score=0.0, tile=tile, overlap=0.4))
        for tile in (None, 64)
    )
    whole, parts = one(picture), tiled(picture)
    order = [np.lexsort(result.boxes.T) for result in (whole, parts)]
    for key in ("labels", "boxes", "scores", "masks"):
        np.testing.assert_array_equal(
            *(getattr(result, key)[by] for result, by in zip((whole, parts), order, strict=True))
        )
    assert set(model.shapes) == {(150, 210), (64, 64)}


@pytest.mark.parametrize("kind", ["ssdlite", "retinanet", "mask-rcnn"])
def test_an_exported_file_finds_the_same_in_tiles(kind):
    """Of any size (ssdlite) or of the size of a tile: what the graph returns, chosen, merged and pasted in NumPy."""
    model, names, score = detector(kind, image_size=64, max_size=64), ("a", "b", "c"), 0.05
    options, raw = {"tile": 64, "overlap": 0.3, "score": score}, kind == "ssdlite"
    graph = raw_plan(model).graph if raw else (graphs.MaskGraph if kind == "mask-rcnn" else graphs.DenseGraph)(model)
    outputs = ("boxes", "scores") if raw else ("boxes", "scores", "labels", "masks")

    @torch.inference_mode()
    def network(image):
        return {key: value.numpy() for key, value in zip(outputs, graph(torch.from_numpy(image)), strict=False)}

    preprocessing = {"input_size": (3, 64, 64), "mean": (0.5,) * 3}
    network.description = {"class_names": names, "preprocessing": preprocessing, "category_ids": ()}
    network.description["export"] = raw_plan(model).about if raw else {"size": (64, 64), "score_threshold": score}
    network.description["recipe"] = {"data": {"image_size": 64, "max_size": 64}}
    predictor = AnySizeDetector if raw else Detector
    stored = predictor.stored_options(network.description)
    exported = predictor(network, predictor.make_options(**stored | options))
    own = DetectionPredictor(model, names, preprocessing, DetectionOptions(image_size=64, max_size=64, **options))
    size = (64, 110) if kind == "mask-rcnn" else (110, 130)
    pixels = (noise(*size, 3) * 255).byte().numpy()
    ours, theirs = exported(pixels), own(pixels)
    assert len(theirs) > 20
    assert theirs.boxes.max() > 100
    assert len(ours) == len(theirs)
    apart = np.abs(ours.boxes[:, None] - theirs.boxes).max(-1) + 1000 * (ours.labels[:, None] != theirs.labels)
    match = apart.argmin(1)  # the order of scores that are equal to rounding may differ
    assert sorted(match) == list(range(len(theirs)))
    assert apart.min(1).max() < 1e-3
    assert ours.scores == pytest.approx(theirs.scores[match], abs=1e-5)
    assert (ours.masks is None) == (kind != "mask-rcnn")
    if ours.masks is not None:
        assert ours.masks.any()
        assert (ours.masks == theirs.masks[match]).mean() > 0.9999


def test_suppression_of_small_boxes_in_large_images():
    """With many classes: boxes that are moved apart by class, in float32, are rounded to eighths of a pixel."""
    rng = np.random.default_rng(0)
    corner = 16000 + rng.uniform(0, 20, (300, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(3, 9, (300, 2))), 1).astype(np.float32)
    scores, labels = rng.random(300, dtype=np.float32), rng.integers(87, 90, 300)
    exact, mine = torch.from_numpy(boxes).double(), [labels == label for label in range(87, 90)]
    kept = [np.flatnonzero(own)[nms(exact[own], torch.from_numpy(scores[own]).double(), 0.5)] for own in mine]
    kept = np.concatenate(kept)
    assert suppress(boxes, scores, labels, 0.5).tolist() == kept[np.argsort(-scores[kept])].tolist()
