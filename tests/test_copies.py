"""Copies of experts at other servers: sent in parts under a budget, taken in, checked, and kept whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
import trio
from torch import Tensor
from trio.testing import MockClock

from labkit.contact import Contact
from labkit.copies import (
    Copy,
    CopyBudget,
    CopyHead,
    CopyReceiver,
    CopyStore,
    check_copy,
    send_copy,
    sending,
)
from labkit.copies.backups import SILENCE
from labkit.copies.copying import Copying
from labkit.copies.made import MAX_KEEPERS
from labkit.copies.messages import (
    DONE,
    MAX_PART,
    OFFER,
    PART,
    CopyOffer,
    CopyPart,
    CopyState,
    Watched,
    WatchedExpert,
    WatchReply,
)
from labkit.copies.receiving import LEASE, LIFETIME, MAX_TRANSFERS
from labkit.copies.store import IncomingCopy
from labkit.copies.watching import Watching
from labkit.errors import BadRequest, CheckpointError, ConnectionLost, DeadlineExceeded, Overloaded, RequestRefused
from labkit.events import CopyFailed, CopyStored, Event
from labkit.expert_file import pack_expert
from labkit.server.backend import ExpertBackend
from labkit.server.checkpoints import load_expert, save_expert
from labkit.server.layers import make_expert
from labkit.simulation.network import open_simnet
from labkit.wire.rpc_client import Client
from labkit.wire.rpc_types import BULK, AsyncMethod, Reply, Request
from labkit.wire.security import Identity
from labkit.wire.transport import Network
from labkit.wire.zmq_transport import open_network
from tests.nodes import calling, serving
from tests.test_checkpoints import assert_same_bits

UID = "ffn.0.1"


def trained() -> dict[str, Tensor]:
    backend = ExpertBackend(UID, make_expert("ffn", hidden=4), kind="ffn")
    backend.compute("backward", [torch.ones(2, 4), torch.ones(2, 4)])
    return backend.state()


STATE = trained()


def quick() -> CopyBudget:
    return CopyBudget(rate=1e12, share=1.0)


def state(updates: int = 7, **changes: Tensor) -> dict[str, Tensor]:
    """An expert's state after so many updates, with some tensors changed ("module__bias" for "module.bias")."""
    changed = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {**STATE, "counter.updates": torch.tensor(updates), **changed}


def packed(primary: Contact, tensors: dict[str, Tensor] | None = None, **changes: Any) -> tuple[CopyHead, bytes]:
    """A copy as its primary sends it: its head, with some fields changed, and its file."""
    tensors = state() if tensors is None else tensors
    head, data = packed_as(UID, tensors, primary, {"lr": 0.1})
    return msgspec.structs.replace(head, **changes), data


def packed_as(
    uid: str, tensors: dict[str, Tensor], primary: Contact, backend: dict[str, Any]
) -> tuple[CopyHead, bytes]:
    data, crc32 = pack_expert(uid, tensors, kind="ffn")
    return CopyHead(uid, 1, int(tensors["counter.updates"]), len(data), crc32, "ffn", backend, primary), bytes(data)


@dataclass
class Pair:
    """A backup, and a primary that sends it copies."""

    network: Network
    backup: Contact
    store: CopyStore
    receiver: CopyReceiver
    client: Client  # the primary's
    events: list[Event] = field(default_factory=list)

    @property
    def primary(self) -> Contact:
        return self.client.endpoint.contact

    async def send(
        self, tensors: dict[str, Tensor] | None = None, budget: CopyBudget | None = None, **changes: Any
    ) -> None:
        head, data = packed(self.primary, tensors, **changes)
        await send_copy(self.client, self.backup, head, data, budget or quick(), emit=self.events.append)

    async def offer(self, **changes: Any) -> bytes:
        """Offer a copy. Returns its token."""
        head, _ = packed(self.primary, **changes)
        reply = await self.client.call(self.backup, OFFER, head, returns=CopyOffer, timeout=5)
        offer: CopyOffer = reply.body
        assert offer.token is not None
        return offer.token

    async def part(self, token: bytes, offset: int, data: bytes | Tensor) -> None:
        tensor = data if isinstance(data, Tensor) else torch.frombuffer(bytearray(data), dtype=torch.uint8)
        await self.client.call(self.backup, PART, CopyPart(token, offset), [tensor], timeout=5, lane=BULK)

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.store.folder.iterdir())

    @property
    def kept(self) -> dict[str, Tensor]:
        copy = self.store.copies[UID]
        return check_copy(copy.head, copy.path)


def want_all(head: CopyHead) -> str:
    return ""


