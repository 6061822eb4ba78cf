"""The processes of a benchmark: servers and clients of their own, which begin at the same time.

The parent holds a `Worker` for each process and sends it orders. The process itself runs a `WorkerRole`, a generator
function of a module of `labkit.bench`, which receives the orders and yields the answers. Orders and answers are JSON,
one a line, on the standard input and output of the process.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from labkit.launch.child_python import child_environment, child_folder, python_command
from labkit.launch.parent import limit_time, watch_parent

# Called with the first order. Each value that it yields is printed, and the `yield` returns the next order.
WorkerRole = Callable[[Any], Generator[Any, Any, None]]

TIME_LIMIT = 900.0  # seconds; a benchmark that takes longer hangs


class Worker:
    """The parent's side of a process.

    Args:
        role: What it runs, as `MODULE:FUNCTION`: a `WorkerRole` of a module of `labkit.bench`.
        order: Its first order.
    """

    def __init__(self, role: str, order: object) -> None:
        self.role = role
        self.process = subprocess.Popen(
            python_command("labkit.bench.processes", role), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=child_environment(), cwd=child_folder(),
        )  # fmt: skip
        try:
            self.send(order)
        except BaseException:
            self.kill()
            raise

    def send(self, order: object = None) -> None:
        """Send it its next order. Raises `RuntimeError` if it has ended."""
        assert self.process.stdin is not None
        line = json.dumps(order) + "\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            raise self._error() from None

    def receive(self) -> Any:
        """Wait for its next answer. Raises `RuntimeError` if it failed; it ends by itself after `TIME_LIMIT`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._error()
        return json.loads(line)

    def request(self, order: object = None) -> Any:
        """Send an order and wait for the answer."""
        self.send(order)
        return self.receive()

    def kill(self) -> None:
        """Kill the process and close its pipes."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                pass  # the process had not read all of its orders

    def _error(self) -> RuntimeError:
        return RuntimeError(f"a process of the benchmark ({self.role}) ended with exit code {self.process.wait()}")


class ProcessGroup:
    """The workers of a `with` block, all of which are killed at its end."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def start(self, role: str, *orders: object) -> list[Worker]:
        """Start a worker of this role (`MODULE:FUNCTION`) for each order."""
        for order in orders:
            self._workers.append(Worker(role, order))  # each ends with the block, even if the next cannot be started
        return self._workers[len(self._workers) - len(orders) :]

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.process.kill()  # all of them, before anything can go wrong with one
        for worker in self._workers:
            worker.kill()


def all_at_once(workers: Sequence[Worker], when_ready: Callable[[], object] | None = None) -> list[Any]:
    """Let workers begin together.

    Args:
        workers: Workers whose first answer says that they are ready, and whose second is what they have measured.
        when_ready: Called when all are ready, before they begin.

    Returns:
        What each has measured.
    """
    for worker in workers:
        worker.receive()
    if when_ready is not None:
        when_ready()
    for worker in workers:
        worker.send()
    return [worker.receive() for worker in workers]


def peak_rss_mb(pid: int | None = None) -> int:
    """The peak memory of a process in MB, by default of this one; 0 where the system does not say."""
    # On Linux `getrusage` says at least what the parent had when it started this process.
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
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10  # macOS counts in bytes, others in KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // scale


def main() -> None:
    """The process's own side. Its argument is the role."""
    orders: SimpleQueue[Any] = SimpleQueue()
    watch_parent(on_line=lambda line: orders.put(json.loads(line)))
    limit_time(TIME_LIMIT)
    module, _, name = sys.argv[1].partition(":")
    role: WorkerRole = getattr(importlib.import_module(f"labkit.bench.{module}"), name)
    steps = role(orders.get())
    order = None
    try:
        while True:
            print(json.dumps(steps.send(order)), flush=True)
            order = orders.get()
    except StopIteration:
        pass
