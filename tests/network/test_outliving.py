"""Experts outlive their servers in a notebook that trains: with real sockets, and processes that are really killed.

`tests/test_take_over.py` has the same in virtual time, and `labkit bench kills` measures it at length.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import labkit as lk
from labkit.__main__ import main
from labkit.events import CallFailed, CallFinished, Event, ExpertHandedOver, ExpertTakenOver
from labkit.expert_uid import ExpertInfo
from labkit.server.checkpoints import load_expert
from labkit.swarm import Swarm
from labkit.training.run import Run
from tests.swarms import eventually

SGD = lk.BackendConfig(optimizer="sgd", lr=0.1)
X = torch.linspace(-1, 1, 12).reshape(3, 4)


def declared(swarm: Swarm, dims: int = 2) -> dict[str, ExpertInfo]:
    """Where the experts are, as the DHT says now."""
    return swarm._portal.call(swarm._node.directory.holders_below, "ffn", dims)


def all_copied(swarm: Swarm, copies: int = 1) -> bool:
    """Whether every expert has so many copies elsewhere; those at servers that have just been killed do not count."""
    dead = {server.contact.key[:8] for server in swarm.servers if server.contact is not None and not server.alive}
    return all(len(set(info.copies) - dead) >= copies for info in declared(swarm).values())


def taken(events: list[Event]) -> list[ExpertTakenOver]:
    return [event for event in events if isinstance(event, ExpertTakenOver)]


def lost_calls(events: list[Event]) -> list[CallFailed]:
    """Calls that failed, but for those that a busy machine has turned away, for which nothing was computed."""
    turned_away = ("cancelled", "overloaded")
    return [event for event in events if isinstance(event, CallFailed) and event.cause not in turned_away]


def train(swarm: Swarm, **options: Any) -> Run:
    """Train a model on the digits in the background, until it is stopped."""
    data = lk.load("digits")
    model = nn.Sequential(nn.Linear(data.dim, 16), swarm.moe(16, k_best=4), nn.Linear(16, data.classes))
    return lk.fit(model, data, **{"steps": 10_000_000, "batch_size": 32, "trainers": 2} | options)


@pytest.mark.timeout(150)
def test_half_of_the_servers_are_killed_again_and_again_while_training_and_the_last_one_has_all_experts():
    events: list[Event] = []
    with Swarm("killed") as swarm:
        swarm.on_event(events.append)
        swarm.serve("ffn", hidden=16, grid=(4, 4), servers=4, threads=1, backups=2, backend=SGD)
        run = train(swarm)
        left = list(swarm.servers)
        while len(left) > 1:
            half = len(left) // 2
            eventually(lambda copies=half: all_copied(swarm, copies))  # type: ignore[misc]
            events.clear()
            killed, left = left[:half], left[half:]
            uids = [uid for server in killed for uid in server.uids]
            for server in killed:
                server.kill(wait=False)  # SIGKILL
            eventually(lambda uids=uids: {event.uid for event in taken(events)} == set(uids))  # type: ignore[misc]
            assert max(event.seconds for event in taken(events)) < 5
        assert len(left[0].uids) == 16
        steps = run.steps
        eventually(lambda: run.steps > steps + 10)
        run.stop()
        assert run.error is None and run.failed_batches == 0
        assert swarm.telemetry.unanswered_rows == 0


def test_seven_of_eight_servers_stop_one_after_another_while_training_and_no_update_and_no_call_is_lost():
    events: list[Event] = []
    with Swarm("stopped") as swarm:
        swarm.on_event(events.append)
        swarm.serve("ffn", hidden=16, grid=(4, 4), servers=8, isolation="task", backend=SGD)
        run = train(swarm, trainers=1)  # so that each call is an update
        for server in swarm.servers[:-1]:
            steps = run.steps
            server.stop()
            eventually(lambda steps=steps: run.steps > steps + 5)  # type: ignore[misc]
        run.stop()
        assert run.error is None
        assert taken(events) == [] == lost_calls(events)
        assert len([event for event in events if isinstance(event, ExpertHandedOver)]) >= 14
        made = Counter(e.uid for e in events if isinstance(e, CallFinished) and e.direction == "backward")
        assert swarm.servers[-1].statistics().experts == {uid: made[uid] for uid in declared(swarm)}


def test_a_swarm_that_closes_hands_its_experts_over_to_the_swarm_that_it_has_joined():
    with Swarm("host") as host:
        (server,) = host.serve("ffn", hidden=4, grid=(1, 2), experts=1, isolation="task", backend=SGD)
        with Swarm.join(host.invite(), name="guest") as guest:
            ((uid,),) = [one.uids for one in guest.serve("ffn", isolation="task", backend=SGD)]
            guest.expert(uid)(X).sum().backward()
            eventually(lambda: all_copied(host))
        assert uid in server.uids and server.statistics().experts[uid] == 1


@pytest.mark.timeout(100)
def test_a_spare_server_from_a_terminal_takes_over_and_ctrl_c_hands_over():
    events: list[Event] = []
    with Swarm("notebook") as swarm:
        swarm.on_event(events.append)
        (server,) = swarm.serve("ffn", hidden=16, grid=(2, 2), isolation="task", backend=SGD)
        spare = subprocess.Popen(
            [sys.executable, "-m", "labkit", "serve", "--join", swarm.invite(), "--spare"], stdout=subprocess.DEVNULL
        )
        try:
            eventually(lambda: len(server.uids) == 2 and all_copied(swarm))  # it was given the others
            server.kill()
            eventually(lambda: server.contact not in {info.contact for info in declared(swarm).values()})
            server.restart()
            eventually(lambda: len(server.uids) == 2)  # and gives some back
            events.clear()
            run = train(swarm)
            eventually(lambda: run.steps > 5)
            spare.send_signal(signal.SIGINT)
            assert spare.wait(30) == 0
            assert len(server.uids) == 4
            steps = run.steps
            eventually(lambda: run.steps > steps + 5)
            run.stop()
        finally:
            spare.kill()
            spare.wait()
        assert taken(events) == [] == lost_calls(events)


def test_a_server_that_finds_a_newer_copy_than_its_checkpoint_takes_the_copy(tmp_path):
    with Swarm("folder") as swarm:
        how: dict[str, Any] = {
            "isolation": "task",
            "backend": SGD,
            "checkpoint_dir": tmp_path,
            "checkpoint_period": 0.1,
        }
        (first,) = swarm.serve("ffn", hidden=4, grid=(1, 2), experts=1, **how)
        (uid,) = first.uids
        expert = swarm.expert(uid)
        expert(X).sum().backward()
        eventually(lambda: load_expert(tmp_path, uid))
        swarm.serve("ffn", **how)
        eventually(lambda: all_copied(swarm))
        first.kill()
        eventually(lambda: declared(swarm)[uid].contact != first.contact)
        expert(X).sum().backward()
        first.restart()
        eventually(lambda: all(len(server.uids) == 1 for server in swarm.servers))  # it is given one of the two
        (where,) = [server for server in swarm.servers if uid in server.uids]
        assert where.statistics().experts[uid] == 2


@pytest.mark.timeout(150)
def test_labkit_bench_kills_says_how_soon_experts_were_back_and_what_they_lost(capsys):
    small = ["--servers", "3", "--experts", "6", "--hidden", "16", "--steps", "300", "--runs", "1"]
    assert main(["bench", "kills", *small, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [killed["servers_killed"] for killed in result["rounds"]] == [1, 1]
    assert all(0 < killed["served_s"] <= killed["found_s"] < 60 for killed in result["rounds"])
    assert all(killed["worst_loss_s"] < 30 for killed in result["rounds"])
    assert result["experts_left"] == 6 and result["rows_without_an_answer"] == result["failed_batches"] == 0
    assert result["accuracy"] > 0.8 and result["accuracy_without_kills"] > 0.8


def test_labkit_bench_copies_says_what_they_cost_in_training(capsys):
    small = ["--servers", "2", "--experts", "4", "--hidden", "16", "--rounds", "1", "--seconds", "10"]
    assert main(["bench", "copies", *small, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    speeds = result["samples_per_s"]
    assert result["ratios"] == [result["ratio"]] == [pytest.approx(speeds["with copies"] / speeds["without"], rel=0.01)]
    assert result["copy_mb_per_s"] > 0 and len(result["machine_speed_ratios"]) == 1
    assert result["equal_speed_ratio"] is None, "one pair cannot tell"
    assert all(0 < seconds < os.cpu_count() for seconds in result["work_time"].values())
    assert result["work_time_ratios"] == [result["work_time_ratio"]]
