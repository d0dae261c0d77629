"""What several test files share."""

import timm
import torch

import dualtoken_vit  # noqa: F401  registers the models


def create(name="dualtoken_vit_tiny", depths=(1, 1, 1), num_classes=5, **kwargs):
    """A shallow model in evaluation mode whose every weight and statistic is far from its initial value.

    As initialised, most branches add next to nothing, and a test of values would not notice one that is wrong.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, depths=depths, num_classes=num_classes, **kwargs).eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif value.is_floating_point():
            fan_in = value[0].numel() if value.ndim > 1 else 10
            value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype) / fan_in**0.5)
    return model
