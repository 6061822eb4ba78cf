"""Callbacks for the training loops of other libraries, in real trainings of a model with a swarm's layer in it."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import labkit as lk
from labkit.events import MetricsLogged, StepFinished
from labkit.integrations.reporting import Reporter, display_name

pytestmark = [  # what Lightning does itself, or advises to do
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


class Diary:
    """Stands in for a swarm: it keeps what `Swarm.log` is told."""

    closed = False

    def __init__(self) -> None:
        self.pages: list[dict[str, Any]] = []

    def log(self, *, step: int, loss: Any = None, **metrics: Any) -> None:
        self.pages.append({"step": step, **({} if loss is None else {"loss": loss}), **metrics})

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(page["step"], page[name]) for page in self.pages if name in page]

    def steps(self, name: str) -> list[int]:
        return [step for step, _ in self.curve(name)]


@pytest.fixture
def diary():
    return Diary()


@pytest.fixture(scope="module")
def swarm():
    with lk.Swarm(name="integrations") as swarm:
        swarm.serve("ffn", hidden=8, grid=(4,), servers=1, isolation="task")
        yield swarm


@pytest.fixture
def model(swarm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), swarm.moe(8, grid=(4,), k_best=2), nn.Linear(8, 2))


# ---------------------------------------------------------------- Hugging Face


class Classifier(nn.Module):
    """A model as the Trainer of Hugging Face takes it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x, labels=None):
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def hugging_face(model, folder, *callbacks, **options):
    from transformers import Trainer, TrainingArguments

    rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, **options,
    }  # fmt: skip
    return Trainer(
        Classifier(model), TrainingArguments(str(folder), **arguments), train_dataset=rows, eval_dataset=rows[:8],
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
        callbacks=list(callbacks),
    )  # fmt: skip


@pytest.fixture
def for_transformers(diary):
    from labkit.integrations import TransformersCallback

    return TransformersCallback(diary)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_hugging_face_training_is_shown_step_by_step(model, tmp_path, diary, for_transformers, accumulated):
    trainer = hugging_face(model, tmp_path, for_transformers, gradient_accumulation_steps=accumulated)
    trainer.train()
    assert diary.steps("loss") == diary.steps("learning rate") == diary.steps("gradient norm") == [2, 4, 6]
    assert diary.steps("validation loss") == diary.steps("validation accuracy") == [3, 6]
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert diary.curve("loss") == logged
    assert diary.steps("epoch") == [2, 3, 4, 6]
    shown = {name for page in diary.pages for name in page}
    assert shown == {
        "step",
        "loss",
        "learning rate",
        "gradient norm",
        "epoch",
        "validation loss",
        "validation accuracy",
    }


def test_a_resumed_hugging_face_training_goes_on_with_its_step_numbers(model, tmp_path, diary, for_transformers):
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "no"}
    hugging_face(model, tmp_path, for_transformers, max_steps=4, **options).train()
    hugging_face(model, tmp_path, for_transformers, max_steps=8, **options).train(resume_from_checkpoint=True)
    assert diary.steps("loss") == [2, 4, 6, 8]


def test_only_the_first_process_of_a_hugging_face_training_reports(model, tmp_path, diary, for_transformers):
    trainer = hugging_face(model, tmp_path, for_transformers)
    trainer.state.is_world_process_zero = False
    for_transformers.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
    assert diary.pages == []


# ---------------------------------------------------------------- Lightning


