"""A second look: where an expert is by now, before a call to it counts as lost.

On a batch's way: `client/expert_client` asks here when a server is gone. One that has stopped cleanly has handed its
experts over first, and whoever has not called it meanwhile goes by a record that is some seconds old.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from labkit.directory.cache import PrefixCache
from labkit.errors import LabkitError
from labkit.expert_uid import ExpertInfo, parent

LOOK_TIME = 0.5  # seconds that a call waits for it, so that rows whose experts are really lost soon go to others

OnFound = Callable[[ExpertInfo | None], object]


class SecondLook:
    """Reads the records of lost experts anew, while `run` runs. Looks that begin together are one bulk get.

    Args:
        cache: Reads the records.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._asked: list[tuple[ExpertInfo, OnFound]] = []
        self._wake: trio.Event | None = None  # None while nobody looks

    def begin(self, info: ExpertInfo, done: OnFound) -> bool:
        """Begin to look where an expert is in a later epoch.

        Args:
            info: The expert, where it was.
            done: Called once with where it is; None if that is not known within `LOOK_TIME`.

        Returns:
            Whether somebody looks; else `done` is never called.
        """
        if self._wake is None:
            return False
        self._asked.append((info, done))
        self._wake.set()
        return True

    async def run(self) -> None:
        """Look, until cancelled."""
        self._wake = trio.Event()
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    await self._wake.wait()
                    self._wake = trio.Event()
                    asked, self._asked = self._asked, []
                    nursery.start_soon(self._look, asked)
            finally:
                self._wake = None
                asked, self._asked = self._asked, []
                for _, done in asked:
                    done(None)

    async def _look(self, asked: list[tuple[ExpertInfo, OnFound]]) -> None:
        try:
            with trio.move_on_after(LOOK_TIME):
                await self._cache.read(list(dict.fromkeys(parent(info.uid)[0] for info, _ in asked)))
        except LabkitError:
            pass  # then it is not known
        finally:
            for info, done in asked:
                now = self._cache.newest(info)
                done(None if now is info else now)
