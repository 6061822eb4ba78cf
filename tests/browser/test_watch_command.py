"""The dashboard as a web page: the page server, who may load the page, and how everything ends."""

from __future__ import annotations

import http.cookiejar
import importlib.util
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from labkit.__main__ import main
from labkit.cli import watch
from labkit.cli.watch import WatchPage, open_page
from labkit.errors import InviteError, JoinError, LabkitError
from labkit.swarm import Swarm
from labkit.wire.security import Identity, key_text

pytestmark = pytest.mark.timeout(180)  # a page server and a kernel are two starts of Python on a machine that is busy


class Browser:
    """Fetches pages as a browser does that keeps cookies, and follows no link by itself."""

    def __init__(self) -> None:
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        nowhere = urllib.request.ProxyHandler({})
        self._opener = urllib.request.build_opener(cookies, nowhere)

    def get(self, url: str) -> tuple[int, str, str]:
        """Status, where it led to, and the text."""
        try:
            with self._opener.open(url, timeout=120) as answer:
                return answer.status, answer.url, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.url, error.read().decode()


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def gone(processes: list[psutil.Process], timeout: float) -> bool:
    return not psutil.wait_procs(processes, timeout=timeout)[1]


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm("watched") as swarm:
        swarm.serve("nop", grid=(1, 2), isolation="task")
        yield swarm


@pytest.fixture(scope="module")
def page(swarm: Swarm) -> Iterator[WatchPage]:
    """A page server that tests share, since it takes seconds to start."""
    with open_page(swarm.invite(), swarm.remote_service.secret) as page:
        yield page


# ---------------------------------------------------------------- the page


def test_who_has_the_token_gets_the_dashboard(page, swarm):
    before = set(swarm.remote_service._pages)
    status, _, text = Browser().get(page.url)
    assert status == 200
    assert "application/vnd.jupyter.widget-view+json" in text  # what the cell showed is a widget
    assert "Traceback" not in text and "There was an error" not in text
    assert swarm.remote_service.secret not in text
    assert set(swarm.remote_service._pages) == before  # nothing is asked for before somebody looks


def test_without_the_token_there_is_a_login_and_no_dashboard(page):
    bare = page.url.partition("?")[0]
    for url in (bare, bare + "?token=", bare + "?token=" + "x" * 43):
        status, where, text = Browser().get(url)
        assert (status in (200, 403)) and ("/login" in where or status == 403)
        assert "widget-view" not in text
    for path in ("api/kernels/" + "0" * 8 + "-0000-0000-0000-" + "0" * 12, "voila/files/dashboard.ipynb"):
        assert Browser().get(bare + path)[0] in (403, 404)


def test_files_of_the_page_server_are_not_served_even_with_the_token(page):
    bare, _, query = page.url.partition("?")
    for name in ("dashboard.ipynb", "report", "log", "kernels/labkit-watch/kernel.json"):
        assert Browser().get(f"{bare}voila/files/{name}?{query}")[0] in (403, 404)


def test_a_page_may_load_nothing_from_elsewhere(page):
    with urllib.request.urlopen(page.url, timeout=120) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy


