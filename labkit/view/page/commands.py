"""What a dashboard's buttons order: checked, since it comes from a page or from another node, and carried out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from labkit.errors import LabkitError
from labkit.training.run import latest_run

if TYPE_CHECKING:
    from labkit.launch.handle import ServerHandle
    from labkit.swarm import Swarm

MAX_SERVERS, MAX_LATENCY = 10_000, 3600.0
FORMATS = ("png", "html", "json")


def check_order(order: object) -> dict[str, Any]:
    """The known part of an order (`ButtonCommand` in frontend/src/types.ts). Raises `ValueError`."""
    if not isinstance(order, Mapping):
        raise ValueError("an order is a mapping")
    do = order.get("do")
    if do in ("kill", "stop", "restart"):
        return {"do": do, "server": _server(order)}
    if do == "faults":
        server = None if order.get("server") is None else _server(order)
        latency, loss = _number(order, "latency", MAX_LATENCY), _number(order, "loss", 1.0)
        return {"do": do, "server": server, "latency": latency, "loss": loss}
    if do == "stop_run":
        return {"do": do}
    if do == "export" and order.get("format") in FORMATS:
        return {"do": do, "format": order["format"]}
    raise ValueError("this is no order that a dashboard knows")


def _server(order: Mapping[str, Any]) -> int:
    server = order.get("server")
    if not isinstance(server, int) or isinstance(server, bool) or not 0 <= server < MAX_SERVERS:
        raise ValueError("`server` is the number of a server in `swarm.servers`")
    return server


def _number(order: Mapping[str, Any], name: str, most: float) -> float | None:
    value = order.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:  # nor NaN
        raise ValueError(f"`{name}` is a number between 0 and {most:g}")
    return float(value)


def carry_out(swarm: Swarm, order: Mapping[str, Any]) -> str:
    """Do what a checked order says. Returns a sentence; exports are not done here. What happens to servers is marked
    by the view, whoever did it; the rest is marked here.

    Blocks until it is done; where a server is to end or to begin, until that has begun: it may have experts to save.
    Raises `ValueError`, `LabkitError`.
    """
    match order["do"]:
        case "kill":
            _find(swarm, order).kill(wait=False)
            done = f"servers[{order['server']}] killed"
        case "stop":
            _find(swarm, order).stop(wait=False)
            done = f"servers[{order['server']}] stopped"
        case "restart":
            _find(swarm, order).restart(wait=False)
            done = f"servers[{order['server']}] restarted"
        case "faults":
            done = _inject(swarm, order)
            swarm.telemetry.mark(done)
        case "stop_run":
            done = _stop_run(swarm.name)
            swarm.telemetry.mark(done)
        case _:
            raise ValueError("a swarm cannot do that")
    return done


def _find(swarm: Swarm, order: Mapping[str, Any]) -> ServerHandle:
    number, servers = order["server"], swarm.servers
    if number >= len(servers):
        raise ValueError(f"there is no servers[{number}]: {len(servers)} were started here")
    server: ServerHandle = servers[number]
    return server


def _inject(swarm: Swarm, order: Mapping[str, Any]) -> str:
    latency, loss = order["latency"], order["loss"]
    if order["server"] is None:
        faults, whose = swarm.faults(latency, loss), "all servers"
    else:
        faults, whose = _find(swarm, order).faults(latency, loss), f"servers[{order['server']}]"
    return f"{whose}: latency {faults.latency:g} s, loss {faults.loss:.0%}"


def _stop_run(name: str) -> str:
    run = latest_run(name)
    if run is None or not run.running:
        raise ValueError("no run is training over this swarm")
    run.stop()
    if run.running:
        raise LabkitError("the run was told to stop, but its last batches are not done yet")
    return f"run stopped after {run.steps:,} of {run.total_steps:,} steps"
