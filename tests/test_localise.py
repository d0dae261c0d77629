"""Localisation against loops over the positions, on maps with known results, and the command."""

import json
import shutil
from dataclasses import replace

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
from dualtoken_vit.data.detection import DetectionDataset, draw_scenes, save_scenes
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.layers import resize_grid
from dualtoken_vit.paper import localise as localise_module
from dualtoken_vit.paper.attention import blocks_of
from dualtoken_vit.paper.localise import Score, draw, gathered, measure, places_of


def pixels_of(size, stride):
    """The pixels along a side in each cell of a stride."""
    return [range(start, min(start + stride, size)) for start in range(0, size, stride)]


def by_hand(attended, cover, stride):
    """The same with loops over tokens, positions and pixels; `attended` is over the positions of X_ga."""
    sides = [(pixels_of(side, stride), pixels_of(side, 32)) for side in cover.shape]
    token, place = (
        np.array([[cover[np.ix_(rows, columns)].mean() for columns in sides[1][k]] for rows in sides[0][k]])
        for k in (0, 1)
    )
    on, highest, own = [], [], []
    for row, column in np.ndindex(token.shape):
        if token[row, column] < min(0.5, token.max()):
            continue
        seen = attended[row, column]
        on.append((seen * place).sum())
        best = np.unravel_index(seen.argmax(), seen.shape)
        highest.append(place[best])
        away = [
            abs(np.mean(sides[axis][0][at]) - np.array([np.mean(pixels) for pixels in sides[axis][1]]))
            for axis, at in ((0, row), (1, column))
        ]
        distance = np.hypot(away[0][:, None], away[1])
        own.append(distance[best] <= distance.min() + 1e-3)
    return np.mean(on), place.mean(), np.mean(highest), np.mean(own)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("size", "stride"), [((224, 224), 16), ((150, 112), 16), ((70, 97), 8), ((112, 112), 32)])
