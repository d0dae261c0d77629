"""A task defined outside the package, registered by one line, works with every command.

The toy task is a regression: the mean brightness of an image, by one weight and one bias.
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from annotated_types import Interval
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from dualtoken_vit import cli, load_predictor
from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.data.folders import image_files
from dualtoken_vit.data.images import load_image
from dualtoken_vit.data.threads import verify_each
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import FREE, DataSection, Model, Optim, Recipe, Run
from dualtoken_vit.runtime.report import Report
from dualtoken_vit.tasks.base import Evaluation, Setup, Task, TaskModule
from dualtoken_vit.tasks.predictor import Predictor
from dualtoken_vit.tasks.registry import get_task, register

COUNTS = {"train": 24, "val": 8}
TOY = Model(name="toy")


@dataclass(frozen=True)
class BrightnessOptions:
    digits: Annotated[int, Interval(ge=0, le=6)] = 3
    """Digits of a prediction."""


@dataclass(frozen=True)
class BrightnessData(DataSection):
    root: Annotated[str, FREE] = ""
    """Folder with train/*.png and val/*.png."""
    workers: Annotated[int, Interval(ge=0), FREE] = 0


@dataclass(frozen=True)
class Brightness(Recipe):
    """A run of the toy task."""

    task: ClassVar[str] = "brightness"
    model: Model = TOY
    data: BrightnessData = BrightnessData()


class BrightnessDataset(Dataset, ImageData):
    """Sample i is (image (3, H, W) in [0, 1], its mean)."""

    class_names = ("brightness",)

    def __init__(self, root: str, split: str):
        self.image_names = image_files(Path(root, split))
        if not self.image_names:
            raise InputError(f"--data.root {root}: no images in {split}")

    def __len__(self) -> int:
        return len(self.image_names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = pil_to_tensor(load_image(self.image_names[index])) / 255
        return image, image.mean()

    def verify(self, skip: bool = False) -> list[str]:
        verify_each(self.__getitem__, range(len(self)), len(self), "reading every image")
        return []


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.pretrained_cfg = {"architecture": "toy"}

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B,)
        return self.line(x.mean((1, 2, 3))[:, None])[:, 0]


class BrightnessReport(Report[float]):
    columns = ("brightness",)

    def entry(self, result: float) -> dict[str, Any]:
        return {"brightness": result}

    def rows(self, result: float) -> list[tuple[str]]:
        return [(f"{result}",)]

    def draw(self, title, image, result):
        return image, image, (title, result)


class BrightnessPredictor(Predictor[float]):
    Options = BrightnessOptions
    report = BrightnessReport

    def preprocess(self, image: Image.Image) -> Tensor:
        return pil_to_tensor(image) / 255

    def collate(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs)

    def forward(self, batch: Tensor) -> Tensor:
        return self.model(batch.to(self.device))

    def postprocess(self, outputs: Tensor) -> list[float]:
        return [round(value, self.options.digits) for value in outputs.tolist()]


class BrightnessModule(TaskModule):
    score = "closeness"
    panels: ClassVar = {"loss": {"train_loss": "training", "val_loss": "validation"}}
    pause = 0.0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.pause)
        images, target = batch
        return (self.model(images) - target).square().mean()

    def on_validation_epoch_start(self) -> None:
        self.errors: list[Tensor] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, target = batch
        self.errors += (self.predictor.forward(images) - target).abs()

    def evaluate(self) -> Evaluation:
        error = torch.stack(self.errors).mean().item()
        return Evaluation(
            scores={"loss": error, "closeness": -error},
            metrics={"error": round(error, 6), "images": len(self.errors)},
            headline=f"error {error:.3f}",
        )


class BrightnessTask(Task[Brightness]):
    name = "brightness"
    recipe = Brightness
    predictor = BrightnessPredictor
    data_flags = "--data.root DIR"

    def prepare(self, recipe: Brightness, start: Model) -> Setup:
        train, val = (BrightnessDataset(recipe.data.root, split) for split in COUNTS)
        model, preprocessing = Network(), {"input_size": (3, 16, 16)}
        predictor = BrightnessPredictor(model, train.class_names, preprocessing, BrightnessOptions())
        return Setup("a line", BrightnessModule(predictor, recipe), train, val, model_args={})

    def rebuild(self, checkpoint) -> nn.Module:
        return Network()

    def evaluation(self, predictor, recipe: Brightness):
        return BrightnessModule(predictor, recipe), BrightnessDataset(recipe.data.root, "val")

    def check_data(self, recipe: Brightness, out: Path, augmented: bool = False) -> bool:
        for split in COUNTS:
            print(f"{split}: {len(BrightnessDataset(recipe.data.root, split))} images")
        return True


RECIPE = Brightness(
    optim=Optim(lr=0.05, batch_size=4, epochs=20, warmup_epochs=0, weight_decay=0), run=Run(save_every=1)
)

register(BrightnessTask(), {"brightness": ("The mean brightness of images.", RECIPE)})


def call(*args) -> int:
    return cli.run([str(arg) for arg in args])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("brightness"), np.random.default_rng(0)
    for split, count in COUNTS.items():
        (root / split).mkdir()
        for index in range(count):
            pixels = rng.integers(0, rng.integers(2, 256), (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def best(root):
    assert call("train", "brightness", "--data.root", root, "--out", root / "run") == 0
    return root / "run" / "best.safetensors"


def brightness(path: Path) -> float:
    """By numpy alone."""
    return np.asarray(Image.open(path), dtype=float).mean() / 255


def test_it_trains_and_evaluates(root, best, capsys):
    assert call("evaluate", best, "--json", "--device", "cpu", "--data.workers", 0) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    line = load_file(best)
    errors = [
        abs(line["line.weight"].item() * value + line["line.bias"].item() - value)
        for value in map(brightness, (root / "val").iterdir())
    ]
    assert found == {"error": pytest.approx(np.mean(errors), abs=1e-5), "images": COUNTS["val"]}
    assert found["error"] < 0.1  # untrained: about 0.5


def test_it_predicts(root, best, tmp_path, capsys):
    assert (
        call("predict", best, root / "val", "--out", tmp_path / "out", "--digits", 2, "--json", "--device", "cpu") == 0
    )
    found = {Path(one["image"]).name: one["brightness"] for one in json.loads(capsys.readouterr().out)["predictions"]}
    predictor = load_predictor(best, "cpu", digits=2)
    for path in (root / "val").iterdir():
        assert found[path.name] == predictor(path) == pytest.approx(brightness(path), abs=0.15)
        assert (tmp_path / "out" / "val" / f"{path.name}.png").is_file()
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_its_options_are_checked(best):
    with pytest.raises(InputError, match=r"^--digits 9: must be at most 6$"):
        load_predictor(best, "cpu", digits=9)
    with pytest.raises(InputError, match=r"^top_k: not an option of this predictor; there are digits$"):
        load_predictor(best, "cpu", top_k=1)


def test_its_data_is_checked(root, capsys):
    assert call("check-data", "brightness", "--data.root", root) == 0
    assert "train: 24 images\nval: 8 images\n" in capsys.readouterr().out


def test_it_is_killed_and_resumed(root, best, tmp_path):
    """kill -9 in the middle of an epoch; the resumed run ends with the weights of the uninterrupted one."""
    run = [
        sys.executable,
        __file__,
        "train",
        "brightness",
        "--data.root",
        root,
        "--out",
        tmp_path,
        "--run.device",
        "cpu",
    ]
    process = subprocess.Popen([*map(str, run)], stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not (tmp_path / "last.ckpt").exists() or torch.load(tmp_path / "last.ckpt")["global_step"] < 3:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(tmp_path / "last.ckpt")["global_step"]
    assert 3 <= step < 120
    assert call(*run[2:], "--resume") == 0
    resumed, whole = load_file(tmp_path / "best.safetensors"), load_file(best)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_an_unknown_task_is_named():
    known = "classification, multilabel, detection, segmentation"
    with pytest.raises(InputError, match=f"task 'poetry' is unknown; there are {known}"):
        get_task("poetry")


if __name__ == "__main__":
    BrightnessModule.pause = 0.2
    cli.main()
