"""Loggers: where `swarm.log_to` writes rows. Weights & Biases, a JSONL file, or any object with `log` and `finish`."""

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

from labkit.paths import user_path
from labkit.view.log.rows import LoggedHistogram, LoggedRow, LoggedTable, LoggedValue
from labkit.view.picture.canvas import Picture

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

PICTURE_PERIOD = 120.0  # seconds from one heat map and server table to the next


class RichLogger(ABC):
    """Base class of loggers that take histograms, tables and pictures besides numbers.

    Subclass it for a logger of your own that wants all of these. Any other object with
    `log(dict)` and `finish()` gets the numbers only.

    Attributes:
        picture_every: Seconds from one heat map and table of servers to the next; infinity
            for none.
    """

    picture_every: float = PICTURE_PERIOD

    @abstractmethod
    def log(self, row: LoggedRow) -> None:
        """Write a row. Any error that this raises is logged, and ends the logging.

        Args:
            row: Values by name, such as `{"train/step": 3, "train/loss": 0.42}`. A value is a
                number, a `LoggedHistogram`, a `LoggedTable` or a `Picture`.
        """

    @abstractmethod
    def finish(self) -> None:
        """End the logging. Called once for each `swarm.log_to`."""


# ---------------------------------------------------------------- to a file


class JsonlLogger(RichLogger):
    """Appends each row to a file as a line of JSON, for `swarm.log_to`.

    A histogram is written as `{"bins": […], "counts": […]}`, and a table as `{"columns": […],
    "rows": […]}`. Pictures are left out: `{"png_bytes": …}` says how large one was.

    Example:
        swarm.log_to(lk.JsonlLogger("run.jsonl"))
        frame = pandas.read_json("run.jsonl", lines=True)

    Args:
        path: The file. It is created if it does not exist, and appended to if it does.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = user_path(path)
        self._file = open(self.path, "a+b")  # noqa: SIM115, until `finish`
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        """Begin a new line, if a full disk or a crash has left an incomplete one."""
        if self._file.tell() > 0:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def log(self, row: LoggedRow) -> None:
        """Write a row and flush it.

        Args:
            row: Values by name: numbers, histograms, tables and pictures.

        Raises:
            OSError: The file cannot be written.
            ValueError: The logger is finished.
        """
        line = json.dumps({key: _jsonable(value) for key, value in row.items()}, allow_nan=False, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:  # a row could not be flushed earlier, and cannot be now
            logger.debug("%s: %s", self.path, error)

    def __repr__(self) -> str:
        return f"JsonlLogger({str(self.path)!r})"


def _jsonable(value: LoggedValue) -> object:
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
    """Logs to your own run of Weights & Biases, for `swarm.log_to`.

    It neither starts nor finishes the run. Charts of `train/…` and `metrics/…` have
    `train/step` as their x axis, and those of `swarm/…` and `event/…` the seconds since the
    swarm's start, `swarm/seconds` and `event/at`.
    So do not pass a `step` to your own `run.log`: W&B drops rows whose step is earlier than
    the last one.

    Example:
        run = wandb.init(project="my-swarm")
        swarm.log_to(lk.WandbLogger(run))

    Args:
        run: The run that `wandb.init` returned.
        picture_every: Seconds from one heat map (an image) and table of servers to the next;
            `math.inf` for none.
        checkpoints: A folder with the experts' checkpoints. They are saved as an Artifact
            when the logging stops; `save_checkpoint` does so at any time. By default none are
            saved.

    Raises:
        TypeError: `run` is not a W&B run.
        ValueError: `picture_every` is not above 0.
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
        self._checkpoints = None if checkpoints is None else user_path(checkpoints, "checkpoints")
        for place, axis in (
            ("train", "train/step"),
            ("metrics", "train/step"),
            ("swarm", "swarm/seconds"),
            ("event", "event/at"),
        ):
            run.define_metric(axis)
            run.define_metric(f"{place}/*", step_metric=axis)

    def log(self, row: LoggedRow) -> None:
        """Log a row to the run.

        Args:
            row: Values by name: numbers, histograms, tables and pictures.

        Raises:
            Exception: Whatever W&B raises, for example because the run is finished.
        """
        self.run.log({key: _for_wandb(value) for key, value in row.items()})

    def save_checkpoint(self, directory: str | os.PathLike[str]) -> wandb.Artifact:
        """Save the checkpoints in a folder as a new version of the Artifact `<run id>-experts`.

        This returns once the files are copied, and W&B uploads them in the background.

        Args:
            directory: The folder. Checkpoints (*.safetensors) in its subfolders are included.

        Returns:
            The Artifact.

        Raises:
            ValueError: There are no checkpoints in the folder.
            OSError: A checkpoint cannot be read.
        """
        import wandb

        directory = user_path(directory, "directory")
        files = sorted(file for file in directory.rglob("*.safetensors") if "~" not in file.name)  # the last of each
        if not files:
            raise ValueError(f"there are no checkpoints (*.safetensors) in {directory}")
        artifact = wandb.Artifact(f"{self.run.id}-experts", type="model", metadata={"experts": len(files)})
        with tempfile.TemporaryDirectory(prefix="labkit-") as folder:
            copy = Path(folder) / "checkpoint"
            for path in files:  # copied before W&B hashes them, since servers may replace them at any time
                shutil.copyfile(path, copy)
                artifact.add_file(str(copy), name=path.relative_to(directory).as_posix())
        self.run.log_artifact(artifact)
        return artifact

    def finish(self) -> None:
        """Save the checkpoints, if `checkpoints` was given. The run stays open."""
        if self._checkpoints is not None:
            self.save_checkpoint(self._checkpoints)

    def __repr__(self) -> str:
        return f"WandbLogger({getattr(self.run, 'name', None) or getattr(self.run, 'id', '?')})"


def _for_wandb(value: LoggedValue) -> Any:
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
