"""The notebooks and tutorials run from top to bottom in a real kernel, say what they are to say, and are committed as
they ran, with their pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.notebook_runs import (
    NOTEBOOKS,
    ROOT,
    STEPS,
    TOGETHER,
    NotebookRuns,
    check_committed,
    code_cells,
    numbers,
    pictures,
    read,
    snapshots,
    texts,
)

TUTORIALS = [path for path in NOTEBOOKS if path.parent.name == "tutorials"]
ACCURACY = r"test accuracy ([0-9.]+)"


def table(text: str, columns: int) -> list[list[float]]:
    """The rows of a data frame of numbers, as text; of its index only the last word is taken to be no number."""
    rows = re.findall(rf"^.*?\S((?: +(?:[0-9.]+|NaN)){{{columns}}})$", text, re.MULTILINE)
    return [[float(number) for number in row.split()] for row in rows]


# `full`: as it is committed, and not with the few steps of a test on a machine that may be busy


def check_quickstart(notebook: Any, full: bool) -> None:
    html, plain = texts(notebook, "text/html"), texts(notebook)
    assert "grid ffn 4 × 4: 16 experts alive" in html
    assert "killed" in html
    assert "swarm &#x27;default&#x27;, closed" in html
    assert numbers(r"rows that no expert answered: (\d+)", plain) == [0]
    assert numbers(r"test accuracy ([0-9.]+) after", plain)[-1] >= (0.96 if full else 0.5)
    assert "labkit://" in plain and 'listen="tcp://0.0.0.0:*"' in plain
    assert len(snapshots(notebook)) >= 1, "of the dashboard"
    assert len(pictures(notebook)) > len(snapshots(notebook)), "and the curves"


def check_first_swarm(notebook: Any, full: bool) -> None:
    plain, html = texts(notebook), texts(notebook, "text/html")
    assert "grid ffn 4 × 4: 16 experts alive; 0 calls answered" in html, "the table in place of the dashboard"
    calls = numbers(r"ffn\.\d\.\d +([0-9,]+) calls", plain)
    assert len(calls) == 16 and min(calls) > 0
    assert min(numbers(r"each +([0-9,]+) updates", plain)) > 0
    assert numbers(ACCURACY, plain)[-1] >= (0.95 if full else 0.5)
    assert len(snapshots(notebook)) >= (2 if full else 1)


def check_how_it_works(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    assert "10 numbers give the scores of 25 experts" in plain
    assert re.search(r"^. +expert:ffn +0\. +go on below$", plain, re.MULTILINE), "a marker"
    assert re.search(r"^. +expert:ffn\.0 +1 +its server's address$", plain, re.MULTILINE), "a leaf"
    found = re.search(
        r"4 records read in 2 steps; the best experts: ffn\.\d\.\d, ffn\.\d\.\d, ffn\.\d\.\d$", plain, re.MULTILINE
    )
    assert found is not None
    assert numbers(r"from the layer's own output: ([0-9.e+-]+)", plain)[0] < 1e-5
    (alone,), (together,) = (numbers(rf"trainers={n} *: .* staleness +([0-9.]+)", plain) for n in (1, 16))
    assert alone == 0 and (8 if full else 3) < together < 17
    if full:
        slow, quick = numbers(r"trainers=\d+ *: +([0-9,]+) samples/s", plain)
        assert quick > 1.5 * slow, "others compute while one waits"
    assert len(pictures(notebook)) == 5


def check_watch_it_fail(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    steps = numbers(r"(\d+) steps, loss", plain)
    assert len(steps) == 4 and steps == sorted(steps) and steps[-1] == (600 if full else STEPS)
    assert numbers(ACCURACY, plain)[-1] >= (0.95 if full else 0.5)
    assert re.search(r"calls that failed so far: \{.*'lost': \d+", plain), "the killed servers' calls"
    assert numbers(r"rows that no expert answered: (\d+); batches that failed: \d+", plain) == [0]
    shown = snapshots(notebook)
    assert len(set(shown)) >= 3, "killed, slow, back to health"
    assert len(pictures(notebook)) > len(shown), "and a plot of what was measured"
    # k_min, timeout_after_k_min, forward_timeout, s per pass, answered, refused
    measured = table(plain, 6)
    assert [row[0] for row in measured] == [1, 1, 1, 2, 2, 2, 4, 4, 4, 4, 4, 4]
    assert all(row[3] > 0 and 0 <= row[4] <= 1 and 0 <= row[5] <= 1 for row in measured)
    assert measured[0][4] < 1, "without patience, some calls are given up"
    if full:
        hasty, *_, patient = measured[:3]
        assert patient[4] > hasty[4] and patient[3] > hasty[3], "patience takes time and gets answers"
        assert hasty[5] == 0, "of four experts one answers"
        assert 0.05 < sum(row[5] for row in measured[6:9]) / 3 < 0.35, "some row in five lacks one of its four"
        assert min(row[3] for row in measured[6:9]) > hasty[3], "who waits for all waits longest"
        assert measured[9][5] > measured[11][5], "the earlier the deadline, the more rows are refused"


def check_your_own_expert(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    assert "('process', ('gated.0', 'gated.1'))" in plain and "('process', ('scaled.0', 'scaled.1'))" in plain
    assert plain.count("('process', ('reader.") == 2
    assert "Locked cannot be handed to a server process (TypeError: cannot pickle" in plain
    assert min(numbers(r"gradient of the \w+ +\[[0-9, ]+\], norm ([0-9.]+)", plain)) > 0
    assert "gradient of the tokens [5, 8, 32]" in plain
    assert "updates of reader.0.0: 0 before, 1 after" in plain
    assert numbers(r"mean change of its output: ([0-9.]+)", plain)[0] > 0
    assert numbers(ACCURACY, plain)[-1] >= (0.9 if full else 0.25)
    assert snapshots(notebook) and len(pictures(notebook)) > len(snapshots(notebook))


def check_log_to_wandb(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    assert "offline: nothing leaves this machine" in plain
    steps = 400 if full else STEPS
    assert numbers(r"rows, (\d+) of them steps", plain) == [steps]
    for key in ("train/step", "train/loss", "swarm/seconds", "swarm/experts_alive", "swarm/heat_map", "swarm/load"):
        assert re.search(rf"^{key}$", plain, re.MULTILINE), key
    last = "16" if full else "(8|16)"  # a row a second may miss that experts were gone, or are back
    assert re.search(f"experts alive: 16, then [0-9]+, and in the end {last}$", plain, re.MULTILINE)
    assert numbers(r"wandb/offline-run-\S+: ([0-9,]+) bytes", plain)[0] > 20_000, "what W&B keeps, with a heat map"
    assert numbers(ACCURACY, plain)[-1] >= (0.95 if full else 0.5)
    assert snapshots(notebook) and len(pictures(notebook)) > len(snapshots(notebook))


def check_two_notebooks_one_swarm(notebook: Any, full: bool) -> None:
    plain, html = texts(notebook), texts(notebook, "text/html")
    alone, second, both = table(plain, 3)
    assert 0 < sum(alone[:2]) < sum(second[:2]) < sum(both[:2]), "updates came from either"
    assert both[2] > 0, "and reached the second's experts"
    remote = re.search(r"<td>elsewhere</td><td>○ remote</td><td>[^<]+</td><td[^>]*>8</td><td[^>]*>([0-9,]+)<", html)
    assert remote is not None and int(remote[1].replace(",", "")) > 0, "the first called them"
    assert min(numbers(rf"second: {ACCURACY}", plain) + numbers(rf"first: {ACCURACY}", plain)) >= (
        0.95 if full else 0.5
    )
    left = plain.rpartition("first: test accuracy")[2]  # when the second had handed its experts over
    assert "grid ffn 4 × 4: 16 experts alive" in left and "8 adopted from other servers" in left
    assert snapshots(notebook)


def check_a_cluster_from_a_cell(notebook: Any, full: bool) -> None:
    plain, html = texts(notebook), texts(notebook, "text/html")
    assert plain.count("an expert with 4,256 parameters") == 4, "what a server wrote at its worker"
    assert "worker 0: swish.0.0" in plain and "worker 1: swish.0.1" in plain
    assert re.search(r"servers\[1\] \S+</td>", html), "the name of the host"
    assert re.search(r"steps: its worker on \S+ \(tcp://\S+\) was lost; restart\(\) brings", plain)
    assert "8 experts alive, servers[0] is running again" in plain
    assert numbers(ACCURACY, plain)[-1] >= (0.9 if full else 0.2)
    assert snapshots(notebook) and len(pictures(notebook)) > len(snapshots(notebook))


def check_experts_outlive_servers(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    found = re.search(r"(\d+) experts were taken over; the longest time that nobody served one: ([0-9.]+) s", plain)
    assert found is not None and int(found[1]) >= 8 and (not full or float(found[2]) < 5)

    def row(name: str) -> list[float]:  # with copies, and without
        return [float(number) for number in re.findall(rf"^{name} +([0-9.]+) +([0-9.]+)$", plain, re.MULTILINE)[0]]

    assert row("experts alive") == [16, 8]
    kept, lost = row("updates kept"), row("updates lost")
    assert min(kept) > 0, "a short run may be over before the first copies are renewed"
    assert not full or lost[0] < min(lost[1], 0.2 * kept[0]), "those since a copy, and not all"
    accuracy = row("test accuracy")
    assert not full or (accuracy[0] > 0.95 and accuracy[0] > accuracy[1])
    assert re.search(r"\d+ experts handed over; 0 updates lost; 16 experts alive$", plain, re.MULTILINE)
    assert len(snapshots(notebook)) == 2 and len(pictures(notebook)) == 3


def check_a_language_model(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    (tokens,) = numbers(r"(\d+) different ones; windows of 64", plain)
    assert tokens >= 60
    assert plain.count("; killing the server of ") == 2
    validated = re.findall(
        r"^step +(\d+): validation loss ([0-9.]+), perplexity ([0-9.]+), accuracy ([0-9.]+)$", plain, re.MULTILINE
    )
    steps, loss, perplexity, accuracy = ([float(row[column]) for row in validated] for column in range(4))
    assert steps[-1] == (2000 if full else STEPS)
    assert loss[-1] < (loss[0] if full else math.log(tokens)), "early steps have spikes, in one process, too"
    assert all(math.exp(one) == pytest.approx(other, rel=1e-3) for one, other in zip(loss, perplexity, strict=True))
    (before,), (after,) = (
        re.findall(r"^The ([^✝]*)✝", plain, re.MULTILINE),
        re.findall(r"✝(.*?)the server of", plain, re.DOTALL),
    )
    assert len(before) == (250 if full else STEPS // 2) and len(after) >= STEPS // 2, "it wrote on"
    assert numbers(r"validation loss afterwards: ([0-9.]+)", plain)[0] == pytest.approx(
        loss[-1], abs=0.05 if full else 0.5
    )
    if full:
        assert numbers(r"batches that failed: (\d+)", plain) == [0]
        assert loss[-1] <= 1.88, "nanoGPT's recipe, dense"
        assert numbers(r"2000 steps in ([0-9.]+) minutes", plain)[0] <= 15
        assert accuracy[-1] > 0.4
        assert len(re.findall(r"^layer[02]\.\d went on after [0-9.]+ s", plain, re.MULTILINE)) == 4
        assert plain.count("16 experts alive") >= 2, "they came back"
    assert len(snapshots(notebook)) >= 1 and len(pictures(notebook)) > len(snapshots(notebook))


def check_a_transformers_model(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    before, after = (
        re.findall(rf"^{when}: +([0-9,]+) parameters, ([0-9.]+) MB in this process, validation loss ([0-9.]+)$", plain,
                   re.MULTILINE)[0] for when in ("before", "after")
    )  # fmt: skip
    assert float(after[1]) < 0.25 * float(before[1]), "the experts have left"
    assert float(after[2]) == pytest.approx(float(before[2]), abs=2e-4), "and it computes the same"
    assert not full or float(before[2]) < 2.1
    assert plain.count("✝") == 2
    (taken_over,) = numbers(r"(\d+) experts were taken over; 24 are alive, at one server", plain)
    assert 16 <= taken_over <= 24, "the first server's eight, and what the second one had by then"
    assert "the same letters as the local model's: True" in plain
    loss, tuned = numbers(r"loss of capitals ([0-9.]+)", plain)
    assert tuned < loss and (not full or tuned < 2.4)
    assert numbers(r"updates of the experts: ([0-9,]+)", plain)[0] > 0
    assert f"{before[0]} parameters, {before[1]} MB in this process\n" in plain.split("loss of capitals")[-1], "home"
    assert "the loaded one writes the same: True" in plain
    assert not full or re.search(r"^FIRST [^a-z]+$", plain[plain.index("\nFIRST ") :], re.MULTILINE), "it shouts"
    assert len(snapshots(notebook)) == 3 and len(pictures(notebook)) == 4


def check_expert_search(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    assert "'recall': 1.0" in plain, "of the one that is measured here"
    rows = re.findall(r"^ *(\d+) +(all alive|10% dead|churn|connecting) +([0-9.Na ]+)$", plain, re.MULTILINE)
    assert {kind for _, kind, _ in rows} == {"all alive", "10% dead", "churn", "connecting"}
    most = {100: 320, 1_000: 530, 10_000: 760}
    assert {int(nodes) for nodes, kind, _ in rows if kind == "all alive"} > set(most)
    for nodes, kind, cells in rows:
        cold, p95, warm, _, recall, alive, *_ = map(float, cells.split())
        assert recall >= (1.0 if kind in ("all alive", "connecting") else 0.99)
        if kind in ("all alive", "connecting"):
            assert alive == 1.0
        else:
            assert 0.8 < alive <= 1.0 or (kind == "churn" and math.isnan(alive)), "not counted in an older measurement"
        assert warm <= 1.0 and cold <= p95
        assert kind != "all alive" or cold <= most.get(int(nodes), 760)
    assert len(pictures(notebook)) == 2


def check_convergence(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    measured = numbers(r"updates and \d+ virtual seconds: accuracy ([0-9.]+)", plain)
    assert len(measured) == 2 and (not full or measured[-1] > 0.8)
    assert re.search(r"calls without an answer: \{'timeout': \d+\}", plain)
    # seeds, accuracy, worst, virtual hours, staleness, dropped batches
    rows = re.findall(r"^ *((?:quick|authors)-[\w-]+)( .+)$", plain, re.MULTILINE)
    runs = {name: table(f"{name}{line}", 6)[0] for name, line in rows}
    assert runs["quick-failing"][1] >= 0.92, "a tenth of the calls fails, and gradients are old"
    assert runs["quick-failing"][1] > runs["quick-dense"][1]
    assert 50 < runs["quick-failing"][4] < 70, "63 others"
    assert runs["authors-delayed"][1] >= 0.943 and runs["authors-failing"][1] >= 0.94
    for name in ("quick-failing", "quick-dense", "authors-delayed", "authors-failing", "authors-dense"):
        assert runs[name][0] >= 3, "seeds"
    assert {"quick-fresh", "quick-delayed-100ms", "authors-fresh"} < runs.keys(), "beside each what is not so hard"
    assert len(pictures(notebook)) == 3


def check_language_model(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    losses = numbers(r"updates and \d+ virtual seconds: validation loss ([0-9.]+)", plain)
    assert len(losses) == 2 and losses[1] < losses[0]
    assert re.search(r"calls without an answer: \{'timeout': \d+\}", plain)
    # seeds, loss, worst, perplexity, virtual minutes, staleness, that of experts, dropped batches
    runs_of = dict[str, dict[str, list[float]]]()
    for size, trainers in (("crowd", 32), ("wikitext", 32), ("small", 8)):
        rows = re.findall(rf"^ *{size}-([\w-]+)( .+)$", plain, re.MULTILINE)
        runs = runs_of[size] = {name: table(f"{name}{line}", 8)[0] for name, line in rows}
        for name, (_, loss, _, perplexity, _, staleness, experts, dropped) in runs.items():
            assert perplexity == pytest.approx(math.exp(loss), rel=1e-2)
            fresh = name.endswith("fresh") or name == "dense"
            least = 0.84 if name.endswith("failing") else 0.95  # where batches are given up, fewer updates are made
            assert staleness == 0 if fresh else least < staleness / (trainers - 1) < 1.02, "as many as there are others"
            assert (experts > 0) == (not name.startswith("dense") and not name.endswith("fresh"))
            assert (dropped > 0) == name.endswith("failing")
    crowd = runs_of["crowd"]
    failing = {f"{experts}-experts-1s-failing" for experts in (16, 64, 256)}
    assert failing | {"16-experts-1s", "dense-fresh"} < crowd.keys()
    assert crowd["16-experts-1s-failing"][0] == crowd["dense-1s"][0] == 3, "seeds"
    assert crowd["16-experts-1s-failing"][1] < crowd["dense-1s"][1] - 0.05, "although a tenth of the calls fails"
    assert crowd["dense-fresh"][1] < crowd["16-experts-1s-failing"][1], "staleness costs more than anything else"
    assert {"dense-1s", "16-experts-1s-failing"} <= runs_of["wikitext"].keys()
    networks = {"", "-100ms", "-1s", "-failing", "-100ms-failing", "-1s-failing"}
    assert {f"{experts}-experts{network}" for experts in (16, 64, 256) for network in networks} < runs.keys()
    assert runs["16-experts-fresh"][1] < runs["dense-fresh"][1], "as much computing"
    for network in ("100ms", "1s"):
        assert runs[f"16-experts-{network}"][1] < runs[f"dense-{network}"][1] + 0.02, "as stale: a tie at the least"
    assert runs["16-experts-1s-failing"][1] < runs["dense-1s"][1], "although a tenth of the calls fails"
    assert all(runs[name][0] == 3 for name in ("16-experts-1s", "16-experts-1s-failing", "dense-1s")), "seeds"
    assert runs["16-experts-fresh"][1] < runs["16-experts"][1] < runs["16-experts-1s"][1], "staleness costs more"
    assert len(pictures(notebook)) == 1


def check_throughput(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    for block in ("ffn", "transformer"):
        left = rf"{block}: .* there is left, at \d+ ms, ([0-9.]+) with trainers, [0-9.]+ with a pipeline"
        pipeline = rf"{block}: .* there is left, at \d+ ms, [0-9.]+ with trainers, ([0-9.]+) with a pipeline"
        assert not full or numbers(left, plain)[0] >= 0.9, "others compute while one waits"
        assert not full or numbers(pipeline, plain)[0] < 0.5, "it stands still while its batches travel"
    for row in (
        "rpc nop, batch 1",
        "rpc ffn, batch 256, forward and backward",
        "moe ffn2, batch 512",
        "rpc nop, 128 clients",
    ):
        assert re.search(rf"^{row} +[0-9]", plain, re.MULTILINE), row
    # × hivemind, asked, verdict, of the limit, least, most, asked, verdict
    asked = re.findall(r"^((?:rpc|moe) .+?)  +([0-9.]+)? .*(?:met|missed|in its spread)", plain, re.MULTILINE)
    assert len(asked) == 9, "one line for each number that was asked for"
    least = {
        "rpc nop, batch 512": 20,
        "rpc nop, batch 512, secure": 5,
        "moe ffn2, batch 512": 60,
        "moe ffn2, batch 64": 8,
    }
    assert all(float(dict(asked)[row]) >= times for row, times in least.items()), "as README says"
    assert len(numbers(r"DHT, 8 peers: a (?:store|get of the latest|get of any copy) takes ([0-9.]+) ms", plain)) == 3
    assert len(pictures(notebook)) == 1


def check_recovery(notebook: Any, full: bool) -> None:
    plain = texts(notebook)
    # servers killed at once, their experts, s until served and found again, updates lost, s of the worst loss
    rounds = re.findall(r"^(\d)" + 5 * r" +([0-9.]+)" + "$", plain, re.MULTILINE)
    assert [int(row[0]) for row in rounds] == [4, 2, 1] and all(float(row[3]) < 5 for row in rounds)
    assert all(float(row[5]) < 10 for row in rounds), "as is promised"
    assert "experts at the last server: 32 of 32" in plain
    assert numbers(r"rows that no expert answered: (\d+); batches that failed: \d+", plain) == [0]
    killed, undisturbed = numbers(r"means: ([0-9.]+)", plain) + numbers(r"([0-9.]+) without", plain)
    assert abs(killed - undisturbed) < 0.01
    share, within = (float(one) for one in re.findall(r"work time +with copies: ([0-9.]+) ± ([0-9.]+)", plain)[0])
    assert share - within > 0.97, "of the speed without copies"
    (ratios,) = re.findall(r"^effective ratio((?: +[0-9.]+)+)$", plain, re.MULTILINE)
    kept = list(map(float, ratios.split()))
    assert len(kept) == 1 + full and all(ratio > (0.94 if full else 0.1) for ratio in kept)
    assert len(pictures(notebook)) == 1


CHECKS: dict[str, Callable[[Any, bool], None]] = {
    "quickstart": check_quickstart,
    "expert_search": check_expert_search,
    "convergence": check_convergence,
    "language_model": check_language_model,
    "recovery": check_recovery,
    "throughput": check_throughput,
    "00_how_it_works": check_how_it_works,
    "01_first_swarm": check_first_swarm,
    "02_watch_it_fail": check_watch_it_fail,
    "03_your_own_expert": check_your_own_expert,
    "04_log_to_wandb": check_log_to_wandb,
    "05_two_notebooks_one_swarm": check_two_notebooks_one_swarm,
    "06_a_cluster_from_a_cell": check_a_cluster_from_a_cell,
    "07_experts_outlive_servers": check_experts_outlive_servers,
    "08_a_language_model": check_a_language_model,
    "09_a_transformers_model": check_a_transformers_model,
}


def test_every_notebook_has_its_checks_and_every_tutorial_is_in_the_list() -> None:
    assert sorted(path.stem for path in NOTEBOOKS) == sorted(CHECKS)
    assert [path.stem[:2] for path in TUTORIALS] == [f"{number:02}" for number in range(len(TUTORIALS))]
    contents = (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in contents for path in TUTORIALS)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_begins_with_its_badge_and_an_install_cell_and_ends_with_what_it_started(path: Path) -> None:
    notebook = read(path)
    opening = notebook.cells[0].source
    assert f"colab.research.google.com/github/labkit-dev/labkit/blob/main/tutorials/{path.name})" in opening
    assert "takes no inbound connections" in opening and "distributed computing workers" in opening
    install, *others = code_cells(notebook)
    assert 'find_spec("labkit") is None' in install.source and "%pip install" in install.source
    assert not install.outputs, "labkit is here, so it did nothing"
    assert sum('"LABKIT_STEPS"' in cell.source for cell in others) == 1
    assert others[-1].source.startswith("swarm.close()")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path: Path) -> None:
    notebook = read(path)
    check_committed(notebook)
    for cell in code_cells(notebook):
        shown = [mime for output in cell.outputs for mime in output.get("data", {})]
        assert not any("widget" in mime for mime in shown), "a widget that is not there any more"
    CHECKS[path.stem](notebook, True)


@pytest.fixture(scope="module")
def notebook_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotebookRuns]:
    runs = NotebookRuns(tmp_path_factory.mktemp("notebooks"))
    yield runs
    runs.end()


@pytest.mark.timeout(400)  # the first one waits for all
@pytest.mark.parametrize("path", TOGETHER, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook_runs: NotebookRuns, path: Path) -> None:
    problem = notebook_runs.problems()[path.name]
    assert not problem, problem
    CHECKS[path.stem](read(notebook_runs.folder / path.name), False)
