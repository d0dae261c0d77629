"""Images of every kind are decoded correctly: pixel values against the definitions of the formats."""

import os
import pickle
import re
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from helpers import need_name, save_tiff
from PIL import ExifTags, Image

from dualtoken_vit.data.check.report import read_facts
from dualtoken_vit.data.classification import build_datasets
from dualtoken_vit.data.images import image_size, load_image
from dualtoken_vit.data.masks import read_mask
from dualtoken_vit.data.sampling import seeded
from dualtoken_vit.data.transforms import classification_eval, classification_train, train_size
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import ClassificationAugment, ClassificationData

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = ClassificationAugment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)


@pytest.fixture
def pixels():
    """(5, 7, 3) with no symmetry."""
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def read(image, path, channels=3, **save):
    """What load_image reads back after `image` was saved losslessly."""
    image.save(path, **save)
    loaded = load_image(path, channels)
    assert loaded.mode == {1: "L", 3: "RGB"}[channels]
    return np.asarray(loaded)


def test_rgb_by_every_kind_of_source(pixels, tmp_path):
    path = tmp_path / "Größe 写真 🐟.png"
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(read(image, path), pixels)
    np.testing.assert_array_equal(load_image(str(path)), pixels)
    np.testing.assert_array_equal(load_image(BytesIO(path.read_bytes())), pixels)
    with path.open("rb") as file:
        np.testing.assert_array_equal(load_image(file), pixels)
    np.testing.assert_array_equal(load_image(image), pixels)


def test_colour_to_grey_is_luma_601(pixels, tmp_path):
    grey = read(Image.fromarray(pixels), tmp_path / "a.png", channels=1)
    assert np.abs(grey - pixels @ (0.299, 0.587, 0.114)).max() <= 1


