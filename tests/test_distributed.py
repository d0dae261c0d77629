"""Two processes on one machine give what one gives."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from helpers import SERVER
from safetensors.torch import load_file

from dualtoken_vit import cli
from dualtoken_vit.tasks.distributed import synchronise_batchnorm

pytestmark = pytest.mark.slow

SERVER.set_forkserver_preload(["test_distributed"])


TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m")


def run(args):
    """A new interpreter with these arguments, and what it said."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=500)


def run_command(args, launcher=()):
    return run(["-m", *launcher, "dualtoken_vit.cli", *args])


def test_two_processes_give_what_one_gives(photos, tmp_path):
    """With unequal classes, weighted."""
    for path in sorted((photos / "train" / "red").iterdir())[:6]:
        path.unlink()  # 30 images in steps of 12
    next((photos / "val").rglob("*.jpg")).unlink()  # 17 images: the processes have 9 and 8
    network = "dims=(16,32,32)", "depths=(1,1,1)", "head_hidden_size=32"
    settings = {
        "data.root": photos,
        "data.image-size": 32,
        "data.workers": 0,
        "class-weights": "inverse",
        "augment.hflip": "alternate",
        "optim.batch-size": 12,
        "optim.accumulate": 2,
        "optim.epochs": 2,
        "optim.optimizer": "sgd",  # Adam would make whole steps of the rounding errors where gradients vanish
        "optim.lr": 0.05,
        "optim.ema-decay": 0.5,
        "run.device": "cpu",
    }
    args = ["train", "folder", "--model.args", *network]
    args += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    assert cli.run([*args, "--out", str(tmp_path / "one")]) == 0
    finished = run(["-m", "dualtoken_vit.cli", *args, "--out", str(tmp_path / "two"), "--run.devices", "2"])
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("epoch 2/2") == 1  # one process speaks

    one, two = (dict(torch.load(tmp_path / name / "last.ckpt")) for name in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 4
    state, other = one["current_model_state"], two["current_model_state"]
    assert state.keys() == other.keys()
    for key, value in state.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert (
        load_file(tmp_path / "one" / "best.safetensors").keys()
        == load_file(tmp_path / "two" / "best.safetensors").keys()
    )

    with open(tmp_path / "two" / "confusion.csv", newline="") as file:
        matrix = np.array([row[1:] for row in list(csv.reader(file))[1:]], dtype=int)
    counts = [len(list((photos / "val" / name).iterdir())) for name in ("blue", "green", "red")]
    assert matrix.sum(1).tolist() == counts
    assert sum(counts) == 17
    rows = [list(csv.DictReader(open(tmp_path / name / "metrics.csv"))) for name in ("one", "two")]  # noqa: SIM115
    for row, other_row in zip(*rows, strict=True):
        for key, value in row.items():
            assert float(other_row[key]) == pytest.approx(float(value), rel=1e-3, abs=1e-4), key


def test_an_error_of_the_second_process_alone_is_told(photos, tmp_path):
    script = tmp_path / "second.py"
    script.write_text(
        "import os\n"
        "from dualtoken_vit import cli\n"
        "from dualtoken_vit.errors import InputError\n"
        "from dualtoken_vit.tasks import classification\n"
        "def broken(*args): raise InputError('red/0.jpg: damaged')\n"
        "if os.environ.get('LOCAL_RANK') == '1': classification.build_datasets = broken\n"
        "cli.main()\n"
    )
    settings = ("--data.root", photos, "--data.image-size", "32", "--data.workers", "0", "--optim.batch-size", "12")
    devices = ("--run.device", "cpu", "--run.devices", "2")
    finished = run([script, "train", "folder", *settings, *devices, "--out", tmp_path / "run"])
    assert finished.returncode != 0
    assert finished.stderr.count("dualtoken-vit (rank 1): error: red/0.jpg: damaged\n") == 1
    assert "dualtoken-vit: " not in finished.stderr


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["lightning", "torchrun"])
def test_one_of_two_processes_reads_every_image(photos, tmp_path, launcher):
    broken = photos / "train" / "red" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    settings = {
        "data.root": photos,
        "data.image-size": 32,
        "data.workers": 0,
        "optim.batch-size": 12,
        "optim.epochs": 1,
        "run.device": "cpu",
        "run.devices": 2,
        "out": tmp_path / "run",
    }
    args = ["train", "folder", "--model.args", "dims=(16,32,32)", "depths=(1,1,1)", "head_hidden_size=32"]
    args += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    stopped = run_command(args, launcher)
    assert stopped.returncode != 0
    assert stopped.stderr.count("dualtoken-vit: error: ") == 1
    assert stopped.stderr.count("dualtoken-vit (rank 1): error: ") == 1
    assert stopped.stderr.count("red/0.jpg: cannot be read") == 2
    assert stopped.stderr.count("Traceback") == bool(launcher)  # torchrun's own
    assert not (tmp_path / "run").exists()
    finished = run_command([*args, "--data.unreadable", "skip"], launcher)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("skipped 1 unreadable training image") == 1
    assert finished.stdout.count("35 training and 18 validation images, 2 steps an epoch") == 1
    assert finished.stderr.count("reading every image") == 2  # training and validation
    assert torch.load(tmp_path / "run" / "last.ckpt")["global_step"] == 2


