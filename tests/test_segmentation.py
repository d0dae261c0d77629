"""Segmentation from the command line: training, resuming, several processes, evaluation, prediction; its metrics."""

import csv
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import save_scenes
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from test_distributed import run
from test_resume import assert_same_run, die
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from dualtoken_vit import cli
from dualtoken_vit.checkpoint import read_checkpoint
from dualtoken_vit.data.masks import IGNORE
from dualtoken_vit.errors import InputError
from dualtoken_vit.evaluation import evaluate
from dualtoken_vit.models.segmenters import segment
from dualtoken_vit.predictors import load_model
from dualtoken_vit.recipes import RECIPES, Model, Segmentation
from dualtoken_vit.recipes import SegmentationInput as View
from dualtoken_vit.show.drawing import color_of, draw_scene
from dualtoken_vit.tasks import segmentation
from dualtoken_vit.tasks.segmentation import cross_entropy, evaluation
from dualtoken_vit.tasks.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Drawn shapes as files: {images,annotations}/{train,val}/*.png, classes.txt."""
    folder = tmp_path_factory.mktemp("scenes")
    save_scenes(folder, size=48, train=12, val=5)
    return folder


def arguments(scenes, out, *more, segmenter="deeplabv3", **settings):
    settings = {
        "model.name": "dualtoken_vit_tiny",
        "data.root": scenes,
        "data.workers": 0,
        "width": 8,
        "optim.batch-size": 4,
        "optim.epochs": 4,
        "optim.lr": 4e-3,
        "optim.warmup-steps": 2,
        "run.device": "cpu",
        "run.save-every": 2,
    } | {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    given = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    network = "--model.args", "dims=(16,32,32)", "depths=(1,1,1)"
    crop = "--data.crop-size", "32", "40"
    return ["train", "masks", "--segmenter", segmenter, *network, *crop, *given, "--out", str(out), *more]


AVERAGED = {  # one of them with averaged weights
    "deeplabv3": {},
    "lraspp": {"optim__ema_decay": 0.5, "optim__lr": 2e-2, "optim__epochs": 8, "width": 32},
}


@pytest.fixture(scope="module", params=["deeplabv3", "lraspp"])
def trained(request, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    torch.set_num_threads(1)
    assert cli.run(arguments(scenes, out, segmenter=request.param, **AVERAGED[request.param])) == 0
    return request.param, out


def call(capsys, *args):
    capsys.readouterr()
    status = cli.run([*map(str, args)])
    return status, capsys.readouterr().out


# Metrics


def reference(found, truth, classes):
    """The figures by their definitions in numpy, and the IoU and accuracy of each class."""
    counts = truth != IGNORE
    found, truth = found[counts], truth[counts]
    iou = [
        np.mean((found == k) & (truth == k)) / np.mean((found == k) | (truth == k))
        if ((found == k) | (truth == k)).any()
        else None
        for k in range(classes)
    ]
    accuracy = [np.mean(found[truth == k] == k) if (truth == k).any() else None for k in range(classes)]
    return {
        "miou": np.mean([share for share in iou if share is not None]),
        "pixel_accuracy": np.mean(found == truth),
        "mean_accuracy": np.mean([share for share in accuracy if share is not None]),
    }, {"iou": iou, "accuracy": accuracy}


def test_scores_are_torchmetrics_and_numpy_s():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, (2, 3, 20, 30))
    truth[truth == 3] = 1
    found[found == 3] = 2  # class 3 is nowhere; class 4 is true, never found
    found[found == 4] = 0
    truth[rng.random(truth.shape) < 0.1] = IGNORE
    confusion = np.zeros((5, 5), dtype=np.int64)
    for t, f in zip(truth.ravel(), found.ravel(), strict=True):
        if t != IGNORE:
            confusion[t, f] += 1
    scores = evaluation(confusion, tuple("abcde"), 2).metrics
    figures, per_class = reference(found, truth, 5)
    digits = {"abs": 1e-6}  # of the stored numbers
    assert {name: scores[name] for name in figures} == pytest.approx(figures, **digits)
    for key, shares in per_class.items():
        assert [one[key] for one in scores["per_class"].values()] == pytest.approx(shares, **digits)
    assert scores["per_class"]["d"] == {"iou": None, "accuracy": None}
    assert scores["per_class"]["e"] == {"iou": 0, "accuracy": 0}
    tensors = torch.from_numpy(found), torch.from_numpy(truth)
    jaccard = MulticlassJaccardIndex(5, ignore_index=IGNORE)
    assert scores["miou"] == pytest.approx(jaccard(*tensors).item(), **digits)
    for average, name in (("micro", "pixel_accuracy"), ("macro", "mean_accuracy")):
        if average == "macro":  # torchmetrics counts a class that is only predicted as 0
            tensors = tuple(each[(tensors[1] != 3)] for each in tensors)
        theirs = MulticlassAccuracy(5, average=average, ignore_index=IGNORE)(*tensors)
        assert scores[name] == pytest.approx(theirs.item(), **digits)


def test_the_loss_leaves_out_what_is_ignored():
    logits, mask = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    mask[0, :2] = IGNORE
    picked = -logits.log_softmax(1).gather(1, mask.clamp(max=2)[:, None])[:, 0]
    assert cross_entropy(logits, mask).item() == pytest.approx(picked[mask != IGNORE].mean().item(), rel=1e-5)
    assert cross_entropy(logits, torch.full_like(mask, IGNORE)).item() == 0
    weights = torch.tensor([0.1, 1, 4])
    weighted = torch.nn.functional.cross_entropy(logits, mask, weights, ignore_index=IGNORE)
    assert cross_entropy(logits, mask, weights).item() == pytest.approx(weighted.item(), rel=1e-5)
    assert cross_entropy(logits, torch.full_like(mask, IGNORE), weights).item() == 0


def test_a_run_weighs_the_classes(scenes, tmp_path, monkeypatch):
    """By all the training masks; a resumed run by those that it began with."""
    seen = []

    def spy(logits, mask, weights=None):
        seen.append(weights)
        return cross_entropy(logits, mask, weights)

    monkeypatch.setattr(segmentation, "cross_entropy", spy)
    shutil.copytree(scenes, tmp_path / "data")
    masks = sorted((tmp_path / "data" / "annotations" / "train").iterdir())
    labels = np.concatenate([np.ravel(Image.open(path)) for path in masks])
    expected = [1 / np.log(1.02 + share) for share in np.bincount(labels, minlength=7) / len(labels)]
    args = arguments(tmp_path / "data", tmp_path / "run", "--class-weights", "log", optim__epochs=1)
    assert cli.run(args) == 0
    assert len(seen) == 2 * 3  # both heads, three steps
    assert all(weights.tolist() == pytest.approx(expected, rel=1e-5) for weights in seen)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["class_weights"] == "log"
    kept = torch.load(tmp_path / "run" / "last.ckpt")["Loaders"]["train"]["pixels"]
    assert kept[0].tolist() == np.bincount(labels, minlength=7).tolist()
    other = arguments(tmp_path / "data", tmp_path / "other", "--class-weights", "log", "--data.no-verify")
    with pytest.raises(InputError, match=r"--class-weights log counts the pixels .*: leave --data\.verify at true"):
        cli.run(other)
    changed = ("--resume", "--class-weights", "median-frequency")
    args = arguments(tmp_path / "data", tmp_path / "run", *changed, optim__epochs=1)
    with pytest.raises(InputError, match="--class-weights is log in the run"):
        cli.run(args)


@pytest.mark.parametrize(("kept", "message"), [((0, 1), ""), ((0,), "the training masks have only one class")])
def test_classes_that_are_in_no_training_mask_are_named(scenes, tmp_path, capsys, kept, message):
    shutil.copytree(scenes, tmp_path / "data")
    for path in (tmp_path / "data" / "annotations" / "train").iterdir():
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(np.isin(labels, kept), labels, IGNORE).astype(np.uint8)).save(path)
    args = arguments(tmp_path / "data", tmp_path / "run", optim__epochs=1)
    if message:
        with pytest.raises(InputError, match=message):
            cli.run(args)
        assert not (tmp_path / "run").exists()
    else:
        assert cli.run(args) == 0
    names = (scenes / "classes.txt").read_text().split()
    assert f"in no training mask: {', '.join(names[len(kept) :])}" in capsys.readouterr().out


# Runs


def pixels_of(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255


def own_labels(best, scenes, view=None):
    """What a checkpoint finds in the validation images, and the truth, without the task: one image at a time."""
    model, _ = load_model(best)
    found, truth = [], []
    for path in sorted((scenes / "images" / "val").iterdir()):
        with torch.inference_mode():
            x = pixels_of(path)
            labels = segment(model, [x], view)[0] if view else model(x[None])[0].argmax(0)
        found.append(labels.numpy())
        truth.append(np.asarray(Image.open(scenes / "annotations" / "val" / path.name)))
    return np.stack(found), np.stack(truth)


def own_scores(best, scenes, view=None):
    """The figures by numpy."""
    return reference(*own_labels(best, scenes, view), len(read_checkpoint(best).class_names))


def test_the_run_folder(trained, scenes, capsys):
    _, out = trained
    files = {"recipe.json", "metrics.csv", "curves.png", "evaluation.json", "best.safetensors", "last.ckpt"}
    files |= {"confusion.csv", "confusion.png", "worst"}
    assert files <= {path.name for path in out.iterdir()}
    assert {path.name for path in (out / "worst").iterdir()} == {f"{n}.png" for n in range(1, 6)}
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert float(rows[-1]["train_loss"]) < 0.9 * float(rows[0]["train_loss"])
    best = max(rows, key=lambda row: float(row["val_miou"]))
    figures, per_class = own_scores(out / "best.safetensors", scenes)
    assert {name: float(best[f"val_{name}"]) for name in figures} == pytest.approx(figures, abs=1e-4)

    status, printed = call(capsys, "evaluate", out / "best.safetensors", "--json", "--device", "cpu")
    result = json.loads(printed)
    assert status == 0
    assert result == json.loads((out / "evaluation.json").read_text())
    assert {name: result[name] for name in figures} == pytest.approx(figures, abs=1e-4)
    assert list(result["per_class"]) == (scenes / "classes.txt").read_text().split()
    for key, shares in per_class.items():
        assert [one[key] for one in result["per_class"].values()] == pytest.approx(shares, abs=1e-3)
    assert result["images"] == 5
    matrix = [row[1:] for row in csv.reader((out / "confusion.csv").read_text().splitlines())][1:]
    truth = [np.asarray(Image.open(path)) for path in (scenes / "annotations" / "val").iterdir()]
    assert np.array(matrix, dtype=int).sum(1).tolist() == np.bincount(np.ravel(truth), minlength=7).tolist()


def test_evaluation_of_another_split_and_by_other_views(trained, scenes, tmp_path, capsys):
    _, out = trained
    best, common = out / "best.safetensors", ("--device", "cpu", "--json")
    shutil.copytree(scenes, tmp_path / "data")
    for kind in ("images", "annotations"):
        (tmp_path / "data" / kind / "val").rename(tmp_path / "data" / kind / "test")
    before = json.loads(call(capsys, "evaluate", best, *common)[1])
    given = "--data.root", tmp_path / "data", "--data.split", "test"
    assert json.loads(call(capsys, "evaluate", best, *given, *common)[1]) == before
    whole = "--data.mode", "slide", "--data.window", "48", "--data.window-stride", "32"  # one window
    again = *given[:2], "--data.split=test"
    assert json.loads(call(capsys, "evaluate", best, *again, *whole, *common)[1]) == before
    follows = {"dataset": "masks", "format": "auto", "limit": None, "holdout": 0.0}
    assert segmentation.TASK.relocate(Segmentation(), {"root": "x"}) == follows
    assert segmentation.TASK.relocate(Segmentation(), {"val_split": "test"}) == {
        "holdout": 0.0
    }  # not the held-out images
    other = "--data.scales", "0.75", "1", "--data.flip", "True", "--data.image-size", "40"
    _, printed = call(capsys, "evaluate", best, *given, *other, *common, "--out", tmp_path / "out")
    figures, _ = own_scores(best, scenes, View(scales=(0.75, 1.0), flip=True, image_size=40))
    assert {name: json.loads(printed)[name] for name in figures} == pytest.approx(figures, abs=1e-4)
    assert figures["pixel_accuracy"] != pytest.approx(before["pixel_accuracy"], abs=1e-3)
    assert json.loads(printed) == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (tmp_path / "data" / "classes.txt").write_text("ground\ncircle\n")
    with pytest.raises(InputError, match=r"label \d in \d+ pixels, but there are 2 classes"):
        cli.run([*map(str, ("evaluate", best, *given, *common))])


def test_evaluation_elsewhere_than_the_file_of_the_classes(scenes, tmp_path, capsys, monkeypatch):
    names = (scenes / "classes.txt").read_text()
    (tmp_path / "names.txt").write_text(names)
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments(scenes, tmp_path / "run", "--data.classes", "names.txt", optim__epochs=1)) == 0
    best = tmp_path / "run" / "best.safetensors"
    shutil.copytree(scenes, tmp_path / "data")
    (tmp_path / "data" / "classes.txt").write_text(names.upper())  # names.txt goes before it, as in training
    assert call(capsys, "evaluate", best, "--data.root", tmp_path / "data", "--json", "--device", "cpu")[0] == 0
    (tmp_path / "names.txt").unlink()
    status, printed = call(capsys, "evaluate", best, "--data.root", scenes, "--json", "--device", "cpu")
    assert status == 0
    assert list(json.loads(printed)["per_class"]) == names.split()


def test_the_worst_images_are_drawn_the_worst_first(trained, scenes, tmp_path, monkeypatch):
    _, out = trained
    drawn = []
    monkeypatch.setattr(segmentation, "WORST", 2)
    monkeypatch.setattr(segmentation, "draw_scene", lambda panels, names: drawn.append(panels) or panels[0][1])
    evaluate(out / "best.safetensors", device="cpu", out=tmp_path, batch_size=2)
    found, truth = own_labels(out / "best.safetensors", scenes)
    right = (found == truth).mean((1, 2))
    paths = sorted((scenes / "images" / "val").iterdir())
    names = [path.name for path in paths]
    for panels, share in zip(drawn, np.sort(right)[:2], strict=True):
        (title, image, _), (_, _, true), (_, _, predicted) = panels
        index = names.index(title)
        assert right[index] == pytest.approx(share, abs=1e-3)  # any of those that are equal
        assert np.array_equal(image, Image.open(paths[index]))
        assert np.array_equal(true, truth[index])
        assert (predicted == found[index]).mean() > 0.999
    assert len({panels[0][0] for panels in drawn}) == 2
    assert {path.name for path in (tmp_path / "worst").iterdir()} == {"1.png", "2.png"}


def test_class_names_are_no_markup():
    names = "a[/b]", "[road]"
    console = Console(file=io.StringIO(), width=80)
    console.print(evaluation(np.eye(2, dtype=int), names, 1).table())
    assert all(name in console.file.getvalue() for name in names)


def test_predictions_by_another_view(trained, scenes, tmp_path, capsys):
    _, out = trained
    image = next((scenes / "images" / "val").iterdir())
    asked = "--scales", "0.75", "1", "--flip", "True", "--image-size", "40", "--device", "cpu"
    call(capsys, "predict", out / "best.safetensors", image, *asked, "--out", tmp_path / "out")
    view = View(scales=(0.75, 1.0), flip=True, image_size=40)
    expected = segment(load_model(out / "best.safetensors")[0], [pixels_of(image)], view)[0].numpy()
    labels = np.asarray(Image.open(tmp_path / "out" / f"{image.name}.labels.png"))
    assert np.mean(labels == expected) > 0.999
    with pytest.raises(InputError, match="--window 16: must be at least 32"):
        cli.run(["predict", str(out / "best.safetensors"), str(image), "--mode", "slide", "--window", "16"])


def test_predictions(trained, scenes, tmp_path, capsys):
    _, out = trained
    best, images = out / "best.safetensors", scenes / "images" / "val"
    Image.open(images / "val-0000.png").resize((70, 40)).save(tmp_path / "wide.jpg")
    given = "--json", "--device", "cpu", "--out", tmp_path / "out"
    status, printed = call(capsys, "predict", best, images, tmp_path / "wide.jpg", *given)
    found = json.loads(printed)
    assert status == 0
    assert found["classes"] == (scenes / "classes.txt").read_text().split()
    assert [Image.open(one["image"]).size for one in found["predictions"]] == [(48, 48)] * 5 + [(70, 40)]
    labels = Image.open(tmp_path / "out" / "wide.jpg.labels.png")
    model, _ = load_model(best)
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "wide.jpg"))).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        expected = model(pixels)[0].argmax(0).numpy()
    assert labels.mode == "P"
    assert np.mean(np.asarray(labels) == expected) > 0.999
    assert labels.getpalette()[:21] == [part for label in range(7) for part in color_of(label)]
    shares = {one["class"]: one["share"] for one in found["predictions"][-1]["classes"]}
    assert [found["classes"][one["index"]] for one in found["predictions"][-1]["classes"]] == list(shares)
    assert shares == pytest.approx({found["classes"][k]: np.mean(expected == k) for k in np.unique(expected)}, abs=2e-3)
    names = {path.name for path in (tmp_path / "out").rglob("*.png")}
    drawn = {"wide.jpg", *(path.name for path in images.iterdir())}
    assert names == {"sheet.png"} | {f"{n}.png" for n in drawn} | {f"{n}.labels.png" for n in drawn}


def test_a_checkpoint_says_what_it_is(trained):
    segmenter, out = trained
    checkpoint = read_checkpoint(out / "best.safetensors")
    assert (checkpoint.task, checkpoint.model) == ("segmentation", "dualtoken_vit_tiny")
    assert checkpoint.model_args["segmenter"] == segmenter
    assert checkpoint.class_names[:2] == ("ground", "circle")


def test_killed_and_resumed(trained, scenes, tmp_path):
    segmenter, whole = trained
    out = tmp_path / "run"
    args = arguments(scenes, out, segmenter=segmenter, **AVERAGED[segmenter])
    die(args, "saved last.ckpt", 1)
    assert torch.load(out / "last.ckpt")["global_step"] == 2  # of 3 in the first epoch
    assert cli.run([*args, "--resume"]) == 0
    files = "metrics.csv", "confusion.csv", "evaluation.json"
    assert_same_run(out, whole, kinds={"state_dict", "optimizer_states"}, files=files)


def test_killed_and_resumed_with_weighted_classes(scenes, tmp_path):
    settings = {"optim__epochs": 1, "class_weights": "median-frequency"}
    assert cli.run(arguments(scenes, tmp_path / "whole", **settings)) == 0
    die(arguments(scenes, tmp_path / "run", **settings), "saved last.ckpt", 1)
    assert cli.run([*arguments(scenes, tmp_path / "run", **settings), "--resume"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole", kinds={"state_dict", "optimizer_states"})


def test_a_diverged_run_names_its_last_good_state(scenes, tmp_path):
    given = {"optim__optimizer": "sgd", "optim__lr": 1000, "optim__warmup_steps": 0, "optim__epochs": 1}
    with pytest.raises(InputError, match=r"NaN or Inf .*(nothing was saved|last good state).*--optim.lr"):
        cli.run(arguments(scenes, tmp_path / "run", **given))


def test_lraspp_trains_on_one_image_a_batch(scenes, tmp_path):
    """Its pooled branch has no batch normalisation, unlike those of DeepLabv3 and PSPNet."""
    settings = {"segmenter": "lraspp", "optim__batch_size": 1, "optim__epochs": 1, "data__limit": 4}
    assert cli.run(arguments(scenes, tmp_path / "run", **settings)) == 0


@pytest.mark.parametrize("segmenter", ["deeplabv3", "lraspp"])
def test_two_processes_count_each_image_once(scenes, tmp_path, segmenter):
    """With weighted classes, and crops that reach beyond the image: what counts differs from process to process."""
    settings = {"segmenter": segmenter, "optim__optimizer": "sgd", "optim__lr": 0.01, "optim__epochs": 1}
    settings["dropout"] = 0  # processes draw it for themselves
    more = "--augment.scale", "0.5", "1", "--class-weights", "log"
    assert cli.run(arguments(scenes, tmp_path / "begin", *more, **settings | {"optim__lr": 1e-12})) == 0
    assert cli.run(arguments(scenes, tmp_path / "one", *more, **settings)) == 0
    finished = run(["-m", "dualtoken_vit.cli", *arguments(scenes, tmp_path / "two", *more, **settings, run__devices=2)])
    assert finished.returncode == 0, finished.stderr
    begin, one, two = (load_file(tmp_path / name / "best.safetensors") for name in ("begin", "one", "two"))
    step, difference = (
        torch.cat([(there[key] - here[key]).flatten().double() for key in here if "num_batches" not in key])
        for there, here in ((one, begin), (one, two))
    )
    assert difference.norm() < 1e-3 * step.norm()
    counts = []
    for name in ("one", "two"):
        rows = list(csv.reader((tmp_path / name / "confusion.csv").read_text().splitlines()))[1:]
        counts.append(np.array([row[1:] for row in rows], dtype=int))
        assert len(list((tmp_path / name / "worst").iterdir())) == 5
    assert counts[0].sum() == 5 * 48 * 48
    assert counts[0].sum(1).tolist() == counts[1].sum(1).tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__root": ""}, "--data.root is missing"),
        ({"data__root": "nowhere"}, "nowhere: no such folder"),
        ({"data__window": 16}, "--data.window 16: must be at least 32"),
        ({"data__window_stride": 0}, "--data.window-stride 0: must be at least 1"),
        ({"augment__class_cap": 2.0}, "--augment.class-cap 2.0: must be at most 1"),
        (
            {"optim__batch_size": 1},
            "batch normalisation .* needs two or more images, but a batch has 1 image; give --optim.batch-size 2",
        ),
        ({"optim__batch_size": 64}, "cannot fill one batch of 64"),
        ({"model__name": "vgg11"}, "--model.args dims"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(scenes, tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as error:
        cli.run(arguments(scenes, tmp_path / "run", **settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_one_position_under_batch_normalisation(scenes, tmp_path):
    """LR-ASPP has none after global pooling, but at the last stride of the backbone; the folder is free after that."""
    base = RECIPES["masks-lite"]
    data = replace(base.data, root=str(scenes), crop_size=(32, 32), workers=0)
    model = Model(args=("dims=(16,32,32)", "depths=(1,1,1)"), pretrained=False)
    run = replace(base.run, device="cpu")
    optim = replace(base.optim, batch_size=1, epochs=1)
    with pytest.raises(InputError, match=r"nothing to average .* give a larger --optim\.batch-size"):
        train(replace(base, data=data, model=model, optim=optim, run=run), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_drawing_shows_labels_and_legend():
    labels = np.zeros((50, 100), dtype=np.uint8)
    labels[:, 50:] = 2
    labels[:10] = IGNORE
    grey = Image.new("RGB", (100, 50), (100, 100, 100))
    drawing = np.asarray(draw_scene([("", grey, None), ("", grey, labels)], ("a", "b", "c")))
    assert drawing.shape == (240 + 16 + 32, 480 + 16 + 480, 3)  # enlarged, to be legible
    assert (drawing[:240, :480] == 100).all()
    assert (drawing[:40, 496:] == 100).all()  # ignored
    for column, label in ((600, 0), (900, 2)):
        np.testing.assert_allclose(drawing[150, column], 40 + 0.6 * np.array(color_of(label)), atol=1)
    legend = {tuple(pixel) for pixel in drawing[256:].reshape(-1, 3).tolist()}
    assert {color_of(0), color_of(2)} <= legend
    assert color_of(1) not in legend
