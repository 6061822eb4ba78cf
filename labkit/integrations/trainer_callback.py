"""A callback for the Trainer of Hugging Face. Importing this imports what transformers has for training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from labkit.integrations.reporting import Reporter

if TYPE_CHECKING:
    from labkit.swarm import Swarm

_SPEED = ("_runtime", "_per_second", "_flos", "_jit_compilation_time")  # of summaries


class TransformersCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not looked into
    """Shows the training of a Hugging Face Trainer in a swarm's dashboard and loggers.

    It reports what the Trainer logs: its loss, learning rate, gradient norm and epoch each
    `logging_steps` updates (500 by default, which for a short training is too rare), and what
    it evaluates. `eval_loss` becomes "validation loss". Of several processes the first one
    reports.

    Example:
        from labkit.integrations import TransformersCallback

        arguments = TrainingArguments("out", logging_steps=10)
        trainer = Trainer(model, arguments, callbacks=[TransformersCallback(swarm)], …)

    Args:
        swarm: The swarm whose dashboard and loggers show it.
    """

    def __init__(self, swarm: Swarm) -> None:
        self._reporter = Reporter(swarm)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin anew: the steps of a training that is resumed may have been seen before."""
        self._reporter.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Report what the Trainer logs, but for its summary at the end."""
        if logs is None or not state.is_world_process_zero:
            return
        measured = {name: value for name, value in logs.items() if not name.endswith(_SPEED) and name != "train_loss"}
        self._reporter.report(state.global_step, measured)
