"""What depends on the device of a run, with stand-ins for devices that the machine of the tests lacks."""

from dataclasses import replace
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import nn
from torch.utils.data import DataLoader

from dualtoken_vit import evaluation
from dualtoken_vit.data.contract import ImageData
from dualtoken_vit.errors import lacks_memory
from dualtoken_vit.evaluation import evaluate
from dualtoken_vit.paper.study import PRESETS
from dualtoken_vit.recipes import RECIPES
from dualtoken_vit.tasks import progress
from dualtoken_vit.tasks.loaders import Loaders
from dualtoken_vit.tasks.optim import Average
from dualtoken_vit.tasks.predictor import Predictor
from dualtoken_vit.tasks.registry import get_task


def trainer(device):
    """What callbacks and loaders ask of a Trainer on this device."""
    module = SimpleNamespace(collate=None)
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, global_rank=0, world_size=1, lightning_module=module)


def test_the_average_is_on_the_device_of_the_run():
    """Lightning sets callbacks up before it moves the network there."""
    module = lightning.LightningModule()
    module.layer = nn.Linear(2, 2)
    average = Average(0.99)
    average.setup(trainer("meta"), module, "fit")
    assert {each.device.type for each in average._average_model.module.parameters()} == {"meta"}
    assert module.layer.weight.device.type == "cpu"


@pytest.mark.parametrize(("device", "pinned"), [("cuda:1", True), ("cpu", False), ("mps", False)])
def test_batches_are_pinned_for_cuda_alone(device, pinned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaders = Loaders([1, 2], [3, 4], RECIPES["folder"], 2, resumed=False)
    loaders.trainer = trainer(device)
    assert loaders.val_dataloader().pin_memory is pinned


class Images(ImageData):
    def __len__(self):
        return 4


def test_memory_is_pinned_before_workers_are_forked(monkeypatch):
    """A thread that did it first while they are forked would leave them a lock that nobody releases."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append("pinned"))
    monkeypatch.setattr(DataLoader, "__iter__", lambda self: iter([seen.append("forked")]))
    folder = RECIPES["folder"]
    made = replace(folder, data=replace(folder.data, workers=2), optim=replace(folder.optim, batch_size=2))
    loaders = Loaders(Images(), Images(), made, 2, resumed=False)
    loaders.trainer = trainer("cuda:1")
    loop = SimpleNamespace(restarting=False)
    loaders.trainer.fit_loop, loaders.trainer.current_epoch = loop, 0
    loaders.trainer.lightning_module.prepare_epoch = None
    loaders.train_dataloader()
    assert seen == ["pinned", "forked"]


def test_an_evaluation_runs_on_the_gpu_that_was_given(trained, monkeypatch):
    given = {}

    def refuse(**options):
        given.update(options)
        raise ValueError("no such device")

    monkeypatch.setattr(evaluation.lightning, "Trainer", refuse)
    monkeypatch.setattr(Predictor, "device", property(lambda self: torch.device("cuda:1")))
    with pytest.raises(Exception, match="no such device"):
        evaluate(trained[1] / "best.safetensors")
    assert (given["accelerator"], given["devices"]) == ("cuda", [1])


def test_the_study_for_one_gpu_takes_one():
    assert PRESETS["gpu"][1].recipe.run.devices == 1


def test_the_loss_is_read_as_often_as_it_is_drawn(monkeypatch):
    """Ten times a second: to read it, the CPU waits for the GPU."""
    read, now = [], 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(RichProgressBar, "get_metrics", lambda *args: read.append(now) or {"loss": now, "v_num": 0})
    bar = progress.ProgressBar()
    shown = []
    for now in (1.0, 1.05, 1.101, 1.15, 1.3):  # noqa: B007  which `monotonic` returns
        shown.append(bar.get_metrics(None, None))
    assert read == [1.0, 1.101, 1.3]
    assert [each["loss"] for each in shown] == [1.0, 1.0, 1.101, 1.101, 1.3]
    assert shown[0].keys() == {"loss"}


@pytest.mark.parametrize("device", ["mps", "cuda:0", "cpu"])
def test_pixels_are_counted_on_the_cpu_for_mps(device, monkeypatch):
    made = RECIPES["demo-segment"]
    made = replace(made, data=replace(made.data, limit=4))
    task, moved = get_task(made.task).prepare(made, made.model).module, []
    monkeypatch.setattr(type(task.metric), "cpu", lambda metric: moved.append(metric))
    task._device = torch.device(device)
    task.on_validation_start()
    assert moved == [task.metric] * (device == "mps")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "MPS backend out of memory (MPS allocated: 8.00 GiB)",
        "Invalid buffer size: 62.59 GiB",
    ],
)
def test_errors_for_lack_of_memory(message):
    assert lacks_memory(RuntimeError(message))
