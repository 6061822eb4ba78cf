"""The addresses of a node: where it listens, what others are told to call, and the way from a name to an IP address.

No batch passes here: `zmq_transport` asks when a node begins to listen, and when it makes a link.
"""

from __future__ import annotations

import ipaddress
import socket

import trio

from labkit.contact import is_host
from labkit.errors import ConnectionLost

LOOPBACK = "tcp://127.0.0.1:*"


def split_address(address: str) -> tuple[str, str]:
    """Split `tcp://host:port` into host and port (a number or `*`). Raises `ValueError` for anything else."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = "0.0.0.0" if host == "*" else host.strip("[]")
    if not address.startswith("tcp://") or not host or not (port == "*" or (port.isdigit() and int(port) < 65536)):
        raise ValueError(f"listen={address!r} is not an address; write tcp://HOST:PORT, for example tcp://0.0.0.0:*")
    return host, port


async def resolve(host: str) -> str:
    """Returns the IP address of a host. Raises `ConnectionLost` if its name does not resolve."""
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
    """Returns the host and port for the contact of a node that is bound to `host` and `port`.

    `announce`: the `HOST` or `HOST:PORT` that others should use; by default the bound one, and this machine's own
    address where that is 0.0.0.0 or ::. Raises `ValueError` if it is neither.
    """
    if announce is None:
        return (_own_address() if ipaddress.ip_address(host).is_unspecified else host), port
    form = f"announce={announce!r} is not an address; write HOST or HOST:PORT, such as 203.0.113.5:4000"
    if not isinstance(announce, str):
        raise ValueError(form)
    if "://" in announce:
        raise ValueError(f"{form} (without {announce.partition('://')[0]}://)")
    name, colon, announced_port = announce.rpartition(":")
    if colon and not announced_port:
        raise ValueError(form)
    if not colon or announce.endswith("]") or (":" in name and "[" not in name):  # no port, or an IPv6 address
        name, announced_port = announce, ""
    if announced_port and not (announced_port.isdigit() and 0 < int(announced_port) < 65536):
        raise ValueError(f"{form}; a port is between 1 and 65535")
    name = name.strip("[]")
    if not is_host(name):
        raise ValueError(form)
    if ipaddress_or_none(name) is None and ":" in name:
        raise ValueError(f"{form}; an IPv6 address as [2001:db8::5]:4000")
    if (address := ipaddress_or_none(name)) is not None and address.is_unspecified:
        raise ValueError(f"announce={announce!r}: others cannot call that; give the address at which they reach it")
    return name, int(announced_port) if announced_port else port


def ipaddress_or_none(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns an IP address, or None if the text is none."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _own_address() -> str:
    """Returns this machine's address on the interface of its default route; loopback if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: connecting a datagram socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
