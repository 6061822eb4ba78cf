"""`lk.fit` beside the loop that people write by hand: validations, early stop, callbacks, schedules, batches."""

from __future__ import annotations

import itertools
import threading
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import labkit as lk
from labkit.errors import NotEnoughExperts
from labkit.events import Event, MetricsLogged
from labkit.training.datasets import ClassificationData, batches
from labkit.training.fit import fit
from labkit.training.metrics import VALIDATION_LOSS
from labkit.training.run import Run
from labkit.training.trainer import TrainConfig, evaluate
from labkit.training.turns import Turns
from labkit.training.validation import TrainingStep

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
TEST_X = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
TEST_Y = (TEST_X.sum(1) > 0).long()


def classifier(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.ReLU(), nn.Linear(8, 2))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


# ---------------------------------------------------------------- validations and callbacks


def test_validations_equal_those_of_a_loop_by_hand():
    ours, plain = classifier(nn.BatchNorm1d(8), nn.Dropout(0.5)), classifier(nn.BatchNorm1d(8), nn.Dropout(0.5))
    torch.manual_seed(5)
    run = fit(
        ours, (X, Y), steps=25, batch_size=16, trainers=1, optimizer=sgd, validate=(TEST_X, TEST_Y), every=10,
        metrics={"accuracy": "accuracy", "largest": lambda outputs, y: outputs.max()},
    ).wait()  # fmt: skip

    torch.manual_seed(5)
    optimizer, expected = sgd(plain.parameters()), []
    for step, (x, y) in zip(range(1, 26), batches(X, Y, 16, torch.Generator().manual_seed(0)), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
        if step in (10, 20, 25):
            with torch.no_grad():
                scores = plain.eval()(TEST_X)
            plain.train()
            right = (scores.argmax(1) == TEST_Y).float().mean().item()
            expected.append((step, F.cross_entropy(scores, TEST_Y).item(), right, scores.max().item()))

    found = [(v.step, v.loss, v.metrics["accuracy"], v.metrics["largest"]) for v in run.validations]
    assert found == [pytest.approx(row) for row in expected]
    assert f"validation loss {run.validations[-1].loss:.4f}" in repr(run)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"epochs": 3}, [4, 8, 12]), ({"steps": 6}, [4, 6]), ({"steps": 6, "every": 5}, [5, 6]), ({"steps": 2}, [2])],
)
def test_validations_come_once_an_epoch_or_as_often_as_told_and_at_the_end(options, steps):
    run = fit(classifier(), (X, Y), batch_size=16, validate=(TEST_X, TEST_Y), trainers=1, **options).wait()
    assert [validation.step for validation in run.validations] == steps


@pytest.mark.parametrize(
    "validate",
    [
        (TEST_X, TEST_Y),
        TensorDataset(TEST_X, TEST_Y),
        DataLoader(TensorDataset(TEST_X, TEST_Y), 7),
        [{"input": TEST_X[:9], "labels": TEST_Y[:9]}, {"input": TEST_X[9:], "labels": TEST_Y[9:]}],
        ClassificationData("some", X, Y, TEST_X, TEST_Y, 2),
    ],
)
def test_validation_data_may_have_any_form(validate):
    model = classifier()
    run = fit(model, (X, Y), steps=1, lr=0.0, validate=validate, metrics=["accuracy"]).wait()
    assert run.validations[0].metrics["accuracy"] == pytest.approx(evaluate(model, TEST_X, TEST_Y))
    assert run.validations[0].loss == pytest.approx(evaluate(model, TEST_X, TEST_Y, metric="loss"))


def test_listeners_hear_what_was_measured():
    told: list[Event] = []
    config = TrainConfig(steps=4, every=2, trainers=1)
    run = Run(classifier(), (X, Y), config, emit=told.append, validate=(TEST_X, TEST_Y), metrics="accuracy").wait()
    heard = [(event.step, event.metrics) for event in told if isinstance(event, MetricsLogged)]
    assert heard == [(validation.step, validation.metrics) for validation in run.validations]
    assert list(heard[0][1]) == [VALIDATION_LOSS, "accuracy"]


def test_a_run_stops_when_the_validation_loss_does_not_improve_and_keeps_the_best_model():
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.1, 1.0])
    states: list[torch.Tensor] = []

    def loss(outputs, y):
        if torch.is_grad_enabled():
            return F.cross_entropy(outputs, y)
        states.append(model.state_dict()["0.weight"].clone())
        return torch.tensor(next(losses))

    model = classifier()
    run = fit(
        model, (X, Y), steps=100, trainers=1, loss=loss, validate=(TEST_X, TEST_Y), every=3, patience=3
    ).wait()  # fmt: skip
    assert [validation.step for validation in run.validations] == [3, 6, 9, 12, 15]
    assert run.state == "stopped" and "the validation loss has not improved since step 6" in repr(run)
    assert run.best is not None and (run.best.step, run.best.loss) == (6, 2.0)
    model.load_state_dict(run.best.state)
    assert torch.equal(model.state_dict()["0.weight"], states[1])


