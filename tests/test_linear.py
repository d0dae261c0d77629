import pytest
import torch
import torch.nn.functional as F

from dualtoken_vit.models.layers import goes_to_onednn, linear

two_threads = pytest.mark.parametrize("threads", [2], indirect=True)


@two_threads
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("shape", [(2, 24, 24, 48), (3, 400, 24)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_the_convolution_equals_the_linear_map(threads, shape, biased):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(36, shape[-1], requires_grad=True)
    bias = torch.randn(36, requires_grad=True) if biased else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    assert goes_to_onednn(x)
    y = linear(x, weight, bias)
    assert y.is_contiguous()
    expected = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    grads, wanted = torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g.double())
    for actual, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-4)


@two_threads
def test_when_linear_remains_a_matrix_product(threads, monkeypatch):
    large = torch.zeros(1, 32, 32, 48)
    assert goes_to_onednn(large)
    assert not goes_to_onednn(large[:, :8])  # small
    assert not goes_to_onednn(large.bfloat16())
    assert not goes_to_onednn(large.double())
    assert not goes_to_onednn(large.to("meta"))
    torch.set_num_threads(1)
    assert not goes_to_onednn(large)
    torch.set_num_threads(2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not goes_to_onednn(large)
