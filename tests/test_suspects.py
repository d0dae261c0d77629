"""Suspicious labels: folds that cover all images, and labels changed on purpose."""

import csv
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from test_predict import PREPROCESSING, solid
from tiny_runs import recipe

from dualtoken_vit import cli, load_predictor
from dualtoken_vit.checkpoint import save_checkpoint
from dualtoken_vit.data.classification import build_datasets, build_val_dataset
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import RECIPES, to_dict
from dualtoken_vit.runtime.base import BasePredictor
from dualtoken_vit.suspects import Suspect, rank, report
from dualtoken_vit.tasks.classification import label_descriptions


@pytest.mark.parametrize(("share", "folds"), [(0.5, 2), (0.25, 4), (0.2, 5), (0.3, 3)])
def test_folds_partition_the_training_images(photos, share, folds):
    seen = []
    for fold in range(folds):
        data = recipe(photos, data={"holdout": share, "fold": fold}).data
        train, val = build_datasets(data, 3)
        assert build_val_dataset(data, 3).image_names == val.image_names
        assert not set(train.image_names) & set(val.image_names)
        assert len(train) + len(val) == 36
        seen += val.image_names
    assert len(seen) == len(set(seen)) == 36
    with pytest.raises(InputError, match=rf"--data\.fold {folds}: with --data\.holdout {share} .* 0 to {folds - 1}"):
        build_datasets(recipe(photos, data={"holdout": share, "fold": folds}).data, 3)


def test_folds_that_hold_out_nothing(photos):
    with pytest.raises(InputError, match=r"--data\.fold 2: needs --data\.holdout"):
        build_datasets(recipe(photos, data={"fold": 2}).data, 3)
    with pytest.raises(InputError, match=r"--data\.fold 15: has no image, .* give a larger --data\.holdout"):
        build_datasets(recipe(photos, data={"holdout": 0.05, "fold": 15}).data, 3)  # 12 images in each class


def test_names_that_are_not_utf8(tmp_path):
    report([Suspect("a\udcff.png", Image.new("RGB", (8, 8)), "red", "blue", 0.25, 0.75)], tmp_path)
    written = (tmp_path / "suspects.csv").read_text(encoding="utf-8").splitlines()
    assert written[1] == "a\N{REPLACEMENT CHARACTER}.png,red,0.2500,blue,0.7500"


def test_images_of_each_class(photos):
    """5 of 12 images, also among those that are left when some are held out, and the same ones for a larger number."""
    found = {}
    for number in (1, 5, 7, 50):
        train, val = build_datasets(recipe(photos, data={"per_class": number}).data, 3)
        assert Counter(train.targets) == {label: min(number, 12) for label in range(3)}
        assert len(val) == 18
        found[number] = set(train.image_names)
    assert found[1] < found[5] < found[7] < found[50]
    train, val = build_datasets(recipe(photos, data={"per_class": 5, "holdout": 0.5}).data, 3)
    assert (len(train), len(val)) == (15, 18)
    assert not set(train.image_names) & set(val.image_names)


