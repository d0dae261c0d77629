"""Images with one class each: from folders, drawn shapes, Imagenette, or whatever timm's data specs read."""

import importlib.util
import json
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from io import BytesIO
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from timm.data import create_reader
from timm.data.readers.reader import Reader
from timm.data.readers.shared_count import SharedCount
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset, Subset, get_worker_info
from torchvision.datasets import Imagenette

from dualtoken_vit.data.folders import image_files
from dualtoken_vit.data.images import MODES, load_image, reason
from dualtoken_vit.data.sampling import seeded
from dualtoken_vit.data.shapes import CLASSES, ShapeImages
from dualtoken_vit.data.threads import in_threads
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Data

IMAGENETTE_COUNTS = {"train": 9469, "val": 3925}
_WDS_IMAGES = ("jpg", "jpeg", "png", "webp")
_PACKAGES = {"wds": "webdataset", "hfds": "datasets", "tfds": "tensorflow_datasets"}

Record = tuple[str, Any, int]  # display name, what `load_image` takes, class index


class ImageDataset(Dataset):
    """Images that can be read in any order.

    Sample i is (image, class index); the image is `transform` of the PIL image, or that itself without one.

    Args:
        sources: What `load_image` takes, one an image.
        targets: Class index of each image.
        class_names: Name of each class.
        paths: Display name of each image.
        channels: 3 (RGB) or 1 (grey).
        folders: Whether a class is a folder (which should not be empty).
    """

    def __init__(
        self,
        sources: Sequence[Any],
        targets: list[int],
        class_names: tuple[str, ...],
        paths: list[str],
        channels: int = 3,
        folders: bool = False,
    ) -> None:
        self.sources, self.targets, self.class_names, self.paths = sources, targets, class_names, paths
        self.channels, self.folders = channels, folders
        self.transform: Callable | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = load_image(self.sources[index], self.channels, self.paths[index])
        return (self.transform(image) if self.transform else image), self.targets[index]

    def keep(self, indices: Sequence[int]) -> "ImageDataset":
        """The dataset of these images only."""
        kept = copy(self)
        kept.sources = Subset(self.sources, indices)
        kept.targets, kept.paths = [self.targets[i] for i in indices], [self.paths[i] for i in indices]
        return kept

    def relabel(self, class_names: tuple[str, ...], labels: Sequence[int]) -> None:
        """Bring the classes to another order: class i becomes labels[i]."""
        self.class_names, self.targets = class_names, [labels[target] for target in self.targets]

    def records(self) -> Iterator[Record]:
        """Every image, undecoded where that is possible."""
        return ((self.paths[i], self.sources[i], self.targets[i]) for i in range(len(self)))

    def verify(self, skip: bool = False, progress: bool = True) -> list[str]:
        """Read every image once.

        Args:
            skip: Leave out those that cannot be read, rather than stop.
            progress: Show a bar.

        Returns:
            The names of those left out.

        Raises:
            InputError: names the first that cannot be read, and says how many there are.
        """
        if isinstance(self.sources, ShapeImages):  # drawn, not read
            return []
        names = unreadable(self, skip, progress)
        self.leave_out(names)
        return names

    def leave_out(self, names: Collection[str], root: str = "") -> None:
        """Drop the images of these names, which do without their beginning `root`.

        Raises:
            InputError: where that leaves a class without images.
        """
        names = set(names)
        kept = self.keep([i for i, path in enumerate(self.paths) if path.removeprefix(root) not in names])
        lost = set(self.targets) - set(kept.targets)
        if lost:
            classes = _some([self.class_names[label] for label in sorted(lost)])
            example = next(path for path, label in zip(self.paths, self.targets, strict=True) if label in lost)
            raise InputError(f"no readable images in class {classes}, for example {example}")
        if len(kept) < len(self):
            self.sources, self.targets, self.paths = kept.sources, kept.targets, kept.paths


