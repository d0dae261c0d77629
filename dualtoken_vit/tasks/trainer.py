"""Training by Lightning's Trainer.

A resumed run repeats an uninterrupted one bit by bit on the CPU. Data and step-level randomness depend on the seed and
the position in the run alone; last.ckpt holds the rest (weights, averages, optimiser, schedule, progress, history).
"""

import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dualtoken_vit.bounds import check_bounds
from dualtoken_vit.checkpoint import license_of, load_weights, own_weights
from dualtoken_vit.data.contract import fingerprint
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import counted
from dualtoken_vit.machine import tune_cpu
from dualtoken_vit.recipes import RECIPES, Recipe, Run
from dualtoken_vit.tasks import run_folder
from dualtoken_vit.tasks.budget import TimeBudget, with_epochs
from dualtoken_vit.tasks.distributed import synchronise_batchnorm
from dualtoken_vit.tasks.failures import explained
from dualtoken_vit.tasks.loaders import Loaders
from dualtoken_vit.tasks.loggers import check_logger
from dualtoken_vit.tasks.networks import choose_weights
from dualtoken_vit.tasks.optim import Average, build_optimizer, schedule_notes
from dualtoken_vit.tasks.progress import ProgressBar, quiet
from dualtoken_vit.tasks.registry import get_task


def _trainer(recipe: Recipe, folder: run_folder.RunFolder) -> lightning.Trainer:
    """Lightning's Trainer with our callbacks; an InputError for a device that this machine lacks."""
    run, optim = recipe.run, recipe.optim
    budget = [TimeBudget(folder)] if run.max_minutes is not None and not folder.begun else []
    averaging = [Average(optim.ema_decay)] if optim.ema_decay is not None else []
    gpus = torch.cuda.device_count() if run.device in ("auto", "cuda") else 0
    processes = run.nodes * (max(gpus, 1) if run.devices == "auto" else run.devices)
    try:
        return lightning.Trainer(
            accelerator=run.device,
            devices=run.devices,
            num_nodes=run.nodes,
            # Statistics of batch normalisation are equal everywhere; broadcasting them would make processes with fewer
            # validation batches hang.
            strategy=DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True) if processes > 1 else "auto",
            precision=run.precision,
            max_epochs=optim.epochs,
            check_val_every_n_epoch=run.validate_every,
            accumulate_grad_batches=optim.accumulate,
            gradient_clip_val=optim.clip_grad,
            callbacks=[folder, *averaging, *budget, run_folder.LastCheckpoint(folder), ProgressBar()],
            plugins=[run_folder.AtomicCheckpointIO()],
            logger=False,  # `folder` adds one when the run begins
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        fields = "device", "devices", "nodes", "precision"
        message = str(error).replace("accelerator", "device")  # Lightning's name for it
        named = [name for name in fields if re.search(rf"\b(num_)?{name}\b", message)]
        chosen = [name for name in fields if getattr(run, name) != getattr(Run, name)]
        flags = ", ".join(f"--run.{name} {getattr(run, name)}" for name in named or chosen or fields)
        raise InputError(f"{flags}: {reason(error)}") from error


def _share(recipe: Recipe, world: int) -> int:
    """Images per batch and process; an InputError for a batch that cannot be divided or is too small for the task."""
    parts = recipe.optim.accumulate * world
    if recipe.optim.batch_size % parts:
        raise InputError(
            f"--optim.batch-size {recipe.optim.batch_size} cannot be shared by {world} processes and "
            f"{recipe.optim.accumulate} accumulated batches; give a multiple of {parts}"
        )
    share = recipe.optim.batch_size // parts
    if fault := get_task(recipe.task).share_fault(recipe, share):
        images = counted(share, "image")
        raise InputError(f"{fault}, but a batch has {images}; give --optim.batch-size {(share + 1) * parts}")
    return share


