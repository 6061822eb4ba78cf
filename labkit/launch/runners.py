"""The runners of a server: each serves once, from its start to its end, as a task, a process, or on a cluster.

`ServerTask`, here, serves in the lab thread; `ServerProcess` (in `server_process`) starts a child process, and
`ServerOnWorker` (in `cluster_runner`) the same child at a worker of a cluster. A `ServerLifecycle` has one runner after
another, and treats all kinds alike. A runner starts the server that batches reach through the network; no batch passes
here.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from labkit.contact import Contact
from labkit.events import AddressNews, Emit, Event, ExpertNews, ignore
from labkit.faults import Faults
from labkit.launch.child import MAX_ORDERS
from labkit.node import NodeConfig
from labkit.portal import unwrap
from labkit.server.config import ServerConfig
from labkit.server.leaving import STOP_TIMEOUT
from labkit.server.loading import LoadOrder
from labkit.server.serving import serve_experts
from labkit.wire.security import Admission, Identity
from labkit.wire.zmq_transport import ZmqNetwork

logger = logging.getLogger(__name__)

LOG_LINES = 1000  # of what a server wrote, which are kept


@dataclass(frozen=True)
class ServerPlan:
    """All that it takes to start a server, and to start it again as the same node.

    Attributes:
        server: What it serves.
        node: How its node listens, and its limits.
        identity: Its key pair.
        join: Contacts of the swarm that it joins.
        member_file: The public keys that may connect, in a private swarm.
        lasting: Whether its checkpoints outlive the swarm, and so are worth saving when the swarm ends.
        folder: The swarm's temporary folder, which has to last as long as the server does.
    """

    server: ServerConfig
    node: NodeConfig
    identity: Identity
    join: tuple[Contact, ...]
    member_file: Path | None = None
    lasting: bool = True
    folder: str | None = None


class Runner(Protocol):
    """What serves once, from its start to its end. `stop_timeout`: seconds that a clean stop may take."""

    stop_timeout: float
    on_news: Callable[[AddressNews | ExpertNews], object]  # called when there is news of its address or its experts
    on_held: Callable[[tuple[str, ...]], object]  # called with the experts that it holds, whenever some come or go

    @property
    def host(self) -> str:
        """The name of the host that it runs on; empty for this one."""

    @property
    def worker(self) -> str:
        """The address of the worker of a cluster that it runs at; empty if it runs at none."""

    @property
    def pid(self) -> int | None:
        """The process that it runs in."""

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        """Serve until the end, whatever the reason for it. Raises if it does not come to serve."""

    async def wait(self) -> str:
        """Wait until `run` has ended. Returns what went wrong, or an empty string after a clean stop."""

    def stop(self) -> None:
        """Ask it to leave the swarm without losing a call, to save its experts and to end."""

    def hurry(self, alone: bool = False) -> None:
        """Tell it, before it is stopped, that there will be little time.

        Args:
            alone: Whether no other server of its grid goes on, to which it could hand experts over.
        """

    def kill(self) -> None:
        """End it at once, also while it starts. Nothing is saved."""

    def apply_faults(self, faults: Faults) -> None:
        """Tell it which faults to inject from now on."""

    async def load(self, folder: str, uids: Sequence[str], check_only: bool) -> str:
        """Let it load experts, while it serves: see `LoadOrder`. Returns what went wrong, or an empty string."""


class ServerTask:
    """A server as a task of the lab thread."""

    host = worker = ""
    pid = os.getpid()

    def __init__(self, network: ZmqNetwork, emit: Emit, log: deque[str]) -> None:
        self._log = log
        self.stop_timeout = STOP_TIMEOUT
        self.on_news: Callable[[AddressNews | ExpertNews], object] = ignore
        self.on_held: Callable[[tuple[str, ...]], object] = lambda uids: None
        self._network = network
        self._emit = emit
        self._scope = trio.CancelScope()
        self._stop, self._hurry, self._alone = trio.Event(), trio.Event(), trio.Event()
        self._ended = trio.Event()
        self._failure = ""
        self._to_carry_out, self._orders = trio.open_memory_channel[LoadOrder](MAX_ORDERS)

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        status = _Status(task_status)
        _log.set(self._log)
        logging.getLogger("labkit").addHandler(_capture)  # once, however often
        try:
            with self._scope:
                await serve_experts(
                    self._network, plan.identity, plan.server, plan.node, join=plan.join,
                    admission=Admission(file=plan.member_file), faults=faults, emit=self._on_event, stop=self._stop,
                    hurry=self._hurry, alone=self._alone, allow=self._set_stop_timeout, orders=self._orders,
                    on_held=lambda uids: self.on_held(tuple(sorted(uids))), task_status=status,  # type: ignore[arg-type]
                )  # fmt: skip
            if self._scope.cancelled_caught:
                self._failure = "it was killed"
        except Exception as error:
            if not status.started_already:
                raise
            cause = unwrap(error)
            self._failure = str(cause) or type(cause).__name__
            logger.warning("a server in the lab thread failed", exc_info=error)
        finally:
            self._ended.set()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, AddressNews | ExpertNews):
            self.on_news(event)
        else:
            self._emit(event)

    def _set_stop_timeout(self, seconds: float) -> None:
        self.stop_timeout = seconds

    async def wait(self) -> str:
        await self._ended.wait()
        return self._failure

    def stop(self) -> None:
        self._stop.set()

    def hurry(self, alone: bool = False) -> None:
        self._hurry.set()
        if alone:
            self._alone.set()

    def kill(self) -> None:
        self._scope.cancel()

    def apply_faults(self, faults: Faults) -> None:
        pass  # the server holds this very object

    async def load(self, folder: str, uids: Sequence[str], check_only: bool) -> str:
        answered, failure = trio.Event(), "the server has ended meanwhile"

        def answer(said: str) -> None:
            nonlocal failure
            failure = said
            answered.set()

        await self._to_carry_out.send(LoadOrder(folder, uids, check_only, answer))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_call_after, self._ended, nursery.cancel_scope.cancel)
            await answered.wait()
            nursery.cancel_scope.cancel()
        return failure


class _Capture(logging.Handler):
    """Keeps what labkit logs in a task of a server, and in the threads of such a task, for `ServerHandle.logs`."""

    leaves_printing = True  # as if it were not there

    def emit(self, record: logging.LogRecord) -> None:
        if (log := _log.get()) is not None:
            log.append(self.format(record))
        # Where nobody has set up logging, Python prints warnings, unless a logger has a handler, which is this one.
        last = logging.lastResort
        if last is not None and record.levelno >= last.level and not self._others(record.name):
            last.handle(record)

    def _others(self, name: str) -> bool:
        found: logging.Logger | None = logging.getLogger(name)
        while found is not None:
            if any(handler is not self for handler in found.handlers):
                return True
            found = found.parent if found.propagate else None
        return False


_log: ContextVar[deque[str] | None] = ContextVar("log", default=None)
_capture = _Capture(logging.WARNING)
_capture.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))


async def _call_after(event: trio.Event, function: Callable[[], object]) -> None:
    await event.wait()
    function()


class _Status:
    """A task status that remembers whether `started` was called."""

    def __init__(self, inner: trio.TaskStatus[Contact]) -> None:
        self._inner = inner
        self.started_already = False

    def started(self, value: Contact) -> None:
        self.started_already = True
        self._inner.started(value)
