"""What to serve: the options of an expert, where the swarm has said something about them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labkit.directory.grids import GridInfo
from labkit.launch.planning import check_all_places, fit_options, plan_servers
from labkit.node import NodeConfig
from labkit.server.config import ServerConfig
from labkit.wire.addresses import announced_address
from tests.fake_network import make_contact

HUGE = GridInfo((4, 4), "ffn", {"hidden": 50_000})


def test_options_that_are_left_out_are_those_of_the_running_grid():
    assert fit_options("ffn", {}, "ffn", GridInfo((4, 4), "ffn", {"hidden": 64})) == {"hidden": 64}


def test_a_stranger_cannot_make_us_build_an_expert_that_fills_our_memory():
    with pytest.raises(ValueError, match=r"takes 223\.5 GiB .* give these options yourself"):
        fit_options("ffn", {}, "ffn", HUGE)
    assert fit_options("ffn", {"hidden": 50_000}, "ffn", HUGE) == {"hidden": 50_000}


def test_a_stranger_cannot_make_us_build_so_many_experts_that_they_fill_our_memory():
    with pytest.raises(ValueError, match=r"the 1024 free places of the grid 'ffn' take 96\.1 GiB.*experts=…"):
        check_all_places("ffn", {"hidden": 1024}, "ffn", 1024)
    check_all_places("ffn", {"hidden": 1024}, "ffn", 40)


@pytest.mark.parametrize(
    ("announce", "host"),
    [("host:7", "host"), ("host", "host"), *((text, "fd00::5") for text in ("fd00::5", "[fd00::5]", "[fd00::5]:7"))],
)
def test_servers_are_announced_at_the_host_of_the_swarm_with_ports_of_their_own(announce, host):
    config = ServerConfig(uids=("ffn.0", "ffn.1"), grid=(2,), kind="ffn", options={"hidden": 4})
    node = replace(NodeConfig(), announce=announce)
    plans = plan_servers(config, 2, node, make_contact(0), member_file=None, lasting=False)
    assert [announced_address(plan.node.announce, "0.0.0.0", port) for port, plan in enumerate(plans)] == [
        (host, 0), (host, 1)
    ]  # fmt: skip


def test_a_transformer_without_heads_is_refused_whoever_says_so():
    with pytest.raises(ValueError, match="heads=0: a whole number"):
        fit_options("transformer", {}, "t", GridInfo((2,), "transformer", {"hidden": 8, "heads": 0}))


@pytest.mark.parametrize("hidden", [10**18, -5, "wide"])
def test_options_of_which_no_expert_can_be_made_are_refused(hidden):
    with pytest.raises(ValueError, match="hidden"):
        fit_options("ffn", {}, "ffn", GridInfo((4, 4), "ffn", {"hidden": hidden}))
