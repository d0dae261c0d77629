"""Batches depend on the seed, the epoch and the dataset alone."""

import gc
import os
import random
import sys
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dualtoken_vit.data import sampling
from dualtoken_vit.data.classification import build_datasets
from dualtoken_vit.data.sampling import loader, mix, seeded
from dualtoken_vit.data.transforms import classification_eval, classification_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import ClassificationAugment, ClassificationData

STATISTICS = (0.5,) * 3, (0.5,) * 3


class Numbers(Dataset):
    """Sample i: i, and a number from each generator that timm's transforms draw from."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        noise = (random.random(), np.random.random(), torch.rand(()).item())  # noqa: NPY002
        return index, torch.tensor(noise, dtype=torch.float64)


@pytest.fixture
def images(photos):
    """36 images under every augmentation there is."""
    data = ClassificationData(root=str(photos), image_size=32)
    augment = ClassificationAugment(
        scale=(0.3, 1.0), hflip="alternate", vflip=0.5, auto_augment="rand-m9-n2", random_erasing=0.5
    )
    train, _ = build_datasets(data, 3)
    train.transform = classification_train(data, augment, *STATISTICS)
    train.alternate_flips(seed=3, epoch=0)
    return train


def equal(these, those):
    """Whether two lists of batches are the same bit for bit."""
    return len(these) == len(those) and all(
        torch.equal(x, y) for this, that in zip(these, those, strict=True) for x, y in zip(this, that, strict=True)
    )


def batches(dataset, size=8, **args):
    return list(loader(dataset, size, **({"train": True, "seed": 3} | args)))


def test_workers_do_not_matter(images):
    alone = batches(images)
    assert len(alone) == 4
    assert alone[0][0].shape == (8, 3, 32, 32)
    assert equal(alone, batches(images, workers=2))
    assert equal(alone, batches(images, workers=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_batches_change_nothing_after_them(images, workers):
    rest = batches(images, skip=3, workers=workers)
    assert equal(rest, batches(images)[3:])
    assert batches(images, skip=4, workers=workers) == []


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_batch(images, world):
    whole = batches(images, 12)
    parts = [batches(images, 12 // world, rank=rank, world=world) for rank in range(world)]
    assert len(whole) == 3
    for number, (x, targets) in enumerate(whole):
        for rank in range(world):
            assert torch.equal(parts[rank][number][0], x[rank::world])
            assert torch.equal(parts[rank][number][1], targets[rank::world])


def test_seed_and_epoch_matter():
    def epoch(**args):
        return torch.cat([noise for _, noise in batches(Numbers(40), **args)])

    first = epoch()
    assert torch.equal(first, epoch(epoch=0))
    assert not torch.isin(first, epoch(epoch=1)).any()
    assert not torch.isin(first, epoch(seed=4)).any()
    assert len(first.unique()) == first.numel()


def test_an_epoch_is_a_permutation():
    orders = [torch.cat([index for index, _ in batches(Numbers(40), epoch=epoch)]).tolist() for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] != orders[1] != list(range(40))


def test_a_sample_is_the_same_wherever_it_comes():
    large = {i.item(): x for index, noise in batches(Numbers(40), 8) for i, x in zip(index, noise, strict=True)}
    small = {i.item(): x for index, noise in batches(Numbers(40), 5) for i, x in zip(index, noise, strict=True)}
    assert large.keys() == small.keys()
    assert all(torch.equal(large[index], small[index]) for index in large)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_drops_what_does_not_fill_a_batch_everywhere(world):
    parts = [batches(Numbers(50), 4, rank=rank, world=world) for rank in range(world)]
    assert {len(part) for part in parts} == {50 // (4 * world)}
    seen = [index for part in parts for batch, _ in part for index in batch.tolist()]
    assert len(seen) == len(set(seen)) == 50 // (4 * world) * 4 * world


def test_alternating_flips(photos):
    """A random half of the images in the first epoch, the others in the second, and so on: by pixels and by numpy."""
    train, _ = build_datasets(ClassificationData(root=str(photos)), 3)
    stored = [np.asarray(image) for image, _ in train]
    flipped = []
    for epoch in range(4):
        train.alternate_flips(3, epoch)
        images = [np.asarray(image) for image, _ in train]
        flipped.append([np.array_equal(image, before[:, ::-1]) for image, before in zip(images, stored, strict=True)])
        same = [np.array_equal(image, before) for image, before in zip(images, stored, strict=True)]
        assert same == [not each for each in flipped[-1]]
    first = flipped[0]
    assert 10 <= sum(first) <= 26  # of 36
    assert flipped[1:] == [[not each for each in first], first, [not each for each in first]]
    train.alternate_flips(4, 0)
    assert train.flipped != first


def test_fewer_images_than_a_batch():
    assert len(batches(Numbers(8), 4, world=2)) == 1
    with pytest.raises(
        InputError,
        match=r"7 training images cannot fill one batch of 4 in each of 2 processes; .*--optim\.batch-size 3",
    ):
        batches(Numbers(7), 4, world=2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_validation_sees_every_image_once(length, world, workers):
    seen = Counter()
    for rank in range(world):
        for index, _ in batches(Numbers(length), 4, train=False, rank=rank, world=world, workers=workers):
            assert len(index) <= 4
            seen.update(index.tolist())
    assert seen == Counter(range(length))


def test_validation_is_in_order(images):
    images.transform = classification_eval(ClassificationData(image_size=32), *STATISTICS)
    (x, targets), *_ = loader(images, 8, train=False, seed=0)
    assert targets.tolist() == images.targets[:8]
    assert torch.equal(x, torch.stack([images[index][0] for index in range(8)]))


def test_the_generators_of_the_program_are_left_alone():
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = state()
    batches(Numbers(16))
    batches(Numbers(16), workers=1)
    assert state() == before
    with seeded(1):
        assert all(now != then for now, then in zip(state(), before, strict=True))
    assert state() == before


def test_mix_tells_every_sequence_apart():
    sequences = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (-1,), (2**63,), (1, 2, 3), (3, 2, 1)]
    assert len({mix(*sequence) for sequence in sequences}) == len(sequences)
    assert all(0 <= mix(*sequence) < 2**64 for sequence in sequences)


def grouped(groups, size, world=1, **args):
    """The batches of each process: [process][batch][place]."""
    args = {"groups": groups} | args
    parts = [batches(Numbers(len(groups)), size, rank=rank, world=world, **args) for rank in range(world)]
    return [[index.tolist() for index, _ in part] for part in parts]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_is_of_one_group(world):
    groups = [index % 3 % 2 for index in range(100)]  # 67 and 33
    for epoch in range(5):
        parts = grouped(groups, 4, world, epoch=epoch)
        assert {len(part) for part in parts} == {100 // (4 * world)}
        steps = [[*chain(*step)] for step in zip(*parts, strict=True)]
        alike = 67 // (4 * world) + 33 // (4 * world)  # then what is left of both
        assert all(len({groups[index] for index in step}) == 1 for step in steps[:alike])
        seen = [*chain(*steps)]
        assert len(seen) == len(set(seen)) == 4 * world * len(steps)
    assert {groups[step[0]] for step in steps} == {0, 1}
    assert grouped(groups, 4, world, epoch=3) != grouped(groups, 4, world, epoch=4)


def test_groups_neither_depend_on_workers_nor_on_what_was_skipped():
    groups = [index % 3 % 2 for index in range(50)]
    whole = batches(Numbers(50), 4, groups=groups)
    assert equal(whole, batches(Numbers(50), 4, groups=groups, workers=2))
    assert equal(whole[5:], batches(Numbers(50), 4, groups=groups, skip=5, workers=1))
    steps = grouped(groups, 2, world=2)
    assert [sorted(a + b) for a, b in zip(*steps, strict=True)] == [sorted(index.tolist()) for index, _ in whole]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weighted_images_and_classes(power):
    """Classes of 60, 10 and 5 images; counts of every class and image against their definitions."""
    targets = [0] * 60 + [1] * 10 + [2] * 5
    weights = [targets.count(label) ** -power for label in targets]
    totals = np.zeros(75)
    for epoch in range(40):
        seen = Counter(
            torch.cat([index for index, _ in batches(Numbers(75), 5, weights=weights, epoch=epoch)]).tolist()
        )
        assert sum(seen.values()) == 75
        for index, weight in enumerate(weights):
            assert abs(seen[index] - 75 * weight / sum(weights)) < 1
        for label in range(3):
            expected = 75 * targets.count(label) ** (1 - power) / sum(weights)
            assert abs(sum(count for index, count in seen.items() if targets[index] == label) - expected) <= 1
        totals += [seen[index] for index in range(75)]
    # Rounded at random, with a variance of at most 1/4 each: a mean of 40 is within 5 standard deviations of 0.08.
    np.testing.assert_allclose(totals / 40, 75 * np.array(weights) / sum(weights), atol=0.4)


def test_an_image_drawn_twice_is_augmented_twice():
    drawn = list(
        zip(*map(torch.cat, zip(*batches(Numbers(20), 5, weights=[9.0, *[1.0] * 19]), strict=True)), strict=True)
    )
    often = [noise.tolist() for index, noise in drawn if index == 0]
    assert 6 <= len(often) <= 7  # 20 * 9 / 28
    assert len({tuple(noise) for noise in often}) == len(often)
    once = {
        index.item(): noise
        for index, noise in zip(*map(torch.cat, zip(*batches(Numbers(20)), strict=True)), strict=True)
    }
    assert once[0].tolist() in often  # the first time as if it were drawn once


@pytest.mark.parametrize("world", [1, 2])
def test_weighted_images_neither_depend_on_workers_nor_processes_nor_on_what_was_skipped(world):
    weights = [1.0 + index % 3 for index in range(40)]
    whole = batches(Numbers(40), 4, weights=weights)
    assert not equal(whole, batches(Numbers(40), 4, weights=weights, epoch=1))
    parts = [batches(Numbers(40), 4 // world, weights=weights, rank=rank, world=world, skip=3) for rank in range(world)]
    for (index, noise), *step in zip(whole[3:], *parts, strict=True):
        for rank, (own_index, own_noise) in enumerate(step):
            assert torch.equal(own_index, index[rank::world])
            assert torch.equal(own_noise, noise[rank::world])
    assert equal(whole, batches(Numbers(40), 4, weights=weights, workers=2))


def test_groups_of_weighted_images():
    groups = [index % 2 for index in range(40)]
    (part,) = grouped(groups, 4, weights=[9.0, *[1.0] * 39])
    assert Counter(chain(*part))[0] in (7, 8)  # 40 * 9 / 48
    assert sum(len({groups[index] for index in step}) == 1 for step in part) >= 9  # of 10; one has the remainders


def test_one_group_is_as_none():
    assert grouped([7] * 30, 4) == [[index.tolist() for index, _ in batches(Numbers(30), 4)]]


def test_a_group_too_small_for_a_batch_shares_one():
    ((batch,),) = grouped([0, 0, 0, 0, 0, 1, 1], 7)
    assert sorted(batch) == list(range(7))
    with pytest.raises(InputError, match=r"7 training images cannot fill one batch of 8; .* 7 or less"):
        grouped([0, 0, 0, 0, 0, 1, 1], 8)


def test_validation_takes_no_notice_of_groups():
    assert grouped([0, 1] * 4, 4, train=False) == [[[0, 1, 2, 3], [4, 5, 6, 7]]]


class Marked:
    """Part of a reference cycle; `path` gets a line with the process in which it is destroyed."""

    def __init__(self, path):
        self.path, self.itself = path, self

    def __del__(self):
        with open(self.path, "a") as file:
            print(os.getpid(), file=file)


class Dropping(Numbers):
    """Each worker drops what it has inherited here, and collects garbage."""

    thing = None

    def __getitem__(self, index):
        self.thing = None
        gc.collect()
        return index


@pytest.mark.parametrize("kept", [False, True])
def test_workers_do_not_destroy_what_they_inherit(tmp_path, kept):
    """OpenVINO's networks own threads; destroyed in a fork, they would wait for them without end."""
    path = tmp_path / "destroyed"
    dataset = Dropping(8)
    gc.disable()
    try:
        thing = Marked(path)
        if kept:
            dataset.thing = thing
        del thing
        assert torch.cat(list(loader(dataset, 2, train=False, seed=0, workers=2))).tolist() == list(range(8))
        assert path.exists() == (not kept)
    finally:
        gc.enable()
    dataset.thing = None
    gc.collect()
    assert path.read_text() == f"{os.getpid()}\n"


