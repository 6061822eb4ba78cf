"""A server at a worker of a cluster: the Dask task that starts its child process there, and carries lines to and fro.

The task is `keep_server`, which occupies what it was given of the worker's resources, but none of its threads. What the
child reports and writes goes to the notebook as Dask's events, under a topic of the server's own; what the notebook
orders comes by `take_order`, which it calls with `Client.run`. The child is the one of `child`, and its life is tied to
the worker: it ends when the worker does, and when the notebook has not been heard of for a while.

Dask imports this in the worker, so it imports nothing but the standard library and what starts a child: torch is loaded
in the child only. The notebook's side is in `cluster_runner`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections import deque
from contextlib import suppress
from typing import Any

from labkit.launch.child_python import OWN_GROUP, child_folder, python_command, server_environment

LEASE = 60.0  # seconds without a word of the notebook after which its server stops
LOOK_INTERVAL = 0.5  # seconds between two looks at whether the notebook still wants a server that has not begun
ALIVE_INTERVAL = 1.0  # seconds between two signs of life
OUTPUT_INTERVAL = 0.1  # seconds between two messages of what the child writes
MAX_LINES = 200  # of what the child writes, in one message; with more, the first are left out
TASK = "labkit-server-"  # the names of all tasks that keep servers begin so
MAX_LINE = 4000  # characters of such a line
STOP_TIME = 30.0  # seconds that a child has to save its experts when nobody waits for it
STDERR_TIMEOUT = 0.5  # seconds to read the rest of what a dead child wrote
FORGOTTEN = {"cancelled", "released", "forgotten"}  # words for a task that nobody wants any more
CLOSING = {"closing", "closed", "closing_gracefully", "failed"}  # words for a worker that ends

_keepers: dict[str, _Keeper] = {}  # by the name of the attempt


def keep_server(topic: str, run: str, number: int) -> None:
    """Start a server as a child process when the notebook says which, and wait for its end. A task of Dask.

    Args:
        topic: Under which topic the notebook hears of it.
        run: The name of the server's run.
        number: Which of the notebook's submissions this is.
    """
    from distributed import get_worker, secede

    logging.getLogger("distributed.worker.state_machine").addFilter(_is_news)  # once, however often it is added
    keeper = _Keeper(get_worker(), topic, run, number)
    _keepers[keeper.attempt] = keeper
    try:
        secede()  # type: ignore[no-untyped-call]  # the thread is free for other tasks, and the resources are held
        keeper.run()
    finally:
        del _keepers[keeper.attempt]


def take_order(attempt: str, order: str, text: str = "") -> bool:
    """Take an order of the notebook, which calls this at the worker.

    Args:
        attempt: Which server's.
        order: "serve" with the child's configuration; "line" with a command for the child; "members" with the keys
            that may connect; "kill"; "renew", which only says that the notebook is there.
        text: What belongs to it.

    Returns:
        Whether there is such a server.
    """
    keeper = _keepers.get(attempt)
    if keeper is not None:
        keeper.take(order, text)
    return keeper is not None


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of Dask's is to be written: not that a worker, being closed, has cancelled the task of a server.

    Its notebook is told so in words of ours, and says it where it shows the server.
    """
    return f"execute('{TASK}" not in (said := record.getMessage()) or "CancelledError" not in said


def is_here(folder: str) -> bool:
    """Whether this host has the notebook's temporary folder, whose name is random."""
    return os.path.isdir(folder)


