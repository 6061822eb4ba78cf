"""The runtime merges requests, keeps their order, and lets only the guilty fail. Most of it in virtual time."""

import copy
import math
import threading
import time
from contextlib import asynccontextmanager
from functools import partial

import pytest
import torch
import trio
import trio.testing
from torch import Tensor, nn

from labkit.errors import BadRequest, DeadlineExceeded, NonFiniteTensor, Overloaded, RemoteFailure, UnknownExpert
from labkit.events import BatchProcessed
from labkit.server import executor
from labkit.server.backend import ExpertBackend
from labkit.server.batch import DeviceLost, compute_batch
from labkit.server.layers import make_expert
from labkit.server.optimizer import BackendConfig
from labkit.server.runtime import ComputeThread, InlineCompute, Result, Runtime
from tests.runtimes import submit

HIDDEN = 4


def ffn(uid: str = "ffn.0", **options) -> ExpertBackend:
    torch.manual_seed(0)
    return ExpertBackend(uid, make_expert("ffn", hidden=HIDDEN), BackendConfig(**options))


def nop(uid: str = "nop.0", **options) -> ExpertBackend:
    return ExpertBackend(uid, make_expert("nop"), BackendConfig(**options))


class Bench:
    """A runtime whose batches take one virtual second, the batches that it ran, and the requests that are out."""

    def __init__(self, *backends: ExpertBackend, **options) -> None:
        self.batches: list[tuple[str, str, int, int]] = []
        self.answers: dict[str, Result | Exception] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self.runtime = Runtime(
            {backend.uid: backend for backend in backends},
            emit=self._note,
            executor=InlineCompute(lambda uid, direction, rows: 1.0),
            **options,
        )

    def _note(self, event) -> None:
        assert isinstance(event, BatchProcessed)
        self.batches.append((event.uid, event.direction, event.rows, event.requests))

    async def ask(self, name: str, uid: str, *tensors: Tensor, direction="forward", within=math.inf) -> None:
        with trio.CancelScope() as self.scopes[name]:
            try:
                answer = await submit(self.runtime, uid, direction, tensors, trio.current_time() + within)
            except Exception as error:
                self.answers[name] = error
            else:
                self.answers[name] = answer

    async def queue(self, name: str, uid: str, *tensors: Tensor, **options) -> None:
        self.asked.start_soon(lambda: self.ask(name, uid, *tensors, **options))
        await trio.testing.wait_all_tasks_blocked()

    @asynccontextmanager
    async def serving(self, *, at_once: bool = False):
        """Starts the runtime at the end of the block (or `at_once`), and ends it when all requests are answered."""
        async with trio.open_nursery() as serving:
            if at_once:
                await serving.start(self.runtime.run)
            async with trio.open_nursery() as self.asked:
                yield serving
                if not at_once:
                    await serving.start(self.runtime.run)
            await trio.sleep(1)  # what nobody waits for any more may still compute
            serving.cancel_scope.cancel()

    def tensors(self, name: str) -> list[Tensor]:
        answer = self.answers[name]
        assert isinstance(answer, Result), answer
        return answer.tensors


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- merging and order


async def test_merged_requests_get_what_one_big_batch_gives(autojump_clock):
    backend = ffn()
    alone = copy.deepcopy(backend)
    x, grad = rows(6, 1), rows(6, 2)
    bench = Bench(backend)
    async with bench.serving():
        for name, part in {"a": slice(0, 1), "b": slice(1, 4), "c": slice(4, 6)}.items():
            await bench.queue(name, "ffn.0", x[part], grad[part], direction="backward")
    [expected] = alone.backward(x, grad)
    assert torch.equal(torch.cat([bench.tensors(name)[0] for name in "abc"]), expected)
    assert bench.batches == [("ffn.0", "backward", 6, 3)]
    assert backend.updates == 1
    for one, other in zip(backend.module.parameters(), alone.module.parameters(), strict=True):
        assert torch.equal(one, other)


