"""An expert's whole state is read from its server: of one moment, in parts, checked, and of bounded memory there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import trio
from torch import Tensor
from trio.testing import MockClock

from labkit.errors import BadReply, BadRequest, Overloaded, UnknownExpert
from labkit.expert_file import pack_expert
from labkit.expert_protocol import SNAPSHOT, SNAPSHOT_DONE, SNAPSHOT_PART, SnapshotHead, SnapshotPart
from labkit.server import snapshots
from labkit.server.backend import ExpertBackend
from labkit.server.checkpoints import load_expert
from labkit.server.layers import make_expert
from labkit.server.optimizer import BackendConfig
from labkit.server.runtime import InlineCompute, Runtime
from labkit.server.snapshots import LEASE, MAX_SNAPSHOTS, Snapshots, fetch_snapshot
from labkit.wire.rpc_types import AsyncMethod, Reply, Request, SyncMethod
from labkit.wire.timers import Timers
from tests.runtimes import submit
from tests.test_checkpoints import assert_same_bits
from tests.test_server import UIDS, X, config, lab

UID = UIDS[0]


@pytest.mark.parametrize("accumulate", [1, 3])
async def test_a_state_that_was_read_is_the_one_that_the_server_saves_to_the_bit(tmp_path, accumulate):
    (tmp_path / "read").mkdir()
    backend = BackendConfig(accumulate=accumulate)  # so that gradients are pending, too
    async with lab(config(checkpoint_dir=str(tmp_path / "saved"), backend=backend)) as here:
        for _ in range(4):
            await here.call("backward", [X, torch.ones_like(X)])
        head = await fetch_snapshot(here.node.client, here.server, UID, tmp_path / "read")
    assert head.updates == 4 // accumulate
    assert_same_bits(load_expert(tmp_path / "read", UID, kind="ffn"), load_expert(tmp_path / "saved", UID, kind="ffn"))
    if accumulate > 1:
        assert any(name.startswith("pending.") for name in load_expert(tmp_path / "read", UID) or {})


async def test_an_expert_larger_than_a_message_comes_in_parts_and_is_of_one_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "MAX_PART", 1000)
    async with lab(config(options={"hidden": 4, "inner": 32})) as here:
        before = await here.call("forward", [X])
        call, calls = here.node.client.call, []

        async def train_meanwhile(contact: Any, method: str, *rest: Any, **options: Any) -> Reply:
            calls.append(method)
            if method == SNAPSHOT_PART:
                await here.call("backward", [X, torch.ones_like(X)])
            return await call(contact, method, *rest, **options)

        here.node.client.call = train_meanwhile  # type: ignore[method-assign]
        head = await fetch_snapshot(here.node.client, here.server, UID, tmp_path)
        assert calls.count(SNAPSHOT_PART) == -(-head.size // 1000) > 5
    other = ExpertBackend(UID, make_expert("ffn", hidden=4, inner=32))
    other.load_state(load_expert(tmp_path, UID) or {})
    assert (other.updates, other.forward(X).equal(before)) == (0, True)


async def test_a_server_that_does_not_hold_the_expert_says_so(tmp_path):
    async with lab(config()) as here:
        with pytest.raises(UnknownExpert, match=r"does not hold expert 'ffn\.1\.1'"):
            await fetch_snapshot(here.node.client, here.server, "ffn.1.1", tmp_path)


# ---------------------------------------------------------------- bounded memory at the server


@dataclass
class Shelf:
    """The server's side, called without a network."""

    snapshots: Snapshots

    async def call(self, name: str, body: object) -> Reply:
        method = self.snapshots.methods[name]
        request = Request(name, body, (), None, trio.current_time() + 1)  # type: ignore[arg-type]
        if isinstance(method, AsyncMethod):
            return await method.handler(request)
        assert isinstance(method, SyncMethod)
        return method.handler(request)


@pytest.fixture
async def shelf(monkeypatch, nursery: trio.Nursery) -> Shelf:
    async def in_this_task(function):  # virtual time would run ahead of a real thread
        return function()

    monkeypatch.setattr(trio.to_thread, "run_sync", in_this_task)
    runtime, timers = (
        Runtime({UID: ExpertBackend(UID, make_expert("ffn", hidden=4))}, executor=InlineCompute()),
        Timers(),
    )
    await nursery.start(runtime.run)
    nursery.start_soon(timers.run)
    return Shelf(Snapshots(runtime, timers))


