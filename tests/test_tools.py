"""The scripts that made what the project ships and shows."""

import importlib.util
import io
import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import create
from safetensors.torch import load_file

from dualtoken_vit import load_model
from dualtoken_vit.checkpoint import save_checkpoint
from dualtoken_vit.recipes import RECIPES, ClassificationInput, Optim, to_dict
from dualtoken_vit.tasks.classification import data_config
from dualtoken_vit.tasks.optim import build_optimizer

TOLERANCE = 1e-3  # the iteration of Muon is in bfloat16
TOOLS = Path(__file__).parents[1] / "tools"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_batched_muon_is_timm_s():
    """Three steps with the same gradients and learning rates 0.01, 0.02 and 0.03."""
    torch.manual_seed(0)
    first, second = (create("dualtoken_vit_tiny_mix", num_classes=4) for _ in range(2))
    second.load_state_dict(first.state_dict())
    before = {name: value.clone() for name, value in first.named_parameters()}
    theirs, same = (build_optimizer(model, Optim(optimizer="muon")) for model in (first, second))
    assert isinstance(theirs, timm.optim.Muon)
    ours = tool("train_on_gpu").Muon(same, torch.device("cpu"))
    for lr in (0.01, 0.02, 0.03):
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        ours.lr.fill_(lr)
        ours.step()
    found = dict(second.named_parameters())
    for name, expected in first.named_parameters():
        moved = (expected - before[name]).norm()
        assert (found[name] - expected).norm() < TOLERANCE * moved, name


def test_the_augmentation_of_the_training_on_a_gpu():
    """Of images of one value each, a part has the value of the image before, as large as `share` says."""
    script = tool("train_on_gpu")
    script.JITTER = 0.0
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 16, 16).contiguous() * 30
    trainer = script.Trainer(create("dualtoken_vit_tiny_mix"), images, torch.arange(8) % 5, 8)
    trainer.cutmix.fill_(1)
    torch.manual_seed(0)
    plain = [trainer._constant((value,) * 3) for value in (0.0, 1.0, 1 / 3)]
    x, share = trainer._augmented(32, plain)
    x = (255 * x).round().int()
    assert x.shape == (8, 3, 32, 32)
    before = [30 * ((number - 1) % 8) for number in range(8)]
    for number in range(8):
        assert set(x[number].unique().tolist()) <= {30 * number, before[number]}
        assert (x[number, 0] == before[number]).float().mean() == pytest.approx(share[number].item())
    assert 0 < share.mean() < 1


def test_a_training_as_on_a_gpu_learns():
    """By a clock that goes on by a second with each step."""
    script, file = tool("train_on_gpu"), io.StringIO()
    script.time = SimpleNamespace(monotonic=count().__next__)
    script.SIZES = ((1.0, (32,)),)
    torch.manual_seed(0)
    images = torch.full((64, 3, 16, 16), 40, dtype=torch.uint8)
    images[32:] = 200
    trainer = script.Trainer(create("dualtoken_vit_tiny_mix", num_classes=2), images, torch.arange(64) // 32, 16)
    trainer.fit(100, 4e-3, file)
    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["train_top1"] > 0.9
    assert rows[-1]["lr"] < 4e-4


def test_packed_weights_name_no_place(tmp_path, monkeypatch):
    names = ("n02124075", "n02099601")
    model = create("dualtoken_vit_tiny_mix", num_classes=2)
    recipe = RECIPES["tin190"]
    recipe = replace(recipe, data=replace(recipe.data, root=f"{tmp_path}/data/tiny"))
    recipe = replace(recipe, model=replace(recipe.model, checkpoint=f"{tmp_path}/run/best.safetensors"))
    recipe = replace(recipe, distill=replace(recipe.distill, teacher=f"{tmp_path}/teacher.safetensors"))
    save_checkpoint(
        tmp_path / "best.safetensors",
        model,
        task="classification",
        class_names=names,
        preprocessing=data_config(model, ClassificationInput(image_size=64), 3),
        recipe=to_dict(recipe),
        metrics={},
        model_args={"depths": (1, 1, 1)},
    )
    script = tool("pack_weights")
    monkeypatch.setattr(script, "WEIGHTS", tmp_path)
    packed = script.pack(tmp_path / "best.safetensors", "name.tag")
    assert str(tmp_path).encode() not in packed.read_bytes()
    _, about = load_model(packed)
    assert (about.recipe["data"]["root"], about.recipe["model"]["checkpoint"]) == ("tiny", "best.safetensors")
    assert about.recipe["optim"]["lr"] == recipe.optim.lr
    assert {value.dtype for value in load_file(packed).values() if value.is_floating_point()} == {torch.float16}
    assert (tmp_path / "tag.txt").read_text() == "n02124075\nn02099601\n"
