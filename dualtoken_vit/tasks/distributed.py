"""What several processes share: sums, gathered results, batch normalisation over the whole batch."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

T = TypeVar("T")


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean over the processes, as floating point; of values only, no gradient goes through it."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


class _Normalise(torch.autograd.Function):
    """Batch normalisation by the mean and variance of all processes' batches, in one exchange each way.

    The arithmetic is torch's own kernels'; only the statistics are exchanged.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: float,  # values of a channel in a process, on average
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, var = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # As if mean and variance were constants; dweight is the sum of dy * (x - mean) / std, dbias that of dy.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        along, shift = mean_over_processes(torch.stack([dweight, dbias])) / ctx.count
        inverse = (var + ctx.eps).rsqrt()
        slope = along * inverse
        slope, offset = (each * scale * inverse for each in (slope, shift - slope * mean))
        shape = (1, -1, *[1] * (x.ndim - 2))
        dx -= torch.addcmul(offset.view(shape), x, slope.view(shape)).to(dx.dtype)
        return dx, *((None, None) if weight is None else (dweight, dbias)), None, None, None, None


class AllReduceBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over all processes' batches, which may have different shapes, on any device.

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

    @torch.compiler.disable
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Mean and biased variance of each channel over all processes, (C,), and how many values a process has of each.

        The number is the mean over the processes. Updates the running mean and variance.
        """
        y = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        mean, var = torch.batch_norm_update_stats(y, None, None, 0.0)
        own = torch.stack((mean, var, torch.full_like(mean, y.numel() // y.shape[1])))
        world = dist.get_world_size()
        found = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(found, own)
        means, variances, counts = torch.stack(found).unbind(1)  # (world, C)
        total = counts[:, 0].sum().item()
        shares = counts / total
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        if self.track_running_stats:
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
        return mean, var, total / world

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...)
        if not self.training:
            return self.act(self.drop(super().forward(x)))
        y = _Normalise.apply(x, self.weight, self.bias, *self._statistics(x), self.eps)
        return self.act(self.drop(y))


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