class ImageStream(IterableDataset):
    """Images that timm reads in the order in which they are stored, shard by shard (wds/, tfds/).

    There is no index, so the promises are weaker than a `ImageDataset`'s. In training the order depends on the seed,
    the epoch, and the numbers of processes and workers; shards are dealt out to those, and to give every process as
    many whole batches, a shard's images may come twice. In validation each process reads everything, with one worker,
    and takes its share: every image comes once.

    Args:
        reader: timm's reader, of PIL images and class indices.
        class_names: Name of each class.
        channels: 3 (RGB) or 1 (grey).
        records: Gives every image that a reader has.
    """

    def __init__(
        self,
        reader: Reader,
        class_names: tuple[str, ...],
        channels: int,
        records: Callable[[Reader], Iterator[Record]],
    ) -> None:
        reader.dist_rank, reader.dist_num_replicas = 0, 1  # until `epoch` says otherwise
        self.reader, self.class_names, self.channels, self._records = reader, class_names, channels, records
        self.labels: Sequence[int] = range(len(class_names))
        self.seed, self.rank, self.world = 0, 0, 1
        self.transform: Callable | None = None

    def __len__(self) -> int:
        return len(range(self.rank, len(self.reader), self.world))

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        info = get_worker_info()
        for number, (image, label) in enumerate(islice(iter(self.reader), self.rank, None, self.world)):
            image = load_image(image, self.channels)
            if self.transform:
                with seeded(self.seed, info.id if info else 0, number):
                    image = self.transform(image)
            yield image, self.labels[label]

    def epoch(
        self, batch_size: int, *, train: bool, seed: int, rank: int, world: int, workers: int
    ) -> tuple["ImageStream", int]:
        """The stream that process `rank` of `world` reads in one epoch, and how many workers can read it."""
        shards = len(self.reader.split_info.filenames)
        if train and shards < world:
            raise InputError(f"{shards} training shards cannot be dealt out to {world} processes: use fewer processes")
        workers = min(workers, shards // world if train else 1)
        stream = copy(self)
        stream.seed = seed
        # timm's reader asks torch.distributed, deals out validation shards unevenly, and starts but once.
        reader = stream.reader = copy(self.reader)
        reader.ds = None
        reader.is_training = reader.reinit_each_iter = train
        reader.batch_size = batch_size
        reader.common_seed = reader.worker_seed = seed
        reader.epoch_count = SharedCount()
        reader.dist_rank, reader.dist_num_replicas = (rank, world) if train else (0, 1)
        stream.rank, stream.world = (0, 1) if train else (rank, world)
        reader.set_loader_cfg(workers)
        return stream, workers

    def relabel(self, class_names: tuple[str, ...], labels: Sequence[int]) -> None:
        """Bring the classes to another order: class i becomes labels[i]."""
        self.class_names, self.labels = class_names, [labels[label] for label in self.labels]

    def records(self) -> Iterator[Record]:
        """Every image, undecoded where that is possible."""
        stream, _ = self.epoch(1, train=False, seed=0, rank=0, world=1, workers=0)
        for name, source, label in self._records(stream.reader):
            if not 0 <= label < len(self.labels):
                raise InputError(f"{name}: class {label}, but there are {len(self.class_names)} class names")
            yield name, source, self.labels[label]

    def verify(self, skip: bool = False, progress: bool = True) -> list[str]:
        """As `ImageDataset.verify`."""
        return unreadable(self, skip, progress)

    def leave_out(self, names: Collection[str], root: str = "") -> None:
        """Nothing to do: timm's readers leave out what they cannot read anyhow."""


Images = ImageDataset | ImageStream


def unreadable(dataset: Images, skip: bool, progress: bool) -> list[str]:
    """The names of the images that cannot be read. One is an InputError, unless `skip`."""

    def look(record: Record) -> tuple[str, str]:
        name, source, _ = record
        try:
            load_image(source, dataset.channels, name)
        except InputError as error:
            return name, str(error)
        return name, ""

    found = in_threads(look, dataset.records(), len(dataset), "reading every image" if progress else "")
    bad = [(name, problem) for name, problem in found if problem]
    if bad and not skip:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(f"{bad[0][1]}{more} (check-data names all; --data.unreadable skip leaves them out)")
    return [name for name, _ in bad]


def split_name(data: Data, split: str) -> str:
    """What the recipe calls the train or val split."""
    return {"train": data.train_split, "val": data.val_split}[split]


def _folder(data: Data, split: str, channels: int) -> ImageDataset:
    """ROOT/SPLIT/CLASS/**: a class a folder, in natural order, empty ones too."""
    if not data.root:
        raise InputError("--data.root is missing: give the folder that has train/CLASS/*.jpg and val/CLASS/*.jpg")
    folder = Path(data.root, split_name(data, split))
    for path in (Path(data.root), folder):
        if not path.is_dir():
            holdout = "; without a val folder give --data.holdout 0.1" if path == folder and split == "val" else ""
            raise InputError(f"{path}: no such folder; expected {folder}/CLASS/*.jpg{holdout}")
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        raise InputError(f"{folder}: has no class folders; expected {folder}/CLASS/*.jpg")
    names.sort(key=lambda name: (natural_key(name), name))
    files = [image_files(folder / name) for name in names]
    targets = [label for label, paths in enumerate(files) for _ in paths]
    paths = [path for paths in files for path in paths]
    return ImageDataset(paths, targets, tuple(names), paths, channels, folders=True)


def _shapes(data: Data, split: str, channels: int) -> ImageDataset:
    if data.root:
        raise InputError("--data.dataset shapes draws its own images; for files give --data.dataset folder")
    images = ShapeImages(split, data.image_size)
    paths = [f"{split}/{CLASSES[label]}-{index:04d}" for index, label in enumerate(images.targets)]
    return ImageDataset(images, images.targets, CLASSES, paths, channels)


def _imagenette(data: Data, split: str, channels: int) -> ImageDataset:
    """torchvision's Imagenette at 160 pixels, fetched where it is not yet in ROOT/imagenette2-160."""
    folder = Path(data.root, "imagenette2-160")
    try:
        classes = Imagenette(data.root, split, size="160px", download=not folder.is_dir()).classes
    except Exception as error:  # network, disk, archive
        raise InputError(
            f"{folder}: Imagenette is not there and cannot be fetched ({reason(error)}); unpack imagenette2-160.tgz "
            f"from https://github.com/fastai/imagenette into {data.root}, or use the folder recipe with --data.root"
        ) from error
    dataset = _folder(Data(root=str(folder)), split, channels)
    if len(dataset) != IMAGENETTE_COUNTS[split]:
        raise InputError(
            f"{folder / split}: {len(dataset)} images, not {IMAGENETTE_COUNTS[split]}, the unpacking was cut short; "
            f"remove {folder} and run again"
        )
    dataset.class_names = tuple(names[0] for names in classes)
    return dataset


class _ReaderSources(Sequence):
    """The files of one of timm's readers, as bytes in memory."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Any:
        file = self.reader[index][0]
        with file:
            return BytesIO(file.read())


def _open_reader(data: Data, split: str, **args: Any) -> Reader:
    """timm's reader for a data spec."""
    spec, name = data.dataset, split_name(data, split)
    package = _PACKAGES[spec.partition("/")[0].lower()]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"--data.dataset {spec}: needs the package {package}: pip install {package.replace('_', '-')}")
    try:
        return create_reader(spec, root=data.root or None, split=name, **args)
    except Exception as error:  # each package has its own errors for what is not there
        message = f"--data.dataset {spec}, root {data.root!r}, split {name!r}: {reason(error)}"
        raise InputError(message) from error


