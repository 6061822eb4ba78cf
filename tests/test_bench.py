"""The benchmarks: what they print, and that they measure what they say. How fast it is, is for who runs them."""

from __future__ import annotations

import json
import random
import sys
import time
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from labkit.__main__ import main
from labkit.bench import moe, rpc, suite
from labkit.bench.copies import middle
from labkit.bench.echo import MIN_ECHO_SECONDS, echo, echo_limit
from labkit.bench.processes import ProcessGroup, Worker
from labkit.bench.report import ratios_to, read_peer, show
from labkit.bench.suite import SuiteConfig, SuiteRow
from labkit.bench.suite import measure as measure_all
from labkit.bench.yardstick import at_equal_speed, open_yardstick
from labkit.contact import Contact
from labkit.errors import LabkitError
from labkit.experiments.expert_search import SearchConfig, measure
from labkit.experiments.results import measure_all as measure_searches

pytestmark = pytest.mark.usefixtures("forked_python")


@pytest.fixture(autouse=True)
def short_echoes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.bench.echo.MIN_ECHO_SECONDS", 0.05)


def test_a_search_among_simulated_nodes_takes_round_trips_when_cold_and_no_time_when_warm(capsys):
    assert main(["bench", "search", "--nodes", "12", "--grid", "4", "4", "--searches", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) >= {
        "nodes", "virtual_ms_cold", "virtual_ms_warm", "rpcs_per_search", "recall", "alive", "wall_s", "peak_rss_mb",
    }  # fmt: skip
    assert set(result["virtual_ms_cold"]) == {"mean", "p50", "p95"}
    assert 92 <= result["virtual_ms_cold"]["mean"] <= 5 * 92
    assert result["virtual_ms_warm"]["mean"] <= 1.0
    assert result["recall"] == 1.0
    assert result["rpcs_per_search"] >= 2


def test_searches_from_one_place_are_counted_one_by_one():
    few, many = (measure(SearchConfig(nodes=8, grid=(4, 4), k_best=2, searches=n))["rpcs_per_search"] for n in (8, 80))
    assert many == pytest.approx(few, rel=0.2)


def test_searches_are_measured_once_each_in_a_process_of_its_own_whose_hashes_may_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "12")  # of the process, and here it is another
    path = tmp_path / "results.jsonl"
    configs = [SearchConfig(nodes=30, grid=(8, 8), searches=2), SearchConfig(nodes=8, grid=(4, 4), searches=4)]
    here, known = map(measure, configs)
    path.write_text(json.dumps(known) + "\n")
    found = measure_searches(configs, path)
    assert [result["nodes"] for result in found] == [30, 8] and all(result["recall"] == 1.0 for result in found)
    assert all(found[0][name] == here[name] for name in ("virtual_ms_cold", "rpcs_per_search"))
    assert measure_searches(configs[::-1], path) == found[::-1] and len(path.read_text().splitlines()) == 2


def test_a_seed_gives_the_same_searches_twice():
    def of(seed: int) -> object:
        result = measure(SearchConfig(nodes=12, grid=(4, 4), k_best=2, searches=4, seed=seed))
        return result["virtual_ms_cold"], result["rpcs_per_search"]

    assert of(1) == of(1) != of(2)


@pytest.mark.parametrize("trouble", [{"dead": 0.2}, {"churn": 1.0}])
def test_what_is_left_is_found_when_nodes_die_and_when_they_come_and_go(trouble):
    result = measure(SearchConfig(nodes=12, grid=(4, 4), k_best=2, searches=4, **trouble))
    assert result["recall"] == 1.0  # all nodes hold each record


def test_records_of_the_dead_are_found_and_counted_among_more_nodes_than_hold_a_record():
    result = measure(SearchConfig(nodes=30, grid=(6, 6), searches=20, dead=0.3))
    assert result["recall"] >= 0.99
    assert 0.4 < result["alive"] < 0.95


def test_opening_connections_takes_time_where_it_is_counted():
    free, counted = (measure(SearchConfig(nodes=30, grid=(4, 4), searches=10, handshake=n)) for n in (0.0, 2.0))
    assert counted["virtual_ms_cold"]["mean"] > 1.1 * free["virtual_ms_cold"]["mean"]


