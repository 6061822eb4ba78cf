"""Experts are declared and found; the cache asks little; failures take experts out, declarations bring them back."""

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from labkit.contact import Contact
from labkit.dht.node import Entry, Value
from labkit.directory import Directory, DirectoryConfig, SuspicionConfig
from labkit.directory.grids import GridInfo, find_grids, keep_grid_declared
from labkit.directory.index import Declared, decode, entries_of
from labkit.directory.suspicion import Suspicions, boot_of, make_stamp
from labkit.errors import BadRequest, LabkitError, NonFiniteTensor, UnknownExpert
from labkit.events import Event, ExpertDeclared, ServerLost
from labkit.expert_uid import ExpertInfo
from tests.fake_records import FakeRecords, contact


async def found(directory: Directory, uid: str) -> ExpertInfo:
    info = (await directory.find([uid]))[uid]
    assert info is not None
    return info


async def offered(directory: Directory, prefix: str = "ffn") -> list[int]:
    return sorted((await directory.children([prefix]))[prefix].experts)


# ---------------------------------------------------------------- declaring


async def test_a_declaration_is_one_store_with_a_leaf_an_expert_and_a_marker_a_prefix():
    records, events = FakeRecords(), list[Event]()
    await Directory(records, emit=events.append).declare(["ffn.3.17", "ffn.3.18", "ffn.4.17"], contact(1))
    assert records.stores == 1
    assert {key: set(subkeys) for key, subkeys in records.records.items()} == {
        "expert:ffn": {"3.", "4."}, "expert:ffn.3": {"17", "18"}, "expert:ffn.4": {"17"},
    }  # fmt: skip
    declared = [(e.uid, e.address, e.ttl) for e in events if isinstance(e, ExpertDeclared)]
    assert declared[0] == ("ffn.3.17", "127.0.0.1:5001", 30.0) and len(declared) == 3


async def test_what_is_declared_is_found_by_another():
    records = FakeRecords()
    await Directory(records).declare(["ffn.3.17", "ffn.3.18"], contact(1))
    other = Directory(records)
    experts = await other.find(["ffn.3.17", "ffn.9.9"])
    assert experts["ffn.9.9"] is None
    assert experts["ffn.3.17"] is not None and experts["ffn.3.17"].contact == contact(1)
    views = await other.children(["ffn", "ffn.3"])
    assert views["ffn"].inner == {3} and set(views["ffn.3"].experts) == {17, 18}
    assert [info.uid for info in await other.all_experts("ffn", 2)] == ["ffn.3.17", "ffn.3.18"]
    assert set(other.known()) == {"ffn.3.17", "ffn.3.18"}


async def test_each_declaration_has_a_new_stamp_of_the_same_life():
    records = FakeRecords()
    server = Directory(records)
    stamps = []
    for _ in range(3):
        await server.declare(["ffn.0"], contact(1))
        stamps.append((await found(Directory(records), "ffn.0")).stamp)
    assert stamps == sorted(set(stamps)) and len({boot_of(stamp) for stamp in stamps}) == 1


async def test_declaring_where_nobody_stores_fails_and_says_where():
    records = FakeRecords()
    records.copies = 0
    with pytest.raises(LabkitError, match=r"expert:ffn / 0.*127\.0\.0\.1:5099"):
        await Directory(records).declare(["ffn.0"], contact(1))
    with pytest.raises(ValueError, match="not an expert uid"):
        await Directory(records).declare(["ffn"], contact(1))


async def test_a_store_that_never_ends_is_given_up(autojump_clock):
    with pytest.raises(LabkitError, match="within 10 s"):
        await Directory(FakeRecords(latency=1e6)).declare(["ffn.0"], contact(1))


