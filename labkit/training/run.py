"""A training run: trainers at work in the background, and what a notebook sees of them.

A batch's way begins here: each trainer claims a batch and hands it to `trainer.train_step`.
"""

from __future__ import annotations

import atexit
import copy
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.client.session import Session, find_session
from labkit.errors import LabkitError, NoExperts, NotEnoughExperts, RPCError, SwarmClosed, TrainingFailed
from labkit.events import Emit, MetricsLogged, StepFailed, StepFinished, ignore
from labkit.forks import on_fork
from labkit.of_this_process import OfThisProcess
from labkit.paths import user_path
from labkit.suggest import suggest_options
from labkit.training import failures
from labkit.training.batches import Batch, Stream
from labkit.training.forward import LossFunction, initialise
from labkit.training.metrics import MeasuringStopped, Metric, evaluate_replica
from labkit.training.optimizers import OptimizerFactory, ScheduleFactory, make_optimizer, make_schedule
from labkit.training.saving import code_name, save_run
from labkit.training.shared_model import SharedModel
from labkit.training.trainer import REMOTE, TrainConfig, train_step
from labkit.training.turns import Turns
from labkit.training.validation import Best, OnStep, TrainingStep, Validation, Validator

logger = logging.getLogger(__name__)

STOP_TIMEOUT = 10.0  # seconds that batches in flight may take when a run is stopped
PAUSE_TIMEOUT = 60.0  # seconds that steps and validations may take when a run is paused
POLL_INTERVAL = 0.02  # seconds between two looks at a run that is waited for
FAILURE_PAUSE = 0.05  # seconds that a trainer pauses after a failed batch, for each that has failed in a row
EXIT_TIMEOUT = 3.0  # seconds that batches in flight may take when Python exits

Metrics = Metric | Sequence[Metric] | Mapping[str, Metric]
OUTAGES = (NotEnoughExperts, NoExperts, RPCError)  # which cost a batch, and not the run