def bench(*options: str) -> dict[str, Any]:
    """What `labkit bench` prints on its last line."""
    with redirect_stdout(StringIO()) as said:
        assert main(["bench", *options, "--json"]) == 0
    result: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
    return result


@cache
def three_clients() -> dict[str, Any]:
    """What is measured with three clients in two processes, beside what a peer measured."""
    options = ["--batch", "2", "--hidden", "8", "--calls", "20", "--clients", "3"]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpc, "MAX_CLIENT_PROCESSES", 2)
        peer = Path(folder, "peer.json")
        peer.write_text('a line that is none\n{"calls_per_s": 10.0, "samples_per_s": 20.0}\n')
        return bench("rpc", *options, "--peer-json", str(peer))


def test_calls_are_measured_beside_a_bare_echo_of_the_same_messages():
    result = three_clients()
    assert result["samples_per_s"] == pytest.approx(2 * result["calls_per_s"], rel=0.01)
    assert result["of_limit"] == pytest.approx(result["calls_per_s"] / result["limit_per_s"], abs=0.01)
    assert 0 < result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"]
    assert result["calls_per_s_to_peer"] == pytest.approx(result["calls_per_s"] / 10, abs=0.01)
    assert result["server_rss_mb"] >= 0 and result["client_rss_mb"] >= 0


def test_many_clients_share_processes():
    result = three_clients()
    assert result["calls_per_s"] > 0 and result["fairness"] >= 1
    assert result["lookup_us_per_expert"] == pytest.approx(1000 * result["lookup_ms"] / 4, rel=0.01)


def test_calls_that_train_may_be_encrypted_and_compressed_and_several_servers_have_the_experts():
    options = ["--expert", "ffn", "--backward", "--secure", "--codec", "blockwise8", "--hidden", "64", "--batch", "2"]
    result = bench("rpc", *options, "--experts", "3", "--servers", "2", "--calls", "5", "--clients", "1")
    assert result["calls_per_s"] > 0 and result["limit_per_s"] > 0
    assert result["rows_per_batch"] == 2, "one client's"
    assert result["fairness"] >= 1 and result["lookup_us_per_expert"] > 0
    numbers = 64 * 256 + 256 * 256 + 256 * 64 + (256 + 512) * 2 + 64  # weights, then biases with what LayerNorm has
    assert result["server_state_mb"] == pytest.approx(2 * 3 * 4 * numbers / 2**20, abs=0.06), (
        "two experts, with moments"
    )


def test_calls_through_a_relay_are_measured_beside_direct_ones(monkeypatch):
    measure_rpc = rpc.measure
    directly = {"calls_per_s": 1000.0}  # the same without a relay, which other tests measure
    monkeypatch.setattr(rpc, "measure", lambda config: measure_rpc(config) if config.relay else directly)
    monkeypatch.setattr(rpc, "_limit", lambda config, rows: 1.0)
    result = bench("rpc", "--relay", "--experts", "1", "--hidden", "64", "--calls", "5", "--clients", "1")
    assert result["secure"] and result["of_direct"] > 0
    assert result["of_direct"] == pytest.approx(result["calls_per_s"] / 1000, abs=0.01)
    assert result["relay_held_kb"] >= 1


def test_the_echo_takes_a_second_at_least_and_counts_all_clients(monkeypatch):
    assert MIN_ECHO_SECONDS == 1.0
    monkeypatch.setattr("labkit.bench.echo.MIN_ECHO_SECONDS", 0.2)
    told = echo([([8], 1), ([8, 8], 1)], clients=[2, 1], calls=3)
    assert len(told) == 3
    assert all(calls > 3 and seconds >= 0.2 for calls, seconds in told), "three calls are soon made"
    ((calls, _),) = echo([([8], 1)], servers=2, calls=1, secure=True)
    assert calls > 1


def test_the_limit_adds_up_what_clients_made_each_in_its_time(monkeypatch):
    monkeypatch.setattr("labkit.bench.echo.echo", lambda *exchanges, **how: [(10, 1.0), (30, 2.0)])
    assert echo_limit([([8], 1)], clients=[1, 1], calls=10) == 25.0


