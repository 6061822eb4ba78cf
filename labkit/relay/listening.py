"""Sockets of a relay and its clients: listening at an address of this machine, and connecting to another one."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from labkit.errors import ConnectionLost, LabkitError
from labkit.wire.addresses import resolve

BACKLOG = 128  # connections that the system accepts before we do
ACCEPT_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
ACCEPT_PAUSE = 0.1  # seconds
Handler = Callable[[trio.SocketStream], Awaitable[object]]


def listen_at(host: str, ports: Sequence[int] = (), wished: int = 0) -> list[trio.SocketListener]:
    """Listen at an address, and at a port that is free.

    Args:
        host: An IP address of this machine; `::` listens on IPv4, too.
        ports: The ports to choose from; by default any.
        wished: The port to take if it is free.

    Raises:
        LabkitError: None of the ports is free, or the address is not this machine's.
    """
    failure: OSError | None = None
    for port in _in_turn(ports, wished):
        try:
            return [trio.SocketListener(_bound(host, port))]
        except OSError as error:
            failure = error
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                break
    raise LabkitError(f"cannot listen at {host}: {failure.strerror if failure else 'there is no port'}")


def _in_turn(ports: Sequence[int], wished: int) -> Iterable[int]:
    if wished and (not ports or wished in ports):
        yield wished
    yield from ports or (0,)


def _bound(host: str, port: int) -> trio.socket.SocketType:
    raw = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two programs have the same port
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in host:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        raw.bind((host, port))
        raw.listen(BACKLOG)
        return trio.socket.from_stdlib_socket(raw)
    except BaseException:
        raw.close()
        raise


async def accept_all(listener: trio.SocketListener, handler: Handler, nursery: trio.Nursery) -> None:
    """Start `handler` with each connection that comes, until the listener is closed. Cancelling closes it."""
    async with listener:
        while True:
            try:
                nursery.start_soon(handler, await listener.accept())
            except trio.ClosedResourceError:
                return
            except OSError as error:
                if error.errno not in ACCEPT_ERRNOS:
                    raise
                await trio.sleep(ACCEPT_PAUSE)  # no file is left: others have to be closed first


async def connect_to(host: str, port: int, timeout: float) -> trio.SocketStream:
    """Open a TCP connection.

    Args:
        host: A name or an IP address.
        port: The port.
        timeout: Seconds.

    Raises:
        ConnectionLost: There is none within that time.
    """
    try:
        with trio.fail_after(timeout):
            return await trio.open_tcp_stream(await resolve(host), port)
    except trio.TooSlowError:
        raise ConnectionLost(f"{host}:{port} took no connection within {timeout:g} s") from None
    except OSError as error:
        raise ConnectionLost(f"{host}:{port} took no connection ({error.strerror or error})") from None


def peer_host(stream: trio.SocketStream) -> str:
    """Returns the address at the other end of a connection; empty if it is gone."""
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return ""


def port_of(listener: trio.SocketListener) -> int:
    """Returns the port at which it listens."""
    return int(listener.socket.getsockname()[1])
