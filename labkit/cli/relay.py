"""`labkit relay`: relay for nodes that take no connections, in a new swarm or in one that is running, until Ctrl-C.

What `Swarm(relay=True)` does, with options of a command line. Now and then it says how much it relays.
"""

from __future__ import annotations

import argparse
import sys
import time

from labkit.cli.serve import open_swarm, print_invitation
from labkit.cli.terminal import output_is_read
from labkit.errors import LabkitError
from labkit.relay.limits import RelayLimits
from labkit.swarm import Swarm

REPORT_PERIOD = 30.0  # seconds between two lines that say how it goes
LOOK_PERIOD = 1.0  # seconds between two looks whether somebody still reads the output


def relay(options: argparse.Namespace) -> None:
    """Start or join a swarm, relay in it, print the invitation, and stay until stopped, as by Ctrl-C.

    Args:
        options: The options of `labkit relay`.

    Raises:
        ValueError: An option is wrong.
        LabkitError: The swarm could not be started or joined, or has ended. The message says why.
    """
    limits = RelayLimits(clients=options.clients, connections=options.connections, mb_per_s=options.mb_per_s)
    with open_swarm(options, "relay", relay=limits) as swarm:
        try:
            print(repr(swarm))
            print_invitation(swarm)
            print("relaying until Ctrl-C", flush=True)
            said, due = "", time.monotonic() + REPORT_PERIOD
            while not swarm.closed:
                time.sleep(LOOK_PERIOD)
                if not output_is_read():
                    return
                if not options.quiet and time.monotonic() >= due and (now := _words(swarm)) != said:
                    said, due = now, time.monotonic() + REPORT_PERIOD
                    print(f"{time.strftime('%H:%M:%S')}  {said}", flush=True)
        except KeyboardInterrupt:
            print("stopping …", file=sys.stderr)
            return
    raise LabkitError("the relay has ended by itself; labkit --verbose relay says more")


def _words(swarm: Swarm) -> str:
    return swarm.relaying
