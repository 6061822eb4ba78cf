"""A server as a child process: what a runner tells such a child and hears from it, and how the child is started here.

`ChildRunner` has what is the same wherever the child runs: the lines that go to it and come from it (see `child`).
`ServerProcess` starts it on this machine and moves the lines through pipes; on a cluster `cluster_runner` does. No
batch passes here.
"""

from __future__ import annotations

import logging
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import trio

from labkit.contact import Contact
from labkit.errors import ServerFailed
from labkit.events import AddressNews, ExpertNews, ignore
from labkit.faults import Faults
from labkit.forks import keep_private, release
from labkit.launch import by_value
from labkit.launch.by_value import HandedKind
from labkit.launch.child import ChildCommand, ChildConfig, ChildLoad, ChildReport
from labkit.launch.child_python import OWN_GROUP, child_folder, python_command, server_environment
from labkit.launch.runners import ServerPlan
from labkit.server.leaving import STOP_TIMEOUT
from labkit.wire.zmq_transport import ZmqNetwork

logger = logging.getLogger(__name__)

STDERR_TIMEOUT = 0.5  # seconds to read the rest of what a dead child wrote to its standard error
LAST_LINES = 30  # of the standard error of a child that failed, in the error that says so
MAX_LINE = 10_000  # bytes of a line of standard error that is not complete
COMMAND_QUEUE = 100  # commands that a child has not read yet


class ChildRunner:
    """A runner whose server is a child process, wherever that runs. A subclass moves the lines.

    Args:
        log: Where the lines go that the server writes.
    """

    def __init__(self, log: deque[str]) -> None:
        self.stop_timeout = STOP_TIMEOUT  # until the child, when it is ready, says how long its own stop may take
        self.on_news: Callable[[AddressNews | ExpertNews], object] = ignore
        self.on_held: Callable[[tuple[str, ...]], object] = lambda uids: None
        self._log = log
        self._ended = trio.Event()
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._commands: trio.MemorySendChannel[bytes] | None = None
        self._first: ChildReport | None = None  # where it serves, or why it does not
        self._reported = trio.Event()  # the first report is there, or will not come
        self._loads = 0  # orders to load, so far
        self._loaded: dict[int, str] = {}  # the answers to them that nobody has taken
        self._news = trio.lowlevel.ParkingLot()  # where they are waited for

    def stop(self) -> None:
        """See `Runner`, as for the next three."""
        self._send(ChildCommand(stop=True))

    def hurry(self, alone: bool = False) -> None:
        self._send(ChildCommand(hurry=True, alone=alone))

    def apply_faults(self, faults: Faults) -> None:
        self._send(ChildCommand(latency=faults.latency, loss=faults.loss))

    async def load(self, folder: str, uids: Sequence[str], check_only: bool) -> str:
        self._loads += 1
        number = self._loads
        self._send(ChildCommand(load=ChildLoad(number, folder, list(uids), check_only)))
        while number not in self._loaded:
            if self._ended.is_set():
                return "its process has ended meanwhile"
            await self._news.park()
        return self._loaded.pop(number)

    def _send(self, line: ChildConfig | ChildCommand) -> None:
        if self._commands is not None:
            try:
                self._commands.send_nowait(msgspec.json.encode(line) + b"\n")
            except (trio.WouldBlock, trio.BrokenResourceError):
                pass  # the child is gone, or hangs and will be killed

    def _take_report(self, line: bytes) -> None:
        """Take a line that the child reports."""
        report = msgspec.json.decode(line, type=ChildReport)
        if self._first is None:
            self._first = report
            self._note_contact(report.ready, report.direct)
            self._reported.set()
        if report.news is not None:
            self._note_contact(report.news.contact, report.direct)
            self.on_news(report.news.event)
        if report.experts is not None:
            self.on_news(report.experts.event)
        if report.held is not None:
            self.on_held(tuple(report.held))
        if report.loaded is not None:
            self._loaded[report.loaded] = report.failed or ""
            self._news.unpark_all()

    def _note_contact(self, contact: Contact | None, direct: tuple[str, int] | None) -> None:
        """Note where others reach the child, and where its own machine does, if that differs."""

    def _take_output(self, text: str) -> None:
        """Take a line that the child has written to its standard error."""
        self._last_lines.append(text)
        self._log.append(text)

    def _end(self) -> None:
        self._reported.set()
        self._ended.set()
        self._news.unpark_all()

    def _said(self) -> str:
        """The last lines that it wrote, as the end of a sentence."""
        return " after saying\n" + "\n".join(self._last_lines) if self._last_lines else ""


