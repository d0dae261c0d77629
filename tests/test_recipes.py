"""Recipes as data: bounds on every field, conversion to and from JSON, and the registry."""

import json
import math
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from inspect import get_annotations
from types import UnionType
from typing import Annotated, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Interval

from dualtoken_vit.bounds import check_bounds
from dualtoken_vit.errors import InputError
from dualtoken_vit.hints import fits
from dualtoken_vit.recipes import (
    ABOUT,
    KINDS,
    RECIPES,
    Classification,
    ClassificationAugment,
    ClassificationData,
    ClassificationInput,
    Detection,
    DetectionInput,
    Model,
    Optim,
    Recipe,
    Run,
    Segmentation,
    SegmentationData,
    SegmentationInput,
    flatten,
    free_on_resume,
    from_dict,
    register,
    to_dict,
)


def is_numeric(hint):
    """Whether a type hint admits an int or a float; a Literal lists its numbers itself."""
    if get_origin(hint) in (Union, UnionType, tuple):
        return any(map(is_numeric, get_args(hint)))
    return hint in (int, float)


def numeric_fields(cls, section=""):
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            yield from numeric_fields(hint, f"{name}.")
        elif is_numeric(hint):
            yield section + name, hint


NUMERIC = [(task, name, hint) for task, kind in KINDS.items() for name, hint in numeric_fields(kind)]


def with_value(recipe, name, value):
    section, _, field = name.rpartition(".")
    return replace(
        recipe, **({section: replace(getattr(recipe, section), **{field: value})} if section else {field: value})
    )


@pytest.mark.parametrize(("task", "name", "hint"), NUMERIC, ids=[f"{task}-{name}" for task, name, _ in NUMERIC])
def test_every_numeric_field_has_bounds(task, name, hint):
    recipe = KINDS[task]()
    default = flatten(recipe)[name]
    scale = 1.0 if float in (hint, *get_args(hint)) else 1
    for number in (-(10**15) * scale, 10**15 * scale, math.nan, math.inf, -math.inf):
        values = [number]
        if get_origin(hint) is tuple:  # every position
            default = default or (1,)
            values = [(*default[:i], number, *default[i + 1 :]) for i in range(len(default))]
        for value in values:
            with pytest.raises(InputError) as caught:
                check_bounds(with_value(recipe, name, value))
            problem = str(caught.value).removeprefix(f"--{name.replace('_', '-')} {number}: must be ").split()[0]
            assert problem in (("at", "above", "below") if math.isfinite(number) else ("finite",)), caught.value


