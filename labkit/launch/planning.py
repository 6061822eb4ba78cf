"""What to serve: from what a caller of `Swarm.serve` says, and what the swarm has already, to experts that fit in.

Before any batch: `swarm` asks here which grid, which of its places, which options and which kind of isolation; and for
a layer, which grid it calls and how.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
import trio

from labkit.client.dispatch import DispatchConfig
from labkit.contact import Contact
from labkit.dht.protocol import Ping, Pong
from labkit.directory.grids import GridInfo
from labkit.errors import ConnectionLost, RPCError
from labkit.expert_uid import ExpertInfo, check_grid, check_inside, check_name, grid_for, grid_uids, split_uid, spread
from labkit.launch.runners import ServerPlan
from labkit.node import Node, NodeConfig
from labkit.server.layers import BUILTIN_KINDS, Factory, expert_reference, make_expert
from labkit.server.server import ServerConfig
from labkit.wire.security import Identity
from labkit.wire.transport import LOOPBACK, announced_address

DEFAULT_EXPERTS = 16
PING_TIMEOUT = 1.0  # seconds
MAX_STRANGE_BYTES = 1 << 30  # of one expert whose options somebody else in the swarm chose
MAX_STRANGE_TOTAL = 4 << 30  # of all that are taken if nobody says how many
MAX_PLACES = 1 << 20  # of a grid whose free places are looked for


def grid_name(kind: str | Factory, name: str | None, uids: Sequence[str] | None) -> str:
    """The grid to serve in: the one given, that of the uids, or else one called after the kind. Raises `ValueError`."""
    if uids:
        of_uids = split_uid(uids[0])[0]
        if name not in (None, of_uids):
            raise ValueError(f"name={name!r}: the uids are of the grid {of_uids!r}")
        return of_uids
    if name is not None:
        return check_name(name)
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", "expert")
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in text.rpartition(":")[2])
    return check_name(plain.lower().strip("-_") or "expert")


def fit_options(kind: str | Factory, options: dict[str, Any], name: str, known: GridInfo | None) -> dict[str, Any]:
    """The options of an expert of grid `name`: where it runs with a kind of ours, those left out are as there.

    Raises `ValueError` for options that a kind of ours does not take, or that do not fit the running grid.
    """
    if not isinstance(kind, str) or kind not in BUILTIN_KINDS:
        return options  # a stranger's word about a kind of the user's own is worth nothing
    chosen = options
    if known is not None and known.kind in BUILTIN_KINDS:
        other = {key: value for key, value in options.items() if known.options.get(key, value) != value}
        if known.kind != kind or other:
            wanted = ", ".join([kind, *(f"{key}={value!r}" for key, value in other.items())])
            found = ", ".join([known.kind, *(f"{key}={known.options[key]!r}" for key in other)])
            raise ValueError(
                f"the grid {name!r} of this swarm has experts of the kind {found}, not {wanted}; serve others in "
                "a grid of their own, with name=…"
            )
        chosen = {**known.options, **options}
    try:
        with torch.device("meta"):  # costs nothing, and tells what is wrong before a process is started
            expert = make_expert(kind, **chosen)
    except (RuntimeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"no {kind} expert can be made with {chosen}: {str(error).splitlines()[0]}") from None
    size = _bytes_of(expert)
    if size > MAX_STRANGE_BYTES and chosen != options:
        raise ValueError(
            f"this swarm says that an expert of the grid {name!r} takes {size / 2**30:.1f} GiB ({chosen}); if that is "
            "what you want, give these options yourself"
        )
    return chosen


def check_all_places(kind: str | Factory, options: dict[str, Any], name: str, places: int) -> None:
    """Whether so many experts may be served though nobody said how many, and these `options` are somebody else's.
    Raises `ValueError`."""
    with torch.device("meta"):
        size = places * _bytes_of(make_expert(kind, **options))
    if size > MAX_STRANGE_TOTAL:
        raise ValueError(
            f"the {places} free places of the grid {name!r} take {size / 2**30:.1f} GiB, without the optimizer, as "
            f"this swarm describes its experts ({options}); say how many to serve: experts=…"
        )


def _bytes_of(expert: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*expert.parameters(), *expert.buffers()))


def isolate(isolation: str | None, kind: str | Factory, options: dict[str, Any]) -> tuple[str, str | Factory]:
    """Task or process, and the kind as the server will be given it.

    Left open, it is a process wherever a process can have the kind and its options. Raises `ValueError`.
    """
    if isolation not in (None, "process", "task"):
        raise ValueError(f"isolation={isolation!r}: 'process' or 'task'")
    if isolation == "task":
        return isolation, kind
    try:
        reference = expert_reference(kind)
        _check_plain(options)
        return "process", reference
    except ValueError:
        if isolation == "process" or isinstance(kind, str):
            raise
        return "task", kind


def _check_plain(options: dict[str, Any]) -> None:
    for key, value in options.items():
        try:
            msgspec.json.encode(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{key}={value!r} cannot be handed to a server process ({error}); give numbers, texts and lists of "
                'them, or serve it with isolation="task"'
            ) from None


async def choose_places(
    node: Node,
    name: str,
    known: GridInfo | None,
    grid: Sequence[int] | None,
    experts: int | None,
    uids: Sequence[str] | None,
) -> tuple[tuple[int, ...], list[str]]:
    """The sizes of grid `name` and the uids to serve: those asked for, or `experts` of its free places (None: all).

    `known`: what the swarm says of this grid, if it has it. Raises `ValueError`.
    """
    if uids is not None and experts is not None:
        raise ValueError("give either uids=… or experts=…")
    if experts is not None and (not isinstance(experts, int) or experts < 1):
        raise ValueError(f"experts={experts!r}: a number of experts, at least one")
    taken: set[str] = set()
    if known is not None:
        taken = await _taken(node, name, len(known.sizes))
        if not taken and grid is not None and check_grid(grid) != known.sizes:
            known = None  # a grid that nobody serves any more is free for another shape
    sizes = _sizes(known, grid, experts, uids)
    if known is not None and known.sizes != sizes:
        raise ValueError(
            f"the grid {name!r} of this swarm has the sizes {known.sizes}, not {sizes}; serve another with name=…"
        )
    if uids is not None:
        check_inside(uids, sizes)
        return sizes, list(uids)
    places = math.prod(sizes)
    if places > MAX_PLACES:
        raise ValueError(f"a grid of {places} places is too large to look for free ones; say which with uids=…")
    free = await trio.to_thread.run_sync(_free_places, name, sizes, taken)  # which may take seconds
    wanted = len(free) if experts is None else experts
    if not 1 <= wanted <= len(free):
        misfit = f"so {experts} more experts do not fit" if experts else "so there is none to take"
        raise ValueError(
            f"the grid {name!r} {sizes} has {len(free)} free places of {places}, {misfit}; start the swarm with a "
            "larger grid, or serve another one with name=…"
        )
    return sizes, free[:wanted]


def _free_places(name: str, sizes: tuple[int, ...], taken: set[str]) -> list[str]:
    """Along the diagonals, so that a part of a grid has something in every row."""

    def diagonal(uid: str) -> int:
        *before, last = split_uid(uid)[1]
        return (last - sum(before)) % sizes[-1]

    return sorted((uid for uid in grid_uids(name, sizes) if uid not in taken), key=diagonal)


async def _taken(node: Node, name: str, dimensions: int) -> set[str]:
    """The uids of a grid whose servers are there. One that is gone stays in the directory for a while, so we ask."""
    experts = await node.directory.all_experts(name, dimensions)
    one_of_each = {info.contact: info for info in experts if info.contact != node.contact}
    gone: set[Contact] = set()

    async def ask(info: ExpertInfo) -> None:
        try:
            await node.client.call(info.contact, "dht.ping", Ping(None), returns=Pong, timeout=PING_TIMEOUT)
        except ConnectionLost as error:
            gone.add(info.contact)
            node.directory.report_failure(info, error)
        except RPCError:
            pass  # slow or overloaded, perhaps; it may come back

    async with trio.open_nursery() as nursery:
        for info in one_of_each.values():
            nursery.start_soon(ask, info)
    return {info.uid for info in experts if info.contact not in gone}


def _sizes(
    known: GridInfo | None, grid: Sequence[int] | None, experts: int | None, uids: Sequence[str] | None
) -> tuple[int, ...]:
    """The grid's sizes: as given, as they are known, or as many as are needed."""
    if grid is not None:
        return check_grid(grid)
    if known is not None:
        return check_grid(known.sizes)
    if uids:
        coordinates = [split_uid(uid)[1] for uid in uids]
        if len(set(map(len, coordinates))) > 1:
            raise ValueError("uids: all of one grid have the same number of coordinates")
        return tuple(1 + max(column) for column in zip(*coordinates, strict=True))
    return grid_for(DEFAULT_EXPERTS if experts is None else experts)


