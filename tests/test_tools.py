"""The scripts that made what the project ships and shows."""

import importlib.util
from pathlib import Path

import timm
import torch
from helpers import create

from dualtoken_vit.recipes import Optim
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
