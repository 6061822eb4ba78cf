"""`labkit bench search`: how long trainers look for experts in a swarm of many nodes, in virtual time.

The nodes are those that ship, each with its own DHT node and directory; the network between them is in memory. Nothing
is timed but the search: which calls it makes, one after the other, is what it costs.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

import torch
import trio
from torch import Tensor

from labkit.client.beam_search import Routing, beam_search
from labkit.directory import Directory
from labkit.expert_uid import check_grid, grid_uids, split_uid
from labkit.node import Node, open_node
from labkit.wire.latency import gamma
from labkit.wire.security import Identity
from labkit.wire.simnet import SimNetwork, open_simnet

NAME = "ffn"
SPREAD = 32 / 92  # standard deviation of a round trip by its mean: the paper's three regions
JOINING = 50  # nodes that join at the same time


@dataclass(frozen=True)
class SearchConfig:
    """`dead`: the share of nodes that lose their power after the experts were declared. Raises `ValueError`."""

    nodes: int = 100
    grid: tuple[int, ...] = (32, 32)
    k_best: int = 4
    rtt_ms: float = 92.0
    dead: float = 0.0
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
        if not 0 <= self.dead < 1 or self.nodes - self._dead_nodes < 1:
            raise ValueError(f"dead={self.dead}: a share of the nodes that leaves one alive")

    @property
    def _dead_nodes(self) -> int:
        return round(self.dead * self.nodes)


@dataclass
class _Times:
    """Of some searches: virtual milliseconds, calls made, and the share of the best experts that was found."""

    ms: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)


def bench_search(config: SearchConfig, *, as_json: bool) -> None:
    """`labkit bench search`: measure, and print it."""
    print(f"building a swarm of {config.nodes} nodes, and searching it {config.searches} times …", file=sys.stderr)
    result = measure(config)
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:g}" for key, number in value.items())
        print(f"  {name:<18}{value}")


def measure(config: SearchConfig) -> dict[str, object]:
    """Build the swarm, search, and return what `--json` prints."""
    from trio.testing import MockClock

    started = time.perf_counter()
    built, cold, warm = trio.run(_measure, config, clock=MockClock(autojump_threshold=0))
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10  # ru_maxrss is in bytes there
    return {
        **asdict(config),
        "virtual_ms_cold": _summary(cold.ms),
        "virtual_ms_warm": _summary(warm.ms),
        "rpcs_per_search": round(fmean(cold.calls), 2),
        "recall": round(fmean(cold.recall + warm.recall), 4),  # of the best experts that were declared
        "build_s": round(built - started, 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // scale,
    }


async def _measure(config: SearchConfig) -> tuple[float, _Times, _Times]:
    draw = random.Random(config.seed)
    random.seed(config.seed)  # of which DHT nodes draw
    half = config.rtt_ms / 2000
    latency = gamma(half, half * SPREAD * math.sqrt(2))
    async with open_simnet(config.seed, latency=latency) as network, trio.open_nursery() as nursery:
        nodes = await _join_all(network, nursery, config, draw)
        experts = list(grid_uids(NAME, config.grid))
        holders = nodes[: min(len(experts), config.nodes)]
        held = {node.contact.key: experts[number :: len(holders)] for number, node in enumerate(holders)}
        async with trio.open_nursery() as declaring:
            for node in holders:
                declaring.start_soon(node.directory.declare, held[node.contact.key], node.contact)
        dead = draw.sample(nodes, config._dead_nodes)
        network.unplug(*(node.contact for node in dead))
        built = time.perf_counter()
        gone = {node.contact.key for node in dead}
        alive = [node for node in nodes if node.contact.key not in gone]
        cold, warm = _Times(), _Times()

        async def search(seeker: Node, scores: Sequence[Tensor]) -> None:
            directory = Directory(seeker.dht)  # with an empty cache
            for times in (cold, warm):
                calls, began = seeker.dht.peers.calls, trio.current_time()
                routing = await beam_search(directory, NAME, scores, config.k_best)
                times.ms.append((trio.current_time() - began) * 1000)
                times.calls.append(seeker.dht.peers.calls - calls)
                times.recall.append(_recall(routing, scores, experts, config.k_best))

        async with trio.open_nursery() as searching:  # all at once, before declarations run out
            draw.shuffle(alive)
            for number in range(config.searches):
                searching.start_soon(search, alive[number % len(alive)], _scores(config.grid, draw))
        nursery.cancel_scope.cancel()
    return built, cold, warm


async def _join_all(
    network: SimNetwork, nursery: trio.Nursery, config: SearchConfig, draw: random.Random
) -> list[Node]:
    """Nodes that joined the swarm, each through some node that was there before it."""
    nodes: list[Node] = []

    async def live(task_status: trio.TaskStatus[Node]) -> None:
        identity = Identity(draw.randbytes(32))
        join = [draw.choice(nodes).contact] if nodes else []
        async with open_node(network, identity, join=join) as node:
            task_status.started(node)
            await trio.sleep_forever()

    async def start() -> None:
        joined.append(await nursery.start(live))

    while len(nodes) < config.nodes:
        joined: list[Node] = []
        async with trio.open_nursery() as several:
            for _ in range(min(JOINING, max(1, len(nodes)), config.nodes - len(nodes))):
                several.start_soon(start)
        nodes += joined
    return nodes


def _scores(grid: Sequence[int], draw: random.Random) -> list[Tensor]:
    """The grid scores of one row: [1, size] for each dimension."""
    return [torch.tensor([[draw.gauss(0, 1) for _ in range(size)]], dtype=torch.float64) for size in grid]


def _recall(routing: Routing, scores: Sequence[Tensor], experts: Sequence[str], k_best: int) -> float:
    """The share of the best of these experts that the search found."""

    def score(uid: str) -> float:
        return sum(float(row[0, c]) for row, c in zip(scores, split_uid(uid)[1], strict=True))

    best = sorted(experts, key=score, reverse=True)[:k_best]
    return len({info.uid for info in routing.experts} & set(best)) / k_best


def _summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] for share in (0.5, 0.95)]
    return {"mean": round(fmean(values), 2), "p50": round(at[0], 2), "p95": round(at[1], 2)}
