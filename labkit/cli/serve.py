"""`labkit serve`: expert servers from a terminal, in a new swarm or in one that is running, until Ctrl-C."""

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

DEFAULT_HIDDEN = 64
DEFAULT_EXPERTS = 8


def serve(options: argparse.Namespace) -> None:
    """Start or join a swarm, serve experts in this process, print the invitation, and stay until stopped.

    Ctrl-C or SIGTERM is a clean stop: the experts are saved, where there is a directory for it. A second one does not
    wait for that. Raises `ValueError`, and a kind of `LabkitError` that says why a swarm could not be joined, or why
    the server ended.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        _serve(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve(options: argparse.Namespace) -> None:
    with _swarm(options) as swarm:
        try:
            (server,) = swarm.serve(options.expert, isolation="task", **_what(options, swarm))
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _swarm(options: argparse.Namespace) -> Swarm:
    """Start or join one."""
    given = {
        "listen": options.listen,
        "announce": options.announce,
        "secure": options.secure or None,
        "key": options.key,
    }
    how: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if options.join is None:
        return Swarm("serve", members=options.member, **how)
    if options.member:
        raise ValueError("--member is for whoever starts a private swarm: leave it out with --join")
    return Swarm.join(options.join, name="serve", **how)


def _what(options: argparse.Namespace, swarm: Swarm) -> dict[str, Any]:
    """The arguments of `Swarm.serve`."""
    what: dict[str, Any] = {
        "grid": options.grid,
        "experts": options.experts,
        "name": options.name,
        "checkpoint_dir": options.checkpoint_dir,
        "checkpoint_period": options.checkpoint_period,
        "backend": BackendConfig(lr=options.lr, device=options.device),
    }
    new = grid_name(options.expert, options.name, None) not in swarm.grids()
    if new and options.experts is None and options.grid is None:
        what["experts"] = DEFAULT_EXPERTS
    if options.hidden is not None:
        what["hidden"] = options.hidden
    elif new and options.expert in BUILTIN_KINDS:
        what["hidden"] = DEFAULT_HIDDEN
    return what
