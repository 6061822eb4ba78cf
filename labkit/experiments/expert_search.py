"""How long trainers search for experts in a swarm of many nodes, in virtual time: what `labkit bench search` measures.

The nodes are labkit's own, each with its DHT node and directory, and the network between them is simulated in memory.
Only the network takes virtual time, so a search costs the round trips that it makes one after the other.
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

GRID_NAME = "ffn"
RTT_DEVIATION = 32 / 92  # of a round trip, as a share of its mean: our choice, for a network of a few regions
MAX_SIMULATED_EXPERTS = 1 << 20  # in the grid
NODES_PER_JOIN = 4  # nodes in the swarm for each node that joins at the same time
GC_THRESHOLDS = (1_000_000, 10, 1000)  # for `gc.set_threshold`: no garbage is large, as there are no tensors
CHURN_SEARCH_TIME = 60.0  # virtual seconds over which searches are spread under churn
# Declarations are renewed every minute.
NODE_CONFIG = NodeConfig(directory=DirectoryConfig(ttl=180.0))


@dataclass(frozen=True)
class SearchConfig:
    """What `labkit bench search` measures.

    Args:
        nodes: Nodes in the swarm, over which the experts are spread.
        grid: Size of the grid of experts in each dimension.
        k_best: Experts to find.
        rtt_ms: Mean round trip, in milliseconds.
        dead: Share of nodes that lose their power after the experts were declared.
        churn: Mean life of a node in minutes, after which another node takes its place; 0 for no churn.
        handshake: Round trips before the first message of a new connection (TCP and ZeroMQ take two).
        searches: Searches, each done twice: with an empty cache, and with a warm one.
        seed: Of everything random.

    Raises:
        ValueError: A value is not possible.
    """

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
        if places > MAX_SIMULATED_EXPERTS:
            raise ValueError(f"grid={self.grid}: {places:,} experts; at most {MAX_SIMULATED_EXPERTS:,} are simulated")
        if not (math.isfinite(self.handshake) and self.handshake >= 0):
            raise ValueError(f"handshake={self.handshake}: round trips, at least 0")
        if not 0 <= self.dead < 1 or self.nodes - self.dead_nodes < 1:
            raise ValueError(f"dead={self.dead}: a share of the nodes that leaves one alive")
        if not (math.isfinite(self.churn) and self.churn >= 0) or (self.churn and self.dead):
            raise ValueError(f"churn={self.churn}: minutes, at least 0, and not together with dead nodes")

    @property
    def dead_nodes(self) -> int:
        """How many nodes lose their power."""
        return round(self.dead * self.nodes)


@dataclass
class _SearchTimes:
    """What was measured of each search, in lists with an entry per search."""

    ms: list[float] = field(default_factory=list)  # virtual milliseconds
    levels: list[list[float]] = field(default_factory=list)  # virtual milliseconds of each level of the grid
    calls: list[int] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)  # share of the best experts that was found
    alive: list[float] = field(default_factory=list)  # share of the found experts whose server was alive


class _TimedDirectory:
    """A directory that notes how long each of its look-ups took."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.took: list[float] = []  # virtual milliseconds

    def cached(self, prefixes: Iterable[str]) -> dict[str, Children]:
        return self._directory.cached(prefixes)

    async def children(self, prefixes: Iterable[str]) -> dict[str, Children]:
        began = trio.current_time()
        found = await self._directory.children(prefixes)
        self.took.append((trio.current_time() - began) * 1000)
        return found