def lightning(model, callback, epochs=2, package="lightning.pytorch", **options):
    """Train it; returns the trainer and the loss of every batch."""
    library = pytest.importorskip(package)
    losses = []

    class Module(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.body(batch[0]), batch[1])
            self.log("train_loss", loss)
            self.log("train_margin", loss * 2, on_step=False, on_epoch=True)
            losses.append(loss.item())
            return loss

        def validation_step(self, batch, batch_idx):
            logits = self.body(batch[0])
            self.log("val_loss", F.cross_entropy(logits, batch[1]))
            self.log("acc", (logits.argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = library.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    data = DataLoader(TensorDataset(X, Y), batch_size=8)
    trainer.fit(Module(), data, DataLoader(TensorDataset(X[:8], Y[:8]), batch_size=8))
    return trainer, losses


@pytest.fixture
def for_lightning(diary):
    from labkit.integrations import LightningCallback

    return LightningCallback(diary)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_lightning_training_is_shown_step_by_step(model, diary, for_lightning, package):
    _, losses = lightning(model, for_lightning, package=package)
    assert diary.steps("loss") == diary.steps("learning rate") == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in diary.curve("loss")] == pytest.approx(losses)
    assert diary.steps("validation loss") == diary.steps("validation acc") == diary.steps("margin") == [3, 6]
    assert [epoch for _, epoch in diary.curve("epoch")] == [0, 0, 0, 1, 1, 1]
    shown = {name for page in diary.pages for name in page}
    assert shown == {"step", "loss", "learning rate", "margin", "epoch", "validation loss", "validation acc"}


def test_batches_that_lightning_accumulates_are_one_step_with_their_mean_loss(model, diary, for_lightning):
    _, losses = lightning(model, for_lightning, accumulate_grad_batches=2)
    assert diary.steps("loss") == [1, 2, 3, 4]  # of 2, 1, 2 and 1 batches
    means = [sum(losses[:2]) / 2, losses[2], sum(losses[3:5]) / 2, losses[5]]
    assert [loss for _, loss in diary.curve("loss")] == pytest.approx(means)


# ---------------------------------------------------------------- both


def test_names_are_those_of_the_dashboard():
    assert [display_name(name) for name in ("eval_loss", "val/f1_macro", "train_acc", "learning_rate", "loss")] == [
        "validation loss", "validation f1 macro", "acc", "learning rate", "loss",
    ]  # fmt: skip


def test_what_is_no_number_is_left_out_and_nothing_is_told_twice(diary):
    reporter = Reporter(diary)
    reporter.report(1, {"loss": math.nan, "stage": "warm-up", "note": None, "done": True, "table": torch.zeros(3)})
    reporter.report(1, {"loss": 1.0, "eval_loss": torch.tensor(2.0)})
    reporter.report(1, {"epoch": 1.0})
    (first, second) = diary.pages
    assert first.keys() == {"step", "loss"} and math.isnan(first["loss"])
    assert second == {"step": 1, "validation loss": 2.0}
    reporter.begin()
    reporter.report(1, {"loss": 3.0})
    assert diary.pages[-1] == {"step": 1, "loss": 3.0}


def test_a_swarm_that_was_closed_costs_a_warning_and_not_the_training(model, tmp_path, diary, for_transformers, caplog):
    diary.closed = True
    with caplog.at_level(logging.WARNING, logger="labkit.integrations"):
        trainer = hugging_face(model, tmp_path, for_transformers)
        trainer.train()
    assert trainer.state.global_step == 6 and diary.pages == []
    names = [record.name for record in caplog.records if record.name.startswith("labkit.integrations")]
    assert names == ["labkit.integrations.reporting"]  # servers that compute meanwhile may have something to say, too


def test_a_swarm_shows_what_it_is_told(swarm, model, tmp_path):
    from labkit.integrations import TransformersCallback

    events: list[Any] = []
    stop = swarm.on_event(events.append)
    hugging_face(model, tmp_path, TransformersCallback(swarm)).train()
    stop()
    assert [event.step for event in events if isinstance(event, StepFinished)] == [2, 4, 6]
    measured = {event.step: event.metrics for event in events if isinstance(event, MetricsLogged)}
    assert "learning rate" in measured[2] and "validation loss" in measured[3]


def test_neither_library_is_imported_before_its_callback_is_asked_for():
    code = (
        "import sys, labkit.integrations as i; libraries = {'transformers', 'lightning', 'pytorch_lightning'}; "
        "assert not libraries & set(sys.modules); i.TransformersCallback; "
        "assert 'lightning' not in sys.modules and 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
