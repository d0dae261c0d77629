"""Images with a class for every pixel: trees of mask files, or drawn by the program."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dualtoken_vit.data.folders import image_files
from dualtoken_vit.data.images import load_image, naming
from dualtoken_vit.data.shapes import CLASSES, SCENES, scene
from dualtoken_vit.data.threads import in_threads, verify_each
from dualtoken_vit.data.transforms import IGNORE
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write
from dualtoken_vit.recipes import SegmentationData

BEYOND = 254  # of labels that no class has
MOST = 254  # classes
CLASS_FILES = ("classes.txt", "objectInfo150.txt")  # the second is ADE20K's

MODES = ("L", "P", "1", "I", "I;16", "I;16B")  # PIL's, of mask files
STRETCHED = {"L;2": 85, "L;4": 17}  # PIL brings grey of 2 and 4 bits to 0 ... 255


def read_mask(path: str | Path) -> np.ndarray:
    """The labels (H, W), uint8 or int32, of a mask file as they are in it; of a palette image the indices.

    Raises:
        InputError: for a file that cannot be read, or has colours.
    """
    with naming(str(path)), Image.open(path) as mask:
        if mask.format == "JPEG":
            raise InputError(f"{path}: a mask in JPEG, which does not keep labels as they were; save masks as PNG")
        stored = next((tile.args if isinstance(tile.args, str) else tile.args[0] for tile in mask.tile), "")
        mask.load()
        labels, mode = np.asarray(mask), mask.mode
    if mode not in MODES:
        raise InputError(
            f"{path}: a mask of mode {mode}, but one number a pixel is meant. With numpy, and colours as the list of "
            "the classes' (R, G, B): hit = (np.asarray(mask.convert('RGB'))[:, :, None] == colours).all(-1), then "
            "labels = np.where(hit.any(-1), hit.argmax(-1), 255), and Image.fromarray(labels.astype('uint8')).save("
            "NAME.png); other colours get the label 255, that counts for nothing"
        )
    if stored in STRETCHED:
        labels = labels // STRETCHED[stored]
    return labels.astype(np.uint8 if mode in ("L", "P", "1") else np.int32)


def label_table(num_classes: int, ignore_index: int = 255, reduce_zero_label: bool = False) -> np.ndarray:
    """(257 or more,) uint8: what labels become: a class, `IGNORE` or `BEYOND`; the last is for all the others."""
    first = int(reduce_zero_label)
    table = np.full(max(257, ignore_index + 2), BEYOND, dtype=np.uint8)
    table[first : first + num_classes] = np.arange(num_classes)
    table[:first] = IGNORE
    table[ignore_index] = IGNORE
    return table


def to_classes(labels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """What labels become by a `label_table`, uint8."""
    return table[labels if labels.dtype == np.uint8 else np.clip(labels, -1, len(table) - 1)]


def beyond_fault(labels: np.ndarray, pixels: np.ndarray, table: np.ndarray) -> str:
    """What to say of a mask that has these labels beyond the classes, each in so many pixels."""
    more = f" (and {len(labels) - 1} more such labels)" if len(labels) > 1 else ""
    return (
        f"label {labels[0]} in {pixels[0]} pixels{more}, but there are {(table < BEYOND).sum()} classes: mend it, or "
        "see --data.classes, --data.ignore-index and --data.reduce-zero-label"
    )


class SegmentationDataset(Dataset):
    """Images with a mask each.

    Sample i is (image, mask), a tv_tensors.Image (C, H, W) uint8 and a tv_tensors.Mask (H, W) uint8 of indices into
    class_names or `IGNORE`, after `transform`, if there is one.

    Args:
        paths: Display name of each image.
        class_names: Name of each class.
        channels: 3 (RGB) or 1 (grey).
    """

    def __init__(self, paths: Sequence[str], class_names: Sequence[str], channels: int = 3) -> None:
        self.paths, self.class_names, self.channels = list(paths), tuple(class_names), channels
        self.transform: Callable | None = None
        self.pixels: Tensor | None = None
        """(2, classes) int64, after `verify`: of each class its pixels, and those of all the images that have it."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, mask = self.load(index)
        sample = v2.functional.to_image(image), tv_tensors.Mask(torch.from_numpy(mask))
        return self.transform(*sample) if self.transform else sample

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Image `index`, and its mask (H, W) uint8.

        Raises:
            InputError: where one cannot be read or they do not fit.
        """
        raise NotImplementedError

    def verify(self, skip: bool = False, progress: bool = True) -> list[str]:
        """Read every image and mask once, as `classification.ImageDataset.verify`; none is left out.

        What the masks hold is then in `pixels`.

        Raises:
            InputError: names the first that cannot be used, and says how many there are; or no pixel counts.
        """
        counts = []

        def look(index: int) -> None:
            counts.append(np.bincount(self.load(index)[1].ravel(), minlength=256)[: len(self.class_names)])

        verify_each(look, len(self), "reading every image and mask" if progress else "")
        pixels = torch.from_numpy(np.stack(counts))  # (images, classes)
        self.pixels = torch.stack([pixels.sum(0), ((pixels > 0) * pixels.sum(1, keepdim=True)).sum(0)])
        if not pixels.any():
            raise InputError(f"{self.paths[0]} and all the others: no pixel has a class; see --data.ignore-index")
        return []


class MaskDataset(SegmentationDataset):
    """Image files with a mask file each; see `SegmentationDataset`.

    Args:
        pairs: Files of the image and its mask.
        class_names: Name of each class.
        table: Of `label_table`.
        channels: 3 (RGB) or 1 (grey).
    """

    def __init__(
        self, pairs: Sequence[tuple[str, str]], class_names: Sequence[str], table: np.ndarray, channels: int = 3
    ) -> None:
        super().__init__([image for image, _ in pairs], class_names, channels)
        self.masks = [mask for _, mask in pairs]
        self.table = table

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image = load_image(self.paths[index], self.channels)
        labels = read_mask(self.masks[index])
        classes = to_classes(labels, self.table)
        fault, beyond = size_fault(self.paths[index], image.size, labels), classes == BEYOND
        if not fault and beyond.any():
            fault = beyond_fault(*np.unique(labels[beyond], return_counts=True), self.table)
        if fault:
            raise InputError(f"{self.masks[index]}: {fault}")
        return image, classes


def median_frequency(pixels: Tensor) -> Tensor:
    """The median of all f / f, f the class's share of the images that have it (Eigen and Fergus, arXiv 1411.4734)."""
    share = pixels[0] / pixels[1]  # not a number where no image has it
    return share.nanquantile(0.5) / share


