"""Properties that hold for all inputs, checked by Hypothesis on examples that are the same in every run."""

import json
from dataclasses import fields, is_dataclass
from itertools import chain
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as reference

from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.formats.base import text
from dualtoken_vit.data.formats.yolo import _parse
from dualtoken_vit.data.masks import BEYOND, IGNORE, label_table, to_classes
from dualtoken_vit.data.rle import encode_mask
from dualtoken_vit.data.sampling import loader, mix
from dualtoken_vit.files import printable
from dualtoken_vit.models.resizing import Transform
from dualtoken_vit.recipes import KINDS, from_dict, to_dict

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("fixed")

SIDES = st.integers(1, 3000)


class Numbers(torch.utils.data.Dataset, ImageData):
    """Sample i is i."""

    class_names = ("a",)

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def batches(count: int, size: int, **more: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader(Numbers(count), size, **more)]


@given(
    st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 99), st.data()
)
def test_processes_share_the_steps_of_one(count, share, world, seed, epoch, data):
    """A step has the same images in any number of processes, also behind skipped ones; validation has each once."""
    size = share * world
    if count >= size:
        skip = data.draw(st.integers(0, count // size - 1))
        one = batches(count, size, train=True, seed=seed, epoch=epoch)
        several = [
            batches(count, share, train=True, seed=seed, epoch=epoch, rank=rank, world=world, skip=skip)
            for rank in range(world)
        ]
        assert [sorted(chain(*parts)) for parts in zip(*several, strict=True)] == [sorted(step) for step in one[skip:]]
        assert len({index for step in one for index in step}) == count // size * size
    own = [batches(count, share, train=False, seed=seed, rank=rank, world=world) for rank in range(world)]
    assert sorted(index for part in own for batch in part for index in batch) == list(range(count))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_seeds_differ(numbers):
    """A longer list is not a shorter one with zeros."""
    assert len({mix(*numbers, *[0] * zeros) for zeros in range(4)}) == 4


@given(SIDES, SIDES, st.integers(32, 1000), st.integers(32, 1500))
def test_resized_images_fit_and_keep_their_shape(height, width, side, longest):
    """At most `longest`, within a pixel of the image's own proportions, and never without a pixel."""
    found = Transform(side, longest, (), (0,), (1,)).fit((height, width), side)
    scale = min(side / min(height, width), longest / max(height, width))
    assert 1 <= min(found) <= side
    assert max(found) <= longest
    assert all(abs(new - old * scale) <= 1 for new, old in zip(found, (height, width), strict=True))


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)))
def test_masks_are_encoded_as_pycocotools_decodes_them(mask):
    coded = encode_mask(mask)
    assert (reference.decode({**coded, "counts": coded["counts"].encode()}) == mask).all()
    assert coded["counts"] == reference.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


SHARES = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=4, max_size=4)  # the CPU may flush subnormal numbers


@given(st.integers(1, 4000), st.integers(1, 4000), SHARES, st.integers(0, 8))
def test_yolo_lines_hold_boxes_exactly(width, height, shares, label):
    """What is written for a box in pixels is read as this box, to 1e-6 pixels."""
    left, right = sorted((shares[0] * width, shares[2] * width))
    top, bottom = sorted((shares[1] * height, shares[3] * height))
    centre = (left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height
    found, corners, polygons = _parse(" ".join([str(label), *map(text, centre)]), (width, height), 9)
    assert (found, polygons) == (label, [])
    assert corners == pytest.approx([left, top, right, bottom], abs=1e-6)


@given(arrays(np.int32, (7, 5), elements=st.integers(-5, 400)), st.integers(2, 200), st.integers(0, 255), st.booleans())
def test_labels_become_classes(labels, classes, ignore, reduced):
    table = label_table(range(classes), ignore, reduced)
    for label, found in zip(labels.ravel().tolist(), to_classes(labels, table).ravel().tolist(), strict=True):
        place = label - reduced
        expected = place if 0 <= place < classes else BEYOND
        assert found == (IGNORE if label == ignore or (reduced and label == 0) else expected)


@given(st.text())
def test_names_are_printed_in_one_line(name):
    shown = printable(name)
    assert shown.splitlines() in ([], [shown])
    assert shown.encode().decode() == shown
    assert printable(shown) == shown


def values(hint: Any) -> st.SearchStrategy:
    """Values of a field's type, of any size."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return st.one_of(*map(values, args))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple) if args[-1] is ... else st.tuples(*map(values, args))
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in fields(hint)})
    kinds = {bool: st.booleans(), int: st.integers(), str: st.text(), NoneType: st.none()}
    return kinds[hint] if hint in kinds else st.floats(allow_nan=False, allow_subnormal=False)


@pytest.mark.parametrize("task", KINDS)
@settings(max_examples=15)
@given(st.data())
def test_recipes_survive_json(task, data):
    recipe = data.draw(values(KINDS[task]))
    stored = json.loads(json.dumps(to_dict(recipe)))
    again = from_dict(stored)
    assert again == recipe
