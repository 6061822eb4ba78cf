"""The commands of a dashboard's buttons: checked, since they come from a page or from another node, and executed.

From a click to a server: `pages`, or `remote_service` for a page in another process, takes a command; the swarm's view
checks it and hands it to the `CommandExecutor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from labkit.errors import LabkitError
from labkit.faults import Faults
from labkit.launch.handle import ServerHandle
from labkit.training.run import latest_run
from labkit.view.collect.telemetry import Telemetry

SERVER_NUMBER_LIMIT = 10_000  # the number of a server in a command is below it
MAX_LATENCY = 3600.0  # seconds
EXPORT_FORMATS = ("png", "html", "json")


def check_command(command: object) -> dict[str, Any]:
    """Returns the known part of a command (`ButtonCommand` in frontend/src/types.ts). Raises `ValueError`."""
    if not isinstance(command, Mapping):
        raise ValueError("a command is a mapping")
    do = command.get("do")
    if do in ("kill", "stop", "restart"):
        return {"do": do, "server": _server(command)}
    if do == "faults":
        server = None if command.get("server") is None else _server(command)
        latency, loss = _number(command, "latency", MAX_LATENCY), _number(command, "loss", 1.0)
        return {"do": do, "server": server, "latency": latency, "loss": loss}
    if do == "stop_run":
        return {"do": do}
    if do == "export" and command.get("format") in EXPORT_FORMATS:
        return {"do": do, "format": command["format"]}
    raise ValueError("this is no command that a dashboard knows")


def _server(command: Mapping[str, Any]) -> int:
    server = command.get("server")
    if not isinstance(server, int) or isinstance(server, bool) or not 0 <= server < SERVER_NUMBER_LIMIT:
        raise ValueError("`server` is the number of a server in `swarm.servers`")
    return server


def _number(command: Mapping[str, Any], name: str, maximum: float) -> float | None:
    value = command.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= maximum:  # nor NaN
        raise ValueError(f"`{name}` is a number between 0 and {maximum:g}")
    return float(value)


class CommandExecutor:
    """Executes commands on the servers and the run of one swarm.

    Args:
        swarm: The swarm's name, by which its latest run is found.
        servers: The servers started here, as in `swarm.servers`; the list may grow.
        telemetry: Gets a mark for injected faults and for a stopped run. What happens to servers is marked by the
            view, whoever caused it.
        inject_faults: Sets latency and loss of all servers, as `Swarm.faults` does.
    """

    def __init__(
        self, swarm: str, servers: Sequence[ServerHandle], telemetry: Telemetry,
        inject_faults: Callable[[float | None, float | None], Faults],
    ) -> None:  # fmt: skip
        self._swarm = swarm
        self._servers = servers
        self._telemetry = telemetry
        self._inject_faults = inject_faults

    def execute(self, command: Mapping[str, Any]) -> str:
        """Execute a checked command, other than an export. Returns a sentence that says what was done.

        Blocks until it is done; where a server is to end or to start, until that has begun, since it may have experts
        to save. Raises `ValueError`, `LabkitError`.
        """
        match command["do"]:
            case "kill":
                self._find(command).kill(wait=False)
                done = f"servers[{command['server']}] killed"
            case "stop":
                self._find(command).stop(wait=False)
                done = f"servers[{command['server']}] stopped"
            case "restart":
                self._find(command).restart(wait=False)
                done = f"servers[{command['server']}] restarted"
            case "faults":
                done = self._inject(command)
                self._telemetry.mark(done)
            case "stop_run":
                done = self._stop_run()
                self._telemetry.mark(done)
            case _:
                raise ValueError("a swarm cannot do that")
        return done

    def _find(self, command: Mapping[str, Any]) -> ServerHandle:
        number = command["server"]
        if number >= len(self._servers):
            raise ValueError(f"there is no servers[{number}]: {len(self._servers)} were started here")
        server: ServerHandle = self._servers[number]
        return server

    def _inject(self, command: Mapping[str, Any]) -> str:
        latency, loss = command["latency"], command["loss"]
        if command["server"] is None:
            faults, target = self._inject_faults(latency, loss), "all servers"
        else:
            faults, target = self._find(command).faults(latency, loss), f"servers[{command['server']}]"
        return f"{target}: latency {faults.latency:g} s, loss {faults.loss:.0%}"

    def _stop_run(self) -> str:
        run = latest_run(self._swarm)
        if run is None or not run.running:
            raise ValueError("no run is training over this swarm")
        run.stop()
        if run.running:
            raise LabkitError("the run was told to stop, but its last batches are not done yet")
        return f"run stopped after {run.steps:,} of {run.total_steps:,} steps"
