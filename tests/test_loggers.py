"""Trackers of experiments, read back with the packages' own readers."""

import csv
import sys
import threading
from types import ModuleType, SimpleNamespace

import mlflow
import pytest
import torch
import wandb
from tiny_runs import recipe, rows

from dualtoken_vit import train
from dualtoken_vit.errors import InputError
from dualtoken_vit.tasks import loggers


def run(photos, out, logger, epochs=2, resume=False, **optim):
    train(recipe(photos, optim={"epochs": epochs, **optim}, run={"device": "cpu", "logger": logger}), out, resume)
    return [float(row["val_loss"]) for row in rows(out / "metrics.csv")]


def stop_after_an_epoch(monkeypatch):
    """The next run ends after its first epoch, as if it was killed."""
    from dualtoken_vit.tasks.run_folder import LastCheckpoint

    save = LastCheckpoint.on_train_epoch_end

    def end(self, trainer, task):
        save(self, trainer, task)
        monkeypatch.undo()
        raise InputError("killed")

    monkeypatch.setattr(LastCheckpoint, "on_train_epoch_end", end)


def test_csv(photos, tmp_path):
    losses = run(photos, tmp_path / "run", "csv")
    with open(tmp_path / "run" / "csv" / "from-step-0" / "metrics.csv", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["epoch/val_loss"]]
    assert [int(row["step"]) for row in found] == [3, 6]
    assert [float(row["epoch/val_loss"]) for row in found] == losses


def test_mlflow_continues_a_run(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with monkeypatch.context() as patch:
        stop_after_an_epoch(patch)
        with pytest.raises(InputError, match="killed"):
            run(photos, tmp_path / "run", "mlflow")
    losses = run(photos, tmp_path / "run", "mlflow", resume=True)
    assert "warning" not in capsys.readouterr().err
    client = mlflow.MlflowClient((tmp_path / "server").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("dualtoken-vit").experiment_id])
    assert found.info.run_name == "run"
    assert found.data.params["optim.lr"] == "0.001"
    history = {each.step: each.value for each in client.get_metric_history(found.info.run_id, "epoch/val_loss")}
    assert history == dict(zip((3, 6), losses, strict=True))


def test_the_epochs_that_fit_into_the_time_are_logged(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = {"device": "cpu", "logger": "mlflow", "max_minutes": 1e-5}  # one epoch
    train(recipe(photos, optim={"epochs": 9}, run=settings), tmp_path / "run")
    client = mlflow.MlflowClient((tmp_path / "server").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("dualtoken-vit").experiment_id])
    assert found.data.params["optim.epochs"] == "1"
    assert [each.step for each in client.get_metric_history(found.info.run_id, "epoch/val_loss")] == [3]


def test_wandb(photos, tmp_path, monkeypatch):
    for name, value in (("MODE", "offline"), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    received, log = [], wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda self, data, *args: received.append(data) or log(self, data, *args))
    losses = run(photos, tmp_path / "run", "wandb")
    assert wandb.run.config["optim.lr"] == 0.001
    wandb.finish()
    found = {row["trainer/global_step"]: row["epoch/val_loss"] for row in received if "epoch/val_loss" in row}
    assert found == pytest.approx(dict(zip((3, 6), losses, strict=True)))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


class FakeTrackio(ModuleType):
    """The calls that Trackio gets."""

    def __init__(self):
        super().__init__("trackio")
        self.calls = []

    def init(self, project, **given):
        self.calls.append(("init", project, given))
        return SimpleNamespace(log=self.log)  # a run ended by its own `finish` is ended again as Python exits

    def log(self, metrics, step=None):
        self.calls.append(("log", metrics, step))

    def finish(self):
        self.calls.append(("finish",))


def trackio_runs(photos, out, monkeypatch):
    """Losses by step of a run that is killed after its first epoch and resumed."""
    monkeypatch.setattr("dualtoken_vit.tasks.trainer.check_logger", lambda name: None)  # it may be a stand-in
    with monkeypatch.context() as patch:
        stop_after_an_epoch(patch)
        with pytest.raises(InputError, match="killed"):
            run(photos, out, "trackio")
    return dict(zip((3, 6), run(photos, out, "trackio", resume=True), strict=True))


