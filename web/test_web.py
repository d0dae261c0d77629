"""The browser demo in headless Chromium, against PyTorch; `make test-web` runs it.

The page is built with two small untrained networks whose outputs differ from image to image.
"""

import base64
import io
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from build_page import build
from PIL import Image
from playwright.sync_api import sync_playwright
from torchvision.transforms.functional import pil_to_tensor

from dualtoken_vit import create_segmenter, load_model, load_predictor
from dualtoken_vit.checkpoint import save_checkpoint
from dualtoken_vit.data.segmentation import draw_scenes
from dualtoken_vit.deploy.quantise import quantise
from dualtoken_vit.errors import InputError
from dualtoken_vit.paper.attention import recording
from dualtoken_vit.recipes import RECIPES, to_dict

BROWSERS = "chromium", "chromium-browser", "google-chrome"  # else Playwright's own
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
NAMES = "ant", "bee", "cat", "dog", "eel", "fox", "gnu"
SHALLOW = {"depths": (1, 1, 1)}
STATE = "async () => { const { state } = await import('./app.js'); return %s }"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of a classifier of 96 pixels and a segmenter, whose inputs have a short side of 64."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    classifier = timm.create_model("dualtoken_vit_tiny", num_classes=len(NAMES), **SHALLOW)
    segmenter = create_segmenter("lraspp", "dualtoken_vit_tiny", 4, **SHALLOW)
    with torch.no_grad():
        classifier.head.weight.normal_(std=0.3)
        classifier.stages[-1].blocks[-1].broadcast_attn.q.weight.mul_(60)
        for name in segmenter.class_layers:
            segmenter.get_submodule(name).weight.normal_(std=0.3)
        logits = segmenter.eval()(pil_to_tensor(draw_scenes("train", 64).sources(0)[0])[None] / 255)
        segmenter.head.high_classifier.bias -= logits.mean((0, 2, 3))  # else one class has every pixel
    cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    resizing = {"input_size": (3, 96, 96), "crop_pct": 0.875, "interpolation": "bicubic", "temperature": 1.5}
    for model, recipe, names, preprocessing in (
        (classifier, "folder", NAMES, resizing),
        (segmenter, "masks-lite", NAMES[:4], {"input_size": (3, 64, 64)}),
    ):
        task = RECIPES[recipe].task
        stored = to_dict(RECIPES[recipe])
        if task == "segmentation":
            stored["data"]["image_size"] = 64
        save_checkpoint(
            folder / f"{task}.safetensors",
            model,
            task=task,
            class_names=names,
            preprocessing=preprocessing | cfg,
            recipe=stored,
            metrics={"val_top1": 0.625},
            model_args=SHALLOW if task == "classification" else {**SHALLOW, "segmenter": "lraspp"},
        )
    return folder


