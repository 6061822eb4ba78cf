"""The servers that keep copies of our experts, or could: which of them are there, and which take copies now.

Who keeps a copy calls us every two seconds (`watching`), so that one is quiet only if something is wrong. It is called
itself then, and others get copies in its place until it has answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from labkit.contact import Contact
from labkit.copies.servers import GridServers, ServerRecord
from labkit.copies.watching import RETRY_PAUSE, reaches
from labkit.errors import ConnectionLost, DeadlineExceeded, RPCError
from labkit.wire.rpc_types import Caller

QUIET = 3.0  # seconds without a call, after which a server is called itself
SILENCE = 6.0  # seconds without a word of it, after which it counts as gone in any case
ATTEMPTS = 2  # to reach it
PAUSE_AFTER_FAILURE = 2.0  # seconds until a server is tried again that did not take a copy; doubled each time
LONGEST_PAUSE = 60.0  # in a row, up to this


class Backups:
    """Knows which servers can be given copies.

    Args:
        caller: Makes the calls.
        servers: The servers of the grid.
    """

    def __init__(self, caller: Caller, servers: GridServers) -> None:
        self._caller = caller
        self._servers = servers
        self._asked: dict[bytes, float] = {}  # servers that have been quiet, and when they were called
        self._doubted: set[bytes] = set()  # those that have not answered yet
        self._failed: dict[bytes, tuple[float, float]] = {}  # by server: how long it is left alone, and until when

    def able(self) -> list[ServerRecord]:
        """Returns the servers that have not failed to take a copy just now, and are there as far as is known."""
        now = trio.current_time()
        failed = {key for key, (_, until) in self._failed.items() if until > now} | self._doubted
        others = self._servers.others
        return [record for key, record in others.items() if key not in failed] if failed else [*others.values()]

    def note_success(self, at: Contact) -> None:
        """Note that a server has taken a copy."""
        self._failed.pop(at.key, None)

    def note_failure(self, at: Contact, error: RPCError) -> None:
        """Note that a server has not taken a copy, and leave it alone for a while."""
        self.pause(at)
        if isinstance(error, (ConnectionLost, DeadlineExceeded)):
            self.lose(at)

    def pause(self, at: Contact) -> None:
        """Leave a server alone for a while, which may only be slow."""
        now = trio.current_time()
        self._failed = {key: one for key, one in self._failed.items() if now < one[1] + LONGEST_PAUSE}
        pause = min(2 * self._failed.get(at.key, (PAUSE_AFTER_FAILURE / 2, 0.0))[0], LONGEST_PAUSE)
        self._failed[at.key] = pause, now + pause

    def lose(self, contact: Contact) -> None:
        """Note that a server is gone."""
        self._servers.lose(contact)

    async def is_there(self, contact: Contact, heard: Mapping[Contact, float]) -> bool:
        """Whether a server has called lately, or else answers now.

        Args:
            contact: The server.
            heard: The servers that keep copies, and when each was heard last.
        """
        at = heard.get(contact)
        return (at is not None and trio.current_time() - at < QUIET) or await reaches(self._caller, contact)

    def quiet(self, heard: Mapping[Contact, float]) -> list[Contact]:
        """Returns those that have said nothing for a while. They are doubted, and `call` is to find out.

        Args:
            heard: The servers that keep copies, and when each was heard last.
        """
        now = trio.current_time()
        self._asked = {key: at for key, at in self._asked.items() if now < at + QUIET}
        quiet = [c for c, at in heard.items() if QUIET <= now - at < SILENCE and c.key not in self._asked]
        self._asked |= {contact.key: now for contact in quiet}
        self._doubted |= {contact.key for contact in quiet}
        return quiet

    async def call(
        self, contact: Contact, on_silence: Callable[[Contact], object], on_lost: Callable[[Contact], object]
    ) -> None:
        """Find out whether a server that is doubted is there.

        Args:
            contact: The server.
            on_silence: Called with it when it has not answered once.
            on_lost: Called with it when it is gone.
        """
        try:
            for _ in range(ATTEMPTS):
                if await reaches(self._caller, contact):
                    return
                on_silence(contact)
                await trio.sleep(RETRY_PAUSE)
        finally:
            self._doubted.discard(contact.key)
        on_lost(contact)
