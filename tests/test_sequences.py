"""A layer over sequences: one decision of the gate for each, and experts that see it whole, with its mask."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import labkit as lk
from labkit.client.dispatch import DispatchConfig
from labkit.client.fitting import fitting_outputs
from labkit.client.moe import MixtureOfExperts
from labkit.client.pooling import first, mean
from labkit.client.tracing import trace_search
from labkit.directory.grids import GridInfo
from labkit.errors import BadRequest, ExpertsRefused, NonFiniteTensor, NotEnoughExperts
from labkit.events import CallFailed, CallFinished, Event, PassFinished, RoutingChosen
from labkit.expert_protocol import ExpertSchema, TensorSchema
from labkit.server.layers import Transformer
from labkit.server.optimizer import BackendConfig
from tests.local_moe import LocalMoE
from tests.swarms import eventually

DIM = 8
STEP = BackendConfig(optimizer="sgd", lr=1.0)  # so that a step changes a parameter by its gradient


class Block(Transformer):
    """The kind "transformer", which may have its mask by place here, as `LocalMoE` hands it over."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__(DIM, heads=2, inner=12, causal=causal, max_length=32)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask)


class Held(Block):
    """Computes nothing while all of its kind are held."""

    begun, free = threading.Event(), threading.Event()
    free.set()  # a server tries an expert when it starts

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.begun.set()
        assert self.free.wait(50)
        return super().forward(x, mask)


class Counts(nn.Module):
    """Sequences [rows, seq, dim] and weights of positions -> a summary [rows, 3], and positions [rows, seq, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.example_inputs = (torch.zeros(1, 4, DIM), torch.zeros(1, 4))
        self.summary, self.each = nn.Linear(DIM, 3), nn.Linear(DIM, 2)

    def forward(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return self.summary((x * weights[..., None]).sum(1)), self.each(x)


class Broken(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        raise OSError("this expert has no disk")


class Grid:
    """A grid of the swarm, and the modules of its experts."""

    def __init__(
        self, swarm: lk.Swarm, name: str, *kinds: object, sizes: tuple[int, ...] | None = None,
        trained: BackendConfig = STEP,
    ) -> None:  # fmt: skip
        self.swarm, self.name, self.sizes = swarm, name, sizes or (len(kinds),)
        made: list[nn.Module] = []
        waiting = list(kinds)

        def factory() -> nn.Module:
            made.append(waiting[min(len(made), len(waiting) - 1)]())  # type: ignore[operator]
            return made[-1]

        (self.server,) = swarm.serve(factory, name=name, grid=self.sizes, isolation="task", backend=trained, backups=0)
        self.modules = dict(zip(self.server.uids, made, strict=False))
        self.fresh = copy.deepcopy(self.modules)

    def reset(self) -> None:
        for uid, module in self.modules.items():
            module.load_state_dict(self.fresh[uid].state_dict())

    def both(self, pool: object = "mean", k_best: int = 2, **options: object) -> tuple[MixtureOfExperts, LocalMoE]:
        """A layer over it, and the same one with copies of the gate and the experts."""
        options = {"timeout_after_k_min": 30.0, **options}  # all answers count, on a busy machine, too
        layer = self.swarm.moe(
            DIM, name=self.name, k_best=k_best, sequences=True, pool=pool, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        seen = pool if callable(pool) else {"mean": one_mean, "first": one_first}[str(pool)]
        return layer, LocalMoE(
            copy.deepcopy(layer.gate), self.sizes, copy.deepcopy(self.modules), k_best,
            lambda *row: seen(*(tensor[None] for tensor in row))[0],
        )  # fmt: skip

    def assert_stepped_by(self, *locals: LocalMoE) -> None:
        """Every parameter of every expert has changed by the sum of the gradients that it has locally."""
        for place, (uid, mine) in enumerate(self.modules.items()):
            its = [list(local.experts[place][1].parameters()) for local in locals]
            for i, (now, before) in enumerate(zip(mine.parameters(), self.fresh[uid].parameters(), strict=True)):
                grads = [parameters[i].grad for parameters in its]
                total = sum((grad for grad in grads if grad is not None), torch.zeros_like(now))
                assert_close(before - now, total, atol=2e-5, rtol=1e-4)


def all_at_once(grid: Grid, calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls whose requests, one for each of two experts, all wait at the server before any is begun."""
    Held.free.clear()
    Held.begun.clear()
    with ThreadPoolExecutor(1 + len(calls)) as threads:
        try:
            first = threads.submit(grid.swarm.expert("held.0"), torch.zeros(1, 1, DIM))
            assert Held.begun.wait(50)
            futures = [threads.submit(call) for call in calls]
            eventually(lambda: grid.server.statistics().queued_requests == 2 * len(calls))
        finally:
            Held.free.set()
        first.result()
        return [future.result() for future in futures]


