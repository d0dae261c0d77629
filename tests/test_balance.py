"""Class imbalance in classification: weights and sampling, compared with hand counts and torch's weighted loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import module, recipe

from dualtoken_vit.data.balance import class_weights
from dualtoken_vit.data.classification import build_datasets


@pytest.fixture
def rare(photos):
    """12 images of blue, 6 of green and 3 of red."""
    for name, count in (("green", 6), ("red", 9)):
        for path in sorted((photos / "train" / name).iterdir())[:count]:
            path.unlink()
    return photos


def test_weights_by_their_definitions():
    counts = [12, 0, 6, 3]
    found = class_weights("inverse", torch.tensor(counts))
    assert found.tolist() == pytest.approx([21 / (3 * 12), 0, 21 / (3 * 6), 21 / (3 * 3)])  # scikit-learn's "balanced"
    # Cui et al., equation 2: the effective number of n samples is 1 + beta + ... + beta ** (n - 1).
    effective = [sum(0.999**power for power in range(count)) for count in counts]
    inverse = np.array([1 / number if number else 0 for number in effective])
    expected = inverse * 21 / (inverse @ counts)
    assert class_weights("effective", torch.tensor(counts)).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("kind", ["inverse", "effective"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_weighted_loss_is_torch_s(rare, kind, smoothing, precision):
    """torch's CrossEntropyLoss, whose mean is over the weights of the batch in place of its images."""
    made = replace(recipe(rare, augment={"label_smoothing": smoothing}), class_weights=kind)
    task = module(torch.nn.Flatten(), made, ("blue", "green", "red"))
    task.log = lambda *args, **kwargs: None
    train, _ = build_datasets(made.data, 3)
    task.prepare_epoch(train, 0.0)
    weights = class_weights(kind, torch.tensor([12, 6, 3]))
    logits, targets = torch.randn(5, 3).to(precision), torch.tensor([0, 1, 2, 2, 0])
    expected = torch.nn.CrossEntropyLoss(weights, label_smoothing=smoothing)(logits.float(), targets)
    with torch.autocast("cpu", enabled=precision is torch.bfloat16):
        loss = task.training_step((logits[:, :, None, None], targets), 0)
    torch.testing.assert_close(loss, expected * weights[targets].sum() / 5, rtol=1e-5, atol=0)


def test_mixed_images_are_weighted_by_their_shares(rare):
    made = replace(recipe(rare, augment={"mixup": 1.0, "label_smoothing": 0.0}), class_weights="inverse")
    task = module(torch.nn.Flatten(), made, ("blue", "green", "red"))
    task.log = lambda *args, **kwargs: None
    train, _ = build_datasets(made.data, 3)
    task.prepare_epoch(train, 0.0)
    x, targets = torch.randn(4, 3, 1, 1), torch.tensor([0, 1, 2, 1])
    np.random.seed(3)  # noqa: NPY002
    np.random.rand()  # noqa: NPY002  whether to mix
    share = np.random.beta(1.0, 1.0)  # noqa: NPY002
    logits, soft = (share * each + (1 - share) * each.flip(0) for each in (x.flatten(1), torch.eye(3)[targets]))
    expected = -(soft * logits.log_softmax(1) * torch.tensor([7 / 12, 7 / 6, 7 / 3])).sum(1).mean()
    np.random.seed(3)  # noqa: NPY002
    torch.testing.assert_close(task.training_step((x, targets), 0), expected)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_images_are_drawn_by_the_size_of_their_class(rare, power):
    made = recipe(rare, data={"balanced": power})
    train, _ = build_datasets(made.data, 3)
    module(torch.nn.Flatten(), made, ("blue", "green", "red")).prepare_epoch(train, 0.0)
    assert train.targets == [0] * 12 + [1] * 6 + [2] * 3
    assert train.weights == pytest.approx([12**-power] * 12 + [6**-power] * 6 + [3**-power] * 3)
