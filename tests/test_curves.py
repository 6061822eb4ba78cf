"""Learning curves, a loop of one's own, and what passes wait for: from events to scenes, frames, files and rows."""

from __future__ import annotations

import json
import math
import threading
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.events import MetricsLogged, PassFinished, StepFinished
from labkit.view import export
from labkit.view.collect.curves import MAX_CURVES, MAX_POINTS
from labkit.view.collect.telemetry import MAX_PASS_KINDS, MAX_PASSES
from labkit.view.log.custom_loop import CustomLoop
from labkit.view.log.rows import MetricQueue, swarm_row
from labkit.view.page.frame_writer import FRAME_BUDGET, FrameWriter
from labkit.view.picture.snapshot import draw
from labkit.view.scene import waits_lines
from tests.frame_store import FrameStore
from tests.swarms import eventually
from tests.test_sampler import Stage


def measured(stage: Stage, step: int, **metrics: float) -> None:
    stage.telemetry(MetricsLogged(at=stage.now, step=step, metrics=metrics))


def passed(stage: Stage, prefix: str = "ffn", direction: str = "forward", **changes: Any) -> None:
    usual: dict[str, Any] = {"rows": 16, "seconds": 0.21, "waited": 0.08, "patience": 0.35, "late": ()}
    stage.telemetry(PassFinished(at=stage.now, prefix=prefix, direction=direction, **usual | changes))


@pytest.fixture
def stage() -> Stage:
    return Stage()


# ---------------------------------------------------------------- curves


def test_what_was_measured_is_a_curve_by_name(stage):
    for step in (200, 400):
        stage.now += 10
        measured(stage, step, accuracy=step / 1000, loss=math.nan)
    accuracy, loss = stage.sampler.scene().curves
    assert (accuracy.name, accuracy.at.tolist(), accuracy.step.tolist()) == ("accuracy", [10, 20], [200, 400])
    assert accuracy.value.tolist() == [0.2, 0.4] and np.isnan(loss.value).all()


def test_a_long_curve_keeps_its_shape_in_bounded_memory(stage):
    count = 20_000
    for step in range(count):
        stage.now += 0.01
        measured(stage, step, rising=float(step))
        if step % 5000 == 0:
            stage.sampler.scene()
    [curve] = stage.sampler.scene().curves
    assert MAX_POINTS / 2 <= len(curve.at) <= MAX_POINTS and curve.version > 0
    assert (np.diff(curve.value) > 0).all() and curve.value[-1] == count - 1
    assert np.abs(curve.value - curve.step).max() < count / MAX_POINTS * 4


def test_names_beyond_the_limit_are_not_shown_and_that_is_said_once(stage, caplog):
    for number in range(3 * MAX_CURVES):
        measured(stage, 1, **{f"metric {number}": 1.0})
    assert [curve.name for curve in stage.sampler.scene().curves] == [f"metric {n}" for n in range(MAX_CURVES)]
    assert ["24 learning curves are shown" in record.message for record in caplog.records] == [True]


def test_frames_bring_all_points_of_all_curves_within_their_budget(stage):
    writer, store = FrameWriter(), FrameStore()
    for part in range(12):
        for step in range(37):
            stage.now += 0.1
            metrics = {f"{n} {'é' * 50}": math.sin(n + stage.now) for n in range(MAX_CURVES)}
            measured(stage, 37 * part + step, **metrics)
        scene = stage.sampler.scene()
        store.apply(*writer.frame(scene, layer=0, mode="load", control=True))
        assert store.bytes <= FRAME_BUDGET
    for _ in range(10):
        store.apply(*writer.frame(scene, layer=0, mode="load", control=True))
    assert "curves" not in store.header
    for curve, (_, points) in zip(scene.curves, store.curves, strict=True):
        assert np.allclose(points, np.stack([curve.at, curve.value], 1), atol=1e-3)


def test_files_have_the_curves(stage):
    stage.now += 10
    measured(stage, 7, accuracy=0.5, perplexity=math.inf)
    scene = stage.sampler.scene()
    assert json.loads(export.to_json(scene))["curves"] == {
        "accuracy": {"t": [10.0], "step": [7], "value": [0.5]},
        "perplexity": {"t": [10.0], "step": [7], "value": [None]},
    }
    header, _ = export.static_frame(scene)
    assert [curve["name"] for curve in header["curves"]] == ["accuracy", "perplexity"]