def test_the_limit_has_the_clients_of_the_calls_and_sends_what_the_codec_makes_of_tensors(monkeypatch):
    asked = []
    monkeypatch.setattr(rpc, "echo_limit", lambda exchanges, **how: asked.append((exchanges, how["clients"])))
    rpc._limit(rpc.RPCConfig(batch=2, hidden=256, clients=10, backward=True, codec="blockwise8"), 2.0)
    size = 2 * (256 + 4)  # a byte a number, and a scale for each block of 256
    assert asked == [([([size], 1), ([size, size], 1)], [2, 2, 1, 1, 1, 1, 1, 1])]


def test_a_layer_is_measured_beside_the_same_arithmetic_without_a_network():
    options = ["--batch", "8", "--hidden", "8", "--side", "2", "--k-best", "2", "--passes", "2"]
    result = bench("moe", *options, "--secure")
    seconds = result["forward_s"] + result["backward_s"]
    assert result["of_limit"] == pytest.approx(result["limit_s"] / seconds, abs=0.01)
    assert result["samples_per_s"] == pytest.approx(8 / seconds, rel=0.05)


def test_records_are_measured_among_nodes_in_processes_of_their_own_that_encrypt_if_told_to(monkeypatch):
    joined: list[str] = []
    start = ProcessGroup.start

    def note(group: ProcessGroup, role: str, *orders: Any) -> list[Worker]:
        joined.extend(order["join"] for order in orders if role == "dht:live" and order["join"])
        return start(group, role, *orders)

    monkeypatch.setattr(ProcessGroup, "start", note)
    result = bench("dht", "--peers", "3", "--rounds", "4", "--secure")
    assert result["found"] == 1.0
    assert all(result[name] > 0 for name in ("store_s", "get_s", "get_any_s", "store_limit_s"))
    assert len(joined) == 2 and all(Contact.from_invitation(invitation).secure for invitation in joined)


def test_the_interval_around_a_mean_of_ratios_holds_the_true_one_nineteen_times_of_twenty():
    draw = random.Random(0)
    means = [middle([draw.gauss(1.0, 0.1) for _ in range(12)]) for _ in range(1000)]
    assert 930 < sum(abs(mean - 1.0) <= within for mean, within in means if within) < 970
    assert middle([0.9]) == (0.9, None)


def test_a_ratio_of_pairs_at_equal_speed_is_found_on_a_machine_whose_speed_varies_ten_times_as_much():
    draw = random.Random(0)
    found = []
    for _ in range(1000):
        speeds = [draw.lognormvariate(0.0, 0.1) for _ in range(12)]
        found.append(at_equal_speed([0.98 * speed**1.2 * draw.lognormvariate(0.0, 0.01) for speed in speeds], speeds))
    assert 930 < sum(abs(ratio - 0.98) <= within < 0.02 for ratio, within in filter(None, found)) < 970
    assert at_equal_speed([0.98] * 3, [1.0, 1.1, 0.9]) is None


def test_a_yardstick_measures_for_as_long_as_asked():
    with open_yardstick() as yardstick:
        began = time.monotonic()
        yardstick.begin(0.3)
        assert yardstick.speed() > 0
        assert time.monotonic() - began >= 0.3


def test_a_ratio_says_how_many_times_better_and_there_is_none_to_nothing():
    ratios = ratios_to({"calls_per_s": 20.0, "get_s": 0.2, "get_any_s": 0.05}, {"calls_per_s": 10.0, "get_s": 0.1})
    assert ratios == {"calls_per_s_to_peer": 2.0, "get_s_to_peer": 0.5, "get_any_s_to_peer": 2.0}
    assert ratios_to({"calls_per_s": 20.0, "get_s": 0.1}, {"calls_per_s": 0.0, "get_s": 0.0}) == {}


