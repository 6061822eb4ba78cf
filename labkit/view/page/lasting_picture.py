"""The picture of the dashboard that stays in a notebook, below the widget: what a reader sees where nothing is live.

It is there soon after the dashboard was displayed, and renewed now and then, when the run ends and when the swarm is
closed, so that a notebook has it however its kernel ends. While the widget is live, its style sheet hides the picture.
A third, invisible output hides JupyterLab's complaint about a widget whose kernel is gone.
"""

from __future__ import annotations

import math
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from typing import Any

from labkit.view.scene import Scene

FIRST_AFTER = 10.0  # seconds after the dashboard was displayed
MIN_PERIOD = 45.0  # seconds between two pictures; longer as time goes on, up to
MAX_PERIOD = 300.0  # seconds: drawing takes a third of one
MAX_PLACES = 8  # outputs of cells that get a picture

# JupyterLab writes "model not found" where a widget was, into an element that has nothing but this text.
HIDE_COMPLAINT = """<style>
.jp-OutputArea-child:has(+ .jp-OutputArea-child + .jp-OutputArea-child .labkit-picture) > .jupyter-widgets:not(:has(*)),
.jp-OutputArea-child:has(.labkit-picture) { display: none; }
</style><i class="labkit-picture"></i>"""


class LastingPicture:
    """The places in a notebook for the picture, and when it is drawn.

    `show` is called in one thread, `add_place` in any. `name`: stands for the picture where there is only text.
    `clock`: returns monotonic seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._places: deque[Any] = deque(maxlen=MAX_PLACES)  # handles of outputs
        self._displayed_at = 0.0
        self._due_at = math.inf
        self._drawn: tuple[object, ...] | None = None  # what the picture shows

    def add_place(self) -> None:
        """Display an empty output for the picture, in the cell that runs."""
        from IPython.display import display as untyped_display

        display: Callable[..., Any] = untyped_display
        self._places.append(display({"text/plain": ""}, raw=True, display_id=True))
        display({"text/html": HIDE_COMPLAINT, "text/plain": ""}, raw=True)
        self._displayed_at = self._clock()
        self._due_at = self._displayed_at + FIRST_AFTER
        self._drawn = None

    def show(self, scene: Scene) -> None:
        """Draw the picture if it is due, or if the swarm or its run has ended."""
        now, head = self._clock(), scene.headline
        ended = not scene.open or (not head.running and head.steps > 0)
        state = (scene.open, head.running, head.steps) if ended else (head.steps, head.answered, head.experts_alive)
        if not self._places or state == self._drawn or not (ended or now >= self._due_at):
            return
        from labkit.view.picture.snapshot import draw  # here, since it brings matplotlib

        self._drawn = state
        self._due_at = now + min(max(now - self._displayed_at, MIN_PERIOD), MAX_PERIOD)
        png = b64encode(draw(scene)).decode()
        for place in list(self._places):
            place.update({"image/png": png, "text/plain": self._name}, raw=True)