async def test_the_pool_with_the_oldest_request_runs_next(autojump_clock):
    bench = Bench(nop("nop.0"), nop("nop.1"))
    x = rows(2)
    async with bench.serving():
        await bench.queue("a", "nop.1", x)
        await bench.queue("b", "nop.0", x)
        await bench.queue("c", "nop.0", x, x, direction="backward")
        await bench.queue("d", "nop.1", x)
        await bench.queue("e", "nop.0", x)
    assert bench.batches == [("nop.1", "forward", 4, 2), ("nop.0", "forward", 4, 2), ("nop.0", "backward", 2, 1)]


async def test_a_batch_holds_at_most_max_batch_size_rows_and_nobody_overtakes(autojump_clock):
    bench = Bench(nop(max_batch_size=5))
    async with bench.serving():
        for name, count in {"a": 2, "b": 4, "c": 1, "d": 3}.items():
            await bench.queue(name, "nop.0", rows(count))
    assert [batch[2:] for batch in bench.batches] == [(2, 1), (5, 2), (3, 1)]
    assert [bench.answers[name].queue_seconds for name in "abcd"] == [0, 1, 1, 2]  # type: ignore[union-attr]
    assert [bench.answers[name].compute_seconds for name in "abcd"] == [1, 1, 1, 1]  # type: ignore[union-attr]


async def test_requests_of_other_shapes_are_not_merged(autojump_clock):
    bench = Bench(ffn())
    async with bench.serving():
        await bench.queue("good", "ffn.0", rows(2))
        await bench.queue("bad", "ffn.0", torch.zeros(2, HIDDEN + 1))
        await bench.queue("good too", "ffn.0", rows(3))
    assert isinstance(bench.answers["bad"], BadRequest)
    assert bench.batches == [("ffn.0", "forward", 5, 2)]


async def test_a_lone_request_is_not_copied_except_for_the_first_which_shows_if_the_expert_changes_it(autojump_clock):
    bench, x = Bench(nop()), rows(2)
    async with bench.serving(at_once=True):
        await bench.queue("first", "nop.0", rows(2))
        await trio.sleep(1)
        await bench.queue("a", "nop.0", x)
    assert bench.tensors("a")[0].data_ptr() == x.data_ptr()


async def test_requests_that_come_during_a_batch_wait_for_the_next(autojump_clock):
    bench = Bench(nop())
    async with bench.serving(at_once=True):
        for name in "abc":
            await bench.queue(name, "nop.0", rows(1))
        assert bench.runtime.statistics().queued_requests == 2
    assert [batch[3] for batch in bench.batches] == [1, 2]
    statistics = bench.runtime.statistics()
    assert (statistics.batches, statistics.rows, statistics.busy_seconds) == (2, 3, 2.0)
    assert (statistics.queued_requests, statistics.queued_rows) == (0, 0)
    assert statistics.experts["nop.0"] == 0


# ---------------------------------------------------------------- deadlines, cancellation, overload


async def test_work_whose_deadline_has_passed_is_dropped_before_it_is_computed(autojump_clock):
    bench = Bench(nop("nop.0"), nop("nop.1"))
    async with bench.serving():
        await bench.queue("first", "nop.0", rows(1))
        await bench.queue("late", "nop.1", rows(2), within=0.5)
        await bench.queue("patient", "nop.1", rows(4), within=1.5)
    assert isinstance(bench.answers["late"], DeadlineExceeded)
    assert [batch[2] for batch in bench.batches] == [1, 4]
    assert bench.tensors("patient")  # started in time, done too late
    assert bench.runtime.statistics().expired == 1


async def test_a_request_that_is_late_when_it_comes_or_when_the_runtime_starts_is_not_computed(autojump_clock):
    bench = Bench(nop())
    async with bench.serving():
        await bench.queue("late", "nop.0", rows(1), within=3)
        await trio.sleep(3)
        with pytest.raises(DeadlineExceeded, match="had passed when the request arrived; nothing was computed"):
            await submit(bench.runtime, "nop.0", "forward", [rows(1)], trio.current_time())
    assert isinstance(bench.answers["late"], DeadlineExceeded)
    assert "passed in the queue; nothing was computed" in str(bench.answers["late"])
    assert bench.batches == []


