"""Epochs: of two servers that declare an expert, the one that took it over has it, in the DHT and in caches."""

from functools import partial

import msgspec
import pytest
import trio

from labkit.contact import Contact
from labkit.dht.node import Value
from labkit.dht.storage import Item, Storage, supersedes
from labkit.directory import Declared, Directory, DirectoryConfig
from labkit.directory.index import Leaf, PrefixRecord, decode, entries_of, withdrawals_of
from labkit.errors import ExpertsTaken, UnknownExpert
from labkit.events import Event, ExpertDeclared, ExpertGivenUp
from labkit.expert_uid import ExpertInfo
from tests.fake_records import FakeRecords, contact

COPY = b"the copy"


async def everybody(other: Contact) -> bool:
    return True


async def nobody(other: Contact) -> bool:
    return False


async def found(directory: Directory, uid: str = "ffn.0") -> ExpertInfo | None:
    return (await directory.find([uid]))[uid]


async def where(records: FakeRecords, uid: str = "ffn.0") -> tuple[Contact, int] | None:
    info = await found(Directory(records), uid)
    return None if info is None else (info.contact, info.epoch)


def record(value: bytes, expires_at: float) -> PrefixRecord:
    read = PrefixRecord("ffn", 0.0)
    assert read.take({"1": Value(value, expires_at)}, 10, {}) == 0
    return read


# ---------------------------------------------------------------- in the DHT


async def test_a_leaf_says_the_epoch_and_who_holds_copies_and_is_stored_with_the_epoch_as_its_sequence_number():
    records = FakeRecords()
    await Directory(records).declare({"ffn.0": Declared(3, (COPY,)), "ffn.1": Declared()}, contact(1))
    infos = await Directory(records).find(["ffn.0", "ffn.1"])
    assert [(info.epoch, info.copies) for info in infos.values() if info] == [(3, (COPY,)), (0, ())]
    entries = entries_of({"ffn.0.0": Declared(3), "ffn.0.1": Declared()}, contact(1), 7, 30.0)
    assert {entry.subkey: entry.sequence for entry in entries} == {"0": 3, "1": 0, "0.": 0}
    assert [entry.sequence for entry in withdrawals_of({"ffn.0": 3}, 30.0)] == [3]


def test_a_leaf_names_no_more_than_eight_copies():
    [leaf] = entries_of({"ffn.0": Declared(0, tuple(bytes([n]) * 8 for n in range(20)))}, contact(1), 7, 30.0)
    entry = decode(leaf.value)
    assert isinstance(entry, Leaf) and len(entry.copies) == 8
    assert decode(msgspec.msgpack.encode(["e1", contact(1), 7, 0, 0, [b"too short"]])) is None
    assert decode(msgspec.msgpack.encode(["e1", contact(1), 7, 0, -1, []])) is None


def test_leaves_and_withdrawals_of_an_older_labkit_are_of_the_first_epoch():
    leaf = decode(msgspec.msgpack.encode(["e1", contact(1), 7, 5]))
    assert isinstance(leaf, Leaf) and (leaf.epoch, leaf.copies) == (0, ())
    withdrawn = decode(msgspec.msgpack.encode(["w1"]))
    assert withdrawn is not None and withdrawn == decode(withdrawals_of(["ffn.0"], 30.0)[0].value)


def test_an_older_labkit_reads_todays_leaves():
    class OldLeaf(msgspec.Struct, frozen=True, array_like=True, tag="e1"):
        contact: Contact
        stamp: int
        since: int = 0

    class OldWithdrawn(msgspec.Struct, frozen=True, array_like=True, tag="w1"):
        pass

    [leaf] = entries_of({"ffn.0": Declared(3, (COPY,))}, contact(1), 7, 30.0, 5)
    assert msgspec.msgpack.decode(leaf.value, type=OldLeaf | OldWithdrawn) == OldLeaf(contact(1), 7, 5)
    [withdrawn] = withdrawals_of({"ffn.0": 3}, 30.0)
    assert msgspec.msgpack.decode(withdrawn.value, type=OldLeaf | OldWithdrawn) == OldWithdrawn()


def test_a_node_of_the_dht_keeps_the_higher_epoch_whatever_comes_later():
    storage = Storage(lambda key, subkey, item: True)

    def put(epoch: int, expires_at: float, gone: bool = False) -> str | None:
        [entry] = (
            withdrawals_of({"ffn.0": epoch}, 30.0)
            if gone
            else entries_of({"ffn.0": Declared(epoch)}, contact(), 1, 30.0)
        )
        return storage.put(entry.key, entry.subkey, Item(entry.value, expires_at, entry.sequence), 0.0)

    assert put(1, 30.0) is None
    assert put(0, 40.0) == put(0, 40.0, gone=True) == "a later entry is held"
    assert put(1, 40.0, gone=True) is None, "what takes the place of a leaf is of its epoch, and later"
    assert put(1, 39.0) == "a later entry is held"
    assert put(1, 41.0) is None, "it is declared anew"
    assert put(2, 31.0) is None
    assert not supersedes(Item(b"z", 100.0, 1), Item(b"a", 1.0, 2))


