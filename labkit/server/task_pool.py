"""Task pools: requests that wait for the compute thread, gathered by expert, direction and schema.

Between `Runtime.put`, which adds requests, and the runtime's loop, which takes batches. Plain state: the time is passed
in, and nothing here waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from labkit.expert_protocol import Direction
from labkit.server.validation import NO_OPTIONS, CallOptions, Schema

T = TypeVar("T")


class PoolKey(NamedTuple):
    """What requests have in common that can be merged."""

    uid: str
    direction: Direction
    schema: Schema
    options: CallOptions = NO_OPTIONS


@dataclass(eq=False, slots=True)
class Task(Generic[T]):
    """One request in a pool.

    Args:
        key: What it has in common with those that it can be merged with.
        tensors: The inputs and, for a backward pass, the output gradient behind them.
        rows: The size of the first dimension of each tensor.
        arrived: When it came, in seconds on trio's clock.
        deadline: When it is too late to compute it, on the same clock.
        on_result: Called once with the result or the error.
        forward_updates: For a backward pass, the expert's updates at the forward pass, if the caller said so.
        load: As how many rows it counts against the limit of the queue.
        number: Its place in the order of arrival, given by the pools.
    """

    key: PoolKey
    tensors: Sequence[Tensor]  # each [rows, ...]
    rows: int
    arrived: float
    deadline: float
    on_result: Callable[[T | Exception], None]
    forward_updates: int | None = None
    load: int = 0
    number: int = -1


class TaskPool(Generic[T]):
    """The requests of one key, oldest first."""

    def __init__(self) -> None:
        self.tasks: OrderedDict[int, Task[T]] = OrderedDict()  # OrderedDict: cheap removal at the front and anywhere

    def pick(self, now: float, max_rows: int) -> tuple[list[Task[T]], list[Task[T]]]:
        """Pick the oldest requests that fit into `max_rows` rows together. One that is larger is picked alone.

        Returns them, and those met on the way that are too late.
        """
        picked: list[Task[T]] = []
        expired: list[Task[T]] = []
        rows = 0
        for task in self.tasks.values():
            if task.deadline <= now:
                expired.append(task)
            elif picked and rows + task.rows > max_rows:  # no overtaking: the next one opens the next batch
                break
            else:
                picked.append(task)
                rows += task.rows
        return picked, expired


class TaskPools(Generic[T]):
    """All pools of one device. `len()` counts the requests that wait, `rows` their rows, `load` those that count."""

    def __init__(self) -> None:
        self.rows = self.load = 0
        self._pools: dict[PoolKey, TaskPool[T]] = {}
        self._order: OrderedDict[int, Task[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return len(self._order)

    def add(self, task: Task[T]) -> None:
        """Put a request behind all others."""
        task.number, self._count = self._count, self._count + 1
        self._order[task.number] = task
        self._pools.setdefault(task.key, TaskPool()).tasks[task.number] = task
        self.rows += task.rows
        self.load += task.load

    def discard(self, task: Task[T]) -> bool:
        """Take a request out. Returns whether it was still waiting."""
        if self._order.get(task.number) is not task:
            return False
        del self._order[task.number]
        pool = self._pools[task.key]
        del pool.tasks[task.number]
        if not pool.tasks:
            del self._pools[task.key]
        self.rows -= task.rows
        self.load -= task.load
        return True

    def has(self, uid: str) -> bool:
        """Whether a request of this expert waits."""
        return any(key.uid == uid for key in self._pools)

    def take_all(self, uid: str) -> list[Task[T]]:
        """Take out all requests of an expert, and return them in the order of their arrival."""
        tasks = [task for task in self._order.values() if task.key.uid == uid]
        self._take(tasks)
        return tasks

    def next_batch(
        self, now: float, max_rows: Callable[[str], int], blocked: Callable[[PoolKey], bool] = lambda key: False
    ) -> tuple[list[Task[T]], list[Task[T]]]:
        """Take the next batch out of the pool with the oldest request: as many requests as fit into `max_rows(uid)`.

        `blocked`: tells pools that have to wait.

        Returns the batch, which is empty when nothing waits, and the requests whose deadline has passed. They are taken
        out as well.
        """
        late: list[Task[T]] = []
        while (key := next((task.key for task in self._order.values() if not blocked(task.key)), None)) is not None:
            picked, expired = self._pools[key].pick(now, max_rows(key.uid))
            self._take(picked)
            self._take(expired)
            late += expired
            if picked:
                return picked, late
        return [], late

    def clear(self) -> list[Task[T]]:
        """Take out all requests, and return them in the order of their arrival."""
        tasks = list(self._order.values())
        self._take(tasks)
        return tasks

    def _take(self, tasks: Iterable[Task[T]]) -> None:
        for task in tasks:
            self.discard(task)
