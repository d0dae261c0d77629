"""Multi-label classification: what is read, the metrics and thresholds against numpy, and a run end to end."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import native, near
from PIL import Image
from timm.loss import AsymmetricLossMultiLabel

from dualtoken_vit import cli, load_predictor
from dualtoken_vit.data.check.multilabel import check as check_data
from dualtoken_vit.data.multilabel import build_datasets, build_val_dataset
from dualtoken_vit.data.shapes import CLASSES, scene
from dualtoken_vit.deploy.export import export
from dualtoken_vit.errors import InputError
from dualtoken_vit.evaluation import evaluate
from dualtoken_vit.predict import predict
from dualtoken_vit.predictors import read_header
from dualtoken_vit.recipes import RECIPES, MultiLabel, MultiLabelData
from dualtoken_vit.tasks.multilabel import TASK, MultiLabelModule, MultiLabelPredictor, best_threshold
from dualtoken_vit.tasks.trainer import train

NAMES = ("blue", "green", "red")
ARGS = ("dims=(16,32,32)", "depths=(1,1,1)", "head_hidden_size=32")


def bands(index, side=32):
    """An image of noise with a vertical band for each of its labels, and the labels: bit k of the index is label k."""
    pixels = np.random.default_rng(index).integers(0, 90, (side, side, 3))
    labels = [label for label in range(3) if index >> label & 1]
    for label in labels:
        pixels[:, 10 * label : 10 * label + 10, 2 - label] += 150
    return Image.fromarray(pixels.astype(np.uint8)), labels


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tables train.csv with 32 images and val.csv with 16."""
    root = tmp_path_factory.mktemp("bands")
    for split, count, first in (("train", 32, 0), ("val", 16, 64)):
        (root / "images").mkdir(exist_ok=True)
        rows = ["file,labels"]
        for index in range(first, first + count):
            image, labels = bands(index)
            image.save(root / "images" / f"{index}.png")
            rows.append(f'images/{index}.png,"{", ".join(NAMES[label] for label in labels)}"')
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_network_that_produces_nan_or_inf(value):
    """Of Inf the probability would be 1, of -Inf 0."""
    options = MultiLabelPredictor.make_options(image_size=32)
    preprocessing = {"input_size": (3, 32, 32), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    predictor = MultiLabelPredictor(torch.nn.Identity(), NAMES, preprocessing, options)
    with pytest.raises(InputError, match="the network produced NaN or Inf"):
        predictor.postprocess(torch.tensor([[0.0, 1.0, 2.0], [0.0, value, 2.0]]))


def test_samples(root):
    train, val = build_datasets(MultiLabelData(root=str(root)), 3)
    assert train.class_names == val.class_names == NAMES
    assert [len(train), len(val)] == [32, 16]
    for index in (0, 5, 7):
        image, targets = train[index]
        expected, labels = bands(index)
        assert np.array_equal(image, expected)
        assert targets.tolist() == [float(label in labels) for label in range(3)]
    other = build_val_dataset(MultiLabelData(root=str(root)), 1, ("red", "white", "green", "blue"))
    assert other[6][1].tolist() == [1, 0, 1, 0]
    assert other[6][0].mode == "L"
    assert other.notes == (f"{root}: no validation image of class 'white'",)
    assert val.notes == ()
    with pytest.raises(InputError, match=r"class 'green' is not .* remove it \(did you mean 'greens'\?\)$"):
        build_val_dataset(MultiLabelData(root=str(root)), 1, ("red", "greens", "blue"))
    train.load_state_dict({})  # of a run of an earlier version
    assert len(train) == 32
    parts = build_datasets(MultiLabelData(root=str(root), holdout=0.25), 3)
    assert sorted(parts[0].image_names + parts[1].image_names) == sorted(train.image_names)
    assert len(parts[1]) == 8
    for part in parts:
        assert [list(labels) for labels in part.targets] == [
            bands(int(Path(name).stem))[1] for name in part.image_names
        ]


def test_roboflow_s_columns_and_separators(root, tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        for name in ("1.png", "5.png"):
            (tmp_path / split / name).write_bytes((root / "images" / name).read_bytes())
    (tmp_path / "train/_classes.csv").write_text("filename, blue, red\n1.png, 1, 0\n5.png, 1, 1\n")
    (tmp_path / "valid/_classes.csv").write_text("filename, blue, red\n1.png, 0, 0\n5.png, 0, 1\n")
    train, val = build_datasets(MultiLabelData(root=str(tmp_path)), 3)
    assert train.class_names == ("blue", "red")
    assert [train.targets, val.targets] == [[(0,), (0, 1)], [(), (1,)]]
    (tmp_path / "train/_classes.csv").write_text("filename, blue, red\n1.png, 1, 2\n5.png, 1, 1\n")
    with pytest.raises(
        InputError, match=native(r"train/_classes\.csv: its first line does not name a column of files and")
    ):
        build_datasets(MultiLabelData(root=str(tmp_path)), 3)
    (tmp_path / "tags.csv").write_text("image,tags,split\ntrain/1.png,sea|sky,train\ntrain/5.png,sky,val\n")
    for split in ("train", "valid"):
        (tmp_path / split / "_classes.csv").unlink()
    train, val = build_datasets(MultiLabelData(root=str(tmp_path), separator="|"), 3)
    assert train.class_names == ("sea", "sky")
    assert [train.targets, val.targets] == [[(0, 1)], [(1,)]]
    absent, everywhere = val.notes
    assert absent.endswith("no validation image of class 'sea'")
    assert everywhere.endswith("every validation image has class 'sky': AP is 100 % for any network")


def test_an_empty_cell_of_parquet_has_no_labels(root, tmp_path):
    names, labels = ["images/1.png", "images/2.png", "images/4.png", None], ["cat,dog", None, "dog", None]
    (tmp_path / "images").symlink_to(root / "images")
    for split in ("train", "val"):
        pyarrow.parquet.write_table(pyarrow.table({"file": names, "labels": labels}), tmp_path / f"{split}.parquet")
    train, _ = build_datasets(MultiLabelData(root=str(tmp_path)), 3)
    assert train.class_names == ("cat", "dog")
    assert train.targets == [(0, 1), (), (1,)]


def test_generated_images_have_the_labels_of_their_shapes():
    train, _ = build_datasets(MultiLabelData(dataset="shapes", image_size=32), 3)
    for index in range(5):
        image, shapes = scene("train", index, 32)
        assert np.array_equal(train[index][0], image)
        assert {CLASSES[label] for label in train.targets[index]} == {CLASSES[shape.label] for shape in shapes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"root": ""}, r"--data\.root is missing"),
        ({"separator": ""}, r"--data\.separator is empty"),
        ({"val_split": "test"}, r"no table for the split 'test'; there is train, val"),
        ({"dataset": "shapes"}, r"draws its own images; for files give --data\.dataset table"),
        ({"root": "nowhere"}, r"nowhere: no such folder; give the one that contains a CSV or Parquet table and "),
    ],
)
def test_faults(root, data, message):
    with pytest.raises(InputError, match=message):
        build_datasets(replace(MultiLabelData(root=str(root)), **data), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.replace("red", "blue").replace("green", "blue"), "there is only one label, 'blue'"),
        (lambda table: table, r"--data\.start-size 8 is not a size that .* takes"),
    ],
)
def test_faults_before_training(root, tmp_path, change, message):
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(change((root / f"{split}.csv").read_text()))
    (tmp_path / "images").symlink_to(root / "images")
    recipe = RECIPES["multilabel"]
    data = replace(recipe.data, root=str(tmp_path), image_size=32, start_size=8)
    with pytest.raises(InputError, match=message):
        TASK.prepare(replace(recipe, data=data), replace(recipe.model, args=ARGS, pretrained=False))


