"""How a run ends: what cannot recover is told at once, what can is waited for, and nobody has to ask why it is over."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

import labkit.training.trainer_threads
from labkit.client.dispatch import DispatchConfig
from labkit.client.moe import MixtureOfExperts
from labkit.errors import ExpertsRefused, LabkitError, NoExperts, TrainingFailed
from labkit.swarm import Swarm
from labkit.training.fit import fit

pytestmark = pytest.mark.usefixtures("forked_python")

X = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


class Fails(nn.Module):
    """A model whose forward passes raise these errors, one after the other, and then succeed."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.errors = iter(errors)

    def forward(self, x):
        if (error := next(self.errors, None)) is not None:
            raise error
        return self.layer(x)


def lasting(error: LabkitError) -> LabkitError:
    error.recoverable = False
    return error


def eventually_over(run) -> None:
    deadline = time.monotonic() + 10
    while run.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("error", [NoExperts("no such grid"), ExpertsRefused("all refuse rows of this width")])
def test_what_cannot_recover_ends_the_run_at_the_first_batch(error):
    run = fit(Fails(lasting(error)), (X, Y), steps=1000, trainers=1)
    with pytest.raises(TrainingFailed, match=f"no batch can succeed here: {error}"):
        run.wait(10)
    assert run.failed_batches == 1 and run.state == "failed"


def test_what_may_recover_is_waited_for(monkeypatch):
    monkeypatch.setattr(labkit.training.trainer_threads, "FAILURE_PAUSE", 0.0)
    run = fit(Fails(*[NoExperts("servers restart") for _ in range(20)]), (X, Y), steps=5, trainers=1).wait(10)
    assert run.steps == 5 and run.failed_batches == 20


def test_servers_that_have_served_this_run_are_waited_for_even_if_nobody_knows_them_any_more(monkeypatch):
    monkeypatch.setattr(labkit.training.trainer_threads, "FAILURE_PAUSE", 0.0)
    model = Fails()
    lost = [lasting(NoExperts("no such grid")) for _ in range(20)]

    def lose(step):
        if step.step == 3:
            model.errors = iter(lost)

    class Shared(nn.Module):  # replicas would have copies of the errors
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.layer
            self.call = lambda x: Fails.forward(model, x)

        def forward(self, x):
            if (error := next(model.errors, None)) is not None:
                raise error
            return self.inner(x)

    run = fit(Shared(), (X, Y), steps=6, trainers=1, on_step=lose).wait(10)
    assert run.steps == 6 and run.failed_batches == 20


def test_over_a_swarm_an_unknown_grid_and_a_wrong_width_are_told_at_once():
    with Swarm("endings") as swarm:
        swarm.serve("ffn", hidden=8, grid=(2, 2), isolation="task")
        unknown = nn.Sequential(swarm.moe(8, grid=(2, 2), name="nobody", k_best=2), nn.Linear(8, 2))
        with pytest.raises(TrainingFailed, match="no batch can succeed here"):
            fit(unknown, (X, Y), steps=1000).wait(10)
        layer = MixtureOfExperts(6, (2, 2), "ffn", swarm="endings", dispatch=DispatchConfig(k_best=2))
        wrong = nn.Sequential(nn.Linear(8, 6), layer, nn.Linear(6, 2))
        with pytest.raises(TrainingFailed, match="no batch can succeed here"):
            fit(wrong, (X, Y), steps=1000).wait(10)


def test_where_all_servers_have_left_or_too_few_experts_are_served_a_fresh_run_ends_at_once():
    with Swarm("endings") as swarm:
        (server,) = swarm.serve("ffn", hidden=8, grid=(2, 2), experts=2, isolation="task")
        impatient = swarm.moe(8, k_best=3, k_min=3)
        every, one = swarm.moe(8), swarm.expert(min(swarm.experts()))
        missing = swarm.expert(min({"ffn.0.0", "ffn.0.1", "ffn.1.0"} - swarm.experts().keys()))
        for layer, says in ((impatient, "fewer than k_min=3"), (missing, "nobody serves")):
            with pytest.raises(TrainingFailed, match=f"no batch can succeed here: .*{says}"):
                fit(nn.Sequential(layer, nn.Linear(8, 2)), (X, Y), steps=1000).wait(10)
        server.stop()
        for layer, says in ((every, "no live expert of the grid 'ffn'"), (one, f"nobody serves {one.uid}")):
            with pytest.raises(TrainingFailed, match=f"no batch can succeed here: {says}"):
                fit(nn.Sequential(layer, nn.Linear(8, 2)), (X, Y), steps=1000).wait(10)


def test_servers_that_were_killed_may_come_back_so_a_fresh_run_waits_for_them():
    with Swarm("endings") as swarm:
        (server,) = swarm.serve("ffn", hidden=8, grid=(2, 2), isolation="task")
        model = nn.Sequential(swarm.moe(8), nn.Linear(8, 2))
        server.kill()
        run = fit(model, (X, Y), steps=5, trainers=2)
        while run.failed_batches < 3:
            time.sleep(0.01)
        server.restart()
        assert run.wait(30).state == "finished"


