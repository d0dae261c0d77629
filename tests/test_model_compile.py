"""Networks in other forms: fused attention, torch.compile, TorchScript, fx, feature extraction."""

import copy
from unittest import mock

import pytest
import timm
import torch
from helpers import create
from timm.layers import get_notrace_functions, get_notrace_modules, set_fused_attn
from timm.utils import AttentionExtract
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention as fused_attention
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from variants import NARROW, VARIANTS

ANY_SIZE = torch.__version__ >= (2, 14)
"""A graph fits any size. PyTorch 2.12 compiles one for each combination of odd and even maps in `avg_pool2d`."""


@pytest.fixture
def unfused():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


# Attention


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_fused_attention_equals_unfused(kwargs):
    model = create(**kwargs).double()
    attentions = [m for m in model.modules() if hasattr(m, "fused_attn")]
    assert all(m.fused_attn for m in attentions)
    x = torch.randn(2, 3, 97, 70, dtype=torch.float64)
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=fused_attention) as spy:
        fused = model(x)
        calls = 3 if kwargs.get("name") == "lightvit_tiny" else 1  # windows, aggregation and broadcast in one module
        assert spy.call_count == calls * len(attentions)
        for m in attentions:
            m.fused_attn = False
        unfused = model(x)
        assert spy.call_count == calls * len(attentions)
    torch.testing.assert_close(unfused, fused, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("method", ["fx", "hook"])
def test_attention_extract_sees_the_broadcast(method):
    model = create("dualtoken_vit_tiny_mix")
    maps = AttentionExtract(model, method=method)(torch.randn(2, 3, 224, 224))
    end = {"fx": "softmax", "hook": "attn_drop"}[method]
    for stage, (heads, positions) in enumerate(((2, 28 * 28), (4, 14 * 14), (8, 7 * 7))):
        broadcast = maps[f"stages.{stage}.blocks.0.broadcast_attn.{end}"]
        assert broadcast.shape == (2, heads, positions, 49)
        torch.testing.assert_close(broadcast.sum(-1), torch.ones(2, heads, positions))
        assert maps[f"stages.{stage}.blocks.0.aggregate_attn.{end}"].shape == (2, heads, 49, 49)
    assert len(maps) == 6
    # The extracted map is the one that the block uses, computed here from the inputs of the block.
    block, inputs = model.stages[2].blocks[0], []
    block.broadcast_attn.register_forward_hook(lambda module, args, output: inputs.extend(args))
    torch.manual_seed(0)
    x = torch.randn(2, 3, 224, 224)
    maps = AttentionExtract(model, method=method)(x)
    inputs.clear()
    model(x)
    q = block.broadcast_attn.q(inputs[0]).reshape(2, 49, 8, 24)
    k = block.broadcast_attn.kv(inputs[1])[..., :192].reshape(2, 49, 8, 24)
    expected = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 24**0.5).softmax(-1)
    torch.testing.assert_close(maps[f"stages.2.blocks.0.broadcast_attn.{end}"], expected)


# Compilers


@pytest.mark.slow
def test_compile_runs_any_batch_and_size_in_one_graph(avx512):
    torch.compiler.reset()
    model = create("dualtoken_vit_tiny_mix", **NARROW)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch, *size in [(2, 64, 96), (3, 33, 47), (4, 97, 131), (2, 72, 224), (3, 224, 224)]:
            x = torch.randn(batch, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
    if ANY_SIZE:
        assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_stays_within_its_limit_with_batches_of_one_in_between(avx512):
    torch.compiler.reset()
    model = create("dualtoken_vit_tiny_mix", **NARROW)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch, *size in [(1, 32, 32), (16, 64, 64), (2, 33, 47), (1, 97, 131), (3, 224, 160)]:
            x = torch.randn(batch, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
    # One graph for a batch of one, one for maps of 1x1, whose sizes are then constants, ...: not one for each input.
    if ANY_SIZE:
        assert counter.frame_count < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [{}, dict(token_mlp="mix", local_attention="window", downsampling="onestep"), dict(global_tokens="normal")],
    ids=str,
)
def test_compile_trains_without_a_graph_break(kwargs):
    torch.compiler.reset()
    model = create(**NARROW, **kwargs).train()
    reference = copy.deepcopy(model)
    x = torch.randn(2, 3, 33, 64)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    reference(x).square().sum().backward()
    for actual, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kwargs", [*VARIANTS, dict(output_stride=8)], ids=str)
def test_torchscript(kwargs):
    model = create(**NARROW, **kwargs)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in (64, 64), (33, 47), (224, 224):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (1,), (2, 3)], ids=str)
def test_features_torchscript(out_indices):
    model = timm.create_model(
        "dualtoken_vit_tiny", depths=(1, 1, 1), features_only=True, out_indices=out_indices
    ).eval()
    x = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("kwargs", [*VARIANTS, dict(output_stride=8)], ids=str)
def test_fx(kwargs):
    model = create(**NARROW, **kwargs)
    tracer = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    last = get_graph_node_names(model, tracer_kwargs=tracer)[1][-1]
    traced = create_feature_extractor(model, {last: "logits"}, tracer_kwargs=tracer)
    with torch.no_grad():
        for size in (64, 64), (33, 47), (224, 224):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(traced(x)["logits"], model(x), rtol=0, atol=0)
