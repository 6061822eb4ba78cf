"""What a notebook shows: counters made of events, a swarm's table, a run's progress bar."""

from __future__ import annotations

import io
import re
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from labkit.errors import SwarmClosed
from labkit.events import CallFailed, CallFinished, RowsUnanswered, ServerLost, StepFinished
from labkit.server.statistics import CopyStatistics
from labkit.swarm import Swarm
from labkit.training.fit import fit
from labkit.view import progress
from labkit.view.collect.telemetry import Telemetry
from labkit.view.progress import show_progress
from labkit.view.scene import copies_of
from labkit.view.summary import ServerRow, SwarmSummary
from tests.swarms import eventually


def finished(uid="ffn.0", address="tcp://a:1", seconds=0.1, updates=0):
    return CallFinished(
        uid=uid, address=address, direction="forward", rows=1, seconds=seconds, queue=0, compute=0, bytes=1,
        updates=updates,
    )  # fmt: skip


def failed(cause, uid="ffn.0", address="tcp://a:1"):
    return CallFailed(uid=uid, address=address, direction="forward", rows=1, seconds=1.0, cause=cause, detail="")


# ---------------------------------------------------------------- telemetry


def test_calls_are_counted_in_all_by_server_and_by_expert():
    seen = Telemetry()
    for event in (
        finished("ffn.0", "tcp://a:1", 0.1, updates=3),
        finished("ffn.1", "tcp://a:1", 0.3),
        finished("ffn.2", "tcp://b:1", 0.5),
        failed("timeout", "ffn.2", "tcp://b:1"),
        failed("timeout", "ffn.2", "tcp://b:1"),
        failed("lost", "ffn.2", "tcp://b:1"),
    ):
        seen(event)
    assert (seen.total.finished, dict(seen.total.failed)) == (3, {"timeout": 2, "lost": 1})
    assert seen.total.mean_seconds == pytest.approx(0.3)
    assert (seen.by_address["tcp://a:1"].finished, seen.by_address["tcp://b:1"].failed["timeout"]) == (2, 2)
    assert seen.by_uid["ffn.0"].updates == 3
    assert Telemetry().total.mean_seconds == 0.0


def test_lost_servers_and_rows_without_an_answer_are_counted_and_other_events_ignored():
    seen = Telemetry()
    seen(ServerLost(address="tcp://a:1", uids=("ffn.0",), detail=""))
    seen(RowsUnanswered(prefix="ffn", direction="forward", rows=3))
    seen(RowsUnanswered(prefix="ffn", direction="backward", rows=5))
    seen(StepFinished(step=1, loss=1.0, samples=1, seconds=1.0, staleness=0))
    assert (seen.servers_lost, seen.unanswered_rows, seen.total.finished) == (1, 3, 0)


# ---------------------------------------------------------------- the swarm's table

ROWS = [
    ServerRow("servers[0]", "running", "tcp://127.0.0.1:40001", 8, 8, 1234, 12.34, {}),
    ServerRow("servers[1]", "killed", "tcp://127.0.0.1:40002", 8, 0, 7, 5.0, {"timeout": 1, "lost": 20}),
    ServerRow("servers[2]", "starting", "", 16, 0, 0, 0.0, {}),
    ServerRow("elsewhere", "remote", "tcp://10.0.0.7:5000", 4, 4, 99, 100.0, {}),
]
SUMMARY = SwarmSummary(
    "default", "open", "tcp://127.0.0.1:40000", True, {"ffn": ((4, 4), 12)}, ROWS, 1340, {"timeout": 1, "lost": 20}
)


def test_the_text_tells_each_state_by_a_sign_and_a_word():
    lines = SUMMARY.text().splitlines()
    assert [line.split()[:3] for line in lines[2:6]] == [
        ["●", "servers[0]", "running"],
        ["✕", "servers[1]", "killed"],
        ["◌", "servers[2]", "starting"],
        ["○", "elsewhere", "remote"],
    ]


def test_the_text_is_aligned_and_says_what_there_is():
    head, columns, first, second, third, fourth, foot = SUMMARY.text().splitlines()
    assert head == "swarm 'default', open at tcp://127.0.0.1:40000 (encrypted)"
    assert foot == "grid ffn 4 × 4: 12 experts alive; 1,340 calls answered, 21 failed (lost 20, timeout 1)"
    start, end = columns.index("address"), columns.index("calls") + len("calls")
    assert [line[start:].split()[0] for line in (first, second)] == ["tcp://127.0.0.1:40001", "tcp://127.0.0.1:40002"]
    assert [line[:end].split()[-1] for line in (first, second, third, fourth)] == ["1,234", "7", "0", "99"]
    assert "0 of 8" in second and "21 failed (lost 20, timeout 1)" in second


def test_a_swarm_without_servers_has_a_text_and_a_table_too():
    closed = SwarmSummary("default", "closed", "", False, {}, [], 0, {})
    assert closed.text() == "swarm 'default', closed\nno grid; 0 calls answered, no failures"
    assert "<table>" not in closed.html()


def test_the_html_says_the_same_as_the_text():
    html = SUMMARY.html()
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?</td>", html)]
    assert cells[:4] == ["servers[0]", "● running", "tcp://127.0.0.1:40001", "8"]
    assert html.count("<tr") == 5 and html.count('class="gone"') == 1
    assert "12 experts alive" in html


