"""An expert server as a child process: what its parent tells it, and what it runs.

The parent (`server_process.ServerProcess`, or `cluster_worker` at a worker of a cluster) writes to the child's standard
input, one JSON object a line: first the configuration (with the secret key, which thus appears in no argument list, and
with the code of experts that no import finds), then commands. The end of the input means that the parent is gone, and
the child stops cleanly: a killed kernel leaves no orphan. On its standard output the child reports that it is ready, or
why not. Batches do not come this way; they reach `server.server` through the network.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn, get_args

import msgspec
import trio

from labkit.contact import Contact
from labkit.errors import LabkitError
from labkit.events import AddressChanged, AddressNews, Event, ExpertNews, ReachabilityChanged
from labkit.faults import Faults
from labkit.launch import by_value
from labkit.launch.parent import watch_parent
from labkit.launch.temporary_folder import remove_if_abandoned, use
from labkit.node import NodeConfig
from labkit.portal import unwrap
from labkit.server.config import ServerConfig
from labkit.server.layers import register_expert
from labkit.server.leaving import STOP_TIMEOUT
from labkit.server.loading import LoadOrder
from labkit.server.serving import serve_experts
from labkit.wire.security import Admission, Identity
from labkit.wire.zmq_transport import open_network

logger = logging.getLogger(__name__)

# Each is a clean stop. Ctrl-C in the parent's terminal does not reach us, which have a session of our own.
END_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
MAX_ORDERS = 100  # to load experts, that wait for others


class ChildConfig(msgspec.Struct):
    """The first line that a child reads: what to serve, and how."""

    seed: str  # of its identity, hex
    server: ServerConfig
    node: NodeConfig
    join: list[Contact]
    member_file: str | None
    latency: float  # seconds
    loss: float
    folder: str | None  # the parent's temporary folder, which is to last as long as this process
    direct: dict[str, tuple[str, int]] = {}  # where nodes of this machine are called: see `ZmqNetwork.direct`; keys hex
    kind_code: bytes | None = None  # of `by_value.write`: the kind of the experts, if no import finds it
    registered: bool = False  # whether it has its name from `register_expert`
    options_code: bytes | None = None  # and their options, if they are not plain


class ChildLoad(msgspec.Struct):
    """Experts to load, or to check only: see `LoadOrder`. The answer to it has its number."""

    number: int
    folder: str
    uids: list[str]
    check_only: bool


class ChildCommand(msgspec.Struct):
    """Any later line that a child reads: a change of the faults that it injects, experts to load, or a stop.

    `hurry`: the stop that comes next has to be over within a second. `alone`: no other server of the grid goes on.
    """

    stop: bool = False
    hurry: bool = False
    alone: bool = False
    load: ChildLoad | None = None
    latency: float | None = None  # seconds
    loss: float | None = None


class ChildNews(msgspec.Struct):
    """What is new about a server's address: an `AddressChanged`, or with a `state` a `ReachabilityChanged`."""

    contact: Contact
    text: str
    before: str = ""
    state: str = ""

    @classmethod
    def of(cls, event: AddressNews) -> ChildNews:
        """Returns the event as it is reported."""
        if isinstance(event, AddressChanged):
            return cls(event.contact, event.reason, before=event.before)
        return cls(event.contact, event.text, state=event.state)

    @property
    def event(self) -> AddressNews:
        """The event in the parent."""
        if self.state:
            return ReachabilityChanged(contact=self.contact, state=self.state, text=self.text)
        return AddressChanged(contact=self.contact, before=self.before, reason=self.text)


class ChildExpertNews(msgspec.Struct):
    """An event of an expert that moves, or is not copied: its name, and its fields."""

    name: str
    fields: dict[str, str | int | float]

    @classmethod
    def of(cls, event: ExpertNews) -> ChildExpertNews:
        """Returns the event as it is reported."""
        return cls(type(event).__name__, {f.name: getattr(event, f.name) for f in fields(event) if f.name != "at"})

    @property
    def event(self) -> ExpertNews:
        """The event in the parent."""
        kinds = {kind.__name__: kind for kind in get_args(ExpertNews)}
        event: ExpertNews = kinds[self.name](**self.fields)
        return event


class ChildReport(msgspec.Struct):
    """A line that a child prints: first where it serves, or why it does not.

    Then answers to orders to load, and what is new about its address.
    """

    ready: Contact | None = None
    stop_timeout: float = STOP_TIMEOUT  # seconds that a clean stop may take, by the size of its experts
    failed: str | None = None
    error: str = ""  # the type of what `failed` tells
    loaded: int | None = None  # the number of an order; `failed` says what went wrong, if something did
    news: ChildNews | None = None
    experts: ChildExpertNews | None = None
    held: list[str] | None = None  # the experts that it holds from now on
    direct: tuple[str, int] | None = None  # where this machine calls it, if others do so through a relay


