"""One look-up's thinking: whom it asks next, and when it is over. Plain state, no network."""

from __future__ import annotations

from labkit.contact import Contact
from labkit.dht.lookup import Lookup
from labkit.dht.protocol import NodeAnswer, WireItem
from tests.fake_network import make_contact

NODES = sorted(map(make_contact, range(30)), key=lambda contact: contact.node_id)  # by distance to the id 0
NOTHING = NodeAnswer((), (), 0.0)


def search() -> Lookup:
    return Lookup("key", 0, NODES, k=20, alpha=3, quorum=3)


def value(cached: bool = False) -> NodeAnswer:
    return NodeAnswer((), [WireItem(b"value", 100.0, cached=cached)], 0.0)


def asked(search: Lookup) -> list[Contact]:
    contacts = search.next()
    assert contacts is not None
    return contacts


def test_the_nearest_are_asked_first_so_many_at_a_time() -> None:
    one = search()
    assert asked(one) == NODES[:3]
    assert asked(one) == []
    one.answered(NODES[1], NOTHING)
    assert asked(one) == NODES[3:4]


def test_it_goes_on_so_many_at_a_time_when_it_has_found_a_value_since_any_of_them_may_be_dead() -> None:
    one = search()
    asked(one)
    one.answered(NODES[2], value())
    assert asked(one) == NODES[3:4]
    one.failed(NODES[0])
    assert asked(one) == NODES[4:5]
    one.slow(NODES[1])
    assert asked(one) == NODES[5:6]


def test_it_is_over_when_a_quorum_has_given_the_value() -> None:
    one = search()
    asked(one)
    for contact in NODES[:2]:
        one.answered(contact, value())
    assert one.next() is not None
    one.answered(NODES[2], value())
    assert one.next() is None


def test_copies_from_the_way_are_not_enough() -> None:
    one = search()
    asked(one)
    for contact in NODES[:3]:
        one.answered(contact, value(cached=True))
    one.next()
    one.answered(NODES[3], value())
    assert one.next() is None
