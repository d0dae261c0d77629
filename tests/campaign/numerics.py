"""NaN and infinity put into weights, inputs, losses and labels; and trainings that must give equal results."""

import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

from campaign.core import Case, Verdict, command, finish, run, start
from campaign.crashes import launch, same_run, whole
from campaign.world import NETWORK, TASKS, training
from dualtoken_vit.tasks.base import TaskModule


def first_float(value: Any) -> torch.Tensor | None:
    """The first floating-point tensor with elements in nested containers."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() and value.numel() else None
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for child in children if (found := first_float(child)) is not None), None)


def poisoned(args: list[str], where: str, step: int, bad: float, place: float) -> None:
    """The program, with `bad` in one element of weights, inputs, labels, or the loss, before that step of training."""
    begin = TaskModule.on_train_batch_start

    def on_train_batch_start(self: TaskModule, batch: Any, index: int) -> None:
        begin(self, batch, index)
        if self.global_step != step:
            return
        targets: dict[str, Callable[[], torch.Tensor | None]] = {
            "weights": lambda: list(self.model.parameters())[int(place * len(list(self.model.parameters())))].data,
            "inputs": lambda: first_float(batch[0]),
            "labels": lambda: first_float(batch[1]),
        }
        target = targets[where]() if where in targets else None
        if target is None:  # integers, or the loss itself
            compute = self.training_step
            self.training_step = lambda *args: compute(*args) * bad  # type: ignore[method-assign]
        else:
            flat = target.as_subclass(torch.Tensor).view(-1)
            flat[int(place * len(flat))] = bad

    TaskModule.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    command(*args)


def poison(where: str) -> Case:
    """One number of a training is not finite."""

    def case(rng: Random, world: Path, folder: Path) -> Verdict:
        task, bad = rng.choice(TASKS), rng.choice([math.nan, math.inf, -math.inf])
        out, args = folder / "run", training(task, world, folder / "run")
        expected = whole(world, task, 1)[0]
        steps = torch.load(expected / "last.ckpt")["global_step"]
        step = rng.randrange(steps)
        ended = finish(start(poisoned, args, where, step, bad, rng.random(), folder=folder), folder)
        what, fault = f"{task}: {bad} in the {where} before step {step + 1}: {ended.message}", ended.fault
        if not fault and ended.status == 0:
            how = "harmless"  # for example a weight of a branch that nothing went through
            if not finite(out):
                fault = "was saved"
        else:
            how = "detected"
            if not fault and "NaN or Inf" not in ended.message:
                fault = f"not recognised: {ended.message}"
            if not fault and not finite(out):
                fault = "the last saved state is not finite"
            if not fault:
                again = run(*training(task, world, out, *(["--resume"] if out.exists() else [])), folder=folder)
                fault = again.fault or again.message * bool(again.status)
                fault = fault or same_run(out, expected, ("metrics.csv",))
        return Verdict(f"not finite: {where}", what, how, fault)

    return case


def finite(out: Path) -> bool:
    """Whether all saved weights are finite."""
    found = [torch.load(path)["state_dict"] for path in out.glob("last.ckpt")]
    found += [load_file(path) for path in out.glob("best.safetensors")]
    return all(value.isfinite().all() for state in found for value in state.values())


EQUAL = {"optim.optimizer": "sgd", "optim.lr": 0.05, "optim.batch-size": 8, "run.save-every": 1000}
PLAIN = ("--model.name", "vit_tiny_patch16_224", "--model.args", "depth=1", "embed_dim=32", "num_heads=2")


def equal(rng: Random, world: Path, folder: Path) -> Verdict:
    """The same training in other numbers of processes, data loading processes and accumulated batches."""
    plain = rng.random() < 0.5  # without batch normalisation, whose statistics are those of one accumulated batch
    processes, workers = rng.choice([1, 1, 2, 4]), rng.choice([0, 1, 4])
    accumulate = rng.choice([2, 4] if plain else [1])
    if processes * accumulate > 8:
        processes = 2
    args = [arg for arg in training("classification", world, "OUT") if arg not in ("head_hidden_size=32",)]
    if plain:
        args = [arg for arg in args if arg not in NETWORK] + list(PLAIN)
    for key, value in EQUAL.items():
        args += [f"--{key}", str(value)]
    found = []
    for name, (count, *more) in {"one": (1, 0, 1), "other": (processes, workers, accumulate)}.items():
        own = [arg.replace("OUT", str(folder / name)) for arg in args]
        own += ["--data.workers", str(more[0]), "--optim.accumulate", str(more[1])]
        ended = [finish(pid, folder, 120) for pid in launch(own, folder, count)]
        if fault := next((one.fault or one.message or str(one.status) for one in ended if one.status), ""):
            return Verdict("equal results", f"{processes} {workers} {accumulate}", "?", fault)
        found.append(torch.load(folder / name / "last.ckpt")["state_dict"])
    exact = processes == accumulate == 1
    rtol, atol = (0, 0) if exact else (1e-3, 1e-5)
    bad = [key for key, value in found[0].items() if not torch.allclose(value, found[1][key], rtol, atol)]
    network = "ViT" if plain else "DualToken-ViT"
    what = f"{network}: {processes} processes, {workers} workers, {accumulate} accumulated batches"
    fault = f"{len(bad)} tensors differ, the first {bad[0]}" if bad else ""
    return Verdict("equal results", what, "bit by bit" if exact else "up to rounding", fault)


CASES: list[Case] = [poison("weights"), equal, poison("inputs"), poison("losses"), equal, poison("labels")]
COUNT = 60
EXPECTED = (
    "found at once or at the next check, the last good state kept, and from there the uninterrupted run; equal results"
)