def test_the_picture_has_room_for_them(stage):
    for step in range(30):
        stage.now += 1
        measured(stage, step, accuracy=step / 30, temperature=-5.0 - step, **{f"metric {n}": 1.0 for n in range(9)})
    assert int.from_bytes(draw(stage.sampler.scene())[20:24], "big") == 980


def test_loggers_get_a_row_for_each_with_its_step():
    queue = MetricQueue(limit=10)
    queue.add(MetricsLogged(step=200, metrics={"validation loss": 0.5, "bad": math.nan}))
    queue.add(MetricsLogged(step=300, metrics={"bad": math.inf}))
    assert list(queue.take()) == [{"train/step": 200, "metrics/validation loss": 0.5}]
    for step in range(1000):
        queue.add(MetricsLogged(step=step, metrics={"x": 1.0}))
    steps = [row["train/step"] for row in queue.take()]
    assert len(steps) <= 10 and steps[-1] == 999 and steps == sorted(steps)


# ---------------------------------------------------------------- a loop of one's own


class Loop:
    """`Swarm.log` without a swarm, and what it reports."""

    def __init__(self, stage: Stage) -> None:
        self.events: list[Any] = []
        self._loop = CustomLoop(stage.telemetry, self.take)
        self._stage = stage

    def take(self, event: Any) -> None:
        self.events.append(event)
        self._stage.telemetry(event)

    def log(self, step: Any = None, loss: Any = None, samples: Any = None, **metrics: Any) -> None:
        self._loop.log(step, loss, samples, metrics)


@pytest.fixture
def loop(stage) -> Loop:
    return Loop(stage)


NUMBERS = [
    0.5,
    Decimal("0.5"),
    np.float32(0.5),
    np.array([[0.5]]),
    torch.tensor(0.5),
    torch.tensor([0.5]),
    torch.tensor(0.5, dtype=torch.bfloat16),
    torch.tensor(0.5, requires_grad=True) * 1,
]


@pytest.mark.parametrize("loss", NUMBERS, ids=repr)
def test_a_loss_is_any_one_number(loop, loss):
    loop.log(loss=loss, accuracy=loss)
    step, metrics = loop.events
    assert (type(step), step.step, step.loss) == (StepFinished, 1, 0.5)
    assert (metrics.step, metrics.metrics) == (1, {"accuracy": 0.5})
    assert type(step.loss) is float


NO_NUMBERS = [
    ("0.5", TypeError, "loss='0.5' is no number"),
    ([0.5], TypeError, "loss is a list, and no number"),
    (torch.ones(16), ValueError, r"loss has the shape \[16\]: log one number, such as its mean, loss.mean()"),
    (np.ones(0), ValueError, r"shape \[0\]"),
    (1j, TypeError, "no number"),
    (object(), TypeError, "object, and no number"),
    (10**400, ValueError, "too large"),
    (np.array("x"), TypeError, "no number"),
    (torch.nn.Linear(1, 1), TypeError, "Linear"),
]


@pytest.mark.parametrize(("value", "error", "text"), NO_NUMBERS, ids=[text for _, _, text in NO_NUMBERS])
def test_what_is_no_number_is_refused_in_words_and_nothing_is_logged(loop, value, error, text):
    with pytest.raises(error, match=text):
        loop.log(loss=value)
    with pytest.raises(error):
        loop.log(loss=1.0, accuracy=value)
    assert loop.events == []


@pytest.mark.parametrize("step", [-1, 2.5, math.nan, math.inf, "3", 1 << 60])
def test_a_step_is_a_whole_number(loop, step):
    with pytest.raises((TypeError, ValueError), match="step"):
        loop.log(step=step, loss=1.0)


def test_steps_count_on_from_the_last_one(loop):
    loop.log(loss=1.0)
    loop.log(step=np.int64(100), loss=1.0)
    loop.log(accuracy=0.5)
    loop.log(step=torch.tensor(7), loss=1.0)
    assert [event.step for event in loop.events] == [1, 100, 101, 7]


def test_the_headline_shows_the_loop_while_no_run_trains(stage, loop):
    loop.log(step=12, loss=0.25, samples=32)
    stage.telemetry.logged_step = 12, 0.25, stage.now
    head = stage.sampler.scene().headline
    assert (head.running, head.logging, head.steps, head.total_steps, head.loss) == (False, True, 12, 0, 0.25)
    stage.now += 60
    assert not stage.sampler.scene().headline.logging


