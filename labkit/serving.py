"""`labkit serve`: expert servers from a terminal, in a new swarm or in one that is running, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from types import FrameType

from labkit.server.optimizer import BackendConfig
from labkit.swarm import Swarm

DEFAULT_HIDDEN = 64
DEFAULT_EXPERTS = 8


def serve(options: argparse.Namespace) -> None:
    """Start or join a swarm, serve experts in this process, print the invitation, and stay until stopped.

    Ctrl-C or SIGTERM is a clean stop: the experts are saved, where there is a directory for it. Raises `ValueError`,
    and a kind of `LabkitError` that says why a swarm could not be joined.
    """
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    how = {"listen": options.listen, "announce": options.announce, "secure": options.secure or None, "key": options.key}
    if options.join is None:
        swarm = Swarm("serve", members=options.member, **how)
    else:
        if options.member:
            raise ValueError("--member is for the swarm's owner: leave it out with --join")
        swarm = Swarm.join(options.join, name="serve", **{key: value for key, value in how.items() if value is not None})
    with swarm:
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        swarm.serve(options.expert, isolation="task", **_what(options, swarm))
        print(repr(swarm))
        invitation = swarm.invite()
        print(f"\ninvitation: {invitation}")
        if invitation.note:
            print(invitation.note)
        print("serving until Ctrl-C", flush=True)
        while not stopped.wait(0.2):
            if not swarm.servers[0].alive:
                print(f"labkit: the server ended: {swarm.servers[0].failure}", file=sys.stderr)
                return
        print("stopping …", file=sys.stderr)
        swarm.servers[0].stop()


def _what(options: argparse.Namespace, swarm: Swarm) -> dict[str, object]:
    """The arguments of `Swarm.serve`."""
    known = swarm.grids()
    name = options.name or options.expert
    what: dict[str, object] = {
        "grid": options.grid,
        "experts": options.experts,
        "name": options.name,
        "checkpoint_dir": options.checkpoint_dir,
        "checkpoint_period": options.checkpoint_period,
        "backend": BackendConfig(lr=options.lr, device=options.device),
    }
    if options.experts is None and options.grid is None and name not in known:
        what["experts"] = DEFAULT_EXPERTS
    if options.hidden is not None:
        what["hidden"] = options.hidden
    elif name not in known and options.expert in ("ffn", "transformer"):
        what["hidden"] = DEFAULT_HIDDEN
    return what
