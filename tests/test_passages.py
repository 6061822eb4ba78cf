"""Passages: a relay lets nodes call each other that have no way of their own, and is of no use for anything else."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import trio

from labkit.contact import Contact
from labkit.dht.routing import Blacklist
from labkit.errors import (
    BadRequest,
    ConnectionLost,
    NotAdmitted,
    NoWay,
    Overloaded,
    RequestRefused,
    RPCError,
    UnknownMethod,
    WrongServerKey,
)
from labkit.events import RelayChanged
from labkit.node import NodeConfig
from labkit.relay import crossing, passages
from labkit.relay.crossing import PassageFinder
from labkit.relay.limits import RelayLimits
from labkit.relay.listening import connect_to
from labkit.relay.messages import PASSAGE, AskPassage, Passage
from labkit.relay.passages import PassageServer
from labkit.wire.rpc_types import BULK, AsyncMethod, Reply, Request
from labkit.wire.security import Admission, Identity
from labkit.wire.transport import Peer
from labkit.wire.zmq_transport import open_network
from tests.nodes import calling, changed, echo, serving
from tests.relays import relaying, start_node
from tests.swarms import soon
from tests.test_relay import is_closed

RELAY = NodeConfig(secure=True, relay=RelayLimits())
METHODS = {"echo": AsyncMethod(echo, object), "dht.ping": AsyncMethod(echo, object)}
KEY = Identity.generate().public_key


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A node that does not answer is waited for a moment only."""
    monkeypatch.setattr(passages, "CALL_BACK_TIME", 0.5)


async def ask(client, relay, target: Contact) -> int:
    """The port of a passage; 0 if there is none."""
    reply = await client.call(relay.contact, PASSAGE, AskPassage(target), returns=Passage, timeout=5)
    assert isinstance(reply.body, Passage)
    return reply.body.port


# ---------------------------------------------------------------- what it is for


async def test_a_passage_leads_to_the_node_that_is_asked_for_under_its_own_key_and_no_other():
    async with relaying() as relay, serving(relay.network, METHODS, secure=True) as node:
        target = node.contact
        async with calling(relay.network, Identity.generate()) as client:
            at = changed(target, port=await ask(client, relay, target))
            assert at.port not in (0, target.port)
            tensor = torch.randn(1 << 20)
            reply = await client.call(at, "echo", "hello", [tensor], timeout=20, lane=BULK)
            assert reply.body == "hello" and torch.equal(reply.tensors[0], tensor)
            assert relay.server.held.passed > tensor.nbytes and relay.server.connections == 1
            assert await ask(client, relay, target) == at.port  # there is one already
            assert await ask(client, relay, changed(target, also=(("127.0.0.2", 5),))) == at.port
            assert relay.passages.targets == [target]
            with pytest.raises(WrongServerKey):
                await client.call(changed(at, key=KEY), "echo", timeout=5)


async def test_a_passage_that_nobody_uses_is_closed(monkeypatch):
    monkeypatch.setattr(passages, "UNUSED_TIME", 0.3)
    async with relaying() as relay, serving(relay.network, METHODS, secure=True) as node:
        async with calling(relay.network, Identity.generate()) as client:
            at = changed(node.contact, port=await ask(client, relay, node.contact))
            await client.call(at, "echo", 1, timeout=5)
            await trio.sleep(0.5)
            assert relay.passages.targets  # it is used
            client.forget_all()
            await soon(lambda: is_empty(relay.passages))
            with pytest.raises(ConnectionLost):
                await client.call(at, "echo", 2, timeout=5)


async def is_empty(passages: PassageServer) -> bool:
    return not passages.targets


# ---------------------------------------------------------------- whom it is for, and where it leads


async def test_those_only_get_through_who_come_from_the_address_of_somebody_who_has_asked():
    async with relaying() as relay, serving(relay.network, METHODS, secure=True) as node:
        async with calling(relay.network, Identity.generate()) as client:
            port = await ask(client, relay, node.contact)
        raw = trio.socket.socket()
        await raw.bind(("127.0.0.2", 0))
        await raw.connect(("127.0.0.1", port))
        assert await is_closed(trio.SocketStream(raw))