def main() -> NoReturn:
    """The main function of a server process: serve until told to stop, or until the parent is gone."""
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a module prints goes to standard error, not into our reports
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Which is what the parent reads, and line by line, so that `ServerHandle.logs` has what experts print.
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    status, folder = 1, None
    try:
        line = sys.stdin.buffer.readline()
        if line:  # else the parent has gone already
            config = _with_code(msgspec.json.decode(line, type=ChildConfig))
            folder = config.folder
            hold = use(folder) if folder is not None else None
            gc.freeze()  # what was imported stays: to look through torch for garbage holds all calls up for 60 ms
            trio.run(_serve, config, reports)
            if hold is not None:
                hold.close()
            status = 0
    except BaseException as error:
        failure = unwrap(error)
        if not isinstance(failure, (LabkitError, ValueError)):
            logger.exception("the server failed")
        _report(reports, ChildReport(failed=str(failure) or type(failure).__name__, error=type(failure).__name__))
    finally:
        with suppress(OSError):  # nobody may be left to read it
            sys.stderr.flush()
        if folder is not None:
            remove_if_abandoned(folder)  # by a parent that was killed, and by all of its other servers
        os._exit(status)  # waits for no thread: one may be reading commands, or computing


def _with_code(config: ChildConfig) -> ChildConfig:
    """The configuration with the kind and the options that were handed over as code, if any were."""
    if config.kind_code is not None:
        kind = by_value.read(config.kind_code)
        if config.registered:
            register_expert(config.server.kind, kind)
        else:
            config.server = replace(config.server, kind=kind)
    if config.options_code is not None:
        config.server = replace(config.server, options=by_value.read(config.options_code))
    return config


async def _serve(config: ChildConfig, reports: BinaryIO) -> None:
    """Serve until a command, a signal or the parent's end asks for a stop, and experts are saved."""
    faults, stop, hurry, alone = Faults(config.latency, config.loss), trio.Event(), trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()
    stop_timeout, ready = STOP_TIMEOUT, False
    news: list[ChildReport] = []  # that comes before it is ready
    directly = {bytes.fromhex(key): at for key, at in config.direct.items()}
    to_carry_out, orders = trio.open_memory_channel[LoadOrder](MAX_ORDERS)

    def set_stop_timeout(seconds: float) -> None:
        nonlocal stop_timeout
        stop_timeout = seconds

    def execute(line: bytes) -> bool:
        """Execute a command. Returns whether it was a stop."""
        command = msgspec.json.decode(line, type=ChildCommand)
        if command.load is not None:
            soon(partial(begin_load, command.load))
        faults.set(command.latency, command.loss)
        if command.hurry:
            soon(hurry.set)
        if command.alone:
            soon(alone.set)
        return command.stop

    def begin_load(load: ChildLoad) -> None:
        def answer(failure: str) -> None:
            _report(reports, ChildReport(loaded=load.number, failed=failure))

        to_carry_out.send_nowait(LoadOrder(load.folder, load.uids, load.check_only, answer))

    def soon(action: Callable[[], None]) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(action)

    def report_news(event: Event) -> None:
        if isinstance(event, AddressNews):
            direct = directly.get(event.contact.key)
            news.append(ChildReport(news=ChildNews.of(event), direct=direct))
        elif isinstance(event, ExpertNews):
            news.append(ChildReport(experts=ChildExpertNews.of(event)))
        if ready:
            report_all(news)

    def report_held(uids: Collection[str]) -> None:
        news.append(ChildReport(held=sorted(uids)))
        if ready:
            report_all(news)

    def report_all(some: list[ChildReport]) -> None:
        while some:
            _report(reports, some.pop(0))

    async def serve(*, task_status: trio.TaskStatus[Contact]) -> None:
        admission = Admission(file=Path(config.member_file) if config.member_file else None)
        identity = Identity(bytes.fromhex(config.seed))
        async with open_network(config.node.limits.frames) as network:
            network.direct = directly
            await serve_experts(
                network, identity, config.server, config.node, join=config.join, admission=admission, faults=faults,
                emit=report_news, stop=stop, hurry=hurry, alone=alone, allow=set_stop_timeout, orders=orders,
                on_held=report_held, task_status=task_status,
            )  # fmt: skip

    async def watch_signals(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*END_SIGNALS) as signals:
            task_status.started()
            async for _ in signals:
                stop.set()

    watch_parent(on_end=partial(soon, stop.set), on_line=execute, exit_after=lambda: stop_timeout)
    async with trio.open_nursery() as background:
        await background.start(watch_signals)
        async with trio.open_nursery() as nursery:
            contact: Contact = await nursery.start(serve)
            ready, direct = True, directly.get(contact.key)
            report_all([ChildReport(ready=contact, stop_timeout=stop_timeout, direct=direct), *news])
        background.cancel_scope.cancel()


def _report(reports: BinaryIO, report: ChildReport) -> None:
    with suppress(OSError):  # a parent that is gone, which the watch over it notices
        reports.write(msgspec.json.encode(report) + b"\n")
        reports.flush()
