"""A dashboard whose kernel is gone says so, and lets go of its buttons; a picture is left for who opens it again."""

from __future__ import annotations

import re

import psutil
import pytest
from playwright.sync_api import expect

from tests.browser.conftest import shoot
from tests.browser.places import in_jupyterlab
from tests.browser.processes import Lab
from tests.browser.view import View

pytestmark = pytest.mark.timeout(300)


def kernel_of(lab: Lab) -> psutil.Process:
    [kernel] = [one for one in lab.processes() if "ipykernel_launcher" in " ".join(one.cmdline())]
    return kernel


def expect_lost(view: View) -> None:
    expect(view.status).to_have_text(re.compile("^(no sign of life for|the kernel is gone)"))
    for name in ("Kill servers[0]", "Stop run", "Pause view", "Export PNG"):
        expect(view.button(name)).to_be_disabled()
    expect(view.slider("Latency of all servers")).to_be_disabled()
    expect(view.server("servers[0]")).to_contain_text("was alive")
    expect(view.headline).to_contain_text("? of 16 experts")


def test_after_a_restart_of_the_kernel_the_dashboard_says_that_it_is_gone(browser, lab):
    with in_jupyterlab(browser, lab) as place:
        place.view.expect_step_beyond(place.view.number(r"step ([\d,]+) of"))
        place.notebook.restart()
        expect_lost(place.view)
        shoot(place.page, "restarted kernel")
        place.notebook.expect_kernel()


def test_a_kernel_that_was_killed_is_noticed(browser, lab):
    with in_jupyterlab(browser, lab) as place:
        place.view.expect_step_beyond(place.view.number(r"step ([\d,]+) of"))
        kernel_of(lab).kill()
        expect_lost(place.view)
        place.page.get_by_role("button", name="Ok").click()  # JupyterLab has started another one
        shoot(place.page, "killed kernel")
        place.notebook.expect_kernel()


def test_a_kernel_that_stands_still_is_noticed_and_so_is_that_it_goes_on(browser, lab):
    with in_jupyterlab(browser, lab) as place:
        kernel = kernel_of(lab)
        kernel.suspend()
        expect_lost(place.view)
        shoot(place.page, "suspended kernel")
        kernel.resume()
        expect(place.view.status).to_have_text("")
        expect(place.view.button("Kill servers[0]")).to_be_enabled()
        expect(place.view.server("servers[0]")).not_to_contain_text("was")


def test_a_notebook_whose_kernel_was_killed_in_its_first_minute_shows_a_picture_and_no_complaint(browser, lab):
    with in_jupyterlab(browser, lab) as place:
        picture = place.page.locator("img[src^='data:image/png']")
        expect(picture).to_be_attached()
        expect(picture).to_be_hidden()  # beside the live view
        expect(place.view.root).to_have_count(1)
        shoot(place.page, "picture hidden")
        place.notebook.save()
        kernel_of(lab).kill()
        place.page.get_by_role("button", name="Ok").click()
        expect_lost(place.view)
        expect(picture).to_be_visible()
        place.notebook.reload()
        expect(picture).to_be_visible()
        complaint = place.page.get_by_text("model not found")
        expect(complaint).to_be_attached()
        expect(complaint).to_be_hidden()
        shoot(place.page, "reopened")