@asynccontextmanager
async def pair(
    folder: Path, wire: Callable[..., Any] = open_network, *, refuse: Callable[[CopyHead], str] = want_all,
    check: Callable[[CopyHead, Path], object] = check_copy, in_thread: bool = True, **options: Any,
) -> AsyncIterator[Pair]:  # fmt: skip
    copies = CopyStore(folder, in_thread=in_thread)
    receiver = CopyReceiver(copies, check=check, refuse=refuse)
    async with wire(**options) as network, calling_encrypted(network) as client, trio.open_nursery() as nursery:
        await nursery.start(receiver.run)
        async with serving(network, receiver.methods, secure=True) as backup:
            yield Pair(network, backup.contact, copies, receiver, client)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def calling_encrypted(network: Network) -> AsyncIterator[Client]:
    async with network.listen(Identity.generate(), secure=True) as endpoint:
        yield Client(endpoint)


# ---------------------------------------------------------------- what a backup keeps


async def test_a_copy_is_the_checkpoint_that_its_primary_would_save_to_the_bit(tmp_path):
    async with pair(tmp_path / "copies") as here:
        await here.send(state(7))
        copy = here.store.copies[UID]
        assert (copy.epoch, copy.updates, copy.primary, copy.head.backend) == (1, 7, here.primary, {"lr": 0.1})
    save_expert(tmp_path / "saved", UID, state(7), kind="ffn")
    shutil.copy(copy.path, tmp_path / f"{UID}.safetensors")
    assert_same_bits(load_expert(tmp_path, UID, kind="ffn"), load_expert(tmp_path / "saved", UID, kind="ffn"))
    (event,) = here.events
    assert isinstance(event, CopyStored)
    assert (event.uid, event.address, event.updates) == (UID, here.backup.endpoint, 7)


async def test_a_large_copy_comes_in_parts_and_the_old_one_stays_until_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sending, "FIRST_PART", 500)
    monkeypatch.setattr(sending, "MIN_PART", 500)
    monkeypatch.setattr(sending, "MAX_PART", 500)
    kept, parts = [], []
    async with pair(tmp_path) as here:
        await here.send(state(1))

        async def look(request: Request) -> Reply:
            kept.append(int(here.kept["counter.updates"]))
            parts.append(request.tensors[0].nbytes)
            return await here.receiver.rpc_part(request)

        methods = {**here.receiver.methods, PART: AsyncMethod(look, CopyPart)}
        async with serving(here.network, methods, secure=True) as backup:
            here.backup = backup.contact
            await here.send(state(2))
        assert len(parts) > 5 and max(parts) == 500
        assert set(kept) == {1}
        assert here.store.copies[UID].updates == 2
        assert len(here.files) == 2, "the state and its head; nothing is left of the old copy"


async def sent_of_large_copies(here: Pair, states: list[dict[str, Tensor]]) -> list[int]:
    """Send copies one after the other. Returns the bytes that went for each."""
    budget, sent = quick(), [0]
    for each in states:
        await here.send(each, budget)
        assert_same_bits(here.kept, each)
        sent.append(budget.sent)
    return [after - before for before, after in pairwise(sent)]


def mostly_frozen(updates: int, **changes: Tensor) -> dict[str, Tensor]:
    """A state of a megabyte, most of which is frozen."""
    return state(updates, **{"frozen": torch.arange(1 << 18, dtype=torch.float32), **changes})


async def test_of_a_large_copy_only_what_has_changed_is_sent_again(tmp_path):
    bias = "module__layers__0__bias"
    other = STATE["module.layers.0.bias"] + 1
    elsewhere = torch.arange(1 << 18, dtype=torch.float32)
    elsewhere[1 << 17] = -1
    async with pair(tmp_path) as here:
        states = [
            mostly_frozen(11),
            mostly_frozen(12, **{bias: other}),
            mostly_frozen(13),
            mostly_frozen(14, frozen=elsewhere),
            mostly_frozen(14, frozen=elsewhere),
            mostly_frozen(15, frozen=elsewhere),
        ]
        first, *later = await sent_of_large_copies(here, states)
        assert first > 1 << 20 and all(size <= 3 * sending.BLOCK for size in later)
        assert [size > 0 for size in later] == [True, True, True, False, True], "one was there already"


async def test_a_copy_that_changes_all_over_goes_with_its_offer_where_the_link_is_quick(tmp_path, monkeypatch):
    monkeypatch.setattr(sending, "QUICK", 10.0)
    monkeypatch.setattr(sending, "SLOW", 20.0)
    async with pair(tmp_path) as here:
        methods, budget, calls = list[str](), quick(), list[int]()
        call = here.client.call

        async def noted(contact: Contact, method: str, *rest: Any, **options: Any) -> Reply:
            methods.append(method)
            return await call(contact, method, *rest, **options)

        here.client.call = noted  # type: ignore[method-assign]
        for updates in range(1, 5):
            new = state(updates, frozen=torch.full((1 << 18,), float(updates)))
            await here.send(new, budget)
            assert_same_bits(here.kept, new)
            calls.append(len(methods))
            methods.clear()
        assert calls[-1] == 1 < calls[0], "calls of each copy"
        monkeypatch.setattr(sending, "SLOW", 0.0)
        await here.send(state(5, frozen=torch.zeros(1 << 18)), budget)
        await here.send(state(6, frozen=torch.ones(1 << 18)), budget)
        assert len(methods) > 2, "in parts again, since the last one took long"


