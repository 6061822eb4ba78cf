"""Leaving a swarm without losing a call: what a server knows of its callers, and how long it goes on answering them.

Beside a batch's way: `server/server` notes each request in its `Traffic`. At a clean stop it first takes its experts
out of the directory. Those who have found them before still call: their answers say that the server is leaving, so that
they call no more, except for the backward passes of forward passes that were answered. When it has been quiet for a
moment, the server ends.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterable

import trio

from labkit.contact import Contact
from labkit.directory import Directory
from labkit.directory.declaring import Experts
from labkit.errors import LabkitError
from labkit.expert_protocol import Direction
from labkit.server.backend import ExpertBackend

logger = logging.getLogger(__name__)

QUIET_TIME = 0.3  # seconds without a request after which nobody seems to call any more
RETURN_TIME = 3.0  # seconds after a forward pass in which its backward pass may come, at most
MAX_AWAITED = 1024  # of an expert
CALLER_TIME = 4.0  # seconds after a caller's last request in which the next one is awaited, at most
MAX_CALLERS = 4096  # of an expert each, that are remembered
LEAVE_TIMEOUT = 10.0  # seconds that all this takes at most
HURRIED_QUIET_TIME = 0.05  # the same where a whole swarm is closed, within two seconds
HURRIED_TIMEOUT = 0.3
STOP_TIMEOUT = 30.0  # seconds that a whole clean stop may take, the saves included, where experts are small
STOP_TIMEOUT_PER_GB = 20.0  # seconds more for each GB to save: a disk that takes 50 MB/s is slow


class Traffic:
    """The requests of a server: those that are open, and the backward passes that are still to come.

    Which forward passes come back, nobody says. So the oldest forward pass of an expert that was answered is taken for
    the one whose backward pass comes, and a backward pass is awaited for twice as long as others took. A caller that
    has come back to an expert is awaited for twice the time after which it did, since it may come once more before it
    reads the directory again; then its answer says that the server leaves, and it comes no more.
    """

    def __init__(self) -> None:
        self.leaving = False  # whether answers say so
        self._open = 0
        self._last = -math.inf  # when a request came or was answered last, on trio's clock
        self._trained = set[str]()  # the experts that have had a backward pass
        self._answered = defaultdict[str, deque[float]](lambda: deque(maxlen=MAX_AWAITED))  # forward passes: when
        self._return_time = 0.0  # seconds from a forward pass to its backward pass
        self._callers = OrderedDict[
            tuple[Hashable, str], tuple[float, float]
        ]()  # the last request, and the time between
        self._changed = trio.Event()

    def arrive(self, uid: str, direction: Direction, caller: Hashable = None) -> None:
        """Note a request of an expert, and of whom, if that is known."""
        self._open += 1
        self._last = trio.current_time()
        if caller is not None and direction == "forward":
            self._note_caller((caller, uid))
        if direction == "backward":
            self._trained.add(uid)
            answered = self._answered[uid]
            while answered:
                took = self._last - answered.popleft()
                if took <= RETURN_TIME:  # else it was of those that have no backward pass
                    self._return_time = max(took, 0.95 * self._return_time)
                    break

    def _note_caller(self, key: tuple[Hashable, str]) -> None:
        before = self._callers.pop(key, None)
        if self.leaving:
            return  # the answer says so
        between = 0.0 if before is None else max(self._last - before[0], 0.8 * before[1])
        self._callers[key] = self._last, between
        if len(self._callers) > MAX_CALLERS:
            self._callers.popitem(last=False)

    def end(self, uid: str, direction: Direction, answered: bool) -> None:
        """Note that a request was answered, or has failed or was given up."""
        self._open -= 1
        self._last = trio.current_time()
        if answered and direction == "forward":
            self._answered[uid].append(self._last)
        if self.leaving:
            self._changed.set()

    def quiet_at(self, hurried: bool = False) -> float:
        """When nobody will have called for long enough, if no request comes: perhaps in the past, perhaps never."""
        if self._open:
            return math.inf
        if hurried:
            return self._last + HURRIED_QUIET_TIME
        awaited = max((self._answered[uid][-1] for uid in self._trained if self._answered[uid]), default=-math.inf)
        callers = (last + min(2 * between, CALLER_TIME) for last, between in self._callers.values())
        return max(
            self._last + QUIET_TIME,
            awaited + min(2 * self._return_time, RETURN_TIME),
            max(callers, default=-math.inf),
        )

    async def until_quiet(self, hurried: bool = False) -> None:
        """Wait until all requests are answered, and no more are expected; `hurried`: for less long."""
        while (at := self.quiet_at(hurried)) > trio.current_time():
            self._changed = trio.Event()
            with trio.move_on_at(at):
                await self._changed.wait()


async def leave(traffic: Traffic, directory: Directory, experts: Experts, contact: Contact, hurry: trio.Event) -> None:
    """Take the experts out of the directory, and answer all who call them until it is quiet.

    Args:
        traffic: The requests of the server.
        directory: Where the experts are declared.
        experts: The experts.
        contact: The server's node.
        hurry: Set while, or before, this runs, if there is little time.
    """
    traffic.leaving = True
    async with trio.open_nursery() as nursery:

        async def end_soon() -> None:
            await hurry.wait()
            with trio.move_on_after(HURRIED_TIMEOUT):
                await traffic.until_quiet(hurried=True)
            nursery.cancel_scope.cancel()

        nursery.start_soon(end_soon)
        with trio.move_on_after(LEAVE_TIMEOUT):
            try:
                await directory.withdraw(experts, contact)
            except LabkitError as error:  # then they expire
                logger.debug("%s could not be taken out of the directory: %s", contact.endpoint, error)
            await traffic.until_quiet()
        nursery.cancel_scope.cancel()


def stop_timeout(backends: Iterable[ExpertBackend]) -> float:
    """Seconds that a server of these experts may take for a clean stop before it is killed.

    They are thirty, and twenty more for each GB of the experts and their optimizers. (A swarm that is closed does not
    wait so long.)
    """
    return STOP_TIMEOUT + round(STOP_TIMEOUT_PER_GB * sum(backend.state_bytes for backend in backends) / 1e9)
