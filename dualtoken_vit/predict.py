"""The command `predict`: run a trained network on image files, print and draw its predictions.

Exported files need neither PyTorch nor the train extra.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import islice
from json import dump, dumps
from math import ceil
from os.path import realpath  # Path.resolve fails on a link to itself
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import dualtoken_vit
from dualtoken_vit.data.folders import scan, skipped_note
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, counted, guard, kept, printable, write_json
from dualtoken_vit.runtime.base import BasePredictor
from dualtoken_vit.runtime.predictor import load_predictor as load_exported
from dualtoken_vit.runtime.report import Report
from dualtoken_vit.runtime.session import is_exported
from dualtoken_vit.show.drawing import COLUMNS, ROWS, Sheet, save_image, sheet_name
from dualtoken_vit.show.video import Video, VideoWriter, is_video

LONGEST = 200  # bytes of a name, without what is added: ".labels.png", ".stages.2.blocks.3.npy", ".tmp", a number
RECORD = "predictions.json"  # marks a folder as one that `predict` wrote


class Source(NamedTuple):
    """An image file, and where its drawings go."""

    path: Path
    place: str  # relative to the output folder, without the suffix


def predict(
    checkpoint: Path,
    images: tuple[Path, ...],
    out: Path | None = None,
    json: bool = False,
    batch_size: int | None = None,
    **options: Any,
) -> bool:
    """Print a table, or one JSON object, of a network's predictions for image files; draw them with `out`.

    Args:
        images, out, json, batch_size: as on the command line, `arguments.Predict`
        checkpoint, options: as for `load_predictor`

    Returns:
        Whether every image could be used; the others are named on stderr.

    Raises:
        InputError: where there is no image, none can be used (without `json`), or `out` holds other files.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    if any(map(is_video, images)):
        return _predict_video(checkpoint, images, out, json, batch_size, options)
    predictor = _load(checkpoint, options)
    report = predictor.report(predictor)
    sources = find_images(images, out, suffixes=report.suffixes)

    record: dict[str, Any] = {"checkpoint": str(checkpoint), **report.record(), "unreadable": []}
    sheet = Sheet(out) if out and len(sources) > 1 else None
    older = files_in(out) if out else set()
    begun = out is not None and not (out / RECORD).exists()
    if out and begun:  # else a run that is cut short leaves a folder that the next one rejects
        write_json(record, out / RECORD)
    stream = predictor.stream([source.path for source in sources], batch_size, "predicting")
    with kept(partial(_finish, record, report, out, json), report.table), closing(stream) as predictions:
        for source, prediction in zip(sources, predictions, strict=True):
            if prediction.image is None or prediction.error is not None:
                record["unreadable"].append({"image": str(source.path), "reason": str(prediction.error)})
                continue
            report.add(source.path, prediction.image, prediction.result)
            if out:
                for suffix, image in report.files(prediction.result).items():
                    with atomic_write(out / f"{source.place}{suffix}") as file:
                        image.save(file, "PNG")
                with guard(place := out / f"{source.place}.png"):
                    drawing, small, caption = report.draw(source.path.name, prediction.image, prediction.result)
                    save_image(drawing, place)
                    if sheet:
                        sheet.add(small, source.path.name, *caption)
                older.difference_update(os.path.abspath(out / f"{source.place}{suffix}") for suffix in report.suffixes)
    if len(record["unreadable"]) == len(sources) and not json:
        if out and begun:
            with suppress(OSError):
                (out / RECORD).unlink()
        raise InputError(none_readable(record["unreadable"]))
    if sheet:
        sheet.close()
        older.difference_update(os.path.abspath(sheet.folder / sheet_name(page)) for page in range(1, sheet.page))

    _finish(record, report, out, json)
    if out:
        tell_older(out, older, [out / RECORD, *(each.path for each in sources)])
    return tell_unreadable(record["unreadable"], len(sources))


def _finish(record: dict[str, Any], report: Report, out: Path | None, json: bool) -> None:
    """Print what was predicted, then write it: the disk may be full."""
    record |= report.record()
    if json:
        dump(record, sys.stdout)
        print()
    else:
        print_table(report)
    if out:
        write_json(record, out / RECORD)


def _load(checkpoint: Path, options: dict[str, Any]) -> BasePredictor[Any]:
    """`load_predictor`, without PyTorch for an exported file."""
    load = load_exported if is_exported(checkpoint) else dualtoken_vit.load_predictor
    return load(checkpoint, **options)


