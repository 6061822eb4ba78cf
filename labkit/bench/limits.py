"""The limit of this machine's arithmetic, with which benchmarks are compared: experts in plain PyTorch.

They are in one process without a network. They have as many threads, as large batches and the same optimizer as the
servers, and flush denormal numbers as the servers do. A backward pass computes the outputs again, as theirs does, since
a server keeps nothing between calls. The limit of the messages is in `echo`.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from labkit.bench.processes import ProcessGroup, all_at_once
from labkit.bench.report import EXPERT_KINDS
from labkit.server.layers import make_expert
from labkit.server.optimizer import BackendConfig, make_optimizer


def experts_limit(**order: Any) -> float:
    """Measure experts that are called in turn, in rows per second.

    Args:
        **order: `kind` and `hidden` of the experts, their number `experts`, `rows` per call, `calls`, `backward`
            (whether a call is a forward and a backward pass) and `threads`.
    """
    with ProcessGroup() as group:
        (seconds,) = all_at_once(group.start("limits:call_experts", order))
    return float(order["calls"] * order["rows"] / seconds)


def moe_limit(**order: Any) -> tuple[float, float]:
    """Measure a forward and a backward pass of a mixture of experts, each in seconds: medians over the passes.

    Args:
        **order: The fields of a `MoEConfig`, and `threads`.
    """
    with ProcessGroup() as group:
        ((forward, backward),) = all_at_once(group.start("limits:pass_moe", order))
    return forward, backward


class _Expert:
    """A module and its optimizer."""

    def __init__(self, kind: str, hidden: int) -> None:
        self.module = make_expert(kind, hidden=hidden)
        self.optimizer = make_optimizer(list(self.module.parameters()), BackendConfig())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.module(x)
            return output

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        self.module(x).backward(grad)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        assert x.grad is not None
        return x.grad


def call_experts(order: dict[str, Any]) -> Generator[Any, Any, None]:
    """The worker of `experts_limit`: computes one batch after the other."""
    torch.set_num_threads(order["threads"])
    torch.set_flush_denormal(True)
    experts = [_Expert(order["kind"], order["hidden"]) for _ in range(order["experts"])]
    x = torch.randn(round(order["rows"]), order["hidden"])

    def once(expert: _Expert) -> None:
        y = expert.forward(x)
        if order["backward"]:
            expert.backward(x, torch.ones_like(y))

    for expert in experts:
        once(expert)
    yield None
    started = time.perf_counter()
    for number in range(order["calls"]):
        once(experts[number % len(experts)])
    yield time.perf_counter() - started


def pass_moe(order: dict[str, Any]) -> Generator[Any, Any, None]:
    """The worker of `moe_limit`: passes batches through a layer whose experts it holds itself."""
    torch.set_num_threads(order["threads"])
    torch.set_flush_denormal(True)
    side, hidden, k = order["side"], order["hidden"], order["k_best"]
    experts = [_Expert(EXPERT_KINDS[order["expert"]], hidden) for _ in range(side * side)]
    gate = nn.Linear(hidden, 2 * side)
    x = torch.randn(order["batch"], hidden, requires_grad=True)

    def once() -> tuple[float, float]:
        started = time.perf_counter()
        first, second = gate(x).split(side, dim=1)
        scores = (first[:, :, None] + second[:, None, :]).flatten(1)  # [batch, side * side]
        best, choice = scores.topk(k)
        outputs = torch.zeros(len(x), k, hidden)
        places = [torch.nonzero(choice == number, as_tuple=True) for number in range(len(experts))]
        for expert, (rows, slots) in zip(experts, places, strict=True):
            if len(rows):
                outputs[rows, slots] = expert.forward(x[rows])
        outputs.requires_grad_()
        y = torch.einsum("nk,nkh->nh", best.softmax(1), outputs)
        middle = time.perf_counter()
        y.sum().backward()  # type: ignore[no-untyped-call]
        assert outputs.grad is not None and x.grad is not None
        for expert, (rows, slots) in zip(experts, places, strict=True):
            if len(rows):
                x.grad.index_add_(0, rows, expert.backward(x[rows], outputs.grad[rows, slots]))
        x.grad = None
        return middle - started, time.perf_counter() - middle

    once()
    yield None
    passes = [once() for _ in range(order["passes"])]
    yield [median(seconds) for seconds in zip(*passes, strict=True)]
