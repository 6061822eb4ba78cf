"""Frozen means frozen: experts belong to everybody, and a caller who trains nothing of a layer does not train them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import labkit as lk
from labkit.client.expert import RemoteExpert
from labkit.client.moe import MixtureOfExperts
from labkit.events import CallFinished, Event
from labkit.server.layers import FeedForward
from labkit.server.optimizer import BackendConfig

DIM = 6


class Swarm:
    """A grid of two experts, and copies of them as they were."""

    def __init__(self, swarm: lk.Swarm) -> None:
        self.swarm = swarm
        self.modules: list[nn.Module] = []

        def factory() -> nn.Module:
            self.modules.append(FeedForward(DIM, 8))
            return self.modules[-1]

        backend = BackendConfig(optimizer="sgd", lr=0.1)
        swarm.serve(factory, name="ffn", grid=(2,), isolation="task", backend=backend)
        self.before = copy.deepcopy(self.modules)
        self.events: list[Event] = []
        swarm.on_event(self.events.append)

    def moe(self, **options: object) -> MixtureOfExperts:
        return self.swarm.moe(DIM, k_best=2, timeout_after_k_min=30.0, **options)  # type: ignore[arg-type]

    def trained(self) -> bool:
        """Whether any expert has changed; after which all are as they were."""
        pairs = list(zip(self.modules, self.before, strict=True))
        changed = any(
            not torch.equal(now, then)
            for one, other in pairs
            for now, then in zip(one.parameters(), other.parameters(), strict=True)
        )
        for module, before in pairs:
            module.load_state_dict(before.state_dict())
        return changed

    def backward_calls(self) -> int:
        return sum(isinstance(event, CallFinished) and event.direction == "backward" for event in self.events)


@pytest.fixture(scope="module")
def shared() -> Iterator[Swarm]:
    torch.manual_seed(0)
    with lk.Swarm("tests of frozen layers") as swarm:
        yield Swarm(swarm)


@pytest.fixture(autouse=True)
def fresh(shared: Swarm) -> None:
    shared.trained()
    shared.events.clear()


def input_gradient(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    module(leaf).square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_layer_trains_its_experts_in_either_mode_as_modules_do(shared, mode):
    getattr(shared.moe(), mode)()(torch.randn(3, DIM)).sum().backward()
    assert shared.trained()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_frozen_layer_gives_the_same_input_gradients_and_trains_nobody(shared, mode):
    moe, x = getattr(shared.moe(), mode)(), torch.randn(10, DIM)
    exact = input_gradient(moe, x)
    assert shared.trained()
    assert_close(input_gradient(moe.requires_grad_(False), x), exact)
    assert not shared.trained()


def test_where_its_inputs_need_no_gradient_either_nobody_is_asked_in_the_backward_pass(shared):
    model = nn.Sequential(nn.Linear(4, DIM), shared.moe(), nn.Linear(DIM, 2))
    model[:2].requires_grad_(False)
    model(torch.randn(10, 4)).sum().backward()
    assert model[2].weight.grad is not None and shared.backward_calls() == 0


def test_a_saliency_map_trains_nobody_though_the_layer_could_be_trained(shared):
    model = nn.Sequential(shared.moe(), nn.Linear(DIM, 2))
    x = torch.randn(10, DIM, requires_grad=True)
    (map_,) = torch.autograd.grad(model(x).max(), x)
    assert map_.abs().sum() > 0 and shared.backward_calls() > 0
    assert not shared.trained()


@pytest.mark.parametrize("backward", [
    lambda y, model, x: y.backward(),
    lambda y, model, x: torch.autograd.grad(y, list(model.parameters())),
    lambda y, model, x: torch.autograd.grad(y, [x, model[0].gate.weight]),
    lambda y, model, x: y.backward(inputs=list(model.parameters())),
], ids=["backward", "grad of all", "grad of the gate", "backward into all"])  # fmt: skip
def test_who_asks_for_the_gradient_of_the_gate_trains_the_experts(shared, backward: Callable[..., object]):
    model = nn.Sequential(shared.moe(), nn.Linear(DIM, 2))
    x = torch.randn(10, DIM, requires_grad=True)
    backward(model(x).sum(), model, x)
    assert shared.trained()


def test_a_head_that_is_trained_alone_trains_nobody(shared):
    model = nn.Sequential(shared.moe(), nn.Linear(DIM, 2))
    torch.autograd.grad(model(torch.randn(10, DIM)).sum(), list(model[1].parameters()))
    assert not shared.trained() and shared.backward_calls() == 0


@pytest.mark.parametrize("train", [True, False])
def test_it_can_be_said_which_of_both_is_wanted(shared, train):
    moe = shared.moe(train_experts=train)
    moe.requires_grad_(not train)
    x = torch.randn(10, DIM, requires_grad=True)
    moe(x).sum().backward()
    assert shared.trained() is train
    moe.train_experts = not train  # at any time
    moe(x).sum().backward()
    assert shared.trained() is not train


def test_a_layer_that_was_frozen_learns_again_when_it_is_let_go(shared):
    moe = shared.moe().requires_grad_(False)
    moe.requires_grad_(True)
    moe(torch.randn(10, DIM)).sum().backward()
    assert shared.trained()


def test_experts_learn_from_a_pass_whose_layer_has_been_updated_meanwhile_by_another_trainer(shared):
    for module in (shared.moe(), shared.swarm.expert("ffn.0")):
        y = module(torch.randn(10, DIM)).sum()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
        y.backward()
        assert shared.trained()


def test_what_is_frozen_between_the_two_passes_learns_as_little_as_other_modules_do(shared):
    for module in (shared.moe(), shared.swarm.expert("ffn.0")):
        y = module(torch.randn(10, DIM, requires_grad=True)).sum()
        module.requires_grad_(False)
        y.backward()
        assert all(parameter.grad is None for parameter in module.parameters())
        assert not shared.trained()


def test_copies_of_a_frozen_layer_are_frozen(shared):
    moe = shared.moe(train_experts=False)
    for layer in (copy.deepcopy(moe), copy.deepcopy(shared.moe().requires_grad_(False))):
        input_gradient(layer, torch.randn(3, DIM))
        assert not shared.trained()


def test_lk_fit_trains_no_expert_of_a_frozen_layer(shared):
    model = nn.Sequential(shared.moe().requires_grad_(False), nn.Linear(DIM, 2))
    lk.fit(model, (torch.randn(64, DIM), torch.randint(2, (64,))), steps=4, batch_size=16, trainers=2).wait()
    assert not shared.trained()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_whose_activations_are_computed_again_trains_as_one_whose_are_kept(shared, reentrant):
    moe, x = shared.moe(), torch.randn(10, DIM)
    exact = input_gradient(moe, x)
    gate = moe.gate.weight.grad.clone()
    assert shared.trained()
    moe.zero_grad()
    again = input_gradient(lambda leaf: checkpoint(moe, leaf, use_reentrant=reentrant), x)
    assert shared.trained()
    assert_close(again, exact)
    assert_close(moe.gate.weight.grad, gate)


# ---------------------------------------------------------------- one expert


def freeze_itself(expert: RemoteExpert) -> nn.Module:
    return expert.requires_grad_(False)


def freeze_the_model(expert: RemoteExpert) -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, DIM), expert).requires_grad_(False)


@pytest.mark.parametrize("freeze", [freeze_itself, freeze_the_model])
def test_one_expert_is_frozen_like_any_module(shared, freeze):
    expert = shared.swarm.expert("ffn.0")
    x = torch.randn(10, DIM)
    model = freeze(expert)
    assert input_gradient(model, x).abs().sum() > 0
    assert not shared.trained()
    model.requires_grad_(True)
    input_gradient(model, x)
    assert shared.trained()


def test_one_expert_is_not_trained_by_a_saliency_map_or_where_that_is_said(shared):
    x = torch.randn(10, DIM, requires_grad=True)
    torch.autograd.grad(shared.swarm.expert("ffn.0")(x).max(), x)
    shared.swarm.expert("ffn.0", train_expert=False)(x).sum().backward()
    assert shared.backward_calls() == 2 and not shared.trained()
    shared.swarm.expert("ffn.0", train_expert=True).requires_grad_(False)(x).sum().backward()
    assert shared.trained()


def test_the_parameter_that_stands_for_an_expert_has_no_elements_and_is_not_saved(shared):
    expert = shared.swarm.expert("ffn.0")
    optimizer = torch.optim.Adam(expert.parameters())
    expert(torch.randn(10, DIM)).sum().backward()
    optimizer.step()
    assert sum(parameter.numel() for parameter in expert.parameters()) == 0
    assert expert.state_dict() == {}
    expert.load_state_dict({})