def test_on_step_sees_every_step_in_order_one_at_a_time_with_what_was_measured():
    seen: list[TrainingStep] = []
    busy = threading.Lock()

    def on_step(step):
        assert busy.acquire(blocking=False)
        seen.append(step)
        busy.release()

    run = fit(
        classifier(), (X, Y), steps=50, batch_size=16, trainers=4, validate=(TEST_X, TEST_Y), every=20, on_step=on_step
    ).wait()
    assert [step.step for step in seen] == list(range(1, 51))
    assert [step.loss for step in seen] == [step.loss for step in run.history]
    assert {step.step: step.metrics for step in seen if step.metrics} == {
        validation.step: validation.metrics for validation in run.validations
    }
    assert seen[0].run is run and "run" not in repr(seen[0])


def test_on_step_sees_every_step_in_order_where_a_trainer_is_held_up_between_its_step_and_its_turns_end(monkeypatch):
    end, overtaken, ended = Turns.end, threading.Event(), itertools.count()

    def late(self: Turns[Any], *args: Any) -> None:
        first = next(ended) == 0
        if first:
            assert overtaken.wait(10)
        end(self, *args)
        if not first:
            overtaken.set()

    monkeypatch.setattr(Turns, "end", late)
    seen: list[int] = []
    fit(classifier(), (X, Y), steps=20, trainers=4, on_step=lambda step: seen.append(step.step)).wait()
    assert seen == list(range(1, 21))


def test_on_step_may_stop_the_run_look_at_it_and_pause_it():
    def on_step(step):
        with step.run.paused():
            assert 0 <= step.run.evaluate(TEST_X, TEST_Y) <= 1
        if step.step == 7:
            assert step.run.stop() is step.run

    run = fit(classifier(), (X, Y), steps=10_000, trainers=3, on_step=on_step).wait(20)
    assert run.state == "stopped" and 7 <= run.steps < 30


@pytest.mark.parametrize("error", [KeyError("mine"), SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["on_step", "metrics"])
def test_an_error_in_a_function_of_the_user_ends_the_run(where, error):
    def fail(*_):
        raise error

    on_step, metrics = (fail, None) if where == "on_step" else (None, fail)
    run = fit(
        classifier(), (X, Y), steps=1000, trainers=3, validate=(X, Y), every=1, on_step=on_step, metrics=metrics
    )  # fmt: skip
    with pytest.raises(type(error)):
        run.wait(20)
    assert run.state == "failed"


def test_a_function_that_waits_for_its_own_run_is_told_so():
    with pytest.raises(RuntimeError, match="cannot wait for the run"):
        fit(classifier(), (X, Y), steps=10, on_step=lambda step: step.run.wait()).wait(20)


def test_a_validation_that_experts_do_not_answer_is_left_out_and_the_run_goes_on(caplog):
    class Flaky(nn.Module):
        def forward(self, x):
            if not self.training:
                raise NotEnoughExperts("none of 4")
            return x

    run = fit(classifier(Flaky()), (X, Y), steps=5, validate=(TEST_X, TEST_Y), every=5).wait()
    assert run.steps == 5 and run.validations == []
    assert "validation after step 5 is left out, since experts did not answer: none of 4" in caplog.text


def test_trainers_go_on_while_one_of_them_validates():
    others_go_on = threading.Event()

    def metric(outputs, y):
        assert others_go_on.wait(10)
        return 1.0

    def loss(outputs, y):
        if torch.is_grad_enabled() and len(run_steps) > 30:
            others_go_on.set()
        run_steps.append(1)
        return F.cross_entropy(outputs, y)

    run_steps: list[int] = []
    fit(
        classifier(),
        (X, Y),
        steps=100,
        trainers=2,
        loss=loss,
        validate=(TEST_X, TEST_Y),
        metrics={"m": metric},
        every=5,
    ).wait(20)
    assert others_go_on.is_set()


# ---------------------------------------------------------------- optimizers and schedules


def by_hand(make_optimizer, make_schedule=None, accumulate=1, steps=12):
    """The loop that people write, with the batches of a run."""
    model = classifier()
    optimizer = make_optimizer(model.parameters())
    schedule = make_schedule(optimizer) if make_schedule else None
    for step, (x, y) in zip(range(1, steps + 1), batches(X, Y, 16, torch.Generator().manual_seed(0)), strict=False):
        (F.cross_entropy(model(x), y) / accumulate).backward()
        if step % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            if schedule:
                schedule.step()
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("optimizer", "lr", "same"),
    [
        ("sgd", 0.1, lambda p: torch.optim.SGD(p, lr=0.1)),
        ("adam", 0.01, lambda p: torch.optim.Adam(p, lr=0.01)),
        ("adamw", 0.01, lambda p: torch.optim.AdamW(p, lr=0.01)),
        (torch.optim.SGD, 0.1, lambda p: torch.optim.SGD(p, lr=0.1)),
        (torch.optim.Adagrad, 1e-3, torch.optim.Adagrad),
        (lambda p: torch.optim.SGD([{"params": list(p), "lr": 0.1}]), 1e-3, lambda p: torch.optim.SGD(p, lr=0.1)),
    ],
)
def test_an_optimizer_is_a_name_a_class_or_a_function(optimizer, lr, same):
    model = classifier()
    fit(model, (X, Y), steps=12, batch_size=16, trainers=1, optimizer=optimizer, lr=lr).wait()
    assert_equal(model, by_hand(same))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=12),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=20),
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
    ],
)
def test_a_schedule_may_be_any_of_torch(schedule):
    model = classifier()
    fit(model, (X, Y), steps=12, batch_size=16, trainers=1, optimizer=sgd, schedule=schedule).wait()
    assert_equal(model, by_hand(sgd, schedule))


