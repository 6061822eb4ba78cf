"""The `labkit` command: demo, serve, watch, bench, keygen."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

from labkit import quick_imports
from labkit.cli.bench import add_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="labkit", description="Decentralized mixture-of-experts training.")
    parser.add_argument("--verbose", "-v", action="store_true", help="log what happens to standard error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_demo(commands.add_parser("demo", help="train on digits while a server is killed and brought back"))
    add_serve(commands.add_parser("serve", help="serve experts, in a new swarm or in one that is running"))
    add_watch(commands.add_parser("watch", help="show the dashboard of a running swarm as a web page"))
    add_options(commands.add_parser("bench", help="measure how fast it is"))
    keygen = commands.add_parser("keygen", help="make a key file, and print its public key")
    keygen.add_argument("file", help="where to write it; an existing file is never overwritten")
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    return COMMANDS[options.command](options)


def add_demo(parser: argparse.ArgumentParser) -> None:
    """The options of `labkit demo`."""
    parser.add_argument("--dataset", default="digits", metavar="digits|mnist|HUB_NAME", help="(default: digits)")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data set's parquet files are")
    parser.add_argument("--servers", type=int, default=4, help="expert servers, each a process (default: 4)")
    parser.add_argument("--experts", type=int, default=16, help="experts, in a grid near to square (default: 16)")
    parser.add_argument("--k-best", type=int, default=4, help="experts that each row is sent to (default: 4)")
    parser.add_argument("--trainers", type=int, default=4, help="batches in flight (default: 4)")
    parser.add_argument("--steps", type=int, help="training steps (default: 500 for digits, else 3000)")
    parser.add_argument("--kill", type=int, default=1, metavar="N", help="servers to kill and bring back (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.add_argument("--watch", action="store_true", help="open the dashboard as a web page")
    parser.add_argument("--no-browser", action="store_true", help="with --watch: print its address, and open nothing")


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The options of `labkit serve`."""
    parser.add_argument("--join", metavar="INVITE", help="the invitation of a running swarm (default: start a new one)")
    parser.add_argument("--experts", type=int, help="how many experts (default: the free places; in a new swarm 8)")
    parser.add_argument("--grid", type=int, nargs="+", metavar="SIZE", help="sizes of the expert grid")
    parser.add_argument(
        "--expert", default="ffn", metavar="KIND", help="ffn, transformer, nop or package.module:factory"
    )
    parser.add_argument("--hidden", type=int, help="width of the experts (default: the running grid's, or 64)")
    parser.add_argument("--name", help="name of the grid (default: the kind's)")
    parser.add_argument("--listen", metavar="tcp://HOST:PORT", help="(default: loopback, or as wide as what is joined)")
    parser.add_argument("--announce", metavar="HOST[:PORT]", help="the address that others should use")
    parser.add_argument("--secure", action="store_true", help="encrypt on loopback too; beyond it that is always on")
    parser.add_argument("--key", metavar="FILE", help="a key file made by labkit keygen (default: a new key)")
    parser.add_argument("--member", action="append", metavar="KEY", help="make it private: admit this public key")
    parser.add_argument("--checkpoint-dir", metavar="DIR", help="load experts from there, and save them")
    parser.add_argument("--checkpoint-period", type=float, metavar="S", help="seconds (default: 10, or more)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the experts (default: 0.001)")
    parser.add_argument("--device", default="cpu", help="where they compute (default: cpu)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)


def add_watch(parser: argparse.ArgumentParser) -> None:
    """The options of `labkit watch`."""
    parser.add_argument("invite", metavar="INVITE", help="the invitation of the swarm; quote it, for the shell")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of the page, on 127.0.0.1 (default: any)")
    parser.add_argument("--no-browser", action="store_true", help="print the page's address, and open nothing")
    parser.add_argument("--key", metavar="FILE", help="for a private swarm: a key file made by labkit keygen")


def run_demo(options: argparse.Namespace) -> int:
    """`labkit demo`."""
    with quick_imports():
        from labkit.cli.demo import DemoConfig, demo
        from labkit.errors import LabkitError

    fields = {name: getattr(options, name) for name in DemoConfig.__dataclass_fields__}
    try:
        demo(DemoConfig(**fields), as_json=options.json, page=options.watch, browser=not options.no_browser)
    except (LabkitError, ValueError) as error:
        return _complain(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def run_serve(options: argparse.Namespace) -> int:
    """`labkit serve`."""
    if options.child:
        with quick_imports():
            from labkit.launch.child import run_child

        run_child()
    with quick_imports():
        from labkit.cli.serve import serve
        from labkit.errors import LabkitError

    try:
        serve(options)
    except (LabkitError, ValueError) as error:
        return _complain(error)
    except KeyboardInterrupt:  # before it served, or while it was saving
        print("stopped", file=sys.stderr)
        return 130
    return 0


def run_watch(options: argparse.Namespace) -> int:
    """`labkit watch`."""
    with quick_imports():
        from labkit.cli.watch import watch
        from labkit.errors import LabkitError

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        watch(options.invite, open_browser=not options.no_browser, port=options.port, key=options.key)
    except (LabkitError, ValueError) as error:
        return _complain(error)
    except KeyboardInterrupt:
        pass  # the usual end
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """`labkit bench`."""
    with quick_imports():
        from labkit.cli.bench import bench
        from labkit.errors import LabkitError

    try:
        bench(options)
    except (LabkitError, ValueError) as error:
        return _complain(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def run_keygen(options: argparse.Namespace) -> int:
    """`labkit keygen`."""
    from labkit.errors import LabkitError
    from labkit.wire.security import Identity, key_text

    identity = Identity.generate()
    try:
        identity.save(options.file)
    except LabkitError as error:
        return _complain(error)
    except OSError as error:
        return _complain(f"{options.file} cannot be written: {error.strerror}")
    print(key_text(identity.public_key))
    return 0


def _complain(error: Exception | str) -> int:
    print(f"labkit: {error}", file=sys.stderr)
    return 1


COMMANDS = {"demo": run_demo, "serve": run_serve, "watch": run_watch, "bench": run_bench, "keygen": run_keygen}

if __name__ == "__main__":
    sys.exit(main())
