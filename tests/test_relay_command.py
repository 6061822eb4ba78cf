"""`labkit relay` and `labkit serve --relay` as a person at a terminal has them."""

from __future__ import annotations

import signal

import pytest

from labkit.__main__ import main
from labkit.node import NodeConfig
from labkit.swarm import Swarm
from tests.commands import run_until_signalled
from tests.ports import free_ports
from tests.swarms import eventually


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_labkit_relay_relays_until_it_is_told_to_stop(number):
    said: list[str] = []

    def be_relayed(relay: Swarm) -> None:
        with Swarm.join(relay.invite(), name="hidden", node=NodeConfig(hidden=True)) as hidden:
            said.append(hidden.relaying)
            eventually(lambda: relay.relaying == "relays for 1 node")

    status, printed = run_until_signalled(["relay", "--secure", "--clients", "1"], number, be_relayed)
    assert status == 0
    assert "invitation: labkit://" in printed and "relaying until Ctrl-C" in printed
    assert said[0].startswith("it takes no connections itself: relayed by 127.0.0.1:")


def test_labkit_serve_relays_if_it_is_told_to():
    said: list[str] = []
    arguments = ["serve", "--expert", "nop", "--experts", "1", "--relay", "--quiet"]
    status, _ = run_until_signalled(arguments, signal.SIGTERM, lambda swarm: said.append(swarm.relaying))
    assert status == 0 and said == ["relays for 0 nodes"]


def test_who_relays_at_one_port_is_told_that_callers_come_to_others(caplog):
    said = "open a range of ports and listen there: tcp://0.0.0.0:31000-31099"
    port = free_ports()
    status, _ = run_until_signalled(["relay", "--listen", f"tcp://0.0.0.0:{port}"], signal.SIGTERM)
    assert status == 0
    assert caplog.text.count(said) == 1 and f"this relay listens at port {port}, but" in caplog.text


@pytest.mark.parametrize(
    ("listen", "relays", "told"),
    [
        ("tcp://0.0.0.0:{}", True, True),
        ("tcp://[::]:{}", True, True),
        ("tcp://0.0.0.0:{}-{}", True, True),
        ("tcp://0.0.0.0:{}", False, False),
        ("tcp://127.0.0.1:{}", True, False),
        ("tcp://0.0.0.0:*", True, False),
        ("tcp://0.0.0.0:20000-29999", True, False),
    ],
)
def test_so_is_who_calls_it_a_swarm_and_nobody_else(caplog, listen, relays, told):
    port = free_ports()
    with Swarm("relays", listen=listen.format(port, port), relay=relays):
        assert (f"this relay listens at port {port}" in caplog.text) is told


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
