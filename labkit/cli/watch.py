"""`labkit watch`: the dashboard as a web page, for those who train from a shell.

Voilà serves it: it runs a notebook of one cell and shows the output, which is the same widget that a notebook shows.
Three processes take part: this one, which stays in the terminal; `page_server`, which ends with it; and a kernel for
each page, which ends with the page server, and which shows a `RemoteSource`.

Why Voilà and not Solara: Voilà asks for a token by itself, where Solara leaves access to a separate product; each page
has a kernel of its own, which joins the swarm and ends with the page, where Solara's pages share a process; and its
front end comes with its package, where Solara's is fetched from a CDN. Voilà's template names two style sheets of a CDN
as well, but a header can forbid them. Messages and binary buffers of an anywidget pass in both directions.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import os
import secrets
import subprocess
import sys
import time
import webbrowser
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from labkit.cli.page_server import (
    CONFIG_VARIABLE,
    LOOPBACK,
    REPORT_FILE,
    STOP_TIME,
    PageServerConfig,
    PageServerReport,
    write_private,
)
from labkit.contact import Contact
from labkit.errors import LabkitError
from labkit.forks import keep_private, release
from labkit.interrupts import interrupts_wait
from labkit.launch.child_python import OWN_GROUP, child_environment, child_folder, python_command
from labkit.launch.temporary_folder import TemporaryFolder
from labkit.paths import user_path
from labkit.swarm import Swarm

if TYPE_CHECKING:
    from labkit.view.page.dashboard import Dashboard

COMMAND = python_command("labkit.cli.page_server")
START_TIMEOUT = 60.0  # seconds until the page server answers; it is mostly imports
LONELY_TIME = 60  # seconds after which a kernel is ended whose page has gone, or never connected
POLL_INTERVAL = 0.05  # seconds between two looks at the page server
LAST_CHARACTERS = 2000  # of the page server's log, in the error that says why it failed


def watch(
    invite: str, secret: str | None = None, open_browser: bool = True, port: int = 0, key: str | None = None
) -> None:
    """Show the dashboard of a swarm as a web page, until Ctrl-C.

    Args:
        invite: The invitation of the swarm.
        secret: As for `open_page`.
        open_browser: Open the page in a browser, if there is one.
        port: As for `open_page`.
        key: As for `open_page`.

    Raises:
        LabkitError: As `open_page`, or the page server has ended by itself.
    """
    with open_page(invite, secret, port, key) as page:
        print(f"dashboard: {page.url}", flush=True)
        if open_browser:
            page.open_browser()
        print("press Ctrl-C to end", file=sys.stderr)
        page.wait()


def open_page(invite: str, secret: str | None = None, port: int = 0, key: str | None = None) -> WatchPage:
    """Start a page server for the dashboard of a swarm, and return when it answers.

    Args:
        invite: The invitation of the swarm.
        secret: The swarm's control secret, `swarm.remote_service.secret`; without it the page has no buttons.
        port: Where the page server listens on 127.0.0.1; 0 for any free port.
        key: The key file of a member, for a private swarm.

    Raises:
        InviteError: The text is no invitation. Nothing has been started.
        JoinError: The swarm cannot be joined. Nothing has been started.
        LabkitError: labkit was installed without what the page needs, or the port is taken.
    """
    check_installed()
    if not 0 <= port < 65536:
        raise ValueError(f"port={port}: between 1 and 65535, or 0 for any")
    _join(invite, key, "watch-check").close()
    return WatchPage(invite, secret, port, key)


def check_installed() -> None:
    """Check that labkit was installed with what the page needs. Raises `LabkitError`."""
    if importlib.util.find_spec("voila") is None:
        raise LabkitError(
            f'the page needs Voilà, which is not installed: {sys.executable} -m pip install "labkit[watch]", or in a '
            'checkout -e ".[watch]"'
        )


def _join(invite: str, key: str | None, name: str) -> Swarm:
    return Swarm.join(invite, name=name, key=key)


class WatchPage:
    """A running page server. It is a context manager; `close()` ends the server within two seconds.

    Attributes:
        url: The address of the page, with the token that opens it.
        port: The port that the server listens at, on 127.0.0.1.
    """

    def __init__(self, invite: str, secret: str | None, port: int, key: str | None) -> None:
        token = secrets.token_urlsafe(32)
        key = None if key is None else str(user_path(key, "key"))
        with interrupts_wait() as interruptible:
            self._folder = TemporaryFolder("watch-")
            self._log = Path(self._folder.name) / "log"
            config = PageServerConfig(str(invite), secret, key, port, token, self._folder.name, LONELY_TIME)
            try:
                with self._log.open("wb") as log:
                    self._process = subprocess.Popen(
                        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                        env=child_environment(), cwd=child_folder(), **OWN_GROUP,
                    )  # fmt: skip
            except BaseException:
                self._folder.cleanup()
                raise
            try:
                assert self._process.stdin is not None
                keep_private(self._process.stdin.fileno())
                with contextlib.suppress(OSError):  # if it has ended, `_wait_for_report` notices
                    self._process.stdin.write(msgspec.json.encode(config) + b"\n")
                    self._process.stdin.flush()
                with interruptible():
                    self.port = self._wait_for_report()
            except BaseException:
                self.close()
                raise
        self.url = f"http://{LOOPBACK}:{self.port}/?token={token}"

    def _wait_for_report(self) -> int:
        file, deadline = Path(self._folder.name) / REPORT_FILE, time.monotonic() + START_TIMEOUT
        while not file.exists():
            if self._process.poll() is not None:
                raise LabkitError(self._describe_end())
            if time.monotonic() > deadline:
                raise LabkitError(f"the page server did not start within {START_TIMEOUT:g} s: {self._last_lines()}")
            time.sleep(POLL_INTERVAL)
        report = msgspec.json.decode(file.read_bytes(), type=PageServerReport)
        if report.failed is not None:
            raise LabkitError(report.failed)
        return report.port

    @property
    def pid(self) -> int:
        """Process id of the page server."""
        return self._process.pid

    def wait(self) -> None:
        """Wait for the end of the page server, which should not end by itself, and raise `LabkitError` then."""
        while self._process.poll() is None:
            time.sleep(4 * POLL_INTERVAL)  # in pieces, since on Windows an interrupt does not end a wait for a process
        raise LabkitError(self._describe_end())

    def open_browser(self) -> bool:
        """Open the page in a browser. Returns whether there is one."""
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            return False  # `webbrowser` would find a text browser, and start it in this terminal
        # By way of a file: other users can see a browser's arguments, and the token would be among them.
        file = Path(self._folder.name) / "open.html"
        url = html.escape(self.url)
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={url}"><a href="{url}">labkit</a>'
        write_private(file, page.encode())
        try:
            return webbrowser.open(file.as_uri())
        except webbrowser.Error:
            return False

    def close(self) -> None:
        """End the page server and its kernels. Safe to repeat."""
        with interrupts_wait():
            if self._process.stdin is not None and not self._process.stdin.closed:
                release(self._process.stdin.fileno())
                with contextlib.suppress(OSError):
                    self._process.stdin.close()  # the server ends when its input ends
            try:
                self._process.wait(STOP_TIME)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._folder.cleanup()

    def __enter__(self) -> WatchPage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _describe_end(self) -> str:
        return f"the page server ended with code {self._process.returncode}: {self._last_lines()}"

    def _last_lines(self) -> str:
        try:
            return (
                self._log.read_text(encoding="utf-8", errors="replace")[-LAST_CHARACTERS:].strip() or "it said nothing"
            )
        except OSError:
            return "it said nothing"


# ---------------------------------------------------------------- a page's kernel


def show() -> Dashboard | None:
    """The dashboard of the page, for the notebook's one cell. If the swarm is gone, this prints so on the page."""
    from labkit.view.page.dashboard import Dashboard

    config = msgspec.json.decode(os.environ.pop(CONFIG_VARIABLE), type=PageServerConfig)
    try:
        swarm = _join(config.invite, config.key, "watch")
    except LabkitError as error:
        print(error)
        return None
    return Dashboard(swarm.view.remote_source(Contact.from_invitation(config.invite), config.secret), alone=True)
