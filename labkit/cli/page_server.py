"""The process that serves the page of `labkit watch`: Voilà with a notebook of one cell.

`watch` starts this file as a script, so that torch and the rest of labkit need not be imported here; only the kernel of
a page does that. It reads an order from its standard input, and ends when that ends: no orphan stays.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import msgspec

LOOPBACK = "127.0.0.1"
PLACE = "LABKIT_WATCH"  # environment variable by which kernels are told what to show
REPORT = "report"  # file in the order's folder
KERNEL = "labkit-watch"
CELL = "from labkit.cli.watch import show\n\nshow()"
STOP_TIME = 1.5  # seconds that all of it has to end
KERNEL_STOP_TIME = 0.7  # seconds of those that kernels have
# A page may load what this server has, whatever else Voilà's templates name.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)


class PageServerConfig(msgspec.Struct):
    """What the server is told, on its standard input: no secret is in an argument list. Kernels are told the same."""

    invite: str
    secret: str | None
    key: str | None  # a key file
    port: int  # 0: any
    token: str
    folder: str  # for all files that come of it
    lonely_time: int  # seconds after which a kernel whose page has gone is ended


class PageServerReport(msgspec.Struct):
    """What it answers, in a file: the port, or why there is none."""

    port: int = 0
    failed: str | None = None


class CannotServe(Exception):
    """What the parent is told."""


def main() -> NoReturn:
    """Serve until the parent closes our standard input, or is gone."""
    status = 1
    try:
        line = sys.stdin.buffer.readline()
        if line:  # else the parent is gone already
            order = msgspec.json.decode(line, type=PageServerConfig)
            folder = Path(order.folder)
            try:
                serve(order, folder)
                status = 0
            except CannotServe as error:
                _report(folder, PageServerReport(failed=str(error)))
            else:
                shutil.rmtree(folder, ignore_errors=True)  # a parent that was killed cannot do that
    finally:
        sys.stderr.flush()
        os._exit(status)  # waits for no thread: one reads our standard input


def serve(order: PageServerConfig, folder: Path) -> None:
    """Run Voilà. Raises `CannotServe`."""
    port, notebook = _free_port(order.port), _write_notebook(folder)
    os.environ[PLACE] = msgspec.json.encode(order).decode()
    for what in ("DATA", "CONFIG", "RUNTIME"):
        os.environ[f"JUPYTER_{what}_DIR"] = str(folder)  # what a user has set up is for notebooks, not for this
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)  # requests, for one, whose addresses may hold the token

    from tornado.ioloop import IOLoop
    from traitlets.config import Config
    from voila.app import Voila

    config = {
        "MappingKernelManager": {"cull_idle_timeout": order.lonely_time, "cull_interval": 1 + order.lonely_time // 5},
        "KernelManager": {"shutdown_wait_time": KERNEL_STOP_TIME},
        "PasswordIdentityProvider": {"allow_password_change": False},
    }
    server = Voila(
        config=Config(config), config_file_paths=[], ip=LOOPBACK, port=port, port_retries=0 if order.port else 50,
        token=order.token, open_browser=False, connection_dir_root=str(folder), log_level=logging.ERROR,
        tornado_settings={"headers": {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}},
    )  # fmt: skip
    server.initialize([str(notebook)])
    loop = IOLoop.current()

    def wait_for_parent() -> None:
        sys.stdin.buffer.read()
        loop.add_callback(loop.stop)
        time.sleep(2 * STOP_TIME)
        os._exit(1)  # the last resort: perhaps nobody is left to kill us

    threading.Thread(target=wait_for_parent, name="labkit-parent", daemon=True).start()
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
    """The notebook, and a kernel for it that is this Python, whatever kernels are installed."""
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": KERNEL,
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
        "metadata": {"kernelspec": {"name": KERNEL, "display_name": KERNEL, "language": "python"}, "title": "labkit"},
        "cells": [cell],
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    place = folder / "kernels" / KERNEL
    place.mkdir(parents=True)
    write_private(place / "kernel.json", msgspec.json.encode(kernel))
    write_private(folder / "dashboard.ipynb", msgspec.json.encode(notebook))
    return folder / "dashboard.ipynb"


def _report(folder: Path, report: PageServerReport) -> None:
    new = folder / f"{REPORT}.new"
    write_private(new, msgspec.json.encode(report))
    os.replace(new, folder / REPORT)


def write_private(file: Path, data: bytes) -> None:
    """Write a file that nobody else can read."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(data)


if __name__ == "__main__":
    main()
