"""Layers and their experts: widths are refused where a layer is made, and outputs come as the experts give them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import labkit as lk
from labkit.client.fitting import fitting_outputs
from labkit.directory.grids import GridInfo
from labkit.errors import ExpertsRefused, NoExperts
from labkit.expert_protocol import ExpertSchema, TensorSchema
from labkit.server.optimizer import BackendConfig

DIM, OUT = 16, 10
STILL = BackendConfig(optimizer="sgd", lr=0.0)


class Narrowing(nn.Module):
    """[rows, 16] -> [rows, 10]"""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, OUT)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Pair(nn.Module):
    """x [rows, 16], shift= [rows, 16] -> [rows, 16] and [rows, 3]"""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(DIM, DIM), nn.Linear(DIM, 3)

    def forward(self, x: Tensor, *, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x if shift is None else x + shift
        return torch.tanh(self.one(x)), self.other(x)


def output_of(number: int, x: Tensor, given: dict[str, Tensor], module: nn.Module) -> Tensor:
    output: Tensor = module(x, **given)[number]
    return output


class Named(nn.Module):
    """Inputs by keyword, with names that a layer might have for its own."""

    def forward(self, x: Tensor, *, rows: Tensor, further: Tensor, session: Tensor) -> Tensor:
        return x + rows + further + session


Made = dict[str, list[nn.Module]]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[lk.Swarm, Made]]:
    """A swarm with a grid of each kind, and the modules of its experts."""
    torch.manual_seed(0)
    made: Made = {}

    def serve(name: str, kind: type[nn.Module]) -> None:
        modules = made[name] = []

        def factory() -> nn.Module:
            modules.append(kind())
            return modules[-1]

        swarm.serve(factory, name=name, grid=(2,), isolation="task", backend=STILL)

    with lk.Swarm("tests of fitting") as swarm:
        swarm.serve("ffn", hidden=64, inner=8, grid=(2, 2), isolation="task")
        serve("narrow", Narrowing)
        serve("pair", Pair)
        yield swarm, made


def mixed(layer: nn.Module, modules: list[nn.Module], x: Tensor, call: Callable[[nn.Module], Tensor]) -> Tensor:
    """The softmax-weighted mean of what both experts compute."""
    weights = torch.softmax(layer.gate(x), dim=1)  # type: ignore[operator]
    return sum(weights[:, i, None] * call(module) for i, module in enumerate(modules))  # type: ignore[return-value]


def test_a_width_that_no_expert_takes_is_refused_where_the_layer_is_made_in_one_sentence(served):
    swarm, _ = served
    with pytest.raises(ValueError) as error:
        swarm.moe(32)
    said = str(error.value)
    assert said == "dim=32: the experts of the grid 'ffn' take rows of width 64, so write swarm.moe(64)"
    with pytest.raises(ValueError, match="take rows of width 16"):
        swarm.moe(32, grid=(2,), name="narrow")  # a kind of the user's own
    with pytest.raises(ValueError, match=r"out=7: .* give \[rows, 10\]"):
        swarm.moe(DIM, name="narrow", out=7)


def test_a_layer_learns_from_the_grid_that_its_experts_give_another_width(served):
    swarm, made = served
    x = torch.randn(2, 5, DIM)
    layer = swarm.moe(DIM, name="narrow", k_best=2, timeout_after_k_min=30.0)
    y = layer(x)
    assert y.shape == (2, 5, OUT) and "out=10" in repr(layer)
    rows = x.reshape(10, DIM)
    assert_close(y.reshape(10, OUT), mixed(layer, made["narrow"], rows, lambda module: module(rows)))
    assert swarm.moe(DIM, name="narrow", out=OUT)(x).shape == (2, 5, OUT)
    assert copy.deepcopy(layer)(x).shape == y.shape


def test_each_of_several_outputs_is_a_weighted_mean_and_inputs_may_have_names(served):
    swarm, made = served
    layer = swarm.moe(DIM, name="pair", k_best=2, timeout_after_k_min=30.0)
    x, shift = torch.randn(7, DIM, requires_grad=True), torch.randn(7, DIM, requires_grad=True)
    for given in ({}, {"shift": shift}):
        outputs = layer(x, **given)
        assert [output.shape for output in outputs] == [(7, DIM), (7, 3)]
        exact = [mixed(layer, made["pair"], x, partial(output_of, i, x, given)) for i in (0, 1)]
        assert_close(list(outputs), exact)
        wanted = [x, layer.gate.weight, *given.values()]
        mine = torch.autograd.grad(outputs[0].sum() + outputs[1].square().sum(), wanted)
        its = torch.autograd.grad(exact[0].sum() + exact[1].square().sum(), wanted)
        assert_close(mine, its)
    (only_second,) = torch.autograd.grad(layer(x)[1].sum(), x)  # the other output gets no gradient
    assert only_second.abs().sum() > 0


def test_inputs_may_have_any_names(served):
    swarm, _ = served
    server = swarm.serve(Named, grid=(1,), isolation="task", backups=0)[0]
    x = torch.randn(3, DIM)
    for layer in (swarm.moe(DIM, (1,), "named"), swarm.moe(DIM, (1,), "named", sequences=True)):
        given = x[:, None] if layer.sequences else x
        assert_close(layer(given, rows=given, further=given, session=given), 4 * given)
    server.stop()


def test_one_expert_has_several_outputs_and_named_inputs_too(served):
    swarm, made = served
    expert, module = swarm.expert("pair.1"), made["pair"][1]
    x, shift = torch.randn(7, DIM, requires_grad=True), torch.randn(7, DIM, requires_grad=True)
    mine, its = expert(x, shift=shift), module(x, shift=shift)
    assert isinstance(mine, tuple)
    assert_close(list(mine), list(its))
    grads = [torch.autograd.grad(one[0].sum() + one[1].square().sum(), [x, shift]) for one in (mine, its)]
    assert_close(*grads)


def test_an_expert_says_what_it_takes_and_gives_before_its_first_call(served):
    swarm, _ = served
    schema = swarm.expert("narrow.0").schema
    assert schema is not None
    assert [(tensor.dtype, tensor.shape) for tensor in schema.inputs] == [("float32", (DIM,))]
    assert [(tensor.dtype, tensor.shape) for tensor in schema.outputs] == [("float32", (OUT,))]
    with pytest.raises(NoExperts, match=r"nobody serves narrow\.7"):
        _ = swarm.expert("narrow.7").schema


def test_a_layer_that_was_made_before_its_experts_is_told_once_what_they_take(served):
    swarm, _ = served
    layer = swarm.moe(8, (2,), "later", k_best=2, timeout_after_k_min=30.0)
    handle = swarm.serve("ffn", hidden=4, grid=(2,), name="later", isolation="task")[0]
    with pytest.raises(
        ExpertsRefused, match="all 2 experts of the grid 'later' that were asked refused: it takes float32"
    ) as error:
        layer(torch.randn(3, 8))
    assert not error.value.recoverable
    handle.stop()


def tensors(*shapes: tuple[int, ...]) -> tuple[TensorSchema, ...]:
    return tuple(TensorSchema("float32", shape) for shape in shapes)


@pytest.mark.parametrize(("inputs", "outputs", "out", "fits"), [
    (tensors((-1,)), tensors((-1,)), None, 5),  # any width, and the same out
    (tensors((5,)), tensors((5,)), None, [(5,)]),
    (tensors((5,)), tensors((2, 3)), None, [(2, 3)]),
    (tensors((5,)), tensors((-1,), (3,)), (4, 3), (4, 3)),
    ((), (), None, 5),
    ((), (), 7, 7),
])  # fmt: skip
def test_outputs_are_what_the_grid_declares_as_far_as_it_does(inputs, outputs, out, fits):
    info = GridInfo((2,), schema=ExpertSchema(inputs, outputs))
    assert fitting_outputs(5, (2,), out, "mine", info) == fits


@pytest.mark.parametrize(("inputs", "outputs", "said"), [
    (tensors((4,)), tensors((4,)), "rows of width 4"),
    (tensors((-1, 5)), tensors((-1, 5)), r"take \[rows, any, 5\].*swarm.expert"),  # sequences
    (tensors((5,)), tensors((-1, 3)), r"give \[rows, any, 3\]; say with out="),
])  # fmt: skip
def test_what_cannot_fit_is_refused(inputs, outputs, said):
    with pytest.raises(ValueError, match=said):
        fitting_outputs(5, (2,), None, "mine", GridInfo((2,), schema=ExpertSchema(inputs, outputs)))


def test_servers_that_declare_no_schema_are_known_by_their_options():
    info = GridInfo((2,), "ffn", {"hidden": 64})
    assert fitting_outputs(64, (2,), None, "ffn", info) == [(64,)]
    with pytest.raises(ValueError, match="width 64"):
        fitting_outputs(32, (2,), None, "ffn", info)
