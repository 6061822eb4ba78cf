"""One life of a local server, from its start to its end: as a child process, or as a task of the lab thread.

A `ServerHandle` has one life after another, and treats both forms alike. What a child process does is in `child`.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import trio

from labkit.contact import Contact
from labkit.errors import ServerFailed
from labkit.events import Emit
from labkit.faults import Faults
from labkit.launch.child import ChildCommand, ChildConfig, ChildReport
from labkit.node import NodeConfig
from labkit.portal import unwrap
from labkit.server.server import STOP_TIMEOUT, ServerConfig, serve_experts
from labkit.wire.security import Admission, Identity
from labkit.wire.transport import split_address
from labkit.wire.zmq_transport import ZmqNetwork

logger = logging.getLogger(__name__)

LAST_WORDS_TIME = 0.5  # seconds that what a dead child has said may take to be read
COMMAND = [sys.executable, "-m", "labkit", "serve", "--child"]
# A session of its own, so that Ctrl-C in a terminal and the kernel's stop button reach the parent only.
OWN_GROUP: dict[str, Any]
if sys.platform == "win32":
    OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
else:
    OWN_GROUP = {"start_new_session": True}


@dataclass(frozen=True)
class ServerPlan:
    """All that it takes to start a server, and to start it again as the same node.

    `lasting`: whether its checkpoints outlive the swarm, and so are worth saving when that ends.
    """

    server: ServerConfig
    node: NodeConfig
    identity: Identity
    join: tuple[Contact, ...]
    member_file: Path | None = None  # public keys that may connect, in a private swarm
    lasting: bool = True


class ServerProcess:
    """A server as a child process.

    `stop_timeout`: seconds that a clean stop may take; a child says how many when it is ready.
    """

    def __init__(self) -> None:
        self.stop_timeout = STOP_TIMEOUT
        self._process: trio.Process | None = None
        self._scope = trio.CancelScope()
        self._begun, self._ended = False, trio.Event()
        self._last_words: deque[str] = deque(maxlen=30)
        self._all_heard = trio.Event()
        self._commands: trio.MemorySendChannel[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        """From its start to its end, for whatever reason. Raises `ServerFailed` if it does not come to serve."""
        self._begun = True
        try:
            with self._scope:
                await self._run(plan, faults, task_status)
        finally:
            self._ended.set()

    async def _run(self, plan: ServerPlan, faults: Faults, task_status: trio.TaskStatus[Contact]) -> None:
        process = self._process = await trio.lowlevel.open_process(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            **OWN_GROUP,
        )
        try:
            async with trio.open_nursery() as nursery:
                self._commands, to_send = trio.open_memory_channel[bytes](100)
                nursery.start_soon(self._feed, to_send)
                nursery.start_soon(self._listen)
                self._send(_order(plan, faults))
                task_status.started(await self._first_report(process))
                await self._hear_its_end(process)
                nursery.cancel_scope.cancel()
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    assert stream is not None
                    await trio.aclose_forcefully(stream)

    async def _first_report(self, process: trio.Process) -> Contact:
        assert process.stdout is not None
        data = b""
        while b"\n" not in data:
            part = await process.stdout.receive_some()
            if not part:
                await self._hear_its_end(process)
                raise ServerFailed(self._account())
            data += part
        report = msgspec.json.decode(data.partition(b"\n")[0], type=ChildReport)
        if report.ready is None:
            raise ServerFailed(report.failed or self._account())
        self.stop_timeout = report.stop_timeout
        return report.ready

    async def _hear_its_end(self, process: trio.Process) -> None:
        await process.wait()
        with trio.move_on_after(LAST_WORDS_TIME):  # a child of its own may hold its standard error open
            await self._all_heard.wait()

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
        self._all_heard.set()

    async def wait(self) -> str:
        """Wait for its end. Returns what went wrong, or nothing for a clean stop."""
        await self._ended.wait()
        clean = self._process is not None and self._process.returncode == 0
        return "" if clean else self._account()

    def stop(self) -> None:
        """Ask it to save its experts and end."""
        self._send(ChildCommand(stop=True))

    def kill(self) -> None:
        """End it at once: SIGKILL. One that has not begun never will."""
        self._scope.cancel()
        if not self._begun:
            self._ended.set()

    def apply_faults(self, faults: Faults) -> None:
        """Tell it."""
        self._send(ChildCommand(latency=faults.latency, loss=faults.loss))

    def _send(self, line: ChildConfig | ChildCommand) -> None:
        if self._commands is not None:
            try:
                self._commands.send_nowait(msgspec.json.encode(line) + b"\n")
            except (trio.WouldBlock, trio.BrokenResourceError):
                pass  # it is gone, or stuck and about to be killed


def environment() -> dict[str, str]:
    """Of a server process: torch's threads sleep while there is nothing to do, unless the user says otherwise.

    By default they spin for milliseconds after each operation, on cores that callers need. Asleep, they let two
    clients of one server make half as many calls of 2 MB again, on two cores, and the longest took a third of the time.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


def _order(plan: ServerPlan, faults: Faults) -> ChildConfig:
    member_file = None if plan.member_file is None else str(plan.member_file)
    return ChildConfig(
        plan.identity.seed.hex(), plan.server, plan.node, list(plan.join), member_file, faults.latency, faults.loss,
        sys.path,
    )  # fmt: skip


class ServerTask:
    """A server as a task of the lab thread. The same methods as `ServerProcess`."""

    pid = os.getpid()

    def __init__(self, network: ZmqNetwork, emit: Emit) -> None:
        self.stop_timeout = STOP_TIMEOUT
        self._network = network
        self._emit = emit
        self._scope = trio.CancelScope()
        self._stop = trio.Event()
        self._begun, self._ended = False, trio.Event()
        self._failure = ""

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        self._begun = True
        status = _Status(task_status)
        try:
            with self._scope:
                await serve_experts(
                    self._network, plan.identity, plan.server, plan.node, join=plan.join,
                    admission=Admission(file=plan.member_file), faults=faults, emit=self._emit, stop=self._stop,
                    allow=self._allow, task_status=status,  # type: ignore[arg-type]
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

    def _allow(self, seconds: float) -> None:
        self.stop_timeout = seconds

    async def wait(self) -> str:
        await self._ended.wait()
        return self._failure

    def stop(self) -> None:
        self._stop.set()

    def kill(self) -> None:
        self._scope.cancel()
        if not self._begun:
            self._ended.set()

    def apply_faults(self, faults: Faults) -> None:
        """Nothing to do: the server draws from this object itself."""


class _Status:
    """A task status that remembers whether it was told."""

    def __init__(self, inner: trio.TaskStatus[Contact]) -> None:
        self._inner = inner
        self.started_already = False

    def started(self, value: Contact) -> None:
        self.started_already = True
        self._inner.started(value)


Runner = ServerProcess | ServerTask


async def same_address(plan: ServerPlan, contact: Contact | None) -> ServerPlan:
    """The plan, with the port of the last life if that is free: others know the server by it."""
    if contact is None:
        return plan
    for _ in range(25):
        if is_free(split_address(plan.node.listen)[0], contact.port):
            listen = f"{plan.node.listen.rpartition(':')[0]}:{contact.port}"
            return replace(plan, node=replace(plan.node, listen=listen))
        await trio.sleep(0.02)  # the last life's socket may be closing
    return plan


def is_free(host: str, port: int) -> bool:
    """Whether a server can listen there, where its last life did."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
