"""Reading images: any file that Pillow decodes becomes an 8-bit RGB or greyscale image."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from dualtoken_vit.data.folders import DECODED
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import printable

MODES = {1: "L", 3: "RGB"}  # Pillow's mode for each number of input channels


def open_image(source: str | Path | BinaryIO) -> ImageFile.ImageFile:
    """An image whose pixels are not yet decoded, of a format that `folders` accepts, whatever its name.

    Raises:
        OSError: for other files, and for what is no regular file: a named pipe would wait for a writer forever.
    """
    if isinstance(source, str | Path) and os.path.exists(source) and not os.path.isfile(source):
        raise OSError("not a regular file")
    return Image.open(source, formats=DECODED)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 without one, or in a damaged EXIF block, which raises any error."""
    found = 1
    with suppress(Exception):
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def load_image(source: str | Path | BinaryIO | Image.Image, channels: int = 3, name: str | None = None) -> Image.Image:
    """Decode an image completely and convert it to 8 bits per channel.

    The EXIF orientation is applied (a damaged EXIF block is used as far as it can be parsed), transparent pixels are
    blended with white, 12 and 16 bits are scaled to 8, and animations give their first frame. All other modes (palette,
    CMYK, 1 bit, ...) are converted.

    Args:
        source: file name, open binary file, or PIL image
        channels: 3 for a new image of mode RGB, 1 for L
        name: what errors call the image; default: the file name

    Raises:
        InputError: for a source that cannot be decoded completely.
    """
    if name is None:
        path = isinstance(source, str | Path)
        name = str(source if path else getattr(source, "filename", None) or getattr(source, "name", None) or source)
    with naming(name), nullcontext(source.copy()) if isinstance(source, Image.Image) else open_image(source) as image:
        tags = getattr(source, "tag_v2", None) or getattr(image, "tag_v2", {})  # of a TIFF; a copy has none
        image.load()
        with suppress(Exception):  # a damaged EXIF block raises any error, often only after the pixels were rotated
            ImageOps.exif_transpose(image, in_place=True)
        return _to_8_bit(image, MODES[channels], 4095 if tags.get(BITSPERSAMPLE) == (12,) else 65535)


def fitting(image: Image.Image, short: int) -> Image.Image:
    """The image; an InputError if resizing its short side to `short` pixels would give more pixels than Pillow opens.

    A strip of 1x40000 pixels, a file of some bytes, would take gigabytes.
    """
    count = image.width * image.height * (short / min(image.size)) ** 2
    if count > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        size = f"{image.width}x{image.height} pixels"
        raise InputError(f"{size} would be {count:,.0f} once the short side is resized to {short}; crop or remove it")
    return image


@contextmanager
def prefixed(name: str | Path) -> Iterator[None]:
    """Put the name of an image before the message of an InputError that is raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{printable(name)}: {error}") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image file after its EXIF rotation, without decoding it; an InputError for other files."""
    with naming(path), open_image(path) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # some versions of Pillow have turned it already
            width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        turned = orientation(image) >= 5
    return (height, width) if turned else (width, height)


@contextmanager
def naming(name: str | Path) -> Iterator[None]:
    """Turn every error raised inside into an InputError that names the image."""
    name = printable(name)
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"{name}: more than {limit:,} pixels; shrink or remove it") from None
    except MemoryError:
        raise InputError(f"{name}: too large for this machine's memory; shrink or remove it") from None
    except Exception as error:  # a damaged file raises any error: OSError, SyntaxError, struct.error, ...
        raise InputError(f"{name}: cannot be read as an image ({reason(error)}); replace or remove it") from error


def _to_8_bit(image: Image.Image, mode: str, most: int) -> Image.Image:
    """`image`, of any mode, in `mode` RGB or L; `most` is white in integers of 16 bits."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels of unknown range: save it with 8 or 16 bits")
        grey = ((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255  # the one value that is transparent, if there is one
        image = Image.fromarray(grey)
    elif image.mode == "F":
        raise ValueError("floating-point pixels of unknown range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
