"""Experts outlive their servers: others carry them on from copies, within seconds and unasked."""

from __future__ import annotations

from functools import partial

import torch
import trio

from labkit.contact import Contact
from labkit.events import ExpertHandedOver, ExpertTakenOver
from labkit.expert_uid import grid_uids
from tests.copied_swarms import CopiedSwarm, Server, X, copied_swarm

GRID = (2, 2)
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


async def _has(swarm: CopiedSwarm, server: Server, experts: int) -> bool:
    return [info.contact for info in (await swarm.holders()).values()].count(server.contact) == experts


async def _served_elsewhere(swarm: CopiedSwarm, contact: Contact) -> bool:
    found = await swarm.holders()
    return len(found) == len(UIDS) and all(info.contact != contact for info in found.values())
