"""A node's address: which one it announces, and what follows when it changes while the node runs."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from labkit import Swarm
from labkit.contact import Contact
from labkit.dht.node import DHTConfig
from labkit.directory import Directory
from labkit.errors import ConnectionLost, LabkitError, NoWay
from labkit.events import AddressChanged, Event, ReachabilityChanged
from labkit.expert_uid import ExpertInfo
from labkit.launch.child import ChildNews, ChildReport
from labkit.node import Node, NodeConfig, open_node
from labkit.server.serving import serve_experts as really_serve
from labkit.simulation.network import SimNetwork, open_simnet
from labkit.wire import addresses
from labkit.wire.addresses import (
    FAR_IPV4,
    FAR_IPV6,
    all_interfaces,
    find_own_address,
    find_way,
    further_addresses,
    own_addresses,
)
from labkit.wire.security import Identity
from labkit.wire.zmq_transport import open_network
from tests.fake_records import FakeRecords, contact
from tests.nodes import calling, changed, serving
from tests.ports import free_ports
from tests.swarms import eventually

pytestmark = pytest.mark.usefixtures("forked_python")

UP = SimpleNamespace(isup=True)
SMALL = NodeConfig(dht=DHTConfig(k=4))  # small enough that few nodes do not all know each other


@asynccontextmanager
async def swarm_of(
    network: SimNetwork, count: int, config: NodeConfig | None = None, events: list[Event] | None = None
) -> AsyncIterator[list[Node]]:
    """Runs nodes of one swarm, each joined through the first. `events` takes those of the last."""
    nodes: list[Node] = []
    async with AsyncExitStack() as stack:
        for number in range(count):
            emit = events.append if events is not None and number == count - 1 else lambda event: None
            join = [nodes[0].contact] if nodes else []
            opening = open_node(network, identity_of(number), config, join=join, emit=emit)
            nodes.append(await stack.enter_async_context(opening))
        yield nodes


def identity_of(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


async def found(node: Node, uid: str) -> ExpertInfo:
    """Where an expert is, as a node finds it when it looks anew."""
    await node.directory.refresh([uid])
    info = (await node.directory.find([uid]))[uid]
    assert info is not None
    return info


# ---------------------------------------------------------------- a move


async def test_a_node_that_moves_says_so_and_all_who_know_it_call_it_there(autojump_clock) -> None:
    events: list[Event] = []
    async with open_simnet(latency=0.02) as network, swarm_of(network, 5, events=events) as nodes:
        *others, moving = nodes
        before = moving.contact
        after = moving.move("127.0.9.9", 4000, "a test")
        assert moving.contact == moving.dht.contact == after and after.endpoint == "127.0.9.9:4000"
        changes = [(e.contact, e.before, e.reason) for e in events if isinstance(e, AddressChanged)]
        assert changes == [(after, before.endpoint, "a test")]
        await trio.sleep(1.0)
        assert [node.dht.routing.get(after.node_id) for node in others] == [after] * 4
        async with calling(network) as stranger:
            await stranger.call(after, "dht.ping", [None], timeout=1.0)
            with pytest.raises(ConnectionLost, match="refused"):
                await stranger.call(before, "dht.ping", [None], timeout=1.0)


async def test_in_a_large_swarm_too_nobody_is_left_who_calls_a_node_that_has_moved_at_its_old_address(
    autojump_clock,
) -> None:
    async with open_simnet(latency=0.02) as network, swarm_of(network, 14, SMALL) as nodes:
        moving, before = nodes[7], nodes[7].contact
        moving.move("127.0.9.9", 4000)
        await trio.sleep(1.0)
        for node in nodes:
            await node.dht.find_nodes([before.node_id])
        await trio.sleep(60.0)  # who had it from others has tried it by now
        for node in nodes:
            found = (await node.dht.find_nodes([before.node_id]))[before.node_id]
            assert [contact.endpoint for contact in found if contact.node_id == before.node_id] in (
                [],
                ["127.0.9.9:4000"],
            )
            assert node.dht.routing.get(before.node_id) in (None, moving.contact)


async def test_the_experts_of_a_node_that_moves_are_declared_anew_at_once_and_found_there(autojump_clock) -> None:
    async with open_simnet(latency=0.02) as network, swarm_of(network, 3) as (first, server, trainer):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.directory.keep_declared, ["ffn.0", "ffn.1"], server.contact)
            before = await found(trainer, "ffn.0")
            after = server.move("127.0.9.9", 4000)
            await trio.sleep(1.0)
            assert (await found(first, "ffn.1")).contact == (await found(trainer, "ffn.0")).contact == after
            assert (await found(trainer, "ffn.0")).stamp > before.stamp
            nursery.cancel_scope.cancel()
        await server.directory.withdraw(["ffn.0"], server.contact)
        assert "ffn.0" not in await trainer.directory.holders(["ffn.0"])


async def test_a_cache_never_goes_back_to_where_a_server_was_before_it_moved(autojump_clock) -> None:
    records, before = FakeRecords(), contact(1)
    after = changed(before, host="127.0.9.9")
    server, trainer = Directory(records), Directory(records)
    await server.declare(["ffn.0"], before)
    old = {key: dict(entries) for key, entries in records.records.items()}
    await server.declare(["ffn.0"], after)
    await trainer.refresh(["ffn.0"])
    records.records = old  # of a replica that did not hear of the second declaration
    await trainer.refresh(["ffn.0"])
    info = (await trainer.find(["ffn.0"]))["ffn.0"]
    assert info is not None and info.contact == after


async def test_who_calls_a_node_where_it_was_over_a_connection_from_then_is_told_where_it_is(autojump_clock) -> None:
    async with open_simnet(latency=0.02) as network, swarm_of(network, 2) as (caller, moving):
        before = moving.contact
        assert await caller.dht.peers.ping(before)
        moving.dht.routing.remove(caller.contact.node_id)  # so that it does not know whom to tell
        after = moving.move("127.0.9.9", 4000)
        await trio.sleep(1.0)
        assert caller.dht.routing.get(before.node_id) == before
        assert await caller.dht.peers.ping(before)
        await trio.sleep(1.0)
        assert caller.dht.routing.get(before.node_id) == after


async def test_a_node_that_does_not_encrypt_cannot_move_to_where_others_would_call_it(autojump_clock) -> None:
    async with open_simnet() as network, open_node(network, Identity.generate()) as node:
        with pytest.raises(ValueError, match="start it with secure=True"):
            node.move("192.0.2.7", 4000)
        with pytest.raises(ValueError, match="port is between"):
            node.move("127.0.0.9", 70_000)
        before = node.contact
        assert node.move(before.host, before.port) == before


def test_a_swarm_and_its_servers_follow_their_machine_and_servers_start_again_there(monkeypatch):
    here = ""

    async def find_own_address(host: str, toward: object = ()) -> str:
        return here or await addresses.find_own_address(host)

    joined: list[Contact] = []

    async def serve_experts(*args: Any, join: Sequence[Contact], **options: Any) -> None:
        joined.extend(join)
        await really_serve(*args, join=join, **options)

    monkeypatch.setattr("labkit.whereabouts.find_own_address", find_own_address)
    monkeypatch.setattr("labkit.whereabouts.LOOK_PERIOD", 0.05)
    monkeypatch.setattr("labkit.launch.runners.serve_experts", serve_experts)
    with Swarm("laptop", listen="tcp://0.0.0.0:*") as swarm:
        moves: list[AddressChanged] = []
        swarm.on_event(lambda event: moves.append(event) if isinstance(event, AddressChanged) else None)
        (handle,) = swarm.serve("nop", grid=(1,), isolation="task")
        assert len(set(hosts(swarm))) == 1
        here = "203.0.113.8"
        eventually(lambda: hosts(swarm) == ["203.0.113.8", "203.0.113.8"] and len(moves) == 2)
        assert len({event.contact.port for event in moves}) == 2
        handle.kill()
        handle.restart(wait=False)
        eventually(lambda: len(joined) == 2)
        assert joined[1].host == "203.0.113.8"


def test_a_server_process_tells_its_parent_what_is_new_about_its_address():
    server_contact = at("192.0.2.7")
    for event in (
        AddressChanged(contact=server_contact, before="192.0.2.1:4000", reason="this machine has another address"),
        ReachabilityChanged(contact=server_contact, state="not reachable", text="not reachable: a wall"),
    ):
        line = msgspec.json.encode(ChildReport(news=ChildNews.of(event)))
        told = msgspec.json.decode(line, type=ChildReport).news
        assert told is not None and replace(told.event, at=event.at) == event


def hosts(swarm: Swarm) -> list[str]:
    own = Contact.from_invitation(swarm.invite()).host
    return [own, *(server.contact.host for server in swarm.servers if server.contact is not None)]


# ---------------------------------------------------------------- which address is announced


@pytest.fixture
def machine(monkeypatch):
    """Gives this machine other interfaces and routes: addresses by interface, sources by destination."""

    def set_up(interfaces: dict[str, list[str]], routes: dict[str, str]) -> None:
        def family(address: str) -> socket.AddressFamily:
            return socket.AF_INET6 if ":" in address else socket.AF_INET

        found = {
            name: [SimpleNamespace(family=family(address), address=address) for address in entries]
            for name, entries in interfaces.items()
        }
        monkeypatch.setattr("psutil.net_if_addrs", lambda: found)
        monkeypatch.setattr("psutil.net_if_stats", lambda: dict.fromkeys(found, UP))
        monkeypatch.setattr("labkit.wire.addresses._source_address", routes.get)

    monkeypatch.setattr(addresses, "_own", None)
    return set_up


def at(host: str) -> Contact:
    return Contact(bytes(32), host, 4000)


async def test_a_node_announces_the_interface_by_which_it_reaches_whom_it_joins_else_that_of_the_default_route(machine):
    machine(
        {"lo": ["127.0.0.1", "::1"], "eth0": ["203.0.113.20"], "eth1": ["10.8.0.1", "fd00::8"]},
        {"203.0.113.10": "203.0.113.20", FAR_IPV4: "10.8.0.1", FAR_IPV6: "fd00::8", "127.0.0.1": "127.0.0.1"},
    )
    assert await find_own_address("0.0.0.0", [at("203.0.113.10")]) == "203.0.113.20"
    assert await find_own_address("0.0.0.0") == "10.8.0.1"
    assert await find_own_address("0.0.0.0", [at("127.0.0.1"), at("no.such.host.invalid")]) == "10.8.0.1"
    assert await find_own_address("::") == "fd00::8"
    assert await find_own_address("::", [at("203.0.113.10")]) == "203.0.113.20"  # it listens there, too
    assert await find_own_address("0.0.0.0", [at("2001:db8::5")]) == "10.8.0.1"
    assert await find_own_address("10.8.0.1", [at("203.0.113.10")]) == "10.8.0.1"  # it listens nowhere else


async def test_without_a_default_route_it_announces_what_it_has_that_of_containers_last_and_loopback_never(machine):
    machine({"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": ["169.254.3.4", "10.9.0.1"]}, {})
    assert await find_own_address("0.0.0.0") == await find_own_address("::") == "10.9.0.1"
    machine({"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": ["fe80::1%eth0", "2001:db8::6"]}, {})
    assert await find_own_address("0.0.0.0") == "172.17.0.1"
    assert await find_own_address("::") == "2001:db8::6"
    machine({"lo": ["127.0.0.1", "::1"]}, {})
    assert await find_own_address("0.0.0.0") == "127.0.0.1"  # there is nothing else


def test_interfaces_are_read_anew_when_the_machine_calls_others_from_another_address_and_now_and_then(
    machine, monkeypatch
):
    routes = {FAR_IPV4: "10.9.0.1"}
    machine({"eth0": ["10.9.0.1"]}, routes)
    assert own_addresses() == {"10.9.0.1"}
    machine({"eth0": ["10.9.0.1"], "eth1": ["10.8.0.1"]}, routes)
    assert own_addresses() == {"10.9.0.1"}, "for some seconds"
    with monkeypatch.context() as later:
        later.setattr(addresses, "READ_ANEW", 0.0)
        assert own_addresses() == {"10.9.0.1", "10.8.0.1"}
    machine({"eth0": ["10.7.0.1", "fd00::7"]}, {FAR_IPV4: "10.7.0.1", FAR_IPV6: "fd00::7"})
    assert own_addresses() == {"10.7.0.1", "fd00::7"}, "at once"


def test_further_addresses_are_those_of_the_other_ip_version_first_and_none_that_is_no_use(machine, monkeypatch):
    monkeypatch.setattr(addresses, "READ_ANEW", -1.0)
    machine(
        {
            "lo": ["127.0.0.1", "::1"], "docker0": ["172.17.0.1", "2001:db8:d::1"], "eth0": ["203.0.113.20", "fe80::2"],
            "eth1": ["10.8.0.1", "fd00::8", "2001:db8::8"], "eth2": ["169.254.1.2", "8.8.4.4"],
        },
        {FAR_IPV4: "10.8.0.1", FAR_IPV6: "fd00::8"},
    )  # fmt: skip
    assert further_addresses("::", "203.0.113.20") == ("fd00::8", "10.8.0.1", "8.8.4.4")
    assert further_addresses("::", "8.8.4.4") == ("10.8.0.1", "203.0.113.20")  # fd00::8 is private, and it is not
    assert further_addresses("::", "2600::8") == ("8.8.4.4",)  # 10.8.0.1 is behind a router
    assert further_addresses("::", "2001:db8::8") == ("10.8.0.1", "8.8.4.4", "203.0.113.20")
    assert further_addresses("0.0.0.0", "203.0.113.20") == ("10.8.0.1", "8.8.4.4")
    assert further_addresses("203.0.113.20", "203.0.113.20") == ()  # it listens nowhere else
    assert further_addresses("::", "::1") == ()
    machine({"lo": ["127.0.0.1", "::1"], "docker0": ["172.17.0.1"], "eth0": ["fe80::2", "2001:db8::6"]}, {})
    assert further_addresses("::", "2001:db8::6") == ()


async def test_who_calls_takes_the_first_address_to_which_this_machine_has_a_way(machine, monkeypatch):
    monkeypatch.setattr(addresses, "READ_ANEW", -1.0)
    both, there = ("203.0.113.10", 4000), ("2001:db8::10", 4001)
    machine({"eth0": ["203.0.113.20"]}, {both[0]: "203.0.113.20"})
    assert await find_way([both, there]) == await find_way([there, both]) == both
    assert await find_way([("no.such.host.invalid", 1), both]) == both
    with pytest.raises(NoWay, match="2001:db8::10 has only an IPv6 address, and this machine has none; a relay that"):
        await find_way([("no.such.host.invalid", 1), there])
    with pytest.raises(NoWay, match=r"no route to 10.9.0.2 or 2001:db8::10; a relay that has one would connect them"):
        await find_way([("10.9.0.2", 1), there])
    machine({"eth0": ["2001:db8::20"]}, {there[0]: "2001:db8::20"})
    assert await find_way([both, there]) == there
    machine({"eth0": ["10.8.0.1", "fd00::8"]}, {"2600::8": "fd00::8", "fd00::9": "fd00::8", "8.8.4.4": "10.8.0.1"})
    assert await find_way([("2600::8", 1), ("8.8.4.4", 2)]) == ("8.8.4.4", 2)
    assert await find_way([("2600::8", 1), both]) == await find_way([("2600::8", 1)]) == ("2600::8", 1)
    assert await find_way([("fd00::9", 1), ("8.8.4.4", 2)]) == ("fd00::9", 1)
    machine({"eth0": ["2001:db8::20"]}, {there[0]: "2001:db8::20"})
    with pytest.raises(NoWay, match=r"203.0.113.10 has only an IPv4 address, and this machine has none"):
        await find_way([both])
    machine({"lo": ["127.0.0.1"]}, {})
    with pytest.raises(NoWay, match="no network address but loopback"):
        await find_way([both, there])
    with pytest.raises(ConnectionLost, match="does not resolve"):
        await find_way([("no.such.host.invalid", 1)])


async def test_a_node_is_called_at_the_further_address_where_there_is_no_way_to_the_first(monkeypatch):
    monkeypatch.setattr(addresses, "_has_way", lambda ip: ip != "127.0.0.9")
    async with open_network() as network, serving(network, address="tcp://[::1]:*") as endpoint:
        contact = changed(endpoint.contact, host="127.0.0.9", also=(endpoint.bound,))
        async with calling(network) as client:
            assert (await client.call(contact, "echo", 1, timeout=5.0)).body == 1
            client.endpoint.find_passage = passage = Passage(endpoint.bound)
            nowhere = changed(contact, also=())
            assert (await client.call(nowhere, "echo", 2, timeout=5.0)).body == 2 and passage.asked == [nowhere]
            client.endpoint.find_passage = Passage(None)
            client.forget_all()
            with pytest.raises(NoWay, match=r"127.0.0.9"):
                await client.call(nowhere, "echo", 3, timeout=5.0)


class Passage:
    """Where else a node is called."""

    def __init__(self, at):
        self.at, self.asked = at, []

    async def __call__(self, contact):
        self.asked.append(contact)
        await trio.lowlevel.checkpoint()
        return self.at


async def test_a_node_that_listens_at_all_interfaces_announces_its_further_addresses_with_its_port(monkeypatch):
    monkeypatch.setattr("labkit.wire.zmq_transport.further_addresses", lambda host, first: ("2001:db8::6",))
    async with open_network() as network:
        async with network.listen(Identity.generate(), "tcp://[::]:*", secure=True) as endpoint:
            assert endpoint.contact.also == (("2001:db8::6", endpoint.bound[1]),)
        async with network.listen(Identity.generate(), "tcp://[::]:*", announce="lab.example", secure=True) as endpoint:
            assert endpoint.contact.also == ()  # a name has both by itself


def test_an_invitation_for_the_same_machine_never_advises_what_was_done_already(machine):
    machine({"lo": ["127.0.0.1"]}, {})
    with Swarm("no-network", listen="tcp://0.0.0.0:*") as swarm:
        note = swarm.invite().note
        assert "same machine only" in note and "no network address but loopback" in note and "listen=" not in note
    with Swarm("loopback", announce="127.0.0.1") as swarm:
        assert "announce=" in swarm.invite().note and "listen=" not in swarm.invite().note
    with Swarm("small") as swarm:
        assert 'listen="tcp://0.0.0.0:*"' in swarm.invite().note


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "::"])
async def test_a_node_that_listens_on_all_interfaces_of_ipv6_is_reached_by_ipv4_too(host):
    address = f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"
    reached = {"0.0.0.0": ["127.0.0.1"], "::": ["::1", "127.0.0.1"]}.get(host, [host])
    async with open_network() as network, serving(network, address=address) as endpoint, calling(network) as client:
        for way in reached:
            reply = await client.call(changed(endpoint.contact, host=way), "echo", way, timeout=5.0)
            assert reply.body == way
        assert endpoint.contact.host not in ("0.0.0.0", "::")


def test_who_joins_listens_at_all_interfaces_of_both_ip_versions_where_the_system_can(monkeypatch):
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: True)
    assert all_interfaces() == "tcp://[::]:*"
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    assert all_interfaces() == "tcp://0.0.0.0:*"


class Names(trio.abc.HostnameResolver):
    """Resolves every name to the same addresses, in this trio run."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        trio.socket.set_custom_hostname_resolver(self)

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):
        entry = (socket.SOCK_STREAM, 6, "")
        return [(socket.AF_INET, *entry, (address, port or 0)) for address in self.addresses]

    async def getnameinfo(self, sockaddr, flags):
        raise NotImplementedError


