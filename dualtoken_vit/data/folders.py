"""What counts as an image file, and the images in and below a folder."""

import os
from pathlib import Path

from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".avif")


def image_files(folder: Path) -> list[str]:
    """The images in and below a folder, in natural order; hidden ones, like macOS's ._name.jpg, do not count."""
    found = (os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    images = (p for p in found if p.lower().endswith(EXTENSIONS) and not os.path.basename(p).startswith("."))
    return sorted(images, key=lambda path: (natural_key(path), path))
