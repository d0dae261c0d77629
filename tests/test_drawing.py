"""Drawings and plots: names of any kind are drawn literally, and a drawing that fails ends no run."""

import csv
import re
import warnings
from inspect import getsource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from PIL import Image, ImageCms

from dualtoken_vit.arguments import Predict
from dualtoken_vit.files import guard
from dualtoken_vit.show import drawing, plots, text
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.drawing import COLUMNS, ROWS, Sheet, draw_card, draw_objects, draw_scene, save_image

ODD = {
    "dollar": "$a$",
    "bad mathtext": "$\\frac{",
    "not UTF-8": "caf\udce9",
    "lone surrogate": "\ud83d",
    "newline": "two\nlines",
    "carriage return": "two\rlines",
    "null": "a\0b",
    "Chinese": "中文",
    "Arabic": "عربي",
    "Hindi": "हिन्दी",
    "emoji": "😀",
    "outside the basic plane": "𠮷",
    "underscore": "_background",
    "markup": "[bold]",
    "empty": "",
    "long": "n" * 30_000,
}


def test_colours_of_classes_are_far_apart():
    """By CIE76 in LittleCMS: more than 30 among the 12 first classes, and 20 among the 21 of Pascal VOC."""
    colours = np.array([[drawing.color_of(label) for label in range(21)]], np.uint8)
    srgb, lab = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
    found = ImageCms.applyTransform(Image.fromarray(colours), ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    light, *ab = (np.asarray(band)[0].astype(float) for band in found.split())
    points = np.stack([light / 2.55, *(band - 256 * (band > 127) for band in ab)], 1)  # a and b are signed bytes
    apart = np.linalg.norm(points[:, None] - points, axis=2) + 1e3 * np.eye(21)
    assert apart[:12, :12].min() > 30
    assert apart.min() > 20


@pytest.fixture
def fonts(monkeypatch):
    """The list of installed fonts, empty; a test may add to it."""
    text._system_fonts.cache_clear()
    monkeypatch.setattr(fontManager, "ttflist", installed := [])
    yield installed
    text._system_fonts.cache_clear()


def build_font(path, characters, left=0):
    """A font whose characters are all one rectangle, the right part of a square that starts at `left`."""
    builder = FontBuilder(1000)
    names = {ord(char): f"u{ord(char)}" for char in characters}
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    pen = TTGlyphPen(None)
    for step, point in enumerate([(left, 0), (left, 800), (800, 800), (800, 0)]):
        (pen.lineTo if step else pen.moveTo)(point)
    pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph()} | dict.fromkeys(names.values(), pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", *names.values()), (1000, left)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return entry(path)


def entry(path, name="x"):
    return FontEntry(fname=str(path), name=name, style="normal", weight=400)


ASCII = "".join(map(chr, range(32, 127)))


def test_characters_without_a_font_become_code_points(fonts):
    assert text.literal("a b_$é") == ("a b_$é", text.REGULAR)
    assert text.literal("中x\U00020bb7\n") == ("\\u4e2dx\\U00020bb7\n", text.REGULAR)
    assert text.literal("é", bold=True) == ("é", text.BOLD)


def test_an_installed_font_is_used_for_the_characters_that_it_has(fonts, tmp_path):
    latin = build_font(tmp_path / "latin.ttf", ASCII + "中")
    bare = build_font(tmp_path / "bare.ttf", "中文")
    resort = entry(build_font(tmp_path / "all.ttf", ASCII + "中文字").fname, "Last Resort")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    fonts += [entry(tmp_path / "broken.ttf"), entry(tmp_path / "missing.ttf"), resort, latin, bare]
    assert text.literal("x") == ("x", text.REGULAR)
    assert text.literal("中") == ("中", bare.fname)  # the first of two in the order of their paths
    assert text.literal("中x") == ("中x", latin.fname)
    assert text.literal("中文") == ("中文", bare.fname)
    assert text.literal("中文x") == ("中\\u6587x", latin.fname)  # the other font cannot draw the x
    assert text.literal("字") == ("\\u5b57", text.REGULAR)


def test_a_glyph_of_an_installed_font_is_drawn(fonts, tmp_path):
    """The glyph is a box of 0.4 x 0.8 of the font's size, in images and in figures."""
    fonts.append(build_font(tmp_path / "f.ttf", ASCII + "中", left=400))
    shown, font = text.fit_text("中", 100)
    mask = font.getmask(shown)
    assert Image.frombytes("L", mask.size, bytes(mask)).getbbox() == (40, 0, 80, 80)
    figure = Figure((2, 2), dpi=100)
    figure.text(0, 0.2, "中", fontsize=72)  # points: 100 pixels
    plots.save_figure(figure, tmp_path / "f.png", dpi=100)
    rows, columns = (np.asarray(Image.open(tmp_path / "f.png").convert("L")) < 128).nonzero()
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == pytest.approx((40, 80), abs=1)


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
def test_every_drawing_takes_odd_names(name, fonts, tmp_path, capsys):
    names = (name, "b")
    image, labels = Image.new("RGB", (40, 30)), np.zeros((30, 40), np.uint8)
    objects = {"boxes": torch.tensor([[5.0, 5, 20, 20]]), "labels": torch.tensor([0]), "scores": torch.tensor([0.5])}
    matrix = np.array([[3, 1], [0, 2]])
    row = {"epoch": 1, "loss": 0.5}
    shared = {"mode": "eager", "precision": "float32", "threads": 1, "processes": 1, "batch_size": 1}
    result = SimpleNamespace(**shared, model=name or "x", input_size="8x8", latency_ms=1.0)
    sheet = Sheet(tmp_path)
    sheet.add(image, name, name, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sheet.close()
        save_image(lambda: draw_card(image, name, [(name, 0.5)]), tmp_path / "card.png")
        save_image(lambda: draw_objects(image, objects, names), tmp_path / "objects.png")
        save_image(lambda: draw_scene([(name, image, labels)], names), tmp_path / "scene.png")
        plots.save_confusion(matrix, names, tmp_path / "confusion.png")
        plots.save_confusion_csv(matrix, names, tmp_path / "confusion.csv")
        plots.save_precision_recall({f"{name}, IoU 0.5": ([0, 1], [1, 0])}, "box", tmp_path / "pr.png")
        plots.save_curves([row], {"loss": {"loss": "train"}}, "loss", row, tmp_path / "curves.png")
        if not name.startswith("_") and len(name) < 100:  # benchmark's own names are not like that
            plots.save_growth([result], tmp_path / "growth.png")
    assert capsys.readouterr().err == ""
    with open(tmp_path / "confusion.csv", encoding="utf-8", newline="") as file:
        assert [row[1:] for row in csv.reader(file)][1:] == [["3", "1"], ["0", "2"]]
    for path in tmp_path.glob("*.png"):
        assert Image.open(path).getcolors(1 << 20), path


def test_drawings_have_the_sizes_of_the_help_text():
    stated = list(map(int, re.findall(r"\d{3,}", getsource(Predict))))
    for (least, most), draw in (
        (stated[:2], lambda image: draw_objects(image, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}, ["a"])),
        (stated[2:], lambda image: draw_scene([("", image, None)], ["a"])),
    ):
        for side, expected in ((8, least), (least + 8, least + 8), (most + 8, most)):
            assert draw(Image.new("RGB", (side, 4))).width == expected


@pytest.mark.parametrize(("one", "other"), [("中", "文"), ("😀", "𠮷"), ("हि", "हा"), ("a\nb", "a\rb"), ("$x$", "x")])
def test_different_names_look_different(one, other, fonts, tmp_path):
    image = Image.new("RGB", (8, 8))
    cards = [np.asarray(draw_card(image, "", [(name, 0.5)])) for name in (one, other)]
    assert (cards[0] != cards[1]).any()
    for name, file in ((one, "one.png"), (other, "other.png")):
        plots.save_confusion(np.eye(2, dtype=int), (name, "b"), tmp_path / file)
    first, second = (np.asarray(Image.open(tmp_path / file)) for file in ("one.png", "other.png"))
    assert first.shape != second.shape or (first != second).any()


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved from now on."""
    saved = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def test_figures_show_their_text_literally(fonts, tmp_path):
    """A text with dollar signs is as wide as its characters, also where another module made the figure."""
    figure = Figure((4, 2))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label="$x$")
    axes.set_xticks([0, 1], ["$x$", "中"])
    shown = [axes.set_title("$x$"), axes.legend().get_texts()[0], figure.text(0, 0, "$x$")]
    plots.save_figure(figure, tmp_path / "x.png")
    for each in shown:
        before = each.get_window_extent().width
        each.set(text="\N{DOLLAR SIGN}x\\$", parse_math=True)  # a single dollar sign starts no formula
        assert before == pytest.approx(each.get_window_extent().width)
    assert not any(tick.get_parse_math() for tick in axes.get_xticklabels())


def test_long_names_leave_room_for_the_matrix(figures, tmp_path):
    plots.save_confusion(np.eye(3, dtype=int), ["n" * 500] * 3, tmp_path / "c.png")
    box = figures[0].axes[0].get_position()
    assert min(box.width, box.height) > 0.2


def test_a_class_that_starts_with_an_underscore_is_in_the_legend(figures, tmp_path):
    plots.save_precision_recall({"_a": ([0, 1], [1, 0]), "b": ([0, 1], [1, 1])}, "box", tmp_path / "pr.png")
    assert [each.get_text() for each in figures[0].axes[0].get_legend().get_texts()] == ["_a", "b"]


def test_curves_mark_the_epoch_that_is_given(figures, tmp_path):
    history = [{"epoch": epoch, "top1": 0.5} for epoch in (1, 2, 3)]
    for row in history:
        plots.save_curves(history, {"accuracy (%)": {"top1": "top-1"}}, "top1", row, tmp_path / "curves.png")
    marks = [figure.axes[0].texts[0] for figure in figures]
    assert [(mark.xy, mark.get_text()) for mark in marks] == [((k, 50.0), "50.0%") for k in (1, 2, 3)]


def test_curves_show_their_columns(figures, tmp_path):
    history = [
        {"epoch": epoch, "train_loss": loss, "val_top1": top1} for epoch, loss, top1 in ((1, 2.0, 0.5), (2, 1.5, 0.7))
    ]
    panels = {"loss": {"train_loss": "training"}, "accuracy (%)": {"val_top1": "top-1"}}
    plots.save_curves(history, panels, "val_top1", history[1], tmp_path / "x.png")
    lines = [axes.get_lines()[0] for axes in figures[0].axes]
    assert [line.get_xydata().tolist() for line in lines] == [[[1, 2], [2, 1.5]], [[1, 50], [2, 70]]]


def test_reliability_shows_the_share_that_is_right(figures, tmp_path):
    """Of 15 bins the third ends at 0.2, the last begins at 0.933."""
    images = np.array([[0.95, 0.97, 0.15, 0.2], [1, 0, 0, 0]])
    plots.save_reliability(images, 15, 0.1, tmp_path / "x.png")
    accuracy, counts = ([bar.get_height() for bar in axes.patches] for axes in figures[0].axes)
    assert accuracy == [0.0] * 14 + [0.5]
    assert counts == [0, 0, 2, *[0] * 11, 2]


def test_the_epochs_of_curves_are_whole_numbers(figures, tmp_path):
    for epochs in (1, 2, 50):
        history = [{"epoch": 1 + epoch, "loss": 1.0} for epoch in range(epochs)]
        plots.save_curves(history, {"loss": {"loss": "training"}}, "top1", history[0], tmp_path / "curves.png")
        ticks = figures[-1].axes[0].get_xticks()
        assert 1 <= len(ticks) <= 13  # with one beyond each end
        assert [tick % 1 for tick in ticks] == [0] * len(ticks)


def test_a_sheet_of_labelled_images_has_rows_as_high_as_their_images():
    sizes = [(64, 32), (64, 48), (64, 16), (32, 64)]
    sheet = drawing.draw_labelled([Image.new("RGB", size, "red") for size in sizes])
    red = (np.asarray(sheet) == (255, 0, 0)).all(2)
    scale = 632 / 64  # the long side becomes 640 - 8 pixels
    assert sheet.size == (3 * 640, round(48 * scale) + 8 + 632 + 8)
    assert red.sum() == sum(round(width * scale) * round(height * scale) for width, height in sizes)
    assert red[round(48 * scale) : round(48 * scale) + 8].sum() == 0  # the gap between the rows


def test_the_confusion_matrix_shows_counts_or_shares_of_the_row(figures, tmp_path):
    matrix = np.array([[3, 1], [0, 2]])
    for percent in (False, True):
        plots.save_confusion(matrix, ("a", "b"), tmp_path / "c.png", percent)
    cells = [{each.get_position(): each.get_text() for each in figure.axes[0].texts} for figure in figures]
    assert cells[0] == {(0, 0): "3", (1, 0): "1", (1, 1): "2"}  # by (column, row)
    assert cells[1] == {(0, 0): "75", (1, 0): "25", (1, 1): "100"}
    np.testing.assert_allclose(figures[0].axes[0].images[0].get_array(), [[0.75, 0.25], [0, 1]])


def test_of_a_thousand_class_names_some_are_shown(figures, tmp_path):
    plots.save_confusion(np.eye(1000, dtype=int), list(map(str, range(1000))), tmp_path / "c.png")
    shown = [each.get_text() for each in figures[0].axes[0].get_yticklabels()]
    assert shown == [str(label) for label in range(0, 1000, 17)]
    assert not figures[0].axes[0].texts


def fail():
    raise ValueError("broken\nfont")


@pytest.mark.parametrize("save", [save_image, plots.save_figure])
def test_a_drawing_that_raises_is_a_warning(save, tmp_path, capsys):
    path = tmp_path / "x.png"
    path.write_text("before")
    save(fail, path)
    assert capsys.readouterr().err == f"warning: cannot save {path}: ValueError: broken\n"
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_plot_that_raises_is_a_warning(tmp_path, capsys, monkeypatch):
    matrix, names = np.eye(2, dtype=int), ("a", "b")
    with monkeypatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", lambda *_, **__: fail())
        plots.save_confusion(matrix, names, tmp_path / "c.png")
    plots.save_confusion(matrix, names[:1], tmp_path / "d.png")  # the data do not fit
    plots.save_confusion_csv(matrix, names[:1], tmp_path / "d.csv")
    plots.save_curves([{"epoch": 1}], {"loss": {"loss": "train"}}, "loss", {"epoch": 1}, tmp_path / "e.png")
    plots.save_growth([], tmp_path / "f.png")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[:2] for line in lines] == [
        ["warning", f" cannot save {tmp_path / name}"] for name in ("c.png", "d.csv", "e.png", "f.png")
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"d.png"}


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "file").touch()
    save_image(Image.new("L", (8, 8)), tmp_path / "file" / "x.png")
    plots.save_figure(Figure(), tmp_path / "file" / "y.png")
    plots.save_confusion_csv(np.eye(1, dtype=int), ("a",), tmp_path / "file" / "z.csv")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("x.png", "y.png", "z.csv"), strict=True):
        assert line.startswith(f"warning: cannot write {tmp_path / 'file' / name}: ")


def test_an_interrupt_is_not_swallowed(tmp_path):
    with pytest.raises(KeyboardInterrupt), guard(tmp_path / "x.png"):
        raise KeyboardInterrupt


def test_contact_sheets_go_on_after_a_page_that_failed(tmp_path, capsys, monkeypatch):
    sheet = Sheet(tmp_path)
    image = Image.new("RGB", (8, 8))
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "fit_text", lambda *_, **__: fail())
        for _ in range(COLUMNS * ROWS):
            sheet.add(image, "f", "a", None)
    sheet.add(None, "f", "b", None)
    sheet.add(image, "f", "c", None)
    sheet.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [
        f" cannot save {tmp_path / n}" for n in ("sheet.png", "sheet-2.png")
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["sheet-2.png"]


def test_a_line_shows_the_first_of_many_names():
    names = ("sign_symbol", "bicyclist", "pedestrian", "car", "road")
    for count in range(1, 6):
        rest = f" +{5 - count}" if count < 5 else ""
        expected = ", ".join(names[:count]) + rest
        width = text.fit_text(expected, 18)[1].getlength(expected)
        assert text.fit_names(names, 18, width)[0] == expected
        if count > 1:
            assert text.fit_names(names, 18, width - 1)[0] == f"{', '.join(names[: count - 1])} +{6 - count}"
    narrow, font = text.fit_names(names, 18, 80)
    assert re.fullmatch(r"sig?n?\.\.\.b?ol \+4", narrow)
    assert font.getlength(narrow) <= 80


def test_tables_print_names_literally():
    table = table_text(("<name", "n"), [[("caf\udce9", "1"), ("a\nb", "2"), ("[red]", "3")]])
    assert [line.split() for line in table.splitlines()[2:]] == [["caf�", "1"], ["a\\nb", "2"], ["[red]", "3"]]
    table.encode()