async def test_a_full_queue_refuses_at_once(autojump_clock):
    bench = Bench(nop(), max_queue_rows=4)
    async with bench.serving():
        await bench.queue("a", "nop.0", rows(3))
        with pytest.raises(Overloaded, match="3 rows wait here already, of at most 4"):
            await submit(bench.runtime, "nop.0", "forward", [rows(2)], math.inf)
        await bench.queue("b", "nop.0", rows(1))
    assert bench.batches == [("nop.0", "forward", 4, 2)]
    assert bench.runtime.statistics().overloaded == 1


async def test_cancelling_the_caller_takes_its_request_out_of_the_queue(autojump_clock):
    bench = Bench(nop())
    async with bench.serving():
        await bench.queue("a", "nop.0", rows(1))
        await bench.queue("given up", "nop.0", rows(2))
        bench.scopes["given up"].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert bench.runtime.statistics().queued_rows == 1
    assert bench.batches == [("nop.0", "forward", 1, 1)]


async def test_requests_that_make_no_sense_are_refused_at_once(autojump_clock):
    runtime = Bench(ffn(max_batch_size=4)).runtime
    with pytest.raises(UnknownExpert, match=r"ffn\.1"):
        await submit(runtime, "ffn.1", "forward", [rows(1)], math.inf)
    with pytest.raises(BadRequest, match="sideways"):
        await submit(runtime, "ffn.0", "sideways", [rows(1)], math.inf)
    with pytest.raises(BadRequest, match="at least 2 tensors"):
        await submit(runtime, "ffn.0", "backward", [rows(1)], math.inf)


# ---------------------------------------------------------------- only the guilty fail


class Moody(nn.Module):
    """Fails if a row holds 13, with finite gradients otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if (x == 13).any():
            raise KeyError("13")
        return x * self.scale


async def test_a_request_with_nan_is_refused_alone_and_the_others_stay_merged(autojump_clock):
    backend = ffn()
    alone = copy.deepcopy(backend)
    bench, x, grad = Bench(backend), rows(4, 1), rows(4, 2)
    async with bench.serving():
        await bench.queue("a", "ffn.0", x[:2], grad[:2], direction="backward")
        await bench.queue("bad", "ffn.0", x, grad / 0, direction="backward")
        await bench.queue("b", "ffn.0", x[2:], grad[2:], direction="backward")
    assert isinstance(bench.answers["bad"], NonFiniteTensor)
    [expected] = alone.backward(x, grad)
    assert torch.equal(torch.cat(bench.tensors("a") + bench.tensors("b")), expected)
    assert backend.state().keys() == alone.state().keys()
    assert all(torch.equal(tensor, alone.state()[name]) for name, tensor in backend.state().items())
    assert bench.batches == [("ffn.0", "backward", 4, 2)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
async def test_when_the_module_fails_on_a_merged_batch_only_the_guilty_request_fails(autojump_clock, caplog, direction):
    bench = Bench(ExpertBackend("moody.0", Moody()))
    good, bad = torch.ones(2, 1), torch.full((2, 1), 13.0)
    extra = [good] if direction == "backward" else []
    async with bench.serving():
        for name, x in {"a": good, "bad": bad, "b": good}.items():
            await bench.queue(name, "moody.0", x, *extra, direction=direction)
    assert isinstance(bench.answers["bad"], RemoteFailure)
    assert "KeyError" in str(bench.answers["bad"])
    assert len(bench.tensors("a")) == len(bench.tensors("b")) == 1
    assert "expert moody.0 failed" in caplog.text


async def test_a_device_that_is_lost_ends_the_runtime_and_a_pass_that_failed_does_not(autojump_clock, monkeypatch):
    bench, bad = Bench(ExpertBackend("moody.0", Moody())), torch.full((2, 1), 13.0)
    with pytest.raises(ExceptionGroup) as caught:
        async with bench.serving(at_once=True):
            await bench.queue("a", "moody.0", bad)
            await trio.sleep(2)
            monkeypatch.setattr(torch, "ones", lambda *shape, **options: torch.zeros(2).view(3))  # raises
            await bench.queue("b", "moody.0", bad)
            await bench.queue("c", "moody.0", bad)
    assert "KeyError" in str(bench.answers["a"])
    assert caught.group_contains(DeviceLost, match="computes nothing any more, after KeyError")
    assert isinstance(bench.answers["b"], RemoteFailure) and isinstance(bench.answers["c"], RemoteFailure)
    assert bench.runtime.stopped


class Infinite(nn.Module):
    """Its answers are refused."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class Full(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room is left")


