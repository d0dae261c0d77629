"""Ctrl-C and SIGTERM as they come in practice: to all processes of a training at once."""

import os
import signal
import subprocess
import sys
from multiprocessing import get_context
from time import sleep

import pytest
import torch

from dualtoken_vit import cli
from dualtoken_vit.data.sampling import outlast_signals

# Another process signals the group before the second batch: a SIGTERM by their parent ends data loading processes
# at once. Where six batches are a step, those that end would be missed before the step is done.
SENDER = """
import os, subprocess, sys, time
from dualtoken_vit.cli import main
from dualtoken_vit.tasks.base import TaskModule

begin = TaskModule.on_train_batch_start

def send(self, images, index):
    begin(self, images, index)
    if (self.current_epoch, index) == (0, 1):
        subprocess.run(["kill", "-{number}", "--", f"-{{os.getpgrp()}}"], start_new_session=True)
        time.sleep(0.5)

TaskModule.on_train_batch_start = send
sys.argv = ["dualtoken-vit", *{args!r}]
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no groups of processes")
@pytest.mark.parametrize(
    ("number", "accumulate", "step"), [(signal.SIGTERM, 1, 2), (signal.SIGTERM, 6, 1), (signal.SIGINT, 6, 1)]
)
def test_a_signal_to_all_processes_saves_the_step(photos, tmp_path, number, accumulate, step):
    out = tmp_path / "run"
    settings = {"data.root": photos, "data.image-size": 32, "data.workers": 2, "optim.epochs": 2}
    settings |= {"optim.batch-size": 12, "optim.accumulate": accumulate, "run.device": "cpu", "out": out}
    args = ["train", "folder", *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]
    args += ["--model.args", "dims=(16,32,32)", "depths=(1,1,1)", "head_hidden_size=32"]
    command = [sys.executable, "-c", SENDER.format(number=int(number), args=args)]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 130, done.stderr
    assert last.startswith(f"dualtoken-vit: interrupted; the last good state is {out / 'last.ckpt'}")
    assert "data loading" not in done.stderr
    assert torch.load(out / "last.ckpt")["global_step"] == step
    assert cli.run([*args, "--resume"]) == 0
    assert torch.load(out / "last.ckpt")["global_step"] == 6


WORKER = """
import os, signal, sys, time
from dualtoken_vit.data import sampling
sampling.GRACE = {grace}
sampling.outlast_signals()
for number in {signals!r}:
    os.kill(os.getpid(), number)
    while signal.SIGTERM in signal.sigpending():
        time.sleep(0.01)
print("alive", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
@pytest.mark.parametrize(
    ("grace", "signals", "parent", "status"),
    [
        (60, [signal.SIGINT, signal.SIGTERM], "goes on", 0),
        (60, [signal.SIGTERM, signal.SIGTERM], "waits", -signal.SIGTERM),
        (0, [signal.SIGTERM], "waits", -signal.SIGTERM),
        (60, [], "ends it", 0),  # at once: when Python ends, it waits for its workers
    ],
)
def test_a_worker_outlasts_the_first_sigterm_that_its_parent_did_not_send(grace, signals, parent, status):
    code = WORKER.format(grace=grace, signals=[int(number) for number in signals])
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as worker:
        if parent != "waits":
            assert worker.stdout.readline() == "alive\n"
        if parent == "ends it":
            worker.terminate()
        if parent == "goes on":
            worker.stdin.close()
        assert worker.wait() == status


def outlast(ready):
    """What the process of the next test does."""
    outlast_signals()
    ready.set()
    sleep(600)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_a_worker_of_a_fork_server_ends_when_its_parent_ends_it():
    """Its parent is not the process that started it."""
    context = get_context("forkserver")
    ready = context.Event()
    worker = context.Process(target=outlast, args=(ready,))
    worker.start()
    assert ready.wait(120)
    worker.terminate()
    worker.join(50)
    assert worker.exitcode == 0  # after the grace period it would be the signal
