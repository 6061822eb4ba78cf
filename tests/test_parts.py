"""A result does not depend on how many rows an expert computes at once, nor on how a request is cut or merged."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import labkit as lk
from labkit.errors import CallCancelled, DeadlineExceeded, MessageTooLarge, NonFiniteTensor, RemoteFailure
from labkit.server.backend import ExpertBackend
from labkit.server.batch import compute_batch
from labkit.server.layers import make_expert
from labkit.server.optimizer import BackendConfig
from labkit.server.runtime import InlineCompute, Runtime
from tests.runtimes import submit
from tests.test_backend import assert_same
from tests.test_runtime import Bench, nop

HIDDEN = 3


def ffn(**options) -> ExpertBackend:
    torch.manual_seed(0)
    return ExpertBackend("ffn.0", make_expert("ffn", hidden=HIDDEN, inner=5), BackendConfig(**options))


def batch(rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HIDDEN, generator=generator), torch.randn(rows, HIDDEN, generator=generator)


OPTIONS: list[dict] = [
    {"optimizer": "sgd", "lr": 0.1},
    {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "clip_grad_norm": 0.5},
    {"optimizer": "sgd", "lr": 0.1, "accumulate": 2},
]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    most=st.integers(1, 25),
    options=st.sampled_from(OPTIONS),
)
def test_outputs_gradients_and_parameters_do_not_depend_on_max_batch_size(rows, most, options):
    cut, whole = ffn(**options, max_batch_size=most), ffn(**options)
    for seed, count in enumerate(rows):
        x, grad = batch(count, seed)
        torch.testing.assert_close(cut.forward(x), whole.forward(x))
        torch.testing.assert_close(cut.backward(x, grad), whole.backward(x, grad))
    assert (cut.updates, cut.rows_processed) == (whole.updates, whole.rows_processed)
    for name, tensor in cut.state().items():
        torch.testing.assert_close(tensor, whole.state()[name], atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), most=st.integers(1, 14))
def test_requests_get_the_same_answers_however_they_are_merged_and_cut(sizes, most):
    x, grad = batch(sum(sizes))
    requests = list(zip(x.split(sizes), grad.split(sizes), strict=True))
    expected = ffn(lr=0.0).backward(x, grad)[0].split(sizes)
    runtime = Runtime({"ffn.0": ffn(lr=0.0, max_batch_size=most)}, executor=InlineCompute())
    answers: dict[int, Tensor] = {}

    async def ask(i: int) -> None:
        answers[i] = (await submit(runtime, "ffn.0", "backward", requests[i], math.inf)).tensors[0]

    async def main() -> None:
        async with trio.open_nursery() as serving:
            async with trio.open_nursery() as asked:
                for i in range(len(sizes)):
                    asked.start_soon(ask, i)
                await serving.start(runtime.run)
            serving.cancel_scope.cancel()

    trio.run(main)
    for i, tensor in enumerate(expected):
        torch.testing.assert_close(answers[i], tensor)


def test_half_precision_gradients_of_many_parts_do_not_lose_what_one_pass_keeps():
    ones = torch.ones(1024, 1).bfloat16()
    for most in (4096, 1):
        module = nn.Linear(1, 1, bias=False).bfloat16()
        nn.init.zeros_(module.weight)
        config = BackendConfig(optimizer="sgd", lr=1.0, max_batch_size=most)
        ExpertBackend("half.0", module, config).backward(ones, ones)
        assert module.weight.item() == -1024


class Faulty(nn.Module):
    """Fails, or overflows, where a row says so. Counts its rows in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        self.seen += len(x)
        if (x == 13).any():
            raise KeyError("13")
        return torch.where(x == 7, torch.inf, x) * self.weight


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_part_that_fails_or_is_refused_leaves_no_trace_of_the_parts_before_it(accumulate):
    backend = ExpertBackend("faulty.0", Faulty(), BackendConfig(max_batch_size=2, accumulate=accumulate))
    x = torch.ones(5, 1)
    backend.backward(x, x)
    before = backend.state()
    for bad, error in ((13.0, RemoteFailure), (7.0, NonFiniteTensor)):
        y = x.clone()
        y[4] = bad
        [answer], _ = compute_batch(backend, "backward", [[y, x]])
        assert type(answer) is error
        assert_same(backend.state(), before)


