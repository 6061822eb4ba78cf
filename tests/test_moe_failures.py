"""The MoE layer when experts are slow, fail or lie: one pass over scripted experts, in virtual time."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, cast

import msgspec
import pytest
import torch
import trio
from torch import Tensor

from labkit.client.dispatch import DispatchConfig, Dispatched, dispatch_backward, dispatch_forward
from labkit.client.expert_client import ExpertClient
from labkit.client.session import Session
from labkit.contact import Contact
from labkit.directory import Directory
from labkit.errors import ConnectionLost, DeadlineExceeded, NoExperts, NotEnoughExperts, RemoteFailure
from labkit.events import CallFailed, CallFinished, Event, RowsUnanswered
from labkit.expert_protocol import ExpertReply
from labkit.expert_uid import grid_uids, split_uid
from labkit.portal import Portal
from labkit.wire.rpc_types import Reply
from tests.fake_network import TaskCaller
from tests.fake_records import FakeRecords, contact

DIM = 2
Answer = Callable[[list[Tensor]], Awaitable[list[Tensor]]]


def number(uid: str) -> int:
    return 1 + int("".join(map(str, split_uid(uid)[1])))


def after(seconds: float, then: Exception | Callable[[Tensor], Tensor] | None = None) -> Answer:
    """Answer honestly after so many seconds; or fail, or answer with something else."""

    async def answer(honest: list[Tensor]) -> list[Tensor]:
        await trio.sleep(seconds)
        if isinstance(then, Exception):
            raise then
        return honest if then is None else [then(tensor) for tensor in honest]

    return answer


NEVER = after(math.inf)


class Lab(TaskCaller):
    """A grid of experts, where the n-th multiplies by n + 1: `behave` says how each of them answers.

    `asked`: (seconds since the start, direction, uid), for each request.
    """

    def __init__(self, grid: Sequence[int] = (4,), **config: Any) -> None:
        self.uids = list(grid_uids("ffn", grid))
        self.config = DispatchConfig(**config)
        self.records = FakeRecords()
        self.events: list[Event] = []
        directory = Directory(self.records)
        self.session = Session("test", cast(Portal, None), directory, ExpertClient(self, directory, self.events.append),
                               self.events.append)  # fmt: skip
        self.behaviour: dict[tuple[str, str], Answer] = {}
        self.asked: list[tuple[float, str, str]] = []
        self.updates: dict[str, int] = {}  # optimizer steps that experts say they have made; 1 for others
        self.leaving: set[str] = set()  # experts that say with each answer that their server is about to stop
        self.start = trio.current_time()

    def behave(self, answer: Answer, *uids: str, direction: str = "forward") -> None:
        self.behaviour |= {(direction, uid): answer for uid in uids}

    async def call(
        self, contact: Contact, method: str, body: Any = None, tensors: Sequence[Tensor] = (), *,
        returns: Any = Any, timeout: float, lane: str = "", codec: str = "none",
    ) -> Reply:  # fmt: skip
        direction, uid = method.removeprefix("expert."), body.uid
        self.asked.append((self.seconds, direction, uid))
        honest = [tensors[0 if direction == "forward" else 1] * number(uid)]
        with trio.move_on_after(timeout):
            answer = await self.behaviour.get((direction, uid), after(0.1))(honest)
            return Reply(ExpertReply(0.0, 0.0, self.updates.get(uid, 1), uid in self.leaving), answer)
        raise DeadlineExceeded("no answer")

    @property
    def seconds(self) -> float:
        return round(trio.current_time() - self.start, 6)

    async def declare(self) -> None:
        for uid in self.uids:  # a server each
            await self.session.directory.declare([uid], contact(number(uid)))

    async def forward(self, x: Tensor, *grid_scores: Tensor) -> tuple[Dispatched, Tensor]:
        if not self.records.stores:
            await self.declare()
        sent, (outputs,) = await dispatch_forward(self.session, self.config, "ffn", [x], grid_scores, [(DIM,)])
        return sent, outputs

    async def backward(self, sent: Dispatched, x: Tensor, grad: Tensor) -> Tensor:
        (result,) = await dispatch_backward(self.session, self.config, sent, [x], [grad])
        assert result is not None
        return result

    def failures(self) -> dict[str, str]:
        return {event.uid: event.cause for event in self.events if isinstance(event, CallFailed)}


def prefer(*rows: Sequence[int], size: int = 4) -> Tensor:
    """Scores of a one-dimensional grid: each row likes these coordinates best, in this order."""
    scores = torch.zeros(len(rows), size)
    for row, order in enumerate(rows):
        scores[row] = torch.tensor([float(10 - order.index(c)) if c in order else -float(c) for c in range(size)])
    return scores


def answered(sent: Dispatched, row: int = 0) -> set[str]:
    return {sent.experts[e].uid for e in sent.choice[row][sent.answered[row]].tolist()}


ROW = torch.ones(1, DIM)

# ---------------------------------------------------------------- what is known of the calls


async def test_staleness_is_what_others_updated_between_the_two_passes_of_a_row(autojump_clock):
    lab = Lab(k_best=2)
    x = torch.ones(1, DIM)
    lab.updates = {"ffn.0": 10, "ffn.1": 20}
    sent, _ = await lab.forward(x, prefer((0, 1)))
    lab.updates = {"ffn.0": 14, "ffn.1": 5}  # after three steps for others and ours; and the other began anew
    await lab.backward(sent, x, torch.ones(1, 2, DIM))
    finished = [event for event in lab.events if isinstance(event, CallFinished)]
    assert {(event.direction, event.uid): event.staleness for event in finished} == {
        ("forward", "ffn.0"): None,
        ("forward", "ffn.1"): None,
        ("backward", "ffn.0"): 3,
        ("backward", "ffn.1"): 0,
    }


@pytest.mark.parametrize(
    "lie", [(-1.0, 0.0, 1), (0.0, math.nan, 1), (0.0, math.inf, 1), (0.0, 0.0, -1), (0, 0, 1 << 60)]
)
def test_times_and_counts_that_cannot_be_are_no_answer(lie):
    with pytest.raises(msgspec.ValidationError):  # which the wire turns into a `BadReply`
        msgspec.msgpack.decode(msgspec.msgpack.encode(lie), type=ExpertReply)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode((0.5, 0.25, 3)), type=ExpertReply) == ExpertReply(0.5, 0.25, 3)


async def test_calls_in_flight_are_counted_however_they_end(autojump_clock):
    lab = Lab(k_best=3, timeout_after_k_min=0.5)
    lab.behave(NEVER, "ffn.1")
    lab.behave(after(0.2, RemoteFailure("broken")), "ffn.2")
    counts: list[int] = []

    async def watch() -> None:
        while True:
            counts.append(lab.session.experts.in_flight)
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await lab.forward(ROW, prefer((0, 1, 2)))
        nursery.cancel_scope.cancel()
    assert (max(counts), lab.session.experts.in_flight) == (3, 0)
    with trio.move_on_after(0.01):
        await lab.forward(ROW, prefer((0, 1, 2)))
    assert lab.session.experts.in_flight == 0


# ---------------------------------------------------------------- how long a pass waits


async def test_a_pass_in_which_everybody_answers_waits_for_nothing(autojump_clock):
    lab = Lab(k_best=2)
    lab.behave(after(0.4), "ffn.1")
    sent, outputs = await lab.forward(ROW, prefer([0, 1]))
    assert lab.seconds == 0.4
    assert sent.answered.all() and outputs.tolist() == [[[1, 1], [2, 2]]]


async def test_after_k_min_answers_the_others_have_timeout_after_k_min_left(autojump_clock):
    lab = Lab(k_best=3, k_min=1, timeout_after_k_min=1.0)
    lab.behave(after(0.5), "ffn.1")
    lab.behave(NEVER, "ffn.2")
    sent, outputs = await lab.forward(ROW, prefer([0, 1, 2]))
    assert lab.seconds == 1.1
    assert answered(sent) == {"ffn.0", "ffn.1"} and lab.failures() == {"ffn.2": "timeout"}
    assert outputs[0, 2].tolist() == [0, 0]


async def test_that_time_begins_when_the_last_row_has_k_min_answers(autojump_clock):
    lab = Lab(k_best=2, k_min=1, timeout_after_k_min=1.0)
    lab.behave(after(2), "ffn.1")
    lab.behave(NEVER, "ffn.2", "ffn.3")
    sent, _ = await lab.forward(torch.ones(2, DIM), prefer([0, 2], [1, 3]))
    assert lab.seconds == 3.0
    assert answered(sent, 0) == {"ffn.0"} and answered(sent, 1) == {"ffn.1"}


async def test_no_pass_outlasts_its_timeout(autojump_clock):
    lab = Lab(k_best=2, k_min=1, forward_timeout=4, timeout_after_k_min=1)
    lab.behave(after(3.5), "ffn.0")
    lab.behave(NEVER, "ffn.1")
    sent, _ = await lab.forward(ROW, prefer([0, 1]))
    assert lab.seconds == 4 and answered(sent) == {"ffn.0"}


async def test_a_dht_that_is_silent_ends_the_pass_in_time_too(autojump_clock):
    lab = Lab(forward_timeout=2)
    await lab.declare()
    lab.records.latency = 100
    with pytest.raises(NoExperts, match="'ffn' could not be looked up in time"):
        await lab.forward(ROW, prefer([0]))
    assert lab.seconds == 2


async def test_a_pass_that_is_cancelled_ends_at_once_and_blames_no_expert(autojump_clock):
    lab = Lab(k_best=1)
    lab.behave(NEVER, "ffn.0")
    with trio.move_on_after(1):
        await lab.forward(ROW, prefer([0]))
    assert lab.seconds == 1 and lab.failures() == {"ffn.0": "cancelled"}
    assert "ffn.0" in lab.session.directory.known()


# ---------------------------------------------------------------- rows with too few answers


async def test_a_row_whose_expert_fails_goes_to_the_next_best_at_once(autojump_clock):
    lab = Lab(k_best=1)
    lab.behave(after(0.1, ConnectionLost("gone")), "ffn.0")
    lab.behave(after(3), "ffn.1")  # which another row waits for
    _, outputs = await lab.forward(torch.ones(2, DIM), prefer([0, 2], [1]))
    assert (0.1, "forward", "ffn.2") in lab.asked
    assert lab.seconds == 3 and outputs[:, 0, 0].tolist() == [3, 2]


async def test_a_row_that_has_k_min_answers_asks_nobody_else(autojump_clock):
    lab = Lab(k_best=2, k_min=1)
    lab.behave(after(0.2, RemoteFailure("full")), "ffn.1")
    sent, _ = await lab.forward(ROW, prefer([0, 1]))
    assert len(lab.asked) == 2 and answered(sent) == {"ffn.0"}


async def test_an_expert_asked_twice_in_a_forward_pass_gets_one_backward_request(autojump_clock):
    lab = Lab(k_best=1)
    lab.behave(after(0.1, RemoteFailure("full")), "ffn.0")
    x = torch.ones(2, DIM)
    sent, _ = await lab.forward(x, prefer([0, 1], [1, 0]))
    assert [uid for _, _, uid in lab.asked].count("ffn.1") == 2  # for one row each
    lab.asked.clear()
    grad = await lab.backward(sent, x, torch.ones(2, 1, DIM))
    assert [uid for _, _, uid in lab.asked] == ["ffn.1"] and grad.tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize("seed", range(10))
async def test_whoever_fails_each_row_ends_with_k_min_of_its_own_choice(autojump_clock, seed):
    generator = torch.Generator().manual_seed(seed)
    lab = Lab(grid=(4, 4), k_best=4, k_min=3)
    bad = [uid for uid in lab.uids if torch.rand((), generator=generator) < 0.5][:12]
    lab.behave(after(0.1, RemoteFailure("full")), *bad)
    scores = [torch.randn(20, 4, generator=generator) for _ in range(2)]
    x = torch.randn(20, DIM, generator=generator)
    sent, outputs = await lab.forward(x, *scores)
    assert (sent.answered.sum(1) >= 3).all()
    assert len({info.uid for info in sent.experts}) == len(sent.experts)
    for row, slot in sent.answered.nonzero().tolist():
        uid = sent.experts[sent.choice[row, slot]].uid
        assert uid not in bad and split_uid(uid)[1] == tuple(sent.coordinates[row, slot].tolist())
        torch.testing.assert_close(outputs[row, slot], x[row] * number(uid))
    for row in range(20):  # those who answered are the best of those who do
        total = {uid: scores[0][row, split_uid(uid)[1][0]] + scores[1][row, split_uid(uid)[1][1]] for uid in lab.uids}
        good = sorted(set(lab.uids) - set(bad), key=lambda uid: -total[uid])
        assert answered(sent, row) == set(good[: int(sent.answered[row].sum())])


async def test_rows_with_too_few_answers_are_an_error_that_names_experts_and_causes(autojump_clock):
    lab = Lab(k_best=4, k_min=3)
    lab.behave(after(0.1, ConnectionLost("connection refused")), "ffn.1")
    lab.behave(after(0.1, RemoteFailure("out of memory")), "ffn.2")
    with pytest.raises(NotEnoughExperts) as error:
        await lab.forward(torch.ones(5, DIM), prefer(*[[0, 1, 2, 3]] * 5))
    text = str(error.value)
    for part in (
        "5 of 5 rows", "k_min=3", "forward", "'ffn'", "Answered: ffn.0, ffn.3", "ffn.1: lost (connection refused)",
        "ffn.2: failed (out of memory)",
    ):  # fmt: skip
        assert part in text
    assert [event.rows for event in lab.events if isinstance(event, RowsUnanswered)] == [5]


async def test_fewer_live_experts_than_k_min_is_an_error_that_says_so(autojump_clock):
    lab = Lab(grid=(2,), k_best=3, k_min=3)
    with pytest.raises(
        NotEnoughExperts, match=r"fewer than k_min=3 live .* 'expert:ffn' was looked up .* 127.*: 2 live"
    ):
        await lab.forward(ROW, prefer([0, 1], size=2))


async def test_rows_with_too_few_answers_give_zeros_where_that_is_allowed(autojump_clock):
    lab = Lab(k_best=2, k_min=2, allow_zero_outputs=True, forward_timeout=3)
    lab.uids = ["ffn.0", "ffn.1", "ffn.2"]
    lab.behave(NEVER, "ffn.2")
    x = torch.ones(2, DIM)
    sent, outputs = await lab.forward(x, prefer([0, 1], [0, 2]))
    assert outputs.tolist() == [[[1, 1], [2, 2]], [[0, 0], [0, 0]]]
    grad = await lab.backward(sent, x, torch.ones(2, 2, DIM))
    assert grad.tolist() == [[3, 3], [0, 0]]


async def test_a_look_up_that_takes_too_long_gives_zeros_where_that_is_allowed(autojump_clock):
    lab = Lab(k_best=2, allow_zero_outputs=True, forward_timeout=3)
    await lab.declare()
    lab.records.latency = 5
    sent, outputs = await lab.forward(torch.ones(2, DIM), prefer([0, 1], [0, 2]))
    assert outputs.tolist() == [[[0, 0], [0, 0]], [[0, 0], [0, 0]]] and lab.seconds == 3
    assert [event.rows for event in lab.events if isinstance(event, RowsUnanswered)] == [2]
    grad = await lab.backward(sent, torch.ones(2, DIM), torch.ones(2, 2, DIM))
    assert grad.tolist() == [[0, 0], [0, 0]]


# ---------------------------------------------------------------- answers that are none


@pytest.mark.parametrize(
    "lie",
    [
        lambda answer: answer * math.nan,
        lambda answer: answer / 0,
        lambda answer: answer[:, :1],
        lambda answer: answer.double() * 1e300,  # finite, until it is a float32
        lambda answer: answer.long(),
    ],
    ids=["NaN", "infinity", "wrong shape", "float64 beyond float32", "integers"],
)
async def test_an_answer_that_is_not_finite_or_not_of_the_right_shape_counts_as_none(autojump_clock, lie):
    lab = Lab(k_best=2)
    for direction in ("forward", "backward"):
        lab.behave(after(0.1, lie), "ffn.1", direction=direction)
    sent, outputs = await lab.forward(ROW, prefer([0, 1]))
    assert lab.failures() == {"ffn.1": "bad_reply"}
    assert answered(sent) == {"ffn.0"} and outputs.tolist() == [[[1, 1], [0, 0]]]


async def test_large_numbers_whose_sum_is_not_finite_are_an_answer(autojump_clock):
    lab = Lab(k_best=1)
    lab.behave(after(0.1, lambda answer: torch.full_like(answer, 3e38)), "ffn.0")
    _, outputs = await lab.forward(ROW, prefer([0]))
    assert outputs.isfinite().all() and not lab.failures()


# ---------------------------------------------------------------- backward


async def test_gradients_do_not_depend_on_who_answers_first(autojump_clock):
    """A sum of floats depends on its order; one trainer's run is to be the same again, to the bit."""
    lab = Lab(k_best=3)
    sent, _ = await lab.forward(ROW, prefer([0, 1, 2]))
    values = {"ffn.0": 1e8, "ffn.1": -1e8, "ffn.2": 1.0}
    sums = set()
    for order in itertools.permutations(values):
        for place, uid in enumerate(order):
            filled = partial(torch.full_like, fill_value=values[uid])
            lab.behave(after(0.1 * (place + 1), filled), uid, direction="backward")
        sums.add((await lab.backward(sent, ROW, torch.ones(1, 3, DIM)))[0, 0].item())
    assert len(sums) == 1


