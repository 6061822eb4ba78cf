"""Two servers that both declare an expert: who of them goes on with it, where one of them says nothing, or lies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from labkit.contact import Contact
from labkit.copies.meeting import Meeting
from labkit.copies.messages import ServedState
from labkit.errors import BadRequest, DeadlineExceeded
from labkit.events import Event, ExpertGivenUp
from labkit.expert_uid import ExpertInfo

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

    def give_up(self, uid: str, to: Contact, epoch: int) -> None:
        del self.held[uid]


async def resolve(epoch: int, answer: Any) -> tuple[set[str], dict[str, int], list[Event]]:
    """What comes of it when another server has declared the expert in some epoch, and answers this when it is met."""

    async def call(*_: Any, **__: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(body=[answer])

    experts, events = Held(), list[Event]()
    directory: Any = SimpleNamespace(declare_anew=lambda: None)
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
