"""`load_predictor`: every form of input gives the result that the network's parts give by hand."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import edit
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import dualtoken_vit
from dualtoken_vit.checkpoint import read_checkpoint, save_checkpoint
from dualtoken_vit.errors import InputError
from dualtoken_vit.models.backbone import check_size
from dualtoken_vit.models.detectors import create_detector
from dualtoken_vit.models.segmenters import create_segmenter
from dualtoken_vit.predictors import load_model
from dualtoken_vit.recipes import RECIPES, to_dict
from dualtoken_vit.results import Classes, LabelMap, Objects
from dualtoken_vit.tasks import predictor as predictor_module

NAMES = ("ant", "bee", "cat")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
BACKBONE = ("dualtoken_vit_tiny", {"depths": (1, 1, 1)})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of each task, untrained but far from trivial, and its network."""
    folder, name, args = tmp_path_factory.mktemp("checkpoints"), *BACKBONE
    torch.manual_seed(0)
    sections = {"folder": {"image_size": 40}, "coco": {"image_size": 64, "max_size": 96}, "masks": {}}
    recipes = {key: replace(RECIPES[key], data=replace(RECIPES[key].data, **data)) for key, data in sections.items()}
    detector = dict(detector="mask-rcnn", image_size=64, max_size=96, mean=MEAN, std=STD)
    segmenter = dict(segmenter="pspnet", width=16)
    networks = {
        "classification": ("folder", timm.create_model(name, num_classes=3, **args), args),
        "detection": ("coco", create_detector(name=name, num_classes=3, **args, **detector), args | detector),
        "segmentation": ("masks", create_segmenter(name=name, num_classes=3, **args, **segmenter), args | segmenter),
    }
    found = {}
    for task, (recipe, model, model_args) in networks.items():
        preprocessing = dict(input_size=(3, 40, 40), mean=MEAN, std=STD, crop_pct=1.0, interpolation="bilinear")
        path = folder / f"{task}.safetensors"
        save_checkpoint(
            path,
            model,
            task=task,
            class_names=NAMES,
            preprocessing=preprocessing,
            recipe=to_dict(recipes[recipe]),
            metrics={},
            model_args=model_args,
            category_ids=(1, 2, 3) if task == "detection" else (),
        )
        found[task] = path, model.eval()
    return found


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(1).integers(0, 256, (48, 80, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def same(one, other) -> None:
    assert type(one) is type(other)
    for key, value in vars(one).items():
        if isinstance(value, np.ndarray) and value.dtype == bool:  # masks: sums may round to either side of 0.5
            assert (value != getattr(other, key)).mean() < 1e-4
        elif isinstance(value, np.ndarray):
            np.testing.assert_allclose(value, getattr(other, key), atol=1e-4)
        else:
            assert value == getattr(other, key)


def test_the_long_side_is_limited_also_below_the_short_one(files):
    predictor = dualtoken_vit.load_predictor(files["detection"][0], "cpu", image_size=96, max_size=48)
    sizes = []
    with predictor.model.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[2:])):
        predictor(Image.new("RGB", (200, 150)))
    assert sizes == [(64, 64)]  # 48x36, in multiples of 32


def test_a_file_that_does_not_say_how_images_are_cropped(files, image, tmp_path):
    """As of another program: `crop_pct` and `interpolation` are optional. Those of its recipe are taken."""
    path, _ = files["classification"]
    stored = read_checkpoint(path)
    preprocessing = {key: stored.preprocessing[key] for key in ("input_size", "mean", "std")}
    about = {key: getattr(stored, key) for key in ("task", "class_names", "recipe", "metrics", "model_args")}
    about["recipe"]["data"] |= {"crop_pct": 1.0, "interpolation": "bilinear"}
    save_checkpoint(tmp_path / "x.safetensors", load_model(path)[0], preprocessing=preprocessing, **about)
    expected = dualtoken_vit.load_predictor(path, "cpu")(image)
    same(dualtoken_vit.load_predictor(tmp_path / "x.safetensors", "cpu")(image), expected)