def test_a_plateau_is_told_the_validation_loss():
    rates: list[float] = []
    fit(
        classifier(), (X, Y), steps=10, trainers=1, optimizer="sgd", lr=1.0, validate=(TEST_X, TEST_Y), every=1,
        schedule=lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.5),
        on_step=lambda step: rates.extend(step.run._shared._rates),
    ).wait()  # fmt: skip
    assert rates[0] == 1.0 and rates[-1] < 0.01


def test_gradients_of_several_batches_make_one_update():
    model = classifier()
    run = fit(model, (X, Y), steps=12, batch_size=16, trainers=1, optimizer=sgd, accumulate=3).wait()
    assert_equal(model, by_hand(sgd, accumulate=3))
    assert run.steps == 12 and run._shared.updates == 4


def test_gradients_that_are_left_at_the_end_make_an_update_too():
    run = fit(classifier(), (X, Y), steps=7, trainers=1, optimizer=sgd, accumulate=3).wait()
    assert run._shared.updates == 3
    assert all(parameter.grad is None for parameter in run.model.parameters())


# ---------------------------------------------------------------- any batch that a torch loop takes


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)


class Adds(Layer):
    """A model with two inputs."""

    def forward(self, a, b=0.0):
        return self.layer(a + b)


class ReturnsLoss(Adds):
    """A model in the manner of Hugging Face."""

    def forward(self, a, b=0.0, labels=None):
        scores = super().forward(a, b)
        return SimpleNamespace(loss=F.cross_entropy(scores, labels), logits=scores)


class ReturnsDict(ReturnsLoss):
    def forward(self, a, b=0.0, labels=None):
        return vars(super().forward(a, b, labels))


class ReturnsTuple(ReturnsLoss):
    def forward(self, a, b=0.0, labels=None):
        return tuple(vars(super().forward(a, b, labels)).values())


class OfPairs(Layer):
    def forward(self, pair):
        return self.layer(pair[0] + pair[1])


class Rows(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, row):
        return {"a": X[row], "b": X[row], "labels": Y[row]}


class RowsWithoutLength(IterableDataset):
    def __iter__(self):
        return (Rows()[row] for row in range(16))


class RowsWithoutABase:
    def __len__(self):
        return 16

    def __getitem__(self, row):
        if row >= 16:
            raise IndexError
        return X[row], X[row], Y[row]


@dataclass
class Graph:
    x: torch.Tensor
    y: torch.Tensor
    num_graphs: int

    def to(self, device):
        return Graph(self.x.to(device), self.y.to(device), self.num_graphs)


class OfEncodings(Layer):
    def forward(self, encoding):
        return self.layer(encoding.data["a"] + encoding.data["b"])


class OfGraphs(Layer):
    def forward(self, graph):
        return self.layer(graph.x + graph.x)