@pytest.mark.parametrize(
    ("options", "said", "complaint"),
    [
        ("rpc", "it failed", "not the output of a peer's script"),
        ("rpc", "[1]", "not the output of a peer's script"),
        ("rpc", '{"store_s": 0.1}', "it has none of calls_per_s, samples_per_s"),
        ("rpc", '{"work": {"batch": 512}, "calls_per_s": 1.0}', "with --batch 512, and here it is --batch 1"),
        ("rpc", '{"work": {"expert": "ffn"}, "calls_per_s": 1.0}', "with --expert ffn, and here it is --expert nop"),
        ("rpc --expert ffn", '{"work": {"expert": "ffn"}, "calls_per_s": 1.0}', "what is ffn there is ffn2 here"),
        ("rpc --codec float16", '{"calls_per_s": 1.0}', "with --codec none, and here it is --codec float16"),
        ("rpc --servers 2", '{"calls_per_s": 1.0}', "with --servers 1, and here it is --servers 2"),
        ("moe", '{"work": {"batch": 64}, "samples_per_s": 1.0}', "what is ffn there is ffn2 here"),
    ],
)
def test_a_peer_that_did_other_work_is_refused_before_anything_is_measured(
    tmp_path, capsys, monkeypatch, options, said, complaint
):
    monkeypatch.setattr(rpc, "measure", None)
    monkeypatch.setattr(moe, "measure", None)
    (tmp_path / "peer.json").write_text(said)
    assert main(["bench", *options.split(), "--peer-json", str(tmp_path / "peer.json")]) == 1
    told = capsys.readouterr().err
    assert f"--peer-json {tmp_path / 'peer.json'}: " in told and complaint in told


def test_a_peer_may_have_been_measured_for_longer_and_has_a_word_of_its_own_for_an_expert(tmp_path):
    (tmp_path / "peer.json").write_text('{"work": {"expert": "ffn", "calls": 9, "batch": 2}, "calls_per_s": 3}')
    options = {"expert": "ffn2", "calls": 5, "batch": 2, "secure": True}
    assert read_peer(str(tmp_path / "peer.json"), "rpc", options) == {"calls_per_s": 3.0}
    (tmp_path / "moe.json").write_text('{"work": {"batch": 2}, "forward_s": 3, "backward_s": 4, "samples_per_s": 5}')
    peer = read_peer(str(tmp_path / "moe.json"), "moe", {"expert": "ffn2", "batch": 2})
    ratios = {"forward_s_to_peer": 3.0, "backward_s_to_peer": 2.0, "samples_per_s_to_peer": 4.0}
    assert ratios_to({"forward_s": 1.0, "backward_s": 2.0, "samples_per_s": 20.0}, peer) == ratios


OURS = """
import json, random, sys
print("a line")
print(json.dumps({"asked": sys.argv[1:], "calls_per_s": random.uniform(20, 40)}))
"""


def test_all_of_it_is_measured_beside_a_peer_into_a_file_that_is_not_begun_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours.py").write_text(OURS)
    monkeypatch.setattr(suite, "python_command", lambda module, *options: [sys.executable, "ours.py", *options])
    (tmp_path / "peer.py").write_text('print("a line"); print(\'{"work": {"calls": 9}, "calls_per_s": 10.0}\')')
    options = "rpc --calls 5 --hidden 8 --clients 1 --experts 1"
    rows = [SuiteRow("small", options, "peer.py --calls 9"), SuiteRow("other", options, "small")]
    path = tmp_path / "results.jsonl"
    for runs in (1, 2):
        config = SuiteConfig(out=str(path), runs=runs, peer_scripts=str(tmp_path), only="small")
        result = measure_all(config, rows)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["who"] for line in lines] == ["labkit", "peer", "labkit", "peer"]
    assert all(line["asked"] == ["bench", *options.split(), "--json"] for line in lines[::2])
    rates = [line["calls_per_s"] for line in lines[::2]]
    assert result["small"]["runs"] == 2 and result["small"]["calls_per_s"] == pytest.approx(sum(rates) / 2)
    assert result["small"]["calls_per_s_to_peer"] == pytest.approx(sum(rates) / 20, abs=0.01)
    assert result["small"]["peer_runs"] == 2
    assert "other" not in result, "it was not asked for"
    assert measure_all(SuiteConfig(out=str(path), runs=2, only="small"), rows) == result


def test_the_median_of_figures_in_a_list_is_that_of_each(tmp_path):
    lines = [{"row": "slow", "who": "labkit", "block": "ffn", "per_s": [n, 10 * n], "all": [[n]]} for n in (1, 3, 9)]
    (tmp_path / "results").write_text("\n".join(map(json.dumps, lines)))
    [line] = suite.medians(tmp_path / "results", [SuiteRow("slow", "latency")])
    assert line == {"row": "slow", "runs": 3, "per_s": [3, 30], "all": [[3]]}


