"""The inventory of a swarm: which grids, experts and servers it has, polled while someone looks at the dashboard.

A task of the lab thread, beside the calls, asks the directory for grids and experts, and every server for its
statistics. It publishes what it found as one immutable `Inventory`, from which the `Sampler` makes scenes.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice, starmap
from typing import NamedTuple

import trio

from labkit.contact import Contact
from labkit.directory.grids import GridInfo, find_grids
from labkit.errors import LabkitError, RPCError
from labkit.events import ignore
from labkit.expert_uid import ExpertInfo
from labkit.launch.handle import ServerHandle
from labkit.node import Node
from labkit.reachability import Reach
from labkit.server.statistics import ServerStatistics, call_statistics, without_experts
from labkit.view.collect.takeovers import ReportedTakeOvers

logger = logging.getLogger(__name__)

MAX_REACHABILITY = 3  # sentences about who is reached
FIND_PERIOD = 2.0  # seconds between two look-ups of all experts; longer where there are many, because of:
EXPERTS_PER_SECOND = 150  # that are looked up: each takes ten microseconds of the process that also trains
SERVERS_PER_SECOND = 6  # that are asked: each answer takes a third of a millisecond of that process
UNWATCHED_PACE = 1 / 3  # of these rates, while no one looks and all of it is only recorded
STATISTICS_TIMEOUT = 1.0  # seconds
MIN_ANSWER_TIME = 0.25  # seconds: with less left of a round, a server is asked in the next one instead
SERVER_RETRY_DELAY = 5.0  # seconds by which the turn of a server is put off that failed twice
ASKED_AT_ONCE = 16  # servers
ASKED_AT_ONCE_FOR_CALLER = 32  # servers, where a caller waits for the answers
PREFIXES_AT_ONCE = 4  # few, so that no step holds the lab thread for long
MAX_GRIDS = 100  # that are shown, and so for the next two
MAX_EXPERTS = 20_000
MAX_SERVERS = 1_000
MAX_UNLISTED = 20_000  # experts that servers report and the directory does not list, of all servers together


class LocalServer(NamedTuple):
    """A server started here."""

    word: str  # the state of its handle
    address: str  # empty before its first start
    uids: tuple[str, ...]
    latency: float  # seconds, injected
    loss: float  # share of the requests, injected
    label: str = ""  # the name that its owner gives it


@dataclass(frozen=True, slots=True)
class Inventory:
    """What there was in the swarm when it was last looked up. Do not change it: other threads read it."""

    grids: Mapping[str, GridInfo] = field(default_factory=dict)
    experts: Mapping[str, ExpertInfo] = field(default_factory=dict)  # uid -> what the directory offers
    suspects: Mapping[str, ExpertInfo] = field(default_factory=dict)  # uid -> declared, but not offered after failures
    statistics: Mapping[str, tuple[ServerStatistics, float]] = field(default_factory=dict)  # address -> ..., when
    locals: tuple[LocalServer, ...] = ()  # as in `swarm.servers`
    polled_at: float = -math.inf  # when the directory was last read, monotonic; -inf: never
    failures: Mapping[str, int] = field(default_factory=dict)  # address -> how often in a row it did not answer
    reachability: tuple[str, ...] = ()  # whether others reach our node and servers, in sentences


def local_servers(servers: Sequence[ServerHandle]) -> tuple[LocalServer, ...]:
    """Returns the servers started here as they are now. May be called from any thread."""
    return tuple(_local(server) for server in list(servers))


def _local(server: ServerHandle) -> LocalServer:
    faults, contact = server.faults(), server.contact
    address = contact.endpoint if contact is not None else ""
    return LocalServer(server.state, address, server.uids, faults.latency, faults.loss, server.label)


def reachability_lines(node: Node, servers: Sequence[ServerHandle]) -> tuple[str, ...]:
    """Returns a sentence that says whether others reach a swarm's own node, and one for each server that is worse off.

    May be called from any thread.

    Args:
        node: The swarm's own node.
        servers: The servers started here.
    """
    own, relaying = node.whereabouts.now, node.relaying
    # It was said of the address before, or of that at a relay that is gone.
    outdated = own.contact != node.contact if relaying.relay is not None else relaying.lost and own.state == Reach.YES
    lines = [*([] if outdated else [own.text]), *([relaying.words] if relaying.words else [])]
    for number, server in enumerate(servers):
        found = server.lifecycle.reachability
        if server.alive and found is not None and found.state == Reach.NO:
            either = f"{found.contact.endpoint} is not reachable either"
            lines.append(f"servers[{number}]: {either if own.state == Reach.NO else found.text}")
    if len(lines) > MAX_REACHABILITY:
        lines[MAX_REACHABILITY:] = [f"and {len(lines) - MAX_REACHABILITY} more servers are not reachable"]
    return tuple(lines)


async def keep_polled(
    node: Node,
    servers: Sequence[ServerHandle],
    publish: Callable[[Inventory], None],
    *,
    period: float = 1.0,
    watched: Callable[[], bool] = lambda: True,
    takeovers: ReportedTakeOvers | None = None,
    task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Publish an inventory every `period` seconds and whenever experts were looked up, until cancelled.

    Ready at once, with the scope that ends it. Nothing that a peer does ends it.

    Args:
        node: Our node in the swarm.
        servers: The servers started here; the list may grow.
        publish: Called with each inventory.
        period: Seconds between two rounds of asking servers.
        watched: Whether someone looks at this moment; while no one does, more than two servers are polled more rarely.
        takeovers: Hears what servers report of experts that were taken over, or handed over, elsewhere.
    """
    poll = _Poll(node, servers, publish, watched, takeovers or ReportedTakeOvers(ignore, math.inf))
    with trio.CancelScope() as scope:
        poll.publish()
        async with trio.open_nursery() as nursery:
            task_status.started(scope)
            nursery.start_soon(poll.keep_found)
            nursery.start_soon(poll.keep_asked, period)