def _hfds(data: Data, split: str, channels: int) -> ImageDataset:
    """Hugging Face datasets, by timm: hfds/NAME or hfds/FOLDER; data.root is where downloads are kept."""
    reader, name = _open_reader(data, split), split_name(data, split)
    targets = list(reader.iter_targets())
    if not targets or min(targets) < 0:
        raise InputError(f"--data.dataset {data.dataset}: split {name!r} has no labels")
    class_names = tuple(reader.class_to_idx) or _numbers(targets)
    paths = [f"{name}/{index}" for index in range(len(targets))]
    return ImageDataset(_ReaderSources(reader), targets, class_names, paths, channels)


def _wds(data: Data, split: str, channels: int) -> ImageStream:
    """webdataset, by timm: wds/NAME; data.root has the shards and an _info.json, or the split names the shards
    (train-{000..127}.tar|128000). Classes are named in ROOT/classnames.txt, one a line, else numbered."""
    if not data.root:
        raise InputError(f"--data.root is missing: give the folder with the shards of {data.dataset}")
    args = dict(is_training=split == "train", input_img_mode="", input_key=";".join(_WDS_IMAGES))
    reader = _open_reader(data, split, **args)
    names = Path(data.root, "classnames.txt")
    class_names = tuple(names.read_text("utf-8").splitlines()) if names.is_file() else ()
    if not class_names or not reader.num_samples:
        title = f"looking through {split_name(data, split)}"
        labels = list(in_threads(itemgetter(2), _wds_records(reader), reader.num_samples or None, title))
        reader.num_samples = len(labels)
        class_names = class_names or _numbers(labels)
    return ImageStream(reader, class_names, channels, _wds_records)


def _wds_records(reader: Reader) -> Iterator[Record]:
    """The samples of timm's webdataset reader, undecoded: it would leave out those that it cannot read."""
    import webdataset as wds  # installed only by those who use it

    key = reader.split_info.alt_label
    for name in reader.split_info.filenames:
        shard = os.path.join(reader.root, name)
        try:
            for sample in wds.DataPipeline(wds.SimpleShardList([shard]), wds.tarfile_to_samples()):
                image = next((sample[kind] for kind in _WDS_IMAGES if kind in sample), b"")
                label = json.loads(sample["json"])[key] if key else int(sample["cls"])
                yield f"{shard}/{sample['__key__']}", BytesIO(image), label
        except Exception as error:
            raise InputError(f"{shard}: cannot be read ({reason(error)})") from error


def _stream_records(reader: Reader) -> Iterator[Record]:
    """What timm's reader gives, in order."""
    return ((f"{reader.split_info.name}/{number}", *sample) for number, sample in enumerate(reader))