def one_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    there = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return torch.stack([row[is_there].sum(0) / max(1, is_there.sum()) for row, is_there in zip(x, there, strict=True)])


def one_first(x: Tensor, mask: Tensor | None = None) -> Tensor:
    places = [0] * len(x) if mask is None else [next((i for i, v in enumerate(m) if v), 0) for m in mask.tolist()]
    return torch.stack([row[place] for row, place in zip(x, places, strict=True)])


def plain() -> nn.Module:
    return Block()


def causal() -> nn.Module:
    return Block(causal=True)


@pytest.fixture(scope="module")
def swarm() -> Iterator[lk.Swarm]:
    with lk.Swarm("tests of sequences") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def grids(swarm: lk.Swarm) -> dict[str, Grid]:
    torch.manual_seed(0)
    return {
        "plain": Grid(swarm, "plain", plain, sizes=(2, 2)),
        "causal": Grid(swarm, "causal", causal, sizes=(3,)),
        "counts": Grid(swarm, "counts", Counts, sizes=(2,)),
        "broken": Grid(swarm, "broken", plain, plain, Broken),
        "held": Grid(swarm, "held", Held, sizes=(2,), trained=BackendConfig(optimizer="sgd", lr=0.0)),
    }


@pytest.fixture(autouse=True)
def same_start(grids: dict[str, Grid]) -> None:
    torch.manual_seed(0)
    for grid in grids.values():
        grid.reset()


@pytest.fixture
def events(swarm: lk.Swarm) -> Iterator[list[Event]]:
    events: list[Event] = []
    remove = swarm.on_event(events.append)
    yield events
    remove()


def twice(*shape: int) -> tuple[Tensor, Tensor]:
    """The same random input as two leaves."""
    x = torch.randn(shape)
    return x.clone().requires_grad_(), x.clone().requires_grad_()


def lengths(*each: int, seq: int) -> Tensor:
    """A mask [n, seq] of sequences that are so long, and padding behind them."""
    return torch.arange(seq)[None, :] < torch.tensor(each)[:, None]


# ---------------------------------------------------------------- the same as locally


@pytest.mark.parametrize("name", ["plain", "causal"])
@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_outputs_and_every_gradient_are_those_of_the_layer_computed_locally(grids, name, pool, masked):
    layer, local = grids[name].both(pool)
    mask = [lengths(1, 3, 5, 5, 2, 4, seq=5)] if masked else []
    (x, its_x), target = twice(6, 5, DIM), torch.randn(6, 5, DIM)
    if masked:
        target = target * mask[0][..., None]  # what comes out where there is padding is nobody's concern
    y, its_y = layer(x, **dict(zip(["mask"], mask, strict=False))), local(its_x, *mask)
    assert y.shape == (6, 5, DIM)
    assert_close(y, its_y)
    (y * target).sum().backward()
    (its_y * target).sum().backward()
    assert_close(x.grad, its_x.grad)
    assert_close(layer.gate.weight.grad, local.gate.weight.grad)
    assert_close(layer.gate.bias.grad, local.gate.bias.grad)
    grids[name].assert_stepped_by(local)


@pytest.mark.parametrize("shape", [(5, DIM), (2, 3, 5, DIM)], ids=["one sequence", "more dimensions"])
def test_any_shape_may_stand_before_the_positions(grids, shape):
    layer, local = grids["plain"].both()
    (x, its_x), mask = twice(*shape), torch.rand(shape[:-1]) < 0.7
    y, its_y = layer(x, mask=mask), local(its_x, mask)
    y.square().sum().backward()
    its_y.square().sum().backward()
    assert_close((y, x.grad), (its_y, its_x.grad))


