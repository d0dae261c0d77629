"""What predictors return: plain numpy, so that it can be used, stored and compared without torch."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Classes:
    """The most likely classes of an image, the best first."""

    names: tuple[str, ...]
    labels: np.ndarray
    """(K,) int64: indices into the network's classes."""
    probabilities: np.ndarray
    """(K,) float32."""

    @property
    def name(self) -> str:
        """The most likely class."""
        return self.names[0]

    @property
    def probability(self) -> float:
        """Its probability."""
        return float(self.probabilities[0])


@dataclass(frozen=True)
class Labels:
    """The labels of an image, the most likely first; there may be none."""

    names: tuple[str, ...]
    labels: np.ndarray
    """(K,) int64: indices into the network's classes."""
    probabilities: np.ndarray
    """(K,) float32."""
    all_probabilities: np.ndarray
    """(classes,) float32: also of classes below their threshold."""


@dataclass(frozen=True)
class Objects:
    """The objects in an image, in its own pixels, the best first."""

    names: tuple[str, ...]
    """Class of each object."""
    labels: np.ndarray
    """(N,) int64: indices into the network's classes."""
    boxes: np.ndarray
    """(N, 4) float32: left, top, right, bottom."""
    scores: np.ndarray
    """(N,) float32."""
    masks: np.ndarray | None = None
    """(N, H, W) bool, for instance segmentation."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LabelMap:
    """The class of each pixel of an image."""

    class_names: tuple[str, ...]
    labels: np.ndarray
    """(H, W) uint8: indices into class_names."""

    def shares(self) -> dict[str, float]:
        """The share of the image of each class that is in it, the largest first."""
        shares = np.bincount(self.labels.ravel(), minlength=len(self.class_names)) / self.labels.size
        order = np.argsort(-shares, kind="stable").tolist()
        return {self.class_names[k]: round(float(shares[k]), 6) for k in order if shares[k] > 0}
