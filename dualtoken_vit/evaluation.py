"""The evaluation of a trained network on a validation set."""

import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dualtoken_vit.bounds import check_bounds
from dualtoken_vit.checkpoint import checksum, locate, store_preprocessing
from dualtoken_vit.data.contract import fingerprint, unread_test_split
from dualtoken_vit.data.sampling import loader
from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.machine import tune_cpu
from dualtoken_vit.predictors import default_options, load_predictor, read_header, stored_recipe
from dualtoken_vit.recipes import Recipe
from dualtoken_vit.runtime.exported import ExportedPredictor
from dualtoken_vit.runtime.session import is_exported
from dualtoken_vit.tasks.base import Evaluation
from dualtoken_vit.tasks.calibration import HOTTEST, fit_temperature
from dualtoken_vit.tasks.failures import explained
from dualtoken_vit.tasks.progress import ProgressBar, quiet
from dualtoken_vit.tasks.registry import get_task
from dualtoken_vit.tasks.run_folder import RUN


class _InTorch:
    """The predictor of an exported file for the modules of the tasks: logits and label maps are tensors."""

    device = torch.device("cpu")

    def __init__(self, predictor: ExportedPredictor[Any]):
        self.predictor = predictor
        self.model = torch.nn.Identity()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.predictor, name)

    def forward(self, batch: Any, **options: Any) -> Any:
        found = self.predictor.forward([np.asarray(image) for image in batch], **options)
        if isinstance(found, np.ndarray):
            return torch.from_numpy(found)
        return [each if isinstance(each, dict) else torch.from_numpy(each) for each in found]


def _check_held_out(stored: Any, given: dict[str, Any]) -> None:
    """Reject to hold out other images than training did, unless `given` names other data."""
    if given.keys() & {"root", "images", "train_json"}:
        return
    if given.get("holdout") and given["holdout"] != stored.holdout:
        raise InputError(
            f"--data.holdout {given['holdout']}: the network was trained with {stored.holdout:g}, so another share has "
            "images that it was trained on; leave it out, or give other data"
        )
    if "fold" in given and given["fold"] != stored.fold:
        raise InputError(f"--data.fold {given['fold']}: the network was trained on its images; leave it out")


def _calibrate(module: Any, checkpoint: str | Path, of: str | None, before: Evaluation) -> Evaluation:
    """Store the best temperature for the validation just done by a classifier's module; returns its metrics with it.

    `of` is the `checksum` of the file with the classifier.
    """
    logits, targets = map(torch.cat, zip(*module.kept or [], strict=True))
    logits = logits * module.predictor.temperature  # as the network computes them
    if (logits.argmax(1) == targets).all():
        raise InputError(
            "--calibrate: the network is right about all of these images, so the best temperature is the lowest; "
            "give more images; nothing is stored"
        )
    temperature = fit_temperature(logits, targets)
    if not 1.01 / HOTTEST < temperature < 0.99 * HOTTEST:  # the search ends just inside its bounds
        raise InputError(
            f"--calibrate: the best temperature is {temperature:.3g}, at its bound: the network's confidence says "
            "nothing about these images; nothing is stored"
        )
    module.add(logits / temperature, targets)
    after = module.evaluate()
    store_preprocessing(checkpoint, of, temperature=temperature)
    change = f"{before.metrics['ece']:.2%} to {after.metrics['ece']:.2%}"
    print(f"temperature {temperature:.3f}, stored in {checkpoint}: calibration error from {change}", file=sys.stderr)
    return after