@pytest.mark.parametrize("swap", [False, True])
def test_of_two_leaves_that_are_read_the_higher_epoch_counts_whichever_is_read_first(swap: bool):
    [old], [new] = (entries_of({"ffn.1": Declared(epoch)}, contact(epoch), 9 - epoch, 30.0) for epoch in (1, 2))
    first, second = ((new, 40.0), (old, 50.0)) if swap else ((old, 50.0), (new, 40.0))
    read = record(second[0].value, second[1])
    read.keep_unexpired(record(first[0].value, first[1]), 10.0, 10)
    assert read.leaves[1][0].epoch == 2
    later = record(old.value, 60.0)
    later.keep_unexpired(read, 45.0, 10)
    assert later.leaves[1][0].epoch == 1, "until it has expired"


@pytest.mark.parametrize(("leaf", "gone", "alive"), [
    ((2, 40.0), (1, 50.0), True), ((1, 50.0), (2, 40.0), False), ((2, 40.0), (2, 41.0), False),
    ((2, 42.0), (2, 41.0), True),
])  # fmt: skip
def test_a_withdrawal_takes_out_leaves_of_its_epoch_and_lower_ones(leaf, gone, alive: bool):
    [one] = entries_of({"ffn.1": Declared(leaf[0])}, contact(1), 1, 30.0)
    [other] = withdrawals_of({"ffn.1": gone[0]}, 30.0)
    for first, second in (((one, leaf[1]), (other, gone[1])), ((other, gone[1]), (one, leaf[1]))):
        read = record(second[0].value, second[1])
        read.keep_unexpired(record(first[0].value, first[1]), 10.0, 10)
        assert bool(read.leaves) is alive


async def test_a_server_that_leaves_withdraws_what_it_took_over_and_another_may_declare_it_in_that_epoch():
    records = FakeRecords()
    server = Directory(records)
    await server.declare({"ffn.0": Declared(2)}, contact(1))
    await server.withdraw(["ffn.0"], contact(1))
    assert await where(records) is None
    assert await server.declare({"ffn.0": Declared(1)}, contact(2)) == {"ffn.0"}, "an older one is not believed"
    assert await where(records) is None
    await server.declare({"ffn.0": Declared(2)}, contact(3))
    assert await where(records) == (contact(3), 2)


async def test_a_declaration_of_a_lower_epoch_changes_nothing_and_says_so():
    records, events = FakeRecords(), list[Event]()
    await Directory(records).declare({"ffn.0": Declared(1)}, contact(1))
    late = Directory(records, emit=events.append)
    assert await late.declare(["ffn.0", "ffn.1"], contact(2)) == {"ffn.0"}
    assert [event.uid for event in events if isinstance(event, ExpertDeclared)] == ["ffn.1"]
    assert await where(records) == (contact(1), 1) and await where(records, "ffn.1") == (contact(2), 0)


# ---------------------------------------------------------------- which server keeps an expert


async def test_the_higher_epoch_keeps_an_expert_and_the_other_is_told_who_has_it(autojump_clock):
    records, events, given_up = FakeRecords(), list[Event](), dict[str, ExpertInfo]()
    mine = {"ffn.0": Declared(), "ffn.1": Declared()}
    async with trio.open_nursery() as nursery:
        old, heir = Directory(records, emit=events.append), Directory(records)
        keep = partial(old.keep_declared, is_alive=everybody, on_given_up=given_up.__setitem__)
        await nursery.start(keep, lambda: mine, contact(1))
        await trio.sleep(5)
        taken = partial(heir.keep_declared, {"ffn.0": Declared(1)}, contact(2), is_alive=everybody)
        await nursery.start(taken)  # at the start, too: it is no matter who began first
        assert await where(records) == (contact(2), 1)
        await trio.sleep(10)
        assert {uid: (info.contact, info.epoch) for uid, info in given_up.items()} == {"ffn.0": (contact(2), 1)}
        assert [(e.uid, e.to) for e in events if isinstance(e, ExpertGivenUp)] == [("ffn.0", contact(2).endpoint)]
        await trio.sleep(60)
        assert await where(records) == (contact(2), 1) and await where(records, "ffn.1") == (contact(1), 0)
        mine["ffn.0"] = Declared(2)  # it comes back
        old.declare_anew()
        await trio.sleep(1)
        assert await where(records) == (contact(1), 2)
        nursery.cancel_scope.cancel()


async def test_an_expert_that_is_being_handed_over_or_was_a_moment_ago_is_not_given_up(autojump_clock):
    records, events = FakeRecords(), list[Event]()
    mine, on_hold = {"ffn.0": Declared(), "ffn.1": Declared()}, ["ffn.0"]

    async def hand_over(contact: Contact) -> bool:
        mine.pop("ffn.1", None)  # while it is asked who is alive
        return True

    async with trio.open_nursery() as nursery:
        giver = Directory(records, emit=events.append)
        keep = partial(giver.keep_declared, is_alive=hand_over, is_moving=on_hold.__contains__, spare=True)
        await nursery.start(keep, lambda: mine, contact(1))
        await Directory(records).declare({"ffn.0": Declared(1), "ffn.1": Declared(1)}, contact(2))
        await trio.sleep(15)
        assert mine.keys() == {"ffn.0"} and not [event for event in events if isinstance(event, ExpertGivenUp)]
        assert await where(records) == (contact(2), 1)
        on_hold.clear()  # it was not taken, and another has it
        await trio.sleep(15)
        nursery.cancel_scope.cancel()
    assert [event.uid for event in events if isinstance(event, ExpertGivenUp)] == ["ffn.0"]


