"""Shards of images: what each process and worker reads, in which order, and what is refused."""

import io
import json
import threading
from copy import copy
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

import pytest
import torch
from helpers import truncate
from PIL import Image
from torchvision.transforms.functional import to_tensor

from dualtoken_vit.data.classification import build_datasets, build_val_dataset
from dualtoken_vit.data.sampling import loader
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import ClassificationData, from_dict
from dualtoken_vit.tasks.registry import get_task


@pytest.fixture
def shards(tmp_path):
    """webdataset: 3 shards of 5 and 2 of 5 images in 2 classes; image i of a split has the colour (i, i, i)."""
    wds = pytest.importorskip("webdataset")
    info = {}
    for split, count in (("train", 3), ("val", 2)):
        names = [f"{split}-{shard:04d}.tar" for shard in range(count)]
        for shard, name in enumerate(names):
            with wds.TarWriter(str(tmp_path / name)) as tar:
                for index in range(5 * shard, 5 * shard + 5):
                    file = io.BytesIO()
                    Image.new("RGB", (9, 7), (index,) * 3).save(file, "png")
                    tar.write({"__key__": f"{index:04d}", "png": file.getvalue(), "cls": str(index % 2).encode()})
        info[split] = dict(name=split, num_samples=5 * count, filenames=names, shard_lengths=[5] * count)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
    return ClassificationData(dataset="wds/photos", root=str(tmp_path))


