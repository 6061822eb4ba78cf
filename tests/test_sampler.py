"""Scenes made of counters and inventories: rates, states, and who is who. The clock is invented."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from labkit.contact import Contact
from labkit.directory.grids import GridInfo
from labkit.errors import CAUSES
from labkit.events import (
    CallFailed,
    CallFinished,
    ExpertGivenUp,
    ExpertHandedOver,
    ExpertTakenOver,
    RowsUnanswered,
    ServerLost,
    StepFinished,
)
from labkit.expert_uid import ExpertInfo, grid_uids
from labkit.histogram import BUCKETS, RELATIVE_ERROR, Histogram
from labkit.server.statistics import CopyStatistics, ServerStatistics
from labkit.view.collect import registry
from labkit.view.collect.inventory import Inventory, LocalServer
from labkit.view.collect.moves import listed
from labkit.view.collect.sampler import Sampler
from labkit.view.collect.telemetry import Telemetry
from labkit.view.scene import SERIES, Layer, Scene, State
from tests.fake_network import make_contact
from tests.nodes import changed

START = 1000.0
GRIDS = {"ffn": GridInfo((2, 2), "ffn", {})}
UIDS = list(grid_uids("ffn", (2, 2)))


def at(number: int) -> str:
    return make_contact(number).endpoint


class Stage:
    """A sampler, the clock that it goes by, and what it looks at."""

    def __init__(self) -> None:
        self.now = START
        self.telemetry = Telemetry(started=START)
        self.inventory = Inventory()
        self.in_flight = 0
        self.run: Any = None
        self.sampler = Sampler(
            self.telemetry, lambda: self.inventory, lambda: self.in_flight, lambda: self.run, "test",
            clock=lambda: self.now,
        )  # fmt: skip

    def found(self, experts: Mapping[str, int], suspects: Mapping[str, int] | None = None, **changes: Any) -> None:
        """A new inventory: who serves which expert."""

        def infos(where: Mapping[str, int]) -> dict[str, ExpertInfo]:
            return {uid: ExpertInfo(uid, make_contact(number)) for uid, number in where.items()}

        usual: dict[str, Any] = {"grids": GRIDS, "polled_at": self.now}
        self.inventory = Inventory(experts=infos(experts), suspects=infos(suspects or {}), **usual | changes)

    def call(self, uid: str = UIDS[0], server: int = 1, **changes: Any) -> None:
        usual: dict[str, Any] = {
            "direction": "forward", "rows": 4, "seconds": 0.1, "queue": 0.02, "compute": 0.03, "bytes": 100,
            "updates": 0, "at": self.now,
        }  # fmt: skip
        self.telemetry(CallFinished(uid=uid, address=at(server), **usual | changes))

    def fail(self, cause: str = "timeout", uid: str = UIDS[0], server: int = 1) -> None:
        self.telemetry(
            CallFailed(
                uid=uid,
                address=at(server),
                direction="forward",
                rows=4,
                seconds=1.0,
                cause=cause,
                detail="",
                at=self.now,
            )
        )

    def after(self, seconds: float) -> Scene:
        self.now += seconds
        return self.sampler.scene()


def statistics(uids: list[str], requests: int = 0, **changes: Any) -> ServerStatistics:
    times = Histogram([requests if n == 40 else 0 for n in range(BUCKETS)]).counts
    usual: dict[str, Any] = {
        "experts": dict.fromkeys(uids, 7), "queued_requests": 5, "queued_rows": 0, "batches": 0, "rows": 0,
        "busy_seconds": 0.0, "overloaded": 0, "expired": 0, "latency": 0.25, "loss": 0.5, "uptime": 1.0,
        "expert_rows": [4 * requests] * len(uids), "expert_requests": [requests] * len(uids),
        "expert_seconds": [0.2 * requests] * len(uids), "total_times": times, "queue_times": times,
        "compute_times": times,
    }  # fmt: skip
    return ServerStatistics(**usual | changes)


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize("looks", [1, 2, 10, 50])
def test_rates_do_not_depend_on_how_often_one_looks(looks):
    stage = Stage()
    stage.found(dict.fromkeys(UIDS, 1))
    for second in range(20):
        for look in range(50):
            stage.now = START + second + (look + 1) / 50
            stage.call(staleness=3)
            if look % (50 // looks) == 0:
                scene = stage.after(0)
    scene = stage.after(0)
    assert scene.headline.calls == pytest.approx(50, rel=0.05)
    assert scene.headline.bytes == pytest.approx(5000, rel=0.05)
    assert scene.experts.load[0] == pytest.approx(200, rel=0.05)
    assert scene.servers.calls[0] == pytest.approx(50, rel=0.05)
    assert scene.headline.staleness == pytest.approx(3)
    assert scene.source == "calls"


def test_rates_are_right_from_the_first_second_and_fall_when_nothing_happens():
    stage = Stage()
    stage.found(dict.fromkeys(UIDS, 1))
    for _ in range(10):
        stage.now += 0.1
        stage.call()
    assert stage.after(0).headline.calls == pytest.approx(10)
    assert stage.after(5).headline.calls < 5
    assert stage.after(60).headline.calls == 0


def test_failures_are_a_share_of_the_last_calls_and_are_forgotten():
    stage = Stage()
    stage.found(dict.fromkeys(UIDS, 1))
    for _ in range(30):
        stage.call()
        stage.fail("lost")
    scene = stage.after(1)
    assert scene.experts.failures[0] == pytest.approx(0.5)
    assert math.isnan(scene.experts.failures[1])  # never called
    assert scene.servers.failed[0].tolist() == [30 if cause == "lost" else 0 for cause in CAUSES]
    assert (scene.experts.calls[0], scene.experts.failed[0], scene.headline.failed) == (30, 30, {"lost": 30})
    for _ in range(40):
        stage.call()
        scene = stage.after(0.5)
    assert scene.experts.failures[0] < 0.01
    assert scene.experts.failed[0] == 30


def test_latency_is_that_of_the_last_calls_split_and_stays_in_sight():
    stage = Stage()
    stage.found(dict.fromkeys(UIDS, 1))
    for _ in range(100):
        stage.call(seconds=5.0, queue=4.0, compute=0.5)
    stage.after(1)
    stage.after(100)
    for _ in range(100):
        stage.call()
    scene = stage.after(1)
    assert scene.experts.latency[0] == pytest.approx(100)
    assert np.isnan(scene.experts.latency[1:]).all()
    np.testing.assert_allclose(
        scene.servers.latency[0], [[100] * 3, [20] * 3, [30] * 3, [50] * 3], rtol=RELATIVE_ERROR + 1e-6
    )
    assert (stage.after(1000).servers.latency[0] == scene.servers.latency[0]).all()


# ---------------------------------------------------------------- states


def states(scene: Scene) -> tuple[list[State], list[tuple[str, State]]]:
    servers = zip(scene.servers.words, map(State, scene.servers.state), strict=True)
    return [State(state) for state in scene.experts.state], list(servers)


def test_nothing_is_known_at_first():
    scene = Stage().after(0.1)
    assert (scene.experts.uids, scene.servers.labels, scene.layers, scene.source) == ((), (), (), "servers")
    assert math.isnan(scene.headline.loss) and math.isnan(scene.headline.calls) is False
    assert scene.servers.latency.shape == (0, 4, 3) and scene.series.values.shape == (0, len(SERIES))


def test_a_remote_server_that_has_moved_keeps_its_row_and_shows_its_new_address():
    stage = Stage()
    home, away = make_contact(1), changed(make_contact(1), host="203.0.113.9")

    def served_at(contact: Contact) -> Scene:
        infos = {uid: ExpertInfo(uid, contact) for uid in UIDS}
        stage.inventory = Inventory(grids=GRIDS, polled_at=stage.now, experts=infos)
        return stage.after(1)

    for contact in (home, away, home):
        scene = served_at(contact)
        assert list(scene.servers.addresses) == list(scene.servers.labels) == [contact.endpoint]
        assert states(scene) == ([State.ALIVE] * 4, [("remote", State.ALIVE)])


def test_a_remote_server_is_alive_then_silent_then_gone_and_keeps_its_row():
    stage = Stage()
    stage.found(dict.fromkeys(UIDS[:2], 1) | {UIDS[2]: 2})
    assert states(stage.after(1)) == ([State.ALIVE] * 3, [("remote", State.ALIVE)] * 2)
    stage.found({UIDS[2]: 2}, suspects=dict.fromkeys(UIDS[:2], 1))
    assert states(stage.after(1)) == (
        [State.SUSPECT, State.SUSPECT, State.ALIVE], [("silent", State.SUSPECT), ("remote", State.ALIVE)],
    )  # fmt: skip
    assert states(stage.after(20))[1][0] == ("gone", State.DEAD)
    stage.found({UIDS[2]: 2})  # it has not been declared for long
    scene = stage.after(1)
    assert states(scene) == (
        [State.DEAD, State.DEAD, State.ALIVE], [("gone", State.DEAD), ("remote", State.ALIVE)],
    )  # fmt: skip
    assert (scene.headline.experts, scene.headline.experts_alive, scene.headline.servers_alive) == (3, 1, 1)
    stage.found(dict.fromkeys(UIDS[:2], 1) | {UIDS[2]: 2})
    assert states(stage.after(1))[1] == [("remote", State.ALIVE)] * 2


def test_two_polls_in_a_row_that_fail_make_a_server_suspect_and_its_experts_with_it():
    stage = Stage()
    stage.found(dict.fromkeys(UIDS, 1), failures={at(1): 1})
    assert states(stage.after(1))[1] == [("remote", State.ALIVE)]
    stage.found(dict.fromkeys(UIDS, 1), failures={at(1): 2})
    assert states(stage.after(1)) == ([State.SUSPECT] * 4, [("silent", State.SUSPECT)])


def test_one_expert_on_back_off_does_not_make_its_server_suspect():
    stage = Stage()
    stage.found(dict.fromkeys(UIDS[1:], 1), suspects={UIDS[0]: 1})
    assert states(stage.after(1)) == (
        [State.ALIVE] * 3 + [State.SUSPECT], [("remote", State.ALIVE)],
    )  # fmt: skip


def local(word: str, number: int = 1, uids: tuple[str, ...] = tuple(UIDS)) -> LocalServer:
    return LocalServer(word, at(number) if number else "", uids, 0.1, 0.2)


def test_a_local_server_is_one_row_through_its_lives_whatever_its_address():
    stage = Stage()
    stage.found({}, locals=(local("starting", 0),))
    assert states(stage.after(1)) == ([State.STARTING] * 4, [("starting", State.STARTING)])
    stage.found(dict.fromkeys(UIDS, 1), locals=(local("running"),))
    stage.call()
    assert states(stage.after(1)) == ([State.ALIVE] * 4, [("running", State.ALIVE)])
    stage.found(dict.fromkeys(UIDS, 1), locals=(local("killed"),))  # the directory does not know yet
    assert states(stage.after(1)) == ([State.DEAD] * 4, [("killed", State.DEAD)])
    stage.found({}, locals=(local("running", 2),))  # and now not again
    assert states(stage.after(1))[0] == [State.STARTING] * 4
    stage.found(dict.fromkeys(UIDS, 2), locals=(local("running", 2),))
    stage.call(server=2)
    scene = stage.after(1)
    assert states(scene) == ([State.ALIVE] * 4, [("running", State.ALIVE)])
    assert (scene.servers.labels, scene.servers.addresses) == (("servers[0]",), (at(2),))
    assert scene.servers.local.tolist() == [0] and scene.servers.experts.tolist() == [4]
    assert scene.servers.injected[0].tolist() == pytest.approx([0.1, 0.2])
    assert scene.headline.answered == 2 and scene.servers.calls[0] > 0


def test_a_server_that_was_met_by_its_address_becomes_the_local_one_that_it_is():
    stage = Stage()
    stage.call()
    assert stage.after(1).servers.labels == (at(1),)
    stage.found(dict.fromkeys(UIDS, 1), locals=(local("running"),))
    assert stage.after(1).servers.labels == ("servers[0]",)


def test_a_server_is_shown_by_its_label_which_cannot_pass_for_one_started_here():
    def labels(label: str) -> list[str]:
        stage = Stage()
        said = {at(1): (statistics(UIDS[:2], label=label), START), at(2): (statistics(UIDS[2:]), START)}
        where = {UIDS[0]: 1, UIDS[1]: 1, UIDS[2]: 2, UIDS[3]: 2}
        stage.found(where, statistics=said, locals=(local("running", 2)._replace(label="mine"),))
        return sorted(stage.after(1).servers.labels)

    assert labels("kitchen") == ["kitchen", "servers[0] mine"]
    assert labels("a\x1b[31m\tb\n" + "c" * 100) == ["a [31m b " + "c" * 55, "servers[0] mine"]
    assert labels("servers[0]") == labels("") == [at(1), "servers[0] mine"]


def test_beside_the_name_of_a_server_stands_who_relays_for_it():
    stage = Stage()
    elsewhere, here = statistics(UIDS[:2], label="attic"), statistics(UIDS[2:])
    elsewhere.relay = here.relay = "203.0.113.5:4000"
    where = {UIDS[0]: 1, UIDS[1]: 1, UIDS[2]: 2, UIDS[3]: 2}
    for seconds in (1, 2):
        said = {at(1): (elsewhere, START), at(2): (here, START)}
        stage.found(where, statistics=said, locals=(local("running", 2),))
        labels = sorted(stage.after(seconds).servers.labels)
        assert labels == ["attic (relayed by 203.0.113.5:4000)", "servers[0] (relayed by 203.0.113.5:4000)"]


def test_statistics_with_an_endless_label_are_a_bad_reply():
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**msgspec.to_builtins(statistics([])), "label": "x" * 1000}, ServerStatistics)


def test_without_an_inventory_the_calls_alone_tell_who_there_is():
    stage = Stage()
    stage.call("ffn.1.2", 3)
    stage.call("other.5", 4)
    scene = stage.after(1)
    assert scene.layers == (Layer("ffn", (2, 3)), Layer("other", (6,)))
    assert (scene.experts.uids, scene.experts.cell.tolist()) == (("ffn.1.2", "other.5"), [5, 5])
    assert scene.experts.server.tolist() == [0, 1] and scene.servers.addresses == (at(3), at(4))
    assert states(scene) == ([State.ALIVE] * 2, [("remote", State.ALIVE)] * 2)
    stage.found({}, grids={"ffn": GridInfo((4, 4), "", {})})
    scene = stage.after(1)
    assert scene.layers[0].sizes == (4, 4) and scene.experts.cell.tolist() == [6, 5]


def test_experts_outside_their_grid_are_left_out_and_a_huge_grid_is_shown_as_far_as_it_has_experts():
    stage = Stage()
    stage.found(
        {"ffn.0.0": 1, "ffn.2.0": 1, "ffn.1": 1, "huge.0.1.0": 1, "huge.5.0.0": 1, "huge.1048575.1048575.0": 1},
        grids=GRIDS | {"huge": GridInfo((1 << 20, 1 << 20, 1 << 20), "", {})},
    )
    scene = stage.after(1)
    assert scene.experts.uids == ("ffn.0.0", "huge.0.1.0", "huge.5.0.0")
    assert scene.layers == (Layer("ffn", (2, 2)), Layer("huge", (6, 2, 1)))
    assert scene.experts.cell.tolist() == [0, 1, 10]


def test_tables_are_bounded(monkeypatch):
    monkeypatch.setattr(registry, "MAX_EXPERTS", 3)
    monkeypatch.setattr(registry, "MAX_SERVERS", 2)
    stage = Stage()
    stage.found({uid: number for number, uid in enumerate(UIDS)})
    for number, uid in enumerate(UIDS):
        stage.call(uid, number)
    scene = stage.after(1)
    assert (len(scene.experts.uids), len(scene.servers.labels), scene.headline.answered) == (3, 2, 4)
    assert scene.experts.server.tolist() == [0, 1, -1]


# ---------------------------------------------------------------- what servers report


def test_who_makes_no_calls_sees_what_the_servers_report():
    stage = Stage()
    for second in range(5):
        stage.found(dict.fromkeys(UIDS, 1), statistics={at(1): (statistics(UIDS, 1000 + 10 * second), START + second)})
        scene = stage.after(1)
    assert scene.source == "servers"
    assert scene.experts.load.tolist() == pytest.approx([40] * 4)
    assert scene.experts.latency.tolist() == pytest.approx([200] * 4)
    assert scene.experts.calls.tolist() == [1040] * 4 and scene.experts.updates.tolist() == [7] * 4
    assert scene.servers.calls[0] == scene.headline.calls == pytest.approx(40)
    unknown = [SERIES.index(name) for name in ("samples", "calls", "bytes", *CAUSES)]
    assert len(scene.series.values) and np.isnan(scene.series.values[:, unknown]).all()
    assert np.isfinite(scene.series.values[:, SERIES.index("in_flight")]).all()
    assert scene.servers.queue[0] == 5 and scene.servers.heard[0] == pytest.approx(1)
    assert scene.servers.injected[0].tolist() == [0.25, 0.5]
    assert np.isfinite(scene.servers.latency[0, :3]).all() and np.isnan(scene.servers.latency[0, 3]).all()
    assert math.isnan(scene.headline.bytes)
    assert math.isnan(stage.after(10).servers.queue[0])  # too old by now
    assert stage.after(30).headline.calls < 0.1


def test_a_server_that_begins_anew_counts_from_zero_and_rates_go_on():
    stage = Stage()
    for second, requests in enumerate([500, 510, 520, 10, 20, 30]):
        said = statistics(UIDS, requests)
        stage.found(dict.fromkeys(UIDS, 1), statistics={at(1): (said, START + second)})
        scene = stage.after(1)
    assert scene.experts.load.tolist() == pytest.approx([40] * 4)
    assert scene.experts.calls.tolist() == [30] * 4


def test_a_server_cannot_speak_for_experts_that_are_not_its_own():
    stage = Stage()
    liar = statistics([*UIDS, "ffn.9.9", "no uid"], 5)
    for second in range(3):
        stage.found({UIDS[0]: 1, UIDS[1]: 2}, statistics={at(1): (liar, START + second)})
        scene = stage.after(1)
    assert scene.experts.updates.tolist() == [7, 0]
    assert scene.experts.uids == tuple(UIDS[:2])


# ---------------------------------------------------------------- series, steps and marks


def test_the_series_has_what_happened_in_each_half_second():
    stage = Stage()
    for number in range(4):
        stage.now = START + number / 2 + 0.1
        for _ in range(number):
            stage.call(staleness=number)
        stage.fail("refused")
        stage.telemetry(
            StepFinished(step=number, loss=float(number), samples=8, seconds=0.1, staleness=0, at=stage.now)
        )
        stage.in_flight = number
        stage.after(0)
    stage.now = START + 2.2
    series = stage.after(0).series
    assert (series.width, series.first, series.values.shape) == (0.5, 0, (4, len(SERIES)))
    column = {name: series.values[:, n].tolist() for n, name in enumerate(SERIES)}
    assert column["calls"] == [0, 2, 4, 6] and column["bytes"] == [0, 200, 400, 600]
    assert column["loss"] == [0, 1, 2, 3] and column["samples"] == [16] * 4
    assert column["refused"] == [1] * 4 and column["timeout"] == [0] * 4
    assert column["staleness"][1:] == [1, 2, 3] and math.isnan(column["staleness"][0])
    assert column["in_flight"] == [0, 0.5, 1.5, 2.5]  # what was seen there, and what held when the bin began


def test_a_look_at_the_calls_in_flight_holds_for_a_while():
    stage = Stage()
    stage.in_flight = 6
    stage.after(0.1)
    stage.in_flight = 2
    assert stage.after(2).series.values[:, SERIES.index("in_flight")].tolist() == [6, 6, 6, 6]
    values = stage.after(60).series.values[:, SERIES.index("in_flight")]
    assert values[5:].tolist() == [0] * (len(values) - 5)  # nobody looked; and no call ended


def test_the_headline_has_the_run_and_remembers_it_when_nobody_holds_it_any_more():
    class Run:
        steps, total_steps, loss, running = 30, 100, 0.5, True

    stage = Stage()
    stage.run = Run()
    for number in range(10):
        stage.now += 0.1
        stage.telemetry(StepFinished(step=number, loss=1.0, samples=64, seconds=0.1, staleness=0, at=stage.now))
    stage.telemetry(RowsUnanswered(prefix="ffn", direction="forward", rows=3))
    stage.in_flight = 9
    headline = stage.after(0).headline
    assert (headline.running, headline.steps, headline.total_steps, headline.loss) == (True, 30, 100, 0.5)
    assert headline.samples == pytest.approx(640)
    assert (headline.in_flight, headline.unanswered_rows) == (9, 3)
    stage.run = None
    headline = stage.after(1).headline
    assert (headline.running, headline.steps, headline.loss) == (False, 30, 0.5)


def test_marks_say_what_happened_to_servers_and_when():
    stage = Stage()
    stage.telemetry(ServerLost(address=at(1), uids=tuple(UIDS), detail="", at=START + 3))
    stage.telemetry.mark("servers[0] killed", at=START + 4)
    marks = stage.after(5).marks
    assert [(mark.at, mark.text) for mark in marks] == [
        (3.0, f"{at(1)} lost, with 4 experts"), (4.0, "servers[0] killed"),
    ]  # fmt: skip


def test_a_server_that_was_lost_has_its_name_in_the_mark():
    stage = Stage()
    stage.found(dict.fromkeys(UIDS, 1), locals=(local("killed"),))
    stage.after(0)
    stage.telemetry(ServerLost(address=at(1), uids=tuple(UIDS[:1]), detail="", at=START + 3))
    assert [mark.text for mark in stage.after(5).marks] == ["servers[0] lost, with 1 expert"]


# ---------------------------------------------------------------- copies


def said_of_copies(**changes: Any) -> CopyStatistics:
    return CopyStatistics(**{"backups": 1, "kept": 3, "copied": 2, "period": 10.0} | changes)


def taken(uid: str, server: int, before: int, lost: int = 0, **more: Any) -> ExpertTakenOver:
    return ExpertTakenOver(
        uid=uid, address=at(server), before=at(before), epoch=1, lost_updates=lost, seconds=1.5, at=START + 7, **more
    )


def test_experts_that_were_adopted_and_copies_and_how_many_are_at_risk_are_in_the_scene():
    stage = Stage()
    first = statistics(UIDS[:3], copies=said_of_copies(copied=3, adopted=[UIDS[2]]))
    second = statistics(UIDS[3:], copies=said_of_copies(copied=0, at_risk=1, kept=0))
    stage.found(dict(zip(UIDS, (1, 1, 1, 2), strict=True)), statistics={at(1): (first, START), at(2): (second, START)})
    scene = stage.after(0)
    assert scene.experts.adopted.tolist() == [False, False, True, False]
    assert (scene.servers.copies.tolist(), scene.servers.adopted.tolist()) == ([3, 0], [1, 0])
    assert scene.headline.at_risk == 1
    assert scene.copies is not None and "1 of 4 experts are at risk" in scene.copies.words
    back = statistics(UIDS[:3], copies=said_of_copies(copied=3))  # it was given up, and is its own again
    stage.found(dict(zip(UIDS, (1, 1, 1, 2), strict=True)), statistics={at(1): (back, START + 1)})
    scene = stage.after(1)
    assert not scene.experts.adopted.any() and scene.headline.at_risk == 0


def test_a_server_that_is_gone_puts_no_expert_at_risk_and_where_no_copies_are_made_nothing_is_said():
    stage = Stage()
    said = statistics(UIDS, copies=said_of_copies(copied=0, at_risk=4))
    stage.found(dict.fromkeys(UIDS, 1), statistics={at(1): (said, START)}, locals=(local("killed"),))
    assert math.isnan(stage.after(0).headline.at_risk)
    stage.found(dict.fromkeys(UIDS, 1), statistics={at(1): (said, START)}, failures={at(1): 1})
    assert math.isnan(stage.after(0).headline.at_risk)
    stage.found(dict.fromkeys(UIDS, 1), statistics={at(1): (statistics(UIDS), START + 1)})
    scene = stage.after(1)
    assert (scene.copies, math.isnan(scene.headline.at_risk)) == (None, True)
    assert np.isnan(scene.servers.copies).all() and np.isnan(scene.servers.adopted).all()


def test_who_took_over_from_whom_is_one_mark_for_all_experts_of_a_server():
    stage = Stage()
    stage.found(dict.fromkeys(UIDS, 1), locals=(local("running"), local("killed", 2, ()), local("running", 3, ())))
    for event in (taken(UIDS[0], 1, 2), taken(UIDS[1], 3, 2, lost=2), taken(UIDS[2], 1, 9, lost=1)):
        stage.telemetry(event)
    assert not stage.after(8).marks, "more of them may come"
    stage.telemetry(taken(UIDS[3], 3, 2))
    assert not stage.after(1.5).marks
    scene = stage.after(2)
    assert [(mark.at, mark.text) for mark in scene.marks] == [
        (7.0, "servers[0] and [2] took over 3 experts of servers[1], 2 updates lost"),
        (7.0, f"servers[0] took over 1 expert of {at(9)}, 1 update lost"),
    ]
    assert (scene.headline.taken_over, scene.headline.updates_lost) == (4, 3)


def test_hand_overs_are_marks_too_and_the_last_scene_has_all():
    stage = Stage()
    stage.found(dict.fromkeys(UIDS, 1), locals=(local("running"),))
    stage.telemetry(ExpertHandedOver(uid=UIDS[0], address=at(1), to=at(2), epoch=2))
    stage.telemetry(ExpertGivenUp(uid=UIDS[1], address=at(1), to=at(2), lost_updates=3))
    assert [mark.text for mark in stage.sampler.scene(open=False).marks] == [
        f"servers[0] gave 1 expert to {at(2)}",
        f"servers[0] gave 1 expert up to {at(2)}, 3 updates lost",
    ]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["servers[0]"], "servers[0]"),
        (["servers[0]", "servers[3] ann", "servers[5]"], "servers[0], [3] ann and [5]"),
        (["servers[0]", "lab"], "servers[0] and lab"),
        (["a", "b", "c", "d", "e"], "5 servers"),
    ],
)
def test_servers_are_listed_in_short(names: list[str], words: str):
    assert listed(names) == words


@pytest.mark.parametrize("word", ["stopped", "killed", "starting"])
def test_experts_that_others_have_taken_over_stay_theirs_when_their_first_server_ends(word: str):
    stage = Stage()
    stage.found(dict.fromkeys(UIDS, 2), locals=(local("running", 1, ()),))  # it has handed all over
    stage.after(0)
    stage.inventory = replace(stage.inventory, locals=(local(word),))  # and would begin with them again
    scene = stage.after(1)
    row = scene.servers.addresses.index(at(2))
    assert scene.experts.server.tolist() == [row] * 4 and (scene.experts.state == State.ALIVE).all()


def test_a_scene_does_not_change_any_more():
    stage = Stage()
    stage.found(dict.fromkeys(UIDS, 1))
    stage.call()
    first = stage.after(1)
    before = [np.array(column) for column in (first.experts.calls, first.experts.state, first.servers.state)]
    for number in range(50):
        stage.call(UIDS[number % 4], 2 + number % 3)
    stage.found({UIDS[0]: 4})
    stage.after(1)
    after = (first.experts.calls, first.experts.state, first.servers.state)
    assert all((mine == its).all() for mine, its in zip(after, before, strict=True))
