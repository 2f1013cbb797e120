"""Where a run's curves go: train.logger, by Lightning's own loggers; a resumed run goes on in them.

- tensorboard: `run_dir/tensorboard`, an event file per start. Pictures and points go there alone.
- csv: `run_dir/csv/metrics.csv`, one file; steps that a resumed run makes again replace the old.
- wandb: one run, by the id in `run_dir/wandb_id.txt`. WANDB_PROJECT, WANDB_MODE=offline and the
  other variables of that library hold.
"""

from __future__ import annotations

import csv
import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import lightning
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from one4d_pl.config import Config
from one4d_pl.files import read_text, write_text

PROJECT = "one4d_pl"
ID_FILE = "wandb_id.txt"


def build_loggers(config: Config, start_step: int) -> list[Logger]:
    """Build the loggers of train.logger for a run that starts after `start_step` steps."""
    build: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(config.run_dir, name="tensorboard", version=""),
        "csv": lambda: ContinuedCSV(config.run_dir, start_step),
        "wandb": lambda: _wandb_logger(Path(config.run_dir)),
    }
    return [build[name]() for name in config.train.logger]


def finish_loggers(trainer: lightning.Trainer) -> None:
    """Wait until wandb has written or sent all that it holds: `fit` ends without Python's own clean-up."""
    if any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
        import wandb  # optional

        wandb.finish()
        wandb.teardown()  # waits for wandb's own process, which may still be writing


class ContinuedCSV(CSVLogger):
    """A CSVLogger that goes on in the file of earlier starts, and writes every row at once."""

    def __init__(self, run_dir: str, start_step: int) -> None:
        super().__init__(run_dir, name="csv", version="", flush_logs_every_n_steps=1)
        self.start_step = start_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """Return the writer; the first call opens the file."""
        if not isinstance(self._experiment, ExperimentWriter):
            self._experiment = _ContinuedWriter(self.log_dir, self.start_step)
        return self._experiment


class _ContinuedWriter(ExperimentWriter):
    """Lightning's writer, which would delete the file that it finds."""

    def __init__(self, log_dir: str, start_step: int) -> None:
        self.start_step = start_step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Keep the rows of the steps that are not made again."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        reader = csv.DictReader(io.StringIO(read_text(path)))
        kept = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) <= self.start_step]
        self.metrics_keys = list(reader.fieldnames or ())
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_text(path, text.getvalue())


def _wandb_logger(run_dir: Path) -> WandbLogger:
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return WandbLogger(name=run_dir.name, save_dir=run_dir, id=_wandb_id(run_dir), project=project)


@rank_zero_only
def _wandb_id(run_dir: Path) -> str:
    """Return the run's id at wandb, which its first start draws; None on other ranks."""
    path = run_dir / ID_FILE
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:12] + "\n")
    return read_text(path).strip()
