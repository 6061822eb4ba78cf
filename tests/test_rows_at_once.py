"""A result never depends on how many rows go through a layer at once, whatever the sizes, limits and failures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import labkit as lk
from labkit.client.dispatch import DispatchConfig
from labkit.client.expert import RemoteExpert
from labkit.client.moe import MixtureOfExperts
from labkit.errors import MessageTooLarge, NonFiniteTensor
from labkit.events import CallFailed, CallFinished, Event
from labkit.expert_uid import grid_uids
from labkit.node import NodeConfig
from labkit.server.config import ServerConfig
from labkit.server.optimizer import BackendConfig
from labkit.simulation.network import open_simnet
from labkit.simulation.swarm import SIMULATED_NODE_CONFIG, open_simulated_swarm
from labkit.simulation.virtual_clock import run_in_virtual_time
from labkit.wire.frames import FrameLimits
from labkit.wire.rpc_types import RPCLimits

DIM = 6
SMALL, MEDIUM, USUAL = 4_000, 20_000, 256 << 20  # bytes of a message


class Refusing(nn.Module):
    """Takes nothing, and says so each time."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not for me")


def node_config(message_bytes: int) -> NodeConfig:
    limits = RPCLimits(frames=FrameLimits(message_bytes=message_bytes))
    return replace(SIMULATED_NODE_CONFIG, limits=limits)


def in_a_swarm(
    use: Callable[[], None], grid: tuple[int, ...], *, refuse: set[int], message_bytes: int, max_batch_size: int = 4096
) -> list[Event]:
    """Run this with a simulated swarm, where some experts refuse everything and none of them learns."""
    events: list[Event] = []
    uids = list(grid_uids("ffn", grid))
    backend = BackendConfig(optimizer="sgd", lr=0.0, max_batch_size=max_batch_size)
    bad = tuple(uid for number, uid in enumerate(uids) if number in refuse)
    good = tuple(uid for uid in uids if uid not in bad)
    servers = [ServerConfig(good, grid, options={"hidden": DIM, "inner": 8}, backend=backend, seed=1, threads=1)]
    if bad:
        servers.append(ServerConfig(bad, grid, kind=Refusing, backend=backend, threads=1))

    async def main() -> None:
        config = node_config(message_bytes)
        async with (
            open_simnet(latency=0.01) as network,
            open_simulated_swarm(network, servers, node_config=config, emit=events.append) as swarm,
        ):
            await swarm.lockstep.run(use)

    run_in_virtual_time(main)
    return events


def results(layer: MixtureOfExperts, x: Tensor, target: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of the inputs and of the gate, of these rows in passes of so many rows each."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    parts = [layer(part) for part in x.split(sizes)]
    for part, wanted in zip(parts, target.split(sizes), strict=True):
        (part * wanted).sum().backward()
    assert x.grad is not None and layer.gate.weight.grad is not None and layer.gate.bias.grad is not None
    return torch.cat(parts).detach(), x.grad, layer.gate.weight.grad.clone(), layer.gate.bias.grad.clone()


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, list[int], set[int], int, int]:
    grid = draw(st.sampled_from([(2,), (5,), (2, 3), (2, 2, 2)]))
    experts = len(list(grid_uids("ffn", grid)))
    k_best = draw(st.integers(1, min(4, experts)))
    k_min = draw(st.integers(1, k_best))
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    refuse = draw(st.sets(st.integers(0, experts - 1), max_size=experts - k_min))
    return grid, k_best, k_min, sizes, refuse, draw(st.sampled_from([SMALL, MEDIUM, USUAL])), draw(st.integers(1, 100))


@given(case=cases(), seed=st.integers(0, 1 << 16))
@settings(max_examples=25)
def test_rows_that_go_through_a_layer_at_once_get_what_they_get_in_parts(case, seed):
    grid, k_best, k_min, sizes, refuse, message_bytes, max_batch_size = case
    torch.manual_seed(seed)
    config = DispatchConfig(k_best=k_best, k_min=k_min)
    layer = MixtureOfExperts(DIM, grid, swarm="simulated", dispatch=config)
    x, target = torch.randn(2, sum(sizes), DIM)

    def compare() -> None:
        at_once, in_parts = results(layer, x, target, [len(x)]), results(layer, x, target, sizes)
        assert_close(at_once, in_parts)

    in_a_swarm(compare, grid, refuse=refuse, message_bytes=message_bytes, max_batch_size=max_batch_size)


def test_fifty_and_fifty_one_rows_with_a_limit_of_a_hundred_are_what_they_are_apart():
    """In one pass each got what the expert that it liked less computes, or nothing."""
    layer = MixtureOfExperts(DIM, (3,), swarm="simulated", dispatch=DispatchConfig(k_best=2))
    x = torch.randn(101, DIM)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[:, :3] = torch.eye(3)
    x[:50, :3], x[50:, :3] = torch.tensor([6.0, 5, 0]), torch.tensor([6.0, 0, 5])

    def compare() -> None:
        assert_close(results(layer, x, x, [101]), results(layer, x, x, [50, 51]))

    in_a_swarm(compare, (3,), refuse=set(), message_bytes=USUAL, max_batch_size=100)


