"""The dashboard: a widget whose pages are sent frames of a swarm while someone looks, and whose buttons send commands.

Messages from pages are queued at once, and handled in a thread of the dashboard's own, which alone sends to the widget
and exists only while there is something to send. Another thread executes commands, one at a time. `pages` decides what
may be sent when; the frame source decides what is in a frame.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from labkit.errors import LabkitError
from labkit.interrupts import interrupts_wait
from labkit.paths import user_path
from labkit.view.page.commands import EXPORT_FORMATS
from labkit.view.page.lasting_picture import LastingPicture
from labkit.view.page.local_source import DashboardView
from labkit.view.page.pages import Beat, ButtonCommand, Chunk, FrameDue, FrameSource, Header, Pages
from labkit.view.scene import Scene
from labkit.view.worker_thread import WorkerThread

logger = logging.getLogger(__name__)

MAX_MESSAGES = 256  # of pages that wait; more are dropped
MAX_COMMANDS = 8  # that wait; beyond that, a page is told to try again
WATCH_PERIOD = 1.0  # seconds between two looks whether the picture that stays is to be renewed
SENDER_END_TIMEOUT = 0.5  # seconds that `close` waits for the thread that sends


class Dashboard(anywidget.AnyWidget):
    """A live view of a swarm; `swarm.dashboard()` makes it.

    Show it as the last expression of a cell, or by `display`. A picture of it stays in the
    notebook, renewed now and then. Without a notebook it shows nothing, but `export` works.

    Args:
        source: Where its frames and files come from.
        view: The view of a swarm of this process, for the picture that stays; None for a
            swarm in another process.
        alone: Whether it has a web page to itself, which is then light or dark as the system
            is.

    Raises:
        LabkitError: labkit was installed without its front end.
    """

    _esm = traitlets.Unicode().tag(sync=True)
    _css = traitlets.Unicode().tag(sync=True)
    alone = traitlets.Bool().tag(sync=True)

    def __init__(self, source: FrameSource, view: DashboardView | None = None, *, alone: bool = False) -> None:
        self._source = source
        self.view = view
        self._pages = Pages(source.forget, unheard=not alone)  # a kernel of its own runs no long cells
        self._messages: deque[object] = deque()  # from pages, to be handled
        self._commands: deque[ButtonCommand] = deque()  # to be executed
        self._answers: deque[Header] = deque()  # to be sent
        self._exports: deque[tuple[ButtonCommand, tuple[str, str, bytes]]] = deque()  # to be sent
        self._broken = False  # whether the last frame could not be made
        self._displayed = False  # since the last step of the sender
        self._ended = False
        self._sender = WorkerThread(f"labkit-dashboard-{source.name}", self._send_what_is_due)
        self._executor = WorkerThread(f"labkit-commands-{source.name}", self._execute_commands)
        self._picture = LastingPicture(f"<dashboard of swarm {source.name!r}>")
        super().__init__(_esm=bundled("dashboard.js"), _css=bundled("dashboard.css"), alone=alone)
        self.on_msg(self._on_page_message)
        self.comm.on_close(lambda message: self.close())
        _let_pages_choose_their_subshell(self.comm)
        self._unwatch = view.add(self._watch, WATCH_PERIOD, watched=False) if view is not None else lambda: None

    def __repr__(self) -> str:
        return f"<dashboard of swarm {self._source.name!r}{', closed' if self._ended else ''}>"

    @property
    def ended(self) -> bool:
        """Whether the dashboard is closed."""
        return self._ended

    # ------------------------------------------------------------ pages

    def _on_page_message(self, widget: object, content: object, buffers: object) -> None:
        """Queue a message. Called in the kernel's main thread between cells, or in that of a subshell."""
        if len(self._messages) < MAX_MESSAGES and not self._ended:
            self._messages.append(content)
            self._sender.wake()

    def _send_what_is_due(self) -> float | None:
        """One step of the sender thread, which alone touches `_pages` and sends to the widget."""
        if self._ended:
            self._pages.clear()
            return None
        if self._displayed:
            self._displayed = False
            self._pages.shown(time.monotonic())
        while self._messages:
            command = self._pages.on_message(self._messages.popleft(), time.monotonic())
            if command is not None:
                self._accept(command)
        while self._exports:
            command, file = self._exports.popleft()
            if not self._pages.send_file(command.page, command.id, *file):
                self._answers.append(_answer("failed", command, "fetch what was exported before first"))
        while self._answers:
            self.send(self._answers.popleft())
        over = self._source.over
        turn = self._pages.turn(time.monotonic(), over)
        if isinstance(turn, FrameDue):
            self._send_frame(turn)
        elif isinstance(turn, Chunk):
            self._send_chunk(turn)
        elif isinstance(turn, Beat):
            self.send({"type": "beat"})
        return self._pages.wait(time.monotonic(), over)

    def _send_frame(self, due: FrameDue) -> None:
        began = time.thread_time()
        try:
            header, buffers = self._source.frame(due.page, layer=due.layer, mode=due.mode, fresh=due.fresh)
        except Exception:
            self._pages.missed(due)
            if not self._broken:
                logger.exception("the swarm %r cannot be shown", self._source.name)
            self._broken = True
            return
        self._broken = False
        self.send(self._pages.sent(due, header, time.thread_time() - began), buffers)

    def _send_chunk(self, chunk: Chunk) -> None:
        self.send(chunk.header, [chunk.data])
        if chunk.last:
            text = f"{chunk.header['name']} saved"
            self.send({"type": "done", "page": chunk.header["page"], "id": chunk.header["id"], "text": text})

    # ------------------------------------------------------------ commands

    def _accept(self, command: ButtonCommand) -> None:
        self.send({"type": "heard", "page": command.page, "id": command.id})
        if command.do is None:
            self.send(_answer("failed", command, command.problem))
        elif len(self._commands) >= MAX_COMMANDS:
            self.send(_answer("failed", command, "busy with earlier commands; try again in a while"))
        else:
            self._commands.append(command)
            self._executor.wake()

    def _execute_commands(self) -> None:
        """The step of the thread that executes commands."""
        while self._commands:
            command = self._commands.popleft()
            assert command.do is not None
            try:
                if command.do["do"] == "export":
                    self._exports.append((command, self._source.export(command.do["format"])))
                else:
                    self._answers.append(_answer("done", command, self._source.execute(command.do)))
            except (LabkitError, ValueError) as error:
                self._answers.append(_answer("failed", command, str(error)))
            except Exception as error:
                logger.exception("a command failed: %r", command.do)
                self._answers.append(_answer("failed", command, f"{type(error).__name__}: {error}"))
            self._sender.wake()

    def export(self, path: str | Path) -> Path:
        """Save the dashboard to a file.

        Args:
            path: The file, whose suffix says what it holds: `.png` a picture of this moment,
                `.html` a page that replays all that was recorded, `.json` the numbers.

        Returns:
            The path.

        Raises:
            ValueError: The path has another suffix.
        """
        path = user_path(path)
        format = path.suffix.lower().removeprefix(".")
        if format not in EXPORT_FORMATS:
            known = ", ".join(f".{format}" for format in EXPORT_FORMATS)
            raise ValueError(f"a dashboard is exported as {known}, not as {path.name!r}")
        path.write_bytes(self._source.export(format)[2])
        return path

    # ------------------------------------------------------------ in a notebook

    def _repr_mimebundle_(self, **kwargs: object) -> Any:
        """The widget, and text and HTML for front ends without widgets."""
        bundle = super()._repr_mimebundle_()
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        return {**data, **self._plain()}, metadata

    def _plain(self) -> dict[str, str]:
        if self.view is None:
            return {"text/plain": repr(self)}
        summary = self.view.summary()
        return {"text/plain": summary.text(), "text/html": summary.html()}

    def _ipython_display_(self, **kwargs: object) -> None:
        """Show the widget, and keep a place below it for the picture that stays."""
        from IPython.core.getipython import get_ipython
        from IPython.display import display as untyped_display

        display: Callable[..., Any] = untyped_display
        if self._ended:
            display({"text/plain": repr(self)}, raw=True)
            return
        data, metadata = self._repr_mimebundle_()
        display(data, metadata=metadata, raw=True)
        self._displayed = True
        self._sender.wake()
        if self.view is not None and hasattr(get_ipython(), "kernel"):
            self._picture.add_place()
            if self.view.over:
                self._watch(self.view.scene())

    def _watch(self, scene: Scene) -> None:
        """Renew the picture that stays. Called in the view's thread."""
        if not scene.open:
            self._sender.wake()  # pages are to see that it is closed
        self._picture.show(scene)

    def __del__(self) -> None:
        """Not `close`, as widgets have it: at Python's end that would start a thread, and wait for it for ever."""

    def close(self) -> None:
        """Remove the widget from its pages, and end its threads. Safe to repeat."""
        if getattr(self, "_ended", True) or not hasattr(self, "_unwatch"):
            super().close()  # closed before, or never completely made
            return
        with interrupts_wait():
            self._ended = True
            self._unwatch()
            self._sender.wake()
            self._sender.wait_for_end(SENDER_END_TIMEOUT)
            self.layout.close()
            super().close()


def bundled(name: str) -> str:
    """Returns the text of a file of the front end, as `make frontend` built it. Raises `LabkitError`."""
    file = resources.files("labkit.view") / "static" / name
    if not file.is_file():
        raise LabkitError(f"labkit's front end ({name}) is not there; in a checkout, `make frontend` builds it")
    return file.read_text(encoding="utf-8")


def _answer(type: str, command: ButtonCommand, text: str) -> Header:
    return {"type": type, "page": command.page, "id": command.id, "text": text}


def _let_pages_choose_their_subshell(comm: Any) -> None:
    """JupyterLab sends a page's messages to a subshell, so that they arrive while a cell runs. ipykernel 7.4 would pass
    them to the shell that used the comm last instead, which is mostly the busy one."""
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default
