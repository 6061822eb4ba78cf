"""A run as moments that are kept, and as the files made of them."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import html.parser
import json
import math
import re

import numpy as np
import pytest

from labkit.errors import LabkitError
from labkit.view import export, recording
from labkit.view.recording import Recording
from labkit.view.scene import SERIES, Mark, Scene, State
from tests.frame_store import FrameStore
from tests.scenes import make_scene, play

SCRIPT = 'const text = "</SCRIPT><!--<script>"; // bundled'


@pytest.fixture
def front_end(tmp_path, monkeypatch):
    (tmp_path / "replay.js").write_text(SCRIPT + "\r\n", newline="")
    (tmp_path / "dashboard.css").write_text("main { color: red }")
    monkeypatch.setattr(export, "STATIC_FILES", tmp_path)


def record(scenes, **limits) -> tuple[Recording, Scene]:
    kept = Recording(**limits)
    for scene in scenes:
        kept.add(scene)
    return kept, scene


def times(kept: Recording) -> list[float]:
    return [key.at for key in kept.keyframes]


def show(frames) -> FrameStore:
    """A page to which these frames are told, one after the other."""
    store = FrameStore()
    for header, buffers in frames:
        store.apply(header, buffers)
    return store


# ---------------------------------------------------------------- what is kept


def test_a_moment_is_kept_once_a_second():
    kept, _ = record(play(100, step=0.25))
    assert times(kept) == [0.25 + second for second in range(25)]


def test_a_keyframe_holds_every_expert_and_every_server_of_its_moment():
    scenes = list(play(9))
    kept, last = record(scenes)
    for number in (5, 2, 8):  # in any order
        store, scene = show([export.static_frame(last), kept.keyframes[number].unpack()]), scenes[number]
        assert store.header["at"] == scene.at and not store.header["reset"]
        assert store.column("experts", "state").tolist() == scene.experts.state.tolist()
        assert store.column("experts", "calls").tolist() == scene.experts.calls.tolist()
        assert np.allclose(store.column("experts", "latency"), scene.experts.latency, rtol=1e-4, equal_nan=True)
        assert store.column("servers", "state").tolist() == scene.servers.state.tolist()
        assert [word for _, _, word in store.text] == list(scene.servers.words)


def test_a_quiet_hour_is_kept_though_much_happened_in_the_hour_before():
    busy = (make_scene(4, 2, at=float(at), outages=[(0, at - 1.0, at)] * (at % 2)) for at in range(1, 3600, 1))
    quiet = (make_scene(4, 2, at=3600.0 + at, outages=[]) for at in range(3600))
    kept, _ = record([*busy, *quiet], max_keyframes=60)
    assert len(kept.keyframes) <= 60
    assert sum(at > 3600 for at in times(kept)) > 10


def test_a_long_run_has_wider_spacing_and_keeps_its_first_and_last_moment():
    kept, _ = record((make_scene(at=float(at), outages=[]) for at in range(1, 1001)), max_keyframes=100)
    assert 40 < len(kept.keyframes) <= 100
    assert times(kept)[0] == 1.0 and times(kept)[-1] > 1000 - kept.spacing
    assert kept.spacing == 16 and max(np.diff(times(kept))) <= 2 * kept.spacing


def test_kills_and_returns_are_not_thinned_away():
    outages = [(1, 100.5, 130.5), (2, 301.5, 302.5), (3, 770.5, math.inf)]
    kept, _ = record((make_scene(at=float(at), outages=outages) for at in range(1, 1001)), max_keyframes=40)
    assert kept.spacing > 30
    assert {101.0, 131.0, 302.0, 303.0, 771.0} <= set(times(kept))
    dead = {key.at: show([key.unpack()]).column("servers", "state") == State.DEAD for key in kept.keyframes}
    assert dead[101.0][1] and not dead[131.0][1] and dead[302.0][2] and not dead[303.0][2] and dead[771.0][3]


def test_a_death_without_a_mark_is_not_thinned_away_either():
    def silent(at):
        return dataclasses.replace(make_scene(at=float(at), outages=[(1, 100.5, math.inf)]), marks=[])

    kept, _ = record(map(silent, range(1, 250)), max_keyframes=20)
    assert 101.0 in times(kept)


def test_more_marks_than_there_is_room_for_do_not_stop_the_thinning():
    scenes = (dataclasses.replace(make_scene(at=float(at)), marks=[Mark(float(at), "killed")]) for at in range(1, 200))
    kept, _ = record(scenes, max_keyframes=20)
    assert len(kept.keyframes) <= 20 and times(kept)[0] == 1.0 and times(kept)[-1] == 199.0


def test_memory_is_bounded_by_bytes_too():
    scenes = [make_scene(2000, 20, at=float(at), seed=at) for at in range(1, 60)]
    one = len(record(scenes[:1])[0].keyframes[0].packed)
    kept, _ = record(scenes, max_bytes=12 * one)
    assert 5 <= len(kept.keyframes) <= 12 and sum(len(key.packed) for key in kept.keyframes) <= 12 * one
    kept, last = record(scenes, max_bytes=1)
    assert times(kept) == [last.at]


# ---------------------------------------------------------------- JSON


def test_json_has_tables_for_pandas_and_null_for_what_is_not_known():
    kept, scene = record(play(30, experts=16, servers=4))
    text = kept.to_json(scene).decode()
    assert "NaN" not in text and "Infinity" not in text
    data = json.loads(text)
    assert (data["swarm"], data["seconds"], data["headline"]["experts"]) == ("default", 30.0, 16)
    assert set(data["series"]) == {"t", *SERIES} and data["series"]["t"][:3] == [0.0, 1.0, 2.0]
    assert {len(column) for column in data["series"].values()} == {30}
    assert data["series"]["loss"][-1] == pytest.approx(scene.headline.loss, rel=1e-5)
    assert sum(data["series"]["lost"]) == pytest.approx(12)
    expert = data["experts"][6]
    assert (expert["uid"], expert["server"], expert["state"], expert["latency_ms"]) == (
        "ffn.1.2", "servers[2]", "alive", None,
    )  # fmt: skip
    assert data["servers"][1]["failed"] == {"timeout": 6, "lost": 12}
    assert set(data["servers"][0]["latency_ms"]["total"]) == {"p50", "p95", "p99"}
    assert [mark["text"] for mark in data["marks"]] == ["servers[1] killed", "servers[1] back"]


def test_an_expert_whose_server_is_not_known_has_none():
    scene = make_scene(4, 0)
    assert [expert["server"] for expert in json.loads(export.to_json(scene))["experts"]] == [None] * 4


# ---------------------------------------------------------------- HTML


class Elements(html.parser.HTMLParser):
    """The elements of a page as (tag, attributes, text), as a browser takes them apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict, str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), ""))
        self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            tag, attributes, text = self.found[-1]
            self.found[-1] = tag, attributes, text + data

    def all(self, tag):
        return [(attributes, text) for found, attributes, text in self.found if found == tag]


