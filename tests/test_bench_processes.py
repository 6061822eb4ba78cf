"""The processes of a benchmark: whatever goes wrong with one, it is named, and none is left."""

from __future__ import annotations

import pytest

from labkit.bench.processes import ProcessGroup, Worker

pytestmark = pytest.mark.usefixtures("forked_python")

ORDER = {"secure": False}  # of an echo


def has_ended(worker: Worker) -> bool:
    return worker.process.returncode is not None


def test_a_worker_that_died_when_it_was_ready_is_named_and_the_others_end_with_the_block():
    with pytest.raises(RuntimeError, match=r"a process of the benchmark \(echo:serve_echo\) ended with exit code -9"):
        with ProcessGroup() as group:
            dead, other = group.start("echo:serve_echo", ORDER, ORDER)
            dead.receive()
            dead.process.kill()
            dead.process.wait()
            dead.send()
    assert has_ended(dead) and has_ended(other)


def test_workers_that_were_started_end_with_the_block_also_if_the_next_cannot_be(monkeypatch):
    started: list[Worker] = []
    send = Worker.send

    def note(worker: Worker, order: object = None) -> None:
        started.append(worker)
        send(worker, order)

    monkeypatch.setattr(Worker, "send", note)
    with pytest.raises(TypeError, match="not JSON serializable"), ProcessGroup() as group:
        group.start("echo:serve_echo", ORDER, object())
    assert len(started) == 2 and all(map(has_ended, started))