def _predict_video(
    checkpoint: Path,
    videos: tuple[Path, ...],
    out: Path | None,
    json: bool,
    batch_size: int | None,
    options: dict[str, Any],
) -> bool:
    """Predict for each frame of a video; with `out`, draw the frames as a video, and write a line of JSON for each."""
    if len(videos) > 1:
        raise InputError(f"{videos[0]} and {videos[1]}: give one video or camera, and no images beside it")
    if out is None and not json:
        raise InputError(f"{printable(videos[0])}: there is no table of a video; give --out FILE.mp4 or --json")
    if out is not None and realpath(out) == realpath(videos[0]):
        raise InputError(f"--out {out}: is the video that is read; name another file")
    record = out and out.parent / f"{out.stem}.jsonl"
    if out and record and out.is_file() != record.is_file():  # both are those of an earlier run
        there = out if out.is_file() else record
        raise InputError(f"--out {out}: {there} exists and is not from an earlier run; name another file")
    video = Video(videos[0])
    predictor = _load(checkpoint, options)
    report = predictor.report(predictor)
    count, problems = 0, []

    def read() -> Iterator[tuple[float, Image.Image]]:
        try:
            yield from video
        except InputError as error:  # raised here, it would lose the frames of the batch
            problems.append(error)

    with ExitStack() as stack:
        lines = stack.enter_context(atomic_write(record, "w")) if record else None
        writer = stack.enter_context(VideoWriter(out, video.rate)) if out else None  # ends first: it may fail then
        frames = read()
        with suppress(ModuleNotFoundError):  # without the train extra, no progress bar
            from dualtoken_vit.data.threads import track

            frames = stack.enter_context(closing(track(frames, video.frames, "predicting")))  # ends the bar
        try:
            while batch := list(islice(frames, 1 if video.camera else batch_size or predictor.batch_size)):
                results = predictor([image for _, image in batch])
                for (seconds, image), result in zip(batch, results, strict=True):
                    line = dumps({"frame": count, "seconds": round(seconds, 6), **report.entry(result)})
                    if lines:
                        lines.write(f"{line}\n")
                    if json:
                        print(line, flush=video.camera)
                    if writer and out:
                        page = image
                        with guard(out):
                            page = report.draw(f"{seconds:.2f} s", image, result)[0]
                        writer.add(seconds, page)
                    count += 1
        except KeyboardInterrupt:  # how a camera ends
            if not (video.camera and count):
                raise
            print(f"stopped after {counted(count, 'frame')}", file=sys.stderr)
        if not count:
            raise problems[0] if problems else InputError(f"{video.name}: has no frames")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not json:
        print(f"{counted(count, 'frame')}: {out}, {record}")
    return not problems


def print_table(report: Report[Any]) -> None:
    """Print a report's table; where it is wider than the terminal, the paths have lines of their own."""
    width: Callable[[str], int] = len
    with suppress(ModuleNotFoundError):  # without the train extra, one cell for each character
        from rich.cells import cell_len as width
    titles = "image", *report.columns
    widths = [*map(width, titles)]
    for path, rows in report.table:
        for row in rows:
            widths = [max(pair) for pair in zip(widths, map(width, map(printable, (path, *row))), strict=True)]
    alone = sum(widths) + 2 * len(report.columns) > shutil.get_terminal_size().columns
    widths[0] = 0 if alone else widths[0]

    def show(name: str, *cells: str) -> None:
        if alone and name:
            print(name)
            name = ""
        row = name, *cells
        spaces = [" " * (most - width(cell)) for most, cell in zip(widths, row, strict=True)]
        aligned = (
            f"{s}{c}" if number > 1 else f"{c}{s}" for number, (c, s) in enumerate(zip(row, spaces, strict=True))
        )
        print("  ".join(aligned).rstrip())

    show(*titles)
    show(*("-" * most for most in widths))
    for path, rows in report.table:
        for number, row in enumerate(rows):
            show("" if number else printable(path), *map(printable, row))


def none_readable(unreadable: list[dict[str, str]]) -> str:
    """The message where all images are unreadable."""
    others = f"none of the {len(unreadable)} images can be read; the first: " if len(unreadable) > 1 else ""
    return others + unreadable[0]["reason"]


