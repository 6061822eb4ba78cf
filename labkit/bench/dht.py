"""`labkit bench dht`: stores and gets among DHT nodes that are processes of their own.

Beside it are the limits that `echo` measures in the same run. Each node's process runs `live`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import trio

from labkit.bench.echo import fan_out_limit
from labkit.bench.processes import ProcessGroup, Worker
from labkit.bench.report import check_at_least
from labkit.contact import Contact
from labkit.dht.node import DHTConfig, Value
from labkit.node import Node, NodeConfig, open_node
from labkit.portal import Portal
from labkit.wire.security import Identity
from labkit.wire.zmq_transport import open_network

VALUE_TTL = 300.0  # seconds
RECORD_BYTES = 100  # about the size of a stored value and the message around it


@dataclass(frozen=True)
class DHTBenchConfig:
    """What `labkit bench dht` measures.

    Args:
        peers: DHT nodes.
        rounds: Stores, each followed by two gets.
        secure: Whether connections are encrypted.

    Raises:
        ValueError: A value is not possible.
    """

    peers: int = 8
    rounds: int = 20
    secure: bool = False

    def __post_init__(self) -> None:
        check_at_least(2, self, "peers")
        check_at_least(1, self, "rounds")


def measure(config: DHTBenchConfig) -> dict[str, Any]:
    """Measure stores and gets, then the limit.

    Returns:
        What `--json` prints. Seconds are medians: `get_s` of the latest value, which is the default, and `get_any_s`
        of any copy. `found` is the share of gets, of both kinds, that returned the value.
    """
    draw = random.Random(0)
    store, get, get_any, found = list[float](), list[float](), list[float](), 0
    with ProcessGroup() as group:
        peers: list[Worker] = []
        invitations: list[str] = []
        for _ in range(config.peers):
            join = draw.choice(invitations) if invitations else None
            peers += group.start("dht:live", {"join": join, "secure": config.secure})
            invitations.append(peers[-1].receive())
        for _ in range(config.rounds):
            key, value = f"{draw.getrandbits(128):x}", f"{draw.getrandbits(128):x}"
            writer, *readers = draw.sample(peers, min(3, config.peers))
            store.append(writer.request({"key": key, "value": value})["seconds"])
            for reader, seconds, latest in (readers[0], get, True), (readers[-1], get_any, False):
                answer = reader.request({"key": key, "latest": latest})
                seconds.append(answer["seconds"])
                found += answer["value"] == value
    quorum = min(DHTConfig().quorum, config.peers - 1)
    store_limit, get_limit = (
        fan_out_limit(number, RECORD_BYTES, 10 * config.rounds, secure=config.secure)
        for number in (config.peers - 1, quorum)
    )
    return {
        **asdict(config),
        "store_s": round(median(store), 6),
        "get_s": round(median(get), 6),
        "get_any_s": round(median(get_any), 6),
        "found": found / config.rounds / 2,
        "store_limit_s": round(store_limit, 6),
        "get_limit_s": round(get_limit, 6),
        "store_of_limit": round(store_limit / median(store), 3),
        "get_of_limit": round(get_limit / median(get), 3),
    }


def live(order: dict[str, Any]) -> Generator[Any, Any, None]:
    """A worker that is a DHT node. It stores and gets what it is told to, and reports how long that took."""
    portal = Portal("bench")
    join = () if order["join"] is None else (Contact.from_invitation(order["join"]),)
    node: Node = portal.start(_live, join, NodeConfig(secure=order["secure"] or None))
    order = yield node.contact.invitation()
    while True:
        found = None
        started = time.perf_counter()
        if "value" in order:
            portal.call(node.dht.store, order["key"], order["value"].encode(), VALUE_TTL)
        else:
            found = portal.call(partial(node.dht.get, order["key"], latest=order["latest"]))
        seconds = time.perf_counter() - started
        order = yield {"seconds": seconds, "value": found.data.decode() if isinstance(found, Value) else None}


async def _live(join: tuple[Contact, ...], config: NodeConfig, *, task_status: trio.TaskStatus[Node]) -> None:
    async with open_network() as network, open_node(network, Identity.generate(), config, join=join) as node:
        task_status.started(node)
        await trio.sleep_forever()
