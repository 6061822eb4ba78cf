"""What a notebook holds of a local expert server: stop, kill and restart it, and ask it how it is doing.

A handle passes orders through the portal to the server's `ServerLifecycle`, which lives in the lab thread. No batch
passes here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress

import trio

from labkit.contact import Contact
from labkit.copies.servers import GridServers
from labkit.errors import CheckpointError, LabkitError, ServerFailed
from labkit.expert_protocol import clean_label
from labkit.faults import Faults
from labkit.launch.cluster import Cluster
from labkit.launch.lab import Lab
from labkit.launch.lifecycle import ServerLifecycle
from labkit.launch.runners import ServerPlan
from labkit.launch.states import ServerEvent
from labkit.printable import printable
from labkit.process_bound import ProcessBound
from labkit.server.statistics import ServerStatistics, call_statistics

logger = logging.getLogger(__name__)

LOOK_TIME = 0.3  # seconds of a swarm's end to find out whether others serve its grids, too
MAX_STARTING = 8  # servers that start at the same time; hundreds would hold each other up beyond their deadlines


class ServerHandle(ProcessBound):
    """A server that was started from here. `Swarm.serve` returns handles.

    Its methods may be called from any thread but the lab thread. Those that change something
    return when it is done, unless they are called with `wait=False`.

    Attributes:
        state: "starting", "running", "stopped", "killed" or "failed". A server that was told
            to stop is "stopped" at once, also while it still saves its experts.
        failure: What went wrong, if the state is "failed".
        alive: Whether it is running.
        uids: The experts that it holds; while it does not run, those that it begins with.
        label: The name that all who look at the swarm see; empty if it has none. On a cluster
            by default the name of its host.
        host: The host that it runs on, or ran on last, if that is of a cluster; else empty.
        worker: The address of its worker there, as Dask says it; else empty.
        contact: Its address and public key; `None` before its first start.
        pid: The process that it runs in, on its host; `None` while it is not running.
        isolation: "process", "task" or "cluster".
        plan: All that it takes to start it.
        lifecycle: What starts and ends it; for use inside the lab thread.
    """

    def __init__(self, lab: Lab, plan: ServerPlan, isolation: str, cluster: Cluster | None = None) -> None:
        self.plan = plan
        self.isolation = isolation
        self.lifecycle = ServerLifecycle(lab, plan, isolation, cluster)
        self._lab = lab

    @property
    def state(self) -> str:
        """One of starting, running, stopped, killed, failed."""
        return self.lifecycle.state

    @property
    def failure(self) -> str:
        """What went wrong, if the state is "failed"."""
        return self.lifecycle.failure

    @property
    def uids(self) -> tuple[str, ...]:
        """The experts that it holds; while it does not run, those that it begins with."""
        return self.lifecycle.held if self.alive else self.plan.server.uids

    @property
    def label(self) -> str:
        """The name that all who look at the swarm see; empty if it has none."""
        return self.plan.server.label or clean_label(self.host)

    @property
    def host(self) -> str:
        """The host that it runs on, or ran on last, if that is of a cluster."""
        return self.lifecycle.host

    @property
    def worker(self) -> str:
        """The address of the worker that it runs at, or ran at last, if that is of a cluster."""
        return self.lifecycle.worker

    @property
    def alive(self) -> bool:
        """Whether it is running."""
        return self.lifecycle.alive

    @property
    def contact(self) -> Contact | None:
        """Its address and public key; `None` before its first start."""
        return self.lifecycle.contact

    @property
    def reachability(self) -> str:
        """Whether others reach it, as a sentence with what to try; empty while it does not run."""
        found = self.lifecycle.reachability
        return found.text if found is not None and self.alive else ""

    @property
    def pid(self) -> int | None:
        """The process that it runs in; `None` while it is not running."""
        return self.lifecycle.pid

    def kill(self, *, wait: bool = True) -> None:
        """End it as a crash would, a process by SIGKILL: nothing is saved, no node is told.

        Servers that keep copies of its experts notice, and carry them on within seconds.

        Args:
            wait: Return when it has ended; if false, return at once.
        """
        self._lab.portal.call(self.lifecycle.order, ServerEvent.KILL, wait)

    def stop(self, *, wait: bool = True) -> None:
        """End it cleanly: it hands its experts over first, or saves those that nobody takes.

        Where other servers of its grid go on (and `backups` is not 0), no update is lost and no
        call fails. It goes on doing so if this call is interrupted. It is killed if that takes
        more than thirty seconds, and twenty more for each GB of its experts and their optimizers.

        Args:
            wait: Return when it has ended; if false, return at once, and `state` tells how it
                went.

        Raises:
            ServerFailed: It could not save its experts (only if `wait`).
        """
        self._lab.portal.call(self.lifecycle.order, ServerEvent.STOP, wait)

    def wait(self, timeout: float | None = None) -> str:
        """Wait until it does not run any more, for whatever reason.

        Args:
            timeout: Seconds after which this returns all the same; `state` tells then that it
                runs. By default it waits for as long as it takes.

        Returns:
            What went wrong; an empty string if nothing did.
        """
        return self._lab.portal.call(self._until_at_rest, math.inf if timeout is None else timeout)

    async def _until_at_rest(self, timeout: float) -> str:
        with trio.move_on_after(timeout):
            return await self.lifecycle.until_at_rest()
        return ""

    def restart(self, *, wait: bool = True) -> None:
        """Start it again as the same node, with the same experts from their checkpoints.

        Experts without a checkpoint begin afresh. Those that other servers have by now, or are
        about to carry on from copies, stay there: it comes back without them, and is given
        experts by fuller servers until loads are even. A server that is running is stopped first.

        Args:
            wait: Return when its experts can be found; if false, return at once, and `state`
                tells how it went.

        Raises:
            ServerFailed: It did not start, or could not save its experts before (only if `wait`).
        """
        self._lab.portal.call(self.lifecycle.order, ServerEvent.START, wait)

    def logs(self, lines: int = 100) -> str:
        """Returns the last lines that it wrote: warnings, errors, and what its experts print.

        They are kept when it ends and when it is restarted. Of a server that is a task they are
        labkit's warnings alone, since what its experts print appears in this process anyway.

        Example:
            print(server.logs())

        Args:
            lines: How many at most, up to 1000.
        """
        return "\n".join(list(self.lifecycle.log)[-lines:] if lines > 0 else [])

    def faults(self, latency: float | None = None, loss: float | None = None) -> Faults:
        """Inject faults into this server alone, now and after a restart. See `Swarm.faults`.

        Args:
            latency: Mean of an exponentially distributed delay before each call, in seconds;
                `None` leaves it as it is.
            loss: Share of calls that get no answer, from 0 to 1; `None` leaves it as it is.

        Returns:
            What holds now. With no arguments that is all that this method does.

        Raises:
            ValueError: A number is out of its range.
        """
        faults = self.lifecycle.faults
        if latency is not None or loss is not None:
            self._lab.portal.check_open()
        faults.set(latency, loss)
        if latency is not None or loss is not None:
            self._lab.portal.call(self.lifecycle.apply_faults)
        return faults

    def statistics(self, timeout: float = 2.0) -> ServerStatistics:
        """Ask it how it is doing: its experts and their updates, its queues and its speed.

        Args:
            timeout: Seconds to wait for its answer.

        Raises:
            ServerFailed: It has never been started.
            RPCError: It does not answer; a subclass says why.
        """
        return self._lab.portal.call(self._ask_statistics, timeout)

    async def _ask_statistics(self, timeout: float) -> ServerStatistics:
        if self.contact is None:
            raise ServerFailed("this server has not been started")
        return await call_statistics(self._lab.node.client, self.contact, timeout)

    def __repr__(self) -> str:
        where = f" at {self.contact.endpoint}" if self.contact is not None and self.alive else ""
        uids = self.uids
        which = f"{len(uids)} experts, {uids[0]} … {uids[-1]}" if uids else "no experts"
        return printable(f"<server {self.state}{where}: {which}>")


# ---------------------------------------------------------------- several at once


async def begin_all(handles: Sequence[ServerHandle]) -> None:
    """Start servers side by side, a few at a time; if one fails, none is left. Raises what the first to fail raises."""
    failures: list[Exception] = []
    limiter = trio.CapacityLimiter(MAX_STARTING)

    async def begin(handle: ServerHandle) -> None:
        try:
            async with limiter:
                await handle.lifecycle.order(ServerEvent.START)
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
                await handle.lifecycle.end(ServerEvent.KILL)
        raise


async def end_all(handles: Sequence[ServerHandle], timeout: float) -> None:
    """Stop servers side by side, and kill those that take longer than `timeout` seconds.

    They hand their experts over where other servers of the grid go on, and save them where checkpoints outlive them.
    """
    until = trio.current_time() + timeout
    shared = await _shared_grids(handles)

    async def end(handle: ServerHandle) -> None:
        alone = handle.plan.server.name not in shared
        order = ServerEvent.DISCARD if alone and not handle.plan.lasting else ServerEvent.STOP
        failure = await handle.lifecycle.end(order, until - trio.current_time(), alone=alone)
        if failure:
            logger.warning("%r did not end cleanly: %s", handle, failure)

    async with trio.open_nursery() as nursery:
        for handle in handles:
            nursery.start_soon(end, handle)


async def _shared_grids(handles: Sequence[ServerHandle]) -> set[str]:
    """Returns the grids of these servers that others serve, too, as far as that is found out in a moment."""
    alive = [handle for handle in handles if handle.alive]
    own = {handle.plan.identity.public_key for handle in handles}
    shared = set[str]()

    async def look(lab: Lab, name: str) -> None:
        servers = GridServers(lab.node.dht, name, None)
        with suppress(LabkitError):
            await servers.read()
        if servers.others.keys() - own:
            shared.add(name)

    with trio.move_on_after(LOOK_TIME):
        async with trio.open_nursery() as nursery:
            for name in {handle.plan.server.name for handle in alive if handle.plan.server.backups}:
                nursery.start_soon(look, alive[0]._lab, name)
    return shared


async def load_all(
    parts: Sequence[tuple[ServerHandle, Sequence[str]]], folder: str, timeout: float, *, check_only: bool
) -> None:
    """Let servers load experts from a folder, side by side. To change all or none, let them check it all before.

    Args:
        parts: The servers, each with its experts.
        folder: Where the experts' checkpoints are.
        timeout: Seconds that it may take.
        check_only: Whether they only check that they can.

    Raises:
        CheckpointError: A server refuses, or fails. The text says what happened.
        ServerFailed: A server does not run.
    """
    failures: list[LabkitError] = []

    async def load(handle: ServerHandle, uids: Sequence[str]) -> None:
        try:
            with trio.fail_after(timeout):
                await handle.lifecycle.load(folder, uids, check_only)
        except trio.TooSlowError:
            failures.append(CheckpointError(f"{handle!r} had not read its experts after {timeout:g} s"))
        except LabkitError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for handle, uids in parts:
            nursery.start_soon(load, handle, uids)
    if failures:
        raise failures[0]


async def apply_faults(servers: Iterable[ServerHandle], latency: float | None, loss: float | None) -> None:
    """Inject faults into these servers; None leaves one as it is."""
    for server in servers:
        await server.lifecycle.apply_faults(latency, loss)
