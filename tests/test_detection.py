"""Detection from the command line: training, resuming, several processes, evaluation, prediction."""

import contextlib
import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from test_distributed import run
from test_resume import assert_same_run, die
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from dualtoken_vit import cli
from dualtoken_vit.checkpoint import read_checkpoint, save_checkpoint
from dualtoken_vit.data.detection import save_scenes
from dualtoken_vit.errors import InputError
from dualtoken_vit.evaluation import evaluate
from dualtoken_vit.models.resizing import Transform
from dualtoken_vit.predict import predict
from dualtoken_vit.predictors import load_model
from dualtoken_vit.recipes import RECIPES, Model
from dualtoken_vit.runtime.base import BasePredictor
from dualtoken_vit.show.drawing import color_of, draw_objects
from dualtoken_vit.tasks.registry import get_task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Drawn shapes as COCO files: images/, annotations/instances_{train,val}.json."""
    folder = tmp_path_factory.mktemp("scenes")
    save_scenes(folder, size=64, train=13, val=5)
    return folder


def arguments(scenes, out, *more, detector="retinanet", **settings):
    settings = {
        "model.name": "dualtoken_vit_small",
        "data.images": scenes / "images",
        "data.train-json": scenes / "annotations" / "instances_train.json",
        "data.val-json": scenes / "annotations" / "instances_val.json",
        "data.image-size": 64,
        "data.workers": 0,
        "optim.batch-size": 4,
        "optim.epochs": 4,
        "optim.lr": 2e-3,
        "optim.warmup-steps": 2,
        "run.device": "cpu",
        "run.save-every": 2,
    } | {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    given = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    network = "--model.args", "dims=(16,32,32)", "depths=(1,1,1)"
    roi = ("--roi-samples", "16") if detector == "mask-rcnn" else ()
    return ["train", "coco", "--detector", detector, *network, *roi, *given, "--out", str(out), *more]


@pytest.fixture(scope="module", params=["ssdlite", "mask-rcnn"])
def trained(request, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    torch.set_num_threads(1)
    settings = {"augment__multi_scale": 48, "class_weights": "inverse"}
    assert cli.run(arguments(scenes, out, detector=request.param, **settings)) == 0
    return request.param, out


def call(capsys, *args):
    capsys.readouterr()
    status = cli.run([*map(str, args)])
    return status, capsys.readouterr().out


def load_and_store(path, **data):
    """Change fields of the data section of a checkpoint's recipe."""
    model, info = load_model(path)
    recipe = info.recipe | {"data": info.recipe["data"] | data}
    keys = ("task", "class_names", "preprocessing", "metrics", "model_args", "category_ids")
    save_checkpoint(path, model, recipe=recipe, **{key: getattr(info, key) for key in keys})


