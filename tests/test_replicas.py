"""Models as people write them: their modes, hooks and attributes are those that a loop by hand would meet."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from io import IOBase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from labkit.swarm import Swarm
from labkit.training.datasets import batches
from labkit.training.fit import fit
from labkit.training.run import Run
from labkit.training.trainer import TrainConfig, evaluate

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def trained_by_hand(model: nn.Module, steps: int = 6) -> nn.Module:
    optimizer = sgd(model.parameters())
    for _, (x, y) in zip(range(steps), batches(X, Y, 16, torch.Generator().manual_seed(0)), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def trained(model: nn.Module, steps: int = 6) -> nn.Module:
    run = fit(model, (X, Y), steps=steps, batch_size=16, trainers=1, optimizer=sgd).wait()
    assert run.steps == steps
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)


# ---------------------------------------------------------------- modes


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def weights(model: nn.Sequential) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]


def freeze_a_layer(model: nn.Sequential) -> None:
    model[1].eval()


def freeze_the_backbone(model: nn.Sequential) -> None:
    for layer in (model[0], model[1]):
        layer.eval().requires_grad_(False)


def freeze_parameters_only(model: nn.Sequential) -> None:
    model[1].requires_grad_(False)


def train_only_the_last(model: nn.Sequential) -> None:
    model.eval()
    model[3].train()


@pytest.mark.parametrize("freeze", [freeze_a_layer, freeze_the_backbone, freeze_parameters_only, train_only_the_last])
def test_modules_keep_the_mode_that_they_are_in(freeze):
    ours, plain = deep(), deep()
    freeze(ours)
    freeze(plain)
    modes = [module.training for module in ours.modules()]
    assert_equal(trained(ours), trained_by_hand(plain))
    assert [module.training for module in ours.modules()] == modes


def test_a_model_that_was_evaluated_before_is_trained_in_train_mode_but_for_what_is_frozen():
    ours, plain = deep(), deep()
    for model in (ours, plain):
        model[1].requires_grad_(False)
    ours.eval()
    plain[1].eval()
    assert_equal(trained(ours), trained_by_hand(plain))
    assert not any(module.training for module in ours.modules())


def test_a_model_may_be_put_in_eval_mode_while_it_is_trained():
    seen: set[bool] = set()

    class Looks(nn.Module):
        def forward(self, x):
            seen.add(self.training)
            return x

    model = nn.Sequential(nn.Linear(4, 2), Looks())
    fit(model, (X, Y), steps=20, trainers=2, on_step=lambda step: model.eval()).wait()
    assert seen == {True}


def test_a_layer_may_be_unfrozen_while_the_model_is_trained():
    model = deep()
    model[0].requires_grad_(False)
    before = weights(model)[0].clone()
    fit(
        model, (X, Y), steps=6, trainers=1, on_step=lambda step: step.step == 3 and model[0].requires_grad_(True)
    ).wait()
    assert not torch.equal(weights(model)[0], before)


# ---------------------------------------------------------------- hooks


def test_gradient_hooks_of_parameters_run():
    def clamp(weight):
        weight.grad.clamp_(-0.01, 0.01)

    def with_hooks() -> tuple[nn.Sequential, list[float]]:
        model, seen = deep(), list[float]()
        weight = weights(model)[0]
        weight.register_hook(lambda grad: grad * 0.5)
        weight.register_hook(lambda grad: seen.append(grad.norm().item()))
        weights(model)[4].register_post_accumulate_grad_hook(clamp)
        return model, seen

    (ours, seen), (plain, expected) = with_hooks(), with_hooks()
    assert_equal(trained(ours), trained_by_hand(plain))
    assert seen == pytest.approx(expected)


def test_an_optimizer_inside_backward_works():
    model = deep()
    inner = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step_at_once(parameter):
        inner[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_at_once)
    assert_equal(trained(model), trained_by_hand(deep()))


class Recorder:
    """Belongs to no module; it cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seen = 0

    def forward_hook(self, module, inputs, output):
        with self.lock:
            self.seen += 1

    def __call__(self, module, grad_inputs, grad_outputs):
        self.forward_hook(module, grad_inputs, grad_outputs)


@pytest.mark.parametrize("trainers", [1, 3])
def test_hooks_of_modules_run_in_the_object_of_the_user(trainers):
    model, recorder = deep(), Recorder()
    model[0].register_forward_hook(recorder.forward_hook)
    model[2].register_full_backward_hook(recorder)
    fit(model, (X, Y), steps=10, trainers=trainers).wait()
    assert recorder.seen == 20


# ---------------------------------------------------------------- attributes


class Keeps(nn.Module):
    """A classifier that keeps anything else as an attribute."""

    def __init__(self, thing: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)
        self.thing = thing

    def forward(self, x):
        return self.layer(x)


THINGS = {
    "lock": lambda path: threading.Lock(),
    "in a list": lambda path: [1, {"lock": threading.RLock()}],
    "logger": lambda path: logging.getLogger("mine"),
    "generator": lambda path: (number for number in range(3)),
    "open file": lambda path: (path / "log.txt").open("w"),
    "generator of torch": lambda path: torch.Generator(),
    "event": lambda path: threading.Event(),
    "activation": lambda path: torch.ones(2, requires_grad=True) * 2,
    "module": lambda path: torch,
    "object with a lock": lambda path: Recorder(),
}


