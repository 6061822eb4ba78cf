"""The dashboard and the view behind it, in plain Python: threads, commands, exports, ends. `test_dashboard_kernel` has
those in a kernel."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import labkit as lk
from labkit.server import checkpoints
from labkit.view.page.dashboard import MAX_COMMANDS, MAX_MESSAGES, Dashboard
from labkit.view.page.pages import LAST_FRAMES
from labkit.view.scene import Scene
from labkit.view.worker_thread import WorkerThread
from tests.swarms import eventually

PERIOD = 0.02


class FakeSource:
    """A swarm that is always the same. `hold`: what keeps commands from being executed."""

    def __init__(self) -> None:
        self.name = "fake"
        self.over = False
        self.broken = False
        self.asked: list[tuple[str, int, str, bool]] = []
        self.commands: list[Mapping[str, Any]] = []
        self.gone: list[str] = []
        self.hold = threading.Event()
        self.hold.set()

    def frame(self, page: str, *, layer: int, mode: str, fresh: bool) -> tuple[dict[str, Any], list[bytes]]:
        if self.broken:
            raise RuntimeError("no frame today")
        self.asked.append((page, layer, mode, fresh))
        return {"at": float(len(self.asked))}, [b"data"]

    def forget(self, page: str) -> None:
        self.gone.append(page)

    def execute(self, command: Mapping[str, Any]) -> str:
        assert self.hold.wait(10)
        self.commands.append(command)
        if command["do"] == "stop_run":
            raise lk.LabkitError("no run is training")
        if command["do"] == "restart":
            raise ZeroDivisionError("a mistake of ours")
        return f"{command['do']} is done"

    def export(self, format: str) -> tuple[str, str, bytes]:
        return f"it.{format}", "image/png", b"x" * 100_000


class Shown(Dashboard):
    """A dashboard whose messages can be seen. Its page acknowledges them at once."""

    def __init__(self, source: Any, view: Any = None) -> None:
        self.sent: list[tuple[dict[str, Any], Any]] = []
        super().__init__(source, view)

    def send(self, content: Any, buffers: Any = None) -> None:
        self.sent.append((content, buffers))
        if content.get("ack", "seq" in content):
            self.say(type="ack", page=content["page"], seq=content["seq"])

    def say(self, **content: Any) -> None:
        self._on_page_message(self, content, [])

    def look(self, page: str = "a", looking: bool = True, fresh: bool = True) -> None:
        self.say(type="look", page=page, looking=looking, fresh=fresh, layer=0, mode="load")

    def click(self, id: int, **command: Any) -> None:
        self.say(type="command", page="a", id=id, command=command)

    def kinds(self, *kinds: str) -> list[dict[str, Any]]:
        return [content for content, _ in self.sent if content["type"] in kinds]


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def shown(source) -> Iterator[Shown]:
    dashboard = Shown(source)
    yield dashboard
    source.hold.set()
    dashboard.close()


@pytest.fixture
def swarm() -> Iterator[lk.Swarm]:
    with lk.Swarm() as swarm:
        swarm.serve("ffn", hidden=8, grid=(2, 2), servers=2, isolation="task", backups=0)  # nobody takes over
        yield swarm


def threads(name: str = "") -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"labkit-{name}")]


def train(swarm: lk.Swarm, steps: int) -> Any:
    x = torch.randn(64, 8)
    model = nn.Sequential(swarm.moe(8, k_best=2), nn.Linear(8, 2))
    return lk.fit(model, (x, (x.sum(1) > 0).long()), steps=steps, batch_size=16, trainers=2)


# ---------------------------------------------------------------- a thread that comes and goes


def test_a_worker_thread_works_while_there_is_something_to_do():
    left, steps = [3], []

    def step() -> float | None:
        steps.append(threading.current_thread().name)
        left[0] -= 1
        return 0.0 if left[0] > 0 else None

    worker = WorkerThread("labkit-test", step)
    assert not worker.alive
    worker.wake()
    assert worker.wait_for_end(5) and steps == ["labkit-test"] * 3
    worker.wake()
    assert worker.wait_for_end(5) and len(steps) == 4


def test_waking_a_worker_thread_that_is_about_to_end_is_not_lost():
    for _ in range(300):
        steps: list[int] = []
        worker = WorkerThread("labkit-test", lambda steps=steps: steps.append(len(steps)))  # type: ignore[misc]
        worker.wake()
        while not steps:
            pass  # it ends now
        worker.wake()
        assert worker.wait_for_end(5) and len(steps) == 2


def test_a_worker_thread_that_fails_is_logged_and_can_be_woken_again(caplog):
    worker = WorkerThread("labkit-test", lambda: 1 / 0)
    for count in (1, 2):
        worker.wake()
        assert worker.wait_for_end(5)
        assert len(caplog.records) == count


# ---------------------------------------------------------------- pages


def test_there_is_no_thread_and_no_message_while_nobody_looks(shown, source):
    assert threads() == [] and shown.sent == []
    shown.look()
    eventually(lambda: len(shown.kinds("frame")) >= 3)
    shown.look(looking=False, fresh=False)
    eventually(lambda: threads() == [])
    assert source.asked[:2] == [("a", 0, "load", True), ("a", 0, "load", False)]


def test_frames_carry_their_page_and_number(shown):
    shown.look("a")
    shown.look("b")
    eventually(lambda: len(shown.kinds("frame")) >= 4)
    numbers = [(content["page"], content["seq"]) for content in shown.kinds("frame")[:4]]
    assert sorted(numbers) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_what_a_page_says_is_on_page_message_without_waiting_and_bounded(shown, source):
    busy = threading.Event()

    def frame(*_: Any, **__: Any) -> tuple[dict[str, Any], list[bytes]]:
        busy.set()
        assert source.hold.wait(10)
        return {}, []

    source.frame = frame
    source.hold.clear()
    shown.look()
    assert busy.wait(10)
    for _ in range(MAX_MESSAGES + 100):
        shown.say(type="ack", page="a", seq=1)
    assert len(shown._messages) == MAX_MESSAGES


def test_a_source_that_fails_is_logged_once_and_asked_again(shown, source, caplog):
    source.broken = True
    shown.look()
    eventually(lambda: caplog.records)
    source.broken = False
    eventually(lambda: shown.kinds("frame"))
    assert source.asked[0] == ("a", 0, "load", True)
    assert len(caplog.records) == 1


def test_nonsense_from_a_page_changes_nothing(shown):
    for content in ({}, {"type": "look"}, {"type": "command", "page": "a"}, {"type": "x" * 1000, "page": "a"}):
        shown.say(**content)
    shown._on_page_message(shown, None, [])
    shown._on_page_message(shown, ["look"], [])
    eventually(lambda: threads() == [])
    assert shown.sent == []


def test_when_the_source_is_over_the_last_frames_go_out_and_the_thread_ends(shown, source):
    source.over = True
    shown.look()
    eventually(lambda: threads() == [])
    assert len(shown.kinds("frame")) == LAST_FRAMES


# ---------------------------------------------------------------- commands


def test_a_command_is_heard_and_then_done(shown, source):
    shown.click(1, do="kill", server=2)
    eventually(lambda: shown.kinds("done"))
    assert [content for content, _ in shown.sent] == [
        {"type": "heard", "page": "a", "id": 1},
        {"type": "done", "page": "a", "id": 1, "text": "kill is done"},
    ]
    assert source.commands == [{"do": "kill", "server": 2}]


def test_a_command_that_fails_says_why(shown, caplog):
    shown.click(1, do="stop_run")
    shown.click(2, do="restart", server=0)
    shown.click(3, do="fly")
    eventually(lambda: len(shown.kinds("failed")) == 3)
    texts = {content["id"]: content["text"] for content in shown.kinds("failed")}
    assert texts[1] == "no run is training"
    assert texts[2] == "ZeroDivisionError: a mistake of ours"
    assert "no command" in texts[3]
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


def test_a_command_is_heard_at_once_while_others_are_executed_and_too_many_are_refused(shown, source):
    source.hold.clear()
    for id in range(MAX_COMMANDS + 5):
        shown.click(id, do="kill", server=id)
    eventually(lambda: len(shown.kinds("heard")) == MAX_COMMANDS + 5)
    refused = shown.kinds("failed")
    assert 4 <= len(refused) <= 5 and "busy" in refused[0]["text"]
    source.hold.set()
    eventually(lambda: len(shown.kinds("done", "failed")) == MAX_COMMANDS + 5)
    assert [command["server"] for command in source.commands] == sorted(
        command["server"] for command in source.commands
    )
    eventually(lambda: threads() == [])


def test_frames_go_on_while_a_command_is_executed(shown, source):
    source.hold.clear()
    shown.look()
    shown.click(1, do="stop", server=0)
    eventually(lambda: len(shown.kinds("frame")) >= 3)
    assert shown.kinds("heard") and not shown.kinds("done")


def test_an_export_comes_in_chunks_and_then_it_is_done(shown):
    shown.click(7, do="export", format="png")
    eventually(lambda: shown.kinds("done"))
    assert b"".join(buffers[0] for content, buffers in shown.sent if content["type"] == "chunk") == b"x" * 100_000
    assert [content["index"] for content in shown.kinds("chunk")] == [0, 1, 2]
    assert shown.kinds("done") == [{"type": "done", "page": "a", "id": 7, "text": "it.png saved"}]


def test_a_closed_dashboard_forgets_its_pages_and_hears_nothing(shown, source):
    shown.look()
    eventually(lambda: shown.kinds("frame"))
    shown.close()
    shown.close()
    assert shown.ended and source.gone == ["a"] and threads() == []
    count = len(shown.sent)
    shown.look()
    assert len(shown.sent) == count and threads() == []
    assert repr(shown) == "<dashboard of swarm 'fake', closed>"


# ---------------------------------------------------------------- a swarm


def test_a_swarm_has_one_dashboard_until_that_is_closed(swarm):
    dashboard = swarm.dashboard()
    assert swarm.dashboard() is dashboard
    eventually(lambda: threads("view"))
    dashboard.close()
    eventually(lambda: not threads("view"))
    another = swarm.dashboard()
    assert another is not dashboard and not another.ended
    another.close()


def test_a_dashboard_is_text_and_html_too(swarm):
    dashboard = swarm.dashboard()
    data, _ = dashboard._repr_mimebundle_()
    assert data["text/plain"].startswith("swarm 'default', open") and "<table>" in data["text/html"]
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == dashboard.model_id
    assert dashboard._esm and dashboard._css
    dashboard.close()


def test_a_page_sees_the_swarm_and_its_buttons_are_obeyed(swarm):
    dashboard = local(swarm)
    dashboard.look()
    eventually(lambda: any(frame["headline"]["experts_alive"] == 4 for frame in dashboard.kinds("frame")))
    first = dashboard.kinds("frame")[0]
    assert first["reset"] and first["can"] == {"control": True} and first["swarm"] == "default"
    dashboard.click(1, do="kill", server=1)
    eventually(lambda: swarm.servers[1].state == "killed")
    eventually(lambda: dashboard.kinds("done"))
    assert dashboard.kinds("done")[0]["text"] == "servers[1] killed"
    eventually(lambda: any("servers[1] killed" in str(frame.get("marks")) for frame in dashboard.kinds("frame")))
    dashboard.close()


def local(swarm: lk.Swarm) -> Shown:
    from labkit.view.page.local_source import LocalSource

    return Shown(LocalSource(swarm.view), swarm.view)


def test_commands_to_a_swarm(swarm):
    view = swarm.view
    assert view.execute({"do": "stop", "server": 0}) == "servers[0] stopped"
    assert swarm.servers[0].state == "stopped"
    assert view.execute({"do": "restart", "server": 0}) == "servers[0] restarted"
    eventually(lambda: swarm.servers[0].alive)
    assert view.execute({"do": "faults", "server": None, "latency": 0.01, "loss": None}).startswith(
        "all servers: latency"
    )
    assert "loss 25%" in view.execute({"do": "faults", "server": 1, "latency": None, "loss": 0.25})
    assert "loss 0%" in view.execute({"do": "faults", "server": 1, "latency": None, "loss": 0.0})
    with pytest.raises(ValueError, match=r"there is no servers\[7\]: 2 were started here"):
        view.execute({"do": "kill", "server": 7})
    with pytest.raises(ValueError, match="no run is training"):
        view.execute({"do": "stop_run"})
    with pytest.raises(ValueError, match="no command"):
        view.execute({"do": "sing"})
    run = train(swarm, 100_000)
    eventually(lambda: run.steps)
    assert view.execute({"do": "stop_run"}).startswith("run stopped after ")
    assert not run.running
    swarm.close()
    with pytest.raises(lk.SwarmClosed):
        view.execute({"do": "kill", "server": 1})


def test_while_a_server_saves_its_experts_all_buttons_work(swarm, tmp_path, monkeypatch):
    saving, go = threading.Event(), threading.Event()

    def save(*_: Any, **__: Any) -> None:
        saving.set()
        assert go.wait(10)  # the disk is slow

    monkeypatch.setattr(checkpoints, "save_expert", save)
    (server,) = swarm.serve("nop", grid=(1,), isolation="task", checkpoint_dir=tmp_path)
    assert swarm.view.execute({"do": "stop", "server": 2}) == "servers[2] stopped"
    assert saving.wait(10)
    swarm.view.execute({"do": "stop", "server": 0})
    swarm.view.execute({"do": "restart", "server": 2})
    assert server.state == "starting"
    swarm.view.execute({"do": "kill", "server": 2})
    assert server.state == "killed"
    swarm.view.execute({"do": "restart", "server": 2})
    assert server.state == "starting" and not go.is_set()
    go.set()
    eventually(lambda: server.alive)
    assert [server.state for server in swarm.servers] == ["stopped", "running", "running"]


def test_outputs_get_scenes_by_their_periods_and_then_the_last_one(swarm):
    quick: list[Scene] = []
    slow: list[Scene] = []
    swarm.view.add(quick.append, PERIOD)
    remove = swarm.view.add(slow.append, 1000.0)
    eventually(lambda: len(quick) > 10)
    assert len(slow) == 1 and slow[0].open
    remove()
    remove()
    swarm.close()
    assert not quick[-1].open and [scene.open for scene in quick].count(False) == 1
    assert len(slow) == 1 and threads("view") == []


def test_the_last_scene_shows_the_swarm_as_it_was_before_its_servers_ended(swarm):
    scenes: list[Scene] = []
    swarm.view.add(scenes.append, PERIOD)
    eventually(lambda: scenes and scenes[-1].headline.servers_alive == 2)
    swarm.close()
    assert (scenes[-1].open, scenes[-1].headline.servers_alive, scenes[-1].headline.experts_alive) == (False, 2, 4)
    assert swarm.view.scene() is scenes[-1]


def test_servers_that_end_and_come_back_are_marked_whoever_did_it(swarm):
    scenes: list[Scene] = []
    swarm.view.add(scenes.append, PERIOD)
    eventually(lambda: scenes)
    swarm.servers[1].kill()
    eventually(lambda: [mark.text for mark in scenes[-1].marks] == ["servers[1] killed"])
    swarm.servers[1].restart()
    eventually(lambda: [mark.text for mark in scenes[-1].marks] == ["servers[1] killed", "servers[1] back"])


def test_a_server_that_restarts_is_marked_then_and_when_it_is_back(swarm):
    go = threading.Event()
    scenes: list[Scene] = []

    def slow() -> nn.Module:
        assert go.wait(10)
        return nn.Identity()

    go.set()
    swarm.serve(slow, grid=(1,))
    go.clear()
    swarm.view.add(scenes.append, PERIOD)
    eventually(lambda: scenes)
    swarm.servers[2].restart(wait=False)
    eventually(lambda: [mark.text for mark in scenes[-1].marks] == ["servers[2] restarting"])
    go.set()
    eventually(lambda: [mark.text for mark in scenes[-1].marks] == ["servers[2] restarting", "servers[2] back"])


def test_an_output_that_fails_is_logged_and_removed(swarm, caplog):
    seen: list[Scene] = []
    swarm.view.add(lambda scene: 1 / 0, PERIOD)
    swarm.view.add(seen.append, PERIOD)
    eventually(lambda: len(seen) > 5)
    assert sum("was removed" in record.message for record in caplog.records) == 1


def test_the_view_has_a_thread_and_polls_only_while_there_is_an_output(swarm):
    assert threads("view") == []
    polled: list[Any] = []
    publish = swarm.view._publish

    def note(inventory: Any) -> None:
        polled.append(inventory)
        publish(inventory)

    swarm.view._publish = note
    remove = swarm.view.add(lambda scene: None, PERIOD)
    eventually(lambda: polled)
    assert threads("view") == ["labkit-view-default"]
    remove()
    eventually(lambda: threads("view") == [])
    assert swarm.view._polling is None


def test_close_does_not_wait_for_an_output_that_blocks(swarm):
    reached, go = threading.Event(), threading.Event()

    def block(scene: Scene) -> None:
        reached.set()
        go.wait(20)

    swarm.view.add(block, PERIOD)
    assert reached.wait(10)
    began = time.monotonic()
    swarm.close()
    assert time.monotonic() - began < 3.0
    go.set()


def test_a_swarm_that_nobody_looked_at_closes_without_a_thread(swarm):
    swarm.close()
    assert threads("view") == [] and not swarm.view.scene().open
    assert swarm.view.add(lambda scene: None, PERIOD)() is None
    assert threads("view") == []


def test_an_export_is_written_by_its_suffix(swarm, tmp_path):
    run = train(swarm, 20).wait()
    dashboard = swarm.dashboard()
    saved = dashboard.export(tmp_path / "it.json")
    assert json.loads(saved.read_text())["swarm"] == "default"
    assert dashboard.export(tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert dashboard.export(str(tmp_path / "it.HTML")).read_text().lstrip().lower().startswith("<!doctype html>")
    with pytest.raises(ValueError, match=r"\.png, \.html, \.json, not as 'it\.gif'"):
        dashboard.export(tmp_path / "it.gif")
    assert swarm.snapshot(tmp_path / "snapshot.png")._repr_png_() == (tmp_path / "snapshot.png").read_bytes()
    assert not run.running
    dashboard.close()


def test_a_look_at_a_swarm_that_nobody_watches_asks_its_servers_first(swarm):
    assert swarm.view.polled_scene().headline.experts_alive == 4
    eventually(lambda: threads("view") == [])


def test_pages_of_a_closed_swarm_still_get_its_last_scene(swarm, caplog):
    dashboard = local(swarm)
    dashboard.look()
    eventually(lambda: dashboard.kinds("frame"))
    swarm.close()
    eventually(lambda: not dashboard.kinds("frame")[-1]["open"])
    dashboard.sent.clear()
    dashboard.look("later")
    eventually(lambda: [frame for frame in dashboard.kinds("frame") if frame["page"] == "later"])
    dashboard.click(1, do="kill", server=0)
    eventually(lambda: dashboard.kinds("failed"))
    assert "is closed" in dashboard.kinds("failed")[0]["text"]
    dashboard.close()
    said = [record for record in caplog.records if record.name.startswith("labkit.view")]
    assert [record for record in said if record.levelno >= logging.WARNING] == []
