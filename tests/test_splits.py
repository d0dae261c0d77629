"""The splits of a dataset: which are there, and that `evaluate` names a test split that it did not read."""

import json
import shutil

import pytest
from label_files import CSV, ROWS
from mask_files import data as mask_data
from PIL import Image

from dualtoken_vit import cli
from dualtoken_vit.data import classification, detection, multilabel, segmentation
from dualtoken_vit.data.contract import unread_test_split
from dualtoken_vit.evaluation import evaluate
from dualtoken_vit.recipes import ClassificationData, DetectionData, MultiLabelData


def test_evaluate_names_the_test_split(trained, tmp_path, capsys):
    """On stdout after the figures, unless they are those of a split that was asked for."""
    photos, run = trained
    root = shutil.copytree(photos, tmp_path / "photos")
    (root / "test" / "unlabelled").mkdir(parents=True)  # no classes, as in Tiny-ImageNet
    command = ["evaluate", str(run / "best.safetensors"), "--data.root", str(root), "--device", "cpu"]
    hint = "evaluated on validation images; the test split: --data.split test"

    def printed(*args):
        assert cli.run([*command, *args]) == 0
        return capsys.readouterr().out

    assert "--data.split" not in printed()
    (root / "test" / "unlabelled").rmdir()
    shutil.copytree(root / "val", root / "test", dirs_exist_ok=True)
    assert printed().splitlines()[-1] == hint
    assert "--data.split" not in printed("--data.split", "test")
    assert json.loads(printed("--json"))["images"] == 18
    assert evaluate(run / "best.safetensors", data={"root": str(root)}, device="cpu").notes == (hint,)


def held(data, images):
    return unread_test_split(data, images.splits)


def test_of_tables(tmp_path):
    rows = [f"{split}/{number}.png,{name}" for split in "ab" for number, name in enumerate(("cat", "dog"))]
    for row in rows:
        path = tmp_path / row.partition(",")[0]
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    for split, first in (("train", 0), ("val", 2)):
        (tmp_path / f"{split}.csv").write_text("\n".join(["file,label", *rows[first : first + 2]]))
    (tmp_path / "test.csv").write_text("file\nb/0.png\n")  # without labels, as in a competition
    one, several = ClassificationData(root=str(tmp_path)), MultiLabelData(root=str(tmp_path))

    def found():
        yield held(one, classification.build_val_dataset(one, 3))
        yield held(several, multilabel.build_val_dataset(several, 3, ("cat", "dog")))

    assert [*found()] == [None, None]
    (tmp_path / "test.csv").write_text("\n".join(["file,label", rows[3]]))
    assert [*found()] == ["test", "test"]


@pytest.mark.parametrize("kind", ["yolo-roboflow", "coco-roboflow", "voc-roboflow", "csv-roboflow", "labelme-splits"])
def test_of_label_formats(export, kind):
    """Roboflow's data.yaml names a test split, whether there is one or not."""
    root = export(kind)
    validated, tested = (DetectionData(root=str(root), val_split=split) for split in ("val", "test"))
    assert held(validated, detection.build_val_dataset(validated, False, 3, ("cat", "dog"))) is None
    (source,) = (path for path in root.iterdir() if path.name in ("val", "valid"))
    shutil.copytree(source, root / "test")
    assert held(validated, detection.build_val_dataset(validated, False, 3, ("cat", "dog"))) == "test"
    assert held(tested, detection.build_val_dataset(tested, False, 3, ("cat", "dog"))) is None


@pytest.mark.parametrize("spoil", [lambda coco: {**coco, "annotations": []}, lambda coco: {"images": coco["images"]}])
def test_of_coco_without_annotations(export, spoil):
    """As in a competition."""
    root = export("coco-roboflow")
    data = DetectionData(root=str(root))
    path = shutil.copytree(root / "valid", root / "test") / "_annotations.coco.json"
    full = json.loads(path.read_text())
    for content, expected in (("", None), (json.dumps(spoil(full)), None), (json.dumps(full, indent=1), "test")):
        path.write_text(content)
        assert held(data, detection.build_val_dataset(data, False, 3, ("cat", "dog"))) == expected


def test_of_yolo_without_labels(export):
    root = export("yolo-roboflow")
    data = DetectionData(root=str(root))
    shutil.copytree(root / "valid/images", root / "test/images")
    assert held(data, detection.build_val_dataset(data, False, 3, ("cat", "dog"))) is None
    shutil.copytree(root / "valid/labels", root / "test/labels")
    assert held(data, detection.build_val_dataset(data, False, 3, ("cat", "dog"))) == "test"


def test_of_a_table_of_objects_without_boxes(export):
    root = export("csv-roboflow")
    data = DetectionData(root=str(root))
    shutil.copytree(root / "valid", root / "test")
    (table,) = (root / "test").glob("*.csv")
    for content, expected in (("filename\na.png\n", None), (CSV + ROWS, "test")):
        table.write_text(content)
        assert held(data, detection.build_val_dataset(data, False, 3, ("cat", "dog"))) == expected


def test_of_masks(tree):
    data = mask_data(tree)
    shutil.copytree(tree / "images/val", tree / "images/testing")  # without masks: not a split
    assert held(data, segmentation.build_dataset(data, "val", 3)) is None
    shutil.copytree(tree / "annotations/val", tree / "annotations/testing")
    assert held(data, segmentation.build_dataset(data, "val", 3)) == "testing"
    assert held(data, segmentation.build_dataset(data, "train", 3)) == "testing"
