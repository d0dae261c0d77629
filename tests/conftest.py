"""Pictures that several tests read."""

import shutil

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def _photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("source") / "photos"
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = rng.integers(24, 61, 2)
                pixels = rng.integers(0, 120, (height, width, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.jpg", quality=90)
    return root


@pytest.fixture
def photos(_photos, tmp_path):
    """A fresh image-folder tree: {train,val}/{blue,green,red}/, 12 and 6 noisy JPEGs a class, 24 to 60 px a side."""
    return shutil.copytree(_photos, tmp_path / "photos")
