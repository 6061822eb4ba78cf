"""What a dashboard shows of a swarm of this process: frames for its pages, and files. Made from scenes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from labkit.view.page.frame_writer import FrameWriter
from labkit.view.page.pages import Header

if TYPE_CHECKING:
    from labkit.view.swarm_view import SwarmView

MIMES = {"png": "image/png", "html": "text/html", "json": "application/json"}


class LocalSource:
    """What a dashboard shows of a swarm of this process; a `FrameSource`. Any thread may call it, one at a time."""

    def __init__(self, view: SwarmView) -> None:
        self.name = view.name
        self._view = view
        self._writers: dict[str, FrameWriter] = {}

    @property
    def over(self) -> bool:
        """Whether the swarm is closed."""
        return self._view.over

    def frame(self, page: str, *, layer: int, mode: str, fresh: bool) -> tuple[Header, list[bytes]]:
        """The next frame for a page."""
        if fresh or page not in self._writers:
            self._writers[page] = FrameWriter()
        scene = self._view.scene_for_a_page()
        layer = min(layer, max(0, len(scene.layers) - 1))
        return self._writers[page].frame(scene, layer=layer, mode=mode, control=scene.open)

    def forget(self, page: str) -> None:
        """A page is gone."""
        self._writers.pop(page, None)

    def order(self, order: Mapping[str, Any]) -> str:
        """See `SwarmView.order`."""
        return self._view.order(order)

    def export(self, format: str) -> tuple[str, str, bytes]:
        """The dashboard as a file: its name, MIME type and bytes."""
        name = re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "swarm"
        return f"labkit-{name}.{format}", MIMES[format], export(self._view, format)


def export(view: SwarmView, format: str) -> bytes:
    """The dashboard as the bytes of a file. `format`: png, or html or json of all that was recorded."""
    if format == "png":
        return view.snapshot()
    scene = view.look()
    return view.recording.to_html(scene) if format == "html" else view.recording.to_json(scene)
