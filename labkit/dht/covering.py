"""Reading records from replicas that are known, without a look-up: few nodes are asked, each about many keys.

Servers read again and again what they have just stored, to see whether others have stored it, too. They know where it
is, and each node holds several of their records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import trio

from labkit.contact import Contact
from labkit.dht.peers import Peers
from labkit.dht.protocol import MAX_QUERIES, NodeAnswer
from labkit.wire.transport import Cancellable, await_all


def cover(replicas: Mapping[str, Sequence[Contact]], count: int) -> dict[Contact, list[str]]:
    """Returns few nodes, and what to ask each, so that each key is asked of `count` of its replicas.

    Whoever holds most of what is not asked yet is asked for it, again and again. Keys with fewer replicas are left out.
    Of very many keys some may be asked of fewer, since one call takes `MAX_QUERIES`.

    Args:
        replicas: The nodes that hold each key.
        count: Of how many of them it is to be asked.
    """
    left = {key: count for key, contacts in replicas.items() if len(contacts) >= count}
    held: dict[Contact, dict[str, None]] = {}  # in their order, so that a simulation can be repeated exactly
    for key in left:
        for contact in replicas[key]:
            held.setdefault(contact, {})[key] = None
    asked: dict[Contact, list[str]] = {}
    while left and held:
        best = max(held, key=lambda contact: len(held[contact]))
        asked[best] = list(held.pop(best))[:MAX_QUERIES]
        for key in asked[best]:
            left[key] -= 1
            if not left[key]:
                del left[key]
                for keys in held.values():
                    keys.pop(key, None)
    return asked


async def read_replicas(
    peers: Peers, replicas: Mapping[str, Sequence[Contact]], count: int
) -> dict[str, list[NodeAnswer]]:
    """Ask `count` replicas of each key. Returns their answers, for those keys of which so many have returned values.

    Those that are late are not waited for, and are pinged, as in look-ups.
    """
    answers: dict[str, list[NodeAnswer]] = {key: [] for key in replicas}
    late = cover(replicas, count)

    def ask(contact: Contact, keys: Sequence[str], done: Callable[[None], None]) -> Cancellable:
        def on_answers(some: Sequence[NodeAnswer] | None) -> None:
            late.pop(contact)
            for key, answer in zip(keys, some or (), strict=False):
                if answer.items:
                    answers[key].append(answer)
            done(None)

        return peers.begin_find(contact, list(keys), on_answers)

    with trio.move_on_after(peers.slow_after):
        await await_all([partial(ask, contact, keys) for contact, keys in late.items()])
    for contact in late:
        peers.probe(contact)
    return {key: some for key, some in answers.items() if len(some) >= count}
