"""What a notebook holds of a local expert server: start, stop, kill and restart it, and ask it how it is doing.

A server serves as a child process or as a task of the lab thread (see `runners`). A handle has one runner after
another; what each order and event leads to is in the table of `states`. No batch passes here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from labkit.contact import Contact
from labkit.errors import LabkitError, ServerFailed
from labkit.events import Emit
from labkit.faults import Faults
from labkit.launch.runners import Runner, ServerPlan, ServerProcess, ServerTask, keep_port
from labkit.launch.states import ServerEvent, ServerState, next_state
from labkit.node import Node
from labkit.portal import Portal, unwrap
from labkit.server.statistics import ServerStatistics, call_statistics
from labkit.wire.zmq_transport import ZmqNetwork

logger = logging.getLogger(__name__)

START_TIMEOUT = 90.0  # seconds; a first import of torch from a slow disk takes most of it
MAX_STARTING = 8  # servers that start at the same time; hundreds would hold each other up beyond their deadlines
FIND_INTERVAL = 0.1  # seconds between two look-ups of the experts of a server that has just started


@dataclass(frozen=True)
class Lab:
    """Where local servers live: the lab thread of a swarm and what it holds. `faults`: what servers begin with."""

    portal: Portal
    nursery: trio.Nursery
    network: ZmqNetwork
    node: Node
    faults: Faults
    emit: Emit


class ServerHandle:
    """A local expert server. `Swarm.serve` returns handles, and `swarm.servers` lists them.

    Its methods may be called from any thread but the lab thread. Those that change something return when it is done,
    unless they are called with `wait=False`.

    Attributes:
        state: "starting", "running", "stopped", "killed" or "failed". A server that was told to stop is "stopped" at
            once, also while it still saves its experts.
        failure: What went wrong, if the state is "failed".
        alive: Whether it is running.
        uids: The experts that it holds.
        contact: Its address and public key; `None` before its first start.
        pid: The process that it runs in; `None` while it is not running.
        isolation: "process" or "task".
        plan: All that it takes to start it.
    """

    def __init__(self, lab: Lab, plan: ServerPlan, isolation: str) -> None:
        self.plan = plan
        self.isolation = isolation
        self.contact: Contact | None = None
        self.failure: str = ""
        self._lab = lab
        self._faults = Faults(lab.faults.latency, lab.faults.loss)
        self._state = ServerState.STOPPED
        self._changes = trio.lowlevel.ParkingLot()  # where tasks wait for the state to change
        self._orders = 0  # so that a start knows whether a later order has overtaken it
        self._runner: Runner | None = None  # what starts, serves or saves
        self._dying: set[Runner] = set()  # killed, and not ended yet; before that, no other runner starts

    @property
    def state(self) -> str:
        """One of starting, running, stopped, killed, failed."""
        return self._state.word

    @property
    def uids(self) -> tuple[str, ...]:
        """The experts that it holds."""
        return self.plan.server.uids

    @property
    def alive(self) -> bool:
        """Whether it is running."""
        return self._state is ServerState.RUNNING

    @property
    def pid(self) -> int | None:
        """The process that it runs in; `None` while it is not running."""
        return self._runner.pid if self._runner is not None and self.alive else None

    def kill(self, *, wait: bool = True) -> None:
        """End it as a crash would: SIGKILL for a process. Nothing is saved, and no other node is told.

        Args:
            wait: Return when it has ended; if false, return at once.
        """
        self._lab.portal.call(self.order, ServerEvent.KILL, wait)

    def stop(self, *, wait: bool = True) -> None:
        """End it cleanly: it saves its experts first. It goes on doing so if this call is interrupted.

        It is killed if that takes more than thirty seconds, and twenty more for each GB of its experts and their
        optimizers.

        Args:
            wait: Return when it has ended; if false, return at once, and `state` tells how it went.

        Raises:
            ServerFailed: It could not save its experts (only if `wait`).
        """
        self._lab.portal.call(self.order, ServerEvent.STOP, wait)

    def wait(self) -> str:
        """Wait until it does not run any more, for whatever reason.

        Returns:
            What went wrong; an empty string if nothing did.
        """
        return self._lab.portal.call(self.until_at_rest)

    def restart(self, *, wait: bool = True) -> None:
        """Start it again as the same node with the same experts, from their checkpoints if it keeps them.

        A server that is running is stopped first.

        Args:
            wait: Return when its experts can be found; if false, return at once, and `state` tells how it went.

        Raises:
            ServerFailed: It did not start, or could not save its experts before (only if `wait`).
        """
        self._lab.portal.call(self.order, ServerEvent.START, wait)

    def faults(self, latency: float | None = None, loss: float | None = None) -> Faults:
        """Inject faults into this server alone, from now on, and after a restart too. See `Swarm.faults`.

        Args:
            latency: Mean of an exponentially distributed delay before each call, in seconds; `None` leaves it as it is.
            loss: Share of calls that get no answer, from 0 to 1; `None` leaves it as it is.

        Returns:
            What holds now. With no arguments that is all that this method does.

        Raises:
            ValueError: A number is out of its range.
        """
        self._faults.set(latency, loss)
        if latency is not None or loss is not None:
            self._lab.portal.call(self.apply_faults)
        return self._faults

    def statistics(self, timeout: float = 2.0) -> ServerStatistics:
        """Ask it how it is doing: its experts and their updates, its queues and its speed.

        Args:
            timeout: Seconds to wait for its answer.

        Raises:
            ServerFailed: It has never been started.
            RPCError: It does not answer; a subclass says why.
        """
        return self._lab.portal.call(self.ask_statistics, timeout)

    def __repr__(self) -> str:
        where = f" at {self.contact.endpoint}" if self.contact is not None and self.alive else ""
        return f"<server {self.state}{where}: {len(self.uids)} experts, {self.uids[0]} … {self.uids[-1]}>"

    # ------------------------------------------------------------ in the lab thread

    async def ask_statistics(self, timeout: float) -> ServerStatistics:
        """`statistics` from inside the lab thread."""
        if self.contact is None:
            raise ServerFailed("this server has not been started")
        return await call_statistics(self._lab.node.client, self.contact, timeout)

    async def apply_faults(self, latency: float | None = None, loss: float | None = None) -> None:
        """`faults` from inside the lab thread: change what is given, and tell a running server what holds now."""
        self._faults.set(latency, loss)
        if self._runner is not None and not self._state.saves:
            self._runner.apply_faults(self._faults)

    async def until_at_rest(self) -> str:
        """`wait` from inside the lab thread."""
        while self._dying or not self._state.at_rest:
            if self._dying:
                await self._reap()
            else:
                await self._changes.park()
        return self.failure

    async def order(self, order: ServerEvent, wait: bool = True) -> None:
        """`restart`, `stop` or `kill` from inside the lab thread.

        Raises:
            ServerFailed: As those do.
            ValueError: Of a start: there is no such kind of expert, or it does not take these options.
        """
        saving, number = self._take(order), self._orders
        if wait:
            await self._carry_out(order, saving, number)
        else:
            self._lab.nursery.start_soon(self._carry_out_alone, order, saving, number)

    async def end(self, order: ServerEvent, timeout: float | None = None) -> str:
        """End it by `order`: STOP, DISCARD or KILL. If this is cancelled, it ends all the same.

        Args:
            timeout: Seconds that it has to save its experts; by default as many as their size takes.

        Returns:
            What went wrong; an empty string if nothing did.
        """
        return await self._finish(self._take(order), timeout)

    def _take(self, order: ServerEvent) -> Runner | None:
        """Take an order. Returns the runner that saves its experts now, if one does, for the caller to wait for."""
        self._orders += 1
        self._advance(order)
        return self._runner if self._state.saves else None

    def _advance(self, event: ServerEvent, failure: str = "") -> None:
        """Change the state as the table says, and tell the runner what that means for it."""
        before, self._state = self._state, next_state(self._state, event)
        if self.state != before.word:
            self.failure = failure
        if self._runner is not None:
            if self._state.saves and not before.saves:
                self._runner.stop()
            elif self._state.at_rest or self._state is ServerState.STARTING:
                self._kill(self._runner)
        self._changes.unpark_all()

    def _kill(self, runner: Runner) -> None:
        if self._runner is runner:
            self._runner = None
        self._dying.add(runner)
        runner.kill()

    async def _carry_out(self, order: ServerEvent, saving: Runner | None, number: int) -> None:
        """Do what is left of an order once `_take` has taken it."""
        if order is ServerEvent.START:
            await self._start(saving, number)
        elif failure := await self._finish(saving):
            raise ServerFailed(f"{self._label} did not end cleanly: {failure}")

    async def _carry_out_alone(self, order: ServerEvent, saving: Runner | None, number: int) -> None:
        """As `_carry_out`, for a caller who does not wait: errors are logged."""
        try:
            await self._carry_out(order, saving, number)
        except (LabkitError, ValueError) as error:
            logger.warning("%s", error)

    async def _finish(self, saving: Runner | None, timeout: float | None = None) -> str:
        """Wait until its experts are saved and all of its runners have ended. Returns what went wrong."""
        failure = "" if saving is None else await self._until_saved(saving, timeout)
        await self._reap()
        return failure

    async def _until_saved(self, saving: Runner, timeout: float | None = None) -> str:
        """Wait until a runner has saved its experts, and kill it if that takes too long. Returns what went wrong."""
        timeout = saving.stop_timeout if timeout is None else timeout
        failure = f"it had not saved its experts after {timeout:g} s, and was killed"
        with trio.move_on_after(timeout) as limit:
            failure = await saving.wait()
        self._note_end(saving, failure)
        if limit.cancelled_caught:
            self._kill(saving)
        return failure

    def _note_end(self, runner: Runner, failure: str) -> None:
        """Record the end of a runner. Every task that waits for it calls this; the first call counts."""
        self._dying.discard(runner)
        if self._runner is not runner:
            return  # it was killed, or its end is known
        self._runner = None
        if self._state is ServerState.RUNNING:
            self._advance(ServerEvent.ENDED, failure or "it ended by itself")
            logger.warning("%s has ended: %s", self._label, self.failure)
        elif failure:
            before = self._state is ServerState.RESTARTING
            self._advance(ServerEvent.NOT_SAVED, f"it did not end cleanly before: {failure}" if before else failure)
        else:
            self._advance(ServerEvent.SAVED)

    async def _reap(self) -> None:
        """Wait until all runners that were killed have ended."""
        while self._dying:
            runner = next(iter(self._dying))
            await runner.wait()
            self._dying.discard(runner)

    async def _start(self, saving: Runner | None, number: int) -> None:
        """Carry out order `number`, a start: wait for the runner before it, and bring up the next.

        Returns when its experts can be found. Raises as `order` does.
        """
        failure, cause = "it was interrupted", BaseException()
        try:
            if saving is not None:
                await self._until_saved(saving)
            with trio.fail_after(START_TIMEOUT):
                await self._reap()
                plan = await keep_port(self.plan, self.contact)
                if self._orders != number or self.state != "starting":
                    raise ServerFailed(self.failure)
                runner = self._runner = (
                    ServerProcess() if self.isolation == "process" else ServerTask(self._lab.network, self._lab.emit)
                )
                await self._lab.nursery.start(self._run, runner, plan)
                await self._until_found()
            return
        except trio.TooSlowError as error:
            failure, cause = f"it was not ready after {START_TIMEOUT:.0f} s", error
        except Exception as error:
            cause = unwrap(error)
            failure = str(cause) or repr(cause)
        finally:
            if self._orders == number and self.state == "starting":
                self._advance(ServerEvent.START_FAILED, failure)
        if self._orders != number:
            raise ServerFailed(f"{self._label} was ended while it was starting")
        if isinstance(cause, ValueError):
            raise cause
        hide = isinstance(cause, (LabkitError, trio.TooSlowError))  # says it all; else it is an expert's own code
        raise ServerFailed(f"{self._label} did not start: {failure}") from None if hide else cause

    async def _run(self, runner: Runner, plan: ServerPlan, *, task_status: trio.TaskStatus[None]) -> None:
        """The whole life of a runner."""
        async with trio.open_nursery() as nursery:
            contact = await nursery.start(runner.run, plan, self._faults)
            if self._runner is runner:
                self.contact = contact
                self._advance(ServerEvent.READY)
                await self.apply_faults()  # they may have changed meanwhile
            task_status.started()
            self._note_end(runner, await runner.wait())

    async def _until_found(self) -> None:
        """Wait until this process's own directory, which may know older records, finds the experts."""
        directory = self._lab.node.directory
        while True:
            if not self.alive:
                raise ServerFailed(self.failure)
            await directory.refresh(self.uids)
            found = await directory.find(self.uids)
            if all(info is not None and info.contact == self.contact for info in found.values()):
                return
            await trio.sleep(FIND_INTERVAL)

    @property
    def _label(self) -> str:
        return f"the server of {self.uids[0]}{' …' if len(self.uids) > 1 else ''}"


# ---------------------------------------------------------------- several at once


async def begin_all(handles: Sequence[ServerHandle]) -> None:
    """Start servers side by side, a few at a time; if one fails, none is left. Raises what the first to fail raises."""
    failures: list[Exception] = []
    limiter = trio.CapacityLimiter(MAX_STARTING)

    async def begin(handle: ServerHandle) -> None:
        try:
            async with limiter:
                await handle.order(ServerEvent.START)
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
                await handle.end(ServerEvent.KILL)
        raise


async def end_all(handles: Sequence[ServerHandle], timeout: float) -> None:
    """Stop servers side by side, and kill those that take longer than `timeout` seconds to save their experts."""

    async def end(handle: ServerHandle) -> None:
        order = ServerEvent.STOP if handle.plan.lasting else ServerEvent.DISCARD
        failure = await handle.end(order, timeout)
        if failure:
            logger.warning("%r did not end cleanly: %s", handle, failure)

    async with trio.open_nursery() as nursery:
        for handle in handles:
            nursery.start_soon(end, handle)
