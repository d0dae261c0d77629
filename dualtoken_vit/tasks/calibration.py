"""Whether a classifier's probabilities are right (Guo et al., On Calibration of Modern Neural Networks, 1706.04599)."""

import math

import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

BINS = 15  # of confidence, as in the paper
HOTTEST = 20  # temperature that is searched for


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature, between 1 / `HOTTEST` and `HOTTEST`, with the lowest cross-entropy.

    It is that of logits (N, classes) / temperature.
    """
    logits, targets = logits.cpu().double(), targets.cpu()  # not every accelerator has float64

    def loss(log: float) -> float:
        return F.cross_entropy(logits / math.exp(log), targets).item()

    bound = math.log(HOTTEST)
    return math.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-5}).x)
