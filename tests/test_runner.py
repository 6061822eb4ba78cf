"""Runs of the convergence experiment: what is refused, what a file keeps, and what becomes of a child that fails."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import trio

import labkit
from labkit.errors import SwarmClosed
from labkit.experiments import virtual_training
from labkit.experiments.convergence import ConvergenceConfig, History, run
from labkit.experiments.results import load, save
from labkit.experiments.runner import is_done, run_all, run_one
from labkit.server.optimizer import BackendConfig
from labkit.simulation.lockstep import Lockstep
from labkit.training.datasets import ClassificationData
from labkit.training.datasets import load as load_data

DENSE = ConvergenceConfig(model="dense", layers=1, width=8, trainers=2, updates=10, evaluate_every=4)
SMALL = ConvergenceConfig(grid=(2, 2), layers=1, k_best=2, width=8, trainers=2, updates=2, evaluate_every=2)
MEASURED = Path(__file__).parent.parent / "notebooks" / "convergence"


@pytest.fixture(scope="module")
def digits() -> ClassificationData:
    return load_data("digits")


# ---------------------------------------------------------------- children


def child_that(folder: Path, monkeypatch: pytest.MonkeyPatch, *, does: str) -> None:
    """What the runner starts instead of Python."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.parametrize(
    ("does", "problem"),
    [
        ("echo 32; echo a warning; exec sleep 60", "printed 'a warning'"),
        (r"printf '\377\n'; exec sleep 60", "decode"),
        ("exit 3", "exit code 3"),
    ],
)
def test_a_child_that_fails_or_says_something_strange_fails_its_run_by_name(tmp_path, monkeypatch, does, problem):
    child_that(tmp_path, monkeypatch, does=does)
    with pytest.raises(RuntimeError, match=f"the run some-run failed: .*{problem}"):
        run_all({"some-run": DENSE}, tmp_path, processes=1)


def test_a_child_that_cannot_be_started_fails_its_run_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match=r"the run some-run failed: .*nothing"):
        run_all({"some-run": DENSE}, tmp_path, processes=1)


# ---------------------------------------------------------------- files


def test_a_file_keeps_how_long_its_run_took_and_with_what(tmp_path, monkeypatch):
    monkeypatch.setattr("labkit.experiments.runner.watch_parent", lambda: None)
    path = tmp_path / "one.parquet"
    run_one(json.dumps(asdict(DENSE)), str(path), "digits", "")
    assert is_done(path, DENSE)
    wall_s = load(path)[1].wall_s
    made = json.loads(pq.read_schema(path).metadata[b"made"])
    assert wall_s is not None and 0 < wall_s == made["wall_s"]
    assert made["labkit"] == labkit.__version__ and made["torch"] and made["cpus"] >= 1


def test_a_file_without_them_is_as_good(tmp_path):
    path, history = tmp_path / "old.parquet", History(points=[(10, 1.0, 0.5, 1.0)], wall_s=3.0)
    save(path, SMALL, history)
    table = pq.read_table(path)
    fields = asdict(SMALL)
    del fields["device"]
    pq.write_table(table.replace_schema_metadata({"config": json.dumps(fields)}), path)
    assert is_done(path, SMALL)
    assert load(path) == (SMALL, history)
    assert load(path)[1].wall_s is None


def test_every_run_that_was_measured_is_still_done():
    paths = sorted(MEASURED.glob("*.parquet"))
    assert len(paths) > 30
    for path in paths:
        config, history = load(path)
        assert is_done(path, config) and config.device == "cpu"
        assert history.points[-1][0] == config.updates


# ---------------------------------------------------------------- runs


def test_the_last_updates_are_evaluated_too(digits):
    history = run(DENSE, digits)
    assert [point[0] for point in history.points] == [4, 8, 10]
    assert run(replace(DENSE, updates=8), digits).points[0][0] == 4


def test_a_run_that_gets_nowhere_ends_and_says_why(digits, monkeypatch):
    monkeypatch.setattr(virtual_training, "MAX_FAILED_BATCHES", 3)
    with pytest.raises(ValueError, match=r"loss=0\.9: 3 batches in a row got too few answers, after 0 updates of 2"):
        run(replace(SMALL, layers=3, loss=0.9, batch_size=16), digits)


def test_experts_compute_where_the_trunk_does(digits):
    assert replace(SMALL, device="cuda").backend().device == "cuda"
    assert run(replace(SMALL, device="cpu:0"), digits) == run(SMALL, digits)


def test_a_device_that_is_not_there_is_refused_before_the_run(digits):
    with pytest.raises(ValueError, match="device='cuda:63'"):
        run(replace(SMALL, device="cuda:63"), digits)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"updates": 2, "evaluate_every": 3}, "evaluate_every=3"),
        ({"loss": 0.9999}, "loss=0.9999"),
        ({"loss": float("nan")}, "loss=nan"),
        ({"latency": "1"}, "latency='1'"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"accumulate": 1.5}, "accumulate=1.5"),
        ({"trainers": 1.5}, "trainers=1.5"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"validation": -1}, "validation=-1"),
        ({"seed": "a"}, "seed='a'"),
        ({"device": "warp"}, "device='warp'"),
        ({"device": 0}, "device=0"),
        ({"warmup": 10_000, "updates": 10_001, "schedule": "linear", "batch_size": 1}, "warmup=10000: .*updates=10001"),
    ],
)
def test_what_cannot_be_run_is_refused_by_the_name_of_the_argument(options, argument):
    with pytest.raises(ValueError, match=argument):
        replace(SMALL, **options)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"accumulate": 0}, "accumulate=0"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"schedule": "linear", "warmup_steps": 5, "total_steps": 5}, "total_steps=5: .*warmup_steps=5"),
    ],
)
def test_a_backend_config_is_refused_by_the_name_of_the_argument_too(options, argument):
    with pytest.raises(ValueError, match=argument):
        BackendConfig(**options)


# ---------------------------------------------------------------- lockstep


async def test_a_thread_ends_when_the_call_that_it_waits_in_is_cancelled_within_a_nursery(autojump_clock) -> None:
    lockstep, told = Lockstep(), []

    async def wait_in_a_nursery() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

    def code() -> None:
        told.append(threading.current_thread())
        with pytest.raises(SwarmClosed):
            lockstep.call(wait_in_a_nursery)

    with trio.move_on_after(5.0) as scope:
        await lockstep.run(code)
    assert scope.cancelled_caught
    [thread] = told
    assert thread.name.startswith("labkit-")  # so that tests see one that is left
    thread.join(2.0)
    assert not thread.is_alive()