def test_the_gate_sees_what_any_function_or_module_makes_of_a_sequence_and_of_what_it_asks_for(grids):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(DIM, 1)

        def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
            scores = self.score(x)[..., 0].masked_fill(~mask, -torch.inf)
            return (torch.softmax(scores, 1)[..., None] * x).sum(1)

    pool = Attention()
    its_pool = copy.deepcopy(pool)
    layer = grids["plain"].both(pool)[0]
    _, local = grids["plain"].both(lambda x, mask: its_pool(x, mask=mask))
    local.gate.load_state_dict(layer.gate.state_dict())
    (x, its_x), mask = twice(6, 5, DIM), lengths(1, 3, 5, 5, 2, 4, seq=5)
    layer(x, mask=mask).sum().backward()
    local(its_x, mask).sum().backward()
    assert_close(x.grad, its_x.grad)
    assert_close(pool.score.weight.grad, its_pool.score.weight.grad)
    assert "pool.score.weight" in layer.state_dict() and "pool=Attention" in repr(layer)


def test_experts_may_have_several_outputs_of_positions_and_of_whole_sequences(grids):
    layer = grids["counts"].swarm.moe(DIM, name="counts", sequences=True)
    modules = list(grids["counts"].modules.values())
    for seq in (4, 7):  # (the server has seen 4 only, when it began)
        x, weights = torch.randn(6, seq, DIM), torch.rand(6, seq)
        summary, each = layer(x, weights)
        gated = torch.softmax(layer.gate(x.mean(1)), 1)  # [6, 2]
        assert_close(summary, sum(gated[:, i, None] * modules[i](x, weights)[0] for i in (0, 1)))
        assert_close(each, sum(gated[:, i, None, None] * modules[i](x, weights)[1] for i in (0, 1)))
    assert layer.output_shapes == ((3,), (-1, 2)) and "out=3, 2, sequences=True, pool=mean" in repr(layer)


def test_an_expert_of_positions_takes_sequences_too(swarm):
    (server,) = swarm.serve("ffn", hidden=DIM, inner=4, grid=(2,), isolation="task")
    layer = swarm.moe(DIM, sequences=True)
    x = torch.randn(3, 5, DIM)
    weights = torch.softmax(layer.gate(x.mean(1)), 1)
    each = [swarm.expert(f"ffn.{i}")(x) for i in (0, 1)]
    assert_close(layer(x), sum(weights[:, i, None, None] * each[i] for i in (0, 1)))
    server.stop()


def test_batches_may_have_sequences_of_different_lengths(grids):
    layer, local = grids["causal"].both()
    for seq in (5, 1, 9, 5):
        x = torch.randn(4, seq, DIM)
        assert_close(layer(x), local(x))


def test_requests_of_different_lengths_meet_at_a_server_and_each_gets_its_own_answer(grids):
    grid = grids["held"]
    layers, locals = zip(*(grid.both() for _ in range(4)), strict=True)
    inputs, masks = zip(*((twice(3, seq, DIM), lengths(1, 2, seq, seq=seq)) for seq in (5, 3, 5, 3)), strict=True)
    calls = zip(layers, inputs, masks, strict=True)
    outputs = all_at_once(grid, [partial(layer, x, mask=mask) for layer, (x, _), mask in calls])
    all_at_once(grid, [y.square().sum().backward for y in outputs])
    assert grid.server.statistics().batches == 2 * (1 + 2 * 2)  # each way the first, and one an expert and length
    for local, y, (x, its_x), mask in zip(locals, outputs, inputs, masks, strict=True):
        its_y = local(its_x, mask)
        its_y.square().sum().backward()
        assert_close((y, x.grad), (its_y, its_x.grad))


# ---------------------------------------------------------------- padding