def test_a_batch_of_one_s_own():
    (batch,) = loader(Numbers(3), 3, train=False, seed=0, collate_fn=lambda samples: [index for index, _ in samples])
    assert batch == [0, 1, 2]


def number(dataset, epoch, progress):
    dataset.mark = 100 * epoch + progress


class Pids(Numbers):
    """Sample i: the process that reads it, and the mark that `number` gave to the dataset."""

    def __getitem__(self, index):
        return os.getpid(), self.mark


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_go_on_with_the_next_epoch(images, workers):
    args = dict(train=True, seed=3, workers=workers, prepare=number)
    first = loader(Pids(8), 2, **args)
    pids, found = zip(*first, strict=True)
    assert torch.cat(found).tolist() == [0] * 8
    second = loader(Pids(8), 2, **args, epoch=2, progress=0.5, before=first if workers else None)
    again, found = zip(*second, strict=True)
    assert torch.cat(found).tolist() == [200.5] * 8
    assert set(torch.cat(pids).tolist()) == set(torch.cat(again).tolist())
    assert len(set(torch.cat(pids).tolist())) == max(workers, 1)

    first = loader(images, 8, train=True, seed=3, workers=workers)
    list(first)
    args = dict(train=True, seed=3, epoch=1, skip=1, workers=workers)
    assert equal(list(loader(images, 8, **args, before=first if workers else None)), batches(images, epoch=1)[1:])


