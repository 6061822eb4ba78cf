"""The benchmarks: what they print, and that they measure what they say. How fast it is, is for who runs them."""

from __future__ import annotations

import json

import pytest

from labkit.__main__ import main
from labkit.experiments.expert_search import SearchConfig, measure


def test_a_search_among_simulated_nodes_takes_round_trips_when_cold_and_no_time_when_warm(capsys):
    assert main(["bench", "search", "--nodes", "12", "--grid", "4", "4", "--searches", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) >= {
        "nodes", "virtual_ms_cold", "virtual_ms_warm", "rpcs_per_search", "recall", "wall_s", "peak_rss_mb",
    }  # fmt: skip
    assert set(result["virtual_ms_cold"]) == {"mean", "p50", "p95"}
    assert 92 <= result["virtual_ms_cold"]["mean"] <= 5 * 92
    assert result["virtual_ms_warm"]["mean"] <= 1.0
    assert result["recall"] == 1.0
    assert result["rpcs_per_search"] >= 2


def test_a_seed_gives_the_same_searches_twice():
    def of(seed: int) -> object:
        result = measure(SearchConfig(nodes=12, grid=(4, 4), k_best=2, searches=4, seed=seed))
        return result["virtual_ms_cold"], result["rpcs_per_search"]

    assert of(1) == of(1) != of(2)


@pytest.mark.parametrize("trouble", [{"dead": 0.2}, {"churn": 1.0}])
def test_what_is_left_is_found_when_nodes_die_and_when_they_come_and_go(trouble):
    result = measure(SearchConfig(nodes=12, grid=(4, 4), k_best=2, searches=4, **trouble))
    assert result["recall"] == 1.0  # all nodes hold each record


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (["--nodes", "1"], "nodes=1"),
        (["--grid", "4", "0"], "grid="),
        (["--grid", "2", "2", "--k-best", "5"], "k_best=5: the grid has 4 experts"),
        (["--rtt-ms", "-1"], "rtt_ms=-1"),
        (["--dead", "1"], "dead=1"),
        (["--churn", "-1"], "churn=-1"),
        (["--churn", "1", "--dead", "0.1"], "churn=1"),
        (["--nodes", "2", "--dead", "0.9"], "dead=0.9"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_the_name_of_the_option(option, complaint, capsys):
    assert main(["bench", "search", *option]) == 1
    assert complaint in capsys.readouterr().err
