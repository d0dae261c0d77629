"""Attention maps against timm's extraction, key tokens against brute force, and the command."""

import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import create
from PIL import Image
from test_predict import NAMES, save, solid
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract

from dualtoken_vit import cli, load_predictor
from dualtoken_vit.checkpoint import store_preprocessing
from dualtoken_vit.errors import InputError
from dualtoken_vit.paper import attention as attention_module
from dualtoken_vit.paper.attention import (
    Seen,
    blocks_of,
    draw_blocks,
    draw_key_tokens,
    draw_maps,
    gradient_importance,
    highest,
    recording,
    replacement_importance,
)


@pytest.fixture
def unfused():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def record(model, x):
    with torch.inference_mode(), recording(model) as maps:
        model(x)
    return maps


@pytest.mark.parametrize("size", [(224, 224), (97, 160)], ids=str)
def test_maps_are_those_of_timm_fused_or_not(unfused, size):
    x = torch.randn(2, 3, *size)
    plain = create()
    theirs = AttentionExtract(plain, method="hook")(x)
    set_fused_attn(True)
    fused = create()
    assert fused.stages[0].blocks[0].broadcast_attn.fused_attn
    assert not plain.stages[0].blocks[0].broadcast_attn.fused_attn
    before = fused(x)
    for model in (plain, fused):
        maps = record(model, x)
        assert [*maps] == [f"stages.{stage}.blocks.0" for stage in range(3)]
        for name, found in maps.items():
            expected = theirs[f"{name}.broadcast_attn.attn_drop"].mean(1)
            torch.testing.assert_close(found.flatten(1, 2).flatten(2), expected)
    heights = [-(-size[0] // stride) for stride in (8, 16, 32)]
    assert [found.shape[1] for found in maps.values()] == heights
    # afterwards the network is unchanged
    assert fused.stages[0].blocks[0].broadcast_attn.fused_attn
    torch.testing.assert_close(fused(x), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in fused.modules())


@pytest.mark.parametrize("tokens", ["normal", "normal_star"])
def test_maps_of_normal_tokens_are_over_the_positions_that_they_aggregate(unfused, tokens):
    x, model = torch.randn(2, 3, 224, 224), create(global_tokens=tokens)
    theirs = AttentionExtract(model, method="hook")(x)
    for name, found in record(model, x).items():
        broadcast, gathered = (
            theirs[f"{name}.{key}.attn_drop"].detach().double().mean(1) for key in ("broadcast_attn", "fusion")
        )
        expected = np.einsum("bnm,bmp->bnp", broadcast.numpy(), gathered.numpy())
        np.testing.assert_allclose(found.flatten(1, 2).flatten(2).numpy(), expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.sum((3, 4)).numpy(), 1, rtol=1e-5)


@pytest.mark.parametrize("args", [{"token_grid": 5}, {"token_grid": 0}], ids=str)
def test_the_grid_of_the_map_is_that_of_the_tokens(args):
    maps = record(create(**args), torch.randn(1, 3, 128, 96))
    grid = (5, 5) if args["token_grid"] else (4, 3)  # without global tokens, the grid of X_ga
    assert {found.shape[3:] for found in maps.values()} == {grid}


def moved(model, block, x, row, column, share):
    """The log-probabilities after moving one token by a share of the way to the mean token of its image."""

    def move(module, args):
        tokens, g = args
        tokens = tokens.clone()
        tokens[:, row, column] += share * (tokens.mean((1, 2)) - tokens[:, row, column])
        return tokens, g

    with torch.no_grad(), block.register_forward_pre_hook(move):
        return model(x).log_softmax(-1)


@pytest.mark.parametrize("index", [0, 2])
def test_token_importance(index):
    """Replacing single tokens, and moving them by a small step, which the gradient predicts."""
    model = create().double()
    x = torch.randn(2, 3, 96, 128, dtype=torch.double)
    block = list(blocks_of(model).values())[index]
    estimated, measured = gradient_importance(model, block, x), replacement_importance(model, block, x)
    assert estimated.shape == measured.shape == ((2, 12, 16) if index == 0 else (2, 3, 4))
    with torch.no_grad():
        before, best = model(x).log_softmax(-1).max(-1)
    for row, column in ((0, 0), (1, 3), (2, 1)):
        for share, found in ((1, measured), (1e-6, estimated)):
            after = moved(model, block, x, row, column, share).gather(1, best[:, None])[:, 0]
            torch.testing.assert_close(found[:, row, column], (before - after) / share, rtol=1e-3, atol=1e-6)
    assert not block._forward_pre_hooks


def test_highest():
    assert highest(np.array([[0.1, 0.5], [0.4, 0.2]]), 2).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("draw", [draw_key_tokens, draw_maps, lambda seen: draw_blocks(seen[0])])
def test_all_maps_of_a_figure_have_one_colour_scale(draw):
    rng = np.random.default_rng(0)
    maps = [rng.random((3, 3, 7, 7)) * scale for scale in (1, 0.1, 0.01)]
    seen = [Seen(rng.random((9, 9, 3)), "ant 50%", (1, 2), each, dict(zip("abc", maps, strict=True))) for each in maps]
    figure = draw(seen)
    shown = [image for axes in figure.axes for image in axes.images if image.get_array().ndim == 2]
    heat = [image for image in shown if image.get_cmap().name != "Reds"]  # marks, not attention
    (scale,) = {image.get_clim() for image in heat}
    if draw is draw_key_tokens:
        expected = np.array([each[1, 2] for each in maps])
    elif draw is draw_maps:
        expected = np.array(maps)
    else:
        expected = np.array([each.mean((0, 1)) for each in maps])
    assert scale == (expected.min(), expected.max())
    assert len(heat) == (6 if draw is draw_maps else 3)
    (bar,) = (axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    assert bar.get_ylim() == pytest.approx(scale)


@pytest.mark.parametrize(("size", "token", "box"), [((112, 112), (1, 2), (64, 32)), ((96, 80), (2, 2), (64, 64))])
def test_the_key_token_is_boxed_where_it_is(size, token, box):
    """Tokens of 32 pixels, of which the last may reach beyond the image."""
    height, width = size
    map = np.zeros((math.ceil(height / 32), math.ceil(width / 32), 7, 7))
    figure = draw_key_tokens([Seen(np.zeros((*size, 3)), "ant", token, map, {})])
    axes = figure.axes[0]
    left, right, bottom, top = axes.images[0].get_extent()
    (patch,) = axes.patches
    x, y = (patch.get_x() - left) * width / (right - left), (patch.get_y() - top) * height / (bottom - top)
    assert (x, y) == pytest.approx(box)
    assert patch.get_width() * width / (right - left) == pytest.approx(32)


def test_images_left_out_of_the_figures_are_counted(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dualtoken_vit.paper.attention.ROWS", 2)
    for name in "abc":
        solid(tmp_path / f"{name}.png")
    args = (checkpoint, "--image-size", "32", "--token", "0,0", "--out", tmp_path / "out")
    assert run(*args, *(tmp_path / f"{name}.png" for name in "ab")) == 0
    assert "figure-1.png" not in capsys.readouterr().err
    assert run(*args, *(tmp_path / f"{name}.png" for name in "abc")) == 0
    err = capsys.readouterr().err
    assert "figure-1.png and figure-4.png show the first 2 of 3 images\n" in err
    assert "older" not in err
    assert run(*args, tmp_path / "a.png") == 0
    line = f"{tmp_path / 'out'} has older files, which this run did not write: 8, for example b.png.key.png\n"
    assert line in capsys.readouterr().err  # three of each other image, and the two figures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("dualtoken_vit_tiny", num_classes=len(NAMES), depths=(1, 1, 1))
    torch.nn.init.normal_(model.head.weight, std=1.0)
    return save(tmp_path_factory.mktemp("checkpoint") / "best.safetensors", model, depths=(1, 1, 1))


def run(*args):
    return cli.run(["attention", *map(str, args), "--device", "cpu"])


def test_command(checkpoint, tmp_path, capsys):
    for name in ("a.png", "ü b.png"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    out = tmp_path / "out"
    args = (checkpoint, tmp_path, "--out", out, "--image-size", "96", "--every-block", "--json")
    assert run(*args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "attention.json").read_text())
    assert printed["block"] == "stages.2.blocks.0"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*") if path.is_file()}
    ends = ("key.png", "maps.png", "blocks.png", "npy", *(f"stages.{i}.blocks.0.npy" for i in range(3)))
    folder = tmp_path.name
    assert names == {"attention.json", "figure-1.png", "figure-4.png"} | {
        f"{folder}/{name}.{end}" for name in ("a.png", "ü b.png") for end in ends
    }
    assert np.load(out / folder / "a.png.npy").shape == (3, 3, 7, 7)
    assert np.load(out / folder / "a.png.stages.0.blocks.0.npy").shape == (12, 12, 7, 7)
    with Image.open(out / folder / "a.png.key.png") as key:
        red = (np.asarray(key.convert("RGB")) == (255, 0, 0)).all(-1)
    assert red.any()  # the key token's box
    for one in printed["images"]:
        assert one["class"] in NAMES
        assert -1 <= one["agreement"] <= 1
        assert all(0 <= place < 3 for place in (*one["token"], *one["gradient_token"]))
    assert run(*args) == 0  # the output folder can be reused
    (tmp_path / "c.png").write_bytes(b"no image")
    capsys.readouterr()
    assert run(checkpoint, tmp_path / "a.png", tmp_path / "c.png", "--out", tmp_path / "two") == 1
    assert "c.png: cannot be read" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"^\S*c\.png: "):
        run(checkpoint, tmp_path / "c.png", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert run(checkpoint, tmp_path / "a.png", "--out", tmp_path / "one", "--block", "0", "--token", "2,3") == 0
    assert "2, 3" in capsys.readouterr().out
    assert np.load(tmp_path / "one" / "a.png.npy").shape == (4, 4, 7, 7)  # 32 pixels at stride 8


def test_wordnet_ids_are_described_as_in_predict(checkpoint, tmp_path, capsys):
    words = [f"{name}, described" for name in NAMES]
    store_preprocessing(copy := shutil.copy(checkpoint, tmp_path), label_descriptions=words)
    solid(tmp_path / "a.png")
    assert run(copy, tmp_path / "a.png", "--out", tmp_path / "out", "--json") == 0
    (one,) = json.loads(capsys.readouterr().out)["images"]
    assert one["class"] == load_predictor(copy)(tmp_path / "a.png").name
    assert one["class"] in words


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--block", "3"), "--block 3: the network has blocks 0 to 2"),
        (("--token", "7"), "--token 7: must be ROW,COL"),
        (("--token", "1,0"), r"--token 1,0: stages.2.blocks.0 has 1x1 image tokens"),
        (("nothing.png",), "nothing.png: no such file"),
    ],
)
def test_mistakes(checkpoint, tmp_path, more, message):
    solid(tmp_path / "a.png")
    with pytest.raises(InputError, match=message):
        run(checkpoint, tmp_path / "a.png", *more, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_networks_are_rejected(tmp_path):
    solid(tmp_path / "a.png")
    other = save(tmp_path / "best.safetensors", timm.create_model("resnet18", num_classes=len(NAMES)))
    with pytest.raises(InputError, match="no Dual Token Blocks"):
        run(other, tmp_path / "a.png", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_examined_before_an_error_is_kept(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal for rich, which redirects stdout while a bar is shown
    images = [solid(tmp_path / f"{name}.png") for name in "abc"]
    out, examine = tmp_path / "maps", attention_module._examine
    left = iter((examine, examine))

    def cut(*args):
        for one in left:
            return one(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(attention_module, "_examine", cut)
    with pytest.raises(KeyboardInterrupt):
        attention_module.attention(checkpoint, tuple(images), out=out)
    record = json.loads((out / "attention.json").read_text())
    assert [one["image"] for one in record["images"]] == [str(path) for path in images[:2]]
    printed = capsys.readouterr().out
    assert str(images[1]) in printed
    assert str(images[2]) not in printed

    complete = (out / "attention.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):  # before any image
        attention_module.attention(checkpoint, tuple(images), out=out)
    assert (out / "attention.json").read_bytes() == complete
