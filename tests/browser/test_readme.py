"""The README's code, as people type it: cell by cell in JupyterLab, and line by line in IPython's shell."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import shoot
from tests.browser.places import in_jupyterlab
from tests.readme import cells, run

pytestmark = pytest.mark.timeout(300)


def test_the_readme_runs_in_jupyterlab(browser, lab):
    with in_jupyterlab(browser, lab, cells()) as place:
        expect(place.page.get_by_text(re.compile("labkit://"))).to_be_visible()
        # Nobody waits between the lines, so the view may hear of the restart before it has looked at the dead server.
        expect(place.view.happened).to_contain_text("servers[2] back")
        expect(place.view.headline).to_contain_text("4 of 4 servers")
        place.notebook.expect_cell(running=False)
        expect(place.page.locator("[data-mime-type$='stderr'], [data-mime-type$='error']")).to_have_count(0)
        shoot(place.page, "readme")


def test_it_runs_in_the_shell_of_ipython(tmp_path):
    typed = "\n".join([*cells(), "run", "exit", ""])
    said = run(tmp_path, "-m", "IPython", "--simple-prompt", "--no-banner", typed=typed)
    assert "swarm 'default', open at" in said  # the dashboard, in words
    assert re.search(r"labkit://\S+@127\.0\.0\.1:\d+", said)
    assert re.search(r"<run \w+: [\d,]+ of 400 steps", said)
