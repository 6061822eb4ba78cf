"""A training run: what a notebook holds of it. Its trainers are at work in the background.

A batch's way begins one floor below, where `trainer_threads` claim batches. What they have done is in `run_record`;
`active_runs` knows all runs of this process.
"""

from __future__ import annotations

import copy
import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.client.in_models import swarms_of
from labkit.client.session import Session, find_session
from labkit.errors import SwarmClosed
from labkit.events import Emit, StepFinished, ignore
from labkit.paths import user_path
from labkit.process_bound import ProcessBound
from labkit.training import active_runs
from labkit.training.active_runs import STOP_TIMEOUT
from labkit.training.batches import Stream
from labkit.training.forward import LossFunction, initialise
from labkit.training.given_losses import check_loss
from labkit.training.metrics import Metric, Metrics, evaluate_replica
from labkit.training.optimizers import OptimizerFactory, make_optimizer, make_schedule
from labkit.training.run_record import RunRecord
from labkit.training.saving import code_name, save_best, save_run
from labkit.training.shared_model import SharedModel
from labkit.training.trainer import TrainConfig
from labkit.training.trainer_threads import Trainers
from labkit.training.validation import Best, OnStep, TrainingStep, Validation, Validator

PAUSE_TIMEOUT = 60.0  # seconds that steps and validations may take when a run is paused