async def test_a_name_with_several_addresses_leads_to_the_one_that_answers():
    Names("127.0.0.9", "127.0.0.1")
    async with open_network() as network, serving(network) as endpoint, calling(network) as client:
        named = changed(endpoint.contact, host="twice.example.org")
        assert (await client.call(named, "echo", 1, timeout=5.0)).body == 1


async def test_a_name_that_means_loopback_only_to_the_machine_itself_is_not_listened_at():
    Names("127.0.1.1")  # as Debian has it
    async with open_network() as network:
        with pytest.raises(LabkitError, match=r"myhost means 127.0.1.1 on this machine itself.*tcp://0.0.0.0:\*"):
            async with serving(network, address="tcp://myhost:*"):
                pass
        async with serving(network, address="tcp://my.localhost:*", secure=True) as endpoint:
            assert endpoint.contact.host == "127.0.1.1"
        Names("127.0.1.1", "127.0.0.1", "203.0.113.77")
        with pytest.raises(LabkitError, match="no such address"):  # it is tried: the name has an address for others
            async with serving(network, address="tcp://myhost:*"):
                pass


# ---------------------------------------------------------------- ranges of ports


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("tcp://0.0.0.0:31099-31000", "its first and its last one"), ("tcp://0.0.0.0:0-10", "its first and its last"),
        ("tcp://0.0.0.0:31000-", "its first and its last"), ("tcp://0.0.0.0:31000-70000", "is not an address"),
        ("tcp://0.0.0.0:-5", "is not an address"), ("tcp://a:b:*", r"tcp://\[::\]:\*"), ("0.0.0.0:4000", "is not an"),
        ("tcp://0.0.0.0:²", "is not an address"), (4000, "is not an address"), ("tcp://a b:*", "is not an address"),
    ],
)  # fmt: skip
def test_a_wrong_address_to_listen_at_is_told_with_the_right_form(address, said):
    with pytest.raises(ValueError, match=said):
        NodeConfig(listen=address)


