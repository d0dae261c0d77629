"""Reading pictures: any kind of file becomes one 8-bit RGB or grey picture, then timm's transforms a tensor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision.transforms import v2

from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Augment, Data

MODES = {1: "L", 3: "RGB"}  # channels of the network's input: PIL's mode


def load_image(source: str | Path | BinaryIO | Image.Image, channels: int = 3, name: str | None = None) -> Image.Image:
    """Read a picture whole and bring it to 8 bits.

    The EXIF rotation is applied (of a damaged EXIF block, as far as it can be read), transparency is laid
    on white, 16 bits are scaled to 8, of an animation the first picture is taken; palette, CMYK, black-and-white and
    the like are converted.

    Args:
        source: A file's name, an open file, or a PIL picture.
        channels: 3 for RGB, 1 for grey.
        name: What to call the picture in an error; by default the file's name.

    Raises:
        InputError: where there is no picture that can be read to its end.
    """
    name = name or str(getattr(source, "filename", None) or getattr(source, "name", None) or source)
    given = isinstance(source, Image.Image)
    with naming(name), nullcontext(source.copy()) if given else Image.open(source) as picture:
        picture.load()
        with suppress(Exception):  # a damaged EXIF block raises anything, often only after the pixels were turned
            ImageOps.exif_transpose(picture, in_place=True)
        return _to_8_bit(picture, MODES[channels])


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Whatever goes wrong inside with a picture becomes an InputError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; shrink or remove it") from None
    except Exception as error:  # a damaged file raises anything: OSError, SyntaxError, struct.error, ...
        raise InputError(f"{name}: cannot be read as a picture ({reason(error)}); replace or remove it") from error


def reason(error: Exception) -> str:
    """What an error says, in one line of bearable length."""
    return shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def _to_8_bit(picture: Image.Image, mode: str) -> Image.Image:
    """`picture` (of any mode) in `mode`, RGB or L."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels, whose range is not known: save it with 8 or 16 bits")
        picture = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # 65535 / 257 = 255
    elif picture.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known: save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


def train_size(data: Data, progress: float) -> int:
    """Side of the training images when the share `progress` of the run is done: progressive resizing in steps of 16."""
    if data.start_size is None or progress >= 0.8:
        return data.image_size
    grown = max(progress - 0.5, 0) / 0.3
    return data.start_size + round((data.image_size - data.start_size) * grown / 16) * 16


def train_transform(
    data: Data, augment: Augment, mean: tuple[float, ...], std: tuple[float, ...], progress: float = 0.0
) -> Callable:
    """timm's training transform: a PIL image to a normalised float tensor (C, S, S), S = train_size(data, progress).

    Raises:
        InputError: for an augmentation policy that timm does not know.
    """
    try:
        return create_transform(
            train_size(data, progress),
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment,
            re_prob=augment.random_erasing,
            re_mode="pixel",
            interpolation=data.interpolation,
            mean=mean,
            std=std,
        )
    except (AssertionError, KeyError, ValueError) as error:  # only a policy can be wrong beyond its type
        raise InputError(
            f"--augment.auto-augment {augment.auto_augment}: not a policy of timm; for example rand-m9-n2-mstd0.5"
        ) from error


class PhotometricDistort(v2.RandomPhotometricDistort):
    """torchvision's changes of brightness, contrast, saturation and hue, without its exchange of colour channels."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


def eval_transform(data: Data, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """timm's evaluation transform: the short side to S / crop_pct, the centre cut out, to a float tensor (C, S, S)."""
    return create_transform(
        data.image_size,
        crop_pct=data.crop_pct,
        interpolation=data.interpolation,
        mean=mean,
        std=std,
    )