async def test_a_server_keeps_few_snapshots_and_has_room_again_when_one_was_read(
    shelf: Shelf, autojump_clock: MockClock
):
    heads = [(await shelf.call(SNAPSHOT, UID)).body for _ in range(MAX_SNAPSHOTS)]
    with pytest.raises(Overloaded, match="being read here already"):
        await shelf.call(SNAPSHOT, UID)
    await shelf.call(SNAPSHOT_DONE, heads[0].token)
    assert (await shelf.call(SNAPSHOT, UID)).body.size == heads[0].size


async def test_a_snapshot_that_nobody_reads_is_dropped_and_one_that_is_read_is_not(
    shelf: Shelf, autojump_clock: MockClock
):
    read, left = [(await shelf.call(SNAPSHOT, UID)).body for _ in range(2)]
    for _ in range(4):
        await trio.sleep(LEASE / 2)
        await shelf.call(SNAPSHOT_PART, SnapshotPart(read.token, 0))
    with pytest.raises(BadRequest, match="not kept any more; take another"):
        await shelf.call(SNAPSHOT_PART, SnapshotPart(left.token, 0))


async def test_whoever_reads_for_ever_does_not_keep_the_room_from_others(shelf: Shelf, autojump_clock):
    head = (await shelf.call(SNAPSHOT, UID)).body
    with pytest.raises(BadRequest, match="not kept any more"):
        for _ in range(200):
            await trio.sleep(LEASE / 2)
            await shelf.call(SNAPSHOT_PART, SnapshotPart(head.token, 0))
    assert trio.current_time() < 2 * snapshots.LIFETIME


async def test_a_part_behind_the_end_is_refused(shelf: Shelf, autojump_clock):
    head = (await shelf.call(SNAPSHOT, UID)).body
    with pytest.raises(BadRequest, match="has none at"):
        await shelf.call(SNAPSHOT_PART, SnapshotPart(head.token, head.size))


# ---------------------------------------------------------------- what a stranger may answer


@dataclass
class Liar:
    """A caller whose peer answers whatever it likes."""

    head: SnapshotHead
    part: list[Tensor]
    calls: list[str] = field(default_factory=list)

    async def call(self, contact: object, method: str, *_: object, **__: object) -> Reply:
        self.calls.append(method)
        return Reply(self.head) if method == SNAPSHOT else Reply(None, self.part)


def lie(data: bytes | bytearray, **changes: Any) -> tuple[SnapshotHead, list[Tensor]]:
    usual: dict[str, Any] = {"token": b"t" * 16, "size": len(data), "updates": 0, "crc32": "0" * 8, "kind": "ffn"}
    return SnapshotHead(**usual | changes), [torch.frombuffer(bytearray(data), dtype=torch.uint8)]


STATE = ExpertBackend(UID, make_expert("ffn", hidden=4), kind="ffn").state()
GOOD = pack_expert(UID, STATE, kind="ffn")[0]


@pytest.mark.parametrize(
    "lies",
    [
        lie(GOOD, size=len(GOOD) + 1),
        lie(GOOD, size=len(GOOD) - 1),
        lie(GOOD, updates=7),
        lie(GOOD, kind="transformer"),
        lie(b"\x80\x04garbage" * 20),
        lie(GOOD[:-1] + b"\xff"),
        lie(pack_expert("ffn.9.9", STATE, kind="ffn")[0]),
        lie(pack_expert(UID, {"weight": torch.ones(2)}, kind="ffn")[0]),
        (lie(GOOD)[0], []),
        (lie(GOOD)[0], [torch.ones(len(GOOD))]),
        (lie(GOOD)[0], [torch.ones(len(GOOD), 1, dtype=torch.uint8)]),
    ],
)
async def test_what_is_no_state_of_this_expert_is_a_bad_reply(tmp_path, lies):
    with pytest.raises(BadReply, match=f"the server of {UID} has sent"):
        await fetch_snapshot(Liar(*lies), None, UID, tmp_path)  # type: ignore[arg-type]


async def test_a_state_that_the_disk_cannot_hold_is_not_asked_for(tmp_path):
    liar = Liar(*lie(GOOD, size=1 << 40))
    with pytest.raises(OSError, match=r"takes 1099\.51 GB, and .* left"):
        await fetch_snapshot(liar, None, UID, tmp_path)  # type: ignore[arg-type]
    assert liar.calls == [SNAPSHOT, SNAPSHOT_DONE]


async def test_a_state_can_be_put_in_the_place_of_an_experts_own_between_two_batches(autojump_clock: MockClock):
    runtime = Runtime({UID: ExpertBackend(UID, make_expert("ffn", hidden=4), kind="ffn")}, executor=InlineCompute())
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        await submit(runtime, UID, "backward", [X, X], trio.current_time() + 1)
        await runtime.load(UID, STATE)
        assert_same_bits(await runtime.snapshot(UID), STATE)
        nursery.cancel_scope.cancel()