def test_against_loops(size, stride, small):
    rng = np.random.default_rng(0)
    tokens, places = ([-(-side // step) for side in size] for step in (stride, 32))
    attended = rng.dirichlet(np.full(np.prod(places), 0.2), tokens).reshape(*tokens, *places)
    cover = np.zeros(size)
    if small:
        cover[33, 37:39] = 1  # covers much less than half of a cell
    else:
        cover[13:51, 20:67] = 1
    found = places_of(torch.from_numpy(attended), torch.from_numpy(cover))
    expected = by_hand(attended, cover, stride)
    np.testing.assert_allclose([found.on_object, found.chance, found.highest, found.own], expected, atol=1e-9)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [(4, 3), (25, 40)], ids=str)
def test_conversion_of_maps_to_positions_of_x_ga(grid, antialias):
    """Attending to the global tokens, or to X_ga by the converted map, reads the same values."""
    torch.manual_seed(0)
    x_ga = torch.randn(1, *grid, 5, dtype=torch.float64)
    tokens = resize_grid(x_ga, 7, antialias).flatten(1, 2)[0]  # (49, 5)
    attended = torch.rand(2, 6, 7, 7, dtype=torch.float64).flatten(2).softmax(-1).unflatten(2, (7, 7))
    over_places = gathered(attended, grid, antialias)
    assert over_places.shape == (2, 6, *grid)
    read = over_places.flatten(2) @ x_ga.flatten(1, 2)[0]
    torch.testing.assert_close(read, attended.flatten(2) @ tokens)
    assert gathered(attended, (7, 7)) is attended


def test_known_maps():
    cover = torch.zeros(224, 224)
    cover[:96, :] = 1  # three of seven rows
    even = torch.full((7, 7, 7, 7), 1 / 49)
    found = places_of(even, cover)
    assert found.on_object == pytest.approx(3 / 7)
    assert found.chance == pytest.approx(3 / 7)
    itself = torch.eye(49).reshape(7, 7, 7, 7)
    found = places_of(itself, cover)
    assert (found.on_object, found.highest, found.own) == (1, 1, 1)
    opposite = itself.flip(2)
    found = places_of(opposite, cover)
    assert (found.on_object, found.highest, found.own) == (0, 0, 0)


@pytest.mark.parametrize("tokens", ["position", "normal"])
def test_measure_is_the_mean_over_images_of_the_mean_over_objects(tokens):
    model = create(num_classes=6, global_tokens=tokens)
    for block in blocks_of(model).values():  # maps far from uniform
        with torch.no_grad():
            block.broadcast_attn.q.weight.mul_(20)
    images = DetectionDataset(draw_scenes("val", 112, 6), masks=True)
    images.transform = v2.ToDtype(torch.float32, scale=True)
    scores = measure(model, images)
    assert [score.block for score in scores] == [f"stages.{stage}.blocks.0" for stage in range(3)]
    for score in scores:
        means, controls, before = [], [], None
        for x, target in map(images.__getitem__, range(6)):
            if not len(target["masks"]):
                continue
            attended = record(model, x[None])[score.block][0]
            stride = {14: 8, 7: 16, 4: 32}[len(attended)]
            over_places = gathered(attended, (4, 4)).double().numpy()
            found = [by_hand(over_places, mask.double().numpy(), stride) for mask in target["masks"]]
            means.append(np.mean(found, 0))
            if before is not None:
                controls.append(np.mean([by_hand(over_places, mask, stride)[0] for mask in before]))
            before = target["masks"].double().numpy()
        assert score.images == len(means) > 3
        expected = np.mean(means, 0)
        np.testing.assert_allclose((score.on_object, score.chance, score.highest, score.own), expected, atol=1e-5)
        gains = [one[0] - one[1] for one in means]
        assert score.error == pytest.approx(np.std(gains, ddof=1) / len(gains) ** 0.5, rel=1e-3)
        assert score.own_chance == 1 / 16
        assert score.control == pytest.approx(np.mean(controls), abs=1e-5)
        differences = np.array(means)[1:, 0] - controls
        assert score.control_error == pytest.approx(np.std(differences, ddof=1) / len(differences) ** 0.5, rel=1e-3)
    assert max(abs(score.lift - 1) for score in scores) > 0.005  # otherwise all maps are uniform


def test_objects_of_the_predicted_class_alone():
    """With a network that always predicts its last class, whose name varies."""
    images = DetectionDataset(draw_scenes("val", 64, 6), masks=True)
    images.transform = v2.ToDtype(torch.float32, scale=True)
    model = create(num_classes=len(images.class_names))
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.arange(float(len(images.class_names)))  # always predicts the last class
    labels = [[int(label) for label in target["labels"]] for _, target in map(images.__getitem__, range(6))]
    for wanted in sorted({label for one in labels for label in one})[:2]:
        names = [name for name in images.class_names if name != images.class_names[wanted]]
        names.append(images.class_names[wanted])
        score = measure(model, images, correct=names)[0]
        assert score.objects == sum(one.count(wanted) for one in labels)
        assert score.images == sum(wanted in one for one in labels)
    with pytest.raises(InputError, match="no objects of the predicted class"):
        measure(model, images, correct=[f"other {name}" for name in images.class_names])


def test_the_control_resizes_the_objects_of_another_size():
    """Images of 64x64 and 128x64 pixels, and the same object in relative terms: the control is the own value."""
    images = DetectionDataset(draw_scenes("val", 64, 2), masks=True)
    sizes = iter([(64, 64), (128, 64)])

    def transform(image, target):
        height, width = next(sizes)
        masks = torch.zeros(1, height, width, dtype=torch.bool)
        masks[:, : height // 2, :32] = True
        return torch.rand(3, height, width), target | {"masks": masks, "labels": torch.tensor([0])}

    images.transform = transform
    model = create()
    for block in blocks_of(model).values():
        torch.nn.init.zeros_(block.broadcast_attn.q.weight)
        torch.nn.init.zeros_(block.broadcast_attn.q.bias)
    for score in measure(model, images):
        assert score.control == pytest.approx(0.25, abs=1e-5)
        assert score.control_error is None


def test_measure_converts_maps_as_the_network_resizes():
    """At 512 pixels X_ga is 16x16 and resized to 7x7, with or without antialiasing; the maps themselves are equal."""
    images = DetectionDataset(draw_scenes("val", 512, 2), masks=True)
    images.transform = v2.ToDtype(torch.float32, scale=True)
    shares = {}
    for resize in ("bilinear", "antialias"):
        model = create(grid_resize=resize)
        for block in blocks_of(model).values():  # uniform attention to the global tokens
            torch.nn.init.zeros_(block.broadcast_attn.q.weight)
            torch.nn.init.zeros_(block.broadcast_attn.q.bias)
        shares[resize] = [score.on_object for score in measure(model, images)]
        expected = []
        for _, target in map(images.__getitem__, range(2)):
            positions = torch.full((1, 1, 7, 7), 1 / 49, dtype=torch.float64)
            share = gathered(positions, (16, 16), resize == "antialias")[0, 0].numpy()
            covers = [mask.double().numpy() for mask in target["masks"]]
            cells = [np.array_split(np.arange(512), 16)] * 2
            cover = [[[c[np.ix_(y, x)].mean() for x in cells[1]] for y in cells[0]] for c in covers]
            expected.append(np.mean([(share * np.array(each)).sum() for each in cover]))
        np.testing.assert_allclose(shares[resize], np.mean(expected), atol=1e-5)
    assert abs(shares["antialias"][0] - shares["bilinear"][0]) > 1e-3


@pytest.mark.parametrize("name", ["_run", "run", "$x$"])
def test_legend_has_every_network(name):
    score = Score(0.5, 0.4, 0.3, 0.2, name, "stages.0.blocks.0", 1, 1, 0.1, 0.1, 0.4, 0.1)
    legend = draw([score, replace(score, checkpoint="other")]).axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [name, "other"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("dualtoken_vit_tiny", num_classes=len(NAMES), depths=(1, 1, 1))
    return save(tmp_path_factory.mktemp("run") / "best.safetensors", model, depths=(1, 1, 1))


def run(*args):
    return cli.run(["localise", *map(str, args), "--device", "cpu"])


def test_command(checkpoint, tmp_path, capsys):
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
    assert run(checkpoint, *files, "--image-size", 64, "--limit", 1, "--json") == 0
    score = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["scores"][0]
    assert score["error"] is score["control"] is score["control_error"] is None
    assert run(checkpoint, *files, "--image-size", 64, "--limit", 1) == 0
    assert "nan" not in capsys.readouterr().out
    assert [score["block"] for score in masks["scores"]] == [f"stages.{i}.blocks.0" for i in range(3)]
    for mask, box in zip(masks["scores"], boxes["scores"], strict=True):
        assert mask["lift"] == mask["on_object"] / mask["chance"]
        assert mask["chance"] < box["chance"]  # a box contains its mask
        assert mask["objects"] == box["objects"] > 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert run(checkpoint, "--limit", 3) == 0  # drawn scenes
    assert "stages.2.blocks.0" in capsys.readouterr().out


def test_the_objects_are_counted_for_each_network(tmp_path, capsys):
    """With `--correct`, for networks that always predict the first or the second class."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(4)]
    labels = [(0, 1), (1, 1), (2, 1), (2, 1), (3, 2)]  # image, category
    objects = [
        {"id": i, "image_id": image, "category_id": category, "bbox": [9, 9, 40, 40], "area": 1600, "iscrowd": 0}
        for i, (image, category) in enumerate(labels)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES[:2], 1)]
    annotations = tmp_path / "val.json"
    annotations.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    for image in images:
        Image.new("RGB", (64, 64)).save(tmp_path / image["file_name"])
    paths = []
    for predicted in range(2):
        model = timm.create_model("dualtoken_vit_tiny", num_classes=len(NAMES), depths=(1, 1, 1))
        torch.nn.init.zeros_(model.head.weight)
        model.head.bias.data = 1.0 * (torch.arange(len(NAMES)) == predicted)
        (tmp_path / NAMES[predicted]).mkdir()
        paths.append(save(tmp_path / NAMES[predicted] / "best.safetensors", model, depths=(1, 1, 1)))
    assert run(*paths, "--images", tmp_path, "--annotations", annotations, "--correct") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{paths[0].parent}: 4 objects in 3 of 4 images" in lines
    assert f"{paths[1].parent}: 1 object in 1 of 4 images" in lines


def test_mistakes(checkpoint, tmp_path):
    for args, message in (
        ((checkpoint, "--images", tmp_path), "--images DIR and --annotations FILE go together"),
        ((), "no checkpoint given"),
        ((checkpoint, "--image-size", "-5"), "--image-size -5: must be at least 1"),
        ((checkpoint, "--limit", "0"), "--limit 0: must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            run(*args)
    other = save(tmp_path / "best.safetensors", timm.create_model("lightvit_tiny", num_classes=len(NAMES)))
    with pytest.raises(InputError, match=r"best\.safetensors: the network has no Dual Token Blocks"):
        run(other)
    (tmp_path / "none.json").write_text(
        '{"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}], "categories": [{"id": 1, "name": "a"}],'
        '"annotations": []}'
    )
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"none\.json: no objects"):
        run(checkpoint, "--images", tmp_path, "--annotations", tmp_path / "none.json")


def test_what_was_measured_before_an_error_is_printed(checkpoint, tmp_path, monkeypatch, capsys):
    """The scores of the first network, where the second is interrupted."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal for rich, which redirects stdout while a bar is shown
    other = shutil.copy(checkpoint, tmp_path / "other.safetensors")
    left = [gathered] * 6  # two images, three blocks

    def cut(*args):
        if not left:
            raise KeyboardInterrupt
        return left.pop()(*args)

    monkeypatch.setattr(localise_module, "gathered", cut)
    with pytest.raises(KeyboardInterrupt):
        localise_module.localise((checkpoint, other), limit=2, device="cpu", json=True)
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [one["checkpoint"] for one in scores] == [str(checkpoint.parent)] * 3
