"""Processes killed at any time: a resumed run ends as one that was not, and a file is whole or not there."""

import filecmp
import os
import shutil
import socket
import time
from pathlib import Path
from random import Random

from test_resume import assert_same_run

from campaign.core import Case, Outcome, Verdict, command, finish, kill_after, run, start
from campaign.world import TASKS, best, study, training

FILES = {"classification": ("metrics.csv", "confusion.csv", "recipe.json")}


def launch(args: list[str], folder: Path, processes: int) -> list[int]:
    """The program in one process, or in several as torchrun starts them."""
    if processes == 1:
        return [start(command, *args, folder=folder)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"TORCHELASTIC_RUN_ID": "campaign", "GROUP_RANK": 0}
    more = "--run.devices", str(processes)
    envs = (
        {key: str(value) for key, value in (common | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(processes)
    )
    return [start(command, *args, *more, folder=folder, env=env) for env in envs]


def whole(world: Path, task: str, processes: int) -> tuple[Path, float]:
    """The folder of an uninterrupted run, and the CPU seconds of its first process."""
    folder = world / "whole" / f"{task}-{processes}"
    if not (folder / "seconds").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        pids = launch(training(task, world, folder / "run"), folder, processes)
        ended = [finish(pid, folder, 300) for pid in pids]
        assert all(one.status == 0 for one in ended), ended[0].err
        (folder / "seconds").write_text(str(ended[0].seconds))
    return folder / "run", float((folder / "seconds").read_text())


def same_run(found: Path, expected: Path, files: tuple[str, ...]) -> str:
    """How a run differs from another one; "" if not in a bit."""
    try:
        assert_same_run(found, expected, ("state_dict", "optimizer_states"), files)
    except AssertionError as error:
        return f"differs from the uninterrupted run: {str(error)[:200]}"
    return ""


def training_run(task: str, processes: int = 1) -> Case:
    """A training that is killed, perhaps twice, and resumed to its end."""

    def case(rng: Random, world: Path, folder: Path) -> Verdict:
        expected, seconds = whole(world, task, processes)
        out, stages = folder / "run", []
        for _ in range(rng.choice([1, 1, 2])):
            resume = ("--resume",) if (out / "recipe.json").exists() else ()
            pids = launch(training(task, world, out, *resume), folder, processes)
            kill_after(pids, rng.uniform(0, seconds))
            ended = [finish(pid, folder) for pid in pids]
            if fault := next((one.fault for one in ended if one.status != -9 and one.fault), ""):
                return Verdict(f"{task}, {processes} processes", "killed", "?", fault)
            saved = sorted(path.name for path in out.iterdir()) if out.exists() else []
            stages.append(
                "saved "
                + ", ".join(name for name in saved if name in ("last.ckpt", "best.safetensors", ".last.ckpt.tmp"))
            )
        time.sleep(1.1)  # TensorBoard orders files of events by the second
        pids = launch(training(task, world, out, "--resume"), folder, processes)
        ended = [finish(pid, folder) for pid in pids]
        fault = next((one.fault or f"status {one.status}: {one.message}" for one in ended if one.status), "")
        if not fault:
            fault = same_run(out, expected, FILES.get(task, ("metrics.csv", "recipe.json")))
        began = "resumed from a save" if " last.ckpt" in "".join(stages) else "begun again"
        return Verdict(f"{task}, {processes} process{'es' * (processes > 1)}", "; ".join(stages), began, fault)

    return case


def _commands(world: Path) -> dict[str, list[str]]:
    """Commands that write into OUT."""
    return {
        "predict": ["predict", str(best(world, "classification")), str(world / "photos"), "--out", "OUT"],
        "convert": ["convert", str(world / "objects"), "OUT", "--to", "voc"],
        "export": ["export", str(best(world, "classification")), "--out", "OUT/model.onnx"],
        "study": study(world, "OUT"),
    }


def output(name: str) -> Case:
    """A command whose output is a folder: killed, then repeated."""

    def case(rng: Random, world: Path, folder: Path) -> Verdict:
        args = _commands(world)[name]
        reference = world / "whole" / name
        if not (reference / "seconds").exists():
            shutil.rmtree(reference, ignore_errors=True)
            reference.mkdir(parents=True)
            ended = run(*(arg.replace("OUT", str(reference / "out")) for arg in args), folder=reference, limit=300)
            assert ended.status == 0, ended.err
            (reference / "seconds").write_text(str(ended.seconds))
        out, seconds = folder / "out", float((reference / "seconds").read_text())
        args = [arg.replace("OUT", str(out)) for arg in args]
        pid = start(command, *args, folder=folder)
        kill_after([pid], rng.uniform(0, seconds))
        ended = finish(pid, folder, 300)
        fault = ended.fault if ended.status != -9 else ""
        fault = fault or ("" if name == "study" else _half_written(out, reference / "out"))
        there = len(_tree(out))
        again = Outcome(0)
        if name == "convert" and out.exists():
            shutil.rmtree(out)  # it was finished
        if not fault:
            again = run(*args, folder=folder, limit=300)
            fault = again.fault or (again.message if again.status else "")
        if not fault and name != "study":
            missing = _tree(reference / "out") ^ _tree(out)
            fault = (
                f"other files than without a kill: {sorted(missing)[:5]}"
                if missing
                else _half_written(out, reference / "out")
            )
        return Verdict(name, f"killed with {there} files", "complete" if there else "nothing written", fault)

    return case


def _tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _half_written(found: Path, expected: Path) -> str:
    """Visible files that are not as a whole run writes them; records of a run in progress may be shorter."""
    for name in sorted(_tree(found) & _tree(expected)):
        same = filecmp.cmp(found / name, expected / name, shallow=False)
        if not same and not name.endswith((".json", ".onnx", ".xml")) and os.path.basename(name)[0] != ".":
            return f"{name} is not complete"
        if not same and name.endswith(".onnx"):
            import onnx

            onnx.checker.check_model(onnx.load(found / name))
    return ""


CASES: list[Case] = [  # 100 trainings, and 20 of each other command
    *(training_run(task) for task in TASKS),
    *(output(name) for name in ("predict", "convert", "export")),
    training_run("classification", 2),
    *(training_run(task) for task in TASKS),
    *(output(name) for name in ("predict", "convert", "export")),
    training_run("segmentation", 2),
    output("study"),
    output("study"),
]
COUNT = 180
EXPECTED = "every run resumed to its end, bit by bit as without a kill; finished files complete or absent"
