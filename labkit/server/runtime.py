"""The runtime of an expert server (paper, section 3.3): it gathers requests into batches and runs them, one at a time.

On a batch's way between `server/server`, which calls `Runtime.put` on the lab thread, and `server/backend`, which
computes on the compute thread of its device (`server/executor`), one `server/batch` after the other. A request has no
task here: its answer is handed to a callback, `on_result`.
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
from labkit.server.executor import ComputeThread, Executor, InlineCompute, OnComputed
from labkit.server.statistics import RuntimeCounters, ServerStatistics
from labkit.server.task_pool import PoolKey, Task, TaskPools
from labkit.server.validation import schema_of
from labkit.wire.transport import await_callback

__all__ = ["ComputeThread", "Executor", "OnResult", "InlineCompute", "QueuedRequest", "Result", "Runtime"]

logger = logging.getLogger(__name__)

STOPPED = "the runtime of this server was stopped"


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a request.

    Args:
        tensors: The output, or the gradients of the inputs; each [rows, ...].
        queue_seconds: How long the request waited for its batch.
        compute_seconds: How long the whole batch took.
        updates: Optimizer steps that the expert had made when the batch was done.
    """

    tensors: list[Tensor]
    queue_seconds: float
    compute_seconds: float
    updates: int


State = dict[str, Tensor]  # of an expert: see `ExpertBackend.state`
OnResult = Callable[[Result | Exception], None]
QueuedRequest = Task[Result]


@dataclass(eq=False, slots=True)
class _Snapshot:
    """A copy of an expert's state that is to be taken between two batches, and handed to `on_state`."""

    backend: ExpertBackend
    on_state: Callable[[State | Exception], None]

    def cancel(self) -> None:
        self.on_state = lambda state: None


@dataclass(slots=True)
class _Device:
    """What waits for one device, requests in pools and snapshots to take between two batches, and what is computed."""

    executor: Executor | None = None  # while the runtime runs
    pools: TaskPools[Result] = field(default_factory=TaskPools)
    snapshots: deque[_Snapshot] = field(default_factory=deque)
    fail_current: Callable[[Exception], object] | None = None  # fails what is being computed; None while nothing is
    starting: bool = False