def test_parts_are_of_equal_size_and_running_statistics_see_each_row_once():
    module = Faulty()
    ExpertBackend("faulty.0", module, BackendConfig(max_batch_size=4)).backward(torch.ones(9, 1), torch.ones(9, 1))
    assert module.rows == [3, 3, 3]
    assert module.seen.item() == 9


async def test_between_two_parts_of_a_large_request_others_are_computed(autojump_clock):
    bench = Bench(nop("big.0", max_batch_size=2), nop("small.0"))
    x = torch.ones(6, 1)
    async with bench.serving(at_once=True):
        for name, uid, count, direction in (
            ("big", "big.0", 6, "backward"),  # three parts, one virtual second each
            ("small", "small.0", 1, "forward"),
            ("same expert", "big.0", 1, "forward"),  # waits for the end of the backward pass
            ("small too", "small.0", 1, "backward"),
        ):
            tensors = [x[:count]] * (1 + (direction == "backward"))
            await bench.queue(name, uid, *tensors, direction=direction)
    assert [(uid, direction) for uid, direction, _, _ in bench.batches] == [
        ("small.0", "forward"), ("small.0", "backward"), ("big.0", "backward"), ("big.0", "forward"),
    ]  # fmt: skip
    assert bench.answers["big"].compute_seconds == 3  # type: ignore[union-attr]
    assert bench.tensors("big")[0].shape == (6, 1)


async def test_a_large_request_that_is_late_or_given_up_ends_before_its_next_part_and_changes_nothing(autojump_clock):
    module = Faulty()
    backend = ExpertBackend("faulty.0", module, BackendConfig(max_batch_size=2))
    before, bench, x = backend.state(), Bench(backend), torch.ones(8, 1)
    async with bench.serving(at_once=True):
        await bench.queue("late", "faulty.0", x, x, direction="backward", within=1.5)
        await trio.sleep(4)
        await bench.queue("given up", "faulty.0", x, x, direction="backward")
        await trio.sleep(1.5)
        bench.scopes["given up"].cancel()
        await trio.sleep(4)
    assert isinstance(bench.answers["late"], DeadlineExceeded)
    assert "between two parts; nothing was changed" in str(bench.answers["late"])
    assert bench.runtime.statistics().expired == 1
    assert module.rows == [2, 2, 2]  # two of four parts, and one of four
    assert_same(backend.state(), before)
    assert not isinstance(bench.answers.get("given up"), CallCancelled)  # nobody waits for it


async def test_a_runtime_that_ends_within_a_large_request_leaves_no_trace_of_it(autojump_clock):
    backend = ExpertBackend("faulty.0", Faulty(), BackendConfig(max_batch_size=2))
    before, bench, x = backend.state(), Bench(backend), torch.ones(8, 1)
    async with bench.serving(at_once=True) as serving:
        await bench.queue("cut short", "faulty.0", x, x, direction="backward")
        await trio.sleep(2.5)
        bench.asked.cancel_scope.shield = True
        serving.cancel_scope.cancel()
    assert isinstance(bench.answers["cut short"], RemoteFailure)
    assert_same(await bench.runtime.snapshot("faulty.0"), before)


async def test_a_clean_stop_waits_for_all_parts(autojump_clock):
    bench, x = Bench(nop(max_batch_size=2)), torch.ones(6, 1)
    async with bench.serving(at_once=True) as serving:
        await bench.queue("big", "nop.0", x)
        await bench.runtime.settle()
        assert trio.current_time() == pytest.approx(3, abs=0.01)
        bench.asked.cancel_scope.shield = True
        serving.cancel_scope.cancel()
    assert torch.equal(bench.tensors("big")[0], x)


async def test_a_snapshot_is_not_taken_between_two_parts_of_a_backward_pass(autojump_clock):
    backend = ExpertBackend("faulty.0", Faulty(), BackendConfig(max_batch_size=2))
    bench, x, states = Bench(backend), torch.ones(6, 1), []

    async def snapshot() -> None:
        states.append(await bench.runtime.snapshot("faulty.0"))

    async with bench.serving(at_once=True):
        await bench.queue("big", "faulty.0", x, x, direction="backward")
        bench.asked.start_soon(snapshot)
    assert [(int(s["counter.updates"]), int(s["module.seen"])) for s in states] == [(1, 6)]


