"""A training run: trainers at work in the background, and what a notebook sees of them.

A batch's way begins here: each trainer claims a batch and hands it to `trainer.train_step`.
"""

from __future__ import annotations

import atexit
import copy
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.client.expert import RemoteExpert
from labkit.client.moe import MixtureOfExperts
from labkit.client.session import Session, find_session
from labkit.errors import NoExperts, NotEnoughExperts, RPCError, SwarmClosed, TrainingFailed
from labkit.events import Emit, StepFailed, StepFinished, ignore
from labkit.forks import on_fork
from labkit.server.optimizer import Adam
from labkit.training.batches import Batch, Stream
from labkit.training.shared_model import SharedModel
from labkit.training.trainer import LossFunction, TrainConfig, evaluate, train_step
from labkit.training.turns import Turns

logger = logging.getLogger(__name__)

STOP_TIMEOUT = 10.0  # seconds that batches in flight may take when a run is stopped
POLL_INTERVAL = 0.02  # seconds between two looks at a run that is waited for
FAILURE_PAUSE = 0.05  # seconds that a trainer pauses after a failed batch, for each that has failed in a row
PAUSE_TIMEOUT = 60.0  # seconds that steps and validations may take when a run is paused
EXIT_TIMEOUT = 1.0  # seconds that batches in flight may take when Python exits

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Run:
    """A training run in the background, started by `lk.fit`.

    One run at a time trains a model: an earlier one is stopped first, so a cell may run
    twice. A run ends when a swarm that it uses is closed.

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
        running: Whether trainers are at work.
        steps: Steps done.
        seconds: How long it has been running, or ran, in seconds.
        loss: Mean loss of the last 20 steps.
        samples_per_s: Rows per second, over the whole run.
        staleness: Mean staleness of the last 100 steps, in updates.
    """

    def __init__(
        self, model: nn.Module, data: Any, config: TrainConfig, loss_function: LossFunction | None = None,
        optimizer: OptimizerFactory | None = None, emit: Emit | None = None, *,
        _resume_from: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        make_optimizer = optimizer or (
            lambda parameters: Adam(parameters, lr=config.lr, betas=(float(config.beta1), 0.999))
        )
        self.model = model
        self.config = config
        self.history: deque[StepFinished] = deque(maxlen=100_000)
        self.failed_batches = 0
        self.error: BaseException | None = None
        self._batches = Stream(data, config.batch_size, config.seed)
        self.total_steps = config.total_steps(self._batches.length)
        self._sessions = _sessions_of(model)
        self._shared = SharedModel(model, make_optimizer(model.parameters()), config.update_rule(self.total_steps))
        self._loss_function = loss_function or F.cross_entropy
        self._emit = emit or (self._sessions[0].emit if self._sessions else ignore)
        self._lock = threading.RLock()
        self._samples = 0
        self._finished = 0
        self._claimed = 0  # steps that are done or being tried
        self._failures_in_a_row = 0
        self._stop = threading.Event()
        self._seconds: float | None = None
        self._turns = Turns[StepFinished](lambda step: None, most=2 * config.trainers)
        self._started = time.monotonic()
        if _resume_from is not None:
            self._load_state_dict(_resume_from)
        self._left = max(1, min(config.trainers, self.total_steps - self._finished))  # trainers at work
        self._torch_threads = max(1, torch.get_num_threads() // self._left)  # of each of them
        self._ready = threading.Barrier(self._left + 1)
        _stop_earlier(model)
        _runs.add(self)
        for session in self._sessions:
            _latest[session.name] = self
        try:
            torch_threads = torch.get_num_threads()
            for number in range(self._left):
                threading.Thread(target=self._train, name=f"labkit-trainer-{number}", daemon=True).start()
            self._ready.wait()
            torch.set_num_threads(torch_threads)  # what new threads begin with is what was set last, in any thread
        except BaseException:  # an interrupt
            self._stop.set()
            self._ready.abort()
            raise

    # ------------------------------------------------------------ what a notebook looks at

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

    def _last(self, count: int) -> list[StepFinished]:
        # By place, since trainers append meanwhile; and not a copy of it all, which in a long run takes milliseconds.
        return [self.history[-place] for place in range(min(count, len(self.history)), 0, -1)]

    def wait(self, timeout: float | None = None) -> Run:
        """Wait until the run has ended. An interrupt ends the waiting, not the run.

        Args:
            timeout: Seconds to wait at most. Default None: as long as it takes.

        Returns:
            The run itself, which may still be running after `timeout`.

        Raises:
            TrainingFailed: Too many batches in a row have failed.
            SwarmClosed: A swarm that the model uses was closed.
            Exception: Whatever else ended the run, such as an error in the model.
        """
        self._join(math.inf if timeout is None else timeout)
        if self.error is not None:
            raise self.error.with_traceback(self._traceback)  # its own, however often it is raised
        return self

    def stop(self, timeout: float = STOP_TIMEOUT) -> Run:
        """End the run, and wait until the batches in flight are done.

        Args:
            timeout: Seconds to wait at most. Default 10.

        Returns:
            The run itself.

        Raises:
            Exception: As `wait` does.
        """
        self._stop.set()
        return self.wait(timeout)

    def _join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        # Not `Thread.join`: if that is interrupted, Python before 3.13 takes the thread for dead (cpython issue 90882).
        while self.running and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_INTERVAL, left))

    def evaluate(self, x: Tensor, y: Tensor) -> float:
        """The accuracy of the model now: the share of rows that it classifies correctly.

        Args:
            x: Inputs [n, ...].
            y: Classes [n], int64.
        """
        return evaluate(self._shared.replica(), x, y)

    # ------------------------------------------------------------ saving

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
                "failed_batches": self.failed_batches,
                "seconds": self.seconds,
                "history": torch.tensor(steps, dtype=torch.float64).reshape(-1, 5),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            }

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, before the trainers begin."""
        self.model.load_state_dict(state["model"])
        self._shared.load_state_dict(state["shared"])
        self._batches.load_state_dict(state["data"])
        self._finished = self._claimed = state["steps"]
        self._samples, self.failed_batches = state["samples"], state["failed_batches"]
        self._started -= state["seconds"]
        for step, loss, samples, seconds, staleness in state["history"].tolist():
            self.history.append(
                StepFinished(step=int(step), loss=loss, samples=int(samples), seconds=seconds, staleness=int(staleness))
            )
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def __repr__(self) -> str:
        if self.running:
            state = "running"
        elif self.error is not None:
            state = f"failed ({type(self.error).__name__}: {self.error})"
        else:
            state = "finished" if self.steps >= self.total_steps else "stopped"
        failed = f", {self.failed_batches} failed batches" if self.failed_batches else ""
        return (
            f"<run {state}: {self.steps} of {self.total_steps} steps, loss {self.loss:.4f}, "
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
            while True:
                self._turns.begin(self._stop.is_set)
                step = None
                try:
                    if (batch := self._claim()) is None:
                        break
                    step = self._try_step(replica, batch)
                finally:
                    self._turns.end(step)
                if step is None:
                    self._pause_after_failure()
                else:
                    self._turns.report()
        except SwarmClosed as error:
            if not self._stop.is_set():
                self._end(error)
        except BaseException as error:  # of the user's code, and we are in a thread: `wait` raises it where it is seen
            self._end(error)
        finally:
            with self._lock:
                if self._left == 1:
                    self._wind_up()
                self._left -= 1

    def _wind_up(self) -> None:
        """What the last trainer does."""
        try:
            if self._finished >= self.total_steps and self.error is None:
                self._shared.finish()
            self._batches.close()  # a `DataLoader` may have processes
        except BaseException as error:  # of the user's code, too
            self._end(error)
        self._seconds = time.monotonic() - self._started

    def _try_step(self, replica: nn.Module, batch: Batch) -> StepFinished | None:
        """Train on a batch; None if it failed."""
        started = time.monotonic()
        try:
            loss, staleness = train_step(self._shared, replica, batch, self._loss_function, self.config.balance)
        except (NotEnoughExperts, NoExperts, RPCError, FloatingPointError) as error:
            self._give_back(batch.rows, error)
            return None
        with self._lock:
            self._failures_in_a_row = 0
            self._samples += batch.rows
            finished = StepFinished(
                step=self._finished + 1, loss=loss, samples=batch.rows, seconds=time.monotonic() - started,
                staleness=staleness,
            )  # fmt: skip
            self.history.append(finished)
            self._emit(finished)  # under the lock, so that listeners hear of steps in their order
            self._finished += 1  # last: a step that counts is in `history`, and listeners know of it
            return finished

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

    def _give_back(self, samples: int, error: Exception) -> None:
        """Drop a batch that failed, so that another takes its step. Raises `TrainingFailed` after too many."""
        with self._lock:
            self._emit(StepFailed(samples=samples, detail=str(error)))
            self._claimed -= 1
            self.failed_batches += 1
            self._failures_in_a_row += 1
            too_many = self._failures_in_a_row >= self.config.max_failures
        logger.debug("a batch was dropped: %s", error)
        if too_many:
            raise TrainingFailed(f"{self.config.max_failures} batches in a row failed; the last: {error}") from error

    def _pause_after_failure(self) -> None:
        """Wait a little: lost servers may be about to come back, and failing again at once would not wait for them."""
        self._stop.wait(min(FAILURE_PAUSE * self._failures_in_a_row, 1.0))

    def _end(self, error: BaseException) -> None:
        with self._lock:
            if self.error is None:
                self.error, self._traceback = error, error.__traceback__
        self._stop.set()


def fit(
    model: nn.Module,
    data: Any,
    *,
    loss: LossFunction | None = None,
    optimizer: OptimizerFactory | None = None,
    **options: Any,
) -> Run:
    """Train a model in the background. Returns at once.

    Many trainers share the model; each computes gradients for a batch of its own and applies
    them when it has them. The experts of MoE layers are trained by their servers meanwhile.

    Example:
        run = lk.fit(model, (x, y), epochs=1, trainers=8)
        run.wait()

    Args:
        model: Any module; its `swarm.moe` layers call experts.
        data: `(x, y)` tensors, what `lk.load` returns (its training part), a torch `Dataset`
            of pairs, or any iterable of batches `(x, y)`, such as a `DataLoader`, which is
            iterated repeatedly.
        loss: A function of outputs and y. Default: cross-entropy.
        optimizer: A function that makes an optimizer from the model's own parameters.
            Default: Adam.

    Options (`steps` or `epochs` is required):
        steps: Batches to train on.
        epochs: How often to go through the data; 0.5 is half of it.
        batch_size: Rows of a batch, where the data are not batches already. Default 64.
        trainers: Batches in flight at the same time. Default 8.
        lr: Learning rate of Adam. Default 1e-3.
        balance: Weight of the MoE layers' load-balancing losses. Default 0.
        seed: For the order of the rows. Default 0.
        max_failures: The run ends when so many batches in a row have failed. Default 50.
        schedule: Of the learning rate: "constant" (default), or "linear", down to 0 over the
            run.
        beta1: Momentum of Adam. Default 0.9; less may be better where gradients are stale.
        warmup: Steps over which the learning rate rises to its value. Default 0.
        clip_grad_norm: Bound on the norm of all gradients of a step together. Default None:
            no bound.
        age_power: P, where the learning rate of a step is multiplied by (1 + staleness)^-p.
            Default 0.
        compensation: λ of delay compensation for stale gradients (Zheng et al. 2017). Default
            0.

    Returns:
        The run: Look at `run.loss` and `run.samples_per_s`, `run.wait()` for its end,
            `run.stop()` it.

    Raises:
        ValueError: An option is unknown or out of its range, or the data have none of these
            forms.
        SwarmClosed: The swarm of an MoE layer is not open.
        TrainingFailed: An earlier run still trains this model and does not stop.
    """
    unknown = sorted(set(options) - set(TrainConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join(TrainConfig.__dataclass_fields__)
        raise ValueError(f"fit has no option {', '.join(unknown)}; besides its own it has {known}")
    return Run(model, data, TrainConfig(**options), loss, optimizer)


# ---------------------------------------------------------------- helpers


def _sessions_of(model: nn.Module) -> list[Session]:
    """The swarms that the model's layers call, the first layer's first. Raises `SwarmClosed`."""
    names = {module.swarm: None for module in model.modules() if isinstance(module, (MixtureOfExperts, RemoteExpert))}
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
        run._lock, run._shared._lock = threading.Lock(), threading.Lock()  # a trainer may hold them
        if run._left:
            run._left, run._seconds = 0, time.monotonic() - run._started
            run.error = SwarmClosed("this run goes on in the process that this one was forked from, and not here")
            run._traceback = None
    _runs.clear()