def test_sizes_are_tried_where_the_network_is():
    """On an accelerator; "meta" needs no such device."""
    model = timm.create_model("test_vit", num_classes=0, device="meta")
    with pytest.raises(InputError, match=r"--data\.image-size 40 is not a size that test_vit takes: Input"):
        check_size(model, 3, 40)
    check_size(model, 3, 160)


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_every_form_of_input(files, image, tmp_path, capsys, task):
    options = {"score": 0.0} if task == "detection" else {}
    predictor = dualtoken_vit.load_predictor(files[task][0], "cpu", **options)
    assert predictor.class_names == NAMES
    folder = tmp_path / "images" / "below"
    folder.mkdir(parents=True)
    image.save(folder / "a.png")
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = predictor(image)
    for form in (folder / "a.png", str(folder / "a.png"), pixels, pixels / 255.0, tensor, tensor / 255):
        same(predictor(form), expected)
    for several in (folder.parent, [folder], [image], tensor[None], (folder / "a.png",)):
        results = predictor(several)
        assert len(results) == 1
        same(results[0], expected)
    results = predictor([image, folder.parent, [pixels, tensor]], batch_size=3)
    assert len(results) == 4
    for result in results:
        same(result, expected)
    by_hand = predictor.postprocess(predictor.forward(predictor.collate([predictor.preprocess(image)])))
    same(by_hand[0], expected)
    assert predictor([]) == []
    assert capsys.readouterr() == ("", "")


@torch.no_grad()
def test_a_classifier_against_timm(files, image):
    path, model = files["classification"]
    transform = timm.data.create_transform(40, mean=MEAN, std=STD, crop_pct=1.0, interpolation="bilinear")
    expected = model(transform(image)[None])[0].softmax(0).numpy()
    result = dualtoken_vit.load_predictor(path, "cpu", top_k=2)(image)
    assert isinstance(result, Classes)
    order = np.argsort(-expected)[:2]
    assert result.labels.tolist() == order.tolist()
    assert result.names == tuple(NAMES[k] for k in order)
    np.testing.assert_allclose(result.probabilities, expected[order], atol=1e-6)
    assert (result.name, result.probability) == (NAMES[order[0]], pytest.approx(expected.max(), abs=1e-6))


@torch.no_grad()
def test_a_detector_against_itself(files, image):
    path, model = files["detection"]
    model.score_thresh = 0.0
    expected = model([pil_to_tensor(image) / 255])[0]
    result = dualtoken_vit.load_predictor(path, "cpu", score=0.0)(image)
    assert isinstance(result, Objects)
    assert len(result) == len(expected["labels"]) > 0
    np.testing.assert_allclose(result.boxes, expected["boxes"].numpy(), atol=1e-4)
    assert (result.masks == expected["masks"][:, 0].numpy()).all()
    assert result.masks.shape[1:] == (48, 80)
    middle = float(np.median(result.scores))
    few = dualtoken_vit.load_predictor(path, "cpu", score=middle)(image)
    assert 0 < len(few) < len(result)
    assert few.scores.min() > middle


@torch.no_grad()
def test_a_segmenter_against_itself(files, image):
    path, model = files["segmentation"]
    expected = model(pil_to_tensor(image)[None] / 255)[0].argmax(0).numpy()
    result = dualtoken_vit.load_predictor(path, "cpu")(image)
    assert isinstance(result, LabelMap)
    assert (result.labels == expected).all()
    shares = {NAMES[k]: (expected == k).mean() for k in np.unique(expected)}
    assert result.shares() == pytest.approx(shares, abs=1e-6)
    slid = dualtoken_vit.load_predictor(path, "cpu", mode="slide", window=32, window_stride=32)(image)
    windows = [model(pil_to_tensor(image)[None, :, 0:32, x : x + 32] / 255).argmax(1)[0] for x in (0, 32)]
    assert (slid.labels[:16, :64] == np.concatenate(windows, 1)[:16]).all()  # rows 16 to 31 overlap with the next


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.jpg", r"^nowhere\.jpg: no such file"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\).*give \(H, W\) or \(H, W, C\) arrays"),
        (np.zeros((4, 4, 3), np.int64), r"int64.*give uint8"),
        (np.full((4, 4, 3), 2.0), r"floating-point values between 0 and 1"),
        (np.full((4, 4, 3), np.nan), r"floating-point values between 0 and 1"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (None, r"cannot predict for an object of type NoneType: give a path"),
        (b"\xff\xd8", r"cannot predict for an object of type bytes"),
        (BytesIO(b"\xff\xd8"), r"cannot predict for an object of type BytesIO"),
        ([3], r"cannot predict for an object of type int"),
    ],
)
def test_images_that_cannot_be_used(files, given, message):
    predictor = dualtoken_vit.load_predictor(files["classification"][0], "cpu")
    with pytest.raises(InputError, match=message):
        predictor(given)


