"""Local expert servers: what a notebook holds of one. A server is a task of the lab thread or a child process."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from labkit.contact import Contact
from labkit.errors import LabkitError, ServerFailed
from labkit.events import Emit
from labkit.faults import Faults
from labkit.launch.runners import Runner, ServerPlan, ServerProcess, ServerTask, same_address
from labkit.node import Node
from labkit.portal import Portal, unwrap
from labkit.server.statistics import ServerStatistics, call_statistics
from labkit.wire.zmq_transport import ZmqNetwork

logger = logging.getLogger(__name__)

START_TIMEOUT = 90.0  # seconds; a first import of torch from a slow disk takes most of it
STARTING = 8  # servers at the same time


@dataclass(frozen=True)
class Lab:
    """Where local servers live: the lab thread of a swarm and what it holds. `faults`: what they begin with."""

    portal: Portal
    nursery: trio.Nursery
    network: ZmqNetwork
    node: Node
    faults: Faults
    emit: Emit


class ServerHandle:
    """A local expert server. `state` is one of starting, running, stopped, killed, failed.

    Its methods block until they are done and may be called from any thread but the lab thread.
    """

    def __init__(self, lab: Lab, plan: ServerPlan, isolation: str) -> None:
        self.plan = plan
        self.isolation = isolation
        self.state = "stopped"
        self.contact: Contact | None = None
        self.failure: str = ""
        self._lab = lab
        self._faults = Faults(lab.faults.latency, lab.faults.loss)
        self._life: Runner | None = None  # what starts or serves
        self._ending: set[Runner] = set()  # what is to end and has not yet; before that, no other begins
        self._saving: Runner | None = None  # that of them which saves its experts first

    @property
    def uids(self) -> tuple[str, ...]:
        """The experts that it holds."""
        return self.plan.server.uids

    @property
    def _label(self) -> str:
        return f"the server of {self.uids[0]}{' …' if len(self.uids) > 1 else ''}"

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self.state == "running"

    @property
    def pid(self) -> int | None:
        """The process it runs in."""
        return self._life.pid if self._life is not None and self.alive else None

    def kill(self, *, wait: bool = True) -> None:
        """End it as a crash would: SIGKILL for a process. Nothing is saved and nobody is told. Returns when it has
        ended, or at once if not `wait`."""
        self._lab.portal.call(self._kill if wait else self._kill_later)

    def stop(self, *, wait: bool = True) -> None:
        """End it cleanly: it saves its experts, in thirty seconds and twenty more for each GB of them and their
        optimizers. It goes on doing so if this is interrupted. Raises `ServerFailed` if it could not; if not `wait`,
        this returns at once, and `state` tells."""
        self._lab.portal.call(self._stop if wait else self._stop_later)

    def wait(self) -> str:
        """Wait until it does not run any more, for whatever reason. Returns what went wrong, if something did."""
        return self._lab.portal.call(self._wait)

    def restart(self, *, wait: bool = True) -> None:
        """Start it again, as the same node with the same experts (from their checkpoints, if it keeps them).

        Returns when its experts can be found, or at once if not `wait`: then `state` tells. One that is running is
        stopped first. Raises `ServerFailed` (if `wait`).
        """
        self._lab.portal.call(self.begin if wait else self._restart_later)

    def faults(self, latency: float | None = None, loss: float | None = None) -> Faults:
        """Inject faults into this server alone, from now on, and after a restart too. See `Swarm.faults`.

        Returns what holds now; with no arguments that is all it does, and any thread may ask. Raises `ValueError`.
        """
        self._faults.set(latency, loss)
        if latency is not None or loss is not None:
            self._lab.portal.call(self.apply_faults)
        return self._faults

    def statistics(self, timeout: float = 2.0) -> ServerStatistics:
        """Ask it how it is doing. Raises a kind of `RPCError` if it does not answer."""
        return self._lab.portal.call(self.ask_statistics, timeout)

    async def ask_statistics(self, timeout: float) -> ServerStatistics:
        """`statistics` from inside the lab thread."""
        if self.contact is None:
            raise ServerFailed("this server has not been started")
        return await call_statistics(self._lab.node.client, self.contact, timeout)

    async def _kill(self) -> None:
        await self.end("killed", save=False)

    async def _stop(self) -> None:
        await self._have_saved(self._tell_to_end("stopped"))

    async def begin(self) -> None:
        """Start it, and return when its experts can be found. One that is running is stopped first.

        Raises `ServerFailed`; `ValueError` for a kind of expert or options that cannot be.
        """
        await self._begin(*self._next_life())

    async def _kill_later(self) -> None:  # these three: what is to be done has begun when they return
        self._tell_to_end("killed", save=False)
        self._later(self._reap)

    async def _stop_later(self) -> None:
        self._later(self._have_saved, self._tell_to_end("stopped"))

    async def _restart_later(self) -> None:
        self._later(self._begin, *self._next_life())

    def _later(self, rest: Callable[..., Awaitable[None]], *args: Any) -> None:
        async def finish() -> None:
            try:
                await rest(*args)
            except (LabkitError, ValueError) as error:
                logger.warning("%s", error)

        self._lab.nursery.start_soon(finish)

    async def _wait(self) -> str:
        while life := self._life or next(iter(self._ending), None):
            await life.wait()
            self._ending.discard(life)
            await trio.lowlevel.checkpoint()
        return self.failure

    def _next_life(self) -> tuple[Runner, Runner | None]:
        """One that is to begin, and what saves its experts before, if something does."""
        saving = self._tell_to_end("stopped")
        life = self._life = (
            ServerProcess() if self.isolation == "process" else ServerTask(self._lab.network, self._lab.emit)
        )
        self.state, self.failure = "starting", ""
        return life, saving

    async def _begin(self, life: Runner, saving: Runner | None) -> None:
        failure, cause = "it was interrupted", BaseException()
        try:
            unsaved = await self._wait_for(saving)
            with trio.fail_after(START_TIMEOUT):
                await self._reap()
                if unsaved:
                    raise ServerFailed(f"it did not end cleanly before: {unsaved}")
                if self._life is not life:
                    raise ServerFailed("another order came between")
                await self._lab.nursery.start(self._live, life, await same_address(self.plan, self.contact))
                await self._be_found()
            return
        except trio.TooSlowError as error:
            failure, cause = f"it was not ready after {START_TIMEOUT:.0f} s", error
        except Exception as error:
            cause = unwrap(error)
            failure = str(cause) or repr(cause)
        finally:
            ended = self._life is not life and self.state != "failed"
            if self._life is life and self.state == "starting":
                self._life, self.state, self.failure = None, "failed", failure
                life.kill()  # where it has not begun, it never will, and somebody may be waiting for its end
        if ended:
            raise ServerFailed(f"{self._label} was ended while it was starting")
        if isinstance(cause, ValueError):
            raise cause
        hide = isinstance(cause, (LabkitError, trio.TooSlowError))  # says it all; else it is an expert's own code
        raise ServerFailed(f"{self._label} did not start: {failure}") from None if hide else cause

    async def _be_found(self) -> None:
        """Wait until this process's own directory, which may know older records, finds the experts."""
        directory = self._lab.node.directory
        while True:
            if not self.alive:
                raise ServerFailed(self.failure)
            await directory.refresh(self.uids)
            found = await directory.find(self.uids)
            if all(info is not None and info.contact == self.contact for info in found.values()):
                return
            await trio.sleep(0.1)

    async def _live(self, life: Runner, plan: ServerPlan, *, task_status: trio.TaskStatus[None]) -> None:
        """One life, from its start to its end, for whatever reason."""
        async with trio.open_nursery() as nursery:
            contact = await nursery.start(life.run, plan, self._faults)
            if self._life is life:
                self.contact, self.state = contact, "running"
                await self.apply_faults()  # they may have changed meanwhile
            task_status.started()
            failure = await life.wait()
            if self._life is life:
                self._life, self.state, self.failure = None, "failed", failure or "it ended by itself"
                logger.warning("%s has ended: %s", self._label, self.failure)
            self._ending.discard(life)
            if self._saving is life:  # whoever wanted that may have been interrupted
                self._saving = None
                self._note_failure(failure)

    async def end(self, state: str, timeout: float | None = None, *, save: bool = True) -> str:
        """`kill` or `stop` from inside the lab thread; one that is still starting is killed. One that somebody else has
        stopped, and that still saves its experts, is waited for, or killed.

        `timeout`: seconds to save them in; by default as many as their size takes. It ends in `state`, or as failed if
        it was to save its experts and did not. Returns what went wrong, or nothing. If this is cancelled, it ends all
        the same.
        """
        failure = await self._wait_for(self._tell_to_end(state, save=save), timeout)
        await self._reap()
        return failure

    def _tell_to_end(self, state: str, *, save: bool = True) -> Runner | None:
        """Returns what saves its experts now, if they are to be saved: to be waited for, and then to be buried."""
        life, self._life = self._life, None
        if life is not None:
            self._ending.add(life)
            if save and self.state == "running":
                self._saving = life
                life.stop()
            else:
                life.kill()
            self.state = state
        elif self._saving is not None and not save:  # that takes too long for somebody
            self.state = state
        if not save:
            self._saving = None
        return self._saving

    async def _wait_for(self, saving: Runner | None, timeout: float | None = None) -> str:
        """Wait until its experts are saved. Returns what went wrong."""
        if saving is None:
            return ""
        timeout = saving.stop_timeout if timeout is None else timeout
        failure = f"it had not saved its experts after {timeout:g} s, and was killed"
        with trio.move_on_after(timeout):
            failure = await saving.wait()
        self._note_failure(failure)
        return failure

    async def _have_saved(self, saving: Runner | None) -> None:
        failure = await self._wait_for(saving)
        await self._reap()
        if failure:
            raise ServerFailed(f"{self._label} did not end cleanly: {failure}")

    def _note_failure(self, failure: str) -> None:
        """What went wrong with a stop, unless somebody has killed it meanwhile."""
        if failure and self.state == "stopped":
            self.state, self.failure = "failed", failure

    async def _reap(self) -> None:
        """Kill what is still ending, and wait until nothing is."""
        self._saving = None
        for life in self._ending:
            life.kill()
        while self._ending:
            life = next(iter(self._ending))
            await life.wait()
            self._ending.discard(life)

    async def apply_faults(self, latency: float | None = None, loss: float | None = None) -> None:
        """`faults` from inside the lab thread: change what is given, and tell a running server what holds now."""
        self._faults.set(latency, loss)
        if self._life is not None:
            self._life.apply_faults(self._faults)

    def __repr__(self) -> str:
        where = f" at {self.contact.endpoint}" if self.contact is not None and self.alive else ""
        return f"<server {self.state}{where}: {len(self.uids)} experts, {self.uids[0]} … {self.uids[-1]}>"


# ---------------------------------------------------------------- several at once


async def begin_all(handles: Sequence[ServerHandle]) -> None:
    """Start servers side by side, a few at a time; if one fails, none is left. Raises what the first to fail raises."""
    failures: list[Exception] = []
    few = trio.CapacityLimiter(STARTING)  # hundreds at once would hold each other up beyond their deadlines

    async def begin(handle: ServerHandle) -> None:
        try:
            async with few:
                await handle.begin()
        except (LabkitError, ValueError) as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for handle in handles:
                nursery.start_soon(begin, handle)
        if failures:
            raise failures[0]
    except BaseException:
        with trio.CancelScope(shield=True):
            for handle in handles:
                await handle.end("killed", save=False)
        raise


async def end_all(handles: Sequence[ServerHandle], timeout: float) -> None:
    """Stop servers side by side, and kill those that take longer than `timeout` seconds to save their experts."""

    async def end(handle: ServerHandle) -> None:
        failure = await handle.end("stopped", timeout, save=handle.plan.lasting)
        if failure:
            logger.warning("%r did not end cleanly: %s", handle, failure)

    async with trio.open_nursery() as nursery:
        for handle in handles:
            nursery.start_soon(end, handle)
