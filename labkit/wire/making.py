"""Making ZeroMQ sockets, as `wire/zeromq` needs them, and reading what ZeroMQ tells of their connections."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from labkit.errors import ConnectionLost, HandshakeFailed, LabkitError, NotAdmitted, SecurityMismatch, WrongServerKey
from labkit.wire.security import Identity
from labkit.wire.sockets import QUEUE_LENGTH, Context, Socket

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