def test_the_run_folder_agrees_with_pycocotools(trained, scenes, capsys):
    detector, out = trained
    kinds = {"box": "bbox", "mask": "segm"} if detector == "mask-rcnn" else {"box": "bbox"}
    files = {"recipe.json", "metrics.csv", "curves.png", "evaluation.json", "best.safetensors", "last.ckpt"}
    files |= {f"{name}-{kind}.{end}" for kind in kinds for name, end in (("detections", "json"), ("pr", "png"))}
    assert files <= {path.name for path in out.iterdir()}
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    score = f"val_{list(kinds)[-1]}_AP"
    best = max(rows, key=lambda row: float(row[score]))
    assert json.loads((out / "recipe.json").read_text())["task"] == "detection"
    assert read_checkpoint(out / "best.safetensors").preprocessing["usual_size"] == [64, 64]
    truth = COCO(str(scenes / "annotations" / "instances_val.json"))
    for kind, theirs in kinds.items():
        detections = json.loads((out / f"detections-{kind}.json").read_text())
        assert detections
        evaluation = COCOeval(truth, truth.loadRes(str(out / f"detections-{kind}.json")), theirs)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        found = json.loads((out / "evaluation.json").read_text())[kind]
        assert list(found.values()) == pytest.approx(evaluation.stats.tolist(), abs=1e-6)
        assert float(best[f"val_{kind}_AP"]) == pytest.approx(evaluation.stats[0], abs=1e-6)

    status, printed = call(capsys, "evaluate", out / "best.safetensors", "--json", "--device", "cpu")
    result = json.loads(printed)
    assert status == 0
    for command in (("evaluate", "--overlap", "0.3"), ("predict", "--overlap=0.3", scenes / "images")):
        with pytest.raises(InputError, match="--overlap is that of tiles: give --tile too"):
            cli.run([command[0], str(out / "best.safetensors"), *map(str, command[1:])])
    assert result.keys() == {*kinds, "images", "per_class", "objects"}
    assert result["images"] == 5
    for kind in kinds:
        assert result[kind]["AP"] == pytest.approx(float(best[f"val_{kind}_AP"]), abs=1e-6)
        digits = [*result[kind].values(), *result["per_class"][kind].values()]
        assert digits == [round(value, 6) for value in digits]
        there = [ap for ap in result["per_class"][kind].values() if ap >= 0]
        assert result[kind]["AP"] == pytest.approx(np.mean(there), abs=1e-6)


@pytest.mark.parametrize(
    ("tile", "classes", "said"),
    [
        (None, 2, "objects: 1; detectors return at most 100"),
        (64, 1, "objects of a class: 1; COCO's metrics count at most 100"),
        (64, 2, None),
    ],
)
def test_more_objects_in_an_image_than_count(scenes, tmp_path, tile, classes, said):
    path = scenes / "annotations" / "instances_val.json"
    coco = json.loads(path.read_text())
    one = coco["annotations"][-1]
    ids = [one["category_id"], *(each["id"] for each in coco["categories"] if each["id"] != one["category_id"])]
    coco["annotations"] += [one | {"id": 10_000 + n, "category_id": ids[n % classes]} for n in range(100)]
    (tmp_path / path.name).write_text(json.dumps(coco))
    base, tiny = RECIPES["coco"], Model(args=("dims=(16,32,32)", "depths=(1,1,1)"))
    files = {"images": str(scenes / "images"), "train_json": str(path), "val_json": str(tmp_path / path.name)}
    recipe = replace(base, data=replace(base.data, image_size=64, tile=tile, **files))
    notes = get_task("detection").prepare(recipe, tiny).val.notes
    found = [note.partition("more than 100 ")[2] for note in notes if "more than" in note]
    assert found == ([f"{said}, which limits recall and AP"] if said else [])


@pytest.mark.parametrize(
    ("sides", "said"),
    [((32, 48, 64), ["--augment.multi-scale 48 64: the same for most training images"]), ((32, 64), []), ((), [])],
)
@pytest.mark.parametrize(("network", "frozen"), [("test_resnet", True), ("convnext_atto", False)])
def test_notes_on_the_network_and_its_images(scenes, sides, said, network, frozen):
    base = RECIPES["coco"]
    files = {f"{split}_json": str(scenes / "annotations" / f"instances_{split}.json") for split in ("train", "val")}
    data = replace(base.data, images=str(scenes / "images"), image_size=32, max_size=48, **files)
    recipe = replace(base, data=data, augment=replace(base.augment, multi_scale=sides), model=Model(name=network))
    notes = get_task("detection").prepare(recipe, recipe.model).train.notes
    assert [note.partition(", whose")[0] for note in notes if "multi-scale" in note] == said
    assert sum("starts from random weights" in note for note in notes) == 1
    assert any("frozen batch normalisation normalises nothing" in note for note in notes) == frozen


