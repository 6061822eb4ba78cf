"""Addresses to listen on, and what others are told of them."""

from __future__ import annotations

import ipaddress
import socket

import trio

from labkit.errors import ConnectionLost

LOOPBACK = "tcp://127.0.0.1:*"


def split_address(address: str) -> tuple[str, str]:
    """`tcp://host:port` as host and port (a number or `*`). Raises `ValueError`."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = "0.0.0.0" if host == "*" else host.strip("[]")
    if not address.startswith("tcp://") or not host or not (port == "*" or (port.isdigit() and int(port) < 65536)):
        raise ValueError(f"listen={address!r} is not an address; write tcp://HOST:PORT, for example tcp://0.0.0.0:*")
    return host, port


async def resolve(host: str) -> str:
    """The IP address of a host. Raises `ConnectionLost` if there is none."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        ipaddress.ip_address(host)
        return host
    except ValueError:
        pass
    try:
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConnectionLost(f"the name {host} does not resolve ({error})") from None
    return str(found[0][4][0])


def announced_address(announce: str | None, host: str, port: int) -> tuple[str, int]:
    """The host and port to put into the contact of a node that is bound to `host` and `port`."""
    if announce is None:
        return (_own_address() if ipaddress.ip_address(host).is_unspecified else host), port
    name, colon, announced_port = announce.rpartition(":")
    if not colon or announce.endswith("]") or (":" in name and "[" not in name):  # no port, or an IPv6 address
        return announce.strip("[]"), port
    if not announced_port.isdigit():
        raise ValueError(f"announce={announce!r} is not an address; write HOST or HOST:PORT")
    return name.strip("[]"), int(announced_port)


def _own_address() -> str:
    """This machine's address on the interface of its default route; loopback if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: connecting a datagram socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