def test_batches_without_a_finite_loss_are_not_waited_for_as_servers_are(monkeypatch):
    monkeypatch.setattr(labkit.training.trainer_threads, "FAILURE_PAUSE", 1.0)
    with pytest.raises(TrainingFailed, match="50 batches in a row failed; the last: the loss is nan"):
        fit(nn.Linear(8, 2), (X * math.nan, Y), steps=5, trainers=1).wait(10)


def test_a_run_whose_swarm_is_closed_in_the_middle_of_batches_is_stopped_and_nothing_in_it_has_failed(caplog):
    with Swarm("endings") as swarm:
        swarm.serve("ffn", hidden=8, grid=(2, 2), isolation="task")
        layer, validations = swarm.moe(8), [(X, Y)] * 10_000
        run = fit(nn.Sequential(layer, nn.Linear(8, 2)), (X, Y), steps=10**6, validate=validations, every=2)

        class Hides(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.last, self.layers = nn.Linear(8, 2), [layer]  # a list, so that it is no module of this one

            def forward(self, x):
                return self.last(self.layers[0](x))

        hidden = fit(Hides(), (X, Y), steps=10**6)
        while min(run.steps, hidden.steps) < 3:
            time.sleep(0.01)
    for one in (run.wait(10), hidden.wait(10)):
        assert one.state == "stopped" and "its swarm was closed" in repr(one)
    assert run.failed_batches == 0 and "did not answer" not in caplog.text


@pytest.mark.parametrize("model", [nn.Linear(9, 2), Fails(lasting(NoExperts("no such\n   grid")))])
def test_a_failure_is_told_once_in_one_line_even_if_nobody_waits(model, capfd, caplog):
    run = fit(model, (X, Y), steps=100, trainers=3)
    eventually_over(run)
    lines = [line for line in capfd.readouterr().err.splitlines() if "the run failed" in line]
    assert len(lines) == 1 and "the run failed after 0 of 100 steps: " in lines[0]
    assert [record.levelno for record in caplog.records if "the run failed" in record.message] == [logging.ERROR]


def test_the_line_names_the_place_in_the_code_of_the_user(capfd):
    def faulty_loss(scores, y):
        return scores["loss"]

    eventually_over(fit(nn.Linear(8, 2), (X, Y), steps=100, loss=faulty_loss))
    assert "in faulty_loss)" in capfd.readouterr().err


def test_where_the_log_is_shown_the_line_is_not_printed_as_well(capsys):
    shown = logging.StreamHandler(sys.stderr)
    logging.getLogger("labkit").addHandler(shown)
    try:
        eventually_over(fit(nn.Linear(9, 2), (X, Y), steps=10))
    finally:
        logging.getLogger("labkit").removeHandler(shown)
    assert capsys.readouterr().err.count("the run failed") == 1


def test_nor_is_it_printed_twice_beside_a_server_that_is_a_task_and_listens_to_the_log(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a script; pytest has some of its own
    with Swarm("listens") as swarm:
        swarm.serve("nop", grid=(1,), isolation="task", backups=0)
        eventually_over(fit(nn.Linear(9, 2), (X, Y), steps=10))
    assert capsys.readouterr().err.count("the run failed after 0 of 10 steps: ") == 1


def script(code: str) -> str:
    """What a process that runs this says on stderr."""
    head = (
        "import torch, threading, time; from torch import nn; from labkit.training.fit import fit\n"
        "X, Y = torch.randn(60, 8), torch.randint(0, 2, (60,))\n"
    )
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60)
    return f"{done.stderr}\nexit code {done.returncode}"


@pytest.mark.parametrize(
    "code",
    [
        "run = fit(nn.Linear(8, 2), (X, Y), steps=10**9)",
        "run = fit(nn.Linear(8, 2), (X, Y), steps=10**9, on_step=lambda step: time.sleep(1000))",
        "run = fit(nn.Linear(8, 2), (X, Y), steps=10**9, validate=(X, Y), every=1)\nwith run.paused(): exit()",
    ],
    ids=["goes on", "is held by the user", "paused"],
)
def test_a_process_with_a_run_going_on_ends_within_seconds(code):
    started = time.monotonic()
    told = script(f"started = time.monotonic()\n{code}")
    assert told.endswith("exit code 0") and "Traceback" not in told and "failed" not in told
    assert time.monotonic() - started < 30  # start-up included, which a loaded machine may need


def test_a_run_whose_threads_wait_in_a_pause_can_be_stopped():
    run = fit(nn.Linear(8, 2), (X, Y), steps=10**9, trainers=3)
    with run.paused():
        stopper = threading.Thread(target=run.stop)
        stopper.start()
        stopper.join(10)
        assert not run.running


def test_after_an_interrupt_while_a_run_begins_the_model_can_be_trained(monkeypatch):
    model, barrier = nn.Linear(8, 2), threading.Barrier

    def interrupted(parties: int) -> threading.Barrier:
        signal.raise_signal(signal.SIGINT)
        return barrier(parties)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:  # as a notebook keeps it
        patch.setattr(threading, "Barrier", interrupted)
        fit(model, (X, Y), steps=1_000_000, trainers=3)
    assert fit(model, (X, Y), steps=5).wait(20).steps == 5 and kept.value is not None
