"""segmentation_models_pytorch uses the model by name, like any other timm encoder."""

import pytest
import torch

smp = pytest.importorskip("segmentation_models_pytorch")

import dualtoken_vit  # noqa: E402, F401  registers the models

ARCHITECTURES = ["Unet", "UnetPlusPlus", "FPN", "UPerNet", "PSPNet", "Linknet", "MAnet", "DeepLabV3", "DeepLabV3Plus"]


def create(architecture, **kwargs):
    kwargs = dict(depths=(1, 1, 1)) | kwargs
    encoder = dict(encoder_name="tu-dualtoken_vit_tiny", encoder_weights=None)
    return smp.create_model(architecture, **encoder, classes=4, **kwargs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_segments_any_size(architecture):
    model = create(architecture).eval()
    with torch.no_grad():
        for size in (96, 96), (224, 224), (256, 256), (160, 224):
            out = model(torch.randn(1, 3, *size))
            assert out.shape == (1, 4, *size)
            assert out.isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_segmenter_trains(architecture):
    model = create(architecture).train()
    model(torch.randn(2, 3, 96, 96)).square().mean().backward()
    assert [name for name, p in model.encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("architecture", "output_stride"), [("DeepLabV3", 8), ("DeepLabV3", 16), ("DeepLabV3Plus", 16)]
)
def test_dilated_encoder(architecture, output_stride):
    """DeepLab requests an `output_stride` from timm; the last map then has that stride."""
    model = create(architecture, encoder_output_stride=output_stride).eval()
    with torch.no_grad():
        maps = model.encoder(torch.randn(1, 3, 96, 64))
    assert maps[-1].shape == (1, 192, 96 // output_stride, 64 // output_stride)


def test_encoder_is_the_pyramid():
    encoder = create("Unet", in_channels=1).encoder.eval()
    assert encoder.out_channels == [1, 24, 24, 48, 96, 192]
    x = torch.randn(1, 1, 64, 96)
    with torch.no_grad():
        maps = encoder(x)
        expected = encoder.model.model.forward_intermediates(x, intermediates_only=True)
    assert maps[0] is x
    for actual, wanted, stride in zip(maps[1:], expected, (2, 4, 8, 16, 32), strict=True):
        assert actual.shape[-2:] == (64 // stride, 96 // stride)
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
