"""Which accuracies a classifier reports, against NumPy."""

import numpy as np
import pytest
import torch
from tiny_runs import module

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
    assert list(found.metrics) == [*names, "loss", "ece", "images"]
    assert sorted(found.scores) == sorted([*names, "loss"])
    shares = "".join(f"  top-{name[3:]} {found.metrics[name]:.2%}" for name in names)
    assert found.headline == f"val loss {found.metrics['loss']:.4f}{shares}"
