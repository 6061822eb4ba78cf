"""The runtime of an expert server (paper, section 3.3): it gathers requests into batches and runs them, one at a time.

On a batch's way between `server/server`, which calls `Runtime.put` on the lab thread, and `server/backend`, which
computes on the compute thread of its device (`server/executor`), one `server/batch` after the other. A request has no
task here: its answer is handed to a callback, `on_result`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import trio
from torch import Tensor

from labkit.errors import (
    CheckpointError,
    DeadlineExceeded,
    Overloaded,
    RemoteFailure,
    RPCError,
    UnknownExpert,
)
from labkit.events import BatchProcessed, Emit, ignore
from labkit.server.backend import ExpertBackend
from labkit.server.batch import PAUSED, DeviceLost, RunningBatch, compute_batch_in_parts
from labkit.server.device import DeviceQueue, Endings, OnResult, QueuedRequest, Result, State, StateOrder
from labkit.server.executor import ComputeThread, Executor, InlineCompute, OnComputed
from labkit.server.statistics import RuntimeCounters, ServerStatistics
from labkit.server.task_pool import PoolKey, Task
from labkit.server.validation import NO_OPTIONS, CallOptions, schema_of
from labkit.wire.transport import await_callback

__all__ = ["ComputeThread", "Executor", "OnResult", "InlineCompute", "QueuedRequest", "Result", "Runtime"]

logger = logging.getLogger(__name__)

STOPPED = "the runtime of this server was stopped"


class Runtime:
    """Answers requests for experts, many in one batch. `put` a request at any time; they are computed while `run` runs.

    A request of more rows than `max_batch_size` is computed in parts. Between two of them, one batch of others is
    computed if any waits: of other experts, or for two forward passes of the same one. So a large request holds others
    up by one part at a time, and they hold it up by as much. Nobody sees an expert between two parts of a backward
    pass. A large request that is late, or given up, ends before its next part, and has changed nothing.

    Args:
        backends: The experts, by uid.
        emit: Gets a `BatchProcessed` for each batch.
        executor: Where to compute; None for one `ComputeThread` per device, which `run` starts and ends.
        max_queue_rows: Rows that may wait, over all experts, before requests are turned away. Of a large request only
            one part counts, and never more than three quarters of this: it is not refused for its size alone, and
            leaves room for others.
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
        self._devices = {backend.config.device: DeviceQueue() for backend in self.backends.values()}
        self._compute_threads: list[ComputeThread] = []
        self._exits = AsyncExitStack()  # ends the threads; entered while the runtime runs
        self._running = self._stopped = self._settling = False
        self._endings = Endings()
        self._broken = trio.Event()
        self._error: BaseException | None = None
        self._unfinished: list[RunningBatch] = []  # that the end of the runtime has interrupted
        self._counters = RuntimeCounters(self.backends)

    @property
    def stopped(self) -> bool:
        """Whether the runtime has ended; from then on it fails every request."""
        return self._stopped

    def add(self, backend: ExpertBackend) -> None:
        """Take one more expert, whether the runtime runs or not. Raises `ValueError` if it has that expert."""
        if backend.uid in self.backends:
            raise ValueError(f"this server holds expert {backend.uid} already")
        self.backends[backend.uid] = backend
        device = backend.config.device
        if device not in self._devices:
            self._devices[device] = DeviceQueue()
            if self._running:
                self._equip(device)

    def remove(self, uid: str, error: Exception) -> ExpertBackend:
        """Give an expert back. Its requests that wait get `error`; a batch that is being computed ends normally."""
        backend = self.backends.pop(uid)
        device = self._devices[backend.config.device]
        waiting = device.pools.take_all(uid)
        self._endings.tell()
        for task in waiting:
            task.on_result(error)
        return backend

    def put(
        self,
        uid: str,
        direction: str,
        tensors: Sequence[Tensor],
        deadline: float,
        on_result: OnResult,
        forward_updates: int | None = None,
        options: CallOptions = NO_OPTIONS,
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
            options: What else the request says.

        Raises:
            UnknownExpert, BadRequest, Overloaded, DeadlineExceeded, RemoteFailure: The request is not queued.
        """
        backend = self._held(uid)
        if direction == "forward":
            options = CallOptions(keywords=options.keywords)
        rows = backend.check(direction, tensors, options)
        if self._stopped:
            raise RemoteFailure(STOPPED)
        now = trio.current_time()
        if deadline <= now:
            raise DeadlineExceeded("the deadline had passed when the request arrived; nothing was computed")
        queued = sum(device.pools.load for device in self._devices.values())
        load = min(rows, backend.config.max_batch_size, max(1, self.max_queue_rows * 3 // 4))
        if queued and queued + load > self.max_queue_rows:
            self._counters.overloaded += 1
            raise Overloaded(f"{queued} rows wait here already, of at most {self.max_queue_rows}; nothing was computed")
        device = self._devices[backend.config.device]
        key = PoolKey(uid, "forward" if direction == "forward" else "backward", schema_of(tensors), options)
        task: QueuedRequest = Task(
            key, tensors, rows, arrived=now, deadline=deadline, on_result=on_result, forward_updates=forward_updates,
            load=load,
        )  # fmt: skip
        device.pools.add(task)
        self._advance(device)
        return task

    def _held(self, uid: str) -> ExpertBackend:
        backend = self.backends.get(uid)
        if backend is None:
            raise UnknownExpert(f"this server does not hold expert {uid!r}; look it up again")
        return backend

    def discard(self, task: QueuedRequest) -> bool:
        """Take out a request whose answer is not needed any more. Returns whether it was still queued."""
        # As a rule there is one device; and the expert may be here no more.
        found = any(device.discard(task) for device in self._devices.values())
        self._endings.tell()
        return found

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compute until cancelled. What still waits then fails with `RemoteFailure`. A runtime runs once."""
        assert not self._running and not self._stopped, "a runtime runs once"
        self._running = True
        self._counters.started_at = trio.current_time()
        async with self._exits, trio.open_nursery() as self._nursery:
            try:
                for name in self._devices:
                    self._equip(name)
                for device in self._devices.values():
                    self._advance(device)
                task_status.started()
                await self._broken.wait()
                assert self._error is not None
                raise self._error
            finally:
                self._stop()

    def _equip(self, name: str) -> None:
        """Give a device what computes there."""
        executor = self._executor
        if executor is None:
            executor = thread = ComputeThread(name, threads=self._threads)
            thread.begin()
            self._exits.push_async_exit(thread)
            self._compute_threads.append(thread)
        self._devices[name].executor = executor

    async def settle_expert(self, uid: str) -> None:
        """Wait until nothing of an expert is queued or computed, and no state taken, however long that takes."""
        while self._running and any(device.is_busy_with(uid) for device in self._devices.values()):
            await self._endings.wait()
        await trio.lowlevel.checkpoint()

    async def settle(self) -> None:
        """Begin no further batch, and wait until those that are being computed have ended, however long that takes."""
        self._settling = True
        while any(device.fail_current is not None or device.paused for device in self._devices.values()):
            await self._endings.wait()

    def _stop(self) -> None:
        self._running, self._stopped = False, True
        self._endings.tell()
        for device in self._devices.values():
            self._unfinished += device.fail_all(partial(RemoteFailure, STOPPED))

    def _advance(self, device: DeviceQueue) -> None:
        """Start what is next, if nothing is being computed. (Work that ends at once calls this while it starts.)"""
        if device.starting:
            return
        device.starting = True
        try:
            while self._running and device.fail_current is None:
                snapshot = device.next_order()
                if snapshot is not None:
                    self._take_snapshot(device, snapshot)
                elif not self._run_batch(device):
                    break
        finally:
            device.starting = False

    def _start(
        self, device: DeviceQueue, work: Callable[[], Any], done: OnComputed, fail: Callable[[Exception], object],
        uid: str, direction: str, rows: int,
    ) -> None:  # fmt: skip
        """Compute one thing. `done` gets the outcome; if the runtime ends before, `fail` gets an error instead."""
        assert device.executor is not None
        device.fail_current = fail

        def on_computed(value: Any, error: BaseException | None, seconds: float) -> None:
            if not self._running:
                return  # `fail` has been called
            device.fail_current, batch, device.batch = None, device.batch, None
            if value is PAUSED and batch is not None:
                batch.seconds += seconds
                device.others_first = device.others_first or not device.paused
                device.paused.append(batch)
            self._endings.tell()
            if isinstance(error, DeviceLost):
                self._error = error  # not a failure of this batch: the whole server is to end
                self._broken.set()
            self._advance(device)  # first, so that the device computes while answers are put together
            if value is not PAUSED:
                done(value, error, seconds)

        device.current = uid
        device.executor.start(work, on_computed, self._nursery, uid=uid, direction=direction, rows=rows)

    def _run_batch(self, device: DeviceQueue) -> bool:
        """Start the next batch, or the next part of one. Returns whether there was any."""
        batch = None
        if not self._settling and (device.others_first or not device.paused):
            batch = self._next_batch(device)
        if batch is None and device.paused:
            batch = device.paused.popleft()
            device.others_first = True
            if batch.ending is None and batch.tasks[0].deadline <= trio.current_time():
                self._counters.expired += 1
                batch.ending = DeadlineExceeded("the deadline passed between two parts; nothing was changed")
        elif batch is not None:
            device.others_first = False
        if batch is None:
            return False
        device.batch = batch
        done = partial(self._answer, batch)
        self._start(device, batch.step, done, batch.fail, batch.key.uid, batch.key.direction, batch.rows)
        return True

    def _next_batch(self, device: DeviceQueue) -> RunningBatch | None:
        now = trio.current_time()
        tasks, late = device.pools.next_batch(now, self._max_rows, device.blocked)
        self._counters.expired += len(late)
        for task in late:
            task.on_result(DeadlineExceeded("the deadline passed in the queue; nothing was computed"))
        if not tasks:
            return None
        uid, direction, _, options = tasks[0].key
        forward_updates = [task.forward_updates for task in tasks]
        parts = compute_batch_in_parts(
            self.backends[uid], direction, [task.tensors for task in tasks], forward_updates, options
        )
        return RunningBatch(tasks, parts, now, min(sum(task.rows for task in tasks), self._max_rows(uid)))

    def _answer(self, batch: RunningBatch, value: Any, error: BaseException | None, seconds: float) -> None:
        """Hand the outcome of a batch to its requests, and count it. `seconds`: of its last part."""
        if error is not None:
            said = (
                error if isinstance(error, RPCError) else RemoteFailure(f"the batch could not be computed: {error!r}")
            )
            batch.fail(said)
            return
        answers, updates = value
        seconds += batch.seconds
        answered = []
        for task, answer in zip(batch.tasks, answers, strict=True):
            if isinstance(answer, RPCError):
                task.on_result(answer)
            else:
                answered.append(task)
                task.on_result(Result(answer, batch.started - task.arrived, seconds, updates))
        uid, direction = batch.key.uid, batch.key.direction
        rows = self._counters.count_batch(uid, answered, batch.started, seconds)
        if answered:
            self._emit(BatchProcessed(uid=uid, direction=direction, rows=rows, requests=len(answered), seconds=seconds))

    def _take_snapshot(self, device: DeviceQueue, snapshot: StateOrder) -> None:
        backend = snapshot.backend

        def done(value: Any, error: BaseException | None, seconds: float) -> None:
            if error is None:
                snapshot.on_state(value)
            elif isinstance(error, CheckpointError):
                snapshot.on_state(CheckpointError(str(error)))
            else:  # in words, since the error itself may hold tensors; to the one who saves it is an ordinary failure
                snapshot.on_state(RemoteFailure(f"no snapshot of expert {backend.uid} could be taken: {error!r}"))

        def fail(error: Exception) -> None:
            snapshot.on_state(error)

        def work() -> State:
            if snapshot.state is None:
                return backend.state()
            backend.load_state(snapshot.state)
            return {}

        self._start(device, work, done, fail, backend.uid, "snapshot", 0)

    def _max_rows(self, uid: str) -> int:
        return self.backends[uid].config.max_batch_size

    async def snapshot(self, uid: str) -> State:
        """A copy of an expert's whole state, taken between two batches (or right here when the runtime has ended).

        Raises:
            UnknownExpert: It is not here.
            RemoteFailure: It cannot be taken, or a batch that has not ended may still be changing the expert.
        """
        backend = self._held(uid)
        device = self._devices[backend.config.device]
        if self._running:

            def begin(on_state: Callable[[State | Exception], None]) -> StateOrder:
                snapshot = StateOrder(backend, on_state)
                device.snapshots.append(snapshot)
                self._advance(device)
                return snapshot

            return await await_callback(begin)  # no deadline: at most one batch, and the runtime answers when it ends
        if any(thread.alive for thread in self._compute_threads):
            raise RemoteFailure(f"expert {uid} cannot be saved: a batch that has not ended may still be changing it")
        while self._unfinished:
            self._unfinished.pop().parts.close()  # which undoes what they have done
        return backend.state()

    async def load(self, uid: str, state: State) -> None:
        """Put a state in the place of an expert's own, between two batches. Call it while the runtime runs.

        Raises:
            CheckpointError: The state does not fit the expert, which is unchanged.
            UnknownExpert: It is not here.
            RemoteFailure: The runtime has ended.
        """
        backend = self._held(uid)
        device = self._devices[backend.config.device]

        def begin(on_state: Callable[[State | Exception], None]) -> StateOrder:
            snapshot = StateOrder(backend, on_state, state)
            device.snapshots.append(snapshot)
            self._advance(device)
            return snapshot

        if not self._running:
            raise RemoteFailure(STOPPED)
        await await_callback(begin)

    def statistics(self) -> ServerStatistics:
        """Gauges and counters, now. Call it in the lab thread."""
        devices = self._devices.values()
        return self._counters.statistics(
            sum(len(device.pools) for device in devices),
            sum(device.pools.rows for device in devices),
            sum(thread.processor_seconds for thread in self._compute_threads),
        )
