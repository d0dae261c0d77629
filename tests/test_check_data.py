"""The report finds planted problems, and none in valid data."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualtoken_vit.data.check.classification import check as check_data
from dualtoken_vit.data.check.report import first
from dualtoken_vit.data.classification import build_datasets
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Classification, ClassificationAugment, ClassificationData, Model
from dualtoken_vit.show.drawing import spread


@pytest.fixture
def check(photos, capsys):
    """Runs it on the photos: (verdict, lines of the report)."""

    def run(**args):
        recipe = Classification(data=replace(ClassificationData(root=str(photos)), **args))
        verdict = check_data(recipe, photos / "out")
        return verdict, capsys.readouterr().out.splitlines()

    return run


def row(lines, name):
    """The numbers of a class in the table."""
    (line,) = (line for line in lines if line.startswith("│") and line.split("│")[1].strip() == name)
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_sound_data(check, photos):
    sizes = [Image.open(path).size for path in (photos / "train").rglob("*.jpg")]
    verdict, lines = check()
    assert verdict
    assert lines[-1] == "no problems"
    assert row(lines, "red") == row(lines, "blue") == row(lines, "green") == ["12", "6"]
    assert row(lines, "all") == ["36", "18"]
    widths = sorted(width for width, _ in sizes)
    median = (widths[17] + widths[18]) / 2
    assert f"train: width {widths[0]} to {widths[-1]} px, median {median:g}" in lines
    assert f"train: height {min(h for _, h in sizes)} to {max(h for _, h in sizes)} px" in "\n".join(lines)
    assert "val: modes RGB 18" in lines
    assert not any("largest class" in line for line in lines)  # they are equal
    assert f"12 images with their labels: {photos / 'out' / 'labels.png'}" in lines
    assert Image.open(photos / "out" / "labels.png").size == (3 * 640, 4 * 640)


def test_uneven_classes_are_noted(check, photos):
    for number in range(3):
        (photos / f"train/red/{number}.jpg").unlink()
    assert not any("largest class" in line for line in check()[1])
    (photos / "train/red/3.jpg").unlink()
    (line,) = (line for line in check()[1] if "largest class" in line)
    assert line in [f"note: largest class {name} (12), smallest red (8): 1.5 to 1" for name in ("blue", "green")]


def test_everything_that_can_be_wrong(check, photos):
    for path in (photos / "train/green").iterdir():
        path.unlink()
    shutil.rmtree(photos / "val/blue")
    (photos / "val/pin[k]").mkdir()
    truncated = photos / "train/red/3.jpg"
    truncated.write_bytes(truncated.read_bytes()[:300])
    (photos / "train/red/4.jpg").write_text("no image")
    shutil.copy(photos / "train/red/5.jpg", photos / "val/red/copy.jpg")
    Image.open(photos / "train/red/6.jpg").save(photos / "train/blue/resaved.png")
    shutil.copy(photos / "train/blue/7.jpg", photos / "train/blue/again.jpg")
    (photos / "train/red/notes.txt").write_text("")
    shutil.copy(photos / "train/red/8.jpg", photos / "train/loose.jpg")
    Image.open(photos / "train/red/9.jpg").convert("L").save(photos / "train/red/9.jpg")
    verdict, lines = check()
    assert not verdict
    assert row(lines, "blue") == ["14", "-"]
    assert row(lines, "green") == ["0", "6"]
    assert row(lines, "red") == ["12", "7"]
    assert row(lines, "pin[k]") == ["-", "0"]
    assert "train: modes RGB 23, L 1" in lines
    assert not any("largest class" in line for line in lines)  # the smallest is the empty one
    assert "note: images of train that are exact copies of others in it: 2" in lines
    foreign = "note: skipped files that are not images in a class folder: 2, for example "
    assert f"{foreign}{photos / 'train/loose.jpg'}" in lines
    start = next(index for index, line in enumerate(lines) if line.startswith("empty class"))
    problems = sorted(lines[start:-1])
    expected = [
        f"{photos / 'train/red/3.jpg'}: cannot be read as an image",
        f"{photos / 'train/red/4.jpg'}: cannot be read as an image",
        "class missing: train/pin[k]",
        "class missing: val/blue",
        "empty class: train/green",
        "empty class: val/pin[k]",
        f"equal images in different classes: {photos / 'train/blue/resaved.png'} = {photos / 'train/red/6.jpg'}",
        f"in both splits: {photos / 'train/red/5.jpg'} = {photos / 'val/red/copy.jpg'}",
    ]
    assert len(problems) == len(expected)
    for problem, beginning in zip(problems, sorted(expected), strict=True):
        assert problem.startswith(beginning)
    assert lines[-1] == "problems: 8"


def test_a_class_that_is_a_link_to_another(check, photos):
    for split in ("train", "val"):
        (photos / split / "z").symlink_to("red")
    verdict, lines = check()
    assert not verdict
    assert row(lines, "z") == row(lines, "red") == ["12", "6"]
    pair = f"{photos / 'train/red/0.jpg'} = {photos / 'train/z/0.jpg'}"
    assert f"note: files in more than one class: 12, for example {pair}" in lines
    assert f"equal images in different classes: {pair}" in lines
    assert lines[-1] == "problems: 18"


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda root: (root / "train/grey").mkdir(), "empty class: train/grey"),
        (lambda root: shutil.rmtree(root / "val/red"), "class missing: val/red"),
        (lambda root: (root / "val/red/0.jpg").write_bytes(b""), f"{Path('val/red/0.jpg')}: cannot be read"),
        (lambda root: shutil.copy(root / "train/red/0.jpg", root / "val/red/x.jpg"), "in both splits: "),
        (lambda root: shutil.copy(root / "val/red/0.jpg", root / "val/blue/x.jpg"), "equal images in different"),
    ],
)
def test_each_problem_alone_is_enough(check, photos, spoil, problem):
    spoil(photos)
    verdict, lines = check()
    assert not verdict
    assert any(problem in line for line in lines)


def test_many_duplicates_are_counted(check, photos):
    for path in (photos / "train").rglob("*.jpg"):
        shutil.copy(path, photos / "val" / path.parent.name / f"copy{path.name}")
    verdict, lines = check()
    assert not verdict
    assert sum(line.startswith("in both splits: ") for line in lines) == 20
    assert "... and 16 more: in both splits" in lines
    assert lines[-1] == "problems: 36"


def test_of_many_lines_the_first_are_shown():
    files = [f"masks/{index}.png: label 7 in 3 pixels" for index in range(25)]
    assert first(files) == [*files[:20], "... and 5 more"]  # not with the name of one file
    assert first(files[:20]) == files[:20]


def test_with_a_holdout_val_is_not_looked_at(check, photos):
    shutil.rmtree(photos / "val")
    verdict, lines = check(holdout=0.1)
    assert verdict
    assert row(lines, "red") == ["12"]
    assert "validation: 10% of each class of train" in lines


def test_no_such_folder(check, photos):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        check(root=str(photos / "nowhere"))


def test_shapes(check):
    verdict, lines = check(dataset="shapes", image_size=16, root="")
    assert verdict
    assert row(lines, "star") == ["500", "100"]
    assert "val: width 16 to 16 px, median 16" in lines


def test_hugging_face(check, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets")
    (photos / "val/red/0.jpg").write_bytes(b"")
    verdict, lines = check(dataset=f"hfds/{photos}", root=str(tmp_path / "cache"), val_split="validation")
    assert not verdict
    assert row(lines, "all") == ["36", "18"]
    assert sum("cannot be read as an image" in line for line in lines) == 1


def test_shards(photos, tmp_path, capsys):
    wds = pytest.importorskip("webdataset")
    for split in ("train", "val"):
        with wds.TarWriter(str(tmp_path / f"{split}-0.tar")) as tar:
            for path in sorted((photos / split).rglob("*.jpg")):
                label = ("blue", "green", "red").index(path.parent.name)
                key = f"{path.parent.name}{path.stem}"
                tar.write({"__key__": key, "jpg": path.read_bytes(), "cls": str(label).encode()})
    data = ClassificationData(
        dataset="wds/photos", root=str(tmp_path), train_split="train-0.tar|36", val_split="val-0.tar|18"
    )
    assert check_data(Classification(model=Model(in_chans=1), data=data), tmp_path)
    assert row(capsys.readouterr().out.splitlines(), "2") == ["12", "6"]


@pytest.mark.parametrize(("channels", "fill"), [(3, [124, 116, 104]), (1, [114])])
def test_the_sheet_shows_the_colour_that_fills_rotated_images(tmp_path, monkeypatch, channels, fill):
    """The mean of the images, in their corners, as in training."""
    for split in ("train", "val"):
        for index in range(24):
            path = tmp_path / "photos" / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (250, 250, 250 - index)).save(path)
    drawn = []
    monkeypatch.setattr(
        "dualtoken_vit.data.check.report.draw_scene", lambda boxes, _: drawn.append(boxes[0][1]) or drawn[-1]
    )
    augment = ClassificationAugment(scale=(1.0, 1.0), ratio=(1.0, 1.0), auto_augment="rand-m9-n3-mstd0.5")
    data = ClassificationData(root=str(tmp_path / "photos"), image_size=32)
    check_data(Classification(data=data, augment=augment, model=Model(in_chans=channels)), tmp_path / "out", True)
    corners = [np.atleast_1d(image.getpixel(place)) for image in drawn for place in ((0, 0), (31, 31))]
    assert sum(np.abs(corner - fill).max() <= 2 for corner in corners) > 1


def test_long_names_are_whole_in_a_file(tmp_path, capsys):
    """Standard output is no terminal here: rich would cut the names at 80 columns."""
    names = [f"n02123045_{'very_' * 20}long_{index}" for index in range(2)]
    for split in ("train", "val"):
        for index, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9), (index, len(split), 0)).save(tmp_path / split / name / "a.png")
    check_data(Classification(data=ClassificationData(root=str(tmp_path))), tmp_path / "out")
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in names)


def test_augmented_images_alternate_their_flips(tmp_path, monkeypatch):
    """Images that are dark on the left: drawn as `alternate_flips` turns them in the first epoch."""
    for split in ("train", "val"):
        for index in range(16):
            image = Image.new("L", (32, 32), 200)
            image.paste(20, (0, 0, 16, 32))
            path = tmp_path / "photos" / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    drawn = []
    monkeypatch.setattr(
        "dualtoken_vit.data.check.report.draw_scene", lambda boxes, _: drawn.append(boxes[0][1]) or drawn[-1]
    )
    plain = ClassificationAugment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip="alternate")
    recipe = Classification(data=ClassificationData(root=str(tmp_path / "photos"), image_size=32), augment=plain)
    check_data(recipe, tmp_path / "out", augmented=True)
    train, _ = build_datasets(recipe.data, 3)
    train.alternate_flips(recipe.run.seed, 0)
    flipped = [image.getpixel((4, 16))[0] > 100 for image in drawn]
    assert flipped == [bool(train.flipped[index]) for index in spread(range(16))]
    assert 0 < sum(flipped) < len(flipped)


def test_a_policy_is_checked_before_the_images_are_read(photos, monkeypatch):
    monkeypatch.setattr("dualtoken_vit.data.check.report.read_all", lambda *args: pytest.fail("read"))
    augment = ClassificationAugment(auto_augment="nonsense")
    recipe = Classification(data=ClassificationData(root=str(photos)), augment=augment)
    with pytest.raises(InputError, match=r"--augment\.auto-augment nonsense: not a policy"):
        check_data(recipe, photos / "out", augmented=True)


def test_a_report_without_its_sheet(photos, capsys):
    """Where it cannot be written, for example because the folder is a file."""
    (photos / "out").touch()
    assert check_data(Classification(data=ClassificationData(root=str(photos))), photos / "out")
    printed = capsys.readouterr()
    assert "no sheet of images was drawn" in printed.out.splitlines()
    assert "labels.png" not in printed.out
    assert "cannot write" in printed.err
