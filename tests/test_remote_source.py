"""A dashboard of a swarm in another process: over real sockets, between two swarms of this one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from labkit.contact import Contact
from labkit.errors import BadReply, LabkitError, Overloaded, RequestRefused, RPCError
from labkit.swarm import Swarm
from labkit.view.page import remote_service, remote_source
from labkit.view.page.local_source import LocalSource
from labkit.view.page.remote_service import CommandCall, ExportCall, FrameCall
from labkit.view.page.remote_source import RemoteSource
from labkit.view.scene import Scene
from labkit.wire.rpc_types import Reply
from tests.scenes import make_scene
from tests.swarms import eventually

LOOK: dict[str, Any] = {"layer": 0, "mode": "load"}


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    """The one that is looked at: two experts on a server of its own."""
    with Swarm("far") as swarm:
        swarm.serve("nop", grid=(1, 2), isolation="task")
        yield swarm


@pytest.fixture
def watcher(swarm: Swarm) -> Iterator[Swarm]:
    """The one with the page; really in another process."""
    with Swarm.join(swarm.invite(), name="near") as watcher:
        yield watcher


def source_of(watcher: Swarm, swarm: Swarm, *, secret: bool = False) -> RemoteSource:
    return watcher.view.remote_source(swarm._node.contact, swarm.remote_service.secret if secret else None)


def ask(watcher: Swarm, swarm: Swarm, method: str, body: object, timeout: float = 10.0) -> Reply:
    """A call that a node makes which keeps to no rules."""

    async def call() -> Reply:
        reply: Reply = await watcher._node.client.call(swarm._node.contact, method, body, timeout=timeout)
        return reply

    answer: Reply = watcher._portal.call(call)
    return answer


def lookers(swarm: Swarm) -> int:
    return len(swarm.view._outputs)


def test_a_remote_frame_is_what_the_swarm_would_show_itself(swarm, watcher):
    source = source_of(watcher, swarm)
    header, buffers = source.frame("page", **LOOK, fresh=True)
    own, own_buffers = LocalSource(swarm.view).frame("page", **LOOK, fresh=True)
    assert {**header, "type": "frame"}.keys() == own.keys()
    assert (header["reset"], header["open"], header["swarm"]) == (True, True, "far")
    assert [(piece["table"], piece["column"]) for piece in header["pieces"]] == [
        (piece["table"], piece["column"]) for piece in own["pieces"]
    ]
    assert list(map(len, buffers)) == list(map(len, own_buffers))
    assert source.frame("page", **LOOK, fresh=False)[0]["reset"] is False


def test_the_largest_frame_crosses_unchanged(swarm, watcher, monkeypatch):
    scene = make_scene(10_000, 200)
    monkeypatch.setattr(swarm.view, "scene", lambda: scene)
    header, buffers = source_of(watcher, swarm).frame("page", **LOOK, fresh=True)
    own, own_buffers = LocalSource(swarm.view).frame("page", **LOOK, fresh=True)
    assert header["pieces"] == own["pieces"]
    assert header["headline"] == own["headline"]
    assert buffers == own_buffers


def test_the_swarm_is_sampled_only_while_a_page_looks(swarm, watcher, monkeypatch):
    monkeypatch.setattr(remote_service, "REMOTE_PAGE_TIMEOUT", 0.4)
    assert lookers(swarm) == 0
    source = source_of(watcher, swarm)
    source.frame("one", **LOOK, fresh=True)
    source.frame("two", **LOOK, fresh=True)
    assert lookers(swarm) == 1
    eventually(lambda: lookers(swarm) == 0)
    assert swarm.remote_service._pages == {}
    assert source.frame("one", **LOOK, fresh=False)[0]["reset"] is True  # it begins anew
    assert lookers(swarm) == 1


def test_a_swarm_closes_at_once_while_pages_look_at_it(watcher, swarm):
    source_of(watcher, swarm).frame("page", **LOOK, fresh=True)
    swarm.close()
    assert lookers(swarm) == 0


def test_no_more_than_eight_pages_are_answered(swarm, watcher):
    source = source_of(watcher, swarm)
    for number in range(remote_service.MAX_REMOTE_PAGES):
        assert source.frame(f"page {number}", **LOOK, fresh=True)[0]["open"]
    with pytest.raises(Overloaded, match="8 pages look at this node already"):
        ask(watcher, swarm, "view.frame", FrameCall("one more", 0, "load", True))


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("view.frame", ("x" * 65, 0, "load", True)),
        ("view.frame", ("", 0, "load", True)),
        ("view.frame", ("page", 1 << 16, "load", True)),
        ("view.frame", ("page", 0, "colour", True)),
        ("view.command", ("x" * 129, {})),
        ("view.command", ("secret", {"do": {"do": "kill"}})),
        ("view.command", ("secret", {str(n): 1 for n in range(9)})),
        ("view.export", ("page", "exe", 0)),
        ("view.export", ("page", "json", -1)),
        ("view.export", ("page", "json", remote_service.MAX_PARTS)),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(swarm, watcher, method, body):
    with pytest.raises(RequestRefused, match="bad body"):
        ask(watcher, swarm, method, body)
    assert swarm.remote_service._pages == {}


# ---------------------------------------------------------------- commands


def test_a_command_with_the_control_secret_is_obeyed(swarm, watcher):
    source = source_of(watcher, swarm, secret=True)
    assert source.frame("page", **LOOK, fresh=True)[0]["can"] == {"control": True}
    assert source.execute({"do": "kill", "server": 0}) == "servers[0] killed"
    eventually(lambda: not swarm.servers[0].alive)


@pytest.mark.parametrize("secret", ["", "x" * 43, "ä"])
def test_a_command_without_the_secret_is_refused_and_nothing_happens(swarm, watcher, secret):
    with pytest.raises(RequestRefused, match="control secret"):
        ask(watcher, swarm, "view.command", CommandCall(secret, {"do": "kill", "server": 0}))
    assert swarm.servers[0].alive


def test_a_page_without_the_secret_has_no_buttons(swarm, watcher):
    source = source_of(watcher, swarm)
    assert source.frame("page", **LOOK, fresh=True)[0]["can"] == {"control": False}
    with pytest.raises(RequestRefused, match="control secret"):
        source.execute({"do": "stop_run"})


def test_the_secret_is_in_nothing_that_is_shown(swarm):
    assert len(swarm.remote_service.secret) >= 43
    shown = [swarm.invite(), repr(swarm), swarm._repr_html_(), repr(swarm.remote_service)]
    assert [text for text in shown if swarm.remote_service.secret in text] == []
    with Swarm("another") as another:
        assert another.remote_service.secret != swarm.remote_service.secret


def test_a_command_that_cannot_be_done_says_why(swarm, watcher):
    source = source_of(watcher, swarm, secret=True)
    with pytest.raises(RPCError, match=r"there is no servers\[7\]"):
        source.execute({"do": "kill", "server": 7})
    with pytest.raises(RPCError, match="no run is training"):
        source.execute({"do": "stop_run"})


def test_while_a_command_takes_long_pages_go_on_and_further_commands_are_told_to_wait(swarm, watcher, monkeypatch):
    done = threading.Event()
    begun = threading.Semaphore(0)

    def execute(_: object) -> str:
        begun.release()
        done.wait(20)
        return "done"

    monkeypatch.setattr(swarm.view, "execute", execute)
    source = source_of(watcher, swarm, secret=True)
    said: list[str] = []

    def press() -> None:
        said.append(source.execute({"do": "stop_run"}))

    pressed = [threading.Thread(target=press) for _ in range(1 + remote_service.MAX_WAITING)]
    for thread in pressed:
        thread.start()
    assert begun.acquire(timeout=20)
    eventually(lambda: swarm.remote_service._command_lock.statistics().tasks_waiting == remote_service.MAX_WAITING)
    with pytest.raises(Overloaded, match="one after the other"):
        source.execute({"do": "stop_run"})
    assert source.frame("page", **LOOK, fresh=True)[0]["open"]
    done.set()
    for thread in pressed:
        thread.join()
    assert said == ["done"] * len(pressed)


# ---------------------------------------------------------------- exports


def test_an_export_is_made_there_and_comes_in_parts(swarm, watcher, monkeypatch):
    monkeypatch.setattr(remote_service, "PART_BYTES", 100)
    source = source_of(watcher, swarm)
    name, mime, data = source.export("json")
    assert (name, mime) == ("labkit-far.json", "application/json")
    assert json.loads(data)["swarm"] == "far"
    assert len(data) > 300  # several parts
    assert [page.export for page in swarm.remote_service._pages.values()] == [None]  # nothing is kept


def test_a_picture_is_drawn_there(swarm, watcher):
    name, mime, data = source_of(watcher, swarm).export("png")
    assert (name, mime, data[:8]) == ("labkit-far.png", "image/png", b"\x89PNG\r\n\x1a\n")


def test_a_part_of_an_export_that_was_never_begun_is_refused(swarm, watcher):
    with pytest.raises(RequestRefused, match="begin again"):
        ask(watcher, swarm, "view.export", ExportCall("page", "html", 3))


def test_an_export_that_is_too_large_is_refused(swarm, watcher, monkeypatch):
    monkeypatch.setattr(remote_service, "PART_BYTES", 1)
    with pytest.raises(RequestRefused, match="128 are sent at most"):
        source_of(watcher, swarm).export("json")


def test_exports_that_nobody_waits_for_any_more_do_not_pile_up(swarm, watcher, monkeypatch):
    at_once, most, go = 0, 0, threading.Event()

    def export(*_: object) -> tuple[str, str, bytes]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        go.wait(20)
        at_once -= 1
        return "file.json", "application/json", b"data"

    monkeypatch.setattr(LocalSource, "export", export)
    for _ in range(5):
        with pytest.raises(RPCError):
            ask(watcher, swarm, "view.export", ExportCall("page", "json", 0), timeout=0.1)
    assert source_of(watcher, swarm).frame("page", **LOOK, fresh=True)[0]["open"]
    go.set()
    assert ask(watcher, swarm, "view.export", ExportCall("page", "json", 0)).tensors[0].numpy().tobytes() == b"data"
    assert most == 1


@pytest.mark.parametrize("name", ["../../.bashrc", "dashboard.exe"])
def test_a_file_name_that_would_lead_elsewhere_is_not_used(swarm, watcher, monkeypatch, name):
    monkeypatch.setattr(LocalSource, "export", lambda *_: (name, "text/x", b"data"))
    assert source_of(watcher, swarm).export("json") == ("labkit.json", "application/json", b"data")


# ---------------------------------------------------------------- when the other end fails


def test_when_the_swarm_is_gone_the_last_numbers_stay_and_the_page_says_so(swarm, watcher):
    source = source_of(watcher, swarm, secret=True)
    live, _ = source.frame("page", **LOOK, fresh=True)
    swarm.close()
    for fresh in (False, False, True):
        stale, buffers = source.frame("page", **LOOK, fresh=fresh)
        assert (stale["open"], stale["can"], stale["pieces"], buffers) == (False, {"control": False}, [], [])
        assert (stale["reset"], stale["at"], stale["headline"]) == (fresh, live["at"], live["headline"])
        assert fresh or not {"layers", "server_text", "marks", "series"} & stale.keys()  # the page keeps what it has
    assert not source.over
    watcher.close()
    assert source.over
    assert not source.frame("page", **LOOK, fresh=False)[0]["open"]


def test_a_page_that_never_had_a_frame_gets_an_empty_one(swarm, watcher):
    source = source_of(watcher, swarm)
    swarm.close()
    header, _ = source.frame("page", **LOOK, fresh=True)
    assert (header["open"], header["reset"]) == (False, True)
    assert header["headline"]["experts"] == 0


def test_after_a_frame_was_lost_a_page_begins_anew(swarm, watcher, monkeypatch):
    monkeypatch.setattr(remote_source, "FRAME_RETRY_DELAY", 0.0)
    source = source_of(watcher, swarm)
    assert source.frame("page", **LOOK, fresh=True)[0]["open"]
    go_on = threading.Event()
    scene: Callable[[], Scene] = swarm.view.scene

    def late() -> Scene:
        go_on.wait(20)
        return scene()

    monkeypatch.setattr(swarm.view, "scene", late)
    monkeypatch.setattr(remote_source, "FRAME_TIMEOUT", 0.2)
    assert not source.frame("page", **LOOK, fresh=False)[0]["open"]
    monkeypatch.setattr(remote_source, "FRAME_TIMEOUT", 10.0)
    go_on.set()
    header, _ = source.frame("page", **LOOK, fresh=False)
    assert (header["open"], header["reset"]) == (True, True)


def reply(header: bytes, sizes: list[int], data: bytes) -> Reply:
    return Reply(sizes, [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (header, data)])


@pytest.mark.parametrize(
    "bad",
    [
        Reply([], []),
        Reply([], [torch.zeros(2)] * 2),
        reply(b"[1]", [], b"x"),
        reply(b"[" * 100_000, [], b"x"),
        reply(b'{"at": NaN}', [], b"x"),
        reply(b"\xff", [], b"x"),
        reply(b"{}", [2], b"x"),
        reply(b"{}", [-1], b"x"),
        reply(b" " * (remote_source.MAX_FRAME_BYTES + 1), [], b"x"),
        reply(b"{}", [], b"x" * (remote_source.MAX_FRAME_BYTES + 1)),
    ],
)
def test_a_frame_that_is_none_is_a_bad_reply(bad):
    with pytest.raises(BadReply):
        remote_source._read_frame(bad)


def test_what_belongs_in_no_frame_does_not_reach_the_page():
    header, buffers = remote_source._read_frame(
        reply(msgspec.json.encode({"type": "chunk", "name": "evil.exe", "seq": 7, "at": 1.0}), [1, 2], b"abc")
    )
    assert header == {"at": 1.0}
    assert buffers == [b"a", b"bc"]


# ---------------------------------------------------------------- nodes that are no `Swarm`


def test_of_a_server_by_itself_is_shown_what_servers_report(swarm, watcher):
    contact: Contact = next(iter(swarm.experts().values())).contact
    assert contact != swarm._node.contact
    source: RemoteSource = watcher.view.remote_source(contact, "whatever")

    def frame() -> dict[str, object]:
        return source.frame("page", **LOOK, fresh=False)[0]

    first = frame()
    assert (first["reset"], first["source"], first["can"]) == (True, "servers", {"control": False})
    assert lookers(watcher) == 1
    eventually(lambda: frame()["headline"]["experts_alive"] == 2)  # type: ignore[index]
    with pytest.raises(LabkitError):
        source.execute({"do": "kill", "server": 0})
    source.forget("page")
    assert lookers(watcher) == 0