def test_grey_and_black_and_white(pixels, tmp_path):
    grey = pixels[..., 0]
    np.testing.assert_array_equal(read(Image.fromarray(grey), tmp_path / "a.png"), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(read(Image.fromarray(grey), tmp_path / "b.png", channels=1), grey)
    np.testing.assert_array_equal(read(Image.fromarray(grey > 99), tmp_path / "c.png", 1), 255 * (grey > 99))


def test_one_pixel(tmp_path):
    assert read(Image.new("RGB", (1, 1), (9, 8, 7)), tmp_path / "a.png").tolist() == [[[9, 8, 7]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode, pixels, tmp_path):
    colour = pixels if mode == "RGBA" else pixels[..., :1]
    alpha = np.arange(35, dtype=np.uint8).reshape(5, 7, 1) * 7  # 0 to 238
    loaded = read(Image.fromarray(np.concatenate([colour, alpha], -1), mode), tmp_path / "a.png")
    share = alpha / 255
    assert np.abs(loaded - (colour * share + 255 * (1 - share))).max() <= 1


def test_palette(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([2, 0, 1])
    assert read(image, tmp_path / "a.png").tolist() == [[[70, 80, 90], [10, 20, 30], [40, 50, 60]]]
    # Entry 0 is see-through, entry 1 half, in a PNG; a GIF can only have a colour that is not there.
    loaded = read(image, tmp_path / "b.png", transparency=bytes([0, 127, 255]))
    assert loaded[0, :2].tolist() == [[70, 80, 90], [255, 255, 255]]
    assert np.abs(loaded[0, 2] - (np.array([40, 50, 60]) * 127 + 255 * 128) / 255).max() <= 1
    assert read(image, tmp_path / "c.gif", transparency=1).tolist() == [[[70, 80, 90], [10, 20, 30], [255] * 3]]


def test_a_see_through_colour_without_an_alpha_channel(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))
    assert read(image, tmp_path / "a.png", transparency=(4, 5, 6)).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (4, 1))
    image.putdata([(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)])
    white, cyan, red, black = (255, 255, 255), (0, 255, 255), (255, 0, 0), (0, 0, 0)
    assert read(image, tmp_path / "a.tif").tolist() == [[list(c) for c in (white, cyan, red, black)]]
    image.resize((64, 16), Image.Resampling.NEAREST).save(tmp_path / "b.jpg", quality=100, subsampling=0)
    blocks = np.asarray(load_image(tmp_path / "b.jpg"))[8, 8::16].astype(int)
    assert np.abs(blocks - [white, cyan, red, black]).max() <= 3


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bits_are_scaled_to_8(kind, tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    loaded = read(Image.fromarray(values), tmp_path / f"a.{kind}", channels=1)
    assert loaded.tolist() == [[0, 0, 1, 1, 128, 254, 255, 255]]


def test_12_bits_are_scaled_to_8(tmp_path):
    values = [0, 1365, 2730, 4095]
    packed = int("".join(f"{value:012b}" for value in values), 2).to_bytes(6, "big")
    save_tiff(path := tmp_path / "a.tif", packed, 4, 12)
    assert np.asarray(load_image(path, 1)).tolist() == [[0, 85, 170, 255]]
    with Image.open(path) as opened:
        assert np.asarray(load_image(opened, 1)).tolist() == [[0, 85, 170, 255]]


def test_16_bits_in_32(tmp_path):
    values = np.array([[0, 257 * 77, 65535]], dtype=np.int32)
    assert read(Image.fromarray(values), tmp_path / "a.tif", channels=1).tolist() == [[0, 77, 255]]


@pytest.mark.parametrize("values", [np.int32([[65536]]), np.int32([[-1]]), np.float32([[0.5]])])
def test_pixels_of_unknown_range_are_refused(values, tmp_path):
    with pytest.raises(InputError, match=r"a\.tif.*of unknown range"):
        read(Image.fromarray(values), tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda x: x),
        (2, np.fliplr),
        (3, lambda x: np.rot90(x, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).T),
        (8, np.rot90),
    ],
)
def test_exif_rotation(orientation, upright, dtype, pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = pixels[..., 0].astype(dtype) * (257 if dtype == np.uint16 else 1)
    loaded = read(Image.fromarray(stored), tmp_path / "a.png", channels=1, exif=exif)
    np.testing.assert_array_equal(loaded, upright(pixels[..., 0]))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda exif: b"nonsense",
        lambda exif: exif[:9],
        lambda exif: exif[:-7],
        lambda exif: exif.replace(b"\x00\x06", b"\x00\x63"),  # orientation 99
    ],
)
def test_a_damaged_exif_block_does_not_spoil_the_image(damage, kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif = damage(exif.tobytes().removeprefix(b"Exif\x00\x00"))
    grey = Image.new("L", (32, 16), 200)
    grey.save(tmp_path / f"a.{kind}", exif=b"Exif\x00\x00" + exif)
    loaded = load_image(tmp_path / f"a.{kind}", channels=1)
    assert loaded.size == (32, 16)
    assert np.abs(np.asarray(loaded).astype(int) - 200).max() <= 2


def test_a_rotation_beside_a_tag_that_cannot_be_written_again(pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 300
    stored = exif.tobytes().replace(b"\x01\x00\x00\x04", b"\x01\x00\x00\x02")  # the width becomes a text
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png", exif=stored)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), np.rot90(pixels, -1))
    with Image.open(tmp_path / "a.png") as opened:
        np.testing.assert_array_equal(load_image(opened), np.rot90(pixels, -1))
        assert opened.size == image.size  # what was handed in is as it was


def test_of_an_animation_the_first_image(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    loaded = read(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (loaded == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_a_truncated_file_is_named(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut-ü.{kind}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for share in (0.02, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=rf"cut-ü\.{kind}: cannot be read as an image") as caught:
            load_image(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_image_is_named(content, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.jpg: cannot be read as an image"):
        load_image(path)
    with pytest.raises(InputError, match="shelf/3: cannot be read as an image"):
        load_image(BytesIO(content), name="shelf/3")


def test_no_such_file_and_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        load_image(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes of this kind")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(path := tmp_path / "a.png")
    for read in (load_image, image_size, read_mask, lambda path: load_image(str(path))):
        with pytest.raises(InputError, match=r"a\.png: cannot be read as an image \(not a regular file\)"):
            read(path)


def test_formats_that_are_not_decoded_under_another_name(tmp_path):
    """PostScript in a file named .png would be run by Ghostscript."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    path = (tmp_path / "a.eps").rename(tmp_path / "a.png")
    for read in (load_image, image_size):
        with pytest.raises(InputError, match=r"a\.png: cannot be read as an image"):
            read(path)


def test_a_report_on_pixels_that_cannot_be_decoded(pixels, tmp_path):
    """Pillow looks for EXIF behind the pixels of a PNG, and so fails there first."""
    Image.fromarray(pixels).save(path := tmp_path / "a.png")
    content = path.read_bytes()
    place = content.index(b"IDAT") + 6
    path.write_bytes(content[:place] + bytes(8) + content[place + 8 :])
    facts = read_facts("a.png", path)
    assert facts.problem.startswith("a.png: cannot be read as an image")


def test_too_many_pixels(monkeypatch, tmp_path):
    Image.new("L", (30, 30)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(InputError, match=r"huge\.png: more than 800 pixels"):
        load_image(tmp_path / "huge.png")


def test_an_image_that_does_not_fit_in_memory(monkeypatch, tmp_path):
    Image.new("L", (30, 30)).save(tmp_path / "large.png")

    def load(self):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(InputError, match=r"large\.png: too large for this machine's memory; shrink or remove it"):
        load_image(tmp_path / "large.png")


def test_names_are_printed_in_one_line(tmp_path):
    name, shown = "a\nb\r.png", r"a\nb\r.png"
    need_name(tmp_path, name)  # a name that is impossible is another error
    with pytest.raises(InputError) as caught:
        load_image(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / shown}: no such file"


def normalised(pixels):
    """(C, H, W) of (H, W, 3) bytes, by the definition."""
    return torch.tensor((pixels / 255 - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)


def test_evaluation_cuts_the_centre_and_normalises():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    transform = classification_eval(ClassificationData(image_size=32, crop_pct=1.0), MEAN, STD)
    torch.testing.assert_close(transform(Image.fromarray(pixels)), normalised(pixels[:, 16:48]))
    transform = classification_eval(
        ClassificationData(image_size=24, crop_pct=0.75), MEAN, STD
    )  # short side 32, centre 24
    torch.testing.assert_close(transform(Image.fromarray(pixels)), normalised(pixels[4:28, 20:44]))


def test_a_strip_that_would_take_gigabytes_is_named(photos):
    """1x40000 pixels: 32x1,280,000 of a short side of 32 are fine, 256x10,240,000 are more than Pillow opens."""
    Image.new("RGB", (40_000, 1), "red").save(photos / "val" / "red" / "strip.png")
    data = ClassificationData(root=str(photos), image_size=32)
    for size in (32, 256):
        images = build_datasets(data, 3)[1]
        images.transform = classification_eval(replace(data, image_size=size, crop_pct=1.0), MEAN, STD)
        (index,) = (i for i, name in enumerate(images.image_names) if name.endswith("strip.png"))
        if size == 32:
            assert images[index][0].shape == (3, 32, 32)
        else:
            with pytest.raises(InputError, match=r"strip\.png: 40000x1 pixels would be 2,621,440,000 once the"):
                images[index]


def test_training_flips_only_as_told():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for augment, expected in (
        (PLAIN, pixels),
        (replace(PLAIN, hflip=1.0), pixels[:, ::-1]),
        (replace(PLAIN, vflip=1.0), pixels[::-1]),
        (replace(PLAIN, hflip="alternate"), pixels),  # the dataset flips
    ):
        transform = classification_train(ClassificationData(image_size=32), augment, MEAN, STD)
        torch.testing.assert_close(transform(Image.fromarray(pixels)), normalised(expected))


def test_training_crops_the_share_it_is_told():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
    augment = replace(PLAIN, scale=(0.25, 0.25))
    transform = classification_train(ClassificationData(image_size=100), augment, (0.0,) * 3, (1.0,) * 3)
    for _ in range(5):
        row = 255 * transform(Image.fromarray(ramp))[0, 50]
        assert row[-1] - row[0] == pytest.approx(99, abs=2)  # half the width, so a quarter of the area


def test_random_erasing_and_color_jitter_change_pixels():
    grey = Image.new("RGB", (32, 32), (100, 120, 140))
    expected = normalised(np.asarray(grey))
    with seeded(0):
        erased = classification_train(ClassificationData(image_size=32), replace(PLAIN, random_erasing=1.0), MEAN, STD)(
            grey
        )
        jittered = classification_train(ClassificationData(image_size=32), replace(PLAIN, color_jitter=0.4), MEAN, STD)(
            grey
        )
    changed = ((erased - expected).abs() > 1e-5).any(0)
    assert 0.01 < changed.float().mean() < 0.5  # timm erases 2 to 33 % of the area
    assert erased[:, changed].std() > 0.5  # by noise, a pixel at a time
    assert ((jittered - expected).abs() > 0.01).any(0).all()
    assert jittered.flatten(1).std(1).max() < 1e-5  # every pixel the same way


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_auto_augment_takes_grey_and_colour(channels, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)).convert(mode)
    augment = replace(PLAIN, auto_augment="rand-m9-n2-mstd0.5")
    transform = classification_train(ClassificationData(image_size=32), augment, MEAN[:channels], STD[:channels])
    results = [transform(image) for _ in range(30)]
    assert {result.shape for result in results} == {(channels, 32, 32)}
    assert len({result.sum().item() for result in results}) > 10


@pytest.mark.parametrize(
    "policy",
    [
        *("original", "originalr", "v0", "v0r", "3a", "augmix-m10", "rand-n15-m15-mmax20-inc1"),
        *(f"{kind}-m{magnitude}" for kind in ("rand-n15", "rand-n15-inc1") for magnitude in (0, 1, 5, 10)),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_policy_at_every_magnitude(policy, mode):
    """timm's posterise kept 0 bits or fewer at both ends, which Pillow 13 refuses: rand-m9-mstd0.5-inc1 ended runs."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).convert(mode)
    channels = len(image.getbands())
    augment = replace(PLAIN, auto_augment=policy)
    transform = classification_train(ClassificationData(image_size=8), augment, MEAN[:channels], STD[:channels])
    transform = pickle.loads(pickle.dumps(transform))  # as a data loading process gets it that is no fork
    for _ in range(60):
        assert transform(image).isfinite().all()


@pytest.mark.parametrize(
    ("progress", "side"), [(0, 64), (0.49, 64), (0.5, 64), (0.58, 80), (0.65, 96), (0.72, 96), (0.8, 112), (0.99, 112)]
)
def test_progressive_resizing(progress, side):
    """From 64 to 112 pixels between half and four fifths of the run, in steps of 16; without start_size always 112."""
    data = ClassificationData(image_size=112, start_size=64)
    image = Image.new("RGB", (50, 40))
    assert classification_train(data, PLAIN, MEAN, STD, progress)(image).shape == (3, side, side)
    assert classification_train(replace(data, start_size=None), PLAIN, MEAN, STD, progress)(image).shape == (
        3,
        112,
        112,
    )


@pytest.mark.parametrize(("start", "end"), [(100, 224), (100, 110), (64, 64)])
def test_images_never_grow_beyond_their_last_size(start, end):
    data = ClassificationData(image_size=end, start_size=start)
    sizes = [train_size(data, epoch / 300) for epoch in range(300)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (start, end)
    assert {*sizes} == {*range(start, end, 16), end}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["tif", "jpg", "png", "webp"])
def test_size_of_rotated_images(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (40, 30)).save(path := tmp_path / f"a.{suffix}", exif=exif)
    assert image_size(path) == load_image(path).size == ((40, 30) if orientation < 5 else (30, 40))


def test_the_transparent_value_of_16_bits_is_white(tmp_path):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    Image.fromarray(values).save(path := tmp_path / "a.png", transparency=257 * 100)
    assert np.asarray(load_image(path, 1)).tolist() == [[0, 255], [200, 255]]
