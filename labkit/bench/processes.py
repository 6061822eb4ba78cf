"""The processes of a benchmark: servers and clients of their own, that begin at the same time. See `worker`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any


class Worker:
    """One process. What it prints, `hear` returns, a value at a time."""

    def __init__(self, role: str, order: object) -> None:
        self.role = role
        self.process = subprocess.Popen(
            [sys.executable, "-m", "labkit.bench.processes", role], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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


class ProcessGroup:
    """Workers, which end with the block."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def start(self, role: str, *orders: object) -> list[Worker]:
        """Start a worker of this role (`MODULE:FUNCTION`) for each order."""
        for order in orders:
            self._workers.append(Worker(role, order))  # so each ends with the block, even if the next can't be started
        return self._workers[len(self._workers) - len(orders) :]

    def __enter__(self) -> ProcessGroup:
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


Role = Callable[[Any], Generator[Any, Any, None]]

TIME_LIMIT = 900.0  # seconds; a benchmark that takes longer hangs


def main() -> None:
    """`python -m labkit.bench.processes MODULE:ROLE`."""
    orders: SimpleQueue[Any] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    last_resort = threading.Timer(TIME_LIMIT, os._exit, [1])
    last_resort.daemon = True
    last_resort.start()
    module, _, name = sys.argv[1].partition(":")
    role: Role = getattr(importlib.import_module(f"labkit.bench.{module}"), name)
    steps = role(orders.get())
    order = None
    try:
        while True:
            print(json.dumps(steps.send(order)), flush=True)
            order = orders.get()
    except StopIteration:
        pass


def peak_rss_mb(pid: int | None = None) -> int:
    """The most memory that a process, this one by default, had at a time, in MB; 0 where the system does not say."""
    # What `getrusage` says on Linux is, at the least, what the parent had when it started this process.
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
        return int(line.split()[1]) >> 10
    if pid is not None:
        return 0
    try:
        import resource
    except ImportError:
        return 0
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10  # it is in bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // scale


if __name__ == "__main__":
    main()