async def test_a_large_copy_is_whole_where_the_backup_has_lost_the_older_one(tmp_path):
    async with pair(tmp_path) as here:
        budget = quick()
        await here.send(mostly_frozen(11), budget)
        await here.store.remove(UID)
        before = budget.sent
        await here.send(mostly_frozen(12), budget)
        assert budget.sent - before > 1 << 20 and int(here.kept["counter.updates"]) == 12


async def test_a_copy_that_goes_while_a_newer_one_is_made_of_it_is_sent_whole_the_next_time(tmp_path, monkeypatch):
    async with pair(tmp_path) as here:
        budget = quick()
        await here.send(mostly_frozen(11), budget)
        append_same = IncomingCopy.append_same

        async def after_it_went(incoming: IncomingCopy, size: int) -> None:
            await here.store.remove(UID)
            await append_same(incoming, size)

        monkeypatch.setattr(IncomingCopy, "append_same", after_it_went)
        with pytest.raises(RequestRefused, match=r"no older copy of ffn\.0\.1 is kept here that has these bytes"):
            await here.send(mostly_frozen(12), budget)
        await here.send(mostly_frozen(12), budget)
        assert int(here.kept["counter.updates"]) == 12


async def test_more_than_the_older_copy_has_is_not_taken_from_it(tmp_path):
    async with pair(tmp_path) as here:
        await here.send(mostly_frozen(11))
        head, _ = packed(here.primary, mostly_frozen(12), size=3 << 20)
        offer = (await here.client.call(here.backup, OFFER, head, returns=CopyOffer, timeout=5)).body
        assert offer.older == here.store.copies[UID].head.crc32
        with pytest.raises(RequestRefused, match="no older copy"):
            await here.client.call(here.backup, PART, CopyPart(offer.token, 0, 2 << 20), timeout=5, lane=BULK)
        with pytest.raises(BadRequest):
            await here.client.call(here.backup, PART, CopyPart(offer.token, 0, 4 << 20), timeout=5, lane=BULK)


async def test_bytes_that_are_not_what_the_primary_thinks_make_no_copy(tmp_path, monkeypatch):
    async with pair(tmp_path) as here:
        budget = quick()
        await here.send(mostly_frozen(11), budget)
        monkeypatch.setattr(sending, "_next_part", lambda data, offset, *_: (True, min(1 << 20, len(data) - offset)))
        with pytest.raises(RequestRefused, match="another copy"):
            await here.send(mostly_frozen(12), budget)
        assert int(here.kept["counter.updates"]) == 11


async def test_the_newest_copy_is_kept_by_epoch_and_then_updates(tmp_path):
    async with pair(tmp_path) as here:
        await here.send(state(7), epoch=2)
        for epoch, older in ((1, state(900)), (2, state(6))):
            with pytest.raises(RequestRefused, match=r"a newer copy of ffn\.0\.1 is kept here: epoch 2, 7 updates"):
                await here.send(older, epoch=epoch)
        await here.send(state(8), epoch=2)
        await here.send(state(3), epoch=3)
        assert here.store.copies[UID].head.version == (3, 3)


async def test_a_state_that_has_changed_between_two_updates_replaces_the_old_one(tmp_path):
    async with pair(tmp_path) as here:
        await here.send(state(7))
        await here.send(state(7, counter__rows=torch.tensor(500)))
        assert int(here.kept["counter.rows"]) == 500


async def test_a_copy_that_is_kept_already_is_not_sent_again(tmp_path):
    budget = CopyBudget()
    async with pair(tmp_path) as here:
        await here.send(budget=budget)
        sent = budget.sent
        await here.send(budget=budget)
        assert budget.sent == sent > 0
    assert [type(event) for event in here.events] == [CopyStored, CopyStored]


async def test_copies_are_found_again_after_a_restart(tmp_path):
    async with pair(tmp_path) as here:
        await here.send()
    assert CopyStore(tmp_path).copies == here.store.copies != {}


