import operator
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from dualtoken_vit.models import layers
from dualtoken_vit.models.layers import Linear, goes_to_onednn, is_intel, linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.mark.parametrize("shape", [(2, 24, 24, 48), (3, 400, 48)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_onednn_computes_the_linear_map_and_its_gradients(avx512, threads, shape, biased, contiguous):
    torch.manual_seed(0)
    x = torch.randn(shape)
    x = (x if contiguous else x.mT.contiguous().mT).requires_grad_()
    weight = torch.randn(72, shape[-1], requires_grad=True)
    bias = torch.randn(72, requires_grad=True) if biased else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    assert goes_to_onednn(x, weight)
    y = linear(x, weight, bias)
    assert y.is_contiguous()
    expected = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    grads, wanted = torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g.double())
    for actual, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight, bias), y)


def test_gradients_only_where_needed_and_of_gradients(avx512):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 24, 24, 48), torch.randn(72, 48, requires_grad=True)

    def penalty(of):
        (grad,) = torch.autograd.grad(of(x, weight, None).square().mean(), weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    torch.testing.assert_close(penalty(linear), penalty(F.linear), rtol=1e-3, atol=1e-6)


def test_functional_transforms_use_the_matrix_product(avx512):
    x, weight = torch.randn(2, 24, 24, 48), torch.randn(72, 48)
    torch.testing.assert_close(torch.func.vmap(lambda each: linear(each, weight, None))(x), F.linear(x, weight))


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_derivatives(avx512, grad):
    x, weight, tangent = torch.randn(2, 24, 24, 48), torch.randn(72, 48), torch.randn(2, 24, 24, 48)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        y = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, tangent), weight, None))
        torch.testing.assert_close(y.tangent, F.linear(tangent, weight))


def test_several_gradients_at_once(avx512):
    x, weight = torch.randn(2, 24, 24, 48, requires_grad=True), torch.randn(72, 48, requires_grad=True)
    g = torch.randn(3, 2, 24, 24, 72)
    found, expected = (
        torch.autograd.grad(of(x, weight, None), (x, weight), g, is_grads_batched=True) for of in (linear, F.linear)
    )
    for actual, want in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-4)


def test_a_wrong_number_of_channels_is_pytorchs_error(avx512):
    x, weight = torch.randn(2, 24, 24, 40), torch.randn(72, 48)
    with pytest.raises(RuntimeError) as expected:
        F.linear(x, weight)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        linear(x, weight, None)


@pytest.mark.parametrize("shape", [(2048,), (2048, 64), (1, 2048, 64), (2, 32, 32, 64), (2, 2, 16, 32, 64)], ids=str)
def test_any_number_of_dimensions(avx512, shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(2**17 // shape[-1] * 16, shape[-1])
    compiled = torch.compile(linear, backend="eager", fullgraph=True, dynamic=True)
    expected = F.linear(x, weight)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    for of in (linear, compiled):
        y = of(x, weight, None)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-2)


def test_a_compiled_layer_is_a_convolution_alone(avx512):
    """Another function in the graph would keep it from PyTorch's cache of compiled graphs."""
    targets = set()

    def backend(graph, inputs):
        targets.update(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(Linear(256, 256), backend=backend, fullgraph=True)(torch.randn(1, 16, 16, 256))
    # With PyTorch 2.11, timm cannot tell a compiled network from an exported one.
    assert targets == ({operator.getitem, torch.conv2d} if torch.__version__ >= (2, 12) else {torch._C._nn.linear})


def test_weights_with_a_rule_of_their_own(avx512):
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            y = super().__torch_function__(func, types, args, kwargs or {})
            return 2 * y if func is F.linear else y

    x, weight = torch.randn(2, 24, 24, 48), torch.randn(72, 48)
    y = linear(x, nn.Parameter(weight.as_subclass(Doubled)), None)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), 2 * F.linear(x, weight))


@pytest.mark.parametrize("biased", [True, False])
def test_pytorch_counts_its_flops(avx512, biased):
    x, weight = torch.randn(2, 24, 24, 48, requires_grad=True), torch.randn(72, 48, requires_grad=True)
    bias = torch.randn(72) if biased else None
    with FlopCounterMode(display=False) as found:
        linear(x, weight, bias).sum().backward()
    with FlopCounterMode(display=False) as expected:
        F.linear(x, weight, bias).sum().backward()
    assert found.get_total_flops() == expected.get_total_flops() == 3 * 2 * 2 * 24 * 24 * 48 * 72
    assert torch.ops.mkldnn._linear_pointwise in found.get_flop_counts()["Global"]


def test_autocast_decides_the_precision(avx512):
    x, weight = torch.randn(2, 24, 24, 48), torch.randn(72, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="PyTorch without the names of processors")
def test_the_vendor_is_that_which_pytorch_finds():
    assert is_intel() == torch.cpu.get_capabilities().get("cpu_name", "").startswith("Intel")


def test_when_linear_remains_a_matrix_product(avx512, monkeypatch):
    large, weight = torch.zeros(1, 32, 32, 48), torch.zeros(48, 48)
    assert goes_to_onednn(large, weight)
    assert not goes_to_onednn(large[:, :8], weight)  # small
    assert not goes_to_onednn(large.bfloat16(), weight.bfloat16())
    assert not goes_to_onednn(large.double(), weight.double())
    assert not goes_to_onednn(large.to("meta"), weight.to("meta"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert not goes_to_onednn(large, weight)
    with monkeypatch.context() as patch:
        patch.setattr(layers, "is_intel", lambda: True)  # MKL has AVX-512
        assert not goes_to_onednn(large, weight)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not goes_to_onednn(large, weight)
