"""Parameter groups and learning rate schedules, compared with values computed by hand."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dualtoken_vit.errors import InputError
from dualtoken_vit.models.detectors import create_detector
from dualtoken_vit.models.segmenters import create_segmenter
from dualtoken_vit.recipes import Classification, Optim
from dualtoken_vit.tasks.optim import build_optimizer, ema_update, schedule_factor, schedule_notes


@pytest.fixture(scope="module")
def model():
    return timm.create_model("dualtoken_vit_tiny", local_attention="window", device="meta")


def groups_by_name(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("layer_decay", [None, 0.8])
def test_biases_norms_and_tokens_have_no_weight_decay(model, layer_decay):
    optimizer = build_optimizer(model, Optim(weight_decay=0.04, layer_decay=layer_decay))
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = groups_by_name(model, optimizer)
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or name == "token_embed" or name.endswith("relative_position_bias_table")
        assert groups[name]["weight_decay"] == (0.0 if exempt else 0.04), name
        assert groups[name]["betas"] == (0.9, 0.999)


def test_layer_decay_from_the_head_to_the_stem(model):
    groups = groups_by_name(model, build_optimizer(model, Optim(lr=0.01, layer_decay=0.5)))
    assert groups["head.weight"]["lr"] == 0.01
    # Layers above the stem: 2 + 6 + 4 blocks, the norm with its successors, and the head.
    blocks = [
        f"stages.{stage}.blocks.{block}.mlp.fc1.weight" for stage, n in enumerate((2, 6, 4)) for block in range(n)
    ]
    rates = [groups[name]["lr"] for name in ("stem.proj.weight", *blocks)]
    for low, high in pairwise(rates):
        assert low == pytest.approx(high / 2)
    assert groups["token_embed"]["lr"] == rates[0]


def test_buffers_of_indices_are_not_averaged():
    """Those of window attention: in float32, a mean of equal integers is rounded down at times."""
    model = timm.create_model("dualtoken_vit_tiny", depths=(1, 1, 1), local_attention="window")
    average = AveragedModel(model, multi_avg_fn=ema_update(0.999), use_buffers=True)
    for _ in range(30):
        average.update_parameters(model)
    found = dict(average.module.named_buffers())
    indices = [name for name, value in model.named_buffers() if not value.is_floating_point()]
    assert any(name.endswith("relative_position_index") for name in indices)
    assert all(torch.equal(found[name], value) for name, value in model.named_buffers() if name in indices)


def test_any_timm_optimiser():
    model = torch.nn.Linear(2, 2)
    assert build_optimizer(model, Optim(betas=(0.8, 0.95))).param_groups[0]["betas"] == (0.8, 0.95)
    assert isinstance(build_optimizer(model, Optim(optimizer="sgd")), torch.optim.SGD)
    assert type(build_optimizer(model, Optim(optimizer="lamb"))).__name__ == "Lamb"
    assert build_optimizer(model, Optim(optimizer="adan")).param_groups[0]["betas"] == (0.98, 0.92, 0.99)
    with pytest.raises(InputError, match=r"did you mean .*adamw"):
        build_optimizer(model, Optim(optimizer="adamww"))
    assert isinstance(build_optimizer(model, Optim(optimizer="lookahead_sgd")), timm.optim.Lookahead)
    for name in ("schedulefree_adamw", "typo_muon", "lookahead_typo_sgd", "_sgd"):  # timm would take the last word
        with pytest.raises(InputError, match=rf"^--optim\.optimizer {name}: only lookahead_ may precede"):
            build_optimizer(model, Optim(optimizer=name))
    for name in ("kron", "kronw"):
        with pytest.raises(InputError, match=rf"^--optim\.optimizer {name}: takes tens of gigabytes"):
            build_optimizer(model, Optim(optimizer=name))


def rates(optim, steps_per_epoch):
    optimizer = build_optimizer(torch.nn.Linear(2, 2), optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_factor(optim, steps_per_epoch))
    found = []
    for _ in range(optim.epochs * steps_per_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_then_cosine():
    optim = Optim(lr=1.0, min_lr=0.1, warmup_epochs=0.5, epochs=3)
    found = rates(optim, 8)
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])  # half an epoch is 4 steps
    assert found[4] == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.1)
    for step in range(4, 24):
        assert found[step] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / 19)))


@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(1, 0, 1), (1, 1, 3), (1, 20, 2), (2, 0, 1)])
def test_short_runs(epochs, warmup, steps):
    found = rates(replace(Optim(lr=1.0), epochs=epochs, warmup_epochs=warmup), steps)
    assert all(0 < rate <= 1 for rate in found)


def test_warm_up_in_steps_then_milestones():
    optim = Optim(lr=1.0, warmup_steps=3, warmup_epochs=5, epochs=4, schedule="step", milestones=(2, 3))
    found = rates(optim, 4)
    assert found == pytest.approx([0.25, 0.5, 0.75] + 5 * [1.0] + 4 * [0.1] + 4 * [0.01])


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        (dict(warmup_steps=499), []),
        (dict(warmup_steps=500), ["the warm-up of 500 steps is cut to the 500 of this run"]),
        (dict(warmup_steps=None, warmup_epochs=5), ["the warm-up of 500 steps is cut to the 500 of"]),
        (dict(milestones=(2, 3)), ["--optim.milestones 2 3 is for --optim.schedule step, and not used"]),
        (dict(schedule="step", milestones=(4, 9)), []),
        (dict(schedule="step", milestones=(5, 9)), ["--optim.milestones 5 9: the run ends before"]),
    ],
)
def test_parts_of_a_schedule_that_have_no_effect(optim, said):
    recipe = Classification(optim=replace(Optim(epochs=5, warmup_steps=0), **optim))
    lines = schedule_notes(recipe, 100)
    assert [line.startswith(start) for line, start in zip(lines, said, strict=True)] == [True] * len(said)
    budget = replace(recipe, run=replace(recipe.run, max_minutes=5))  # its length is not known
    assert len(schedule_notes(budget, 100)) == ("is for" in "".join(said))


def test_polynomial_to_the_end():
    found = rates(Optim(lr=1.0, min_lr=0.01, warmup_epochs=0, epochs=2, schedule="poly"), 8)
    assert found == pytest.approx([0.01 + 0.99 * (1 - step / 15) ** 0.9 for step in range(16)])
    assert found[-1] == pytest.approx(0.01)


def test_flat_then_cosine():
    found = rates(Optim(lr=1.0, min_lr=0.1, warmup_steps=2, epochs=2, schedule="flat-cosine"), 8)
    assert found[:2] == pytest.approx([1 / 3, 2 / 3])
    assert found[2:12] == pytest.approx([1.0] * 10)  # three quarters of 16 steps are 12
    assert found[12:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * step / 3)) for step in range(4)])


@pytest.mark.parametrize("schedule", ["cosine", "flat-cosine", "poly"])
def test_no_schedule_rises_after_its_last_step(schedule):
    factor = schedule_factor(Optim(lr=1.0, min_lr=0.1, warmup_epochs=0, epochs=2, schedule=schedule), 3)
    assert [factor(step) for step in (5, 6, 7)] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("decay", [0.6, 0.999])  # reached after three steps, and never
def test_averaged_weights_are_timm_s(decay):
    """Parameters and running statistics as those of ModelEmaV3 with its warm-up."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    average = AveragedModel(model, multi_avg_fn=ema_update(decay), use_buffers=True)
    theirs = ModelEmaV3(model, decay=decay, use_warmup=True)
    for step in range(1, 13):
        for parameter in model.parameters():
            parameter.data.normal_()
        model(torch.randn(4, 3))
        average.update_parameters(model)
        theirs.update(model, step=step)
        expected = theirs.module.state_dict()
        for key, value in average.module.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value, expected[key])
    assert not torch.equal(average.module[0].weight, model[0].weight)