async def test_a_copy_that_is_read_stays_until_that_has_ended(tmp_path):
    async with pair(tmp_path) as here:
        await here.send(state(1))
        reading, go_on = trio.Event(), trio.Event()
        token = trio.lowlevel.current_trio_token()

        def slow_check(head: CopyHead, path: Path) -> int:
            trio.from_thread.run_sync(reading.set, trio_token=token)
            trio.from_thread.run(go_on.wait, trio_token=token)
            return int(check_copy(head, path)["counter.updates"])

        async def read() -> None:
            assert await here.store.read(UID, slow_check) == 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await reading.wait()
            await here.send(state(2))
            assert len(here.files) == 4
            go_on.set()
        assert len(here.files) == 2
        assert here.store.copies[UID].updates == 2


# ---------------------------------------------------------------- what a backup refuses


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["module.", "optimizer.exp_avg.", "optimizer.exp_avg_sq."])
async def test_a_state_that_is_not_finite_is_refused_and_the_old_one_stays(tmp_path, part, wrong):
    name = next(name for name in STATE if name.startswith(part))
    tensor = STATE[name].clone()
    tensor.view(-1)[-1] = wrong
    async with pair(tmp_path) as here:
        await here.send(state(1))
        with pytest.raises(RequestRefused, match=f"the copy of {UID} is not finite: {name} holds"):
            await here.send({**state(2), name: tensor})
        assert int(here.kept["counter.updates"]) == 1
        assert len(here.files) == 2
    failed = here.events[-1]
    assert isinstance(failed, CopyFailed)
    assert (failed.uid, failed.address, failed.cause) == (UID, here.backup.endpoint, "refused")
    assert "is not finite" in failed.detail


def test_the_mask_of_an_attention_may_hold_infinity_if_it_is_known_for_it_but_never_nan(tmp_path):
    for value, sound in ((-float("inf"), True), (float("nan"), False)):
        mask = torch.full((2, 2), value)
        head, data = packed(make_primary(), state(module__mask=mask))
        path = tmp_path / "copy"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"module\.mask"):
            check_copy(head, path)
        if sound:
            check_copy(head, path, may_be_infinite={"module.mask"})
        else:
            with pytest.raises(CheckpointError, match=r"module\.mask"):
                check_copy(head, path, may_be_infinite={"module.mask"})


def test_numbers_whose_squares_overflow_are_finite_still(tmp_path):
    head, data = packed(make_primary(), state(module__x=torch.tensor([3e38, -3e38])))
    (tmp_path / "copy").write_bytes(data)
    check_copy(head, tmp_path / "copy")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2, torch.complex64])
def test_numbers_of_every_type_are_looked_at(tmp_path, dtype):
    for value in (1.0, float("nan")):
        head, data = packed(make_primary(), state(module__x=torch.tensor([0.0, value]).to(dtype)))
        (tmp_path / "copy").write_bytes(data)
        if value == 1.0:
            check_copy(head, tmp_path / "copy")
        else:
            with pytest.raises(CheckpointError, match=r"module\.x"):
                check_copy(head, tmp_path / "copy")


def make_primary() -> Contact:
    return Contact(b"k" * 32, "127.0.0.1", 5000)


GARBAGE = b"\x80\x04garbage" * 20


@pytest.mark.parametrize(
    ("data", "changes", "why"),
    [
        (GARBAGE, {"size": len(GARBAGE)}, "the copy of ffn.0.1 is damaged"),
        (packed(make_primary())[1][:-1] + b"\xff", {}, "the copy of ffn.0.1 is damaged"),
        (packed(make_primary())[1], {"uid": "ffn.9.9"}, "this is no copy of ffn.9.9 of kind 'ffn'"),
        (packed(make_primary())[1], {"kind": "transformer"}, "this is no copy of ffn.0.1 of kind 'transformer'"),
        (packed(make_primary())[1], {"updates": 8}, "this is another copy of ffn.0.1 than was said"),
        (packed(make_primary())[1], {"crc32": "00000000"}, "this is another copy of ffn.0.1 than was said"),
        (packed(make_primary(), state(module__extra=torch.ones(1)))[1],
         {"size": len(packed(make_primary(), state(module__extra=torch.ones(1)))[1]),
          "crc32": packed(make_primary(), state(module__extra=torch.ones(1)))[0].crc32}, "module.extra has no place"),
    ],
)  # fmt: skip
async def test_what_is_no_state_of_this_expert_is_refused_and_nothing_is_left_of_it(tmp_path, data, changes, why):
    backend = ExpertBackend(UID, make_expert("ffn", hidden=4), kind="ffn")

    def check(head: CopyHead, path: Path) -> None:
        backend.check_state(check_copy(head, path))

    async with pair(tmp_path, check=check) as here:
        head, _ = packed(here.primary, **changes)
        with pytest.raises(RequestRefused, match=why) as caught:
            await send_copy(here.client, here.backup, head, data, quick())
        assert str(tmp_path) not in str(caught.value), "where the backup keeps its files is its own affair"
        assert (here.store.copies, here.files) == ({}, [])


