"""Classification images that are read in the order in which they are stored: webdataset shards, TensorFlow Datasets."""

import json
import random
from collections.abc import Iterator, Sequence
from copy import copy
from io import BytesIO
from itertools import count, islice
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from torch.utils.data import IterableDataset, get_worker_info

from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.folders import EXTENSIONS
from dualtoken_vit.data.images import load_image, prefixed
from dualtoken_vit.data.sampling import mix, seeded
from dualtoken_vit.data.threads import verify_each
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import counted, printable

SHUFFLE = dict(bufsize=8192, initial=2048)  # timm's buffer of encoded images

Record = tuple[str, Any, int]  # display name, what `load_image` takes, class index


class ImageStream(IterableDataset, ImageData):
    """Images without an index, stored in `parts` that can only be read in order.

    In training, the order depends on the seed, the epoch, and the numbers of processes and workers. The parts are
    divided among those, and a part's images may be repeated so that every process gets the same number of full batches.
    In validation, each process reads everything with one worker and decodes its share: every image occurs once.

    A kind of storage is a subclass with `read`, `parts` and `samples`.
    """

    parts: int  # the most readers that the images can be divided among
    samples: int  # number of stored images
    place = ""  # for messages
    channels: int  # 3 (RGB) or 1 (greyscale)
    labels: Sequence[int] = ()  # the target of each stored class index
    left_out: frozenset[str] = frozenset()
    train, seed, rank, world, workers = False, 0, 0, 1, 0
    share = 0  # training images per worker and epoch

    def read(self, seed: int | None = None, repeat: int = 0, reader: int = 0, readers: int = 1) -> Iterator[Record]:
        """Every image once, in the order in which they are stored; with a seed, those of `reader` out of `readers`.

        `seed` decides which images these are, and with `repeat` their order.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        if self.train:
            return self.share * max(self.workers, 1)
        return len(range(self.rank, self.samples - len(self.left_out), self.world))

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        info = get_worker_info()
        worker = info.id if info else 0
        records = islice(self.records(), self.rank, None, self.world)
        if self.train:
            records = islice(self._repeated(worker), self.share)
        for number, (name, source, label) in enumerate(records):
            image: Any = load_image(source, self.channels, name)
            if self.transform:
                with seeded(self.seed, self.rank, worker, number), prefixed(name):
                    image = self.transform(image)
            yield image, label

    def epoch(self, batch_size: int, train: bool, seed: int, rank: int, world: int, workers: int) -> "ImageStream":
        """The stream that process `rank` of `world` reads in one epoch, with at most `workers` workers."""
        if train and self.parts < world:
            message = f"{self.parts} training shards cannot be divided among {world} processes; use fewer processes"
            raise InputError(message)
        stream = copy(self)
        stream.train, stream.seed, stream.rank, stream.world = train, seed, rank, world
        stream.workers = min(workers, self.parts // world if train else 1)
        share = ceil((self.samples - len(self.left_out)) / (world * max(stream.workers, 1)))
        stream.share = ceil(share / batch_size) * batch_size
        return stream

    def _repeated(self, worker: int) -> Iterator[Record]:
        """The training images of a worker, repeated without end."""
        workers = max(self.workers, 1)
        reader, readers = self.rank * workers + worker, self.world * workers
        for repeat in count():
            records = self._used(self.read(self.seed, repeat, reader, readers))
            first = next(records, None)
            if first is None:
                message = f"no images for worker {reader + 1} of {readers}; use fewer --data.workers or processes"
                raise InputError(message)
            yield first
            yield from records

    def _used(self, records: Iterator[Record]) -> Iterator[Record]:
        """The records that are not left out, with the targets that `relabel` sets."""
        for name, source, label in records:
            if not 0 <= label < len(self.labels):
                raise InputError(f"{printable(name)}: class {label}, but there are {len(self.labels)} class names")
            if name not in self.left_out:
                yield name, source, self.labels[label]

    def relabel(self, class_names: tuple[str, ...], labels: Sequence[int]) -> None:
        """Rename and reorder the classes: class i becomes class labels[i]."""
        self.class_names, self.labels = class_names, [labels[label] for label in self.labels]

    def records(self) -> Iterator[Record]:
        """Every image, still encoded; an InputError where there are more or fewer than `samples`, before the last."""
        records, expected, number = self._used(self.read()), self.samples - len(self.left_out), 0
        for number, record in enumerate(records, start=1):
            if number == expected and next(records, None) is not None:
                raise self._miscounted("more")
            yield record
        if number != expected:
            raise self._miscounted(str(number))

    def _miscounted(self, found: str) -> InputError:
        stated = counted(self.samples - len(self.left_out), "image")
        return InputError(f"{printable(self.place)}: said to have {stated}, but has {found}: correct the number")

    def verify(self, skip: bool = False) -> list[str]:
        names = unreadable(self, skip)
        self.left_out |= set(names)
        return names

    def state_dict(self) -> dict[str, Any]:
        return {"left_out": sorted(self.left_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left_out = frozenset(state["left_out"])


def unreadable(dataset: Any, skip: bool) -> list[str]:
    """The names of the unreadable images of a dataset with `records` and `channels`; without `skip`, an InputError."""
    bad = verify_each(
        lambda record: load_image(record[1], dataset.channels, record[0]),
        dataset.records(),
        len(dataset),
        "reading every image",
        skip,
        "--data.unreadable skip leaves them out",
    )
    return [name for name, _, _ in bad]


class Shards(ImageStream):
    """webdataset's tar files.

    Args:
        root: their folder; names may also be absolute, or http(s) URLs
        split: a split of ROOT/_info.json, or the names of the shards: train-{000..127}.tar, or with their number of
            images, train-{000..127}.tar|128000; without it `samples` is 0
        channels: 3 (RGB) or 1 (greyscale)

    Raises:
        InputError: for a split that does not exist, or another kind of URL.
    """

    def __init__(self, root: str, split: str, channels: int) -> None:
        from webdataset.shardlists import expand_urls  # installed only by those who use it

        self.channels, self.place = channels, f"{root}, {split}"
        self.label_key = ""  # of the json file of each sample; default: the class is in the cls file
        if ".tar" in split:
            names, _, number = split.partition("|")
            shards, self.samples = expand_urls(names), int(number) if number.isdecimal() else 0
        else:
            path = Path(root, "_info.json")
            try:
                info = json.loads(path.read_bytes())["splits"][split]
                shards, self.samples = info["filenames"], int(info["num_samples"])
                self.label_key = info.get("alt_label", "")
            except Exception as error:  # it may contain anything
                raise InputError(
                    f"{printable(path)}: split {split!r} cannot be read ({reason(error)}); or name the shards in "
                    "--data.train-split and --data.val-split: train-{000..127}.tar"
                ) from error
        self.shards = [name if _is_url(name) else str(Path(root, name)) for name in shards]
        self.parts = len(self.shards)

    def read(self, seed: int | None = None, repeat: int = 0, reader: int = 0, readers: int = 1) -> Iterator[Record]:
        import webdataset as wds

        if seed is None:
            return self._read(self.shards)
        shards = random.Random(seed).sample(self.shards, self.parts)[reader::readers]  # the same order in all readers
        return wds.detshuffle(**SHUFFLE, seed=mix(seed, repeat, reader)).run(self._read(shards))

    def _read(self, shards: Sequence[str]) -> Iterator[Record]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for shard in shards:
            try:  # opened here, because webdataset opens URLs with shell commands
                with urlopen(shard, timeout=60) if _is_url(shard) else open(shard, "rb") as file:
                    for sample in group_by_keys(tar_file_expander([{"url": shard, "stream": file}])):
                        image = next((data for kind, data in sample.items() if f".{kind.lower()}" in EXTENSIONS), b"")
                        label = json.loads(sample["json"])[self.label_key] if self.label_key else sample["cls"]
                        yield f"{shard}/{sample['__key__']}", BytesIO(image), int(label)
            except Exception as error:
                raise InputError(f"{printable(shard)}: cannot be read ({reason(error)})") from error


def _is_url(name: str) -> bool:
    """Whether a shard is read from the web; an InputError for schemes other than http(s), such as pipe:COMMAND."""
    scheme = urlsplit(name).scheme
    if scheme in ("http", "https"):
        return True
    if len(scheme) > 1:  # a drive of Windows has one letter
        raise InputError(f"shard {printable(name)!r}: must be a file or an http(s) URL, not {scheme}:")
    return False


class TensorFlowDataset(ImageStream):
    """A split of TensorFlow Datasets, kept in the folder `root`; "": the package's own."""

    def __init__(self, name: str, root: str, split: str, channels: int) -> None:
        import tensorflow_datasets as tfds  # installed only by those who use it

        self.builder, self.split, self.channels = tfds.builder(name, data_dir=root or None), split, channels
        self.place = f"{name}, {split}"
        self.builder.download_and_prepare()
        names = self.builder.info.features["label"].names
        self.class_names, self.labels = tuple(names), range(len(names))
        self.parts = self.samples = self.builder.info.splits[split].num_examples

    def read(self, seed: int | None = None, repeat: int = 0, reader: int = 0, readers: int = 1) -> Iterator[Record]:
        import tensorflow_datasets as tfds

        order = None if seed is None else mix(seed, repeat, reader) % 2**31
        data = self.builder.as_dataset(
            split=self.split if seed is None else tfds.even_splits(self.split, readers)[reader],
            decoders={"image": tfds.decode.SkipDecoding()},
            shuffle_files=seed is not None,
            read_config=tfds.ReadConfig(shuffle_seed=order, add_tfds_id=True),
        )
        if seed is not None:
            data = data.shuffle(SHUFFLE["bufsize"], order)
        for sample in tfds.as_numpy(data):
            yield sample["tfds_id"].decode(), BytesIO(sample["image"]), int(sample["label"])