def test_evaluation_of_other_images(trained, scenes, tmp_path, capsys):
    detector, out = trained
    for name in ("images", "annotations"):
        shutil.copytree(scenes / name, tmp_path / name)
    path = tmp_path / "annotations" / "instances_val.json"
    coco = json.loads(path.read_text())
    for entry in (*coco["categories"], *coco["annotations"]):  # the same classes by other numbers
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = 90 - 7 * entry[key]
    path.write_text(json.dumps(coco))
    best, data = out / "best.safetensors", ("--data.images", tmp_path / "images", "--data.val-json", path)
    common = ("--device", "cpu", "--json")
    status, printed = call(capsys, "evaluate", best, *data, *common, "--out", tmp_path / "out")
    assert status == 0
    if detector == "ssdlite":  # the images named now go before those of the recipe's validation
        shutil.copytree(out, tmp_path / "run")
        load_and_store(tmp_path / "run" / "best.safetensors", val_images="nowhere")
        again = call(capsys, "evaluate", tmp_path / "run" / "best.safetensors", *data, *common)[1]
        assert json.loads(again) == json.loads(printed)
    stored = json.loads(call(capsys, "evaluate", best, *common)[1])
    with pytest.raises(InputError, match=r"--out .* holds a run, whose files are kept"):
        cli.run([*map(str, ("evaluate", best, *common, "--out", out))])
    with pytest.raises(SystemExit, match="2"):
        cli.run([*map(str, ("predict", best, scenes / "images", "--flip", "True"))])
    assert "Unrecognized options: --flip" in capsys.readouterr().err
    other = json.loads(printed)
    assert other["objects"] == stored["objects"]
    for kind, aps in stored["per_class"].items():
        assert other["per_class"][kind] == pytest.approx(aps, abs=1e-9)
        assert other[kind] == pytest.approx(stored[kind], abs=1e-9)  # the mean over the classes in another order
    found = json.loads((tmp_path / "out" / "detections-box.json").read_text())
    assert {one["category_id"] for one in found} <= {one["id"] for one in coco["categories"]}

    coco["categories"][0]["name"] = "blob"
    path.write_text(json.dumps(coco))
    with pytest.raises(InputError, match=r"instances_val\.json: .*'blob' is not among the 6 trained classes"):
        cli.run([*map(str, ("evaluate", best, *data, *common))])
    with pytest.raises(SystemExit, match="2"):
        cli.run(["evaluate", str(best), "--data.crop-pct", "0.9"])
    assert "Unrecognized options: --data.crop-pct" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--data\.crop-pct is not an option of detection, .*--data\.images DIR"):
        evaluate(best, data={"crop_pct": 0.9}, device="cpu")


def test_the_long_side_is_limited_below_the_short_one(trained, scenes, tmp_path, monkeypatch, capsys):
    """To the sizes of torchvision's transform, in evaluation and training, which says that image_size has no effect."""
    expected = GeneralizedRCNNTransform(64, 40, (0.5,) * 3, (0.5,) * 3).resize(torch.zeros(3, 64, 64))[0].shape[1:]
    sizes, fit = set(), Transform.fit
    monkeypatch.setattr(Transform, "fit", lambda *args: sizes.add(found := fit(*args)) or found)
    evaluate(trained[1] / "best.safetensors", data={"max_size": 40}, device="cpu")
    assert sizes == {tuple(expected)} == {(40, 40)}
    if trained[0] == "ssdlite":
        sizes.clear()
        more = {"data__max_size": 40, "data__limit": 4, "optim__epochs": 1}
        assert cli.run(arguments(scenes, tmp_path / "run", detector="ssdlite", **more)) == 0
        assert sizes == {(40, 40)}
        assert (
            "--data.max-size 40, which limits the long side, is below --data.image-size 64, which has no effect"
            in capsys.readouterr().out
        )


