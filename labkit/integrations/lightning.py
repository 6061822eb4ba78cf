"""A callback for the Trainer of Lightning. Importing this imports lightning, or else pytorch_lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from labkit.integrations.reporting import Reporter, display_name

if TYPE_CHECKING:
    from labkit.swarm import Swarm

_OWN = ("loss", "loss step")  # what modules log of the loss, which we have ourselves


class LightningCallback(Callback):  # type: ignore[misc]  # lightning is not looked into
    """Shows the training of a Lightning Trainer in a swarm's dashboard and loggers.

    It reports the loss of each update (the mean over accumulated batches), the learning rate,
    the epoch, and whatever the module logs with `self.log`, validation included: `val_loss`
    becomes "validation loss". Of several processes the first one reports.

    Example:
        from labkit.integrations import LightningCallback

        trainer = Trainer(max_epochs=3, callbacks=[LightningCallback(swarm)])

    Args:
        swarm: The swarm whose dashboard and loggers show it.
    """

    def __init__(self, swarm: Swarm) -> None:
        self._reporter = Reporter(swarm)
        self._seen: dict[str, Any] = {}  # what the module had logged when we looked last
        self._logged: dict[str, Any] = {}  # what it has logged since the last update
        self._validated: dict[str, Any] = {}  # what the last validation was
        self._losses: list[float] = []  # of the batches since the last update
        self._step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew: the steps of a training that is resumed may have been seen before."""
        self._reporter.begin()
        self._losses, self._logged, self._step = [], {}, trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note what was logged before."""
        self._new(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report an update, after the last of the batches whose gradients it is made of."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            # With automatic optimization, Lightning has divided it by the number of batches to accumulate.
            share = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(float(loss) * share)
        self._logged |= self._new(trainer)
        if trainer.global_step == self._step:
            return
        measured, losses = self._logged, self._losses
        self._step, self._logged, self._losses = trainer.global_step, {}, []
        if losses:
            measured = {name: value for name, value in measured.items() if display_name(name) not in _OWN}
            measured["loss"] = sum(losses) / len(losses)
        if trainer.optimizers:
            measured["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        self._report(trainer, {**measured, "epoch": trainer.current_epoch})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report what the module logged for a whole epoch."""
        before = {name: float(value) for name, value in self._validated.items()}
        self._report(trainer, {n: value for n, value in self._new(trainer).items() if before.get(n) != float(value)})

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Note what was logged before."""
        self._new(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report what the module logged in a validation, under a name that says so."""
        self._validated = self._new(trainer)
        if not trainer.sanity_checking:
            named = {name: display_name(name) for name in self._validated}
            said = {name if told.startswith("validation ") else f"val_{name}": name for name, told in named.items()}
            self._report(trainer, {told: self._validated[name] for told, name in said.items()})

    def _new(self, trainer: Any) -> dict[str, Any]:
        """What the module has logged since we looked last. (Each value is a tensor of its own.)"""
        logged = dict(trainer.callback_metrics)
        new = {name: value for name, value in logged.items() if self._seen.get(name) is not value}
        self._seen = logged
        return new

    def _report(self, trainer: Any, measured: Mapping[str, Any]) -> None:
        if trainer.is_global_zero:
            self._reporter.report(trainer.global_step, measured)
