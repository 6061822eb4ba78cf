"""`labkit bench WHAT`: the options of each benchmark, and running it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from labkit.bench.report import ratios_to, read_peer, show


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `labkit bench`."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    rpc = benches.add_parser("rpc", help="calls to experts, from several processes")
    rpc.add_argument("--expert", default="nop", metavar="KIND", help="nop, ffn, or the peer's ffn2 (default: nop)")
    _add_numbers(rpc, experts=4, servers=1, hidden=1024, batch=1, clients=2)
    rpc.add_argument("--calls", type=int, default=500, metavar="N", help="of each client (default: 500)")
    rpc.add_argument("--backward", action="store_true", help="a backward pass after each forward pass")
    rpc.add_argument("--codec", default="none", help="of tensors on the wire (default: none)")
    moe = benches.add_parser("moe", help="forward and backward passes of an MoE layer over one server")
    moe.add_argument("--expert", default="ffn", metavar="KIND", help="as of rpc (default: ffn)")
    _add_numbers(moe, batch=64, hidden=256)
    moe.add_argument("--side", type=int, default=4, metavar="N", help="the grid is side x side (default: 4)")
    _add_numbers(moe, k_best=4, passes=10)
    dht = benches.add_parser("dht", help="stores and gets among DHT nodes in processes of their own")
    _add_numbers(dht, peers=8, rounds=20)
    for bench in (rpc, moe, dht):
        bench.add_argument("--secure", action="store_true", help="encrypt connections (CURVE)")
        bench.add_argument("--peer-json", metavar="FILE", help="what a peer's script printed; adds the ratios to it")
    latency = benches.add_parser("latency", help="throughput of many trainers, and of a pipeline, where calls are slow")
    latency.add_argument("--block", default="ffn", metavar="KIND", help="ffn or transformer (default: ffn)")
    _add_numbers(latency, blocks=4, servers=2, hidden=512, trainers=64)
    latency.add_argument(
        "--delays-ms", type=float, nargs="+", default=[0.0, 50.0, 100.0, 200.0], metavar="MS",
        help="mean delays of a call (default: 0 50 100 200)",
    )  # fmt: skip
    latency.add_argument("--seconds", type=float, default=10.0, help="that each delay is measured (default: 10)")
    latency.add_argument("--runs", type=int, default=1, metavar="N", help="of each; prints medians (default: 1)")
    search = benches.add_parser("search", help="the search for experts in a large swarm, simulated, in virtual time")
    _add_numbers(search, nodes=100)
    search.add_argument("--grid", type=int, nargs="+", default=[32, 32], metavar="SIZE", help="(default: 32 32)")
    search.add_argument("--k-best", type=int, default=4, help="experts that are looked for (default: 4)")
    search.add_argument("--rtt-ms", type=float, default=92.0, help="mean round trip, in milliseconds (default: 92)")
    search.add_argument(
        "--dead", type=float, default=0.0, help="share of nodes that fail before the search (default: 0)"
    )
    search.add_argument(
        "--churn", type=float, default=0.0, help="mean life of a node in minutes; 0 for ever (default: 0)"
    )
    search.add_argument(
        "--handshake", type=float, default=0.0, help="round trips before a new connection's first message (default: 0)"
    )
    _add_numbers(search, searches=100, seed=0)
    suite = benches.add_parser("all", help="the others in all sizes that count, several times over, into a file")
    suite.add_argument("--out", required=True, metavar="FILE", help="gets a line for each measurement that it lacks")
    suite.add_argument("--runs", type=int, default=5, metavar="N", help="of each (default: 5)")
    suite.add_argument("--only", default="", metavar="TEXT", help="rows with this in their name")
    suite.add_argument("--peer-scripts", metavar="FOLDER", help="with a peer's scripts, which are run beside")
    suite.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="that has the peer installed")
    for bench in (rpc, moe, dht, latency, search, suite):
        bench.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def _add_numbers(parser: argparse.ArgumentParser, **defaults: int) -> None:
    for name, default in defaults.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"(default: {default})")


def bench(options: argparse.Namespace) -> None:
    """Measure, and print it. Raises `ValueError`, and a kind of `LabkitError`."""
    kind, measure = _find(options.bench)
    given = {name: getattr(options, name) for name in kind.__dataclass_fields__}
    config = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    path = getattr(options, "peer_json", None)
    peer = {} if path is None else read_peer(path, options.bench, asdict(config))
    print(f"measuring {options.bench} …", file=sys.stderr)
    result = measure(config)
    show({**result, **ratios_to(result, peer)}, as_json=options.json)


def _find(name: str) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """A benchmark's config and function. Each imports what it needs only now."""
    if name == "rpc":
        from labkit.bench import rpc

        return rpc.RPCConfig, rpc.measure
    if name == "moe":
        from labkit.bench import moe

        return moe.MoEConfig, moe.measure
    if name == "dht":
        from labkit.bench import dht

        return dht.DHTBenchConfig, dht.measure
    if name == "latency":
        from labkit.bench import latency

        return latency.LatencyConfig, latency.measure
    if name == "all":
        from labkit.bench import suite

        return suite.SuiteConfig, suite.measure
    from labkit.experiments import expert_search

    return expert_search.SearchConfig, expert_search.measure
