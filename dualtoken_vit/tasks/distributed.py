"""What several processes share: sums, gathered results, batch normalisation over the whole batch."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

T = TypeVar("T")


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean over the processes, as floating point; of values only, no gradient goes through it."""
    x = x.detach().float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


class AllReduceBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over all processes' batches, which must have equal shapes, on any device.

    torch's SyncBatchNorm needs a GPU. Without this, two processes on a CPU would not train as one does. Applies the
    dropout and activation of timm's layers too.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...)
        if not self.training:
            return self.act(self.drop(super().forward(x)))
        y = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, -1)  # (B, ..., C)
        world, dims = dist.get_world_size(), list(range(x.ndim - 1))
        mean = all_reduce(y.mean(dims)) / world
        var = all_reduce((y - mean).square().mean(dims)) / world
        if self.track_running_stats:
            count = y.numel() // y.shape[-1] * world
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        y = (y - mean) * (var + self.eps).rsqrt()
        if self.affine:
            y = y * self.weight + self.bias
        return self.act(self.drop(y.to(x.dtype).movedim(-1, 1)))


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let batch normalisation see the whole batch when several processes share it; the state dict keeps its keys."""
    if device.type == "cuda":
        return convert_sync_batchnorm(model)
    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        return AllReduceBatchNorm(model).train(model.training)  # a detector's stays in evaluation mode
    for name, child in model.named_children():
        setattr(model, name, synchronise_batchnorm(child, device))
    return model


def gather(found: dict[int, T]) -> dict[int, T]:
    """The results of all the processes, in each of them: image id to result, each image once."""
    parts: list[Any] = [found]
    if dist.is_available() and dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, found)
    merged = {image_id: results for part in parts for image_id, results in part.items()}
    return dict(sorted(merged.items()))  # files should not depend on the number of processes