@pytest.mark.parametrize(
    ("task", "name", "inside", "outside"),
    [
        ("classification", "model.drop_path_rate", (0, 0.99), (-0.01, 1)),
        ("classification", "data.image_size", (1, 4096), (0,)),
        ("classification", "data.start_size", (None, 1), (0,)),
        ("classification", "data.crop_pct", (0.1, 1.0), (0.0, 1.1)),
        ("classification", "data.holdout", (0, 0.5), (-0.1, 0.51)),
        ("classification", "data.balanced", (0, 0.5, 1), (-0.1, 1.1)),
        ("classification", "data.workers", (0, 64), (-1,)),
        ("classification", "augment.scale", ((0.5, 0.5), (0.1, 1)), ((0.5, 4.0), (0.0, 1.0), (0.9, 0.2))),
        ("classification", "augment.ratio", ((1, 1), (0.5, 2)), ((0.0, 1.0), (2.0, 0.5))),
        ("classification", "augment.hflip", (0, 1, "alternate"), (-0.1, 1.1)),
        ("classification", "augment.color_jitter", (0, 0.4), (-1.0,)),
        ("classification", "augment.label_smoothing", (0, 1), (-0.1, 1.1)),
        ("classification", "optim.lr", (1e-9, 10), (0.0, -1e-3)),
        ("classification", "optim.betas", ((0, 0), (0.9, 0.999)), ((0.9, 1.0), (0.9, 1.5), (-0.1, 0.9))),
        ("classification", "optim.warmup_epochs", (0, 0.5), (-0.5,)),
        ("classification", "optim.milestones", ((), (1, 2)), ((0,), (1, -2))),
        ("classification", "optim.clip_grad", (None, 1.0), (0.0,)),
        ("classification", "optim.layer_decay", (None, 1.0), (0.0, 1.01)),
        ("classification", "optim.ema_decay", (None, 0.9999), (-0.1, 1.5)),
        ("classification", "distill.weight", (0, 1), (-0.1, 1.1)),
        ("classification", "distill.temperature", (0.5, 20), (0.0,)),
        ("classification", "run.seed", (0, 2**32 - 1), (-1, 2**32)),
        ("classification", "run.devices", ("auto", 1), (0,)),
        ("detection", "roi_samples", (4,), (3,)),
        ("detection", "augment.multi_scale", ((), (480, 800)), ((480, 0),)),
        ("detection", "augment.photometric", (0, 1), (1.5,)),
        ("segmentation", "dropout", (0, 0.5), (1.0,)),
        ("segmentation", "data.ignore_index", (0, 65535), (-1, 65536)),
        ("segmentation", "data.crop_size", ((32, 64),), ((64, 31),)),
        ("segmentation", "data.window", (32,), (31,)),
        ("segmentation", "data.window_stride", (1,), (0,)),
        ("segmentation", "data.scales", ((0.5, 2),), ((1.0, 0.0),)),
        ("segmentation", "augment.scale", ((0.5, 2.0),), ((2.0, 0.5),)),
        ("segmentation", "augment.class_cap", (1,), (0.0, 2.0)),
    ],
)
def test_bounds(task, name, inside, outside):
    for value in inside:
        check_bounds(with_value(KINDS[task](), name, value))
    for value in outside:
        with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} .*: must be "):
            check_bounds(with_value(KINDS[task](), name, value))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (Optim(lr=math.inf), "--optim.lr inf: must be finite"),
        (Optim(betas=(0.9, 1.5)), "--optim.betas 1.5: must be below 1"),
        (Optim(epochs=0), "--optim.epochs 0: must be at least 1"),
        (Optim(epochs=10**400), f"--optim.epochs {10**400}: must be at most 100000"),
        (Optim(epochs=1.5), "--optim.epochs 1.5: must be int"),
        (Optim(clip_grad="1"), "--optim.clip-grad 1: must be float or None"),
        (ClassificationAugment(scale=(0.5, 4.0)), "--augment.scale 4.0: must be at most 1"),
        (ClassificationAugment(scale=(0.9, 0.2)), "--augment.scale 0.9 0.2: must be in ascending order"),
        (ClassificationAugment(color_jitter=-1.0), "--augment.color-jitter -1.0: must be at least 0"),
        (
            ClassificationData(interpolation="nearest"),
            "--data.interpolation nearest: must be 'bicubic' or 'bilinear'",
        ),
        (Model(in_chans=2), "--model.in-chans 2: must be 1 or 3"),
    ],
)
def test_messages_name_the_flag_and_the_limit(section, message):
    names = {Optim: "optim", ClassificationAugment: "augment", ClassificationData: "data", Model: "model"}
    with pytest.raises(InputError) as caught:
        check_bounds(replace(Classification(), **{names[type(section)]: section}))
    assert str(caught.value) == message


def test_one_section_with_its_prefix():
    check_bounds(SegmentationInput())
    with pytest.raises(InputError, match=r"^--crop-pct 2: must be at most 1"):
        check_bounds(ClassificationInput(crop_pct=2))
    with pytest.raises(InputError, match=r"^--data\.max-size 0: must be at least 1"):
        check_bounds(DetectionInput(max_size=0), "data.")


@pytest.mark.parametrize(
    ("value", "hint", "fit"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        ("1", float, False),
        (True, bool, True),
        (1, bool, False),
        (None, int | None, True),
        ("auto", int | Literal["auto"], True),
        ("cpu", int | Literal["auto"], False),
        (True, Literal[1, 3], False),
        ((1, 2.5), tuple[float, float], True),
        ((1,), tuple[float, float], False),
        ([1, 2], tuple[float, float], False),
        (5, tuple[int, ...], False),
        ((), tuple[int, ...], True),
        ((1, "a"), tuple[int, ...], False),
    ],
)
def test_fits(value, hint, fit):
    assert fits(value, hint) is fit


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_within_bounds_and_survive_json(name):
    recipe = RECIPES[name]
    check_bounds(recipe)
    restored = from_dict(json.loads(json.dumps(to_dict(recipe))))
    assert restored == recipe
    assert type(restored) is type(recipe)
    assert ABOUT[name].endswith(".")


