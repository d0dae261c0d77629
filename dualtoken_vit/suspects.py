"""Labels that are probably wrong: images that a network, which was not trained on them, gives to another class."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dualtoken_vit.data.classification import ImageDataset, build_val_dataset
from dualtoken_vit.data.contract import fingerprint
from dualtoken_vit.data.images import load_image
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_write, guard, printable
from dualtoken_vit.predictors import load_predictor, read_header, stored_recipe
from dualtoken_vit.recipes import Classification, Recipe
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.drawing import COLUMNS, ROWS, Sheet
from dualtoken_vit.tasks.run_folder import BEST


@dataclass(frozen=True)
class Suspect:
    """An image and how a network judges its label."""

    image: str
    source: Any
    """What `load_image` takes."""
    label: str
    predicted: str
    """The most likely of the other classes."""
    label_probability: float
    predicted_probability: float

    @property
    def margin(self) -> float:
        """The lower, the more suspicious: the normalised margin of confident learning (arXiv 1911.00068)."""
        return self.label_probability - self.predicted_probability


def open_runs(recipe: Recipe, runs: Sequence[Path]) -> list[tuple[Path, Classification]]:
    """The best.safetensors of each run, and the recipe it was trained with.

    Raises:
        InputError: where there is none, or the recipe or a run is of another task.
    """
    if not isinstance(recipe, Classification):
        raise InputError(f"--suspects: not available for {recipe.task}; leave it out")
    found = []
    for run in runs:
        path = run / BEST if run.is_dir() else run
        trained = stored_recipe(path, read_header(path))
        if not isinstance(trained, Classification):
            raise InputError(f"--suspects {run}: a {trained.task} run; labels of whole images can be checked only")
        found.append((path, trained))
    return found


def rank(recipe: Classification, runs: Sequence[Path]) -> list[Suspect]:
    """The images that each run held out or validated on, the most suspicious label first.

    Args:
        recipe: names the images, as for training; which of them were held out is taken from the runs
        runs: folders of training runs, or their best.safetensors

    Raises:
        InputError: for a recipe or a run of another task, a run on other images or classes, or an image that two runs
            held out.
    """
    every: set[str] = set()
    opened: list[tuple[Path, Any, ImageDataset]] = []
    for path, trained in open_runs(recipe, runs):
        data = replace(recipe.data, holdout=trained.data.holdout, fold=trained.data.fold)
        predictor: Any = load_predictor(path, top_k=len(read_header(path).class_names))
        images = build_val_dataset(data, predictor.channels, predictor.class_names)
        if not isinstance(images, ImageDataset):
            raise InputError("--suspects: not available for data that is read as a stream")
        if twice := next((name for name in images.image_names if name in every), None):
            raise InputError(
                f"--suspects {path}: another run held out {printable(twice)} too; give each another data.fold"
            )
        if predictor.preprocessing.get("held_out", known := fingerprint(images.image_names)) != known:
            raise InputError(
                f"--suspects {path}: these are not the images that it held out, so it may have been trained on them; "
                "give the data that it was trained with, or train it again"
            )
        every.update(images.image_names)
        opened.append((path, predictor, images))

    found = []
    for path, predictor, images in opened:
        results = predictor.stream(images.sources, title=f"predicting by {printable(path)}")
        for (name, source, target), one in zip(images.records(), results, strict=True):
            if one.result is None:
                continue  # unreadable, which check-data reports
            shares = dict(zip(one.result.labels.tolist(), one.result.probabilities.tolist(), strict=True))
            other = next(label for label in shares if label != target)
            asked, likely = predictor.class_names[target], predictor.class_names[other]  # as in the data
            found.append(Suspect(name, source, asked, likely, shares[target], shares[other]))
    return sorted(found, key=lambda each: each.margin)


def report(suspects: Sequence[Suspect], out: Path) -> None:
    """Print how many labels are doubtful and the first of them; write OUT/suspects.csv and OUT/suspects/sheet.png.

    The file has all images, the sheet the first ones.
    """
    rows = [
        (one.image, one.label, f"{one.label_probability:.4f}", one.predicted, f"{one.predicted_probability:.4f}")
        for one in suspects
    ]
    print(table_text(("<image", "<label", "probability", "<more likely", "probability"), [rows[:10]]))
    with atomic_write(path := out / "suspects.csv", "w") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "label_probability", "predicted", "predicted_probability"))
        writer.writerows(map(printable, row) for row in rows)  # names may have bytes that are not UTF-8
    with guard(out / "suspects"):
        sheet = Sheet(out / "suspects")
        for one in suspects[: COLUMNS * ROWS]:
            image, asked = load_image(one.source, 3, one.image), f"{one.label}: {one.predicted}?"
            sheet.add(image, Path(one.image).name, asked, one.predicted_probability)
        sheet.close()
    doubtful = sum(one.margin < 0 for one in suspects)
    print(f"{doubtful} of {len(suspects)} labels are doubtful: another class is more likely; all images are in {path}")