def test_evaluation_of_files_by_a_network_of_drawn_images(trained, scenes, tmp_path, capsys):
    """What is named now goes before all that the run said of its own data."""
    _, out = trained
    shutil.copytree(out, tmp_path / "run")
    best = tmp_path / "run" / "best.safetensors"
    load_and_store(best, dataset="shapes", images="", val_json="", limit=2)
    data = "--data.images", scenes / "images", "--data.val-json", scenes / "annotations" / "instances_val.json"
    found = json.loads(call(capsys, "evaluate", best, *data, "--device", "cpu", "--json")[1])
    assert found == json.loads(
        call(capsys, "evaluate", out / "best.safetensors", *data, "--device", "cpu", "--json")[1]
    )
    assert found["images"] == 5
    few = call(capsys, "evaluate", best, *data, "--data.limit", "3", "--device", "cpu", "--json")[1]
    assert json.loads(few)["images"] == 3
    with pytest.raises(InputError, match="shapes draws its own images; for files give"):
        cli.run(["train", "demo-detect", "--data.images", str(scenes / "images"), "--out", str(tmp_path / "no")])


@pytest.fixture(scope="module")
def motley(scenes, tmp_path_factory):
    """The scenes as images of four sizes, lying and standing, with polygons, RLE of both kinds, and crowds."""
    folder = tmp_path_factory.mktemp("motley")
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        coco = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
        for image in coco["images"]:
            size = ((64, 64), (90, 48), (40, 72), (33, 97))[image["id"] % 4]
            with Image.open(scenes / "images" / image["file_name"]) as img:
                canvas = Image.new("RGB", size)
                canvas.paste(img)
            canvas.save(folder / "images" / image["file_name"])
            image["width"], image["height"] = size
        sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
        for one in coco["annotations"]:
            (width, height), (left, top, across, down) = sizes[one["image_id"]], one["bbox"]
            across, down = min(across, width - left), min(down, height - top)
            one.pop("area")
            if min(across, down) < 1:  # out of the smaller image: of no area there
                one["segmentation"] = {"size": [height, width], "counts": [height * width]}
                continue
            corners = [left, top, left + across, top, left + across, top + down, left, top + down]
            plain = rle.merge(rle.frPyObjects([corners], height, width))
            one["iscrowd"] = int(one["id"] % 7 == 0)
            runs = np.flatnonzero(np.diff(np.pad(rle.decode(plain).T.ravel(), 1)))
            ends = [0, *runs.tolist(), height * width]
            one["segmentation"] = (
                [corners],
                {"size": [height, width], "counts": plain["counts"].decode()},
                {"size": [height, width], "counts": np.diff(ends).tolist()},
            )[one["id"] % 3]
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    return folder


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_images_of_many_sizes_with_crowds(motley, tmp_path, capsys, precision):
    settings = {
        "augment__photometric": 0.5,
        "augment__multi_scale": 64,
        "optim__epochs": 2,
        "run__precision": precision,
    }
    assert cli.run(arguments(motley, tmp_path / "run", detector="mask-rcnn", **settings)) == 0
    path = motley / "annotations" / "instances_val.json"
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    truth = json.loads(path.read_text())
    for one in truth["annotations"]:  # pycocotools needs it
        image = next(image for image in truth["images"] if image["id"] == one["image_id"])
        coded = one["segmentation"]
        if not (isinstance(coded, dict) and isinstance(coded["counts"], str)):
            coded = rle.frPyObjects(coded, image["height"], image["width"])
            coded = rle.merge(coded) if isinstance(coded, list) else coded
        one["area"] = int(rle.area(coded))
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with contextlib.redirect_stdout(None):
        coco = COCO(str(tmp_path / "truth.json"))
    for kind, theirs in (("box", "bbox"), ("mask", "segm")):
        with contextlib.redirect_stdout(None):
            results = coco.loadRes(str(tmp_path / "run" / f"detections-{kind}.json"))
            evaluation = COCOeval(coco, results, theirs)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert list(found[kind].values()) == pytest.approx(evaluation.stats.tolist(), abs=1e-6)
    assert found["images"] == 5
    objects = {one["name"]: len(coco.getAnnIds(catIds=one["id"], iscrowd=False)) for one in truth["categories"]}
    assert found["objects"] == objects
    assert sum(objects.values()) < len(truth["annotations"])  # some are crowds
    if precision == "32-true":  # however many go in together
        one, three = (
            json.loads(call(capsys, "evaluate", tmp_path / "run" / "best.safetensors", "--json", *more)[1])
            for more in (("--batch-size", "1"), ("--batch-size", "3"))
        )
        for kind in ("box", "mask"):
            assert one[kind] == pytest.approx(three[kind], abs=0.02)


