"""Attention judged by objects: against loops over the places, on maps whose answer is known, and as a command."""

import json

import numpy as np
import pytest
import timm
import torch
from helpers import create
from PIL import Image
from test_attention import record
from test_predict import NAMES, save
from torchvision.transforms import v2

from dualtoken_vit import cli
from dualtoken_vit.data.coco import ShapeScenes, save_scenes
from dualtoken_vit.errors import InputError
from dualtoken_vit.localise import measure, places_of


def by_hand(attended, cover):
    """The same by loops, for maps and pictures whose sides divide."""
    (H, W, h, w), (Y, X) = attended.shape, cover.shape
    token = cover.reshape(H, Y // H, W, X // W).mean((1, 3))
    place = cover.reshape(h, Y // h, w, X // w).mean((1, 3))
    on, highest, own = [], [], []
    for row in range(H):
        for column in range(W):
            if token[row, column] < min(0.5, token.max()):
                continue
            seen = attended[row, column]
            on.append((seen * place).sum())
            best = np.unravel_index(seen.argmax(), seen.shape)
            highest.append(place[best])
            own.append(best == (int((row + 0.5) / H * h), int((column + 0.5) / W * w)))
    return np.mean(on), place.mean(), np.mean(highest), np.mean(own)


@pytest.mark.parametrize("small", [False, True])
def test_against_loops(small):
    rng = np.random.default_rng(0)
    attended = rng.dirichlet(np.ones(6), (8, 4)).reshape(8, 4, 2, 3)
    cover = np.zeros((16, 24))
    if small:
        cover[5, 7:9] = 1  # a sixth of one token's cell
    else:
        cover[3:11, 4:17] = 1
    found = places_of(torch.from_numpy(attended), torch.from_numpy(cover))
    expected = by_hand(attended, cover)
    np.testing.assert_allclose([found.on_object, found.chance, found.highest, found.own], expected)


def test_known_maps():
    cover = torch.zeros(14, 14)
    cover[:7, :] = 1  # the upper half
    even = torch.full((7, 7, 7, 7), 1 / 49)
    found = places_of(even, cover)
    assert found.on_object == pytest.approx(0.5)
    assert found.chance == pytest.approx(0.5)
    itself = torch.eye(49).reshape(7, 7, 7, 7)
    cover[6, :] = 0  # whole cells only
    found = places_of(itself, cover)
    assert (found.on_object, found.highest, found.own) == (1, 1, 1)
    opposite = itself.flip(2)
    found = places_of(opposite, cover)
    assert (found.on_object, found.highest) == (0, 0)


def test_measure_is_the_mean_over_the_objects():
    model = create(num_classes=6)
    pictures = ShapeScenes("val", 64, count=5)
    pictures.transform = v2.ToDtype(torch.float32, scale=True)
    scores = measure(model, pictures)
    assert [score.block for score in scores] == [f"stages.{stage}.blocks.0" for stage in range(3)]
    for score in scores:
        places = []
        for x, target in map(pictures.__getitem__, range(5)):
            attended = record(model, x[None])[score.block][0]
            places += [places_of(attended, mask.float()) for mask in target["masks"]]
        assert score.objects == len(places) > 3
        for key in ("on_object", "chance", "highest", "own"):
            assert getattr(score, key) == pytest.approx(np.mean([getattr(place, key) for place in places]), abs=1e-6)
        gains = [place.on_object - place.chance for place in places]
        assert score.error == pytest.approx(np.std(gains, ddof=1) / len(gains) ** 0.5, rel=1e-4)
        assert score.own_chance == 1 / 49


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("dualtoken_vit_tiny", num_classes=len(NAMES), depths=(1, 1, 1))
    return save(tmp_path_factory.mktemp("run") / "best.safetensors", model, depths=(1, 1, 1))


def run(*args):
    return cli.run(["localise", *map(str, args), "--device", "cpu"])


def test_the_command(checkpoint, tmp_path, capsys):
    save_scenes(tmp_path / "scenes", 64, train=1, val=4)
    files = (
        "--images",
        tmp_path / "scenes/images",
        "--annotations",
        tmp_path / "scenes/annotations/instances_val.json",
    )
    assert run(checkpoint, *files, "--masks", "--image-size", 64, "--json", "--plot", tmp_path / "plot.png") == 0
    masks = json.loads(capsys.readouterr().out)
    assert run(checkpoint, *files, "--image-size", 64, "--json") == 0
    boxes = json.loads(capsys.readouterr().out)
    assert masks["objects"] == boxes["objects"] > 0
    assert [score["block"] for score in masks["scores"]] == [f"stages.{i}.blocks.0" for i in range(3)]
    for mask, box in zip(masks["scores"], boxes["scores"], strict=True):
        assert mask["lift"] == mask["on_object"] / mask["chance"]
        assert mask["chance"] < box["chance"]  # a box holds its mask
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert run(checkpoint, "--limit", 3) == 0  # drawn scenes
    assert "stages.2.blocks.0" in capsys.readouterr().out


def test_mistakes(checkpoint, tmp_path):
    with pytest.raises(InputError, match="--images DIR and --annotations FILE go together"):
        run(checkpoint, "--images", tmp_path)
    other = save(tmp_path / "best.safetensors", timm.create_model("lightvit_tiny", num_classes=len(NAMES)))
    with pytest.raises(InputError, match="no Dual Token Blocks"):
        run(other)
    (tmp_path / "none.json").write_text(
        '{"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}], "categories": [{"id": 1, "name": "a"}],'
        '"annotations": []}'
    )
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"none\.json: no objects"):
        run(checkpoint, "--images", tmp_path, "--annotations", tmp_path / "none.json")