def log_frequency(pixels: Tensor) -> Tensor:
    """1 / ln(1.02 + f), f the class's share of all the pixels (ENet, arXiv 1606.02147)."""
    return 1 / torch.log(1.02 + pixels[0] / pixels[0].sum())


WEIGHTS = {"median-frequency": median_frequency, "log": log_frequency}


def class_weights(kind: str, pixels: Tensor) -> Tensor:
    """What a pixel of each class counts in the loss, (classes,); 0 for a class that has none.

    Args:
        kind: one of `WEIGHTS`
        pixels: of `SegmentationDataset.pixels`
    """
    return torch.where(pixels[0] > 0, WEIGHTS[kind](pixels), 0)


def size_fault(path: str, size: tuple[int, int], labels: np.ndarray) -> str:
    """What is wrong with a mask whose size is not that (width, height) of its image."""
    height, width = labels.shape
    if size == (width, height):
        return ""
    shown = f"{size[0]}x{size[1]} as it is shown (after any EXIF rotation)"
    return f"{width}x{height} pixels, but {path} is {shown}: make them equal"


class ShapeScenes(SegmentationDataset):
    """Scenes of up to five drawn shapes, of the class "ground" where there is none; they need no file.

    Args:
        split: train or val.
        size: Side of the images in pixels.
        channels: 3 (RGB) or 1 (grey).
        count: How many; by default all of the split.
    """

    def __init__(self, split: str, size: int, channels: int = 3, count: int | None = None) -> None:
        count = min(count or SCENES[split], SCENES[split])
        super().__init__([f"{split}-{index:04d}" for index in range(count)], ("ground", *CLASSES), channels)
        self.split, self.size = split, size

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image, shapes = scene(self.split, index, self.size)
        mask = np.zeros((self.size, self.size), dtype=np.uint8)
        for shape in shapes:
            mask[shape.mask] = shape.label + 1
        return load_image(image, self.channels), mask


