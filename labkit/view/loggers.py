"""Logging: rows of a swarm and its training go to Weights & Biases, to a file, or to whatever has `log` and `finish`.

The last stop of what is seen: scenes come from the view of a swarm, steps from its events, `rows` makes rows of them,
and the view's thread hands those on. Trainers never wait for a logger, and one that fails ends its logging, not them.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from labkit.events import Emit, Event, StepFinished
from labkit.view.figures import Picture
from labkit.view.rows import Histogram, Row, StepQueue, Table, Value, plain, server_table, swarm_row
from labkit.view.scene import Scene

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

PICTURE_PERIOD = 120.0  # seconds between two heat maps and server tables
PATIENCE = 2.0  # seconds that `stop` waits for a logger that is at work


class View(Protocol):
    """What logging needs of a `SwarmView`."""

    def scene(self) -> Scene: ...
    def add(self, output: Callable[[Scene], None], period: float) -> Callable[[], None]: ...
    def on_event(self, listener: Emit) -> Callable[[], None]: ...


class RichLogger(ABC):
    """A logger that takes whole rows: numbers, and also histograms, tables and pictures."""

    picture_every: float = PICTURE_PERIOD  # seconds; infinity for never

    @abstractmethod
    def log(self, row: Row) -> None:
        """Write a row. What it raises ends the logging."""

    @abstractmethod
    def finish(self) -> None:
        """The logging is over. Called once for each `swarm.log_to`."""


# ---------------------------------------------------------------- from a swarm to a logger


class Logging:
    """A swarm's rows on their way to a logger, from now until `stop()` or the swarm's end: what `swarm.log_to` returns.

    `logger`: a `WandbLogger`, a `JsonlLogger`, or any object or module with `log(dict)` and `finish()`, which gets the
    numbers. Each training step is a row, `train/…`; and every `period` seconds there is one of the swarm, `swarm/…`.
    Steps that come faster than they can be written are merged. Raises `TypeError`, `ValueError`.
    """

    def __init__(self, view: View, logger: Any, period: float = 1.0) -> None:
        missing = [name for name in ("log", "finish") if not callable(getattr(logger, name, None))]
        if missing:
            raise TypeError(
                f"a logger needs log(dict) and finish(), and {logger!r} has no {' and no '.join(missing)}; "
                "use WandbLogger(run), JsonlLogger(path), or anything that has both"
            )
        if not 0 < period < math.inf:
            raise ValueError(f"period={period!r}: seconds between two rows, more than 0")
        self._view = view
        self._logger = logger
        self._period = period
        self._picture_every = logger.picture_every if isinstance(logger, RichLogger) else math.inf
        self._pictured: float | None = None  # when, in a scene's seconds
        self._steps = StepQueue()
        self._lock = threading.Lock()  # one row at a time
        self._stopping = False
        self._over = False
        self._remove: list[Callable[[], None]] = [view.on_event(self._hear)]
        self._remove.append(view.add(self._show, period))
        if self._over:  # it failed at once, in the view's thread
            self._disconnect()

    @property
    def running(self) -> bool:
        """Whether it still logs."""
        return not self._over

    def stop(self) -> None:
        """Log what is left, and a last row of the swarm; then call the logger's `finish`. Safe to repeat."""
        self._stopping = True
        self._disconnect()
        if not self._lock.acquire(timeout=PATIENCE):
            logger.warning("%r is still at work, and finishes when it is done", self._logger)
            return
        try:
            if not self._over:
                self._write(self._view.scene())
                self._finish()
        finally:
            self._lock.release()

    def _hear(self, event: Event) -> None:
        """In the thread of a trainer."""
        if isinstance(event, StepFinished):
            self._steps.add(event)

    def _show(self, scene: Scene) -> None:
        """In the view's thread. The last scene of a swarm is not `open`."""
        with self._lock:
            if not self._over:
                self._write(scene)
            if not scene.open or self._stopping:
                self._finish()

    def _write(self, scene: Scene) -> None:
        try:
            self._write_steps()
            row = swarm_row(scene) | self._pictures(scene)
            self._logger.log(row if isinstance(self._logger, RichLogger) else plain(row))
        except Exception:
            logger.exception("%r failed; nothing more is logged to it", self._logger)
            self._end()

    def _write_steps(self) -> None:
        for row in self._steps.take():
            self._logger.log(row)

    def _pictures(self, scene: Scene) -> Row:
        """The heat map and the table of servers, when it is time for them and at the end."""
        at = scene.at
        first = self._pictured is None
        if scene.headline.experts_alive == 0 and first:
            return {}  # there is nothing to see yet
        last = (self._stopping or not scene.open) and not first
        if math.isinf(self._picture_every) or not (first or last or at >= (self._pictured or 0) + self._picture_every):
            return {}
        self._pictured = at
        row: Row = {"swarm/servers_table": server_table(scene)}
        try:
            from labkit.view.heat_map import draw_heat_map

            row["swarm/heat_map"] = Picture(draw_heat_map(scene))
        except ImportError:
            if first:
                logger.warning("no heat map is logged: matplotlib is not installed (pip install labkit[notebooks])")
        return row

    def _finish(self) -> None:
        """Steps that came meanwhile, and the logger's end."""
        if self._over:
            return
        try:
            self._write_steps()
        except Exception:
            logger.exception("%r failed; nothing more is logged to it", self._logger)
        self._end()

    def _end(self) -> None:
        self._over = True
        self._disconnect()
        try:
            self._logger.finish()
        except Exception:
            logger.exception("%r failed to finish", self._logger)

    def _disconnect(self) -> None:
        for remove in list(self._remove):
            remove()

    def __repr__(self) -> str:
        return (
            f"<logging to {self._logger!r}, {'every ' + format(self._period, 'g') + ' s' if self.running else 'over'}>"
        )


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
        case Histogram():
            return {"bins": value.bins, "counts": value.counts}
        case Table():
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
        case Histogram():
            return wandb.Histogram(np_histogram=(np.array(value.counts), np.array(value.bins)))
        case Table():
            return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
        case Picture():
            from PIL import Image

            return wandb.Image(Image.open(io.BytesIO(value.png)))
    return value