class _Poll:
    """What is known of the swarm, and the two tasks that keep it up to date."""

    def __init__(
        self, node: Node, servers: Sequence[ServerHandle], publish: Callable[[Inventory], None],
        watched: Callable[[], bool], takeovers: ReportedTakeOvers,
    ) -> None:  # fmt: skip
        self._node = node
        self._servers = servers
        self._publish = publish
        self._watched = watched
        self._takeovers = takeovers
        self._grids: Mapping[str, GridInfo] = {}
        self._found = FoundExperts()
        self._polled_at = -math.inf
        self._statistics: dict[str, tuple[ServerStatistics, float]] = {}
        self._failures: dict[str, int] = {}
        self._asked_at: dict[str, float] = {}

    def publish(self) -> None:
        """Publish what is known now."""
        self._publish(
            Inventory(
                self._grids, self._found.experts, self._found.suspects, dict(self._statistics),
                local_servers(self._servers), self._polled_at, dict(self._failures),
                reachability_lines(self._node, self._servers),
            )
        )  # fmt: skip

    # ------------------------------------------------------------ grids and experts

    async def keep_found(self) -> None:
        """Look up grids and experts through the directory's cache, every two seconds; more rarely if there are many."""
        while True:
            began = trio.current_time()
            try:
                grids = await self._node.directory.grids()
                self._grids = dict(islice(grids.items(), MAX_GRIDS)) or self._grids
                self._found = await find_experts(self._node, self._grids, self._pause)
                self._polled_at = time.monotonic()
            except LabkitError as error:
                logger.debug("the experts could not be looked up: %s", error)
            except Exception:  # a mistake of ours here must not end the lab thread, and the training with it
                logger.exception("looking the experts up failed")
            self.publish()
            while True:  # in steps, since someone may begin to look meanwhile
                await trio.sleep(FIND_PERIOD / 4)
                if trio.current_time() >= began + self._find_period() - FIND_PERIOD / 8:
                    break

    def _pace(self) -> float:
        return 1.0 if self._watched() else UNWATCHED_PACE

    def _find_period(self) -> float:
        return max(FIND_PERIOD, len(self._found.experts) / EXPERTS_PER_SECOND / self._pace())

    def _pause(self) -> float:
        """Returns the seconds between two steps of a walk, so that it takes half of the period; 0 in the first walk."""
        chunks = self._found.chunks
        return self._find_period() / 2 / chunks if chunks > 1 else 0.0

    # ------------------------------------------------------------ statistics

    async def keep_asked(self, period: float) -> None:
        """Ask every server for its statistics, every `period` seconds.

        Where there are more servers than a round may ask, they take turns. One that failed once is asked again in the
        next round, out of turn.
        """
        while True:
            end = trio.current_time() + period
            contacts = contacts_of(self._servers, self._found)
            for table in (self._statistics, self._failures, self._asked_at):
                for address in table.keys() - contacts.keys():
                    del table[address]

            def turn(address: str) -> float:
                delay = SERVER_RETRY_DELAY if self._failures.get(address, 0) > 1 else 0.0
                return self._asked_at.get(address, -math.inf) + delay

            in_turn = sorted(contacts, key=turn)
            chosen = in_turn[: math.ceil(SERVERS_PER_SECOND * period * self._pace())]
            chosen += [a for a in in_turn[len(chosen) :] if self._failures.get(a) == 1][:ASKED_AT_ONCE]
            # Silent servers come last, since they hold up others.
            chosen.sort(key=lambda address: self._failures.get(address, 0) > 0)
            async with trio.open_nursery() as nursery:
                waiting = iter(chosen)
                for _ in range(min(ASKED_AT_ONCE, len(chosen))):
                    nursery.start_soon(self._ask_some, waiting, contacts, end)
            self.publish()
            await trio.sleep_until(end)

    async def _ask_some(self, waiting: Iterable[str], contacts: Mapping[str, Contact], end: float) -> None:
        for address in waiting:
            left = end - trio.current_time()
            if left < MIN_ANSWER_TIME:
                return
            self._asked_at[address] = trio.current_time()
            try:
                statistics = await call_statistics(self._node.client, contacts[address], min(left, STATISTICS_TIMEOUT))
            except RPCError as error:
                self._failures[address] = self._failures.get(address, 0) + 1
                logger.debug("%s gave no statistics: %s", address, error)
            except Exception:  # as in `keep_found`
                self._failures[address] = self._failures.get(address, 0) + 1
                logger.exception("asking %s for its statistics failed", address)
            else:
                others = sum(self._found.unlisted(a, s) for a, (s, _) in self._statistics.items() if a != address)
                self._statistics[address] = (self._found.bounded(address, statistics, others), time.monotonic())
                self._failures.pop(address, None)
                self._takeovers.take(address, statistics, time.monotonic(), self._own_addresses())

    def _own_addresses(self) -> set[str]:
        return {handle.contact.endpoint for handle in self._servers if handle.contact is not None}


