"""How long a pass waits for experts that no row needs any more: as long as their latencies justify, in virtual time."""

from __future__ import annotations

import math
import random

import pytest
import torch
import trio
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from labkit.client.dispatch import DispatchConfig
from labkit.client.moe import MixtureOfExperts
from labkit.client.patience import TRUSTED_AFTER, AdaptivePatience, Latencies, Open, Pace, load_of, percentile
from labkit.events import CallFailed, CallFinished, Event, PassFinished
from labkit.expert_uid import grid_uids, spread
from labkit.server.config import ServerConfig
from labkit.simulation.network import open_simnet
from labkit.simulation.swarm import open_simulated_swarm
from labkit.simulation.virtual_clock import run_in_virtual_time
from tests.fake_records import contact
from tests.test_moe_failures import NEVER, ROW, Lab, after, answered, prefer

# ---------------------------------------------------------------- whole swarms


def passes(timeout_after_k_min: float | None, latency: float, loss: float) -> tuple[float, float]:
    """The virtual seconds of a pass in a swarm with such faults, and the share of calls whose answers were used."""
    events: list[Event] = []
    servers = [ServerConfig(uids, (4, 4), kind="nop", threads=1) for uids in spread(list(grid_uids("ffn", (4, 4))), 4)]
    config = DispatchConfig(k_best=4, timeout_after_k_min=timeout_after_k_min)
    torch.manual_seed(0)
    layer = MixtureOfExperts(8, (4, 4), swarm="simulated", dispatch=config)

    async def main() -> None:
        async with (
            open_simnet(seed=1, latency=0.001) as network,
            open_simulated_swarm(network, servers, seed=1, emit=events.append) as swarm,
        ):
            swarm.set_faults(latency, loss)

            def use() -> None:
                for _ in range(40):
                    layer(torch.randn(64, 8)).sum().backward()

            await swarm.lockstep.run(use)

    run_in_virtual_time(main)
    took = [event.seconds for event in events if isinstance(event, PassFinished)]
    answers = sum(isinstance(event, CallFinished) for event in events)
    lost = sum(isinstance(event, CallFailed) for event in events)
    assert len(took) == 80
    return sum(took) / len(took), answers / (answers + lost)


def test_a_lost_call_costs_a_pass_what_the_latencies_justify_and_not_a_second():
    fixed, used_by_fixed = passes(1.0, latency=0.1, loss=0.05)
    adaptive, used = passes(None, latency=0.1, loss=0.05)
    print(f"a pass takes {fixed:.3f} s with a second of patience, and {adaptive:.3f} s with what is justified")
    print(f"answers used: {used_by_fixed:.3f} and {used:.3f}")
    assert adaptive < 0.65 * fixed
    assert used > used_by_fixed - 0.03


def test_where_nothing_is_lost_hardly_an_answer_is_given_up():
    _, used = passes(None, latency=0.1, loss=0.0)
    assert used > 0.97


# ---------------------------------------------------------------- one server that is unlike the others


class Draws:
    """An expert whose answers take as long as is drawn."""

    def __init__(self, draw: object) -> None:
        self.draw = draw

    async def __call__(self, honest: list[Tensor]) -> list[Tensor]:
        seconds = self.draw()  # type: ignore[operator]
        return await after(seconds)(honest)


async def share_answered(lab: Lab, uid: str, n: int, skip: int = 0) -> float:
    """The share of the last passes, but for the first `skip`, in which the expert answered."""
    got = 0
    for number in range(n):
        if number % 10 == 0:
            await lab.declare()  # as servers do, lest they expire
        sent, _ = await lab.forward(ROW, prefer([0, 1]))
        got += number >= skip and uid in answered(sent)
    return got / (n - skip)


async def test_a_server_that_is_always_slower_than_the_others_is_waited_for(autojump_clock):
    lab = Lab(k_best=2)
    lab.behave(after(0.6), "ffn.1")
    assert await share_answered(lab, "ffn.1", 60) == 1


async def test_one_that_becomes_slower_is_given_up_a_few_times_and_then_waited_for(autojump_clock):
    lab = Lab(k_best=2, k_min=1)
    await share_answered(lab, "ffn.1", 60)
    lab.behave(after(0.9), "ffn.1")
    lab.session.directory.report_failure = lambda *args, **kwargs: ()  # type: ignore[method-assign]  # no back-off
    assert await share_answered(lab, "ffn.1", 100, skip=20) == 1


async def test_slow_answers_do_not_vanish_from_the_record_because_they_were_given_up(autojump_clock):
    """Were only answers counted, one in five would be given up for ever."""
    draw = random.Random(0)
    lab = Lab(k_best=2)
    lab.session.directory.report_failure = lambda *args, **kwargs: ()  # type: ignore[method-assign]
    await share_answered(lab, "ffn.1", 64)  # all of them quick
    lab.behave(Draws(lambda: 0.8 if draw.random() < 0.2 else 0.1), "ffn.1")
    assert await share_answered(lab, "ffn.1", 400, skip=200) > 0.97


async def test_when_the_network_is_quick_again_so_is_a_pass_that_loses_a_call(autojump_clock):
    lab = Lab(k_best=2)
    lab.behave(after(0.9), "ffn.1")
    await share_answered(lab, "ffn.1", 80)
    lab.behave(NEVER, "ffn.1")
    lab.session.directory.report_failure = lambda *args, **kwargs: ()  # type: ignore[method-assign]  # no back-off
    await lab.forward(ROW, prefer([0, 1]))
    lab.behave(after(0.1), "ffn.1")
    await share_answered(lab, "ffn.1", 80)
    lab.behave(NEVER, "ffn.1")
    lab.start = trio.current_time()
    await lab.forward(ROW, prefer([0, 1]))
    assert lab.seconds < 0.4


