"""Nodes that take no connections find a relay by themselves, take another when it is gone, and serve through it."""

from __future__ import annotations

import logging
from functools import partial

import msgspec
import pytest
import torch
import trio
import trio.testing

import labkit as lk
from labkit.contact import Contact
from labkit.dht.node import Entry
from labkit.errors import RequestRefused
from labkit.events import AddressChanged, RelayChanged, ignore
from labkit.node import NodeConfig
from labkit.reachability import Reach, Reachability, ReachReply, ask
from labkit.relay import keeper, relaying
from labkit.relay.finding import RELAYS_KEY, RelayRecord, find_relays
from labkit.relay.limits import RelayLimits
from labkit.relay.messages import RESERVE_FOR, Reserve, ReserveFor
from labkit.relay.neighbours import Shortcuts
from labkit.wire.rpc_types import Reply
from labkit.wire.security import Identity, key_text
from labkit.wire.zmq_transport import open_network
from tests.nodes import changed
from tests.relays import start_node
from tests.swarms import eventually, soon

pytestmark = pytest.mark.usefixtures("forked_python")

RELAY = NodeConfig(secure=True, relay=RelayLimits())
HIDDEN = NodeConfig(secure=True, hidden=True)


@pytest.fixture
async def start():
    """Starts a node, each time it is called."""
    async with open_network() as network, trio.open_nursery() as nursery:
        yield partial(start_node, network, nursery)
        nursery.cancel_scope.cancel()


def relays_of(running) -> list[str]:
    return [event.relay for event in running.events if isinstance(event, RelayChanged)]


async def test_a_hidden_node_is_reached_through_whom_it_has_joined(start):
    relay = await start(RELAY)
    hidden = await start(HIDDEN, [relay.node.contact])
    other = await start(join=[relay.node.contact])
    assert hidden.node.relaying.words == f"it takes no connections itself: relayed by {relay.node.contact.endpoint}"
    assert relay.node.relaying.words == "relays for 1 node"
    assert [client.port for client in relay.node.relaying.server.clients] == [hidden.node.contact.port]
    assert await other.node.dht.peers.ping(hidden.node.contact)
    assert relays_of(hidden) == [relay.node.contact.endpoint]
    moves = [event.reason for event in hidden.events if isinstance(event, AddressChanged)]
    assert moves == [f"relayed by {relay.node.contact.endpoint}"]


async def test_a_hidden_node_finds_a_relay_in_the_dht_and_stays_hidden_from_nobody(start):
    first = await start()
    relay = await start(RELAY, [first.node.contact])
    await soon(lambda: find_relays(first.node.dht, 1))
    one = await start(HIDDEN, [first.node.contact])
    two = await start(HIDDEN, [first.node.contact])
    assert one.node.relaying.relay == two.node.relaying.relay == relay.node.contact
    one.node.directory.declare_anew()
    await one.node.directory.declare(["ffn.0.0"], one.node.contact)
    found = (await two.node.directory.find(["ffn.0.0"]))["ffn.0.0"]
    assert found is not None and found.contact == one.node.contact
    assert await two.node.dht.peers.ping(found.contact)


async def test_when_a_relay_is_gone_its_clients_take_another_and_are_found_there(start):
    first = await start()
    relays = [await start(RELAY, [first.node.contact]) for _ in range(2)]
    await soon(lambda: both_known(first.node.dht))
    hidden = await start(HIDDEN, [first.node.contact])
    before = hidden.node.relaying.relay
    gone, left = sorted(relays, key=lambda relay: relay.node.contact != before)

    async def is_found_anew():
        found = (await first.node.directory.look_up(["ffn.0"]))["ffn.0"].experts.get(0)
        at_the_other = hidden.node.relaying.relay == left.node.contact
        return at_the_other and found is not None and found.contact == hidden.node.contact

    async with trio.open_nursery() as nursery:
        await nursery.start(hidden.node.directory.keep_declared, ["ffn.0.0"], hidden.node.contact)
        gone.scope.cancel()
        await soon(is_found_anew, timeout=10)
        nursery.cancel_scope.cancel()
    assert await first.node.dht.peers.ping(hidden.node.contact)
    assert relays_of(hidden) == [gone.node.contact.endpoint, "", left.node.contact.endpoint]


async def both_known(dht) -> bool:
    return len(await find_relays(dht, 1)) == 2


async def test_a_node_without_a_relay_says_so_and_takes_the_first_that_comes(start, caplog, monkeypatch):
    monkeypatch.setattr(keeper, "LONGEST_PAUSE", 0.2)
    first = await start()
    with caplog.at_level(logging.WARNING):
        hidden = await start(HIDDEN, [first.node.contact])
    assert "Others cannot call this node. Let a host that they reach relay: labkit relay" in caplog.text
    assert f"({first.node.contact.endpoint} is no relay)" in hidden.node.relaying.words
    assert hidden.node.relaying.relay is None and relays_of(hidden) == [""]
    relay = await start(RELAY, [first.node.contact])
    await soon(lambda: is_relayed(hidden))
    assert relays_of(hidden) == ["", relay.node.contact.endpoint]


