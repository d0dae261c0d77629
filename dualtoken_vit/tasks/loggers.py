"""The trackers that a run can report to, each a Lightning logger: `--run.logger NAME`."""

import os
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dualtoken_vit.errors import InputError, first_line, pip_install

PROJECT = "dualtoken-vit"  # of wandb and trackio; the experiment of MLflow


def _mlflow_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")


class TrackioLogger(Logger):
    """Trackio; Lightning has no logger for it."""

    name = PROJECT
    version: str = ""

    def __init__(self, version: str):
        self.version = version  # the name of the run, by which Trackio finds it again
        self.run: Any = None

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        import trackio

        self.run = trackio.init(PROJECT, name=self.version, config=params, resume="allow")

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.run.log(metrics, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        import trackio

        if self.run is not None:
            trackio.finish()  # not `self.run.finish()`, which Trackio would repeat as Python ends
            self.run = None


# From the folder of the run, the step that it starts from and, for a resumed run, its name in the tracker
LOGGERS: dict[str, Callable[[Path, int, str | None], Logger]] = {
    # TensorBoard drops what a stopped run had logged from this step on: it is logged again.
    "tensorboard": lambda out, step, run: TensorBoardLogger(out, name="", version="tensorboard", purge_step=step),
    # A folder for each start, because CSVLogger deletes the file that it finds.
    "csv": lambda out, step, run: CSVLogger(out, name="csv", version=f"from-step-{step}"),
    "wandb": lambda out, step, run: WandbLogger(out.name, save_dir=out, project=PROJECT, id=run, resume="allow"),
    "mlflow": lambda out, step, run: MLFlowLogger(PROJECT, out.name, _mlflow_uri(), run_id=run),
    "trackio": lambda out, step, run: TrackioLogger(run or f"{out.name}-{os.urandom(3).hex()}"),
}


def check_logger(name: str) -> None:
    """Raise an InputError if the package of a tracker, or of MLflow's database, is missing."""
    if name not in ("tensorboard", "csv") and find_spec(name) is None:
        raise InputError(f"--run.logger {name}: install it, for example by {pip_install(name)}")
    if name == "mlflow" and _mlflow_uri().startswith("sqlite:") and find_spec("sqlalchemy") is None:  # mlflow-skinny
        raise InputError(
            f"--run.logger mlflow: its database needs SQLAlchemy: {pip_install('mlflow')}; "
            "or name a server by the environment variable MLFLOW_TRACKING_URI"
        )


class Tracker(Logger):
    """Passes everything on to a logger of `LOGGERS`, whose first failure ends the tracking, but not the run."""

    def __init__(self, name: str, out: Path, step: int, run: str | None):
        self.kind, self.failed, self.run = name, False, run
        self.excepthook, threading.excepthook = threading.excepthook, self._in_thread
        self.logger: Any = self._try(lambda: LOGGERS[name](out, step, run))

    def _try(self, call: Callable[[], Any]) -> Any:
        if self.failed:
            return None
        try:
            return call()
        except Exception as error:  # whatever a tracker's package may raise
            self._fail(error)
            return None

    def _fail(self, error: BaseException) -> None:
        if not self.failed:
            print(f"warning: --run.logger {self.kind}: {first_line(error)}; training without it", file=sys.stderr)
        self.failed = True

    def _in_thread(self, args: Any) -> None:
        """As `threading.excepthook`: an error in a thread of the tracker, such as TensorBoard's writer, is its own."""
        names = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(args.exc_traceback))
        if args.exc_value is not None and any(name.partition(".")[0] == self.kind for name in names):
            self._fail(args.exc_value)
        else:
            self.excepthook(args)

    @property
    def name(self) -> str | None:
        return self.kind

    @property
    def version(self) -> str | None:
        """The run's name in the tracker; after a failure the last one known, by which a resumed run finds it."""
        self.run = self._try(lambda: self.logger.version) or self.run  # MLflow may have to ask its server
        return self.run

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if self.kind not in ("tensorboard", "csv"):  # the folder has its recipe.json
            self._try(lambda: self.logger.log_hyperparams(params))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        # without Lightning's own "epoch": a folder of that name holds our metrics where MLflow keeps them in files
        own = {key: value for key, value in metrics.items() if key != "epoch"}
        self._try(lambda: self.logger.log_metrics(own, step))

    def save(self) -> None:
        self._try(lambda: self.logger.save())

    def finalize(self, status: str) -> None:
        self._try(lambda: self.logger.finalize(status))
        threading.excepthook = self.excepthook