def test_a_nan_is_a_loss_and_leaves_a_gap(stage, loop):
    loop.log(loss=math.nan, accuracy=math.nan)
    scene = stage.sampler.scene()
    assert math.isnan(scene.headline.loss)
    assert json.loads(export.to_json(scene))["curves"]["accuracy"]["value"] == [None]


def test_a_swarm_shows_and_logs_a_loop_of_ones_own_from_any_thread(tmp_path):
    metrics: dict[str, Any] = {"eval/f1": 0.75}  # a name that is no word of Python

    def train() -> None:
        for _ in range(50):
            swarm.log(loss=0.5, **metrics)

    path = tmp_path / "run.jsonl"
    with lk.Swarm() as swarm:
        logger = swarm.log_to(lk.JsonlLogger(path), period=0.05)
        threads = [threading.Thread(target=train) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: swarm.view.scene().headline.steps == 200)
        logger.stop()
        curves = swarm.view.scene().curves
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("metrics/eval/f1" in row for row in rows) == 200
    assert {row["train/loss"] for row in rows if "train/loss" in row} == {0.5}
    assert [(curve.name, set(curve.value.tolist())) for curve in curves] == [("eval/f1", {0.75})]


def test_a_closed_swarm_says_once_that_it_shows_nothing_and_does_not_end_the_loop(caplog):
    with lk.Swarm("closed") as swarm:
        pass
    for _ in range(3):
        swarm.log(loss=0.1)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "the swarm 'closed' is closed here: what is logged to it is shown nowhere"
    ]
    for listen in (lambda: swarm.log_to(print), lambda: swarm.on_event(print)):
        with pytest.raises(lk.SwarmClosed, match="the swarm 'closed' is closed"):
            listen()


# ---------------------------------------------------------------- what passes wait for


def test_it_is_said_what_a_pass_waits_for(stage):
    stage.found({"ffn.0.0": 1, "ffn.0.1": 2})
    for number in range(10):
        stage.now += 1
        passed(stage, late=("ffn.0.1",) if number % 2 else ())
        passed(stage, direction="backward", seconds=0.02, waited=0.0, patience=4.0)
    forward, backward = waits_lines(stage.sampler.scene().waits)
    assert forward.startswith(
        "a forward pass takes 0.21 s, 80 ms of it waiting for stragglers; waits at most 0.35 s; late most: ffn.0.1 on "
    )
    assert backward == "a backward pass takes 20 ms, none of it waiting for stragglers; waits at most 4.00 s"


def test_where_rows_need_every_answer_it_is_said_that_a_pass_waits_for_those(stage):
    passed(stage, seconds=10.0, waited=0.0, patience=0.0)
    assert waits_lines(stage.sampler.scene().waits) == [
        "a forward pass takes 10 s, all of it for answers that rows need"
    ]


def test_several_layers_are_told_apart_and_what_is_long_ago_is_forgotten(stage):
    passed(stage, "ffn")
    passed(stage, "attention")
    lines = waits_lines(stage.sampler.scene().waits)
    assert [line.split(":")[0] for line in lines] == ["attention", "ffn"]
    stage.now += 60
    assert stage.sampler.scene().waits == ()


def test_passes_take_bounded_memory(stage):
    for number in range(2 * MAX_PASS_KINDS):
        for _ in range(2 * MAX_PASSES if number == 0 else 1):
            passed(stage, f"grid{number}")
    assert len(stage.telemetry.passes) == MAX_PASS_KINDS
    assert len(stage.telemetry.passes["grid0", "forward"]) == MAX_PASSES
    assert len(stage.sampler.scene().waits) <= 8


def test_frames_files_and_rows_say_it(stage):
    passed(stage, late=("ffn.0.0",))
    scene, store, writer = stage.sampler.scene(), FrameStore(), FrameWriter()
    store.apply(*writer.frame(scene, layer=0, mode="load", control=True))
    assert store.waits == waits_lines(scene.waits)
    store.apply(*writer.frame(scene, layer=0, mode="load", control=True))
    assert "waits" not in store.header
    assert json.loads(export.to_json(scene))["waits"][0]["waited"] == 0.08
    assert swarm_row(scene)["swarm/pass/forward_waited"] == pytest.approx(0.08)


def test_the_summary_of_a_swarm_says_it():
    with lk.Swarm() as swarm:
        swarm.telemetry(PassFinished(prefix="ffn", direction="forward", rows=1, seconds=1.0, waited=0.5, patience=2.0))
        assert "a forward pass takes 1.00 s, 0.50 s of it waiting for stragglers" in repr(swarm)
        assert "waits at most 2.00 s" in swarm._repr_html_()
