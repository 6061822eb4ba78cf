"""The trainers of a run: threads that claim batches and try steps, what becomes of failures, and how they end.

A batch's way goes through here: a trainer claims a batch and hands it to `trainer.train_step`. Between two steps
`turns` says who may go on, and who tells the caller of the steps that were done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

import torch
from torch import nn

from labkit.client.session import Session, find_session
from labkit.errors import LabkitError, NoExperts, NotEnoughExperts, RPCError, SwarmClosed, TrainingFailed
from labkit.events import Emit, MetricsLogged, StepFailed, StepFinished
from labkit.interrupts import interrupts_wait
from labkit.training import failures
from labkit.training.batches import Batch, Stream
from labkit.training.forward import LossFunction
from labkit.training.metrics import MeasuringStopped
from labkit.training.replicas import is_compiled
from labkit.training.run_record import RunRecord
from labkit.training.shared_model import SharedModel
from labkit.training.trainer import TrainConfig, train_step
from labkit.training.turns import Turns
from labkit.training.validation import Validator

logger = logging.getLogger(__name__)

POLL_INTERVAL = 0.02  # seconds between two looks at trainers that are waited for
FAILURE_PAUSE = 0.05  # seconds that a trainer pauses after a failed batch, for each outage in a row

OUTAGES = (NotEnoughExperts, NoExperts, RPCError)  # which cost a batch, and not the run


class Trainers:
    """The threads of one run. Nothing happens before `start`.

    Args:
        config: The options.
        total_steps: Steps to do.
        shared: The model that they train.
        batches: Where they take their batches from.
        sessions: The swarms that the model calls.
        record: What they have done.
        loss_function: Of outputs and y; None for the model's own, or cross-entropy.
        validator: Says when to validate, and does it; None for no validations.
        emit: Called with an event for each step, failed batch and validation.
        told: Called after each step with it and what the validation after it measured, one call at a time.

    Attributes:
        lock: Held where they write to `record`.
        left: Trainers at work.
        error: What ended the run, or None; `traceback` is its own, however often it is raised.
        why_stopped: Why it was stopped, if not by the caller.
    """

    def __init__(
        self, config: TrainConfig, total_steps: int, shared: SharedModel, batches: Stream, sessions: Sequence[Session],
        record: RunRecord, loss_function: LossFunction | None, validator: Validator | None, emit: Emit,
        told: Callable[[StepFinished, Mapping[str, float]], object],
    ) -> None:  # fmt: skip
        self.shared = shared
        self.total_steps = total_steps
        self.lock = threading.RLock()
        self.left = 0
        self.error: BaseException | None = None
        self.traceback: TracebackType | None = None
        self.why_stopped = ""
        self._config = config
        self._batches = batches
        self._sessions = sessions
        self._record = record
        self._loss_function = loss_function
        self._validator = validator
        self._validated: nn.Module | None = None  # the copy on which it measures
        self._emit = emit
        self._told = told
        self._claimed = 0  # steps that are done or being tried
        self._failures_in_a_row = 0
        self._outages_in_a_row = 0
        self._succeeded = False  # whether any step has been done in this process
        self._stop = threading.Event()
        self._turns = Turns[StepFinished](self._tell, most=2 * config.trainers)
        self._threads: list[threading.Thread] = []
        self._place = failures.place_of_caller()
        self._compiles = is_compiled(shared.model)
        self._first_step = threading.Lock()

    def start(self) -> None:
        """Start the threads, and wait until each has begun. An interrupt ends them again."""
        started = 0
        try:
            with interrupts_wait():  # one that comes between would leave nobody knows how many
                self._claimed = self._record.steps
                self.left = max(1, min(self._config.trainers, self.total_steps - self._claimed))
                torch_threads = torch.get_num_threads()
                self._torch_threads = max(1, torch_threads // self.left)  # of each of them
                self._ready = threading.Barrier(self.left + 1)
                self._threads = [
                    threading.Thread(target=self._train, name=f"labkit-trainer-{number}", daemon=True)
                    for number in range(self.left)
                ]
                for thread in self._threads:
                    thread.start()
                    started += 1
                self._ready.wait()
                torch.set_num_threads(torch_threads)  # what new threads begin with is what was set last, in any thread
        except BaseException:  # an interrupt, or there are too many threads
            self._stop.set()
            if self._threads:
                self._ready.abort()
            with self.lock:
                self.left -= len(self._threads) - started
                if started == 0:
                    self._wind_up()
            raise

    def __repr__(self) -> str:
        return f"<trainers: {self.left} at work, {self._record.steps} of {self.total_steps} steps done>"

    @property
    def running(self) -> bool:
        """Whether any is at work."""
        return self.left > 0

    def is_current_thread(self) -> bool:
        """Whether one of them is the caller, in a function that the run calls."""
        return threading.current_thread() in self._threads

    def stop(self) -> None:
        """Let no further step begin. Returns at once."""
        self._stop.set()

    def join(self, timeout: float) -> None:
        """Wait until they have ended, `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        # Not `Thread.join`: if that is interrupted, Python before 3.13 takes the thread for dead (cpython issue 90882).
        while self.running and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_INTERVAL, left))

    def paused(self, timeout: float) -> AbstractContextManager[None]:
        """In this block nobody is in the middle of a step (see `Turns.paused`)."""
        return self._turns.paused(timeout)

    # ------------------------------------------------------------ one trainer

    def _train(self) -> None:
        """Be one trainer: train on batches until there are no more steps to do."""
        try:
            torch.get_num_threads()  # or a thread's first operation in torch would set the number anew
            torch.set_num_threads(self._torch_threads)
            self._ready.wait()
            replica = self.shared.replica()
            while self._take_turn(replica):
                pass
        except (SwarmClosed, TrainingFailed) as error:
            lab_failed = isinstance(error, SwarmClosed) and error.__cause__ is not None
            hidden = isinstance(error, SwarmClosed) and self._succeeded  # a layer that is no module of the model's
            if (hidden or self._is_closed()) and not lab_failed:
                self._stop_because("its swarm was closed")
            else:
                self._end(error)
        except BaseException as error:  # of the user's code, and we are in a thread: `wait` raises it where it is seen
            self._end(error)
        finally:
            with self.lock:
                if self.left == 1:
                    self._wind_up()
                self.left -= 1

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
            self._turns.end()
        if step is not None:
            self._turns.report()
        else:  # Lost servers may be about to come back; failing again at once would not wait for them.
            self._stop.wait(min(FAILURE_PAUSE * self._outages_in_a_row, 1.0))
        return True

    def _claim(self) -> Batch | None:
        """Take the next batch; None when there is nothing left to do. Raises `SwarmClosed`."""
        for session in self._sessions:
            session.portal.check_open()  # layers would find another swarm of its name, if there is one by now
        with self.lock:
            if self._stop.is_set() or self._claimed >= self.total_steps:
                return None
            batch = self._batches.next()
            self._claimed += 1
            return batch

    def _try_step(self, replica: nn.Module, batch: Batch) -> StepFinished | None:
        """Train on a batch; None if it failed."""
        started = time.monotonic()
        try:
            with self._alone_until_compiled():
                loss, staleness = train_step(self.shared, replica, batch, self._loss_function, self._config.balance)
                self._succeeded = True
        except (*OUTAGES, FloatingPointError) as error:
            if self._is_closed():  # no outage: whoever closes the swarm stops its servers
                self._stop_because("its swarm was closed")
                return None
            self._give_back(batch.rows, error)
            return None
        with self.lock:
            self._failures_in_a_row = self._outages_in_a_row = 0
            self._record.samples += batch.rows
            finished = StepFinished(
                step=self._record.steps + 1, loss=loss, samples=batch.rows, seconds=time.monotonic() - started,
                staleness=staleness,
            )  # fmt: skip
            self._record.history.append(finished)
            self._emit(finished)  # under the lock, so that listeners hear of steps in their order
            self._record.steps += 1  # a step that counts is in `history`, and listeners know of it
            self._turns.add(finished)
            return finished

    @contextmanager
    def _alone_until_compiled(self) -> Iterator[None]:
        """A block for a step of a model of `torch.compile`: until one has succeeded, one trainer at a time enters.

        All replicas use what the first one has compiled; at the same time each would compile it anew.
        """
        if self._compiles:
            with self._first_step:
                if not self._succeeded:
                    yield
                    return
        yield

    def _give_back(self, samples: int, error: Exception) -> None:
        """Drop a batch that failed, so that another takes its step. Raises `TrainingFailed` where that is of no use."""
        with self.lock:
            self._emit(StepFailed(samples=samples, detail=str(error)))
            self._claimed -= 1
            self._record.failed_batches += 1
            self._failures_in_a_row += 1
            self._outages_in_a_row += isinstance(error, OUTAGES)
            too_many = self._failures_in_a_row >= self._config.max_failures
        logger.debug("a batch was dropped: %s", error)
        # Where a step has been done before, servers may restart and come back as they were.
        if isinstance(error, LabkitError) and not error.recoverable and not self._succeeded:
            raise TrainingFailed(f"no batch can succeed here: {error}") from error
        if too_many:
            raise TrainingFailed(f"{self._config.max_failures} batches in a row failed; the last: {error}") from error

    # ------------------------------------------------------------ validations and the caller's functions

    def _tell(self, step: StepFinished) -> None:
        """Validate if that is due after this step, and tell the caller of it."""
        metrics: Mapping[str, float] = {}
        validator = self._validator
        if validator is not None and validator.is_due(step.step, self.total_steps) and not self._stop.is_set():
            metrics = self._validate(validator, step.step)
        self._told(step, metrics)

    def _validate(self, validator: Validator, step: int) -> Mapping[str, float]:
        """Validate a copy of the model, while other trainers go on."""
        self._turns.may_be_long = True
        try:
            if self._validated is None:
                self._validated = self.shared.replica().eval()
            self.shared.refresh(self._validated)
            validation = validator.validate(self._validated, step, self._stop.is_set)
        except MeasuringStopped:
            return {}
        except OUTAGES as error:
            if self._is_closed():
                return {}
            logger.warning("the validation after step %d is left out, since experts did not answer: %s", step, error)
            return {}
        finally:
            self._turns.may_be_long = False
        self.shared.validated(validation.loss)
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
        with self.lock:
            if not self._stop.is_set():
                self.why_stopped = why
                self._stop.set()
                logger.info("the run is stopped after step %d: %s", self._record.steps, why)

    def _end(self, error: BaseException) -> None:
        with self.lock:
            first = self.error is None
            if first:
                self.error, self.traceback = error, error.__traceback__
        self._stop.set()
        if first:
            failures.say(error, self._record.steps, self.total_steps, self._place)

    def _wind_up(self) -> None:
        """What the last trainer does."""
        try:
            if self._record.steps >= self.total_steps and self.error is None:
                self.shared.finish()
            self._batches.close()  # a `DataLoader` may have processes
        except BaseException as error:  # of the user's code, too
            self._end(error)
        self._record.end()

    def leave_behind(self) -> None:
        """In a forked process, which has none of the threads: the run has ended here, and says why."""
        self.lock, self.shared._lock, self._first_step = threading.RLock(), threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._turns = Turns[StepFinished](self._tell, most=1)
        if self.left:
            self.left = 0
            self._record.end()
            self.error = SwarmClosed("this run goes on in the process that this one was forked from, and not here")
            self.traceback = None
