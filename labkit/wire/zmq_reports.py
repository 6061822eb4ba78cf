"""What ZeroMQ says about connections, in labkit's errors: why a socket is not bound, why a link ends, whose a frame is.

`zmq_socket` and `zmq_transport` ask here; a batch passes only `user_id`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

import zmq
from zmq.utils.monitor import parse_monitor_message

from labkit.errors import ConnectionLost, HandshakeFailed, LabkitError, NotAdmitted, SecurityMismatch, WrongServerKey

_NOT_OURS = "; this machine has no such address: listen on tcp://0.0.0.0:PORT, and announce=… what others reach it by"
LISTEN_HINTS = {
    zmq.EADDRINUSE: "; another program, or an earlier run, has this port: choose another, or * for any that is free",
    **dict.fromkeys((zmq.EADDRNOTAVAIL, errno.ENODEV), _NOT_OURS),
    errno.EAFNOSUPPORT: "; this machine has no IPv6: listen on tcp://0.0.0.0:PORT",
    errno.EACCES: "; ports below 1024 are for administrators: choose a higher one",
}
KEY_LETTERS = 64  # of a user id: the public key in hex; the rest is the address (`security.answer_zap`)
MONITORED_EVENTS = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
)  # fmt: skip


def why_not_bound(error: zmq.ZMQError) -> str:
    """Returns why a socket could not be bound, and what to try."""
    return error.strerror.partition(" (addr=")[0] + LISTEN_HINTS.get(error.errno or 0, "")


def read_monitor(frames: Sequence[zmq.Frame], where: str, secure: bool) -> LabkitError | None:
    """Returns the error that a monitor message means for the connection to `where`; None while all is well."""
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


def user_id(frame: zmq.Frame) -> tuple[bytes | None, str]:
    """Returns the public key that the sender of this frame proved in its handshake, if any, and its IP address."""
    try:
        text = frame.get("User-Id")
    except zmq.ZMQError:
        return None, ""
    if not isinstance(text, str) or not text:
        return None, ""
    return bytes.fromhex(text[:KEY_LETTERS]), text[KEY_LETTERS:]
