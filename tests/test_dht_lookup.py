"""One look-up: which nodes it asks next, and when it is done. Plain state, no network."""

from __future__ import annotations

from labkit.contact import Contact
from labkit.dht.lookup import Lookup
from labkit.dht.protocol import NodeAnswer, WireItem
from tests.fake_network import make_contact

NODES = sorted(map(make_contact, range(30)), key=lambda contact: contact.node_id)  # by distance to the id 0
NOTHING = NodeAnswer((), (), 0.0)


def new_lookup() -> Lookup:
    return Lookup("key", 0, NODES, k=20, alpha=3, quorum=3)


def value(cached: bool = False) -> NodeAnswer:
    return NodeAnswer((), [WireItem(b"value", 100.0, cached=cached)], 0.0)


def asked(lookup: Lookup) -> list[Contact]:
    contacts = lookup.next()
    assert contacts is not None
    return contacts


def test_the_nearest_are_asked_first_so_many_at_a_time() -> None:
    lookup = new_lookup()
    assert asked(lookup) == NODES[:3]
    assert asked(lookup) == []
    lookup.answered(NODES[1], NOTHING)
    assert asked(lookup) == NODES[3:4]


def test_it_goes_on_so_many_at_a_time_when_it_has_found_a_value_since_any_of_them_may_be_dead() -> None:
    lookup = new_lookup()
    asked(lookup)
    lookup.answered(NODES[2], value())
    assert asked(lookup) == NODES[3:4]
    lookup.failed(NODES[0])
    assert asked(lookup) == NODES[4:5]
    lookup.slow(NODES[1])
    assert asked(lookup) == NODES[5:6]


def test_it_is_over_when_a_quorum_has_given_the_value() -> None:
    lookup = new_lookup()
    asked(lookup)
    for contact in NODES[:2]:
        lookup.answered(contact, value())
    assert lookup.next() is not None
    lookup.answered(NODES[2], value())
    assert lookup.next() is None


def test_copies_from_the_way_are_not_enough() -> None:
    lookup = new_lookup()
    asked(lookup)
    for contact in NODES[:3]:
        lookup.answered(contact, value(cached=True))
    lookup.next()
    lookup.answered(NODES[3], value())
    assert lookup.next() is None
