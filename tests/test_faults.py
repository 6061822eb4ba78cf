"""Injected latency and loss."""

from __future__ import annotations

import math

import pytest
import trio

from labkit.faults import Faults


def test_delays_are_exponential_with_the_mean_that_was_asked_for():
    faults = Faults(latency=0.1, seed=0)
    delays = [faults.draw()[0] for _ in range(20_000)]
    assert sum(delays) / len(delays) == pytest.approx(0.1, rel=0.03)
    assert sum(delay > 0.1 for delay in delays) / len(delays) == pytest.approx(math.exp(-1), abs=0.015)


def test_the_share_of_lost_requests_is_what_was_asked_for():
    faults = Faults(loss=0.1, seed=0)
    assert sum(faults.draw()[1] for _ in range(20_000)) / 20_000 == pytest.approx(0.1, abs=0.01)
    assert not any(Faults(loss=0.0, seed=i).draw()[1] for i in range(100))
    assert all(Faults(loss=1.0, seed=i).draw()[1] for i in range(100))


def test_the_same_seed_draws_the_same_faults_whatever_the_settings_were_before():
    steady, changing = Faults(latency=1, loss=0.5, seed=7), Faults(seed=7)
    for _ in range(10):
        steady.draw(), changing.draw()
    changing.set(latency=1, loss=0.5)
    assert [steady.draw() for _ in range(50)] == [changing.draw() for _ in range(50)]


async def test_latency_delays_by_exactly_what_was_drawn(autojump_clock):
    faults, twin = Faults(latency=3, seed=1), Faults(latency=3, seed=1)
    for _ in range(5):
        began = trio.current_time()
        await faults.apply()
        assert trio.current_time() - began == pytest.approx(twin.draw()[0])


async def test_without_faults_no_time_passes(autojump_clock):
    began = trio.current_time()
    await Faults().apply()
    assert trio.current_time() == began


async def test_a_lost_request_is_ended_by_its_deadline_alone(autojump_clock):
    with trio.move_on_after(1000) as deadline:
        await Faults(loss=1.0).apply()
    assert deadline.cancelled_caught


async def test_a_change_counts_from_the_next_request_on(autojump_clock):
    faults = Faults()
    await faults.apply()
    faults.set(loss=1.0)
    with pytest.raises(trio.TooSlowError), trio.fail_after(5):
        await faults.apply()
    faults.set(loss=0.0)
    await faults.apply()


@pytest.mark.parametrize("bad", [{"latency": -1}, {"latency": math.inf}, {"latency": math.nan}, {"loss": 1.1},
                                 {"loss": -0.1}, {"loss": math.nan}])  # fmt: skip
def test_impossible_settings_are_refused_by_name_and_change_nothing(bad):
    faults = Faults(latency=0.5, loss=0.25)
    with pytest.raises(ValueError, match=next(iter(bad))):
        faults.set(**({"latency": 2, "loss": 0.75} | bad))
    assert (faults.latency, faults.loss) == (0.5, 0.25)


def test_settings_that_are_not_named_stay():
    faults = Faults(latency=0.5, loss=0.25)
    faults.set(loss=0.5)
    assert repr(faults) == "Faults(latency=0.5, loss=0.5)"
