"""The dashboard in a Jupyter kernel as JupyterLab has it (ipykernel 7): the tests play the front end over the comm."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from labkit.view.page.pages import FRAME_PERIOD
from tests.front_end import WIDGET, FrontEnd, Page, open_kernel

pytestmark = pytest.mark.timeout(120)  # starting a kernel and importing torch takes most of it

SWARM = """
import threading, time, torch, labkit as lk
from torch import nn
torch.manual_seed(0)
swarm = lk.Swarm()
swarm.serve("ffn", hidden=8, grid=(2, 2), servers=4, isolation="task")
swarm.faults(latency=0.05)  # trainers wait, and leave the processor to others
model = nn.Sequential(nn.Linear(4, 8), swarm.moe(8, k_best=2), nn.Linear(8, 2))
x = torch.randn(64, 4)
y = (x.sum(1) > 0).long()
def threads(kind): return [t.name for t in threading.enumerate() if t.name.startswith("labkit-" + kind)]
def comms(): return len(__import__("comm").get_comm_manager().comms)
"""
DASHBOARD = "dashboard = swarm.dashboard()\ndashboard"
FIT = "run = lk.fit(model, (x, y), steps=100_000, batch_size=16, trainers=2)"
SIZES = {"u8": 1, "u16": 2, "scaled": 2, "u32": 4, "i32": 4, "f32": 4}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Iterator[FrontEnd]:
    with open_kernel(tmp_path_factory.mktemp("kernel")) as front_end:
        front_end.run(SWARM)
        front_end.open_subshell()
        yield front_end


@pytest.fixture
def page(kernel, request) -> Iterator[Page]:
    """A new page of the swarm's dashboard, that looks at it; all servers run, and so does the training."""
    kernel.run("[server.restart() for server in swarm.servers if not server.alive]")
    kernel.run(f"if 'run' not in globals() or not run.running: {FIT}")
    comm = kernel.run(DASHBOARD).bundle[WIDGET]["model_id"]
    page = kernel.page(comm, request.node.name[:64])
    page.look(fresh=True)
    yield page
    page.look(False)


def check_frame(header: dict[str, Any], buffers: list[bytes]) -> None:
    """That it is whole, and fits."""
    assert len(json.dumps(header)) + sum(map(len, buffers)) <= 64_000
    for piece in header["pieces"]:
        assert len(buffers[piece["buffer"]]) == piece["count"] * piece["width"] * SIZES[piece["dtype"]]
    if series := header.get("series"):
        assert len(buffers[series["buffer"]]) == series["count"] * 13 * 4


def settle(page: Page) -> None:
    """Wait until the kernel has heard all that the page said."""
    assert page.execute(do="nothing at all")[0] == "failed"


def test_a_cell_shows_a_widget_with_text_and_html_and_a_place_for_a_picture(kernel):
    widget, place, style = kernel.run(DASHBOARD).outputs
    assert kernel.comms[widget[WIDGET]["model_id"]].state["_esm"].strip()
    assert "4 experts alive" in widget["text/plain"] and "<table>" in widget["text/html"]
    assert place == {"text/plain": ""}
    assert style["text/plain"] == "" and style["text/html"].startswith("<style>")


def test_a_page_that_looks_gets_frames_of_the_training(kernel, page):
    kernel.until(lambda: page.frames and page.headers[-1]["headline"]["steps"] > 0)
    first, later = page.headers[0], page.headers[-1]
    assert first["reset"] and first["seq"] == 1 and first["open"] and first["can"] == {"control": True}
    assert later["headline"]["running"] and later["headline"]["experts_alive"] == 4
    assert [header["seq"] for header in page.headers] == list(range(1, len(page.headers) + 1))
    for _, header, buffers in page.frames:
        check_frame(header, buffers)


def test_there_are_at_most_five_frames_a_second(kernel, page):
    began = time.monotonic()
    paced = kernel.page(page.comm, "paced")
    paced.look(fresh=True)
    kernel.until(lambda: len(paced.frames) >= 10)
    assert paced.frames[9][0] - began >= 9 * FRAME_PERIOD
    paced.look(False)


def test_frames_come_while_a_cell_runs_and_clicks_are_obeyed(kernel, page):
    cell = kernel.begin("while swarm.servers[1].alive or swarm.faults().loss < 0.1: time.sleep(0.005)")
    kernel.until(lambda: len(page.frames) >= 3)
    assert page.execute(do="kill", server=1) == ("done", "servers[1] killed")
    assert not cell.done
    page.click(do="faults", server=None, latency=None, loss=0.1)
    kernel.until(lambda: cell.done)
    assert not cell.error
    kernel.until(lambda: any("servers[1] killed" in str(header.get("marks")) for header in page.headers))
    kernel.run("swarm.faults(loss=0.0)")


