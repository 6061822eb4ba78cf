"""Who looks at a dashboard, and what may be sent to whom, when. No I/O: the time is passed in.

A page is one load of the widget's front end in one browser tab. All pages of a dashboard hear every message, so each
carries the page that it is for. A frame is built only when it can be sent at once: what comes too late is not made at
all. The other end, and the messages themselves, are in frontend/src/types.ts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

from labkit.view.page.commands import check_order
from labkit.view.scene import MODES

PAGES = 16  # known at a time; one more takes the place of the one that has been silent longest
PATIENCE = 12.0  # seconds after its last word that a page is forgotten; one that looks says so every 5
FRAME_PERIOD = 0.25  # seconds between two frames, to whomever; more, where it takes long to make one:
LONGEST_PERIOD = 2.0
SMALL = 0.001  # seconds that making one may take anyway; what it takes beyond that is, on average,
SHARE = 0.002  # of a core, unless `LONGEST_PERIOD` is over before
WINDOW = 2  # frames and chunks that a page has not acknowledged
CHUNK = 48_000  # bytes of an export in one message
CHUNK_PERIOD = 0.02  # seconds between two chunks
PARCELS = 2  # exports on their way to a page
LAST_FRAMES = 10  # that a page gets of a scene that will not change any more: a large one takes several

Header = dict[str, Any]


class FrameSource(Protocol):
    """What a dashboard shows: a swarm of this process, or one that is watched from afar. Its methods may block."""

    name: str

    @property
    def over(self) -> bool:
        """Whether nothing will ever change any more: the swarm is closed, and its last scene stays."""

    def frame(self, page: str, *, layer: int, mode: str, fresh: bool) -> tuple[Header, list[bytes]]:
        """The next frame for a page. `fresh`: the page has nothing yet."""

    def forget(self, page: str) -> None:
        """A page is gone."""

    def order(self, order: Mapping[str, Any]) -> str:
        """Do what a button says; returns a sentence. Raises `ValueError`, `LabkitError`."""

    def export(self, format: str) -> tuple[str, str, bytes]:
        """The dashboard as a file: its name, MIME type and bytes. `format`: png, html, json. Raises as `order` does."""


@dataclass(frozen=True, slots=True)
class ButtonCommand:
    """A page wants something done. `do`: see `check_order`; None if it makes no sense, `problem` says why."""

    page: str
    id: int
    do: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class FrameDue:
    """A frame may be sent to this page now."""

    page: str
    layer: int
    mode: str
    fresh: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an export, to be sent now. `last`: after it, the export is done."""

    header: Header
    data: bytes
    last: bool


@dataclass(slots=True)
class _Parcel:
    id: int
    name: str
    mime: str
    data: bytes
    index: int = 0

    @property
    def total(self) -> int:
        return max(1, math.ceil(len(self.data) / CHUNK))


@dataclass(slots=True)
class _Page:
    id: str
    heard: float
    looking: bool = False
    fresh: bool = True
    layer: int = 0
    mode: str = MODES[0]
    seq: int = 0
    open: deque[int] = field(default_factory=deque)  # sequence numbers that it has not acknowledged
    sent: float = -math.inf  # when it got its last frame
    owed: int = LAST_FRAMES  # frames that it gets once nothing changes any more
    parcels: deque[_Parcel] = field(default_factory=deque)

    def number(self) -> int:
        self.seq += 1
        self.open.append(self.seq)
        return self.seq