async def test_experts_stay_declared_until_their_server_ends_and_then_expire(autojump_clock):
    records, client = FakeRecords(latency=0.1), Directory(FakeRecords())
    client = Directory(records)
    async with trio.open_nursery() as nursery:
        await nursery.start(Directory(records).keep_declared, ["ffn.0", "ffn.1"], contact(1))
        assert await offered(client) == [0, 1]  # ready means declared
        await trio.sleep(95)
        assert await offered(client) == [0, 1]
        nursery.cancel_scope.cancel()
    await trio.sleep(19)
    assert await offered(client) == [0, 1]
    await trio.sleep(12)
    assert await offered(client) == []


async def test_a_failed_renewal_is_tried_again_soon(autojump_clock, caplog):
    records, uids = FakeRecords(), ["ffn.0"]
    async with trio.open_nursery() as nursery:
        await nursery.start(Directory(records).keep_declared, lambda: uids, contact(1))
        records.fail_with = LabkitError("no network")
        uids.append("ffn.1")  # a server may get more experts as it goes
        await trio.sleep(12)
        records.fail_with = None
        await trio.sleep(2)
        assert await offered(Directory(records)) == [0, 1]
        nursery.cancel_scope.cancel()
    assert "no network" in caplog.text


async def test_between_two_declarations_only_what_is_new_is_declared(autojump_clock):
    records, experts = FakeRecords(), {"ffn.0.0": Declared(), "ffn.1.0": Declared()}
    directory = Directory(records)

    async def news(*anew: str) -> list[list[tuple[str, str | None]]]:
        records.stored.clear()
        directory.declare_anew(*anew) if anew else directory.declare_news()
        await trio.sleep(1)
        return records.stored

    async with trio.open_nursery() as nursery:
        await nursery.start(directory.keep_declared, lambda: experts, contact(1))
        assert len(records.stored[0]) == 4  # two experts, and two marks above them
        assert await news() == []
        experts["ffn.1.1"] = Declared(2)  # one has come
        assert await news() == [[("expert:ffn", "1."), ("expert:ffn.1", "1")]]
        experts["ffn.0.0"] = Declared(0, (b"12345678",))  # and of another one there is a copy
        assert await news() == [[("expert:ffn.0", "0")]]
        del experts["ffn.1.0"]
        assert await news() == []
        assert await news("ffn.1.1") == [[("expert:ffn", "1."), ("expert:ffn.1", "1")]]
        records.stored.clear()
        await trio.sleep(6)
        assert len(records.stored) == 1 and len(records.stored[0]) == 4  # all, in its turn, ten seconds after the first
        nursery.cancel_scope.cancel()


async def test_the_first_declaration_must_succeed():
    records = FakeRecords()
    records.fail_with = LabkitError("no network")
    with pytest.raises(LabkitError, match="no network"):
        await Directory(records).keep_declared(["ffn.0"], contact(1))


async def test_what_one_declares_one_finds_at_once():
    directory = Directory(FakeRecords())
    assert await offered(directory) == []
    await directory.declare(["ffn.0"], contact(1))
    assert await offered(directory) == [0]


async def test_of_all_servers_of_a_grid_one_writes_its_record_anew_before_it_expires(autojump_clock):
    records, grid = FakeRecords(latency=0.05), GridInfo((4, 4), "ffn")
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            await nursery.start(keep_grid_declared, records, "ffn", grid, 30.0)
        assert records.stores == 1
        for _ in range(300):
            await trio.sleep(1)
            assert await find_grids(records, 5.0) == {"ffn": grid}
        assert records.stores <= 60  # 20 servers have looked some 30 times each
        await nursery.start(keep_grid_declared, records, "ffn", GridInfo((8, 4), "ffn"), 30.0)
        assert await find_grids(records, 5.0) == {"ffn": GridInfo((8, 4), "ffn")}  # who differs writes at once
        nursery.cancel_scope.cancel()


# ---------------------------------------------------------------- the cache


