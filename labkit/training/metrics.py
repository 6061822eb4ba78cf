"""What is measured on data: accuracy, loss, perplexity, and functions of the caller's; `lk.evaluate` and validations.

Each number is that of the whole data, however they are cut into batches.
"""

# n: rows; t: positions of a sequence; C: classes

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.suggest import did_you_mean, suggest_options
from labkit.training.batches import Batch, one_pass
from labkit.training.forward import LossFunction, call, loss_of, on_device_of
from labkit.training.given_losses import check_loss, function_of, is_causal, options_of, terms
from labkit.training.losses import (
    IGNORED,
    binary_cross_entropy,
    check_classes,
    check_order,
    classes_in_dim_1,
    each_token,
    next_token,
    probabilities_in_dim_1,
    scores_of,
)
from labkit.training.replicas import copy_model

Metric = str | Callable[[Any, Any], Any] | Any  # a name, a function of outputs and y, or an object (see `as_meter`)
Metrics = Metric | Sequence[Metric] | Mapping[str, Metric]  # several, in a list or by name
NAMES = ("accuracy", "loss", "perplexity")
VALIDATION_LOSS = "validation loss"


class MeasuringStopped(Exception):
    """The data have not been gone through, since the caller wanted an end."""


class Meter(Protocol):
    """Measures one number over all batches of some data."""

    def add(self, outputs: Any, batch: Batch) -> None:
        """Take a batch into account."""

    def value(self) -> float:
        """The number. Raises `ValueError` if there is none."""


class MeanLoss:
    """The mean loss, weighted with the number of labels, or of rows, of each batch; or the exponential of it."""

    def __init__(self, loss_function: LossFunction | None, *, exponential: bool = False) -> None:
        self._function, self._exponential = loss_function, exponential
        self._sum, self._count = 0.0, 0.0

    def add(self, outputs: Any, batch: Batch) -> None:
        """Take a batch into account."""
        count = terms(self._function, outputs, batch.target, batch.rows)
        if count:
            self._sum += count * loss_of(outputs, batch, self._function).item()
            self._count += count

    def value(self) -> float:
        """The mean. Raises `ValueError` if no label counts."""
        if not self._count:
            raise ValueError("no label counts, so there is no loss to measure")
        mean = self._sum / self._count
        if not self._exponential:
            return mean
        return math.exp(mean) if mean < 700 else math.inf