def stream(dataset, size, **args):
    """[(colour, class), ...] of each batch."""
    dataset.transform = to_tensor
    batches = loader(dataset, size, seed=1, **args)
    read = [list(zip((255 * x[:, 0, 0, 0]).round().int().tolist(), y.tolist(), strict=True)) for x, y in batches]
    assert len(read) == len(batches)
    return read


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_validated_exactly_once(shards, world, workers):
    _, val = build_datasets(shards, 3)
    assert (len(val), val.class_names) == (10, ("0", "1"))
    read = [stream(val, 4, train=False, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert sorted(chain(*chain(*read))) == [(index, index % 2) for index in range(10)]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_trained_on_by_seed_and_epoch(shards, workers):
    train, _ = build_datasets(shards, 3)
    epochs = [stream(train, 4, train=True, epoch=epoch, workers=workers) for epoch in range(2)]
    assert all(len(batch) == 4 for epoch in epochs for batch in epoch)
    assert all(colour % 2 == label for epoch in epochs for batch in epoch for colour, label in batch)
    assert len(set(chain(*epochs[0]))) >= 12
    assert epochs[0] != epochs[1]
    assert stream(train, 4, train=True, workers=workers) == epochs[0]
    assert stream(train, 4, train=True, skip=2, workers=workers) == epochs[0][2:]


def test_shards_are_dealt_out_to_processes(shards):
    train, _ = build_datasets(shards, 3)
    parts = [stream(train, 2, train=True, rank=rank, world=3, workers=4) for rank in range(3)]
    assert {len(part) for part in parts} == {3}
    seen = [{colour // 5 for batch in part for colour, _ in batch} for part in parts]
    assert sorted(map(sorted, seen)) == [[0], [1], [2]]  # a shard each
    with pytest.raises(InputError, match="3 training shards cannot be divided among 4 processes"):
        loader(train, 2, train=True, seed=0, world=4)


def random_pair(image):
    """A transform that can be sent to workers that are no forks, unlike a lambda."""
    return torch.rand(2)


def test_shards_augmented_alike(shards):
    train, _ = build_datasets(shards, 3)
    train.transform = random_pair
    for workers in (0, 1):
        these, those = ([x for x, _ in loader(train, 4, train=True, seed=5, workers=workers)] for _ in range(2))
        assert torch.equal(torch.cat(these), torch.cat(those))
        assert len(torch.cat(these).unique()) == 2 * 16


def test_class_names_of_shards(shards, tmp_path):
    assert build_val_dataset(shards, 3, ["odd", "even", "none"]).class_names == ("odd", "even", "none")
    (tmp_path / "classnames.txt").write_text("even\nodd\n")
    train, val = build_datasets(shards, 3)
    assert train.class_names == val.class_names == ("even", "odd")
    val = build_val_dataset(shards, 3, ["odd", "even"])
    assert sorted(chain(*stream(val, 4, train=False))) == [(index, 1 - index % 2) for index in range(10)]
    (tmp_path / "classnames.txt").write_text("even\n")
    with pytest.raises(InputError, match=r"train-0000\.tar/0001: class 1, but there are 1 class names"):
        build_datasets(shards, 3)[0].verify()
    (tmp_path / "classnames.txt").write_text("even\nodd\n\n\n")
    assert build_datasets(shards, 3)[0].class_names == ("even", "odd")
    for names, fault in (
        ("odd\nodd\n", "line 2: the class 'odd' is listed twice"),
        ("\nodd\n", "line 1: a class without"),
    ):
        (tmp_path / "classnames.txt").write_text(names)
        with pytest.raises(InputError, match=rf"classnames\.txt, {fault}"):
            build_datasets(shards, 3)


def test_shards_by_their_names(shards, tmp_path):
    (tmp_path / "_info.json").unlink()
    named = replace(shards, train_split="train-{0000..0002}.tar|15", val_split="val-{0000..0001}.tar")
    train, val = build_datasets(named, 3)
    assert (len(train), len(val)) == (15, 10)
    with pytest.raises(InputError, match=r"_info\.json: split 'train' cannot be read \(.*No such file"):
        build_datasets(shards, 3)
    with pytest.raises(InputError, match=r"val-0002\.tar: cannot be read \(.*No such file"):
        build_datasets(replace(named, val_split="val-{0000..0002}.tar"), 3)
    with pytest.raises(InputError, match=r"--data\.holdout"):
        build_datasets(replace(named, holdout=0.1), 3)
    with pytest.raises(InputError, match=r"^--data\.exclude is not available for data that is read as a stream"):
        build_datasets(replace(named, exclude=("0",)), 3)


def test_options_that_need_the_number_of_an_image(shards):
    sections = {"augment": {"hflip": "alternate"}, "class_weights": "inverse"}
    recipe = from_dict({"data": vars(shards) | {"balanced": 0.5}} | sections)
    flags = "--augment.hflip alternate, --data.balanced, --class-weights"
    with pytest.raises(InputError, match=f"^{flags}: not available for data that is read as a stream"):
        get_task("classification").prepare(recipe, recipe.model)


@pytest.mark.parametrize("place", ["split", "_info.json"])
@pytest.mark.parametrize("name", ["pipe:touch PWNED; cat val-0000.tar", "scp://a/$(touch PWNED).tar", "file:x.tar"])
def test_shards_run_no_commands(shards, tmp_path, monkeypatch, name, place):
    """The names may come from a stranger's checkpoint or data set."""
    monkeypatch.chdir(tmp_path)
    if place == "split":
        shards = replace(shards, val_split=f"{name}|1")
    else:
        info = json.loads((tmp_path / "_info.json").read_text())
        info["splits"]["val"]["filenames"] = ["val-0000.tar", name]
        (tmp_path / "_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError) as caught:
        list(build_val_dataset(shards, 3))
    scheme = name.partition(":")[0]
    assert str(caught.value) == f"shard {name!r}: must be a file or an http(s) URL, not {scheme}:"
    assert not (tmp_path / "PWNED").exists()


def test_shards_from_the_web(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        val = build_val_dataset(replace(shards, val_split=f"{url}/val-{{0000..0001}}.tar"), 3)
        assert sorted(chain(*stream(val, 4, train=False))) == [(index, index % 2) for index in range(10)]
        with pytest.raises(InputError, match=r"x\.tar: cannot be read"):
            build_val_dataset(replace(shards, val_split=f"{url}/';touch PWNED;'x.tar"), 3)
        server.shutdown()
    assert not (tmp_path / "PWNED").exists()


def test_unreadable_images_in_shards(shards, tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "val-0001.tar")) as tar:
        tar.write({"__key__": "0005", "png": b"no image", "cls": b"0"})
        tar.write({"__key__": "0006", "cls": b"0"})
    val = build_val_dataset(shards, 3, ["even", "odd"])
    with pytest.raises(InputError, match=r"val-0001\.tar/0005: cannot be read as an image.*and 1 more"):
        val.verify()
    with pytest.raises(InputError, match=r"val-0001\.tar/0005: cannot be read as an image"):
        stream(val, 4, train=False)
    val = build_val_dataset(replace(shards, val_split="val-{0000..0001}.tar|7"), 3, ["even", "odd"])
    again = copy(val)
    assert [name[-4:] for name in val.verify(skip=True)] == ["0005", "0006"]
    again.load_state_dict(val.state_dict())
    for each in (val, again):
        parts = [stream(each, 4, train=False, rank=rank, world=2) for rank in range(2)]
        assert sorted(chain(*chain(*parts))) == [(index, index % 2) for index in range(5)]
    truncate(tmp_path / "val-0000.tar")
    with pytest.raises(InputError, match=r"val-0000\.tar: cannot be read"):
        val.verify()


@pytest.mark.parametrize("stated", [4, 6])
def test_a_number_of_images_that_is_wrong(shards, tmp_path, stated):
    """Validation would end early, or wait for images that never come."""
    (tmp_path / "classnames.txt").write_text("even\nodd\n")
    val = build_val_dataset(replace(shards, val_split=f"val-{{0000..0000}}.tar|{stated}"), 3)
    found = "more" if stated < 5 else "5"
    message = rf"val-.*\|{stated}: said to have {stated} images, but has {found}: correct the number"
    for use in (
        val.verify,
        partial(stream, val, 2, train=False),
        partial(stream, val, 2, train=False, rank=1, world=2),
    ):
        with pytest.raises(InputError, match=message):
            use()


def test_shards_from_which_images_are_left_out_fill_their_batches(shards, tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "train-0002.tar")) as tar:
        tar.write({"__key__": "0010", "png": b"no image", "cls": b"0"})
    train, _ = build_datasets(replace(shards, train_split="train-{0000..0002}.tar|11"), 3)
    assert [name[-4:] for name in train.verify(skip=True)] == ["0010"]
    assert len(train) == 10
    batches = stream(train, 4, train=True)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert set(chain(*batches)) == {(index, index % 2) for index in range(10)}
    with pytest.raises(InputError, match=r"no images for worker \d of 3; use fewer"):
        [stream(train, 2, train=True, rank=rank, world=3) for rank in range(3)]


def test_labels_in_the_json_of_a_shard(shards, tmp_path):
    wds = pytest.importorskip("webdataset")
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (3, 3, 3)).save(file, "jpeg")
    with wds.TarWriter(str(tmp_path / "val-0000.tar")) as tar:
        tar.write({"__key__": "a", "jpe": file.getvalue(), "cls": b"1", "json": {"label": 0}})
    info = json.loads((tmp_path / "_info.json").read_text())
    info["splits"]["val"] |= dict(num_samples=1, filenames=["val-0000.tar"], alt_label="label")
    (tmp_path / "_info.json").write_text(json.dumps(info))
    (tmp_path / "classnames.txt").write_bytes("zero\u2028\r\none\xff\n".encode("latin-1", "xmlcharrefreplace"))
    val = build_val_dataset(shards, 3)
    assert val.class_names == ("zero&#8232;", "one\udcff")
    assert [(image.size, label) for image, label in val] == [((9, 7), 0)]