async def test_a_private_swarm_has_passages_for_its_members_only():
    member, stranger = Identity.generate(), Identity.generate()
    async with relaying(admission=Admission([member.public_key])) as relay:
        async with serving(relay.network, METHODS, secure=True) as node:
            async with calling(relay.network, member) as client:
                assert await ask(client, relay, node.contact)
            async with calling(relay.network, stranger) as client:
                with pytest.raises(NotAdmitted):
                    await ask(client, relay, node.contact)


async def test_there_is_none_to_who_does_not_hold_the_key_and_a_no_always_takes_the_same_time():
    async with relaying() as relay, serving(relay.network, METHODS, secure=True) as node:
        silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
        ports = [9, node.contact.port, silent[0].socket.getsockname()[1]]  # nothing there, another key, and no labkit
        async with calling(relay.network, Identity.generate()) as client, silent[0]:
            times = []
            for port in ports:
                started = trio.current_time()
                assert await ask(client, relay, changed(node.contact, key=KEY, port=port)) == 0
                times.append(trio.current_time() - started)
        assert min(times) >= 0.5 and not relay.passages.targets  # none is quicker than the others


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"secure": False}, "one that encrypts"),
        ({"key": None}, "to another node than the relay"),
        ({"host": "lab.example"}, "lab.example is none"),
        *(({"host": host}, "is none") for host in ("0.0.0.0", "::", "224.0.0.1", "fe80::1", "::ffff:127.0.0.1")),
        ({"host": "127.0.0.1"}, "127.0.0.1 is none"),
        ({"host": "::1"}, "::1 is none"),
    ],
)
async def test_nobody_is_led_to_what_is_no_address_of_a_node_nor_to_the_machine_of_the_relay(changes, said):
    async with relaying() as relay:
        changes = {name: relay.contact.key if value is None else value for name, value in changes.items()}
        target = changed(Contact(KEY, "203.0.113.5", 4000), **changes)
        with pytest.raises(BadRequest, match=said):
            await relay.passages.rpc_passage(request(target))


async def test_a_relay_gives_passages_only_to_who_proves_a_key_and_says_if_it_has_no_way_itself(monkeypatch):
    async with relaying() as relay:
        target = Contact(KEY, "203.0.113.5", 4000)
        with pytest.raises(RequestRefused, match="prove a key"):
            await relay.passages.rpc_passage(request(target, key=None))
        hidden = PassageServer(relay.server, relay.passages._endpoint, lambda: False)
        with pytest.raises(RequestRefused, match="takes no connections itself"):
            await hidden.rpc_passage(request(target))

        async def find_way(contact: Contact) -> tuple[str, int]:
            await trio.lowlevel.checkpoint()
            raise NoWay("this machine has no IPv4")

        monkeypatch.setattr(relay.passages._endpoint, "find_way", find_way)
        with pytest.raises(RequestRefused, match="does not reach it, either: this machine has no IPv4"):
            await relay.passages.rpc_passage(request(target))


def request(target: Contact, key: bytes | None = KEY) -> Request:
    peer = Peer(b"route", key, "192.0.2.9")
    return Request(PASSAGE, AskPassage(target), (), peer, 5.0)


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "said"),
    [(RelayLimits(passages=1), "as many as it takes"), (RelayLimits(passages_per_member=1), "of this member")],
)
async def test_a_relay_has_so_many_passages_and_says_when_there_is_no_room(limits, said):
    async with relaying(limits) as relay, calling(relay.network, Identity.generate()) as client:
        async with (
            serving(relay.network, METHODS, secure=True) as one,
            serving(relay.network, METHODS, secure=True) as two,
        ):
            port = await ask(client, relay, one.contact)
            with pytest.raises(Overloaded, match=said):
                await ask(client, relay, two.contact)
            assert await ask(client, relay, one.contact) == port


async def test_one_member_has_so_many_nodes_tried_at_the_same_time(monkeypatch):
    monkeypatch.setattr(passages, "MAX_TRIED_PER_MEMBER", 2)
    async with relaying() as relay, calling(relay.network, Identity.generate()) as client:
        said: list[object] = []

        async def ask_for(port: int) -> None:
            try:
                said.append(await ask(client, relay, changed(relay.contact, key=KEY, port=port)))
            except Overloaded as error:
                said.append(type(error))

        async with trio.open_nursery() as nursery:
            for port in (7, 8, 9):
                nursery.start_soon(ask_for, port)
        assert said == [Overloaded, 0, 0]


