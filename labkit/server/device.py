"""What waits for one device of a server, and what it computes. Plain state; `server/runtime` decides with it.

Order: what requests and orders are answered with, the queue of a device, and who waits until something ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio
from torch import Tensor

from labkit.errors import CallCancelled
from labkit.server.backend import ExpertBackend
from labkit.server.batch import RunningBatch
from labkit.server.executor import Executor
from labkit.server.task_pool import PoolKey, Task, TaskPools


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
class StateOrder:
    """A copy of an expert's state that is to be taken between two batches, and handed to `on_state`.

    If `state` is given, it is put in the expert's place, and nothing is taken.
    """

    backend: ExpertBackend
    on_state: Callable[[State | Exception], None]
    state: State | None = None

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.on_state = lambda state: None


@dataclass(slots=True)
class DeviceQueue:
    """What waits for one device, requests in pools and snapshots to take between two batches, and what is computed."""

    executor: Executor | None = None  # while the runtime runs
    pools: TaskPools[Result] = field(default_factory=TaskPools)
    snapshots: deque[StateOrder] = field(default_factory=deque)
    fail_current: Callable[[Exception], object] | None = None  # fails what is being computed; None while nothing is
    current: str = ""  # the expert of what is being computed, or was last
    batch: RunningBatch | None = None  # which is being computed
    paused: deque[RunningBatch] = field(default_factory=deque)  # between two of their parts
    others_first: bool = False  # whether it is the turn of another batch than those
    starting: bool = False

    def blocked(self, key: PoolKey) -> bool:
        """Whether such requests have to wait for the rest of a batch."""
        return any(batch.blocks(key) for batch in self.paused)

    def discard(self, task: QueuedRequest) -> bool:
        """Take a request out whose answer is not needed any more. Returns whether it was still queued.

        If it is computed in parts, there is no further one.
        """
        for batch in (*self.paused, self.batch):
            if batch is not None and batch.tasks == [task]:
                batch.ending = CallCancelled("the caller gave up")
        return self.pools.discard(task)

    def fail_all(self, make_error: Callable[[], Exception]) -> list[RunningBatch]:
        """Fail all that waits and is computed. Returns the batches that have not ended."""
        if self.fail_current is not None:
            self.fail_current(make_error())
        unfinished = [*self.paused, *([self.batch] if self.batch is not None else [])]
        for batch in self.paused:
            batch.fail(make_error())
        for task in self.pools.clear():
            task.on_result(make_error())
        while self.snapshots:
            self.snapshots.popleft().on_state(make_error())
        return unfinished

    def is_busy_with(self, uid: str) -> bool:
        """Whether anything of this expert waits, or is being computed."""
        return (
            (self.fail_current is not None and self.current == uid)
            or self.pools.has(uid)
            or any(batch.key.uid == uid for batch in self.paused)
            or any(order.backend.uid == uid for order in self.snapshots)
        )

    def next_order(self) -> StateOrder | None:
        """Take out the first order that need not wait for the rest of a batch."""
        order = next((order for order in self.snapshots if not self._waits(order)), None)
        if order is not None:
            self.snapshots.remove(order)
        return order

    def _waits(self, order: StateOrder) -> bool:
        return any(
            batch.key.uid == order.backend.uid and (batch.key.direction == "backward" or order.state is not None)
            for batch in self.paused
        )


class Endings:
    """Wakes those who wait until something has ended, and then look whether it is what they wait for."""

    def __init__(self) -> None:
        self._waiting = set[trio.Event]()

    def tell(self) -> None:
        """Something has ended."""
        for event in self._waiting:
            event.set()

    async def wait(self) -> None:
        """Wait until the next time that something ends."""
        event = trio.Event()
        self._waiting.add(event)
        try:
            await event.wait()
        finally:
            self._waiting.discard(event)