async def test_a_request_larger_than_the_queue_is_taken_while_others_wait_and_leaves_room_for_others(autojump_clock):
    bench = Bench(nop("nop.0"), nop("nop.1"), max_queue_rows=8)
    async with bench.serving():
        await bench.queue("small", "nop.0", torch.ones(2, 1))
        await bench.queue("huge", "nop.1", torch.ones(100, 1))
        assert bench.runtime.statistics().queued_rows == 102
        with pytest.raises(Exception, match="8 rows wait here already, of at most 8"):
            await submit(bench.runtime, "nop.0", "forward", [torch.ones(1, 1)], math.inf)
    bench = Bench(nop("nop.0"), nop("nop.1"), max_queue_rows=8)
    async with bench.serving():
        await bench.queue("huge", "nop.1", torch.ones(100, 1))
        await bench.queue("small", "nop.0", torch.ones(2, 1))
    assert len(bench.tensors("huge")[0]) == 100 and len(bench.tensors("small")[0]) == 2


def test_an_answer_that_no_message_can_hold_is_refused_after_the_first_part():
    class Wide(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.expand(-1, 100)

    module = Wide()
    backend = ExpertBackend("wide.0", module, BackendConfig(max_batch_size=2))
    backend.answer_limit = 4000
    assert backend.forward(torch.ones(10, 1)).shape == (10, 100)
    calls = module.calls
    with pytest.raises(
        MessageTooLarge, match="would answer 12 rows with 4800 bytes, over the limit of a message of 4000"
    ):
        backend.forward(torch.ones(12, 1))
    assert module.calls == calls + 1
    answers, _ = compute_batch(backend, "forward", [[torch.ones(6, 1)], [torch.ones(6, 1)]])
    assert [answer[0].shape for answer in answers if not isinstance(answer, Exception)] == [(6, 100)] * 2


def test_a_cut_pass_equals_the_undivided_one_when_the_schedule_and_staleness_matter():
    options = {"optimizer": "sgd", "lr": 0.5, "age_power": 0.5, "warmup_steps": 3}
    x, grad = batch(7)
    cut, whole = ffn(**options, max_batch_size=2), ffn(**options)
    for either in (cut, whole):
        either.updates = 4
        either.compute("backward", [x, grad], 2.0)
    for one, other in zip(cut.module.parameters(), copy.deepcopy(whole.module).parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_layers_result_does_not_depend_on_max_batch_size_where_an_expert_gets_more_rows_than_that():
    with lk.Swarm(name="parts") as swarm:
        swarm.serve(
            lambda: nn.Identity(), name="id", grid=(3,), isolation="task", backend=BackendConfig(max_batch_size=100)
        )
        layer = swarm.moe(3, grid=(3,), name="id", k_best=2, timeout_after_k_min=30.0)
        nn.init.eye_(layer.gate.weight)
        nn.init.zeros_(layer.gate.bias)
        x = torch.tensor([[6.0, 5.0, 0.0]] * 50 + [[6.0, 0.0, 5.0]] * 51, requires_grad=True)
        output = layer(x)
        output.sum().backward()
    torch.testing.assert_close(output, x)
    torch.testing.assert_close(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_of_requests_that_are_computed_together_rows_that_overflow_cost_no_others(direction):
    module = Doubling()
    backend = ExpertBackend("big.0", module, BackendConfig(max_batch_size=3, optimizer="sgd", lr=1.0))
    one, huge = torch.ones(1, 1), torch.full((1, 1), 3e38)
    requests = [torch.cat([one, huge]), torch.cat([huge, huge]), torch.cat([one, one])]
    tensors: list[Sequence[Tensor]] = [[x] if direction == "forward" else [torch.ones_like(x), x] for x in requests]
    (partly, none, all_of_them), updates = compute_batch(backend, direction, tensors)
    assert isinstance(none, NonFiniteTensor) and updates == (direction == "backward")
    assert not isinstance(partly, Exception) and partly[0].isfinite().tolist() == [[True], [False]]
    assert not isinstance(all_of_them, Exception) and all_of_them[0].tolist() == [[2.0], [2.0]]
    assert module.weight.item() == (2.0 - 3 if updates else 2.0)


class Doubling(nn.Module):
    """2 x, at first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
