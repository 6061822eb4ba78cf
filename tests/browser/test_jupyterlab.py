"""What only a notebook has: cells that block, and a picture that stays behind."""

from __future__ import annotations

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


def test_a_picture_stays_behind_when_the_swarm_is_closed(browser, lab):
    with in_jupyterlab(browser, lab) as place:
        place.view.expect_step_beyond(place.view.number(r"step ([\d,]+) of"))
        place.notebook.run_in_last_cell("swarm.close()")
        expect(place.view.status).to_have_text("the swarm is closed, or cannot be reached")
        expect(place.page.locator("img[src^='data:image/png']")).to_be_visible()
        shoot(place.page, "closed")