class Accuracy:
    """The share of labels that get the highest score, as -100 does not count.

    Scores are [n, C] for labels [n] or [n, 1], or one-hot rows; [n, t, C] for [n, t]; [n, C, ...] for [n, ...]. One
    number a row, [n] or [n, 1], says yes or no: logits are yes above 0, probabilities above a half. A NaN is wrong.

    Args:
        loss_function: That of the model; None for its own, or cross-entropy. It says whether one number a row is a
            logit, else that has to be seen from the numbers; whether position i of the outputs predicts label i + 1;
            which dimension has the classes, where there are as many as positions; and which labels do not count.
    """

    def __init__(self, loss_function: LossFunction | None = None) -> None:
        logits = (binary_cross_entropy, F.binary_cross_entropy_with_logits)
        is_logits = loss_function in logits or isinstance(loss_function, nn.BCEWithLogitsLoss)
        is_probability = loss_function is F.binary_cross_entropy or isinstance(loss_function, nn.BCELoss)
        self._logits = True if is_logits else False if is_probability else None
        self._shifted = loss_function is next_token
        self._own = loss_function is None
        self._ignored = options_of(loss_function).get("ignore_index")
        self._classes_last = loss_function is each_token
        self._order_known = self._classes_last or function_of(loss_function) is F.cross_entropy
        self._right = self._count = 0
        self._right_of_probabilities = 0
        self._yes_or_no = False
        self._probabilities = True  # whether all numbers could be

    def add(self, outputs: Any, batch: Batch) -> None:
        """Take a batch into account."""
        scores, y = scores_of(outputs), batch.target
        if not isinstance(y, Tensor):
            raise ValueError("accuracy needs labels, and there is no y in this batch")
        of_positions = scores.ndim == 3 and y.shape == scores.shape[:2]
        if of_positions and (self._shifted or (self._own and is_causal(outputs, y))):
            scores, y = scores[:, :-1].movedim(-1, 1), y[:, 1:]
        elif of_positions and (self._classes_last or batch.by_position):
            scores = scores.movedim(-1, 1)
        elif not self._order_known:
            check_order(scores, y)
        if scores.ndim == 0 or len(scores) != len(y if y.ndim else [0]):
            raise ValueError(f"the model returned {list(scores.shape)} for y {list(y.shape)}: as many rows are needed")
        if scores.ndim == 1 or (scores.ndim == 2 and scores.shape[1] == 1):
            self._add_yes_or_no(scores, y)
            return
        if scores.shape == y.shape:
            scores, y = _classes_of(scores, y)
        scores, y = classes_in_dim_1(scores, y)
        counts = y != IGNORED
        if self._ignored is not None:
            counts &= y != self._ignored
        check_classes(y, counts, scores.shape[1])
        right = (scores.argmax(1) == y) & ~scores.isnan().any(1)
        self._right += int((right & counts).sum())
        self._count += int(counts.sum())

    def _add_yes_or_no(self, scores: Tensor, y: Tensor) -> None:
        scores, y = scores.reshape(-1), y.reshape(len(scores), -1)
        if y.shape[1] != 1:
            raise ValueError(f"the model returned one number a row, and y has {y.shape[1]}")
        counts = y[:, 0] != IGNORED
        scores, y = scores[counts], y[:, 0][counts]
        if not ((y == 0) | (y == 1)).all():
            raise ValueError(
                "the model returned one number a row, which can only say yes or no, and y has more than 0 and 1; for "
                "numbers measure metric='loss' with loss=lk.losses.mse"
            )
        yes = y == 1
        self._yes_or_no = True
        self._probabilities &= bool(((scores >= 0) & (scores <= 1)).all())
        self._right += int((((scores > 0) == yes) & ~scores.isnan()).sum())
        self._right_of_probabilities += int((((scores > 0.5) == yes) & ~scores.isnan()).sum())
        self._count += len(y)
        self._logits = self._logits if self._logits is not None or self._probabilities else True

    def value(self) -> float:
        """The share. Raises `ValueError` if no label counts, or it is not clear what a number of the model means."""
        if not self._count:
            raise ValueError("no label counts, so there is no accuracy to measure")
        if not self._yes_or_no or self._logits or self._right_of_probabilities == self._right:
            return self._right / self._count
        if self._logits is False:
            return self._right_of_probabilities / self._count
        raise ValueError(
            "the model returned one number a row, each from 0 to 1: are they logits, where yes is above 0, or "
            "probabilities, where it is above 0.5? Give loss=, which tells, or a metric: "
            "metric=lambda outputs, y: ((outputs > 0.5) == (y > 0.5)).float().mean()"
        )


def _classes_of(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and one-hot rows [n, C], or [n, t, C] at each position -> scores [n, C, ...] and classes [n, ...]."""
    try:
        scores, rows = probabilities_in_dim_1(scores, y)
    except ValueError:
        raise ValueError(
            f"y has the shape of the scores, {list(y.shape)}, and its rows are not one-hot: where a row has several "
            "labels, or numbers, give a function as the metric"
        ) from None
    return scores, rows.argmax(1)


class MeanOfFunction:
    """The mean of a function of outputs and y, weighted with the rows of each batch."""

    def __init__(self, name: str, function: Callable[[Any, Any], Any]) -> None:
        self._name, self._function = name, function
        self._sum, self._rows = 0.0, 0

    def add(self, outputs: Any, batch: Batch) -> None:
        """Take a batch into account."""
        self._sum += batch.rows * _number(self._function(outputs, batch.target), self._name)
        self._rows += batch.rows

    def value(self) -> float:
        """The mean. Raises `ValueError` if there were no rows."""
        if not self._rows:
            raise ValueError("there are no rows to measure on")
        return self._sum / self._rows


class OfAll:
    """What an object with `update(outputs, y)` and `compute()` makes of all data, such as those of torchmetrics."""

    def __init__(self, name: str, metric: Any) -> None:
        self._name = name
        self._metric = copy.deepcopy(metric)
        if hasattr(metric, "reset"):
            self._metric.reset()

    def add(self, outputs: Any, batch: Batch) -> None:
        """Take a batch into account."""
        self._metric.update(outputs, batch.target)

    def value(self) -> float:
        """The number."""
        return _number(self._metric.compute(), self._name)


def _number(value: Any, name: str) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"the metric {name!r} gave a tensor of shape {list(value.shape)}; one number is needed")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"the metric {name!r} gave {value!r}; a number is needed") from None


def named(metrics: Metric | Sequence[Metric] | Mapping[str, Metric] | None) -> dict[str, Metric]:
    """Metrics by name. Raises `ValueError` for what is none."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        listed = list(metrics) if isinstance(metrics, (tuple, list, set)) else [metrics]
        names = [one if isinstance(one, str) else getattr(one, "__name__", type(one).__name__) for one in listed]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"several metrics are called {twice!r}; give them names: metrics={{'one': …, 'two': …}}")
        metrics = dict(zip(names, listed, strict=True))
    for name, metric in metrics.items():
        if isinstance(metric, str) and metric not in NAMES:
            raise ValueError(
                f"metric {metric!r}: one of {', '.join(NAMES)}, or a function of outputs and y"
                f"{did_you_mean(metric, NAMES)}"
            )
        if not (isinstance(name, str) and (isinstance(metric, str) or _is_object(metric) or callable(metric))):
            raise ValueError(f"metric {name!r}: a name, or a function of outputs and y, not {metric!r}")
    return dict(metrics)