async def test_concurrent_misses_of_one_prefix_share_a_get(autojump_clock):
    records = FakeRecords(latency=0.5)
    await Directory(records).declare(["ffn.0.0", "ffn.1.0"], contact(1))
    client = Directory(records)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(client.children, ["ffn", "ffn.0"])
        nursery.start_soon(client.children, ["ffn.0", "ffn.1"])
    assert len(records.gets) == 2  # whoever comes first asks for its two, and somebody for the third
    assert sorted(key for get in records.gets for key in get) == ["expert:ffn", "expert:ffn.0", "expert:ffn.1"]


async def test_a_cancelled_reader_leaves_the_get_to_those_who_wait_with_it(autojump_clock):
    records = FakeRecords(latency=0.5)
    await Directory(records).declare(["ffn.0"], contact(1))
    client, results = Directory(records), list[list[int]]()

    async def impatient() -> None:
        with trio.move_on_after(0.2):
            await client.children(["ffn"])

    async def patient() -> None:
        results.append(await offered(client))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(impatient)
        await wait_all_tasks_blocked()
        nursery.start_soon(patient)
    assert results == [[0]]


async def test_stale_prefixes_are_refreshed_in_the_background_by_one_get(autojump_clock):
    records = FakeRecords(latency=0.5)
    server, client = Directory(records), Directory(records)
    await server.declare(["ffn.0.0", "ffn.1.0"], contact(1))
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        await client.children(["ffn", "ffn.0", "ffn.1"])
        await server.declare(["ffn.0.1"], contact(1))
        await trio.sleep(3)
        start = trio.current_time()
        assert set(client.cached(["ffn", "ffn.1"])) == {"ffn", "ffn.1"}
        assert await offered(client, "ffn.0") == [0]  # the old answer, at once
        assert trio.current_time() == start
        await trio.sleep(0.6)
        assert len(records.gets) == 2 and sorted(records.gets[1]) == ["expert:ffn", "expert:ffn.0", "expert:ffn.1"]
        assert await offered(client, "ffn.0") == [0, 1]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("copies", "longest"), [((b"copyhold",), 1.5), ((), 3.5)])
async def test_an_expert_with_copies_is_found_soon_after_others_carry_it_on(autojump_clock, copies, longest):
    records = FakeRecords()
    server, other, client = (Directory(records) for _ in range(3))
    await server.declare({"ffn.0": Declared(copies=copies), "ffn.1": Declared()}, contact(1))
    await other.declare(["ffn.2"], contact(2))
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        client.report_failure(await found(client, "ffn.0"), "lost")
        for _ in range(14):  # a second and a half, in which it is read once, and nobody serves it yet
            assert await offered(client) == [2]
            await trio.sleep(0.1)
        await other.declare({"ffn.0": Declared(epoch=1)}, contact(2))
        since = trio.current_time()
        for _ in range(40):
            if await offered(client) == [0, 2]:
                break
            await trio.sleep(0.1)
        assert longest - 1.5 < trio.current_time() - since < longest
        nursery.cancel_scope.cancel()


async def test_who_was_idle_does_not_go_by_what_was_true_before(autojump_clock):
    records = FakeRecords(latency=0.5)
    server, client = Directory(records), Directory(records)
    await server.declare(["ffn.0"], contact(1))
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        assert await offered(client) == [0]
        await server.declare(["ffn.1"], contact(1))
        await trio.sleep(6)
        assert client.cached(["ffn"]) == {}, "it has to be read first"
        assert await offered(client) == [0, 1]
        nursery.cancel_scope.cancel()


async def test_fresh_prefixes_cost_nothing(autojump_clock):
    records = FakeRecords()
    await Directory(records).declare(["ffn.0"], contact(1))
    client = Directory(records)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        for _ in range(20):
            assert await offered(client) == [0]
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert len(records.gets) == 1


