"""Tables of images and their classes, and folders without splits."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import need_name
from PIL import Image

from dualtoken_vit.data.check.classification import check as check_data
from dualtoken_vit.data.classification import build_datasets
from dualtoken_vit.data.tables import read_labels
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Classification, ClassificationData

LABELS = {"a.png": "dog", "b.png": "cat", "c.png": "dog", "d.png": "cat"}


def save_images(folder, names=LABELS):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write(path, rows):
    """A CSV or Parquet file of rows, the first one its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        columns = dict(zip(rows[0], map(list, zip(*rows[1:], strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def pairs(dataset):
    """{file name: class} of a dataset."""
    return {
        name.rpartition("/")[2]: dataset.class_names[target]
        for name, target in zip(dataset.image_names, dataset.targets, strict=True)
    }


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_with_a_column_of_splits(tmp_path, suffix):
    save_images(tmp_path / "images")
    rows = [(name, label, "train" if name < "c" else "valid") for name, label in LABELS.items()]
    write(tmp_path / f"labels.{suffix}", [("file_name", "label", "split"), *rows])
    for root in (tmp_path, tmp_path / f"labels.{suffix}"):
        train, val = build_datasets(ClassificationData(root=str(root)), 3)
        assert train.class_names == val.class_names == ("cat", "dog")
        assert pairs(train) == {"a.png": "dog", "b.png": "cat"}
        assert pairs(val) == {"c.png": "dog", "d.png": "cat"}
    assert np.array_equal(train[1][0], Image.open(tmp_path / "images/b.png"))


def test_a_split_by_several_names(tmp_path):
    save_images(tmp_path / "images")
    rows = [
        ("file", "label", "split"),
        ("a.png", "dog", " train"),
        ("b.png", "cat", "Train"),
        ("c.png", "dog", "valid"),
    ]
    write(tmp_path / "labels.csv", [*rows, ("d.png", "cat", "val"), ("d.png", "cat", "unused")])
    train, val = build_datasets(ClassificationData(root=str(tmp_path)), 3)
    assert pairs(train) == {"a.png": "dog", "b.png": "cat"}
    assert pairs(val) == {"c.png": "dog", "d.png": "cat"}


def test_an_open_quote(tmp_path):
    (tmp_path / "train.csv").write_text('file,label\n"' + "a.png,dog\n" * 20_000)
    with pytest.raises(InputError, match=r"train\.csv: cannot be read as CSV \(.*field larger than field limit"):
        build_datasets(ClassificationData(root=str(tmp_path)), 3)


def test_a_table_for_each_split(tmp_path):
    for split, names in (("train", "ab"), ("val", "cd")):
        some = {f"{name}.png": LABELS[f"{name}.png"] for name in names}
        save_images(tmp_path / split, some)
        write(tmp_path / f"{split}.csv", [("path", "class"), *((f"{split}/{k}", v) for k, v in some.items())])
    train, val = build_datasets(ClassificationData(root=str(tmp_path)), 3)
    assert pairs(train) | pairs(val) == LABELS
    assert len(train) == len(val) == 2


def test_roboflow_s_columns_of_classes(tmp_path):
    for split, names in (("train", "abc"), ("valid", "d")):
        some = {f"{name}.png": LABELS[f"{name}.png"] for name in names}
        save_images(tmp_path / split, some)
        rows = [(name, int(label == "dog"), int(label == "cat")) for name, label in some.items()]
        write(tmp_path / split / "_classes.csv", [("filename", " dog", " cat"), *rows])
    train, val = build_datasets(ClassificationData(root=str(tmp_path)), 3)
    assert train.class_names == ("dog", "cat")
    assert pairs(train) | pairs(val) == LABELS


def test_one_table_and_a_holdout(tmp_path, capsys):
    save_images(tmp_path)
    write(tmp_path / "labels.csv", [("image", "label"), *LABELS.items()])
    data = ClassificationData(root=str(tmp_path), holdout=0.5)
    train, val = build_datasets(data, 3)
    assert pairs(train) | pairs(val) == LABELS
    assert sorted(pairs(val).values()) == ["cat", "dog"]
    assert check_data(Classification(data=data), tmp_path / "out")
    assert "no problems" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"no table for the split 'val'; there is all: give --data\.holdout 0\.1"):
        build_datasets(replace(data, holdout=0.0), 3)


def test_a_table_beside_class_folders_is_named(tmp_path):
    """By its header: the rest is not read."""
    for split, names in (("train", "ab"), ("val", "cd")):
        for name in names:
            save_images(tmp_path / split / LABELS[f"{name}.png"], [f"{name}.png"])
    (tmp_path / "broken.parquet").write_text("")
    write(tmp_path / "sizes.csv", [("file", "size"), ("a.png", 12)])
    assert not build_datasets(ClassificationData(root=str(tmp_path)), 3)[0].notes
    paths = {name: f"train/{label}/{name}" for name, label in LABELS.items()}
    rows = [("file", "label"), *((paths[name], label) for name, label in LABELS.items())]
    for suffix, rest in (("csv", ""), ("csv", "\0"), ("parquet", "")):
        table = tmp_path / f"labels.{suffix}"
        write(table, rows)
        with table.open("a") as file:
            file.write(rest)
        train, val = build_datasets(ClassificationData(root=str(tmp_path)), 3)
        line = f"{table}: not read, because {tmp_path / 'train'} has class folders; --data.root {table} reads it"
        assert (train.notes, val.notes) == ((line,), ())
        table.unlink()


def test_a_table_may_have_the_suffix_of_text(tmp_path):
    save_images(tmp_path)
    write(tmp_path / "labels.txt", [("image", "label"), *LABELS.items()])
    train, val = build_datasets(ClassificationData(root=str(tmp_path / "labels.txt"), holdout=0.5), 3)
    assert pairs(train) | pairs(val) == LABELS


def test_one_folder_without_splits(tmp_path):
    save_images(tmp_path / "cat", ["a.png", "b.png", "c.png"])
    save_images(tmp_path / "dog", ["d.png", "e.png", "f.png"])
    data = ClassificationData(root=str(tmp_path), holdout=0.34)
    train, val = build_datasets(data, 3)
    assert train.class_names == ("cat", "dog")
    assert [len(train), len(val)] == [4, 2]
    assert sorted(pairs(val).values()) == ["cat", "dog"]
    assert pairs(build_datasets(data, 3)[1]) == pairs(val)
    with pytest.raises(InputError, match=r"train: no such folder"):
        build_datasets(replace(data, holdout=0.0), 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("file", "label"), ("z.png", "cat")], r"labels\.csv, line 2: z\.png: no such image beside the table or in"),
        (
            [("file", "label"), ("../../../z.png", "cat")],
            r"labels\.csv, line 2: the file name '[./]+z\.png' leads out of",
        ),
        ([("file", "label"), ("a.png", "cat", "x")], r"labels\.csv, line 2: 3 cells, but the header has 2"),
        ([("file", "label"), ("a.png", "")], r"labels\.csv: .*a\.png has 0 classes, but classification needs one"),
        ([("file", "label"), ("a.png", "x"), ("a.png", "y")], r"a\.png has 2 classes, .* see the recipe multilabel"),
        ([("file", "cat", "dog"), ("a.png", 1, 1)], r"a\.png has 2 classes, but classification needs one"),
        ([("file", "size"), ("a.png", 12)], r"train: no such folder"),
    ],
)
def test_faults_of_tables(tmp_path, rows, message):
    save_images(tmp_path)
    write(tmp_path / "labels.csv", rows)
    with pytest.raises(InputError, match=message) as error:
        build_datasets(ClassificationData(root=str(tmp_path), holdout=0.0), 3)
    assert "\n" not in str(error.value)


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "labels.parquet").write_bytes(json.dumps("no table").encode())
    with pytest.raises(InputError, match=r"labels\.parquet: cannot be read as Parquet"):
        build_datasets(ClassificationData(root=str(tmp_path)), 3)


