"""What a dashboard shows of a swarm that runs in another process: a `FrameSource` that makes remote calls.

The page of `labkit watch` is built on this. The side that answers is `remote_service`.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from labkit.errors import BadReply, RequestRefused, RPCError, SwarmClosed, UnknownMethod
from labkit.view.collect.inventory import Inventory
from labkit.view.collect.sampler import Sampler
from labkit.view.collect.telemetry import Telemetry
from labkit.view.page.frame_writer import FrameWriter
from labkit.view.page.local_source import MIME_TYPES, DashboardView, LocalSource
from labkit.view.page.pages import Header
from labkit.view.page.remote_service import (
    MAX_PARTS,
    NO_SECRET,
    PART_BYTES,
    SCENE_PERIOD,
    CommandCall,
    ExportCall,
    ExportPart,
    FrameCall,
)
from labkit.view.scene import MODES
from labkit.wire.rpc_types import Reply

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 1 << 17  # that are taken for a frame; a `FrameWriter` stays below half of it
FRAME_TIMEOUT = 2.0  # seconds
COMMAND_TIMEOUT = 35.0  # seconds: commands are executed one after the other, and a run may take ten to stop
EXPORT_TIMEOUT = 30.0  # seconds, for the first part, which waits until the export is made
FRAME_RETRY_DELAY = 1.0  # seconds after a failed call for which no page asks again
HEADER_KEYS = {
    "reset", "at", "wall", "swarm", "open", "source", "can", "headline", "layers", "server_text", "marks", "series",
    "pieces", "curves", "waits", "reach",
}  # fmt: skip
LASTING_KEYS = {"at", "wall", "swarm", "source", "headline"}  # of the last header, shown when no other comes
MAX_LAYER = (1 << 16) - 1
MAX_ANSWER = 500  # characters of the sentence that answers a command


class RemoteCall(Protocol):
    """Calls a method of the node that is shown, and blocks until it answers. Raises `RPCError`, `SwarmClosed`."""

    def __call__(self, method: str, body: Any, *, returns: Any, timeout: float) -> Reply: ...


class RemoteSource:
    """What a dashboard shows of a swarm in another process; a `FrameSource` that makes remote calls.

    While no answer comes, the last numbers stay, and the page says that they are old. A node that has nothing to show
    (an expert server by itself) is one of a swarm all the same: then our own view shows what its servers report.

    Args:
        name: What the shown node is called, such as its address.
        call: Calls the node.
        view: The view of our own node in that swarm.
        secret: The control secret of the shown swarm; without it the page has no buttons.
        closed: Whether our own node is closed.
    """

    def __init__(
        self, name: str, call: RemoteCall, view: DashboardView, secret: str | None, closed: Callable[[], bool]
    ) -> None:
        self.name = name
        self._call = call
        self._view = view
        self._secret = secret
        self._closed = closed
        self._id = secrets.token_hex(8)  # in place of a page's, when we fetch exports
        self._last: Header = {}  # the last header that came
        self._lost: set[str] = set()  # pages that begin anew, since frames for them may have been lost
        self._failed = -math.inf  # when a call failed last, monotonic
        self._own: LocalSource | None = None  # what our own view shows, if the node has nothing to show
        self._own_pages: set[str] = set()
        self._stop_sampling: Callable[[], None] = _do_nothing

    @property
    def over(self) -> bool:
        """Whether our own node is closed. The shown one may come back."""
        return self._closed()

    def frame(self, page: str, *, layer: int, mode: str, fresh: bool) -> tuple[Header, list[bytes]]:
        """Returns the next frame for a page. If none comes within 2 seconds, returns one that is not `open`."""
        if self._own is None and time.monotonic() >= self._failed + FRAME_RETRY_DELAY:
            try:
                return self._ask(page, min(layer, MAX_LAYER), mode, fresh or page in self._lost)
            except UnknownMethod:
                self._own, fresh = LocalSource(self._view), True
            except (RPCError, SwarmClosed) as error:
                log = logger.warning if self._failed == -math.inf else logger.debug
                log("%s shows nothing: %s", self.name, error)
                self._failed = time.monotonic()
        if self._own is not None:
            return self._own_frame(self._own, page, layer, mode, fresh)
        self._lost.add(page)
        known = {key: value for key, value in self._last.items() if key in LASTING_KEYS}
        rest = self._nothing_known() if fresh or not known else {"pieces": []}  # else the page keeps all that it has
        return {**rest, **known, "reset": fresh, "open": False, "can": {"control": False}}, []

    def _ask(self, page: str, layer: int, mode: str, fresh: bool) -> tuple[Header, list[bytes]]:
        call = FrameCall(page, layer, mode, fresh)  # type: ignore[arg-type]  # `Pages` has checked the mode
        header, buffers = _read_frame(self._call("view.frame", call, returns=list[int], timeout=FRAME_TIMEOUT))
        self._last, self._failed = header, -math.inf
        self._lost.discard(page)
        return {**header, "can": {"control": bool(header.get("open")) and self._secret is not None}}, buffers

    def _nothing_known(self) -> Header:
        scene = Sampler(Telemetry(), Inventory, lambda: 0, lambda: None, self.name).scene(open=False)
        return FrameWriter().frame(scene, layer=0, mode=MODES[0], control=False)[0]

    def _own_frame(self, own: LocalSource, page: str, layer: int, mode: str, fresh: bool) -> tuple[Header, list[bytes]]:
        if not self._own_pages:
            self._stop_sampling = self._view.add(_do_nothing, SCENE_PERIOD)
        self._own_pages.add(page)
        header, buffers = own.frame(page, layer=layer, mode=mode, fresh=fresh)
        return {**header, "can": {"control": False}}, buffers

    def forget(self, page: str) -> None:
        """Drop what is kept for a page that is gone. The other side notices by itself."""
        self._lost.discard(page)
        self._own_pages.discard(page)
        if self._own is not None:
            self._own.forget(page)
            if not self._own_pages:
                self._stop_sampling()

    def execute(self, command: Mapping[str, Any]) -> str:
        """Have a button's command executed at the other end. Raises `LabkitError`."""
        if self._secret is None:
            raise RequestRefused(NO_SECRET)
        reply = self._call(
            "view.command", CommandCall(self._secret, dict(command)), returns=str, timeout=COMMAND_TIMEOUT
        )
        return str(reply.body)[:MAX_ANSWER]

    def export(self, format: str) -> tuple[str, str, bytes]:
        """Returns a file that the other end makes: its name, MIME type and bytes. Raises `LabkitError`."""
        if self._own is not None:
            return self._own.export(format)
        name, data, parts = "", bytearray(), 1
        for part in range(MAX_PARTS):
            call = ExportCall(self._id, format, part)  # type: ignore[arg-type]  # `check_command` has checked it
            reply = self._call("view.export", call, returns=ExportPart, timeout=EXPORT_TIMEOUT)
            name, parts = reply.body.name, reply.body.parts
            data += _bytes(reply.tensors, 1, PART_BYTES)[0]
            if part + 1 >= parts:
                break
        if not re.fullmatch(rf"\w[\w.-]{{0,93}}\.{format}", name):
            name = f"labkit.{format}"
        return name, MIME_TYPES[format], bytes(data)


def _read_frame(reply: Reply) -> tuple[Header, list[bytes]]:
    """Returns header and buffers of a frame, whose contents the page checks. Raises `BadReply`."""
    head, data = _bytes(reply.tensors, 2, MAX_FRAME_BYTES)
    try:
        header = msgspec.json.decode(head, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadReply(f"a frame that cannot be read: {error}") from None
    buffers, start = [], 0
    for size in reply.body:
        if not 0 <= size <= len(data) - start:
            raise BadReply("a frame that is shorter than it says")
        buffers.append(data[start : start + size])
        start += size
    return {key: value for key, value in header.items() if key in HEADER_KEYS}, buffers


def _bytes(tensors: Sequence[Tensor], count: int, limit: int) -> list[bytes]:
    if len(tensors) != count or any(tensor.dtype != torch.uint8 or tensor.numel() > limit for tensor in tensors):
        raise BadReply("an answer that is not what was asked for, or too long")
    return [tensor.numpy().tobytes() for tensor in tensors]


def _do_nothing(*_: object) -> None:
    pass
