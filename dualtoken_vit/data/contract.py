"""What training and evaluation need from a dataset, and the choice of its format by `--data.dataset`."""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from dualtoken_vit.data.splits import split_of
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import counted, printable, similar

Split = TypeVar("Split")


class ImageData(Protocol):
    """The dataset of any task. A class that inherits from it gets the defaults given here.

    It is either a map-style `Dataset`, whose `dataset[i]` is sample i, or a `streams.ImageStream`.
    """

    class_names: tuple[str, ...]
    image_names: Sequence[str] = ()  # display name of each image; empty for a stream
    transform: Callable[..., Any] | None = None  # applied to each sample as it is read
    groups: Sequence[int] | None = None  # a number for each image; only images of one number share training batches
    weights: Sequence[float] | None = None  # how often each is drawn for training, relatively; None: once per epoch
    notes: tuple[str, ...] = ()  # lines to print before training or evaluation: absent classes, skipped files
    splits: Sequence[str] = ()  # names of the splits that can be read from the same data, if its format lists them

    def __len__(self) -> int:
        """Number of images."""
        raise NotImplementedError

    def verify(self, skip: bool = False) -> list[str]:
        """Read every image once, with a progress bar; returns the display names of the images left out.

        With `skip`, where the task supports it, images that cannot be read are left out.

        Raises:
            InputError: names the first image that cannot be used, and the number of others.
        """
        return []

    def state_dict(self) -> dict[str, Any]:
        """What `verify` found, in plain data and tensors, for other processes and a resumed run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Apply another dataset's `state_dict`, in place of `verify`. The data may have moved to another folder."""
        return None


class Formats(dict[str, Callable[..., Split]]):
    """The formats of one kind of data: name to reader. A reader takes a recipe's data section, "train" or "val", ..."""

    def read(self, data: Any, split: str, *args: Any) -> Split:
        """A split in the format that `--data.dataset` names, NAME or NAME/REST; an InputError for an unknown one."""
        kind = data.dataset.partition("/")[0].lower()
        if kind not in self:
            raise InputError(f"--data.dataset {data.dataset}: unknown format; choose from {', '.join(self)}")
        return self[kind](data, split, *args)


def split_name(data: Any, split: str) -> str:
    """The name that a recipe's data section gives to the train or val split."""
    return {"train": data.train_split, "val": data.val_split}[split]


def other_splits(split: str, names: Sequence[str]) -> str:
    """What to give in place of a missing train or val split (`split`), where there are these."""
    flag = f"--data.{split}-split"
    return f"there is {', '.join(map(printable, names))}: give {flag} NAME" if names else f"see {flag}"


def unread_test_split(data: Any, splits: Iterable[str]) -> str | None:
    """The name of the test split among `splits`, unless it is the one that the data section validates on."""
    test = next((name for name in splits if split_of(name) == "test"), None)
    return None if test is None or split_of(data.val_split) == "test" else test


def check_splits(data: Any) -> None:
    """Raise an InputError for other splits than train and val, where a dataset has no others."""
    if (data.train_split, data.val_split) != ("train", "val"):
        flags = "--data.train-split and --data.val-split"
        raise InputError(f"--data.dataset {data.dataset} has the splits train and val; leave out {flags}")


def check_drawn(data: Any, kind: str, named: bool = False) -> None:
    """Raise an InputError for fields that name files (`root`, or `named`) where images are drawn; `kind` reads them."""
    if data.root or named:
        raise InputError(f"--data.dataset {data.dataset} draws its own images; for files give --data.dataset {kind}")
    check_splits(data)


def hold_out(names: Sequence[str], share: float, held: bool) -> list[int]:
    """The positions of `share` of the images of these names if `held`, else of the others: the same in every run."""
    if len(names) < 2:
        raise InputError(f"--data.holdout {share}: there are fewer than two images")
    ordered = sorted(range(len(names)), key=lambda index: names[index].replace(os.sep, "/"))  # on every system
    chosen = set(random.Random(0).sample(ordered, round(share * len(names)) or 1))
    return [index for index in range(len(names)) if (index in chosen) == held]


def fingerprint(names: Iterable[str]) -> str:
    """Identifies a set of images by their file names; neither their order nor their folders matter."""
    return hashlib.sha256("\0".join(sorted(map(os.path.basename, names))).encode(errors="replace")).hexdigest()


def check_trained(
    names: Iterable[str], trained: Sequence[str], where: str, remedy: str = "rename or remove it"
) -> None:
    """Raise an InputError for names that are not among the trained classes; `where` is their place and kind."""
    known = set(trained)
    unknown = [name for name in names if name not in known]
    if unknown:
        message = f"{where} {some(unknown)} is not among the {counted(len(trained), 'trained class')}: {some(trained)}"
        hint = similar(unknown[0], trained, "'") if len(unknown) == 1 else ""
        raise InputError(f"{message}; {remedy}{hint and f' ({hint})'}")


def some(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{printable(name)}'" for name in names[:5]) + more
