"""The runtime of an expert server (paper, section 3.3): it gathers requests into batches and runs them, one at a time.

On a batch's way between `server/server`, which calls `Runtime.submit` on the lab thread, and `server/backend`, which
computes on the compute thread of its device (`server/compute`), one `server/batch` after the other.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

import trio
from torch import Tensor

from labkit.errors import DeadlineExceeded, Overloaded, RemoteFailure, RPCError, UnknownExpert
from labkit.events import BatchProcessed, Emit, ignore
from labkit.histogram import Histogram
from labkit.server.backend import ExpertBackend, schema_of
from labkit.server.batch import compute_batch
from labkit.server.compute import ComputeThread, Executor, InlineCompute
from labkit.server.task_pool import PoolKey, Task, TaskPools

__all__ = ["ComputeThread", "Executor", "InlineCompute", "Result", "Runtime", "RuntimeStatistics"]

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


@dataclass(slots=True)
class ExpertCounts:
    """Of one expert: its optimizer steps; rows and requests answered, and the seconds those took in queue and batch."""

    updates: int = 0
    rows: int = 0
    requests: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RuntimeStatistics:
    """What a runtime has done and what waits. Plain values, for sending.

    `batches`, `rows`, `busy_seconds`: computed. `overloaded`: requests turned away. `expired`: requests whose deadline
    passed while they waited. `uptime`: seconds since it began to run. `…_times`: `labkit.histogram` counts of the
    requests answered.
    """

    queued_requests: int
    queued_rows: int
    batches: int
    rows: int
    busy_seconds: float
    overloaded: int
    expired: int
    uptime: float
    experts: Mapping[str, ExpertCounts]  # by uid; these go on counting
    total_times: list[int]  # queue and batch together
    queue_times: list[int]
    compute_times: list[int]


@dataclass(slots=True)
class _Device:
    """What waits for one device: requests in pools, and snapshots to take between two batches."""

    pools: TaskPools[Result] = field(default_factory=TaskPools)
    snapshots: deque[tuple[ExpertBackend, Callable[[dict[str, Tensor] | Exception], None]]] = field(
        default_factory=deque
    )
    wake: trio.Event = field(default_factory=trio.Event)


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
        self._running = self._stopped = False
        self._batches = self._rows = self._overloaded = self._expired = 0
        self._busy_seconds = 0.0
        self._started_at: float | None = None
        self._experts = {uid: ExpertCounts() for uid in self.backends}
        self._total_times, self._queue_times, self._compute_times = Histogram(), Histogram(), Histogram()

    async def submit(
        self, uid: str, direction: str, tensors: Sequence[Tensor], deadline: float, seen: int | None = None
    ) -> Result:
        """Have one request computed: the inputs, and for a backward pass the output gradient behind them.

        `deadline`: on trio's clock; a request that has not been started by then never is. `seen`: the expert's updates
        when it answered the forward pass that a backward pass belongs to, if that is known. If the caller is cancelled,
        the request leaves its pool. Raises `UnknownExpert`, `BadRequest`, `Overloaded` (at once), `NonFiniteTensor`,
        `DeadlineExceeded`, or `RemoteFailure` when the expert's own code fails or the runtime stops.
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
            self._overloaded += 1
            raise Overloaded(f"{queued} rows wait here already, of at most {self.max_queue_rows}; nothing was computed")

        device = self._devices[backend.config.device]
        answers: list[Result | Exception] = []
        answered = trio.Event()

        def finish(answer: Result | Exception) -> None:
            answers.append(answer)
            answered.set()

        key = PoolKey(uid, "forward" if direction == "forward" else "backward", schema_of(tensors))
        task: Task[Result] = Task(key, tensors, rows, arrived=now, deadline=deadline, finish=finish, seen=seen)
        device.pools.add(task)
        device.wake.set()
        try:
            with trio.move_on_at(deadline):
                await answered.wait()
        finally:
            waiting = device.pools.discard(task)
        if not answers:
            self._expired += waiting
            state = "still queued; nothing was computed" if waiting else "being computed; its answer is dropped"
            raise DeadlineExceeded(f"at its deadline the request was {state}")
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compute until cancelled. What waits then fails with `RemoteFailure`. A runtime runs once."""
        assert not self._running and not self._stopped, "a runtime runs once"
        self._running = True
        self._started_at = trio.current_time()
        try:
            async with AsyncExitStack() as threads, trio.open_nursery() as nursery:
                for name, device in self._devices.items():
                    executor = self._executor
                    if executor is None:
                        executor = await threads.enter_async_context(ComputeThread(name, threads=self._threads))
                        self._compute_threads.append(executor)
                    nursery.start_soon(self._serve_device, device, executor)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._running, self._stopped = False, True
            for device in self._devices.values():
                for task in device.pools.clear():
                    task.finish(RemoteFailure(STOPPED))
                while device.snapshots:
                    device.snapshots.popleft()[1](RemoteFailure(STOPPED))

    async def _serve_device(self, device: _Device, executor: Executor) -> None:
        while True:
            while device.snapshots:
                backend, finish = device.snapshots.popleft()
                await self._take_snapshot(backend, finish, executor)
            batch, late = device.pools.next_batch(trio.current_time(), self._max_rows)
            self._expired += len(late)
            for task in late:
                task.finish(DeadlineExceeded("the deadline passed in the queue; nothing was computed"))
            if batch:
                await self._run_batch(batch, executor)
            elif not device.snapshots:
                device.wake = trio.Event()
                await device.wake.wait()  # no deadline: there is nothing to do until a request comes

    async def _run_batch(self, batch: list[Task[Result]], executor: Executor) -> None:
        (uid, direction, _), backend = batch[0].key, self.backends[batch[0].key.uid]
        rows, started = sum(task.rows for task in batch), trio.current_time()
        requests, seen = [task.tensors for task in batch], [task.seen for task in batch]
        work = partial(compute_batch, backend, direction, requests, seen)
        answers: list[list[Tensor] | RPCError] = [RemoteFailure(STOPPED) for _ in batch]
        updates, seconds = 0, 0.0
        try:
            (answers, updates), seconds = await executor.run(work, uid=uid, direction=direction, rows=rows)
        finally:  # also when the runtime is cancelled meanwhile
            for task, answer in zip(batch, answers, strict=True):
                queued = started - task.arrived
                task.finish(answer if isinstance(answer, RPCError) else Result(answer, queued, seconds, updates))
        done = [task for task, answer in zip(batch, answers, strict=True) if not isinstance(answer, RPCError)]
        self._busy_seconds += seconds
        if done:
            rows = self._count(uid, done, started, seconds)
            self._emit(BatchProcessed(uid=uid, direction=direction, rows=rows, requests=len(done), seconds=seconds))

    def _count(self, uid: str, done: list[Task[Result]], started: float, seconds: float) -> int:
        """Count a batch whose requests were answered. Returns its rows."""
        expert, rows = self._experts[uid], sum(task.rows for task in done)
        self._batches += 1
        self._rows += rows
        expert.rows += rows
        expert.requests += len(done)
        for task in done:
            queued = started - task.arrived
            expert.seconds += queued + seconds
            self._total_times.add(queued + seconds)
            self._queue_times.add(queued)
            self._compute_times.add(seconds)
        return rows

    async def _take_snapshot(
        self, backend: ExpertBackend, finish: Callable[[dict[str, Tensor] | Exception], None], executor: Executor
    ) -> None:
        answer: dict[str, Tensor] | Exception = RemoteFailure(STOPPED)
        try:
            answer, _ = await executor.run(backend.state, uid=backend.uid, direction="snapshot", rows=0)
        except Exception as error:
            answer = error
        finally:
            finish(answer)

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
            device.wake.set()
            await answered.wait()  # no deadline: at most one batch, and the runtime answers when it ends
            if isinstance(answers[0], Exception):
                raise answers[0]
            return answers[0]
        if any(thread.alive for thread in self._compute_threads):
            raise RemoteFailure(f"expert {uid} cannot be saved: a batch that never ended may still be changing it")
        return backend.state()

    def statistics(self) -> RuntimeStatistics:
        """Gauges and counters, now. In the lab thread."""
        for uid, backend in self.backends.items():
            self._experts[uid].updates = backend.updates
        return RuntimeStatistics(
            queued_requests=sum(len(device.pools) for device in self._devices.values()),
            queued_rows=sum(device.pools.rows for device in self._devices.values()),
            batches=self._batches,
            rows=self._rows,
            busy_seconds=self._busy_seconds,
            overloaded=self._overloaded,
            expired=self._expired,
            uptime=0.0 if self._started_at is None else trio.current_time() - self._started_at,
            experts=self._experts,
            total_times=list(self._total_times.counts),
            queue_times=list(self._queue_times.counts),
            compute_times=list(self._compute_times.counts),
        )