def test_nothing_to_train_on(scenes, tmp_path):
    coco = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    coco["annotations"] = []
    (tmp_path / "empty.json").write_text(json.dumps(coco))
    with pytest.raises(InputError, match=r"empty\.json: no object to train on; see check-data"):
        cli.run(arguments(scenes, tmp_path / "run", data__train_json=tmp_path / "empty.json"))


@pytest.mark.parametrize("crowds", [False, True])
def test_nothing_to_validate_on(scenes, tmp_path, crowds):
    """COCO's metrics would be -1 in every epoch, so that the first one would be the best."""
    coco = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    coco["annotations"] = [one | {"iscrowd": 1} for one in coco["annotations"]] if crowds else []
    (tmp_path / "empty.json").write_text(json.dumps(coco))
    with pytest.raises(InputError, match=r"empty\.json: no object to validate on \(crowds do not count\), "):
        cli.run(arguments(scenes, tmp_path / "run", data__val_json=tmp_path / "empty.json"))
    assert not (tmp_path / "run").exists()


def test_predictions_are_a_coco_file(trained, scenes, tmp_path, capsys):
    detector, out = trained
    best, images = out / "best.safetensors", scenes / "images"
    paths = sorted(images.iterdir())
    model, info = load_model(best)
    pixels = torch.from_numpy(np.array(Image.open(paths[0]).convert("RGB"))).permute(2, 0, 1) / 255
    with torch.inference_mode():
        (expected,) = model([pixels])
    scores = expected["scores"]
    gap = (scores[:-1] - scores[1:]).argmax()
    least = scores[gap : gap + 2].mean().item()
    expected = {key: value[scores > least] for key, value in expected.items()}
    assert len(expected["scores"]) == gap + 1
    # One image at a time, as above: in a batch the last bits differ, and a box of the many may pass that did not.
    how = ("--json", "--score", least, "--device", "cpu", "--batch-size", "1")
    status, printed = call(capsys, "predict", best, images, *how, "--out", tmp_path / "out")
    found = json.loads(printed)
    assert status == 0
    assert found == json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["file_name"] for image in found["images"]] == [*map(str, paths)]
    (tmp_path / "coco.json").write_text(printed)
    with contextlib.redirect_stdout(None):
        coco = COCO(str(tmp_path / "coco.json"))
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[found["images"][0]["id"]]))
    left, top, right, bottom = expected["boxes"].unbind(1)
    boxes = torch.stack((left, top, right - left, bottom - top), dim=1).numpy()
    ids = np.array([info.category_ids[label] for label in expected["labels"]])
    unlike = np.abs(np.array([one["bbox"] for one in annotations]) - boxes[:, None]).max(2)
    unlike += 1000 * (np.array([one["category_id"] for one in annotations]) != ids[:, None])
    order = unlike.argmin(1)  # that of scores that are equal to rounding may differ
    assert sorted(order) == [*range(len(boxes))]
    annotations = [annotations[place] for place in order]
    assert [one["score"] for one in annotations] == pytest.approx(expected["scores"].tolist(), abs=1e-4)
    np.testing.assert_allclose([one["bbox"] for one in annotations], boxes, atol=1e-2)
    assert not any(one["iscrowd"] for one in annotations)
    assert [one["category_id"] for one in annotations] == ids.tolist()
    if detector == "mask-rcnn":
        for one, mask in zip(annotations, expected["masks"], strict=True):
            assert np.mean(coco.annToMask(one) == mask[0].numpy()) > 0.99
            assert one["area"] == coco.annToMask(one).sum()  # of a mask, which may be empty
    else:
        assert all(one["area"] == pytest.approx(one["bbox"][2] * one["bbox"][3]) for one in annotations)
    drawings = {path.name for path in (tmp_path / "out").rglob("*.png")}
    assert drawings == {"sheet.png"} | {f"{path.name}.png" for path in images.iterdir()}


