"""What the browser tests start: JupyterLab and labkit's own commands, each at home in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.swarms import eventually

STARTS = 60.0  # seconds: a loaded machine imports torch
LAB_CONFIG = """
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
"""


def home(folder: Path) -> dict[str, str]:
    """An environment in which Jupyter, IPython and labkit keep all they write in `folder`."""
    places = {
        "HOME": folder, "JUPYTER_CONFIG_DIR": folder / "config", "JUPYTER_DATA_DIR": folder / "data",
        "JUPYTER_RUNTIME_DIR": folder / "runtime", "IPYTHONDIR": folder / "ipython", "MPLCONFIGDIR": folder / "mpl",
        "JUPYTERLAB_SETTINGS_DIR": folder / "settings", "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
        "XDG_CACHE_HOME": folder / "cache", "XDG_CONFIG_HOME": folder / "xdg", "XDG_DATA_HOME": folder / "share",
    }  # fmt: skip
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    return {**os.environ, **{name: str(place) for name, place in places.items()}, "PYTHONUNBUFFERED": "1"}


def end(process: subprocess.Popen[str]) -> None:
    """Ask a process to end, unless it has, and see that nothing of what it started is left."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
    _, left = psutil.wait_procs(family[1:], timeout=10)
    words = [" ".join(one.cmdline()) for one in left if one.is_running()]
    for one in left:
        one.kill()
    assert not words, f"it left running: {words}"


@dataclass
class Lab:
    """A JupyterLab server. `folder`: where its notebooks are."""

    process: subprocess.Popen[str]
    url: str
    token: str
    folder: Path

    def address(self, notebook: str) -> str:
        """Of a notebook, alone in a fresh workspace."""
        return f"{self.url}lab/workspaces/{secrets.token_hex(4)}/tree/{notebook}?token={self.token}"

    def processes(self) -> set[psutil.Process]:
        """Every process below the server: its kernels, and the expert servers that they started."""
        return set(psutil.Process(self.process.pid).children(recursive=True))


@contextmanager
def jupyterlab(folder: Path) -> Iterator[Lab]:
    """A real one on 127.0.0.1 with a token, that asks nobody for news."""
    environment = home(folder / "home")
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    Path(environment["JUPYTER_CONFIG_DIR"], "jupyter_lab_config.py").write_text(LAB_CONFIG)
    settings = Path(environment["JUPYTERLAB_SETTINGS_DIR"], "@jupyterlab", "apputils-extension")
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "doNotDisturbMode": true}')
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebooks}",
    ]  # fmt: skip
    with (folder / "lab.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment, cwd=notebooks)
    info = Path(environment["JUPYTER_RUNTIME_DIR"], f"jpserver-{process.pid}.json")
    try:
        eventually(lambda: process.poll() is not None or _is_json(info), STARTS)
        assert process.poll() is None, (folder / "lab.log").read_text()
        yield Lab(process, json.loads(info.read_text())["url"], token, notebooks)
    finally:
        end(process)


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except (OSError, ValueError):
        return False


class Terminal:
    """A running `labkit …` and what it has printed, errors included."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.printed = ""
        self._reader = threading.Thread(target=self._read, name="terminal")
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line

    def find(self, pattern: str) -> str:
        """Wait until it has printed something that matches, and return group 1."""
        eventually(lambda: self.process.poll() is not None or re.search(pattern, self.printed), STARTS)
        found = re.search(pattern, self.printed)
        assert found is not None, self.printed
        return found[1]

    def close(self) -> None:
        end(self.process)
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def labkit(folder: Path, *arguments: str) -> Iterator[Terminal]:
    """Run `labkit …` until the block ends."""
    command = [sys.executable, "-m", "labkit", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=home(folder)
    )
    terminal = Terminal(process)
    try:
        yield terminal
    finally:
        terminal.close()
