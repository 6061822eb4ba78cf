"""Logging: the rows of a swarm and of training steps, and what a file, Weights & Biases and others get of them."""

from __future__ import annotations

import json
import logging
import math
import struct
import threading
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import labkit as lk
from labkit.errors import CAUSES
from labkit.events import CopyFailed, ExpertHandedOver, ExpertTakenOver, Listeners, StepFailed, StepFinished
from labkit.view.log import swarm_logging
from labkit.view.log.loggers import JsonlLogger, WandbLogger
from labkit.view.log.rows import (
    LoggedHistogram,
    LoggedTable,
    StepQueue,
    overall_latency,
    routing_entropy,
    server_table,
    swarm_row,
)
from labkit.view.log.swarm_logging import Logging
from labkit.view.scene import Scene, State
from tests.scenes import make_scene, play
from tests.swarms import eventually


def step(number, loss=1.0, at=None, samples=10, staleness=2):
    at = float(number) if at is None else at
    return StepFinished(step=number, loss=loss, samples=samples, seconds=0.5, staleness=staleness, at=at)


class FakeView:
    """A view whose scenes a test hands out."""

    def __init__(self) -> None:
        self.listeners = Listeners()
        self.outputs: list[Any] = []
        self.last = make_scene(at=1.0)

    def on_event(self, listener):
        return self.listeners.add(listener)

    def add(self, output, period):
        self.outputs.append(output)
        return lambda: self.outputs.remove(output) if output in self.outputs else None

    def scene(self) -> Scene:
        return self.last

    def show(self, scene):
        self.last = scene
        for output in list(self.outputs):
            output(scene)


