"""A run's state: paused between two steps, saved, and gone on with as if nothing had happened."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from labkit.errors import LabkitError
from labkit.training import active_runs
from labkit.training.run import Run
from labkit.training.trainer import TrainConfig

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


class OneAfterTheOther(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


DATA = {
    "tensors": lambda: (X, Y),
    "Dataset": lambda: TensorDataset(X, Y),
    "shuffled by torch": lambda: DataLoader(TensorDataset(X, Y), 8, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(
        TensorDataset(X, Y), 8, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "without a length": lambda: DataLoader(OneAfterTheOther(), 8),
    "list of batches": lambda: list(zip(X.split(8), Y.split(8), strict=True)),
}
CONFIG = TrainConfig(steps=20, trainers=1, batch_size=8, schedule="linear", warmup=3, compensation=0.1)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("saved_at", [1, 7, 17])
def test_a_run_that_goes_on_from_a_saved_state_equals_one_that_was_never_interrupted(data, saved_at):
    whole, interrupted, other = model(), model(), model()
    torch.manual_seed(1)
    straight = Run(whole, data(), CONFIG).wait()

    torch.manual_seed(1)
    first = Run(interrupted, data(), CONFIG, emit=stopping(saved_at)).wait()
    second = Run(other, data(), CONFIG, _resume_from=first.state_dict()).wait()

    assert first.steps == saved_at and second.steps == 20
    assert [step.loss for step in second.history] == [step.loss for step in straight.history]
    assert all(torch.equal(other.state_dict()[name], value) for name, value in whole.state_dict().items())


def stopping(step: int):
    """A listener that stops the run that is going on after so many steps."""

    def stop(event):
        if event.step == step:
            for run in active_runs.runs:
                run.stop()

    return stop


def test_in_a_pause_nobody_is_in_the_middle_of_a_step():
    inside: set[int] = set()

    class Counted(nn.Linear):
        def forward(self, x):
            inside.add(threading.get_ident())
            outputs = super().forward(x)
            inside.discard(threading.get_ident())
            return outputs

    layer = Counted(4, 2)
    run = Run(layer, (X, Y), TrainConfig(steps=100_000, trainers=4, batch_size=8))
    for _ in range(20):
        with run.paused():
            steps, weight = run.steps, layer.weight.clone()
            assert not inside and run._shared.updates == steps
            run.wait(0.005)
            assert run.steps == steps and torch.equal(layer.weight, weight)
    run.stop()
    with run.paused():
        assert not run.running


def test_a_pause_says_when_a_step_takes_too_long():
    inside, go = threading.Event(), threading.Event()

    class Held(nn.Linear):
        def forward(self, x):
            inside.set()
            assert go.wait(10)
            return super().forward(x)

    run = Run(Held(4, 2), (X, Y), TrainConfig(steps=2, trainers=1))
    assert inside.wait(10)
    with pytest.raises(LabkitError, match="could not pause"), run.paused(timeout=0.05):
        pass
    go.set()
    assert run.wait().steps == 2


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)


def test_schedule_accumulated_gradients_and_validations_go_on_where_they_were():
    config = TrainConfig(
        steps=20, trainers=1, batch_size=8, schedule=cosine, accumulate=3, warmup=2, every=4, patience=9
    )

    def run(of: nn.Module, emit=None, state=None) -> Run:
        return Run(of, (X, Y), config, emit=emit, validate=(X, Y), metrics="accuracy", _resume_from=state).wait()

    whole, interrupted, other = model(), model(), model()
    torch.manual_seed(1)
    straight = run(whole)
    torch.manual_seed(1)
    state = run(interrupted, stopping(10)).state_dict()
    assert state["shared"]["gradients"] == 1
    second = run(other, state=state)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in whole.state_dict().items())
    assert second.validations == straight.validations and len(second.validations) == 5
    assert second.best is not None and straight.best is not None
    assert (second.best.step, second.best.loss) == (straight.best.step, straight.best.loss)


def test_a_run_may_be_saved_by_on_step():
    states: list[dict[str, Any]] = []

    def save(step):
        if step.step == 7:
            states.append(step.run.state_dict())

    whole, other = model(), model()
    torch.manual_seed(1)
    straight = Run(whole, (X, Y), CONFIG, on_step=save).wait()
    second = Run(other, (X, Y), CONFIG, _resume_from=states[0]).wait()
    assert [step.loss for step in second.history] == [step.loss for step in straight.history]
    assert all(torch.equal(other.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_the_state_of_another_model_optimizer_or_data_is_refused():
    state = Run(model(), (X, Y), CONFIG).wait().state_dict()
    with pytest.raises(ValueError, match="parameters, and that of the run that was saved"):
        Run(nn.Linear(4, 2), (X, Y), CONFIG, _resume_from={**state, "model": nn.Linear(4, 2).state_dict()})
    with pytest.raises(ValueError, match="shuffled in another way"):
        Run(model(), list(zip(X.split(8), Y.split(8), strict=True)), CONFIG, _resume_from=state)