def test_a_folder_without_images(files, tmp_path):
    with pytest.raises(InputError, match="no images in this folder"):
        dualtoken_vit.load_predictor(files["classification"][0], "cpu")(tmp_path)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("classification", {"score": 0.5}, r"^score: not an option of this predictor; there are .*top_k"),
        ("classification", {"image_size": 31}, r"^image size 31 is not a size .* give at least 32"),
        ("detection", {"score": 1.5}, r"^--score 1\.5: must be at most 1"),
        ("segmentation", {"window": 40, "window_stride": 50}, r"window_stride=50: must be at most the window's 40"),
        ("segmentation", {"mode": "glide"}, r"--mode glide: must be"),
    ],
)
def test_options_that_cannot_be_used(files, task, options, message):
    with pytest.raises(InputError, match=message):
        dualtoken_vit.load_predictor(files[task][0], "cpu", **options)
    with pytest.raises(InputError, match=r"device=abacus: not available on this machine"):
        dualtoken_vit.load_predictor(files[task][0], "abacus")


def test_an_image_that_does_not_fit_into_memory(files, image, tmp_path, monkeypatch):
    """It is named with what helps; the images of its batch are predicted."""
    predictor = dualtoken_vit.load_predictor(files["segmentation"][0], "cpu")
    real = predictor_module.Predictor.collate

    def allocate(self, inputs):
        if any(one.shape[-1] > 100 for one in inputs):
            torch.empty(2**60, dtype=torch.uint8)
        return real(self, inputs)

    monkeypatch.setattr(predictor_module.Predictor, "collate", allocate)
    large = tmp_path / "large.png"
    image.resize((120, 60)).save(large)
    first, second, third = predictor.stream([image, large, image])
    same(first.result, third.result)
    message = rf"^{large}: 120x60 pixels: out of memory .*: use mode slide, or a smaller image_size$"
    with pytest.raises(InputError, match=message):
        raise second.error


def test_options_may_be_lists(files, image):
    path = files["segmentation"][0]
    one, other = (dualtoken_vit.load_predictor(path, "cpu", scales=scales) for scales in ([0.5, 1.0], (0.5, 1.0)))
    same(one(image), other(image))


def test_public_names():
    assert set(dualtoken_vit.__all__) <= set(dir(dualtoken_vit))
    for name in dualtoken_vit.__all__:
        assert getattr(dualtoken_vit, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'predictor'"):
        dualtoken_vit.predictor  # noqa: B018
    assert (Path(dualtoken_vit.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_weights_that_are_nan(files, tmp_path, task):
    """A detector would find nothing, a classifier the first class."""
    path = tmp_path / "nan.safetensors"

    def broken(state):
        key = next(key for key in state if key.endswith("stages.2.blocks.0.mlp.fc1.weight"))
        state[key][0, 0] = torch.nan
        return state

    edit(files[task][0], path, broken)
    with pytest.raises(InputError, match=r"nan\.safetensors has weights that are NaN or Inf; use another checkpoint"):
        dualtoken_vit.load_predictor(path, "cpu")


def test_a_detector_whose_activations_are_not_finite(files, image):
    """Its weights are, so that it can be loaded; no object would be found."""
    predictor = dualtoken_vit.load_predictor(files["detection"][0], "cpu")
    for weight in predictor.model.heads[0].parameters():
        weight.data.fill_(1e38)
    with pytest.raises(InputError, match="the network produced NaN or Inf; use another checkpoint"):
        predictor(image)
    assert len(predictor.forward([predictor.preprocess(image)], check=False)[0]["boxes"]) == 0


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_threads_may_share_a_predictor(files, image, task):
    """As in a web service."""
    predictor = dualtoken_vit.load_predictor(files[task][0], "cpu", **({"score": 0.0} if task == "detection" else {}))
    images = [image, image.rotate(90, expand=True), image.resize((40, 40)), Image.new("RGB", (64, 64), "red")]
    expected = [predictor(each) for each in images]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(predictor, images * 2), expected * 2, strict=True):
            same(found, wanted)


def test_predictors_may_share_a_network(files, image):
    path, _ = files["detection"]
    one = dualtoken_vit.load_predictor(path, "cpu", score=0.0)
    expected = one(image)
    other = type(one)(one.model, NAMES, one.preprocessing, replace(one.options, score=1.0, image_size=32))
    assert len(other(image)) == 0
    same(one(image), expected)
