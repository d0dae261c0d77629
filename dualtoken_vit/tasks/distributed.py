"""What several processes share: sums, gathered results, batch normalisation over the whole batch."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

T = TypeVar("T")


class _AllReduce(torch.autograd.Function):
    """The sum over the processes, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean over the processes, as floating point; of values only, no gradient goes through it."""
    x = x.detach().float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


class AllReduceBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batches of all processes, on any device (torch's SyncBatchNorm wants a GPU).

    Every process must have a batch of the same shape. Followed by the dropout and activation of timm's layer.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...)
        if not self.training:
            return self.act(self.drop(super().forward(x)))
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # statistics of half precision would be poor
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        world = dist.get_world_size()
        count = x.numel() // x.shape[1] * world
        mean = _AllReduce.apply(x.mean(dims)) / world
        centred = x - mean.view(shape)
        var = _AllReduce.apply(centred.square().mean(dims)) / world
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
        x = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return self.act(self.drop(x.to(dtype)))


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
