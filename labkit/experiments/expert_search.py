"""How long trainers look for experts in a swarm of many nodes, in virtual time: what `labkit bench search` measures.

The nodes are those that ship, each with its own DHT node and directory; the network between them is in memory. Nothing
is timed but the search: which calls it makes, one after the other, is what it costs.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch
import trio
from torch import Tensor

from labkit.bench.processes import peak_rss_mb
from labkit.client.beam_search import Routing, beam_search
from labkit.directory import Children, Directory, DirectoryConfig
from labkit.errors import JoinError, LabkitError
from labkit.expert_uid import check_grid, grid_uids, split_uid
from labkit.node import Node, NodeConfig, open_node
from labkit.simulation.latency import gamma
from labkit.simulation.network import SimNetwork, open_simnet
from labkit.simulation.virtual_clock import run_in_virtual_time
from labkit.wire.security import Identity

NAME = "ffn"
SPREAD = 32 / 92  # standard deviation of a round trip by its mean: our choice, for a network of a few regions
MAX_PLACES = 1 << 20  # of the grid
JOINING = 4  # one node joins at the same time for so many that are there
COLLECT_AFTER = (1_000_000, 10, 1000)  # as `gc.set_threshold`: there are no tensors to hold on to for long
CHURNED = 60.0  # seconds over which searches are spread under churn
# Declarations that are renewed every minute.
NODE = NodeConfig(directory=DirectoryConfig(ttl=180.0))


@dataclass(frozen=True)
class SearchConfig:
    """`dead`: the share of nodes that lose their power after the experts were declared. `churn`: mean life of a node in
    minutes, after which another takes its place; 0 for ever. `handshake`: round trips before the first message of a new
    connection (TCP and ZeroMQ take two). Raises `ValueError`."""

    nodes: int = 100
    grid: tuple[int, ...] = (32, 32)
    k_best: int = 4
    rtt_ms: float = 92.0
    dead: float = 0.0
    churn: float = 0.0
    handshake: float = 0.0
    searches: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        places = math.prod(check_grid(self.grid))
        for name, least in (("nodes", 2), ("k_best", 1), ("searches", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        if self.k_best > places:
            raise ValueError(f"k_best={self.k_best}: the grid has {places} experts")
        if not (math.isfinite(self.rtt_ms) and self.rtt_ms >= 0):
            raise ValueError(f"rtt_ms={self.rtt_ms}: milliseconds, at least 0")
        if places > MAX_PLACES:
            raise ValueError(f"grid={self.grid}: {places:,} experts; at most {MAX_PLACES:,} are simulated")
        if not (math.isfinite(self.handshake) and self.handshake >= 0):
            raise ValueError(f"handshake={self.handshake}: round trips, at least 0")
        if not 0 <= self.dead < 1 or self.nodes - self.dead_nodes < 1:
            raise ValueError(f"dead={self.dead}: a share of the nodes that leaves one alive")
        if not (math.isfinite(self.churn) and self.churn >= 0) or (self.churn and self.dead):
            raise ValueError(f"churn={self.churn}: minutes, at least 0, and not together with dead nodes")

    @property
    def dead_nodes(self) -> int:
        """How many lose their power."""
        return round(self.dead * self.nodes)


@dataclass
class _Times:
    """Of some searches: virtual milliseconds, and of those how many each level took; calls made; the share of the best
    experts whose records were found, and of those found the share whose server was alive."""

    ms: list[float] = field(default_factory=list)
    levels: list[list[float]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    alive: list[float] = field(default_factory=list)


class _Watched:
    """A directory, and how long each look-up in it took, in virtual milliseconds."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.took: list[float] = []

    def cached(self, prefixes: Iterable[str]) -> dict[str, Children]:
        return self._directory.cached(prefixes)

    async def children(self, prefixes: Iterable[str]) -> dict[str, Children]:
        began = trio.current_time()
        found = await self._directory.children(prefixes)
        self.took.append((trio.current_time() - began) * 1000)
        return found