@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS)
def test_what_cannot_be_copied_is_shared(make, tmp_path):
    model = Keeps(make(tmp_path))
    thing = model.thing
    assert_equal(trained(model), trained_by_hand(Keeps(None)))
    assert 0 <= evaluate(model, X, Y) <= 1
    assert model.thing is thing
    if isinstance(thing, IOBase):
        thing.close()


def test_an_object_that_holds_a_layer_of_the_model_holds_that_of_the_replica():
    class Helper:
        def __init__(self, layer: nn.Module) -> None:
            self.layer, self.lock = layer, threading.Lock()

    class Helped(Keeps):
        def __init__(self) -> None:
            super().__init__(None)
            self.helpers = [Helper(self.layer)]

        def forward(self, x):
            helper = self.helpers[0]
            with helper.lock:
                return helper.layer(x)

    assert_equal(trained(Helped()), trained_by_hand(Helped()))


def test_a_model_may_keep_its_swarm_its_servers_and_a_run():
    with Swarm("kept") as swarm:
        servers = swarm.serve("ffn", hidden=4, grid=(2,), isolation="task")

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.swarm, self.servers = swarm, servers
                self.moe, self.out = swarm.moe(4, k_best=2), nn.Linear(4, 2)
                self.run: Run | None = None

            def forward(self, x):
                return self.out(self.moe(x))

        model = Net()
        model.run = fit(model, (X, Y), steps=2).wait()
        assert fit(model, (X, Y), steps=2).wait().steps == 2
        assert 0 <= evaluate(model, X, Y) <= 1
        twin = copy.deepcopy(model)
        assert twin.swarm is swarm and twin.servers[0] is servers[0] and twin.run is model.run
        with pytest.raises(TypeError, match=r"a Swarm belongs to this process .* swarm.attach"):
            pickle.dumps(swarm)
        with pytest.raises(TypeError, match="a ServerHandle belongs to this process"):
            pickle.dumps(servers)


# ---------------------------------------------------------------- parameters and buffers


def test_lazy_modules_get_their_shapes_from_the_first_batch():
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    run = fit(model, (X, Y), epochs=2, batch_size=16, trainers=2).wait()
    assert run.steps == 8 and sum(step.samples for step in run.history) == 2 * 60
    assert weights(model)[0].shape == (8, 4)


def test_a_lazy_module_that_the_first_batch_does_not_reach_is_named():
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].unused = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=r"0\.unused\.weight, 0\.unused\.bias: lazy"):
        fit(model, (X, Y), steps=1)


def test_buffers_may_change_their_shape_and_their_number():
    class Remembers(Keeps):
        def __init__(self) -> None:
            super().__init__(None)
            self.seen: torch.Tensor
            self.register_buffer("seen", torch.zeros(0))
            self.register_buffer("last", None)

        def forward(self, x):
            self.seen = torch.cat([self.seen, x.detach().mean().reshape(1)])
            self.last = x.detach()
            if not hasattr(self, "first"):
                self.register_buffer("first", x.detach())
            return super().forward(x)

    ours, plain = trained(Remembers()), trained_by_hand(Remembers())
    assert_equal(plain, ours)
    assert len(ours.state_dict()["seen"]) == 6
    assert fit(Remembers(), (X, Y), steps=20, trainers=4, validate=(X, Y), every=5).wait().steps == 20


def test_a_model_without_parameters_of_its_own_trains_its_experts():
    with Swarm("experts-only") as swarm:
        swarm.serve("ffn", hidden=4, grid=(2,), isolation="task")
        expert = swarm.expert("ffn.0")
        before = expert(X).detach()
        assert fit(expert, (X, X * 0), loss=nn.MSELoss(), steps=5, trainers=1).wait().steps == 5
        assert not torch.equal(expert(X), before)
        frozen = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), swarm.expert("ffn.1"))
        assert fit(frozen, (X, X * 0), loss=nn.MSELoss(), steps=5).wait().steps == 5


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


def normalised() -> nn.Module:
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        layer = weight_norm(nn.Linear(4, 2))
    layer(X)  # its weight is now the output of an operation
    return nn.Sequential(layer)


def parametrized() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 2)))


def spectral() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 2)))


@pytest.mark.parametrize("make", [tied, normalised, parametrized, spectral])
def test_tied_and_parametrized_weights_are_trained_as_by_hand(make):
    assert_equal(trained(make()), trained_by_hand(make()))


def test_what_a_user_keeps_in_a_parameter_is_there_in_the_forward_pass():
    class Scales(Keeps):
        def forward(self, x):
            return super().forward(x) * vars(self.layer.weight)["scale"]

    model = Scales(None)
    vars(model.layer.weight)["scale"] = 2.0
    trained(model)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_trained_like_any_other(how):
    plain, model = deep(), deep()
    compiled: Any = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    run = Run(compiled, (X, Y), TrainConfig(steps=6, batch_size=16, trainers=1), optimizer=sgd).wait()
    assert run.steps == 6
    assert_equal(model, trained_by_hand(plain))