def test_objects_found_before_an_error_are_kept(trained, scenes, tmp_path, monkeypatch):
    left = [BasePredictor._run] * 2

    def cut(self, inputs):
        if not left:
            raise KeyboardInterrupt
        return left.pop()(self, inputs)

    monkeypatch.setattr(BasePredictor, "_run", cut)
    paths = sorted((scenes / "images").iterdir())
    with pytest.raises(KeyboardInterrupt):
        predict(trained[1] / "best.safetensors", tuple(paths), tmp_path / "out", batch_size=1, device="cpu", score=0.0)
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["file_name"] for image in record["images"]] == [str(path) for path in paths[:2]]
    assert {one["image_id"] for one in record["annotations"]} == {1, 2}


def test_a_checkpoint_says_what_it_is(trained):
    detector, out = trained
    checkpoint = read_checkpoint(out / "best.safetensors")
    assert checkpoint.task == "detection"
    assert checkpoint.class_names == ("circle", "cross", "ring", "square", "star", "triangle")
    assert checkpoint.category_ids == (1, 2, 3, 4, 5, 6)
    assert checkpoint.model == "dualtoken_vit_small"
    assert checkpoint.model_args["detector"] == detector
    assert checkpoint.model_args["image_size"] == 64


def test_killed_and_resumed(trained, scenes, tmp_path):
    detector, whole = trained
    out = tmp_path / "run"
    args = arguments(scenes, out, detector=detector, augment__multi_scale=48, class_weights="inverse")
    die(args, "saved last.ckpt", 1)
    assert torch.load(out / "last.ckpt")["global_step"] == 2  # of 3 in the first epoch
    with pytest.raises(InputError, match=r"--class-weights is inverse in the run in .*, not equal"):
        cli.run([*args, "--class-weights", "equal", "--resume"])
    assert cli.run([*args, "--resume"]) == 0
    assert_same_run(out, whole, kinds={"state_dict", "optimizer_states"}, files=("metrics.csv", "detections-box.json"))


def test_fcos_is_killed_and_resumed(scenes, tmp_path):
    settings = {"detector": "fcos", "optim__epochs": 1}
    assert cli.run(arguments(scenes, tmp_path / "whole", **settings)) == 0
    die(arguments(scenes, tmp_path / "run", **settings), "saved last.ckpt", 1)
    assert torch.load(tmp_path / "run" / "last.ckpt")["global_step"] == 2
    assert cli.run([*arguments(scenes, tmp_path / "run", **settings), "--resume"]) == 0
    kinds, files = {"state_dict", "optimizer_states"}, ("metrics.csv", "detections-box.json")
    assert_same_run(tmp_path / "run", tmp_path / "whole", kinds, files)


@pytest.mark.parametrize("detector", ["ssdlite", "fcos"])
def test_two_processes_of_detectors_with_other_losses(scenes, tmp_path, capsys, detector):
    """Their losses are means over the objects of a process, so that one process makes other steps; not other scores."""
    args = arguments(scenes, tmp_path / "two", detector=detector, run__devices=2)
    finished = run(["-m", "dualtoken_vit.cli", *args])
    assert finished.returncode == 0, finished.stderr
    alone = json.loads(call(capsys, "evaluate", tmp_path / "two" / "best.safetensors", "--json")[1])
    found = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert found["images"] == alone["images"] == 5
    assert found["box"] == pytest.approx(alone["box"], abs=1e-6)
    assert found["box"]["AR100"] > 0


