"""Loggers: where `log_to` brings rows. Weights & Biases, a file, or whatever else has `log` and `finish`."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.view.log.rows import LoggedHistogram, LoggedTable, Row, Value
from labkit.view.picture.canvas import Picture

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

PICTURE_PERIOD = 120.0  # seconds between two heat maps and server tables


class RichLogger(ABC):
    """A logger that takes whole rows: numbers, and also histograms, tables and pictures."""

    picture_every: float = PICTURE_PERIOD  # seconds; infinity for never

    @abstractmethod
    def log(self, row: Row) -> None:
        """Write a row. What it raises ends the logging."""

    @abstractmethod
    def finish(self) -> None:
        """The logging is over. Called once for each `swarm.log_to`."""


# ---------------------------------------------------------------- to a file


class JsonlLogger(RichLogger):
    """Appends each row to a file as a line of JSON, and flushes it.

    A histogram is `{"bins": […], "counts": […]}`, a table `{"columns": […], "rows": […]}`; a picture is left out, and
    `{"png_bytes": …}` says how large it was. Raises `OSError` where the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open(self.path, "a+b")  # noqa: SIM115, until `finish`
        self._mend()

    def _mend(self) -> None:
        """Begin a new line, if a full disk or a crash has left a torn one."""
        if self._file.tell() > 0:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def log(self, row: Row) -> None:
        """Write a row. Raises `OSError`, and `ValueError` after `finish`."""
        line = json.dumps({key: _jsonable(value) for key, value in row.items()}, allow_nan=False, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:  # what could not be flushed before cannot be now
            logger.debug("%s: %s", self.path, error)

    def __repr__(self) -> str:
        return f"JsonlLogger({str(self.path)!r})"


def _jsonable(value: Value) -> object:
    match value:
        case LoggedHistogram():
            return {"bins": value.bins, "counts": value.counts}
        case LoggedTable():
            return {"columns": value.columns, "rows": value.rows}
        case Picture():
            return {"png_bytes": len(value.png)}
    return value


# ---------------------------------------------------------------- to Weights & Biases


class WandbLogger(RichLogger):
    """Logs to the user's own run of Weights & Biases; neither begins nor finishes it.

    `train/…` has `train/step` as its axis and `swarm/…` the seconds since the swarm's start, so do not give a `step` to
    your own `run.log`, as W&B drops rows that come with an earlier one. Every `picture_every` seconds there are the
    heat map, as an image, and the table of servers. `checkpoints`: a folder whose checkpoints are kept as an Artifact
    when the logging stops; `save_checkpoint` does that at any time. Raises `TypeError` for what is no run.
    """

    def __init__(
        self,
        run: wandb.Run,
        *,
        picture_every: float = PICTURE_PERIOD,
        checkpoints: str | os.PathLike[str] | None = None,
    ) -> None:
        if not all(callable(getattr(run, name, None)) for name in ("log", "define_metric", "log_artifact")):
            raise TypeError(f"WandbLogger takes a run, which wandb.init returns, and not {run!r}")
        if not picture_every > 0:
            raise ValueError(f"picture_every={picture_every!r}: seconds between two pictures, more than 0")
        self.run = run
        self.picture_every = picture_every
        self._checkpoints = checkpoints
        for place, axis in (("train", "train/step"), ("swarm", "swarm/seconds")):
            run.define_metric(axis)
            run.define_metric(f"{place}/*", step_metric=axis)

    def log(self, row: Row) -> None:
        """Log a row to the run. Raises what W&B raises, also when the run is finished."""
        self.run.log({key: _for_wandb(value) for key, value in row.items()})

    def save_checkpoint(self, directory: str | os.PathLike[str]) -> wandb.Artifact:
        """Keep the experts' checkpoints in a folder, as they are now, as a version of the Artifact `<run>-experts`.

        Returns when they are copied; W&B sends them later. Raises `ValueError` if there are none, `OSError`.
        """
        import wandb

        directory = Path(directory)
        files = sorted(directory.rglob("*.safetensors"))
        if not files:
            raise ValueError(f"there are no checkpoints (*.safetensors) in {directory}")
        artifact = wandb.Artifact(f"{self.run.id}-experts", type="model", metadata={"experts": len(files)})
        with tempfile.TemporaryDirectory(prefix="labkit-") as folder:
            copy = Path(folder) / "checkpoint"
            for path in files:  # copied before W&B hashes them, since servers replace them at any time
                shutil.copyfile(path, copy)
                artifact.add_file(str(copy), name=path.relative_to(directory).as_posix())
        self.run.log_artifact(artifact)
        return artifact

    def finish(self) -> None:
        """Keep the checkpoints, if that was asked for. The run stays open."""
        if self._checkpoints is not None:
            self.save_checkpoint(self._checkpoints)

    def __repr__(self) -> str:
        return f"WandbLogger({getattr(self.run, 'name', None) or getattr(self.run, 'id', '?')})"


def _for_wandb(value: Value) -> Any:
    import wandb

    match value:
        case LoggedHistogram():
            return wandb.Histogram(np_histogram=(np.array(value.counts), np.array(value.bins)))
        case LoggedTable():
            return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
        case Picture():
            from PIL import Image

            return wandb.Image(Image.open(io.BytesIO(value.png)))
    return value
