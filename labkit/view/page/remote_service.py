"""Answers pages in other processes that show a swarm of this one, such as that of `labkit watch`.

`remote_source` is the side that asks. Between them are three remote calls: `view.frame`, `view.command` and
`view.export`. While no page looks, nothing is sent and nothing is sampled.
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
from labkit.view.page.local_source import DashboardView, LocalSource
from labkit.wire.rpc_types import AsyncMethod, Reply, Request

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_REMOTE_PAGES = 8  # in other processes, that one node makes frames for
REMOTE_PAGE_TIMEOUT = 12.0  # seconds after its last call that a page is forgotten
REMOTE_FRAME_PERIOD = 0.1  # seconds between two frames for one page, however often it asks
FRAME_THREADS = 2  # that make frames
MAX_WAITING = 2  # calls for one page, or commands, that may wait for the one before
PART_BYTES = 1 << 20  # of an export in one answer
MAX_PARTS = 128  # of an export
SCENE_PERIOD = 1.0  # seconds between two scenes while pages look; their frames have a period of their own
NO_SECRET = (
    "buttons need the swarm's control secret, which this page does not have: whoever has an invitation may look. "
    "labkit demo --watch has it"
)

PageId = Annotated[str, Meta(min_length=1, max_length=64)]


class FrameCall(msgspec.Struct, array_like=True):
    """The body of `view.frame`.

    The answer has two tensors of bytes: the header as JSON, and all buffers, one behind the other. Its body is the
    list of the buffers' sizes.
    """

    page: PageId
    layer: Annotated[int, Meta(ge=0, lt=1 << 16)]
    mode: Literal["load", "latency", "failures", "staleness"]
    fresh: bool


class CommandCall(msgspec.Struct, array_like=True):
    """The body of `view.command`; see `SwarmView.execute`. The answer's body is a sentence."""

    secret: Annotated[str, Meta(max_length=128)]
    command: Annotated[
        dict[Annotated[str, Meta(max_length=16)], Annotated[str, Meta(max_length=16)] | int | float | None],
        Meta(max_length=8),
    ]


class ExportCall(msgspec.Struct, array_like=True):
    """The body of `view.export`. Part 0 makes the export, which is kept until its last part has been fetched."""

    page: PageId
    format: Literal["png", "html", "json"]
    part: Annotated[int, Meta(ge=0, lt=MAX_PARTS)]


class ExportPart(msgspec.Struct, array_like=True):
    """The body of the answer to an `ExportCall`; its tensor holds the bytes of this part."""

    name: str
    parts: Annotated[int, Meta(ge=1, le=MAX_PARTS)]


@dataclass(eq=False, slots=True)
class _Page:
    """A page in another process."""

    source: LocalSource
    called_at: float  # when it called last, on trio's clock
    next_frame_at: float = 0.0
    turn: trio.Lock = field(default_factory=trio.Lock)
    export: tuple[str, str, bytes] | None = None  # format, file name, bytes


