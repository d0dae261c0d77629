"""What Lightning shows of a run on the terminal."""

import logging
import sys
import warnings
from time import monotonic
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


def quiet() -> None:
    """Silence Lightning's notes about itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # that a process which this one started was killed, as Lightning then kills this one too
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        r".*does not have many workers.*",
        r".*resuming from a checkpoint that ended before the epoch ended.*",  # ours can be resumed
        r".*LeafSpec.*",
        r".*in eval mode at the start of training.*",  # a detector's frozen statistics
        r".*IterableDataset. has .__len__. defined.*",  # each of our workers has its own share
        r".*broadcast_buffers. is deprecated.*",  # its successor is not in every PyTorch that we support
        r".*srun. command is available.*",
        r".*pin_memory=True.*persistent_workers=True.*",  # the loader is the same in all epochs
    ):
        warnings.filterwarnings("ignore", message)


class ProgressBar(RichProgressBar):
    """Lightning's bar on stderr, where that is a terminal; epochs count from 1."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10 if sys.stderr.isatty() else 0, console_kwargs={"stderr": True})
        self.metrics: dict[str, Any] = {}
        self.due = 0.0

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Read as often as the bar is drawn: reading the loss of each step, the CPU would wait for the GPU."""
        if (now := monotonic()) >= self.due:
            self.due = now + 1 / self.refresh_rate
            metrics = super().get_metrics(trainer, pl_module)
            self.metrics = {key: value for key, value in metrics.items() if key != "v_num"}
        return self.metrics

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}".ljust(len(self.validation_description))
