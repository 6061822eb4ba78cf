"""The answers of several nodes about one record become one record. Plain values, no network."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from labkit.dht.protocol import WireItem
from labkit.dht.signing import Signer, merge
from labkit.dht.storage import Entry, Item, Storage

SUBKEYS = [None, "a", "b"]
items = st.builds(
    WireItem, st.sampled_from([b"x", b"y"]), st.sampled_from([1.0, 2.0, 9.0]), st.sampled_from(SUBKEYS),
    st.integers(0, 2),
)  # fmt: skip


def signed(signer: Signer, value: bytes, sequence: int) -> WireItem:
    entry = signer.sign(Entry("key", value, 9.0, "a", sequence))
    return WireItem(entry.value, entry.ttl, "a", sequence, False, entry.owner, entry.signature)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5]), st.lists(items, max_size=4)), max_size=4))
def test_it_is_what_a_node_would_hold_that_was_given_all_of_it(answers: list[tuple[float, list[WireItem]]]) -> None:
    now = 1.5
    held: dict[str | None, Item] = {"b": Item(b"x", 5.0, 1)}
    expected: dict[str | None, tuple[int, float, bytes]] = {"b": (1, 5.0, b"x")}
    for at, some in answers:
        for item in some:
            version = (item.sequence, at + item.ttl, item.value)
            if version[1] > now:
                expected[item.subkey] = max(version, expected.get(item.subkey, version))
    assert {subkey: version[:3] for subkey, version in merge("key", held, answers, now).items()} == expected


def test_an_item_that_is_signed_counts_only_if_its_signature_holds() -> None:
    signer = Signer()
    good, better = signed(signer, b"good", 1), signed(signer, b"better", 2)
    forged = WireItem(b"forged", 9.0, "a", 3, False, good.owner, good.signature)
    for answers in ([good, forged, better], [better, good, forged]):
        assert merge("key", {}, [(0.0, answers)], 1.0)["a"].value == b"better"
    assert merge("key", {}, [(0.0, [forged])], 1.0) == {}


def test_an_owner_keeps_what_is_his_from_those_who_sign_as_another_or_not_at_all() -> None:
    owner, thief = Signer(), Signer()
    unsigned = WireItem(b"unsigned", 9.0, "a", 9)
    answers = [unsigned, signed(owner, b"owned", 1), signed(thief, b"stolen", 5), unsigned]
    assert merge("key", {}, [(0.0, answers)], 1.0)["a"].value == b"owned"


def test_what_is_held_here_takes_part_and_stays_as_it_is() -> None:
    storage = Storage(lambda *_: True)
    old, new = Item(b"old", 9.0, 1), WireItem(b"new", 5.0, "a", 2)
    storage.put("key", "a", old, 0.0)
    assert merge("key", storage.get("key", 0.0), [(0.0, [new])], 0.0)["a"].value == b"new"
    assert storage.get("key", 0.0)["a"] is old