@pytest.mark.parametrize(("module", "error"), [(Infinite(), NonFiniteTensor), (Full(), RemoteFailure)])
def test_a_pass_that_was_refused_or_had_no_memory_says_nothing_of_the_device_which_is_not_asked(
    module, error, monkeypatch
):
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: pytest.fail("the device was asked"))
    answers, _ = compute_batch(ExpertBackend("odd.0", module), "forward", [[rows(1)], [rows(1)]])
    assert [type(answer) for answer in answers] == [error, error]


def test_a_device_that_lacks_memory_is_not_lost_in_whatever_class_its_driver_says_so(monkeypatch):
    def ones(*shape, **options):
        raise RuntimeError("CUDA error: out of memory")

    backend = ExpertBackend("moody.0", Moody())
    monkeypatch.setattr(torch, "ones", ones)
    [answer], _ = compute_batch(backend, "forward", [[torch.full((2, 1), 13.0)]])
    assert isinstance(answer, RemoteFailure) and "KeyError" in str(answer)


def test_an_error_of_the_device_that_looks_like_a_bad_request_does_not_hide_that_it_is_lost(monkeypatch):
    class Asserting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "ones", lambda *shape, **options: torch.zeros(2).view(3))  # raises
    with pytest.raises(DeviceLost, match="device-side assert"):
        compute_batch(ExpertBackend("odd.0", Asserting()), "forward", [[rows(1)]])


async def test_ending_the_runtime_fails_what_waits_and_what_comes(autojump_clock):
    bench = Bench(nop())
    async with bench.serving(at_once=True) as serving:
        await bench.queue("computing", "nop.0", rows(1))
        await bench.queue("queued", "nop.0", rows(1))
        bench.asked.cancel_scope.shield = True
        serving.cancel_scope.cancel()
    assert [type(answer) for answer in bench.answers.values()] == [RemoteFailure, RemoteFailure]
    assert not bench.batches
    with pytest.raises(RemoteFailure, match="stopped"):
        await submit(bench.runtime, "nop.0", "forward", [rows(1)], math.inf)


async def test_a_runtime_that_settles_ends_what_it_computes_and_begins_nothing_else(autojump_clock):
    bench = Bench(nop())
    async with bench.serving(at_once=True) as serving:
        await bench.queue("computing", "nop.0", rows(1))
        await bench.queue("queued", "nop.0", rows(1))
        began = trio.current_time()
        await bench.runtime.settle()
        assert trio.current_time() == began + 1.0
        bench.asked.cancel_scope.shield = True
        serving.cancel_scope.cancel()
    assert bench.tensors("computing") and isinstance(bench.answers["queued"], RemoteFailure)
    assert len(bench.batches) == 1


# ---------------------------------------------------------------- snapshots


async def test_a_snapshot_is_taken_between_batches_and_still_after_the_end(autojump_clock):
    backend = ffn()
    bench, snapshots = Bench(backend), []

    async def snapshot() -> None:
        snapshots.append(await bench.runtime.snapshot("ffn.0"))

    async with bench.serving(at_once=True):
        for name in ("a", "b"):
            await bench.queue(name, "ffn.0", rows(2), rows(2), direction="backward")
        bench.asked.start_soon(snapshot)
    await snapshot()
    assert [int(state["counter.updates"]) for state in snapshots] == [1, 2]


# ---------------------------------------------------------------- the compute thread


def compute_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("labkit-compute")]


async def test_batches_run_on_a_compute_thread_that_ends_with_the_runtime():
    names = []

    class Witness(nn.Module):
        def forward(self, x):
            names.append(threading.current_thread().name)
            return x

    runtime = Runtime({"witness.0": ExpertBackend("witness.0", Witness())})
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        assert len(compute_threads()) == 1
        answer = await submit(runtime, "witness.0", "forward", [rows(1)], trio.current_time() + 10)
        assert torch.equal(answer.tensors[0], rows(1)) and answer.compute_seconds > 0
        assert await runtime.snapshot("witness.0") is not None
        nursery.cancel_scope.cancel()
    assert names == ["labkit-compute-cpu"]
    assert not compute_threads()


