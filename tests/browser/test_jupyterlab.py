"""What only a notebook has: cells that block, and a picture that stays behind."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import shoot
from tests.browser.places import CELLS, in_jupyterlab

pytestmark = pytest.mark.timeout(300)


def test_a_click_is_obeyed_while_a_cell_blocks(browser, lab):
    with in_jupyterlab(browser, lab, [*CELLS[:-1], "run.wait()"]) as place:
        place.view.expect_step_beyond(place.view.number(r"step ([\d,]+) of"))
        place.notebook.expect_cell(running=True)
        place.view.kill("servers[2]")
        expect(place.view.server("servers[2]")).to_contain_text("dead")
        place.notebook.expect_cell(running=True)
        shoot(place.page, "killed while a cell blocks")
        place.notebook.interrupt()
        place.notebook.expect_cell(running=False)


OWN_LOOP = """
import math
for step in range(300):
    swarm.log(loss=2 / (1 + step / 20), samples=32)
    if step % 20 == 0:
        swarm.log(step=step, **{"validation loss": 2.2 / (1 + step / 20), "accuracy": 1 - math.exp(-step / 50)})
    if step == 100:
        swarm.log(step=step, **{"only once": -3.5})
    with torch.no_grad():
        model(torch.rand(64, data.dim))
"""


def test_a_loop_of_ones_own_is_seen_with_its_learning_curves(browser, lab):
    with in_jupyterlab(browser, lab, [*CELLS[:2], OWN_LOOP, ""]) as place:
        training = place.view.region("Training")
        for name in ("validation loss", "accuracy", "only once"):
            expect(training.get_by_role("img", name=re.compile(f"^{name}, last: "))).to_be_visible()
        expect(training).to_contain_text(re.compile(r"a forward pass takes .* waiting for stragglers; waits at most"))
        expect(place.view.headline).to_contain_text(re.compile(r"step [0-9]+"))
        place.notebook.expect_cell(running=False)
        expect(place.view.headline).to_contain_text("step 299")
        place.view.root.evaluate("element => element.scrollIntoView()")
        shoot(place.page, "own loop")
        place.notebook.run_in_last_cell("swarm.snapshot()")
        expect(place.page.locator("img[src^='data:image/png']").last).to_be_visible()
        place.page.locator("img[src^='data:image/png']").last.scroll_into_view_if_needed()
        shoot(place.page, "own loop, picture")


def test_a_picture_stays_behind_when_the_swarm_is_closed(browser, lab):
    with in_jupyterlab(browser, lab) as place:
        place.view.expect_step_beyond(place.view.number(r"step ([\d,]+) of"))
        place.notebook.run_in_last_cell("swarm.close()")
        expect(place.view.status).to_have_text("the swarm is closed, or cannot be reached")
        expect(place.page.locator("img[src^='data:image/png']")).to_be_visible()
        shoot(place.page, "closed")