@pytest.mark.parametrize("optimizer", ["muon", "adamuon"])
def test_muon_for_the_matrices_alone(optimizer):
    """Which of timm's two rules updates a parameter shows in the state that it keeps."""
    model = timm.create_model("dualtoken_vit_tiny", local_attention="window", depths=(1, 1, 1), num_classes=5)
    built = build_optimizer(model, Optim(optimizer=optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    built.step()
    for name, parameter in model.named_parameters():
        exempt = (
            parameter.ndim == 1
            or 1 in parameter.shape[:2]  # depth-wise convolutions and single rows, which timm leaves to AdamW too
            or name in ("token_embed", "head.weight", "stem.stride2.0.conv.weight")
            or name.endswith("relative_position_bias_table")
        )
        assert built.state[parameter]["use_muon"] == (not exempt), name


@pytest.mark.parametrize(
    ("build", "kind", "place", "outputs"),
    [
        (create_detector, "retinanet", "backbone.body.model.", ["head.classification_head.cls_logits"]),
        (create_segmenter, "pspnet", "backbone.model.", ["head.1.1", "aux_head.1.1"]),
    ],
)
def test_muon_leaves_the_ends_of_other_tasks_to_adamw(build, kind, place, outputs):
    model = build(kind, "dualtoken_vit_tiny", 5)
    groups = groups_by_name(model, build_optimizer(model, Optim(optimizer="muon")))
    left = {name for name, group in groups.items() if group.get("use_fallback")}
    ends = [f"{place}stem.stride2.0.conv", *outputs]
    expected = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in ends}
    assert left == {*expected, f"{place}token_embed"}
    assert all(f"{end}.weight" in left for end in ends)


@pytest.mark.parametrize("name", ["fusedadamw", "bnbadam8bit", "adahessian"])
def test_optimisers_that_cannot_be_used_here(name):
    with pytest.raises(InputError, match=rf"^--optim\.optimizer {name}: "):
        build_optimizer(nn.Linear(2, 2), Optim(optimizer=name))


@pytest.mark.parametrize("steps", range(1, 20))
def test_a_flat_schedule_ends_at_the_lowest_rate(steps):
    factor = schedule_factor(Optim(lr=1.0, min_lr=0.1, schedule="flat-cosine", epochs=1, warmup_epochs=0), steps)
    factors = [factor(step) for step in range(steps)]
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(0.1 if steps > 1 else 1)
    assert factors == sorted(factors, reverse=True)
