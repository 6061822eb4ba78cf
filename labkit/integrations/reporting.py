"""What a training loop of another library measures, told to a swarm once, under the names of our own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from labkit.errors import LabkitError, SwarmClosed

if TYPE_CHECKING:
    from labkit.swarm import Swarm

logger = logging.getLogger(__name__)

_VALIDATION = ("eval_", "eval/", "val_", "val/", "valid_", "valid/", "validation_", "validation/")
_WORDS = {"grad_norm": "gradient norm", "lr": "learning rate"}
_RESERVED = ("", "step", "samples")  # what `Swarm.log` calls its own, and a loop means otherwise
MAX_METRICS = 100  # that `Swarm.log` takes in a call
MAX_NAME = 100  # characters of a metric's name there
_TRAINING = ("train_", "train/", "training_", "training/")


def display_name(metric: str) -> str:
    """A metric's name as the dashboard shows it: `eval_f1` and `val/f1` -> "validation f1", `train_f1` -> "f1"."""
    for prefix in _VALIDATION:
        if metric.startswith(prefix):
            return f"validation {display_name(metric.removeprefix(prefix))}"
    for prefix in _TRAINING:
        if metric.startswith(prefix):
            return display_name(metric.removeprefix(prefix))
    if metric in _WORDS:
        return _WORDS[metric]
    return metric.replace("_", " ").replace("/", " ").strip()


class Reporter:
    """Tells a swarm what was measured. It never disturbs the training: a swarm that is closed costs one warning.

    Args:
        swarm: The swarm whose dashboard and loggers show it.
    """

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._told: dict[str, int] = {}  # name -> the last step that it was told for
        self._is_open = True

    def begin(self) -> None:
        """Note that a training begins, whose steps may have been seen before: it is resumed, or the next one."""
        self._told.clear()

    def report(self, step: int, measured: Mapping[str, Any]) -> None:
        """Report what was measured after a step.

        A number that was told for this step is not told again. What is no number, such as a text, is left out.

        Args:
            step: Updates that were applied so far.
            measured: Numbers by name, as the library calls them. `loss` is that of the training.
        """
        numbers = {display_name(name)[:MAX_NAME]: _number(value) for name, value in measured.items()}
        new: dict[str, Any] = {
            name: number
            for name, number in numbers.items()
            if number is not None and name not in _RESERVED and self._told.get(name) != step
        }
        if not (self._is_open and new.keys() - {"epoch"}):
            return
        names = list(new)
        try:
            if self._swarm.closed:
                raise SwarmClosed("it is closed")
            for start in range(0, len(names), MAX_METRICS):
                self._swarm.log(step=step, **{name: new[name] for name in names[start : start + MAX_METRICS]})
        except LabkitError as error:
            self._is_open = False
            logger.warning("the training goes on, but its swarm hears no more of it: %s", error)
        self._told.update(dict.fromkeys(new, step))


def _number(value: Any) -> float | None:
    """A number, or a tensor or array of one, as a float; None for anything else."""
    if isinstance(value, (str, bytes, bool)) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
