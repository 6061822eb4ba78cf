"""The runners of a local server: each serves once, from its start to its end, as a process or as a task.

`ServerProcess` starts a child process, whose side is in `child`; `ServerTask` serves in the lab thread. A
`ServerLifecycle` has one runner after another, and treats both kinds alike. A runner starts the server that batches
reach through the network; no batch passes here.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from labkit.contact import Contact
from labkit.errors import ServerFailed
from labkit.events import AddressNews, Emit, Event, ignore
from labkit.faults import Faults
from labkit.forks import keep_private, release
from labkit.launch.child import MAX_ORDERS, ChildCommand, ChildConfig, ChildLoad, ChildReport
from labkit.launch.child_python import child_environment, child_folder, python_command
from labkit.node import NodeConfig
from labkit.portal import unwrap
from labkit.server.config import ServerConfig
from labkit.server.leaving import STOP_TIMEOUT
from labkit.server.loading import LoadOrder
from labkit.server.server import serve_experts
from labkit.wire.security import Admission, Identity
from labkit.wire.zmq_transport import ZmqNetwork

logger = logging.getLogger(__name__)

STDERR_TIMEOUT = 0.5  # seconds to read the rest of what a dead child wrote to its standard error
LAST_LINES = 30  # of the standard error of a child that failed, in the error that says so
MAX_LINE = 10_000  # bytes of a line of standard error that is not complete
COMMAND_QUEUE = 100  # commands that a child has not read yet
# A session of its own, so that Ctrl-C in a terminal and the kernel's stop button reach the parent only.
OWN_GROUP: dict[str, Any]
if sys.platform == "win32":
    OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
else:
    OWN_GROUP = {"start_new_session": True}


@dataclass(frozen=True)
class ServerPlan:
    """All that it takes to start a server, and to start it again as the same node.

    Attributes:
        server: What it serves.
        node: How its node listens, and its limits.
        identity: Its key pair.
        join: Contacts of the swarm that it joins.
        member_file: The public keys that may connect, in a private swarm.
        lasting: Whether its checkpoints outlive the swarm, and so are worth saving when the swarm ends.
        folder: The swarm's temporary folder, which has to last as long as the server does.
    """

    server: ServerConfig
    node: NodeConfig
    identity: Identity
    join: tuple[Contact, ...]
    member_file: Path | None = None
    lasting: bool = True
    folder: str | None = None


class Runner(Protocol):
    """What serves once, from its start to its end. `stop_timeout`: seconds that a clean stop may take."""

    stop_timeout: float
    on_news: Callable[[AddressNews], object]  # called when there is news of its address

    @property
    def pid(self) -> int | None:
        """The process that it runs in."""

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        """Serve until the end, whatever the reason for it. Raises if it does not come to serve."""

    async def wait(self) -> str:
        """Wait until `run` has ended. Returns what went wrong, or an empty string after a clean stop."""

    def stop(self) -> None:
        """Ask it to leave the swarm without losing a call, to save its experts and to end."""

    def hurry(self) -> None:
        """Tell it, before it is stopped, that there will be little time."""

    def kill(self) -> None:
        """End it at once, also while it starts. Nothing is saved."""

    def apply_faults(self, faults: Faults) -> None:
        """Tell it which faults to inject from now on."""

    async def load(self, folder: str, uids: Sequence[str], check_only: bool) -> str:
        """Let it load experts, while it serves: see `LoadOrder`. Returns what went wrong, or an empty string."""


class ServerProcess:
    """A server as a child process."""

    def __init__(self, network: ZmqNetwork) -> None:
        self._direct = network.direct
        self.stop_timeout = STOP_TIMEOUT  # until the child, when it is ready, says how long its own stop may take
        self.on_news: Callable[[AddressNews], object] = ignore
        self._process: trio.Process | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._stderr_read = trio.Event()
        self._commands: trio.MemorySendChannel[bytes] | None = None
        self._unread = b""  # of what the child reports
        self._loads = 0  # orders to load, so far
        self._loaded: dict[int, str] = {}  # the answers to them that nobody has taken
        self._news = trio.lowlevel.ParkingLot()  # where they are waited for

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        """Start the process and wait for its end. Raises `ServerFailed` if it does not come to serve."""
        try:
            with self._scope:
                await self._run(plan, faults, task_status)
        finally:
            self._ended.set()
            self._news.unpark_all()

    async def _run(self, plan: ServerPlan, faults: Faults, task_status: trio.TaskStatus[Contact]) -> None:
        process = self._process = await trio.lowlevel.open_process(
            python_command("labkit.launch.child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
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
                self._send(_config(plan, faults, self._direct))
                task_status.started(await self._read_report(process))
                nursery.start_soon(self._read_answers, process)
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

    async def _read_report(self, process: trio.Process) -> Contact:
        assert process.stdout is not None
        data = b""
        while b"\n" not in data:
            part = await process.stdout.receive_some()
            if not part:
                await self._wait_for_end(process)
                raise ServerFailed(self._describe_end())
            data += part
        line, _, self._unread = data.partition(b"\n")
        report = msgspec.json.decode(line, type=ChildReport)
        if report.ready is None:
            raise ServerFailed(report.failed or self._describe_end())
        self.stop_timeout = report.stop_timeout
        self._note_direct(report.ready, report.direct)
        return report.ready

    def _note_direct(self, contact: Contact, direct: tuple[str, int] | None) -> None:
        """Call the child where this machine reaches it, if others reach it through a relay."""
        if direct is not None:
            self._direct[contact.key] = direct
        else:
            self._direct.pop(contact.key, None)

    async def _read_answers(self, process: trio.Process) -> None:
        """Read what the child reports once it serves."""
        assert process.stdout is not None
        while True:
            *lines, self._unread = self._unread.split(b"\n")
            for line in lines:
                report = msgspec.json.decode(line, type=ChildReport)
                if report.news is not None:
                    self._note_direct(report.news.contact, report.direct)
                    self.on_news(report.news.event)
                if report.loaded is not None:
                    self._loaded[report.loaded] = report.failed or ""
                    self._news.unpark_all()
            if not (part := await process.stdout.receive_some()):
                return
            self._unread += part

    async def load(self, folder: str, uids: Sequence[str], check_only: bool) -> str:
        self._loads += 1
        number = self._loads
        self._send(ChildCommand(load=ChildLoad(number, folder, list(uids), check_only)))
        while number not in self._loaded:
            if self._ended.is_set():
                return "its process has ended meanwhile"
            await self._news.park()
        return self._loaded.pop(number)

    async def _wait_for_end(self, process: trio.Process) -> None:
        await process.wait()
        with trio.move_on_after(STDERR_TIMEOUT):  # a child of its own may hold its standard error open
            await self._stderr_read.wait()

    def _describe_end(self) -> str:
        lines = "\n".join(self._last_lines)
        code = self._process.returncode if self._process is not None else None
        return f"its process ended with code {code}" + (f" after saying\n{lines}" if lines else "")

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
                self._last_lines.append(text)
                logger.info("server %d: %s", self._process.pid, text)
        self._stderr_read.set()

    async def wait(self) -> str:
        await self._ended.wait()
        clean = self._process is not None and self._process.returncode == 0
        return "" if clean else self._describe_end()

    def stop(self) -> None:
        self._send(ChildCommand(stop=True))

    def hurry(self) -> None:
        self._send(ChildCommand(hurry=True))

    def kill(self) -> None:
        self._scope.cancel()  # which `_run` answers with SIGKILL

    def apply_faults(self, faults: Faults) -> None:
        self._send(ChildCommand(latency=faults.latency, loss=faults.loss))

    def _send(self, line: ChildConfig | ChildCommand) -> None:
        if self._commands is not None:
            try:
                self._commands.send_nowait(msgspec.json.encode(line) + b"\n")
            except (trio.WouldBlock, trio.BrokenResourceError):
                pass  # the child is gone, or hangs and will be killed


def environment() -> dict[str, str]:
    """The environment of a server process: torch's threads sleep when idle, unless the user says otherwise.

    By default they spin for milliseconds after each operation, on cores that callers need. Asleep, they let two
    clients of one server make half as many calls of 2 MB again, on two cores, and the longest took a third of the time.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **child_environment()}