def test_clicks_are_heard_in_the_very_cell_that_first_shows_the_dashboard(kernel, page):
    kernel.run("dashboard.close()")
    known = set(kernel.comms)
    cell = kernel.begin("display(swarm.dashboard())\nwhile swarm.servers[2].alive: time.sleep(0.005)")
    kernel.until(lambda: cell.outputs)
    comm = cell.bundle[WIDGET]["model_id"]
    assert comm not in known
    kernel.page(comm, "new").click(do="kill", server=2)
    kernel.until(lambda: cell.done)
    assert not cell.error


def test_a_page_that_does_not_acknowledge_gets_two_frames(kernel, page):
    lazy = kernel.page(page.comm, "lazy", acknowledge=False)
    lazy.look(fresh=True)
    kernel.until(lambda: len(lazy.frames) == 2)
    while (seen := len(page.frames)) < 6:
        kernel.until(lambda seen=seen: len(page.frames) > seen)
        lazy.look()  # as a page says every five seconds: who is silent for twelve is forgotten
    assert len(lazy.frames) == 2
    lazy.acknowledge(2)
    kernel.until(lambda: len(lazy.frames) == 4)
    lazy.look(False)


def test_nothing_is_sent_and_no_thread_runs_while_nobody_looks(kernel, page):
    kernel.until(lambda: page.frames)
    page.look(False)
    settle(page)
    before = len(page.got)
    kernel.run("while threads('dashboard'): time.sleep(0.005)")
    kernel.run("before = run.steps\nrun.wait(1.0)\nwhile run.steps == before: run.wait(0.1)")
    assert len(page.got) == before
    page.look(True)
    kernel.until(lambda: len(page.got) > before)
    assert not page.headers[-1]["reset"]


def test_a_page_that_is_loaded_again_gets_everything_anew(kernel, page):
    kernel.until(lambda: len(page.frames) >= 2)
    again = kernel.page(page.comm, "again")
    again.look(fresh=True)
    kernel.until(lambda: again.frames)
    assert again.headers[0]["reset"] and again.headers[0]["layers"]
    again.look(False)


@pytest.mark.parametrize("format", ["png", "json", "html"])
def test_an_export_arrives_whole(kernel, page, format):
    assert page.execute(do="export", format=format) == ("done", f"labkit-default.{format} saved")
    chunks = [(message, buffers) for _, message, buffers in page.got if message["type"] == "chunk"]
    assert [message["index"] for message, _ in chunks] == list(range(chunks[0][0]["total"]))
    data = b"".join(buffers[0] for _, buffers in chunks)
    begins = {"png": b"\x89PNG", "json": b"{", "html": b"<!doctype html>"}[format]
    assert data.strip()[: len(begins)].lower() == begins.lower()


def test_nonsense_does_no_harm(kernel, page):
    nonsense: list[object] = [None, 7, [], {}, {"type": "look"}, {"type": "ack", "page": page.name, "seq": "x"}]
    for content in nonsense:
        kernel.say(page.comm, content)
    assert page.execute(do="kill", server=99) == ("failed", "there is no servers[99]: 4 were started here")
    before = len(page.frames)
    kernel.until(lambda: len(page.frames) > before + 2)


def test_a_picture_stays_behind_when_a_run_ends(kernel, page):
    cell = kernel.run(DASHBOARD)
    assert page.execute(do="stop_run")[1].startswith("run stopped after ")
    kernel.until(lambda: "image/png" in cell.outputs[1])
    assert len(cell.outputs[1]["image/png"]) > 10_000


def test_cells_that_are_run_again_leave_nothing_behind(kernel, page):
    before = kernel.value("comms()")
    assert kernel.run(DASHBOARD).bundle[WIDGET]["model_id"] == page.comm
    assert kernel.value("comms()") == before
    kernel.run(SWARM)
    comm = kernel.run(DASHBOARD).bundle[WIDGET]["model_id"]
    assert comm != page.comm and kernel.comms[page.comm].closed
    assert kernel.value("comms()") == before
    kernel.run("while len(threads('view')) > 1: time.sleep(0.005)")  # the old one may still draw its last picture


def test_a_widget_that_is_closed_leaves_nothing_behind(kernel, page):
    kernel.until(lambda: page.frames)
    kernel.run("dashboard.close()")
    assert kernel.comms[page.comm].closed
    kernel.run("while threads('view') or threads('dashboard') or threads('commands'): time.sleep(0.005)")
    assert "closed" in kernel.run("dashboard").bundle["text/plain"]


def test_a_closed_swarm_is_shown_as_it_was(kernel, page):
    kernel.until(lambda: page.frames and page.headers[-1]["headline"]["servers_alive"] == 4)
    kernel.run("swarm.close()")
    kernel.until(lambda: not page.headers[-1]["open"])
    assert page.headers[-1]["headline"]["servers_alive"] == 4 and page.headers[-1]["can"] == {"control": False}
    kernel.run("while threads(''): time.sleep(0.005)")
    kernel.run(SWARM)
