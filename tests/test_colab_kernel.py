"""The dashboard in a kernel like Colab's: ipywidgets 7.7, and ipykernel 6.17, which hears clicks between cells only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.colab_environment import interpreter
from tests.front_end import WIDGET, FrontEnd, Page, open_kernel
from tests.test_dashboard_kernel import DASHBOARD, FIT, SWARM, check_frame

pytestmark = pytest.mark.timeout(120)  # starting a kernel and importing torch takes most of it
FOLDER = Path(__file__).parent.parent / ".venv-colab"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Iterator[FrontEnd]:
    assert (FOLDER / "ready").exists(), "make it first: python -m tests.colab_environment .venv-colab"
    with open_kernel(tmp_path_factory.mktemp("kernel"), interpreter(FOLDER)) as front_end:
        front_end.run(SWARM.replace('__import__("comm").get_comm_manager()', "get_ipython().kernel.comm_manager"))
        yield front_end


@pytest.fixture
def page(kernel, request) -> Iterator[Page]:
    kernel.run("[server.restart() for server in swarm.servers if not server.alive]")
    comm = kernel.run(DASHBOARD).bundle[WIDGET]["model_id"]
    page = kernel.page(comm, request.node.name[:64])
    page.look(fresh=True)
    yield page
    page.look(False)


def test_these_are_the_versions_of_colab(kernel):
    assert kernel.value("[__import__(name).__version__ for name in ('ipywidgets', 'ipykernel', 'IPython')]") == [
        "7.7.1", "6.17.1", "7.34.0",
    ]  # fmt: skip


def test_the_widget_builds(kernel):
    widget, place, _ = kernel.run(DASHBOARD).outputs
    assert kernel.comms[widget[WIDGET]["model_id"]].state["_css"].strip()
    assert "4 experts alive" in widget["text/plain"] and "<table>" in widget["text/html"]
    assert place == {"text/plain": ""}


def test_frames_and_orders_work_between_cells_while_a_run_trains_in_the_background(kernel, page):
    cell = kernel.run(DASHBOARD)
    kernel.run(FIT)
    kernel.until(lambda: page.frames and page.headers[-1]["headline"]["steps"] > 3)
    assert page.headers[0]["reset"] and page.headers[-1]["headline"]["running"]
    for _, header, buffers in page.frames:
        check_frame(header, buffers)
    assert page.execute(do="kill", server=1) == ("done", "servers[1] killed")
    assert kernel.value("swarm.servers[1].state, run.running") == ("killed", True)
    assert page.execute(do="export", format="json") == ("done", "labkit-default.json saved")
    assert page.execute(do="stop_run")[1].startswith("run stopped after ")
    kernel.until(lambda: "image/png" in cell.outputs[1])


def test_a_click_waits_for_the_cell_that_runs_and_is_obeyed_after_it(kernel, page):
    kernel.until(lambda: page.frames)
    cell = kernel.begin("print('began', flush=True)\ntime.sleep(0.5)\nprint(swarm.servers[2].alive)")
    kernel.until(lambda: "began" in cell.text)
    id = page.click(do="kill", server=2)
    kernel.until(lambda: cell.done)
    assert cell.text.split() == ["began", "True"]
    kernel.until(lambda: page.answers(id, "done"))
    assert kernel.value("swarm.servers[2].state") == "killed"


def test_a_page_that_is_not_heard_while_a_cell_runs_is_told_that_there_is_a_kernel(kernel, page):
    kernel.until(lambda: page.frames)
    before = len(kernel.comms[page.comm].beats)
    cell = kernel.begin("time.sleep(60)")
    kernel.until(lambda: len(kernel.comms[page.comm].beats) >= before + 2)
    assert not cell.done
    kernel.interrupt()
    kernel.until(lambda: cell.done)


def test_nothing_is_sent_while_nobody_looks_and_nothing_is_left_behind(kernel, page):
    kernel.until(lambda: page.frames)
    page.look(False)
    assert page.execute(do="nothing at all")[0] == "failed"
    before = len(page.got)
    kernel.run("while threads('dashboard'): time.sleep(0.005)")
    kernel.run("time.sleep(0.6)")
    assert len(page.got) == before
    kernel.run("dashboard.close()")
    assert kernel.comms[page.comm].closed
    kernel.run("swarm.close()\nwhile threads(''): time.sleep(0.005)")