def _tfds(data: Data, split: str, channels: int) -> ImageStream:
    """TensorFlow Datasets, by timm: tfds/NAME; data.root is where they are kept."""
    args = dict(is_training=split == "train", input_img_mode=MODES[channels], download=True)
    reader = _open_reader(data, split, **args)
    if not reader.class_to_idx:
        raise InputError(f"--data.dataset {data.dataset}: has no class names")
    return ImageStream(reader, tuple(reader.class_to_idx), channels, _stream_records)


def _numbers(labels: Sequence[int]) -> tuple[str, ...]:
    """Names for classes that have none."""
    return tuple(str(label) for label in range(max(labels, default=-1) + 1))


KINDS: dict[str, Callable[[Data, str, int], Images]] = {
    "folder": _folder,
    "shapes": _shapes,
    "imagenette": _imagenette,
    "hfds": _hfds,
    "wds": _wds,
    "tfds": _tfds,
}


def read_split(data: Data, split: str, channels: int) -> Images:
    """The train or val split as it is found: classes may be empty, and differ from the other split's."""
    if channels not in MODES:
        raise InputError(f"--model.in-chans {channels}: images have 3 channels (RGB) or 1 (grey)")
    kind = data.dataset.partition("/")[0].lower()
    if kind not in KINDS:
        raise InputError(f"--data.dataset {data.dataset}: unknown; there are {', '.join(KINDS)}")
    return KINDS[kind](data, split, channels)


def build_datasets(data: Data, channels: int) -> tuple[Images, Images]:
    """The training and the validation images; set `transform` before use.

    Raises:
        InputError: no such folder, an empty class, classes that differ between the splits, ...
    """
    train = _filled_split(data, "train", channels)
    if data.holdout:
        return _hold_out(train, data.holdout)
    return train, build_val_dataset(data, channels, train.class_names)


def build_val_dataset(data: Data, channels: int, class_names: Sequence[str] | None = None) -> Images:
    """The validation images alone; with `class_names`, the targets are indices into them.

    Raises:
        InputError: as `build_datasets`, and where the dataset has other classes than `class_names`.
    """
    if data.holdout:
        val = _hold_out(_filled_split(data, "train", channels), data.holdout)[1]
    else:
        val = _filled_split(data, "val", channels)
    if class_names is not None:
        _reorder(val, tuple(class_names), data)
    return val


def _filled_split(data: Data, split: str, channels: int) -> Images:
    """`read_split`, where there are images and no class folder is empty."""
    dataset = read_split(data, split, channels)
    where = os.path.join(data.root, split_name(data, split))
    if isinstance(dataset, ImageDataset) and dataset.folders:
        filled = set(dataset.targets)
        empty = [name for label, name in enumerate(dataset.class_names) if label not in filled]
        if empty:
            raise InputError(f"{where}: no images in class {_some(empty)}; add some, or remove the class everywhere")
    if not len(dataset):
        raise InputError(f"{where}: no images")
    return dataset


def _reorder(val: Images, class_names: tuple[str, ...], data: Data) -> None:
    """Bring the targets to the order of `class_names`."""
    numbered = data.dataset.startswith(tuple(_PACKAGES)) and val.class_names == _numbers(range(len(val.class_names)))
    if numbered and len(val.class_names) <= len(class_names):
        val.relabel(class_names, range(len(class_names)))
        return
    missing = [name for name in class_names if name not in val.class_names]
    unknown = [name for name in val.class_names if name not in class_names]
    if missing or unknown:
        differences = [f"no {_some(missing)}"] * bool(missing) + [f"an unknown {_some(unknown)}"] * bool(unknown)
        raise InputError(
            f"{os.path.join(data.root, split_name(data, 'val'))}: other classes than the {len(class_names)} of the "
            f"training images: {' and '.join(differences)}"
        )
    val.relabel(class_names, [class_names.index(name) for name in val.class_names])


def _hold_out(dataset: Images, share: float) -> tuple[ImageDataset, ImageDataset]:
    """(the rest, `share` of each class): the same images in every run, whatever its seed."""
    if not 0 < share <= 0.5:
        raise InputError(f"--data.holdout {share}: must be between 0 and 0.5")
    if isinstance(dataset, ImageStream):
        raise InputError("--data.holdout: not for data that is read as a stream; name two splits instead")
    held: set[int] = set()
    for label, name in enumerate(dataset.class_names):
        members = [index for index, target in enumerate(dataset.targets) if target == label]
        if len(members) == 1:
            raise InputError(f"--data.holdout {share}: class {name!r} has only one image")
        held.update(random.Random(0).sample(members, round(share * len(members)) or min(1, len(members))))
    return dataset.keep([i for i in range(len(dataset)) if i not in held]), dataset.keep(sorted(held))


def _some(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
