"""`labkit bench latency`: that what it counts is what trainers did, and what it says where nothing can be counted."""

from __future__ import annotations

import json
import threading
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from statistics import median
from typing import Any

import pytest
import torch

from labkit.__main__ import main
from labkit.bench import latency
from labkit.errors import DeadlineExceeded, LabkitError
from labkit.server.runtime import Runtime
from labkit.swarm import Swarm

pytestmark = pytest.mark.usefixtures("forked_python")

samples_per_s: Any = latency.samples_per_s  # which takes a `FakeSwarm` as well
ROWS_PER_SAMPLE = 4  # two blocks, forward and backward


class FakeSwarm:
    """One server, whose rows a round of the test's counts, and by whose clock five seconds pass from look to look."""

    def __init__(self) -> None:
        self.servers = [object()]
        self.rows = 0
        self.looks: list[int] = []
        self.closed = False
        self.measured = threading.Event()  # the window is over

    def statistics(self, timeout: float) -> dict[str, object]:
        self.looks.append(self.rows)
        said = Runtime({}).statistics()
        said.rows, said.uptime = self.looks[-1], 5.0 * len(self.looks)
        if len(self.looks) == 3:
            self.measured.set()
        return {"tcp://one": said}

    def close(self) -> None:
        self.closed = True
        self.measured.set()

    def one_round(self) -> int:
        self.rows += 2 * ROWS_PER_SAMPLE
        return 2


def test_samples_are_counted_by_the_rows_of_a_window_and_the_servers_own_clock():
    swarm = FakeSwarm()
    rate = samples_per_s(swarm, [swarm.one_round], ROWS_PER_SAMPLE, seconds=0.05)
    before, begin, end, after = swarm.looks
    assert before == 0 < begin < end <= after
    assert rate == (end - begin) / ROWS_PER_SAMPLE / 5.0


def test_a_window_begins_when_each_has_done_a_round():
    swarm, rounds, late = FakeSwarm(), [0], threading.Event()

    def quick() -> int:
        rounds[0] += 1
        if rounds[0] == 100:
            late.set()
        with lock:
            return swarm.one_round()

    def slow() -> int:
        late.wait()
        with lock:
            return swarm.one_round()

    lock = threading.Lock()
    samples_per_s(swarm, [quick, slow], ROWS_PER_SAMPLE, seconds=0.01)
    assert swarm.looks[1] > 100 * 2 * ROWS_PER_SAMPLE


def test_a_window_in_which_nothing_was_computed_is_refused_by_the_name_of_the_option():
    swarm = FakeSwarm()

    def one_round() -> int:
        if swarm.rows:
            swarm.measured.wait()
        return swarm.one_round()

    with pytest.raises(ValueError, match=r"seconds=0\.01: no batch was computed"):
        samples_per_s(swarm, [one_round], ROWS_PER_SAMPLE, seconds=0.01)


def test_a_first_round_that_does_not_end_is_told(monkeypatch):
    monkeypatch.setattr(latency, "WARM_UP_TIMEOUT", 0.05)
    swarm = FakeSwarm()

    def one_round() -> int:
        swarm.measured.wait()  # until the swarm is closed
        return swarm.one_round()

    with pytest.raises(LabkitError, match=r"0 of 1 had done a first round after 0\.05 s"):
        samples_per_s(swarm, [one_round], ROWS_PER_SAMPLE, seconds=0.01)
    assert swarm.closed


def test_a_call_that_fails_ends_the_measurement():
    swarm = FakeSwarm()

    def one_round() -> int:
        if swarm.rows:
            raise DeadlineExceeded("no answer")
        return swarm.one_round()

    with pytest.raises(DeadlineExceeded, match="no answer"):
        samples_per_s(swarm, [one_round], ROWS_PER_SAMPLE, seconds=60.0)
    assert swarm.closed


def test_servers_that_say_nothing_are_told():
    swarm = FakeSwarm()
    swarm.servers.append(object())
    with pytest.raises(LabkitError, match="1 of 2 servers said"):
        samples_per_s(swarm, [swarm.one_round], ROWS_PER_SAMPLE, seconds=0.01)


def test_servers_compute_the_rows_of_the_trainers_samples_and_no_others():
    with Swarm("bench") as swarm:
        swarm.serve("ffn", grid=(2,), servers=2, name="block", hidden=8, isolation="task")
        stack = torch.nn.Sequential(swarm.expert("block.0"), swarm.expert("block.1"))
        counted = [0] * 4

        def trainer(place: int) -> int:
            stack(torch.randn(3, 8, requires_grad=True)).sum().backward()
            counted[place] += 3
            return 3

        def uncounted() -> int:
            trainer(0)
            return 2

        rate = samples_per_s(swarm, [lambda n=n: trainer(n) for n in range(4)], ROWS_PER_SAMPLE, 0.3, spread=0.1)
        rows = sum(statistics.rows for statistics in swarm.statistics().values())
        assert rows == ROWS_PER_SAMPLE * sum(counted) and rate > 0
        with pytest.raises(LabkitError, match=r"the servers computed \d+ rows, and \d+ belong to"):
            samples_per_s(swarm, [uncounted], ROWS_PER_SAMPLE, 0.1)


@cache
def measured() -> dict[str, Any]:
    """What is measured in two runs, of eight trainers and of a pipeline, over the same two blocks of one server."""
    options = "--block transformer --blocks 2 --servers 1 --hidden 8 --trainers 8 --seconds 0.3 --runs 2 --json"
    with redirect_stdout(StringIO()) as said:
        assert main(["bench", "latency", *options.split(), "--delays-ms", "0", "30"]) == 0
    result: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
    return result


def test_figures_are_medians_over_runs(capsys):
    result = measured()
    for who in ("samples_per_s", "pipeline_samples_per_s"):
        assert [len(rates) for rates in result[f"{who}_runs"]] == [2, 2]
        assert result[who] == pytest.approx([median(rates) for rates in result[f"{who}_runs"]], abs=0.11)
    assert main(["bench", "latency", "--runs", "0"]) == 1
    assert "--runs 0: at least 1" in capsys.readouterr().err


def test_trainers_are_measured_beside_a_pipeline_over_the_same_slow_servers():
    result = measured()
    trainers, pipeline = result["samples_per_s"], result["pipeline_samples_per_s"]
    assert len(trainers) == len(pipeline) == 2
    assert pipeline[1] < 2 * result["batch"] / 0.045, "two are under way at a time, for four delays of 0.03 s each"
    assert result["pipeline_slowest_to_fastest"] == pytest.approx(pipeline[1] / pipeline[0], abs=0.01)
    assert trainers[1] > pipeline[1], "eight are under way, and not two"