def test_all_of_it_listens_on_loopback_only(page):
    Browser().get(page.url)  # so that there is a kernel
    processes = family(page.pid)
    assert len(processes) >= 2
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}
    assert page.port in {c.laddr.port for c in processes[0].net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_no_argument_list_has_a_secret_and_no_file_can_be_read_by_others(page, swarm):
    Browser().get(page.url)
    token = page.url.partition("token=")[2]
    for process in family(page.pid):
        arguments = " ".join(process.cmdline())
        assert token not in arguments and swarm.remote_service.secret not in arguments
    folder = Path(page._folder.name)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("dashboard.ipynb", "report"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    notebook = (folder / "dashboard.ipynb").read_text()
    assert token not in notebook and swarm.remote_service.secret not in notebook
    assert json.loads(notebook)["cells"][0]["outputs"] == []
    assert token not in (folder / "log").read_text()


def test_a_browser_is_opened_by_way_of_a_file_and_only_where_there_is_one(page, monkeypatch):
    opened: list[str] = []

    def open_url(url: str) -> bool:
        opened.append(url)
        return True

    monkeypatch.setattr(webbrowser, "open", open_url)
    monkeypatch.setenv("DISPLAY", ":0")
    assert page.open_browser()
    file = Path(urllib.request.url2pathname(urllib.parse.urlparse(opened[0]).path))
    assert "token=" not in opened[0] and page.url in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    if sys.platform.startswith("linux"):
        monkeypatch.delenv("DISPLAY")
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        assert not page.open_browser()
        assert len(opened) == 1


def test_a_page_that_is_loaded_after_the_swarm_has_ended_says_so():
    with Swarm("short") as short:
        page = open_page(short.invite())
    with page:
        status, _, text = Browser().get(page.url)
        assert status == 200
        assert "cannot join the swarm" in text and "nothing listens there" in text
        assert "Traceback" not in text


# ---------------------------------------------------------------- how it ends


def test_closing_ends_the_server_and_the_kernels_within_two_seconds_and_leaves_no_file(swarm):
    page = open_page(swarm.invite())
    Browser().get(page.url)
    processes, folder = family(page.pid), Path(page._folder.name)
    assert len(processes) >= 2
    before = time.monotonic()
    page.close()
    assert time.monotonic() - before < 2.0
    assert gone(processes, 2.0)
    assert not folder.exists()
    page.close()  # again


def test_the_kernel_of_a_page_that_went_without_a_word_is_ended(swarm, monkeypatch):
    monkeypatch.setattr(watch, "LONELY_TIME", 15)
    with open_page(swarm.invite()) as page:
        Browser().get(page.url)  # and never connects
        server, *kernels = family(page.pid)
        assert kernels
        assert gone(kernels, 50.0)
        assert "widget-view" in Browser().get(page.url)[2]  # the server is still there, for other pages
        assert server.is_running()


@contextmanager
def terminal(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`labkit watch` as a person has it, in a process group of its own."""
    command = [sys.executable, "-m", "labkit", "watch", "--no-browser", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def address(process: subprocess.Popen[str]) -> str:
    """What it printed once the page was there."""
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"dashboard: (http://127\.0\.0\.1:\d+/\?token=\S{43})\n", line)
    assert found is not None, line + process.stderr.read()
    return found[1]


def folder_of(processes: list[psutil.Process]) -> Path:
    """Where the files of a page server are: its kernels' arguments name it."""
    (kernel,) = [process for process in processes if "ipykernel_launcher" in process.cmdline()]
    return Path(kernel.cmdline()[-1]).parent.parent


def test_ctrl_c_ends_the_command_and_all_that_it_started(swarm):
    with terminal(swarm.invite()) as process:
        Browser().get(address(process))
        processes = family(process.pid)
        assert len(processes) >= 3  # the command, the page server, the page's kernel
        folder = folder_of(processes)
        assert folder.exists()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0  # `close` takes two seconds at most; to end, Python takes what it needs
        assert gone(processes, 2.0)
        assert not folder.exists()
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_sigterm_ends_the_command_too(swarm):
    with terminal(swarm.invite()) as process:
        address(process)
        processes = family(process.pid)
        process.terminate()
        assert process.wait(20) == 0
        assert gone(processes, 2.0)


def test_a_command_that_is_killed_leaves_no_orphan_and_no_file(swarm):
    with terminal(swarm.invite()) as process:
        Browser().get(address(process))
        processes = family(process.pid)
        folder = folder_of(processes)
        process.kill()
        assert gone(processes, 20.0)
        assert not folder.exists()


def test_a_page_server_that_dies_is_reported_and_takes_its_kernels_along(swarm):
    with open_page(swarm.invite()) as page:
        Browser().get(page.url)
        processes = family(page.pid)
        os.kill(page.pid, signal.SIGKILL)
        with pytest.raises(LabkitError, match="the page server ended with code -9"):
            page.wait()
        assert gone(processes[1:], 20.0)


# ---------------------------------------------------------------- what cannot be watched


def test_a_swarm_that_cannot_be_joined_is_told_at_once_as_join_tells_it(monkeypatch):
    monkeypatch.setattr(watch, "COMMAND", ["/no/such/program"])  # nothing may be started
    nobody = f"labkit://{key_text(Identity.generate().public_key)}@127.0.0.1:1?plain"
    before = time.monotonic()
    with pytest.raises(JoinError, match="nothing listens there"):
        open_page(nobody)
    assert time.monotonic() - before < 10.0
    with pytest.raises(InviteError, match="an invitation looks like"):
        open_page("127.0.0.1:4000")


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["watch", *arguments]) == 1
    text = capsys.readouterr().err
    assert text.startswith("labkit: ") and text.count("\n") == 1
    return text


def test_what_cannot_be_watched_is_a_line_that_says_why(capsys, swarm, page):
    assert "an invitation looks like" in complaint(capsys, "here")
    assert "--port 65536" in complaint(capsys, swarm.invite(), "--port", "65536")
    assert f"port {page.port} cannot be used" in complaint(capsys, swarm.invite(), "--port", str(page.port))
    assert "make one: labkit keygen /no/such/key" in complaint(capsys, swarm.invite(), "--key", "/no/such/key")


def test_without_voila_the_extra_is_named(capsys, monkeypatch, swarm):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "labkit[watch]"' in complaint(capsys, swarm.invite())
    assert main(["demo", "--watch"]) == 1
    assert 'pip install "labkit[watch]"' in capsys.readouterr().err


def test_a_private_swarm_is_watched_with_a_key(tmp_path):
    identity = Identity.generate()
    identity.save(tmp_path / "key")
    with Swarm("private", members=[key_text(identity.public_key)]) as private:
        with pytest.raises(JoinError, match="private"):
            open_page(private.invite())
        with open_page(private.invite(), key=str(tmp_path / "key")) as page:
            assert "widget-view" in Browser().get(page.url)[2]


# ---------------------------------------------------------------- the demo


def test_the_demo_shows_its_page_while_it_trains_and_ends_it():
    small = ["--steps", "40", "--servers", "1", "--experts", "2", "--k-best", "1", "--trainers", "1", "--kill", "0"]
    command = [sys.executable, "-m", "labkit", "demo", "--watch", "--no-browser", "--json", *small]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            server_url = address(process)
            assert process.stdout is not None
            rest = process.stdout.read()
            assert process.wait(20) == 0
        finally:
            process.kill()
    result = json.loads(rest.splitlines()[-1])
    assert result["steps"] == 40
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server_url, timeout=5)