class Runtime:
    """Answers requests for experts, many in one batch. `put` a request at any time; they are computed while `run` runs.

    Args:
        backends: The experts, by uid.
        emit: Gets a `BatchProcessed` for each batch.
        executor: Where to compute; None for one `ComputeThread` per device, which `run` starts and ends.
        max_queue_rows: Rows that may wait, over all experts, before requests are turned away.
        threads: See `ComputeThread`.
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
        self._batch_ended = trio.Event()  # for `settle`
        self._broken = trio.Event()
        self._error: BaseException | None = None
        self._counters = RuntimeCounters(self.backends)

    @property
    def stopped(self) -> bool:
        """Whether the runtime has ended; from then on it fails every request."""
        return self._stopped

    def put(
        self,
        uid: str,
        direction: str,
        tensors: Sequence[Tensor],
        deadline: float,
        on_result: OnResult,
        forward_updates: int | None = None,
    ) -> QueuedRequest:
        """Queue a request. `discard` takes it out again.

        Args:
            uid: The expert.
            direction: "forward" or "backward".
            tensors: The inputs and, for a backward pass, the output gradient behind them; each [rows, ...].
            deadline: On trio's clock; a request that has not been started by then never is.
            on_result: Called once with the answer or the failure, perhaps before this returns. Failures are
                `NonFiniteTensor`, `DeadlineExceeded`, `BadRequest`, or `RemoteFailure` when the expert's own code fails
                or the runtime stops.
            forward_updates: The expert's updates when it answered the forward pass that a backward pass belongs to, if
                known.

        Raises:
            UnknownExpert, BadRequest, Overloaded, DeadlineExceeded, RemoteFailure: The request is not queued.
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
            self._counters.overloaded += 1
            raise Overloaded(f"{queued} rows wait here already, of at most {self.max_queue_rows}; nothing was computed")
        device = self._devices[backend.config.device]
        key = PoolKey(uid, "forward" if direction == "forward" else "backward", schema_of(tensors))
        task: QueuedRequest = Task(
            key, tensors, rows, arrived=now, deadline=deadline, on_result=on_result, forward_updates=forward_updates
        )
        device.pools.add(task)
        self._advance(device)
        return task

    def discard(self, task: QueuedRequest) -> bool:
        """Take out a request whose answer is not needed any more. Returns whether it was still queued."""
        return self._devices[self.backends[task.key.uid].config.device].pools.discard(task)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compute until cancelled. What still waits then fails with `RemoteFailure`. A runtime runs once."""
        assert not self._running and not self._stopped, "a runtime runs once"
        self._running = True
        self._counters.started_at = trio.current_time()
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
        """Begin no further batch, and wait until those that are being computed have ended, however long that takes."""
        self._settling = True
        while any(device.fail_current is not None for device in self._devices.values()):
            self._batch_ended = trio.Event()
            await self._batch_ended.wait()

    def _stop(self) -> None:
        self._running, self._stopped = False, True
        for device in self._devices.values():
            if device.fail_current is not None:
                device.fail_current(RemoteFailure(STOPPED))
            for task in device.pools.clear():
                task.on_result(RemoteFailure(STOPPED))
            while device.snapshots:
                device.snapshots.popleft().on_state(RemoteFailure(STOPPED))

    def _advance(self, device: _Device) -> None:
        """Start what is next, if nothing is being computed. (Work that ends at once calls this while it starts.)"""
        if device.starting:
            return
        device.starting = True
        try:
            while self._running and device.fail_current is None:
                if device.snapshots:
                    self._take_snapshot(device, device.snapshots.popleft())
                elif self._settling or not self._run_batch(device):
                    break
        finally:
            device.starting = False

    def _start(
        self, device: _Device, work: Callable[[], Any], done: OnComputed, fail: Callable[[Exception], object],
        uid: str, direction: str, rows: int,
    ) -> None:  # fmt: skip
        """Compute one thing. `done` gets the outcome; if the runtime ends before, `fail` gets an error instead."""
        assert device.executor is not None
        device.fail_current = fail

        def on_computed(value: Any, error: BaseException | None, seconds: float) -> None:
            if not self._running:
                return  # `fail` has been called
            device.fail_current = None
            self._batch_ended.set()
            if isinstance(error, DeviceLost) or (error is not None and not isinstance(error, Exception)):
                self._error = error  # not a failure of this batch: the whole server is to end
                self._broken.set()
            self._advance(device)  # first, so that the device computes while answers are put together
            done(value, error, seconds)

        device.executor.start(work, on_computed, self._nursery, uid=uid, direction=direction, rows=rows)

    def _run_batch(self, device: _Device) -> bool:
        """Start the next batch. Returns whether there was one."""
        started = trio.current_time()
        batch, late = device.pools.next_batch(started, self._max_rows)
        self._counters.expired += len(late)
        for task in late:
            task.on_result(DeadlineExceeded("the deadline passed in the queue; nothing was computed"))
        if not batch:
            return False
        uid, direction, _ = batch[0].key
        requests = [task.tensors for task in batch]
        forward_updates = [task.forward_updates for task in batch]

        def fail(error: Exception) -> None:
            for task in batch:
                task.on_result(error)

        def done(value: Any, error: BaseException | None, seconds: float) -> None:
            if error is not None:
                fail(RemoteFailure(f"the batch could not be computed: {error!r}"))
                return
            answers, updates = value
            answered = []
            for task, answer in zip(batch, answers, strict=True):
                if isinstance(answer, RPCError):
                    task.on_result(answer)
                else:
                    answered.append(task)
                    task.on_result(Result(answer, started - task.arrived, seconds, updates))
            rows = self._counters.count_batch(uid, answered, started, seconds)
            if answered:
                self._emit(
                    BatchProcessed(uid=uid, direction=direction, rows=rows, requests=len(answered), seconds=seconds)
                )

        work = partial(compute_batch, self.backends[uid], direction, requests, forward_updates)
        self._start(device, work, done, fail, uid, direction, sum(task.rows for task in batch))
        return True

    def _take_snapshot(self, device: _Device, snapshot: _Snapshot) -> None:
        backend = snapshot.backend

        def done(value: Any, error: BaseException | None, seconds: float) -> None:
            if error is None:
                snapshot.on_state(value)
            else:  # in words, since the error itself may hold tensors; to the one who saves it is an ordinary failure
                snapshot.on_state(RemoteFailure(f"no snapshot of expert {backend.uid} could be taken: {error!r}"))

        def fail(error: Exception) -> None:
            snapshot.on_state(error)

        self._start(device, backend.state, done, fail, backend.uid, "snapshot", 0)

    def _max_rows(self, uid: str) -> int:
        return self.backends[uid].config.max_batch_size

    async def snapshot(self, uid: str) -> State:
        """A copy of an expert's whole state, taken between two batches (or right here when the runtime has ended).

        Raises `RemoteFailure` if it cannot be taken, or if a batch that has not ended may still be changing the expert.
        """
        backend = self.backends[uid]
        device = self._devices[backend.config.device]
        if self._running:

            def begin(on_state: Callable[[State | Exception], None]) -> _Snapshot:
                snapshot = _Snapshot(backend, on_state)
                device.snapshots.append(snapshot)
                self._advance(device)
                return snapshot

            return await await_callback(begin)  # no deadline: at most one batch, and the runtime answers when it ends
        if any(thread.alive for thread in self._compute_threads):
            raise RemoteFailure(f"expert {uid} cannot be saved: a batch that has not ended may still be changing it")
        return backend.state()

    def statistics(self) -> ServerStatistics:
        """Gauges and counters, now. Call it in the lab thread."""
        devices = self._devices.values()
        return self._counters.statistics(
            sum(len(device.pools) for device in devices), sum(device.pools.rows for device in devices)
        )
