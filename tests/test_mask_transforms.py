"""Images with masks: how they are augmented."""

import numpy as np
import pytest
import torch
from mask_files import data, drawn, labels_of, spoil
from torchvision import tv_tensors

from dualtoken_vit.data.masks import IGNORE
from dualtoken_vit.data.objects import _ScaleJitter
from dualtoken_vit.data.sampling import seeded
from dualtoken_vit.data.segmentation import build_datasets
from dualtoken_vit.data.transforms import CappedCrop, RandomScale, segmentation_train
from dualtoken_vit.recipes import SegmentationAugment, SegmentationData

# Training


def test_image_and_mask_are_changed_alike():
    """An image whose colour is its label stays so, whatever is done to both; what is padded is ignored."""
    half = torch.arange(64) >= 32
    labels = (2 * half[:, None] + half).byte()  # quarters
    image = (labels * 80).expand(3, -1, -1).contiguous()
    augment = SegmentationAugment(photometric=0.0, class_cap=1.0)
    transform = segmentation_train(SegmentationData(crop_size=(48, 80)), augment)
    sample = tv_tensors.Image(image), tv_tensors.Mask(labels)
    flipped, padded = set(), 0
    for seed in range(12):
        with seeded(seed):
            x, y = transform(*sample)
        assert (x.shape, y.shape, y.dtype) == ((3, 48, 80), (48, 80), torch.uint8)
        there = y != IGNORE
        assert (x[0][~there] == 0).all()
        right = (x[0].float() / 80 - y).abs()[there] < 0.1
        assert right.float().mean() > 0.9  # edges are mixed in the image, not in the mask
        assert set(y.unique().tolist()) <= {*labels.unique().tolist(), IGNORE}
        padded += (~there).any().item()
        flipped.add(x.sum().item())
    assert 0 < padded < 12
    assert len(flipped) > 6


@pytest.mark.parametrize("factor", [0.61, 0.77, 1.37, 2.0])
def test_masks_stay_on_their_images(factor):
    """The image and the mask hold the number of their column, or row: that of each pixel is the same in both."""
    for places in (torch.arange(120).expand(90, -1), torch.arange(90)[:, None].expand(-1, 120)):
        image, mask = tv_tensors.Image(places.byte().expand(3, -1, -1)), tv_tensors.Mask(places.byte())
        for transform in (RandomScale((factor, factor), None), _ScaleJitter((120, 90), (factor, factor))):
            scaled, labels = transform(image, mask)
            assert type(labels) is tv_tensors.Mask
            assert (labels.shape, labels.dtype) == (scaled.shape[1:], torch.uint8)
            assert (labels.float() - scaled[0]).mean().item() == pytest.approx(0, abs=0.06)


def test_photometric_changes_keep_the_channels():
    """torchvision's own transform would exchange them: a green field could come out blue."""
    image = torch.tensor([40, 200, 90], dtype=torch.uint8)[:, None, None].expand(3, 32, 32).contiguous()
    sample = tv_tensors.Image(image), tv_tensors.Mask(torch.arange(4).repeat(32, 8).byte())
    augment = SegmentationAugment(photometric=1.0, scale=(1, 1), class_cap=1.0)
    transform = segmentation_train(SegmentationData(crop_size=(32, 32)), augment)
    colours = set()
    for seed in range(30):
        with seeded(seed):
            red, green, blue = transform(*sample)[0].float().mean((1, 2)).tolist()
        assert red < blue < green
        colours.add((red, green, blue))
    assert len(colours) == 30


def test_a_crop_is_capped():
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[:, 30:] = 1
    mask[:4] = IGNORE
    masks = tv_tensors.Mask(mask)

    def largest(cap):
        shares = []
        for seed in range(20):
            with seeded(seed):
                counts = torch.bincount(CappedCrop((16, 16), cap)(masks).flatten(), minlength=256)[:IGNORE]
            shares.append((counts.max() / counts.sum()).item())
        return shares

    assert sum(share == 1 for share in largest(1.0)) > 5
    assert sum(share > 0.75 for share in largest(0.75)) <= 2  # ten tries may fail


def test_a_crop_of_ignored_pixels_only_is_tried_again():
    """Only an 8x8 corner of 64x64 pixels has classes: 8 of 57 positions on each axis touch it."""
    mask = torch.full((64, 64), IGNORE, dtype=torch.uint8)
    mask[:8, :8] = torch.arange(64).reshape(8, 8) % 2
    masks = tv_tensors.Mask(mask)

    def touching(tries, monkeypatch):
        monkeypatch.setattr("dualtoken_vit.data.transforms.TRIES", tries)
        hits = 0
        for seed in range(200):
            with seeded(seed):
                hits += (CappedCrop((8, 8), 1.0)(masks) != IGNORE).any().item()
        return hits / 200

    with pytest.MonkeyPatch.context() as monkeypatch:
        once, often = touching(1, monkeypatch), touching(10, monkeypatch)
    assert once == pytest.approx((8 / 57) ** 2, abs=0.03)
    assert often == pytest.approx(1 - (1 - (8 / 57) ** 2) ** 10, abs=0.08)


def test_an_image_that_is_ignored_entirely_goes_through(tree):
    spoil(tree, lambda labels: np.full_like(labels, 255))
    train, _ = build_datasets(data(tree), 3)
    assert train.verify() == []
    train.transform = segmentation_train(SegmentationData(crop_size=(8, 8)), SegmentationAugment())
    image, mask = train[0]
    assert image.shape == (3, 8, 8)
    assert (mask == IGNORE).all()
    labels = labels_of(tree, "1")
    counts = [(labels == k).sum() for k in range(3)]
    assert train.pixels.tolist() == [counts, [sum(counts)] * 3]  # the ignored image adds nothing


def test_images_come_at_a_side_before_the_scale():
    scenes = drawn(64)[0]
    scenes.transform = segmentation_train(
        SegmentationData(crop_size=(64, 64), image_size=32), SegmentationAugment(scale=(1.0, 1.0))
    )
    _, y = scenes[0]
    assert (y != IGNORE).sum() == 32 * 32
