"""The runtime of an expert server (paper, section 3.3): it gathers requests into batches and runs them, one at a time.

On a batch's way between `server/server`, which calls `Runtime.put` on the lab thread, and `server/backend`, which
computes on the compute thread of its device (`server/executor`), one `server/batch` after the other. A request has no
task here: its answer is handed to a callback.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio
from torch import Tensor

from labkit.errors import DeadlineExceeded, Overloaded, RemoteFailure, RPCError, UnknownExpert
from labkit.events import BatchProcessed, Emit, ignore
from labkit.server.backend import ExpertBackend
from labkit.server.batch import DeviceLost, compute_batch
from labkit.server.executor import ComputeThread, Executor, InlineCompute, OnDone
from labkit.server.statistics import RuntimeStatistics, Tally
from labkit.server.task_pool import PoolKey, Task, TaskPools
from labkit.server.validation import schema_of

__all__ = ["ComputeThread", "Executor", "OnResult", "InlineCompute", "Queued", "Result", "Runtime", "RuntimeStatistics"]

logger = logging.getLogger(__name__)

STOPPED = "the runtime of this server was stopped"


@dataclass(frozen=True, slots=True)
class Result:
    """A request's answer. Times in seconds; `compute_seconds` are the whole batch's.

    `updates`: optimizer steps that the expert had made when the batch was done.
    """

    tensors: list[Tensor]
    queue_seconds: float
    compute_seconds: float
    updates: int


OnResult = Callable[[Result | Exception], None]
Queued = Task[Result]


@dataclass(slots=True)
class _Device:
    """What waits for one device, requests in pools and snapshots to take between two batches, and what is computed."""

    executor: Executor | None = None  # while the runtime runs
    pools: TaskPools[Result] = field(default_factory=TaskPools)
    snapshots: deque[tuple[ExpertBackend, Callable[[dict[str, Tensor] | Exception], None]]] = field(
        default_factory=deque
    )
    give_up: Callable[[Exception], object] | None = None  # what is being computed: to fail it
    starting: bool = False


class Runtime:
    """Answers requests for the experts in `backends`, batching them. Use `submit` from any task while `run` runs.

    `executor`: where to compute; None means one `ComputeThread` per device, owned by `run`. `max_queue_rows`: rows
    that may wait, over all experts, before requests are turned away. `threads`: see `ComputeThread`.
    """

    def __init__(
        self,
        backends: Mapping[str, ExpertBackend],
        *,
        emit: Emit = ignore,
        executor: Executor | None = None,
        max_queue_rows: int = 16384,
        threads: int | None = None,
    ) -> None:
        self.backends = dict(backends)
        self.max_queue_rows = max_queue_rows
        self._emit = emit
        self._executor = executor
        self._threads = threads
        self._devices = {backend.config.device: _Device() for backend in self.backends.values()}
        self._compute_threads: list[ComputeThread] = []
        self._running = self._stopped = self._settling = False
        self._settled = trio.Event()  # that something has ended, while it settles
        self._broken = trio.Event()
        self._error: BaseException | None = None
        self._tally = Tally(self.backends)

    @property
    def stopped(self) -> bool:
        """Whether it has ended, and fails everything."""
        return self._stopped

    def put(
        self,
        uid: str,
        direction: str,
        tensors: Sequence[Tensor],
        deadline: float,
        finish: OnResult,
        seen: int | None = None,
    ) -> Queued:
        """Queue a request: the inputs, and for a backward pass the output gradient behind them. `finish` gets its
        answer or its failure, perhaps before this returns; `discard` takes it out again.

        `deadline`: on trio's clock; a request that has not been started by then never is. `seen`: the expert's updates
        when it answered the forward pass that a backward pass belongs to, if that is known. Failures that `finish`
        gets: `NonFiniteTensor`, `DeadlineExceeded`, `BadRequest`, or `RemoteFailure` when the expert's own code fails
        or the runtime stops. Raises `UnknownExpert`, `BadRequest`, `Overloaded`, `DeadlineExceeded`, `RemoteFailure`.
        """
        backend = self.backends.get(uid)
        if backend is None:
            raise UnknownExpert(f"this server does not hold expert {uid!r}; look it up again")
        rows = backend.check(direction, tensors)
        if self._stopped:
            raise RemoteFailure(STOPPED)
        now = trio.current_time()
        if deadline <= now:
            raise DeadlineExceeded("the deadline had passed when the request arrived; nothing was computed")
        queued = sum(device.pools.rows for device in self._devices.values())
        if queued and queued + rows > self.max_queue_rows:
            self._tally.overloaded += 1
            raise Overloaded(f"{queued} rows wait here already, of at most {self.max_queue_rows}; nothing was computed")
        device = self._devices[backend.config.device]
        key = PoolKey(uid, "forward" if direction == "forward" else "backward", schema_of(tensors))
        task: Queued = Task(key, tensors, rows, arrived=now, deadline=deadline, finish=finish, seen=seen)
        device.pools.add(task)
        self._advance(device)
        return task

    def discard(self, task: Queued) -> bool:
        """Take a request out that nobody waits for. Returns whether it was still queued."""
        return self._devices[self.backends[task.key.uid].config.device].pools.discard(task)

    async def submit(
        self, uid: str, direction: str, tensors: Sequence[Tensor], deadline: float, seen: int | None = None
    ) -> Result:
        """`put`, and wait for the answer, at most until the deadline."""
        answers: list[Result | Exception] = []
        answered = trio.Event()

        def finish(answer: Result | Exception) -> None:
            answers.append(answer)
            answered.set()

        task = self.put(uid, direction, tensors, deadline, finish, seen)
        try:
            with trio.move_on_at(deadline):
                await answered.wait()
        finally:
            waiting = self.discard(task)
        if not answers:
            self._tally.expired += waiting
            state = "still queued; nothing was computed" if waiting else "being computed; its answer is dropped"
            raise DeadlineExceeded(f"at its deadline the request was {state}")
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compute until cancelled. What waits then fails with `RemoteFailure`. A runtime runs once."""
        assert not self._running and not self._stopped, "a runtime runs once"
        self._running = True
        self._tally.started_at = trio.current_time()
        async with AsyncExitStack() as threads, trio.open_nursery() as self._nursery:
            try:
                for name, device in self._devices.items():
                    device.executor = self._executor
                    if device.executor is None:
                        thread = await threads.enter_async_context(ComputeThread(name, threads=self._threads))
                        self._compute_threads.append(thread)
                        device.executor = thread
                for device in self._devices.values():
                    self._advance(device)
                task_status.started()
                await self._broken.wait()
                assert self._error is not None
                raise self._error
            finally:
                self._stop()

    async def settle(self) -> None:
        """Begin no further batch, and wait until those that are being computed have ended: as long as that takes."""
        self._settling = True
        while any(device.give_up is not None for device in self._devices.values()):
            self._settled = trio.Event()
            await self._settled.wait()

    def _stop(self) -> None:
        self._running, self._stopped = False, True
        for device in self._devices.values():
            if device.give_up is not None:
                device.give_up(RemoteFailure(STOPPED))
            for task in device.pools.clear():
                task.finish(RemoteFailure(STOPPED))
            while device.snapshots:
                device.snapshots.popleft()[1](RemoteFailure(STOPPED))

    def _advance(self, device: _Device) -> None:
        """Start what is next, if nothing is being computed. (What is computed at once calls this while it starts.)"""
        if device.starting:
            return
        device.starting = True
        try:
            while self._running and device.give_up is None:
                if device.snapshots:
                    self._take_snapshot(device, *device.snapshots.popleft())
                elif self._settling or not self._run_batch(device):
                    break
        finally:
            device.starting = False

    def _start(
        self, device: _Device, work: Callable[[], Any], done: OnDone, give_up: Callable[[Exception], object],
        uid: str, direction: str, rows: int,
    ) -> None:  # fmt: skip
        """Compute one thing. `done` gets what comes of it, or `give_up` the error where the runtime ends first."""
        assert device.executor is not None
        device.give_up = give_up

        def finished(value: Any, error: BaseException | None, seconds: float) -> None:
            if not self._running:
                return  # it was given up
            device.give_up = None
            self._settled.set()
            if isinstance(error, DeviceLost) or (error is not None and not isinstance(error, Exception)):
                self._error = error  # not a failure of this batch: the whole server is to end
                self._broken.set()
            self._advance(device)  # first, so that the device computes while answers are put together
            done(value, error, seconds)

        device.executor.start(work, finished, self._nursery, uid=uid, direction=direction, rows=rows)

    def _run_batch(self, device: _Device) -> bool:
        """Start the next batch. Returns whether there was one."""
        started = trio.current_time()
        batch, late = device.pools.next_batch(started, self._max_rows)
        self._tally.expired += len(late)
        for task in late:
            task.finish(DeadlineExceeded("the deadline passed in the queue; nothing was computed"))
        if not batch:
            return False
        uid, direction, _ = batch[0].key
        requests, seen = [task.tensors for task in batch], [task.seen for task in batch]

        def give_up(error: Exception) -> None:
            for task in batch:
                task.finish(error)

        def done(value: Any, error: BaseException | None, seconds: float) -> None:
            if error is not None:
                give_up(RemoteFailure(f"the batch could not be computed: {error!r}"))
                return
            answers, updates = value
            served = []
            for task, answer in zip(batch, answers, strict=True):
                if isinstance(answer, RPCError):
                    task.finish(answer)
                else:
                    served.append(task)
                    task.finish(Result(answer, started - task.arrived, seconds, updates))
            rows = self._tally.count(uid, served, started, seconds)
            if served:
                self._emit(
                    BatchProcessed(uid=uid, direction=direction, rows=rows, requests=len(served), seconds=seconds)
                )

        work = partial(compute_batch, self.backends[uid], direction, requests, seen)
        self._start(device, work, done, give_up, uid, direction, sum(task.rows for task in batch))
        return True

    def _take_snapshot(
        self, device: _Device, backend: ExpertBackend, finish: Callable[[dict[str, Tensor] | Exception], None]
    ) -> None:
        def done(value: Any, error: BaseException | None, seconds: float) -> None:
            if error is None:
                finish(value)
            else:  # in words: an ordinary failure to whoever saves, and not one that holds tensors
                finish(RemoteFailure(f"no snapshot of expert {backend.uid} could be taken: {error!r}"))

        self._start(device, backend.state, done, finish, backend.uid, "snapshot", 0)

    def _max_rows(self, uid: str) -> int:
        return self.backends[uid].config.max_batch_size

    async def snapshot(self, uid: str) -> dict[str, Tensor]:
        """A copy of an expert's whole state, taken between two batches (or right here when the runtime has ended)."""
        backend = self.backends[uid]
        device = self._devices[backend.config.device]
        if self._running:
            answers: list[dict[str, Tensor] | Exception] = []
            answered = trio.Event()

            def finish(answer: dict[str, Tensor] | Exception) -> None:
                answers.append(answer)
                answered.set()

            device.snapshots.append((backend, finish))
            self._advance(device)
            await answered.wait()  # no deadline: at most one batch, and the runtime answers when it ends
            if isinstance(answers[0], Exception):
                raise answers[0]
            return answers[0]
        if any(thread.alive for thread in self._compute_threads):
            raise RemoteFailure(f"expert {uid} cannot be saved: a batch that has not ended may still be changing it")
        return backend.state()

    def statistics(self) -> RuntimeStatistics:
        """Gauges and counters, now. In the lab thread."""
        devices = self._devices.values()
        requests, rows = sum(len(device.pools) for device in devices), sum(device.pools.rows for device in devices)
        return self._tally.statistics(self.backends, requests, rows)
