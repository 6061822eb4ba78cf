"""The view of a swarm: what samples it while somebody looks, and what carries out the orders of a dashboard's buttons.

Events → `Telemetry` → `Sampler` → `Scene` → here → the outputs: dashboards, the recording, loggers. One thread a swarm
does that, and only while there is an output; for as long, a task in the lab thread polls the directory and the servers.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from labkit.errors import SwarmClosed
from labkit.events import Emit
from labkit.launch.handle import Lab
from labkit.training.run import latest_run
from labkit.view.collect.inventory import Inventory, keep_polled, local_servers
from labkit.view.collect.sampler import Sampler
from labkit.view.outputs import Output, Outputs, Show
from labkit.view.page.commands import carry_out, check_order
from labkit.view.recording import Recording
from labkit.view.scene import Scene
from labkit.view.summary import SwarmSummary
from labkit.view.worker_thread import WorkerThread

if TYPE_CHECKING:
    from labkit.swarm import Swarm
    from labkit.view.log.swarm_logging import Logging
    from labkit.view.page.dashboard import Dashboard
    from labkit.view.picture.snapshot import Picture

logger = logging.getLogger(__name__)

RECORDING_PERIOD = 1.0  # seconds, or longer where it takes long, as long as marks and calls in flight are not missed:
LONGEST_RECORDING_PERIOD = 2.4
MARK_PATIENCE = 3.0  # seconds between two looks after which it is not known when something happened
FRESH = 0.1  # seconds for which a scene is not made anew
LATE = 0.8  # seconds after which it is not recorded any more, either
LOOK = 3.0  # seconds for which a page looks that was shown something
POLL_PATIENCE = 2.0  # seconds that new outputs wait for the servers to report
CLOSE_TIMEOUT = 1.0  # seconds that outputs have for the last scene
MARKS = {"running": "back", "starting": "restarting"}  # what is said of a server's state, where it is not that

_dashboards: dict[str, Dashboard] = {}  # by the name of their swarm


class SwarmView:
    """The view of one swarm, `swarm.view`. Its methods may be called from any thread but the lab thread.

    `in_flight`: how many calls to experts are under way.
    """

    def __init__(self, swarm: Swarm, lab: Lab, in_flight: Callable[[], int]) -> None:
        self.name = swarm.name
        self.recording = Recording()
        self._swarm = swarm
        self._lab = lab
        self._inventory = Inventory()
        self._sampler = Sampler(
            swarm.telemetry, self._inventory_now, in_flight, partial(latest_run, swarm.name), swarm.name
        )
        self._worker = WorkerThread(f"labkit-view-{swarm.name}", self._step)
        recording = Output(self.recording.add, RECORDING_PERIOD, -math.inf, longest=LONGEST_RECORDING_PERIOD)
        self._outputs = Outputs(recording, swarm.name)
        self._looked_at = -math.inf  # when a page was last shown something, monotonic
        self._polling: trio.CancelScope | None = None
        self._polling_since = 0.0
        self._scene: Scene | None = None
        self._sampled = -math.inf  # when, monotonic
        self._states: dict[int, str] = {}  # of the servers started here, when they were last looked at
        self._over = False
        self._sampling = threading.Lock()  # of the sampler and the last scene
        self._ordering = threading.Lock()  # orders are carried out one at a time

    # ------------------------------------------------------------ looking

    @property
    def over(self) -> bool:
        """Whether the swarm is closed, or about to be: the last scene stays."""
        return self._over

    def scene(self) -> Scene:
        """The swarm as it looks now, or looked a tenth of a second ago. Cheap; asks nobody."""
        with self._sampling:
            now = time.monotonic()
            if self._scene is None or (not self._over and now >= self._sampled + FRESH):
                self._mark_changes(known=now < self._sampled + MARK_PATIENCE)
                self._scene = self._sampler.scene(open=not self._over)
                self._sampled = now
            return self._scene

    def _late_scene(self) -> Scene:
        """For the recording: the last one, if it is not too old, so that one beside a page costs nothing."""
        with self._sampling:
            late = self._scene if time.monotonic() < self._sampled + LATE else None
        return late or self.scene()

    def scene_for_a_page(self) -> Scene:
        """The same, and somebody looks at it."""
        self._looked_at = time.monotonic()
        return self.scene()

    def _inventory_now(self) -> Inventory:
        """The last inventory, in which the servers started here are as they are now: a kill is seen at once."""
        inventory, locals = self._inventory, local_servers(self._swarm.servers)
        return inventory if locals == inventory.locals else replace(inventory, locals=locals)

    def _mark_changes(self, known: bool) -> None:
        """Mark which servers started here have ended, restart, or are back, since the last look, if that was not long
        ago."""
        for number, server in enumerate(list(self._swarm.servers)):
            before, now = self._states.get(number), server.state
            if now != before and (now != "starting" or before == "running"):
                self._states[number] = now
                if known and before is not None:
                    self._swarm.telemetry.mark(f"servers[{number}] {MARKS.get(now, now)}")

    def look(self) -> Scene:
        """The same, but if nobody has been looking, the servers are asked first; that takes a second or so."""
        if not self._over and not self._outputs:
            looked = threading.Event()
            remove = self.add(lambda scene: looked.set(), RECORDING_PERIOD)
            try:
                looked.wait(2 * POLL_PATIENCE)
            finally:
                remove()
        return self.scene()

    def snapshot(self) -> bytes:
        """The dashboard as it looks now, drawn as a PNG."""
        from labkit.view.picture.snapshot import draw  # here, since it brings matplotlib

        return draw(self.look())

    def picture(self, path: str | Path | None = None) -> Picture:
        """See `Swarm.snapshot`."""
        from labkit.view.picture.snapshot import Picture

        picture = Picture(self.snapshot())
        if path is not None:
            picture.save(path)
        return picture

    def dashboard(self) -> Dashboard:
        """See `Swarm.dashboard`."""
        known = _dashboards.get(self.name)
        if known is not None and known.view is not self:
            known.close()  # of an earlier swarm of this name, which is closed too: a cell was run again
        if known is None or known.ended:
            from labkit.view.page.dashboard import Dashboard  # here, since it brings widgets
            from labkit.view.page.local_source import LocalSource

            known = _dashboards[self.name] = Dashboard(LocalSource(self), self)
        return known

    def log_to(self, logger: Any, period: float) -> Logging:
        """See `Swarm.log_to`."""
        from labkit.view.log.swarm_logging import Logging

        return Logging(self, logger, period)

    def summary(self) -> SwarmSummary:
        """See `Swarm.summary`."""
        return self._swarm.summary()

    def on_event(self, listener: Emit) -> Callable[[], None]:
        """See `Swarm.on_event`."""
        return self._swarm.on_event(listener)

    # ------------------------------------------------------------ outputs

    def add(self, show: Show, period: float, *, looks: bool = True) -> Callable[[], None]:
        """Give `show` a scene now and every `period` seconds, in the view's thread. Returns what ends that.

        One that raises is logged and removed. When the swarm is closed, it gets a last scene, which is not `open`.
        `looks`: whether somebody is to see it; without any such, more than two servers are polled more rarely.
        """
        output = Output(show, period, time.monotonic(), looks)
        if not self._outputs.add(output):
            return lambda: None
        self._worker.wake()
        return lambda: self._remove(output)

    def _remove(self, output: Output) -> None:
        if self._outputs.remove(output):
            self._worker.wake()  # for its thread to end, if that was the last one

    def _step(self) -> float | None:
        """One turn of the view's thread: a scene for those whose time has come."""
        if self._over:
            self._outputs.show_last(self.scene)
            return None
        if not self._outputs:
            self._stop_polling()
            return None
        if self._polling is None:
            self._start_polling()
        if not self._has_polled():
            return POLL_PATIENCE
        return self._outputs.show(self.scene, self._late_scene, time.monotonic)

    # ------------------------------------------------------------ polling

    def _start_polling(self) -> None:
        self._polling = scope = trio.CancelScope()
        self._polling_since = time.monotonic()
        try:
            self._lab.portal.call(self._begin_polling, scope)
        except SwarmClosed:
            pass  # it is being closed, and there is nothing to poll

    def _stop_polling(self) -> None:
        scope, self._polling = self._polling, None
        if scope is not None:
            try:
                self._lab.portal.call(self._end_polling, scope)
            except SwarmClosed:
                pass  # and so the task is gone

    async def _begin_polling(self, scope: trio.CancelScope) -> None:
        self._lab.nursery.start_soon(self._poll, scope)

    async def _end_polling(self, scope: trio.CancelScope) -> None:
        scope.cancel()

    async def _poll(self, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await keep_polled(self._lab.node, self._swarm.servers, self._publish, seen=self._is_seen)
        except Exception:  # the view goes blind, but the swarm lives
            logger.exception("the swarm %r is not polled any more", self.name)

    def _is_seen(self) -> bool:
        return time.monotonic() < self._looked_at + LOOK or self._outputs.seen

    def _publish(self, inventory: Inventory) -> None:
        first = not self._has_polled()
        self._inventory = inventory
        if first:
            self._worker.wake()

    def _has_polled(self) -> bool:
        since = self._polling_since
        return self._inventory.polled_at >= since or time.monotonic() >= since + POLL_PATIENCE

    # ------------------------------------------------------------ orders

    def order(self, order: Mapping[str, Any]) -> str:
        """Do what a button says: kill, stop, restart, faults, stop_run (see `check_order`). Returns a sentence.

        Blocks until it is done, or begun if it takes long; one at a time. Raises `ValueError`, `LabkitError`.
        """
        wanted = check_order(order)
        with self._ordering:
            if self._over:
                raise SwarmClosed(f"the swarm {self.name!r} is closed")
            return carry_out(self._swarm, wanted)

    # ------------------------------------------------------------ ending

    def end(self) -> None:
        """Make the last scene, from the swarm as it is, and begin to hand it out. Does not wait."""
        if not self._outputs.end():
            return
        self._over = True
        with self._sampling:
            try:
                self._scene = self._sampler.scene(open=False)
            except Exception:
                logger.exception("the last scene of the swarm %r could not be made", self.name)
                if self._scene is not None:
                    self._scene = replace(self._scene, open=False)
        if self._worker.beating:
            self._worker.wake()

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """`end`, and wait until outputs have had their last scene: `timeout` or a second. False if one is not done."""
        self.end()
        return self._worker.wait_for_end(min(timeout, CLOSE_TIMEOUT))
