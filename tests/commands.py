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

    def act(swarm: Swarm) -> None:
        action(swarm)
        os.kill(os.getpid(), number)

    return run_until_ended(arguments, act)


def run_until_ended(arguments: Sequence[str], end: Callable[[Swarm], object]) -> tuple[int, str]:
    """Run a command; once it is up, do something with its swarm that ends it.

    Args:
        arguments: Of the command; the first is its name, and that of the swarm that it opens.
        end: What ends it. It runs in another thread; what it raises is raised.

    Returns:
        The command's status, and what it has printed.
    """
    printed, failures, over = io.StringIO(), list[BaseException](), threading.Event()

    def act() -> None:
        try:
            eventually(lambda: UP in printed.getvalue() or over.is_set())
            swarm = _open.get(arguments[0])
            assert isinstance(swarm, Swarm)
            end(swarm)
        except BaseException as failure:
            failures.append(failure)
            if not over.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=act)
    with redirect_stdout(printed):
        thread.start()
        status = main(arguments)
        over.set()
        thread.join()
    if failures:
        raise failures[0]
    return status, printed.getvalue()
