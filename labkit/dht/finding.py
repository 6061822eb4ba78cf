"""Asking one node about keys and ids, for a look-up."""

from __future__ import annotations

from functools import partial

import trio

from labkit.contact import Contact
from labkit.dht.peers import Peers
from labkit.dht.protocol import Find, FindReply, read_reply
from labkit.dht.search import Answer, Told
from labkit.errors import BadReply
from labkit.wire.awaiting import UnderWay


class Finding:
    """One node being asked about keys and ids: records that had no room in its reply are asked for again until all have
    come."""

    __slots__ = ("_answers", "_call", "_contact", "_done", "_peers", "_queries")

    def __init__(self, peers: Peers, contact: Contact, queries: list[str | bytes], done: Told) -> None:
        self._peers = peers
        self._contact = contact
        self._queries = queries
        self._done = done
        self._answers: dict[str | bytes, Answer] = {}
        self._call: UnderWay | None = None
        self._ask(queries)

    def _ask(self, missing: list[str | bytes]) -> None:
        body = Find.of(self._peers.sender, missing)
        hear = partial(self._hear, body.queries(), trio.current_time())
        self._call = self._peers.begin(self._contact, "dht.find", body, FindReply, hear)

    def _hear(self, asked: list[str | bytes], at: float, reply: FindReply | None) -> None:
        if reply is None:
            self._done(None)
            return
        peers, left_out = self._peers, []
        try:
            read = read_reply(reply, asked, at, peers.config.k, peers.config.limits)
            for query, (answer, again) in zip(asked, read, strict=True):
                if again:
                    left_out.append(query)
                self._answers[query] = answer._replace(contacts=peers.usable_of(answer.contacts))
            if len(left_out) == len(asked):
                raise BadReply("nothing but promises")
        except BadReply:
            peers.failed(self._contact)
            self._done(None)
            return
        if left_out:
            self._ask(left_out)
        else:
            self._done([self._answers[query] for query in self._queries])

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        if self._call is not None:
            self._call.cancel()
