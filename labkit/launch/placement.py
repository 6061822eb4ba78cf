"""Where a server on a cluster runs: the task of Dask that keeps it, from its submission until a worker has begun it.

Dask gives a task to a worker that has its resources, whether or not other tasks hold them; it then waits there for as
long as a server lives. So labkit remembers which of them its own servers hold, and asks for the worker that has room
and the fewest of them. Where there is none, the task waits with Dask, where an adaptive cluster sees that a worker is
wanted, and is submitted anew for the first worker with room.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import trio

from labkit.errors import LabkitError, ServerFailed
from labkit.launch.by_value import HandedKind
from labkit.launch.cluster import Cluster, Workers, this_python
from labkit.launch.runners import ServerPlan

WORKER_TIMEOUT = 30.0  # seconds until a worker begins a server
LOOK_INTERVAL = 0.5  # seconds between two looks at the workers
ANSWER_TIME = 3.0  # seconds to ask a task why it failed


class Placement:
    """The task that keeps one server, and the worker that has begun it.

    Args:
        cluster: Where it may run.
        run: The name of its run, under which it says what happens.

    Attributes:
        attempt: The name of the attempt that was begun; empty before.
        worker: The address of the worker that has begun it; empty before.
        host: The name of its host.
        nthreads: How many threads that worker has.
    """

    def __init__(self, cluster: Cluster, run: str) -> None:
        self.attempt = self.worker = self.host = ""
        self.nthreads = 1
        self._cluster = cluster
        self._run = run
        self._future: Any = None
        self._number = 0  # of the submission
        self._begun = trio.Event()
        self._taken: str | None = None  # the worker at which we have taken room
        self._strays: list[tuple[str, str]] = []  # attempts that nobody wants: where, and their names
        self._checked: set[str] = set()  # workers that have the right labkit

    @property
    def status(self) -> str:
        """The word of Dask for the state of the task."""
        return str(self._future.status) if self._future is not None else "pending"

    async def find(self, plan: ServerPlan) -> None:
        """Wait until a worker has begun the task.

        Raises:
            ServerFailed: None has, in time, or labkit is not as it should be at one; the text says what to do.
        """
        workers: Workers = {}
        with trio.move_on_after(WORKER_TIMEOUT):
            while not self._begun.is_set() and self.status == "pending":
                workers = await self._cluster.all_workers()
                wanted = self._cluster.wanted(workers)
                await self._check(plan, {a: info for a, info in wanted.items() if a not in self._checked})
                if self._taken not in wanted:
                    await self._submit(self._cluster.choose(wanted))
                with trio.move_on_after(LOOK_INTERVAL):
                    await self._begun.wait()
        if self._begun.is_set():
            if self._taken != self.worker:  # Dask has chosen another one
                self._give_back()
                self._take(self.worker)
            await self._end_strays()
            return
        if self.status == "pending":
            raise ServerFailed(f"no worker began it within {WORKER_TIMEOUT:g} s: {self._cluster.why_none(workers)}")
        raise ServerFailed(f"Dask could not begin it: {await self.why_failed()}")

    async def _submit(self, address: str | None) -> None:
        """Submit the task for a worker that was chosen, or for any, if it has not been."""
        if address is None and self._taken is None and self._future is not None:
            return  # it waits already, wherever Dask has put it
        self._release()
        if address is not None:
            self._take(address)
        self._number += 1
        self._future = await self._cluster.submit(self._run, self._number, address)

    async def _check(self, plan: ServerPlan, workers: Workers) -> None:
        """Look whether these workers have the same labkit, and the same Python if code is to be handed to them."""
        pythons = await self._cluster.check(workers)
        for address, version in pythons.items():
            if isinstance(plan.server.kind, HandedKind) and version != this_python():
                raise ServerFailed(
                    f"{plan.server.kind.name} is defined here and not in a module, and so is handed over as code of "
                    f"Python {this_python()}, but {workers[address]['host']} (worker {address}) has {version}; use the "
                    "same version there, or define it in a module that the workers can import"
                )
        self._checked |= pythons.keys()

    def hear(self, message: dict[str, Any]) -> bool:
        """Take a message of a task. Returns whether it is of the attempt that counts."""
        if message["what"] == "begun":
            if message["number"] == self._number and not self._begun.is_set():
                self.attempt, self.worker = message["attempt"], message["address"]
                self.host, self.nthreads = message["host"], message["nthreads"]
                self._begun.set()
            else:
                self._strays.append((message["address"], message["attempt"]))
        return bool(message["attempt"] == self.attempt)

    def is_begun_anew(self, message: dict[str, Any]) -> bool:
        """Whether Dask has begun the task once more, as it does when its worker is gone."""
        if message["what"] != "begun" or message["number"] != self._number:
            return False
        return bool(message["attempt"] != self.attempt)

    async def why_failed(self) -> str:
        """Why the task has ended."""
        with suppress(LabkitError):
            error = await self._cluster.ask(self._future.exception, timeout=ANSWER_TIME)
            if error is not None:
                return f"{type(error).__name__}: {error}"
        return f"its task is {self.status}"

    async def close(self) -> None:
        """Let Dask forget the task, and end attempts that nobody wants."""
        self._release()
        await self._end_strays()

    async def _end_strays(self) -> None:
        while self._strays:
            with suppress(LabkitError):
                await self._cluster.order(*self._strays.pop(), "kill")

    def _take(self, address: str) -> None:
        self._taken = address
        self._cluster.room.take(address, self._cluster.resources)

    def _give_back(self) -> None:
        if self._taken is not None:
            self._cluster.room.give_back(self._taken, self._cluster.resources)
            self._taken = None

    def _release(self) -> None:
        self._give_back()
        if self._future is not None:
            self._future.release()
            self._future = None