@pytest.fixture(scope="module")
def site(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "dist"
    networks = checkpoints / "classification.safetensors", checkpoints / "segmentation.safetensors"
    build(*networks, precision="float32", out=out)
    quantise(out / "classifier.onnx", out / "int8.onnx", "int8-dynamic")
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files of several kinds and shapes."""
    folder = tmp_path_factory.mktemp("images")
    scene = draw_scenes("train", 220)
    first, second = (scene.sources(index)[0] for index in (0, 1))
    first.resize((311, 207)).save(folder / "wide.png")
    first.resize((125, 340)).save(folder / "tall.png")
    first.resize((60, 41)).save(folder / "small.png")
    second.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png")
    second.convert("L").save(folder / "grey.png")
    clear = second.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.asarray(second)[..., 0] > 128, 255, 0).astype(np.uint8)))
    clear.save(folder / "transparent.png")
    second.resize((300, 200)).save(folder / "photo.jpg", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    first.resize((240, 160)).save(folder / "turned.jpg", quality=90, exif=exif)
    return folder


@pytest.fixture(scope="module")
def requests():
    """What the server was asked for."""
    return []


@pytest.fixture(scope="module")
def server(site, requests):
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def context(server):
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        context = browser.new_context(permissions=["camera"], viewport={"width": 1280, "height": 900})
        context.set_default_timeout(60_000)
        yield context
        browser.close()


@pytest.fixture
def page(context, server):
    """The loaded page; the test fails if the page requests anything from elsewhere or reports an error."""
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.on("request", lambda request: request.url.startswith((server, "blob:")) or faults.append(request.url))
    page.goto(server)
    page.get_by_text("Ready, also offline.").wait_for()
    yield page
    page.close()
    assert faults == []


def state(page, value):
    """A value of the page's state."""
    return page.evaluate(STATE % value)


def refresh(page, action):
    """Do what makes the page predict, and wait for the classes."""
    page.evaluate("document.getElementById('classes').replaceChildren()")
    action()
    page.locator("#classes li").first.wait_for()


def show(page, file):
    """Choose a file and wait until its classes are shown."""
    refresh(page, lambda: page.set_input_files("#file", file))


def shown(page):
    """The rows of the list of classes: name and probability."""
    return [tuple(row.split("\n")) for row in page.locator("#classes li").all_inner_texts()]


@pytest.mark.parametrize("name", ["wide.png", "tall.png", "small.png", "palette.png", "grey.png", "transparent.png"])
def test_the_input_is_that_of_the_package(page, images, site, name):
    """Bit by bit, where the file is decoded without loss."""
    show(page, images / name)
    found = state(
        page, "Array.from((await import('./image.js')).square(state.pixels, state.networks.about.classifier).input)"
    )
    _, expected, _ = load_predictor(site / "classifier.onnx").load(images / name)
    assert np.array_equal(np.float32(found), expected.ravel())


@pytest.mark.parametrize("name", ["wide.png", "small.png", "transparent.png", "photo.jpg", "turned.jpg"])
def test_classes_and_probabilities_are_those_of_pytorch(page, images, checkpoints, name):
    show(page, images / name)
    expected = load_predictor(checkpoints / "classification.safetensors", "cpu", top_k=len(NAMES))(images / name)
    found = np.array(state(page, "state.result.probabilities"))
    lossless = name.endswith(".png")  # browsers may decode a JPEG differently by one level
    assert found[expected.labels] == pytest.approx(expected.probabilities, abs=1e-4 if lossless else 5e-3)
    order = sorted(range(len(NAMES)), key=lambda label: -found[label])[:5]
    assert shown(page) == [(NAMES[label], f"{100 * found[label]:.1f} %") for label in order]
    assert shown(page)[0][0] == expected.name


def test_int8_weights(page, images, checkpoints):
    """The precision of `make web` runs in the browser."""
    show(page, images / "wide.png")
    network = "new Network({ ...state.networks.about.classifier, file: 'int8.onnx' })"
    code = f"const {{ Network, classify }} = await import('./network.js'); return classify({network}, state.pixels, 96)"
    found = page.evaluate(f"async () => {{ const {{ state }} = await import('./app.js'); {code} }}")
    expected = load_predictor(checkpoints / "classification.safetensors", "cpu", top_k=len(NAMES))(images / "wide.png")
    probabilities = np.array(found["probabilities"])[expected.labels]
    assert probabilities == pytest.approx(expected.probabilities, abs=0.02)
    assert not np.allclose(probabilities, expected.probabilities, atol=1e-6)  # it is not float32


def pytorch_maps(checkpoints, file, size):
    """(rows, columns, 7, 7)"""
    predictor = load_predictor(checkpoints / "classification.safetensors", "cpu", image_size=size)
    with torch.inference_mode(), recording(predictor.model) as maps:
        predictor(file)
    return list(maps.values())[-1][0].numpy()


def test_attention_of_the_token_at_the_pointer_and_by_keyboard(page, images, checkpoints):
    file = images / "wide.png"
    show(page, file)
    maps = pytorch_maps(checkpoints, file, 96)
    assert maps.max() > 1.5 * maps.min()
    assert state(page, "state.result.shape") == [3, 3, 7, 7]
    found = np.array(state(page, "Array.from(state.result.maps)")).reshape(maps.shape)
    assert found == pytest.approx(maps, abs=2e-4)

    def told(row, column):
        """Whether the page shows this token and the range of its map."""
        text = page.locator("#token").inner_text()
        scale = page.locator("#low").inner_text(), page.locator("#high").inner_text()
        expected = tuple(f"{100 * value:.1f} %" for value in (found[row, column].min(), found[row, column].max()))
        return text.startswith(f"Token in row {row + 1} of 3, column {column + 1} of 3") and scale == expected

    box = page.locator("#overlay").bounding_box()
    assert box == page.locator("#image").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(311 / 207, rel=0.01)
    # The square is 96 / 109 of the short side (207 pixels), in the middle.
    side = 96 / 109 * box["height"]
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    page.mouse.move(left + side * 0.9, top + side * 0.4)
    assert told(1, 2)
    page.mouse.move(box["x"] + 2, box["y"] + 2)  # outside of the square
    assert page.locator("#scale").is_hidden()
    page.mouse.move(0, 0)
    page.locator("#overlay").focus()
    assert told(1, 1)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")  # at the border it stays
    page.keyboard.press("ArrowLeft")
    assert told(0, 0)
    page.keyboard.press("Escape")
    assert page.locator("#scale").is_hidden()

    refresh(page, lambda: page.select_option("#size", "224"))
    fine = pytorch_maps(checkpoints, file, 224)
    assert fine.shape == (7, 7, 7, 7)
    assert np.array(state(page, "Array.from(state.result.maps)")).reshape(fine.shape) == pytest.approx(fine, abs=2e-4)


@torch.inference_mode()
def test_segmentation_is_that_of_pytorch(page, images, checkpoints):
    show(page, images / "wide.png")
    page.select_option("#show", "segmentation")
    page.locator("#legend li").first.wait_for()
    height, width = state(page, "state.segments.size")
    found = np.array(state(page, "Array.from(state.segments.labels)")).reshape(height, width)
    x = pil_to_tensor(Image.open(images / "wide.png").convert("RGB"))[None] / 255
    x = F.interpolate(x, (64, round(311 * 64 / 207)), mode="bilinear", antialias=True)
    expected = load_model(checkpoints / "segmentation.safetensors")[0](x).argmax(1)[0].numpy()
    assert np.bincount(expected.ravel()).max() < 0.9 * expected.size  # of several classes
    assert (found == expected).mean() > 0.999
    legend = page.locator("#legend li").all_inner_texts()
    assert legend == [NAMES[label] for label in np.unique(found)]


def test_the_camera(page, checkpoints):
    """Its last image stays when it stops; it is predicted as PyTorch does."""
    refresh(page, page.get_by_role("button", name="Use the camera").click)
    page.get_by_role("button", name="Stop the camera").click()
    page.get_by_role("button", name="Use the camera").wait_for()
    last = "(await import('./network.js')).classify(state.networks.classifier, state.pixels, 96)"
    state(page, f"(await {last}).size")  # predictions run in turn: those before are complete
    url = page.evaluate("document.getElementById('image').toDataURL('image/png')")
    frame = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    expected = load_predictor(checkpoints / "classification.safetensors", "cpu", top_k=len(NAMES))(frame)
    found = np.array(state(page, "state.result.probabilities"))
    assert found[expected.labels] == pytest.approx(expected.probabilities, abs=1e-4)


def test_a_file_that_is_no_image_leaves_the_page_as_it_was(page, images, tmp_path):
    show(page, images / "photo.jpg")
    before = shown(page)
    (bad := tmp_path / "notes.png").write_text("no image")
    page.set_input_files("#file", bad)
    message = page.get_by_role("alert")
    message.get_by_text("notes.png: cannot be read as an image. Choose a JPEG, PNG or WebP file.").wait_for()
    assert shown(page) == before
    show(page, images / "photo.jpg")
    assert message.inner_text() == ""


def test_offline_and_at_phone_width(context, page, images, requests):
    """After the first visit the page loads without a network; all of it fits on a phone."""
    show(page, images / "photo.jpg")
    before = shown(page)
    requests.clear()
    context.set_offline(True)
    try:
        page.set_viewport_size({"width": 360, "height": 740})
        page.reload()
        page.get_by_text("Ready, also offline.").wait_for()
        show(page, images / "photo.jpg")
        assert shown(page) == before
    finally:
        context.set_offline(False)
    assert set(requests) <= {"/sw.js", "/files.js"}  # its look for a newer worker, despite set_offline
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for place in (".button", "#camera", "#size", "#show"):
        box = page.locator(place).bounding_box()
        assert box["height"] >= 44
        assert box["x"] + box["width"] <= 360
    assert page.locator("#image").bounding_box()["width"] > 300
    assert page.locator("#classes").bounding_box()["y"] > page.locator(".button").bounding_box()["y"]


def test_everything_is_reached_by_keyboard(page, images):
    """In the order of the page; the first stop is the choice of an image."""
    page.on("filechooser", lambda chooser: chooser.set_files(images / "photo.jpg"))
    page.reload()  # the key might otherwise come before the browser leaves its dialog to the test
    page.get_by_text("Ready, also offline.").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#classes li").first.wait_for()
    page.locator("body").click(position={"x": 1, "y": 1})
    order = []
    for _ in range(6):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert order == ["overlay", "file", "camera", "show", "size", "SUMMARY"]


def test_networks_and_folders_that_cannot_be_used(checkpoints, tmp_path):
    with pytest.raises(InputError, match=r"--classifier .*: a network for segmentation; the page needs one for class"):
        build(checkpoints / "segmentation.safetensors", out=tmp_path / "dist")
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match=r"--out .*mine: exists and is no earlier build; name another folder"):
        build(checkpoints / "classification.safetensors", out=tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
