"""The process that serves the page of `labkit watch`: Voilà with a notebook of one cell.

`watch` starts this module with `python -m`. It imports neither torch nor anything else of labkit that is slow to
import; only the kernel of a page does that. It reads its configuration from its standard input, and ends when the input
ends, so that it never outlives its parent.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from labkit.launch.parent import watch_parent

LOOPBACK = "127.0.0.1"
CONFIG_VARIABLE = "LABKIT_WATCH"  # environment variable with the configuration, for kernels
REPORT_FILE = "report"  # name of the file in the configured folder
KERNEL_NAME = "labkit-watch"
CELL = "from labkit.cli.watch import show\n\nshow()"
STOP_TIME = 1.5  # seconds in which the server and its kernels end
KERNEL_STOP_TIME = 0.7  # seconds of those in which the kernels end
# A page may load only what this server has, whatever else Voilà's templates name.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)


class PageServerConfig(msgspec.Struct):
    """What the server reads from its standard input, so that no argument list holds a secret. Kernels get it too."""

    invite: str
    secret: str | None  # the swarm's control secret; without it the page has no buttons
    key: str | None  # a key file, for a private swarm
    port: int  # 0: any free one
    token: str  # without it nobody can load the page
    folder: str  # for all files that the server and its kernels write
    lonely_time: int  # seconds after which a kernel whose page has gone is ended


class PageServerReport(msgspec.Struct):
    """What the server writes to a file: the port that it listens at, or why it does not."""

    port: int = 0
    failed: str | None = None


class CannotServe(Exception):
    """The page cannot be served. The parent reports the message."""


def main() -> NoReturn:
    """Serve until the parent closes our standard input, or is gone itself."""
    status = 1
    try:
        line = sys.stdin.buffer.readline()
        if line:  # else the parent is gone already
            config = msgspec.json.decode(line, type=PageServerConfig)
            folder = Path(config.folder)
            try:
                serve(config, folder)
                status = 0
            except CannotServe as error:
                _report(folder, PageServerReport(failed=str(error)))
            else:
                shutil.rmtree(folder, ignore_errors=True)  # a parent that was killed cannot do that
    finally:
        sys.stderr.flush()
        os._exit(status)  # waits for no thread: one reads our standard input


def serve(config: PageServerConfig, folder: Path) -> None:
    """Run Voilà until the parent is gone. Raises `CannotServe`."""
    port, notebook = _free_port(config.port), _write_notebook(folder)
    os.environ[CONFIG_VARIABLE] = msgspec.json.encode(config).decode()
    for kind in ("DATA", "CONFIG", "RUNTIME"):
        os.environ[f"JUPYTER_{kind}_DIR"] = str(folder)  # what a user has set up is for notebooks, not for this page
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)  # requests, for example, whose addresses may hold the token

    from tornado.ioloop import IOLoop
    from traitlets.config import Config
    from voila.app import Voila

    options = {
        "MappingKernelManager": {"cull_idle_timeout": config.lonely_time, "cull_interval": 1 + config.lonely_time // 5},
        "KernelManager": {"shutdown_wait_time": KERNEL_STOP_TIME},
        "PasswordIdentityProvider": {"allow_password_change": False},
    }
    server = Voila(
        config=Config(options), config_file_paths=[], ip=LOOPBACK, port=port, port_retries=0 if config.port else 50,
        token=config.token, open_browser=False, connection_dir_root=str(folder), log_level=logging.ERROR,
        tornado_settings={"headers": {"Content-Security-Policy": CONTENT_POLICY, "Referrer-Policy": "no-referrer"}},
    )  # fmt: skip
    server.initialize([str(notebook)])
    loop = IOLoop.current()
    watch_parent(on_end=lambda: loop.add_callback(loop.stop), exit_after=lambda: 2 * STOP_TIME)
    loop.add_callback(lambda: _report(folder, PageServerReport(server.port)))  # called when it listens
    server.start()


def _free_port(wanted: int) -> int:
    with socket.socket() as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError as error:
            raise CannotServe(
                f"port {wanted} cannot be used: {error.strerror}. Take another, or leave it out"
            ) from None
        port: int = probe.getsockname()[1]
        return port


def _write_notebook(folder: Path) -> Path:
    """Write the notebook, and a kernel for it that runs this Python, whatever kernels are installed."""
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": KERNEL_NAME,
        "language": "python",
        "env": {"IPYTHONDIR": str(folder / "ipython")},
    }
    cell: dict[str, Any] = {
        "cell_type": "code",
        "id": "0",
        "source": CELL,
        "metadata": {},
        "outputs": [],
        "execution_count": None,
    }
    notebook = {
        "metadata": {
            "kernelspec": {"name": KERNEL_NAME, "display_name": KERNEL_NAME, "language": "python"},
            "title": "labkit",
        },
        "cells": [cell],
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    kernel_folder = folder / "kernels" / KERNEL_NAME
    kernel_folder.mkdir(parents=True)
    write_private(kernel_folder / "kernel.json", msgspec.json.encode(kernel))
    write_private(folder / "dashboard.ipynb", msgspec.json.encode(notebook))
    return folder / "dashboard.ipynb"


def _report(folder: Path, report: PageServerReport) -> None:
    new = folder / f"{REPORT_FILE}.new"
    write_private(new, msgspec.json.encode(report))
    os.replace(new, folder / REPORT_FILE)


def write_private(file: Path, data: bytes) -> None:
    """Write a file that no other user can read."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(data)


if __name__ == "__main__":
    main()
