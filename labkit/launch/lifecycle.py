"""The life of a local server, lived in the lab thread: it takes orders, and starts, watches and ends runners.

A `ServerHandle` passes a notebook's orders on to it. What each order and each event leads to is in the table of
`states`; what serves is in `runners`. No batch passes here.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import trio

from labkit.contact import Contact
from labkit.errors import CheckpointError, LabkitError, ServerFailed
from labkit.events import AddressChanged, AddressNews, ExpertNews, ReachabilityChanged
from labkit.expert_uid import ExpertInfo
from labkit.faults import Faults
from labkit.launch.cluster import Cluster
from labkit.launch.cluster_runner import ServerOnWorker
from labkit.launch.lab import Lab
from labkit.launch.ports import keep_port
from labkit.launch.runners import LOG_LINES, Runner, ServerPlan, ServerTask
from labkit.launch.server_process import ServerProcess
from labkit.launch.states import ServerEvent, ServerState, next_state
from labkit.portal import unwrap
from labkit.reachability import Reach

logger = logging.getLogger(__name__)

START_TIMEOUT = 90.0  # seconds; a first import of torch from a slow disk takes most of it
FIND_INTERVAL = 0.1  # seconds between two look-ups of the experts of a server that has just started


class ServerLifecycle:
    """The life of a local server: one runner after another. Its methods run in the lab thread.

    Attributes:
        plan: All that it takes to start the server.
        isolation: "process", "task" or "cluster".
        contact: Its address and public key; `None` before its first start.
        reachability: Whether others reach it, as it was found last.
        failure: What went wrong, if the state is "failed".
        faults: What the server injects, now and after a restart.
        held: The experts that it holds; while it does not run, those that it begins with.
        log: The last lines that the server wrote, those of earlier runners first.
        host: The name of the host that it runs on, or ran on last; empty for this one.
        worker: The address of its worker, or last one, if that is of a cluster; else empty.
    """

    def __init__(self, lab: Lab, plan: ServerPlan, isolation: str, cluster: Cluster | None = None) -> None:
        self.plan = plan
        self.isolation = isolation
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self.host = self.worker = ""
        self.held = plan.server.uids
        self._cluster = cluster
        self.contact: Contact | None = None
        self.reachability: ReachabilityChanged | None = None
        self.failure: str = ""
        self.faults = Faults(lab.faults.latency, lab.faults.loss)
        self._lab = lab
        self._state = ServerState.STOPPED
        self._changes = trio.lowlevel.ParkingLot()  # where tasks wait for the state to change
        self._orders = 0  # how many were taken, so that a start knows whether a later order has overtaken it
        self._runner: Runner | None = None  # what starts, serves or saves
        self._dying: set[Runner] = set()  # killed, and not ended yet; before that, no other runner starts

    @property
    def state(self) -> str:
        """One of starting, running, stopped, killed, failed."""
        return self._state.word

    @property
    def alive(self) -> bool:
        """Whether the server is running."""
        return self._state is ServerState.RUNNING

    @property
    def pid(self) -> int | None:
        """The process that the server runs in; `None` while it is not running."""
        return self._runner.pid if self._runner is not None and self.alive else None

    async def apply_faults(self, latency: float | None = None, loss: float | None = None) -> None:
        """Change the faults that are given, and tell a running server which faults to inject now."""
        self.faults.set(latency, loss)
        if self._runner is not None and not self._state.saves:
            self._runner.apply_faults(self.faults)

    async def load(self, folder: str, uids: Sequence[str], check_only: bool) -> None:
        """Let a running server put states that were saved in the place of its experts' own: see `LoadOrder`.

        Raises:
            CheckpointError: They do not fit, or could not be loaded.
            ServerFailed: The server does not run.
        """
        if self._runner is None or not self.alive:
            raise ServerFailed(f"{self._label} is {self.state}: it takes a running server to load experts; restart it")
        if failure := await self._runner.load(folder, uids, check_only):
            raise CheckpointError(f"{self._label} did not load what was saved: {failure}")

    async def until_at_rest(self) -> str:
        """Wait until nothing runs or is about to run. Returns what went wrong, or an empty string."""
        while self._dying or not self._state.at_rest:
            if self._dying:
                await self._reap()
            else:
                await self._changes.park()
        return self.failure

    async def order(self, order: ServerEvent, wait: bool = True) -> None:
        """Take an order and execute it.

        Args:
            order: START, STOP, DISCARD or KILL.
            wait: Return when that is done; if false, return at once, and log what goes wrong.

        Raises:
            ServerFailed: The server did not start, or did not save its experts.
            ValueError: Of a start: there is no such kind of expert, or it does not take these options.
        """
        saving, number = self._take(order), self._orders
        if wait:
            await self._execute(order, saving, number)
        else:
            self._lab.nursery.start_soon(self._execute_alone, order, saving, number)

    async def end(self, order: ServerEvent, timeout: float | None = None, *, alone: bool = False) -> str:
        """Take an order that ends the server, and execute it. If this is cancelled, it ends all the same.

        Args:
            order: STOP, DISCARD or KILL.
            timeout: Seconds that it has to save its experts, a few; by default as many as their size takes.
            alone: Whether no other server of its grid goes on, to which it could hand them over.

        Returns:
            What went wrong; an empty string if nothing did.
        """
        if timeout is not None and self._runner is not None:
            self._runner.hurry(alone)
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

    async def _execute(self, order: ServerEvent, saving: Runner | None, number: int) -> None:
        """Do what is left of an order once `_take` has taken it."""
        if order is ServerEvent.START:
            await self._start(saving, number)
        elif failure := await self._finish(saving):
            raise ServerFailed(f"{self._label} did not end cleanly: {failure}")

    async def _execute_alone(self, order: ServerEvent, saving: Runner | None, number: int) -> None:
        """As `_execute`, for a caller who does not wait: errors are logged."""
        try:
            await self._execute(order, saving, number)
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
        """Execute order `number`, a start: wait for the runner before it, and bring up the next.

        Returns when its experts can be found. Raises as `order` does.
        """
        failure, cause = "it was interrupted", BaseException()
        try:
            if saving is not None:
                await self._until_saved(saving)
            with trio.fail_after(START_TIMEOUT):
                await self._reap()
                plan = self._plan_now()
                if self._cluster is None:
                    plan = await keep_port(plan, self.contact)
                if self._orders != number or self.state != "starting":
                    raise ServerFailed(self.failure)
                runner = self._runner = self._make_runner()
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

    def _make_runner(self) -> Runner:
        if self._cluster is not None:
            return ServerOnWorker(self._cluster, self._lab.node, self.log)
        if self.isolation == "process":
            return ServerProcess(self.log, self._lab.network)
        return ServerTask(self._lab.network, self._lab.emit, self.log)

    async def _run(self, runner: Runner, plan: ServerPlan, *, task_status: trio.TaskStatus[None]) -> None:
        """The whole life of a runner."""
        self.reachability = None
        runner.on_news = partial(self._note_news, runner)
        runner.on_held = partial(self._note_held, runner)
        async with trio.open_nursery() as nursery:
            contact = await nursery.start(runner.run, plan, self.faults)
            await trio.lowlevel.checkpoint_if_cancelled()  # else it would be running, and end with the start
            if self._runner is runner:
                self.contact, self.host, self.worker = contact, runner.host, runner.worker
                self._advance(ServerEvent.READY)
                await self.apply_faults()  # they may have changed meanwhile
            task_status.started()
            self._note_end(runner, await runner.wait())

    def _plan_now(self) -> ServerPlan:
        """Returns the plan, with our own node among those to join where it is now: it may have moved since."""
        own = self._lab.node.contact
        return replace(self.plan, join=tuple(own if contact.key == own.key else contact for contact in self.plan.join))

    def _note_held(self, runner: Runner, uids: tuple[str, ...]) -> None:
        """Record which experts a server holds."""
        if self._runner is runner and uids != self.held:
            self.held = uids

    def _note_news(self, runner: Runner, event: AddressNews | ExpertNews) -> None:
        """Record that a server is reached at another address from now on, or whether it is; and pass news on."""
        if self._runner is runner:
            if isinstance(event, AddressChanged):
                self.contact = event.contact
            elif isinstance(event, ReachabilityChanged):
                self.reachability = event
                if event.state == Reach.NO:
                    logger.warning("%s: %s", self._label, event.text)
        self._lab.emit(event)

    async def _until_found(self) -> None:
        """Wait until this process's own directory, which may know older records, finds the experts."""
        directory, uids, copied = self._lab.node.directory, self.plan.server.uids, self.plan.server.backups > 0
        while True:
            if not self.alive:
                raise ServerFailed(self.failure)
            await directory.refresh(uids)
            found = await directory.find(uids)
            if all(info is not None and self._is_found(info, copied) for info in found.values()):
                return
            await trio.sleep(FIND_INTERVAL)

    def _is_found(self, info: ExpertInfo, copied: bool) -> bool:
        """Whether an expert is found where it should be: here, or where copies are kept, at another server by now."""
        elsewhere = copied and self.contact is not None and info.contact.key != self.contact.key
        return info.contact == self.contact or elsewhere

    @property
    def _label(self) -> str:
        uids = self.plan.server.uids
        if not uids:
            return "a spare server"
        return f"the server of {uids[0]}{' …' if len(uids) > 1 else ''}"