@pytest.mark.parametrize(
    ("read", "unread"),
    [("part1.csv", "part2.csv"), ("train/part1.csv", "train/part2.csv"), ("train_labels.csv", "train.csv")],
)
def test_another_table_is_named(tmp_path, read, unread):
    (tmp_path / "train").mkdir()
    first, second, *_ = LABELS
    for table, name in ((read, first), (unread, second)):
        save_images((tmp_path / table).parent)
        (tmp_path / table).write_text(f"file,label\n{name},red\n")
    found = read_labels(tmp_path, "train", None)
    assert [Path(file).name for file in found.files] == [first]
    why = f"not read, because {tmp_path / read} is; put the rows into one table, or name one as --data.root"
    assert found.notes == (f"{tmp_path / unread}: {why}",)


def test_a_table_beside_those_of_the_splits_is_named(tmp_path):
    save_images(tmp_path)
    for table in ("train", "val", "more"):
        (tmp_path / f"{table}.csv").write_text(f"file,label\n{min(LABELS)},red\n")
    notes = [read_labels(tmp_path, split, None).notes for split in ("train", "val")]
    (note,) = notes[0] + notes[1]
    assert note.startswith(f"{tmp_path / 'more.csv'}: not read, because {tmp_path / 'train.csv'} is")


@pytest.mark.parametrize("suffix", ["csv", "CSV", "parquet"])
def test_rows_of_an_unknown_split_are_named(tmp_path, suffix):
    save_images(tmp_path)
    rows = [(*pair, split) for pair, split in zip(LABELS.items(), ("train", "tarin", "", "val"), strict=True)]
    write(
        tmp_path / f"labels.{suffix}", [("file", "class", "split"), *[(name, "cat", split) for name, _, split in rows]]
    )
    train, val = build_datasets(ClassificationData(root=str(tmp_path)), 3)
    assert (set(pairs(train)), set(pairs(val))) == ({"a.png"}, {"d.png"})
    note = f"{tmp_path / 'labels'}.{suffix}: 1 row left out: 'tarin' in line 3 is none of train, val and test"
    assert (train.notes, val.notes) == ((note,), ())