@pytest.mark.parametrize("codec", ["none", "float16", "bfloat16", "blockwise8"])
def test_what_is_too_large_for_a_message_goes_in_several_under_every_codec(codec):
    layer = MixtureOfExperts(DIM, (2,), swarm="simulated", dispatch=DispatchConfig(k_best=2, codec=codec))
    x, target = torch.randn(2, 500, DIM)

    def compare() -> None:
        at_once, in_parts = results(layer, x, target, [500]), results(layer, x, target, [50] * 10)
        rounded = {"none": 1e-5, "float16": 1e-2, "bfloat16": 5e-2, "blockwise8": 0.15}[codec]
        for one, other in zip(at_once, in_parts, strict=True):
            assert (one - other).norm() <= rounded * other.norm()

    events = in_a_swarm(compare, (2,), refuse=set(), message_bytes=SMALL)
    assert not [event for event in events if isinstance(event, CallFailed)]
    assert max(event.rows for event in events if isinstance(event, CallFinished)) < 500


def test_one_expert_takes_as_many_rows_as_a_layer_does():
    expert = RemoteExpert("ffn.0", "simulated")
    x, target = torch.randn(2, 500, DIM)

    def compare() -> None:
        outcomes = []
        for sizes in ([500], [50] * 10):
            leaf = x.clone().requires_grad_()
            y = torch.cat([expert(part) for part in leaf.split(sizes)])
            (y * target).sum().backward()
            outcomes.append((y.detach(), leaf.grad))
        assert_close(outcomes[0], outcomes[1])

    in_a_swarm(compare, (2,), refuse=set(), message_bytes=SMALL)


class Widening(nn.Module):
    """[rows, 6] -> [rows, 3000]: answers are much larger than requests."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) + torch.arange(3000.0)


def test_answers_that_would_be_too_large_for_a_message_come_in_several():
    """The caller of one expert does not know their size beforehand."""

    async def main() -> None:
        config = node_config(100_000)
        servers = [ServerConfig(("wide.0",), (1,), kind=Widening, threads=1)]
        async with open_simnet() as network, open_simulated_swarm(network, servers, node_config=config) as swarm:

            def use() -> None:
                x = torch.randn(40, DIM)
                layer = MixtureOfExperts(DIM, (1,), "wide", swarm="simulated", out=3000)
                for y in (RemoteExpert("wide.0", "simulated")(x), layer(x)):
                    assert_close(y, Widening()(x))

            await swarm.lockstep.run(use)

    run_in_virtual_time(main)


def test_a_server_that_accepts_less_than_we_send_gets_smaller_messages():
    async def main() -> None:
        servers = [ServerConfig(("ffn.0",), (1,), options={"hidden": DIM}, threads=1)]
        events: list[Event] = []
        async with (
            open_simnet() as network,
            open_simulated_swarm(
                network, servers, node_config=node_config(SMALL), client_config=node_config(USUAL), emit=events.append
            ) as swarm,
        ):

            def use() -> None:
                x = torch.randn(500, DIM, requires_grad=True)
                layer = MixtureOfExperts(DIM, (1,), swarm="simulated", dispatch=DispatchConfig(k_best=1))
                for ask in (layer, RemoteExpert("ffn.0", "simulated")):
                    ask(x).sum().backward()
                    assert x.grad is not None and x.grad.abs().min() > 0

            await swarm.lockstep.run(use)
        refused = [event for event in events if isinstance(event, CallFailed)]
        assert 0 < len(refused) < 20, "what a server accepts is learnt"

    run_in_virtual_time(main)


def test_a_row_that_is_too_large_by_itself_is_refused_in_words():
    def use() -> None:
        layer = MixtureOfExperts(DIM, (2,), swarm="simulated", dispatch=DispatchConfig(k_best=2))
        with pytest.raises(
            lk.NotEnoughExperts, match=r"all 2 experts of the grid 'ffn' that were asked refused: .*over the"
        ):
            layer(torch.randn(2, DIM), torch.randn(2, 2000))
        with pytest.raises(MessageTooLarge):
            RemoteExpert("ffn.0", "simulated")(torch.randn(2, 2000))

    in_a_swarm(use, (2,), refuse=set(), message_bytes=SMALL)


# ---------------------------------------------------------------- rows with numbers that are none


class Inverse(nn.Module):
    """w / x of the first number: no number where that is 0, and where it is tiny only its gradient is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor, further: Tensor | None = None) -> Tensor:
        return self.weight / x[:, :1] + (0 if further is None else further)


