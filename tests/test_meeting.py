"""Two servers that both declare an expert: who of them goes on with it, where one of them says nothing, or lies."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from labkit.contact import Contact
from labkit.copies.experts import Pack
from labkit.copies.leftovers import Leftover
from labkit.copies.meeting import Meeting
from labkit.copies.messages import Meet, ServedState
from labkit.errors import BadRequest, DeadlineExceeded
from labkit.events import Event, ExpertGivenUp, ignore
from labkit.expert_uid import ExpertInfo
from labkit.wire.rpc_types import Reply

UID = "ffn.0.1"
OURS, THEIRS = Contact(b"a" * 32, "127.0.0.1", 5000), Contact(b"b" * 32, "127.0.0.1", 5001)


class Held:
    """The experts of a server: one, in epoch 3, with 20 updates."""

    def __init__(self) -> None:
        self.held = {UID: 3}

    def updates(self, uid: str) -> int:
        return 20

    def raise_epoch(self, uid: str, epoch: int) -> None:
        self.held[uid] = epoch

    def give_up(self, uid: str, to: Contact, epoch: int) -> Pack:
        del self.held[uid]
        return lambda: pytest.fail("nobody has asked for its state")


async def resolve(epoch: int, answer: Any) -> tuple[set[str], dict[str, int], list[Event]]:
    """What comes of it when another server has declared the expert in some epoch, and answers this when it is met."""

    async def call(*_: Any, **__: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(body=[answer])

    experts, events = Held(), list[Event]()
    directory: Any = SimpleNamespace(declare_anew=lambda *uids: None)
    meeting = Meeting(SimpleNamespace(call=call), directory, experts, lambda: OURS, events.append)  # type: ignore[arg-type]
    settled = await meeting.resolve({UID: ExpertInfo(UID, THEIRS, epoch=epoch)})
    return settled, experts.held, events


@pytest.mark.parametrize(("epoch", "settled", "ours"), [(2, True, 3), (3, True, 4), (4, False, 3)])
async def test_a_server_that_is_silent_does_not_get_an_expert_of_the_same_epoch(epoch, settled, ours):
    assert await resolve(epoch, DeadlineExceeded("no answer")) == ({UID} if settled else set(), {UID: ours}, [])


@pytest.mark.parametrize(("epoch", "ours"), [(2, 3), (3, 3), (4, 5), (1 << 40, (1 << 40) + 1)])
async def test_a_server_that_says_that_it_does_not_serve_an_expert_has_not_declared_it(epoch, ours):
    assert await resolve(epoch, None) == ({UID}, {UID: ours}, [])


async def test_with_one_that_knows_nothing_of_copies_it_is_settled_by_what_is_declared():
    assert await resolve(3, BadRequest("there is no such method")) == (set(), {UID: 3}, [])


@pytest.mark.parametrize(
    ("theirs", "epoch"),
    [
        (ServedState(UID, 3, 19), 4), (ServedState(UID, 2, 900), 3), (ServedState(UID, 3, 21), None),
        (ServedState(UID, 4, 1), None),
    ],
)  # fmt: skip
async def test_of_two_that_serve_it_the_one_with_the_higher_epoch_and_then_more_updates_goes_on(theirs, epoch):
    settled, held, events = await resolve(theirs.epoch, theirs)
    assert (settled, held.get(UID)) == ({UID}, epoch)
    assert [type(event) for event in events] == ([] if epoch else [ExpertGivenUp])


@pytest.mark.parametrize(
    ("theirs", "epoch"),
    [
        (ServedState(UID, 4, 19, reserve=True), 5), (ServedState(UID, 4, 21, reserve=True), None),
        (ServedState(UID, 2, 900, reserve=True), 3),
    ],
    ids=["it has fewer updates", "it has more updates", "its epoch is lower, as after another state was loaded here"],
)  # fmt: skip
async def test_one_that_goes_on_from_the_copy_in_reserve_has_no_precedence_by_its_epoch(theirs, epoch):
    settled, held, events = await resolve(theirs.epoch, theirs)
    assert (settled, held.get(UID)) == ({UID}, epoch)
    assert [type(event) for event in events] == ([] if epoch else [ExpertGivenUp])


@pytest.mark.parametrize("who_calls", [OURS, THEIRS], ids=["who gives it up", "who goes on"])
async def test_of_two_in_the_same_epoch_one_goes_on_in_a_higher_one_and_the_other_keeps_what_it_has(who_calls):
    experts, leftovers = {OURS: Held(), THEIRS: Held()}, list[Leftover]()

    async def call(contact: Contact, _: str, body: Meet, **__: Any) -> Reply:
        return meetings[contact].rpc_meet(SimpleNamespace(body=body, peer=SimpleNamespace(key=who_calls.key)))  # type: ignore[arg-type]

    directory: Any = SimpleNamespace(declare_anew=lambda *uids: None)
    caller: Any = SimpleNamespace(call=call)
    meetings = {
        own: Meeting(caller, directory, held, lambda own=own: own, ignore, keep=leftovers.append)  # type: ignore[arg-type, misc]
        for own, held in experts.items()
    }
    await meetings[who_calls].meet(THEIRS if who_calls == OURS else OURS, [UID])
    assert (experts[OURS].held, experts[THEIRS].held) == ({}, {UID: 4})  # the higher key decides
    assert [(one.to, one.epoch) for one in leftovers] == [(THEIRS, 2 if who_calls == THEIRS else 3)]


async def test_who_has_given_an_expert_on_says_to_whom_and_that_one_is_met(autojump_clock):
    third = Contact(b"c" * 32, "127.0.0.1", 5002)
    met: list[Contact] = []

    async def call(contact: Contact, *_: Any, **__: Any) -> Any:
        met.append(contact)
        return SimpleNamespace(body=[ServedState(UID, 4, 0, at=third) if contact == THEIRS else None])

    async def nobody(_: object) -> dict[str, ExpertInfo]:
        return {}

    directory: Any = SimpleNamespace(declare_anew=lambda *uids: None, holders=nobody)
    meeting = Meeting(SimpleNamespace(call=call), directory, Held(), lambda: OURS, ignore)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(meeting.run)
        meeting.took_over(THEIRS, {UID: 20})
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert met == [THEIRS, third]


class Silent:
    """A server that is called, and says nothing, or that all is well: `calls` are the times of the calls to it."""

    def __init__(self, answers: bool) -> None:
        self.answers = answers
        self.calls: list[float] = []

    async def call(self, *_: Any, **__: Any) -> Any:
        self.calls.append(trio.current_time())
        if not self.answers:
            raise DeadlineExceeded("no answer")
        return SimpleNamespace(body=[None])


def meeting_with(caller: Silent) -> tuple[Meeting, list[str]]:
    """A server that meets another one, and what it does because the network seems to have been divided."""
    done: list[str] = []
    directory: Any = SimpleNamespace(declare_anew=lambda *uids: done.append("declared anew"))
    found_back = partial(done.append, "found back")
    return Meeting(caller, directory, Held(), lambda: OURS, ignore, found_back), done  # type: ignore[arg-type]


async def test_a_server_whose_expert_was_taken_over_is_called_more_and_more_seldom(autojump_clock):
    caller = Silent(answers=False)
    meeting, _ = meeting_with(caller)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(meeting.run)
        meeting.took_over(THEIRS, {UID: 20})
        await trio.sleep(1700)
        nursery.cancel_scope.cancel()
    pauses = [after - before for before, after in pairwise(caller.calls)]
    assert pauses[0] == 1.0 and 20.0 < pauses[-1] <= 30.0 and pauses == sorted(pauses)
    assert all(pause <= 1 + at / 50 for pause, at in zip(pauses, caller.calls, strict=False))


async def test_only_who_was_away_is_a_reason_to_tell_all_others_where_we_are(autojump_clock):
    for note, expected in (
        (lambda meeting: meeting.took_over(THEIRS, {UID: 20}), ["found back", "declared anew"]),
        (lambda meeting: meeting.was_given(THEIRS, UID, 20), []),
    ):
        caller = Silent(answers=True)
        meeting, done = meeting_with(caller)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(meeting.run)
            note(meeting)
            await trio.sleep(60)
            nursery.cancel_scope.cancel()
        assert (len(caller.calls), done) == (1, expected)


async def test_a_server_to_which_there_was_nothing_to_say_was_not_met(autojump_clock):
    caller = Silent(answers=True)
    meeting, done = meeting_with(caller)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(meeting.run)
        meeting.giving.add(UID)  # it is being handed over, so nothing is said of it
        meeting.took_over(THEIRS, {UID: 20})
        await trio.sleep(5)
        assert not caller.calls and not done
        meeting.giving.clear()
        await trio.sleep(5)
        assert len(caller.calls) == 1 and done == ["found back", "declared anew"]
        nursery.cancel_scope.cancel()