class Plain:
    """The least that can be logged to."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.finished = 0

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


class Broken(Plain):
    def log(self, row):
        super().log(row)
        raise ConnectionError("no network")


@pytest.fixture
def view() -> FakeView:
    return FakeView()


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- rows of the swarm


def test_a_row_says_how_the_swarm_is():
    scene = make_scene(32, 6, dead_servers=[1, 3], at=40.0)
    row: Any = swarm_row(scene)
    assert (row["swarm/seconds"], row["swarm/experts"], row["swarm/experts_alive"]) == (40.0, 32, 20)
    assert (row["swarm/experts_dead"], row["swarm/servers"], row["swarm/servers_alive"]) == (11, 6, 4)
    assert (row["swarm/failures/timeout"], row["swarm/failures/lost"], row["swarm/failures/refused"]) == (12, 24, 0)
    assert row["swarm/calls_per_s"] == scene.headline.calls and row["swarm/in_flight"] == 8
    assert row["swarm/latency_ms/p50"] < row["swarm/latency_ms/p95"] < row["swarm/latency_ms/p99"]
    assert {f"swarm/latency_ms/{part}/p95" for part in ("queue", "compute", "network")} <= set(row)
    load = row["swarm/load"]
    assert isinstance(load, LoggedHistogram) and sum(load.counts) == 32 and len(load.bins) == len(load.counts) + 1


def test_a_swarm_of_any_size_has_the_same_columns():
    small, large = swarm_row(make_scene(16, 4)), swarm_row(make_scene(2_000, 100))
    assert set(small) == set(large) and len(small) < 40


def test_what_is_not_known_is_left_out():
    row = swarm_row(make_scene(0, 0, running=False, outages=[]))
    assert {"swarm/seconds", "swarm/experts_alive", "swarm/failures/lost"} <= set(row)
    assert not {"swarm/load", "swarm/routing_entropy", "swarm/latency_ms/p50", "swarm/staleness"} & set(row)
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))


@pytest.mark.parametrize(
    ("load", "entropy"),
    [
        ([5, 5, 5, 5], 1.0),
        ([9, 0, 0, 0], 0.0),
        ([1, 1, 0, 0], 0.5),
        ([0, 0, 0, 0], math.nan),
        ([3, 3, 3, math.nan], 0.79),
    ],
)
def test_entropy_is_one_for_even_routing_and_zero_where_one_expert_gets_all(load, entropy):
    table = make_scene(4, 1, outages=[]).experts
    assert routing_entropy(replace(table, load=np.array(load, np.float32))) == pytest.approx(
        entropy, abs=5e-3, nan_ok=True
    )


def test_entropy_is_of_the_experts_that_live_and_a_mean_over_layers():
    table = make_scene(8, 1, layers=("a", "b"), outages=[]).experts
    state = np.array([State.ALIVE, State.ALIVE, State.DEAD, State.DEAD, *[State.ALIVE] * 4])
    load = np.array([1, 1, 0, 0, 1, 0, 0, 0], np.float32)
    assert routing_entropy(replace(table, load=load, state=state)) == pytest.approx((1 + 0) / 2)


def latency_of(calls, *percentiles):
    servers = make_scene(16, len(calls), outages=[]).servers
    rows = np.repeat(np.array(percentiles, np.float32)[:, None], 4, axis=1)  # the same for each part
    return overall_latency(replace(servers, calls=np.array(calls, np.float32), latency=rows))


def test_the_percentiles_of_one_server_are_those_of_the_swarm():
    assert latency_of([5.0], [10, 20, 40])[0].tolist() == [10, 20, 40]


def test_percentiles_of_several_servers_are_those_of_all_their_calls():
    assert latency_of([5.0, 5.0], [10, 20, 40], [10, 20, 40])[2] == pytest.approx([10, 20, 40])
    fast, slow = [10, 11, 12], [1000, 1100, 1200]
    p50, p95, p99 = latency_of([9.0, 1.0], fast, slow)[0]
    assert 10 <= p50 <= 12 and 900 <= p95 <= 1050 and 1050 <= p99 <= 1150  # the slowest tenth is the slow server's
    assert latency_of([9.0, 0.0], fast, slow)[0].tolist() == fast  # which was not called lately
    assert np.isnan(latency_of([0.0], fast)).all()


def test_the_table_has_a_row_for_each_server_worst_first():
    scene = make_scene(16, 6, dead_servers=[1])
    table = server_table(scene)
    assert len(table.rows) == 6 and {len(row) for row in table.rows} == {len(table.columns)}
    worst = dict(zip(table.columns, table.rows[0], strict=True))
    assert (worst["server"], worst["state"], worst["alive"], worst["lost"]) == ("servers[1]", "killed", 0, 12)
    assert worst["queue"] is None and table.columns[-len(CAUSES) :] == CAUSES


# ---------------------------------------------------------------- rows of training steps


def test_each_step_is_a_row():
    queue = StepQueue()
    for number in (1, 2, 3):
        queue.add(step(number, loss=number / 2))
    first, second, third = queue.take()
    assert first == {"train/step": 1, "train/loss": 0.5, "train/staleness": 2, "train/step_seconds": 0.5}
    assert second["train/samples_per_s"] == third["train/samples_per_s"] == 10
    assert list(queue.take()) == []


def test_the_rate_is_of_the_last_steps_and_begins_anew_with_a_run():
    queue = StepQueue()
    for number in range(1, 41):
        queue.add(step(number, at=number if number <= 20 else 20 + (number - 20) / 10))
    queue.add(step(1, at=1000.0))
    *_, last, begin = queue.take()
    assert last["train/samples_per_s"] == pytest.approx(100)
    assert "train/samples_per_s" not in begin


def test_steps_that_come_too_fast_are_merged_from_the_oldest_on_and_none_is_lost():
    queue = StepQueue(limit=100)
    for number in range(1, 2001):
        queue.add(step(number, loss=float(number), samples=10, at=number / 10))
    rows = list(queue.take())
    counts = [row.get("train/merged_steps", 1) for row in rows]
    steps = [row["train/step"] for row in rows]
    assert len(rows) <= 100 and sum(counts) == 2000
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1
    assert steps == np.cumsum(counts).tolist()
    losses = [row["train/loss"] for row in rows]
    assert np.dot(losses, counts) == pytest.approx(2000 * 2001 / 2)
    assert losses[0] == pytest.approx((1 + counts[0]) / 2)
    assert rows[-1]["train/samples_per_s"] == pytest.approx(100)


def test_a_loss_that_is_not_a_number_is_left_out():
    queue = StepQueue()
    queue.add(step(1, loss=math.nan))
    (row,) = queue.take()
    assert "train/loss" not in row and row["train/step"] == 1


# ---------------------------------------------------------------- from a view to a logger


def test_steps_and_scenes_reach_a_logger_as_plain_numbers(view):
    plain = Plain()
    Logging(view, plain)
    view.listeners(step(1))
    view.listeners(StepFailed(samples=1, detail=""))
    assert plain.rows == []  # nothing is logged in the trainer's thread
    view.show(make_scene())
    train, swarm = plain.rows
    assert train["train/step"] == 1 and swarm["swarm/experts_alive"] == 15
    assert all(isinstance(value, (int, float)) for row in plain.rows for value in row.values())


def test_a_module_with_log_and_finish_is_a_logger_too(view):
    plain, module = Plain(), types.ModuleType("trackio")
    module.log, module.finish = plain.log, plain.finish  # type: ignore[attr-defined]
    Logging(view, module).stop()
    assert len(plain.rows) == 1 and plain.finished == 1


@pytest.mark.parametrize(("wrong", "text"), [(object(), "no log and no finish"), (logging.getLogger(), "no finish")])
def test_anything_else_is_refused_and_the_text_says_what_is_needed(view, wrong, text):
    with pytest.raises(TypeError, match=rf"needs log\(dict\) and finish\(\).*{text}"):
        Logging(view, wrong)
    with pytest.raises(ValueError, match="more than 0"):
        Logging(view, Plain(), period=0)
    assert view.outputs == []


def test_stop_logs_what_is_left_and_finishes_once(view):
    plain = Plain()
    log = Logging(view, plain)
    view.listeners(step(1))
    assert log.running
    log.stop()
    log.stop()
    view.listeners(step(2))
    view.show(make_scene())
    assert [min(row).split("/")[0] for row in plain.rows] == ["train", "swarm"]
    assert plain.finished == 1 and not log.running and view.outputs == []


def test_the_last_scene_of_a_swarm_ends_the_logging(view):
    plain = Plain()
    log = Logging(view, plain)
    view.listeners(step(1))
    view.show(replace(make_scene(), open=False))
    assert len(plain.rows) == 2 and plain.finished == 1
    log.stop()
    assert len(plain.rows) == 2 and plain.finished == 1


def test_a_logger_that_raises_is_let_go_with_one_line_and_the_others_go_on(view, caplog):
    broken, plain = Broken(), Plain()
    Logging(view, broken)
    Logging(view, plain)
    for number in range(1, 4):
        view.listeners(step(number))
        view.show(make_scene(at=float(number)))
    assert len(broken.rows) == 1 and broken.finished == 1
    assert len(plain.rows) == 6
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "nothing more is logged to it" in caplog.text and "no network" in caplog.text


def test_stop_does_not_wait_for_ever_for_a_logger_that_hangs(view, monkeypatch, caplog):
    monkeypatch.setattr(swarm_logging, "LOGGER_TIMEOUT", 0.05)
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Plain):
        def log(self, row):
            begun.set()
            assert go_on.wait(20)
            super().log(row)

    slow = Slow()
    log = Logging(view, slow)
    working = threading.Thread(target=view.show, args=[make_scene()])
    working.start()
    assert begun.wait(20)
    view.listeners(step(1))
    log.stop()
    assert "still at work" in caplog.text and slow.finished == 0
    go_on.set()
    working.join(20)
    assert [min(row) for row in slow.rows] == ["swarm/answered", "train/loss"] and slow.finished == 1


# ---------------------------------------------------------------- to a file


def test_a_file_gets_every_row_as_a_line_of_json(view, tmp_path):
    log = Logging(view, JsonlLogger(tmp_path / "log.jsonl"))
    for scene in play(3):
        view.listeners(step(int(scene.at)))
        view.show(scene)
        assert len(lines(tmp_path / "log.jsonl")) == 2 * scene.at  # at once
    log.stop()
    rows = lines(tmp_path / "log.jsonl")
    assert [row["train/step"] for row in rows if "train/step" in row] == [1, 2, 3]
    swarm = [row for row in rows if "swarm/seconds" in row]
    assert [row["swarm/seconds"] for row in swarm] == [1, 2, 3, 3]
    assert sum(swarm[0]["swarm/load"]["counts"]) == 16 and len(swarm[0]["swarm/load"]["bins"]) == 33
    assert (
        swarm[0]["swarm/servers_table"]["columns"][0] == "server" and len(swarm[0]["swarm/servers_table"]["rows"]) == 4
    )
    assert swarm[0]["swarm/heat_map"]["png_bytes"] > 1000
    assert ["swarm/heat_map" in row for row in swarm] == [True, False, False, True]  # the first, and at the end


def test_experts_that_change_their_server_are_rows_of_a_file_and_of_wandb_and_others_get_the_totals(view, tmp_path):
    log, plain = Logging(view, JsonlLogger(tmp_path / "log.jsonl")), Plain()
    Logging(view, plain)
    now = time.monotonic()
    view.listeners(ExpertTakenOver(uid="ffn.0.1", address="b:1", before="a:1", epoch=1, lost_updates=3, seconds=1.5,
                                   at=now - 2))  # fmt: skip
    view.listeners(CopyFailed(uid="ffn.0.2", address="b:1", cause="refused", detail="the disk is full", at=now))
    scene = make_scene(at=10.0)
    view.show(replace(scene, headline=replace(scene.headline, at_risk=2.0, taken_over=1, updates_lost=3)))
    log.stop()
    taken, failed = [row for row in lines(tmp_path / "log.jsonl") if "event/name" in row]
    assert taken.pop("event/at") == pytest.approx(8.0, abs=0.5) and failed.pop("event/at") == pytest.approx(10, abs=0.5)
    assert taken == {
        "event/name": "ExpertTakenOver", "event/uid": "ffn.0.1", "event/address": "b:1", "event/before": "a:1",
        "event/epoch": 1, "event/lost_updates": 3, "event/seconds": 1.5,
    }  # fmt: skip
    assert (failed["event/name"], failed["event/cause"]) == ("CopyFailed", "refused")
    (row,) = plain.rows
    assert (row["swarm/experts_at_risk"], row["swarm/experts_taken_over"], row["swarm/updates_lost"]) == (2, 1, 3)


def test_a_file_is_appended_to_also_after_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"train/step": 1}\n{"train/st')
    first = JsonlLogger(path)
    first.log({"train/step": 2})
    first.finish()
    second = JsonlLogger(path)
    second.log({"train/step": 3, "swarm/é": LoggedTable(("a",), ((None,),))})
    second.finish()
    assert path.read_text(encoding="utf-8").splitlines() == [
        '{"train/step": 1}', '{"train/st', '{"train/step": 2}',
        '{"train/step": 3, "swarm/é": {"columns": ["a"], "rows": [[null]]}}',
    ]  # fmt: skip


def test_a_full_disk_or_a_closed_file_ends_the_logging_with_one_line(view, tmp_path, caplog):
    full, closed = JsonlLogger(tmp_path / "full"), JsonlLogger(tmp_path / "closed")
    full._file.close()
    full._file = FullDisk()  # type: ignore[assignment]
    closed.finish()
    for logger in (full, closed):
        log = Logging(view, logger)
        view.show(make_scene())
        view.show(make_scene())
        assert not log.running
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "No space left" in caplog.text and "closed file" in caplog.text


class FullDisk:
    def write(self, data):
        raise OSError(28, "No space left on device")

    flush = close = lambda self: self.write(b"")


def test_a_file_that_cannot_be_opened_is_told_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        JsonlLogger(tmp_path / "nowhere" / "log.jsonl")


def test_without_matplotlib_everything_else_is_logged(view, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    log = Logging(view, JsonlLogger(tmp_path / "log.jsonl"))
    view.show(make_scene())
    log.stop()
    first, last = lines(tmp_path / "log.jsonl")
    assert "swarm/servers_table" in first and "swarm/heat_map" not in first and "swarm/servers_table" in last
    assert caplog.text.count("matplotlib is not installed") == 1


# ---------------------------------------------------------------- to Weights & Biases


@pytest.fixture
def run(tmp_path, monkeypatch):
    """An offline run, whose service has ended when the test ends (`nothing_is_left` would see it)."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # their own telemetry, the only thing that is not offline
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    import wandb

    quiet = wandb.Settings(
        console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True,
        x_disable_machine_info=True,
    )  # fmt: skip
    run = wandb.init(mode="offline", project="labkit", dir=tmp_path, settings=quiet)
    yield run
    run.finish()
    wandb.teardown()


