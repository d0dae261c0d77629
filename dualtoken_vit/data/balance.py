"""Class imbalance: how often images of rare classes are drawn, and their weights in the loss."""

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain

import torch
from torch import Tensor

BETA = 0.999  # of the effective numbers, in the middle of the values that the paper compares


def image_weights(classes: Sequence[Collection[int]], power: float) -> list[float]:
    """How often to draw each image: f ** -power, where f is the share of the images that contain its rarest class.

    With a power of 0.5, these are the repeat factors of LVIS (Gupta et al., arXiv 1908.03195) without their threshold.

    Args:
        classes: those in each image; an image without any has weight 1
        power: between 0 (all alike) and 1 (in classification, each class equally often)
    """
    counts = Counter(chain.from_iterable(map(set, classes)))
    return [max(((len(classes) / counts[each]) ** power for each in image), default=1.0) for image in classes]


def class_weights(kind: str, counts: Tensor, within: Tensor | None = None) -> Tensor | None:
    """The weight of each class in the loss, (classes,); 0 for a class without samples. None for the kind equal: all 1.

    Args:
        kind: inverse: 1 / counts; effective: 1 / (1 - 0.999 ** counts), the inverse of the effective number of samples
            up to a factor (Cui et al., arXiv 1901.05555); both have a mean of 1 over the samples.
            median-frequency: the median of all f / f, where f is the class's share of the images that contain it
            (Eigen and Fergus, arXiv 1411.4734); log: 1 / ln(1.02 + f), where f is its share of all samples (ENet,
            arXiv 1606.02147)
        counts: samples of each class, (classes,): images, objects or pixels
        within: for median-frequency, the pixels of the images that contain each class, (classes,)
    """
    if kind == "equal":
        return None
    if kind == "log":
        weights = 1 / torch.log(1.02 + counts / counts.sum())
    elif kind == "median-frequency":
        assert within is not None
        share = counts / within  # NaN where no image contains it
        weights = share.nanquantile(0.5) / share
    else:
        inverse = 1 / counts.double() if kind == "inverse" else 1 / (1 - BETA ** counts.double())
        weights = inverse * counts.sum() / (inverse * counts).nansum()
    return torch.where(counts > 0, weights, 0).float()
