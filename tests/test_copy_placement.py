"""Where copies go: the servers of a grid find each other in the DHT, and all rank them alike."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from labkit.contact import Contact
from labkit.copies import GridServers, ServerRecord, rank
from labkit.copies.servers import KEY_PREFIX, MAX_SERVERS, NAMESPACE, PERIOD, REWRITE, TTL
from labkit.dht.node import Entry
from labkit.errors import DeadlineExceeded
from tests.fake_network import FakeNetwork, make_contact, running
from tests.fake_records import FakeRecords

UIDS = [f"ffn.{i}.{j}" for i in range(40) for j in range(25)]


def server(number: int, host: str = "", **changes: Any) -> ServerRecord:
    """A server with room, on a machine of its own unless `host` says another."""
    contact = make_contact(number)
    return ServerRecord(Contact(contact.key, host or f"10.0.0.{number}", contact.port), **{"room": 100} | changes)


def keys(records: list[ServerRecord]) -> list[bytes]:
    return [record.contact.key for record in records]


# ---------------------------------------------------------------- the ranking


def test_everybody_ranks_the_servers_alike_in_whatever_order_they_were_found():
    servers = [server(n) for n in range(20)]
    primary = servers[3].contact
    ranked = rank("ffn.0.1", servers, primary)
    assert primary not in [record.contact for record in ranked]
    assert len(ranked) == 19
    for seed in range(10):
        shuffled = random.Random(seed).sample(servers, 20)
        assert rank("ffn.0.1", shuffled, primary) == ranked
    assert rank("ffn.0.2", servers, primary) != ranked


def backups(servers: list[ServerRecord]) -> dict[str, bytes]:
    """The first backup of each of 1,000 experts, whose primary is far away."""
    return {uid: rank(uid, servers, make_contact(999))[0].contact.key for uid in UIDS}


def test_copies_are_spread_evenly():
    counts = Counter(backups([server(n) for n in range(20)]).values())
    assert len(counts) == 20
    assert max(counts.values()) < 1.5 * 50 and min(counts.values()) > 0.5 * 50


def test_a_server_that_leaves_moves_only_the_copies_that_it_kept_and_one_that_joins_those_that_it_takes():
    servers = [server(n) for n in range(21)]
    before, with_one_more = backups(servers[:20]), backups(servers)
    moved = {uid for uid in UIDS if before[uid] != with_one_more[uid]}
    assert {with_one_more[uid] for uid in moved} == {servers[20].contact.key}
    assert 30 < len(moved) < 70, "about a twenty-first of 1,000"


def test_another_host_than_the_primarys_comes_first_then_its_own_then_servers_without_room():
    servers = [server(n, host=f"10.0.0.{n % 3}", room=n % 2) for n in range(30)]
    primary = servers[0].contact
    ranked = rank("ffn.0.1", servers, primary)
    groups = [(record.room == 0, record.contact.host == primary.host) for record in ranked]
    assert groups == sorted(groups)
    assert len(set(groups)) == 4


def test_addresses_of_this_machine_are_one_host():
    here = [server(n, host=f"127.0.0.{n}") for n in range(1, 8)]
    away = server(9)
    assert rank("ffn.0.1", [*here, away], here[0].contact)[0] == away


def test_a_server_that_holds_a_copy_has_room_for_it():
    servers = [server(n) for n in range(5)]
    first = rank("ffn.0.1", servers, make_contact(999))[0]
    full = [record if record != first else msgspec.structs.replace(record, room=0) for record in servers]
    primary, key = make_contact(999), first.contact.key
    assert rank("ffn.0.1", full, primary)[0].contact.key != key
    assert rank("ffn.0.1", full, primary, holders=[key])[0].contact.key == key
    assert rank("ffn.0.1", full, primary, holders=[key[:KEY_PREFIX]])[0].contact.key == key


# ---------------------------------------------------------------- finding each other (in virtual time)


def numbers(servers: GridServers) -> set[int]:
    """Whom it sees, by the numbers of `server`."""
    known = {server(n).contact: n for n in range(50)}
    return {known[record.contact] for record in servers.others.values()}


def make(records: Any, number: int) -> GridServers:
    return GridServers(records, "ffn", lambda: server(number))


async def test_servers_of_a_grid_find_each_other_with_what_each_has_to_say(nursery, autojump_clock: MockClock):
    records = FakeRecords()
    news = server(1, experts=4, copies=2, room=6, kind="ffn")
    first, second = make(records, 0), GridServers(records, "ffn", lambda: news)
    await nursery.start(first.run)
    await nursery.start(second.run)
    assert (numbers(second), numbers(first)) == ({0}, set())
    await trio.sleep(PERIOD + 0.1)
    (found,) = first.others.values()
    assert found == msgspec.structs.replace(news, stamp=found.stamp)
    news = server(1, room=0)
    second.refresh()
    await trio.sleep(0.1)
    first.refresh()
    await trio.sleep(0.1)
    assert [record.room for record in first.others.values()] == [0], "at once"


async def test_what_a_server_says_with_its_experts_it_need_not_say_again(nursery, autojump_clock):
    records = FakeRecords()
    one = GridServers(records, "ffn", lambda: server(1))
    other = GridServers(records, "ffn", None)
    await nursery.start(one.run)
    for _ in range(10):
        await trio.sleep(10)
        await records.store_many(one.entries())  # as when all experts are declared
        await other.read()
        assert keys([*other.others.values()]) == [server(1).contact.key]
    assert records.stores == 1 + 10
    await one.leave()
    assert one.entries() == []


async def test_who_only_looks_is_not_seen(nursery, autojump_clock):
    records = FakeRecords()
    looks = GridServers(records, "ffn", None)
    await nursery.start(make(records, 1).run)
    await nursery.start(looks.run)
    assert numbers(looks) == {1}
    assert len(records.records[NAMESPACE + "ffn"]) == 1


async def test_a_server_that_says_nothing_any_more_is_forgotten(nursery, autojump_clock):
    records = FakeRecords()
    first, second = make(records, 0), make(records, 1)
    await second.round()
    await first.round()
    await trio.sleep(TTL - 1)
    assert numbers(first) == {1}
    await trio.sleep(1.1)
    assert numbers(first) == set()


async def test_a_read_that_misses_a_server_does_not_forget_it(nursery, autojump_clock):
    records = FakeRecords()
    first, second = make(records, 0), make(records, 1)
    await second.round()
    await first.round()
    records.records.clear()
    await first.round()
    assert numbers(first) == {1}


async def test_a_server_that_is_lost_is_left_out_until_it_writes_itself_anew(nursery, autojump_clock):
    records = FakeRecords()
    first, second = make(records, 0), make(records, 1)
    await second.round()
    await first.round()
    first.lose(server(1).contact)
    assert numbers(first) == set()
    await first.round()
    assert numbers(first) == set(), "the record is still the old one"
    await trio.sleep(REWRITE)
    await second.round()
    await first.round()
    assert numbers(first) == {1}


async def test_the_last_words_of_a_server_that_is_lost_do_not_bring_it_back(nursery, autojump_clock):
    records = FakeRecords()
    first, second = make(records, 0), make(records, 1)
    await second.round()
    await first.round()
    await trio.sleep(REWRITE)
    await second.round()  # it is killed right after, and `first` has not read this yet
    await trio.sleep(1)
    first.lose(server(1).contact)
    for _ in range(10):
        await first.round()
        assert numbers(first) == set()
        await trio.sleep(2)


async def test_a_lost_servers_record_that_other_nodes_keep_alive_does_not_bring_it_back(nursery, autojump_clock):
    records = FakeRecords()
    first, second = make(records, 0), make(records, 1)
    await second.round()
    await first.round()
    first.lose(server(1).contact)
    await trio.sleep(1)
    subkey = server(1).contact.key.hex()
    value = records.records[NAMESPACE + "ffn"][subkey]
    await records.store_many([Entry(NAMESPACE + "ffn", value.data, TTL, subkey)])  # with a delay for each hop
    await first.round()
    assert numbers(first) == set()


async def test_a_server_that_was_lost_before_it_was_seen_comes_back_the_same_way(nursery, autojump_clock):
    records = FakeRecords()
    first, second = make(records, 0), make(records, 1)
    await second.round()
    await trio.sleep(1)
    first.lose(server(1).contact)
    await first.round()
    assert numbers(first) == set()
    await trio.sleep(REWRITE)
    await second.round()
    await first.round()
    assert numbers(first) == {1}


async def test_a_server_that_leaves_is_left_out_at_once_and_stays_away(nursery, autojump_clock):
    records = FakeRecords()
    first, second = make(records, 0), make(records, 1)
    await nursery.start(first.run)
    await nursery.start(second.run)
    await trio.sleep(PERIOD + 0.1)
    assert numbers(first) == {1}
    await second.leave()
    await first.round()
    assert numbers(first) == set()
    await trio.sleep(2 * PERIOD)
    assert numbers(first) == set()
    assert numbers(second) == {0}, "it goes on looking while it stops"


async def test_a_dht_that_fails_for_a_while_ends_nothing(nursery, autojump_clock, caplog):
    records = FakeRecords()
    first, second = make(records, 0), make(records, 1)
    records.fail_with = DeadlineExceeded("no answer")
    await nursery.start(first.run)
    await nursery.start(second.run)
    assert "could not be read" in caplog.text
    records.fail_with = None
    await trio.sleep(2 * PERIOD)
    assert (numbers(first), numbers(second)) == ({1}, {0})


@pytest.mark.parametrize(
    ("subkey", "record"),
    [
        (server(2).contact.key.hex(), b"\xff"),
        (server(2).contact.key.hex(), msgspec.msgpack.encode(server(3))),
        ("", msgspec.msgpack.encode(server(2))),
        (server(2).contact.key.hex(), msgspec.msgpack.encode(server(2, experts=-1))),
        (server(2).contact.key.hex(), msgspec.msgpack.encode(server(2, room=1 << 40))),
        (server(2).contact.key.hex(), msgspec.msgpack.encode(server(2, kind="k" * 1001))),
        (server(2).contact.key.hex(), msgspec.msgpack.encode(server(2, stamp=-1))),
        (make_contact(2).key.hex(), msgspec.msgpack.encode(ServerRecord(Contact(make_contact(2).key, "h", 1, False)))),
    ],
)
async def test_what_is_no_servers_record_is_ignored(autojump_clock, subkey, record):
    records = FakeRecords()
    await make(records, 1).round()
    await records.store_many([Entry(NAMESPACE + "ffn", record, TTL, subkey)])
    first = make(records, 0)
    await first.round()
    assert numbers(first) == {1}


async def test_servers_that_are_silent_expire_one_by_one_without_another_look(autojump_clock):
    records = FakeRecords()
    looks = GridServers(records, "ffn", None)
    for number in (1, 2):
        await make(records, number).round()
        await trio.sleep(TTL / 3)
    await looks.round()
    seen = [numbers(looks)]
    for _ in range(2):
        await trio.sleep(TTL / 3)
        seen.append(numbers(looks))
    assert seen == [{1, 2}, {2}, set()]


async def test_a_flood_of_servers_is_cut_off(autojump_clock):
    records = FakeRecords()
    for n in range(MAX_SERVERS + 50):
        record = ServerRecord(make_contact(100 + n))
        entry = Entry(NAMESPACE + "ffn", msgspec.msgpack.encode(record), TTL, record.contact.key.hex())
        await records.store_many([entry])
    looks = GridServers(records, "ffn", None)
    for _ in range(3):
        await looks.round()
        assert len(looks.others) == MAX_SERVERS


async def test_servers_find_each_other_in_a_real_dht_and_a_new_life_replaces_the_old_one(autojump_clock):
    nodes = await FakeNetwork().nodes(8)
    async with running(nodes):
        first, second = make(nodes[1], 1), make(nodes[2], 2)
        for one in (second, first):
            await one.round()
        assert numbers(first) == {2}
        stamp = next(iter(first.others.values())).stamp
        await trio.sleep(1)
        await make(nodes[3], 2).round()
        await first.round()
        (found,) = first.others.values()
        assert found.stamp > stamp
