"""The addresses of a node: where it listens, what others are told to call, and the way from a name to an IP address.

No batch passes here: `zmq_transport` asks when a node begins to listen, and when it makes a link; `reachability` asks
now and then whether this machine has another address by now.

Order: what a user gives (`split_address`, `announced_address`), names, the way to a node, this machine's own addresses.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import trio

from labkit.contact import MAX_ALSO, Address, Contact, is_further_address, is_host, is_loopback
from labkit.errors import ConnectionLost, NoWay

LOOPBACK = "tcp://127.0.0.1:*"
FAR_IPV4, FAR_IPV6 = "198.51.100.1", "2001:db8::1"  # for documentation: no machine has them
VIRTUAL = ("docker", "br-", "veth", "virbr", "vmnet", "vboxnet", "cni", "flannel", "cali", "lxc", "podman", "ifb")
READ_ANEW = 30.0  # seconds after which all interfaces of this machine are read again
RESOLVE_TIMEOUT = 1.5  # seconds to resolve the name of a node to join, before it is known whether that is needed


def split_address(address: str) -> tuple[str, str]:
    """Split an address to listen at.

    Args:
        address: `tcp://host:port`, where the port may be `*` for any that is free, or a range such as `31000-31099`.

    Returns:
        The host, and the port as it is written.

    Raises:
        ValueError: It is no such address.
    """
    host, _, port = str(address).removeprefix("tcp://").rpartition(":")
    host = "0.0.0.0" if host == "*" else host.removeprefix("[").removesuffix("]")
    form = f"listen={address!r} is not an address; write tcp://HOST:PORT, for example tcp://0.0.0.0:*"
    if not isinstance(address, str) or not address.startswith("tcp://") or not is_host(host):
        raise ValueError(form)
    if ":" in host and ipaddress_or_none(host) is None:
        raise ValueError(f"{form}; an IPv6 address as tcp://[::]:*")
    first, dash, last = port.partition("-")
    if port != "*" and not all(
        part.isascii() and part.isdigit() and int(part) < 65536 for part in (first, last or "0")
    ):
        raise ValueError(form)
    if dash and not (last and 0 < int(first) <= int(last)):
        raise ValueError(f"listen={address!r}: a range of ports is its first and its last one, such as 31000-31099")
    return host, port


def all_interfaces() -> str:
    """Returns where to listen so that others can call back: at all interfaces, of IPv4 and IPv6 if the system can."""
    return "tcp://[::]:*" if socket.has_dualstack_ipv6() else "tcp://0.0.0.0:*"


def ports_of(port: str) -> range | None:
    """Returns the ports that an address allows, from what `split_address` returned; None if it may be any free one."""
    if port in ("*", "0"):
        return None
    first, _, last = port.partition("-")
    return range(int(first), int(last or first) + 1)


def announced_address(announce: str | None, host: str, port: int) -> tuple[str, int]:
    """Returns the host and port for the contact of a node.

    Args:
        announce: The `HOST` or `HOST:PORT` that others should use; None for `host` and `port`.
        host: What it announces otherwise.
        port: The port that it is bound to.

    Raises:
        ValueError: `announce` is neither.
    """
    if announce is None:
        return host, port
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


# ---------------------------------------------------------------- names


def ipaddress_or_none(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns an IP address, or None if the text is none."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def plain_ip(address: str) -> str:
    """Returns 10.0.0.7 for ::ffff:10.0.0.7, which is how an IPv6 socket sees it; others as they are."""
    ip = ipaddress_or_none(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped) if mapped is not None else address


async def resolve(host: str, port: int | None = None) -> str:
    """Returns the IP address of a host.

    Args:
        host: Its name, or its IP address, which is returned as it is.
        port: If the name has several addresses, as of IPv4 and IPv6, the first one that accepts connections at this
            port is returned; without a port, the first one.

    Raises:
        ConnectionLost: Its name does not resolve.
    """
    if ipaddress_or_none(host) is not None:
        return host
    found = await _addresses_of(host)
    if len(found) > 1 and port is not None:
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError:
            pass  # the first will say why
        else:
            peer = str(stream.socket.getpeername()[0])
            await trio.aclose_forcefully(stream)
            return peer
    return next(filter(_has_way, found), found[0])


async def resolve_to_listen(host: str) -> str:
    """Returns the IP address of this machine to bind, of the name or address that a user gave.

    Raises:
        ConnectionLost: The name does not resolve, or leads to this machine's loopback although it is not called so.
    """
    found = [host] if ipaddress_or_none(host) is not None else await _addresses_of(host)
    beyond = [address for address in found if not is_loopback(address)]
    if not beyond and found != [host] and "localhost" not in host:
        raise ConnectionLost(f"the name {host} means {found[0]} on this machine itself, where no other can call it")
    return (beyond or found)[0]


async def _addresses_of(host: str) -> list[str]:
    if host == "localhost":
        return ["127.0.0.1"]
    try:
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConnectionLost(f"the name {host} does not resolve ({error})") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


# ---------------------------------------------------------------- the way to a node


async def find_way(addresses: Sequence[Address]) -> Address:
    """Returns the IP address and the port at which this machine calls a node: the first to which it has a way.

    A way from a private IPv6 address to a public one is taken only if there is no other, since it seldom leads there.
    Nothing is sent to find that out, except for a name with several addresses (see `resolve`).

    Args:
        addresses: Hosts and ports of the node, as in `Contact.addresses`.

    Raises:
        NoWay: There is none to any of them. The text says why.
        ConnectionLost: The name does not resolve.
    """
    found: list[str] = []
    doubtful: Address | None = None
    failure: ConnectionLost | None = None
    for host, port in addresses:
        try:
            ip = await resolve(host, port)
        except ConnectionLost as error:
            failure = error
            continue
        if _has_way(ip):
            if len(addresses) == 1 or not _is_doubtful(ip):
                return ip, port
            doubtful = doubtful or (ip, port)
        found.append(ip)
    if doubtful is not None:
        return doubtful
    if failure is not None and not found:
        raise failure
    raise NoWay(why_no_way(found))


def why_no_way(hosts: Sequence[str]) -> str:
    """Says why this machine has no way to any of these IP addresses."""
    at_a_host = "labkit relay --join INVITE at such a host"
    if not own_addresses():
        return f"this machine has no network address but loopback, and so no way to {hosts[0]}"
    if has_version_of(hosts):
        there = " or ".join(hosts)
        return f"this machine has no route to {there}; a relay that has one would connect them: {at_a_host}"
    return (
        f"{hosts[0]} has only an {'IPv6' if ':' in hosts[0] else 'IPv4'} address, and this machine has none; a relay "
        f"that has both would connect them: {at_a_host}"
    )


def has_version_of(hosts: Iterable[str]) -> bool:
    """Whether this machine has an address of the same IP version as one of these hosts. A name may be of both."""
    own = {_family(address) for address in own_addresses()}
    return any(ipaddress_or_none(host) is None or _family(host) in own for host in hosts)


def _has_way(ip: str) -> bool:
    return is_loopback(ip) or _source_address(ip) is not None


def _is_doubtful(ip: str) -> bool:
    """Whether a public IPv6 address would be called from a private one (RFC 6724 takes IPv4 then, too)."""
    source = _source_address(ip) if ":" in ip and ipaddress.ip_address(ip).is_global else None
    return source is not None and not ipaddress.ip_address(source).is_global


# ---------------------------------------------------------------- this machine's own addresses


async def find_own_address(host: str, toward: Iterable[Contact] = ()) -> str:
    """Returns what a node announces that listens at `host`.

    That is `host`, unless it means all interfaces. Then it is the address of the interface 1. by which this machine
    reaches the nodes that are joined, 2. of its default route; 3. any global or private address that it has, those of
    virtual machines and containers last. Loopback it is only where there is nothing else.

    Args:
        host: An IP address.
        toward: The nodes to join.
    """
    ip = ipaddress.ip_address(host)
    if not ip.is_unspecified:
        return host
    families = [socket.AF_INET] if ip.version == 4 else [socket.AF_INET6, socket.AF_INET]
    joined: list[str] = []
    with trio.move_on_after(RESOLVE_TIMEOUT):
        for contact in toward:
            try:
                joined.append(await resolve(contact.host))
            except ConnectionLost:
                continue
    far = [FAR_IPV6 if family == socket.AF_INET6 else FAR_IPV4 for family in families]
    for there in (*joined, *far):  # 1, 2
        here = _source_address(there)
        if here is not None and _family(here) in families and not is_loopback(here):
            return here
    for family in families:  # 3
        for address in interface_addresses(family):
            return address
    return "::1" if families == [socket.AF_INET6] else "127.0.0.1"


def further_addresses(host: str, first: str) -> tuple[str, ...]:
    """Returns under which other addresses a node is reached that listens at `host`, the best first.

    Those of the other family come before others of the same one, the one of the default route first, then those that
    are part of the internet. None are loopback or link-local ones, or those of virtual machines and containers; and
    none of the other family is private if the first is not, since a router translates it then for all who are far.

    Args:
        host: An IP address; only where it means all interfaces there are any.
        first: What it announces in the first place.
    """
    ip = ipaddress.ip_address(host)
    if not ip.is_unspecified or is_loopback(first):
        return ()
    found: list[str] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        if family == socket.AF_INET6 and (ip.version == 4 or family == _family(first)):
            continue
        some = [address for address, virtual in _known_interfaces() if not virtual and _family(address) == family]
        there = _source_address(FAR_IPV6 if family == socket.AF_INET6 else FAR_IPV4)
        some.sort(key=lambda address: (address != there, not ipaddress.ip_address(address).is_global))
        found += some[:1] if family == socket.AF_INET6 else some  # since one interface may have many of IPv6
    public = ipaddress.ip_address(first).is_global
    usable = [
        address for address in found
        if address != first and is_further_address(address)
        and not (public and _family(address) != _family(first) and not ipaddress.ip_address(address).is_global)
    ]  # fmt: skip
    usable.sort(key=lambda address: _family(address) == _family(first))
    return tuple(usable[:MAX_ALSO])


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _source_address(there: str) -> str | None:
    """Returns the address from which this machine would call another; None if it has no way there."""
    try:
        with socket.socket(_family(there), socket.SOCK_DGRAM) as probe:
            probe.connect((there, 9))  # which sends nothing, as it is a datagram socket
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_addresses(family: socket.AddressFamily) -> list[str]:
    """Returns the addresses of this machine's interfaces that are up, the likeliest to be reached by others first.

    None are loopback ones, and none are link-local, which mean nothing to other machines.
    """
    return [address for address, _ in sorted(_interfaces(family), key=lambda found: found[1])]


def _interfaces(family: socket.AddressFamily) -> Iterator[tuple[str, bool]]:
    """Yields each address, and whether its interface is one of virtual machines or containers."""
    import psutil  # it is needed by few nodes

    states = psutil.net_if_stats()
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            ip = ipaddress_or_none(entry.address) if entry.family == family else None
            up = name not in states or states[name].isup
            if ip is not None and up and not (ip.is_loopback or ip.is_link_local or ip.is_unspecified):
                yield entry.address, name.startswith(VIRTUAL)


def own_addresses() -> set[str]:
    """Returns all addresses of this machine's interfaces but loopback and link-local ones."""
    return {address for address, _ in _known_interfaces()}


def _known_interfaces() -> Sequence[tuple[str, bool]]:
    """Returns what `_interfaces` yields, of both IP versions.

    Nodes ask every few seconds, and reading all interfaces takes long on a machine with hundreds of them. So they are
    read anew when this machine would call others from another address, and else now and then.
    """
    global _own
    routes, now = (_source_address(FAR_IPV4), _source_address(FAR_IPV6)), time.monotonic()
    if _own is None or _own.routes != routes or now > _own.read_at + READ_ANEW:
        found = [entry for family in (socket.AF_INET, socket.AF_INET6) for entry in _interfaces(family)]
        _own = _OwnAddresses(found, routes, now)
    return _own.addresses


@dataclass(frozen=True, slots=True)
class _OwnAddresses:
    """This machine's addresses, from which of them it would call others, and when they were read."""

    addresses: Sequence[tuple[str, bool]]
    routes: tuple[str | None, str | None]
    read_at: float


_own: _OwnAddresses | None = None
