"""What a run tells while it goes on: validations, early stop, and the records that `on_step` gets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from labkit.training.batches import source_of
from labkit.training.forward import LossFunction
from labkit.training.metrics import VALIDATION_LOSS, Metrics, measure, named

VALIDATION_BATCH = 256  # rows that the model gets at once, where the data are not batches already; but not more than
FACTOR = 4  # times as many as in training: who trains on few rows at once has large ones, such as long sequences


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """A step that was done, as `on_step` gets it.

    Args:
        step: Its number, from 1.
        loss: The loss of its batch.
        metrics: What the validation after this step measured, by name; empty without one.
        samples: Rows of its batch.
        seconds: How long it took.
        staleness: Updates that other trainers made since its forward pass began.
        run: The `Run`; `step.run.stop()` ends it.
    """

    step: int
    loss: float
    metrics: Mapping[str, float]
    samples: int
    seconds: float
    staleness: int
    run: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class Validation:
    """A validation of the model of a run.

    Args:
        step: The step after which it was made.
        metrics: What it measured, by name.
    """

    step: int
    metrics: Mapping[str, float]

    @property
    def loss(self) -> float:
        """The validation loss."""
        return self.metrics[VALIDATION_LOSS]


@dataclass(frozen=True, slots=True)
class Best:
    """The model of a run at its lowest validation loss.

    `model.load_state_dict(run.best.state)` goes back to it.

    Args:
        step: The step after which it was validated.
        loss: The validation loss.
        state: The model's state, a copy. Experts are not part of it.
    """

    step: int
    loss: float
    state: Mapping[str, Any] = field(repr=False)


class Validator:
    """Validates the model of a run now and then.

    Args:
        data: The validation data.
        every: Steps from one validation to the next.
        metrics: What to measure besides the loss.
        loss_function: That of the run.
        patience: Validations in a row without an improvement after which the run is to stop; None for no such end.
        batch_size: Rows that the model gets at once in training.

    Raises:
        ValueError: There are no data, they have a wrong form, or a metric is unknown.
    """

    def __init__(
        self, data: Any, every: int, metrics: Metrics | None,
        loss_function: LossFunction | None, patience: int | None, batch_size: int = VALIDATION_BATCH,
    ) -> None:  # fmt: skip
        self._rows = min(VALIDATION_BATCH, FACTOR * batch_size)
        source_of(data, self._rows, seed=None)  # a wrong form is refused before the training
        self._data = data
        self._every = every
        self._metrics = {VALIDATION_LOSS: "loss", **named(metrics)}
        if VALIDATION_LOSS in named(metrics):
            raise ValueError(f"a metric cannot be called {VALIDATION_LOSS!r}, since that is measured in any case")
        self._loss_function = loss_function
        self._patience = patience
        self._without_improvement = 0
        self._lowest = math.inf  # validation loss so far
        self.improved = False  # whether the last validation has the lowest loss so far
        self.done: list[Validation] = []
        self.best: Best | None = None

    def is_due(self, step: int, last: int) -> bool:
        """Whether to validate after this step, where `last` is the last one."""
        return step % self._every == 0 or step == last

    def validate(self, replica: nn.Module, step: int, stopped: Callable[[], bool]) -> Validation:
        """Validate a copy of the model, in eval mode. Raises what `measure` and the model raise."""
        metrics = measure(replica, self._data, self._metrics, self._loss_function, self._rows, stopped)
        validation = Validation(step, metrics)
        self.done.append(validation)
        self.improved = validation.loss < self._lowest
        if self.improved:
            self._lowest = validation.loss
        best = math.inf if self.best is None or math.isnan(self.best.loss) else self.best.loss
        if self.best is None or validation.loss < best:
            self._without_improvement = 0
            if self._patience is not None:
                state = {name: _copied(value) for name, value in replica.state_dict().items()}
                self.best = Best(step, validation.loss, state)
        else:
            self._without_improvement += 1
        return validation

    @property
    def is_over(self) -> bool:
        """Whether the run is to stop."""
        return self._patience is not None and self._without_improvement >= self._patience

    def state_dict(self) -> dict[str, Any]:
        """All that was validated, as plain data and tensors."""
        best = None if self.best is None else (self.best.step, self.best.loss, dict(self.best.state))
        return {
            "done": [(one.step, dict(one.metrics)) for one in self.done],
            "best": best,
            "without_improvement": self._without_improvement,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.done = [Validation(step, metrics) for step, metrics in state["done"]]
        self._lowest = min((one.loss for one in self.done if not math.isnan(one.loss)), default=math.inf)
        self.best = None if state["best"] is None else Best(*state["best"])
        self._without_improvement = state["without_improvement"]


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


OnStep = Callable[[TrainingStep], object]