async def test_a_burst_of_requests_trains_as_if_they_came_in_turn():
    backend = ffn(optimizer="sgd", lr=0.0)
    x, grad = rows(1), rows(1, 1)
    expected = copy.deepcopy(backend).backward(x, grad)
    runtime, answers = Runtime({"ffn.0": backend}), []

    async def ask() -> None:
        answers.append(await submit(runtime, "ffn.0", "backward", [x, grad], trio.current_time() + 20))

    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        async with trio.open_nursery() as asked:
            for _ in range(100):
                asked.start_soon(ask)
        nursery.cancel_scope.cancel()
    assert len(answers) == 100
    assert all(torch.allclose(answer.tensors[0], expected[0], atol=1e-6) for answer in answers)
    assert backend.rows_processed == 100 and backend.updates == runtime.statistics().batches < 100


async def test_a_step_is_smaller_the_staler_its_gradient_is_where_that_is_asked_for():
    moved = []
    for forward_updates in (None, 10, 7, 20):  # an expert that has made ten steps; the last number is that of a liar
        backend = ffn(optimizer="sgd", lr=1.0, age_power=0.5)
        backend.updates = 10
        before = [parameter.detach().clone() for parameter in backend.module.parameters()]
        runtime = Runtime({"ffn.0": backend})
        async with trio.open_nursery() as nursery:
            await nursery.start(runtime.run)
            await submit(runtime, "ffn.0", "backward", [rows(1), rows(1, 1)], trio.current_time() + 20, forward_updates)
            nursery.cancel_scope.cancel()
        moved.append(
            sum(float((p.detach() - b).norm()) for p, b in zip(backend.module.parameters(), before, strict=True))
        )
    assert moved[1] == moved[3] == moved[0] > 0
    assert moved[2] == pytest.approx(moved[0] / 2)  # (1 + 3)^-0.5


async def computed(thread: ComputeThread, work):
    """What a piece of work on the compute thread returns, or raises."""
    outcomes, done = [], trio.Event()

    def note(value, error, seconds) -> None:
        outcomes.append((value, error))
        done.set()

    async with trio.open_nursery() as nursery:
        thread.start(work, note, nursery, uid="", direction="", rows=0)
        await done.wait()
    [(value, error)] = outcomes
    if error is not None:
        raise error
    return value


async def test_a_compute_thread_hands_back_what_the_work_raises():
    async with ComputeThread() as thread:
        with pytest.raises(ZeroDivisionError):
            await computed(thread, lambda: 1 / 0)
        assert await computed(thread, lambda: 7) == 7


async def test_the_number_of_torch_threads_is_set_only_on_request():
    before = torch.get_num_threads()
    async with ComputeThread() as thread:
        assert await computed(thread, torch.get_num_threads) == before
    async with ComputeThread(threads=1) as thread:
        assert await computed(thread, torch.get_num_threads) == 1


async def test_numbers_too_small_to_matter_are_nought_on_the_compute_thread_and_nowhere_else():
    tiny = torch.full((64,), 1e-40)
    async with ComputeThread() as thread:
        assert await computed(thread, lambda: (tiny * 0.5).sum().item()) == 0.0
    assert (tiny * 0.5).sum().item() > 0.0


async def test_a_compute_thread_says_how_much_of_a_processors_time_it_took_without_what_it_waited():
    def work() -> None:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass

    async with ComputeThread() as thread:
        await computed(thread, work)
        worked = thread.processor_seconds
        assert worked >= 0.05
        await computed(thread, partial(threading.Event().wait, 0.5))
        assert worked <= thread.processor_seconds < worked + 0.4


async def test_closing_does_not_wait_for_ever_for_a_computation(monkeypatch, caplog):
    monkeypatch.setattr(executor, "THREAD_END_TIMEOUT", 0.05)
    go_on = threading.Event()
    async with trio.open_nursery() as nursery:
        async with ComputeThread() as thread:
            nursery.start_soon(computed, thread, go_on.wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert "left behind" in caplog.text
    assert thread.alive
    go_on.set()
    thread._thread.join(5)
    assert not thread.alive
