"""An expert server as a child process: what its parent tells it, and what it runs.

The parent (`lives`) talks to the child through its standard input, one JSON object a line: first its order (with its
secret key, which thus appears in no argument list), then commands. End of input means that the parent is gone, and the
child stops cleanly: a killed kernel leaves no orphan. The child answers on its standard output: ready, or why not.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import BinaryIO, NoReturn

import msgspec
import trio

from labkit.contact import Contact
from labkit.errors import LabkitError
from labkit.faults import Faults
from labkit.node import NodeConfig
from labkit.portal import unwrap
from labkit.server.server import STOP_TIMEOUT, ServerConfig, serve_experts
from labkit.wire.security import Admission, Identity
from labkit.wire.zmq_transport import open_network

logger = logging.getLogger(__name__)


class ChildConfig(msgspec.Struct):
    """The first line that a child reads."""

    seed: str  # of its identity, hex
    server: ServerConfig
    node: NodeConfig
    join: list[Contact]
    member_file: str | None
    latency: float
    loss: float
    path: list[str]  # where modules are imported from: what the parent can import, so can the child


class ChildCommand(msgspec.Struct):
    """A later line."""

    stop: bool = False
    latency: float | None = None
    loss: float | None = None


class ChildReport(msgspec.Struct):
    """What a child prints. `stop_timeout`: seconds that a clean stop may take, by the size of its experts."""

    ready: Contact | None = None
    stop_timeout: float = STOP_TIMEOUT
    failed: str | None = None


def run_child() -> NoReturn:
    """The main function of a server process: serve until told to stop, or until the parent is gone."""
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a module prints goes to standard error, not into our reports
    status = 1
    try:
        line = sys.stdin.buffer.readline()
        if line:  # else the parent has gone already
            order = msgspec.json.decode(line, type=ChildConfig)
            sys.path[:] = order.path
            gc.freeze()  # what was imported stays: to look through torch for garbage holds all calls up for 60 ms
            trio.run(_child_main, order, reports)
            status = 0
    except BaseException as error:
        failure = unwrap(error)
        if not isinstance(failure, (LabkitError, ValueError)):
            logger.exception("the server failed")
        _report(reports, ChildReport(failed=str(failure) or type(failure).__name__))
    finally:
        sys.stderr.flush()
        os._exit(status)  # waits for no thread: one may be reading orders, or computing


async def _child_main(order: ChildConfig, reports: BinaryIO) -> None:
    faults, stop = Faults(order.latency, order.loss), trio.Event()
    token = trio.lowlevel.current_trio_token()
    stop_timeout = STOP_TIMEOUT

    def allow(seconds: float) -> None:
        nonlocal stop_timeout
        stop_timeout = seconds

    def obey() -> None:
        """Read commands until the parent is gone. A thread, since only that reads a pipe on every system."""
        for line in sys.stdin.buffer:
            command = msgspec.json.decode(line, type=ChildCommand)
            faults.set(command.latency, command.loss)
            if command.stop:
                break
        try:
            token.run_sync_soon(stop.set)
        except trio.RunFinishedError:
            return
        # Nobody may be left to kill us if the stop hangs.
        last_resort = threading.Timer(stop_timeout, os._exit, [1])
        last_resort.daemon = True
        last_resort.start()

    async def serve(*, task_status: trio.TaskStatus[Contact]) -> None:
        admission = Admission(file=Path(order.member_file) if order.member_file else None)
        identity = Identity(bytes.fromhex(order.seed))
        async with open_network(order.node.limits.frames) as network:
            await serve_experts(
                network, identity, order.server, order.node, join=order.join, admission=admission, faults=faults,
                stop=stop, allow=allow, task_status=task_status,
            )  # fmt: skip

    async def heed_signals(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                stop.set()

    threading.Thread(target=obey, daemon=True, name="labkit-orders").start()
    async with trio.open_nursery() as background:
        await background.start(heed_signals)
        async with trio.open_nursery() as nursery:
            contact: Contact = await nursery.start(serve)
            _report(reports, ChildReport(ready=contact, stop_timeout=stop_timeout))
        background.cancel_scope.cancel()


def _report(reports: BinaryIO, report: ChildReport) -> None:
    reports.write(msgspec.json.encode(report) + b"\n")
    reports.flush()
