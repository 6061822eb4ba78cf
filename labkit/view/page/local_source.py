"""What a dashboard shows of a swarm of this process: frames for its pages, and files. Both are made from scenes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from labkit.view.outputs import Show
from labkit.view.page.frame_writer import FrameWriter
from labkit.view.page.pages import Header
from labkit.view.scene import ALL_LAYERS, Scene
from labkit.view.summary import SwarmSummary

MIME_TYPES = {"png": "image/png", "html": "text/html", "json": "application/json"}


class DashboardView(Protocol):
    """What dashboards need of the view of a swarm. See `SwarmView`, which is one."""

    @property
    def name(self) -> str: ...
    @property
    def over(self) -> bool: ...
    def scene(self) -> Scene: ...
    def scene_for_page(self) -> Scene: ...
    def summary(self) -> SwarmSummary: ...
    def add(self, show: Show, period: float, *, watched: bool = True) -> Callable[[], None]: ...
    def execute(self, command: Mapping[str, Any]) -> str: ...
    def export(self, format: str) -> bytes: ...


class LocalSource:
    """What a dashboard shows of a swarm of this process; a `FrameSource`. Any thread may call it, one at a time."""

    def __init__(self, view: DashboardView) -> None:
        self.name = view.name
        self._view = view
        self._writers: dict[str, FrameWriter] = {}  # page -> what it has been sent

    @property
    def over(self) -> bool:
        """Whether the swarm is closed."""
        return self._view.over

    def frame(self, page: str, *, layer: int, mode: str, fresh: bool) -> tuple[Header, list[bytes]]:
        """Returns the next frame for a page, as `FrameSource.frame` does."""
        if fresh or page not in self._writers:
            self._writers[page] = FrameWriter()
        scene = self._view.scene_for_page()
        layer = layer if layer == ALL_LAYERS else min(layer, max(0, len(scene.layers) - 1))
        return self._writers[page].frame(scene, layer=layer, mode=mode, control=scene.open)

    def forget(self, page: str) -> None:
        """Drop what is kept for a page that is gone."""
        self._writers.pop(page, None)

    def execute(self, command: Mapping[str, Any]) -> str:
        """Execute a button's command, as `SwarmView.execute` does."""
        return self._view.execute(command)

    def export(self, format: str) -> tuple[str, str, bytes]:
        """Returns the dashboard as a file (png, html or json): its name, MIME type and bytes."""
        name = re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "swarm"
        return f"labkit-{name}.{format}", MIME_TYPES[format], self._view.export(format)