async def test_only_the_primary_itself_offers_copies_and_sends_parts_of_them(tmp_path):
    async with pair(tmp_path) as here, calling_encrypted(here.network) as stranger:
        head, data = packed(here.primary)
        with pytest.raises(RequestRefused, match="only an expert's primary sends copies"):
            await send_copy(stranger, here.backup, head, data, quick())
        token = await here.offer()
        here.client, primary = stranger, here.client
        with pytest.raises(RequestRefused, match="only an expert's primary sends copies"):
            await here.part(token, 0, data)
        with pytest.raises(RequestRefused, match="only an expert's primary sends copies"):
            await here.client.call(here.backup, DONE, token, timeout=5)
        here.client = primary
        await here.part(token, 0, data)


async def test_without_encryption_whoever_is_on_this_machine_is_trusted(tmp_path):
    copies = CopyStore(tmp_path)
    receiver = CopyReceiver(copies, check=check_copy, refuse=want_all, encrypts=False)
    async with open_network() as network, serving(network, receiver.methods) as backup, calling(network) as client:
        head, data = packed(client.endpoint.contact)
        await send_copy(client, backup.contact, head, data, quick())
    assert UID in copies.copies


def wrong(field_: int, value: object) -> list[object]:
    words = list(msgspec.msgpack.decode(msgspec.msgpack.encode(packed(make_primary())[0])))
    words[field_] = value
    return words


@pytest.mark.parametrize(
    "head",
    [
        wrong(0, "../../etc/passwd"), wrong(0, "ffn"), wrong(0, "f" * 200 + ".1"), wrong(1, -1), wrong(1, 1 << 54),
        wrong(2, 1.5), wrong(3, 0), wrong(3, 1 << 41), wrong(4, "0" * 9), wrong(5, "k" * 1001), wrong(6, {"a": [1]}),
        wrong(6, {str(n): 1 for n in range(65)}), wrong(7, [b"k" * 32, "10.0.0.1", 5000, False]), None, [],
    ],
)  # fmt: skip
async def test_a_head_that_makes_no_sense_is_a_bad_request(tmp_path, head):
    async with pair(tmp_path) as here:
        with pytest.raises(BadRequest):
            await here.client.call(here.backup, OFFER, head, timeout=5)
    assert here.files == []


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (1, b"x"), (1 << 53, b"x"), (0, torch.zeros(0, dtype=torch.uint8)), (0, bytes(1 << 14)),
        (0, bytes(MAX_PART + 1)), (0, torch.ones(4)), (0, torch.ones(2, 2, dtype=torch.uint8)),
    ],
)  # fmt: skip
async def test_a_part_that_does_not_follow_is_a_bad_request_and_the_copy_can_go_on(tmp_path, offset, data):
    async with pair(tmp_path) as here:
        token = await here.offer()
        with pytest.raises(BadRequest):
            await here.part(token, offset, data)
        with pytest.raises(BadRequest, match="bytes have been sent"):
            await here.client.call(here.backup, DONE, token, timeout=5)
        await here.part(token, 0, packed(here.primary)[1])
        await here.client.call(here.backup, DONE, token, timeout=5)
        assert UID in here.store.copies
        with pytest.raises(BadRequest, match="not taken in any more"):
            await here.part(token, 0, b"x")


async def test_a_backup_says_why_it_does_not_want_a_copy_before_it_is_sent_and_before_it_counts(tmp_path):
    reasons = iter(["this server has no room", "", "this server serves ffn.0.1 itself by now"])
    async with pair(tmp_path, refuse=lambda head: next(reasons)) as here:
        with pytest.raises(RequestRefused, match="this server has no room"):
            await here.send()
        with pytest.raises(RequestRefused, match=r"serves ffn\.0\.1 itself by now"):
            await here.send()
        assert (here.store.copies, here.files) == ({}, [])


# ---------------------------------------------------------------- disks and crashes


DiskUsage = namedtuple("DiskUsage", "total used free")


async def test_a_copy_that_the_disk_has_no_room_for_is_not_taken_in(tmp_path, monkeypatch):
    async with pair(tmp_path) as here:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: DiskUsage(1 << 30, 1 << 30, 1000))
        with pytest.raises(RequestRefused, match=r"cannot keep a copy of ffn\.0\.1: .* the disk has 0\.0 MB left"):
            await here.send()
    assert here.files == []


