"""Local expert servers: what a notebook holds of one. A server is a task of the lab thread or a child process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import trio

from labkit.contact import Contact
from labkit.errors import LabkitError, ServerFailed
from labkit.events import Emit
from labkit.faults import Faults
from labkit.lives import Life, ProcessLife, ServerPlan, TaskLife, is_free
from labkit.node import Node
from labkit.portal import Portal, unwrap
from labkit.server.statistics import ServerStatistics, call_statistics
from labkit.wire.addresses import split_address
from labkit.wire.zeromq import ZmqNetwork

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
        self._life: Life | None = None  # what starts or serves
        self._ending: set[Life] = set()  # what is to end and has not yet; before that, no other begins
        self._saving: Life | None = None  # that of them which saves its experts first

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

    def kill(self) -> None:
        """End it as a crash would: SIGKILL for a process. Nothing is saved and nobody is told."""
        self._lab.portal.call(self._kill)

    def stop(self) -> None:
        """End it cleanly: it saves its experts, in thirty seconds and twenty more for each GB of them and their
        optimizers. It goes on doing so if this is interrupted. Raises `ServerFailed` if it could not."""
        self._lab.portal.call(self._stop)

    def wait(self) -> str:
        """Wait until it does not run any more, for whatever reason. Returns what went wrong, if something did."""
        return self._lab.portal.call(self._wait)

    def restart(self, *, wait: bool = True) -> None:
        """Start it again, as the same node with the same experts (from their checkpoints, if it keeps them).

        Returns when its experts can be found, or at once if not `wait`: then `state` tells. One that is running is
        stopped first. Raises `ServerFailed` (if `wait`).
        """
        if wait:
            self._lab.portal.call(self._restart)
        else:
            self._lab.portal.call(self._restart_later)

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
        failure = await self.end("stopped")
        if failure:
            raise ServerFailed(f"{self._label} did not end cleanly: {failure}")

    async def _wait(self) -> str:
        while life := self._life or next(iter(self._ending), None):
            await life.wait()
            self._ending.discard(life)
            await trio.lowlevel.checkpoint()
        return self.failure

    async def _restart(self) -> None:
        await self._stop()
        await self.begin()

    async def _restart_later(self) -> None:
        async def begin(life: Life) -> None:
            try:
                await self._begin(life)
            except (LabkitError, ValueError) as error:
                logger.warning("%s", error)

        await self._stop()
        self._lab.nursery.start_soon(begin, self._new_life())

    async def begin(self) -> None:
        """Start it, and return when its experts can be found.

        Raises `ServerFailed`; `ValueError` for a kind of expert or options that cannot be.
        """
        await self._begin(self._new_life())

    def _new_life(self) -> Life:
        if self._life is not None:  # two restarts at once
            self._life.kill()
            self._ending.add(self._life)
        life = self._life = (
            ProcessLife() if self.isolation == "process" else TaskLife(self._lab.network, self._lab.emit)
        )
        self.state, self.failure = "starting", ""
        return life

    async def _begin(self, life: Life) -> None:
        failure, cause = "it was interrupted", BaseException()
        try:
            with trio.fail_after(START_TIMEOUT):
                await self._bury()
                await self._lab.nursery.start(self._live, life, await self._same_address())
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
        if ended:
            raise ServerFailed(f"{self._label} was ended while it was starting")
        if isinstance(cause, ValueError):
            raise cause
        hide = isinstance(cause, (LabkitError, trio.TooSlowError))  # says it all; else it is an expert's own code
        raise ServerFailed(f"{self._label} did not start: {failure}") from None if hide else cause

    async def _same_address(self) -> ServerPlan:
        """The plan, with the port of the last life if that is free: others know the server by it."""
        if self.contact is None:
            return self.plan
        listen, port = self.plan.node.listen, self.contact.port
        for _ in range(25):
            if is_free(split_address(listen)[0], port):
                return replace(self.plan, node=replace(self.plan.node, listen=f"{listen.rpartition(':')[0]}:{port}"))
            await trio.sleep(0.02)  # the last life's socket may be closing
        return self.plan

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

    async def _live(self, life: Life, plan: ServerPlan, *, task_status: trio.TaskStatus[None]) -> None:
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
        failure, saving = "", self._saving if save else None
        if saving is not None:
            timeout = saving.stop_timeout if timeout is None else timeout
            failure = f"it had not saved its experts after {timeout:g} s, and was killed"
            with trio.move_on_after(timeout):
                failure = await saving.wait()
            self._note_failure(failure)
        await self._bury()
        return failure

    def _note_failure(self, failure: str) -> None:
        """What went wrong with a stop, unless somebody has killed it meanwhile."""
        if failure and self.state == "stopped":
            self.state, self.failure = "failed", failure

    async def _bury(self) -> None:
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