async def test_an_expert_that_fails_in_the_backward_pass_gives_no_input_gradient(autojump_clock):
    lab = Lab(k_best=3)
    lab.behave(after(0.1, ConnectionLost("gone")), "ffn.1", direction="backward")
    lab.behave(after(0.1, lambda grad: grad * math.nan), "ffn.2", direction="backward")
    sent, _ = await lab.forward(ROW, prefer([0, 1, 2]))
    grad = await lab.backward(sent, ROW, torch.ones(1, 3, DIM))
    assert grad.tolist() == [[1, 1]] and lab.failures() == {"ffn.1": "lost", "ffn.2": "bad_reply"}


async def test_backward_asks_those_who_answered_and_waits_by_the_same_rules(autojump_clock):
    lab = Lab(k_best=3, k_min=1, timeout_after_k_min=1)
    lab.behave(after(0.1, RemoteFailure("full")), "ffn.2")
    lab.behave(NEVER, "ffn.1", direction="backward")
    sent, _ = await lab.forward(ROW, prefer([0, 1, 2]))
    lab.start, lab.asked = trio.current_time(), []
    grad = await lab.backward(sent, ROW, torch.ones(1, 3, DIM))
    assert {uid for _, _, uid in lab.asked} == {"ffn.0", "ffn.1"}
    assert lab.seconds == 1.1 and grad.tolist() == [[1, 1]]


