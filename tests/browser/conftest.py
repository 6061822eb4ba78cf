"""One chromium and one JupyterLab for all browser tests, which `make test-browser` runs and `make test` does not."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route, expect, sync_playwright

from tests.browser.processes import Lab, jupyterlab

SHOTS = Path(__file__).parent / "shots"
PATIENCE = 60_000  # ms: what an expectation may take on a loaded machine
GRACE = 10.0  # seconds: what the end of a kernel may take
HOME = ("127.0.0.1", "localhost")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip

expect.set_options(timeout=PATIENCE)


@pytest.fixture(autouse=True)
def nothing_is_left(browser: Browser) -> Iterator[None]:
    """Fails a test that leaves a child process behind. What wider fixtures started sees to its own family."""
    before = set(psutil.Process().children())
    yield
    _, left = psutil.wait_procs(set(psutil.Process().children()) - before, timeout=GRACE)
    assert not left, f"the test left running: {left}"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "no chromium: apt-get install chromium, or name another one in CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Iterator[Lab]:
    with jupyterlab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@contextmanager
def profile(browser: Browser) -> Iterator[BrowserContext]:
    """A fresh profile. Fails if one of its pages asks anything of another machine, or if the dashboard complains."""
    abroad: list[str] = []
    errors: list[str] = []

    def listen(said: ConsoleMessage) -> None:
        if said.type in ("error", "warning"):
            print(f"the page's console: {said.text}")  # shown when the test fails
        if said.type == "error" and "labkit" in said.text:
            errors.append(said.text)

    def guard(route: Route) -> None:
        if urlsplit(route.request.url).hostname in HOME:
            route.continue_()
        else:
            abroad.append(route.request.url)
            route.abort()

    context = browser.new_context(viewport={"width": 1400, "height": 1000}, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    context.route(re.compile("^https?://"), guard)
    context.on("console", listen)
    try:
        yield context
    finally:
        context.close()
    assert not abroad, f"a page asked for {abroad}"
    assert not errors, f"a page complained: {errors}"


def shoot(page: Page, name: str) -> None:
    """Save a picture of a page in `shots/`."""
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png")
