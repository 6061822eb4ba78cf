"""The grids of a swarm: their sizes and the kind of their experts, so that a newcomer can add experts that fit.

They are one record in the DHT, a dictionary from grid name to `GridInfo`. The servers of each grid keep it alive: each
looks now and then, and whoever finds that it will expire soon, or says something else, writes it.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping
from typing import Annotated

import msgspec
import trio

from labkit.dht.node import Entry, Value
from labkit.directory.cache import Records
from labkit.errors import LabkitError
from labkit.expert_protocol import ExpertSchema
from labkit.expert_uid import check_grid, check_name

logger = logging.getLogger(__name__)

GRIDS_KEY = "grids"  # of the record in the DHT
SCHEMA_TIMEOUT = 2.0  # seconds for a look at what others have declared
Text = Annotated[str, msgspec.Meta(max_length=200)]


class GridInfo(msgspec.Struct, frozen=True, array_like=True):
    """A grid's sizes, the kind of its experts, and their options, as far as those are plain values.

    `schema` is what its experts take and give, if that is known to the server that declared it last.

    Anybody can declare one: a kind is a name to compare with known kinds, never something to import.
    """

    sizes: Annotated[tuple[int, ...], msgspec.Meta(max_length=8)]
    kind: Text = ""
    options: Annotated[dict[Text, bool | int | float | Text | None], msgspec.Meta(max_length=32)] = {}
    schema: ExpertSchema | None = None


async def find_grids(dht: Records, timeout: float) -> dict[str, GridInfo]:
    """Returns all grids that are declared, by name, without malformed ones. `timeout`: seconds."""
    return {name: info for name, (info, _) in (await _read(dht, timeout)).items()}


async def _read(dht: Records, timeout: float, quorum: int | None = None) -> dict[str, tuple[GridInfo, float]]:
    """Returns the same, with the time at which each expires. `quorum`: see `DHTNode.get_many`."""
    record: Value | Mapping[str, Value] | None = None
    with trio.move_on_after(timeout):
        record = (await dht.get_many([GRIDS_KEY], quorum=quorum))[GRIDS_KEY]
    grids: dict[str, tuple[GridInfo, float]] = {}
    if isinstance(record, Mapping):
        for name, value in record.items():
            try:
                info = msgspec.msgpack.decode(value.data, type=GridInfo)
                check_grid(info.sizes)
                if info.schema is not None:
                    _check_schema(info.schema)
                grids[check_name(name)] = info, value.expires_at
            except (msgspec.MsgspecError, ValueError, RecursionError):
                logger.debug("ignored a malformed grid record %r", name[:80])
    return grids


async def keep_grid_declared(
    dht: Records,
    name: str,
    info: GridInfo | Callable[[], GridInfo],
    ttl: float,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep a grid declared until cancelled: look every `ttl / 3` seconds. `task_status` is told after the first time.

    `info`: what to declare, or a function that says it each time. A server that does not know yet what its experts take
    declares what another server of the same experts has found out.
    """
    while True:
        now = info() if callable(info) else info
        try:
            known, expires_at = (await _read(dht, SCHEMA_TIMEOUT, quorum=1)).get(name, (None, -math.inf))
            if now.schema is None and known is not None and msgspec.structs.replace(known, schema=None) == now:
                now = known  # another server of the same experts has found out what they take
            if known != now or expires_at - trio.current_time() < ttl / 2:
                await dht.store_many([Entry(GRIDS_KEY, msgspec.msgpack.encode(now), ttl, name)])
        except LabkitError as error:
            logger.warning("the grid %s could not be declared: %s", name, error)
        task_status.started()
        task_status = trio.TASK_STATUS_IGNORED
        await trio.sleep(ttl / 3 * random.uniform(0.7, 1.2))  # else all that began together would find it old together


def _check_schema(schema: ExpertSchema) -> None:
    """Raise `ValueError` for words that no schema has: they come from a stranger, and are shown."""
    for tensor in (*schema.inputs, *schema.outputs):
        if not tensor.dtype.isidentifier() or not (tensor.name == "" or tensor.name.isidentifier()):
            raise ValueError("a schema with a dtype or a name that is none")
