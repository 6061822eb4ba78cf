"""The demonstration, as a user runs it.

What README says of `labkit demo` was measured with its default settings, on two cores without a GPU. Digits, 500 steps,
in eleven runs of several builds: test accuracy between 0.972 and 0.986, 18 to 45 s with start-up, most of which is the
import of torch in each process; 0.983 in 73 s in an hour in which the machine was a quarter as fast. The accuracy
varies by about ± 0.005 from run to run, since trainers are asynchronous and the test set has 360 rows. MNIST, 3,000
steps of 128 rows: 0.978 on 10,000 images in one run of 116 s, 3,650 samples/s; 186 s and 2,300 on a slower day. In all
of them every row was answered by some expert.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from labkit.__main__ import main
from labkit.cli.demo import DemoConfig

pytestmark = pytest.mark.usefixtures("forked_python")

COMMAND = [sys.executable, "-m", "labkit", "demo"]


@pytest.mark.timeout(120)
def test_the_demo_trains_on_while_a_server_is_killed_and_brought_back():
    small = ["--steps", "150", "--servers", "2", "--experts", "4", "--k-best", "2", "--trainers", "2", "--json"]
    done = subprocess.run([*COMMAND, *small], capture_output=True, text=True, timeout=110, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {
        "dataset", "accuracy", "steps", "seconds", "samples_per_s", "servers", "experts", "experts_alive_min",
        "experts_taken_over", "updates_lost", "seconds_without", "calls", "calls_failed", "no_answer_rows",
    }  # fmt: skip
    assert (result["dataset"], result["steps"], result["experts"]) == ("digits", 150, 4)
    assert result["servers"] == {"started": 2, "killed": 1, "alive": 2}
    assert result["experts_alive_min"] == 2
    assert result["experts_taken_over"] == 2 and result["updates_lost"] >= 0
    assert 0 < result["seconds_without"]["median"] <= result["seconds_without"]["max"] < 5
    assert "2 of them by other servers, after " in done.stdout
    assert result["no_answer_rows"] == 0
    assert result["accuracy"] > 0.9
    assert result["calls"] > 150 and set(result["calls_failed"]) <= {"lost", "timeout"}
    assert "test accuracy" in done.stdout
    for shown in ("loss=", "samples/s=", "experts="):
        assert shown in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"servers": 20}, "--servers 20"),
        ({"k_best": 17}, "--k-best 17"),
        ({"kill": 4}, "--kill 4"),
        ({"kill": -1}, "--kill -1"),
    ],
)
def test_a_wrong_option_is_named(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        DemoConfig(**options)


def test_a_data_set_that_is_not_there_ends_with_one_line_that_says_so(tmp_path, capsys):
    assert main(["demo", "--dataset", "mnist", "--data-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("labkit: no mnist here") and str(tmp_path) in said
    assert said.count("\n") == 1