def test_medians_are_printed_for_a_person_too_with_the_least_and_the_most_share_of_the_limit(tmp_path, capsys):
    lines = [{"row": "some", "who": "labkit", "of_limit": share, "per_s": [1, 2]} for share in (0.5, 0.75, 0.25)]
    (tmp_path / "results").write_text("\n".join(map(json.dumps, lines)))
    [line] = suite.medians(tmp_path / "results", [SuiteRow("some", "rpc")])
    show({"some": {name: line[name] for name in ("of_limit", "of_limit_range", "per_s")}}, as_json=False)
    assert "of_limit 0.5, of_limit_range [0.25, 0.75], per_s [1, 2]" in capsys.readouterr().out


SMALL = SuiteRow("small", "search --nodes 2 --grid 2 --k-best 1 --searches 1", "peer.py --calls 9")
STUCK = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"


@cache
def measured() -> str:
    """What the suite writes of this row, which `labkit bench` measures in a process of its own."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "results.jsonl")
        measure_all(SuiteConfig(out=str(path), runs=1), [SMALL])
        return path.read_text()


@pytest.mark.parametrize(
    ("script", "timeout", "said"),
    [('import sys; sys.exit("there is no such peer here")', 60.0, "there is no such"), (STUCK, 0.5, "timed out")],
)
def test_a_peer_that_fails_is_told_and_left_out(tmp_path, capsys, monkeypatch, script, timeout, said):
    monkeypatch.setattr(suite, "PEER_TIMEOUT", timeout)
    (tmp_path / "peer.py").write_text(script)
    (tmp_path / "out").write_text(measured())
    result = measure_all(SuiteConfig(out=str(tmp_path / "out"), runs=1, peer_scripts=str(tmp_path)), [SMALL])
    assert result["small"]["runs"] == 1 and "peer_runs" not in result["small"]
    told = capsys.readouterr().err
    assert "peer.py --calls 9 printed no result" in told and said in told


def test_a_row_that_fails_ends_the_suite(tmp_path):
    with pytest.raises(LabkitError, match=r"bench rpc --calls few --json printed no result .*invalid int value: 'few'"):
        measure_all(SuiteConfig(out=str(tmp_path / "out"), runs=1), [SuiteRow("none", "rpc --calls few")])


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (["--nodes", "1"], "--nodes 1: at least 2"),
        (["--grid", "4", "0"], "--grid 4 0: "),
        (["--grid", "2", "2", "--k-best", "5"], "--k-best 5: the grid has 4 experts"),
        (["--rtt-ms", "-1"], "--rtt-ms -1.0: "),
        (["--dead", "1"], "--dead 1.0: "),
        (["--churn", "-1"], "--churn -1.0: "),
        (["--churn", "1", "--dead", "0.1"], "--churn 1.0: "),
        (["--nodes", "2", "--dead", "0.9"], "--dead 0.9: "),
    ],
)
def test_what_cannot_be_searched_is_refused_by_the_name_of_the_option(option, complaint, capsys):
    assert main(["bench", "search", *option]) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["rpc", "--expert", "lstm"], "--expert lstm: one of nop, ffn"),
        (["rpc", "--clients", "0"], "--clients 0: at least 1"),
        (["rpc", "--experts", "2", "--servers", "3"], "--servers 3: there are 2 experts"),
        (["rpc", "--codec", "zip"], "--codec zip: one of none"),
        (["moe", "--side", "2", "--k-best", "5"], "--k-best 5: the grid has 4 experts"),
        (["dht", "--peers", "1"], "--peers 1: at least 2"),
        (["all", "--out", "none", "--runs", "0"], "--runs 0: at least 1"),
        (["all", "--out", "none", "--peer-scripts", "nowhere"], "nowhere: there is no such folder"),
        (["all", "--out", "nowhere/results.jsonl"], "nowhere/results.jsonl: there is no folder "),
        (
            ["all", "--out", "none", "--only", "lstm"],
            "--only lstm: no row has this in its name. There are: rpc nop, batch",
        ),
        (["latency", "--block", "lstm"], "--block lstm: ffn or transformer"),
        (["latency", "--delays-ms", "10", "-1"], "--delays-ms 10.0 -1.0: "),
    ],
)
def test_what_cannot_be_measured_is_refused_by_the_name_of_the_option(options, complaint, capsys):
    assert main(["bench", *options]) == 1
    assert complaint in capsys.readouterr().err
