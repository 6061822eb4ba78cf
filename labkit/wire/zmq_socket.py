"""ZeroMQ sockets under trio: the only module that moves bytes with zmq. `zmq_transport` makes links of them, and
`zmq_reports` reads what ZeroMQ says about connections.

ZeroMQ signals events by an edge-triggered file descriptor. Each socket has one pump task that owns it: the pump reads
`EVENTS`, delivers what has arrived or wakes the tasks that wait for it, and only then waits for the descriptor. Any
send or receive may swallow an edge that another task waits for, so `EVENTS` is read again after each of them. A task
that finds nothing checks what was read then before it waits, since that reading may have swallowed its own edge. A
receive takes a message off the socket only in the moment in which it returns it, so that cancelling it loses nothing.

Order: `Socket`, how each kind of socket is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import trio
import zmq
from zmq.utils import z85

from labkit.errors import ConnectionLost, LabkitError
from labkit.wire.frames import Frame
from labkit.wire.security import Identity
from labkit.wire.zmq_reports import MONITORED_EVENTS, why_not_bound

QUEUE_LENGTH = 1000  # messages that ZeroMQ queues for each connection and direction
MESSAGES_PER_TURN = 64  # messages to deliver before other tasks get a turn
ZERO_COPY_SIZE = 1 << 16  # bytes; messages whose frames are all smaller are copied into ZeroMQ, others are not
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05  # seconds between two attempts to send to a peer of a ROUTER without room
FLUSH_TIME = 0.2  # seconds that closing a listener waits for its last replies to leave
HEARTBEAT_PERIOD = 2.0  # seconds between ZMTP pings; a peer that is silent for three periods counts as gone
STUCK_TIMEOUT = 15.0  # seconds after which a peer that takes none of the bytes sent to it counts as gone (Linux only)
HANDSHAKE_TIMEOUT = 5.0  # seconds that a handshake may take
MAX_SOCKETS = 8192  # of a context
ZAP_ADDRESS = "inproc://zeromq.zap.01"
# As plain numbers: those of pyzmq are `enum` flags, and each `&` and `|` of them takes a microsecond.
NOBLOCK, NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK) | int(zmq.SNDMORE)
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)


class UnsentFrames:
    """A message whose frames ZeroMQ may still be sending. `bytes` is their size while it is not `done`."""

    __slots__ = ("_trackers", "bytes")

    def __init__(self, trackers: Sequence[zmq.MessageTracker | None], size: int) -> None:
        self._trackers = trackers
        self.bytes = size

    @property
    def done(self) -> bool:
        return all(tracker is None or tracker.done for tracker in self._trackers)  # copied frames have none


ALL_SENT = UnsentFrames((), 0)
Context = zmq.Context[Any]
ZmqMessage = list[zmq.Frame]


class Socket:
    """A ZeroMQ socket to be used with trio. `run` must be running while it is used.

    If `on_message` is set, it is called with each message as soon as that arrives, and `receive` returns none.
    """

    def __init__(self, raw: zmq.Socket[bytes], *, monitored: bool = False) -> None:
        self._raw = raw
        self._monitored = monitored
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()
        self._when_writable: list[Callable[[], object]] = []
        self._events = 0  # as last read
        self._events_fresh = False  # whether they were read after the last receive
        # A ROUTER always claims to be writable, since that depends on the peer.
        self._tells_writable = raw.getsockopt(zmq.TYPE) != zmq.ROUTER
        self._leftover: list[ZmqMessage] = []  # messages that had arrived when the socket failed
        self._descriptor = int(raw.getsockopt(zmq.FD))
        self._pump_waits = False
        self.on_message: Callable[[ZmqMessage], object] | None = None
        self.error: LabkitError | None = None

    async def run(self) -> None:
        """Deliver messages and wake tasks, until cancelled or until the socket fails. This is the pump."""
        while self.error is None:
            self._read_events()
            if self.on_message is not None and self._events & POLLIN:
                self._deliver(MESSAGES_PER_TURN)
                if self._events & POLLIN or self.error is not None:
                    await trio.lowlevel.checkpoint()
                    continue
            self._pump_waits = True
            try:
                await trio.lowlevel.wait_readable(self._descriptor)
            except trio.ClosedResourceError:
                pass  # nothing was closed: this is how `_read_events` wakes the pump
            finally:
                self._pump_waits = False

    async def run_until_failure(self) -> None:
        """Wait until the socket fails, while `run` delivers messages. Raises what it fails with."""
        self._read_events()  # a message may have arrived before `on_message` was set
        while self.error is None:
            await self._readers.park()
        raise self.error

    def fail(self, error: LabkitError) -> None:
        """Let sends raise `error` from now on, and receives when all that had arrived is taken."""
        if self.error is None:
            if self.on_message is not None:
                self._deliver(QUEUE_LENGTH)
            self._leftover = self.receive_nowait(QUEUE_LENGTH)
            self._set_error(error)

    async def receive(self) -> list[ZmqMessage]:
        """Wait for messages. Returns all that are there, up to `MESSAGES_PER_TURN`."""
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

    def receive_nowait(self, limit: int = MESSAGES_PER_TURN) -> list[ZmqMessage]:
        """Returns the messages that are there, up to `limit`."""
        if self.error is not None:
            burst, self._leftover = self._leftover[:limit], self._leftover[limit:]
            return burst
        burst = []
        while len(burst) < limit and (message := self._take()) is not None:
            burst.append(message)
            self._read_events()
            if not self._events & POLLIN:
                return burst
        self._read_events()
        return burst

    def _take(self) -> ZmqMessage | None:
        """Returns one message, if there is one. The events have to be read again afterwards, in any case."""
        self._events_fresh = False
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
        """Pass a message to ZeroMQ, waiting for room. Large frames are not copied: leave them unchanged."""
        await trio.lowlevel.checkpoint_if_cancelled()
        pause = FIRST_PAUSE
        while True:
            unsent = self.send_nowait(frames)
            if unsent is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return unsent
            if not self._tells_writable:  # ZeroMQ does not say when this peer has room
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            elif not self._events & POLLOUT:
                await self._writers.park()

    def send_nowait(self, frames: Sequence[Frame]) -> UnsentFrames | None:
        """Pass a message to ZeroMQ if there is room, else return None. Raises `ConnectionLost` if the peer is gone."""
        if self.error is not None:
            raise self.error
        copy = max(map(len, frames)) < ZERO_COPY_SIZE
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
            self._read_events()
        return ALL_SENT if copy else UnsentFrames(trackers, sum(map(len, frames)))

    def when_writable(self, action: Callable[[], object]) -> None:
        """Call `action`, once, when there is room. For use after a `send_nowait` that gave None; not for a ROUTER.

        If the socket fails before, `action` is not called.
        """
        assert self._tells_writable
        if self._events & POLLOUT:  # there is room by now
            trio.lowlevel.current_trio_token().run_sync_soon(action)
        else:
            self._when_writable.append(action)

    def _deliver(self, limit: int) -> None:
        """Call `on_message` with the messages that are there, up to `limit`, and leave the events freshly read."""
        while limit > 0 and self.on_message is not None and (message := self._take()) is not None:
            self.on_message(message)
            limit -= 1
            if not self._events_fresh:  # it is, if `on_message` has sent something
                self._read_events()
            if not self._events & POLLIN:
                return
        self._read_events()

    def _read_events(self) -> None:
        """Read ZeroMQ's events, and wake the tasks that wait for them."""
        if self._raw.closed:
            return
        # Read them even if no task waits: only this clears the descriptor.
        events = self._events = int(self._raw.get(zmq.EVENTS))
        self._events_fresh = True
        if events & POLLIN:
            if self.on_message is None:
                self._readers.unpark_all()
            elif self._pump_waits:
                trio.lowlevel.notify_closing(self._descriptor)  # wakes the pump, whose edge was just swallowed
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
        """Close at once. `linger`: seconds that ZeroMQ may go on sending in the background."""
        self.fail(ConnectionLost("the socket is closed"))
        if self._monitored and not self._raw.closed:
            # Otherwise ZeroMQ's thread, which closes the socket later, would report that to a monitor that is closed by
            # then, and wait for ever until the report is read: no connection of this context would get any further.
            self._raw.disable_monitor()
        self._raw.close(math.ceil(linger * 1000))


