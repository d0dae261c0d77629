"""Masks in files that several tests share."""

import numpy as np
from PIL import Image

from dualtoken_vit.data.segmentation import build_datasets
from dualtoken_vit.recipes import SegmentationData


def data(tree, **args):
    return SegmentationData(root=str(tree), **args)


def drawn(size, **args):
    return build_datasets(SegmentationData(dataset="shapes", crop_size=(size, size), **args), 3)


def labels_of(tree, name="0"):
    return np.asarray(Image.open(tree / "annotations" / "train" / f"{name}.png"))


def spoil(tree, change, name="0", mode=None):
    labels = change(labels_of(tree, name).copy())
    Image.fromarray(labels, mode).save(tree / "annotations" / "train" / f"{name}.png")


# Mistakes


def mean_label(labels):
    labels[3, 4:7] = 7
    labels[5, 5] = 9
    return labels
