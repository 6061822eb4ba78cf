"""`labkit serve`: serve experts from a terminal, in a new swarm or in one that is running, until Ctrl-C.

What a notebook does with `Swarm()` or `Swarm.join`, and then `swarm.serve`, with options of a command line.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from types import FrameType
from typing import Any

from labkit.errors import ServerFailed
from labkit.launch.planning import grid_name
from labkit.server.layers import BUILTIN_KINDS
from labkit.server.optimizer import BackendConfig
from labkit.swarm import Swarm

DEFAULT_HIDDEN = 64  # width of the experts of a new grid
DEFAULT_EXPERTS = 8  # of a new grid


def serve(options: argparse.Namespace) -> None:
    """Start or join a swarm, serve experts in this process, print the invitation, and stay until stopped.

    Ctrl-C or SIGTERM is a clean stop: the experts are saved, if there is a folder for it. A second one does not wait
    for that.

    Args:
        options: The options of `labkit serve`.

    Raises:
        ValueError: An option is wrong.
        LabkitError: The swarm could not be joined, or the server has ended by itself. The message says why.
    """
    before = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        _serve_until_stopped(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve_until_stopped(options: argparse.Namespace) -> None:
    with _open_swarm(options) as swarm:
        try:
            (server,) = swarm.serve(options.expert, isolation="task", **_serve_arguments(options, swarm))
            print(repr(swarm))
            invitation = swarm.invite()
            print(f"\ninvitation: {invitation}")
            if invitation.note:
                print(invitation.note)
            print(f"to see it as a web page: labkit watch {shlex.quote(invitation)}")
            print("serving until Ctrl-C", flush=True)
            raise ServerFailed(f"the server ended: {server.wait() or server.state}")
        except KeyboardInterrupt:
            print("stopping …", file=sys.stderr)
            for server in swarm.servers:
                server.stop()


def _raise_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _open_swarm(options: argparse.Namespace) -> Swarm:
    """Start or join a swarm."""
    given = {
        "listen": options.listen,
        "announce": options.announce,
        "secure": options.secure or None,
        "key": options.key,
    }
    network: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if options.join is None:
        return Swarm("serve", members=options.member, **network)
    if options.member:
        raise ValueError("--member is for whoever starts a private swarm: leave it out with --join")
    return Swarm.join(options.join, name="serve", **network)


def _serve_arguments(options: argparse.Namespace, swarm: Swarm) -> dict[str, Any]:
    """The arguments of `Swarm.serve`."""
    arguments: dict[str, Any] = {
        "grid": options.grid,
        "experts": options.experts,
        "name": options.name,
        "checkpoint_dir": options.checkpoint_dir,
        "checkpoint_period": options.checkpoint_period,
        "backend": BackendConfig(lr=options.lr, device=options.device),
    }
    new = grid_name(options.expert, options.name, None) not in swarm.grids()
    if new and options.experts is None and options.grid is None:
        arguments["experts"] = DEFAULT_EXPERTS
    if options.hidden is not None:
        arguments["hidden"] = options.hidden
    elif new and options.expert in BUILTIN_KINDS:
        arguments["hidden"] = DEFAULT_HIDDEN
    return arguments
