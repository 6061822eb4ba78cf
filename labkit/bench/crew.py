"""The processes of a benchmark: servers and clients of their own, that begin at the same time. See `worker`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any


class Worker:
    """One process. What it prints, `hear` returns, a value at a time."""

    def __init__(self, role: str, order: object) -> None:
        self.role = role
        self.process = subprocess.Popen(
            [sys.executable, "-m", "labkit.bench.worker", role], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        try:
            self.tell(order)
        except BaseException:
            self.end()
            raise

    def tell(self, order: object = None) -> None:
        """Give it its next order. Raises `RuntimeError` if it is gone."""
        assert self.process.stdin is not None
        line = json.dumps(order) + "\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def hear(self) -> Any:
        """Wait for its answer (a worker ends of itself when it takes too long). Raises `RuntimeError` if it failed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

    def ask(self, order: object = None) -> Any:
        """`tell`, then `hear`."""
        self.tell(order)
        return self.hear()

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                pass  # it had not read all of its orders

    def _ended(self) -> RuntimeError:
        return RuntimeError(f"a process of the benchmark ({self.role}) ended with exit code {self.process.wait()}")


class Crew:
    """Workers, which end with the block."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def hire(self, role: str, *orders: object) -> list[Worker]:
        """Start a worker of this role (`MODULE:FUNCTION`) for each order."""
        for order in orders:
            self._workers.append(Worker(role, order))  # so each ends with the block, even if the next can't be started
        return self._workers[len(self._workers) - len(orders) :]

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.process.kill()  # all of them, before anything can go wrong with one
        for worker in self._workers:
            worker.end()


def all_at_once(workers: Sequence[Worker], ready: Callable[[], object] | None = None) -> list[Any]:
    """Wait until all are ready (then call `ready`), let them begin together, and return what each has measured."""
    for worker in workers:
        worker.hear()
    if ready is not None:
        ready()
    for worker in workers:
        worker.tell()
    return [worker.hear() for worker in workers]
