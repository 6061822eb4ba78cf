"""The pages that look at a dashboard, and what each of them may be sent when. No I/O: the time is passed in.

A page is one load of the widget's front end in one browser tab. Every message of a dashboard reaches all of its pages,
so each message names the page that it is for. A frame is made only when it can be sent at once. The messages, and the
other end, are in frontend/src/types.ts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

from labkit.view.page.commands import check_command
from labkit.view.scene import MODES

MAX_PAGES = 16  # known at a time; one more takes the place of the one that has been silent longest
PAGE_TIMEOUT = 12.0  # seconds after its last message that a page is forgotten; one that looks sends one every 5
BEAT_PERIOD = 2.5  # seconds without a message after which a page that looks is told that there is still a kernel
BEAT_TIMEOUT = 12 * 3600.0  # seconds for which pages are told so that are not heard (any more)
FRAME_PERIOD = 0.25  # seconds between two frames, to whichever page; longer where it takes long to make one:
MAX_FRAME_PERIOD = 2.0  # seconds
FREE_FRAME_SECONDS = 0.001  # of computing that a frame may take without making frames rarer
FRAME_CORE_SHARE = 0.002  # of a core that what a frame takes beyond that may use, on average
MAX_UNACKNOWLEDGED = 2  # frames and chunks on their way to a page
CHUNK_BYTES = 48_000  # of an export in one message
CHUNK_PERIOD = 0.02  # seconds between two chunks
MAX_EXPORTS = 2  # on their way to a page
LAST_FRAMES = 10  # that a page gets of a scene that will not change any more: a large one takes several

Header = dict[str, Any]


class FrameSource(Protocol):
    """What a dashboard shows: a swarm of this process, or one in another process. Its methods may block."""

    name: str

    @property
    def over(self) -> bool:
        """Whether nothing will ever change any more: the swarm is closed, and its last scene stays."""

    def frame(self, page: str, *, layer: int, mode: str, fresh: bool) -> tuple[Header, list[bytes]]:
        """Returns the header and the buffers of the next frame for a page.

        Args:
            page: Id of the page.
            layer: Number of the layer that it looks at, or `ALL_LAYERS`.
            mode: What its heat map shows, one of `MODES`.
            fresh: Whether the page has nothing yet.
        """

    def forget(self, page: str) -> None:
        """Drop what is kept for a page that is gone."""

    def execute(self, command: Mapping[str, Any]) -> str:
        """Execute a checked command. Returns a sentence that says what was done. Raises `ValueError`, `LabkitError`."""

    def export(self, format: str) -> tuple[str, str, bytes]:
        """Returns the dashboard as a file (png, html or json): name, MIME type and bytes. Raises as `execute` does."""


@dataclass(frozen=True, slots=True)
class ButtonCommand:
    """A command that a page has sent. `do`: see `check_command`; None for an impossible one, and `problem` says why."""

    page: str
    id: int
    do: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life, to be sent to all pages now: a kernel whose cell runs may not hear them, and yet it is there."""


