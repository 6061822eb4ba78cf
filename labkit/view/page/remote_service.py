"""The pages in other processes that look at a swarm of this one, and what they are answered.

`remote_view` is the side that asks. Between them are three remote calls: `view.frame`, `view.order` and `view.export`.
While nobody looks, nothing is sent and nothing is sampled.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import torch
import trio
from msgspec import Meta
from torch import Tensor

from labkit.errors import BadRequest, LabkitError, MessageTooLarge, Overloaded, RemoteFailure, RequestRefused, RPCError
from labkit.view.page.local_source import LocalSource
from labkit.view.swarm_view import SwarmView
from labkit.wire.rpc_types import AsyncMethod, Reply, Request

logger = logging.getLogger(__name__)
T = TypeVar("T")

PAGES = 8  # elsewhere, that one node makes frames for
PATIENCE = 12.0  # seconds after its last call that a page is forgotten
FRAME_PERIOD = 0.1  # seconds between two frames for one page, however often it asks
FRAMERS = 2  # threads that make frames
WAITING = 2  # calls for one page, or orders, that may wait for the one before
PART = 1 << 20  # bytes of an export in one answer
PARTS = 128
SCENE_PERIOD = 1.0  # seconds; that of the frames is the pages' own
NO_SECRET = (
    "buttons work only for who has the swarm's control secret, and this page has not: with an invitation one may look. "
    "labkit demo --watch has it"
)

Page = Annotated[str, Meta(min_length=1, max_length=64)]


class FrameCall(msgspec.Struct, array_like=True):
    """The body of `view.frame`. The answer's body is the sizes of the buffers, which come one behind the other in a
    tensor after that of the header, as JSON."""

    page: Page
    layer: Annotated[int, Meta(ge=0, lt=1 << 16)]
    mode: Literal["load", "latency", "failures", "staleness"]
    fresh: bool


class OrderCall(msgspec.Struct, array_like=True):
    """The body of `view.order`; see `SwarmView.order`. The answer's body is a sentence."""

    secret: Annotated[str, Meta(max_length=128)]
    order: Annotated[
        dict[Annotated[str, Meta(max_length=16)], Annotated[str, Meta(max_length=16)] | int | float | None],
        Meta(max_length=8),
    ]


class ExportCall(msgspec.Struct, array_like=True):
    """The body of `view.export`. Part 0 has the export made; it is kept until its last part has been fetched."""

    page: Page
    format: Literal["png", "html", "json"]
    part: Annotated[int, Meta(ge=0, lt=PARTS)]


class ExportPart(msgspec.Struct, array_like=True):
    """The body of its answer; the tensor is this part's bytes."""

    name: str
    parts: Annotated[int, Meta(ge=1, le=PARTS)]


@dataclass(eq=False, slots=True)
class _Page:
    """A page in another process."""

    source: LocalSource
    heard: float  # on trio's clock
    ready: float = 0.0  # when it may have its next frame
    turn: trio.Lock = field(default_factory=trio.Lock)
    export: tuple[str, str, bytes] | None = None  # format, file name, bytes