def measure(config: SearchConfig) -> dict[str, Any]:
    """Build the swarm, search, and return what `--json` prints."""
    started = time.perf_counter()
    try:
        built, cold, warm = run_in_virtual_time(_measure, config, collect_after=COLLECT_AFTER)
    finally:
        gc.unfreeze()  # the nodes, see `_Crowd.join`
    return {
        **asdict(config),
        "virtual_ms_cold": _summary(cold.ms),
        "virtual_ms_warm": _summary(warm.ms),
        "virtual_ms_by_level": [round(fmean(level), 2) for level in zip_longest(*cold.levels, fillvalue=0.0)],
        "rpcs_per_search": round(fmean(cold.calls), 2),
        "recall": round(fmean(cold.recall + warm.recall), 4),  # of the best experts that were declared
        "alive": round(fmean(cold.alive + warm.alive), 4),  # nothing is called here: who is dead is not known yet
        "build_s": round(built - started, 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_rss_mb": peak_rss_mb(),
    }


async def _measure(config: SearchConfig) -> tuple[float, _Times, _Times]:
    draw = random.Random(config.seed)
    half = config.rtt_ms / 2000
    latency = gamma(half, half * SPREAD * math.sqrt(2))
    async with (
        open_simnet(config.seed, latency=latency, handshake=config.handshake) as network,
        trio.open_nursery() as nursery,
    ):
        crowd = _Crowd(network, config, draw)
        await crowd.join(nursery)
        await crowd.declare()
        if config.churn:
            crowd.churning.set()
            await trio.sleep(config.churn * 60)
        else:
            await crowd.lose_power(config.dead_nodes)
        built, times = time.perf_counter(), (_Times(), _Times())
        async with trio.open_nursery() as searching:  # soon, before declarations run out
            # One search at a time from each place, since its node counts the calls of all.
            turns = defaultdict[int, trio.Lock](trio.Lock)
            for seeker in crowd.seekers(config.searches):
                searching.start_soon(_search, turns[seeker], crowd, seeker, _scores(config.grid, draw), times)
                if config.churn:
                    await trio.sleep(CHURNED / config.searches)
        network.over = True
        nursery.cancel_scope.cancel()
    return built, *times


async def _search(
    turn: trio.Lock, crowd: _Crowd, seeker: int, scores: Sequence[Tensor], times: tuple[_Times, _Times]
) -> None:
    """Search twice from one place, with an empty cache and then with a warm one. A node that leaves while it searches
    is followed by another, that begins anew."""
    async with turn:
        found = await _found_from(crowd, seeker, scores, len(times))
    for kind, (ms, levels, calls, recall, alive) in zip(times, found, strict=True):
        kind.ms.append(ms)
        kind.levels.append(levels)
        kind.calls.append(calls)
        kind.recall.append(recall)
        kind.alive.append(alive)


async def _found_from(
    crowd: _Crowd, seeker: int, scores: Sequence[Tensor], count: int
) -> list[tuple[float, list[float], int, float, float]]:
    """Milliseconds, those of each level, calls, recall and the living of so many searches, one after the other."""
    while True:
        node = await crowd.node_at(seeker)
        directory, found = _Watched(Directory(node.dht)), list[tuple[float, list[float], int, float, float]]()
        for _ in range(count):
            calls, began, directory.took = node.dht.peers.calls, trio.current_time(), []
            try:
                routing = await beam_search(directory, NAME, scores, crowd.config.k_best)
            except LabkitError:
                break
            recall = _recall(routing, scores, crowd.experts, crowd.places, crowd.config.k_best)
            took = (trio.current_time() - began) * 1000
            alive = crowd.share_alive(routing)
            found.append((took, directory.took, node.dht.peers.calls - calls, recall, alive))
        if len(found) == count and crowd.nodes.get(seeker) is node:
            return found


class _Crowd:
    """The nodes of the swarm, by their places. Under churn nodes leave, each is followed by a newcomer at its place,
    and that declares the experts of this place anew: somebody else carries them on."""

    def __init__(self, network: SimNetwork, config: SearchConfig, draw: random.Random) -> None:
        self.config = config
        self.experts = list(grid_uids(NAME, config.grid))
        self.places = torch.tensor([split_uid(uid)[1] for uid in self.experts])
        self.nodes: dict[int, Node] = {}
        self.churning = trio.Event()
        self._declaring = trio.Event()
        self._ready: set[int] = set()  # places whose first node has declared what is held there
        self._network = network
        self._draw = draw
        self._news = trio.Event()  # that somebody joined, or declared

    async def join(self, nursery: trio.Nursery) -> None:
        """All of them, each through some node that was there before it."""
        while (there := len(self.nodes)) < self.config.nodes:
            lot = range(there, min(self.config.nodes, there + max(1, there // JOINING)))
            async with trio.open_nursery() as joining:
                for place in lot:
                    joining.start_soon(nursery.start, self._inhabit, place)
            gc.freeze()  # they stay, and to look through all that they hold for garbage takes seconds each time

    async def _inhabit(self, place: int, task_status: trio.TaskStatus[None]) -> None:
        """One node after the other, for ever."""
        while True:
            try:
                with trio.CancelScope() as life:
                    await self._live(place, life, task_status)
            except* JoinError:
                pass  # whom it asked has just left; there are others
            if self.nodes.pop(place, None) is not None:
                task_status = trio.TASK_STATUS_IGNORED

    async def _live(self, place: int, life: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        others = list(self.nodes.values())
        join = [self._draw.choice(others).contact] if others else []
        identity = Identity(self._draw.randbytes(32))
        async with open_node(self._network, identity, NODE, join=join) as node, trio.open_nursery() as nursery:
            self.nodes[place] = node
            task_status.started()
            self._tell()
            await self._declaring.wait()
            held = self.experts[place :: self.config.nodes]
            if held:
                await nursery.start(node.directory.keep_declared, held, node.contact)
            self._ready.add(place)
            self._tell()
            await self.churning.wait()
            life.deadline = trio.current_time() + self._draw.expovariate(1 / (self.config.churn * 60))
            await trio.sleep_forever()

    async def declare(self) -> None:
        """The experts, spread evenly over the nodes, which declare them again and again from now on."""
        self._declaring.set()
        while len(self._ready) < self.config.nodes:
            await self._news.wait()

    async def lose_power(self, count: int) -> None:
        """So many nodes fall silent. Nobody is told."""
        await trio.lowlevel.checkpoint()
        gone = self._draw.sample(sorted(self.nodes), count)
        self._network.unplug(*(self.nodes.pop(place).contact for place in gone))

    def share_alive(self, routing: Routing) -> float:
        """Of the experts found the share whose server is there now."""
        alive = {node.contact for node in self.nodes.values()}
        return sum(info.contact in alive for info in routing.experts) / max(1, len(routing.experts))

    def seekers(self, count: int) -> list[int]:
        """Places to search from, each as rarely as possible."""
        places = self._draw.sample(sorted(self.nodes), len(self.nodes))
        return [places[number % len(places)] for number in range(count)]

    async def node_at(self, place: int) -> Node:
        """Who is there, as soon as somebody is."""
        await trio.lowlevel.checkpoint()
        while place not in self.nodes:
            await self._news.wait()
        return self.nodes[place]

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


def _scores(grid: Sequence[int], draw: random.Random) -> list[Tensor]:
    """The grid scores of one row: [1, size] for each dimension."""
    return [torch.tensor([[draw.gauss(0, 1) for _ in range(size)]], dtype=torch.float64) for size in grid]


def _recall(routing: Routing, scores: Sequence[Tensor], experts: Sequence[str], places: Tensor, k_best: int) -> float:
    """The share of the best of these experts that the search found. `places` [experts, dims]: their coordinates."""
    totals = torch.stack([row[0, column] for row, column in zip(scores, places.T, strict=True)]).sum(0)
    best = {experts[number] for number in totals.topk(k_best).indices.tolist()}
    return len({info.uid for info in routing.experts} & best) / k_best


def _summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] for share in (0.5, 0.95)]
    return {"mean": round(fmean(values), 2), "p50": round(at[0], 2), "p95": round(at[1], 2)}
