"""Plans of servers: turns the arguments of `Swarm.serve`, and what the swarm already has, into `ServerPlan`s.

This comes before any batch. For servers, `swarm` asks here which grid they serve, which places of it, with which
options, and in which kind of isolation; for a layer, which grid it calls and how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from labkit.contact import Contact, is_loopback
from labkit.directory.grids import GridInfo
from labkit.expert_uid import check_name, split_uid, spread
from labkit.launch import by_value
from labkit.launch.by_value import HandedKind
from labkit.launch.ports import server_address
from labkit.launch.runners import ServerPlan
from labkit.launch.server_process import is_plain
from labkit.node import NodeConfig
from labkit.server.config import ServerConfig
from labkit.server.layers import BUILTIN_KINDS, Factory, expert_reference, find_factory, make_expert
from labkit.server.optimizer import BackendConfig
from labkit.suggest import did_you_mean
from labkit.wire.addresses import LOOPBACK, announced_address, ports_of, split_address
from labkit.wire.security import Identity

MAX_UNASKED_EXPERT_BYTES = 1 << 30  # of one expert whose options come from the swarm, not from the caller
MAX_UNASKED_TOTAL_BYTES = 4 << 30  # of all experts, if their number comes from the swarm too

Fit = Callable[[GridInfo | None], dict[str, Any]]  # what the swarm says of a grid -> the options of its experts


def grid_name(kind: str | Factory, name: str | None, uids: Sequence[str] | None) -> str:
    """The name of the grid to serve in.

    Args:
        kind: The kind of the experts; the grid is named after it unless another argument says otherwise.
        name: The name that the caller gives.
        uids: The experts that the caller wants; they name their grid.

    Raises:
        ValueError: The name is no grid's name, or the uids are of another grid.
    """
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


def given(**options: Any) -> dict[str, Any]:
    """The options of these that are given."""
    return {option: value for option, value in options.items() if value is not None}


def check_backend(backend: BackendConfig | None) -> BackendConfig:
    """How experts are trained, by default as usual. Raises `ValueError` if it is something else."""
    if backend is not None and not isinstance(backend, BackendConfig):
        raise ValueError(f"backend={backend!r}: a BackendConfig, such as lk.BackendConfig(lr=1e-3)")
    return backend or BackendConfig()


def fit_options(kind: str | Factory, options: dict[str, Any], name: str, known: GridInfo | None) -> dict[str, Any]:
    """The options of an expert. Those that the caller leaves out are the running grid's, if its kind is built in.

    Args:
        kind: The kind of the experts.
        options: The options that the caller gives, such as `hidden`.
        name: The grid to serve in.
        known: What the swarm says of this grid; `None` if it has no such grid.

    Raises:
        ValueError: A built-in kind does not take these options, or they do not fit the running grid, or the options
            that come from the swarm make an expert of over 1 GiB.
    """
    if not isinstance(kind, str) or kind not in BUILTIN_KINDS:
        return options  # what others in the swarm say about a kind of the user's own cannot be trusted
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
        with torch.device("meta"):  # costs nothing, and shows what is wrong before a process is started
            expert = make_expert(kind, **chosen)
    except (RuntimeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"no {kind} expert can be made with {chosen}: {str(error).splitlines()[0]}") from None
    size = _bytes_of(expert)
    if size > MAX_UNASKED_EXPERT_BYTES and chosen != options:
        raise ValueError(
            f"this swarm says that an expert of the grid {name!r} takes {size / 2**30:.1f} GiB ({chosen}); if that is "
            "what you want, give these options yourself"
        )
    return chosen


def check_all_places(kind: str | Factory, options: dict[str, Any], name: str, places: int) -> None:
    """Check the size of all experts together, if neither their number nor their options come from the caller.

    Args:
        kind: The kind of the experts, a built-in one.
        options: The options of the running grid.
        name: The grid to serve in.
        places: Its free places, all of which would be served.

    Raises:
        ValueError: They take over 4 GiB.
    """
    with torch.device("meta"):
        size = places * _bytes_of(make_expert(kind, **options))
    if size > MAX_UNASKED_TOTAL_BYTES:
        raise ValueError(
            f"the {places} free places of the grid {name!r} take {size / 2**30:.1f} GiB, without the optimizer, as "
            f"this swarm describes its experts ({options}); say how many to serve: experts=…"
        )


def _bytes_of(expert: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*expert.parameters(), *expert.buffers()))


def isolate(
    isolation: str | None, kind: str | Factory, options: dict[str, Any], *, cluster: bool = False
) -> tuple[str, str | Factory | HandedKind]:
    """Where a server runs, and the kind as it is handed to the server.

    Args:
        isolation: "process" or "task"; `None` means a process wherever a process can be given the kind and its options.
        kind: The kind of the experts.
        options: Their options.
        cluster: Whether the servers run on a cluster, which then takes the place of both.

    Returns:
        "process", "task" or "cluster", and the kind: for all but a task a name to import, or its code.

    Raises:
        ValueError: There is no such isolation, or a process cannot be given the kind or the options.
    """
    if isolation not in (None, "process", "task"):
        raise ValueError(f"isolation={isolation!r}: 'process' or 'task'{did_you_mean(isolation, ('process', 'task'))}")
    if cluster and isolation is not None:
        raise ValueError(f"isolation={isolation!r}: a server on a cluster (on=…) is a process there; leave it out")
    if isolation == "task":
        return isolation, kind
    importable = isinstance(kind, str) and (kind in BUILTIN_KINDS or ":" in kind)
    factory = find_factory(kind) if isinstance(kind, str) and not importable else kind
    try:
        handed = kind if isinstance(kind, str) and importable else _hand_over(kind, factory)
        for option, value in options.items():
            _check_handed(f"{option}={value!r}", value)
    except ValueError as error:
        if cluster:
            raise ValueError(f"{error}; define it in a module that the workers can import") from None
        if isolation == "process" or isinstance(kind, str):
            raise ValueError(
                f'{error}; define it in a module that can be imported, or serve it with isolation="task"'
            ) from None
        return "task", kind
    return "cluster" if cluster else "process", handed


def _hand_over(kind: str | Factory, factory: Any) -> str | HandedKind:
    """A kind as a process gets it: a name that it can import, or the code of its factory."""
    if not callable(factory) or isinstance(factory, torch.nn.Module):
        raise ValueError(f"{factory!r} does not make modules")
    if not by_value.is_by_value(getattr(factory, "__module__", "")):
        try:
            return expert_reference(factory)
        except ValueError:
            pass  # no import finds it
    name = kind if isinstance(kind, str) else getattr(factory, "__name__", type(factory).__name__)
    return HandedKind(name, isinstance(kind, str), _check_handed(name, factory))


def _check_handed(what: str, thing: Any) -> bytes:
    """The code of a thing. Raises `ValueError` if it cannot be handed over."""
    if is_plain({"": thing}):
        return b""
    try:
        return by_value.write(thing)
    except ValueError as error:
        raise ValueError(f"{what} cannot be handed to a server process ({error})") from None


def plan_servers(
    config: ServerConfig, servers: int, node: NodeConfig, join: Contact, *, member_file: Path | None, lasting: bool,
    threads: int | None = None, beside: int = 0, folder: str | None = None,
) -> list[ServerPlan]:  # fmt: skip
    """Divide experts among servers, each with a key of its own.

    Args:
        config: What to serve: all of the experts.
        servers: The number of servers.
        node: The configuration of the swarm's own node; the servers listen like it, each at a port of its own.
        join: The contact of the swarm to join.
        member_file: The public keys that may connect, in a private swarm.
        lasting: Whether the checkpoints outlive the swarm.
        threads: Torch's threads that the servers here share; by default those of this thread.
        beside: Number of servers that run here already and share these threads.
        folder: The swarm's temporary folder.

    Raises:
        ValueError: There are fewer experts than servers, or the node's address has too few ports for them.
    """
    parts = spread(config.uids, servers) if config.uids else [()] * servers
    if config.threads is None:
        # With more threads than cores, each operation waits until all of its threads have had their turn, and those
        # that wait spin: a first batch took four times as long with four servers on two cores.
        threads = torch.get_num_threads() if threads is None else threads
        config = replace(config, threads=max(1, threads // (len(parts) + beside)))
    announce = node.announce and announced_address(node.announce, LOOPBACK, 0)[0]
    listen = server_address(node, len(parts) + beside)
    node = replace(node, listen=listen, announce=announce, secure=join.secure or None, relay=None)
    plans = []
    for part in parts:
        identity, copies = Identity.generate(), None
        if folder is not None:
            copies = str(Path(folder) / "copies" / identity.public_key.hex()[:16])
        server = replace(config, uids=part, copies_dir=copies)
        plans.append(ServerPlan(server, node, identity, (join,), member_file, lasting, folder))
    return plans


def node_elsewhere(node: NodeConfig) -> NodeConfig:
    """The configuration of a swarm's node as servers on other hosts take it: they say themselves where they are."""
    host = node.listen.rpartition(":")[0]
    return replace(node, listen=f"{host}:*", announce=None, hidden=None, relay=None)


def plans_elsewhere(plans: Sequence[ServerPlan], node: NodeConfig, threads: int | None) -> list[ServerPlan]:
    """Plans of servers that run on other hosts than this process.

    Args:
        plans: The plans, as for this host.
        node: The configuration of the swarm's own node.
        threads: Torch's threads in each server; `None` for what its host has.

    Returns:
        The same, but each server listens on all interfaces of its host, if the swarm does not listen on this machine
        only, in the swarm's range of ports, if it has one.
    """
    host, port = split_address(node.listen)
    ports = ports_of(port)
    if not is_loopback(host):
        host = "::" if ":" in host else "0.0.0.0"
    shown = f"[{host}]" if ":" in host else host
    listen = f"tcp://{shown}:{port if ports is not None and len(ports) > 1 else '*'}"
    return [
        replace(plan, node=replace(plan.node, listen=listen), server=replace(plan.server, threads=threads))
        for plan in plans
    ]
