"""Reading images: any kind of file becomes one 8-bit RGB or grey image, then timm's transforms a tensor."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from textwrap import shorten
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dualtoken_vit.errors import InputError

MODES = {1: "L", 3: "RGB"}  # channels of the network's input: PIL's mode


def load_image(source: str | Path | BinaryIO | Image.Image, channels: int = 3, name: str | None = None) -> Image.Image:
    """Read an image whole and bring it to 8 bits.

    The EXIF rotation is applied (of a damaged EXIF block, as far as it can be read), transparency is laid
    on white, 16 bits are scaled to 8, of an animation the first image is taken; palette, CMYK, black-and-white and
    the like are converted.

    Args:
        source: A file's name, an open file, or a PIL image.
        channels: 3 for RGB, 1 for grey.
        name: What to call the image in an error; by default the file's name.

    Raises:
        InputError: where there is no image that can be read to its end.
    """
    name = name or str(getattr(source, "filename", None) or getattr(source, "name", None) or source)
    given = isinstance(source, Image.Image)
    with naming(name), nullcontext(source.copy()) if given else Image.open(source) as image:
        image.load()
        with suppress(Exception):  # a damaged EXIF block raises anything, often only after the pixels were turned
            ImageOps.exif_transpose(image, in_place=True)
        return _to_8_bit(image, MODES[channels])


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Whatever goes wrong inside with an image becomes an InputError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; shrink or remove it") from None
    except Exception as error:  # a damaged file raises anything: OSError, SyntaxError, struct.error, ...
        raise InputError(f"{name}: cannot be read as an image ({reason(error)}); replace or remove it") from error


def reason(error: Exception) -> str:
    """What an error says, in one line of bearable length."""
    return shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    """`image` (of any mode) in `mode`, RGB or L."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels, whose range is not known: save it with 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # 65535 / 257 = 255
    elif image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
