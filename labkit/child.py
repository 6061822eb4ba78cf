"""An expert server as a child process: how the parent holds it, and what it runs.

The parent talks to the child through its standard input, one JSON object a line: first its order (with its secret key,
which thus appears in no argument list), then commands. End of input means that the parent is gone, and the child stops
cleanly: a killed kernel leaves no orphan. The child answers on its standard output: ready, or why not.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import trio

from labkit.contact import Contact
from labkit.errors import LabkitError, ServerFailed
from labkit.faults import Faults
from labkit.node import NodeConfig
from labkit.portal import unwrap
from labkit.server.server import ServerConfig, serve_experts
from labkit.wire.endpoint import open_network
from labkit.wire.security import Admission, Identity

logger = logging.getLogger(__name__)

STOP_TIMEOUT = 30.0  # seconds that a clean stop may take: it saves every expert
COMMAND = [sys.executable, "-m", "labkit", "serve", "--child"]


@dataclass(frozen=True)
class ServerPlan:
    """All that it takes to start a server, and to start it again as the same node."""

    server: ServerConfig
    node: NodeConfig
    identity: Identity
    join: tuple[Contact, ...]
    member_file: Path | None = None  # public keys that may connect, in a private swarm


class _Order(msgspec.Struct):
    """The first line that a child reads."""

    seed: str  # of its identity, hex
    server: ServerConfig
    node: NodeConfig
    join: list[Contact]
    member_file: str | None
    latency: float
    loss: float


class _Command(msgspec.Struct):
    """A later line."""

    stop: bool = False
    latency: float | None = None
    loss: float | None = None


class _Report(msgspec.Struct):
    """What a child prints."""

    ready: Contact | None = None
    failed: str | None = None


# ---------------------------------------------------------------- the parent's side


@dataclass
class ProcessLife:
    """A server as a child process."""

    _process: trio.Process | None = None
    _last_words: deque[str] = field(default_factory=lambda: deque(maxlen=30))
    _commands: trio.MemorySendChannel[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        # A session of its own, so that Ctrl-C in a terminal and the kernel's stop button reach the parent only.
        own_group: dict[str, Any] = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        self._process = await trio.lowlevel.open_process(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **own_group
        )
        order = _Order(
            plan.identity.seed.hex(), plan.server, plan.node, list(plan.join),
            str(plan.member_file) if plan.member_file else None, faults.latency, faults.loss,
        )  # fmt: skip
        try:
            async with trio.open_nursery() as nursery:
                self._commands, to_send = trio.open_memory_channel[bytes](100)
                nursery.start_soon(self._feed, to_send)
                nursery.start_soon(self._listen)
                self._commands.send_nowait(msgspec.json.encode(order) + b"\n")
                task_status.started(await self._first_report())
                await self._process.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.kill()
            with trio.CancelScope(shield=True):
                await self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                with trio.move_on_after(0):
                    await trio.aclose_forcefully(stream)  # type: ignore[arg-type]

    async def _first_report(self) -> Contact:
        assert self._process is not None and self._process.stdout is not None
        data = b""
        while b"\n" not in data:
            part = await self._process.stdout.receive_some()
            if not part:
                await self._process.wait()
                raise ServerFailed(self._account())
            data += part
        report = msgspec.json.decode(data.partition(b"\n")[0], type=_Report)
        if report.ready is None:
            raise ServerFailed(report.failed or self._account())
        return report.ready

    def _account(self) -> str:
        words = "\n".join(self._last_words)
        code = self._process.returncode if self._process is not None else None
        return f"its process ended with code {code}" + (f" after saying\n{words}" if words else "")

    async def _feed(self, commands: trio.MemoryReceiveChannel[bytes]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            async for line in commands:
                await self._process.stdin.send_all(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the child is gone; `run` notices

    async def _listen(self) -> None:
        """What the child says on its standard error goes to our log."""
        assert self._process is not None and self._process.stderr is not None
        rest = b""
        async for part in self._process.stderr:  # ends when the child does
            *lines, rest = (rest + part).split(b"\n")
            rest = rest[-10_000:]
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                self._last_words.append(text)
                logger.info("server %d: %s", self._process.pid, text)

    async def wait(self) -> str:
        assert self._process is not None
        await self._process.wait()
        return self._account()

    async def stop(self, timeout: float) -> None:
        self._command(_Command(stop=True))
        with trio.move_on_after(timeout):
            await self.wait()

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def apply_faults(self, faults: Faults) -> None:
        self._command(_Command(latency=faults.latency, loss=faults.loss))

    def _command(self, command: _Command) -> None:
        if self._commands is not None:
            try:
                self._commands.send_nowait(msgspec.json.encode(command) + b"\n")
            except (trio.WouldBlock, trio.BrokenResourceError):
                pass  # it is gone, or stuck and about to be killed


# ---------------------------------------------------------------- the child's side


def run_child() -> int:
    """The main function of a server process: serve until told to stop, or until the parent is gone."""
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a module prints goes to standard error, not into our reports
    try:
        order = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Order)
        trio.run(_child_main, order, reports)
    except BaseException as error:
        failure = unwrap(error)
        if not isinstance(failure, LabkitError):
            logger.exception("the server failed")
        _report(reports, _Report(failed=f"{failure}"))
        return 1
    return 0


async def _child_main(order: _Order, reports: BinaryIO) -> None:
    faults, stop = Faults(order.latency, order.loss), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def obey() -> None:
        """Read commands until the parent is gone. A thread, since only that reads a pipe on every system."""
        for line in sys.stdin.buffer:
            command = msgspec.json.decode(line, type=_Command)
            faults.set(command.latency, command.loss)
            if command.stop:
                break
        try:
            token.run_sync_soon(stop.set)
        except trio.RunFinishedError:
            return
        # Nobody may be left to kill us if the stop hangs.
        last_resort = threading.Timer(STOP_TIMEOUT, os._exit, [1])
        last_resort.daemon = True
        last_resort.start()

    async def serve(task_status: trio.TaskStatus[Contact]) -> None:
        admission = Admission(file=Path(order.member_file) if order.member_file else None)
        identity = Identity(bytes.fromhex(order.seed))
        async with open_network() as network:
            await serve_experts(
                network, identity, order.server, order.node, join=order.join, admission=admission, faults=faults,
                stop=stop, task_status=task_status,
            )  # fmt: skip

    threading.Thread(target=obey, daemon=True, name="labkit-orders").start()
    async with trio.open_nursery() as nursery:
        contact = await nursery.start(serve)
        _report(reports, _Report(ready=contact))


def _report(reports: BinaryIO, report: _Report) -> None:
    reports.write(msgspec.json.encode(report) + b"\n")
    reports.flush()