@pytest.mark.parametrize(
    "limits", [RelayLimits(connections=1), RelayLimits(connections_per_client=1), RelayLimits(connections_per_caller=1)]
)
async def test_callers_over_a_limit_are_hung_up_on_and_those_before_go_on(limits):
    async with relaying(limits) as relay, serving(relay.network, METHODS, secure=True) as node:
        async with calling(relay.network, Identity.generate()) as client:
            at = changed(node.contact, port=await ask(client, relay, node.contact))
            assert (await client.call(at, "echo", 1, timeout=5)).body == 1
            assert await is_closed(await connect_to(at.host, at.port, 5))
            assert (await client.call(at, "echo", 2, timeout=5)).body == 2


# ---------------------------------------------------------------- whole nodes


@pytest.fixture
async def start():
    """Starts a node, each time it is called."""
    async with open_network() as network, trio.open_nursery() as nursery:
        yield partial(start_node, network, nursery)
        nursery.cancel_scope.cancel()


def part(monkeypatch, caller, target) -> None:
    """Leave a node without a way to another one."""
    endpoint, key = caller.node.endpoint, target.node.contact.key
    before = endpoint.find_way

    async def find_way(contact: Contact) -> tuple[str, int]:
        if contact.key == key:
            raise NoWay("it has only an IPv4 address, and this machine has none")
        at: tuple[str, int] = await before(contact)
        return at

    monkeypatch.setattr(endpoint, "find_way", find_way)


async def test_a_node_calls_another_to_which_it_has_no_way_through_a_relay_that_it_has_joined(start, monkeypatch):
    relay = await start(RELAY)
    caller, target = await start(join=[relay.node.contact]), await start(join=[relay.node.contact])
    part(monkeypatch, caller, target)
    caller.node.client.forget_all()
    assert await caller.node.dht.peers.ping(target.node.contact)
    assert relay.node.relaying.server.held.passed > 0
    where = relay.node.contact.endpoint
    assert caller.node.relaying.words == f"1 node to which it has no way itself it calls through the relay {where}"
    assert relay.node.relaying.words == "relays for 0 nodes; 1 node others call through it who have no way there"


async def test_when_the_relay_of_a_passage_is_gone_another_one_is_asked(start, monkeypatch):
    monkeypatch.setattr(crossing, "KEPT", 0.1)
    relays = [await start(RELAY)]
    relays.append(await start(RELAY, [relays[0].node.contact]))
    contacts = [relay.node.contact for relay in relays]
    caller, target = await start(join=contacts), await start(join=contacts)
    part(monkeypatch, caller, target)
    caller.node.client.forget_all()
    assert await caller.node.dht.peers.ping(target.node.contact)
    finder = caller.node.relaying.finder
    gone, left = sorted(relays, key=lambda relay: relay.node.contact != finder.relay)
    gone.scope.cancel()
    await soon(lambda: is_called_through(caller, target, left), timeout=10)


async def is_called_through(caller, target, relay) -> bool:
    answers = await caller.node.dht.peers.ping(target.node.contact)
    return answers and bool(caller.node.relaying.finder.relay == relay.node.contact)


async def test_without_a_relay_that_is_said_once_and_the_first_relay_that_comes_is_found(start, monkeypatch):
    monkeypatch.setattr(crossing, "LOOK_PERIOD", 0.1)
    monkeypatch.setattr(crossing, "find_way", nowhere)
    monkeypatch.setattr(crossing, "has_version_of", lambda hosts: False)
    first = await start()
    caller, target = await start(join=[first.node.contact]), await start(join=[first.node.contact])
    part(monkeypatch, caller, target)
    caller.node.client.forget_all()
    peers, contact = caller.node.dht.peers, target.node.contact
    for _ in range(2 * peers.config.max_failures):
        assert not await peers.ping(contact)
    assert [event.detail for event in caller.events if isinstance(event, RelayChanged)] == ["there is no way"]
    assert caller.node.relaying.words == "there is no way" and contact in list(peers.routing)
    relay = await start(RELAY, [first.node.contact])
    await soon(lambda: peers.ping(contact), timeout=20)
    assert caller.node.relaying.finder.relay == relay.node.contact and caller.node.relaying.finder.problem == ""


