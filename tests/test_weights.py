"""Weights that come with a package, by the example of a small model that this module registers with timm."""

import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from timm.data import ImageNetInfo
from timm.models import generate_default_cfgs, register_model

from dualtoken_vit import cli, load_model, load_predictor
from dualtoken_vit.checkpoint import license_of, own_weights, read_checkpoint, save_checkpoint
from dualtoken_vit.errors import InputError
from dualtoken_vit.hub import save_for_hub
from dualtoken_vit.models.dualtoken import DualTokenViT
from dualtoken_vit.models.two_stream import create, model_cfg
from dualtoken_vit.predictors import read_header
from dualtoken_vit.recipes import RECIPES, ClassificationInput, Model, to_dict
from dualtoken_vit.tasks.classification import data_config, label_descriptions
from dualtoken_vit.tasks.networks import choose_weights

FILE = Path(tempfile.mkdtemp(), "weights.safetensors")
NAME = "dualtoken_vit_test_weights"
ARGS = dict(dims=(16, 32, 48), depths=(1, 1, 1), num_heads=(2, 2, 2), head_hidden_size=32)
LABELS = ["n02124075", "n02099601", "n01622779"]

default_cfgs = generate_default_cfgs(
    {
        f"{NAME}.own": model_cfg(
            file=str(FILE), num_classes=3, input_size=(3, 64, 64), label_names=LABELS, license="cc-by-4.0"
        ),
        f"{NAME}.untrained*": model_cfg(),  # last, or timm makes the one with weights the default
    }
)


@register_model
def dualtoken_vit_test_weights(pretrained=False, **kwargs):
    return create(DualTokenViT, NAME, pretrained, **{**ARGS, **kwargs})


@pytest.fixture(scope="module", autouse=True)
def donor():
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3).eval()
    save_checkpoint(
        FILE,
        model.half(),
        task="classification",
        class_names=LABELS,
        preprocessing=data_config(model, ClassificationInput(image_size=64), 3) | label_descriptions(LABELS),
        recipe=to_dict(RECIPES["tin190"]),
        metrics={},
        model_args=ARGS,
    )
    yield model.float()  # rounded as the file is
    shutil.rmtree(FILE.parent)


def test_the_name_alone_loads_the_weights_and_their_cfg(donor):
    model = timm.create_model(NAME, pretrained=True).eval()
    assert model.num_classes == 3
    assert model.pretrained_cfg["label_names"] == LABELS
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 64, 64)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), donor(x), rtol=0, atol=0)
    assert timm.create_model(NAME).num_classes == 1000  # the paper's network, as without weights
    features = timm.create_model(f"{NAME}.own", pretrained=True, num_classes=7).eval()
    torch.testing.assert_close(features.forward_features(x), donor.forward_features(x), rtol=0, atol=0)
    grey = timm.create_model(NAME, pretrained=True, in_chans=1).eval()
    torch.testing.assert_close(grey(x[:, :1]), donor(x[:, :1].expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_the_name_stands_for_the_file_in_every_command(donor, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = next(photos.rglob("*.*g"))
    result = load_predictor(NAME)(image)
    assert set(result.names) == {"Egyptian cat", "golden retriever", "great grey owl, great gray owl, Strix nebulosa"}
    x = load_predictor(FILE).preprocess(Image.open(image).convert("RGB"))
    with torch.no_grad():
        expected = donor(x[None])[0].softmax(-1).sort(descending=True).values
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
    assert cli.run(["predict", NAME, str(image), "--out", "drawn"]) == 0
    assert cli.run(["export", NAME]) == 0  # into the current folder, not into the package
    assert load_predictor(f"{NAME}.onnx")(image).names == result.names
    assert read_header(f"{NAME}.onnx").class_names == tuple(LABELS)
    for file in (NAME, f"{NAME}.onnx"):  # the classes by description, by name in training and by index
        capsys.readouterr()
        assert cli.run(["predict", file, str(image), "--json"]) == 0
        classes = json.loads(capsys.readouterr().out)["predictions"][0]["classes"]
        assert [one["class"] for one in classes] == list(result.names)
        assert [one["name"] for one in classes] == [LABELS[one["index"]] for one in classes]
        assert [one["index"] for one in classes] == result.labels.tolist()
    with pytest.raises(InputError, match=re.escape(f"give a copy of {FILE}")):
        cli.run(["evaluate", NAME, "--data.root", str(photos), "--calibrate"])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Model(NAME), False),
        (Model(NAME, pretrained=True), True),
        (Model(NAME, pretrained="auto"), True),
        (Model(f"{NAME}.own", pretrained="auto"), True),
        (Model(f"{NAME}.untrained", pretrained="auto"), False),
        (Model(NAME, pretrained="auto", args=("alpha=0.2",)), False),
        (Model(NAME, pretrained="auto", checkpoint="best.safetensors"), False),
        (Model("resnet10t", pretrained="auto"), False),  # has weights, but to download
        (Model("no_such_model", pretrained="auto"), False),
    ],
)
def test_auto_is_for_weights_at_hand(model, expected):
    assert choose_weights(model) == replace(model, pretrained=expected)


