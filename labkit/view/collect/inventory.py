"""Polling: what a swarm consists of, looked up again and again while somebody looks. For the dashboard only.

A task of the lab thread, beside the calls: it asks the directory for grids and experts, and every server for its
statistics, and publishes what it found as one immutable `Inventory`, which other threads may read.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, starmap
from typing import NamedTuple

import trio

from labkit.contact import Contact
from labkit.directory.grids import GridInfo, find_grids
from labkit.errors import LabkitError, RPCError
from labkit.expert_uid import ExpertInfo
from labkit.launch.handle import ServerHandle
from labkit.node import Node
from labkit.server.statistics import ServerStatistics, call_statistics, without_experts

logger = logging.getLogger(__name__)

FIND_PERIOD = 2.0  # seconds, or longer, where there is more than this to look at:
EXPERTS_PER_SECOND = 150  # that are looked up: each takes ten microseconds of the process that also trains
ASKED_PER_SECOND = 6  # servers: each answer takes a third of a millisecond of it
UNSEEN = 1 / 3  # of these rates, while nobody looks and all of it is only recorded
STATISTICS_TIMEOUT = 1.0  # seconds
LEAST_TIME = 0.25  # seconds: with less left of a round, a server is asked first in the next one
REST = 5.0  # seconds by which the turn of a server comes later that failed twice
AT_ONCE = 16  # servers that are asked at the same time
AT_ONCE_FOR_ONE = 32  # the same, where somebody waits for the answers
PREFIXES_AT_ONCE = 4  # few, so that no step holds the lab thread for long
MAX_GRIDS = 100
MAX_EXPERTS = 20_000
MAX_STRANGE = 20_000  # of which servers speak, all together, and of which the directory knows nothing
MAX_SERVERS = 1_000


class LocalServer(NamedTuple):
    """A server started here. `word`: its handle's state. `latency`, `loss`: what is injected into it."""

    word: str
    address: str  # empty before its first start
    uids: tuple[str, ...]
    latency: float
    loss: float


@dataclass(frozen=True, slots=True)
class Inventory:
    """What there was in the swarm when it was last looked at. Do not change it: other threads read it.

    `experts`: those that the directory offers, by uid; `suspects`: those that are declared and, after failures, not
    offered. `statistics`: what servers said of themselves, and when (monotonic), by address. `locals`: as in
    `swarm.servers`. `polled_at`: when the directory was last read, monotonic; -inf: never. `failures`: how often in a
    row a server failed to answer, by address.
    """

    grids: Mapping[str, GridInfo] = field(default_factory=dict)
    experts: Mapping[str, ExpertInfo] = field(default_factory=dict)
    suspects: Mapping[str, ExpertInfo] = field(default_factory=dict)
    statistics: Mapping[str, tuple[ServerStatistics, float]] = field(default_factory=dict)
    locals: tuple[LocalServer, ...] = ()
    polled_at: float = -math.inf
    failures: Mapping[str, int] = field(default_factory=dict)


def local_servers(servers: Sequence[ServerHandle]) -> tuple[LocalServer, ...]:
    """The servers started here, as they are now. From any thread."""
    return tuple(_local(server) for server in list(servers))


def _local(server: ServerHandle) -> LocalServer:
    faults, contact = server.faults(), server.contact
    address = contact.endpoint if contact is not None else ""
    return LocalServer(server.state, address, server.uids, faults.latency, faults.loss)