async def test_a_backward_pass_with_too_few_answers_is_an_error_or_a_gradient_of_zero(autojump_clock):
    for allowed in (False, True):
        lab = Lab(k_best=1, backward_timeout=5, allow_zero_outputs=allowed)
        lab.behave(NEVER, "ffn.0", direction="backward")
        sent, _ = await lab.forward(ROW, prefer([0]))
        lab.start = trio.current_time()
        if allowed:
            assert (await lab.backward(sent, ROW, torch.ones(1, 1, DIM))).tolist() == [[0, 0]]
        else:
            with pytest.raises(NotEnoughExperts, match=r"backward pass .* within 5 s.*ffn.0: timeout"):
                await lab.backward(sent, ROW, torch.ones(1, 1, DIM))
        assert lab.seconds == 5


# ---------------------------------------------------------------- who is there at all


async def test_an_answer_of_a_server_that_is_leaving_is_used_and_the_server_is_not_called_again(autojump_clock):
    lab = Lab(k_best=2)
    lab.leaving = {"ffn.0"}
    sent, outputs = await lab.forward(ROW, prefer([0, 1]))
    assert sent.answered.all() and outputs.tolist() == [[[1, 1], [2, 2]]]
    sent, _ = await lab.forward(ROW, prefer([0, 1]))
    assert answered(sent) == {"ffn.1", "ffn.2"}
    assert not lab.failures()
    lab.leaving.clear()
    await lab.declare()  # another life
    await lab.session.directory.refresh(lab.uids)
    sent, _ = await lab.forward(ROW, prefer([0, 1]))
    assert answered(sent) == {"ffn.0", "ffn.1"}