async def nowhere(addresses):
    await trio.lowlevel.checkpoint()
    raise NoWay("there is no way")


def test_a_node_to_which_there_is_no_way_from_here_is_left_alone_for_a_moment_only_however_often_it_is_tried():
    blacklist = Blacklist(base=1.0, longest=60.0)
    for second in range(0, 20, 2):
        assert blacklist.failed(7, float(second), again=False) == 1
        assert blacklist.blocks(7, second + 0.9) and not blacklist.blocks(7, second + 1.0)


# ---------------------------------------------------------------- which relays are asked


class Relays:
    """A `Client` whose relays answer what they are said to, by host: a port, or an error."""

    def __init__(self, **found: object) -> None:
        self.found = {host.replace("_", "."): answer for host, answer in found.items()}
        self.asked: list[str] = []
        self.endpoint = self
        self.contact = Contact(KEY, "192.0.2.9", 4000)

    async def find_way(self, contact: Contact) -> tuple[str, int]:
        await trio.lowlevel.checkpoint()
        return contact.addresses[0]

    async def call(self, contact, method, body, *, returns, timeout):
        self.asked.append(contact.host)
        await trio.lowlevel.checkpoint()
        answer = self.found[contact.host]
        if isinstance(answer, RPCError):
            raise answer
        assert isinstance(answer, int)
        return Reply(Passage(answer))

    def finder(self) -> PassageFinder:
        return PassageFinder(self, [relay_at(host) for host in self.found], lambda event: None)  # type: ignore[arg-type]


def relay_at(host: str) -> Contact:
    return Contact(host.encode().ljust(32, b"."), host, 4000)


TARGET = Contact(bytes(32), "203.0.113.5", 4000)


async def test_relays_are_asked_one_after_the_other_and_the_one_that_helps_is_asked_again_in_time(monkeypatch):
    relays = Relays(**{"192_0_2_1": Overloaded("no"), "192_0_2_2": 0, "192_0_2_3": 4321, "192_0_2_4": 1})
    finder = relays.finder()
    for _ in range(2):
        assert await finder.find(TARGET) == ("192.0.2.3", 4321)
    assert relays.asked == ["192.0.2.1", "192.0.2.2", "192.0.2.3"] and finder.called == 1
    monkeypatch.setattr(crossing, "KEPT", 0.0)
    monkeypatch.setattr(crossing, "DOUBTED", 0.0)
    assert await finder.find(TARGET) == ("192.0.2.3", 4321) and relays.asked[3:] == ["192.0.2.3"]


async def test_if_a_passage_does_not_hold_another_relay_is_asked_first(monkeypatch):
    monkeypatch.setattr(crossing, "KEPT", 0.0)
    relays = Relays(**{"192_0_2_1": 1, "192_0_2_2": 2})
    finder = relays.finder()
    assert [await finder.find(TARGET) for _ in range(3)] == [("192.0.2.1", 1), ("192.0.2.2", 2), ("192.0.2.1", 1)]


async def test_who_is_no_relay_is_not_asked_again_for_a_while():
    relays = Relays(**{"192_0_2_1": UnknownMethod("no"), "192_0_2_2": 4321})
    finder = relays.finder()
    await finder.find(TARGET)
    await finder.find(changed(TARGET, port=5))
    assert relays.asked == ["192.0.2.1", "192.0.2.2", "192.0.2.2"]


async def test_a_node_that_does_not_answer_a_relay_either_is_lost_and_no_relay_is_missing():
    for answer in (0, RequestRefused("it does not reach it, either"), Overloaded("busy")):
        finder = Relays(**{"192_0_2_1": answer}).finder()
        with pytest.raises(ConnectionLost, match=r"203.0.113.5:4000 could not be called through (the|a) relay"):
            await finder.find(TARGET)
        assert finder.problem == ""


async def test_names_are_resolved_here_and_who_does_not_encrypt_is_not_asked_for():
    relays = Relays(**{"192_0_2_1": 4321})
    assert await relays.finder().find(changed(TARGET, host="localhost")) == ("192.0.2.1", 4321)
    assert await relays.finder().find(changed(TARGET, secure=False)) is None
    assert await relays.finder().find(changed(TARGET, host="no.such.host.invalid")) is None
    assert relays.asked == ["192.0.2.1"]
