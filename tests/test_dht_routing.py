"""The routing table and the blacklist: plain state, no network."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from labkit.contact import ID_BITS, Contact
from labkit.dht.routing import Blacklist, RoutingTable
from tests.fake_network import make_contact

ids = st.integers(0, 2**ID_BITS - 1)
numbers = st.lists(st.integers(0, 10_000), max_size=200)


def far_contacts(count: int) -> list[Contact]:
    """Contacts in the half of the id space that does not hold the id 0."""
    contacts = (make_contact(number) for number in range(10 * count))
    return [contact for contact in contacts if contact.node_id >> (ID_BITS - 1)][:count]


@given(own=ids, target=ids, seen=numbers, count=st.integers(1, 30), k=st.integers(1, 20))
def test_nearest_equals_sorting_everyone_known(own: int, target: int, seen: list[int], count: int, k: int) -> None:
    table = RoutingTable(own, k)
    for number in seen:
        table.seen(make_contact(number), 0.0)
    known = sorted(table, key=lambda contact: contact.node_id ^ target)
    assert table.nearest(target, count) == known[:count]


@given(own=ids, seen=numbers, k=st.integers(1, 20))
def test_buckets_cover_the_id_space_and_hold_at_most_k_each(own: int, seen: list[int], k: int) -> None:
    table = RoutingTable(own, k)
    for number in seen:
        table.seen(make_contact(number), 0.0)
    assert [bucket.low for bucket in table.buckets] == sorted(bucket.low for bucket in table.buckets)
    assert sum(1 << bucket.bits for bucket in table.buckets) == 1 << ID_BITS
    for bucket in table.buckets:
        assert len(bucket.contacts) <= k
        assert all(bucket.covers(node_id) for node_id in bucket.contacts)


@given(own=ids, seen=numbers)
def test_the_own_neighbourhood_is_known_completely(own: int, seen: list[int]) -> None:
    table = RoutingTable(own, 4)
    everyone = {make_contact(number).node_id: make_contact(number) for number in seen}
    for contact in everyone.values():
        table.seen(contact, 0.0)
    near = next(bucket for bucket in table.buckets if bucket.covers(own))
    assert set(near.contacts) == {node_id for node_id in everyone if near.covers(node_id) and node_id != own}


def test_only_the_bucket_around_the_own_id_splits() -> None:
    table = RoutingTable(0, k=2)
    for number in range(200):
        table.seen(make_contact(number), 0.0)
    assert len(table.buckets[-1].contacts) == 2
    assert table.buckets[-1].bits == ID_BITS - 1
    assert all(bucket.low > 0 for bucket in table.buckets[1:])


def test_a_full_bucket_names_its_least_recently_seen_contact_to_be_pinged() -> None:
    table = RoutingTable(0, k=3)
    first, second, third, newcomer = far_contacts(4)
    for contact in (first, second, third):
        assert table.seen(contact, 0.0) is None
    table.seen(first, 1.0)
    assert table.seen(newcomer, 2.0) == second
    assert newcomer.node_id not in table


def test_a_contact_that_answers_its_ping_stays_and_one_that_fails_makes_room() -> None:
    table = RoutingTable(0, k=2)
    first, second, newcomer = far_contacts(3)
    for contact in (first, second, newcomer):
        table.seen(contact, 0.0)
    table.seen(first, 1.0)  # it answered
    assert list(table) == [second, first]
    table.failed(second.node_id)
    assert list(table) == [first, newcomer]


def test_a_failed_contact_that_nobody_can_replace_stays_until_it_is_removed() -> None:
    table = RoutingTable(0, k=2)
    contact = make_contact(1)
    table.seen(contact, 0.0)
    table.failed(contact.node_id)
    assert contact.node_id in table
    assert table.remove(contact.node_id) == contact
    assert len(table) == 0


def test_a_crowd_of_newcomers_causes_one_ping_per_bucket_and_period() -> None:
    table = RoutingTable(0, k=2, probe_period=5.0)
    pings = [table.seen(contact, 1.0) for contact in far_contacts(20)]
    assert sum(ping is not None for ping in pings) == 1
    assert len(table.buckets[-1].replacements or ()) == 2
    assert table.seen(far_contacts(30)[-1], 6.0) is not None


def test_a_contact_seen_at_another_address_is_updated() -> None:
    table = RoutingTable(0)
    contact = make_contact(1)
    moved = Contact(contact.key, "127.0.0.2", 7)
    table.seen(contact, 0.0)
    table.seen(moved, 1.0)
    assert list(table) == [moved]


def test_a_bucket_is_stale_when_nothing_was_looked_up_in_it() -> None:
    table = RoutingTable(0, k=1)
    for contact in (make_contact(number) for number in range(4)):
        table.seen(contact, 0.0)
    for bucket in table.buckets:
        table.looked_up(bucket.low, 100.0)
    table.looked_up(1 << ID_BITS - 1, 200.0)
    assert len(table.stale(250.0, 100.0)) == len(table.buckets) - 1


def test_the_blacklist_doubles_the_back_off_up_to_its_limit() -> None:
    blacklist = Blacklist(base=1.0, longest=4.0)
    now, waits = 0.0, []
    for _ in range(4):
        blacklist.failed(7, now)
        wait = next(seconds for seconds in (1.0, 2.0, 4.0, 8.0) if not blacklist.blocks(7, now + seconds))
        waits.append(wait)
        now += wait
    assert waits == [1.0, 2.0, 4.0, 4.0]
    blacklist.clear(7)
    assert not blacklist.blocks(7, now)


def test_calls_that_fail_together_count_as_one_failure() -> None:
    blacklist = Blacklist(base=1.0)
    assert [blacklist.failed(7, 0.0), blacklist.failed(7, 0.5), blacklist.failed(7, 1.0)] == [1, 1, 2]


def test_the_blacklist_is_bounded_and_forgets() -> None:
    blacklist = Blacklist(base=1.0, longest=10.0, capacity=3)
    for node_id in range(5):
        blacklist.failed(node_id, 0.0)
    assert [node_id for node_id in range(5) if node_id in blacklist] == [2, 3, 4]
    blacklist.forget(1000.0)
    assert 4 not in blacklist
