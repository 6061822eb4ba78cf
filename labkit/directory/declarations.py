"""What is declared in the DHT now, read past the cache: who holds an expert, whatever calls to it have shown.

No batch passes here. It is asked before places of a grid are taken, and by a server that looks whether another one has
declared its experts, too. Beam search asks the cache instead, which leaves out experts that do not answer; a place
whose server is slow for a moment is not free, however.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import trio

from labkit.contact import Contact
from labkit.directory.cache import DirectoryConfig, Records
from labkit.directory.index import NAMESPACE, Decoded, PrefixRecord
from labkit.expert_uid import ExpertInfo, parent

PREFIXES_AT_ONCE = 1024  # that one bulk get reads
QUORUM = 3  # replicas whose records are merged; the look-ups begin now, since what was declared before has to be seen

IsAlive = Callable[[Contact], Awaitable[bool]]  # whether a node answers; one that is slow counts as alive


async def declared_below(dht: Records, config: DirectoryConfig, name: str, dims: int) -> dict[str, ExpertInfo]:
    """Returns every declared expert of the `dims`-dimensional grid `name`, by uid."""
    prefixes = [name]
    for _ in range(dims - 1):
        records = await _read(dht, config, prefixes)
        prefixes = [f"{prefix}.{c}" for prefix, record in records.items() for c in sorted(record.markers)]
    return _experts(await _read(dht, config, prefixes))


async def declared(dht: Records, config: DirectoryConfig, uids: Iterable[str]) -> dict[str, ExpertInfo]:
    """Returns those of these experts that are declared, by uid."""
    return (await known(dht, config, uids))[0]


async def known(
    dht: Records, config: DirectoryConfig, uids: Iterable[str]
) -> tuple[dict[str, ExpertInfo], dict[str, int]]:
    """Returns those of these experts that are declared, and the epochs of those that were withdrawn, by uid."""
    wanted = set(uids)
    records = await _read(dht, config, sorted({parent(uid)[0] for uid in wanted}))
    found = _experts(records)
    withdrawn = {f"{prefix}.{c}": gone[0] for prefix, record in records.items() for c, gone in record.withdrawn.items()}
    return (
        {uid: info for uid, info in found.items() if uid in wanted},
        {uid: epoch for uid, epoch in withdrawn.items() if uid in wanted},
    )


async def of_others(
    experts: Mapping[str, ExpertInfo], own: bytes, is_alive: IsAlive
) -> tuple[dict[str, ExpertInfo], set[Contact]]:
    """Which of these experts are held by other nodes that are alive.

    Args:
        experts: Declared experts, by uid.
        own: The public key of the node that asks.
        is_alive: Asked once about each other node.

    Returns:
        The experts at other nodes that are alive, by uid, and the nodes that are gone.
    """
    servers = dict.fromkeys(info.contact for info in experts.values() if info.contact.key != own)
    gone: set[Contact] = set()

    async def ask(contact: Contact) -> None:
        if not await is_alive(contact):
            gone.add(contact)

    async with trio.open_nursery() as nursery:
        for contact in servers:
            nursery.start_soon(ask, contact)
    held = {u: info for u, info in experts.items() if info.contact in servers and info.contact not in gone}
    return held, gone


def is_senior(info: ExpertInfo, than: ExpertInfo) -> bool:
    """Whether the server of `info` keeps an expert that both servers have declared.

    It is the one with the higher epoch. In one epoch it is the one that began to declare experts first, by its own
    clock; of two at the same time, the one with the smaller key. Both servers read the same numbers, so that they
    agree, even if a clock is wrong.
    """
    return (-info.epoch, info.since, info.contact.key) < (-than.epoch, than.since, than.contact.key)


async def _read(dht: Records, config: DirectoryConfig, prefixes: Sequence[str]) -> dict[str, PrefixRecord]:
    records: dict[str, PrefixRecord] = {}
    decoded: Decoded = {}
    for start in range(0, len(prefixes), PREFIXES_AT_ONCE):
        some = prefixes[start : start + PREFIXES_AT_ONCE]
        with trio.move_on_after(config.timeout):
            found = await dht.get_many([NAMESPACE + prefix for prefix in some], quorum=QUORUM)
            for prefix in some:
                records[prefix] = PrefixRecord(prefix, trio.current_time())
                records[prefix].take(found.get(NAMESPACE + prefix), config.max_children, decoded)
    return records


def _experts(records: Mapping[str, PrefixRecord]) -> dict[str, ExpertInfo]:
    now = trio.current_time()
    return {
        info.uid: info for record in records.values() for info, expires_at in record.leaves.values() if now < expires_at
    }
