"""Experts outlive their servers: others carry them on from copies, within seconds and unasked."""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from labkit.client.expert import RemoteExpert
from labkit.client.expert_client import ExpertClient
from labkit.contact import Contact
from labkit.copies import keeper, takeover
from labkit.copies.copying import Copying
from labkit.copies.handover import HandOver
from labkit.copies.messages import OFFER, CopyHead
from labkit.copies.placement import score
from labkit.copies.returning import Carried
from labkit.copies.store import IncomingCopy
from labkit.errors import (
    CheckpointError,
    ConnectionLost,
    LabkitError,
    NoExperts,
    RemoteFailure,
    RequestRefused,
    RPCError,
)
from labkit.events import CopyFailed, CopyStored, ExpertGivenUp, ExpertHandedOver, ExpertTakenOver
from labkit.expert_file import pack_expert
from labkit.expert_uid import ExpertInfo, grid_uids
from labkit.server import carrying
from labkit.server.backend import ExpertBackend
from labkit.server.carrying import CarriedExperts
from labkit.server.checkpoints import save_expert
from labkit.server.holdings import Holdings
from labkit.server.layers import make_expert
from labkit.server.optimizer import BackendConfig
from labkit.wire.rpc_types import Reply, Request, RespondFn
from labkit.wire.security import Identity
from tests.copied_swarms import CopiedSwarm, Server, X, copied_swarm

GRID = (2, 2)
SGD = BackendConfig(optimizer="sgd", lr=0.1)
UIDS = list(grid_uids("ffn", GRID))


