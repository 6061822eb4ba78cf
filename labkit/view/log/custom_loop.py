"""`Swarm.log`: what a training loop of one's own tells the dashboard and the loggers, checked and made events."""

from __future__ import annotations

import logging
import math
import operator
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from labkit.events import Emit, MetricsLogged, StepFinished
from labkit.view.collect.telemetry import Telemetry

logger = logging.getLogger(__name__)

MAX_METRICS = 100  # in one call
MAX_NAME = 100  # characters
MAX_STEP = 1 << 53
WANTED = "log a number, or a tensor or array with one element"


class CustomLoop:
    """The loop's steps so far. May be used from any thread; the network is not asked.

    Args:
        telemetry: Is told the last step, for the headline.
        emit: Gets the events.
        name: The swarm.
        closed: Whether it is closed.
    """

    def __init__(
        self, telemetry: Telemetry, emit: Emit, name: str = "", closed: Callable[[], bool] = lambda: False
    ) -> None:
        self._telemetry = telemetry
        self._emit = emit
        self._name = name
        self._closed = closed
        self._warned = False
        self._lock = threading.Lock()
        self._step = 0
        self._at: float | None = None  # when a loss was logged last

    def log(self, step: Any, loss: Any, samples: Any, metrics: Mapping[str, Any]) -> None:
        """The implementation of `Swarm.log`."""
        if len(metrics) > MAX_METRICS:
            raise ValueError(f"{len(metrics)} metrics in one call: at most {MAX_METRICS} are taken")
        numbers = {_name(name): to_number(name, value) for name, value in metrics.items()}
        known_loss = None if loss is None else to_number("loss", loss)
        count = 0 if samples is None else _whole("samples", samples)
        number, now = None if step is None else _whole("step", step), time.monotonic()
        with self._lock:
            number = self._step + 1 if number is None else number
            seconds = 0.0 if self._at is None else now - self._at
            self._step = number
            if known_loss is not None:
                self._at = now
        if self._closed():
            if not self._warned:
                self._warned = True
                logger.warning("the swarm %r is closed here: what is logged to it is shown nowhere", self._name)
            return
        if known_loss is not None:
            self._telemetry.logged_step = number, known_loss, now
            self._emit(StepFinished(at=now, step=number, loss=known_loss, samples=count, seconds=seconds, staleness=0))
        if numbers:
            self._emit(MetricsLogged(at=now, step=number, metrics=numbers))


def to_number(name: str, value: Any) -> float:
    """Returns a number, or the one in a tensor or an array, as a float. Raises `TypeError`, `ValueError`."""
    shape = getattr(value, "shape", None)
    if shape is not None and math.prod(shape) != 1:
        raise ValueError(f"{name} has the shape {list(shape)}: log one number, such as its mean, {name}.mean()")
    item = getattr(value, "item", None)
    if callable(item):
        value = item()  # of torch, numpy, jax: waits for the device, and forgets the graph
    if value is None or isinstance(value, str | bytes | complex):
        raise TypeError(f"{name}={value!r} is no number: {WANTED}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float") from None
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise TypeError(
            f"{name} is a {kind}, and no number: log a number, or a tensor or array with one element"
        ) from None


def _whole(name: str, value: Any) -> int:
    number = to_number(name, value)
    if not (0 <= number <= MAX_STEP and number == int(number)):
        raise ValueError(f"{name}={value!r}: a whole number, 0 or more")
    return operator.index(value) if isinstance(value, int) else int(number)


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name or len(name) > MAX_NAME:
        raise ValueError(f"{name!r}: the name of a metric is a text of 1 to {MAX_NAME} characters")
    return name