def measure(config: SearchConfig) -> dict[str, Any]:
    """Build the swarm and search in it.

    Returns:
        What `--json` prints. Searches with an empty cache are `cold`, and those that follow are `warm`.
    """
    started = time.perf_counter()
    try:
        built, cold, warm = run_in_virtual_time(_measure, config, collect_after=GC_THRESHOLDS)
    finally:
        gc.unfreeze()  # the nodes were frozen in `_Crowd.join`
    return {
        **asdict(config),
        "virtual_ms_cold": _summary(cold.ms),
        "virtual_ms_warm": _summary(warm.ms),
        "virtual_ms_by_level": [round(fmean(level), 2) for level in zip_longest(*cold.levels, fillvalue=0.0)],
        "rpcs_per_search": round(fmean(cold.calls), 2),
        "recall": round(fmean(cold.recall + warm.recall), 4),  # share of the best declared experts that was found
        "alive": round(fmean(cold.alive + warm.alive), 4),  # no expert was called yet, so dead ones are not known
        "build_s": round(built - started, 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_rss_mb": peak_rss_mb(),
    }


async def _measure(config: SearchConfig) -> tuple[float, _SearchTimes, _SearchTimes]:
    draw = random.Random(config.seed)
    half = config.rtt_ms / 2000
    latency = gamma(half, half * RTT_DEVIATION * math.sqrt(2))
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
        built, times = time.perf_counter(), (_SearchTimes(), _SearchTimes())
        async with trio.open_nursery() as searching:  # before the declarations of dead nodes expire
            # One search at a time from each place, since a node counts the calls of all its searches together.
            turns = defaultdict[int, trio.Lock](trio.Lock)
            for seeker in crowd.seekers(config.searches):
                searching.start_soon(_search, turns[seeker], crowd, seeker, _scores(config.grid, draw), times)
                if config.churn:
                    await trio.sleep(CHURN_SEARCH_TIME / config.searches)
        network.over = True
        nursery.cancel_scope.cancel()
    return built, *times


async def _search(
    turn: trio.Lock, crowd: _Crowd, seeker: int, scores: Sequence[Tensor], times: tuple[_SearchTimes, _SearchTimes]
) -> None:
    """Search twice from one place, with an empty cache and then with a warm one.

    If the node there leaves while it searches, the node that takes its place begins again.
    """
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
    """Do `count` searches, one after the other. Returns milliseconds, those by level, calls, recall and share alive."""
    while True:
        node = await crowd.node_at(seeker)
        directory, found = _TimedDirectory(Directory(node.dht)), list[tuple[float, list[float], int, float, float]]()
        for _ in range(count):
            calls, began, directory.took = node.dht.peers.calls, trio.current_time(), []
            try:
                routing = await beam_search(directory, GRID_NAME, scores, crowd.config.k_best)
            except LabkitError:
                break
            recall = _recall(routing, scores, crowd.experts, crowd.places, crowd.config.k_best)
            took = (trio.current_time() - began) * 1000
            alive = crowd.share_alive(routing)
            found.append((took, directory.took, node.dht.peers.calls - calls, recall, alive))
        if len(found) == count and crowd.nodes.get(seeker) is node:
            return found


class _Crowd:
    """The nodes of the swarm by place. Under churn a node leaves, and a new one takes its place and its experts."""

    def __init__(self, network: SimNetwork, config: SearchConfig, draw: random.Random) -> None:
        self.config = config
        self.experts = list(grid_uids(GRID_NAME, config.grid))
        self.places = torch.tensor([split_uid(uid)[1] for uid in self.experts])
        self.nodes: dict[int, Node] = {}
        self.churning = trio.Event()
        self._declaring = trio.Event()
        self._ready: set[int] = set()  # places whose first node has declared its experts
        self._network = network
        self._draw = draw
        self._change = trio.Event()  # set when a node joins or has declared its experts

    async def join(self, nursery: trio.Nursery) -> None:
        """Start all nodes. Each joins through a random node that has joined before."""
        while (there := len(self.nodes)) < self.config.nodes:
            lot = range(there, min(self.config.nodes, there + max(1, there // NODES_PER_JOIN)))
            async with trio.open_nursery() as joining:
                for place in lot:
                    joining.start_soon(nursery.start, self._keep_inhabited, place)
            gc.freeze()  # the nodes stay, and searching them for garbage would take seconds each time

    async def _keep_inhabited(self, place: int, task_status: trio.TaskStatus[None]) -> None:
        """Run one node after another at a place, for ever."""
        while True:
            try:
                with trio.CancelScope() as life:
                    await self._live(place, life, task_status)
            except* JoinError:
                pass  # the node it joined through has just left; try another one
            if self.nodes.pop(place, None) is not None:
                task_status = trio.TASK_STATUS_IGNORED

    async def _live(self, place: int, life: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        others = list(self.nodes.values())
        join = [self._draw.choice(others).contact] if others else []
        identity = Identity(self._draw.randbytes(32))
        async with open_node(self._network, identity, NODE_CONFIG, join=join) as node, trio.open_nursery() as nursery:
            self.nodes[place] = node
            task_status.started()
            self._notify()
            await self._declaring.wait()
            held = self.experts[place :: self.config.nodes]
            if held:
                await nursery.start(node.directory.keep_declared, held, node.contact)
            self._ready.add(place)
            self._notify()
            await self.churning.wait()
            life.deadline = trio.current_time() + self._draw.expovariate(1 / (self.config.churn * 60))
            await trio.sleep_forever()

    async def declare(self) -> None:
        """Let all nodes declare their experts, now and then again and again, and wait for the first time."""
        self._declaring.set()
        while len(self._ready) < self.config.nodes:
            await self._change.wait()

    async def lose_power(self, count: int) -> None:
        """Silence some nodes, without a word to the others."""
        await trio.lowlevel.checkpoint()
        gone = self._draw.sample(sorted(self.nodes), count)
        self._network.unplug(*(self.nodes.pop(place).contact for place in gone))

    def share_alive(self, routing: Routing) -> float:
        """Returns the share of the experts found whose server is alive now."""
        alive = {node.contact for node in self.nodes.values()}
        return sum(info.contact in alive for info in routing.experts) / max(1, len(routing.experts))

    def seekers(self, count: int) -> list[int]:
        """Returns random places to search from, each as rarely as possible."""
        places = self._draw.sample(sorted(self.nodes), len(self.nodes))
        return [places[number % len(places)] for number in range(count)]

    async def node_at(self, place: int) -> Node:
        """Returns the node at a place, once there is one."""
        await trio.lowlevel.checkpoint()
        while place not in self.nodes:
            await self._change.wait()
        return self.nodes[place]

    def _notify(self) -> None:
        self._change.set()
        self._change = trio.Event()


def _scores(grid: Sequence[int], draw: random.Random) -> list[Tensor]:
    """Draw the grid scores of one row: [1, size] for each dimension."""
    return [torch.tensor([[draw.gauss(0, 1) for _ in range(size)]], dtype=torch.float64) for size in grid]


def _recall(routing: Routing, scores: Sequence[Tensor], experts: Sequence[str], places: Tensor, k_best: int) -> float:
    """Returns the share of the best experts that the search found. `places` [experts, dims] are their coordinates."""
    totals = torch.stack([row[0, column] for row, column in zip(scores, places.T, strict=True)]).sum(0)
    best = {experts[number] for number in totals.topk(k_best).indices.tolist()}
    return len({info.uid for info in routing.experts} & best) / k_best


def _summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] for share in (0.5, 0.95)]
    return {"mean": round(fmean(values), 2), "p50": round(at[0], 2), "p95": round(at[1], 2)}
