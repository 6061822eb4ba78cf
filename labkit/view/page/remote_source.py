"""What a dashboard shows of a swarm that runs in another process: a `FrameSource` by remote calls.

`labkit watch` and the page behind it are built on this. The side that answers is `viewers`.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor

from labkit.contact import Contact
from labkit.errors import BadReply, RequestRefused, RPCError, SwarmClosed, UnknownMethod
from labkit.view.collect.inventory import Inventory
from labkit.view.collect.sampler import Sampler
from labkit.view.collect.telemetry import Telemetry
from labkit.view.page.frame_writer import FrameWriter
from labkit.view.page.local_source import MIMES, LocalSource
from labkit.view.page.pages import Header
from labkit.view.page.remote_service import (
    NO_SECRET,
    PART,
    PARTS,
    SCENE_PERIOD,
    ExportCall,
    ExportPart,
    FrameCall,
    OrderCall,
)
from labkit.view.scene import MODES
from labkit.wire.rpc_types import BULK, Reply

if TYPE_CHECKING:
    from labkit.swarm import Swarm

logger = logging.getLogger(__name__)

FRAME_BYTES = 1 << 17  # that we take for a frame; a `FrameWriter` stays below half of it
FRAME_TIMEOUT = 2.0  # seconds
ORDER_TIMEOUT = 35.0  # seconds: orders come one after the other, and a run may take ten to stop
EXPORT_TIMEOUT = 30.0  # seconds, for the first part, which waits until it is drawn
RETRY = 1.0  # seconds after a failed call for which no page asks again
KEYS = {
    "reset", "at", "wall", "swarm", "open", "source", "can", "headline", "layers", "server_text", "marks", "series",
    "pieces",
}  # fmt: skip
LASTING = {"at", "wall", "swarm", "source", "headline"}  # of a header, when no other comes
MAX_LAYER = (1 << 16) - 1
MAX_SAID = 500  # characters of a sentence that a button is answered with


class RemoteSource:
    """What a dashboard shows of a swarm in another process; a `FrameSource`, by remote calls.

    `swarm`: ours, through which we ask. `contact`: the node that is asked. `secret`: its control secret; without it the
    page has no buttons. While no answer comes, the last numbers stay, and the page says that they are old. A node that
    has nothing to show (an expert server by itself) still is one of a swarm: then we show what the servers report.
    """

    def __init__(self, swarm: Swarm, contact: Contact, secret: str | None = None) -> None:
        self.name = contact.endpoint
        self._swarm = swarm
        self._contact = contact
        self._secret = secret
        self._id = secrets.token_hex(8)  # as whom we fetch exports
        self._last: Header = {}  # the last header that came
        self._lost: set[str] = set()  # pages that begin anew, since frames for them may have been lost
        self._failed = -math.inf  # when a call failed last, monotonic
        self._own: LocalSource | None = None
        self._own_pages: set[str] = set()
        self._stop_sampling: Callable[[], None] = _do_nothing

    @property
    def over(self) -> bool:
        """Whether our own node is closed. The other one may be back."""
        return self._swarm.closed

    def frame(self, page: str, *, layer: int, mode: str, fresh: bool) -> tuple[Header, list[bytes]]:
        """The next frame for a page. Waits for it at most 2 seconds; then it is one that is not `open`."""
        if self._own is None and time.monotonic() >= self._failed + RETRY:
            try:
                return self._ask(page, min(layer, MAX_LAYER), mode, fresh or page in self._lost)
            except UnknownMethod:
                self._own, fresh = LocalSource(self._swarm.view), True
            except (RPCError, SwarmClosed) as error:
                log = logger.warning if self._failed == -math.inf else logger.debug
                log("%s shows nothing: %s", self.name, error)
                self._failed = time.monotonic()
        if self._own is not None:
            return self._frame_of_our_own(self._own, page, layer, mode, fresh)
        self._lost.add(page)
        known = {key: value for key, value in self._last.items() if key in LASTING}
        rest = self._nothing_known() if fresh or not known else {"pieces": []}  # else the page keeps all that it has
        return {**rest, **known, "reset": fresh, "open": False, "can": {"control": False}}, []

    def _ask(self, page: str, layer: int, mode: str, fresh: bool) -> tuple[Header, list[bytes]]:
        call = FrameCall(page, layer, mode, fresh)  # type: ignore[arg-type]  # `Pages` has checked the mode
        header, buffers = _read_frame(self._call("view.frame", call, list[int], FRAME_TIMEOUT))
        self._last, self._failed = header, -math.inf
        self._lost.discard(page)
        return {**header, "can": {"control": bool(header.get("open")) and self._secret is not None}}, buffers

    def _nothing_known(self) -> Header:
        scene = Sampler(Telemetry(), Inventory, lambda: 0, lambda: None, self.name).scene(open=False)
        return FrameWriter().frame(scene, layer=0, mode=MODES[0], control=False)[0]

    def _frame_of_our_own(
        self, own: LocalSource, page: str, layer: int, mode: str, fresh: bool
    ) -> tuple[Header, list[bytes]]:
        if not self._own_pages:
            self._stop_sampling = self._swarm.view.add(_do_nothing, SCENE_PERIOD)
        self._own_pages.add(page)
        header, buffers = own.frame(page, layer=layer, mode=mode, fresh=fresh)
        return {**header, "can": {"control": False}}, buffers

    def forget(self, page: str) -> None:
        """A page is gone. The other side will notice."""
        self._lost.discard(page)
        self._own_pages.discard(page)
        if self._own is not None:
            self._own.forget(page)
            if not self._own_pages:
                self._stop_sampling()

    def order(self, order: Mapping[str, Any]) -> str:
        """Have it done at the other end. Raises `LabkitError`."""
        if self._secret is None:
            raise RequestRefused(NO_SECRET)
        reply = self._call("view.order", OrderCall(self._secret, dict(order)), str, ORDER_TIMEOUT)
        return str(reply.body)[:MAX_SAID]

    def export(self, format: str) -> tuple[str, str, bytes]:
        """The dashboard as a file that the other end makes: its name, MIME type and bytes. Raises `LabkitError`."""
        if self._own is not None:
            return self._own.export(format)
        name, data, parts = "", bytearray(), 1
        for part in range(PARTS):
            call = ExportCall(self._id, format, part)  # type: ignore[arg-type]  # `check_order` has checked it
            reply = self._call("view.export", call, ExportPart, EXPORT_TIMEOUT)
            name, parts = reply.body.name, reply.body.parts
            data += _bytes(reply.tensors, 1, PART)[0]
            if part + 1 >= parts:
                break
        if not re.fullmatch(rf"\w[\w.-]{{0,93}}\.{format}", name):
            name = f"labkit.{format}"
        return name, MIMES[format], bytes(data)

    def _call(self, method: str, body: Any, returns: Any, timeout: float) -> Reply:
        call = partial(self._swarm._node.client.call, returns=returns, timeout=timeout, lane=BULK)
        reply: Reply = self._swarm._portal.call(call, self._contact, method, body)
        return reply


def _read_frame(reply: Reply) -> tuple[Header, list[bytes]]:
    """Header and buffers of a frame. What they say, a page checks. Raises `BadReply`."""
    head, data = _bytes(reply.tensors, 2, FRAME_BYTES)
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
    return {key: value for key, value in header.items() if key in KEYS}, buffers


def _bytes(tensors: Sequence[Tensor], count: int, limit: int) -> list[bytes]:
    if len(tensors) != count or any(tensor.dtype != torch.uint8 or tensor.numel() > limit for tensor in tensors):
        raise BadReply("an answer that is not what was asked for, or too long")
    return [tensor.numpy().tobytes() for tensor in tensors]


def _do_nothing(*_: object) -> None:
    pass