async def test_copies_that_arrive_at_the_same_time_do_not_count_on_the_same_room(tmp_path, monkeypatch):
    async with pair(tmp_path) as here:
        size = packed(here.primary)[0].size
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: DiskUsage(1 << 30, 0, (8 << 20) + 3 * size // 2))
        token = await here.offer()
        with pytest.raises(RequestRefused, match="cannot keep a copy of"):
            await here.offer(uid="ffn.0.2")
        await here.part(token, 0, packed(here.primary)[1])
        await here.offer(uid="ffn.0.2")  # what has arrived is on the disk, and counted there


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("call", "which"),
    [("write", 1), ("write", 2), ("fsync", 1), ("fsync", 2), ("replace", 1), ("close", 1), ("close", 2)],
)
async def test_a_disk_that_is_full_or_fails_keeps_the_old_copy_and_says_so(tmp_path, monkeypatch, call, which):
    monkeypatch.setattr(sending, "FIRST_PART", 2000)
    real, calls = getattr(os, call), []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == which:
            if call == "close":
                real(*args)
            raise full()
        return real(*args)

    async with pair(tmp_path) as here:
        await here.send(state(1))
        before = here.files
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(RequestRefused, match=r"cannot keep a copy of ffn\.0\.1: No space left on device"):
                await here.send(state(2))
        assert (here.files, int(here.kept["counter.updates"])) == (before, 1)
        assert isinstance(here.events[-1], CopyFailed)
        await here.send(state(3))  # the disk is better
        assert int(here.kept["counter.updates"]) == 3
        assert here.receiver._taken == 0


