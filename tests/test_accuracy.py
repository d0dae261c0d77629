"""Which accuracies a classifier reports, against NumPy and torchmetrics."""

import numpy as np
import pytest
import torch
from tiny_runs import module
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

from dualtoken_vit.recipes import RECIPES


@pytest.mark.parametrize(("classes", "names"), [(2, ["top1"]), (5, ["top1"]), (6, ["top1", "top5"])])
def test_top5_needs_more_than_five_classes(classes, names):
    """Of at most five it is 100 %, whatever the network predicts."""
    task = module(torch.nn.Identity(), RECIPES["demo"], [*"abcdef"[:classes]])
    rng = np.random.default_rng(classes)
    logits, targets = rng.normal(size=(40, classes)).astype(np.float32), rng.integers(0, classes, 40)
    task.add(torch.from_numpy(logits), torch.from_numpy(targets))
    found = task.evaluate()
    ranks = (logits > logits[np.arange(40), targets][:, None]).sum(1)
    expected = {name: pytest.approx((ranks < int(name[3:])).mean(), abs=1e-6) for name in names}
    assert {name: found.metrics[name] for name in names} == expected
    assert list(found.metrics) == [*names, "mean_accuracy", "precision", "f1", "loss", "ece", "images", "per_class"]
    assert sorted(found.scores) == sorted([*names, "loss"])
    shares = "".join(f"  top-{name[3:]} {found.metrics[name]:.2%}" for name in names)
    assert found.headline == f"val loss {found.metrics['loss']:.4f}{shares}"
    assert found.more == f"calibration error {found.metrics['ece']:.1%}"


def test_metrics_of_each_class_and_their_means_are_torchmetrics():
    """Class d has no image but is predicted, class e is never predicted; classes without images are in no mean."""
    task = module(torch.nn.Identity(), RECIPES["demo"], "abcde")
    rng = np.random.default_rng(0)
    targets = torch.from_numpy(rng.choice([0, 1, 2, 4], 60, p=[0.6, 0.2, 0.1, 0.1]))
    logits = torch.from_numpy(rng.normal(size=(60, 5)).astype(np.float32)) + 1.5 * torch.eye(5)[targets]
    logits[:, 4] = -9
    task.add(logits, targets)
    found = task.evaluate()
    metrics = {"top1": multiclass_recall, "precision": multiclass_precision, "f1": multiclass_f1_score}
    expected = {key: metric(logits, targets, 5, average="none").numpy() for key, metric in metrics.items()}
    counts, there = np.bincount(targets, minlength=5), [0, 1, 2, 4]
    assert counts[3] == 0
    assert (logits.argmax(1) == 3).any()
    per_class = found.metrics["per_class"]
    assert list(per_class) == list("abcde")
    for key, shares in expected.items():
        shares[3] = -1
        assert [one[key] for one in per_class.values()] == pytest.approx(shares.tolist(), abs=1e-6)
    assert [*per_class.values()] == [{key: round(value, 6) for key, value in one.items()} for one in per_class.values()]
    assert [one["images"] for one in per_class.values()] == counts.tolist()
    assert per_class["e"] == {"images": counts[4], "top1": 0, "precision": 0, "f1": 0}
    assert found.metrics["mean_accuracy"] == pytest.approx(expected["top1"][there].mean(), abs=1e-6)
    assert found.metrics["precision"] == pytest.approx(expected["precision"][there].mean(), abs=1e-6)
    assert found.metrics["f1"] == pytest.approx(expected["f1"][there].mean(), abs=1e-6)
    means = [f"{shares[there].mean():.1%}" for shares in expected.values()]
    assert found.totals == [("all", "60", f"{found.metrics['top1']:.1%}", "", ""), ("mean of classes", "", *means)]
    assert found.classes[3] == ("d", "absent", "-", "-", "-")
