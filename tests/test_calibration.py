"""Calibration of probabilities, against torchmetrics' metric and second computations in NumPy."""

import json
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import edit
from PIL import Image
from tiny_runs import module, recipe
from torchmetrics.classification import MulticlassCalibrationError

from dualtoken_vit import cli, load_model, load_predictor
from dualtoken_vit.checkpoint import read_checkpoint
from dualtoken_vit.data.transforms import classification_eval
from dualtoken_vit.errors import InputError
from dualtoken_vit.evaluation import _calibrate, _check_held_out, evaluate
from dualtoken_vit.recipes import ClassificationData, DetectionData, MultiLabelData, SegmentationData
from dualtoken_vit.tasks.calibration import fit_temperature


def cross_entropy(logits, targets, temperature):
    scaled = logits / temperature
    scaled -= scaled.max(1, keepdims=True)
    return (np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(targets)), targets]).mean()


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_best(true):
    """Labels drawn from the probabilities of logits / true."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 5)) * 3
    shares = np.exp(logits / true)
    shares /= shares.sum(1, keepdims=True)
    targets = (shares.cumsum(1) > generator.random((4000, 1))).argmax(1)
    found = fit_temperature(torch.from_numpy(logits), torch.from_numpy(targets))
    assert found == pytest.approx(true, rel=0.06)
    grid = np.geomspace(0.3, 4, 200)
    losses = [cross_entropy(logits, targets, one) for one in grid]
    assert cross_entropy(logits, targets, found) <= min(losses) + 1e-9


def test_the_error_of_a_network_that_is_certain():
    """By the definition: 15 bins, of which the last includes the probability 1."""
    logits = torch.zeros(1000, 2)
    logits[:500, 0], logits[500:, 0] = 200.0, 3.5  # shares of 1 and 0.9707
    targets = torch.zeros(1000, dtype=torch.int64)
    targets[:25] = 1  # of those that are certain, 95 % are right
    task = module(torch.nn.Identity(), recipe(""), ("a", "b"))
    task.add(logits, targets)
    confidence = logits.softmax(1).max(1).values
    expected = abs(confidence.mean() - 0.975).item()  # all are in the last bin
    assert task.evaluate().metrics["ece"] == pytest.approx(expected, abs=1e-5)


def test_logits_are_kept_on_the_cpu():
    """Where Lightning takes the metrics at the end of a validation."""
    task = module(torch.nn.Identity(), recipe(""), ("a", "b"))
    task.kept = []
    moved = []
    logits, targets = torch.zeros(2, 2), torch.tensor([0, 1])
    with mock.patch.object(torch.Tensor, "cpu", lambda each: moved.append(each) or each):
        task.add(logits, targets)
    assert moved[-2] is logits
    assert moved[-1] is targets


@pytest.fixture
def copied(trained, tmp_path):
    """A run whose network is wrong about a third of the images of two classes: it prefers the first one."""
    photos, out = trained
    copy = shutil.copytree(out, tmp_path / "run")
    best = copy / "best.safetensors"
    logits, targets = logits_of(photos, out)
    margins = logits.gather(1, targets[:, None])[:, 0] - logits[:, 0]
    shift = torch.tensor([margins[targets > 0].quantile(1 / 3), 0, 0])
    edit(best, best, lambda tensors: tensors | {"head.bias": tensors["head.bias"] + shift})
    return photos, copy


def logits_of(photos, out):
    """By hand, from the plain network."""
    model, checkpoint = load_model(out / "best.safetensors")
    config = checkpoint.preprocessing
    transform = classification_eval(
        recipe(photos, data={"crop_pct": 0.9}).data, tuple(config["mean"]), tuple(config["std"])
    )
    logits, targets = [], []
    for label, name in enumerate(checkpoint.class_names):
        for path in sorted((photos / "val" / name).iterdir()):
            with torch.inference_mode():
                logits.append(model(transform(Image.open(path).convert("RGB"))[None])[0])
            targets.append(label)
    return torch.stack(logits), torch.tensor(targets)


def test_evaluate_reports_and_stores_it(copied, tmp_path, capsys):
    photos, out = copied
    best = str(out / "best.safetensors")
    logits, targets = logits_of(photos, out)

    def expected(temperature):
        metric = MulticlassCalibrationError(3, n_bins=15, norm="l1")
        return metric((logits / temperature).softmax(-1), targets).item()

    before = read_checkpoint(best)
    assert cli.run(["evaluate", best, "--json", "--out", str(tmp_path / "plain")]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["ece"] == pytest.approx(expected(1.0), abs=1e-5)
    assert (tmp_path / "plain" / "calibration.png").stat().st_size > 1000

    assert cli.run(["evaluate", best, "--json", "--calibrate"]) == 0
    said = capsys.readouterr()
    calibrated = json.loads(said.out)
    after = read_checkpoint(best)
    temperature = after.preprocessing["temperature"]
    assert 0.06 < temperature < 19  # not a bound
    assert temperature == pytest.approx(fit_temperature(logits, targets), rel=1e-3)
    assert f"temperature {temperature:.3f}, stored in {best}" in said.err
    assert calibrated["ece"] == pytest.approx(expected(temperature), abs=1e-5)
    assert calibrated["loss"] == pytest.approx(cross_entropy(logits.numpy(), targets.numpy(), temperature), abs=1e-5)
    assert calibrated["loss"] <= plain["loss"]
    assert calibrated["top1"] == plain["top1"]
    assert after.metrics == before.metrics
    assert all(torch.equal(value, before.state_dict[key]) for key, value in after.state_dict.items())

    # what is stored is used from now on, and a second fit changes nothing
    image = next((photos / "val" / "blue").iterdir())
    index = [path for name in after.class_names for path in sorted((photos / "val" / name).iterdir())].index(image)
    result = load_predictor(best)(image)
    shares = dict(zip(result.names, result.probabilities.tolist(), strict=True))
    wanted = (logits[index] / temperature).softmax(-1)
    assert [shares[name] for name in after.class_names] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert cli.run(["evaluate", best, "--json", "--calibrate"]) == 0
    assert json.loads(capsys.readouterr().out)["ece"] == pytest.approx(calibrated["ece"], abs=1e-3)
    assert read_checkpoint(best).preprocessing["temperature"] == pytest.approx(temperature, rel=1e-3)


def test_a_broken_network_is_not_calibrated(copied):
    best = copied[1] / "best.safetensors"
    edit(best, best, lambda tensors: {key: value * 1e30 for key, value in tensors.items()})
    before = best.read_bytes()
    with pytest.raises(InputError, match="the network produced NaN or Inf"):
        evaluate(best, calibrate=True, device="cpu")
    assert best.read_bytes() == before


def test_a_network_at_chance_is_not_calibrated(copied):
    best = copied[1] / "best.safetensors"
    edit(best, best, lambda tensors: tensors | {"head.weight": -10 * tensors["head.weight"]})  # sure of what is wrong
    before = best.read_bytes()
    with pytest.raises(InputError, match="says nothing about these images; nothing is stored"):
        evaluate(best, calibrate=True, device="cpu")
    assert best.read_bytes() == before


@pytest.mark.parametrize(
    ("scale", "wrong", "message"),
    [
        (4.0, 0, "right about all of these images, so .* give more images; nothing is stored"),
        (1e-3, 1, r"the best temperature is 0\.05, at its bound: .* nothing is stored"),
        (4.0, 60, r"the best temperature is 20, at its bound: .* nothing is stored"),
    ],
)
def test_temperatures_that_are_not_determined(tmp_path, scale, wrong, message):
    """Of 100 images in two classes, with logits of `scale` for the class that is found."""
    found, targets = torch.arange(100) % 2, torch.arange(100) % 2
    targets[:wrong] = 1 - targets[:wrong]
    kept = [(scale * torch.nn.functional.one_hot(found).float(), targets)]
    task = SimpleNamespace(kept=kept, predictor=SimpleNamespace(temperature=1.0))
    with pytest.raises(InputError, match=message):
        _calibrate(task, tmp_path / "best.safetensors", None, None)


@pytest.mark.parametrize("data", [MultiLabelData(holdout=0.1), DetectionData(), SegmentationData(holdout=0.3)])
def test_other_held_out_images_were_trained_on(data):
    assert _check_held_out(data, {"holdout": data.holdout}) is _check_held_out(data, {"holdout": 0.0}) is None
    assert _check_held_out(data, {"holdout": 0.2, "root": "other"}) is None
    with pytest.raises(InputError, match=rf"--data\.holdout 0\.2: .* trained with {data.holdout:g}, so another share"):
        _check_held_out(data, {"holdout": 0.2})


def test_images_of_another_fold_were_trained_on():
    data = ClassificationData(holdout=0.25, fold=1)
    assert _check_held_out(data, {"fold": 1}) is None
    with pytest.raises(InputError, match=r"--data\.fold 2: the network was trained on its images; leave it out"):
        _check_held_out(data, {"fold": 2})


@pytest.mark.slow
def test_an_exported_file_has_it(copied, tmp_path):
    photos, out = copied
    best, file = out / "best.safetensors", tmp_path / "model.onnx"
    assert cli.run(["evaluate", str(best), "--calibrate"]) == 0
    assert cli.run(["export", str(best), "--out", str(file)]) == 0
    image = next((photos / "val" / "red").iterdir())
    one, other = (load_predictor(path)(image) for path in (best, file))
    assert one.names == other.names
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
    with pytest.raises(InputError, match=r"--calibrate: .*model\.onnx cannot store it; calibrate the best"):
        cli.run(["evaluate", str(file), "--calibrate"])