async def test_each_node_takes_the_first_free_port_of_a_range_and_the_last_is_told_that_there_is_none():
    first = free_ports(2)
    address = f"tcp://127.0.0.1:{first}-{first + 1}"
    async with open_network() as network, serving(network, address=address) as one:
        async with serving(network, address=address) as other:
            assert [one.contact.port, other.contact.port] == [first, first + 1]
            with pytest.raises(LabkitError, match=f"{first}-{first + 1}: all 2 ports are in use.*a larger range"):
                async with serving(network, address=address):
                    pass


def ports_taken(swarm: Swarm) -> list[int]:
    return [server.contact.port for server in swarm.servers if server.contact is not None]


@pytest.mark.parametrize("isolation", ["task", "process"])
def test_the_servers_of_a_swarm_listen_in_its_range_of_ports_after_a_restart_too(isolation):
    first = free_ports(3)
    ports = range(first, first + 3)
    with Swarm("firewalled", listen=f"tcp://127.0.0.1:{first}-{first + 2}") as swarm:
        servers = swarm.serve("nop", grid=(2,), servers=2 if isolation == "task" else 1, isolation=isolation)
        swarm_port = Contact.from_invitation(swarm.invite()).port
        taken = ports_taken(swarm)
        assert len({swarm_port, *taken}) == 1 + len(servers) and {swarm_port, *taken} <= set(ports)
        servers[0].kill()
        servers[0].restart()
        assert ports_taken(swarm) == taken
        with pytest.raises(ValueError, match=r"has 3 ports, and \d servers need one each.*range of at least \d"):
            swarm.serve("nop", name="more", grid=(4,), servers=4, isolation="task")
        assert "more" not in swarm.grids()


def test_one_port_for_several_servers_is_an_error_that_says_so():
    port = free_ports()
    with Swarm("one port", listen=f"tcp://127.0.0.1:{port}") as swarm:
        with pytest.raises(ValueError, match=f"the one port.*2 servers need one each.*127.0.0.1:{port}-{port + 2}"):
            swarm.serve("nop", grid=(2,), servers=2, isolation="task")
        swarm.serve("nop", grid=(1,), isolation="task")
        with pytest.raises(ValueError, match="the one port"):
            swarm.serve("nop", name="more", grid=(1,), isolation="task")