def test_the_report(root, tmp_path, capsys):
    assert check_data(MultiLabel(data=MultiLabelData(root=str(root))), tmp_path)
    found = capsys.readouterr().out
    mean = np.mean([len(bands(index)[1]) for index in range(32)])
    assert f"train: 32 images, 4 without labels; {mean:.2f} labels per image, up to 3" in found
    assert "│ blue  │    16 │   8 │" in found
    assert (tmp_path / "labels.png").is_file()


def test_the_notes_of_a_table_are_reported_once(tmp_path, capsys):
    for index in range(8):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{index}.png")
    rows = [f"{index}.png,{['red', 'blue'][index % 2]},{'trian' if index == 7 else ''}" for index in range(8)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,split", *rows]))
    data = MultiLabelData(root=str(tmp_path), holdout=0.25)
    check_data(MultiLabel(data=data), tmp_path / "out")
    note = f"note: {tmp_path / 'labels.csv'}: its column of splits is not used: 'trian' in line 9"
    assert capsys.readouterr().out.count(note) == 1


# Metrics


def f1(found, truth):
    return 2 * (found & truth).sum() / max(found.sum() + truth.sum(), 1)


def average_precision(shares, truth):
    """The mean of the precisions at each positive, ties apart."""
    order = np.argsort(-shares, kind="stable")
    hits = truth[order].cumsum()
    return (hits / np.arange(1, len(hits) + 1))[truth[order]].mean()


def module(choose, preprocessing=None):
    recipe = RECIPES["multilabel"]
    preprocessing = preprocessing or {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    preprocessing |= {"crop_pct": 1.0, "interpolation": "bicubic"}
    predictor = MultiLabelPredictor.create(torch.nn.Linear(1, 1), ("a", "b", "c", "d"), preprocessing, recipe.data)
    return MultiLabelModule(predictor, recipe, choose)


def test_metrics_and_thresholds_are_those_of_numpy(monkeypatch):
    """Class d has no image: it has neither AP nor F1, and the threshold 0.5."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 4)).astype(np.float32)
    truth = (logits + rng.normal(size=(40, 4)) > 0.5) * (np.arange(4) < 3)
    task = module(choose=True)
    for part in (slice(0, 16), slice(16, 40)):
        monkeypatch.setattr(task, "predict", lambda x, _: x)
        task.validation_step((torch.from_numpy(logits[part]), torch.from_numpy(truth[part]).float()), 0)
    evaluation = task.evaluate()
    shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
    thresholds = task.predictor.thresholds.numpy()
    best = [max(f1(shares[:, k] >= t, truth[:, k]) for t in shares[:, k]) for k in range(3)]
    chosen = [f1(shares[:, k] >= thresholds[k], truth[:, k]) for k in range(3)]
    assert np.allclose(chosen, best)
    assert thresholds[3] == 0.5
    aps = [average_precision(shares[:, k], truth[:, k] > 0) for k in range(3)]
    found = list(evaluation.metrics["per_class"].values())
    assert np.allclose([one["ap"] for one in found], [*aps, -1])
    assert np.allclose([one["f1"] for one in found], [*best, -1])
    assert [one["images"] for one in found] == truth.sum(0).tolist()
    loss = -np.mean(np.where(truth, np.log(shares), np.log(1 - shares)))
    expected = {"map": np.mean(aps), "f1": np.mean(best), "micro_f1": f1(shares >= thresholds, truth), "loss": loss}
    assert evaluation.scores == pytest.approx(expected, abs=1e-6)
    stored = module(choose=False, preprocessing=task.predictor.preprocessing | {"thresholds": [0.2, 0.4, 0.6, 0.8]})
    monkeypatch.setattr(stored, "predict", lambda x, _: x)
    stored.validation_step((torch.from_numpy(logits), torch.from_numpy(truth).float()), 0)
    expected = [f1(shares[:, k] >= t, truth[:, k]) for k, t in enumerate((0.2, 0.4, 0.6))]
    assert stored.evaluate().scores["f1"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_threshold_is_halfway_to_the_next_probability():
    thresholds = torch.tensor([0.1, 0.4, 0.8])
    precision, recall = torch.tensor([0.5, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.5, 0.0])
    assert best_threshold(precision, recall, thresholds) == pytest.approx(0.25)
    assert best_threshold(torch.tensor([0.9, 1.0, 1.0, 1.0]), recall, thresholds) == pytest.approx(0.25)
    assert best_threshold(torch.ones(4), recall, thresholds) == pytest.approx(0.05)


def test_losses():
    task, other = module(choose=True), MultiLabelModule(module(True).predictor, MultiLabel(loss="asymmetric"), True)
    logits, targets = torch.randn(6, 4), torch.randint(0, 2, (6, 4)).float()
    shares = logits.sigmoid()
    expected = -(targets * shares.log() + (1 - targets) * (1 - shares).log()).mean()
    assert torch.allclose(task.criterion(logits, targets).mean(), expected)
    shifted = (shares - 0.05).clamp(min=0)  # equations 2 and 4 of arXiv 2009.14119, with gamma+ = 1 and gamma- = 4
    focused = targets * (1 - shares) * shares.log() + (1 - targets) * shifted**4 * (1 - shifted).log()
    assert torch.allclose(other.criterion(logits, targets), -focused, atol=1e-6)


@pytest.mark.parametrize("kind", ["inverse", "effective"])
@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_weighted_losses_are_torch_s_and_timm_s(root, tmp_path, loss, kind):
    """Their pos_weight, with weights that have a mean of 1 over all labels of the training images."""
    rare = [line for line in (root / "train.csv").read_text().splitlines() if "red" not in line or "green" in line]
    (tmp_path / "train.csv").write_text("\n".join(rare))
    (tmp_path / "val.csv").write_text((root / "val.csv").read_text())
    (tmp_path / "images").symlink_to(root / "images")
    counts = np.array([sum(name in line for line in rare) for name in NAMES])
    assert counts.tolist() == [12, 16, 8]
    weights = 1 / (counts if kind == "inverse" else 1 - 0.999**counts)
    weights = torch.from_numpy(weights * counts.sum() / (weights @ counts)).float()
    base = RECIPES["multilabel"]
    recipe = replace(base, loss=loss, class_weights=kind, data=replace(base.data, root=str(tmp_path), image_size=32))
    task = TASK.prepare(recipe, replace(base.model, args=ARGS, pretrained=False)).module
    task.log, task.model = lambda *args, **kwargs: None, torch.nn.Flatten()
    logits, targets = torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()
    if loss == "bce":
        expected = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(logits, targets)
    else:
        expected = AsymmetricLossMultiLabel(reduction="mean", pos_weight=weights)(logits, targets)
    torch.testing.assert_close(task.training_step((logits[..., None, None], targets), 0), expected)


# End to end


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("multilabel") / "run"
    base = RECIPES["multilabel"]
    recipe = replace(
        base,
        class_weights="effective",
        model=replace(base.model, args=ARGS, pretrained=False),
        data=replace(base.data, root=str(root), image_size=32, workers=0),
        augment=replace(base.augment, scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        optim=replace(base.optim, batch_size=8, epochs=12, lr=0.01),
        run=replace(base.run, device="cpu"),
    )
    train(recipe, out)
    return out


def test_a_run_learns_its_labels_and_predicts_with_its_thresholds(run, root, tmp_path, capsys):
    stored = json.loads((run / "evaluation.json").read_text())
    digits = [value for one in stored["per_class"].values() for value in one.values()]
    assert digits == [round(value, 6) for value in digits]
    assert stored["map"] > 0.8  # by chance 0.5
    found = evaluate(run / "best.safetensors", device="cpu")
    assert found.metrics == {key: stored[key] for key in found.metrics}
    thresholds = [one["threshold"] for one in stored["per_class"].values()]
    predictor = load_predictor(run / "best.safetensors", device="cpu")
    assert predictor.thresholds.tolist() == pytest.approx(thresholds, abs=1e-6)
    files = [root / "images" / f"{index}.png" for index in range(64, 80)]
    results = predictor(files)
    hits = np.zeros((16, 3), dtype=bool)
    for row, result in enumerate(results):
        above = [k for k in range(3) if result.all_probabilities[k] >= np.float32(thresholds[k])]
        assert sorted(result.labels.tolist()) == above
        assert result.names == tuple(NAMES[label] for label in result.labels)
        assert list(result.probabilities) == sorted(result.probabilities, reverse=True)
        hits[row, above] = True
    truth = np.array([[label in bands(index)[1] for label in range(3)] for index in range(64, 80)])
    assert np.mean([f1(hits[:, k], truth[:, k]) for k in range(3)]) == pytest.approx(stored["f1"], abs=1e-6)
    with pytest.raises(InputError, match="--calibrate: only for networks with one label per image; leave it out"):
        evaluate(run / "best.safetensors", device="cpu", calibrate=True)
    every = load_predictor(run / "best.safetensors", device="cpu", threshold=0.0)(files[0])
    assert sorted(every.names) == sorted(NAMES)
    none = load_predictor(run / "best.safetensors", device="cpu", threshold=1.0)(files[0])
    assert none.names == ()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):  # of a detector
        cli.run(["predict", str(run / "best.safetensors"), str(files[0]), "--score", "0.5", "--top-k=2"])
    hint, *box = capsys.readouterr().err.splitlines()
    assert hint == "options for this network: --image-size, --crop-pct, --interpolation, --threshold"
    assert "Unrecognized options: --score, --top-k=2 " in " ".join(" ".join(box).split())
    assert predict(run / "best.safetensors", files[:2], tmp_path / "out", True, device="cpu", threshold=1.0)
    record = json.loads(capsys.readouterr().out)
    assert [one["labels"] for one in record["predictions"]] == [[], []]
    assert (tmp_path / "out" / "sheet.png").is_file()


@pytest.mark.slow
def test_an_exported_file_gives_the_same(run, root, tmp_path, capsys):
    best, file = run / "best.safetensors", export(run / "best.safetensors", out=tmp_path / "model.onnx")
    images = [root / "images" / f"{index}.png" for index in range(64, 80)]
    for options in ({}, {"threshold": 0.3}):
        pairs = zip(*(load_predictor(path, device="cpu", **options)(images) for path in (best, file)), strict=True)
        for one, other in pairs:
            assert one.names == other.names
            np.testing.assert_allclose(one.all_probabilities, other.all_probabilities, atol=1e-5)
            np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
    ours, theirs = (evaluate(path, data={"root": str(root)}).metrics for path in (best, file))
    assert ours == near(theirs, 1e-4)
    with pytest.raises(InputError, match=r"--threshold 1\.5: must be between 0 and 1"):
        load_predictor(file, threshold=1.5)
    with pytest.raises(InputError, match="top_k: not an option of this predictor"):
        load_predictor(file, top_k=2)
    capsys.readouterr()
    assert predict(file, images[:2], json=True)
    printed = json.loads(capsys.readouterr().out)["predictions"]
    names = read_header(file).class_names
    assert all(each["label"] == names[each["index"]] for one in printed for each in one["labels"])
    assert [{each["label"] for each in one["labels"]} for one in printed] == [
        set(each.names) for each in load_predictor(best, device="cpu")(images[:2])
    ]


def test_the_order_of_labels_does_not_matter(tmp_path, capsys):
    solid = Image.new("RGB", (8, 8))
    for split in ("train", "val"):
        names = {f"{split}{index}.png": labels for index, labels in enumerate(('"x,y"', '"y,x"'))}
        for name in names:
            solid.save(tmp_path / name)
        (tmp_path / f"{split}.csv").write_text("file,labels\n" + "".join(f"{k},{v}\n" for k, v in names.items()))
    check_data(MultiLabel(data=MultiLabelData(root=str(tmp_path))), tmp_path / "out")
    assert "different labels" not in capsys.readouterr().out


def labelled(root, cells, **args):
    """The training images of a table with these cells of labels."""
    rows = "".join(f'{index}.png,"{cell}"\n' for index, cell in enumerate(cells))
    for index in range(len(cells)):
        Image.new("RGB", (8, 8)).save(root / f"{index}.png")
    for split in ("train", "val"):
        (root / f"{split}.csv").write_text(f"image,tags\n{rows}")
    return build_datasets(MultiLabelData(root=str(root), **args), 3)[0]


@pytest.mark.parametrize(
    ("cells", "cell", "separator"),
    [
        (("haze primary", "clear primary", "clear primary water", "haze water"), "clear primary", " "),
        (("haze|primary", "primary"), "haze|primary", "|"),
        (("golden retriever; dog", "cat; dog"), "cat; dog", ";"),
    ],
)
def test_another_separator_is_noted(tmp_path, cells, cell, separator):
    """Otherwise each combination is a class of its own."""
    found = labelled(tmp_path, cells)
    assert len(found.class_names) == len(cells)
    note = f"{tmp_path / 'train.csv'}: {cell!r} is taken as one label; if it is 2 labels, give --data.separator"
    assert found.notes == (f"{note} {separator!r}",)
    assert labelled(tmp_path, cells, separator=separator).notes == ()


@pytest.mark.parametrize(
    ("cells", "separator"),
    [
        (("golden retriever", "golden gate"), ","),
        (("sea, sky", "sea", "sky", "blue sky, blue, sky"), ","),
        (("tench, Tinca tinca", "goldfish, Carassius auratus"), "|"),
        (("a|b", "c|d"), ","),
    ],
)
def test_names_with_spaces_are_no_lists(tmp_path, cells, separator):
    assert labelled(tmp_path, cells, separator=separator).notes == ()


def test_lists_as_python_writes_them_are_refused(tmp_path):
    message = r"""train\.csv, line 3: "\['cat', 'dog'\]" is a list; write only its labels, with ',' between$"""
    with pytest.raises(InputError, match=message):
        labelled(tmp_path, ("dog", "['cat', 'dog']"))
    assert labelled(tmp_path, ("dog", "[none]")).class_names == ("[none]", "dog")


def test_a_table_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "sample.csv").write_text("id\n0\n")
    (tmp_path / "train.csv").write_text("image;labels\n0.png;sky\n")
    columns = r"train\.csv has the columns 'image;labels', which are not separated by commas$"
    with pytest.raises(InputError, match=native(rf"no CSV or Parquet table with a column of files .*; .*/{columns}")):
        build_datasets(MultiLabelData(root=str(tmp_path)), 3)
