"""Trainers: what they compute, how many there are, and what happens when batches, data or user code fail."""

from __future__ import annotations

import _thread
import dataclasses
import gc
import inspect
import threading
import time
from collections.abc import Callable
from itertools import chain

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import labkit.training.trainer_threads
from labkit.errors import NotEnoughExperts, SwarmClosed, TrainingFailed
from labkit.events import Event, StepFailed, StepFinished
from labkit.server.optimizer import SGD
from labkit.swarm import Swarm
from labkit.training.datasets import ClassificationData, batches
from labkit.training.fit import fit
from labkit.training.run import Run, latest_run
from labkit.training.shared_model import SharedModel
from labkit.training.staleness import DelayCompensation, UpdateRule
from labkit.training.trainer import TrainConfig, evaluate, train_step
from tests.swarms import eventually

X = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def classifier(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture(autouse=True)
def no_pause_after_a_failure(monkeypatch):
    monkeypatch.setattr(labkit.training.trainer_threads, "FAILURE_PAUSE", 0.0)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class Through(nn.Module):
    """A layer that passes x on, after it called `function` with it. Replicas share the function."""

    def __init__(self, function: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        self.function(x)
        return x


def failing(*calls: int, error: BaseException | None = None) -> Through:
    """A layer that fails in its first, second, … forward pass, or in each if none is named."""
    lock = threading.Lock()
    seen: list[torch.Tensor] = []

    def count(x):
        with lock:
            seen.append(x)
            if not calls or len(seen) in calls:
                raise error or NotEnoughExperts(f"pass {len(seen)}")

    return Through(count)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("make", [sgd, torch.optim.Adam, lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True)])
def test_one_trainer_equals_plain_sequential_training(make):
    ours, plain = classifier(nn.BatchNorm1d(8)), classifier(nn.BatchNorm1d(8))
    run = fit(ours, (X, Y), steps=30, batch_size=16, trainers=1, seed=7, optimizer=make).wait()

    optimizer = make(plain.parameters())
    losses = []
    stream = batches(X, Y, 16, torch.Generator().manual_seed(7))
    for _, (x, y) in zip(range(30), stream, strict=False):
        loss = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert [step.loss for step in run.history] == losses
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert run.staleness == 0


def test_a_linear_schedule_falls_to_zero_over_the_run():
    ours, plain = classifier(), classifier()
    fit(ours, (X, Y), steps=10, batch_size=100, trainers=1, optimizer=sgd, schedule="linear").wait()

    optimizer = sgd(plain.parameters())
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    for _, (x, y) in zip(range(10), batches(X, Y, 100, torch.Generator().manual_seed(0)), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
        falling.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_rates_rise_fall_and_shrink_with_age_as_the_rule_says():
    rule = UpdateRule(warmup=4, decay_over=12, age_power=0.5)
    assert [rule.rate(updates, 0) for updates in (0, 1, 3, 4, 8, 12, 20)] == [0.25, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert rule.rate(4, 3) == 0.5
    assert UpdateRule().rate(1000, 63) == 1.0


def test_a_run_follows_its_rule():
    ours, plain = classifier(), classifier()
    rule = UpdateRule(warmup=5, decay_over=10)
    run = fit(
        ours, (X, Y), steps=10, batch_size=100, trainers=1, optimizer=sgd, warmup=5, clip_grad_norm=0.1,
        schedule="linear",
    )  # fmt: skip
    run.wait()

    optimizer = sgd(plain.parameters())
    for step, (x, y) in zip(range(10), batches(X, Y, 100, torch.Generator().manual_seed(0)), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = 0.1 * rule.rate(step, 0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_a_compensated_gradient_is_near_to_the_one_of_now():
    """Of log cosh, whose second derivative g² stands for as well as it does anywhere: 1 - g²."""
    seen, now = torch.tensor([0.8]), torch.tensor([0.7])
    stale, fresh = seen.tanh(), now.tanh()
    compensated = stale.clone()
    DelayCompensation(1.0).apply([compensated], [now], [seen])
    assert abs(compensated - fresh) < abs(stale - fresh)


def test_trainers_share_the_threads_of_torch_and_leave_the_caller_its_own():
    threads: set[int] = set()
    torch.set_num_threads(4)
    try:
        model = classifier(Through(lambda x: threads.add(torch.get_num_threads())))
        fit(model, (X, Y), steps=10, trainers=2).wait()
        assert threads == {2} and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)


def test_a_gradient_is_of_the_parameters_that_its_trainer_saw_and_knows_how_stale_it_is():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    shared = SharedModel(model, sgd(model.parameters()))
    early, late = shared.replica(), shared.replica()
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)

    seen = shared.refresh(early)  # w = 1
    for _ in range(2):  # meanwhile another takes two steps: dw = 2w, so w = 0.8, 0.64
        loss, staleness = train_step(shared, late, (one, zero), F.mse_loss, balance=0)
        assert staleness == 0
    assert loss == pytest.approx(0.8**2)
    F.mse_loss(early(one), zero).backward()
    assert shared.apply(early, seen) == 2
    assert model.weight.item() == pytest.approx(0.64 - 0.1 * 2 * 1.0)
    assert shared.updates == 3


def zeros(dtype: torch.dtype, make=sgd, **rule) -> SharedModel:
    """A layer of eight weights."""
    model = nn.Linear(4, 2, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    return SharedModel(model, make(model.parameters()), UpdateRule(**rule))


def step(shared: SharedModel, gradient: float) -> torch.Tensor:
    """The weights after one step, in which all of them have this gradient."""
    (weight,) = shared.model.parameters()
    x = torch.ones(1, 4, dtype=weight.dtype)
    train_step(shared, shared.replica(), (x, x), lambda scores, y: (scores.float() * gradient).sum(), balance=0)
    return weight


def test_gradients_in_half_precision_may_add_up_to_more_than_half_precision_holds():
    assert (step(zeros(torch.float16), 20_000) == -2000).all()


def test_they_are_clipped_and_not_lost_where_their_norm_is_more_than_that():
    clipped = step(zeros(torch.float16, clip_grad_norm=1.0), 30_000)
    assert clipped.float().norm().item() == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "too_large", "large"),
    [(torch.float32, 1e30, 1e18), (torch.bfloat16, 1e30, 1e18), (torch.float16, 256, 255)],
)
def test_a_gradient_whose_square_overflows_changes_nothing_since_adam_would_never_move_again(dtype, too_large, large):
    shared = zeros(dtype, torch.optim.Adam)
    with pytest.raises(FloatingPointError, match="the gradient of weight is not finite, or its square"):
        step(shared, too_large)
    assert shared.optimizer is not None and not shared.optimizer.state
    assert step(shared, large).all()


def test_in_half_precision_adam_takes_large_gradients_that_are_clipped_and_its_squares_stay_finite():
    shared = zeros(torch.float16, torch.optim.Adam, clip_grad_norm=255.0)
    for _ in range(3):
        assert step(shared, 60_000).isfinite().all()
    assert shared.optimizer is not None
    [kept] = shared.optimizer.state.values()
    assert kept["exp_avg_sq"].isfinite().all()


def test_in_half_precision_a_large_gradient_that_is_compensated_without_need_is_itself():
    assert (step(zeros(torch.float16, compensation=1.0), 20_000) == -2000).all()


@pytest.mark.parametrize(("make", "gradient", "most"), [(sgd, 60_000, 65504), (torch.optim.Adam, 250, 255.875)])
def test_in_half_precision_compensation_makes_no_gradient_larger_than_the_optimizer_may_get(make, gradient, most):
    shared = zeros(torch.float16, make, compensation=1.0)
    (weight,) = shared.model.parameters()
    stale, grad = shared.replica(), torch.full_like(weight, gradient)
    for mine in stale.parameters():
        mine.grad = grad
    nn.init.constant_(weight, 2.0)
    shared.apply(stale, 0)
    assert (grad == most).all() and weight.isfinite().all()


def test_trainers_work_at_the_same_time_and_no_more_than_stated():
    together = threading.Barrier(3)
    lock, inside, most = threading.Lock(), set(), []

    def meet(x):
        with lock:
            inside.add(threading.current_thread())
            most.append(len(inside))
        together.wait(10)
        with lock:
            inside.discard(threading.current_thread())

    run = fit(classifier(Through(meet)), (X, Y), steps=30, trainers=3).wait()
    assert run.steps == 30 and max(most) == 3
    assert run.staleness > 0


@pytest.mark.parametrize("trainers", [1, 8])
def test_exactly_the_steps_asked_for_are_applied_and_each_is_told(trainers):
    told: list[Event] = []
    config = TrainConfig(steps=37, batch_size=10, trainers=trainers)
    run = Run(classifier(), (X, Y), config, emit=told.append).wait()
    assert run.steps == 37
    steps = [event for event in told if isinstance(event, StepFinished)]
    assert sorted(step.step for step in steps) == list(range(1, 38)) == [step.step for step in run.history]
    assert sum(step.samples for step in steps) == 370
    assert run.samples_per_s == pytest.approx(370 / run.seconds)
    assert run.loss == pytest.approx(sum(step.loss for step in list(run.history)[-20:]) / 20)


def test_training_teaches():
    model = classifier()
    before = evaluate(model, X, Y)
    fit(model, (X, Y), epochs=30, batch_size=10, trainers=4, lr=0.01).wait()
    assert evaluate(model, X, Y) > max(0.9, before)


def test_frozen_parameters_stay_and_tied_ones_stay_tied():
    one, tied, frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    tied.weight = one.weight
    frozen.weight.requires_grad_(False)
    model = nn.Sequential(one, tied, frozen)
    before = [one.weight.clone(), frozen.weight.clone()]
    fit(model, (X, Y), steps=20, trainers=4).wait()
    assert not torch.equal(one.weight, before[0]) and torch.equal(frozen.weight, before[1])
    assert tied.weight is one.weight
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sparse_gradients_are_applied_too():
    words = nn.EmbeddingBag(10, 2, sparse=True)
    before = words.weight.clone()
    data = torch.randint(10, (50, 3)), torch.zeros(50, dtype=torch.long)
    fit(words, data, steps=20, trainers=2, optimizer=sgd).wait()
    assert not torch.equal(words.weight, before)


# ---------------------------------------------------------------- the forms of data


def seen_by(data, **options) -> list[list[int]]:
    """The labels of the batches that a run with one trainer gets."""
    seen = []
    model = nn.Linear(1, 10)

    def loss(scores, y):
        seen.append(y.tolist())
        return F.cross_entropy(scores, y)

    fit(model, data, loss=loss, trainers=1, batch_size=4, **options).wait()
    return seen


ROWS, LABELS = torch.randn(10, 1), torch.arange(10)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield ROWS[0], 3


@pytest.mark.parametrize(
    "data",
    [
        (ROWS, LABELS),
        [ROWS, LABELS],
        {"input": ROWS, "labels": LABELS.numpy()},
        ClassificationData("ten", ROWS, LABELS, ROWS[:1], LABELS[:1], 10),
        TensorDataset(ROWS, LABELS),
        DataLoader(TensorDataset(ROWS, LABELS), 4),
        [(ROWS[:4], LABELS[:4]), (ROWS[4:8], LABELS[4:8]), (ROWS[8:], LABELS[8:])],
    ],
    ids=[
        "tensors",
        "list of tensors",
        "dictionary of tensors",
        "ClassificationData",
        "Dataset",
        "DataLoader",
        "list of batches",
    ],
)
def test_an_epoch_shows_each_row_once_whatever_the_form_of_the_data(data):
    seen = seen_by(data, epochs=2)
    assert [len(labels) for labels in seen] == [4, 4, 2] * 2
    for epoch in (seen[:3], seen[3:]):
        assert sorted(chain.from_iterable(epoch)) == list(range(10))


def test_half_an_epoch_is_half_the_steps():
    assert len(seen_by([(ROWS[:2], LABELS[:2])] * 6, epochs=0.5)) == 3


def test_a_stream_of_unknown_length_is_trained_on_by_steps():
    assert seen_by(Endless(), steps=3) == [[3] * 4] * 3
    with pytest.raises(ValueError, match="give steps"):
        fit(classifier(), Endless(), epochs=1)


@pytest.mark.parametrize("data", [(ROWS, LABELS), TensorDataset(ROWS, LABELS)], ids=["tensors", "Dataset"])
def test_the_same_seed_gives_the_same_batches_and_another_others(data):
    assert seen_by(data, steps=7, seed=1) == seen_by(data, steps=7, seed=1) != seen_by(data, steps=7, seed=2)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "a Dataset, or an iterable of batches.*; not NoneType"),
        ([], "there are no batches in it"),
        ("digits", "data=str: .* what lk.load.name. returns"),
        ((ROWS, "labels"), "an iterable of batches"),
        ((ROWS.numpy(), LABELS.numpy().astype(str)), "data: texts cannot become a tensor"),
        (ROWS, "data=Tensor"),
        ((ROWS, LABELS[:3]), "10 rows and y has 3"),
        ({"input": ROWS, "labels": LABELS[:3]}, "10 rows and y has 3"),
        ({"input": ROWS, "labels": 3}, "data=dict"),
        ((ROWS.tolist(), LABELS.tolist()), "data=tuple: give .x, y. as two torch tensors"),
        (pd.DataFrame(ROWS.numpy()), "data=DataFrame: give .x, y. as two torch tensors"),
    ],
)
def test_unusable_data_is_refused_at_once(data, said):
    with pytest.raises(ValueError, match=said):
        fit(classifier(), data, steps=1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((batch for batch in [(X, Y)] * 2), "no more batches .* a generator"),
        (["X", "Y", "Z"], "a batch is .x, y., a dictionary or a tensor, not a str"),
        ([(X[0], 1), (X[1], 0)], "this is a row and no batch"),
        ([()], "a batch is empty"),
    ],
)
def test_batches_that_are_no_batches_end_the_run(data, said):
    with pytest.raises(ValueError, match=said):
        fit(classifier(), data, steps=5).wait()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either steps=… or epochs=…"),
        ({"steps": 1, "epochs": 1}, "either steps=… or epochs=…"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"steps": 1, "lr": "1e-3"}, "lr='1e-3': a number"),
        ({"steps": 1, "lr": -1.0}, "lr=-1.0: a finite number of at least 0"),
        ({"steps": 1, "balance": "a"}, "balance='a': a number"),
        ({"steps": 1, "balance": -1}, "balance=-1: a finite number of at least 0"),
        ({"steps": 1, "seed": "a"}, "seed='a': a whole number"),
        ({"steps": 1, "loss": "mse"}, "loss='mse': give the function itself, loss=lk.losses.mse"),
        ({"steps": 1, "loss": nn.MSELoss}, "MSELoss is a class"),
        ({"steps": 1, "loss": nn.MSELoss(reduction="sum")}, "it is no mean"),
        ({"steps": 1, "on_step": 3}, "on_step=3: a function is needed"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"steps": 1, "trainers": 0}, "trainers=0"),
        ({"steps": 1, "schedule": "cosine"}, "schedule='cosine'"),
        ({"steps": 1, "warmup": -1}, "warmup=-1"),
        ({"steps": 5, "warmup": 5, "schedule": "linear"}, "warmup=5"),
        ({"steps": 1, "clip_grad_norm": 0}, "clip_grad_norm=0"),
        ({"steps": 1, "age_power": -1}, "age_power=-1"),
        ({"steps": 1, "compensation": float("nan")}, "compensation=nan"),
        ({"steps": 1, "accumulate": 0}, "accumulate=0"),
        ({"steps": 1, "every": 0, "validate": (X, Y)}, "every=0"),
        ({"steps": 1, "patience": 2}, "patience: .* give validate="),
        ({"steps": 1, "metrics": "accuracy"}, "metrics: .* give validate="),
        ({"steps": 1, "validate": (X, Y), "metrics": "precision"}, "metric 'precision': one of accuracy"),
        ({"steps": 1, "validate": "digits"}, "data=str"),
        ({"steps": 1, "optimizer": "adamm"}, "did you mean 'adam'"),
        ({"steps": 1, "optimizer": SGD(nn.Linear(1, 1).parameters())}, "SGD.…. is an instance"),
        ({"steps": 1, "optimizer": lambda p: torch.optim.SGD(nn.Linear(1, 1).parameters())}, "not this model's"),
        ({"steps": 1, "optimizer": lambda p: p}, "returned a list and no optimizer"),
        ({"steps": 1, "optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"steps": 1, "schedule": torch.optim.lr_scheduler.StepLR}, "StepLR cannot be made of the optimizer alone"),
        ({"steps": 1, "schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau: .* give validate="),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        fit(classifier(), (X, Y), **options)


@pytest.mark.parametrize("model", [nn.Linear, lambda x: x, None])
def test_what_is_no_module_is_no_model(model):
    with pytest.raises(ValueError, match="a module is needed"):
        fit(model, (X, Y), steps=1)


def test_numbers_of_numpy_are_numbers():
    config = TrainConfig(steps=np.int64(5), lr=np.float32(0.5))  # type: ignore[arg-type]
    assert (config.steps, config.lr) == (5, 0.5) and (type(config.steps), type(config.lr)) == (int, float)


def test_the_signature_of_fit_shows_every_option_of_its_config_with_the_same_default():
    shown = {name: parameter.default for name, parameter in inspect.signature(fit).parameters.items()}
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert fields.items() <= shown.items()
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(fit).parameters.values())


# ---------------------------------------------------------------- failures


def test_a_failed_batch_is_dropped_counted_and_told_and_the_run_goes_on():
    told: list[Event] = []
    config = TrainConfig(steps=10, trainers=2, batch_size=10)
    run = Run(classifier(failing(2, 3, 7)), (X, Y), config, emit=told.append).wait()
    assert run.steps == 10 and run.failed_batches == 3
    failures = [event for event in told if isinstance(event, StepFailed)]
    assert sorted(event.detail for event in failures) == ["pass 2", "pass 3", "pass 7"]
    assert {event.samples for event in failures} == {10}
    assert "3 failed batches" in repr(run)


def test_too_many_failures_in_a_row_end_the_run_with_the_last_as_the_cause():
    run = fit(classifier(failing()), (X, Y), steps=10, trainers=1, max_failures=5)
    with pytest.raises(TrainingFailed, match="5 batches in a row failed; the last: pass 5") as raised:
        run.wait()
    assert isinstance(raised.value.__cause__, NotEnoughExperts)
    assert run.steps == 0 and run.failed_batches == 5 and not run.running


def test_failures_with_a_success_in_between_are_not_in_a_row():
    fails = failing(*(n for n in range(1, 40) if n % 5))
    assert fit(classifier(fails), (X, Y), steps=5, trainers=1, max_failures=5).wait().failed_batches == 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(bad):
    model = nn.Linear(4, 2)
    before = model.weight.clone()
    run = fit(model, (X, Y), steps=5, max_failures=3, loss=lambda scores, y: scores.sum() * bad)
    with pytest.raises(TrainingFailed, match="the loss is"):
        run.wait()
    assert torch.equal(model.weight, before)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = nn.Linear(4, 2)
    before = model.weight.clone()
    run = fit(model, (X, Y), steps=5, max_failures=3, loss=lambda scores, y: (scores * 0).abs().sqrt().sum())
    with pytest.raises(TrainingFailed, match="the gradient of weight is not finite"):
        run.wait()
    assert torch.equal(model.weight, before)


def test_an_error_of_the_user_ends_the_run_and_points_into_his_code():
    def faulty_loss(scores, y):
        return scores + None

    run = fit(classifier(), (X, Y), steps=5, loss=faulty_loss)
    for _ in range(2):
        with pytest.raises(TypeError) as raised:
            run.wait()
        assert raised.traceback[-1].name == "faulty_loss"
        assert len(raised.traceback) == 8  # test, wait, _train, _take_turn, _try_step, train_step, loss_of, faulty_loss
    assert repr(run).startswith("<run failed (TypeError: ")


def test_even_an_exit_in_user_code_ends_the_run():
    with pytest.raises(SystemExit):
        fit(classifier(failing(error=SystemExit(3))), (X, Y), steps=5).wait()


# ---------------------------------------------------------------- waiting and stopping


@pytest.fixture
def held():
    """A run of one trainer that is in its first forward pass until `go` is set."""
    inside, go = threading.Event(), threading.Event()

    def hold(x):
        inside.set()
        assert go.wait(10)

    run = fit(classifier(Through(hold)), (X, Y), steps=1000, trainers=1)
    assert inside.wait(10)
    yield run, go
    go.set()
    run.stop()


def test_fit_returns_at_once_and_wait_waits_no_longer_than_told(held):
    run, _ = held
    assert run.wait(timeout=0.05) is run
    assert run.running and run.steps == 0
    assert repr(run).startswith("<run running: 0 of 1000 steps")


def test_stop_lets_the_batches_in_flight_finish(held):
    run, go = held
    assert run.stop(timeout=0) is run
    assert run.running
    go.set()
    assert run.stop() is run
    assert not run.running and run.steps == 1
    assert repr(run).startswith("<run stopped: 1 of 1000 steps")


def test_an_interrupt_while_waiting_leaves_the_run_going(held):
    run, go = held
    interrupter = threading.Timer(0.05, _thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        interrupter.start()
        run.wait()
    interrupter.join()
    assert run.running
    go.set()


def test_fitting_a_model_again_stops_the_earlier_run(held, caplog):
    run, go = held
    threading.Timer(0.05, go.set).start()
    again = fit(run.model, (X, Y), steps=3, trainers=2)
    assert not run.running
    assert again.wait().steps == 3
    assert "an earlier run still trained this model" in caplog.text


def test_the_batches_are_closed_when_the_run_ends():
    closed = threading.Event()

    class Loader:
        def __iter__(self):
            try:
                while True:
                    yield X, Y
            finally:
                closed.set()

    fit(classifier(), Loader(), steps=5).wait()
    assert closed.is_set()


# ---------------------------------------------------------------- over a swarm


def test_a_swarm_that_is_closed_meanwhile_stops_the_run_quickly_and_without_an_error():
    with Swarm("trainer-test") as swarm:
        swarm.serve("ffn", hidden=8, grid=(2, 2), isolation="task")
        model = classifier(swarm.moe(8, k_best=2))
        told: list[Event] = []
        swarm.on_event(told.append)
        run = fit(model, (X, Y), steps=100_000, batch_size=10, trainers=4, balance=0.1)
        eventually(lambda: run.steps >= 5)
        assert sum(isinstance(event, StepFinished) for event in told) >= 5
        assert 0 <= run.evaluate(X, Y) <= 1
    started = time.monotonic()
    run.wait(10)
    assert time.monotonic() - started < 2
    assert run.state == "stopped" and repr(run).startswith("<run stopped (its swarm was closed): ")
    with pytest.raises(SwarmClosed):
        fit(model, (X, Y), steps=1)


def test_a_run_does_not_go_on_in_another_swarm_of_the_same_name(held_in_swarm):
    run, go = held_in_swarm
    with Swarm("trainer-test"):
        go.set()
        assert run.wait(10).state == "stopped" and run.steps <= 1


def test_the_latest_run_over_a_swarm_is_known_while_somebody_holds_it():
    def over(swarm: Swarm) -> nn.Module:
        model = nn.ModuleDict({"used": classifier(), "unused": swarm.moe(8, grid=(2, 2))})
        model.forward = lambda x: model["used"](x)
        return model

    with Swarm("one") as one, Swarm("two") as two:
        assert latest_run("one") is None
        first = fit(over(one), (X, Y), steps=1).wait()
        other = fit(over(two), (X, Y), steps=1).wait()
        plain = fit(classifier(), (X, Y), steps=1).wait()
        assert (latest_run("one"), latest_run("two")) == (first, other)
        second = fit(over(one), (X, Y), steps=1).wait()
        assert latest_run("one") is second and plain is not None
        del second
        gc.collect()
        assert latest_run("one") is None
    assert latest_run("two") is other  # closed by now
    with Swarm("two"):
        assert latest_run("two") is None  # another swarm


@pytest.fixture
def held_in_swarm():
    """A run between two forward passes of an MoE layer, over a swarm without experts."""
    inside, go = threading.Event(), threading.Event()

    def hold(scores, y):
        inside.set()
        assert go.wait(10)
        return F.cross_entropy(scores, y)

    with Swarm("trainer-test") as swarm:
        model = nn.ModuleDict({"used": classifier(), "unused": swarm.moe(8, grid=(2, 2))})
        model.forward = lambda x: model["used"](x)
        run = fit(model, (X, Y), steps=1000, trainers=1, loss=hold)
        assert inside.wait(10)
        yield run, go
        go.set()