async def test_where_nobody_else_is_left_an_expert_on_back_off_is_asked(autojump_clock):
    lab = Lab(grid=(2,), k_best=2, forward_timeout=2)
    lab.behave(NEVER, *lab.uids)
    for _ in range(2):
        with pytest.raises(NotEnoughExperts):
            await lab.forward(ROW, prefer([0, 1], size=2))
    assert not (await lab.session.directory.children(["ffn"]))["ffn"]
    lab.behaviour.clear()
    sent, _ = await lab.forward(ROW, prefer([0, 1], size=2))
    assert answered(sent) == {"ffn.0", "ffn.1"}


async def test_experts_that_were_declared_a_moment_ago_are_found(autojump_clock):
    lab = Lab(k_best=1)
    assert not (await lab.session.directory.children(["ffn"]))["ffn"]  # now their absence is cached
    await Directory(lab.records).declare(lab.uids, contact())  # by another node
    sent, _ = await lab.forward(ROW, prefer([0]))
    assert answered(sent) == {"ffn.0"} and lab.seconds == 0.1


async def test_fewer_live_experts_than_k_best_is_logged_once_and_the_dht_is_not_asked_each_time(autojump_clock, caplog):
    lab = Lab(grid=(2,), k_best=3)
    for _ in range(5):
        with caplog.at_level(logging.WARNING):
            sent, _ = await lab.forward(ROW, prefer([0, 1], size=2))
        assert answered(sent) == {"ffn.0", "ffn.1"}
    (record,) = caplog.records
    assert "k_best=3" in record.message and "only 2 live experts" in record.message and "'expert:ffn'" in record.message
    assert len(lab.records.gets) <= 2  # the search and the explanation