class ServerProcess(ChildRunner):
    """A server as a child process on this machine.

    Args:
        log: Where the lines go that the server writes.
        network: The network of the lab thread, which calls the child directly, where others do so through a relay.
    """

    host = worker = ""

    def __init__(self, log: deque[str], network: ZmqNetwork) -> None:
        super().__init__(log)
        self._direct = network.direct
        self._process: trio.Process | None = None
        self._scope = trio.CancelScope()
        self._stderr_read = trio.Event()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        """Start the process and wait for its end. Raises `ServerFailed` if it does not come to serve."""
        try:
            with self._scope:
                await self._run(plan, faults, task_status)
        finally:
            self._end()

    async def _run(self, plan: ServerPlan, faults: Faults, task_status: trio.TaskStatus[Contact]) -> None:
        process = self._process = await trio.lowlevel.open_process(
            python_command("labkit.launch.child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=server_environment(),
            cwd=child_folder(),
            **OWN_GROUP,
        )
        assert process.stdin is not None
        # A process that we forked would hold the child's input open, and so keep the child beyond our own end.
        private = process.stdin.fileno() if isinstance(process.stdin, trio.lowlevel.FdStream) else -1
        keep_private(private)
        try:
            async with trio.open_nursery() as nursery:
                self._commands, to_send = trio.open_memory_channel[bytes](COMMAND_QUEUE)
                nursery.start_soon(self._write_commands, to_send)
                nursery.start_soon(self._read_stderr)
                self._send(child_config(plan, faults, self._direct))
                nursery.start_soon(self._read_reports, process)
                await self._reported.wait()
                if self._first is None:
                    await self._wait_for_end(process)
                    raise ServerFailed(self._describe_end())
                if self._first.ready is None:
                    raise ServerFailed(self._first.failed or self._describe_end())
                self.stop_timeout = self._first.stop_timeout
                task_status.started(self._first.ready)
                await self._wait_for_end(process)
                nursery.cancel_scope.cancel()
        finally:
            self._direct.pop(plan.identity.public_key, None)
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                release(private)
                for stream in (process.stdin, process.stdout, process.stderr):
                    assert stream is not None
                    await trio.aclose_forcefully(stream)

    def _note_contact(self, contact: Contact | None, direct: tuple[str, int] | None) -> None:
        if contact is not None and direct is not None:
            self._direct[contact.key] = direct
        elif contact is not None:
            self._direct.pop(contact.key, None)

    async def _read_reports(self, process: trio.Process) -> None:
        assert process.stdout is not None
        rest = b""
        async for part in process.stdout:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                self._take_report(line)
        self._reported.set()

    async def _wait_for_end(self, process: trio.Process) -> None:
        await process.wait()
        with trio.move_on_after(STDERR_TIMEOUT):  # a child of its own may hold its standard error open
            await self._stderr_read.wait()

    def _describe_end(self) -> str:
        code = self._process.returncode if self._process is not None else None
        return f"its process ended with code {code}{self._said()}"

    async def _write_commands(self, commands: trio.MemoryReceiveChannel[bytes]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            async for line in commands:
                await self._process.stdin.send_all(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the child is gone, which `run` notices

    async def _read_stderr(self) -> None:
        """Copy the child's standard error to our log."""
        assert self._process is not None and self._process.stderr is not None
        rest = b""
        async for part in self._process.stderr:  # ends when the child does
            *lines, rest = (rest + part).split(b"\n")
            rest = rest[-MAX_LINE:]
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                self._take_output(text)
                logger.info("server %d: %s", self._process.pid, text)
        self._stderr_read.set()

    async def wait(self) -> str:
        await self._ended.wait()
        clean = self._process is not None and self._process.returncode == 0
        return "" if clean else self._describe_end()

    def kill(self) -> None:
        self._scope.cancel()  # which `_run` answers with SIGKILL


def child_config(plan: ServerPlan, faults: Faults, direct: Mapping[bytes, tuple[str, int]]) -> ChildConfig:
    """The first line for a child that is to serve this.

    Args:
        plan: What it serves.
        faults: What it injects.
        direct: Where nodes of its own machine are called; see `ZmqNetwork.direct`.
    """
    server, handed, options = plan.server, plan.server.kind, None
    if isinstance(handed, HandedKind):
        server = replace(server, kind=handed.name)
    if not is_plain(server.options):
        options = by_value.write(server.options)
        server = replace(server, options={})
    return ChildConfig(
        plan.identity.seed.hex(), server, plan.node, list(plan.join),
        None if plan.member_file is None else str(plan.member_file), faults.latency, faults.loss, plan.folder,
        {key.hex(): at for key, at in direct.items()}, handed.code if isinstance(handed, HandedKind) else None,
        isinstance(handed, HandedKind) and handed.registered, options,
    )  # fmt: skip


def is_plain(options: Mapping[str, Any]) -> bool:
    """Whether options reach a child as JSON just as they are: numbers, texts, and lists and dictionaries of them."""
    try:
        return bool(msgspec.json.decode(msgspec.json.encode(options)) == dict(options))
    except (TypeError, ValueError):
        return False
