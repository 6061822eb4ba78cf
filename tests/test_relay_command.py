"""`labkit relay` and `labkit serve --relay` as a person at a terminal has them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from labkit.__main__ import main
from labkit.node import NodeConfig
from labkit.swarm import Swarm
from labkit.swarm_lifecycle import _open
from tests.swarms import eventually


def end_with_a_signal_after(name: str, action: Callable[[Swarm], None], number: signal.Signals) -> threading.Thread:
    """Do something with the swarm that a command opens in this process, and end the command then."""

    def run() -> None:
        swarm = eventually(lambda: _open.get(name))
        assert isinstance(swarm, Swarm)
        try:
            action(swarm)
        finally:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_labkit_relay_relays_until_it_is_told_to_stop(capsys, number):
    said: list[str] = []

    def be_relayed(relay: Swarm) -> None:
        with Swarm.join(relay.invite(), name="hidden", node=NodeConfig(hidden=True)) as hidden:
            said.extend((hidden.relaying, relay.relaying))

    thread = end_with_a_signal_after("relay", be_relayed, number)
    assert main(["relay", "--secure", "--clients", "1"]) == 0
    thread.join()
    printed = capsys.readouterr().out
    assert "invitation: labkit://" in printed and "relaying until Ctrl-C" in printed
    assert said[0].startswith("it takes no connections itself: relayed by 127.0.0.1:")
    assert said[1] == "relays for 1 node"


def test_labkit_serve_relays_if_it_is_told_to():
    said: list[str] = []

    def read(swarm: Swarm) -> None:
        eventually(lambda: swarm.servers)
        said.append(swarm.relaying)

    thread = end_with_a_signal_after("serve", read, signal.SIGTERM)
    assert main(["serve", "--expert", "nop", "--experts", "1", "--relay", "--quiet"]) == 0
    thread.join()
    assert said == ["relays for 0 nodes"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--clients", "0"], "--clients 0: a number above 0"),
        (["--connections", "-1"], "--connections -1: a number above 0"),
        (["--mb-per-s", "nan"], "--mb-per-s nan: a number above 0"),
        (["--join", "127.0.0.1:4000"], "an invitation looks like"),
        (["--listen", "4000"], "tcp://HOST:PORT"),
    ],
)
def test_an_option_of_labkit_relay_that_cannot_be_is_a_line_that_says_so(capsys, arguments, text):
    assert main(["relay", *arguments]) == 1
    printed = capsys.readouterr().err
    assert text in printed and printed.count("\n") == 1
