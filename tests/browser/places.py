"""Where the dashboard is shown: a notebook in JupyterLab, and the page of `labkit demo --watch`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import GRACE, profile
from tests.browser.notebook import Notebook, write_notebook
from tests.browser.processes import Lab, Terminal, labkit
from tests.browser.view import View

CELLS = [
    """
import torch
from torch import nn
import labkit as lk

swarm = lk.Swarm("browser")
swarm.serve("ffn", hidden=16, grid=(4, 4), servers=4, isolation="process", threads=1)
data = lk.load("digits")
model = nn.Sequential(nn.Linear(data.dim, 16), swarm.moe(16, k_best=3), nn.Linear(16, data.classes))
""",
    "swarm.dashboard()",
    "run = lk.fit(model, data, steps=1_000_000, batch_size=16, trainers=2)",
    "",
]


@dataclass
class Place:
    """A page with a dashboard of a swarm that trains."""

    page: Page
    view: View

    def set_dark(self, dark: bool) -> None:
        """Do what somebody does who likes it dark, or light."""
        raise NotImplementedError

    def reload(self) -> None:
        """Load the page anew."""
        raise NotImplementedError

    def expect_run_over(self) -> None:
        """Wait until it is seen that the run has ended."""
        raise NotImplementedError


@dataclass
class NotebookPlace(Place):
    notebook: Notebook

    def set_dark(self, dark: bool) -> None:
        self.notebook.set_theme("JupyterLab Dark" if dark else "JupyterLab Light")

    def reload(self) -> None:
        self.notebook.save()
        self.notebook.reload()

    def expect_run_over(self) -> None:
        expect(self.view.button("Stop run")).to_be_disabled()
        expect(self.view.button("Stop run")).to_have_attribute("title", "no run is training now")


@dataclass
class WatchPlace(Place):
    url: str
    terminal: Terminal

    def set_dark(self, dark: bool) -> None:
        self.page.emulate_media(color_scheme="dark" if dark else "light")

    def reload(self) -> None:
        self.page.reload()

    def expect_run_over(self) -> None:
        """The demo says how it went, and ends with its page, since nobody sits at its terminal."""
        self.terminal.find(r"(test accuracy +0\.\d+)")


@contextmanager
def in_jupyterlab(browser: Browser, lab: Lab, cells: list[str] = CELLS) -> Iterator[NotebookPlace]:
    before = lab.processes()
    write_notebook(lab.folder / "dashboard.ipynb", cells)
    with profile(browser) as context:
        page = context.new_page()
        notebook = Notebook(page, lab.address("dashboard.ipynb"))
        notebook.run_all()
        place = NotebookPlace(page, View(page), notebook)
        place.view.expect_first_frame()
        yield place
        notebook.shut_down()
    _, left = psutil.wait_procs(lab.processes() - before, timeout=GRACE)
    assert not left, f"the kernel left running: {left}"


@contextmanager
def in_watch_page(browser: Browser, folder: Path) -> Iterator[Place]:
    with labkit(folder, "demo", "--watch", "--kill", "0", "--steps", "1000000") as terminal:
        url = terminal.find(r"dashboard: (http://127\.0\.0\.1:\S+)")
        with profile(browser) as context:
            page = context.new_page()
            page.goto(url)
            place = WatchPlace(page, View(page), url, terminal)
            place.view.expect_first_frame()
            yield place
