"""What to serve: the options of an expert, where the swarm has said something about them."""

from __future__ import annotations

import pytest

from labkit.directory.grids import GridInfo
from labkit.planning import fit_options

HUGE = GridInfo((4, 4), "ffn", {"hidden": 50_000})


def test_options_that_are_left_out_are_those_of_the_running_grid():
    assert fit_options("ffn", {}, "ffn", GridInfo((4, 4), "ffn", {"hidden": 64})) == {"hidden": 64}


def test_a_stranger_cannot_make_us_build_an_expert_that_fills_our_memory():
    with pytest.raises(ValueError, match=r"takes 223\.5 GiB .* give these options yourself"):
        fit_options("ffn", {}, "ffn", HUGE)
    assert fit_options("ffn", {"hidden": 50_000}, "ffn", HUGE) == {"hidden": 50_000}


@pytest.mark.parametrize("hidden", [10**18, -5, "wide"])
def test_options_of_which_no_expert_can_be_made_are_refused(hidden):
    with pytest.raises(ValueError, match="hidden"):
        fit_options("ffn", {}, "ffn", GridInfo((4, 4), "ffn", {"hidden": hidden}))
