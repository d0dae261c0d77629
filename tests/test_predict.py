import json
import os
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from dualtoken_vit.checkpoint import save_checkpoint
from dualtoken_vit.errors import InputError
from dualtoken_vit.predict import RECORD, find_images, predict
from dualtoken_vit.runtime.base import BasePredictor
from dualtoken_vit.show.drawing import COLUMNS, FIRST, MARGIN, PANEL, ROWS, SIDE, draw_card

NAMES = ("ant", "bee", "cat [x]", "dog")
SHARES = (0.1, 0.2, 0.3, 0.4)
PREPROCESSING = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.3, 0.2, 0.25),
    "crop_pct": 0.875,
}


def save(path: Path, model: torch.nn.Module, channels: int = 3, **model_args) -> Path:
    preprocessing = PREPROCESSING | {"input_size": (channels, 32, 32)}
    if channels == 1:
        preprocessing |= {"mean": (0.5,), "std": (0.3,)}
    info = dict(task="classification", class_names=NAMES, preprocessing=preprocessing, recipe={}, metrics={})
    save_checkpoint(path, model, model_args=model_args, **info)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A network whose answer depends on the image."""
    torch.manual_seed(0)
    model = timm.create_model("dualtoken_vit_tiny", num_classes=len(NAMES))
    torch.nn.init.normal_(model.head.weight, std=1.0)
    return save(tmp_path_factory.mktemp("checkpoint") / "best.safetensors", model)


@pytest.fixture(scope="module")
def constant(tmp_path_factory) -> Path:
    """A network that gives SHARES for every image: softmax(log p) = p."""
    model = timm.create_model("dualtoken_vit_tiny", num_classes=len(NAMES))
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor(SHARES).log()
    return save(tmp_path_factory.mktemp("constant") / "best.safetensors", model)


def solid(path: Path, color: str | tuple[int, ...] = "red", size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def result(capsys) -> dict:
    """What --json printed: all of stdout must be the one object."""
    return json.loads(capsys.readouterr().out)


def test_the_probabilities_are_those_that_timm_alone_computes(checkpoint, tmp_path, capsys):
    generator = torch.Generator().manual_seed(1)
    for i, size in enumerate([(50, 40), (33, 90), (32, 32), (200, 100), (20, 21)]):
        pixels = torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    assert predict(checkpoint, (tmp_path,), json=True, batch_size=2, device="cpu", top_k=9)

    model = timm.create_model("dualtoken_vit_tiny", num_classes=len(NAMES), checkpoint_path=str(checkpoint)).eval()
    transform = timm.data.create_transform(**PREPROCESSING)
    for path, one in zip(paths, result(capsys)["predictions"], strict=True):
        with torch.inference_mode():
            expected = model(transform(Image.open(path))[None]).softmax(-1)[0]
        assert one["image"] == str(path)
        assert [c["class"] for c in one["classes"]] == [NAMES[i] for i in expected.argsort(descending=True)]
        got = torch.tensor([c["probability"] for c in one["classes"]])
        torch.testing.assert_close(got, expected.sort(descending=True).values, rtol=0, atol=1e-5)


def test_the_likeliest_classes_come_first_and_the_record_is_kept(constant, tmp_path, capsys):
    image, out = solid(tmp_path / "x.jpg"), tmp_path / "out"
    assert predict(constant, (image,), out, json=True, top_k=2)
    printed = result(capsys)
    assert printed["checkpoint"] == str(constant)
    assert printed["unreadable"] == []
    assert [c["class"] for c in printed["predictions"][0]["classes"]] == ["dog", "cat [x]"]
    assert [c["probability"] for c in printed["predictions"][0]["classes"]] == pytest.approx([0.4, 0.3])
    assert [NAMES[c["index"]] for c in printed["predictions"][0]["classes"]] == ["dog", "cat [x]"]
    assert json.loads((out / "predictions.json").read_text()) == printed


def test_the_table_names_image_classes_and_shares(constant, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert predict(constant, (solid(tmp_path / "Straße [1] 写真.png"),), top_k=3)
    table = capsys.readouterr().out
    for text in ("Straße [1] 写真.png", "dog", "40.0%", "cat [x]", "30.0%", "bee", "20.0%"):
        assert text in table
    assert "ant" not in table.replace(str(tmp_path), "")


def test_grey_networks_get_one_channel(tmp_path, capsys):
    model = timm.create_model("dualtoken_vit_tiny", num_classes=len(NAMES), in_chans=1)
    torch.nn.init.normal_(model.head.weight, std=1.0)
    checkpoint = save(tmp_path / "best.safetensors", model, channels=1)
    assert predict(checkpoint, (solid(tmp_path / "x.png", "red"),), json=True)
    pixel = (0.299 - 0.5) / 0.3  # red's luma
    with torch.inference_mode():
        expected = model.eval()(torch.full((1, 1, 32, 32), pixel)).softmax(-1).max().item()
    assert result(capsys)["predictions"][0]["classes"][0]["probability"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["L", "P", "RGBA", "CMYK", "I;16", "1x1", "rotated"])
def test_every_kind_of_image_is_read_as_its_plain_copy(checkpoint, tmp_path, capsys, kind):
    plain = Image.new("RGB", (30, 20), (140, 140, 140))
    if kind == "rotated":
        plain.paste((20, 20, 20), (0, 0, 30, 10))
    plain.save(tmp_path / "plain.png")
    if kind == "I;16":
        Image.new("I;16", (30, 20), 140 * 257).save(tmp_path / "é.png")
    elif kind == "1x1":
        Image.new("RGB", (1, 1), (140, 140, 140)).save(tmp_path / "é.png")
    elif kind == "CMYK":
        plain.convert("CMYK").save(tmp_path / "é.tif")
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 3  # stored upside down
        plain.rotate(180).save(tmp_path / "é.png", exif=exif)
    else:
        plain.convert(kind).save(tmp_path / "é.png")
    out = tmp_path / "out"
    assert predict(checkpoint, (next(tmp_path.glob("é.*")), tmp_path / "plain.png"), out, json=True)
    first, second = result(capsys)["predictions"]
    assert [c["class"] for c in first["classes"]] == [c["class"] for c in second["classes"]]
    shares = [[c["probability"] for c in one["classes"]] for one in (first, second)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-4)
    assert len(list(out.glob("é.*.png"))) == 1


def test_folders_are_searched_in_order_and_each_image_is_taken_once(tmp_path):
    wanted = [solid(tmp_path / name) for name in ("a/2.JPG", "a/sub/1.png", "b.gif")]
    solid(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = find_images((tmp_path, tmp_path / "a" / "2.JPG", Path(os.path.relpath(wanted[2]))))
    assert [image.path for image in found] == wanted


def test_skipped_files_are_reported_in_one_line(constant, tmp_path, capsys):
    out = tmp_path / "photos" / "out"
    solid(tmp_path / "photos" / "a.png")
    solid(tmp_path / "photos" / "b" / "b.png")
    for name in ("film.mp4", "b/notes.txt", ".hidden.txt", "named.download"):
        (tmp_path / "photos" / name).write_text("no image")
    solid(tmp_path / "x.png").replace(tmp_path / "photos" / "named.download")
    given = (tmp_path / "photos", tmp_path / "photos" / "b", tmp_path / "photos" / "named.download")
    line = f"skipped files that are not images: 2, for example {tmp_path / 'photos/b/notes.txt'}\n"
    for _ in range(2):  # the second time, the output of the first is in the folder
        assert predict(constant, given, out, json=True)
        printed = capsys.readouterr()
        assert len(json.loads(printed.out)["predictions"]) == 3
        assert printed.err.count("skipped files") == 1
        assert line in printed.err
    assert predict(constant, (tmp_path / "photos" / "a.png",), json=True)
    assert "skipped files" not in capsys.readouterr().err


def test_a_file_is_taken_whatever_its_suffix(constant, tmp_path, capsys):
    solid(tmp_path / "x.png").rename(tmp_path / "x.download")
    assert predict(constant, (tmp_path / "x.download",), json=True)
    assert len(result(capsys)["predictions"]) == 1


def test_each_drawing_has_a_name_of_its_own_and_shows_its_image(constant, tmp_path):
    colors = {
        "a/x.png": (200, 0, 0),
        "b/x.png": (0, 200, 0),
        "b/x.bmp": (0, 0, 200),
        "b/X.png": (200, 200, 0),  # the same name on a file system that does not tell case
        "b/x.png.png": (0, 200, 200),
        "c/b/x.png": (200, 0, 200),
    }
    for name, color in colors.items():
        solid(tmp_path / name, color, (64, 64))
    given = (tmp_path / "a" / "x.png", tmp_path / "b", tmp_path / "c" / "b", tmp_path / "b" / "x.png")
    out = tmp_path / "out"
    assert predict(constant, given, out)
    drawings = [out / f"{image.place}.png" for image in find_images(given, out)]
    assert len({str(drawing).casefold() for drawing in drawings}) == len(colors)
    shown = set()
    for drawing in drawings:
        with Image.open(drawing) as card:
            shown.add(card.getpixel((MARGIN + SIDE // 2, card.height // 2)))
    assert shown == set(colors.values())


def test_a_drawing_is_never_a_contact_sheet(constant, tmp_path):
    solid(tmp_path / "a.png"), solid(tmp_path / "x.png").rename(tmp_path / "sheet")
    out = tmp_path / "out"
    assert predict(constant, (tmp_path / "sheet", tmp_path / "a.png"), out)
    assert {path.name for path in out.iterdir()} == {"a.png.png", "sheet-2.png", "sheet.png", "predictions.json"}
    with Image.open(out / "sheet-2.png") as card, Image.open(out / "sheet.png") as sheet:
        assert card.width == SIDE + PANEL + 3 * MARGIN
        assert sheet.width < card.width


def test_a_run_that_was_cut_short_can_be_repeated(constant, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    image, out = solid(tmp_path / "x.png"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("dualtoken_vit.runtime.report.draw_card", fail)
        with pytest.raises(KeyboardInterrupt):
            predict(constant, (image,), out)
    assert predict(constant, (image,), out)
    assert len(json.loads((out / "predictions.json").read_text())["predictions"]) == 1


def test_older_drawings_are_kept_and_counted(constant, tmp_path, capsys):
    """Those of a folder, after two of its images alone; then also that of the second, and the contact sheet of both."""
    given, out = [solid(tmp_path / "in" / f"{number}.png") for number in range(7)], tmp_path / "out"
    reports = []
    for images in ((given[0].parent,), (given[0].parent,), tuple(given[:2]), tuple(given[:1])):
        assert predict(constant, images, out, json=True)
        solid(out / ".ipynb_checkpoints" / "0-checkpoint.png"), solid(out / ".hidden.png")
        reports.append([line for line in capsys.readouterr().err.splitlines() if "older" in line])
    line = f"{out} has older files, which this run did not write: "
    assert reports == [[], [], [f"{line}7, for example {Path('in/0.png.png')}"], [f"{line}9, for example 1.png.png"]]
    assert len(list(out.rglob("*.png.png"))) == 9


def test_an_input_is_never_overwritten(constant, tmp_path):
    """The drawing of x.jpg would be x.jpg.png, which is one of the images."""
    out = tmp_path / "out"
    solid(out / "x.jpg"), solid(out / "x.jpg.png", "blue")
    (out / "predictions.json").write_text("{}")  # as if an earlier call had made the folder
    before = {path: path.read_bytes() for path in out.glob("x.*")}
    assert predict(constant, tuple(before), out)
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(out.glob("x.*"))) == 4


def test_an_output_folder_among_the_images_is_not_searched(constant, tmp_path, capsys):
    solid(tmp_path / "x.png")
    for _ in range(2):
        assert predict(constant, (tmp_path,), tmp_path / "out", json=True)
        assert [Path(one["image"]).name for one in result(capsys)["predictions"]] == ["x.png"]


def test_a_link_to_itself_is_unreadable(constant, tmp_path, capsys):
    solid(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "loop.png").symlink_to("loop.png")
    assert predict(constant, (tmp_path / "in",), tmp_path / "out", json=True) is False
    record = result(capsys)
    assert [Path(one["image"]).name for one in record["predictions"]] == ["a.png"]
    assert [Path(one["image"]).name for one in record["unreadable"]] == ["loop.png"]


def test_an_unreadable_image_is_named_and_the_rest_goes_on(constant, tmp_path, capsys):
    solid(tmp_path / "good.png")
    whole = solid(tmp_path / "cut.png", size=(300, 300)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    out = tmp_path / "out"
    assert predict(constant, (tmp_path,), out, json=True) is False
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert [Path(one["image"]).name for one in record["predictions"]] == ["good.png"]
    assert [Path(one["image"]).name for one in record["unreadable"]] == ["cut.png", "text.jpg"]
    assert str(tmp_path / "cut.png") in printed.err
    assert str(tmp_path / "text.jpg") in printed.err
    assert "2 of 3 images could not be read" in printed.err
    assert json.loads((out / "predictions.json").read_text()) == record


def test_json_of_unreadable_images_only(constant, tmp_path, capsys):
    """A program that gives one image at a time reads the reason in the same place."""
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("no image")
    assert not predict(constant, (tmp_path / "a.jpg", tmp_path / "b.jpg"), tmp_path / "out", json=True)
    record = json.loads(capsys.readouterr().out)
    assert record["predictions"] == []
    assert [Path(one["image"]).name for one in record["unreadable"]] == ["a.jpg", "b.jpg"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]


def test_a_table_of_unreadable_images_only_leaves_the_files_as_they_were(constant, tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    out = tmp_path / "out"
    for before in ([], ["predictions.json", "x.png.png"]):
        with pytest.raises(InputError, match=r"a\.jpg: cannot be read as an image"):
            predict(constant, (tmp_path / "a.jpg",), out)
        assert sorted(path.name for path in out.iterdir()) == before
        predict(constant, (solid(tmp_path / "x.png"),), out)


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda d: (d / "x.jpg").write_text("no"), {"images": "x.jpg"}, "^[^ ]*x.jpg: cannot be read as an image"),
        (lambda d: (d / "empty").mkdir(), {"images": "empty"}, "empty: no images in this folder"),
        (lambda d: None, {"images": "missing.png"}, "missing.png: no such file or folder"),
        (lambda d: solid(d / "x.png"), {"top_k": 0}, "--top-k 0"),
        (lambda d: solid(d / "x.png"), {"batch_size": 0}, "--batch-size 0"),
        (lambda d: solid(d / "x.png"), {"device": "abacus"}, "device=abacus"),
        (lambda d: solid(d / "x.png"), {"out": "x.png"}, "x.png: a file; name a folder"),
        (lambda d: solid(d / "p" / "x.png"), {"images": "p", "out": "p"}, "the images are read from there"),
        (lambda d: solid(d / "p" / "q" / "x.png"), {"images": "p/q", "out": "p"}, "the images are read from there"),
        (lambda d: (solid(d / "x.png"), solid(d / "o" / "y.png")), {"out": "o"}, "o: the folder holds other files"),
    ],
)
def test_bad_input_is_refused_in_one_line(constant, tmp_path, prepare, options, message):
    prepare(tmp_path)
    options = {key: tmp_path / value if key in ("images", "out") else value for key, value in options.items()}
    images = (options.pop("images", tmp_path / "x.png"),)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        predict(constant, images, **options)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_network_gone_wrong_is_refused(tmp_path):
    model = timm.create_model("dualtoken_vit_tiny", num_classes=len(NAMES))
    torch.nn.init.constant_(model.head.bias, torch.nan)
    checkpoint = save(tmp_path / "best.safetensors", model)
    with pytest.raises(InputError, match="NaN or Inf"):
        predict(checkpoint, (solid(tmp_path / "x.png"),))


def test_the_bar_is_as_long_as_the_class_is_likely():
    card = draw_card(Image.new("RGB", (8, 8), "black"), "x.png", [("ant", 0.75), ("bee", 0.25)])
    blue = Image.new("RGB", (1, 1), FIRST).getpixel((0, 0))
    panel = range(SIDE + 2 * MARGIN, card.width)
    lengths = {sum(card.getpixel((x, y)) == blue for x in panel) for y in range(card.height)}
    assert max(lengths) == pytest.approx(0.75 * PANEL, abs=2)


@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (1, 4000), (3, 5), (900, 600)])
def test_images_of_any_shape_are_drawn_whole(size):
    card = draw_card(Image.new("L", size, 77), "n" * 500, [("c" * 500, 1.0)] * 12)
    box = card.crop((MARGIN, 0, MARGIN + SIDE, card.height))
    inked = Image.eval(box.convert("L"), lambda value: 255 * (value == 77)).getbbox()
    width, height = inked[2] - inked[0], inked[3] - inked[1]
    assert max(width, height) == SIDE
    assert min(width, height) == max(1, round(SIDE * min(size) / max(size)))
    margin = card.crop((card.width - MARGIN + 1, 0, card.width, card.height))
    assert margin.getextrema() == ((255, 255),) * 3  # long names end before the edge


def test_contact_sheets_show_every_image_in_order(constant, tmp_path):
    count = COLUMNS * ROWS + 1
    colors = [(5 * i, 255 - 5 * i, 100) for i in range(count)]
    for i, color in enumerate(colors):
        solid(tmp_path / "in" / f"{i:02}.png", color, (32, 32))
    out = tmp_path / "out"
    assert predict(constant, (tmp_path / "in",), out)
    shown = []
    for name, cells in (("sheet.png", COLUMNS * ROWS), ("sheet-2.png", 1)):
        with Image.open(out / name) as page:
            columns, rows = min(COLUMNS, cells), -(-cells // COLUMNS)
            width, height = page.width / columns, page.height / rows
            middles = [(int((i % columns + 0.5) * width), int((i // columns + 0.4) * height)) for i in range(cells)]
            shown += [page.getpixel(middle) for middle in middles]
    assert shown == colors
    assert not (out / "sheet-3.png").exists()


@pytest.mark.parametrize("full", [False, True], ids=["disk", "full disk"])
@pytest.mark.parametrize("error", [KeyboardInterrupt("stopped"), InputError("the network produced NaN")])
def test_what_was_predicted_before_an_error_is_kept(constant, tmp_path, monkeypatch, capsys, error, full):
    """A record beside drawings of another run would be wrong. What cannot be written is printed."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal for rich, which redirects stdout while a bar is shown
    paths = tuple(solid(tmp_path / f"{name}.png") for name in "abc")
    out, left = tmp_path / "out", [BasePredictor._run] * 2
    assert predict(constant, paths, out, device="cpu")
    (out / RECORD).write_text((out / RECORD).read_text().replace(str(constant), "older"))

    def cut(self, inputs):
        if not left:
            raise error
        return left.pop()(self, inputs)

    def refuse(*args):
        raise InputError("the disk is full")

    monkeypatch.setattr(BasePredictor, "_run", cut)
    if full:
        monkeypatch.setattr("dualtoken_vit.predict.write_json", refuse)
    capsys.readouterr()
    with pytest.raises(type(error), match=str(error)):
        predict(constant, paths, out, batch_size=1, device="cpu")
    record = json.loads((out / RECORD).read_text())
    assert record["checkpoint"] == ("older" if full else str(constant))
    assert [one["image"] for one in record["predictions"]] == [*map(str, paths[: 3 if full else 2])]
    printed = capsys.readouterr().out
    assert "b.png" in printed
    assert "c.png" not in printed


@pytest.mark.parametrize("letter", ["a", "猫"])
def test_drawings_of_long_names(constant, tmp_path, letter):
    """A name has up to 255 bytes, to which the suffix of a drawing is added."""
    stem = letter * (249 // len(letter.encode()))
    paths = tuple(solid(tmp_path / f"{stem}{number}.png") for number in (1, 2))
    assert predict(constant, paths, tmp_path / "out", device="cpu")
    drawings = [path.name for path in (tmp_path / "out").glob(f"{letter}*")]
    assert len(drawings) == 2
    assert all(name.startswith(letter * 60) and ".png" in name and len(name.encode()) < 230 for name in drawings)
