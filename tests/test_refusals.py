"""Experts that are left out for another reason than that they are gone or late: the caller is told, once."""

from __future__ import annotations

import logging

import pytest
import torch
import trio

from labkit.client.expert import RemoteExpert
from labkit.client.moe import MixtureOfExperts
from labkit.client.overload import pause_before
from labkit.errors import (
    BadRequest,
    ConnectionLost,
    ExpertsRefused,
    MessageTooLarge,
    NoExperts,
    NonFiniteTensor,
    NotEnoughExperts,
    Overloaded,
    RemoteFailure,
    RPCError,
    UnknownExpert,
    UnknownMethod,
    VersionMismatch,
)
from tests.test_moe_failures import DIM, NEVER, ROW, Answer, Lab, after, answered, prefer

REFUSALS = [
    BadRequest("takes float32 [rows, 64]"), NonFiniteTensor("NaN"), RemoteFailure("KeyError: 3"),
    MessageTooLarge("one row is over the limit"), UnknownMethod("no such method"), VersionMismatch("speaks version 9"),
]  # fmt: skip


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda error: type(error).__name__)
async def test_an_expert_that_refuses_rows_is_named_with_its_reason_once(autojump_clock, caplog, refusal):
    lab = Lab(k_best=2)
    lab.behave(after(0.1, refusal), "ffn.1")
    for _ in range(2):
        sent, _ = await lab.forward(torch.ones(3, DIM), prefer(*[[0, 1]] * 3))
        assert answered(sent) == {"ffn.0"}
    (said,) = warnings(caplog)
    for part in ("expert ffn.1 at 127.0.0.1", "refused 3 rows", "grid 'ffn'", "forward pass", "went on without it"):
        assert part in said
    assert str(refusal) in said


async def test_so_is_one_whose_answer_is_of_no_use(autojump_clock, caplog):
    lab = Lab(k_best=2)
    lab.behave(after(0.1, lambda answer: answer[:, :1]), "ffn.1")
    await lab.forward(ROW, prefer([0, 1]))
    (said,) = warnings(caplog)
    assert "ffn.1" in said and "answered with shape [1, 1] instead of [1, 2]" in said


async def test_so_is_one_that_refuses_the_backward_pass_only(autojump_clock, caplog):
    lab = Lab(k_best=2)
    lab.behave(after(0.1, RemoteFailure("out of memory")), "ffn.1", direction="backward")
    sent, _ = await lab.forward(ROW, prefer([0, 1]))
    assert (await lab.backward(sent, ROW, torch.ones(1, 2, DIM))).tolist() == [[1, 1]]
    (said,) = warnings(caplog)
    assert "backward pass" in said and "did not learn from them" in said


@pytest.mark.parametrize("ordinary", [ConnectionLost("gone"), UnknownExpert("not here"), None], ids=repr)
async def test_nothing_is_said_of_those_who_are_gone_or_late(autojump_clock, caplog, ordinary):
    lab = Lab(k_best=2)
    lab.behave(NEVER if ordinary is None else after(0.1, ordinary), "ffn.1")
    await lab.forward(ROW, prefer([0, 1]))
    assert warnings(caplog) == []


async def test_a_refusal_that_all_experts_give_alike_is_told_once(autojump_clock):
    lab = Lab(k_best=4)
    for uid in lab.uids:  # each in its own words, as servers send them
        lab.behave(after(0.1, BadRequest(f"expert {uid} takes float32 [rows, 64]; got float32 [rows, 2]")), uid)
    with pytest.raises(ExpertsRefused) as error:
        await lab.forward(torch.ones(5, DIM), prefer(*[[0, 1, 2, 3]] * 5))
    text = str(error.value)
    assert text.startswith("all 4 experts of the grid 'ffn' that were asked refused: it takes float32 [rows, 64]; got")
    assert text.count("float32 [rows, 64]") == 1 and "5 of 5 rows" in text
    assert not error.value.recoverable and isinstance(error.value, NotEnoughExperts)


async def test_different_reasons_are_told_once_each(autojump_clock):
    lab = Lab(k_best=4)
    lab.behave(after(0.1, BadRequest("too wide")), "ffn.0", "ffn.1")
    lab.behave(after(0.1, RemoteFailure("no disk")), "ffn.2", "ffn.3")
    with pytest.raises(ExpertsRefused, match=r"ffn.0, ffn.1: too wide; ffn.2, ffn.3: no disk") as error:
        await lab.forward(ROW, prefer([0, 1, 2, 3]))
    assert error.value.recoverable  # what failed in an expert's own code may work with other numbers


async def test_where_one_of_them_is_only_gone_it_is_no_refusal_by_all(autojump_clock):
    lab = Lab(k_best=4)
    lab.behave(after(0.1, BadRequest("too wide")), "ffn.0", "ffn.1", "ffn.2")
    lab.behave(after(0.1, ConnectionLost("gone")), "ffn.3")
    with pytest.raises(NotEnoughExperts) as error:
        await lab.forward(ROW, prefer([0, 1, 2, 3]))
    assert not isinstance(error.value, ExpertsRefused) and error.value.recoverable