async def test_the_experts_of_a_server_that_is_gone_for_good_serve_again_within_five_seconds(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        servers = await swarm.serve_grid(4)
        await swarm.until_copied()
        await swarm.train(UIDS[0], 5)
        await trio.sleep(25)
        before = await swarm.holders()
        victim = next(server for server in servers if server.contact == before[UIDS[0]].contact)
        await victim.kill()

        async def served() -> bool:
            found = await swarm.holders()
            return all(found[uid].contact != victim.contact for uid in UIDS)

        assert await swarm.until(served) < 5
        assert await swarm.train(UIDS[0]) == 6  # nothing was lost
        (event,) = swarm.said(ExpertTakenOver)
        assert (event.uid, event.before, event.epoch, event.lost_updates) == (UIDS[0], victim.contact.endpoint, 1, 0)


async def test_servers_that_begin_together_find_each_other_at_once_and_copy_their_experts(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        await swarm.serve_grid(4)
        assert await swarm.until_copied() < 4


async def test_an_expert_that_no_file_can_hold_is_said_to_be_at_risk_and_the_others_are_copied_all_the_same(
    tmp_path, monkeypatch, autojump_clock
):
    def pack_others(uid: str, state: Mapping[str, torch.Tensor], **options: str) -> tuple[bytearray, str]:
        odd = {"module.odd": torch.zeros(2, dtype=torch.complex128)} if uid == UIDS[0] else {}
        return pack_expert(uid, {**state, **odd}, **options)

    monkeypatch.setattr(carrying, "pack_expert", pack_others)
    async with copied_swarm(tmp_path) as swarm:
        servers = await swarm.serve_grid(2)

        async def copied() -> bool:
            return all(any(server.has_copy(uid) for server in servers) for uid in UIDS[1:])

        assert await swarm.until(copied) < 4
        for uid in UIDS:
            await swarm.train(uid)
        await trio.sleep(15)
        kept = [event.uid for event in swarm.said(CopyStored) if event.updates == 1]
        assert sorted(kept) == list(UIDS[1:])
        refused = swarm.said(CopyFailed)
        assert {event.uid for event in refused} == {UIDS[0]} and "complex128" in refused[0].detail
        assert len(refused) < 3


@pytest.mark.parametrize(("silently", "seconds"), [(False, 4.5), (True, 6.0)])
async def test_after_a_server_is_gone_all_experts_have_a_copy_again_within_seconds(
    tmp_path, autojump_clock, silently, seconds
):
    grid = (3, 5)
    uids = list(grid_uids("ffn", grid))
    async with copied_swarm(tmp_path) as swarm, trio.open_nursery() as nursery:
        servers = await swarm.serve_grid(5, grid)
        await swarm.until_copied(grid=grid)

        async def learn() -> None:  # so that copies are under way all the time, to the one that goes, too
            for number in itertools.count():
                await trio.sleep(0.1)
                with suppress(RPCError):
                    await swarm.train(uids[number % len(uids)])

        async def copied() -> bool:
            alive = [server for server in servers if server.is_alive]
            keepers = {uid: [s for s in alive if uid not in s.held and s.has_copy(uid)] for uid in uids}
            return all(keepers.values()) and {uid for server in alive for uid in server.held} >= set(uids)

        nursery.start_soon(learn)
        await trio.sleep(15)
        for victim in servers[:2]:
            if silently:
                swarm.network.unplug(victim.contact)
            await victim.kill()
            assert await swarm.until(copied) < seconds
            await trio.sleep(10)
        nursery.cancel_scope.cancel()


async def test_what_was_learnt_since_the_last_copy_is_counted_as_lost(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        servers = await swarm.serve_grid(2)
        await swarm.until_copied()
        await trio.sleep(25)
        await swarm.train(UIDS[0], 1)
        await trio.sleep(2)  # so that this is copied
        await swarm.train(UIDS[0], 3)
        await trio.sleep(2)
        at = (await swarm.holders())[UIDS[0]].contact
        victim = next(server for server in servers if server.contact == at)
        await victim.kill()
        await swarm.until(partial(_served_elsewhere, swarm, victim.contact))
        lost = {event.uid: event.lost_updates for event in swarm.said(ExpertTakenOver)}
        assert lost[UIDS[0]] == 3


async def test_who_keeps_copies_asks_every_two_seconds_and_all_who_ask_a_server_are_answered_at_once(
    tmp_path, autojump_clock, monkeypatch
):
    answered: list[tuple[Copying, float]] = []
    answer = Copying.rpc_watch

    def rpc_watch(self: Copying, request: Request, respond: RespondFn) -> object:
        def note(outcome: Reply | Exception) -> None:
            answered.append((self, trio.current_time()))
            respond(outcome)

        return answer(self, request, note)

    monkeypatch.setattr(Copying, "rpc_watch", rpc_watch)
    async with copied_swarm(tmp_path) as swarm:
        await swarm.serve_grid(4, (4, 4))
        await swarm.until_copied(grid=(4, 4))
        await trio.sleep(90)  # until those in reserve are made, too
        answered.clear()
        await trio.sleep(20)
        assert len(answered) in range(4 * 2 * 10, 4 * 3 * 10 + 12)  # to two or three other servers
        assert len(set(answered)) in range(4 * 10, 4 * 10 + 4)


@pytest.mark.parametrize("servers", [2, 3], ids=["a-pair", "three-of-them-with-copies-in-reserve"])
async def test_where_copies_nearly_fill_the_link_rare_and_busy_experts_lose_ten_seconds_at_most(
    tmp_path, autojump_clock, servers
):
    grid = (4, 8)
    uids = list(grid_uids("ffn", grid))
    async with copied_swarm(tmp_path, latency=0.01, bandwidth=1e6) as swarm, trio.open_nursery() as nursery:
        await swarm.serve_grid(servers, grid, options={"hidden": 32}, backend=BackendConfig(optimizer="sgd", lr=1e-6))
        await swarm.until_copied(grid=grid)
        learnt = {uid: [(0.0, 0)] for uid in uids}  # when, and how much

        async def learn(uid: str, pause: float) -> None:
            while True:
                updates = await swarm.train(uid, x=torch.ones(1, 32))
                learnt[uid].append((trio.current_time(), updates))
                await trio.sleep(pause)

        def missing(uid: str) -> float:
            """Seconds of what an expert has learnt that its copy is without."""
            copied = max((e.updates for e in swarm.said(CopyStored) if e.uid == uid), default=0)
            return trio.current_time() - min((at for at, n in learnt[uid] if n > copied), default=trio.current_time())

        for number, uid in enumerate(uids):
            nursery.start_soon(learn, uid, 0.2 if number % 4 == 0 else 1.0)
        await trio.sleep(20)
        worst = 0.0
        for _ in range(40):
            await trio.sleep(0.5)
            worst = max(worst, *map(missing, uids))
        assert 8 < worst < 9.8, "seconds of updates"
        nursery.cancel_scope.cancel()


async def test_an_expert_whose_server_and_backup_leave_in_the_same_second_goes_on_from_the_copy_in_reserve(
    tmp_path, autojump_clock
):
    async with copied_swarm(tmp_path) as swarm:
        primary, backup, reserve = await swarm.serve_with_a_copy_in_reserve(UIDS[0], 7)
        await backup.kill()
        await primary.kill()
        assert await swarm.until(partial(_served_elsewhere, swarm, primary.contact)) < 5
        assert (await swarm.holders())[UIDS[0]].contact == reserve.contact
        lost = {event.uid: event.lost_updates for event in swarm.said(ExpertTakenOver)}
        assert lost[UIDS[0]] == 2
        assert await swarm.train(UIDS[0]) == 6


async def test_the_copy_in_reserve_is_not_used_where_the_backup_is_there_and_takes_three_seconds(
    tmp_path, autojump_clock, monkeypatch
):
    carry_on = takeover.TakeOver._carry_on

    async def slowly(self: takeover.TakeOver, *args: Any) -> None:
        if self._own() == backup.contact:
            await trio.sleep(3)
        await carry_on(self, *args)

    async with copied_swarm(tmp_path) as swarm:
        primary, backup, _ = await swarm.serve_with_a_copy_in_reserve(UIDS[0], 7)
        monkeypatch.setattr(takeover.TakeOver, "_carry_on", slowly)
        await primary.kill()
        await swarm.until(partial(_served_elsewhere, swarm, primary.contact))
        assert (await swarm.holders())[UIDS[0]].contact == backup.contact
        assert [event.lost_updates for event in swarm.said(ExpertTakenOver)] == [0]


async def test_servers_that_have_no_room_for_copies_in_reserve_keep_the_others_and_are_not_asked_all_the_time(
    tmp_path, autojump_clock, monkeypatch
):
    really_open = IncomingCopy.open

    def only_backups(self: IncomingCopy, data: memoryview) -> None:
        if self.head.reserve:
            raise OSError(errno.ENOSPC, "No space left on device")
        really_open(self, data)

    monkeypatch.setattr(IncomingCopy, "open", only_backups)
    async with copied_swarm(tmp_path) as swarm:
        await swarm.serve_grid(4, backend=BackendConfig(optimizer="sgd", lr=1e-6))
        await swarm.until_copied()
        for _ in range(30):
            for uid in UIDS:
                await swarm.train(uid)
            await trio.sleep(1)
        await trio.sleep(10)
        copied = {event.uid: event.updates for event in swarm.said(CopyStored)}
        assert copied == dict.fromkeys(UIDS, 30)
        failed = swarm.said(CopyFailed)
        assert {event.uid for event in failed} == set(UIDS)
        assert len(failed) <= 2 * len(UIDS), "once a minute each"


async def test_the_last_server_left_holds_all_experts(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        servers = await swarm.serve_grid(4)
        await swarm.until_copied()
        for victim in servers[:3]:
            await victim.kill()
            await swarm.until(partial(_served_elsewhere, swarm, victim.contact), 10)
            await trio.sleep(20)
        assert {info.contact for info in (await swarm.holders()).values()} == {servers[3].contact}
        for uid in UIDS:
            await swarm.train(uid)


async def test_a_clean_stop_hands_all_experts_over_and_loses_no_update(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        servers = await swarm.serve_grid(2)
        await swarm.until_copied()
        for uid in UIDS:
            await swarm.train(uid, 3)
        before = await swarm.holders()
        await servers[0].stop()
        moved = [uid for uid in UIDS if before[uid].contact == servers[0].contact]
        assert sorted(event.uid for event in swarm.said(ExpertHandedOver)) == moved
        for uid in UIDS:
            assert await swarm.train(uid) == 4


async def test_a_call_to_the_old_place_is_answered_at_the_new_one(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        await swarm.serve_grid(1)
        before = await swarm.holders()
        spare = await swarm.serve()
        await swarm.until(partial(_has, swarm, spare, 2))
        for uid in UIDS:
            assert await swarm.call(before[uid], "backward", [X, torch.ones_like(X)]) == 1


async def test_a_spare_server_is_given_experts_until_loads_are_even(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        await swarm.serve_grid(1)
        spare = await swarm.serve()
        await swarm.until_copied()
        await swarm.until(partial(_has, swarm, spare, 2))
        await trio.sleep(20)
        assert await _has(swarm, spare, 2)
        assert len(swarm.said(ExpertHandedOver)) == 2


async def test_many_servers_do_not_all_offer_an_expert_to_the_same_spare_one(tmp_path, autojump_clock, monkeypatch):
    tried: list[str] = []
    give = HandOver.give

    async def count(self: HandOver, uid: str, *args: Any, **options: Any) -> bool:
        tried.append(uid)
        return await give(self, uid, *args, **options)

    monkeypatch.setattr(HandOver, "give", count)
    async with copied_swarm(tmp_path) as swarm:
        await swarm.serve_grid(16, (4, 16))
        await trio.sleep(30)
        spare = await swarm.serve(grid=(4, 16))
        await trio.sleep(15)
        assert len(spare.held) == 3 == len(swarm.said(ExpertHandedOver))
        assert len(tried) <= 2 * 16  # who was refused waits until the spare one has said how many it has


async def test_a_copy_is_dropped_only_when_all_have_theirs_whose_place_it_is_also_that_in_reserve(
    tmp_path, autojump_clock
):
    grid = (4, 4)
    async with copied_swarm(tmp_path, latency=0.05, bandwidth=2e4) as swarm, trio.open_nursery() as nursery:
        calm = BackendConfig(optimizer="sgd", lr=1e-6)
        await swarm.serve_grid(4, grid, backend=calm)
        uids = list(grid_uids("ffn", grid))

        async def learn(uid: str) -> None:
            while True:
                with suppress(LabkitError):  # it is about to move
                    await swarm.train(uid)
                await trio.sleep(2)

        for uid in uids:
            nursery.start_soon(learn, uid)
        await trio.sleep(100)  # until those in reserve are made, too
        for _ in range(3):  # servers come that take the places of others
            await swarm.serve(grid=grid, backend=calm)
            for _ in range(200):
                await trio.sleep(0.1)
                for uid in {*uids} - {event.uid for event in swarm.said(ExpertHandedOver)}:
                    assert sum(uid in server.held or server.has_copy(uid) for server in swarm.servers) >= 3
        nursery.cancel_scope.cancel()


async def test_an_expert_that_is_about_to_be_loaded_stays_until_its_server_stops(tmp_path, monkeypatch, autojump_clock):
    monkeypatch.setattr(Holdings, "is_kept", lambda self, uid: uid == UIDS[0])
    async with copied_swarm(tmp_path) as swarm:
        server = await swarm.serve(UIDS[:2], grid=(1, 2))
        spare = await swarm.serve(grid=(1, 2))
        await trio.sleep(20)
        assert set(server.held) >= {UIDS[0]}
        await server.stop()
        assert set(spare.held) == set(UIDS[:2])


async def test_a_server_that_comes_back_is_a_spare_and_is_given_experts_again(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        servers = await swarm.serve_grid(2)
        await swarm.until_copied()
        uids = tuple(uid for uid, info in (await swarm.holders()).items() if info.contact == servers[0].contact)
        await servers[0].kill()
        await swarm.until(partial(_served_elsewhere, swarm, servers[0].contact))
        back = await swarm.serve(uids, identity=servers[0].identity)
        await swarm.until(partial(_has, swarm, back, 2))


async def test_neither_copies_nor_a_take_over_draw_random_numbers(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        servers = await swarm.serve_grid(2)
        before = torch.get_rng_state()  # of a notebook whose servers are tasks
        await swarm.until_copied()
        await servers[0].kill()
        await swarm.until(partial(_served_elsewhere, swarm, servers[0].contact))
        assert before.equal(torch.get_rng_state())


async def test_of_equally_fresh_copies_each_expert_goes_on_at_a_server_of_its_own_so_that_all_share_the_load(
    tmp_path, autojump_clock
):
    async with copied_swarm(tmp_path) as swarm:
        victim, *others = await swarm.serve_grid(3, (4, 4), backups=2)
        uids, places = set(victim.held), {server.contact.key: server.contact for server in others}
        await swarm.until_copied(2, (4, 4))
        await trio.sleep(10)  # until it is declared who has copies
        await victim.kill()
        await swarm.until(partial(_served_elsewhere, swarm, victim.contact, (4, 4)))
        holders = await swarm.holders((4, 4))
        assert {uid: holders[uid].contact for uid in uids} == {
            uid: places[min(places, key=partial(score, uid))] for uid in uids
        }


async def test_a_copy_that_is_far_larger_than_an_expert_of_the_grid_is_refused_unseen(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        for server in (await swarm.serve(UIDS), await swarm.serve()):
            head = CopyHead("ffn.1.1", 9, 9, 1 << 30, "0" * 8, "ffn", {}, swarm.node.contact)
            with pytest.raises(RequestRefused, match=r"a copy has at most 1\.\d MB here, and this one has 1073\.7 MB"):
                await swarm.node.client.call(server.contact, OFFER, head, timeout=5)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("known", [False, True], ids=["not known yet", "known"])
async def test_an_expert_that_is_called_alone_is_followed_to_the_server_that_takes_it_over(
    direction, known, tmp_path, autojump_clock
):
    async with copied_swarm(tmp_path) as swarm:
        victim, _ = await swarm.serve_grid(2)
        uid, directory = next(iter(victim.held)), swarm.node.directory
        session: Any = SimpleNamespace(experts=ExpertClient(swarm.node.client, directory), directory=directory)
        await trio.sleep(25)

        async def call() -> None:
            grads = [torch.ones_like(X)] if direction == "backward" else []
            (answer,) = await RemoteExpert(uid)._call(session, direction, [X], grads, (), True)
            assert answer.shape == X.shape

        await call()
        await trio.sleep(15)
        await victim.kill()
        if known:  # as by a layer, whose rows go to other experts
            info = (await directory.find([uid]))[uid]
            assert info is not None
            directory.report_failure(info, "lost")
        await call()
        assert await swarm.train(uid) == (3 if direction == "backward" else 1)


async def test_an_expert_that_nobody_carries_on_fails_at_once(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        server = await swarm.serve(UIDS)
        directory = swarm.node.directory
        session: Any = SimpleNamespace(experts=ExpertClient(swarm.node.client, directory), directory=directory)
        await directory.find(UIDS)
        await server.kill()
        began = trio.current_time()
        with pytest.raises(ConnectionLost):
            await RemoteExpert(UIDS[0])._call(session, "forward", [X], (), (), True)
        with pytest.raises(NoExperts):
            await RemoteExpert(UIDS[0])._call(session, "forward", [X], (), (), True)
        assert trio.current_time() - began < 1


# ------------------------------------------------------------ a server that comes back


@pytest.mark.parametrize(("saved", "goes_on"), [(9, 10), (1, 4)], ids=["newer", "older"])
async def test_a_server_that_comes_back_serves_its_checkpoint_if_that_is_newer_than_every_copy(
    saved, goes_on, tmp_path, autojump_clock
):
    async with copied_swarm(tmp_path) as swarm:
        victim, _ = await swarm.serve_grid(2)
        uid, *others = victim.held
        await swarm.train(uid, 3)
        await trio.sleep(25)
        folder = tmp_path / "checkpoints"
        state = ExpertBackend(uid, make_expert("ffn", hidden=4), SGD).state()
        save_expert(folder, uid, {**state, "counter.updates": torch.tensor(saved)}, kind="ffn")
        await victim.kill()
        await swarm.serve((uid, *others), identity=victim.identity, checkpoint_dir=str(folder), checkpoint_period=1e9)
        await trio.sleep(10)
        assert await swarm.train(uid) == goes_on
        await trio.sleep(20)
        assert await swarm.train(uid) == goes_on + 1
        for other in others:
            await swarm.train(other)


def unable(monkeypatch: pytest.MonkeyPatch, server: Server, error: LabkitError) -> None:
    """Let a server fail to carry any expert on."""
    plain = CarriedExperts.adopt

    async def adopt(self: CarriedExperts, *args: Any) -> None:
        if self._server.config.copies_dir == str(server.copies):
            raise error
        await plain(self, *args)

    monkeypatch.setattr(CarriedExperts, "adopt", adopt)


@pytest.mark.parametrize("comes_back", [False, True])
async def test_a_backup_that_cannot_carry_an_expert_on_gives_its_copy_to_a_server_that_can(
    comes_back, tmp_path, monkeypatch, autojump_clock
):
    async with copied_swarm(tmp_path) as swarm:
        victim, backup = await swarm.serve_grid(2)
        uids = tuple(victim.held)
        await swarm.train(uids[0], 3)
        await trio.sleep(25)
        unable(monkeypatch, backup, RemoteFailure("no memory is left"))
        other = victim if comes_back else await swarm.serve(identity=Identity(b"x" * 32))
        await victim.kill()
        if comes_back:  # so early that its experts are not taken over yet
            other = await swarm.serve(uids, identity=victim.identity)
        await swarm.until(partial(_served_at, swarm, uids, other), 30)
        assert await swarm.train(uids[0]) == 4
        failed = [event for event in swarm.said(CopyFailed) if event.address == backup.contact.endpoint]
        assert {event.uid for event in failed} == set(uids)
        assert "no memory is left" in failed[0].detail


async def test_a_server_that_has_left_its_experts_to_others_serves_them_if_nobody_does(
    tmp_path, monkeypatch, autojump_clock
):
    async with copied_swarm(tmp_path) as swarm:
        victim, backup = await swarm.serve_grid(2)
        uids = tuple(victim.held)
        await trio.sleep(25)
        unable(monkeypatch, backup, CheckpointError("the copy is damaged"))
        await victim.kill()
        back = await swarm.serve(uids, identity=victim.identity)
        await swarm.until(partial(_served_at, swarm, uids, back), 45)
        for uid in uids:
            assert await swarm.train(uid) == 1
        assert any("the copy is damaged" in event.detail for event in swarm.said(CopyFailed))


async def test_a_server_that_comes_back_finds_a_copy_that_is_not_where_it_was_declared(
    tmp_path, monkeypatch, autojump_clock
):
    uid = UIDS[0]
    async with copied_swarm(tmp_path) as swarm:
        owner, *named = await swarm.serve_with_a_copy_in_reserve(uid, 9)
        monkeypatch.setattr(Copying, "_name", lambda copying: None)  # that is said a moment later
        for server in named:
            await server.kill()
        other = next(server for server in swarm.servers if server.is_alive and server is not owner)
        await swarm.until(partial(_has_copy, other, uid))
        await owner.kill()
        back = await swarm.serve((uid,), identity=owner.identity)
        assert uid not in back.held
        await swarm.until(partial(_served_elsewhere, swarm, owner.contact))
        assert await swarm.train(uid) == 10


async def test_an_expert_that_began_anew_goes_on_from_its_copy_as_soon_as_that_is_seen(
    tmp_path, monkeypatch, autojump_clock
):
    async def nothing(*asked: object) -> Carried:
        return Carried()  # all answers were lost

    uid = UIDS[0]
    async with copied_swarm(tmp_path) as swarm:
        owner, *_ = await swarm.serve_with_a_copy_in_reserve(uid, 9)
        await owner.kill()
        monkeypatch.setattr(keeper, "carried_by_others", nothing)
        back = await swarm.serve((uid,), identity=owner.identity)
        assert uid in back.held
        assert await swarm.call(ExpertInfo(uid, back.contact), "backward", [X, torch.ones(3, 4)]) == 1
        assert await swarm.until(partial(_given_up, back, uid)) < 5
        await swarm.until(partial(_answers, swarm, uid))
        assert await swarm.train(uid) == 10
        lost: list[ExpertTakenOver | ExpertGivenUp] = [*swarm.said(ExpertTakenOver), *swarm.said(ExpertGivenUp)]
        assert sum(event.lost_updates for event in lost if event.uid == uid) == 1


async def _has_copy(server: Server, uid: str) -> bool:
    return server.has_copy(uid)


async def _given_up(server: Server, uid: str) -> bool:
    return uid not in server.held


async def _answers(swarm: CopiedSwarm, uid: str) -> bool:
    info = (await swarm.node.directory.holders([uid])).get(uid)
    with suppress(RPCError):
        return info is not None and await swarm.call(info, "forward", [X]) > 0
    return False


async def _served_at(swarm: CopiedSwarm, uids: Sequence[str], server: Server) -> bool:
    found = await swarm.holders()
    return all(uid in found and found[uid].contact == server.contact and uid in server.held for uid in uids)


async def _has(swarm: CopiedSwarm, server: Server, experts: int) -> bool:
    return [info.contact for info in (await swarm.holders()).values()].count(server.contact) == experts


async def _served_elsewhere(swarm: CopiedSwarm, contact: Contact, grid: Sequence[int] = (2, 2)) -> bool:
    found = await swarm.holders(grid)
    return len(found) == math.prod(grid) and all(info.contact != contact for info in found.values())
