"""Records: expirations, merging, bounds and owners. Plain state, no network."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.dht import Entry, Signer
from labkit.dht.protocol import MAX_ENTRIES, MAX_STORE_BYTES, ReplyBuilder, WireItem, batches
from labkit.dht.signing import verify
from labkit.dht.storage import Item, Limits, Role, Storage


def put(
    storage: Storage, entry: Entry, now: float = 0.0, role: Role = Role.REPLICA, by: bytes = b"", ours: bool = False
) -> str | None:
    item = Item(entry.value, now + entry.ttl, entry.sequence, entry.owner, entry.signature, role, ours=ours)
    return storage.put(entry.key, entry.subkey, item, now, by)


def values(storage: Storage, key: str, now: float = 0.0) -> dict[str | None, bytes]:
    return {subkey: item.value for subkey, item in storage.get(key, now).items()}


def test_a_value_is_held_until_it_expires() -> None:
    storage = Storage(verify)
    put(storage, Entry("key", b"value", ttl=10.0))
    assert values(storage, "key", 9.9) == {None: b"value"}
    assert values(storage, "key", 10.0) == {}
    assert len(storage) == storage.size == 0


def test_the_subkeys_of_a_dictionary_expire_one_by_one() -> None:
    storage = Storage(verify)
    put(storage, Entry("ffn", b"a", 10.0, subkey="1"))
    put(storage, Entry("ffn", b"b", 20.0, subkey="2"))
    assert values(storage, "ffn", 5.0) == {"1": b"a", "2": b"b"}
    assert values(storage, "ffn", 15.0) == {"2": b"b"}
    storage.expire(20.0)
    assert len(storage) == storage.size == 0


def test_the_later_expiration_wins_then_the_larger_bytes() -> None:
    storage = Storage(verify)
    assert put(storage, Entry("key", b"b", 10.0)) is None
    assert put(storage, Entry("key", b"z", 9.0)) == "a later entry is held"
    assert put(storage, Entry("key", b"a", 10.0)) == "a later entry is held"
    assert put(storage, Entry("key", b"c", 10.0)) is None
    assert put(storage, Entry("key", b"a", 11.0)) is None
    assert values(storage, "key") == {None: b"a"}


def test_a_higher_sequence_number_wins_over_any_expiration() -> None:
    storage = Storage(verify)
    put(storage, Entry("key", b"old", 100.0))
    assert put(storage, Entry("key", b"new", 5.0, sequence=1)) is None
    assert put(storage, Entry("key", b"old", 200.0)) == "a later entry is held"


def test_storing_a_copy_again_prolongs_it_and_never_shortens_it() -> None:
    storage = Storage(verify)
    put(storage, Entry("key", b"value", 10.0))
    assert put(storage, Entry("key", b"value", 5.0)) is None
    assert put(storage, Entry("key", b"value", 10.0), now=5.0) is None
    assert values(storage, "key", 14.0) == {None: b"value"}


def test_a_cached_copy_becomes_a_replica_and_not_the_other_way_round() -> None:
    storage = Storage(verify)
    put(storage, Entry("key", b"value", 10.0), role=Role.CACHED)
    put(storage, Entry("key", b"value", 10.0))
    put(storage, Entry("key", b"value", 10.0), role=Role.CACHED)
    assert storage.get("key", 0.0)[None].role is Role.REPLICA


entries = st.builds(
    Entry,
    key=st.just("key"),
    value=st.binary(max_size=1),
    ttl=st.sampled_from([1.0, 2.0, 3.0]),
    subkey=st.sampled_from(["a", "b"]),
    sequence=st.integers(0, 2),
)


@given(st.lists(entries, max_size=4))
def test_the_order_in_which_entries_arrive_does_not_matter(stored: list[Entry]) -> None:
    outcomes = []
    for order in permutations(stored):
        storage = Storage(verify)
        for entry in order:
            put(storage, entry)
        outcomes.append({s: (i.value, i.sequence, i.expires_at) for s, i in storage.get("key", 0.0).items()})
    assert all(outcome == outcomes[0] for outcome in outcomes)


@given(st.lists(st.tuples(entries, st.floats(0.0, 2.0)), max_size=20))
def test_the_size_is_the_sum_of_what_is_held(steps: list[tuple[Entry, float]]) -> None:
    storage, now = Storage(verify), 0.0
    for entry, pause in steps:
        now += pause
        put(storage, entry, now)
        held = storage.get("key", now).items()
        assert all(item.expires_at > now for _, item in held)
        assert storage.size == sum(item.size(subkey) for subkey, item in held)


def test_a_key_holds_either_a_value_or_a_dictionary() -> None:
    storage = Storage(verify)
    put(storage, Entry("plain", b"", 10.0))
    put(storage, Entry("dictionary", b"", 10.0, subkey="a"))
    assert put(storage, Entry("plain", b"", 10.0, subkey="a")) == "the key holds a plain value"
    assert put(storage, Entry("dictionary", b"", 10.0)) == "the key holds a dictionary"
    assert put(storage, Entry("plain", b"", 10.0, subkey="a"), now=11.0) is None


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Entry("key", b"x" * 65_537, 1.0), "65537 bytes"),
        (Entry("key", b"", 0.0), "ttl"),
        (Entry("key", b"", -1.0), "ttl"),
        (Entry("key", b"", math.nan), "ttl"),
        (Entry("key", b"", math.inf), "ttl"),
        (Entry("key", b"", 25 * 3600.0), "ttl"),
        (Entry("", b"", 1.0), "a key"),
        (Entry("k" * 513, b"", 1.0), "a key"),
        (Entry("key", b"", 1.0, subkey="ü" * 129), "a subkey"),
        (Entry("key", b"", 1.0, subkey="\ud800"), "a subkey"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_the_reason(entry: Entry, reason: str) -> None:
    storage = Storage(verify)
    assert reason in (put(storage, entry) or "")
    assert len(storage) == 0


def test_a_full_dictionary_refuses_new_subkeys_but_not_new_values() -> None:
    storage = Storage(verify, Limits(max_subkeys=2))
    put(storage, Entry("key", b"", 10.0, subkey="a"))
    put(storage, Entry("key", b"", 20.0, subkey="b"))
    assert "full" in (put(storage, Entry("key", b"", 10.0, subkey="c")) or "")
    assert put(storage, Entry("key", b"new", 30.0, subkey="a")) is None
    assert put(storage, Entry("key", b"", 30.0, subkey="c"), now=21.0) is None


def test_a_full_node_refuses_and_has_room_again_when_records_have_expired() -> None:
    for limits in (Limits(max_keys=2), Limits(max_bytes=500)):
        storage = Storage(verify, limits)
        put(storage, Entry("a", b"", 10.0))
        put(storage, Entry("b", b"", 20.0))
        assert "the node is full" in (put(storage, Entry("c", b"", 10.0)) or "")
        assert put(storage, Entry("c", b"", 10.0), now=10.0) is None


def test_a_full_node_does_not_look_at_all_that_it_holds_for_each_item_that_it_refuses() -> None:
    class Watched(Storage):
        looks = 0

        def expire(self, now: float) -> None:
            self.looks += 1
            super().expire(now)

    storage = Watched(verify, Limits(max_keys=1))
    put(storage, Entry("a", b"", 10.0))
    for number in range(100):
        assert "the node is full" in (put(storage, Entry(f"b{number}", b"", 5.0), now=number / 100) or "")
    assert storage.looks == 1


FULL = {"keys": Limits(max_keys=4), "bytes": Limits(max_bytes=900)}  # room for four items


@pytest.mark.parametrize("limits", FULL.values(), ids=FULL)
def test_a_full_node_drops_what_expires_first_for_what_is_new(limits: Limits) -> None:
    storage = Storage(verify, limits)
    for key, ttl in (("d", 40.0), ("a", 10.0), ("c", 30.0), ("b", 20.0)):
        put(storage, Entry(key, b"", ttl))
    put(storage, Entry("a", b"", 35.0))  # prolonged, so that b is the first
    assert put(storage, Entry("e", b"", 50.0)) is None
    assert sorted(storage) == ["a", "c", "d", "e"]
    assert put(storage, Entry("f", b"", 25.0)) == (
        "the node is full (4 keys)" if limits.max_keys == 4 else "the node is full (900 bytes)"
    ), "it would be the first to go"
    assert put(storage, Entry("g", b"", 45.0)) is None
    assert sorted(storage) == ["a", "d", "e", "g"]


@pytest.mark.parametrize("limits", [Limits(max_keys=100), Limits(max_bytes=22_000)], ids=["keys", "bytes"])
def test_one_who_stores_rubbish_that_lives_for_long_flushes_nobody_and_locks_nobody_out(limits: Limits) -> None:
    storage = Storage(verify, limits)
    for number in range(5):
        assert put(storage, Entry(f"early {number}", b"", 30.0), by=b"honest") is None
    assert put(storage, Entry("own", b"", 1.0), ours=True) is None
    for number in range(1000):
        put(storage, Entry(f"rubbish {number}", b"x" * (number % 7), 86_000.0 + number % 99), by=b"attacker")
    for number in range(5):
        assert put(storage, Entry(f"late {number}", b"", 20.0), by=b"another") is None
    held = set(storage)
    assert {f"early {n}" for n in range(5)} | {f"late {n}" for n in range(5)} | {"own"} <= held
    assert len(held) <= limits.max_keys and storage.size <= limits.max_bytes


def test_the_same_holds_within_a_dictionary() -> None:
    storage = Storage(verify, Limits(max_subkeys=50))
    assert put(storage, Entry("ffn", b"", 30.0, subkey="honest"), by=b"honest") is None
    for number in range(500):
        put(storage, Entry("ffn", b"", 86_000.0, subkey=f"rubbish {number}"), by=b"attacker")
    assert put(storage, Entry("ffn", b"", 20.0, subkey="late"), by=b"another") is None
    assert {"honest", "late"} <= values(storage, "ffn").keys() and len(values(storage, "ffn")) == 50


def test_with_many_identities_one_takes_the_room_of_many_and_still_none_of_whoever_has_less() -> None:
    storage = Storage(verify, Limits(max_bytes=100_000))
    for number in range(3):
        put(storage, Entry(f"honest {number}", b"", 30.0), by=b"honest")
    for number in range(3000):
        put(storage, Entry(f"rubbish {number}", b"", 86_000.0), by=b"%d" % (number % 50))
    assert {f"honest {number}" for number in range(3)} <= set(storage)


def test_what_a_node_stores_itself_has_room_whoever_has_filled_it() -> None:
    storage = Storage(verify, Limits(max_keys=10))
    for number in range(20):
        put(storage, Entry(f"rubbish {number}", b"", 1000.0 + number), by=b"attacker")
    for number in range(8):
        assert put(storage, Entry(f"own {number}", b"", 10.0), ours=True) is None
    assert sum(key.startswith("own") for key in storage) == 8


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 4), st.floats(0.1, 9.0)), max_size=60))
def test_a_node_is_never_over_its_limits_and_counts_right(steps: list[tuple[int, int, int, float]]) -> None:
    limits = Limits(max_keys=4, max_bytes=2000, max_subkeys=3, max_record=700)
    storage, now = Storage(verify, limits), 0.0
    for key, subkey, publisher, ttl in steps:
        now += 0.3
        put(storage, Entry(f"key {key}", b"x" * (10 * subkey), ttl, f"{subkey}"), now, by=b"%d" % publisher)
        held = {key: dict(storage._records[key].items) for key in storage}
        sizes = [sum(item.size(subkey) for subkey, item in items.items()) for items in held.values()]
        assert storage.size == sum(sizes) <= limits.max_bytes and len(held) <= limits.max_keys
        assert all(size <= limits.max_record for size in sizes)
        assert all(0 < len(items) <= limits.max_subkeys for items in held.values())


def test_what_is_stored_again_and_again_is_not_remembered_again_and_again() -> None:
    storage = Storage(verify, Limits(max_keys=2))
    for number in range(10_000):
        put(storage, Entry("key", b"%d" % number, 1000.0 + number, sequence=number), by=b"x")
    assert storage._shares is not None and sum(map(len, storage._shares._heaps.values())) < 200


def test_a_record_is_bounded_in_bytes() -> None:
    storage = Storage(verify, Limits(max_record=1000))
    assert put(storage, Entry("key", b"x" * 600, 10.0, subkey="a")) is None
    assert "the record is full" in (put(storage, Entry("key", b"x" * 600, 10.0, subkey="b")) or "")


def test_only_the_owner_replaces_a_signed_record() -> None:
    storage, owner, other = Storage(verify), Signer(b"1" * 32), Signer(b"2" * 32)
    assert put(storage, Entry("key", b"unsigned", 10.0)) is None
    assert put(storage, owner.sign(Entry("key", b"first", 10.0))) is None
    assert put(storage, Entry("key", b"unsigned", 20.0, sequence=9)) == "signed by another owner"
    assert put(storage, other.sign(Entry("key", b"other", 20.0, sequence=9))) == "signed by another owner"
    assert put(storage, owner.sign(Entry("key", b"second", 5.0, sequence=1))) is None
    assert put(storage, owner.sign(Entry("key", b"first", 20.0))) == "a later entry is held"
    assert values(storage, "key") == {None: b"second"}


def test_a_signature_is_of_one_key_subkey_value_and_sequence() -> None:
    signed = Signer(b"1" * 32).sign(Entry("key", b"value", 10.0, "subkey", 3))
    assert signed.owner is not None and signed.signature is not None

    def holds(key: str, subkey: str | None, value: bytes, sequence: int) -> bool:
        return verify(key, subkey, Item(value, 10.0, sequence, signed.owner, signed.signature))

    assert holds("key", "subkey", b"value", 3)
    assert not holds("other", "subkey", b"value", 3)
    assert not holds("key", None, b"value", 3)
    assert not holds("key", "subkey", b"other", 3)
    assert not holds("key", "subkey", b"value", 4)
    assert not verify("key", None, Item(b"value", 10.0, 0, b"no key", b"no signature"))


def test_a_signature_without_an_owner_or_the_reverse_is_refused() -> None:
    storage = Storage(verify)
    assert put(storage, Entry("key", b"", 1.0, signature=b"s" * 64)) == "the signature does not hold"
    assert put(storage, Entry("key", b"", 1.0, owner=b"o" * 32)) == "the signature does not hold"


def test_a_reply_leaves_out_records_that_have_no_room_but_never_the_first() -> None:
    items: dict[str | None, Item] = {None: Item(b"x" * 600, 10.0)}
    builder = ReplyBuilder(b"", room=1000)
    for _ in range(2):
        builder.add([], items, sum(item.size(subkey) for subkey, item in items.items()), now=0.0)
    assert [(len(found.items), found.left_out) for found in builder.build().found] == [(1, False), (0, True)]


def test_store_calls_are_cut_into_portions() -> None:
    rows = [(f"key{index // 2}", WireItem(b"x" * 60_000, 1.0, str(index))) for index in range(40)]
    portions = list(batches(rows))
    assert [(record.key, item) for portion in portions for record in portion for item in record.items] == rows
    assert all(sum(len(r.items) * 60_000 for r in portion) <= MAX_STORE_BYTES for portion in portions)
    assert len(list(batches([("key", WireItem(b"", 1.0))] * (MAX_ENTRIES + 1)))) == 2
