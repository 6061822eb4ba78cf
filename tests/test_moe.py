"""The MoE layer over the real wire: it computes what the same layer computes locally, and behaves as a torch module."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import labkit as lk
from labkit.client.dispatch import DispatchConfig
from labkit.client.moe import MixtureOfExperts, balance_loss
from labkit.client.routes import Dispatched, Quorum
from labkit.errors import NoExperts, RemoteFailure, SwarmClosed
from labkit.events import CallFailed, CallFinished, Event, RoutingChosen
from labkit.expert_uid import grid_uids
from labkit.launch.handle import ServerHandle
from labkit.server.backend import ExpertBackend
from labkit.server.checkpoints import load_expert, save_expert
from labkit.server.layers import FeedForward
from labkit.server.optimizer import BackendConfig
from labkit.training.trainer import evaluate
from labkit.wire.compression import CODECS
from labkit.wire.zmq_socket import ZERO_COPY_SIZE
from tests.local_moe import LocalMoE
from tests.swarms import eventually

pytestmark = pytest.mark.usefixtures("forked_python")

DIM = 6
WIDE = 128  # with some hundred rows, frames that are sent and received without being copied
STEP = BackendConfig(optimizer="sgd", lr=1.0)  # so that a step changes a parameter by its gradient


class Grid:
    """A grid of the swarm, and the modules of its experts: their servers are tasks of this process."""

    def __init__(
        self,
        swarm: lk.Swarm,
        name: str,
        sizes: tuple[int, ...],
        uids: list[str],
        *kinds: type[nn.Module],
    ) -> None:
        self.swarm, self.name, self.sizes = swarm, name, sizes
        self.servers: list[ServerHandle] = []
        self.modules: dict[str, nn.Module] = {}
        for i, kind in enumerate(kinds):  # a server for each kind
            made: list[nn.Module] = []

            def factory(kind: type[nn.Module] = kind, made: list[nn.Module] = made) -> nn.Module:
                made.append(kind())
                return made[-1]

            (server,) = swarm.serve(
                factory, name=name, grid=sizes, uids=uids[i :: len(kinds)], isolation="task", backend=STEP
            )
            self.servers.append(server)
            self.modules |= dict(zip(server.uids, made, strict=True))
        self.fresh = copy.deepcopy(self.modules)

    def reset(self) -> None:
        for uid, module in self.modules.items():
            module.load_state_dict(self.fresh[uid].state_dict())

    def moe(self, k_best: int, **options: object) -> MixtureOfExperts:
        options = {"timeout_after_k_min": 30.0, **options}  # all answers count, on a busy machine, too
        return self.swarm.moe(DIM, self.sizes, self.name, k_best=k_best, **options)  # type: ignore[arg-type]

    def local(self, moe: MixtureOfExperts) -> LocalMoE:
        """The same layer with copies of the gate and the experts."""
        return LocalMoE(copy.deepcopy(moe.gate), self.sizes, copy.deepcopy(self.modules), moe.dispatch.k_best)

    def assert_stepped_by(self, local: LocalMoE) -> None:
        """Every parameter of every expert has changed by the gradient that it has locally."""
        for (_, expert), mine, fresh in zip(local.experts, self.modules.values(), self.fresh.values(), strict=True):
            parameters = zip(expert.parameters(), mine.parameters(), fresh.parameters(), strict=True)
            for its, now, before in parameters:
                assert_close(before - now, torch.zeros_like(now) if its.grad is None else its.grad)


class Small(FeedForward):
    def __init__(self) -> None:
        super().__init__(DIM, 8)


class ManyInputs(nn.Module):
    """x [rows, dim], y [rows, 3, 2] and token ids [rows] -> [rows, dim]"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(DIM, DIM), nn.Linear(2, DIM), nn.Embedding(5, DIM)

    def forward(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        output: Tensor = torch.tanh(self.first(x) + self.third(ids)) * self.second(y).sum(1)
        return output


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise OSError("this expert has no disk")


class BrokenBackward(Small):
    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if output.requires_grad:
            output.register_hook(self._fail)
        return output

    def _fail(self, grad: Tensor) -> None:
        raise OSError("this expert has no disk")


class Echo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Held(FeedForward):
    """Computes nothing while all of its kind are held."""

    begun, free = threading.Event(), threading.Event()
    free.set()  # a server tries an expert when it starts

    def __init__(self) -> None:
        super().__init__(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        self.begun.set()
        assert self.free.wait(50)
        return super().forward(x)


@contextmanager
def held(server: ServerHandle, requests: int, call: Callable[[], object]) -> Iterator[None]:
    """Hold its experts with this call until so many other requests wait."""
    Held.free.clear()
    Held.begun.clear()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(call)
        try:
            assert Held.begun.wait(50)
            yield
            eventually(lambda: server.statistics().queued_requests == requests)
        finally:
            Held.free.set()
        first.result()


class Blank(nn.Module):
    """Without a residual, and all of its outputs and input gradients are 0 until it has learnt something."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(10, 64), nn.Linear(64, 10)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.output(torch.relu(self.hidden(x)))
        return output


ASKING = (RoutingChosen, CallFinished, CallFailed)  # servers go on declaring their experts meanwhile


@pytest.fixture(scope="module")
def swarm() -> Iterator[lk.Swarm]:
    with lk.Swarm("tests of the layer") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def grids(swarm: lk.Swarm) -> dict[str, Grid]:
    torch.manual_seed(0)

    def grid(name: str, sizes: tuple[int, ...], coordinates: str, *kinds: type[nn.Module]) -> Grid:
        return Grid(swarm, name, sizes, [f"{name}.{c}" for c in coordinates.split()], *kinds)

    return {
        "line": grid("line", (5,), "0 1 2 3 4", Small),
        "square": grid("square", (3, 3), "0.0 0.1 0.2 1.0 1.1 1.2 2.0 2.1 2.2", Small, Small),
        "cube": grid("cube", (3, 2, 2), "0.0.0 0.0.1 0.1.0 1.1.1 2.0.1", Small),  # half empty
        "two": grid("two", (4, 4), "0.3 2.1", Small),  # fewer than k_best
        "three": grid("three", (4,), "0 1 2", Echo),
        "many": grid("many", (4,), "0 1 2 3", ManyInputs),
        "broken": grid("broken", (3,), "0 1 2", Small, Broken, BrokenBackward),
        "failing": grid("failing", (1,), "0", Broken),
        "echo": grid("echo", (2, 2), "0.0 0.1 1.0 1.1", Echo),
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


def assert_same_gate(moe: MixtureOfExperts, local: LocalMoE) -> None:
    assert_close(moe.gate.weight.grad, local.gate.weight.grad)
    assert_close(moe.gate.bias.grad, local.gate.bias.grad)


def assert_same_pass(moe: MixtureOfExperts, local: LocalMoE, x: Tensor, its_x: Tensor, target: Tensor) -> None:
    """Outputs and, of a loss, the gradients of the input and of the gate."""
    y, its_y = moe(x), local(its_x)
    assert_close(y, its_y)
    (y * target).sum().backward()
    (its_y * target).sum().backward()
    assert_close(x.grad, its_x.grad)
    assert_same_gate(moe, local)


def assert_roughly(half: Tensor | None, exact: Tensor | None) -> None:
    assert half is not None and exact is not None
    assert (half - exact).norm() < 0.03 * exact.norm()


# ---------------------------------------------------------------- the same as locally


@pytest.mark.parametrize("shape", [(10, DIM), (2, 5, DIM), (DIM,)], ids=["rows", "sequences", "one row"])
@pytest.mark.parametrize(("name", "k_best"), [("line", 2), ("square", 4), ("cube", 3), ("two", 4)])
def test_outputs_and_every_gradient_are_those_of_the_layer_computed_locally(grids, name, k_best, shape):
    moe = grids[name].moe(k_best)
    local = grids[name].local(moe)
    (x, its_x), target = twice(*shape), torch.randn(shape)
    assert_same_pass(moe, local, x, its_x, target)
    grids[name].assert_stepped_by(local)


def test_so_they_are_for_experts_with_several_inputs(grids):
    moe = grids["many"].moe(k_best=3)
    local = grids["many"].local(moe)
    (x, its_x), (y, its_y), ids = twice(2, 5, DIM), twice(2, 5, 3, 2), torch.randint(5, (2, 5))
    moe(x, y, ids).square().sum().backward()
    local(its_x, its_y, ids).square().sum().backward()
    assert_close(x.grad, its_x.grad)
    assert_close(y.grad, its_y.grad)
    assert_same_gate(moe, local)
    grids["many"].assert_stepped_by(local)


def test_so_they_are_for_those_who_answered_where_other_experts_fail(grids):
    moe = grids["broken"].moe(k_best=3)
    local = grids["broken"].local(moe)
    (_, good), _, (_, no_backward) = local.experts
    assert isinstance(no_backward, BrokenBackward)
    no_backward.requires_grad_(False)
    local.experts = [((0,), good), ((2,), lambda x: Small.forward(no_backward, x.detach()))]
    (x, its_x), target = twice(10, DIM), torch.randn(10, DIM)
    assert_same_pass(moe, local, x, its_x, target)


def test_so_they_are_with_all_that_makes_it_fast_and_safe(tmp_path):
    """Frames that are not copied, encryption, servers that are processes, and the default optimizer, fused Adam."""
    grids = {"line": (4,), "square": (2, 2), "cube": (2, 1, 2)}
    modules = {uid: FeedForward(WIDE, WIDE) for name, grid in grids.items() for uid in grid_uids(name, grid)}
    for uid, module in modules.items():
        save_expert(tmp_path, uid, ExpertBackend(uid, module).state(), kind="ffn")
    with lk.Swarm("fast and safe", secure=True) as swarm:
        for name, grid in grids.items():
            swarm.serve(
                "ffn", hidden=WIDE, inner=WIDE, grid=grid, name=name, isolation="process", checkpoint_dir=tmp_path
            )
        assert all(server.contact and server.contact.secure and server.pid for server in swarm.servers)
        chosen: list[Event] = []
        swarm.on_event(chosen.append)
        for name, grid in grids.items():
            moe = swarm.moe(WIDE, name=name, k_best=2, timeout_after_k_min=30.0)
            experts = {uid: modules[uid] for uid in grid_uids(name, grid)}
            local = LocalMoE(copy.deepcopy(moe.gate), grid, experts, k_best=2)
            (x, its_x), target = twice(400, WIDE), torch.randn(400, WIDE) / 20
            assert_same_pass(moe, local, x, its_x, target)
        for server in swarm.servers:
            server.stop()  # it saves its experts
    rows = [event.rows.values() for event in chosen if isinstance(event, RoutingChosen)]
    assert [len(some) for some in rows] == [4, 4, 4] and min(map(min, rows)) * WIDE * 4 >= ZERO_COPY_SIZE
    for uid, module in modules.items():
        assert_stepped_by_adam(tmp_path, uid, module)


def assert_stepped_by_adam(directory: Path, uid: str, local: nn.Module) -> None:
    """The saved expert has made the step that Adam makes here. It goes by the sign of a gradient, so not where that is
    lost in rounding: there the moment says what the gradient was."""
    saved = load_expert(directory, uid)
    assert saved is not None and saved["counter.updates"] == 1
    torch.optim.Adam(local.parameters(), fused=False).step()
    for name, its in local.named_parameters():
        assert its.grad is not None
        assert_close(saved[f"optimizer.exp_avg.{name}"] * 10, its.grad)
        sure = its.grad.abs() > 1e-6
        assert sure.float().mean() > 0.9
        assert_close(saved[f"module.{name}"][sure], its.detach()[sure], atol=1e-6, rtol=1.3e-6)  # a step is 1e-3


def test_so_they_are_for_each_of_several_clients_whose_requests_are_computed_together(swarm):
    grid = Grid(swarm, "held", (3,), ["held.0", "held.1", "held.2"], Held)
    (server,) = grid.servers
    first = partial(swarm.expert("held.0"), torch.zeros(1, WIDE))
    with lk.Swarm.join(swarm.invite(), name="elsewhere") as other, ThreadPoolExecutor(4) as threads:
        moes = [
            member.moe(WIDE, name="held", k_best=2, timeout_after_k_min=30.0) for member in (swarm, other, swarm, other)
        ]
        inputs, targets = zip(*((twice(n, WIDE), torch.randn(n, WIDE) / 16) for n in (220, 240, 260, 280)), strict=True)
        with held(server, 4 * 3, first):
            forward = [threads.submit(moe, x) for moe, (x, _) in zip(moes, inputs, strict=True)]
        outputs = [future.result() for future in forward]
        with held(server, 4 * 3, first):
            losses = [(y * target).sum() for y, target in zip(outputs, targets, strict=True)]
            backward = [threads.submit(loss.backward) for loss in losses]
        for future in backward:
            future.result()
        done = server.statistics()
    server.stop()
    assert (sum(done.expert_requests), done.batches) == (26, 8)  # each way the first one, and those that waited for it
    experts = grid.fresh  # of all clients: their gradients add up to the one step that each expert makes
    for moe, (x, its_x), y, target in zip(moes, inputs, outputs, targets, strict=True):
        local = LocalMoE(copy.deepcopy(moe.gate), grid.sizes, experts, k_best=2)
        its_y = local(its_x)
        (its_y * target).sum().backward()
        assert_close(y, its_y)
        assert_close(x.grad, its_x.grad)
        assert_same_gate(moe, local)
    grid.assert_stepped_by(local)


def test_each_expert_gets_one_request_in_a_pass(grids, events):
    moe = grids["square"].moe(k_best=4)
    moe(torch.randn(40, DIM)).sum().backward()
    (chosen,) = [event.rows for event in events if isinstance(event, RoutingChosen)]
    assert sum(chosen.values()) == 40 * 4
    for direction in ("forward", "backward"):
        calls = [(event.uid, event.rows) for event in events if isinstance(event, CallFinished)
                 and event.direction == direction]  # fmt: skip
        assert Counter(uid for uid, _ in calls) == Counter(chosen.keys())
        assert dict(calls) == chosen


@pytest.mark.parametrize("frozen_gate", [False, True], ids=["as the gate", "though the gate is frozen"])
def test_experts_are_trained_where_the_layer_is_the_first_and_its_input_needs_no_gradient(grids, frozen_gate):
    moe = grids["line"].moe(k_best=2, train_experts=True if frozen_gate else None)
    local = grids["line"].local(moe)
    moe.gate.requires_grad_(not frozen_gate)
    x = torch.randn(10, DIM)
    moe(x).square().sum().backward()
    local(x).square().sum().backward()
    grids["line"].assert_stepped_by(local)


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def test_a_backward_pass_waits_for_an_expert_in_the_thread_that_asks_for_it(swarm):
    """Autograd runs a function in the thread of the device where its outputs are: on a GPU, that would be the only one.
    So they stay as they came, here in the expert's type, and are moved and converted behind it."""
    server = swarm.serve(Wide, grid=(1,), isolation="task")[0]
    y = swarm.expert("wide.0")(torch.randn(3, DIM))
    assert y.dtype == torch.float32
    ((waits, _),) = y.grad_fn.next_functions
    assert waits.name() == "_CallExpertBackward"
    assert [(one.dtype, one.device.type) for one in waits._input_metadata] == [(torch.float64, "cpu")]
    y.sum().backward()
    server.stop()


def test_so_they_are_by_autograd_grad(grids):
    model = nn.Sequential(grids["line"].moe(k_best=2), nn.Linear(DIM, 1))
    local = grids["line"].local(model[0])
    x = torch.randn(10, DIM)
    grads = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model[1](local(x)).sum().backward()
    assert_close(grads[0], local.gate.weight.grad)
    grids["line"].assert_stepped_by(local)


# ---------------------------------------------------------------- inputs of all sorts


def test_without_gradients_it_only_answers(grids, events):
    moe = grids["line"].moe(k_best=2)
    local = grids["line"].local(moe)
    x = torch.randn(10, DIM)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(moe(x), local(x))
            assert not moe(x * 2).requires_grad  # an input that was made in this mode
    assert {event.direction for event in events if isinstance(event, CallFinished)} == {"forward"}


def test_an_empty_batch_has_an_empty_output_and_gradients_of_zero(grids, events):
    moe = grids["line"].moe(k_best=2)
    x = torch.randn(0, 7, DIM, requires_grad=True)
    y = moe(x)
    assert moe.balance_loss == 0
    (y.sum() + moe.balance_loss).backward()
    assert y.shape == (0, 7, DIM) and x.grad is not None
    assert moe.gate.weight.grad is not None and not moe.gate.weight.grad.any()
    assert not [event for event in events if isinstance(event, ASKING)]


def test_an_input_that_is_not_contiguous_is_read_as_it_looks(grids):
    moe = grids["line"].moe(k_best=2)
    x = torch.randn(DIM, 10).T
    with torch.no_grad():
        assert_close(moe(x), moe(x.contiguous()))
        assert_close(moe(x.expand(3, 10, DIM))[1], moe(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_takes_and_gives_half_precision(grids, dtype):
    moe = grids["line"].moe(k_best=5).to(dtype)
    local = grids["line"].local(moe).float()
    (x, its_x), target = twice(10, DIM), torch.randn(10, DIM)
    y = moe(x.to(dtype))
    its_y = local(its_x)
    (y.float() * target).sum().backward()
    (its_y * target).sum().backward()
    assert y.dtype == dtype
    assert_roughly(y, its_y)
    assert_roughly(x.grad, its_x.grad)


class Thousandfold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1000 * x


def test_an_answer_beyond_half_precision_is_at_its_end_and_not_nan_where_its_weight_is_0(swarm):
    (server,) = swarm.serve(Thousandfold, grid=(2,), isolation="task")
    moe = swarm.moe(1, (2,), "thousandfold", k_best=2).half()
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.bias.copy_(torch.tensor([500.0, 0.0]))
    for autocast in (False, True):
        x = torch.tensor([[1.0], [100.0], [-100.0]], dtype=torch.float16, requires_grad=True)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            y = moe(x)
        y.float().sum().backward()
        assert y.dtype == torch.float16 and y.tolist() == [[1000.0], [65504.0], [-65504.0]]
        assert x.grad is not None and x.grad.tolist() == [[1000.0], [0.0], [0.0]]
    server.stop()


def test_it_works_under_autocast(grids):
    moe = grids["line"].moe(k_best=5)
    local = grids["line"].local(moe)
    (x, its_x), target = twice(10, DIM), torch.randn(10, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
        (y.float() * target).sum().backward()
    (local(its_x) * target).sum().backward()
    assert y.dtype == torch.bfloat16
    assert_roughly(x.grad, its_x.grad)
    assert_roughly(moe.gate.weight.grad, local.gate.weight.grad)


@pytest.mark.parametrize(
    ("codec", "error"),
    [
        ("float16", lambda t: t.abs() * 2**-11),
        ("bfloat16", lambda t: t.abs() * 2**-8),
        ("blockwise8", lambda t: t.abs().max() / 254),
    ],
)
def test_a_codec_costs_what_it_says_and_no_more(grids, codec, error):
    x, target = torch.randn(20, DIM, requires_grad=True), torch.randn(20, DIM)
    y = grids["echo"].moe(k_best=1, codec=codec)(x)
    (y * target).sum().backward()
    assert x.grad is not None
    for got, exact in ((y.detach(), x.detach()), (x.grad, target)):
        assert ((got - exact).abs() <= error(exact) * 1.001 + 1e-6).all()
        assert not torch.equal(got, exact)  # it was used


def accuracy(
    swarm: lk.Swarm, name: str, codec: str = "none", expert_lr: float = 1e-2, trunk_learns: bool = True
) -> float:
    """Of digits behind a bottleneck of 6 numbers: experts have to learn, and to teach the trunk what to let pass."""
    digits, backend = lk.load("digits"), BackendConfig(lr=expert_lr)
    (server,) = swarm.serve(Blank, grid=(3,), name=name, isolation="task", backend=backend, seed=0)
    trunk = nn.Sequential(nn.Linear(digits.dim, 6), nn.Linear(6, digits.classes)).requires_grad_(trunk_learns)
    model = nn.Sequential(trunk, swarm.moe(digits.classes, name=name, k_best=2, codec=codec))
    lk.fit(model, digits, steps=70, batch_size=128, trainers=2, lr=1e-2).wait()
    share = evaluate(model, digits.test_x, digits.test_y)
    server.stop()
    return share


@pytest.mark.parametrize("codec", CODECS)
def test_training_converges_with_every_codec(swarm, codec):
    assert accuracy(swarm, f"digits_{codec}", codec) > 0.85


def test_it_does_not_where_experts_do_not_learn_or_the_layers_before_them_get_no_gradients(swarm):
    assert accuracy(swarm, "still", expert_lr=0.0) < 0.2  # 0.10 is by chance
    assert accuracy(swarm, "frozen", trunk_learns=False) < 0.75


def test_several_threads_may_train_replicas_at_once(grids):
    moe = grids["echo"].moe(k_best=2)

    def passes(seed: int) -> None:
        replica, generator = copy.deepcopy(moe), torch.Generator().manual_seed(seed)
        for _ in range(5):
            x, target = (torch.randn(20, DIM, generator=generator) for _ in range(2))
            x.requires_grad_()
            y = replica(x)
            (y * target).sum().backward()
            assert_close(y, x)
            assert_close(x.grad, target)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(passes, range(4)))


# ---------------------------------------------------------------- gating


def dispatched(*choices: tuple[int, ...]) -> Dispatched:
    """Rows [n] of a one-dimensional grid, sent to these coordinates; -1 is nobody."""
    choice = torch.tensor(choices)
    return Dispatched("ffn", [], choice, choice.clamp(min=0)[:, :, None], choice >= 0, Quorum.of(len(choice), 1))


def test_the_balance_loss_is_1_for_an_even_load_and_the_grids_size_if_one_expert_gets_all():
    even = torch.eye(4) * 30  # each row is sure of another expert
    assert_close(balance_loss([even], dispatched((0,), (1,), (2,), (3,))), torch.tensor(1.0))
    one = torch.tensor([[30.0, 0, 0, 0]] * 4)
    assert_close(balance_loss([one], dispatched((0,), (0,), (0,), (0,))), torch.tensor(4.0))
    assert_close(balance_loss([one, even], dispatched_2d()), torch.tensor(2.5))  # the mean over dimensions


def dispatched_2d() -> Dispatched:
    coordinates = torch.tensor([[[0, 0]], [[0, 1]], [[0, 2]], [[0, 3]]])
    answered = torch.ones(4, 1, dtype=torch.bool)
    return Dispatched("ffn", [], torch.zeros(4, 1, dtype=torch.int64), coordinates, answered, Quorum.of(4, 1))


def test_slots_that_nobody_was_left_for_do_not_weigh_on_the_balance():
    even = torch.eye(2) * 30
    assert_close(balance_loss([even], dispatched((0, -1), (1, -1))), torch.tensor(1.0))


def test_the_gradient_of_the_balance_loss_lowers_the_gates_favourite(grids):
    moe = grids["echo"].moe(k_best=1)
    with torch.no_grad():
        moe.gate.bias[:2] = torch.tensor([1.0, -1.0])  # of the first dimension's two coordinates
    moe(torch.randn(64, DIM))
    assert moe.balance_loss is not None and moe.balance_loss > 1.1
    moe.balance_loss.backward()
    assert moe.gate.bias.grad is not None
    favourite, other = moe.gate.bias.grad[:2].tolist()
    assert favourite > 0.1 and other < -0.1


def test_switch_routing_weighs_the_one_expert_by_its_probability_so_the_gate_learns(grids):
    moe = grids["line"].moe(k_best=1, routing="switch")
    experts = copy.deepcopy(grids["line"].modules)
    gate = copy.deepcopy(moe.gate)
    (x, its_x), target = twice(10, DIM), torch.randn(10, DIM)
    probability, chosen = torch.softmax(gate(its_x), dim=1).max(1)
    rows = zip(probability, chosen.tolist(), its_x, strict=True)
    its_y = torch.stack([p * experts[f"line.{e}"](row[None])[0] for p, e, row in rows])
    y = moe(x)
    assert_close(y, its_y)
    (y * target).sum().backward()
    (its_y * target).sum().backward()
    assert_close(x.grad, its_x.grad)
    assert_close(moe.gate.weight.grad, gate.weight.grad)


@pytest.mark.parametrize("routing", ["softmax", "switch"])
def test_who_did_not_answer_has_no_weight(swarm, routing):
    moe = swarm.moe(DIM, (4,), "nobody", routing=routing)
    weights = moe.weights([torch.tensor([[3.0, 2, 1, 0]] * 2)], dispatched((0, 1), (-1, -1)))
    assert (weights[0] > 0).all() and weights[1].tolist() == [0, 0]


def test_jitter_and_grid_dropout_are_for_training_only(grids):
    moe = grids["line"].moe(k_best=2, jitter=0.5, grid_dropout=0.5)
    x = torch.randn(20, DIM)
    with torch.no_grad():
        assert not torch.equal(moe(x), moe(x))
        moe.eval()
        assert torch.equal(moe(x), moe(x))
        assert_close(moe(x), grids["line"].local(moe)(x))


def test_grid_dropout_does_without_some_coordinates_in_each_batch(grids, events):
    moe = grids["square"].moe(k_best=1, grid_dropout=0.5)
    with torch.no_grad():
        for _ in range(10):
            moe(torch.randn(100, DIM))
    used = [len(event.rows) for event in events if isinstance(event, RoutingChosen)]
    assert min(used) <= 2 and all(1 <= n <= 9 for n in used)


def test_grid_dropout_leaves_no_row_without_an_expert_where_few_are_alive(grids, events):
    moe = grids["two"].moe(k_best=2, grid_dropout=0.9)
    with torch.no_grad():
        for _ in range(10):
            assert moe(torch.randn(4, DIM)).isfinite().all()
    assert all(event.rows == {"two.0.3": 4, "two.2.1": 4} for event in events if isinstance(event, RoutingChosen))


# ---------------------------------------------------------------- a module like any other


def test_it_pickles_and_copies_and_goes_on_with_the_same_swarm(grids):
    moe = grids["line"].moe(k_best=2)
    x = torch.randn(10, DIM)
    y = moe(x)  # leaves a balance loss with a graph, which no copy could have
    for other in (pickle.loads(pickle.dumps(moe)), copy.deepcopy(moe)):
        assert_close(other(x), y)
    fresh = grids["line"].moe(k_best=2)
    fresh.load_state_dict(moe.state_dict())
    assert_close(fresh(x), y)
    assert list(moe.state_dict()) == ["gate.weight", "gate.bias"]
    assert "grid=(5,)" in repr(moe) and "k_best=2" in repr(moe)


def test_a_layer_of_a_swarm_that_is_not_open_says_what_to_do(swarm, grids):
    model = nn.Sequential(MixtureOfExperts(DIM, (5,), "line", swarm="elsewhere", dispatch=DispatchConfig(k_best=2)))
    x = torch.randn(3, DIM)
    with pytest.raises(SwarmClosed, match=r"'elsewhere'.*tests of the layer.*lk.Swarm.*swarm.attach"):
        model(x)
    swarm.attach(model)
    assert_close(model(x), grids["line"].local(model[0])(x))


def test_a_grid_that_nobody_serves_is_an_error_that_says_what_was_looked_up_and_where(swarm):
    moe = swarm.moe(DIM, (4, 4), "nobody")
    with pytest.raises(NoExperts, match=r"'expert:nobody' was looked up through our DHT node at \S+:\d+.*swarm.serve"):
        moe(torch.randn(3, DIM))


def test_fewer_experts_than_k_best_are_logged_once(grids, caplog):
    moe = grids["three"].moe(k_best=4)
    x = torch.randn(3, DIM)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_close(moe(x), x)
    (said,) = [record.message for record in caplog.records if "k_best" in record.message]
    assert "only 3 live experts" in said and "'expert:three'" in said


@pytest.mark.parametrize(
    "options",
    [
        {"k_best": 17}, {"k_best": 2, "k_min": 3}, {"k_min": 0}, {"forward_timeout": math.inf}, {"backward_timeout": 0},
        {"timeout_after_k_min": -1}, {"codec": "zip"}, {"routing": "random"}, {"jitter": 1.0}, {"grid_dropout": -0.1},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be_are_refused_by_name(swarm, options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        swarm.moe(DIM, (4, 4), **options)


def test_inputs_that_cannot_be_are_refused_before_anybody_is_asked(grids, events):
    moe = grids["line"].moe(k_best=2)
    with pytest.raises(ValueError, match=rf"last dimension is {DIM} here.*\[3, 5\]"):
        moe(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"begin with the same shape.*\[3\]"):
        moe(torch.randn(3, DIM), torch.randn(4, DIM))
    with pytest.raises(ValueError, match="complex64 cannot be sent"):
        moe(torch.randn(3, DIM), torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"the gate of the grid 'line'.*NaN in 1 rows; is the input finite"):
        moe(torch.randn(3, DIM).index_fill(0, torch.tensor([1]), math.nan))
    assert not [event for event in events if isinstance(event, ASKING)]


@pytest.mark.parametrize("name", ["line", "broken"])
def test_a_batch_is_freed_when_its_output_is_gone_not_when_the_garbage_collector_comes(grids, name):
    moe = grids[name].moe(k_best=3)
    gc.collect()
    gc.disable()
    try:
        moe(torch.randn(10, DIM)).sum().backward()
        moe.balance_loss = None
        assert not [thing for thing in gc.get_objects() if type(thing) is Dispatched]
    finally:
        gc.enable()


# ---------------------------------------------------------------- one expert


def test_one_expert_is_a_module_too(swarm, grids):
    expert, module = swarm.expert("line.3"), copy.deepcopy(grids["line"].modules["line.3"])
    (x, its_x), target = twice(10, DIM), torch.randn(10, DIM)
    (expert(x) * target).sum().backward()
    (module(its_x) * target).sum().backward()
    assert_close(x.grad, its_x.grad)
    for its, now, before in zip(
        module.parameters(),
        grids["line"].modules["line.3"].parameters(),
        grids["line"].fresh["line.3"].parameters(),
        strict=True,
    ):
        assert_close(before - now, its.grad)


def test_one_expert_takes_half_precision_and_inputs_of_other_kinds(swarm, grids):
    expert, module = swarm.expert("many.0"), grids["many"].modules["many.0"]
    x, y, ids = torch.randn(4, DIM), torch.randn(4, 3, 2), torch.randint(5, (4,))
    with torch.no_grad():
        assert_close(expert(x, y, ids), module(x, y, ids))
        half = expert(x.bfloat16(), y.bfloat16(), ids)
        assert_close(half, module(x, y, ids).bfloat16(), atol=0.1, rtol=0.1)


def test_one_expert_says_who_is_missing_and_what_failed(swarm, grids):
    with pytest.raises(NoExperts, match=r"nobody serves line.7: 'expert:line' was looked up"):
        swarm.expert("line.7")(torch.randn(1, DIM))
    with pytest.raises(RemoteFailure, match="this expert has no disk"):
        swarm.expert("failing.0")(torch.randn(1, DIM))
    with pytest.raises(ValueError, match="timeout"):
        swarm.expert("line.1", timeout=math.inf)