# ---------------------------------------------------------------- how each kind of socket is made

_monitors = itertools.count()


def make_context() -> Context:
    """Make a ZeroMQ context, with one I/O thread."""
    context: Context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


def make_router(
    context: Context, host: str, ports: range | None, identity: Identity, *, secure: bool, domain: bytes,
    max_frame: int,
) -> tuple[Socket, str, int]:  # fmt: skip
    """Make a ROUTER and bind it. Returns it with the host and port that it is bound to.

    Args:
        context: ZeroMQ's context.
        host: The IP address to bind.
        ports: The ports to try, in this order; None for any that is free.
        identity: The keys of the node.
        secure: Whether connections are encrypted (CURVE).
        domain: ZAP domain under which `make_zap`'s socket is asked who may connect.
        max_frame: Size of the largest frame to accept, bytes.

    Raises:
        LabkitError: None of them can be bound.
    """
    raw = context.socket(zmq.ROUTER)
    _configure(raw, max_frame)
    raw.setsockopt(zmq.ROUTER_MANDATORY, 1)
    raw.setsockopt(zmq.IPV6, ":" in host)  # with which [::] takes connections of IPv4, too
    if secure:
        raw.setsockopt(zmq.CURVE_SERVER, 1)
        raw.setsockopt(zmq.CURVE_SECRETKEY, z85.encode(identity.secret_key))
        raw.setsockopt(zmq.ZAP_DOMAIN, domain)
        raw.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    try:
        _bind(raw, f"tcp://[{host}]" if ":" in host else f"tcp://{host}", ports)
    except LabkitError:
        raw.close(0)
        raise
    host, _, port = raw.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://").rpartition(":")
    return Socket(raw), host.strip("[]"), int(port)