class RemoteService:
    """Makes frames for pages in other processes, hands out exports, and executes commands that come with its secret.

    Whoever has the `secret` may kill servers and stop the run; it is in no invitation. `methods` are the remote methods
    of the node. All of this runs in the lab thread, except what takes longer than a moment: that runs in threads.

    Args:
        view: Returns the view of the swarm, or None before there is one.
    """

    def __init__(self, view: Callable[[], DashboardView | None]) -> None:
        self.secret = secrets.token_urlsafe(32)
        self.methods: Mapping[str, AsyncMethod] = {
            "view.frame": AsyncMethod(self.rpc_frame, FrameCall),
            "view.command": AsyncMethod(self.rpc_command, CommandCall),
            "view.export": AsyncMethod(self.rpc_export, ExportCall),
        }
        self._view = view
        self._pages: dict[str, _Page] = {}
        self._sampling = False
        self._command_lock = trio.Lock()
        self._export_lock = trio.Lock()
        # A thread whose call was cancelled works on, and holds its place until it is done.
        self._frame_threads = trio.CapacityLimiter(FRAME_THREADS)
        self._command_threads = trio.CapacityLimiter(1)
        self._export_threads = trio.CapacityLimiter(1)

    async def rpc_frame(self, request: Request) -> Reply:
        """Answer with the next frame for a page."""
        call: FrameCall = request.body
        page = self._get_page(call.page)
        async with _turn(page.turn):
            await trio.sleep_until(page.next_frame_at)
            page.next_frame_at = trio.current_time() + REMOTE_FRAME_PERIOD
            try:
                return await _in_thread(self._frame_threads, _frame, page.source, call)
            except trio.Cancelled:  # the frame is lost, and its writer perhaps still at work
                self._pages.pop(call.page, None)
                raise

    async def rpc_command(self, request: Request) -> Reply:
        """Execute the command of a button."""
        call: CommandCall = request.body
        if not hmac.compare_digest(call.secret.encode(), self.secret.encode()):
            raise RequestRefused(NO_SECRET)
        view = self._open_view()
        async with _turn(self._command_lock):
            return Reply(await _in_thread(self._command_threads, view.execute, call.command))

    async def rpc_export(self, request: Request) -> Reply:
        """Answer with a part of the dashboard as a file."""
        call: ExportCall = request.body
        page = self._get_page(call.page)
        if call.part == 0:
            page.export = None
            async with _turn(self._export_lock):
                name, _, data = await _in_thread(self._export_threads, page.source.export, call.format)
            if len(data) > MAX_PARTS * PART_BYTES:
                raise MessageTooLarge(
                    f"the file has {len(data):,} bytes, and {MAX_PARTS * PART_BYTES:,} are sent at most"
                )
            page.export = call.format, name, data
        if page.export is None or page.export[0] != call.format:
            raise RequestRefused("this export is not there any more; begin again")
        _, name, data = page.export
        parts = max(1, -(-len(data) // PART_BYTES))
        if call.part + 1 >= parts:
            page.export = None
        return Reply(ExportPart(name, parts), [_tensor(data[call.part * PART_BYTES : (call.part + 1) * PART_BYTES])])

    def _open_view(self) -> DashboardView:
        view = self._view()
        if view is None or view.over:
            raise Overloaded("the swarm is starting or ending")
        return view

    def _get_page(self, id: str) -> _Page:
        self._prune()
        page = self._pages.get(id)
        if page is None:
            if len(self._pages) >= MAX_REMOTE_PAGES:
                raise Overloaded(
                    f"{MAX_REMOTE_PAGES} pages look at this node already; close one, or wait until it is forgotten"
                )
            page = self._pages[id] = _Page(LocalSource(self._open_view()), 0.0)
        page.called_at = trio.current_time()
        if not self._sampling:
            self._sampling = True
            trio.lowlevel.spawn_system_task(self._keep_sampled)  # ends with the pages, or with the lab thread
        return page

    def _prune(self) -> None:
        now = trio.current_time()
        for id, page in list(self._pages.items()):
            if now - page.called_at > REMOTE_PAGE_TIMEOUT:
                del self._pages[id]

    async def _keep_sampled(self) -> None:
        """Keep the swarm sampled as long as there is a page."""
        remove: Callable[[], None] = _do_nothing
        try:
            remove = self._open_view().add(_do_nothing, SCENE_PERIOD)
            while self._pages:
                await trio.sleep(REMOTE_PAGE_TIMEOUT / 10)
                self._prune()
        except Exception:  # nothing above a system task would handle it
            logger.exception("pages elsewhere see numbers that stand still")
        finally:
            self._sampling = False
            remove()


def _do_nothing(*_: object) -> None:
    pass


@asynccontextmanager
async def _turn(lock: trio.Lock) -> AsyncIterator[None]:
    if lock.statistics().tasks_waiting >= MAX_WAITING:
        raise Overloaded("one after the other: earlier calls still wait to be answered")
    async with lock:
        yield


async def _in_thread(threads: trio.CapacityLimiter, function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread. What it raises becomes a failure that crosses the wire."""
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
