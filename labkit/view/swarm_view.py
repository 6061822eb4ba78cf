"""The view of a swarm: it samples the swarm while something shows it, and executes the commands of dashboards.

From events to outputs: `Telemetry` and the `Inventory` of what was found → `Sampler` → `Scene` → here → the outputs:
dashboards, the recording, loggers. One thread a swarm does that, and only while there is an output; as long as it does,
a task in the lab thread polls the directory and the servers.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from labkit.contact import Contact
from labkit.errors import RPCError, SwarmClosed
from labkit.events import Emit, Listeners
from labkit.faults import Faults
from labkit.launch.handle import ServerHandle
from labkit.launch.lab import Lab
from labkit.training.run import latest_run
from labkit.view.collect.inventory import Inventory, keep_polled, local_servers, reachability_lines
from labkit.view.collect.sampler import Sampler
from labkit.view.collect.takeovers import ReportedTakeOvers
from labkit.view.collect.telemetry import Telemetry
from labkit.view.outputs import Output, Outputs, Show
from labkit.view.page.commands import CommandExecutor, check_command
from labkit.view.recording import Recording
from labkit.view.scene import Scene
from labkit.view.summary import Census, SwarmSummary, summarize, take_census
from labkit.view.worker_thread import WorkerThread
from labkit.wire.rpc_types import BULK, Reply

if TYPE_CHECKING:
    from labkit.view.log.swarm_logging import Logging
    from labkit.view.page.dashboard import Dashboard
    from labkit.view.page.remote_source import RemoteSource
    from labkit.view.picture.snapshot import Picture

logger = logging.getLogger(__name__)

RECORDING_PERIOD = 1.0  # seconds, or longer where a scene takes long, as long as no mark and no call is missed:
MAX_RECORDING_PERIOD = 2.4  # seconds
MARK_WINDOW = 3.0  # seconds between two looks at the servers, within which a change is marked: it happened just now
SCENE_MAX_AGE = 0.1  # seconds for which a scene is not made anew
RECORDED_SCENE_MAX_AGE = 0.8  # seconds for which the recording takes a scene that was made for something else
PAGE_LOOK_TIME = 3.0  # seconds for which a page is watched after it was shown something
FIRST_POLL_TIMEOUT = 2.0  # seconds that new outputs wait for the servers to report
LAST_SCENE_TIMEOUT = 1.0  # seconds that outputs have for the last scene
MARK_WORDS = {"running": "back", "starting": "restarting"}  # the words of a mark, where they differ from the state

_dashboards: dict[str, Dashboard] = {}  # by the name of their swarm


class SwarmView:
    """The view of one swarm, `swarm.view`. Its methods may be called from any thread but the lab thread.

    Args:
        name: The swarm's name.
        lab: Its lab thread, with our node in the swarm.
        servers: The servers started here, as in `swarm.servers`; the list may grow.
        telemetry: Counts the calls that are made here.
        listeners: Get the events of this process.
        in_flight: Returns how many calls to experts are under way.
        inject_faults: Sets latency and loss of all servers, as `Swarm.faults` does.
    """

    def __init__(
        self,
        name: str,
        lab: Lab,
        servers: Sequence[ServerHandle],
        telemetry: Telemetry,
        listeners: Listeners,
        *,
        in_flight: Callable[[], int],
        inject_faults: Callable[[float | None, float | None], Faults],
    ) -> None:
        self.name = name
        self._lab = lab
        self._servers = servers
        self._telemetry = telemetry
        self._listeners = listeners
        self._inventory = Inventory()
        self._sampler = Sampler(telemetry, self._inventory_now, in_flight, partial(latest_run, name), name)
        self._worker = WorkerThread(f"labkit-view-{name}", self._step)
        self._takeovers = ReportedTakeOvers(listeners, telemetry.started)
        listeners.add(self._takeovers.hear)
        self._recording = Recording()
        self._outputs = Outputs(
            Output(self._recording.add, RECORDING_PERIOD, -math.inf, max_period=MAX_RECORDING_PERIOD), name
        )
        self._looked_at = -math.inf  # when a page was last shown something, monotonic
        self._polling: trio.CancelScope | None = None
        self._polling_since = 0.0
        self._scene: Scene | None = None
        self._sampled_at = -math.inf  # monotonic
        self._states: dict[int, str] = {}  # of the servers started here, when they were last looked at
        self._over = False
        self._sampling = threading.Lock()  # of the sampler and the last scene
        self._commands = CommandExecutor(name, servers, telemetry, inject_faults)
        self._command_lock = threading.Lock()  # commands are executed one at a time

    # ------------------------------------------------------------ looking

    @property
    def over(self) -> bool:
        """Whether the swarm is closed or closing: then the last scene stays."""
        return self._over

    def scene(self) -> Scene:
        """Returns the swarm as it looks now, or looked a tenth of a second ago. Cheap; asks no other node."""
        self._lab.portal.check_process()
        with self._sampling:
            now = time.monotonic()
            if self._scene is None or (not self._over and now >= self._sampled_at + SCENE_MAX_AGE):
                self._mark_changes(known=now < self._sampled_at + MARK_WINDOW)
                self._scene = self._sampler.scene(open=not self._over)
                self._sampled_at = now
            return self._scene

    def _late_scene(self) -> Scene:
        """Returns the last scene if it is not too old, so that recording beside a page costs nothing."""
        with self._sampling:
            late = self._scene if time.monotonic() < self._sampled_at + RECORDED_SCENE_MAX_AGE else None
        return late or self.scene()

    def scene_for_page(self) -> Scene:
        """`scene`, for a page that someone looks at."""
        self._looked_at = time.monotonic()
        return self.scene()

    def _inventory_now(self) -> Inventory:
        """Returns the last inventory with the servers started here as they are now, so that a kill is seen at once."""
        inventory, locals = self._inventory, local_servers(self._servers)
        reachability = reachability_lines(self._lab.node, self._servers)
        if (locals, reachability) == (inventory.locals, inventory.reachability):
            return inventory
        return replace(inventory, locals=locals, reachability=reachability)

    def _mark_changes(self, known: bool) -> None:
        """Mark the servers started here that have ended, restart, or are back since the last look.

        `known`: whether that was a short while ago; else it is not known when they changed, and there is no mark.
        """
        for number, server in enumerate(list(self._servers)):
            before, now = self._states.get(number), server.state
            if now != before and (now != "starting" or before == "running"):
                self._states[number] = now
                if known and before is not None:
                    self._telemetry.mark(f"servers[{number}] {MARK_WORDS.get(now, now)}")

    def polled_scene(self) -> Scene:
        """`scene`, but while there is no output the servers are asked first, which takes a second or so."""
        self._lab.portal.check_process()
        if not self._over and not self._outputs:
            shown = threading.Event()
            remove = self.add(lambda scene: shown.set(), RECORDING_PERIOD)
            try:
                shown.wait(2 * FIRST_POLL_TIMEOUT)
            finally:
                remove()
        return self.scene()

    def export(self, format: str) -> bytes:
        """Returns the bytes of a file: a png of the dashboard as it looks now, or html or json of the recording."""
        scene = self.polled_scene()
        if format == "png":
            from labkit.view.picture.snapshot import draw  # here, since it brings matplotlib

            return draw(scene)
        return self._recording.to_html(scene) if format == "html" else self._recording.to_json(scene)

    def picture(self, path: str | Path | None = None) -> Picture:
        """The implementation of `Swarm.snapshot`."""
        from labkit.view.picture.snapshot import Picture

        picture = Picture(self.export("png"))
        if path is not None:
            picture.save(path)
        return picture

    def dashboard(self) -> Dashboard:
        """The implementation of `Swarm.dashboard`."""
        self._lab.portal.check_process()
        known = _dashboards.get(self.name)
        if known is not None and known.view is not self:
            known.close()  # it shows an earlier swarm of this name, closed when the cell was run again
        if known is None or known.ended:
            from labkit.view.page.dashboard import Dashboard  # here, since it brings widgets
            from labkit.view.page.local_source import LocalSource

            known = _dashboards[self.name] = Dashboard(LocalSource(self), self)
        return known

    def log_to(self, logger: Any, period: float) -> Logging:
        """The implementation of `Swarm.log_to`."""
        from labkit.view.log.swarm_logging import Logging

        return Logging(self, logger, period)

    def remote_source(self, contact: Contact, secret: str | None = None) -> RemoteSource:
        """Returns what a dashboard shows of the swarm of another node, which our own node asks.

        Args:
            contact: The other node.
            secret: The control secret of its swarm; without it the dashboard has no buttons.
        """
        from labkit.view.page.remote_source import RemoteSource

        def call(method: str, body: Any, *, returns: Any, timeout: float) -> Reply:
            ask = partial(self._lab.node.client.call, returns=returns, timeout=timeout, lane=BULK)
            reply: Reply = self._lab.portal.call(ask, contact, method, body)
            return reply

        return RemoteSource(contact.endpoint, call, self, secret, closed=lambda: self._lab.portal.closed)

    def summary(self) -> SwarmSummary:
        """The implementation of `Swarm.summary`."""
        census: Census | None = None
        try:
            census = self._lab.portal.call(take_census, self._lab.node, self._servers)
        except (SwarmClosed, RPCError):
            pass
        return summarize(self.name, self._lab.node, self._servers, census, self._telemetry)

    def on_event(self, listener: Emit) -> Callable[[], None]:
        """The implementation of `Swarm.on_event`."""
        return self._listeners.add(listener)

    # ------------------------------------------------------------ outputs

    def add(self, show: Show, period: float, *, watched: bool = True) -> Callable[[], None]:
        """Show scenes of the swarm from now on.

        Args:
            show: Called with a scene at once and every `period` seconds, in the view's thread. If it raises, that is
                logged and it is removed. When the swarm is closed, it gets a last scene, which is not `open`.
            period: Seconds between two scenes.
            watched: Whether someone sees what it shows; with no such output, large swarms are polled more rarely.

        Returns:
            A function that ends it.
        """
        self._lab.portal.check_process()
        output = Output(show, period, time.monotonic(), watched)
        if not self._outputs.add(output):
            return lambda: None
        self._worker.wake()
        return lambda: self._remove(output)

    def _remove(self, output: Output) -> None:
        if not self._lab.portal.forked and self._outputs.remove(output):
            self._worker.wake()  # so that its thread ends, if that was the last one

    def _step(self) -> float | None:
        """One step of the view's thread: a scene for each output that is due."""
        if self._over:
            self._outputs.show_last(self.scene)
            return None
        if not self._outputs:
            self._stop_polling()
            return None
        if self._polling is None:
            self._start_polling()
        if not self._has_polled():
            return FIRST_POLL_TIMEOUT
        return self._outputs.show(self.scene, self._late_scene, time.monotonic)

    # ------------------------------------------------------------ polling

    def _start_polling(self) -> None:
        self._polling = scope = trio.CancelScope()
        self._polling_since = time.monotonic()
        try:
            self._lab.portal.call(self._begin_polling, scope)
        except SwarmClosed:
            pass  # there is nothing to poll any more

    def _stop_polling(self) -> None:
        scope, self._polling = self._polling, None
        if scope is not None:
            try:
                self._lab.portal.call(self._end_polling, scope)
            except SwarmClosed:
                pass  # the task has ended with the lab thread

    async def _begin_polling(self, scope: trio.CancelScope) -> None:
        self._lab.nursery.start_soon(self._poll, scope)

    async def _end_polling(self, scope: trio.CancelScope) -> None:
        scope.cancel()

    async def _poll(self, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await keep_polled(
                    self._lab.node, self._servers, self._publish, watched=self._is_watched, takeovers=self._takeovers
                )
        except Exception:  # the view goes blind, but the swarm must live on
            logger.exception("the swarm %r is not polled any more", self.name)

    def _is_watched(self) -> bool:
        return time.monotonic() < self._looked_at + PAGE_LOOK_TIME or self._outputs.watched

    def _publish(self, inventory: Inventory) -> None:
        first = not self._has_polled()
        self._inventory = inventory
        if first:
            self._worker.wake()

    def _has_polled(self) -> bool:
        since = self._polling_since
        return self._inventory.polled_at >= since or time.monotonic() >= since + FIRST_POLL_TIMEOUT

    # ------------------------------------------------------------ commands

    def execute(self, command: Mapping[str, Any]) -> str:
        """Execute the command of a button: kill, stop, restart, faults or stop_run (see `check_command`).

        Blocks until it is done, or begun if it takes long. Commands are executed one at a time.

        Returns:
            A sentence that says what was done.

        Raises:
            ValueError: There is no such command, or it cannot be executed now.
            LabkitError: It failed, or the swarm is closed.
        """
        checked = check_command(command)
        self._lab.portal.check_process()
        with self._command_lock:
            if self._over:
                raise SwarmClosed(f"the swarm {self.name!r} is closed")
            return self._commands.execute(checked)

    # ------------------------------------------------------------ ending

    def end(self) -> None:
        """Make the last scene, of the swarm as it is now, and begin to hand it out. Does not wait."""
        if self._lab.portal.forked or not self._outputs.end():
            return
        self._over = True
        with self._sampling:
            try:
                self._scene = self._sampler.scene(open=False)
            except Exception:
                logger.exception("the last scene of the swarm %r could not be made", self.name)
                if self._scene is not None:
                    self._scene = replace(self._scene, open=False)
        if self._worker.alive:
            self._worker.wake()

    def close(self, timeout: float = LAST_SCENE_TIMEOUT) -> bool:
        """`end`, and wait until outputs have had the last scene, for at most `timeout`. Returns whether they have."""
        self.end()
        return self._worker.wait_for_end(min(timeout, LAST_SCENE_TIMEOUT))
