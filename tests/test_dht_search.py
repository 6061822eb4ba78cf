"""One look-up's thinking: whom it asks next, and when it is over. Plain state, no network."""

from __future__ import annotations

from labkit.contact import Contact
from labkit.dht.protocol import WireItem
from labkit.dht.search import Answer, Search
from tests.fake_network import make_contact

NODES = sorted(map(make_contact, range(30)), key=lambda contact: contact.node_id)  # by distance to the id 0
NOTHING = Answer((), (), 0.0)


def search(**options: int) -> Search:
    return Search("key", 0, NODES, k=20, alpha=3, quorum=3, **options)


def value(cached: bool = False) -> Answer:
    return Answer((), [WireItem(b"value", 100.0, cached=cached)], 0.0)


def asked(search: Search) -> list[Contact]:
    contacts = search.next()
    assert contacts is not None
    return contacts


def test_the_nearest_are_asked_first_so_many_at_a_time() -> None:
    one = search()
    assert asked(one) == NODES[:3]
    assert asked(one) == []
    one.answered(NODES[1], NOTHING)
    assert asked(one) == NODES[3:4]


def test_nobody_else_is_asked_while_enough_of_those_who_were_should_have_the_value() -> None:
    one = search()
    asked(one)
    one.answered(NODES[2], value())  # so the two that are nearer have it, too
    assert asked(one) == []
    one.answered(NODES[0], value())
    assert asked(one) == []
    one.answered(NODES[1], value())
    assert one.next() is None


def test_who_is_farther_than_a_replica_may_be_none_so_others_are_asked_beside_it() -> None:
    one = search()
    asked(one)
    one.answered(NODES[0], value())
    assert asked(one) == NODES[3:4]


def test_a_node_that_holds_the_record_itself_knows_that_those_nearer_do() -> None:
    one = search(reach=NODES[10].node_id)
    assert asked(one) == NODES[:3]
    one.answered(NODES[0], value())
    assert asked(one) == []


def test_others_are_asked_when_one_of_whom_the_value_was_expected_has_none_fails_or_is_slow() -> None:
    one = search(reach=NODES[10].node_id)
    asked(one)
    one.answered(NODES[0], NOTHING)
    assert asked(one) == NODES[3:4]
    one.failed(NODES[1])
    assert asked(one) == NODES[4:5]
    one.slow(NODES[2])
    assert asked(one) == NODES[5:6]


def test_copies_from_the_way_are_not_enough_and_say_nothing_of_who_is_near() -> None:
    one = search()
    asked(one)
    for contact in NODES[:3]:
        one.answered(contact, value(cached=True))
    assert asked(one) == NODES[3:6]
    one.answered(NODES[3], value())
    assert one.next() is None