def save_scenes(folder: str | Path, size: int = 128, **counts: int) -> None:
    """Write scenes as FOLDER/{images,annotations}/{train,val}/*.png and FOLDER/classes.txt.

    Args:
        folder: Made where it is missing.
        size: Side of the images in pixels.
        counts: How many of a split (train=100), by default all.
    """
    for split in SCENES:
        scenes = ShapeScenes(split, size, count=counts.get(split))
        for index, name in enumerate(scenes.paths):
            img, mask = scenes.load(index)
            for kind, image in (("images", img), ("annotations", Image.fromarray(mask))):
                with atomic_write(Path(folder, kind, split, f"{name}.png")) as file:
                    image.save(file, format="png")
        with atomic_write(Path(folder, "classes.txt"), "w") as file:
            file.write("\n".join(scenes.class_names) + "\n")


def find_pairs(root: str | Path, split: str) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """The images of a split that have a mask, with it; images without one; masks without an image.

    Raises:
        InputError: for a folder that is missing or has no images.
    """
    if not root:
        raise InputError("--data.root is missing: give the folder that has images/train, annotations/train, ...")
    folders = [Path(root, kind, split) for kind in ("images", "annotations")]
    for folder in folders:
        if not folder.is_dir():
            layout = f"{folders[0]}/NAME.jpg and {folders[1]}/NAME.png"
            raise InputError(f"{folder}: no such folder; expected {layout}; see --data.train-split, --data.val-split")
    images, masks = map(_by_stem, folders)
    if not images:
        raise InputError(f"{folders[0]}: no images in this folder")
    pairs = [(path, masks[name]) for name, path in images.items() if name in masks]
    alone = [path for name, path in images.items() if name not in masks]
    return pairs, alone, [path for name, path in masks.items() if name not in images]


def _by_stem(folder: Path) -> dict[str, str]:
    """The images in and below a folder by their path in it without extension."""
    found: dict[str, str] = {}
    for path in image_files(folder):
        name = os.path.splitext(os.path.relpath(path, folder))[0]
        if name in found:
            raise InputError(f"{found[name]} and {path} have one name; rename or remove one")
        found[name] = path
    return found


def read_class_names(data: SegmentationData) -> tuple[str, ...] | None:
    """The names in the file of the classes; None without one.

    Raises:
        InputError: for a file that cannot be read, names a class twice or too many, or none.
    """
    if data.ignore_index == 0 and not data.reduce_zero_label:
        raise InputError(
            "--data.ignore-index 0: 0 is the label of the first class; where it is of none, and the classes begin at "
            "1, give --data.reduce-zero-label in its place"
        )
    files = [Path(data.classes)] if data.classes else [Path(data.root, name) for name in CLASS_FILES]
    path = next((path for path in files if path.is_file()), None)
    if path is None and data.classes:
        raise InputError(f"--data.classes {data.classes}: no such file")
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors on Windows begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); give a class a line") from error
    names: tuple[str, ...] = ()
    for place, line in enumerate(lines, start=1):
        number, *columns = line.strip().split("\t")
        if not number or (columns and place == 1 and not number.isdecimal()):  # empty, or the head of ADE20K's table
            continue
        if columns and not number.isdecimal():
            raise InputError(f"{path}, line {place}: {line.strip()!r} is neither NAME nor NUMBER<TAB>NAME")
        if columns:  # ADE20K has more of them, the name in the last
            if int(number) == data.ignore_index:
                continue
            if int(number) != len(names) + data.reduce_zero_label:
                given = "1, as --data.reduce-zero-label is given" if data.reduce_zero_label else "0"
                raise InputError(f"{path}, line {place}: label {number}, but labels must count up from {given}")
        names += (columns[-1].strip() if columns else number,)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: the class {twice!r} is there twice")
    if not 2 <= len(names) <= MOST:
        raise InputError(f"{path}: {len(names)} classes; 2 to {MOST} can be told apart")
    ignored = data.ignore_index - data.reduce_zero_label
    if 0 <= ignored < len(names):
        raise InputError(
            f"--data.ignore-index {data.ignore_index} is the label of {names[ignored]!r} in {path}: take the class out "
            "there, and let the labels of the others count up without it"
        )
    return names


