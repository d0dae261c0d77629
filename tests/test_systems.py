"""What Windows does otherwise, as far as it can be tried elsewhere."""

import ntpath
import os
import random
from contextlib import nullcontext
from pathlib import PureWindowsPath

import pytest

from dualtoken_vit import files
from dualtoken_vit.data.contract import hold_out
from dualtoken_vit.data.folders import natural
from dualtoken_vit.errors import InputError


@pytest.fixture
def windows(monkeypatch):
    """No locks, and a `replace` that takes the place of no folder, nor of a file that another program has open.

    The test appends one entry for each time that it is open.
    """
    replace, open_elsewhere = os.replace, []

    def refusing(source, target):
        if open_elsewhere:
            raise open_elsewhere.pop()
        if os.path.isdir(target):
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "replace", refusing)
    return open_elsewhere


@pytest.mark.parametrize(("times", "written"), [(0, "new"), (10, "new"), (11, "old")])
def test_a_file_that_another_program_has_open(windows, tmp_path, times, written):
    path = tmp_path / "metrics.csv"
    path.write_text("old")
    windows += [PermissionError(13, "Access is denied")] * times
    refused = pytest.raises(InputError, match=r"Access is denied; the file that was there is kept$")
    with refused if written == "old" else nullcontext(), files.atomic_write(path, "w") as file:
        file.write("new")
    assert path.read_text() == written
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_folder_is_replaced(windows, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with files.atomic_folder(out) as folder:
        (folder / "a.txt").write_text("a")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/a.txt"]


def test_paths_in_results_have_slashes(monkeypatch):
    monkeypatch.setattr(os.path, "relpath", ntpath.relpath)
    monkeypatch.setattr(files, "Path", PureWindowsPath)
    assert files.relative(r"C:\photos\train\cat\1.jpg", r"C:\photos") == "train/cat/1.jpg"
    with pytest.raises(InputError, match=r"^D:\\1.jpg is on another drive than C:\\photos; move one of them$"):
        files.relative(r"D:\1.jpg", r"C:\photos")


def test_the_images_held_out_and_their_order_are_the_same(monkeypatch):
    names = [f"{folder}/{number}.jpg" for folder in ("a", "a_b", "aB", "a-1", "a0", "a00") for number in range(12)]
    random.Random(0).shuffle(names)
    held, ordered = {names[index] for index in hold_out(names, 0.2, held=True)}, sorted(names, key=natural)
    monkeypatch.setattr(os, "sep", "\\")
    windows = [name.replace("/", "\\") for name in names]
    assert {windows[index].replace("\\", "/") for index in hold_out(windows, 0.2, held=True)} == held
    assert [name.replace("\\", "/") for name in sorted(windows, key=natural)] == ordered