def test_what_stands_at_padding_changes_nothing_and_gets_no_gradient(grids):
    layer, _ = grids["plain"].both()
    mask = lengths(1, 3, 5, seq=5)
    x = torch.randn(3, 5, DIM, requires_grad=True)
    other = torch.where(mask[..., None], x.detach(), 100.0)
    y = layer(x, mask=mask)[mask]
    assert_close(y, layer(other, mask=mask)[mask])
    assert_close(y, layer(x, mask=mask.long())[mask])
    y.sum().backward()
    assert x.grad is not None and x.grad[mask].any() and not x.grad[~mask].any()


def test_a_sequence_of_padding_alone_is_finite_and_decided_on_by_the_bias_of_the_gate(grids):
    layer, _ = grids["causal"].both()
    x = torch.randn(2, 4, DIM, requires_grad=True)
    mask = lengths(0, 3, seq=4)
    y = layer(x, mask=mask)
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert trace_search(layer, x, mask=mask).grid_scores[0][0].tolist() == layer.gate.bias.tolist()


@pytest.mark.parametrize("causal", [False, True])
def test_a_transformer_computes_for_a_padded_sequence_what_it_does_for_the_sequence_alone(causal):
    expert = Block(causal)
    x = torch.randn(4, 6, DIM, requires_grad=True)
    mask = lengths(2, 6, 4, 3, seq=6)
    mask[1], mask[2] = mask[2].flip(0), torch.tensor([0, 1, 0, 1, 1, 0])  # before it, and between
    y = expert(x, mask)
    for row in range(4):
        alone = expert(x[row : row + 1, mask[row]])[0]
        assert_close(y[row, mask[row]], alone)
        target = torch.randn_like(alone)
        mine, its = (
            torch.autograd.grad((one * target).sum(), [x, *expert.parameters()], retain_graph=True, allow_unused=True)
            for one in (y[row, mask[row]], alone)
        )
        assert_close(mine, its)
    assert_close(expert(x, torch.ones(4, 6, dtype=torch.bool)), expert(x))
    assert expert(x, torch.zeros(4, 6, dtype=torch.bool)).isfinite().all()


def test_a_pool_is_exact_in_half_precision_and_blind_for_what_is_not_there():
    x, mask = torch.full((2, 100, 3), 1000.0, dtype=torch.float16), lengths(100, 0, seq=100)
    assert mean(x).tolist() == [[1000.0] * 3] * 2  # though the sum is beyond float16
    assert mean(x, mask).tolist() == [[1000.0] * 3, [0.0] * 3]
    x[0, 0] = torch.nan
    late = torch.arange(100) > 0
    assert mean(x, late.expand(2, 100)).tolist() == first(x, late.expand(2, 100)).tolist() == [[1000.0] * 3] * 2


# ---------------------------------------------------------------- failures and options, as for rows


def test_an_expert_that_fails_is_left_out_of_the_mean_of_whole_sequences(grids):
    grid = grids["broken"]
    layer, local = grid.both(k_best=3)
    local.experts = local.experts[:2]
    (x, its_x), target = twice(4, 5, DIM), torch.randn(4, 5, DIM)
    y, its_y = layer(x), local(its_x)
    (y * target).sum().backward()
    (its_y * target).sum().backward()
    assert_close((y, x.grad, layer.gate.weight.grad), (its_y, its_x.grad, local.gate.weight.grad))
    strict, _ = grid.both(k_best=3, k_min=3)
    with pytest.raises(NotEnoughExperts, match=r"has no disk.* 4 of 4 rows in a forward pass got too few answers"):
        strict(x)
    zeros, _ = grid.both(k_best=3, k_min=3, allow_zero_outputs=True)
    assert not zeros(x).any()


def test_a_sequence_counts_as_one_row_in_what_is_told(grids, events):
    layer, _ = grids["plain"].both()
    layer(torch.randn(6, 5, DIM)).sum().backward()
    (chosen,) = [event.rows for event in events if isinstance(event, RoutingChosen)]
    assert sum(chosen.values()) == 6 * 2
    assert [event.rows for event in events if isinstance(event, PassFinished)] == [6, 6]
    rows = [(e.uid, e.rows) for e in events if isinstance(e, CallFinished) and e.direction == "backward"]
    assert dict(rows) == chosen


