"""Layers in models that torch captures or transforms: torch.compile goes around them, the others say they cannot."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import labkit as lk
from labkit.server.optimizer import BackendConfig

DIM = 6


@pytest.fixture(scope="module")
def swarm() -> Iterator[lk.Swarm]:
    still = BackendConfig(optimizer="sgd", lr=0.0)
    with lk.Swarm("tests of compiled layers") as swarm:
        swarm.serve("ffn", hidden=DIM, inner=8, grid=(2,), isolation="task", backend=still)
        yield swarm


def layer(swarm: lk.Swarm, kind: str) -> nn.Module:
    return swarm.moe(DIM, k_best=2, timeout_after_k_min=30.0) if kind == "layer" else swarm.expert("ffn.0")


@pytest.mark.parametrize("kind", ["layer", "one expert"])
def test_a_compiled_model_computes_and_trains_as_the_model_does(swarm, kind):
    model = nn.Sequential(nn.Linear(4, DIM), layer(swarm, kind), nn.Linear(DIM, 3))
    same = copy.deepcopy(model)
    compiled = torch.compile(same, backend="eager")
    x = torch.randn(5, 4)
    for one in (model, compiled):
        one(x).square().sum().backward()
    assert_close(compiled(x), model(x))
    for mine, its in zip(same.parameters(), model.parameters(), strict=True):
        assert_close(mine.grad, its.grad)


class Own(nn.Module):
    """torch remembers for each `forward` that it breaks, so here is one that nobody has compiled yet."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(x)
        return output


def test_trainers_use_what_the_first_of_them_has_compiled():
    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compiled: list[object] = []
    model: Any = torch.compile(Own(nn.Linear(DIM, 3)), backend=backend)
    data = torch.randn(80, DIM), torch.zeros(80, dtype=torch.long)
    assert lk.fit(model, data, steps=40, batch_size=8, trainers=6).wait().state == "finished"
    assert len(compiled) == 1


def test_one_graph_for_all_is_refused_with_the_reason(swarm):
    model = torch.compile(Own(layer(swarm, "layer")), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="calls experts over the network"):
        model(torch.randn(5, DIM))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.trace itself
@pytest.mark.parametrize("kind", ["layer", "one expert"])
def test_what_would_record_one_answer_for_ever_is_refused_in_words(swarm, kind):
    model, x = layer(swarm, kind), torch.randn(5, DIM)
    with pytest.raises(RuntimeError, match=r"calls experts over the network: torch.jit.trace"):
        torch.jit.trace(model, x)
    with pytest.raises(RuntimeError, match=r"calls experts over the network: torch.func and vmap"):
        torch.vmap(model)(x[:, None])
    with pytest.raises(RuntimeError, match=r"calls experts over the network: torch.func and vmap"):
        torch.func.grad(lambda x: model(x).sum())(x)


def test_neither_the_import_nor_a_pass_imports_the_compiler():
    code = """
import sys, torch, labkit as lk
with lk.Swarm() as swarm:
    swarm.serve("ffn", hidden=4, inner=4, grid=(1,), isolation="task")
    swarm.moe(4)(torch.randn(2, 4)).sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