class Viewers:
    """Makes frames for pages elsewhere, hands out exports, and obeys orders that come with its secret.

    `secret`: who has it may kill servers and stop the run; it is in no invitation. `view`: of the swarm; None before
    there is one. Everything here is in the lab thread, except what takes longer than a moment: that is in threads.
    """

    def __init__(self, view: Callable[[], SwarmView | None]) -> None:
        self.secret = secrets.token_urlsafe(32)
        self.methods: Mapping[str, AsyncMethod] = {
            "view.frame": AsyncMethod(self.rpc_frame, FrameCall),
            "view.order": AsyncMethod(self.rpc_order, OrderCall),
            "view.export": AsyncMethod(self.rpc_export, ExportCall),
        }
        self._view = view
        self._pages: dict[str, _Page] = {}
        self._attended = False
        self._ordering = trio.Lock()
        self._exporting = trio.Lock()
        # A thread whose call was cancelled works on, and holds its place as long.
        self._framers, self._exporters, self._orderers = (trio.CapacityLimiter(n) for n in (FRAMERS, 1, 1))

    async def rpc_frame(self, request: Request) -> Reply:
        """The next frame for a page."""
        call: FrameCall = request.body
        page = self._meet(call.page)
        async with _turn(page.turn):
            await trio.sleep_until(page.ready)
            page.ready = trio.current_time() + FRAME_PERIOD
            try:
                return await _in_thread(self._framers, _frame, page.source, call)
            except trio.Cancelled:  # the frame is lost, and its writer perhaps still at work
                self._pages.pop(call.page, None)
                raise

    async def rpc_order(self, request: Request) -> Reply:
        """What a button does."""
        call: OrderCall = request.body
        if not hmac.compare_digest(call.secret.encode(), self.secret.encode()):
            raise RequestRefused(NO_SECRET)
        view = self._known_view()
        async with _turn(self._ordering):
            return Reply(await _in_thread(self._orderers, view.order, call.order))

    async def rpc_export(self, request: Request) -> Reply:
        """A part of the dashboard as a file."""
        call: ExportCall = request.body
        page = self._meet(call.page)
        if call.part == 0:
            page.export = None
            async with _turn(self._exporting):
                name, _, data = await _in_thread(self._exporters, page.source.export, call.format)
            if len(data) > PARTS * PART:
                raise MessageTooLarge(f"the file has {len(data):,} bytes, and {PARTS * PART:,} are sent at most")
            page.export = call.format, name, data
        if page.export is None or page.export[0] != call.format:
            raise RequestRefused("this export is not there any more; begin again")
        _, name, data = page.export
        parts = max(1, -(-len(data) // PART))
        if call.part + 1 >= parts:
            page.export = None
        return Reply(ExportPart(name, parts), [_tensor(data[call.part * PART : (call.part + 1) * PART])])

    def _known_view(self) -> SwarmView:
        view = self._view()
        if view is None or view.over:
            raise Overloaded("the swarm is starting or ending")
        return view

    def _meet(self, id: str) -> _Page:
        self._prune()
        page = self._pages.get(id)
        if page is None:
            if len(self._pages) >= PAGES:
                raise Overloaded(f"{PAGES} pages look at this node already; close one, or wait until it is forgotten")
            page = self._pages[id] = _Page(LocalSource(self._known_view()), 0.0)
        page.heard = trio.current_time()
        if not self._attended:
            self._attended = True
            trio.lowlevel.spawn_system_task(self._attend)  # ends with the pages, or with the lab thread
        return page

    def _prune(self) -> None:
        now = trio.current_time()
        for id, page in list(self._pages.items()):
            if now - page.heard > PATIENCE:
                del self._pages[id]

    async def _attend(self) -> None:
        """Have the swarm sampled as long as there is a page."""
        remove: Callable[[], None] = _do_nothing
        try:
            remove = self._known_view().add(_do_nothing, SCENE_PERIOD)
            while self._pages:
                await trio.sleep(PATIENCE / 10)
                self._prune()
        except Exception:  # nobody is above a system task
            logger.exception("pages elsewhere see numbers that stand still")
        finally:
            self._attended = False
            remove()


def _do_nothing(*_: object) -> None:
    pass


@asynccontextmanager
async def _turn(lock: trio.Lock) -> AsyncIterator[None]:
    if lock.statistics().tasks_waiting >= WAITING:
        raise Overloaded("one after the other: earlier calls still wait to be answered")
    async with lock:
        yield


async def _in_thread(threads: trio.CapacityLimiter, function: Callable[..., T], *args: Any) -> T:
    """What it returns; what it raises becomes a failure that crosses the wire. The lab thread goes on meanwhile."""
    try:
        return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True, limiter=threads)
    except RPCError:
        raise
    except LabkitError as error:
        raise RemoteFailure(str(error)) from None
    except ValueError as error:
        raise BadRequest(str(error)) from None


def _frame(source: LocalSource, call: FrameCall) -> Reply:
    header, buffers = source.frame(call.page, layer=call.layer, mode=call.mode, fresh=call.fresh)
    return Reply(list(map(len, buffers)), [_tensor(msgspec.json.encode(header)), _tensor(b"".join(buffers))])


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