@contextmanager
def photographs(folder: Path, album: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While this is open, there is a picture of the folder before each thing that is done to it."""
    taken = iter(range(1000))

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def picture(*args: Any, **options: Any) -> Any:
            shutil.copytree(folder, album / str(next(taken)))
            return function(*args, **options)

        return picture

    with monkeypatch.context() as patch:
        for name in ("open", "write", "fsync", "replace", "close"):
            patch.setattr(os, name, before(getattr(os, name)))
        patch.setattr(Path, "unlink", before(Path.unlink))
        yield


async def test_a_backup_that_is_killed_at_any_moment_has_the_old_copy_or_the_new_one_and_no_more(tmp_path, monkeypatch):
    folder, album = tmp_path / "copies", tmp_path / "album"
    copies = CopyStore(folder, in_thread=False)
    head, data = packed(make_primary(), state(1))
    await take_in(copies, head, data)
    head, data = packed(make_primary(), state(2))
    with photographs(folder, album, monkeypatch):
        await take_in(copies, head, data)
    found = []
    for number in range(len(list(album.iterdir()))):
        both = len(list((album / str(number)).glob("*.json"))) == 2
        again = CopyStore(album / str(number))
        (copy,) = again.copies.values()
        assert int(check_copy(copy.head, copy.path)["counter.updates"]) == copy.updates
        assert len(list(again.folder.iterdir())) == 2
        found.append(copy.updates)
        assert copy.updates == 2 or not both, "of two whole ones the newer counts"
    assert found == sorted(found)
    assert {1, 2} == set(found), "the pictures show both"


async def take_in(copies: CopyStore, head: CopyHead, data: bytes) -> Copy:
    incoming = await copies.begin(head)
    for start in range(0, len(data), 2000):
        await incoming.append(data[start : start + 2000])
    return await incoming.finish(check_copy)


async def test_a_store_that_need_not_survive_a_power_failure_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: pytest.fail("it waits for the disk"))
    await take_in(CopyStore(tmp_path, durable=False), *packed(make_primary()))
    assert UID in CopyStore(tmp_path).copies


async def test_the_server_of_a_copy_is_watched_as_soon_as_it_has_come_even_if_the_expert_began_anew(
    tmp_path, autojump_clock
):
    own, first, second = (Contact(bytes([i]) * 32, "127.0.0.1", 5000 + i) for i in range(3))
    asked: list[tuple[Contact, float]] = []

    class Asked:
        async def call(self, to: Contact, method: str, body: Watched, **_: Any) -> Reply:
            asked.append((to, trio.current_time()))
            await trio.sleep(body.hold)
            return Reply(WatchReply([WatchedExpert(copy.epoch, copy.updates) for copy in body.copies]))

    copies = CopyStore(tmp_path, in_thread=False, on_change=lambda: watching.look())
    watching = Watching(cast(Any, Asked()), copies, lambda: own, lambda: [], lambda *_: pytest.fail("none is gone"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watching.run)
        await trio.sleep(1)
        for primary, epoch in ((first, 5), (second, 1)):
            await take_in(copies, *packed(primary, epoch=epoch))
            began = trio.current_time()
            await trio.sleep(5)
            calls = [at for to, at in asked if to == primary]
            assert [calls[0] - began, len(calls)] == [0.0, 3]
            await copies.remove(UID)
        nursery.cancel_scope.cancel()


async def test_a_file_that_was_cut_short_is_no_copy_after_a_restart(tmp_path):
    copies = CopyStore(tmp_path)
    copy = await take_in(copies, *packed(make_primary()))
    os.truncate(copy.path, 100)
    assert (CopyStore(tmp_path).copies, list(tmp_path.iterdir())) == ({}, [])


async def test_what_is_not_a_copy_is_left_alone_in_the_folder(tmp_path):
    for name in (f"{UID}.safetensors", f"{UID}~7.safetensors", "notes.json"):
        (tmp_path / name).write_text("mine")
    CopyStore(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


async def test_a_backup_that_dies_in_the_middle_is_an_event_with_its_cause(tmp_path):
    receiver, life = CopyReceiver(CopyStore(tmp_path), check=check_copy, refuse=want_all), trio.CancelScope()
    events: list[Event] = []

    async def die(request: Request) -> Reply:
        life.cancel()
        await trio.sleep_forever()
        raise AssertionError

    async def live(network: Network, task_status: trio.TaskStatus[Contact]) -> None:
        methods = {**receiver.methods, PART: AsyncMethod(die, CopyPart)}
        with life:
            async with serving(network, methods, secure=True) as backup:
                task_status.started(backup.contact)
                await trio.sleep_forever()

    async with open_network() as network, calling_encrypted(network) as client, trio.open_nursery() as nursery:
        backup = await nursery.start(live, network)
        head, data = packed(client.endpoint.contact)
        with pytest.raises(ConnectionLost):
            await send_copy(client, backup, head, data, quick(), emit=events.append)
    (event,) = events
    assert isinstance(event, CopyFailed)
    assert (event.uid, event.cause) == (UID, "lost")


# ---------------------------------------------------------------- few at a time, and none for ever (in virtual time)


@asynccontextmanager
async def virtual_pair(folder: Path, **options: Any) -> AsyncIterator[Pair]:
    async with pair(folder, open_simnet, in_thread=False, **options) as here:
        yield here


async def test_a_copy_that_is_not_sent_on_is_given_up(tmp_path, autojump_clock: MockClock):
    async with virtual_pair(tmp_path) as here:
        token = await here.offer()
        for offset in range(3):
            await trio.sleep(LEASE * 0.9)
            await here.part(token, offset, b"x")
        assert len(here.files) == 1
        await trio.sleep(LEASE + 1)
        assert here.files == []
        with pytest.raises(BadRequest, match="not taken in any more; offer it again"):
            await here.part(token, 3, b"x")


async def test_a_copy_that_is_sent_for_ever_is_given_up_too(tmp_path, autojump_clock: MockClock):
    async with virtual_pair(tmp_path) as here:
        token = await here.offer()
        with pytest.raises(BadRequest, match="not taken in any more"):
            for offset in range(1000):
                await trio.sleep(LEASE / 2)
                await here.part(token, offset, b"x")
        assert trio.current_time() < LIFETIME + LEASE
        assert here.files == []


async def test_a_backup_takes_few_copies_at_a_time_and_a_patient_primary_gets_its_turn(
    tmp_path, autojump_clock: MockClock
):
    async with virtual_pair(tmp_path) as here:
        for number in range(MAX_TRANSFERS):
            await here.offer(uid=f"ffn.1.{number}")
        with pytest.raises(Overloaded, match="as many as it can at a time"):
            await here.send()
        failed = here.events[-1]
        assert isinstance(failed, CopyFailed) and failed.cause == "overloaded"
        head, data = packed(here.primary)
        await send_copy(here.client, here.backup, head, data, quick(), patience=2 * LEASE)
        assert UID in here.store.copies
        assert trio.current_time() == pytest.approx(LEASE, abs=2)


async def test_a_primary_that_begins_anew_needs_no_second_place(tmp_path, autojump_clock: MockClock):
    async with virtual_pair(tmp_path) as here:
        for _ in range(2 * MAX_TRANSFERS):
            await here.offer()
            assert len(here.files) == 1
        await here.send()
        assert len(here.files) == 2


async def test_a_backup_that_stops_leaves_only_whole_copies_and_takes_no_more(tmp_path, autojump_clock: MockClock):
    receiver = CopyReceiver(CopyStore(tmp_path, in_thread=False), check=check_copy, refuse=want_all)
    async with open_simnet() as network, calling_encrypted(network) as client:
        async with serving(network, receiver.methods, secure=True) as backup:
            here = Pair(network, backup.contact, receiver._store, receiver, client)
            async with trio.open_nursery() as nursery:
                await nursery.start(receiver.run)
                await here.send()
                await here.part(await here.offer(uid="ffn.1.1"), 0, b"half")
                assert len(here.files) == 3
                nursery.cancel_scope.cancel()
            assert len(here.files) == 2
            with pytest.raises(RequestRefused, match="this server is stopping"):
                await here.offer(uid="ffn.1.1")


# ---------------------------------------------------------------- the budget (in virtual time)


def large(primary: Contact, size: int, uid: str = UID) -> tuple[CopyHead, bytes]:
    tensors = {"module.x": torch.zeros(size // 4), "counter.updates": torch.tensor(7)}
    return packed_as(uid, tensors, primary, {})


async def test_copies_take_no_more_than_their_rate(tmp_path, autojump_clock: MockClock):
    async with virtual_pair(tmp_path) as here:
        budget = CopyBudget(rate=4e6)
        for uid in ("ffn.0.1", "ffn.0.2", "ffn.0.3"):
            await send_copy(here.client, here.backup, *large(here.primary, 8_000_000, uid), budget)
    assert trio.current_time() == pytest.approx(6, abs=0.3)
    assert budget.sent == pytest.approx(24e6, rel=0.01)


async def test_on_a_slow_link_copies_are_under_way_a_quarter_of_the_time_in_parts_that_hold_nobody_up_for_long(
    tmp_path, autojump_clock: MockClock
):
    async with virtual_pair(tmp_path, latency=0.02, bandwidth=1e6) as here:
        seconds: list[float] = []
        call = here.client.call

        async def timed(contact: Contact, method: str, *rest: Any, **options: Any) -> Reply:
            began = trio.current_time()
            reply = await call(contact, method, *rest, **options)
            if method == PART:
                seconds.append(trio.current_time() - began)
            return reply

        here.client.call = timed  # type: ignore[method-assign]
        await send_copy(here.client, here.backup, *large(here.primary, 4_000_000), CopyBudget(share=0.25))
        busy = sum(seconds) - len(seconds) * 0.04  # in a round trip without bytes, the link is free
        assert busy / trio.current_time() == pytest.approx(0.25, abs=0.02)
        assert max(seconds[2:]) < 0.3


async def test_all_copies_of_a_server_share_one_budget_and_take_turns(tmp_path, autojump_clock: MockClock):
    async with virtual_pair(tmp_path) as here:
        budget, ended = CopyBudget(rate=1e6), []

        async def send(uid: str) -> None:
            await send_copy(here.client, here.backup, *large(here.primary, 3_000_000, uid), budget)
            ended.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, "ffn.0.1")
            nursery.start_soon(send, "ffn.0.2")
    assert ended == [pytest.approx(6, abs=1.1), pytest.approx(6, abs=1.1)]
    assert ended[1] - ended[0] < 1.1


async def test_a_server_that_does_not_answer_holds_up_copies_to_others_for_seconds_only(
    tmp_path, autojump_clock: MockClock
):
    async def never(request: Request) -> Reply:
        await trio.sleep_forever()
        raise AssertionError

    async with virtual_pair(tmp_path) as here:
        silent = {**here.receiver.methods, PART: AsyncMethod(never, CopyPart)}
        budget = CopyBudget()
        async with serving(here.network, silent, secure=True) as stuck:
            with pytest.raises(DeadlineExceeded):
                await send_copy(here.client, stuck.contact, *large(here.primary, 1000, "ffn.9.9"), budget)
        await send_copy(here.client, here.backup, *large(here.primary, 1000), budget)
        assert trio.current_time() < sending.PART_TIMEOUT + 1


@pytest.mark.parametrize(
    "budget", [{"rate": 0.0}, {"rate": -1.0}, {"share": 0.0}, {"share": 1.1}, {"rate": float("nan")}]
)
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(ValueError, match="above 0"):
        CopyBudget(**budget)


async def test_a_copy_of_another_size_than_its_head_says_is_our_own_mistake():
    head, data = packed(make_primary())
    with pytest.raises(ValueError, match="bytes, not"):
        await send_copy(None, make_primary(), head, data + b"x", quick())  # type: ignore[arg-type]


async def test_however_many_say_that_they_keep_a_copy_few_of_them_are_remembered(autojump_clock: MockClock):
    experts: Any = SimpleNamespace(held={UID: 1}, updates=lambda uid: 9)
    copying = Copying(None, experts, SimpleNamespace(others={}), make_primary, 1, print, budget=quick())  # type: ignore[arg-type]

    def watch(number: int) -> WatchedExpert | None:
        by = Contact(number.to_bytes(32, "big"), "127.0.0.1", 5000)
        body = Watched(by, [CopyState(UID, 1, 7)])
        replies: list[Any] = []
        copying.rpc_watch(Request("copies.watch", body, (), SimpleNamespace(key=by.key), 0.0), replies.append)  # type: ignore[arg-type]
        answer: WatchReply = replies[0].body
        return answer.experts[0]

    for number in range(2 * MAX_KEEPERS):
        assert watch(number) == WatchedExpert(1, 9)
    assert len(copying.holders(UID)) == MAX_KEEPERS
    await trio.sleep(SILENCE)
    watch(999)
    assert [contact.key[-2:] for contact in copying.holders(UID)] == [(999).to_bytes(2, "big")]
