"""Knowledge distillation: a classifier learns from the logits of a trained one."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from dualtoken_vit.checkpoint import read_checkpoint
from dualtoken_vit.data.contract import some
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.backbone import pretrained_cfg, statistics
from dualtoken_vit.recipes import Classification, Model
from dualtoken_vit.tasks.base import Task
from dualtoken_vit.tasks.networks import check_sizes, create_model
from dualtoken_vit.tasks.predictor import Predictor


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature ** 2 * KL(teacher || logits) of the softmax of logits / temperature, mean over the images.

    The square keeps the size of the gradients (Hinton et al., arXiv 1503.02531, section 2). Both are (B, classes).
    """
    ours, theirs = ((each.float() / temperature).log_softmax(-1) for each in (logits, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class Teacher:
    """A trained classifier in evaluation mode, as a function of the images that another one is trained on.

    Not an nn.Module: it is neither averaged, saved nor trained with the module that holds it.

    Args:
        model: the classifier
        rows: the index of each class of the data among its classes
        own, given: mean and standard deviation, (C,) each, of its images and of those that it is called with
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[int], own: dict[str, Sequence[float]], given: dict[str, Sequence[float]]
    ):
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.rows = torch.tensor(rows)
        mean, std = (torch.tensor(own[key]).view(-1, 1, 1) for key in ("mean", "std"))
        given_mean, given_std = (torch.tensor(given[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.scale, self.shift = given_std / std, (given_mean - mean) / std
        weights = (value.cpu().numpy().tobytes() for value in model.state_dict().values())
        self.digest = hashlib.sha256(b"".join(weights)).hexdigest()
        """Identifies the weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # weight averaging copies the module

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:  # (B, C, S, S) -> logits (B, classes)
        self.scale, self.shift, self.rows = (each.to(x.device) for each in (self.scale, self.shift, self.rows))
        x = x * self.scale + self.shift
        return self.model.to(x.device)(x.contiguous(memory_format=torch.channels_last))[:, self.rows]


def load_teacher(task: Task[Classification], recipe: Classification, student: Predictor[Any]) -> Teacher:
    """The recipe's teacher for the classes and images of `student`.

    Raises:
        InputError: for a file or name that cannot be loaded, or a teacher of other classes, channels or image sizes.
    """
    name, channels, size = recipe.distill.teacher or "", student.channels, recipe.data.image_size
    flag = f"--distill.teacher {name}"
    if Path(name).exists() or name.endswith(".safetensors"):
        checkpoint = read_checkpoint(name)
        if checkpoint.task != task.name:
            raise InputError(f"{flag} is trained for {checkpoint.task}, not for {task.name}")
        if checkpoint.preprocessing["input_size"][0] != channels:
            raise InputError(f"{flag} needs --model.in-chans {checkpoint.preprocessing['input_size'][0]}")
        model, names, own = task.restore(checkpoint, name), checkpoint.class_names, checkpoint.preprocessing
    else:
        try:
            model, _ = create_model(Model(name, in_chans=recipe.model.in_chans, pretrained=True), None, size)
        except InputError as error:
            raise InputError(str(error).replace("--model.name", "--distill.teacher")) from error
        cfg, subset = pretrained_cfg(model), infer_imagenet_subset(model)
        names = tuple(cfg.get("label_names") or (ImageNetInfo(subset).label_names() if subset else ()))
        own = statistics(cfg, channels)
    check_sizes(model, channels, size, recipe.data.start_size)
    if missing := [each for each in student.class_names if each not in names]:
        theirs = f"its classes are {some(names)}" if names else "it does not name its classes"
        raise InputError(f"{flag} does not predict class {some(missing)} of the data; {theirs}")
    return Teacher(model, [names.index(each) for each in student.class_names], own, student.preprocessing)