def train_steps(rank, world, folder):
    """A network with timm's batch normalisation and activation; each process sees its half of each batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).double()
    keys = list(model.state_dict())
    if world > 1:
        model = synchronise_batchnorm(model, torch.device("cpu"))
    assert list(model.state_dict()) == keys
    network = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(3, 8, 3, 32, 32, dtype=torch.double), torch.randint(3, (3, 8))
    for step in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x[step, rank::world]), y[step, rank::world]).backward()
        optimizer.step()
    model.eval()
    torch.save((model.state_dict(), model(x[0])), f"{folder}/{rank}.pt")


def in_processes(function, world, folder):
    """Call function(rank, world, folder) in processes; what each saved as RANK.pt in the folder."""
    folder.mkdir(exist_ok=True)
    processes = [SERVER.Process(target=function, args=(rank, world, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def normalise(rank, world, folder):
    """The outputs and gradients of batches of different shapes in the processes, and the running statistics."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    norm = synchronise_batchnorm(torch.nn.BatchNorm2d(4).double(), torch.device("cpu"))
    x, slope = torch.load(folder / f"input{rank}.pt")
    y = norm(x.requires_grad_())
    (y * slope).sum().backward()
    torch.save((y.detach(), x.grad, norm.running_mean, norm.running_var), f"{folder}/{rank}.pt")


def in_one_row(batches):
    """All values of batches (B, C, ...) as one batch (1, C, N)."""
    return torch.cat([batch.transpose(0, 1).flatten(1) for batch in batches], 1)[None]


def test_batch_normalisation_over_batches_of_different_shapes(tmp_path):
    """As one process would normalise all their values, which form a batch of one row."""
    torch.manual_seed(0)
    inputs = [
        (3 * torch.randn(shape).double() + 5, torch.randn(shape).double()) for shape in ((3, 4, 5, 5), (2, 4, 7, 3))
    ]
    for rank, pair in enumerate(inputs):
        torch.save(pair, tmp_path / f"input{rank}.pt")
    x, slope = (in_one_row(values) for values in zip(*inputs, strict=True))
    norm = torch.nn.BatchNorm1d(4).double()
    y = norm(x.requires_grad_())
    (y * slope).sum().backward()
    found = in_processes(normalise, 2, tmp_path)
    for expected, parts in zip((y.detach(), x.grad), list(zip(*found, strict=True))[:2], strict=True):
        torch.testing.assert_close(in_one_row(parts), expected, rtol=1e-9, atol=1e-9)
    for *_, mean, var in found:
        torch.testing.assert_close((mean, var), (norm.running_mean, norm.running_var), rtol=1e-9, atol=1e-9)


def test_batch_normalisation_over_processes_is_exact(tmp_path):
    found = {world: in_processes(train_steps, world, tmp_path / str(world)) for world in (1, 2)}
    (state, logits), *_ = found[1]
    for other, other_logits in found[2]:
        torch.testing.assert_close(other_logits, logits, rtol=1e-9, atol=1e-9)
        for key, value in state.items():
            torch.testing.assert_close(other[key], value, rtol=1e-9, atol=1e-9)