# ---------------------------------------------------------------- looking experts up


@dataclass(slots=True)
class FoundExperts:
    """All experts of the grids that were looked up, and their servers."""

    experts: dict[str, ExpertInfo] = field(default_factory=dict)  # uid -> what the directory offers
    suspects: dict[str, ExpertInfo] = field(default_factory=dict)  # uid -> declared, but not offered after failures
    contacts: dict[str, Contact] = field(default_factory=dict)  # address -> server
    listed: Counter[str] = field(default_factory=Counter)  # address -> how many experts the directory lists there
    chunks: int = 0  # steps that it took

    def unlisted(self, address: str, statistics: ServerStatistics) -> int:
        """Returns how many experts a server reports beyond those that the directory lists for it."""
        return max(0, len(statistics.experts) - self.listed[address])

    def bounded(self, address: str, statistics: ServerStatistics, others: int) -> ServerStatistics:
        """Returns a server's statistics, without its experts if there are too many unlisted ones.

        `others`: how many unlisted experts the other servers report.
        """
        unlisted = self.unlisted(address, statistics)
        return without_experts(statistics) if unlisted and others + unlisted > MAX_UNLISTED else statistics


async def find_experts(
    node: Node, grids: Mapping[str, GridInfo], pause: Callable[[], float] = lambda: 0.0, *, anew: bool = False
) -> FoundExperts:
    """Returns all experts of these grids. Stops when it has 20,000.

    It walks the directory's index a few prefixes at a time, so that no step holds the lab thread for long, neither of
    this walk nor of refreshing what it used.

    Args:
        node: Our node in the swarm.
        grids: The grids, by name.
        pause: Returns the seconds to wait between two steps.
        anew: Whether to ask the DHT for cached prefixes, too.
    """
    found, directory = FoundExperts(), node.directory
    for name, grid in grids.items():
        walk = directory.walk(name, len(grid.sizes), at_once=PREFIXES_AT_ONCE, anew=anew)
        async with aclosing(walk) as steps:
            async for children, last in steps:
                if not last:
                    await trio.lowlevel.checkpoint()
                    continue
                found.chunks += 1
                experts = [info for view in children.values() for _, info in sorted(view.experts.items())]
                suspended = directory.suspended(children)
                found.experts.update((info.uid, info) for info in experts)
                found.suspects |= suspended
                for contact, count in Counter(info.contact for info in (*experts, *suspended.values())).items():
                    found.contacts[contact.endpoint] = contact
                    found.listed[contact.endpoint] += count
                if len(found.experts) >= MAX_EXPERTS:
                    return found
                await trio.sleep(pause())
    return found


