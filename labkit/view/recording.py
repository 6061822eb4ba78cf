"""A recording of a run: keyframes, each a whole scene, which are thinned as the run gets longer to bound their memory.

`SwarmView` adds scenes from time to time, and `export` writes the keyframes to files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from labkit.view import export
from labkit.view.page.columns import MOVING, Header, write_opening, write_piece, write_reach, write_servers, write_waits
from labkit.view.scene import Mark, Scene, State

MAX_KEYFRAMES = 240
MAX_RECORDING_BYTES = 32_000_000  # compressed keyframes in memory
MAX_REPLAY_BYTES = 16_000_000  # uncompressed keyframes in one replay
KEYFRAME_SPACING = 1.0  # seconds between keyframes, at first and at least
MAX_SPACING_TO_MEAN = 4.0  # most that the spacing in quiet times may be, as a multiple of the mean spacing
KEPT_EVENTFUL = 50  # eventful keyframes that thinning leaves alone, the last ones


@dataclass(frozen=True, slots=True)
class Keyframe:
    """A moment of the run, compressed."""

    at: float  # seconds since the start
    eventful: bool  # the first one after a mark, or after a server died or came back
    size: int  # bytes when unpacked
    lengths: tuple[int, ...]  # bytes of the header and of each buffer
    packed: bytes

    def unpack(self) -> tuple[Header, list[bytes]]:
        """Returns a frame and its buffers, as `frontend/src/replay.ts` reads them."""
        data, parts, start = zlib.decompress(self.packed), list[bytes](), 0
        for length in self.lengths:
            parts.append(data[start : start + length])
            start += length
        return json.loads(parts[0]), parts[1:]


class Recording:
    """The keyframes of a run, at most one per second. Add scenes from one thread at a time; any thread may export.

    When there are more than `max_keyframes`, or they take more than `max_bytes`, every other one is dropped and the
    spacing doubles. The first keyframe, the last one and the last `KEPT_EVENTFUL` eventful ones are kept, unless these
    alone are too many.
    """

    def __init__(self, max_keyframes: int = MAX_KEYFRAMES, max_bytes: int = MAX_RECORDING_BYTES) -> None:
        self._max_keyframes, self._max_bytes = max_keyframes, max_bytes
        self._keyframes: tuple[Keyframe, ...] = ()
        self._spacing = KEYFRAME_SPACING
        self._marks: frozenset[Mark] = frozenset()
        self._dead: frozenset[int] = frozenset()
        self._eventful = False  # something has happened since the last keyframe

    @property
    def keyframes(self) -> Sequence[Keyframe]:
        """The keyframes, in order of time."""
        return self._keyframes

    @property
    def spacing(self) -> float:
        """Seconds between keyframes at present, while nothing happens."""
        return self._spacing

    def add(self, scene: Scene) -> None:
        """Keep this scene as a keyframe, if one is due."""
        marks, dead = frozenset(scene.marks), frozenset(np.flatnonzero(scene.servers.state == State.DEAD).tolist())
        if marks - self._marks or dead != self._dead:
            self._eventful = True
        self._marks, self._dead = marks, dead
        if self._keyframes:
            passed = scene.at - self._keyframes[-1].at
            if passed < KEYFRAME_SPACING or (passed < self._spacing and not self._eventful):
                return
        kept = (*self._keyframes, take_keyframe(scene, self._eventful))
        self._eventful = False
        self._keyframes, thinnings = _fit(kept, self._max_keyframes, self._max_bytes, lambda key: len(key.packed))
        average = scene.at / len(self._keyframes)  # over the whole run, with the spacing of eventful times
        self._spacing = min(self._spacing * 2**thinnings, max(KEYFRAME_SPACING, MAX_SPACING_TO_MEAN * average))

    def to_json(self, scene: Scene) -> bytes:
        """Export the numbers and series of the last scene as JSON for pandas: see `export.to_json`."""
        return export.to_json(scene)

    def to_html(self, scene: Scene) -> bytes:
        """Export an HTML page that replays the run until the last scene: see `export.to_html`."""
        keyframes = self._keyframes
        if not keyframes or scene.at > keyframes[-1].at:
            keyframes = (*keyframes, take_keyframe(scene, False))
        keyframes, _ = _fit(keyframes, len(keyframes), MAX_REPLAY_BYTES, lambda key: key.size)
        return export.to_html(scene, (key.unpack() for key in keyframes))


def take_keyframe(scene: Scene, eventful: bool) -> Keyframe:
    """Pack all of a scene that changes, except for series and marks: the last scene has all of those."""
    header, buffers = write_opening(scene, reset=False, control=False), list[bytes]()
    header["server_text"] = {"start": 0, "rows": write_servers(scene.servers)}
    header["waits"], header["reach"] = write_waits(scene), write_reach(scene)
    for column in MOVING:
        values = column.read(scene)
        header["pieces"].append(write_piece(column, values, 0, len(values), buffers))
    parts = [json.dumps(header).encode(), *buffers]
    data = b"".join(parts)
    return Keyframe(scene.at, eventful, len(data), tuple(map(len, parts)), zlib.compress(data, level=1))


def _fit(
    keyframes: tuple[Keyframe, ...], max_count: int, max_bytes: int, size: Callable[[Keyframe], int]
) -> tuple[tuple[Keyframe, ...], int]:
    """Thin the keyframes until they are within the limits. Returns those kept, and how many thinnings it took."""
    eventful, thinnings = min(KEPT_EVENTFUL, max_count // 2), 0
    while len(keyframes) > max_count or sum(map(size, keyframes)) > max_bytes:
        thinned = _thin(keyframes, eventful)
        if len(thinned) < len(keyframes):
            keyframes, thinnings = thinned, thinnings + 1
        elif eventful:
            eventful //= 2  # the eventful ones alone are too many
        else:
            return keyframes[-1:], thinnings
    return keyframes, thinnings


def _thin(keyframes: tuple[Keyframe, ...], eventful: int) -> tuple[Keyframe, ...]:
    """Drop every other keyframe, except for the first, the last and the last `eventful` eventful ones."""
    happened = [number for number, key in enumerate(keyframes) if key.eventful]
    kept = {0, len(keyframes) - 1, *happened[max(len(happened) - eventful, 0) :]}
    others = [number for number in range(len(keyframes)) if number not in kept]
    kept.update(others[1::2])
    return tuple(keyframes[number] for number in sorted(kept))