def test_two_processes_count_each_image_once(scenes, tmp_path, capsys):
    start = tmp_path / "start"
    assert cli.run(arguments(scenes, start)) == 0
    settings = {"optim__optimizer": "sgd", "optim__epochs": 1, "augment__hflip": 0, "optim__warmup_steps": 0}
    settings |= {"class_weights": "inverse", "optim__lr": 1e-3, "model__checkpoint": start / "best.safetensors"}
    assert cli.run(arguments(scenes, tmp_path / "begin", **settings | {"optim__lr": 1e-12})) == 0
    assert cli.run(arguments(scenes, tmp_path / "one", **settings)) == 0
    finished = run(["-m", "dualtoken_vit.cli", *arguments(scenes, tmp_path / "two", **settings, run__devices=2)])
    assert finished.returncode == 0, finished.stderr
    begin, one, two = (load_file(tmp_path / name / "best.safetensors") for name in ("begin", "one", "two"))
    step, difference = (
        torch.cat([(there[key] - here[key]).flatten().double() for key in here if "num_batches" not in key])
        for there, here in ((one, begin), (one, two))
    )
    assert difference.norm() < 1e-3 * step.norm()  # losses are means over images, as many in each process
    alone = json.loads(call(capsys, "evaluate", tmp_path / "two" / "best.safetensors", "--json")[1])
    found = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert found["images"] == alone["images"] == 5
    assert found["box"] == pytest.approx(alone["box"], abs=1e-6)
    assert found["box"]["AR100"] > 0


def test_the_backbone_of_a_classification_run(photos, scenes, tmp_path, capsys):
    network = "--model.args", "dims=(16,32,32)", "depths=(1,1,1)"
    args = ("--data.root", photos, "--data.image-size", "32", "--optim.batch-size", "12", "--optim.epochs", "1")
    more = ("--model.name", "dualtoken_vit_small", "--run.device", "cpu", "--data.workers", "0")
    assert cli.run([*map(str, ("train", "folder", *network, *args, *more, "--out", tmp_path / "classes"))]) == 0
    classes = tmp_path / "classes" / "best.safetensors"
    start = {"model__checkpoint": classes, "optim__epochs": 1, "optim__lr": 1e-12}
    capsys.readouterr()
    assert cli.run(arguments(scenes, tmp_path / "objects", **start)) == 0
    old, new = load_file(classes), load_file(tmp_path / "objects" / "best.safetensors")
    assert f"{classes}: loaded" in capsys.readouterr().out
    taken = [key for key in new if key.startswith("backbone.body.model.")]
    assert len(taken) > 100
    for key in taken:
        torch.testing.assert_close(new[key], old[key.removeprefix("backbone.body.model.")], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__train_json": ""}, "--data.train-json is missing"),
        ({"data__train_json": "nothing.json"}, "nothing.json: no such file"),
        ({"data__images": "nowhere"}, "nowhere: no such folder"),
        ({"data__image_size": 0}, "--data.image-size 0: must be at least 1"),
        ({"model__name": "resnet18"}, "--model.args dims=.16, 32, 32.: resnet18 has no such argument"),
        ({"optim__batch_size": 64}, "cannot fill one batch of 64"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(scenes, tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as error:
        cli.run(arguments(scenes, tmp_path / "run", **settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_drawing_shows_box_mask_and_name():
    masks = torch.zeros(1, 1, 100, 200, dtype=torch.bool)
    masks[..., 40:60, 50:150] = True
    objects = {"boxes": torch.tensor([[50.0, 40, 150, 60]]), "labels": torch.tensor([3]), "masks": masks}
    blank = Image.new("RGB", (200, 100))
    drawing = np.asarray(draw_objects(blank, objects, tuple("abcd")))
    assert drawing.shape == (400, 800, 3)  # enlarged, to be legible
    color = np.array(color_of(3))
    assert (drawing[160, 400] == color).all()  # the box
    np.testing.assert_allclose(drawing[200, 400], 0.45 * color, atol=1)  # the mask
    assert (drawing[350] == 0).all()
    assert len({color_of(label) for label in range(80)}) == 80