@pytest.mark.parametrize(
    ("system", "methods", "chosen", "expected"),
    [
        ("linux", ["fork", "spawn", "forkserver"], None, "fork"),  # Python 3.11 to 3.13
        ("linux", ["forkserver", "fork", "spawn"], None, "fork"),  # 3.14
        ("linux", ["forkserver", "fork", "spawn"], "forkserver", "fork"),  # some library asked for the default
        ("linux", ["fork", "spawn", "forkserver"], "forkserver", None),
        ("linux", ["forkserver", "fork", "spawn"], "spawn", None),
        ("darwin", ["spawn", "fork", "forkserver"], None, None),
        ("win32", ["spawn"], None, None),
    ],
)
def test_how_data_loading_processes_are_started(monkeypatch, system, methods, chosen, expected):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(sampling, "get_all_start_methods", lambda: methods)
    monkeypatch.setattr(sampling, "get_start_method", lambda allow_none: chosen)
    assert sampling.start_method(2) == expected
    assert sampling.start_method(0) is None


@pytest.mark.parametrize("train", [True, False])
def test_loaders_start_their_processes_so(monkeypatch, train):
    monkeypatch.setattr(sampling, "start_method", lambda workers: "spawn" if workers else None)
    chosen = [loader(Numbers(8), 4, train=train, seed=0, workers=workers).multiprocessing_context for workers in (0, 1)]
    assert chosen[0] is None
    assert chosen[1].get_start_method() == "spawn"