async def test_without_the_background_task_stale_prefixes_are_read_while_one_waits(autojump_clock):
    records = FakeRecords(latency=0.5)
    server, client = Directory(records), Directory(records)
    await server.declare(["ffn.0"], contact(1))
    assert await offered(client) == [0]
    await server.declare(["ffn.1"], contact(1))
    await trio.sleep(3)
    assert await offered(client) == [0, 1]


async def test_expired_experts_are_never_offered_even_if_no_refresh_succeeds(autojump_clock, caplog):
    records = FakeRecords()
    await Directory(records).declare(["ffn.0", "ffn.1"], contact(1))
    await trio.sleep(10)
    await Directory(records).declare(["ffn.2"], contact(1))
    client = Directory(records)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        assert await offered(client) == [0, 1, 2]
        records.fail_with = LabkitError("no network")
        for second in range(11, 40):
            await trio.sleep(1)
            assert list((client.cached(["ffn"]))["ffn"].experts) == ([0, 1, 2] if second < 30 else [2])
        await trio.sleep(1)
        assert client.cached(["ffn"]) == {} and client.known() == {}
        nursery.cancel_scope.cancel()
    assert "no network" in caplog.text and client.statistics()["gets_failed"] > 5


async def test_an_absence_is_believed_briefly(autojump_clock):
    records = FakeRecords()
    server, client = Directory(records), Directory(records)
    assert await offered(client) == [] and (await client.find(["gate.0"])) == {"gate.0": None}
    await server.declare(["ffn.0", "gate.0"], contact(1))
    await trio.sleep(0.5)
    assert await offered(client) == [] and len(records.gets) == 2
    await trio.sleep(0.5)
    assert await offered(client) == [0]
    assert (await client.find(["gate.0"]))["gate.0"] is not None


async def test_an_expert_that_joins_a_known_prefix_is_found_within_a_second(autojump_clock):
    records = FakeRecords()
    server, client = Directory(records), Directory(records)
    await server.declare(["ffn.0"], contact(1))
    assert await client.find(["ffn.1"]) == {"ffn.1": None}
    await server.declare(["ffn.1"], contact(1))
    await trio.sleep(1)
    assert (await client.find(["ffn.1"]))["ffn.1"] is not None


async def test_a_marker_that_leads_nowhere_does_not_keep_the_search_waiting(autojump_clock):
    records = FakeRecords(latency=0.5)
    client = Directory(records)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        await client.children(["ffn.0"])
        start = trio.current_time()
        for _ in range(100):  # ten seconds of use
            assert set(client.cached(["ffn.0"])) == {"ffn.0"}
            await trio.sleep(0.1)
        assert len(records.gets) <= 1 + (trio.current_time() - start) / 1.0
        nursery.cancel_scope.cancel()


async def test_a_read_that_misses_an_entry_does_not_end_it_before_its_expiration(autojump_clock):
    records = FakeRecords()
    await Directory(records).declare(["ffn.0.0", "ffn.1.0"], contact(1))
    client = Directory(records)
    await client.children(["ffn", "ffn.0"])
    records.records.clear()  # the DHT nodes that held it are gone
    await trio.sleep(5)
    assert (await client.children(["ffn"]))["ffn"].inner == {0, 1} and await offered(client, "ffn.0") == [0]
    await trio.sleep(25)
    assert not (await client.children(["ffn"]))["ffn"] and await offered(client, "ffn.0") == []


async def test_a_get_that_never_ends_finds_nothing(autojump_clock):
    client = Directory(FakeRecords(latency=1e6))
    start = trio.current_time()
    assert await offered(client) == []
    assert trio.current_time() - start == 10


async def test_the_cache_is_bounded_and_forgets_the_least_recently_used():
    records = FakeRecords()
    client = Directory(records, DirectoryConfig(max_prefixes=3))
    for prefix in ("a", "b", "c", "a", "d"):
        await client.children([prefix])
    assert client.statistics()["prefixes"] == 3
    assert set(client.cached(["a", "b", "c", "d"])) == {"a", "c", "d"}
    assert set(await client.children("abcdefgh")) == set("abcdefgh")