async def is_relayed(running) -> bool:
    return running.node.relaying.relay is not None


async def test_a_relay_through_which_nobody_reaches_the_node_is_left_for_another(start):
    relays = [await start(RELAY)]
    relays.append(await start(RELAY, [relays[0].node.contact]))
    running = await start(join=[relay.node.contact for relay in relays])
    node, contacts = running.node, [relay.node.contact for relay in relays]
    where = FakeWhereabouts(node.contact)
    async with trio.open_nursery() as nursery:
        follow = node.relaying.follow
        await nursery.start(follow, True, where, node.client, node.dht, contacts, node.move, ignore)
        first = node.relaying.relay
        where.say(Reach.NO, node.contact)
        await soon(lambda: is_relayed_by(node, next(contact for contact in contacts if contact != first)))
        nursery.cancel_scope.cancel()


async def is_relayed_by(node, contact) -> bool:
    return bool(node.relaying.relay == contact)


class FakeWhereabouts:
    """Says what a test wants about whether others reach a node."""

    def __init__(self, direct):
        self.direct, self.news, self.settled = direct, trio.Event(), trio.Event()
        self.say(Reach.UNKNOWN)

    def say(self, state, contact=None):
        self.now = Reachability(state, contact or self.direct, "as the test says")
        self.settled.set()
        self.news.set()
        self.news = trio.Event()

    def ask_again(self):
        pass

    async def try_direct(self):
        await trio.lowlevel.checkpoint()
        return self.now


async def test_a_node_takes_a_relay_when_others_do_not_reach_it_and_leaves_it_when_they_do(start):
    relay = await start(RELAY)
    running = await start(join=[relay.node.contact])
    node, direct = running.node, running.node.contact
    where = FakeWhereabouts(direct)
    async with trio.open_nursery() as nursery:
        follow = node.relaying.follow
        await nursery.start(follow, None, where, node.client, node.dht, [relay.node.contact], node.move, ignore)
        assert node.relaying.words == ""
        where.say(Reach.NO)
        assert await node.relaying.settle(where, 5)
        assert node.relaying.relay == relay.node.contact and node.contact != direct
        where.say(Reach.NO)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert node.relaying.relay is not None
        where.say(Reach.YES)
        await soon(lambda: is_at(node, direct))
        assert node.relaying.words == "" and not await node.relaying.settle(where, 5)
        nursery.cancel_scope.cancel()


async def is_at(node, contact) -> bool:
    return bool(node.contact == contact)


async def test_what_a_relayed_node_reaches_says_nothing_of_whether_others_do():
    class Relayed:
        """A node that is called through a relay, and so sees all calls come from its own machine."""

        async def call(self, *_, **__):
            await trio.lowlevel.checkpoint()
            return Reply(ReachReply(True, "127.0.0.1"))

    helper, ours = (Contact(Identity.generate().public_key, host, 4000) for host in ("192.0.2.1", "192.168.1.2"))
    assert await ask(Relayed(), helper, ours) is None  # type: ignore[arg-type]


async def test_a_node_that_is_never_to_be_relayed_is_not(start):
    relay = await start(RELAY)
    hidden = await start(NodeConfig(secure=True, hidden=False), [relay.node.contact])
    hidden.node.whereabouts._say(Reachability(Reach.NO, hidden.node.contact, "not reachable"))
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert hidden.node.relaying.keeper is None


async def test_a_record_of_a_relay_that_makes_no_sense_is_ignored(start):
    first = await start(RELAY)
    await soon(lambda: find_relays(first.node.dht, 1))
    contact = first.node.contact
    unsafe = changed(contact, host="192.0.2.1", secure=False)
    bad = {"00" * 32: RelayRecord(contact, 1), "what": b"\xc1", contact.key.hex()[::-1]: RelayRecord(unsafe, 1)}
    entries = [Entry(RELAYS_KEY, msgspec.msgpack.encode(value), 60, subkey) for subkey, value in bad.items()]
    await first.node.dht.store_many(entries)
    assert await find_relays(first.node.dht, 1) == [contact]


def test_a_node_that_takes_no_connections_cannot_relay():
    with pytest.raises(ValueError, match="cannot relay for others"):
        NodeConfig(hidden=True, relay=RelayLimits())


# ---------------------------------------------------------------- whole swarms


