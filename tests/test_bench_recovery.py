"""`labkit bench recovery`: what it prints, and that it measures what it says."""

from __future__ import annotations

import json

import pytest

from labkit.__main__ import main
from labkit.bench.recovery import RecoveryConfig
from labkit.bench.recovery_run import count_in_virtual_time


def test_a_tiny_swarm_whose_servers_leave_keeps_most_of_its_updates(capsys):
    tiny = ["--servers", "3", "--experts", "6", "--minutes", "0.5", "--life", "0.5", "--trainers", "2", "--hidden", "2"]
    assert main(["bench", "recovery", *tiny, "--step-s", "0.5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["servers_left"] > 0
    assert result["experts_taken_over"] > 0
    assert 0.3 < result["effective_ratio"] <= 1.05
    assert result["kept"] <= result["kept_without_failures"] * 1.05
    assert result["seconds_without"]["p50"] <= result["seconds_without"]["p95"] <= result["seconds_without"]["max"]
    assert 0 < result["seconds_without"]["p50"] < 10
    assert result["copies_to_training_bytes"] > 0


def test_without_failures_all_that_was_made_is_kept_and_no_expert_is_ever_missing():
    tiny = RecoveryConfig(servers=2, experts=40, minutes=0.2, trainers=2, k_best=2, hidden=2, step_s=0.5)
    counts = count_in_virtual_time(tiny, failing=False)
    assert counts.kept == counts.made > 0
    assert (counts.gaps, counts.failed_calls, counts.lost) == ([], 0, 0)


def test_the_training_ends_when_the_real_minutes_are_over():
    tiny = RecoveryConfig(servers=2, experts=4, trainers=1, k_best=1, hidden=2, minutes=600, at_most=1e-3)
    counts = count_in_virtual_time(tiny, failing=True)
    assert 0 < counts.minutes < 600


@pytest.mark.parametrize("wrong", [{"at_most": -1.0}, {"servers": 1}, {"experts": 3}, {"life": 0.0}, {"backups": 0}])
def test_what_is_not_possible_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RecoveryConfig(**wrong)


def test_the_full_one_has_a_hundred_servers_and_a_thousand_experts_for_two_hours():
    full = RecoveryConfig(full=True)
    assert (full.servers, full.experts, full.trainers, full.minutes, full.life) == (100, 1000, 64, 120.0, 10.0)
    short = RecoveryConfig(full=True, minutes=20, experts=500)
    assert (short.servers, short.experts, short.trainers, short.minutes) == (100, 500, 64, 20)