def test_the_html_is_escaped():
    hostile = "<script>alert('x')</script>"
    row = ServerRow(hostile, hostile, hostile, 1, 1, 1, 1.0, {hostile: 1})
    html = SwarmSummary(hostile, "open", hostile, False, {hostile: ((1,), 1)}, [row], 1, {hostile: 1}).html()
    assert "<script" not in html and "&lt;script&gt;" in html


def test_there_is_a_column_of_adopted_experts_as_soon_as_a_server_has_some():
    assert "adopted" not in SUMMARY.text() + SUMMARY.html()
    some = replace(SUMMARY, servers=[replace(ROWS[0], experts=12, experts_alive=12, adopted=4), *ROWS[1:]])
    _, columns, first, second, *_ = some.text().splitlines()
    end = columns.index("adopted") + len("adopted")
    assert (first[:end].split()[-2:], second[:end].split()[-1]) == (["12", "4"], "0")
    assert some.html().count("<td") == SUMMARY.html().count("<td") + len(ROWS)


# ---------------------------------------------------------------- copies


def said(copied: int = 4, at_risk: int = 0, adopted: int = 0, **more: Any) -> CopyStatistics:
    more = {"backups": 1, "period": 10.0} | more
    return CopyStatistics(copied=copied, at_risk=at_risk, adopted=[f"ffn.{n}" for n in range(adopted)], **more)


@pytest.mark.parametrize(
    ("servers", "words"),
    [
        ([said(), said()], "copies: each expert has one elsewhere"),
        ([said(backups=2), said()], "copies: each expert has some elsewhere"),
        ([said(adopted=3), said(adopted=1), None],
         "copies: each expert has one elsewhere; 4 adopted from other servers"),
        ([said(), said(0, 4)], "4 of 8 experts are at risk: no other server has a fresh copy"),
        ([said(0, 1)], "1 of 1 expert has no copy elsewhere: with one server there is nowhere to put it"),
        ([said(period=41.0), said()],
         "copies: each expert has one elsewhere; so large that each is copied every 41 s"),
        ([said(backups=0, copied=0, period=0.0), said(0, 4)],  # a spare one
         "4 of 4 experts are at risk: no other server has a fresh copy"),
    ],
)  # fmt: skip
def test_how_safe_experts_are_is_one_sentence(servers: list[CopyStatistics | None], words: str):
    found = copies_of(servers)
    assert found is not None and found.words == words
    assert words in replace(SUMMARY, copies=words).text()


def test_where_no_server_makes_copies_nothing_is_said_of_them():
    assert copies_of([None, said(0, 0, backups=0, period=0.0)]) is None
    assert copies_of([]) is None
    assert "cop" not in SUMMARY.text()


def test_the_repr_of_a_swarm_says_who_has_copies_and_who_adopted_experts():
    with Swarm("copied") as swarm:
        swarm.serve("ffn", hidden=4, grid=(2, 2), servers=2, isolation="task")
        eventually(lambda: "copies: each expert has one elsewhere" in repr(swarm))
        swarm.servers[1].kill()
        words = "2 adopted from other servers", "4 experts alive", "0 of 2"
        eventually(lambda: all(said in repr(swarm) for said in words))


# ---------------------------------------------------------------- the progress bar


DATA = torch.randn(64, 4), torch.zeros(64, dtype=torch.long)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(file, ticks=None):
    """What the progress bar of a run writes, line by line (a terminal writes over a line after a `\\r`). Twenty steps,
    and a look at least at each."""
    ticked = threading.Event()

    def tick(steps):
        ticked.set()
        if ticks is not None:
            ticks.append(steps)

    def unhurried(scores, y):
        assert ticked.wait(10)
        ticked.clear()
        return nn.functional.cross_entropy(scores, y)

    run = fit(nn.Linear(4, 2), DATA, steps=20, batch_size=16, trainers=1, loss=unhurried)
    assert show_progress(run, lambda: 16, label="digits", on_tick=tick, file=file) is run
    return [line for line in re.split("[\r\n]+", file.getvalue()) if line.strip()]


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    monkeypatch.setattr(progress, "POLL_PERIOD", 0.005)


def test_the_bar_says_loss_samples_per_second_and_experts():
    last = shown(Terminal())[-1]
    assert re.search(r"digits: 100%.*20/20 .*loss=\d\.\d{3}, samples/s=[\d,]+, experts=16", last)


def test_a_terminal_sees_every_look_and_a_log_file_few_lines():
    assert len(shown(Terminal())) >= 20
    assert len(shown(io.StringIO())) <= 5


def test_the_bar_calls_back_with_the_steps_done():
    ticks: list[int] = []
    shown(io.StringIO(), ticks)
    assert ticks[0] == 0 and ticks == sorted(ticks) and ticks[-1] <= 20


def test_the_bar_raises_what_ended_the_run_and_outlives_a_closed_swarm():
    ready = threading.Event()

    def broken(scores, y):
        ready.wait(10)
        raise ZeroDivisionError("in the loss")

    def closed():
        ready.set()
        raise SwarmClosed("closed")

    run = fit(nn.Linear(4, 2), DATA, steps=5, loss=broken)
    file = Terminal()
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        show_progress(run, closed, file=file)
    assert "the swarm is closed" in file.getvalue()
