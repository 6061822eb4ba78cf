"""One ZeroMQ socket, awaitable under trio: the only module that moves bytes with zmq. `making` makes them.

ZeroMQ tells that something happened by an edge-triggered file descriptor. One pump task a socket owns it: it reads
`EVENTS`, hands over what has arrived or wakes who waits for it, and only then waits for the descriptor. Any send or
receive may swallow an edge that another task waits for, so `EVENTS` is read again after each; and who finds nothing
looks at what was read then before it waits, since that reading may have swallowed its own edge. A receive takes a
message off the socket only in the moment in which it returns it, so cancelling it loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import trio
import zmq

from labkit.errors import ConnectionLost, LabkitError
from labkit.wire.frames import Frame

QUEUE_LENGTH = 1000  # messages a connection and direction
BURST = 64  # messages; then other tasks get a turn
COPIED = 1 << 16  # bytes; ZeroMQ is given a copy of smaller frames, which then are nobody's any more
PAUSE, LONGEST_PAUSE = 0.001, 0.05  # seconds between two attempts to send to a ROUTER's peer that has no room
FLUSH_TIME = 0.2  # seconds that closing a listener waits for its last replies to leave
# As plain numbers: what pyzmq has are flags of `enum`, which take a microsecond for each `&` and `|`.
NOBLOCK, NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK) | int(zmq.SNDMORE)
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)


class Unsent:
    """Frames that ZeroMQ has not let go of yet. `bytes`: their size while `done` is False."""

    __slots__ = ("_trackers", "bytes")

    def __init__(self, trackers: Sequence[zmq.MessageTracker | None], size: int) -> None:
        self._trackers = trackers
        self.bytes = size

    @property
    def done(self) -> bool:
        return all(tracker is None or tracker.done for tracker in self._trackers)  # those of small frames are


SENT = Unsent((), 0)
Context = zmq.Context[Any]
Arrived = list[zmq.Frame]  # a message


class Socket:
    """A ZeroMQ socket whose sends and receives are awaited. `run` must be running while it is used.

    `hear`: if there is one, it gets each message in the moment in which that arrives, and `receive` gets none.
    """

    def __init__(self, raw: zmq.Socket[bytes], *, monitored: bool = False) -> None:
        self._raw = raw
        self._monitored = monitored
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()
        self._when_writable: list[Callable[[], object]] = []
        self._events = 0  # as last read
        self._looked = False  # whether that was after the last receive
        # A ROUTER always says that it can be written to, since that depends on the peer.
        self._tells_writable = raw.getsockopt(zmq.TYPE) != zmq.ROUTER
        self._rest: list[Arrived] = []  # what had arrived when the socket failed
        self._descriptor = int(raw.getsockopt(zmq.FD))
        self._pump_waits = False
        self.hear: Callable[[Arrived], object] | None = None
        self.error: LabkitError | None = None

    async def run(self) -> None:
        """The pump: until cancelled or until the socket fails."""
        while self.error is None:
            self._look()
            if self.hear is not None and self._events & POLLIN:
                self._hand_over(BURST)
                if self._events & POLLIN or self.error is not None:
                    await trio.lowlevel.checkpoint()
                    continue
            self._pump_waits = True
            try:
                await trio.lowlevel.wait_readable(self._descriptor)
            except trio.ClosedResourceError:
                pass  # it is not closed: `_look` has something for us
            finally:
                self._pump_waits = False

    async def run_until_over(self) -> None:
        """Wait until the socket fails, while `run` hands over what arrives. Raises what it fails with."""
        self._look()  # something may have arrived before anybody heard it
        while self.error is None:
            await self._readers.park()
        raise self.error

    def fail(self, error: LabkitError) -> None:
        """From now on sends raise `error`, and receives do when everything that had arrived is taken."""
        if self.error is None:
            if self.hear is not None:
                self._hand_over(QUEUE_LENGTH)
            self._rest = self.receive_nowait(QUEUE_LENGTH)
            self._set_error(error)

    async def receive(self) -> list[Arrived]:
        """Wait for messages and take all that are there, up to a burst."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            burst = self.receive_nowait()
            if burst:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return burst
            if self.error is not None:
                raise self.error
            if not self._events & POLLIN:
                await self._readers.park()

    def receive_nowait(self, limit: int = BURST) -> list[Arrived]:
        """Take what is there."""
        if self.error is not None:
            burst, self._rest = self._rest[:limit], self._rest[limit:]
            return burst
        burst = []
        while len(burst) < limit and (message := self._take()) is not None:
            burst.append(message)
            self._look()
            if not self._events & POLLIN:
                return burst
        self._look()
        return burst

    def _take(self) -> Arrived | None:
        """Take one message, if there is one. Look again afterwards, in any case."""
        self._looked = False
        try:
            frame = self._raw.recv(NOBLOCK, copy=False)
            message = [frame]
            while frame.more:
                frame = self._raw.recv(NOBLOCK, copy=False)
                message.append(frame)
            return message
        except zmq.Again:
            pass
        except zmq.ZMQError as error:
            self._set_error(ConnectionLost(f"the socket failed: {error}"))
        return None

    async def send(self, frames: Sequence[Frame]) -> Unsent:
        """Hand a message to ZeroMQ, waiting for room. Large frames are not copied: leave them unchanged."""
        await trio.lowlevel.checkpoint_if_cancelled()
        pause = PAUSE
        while True:
            unsent = self.send_nowait(frames)
            if unsent is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return unsent
            if not self._tells_writable:  # nothing tells when this peer has room
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            elif not self._events & POLLOUT:
                await self._writers.park()

    def send_nowait(self, frames: Sequence[Frame]) -> Unsent | None:
        """Hand a message to ZeroMQ if there is room; None if not. Raises `ConnectionLost` if nobody is there."""
        if self.error is not None:
            raise self.error
        copy = max(map(len, frames)) < COPIED
        try:
            if copy:
                for frame in frames[:-1]:
                    self._raw.send(frame, NOBLOCK_MORE, copy, not copy)
                self._raw.send(frames[-1], NOBLOCK, copy, not copy)
            else:
                trackers = [self._raw.send(frame, NOBLOCK_MORE, copy, not copy) for frame in frames[:-1]]
                trackers.append(self._raw.send(frames[-1], NOBLOCK, copy, not copy))
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise ConnectionLost(f"the peer is gone ({error})") from None
        finally:
            self._look()
        return SENT if copy else Unsent(trackers, sum(map(len, frames)))

    def when_writable(self, action: Callable[[], object]) -> None:
        """After a `send_nowait` for which there was no room: call `action`, once, when there is; never, if the socket
        fails before. Not for a ROUTER."""
        assert self._tells_writable
        if self._events & POLLOUT:  # there is by now
            trio.lowlevel.current_trio_token().run_sync_soon(action)
        else:
            self._when_writable.append(action)

    def _hand_over(self, limit: int) -> None:
        """Give `hear` what is there, and look, unless `hear` sent something, which did."""
        while limit > 0 and self.hear is not None and (message := self._take()) is not None:
            self.hear(message)
            limit -= 1
            if not self._looked:
                self._look()
            if not self._events & POLLIN:
                return
        self._look()

    def _look(self) -> None:
        """Read what happened, and wake who waits for it."""
        if self._raw.closed:
            return
        # Read even if nobody waits: only this clears the descriptor.
        events = self._events = int(self._raw.get(zmq.EVENTS))
        self._looked = True
        if events & POLLIN:
            if self.hear is None:
                self._readers.unpark_all()
            elif self._pump_waits:
                trio.lowlevel.notify_closing(self._descriptor)  # wakes the pump; the edge it waited for is read away
        if events & POLLOUT and (self._writers or self._when_writable):
            self._writers.unpark_all()
            actions, self._when_writable = self._when_writable, []
            for action in actions:
                action()

    def _set_error(self, error: LabkitError) -> None:
        self.error = self.error or error
        self._readers.unpark_all()
        self._writers.unpark_all()
        self._when_writable.clear()

    def close(self, linger: float = 0.0) -> None:
        """Close at once; `linger`: seconds that ZeroMQ may go on sending in the background."""
        self.fail(ConnectionLost("the socket is closed"))
        if self._monitored and not self._raw.closed:
            # Or ZeroMQ's thread, which closes it later, would tell a monitor that is closed by then, and wait for ever
            # for somebody to hear it: no connection of this context would get any further.
            self._raw.disable_monitor()
        self._raw.close(math.ceil(linger * 1000))