class _Keeper:
    """Keeps one child. Its methods are called by the task's thread, but for `take`, which never waits."""

    def __init__(self, worker: Any, topic: str, run: str, number: int) -> None:
        self.attempt = uuid.uuid4().hex
        self._worker, self._topic, self._run, self._number = worker, topic, run, number
        self._key = worker.get_current_task()
        self._config: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._output: deque[str] = deque(maxlen=MAX_LINES)  # what the child wrote and was not sent yet
        self._left_out = 0
        self._news = threading.Event()  # there is output, an order to kill, or an end
        self._over = threading.Event()  # the child has closed its reports: it has ended
        self._kill = False
        self._why = ""  # why this worker lets the child stop, if it does
        self._members, self._member_file = "", ""
        self._renewed = time.monotonic()

    def take(self, order: str, text: str) -> None:
        """See `take_order`."""
        self._renewed = time.monotonic()
        if order == "serve":
            self._config.put(text)
        elif order == "line":
            self._lines.put(text.encode())
        elif order == "members":
            self._members = text
            self._write_members()
        elif order == "kill":
            self._kill = True
            self._config.put(None)
            self._news.set()

    def run(self) -> None:
        """Say that this worker has begun, wait for the configuration, and serve."""
        self._say(
            "begun", number=self._number, address=self._worker.address, host=socket.gethostname(),
            nthreads=self._worker.state.nthreads,
        )  # fmt: skip
        config = None
        while self._why_stop() == "":
            try:
                config = self._config.get(timeout=LOOK_INTERVAL)
                break
            except queue.Empty:
                pass
        if config is None:
            self._say("ended", code=-signal.SIGTERM, why=self._why)
            return
        try:
            line = json.dumps(self._fit(json.loads(config))).encode() + b"\n"
            self._start()
        except OSError as error:
            self._say("failed", text=f"{type(error).__name__}: {error}")
            return
        self._lines.put(line)
        threads = [
            threading.Thread(target=target, name=f"labkit-child-{target.__name__}", daemon=True)
            for target in (self._write_lines, self._read_reports, self._read_output)
        ]
        for thread in threads:
            thread.start()
        self._watch()
        assert self._process is not None
        code = self._process.wait()
        threads[-1].join(STDERR_TIMEOUT)  # a child of the child may hold its standard error open
        self._lines.put(None)
        self._send_output()
        self._say("ended", code=code, why=self._why)

    def _fit(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration for this host, which may not have the notebook's temporary files."""
        folder = config["folder"]
        if folder is None or is_here(folder):
            return config
        here = os.path.join(self._worker.local_directory, "labkit", os.path.basename(folder))
        os.makedirs(here, exist_ok=True)
        for name in ("checkpoint_dir", "copies_dir"):
            directory = config["server"][name]
            if directory is not None and os.path.commonpath([folder, directory]) == folder:
                config["server"][name] = os.path.join(here, os.path.relpath(directory, folder))
        if config["member_file"] is not None:
            config["member_file"] = self._member_file = os.path.join(here, f"members-{self.attempt}")
            self._write_members()
        return {**config, "folder": None}

    def _write_members(self) -> None:
        if self._member_file:
            new = self._member_file + ".new"
            with open(new, "w", encoding="utf-8") as file:
                file.write(self._members)
            os.replace(new, self._member_file)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            python_command("labkit.launch.child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=server_environment(),
            cwd=child_folder(),
            **OWN_GROUP,
        )
        self._say("started", pid=self._process.pid)

    def _watch(self) -> None:
        """Wait for the child's end, and see to it that there is one."""
        process, said, stop_by = self._process, time.monotonic(), None
        assert process is not None
        while not self._over.is_set():
            self._news.wait(ALIVE_INTERVAL)
            self._news.clear()
            now = time.monotonic()
            self._send_output()
            if now >= said + ALIVE_INTERVAL:
                self._say("alive")
                said = now
            if self._why_stop() and stop_by is None:
                self._lines.put(None)  # the end of its input, which the child answers with a clean stop
                stop_by = now + STOP_TIME
            if self._kill or (stop_by is not None and now > stop_by):
                process.kill()
            if not self._over.is_set():
                time.sleep(OUTPUT_INTERVAL)

    def _why_stop(self) -> str:
        """Why this worker is to let the child stop, if it is; an empty text if not."""
        task = self._worker.state.tasks.get(self._key)
        if time.monotonic() > self._renewed + LEASE:
            self._why = f"its worker heard nothing of the notebook for {LEASE:g} s, and stopped it"
        elif getattr(self._worker.status, "name", "") in CLOSING:
            self._why = "its worker was closed"
        elif task is None or task.state in FORGOTTEN:  # as Dask does with the tasks of a client that is gone
            self._why = "its notebook, or the client of Dask there, is gone"
        return self._why

    def _write_lines(self) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError, ValueError):  # the child is gone, which `_watch` notices
            while (line := self._lines.get()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        with suppress(OSError, ValueError):
            self._process.stdin.close()

    def _read_reports(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout as reports:
            for line in reports:
                self._send_output()  # what it wrote before
                self._say("report", text=line.decode(errors="replace"))
        self._over.set()
        self._news.set()

    def _read_output(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        with self._process.stderr as output:
            for line in output:
                self._left_out += len(self._output) == MAX_LINES
                self._output.append(line.decode(errors="replace").rstrip()[:MAX_LINE])
                self._news.set()

    def _send_output(self) -> None:
        lines = [f"… {self._left_out} lines left out …"] if self._left_out else []
        self._left_out = 0
        with suppress(IndexError):  # until there are no more; two threads may send
            while True:
                lines.append(self._output.popleft())
        if lines:
            self._say("output", lines=lines)

    def _say(self, what: str, **words: Any) -> None:
        with suppress(Exception):  # a worker that is closing has no stream any more
            message = {"run": self._run, "attempt": self.attempt, "what": what, **words}
            self._worker.log_event(self._topic, message)