# ---------------------------------------------------------------- strangers


async def test_what_strangers_wrote_wrongly_is_ignored_and_counted():
    records = FakeRecords()
    await Directory(records).declare(["ffn.0.0", "ffn.1"], contact(1))
    good = records.records["expert:ffn"]["1"]
    wrong = {
        "0": records.records["expert:ffn"]["0."].data, "1.": good.data,
        "-1": good.data, "01": good.data, "x": good.data, "٣": good.data, "9999999": good.data, "": good.data,
        "2": b"", "3": b"\xc1", "4": b"\x91" * 5000, "5": msgspec.msgpack.encode(["e9", 1]),
        "6": msgspec.msgpack.encode(["e1", [b"short", "127.0.0.1", 5000, False], 1]),
        "7": msgspec.msgpack.encode(["e1", [bytes(32), "127.0.0.1", 99999, False], 1]),
        "8": msgspec.msgpack.encode(["e1", [bytes(32), "127.0.0.1", 5000, False], -1]),
        "9": msgspec.msgpack.encode(["e1", [bytes(32), "10.0.0.1", 5000, False], 1]),  # in the clear, far away
    }  # fmt: skip
    for subkey, data in wrong.items():
        records.records["expert:ffn"][subkey] = Value(data, good.expires_at)
    records.plain["expert:gate"] = good
    client = Directory(records)
    views = await client.children(["ffn", "gate"])
    assert (set(views["ffn"].inner), set(views["ffn"].experts)) == ({0}, {1}) and not views["gate"]
    assert client.statistics()["malformed"] == len(wrong) + 1


async def test_a_prefix_with_endless_children_is_cut():
    records = FakeRecords()
    await Directory(records).declare([f"ffn.{n}" for n in range(50)], contact(1))
    assert len(await offered(Directory(records, DirectoryConfig(max_children=10)))) == 10


def test_a_later_version_may_add_fields():
    leaf = decode(msgspec.msgpack.encode(["e1", [bytes(32), "127.0.0.1", 5000, False], 7, 0, 2, [], b"", "new"]))
    assert leaf is not None


def test_entries_do_not_repeat_markers():
    entries = entries_of([f"ffn.{a}.{b}" for a in range(4) for b in range(4)], contact(1), 1, 30.0)
    assert len(entries) == 16 + 4 and all(isinstance(entry, Entry) and entry.ttl == 30.0 for entry in entries)


# ---------------------------------------------------------------- failures


async def two_servers(events: list[Event]) -> tuple[FakeRecords, Directory, Directory]:
    """Server 1 holds the experts ffn.0 and ffn.1, server 2 holds ffn.2. Returns server 1's directory and a client's."""
    records = FakeRecords()
    server = Directory(records)
    await server.declare(["ffn.0", "ffn.1"], contact(1))
    await Directory(records).declare(["ffn.2"], contact(2))
    client = Directory(records, emit=events.append)
    assert await offered(client) == [0, 1, 2]
    return records, server, client


async def test_a_lost_server_takes_its_experts_with_it_at_once(autojump_clock):
    events: list[Event] = []
    _, _, client = await two_servers(events)
    infos = await client.find(["ffn.0", "ffn.1"])
    first, second = infos["ffn.0"], infos["ffn.1"]
    assert first is not None and second is not None
    assert client.report_failure(first, "lost") == ("ffn.0", "ffn.1")
    assert client.report_failure(second, "lost") == ()  # that is no news
    assert list(client.cached(["ffn"])["ffn"].experts) == [2]
    lost = [event for event in events if isinstance(event, ServerLost)]
    assert [(event.address, event.uids) for event in lost] == [("127.0.0.1:5001", ("ffn.0", "ffn.1"))]