def test_switch_routing_jitter_and_grid_dropout_are_as_for_rows(grids):
    layer, _ = grids["plain"].both(k_best=1, routing="switch", jitter=0.5, grid_dropout=0.5)
    x = torch.randn(6, 5, DIM)
    assert not torch.equal(layer.grid_scores(x)[0], layer.grid_scores(x)[0])
    layer.eval()
    y, scores = layer(x), layer.grid_scores(x)
    best = [torch.softmax(score, 1).max(1).values for score in scores]
    expert = grids["plain"].modules[trace_search(layer, x).uids(0)[0]]
    assert_close(y[0], (best[0] * best[1])[0] * expert(x[:1])[0])
    assert layer.balance_loss is not None and layer.balance_loss.isfinite()


def test_frozen_experts_are_asked_and_not_trained(grids):
    layer, local = grids["plain"].both()
    layer.requires_grad_(False)
    x, its_x = twice(4, 5, DIM)
    layer(x).sum().backward()
    local(its_x).sum().backward()
    assert_close(x.grad, its_x.grad)
    before, now = grids["plain"].fresh, grids["plain"].modules
    assert all(
        torch.equal(p, q) for uid in now for p, q in zip(now[uid].parameters(), before[uid].parameters(), strict=True)
    )


def test_it_works_under_autocast_and_in_half_precision(grids):
    layer, local = grids["plain"].both(k_best=4)
    (x, its_x), mask = twice(4, 5, DIM), lengths(1, 3, 5, 5, seq=5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, mask=mask)
    its_y = local(its_x, mask)
    half = copy.deepcopy(layer).bfloat16()(x.detach().bfloat16(), mask=mask)
    y.float()[mask].sum().backward()
    its_y[mask].sum().backward()
    assert y.dtype == half.dtype == torch.bfloat16
    for rough, exact in ((y, its_y), (half, its_y), (x.grad, its_x.grad)):
        assert rough is not None and exact is not None
        assert (rough - exact)[mask].norm() < 0.03 * exact[mask].norm()


def test_an_empty_batch_has_an_empty_output(grids, events):
    layer, _ = grids["plain"].both()
    x = torch.randn(0, 5, DIM, requires_grad=True)
    y = layer(x, mask=torch.ones(0, 5, dtype=torch.bool))
    y.sum().backward()
    assert y.shape == (0, 5, DIM) and x.grad is not None
    assert not [event for event in events if isinstance(event, (CallFinished, CallFailed))]


def test_it_pickles_and_copies_and_so_do_layers_of_before(grids):
    layer, _ = grids["plain"].both("first")
    x = torch.randn(3, 5, DIM)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert_close(other(x), layer(x))
    fresh, _ = grids["plain"].both("first")
    fresh.load_state_dict(layer.state_dict())
    assert_close(fresh(x), layer(x))
    old = MixtureOfExperts(DIM, (2,)).__getstate__()
    del old["sequences"], old["pool"]
    older = MixtureOfExperts.__new__(MixtureOfExperts)
    older.__setstate__(old)
    assert (older.sequences, older.pool) == (False, "mean")


# ---------------------------------------------------------------- what cannot be


def test_inputs_that_cannot_be_are_refused_before_anybody_is_asked(grids, events):
    layer, _ = grids["plain"].both()
    x, mask = torch.randn(3, 5, DIM), torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[\.\.\., seq, 8\] with at least one position; got \[8\]"):
        layer(x[0, 0])
    with pytest.raises(ValueError, match=r"at least one position; got \[3, 0, 8\]"):
        layer(x[:, :0])
    with pytest.raises(ValueError, match=r"begin with the same shape, \[3\] here; the further ones are \[2, 5\]"):
        layer(x, mask=mask[:2])
    for wrong in (mask[:, :4], mask.float(), mask[:, :, None]):
        with pytest.raises(ValueError, match=r"takes a mask \[\.\.\., seq\] of bools"):
            layer(x, mask=wrong)
    x[1, 2, 0] = torch.nan
    with pytest.raises(NonFiniteTensor, match=r"inputs for 'plain': .* NaN or infinity in row 1"):
        layer(x, mask=lengths(2, 2, 2, seq=5))  # (the gate does not see it)
    assert not [event for event in events if isinstance(event, (CallFinished, CallFailed))]