def test_a_column_of_splits_that_names_none(tmp_path):
    save_images(tmp_path)
    rows = [(name, label, str(number)) for number, (name, label) in enumerate(LABELS.items())]
    write(tmp_path / "labels.csv", [("file", "class", "set"), *rows])
    train, _ = build_datasets(ClassificationData(root=str(tmp_path), holdout=0.5), 3)
    assert "its column of splits is not used: '0' in line 2" in train.notes[0]


def test_a_cell_of_several_lines(tmp_path):
    need_name(tmp_path, "x\ny.png")
    save_images(tmp_path, ["x\ny.png", "a.png"])
    rows = [("file", "class"), ("x\ny.png", "cat"), ("a.png", "dog")]
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "val.csv", [*rows, ("z.png", "dog")])
    with pytest.raises(InputError, match=r"val\.csv, line 5: z\.png"):
        build_datasets(ClassificationData(root=str(tmp_path)), 3)
    write(tmp_path / "val.csv", rows)
    assert pairs(build_datasets(ClassificationData(root=str(tmp_path)), 3)[0]) == {"x\ny.png": "cat", "a.png": "dog"}


def test_names_with_and_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "data")
    (first, label), *rest = LABELS.items()
    for split in ("train", "val"):
        write(tmp_path / f"data/{split}.csv", [("file", "class"), (str(tmp_path / "data" / first), label), *rest])
    train, _ = build_datasets(ClassificationData(root="data"), 3)
    assert train.image_names == [f"data/{name}" for name in LABELS]


def test_images_left_out_of_a_folder_that_is_named_otherwise(tmp_path):
    save_images(tmp_path / "data")
    (tmp_path / "data/a.png").write_bytes(b"nothing")
    for split in ("train", "val"):
        write(tmp_path / f"data/{split}.csv", [("file", "class"), *LABELS.items()])
    data = ClassificationData(root=str(tmp_path / "data/../data"), unreadable="skip")
    train, fresh = (build_datasets(data, 3)[0] for _ in range(2))
    train.verify(skip=True)
    fresh.load_state_dict(train.state_dict())
    assert pairs(fresh) == pairs(train) == {name: label for name, label in LABELS.items() if name != "a.png"}