async def test_a_lost_server_stays_out_until_it_declares_anew(autojump_clock):
    events: list[Event] = []
    records, server, client = await two_servers(events)
    client.report_failure(await found(client, "ffn.0"), "lost")
    await trio.sleep(5)
    assert await offered(client) == [2] and len(records.gets) == 2  # the DHT still has it, with the same stamp
    await server.declare(["ffn.0", "ffn.1"], contact(1))
    await trio.sleep(3)
    assert await offered(client) == [0, 1, 2]


async def test_a_server_that_restarts_at_its_address_is_back_with_its_first_declaration(autojump_clock):
    events: list[Event] = []
    records, _, client = await two_servers(events)
    client.report_failure(await found(client, "ffn.0"), "lost")
    await Directory(records).declare(["ffn.0"], contact(1))
    await trio.sleep(3)
    assert await offered(client) == [0, 2]
    client.report_failure(await found(client, "ffn.0"), "lost")
    assert len(events) == 2  # another life, another loss


async def test_one_loss_is_told_once_even_if_a_declaration_made_before_it_is_seen_after_it(autojump_clock):
    events: list[Event] = []
    _, server, client = await two_servers(events)
    await server.declare(["ffn.0", "ffn.1"], contact(1))
    client.report_failure(await found(client, "ffn.0"), "lost")
    await trio.sleep(3)
    assert await offered(client) == [0, 1, 2]
    assert client.report_failure(await found(client, "ffn.0"), "lost") == ("ffn.0", "ffn.1")
    assert await offered(client) == [2] and len(events) == 1


async def test_a_loss_after_an_answer_is_a_new_one(autojump_clock):
    events: list[Event] = []
    _, server, client = await two_servers(events)
    client.report_failure(await found(client, "ffn.0"), "lost")
    await server.declare(["ffn.0"], contact(1))
    await trio.sleep(3)
    client.report_success(await found(client, "ffn.0"))
    client.report_failure(await found(client, "ffn.0"), "lost")
    assert len(events) == 2


async def test_an_answer_that_was_on_its_way_does_not_bring_a_lost_server_back(autojump_clock):
    _, _, client = await two_servers([])
    info = await found(client, "ffn.0")
    client.report_failure(info, "lost")
    client.report_success(info)
    assert await offered(client) == [2]


async def test_after_a_loss_that_leaves_nothing_the_next_use_asks_the_dht(autojump_clock):
    records = FakeRecords()
    server, client = Directory(records), Directory(records)
    await server.declare(["ffn.0"], contact(1))
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        info = await found(client, "ffn.0")
        await Directory(records).declare(["ffn.0"], contact(2))  # another server has taken the expert over
        client.report_failure(info, "lost")
        assert (await found(client, "ffn.0")).contact == contact(2)
        nursery.cancel_scope.cancel()


async def test_after_a_failure_the_prefix_is_read_again_in_the_background(autojump_clock):
    events: list[Event] = []
    records, _, client = await two_servers(events)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        client.report_failure(await found(client, "ffn.0"), "timeout")
        await trio.sleep(1)
        assert await offered(client) == [0, 1, 2]  # one failure hides nothing
        await wait_all_tasks_blocked()
        assert len(records.gets) == 2
        nursery.cancel_scope.cancel()


async def test_failures_in_a_row_put_an_expert_on_an_exponential_back_off(autojump_clock):
    _, server, client = await two_servers([])
    info = await found(client, "ffn.0")
    assert client.report_failure(info, "timeout") == ()
    for pause in (1, 2, 4, 8, 16, 30, 30):
        await server.declare(["ffn.0", "ffn.1"], contact(1))  # declaring is not answering
        assert client.report_failure(info, "bad_reply") == ("ffn.0",)
        assert client.report_failure(info, "timeout") == ()  # sent before the back-off
        await trio.sleep(pause - 0.01)
        await server.declare(["ffn.0", "ffn.1"], contact(1))
        assert await offered(client) in ([1], [1, 2])  # server 2 expires on the way
        await trio.sleep(0.01)
        assert 0 in await offered(client)
    client.report_success(info)
    assert client.report_failure(info, "timeout") == ()


