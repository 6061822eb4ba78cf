"""Joins two byte streams: what one sends, the other receives, until both have ended.

A batch's bytes pass here twice on their way to a server behind a relay: at the relay, and at the hidden node. A byte is
read from one side only when the other side has taken those before it, so that a fast sender waits for a slow reader,
and at most `CHUNK` bytes of each direction are held here.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import trio
from trio.abc import HalfCloseableStream

CHUNK = 1 << 18  # bytes that are read at once, and so the most that is held of each direction
TOUCH_PERIOD = 1.0  # seconds: how exactly the time of the last byte is known

Turn = Callable[[int], Awaitable[None]]  # waits for the turn of that many bytes


class Held:
    """Counts the bytes that were read from one side and not yet taken by the other.

    Attributes:
        bytes: How many there are now.
        most: How many there were at most.
        passed: How many have passed.
    """

    __slots__ = ("bytes", "most", "passed")

    def __init__(self) -> None:
        self.bytes = self.most = self.passed = 0

    def add(self, size: int) -> None:
        """Count bytes that were read."""
        self.bytes += size
        self.most = max(self.most, self.bytes)

    def take(self, size: int) -> None:
        """Count bytes that were passed on, or are given up."""
        self.bytes -= size
        self.passed += size


async def splice(
    one: HalfCloseableStream,
    other: HalfCloseableStream,
    *,
    idle_timeout: float = math.inf,
    held: Held | None = None,
    turn: Turn | None = None,
    first: bytes = b"",
) -> None:
    """Join two streams until both have ended, or one breaks, or nothing has passed for a while. Closes both.

    A side that has ended is told to the other one, whose bytes go on passing: as TCP does with a half-closed
    connection.

    Args:
        one: A stream.
        other: A stream.
        idle_timeout: Seconds without a byte in either direction after which both are closed. A reader that takes
            nothing for as long counts as gone, too.
        held: Counts the bytes that are held here.
        turn: Awaited for each chunk, before it is passed on.
        first: Bytes of `one` that were read from it before.
    """
    ends: list[_StreamEnd | _SocketEnd] = []
    try:
        ends += [_SocketEnd(s) if isinstance(s, trio.SocketStream) else _StreamEnd(s) for s in (one, other)]
        async with trio.open_nursery() as nursery:
            scope = nursery.cancel_scope
            scope.deadline = trio.current_time() + idle_timeout
            passing = _Passing(Held() if held is None else held, turn, idle_timeout, scope)
            nursery.start_soon(passing.run, ends[0], ends[1], first)
            nursery.start_soon(passing.run, ends[1], ends[0], b"")
    finally:
        for end in ends:
            if isinstance(end, _SocketEnd):
                end.forget()
        await close_at_once(one, other)


async def close_at_once(*streams: trio.abc.AsyncResource) -> None:
    """Close streams without waiting for anything, all of them, also if this task is cancelled."""
    with trio.CancelScope(shield=True):
        for stream in streams:
            await trio.aclose_forcefully(stream)


class _Passing:
    """What the two directions of a splice share."""

    __slots__ = ("_held", "_idle_timeout", "_scope", "_touched_at", "_turn")

    def __init__(self, held: Held, turn: Turn | None, idle_timeout: float, scope: trio.CancelScope) -> None:
        self._held = held
        self._turn = turn
        self._idle_timeout = idle_timeout
        self._scope = scope
        self._touched_at = trio.current_time()

    async def run(self, source: _End, sink: _End, first: bytes) -> None:
        """Pass on what comes from `source` until it ends. If either side is broken, both directions end."""
        held, turn = self._held, self._turn
        try:
            data = first or await source.receive()
            while data:
                size = len(data)
                held.add(size)
                try:
                    self._touch()
                    if turn is not None:
                        await turn(size)
                    await sink.send(data)
                finally:
                    held.take(size)
                data = await source.receive()
            self._touch()
            await sink.send_eof()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._scope.cancel()

    def _touch(self) -> None:
        now = trio.current_time()
        if now >= self._touched_at + min(TOUCH_PERIOD, self._idle_timeout / 4):
            self._touched_at = now
            self._scope.deadline = now + self._idle_timeout


# ---------------------------------------------------------------- the two kinds of ends


class _End(Protocol):
    """One of the two streams."""

    async def receive(self) -> bytes | bytearray: ...
    async def send(self, data: bytes | bytearray) -> None: ...
    async def send_eof(self) -> None: ...


class _StreamEnd:
    """Any stream."""

    __slots__ = ("_stream",)

    def __init__(self, stream: HalfCloseableStream) -> None:
        self._stream = stream

    async def receive(self) -> bytes | bytearray:
        return await self._stream.receive_some(CHUNK)

    async def send(self, data: bytes | bytearray) -> None:
        await self._stream.send_all(data)

    async def send_eof(self) -> None:
        await self._stream.send_eof()


class _SocketEnd:
    """A TCP connection. A chunk takes one turn of trio's loop here, and four as a stream, which small calls feel."""

    __slots__ = ("_socket", "_stream")

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._socket = socket.socket(fileno=stream.socket.fileno())  # a second name for it, which `forget` takes away
        self._socket.setblocking(False)

    async def receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            with suppress(BlockingIOError):
                return self._socket.recv(CHUNK)

    async def send(self, data: bytes | bytearray) -> None:
        sent = 0
        with memoryview(data) as view:
            while True:
                with suppress(BlockingIOError):
                    sent += self._socket.send(view[sent:])
                if sent == len(view):
                    return
                await trio.lowlevel.wait_writable(self._socket)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    def forget(self) -> None:
        """Leave the connection to its stream, which closes it."""
        self._socket.detach()