# ---------------------------------------------------------------- asking servers


def contacts_of(servers: Sequence[ServerHandle], found: FoundExperts) -> dict[str, Contact]:
    """Returns the servers to ask, by address: those started here that run, and all others that were found."""
    handles = list(servers)
    own = {handle.plan.identity.public_key for handle in handles}
    contacts = {
        handle.contact.endpoint: handle.contact for handle in handles if handle.alive and handle.contact is not None
    }
    others = ((address, contact) for address, contact in found.contacts.items() if contact.key not in own)
    contacts.update(islice(others, max(0, MAX_SERVERS - len(contacts))))
    return contacts


async def ask_all_servers(node: Node, servers: Sequence[ServerHandle], timeout: float) -> dict[str, ServerStatistics]:
    """Ask all servers for their statistics: those started here, and all that the DHT knows now.

    Args:
        node: Our node in the swarm.
        servers: The servers started here.
        timeout: Seconds; servers that do not answer within them are missing.

    Returns:
        The statistics by address.
    """
    answers: dict[str, ServerStatistics] = {}

    async def ask(address: str, contact: Contact) -> None:
        async with limiter:
            try:
                said = await call_statistics(node.client, contact, max(0.0, end - trio.current_time()))
            except RPCError as error:
                logger.debug("%s gave no statistics: %s", address, error)
            else:
                others = sum(starmap(found.unlisted, answers.items()))
                answers[address] = found.bounded(address, said, others)

    end, limiter = trio.current_time() + timeout, trio.CapacityLimiter(ASKED_AT_ONCE_FOR_CALLER)
    found = FoundExperts(contacts={info.contact.endpoint: info.contact for info in node.directory.known().values()})
    with trio.move_on_at(end - timeout / 2):
        found = await find_experts(node, await find_grids(node.dht, timeout), anew=True)
    with trio.move_on_at(end):
        async with trio.open_nursery() as nursery:
            for address, contact in contacts_of(servers, found).items():
                nursery.start_soon(ask, address, contact)
    return answers