@pytest.fixture
def apart(monkeypatch):
    """Relayed nodes do not find out that they are in one network."""

    async def look(self, relay):
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Shortcuts, "look", look)


@pytest.fixture
def often(monkeypatch):
    """They look for neighbours all the time."""
    monkeypatch.setattr(relaying, "NEIGHBOURS_PERIOD", 0.1)


@pytest.fixture
def two_hidden():
    """A relay and two swarms that take no connections."""
    with (
        lk.Swarm("relay", relay=True, secure=True) as relay,
        lk.Swarm.join(relay.invite(), name="one", node=NodeConfig(hidden=True)) as one,
        lk.Swarm.join(relay.invite(), name="two", node=NodeConfig(hidden=True)) as two,
    ):
        yield relay, one, two


def test_two_hidden_swarms_train_each_others_experts_and_their_own_directly(apart, two_hidden):
    relay, one, two = two_hidden
    one.serve("ffn", hidden=16, grid=(2, 2), isolation="task")
    held = relay._node.relaying.server.held
    x = torch.randn(4096, 16)
    for swarm, relayed in ((two, True), (one, False)):
        before = held.passed
        swarm.moe(16, grid=(2, 2), k_best=2)(x).sum().backward()
        assert (held.passed - before > x.nbytes) is relayed
        words = f"relayed by {relay._node.contact.endpoint}"
        assert f"{one.servers[0].contact.endpoint} ({words})" in repr(swarm)
        assert f"it takes no connections itself: {words}" in repr(swarm)
    assert "relays for 3 nodes" in repr(relay)


def test_hidden_swarms_of_one_network_call_each_other_directly(often, two_hidden):
    relay, one, two = two_hidden
    (server,) = one.serve("ffn", hidden=16, grid=(2,), isolation="task")
    eventually(lambda: server.contact.key in two._lab.network.direct)
    assert two._lab.network.direct[server.contact.key] == one._lab.network.direct[server.contact.key]
    held = relay._node.relaying.server.held
    before, x = held.passed, torch.randn(4096, 16)
    two.moe(16)(x).sum().backward()
    assert held.passed - before < x.nbytes
    relay.close()
    assert two.moe(16)(x).shape == x.shape, "it works without the relay"


def test_a_server_process_of_a_hidden_notebook_is_called_directly_here_and_through_the_relay_elsewhere(two_hidden):
    relay, one, two = two_hidden
    (server,) = one.serve("ffn", hidden=16, grid=(2,), isolation="process")
    ports = {client.port for client in relay._node.relaying.server.clients}
    assert server.contact.port in ports, "it has a port of its own at the relay"
    assert one._lab.network.direct[server.contact.key][1] not in ports
    x = torch.randn(4, 16)
    assert two.moe(16)(x).shape == (4, 16)
    relay.close()
    eventually(lambda: one._node.relaying.relay is None)
    assert one.moe(16)(x).shape == (4, 16), "the relay is gone, and its own server is not"


@pytest.mark.parametrize("isolation", ["task", "process"])
def test_a_private_swarm_relays_for_its_members_and_their_servers_and_nobody_else(isolation):
    keys = {name: Identity.generate() for name in ("hidden", "trainer", "stranger")}
    members = [key_text(keys[name].public_key) for name in ("hidden", "trainer")]
    with lk.Swarm("relay", relay=True, members=members) as relay:
        join = partial(lk.Swarm.join, relay.invite())
        with (
            join(name="hidden", key=keys["hidden"], node=NodeConfig(hidden=True)) as hidden,
            join(name="trainer", key=keys["trainer"], node=NodeConfig(hidden=False)) as trainer,
        ):
            (server,) = hidden.serve("ffn", hidden=16, grid=(2,), isolation=isolation)
            ports = {client.port for client in relay._node.relaying.server.clients}
            assert server.contact is not None and {server.contact.port, hidden._node.contact.port} == ports
            assert eventually(lambda: len(trainer.experts())) == 2
            assert trainer.moe(16)(torch.randn(4, 16)).shape == (4, 16)
        with pytest.raises(lk.JoinError, match="private"):
            join(name="stranger", key=keys["stranger"])


async def test_nobody_asks_a_relay_by_way_of_a_node_that_has_not_started_it(start):
    relay = await start(RELAY)
    running, other = await start(join=[relay.node.contact]), await start(join=[relay.node.contact])
    body = ReserveFor(relay.node.contact, Reserve(other.node.contact.key))
    with pytest.raises(RequestRefused, match="only for servers that it has started"):
        await other.node.client.call(running.node.contact, RESERVE_FOR, body, timeout=5)


def test_relay_is_true_false_or_limits():
    with pytest.raises(ValueError, match="relay='yes'"):
        lk.Swarm("wrong", relay="yes")  # type: ignore[arg-type]