def test_changed_labels_come_first(trained, tmp_path, capsys):
    photos, out = trained
    copy = shutil.copytree(photos, tmp_path / "copy")
    first, last = (min((copy / "val" / name).iterdir()) for name in ("red", "blue"))
    content = first.read_bytes()
    first.write_bytes(last.read_bytes())
    last.write_bytes(content)
    wrong = {str(first): ("red", "blue"), str(last): ("blue", "red")}
    args = f"check-data folder --data.root {copy} --suspects {out} --out {tmp_path / 'report'}"
    assert cli.run(args.split()) == 0
    printed = capsys.readouterr().out
    with open(tmp_path / "report" / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18  # the images of the validation split, none of those trained on
    assert {row["image"]: (row["label"], row["predicted"]) for row in rows[:2]} == wrong
    predictor = load_predictor(out / "best.safetensors")
    for row in rows:
        result = predictor(row["image"])
        shares = dict(zip(result.names, result.probabilities.tolist(), strict=True))
        assert float(row["label_probability"]) == pytest.approx(shares.pop(row["label"]), abs=1e-4)
        assert row["predicted"] == max(shares, key=shares.get)
        assert float(row["predicted_probability"]) == pytest.approx(max(shares.values()), abs=1e-4)
    margins = [float(row["label_probability"]) - float(row["predicted_probability"]) for row in rows]
    assert margins == sorted(margins)
    assert f"{sum(margin < 0 for margin in margins)} of 18 labels are doubtful: another class is more likely" in printed
    assert (tmp_path / "report" / "suspects" / "sheet.png").stat().st_size > 1000


def test_wordnet_ids_of_one_description(tmp_path):
    """A crane is a bird and a machine: the classes are told apart by their names in the data."""
    names = ("n02012849", "n03126707")
    described = label_descriptions(names)
    assert described == {"label_descriptions": ["crane", "crane"]}
    model = timm.create_model("dualtoken_vit_tiny", num_classes=2, depths=(1, 1, 1))
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.25, 0.75]).log()
    made = recipe(tmp_path)
    info = dict(task="classification", class_names=names, recipe=to_dict(made), metrics={})
    args = dict(model_args={"depths": (1, 1, 1)}, preprocessing=PREPROCESSING | described)
    save_checkpoint(tmp_path / "best.safetensors", model, **info, **args)
    bird, machine = (str(solid(tmp_path / "val" / name / "0.png")) for name in names)
    found = [
        (one.image, one.label, round(one.label_probability, 4), one.predicted, round(one.predicted_probability, 4))
        for one in rank(made, [tmp_path / "best.safetensors"])
    ]
    assert found == [(bird, names[0], 0.25, names[1], 0.75), (machine, names[1], 0.75, names[0], 0.25)]


def test_runs_must_fit(trained, photos, monkeypatch):
    monkeypatch.setattr(BasePredictor, "stream", lambda *args, **kwargs: pytest.fail("predicted before the checks"))
    with pytest.raises(InputError, match=r"another run held out .* too"):
        rank(recipe(photos), [trained[1], trained[1]])
    with pytest.raises(InputError, match="no such checkpoint"):
        rank(recipe(photos), [photos / "none"])
    with pytest.raises(InputError, match="--suspects: not available for detection"):
        rank(RECIPES["demo-detect"], [trained[1]])
    first = min((photos / "val" / "red").iterdir())
    first.rename(first.with_name("x.jpg"))
    with pytest.raises(InputError, match=r"best\.safetensors: these are not the images that it held out, .* train it"):
        rank(recipe(photos), [trained[1]])
    (photos / "val" / "yellow").mkdir()
    first.with_name("x.jpg").rename(photos / "val" / "yellow" / "x.jpg")
    with pytest.raises(InputError, match="'yellow' is not among the 3 trained classes"):
        rank(recipe(photos), [trained[1]])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("folder --suspects", "--suspects: name the folders of one or more training runs"),
        ("folder --suspects none", "none: no such checkpoint"),
        ("coco --suspects none", "--suspects: not available for detection; leave it out"),
    ],
)
def test_runs_are_checked_before_the_images(args, message, tmp_path):
    """The folder of images has none, which reading them would report."""
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=message):
        cli.run(f"check-data {args} --data.root {tmp_path} --out {tmp_path / 'out'}".split())
    assert list(tmp_path.iterdir()) == [tmp_path / "notes.txt"]


def test_suspects_are_printed_where_they_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*suspects\.csv"):
        report([Suspect("a.png", Image.new("RGB", (8, 8)), "red", "blue", 0.25, 0.75)], tmp_path / "file")
    assert "a.png" in capsys.readouterr().out


@pytest.mark.parametrize("count", [12, 14, 15, 16])
def test_folds_are_alike(tmp_path, count):
    for name in "ab":
        for index in range(count):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "train" / name / f"{index}.png")
    data = recipe(tmp_path, data={"holdout": 0.1}).data
    sizes = [len(build_datasets(replace(data, fold=fold), 3)[1]) for fold in range(10)]
    assert sum(sizes) == 2 * count
    assert max(sizes) - min(sizes) <= 2  # one of each class
