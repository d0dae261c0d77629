"""The evaluation of what was trained, of whatever kind it is."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dualtoken_vit.checkpoint import load_model
from dualtoken_vit.data.sampling import loader
from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.machine import tune_cpu
from dualtoken_vit.recipes import Recipe, from_dict
from dualtoken_vit.tasks import classification, detection, segmentation
from dualtoken_vit.tasks.base import Evaluation, ProgressBar, check_ranges, quiet

PREPARE = {
    "classification": classification.prepare_evaluation,
    "detection": detection.prepare_evaluation,
    "segmentation": segmentation.prepare_evaluation,
}
RUN = ("recipe.json", "last.ckpt", "best.safetensors")  # files by which a run's folder is known
DATA = {
    "classification": "--data.root DIR [--data.val-split NAME]",
    "detection": "--data.images DIR --data.val-json FILE",
    "segmentation": "--data.root DIR [--data.split NAME]",
}


def _named(recipe: Recipe, data: dict[str, Any]) -> dict[str, Any]:
    """What is said of the data now, with what follows from it: it goes before what the recipe says of its own data."""
    files = {"detection": ("coco", ("images", "val_json")), "segmentation": ("masks", ("root",))}
    dataset, names = files.get(recipe.task, ("", ()))
    if not data.keys() & set(names):
        return data
    follows = {"dataset": dataset, "limit": None}
    if "images" in data:
        follows["val_images"] = None
    classes = getattr(recipe.data, "classes", None)
    if classes and not Path(classes).is_file():  # it stayed with the training images; the checkpoint has the names
        follows["classes"] = None
    return follows | data


def evaluate(
    checkpoint: Path,
    *,
    data: dict[str, Any] | None = None,
    batch_size: int | None = None,
    accelerator: str = "auto",
    precision: str = "32-true",
    out: Path | None = None,
) -> Evaluation:
    """Run a best.safetensors over its validation images, prepared as the file says.

    Args:
        checkpoint: the file
        data: fields of the recipe's data section that are to differ from the stored ones, for example root
        batch_size: images at a time; by default as many as in training
        accelerator: Lightning's
        precision: Lightning's
        out: folder to write evaluation.json and the details into

    Raises:
        InputError: for a file or data that cannot be used.
    """
    if out is not None and any((out / name).exists() for name in RUN):
        raise InputError(f"--out {out} holds a run, whose figures are kept; give another, for example {out / 'test'}")
    quiet()
    tune_cpu()
    model, stored = load_model(checkpoint)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    try:
        recipe = from_dict(stored.recipe)
    except TypeError as error:
        raise InputError(f"{checkpoint} was written by another version of dualtoken-vit: {error}") from error
    known = [field.name for field in fields(recipe.data)]
    for name in data or {}:
        if name not in known:
            flag = f"--data.{name.replace('_', '-')}"
            raise InputError(
                f"{flag} does not go with {checkpoint}, which is of {stored.task}: leave it out; its data is named by "
                f"{DATA[stored.task]}"
            )
    recipe = replace(recipe, data=replace(recipe.data, **_named(recipe, data or {})))
    check_ranges(recipe)
    task, images = PREPARE[stored.task](model, stored, recipe)
    try:
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            callbacks=[ProgressBar()],
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise InputError(f"--accelerator {accelerator}, --precision {precision}: {first_line(error)}") from error
    batches = loader(
        images,
        batch_size or recipe.optim.batch_size // recipe.optim.accumulate,
        train=False,
        seed=recipe.run.seed,
        workers=recipe.data.workers,
        collate_fn=task.collate,
    )
    trainer.validate(task, batches, verbose=False)
    task.compute_metrics()
    if out is not None:
        task.save_details(out)
    return task.evaluation()
