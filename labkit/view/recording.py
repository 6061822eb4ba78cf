"""A run, remembered as moments: whole scenes, thinned as it gets long, so that memory is bounded.

`SwarmView` adds a scene now and then; `export` writes files of what is kept here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from labkit.view import export
from labkit.view.page.columns import MOVING, Header, write_opening, write_piece, write_servers
from labkit.view.scene import Mark, Scene, State

MAX_KEYFRAMES = 240
MAX_BYTES = 32_000_000  # compressed, in memory
MAX_REPLAY_BYTES = 16_000_000  # of the keyframes of one replay, not compressed
SPACING = 1.0  # seconds between keyframes, at first
RAREST = 4.0  # the spacing in quiet times, by the average one, where much has happened before
EVENTFUL = 50  # keyframes after a mark, or a server's death or return, that thinning leaves alone


@dataclass(frozen=True, slots=True)
class Keyframe:
    """A moment, compressed. `eventful`: the first after a mark, or after a server died or came back."""

    at: float  # seconds since the start
    eventful: bool
    size: int  # bytes when it is unpacked
    lengths: tuple[int, ...]  # bytes of the header, and of each buffer
    packed: bytes

    def unpack(self) -> tuple[Header, list[bytes]]:
        """A frame and its buffers, which `frontend/src/replay.ts` shows."""
        data, parts, start = zlib.decompress(self.packed), list[bytes](), 0
        for length in self.lengths:
            parts.append(data[start : start + length])
            start += length
        return json.loads(parts[0]), parts[1:]


class Recording:
    """Keyframes of a run, at most one a second. Scenes come from one thread at a time; exports may be made in others.

    When there are more than `max_keyframes`, or they take more than `max_bytes`, every other one is dropped and the
    spacing doubles. The first, the last and the last `EVENTFUL` eventful ones stay, unless they alone are too many.
    """

    def __init__(self, max_keyframes: int = MAX_KEYFRAMES, max_bytes: int = MAX_BYTES) -> None:
        self._max_keyframes, self._max_bytes = max_keyframes, max_bytes
        self._keyframes: tuple[Keyframe, ...] = ()
        self._spacing = SPACING
        self._marks: frozenset[Mark] = frozenset()
        self._dead: frozenset[int] = frozenset()
        self._eventful = False  # something has happened since the last keyframe

    @property
    def keyframes(self) -> Sequence[Keyframe]:
        """In the order of time."""
        return self._keyframes

    @property
    def spacing(self) -> float:
        """Seconds between keyframes, now, while nothing happens."""
        return self._spacing

    def add(self, scene: Scene) -> None:
        """Keep this moment, if it is due."""
        marks, dead = frozenset(scene.marks), frozenset(np.flatnonzero(scene.servers.state == State.DEAD).tolist())
        if marks - self._marks or dead != self._dead:
            self._eventful = True
        self._marks, self._dead = marks, dead
        if self._keyframes:
            passed = scene.at - self._keyframes[-1].at
            if passed < SPACING or (passed < self._spacing and not self._eventful):
                return
        kept = (*self._keyframes, take(scene, self._eventful))
        self._eventful = False
        self._keyframes, thinnings = _fit(kept, self._max_keyframes, self._max_bytes, lambda key: len(key.packed))
        average = scene.at / len(self._keyframes)  # thinned for what happened, too
        self._spacing = min(self._spacing * 2**thinnings, max(SPACING, RAREST * average))

    def to_json(self, scene: Scene) -> bytes:
        """The numbers of `scene`, the last one, and its whole series, for pandas: see `export.to_json`."""
        return export.to_json(scene)

    def to_html(self, scene: Scene) -> bytes:
        """One HTML file that replays the run until `scene`, the last one: see `export.to_html`."""
        keyframes = self._keyframes
        if not keyframes or scene.at > keyframes[-1].at:
            keyframes = (*keyframes, take(scene, False))
        keyframes, _ = _fit(keyframes, len(keyframes), MAX_REPLAY_BYTES, lambda key: key.size)
        return export.to_html(scene, (key.unpack() for key in keyframes))


def take(scene: Scene, eventful: bool) -> Keyframe:
    """Everything of a scene that changes, but for the series and the marks: the last scene has all of those."""
    header, buffers = write_opening(scene, reset=False, control=False), list[bytes]()
    header["server_text"] = {"start": 0, "rows": write_servers(scene.servers)}
    for column in MOVING:
        values = column.read(scene)
        header["pieces"].append(write_piece(column, values, 0, len(values), buffers))
    parts = [json.dumps(header).encode(), *buffers]
    data = b"".join(parts)
    return Keyframe(scene.at, eventful, len(data), tuple(map(len, parts)), zlib.compress(data, level=1))


def _fit(
    keyframes: tuple[Keyframe, ...], most: int, most_bytes: int, size: Callable[[Keyframe], int]
) -> tuple[tuple[Keyframe, ...], int]:
    """No more keyframes than allowed, and how often they were thinned for that."""
    eventful, thinnings = min(EVENTFUL, most // 2), 0
    while len(keyframes) > most or sum(map(size, keyframes)) > most_bytes:
        thinned = _thin(keyframes, eventful)
        if len(thinned) < len(keyframes):
            keyframes, thinnings = thinned, thinnings + 1
        elif eventful:
            eventful //= 2  # they alone are too many
        else:
            return keyframes[-1:], thinnings
    return keyframes, thinnings


def _thin(keyframes: tuple[Keyframe, ...], eventful: int) -> tuple[Keyframe, ...]:
    """Every other one; the first, the last, and the last so many eventful ones stay."""
    happened = [number for number, key in enumerate(keyframes) if key.eventful]
    stay = {0, len(keyframes) - 1, *happened[max(len(happened) - eventful, 0) :]}
    others = [number for number in range(len(keyframes)) if number not in stay]
    stay.update(others[1::2])
    return tuple(keyframes[number] for number in sorted(stay))
