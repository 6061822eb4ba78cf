"""The dashboard: a widget whose pages are sent frames of a swarm while somebody looks, and whose buttons are obeyed.

What a page says is put away at once, and dealt with in the dashboard's own thread, which alone sends to the widget and
is there only while there is something to send. Orders are carried out in another, one at a time. What may be sent when
is decided in `pages`; what is in a frame, by its source.
"""

from __future__ import annotations

import logging
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from labkit.errors import LabkitError
from labkit.view.page.commands import FORMATS
from labkit.view.page.pages import ButtonCommand, Chunk, FrameDue, FrameSource, Header, Pages
from labkit.view.scene import Scene
from labkit.view.worker_thread import WorkerThread

if TYPE_CHECKING:
    from labkit.view.swarm_view import SwarmView

logger = logging.getLogger(__name__)

UNHEARD = 256  # messages of pages that wait; what comes on top is lost
ORDERS = 8  # that wait; beyond that, a page is told to try again
WATCH_PERIOD = 1.0  # seconds between two looks whether a run has ended
LEFTOVERS = 8  # outputs of cells that get a picture
CLOSE_TIMEOUT = 0.5  # seconds


class Dashboard(anywidget.AnyWidget):
    """A live view of a swarm, `swarm.dashboard()`: show it as the last expression of a cell, or by `display`.

    `view`: of the swarm, if it is one of this process; then a picture stays behind in the notebook when a run ends, and
    when the swarm is closed. `alone`: it has a page to itself, which is light or dark as the system is. Without a
    notebook it shows nothing, but `export` works. Raises `LabkitError` if labkit was installed without its front end.
    """

    _esm = traitlets.Unicode().tag(sync=True)
    _css = traitlets.Unicode().tag(sync=True)
    alone = traitlets.Bool().tag(sync=True)

    def __init__(self, source: FrameSource, view: SwarmView | None = None, *, alone: bool = False) -> None:
        self._source = source
        self.view = view
        self._pages = Pages(source.forget)
        self._unheard: deque[object] = deque()  # said by pages
        self._orders: deque[ButtonCommand] = deque()  # to be carried out
        self._answers: deque[Header] = deque()  # to be sent
        self._files: deque[tuple[ButtonCommand, tuple[str, str, bytes]]] = deque()  # to be sent
        self._broken = False  # whether the last frame could not be made
        self._ended = False
        self._sender = WorkerThread(f"labkit-dashboard-{source.name}", self._send_what_is_due)
        self._doer = WorkerThread(f"labkit-orders-{source.name}", self._carry_out)
        self._leftovers: deque[Any] = deque(maxlen=LEFTOVERS)  # handles of outputs under the widget
        self._drawn: tuple[bool, int] | None = None  # what the picture there shows: whether open, and the step
        super().__init__(_esm=bundled("dashboard.js"), _css=bundled("dashboard.css"), alone=alone)
        self.on_msg(self._put_away)
        self.comm.on_close(lambda message: self.close())
        _let_pages_choose_their_subshell(self.comm)
        self._unwatch = view.add(self._watch, WATCH_PERIOD, looks=False) if view is not None else lambda: None

    def __repr__(self) -> str:
        return f"<dashboard of swarm {self._source.name!r}{', closed' if self._ended else ''}>"

    @property
    def ended(self) -> bool:
        """Whether it was closed."""
        return self._ended

    # ------------------------------------------------------------ pages

    def _put_away(self, widget: object, content: object, buffers: object) -> None:
        """A page said something. The thread is the kernel's main one between cells, or that of a subshell."""
        if len(self._unheard) < UNHEARD and not self._ended:
            self._unheard.append(content)
            self._sender.wake()

    def _send_what_is_due(self) -> float | None:
        """One turn of the dashboard's thread, which alone touches `_pages` and sends to the widget."""
        if self._ended:
            self._pages.clear()
            return None
        while self._unheard:
            order = self._pages.hear(self._unheard.popleft(), time.monotonic())
            if order is not None:
                self._accept(order)
        while self._files:
            order, file = self._files.popleft()
            if not self._pages.post(order.page, order.id, *file):
                self._answers.append(_answer("failed", order, "fetch what was exported before first"))
        while self._answers:
            self.send(self._answers.popleft())
        over = self._source.over
        turn = self._pages.turn(time.monotonic(), over)
        if isinstance(turn, FrameDue):
            self._send_frame(turn)
        elif isinstance(turn, Chunk):
            self._send_chunk(turn)
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

    # ------------------------------------------------------------ orders

    def _accept(self, order: ButtonCommand) -> None:
        self.send({"type": "heard", "page": order.page, "id": order.id})
        if order.do is None:
            self.send(_answer("failed", order, order.problem))
        elif len(self._orders) >= ORDERS:
            self.send(_answer("failed", order, "busy with earlier orders; try again in a while"))
        else:
            self._orders.append(order)
            self._doer.wake()

    def _carry_out(self) -> None:
        """The thread of the orders."""
        while self._orders:
            order = self._orders.popleft()
            assert order.do is not None
            try:
                if order.do["do"] == "export":
                    self._files.append((order, self._source.export(order.do["format"])))
                else:
                    self._answers.append(_answer("done", order, self._source.order(order.do)))
            except (LabkitError, ValueError) as error:
                self._answers.append(_answer("failed", order, str(error)))
            except Exception as error:
                logger.exception("an order failed: %r", order.do)
                self._answers.append(_answer("failed", order, f"{type(error).__name__}: {error}"))
            self._sender.wake()

    def export(self, path: str | Path) -> Path:
        """Save the dashboard as a file: .png, or .html or .json of all that was recorded. Raises `ValueError`."""
        path = Path(path)
        format = path.suffix.lower().removeprefix(".")
        if format not in FORMATS:
            known = ", ".join(f".{format}" for format in FORMATS)
            raise ValueError(f"a dashboard is exported as {known}, not as {path.name!r}")
        path.write_bytes(self._source.export(format)[2])
        return path

    # ------------------------------------------------------------ in a notebook

    def _repr_mimebundle_(self, **kwargs: object) -> Any:
        """The widget, and for readers without one, text and HTML."""
        bundle = super()._repr_mimebundle_()
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        return {**data, **self._plain()}, metadata

    def _plain(self) -> dict[str, str]:
        if self.view is None:
            return {"text/plain": repr(self)}
        summary = self.view.summary()
        return {"text/plain": summary.text(), "text/html": summary.html()}

    def _ipython_display_(self, **kwargs: object) -> None:
        """Show it, and below it keep a place for the picture that stays behind."""
        from IPython.core.getipython import get_ipython
        from IPython.display import display as untyped_display

        display: Callable[..., Any] = untyped_display
        if self._ended:
            display({"text/plain": repr(self)}, raw=True)
            return
        data, metadata = self._repr_mimebundle_()
        display(data, metadata=metadata, raw=True)
        if self.view is not None and hasattr(get_ipython(), "kernel"):
            self._leftovers.append(display({"text/plain": ""}, raw=True, display_id=True))
            self._drawn = None
            if self.view.over:
                self._watch(self.view.scene())

    def _watch(self, scene: Scene) -> None:
        """Leave a picture behind when a run is over, or the swarm. In the view's thread."""
        if not scene.open:
            self._sender.wake()  # pages are to see it
        elif scene.headline.running or not scene.headline.steps:
            return
        shown = (scene.open, scene.headline.steps)
        if self._leftovers and self._drawn != shown:
            from labkit.view.picture.snapshot import draw

            self._drawn = shown
            png = b64encode(draw(scene)).decode()
            for handle in list(self._leftovers):
                handle.update({"image/png": png, "text/plain": repr(self)}, raw=True)

    def close(self) -> None:
        """Remove the widget from its pages, and end its threads."""
        if getattr(self, "_ended", True) or not hasattr(self, "_unwatch"):
            super().close()  # again, or when it could not be made
            return
        self._ended = True
        self._unwatch()
        self._sender.wake()
        self._sender.wait_for_end(CLOSE_TIMEOUT)
        self.layout.close()
        super().close()


def bundled(name: str) -> str:
    """A file of the front end, as `make frontend` built it. Raises `LabkitError`."""
    file = resources.files("labkit.view") / "static" / name
    if not file.is_file():
        raise LabkitError(f"labkit's front end ({name}) is not there; in a checkout, `make frontend` builds it")
    return file.read_text(encoding="utf-8")


def _answer(type: str, order: ButtonCommand, text: str) -> Header:
    return {"type": type, "page": order.page, "id": order.id, "text": text}


def _let_pages_choose_their_subshell(comm: Any) -> None:
    """JupyterLab sends what a page says to a subshell, so that it is heard while a cell runs; ipykernel 7.4 sends it to
    the shell that used the comm last instead, and that is mostly the busy one."""
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default