async def test_not_all_experts_of_a_large_grid_are_asked_where_they_would_say_the_same(autojump_clock):
    lab = Lab(grid=(200,), k_best=4)
    lab.behave(after(0.1, BadRequest("too wide")), *lab.uids)
    with pytest.raises(ExpertsRefused, match="too wide"):
        await lab.forward(ROW, prefer([0, 1, 2, 3], size=200))
    assert 8 <= len(lab.asked) <= 12


async def test_nobody_at_all_cannot_recover_but_servers_that_were_there_can(autojump_clock):
    lab = Lab(k_best=1)
    with pytest.raises(NoExperts) as never:
        lab.records.stores = 1  # or it would declare them
        await lab.forward(ROW, prefer([0]))
    assert not never.value.recoverable
    await lab.declare()
    await trio.sleep(2)
    for uid, info in (await lab.session.directory.find(lab.uids)).items():
        assert info is not None, uid
        lab.session.directory.report_failure(info, ConnectionLost("gone"))
    with pytest.raises(NoExperts) as lost:
        await lab.forward(ROW, prefer([0]))
    assert lost.value.recoverable


# ---------------------------------------------------------------- overloaded servers


def at_first(times: int, error: RPCError) -> Answer:
    """Fail so many times, and then answer."""
    left = times

    async def answer(honest: list[torch.Tensor]) -> list[torch.Tensor]:
        nonlocal left
        left -= 1
        return await after(0.1, error if left >= 0 else None)(honest)

    return answer


async def test_a_server_that_has_too_much_to_do_is_asked_again(autojump_clock, caplog):
    lab = Lab(k_best=2, k_min=2)
    lab.behave(at_first(3, Overloaded("full")), "ffn.1")
    sent, outputs = await lab.forward(ROW, prefer([0, 1]))
    assert answered(sent) == {"ffn.0", "ffn.1"} and outputs.tolist() == [[[1, 1], [2, 2]]]
    assert [uid for _, _, uid in lab.asked].count("ffn.1") == 4 and not warnings(caplog)


async def test_so_it_is_in_the_backward_pass(autojump_clock):
    lab = Lab(k_best=1)
    sent, _ = await lab.forward(ROW, prefer([0]))
    lab.behave(at_first(2, Overloaded("full")), "ffn.0", direction="backward")
    assert (await lab.backward(sent, ROW, torch.ones(1, 1, DIM))).tolist() == [[1, 1]]


async def test_if_it_stays_so_the_rows_go_to_others_while_there_is_time_and_the_caller_is_told(autojump_clock, caplog):
    lab = Lab(k_best=1, forward_timeout=4)
    lab.behave(after(0.1, Overloaded("full")), "ffn.0")
    sent, _ = await lab.forward(ROW, prefer([0, 1]))
    assert answered(sent) == {"ffn.1"} and lab.seconds < 2.5
    (said,) = warnings(caplog)
    assert "ffn.0" in said and "too much to do" in said


async def test_one_that_no_row_needs_is_not_asked_for_longer_than_the_pass_is_patient(autojump_clock):
    lab = Lab(k_best=2, timeout_after_k_min=0.5)
    lab.behave(after(0.01, Overloaded("full")), "ffn.1")
    sent, _ = await lab.forward(ROW, prefer([0, 1]))
    assert answered(sent) == {"ffn.0"} and lab.seconds == 0.6
    assert set(lab.failures().values()) == {"overloaded"}


def test_pauses_grow_are_bounded_and_end_at_half_the_time():
    pauses = [pause_before(tries, since=0.0, now=0.0, deadline=100.0, uid="ffn.0") for tries in range(1, 12)]
    assert all(pause is not None and 0.02 <= pause <= 1.5 for pause in pauses)
    assert pauses[0] is not None and pauses[-1] is not None and pauses[0] < 0.08 < 0.5 <= pauses[-1]
    assert pause_before(1, since=0.0, now=4.99, deadline=10.0, uid="ffn.0") is None


# ---------------------------------------------------------------- inputs that are none


@pytest.mark.parametrize(
    ("inputs", "keywords", "text"),
    [
        ((), {"scale": 2.0}, r"was given float as scale=….*tensors"),
        ((None,), {}, r"was given None as input 2.*leave it out"),
        ((), {"mask": None}, r"was given None as mask=….*leave it out"),
        (([1.0, 2.0],), {}, r"was given list as input 2"),
        ((torch.tensor(3.5),), {}, r"one number as input 2.*torch\.full\(\(rows, 1\), 3\.5\)"),
    ],
)
def test_what_is_no_tensor_with_rows_is_refused_in_words_before_anything_is_sent(inputs, keywords, text):
    for module in (MixtureOfExperts(DIM, (4,), swarm="none is open"), RemoteExpert("ffn.0", "none is open")):
        with pytest.raises((TypeError, ValueError), match=text):
            module(torch.ones(3, DIM), *inputs, **keywords)


def test_tokens_are_no_input_for_a_gate():
    with pytest.raises(TypeError, match=r"got torch\.int64.*further inputs"):
        MixtureOfExperts(DIM, (4,), swarm="none is open")(torch.ones(3, DIM, dtype=torch.int64))