def test_what_trackio_gets(photos, tmp_path, monkeypatch, capsys):
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    losses = trackio_runs(photos, tmp_path / "run", monkeypatch)
    assert "warning" not in capsys.readouterr().err
    first, second = (call for call in fake.calls if call[0] == "init")
    assert first[1] == "dualtoken-vit"
    assert first[2] == second[2]  # of the same name
    assert first[2]["name"].startswith("run-")
    assert first[2]["resume"] == "allow"
    assert first[2]["config"]["optim.lr"] == 0.001
    kinds = [call[0] for call in fake.calls]
    assert kinds.count("finish") == 2
    assert kinds[kinds.index("init", 1) - 1] == kinds[-1] == "finish"
    logged = [call[1:] for call in fake.calls if call[0] == "log"]
    received = {step: metrics["epoch/val_loss"] for metrics, step in logged if "epoch/val_loss" in metrics}
    assert received == losses


def test_trackio_itself_continues_a_run(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))
    trackio = pytest.importorskip("trackio")
    from trackio.context_vars import current_run
    from trackio.sqlite_storage import SQLiteStorage

    losses = trackio_runs(photos, tmp_path / "run", monkeypatch)
    assert "warning" not in capsys.readouterr().err
    assert current_run.get() is None  # Trackio has nothing left to end as Python exits
    (found,) = trackio.Api().runs("dualtoken-vit")
    logged = SQLiteStorage.get_logs("dualtoken-vit", found.name, run_id=found.id)
    history = {row["step"]: row["epoch/val_loss"] for row in logged if "epoch/val_loss" in row}
    assert history == pytest.approx(losses)


def test_a_failing_tracker_does_not_stop_the_run(photos, tmp_path, monkeypatch, capsys):
    expected = run(photos, tmp_path / "other", "tensorboard")

    def log_metrics(*args):
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(loggers.TensorBoardLogger, "log_metrics", log_metrics)
    assert run(photos, tmp_path / "run", "tensorboard") == expected
    warning = "warning: --run.logger tensorboard: the server is gone; training without it\n"
    assert capsys.readouterr().err.count(warning) == 1
    best = [torch.load(tmp_path / name / "last.ckpt")["state_dict"]["model.head.weight"] for name in ("run", "other")]
    assert torch.equal(*best)


def test_a_file_of_events_that_cannot_be_written(tmp_path, capsys):
    """TensorBoard writes in a thread, whose traceback Python would print."""
    hook = threading.excepthook
    tracker = loggers.Tracker("tensorboard", tmp_path, 0, None)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.save()
    (events,) = (tmp_path / "tensorboard").glob("events*")
    events.unlink()
    events.mkdir()
    tracker.log_metrics({"loss": 2.0}, 2)
    tracker.finalize("failed")
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: --run.logger tensorboard: [Errno 21] Is a directory")
    assert warning.endswith(f"{events.name}'; training without it")
    assert threading.excepthook is hook


def test_a_dead_server_keeps_the_name_of_the_run(tmp_path, monkeypatch, capsys):
    """MLflow asks its server for a run's name, so that this may fail as well."""

    class Dead(loggers.Logger):
        def gone(self, *_):
            raise ConnectionError("the server is gone")

        log_hyperparams = log_metrics = gone
        name = version = property(gone)

    monkeypatch.setitem(loggers.LOGGERS, "mlflow", lambda *_: Dead())
    tracker = loggers.Tracker("mlflow", tmp_path, 0, "before")
    tracker.log_hyperparams({})
    assert (tracker.version, tracker.version, tracker.failed) == ("before", "before", True)
    assert capsys.readouterr().err.count("the server is gone") == 1


def test_missing_package(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    message = r'--run\.logger wandb: install it, for example by pip install -e "\.\[wandb\]"'
    with pytest.raises(InputError, match=message):
        run(photos, tmp_path / "run", "wandb")
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == "sqlalchemy" else object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=r'needs SQLAlchemy: pip install -e "\.\[mlflow\]" .*; or name a server'):
        run(photos, tmp_path / "run", "mlflow")
    assert not (tmp_path / "run").exists()