def with_inverse(use: Callable[[Callable[[], list[Event]]], None]) -> None:
    """Run this with a swarm whose first expert is an `Inverse` with an optimizer. It gets a function for what was."""

    async def main() -> None:
        events: list[Event] = []
        backend = BackendConfig(optimizer="sgd", lr=0.01)
        servers = [
            ServerConfig(("ffn.0",), (2,), kind=Inverse, backend=backend, threads=1),
            ServerConfig(("ffn.1",), (2,), kind=Further, backend=backend, threads=1),
        ]
        async with open_simnet() as network, open_simulated_swarm(network, servers, emit=events.append) as swarm:
            await swarm.lockstep.run(use, lambda: list(events))

    run_in_virtual_time(main)


class Further(nn.Module):
    """Gives x, and whatever comes beside it."""

    def forward(self, x: Tensor, further: Tensor | None = None) -> Tensor:
        return x + (0 if further is None else further)


def calls(events: list[Event], kind: type[Event], direction: str) -> list[Event]:
    return [event for event in events if isinstance(event, kind) and getattr(event, "direction", "") == direction]


def layer_over_both(**options: Any) -> MixtureOfExperts:
    layer = MixtureOfExperts(DIM, (2,), swarm="simulated", dispatch=DispatchConfig(k_best=2, **options))
    nn.init.zeros_(layer.gate.weight)  # both count alike
    nn.init.zeros_(layer.gate.bias)
    return layer


@pytest.mark.parametrize("codec", ["none", "float16", "blockwise8"])
def test_a_row_that_overflows_in_an_expert_costs_no_other_row_that_expert(codec):
    def use(events: Callable[[], list[Event]]) -> None:
        layer, x = layer_over_both(codec=codec), torch.ones(5, DIM)
        x[3, 0] = 0
        good = (1 + x) / 2
        good[3] = x[3]  # what the other expert gives
        assert_close(layer(x), good, atol=0.05, rtol=0)
        assert not calls(events(), CallFailed, "forward")

    with_inverse(use)


def test_a_row_whose_gradient_overflows_costs_no_other_row_its_gradient_and_the_expert_learns_from_the_others():
    def use(events: Callable[[], list[Event]]) -> None:
        layer, one = layer_over_both(), RemoteExpert("ffn.0", "simulated")
        x = torch.ones(5, DIM)
        x[3, 0] = 1e-30  # a square that is 0
        x.requires_grad_()
        before = one(torch.ones(1, DIM)).detach()
        layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad[:, 0].tolist() == pytest.approx([0.5 - DIM / 2, 0.5 - DIM / 2, 0.5 - DIM / 2, 0.5, 0.5 - DIM / 2])
        assert_close(one(torch.ones(1, DIM)), before - 0.01 * 4 * 0.5)

    with_inverse(use)


def test_a_row_that_overflows_everywhere_is_what_the_error_is_about_or_zero_where_that_is_allowed():
    def use(events: Callable[[], list[Event]]) -> None:
        x = torch.ones(5, DIM)
        x[3, 0] = 0
        strict = MixtureOfExperts(DIM, (2,), swarm="simulated", dispatch=DispatchConfig(k_best=2, k_min=2))
        with pytest.raises(lk.NotEnoughExperts, match=r"1 of 5 rows.*too few answers"):
            strict(x)
        lenient = layer_over_both(k_min=2, allow_zero_outputs=True)
        assert (lenient(x) != 0).any(1).tolist() == [True, True, True, False, True]

    with_inverse(use)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_with_numbers_that_are_none_are_refused_before_anything_is_sent(bad):
    def use(events: Callable[[], list[Event]]) -> None:
        x = torch.ones(5, DIM)
        poisoned = x.clone()
        poisoned[2, 1] = bad
        for module, of in ((layer_over_both(), "'ffn'"), (RemoteExpert("ffn.0", "simulated"), "'ffn.0'")):
            before = events()
            with pytest.raises(NonFiniteTensor, match=rf"inputs for {of}.*in row 2\. Nothing was sent"):
                module(x, poisoned)
            assert events() == before or not calls(events()[len(before) :], CallFinished, "forward")
            y = module(x, x)
            before = events()
            with pytest.raises(NonFiniteTensor, match=rf"output gradients for {of}.*in row 2\. Nothing was sent"):
                y.backward(poisoned)
            assert events() == before

    with_inverse(use)


def test_a_gradient_that_is_no_number_in_a_row_that_nobody_answered_matters_to_no_other():
    def use(events: Callable[[], list[Event]]) -> None:
        layer, x = layer_over_both(k_min=2, allow_zero_outputs=True), torch.ones(5, DIM)
        x[3, 0] = 0
        x.requires_grad_()
        gradient = torch.ones(5, DIM)
        gradient[3] = math.nan
        layer(x).backward(gradient)
        assert x.grad is not None and x.grad.isfinite().all() and x.grad[[0, 1, 2, 4]].abs().min() > 0

    with_inverse(use)