def test_own_weights_by_name():
    assert own_weights(NAME) == own_weights(f"{NAME}.own") == f"{NAME}.own"
    assert own_weights("resnet10t") is None


def test_only_recipes_for_own_data_start_from_weights():
    chosen = {name for name, recipe in RECIPES.items() if recipe.model.pretrained}
    assert chosen == {"folder", "imagenette", "multilabel", "coco", "coco-lite", "masks", "masks-lite"}


@pytest.mark.parametrize(
    ("flags", "expected"), [((), True), (("--model.pretrained", "false"), False), (("--model.pretrained",), True)]
)
def test_training_starts_from_them(donor, photos, tmp_path, capsys, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    args = f"train folder --data.root {photos} --model.name {NAME} --data.image-size 64 --optim.epochs 1"
    assert cli.run([*args.split(), "--data.workers", "0", "--optim.lr", "1e-12", "--out", "run", *flags]) == 0
    assert ("starting from the weights dualtoken_vit_test_weights.own" in capsys.readouterr().out) == expected
    assert json.loads(Path("run/recipe.json").read_text())["model"]["pretrained"] is expected
    trained, about = load_model("run/best.safetensors")
    assert about.license == license_of("run/best.safetensors") == ("cc-by-4.0" if expected else None)
    for start in ("run/best.safetensors", str(FILE)):  # the licence goes on with the weights
        out = f"from-{Path(start).stem}"
        more = ["--data.workers", "0", "--model.checkpoint", start, "--out", out]
        assert cli.run([*args.split(), *more]) == 0
        assert license_of(f"{out}/best.safetensors") == ("cc-by-4.0" if expected or start == str(FILE) else None)
    same = torch.allclose(trained.token_embed, donor.token_embed, atol=1e-6)
    assert same == expected


EXCLUDED = RECIPES["tin190"].data.exclude
SHIPPED = [name for name in timm.list_pretrained("dualtoken_vit_*") if not name.startswith(NAME)]


def test_there_are_weights():
    assert SHIPPED == ["dualtoken_vit_small_mix.tin190", "dualtoken_vit_tiny_mix.tin190"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights(name, tmp_path):
    cfg = timm.get_pretrained_cfg(name)
    file = Path(cfg.file)
    about = read_checkpoint(file)
    assert about.class_names == tuple(cfg.label_names) == tuple(sorted(cfg.label_names))
    assert len(set(cfg.label_names)) == cfg.num_classes == 190
    assert not set(EXCLUDED) & set(cfg.label_names)
    info = ImageNetInfo()
    assert about.preprocessing["label_descriptions"] == [info.label_name_to_description(one) for one in cfg.label_names]
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
        stored = about.preprocessing[key]
        assert (tuple(stored) if isinstance(stored, list) else stored) == getattr(cfg, key)
    assert {value.dtype for value in about.state_dict.values() if value.is_floating_point()} == {torch.float16}
    architecture = name.partition(".")[0]
    model = timm.create_model(architecture, pretrained=True)
    assert torch.equal(model.token_embed, about.state_dict["token_embed"].float())
    assert timm.create_model(architecture).num_classes == 1000
    card = file.with_suffix(".md").read_text()
    save_for_hub(architecture, tmp_path / "hub", "me/own")
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.license == cfg.license
    assert cfg.license == "cc-by-nc-4.0"
    assert "license: cc-by-nc-4.0" in card
    assert f"{about.metrics['val_top1']:.1%}".replace("%", " %") in card
    assert not any(about.recipe["data"]["root"].startswith(start) for start in "/~")