async def test_a_server_that_has_lost_nothing_is_waited_for_though_the_machine_stands_still_for_once(autojump_clock):
    """Else a run without any failures would come out differently on a busy machine."""
    lab = Lab(k_best=2)
    await share_answered(lab, "ffn.1", 60)
    lab.behave(after(0.9), "ffn.1")
    sent, _ = await lab.forward(ROW, prefer([0, 1]))
    assert answered(sent) == {"ffn.0", "ffn.1"}


async def test_one_that_was_late_once_is_trusted_again_after_many_answers(autojump_clock):
    lab = Lab(k_best=2)
    lab.session.directory.report_failure = lambda *args, **kwargs: ()  # type: ignore[method-assign]
    await share_answered(lab, "ffn.1", 20)
    for answers, waited_for in ((TRUSTED_AFTER - 1, False), (TRUSTED_AFTER, True)):
        lab.behave(NEVER, "ffn.1")
        await lab.forward(ROW, prefer([0, 1]))
        lab.behave(after(0.1), "ffn.1")
        assert await share_answered(lab, "ffn.1", answers) == 1
        lab.behave(after(0.9), "ffn.1")
        sent, _ = await lab.forward(ROW, prefer([0, 1]))
        assert ("ffn.1" in answered(sent)) is waited_for


async def test_a_server_that_has_hardly_answered_yet_has_a_second(autojump_clock):
    lab = Lab(k_best=2)
    lab.behave(NEVER, "ffn.1")
    await lab.forward(ROW, prefer([0, 1]))
    assert lab.seconds == 1.1


async def test_so_it_has_for_more_rows_than_it_is_known_with(autojump_clock):
    """What a few rows take says nothing about a thousand."""
    lab = Lab(k_best=2)
    await share_answered(lab, "ffn.1", 60)
    lab.behave(after(0.9), "ffn.1")
    sent, _ = await lab.forward(torch.ones(1000, 2), prefer(*[[0, 1]] * 1000))
    assert sent.answered.all()


async def test_the_backward_pass_has_patience_of_its_own(autojump_clock):
    lab = Lab(k_best=2)
    lab.behave(after(0.7), "ffn.1", direction="backward")
    for _ in range(30):
        sent, _ = await lab.forward(ROW, prefer([0, 1]))
        grad = await lab.backward(sent, ROW, torch.ones(1, 2, 2))
        assert grad.tolist() == [[3, 3]]


# ---------------------------------------------------------------- what is said of it


async def test_a_pass_says_at_its_end_what_it_waited_for(autojump_clock):
    lab = Lab(k_best=3, timeout_after_k_min=0.5)
    lab.behave(NEVER, "ffn.2")
    lab.behave(after(0.3), "ffn.1")
    sent, _ = await lab.forward(torch.ones(2, 2), prefer([0, 1, 2], [0, 1, 2]))
    await lab.backward(sent, torch.ones(2, 2), torch.ones(2, 3, 2))
    forward, backward = [event for event in lab.events if isinstance(event, PassFinished)]
    assert (forward.prefix, forward.direction, forward.rows) == ("ffn", "forward", 2)
    assert forward.seconds == pytest.approx(0.6) and forward.waited == pytest.approx(0.5)
    assert forward.patience == pytest.approx(0.5) and forward.late == ("ffn.2",)
    assert (backward.direction, backward.late, round(backward.waited, 6)) == ("backward", (), 0)


# ---------------------------------------------------------------- the estimate


def test_the_percentile_is_that_of_the_answers_where_nothing_was_given_up():
    assert percentile([(float(n), True) for n in range(1, 101)], 0.95) == 95


def test_calls_that_are_never_answered_do_not_lengthen_it():
    answers = [(0.1 * n, True) for n in range(1, 21)]
    assert percentile(answers + [(5.0, False)] * 10, 0.95) == percentile(answers, 0.95)


def test_calls_that_were_given_up_early_count_as_at_least_as_long():
    given_up = [(0.1, True)] * 70 + [(0.2, False)] * 29 + [(1.0, True)]
    assert percentile(given_up, 0.95) == 1.0  # the one that was waited for stands for the thirty


@given(
    calls=st.lists(st.tuples(st.floats(0, 100), st.booleans()), min_size=1, max_size=80), share=st.floats(0.01, 0.99)
)
def test_it_is_always_one_of_the_answers(calls, share):
    calls.append((1.0, True))
    assert percentile(calls, share) in [seconds for seconds, answered in calls if answered]


@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=200), st.floats(0, 5))
def test_patience_is_never_below_what_a_reader_needs_nor_above_a_second_or_what_the_pass_took(calls, took):
    latencies, load = Latencies(), load_of(contact(1), "forward", 7)
    for seconds, was_answered in calls:
        latencies.note(load, seconds, was_answered)
    pace = Pace(10.0, 10.0 + took, 10.0 + took, took)
    until = AdaptivePatience(latencies).until(pace, [Open(load, 10.0)])
    assert until - pace.enough + 1e-9 >= 0.05 and until - pace.enough <= max(1.0, took) + 1e-9
    assert math.isfinite(until)