async def test_at_the_start_an_expert_of_the_same_or_a_later_epoch_at_a_live_server_is_taken(autojump_clock):
    records = FakeRecords()
    await Directory(records).declare({"ffn.0": Declared(1)}, contact(1))
    for epoch in (0, 1):
        with pytest.raises(ExpertsTaken, match=r"127\.0\.0\.1:5001 already"):
            await Directory(records).keep_declared({"ffn.0": Declared(epoch)}, contact(2), is_alive=everybody)


async def test_a_spare_goes_on_without_any_expert(autojump_clock):
    records, given_up = FakeRecords(), list[str]()
    await Directory(records).declare({"ffn.0": Declared(1)}, contact(1))
    async with trio.open_nursery() as nursery:
        keep = partial(
            Directory(records).keep_declared, is_alive=everybody, spare=True,
            on_given_up=lambda uid, info: given_up.append(uid),
        )  # fmt: skip
        await nursery.start(keep, ["ffn.0"], contact(2))
        await trio.sleep(25)
        nursery.cancel_scope.cancel()
    assert given_up == ["ffn.0"]


@pytest.mark.parametrize("withdrawn", [False, True])
async def test_who_begins_where_a_later_epoch_was_left_behind_goes_on_above_it(autojump_clock, withdrawn: bool):
    records, mine = FakeRecords(), {"ffn.0": Declared(), "ffn.1": Declared()}
    gone = Directory(records)
    await gone.declare({"ffn.0": Declared(3), "ffn.1": Declared()}, contact(1))
    if withdrawn:
        await gone.withdraw(["ffn.0", "ffn.1"], contact(1))

    def outranked(uid: str, epoch: int) -> None:
        mine[uid] = Declared(epoch)

    async with trio.open_nursery() as nursery:
        keep = partial(Directory(records).keep_declared, is_alive=nobody, on_outranked=outranked)
        await nursery.start(keep, lambda: mine, contact(2))
        assert await where(records) == (contact(2), 4) and await where(records, "ffn.1") == (contact(2), 0)
        nursery.cancel_scope.cancel()


async def test_servers_without_copies_know_of_no_epoch(autojump_clock):
    records = FakeRecords()
    for n in range(3):  # one after the other, each killed
        async with trio.open_nursery() as nursery:
            keep = partial(Directory(records).keep_declared, is_alive=nobody, on_outranked=lambda uid, epoch: 1 / 0)
            await nursery.start(keep, ["ffn.0"], contact(n))
            await trio.sleep(20)
            assert await where(records) == (contact(n), 0)
            nursery.cancel_scope.cancel()


# ---------------------------------------------------------------- in caches


async def test_where_a_server_says_that_an_expert_has_moved_is_where_it_is_found_until_the_dht_knows(autojump_clock):
    records, client = FakeRecords(), Directory(FakeRecords())
    client = Directory(records)
    await Directory(records).declare(["ffn.0", "ffn.2"], contact(1))
    await Directory(records).declare(["ffn.1"], contact(2))
    before = await found(client)
    neighbour = await found(client, "ffn.1")
    assert before is not None and neighbour is not None
    client.report_failure(before, UnknownExpert("not here"))
    assert await found(client) is None
    now = client.report_moved(before, ExpertInfo("ffn.0", contact(2), epoch=1))
    assert now.stamp == neighbour.stamp, "it is of the life that is known of that server"
    assert await found(client) == now == client.newest(before)
    await trio.sleep(5)
    await client.refresh(["ffn.0"])  # the DHT still says otherwise
    assert await found(client) == now
    assert client.report_moved(before, ExpertInfo("ffn.0", contact(3), epoch=0)).contact == contact(3)
    assert await found(client) == now, "an older epoch says nothing"
    await Directory(records).declare({"ffn.0": Declared(2)}, contact(4))
    await client.refresh(["ffn.0"])
    latest = await found(client)
    assert latest is not None and (latest.contact, latest.epoch) == (contact(4), 2) == (
        client.newest(before).contact,
        client.newest(before).epoch,
    )


async def test_in_one_epoch_the_server_that_was_called_is_believed_and_no_other():
    records = FakeRecords()
    await Directory(records).declare(["ffn.0"], contact(1))
    client = Directory(records, DirectoryConfig())
    before = await found(client)
    assert before is not None
    stranger = ExpertInfo("ffn.0", contact(5))
    client.report_moved(stranger, ExpertInfo("ffn.0", contact(6)))
    assert await found(client) == before
    client.report_moved(before, ExpertInfo("ffn.0", contact(2)))
    moved = await found(client)
    assert moved is not None and moved.contact == contact(2)