async def test_calls_that_failed_at_once_are_one_failure(autojump_clock):
    _, _, client = await two_servers([])
    info = await found(client, "ffn.0")
    sent = trio.current_time()
    await trio.sleep(1)
    for _ in range(20):
        assert client.report_failure(info, "timeout", sent=sent) == ()
    assert 0 in await offered(client)
    assert client.report_failure(info, "timeout", sent=sent + 1) == ("ffn.0",)


async def test_a_success_ends_the_back_off_and_the_count(autojump_clock):
    _, _, client = await two_servers([])
    info = await found(client, "ffn.0")
    for cause in ("timeout", "failed"):
        client.report_failure(info, cause)
    assert await offered(client) == [1, 2]
    client.report_success(info)
    assert await offered(client) == [0, 1, 2]
    for _ in range(5):
        assert client.report_failure(info, "timeout") == ()
        client.report_success(info)


async def test_an_expert_that_its_server_does_not_know_is_out_until_declared_anew(autojump_clock):
    _, server, client = await two_servers([])
    info = await found(client, "ffn.0")
    assert client.report_failure(info, UnknownExpert("no such expert")) == ("ffn.0",)
    assert client.report_failure(info, "unknown_expert") == ()
    await trio.sleep(4)
    assert await offered(client) == [1, 2]
    await server.declare(["ffn.0"], contact(1))
    await trio.sleep(3)
    assert await offered(client) == [0, 1, 2]


@pytest.mark.parametrize("cause", ["overloaded", "cancelled", "refused", BadRequest("?"), NonFiniteTensor("NaN")])
async def test_failures_that_are_not_the_experts_fault_change_nothing(cause):
    records, _, client = await two_servers([])
    info = await found(client, "ffn.0")
    for _ in range(5):
        assert client.report_failure(info, cause) == ()
    assert await offered(client) == [0, 1, 2] and len(records.gets) == 1


def test_suspicions_are_bounded():
    suspicions = Suspicions(SuspicionConfig(max_tracked=10, patience=1))
    infos = [ExpertInfo(f"ffn.{n}", Contact(bytes([n]) * 32, "127.0.0.1", 5000), make_stamp(n, 1)) for n in range(50)]
    for info in infos:
        suspicions.lose_server(info, info.stamp)
        suspicions.disown(info)
        suspicions.fail(info, 0.0, 0.0)
    assert sum(suspicions.suspended_until(info, 0.0) > 0 for info in infos) == 10


def test_bad_configurations_are_refused():
    for bad in ({"refresh": 40.0}, {"absence": 0.0}, {"max_prefixes": 0}, {"timeout": float("inf")}):
        with pytest.raises(ValueError):
            DirectoryConfig(**bad)
    with pytest.raises(ValueError):
        SuspicionConfig(backoff=0.0)


# ---------------------------------------------------------------- words


async def test_explain_says_what_was_looked_up_and_where(autojump_clock):
    _, _, client = await two_servers([])
    client.report_failure(await found(client, "ffn.0"), "lost")
    text = await client.explain("ffn")
    assert "'expert:ffn'" in text and "127.0.0.1:5099" in text and "1 live experts" in text
    assert "ffn.0 at 127.0.0.1:5001" in text
    assert "no DHT node answered" in await client.explain("gate")


async def test_explain_looks_one_level_down_where_a_grid_has_several(autojump_clock):
    records = FakeRecords()
    await Directory(records).declare(["ffn.0.0", "ffn.0.1", "ffn.1.0"], contact(1))
    client = Directory(records)
    client.report_failure(await found(client, "ffn.1.0"), UnknownExpert("moved"))
    text = await client.explain("ffn")
    assert "2 live experts below 2 prefixes" in text and "hidden after failures: ffn.1.0 at 127.0.0.1:5001" in text
