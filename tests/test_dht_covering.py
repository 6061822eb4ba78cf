"""What a node stores itself it reads where it was stored: from few nodes, in one round, without a look-up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations

import pytest
import trio
from trio.testing import MockClock

from labkit.dht import DHTConfig
from labkit.dht.covering import cover
from labkit.dht.node import DHTNode, Entry, Value
from labkit.dht.protocol import MAX_QUERIES
from labkit.dht.storage import key_id
from tests.fake_network import FakeNetwork, make_contact, running

NODES = [make_contact(number) for number in range(12)]
KEYS = [f"key{number}" for number in range(10)]
SMALL = DHTConfig(k=8)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_key_is_asked_of_so_many_of_its_replicas_and_a_node_of_all_that_it_holds(count: int) -> None:
    replicas = dict(zip(KEYS, combinations(NODES, 8), strict=False))
    asked = cover(replicas, count)
    assert Counter(key for keys in asked.values() for key in keys) == Counter({key: count for key in KEYS})
    assert all(contact in replicas[key] for contact, keys in asked.items() for key in keys)
    assert len(asked) <= count + 1


def test_a_key_that_has_fewer_replicas_is_left_out() -> None:
    asked = cover({"rare": NODES[:2], "common": NODES}, 3)
    assert [*asked.values()] == [["common"]] * 3


def test_a_node_is_asked_about_no_more_keys_than_one_call_takes() -> None:
    asked = cover({f"key{number}": NODES[:3] for number in range(MAX_QUERIES + 1)}, 3)
    assert [len(keys) for keys in asked.values()] == [MAX_QUERIES] * 3


async def stored(network: FakeNetwork) -> tuple[list[DHTNode], DHTNode]:
    """Thirty nodes, one of which has stored ten keys."""
    nodes = await network.nodes(30, SMALL)
    await nodes[7].store_many([Entry(key, b"old", 100.0) for key in KEYS])
    network.calls.clear()
    return nodes, nodes[7]


async def test_what_a_node_has_stored_it_reads_with_few_calls(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes, own = await stored(network)
    began = trio.current_time()
    assert set(values(await own.get_many(KEYS, quorum=3))) == {b"old"}
    few, took = network.calls.pop("dht.find"), trio.current_time() - began
    assert set(values(await nodes[20].get_many(KEYS, quorum=3))) == {b"old"}
    assert few <= 12 < network.calls["dht.find"]
    assert took == pytest.approx(2 * network.latency)


async def test_it_sees_what_others_have_stored_there(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes, own = await stored(network)
    await nodes[20].store_many([Entry(key, b"new", 200.0) for key in KEYS])
    assert set(values(await own.get_many(KEYS, quorum=3))) == {b"new"}


async def test_what_the_known_replicas_do_not_say_is_looked_up(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes, own = await stored(network)
    async with running([own]):
        network.kill(*nodes[:6])
        began = trio.current_time()
        assert set(values(await own.get_many(KEYS, quorum=3))) == {b"old"}
        assert trio.current_time() - began < SMALL.rpc_timeout  # those that are gone are not waited for
        await trio.sleep(5)  # those that were late have been pinged meanwhile
        began = trio.current_time()
        assert set(values(await own.get_many(KEYS, quorum=3))) == {b"old"}
        assert trio.current_time() - began < SMALL.slow_after


async def test_what_a_node_has_read_it_stores_without_a_look_up(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    nodes, _ = await stored(network)
    reader = nodes[20]
    await reader.get_many(KEYS)
    network.calls.clear()
    assert await reader.store("key3", b"new", 200.0) == SMALL.k
    assert network.calls["dht.find"] == 0
    assert (await nodes[7].get_many(["key3"]))["key3"] == await nodes[13].get("key3")


async def test_nodes_that_are_only_named_are_not_taken_for_replicas(autojump_clock: MockClock) -> None:
    network = FakeNetwork()
    _, own = await stored(network)
    strangers = sorted((make_contact(n) for n in range(1000, 3000)), key=lambda c: c.node_id ^ key_id("key9"))
    own.replicas.note(key_id("key9"), strangers[: SMALL.k])
    assert await own.store("key9", b"new", 200.0) == SMALL.k


def values(found: Mapping[str, object]) -> list[bytes | None]:
    return [value.data if isinstance(value, Value) else None for value in found.values()]
