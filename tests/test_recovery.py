"""Experts under failure: whatever happens, none is lost, and none is served twice for long."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.contact import Contact
from labkit.copies import copying, levelling, takeover, watching
from labkit.copies.meeting import Meeting
from labkit.copies.store import IncomingCopy
from labkit.directory.declaring import Declaring
from labkit.directory.index import Declared
from labkit.errors import Overloaded
from labkit.events import CopyFailed, ExpertGivenUp, ExpertTakenOver
from labkit.node import open_node
from labkit.server.pulse import LATE, Pulse
from labkit.wire.security import Identity
from tests.copied_swarms import CopiedSwarm, Server, X, copied_swarm
from tests.recovery_trials import AGREED, PAUSES, STEPS, Step, try_out

UIDS = [f"ffn.{row}.{column}" for row in range(2) for column in range(2)]


@settings(max_examples=6)
@given(
    st.lists(
        st.builds(Step, st.sampled_from(PAUSES), st.sampled_from(STEPS), st.integers(0, 15)), min_size=2, max_size=6
    ),
    st.integers(1, 2),
)
def test_whatever_happens_no_expert_is_lost_none_is_served_twice_for_long_and_in_the_end_all_agree(steps, backups):
    try_out(steps, backups)


KILLS = [Step(15.0, "kill", 0)]
DIVISION = [Step(15.0, "split", 0b0011), Step(30.0, "heal")]


@pytest.mark.parametrize("steps", [KILLS, DIVISION], ids=["kills", "division"])
def test_nothing_is_wrong_after_a_kill_or_a_division(steps):
    try_out(steps)


def nothing(*_: object, **__: object) -> None:
    """What a planted fault does."""


async def nobody(*_: object, **__: object) -> set[str]:
    """What a planted fault finds."""
    return set()


@pytest.mark.parametrize(
    ("where", "name", "fault", "steps", "found"),
    [
        (watching, "BROKEN_CALLS", 10**9, KILLS, "served by 0 servers"),
        (takeover.TakeOver, "_carry_on", nobody, KILLS, "served by 0 servers"),
        (copying.Copying, "_next", nothing, KILLS, "not copied"),
        (Meeting, "_settle", nothing, DIVISION, "is served twice"),
        (Meeting, "_remind", nobody, DIVISION, "is served twice"),
    ],
    ids=["nobody notices", "nobody takes over", "nothing is copied", "nobody gives up", "nobody is told"],
)
def test_a_planted_fault_is_found(
    where: Any, name: str, fault: object, steps: list[Step], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, fault)
    if name == "BROKEN_CALLS":
        monkeypatch.setattr(where, "SILENT_CALLS", fault)
    if name == "_remind":
        monkeypatch.setattr(Declaring, "_rivals", lambda *_: {})
        monkeypatch.setattr(Meeting, "resolve", nobody)
        monkeypatch.setattr(Meeting, "suspect", nothing)
    if name == "_settle":
        monkeypatch.setattr(Declaring, "_rivals", lambda *_: {})
    with pytest.raises((AssertionError, trio.TooSlowError), match=found if found != "not copied" else None):
        try_out(steps)


def test_updates_that_are_lost_and_not_counted_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    next_copy = copying.Copying._next

    def once(self: copying.Copying) -> Any:  # each expert is copied once, and what was learnt since is not known
        due = next_copy(self)
        return None if due is not None and self._made.of(due[0]) else due

    def uncounted(**said: Any) -> ExpertTakenOver:
        return ExpertTakenOver(**said | {"lost_updates": 0})

    monkeypatch.setattr(copying.Copying, "_next", once)
    monkeypatch.setattr(takeover, "ExpertTakenOver", uncounted)
    with pytest.raises(AssertionError, match=r"had \d+ updates and has \d+; \d are counted as lost"):
        try_out([Step(60.0, "kill", n) for n in range(2)])


async def test_what_an_expert_learns_just_after_it_has_moved_is_counted_too_if_its_server_is_killed(
    tmp_path, autojump_clock, monkeypatch
):
    async with copied_swarm(tmp_path) as swarm:
        first, *_ = await swarm.serve_grid(3, (2, 3))
        await swarm.until_copied(2, (2, 3))
        (uid, *_) = first.held
        monkeypatch.setattr(copying.Copying, "_next", nothing)
        await first.stop()
        assert await swarm.train(uid, 2) == 2
        await trio.sleep(1.3)  # less than the answer is kept back to a question that was asked before
        await next(server for server in swarm.servers if uid in server.held).kill()
        await swarm.until(partial(_taken_over, swarm, uid))
        assert [event.lost_updates for event in swarm.said(ExpertTakenOver) if event.uid == uid] == [2]


# ------------------------------------------------------------ a network that was divided


async def test_after_a_division_the_higher_epoch_stays_and_what_the_other_learnt_is_counted_as_lost(
    tmp_path, autojump_clock
):
    async with copied_swarm(tmp_path) as swarm, open_node(swarm.network, Identity(b"\1" * 32)) as far:
        servers = await swarm.serve_grid(2)
        await swarm.until_copied()
        await swarm.train(UIDS[0], 4)
        await trio.sleep(25)
        before = (await swarm.holders())[UIDS[0]]
        cut = next(server for server in servers if server.contact == before.contact)
        swarm.network.partition([cut.contact, far.contact])
        for _ in range(7):  # on its side it goes on
            await swarm.call(before, "backward", [X, torch.ones_like(X)], far)
        await swarm.until(partial(_taken_over, swarm, UIDS[0]))  # and on the other side, from its copy
        swarm.network.heal()
        await swarm.until(partial(_given_up, swarm, UIDS[0]), AGREED)
        lost = {event.uid: event.lost_updates for event in swarm.said(ExpertGivenUp)}
        assert lost[UIDS[0]] == 7
        assert await swarm.train(UIDS[0]) == 5


async def test_what_was_given_up_goes_on_if_the_other_one_is_gone_before_it_has_a_copy(
    tmp_path, autojump_clock, monkeypatch
):
    async with copied_swarm(tmp_path) as swarm, open_node(swarm.network, Identity(b"\1" * 32)) as far:
        cut, other = await swarm.serve_grid(2)
        await swarm.until_copied()
        (uid, *_) = cut.held
        before = (await swarm.holders())[uid]
        swarm.network.partition([cut.contact, far.contact])
        for _ in range(7):
            await swarm.call(before, "backward", [X, torch.ones_like(X)], far)
        await swarm.until(partial(_taken_over, swarm, uid))
        monkeypatch.setattr(copying.Copying, "_next", nothing)
        swarm.network.heal()
        await swarm.until(partial(_given_up, swarm, uid))
        await other.kill()
        await swarm.until(partial(_taken_over, swarm, uid, at=cut))
        assert await swarm.train(uid) == 8


async def test_what_was_given_up_is_not_kept_when_the_other_one_has_its_copies(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm, open_node(swarm.network, Identity(b"\1" * 32)) as far:
        cut, *_ = await swarm.serve_grid(4, (2, 3))
        await swarm.until_copied(2, (2, 3))
        (uid, *_) = cut.held
        swarm.network.partition([cut.contact, far.contact])
        await swarm.until(partial(_taken_over, swarm, uid))
        swarm.network.heal()
        await swarm.until(partial(_are_kept, [cut], uid, [0]))
        await swarm.until(partial(_are_kept, swarm.servers, uid, [1, 1]), 90)


async def _are_kept(servers: Sequence[Server], uid: str, epochs: list[int]) -> bool:
    """Whether these servers have copies of an expert in these epochs."""
    files = [path.name for server in servers for path in server.copies.glob(f"{uid}~*.json")]
    return sorted(int(name.split("~")[1].split(".")[0]) for name in files) == epochs


async def test_what_was_given_up_to_a_server_that_is_declared_but_silent_goes_on_where_it_was(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        await swarm.serve_grid(1)
        await swarm.train(UIDS[0], 3)
        async with open_node(swarm.network, Identity(b"\1" * 32), join=[swarm.node.contact]) as rival:
            await rival.directory.declare({UIDS[0]: Declared(7)}, rival.contact)
            swarm.network.unplug(rival.contact)
            await swarm.until(partial(_given_up, swarm, UIDS[0]), 60)
            await swarm.until(partial(_taken_over, swarm, UIDS[0]))
            assert await swarm.train(UIDS[0]) == 4


@pytest.mark.parametrize("who_calls", ["either", "the one that was cut off", "the other one"])
async def test_who_was_cut_off_with_the_copy_in_reserve_alone_costs_nobody_else_what_was_learnt(
    tmp_path, autojump_clock, monkeypatch, who_calls
):
    async with (
        copied_swarm(tmp_path) as swarm,
        open_node(swarm.network, Identity(b"\1" * 32), join=[swarm.node.contact]) as far,
    ):
        before, _, cut = await swarm.serve_with_a_copy_in_reserve(UIDS[0], 7)
        swarm.network.partition([cut.contact, far.contact])
        await swarm.until(partial(_taken_over, swarm, UIDS[0]))
        there = (await far.directory.holders([UIDS[0]]))[UIDS[0]]
        await swarm.call(there, "backward", [X, torch.ones_like(X)], far)
        await swarm.train(UIDS[0], 2)
        meet = Meeting.meet

        async def meet_if_allowed(self: Meeting, contact: Contact, uids: Sequence[str], **options: Any) -> bool:
            allowed = who_calls == "either" or (who_calls == "the one that was cut off") == (self._own() == cut.contact)
            return allowed and await meet(self, contact, uids, **options)

        monkeypatch.setattr(Meeting, "meet", meet_if_allowed)
        swarm.network.heal()
        await swarm.until(partial(_given_up, swarm, UIDS[0]), AGREED)
        (event,) = [event for event in swarm.said(ExpertGivenUp) if event.uid == UIDS[0]]
        assert (event.address, event.to, event.lost_updates) == (cut.contact.endpoint, before.contact.endpoint, 1)
        for node in (swarm.node, far):
            at = (await node.directory.find([UIDS[0]]))[UIDS[0]]
            assert at is not None
            await swarm.call(at, "backward", [X, torch.ones_like(X)], node)
        assert await swarm.train(UIDS[0]) == 12


async def _given_up(swarm: Any, uid: str) -> bool:
    return any(event.uid == uid for event in swarm.said(ExpertGivenUp))


# ------------------------------------------------------------ a server that was frozen


async def test_a_server_that_was_frozen_answers_nothing_before_it_knows_what_is_still_its_own(autojump_clock):
    now, looked, go_on = 0.0, trio.Event(), trio.Event()

    async def look_around() -> None:
        looked.set()
        await go_on.wait()

    pulse = Pulse(look_around, lambda: now + trio.current_time())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulse.run)
        await trio.sleep(10)
        assert not pulse.is_late
        now += LATE + 1  # it was stopped, and goes on
        assert pulse.is_late
        await looked.wait()
        await trio.sleep(10)
        assert pulse.is_late
        go_on.set()
        await trio.sleep(1)
        assert not pulse.is_late
        nursery.cancel_scope.cancel()


async def test_who_wakes_up_gives_up_what_others_have_taken_over_before_it_answers(
    tmp_path, autojump_clock, monkeypatch
):
    asleep = dict[Pulse, float]()
    pulses = list[Pulse]()
    plain = Pulse.__init__

    def make(self: Pulse, look_around: Callable[[], Any], clock: Callable[[], float]) -> None:
        pulses.append(self)
        plain(self, look_around, lambda: trio.current_time() + asleep.get(self, 0.0))

    monkeypatch.setattr(Pulse, "__init__", make)
    async with copied_swarm(tmp_path) as swarm:
        servers = await swarm.serve_grid(2)
        await swarm.until_copied()
        await trio.sleep(25)
        before = (await swarm.holders())[UIDS[0]]
        number = next(n for n, server in enumerate(servers) if server.contact == before.contact)
        monkeypatch.setattr(Meeting, "_remind", nobody)  # nobody tells it: it has to find out itself
        swarm.network.unplug(before.contact)  # so that the others hear nothing of it
        await swarm.until(partial(_taken_over, swarm, UIDS[0]))
        swarm.network.heal()
        asleep[pulses[number]] = 60.0
        with pytest.raises(Overloaded, match="has been away"):
            await swarm.call(before, "backward", [X, torch.ones_like(X)])
        await swarm.until(partial(_given_up, swarm, UIDS[0]), 3)
        await swarm.until(partial(_beats, pulses[number]), 3)
        assert {event.uid for event in swarm.said(ExpertTakenOver)} == {
            event.uid for event in swarm.said(ExpertGivenUp)
        }
        assert await swarm.call(before, "backward", [X, torch.ones_like(X)]) == 1  # elsewhere, where it has moved


async def _taken_over(swarm: CopiedSwarm, uid: str, at: Server | None = None) -> bool:
    by = [event.address for event in swarm.said(ExpertTakenOver) if event.uid == uid]
    return bool(by) if at is None else at.contact.endpoint in by


async def _beats(pulse: Pulse) -> bool:
    return not pulse.is_late


# ------------------------------------------------------------ a backup that fails


def failing(victim: Path, what: Callable[[], Any]) -> Callable[..., Any]:
    """`IncomingCopy.append`, which fails at one server."""
    plain = IncomingCopy.append

    async def append(self: IncomingCopy, data: Any) -> None:
        if self._part.parent == victim:
            await what()
        await plain(self, data)

    return append


async def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("what", "cause", "why"),
    [(full, "refused", "No space left"), (partial(trio.sleep, 10**4), "timeout", "no answer"), (None, "lost", "")],
    ids=["full", "slow", "killed"],
)
async def test_where_a_backup_cannot_keep_a_copy_another_one_is_chosen_and_an_event_says_why(
    what, cause, why, tmp_path, monkeypatch, autojump_clock
):
    async with copied_swarm(tmp_path) as swarm:
        await swarm.serve(UIDS)
        spares = [await swarm.serve(spare=True) for _ in range(2)]
        victim = spares[0]

        async def die() -> None:
            victim.scope.cancel()
            await trio.sleep_forever()

        monkeypatch.setattr(IncomingCopy, "append", failing(victim.copies, what or die))
        monkeypatch.setattr(levelling, "LEAST_DIFFERENCE", 10**9)

        async def copied() -> bool:
            found = await swarm.holders()
            return all(spares[1].contact.key[:8] in found[uid].copies for uid in UIDS)

        await swarm.until(copied, 60)
        failed = [event for event in swarm.said(CopyFailed) if event.address == victim.contact.endpoint]
        assert failed
        assert {event.cause for event in failed} == {cause}
        assert all(why in event.detail for event in failed)
        assert not any(victim.copies.glob("*.safetensors"))