def highest_label(labels: np.ndarray, data: SegmentationData) -> int:
    """The highest of the labels that count."""
    return int(labels[labels != data.ignore_index].max(initial=0))


def number_classes(highest: int, path: str, data: SegmentationData) -> tuple[str, ...]:
    """Numbers for names: as many as there must be for the highest label, which is in the mask of `path`.

    Raises:
        InputError: for too few, or more than `MOST`.
    """
    count = highest + 1 - data.reduce_zero_label
    if not 2 <= count <= MOST:
        raise InputError(
            f"{path}: the highest label in the training masks is {highest}, without {data.ignore_index}, which counts "
            f"for nothing; 2 to {MOST} classes can be told apart; give another --data.ignore-index, or a file of the "
            "classes as --data.classes"
        )
    if 0 <= data.ignore_index - data.reduce_zero_label < count:
        raise InputError(
            f"--data.ignore-index {data.ignore_index}: a label among those of the classes, which go up to {highest}; "
            "give it a higher number"
        )
    return tuple(map(str, range(count)))


def count_classes(masks: Sequence[str], data: SegmentationData) -> tuple[str, ...]:
    """`number_classes` of mask files.

    Raises:
        InputError: for a mask that cannot be read, or labels that cannot be numbers of classes.
    """
    found = in_threads(lambda path: (highest_label(read_mask(path), data), path), masks, len(masks), "counting classes")
    return number_classes(*max(found), data)


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """A batch of images of any size: a list of images, and one of masks."""
    images, masks = map(list, zip(*samples, strict=True))
    return images, masks


def _tree(data: SegmentationData, split: str, channels: int, class_names: Sequence[str] | None) -> MaskDataset:
    """ROOT/{images,annotations}/SPLIT; the classes are `class_names`, if given: the file's must then be the same."""
    pairs, alone, _ = find_pairs(data.root, split)
    if alone:
        more = f", and {len(alone) - 1} more images have none" if len(alone) > 1 else ""
        raise InputError(f"{alone[0]}: an image without a mask in {Path(data.root, 'annotations', split)}{more}")
    names = read_class_names(data)
    if class_names is None:
        names = names or count_classes([mask for _, mask in pairs], data)
    elif names is not None and names != tuple(class_names):
        raise InputError(_difference(names, tuple(class_names), data))
    else:
        names = tuple(class_names)
    table = label_table(len(names), data.ignore_index, data.reduce_zero_label)
    return MaskDataset(pairs[: data.limit], names, table, channels)


def _difference(names: tuple[str, ...], trained: tuple[str, ...], data: SegmentationData) -> str:
    place = data.classes or f"the file of the classes in {data.root}"
    if len(names) != len(trained):
        return f"{place}: {len(names)} classes, but the checkpoint has {len(trained)}"
    number, ours, theirs = next(
        (i, *pair) for i, pair in enumerate(zip(names, trained, strict=True)) if len({*pair}) > 1
    )
    return f"{place}: class {number} is {ours!r}, but {theirs!r} in the checkpoint; the order counts"


def build_datasets(data: SegmentationData, channels: int) -> tuple[SegmentationDataset, SegmentationDataset]:
    """The training and the validation images; set `transform` before use.

    Raises:
        InputError: a folder that is missing, an image without a mask, ...
    """
    if data.dataset == "shapes":
        if data.root:
            raise InputError("--data.dataset shapes draws its own images; for files give --data.dataset masks")
        train: SegmentationDataset = ShapeScenes("train", max(data.crop_size), channels, data.limit)
    else:
        train = _tree(data, data.train_split, channels, None)
    return train, build_val_dataset(data, channels, train.class_names)


def build_val_dataset(data: SegmentationData, channels: int, class_names: Sequence[str]) -> SegmentationDataset:
    """The validation images alone, of `class_names` in their order.

    Raises:
        InputError: as `build_datasets`, and for other classes than `class_names` in a file of them.
    """
    if data.dataset == "shapes":
        return ShapeScenes("val", max(data.crop_size), channels, data.limit)
    return _tree(data, data.val_split, channels, class_names)
