"""The simulated experiments: synchronous trainers in virtual time, and the convergence of a mixture of experts."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
import trio

from labkit.errors import SwarmClosed
from labkit.events import CallFinished, Event
from labkit.experiments.convergence import ConvergenceConfig, History, run
from labkit.experiments.results import load, load_all, save
from labkit.experiments.runner import plan, run_all
from labkit.server.config import ServerConfig
from labkit.simulation.lockstep import Lockstep
from labkit.simulation.network import open_simnet
from labkit.simulation.swarm import open_simulated_swarm
from labkit.simulation.virtual_clock import run_in_virtual_time
from labkit.training.datasets import ClassificationData
from labkit.training.datasets import load as load_data

SMALL = ConvergenceConfig(
    grid=(2, 2), layers=2, k_best=2, width=16, trainers=4, batch_size=16, updates=24, evaluate_every=8, loss=0.1
)
SHORT = replace(SMALL, updates=8)


@pytest.fixture(scope="module")
def digits() -> ClassificationData:
    return load_data("digits")


@pytest.fixture(scope="module")
def small(digits) -> tuple[History, list[int]]:
    """A small run, and the updates that it told its progress by."""
    told: list[int] = []
    return run(SMALL, digits, told.append), told


# ---------------------------------------------------------------- synchronous code in virtual time


async def test_synchronous_code_waits_for_calls_and_no_virtual_time_passes_while_it_computes(autojump_clock) -> None:
    lockstep, told = Lockstep(), []

    def trainer(name: str, pause: float) -> str:
        for _ in range(3):
            lockstep.call(trio.sleep, pause)
            torch.randn(200, 200) @ torch.randn(200, 200)
            told.append(name)
        return name * 2

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lockstep.run, trainer, "a", 2.0)
        nursery.start_soon(lockstep.run, trainer, "b", 3.0)
    assert told == ["a", "b", "a", "a", "b", "b"] or told == ["a", "b", "a", "b", "a", "b"]  # both are done at 6 s
    assert trio.current_time() - started == 9.0
    assert await lockstep.run(trainer, "c", 0.0) == "cc"


async def test_what_a_call_raises_is_raised_where_it_was_made_and_what_the_code_raises_by_run(autojump_clock) -> None:
    lockstep, caught = Lockstep(), []

    async def fail() -> None:
        await trio.sleep(1.0)
        raise KeyError("from trio")

    def code() -> None:
        try:
            lockstep.call(fail)
        except KeyError as error:
            caught.append(str(error))
        raise ZeroDivisionError("from the thread")

    with pytest.raises(ZeroDivisionError, match="from the thread"):
        await lockstep.run(code)
    assert caught == ["'from trio'"]


async def test_code_that_waits_when_it_is_cancelled_is_told_so_and_its_thread_ends(autojump_clock) -> None:
    lockstep, told = Lockstep(), []
    threads = threading.active_count()

    def code() -> None:
        for _ in range(3):  # it does not give up at once
            try:
                lockstep.call(trio.sleep_forever)
            except SwarmClosed:
                told.append("closed")

    with trio.move_on_after(5.0) as scope:
        await lockstep.run(code)
    assert scope.cancelled_caught
    assert told == ["closed"] * 3
    assert threading.active_count() == threads


async def test_after_the_end_calls_are_refused(autojump_clock) -> None:
    lockstep = Lockstep()
    lockstep.close()
    with pytest.raises(SwarmClosed, match="over"):
        await lockstep.run(lockstep.call, trio.sleep, 1.0)


# ---------------------------------------------------------------- convergence


def test_a_run_may_be_judged_by_samples_that_are_held_out_of_its_training(digits):
    held_out = digits.train_x[-100:], digits.train_y[-100:]
    rest = replace(digits, train_x=digits.train_x[:-100], train_y=digits.train_y[:-100], test_x=held_out[0],
                   test_y=held_out[1])  # fmt: skip
    assert run(replace(SHORT, validation=100), digits) == run(SHORT, rest)
    with pytest.raises(ValueError, match="validation=5000"):
        run(replace(SHORT, validation=5000), digits)


def test_a_mixture_of_experts_learns_through_delays_and_failures_and_a_seed_gives_the_same_history_twice(digits, small):
    first, told = small
    assert run(SMALL, digits) == first
    assert told == list(range(1, 25))
    assert [point[0] for point in first.points] == [8, 16, 24]
    losses = [point[3] for point in first.points]
    assert losses[-1] < losses[0]
    times = [point[1] for point in first.points]
    assert 0 < times[0] < times[1] < times[2]
    assert first.failures["timeout"] > 0
    assert sum(first.staleness.values()) == 24
    assert max(first.staleness) >= 3  # four trainers: each is as stale as the three others make it
    assert max(first.expert_staleness) >= 1
    assert set(first.usage) <= {f"layer{layer}.{i}.{j}" for layer in (0, 1) for i in (0, 1) for j in (0, 1)}
    assert run(replace(SMALL, seed=1), digits) != first


def test_with_one_trainer_and_no_delay_nothing_is_stale(digits):
    history = run(replace(SHORT, latency=0.0, loss=0.0, trainers=1), digits)
    assert dict(history.staleness) == {0: 8} and set(history.expert_staleness) == {0}
    assert not history.failures and history.dropped == 0
    assert history.points[-1][1] == 0.0  # virtual seconds


def test_the_dense_network_is_as_stale_as_its_trainers_delays_make_it(digits):
    history = run(replace(SMALL, model="dense", updates=64, evaluate_every=64), digits)
    assert 2 <= sum(age * count for age, count in history.staleness.items()) / 64 <= 4
    assert history.accuracy > 0.5
    assert history.points[-1][1] == pytest.approx(64 * 2 * 2 * 1.0 / 4, rel=0.4)


def test_a_history_is_on_disk_what_it_was(tmp_path):
    history = History(
        points=[(8, 10.5, 0.25, 2.0), (16, 21.0, 0.5, 1.5)],
        staleness=Counter({0: 3, 7: 5}),
        expert_staleness=Counter({2: 9}),
        usage=Counter({"layer0.1.1": 40}),
        failures=Counter(timeout=3),
        dropped=1,
    )
    other = replace(SMALL, seed=SMALL.seed + 1)
    for config in (SMALL, other):
        save(tmp_path / f"run-{config.seed}.parquet", config, history)
    assert load(tmp_path / f"run-{other.seed}.parquet") == (other, history)
    assert load_all(tmp_path) == {"run": {SMALL.seed: (SMALL, history), other.seed: (other, history)}}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".parquet"] * 2


def test_a_runner_does_what_is_not_done_yet_and_its_processes_do_the_same_as_this_one(tmp_path, monkeypatch, small):
    monkeypatch.setenv("PYTHONHASHSEED", "12")  # of its processes, and here it is another
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here
    dense = replace(SMALL, model="dense")
    history = History(points=[(24, 10.0, 0.5, 1.0)])
    save(tmp_path / "done.parquet", dense, history)
    save(tmp_path / "other.parquet", dense, history)  # of another config than it is to be
    run_all({"done": dense, "other": SMALL}, tmp_path, dataset="digits")
    assert load(tmp_path / "done.parquet") == (dense, history)
    assert load(tmp_path / "other.parquet") == (SMALL, small[0])


def test_the_plans_hold_what_is_compared():
    assert {name.rsplit("-", 1)[0] for name in plan("quick")} == {
        "quick-failing", "quick-fresh", "quick-dense", "quick-delayed-100ms",
    }  # fmt: skip
    authors = plan("authors", [1])
    assert authors["authors-delayed-1"].updates == 20 * 1024 and authors["authors-delayed-1"].grid == (8, 8)
    assert plan("paper", [1])["paper-delayed-1"].width == 512
    with pytest.raises(ValueError, match="size='huge'"):
        plan("huge")


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"latency": -1.0}, "latency=-1"),
        ({"loss": 1.0}, "loss=1"),
        ({"grid": (0, 2)}, "grid="),
        ({"k_best": 5}, "k_best=5"),
        ({"trainers": 0}, "trainers=0"),
        ({"model": "huge"}, "model='huge'"),
        ({"schedule": "cosine"}, "schedule='cosine'"),
        ({"age_power": -1.0}, "age_power=-1"),
        ({"beta1": 1.0}, "beta1=1"),
    ],
)
def test_what_cannot_be_run_is_refused_by_the_name_of_the_argument(options, argument):
    with pytest.raises(ValueError, match=argument):
        replace(SMALL, **options)


def test_requests_queue_and_are_merged_while_a_simulated_server_computes():
    answered: list[tuple[float, CallFinished]] = []

    async def main() -> None:
        def note(event: Event) -> None:
            if isinstance(event, CallFinished):
                answered.append((trio.current_time(), event))

        server = ServerConfig(("nop.0",), kind="nop", options={"hidden": 4})
        async with (
            open_simnet(latency=0.1) as network,
            open_simulated_swarm(network, [server], duration=lambda uid, direction, rows: 1.0, emit=note) as swarm,
        ):
            expert = (await swarm.node.directory.find(["nop.0"]))["nop.0"]
            assert expert is not None
            begun, last = trio.current_time(), trio.Event()
            answers: list[object] = []

            def hear(answer: object) -> None:
                answers.append(answer)
                if len(answers) == 5:
                    last.set()

            for _ in range(5):
                swarm.session.experts.forward(expert, [torch.ones(2, 4)], [(4,)], hear, timeout=10.0)
            await last.wait()
            answered[:] = [(time - begun, event) for time, event in answered]

    run_in_virtual_time(main)
    took = [round(time, 3) for time, _ in answered]
    assert took == [1.2, 2.2, 2.2, 2.2, 2.2], "one alone, and then all that came meanwhile"
    assert [round(event.queue, 3) for _, event in answered] == [0, 1, 1, 1, 1]