Named = namedtuple("Named", "a b labels")
A, LABELS = X[:16], Y[:16]
WORDS = {"a": A, "b": A, "labels": LABELS}


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (Adds, (A, A, LABELS)),
        (Adds, [(A, A, LABELS)]),
        (Adds, [[A, A, LABELS]]),
        (Adds, [Named(A, A, LABELS)]),
        (Adds, TensorDataset(A, A, LABELS)),
        (Adds, RowsWithoutABase()),
        (Adds, [WORDS]),
        (Adds, [({"a": A, "b": A}, LABELS)]),
        (Adds, (A.numpy(), A.numpy(), LABELS.numpy())),
        (Adds, [(A.numpy(), A.numpy(), LABELS.numpy())]),
        (OfPairs, [((A, A), LABELS)]),
        (OfEncodings, [(UserDict({"a": A, "b": A}), LABELS)]),
        (OfGraphs, [Graph(A, LABELS, 16)]),
        *((model, data) for model in (ReturnsLoss, ReturnsDict, ReturnsTuple) for data in (
            [WORDS], [UserDict(WORDS)], Rows(), DataLoader(Rows(), 16), DataLoader(RowsWithoutLength(), 16),
            RowsWithoutLength(),
        )),
    ],
)  # fmt: skip
def test_a_batch_may_have_any_form_that_a_loop_takes(model, data):
    ours, plain = model(), Adds()
    run = fit(ours, data, steps=3, batch_size=16, trainers=1, optimizer=sgd).wait()
    optimizer = sgd(plain.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(A, A), LABELS).backward()
        optimizer.step()
    assert_equal(ours, plain)
    assert [step.samples for step in run.history] == [16] * 3


@pytest.mark.parametrize("data", [TensorDataset(X), [X], [(X,)], (X, X)])
def test_a_batch_of_one_tensor_is_input_and_y(data):
    ours = nn.Linear(4, 4)
    run = fit(ours, data, steps=2, batch_size=60, loss=lk.losses.mse, trainers=1).wait()
    assert run.history[0].samples == 60


@pytest.mark.parametrize("data", [TensorDataset, torch.clone, torch.Tensor.numpy])
def test_a_language_model_learns_from_its_tokens(data):
    torch.manual_seed(0)
    tokens = torch.arange(8).repeat(50, 2)[:, :9]
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8))
    run = fit(
        model, data(tokens), loss=lk.losses.next_token, epochs=60, batch_size=25, trainers=2, lr=0.03,
        validate=(tokens, tokens), metrics=["perplexity", "accuracy"],
    ).wait()  # fmt: skip
    assert run.validations[-1].metrics["perplexity"] < 1.2
    assert run.validations[-1].metrics["accuracy"] == 1.0


def test_tokens_that_are_input_and_y_need_a_loss_that_says_which_token_is_predicted():
    tokens = torch.arange(8).repeat(5, 2)[:, :9]
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8))
    with pytest.raises(ValueError, match=r"of tokens \[5, 9\] is input and y.*next_token, or loss=lk\.losses\.each_t"):
        fit(model, tokens, steps=1).wait()
    fit(model, tokens, loss=lk.losses.each_token, steps=1).wait()
    fit(model, (tokens, tokens), steps=1).wait()  # y is given as such


@pytest.mark.parametrize(("batch_size", "most"), [(64, 256), (3, 12)])
def test_who_trains_on_few_rows_at_once_does_not_validate_on_many(batch_size, most):
    class Seen(nn.Linear):
        rows: ClassVar[list[int]] = []

        def forward(self, x):
            if not self.training:
                self.rows.append(len(x))
            return super().forward(x)

    fit(Seen(4, 2), (X, Y), steps=1, batch_size=batch_size, validate=(torch.zeros(300, 4), torch.zeros(300))).wait()
    assert max(Seen.rows) == most and sum(Seen.rows) == 300


@pytest.mark.parametrize(
    ("model", "data", "options", "said"),
    [
        (Adds, (X, Y), {"loss": nn.CrossEntropyLoss(reduction="none")}, r"the loss has the shape \[60\]"),
        (Adds, (X, Y), {"loss": lambda outputs, y: 3.0}, "the loss is a float"),
        (Adds, (X, Y), {"loss": lambda outputs, y: outputs.detach().sum()}, "depends on no parameter"),
        (Adds, (X, Y), {"loss": lambda outputs, y: torch.ones((), requires_grad=True)}, "depends on no parameter"),
        (Adds, [{"a": X}], {}, "there is no y in this batch"),
        (Adds, [(X, None)], {}, "there is no y in this batch"),
        (Adds, [({"a": X}, ["text"])], {}, "there is no y in this batch"),
        (lambda: Adds().requires_grad_(False), (X, Y), {}, "all parameters are frozen"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_in_words_at_the_first_batch(model, data, options, said):
    run = fit(model(), data, steps=1000, batch_size=60, trainers=2, **options)
    with pytest.raises(ValueError, match=said):
        run.wait(10)
    assert run.steps == 0
