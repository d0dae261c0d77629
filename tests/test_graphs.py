"""The graphs that are exported, in PyTorch, against the networks they are made of."""

import numpy as np
import pytest
import torch
from tiny_graphs import ONE_STAGE, broken, detector, noise, raw_plan
from torch import nn
from torchvision.models.detection.image_list import ImageList

from dualtoken_vit.deploy import graphs
from dualtoken_vit.deploy.verify import difference
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.detectors import DETECTORS, refusing_nan
from dualtoken_vit.models.segmenters import Bins
from dualtoken_vit.runtime.detection import AnySizeDetector


@pytest.mark.parametrize("kind", DETECTORS)
@torch.inference_mode()
def test_the_graph_of_a_detector_is_the_detector(kind):
    model = detector(kind, image_size=64, max_size=96)
    x = noise(1, 3, 64, 96)
    (expected,) = model(list(x))
    boxes, scores, labels, *masks = (graphs.MaskGraph if kind == "mask-rcnn" else graphs.DenseGraph)(model)(x)
    count = len(expected["boxes"])
    assert count > 20
    assert boxes.shape == (100, 4)
    assert (labels[count:] == -1).all()
    assert torch.equal(labels[:count], expected["labels"])
    assert torch.allclose(boxes[:count], expected["boxes"], atol=1e-4)
    assert torch.allclose(scores[:count], expected["scores"], atol=1e-6)
    assert [mask.shape for mask in masks] == [(100, 1, 28, 28)] * (kind == "mask-rcnn")


@pytest.mark.parametrize("kind", DETECTORS)
@torch.inference_mode()
def test_a_detector_that_produces_nan_does_not_pass_for_one_without_objects(kind):
    model = detector(kind, image_size=64, max_size=96)
    x = broken(noise(1, 3, 64, 96))
    assert (graphs.MaskGraph if kind == "mask-rcnn" else graphs.DenseGraph)(model)(x)[1].isnan().all()
    with refusing_nan(model), pytest.raises(InputError, match="the network produced NaN or Inf"):
        model(list(x))
    model(list(x))  # as in the validation of a training, which ends by itself


@pytest.mark.parametrize("kind", ONE_STAGE)
@torch.inference_mode()
def test_the_predictor_chooses_among_all_anchors_as_the_detector(kind):
    model = detector(kind, image_size=64, max_size=96)
    x = noise(1, 3, 64, 96)
    (expected,) = model(list(x))
    boxes, scores = raw_plan(model).graph(x)
    predictor = object.__new__(AnySizeDetector)  # without a file
    predictor.options = AnySizeDetector.Options(score=0.05)
    predictor.export = raw_plan(model).about
    found = predictor.choose({"boxes": boxes.numpy(), "scores": scores.numpy()}, (64, 96), (64, 96))
    assert found["labels"].tolist() == expected["labels"].tolist()
    assert found["scores"] == pytest.approx(expected["scores"].numpy(), abs=1e-6)
    assert found["boxes"] == pytest.approx(expected["boxes"].numpy(), abs=1e-4)


def test_proposals_do_not_depend_on_the_rounding_of_sigmoid(monkeypatch):
    """Near 1 it differs between runtimes, and with it which of two overlapping proposals is suppressed."""
    model, x = detector("mask-rcnn", image_size=128, max_size=192), noise(1, 3, 128, 192)
    graph, found = graphs.MaskGraph(model), []
    with torch.inference_mode():
        model.rpn.head.cls_logits.bias += 13
        levels, anchors = graph.features(x)
        for sigmoid in (torch.Tensor.sigmoid, lambda x: torch.sigmoid(x) - 6e-8 * (torch.arange(len(x)) % 2)):
            monkeypatch.setattr(torch.Tensor, "sigmoid", sigmoid)
            boxes, there, _ = graph.proposals(levels, anchors, (128, 192))
            found.append({*map(tuple, boxes[there].tolist())})
        (expected,), _ = model.rpn(ImageList(x, [(128, 192)]), dict(enumerate(levels)))
    assert len(found[0]) > 100
    assert found[0] == found[1] == {*map(tuple, expected.tolist())}


@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 11), (3, 4), (13, 12)])
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_bins_by_products_are_adaptive_pooling(parts, height, width):
    pool, x = Bins(parts), noise(2, 3, height, width)
    rows, columns = pool.means(height, x), pool.means(width, x)
    assert torch.allclose(rows @ x @ columns.T, nn.functional.adaptive_avg_pool2d(x, parts), atol=1e-6)


def test_differences_of_boxes():
    ours = {
        "boxes": np.float32([[0, 0, 10, 10], [5, 5, 9, 9], [-1] * 4]),
        "scores": np.float32([0.9, 0.5, -1]),
        "labels": np.array([1, 0, -1]),
    }
    swapped = {key: value[[1, 0, 2]] for key, value in ours.items()}
    assert difference(ours, swapped, 100) == 0
    moved = ours | {"boxes": ours["boxes"] + np.float32([[1], [0], [0]])}
    assert difference(ours, moved, 100) == pytest.approx(0.01)
    assert difference(ours, ours | {"labels": np.array([2, 0, -1])}, 100) == np.inf
    missing = ours | {"labels": np.array([-1, 0, -1])}
    assert difference(ours, missing, 100) == difference(missing, ours, 100) == np.inf
    assert difference({"logits": np.float32([1, -4])}, {"logits": np.float32([1, -3])}, 1) == 0.25
    assert difference({"logits": np.float32([1])}, {"logits": np.float32([[1]])}, 1) == np.inf
