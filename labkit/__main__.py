"""The `labkit` command: its options, and what runs for `demo`, `serve`, `relay`, `watch`, `bench` and `keygen`.

The commands are in `labkit.cli`, which imports torch, and so they are imported when the options have been read.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from labkit import __version__, quick_imports
from labkit.cli.bench import add_bench_options, add_number
from labkit.cli.parser import Parser, in_options
from labkit.cli.terminal import at_terminal, ignore_interrupts
from labkit.launch.child_python import search_working_folder_last


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script with these arguments, by default those of the process. Returns the exit status."""
    parser = Parser(
        prog="labkit",
        description="Train a mixture of experts over a swarm of servers.",
        epilog="labkit COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"labkit {__version__}")
    parser.add_argument("--verbose", "-v", action="store_true", help="log what happens to standard error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary, add in (
        ("demo", "train on digits while a server is killed and brought back", add_demo_options),
        ("serve", "serve experts, in a new swarm or in one that is running", add_serve_options),
        ("relay", "let nodes be reached that take no connections, such as those behind a router", add_relay_options),
        ("watch", "show the dashboard of a running swarm as a web page", add_watch_options),
        ("bench", "measure how fast labkit is", add_bench_options),
        ("keygen", "make a key file, and print its public key", add_keygen_options),
    ):
        add(commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."))
    with at_terminal():
        options = parser.parse_args(arguments)
        if arguments is None:  # this process is ours
            search_working_folder_last()
        logging.basicConfig(
            level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
        )
        try:
            status = COMMANDS[options.command](options)
        except KeyboardInterrupt:  # at any moment: also while it is being imported, or ends
            if arguments is None:
                ignore_interrupts()
            print("stopped", file=sys.stderr)
            status = 130
        if arguments is None:
            ignore_interrupts()
        return status


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `labkit demo`."""
    parser.add_argument(
        "--dataset", default="digits", metavar="NAME",
        help="data set: digits, mnist, or the name of one on the Hugging Face Hub (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder with the parquet files of the data set (default: find or fetch them)"
    )
    add_number(parser, "--servers", 4, "expert servers to start, each a process")
    add_number(parser, "--experts", 16, "experts in all, in a grid that is about square")
    add_number(parser, "--k-best", 4, "experts that each row is sent to")
    add_number(parser, "--trainers", 4, "batches in flight at the same time")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: 500 for digits, else 3000)")
    add_number(parser, "--kill", 1, "servers to kill, and to bring back later")
    add_number(parser, "--seed", 0, "seed of the random numbers")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.add_argument("--watch", action="store_true", help="show the dashboard as a web page, in a browser")
    parser.add_argument("--no-browser", action="store_true", help="with --watch: print the address, open no browser")


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `labkit serve`."""
    add_join_option(parser)
    parser.add_argument(
        "--experts", type=int, metavar="N",
        help="experts to serve (default: as many as the grid has free places; 8 in a new grid)",
    )  # fmt: skip
    parser.add_argument(
        "--grid", type=int, nargs="+", metavar="SIZE",
        help="sizes of the expert grid, such as 4 4 (default: the running grid's, or one for the experts)",
    )  # fmt: skip
    parser.add_argument(
        "--expert", default="ffn", metavar="KIND",
        help="kind of the experts: ffn, transformer, gated, nop or package.module:factory (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--experts-of", metavar="PATH",
        help="serve experts of a Transformers model instead: the folder where it was saved, of which only the "
        "experts of this server are read",
    )  # fmt: skip
    parser.add_argument(
        "--lora", type=lambda text: int(text) if text.lstrip("-").isdecimal() else text, metavar="RANK|PATH",
        help="with --experts-of: train adapters of this rank instead of the experts' weights, or those that were saved "
        "in this folder (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--hidden", type=int, metavar="N", help="width of the experts (default: the running grid's, or 64)"
    )
    parser.add_argument("--name", help="name of the grid (default: that of the kind)")
    add_network_options(parser)
    parser.add_argument(
        "--relay", action="store_true", help="relay for nodes that take no connections, such as those behind a router"
    )
    parser.add_argument(
        "--checkpoint-dir", metavar="DIR", help="folder to load experts from and to save them to (default: none)"
    )
    parser.add_argument(
        "--checkpoint-period", type=float, metavar="SECONDS",
        help="seconds between two saves (default: 10, or more where saving takes long)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint-keep", type=int, default=1, metavar="N",
        help="checkpoints of each expert to keep, the last one included (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--backups", type=int, default=1, metavar="N",
        help="other servers that keep a copy of each expert, to go on with it when this one is gone "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--spare", action="store_true",
        help="begin without experts: keep copies, take over, and be given experts of others",
    )  # fmt: skip
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the experts (default: %(default)s)")
    parser.add_argument(
        "--optimizer", default="adam", metavar="NAME",
        help="optimizer of the experts: adam, adamw or sgd (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--clip", type=float, metavar="NORM", help="bound on the norm of the gradients of a step (default: none)"
    )
    parser.add_argument(
        "--device", default="cpu", help="where the experts compute, such as cuda or cuda:1 (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="torch's threads for the experts (default: as many as there are cores)"
    )
    parser.add_argument(
        "--option", action="append", metavar="NAME=VALUE",
        help="option of the kind of experts, such as heads=4, causal=true or activation=gelu; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--label", metavar="TEXT", help="a name for this server, which all who look at the swarm see (default: none)"
    )
    parser.add_argument(
        "--quiet",
        "-q",
        action="store_true",
        help="do not say now and then how many experts, calls and peers it has",
    )


def add_join_option(parser: argparse.ArgumentParser) -> None:
    """Add `--join` of `labkit serve` and `labkit relay`."""
    parser.add_argument("--join", metavar="INVITE", help="invitation of a running swarm (default: start a new one)")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both that say where the node listens, and who may join a new swarm."""
    parser.add_argument(
        "--listen", metavar="tcp://HOST:PORT",
        help="where to listen, PORT being a number, * or a range such as 31000-31099 (default: a free port of "
        "loopback, or of all interfaces if the swarm to join is on another machine)",
    )  # fmt: skip
    parser.add_argument(
        "--announce", metavar="HOST[:PORT]", help="address at which others reach it (default: the one it listens at)"
    )
    parser.add_argument("--secure", action="store_true", help="encrypt on loopback too; elsewhere that is always on")
    parser.add_argument("--key", metavar="FILE", help="key file made by labkit keygen (default: a new key)")
    parser.add_argument(
        "--member", action="append", metavar="KEY",
        help="make the swarm private, and admit the holder of this public key; may be repeated",
    )  # fmt: skip


def add_relay_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `labkit relay`."""
    add_join_option(parser)
    add_network_options(parser)
    add_number(parser, "--clients", 64, "nodes to relay for, each at a port of its own")
    add_number(parser, "--connections", 1024, "connections to relay at the same time, in all")
    parser.add_argument(
        "--mb-per-s", type=float, metavar="MB", help="megabytes that may pass in a second, in all (default: no limit)"
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="do not say now and then how much it relays")


def add_watch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `labkit watch`."""
    parser.add_argument("invite", metavar="INVITE", help="invitation of the swarm; put it in quotes")
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="port of the page on 127.0.0.1 (default: any free port)"
    )
    parser.add_argument("--no-browser", action="store_true", help="print the address of the page, open no browser")
    parser.add_argument(
        "--key", metavar="FILE", help="key file made by labkit keygen; only a private swarm needs one (default: none)"
    )


def add_keygen_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `labkit keygen`."""
    parser.add_argument("file", metavar="FILE", help="where to write the key; an existing file is never overwritten")


def run_demo(options: argparse.Namespace) -> int:
    """Run `labkit demo`. Returns the exit status."""
    with quick_imports():
        from labkit.cli.demo import DemoConfig, demo
        from labkit.errors import LabkitError

    fields = {name: getattr(options, name) for name in DemoConfig.__dataclass_fields__}
    try:
        demo(DemoConfig(**fields), as_json=options.json, page=options.watch, browser=not options.no_browser)
    except (LabkitError, ValueError) as error:
        return _fail(error, options)
    return 0


def run_serve(options: argparse.Namespace) -> int:
    """Run `labkit serve`. Returns the exit status."""
    with quick_imports():
        from labkit.cli.serve import serve
        from labkit.errors import LabkitError

    try:
        serve(options)
    except (LabkitError, ValueError) as error:
        return _fail(error, options)
    return 0


def run_relay(options: argparse.Namespace) -> int:
    """Run `labkit relay`. Returns the exit status."""
    with quick_imports():
        from labkit.cli.relay import relay
        from labkit.errors import LabkitError

    try:
        relay(options)
    except (LabkitError, ValueError) as error:
        return _fail(error, options)
    return 0


def run_watch(options: argparse.Namespace) -> int:
    """Run `labkit watch`. Returns the exit status."""
    with quick_imports():
        from labkit.cli.watch import watch
        from labkit.errors import LabkitError

    try:
        watch(options.invite, open_browser=not options.no_browser, port=options.port, key=options.key)
    except (LabkitError, ValueError) as error:
        return _fail(error, options)
    except KeyboardInterrupt:
        pass  # the usual end
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Run `labkit bench`. Returns the exit status."""
    with quick_imports():
        from labkit.cli.bench import bench
        from labkit.errors import LabkitError

    try:
        bench(options)
    except (LabkitError, ValueError) as error:
        return _fail(error, options)
    return 0


def run_keygen(options: argparse.Namespace) -> int:
    """Run `labkit keygen`. Returns the exit status."""
    from labkit.errors import LabkitError
    from labkit.wire.security import Identity, key_text

    identity = Identity.generate()
    try:
        identity.save(options.file)
    except (LabkitError, ValueError) as error:
        return _fail(error, options)
    except OSError as error:
        return _fail(f"{options.file} cannot be written: {error.strerror}", options)
    print(key_text(identity.public_key))
    return 0


def _fail(error: Exception | str, options: argparse.Namespace) -> int:
    """Print why a command has failed, in the words of its options. Returns its exit status."""
    print(f"labkit: {in_options(str(error), vars(options))}", file=sys.stderr)
    return 1


COMMANDS = {
    "demo": run_demo, "serve": run_serve, "relay": run_relay, "watch": run_watch, "bench": run_bench,
    "keygen": run_keygen,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
