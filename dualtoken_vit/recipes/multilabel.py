"""Recipes of multi-label image classification: an image has any number of labels."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from dualtoken_vit.recipes.base import FREE, Model, Recipe, Share, Side, SplitData, register
from dualtoken_vit.recipes.classification import ADAMW, FOLDER, ClassificationInput, ImageAugment


@dataclass(frozen=True)
class MultiLabelData(ClassificationInput, SplitData):
    """The images and their labels."""

    contents: ClassVar[str] = "a CSV or Parquet table and its images"
    one_table: ClassVar[bool] = True
    dataset: str = "table"
    """table: images, and a CSV or Parquet table of files and labels; shapes: generated images."""
    root: Annotated[str, FREE] = ""
    """Folder with tables for the splits, or one with a column split; or one table."""
    separator: str = ","
    """What stands between the labels in a cell of the table."""
    balanced: Share = 0.0
    """Class-balanced sampling: an epoch draws as many images as there are, each in proportion to f ** -balanced, where
    f is the share of the images that have its rarest label. 0: every image once."""
    start_size: Annotated[int | None, Side] = None
    """Progressive resizing, as in classification. None: always image_size."""


@dataclass(frozen=True)
class MultiLabelAugment(ImageAugment):
    """Training augmentation (timm's transforms)."""

    hflip: Share = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True)
class MultiLabel(Recipe):
    """A multi-label classification run."""

    task: ClassVar[str] = "multilabel"
    loss: Literal["bce", "asymmetric"] = "bce"
    """bce: binary cross-entropy of each label; asymmetric: ASL (arXiv 2009.14119), for many labels of which few are
    present, with timm's parameters."""
    class_weights: Literal["equal", "inverse", "effective"] = "equal"
    """Loss weight of the images that have a label, if n training images have it, up to a common factor. equal: 1;
    inverse: 1 / n; effective: 1 / (1 - 0.999 ** n) (arXiv 1901.05555). Images without it have 1. An alternative to
    data.balanced: not with it."""
    data: MultiLabelData = MultiLabelData()
    augment: MultiLabelAugment = MultiLabelAugment()


register(
    MultiLabel,
    {
        "demo-multilabel": (
            "Label generated images of several shapes: no files.",
            MultiLabel(
                model=Model(args=("depths=(1,2,1)",)),
                data=MultiLabelData(dataset="shapes", image_size=64, crop_pct=1.0),
                augment=MultiLabelAugment(scale=(0.8, 1.0)),
                optim=replace(ADAMW, epochs=6),
            ),
        ),
        "multilabel": (
            "Images with several labels: CSV or Parquet in ROOT.",
            MultiLabel(
                model=FOLDER.model,
                data=MultiLabelData(crop_pct=1.0),
                augment=MultiLabelAugment(scale=(0.35, 1.0)),
                optim=FOLDER.optim,
            ),
        ),
    },
)