def train(recipe: Recipe | str, out: str | Path, resume: bool = False, name: str = "") -> None:
    """Train, validate after each epoch, and leave everything in `out`.

    Args:
        recipe: the experiment, or the name of one of `RECIPES`
        out: folder of the run: recipe.json, metrics.csv, curves.png, tensorboard/, last.ckpt, best.safetensors, and the
            task's details of the best epoch (confusion.{png,csv}, evaluation.json, detections, the worst images)
        resume: continue the run in `out` where it was interrupted
        name: of the recipe, to be stored

    Raises:
        InputError: for anything that the user can fix.
        KeyboardInterrupt: after Ctrl-C or SIGTERM. One process first finishes its step and saves last.ckpt; a second
            Ctrl-C ends it at once.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise InputError(f"recipe {recipe!r} is unknown; there are {', '.join(RECIPES)}")
        name, recipe = recipe, RECIPES[recipe]
    out = Path(out)
    quiet()
    check_bounds(recipe)
    if recipe.run.max_minutes is None and recipe.optim.epochs % recipe.run.validate_every:
        raise InputError(
            f"--run.validate-every {recipe.run.validate_every}: must divide --optim.epochs {recipe.optim.epochs}, "
            "so that the last epoch is validated"
        )
    start = recipe.model
    if start.pretrained is True and start.checkpoint:
        raise InputError("--model.checkpoint, --model.pretrained true: a run starts from one of them; give one")
    main = getattr(rank_zero_only, "rank", 0) == 0  # other processes run this too, after the first has begun to write
    if main and start.pretrained == "auto" and start.args and not start.checkpoint and own_weights(start.name):
        print("--model.args makes another network than that of the pretrained weights: starting from scratch")
    recipe = replace(recipe, model=choose_weights(start))
    check_logger(recipe.run.logger)
    with run_folder.in_use(out) if main else nullcontext():
        _train(recipe, out, resume, name, main)


def check_balance(recipe: Recipe) -> None:
    """Raise an InputError for a new run that corrects the imbalance of the classes twice, which would invert it."""
    balanced, weights = getattr(recipe.data, "balanced", 0.0), getattr(recipe, "class_weights", "equal")
    if balanced and weights != "equal":
        raise InputError(
            f"--data.balanced {balanced:g}, --class-weights {weights}: each corrects the imbalance of the classes, and "
            "both together invert it; give one of them"
        )


def _damaged(last: Path, error: Exception) -> InputError:
    """The error for a last.ckpt that made another error."""
    fault = f"it is damaged or of another version ({reason(error)})"
    return InputError(f"{last} cannot be resumed from: {fault}; start another run with --out")


def _train(recipe: Recipe, out: Path, resume: bool, name: str, main: bool) -> None:
    stored = run_folder.stored_recipe(out, name)
    if stored is not None and resume:
        if stored.run.max_minutes is not None:
            recipe = with_epochs(recipe, stored.optim.epochs)
        run_folder.check_resume(stored, recipe, out)
    elif main and any((out / each).exists() for each in run_folder.RUN):
        if resume:
            raise InputError(f"{out} has no recipe.json, without which no run is resumed; give another --out")
        raise InputError(f"{out} holds a run; continue it with --resume, or give another --out")
    last = out / run_folder.LAST if resume and (out / run_folder.LAST).is_file() else None
    if last is None:  # a run of an earlier version goes on with both
        check_balance(recipe)
    tune_cpu()
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
        os.environ["OMP_NUM_THREADS"] = str(recipe.run.threads)  # of further processes; Lightning keeps it
    torch.manual_seed(recipe.run.seed)
    start = replace(recipe.model, pretrained=False, checkpoint=None) if last else recipe.model  # last.ckpt has it all
    setup = get_task(recipe.task).prepare(recipe, start)
    module, model, class_names = setup.module, setup.module.model, setup.module.predictor.class_names
    if setup.val.image_names:  # before unreadable ones are left out
        module.predictor.preprocessing["held_out"] = fingerprint(setup.val.image_names)
    if last:
        history = run_folder.read_history(last, class_names, out)
        try:
            done = run_folder.finished(history, module.score, recipe, out)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise _damaged(last, error) from error
        if done:
            if main:
                run_folder.write_history(history, out)  # in case that it could not be written
                print(done)
            return
    if main and resume:
        print(f"resuming from {last}" if last else f"{out} has nothing to resume from: starting from the beginning")
    report = load_weights(model, start.checkpoint, class_names) if start.checkpoint else None
    build_optimizer(model, recipe.optim)  # rejects a wrong name now, not after the images were read
    folder = run_folder.RunFolder(out, recipe, name, setup.model_args, begun=stored is not None)
    if begin := start.checkpoint or (start.pretrained and own_weights(recipe.model.name)):
        folder.license = license_of(begin)
    trainer = _trainer(recipe, folder)
    loaders = Loaders(setup.train, setup.val, recipe, _share(recipe, trainer.world_size), resumed=last is not None)
    module.steps_per_epoch = loaders.steps_per_epoch  # rejects too few images now, too
    notes = schedule_notes(recipe, module.steps_per_epoch)
    if trainer.world_size > 1:
        synchronise_batchnorm(model, trainer.strategy.root_device)
    if recipe.run.compile:
        model.compile()
    if main:
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{setup.title}: {parameters / 1e6:.2f} M parameters; classes: {len(class_names)}")
        if start.pretrained:
            print(
                f"starting from the weights {own_weights(recipe.model.name) or recipe.model.name}; "
                "--model.pretrained false starts from scratch"
            )
        lines = [*setup.train.notes, *setup.val.notes, *([report] if report else [])]
        for line in dict.fromkeys(lines + notes):  # with --data.holdout, both splits have the notes of their table
            print(line)
    try:
        hint = "use a smaller --optim.batch-size, or smaller images (--data.*)"
        with explained(hint, trainer.world_size), folder.stopping_between_steps(trainer):
            trainer.fit(module, datamodule=loaders, ckpt_path=last, weights_only=True)
    except InputError:
        raise
    except SystemExit as error:  # Lightning's, on SIGTERM and on Ctrl-C
        raise KeyboardInterrupt(f"{folder.kept()}; continue with --resume --out {out}") from error
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        if last is None or folder.stepped:
            raise
        raise _damaged(last, error) from error
    if main and (best := run_folder.best_line(folder.history, module.score, folder.recipe.optim.epochs)):
        print(f"{best}; all in {out}")
        print(f"  dualtoken-vit evaluate {out / run_folder.BEST}")
        print(f"  dualtoken-vit predict {out / run_folder.BEST} IMAGES --out {out / 'predictions'}")