def replayed(page: bytes) -> dict:
    [data] = [text for attributes, text in Elements(page.decode()).all("script") if attributes.get("id")]
    found: dict = json.loads(gzip.decompress(base64.b64decode(data, validate=True)))
    return found


def frame(packed: dict) -> tuple[dict, list[bytes]]:
    return packed["header"], [base64.b64decode(buffer, validate=True) for buffer in packed["buffers"]]


def test_the_page_replays_the_run_from_its_first_to_its_last_moment(front_end):
    kept, scene = record(list(play(30))[:-1])
    scene = make_scene(at=29.5, outages=[(1, 10.0, 20.0)])
    data = replayed(kept.to_html(scene))
    assert (data["swarm"], data["seconds"]) == ("default", 29.5)
    assert [packed["header"]["at"] for packed in data["keyframes"]] == [*range(1, 30), 29.5]
    still = show([frame(data["static"])])
    assert still.header["reset"] and len(still.marks) == 2 and np.array_equal(still.series, scene.series.values)
    assert still.column("experts", "cell").tolist() == scene.experts.cell.tolist()
    dying = show([frame(data["static"]), frame(data["keyframes"][12])])
    assert dying.text[1] == ("servers[1]", "tcp://10.0.0.2:40001", "killed")
    assert (dying.column("experts", "state") == State.DEAD).sum() == 4


def test_the_page_runs_its_one_script_and_asks_nothing_of_a_network(front_end):
    kept, scene = record(play(3))
    page = Elements(kept.to_html(scene).decode())
    [policy] = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    [script] = [text for attributes, text in page.all("script") if attributes["type"] == "module"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}'; " in policy
    assert script == r'const text = "\x3c/SCRIPT>\x3c!--<script>"; // bundled'
    assert page.all("style") == [({}, "\nmain { color: red }\n")]
    assert not [a for _, a, _ in page.found if {"src", "href"} & set(a)]


def test_nothing_that_a_peer_wrote_is_html(front_end):
    hostile = "</script></title><script>alert(1)</script>"
    scene = make_scene()
    servers = dataclasses.replace(scene.servers, labels=[hostile] * 4, addresses=[hostile] * 4, words=[hostile] * 4)
    scene = dataclasses.replace(scene, swarm=hostile, servers=servers, marks=[Mark(1.0, hostile)])
    kept, _ = record([scene])
    page = kept.to_html(scene)
    assert b"alert(1)</script>" not in page and len(Elements(page.decode()).all("script")) == 2
    assert re.search(rb"<title>labkit: swarm &lt;/script&gt;", page)
    assert frame(replayed(page)["static"])[0]["marks"] == [[1.0, hostile]]


def test_the_replay_of_a_large_swarm_is_bounded(front_end, monkeypatch):
    monkeypatch.setattr(recording, "MAX_REPLAY_BYTES", 400_000)
    kept, scene = record(make_scene(2000, 20, at=float(at)) for at in range(1, 41))
    data = replayed(kept.to_html(scene))
    assert len(kept.keyframes) == 40 and 4 <= len(data["keyframes"]) <= 10
    assert data["keyframes"][0]["header"]["at"] == 1 and data["keyframes"][-1]["header"]["at"] == 40


def test_without_a_front_end_the_error_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "STATIC_FILES", tmp_path / "static")
    kept, scene = record(play(2))
    with pytest.raises(LabkitError, match="run `make frontend`"):
        kept.to_html(scene)
