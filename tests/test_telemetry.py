"""Telemetry: every event is counted once, whatever the number of experts and servers, and memory stays bounded."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from labkit.errors import CAUSES
from labkit.events import CallFailed, CallFinished, ServerLost, StepFinished
from labkit.histogram import BUCKETS, bucket
from labkit.view.collect import telemetry
from labkit.view.collect import time_series as series
from labkit.view.collect.telemetry import Telemetry
from labkit.view.collect.time_series import Bins, series_of
from labkit.view.scene import SERIES

START = 500.0


def finished(uid="ffn.0", address="a:1", **changes):
    usual: dict[str, Any] = {
        "direction": "forward", "rows": 4, "seconds": 0.1, "queue": 0.02, "compute": 0.03, "bytes": 10, "updates": 0,
        "at": START,
    }  # fmt: skip
    return CallFinished(uid=uid, address=address, **usual | changes)


def failed(cause, uid="ffn.0", address="a:1", at=START):
    return CallFailed(uid=uid, address=address, direction="forward", rows=1, seconds=1.0, cause=cause, detail="", at=at)


# ---------------------------------------------------------------- columns


def test_calls_are_split_into_queue_compute_and_network():
    seen = Telemetry(START)
    for _ in range(3):
        seen(finished())
    seen(finished(queue=0.09, compute=0.09))  # more than there was: a server may exaggerate
    times = seen.servers.read()[0, telemetry.TIMES :].reshape(4, BUCKETS)
    assert times.sum(axis=1).tolist() == [4] * 4
    assert times[0, bucket(0.1)] == 4 and times[1, bucket(0.02)] == 3 and times[2, bucket(0.03)] == 3
    assert times[3, bucket(0.05)] == 3 and times[3, 0] == 1


def test_an_expert_has_its_calls_rows_updates_and_staleness():
    seen = Telemetry(START)
    seen(finished(rows=3, updates=7))
    seen(finished(rows=5, updates=6, direction="backward", staleness=2))  # an older answer may come later
    seen(failed("lost"))
    (row,) = seen.experts.read()
    assert row.tolist() == [2, 1, 8, 0.2, 2, 1, 7, 1]
    assert seen.by_uid["ffn.0"].failed == {"lost": 1}


def test_every_cause_has_its_column_and_an_unknown_one_counts_as_failed():
    seen = Telemetry(START)
    for cause in (*CAUSES, "of a later version"):
        seen(failed(cause))
    assert seen.total.failed == dict.fromkeys(CAUSES, 1) | {"failed": 2}
    assert seen.by_address["a:1"].failed == seen.total.failed


def test_what_is_beyond_the_limits_is_counted_in_the_totals_only(monkeypatch):
    monkeypatch.setattr(telemetry, "MAX_COUNTED_EXPERTS", 100)
    monkeypatch.setattr(telemetry, "MAX_COUNTED_SERVERS", 10)
    seen = Telemetry(START)
    for number in range(1000):
        seen(finished(f"ffn.{number}", f"a:{number}"))
        seen(failed("timeout", f"ffn.{number}", f"a:{number}"))
    assert (len(seen.by_uid), len(seen.by_address)) == (100, 10)
    assert "ffn.99" in seen.by_uid and "ffn.100" not in seen.by_uid
    assert (seen.total.finished, seen.total.failed["timeout"]) == (1000, 1000)
    assert seen.by_uid["ffn.99"].finished == seen.by_address["a:9"].finished == 1
    assert seen.experts.read().shape[0] == 100 and len(seen._causes) == 100


def test_marks_are_bounded_and_short():
    seen = Telemetry(START)
    for number in range(1000):
        seen.mark("x" * 10_000, at=START + number)
        seen(ServerLost(address="a:1", uids=("ffn.0", "ffn.1"), detail="", at=START + number))
    assert len(seen.marks) == telemetry.MAX_MARKS and len(seen.marks[0].text) == 200
    assert seen.marks[-1].at == 999.0
    assert len(seen.lost) == telemetry.MAX_MARKS and seen.servers_lost == 1000


def test_readers_see_whole_rows_while_the_lab_thread_writes():
    seen, done = Telemetry(START), threading.Event()
    torn: list[object] = []

    def read():
        while not done.is_set():
            experts = seen.experts.read()
            seen.servers.read(), seen.bins.read(START + 1), seen.total
            torn.extend(row for row in experts[:-1] if row[telemetry.CALLS] != 1)  # the last may be under way

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(5_000):
        seen(finished(f"ffn.{number}", f"a:{number % 500}", at=START + number / 10))
    done.set()
    reader.join()
    assert torn == []
    assert seen.total.finished == 5_000


def test_steps_from_many_threads_wait_for_the_sampler_and_none_is_lost():
    seen = Telemetry(START)

    def train():
        for number in range(1000):
            seen(StepFinished(step=number, loss=1.0, samples=1, seconds=0.1, staleness=0))

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen.steps) == 4000


# ---------------------------------------------------------------- the time series


def test_bins_are_merged_by_two_when_there_are_too_many_and_nothing_is_lost():
    seen = Telemetry(START)
    for second in range(2000):
        seen(finished(at=START + second, staleness=second % 2))
    shown = series_of(seen.bins, Bins(series.STEP_COLUMNS, START), START + 2000)
    assert shown.width == 4.0 and len(shown.values) == 499  # 600 × 2 s would not reach; the last is not over
    assert shown.values[:, SERIES.index("calls")].tolist() == [1.0] * 499
    assert shown.values[:, SERIES.index("staleness")].tolist() == [0.5] * 499
    assert seen.total.finished == 2000


@pytest.mark.parametrize("silence", [1, 400, 10_000, 1_000_000])
def test_bins_after_a_long_silence_are_as_wide_as_they_have_to_be(silence):
    seen, steps = Telemetry(START), Bins(series.STEP_COLUMNS, START)
    seen(finished(at=START + 0.1))
    quiet = series_of(seen.bins, steps, START + silence)
    seen(finished(at=START + silence))
    loud = series_of(seen.bins, steps, START + silence + 0.2)
    for shown in (quiet, loud):
        assert 0 < len(shown.values) <= series.MAX_BINS
        assert shown.values[0, SERIES.index("calls")] * shown.width == pytest.approx(1)
    assert seen.total.finished == 2


def test_only_bins_that_are_over_are_shown_and_they_do_not_change_any_more():
    seen, steps = Telemetry(START), Bins(series.STEP_COLUMNS, START)
    shown = np.zeros((0, len(SERIES)), dtype=np.float32)
    for tenth in range(100):
        seen(finished(at=START + tenth / 10))
        now = series_of(seen.bins, steps, START + tenth / 10).values
        np.testing.assert_array_equal(now[: len(shown)], shown)
        shown = now
    assert len(shown) == 19 and shown[:, SERIES.index("calls")].tolist() == [10.0] * 19
