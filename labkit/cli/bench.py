"""`labkit bench WHAT`: the options of each benchmark, and the function that runs one.

Each option is a field of the benchmark's config. The benchmarks are in `labkit.bench`, and `search` is in
`labkit.experiments`. They import torch, and so they are imported when they are run: every command reads this module.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks and their options to the parser of `labkit bench`."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")

    rpc = _add_bench(benches, "rpc", "calls to experts from several processes")
    _add_kind(rpc, "nop")
    add_number(rpc, "--experts", 4, "experts in all, spread over the servers")
    add_number(rpc, "--servers", 1, "expert servers, each a process")
    add_number(rpc, "--hidden", 1024, "width of the experts")
    add_number(rpc, "--batch", 1, "rows of a call")
    add_number(rpc, "--clients", 2, "clients that call at the same time, in up to eight processes")
    add_number(rpc, "--calls", 500, "calls that each client makes")
    rpc.add_argument("--backward", action="store_true", help="make a backward pass after each forward pass")
    rpc.add_argument(
        "--relay", action="store_true", help="call the servers through a relay, and compare that with calling directly"
    )
    rpc.add_argument(
        "--codec", default="none", metavar="NAME",
        help="how tensors are compressed on the wire: none, float16, bfloat16 or blockwise8 (default: %(default)s)",
    )  # fmt: skip

    moe = _add_bench(benches, "moe", "forward and backward passes of an MoE layer over one server")
    _add_kind(moe, "ffn")
    add_number(moe, "--batch", 64, "rows of a batch")
    add_number(moe, "--hidden", 256, "width of the layer and its experts")
    add_number(moe, "--side", 4, "the grid has N x N experts")
    add_number(moe, "--k-best", 4, "experts that each row is sent to")
    add_number(moe, "--passes", 10, "forward and backward passes to measure")

    dht = _add_bench(benches, "dht", "stores and gets among DHT nodes, each a process")
    add_number(dht, "--peers", 8, "DHT nodes")
    add_number(dht, "--rounds", 20, "records that are stored and read")

    for bench in (rpc, moe, dht):
        bench.add_argument("--secure", action="store_true", help="encrypt the connections (CURVE)")
        bench.add_argument(
            "--peer-json", metavar="FILE",
            help="what a script printed that measures the same of another library; adds the ratios to it",
        )  # fmt: skip

    latency = _add_bench(benches, "latency", "throughput of many trainers, and of a pipeline, if calls are slow")
    latency.add_argument(
        "--block", default="ffn", metavar="KIND", help="kind of the blocks: ffn or transformer (default: %(default)s)"
    )
    add_number(latency, "--blocks", 4, "blocks of the model, one after the other")
    add_number(latency, "--servers", 2, "expert servers, each a process")
    add_number(latency, "--hidden", 512, "width of the blocks")
    add_number(latency, "--trainers", 64, "trainers, each with a batch in flight")
    latency.add_argument(
        "--delays-ms", type=float, nargs="+", default=[0.0, 50.0, 100.0, 200.0], metavar="MS",
        help="mean delays of a call to measure, in milliseconds (default: 0 50 100 200)",
    )  # fmt: skip
    latency.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="seconds to measure each delay (default: 10)"
    )
    add_number(latency, "--runs", 1, "runs of the whole; prints their medians")

    search = _add_bench(benches, "search", "the search for experts in a large simulated swarm, in virtual time")
    add_number(search, "--nodes", 100, "nodes of the swarm")
    search.add_argument(
        "--grid",
        type=int,
        nargs="+",
        default=[32, 32],
        metavar="SIZE",
        help="sizes of the expert grid (default: 32 32)",
    )
    add_number(search, "--k-best", 4, "experts to search for")
    search.add_argument(
        "--rtt-ms", type=float, default=92.0, metavar="MS", help="mean round trip, in milliseconds (default: 92)"
    )
    search.add_argument(
        "--dead", type=float, default=0.0, metavar="SHARE",
        help="share of the nodes that fail before the search, from 0 to 1 (default: 0)",
    )  # fmt: skip
    search.add_argument(
        "--churn", type=float, default=0.0, metavar="MINUTES",
        help="mean life of a node, in minutes; 0 means that nodes live for ever (default: 0)",
    )  # fmt: skip
    search.add_argument(
        "--handshake", type=float, default=0.0, metavar="N",
        help="round trips before the first message of a new connection (default: 0)",
    )  # fmt: skip
    add_number(search, "--searches", 100, "searches to measure")
    add_number(search, "--seed", 0, "seed of the random numbers")

    recovery = _add_bench(benches, "recovery", "what is kept while servers leave for good, in virtual time")
    recovery.add_argument(
        "--full", action="store_true",
        help="100 servers, 1,000 experts, 64 trainers, two hours, except for what is said otherwise; takes hours",
    )  # fmt: skip
    for option, default, text in (
        ("--servers", "12; with --full 100", "servers at any time"),
        ("--experts", "120; with --full 1,000", "experts, spread over the servers"),
        ("--trainers", "8; with --full 64", "trainers"),
    ):
        recovery.add_argument(option, type=int, default=0, metavar="N", help=f"{text} (default: {default})")
    recovery.add_argument(
        "--minutes", type=float, default=0.0, metavar="N",
        help="virtual minutes of training (default: 10; with --full 120)",
    )  # fmt: skip
    recovery.add_argument(
        "--at-most", type=float, default=0.0, metavar="N",
        help="real minutes after which the training ends; the result says how long it was (default: none)",
    )  # fmt: skip
    _add_real(recovery, "--life", 10.0, "mean life of a server, in minutes")
    _add_real(recovery, "--step-s", 2.0, "seconds that a trainer computes itself in a step")
    add_number(recovery, "--k-best", 4, "experts that each step calls")
    add_number(recovery, "--hidden", 8, "width of the experts")
    _add_real(recovery, "--rtt-ms", 100.0, "round trip, in milliseconds")
    _add_real(recovery, "--upload", 20.0, "what each node sends at most, in Mbit/s")
    add_number(recovery, "--backups", 1, "copies of each expert at other servers")
    add_number(recovery, "--seed", 0, "seed of the random numbers")

    kills = _add_bench(benches, "kills", "how experts come back when servers are killed for good while they train")
    add_number(kills, "--servers", 8, "expert servers, each a process")
    add_number(kills, "--experts", 32, "experts in all, spread over the servers")
    add_number(kills, "--hidden", 64, "width of the layer and its experts")
    add_number(kills, "--steps", 1500, "steps of each training")
    add_number(kills, "--runs", 3, "trainings with kills, and as many without")
    kills.add_argument("--dataset", default="digits", metavar="NAME", help="as for labkit demo (default: %(default)s)")
    kills.add_argument("--data-dir", metavar="FOLDER", help="folder with the files of the data set")

    copies = _add_bench(benches, "copies", "what copies of experts cost in training")
    add_number(copies, "--servers", 4, "expert servers of each training, each a process")
    add_number(copies, "--experts", 16, "experts in all, spread over the servers")
    add_number(copies, "--backups", 1, "copies of each expert; three tell better than one what one costs")
    add_number(copies, "--hidden", 64, "width of the layer and its experts")
    add_number(copies, "--rounds", 12, "pairs of trainings")
    _add_real(copies, "--seconds", 25.0, "what is measured of each training")
    add_number(copies, "--seed", 0, "seed of the order within the pairs")

    transformers = _add_bench(
        benches, "transformers", "a mixture model of Transformers whose experts are at servers, beside a local one"
    )
    transformers.add_argument(
        "--servers", type=int, nargs="+", default=[1, 4], metavar="N",
        help="numbers of expert servers to measure, each a process (default: 1 4)",
    )  # fmt: skip
    add_number(transformers, "--layers", 4, "layers of the model")
    add_number(transformers, "--hidden", 256, "width of the model, a multiple of 64")
    add_number(transformers, "--inner", 512, "width within an expert")
    add_number(transformers, "--experts", 16, "experts of each layer")
    add_number(transformers, "--k-best", 2, "experts that the router chooses for each token")
    add_number(transformers, "--texts", 1, "texts that are written at the same time")
    add_number(transformers, "--tokens", 48, "tokens that are written to each text")
    add_number(transformers, "--batch", 8, "windows of a training step")
    add_number(transformers, "--context", 64, "tokens of a window")
    add_number(transformers, "--steps", 4, "training steps")
    add_number(transformers, "--runs", 3, "runs of each, of which the median is printed")

    suite = _add_bench(
        benches, "all", "all benchmarks of speed but search, in every size that counts, several times over"
    )
    suite.add_argument(
        "--out", required=True, metavar="FILE", help="where to write a line for each measurement that FILE lacks"
    )
    add_number(suite, "--runs", 5, "runs of each measurement")
    suite.add_argument(
        "--only", default="", metavar="TEXT", help="measure only the rows with TEXT in their name (default: all)"
    )
    suite.add_argument(
        "--peer-scripts", metavar="FOLDER", help="scripts that measure another library, to run in turn (default: none)"
    )
    suite.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON",
        help="Python that has the other library installed (default: this one)",
    )  # fmt: skip

    for bench in (rpc, moe, dht, latency, search, recovery, kills, copies, transformers, suite):
        bench.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def _add_bench(benches: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benches.add_parser(name, help=summary, description=f"Measure {summary}.")
    return parser


def _add_kind(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--expert", default=default, metavar="KIND",
        help="kind of the experts: nop, ffn, or ffn2, which is hivemind's ffn (default: %(default)s)",
    )  # fmt: skip


def add_number(parser: argparse.ArgumentParser, option: str, default: int, text: str) -> None:
    """Add an option that is a whole number; its help is `text` and the default."""
    parser.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")


def _add_real(parser: argparse.ArgumentParser, option: str, default: float, text: str) -> None:
    """Add an option that is a number; its help is `text` and the default."""
    parser.add_argument(option, type=float, default=default, metavar="N", help=f"{text} (default: {default:g})")


def bench(options: argparse.Namespace) -> None:
    """Run a benchmark and print its result.

    Raises:
        ValueError: An option is wrong.
        LabkitError: The measurement has failed.
    """
    from labkit.bench.report import ratios_to, read_peer, show

    config_class, measure = _find(options.bench)
    given = {name: getattr(options, name) for name in config_class.__dataclass_fields__}
    config = config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    path = getattr(options, "peer_json", None)
    peer = {} if path is None else read_peer(path, options.bench, asdict(config))
    print(f"measuring {options.bench} …", file=sys.stderr)
    result = measure(config)
    show({**result, **ratios_to(result, peer)}, as_json=options.json)


def _find(name: str) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """The config class and the function of a benchmark, which is imported only now."""
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
    if name == "recovery":
        from labkit.bench import recovery

        return recovery.RecoveryConfig, recovery.measure
    if name == "kills":
        from labkit.bench import kills

        return kills.KillsConfig, kills.measure
    if name == "copies":
        from labkit.bench import copies

        return copies.CopiesConfig, copies.measure
    if name == "transformers":
        from labkit.bench import transformers

        return transformers.TransformersConfig, transformers.measure
    if name == "all":
        from labkit.bench import suite

        return suite.SuiteConfig, suite.measure
    from labkit.experiments import expert_search

    return expert_search.SearchConfig, expert_search.measure
