"""A command of labkit that is run in this process, and ended as by a person at a terminal."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout

from labkit.__main__ import main
from labkit.swarm import Swarm
from labkit.swarm_lifecycle import _open
from tests.swarms import eventually

UP = "until Ctrl-C"  # the end of what a command prints when all is up


def run_until_signalled(
    arguments: Sequence[str], number: signal.Signals, action: Callable[[Swarm], object] = lambda swarm: None
) -> tuple[int, str]:
    """Run a command; once it is up, do something with its swarm, and then send it a signal.

    Args:
        arguments: Of the command; the first is its name, and that of the swarm that it opens.
        number: The signal.
        action: What is done with the swarm.

    Returns:
        The command's status, and what it has printed.
    """
    printed = io.StringIO()

    def act() -> None:
        try:
            eventually(lambda: UP in printed.getvalue())
            swarm = _open[arguments[0]]
            assert isinstance(swarm, Swarm)
            action(swarm)
        finally:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=act)
    with redirect_stdout(printed):
        thread.start()
        status = main(arguments)
        thread.join()
    return status, printed.getvalue()
