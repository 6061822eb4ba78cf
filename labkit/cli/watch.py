"""`labkit watch`: the dashboard as a web page, for who trains from a shell. Served by Voilà, which runs a notebook and
shows its outputs; ours has one cell, and its output is the same widget that a notebook shows.

Why Voilà and not Solara: it asks for a token by itself, where Solara leaves access to a separate product; each page has
a kernel of its own, which joins the swarm and ends with the page, where Solara's pages share a process; and its front
end comes with its package, where Solara's is fetched from a CDN. Voilà's template names two style sheets there as well,
but takes a header that forbids them. Messages and binary buffers of an anywidget pass in both directions.

Three processes take part: this one, which stays in the terminal; `page_server`, whose life is tied to it; and a kernel
for each page, whose life is tied to the server's, and which shows a `RemoteSource`.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
import time
import webbrowser
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from labkit.cli import page_server
from labkit.cli.page_server import LOOPBACK, PLACE, REPORT, STOP_TIME, PageServerConfig, PageServerReport, write_private
from labkit.contact import Contact
from labkit.errors import LabkitError
from labkit.launch.runners import OWN_GROUP
from labkit.swarm import Swarm

if TYPE_CHECKING:
    from labkit.view.page.dashboard import Dashboard

COMMAND = [sys.executable, "-P", page_server.__file__]  # as a script: it has no use for torch
START_TIMEOUT = 60.0  # seconds until the page server answers; it is mostly imports
LONELY_TIME = 60  # seconds after which a kernel is ended whose page has gone, or never connected
POLL = 0.05  # seconds


def watch(
    invite: str, secret: str | None = None, open_browser: bool = True, port: int = 0, key: str | None = None
) -> None:
    """Show the dashboard of a swarm as a web page, until Ctrl-C. The arguments are those of `open_page`.

    Raises as `open_page` does, and `LabkitError` when the page server ends by itself.
    """
    with open_page(invite, secret, port, key) as page:
        print(f"dashboard: {page.url}", flush=True)
        if open_browser:
            page.open_browser()
        print("press Ctrl-C to end", file=sys.stderr)
        page.wait()


def open_page(invite: str, secret: str | None = None, port: int = 0, key: str | None = None) -> WatchPage:
    """Start a page server for the dashboard of a swarm, and return when it answers.

    `secret`: `swarm.remote_service.secret`, the control secret; without it the page has no buttons. `port`: 0 for any.
    `key`: a key file, for a private swarm. Raises `InviteError`, and `JoinError` if the swarm cannot be joined, before
    anything is started; `LabkitError` if labkit was installed without what the page needs, or the port is taken.
    """
    check_installed()
    if not 0 <= port < 65536:
        raise ValueError(f"port={port}: between 1 and 65535, or 0 for any")
    _join(invite, key, "watch-check").close()
    return WatchPage(invite, secret, port, key)


def check_installed() -> None:
    """Raises `LabkitError` if labkit was installed without what the page needs."""
    if importlib.util.find_spec("voila") is None:
        raise LabkitError(
            f'the page needs Voilà, which is not installed: {sys.executable} -m pip install "labkit[watch]", or in a '
            'checkout -e ".[watch]"'
        )


def _join(invite: str, key: str | None, name: str) -> Swarm:
    return Swarm.join(invite, name=name, **({} if key is None else {"key": key}))


class WatchPage:
    """A page server that runs. `url` opens the page; `close()` ends it, within two seconds. A context manager."""

    def __init__(self, invite: str, secret: str | None, port: int, key: str | None) -> None:
        token = secrets.token_urlsafe(32)
        self._folder = tempfile.TemporaryDirectory(prefix="labkit-watch-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name) / "log"
        key = None if key is None else str(Path(key).expanduser().resolve())
        order = PageServerConfig(str(invite), secret, key, port, token, self._folder.name, LONELY_TIME)
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, **OWN_GROUP
                )
        except BaseException:
            self._folder.cleanup()
            raise
        try:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended, which `_wait_for_report` notices
                self._process.stdin.write(msgspec.json.encode(order) + b"\n")
                self._process.stdin.flush()
            self.port = self._wait_for_report()
        except BaseException:
            self.close()
            raise
        self.url = f"http://{LOOPBACK}:{self.port}/?token={token}"

    def _wait_for_report(self) -> int:
        file, deadline = Path(self._folder.name) / REPORT, time.monotonic() + START_TIMEOUT
        while not file.exists():
            if self._process.poll() is not None:
                raise LabkitError(self._account())
            if time.monotonic() > deadline:
                raise LabkitError(f"the page server did not start within {START_TIMEOUT:g} s: {self._last_words()}")
            time.sleep(POLL)
        report = msgspec.json.decode(file.read_bytes(), type=PageServerReport)
        if report.failed is not None:
            raise LabkitError(report.failed)
        return report.port

    @property
    def pid(self) -> int:
        """Process id of the page server."""
        return self._process.pid

    def wait(self) -> None:
        """Until it ends, which it does not by itself: then this raises `LabkitError`."""
        while self._process.poll() is None:
            time.sleep(4 * POLL)  # in pieces, since on Windows an interrupt does not end a wait for a process
        raise LabkitError(self._account())

    def open_browser(self) -> bool:
        """Open the page in a browser, if there is one. Returns whether there is."""
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            return False  # what would be found there is a text browser, in this terminal
        # By way of a file, since others can see a browser's arguments, and the token would be among them.
        file = Path(self._folder.name) / "open.html"
        url = html.escape(self.url)
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={url}"><a href="{url}">labkit</a>'
        write_private(file, page.encode())
        try:
            return webbrowser.open(file.as_uri())
        except webbrowser.Error:
            return False

    def close(self) -> None:
        """End the server and its kernels. Safe to repeat."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # it ends when that ends
        try:
            self._process.wait(STOP_TIME)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._folder.cleanup()

    def __enter__(self) -> WatchPage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _account(self) -> str:
        return f"the page server ended with code {self._process.returncode}: {self._last_words()}"

    def _last_words(self) -> str:
        try:
            return self._log.read_text(errors="replace")[-2000:].strip() or "it said nothing"
        except OSError:
            return "it said nothing"


# ---------------------------------------------------------------- a page's kernel


def show() -> Dashboard | None:
    """The dashboard of the page: what the notebook's one cell calls. If the swarm is gone, the page says that."""
    from labkit.view.page.dashboard import Dashboard

    order = msgspec.json.decode(os.environ.pop(PLACE), type=PageServerConfig)
    try:
        swarm = _join(order.invite, order.key, "watch")
    except LabkitError as error:
        print(error)
        return None
    return Dashboard(swarm.view.remote_source(Contact.from_invitation(order.invite), order.secret), alone=True)