def tell_unreadable(unreadable: list[dict[str, str]], total: int) -> bool:
    """Name the unreadable images on stderr; returns whether there are none."""
    for one in unreadable:
        print(one["reason"], file=sys.stderr)
    if unreadable:
        print(f"{len(unreadable)} of {total} images could not be read", file=sys.stderr)
    return not unreadable


def files_in(folder: Path) -> set[str]:
    """The absolute paths of the files in and below a folder, hidden files and folders left out."""
    found: set[str] = set()
    for place, folders, names in os.walk(os.path.abspath(folder)):
        folders[:] = [name for name in folders if not name.startswith(".")]  # the others are not entered
        found |= {os.path.join(place, name) for name in names if not name.startswith(".")}
    return found


def tell_older(out: Path, before: set[str], known: Iterable[str | Path]) -> None:
    """Report on stderr the files of earlier runs in a folder, those `before` except `known` ones."""
    if older := before - set(map(os.path.abspath, known)):
        example = printable(os.path.relpath(min(older), os.path.abspath(out)))
        print(
            f"{out} has older files, which this run did not write: {len(older)}, for example {example}", file=sys.stderr
        )


def find_images(
    images: tuple[Path, ...], out: Path | None = None, record: str = RECORD, suffixes: tuple[str, ...] = (".png",)
) -> list[Source]:
    """The files among `images` and the images in the folders among them, each once, in order.

    One line on stderr reports the other files in the folders. Drawings are named after the images, x.jpg.png for x.jpg,
    in the folders' own tree; a number is added where a name would be that of another drawing or of an image.

    Args:
        out: output folder, which is not searched; it must be new or empty, or have the file `record`
        record: marks a folder as the command's own
        suffixes: of the files that are written for an image

    Raises:
        InputError: where something does not exist, nothing is found, or `out` holds other files.
    """
    _check_out(out, images, record)
    found: dict[str, tuple[Path, Path]] = {}  # absolute path: as given, place in the output
    skipped: dict[str, str] = {}  # the same of files that are not images
    for given in images:
        if given.is_dir():
            inside, others = (
                [path for path in map(Path, paths) if not (out and _is_in(path, out))] for paths in scan(given)
            )
            skipped |= {os.path.abspath(path): str(path) for path in others}
            if not inside:
                raise InputError(f"{given}: no images in this folder")
            base = Path(realpath(given)).name
            for path in inside:
                found.setdefault(os.path.abspath(path), (path, base / path.relative_to(given)))
        elif given.exists():
            found.setdefault(os.path.abspath(given), (given, Path(given.name)))
        else:
            raise InputError(f"{given}: no such file or folder")
    if not found:
        raise InputError("no images given; name image files or folders of them")
    if unused := [path for key, path in skipped.items() if key not in found]:
        print(skipped_note(unused), file=sys.stderr)

    taken = {sheet_name(page + 1) for page in range(ceil(len(found) / (COLUMNS * ROWS)))}
    sources = []
    for path, below in found.values():
        below = below.with_name(_shortened(below.name))
        number, place = 1, str(below)
        while any(
            name.casefold() in taken or (out and os.path.abspath(out / name) in found)
            for name in (f"{place}{suffix}" for suffix in suffixes)
        ):
            number += 1
            place = f"{below}-{number}"
        taken |= {f"{place}{suffix}".casefold() for suffix in suffixes}
        sources.append(Source(path, place))
    return sources


def _shortened(name: str) -> str:
    """A file name that suffixes can be added to: file systems take 255 bytes."""
    if len(os.fsencode(name)) <= LONGEST:
        return name
    stem, suffix = os.path.splitext(name)
    return stem.encode(errors="ignore")[: LONGEST - len(suffix)].decode(errors="ignore") + suffix


def _is_in(path: Path, folder: Path) -> bool:
    return Path(realpath(path)).is_relative_to(realpath(folder))


def _check_out(out: Path | None, images: tuple[Path, ...], record: str) -> None:
    """Reject an output folder that is not this command's own: none of the user's files may be overwritten there."""
    if out is None or not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out}: a file; name a folder")
    if any(given.is_dir() and _is_in(given, out) for given in images):
        raise InputError(f"--out {out}: the images are read from there; name another folder")
    if any(out.iterdir()) and not (out / record).exists():
        raise InputError(
            f"--out {out}: the folder holds other files; name a new one, for example {out / Path(record).stem}"
        )