def plan_servers(
    config: ServerConfig, servers: int, node: NodeConfig, join: Contact, *, member_file: Path | None, lasting: bool,
    beside: int = 0,
) -> list[ServerPlan]:  # fmt: skip
    """Divide the experts of `config` among servers, each with a key of its own, that join the swarm at `join`.

    `node`: the configuration of the swarm's own node; the servers listen like it, on ports of their own. `beside`: how
    many run here already. Raises `ValueError` if there are fewer experts than servers.
    """
    parts = spread(config.uids, servers)
    if config.threads is None:
        # With more threads than cores each operation waits until all of its threads have had their turn, and those that
        # wait spin: a first batch took four times as long with four servers on two cores.
        config = replace(config, threads=max(1, torch.get_num_threads() // (len(parts) + beside)))
    announce = node.announce and announced_address(node.announce, LOOPBACK, 0)[0]
    listen = f"{node.listen.rpartition(':')[0]}:*"
    node = replace(node, listen=listen, announce=announce, secure=join.secure or None)
    return [
        ServerPlan(replace(config, uids=part), node, Identity.generate(), (join,), member_file, lasting)
        for part in parts
    ]


# ---------------------------------------------------------------- layers


def known_sizes(grids: Mapping[str, GridInfo], name: str) -> tuple[int, ...]:
    """The sizes of a grid that is served. Raises `ValueError`."""
    if name not in grids:
        if not grids:
            raise ValueError(f"no grid is served in this swarm; serve {name!r} first, or give its sizes: grid=…")
        raise ValueError(
            f"nobody serves a grid {name!r} in this swarm, but {', '.join(sorted(grids))}; say which is meant with "
            "name=…, or, if it is still to be served, give its sizes: grid=…"
        )
    return grids[name].sizes


def dispatch_config(sizes: Sequence[int], options: Mapping[str, Any]) -> DispatchConfig:
    """How a layer over a grid of these sizes calls its experts; by default the best four. Raises `ValueError`."""
    unknown = set(options) - set(DispatchConfig.__dataclass_fields__)
    if unknown:
        known = ", ".join(DispatchConfig.__dataclass_fields__)
        raise ValueError(f"moe has no option {', '.join(sorted(unknown))}; besides its own it has {known}")
    return DispatchConfig(**{"k_best": min(4, math.prod(sizes)), **options})
