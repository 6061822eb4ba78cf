"""Local expert servers: what a notebook holds of one. A server is a task of the lab thread or a child process."""

from __future__ import annotations

import logging
import os

import trio

from labkit.child import STOP_TIMEOUT, ProcessLife, ServerPlan
from labkit.contact import Contact
from labkit.errors import LabkitError, ServerFailed
from labkit.events import Emit, ignore
from labkit.faults import Faults
from labkit.portal import Portal, unwrap
from labkit.server.server import ServerStatistics, serve_experts
from labkit.wire.endpoint import ZmqNetwork
from labkit.wire.rpc import Caller
from labkit.wire.security import Admission

logger = logging.getLogger(__name__)

START_TIMEOUT = 90.0  # seconds; a first import of torch from a slow disk takes most of it


class ServerHandle:
    """A local expert server. `state` is one of starting, running, stopped, killed, failed.

    Its methods block until they are done and may be called from any thread but the lab thread.
    """

    def __init__(
        self, portal: Portal, nursery: trio.Nursery, network: ZmqNetwork, caller: Caller, plan: ServerPlan,
        isolation: str, faults: Faults, emit: Emit = ignore,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.isolation = isolation
        self.state = "stopped"
        self.contact: Contact | None = None
        self.failure: str = ""
        self._portal = portal
        self._nursery = nursery
        self._network = network
        self._caller = caller
        self._faults = faults
        self._emit = emit
        self._life: ProcessLife | TaskLife | None = None

    @property
    def uids(self) -> tuple[str, ...]:
        """The experts that it holds."""
        return self.plan.server.uids

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self.state == "running"

    @property
    def pid(self) -> int | None:
        """The process it runs in."""
        return self._life.pid if self._life is not None and self.alive else None

    def kill(self) -> None:
        """End it as a crash would: SIGKILL for a process. Nothing is saved and nobody is told."""
        self._portal.call(self.end, "killed")

    def stop(self) -> None:
        """End it cleanly: it saves its experts, if it keeps checkpoints."""
        self._portal.call(self.end, "stopped")

    def restart(self, *, wait: bool = True) -> None:
        """Start it again, as the same node with the same experts (from their checkpoints, if it keeps them).

        Returns when its experts can be found, or at once if not `wait`: then `state` tells. One that is running is
        stopped first. Raises `ServerFailed` (if `wait`).
        """
        if wait:
            self._portal.call(self._restart)
        else:
            self._portal.call(self._restart_later)

    def statistics(self, timeout: float = 2.0) -> ServerStatistics:
        """Ask it how it is doing. Raises a kind of `RPCError` if it does not answer."""
        return self._portal.call(self.ask_statistics, timeout)

    async def ask_statistics(self, timeout: float) -> ServerStatistics:
        """`statistics` from inside the lab thread."""
        if self.contact is None:
            raise ServerFailed("this server has not been started")
        reply = await self._caller.call(self.contact, "server.statistics", returns=ServerStatistics, timeout=timeout)
        assert isinstance(reply.body, ServerStatistics)
        return reply.body

    async def _restart(self) -> None:
        await self.end("stopped")
        await self.begin()

    async def _restart_later(self) -> None:
        async def restart() -> None:
            try:
                await self._restart()
            except ServerFailed as error:
                logger.warning("%s", error)

        self.state = "starting"
        self._nursery.start_soon(restart)

    async def begin(self) -> None:
        """Start it, and return when its experts can be found. Raises `ServerFailed`."""
        assert not self.alive
        self.state, self.failure = "starting", ""
        life = ProcessLife() if self.isolation == "process" else TaskLife(self._network, self._faults, self._emit)
        try:
            with trio.fail_after(START_TIMEOUT):
                self.contact = await self._nursery.start(self._live, life)
        except trio.TooSlowError:
            self._fail(f"it was not ready after {START_TIMEOUT:.0f} s")
        except Exception as error:
            cause = unwrap(error)
            if not isinstance(cause, LabkitError):
                raise cause from None
            self._fail(str(cause))
        finally:
            if self.state == "starting":  # interrupted
                self.state = "stopped"

    def _fail(self, reason: str) -> None:
        self.state, self.failure = "failed", reason
        raise ServerFailed(f"the server of {self.uids[0]} … did not start: {reason}") from None

    async def _live(self, life: ProcessLife | TaskLife, *, task_status: trio.TaskStatus[Contact]) -> None:
        """One life, from its start to its end, for whatever reason."""
        async with trio.open_nursery() as nursery:
            contact = await nursery.start(life.run, self.plan, self._faults)
            self._life, self.state = life, "running"
            task_status.started(contact)
            failure = await life.wait()
            if self._life is life and self.state == "running":
                self.state, self.failure = "failed", failure
                logger.warning("the server of %s … ended by itself: %s", self.uids[0], failure)
            nursery.cancel_scope.cancel()

    async def end(self, state: str, timeout: float = STOP_TIMEOUT) -> None:
        """`kill` or `stop` from inside the lab thread; `state` is the one that it ends in."""
        life, self._life = self._life, None
        if life is None:
            return
        self.state = state
        if state == "stopped":
            await life.stop(timeout)
        life.kill()
        await life.wait()

    def apply_faults(self) -> None:
        """Tell a running server what `faults` says now."""
        if self._life is not None:
            self._life.apply_faults(self._faults)

    def __repr__(self) -> str:
        where = f" at {self.contact.endpoint}" if self.contact is not None and self.alive else ""
        return f"<server {self.state}{where}: {len(self.uids)} experts, {self.uids[0]} … {self.uids[-1]}>"


class TaskLife:
    """A server as a task of the lab thread."""

    pid = os.getpid()

    def __init__(self, network: ZmqNetwork, faults: Faults, emit: Emit) -> None:
        self._network = network
        self._faults = faults
        self._emit = emit
        self._scope = trio.CancelScope()
        self._stop = trio.Event()
        self._ended = trio.Event()
        self._failure = "it returned"

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        started = _Once(task_status)
        try:
            with self._scope:
                await serve_experts(
                    self._network, plan.identity, plan.server, plan.node, join=plan.join,
                    admission=Admission(file=plan.member_file), faults=faults, emit=self._emit, stop=self._stop,
                    task_status=started,  # type: ignore[arg-type]
                )  # fmt: skip
        except Exception as error:
            if not started.done:
                raise
            self._failure = str(unwrap(error))
            logger.exception("a server in the lab thread failed")
        finally:
            self._ended.set()

    async def wait(self) -> str:
        await self._ended.wait()
        return self._failure

    async def stop(self, timeout: float) -> None:
        self._stop.set()
        with trio.move_on_after(timeout):
            await self._ended.wait()

    def kill(self) -> None:
        self._scope.cancel()

    def apply_faults(self, faults: Faults) -> None:
        """Nothing to do: the server draws from this object itself."""


class _Once:
    """A task status that remembers whether it was told."""

    def __init__(self, inner: trio.TaskStatus[Contact]) -> None:
        self._inner = inner
        self.done = False

    def started(self, value: Contact) -> None:
        self.done = True
        self._inner.started(value)