def _bind(raw: zmq.Socket[bytes], where: str, ports: range | None) -> None:
    """Bind a socket to the first port that is free. Raises `LabkitError` that says what is in the way."""
    for port in ports or ("*",):
        try:
            raw.bind(f"{where}:{port}")
            return
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE and ports is not None and len(ports) > 1:
                continue
            raise LabkitError(f"cannot listen on {where}:{port}: {why_not_bound(error)}") from None
    assert ports is not None
    raise LabkitError(
        f"cannot listen on {where}:{ports[0]}-{ports[-1]}: all {len(ports)} ports are in use, by other programs, or by "
        "nodes and servers of this machine, each of which takes one; give a larger range"
    )


def make_dealer(
    context: Context, host: str, port: int, identity: Identity, server_key: bytes | None, max_frame: int
) -> tuple[Socket, Socket]:
    """Make a DEALER that connects once, and the monitor socket on which ZeroMQ reports how that goes. Returns both.

    The DEALER sends only once it is connected, and does not reconnect: a broken connection is a failure that the caller
    has to know of, and the next call opens a new one.

    Args:
        context: ZeroMQ's context.
        host: The IP address to connect to.
        port: The port to connect to.
        identity: The keys of the node that connects.
        server_key: The CURVE key that the other side must hold; None for an unencrypted connection.
        max_frame: Size of the largest frame to accept, bytes.

    Raises:
        ConnectionLost: No socket is left.
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
        # With a name of our own: that of pyzmq has the file descriptor in it, which a socket being closed may have had.
        monitor = raw.get_monitor_socket(MONITORED_EVENTS, f"inproc://monitor-{next(_monitors)}")
        sockets.append(monitor)
        raw.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
    except zmq.ZMQError as error:
        for socket in sockets:
            socket.close(0)
        raise ConnectionLost(f"no socket is left to connect to {host}:{port}: {error.strerror}") from None
    return Socket(raw, monitored=True), Socket(monitor)


def make_zap(context: Context) -> Socket:
    """Make the socket on which ZeroMQ asks whether a client may connect."""
    raw = context.socket(zmq.ROUTER)
    raw.bind(ZAP_ADDRESS)
    return Socket(raw)


def _configure(raw: zmq.Socket[bytes], max_frame: int) -> None:
    raw.setsockopt(zmq.LINGER, 0)
    raw.setsockopt(zmq.MAXMSGSIZE, max_frame)
    raw.setsockopt(zmq.SNDHWM, QUEUE_LENGTH)
    raw.setsockopt(zmq.RCVHWM, QUEUE_LENGTH)
    raw.setsockopt(zmq.HEARTBEAT_IVL, round(HEARTBEAT_PERIOD * 1000))
    raw.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(3 * HEARTBEAT_PERIOD * 1000))
    raw.setsockopt(zmq.TCP_MAXRT, round(STUCK_TIMEOUT * 1000))
    raw.setsockopt(zmq.HANDSHAKE_IVL, round(HANDSHAKE_TIMEOUT * 1000))