def records(run):
    """Finishes a run; what it has written: the records of its file, in the format of LevelDB's log."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    parse: Any = vars(wandb_internal_pb2)["Record"].FromString
    run.finish()
    wandb.teardown()  # its service writes until it ends
    data = Path(run.settings.sync_file).read_bytes()
    assert data[:4] == b":W&B"
    at, parts, found = 7, [], []
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room  # padding at the end of a block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the last part
            found.append(parse(b"".join(parts)))
            parts = []
    assert not parts
    return found


def history(found):
    """The rows of a run."""
    rows: list[dict[str, Any]] = []
    for record in found:
        if record.HasField("history"):
            row: dict[str, Any] = {}
            rows.append(row)
            for item in record.history.item:
                place: Any = row
                for key in item.nested_key[:-1]:
                    place = place.setdefault(key, {})
                place[item.key or item.nested_key[-1]] = json.loads(item.value_json)
    return rows


def test_a_run_of_wandb_gets_rows_with_their_axes_a_histogram_an_image_and_a_table(view, run):
    log = Logging(view, WandbLogger(run, picture_every=2.0))
    for scene in play(4):
        view.listeners(step(int(scene.at), loss=scene.at))
        view.show(scene)
    view.listeners(ExpertHandedOver(uid="ffn.0", address="a:1", to="b:1", epoch=2))
    log.stop()
    run.log({"mine": 1})  # it is still open
    found = records(run)

    axes = {r.metric.name or r.metric.glob_name: r.metric.step_metric for r in found if r.HasField("metric")}
    assert axes["train/*"] == "train/step" and axes["swarm/*"] == "swarm/seconds" and axes["event/*"] == "event/at"
    rows = history(found)
    train = [row for row in rows if "train/loss" in row]
    assert [(row["train/step"], row["train/loss"]) for row in train] == [(n, float(n)) for n in (1, 2, 3, 4)]
    assert all(row["train/staleness"] == 2 for row in train) and train[-1]["train/samples_per_s"] == 10
    swarm = [row for row in rows if "swarm/experts_alive" in row]
    assert [row["swarm/seconds"] for row in swarm] == [1, 2, 3, 4, 4]
    assert [(row["event/name"], row["event/to"]) for row in rows if "event/name" in row] == [
        ("ExpertHandedOver", "b:1")
    ]
    assert {"swarm/failures/timeout", "swarm/latency_ms/p95", "swarm/routing_entropy", "swarm/calls_per_s"} <= set(
        swarm[0]
    )
    assert swarm[0]["swarm/load"]["_type"] == "histogram" and sum(swarm[0]["swarm/load"]["values"]) == 16
    assert ["swarm/heat_map" in row for row in swarm] == [True, False, True, False, True]
    image, table = swarm[0]["swarm/heat_map"], swarm[0]["swarm/servers_table"]
    files = Path(run.settings.files_dir)
    assert image["_type"] == "image-file" and (files / image["path"]).read_bytes().startswith(b"\x89PNG")
    assert table["_type"] == "table-file" and (table["nrows"], table["ncols"]) == (4, 29)
    assert json.loads((files / table["path"]).read_text(encoding="utf-8"))["columns"][:3] == [
        "server",
        "address",
        "state",
    ]
    assert rows[-1]["mine"] == 1
    keys = {key for row in rows for key in row if key.startswith(("train/", "swarm/"))}
    assert len(keys) < 45 and not any("ffn" in key for key in keys)


def test_checkpoints_become_an_artifact_when_asked_for_and_at_the_end(view, run, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "ffn.0.0.safetensors").write_bytes(b"first")
    (folder / ".ffn.0.1~ab.tmp").write_bytes(b"half")
    logger = WandbLogger(run, checkpoints=folder)
    artifact = logger.save_checkpoint(folder)
    (folder / "ffn.0.0.safetensors").write_bytes(b"second")
    (entry,) = artifact.manifest.entries.values()
    assert (entry.path, entry.size) == ("ffn.0.0.safetensors", 5)
    Logging(view, logger).stop()
    logged = [record.artifact for record in records(run) if record.HasField("artifact")]
    artifacts = [artifact for artifact in logged if artifact.type == "model"]
    assert [artifact.name for artifact in artifacts] == [f"{run.id}-experts"] * 2
    assert [[(e.path, e.size) for e in a.manifest.contents] for a in artifacts] == [
        [("ffn.0.0.safetensors", 5)], [("ffn.0.0.safetensors", 6)],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no checkpoints"):
        logger.save_checkpoint(tmp_path / "nowhere")


def test_a_run_that_its_user_has_finished_ends_the_logging_only(view, run, caplog):
    log = Logging(view, WandbLogger(run))
    run.finish()
    view.listeners(step(1))
    view.show(make_scene())
    assert not log.running and "is finished" in caplog.text


def test_what_is_no_run_is_refused():
    with pytest.raises(TypeError, match=r"a run, which wandb\.init returns"):
        WandbLogger("my project")  # type: ignore[arg-type]


# ---------------------------------------------------------------- a whole swarm


def test_training_is_logged_and_goes_on_when_a_logger_fails(tmp_path):
    x, y = torch.randn(64, 8), torch.zeros(64, dtype=torch.long)
    broken, file = Broken(), lk.JsonlLogger(tmp_path / "log.jsonl")
    file.picture_every = math.inf
    with lk.Swarm("logged") as swarm:
        swarm.serve("ffn", hidden=8, grid=(2, 2), servers=2, isolation="task")
        failing = swarm.log_to(broken, period=0.1)
        swarm.log_to(file, period=0.1)
        model = nn.Sequential(swarm.moe(8, k_best=2), nn.Linear(8, 2))
        run = lk.fit(model, (x, y), steps=12, batch_size=16, trainers=2)
        run.wait()
        assert run.steps == 12
        eventually(lambda: not failing.running)
    rows = lines(tmp_path / "log.jsonl")
    train = [row for row in rows if "train/step" in row]
    assert [row["train/step"] for row in train] == list(range(1, 13))
    assert all(row["train/loss"] == pytest.approx(s.loss) for row, s in zip(train, run.history, strict=True))
    last = [row for row in rows if "swarm/seconds" in row][-1]
    assert last["swarm/answered"] > 0 and last["swarm/experts"] == 4 and "swarm/load" in last
    assert len(broken.rows) == 1 and broken.finished == 1