def test_a_pool_that_makes_no_vector_of_each_sequence_is_told_so(grids):
    x = torch.randn(3, 5, DIM)
    pools: list[tuple[Callable[..., Any], str]] = [
        (lambda x: x, r"float32 \[3, 5, 8\]"), (lambda x: x.argmax(1), r"int64 \[3, 8\]"), (len, "int"),
    ]  # fmt: skip
    for pool, got in pools:
        layer = MixtureOfExperts(DIM, (2, 2), "plain", swarm=grids["plain"].swarm.name, sequences=True, pool=pool)
        with pytest.raises(ValueError, match=rf"returned {got} for sequences \[3, 5, 8\]; .*: \[3, 8\]"):
            layer(x)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sequences": True, "pool": "maen"}, "pool='maen': one of mean, first; did you mean 'mean'"),
        ({"sequences": True, "pool": 3}, "pool=3: mean, first, or a function"),
        ({"pool": "first"}, "a pool for sequences only"),
        ({"sequences": "yes"}, "sequences='yes'"),
        ({"sequences": True, "out": 0}, "out=0"),
        ({"out": [(-1, 3)]}, "out="),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        MixtureOfExperts(DIM, (2,), dispatch=DispatchConfig(k_best=1), **options)


def test_what_experts_refuse_of_a_sequence_is_said_once_in_their_words(grids):
    layer, _ = grids["plain"].both()
    with pytest.raises((ExpertsRefused, BadRequest), match=r"at most 32, 8\]"):
        layer(torch.randn(2, 33, DIM))


# ---------------------------------------------------------------- what the grid declares


def info(inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]]) -> GridInfo:
    tensors = [tuple(TensorSchema("float32", shape) for shape in shapes) for shapes in (inputs, outputs)]
    return GridInfo((2,), "mine", {}, schema=ExpertSchema(*tensors))


@pytest.mark.parametrize(
    ("inputs", "outputs", "out"),
    [
        ([(-1, 8)], [(-1, 8)], [(-1, 8)]),
        ([(-1, 8)], [(-1, 5), (3,)], [(-1, 5), (3,)]),
        ([(16, 8)], [(16, 5), (7, 5)], [(-1, 5), (7, 5)]),  # tried with 16 positions
        ([(8,)], [(5,)], [(-1, 5)]),
        ([(-1, -1)], [(-1, -1)], 8),
        ([(-1, 8)], [(-1,)], [(-1,)]),  # a number for each position
        ([], [], 8),
    ],
)
def test_a_layer_learns_the_shape_of_its_output_from_what_is_declared(inputs, outputs, out):
    assert fitting_outputs(8, (2,), None, "mine", info(inputs, outputs), sequences=True) == out


def test_a_layer_that_does_not_fit_the_grid_is_refused_where_it_is_made(grids, swarm):
    with pytest.raises(ValueError, match=r"one vector; swarm\.moe\(8, sequences=True\) sends whole sequences"):
        swarm.moe(DIM, name="plain")
    with pytest.raises(ValueError, match=r"take positions of width 8, so write swarm\.moe\(8, sequences=True\)"):
        swarm.moe(9, name="plain", sequences=True)
    with pytest.raises(ValueError, match=r"out=9: .* give \[rows, any, 8\]; leave out=… out"):
        swarm.moe(DIM, name="plain", sequences=True, out=9)
    with pytest.raises(ValueError, match=r"take \[rows, 3, any, any\], and a layer sends each row as one sequence"):
        fitting_outputs(8, (2,), None, "mine", info([(3, -1, -1)], [(4,)]), sequences=True)
    with pytest.raises(ValueError, match=r"say with out=… what that is for positions of width 8"):
        fitting_outputs(8, (2,), None, "mine", info([(-1, 8)], [(-1, -1), (3,)]), sequences=True)
    assert swarm.moe(DIM, name="plain", sequences=True, out=DIM).output_shapes == ((-1, DIM),)