@dataclass(frozen=True, slots=True)
class FrameDue:
    """A frame may be sent to this page now."""

    page: str
    layer: int
    mode: str
    fresh: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an export, to be sent now. `last`: whether it completes the export."""

    header: Header
    data: bytes
    last: bool


@dataclass(slots=True)
class _Export:
    id: int
    name: str
    mime: str
    data: bytes
    index: int = 0

    @property
    def total(self) -> int:
        return max(1, math.ceil(len(self.data) / CHUNK_BYTES))


@dataclass(slots=True)
class _Page:
    id: str
    heard_at: float  # when it last sent a message
    told_at: float  # when it was last sent one
    looking: bool = False
    paused: bool = False  # it is in sight, but wants no frames
    fresh: bool = True
    layer: int = 0
    mode: str = MODES[0]
    seq: int = 0
    unacknowledged: deque[int] = field(default_factory=deque)  # sequence numbers
    sent_at: float = -math.inf  # when it got its last frame
    frames_left: int = LAST_FRAMES  # that it gets once nothing changes any more
    exports: deque[_Export] = field(default_factory=deque)
    asks: bool = False  # it has just said that it is there

    @property
    def watching(self) -> bool:
        return self.looking or self.paused

    @property
    def has_room(self) -> bool:
        return len(self.unacknowledged) < MAX_UNACKNOWLEDGED

    def next_seq(self) -> int:
        self.seq += 1
        self.unacknowledged.append(self.seq)
        return self.seq


class Pages:
    """The pages of one dashboard. Times are seconds on a monotonic clock.

    Args:
        forget: Called with the id of each page that is gone.
        unheard: Whether pages may be there that are not heard, because the kernel runs a cell. Where that cannot be, a
            page that went without a word gets no more signs of life, which would keep its kernel from being ended.
    """

    def __init__(self, forget: Callable[[str], None], *, unheard: bool = True) -> None:
        self._forget = forget
        self._unheard_time = BEAT_TIMEOUT if unheard else -math.inf
        self._pages: dict[str, _Page] = {}
        self._frame_at = -math.inf  # when the next frame may go
        self._chunk_at = -math.inf
        self._awaited_until = -math.inf  # until when a page may come that has not been heard
        self._beat_at = -math.inf  # when the last one was sent

    @property
    def known(self) -> list[str]:
        """The ids of the pages that are not forgotten."""
        return list(self._pages)

    # ------------------------------------------------------------ messages from pages

    def on_message(self, message: object, now: float) -> ButtonCommand | None:
        """Take a message from a page. Returns the command, if it is one. A message that makes no sense is ignored."""
        if not isinstance(message, Mapping) or not _is_name(message.get("page")):
            return None
        self._awaited_until = -math.inf
        kind, page = message.get("type"), message["page"]
        if kind == "look":
            self._look(page, message, now)
        elif kind == "ack" and page in self._pages and _is_int(message.get("seq")):
            self._pages[page].heard_at = now
            self._acknowledge(self._pages[page], message["seq"])
        elif kind == "command" and _is_int(message.get("id")):
            self._get_page(page, now)
            try:
                return ButtonCommand(page, message["id"], check_command(message.get("command")))
            except ValueError as error:
                return ButtonCommand(page, message["id"], None, str(error))
        return None

    def _look(self, id: str, message: Mapping[str, Any], now: float) -> None:
        layer, mode = message.get("layer"), message.get("mode")
        looking, fresh = message.get("looking"), message.get("fresh")
        if not _is_int(layer) or mode not in MODES or not isinstance(looking, bool) or not isinstance(fresh, bool):
            return
        page = self._get_page(id, now)
        page.looking, page.paused, page.asks = looking, message.get("paused") is True, True
        if fresh:  # the front end began anew, and forgot what was under way
            page.fresh = True
            page.unacknowledged.clear()
        if fresh or (layer, mode) != (page.layer, page.mode):
            page.frames_left = LAST_FRAMES
        page.layer, page.mode = layer, mode

    @staticmethod
    def _acknowledge(page: _Page, seq: int) -> None:
        while page.unacknowledged and page.unacknowledged[0] <= seq <= page.seq:
            page.unacknowledged.popleft()

    def _get_page(self, id: str, now: float) -> _Page:
        self._prune(now)
        if id not in self._pages and len(self._pages) >= MAX_PAGES:
            self._drop(min(self._pages.values(), key=lambda page: page.heard_at).id)
        page = self._pages.setdefault(id, _Page(id, now, now))
        page.heard_at = now
        return page

    def _prune(self, now: float) -> None:
        for page in list(self._pages.values()):
            if now - page.heard_at > PAGE_TIMEOUT:
                if page.watching:  # gone, or not heard by a busy kernel
                    self._awaited_until = page.heard_at + self._unheard_time
                self._drop(page.id)

    def _drop(self, id: str) -> None:
        del self._pages[id]
        self._forget(id)

    def clear(self) -> None:
        """Forget all pages."""
        for id in list(self._pages):
            self._drop(id)

    def shown(self, now: float) -> None:
        """The dashboard was displayed: a page will come, which may not be heard before the cell has ended."""
        self._awaited_until = now + self._unheard_time
        self._beat_at = now

    # ------------------------------------------------------------ messages to pages

    def turn(self, now: float, over: bool = False) -> FrameDue | Beat | Chunk | None:
        """Returns what is to be sent now, if anything. `over`: see `FrameSource`.

        After a `FrameDue`, call `sent` with the frame, or `missed` if it could not be made.
        """
        self._prune(now)
        if now >= self._frame_at and (pages := self._pages_for_frames(over)):
            page = min(pages, key=lambda page: page.sent_at)
            page.sent_at = page.told_at = now
            page.asks = False
            self._frame_at = now + FRAME_PERIOD
            if over:
                page.frames_left -= 1
            return FrameDue(page.id, page.layer, page.mode, page.fresh)
        if now >= self._next_beat(over):
            self._beat_at = now
            for page in self._pages.values():
                page.told_at, page.asks = now, False
            return Beat()
        if now >= self._chunk_at and (pages := self._pages_for_chunks()):
            self._chunk_at = now + CHUNK_PERIOD
            return self._next_chunk(pages[0])
        return None

    def sent(self, due: FrameDue, header: Header, took: float = 0.0) -> Header:
        """Returns the header of a frame with its page, its number, and whether the page is to acknowledge it.

        An acknowledgement covers the frames before, too. Not every frame asks for one: what a kernel does for each
        message that it receives costs more than the frame.

        Args:
            due: What `turn` returned.
            header: The header from the frame source.
            took: Seconds of computing that the frame took.
        """
        page = self._pages[due.page]
        page.fresh = False
        period = min((took - FREE_FRAME_SECONDS) / FRAME_CORE_SHARE, MAX_FRAME_PERIOD)
        self._frame_at = max(self._frame_at, page.sent_at + period)
        seq = page.next_seq()
        return {**header, "type": "frame", "page": page.id, "seq": seq, "ack": not page.has_room}

    def missed(self, due: FrameDue) -> None:
        """The frame could not be made: the next one has to begin anew."""
        if due.page in self._pages:
            self._pages[due.page].fresh = True

    def wait(self, now: float, over: bool = False) -> float | None:
        """Returns the seconds until something is to be sent, or None if that takes another message from a page."""
        times = []
        if self._pages_for_frames(over):
            times.append(self._frame_at)
        if self._pages_for_chunks():
            times.append(self._chunk_at)
        if (beat := self._next_beat(over)) < math.inf:
            times.append(beat)
        return max(0.0, min(times) - now) if times else None

    def _next_beat(self, over: bool) -> float:
        """Returns when a sign of life is due. Once nothing changes any more, only who has just spoken gets one."""
        waiting = [page.told_at for page in self._pages.values() if page.watching and (page.asks or not over)]
        if over:
            return -math.inf if waiting and not self._pages_for_frames(over) else math.inf
        if self._awaited_until > self._beat_at + BEAT_PERIOD:
            waiting.append(self._beat_at)
        return min(waiting, default=math.inf) + BEAT_PERIOD

    def _pages_for_frames(self, over: bool) -> list[_Page]:
        return [
            page
            for page in self._pages.values()
            if page.looking and page.has_room and (page.frames_left > 0 or not over)
        ]

    def _pages_for_chunks(self) -> list[_Page]:
        return [page for page in self._pages.values() if page.exports and page.has_room]

    # ------------------------------------------------------------ exports

    def send_file(self, page: str, id: int, name: str, mime: str, data: bytes) -> bool:
        """Send a file to a page, in answer to its command `id`. False if the page is gone, or has others to fetch."""
        if page not in self._pages or len(self._pages[page].exports) >= MAX_EXPORTS:
            return False
        self._pages[page].exports.append(_Export(id, name, mime, data))
        return True

    def _next_chunk(self, page: _Page) -> Chunk:
        export = page.exports[0]
        index, export.index = export.index, export.index + 1
        last = export.index == export.total
        if last:
            page.exports.popleft()
        header = {
            "type": "chunk", "page": page.id, "id": export.id, "seq": page.next_seq(), "index": index,
            "total": export.total, "name": export.name, "mime": export.mime,
        }  # fmt: skip
        return Chunk(header, export.data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES], last)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= 64