class Run(OfThisProcess):
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
        history: One `StepFinished` for each of the last 100,000 steps.
        total_steps: Steps that the run will do.
        failed_batches: Batches that failed and were dropped; another took the step of each.
        error: The exception that ended the run, or None.

    Properties:
        state: "running", "finished", "stopped" or "failed".
        running: Whether trainers are at work.
        steps: Steps done.
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
        metrics: Metrics | None = None, on_step: OnStep | None = None, _resume_from: Mapping[str, Any] | None = None,
        _before_start: Callable[[Run], object] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.config = config
        self.history: deque[StepFinished] = deque(maxlen=100_000)
        self.failed_batches = 0
        self.error: BaseException | None = None
        self._batches = Stream(data, config.batch_size, config.seed)
        self.total_steps = config.total_steps(self._batches.length)
        self._sessions = _sessions_of(model)
        initialise(model, self._batches.peek)
        made = make_optimizer(optimizer, model, config.lr, config.beta1)
        self._shared = SharedModel(
            model, made, config.update_rule(self.total_steps), make_schedule(config.schedule, made), config.accumulate
        )
        self._loss_function = loss_function
        self._validator = self._make_validator(validate, metrics)
        self._validated: nn.Module | None = None  # the copy on which it measures
        self._on_step = on_step
        self._emit = emit or (self._sessions[0].emit if self._sessions else ignore)
        self._lock = threading.RLock()
        self._samples = 0
        self._finished = 0
        self._claimed = 0  # steps that are done or being tried
        self._failures_in_a_row = 0
        self._succeeded = False  # whether any step has been done in this process
        self._stop = threading.Event()
        self._why_stopped = ""
        self._seconds: float | None = None
        self._turns = Turns[StepFinished](self._tell, most=2 * config.trainers)
        self._started = time.monotonic()
        if _resume_from is not None:
            _stop_earlier(model)
            self._load_state_dict(_resume_from)
            if _before_start is not None:
                _before_start(self)
        self._left = max(1, min(config.trainers, self.total_steps - self._finished))  # trainers at work
        self._torch_threads = max(1, torch.get_num_threads() // self._left)  # of each of them
        self._ready = threading.Barrier(self._left + 1)
        _stop_earlier(model)
        _runs.add(self)
        for session in self._sessions:
            _latest[session.name] = self
        self._threads = [
            threading.Thread(target=self._train, name=f"labkit-trainer-{number}", daemon=True)
            for number in range(self._left)
        ]
        try:
            torch_threads = torch.get_num_threads()
            for thread in self._threads:
                thread.start()
            self._ready.wait()
            torch.set_num_threads(torch_threads)  # what new threads begin with is what was set last, in any thread
        except BaseException:  # an interrupt
            self._stop.set()
            self._ready.abort()
            raise

    def _make_validator(self, data: Any, metrics: Metrics | None) -> Validator | None:
        config = self.config
        plateau = isinstance(self._shared.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        if data is None:
            wanted = {"metrics": metrics, "every": config.every, "patience": config.patience}
            given = [name for name, value in wanted.items() if value is not None]
            if given or plateau:
                who = f"{', '.join(given)}" if given else "ReduceLROnPlateau"
                raise ValueError(f"{who}: these are about validations, and there are no data for them; give validate=…")
            return None
        every = config.every or self._batches.length or self.total_steps
        return Validator(data, every, metrics, self._loss_function, config.patience)

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
        return self._left > 0

    @property
    def steps(self) -> int:
        """Steps done. When a step counts, it is in `history`, and every listener has heard of it."""
        return self._finished

    @property
    def seconds(self) -> float:
        """How long it has been running, or ran."""
        return self._seconds if self._seconds is not None else time.monotonic() - self._started

    @property
    def loss(self) -> float:
        """Mean loss of the last 20 steps; NaN before the first."""
        last = self._last(20)
        return sum(step.loss for step in last) / len(last) if last else math.nan

    @property
    def samples_per_s(self) -> float:
        """Rows per second, over the whole run."""
        return self._samples / max(self.seconds, 1e-9)

    @property
    def staleness(self) -> float:
        """Mean staleness of the last 100 steps: updates by others during a step."""
        last = self._last(100)
        return sum(step.staleness for step in last) / len(last) if last else 0.0

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

    def _last(self, count: int) -> list[StepFinished]:
        # By place, since trainers append meanwhile; and not a copy of it all, which in a long run takes milliseconds.
        return [self.history[-place] for place in range(min(count, len(self.history)), 0, -1)]

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
        if threading.current_thread() in self._threads:
            raise RuntimeError("a function that the run calls cannot wait for the run; step.run.stop() ends it")
        self._join(math.inf if timeout is None else timeout)
        if self.error is not None:
            raise self.error.with_traceback(self._traceback)  # its own, however often it is raised
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
        self._stop.set()
        return self if threading.current_thread() in self._threads else self.wait(timeout)

    def _join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        # Not `Thread.join`: if that is interrupted, Python before 3.13 takes the thread for dead (cpython issue 90882).
        while self.running and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_INTERVAL, left))

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
        with self._turns.paused(timeout):
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
        with self.paused(timeout), self._lock:
            steps = [(s.step, s.loss, s.samples, s.seconds, s.staleness) for s in self.history]
            return {
                "model": copy.deepcopy(dict(self.model.state_dict())),
                "shared": self._shared.state_dict(),
                "data": self._batches.state_dict(),
                "steps": self._finished,
                "samples": self._samples,
                "validation": None if self._validator is None else self._validator.state_dict(),
                "failed_batches": self.failed_batches,
                "seconds": self.seconds,
                "history": torch.tensor(steps, dtype=torch.float64).reshape(-1, 5),
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
            return save_run(folder, self.state_dict(timeout), self.config, given, self.model, self._sessions)

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, before the trainers begin."""
        self.model.load_state_dict(state["model"])
        self._shared.load_state_dict(state["shared"])
        self._batches.load_state_dict(state["data"])
        self._finished = self._claimed = state["steps"]
        self._samples, self.failed_batches = state["samples"], state["failed_batches"]
        if self._validator is not None and state["validation"] is not None:
            self._validator.load_state_dict(state["validation"])
        self._started -= state["seconds"]
        for step, loss, samples, seconds, staleness in state["history"].tolist():
            self.history.append(
                StepFinished(step=int(step), loss=loss, samples=int(samples), seconds=seconds, staleness=int(staleness))
            )
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def __repr__(self) -> str:
        state = self.state
        if state == "failed":
            state += f" ({type(self.error).__name__}: {self.error})"
        elif state == "stopped" and self._why_stopped:
            state += f" ({self._why_stopped})"
        failed = f", {self.failed_batches} failed batches" if self.failed_batches else ""
        validated = f", validation loss {self.validations[-1].loss:.4f}" if self.validations else ""
        return (
            f"<run {state}: {self.steps} of {self.total_steps} steps, loss {self.loss:.4f}{validated}, "
            f"{self.samples_per_s:,.0f} samples/s, staleness {self.staleness:.1f}{failed}>"
        )

    # ------------------------------------------------------------ the trainers

    def _train(self) -> None:
        """Be one trainer: train on batches until there are no more steps to do."""
        try:
            torch.get_num_threads()  # or a thread's first operation in torch would set the number anew
            torch.set_num_threads(self._torch_threads)
            self._ready.wait()
            replica = self._shared.replica()
            while self._take_turn(replica):
                pass
        except (SwarmClosed, TrainingFailed) as error:
            lab_failed = isinstance(error, SwarmClosed) and error.__cause__ is not None
            if self._is_closed() and not lab_failed:
                self._stop_because("its swarm was closed")
            else:
                self._end(error)
        except BaseException as error:  # of the user's code, and we are in a thread: `wait` raises it where it is seen
            self._end(error)
        finally:
            with self._lock:
                if self._left == 1:
                    self._wind_up()
                self._left -= 1

    def _take_turn(self, replica: nn.Module) -> bool:
        """Try one step, and tell of it. Returns whether there may be more to do."""
        self._turns.begin(self._stop.is_set)
        step = None
        try:
            batch = self._claim()
            if batch is None:
                return False
            step = self._try_step(replica, batch)
        finally:
            self._turns.end(step)
        if step is not None:
            self._turns.report()
        else:  # Lost servers may be about to come back; failing again at once would not wait for them.
            self._stop.wait(min(FAILURE_PAUSE * self._failures_in_a_row, 1.0))
        return True

    def _claim(self) -> Batch | None:
        """Take the next batch; None when there is nothing left to do. Raises `SwarmClosed`."""
        for session in self._sessions:
            session.portal.check_open()  # layers would find another swarm of its name, if there is one by now
        with self._lock:
            if self._stop.is_set() or self._claimed >= self.total_steps:
                return None
            batch = self._batches.next()
            self._claimed += 1
            return batch

    def _try_step(self, replica: nn.Module, batch: Batch) -> StepFinished | None:
        """Train on a batch; None if it failed."""
        started = time.monotonic()
        try:
            loss, staleness = train_step(self._shared, replica, batch, self._loss_function, self.config.balance)
        except (*OUTAGES, FloatingPointError) as error:
            self._give_back(batch.rows, error)
            return None
        with self._lock:
            self._failures_in_a_row = 0
            self._succeeded = True
            self._samples += batch.rows
            finished = StepFinished(
                step=self._finished + 1, loss=loss, samples=batch.rows, seconds=time.monotonic() - started,
                staleness=staleness,
            )  # fmt: skip
            self.history.append(finished)
            self._emit(finished)  # under the lock, so that listeners hear of steps in their order
            self._finished += 1  # last: a step that counts is in `history`, and listeners know of it
            return finished

    def _give_back(self, samples: int, error: Exception) -> None:
        """Drop a batch that failed, so that another takes its step. Raises `TrainingFailed` where that is of no use."""
        with self._lock:
            self._emit(StepFailed(samples=samples, detail=str(error)))
            self._claimed -= 1
            self.failed_batches += 1
            self._failures_in_a_row += 1
            too_many = self._failures_in_a_row >= self.config.max_failures
        logger.debug("a batch was dropped: %s", error)
        # Where a step has been done before, servers may restart and come back as they were.
        if isinstance(error, LabkitError) and not error.recoverable and not self._succeeded:
            raise TrainingFailed(f"no batch can succeed here: {error}") from error
        if too_many:
            raise TrainingFailed(f"{self.config.max_failures} batches in a row failed; the last: {error}") from error

    # ------------------------------------------------------------ validations and the caller's functions

    def _tell(self, step: StepFinished) -> None:
        """Validate if that is due after this step, and call `on_step`."""
        metrics: Mapping[str, float] = {}
        validator = self._validator
        if validator is not None and validator.is_due(step.step, self.total_steps) and not self._stop.is_set():
            metrics = self._validate(validator, step.step)
        if self._on_step is not None:
            told = TrainingStep(step.step, step.loss, metrics, step.samples, step.seconds, step.staleness, self)
            self._on_step(told)

    def _validate(self, validator: Validator, step: int) -> Mapping[str, float]:
        """Validate a copy of the model, while other trainers go on."""
        self._turns.may_be_long = True
        try:
            if self._validated is None:
                self._validated = self._shared.replica().eval()
            self._shared.refresh(self._validated)
            validation = validator.validate(self._validated, step, self._stop.is_set)
        except MeasuringStopped:
            return {}
        except OUTAGES as error:
            logger.warning("the validation after step %d is left out, since experts did not answer: %s", step, error)
            return {}
        finally:
            self._turns.may_be_long = False
        self._shared.validated(validation.loss)
        self._emit(MetricsLogged(step=step, metrics=dict(validation.metrics)))
        if validator.is_over:
            assert validator.best is not None
            self._stop_because(f"the validation loss has not improved since step {validator.best.step}")
        return validation.metrics

    # ------------------------------------------------------------ ends

    def _is_closed(self) -> bool:
        """Whether a swarm that the model uses is closed."""
        try:
            for session in self._sessions:
                session.portal.check_open()
                if find_session(session.name) is not session:
                    return True
        except SwarmClosed:
            return True
        return False

    def _stop_because(self, why: str) -> None:
        with self._lock:
            if not self._stop.is_set():
                self._why_stopped = why
                self._stop.set()
                logger.info("the run is stopped after step %d: %s", self._finished, why)

    def _end(self, error: BaseException) -> None:
        with self._lock:
            first = self.error is None
            if first:
                self.error, self._traceback = error, error.__traceback__
        self._stop.set()
        if first:
            failures.say(error, self._finished, self.total_steps)

    def _wind_up(self) -> None:
        """What the last trainer does."""
        try:
            if self._finished >= self.total_steps and self.error is None:
                self._shared.finish()
            self._batches.close()  # a `DataLoader` may have processes
        except BaseException as error:  # of the user's code, too
            self._end(error)
        self._seconds = time.monotonic() - self._started


@suggest_options
def fit(
    model: nn.Module, data: Any, *, loss: LossFunction | None = None, optimizer: str | OptimizerFactory | None = None,
    validate: Any = None, every: int | None = None, metrics: Metrics | None = None, patience: int | None = None,
    on_step: OnStep | None = None, steps: int | None = None, epochs: float | None = None, batch_size: int = 64,
    trainers: int = 8, lr: float = 1e-3, schedule: str | ScheduleFactory = "constant", accumulate: int = 1,
    balance: float = 0.0, seed: int = 0, max_failures: int = 50, beta1: float = 0.9, warmup: int = 0,
    clip_grad_norm: float | None = None, age_power: float = 0.0, compensation: float = 0.0,
) -> Run:  # fmt: skip
    """Train a model in the background. Returns at once.

    Many trainers share the model; each computes gradients for a batch of its own and applies
    them when it has them. The experts of MoE layers are trained by their servers meanwhile.

    Example:
        run = lk.fit(model, (x, y), epochs=5, validate=(val_x, val_y), metrics="accuracy")
        run.wait()

    Args:
        model: Any module; its `swarm.moe` layers call experts. Its modules keep the mode they
            are in. If all of them are in eval mode they are trained in train mode, but for
            those whose parameters are frozen.
        data: `(x, y)` tensors or arrays, `(x1, x2, y)` with several inputs, what `lk.load`
            returns (its training part), a torch `Dataset`, or any iterable of batches, such
            as a `DataLoader`, which is gone through again and again. A batch is a tuple whose
            last part is y, a dictionary, with which the model is called as `model(**batch)`,
            or a tensor, which is both. Batches are moved to where the model is.
        loss: A function of outputs and y that returns a mean, such as those of `lk.losses`.
            Default: the loss that the model returns itself, or cross-entropy.
        optimizer: "adam" (default), "adamw", "sgd", a class, or a function that makes an
            optimizer from the model's own parameters.
        validate: Validation data, in any form that data may have; of what `lk.load` returns
            the rows for testing are taken. One trainer validates a copy of the model while
            the others go on. `run.validations` has the results.
        every: Steps from one validation to the next; there is one at the end, too. Default:
            those of an epoch.
        metrics: What to measure besides the validation loss: "accuracy", "perplexity", a
            function of outputs and y, several of them in a list, or by name in a dictionary.
            Means of functions are weighted with the rows of each batch; what needs all data
            at once may be an object with `update(outputs, y)` and `compute()`.
        patience: The run stops when the validation loss has not improved in so many
            validations in a row; `run.best` is the model at its best. Default: it does not.
        on_step: Called after each step, one call at a time, with a record that has `step`,
            `loss`, `metrics` (of the validation after this step), `samples`, `seconds`,
            `staleness` and `run`: `step.run.stop()` ends the run. An error in it does, too.
        steps: Batches to train on. Give either steps or epochs.
        epochs: How often to go through the data; 0.5 is half of it.
        batch_size: Rows of a batch, where the data are not batches already. Default 64.
        trainers: Batches in flight at the same time. Default 8.
        lr: Learning rate of an optimizer given by name, and of a class if you give one.
            Default 1e-3.
        schedule: Of the learning rate: "constant" (default), "linear", down to 0 over the
            run, or a function of the optimizer that makes an `LRScheduler`. It takes a step
            after each update; `ReduceLROnPlateau` after each validation.
        accumulate: Batches whose mean gradient makes one update. Default 1.
        balance: Weight of the MoE layers' load-balancing losses. Default 0.
        seed: For the order of the rows. Default 0.
        max_failures: The run ends when so many batches in a row have failed. Default 50. It
            ends at once where no batch can succeed, as with a grid that does not exist.
        beta1: Momentum of Adam. Default 0.9; less may be better where gradients are stale.
        warmup: Updates over which the learning rate rises to its value. Default 0.
        clip_grad_norm: Bound on the norm of all gradients of an update together. Default
            None: no bound.
        age_power: P, where the learning rate of an update is multiplied by
            (1 + staleness)^-p. Default 0.
        compensation: λ of delay compensation for stale gradients (Zheng et al. 2017). Default
            0.

    Returns:
        The run: Look at `run.loss` and `run.samples_per_s`, `run.wait()` for its end,
            `run.stop()` it.

    Raises:
        ValueError: An option is out of its range, or the data have none of these forms.
        SwarmClosed: The swarm of an MoE layer is not open.
        TrainingFailed: An earlier run still trains this model and does not stop.
    """
    config = TrainConfig(
        steps=steps, epochs=epochs, batch_size=batch_size, trainers=trainers, lr=lr, balance=balance, seed=seed,
        max_failures=max_failures, schedule=schedule, accumulate=accumulate, every=every, patience=patience,
        beta1=beta1, warmup=warmup, clip_grad_norm=clip_grad_norm, age_power=age_power, compensation=compensation,
    )  # fmt: skip
    return Run(model, data, config, loss, optimizer, validate=validate, metrics=metrics, on_step=on_step)


# ---------------------------------------------------------------- helpers


def _sessions_of(model: nn.Module) -> list[Session]:
    """The swarms that the model's layers call, the first layer's first. Raises `SwarmClosed`."""
    names = {module.swarm: None for module in model.modules() if isinstance(module, REMOTE)}
    return [find_session(name) for name in names]


_runs: weakref.WeakSet[Run] = weakref.WeakSet()
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


def _stop_earlier(model: nn.Module) -> None:
    """Stop a run that still trains this model. Raises `TrainingFailed` if it does not end."""
    for run in list(_runs):
        if run.model is model and run.running:
            logger.warning("an earlier run still trained this model; it is stopped now: %r", run)
            run._stop.set()
            run._join(STOP_TIMEOUT)
            if run.running:
                raise TrainingFailed(
                    f"an earlier run still trains this model, and did not stop in {STOP_TIMEOUT:.0f} s"
                )


@atexit.register
def _stop_all() -> None:
    """Stop all runs at exit: a process that exits while threads of it are inside torch aborts."""
    for run in list(_runs):
        run._stop.set()
    deadline = time.monotonic() + EXIT_TIMEOUT
    for run in list(_runs):
        run._join(deadline - time.monotonic())


@on_fork
def _leave_behind() -> None:
    """In a forked process, which has no trainers: runs have ended there, and say why."""
    for run in list(_runs):
        run._lock, run._shared._lock = threading.RLock(), threading.Lock()  # a trainer may hold them
        run._turns = Turns[StepFinished](run._tell, most=1)
        if run._left:
            run._left, run._seconds = 0, time.monotonic() - run._started
            run.error = SwarmClosed("this run goes on in the process that this one was forked from, and not here")
            run._traceback = None
    _runs.clear()
