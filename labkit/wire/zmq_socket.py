"""One ZeroMQ socket, awaitable under trio: the only module that moves bytes with zmq. `making` makes them.

ZeroMQ tells that something happened by an edge-triggered file descriptor. One pump task a socket owns it: it reads
`EVENTS`, hands over what has arrived or wakes who waits for it, and only then waits for the descriptor. Any send or
receive may swallow an edge that another task waits for, so `EVENTS` is read again after each; and who finds nothing
looks at what was read then before it waits, since that reading may have swallowed its own edge. A receive takes a
message off the socket only in the moment in which it returns it, so cancelling it loses nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import trio
import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from labkit.errors import ConnectionLost, HandshakeFailed, LabkitError, NotAdmitted, SecurityMismatch, WrongServerKey
from labkit.wire.frames import Frame
from labkit.wire.security import Identity

QUEUE_LENGTH = 1000  # messages a connection and direction
BURST = 64  # messages; then other tasks get a turn
COPIED = 1 << 16  # bytes; ZeroMQ is given a copy of smaller frames, which then are nobody's any more
PAUSE, LONGEST_PAUSE = 0.001, 0.05  # seconds between two attempts to send to a ROUTER's peer that has no room
FLUSH_TIME = 0.2  # seconds that closing a listener waits for its last replies to leave
# As plain numbers: what pyzmq has are flags of `enum`, which take a microsecond for each `&` and `|`.
NOBLOCK, NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK) | int(zmq.SNDMORE)
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)


class UnsentFrames:
    """Frames that ZeroMQ has not let go of yet. `bytes`: their size while `done` is False."""

    __slots__ = ("_trackers", "bytes")

    def __init__(self, trackers: Sequence[zmq.MessageTracker | None], size: int) -> None:
        self._trackers = trackers
        self.bytes = size

    @property
    def done(self) -> bool:
        return all(tracker is None or tracker.done for tracker in self._trackers)  # those of small frames are


SENT = UnsentFrames((), 0)
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

    async def send(self, frames: Sequence[Frame]) -> UnsentFrames:
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

    def send_nowait(self, frames: Sequence[Frame]) -> UnsentFrames | None:
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
        return SENT if copy else UnsentFrames(trackers, sum(map(len, frames)))

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


HEARTBEAT = 2.0  # seconds between ZMTP pings; a peer that is silent for three of them is gone
STUCK_TIMEOUT = 15.0  # seconds after which a peer that takes no byte of what is sent to it is gone (on Linux)
HANDSHAKE_TIMEOUT = 5.0  # seconds
ZAP_ADDRESS = "inproc://zeromq.zap.01"
MONITORED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
)  # fmt: skip

_monitors = itertools.count()


def make_context() -> Context:
    """A ZeroMQ context with one I/O thread."""
    context: Context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 8192)
    return context


def make_router(
    context: Context, address: str, identity: Identity, *, secure: bool, domain: bytes, max_frame: int
) -> tuple[Socket, str, int]:
    """A ROUTER bound to `address` (`tcp://host:port`, port `*` for any). Returns it with the host and port it got."""
    raw = context.socket(zmq.ROUTER)
    _configure(raw, max_frame)
    raw.setsockopt(zmq.ROUTER_MANDATORY, 1)
    raw.setsockopt(zmq.IPV6, "[" in address)
    if secure:
        raw.setsockopt(zmq.CURVE_SERVER, 1)
        raw.setsockopt(zmq.CURVE_SECRETKEY, z85.encode(identity.secret_key))
        raw.setsockopt(zmq.ZAP_DOMAIN, domain)
        raw.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    try:
        raw.bind(address)
    except zmq.ZMQError as error:
        raw.close(0)
        raise LabkitError(f"cannot listen on {address}: {error.strerror}") from None
    host, _, port = raw.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://").rpartition(":")
    return Socket(raw), host.strip("[]"), int(port)


def make_dealer(
    context: Context, host: str, port: int, identity: Identity, server_key: bytes | None, max_frame: int
) -> tuple[Socket, Socket]:
    """A DEALER that connects to `host` (an IP address) once, and the socket on which ZeroMQ tells how that goes.

    `server_key`: expect this CURVE key there; None speaks unencrypted. The DEALER sends only once connected and does
    not reconnect: a connection that broke is a failure to be known, and the next call opens a new one.
    """
    sockets: list[zmq.Socket[bytes]] = []
    try:
        raw = context.socket(zmq.DEALER)
        sockets.append(raw)
        _configure(raw, max_frame)
        raw.setsockopt(zmq.IMMEDIATE, 1)
        raw.setsockopt(zmq.RECONNECT_IVL, -1)
        raw.setsockopt(zmq.IPV6, ":" in host)
        if server_key is not None:
            raw.setsockopt(zmq.CURVE_SERVERKEY, z85.encode(server_key))
            raw.setsockopt(zmq.CURVE_SECRETKEY, z85.encode(identity.secret_key))
            raw.setsockopt(zmq.CURVE_PUBLICKEY, z85.encode(identity.public_key))
        # A name of its own: pyzmq's is made of the file descriptor, which may be that of a socket still being closed.
        monitor = raw.get_monitor_socket(MONITORED, f"inproc://monitor-{next(_monitors)}")
        sockets.append(monitor)
        raw.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
    except zmq.ZMQError as error:
        for socket in sockets:
            socket.close(0)
        raise ConnectionLost(f"no socket is left to connect to {host}:{port}: {error.strerror}") from None
    return Socket(raw, monitored=True), Socket(monitor)


def make_zap(context: Context) -> Socket:
    """The socket on which ZeroMQ asks whether a client may connect."""
    raw = context.socket(zmq.ROUTER)
    raw.bind(ZAP_ADDRESS)
    return Socket(raw)


def _configure(raw: zmq.Socket[bytes], max_frame: int) -> None:
    raw.setsockopt(zmq.LINGER, 0)
    raw.setsockopt(zmq.MAXMSGSIZE, max_frame)
    raw.setsockopt(zmq.SNDHWM, QUEUE_LENGTH)
    raw.setsockopt(zmq.RCVHWM, QUEUE_LENGTH)
    raw.setsockopt(zmq.HEARTBEAT_IVL, round(HEARTBEAT * 1000))
    raw.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(3 * HEARTBEAT * 1000))
    raw.setsockopt(zmq.TCP_MAXRT, round(STUCK_TIMEOUT * 1000))
    raw.setsockopt(zmq.HANDSHAKE_IVL, round(HANDSHAKE_TIMEOUT * 1000))


# ---------------------------------------------------------------- what ZeroMQ tells


def read_monitor(frames: Sequence[zmq.Frame], where: str, secure: bool) -> LabkitError | None:
    """The error that a monitor message means for the connection to `where`; None while all is well."""
    event = parse_monitor_message([frame.bytes for frame in frames])
    kind = event["event"]
    if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return NotAdmitted(f"{where} is a private swarm and does not admit our key")
    if kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        if event["value"] == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            ours, theirs = ("", "not ") if secure else ("not ", "")
            return SecurityMismatch(f"we do {ours}encrypt, {where} does {theirs}")
        return HandshakeFailed(f"{where} does not speak our protocol")
    if kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        if secure:
            return WrongServerKey(f"{where} broke off the handshake: it does not hold the key we expect")
        return HandshakeFailed(f"{where} broke off the handshake: it does not speak our protocol")
    if kind == zmq.EVENT_DISCONNECTED:
        return ConnectionLost(f"the connection to {where} broke")
    if kind == zmq.EVENT_CLOSED:
        return ConnectionLost(f"{where} refused the connection")
    return None


def user_id(frame: zmq.Frame) -> bytes | None:
    """The public key that the sender of this frame proved in its handshake, if any."""
    try:
        text = frame.get("User-Id")
    except zmq.ZMQError:
        return None
    return bytes.fromhex(text) if isinstance(text, str) and text else None