def test_missing_fields_take_their_defaults():
    assert from_dict({}) == Classification()  # the task as well, which early recipes lack
    assert from_dict({"task": "detection", "data": {"images": "x"}}).data.image_size == 800


@pytest.mark.parametrize(("accelerator", "device"), [("auto", "auto"), ("cpu", "cpu"), ("gpu", "cuda"), ("mps", "mps")])
def test_the_device_of_early_versions(accelerator, device):
    values = {"run": {"seed": 3, "accelerator": accelerator}}
    assert from_dict(values).run == Run(seed=3, device=device)
    assert values["run"]["accelerator"] == accelerator  # the argument is unchanged


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"epochs": "ten"}}, "optim.epochs is 'ten': must be int"),
        ({"optim": {"betas": [0.9]}}, r"optim.betas is \(0.9,\): must be tuple\[float, float\]"),
        ({"optim": {"betas": 0.9}}, r"optim.betas is 0.9: must be tuple\[float, float\]"),
        ({"data": {"root": None}}, "data.root is None: must be str"),
        ({"data": {"verify": 1}}, "data.verify is 1: must be bool"),
        ({"run": {"devices": "all"}}, r"run.devices is 'all': must be int or 'auto'"),
        ({"optim": {"epoch": 1}}, "unknown field optim.epoch"),
        ({"optimiser": {}}, "unknown field optimiser"),
        ({"optim": [1]}, r"optim is \[1\]: must be an object"),
        ({"task": "regression"}, "unknown task 'regression'"),
        ({"task": "segmentation", "dropout": None}, "dropout is None: must be float"),
    ],
)
def test_wrong_json_is_rejected(values, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        from_dict(values)


def test_fields_that_may_differ_on_resume():
    run = {"run.threads", "run.patience", "run.logger", "run.device", "run.devices", "run.nodes", "run.save_every"}
    assert free_on_resume(Classification) == run | {"data.root", "data.workers", "distill.teacher"}
    assert free_on_resume(Segmentation) == run | {"data.root", "data.classes", "data.workers"}
    files = {"data.images", "data.val_images", "data.train_json", "data.val_json"}
    assert free_on_resume(Detection) == run | files | {"data.root", "data.workers"}
    for kind in KINDS.values():
        assert free_on_resume(kind) <= flatten(kind()).keys()


def test_flatten():
    flat = flatten(Segmentation(width=3, data=SegmentationData(root="x"), run=Run(seed=4)))
    assert flat["task"] == "segmentation"
    assert (flat["width"], flat["data.root"], flat["run.seed"]) == (3, "x", 4)
    assert len(flat) == 1 + sum(len(v) if isinstance(v, dict) else 1 for v in asdict(Segmentation()).values())


@pytest.mark.parametrize("kind", KINDS.values())
def test_inference_fields_are_declared_once(kind):
    inputs = {"detection": DetectionInput, "segmentation": SegmentationInput}
    inputs |= {"classification": ClassificationInput, "multilabel": ClassificationInput}
    base, data = inputs[kind.task], type(kind().data)
    assert issubclass(data, base)
    assert {field.name for field in fields(base)}.isdisjoint(get_annotations(data))


@dataclass(frozen=True)
class Toy(Recipe):
    """A recipe of another task."""

    task: ClassVar[str] = "toy"
    depth: Annotated[int, Interval(ge=1, le=9)] = 2


def test_another_kind_is_one_class_and_one_call(monkeypatch):
    for registry in (KINDS, RECIPES, ABOUT):
        for key in ("toy", "toy-deep"):
            monkeypatch.setitem(registry, key, None)  # undone afterwards
            del registry[key]
    register(Toy, {"toy-deep": ("A deep toy.", Toy(depth=9))})
    assert (RECIPES["toy-deep"].depth, ABOUT["toy-deep"]) == (9, "A deep toy.")
    assert from_dict(to_dict(Toy(depth=3))) == Toy(depth=3)
    with pytest.raises(InputError, match="--depth 10: must be at most 9"):
        check_bounds(Toy(depth=10))
    with pytest.raises(ValueError, match="'folder'"):
        register(Toy, {"folder": ("Taken.", Toy())})