class Run(ProcessBound):
    """A training run in the background, started by `lk.fit`.

    One run at a time trains a model: an earlier one is stopped first, so a cell may run
    twice. A run is stopped when a swarm that it uses is closed.

    Example:
        run = lk.fit(model, data, epochs=1)
        run.loss, run.samples_per_s, run.staleness
        run.wait()

    Attributes:
        model: The model that is trained.
        config: The options, a `TrainConfig`.
        total_steps: Steps that the run will do.

    Properties:
        state: "running", "finished", "stopped" or "failed".
        running: Whether trainers are at work.
        error: The exception that ended the run, or None.
        steps: Steps done.
        history: One `StepFinished` for each of the last 100,000 steps.
        failed_batches: Batches that failed and were dropped; another took the step of each.
        seconds: How long it has been running, or ran, in seconds.
        loss: Mean loss of the last 20 steps.
        samples_per_s: Rows per second, over the whole run.
        staleness: Mean staleness of the last 100 steps, in updates.
        validations: What was measured on the validation data, and after which steps.
        best: With `patience`, the model's state at its lowest validation loss.
    """

    def __init__(
        self, model: nn.Module, data: Any, config: TrainConfig, loss_function: LossFunction | None = None,
        optimizer: str | OptimizerFactory | None = None, emit: Emit | None = None, *, validate: Any = None,
        metrics: Metrics | None = None, on_step: OnStep | None = None,
        keep_best: str | os.PathLike[str] | None = None, _resume_from: Mapping[str, Any] | None = None,
        _before_start: Callable[[Run], object] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={model!r}: a module is needed, an instance of torch.nn.Module")
        check_loss(loss_function)
        if on_step is not None and not callable(on_step):
            raise ValueError(f"on_step={on_step!r}: a function is needed, which is called with a record of each step")
        self.model = model
        self.config = config
        self._record = RunRecord()
        self._batches = Stream(data, config.batch_size, config.seed)
        self.total_steps = config.total_steps(self._batches.length)
        self._sessions = _sessions_of(model)
        initialise(model, self._batches.peek)
        made = make_optimizer(optimizer, model, config.lr, config.beta1)
        self._shared = SharedModel(
            model, made, config.update_rule(self.total_steps), make_schedule(config.schedule, made), config.accumulate
        )
        self._loss_function = loss_function
        self._keep_best = None if keep_best is None else user_path(keep_best, "keep_best")
        self._validator = self._make_validator(validate, metrics)
        self._on_step = on_step
        emit = emit or (self._sessions[0].emit if self._sessions else ignore)
        self._trainers = Trainers(
            config, self.total_steps, self._shared, self._batches, self._sessions, self._record, loss_function,
            self._validator, emit, self._tell,
        )  # fmt: skip
        if _resume_from is not None:
            active_runs.stop_earlier(model)
            self._load_state_dict(_resume_from)
            if _before_start is not None:
                _before_start(self)
        active_runs.stop_earlier(model)
        active_runs.runs.add(self._trainers)
        for session in self._sessions:
            _latest[session.name] = self
        self._trainers.start()

    def _make_validator(self, data: Any, metrics: Metrics | None) -> Validator | None:
        config = self.config
        plateau = isinstance(self._shared.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        if data is None:
            wanted = {"metrics": metrics, "every": config.every, "patience": config.patience,
                      "keep_best": self._keep_best}  # fmt: skip
            given = [name for name, value in wanted.items() if value is not None]
            if given or plateau:
                who = f"{', '.join(given)}" if given else "ReduceLROnPlateau"
                raise ValueError(f"{who}: these are about validations, and there are no data for them; give validate=…")
            return None
        every = config.every or self._batches.length or self.total_steps
        return Validator(data, every, metrics, self._loss_function, config.patience, config.batch_size)

    def _tell(self, step: StepFinished, metrics: Mapping[str, float]) -> None:
        """Save what is best, and call `on_step`, after the step and its validation."""
        if self._keep_best is not None and metrics and self._validator is not None and self._validator.improved:
            save_best(self, self._keep_best)
        if self._on_step is not None:
            told = TrainingStep(step.step, step.loss, metrics, step.samples, step.seconds, step.staleness, self)
            self._on_step(told)

    # ------------------------------------------------------------ what a notebook looks at

    @property
    def state(self) -> str:
        """What it does, or how it ended: "running", "finished", "stopped" or "failed"."""
        if self.running:
            return "running"
        if self.error is not None:
            return "failed"
        return "finished" if self.steps >= self.total_steps else "stopped"

    @property
    def running(self) -> bool:
        """Whether trainers are at work."""
        return self._trainers.running

    @property
    def error(self) -> BaseException | None:
        """The exception that ended the run, or None."""
        return self._trainers.error

    @property
    def history(self) -> deque[StepFinished]:
        """One `StepFinished` for each of the last 100,000 steps."""
        return self._record.history

    @property
    def failed_batches(self) -> int:
        """Batches that failed and were dropped; another took the step of each."""
        return self._record.failed_batches

    @property
    def steps(self) -> int:
        """Steps done. When a step counts, it is in `history`, and every listener has heard of it."""
        return self._record.steps

    @property
    def seconds(self) -> float:
        """How long it has been running, or ran."""
        return self._record.seconds

    @property
    def loss(self) -> float:
        """Mean loss of the last 20 steps; NaN before the first."""
        return self._record.loss

    @property
    def samples_per_s(self) -> float:
        """Rows per second, over the whole run."""
        return self._record.samples_per_s

    @property
    def staleness(self) -> float:
        """Mean staleness of the last 100 steps: updates by others during a step."""
        return self._record.staleness

    @property
    def validations(self) -> list[Validation]:
        """What was measured on the validation data: records with `step`, `loss` and `metrics`."""
        return [] if self._validator is None else list(self._validator.done)

    @property
    def best(self) -> Best | None:
        """With `patience`, the lowest validation loss: `step`, `loss`, and the model's `state` then.

        `model.load_state_dict(run.best.state)` goes back to it. Experts are not part of it.
        """
        return None if self._validator is None else self._validator.best

    def wait(self, timeout: float | None = None) -> Run:
        """Wait until the run has ended. An interrupt ends the waiting, not the run.

        A run whose swarm was closed has been stopped; that is no error.

        Args:
            timeout: Seconds to wait at most. Default None: as long as it takes.

        Returns:
            The run itself, which may still be running after `timeout`.

        Raises:
            TrainingFailed: Too many batches in a row have failed, or the first one, in a way
                that does not mend by itself.
            Exception: Whatever else ended the run, such as an error in the model.
        """
        if self._trainers.is_current_thread():
            raise RuntimeError("a function that the run calls cannot wait for the run; step.run.stop() ends it")
        self._trainers.join(math.inf if timeout is None else timeout)
        if (error := self._trainers.error) is not None:
            raise error.with_traceback(self._trainers.traceback)
        return self

    def stop(self, timeout: float = STOP_TIMEOUT) -> Run:
        """End the run, and wait until the batches in flight are done.

        In `on_step` and other functions that the run calls it returns at once.

        Args:
            timeout: Seconds to wait at most. Default 10.

        Returns:
            The run itself.

        Raises:
            Exception: As `wait` does.
        """
        self._trainers.stop()
        return self if self._trainers.is_current_thread() else self.wait(timeout)

    def evaluate(self, x: Any, y: Any = None, *, metric: Metric = "accuracy", batch_size: int = 256) -> float:
        """Measure the model as it is now, as `lk.evaluate` does, with the loss of this run.

        Example:
            run.evaluate(data), run.evaluate(x, y, metric="loss")

        Args:
            x: Inputs [n, ...], beside y; or data in any form that `lk.fit` takes. Of what
                `lk.load` returns the rows for testing are taken.
            y: Labels [n], or [n, positions]. Default None: they are in x.
            metric: "accuracy" (default), "loss", "perplexity", or a function of outputs and y.
            batch_size: Rows that the model gets at once. Default 256.

        Raises:
            ValueError: There are no data, or labels and outputs do not fit together.
        """
        return evaluate_replica(
            self._shared.replica(), x, y, metric=metric, loss=self._loss_function, batch_size=batch_size
        )

    # ------------------------------------------------------------ saving

    @property
    def optimizer_name(self) -> str:
        """The class of the optimizer; empty if the model has no parameters of its own."""
        return "" if self._shared.optimizer is None else type(self._shared.optimizer).__name__

    @contextmanager
    def paused(self, timeout: float = PAUSE_TIMEOUT) -> Iterator[Run]:
        """A block in which no trainer is in the middle of a step; they go on after it.

        It may stand in `on_step`, too, and a run that has ended is always paused.

        Example:
            with run.paused():
                torch.save(model.state_dict(), "model.pt")

        Args:
            timeout: Seconds that steps and validations which have begun may take. Default 60.

        Raises:
            LabkitError: They took longer.
        """
        with self._trainers.paused(timeout):
            yield self

    def state_dict(self, timeout: float = PAUSE_TIMEOUT) -> dict[str, Any]:
        """All that the run needs to go on elsewhere as if nothing had happened, as copies.

        These are the states of the model, its optimizer and schedule, the place in the data,
        the random generators of torch, and the history. Experts are not part of it: they are
        at their servers.

        Args:
            timeout: As for `paused`.

        Returns:
            Plain numbers, lists, dictionaries and tensors.
        """
        with self.paused(timeout), self._trainers.lock:
            return {
                "model": copy.deepcopy(dict(self.model.state_dict())),
                "shared": self._shared.state_dict(),
                "data": self._batches.state_dict(),
                "validation": None if self._validator is None else self._validator.state_dict(),
                **self._record.state_dict(),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            }

    def save(self, folder: str | os.PathLike[str], *, timeout: float = PAUSE_TIMEOUT) -> Path:
        """Save the run, with the state of every expert that its model calls, at one moment.

        The run pauses meanwhile. Experts are read from their servers, whoever started them. If
        others train them too, they are saved at slightly different moments. An expert that is
        lost is left out, with a warning. A crash leaves what the folder held before.

        Example:
            run.save("ckpt/")
            run = lk.resume("ckpt/", model, swarm, data)  # here or on another machine, later

        Args:
            folder: Where to. It is made, and an earlier save in it is replaced as a whole.
                Servers can start from its `experts/`: `checkpoint_dir="ckpt/experts"`.
            timeout: Seconds that steps which have begun may take. Default 60.

        Returns:
            The folder's absolute path.

        Raises:
            CheckpointError: It could not be saved.
            ValueError: A part of the state, such as that of a schedule of one's own, is
                nothing that can be saved.
        """
        folder = user_path(folder, "folder")  # before the pause, in which the current folder may change
        with self.paused(timeout):
            given = {
                "loss": code_name(self._loss_function),
                "optimizer": self.optimizer_name,
                "schedule": "" if isinstance(self.config.schedule, str) else code_name(self.config.schedule),
                "validate": "" if self._validator is None else "validation data",
            }
            moment = save_run(folder, self.state_dict(timeout), self.config, given, self.model, self._sessions)
        active_runs.saved[moment.name] = self._batches
        return folder

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, before the trainers begin."""
        self.model.load_state_dict(state["model"])
        self._shared.load_state_dict(state["shared"])
        self._batches.load_state_dict(state["data"])
        self._record.load_state_dict(state)
        if self._validator is not None and state["validation"] is not None:
            self._validator.load_state_dict(state["validation"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def __repr__(self) -> str:
        state = self.state
        if state == "failed":
            state += f" ({type(self.error).__name__}: {self.error})"
        elif state == "stopped" and self._trainers.why_stopped:
            state += f" ({self._trainers.why_stopped})"
        failed = f", {self.failed_batches} failed batches" if self.failed_batches else ""
        validated = f", validation loss {self.validations[-1].loss:.4f}" if self.validations else ""
        return (
            f"<run {state}: {self.steps} of {self.total_steps} steps, loss {self.loss:.4f}{validated}, "
            f"{self.samples_per_s:,.0f} samples/s, staleness {self.staleness:.1f}{failed}>"
        )


def _sessions_of(model: nn.Module) -> list[Session]:
    """The swarms that the model's layers call, the first layer's first. Raises `SwarmClosed`."""
    return [find_session(name) for name in swarms_of(model)]


_latest: weakref.WeakValueDictionary[str, Run] = weakref.WeakValueDictionary()  # by the name of a swarm


def latest_run(swarm: str) -> Run | None:
    """The latest run whose model calls the swarm of this name; None if there is none, or nothing refers to it any more.

    It may have ended. A run over an earlier swarm of the same name does not count while there is a new one.
    """
    run = _latest.get(swarm)
    try:
        current = find_session(swarm)
    except SwarmClosed:
        return run
    return run if run is not None and any(session is current for session in run._sessions) else None
