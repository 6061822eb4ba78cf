"""`labkit bench rpc`: calls to the experts of one or several servers, from clients in processes of their own.

Beside it is the limit that `limits` and `echo` measure in the same run. Each process of clients runs `call`.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from labkit.bench.echo import RoundTrip, echo_limit
from labkit.bench.limits import experts_limit
from labkit.bench.processes import ProcessGroup, all_at_once, peak_rss_mb
from labkit.bench.report import EXPERT_KINDS, check_at_least, milliseconds
from labkit.node import NodeConfig
from labkit.server.backend import ExpertBackend
from labkit.server.layers import make_expert
from labkit.swarm import Swarm
from labkit.wire.compression import CODECS

CALL_TIMEOUT = 300.0  # seconds; long, since no call is to fail here
MAX_WARM_UP_CALLS = 100  # per client, before anything is counted
MAX_CLIENT_PROCESSES = 8  # limited by the memory that torch takes in each


@dataclass(frozen=True)
class RPCConfig:
    """What `labkit bench rpc` measures. Up to eight clients have a process each, and more share eight processes.

    Args:
        expert: The kind of experts: nop, ffn or ffn2.
        experts: Their number, spread over the servers.
        servers: Server processes.
        hidden: Width of an expert's input.
        batch: Rows per call.
        clients: Clients, each a node with connections of its own.
        calls: Calls per client.
        backward: Whether a call is a forward and a backward pass, instead of a forward pass.
        secure: Whether connections are encrypted.
        relay: Whether the servers take no connections, and are called through a relay, a process of its own. The same
            is measured without one before. Connections are encrypted in any case.
        codec: How tensors are compressed on the way.

    Raises:
        ValueError: A value is not possible.
    """

    expert: str = "nop"
    experts: int = 4
    servers: int = 1
    hidden: int = 1024
    batch: int = 1
    clients: int = 2
    calls: int = 500
    backward: bool = False
    secure: bool = False
    relay: bool = False
    codec: str = "none"

    def __post_init__(self) -> None:
        if self.expert not in EXPERT_KINDS:
            raise ValueError(f"expert={self.expert!r}: one of {', '.join(EXPERT_KINDS)}")
        if self.codec not in CODECS:
            raise ValueError(f"codec={self.codec!r}: one of {', '.join(CODECS)}")
        check_at_least(1, self, "experts", "servers", "hidden", "batch", "clients", "calls")
        if self.servers > self.experts:
            raise ValueError(f"servers={self.servers}: there are {self.experts} experts to spread")


def measure(config: RPCConfig) -> dict[str, Any]:
    """Measure the limit, the calls, and the limit again; the better limit counts.

    Returns:
        What `--json` prints. `rows_per_batch` is the servers' mean batch. `lookup_ms` is the time in which a client
        that has just joined lists all experts with an empty cache, and `lookup_us_per_expert` the same divided by
        their number. With `relay`, `of_direct` compares the calls with `direct_per_s`, those without one, and
        `relay_held_kb` is the most that the relay held at a time. `fairness` is the slowest client's time divided by
        the quickest one's. `server_state_mb` is the part of `server_rss_mb` that is parameters and, with `backward`,
        the optimizer's moments.
    """
    direct: dict[str, Any] = {}
    if config.relay:
        config = replace(config, secure=True)
        direct = measure(replace(config, relay=False))
    before = _limit(config, config.batch)
    with ProcessGroup() as group, ExitStack() as stack:
        relays = group.start("rpc:relay_others", None) if config.relay else []
        swarm = stack.enter_context(_swarm(config, [relay.receive() for relay in relays]))
        servers = swarm.serve(
            EXPERT_KINDS[config.expert], experts=config.experts, servers=config.servers, name="expert",
            hidden=config.hidden, isolation="process",
        )  # fmt: skip
        order = {**asdict(config), "invite": swarm.invite(), "uids": sorted(swarm.experts())}
        workers = group.start("rpc:call", *[{**order, "seeds": some} for some in _seeds(config)])
        warm_up = Counter[str]()
        processes = all_at_once(workers, lambda: warm_up.update(_work(swarm)))
        work = _work(swarm) - warm_up
        server_rss = max(peak_rss_mb(server.pid) for server in servers)
        relayed = relays[0].request() if relays else {}
    results = [result for process in processes for result in process["clients"]]
    calls = config.clients * config.calls
    per_s = calls / max(result["seconds"] for result in results)
    lookup = median(result["lookup_s"] for result in results)
    rows = work["rows"] / work["batches"]
    limit = max(before, _limit(config, rows))
    return {
        **asdict(config),
        "calls_per_s": round(per_s, 1),
        "samples_per_s": round(per_s * config.batch, 1),
        **milliseconds([seconds for result in results for seconds in result["times"]]),
        **(
            {"of_direct": round(per_s / direct["calls_per_s"], 3), "direct_per_s": direct["calls_per_s"]}
            if direct
            else {}
        ),
        **relayed,
        "limit_per_s": round(limit, 1),
        "of_limit": round(per_s / limit, 3),
        "rows_per_batch": round(rows, 1),
        "lookup_ms": round(1e3 * lookup, 2),
        "lookup_us_per_expert": round(1e6 * lookup / config.experts, 1),
        "fairness": round(max(r["seconds"] for r in results) / min(r["seconds"] for r in results), 2),
        "server_rss_mb": server_rss,
        "server_state_mb": round(_state_bytes(config) / (1 << 20), 1),
        "client_rss_mb": max(process["rss_mb"] for process in processes),
    }


def _swarm(config: RPCConfig, invitations: Sequence[str]) -> Swarm:
    """The swarm of the servers: a new one, or one behind the relay whose invitation is given."""
    if invitations:
        return Swarm.join(invitations[0], name="bench", node=NodeConfig(hidden=True))
    return Swarm("bench", secure=config.secure or None)


def relay_others(order: None) -> Generator[Any, Any, None]:
    """The worker of the relay."""
    with Swarm("relay", secure=True, relay=True) as swarm:
        yield swarm.invite()
        server = swarm._node.relaying.server
        yield {"relay_held_kb": -(-server.held.most >> 10), "relay_rss_mb": peak_rss_mb()}


def _work(swarm: Swarm) -> Counter[str]:
    """Returns how many rows and batches the servers have computed so far."""
    statistics = swarm.statistics().values()
    return Counter(rows=sum(s.rows for s in statistics), batches=sum(s.batches for s in statistics))


def _seeds(config: RPCConfig) -> list[list[int]]:
    """Returns the seeds of the clients of each process."""
    processes = min(config.clients, MAX_CLIENT_PROCESSES)
    return [list(range(first, config.clients, processes)) for first in range(processes)]


def _state_bytes(config: RPCConfig) -> int:
    """Bytes of the experts of the server that has most of them."""
    expert = ExpertBackend("expert", make_expert(EXPERT_KINDS[config.expert], hidden=config.hidden))
    return -(-config.experts // config.servers) * (expert.state_bytes if config.backward else expert.parameter_bytes)


def _limit(config: RPCConfig, rows: float) -> float:
    """Measure the limit in calls per second, for servers whose mean batch has `rows` rows."""
    if config.expert == "nop":
        size = CODECS[config.codec].encoded_bytes(torch.float32, (config.batch, config.hidden))
        round_trips: list[RoundTrip] = [([size], 1)] + ([([size, size], 1)] if config.backward else [])
        clients = [len(some) for some in _seeds(config)]
        return echo_limit(round_trips, clients=clients, calls=config.calls, secure=config.secure)
    threads = torch.get_num_threads()
    calls = max(3, round(config.clients * config.calls * config.batch / rows))
    per_s = experts_limit(
        kind=EXPERT_KINDS[config.expert], hidden=config.hidden, experts=config.experts, rows=round(rows),
        calls=min(calls, 50), backward=config.backward, threads=threads,
    )  # fmt: skip
    return per_s / config.batch


def call(order: dict[str, Any]) -> Generator[Any, Any, None]:
    """The worker of some clients, one for each seed. A client calls one randomly chosen expert after another."""
    torch.set_num_threads(1)
    with ExitStack() as stack, ThreadPoolExecutor(len(order["seeds"])) as pool:
        clients = [_client(order, seed, stack) for seed in order["seeds"]]
        for client in clients:
            client(min(MAX_WARM_UP_CALLS, order["calls"] // 10) + 2)
        yield None
        results = list(pool.map(lambda client: client(order["calls"]), clients))
        yield {"clients": results, "rss_mb": peak_rss_mb()}


def _client(order: dict[str, Any], seed: int, stack: ExitStack) -> Callable[[int], dict[str, Any]]:
    """Join the swarm. Returns a function that makes so many calls and returns their times."""
    draw, backward = random.Random(seed), order["backward"]
    swarm = stack.enter_context(Swarm.join(order["invite"], name=f"bench {seed}"))
    joined = time.perf_counter()
    found = swarm.experts()
    lookup = time.perf_counter() - joined
    assert len(found) == len(order["uids"])
    experts = [swarm.expert(uid, timeout=CALL_TIMEOUT, codec=order["codec"]) for uid in order["uids"]]
    x = torch.randn(order["batch"], order["hidden"], requires_grad=backward)

    def once() -> float:
        started = time.perf_counter()
        y = draw.choice(experts)(x)
        if backward:
            y.sum().backward()
        return time.perf_counter() - started

    def several(calls: int) -> dict[str, Any]:
        started = time.perf_counter()
        times = [once() for _ in range(calls)]
        return {"seconds": time.perf_counter() - started, "times": times, "lookup_s": lookup}

    return several
