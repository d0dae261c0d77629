"""What `predict` keeps of many images: little in memory, and the same output as of all at once."""

import json
import os
import re
import tracemalloc
import unicodedata
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dualtoken_vit.files import Spool, write_json
from dualtoken_vit.predict import print_table
from dualtoken_vit.results import Classes, LabelMap, Labels, Objects
from dualtoken_vit.runtime.report import ClassesReport, LabelMapReport, LabelsReport, ObjectsReport

NAMES = ("ant", "bee 蜂", "cat [x]")
PREDICTOR = SimpleNamespace(category_ids=(3, 5, 7), class_names=NAMES)
IMAGE = Image.new("RGB", (40, 30))
KINDS = ClassesReport, LabelsReport, ObjectsReport, LabelMapReport
BOXES = np.array([[1, 2, 11, 22], [0, 0, 5, 5.5]], dtype=np.float32)


def result(kind, index):
    shares = np.array([1, 0.5], dtype=np.float32) / (index + 1)
    labels, names = np.array([2, 0]), (NAMES[2], NAMES[0])
    if kind is ClassesReport:
        return Classes(names, labels, shares)
    if kind is LabelsReport:
        return Labels(names[: index % 3], labels[: index % 3], shares[: index % 3], shares)
    if kind is ObjectsReport:
        return Objects(names, labels, BOXES, shares)
    return LabelMap(NAMES, np.full((6, 7), index % 3, dtype=np.uint8))


def add(report, numbers):
    for number in numbers:
        report.add(Path(f"folder {number % 7}/{'ä' * (number % 30)}{number}.png"), IMAGE, result(type(report), number))


@pytest.mark.parametrize("kind", KINDS)
def test_images_take_little_memory(kind):
    report = kind(PREDICTOR)
    with open(os.devnull, "w") as nowhere:
        for numbers in range(300), range(300, 900):  # the first fill the buffers
            tracemalloc.start()
            add(report, numbers)
            json.dump(report.record(), nowhere)
            kept, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert kept < 150_000  # bytes; plain lists need a million
    assert most < 300_000


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_every_image(kind):
    """By its length `predict` knows whether there are results to keep."""
    report = kind(PREDICTOR)
    assert len(report.table) == 0
    add(report, range(3))
    assert len(report.table) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_is_that_of_plain_lists(kind, tmp_path):
    report = kind(PREDICTOR)
    empty = {key: [] if isinstance(value, Spool) else value for key, value in report.record().items()}
    write_json(report.record(), tmp_path / "empty.json")
    assert (tmp_path / "empty.json").read_text() == json.dumps(empty, indent=2)
    add(report, range(300))
    plain = {key: list(value) for key, value in report.record().items()}
    assert max(map(len, plain.values())) >= 300
    write_json(report.record(), tmp_path / "whole.json")
    assert (tmp_path / "whole.json").read_text() == json.dumps(plain, indent=2)
    json.dump(report.record(), stream := StringIO())
    assert stream.getvalue() == json.dumps(plain)


@pytest.mark.parametrize("columns", [40, 60, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_every_row_in_aligned_columns(kind, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    report = kind(PREDICTOR)
    add(report, range(203))
    print_table(report)
    lines = [*map(grid, capsys.readouterr().out.splitlines())]
    rule = next(number for number, line in enumerate(lines) if set(line) == {"-", " "})
    assert " ".join(lines[:rule]).split() == ["image", *" ".join(report.columns).split()]
    spans = [match.span() for match in re.finditer("-+", lines[rule])]
    alone = len(spans) == len(report.columns)  # the paths have lines of their own
    assert alone == (columns < 200)
    found: list[tuple[str, list[list[str]]]] = []
    for line in lines[rule + 1 :]:
        if line[0] != " ":
            found.append((line if alone else line[: spans[0][1]].strip(), []))
        if line[0] == " " or not alone:
            assert len(line) <= columns
            assert all(line[end : end + 2].strip() == "" for _, end in spans)
            found[-1][1].append([line[slice(*span)].strip() for span in spans[not alone :]])
    assert found == [(path, [[*map(grid, row)] for row in rows]) for path, rows in report.table]


def grid(text):
    """One character for each cell of a terminal: a wide one and a full stop for its second cell."""
    return "".join(f"{each}." if unicodedata.east_asian_width(each) in "WF" else each for each in text)