def evaluate(
    checkpoint: str | Path,
    *,
    data: dict[str, Any] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "32-true",
    out: str | Path | None = None,
    runtime: str | None = None,
    calibrate: bool = False,
    recipe: Recipe | None = None,
) -> Evaluation:
    """Run a best.safetensors or an exported file on its validation images, prepared as the file describes.

    Args:
        data: fields of the recipe's data section that differ from the stored ones, for example root
        batch_size: images in a batch; by default as in training
        checkpoint, device: as for `load_predictor`
        precision: Lightning's: 32-true, bf16-mixed, 16-mixed
        out: folder to write evaluation.json and the details into
        runtime: of an exported file: onnxruntime (default) or openvino
        calibrate: classification: fit the temperature of the probabilities on these images, and store it in the
            checkpoint (Guo et al., arXiv 1706.04599); the metrics are those after it
        recipe: the recipe that names the data; by default the one in the file, without paths in an exported file

    Raises:
        InputError: for a file or data that cannot be used.
    """
    out = None if out is None else Path(out)
    if out is not None and any((out / name).exists() for name in RUN):
        raise InputError(f"--out {out}: holds a run, whose files are kept; give another, for example {out / 'test'}")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file; name a folder")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    quiet()
    tune_cpu()
    header = read_header(checkpoint)
    recipe, task, given = recipe or stored_recipe(checkpoint, header), get_task(header.task), data or {}
    if calibrate and not task.calibrates:
        raise InputError("--calibrate: only for networks with one label per image; leave it out")
    if calibrate and is_exported(checkpoint):
        raise InputError(f"--calibrate: {checkpoint} cannot store it; calibrate the best.safetensors, and export again")
    if calibrate and (file := locate(checkpoint)) != Path(checkpoint):
        raise InputError(f"--calibrate would change the installed package: give a copy of {file}")
    if is_exported(checkpoint) and precision != "32-true":
        raise InputError(f"--precision {precision}: {checkpoint} has a precision of its own; leave it out")
    known = {field.name for field in fields(recipe.data)}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    for name in given:
        if name not in known:
            raise InputError(
                f"--data.{name.replace('_', '-')} is not an option of {task.name}, the task of {checkpoint}: leave it "
                f"out; its data is named by {task.data_flags}"
            )
    _check_held_out(recipe.data, given)
    trained_on = recipe.data
    recipe = replace(recipe, data=replace(recipe.data, **task.relocate(recipe, given) | given))
    check_bounds(recipe)
    own = vars(default_options(checkpoint)) | given  # a given option that the file does not have is rejected
    names = {field.name for field in fields(task.predictor.Options)} & own.keys()
    options = {name: own[name] for name in names & known} | task.evaluation_options
    if runtime is not None:
        options["runtime"] = runtime
    read = checksum(checkpoint) if calibrate else None
    predictor: Any = load_predictor(checkpoint, device, **options)
    if isinstance(predictor, ExportedPredictor):
        predictor = _InTorch(predictor)
    module, images = task.evaluation(predictor, recipe)
    if calibrate:
        module.kept = []  # type: ignore[assignment]
    held_out = predictor.preprocessing.get("held_out")  # not in files of earlier versions
    names = [*images.image_names, *getattr(images, "left_out", ())]
    comparable = getattr(recipe.data, "limit", None) == getattr(trained_on, "limit", None)
    if getattr(recipe.data, "holdout", 0) and comparable and held_out not in (None, fingerprint(names)):
        note = "the images held out are not those of the training run; if they are of its data, it trained on some"
        images.notes = (*images.notes, note)
    for note in images.notes:
        print(note, file=sys.stderr)  # stdout may be one JSON object
    try:
        trainer = lightning.Trainer(
            accelerator=predictor.device.type,
            devices=1 if predictor.device.index is None else [predictor.device.index],
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            callbacks=[ProgressBar()],
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise InputError(f"--device {device}, --precision {precision}: {first_line(error)}") from error
    batches = loader(
        images,
        batch_size or recipe.optim.batch_size // recipe.optim.accumulate,
        train=False,
        seed=recipe.run.seed,
        workers=recipe.data.workers,
        collate_fn=module.collate,
        pin_memory=predictor.device.type == "cuda",
    )
    with explained("give a smaller --batch-size, or smaller images (--data.*)"):
        trainer.validate(module, batches, verbose=False)
        evaluation = module.evaluate()
    if not all(map(math.isfinite, evaluation.scores.values())):
        raise InputError("the network produced NaN or Inf; use another checkpoint or --precision 32-true")
    if calibrate:
        evaluation = _calibrate(module, checkpoint, read, evaluation)
    if out is not None:
        try:
            module.save_details(out, evaluation)
        except InputError as error:
            evaluation = replace(evaluation, fault=str(error))
    if "val_split" not in given and (test := unread_test_split(recipe.data, images.splits)):
        return replace(evaluation, notes=(f"evaluated on validation images; the test split: --data.split {test}",))
    return evaluation
