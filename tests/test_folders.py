"""Which files are images: each real file once, whatever links there are, and every extension that Pillow reads."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import native, need_name
from PIL import Image

from dualtoken_vit.data.classification import build_datasets
from dualtoken_vit.data.folders import EXTENSIONS, image_files, read_lines, scan, skipped_note
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import check_folder, counted, printable
from dualtoken_vit.recipes import ClassificationData


@pytest.fixture
def tree(tmp_path):
    """{train,val}/{a,b}/{0,1,2}.png"""
    for split in ("train", "val"):
        for label, name in enumerate("ab"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (4, 4), (label, index, split == "val")).save(folder / f"{index}.png")
    return tmp_path


def test_links_to_folders_above_are_not_followed(tree):
    a = tree / "train" / "a"
    for name, target in (("self", "."), ("up", ".."), ("top", "../.."), ("root", "/")):
        (a / name).symlink_to(Path(target))
    (tree / "train" / "all").symlink_to(".")
    assert image_files(a) == [str(a / f"{index}.png") for index in range(3)]
    train, _ = build_datasets(ClassificationData(root=str(tree)), 3)
    assert train.class_names == ("a", "b")
    assert train.targets == [0, 0, 0, 1, 1, 1]
    assert train.notes == ()


def test_each_real_file_is_listed_once_by_its_name_without_links(tree):
    a = tree / "train" / "a"
    (a / "deep").mkdir()
    Image.new("RGB", (4, 4)).save(a / "deep" / "x.png")
    (a / "0 again.png").symlink_to("0.png")
    (a / "again").symlink_to("deep")
    (a / "deep" / "loop").symlink_to(Path("../deep"))
    (a / "elsewhere").symlink_to(tree / "val" / "a")
    expected = [a / "0.png", a / "1.png", a / "2.png", a / "deep" / "x.png"]
    expected += [a / "elsewhere" / f"{index}.png" for index in range(3)]
    assert image_files(a) == [str(path) for path in expected]
    images, others = scan(a)
    assert [os.path.realpath(path) for path in images] == list(images.values())
    assert others == []


def test_classes_may_be_links_to_real_folders(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("links")
    for split in ("train", "val"):
        (other / split).mkdir()
        for name in "ab":
            (other / split / name).symlink_to(tree / split / name)
    train, val = build_datasets(ClassificationData(root=str(other)), 3)
    assert train.class_names == ("a", "b")
    assert train.targets == val.targets == [0, 0, 0, 1, 1, 1]
    assert train.image_names[0] == str(other / "train" / "a" / "0.png")


def test_a_link_above_does_not_displace_the_file_below(tmp_path):
    deep = tmp_path / "a" / "deep"
    deep.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(deep / "x.png")
    (tmp_path / "a" / "0.png").symlink_to(Path("deep/x.png"))
    (tmp_path / "a" / "other").symlink_to("deep")
    assert scan(tmp_path / "a") == ({str(deep / "x.png"): str(deep / "x.png")}, [])
    assert image_files(tmp_path) == [str(deep / "x.png")]


def test_links_to_themselves_are_skipped(tree):
    train = tree / "train"
    for folder in (train, train / "a"):
        (folder / "loop").symlink_to("loop")
    assert scan(train / "a")[1] == [str(train / "a" / "loop")]
    assert len(image_files(train / "a")) == 3
    found, _ = build_datasets(ClassificationData(root=str(tree)), 3)
    assert found.class_names == ("a", "b")
    note = f"skipped files that are not images in a class folder: 2, for example {train / 'loop'}"
    assert found.notes == (note,)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("link", "target", "name"), [("b/link.png", "../a/1.png", "1.png"), ("c", "a", "0.png")])
def test_a_file_in_two_classes_is_refused_in_training_data(tree, split, link, target, name):
    for each in ("train", "val"):
        (tree / each / "c").mkdir()
        Image.new("RGB", (4, 4), "blue").save(tree / each / "c" / "9.png")
    if link == "c":
        shutil.rmtree(tree / split / "c")
    (tree / split / link).symlink_to(Path(target))
    data = ClassificationData(root=str(tree))
    first, second = tree / split / "a" / name, tree / split / (link if link.endswith(".png") else f"{link}/{name}")
    count = 3 if link == "c" else 1
    shared = f"files in more than one class: {count}, for example {first} = {second}"
    if split == "train":
        with pytest.raises(InputError) as caught:
            build_datasets(data, 3)
        assert str(caught.value) == f"{shared}; keep each training file in one class"
    else:
        val = build_datasets(data, 3)[1]
        assert val.targets == ([0, 0, 0, 1, 1, 1, 2, 2, 2] if link == "c" else [0, 0, 0, 1, 1, 1, 1, 2])
        assert val.notes == (shared,)


def test_a_link_to_nowhere_is_not_lost(tree):
    (tree / "train" / "a" / "9.png").symlink_to("missing.png")
    train, _ = build_datasets(ClassificationData(root=str(tree)), 3)
    with pytest.raises(InputError, match=native(r"train/a/9\.png: no such file")):
        train.verify()


@pytest.mark.parametrize("extension", [".jfif", ".jpe", ".JPEG", ".jp2", ".avif", ".apng", ".tga", ".qoi", ".mpo"])
def test_extensions_that_pillow_reads(tree, extension):
    path = tree / "train" / "a" / f"x{extension}"
    Image.new("RGB", (16, 16), "red").save(path)
    train, _ = build_datasets(ClassificationData(root=str(tree)), 3)
    assert str(path) in train.image_names
    assert train.verify() == []


def test_extensions_of_files_that_pillow_cannot_decode():
    """Formats that Pillow writes or identifies only, and PostScript, which is a program."""
    assert not {".pdf", ".palm", ".mpeg", ".mpg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".eps"} & {*EXTENSIONS}
    assert {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"} <= {*EXTENSIONS}


def test_what_is_skipped_is_reported_in_one_line(tree):
    a = tree / "train" / "a"
    film, shown = a / "film\n.mp4", a / r"film\n.mp4"
    need_name(a, film.name)
    for path in (a / "notes.txt", a / ".hidden.txt", a / "._0.png", film, tree / "train" / "loose.png"):
        path.write_bytes(b"")
    (a / ".cache").mkdir()
    (a / ".cache" / "0.png").write_bytes(b"")
    train, val = build_datasets(ClassificationData(root=str(tree)), 3)
    assert len(train) == 6
    example = tree / "train" / "loose.png"
    assert train.notes == (f"skipped files that are not images in a class folder: 3, for example {example}",)
    assert val.notes == ()
    assert scan(a)[1] == [str(film), str(a / "notes.txt")]
    assert skipped_note(scan(a)[1]) == f"skipped files that are not images: 2, for example {shown}"


def test_a_folder_that_cannot_be_read(tree):
    with pytest.raises(InputError, match=r"none: cannot be read \((No such file or directory|The system cannot.*)\)"):
        scan(tree / "none")


def test_names_that_are_not_utf_8_are_listed(tmp_path):
    name = "caf\udce9.png"
    need_name(tmp_path, name)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / name)
    assert image_files(tmp_path) == [str(tmp_path / name)]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain ü 写真 🐟 $x$", "plain ü 写真 🐟 $x$"),
        ("a\nb\r\tc\x1b[31m\x7f\x85", r"a\nb\r\tc\x1b[31m\x7f\x85"),
        ("a\u2028b", r"a\u2028b"),
        ("caf\udce9", "caf\ufffd"),
        ("\ud800", "\ufffd"),  # half of a pair, from a JSON file
    ],
)
def test_printable(name, shown):
    assert printable(name) == shown
    assert len(shown.splitlines()) == 1
    shown.encode()


def test_lines_of_a_file_from_any_editor(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffone\r\ntwo\u2028\x0bstill two\rthree\n".encode() + b"caf\xe9")
    assert read_lines(path) == ["one", "two\u2028\x0bstill two", "three", "caf\udce9"]
    path.write_text("one\ntwo\n", "utf-16")
    with pytest.raises(InputError, match=r"names\.txt: not text in UTF-8"):
        read_lines(path)
    with pytest.raises(InputError, match=r"none\.txt: cannot be read \(No such file"):
        read_lines(tmp_path / "none.txt")


def test_a_folder_that_cannot_be_listed_is_not_refused(tmp_path, monkeypatch):
    """Files in it can be read if their names are known."""

    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    with pytest.raises(InputError, match=r"an empty folder; give the one that contains images$"):
        check_folder(tmp_path, "images")
    monkeypatch.setattr(os, "scandir", scandir)
    check_folder(tmp_path, "images")


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (0, "image", "0 images"),
        (np.int64(1), "image", "1 image"),
        (2, "box", "2 boxes"),
        (3, "trained class", "3 trained classes"),
    ],
)
def test_numbers_with_their_nouns(number, noun, words):
    assert counted(number, noun) == words