def _config(plan: ServerPlan, faults: Faults, direct: Mapping[bytes, tuple[str, int]]) -> ChildConfig:
    member_file = None if plan.member_file is None else str(plan.member_file)
    return ChildConfig(
        plan.identity.seed.hex(), plan.server, plan.node, list(plan.join), member_file, faults.latency, faults.loss,
        plan.folder, {key.hex(): at for key, at in direct.items()},
    )  # fmt: skip


class ServerTask:
    """A server as a task of the lab thread."""

    pid = os.getpid()

    def __init__(self, network: ZmqNetwork, emit: Emit) -> None:
        self.stop_timeout = STOP_TIMEOUT
        self.on_news: Callable[[AddressNews], object] = ignore
        self._network = network
        self._emit = emit
        self._scope = trio.CancelScope()
        self._stop, self._hurry = trio.Event(), trio.Event()
        self._ended = trio.Event()
        self._failure = ""
        self._to_carry_out, self._orders = trio.open_memory_channel[LoadOrder](MAX_ORDERS)

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        status = _Status(task_status)
        try:
            with self._scope:
                await serve_experts(
                    self._network, plan.identity, plan.server, plan.node, join=plan.join,
                    admission=Admission(file=plan.member_file), faults=faults, emit=self._on_event, stop=self._stop,
                    hurry=self._hurry, allow=self._set_stop_timeout, orders=self._orders,
                    task_status=status,  # type: ignore[arg-type]
                )  # fmt: skip
            if self._scope.cancelled_caught:
                self._failure = "it was killed"
        except Exception as error:
            if not status.started_already:
                raise
            cause = unwrap(error)
            self._failure = str(cause) or type(cause).__name__
            logger.warning("a server in the lab thread failed", exc_info=error)
        finally:
            self._ended.set()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, AddressNews):
            self.on_news(event)
        else:
            self._emit(event)

    def _set_stop_timeout(self, seconds: float) -> None:
        self.stop_timeout = seconds

    async def wait(self) -> str:
        await self._ended.wait()
        return self._failure

    def stop(self) -> None:
        self._stop.set()

    def hurry(self) -> None:
        self._hurry.set()

    def kill(self) -> None:
        self._scope.cancel()

    def apply_faults(self, faults: Faults) -> None:
        pass  # the server holds this very object

    async def load(self, folder: str, uids: Sequence[str], check_only: bool) -> str:
        answered, failure = trio.Event(), "the server has ended meanwhile"

        def answer(said: str) -> None:
            nonlocal failure
            failure = said
            answered.set()

        await self._to_carry_out.send(LoadOrder(folder, uids, check_only, answer))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_call_after, self._ended, nursery.cancel_scope.cancel)
            await answered.wait()
            nursery.cancel_scope.cancel()
        return failure


async def _call_after(event: trio.Event, function: Callable[[], object]) -> None:
    await event.wait()
    function()


class _Status:
    """A task status that remembers whether `started` was called."""

    def __init__(self, inner: trio.TaskStatus[Contact]) -> None:
        self._inner = inner
        self.started_already = False

    def started(self, value: Contact) -> None:
        self.started_already = True
        self._inner.started(value)
