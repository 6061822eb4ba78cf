"""DHT nodes among others, over an in-memory network in virtual time (`autojump_clock`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from labkit.contact import Contact
from labkit.dht import DHTConfig, DHTNode, Entry, Signer, Value
from labkit.dht.lookup import Lookup
from labkit.dht.protocol import KeyItems, Ping, Store, WireItem
from labkit.dht.shared_lookups import Flights
from labkit.dht.storage import Role, key_id
from labkit.errors import BadRequest
from labkit.wire.rpc_types import Request, SyncMethod
from labkit.wire.transport import Peer
from tests.fake_network import FakeNetwork, make_contact, running
from tests.nodes import changed

SMALL = DHTConfig(k=4, republish_period=20.0)  # few replicas, so that few nodes make a large network


def data(found: Value | dict[str, Value] | None) -> Any:
    """Returns what was found, without its expirations."""
    if isinstance(found, dict):
        return {subkey: value.data for subkey, value in found.items()}
    return None if found is None else found.data


def holders(nodes: list[DHTNode], key: str, role: Role = Role.REPLICA) -> list[DHTNode]:
    now = trio.current_time()
    return [n for n in nodes if any(item.role is role for item in n.storage.get(key, now).values())]


# ---------------------------------------------------------------- storing and finding


async def test_fifty_nodes_find_from_anywhere_what_was_stored_from_anywhere(autojump_clock: MockClock) -> None:
    nodes = await FakeNetwork().nodes(50)
    for index in range(0, 50, 7):
        assert await nodes[index].store(f"key{index}", b"%d" % index, ttl=100.0) == 20
    for index in range(0, 50, 7):
        assert data(await nodes[49 - index].get(f"key{index}")) == b"%d" % index
    assert await nodes[3].get("nobody stored this") is None


async def test_what_is_stored_again_is_looked_up_again_only_after_a_while_or_when_half_of_its_replicas_are_gone(
    autojump_clock: MockClock,
) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(40, SMALL)

    async def look_ups() -> int:
        before = network.calls["dht.find"]
        assert await nodes[7].store("key", b"value", ttl=100.0) >= 3
        return network.calls["dht.find"] - before

    assert await look_ups() > 0
    assert await look_ups() == 0
    await trio.sleep(SMALL.republish_period + 1)
    assert await look_ups() > 0
    network.kill(next(node for node in holders(nodes, "key") if node is not nodes[7]))
    assert await look_ups() == 0  # it has learned by now that one is gone
    assert await nodes[7].store("key", b"value", ttl=100.0) == 4  # another known node is there for it
    for node in [node for node in holders(nodes, "key") if node is not nodes[7]]:
        network.kill(node)
    await nodes[7].store("key", b"value", ttl=100.0)
    assert await look_ups() > 0
    assert await nodes[7].store("key", b"value", ttl=100.0) == 4


async def test_records_are_stored_on_the_nodes_nearest_to_their_key(autojump_clock: MockClock) -> None:
    nodes = await FakeNetwork().nodes(40, SMALL)
    await nodes[7].store("key", b"value", ttl=100.0)
    nearest = sorted(nodes, key=lambda node: node.contact.node_id ^ key_id("key"))[:4]
    assert {n.contact for n in holders(nodes, "key")} == {n.contact for n in nearest}


async def test_a_lone_node_keeps_its_own_records(autojump_clock: MockClock) -> None:
    node = FakeNetwork().node(0)
    assert await node.bootstrap([]) == 0
    assert await node.store("key", b"value", ttl=10.0) == 1
    assert data(await node.get("key")) == b"value"
    assert await node.get("other") is None


async def test_a_swarm_stores_and_finds_in_one_round_of_few_calls(autojump_clock: MockClock) -> None:
    network = FakeNetwork(latency=0.05)
    nodes = await network.nodes(8)
    network.calls.clear()
    start = trio.current_time()
    assert await nodes[1].store_many([Entry(f"key{i}", b"value", 100.0) for i in range(100)]) == [8] * 100
    assert trio.current_time() - start == pytest.approx(0.1)
    found = await nodes[5].get_many([f"key{i}" for i in range(100)])
    assert all(data(value) == b"value" for value in found.values())
    assert trio.current_time() - start == pytest.approx(0.2)
    assert network.calls["dht.store"] == 7  # one call to each other node
    assert network.calls["dht.find"] <= 7


async def test_many_keys_share_calls_in_a_large_network(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(30, DHTConfig(k=8))
    await nodes[1].store_many([Entry(f"key{i}", b"value", 100.0) for i in range(100)])
    network.calls.clear()
    found = await nodes[20].get_many([f"key{i}" for i in range(100)])
    assert all(data(value) == b"value" for value in found.values())
    assert network.calls["dht.find"] <= 60  # alone, each key would take at least 3


async def test_gets_of_one_key_at_the_same_time_share_a_look_up(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(30, DHTConfig(k=8))
    await nodes[1].store_many([Entry(key, b"value", 100.0) for key in "abc"])
    reader = next(node for node in nodes if not any(node.storage.get(key, 0.0) for key in "abc"))
    network.calls.clear()
    await reader.get_many(["a", "b", "c"])
    alone = network.calls["dht.find"]
    network.calls.clear()
    found: list[Any] = []

    async def get(keys: list[str]) -> None:
        found.append(await reader.get_many(keys))

    async with trio.open_nursery() as nursery:
        for keys in (["a", "b", "c"], ["a"], ["c", "a"], ["b"], ["b", "c"]) * 5:
            nursery.start_soon(get, keys)
            await trio.sleep(0.001)
    assert network.calls["dht.find"] == alone
    assert len(found) == 25 and all(data(value) == b"value" for some in found for value in some.values())


async def test_a_get_that_is_cancelled_takes_none_of_those_with_it_that_share_its_look_up(
    autojump_clock: MockClock,
) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(30, DHTConfig(k=8))
    await nodes[1].store("key", b"value", 100.0)
    found: list[Any] = []
    first = trio.CancelScope()

    async def get(scope: trio.CancelScope) -> None:
        with scope:
            found.append(await nodes[20].get("key"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get, first)
        await trio.sleep(0.01)
        for _ in range(3):
            nursery.start_soon(get, trio.CancelScope())
        second = trio.CancelScope()
        nursery.start_soon(get, second)
        await trio.sleep(0.03)
        second.cancel()  # one that waits
        first.cancel()  # and the one whose look-up it is
    assert list(map(data, found)) == [b"value"] * 3


async def test_an_error_in_a_look_up_reaches_all_who_share_it_and_none_who_come_later(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = await FakeNetwork().nodes(8)
    caught: list[str] = []

    async def fail(*_: Any, **__: Any) -> None:
        await trio.sleep(1.0)
        raise RuntimeError("broken")

    async def get() -> None:
        try:
            await nodes[3].get("key")
        except RuntimeError as error:
            caught.append(str(error))

    with monkeypatch.context() as broken:
        broken.setattr("labkit.dht.node.run_lookups", fail)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(get)
    assert caught == ["broken"] * 3
    assert await nodes[3].get("key") is None


async def test_who_asks_after_a_store_or_wants_more_replicas_does_not_share_a_look_up_that_began_before(
    autojump_clock: MockClock,
) -> None:
    async def run(lookups: Sequence[Lookup]) -> None:
        await trio.sleep(1.0)

    flights = Flights(run)

    async def begins_anew(quorum: int, **options: Any) -> bool:
        make = partial(Lookup, "key", 0, [], k=1, alpha=1, quorum=quorum)
        _, own = await flights.look_up({"key": make}, quorum, **options)
        return own == {"key"}

    async with trio.open_nursery() as nursery:
        nursery.start_soon(begins_anew, 3)
        await trio.sleep(0.5)
        assert not await begins_anew(2)
        nursery.start_soon(begins_anew, 3)
        await trio.sleep(0.5)
        assert await begins_anew(5)
        nursery.start_soon(begins_anew, 3)
        await trio.sleep(0.5)
        assert await begins_anew(3, share=False)
        nursery.start_soon(begins_anew, 3)
        await trio.sleep(0.5)
        flights.forget(["key"])
        assert await begins_anew(3)


async def test_a_dictionary_merges_what_several_writers_store(autojump_clock: MockClock) -> None:
    nodes = await FakeNetwork().nodes(25, SMALL)
    for index, node in enumerate(nodes[::5]):
        await node.store("ffn", b"old", ttl=50.0, subkey=str(index))
        await node.store("ffn", b"%d" % index, ttl=100.0, subkey=str(index))
    assert data(await nodes[23].get("ffn")) == {str(index): b"%d" % index for index in range(5)}


async def test_a_get_merges_replicas_that_hold_different_parts(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(8)
    network.kill(nodes[1])
    await nodes[2].store("ffn", b"a", ttl=100.0, subkey="0")
    network.revive(nodes[1])
    network.kill(*nodes[3:])
    await nodes[1].store("ffn", b"b", ttl=100.0, subkey="1")
    for node in nodes[:3]:
        assert data(await node.get("ffn")) == {"0": b"a", "1": b"b"}


async def test_a_get_of_any_copy_asks_nobody_where_one_is_held_and_else_one_replica(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(25, SMALL)
    await nodes[1].store("plain", b"value", ttl=100.0)
    await nodes[1].store("ffn", b"value", ttl=100.0, subkey="0")
    held = holders(nodes, "plain")
    for node in nodes:
        network.calls.clear()
        assert data(await node.get("plain", latest=False)) == b"value"
        assert not network.calls["dht.find"] if node in held else 1 <= network.calls["dht.find"] <= 6
    assert data((await nodes[7].get_many(["ffn", "nothing"], latest=False))["ffn"]) == {"0": b"value"}
    await trio.sleep(100.0)
    assert await held[0].get("plain", latest=False) is None


async def test_expired_records_vanish_everywhere(autojump_clock: MockClock) -> None:
    nodes = await FakeNetwork().nodes(20, SMALL)
    async with running(nodes):
        await nodes[1].store("short", b"value", ttl=30.0)
        await nodes[1].store("ffn", b"value", ttl=30.0, subkey="0")
        await nodes[1].store("ffn", b"value", ttl=300.0, subkey="1")
        await trio.sleep(25.0)
        assert data(await nodes[9].get("short")) == b"value"
        await trio.sleep(10.0)
        assert await nodes[9].get("short") is None
        assert data(await nodes[9].get("ffn")) == {"1": b"value"}
        await trio.sleep(10.0)
        assert not any("short" in node.storage for node in nodes)


async def test_a_value_found_outlives_its_ttl_by_no_more_than_its_way_to_the_replica(autojump_clock: MockClock) -> None:
    nodes = await FakeNetwork(latency=0.2).nodes(4)
    start = trio.current_time()
    await nodes[0].store("key", b"value", ttl=10.0)
    found = await nodes[1].get("key")
    assert isinstance(found, Value)
    assert start + 9.0 < found.expires_at <= start + 10.0 + 0.2


async def test_large_dictionaries_come_in_several_replies(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(2)
    entries = [Entry(key, b"x" * 60_000, 100.0, subkey=str(i)) for key in ("a", "b", "c") for i in range(40)]
    assert await nodes[0].store_many(entries) == [2] * 120
    reader = network.node(2, client_only=True)
    await reader.bootstrap([nodes[1].contact])
    found = await reader.get_many(["a", "b", "c"])
    assert [len(dictionary or ()) for dictionary in found.values() if isinstance(dictionary, dict)] == [40, 40, 40]


async def test_only_the_owner_replaces_a_signed_record(autojump_clock: MockClock) -> None:
    nodes = await FakeNetwork().nodes(8)
    owner = Signer()
    assert await nodes[0].store_many([owner.sign(Entry("key", b"first", 100.0))]) == [8]
    assert await nodes[1].store("key", b"stolen", ttl=1000.0) == 0
    assert await nodes[2].store_many([owner.sign(Entry("key", b"second", 10.0, sequence=1))]) == [8]
    assert data(await nodes[3].get("key")) == b"second"


async def test_what_no_node_would_take_is_a_value_error(autojump_clock: MockClock) -> None:
    node = FakeNetwork().node(0)
    with pytest.raises(ValueError, match="65537 bytes"):
        await node.store("key", b"x" * 65_537, ttl=1.0)
    with pytest.raises(ValueError, match="ttl"):
        await node.store("key", b"", ttl=float("nan"))
    with pytest.raises(ValueError, match="sequence"):
        await node.store_many([Entry("key", b"", 1.0, sequence=-1)])


# ---------------------------------------------------------------- joining and leaving


async def test_everything_is_found_when_the_first_node_and_a_third_of_the_others_die(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(50)
    async with running(nodes):
        entries = [Entry(f"key{index}", b"value", 1000.0) for index in range(40)]
        await nodes[11].store_many(entries)
        network.kill(*nodes[::3])
        found = await nodes[1].get_many([entry.key for entry in entries])
        assert all(data(value) == b"value" for value in found.values())
        newcomer = network.node(100)
        assert await newcomer.bootstrap([nodes[0].contact, nodes[1].contact]) == 1
        assert data(await newcomer.get("key7")) == b"value"


async def test_a_record_survives_all_its_first_holders_leaving_one_by_one(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(30, SMALL)
    async with running(nodes):
        await nodes[0].store_many([Entry("key", b"value", 3600.0), Entry("ffn", b"entry", 3600.0, subkey="0")])
        first = {id(node) for key in ("key", "ffn") for node in holders(nodes, key)}
        for node in [node for node in nodes if id(node) in first]:
            network.kill(node)
            await trio.sleep(60.0)
        survivor = next(node for node in nodes if id(node) not in first)
        assert data(await survivor.get("key")) == b"value"
        assert data(await survivor.get("ffn")) == {"0": b"entry"}


async def test_republishing_takes_about_one_call_per_replica_and_period(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(8, DHTConfig(republish_period=20.0))
    async with running(nodes):
        await nodes[0].store_many([Entry(f"key{i}", b"value", 3600.0) for i in range(50)])
        network.calls.clear()
        await trio.sleep(400.0)
        assert 7 * 10 <= network.calls["dht.store"] <= 7 * 40


async def test_nodes_that_join_at_the_same_time_have_what_the_others_store_meanwhile(autojump_clock: MockClock) -> None:
    network = FakeNetwork(latency=0.05)
    first, second = await network.nodes(2)
    newcomer = network.node(2)
    keys = [f"key{number}" for number in range(40)]
    async with running([first, second, newcomer]), trio.open_nursery() as nursery:
        nursery.start_soon(newcomer.bootstrap, [first.contact])
        await trio.sleep(0.06)  # the first has met the newcomer, and the second has not
        assert newcomer.contact.node_id in first.routing and newcomer.contact.node_id not in second.routing
        await second.store_many([Entry(key, b"value", 60) for key in keys])
        await trio.sleep(1)
    assert sorted(newcomer.storage) == sorted(keys)


async def test_a_newcomer_is_handed_the_records_near_to_it(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(8)
    async with running(nodes):
        await nodes[3].store_many([Entry(f"key{i}", b"value", 1000.0) for i in range(20)])
        network.calls.clear()
        newcomer = network.node(100)
        await newcomer.bootstrap([nodes[0].contact])
        await trio.sleep(1.0)
        assert len(newcomer.storage) == 20
        assert network.calls["dht.store"] <= 8


async def test_a_node_that_nobody_reached_before_it_moved_has_the_records_near_to_it(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(8)
    hidden = network.node(100)
    network.kill(hidden)  # it calls others, and nobody calls it: there is a router before it
    async with running([*nodes, hidden]):
        await nodes[3].store_many([Entry(f"key{i}", b"value", 1000.0) for i in range(20)])
        await hidden.bootstrap([nodes[0].contact])
        await trio.sleep(10.0)
        assert hidden.contact.node_id in nodes[3].routing and not hidden.storage
        network.revive(hidden)
        hidden.move(Contact(hidden.contact.key, "127.0.0.2", 7))  # to a port of a relay
        await trio.sleep(1.0)
        assert len(hidden.storage) == 20


async def test_a_node_that_lost_everyone_finds_back(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(5, DHTConfig(republish_period=20.0, blacklist_max=10.0))
    async with running(nodes):
        network.kill(*nodes[1:])
        for _ in range(60):
            await trio.sleep(5.0)
            await nodes[0].get("key")
        assert len(nodes[0].routing) == 0
        for node in nodes[1:]:
            network.revive(node)
        await trio.sleep(60.0)
        assert len(nodes[0].routing) == 4


async def test_buckets_are_refreshed_so_that_nodes_learn_of_each_other(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(10, DHTConfig(refresh_period=50.0))
    nodes[5].routing.remove(nodes[6].contact.node_id)
    async with running(nodes):
        await trio.sleep(100.0)
    assert nodes[6].contact.node_id in nodes[5].routing


async def test_a_client_uses_the_network_without_becoming_part_of_it(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(8)
    client = network.node(100, client_only=True)
    await client.bootstrap([nodes[0].contact])
    assert await client.store("key", b"value", ttl=10.0) == 8
    assert data(await client.get("key")) == b"value"
    assert not client.methods
    assert all(client.contact.node_id not in node.routing for node in nodes)


# ---------------------------------------------------------------- peers that fail or lie


async def test_a_dead_node_does_not_hold_up_a_get_and_is_left_alone_afterwards(autojump_clock: MockClock) -> None:
    network = FakeNetwork(latency=0.05)
    nodes = await network.nodes(8)
    async with running(nodes):
        await nodes[0].store("key", b"value", ttl=1000.0)
        nearest = nodes[0].routing.nearest(key_id("key"), 1)[0]
        network.kill(*(node for node in nodes if node.contact == nearest))
        start = trio.current_time()
        assert data(await nodes[0].get("key")) == b"value"
        assert trio.current_time() - start < 0.6
        await trio.sleep(2.5)  # it was pinged meanwhile
        assert nodes[0].statistics()["blacklisted"] == 1
        start = trio.current_time()
        assert data(await nodes[0].get("key")) == b"value"
        assert trio.current_time() - start == pytest.approx(0.1)


async def test_a_dead_node_holds_up_a_store_for_one_timeout_at_most(autojump_clock: MockClock) -> None:
    network = FakeNetwork(latency=0.05)
    nodes = await network.nodes(8)
    network.kill(nodes[1])
    start = trio.current_time()
    assert await nodes[0].store("key", b"value", ttl=100.0) == 7
    assert trio.current_time() - start == pytest.approx(2.0)
    start = trio.current_time()
    assert await nodes[0].store("key", b"value", ttl=100.0) == 7
    assert trio.current_time() - start == pytest.approx(0.1)


async def test_a_node_that_others_have_found_gone_holds_up_no_get_and_is_back_when_it_answers(
    autojump_clock: MockClock,
) -> None:
    network = FakeNetwork(latency=0.05)
    nodes = await network.nodes(8)
    async with running(nodes):
        await nodes[0].store("key", b"value", ttl=1000.0)
        suspected = nodes[0].routing.nearest(key_id("key"), 1)[0]
        nodes[0].suspect(suspected)
        assert not nodes[0].peers.usable(suspected)
        start = trio.current_time()
        assert data(await nodes[0].get("key")) == b"value"
        assert trio.current_time() - start == pytest.approx(0.1)
        await trio.sleep(1.5)
        nodes[0].peers.usable(suspected)  # its time is over: it is pinged
        await trio.sleep(0.2)
        assert nodes[0].peers.usable(suspected)


async def test_the_back_off_grows_until_the_node_is_heard_of_again(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(3)
    network.kill(nodes[1])
    for failures in range(3):
        await nodes[0].store("key", b"value", ttl=100.0)
        assert not nodes[0].peers.usable(nodes[1].contact)
        await trio.sleep(2.0**failures + 0.01)
        assert nodes[0].peers.usable(nodes[1].contact)
    await nodes[0].store("key", b"value", ttl=100.0)
    network.revive(nodes[1])
    async with running([nodes[0]]):
        assert await nodes[1].peers.ping(nodes[0].contact)  # it calls us; we ping it
        await trio.sleep(0.2)
        assert nodes[1].contact.node_id not in nodes[0].peers.blacklist


async def test_a_node_with_long_round_trips_waits_longer_before_it_calls_others_slow(autojump_clock: MockClock) -> None:
    nodes = await FakeNetwork(latency=0.4).nodes(8)
    assert 0.8 < nodes[7].peers.slow_after <= 2.0
    await nodes[1].store("key", b"value", ttl=100.0)
    assert data(await nodes[7].get("key")) == b"value"


LIAR = make_contact(1)
GHOST = make_contact(999)


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        "text",
        [LIAR.key, [], []],  # no answer to the query
        [LIAR.key, [], [[[0], []]]],  # a contact that it does not list
        [LIAR.key, [], [[[-1], []]]],
        [LIAR.key, [[b"short key", "127.0.0.1", 1]], [[[0], []]]],
        [LIAR.key, [7], [[[0], []]]],
        [LIAR.key, [[GHOST.key, msgspec.Raw(b"\xa1\xff"), 1]], [[[0], []]]],  # a host that is no text
        [LIAR.key, [GHOST] * 21, [[list(range(21)), []]]],  # more than k
        [LIAR.key, [GHOST] * 21, [[[0], []]]],
        [LIAR.key, [[GHOST.key, "127.0.0.1", 1, True, b"x" * 3000]], [[[0], []]]],  # one that would fill a cache
        [LIAR.key, [[GHOST.key, "192.0.2.1", 1, False]], [[[0], []]]],  # one that we would call unencrypted
        [LIAR.key, [], [[[], [[b"value", -1.0]]]]],  # expired
        [LIAR.key, [], [[[], [[b"value", float("nan")]]]]],
        [LIAR.key, [], [[[], [[b"x" * 70_000, 1.0]]]]],
        [LIAR.key, [], [[[], [], True]]],  # promises more and never gives it
        [GHOST.key, [], [[[], [[b"lie", 1000.0]]]]],  # another node lives there now
    ],
)
async def test_a_peer_that_answers_garbage_counts_as_one_that_does_not_answer(
    garbage: object, autojump_clock: MockClock
) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(4)
    await nodes[2].store("key", b"value", ttl=100.0)
    network.replace(nodes[1], "dht.find", garbage)
    assert data(await nodes[0].get("key")) == b"value"
    assert nodes[0].statistics()["calls_failed"] == 1
    assert not nodes[0].peers.usable(LIAR)


async def test_contacts_named_by_others_are_not_known_before_they_answer(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(4)
    network.replace(nodes[1], "dht.find", [LIAR.key, [GHOST], [[[0], []]]])
    async with running(nodes):
        await nodes[0].get("key")
        assert GHOST.node_id not in nodes[0].routing
        await trio.sleep(3.0)
        assert GHOST.node_id not in nodes[0].routing
        assert GHOST.node_id in nodes[0].peers.blacklist


async def test_a_forged_signature_is_not_believed(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes = await network.nodes(4)
    honest = Signer(b"1" * 32).sign(Entry("key", b"value", 100.0))
    await nodes[2].store_many([honest])
    forged = [b"lie", 100.0, None, 7, False, honest.owner, honest.signature]
    network.replace(nodes[1], "dht.find", [LIAR.key, [], [[[], [forged]]]])
    assert data(await nodes[0].get("key")) == b"value"


async def test_a_sender_whose_key_the_connection_does_not_prove_is_ignored(autojump_clock: MockClock) -> None:
    node = FakeNetwork().node(0)
    for proven in (make_contact(6).key, make_contact(7).key):
        request = Request("dht.ping", Ping(make_contact(7)), (), Peer(b"", proven), trio.current_time() + 1.0)
        ping = node.methods["dht.ping"]
        assert isinstance(ping, SyncMethod)
        ping.handler(request)
        assert (make_contact(7).node_id in node.routing) == (proven == make_contact(7).key)


async def test_a_sender_that_we_would_have_to_call_unencrypted_is_ignored(autojump_clock: MockClock) -> None:
    node = FakeNetwork().node(0)
    for host in ("192.0.2.1", "127.0.0.1"):
        sender = changed(make_contact(7), host=host, secure=False)
        ping = node.methods["dht.ping"]
        assert isinstance(ping, SyncMethod)
        ping.handler(Request("dht.ping", Ping(sender), (), Peer(b"", None), trio.current_time() + 1.0))
        assert (sender.node_id in node.routing) == (host == "127.0.0.1")


async def test_a_call_with_too_many_items_is_refused_before_any_is_looked_at(autojump_clock: MockClock) -> None:
    node = FakeNetwork().node(0)
    records = [KeyItems(f"key{number}", [WireItem(b"", 10.0)] * 600) for number in range(2)]
    store = node.methods["dht.store"]
    assert isinstance(store, SyncMethod)
    with pytest.raises(BadRequest, match="over 1024 items"):
        store.handler(Request("dht.store", Store(None, records), (), Peer(b"", None), trio.current_time() + 1.0))
    assert len(node.storage) == 0


# ---------------------------------------------------------------- caching along the path


async def cache_everywhere(nodes: list[DHTNode]) -> None:
    """A plain value and a dictionary are stored and looked up by all nodes."""
    await nodes[0].store_many([Entry("plain", b"old", 100.0), Entry("ffn", b"old", 100.0, subkey="0")])
    for node in nodes:
        await node.get_many(["plain", "ffn"])
    await trio.sleep(1.0)


async def test_a_found_value_is_cached_on_the_way_for_a_short_time(autojump_clock: MockClock) -> None:
    nodes = await FakeNetwork().nodes(40, SMALL)
    async with running(nodes):
        await cache_everywhere(nodes)
        assert holders(nodes, "plain", Role.CACHED)
        assert not holders(nodes, "ffn", Role.CACHED)  # dictionaries change too often for copies of them
        await trio.sleep(SMALL.cache_ttl)
        assert not holders(nodes, "plain", Role.CACHED)
        assert len(holders(nodes, "plain")) >= 4


async def test_a_cached_copy_never_hides_a_newer_value(autojump_clock: MockClock) -> None:
    nodes = await FakeNetwork().nodes(25, SMALL)
    async with running(nodes):
        await cache_everywhere(nodes)
        assert holders(nodes, "plain", Role.CACHED)
        await nodes[1].store_many([Entry("plain", b"new", 100.0), Entry("ffn", b"new", 100.0, subkey="0")])
        for node in nodes:
            assert data(await node.get("plain")) == b"new"
            assert data(await node.get("ffn")) == {"0": b"new"}
