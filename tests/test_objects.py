"""Augmentation of objects: what moves, moves with its pixels, and nothing that cannot be trained on is left."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from dualtoken_vit import cli
from dualtoken_vit.data.coco import MIN_SIDE
from dualtoken_vit.data.detection import DetectionDataset, draw_scenes
from dualtoken_vit.data.objects import VISIBLE, CopyPaste, Geometric
from dualtoken_vit.data.sampling import seeded
from dualtoken_vit.data.transforms import detection_train
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import RECIPES, DetectionAugment
from dualtoken_vit.recipes.detection import PRESETS
from dualtoken_vit.tasks.detection import TASK


@pytest.fixture(scope="module")
def scenes():
    return DetectionDataset(draw_scenes("train", 48, 40), masks=True)


def tight(masks):
    return masks_to_boxes(torch.as_tensor(masks)) + torch.tensor([0, 0, 1, 1])


def check(image, target, size=None):
    """A target that training accepts; its boxes contain their masks."""
    height, width = image.shape[1:]
    assert image.dtype == torch.uint8
    if size is not None:
        assert (height, width) == size
    count = len(target["labels"])
    assert target["boxes"].shape == (count, 4)
    assert target["masks"].shape == (count, height, width)
    assert target["boxes"].canvas_size == (height, width)
    for key in ("boxes", "crowd"):
        assert (target[key][:, 2:] - target[key][:, :2] >= MIN_SIDE).all()
        assert (target[key] >= 0).all()
        assert (target[key][:, 2:] <= torch.tensor([width, height])).all()
    if count:
        inner, outer = tight(target["masks"]), torch.as_tensor(target["boxes"])
        assert (inner[:, :2] >= outer[:, :2] - 1.01).all()
        assert (inner[:, 2:] <= outer[:, 2:] + 1.01).all()


def test_zoom_out_moves_image_boxes_and_masks_together(scenes):
    transform = Geometric(zoom_out=1.0, iou_crop=0.0, scale=(1.0, 1.0))
    for index in range(6):
        image, target = scenes[index]
        with seeded(0, index):
            wide, moved = transform(image, target)
        check(wide, moved)
        assert torch.equal(moved["labels"], target["labels"])
        for before, after in zip(target["masks"], moved["masks"], strict=True):
            assert torch.equal(image[:, before > 0], wide[:, after > 0])
        shift = moved["boxes"] - target["boxes"]
        assert torch.equal(shift, shift[:1].expand_as(shift))


def test_iou_crop_keeps_the_pixels_of_what_it_keeps(scenes):
    transform = Geometric(zoom_out=0.0, iou_crop=1.0, scale=(1.0, 1.0))
    sizes = set()
    for index in range(20):
        image, target = scenes[index]
        with seeded(1, index):
            part, moved = transform(image, target)
        check(part, moved)
        assert len(moved["labels"]) <= len(target["labels"])
        sizes.add(tuple(part.shape[1:]))
        if len(target["labels"]):
            assert len(moved["labels"])  # torchvision crops around an object
        else:
            assert torch.equal(part, image)
    assert len(sizes) > 5


def test_scale_jitter_keeps_the_size_and_scales_the_objects(scenes):
    for factor in (0.5, 1.5):
        transform = Geometric(0.0, 0.0, (factor, factor))
        for index in range(8):
            image, target = scenes[index]
            with seeded(2, index):
                new, moved = transform(image, target)
            check(new, moved, size=(48, 48))
            if factor < 1:
                assert torch.equal(moved["labels"], target["labels"])
                sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
                assert torch.allclose(moved["boxes"][:, 2:] - moved["boxes"][:, :2], sides / 2)
                assert (new.float().mean(0) == 0).float().mean() >= 0.7  # three quarters are black


@pytest.mark.parametrize("size", [(60, 80), (80, 60)])
@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_scale_jitter_scales_wide_and_high_images_alike(size, factor):
    """The object in the middle is `factor` times as large, or the part of it that is in the image."""
    height, width = size
    box = tv_tensors.BoundingBoxes([[0, 0, width / 2, height / 2]], format="XYXY", canvas_size=size)
    crowd = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
    target = {"boxes": box, "labels": torch.tensor([0]), "crowd": crowd}
    image = tv_tensors.Image(torch.full((3, *size), 255, dtype=torch.uint8))
    with seeded(4):
        new, moved = Geometric(0.0, 0.0, (factor, factor))(image, target)
    assert new.shape == image.shape
    left, top, right, bottom = moved["boxes"][0].tolist()
    if factor < 1:
        assert (right - left, bottom - top) == pytest.approx((factor * width / 2, factor * height / 2))
        assert (new[0] > 0).float().mean() == pytest.approx(factor**2, abs=0.01)
    else:  # its upper left corner may be cut off
        assert (new > 0).all()
        assert right - left <= factor * width / 2
        assert bottom - top <= factor * height / 2


def test_crowds_move_with_the_objects(scenes):
    image, target = next(scenes[index] for index in range(20) if len(scenes[index][1]["boxes"]) > 2)
    boxes = target["boxes"]
    target = target | {"crowd": boxes.clone()}
    for transform in (Geometric(1.0, 0.0, (1.0, 1.0)), Geometric(0.0, 0.0, (0.6, 0.6))):
        with seeded(3):
            _, moved = transform(image, target)
        assert torch.equal(moved["crowd"], moved["boxes"])
        assert type(moved["crowd"]) is type(boxes)


def test_a_crowd_is_cut_by_the_crop_not_dropped():
    """One over the right 70 % of the image: what of it is in the crop remains, wherever its centre is."""
    size, crowd = (120, 160), [48.0, 0, 160, 120]
    box = tv_tensors.BoundingBoxes([[5, 5, 45, 100]], format="XYXY", canvas_size=size)
    pixels = torch.arange(160, dtype=torch.uint8).expand(3, *size)  # the column that each pixel comes from
    regions = tv_tensors.wrap(torch.tensor([crowd]), like=box)
    cut = 0
    for index in range(200):
        with seeded(5, index):
            target = {"boxes": box.clone(), "labels": torch.tensor([0]), "crowd": regions.clone()}
            image, moved = Geometric(0.0, 1.0, (1.0, 1.0))(tv_tensors.Image(pixels), target)
        left = image[0].min().item()
        height, width = image.shape[1:]
        inside = [max(crowd[0] - left, 0), 0, width, height]
        if inside[2] - inside[0] >= 1:
            assert moved["crowd"].tolist() == [inside]
        else:
            assert not len(moved["crowd"])
        assert len(moved["boxes"]) == 1  # a crop has the centre of the object
        cut += (crowd[0] + crowd[2]) / 2 > left + width > crowd[0] + 1
    assert cut > 5  # crops with the crowd, but not its centre


@pytest.mark.parametrize("size", [(1, 60), (3, 60), (60, 1), (1, 1)])
def test_the_smallest_images(size):
    box = tv_tensors.BoundingBoxes([[0, 0, size[1], size[0]]], format="XYXY", canvas_size=size)
    for index in range(20):
        target = {"boxes": box, "labels": torch.tensor([0]), "crowd": tv_tensors.wrap(box[:0], like=box)}
        with seeded(6, index):
            image, _ = Geometric(0.5, 1.0, (0.5, 1.5))(tv_tensors.Image(torch.zeros(3, *size)), target)
        assert min(image.shape[1:]) >= 1


def test_copy_paste_shows_the_pasted_pixels_and_cuts_the_masks_below(scenes):
    """Every mask is what is visible: the masks are disjoint, as those of the scenes are."""
    transform, pasted = CopyPaste(1.0, scenes), 0
    for index in range(30):
        image, target = scenes[index]
        with seeded(4, index):
            new, joined = transform(image, target | {"labels": target["labels"] + 100})  # to tell them from the pasted
        check(new, joined, size=(48, 48))
        assert (joined["masks"].sum(0) <= 1).all()
        assert torch.allclose(joined["boxes"].as_subclass(torch.Tensor), tight(joined["masks"]).float(), atol=1.0)
        old = joined["labels"] >= 100
        pasted += int((~old).sum())
        for mask in joined["masks"][old]:
            before = next(one for one in target["masks"] if torch.equal(mask & one, mask))
            assert torch.equal(new[:, mask > 0], image[:, mask > 0])
            assert mask.sum() >= VISIBLE * before.sum()
        outside = ~joined["masks"].bool().any(0) & ~target["masks"].bool().any(0)
        assert (new[:, outside] == image[:, outside]).float().mean() > 0.95  # but for objects below a pixel
    assert pasted > 20


def test_presets_set_their_fields():
    for name, fields in PRESETS.items():
        values = DetectionAugment(preset=name, hflip=0.3, multi_scale=(40,)).values()
        assert (values.hflip, values.multi_scale) == (0.3, (40,))
        assert {key: getattr(values, key) for key in fields} == fields
    assert DetectionAugment(zoom_out=0.9).values().zoom_out == 0.9
    with pytest.raises(
        InputError, match=r"--augment\.zoom-out: --augment\.preset strong sets it to 0\.5; leave out one"
    ):
        DetectionAugment(preset="strong", zoom_out=0.9).values()


def test_without_them_training_is_as_before(scenes):
    """The default transform draws the random numbers that it drew without these fields: runs stay reproducible."""
    from torchvision.transforms import v2

    for index in range(4):
        with seeded(5, index):
            image, target = detection_train(DetectionAugment(), scenes)(*scenes[index])
        with seeded(5, index):
            expected, truth = v2.Compose([v2.RandomHorizontalFlip(0.5)])(*scenes[index])
        assert torch.equal(image, expected)
        assert torch.equal(target["boxes"], truth["boxes"])


@pytest.mark.parametrize("preset", ["light", "medium", "strong"])
def test_samples_of_the_presets(preset, scenes):
    transform = detection_train(DetectionAugment(preset=preset), scenes)
    for index in range(12):
        with seeded(6, index):
            first = transform(*scenes[index])
        with seeded(6, index):
            again = transform(*scenes[index])
        check(*first)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1]["boxes"], again[1]["boxes"])


@pytest.mark.parametrize("preset", ["light", "medium", "strong"])
def test_presets_leave_most_of_an_image(preset, scenes):
    """The frames of zoom-out and scale jitter do not add up to images that are mostly black."""
    _, target = scenes[0]
    white = tv_tensors.Image(torch.full_like(scenes[0][0], 255))
    transform = detection_train(DetectionAugment(preset=preset))
    with seeded(7, 0):
        filled = [(transform(white, target)[0] > 0).any(0).float().mean().item() for _ in range(300)]
    assert np.mean(np.array(filled) < 0.5) < 0.2
    assert np.mean(filled) > 0.75


def test_copy_paste_needs_masks():
    recipe = RECIPES["demo-detect"]
    recipe = replace(recipe, detector="retinanet", augment=replace(recipe.augment, copy_paste=0.5))
    with pytest.raises(InputError, match=r"--augment\.copy-paste needs masks: give --detector mask-rcnn"):
        TASK.prepare(recipe, recipe.model)


@pytest.mark.parametrize(
    "args",
    [
        ["demo-detect", "--data.limit", "8", "--data.image-size", "48", "--augment.preset", "strong"],
        ["demo-segment", "--data.limit", "8", "--data.crop-size", "48", "48"],
        ["folder", "--data.root", "PHOTOS", "--data.image-size", "32"],
    ],
)
def test_check_data_draws_what_training_sees(args, photos, tmp_path, capsys):
    args, sheets = [str(photos) if arg == "PHOTOS" else arg for arg in args], []
    for more in ([], ["--augmented"]):
        assert cli.run(["check-data", *args, *more, "--out", str(tmp_path)]) == 0
        sheets.append(np.asarray(Image.open(tmp_path / "labels.png")))
        content = "as training sees them" if more else "with their labels"
        assert f" images {content}: {tmp_path / 'labels.png'}\n" in capsys.readouterr().out
    assert sheets[0].shape != sheets[1].shape or (sheets[0] != sheets[1]).mean() > 0.05