class Pages:
    """The pages of one dashboard. `forget` is called with the id of each that is gone. Times: seconds, monotonic."""

    def __init__(self, forget: Callable[[str], None]) -> None:
        self._forget = forget
        self._pages: dict[str, _Page] = {}
        self._frame_at = -math.inf  # when the next frame may go
        self._chunk_at = -math.inf

    @property
    def known(self) -> list[str]:
        """Ids of the pages that are not forgotten."""
        return list(self._pages)

    # ------------------------------------------------------------ what pages say

    def hear(self, message: object, now: float) -> ButtonCommand | None:
        """Take what a page said. Returns the order, if it is one. What makes no sense is ignored."""
        if not isinstance(message, Mapping) or not _is_name(message.get("page")):
            return None
        kind, page = message.get("type"), message["page"]
        if kind == "look":
            self._look(page, message, now)
        elif kind == "ack" and page in self._pages and _is_int(message.get("seq")):
            self._pages[page].heard = now
            self._acknowledge(self._pages[page], message["seq"])
        elif kind == "order" and _is_int(message.get("id")):
            self._meet(page, now)
            try:
                return ButtonCommand(page, message["id"], check_order(message.get("order")))
            except ValueError as error:
                return ButtonCommand(page, message["id"], None, str(error))
        return None

    def _look(self, id: str, message: Mapping[str, Any], now: float) -> None:
        layer, mode = message.get("layer"), message.get("mode")
        looking, fresh = message.get("looking"), message.get("fresh")
        if not _is_int(layer) or mode not in MODES or not isinstance(looking, bool) or not isinstance(fresh, bool):
            return
        page = self._meet(id, now)
        page.looking = looking
        if fresh:  # the front end began anew, and forgot what was under way
            page.fresh = True
            page.open.clear()
        if fresh or (layer, mode) != (page.layer, page.mode):
            page.owed = LAST_FRAMES
        page.layer, page.mode = layer, mode

    @staticmethod
    def _acknowledge(page: _Page, seq: int) -> None:
        while page.open and page.open[0] <= seq <= page.seq:
            page.open.popleft()

    def _meet(self, id: str, now: float) -> _Page:
        self._prune(now)
        if id not in self._pages and len(self._pages) >= PAGES:
            self._drop(min(self._pages.values(), key=lambda page: page.heard).id)
        page = self._pages.setdefault(id, _Page(id, now))
        page.heard = now
        return page

    def _prune(self, now: float) -> None:
        for page in list(self._pages.values()):
            if now - page.heard > PATIENCE:
                self._drop(page.id)

    def _drop(self, id: str) -> None:
        del self._pages[id]
        self._forget(id)

    def clear(self) -> None:
        """Forget all pages."""
        for id in list(self._pages):
            self._drop(id)

    # ------------------------------------------------------------ what they are sent

    def turn(self, now: float, over: bool = False) -> FrameDue | Chunk | None:
        """What is to be sent now, if anything. `over`: see `FrameSource`.

        A `FrameDue` is a chance that is gone with this call; what came of it is told to `sent`, or to `missed`.
        """
        self._prune(now)
        if now >= self._frame_at and (lookers := self._lookers(over)):
            page = min(lookers, key=lambda page: page.sent)
            page.sent = now
            self._frame_at = now + FRAME_PERIOD
            if over:
                page.owed -= 1
            return FrameDue(page.id, page.layer, page.mode, page.fresh)
        if now >= self._chunk_at and (takers := self._takers()):
            self._chunk_at = now + CHUNK_PERIOD
            return self._cut(takers[0])
        return None

    def sent(self, due: FrameDue, header: Header, took: float = 0.0) -> Header:
        """The header of the frame that goes out, with the page that it is for and its number. `took`: seconds to make.

        `ack`: whether the page is to acknowledge it, and those before it. Not each: what a kernel does for a message
        that it gets costs more than the frame.
        """
        page = self._pages[due.page]
        page.fresh = False
        self._frame_at = max(self._frame_at, page.sent + min((took - SMALL) / SHARE, LONGEST_PERIOD))
        seq = page.number()
        return {**header, "type": "frame", "page": page.id, "seq": seq, "ack": len(page.open) >= WINDOW}

    def missed(self, due: FrameDue) -> None:
        """The frame could not be made; the next one has to begin anew."""
        if due.page in self._pages:
            self._pages[due.page].fresh = True

    def wait(self, now: float, over: bool = False) -> float | None:
        """Seconds until something is to be sent; None: not before some page says something."""
        times = []
        if self._lookers(over):
            times.append(self._frame_at)
        if self._takers():
            times.append(self._chunk_at)
        return max(0.0, min(times) - now) if times else None

    def _lookers(self, over: bool) -> list[_Page]:
        return [
            page
            for page in self._pages.values()
            if page.looking and len(page.open) < WINDOW and (page.owed > 0 or not over)
        ]

    def _takers(self) -> list[_Page]:
        return [page for page in self._pages.values() if page.parcels and len(page.open) < WINDOW]

    # ------------------------------------------------------------ exports

    def post(self, page: str, id: int, name: str, mime: str, data: bytes) -> bool:
        """Send a file to a page, as the answer to its order `id`. False if the page is gone, or has enough to fetch."""
        if page not in self._pages or len(self._pages[page].parcels) >= PARCELS:
            return False
        self._pages[page].parcels.append(_Parcel(id, name, mime, data))
        return True

    def _cut(self, page: _Page) -> Chunk:
        parcel = page.parcels[0]
        index, parcel.index = parcel.index, parcel.index + 1
        last = parcel.index == parcel.total
        if last:
            page.parcels.popleft()
        header = {
            "type": "chunk", "page": page.id, "id": parcel.id, "seq": page.number(), "index": index,
            "total": parcel.total, "name": parcel.name, "mime": parcel.mime,
        }  # fmt: skip
        return Chunk(header, parcel.data[index * CHUNK : (index + 1) * CHUNK], last)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= 64