async def keep_polled(
    node: Node,
    servers: Sequence[ServerHandle],
    publish: Callable[[Inventory], None],
    *,
    period: float = 1.0,
    seen: Callable[[], bool] = lambda: True,
    task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Publish an inventory every `period` seconds and whenever experts were looked up, until cancelled.

    `servers`: those started here, a list that may grow. `seen`: whether somebody looks at this moment; while nobody
    does, more than two servers are polled more rarely. Ready at once, with the scope that ends it. Nothing that a peer
    does ends it.
    """
    poll = _Poll(node, servers, publish, seen)
    with trio.CancelScope() as scope:
        poll.publish()
        async with trio.open_nursery() as nursery:
            task_status.started(scope)
            nursery.start_soon(poll.keep_found)
            nursery.start_soon(poll.keep_asked, period)


class _Poll:
    """What is known, and the two tasks that keep it so."""

    def __init__(
        self, node: Node, servers: Sequence[ServerHandle], publish: Callable[[Inventory], None],
        seen: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._node = node
        self._servers = servers
        self._publish = publish
        self._seen = seen
        self._grids: Mapping[str, GridInfo] = {}
        self._found = ExpertWalk()
        self._polled_at = -math.inf
        self._statistics: dict[str, tuple[ServerStatistics, float]] = {}
        self._failures: dict[str, int] = {}
        self._asked_at: dict[str, float] = {}

    def publish(self) -> None:
        """Hand out what is known now."""
        self._publish(
            Inventory(
                self._grids, self._found.experts, self._found.suspects, dict(self._statistics),
                local_servers(self._servers), self._polled_at, dict(self._failures),
            )
        )  # fmt: skip

    # ------------------------------------------------------------ grids and experts

    async def keep_found(self) -> None:
        """Look grids and experts up, through the directory's cache, every two seconds; rarely where there are many."""
        while True:
            began = trio.current_time()
            try:
                grids = await find_grids(self._node.dht, self._node.directory.config.timeout)
                self._grids = dict(islice(grids.items(), MAX_GRIDS)) or self._grids
                self._found = await find_experts(self._node, self._grids, self._pause)
                self._polled_at = time.monotonic()
            except LabkitError as error:
                logger.debug("the experts could not be looked up: %s", error)
            except Exception:  # a mistake of ours here must not end the lab thread, and the training with it
                logger.exception("looking the experts up failed")
            self.publish()
            while True:  # somebody may begin to look meanwhile
                await trio.sleep(FIND_PERIOD / 4)
                if trio.current_time() >= began + self._find_period() - FIND_PERIOD / 8:
                    break

    def _pace(self) -> float:
        return 1.0 if self._seen() else UNSEEN

    def _find_period(self) -> float:
        return max(FIND_PERIOD, len(self._found.experts) / EXPERTS_PER_SECOND / self._pace())

    def _pause(self) -> float:
        """Seconds between two steps of a walk, so that half of the period is enough; none in the first walk."""
        chunks = self._found.chunks
        return self._find_period() / 2 / chunks if chunks > 1 else 0.0

    # ------------------------------------------------------------ statistics

    async def keep_asked(self, period: float) -> None:
        """Ask every server how it is doing, every `period` seconds. Where there are more than a round is to ask, each
        has its turn; one that failed once is asked again at once, beside them."""
        while True:
            end = trio.current_time() + period
            contacts = contacts_of(self._servers, self._found)
            for table in (self._statistics, self._failures, self._asked_at):
                for address in table.keys() - contacts.keys():
                    del table[address]

            def turn(address: str) -> float:
                rest = REST if self._failures.get(address, 0) > 1 else 0.0
                return self._asked_at.get(address, -math.inf) + rest

            in_turn = sorted(contacts, key=turn)
            chosen = in_turn[: math.ceil(ASKED_PER_SECOND * period * self._pace())]
            chosen += [a for a in in_turn[len(chosen) :] if self._failures.get(a) == 1][:AT_ONCE]
            chosen.sort(key=lambda address: self._failures.get(address, 0) > 0)  # who is silent holds nobody up
            async with trio.open_nursery() as nursery:
                waiting = iter(chosen)
                for _ in range(min(AT_ONCE, len(chosen))):
                    nursery.start_soon(self._ask_some, waiting, contacts, end)
            self.publish()
            await trio.sleep_until(end)

    async def _ask_some(self, waiting: Iterable[str], contacts: Mapping[str, Contact], end: float) -> None:
        for address in waiting:
            left = end - trio.current_time()
            if left < LEAST_TIME:
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
                strange = sum(self._found.strange(a, s) for a, (s, _) in self._statistics.items() if a != address)
                self._statistics[address] = (self._found.bounded(address, statistics, strange), time.monotonic())
                self._failures.pop(address, None)


# ---------------------------------------------------------------- looking experts up


@dataclass(slots=True)
class ExpertWalk:
    """All experts of the grids that were walked. `contacts`: their servers, by address; `held`: how many experts each
    of those is said to hold. `chunks`: steps it took."""

    experts: dict[str, ExpertInfo] = field(default_factory=dict)
    suspects: dict[str, ExpertInfo] = field(default_factory=dict)
    contacts: dict[str, Contact] = field(default_factory=dict)
    held: Counter[str] = field(default_factory=Counter)
    chunks: int = 0

    def strange(self, address: str, statistics: ServerStatistics) -> int:
        """Of how many experts a server speaks beyond those that the directory gives it."""
        return max(0, len(statistics.experts) - self.held[address])

    def bounded(self, address: str, statistics: ServerStatistics, others: int) -> ServerStatistics:
        """What a server says; without its experts, where with the `others` too many are strange."""
        strange = self.strange(address, statistics)
        return without_experts(statistics) if strange and others + strange > MAX_STRANGE else statistics


async def find_experts(
    node: Node, grids: Mapping[str, GridInfo], pause: Callable[[], float] = lambda: 0.0, *, anew: bool = False
) -> ExpertWalk:
    """Walk the directory's index of these grids, a few prefixes at a time, with a `pause` in seconds between.

    So no step holds the lab thread for long, neither this walk nor the refreshing of what it used. At most 20,000
    experts. `anew`: ask the DHT for what is cached, too.
    """
    found, directory = ExpertWalk(), node.directory
    look_up = directory.look_up if anew else directory.children
    for name, grid in grids.items():
        prefixes = [name]
        for _ in grid.sizes[1:]:
            below: list[str] = []
            for some in _in_chunks(prefixes):
                views = await look_up(some)
                below += [f"{prefix}.{coordinate}" for prefix in some for coordinate in sorted(views[prefix].inner)]
                await trio.lowlevel.checkpoint()
            prefixes = below[: directory.config.max_prefixes]
        for some in _in_chunks(prefixes):
            views = await look_up(some)
            found.chunks += 1
            for prefix in some:
                found.experts.update((info.uid, info) for _, info in sorted(views[prefix].experts.items()))
            hidden = directory.hidden(some)
            found.suspects |= hidden
            servers = Counter(info.contact for prefix in some for info in views[prefix].experts.values())
            servers.update(info.contact for info in hidden.values())
            for contact, count in servers.items():
                found.contacts[contact.endpoint] = contact
                found.held[contact.endpoint] += count
            if len(found.experts) >= MAX_EXPERTS:
                return found
            await trio.sleep(pause())
    return found


def _in_chunks(prefixes: Sequence[str]) -> Iterator[Sequence[str]]:
    return (prefixes[start : start + PREFIXES_AT_ONCE] for start in range(0, len(prefixes), PREFIXES_AT_ONCE))


# ---------------------------------------------------------------- asking servers


def contacts_of(servers: Sequence[ServerHandle], found: ExpertWalk) -> dict[str, Contact]:
    """Whom to ask, by address: the servers started here that run, and all others that were found."""
    handles = list(servers)
    own = {handle.plan.identity.public_key for handle in handles}
    contacts = {
        handle.contact.endpoint: handle.contact for handle in handles if handle.alive and handle.contact is not None
    }
    others = ((address, contact) for address, contact in found.contacts.items() if contact.key not in own)
    contacts.update(islice(others, max(0, MAX_SERVERS - len(contacts))))
    return contacts


async def ask_everybody(node: Node, servers: Sequence[ServerHandle], timeout: float) -> dict[str, ServerStatistics]:
    """The statistics of the servers started here and of all that the DHT knows now, by address, at most 32 asked at a
    time. Those that do not answer within `timeout` seconds are missing."""
    answers: dict[str, ServerStatistics] = {}

    async def ask(address: str, contact: Contact) -> None:
        async with limiter:
            try:
                said = await call_statistics(node.client, contact, max(0.0, end - trio.current_time()))
            except RPCError as error:
                logger.debug("%s gave no statistics: %s", address, error)
            else:
                strange = sum(starmap(found.strange, answers.items()))
                answers[address] = found.bounded(address, said, strange)

    end, limiter = trio.current_time() + timeout, trio.CapacityLimiter(AT_ONCE_FOR_ONE)
    found = ExpertWalk(contacts={info.contact.endpoint: info.contact for info in node.directory.known().values()})
    with trio.move_on_at(end - timeout / 2):
        found = await find_experts(node, await find_grids(node.dht, timeout), anew=True)
    with trio.move_on_at(end):
        async with trio.open_nursery() as nursery:
            for address, contact in contacts_of(servers, found).items():
                nursery.start_soon(ask, address, contact)
    return answers
