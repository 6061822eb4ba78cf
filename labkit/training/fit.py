"""`lk.fit`: the options of a training run, in one signature. It makes a `TrainConfig` of them and starts a `Run`.

A batch's way begins here.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from labkit.suggest import suggest_options
from labkit.training.forward import LossFunction
from labkit.training.metrics import Metrics
from labkit.training.optimizers import OptimizerFactory, ScheduleFactory
from labkit.training.run import Run
from labkit.training.trainer import TrainConfig
from labkit.training.validation import OnStep


@suggest_options
def fit(
    model: nn.Module, data: Any, *, loss: LossFunction | None = None, optimizer: str | OptimizerFactory | None = None,
    validate: Any = None, every: int | None = None, metrics: Metrics | None = None, patience: int | None = None,
    keep_best: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None, steps: int | None = None, epochs: float | None = None, batch_size: int = 64,
    trainers: int = 8, lr: float = 1e-3, schedule: str | ScheduleFactory = "constant", accumulate: int = 1,
    balance: float = 0.0, seed: int = 0, max_failures: int = 50, beta1: float = 0.9, warmup: int = 0,
    clip_grad_norm: float | None = None, age_power: float = 0.0, compensation: float = 0.0,
) -> Run:  # fmt: skip
    """Train a model in the background. Returns at once.

    Many trainers share the model; each computes gradients for a batch of its own and applies
    them when it has them. The experts of MoE layers are trained by their servers meanwhile.

    Example:
        run = lk.fit(model, (x, y), epochs=5, validate=(val_x, val_y), metrics="accuracy")
        run.wait()

    Args:
        model: Any module; its `swarm.moe` layers call experts. Its modules keep the mode they
            are in. If all of them are in eval mode they are trained in train mode, but for
            those whose parameters are frozen. Trainers share what `torch.compile(model)` has
            compiled; after `model.compile()`, which wraps nothing, they run it as it is.
        data: `(x, y)` tensors or arrays, `(x1, x2, y)` with several inputs, a dictionary of
            them, tokens `[rows, positions]`, what `lk.load` returns (its training part), a
            torch `Dataset`, or any iterable of batches, such as a `DataLoader`, which is gone
            through again and again. A batch is a tuple whose last part is y, a dictionary,
            with which the model is called as `model(**batch)`, or a tensor, which is both.
            Batches are moved to where the model is.
        loss: A function of outputs and y that returns a mean, such as those of `lk.losses`.
            Default: the loss that the model returns itself, or cross-entropy; tokens that are
            both input and y need one that says what is predicted, such as `next_token`.
        optimizer: "adam" (default), "adamw", "sgd", a class, or a function that makes an
            optimizer from the model's own parameters.
        validate: Validation data, in any form that data may have; of what `lk.load` returns
            the rows for testing are taken. One trainer validates a copy of the model while
            the others go on, on 256 rows at once, or those of four batches if that is less.
            `run.validations` has the results.
        every: Steps from one validation to the next; there is one at the end, too. Default:
            those of an epoch.
        metrics: What to measure besides the validation loss: "accuracy", "perplexity", a
            function of outputs and y, several of them in a list, or by name in a dictionary.
            Means of functions are weighted with the rows of each batch; what needs all data
            at once may be an object with `update(outputs, y)` and `compute()`.
        patience: The run stops when the validation loss has not improved in so many
            validations in a row; `run.best` is the model at its best. Default: it does not.
        keep_best: A folder to which the run is saved, experts and all, whenever a validation
            loss is the lowest so far; `lk.resume` goes on from there. Trainers go on while
            one validates, so it is saved a few steps later. Default: it is not.
        on_step: Called after each step, one call at a time, with a record that has `step`,
            `loss`, `metrics` (of the validation after this step), `samples`, `seconds`,
            `staleness` and `run`: `step.run.stop()` ends the run. An error in it does, too.
        steps: Batches to train on. Give either steps or epochs.
        epochs: How often to go through the data; 0.5 is half of it.
        batch_size: Rows of a batch, where the data are not batches already. Default 64.
        trainers: Batches in flight at the same time. Default 8.
        lr: Learning rate of an optimizer given by name, and of a class if you give one.
            Default 1e-3.
        schedule: Of the learning rate: "constant" (default), "linear", down to 0 over the
            run, or a function of the optimizer that makes an `LRScheduler`. It takes a step
            after each update; `ReduceLROnPlateau` after each validation.
        accumulate: Batches whose mean gradient makes one update. Default 1.
        balance: Weight of the MoE layers' load-balancing losses. Default 0.
        seed: For the order of the rows. Default 0.
        max_failures: The run ends when so many batches in a row have failed. Default 50. It
            ends at once where no batch can succeed, as with a grid that does not exist.
        beta1: Momentum of Adam. Default 0.9; less may be better where gradients are stale.
        warmup: Updates over which the learning rate rises to its value. Default 0.
        clip_grad_norm: Bound on the norm of all gradients of an update together. Default
            None: no bound.
        age_power: P, where the learning rate of an update is multiplied by
            (1 + staleness)^-p. Default 0.
        compensation: λ of delay compensation for stale gradients (Zheng et al. 2017). Default
            0.

    Returns:
        The run: Look at `run.loss` and `run.samples_per_s`, `run.wait()` for its end,
            `run.stop()` it.

    Raises:
        ValueError: An option is out of its range, or the data have none of these forms.
        SwarmClosed: The swarm of an MoE layer is not open.
        TrainingFailed: An earlier run still trains this model and does not stop.
    """
    config = TrainConfig(
        steps=steps, epochs=epochs, batch_size=batch_size, trainers=trainers, lr=lr, balance=balance, seed=seed,
        max_failures=max_failures, schedule=schedule, accumulate=accumulate, every=every, patience=patience,
        beta1=beta1, warmup=warmup, clip_grad_norm=clip_grad_norm, age_power=age_power, compensation=compensation,
    )  # fmt: skip
    return Run(
        model, data, config, loss, optimizer, validate=validate, metrics=metrics, on_step=on_step, keep_best=keep_best
    )