def _is_object(metric: Any) -> bool:
    return hasattr(metric, "update") and hasattr(metric, "compute")


def as_meter(name: str, metric: Metric, loss_function: LossFunction | None) -> Meter:
    """What measures a metric."""
    if metric == "accuracy":
        return Accuracy(loss_function)
    if isinstance(metric, str):
        return MeanLoss(loss_function, exponential=metric == "perplexity")
    return OfAll(name, metric) if _is_object(metric) else MeanOfFunction(name, metric)


@torch.no_grad()
def measure(
    replica: nn.Module,
    data: Any,
    metrics: Mapping[str, Metric],
    loss_function: LossFunction | None,
    batch_size: int,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Measure on all data.

    Args:
        replica: The model, in eval mode.
        data: In one of the forms that `batches` knows.
        metrics: What to measure, by name.
        loss_function: Of outputs and y; None for the model's own, or cross-entropy.
        batch_size: Rows that the model gets at once, where the data are not batches already.
        stopped: Asked before each batch, whether to stop.

    Returns:
        The numbers by name.

    Raises:
        MeasuringStopped: `stopped` said so.
        ValueError: There are no data, or a metric cannot be measured on them.
    """
    meters = {name: as_meter(name, metric, loss_function) for name, metric in metrics.items()}
    for batch in one_pass(data, batch_size):
        if stopped():
            raise MeasuringStopped
        batch = on_device_of(replica, batch)
        outputs = call(replica, batch)
        for meter in meters.values():
            meter.add(outputs, batch)
    return {name: meter.value() for name, meter in meters.items()}


@suggest_options
def evaluate(
    model: nn.Module, x: Any, y: Any = None, *, metric: Metric = "accuracy", loss: LossFunction | None = None,
    batch_size: int = 256,
) -> float:  # fmt: skip
    """Measure a model on data: its accuracy, the share of labels that it gets right, 0 to 1.

    It works on a copy of the model in eval mode, so a run may go on meanwhile. The experts
    are asked like in training, and do not learn from it.

    Example:
        data = lk.load("digits")
        lk.evaluate(model, data)
        lk.evaluate(model, data.test_x, data.test_y, metric="loss")

    Args:
        model: Gives a score for each class: [rows, ...] -> [rows, classes].
        x: Inputs [n, ...], beside y; or data in any form that `lk.fit` takes. Of what
            `lk.load` returns the rows for testing are taken.
        y: Labels [n], [n, 1], or [n, positions] for sequences, where -100 does not count; or
            one-hot rows. Default None: they are in x.
        metric: "accuracy" (default), "loss", "perplexity", or a function of outputs and y
            that returns a number, whose mean is weighted with the rows of each batch. What
            needs all data at once may be an object with `update(outputs, y)` and `compute()`.
        loss: The loss function of "loss" and "perplexity". Default: the model's own loss, or
            cross-entropy. One of your own is weighted with the rows of each batch. Accuracy
            goes by it, too: by its `ignore_index`, and by what is compared with what.
        batch_size: Rows that the model gets at once, where x are not batches already.
            Default 256.

    Raises:
        ValueError: There are no data, or labels and outputs do not fit together.
        NoExperts, NotEnoughExperts: The experts of an MoE layer did not answer.
        SwarmClosed: The swarm of an MoE layer is closed.
    """
    return evaluate_replica(copy_model(model), x, y, metric=metric, loss=loss, batch_size=batch_size)


def evaluate_replica(
    replica: nn.Module, x: Any, y: Any, *, metric: Metric, loss: LossFunction | None, batch_size: int
) -> float:
    """`evaluate`, of a copy of a model, which is put in eval mode."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")
    check_loss(loss)
    data = x if y is None else (x, y)
    if y is not None and not all(isinstance(part, Tensor) or hasattr(part, "__array__") for part in data):
        raise ValueError("x and y: two tensors or arrays; other forms of data have their labels in them, without y")
    return measure(replica.eval(), data, named({"it": metric}), loss, batch_size)["it"]
