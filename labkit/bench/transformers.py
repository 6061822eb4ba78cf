"""`labkit bench transformers`: a mixture model of Transformers whose experts are at servers, beside the same one here.

It writes (`generate`, one token after the other) and is trained. What a token costs is counted: calls to experts, and
the bytes of requests and answers. The model is made from a configuration, so that nothing is downloaded. Servers are
processes of this machine: beside a local model that uses all of it, they show what calling costs, not what more
machines bring. Importing this imports transformers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import transformers

from labkit.bench.report import check_at_least
from labkit.events import CallFinished, Event
from labkit.integrations import transformers as lkt
from labkit.server.optimizer import BackendConfig
from labkit.swarm import Swarm

CALL_TIMEOUT = 120.0  # seconds; long, since no call is to fail here
VOCABULARY = 256
HEAD_DIM = 64
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class TransformersConfig:
    """What `labkit bench transformers` measures.

    Args:
        servers: Numbers of servers to measure one after the other; each is a process.
        layers: Layers of the model, each with attention and experts.
        hidden: Width of the model, a multiple of 64.
        inner: Width within an expert.
        experts: Experts of each layer.
        k_best: Experts that the router chooses for each token.
        texts: Texts that are written at the same time.
        tokens: Tokens that are written to each.
        batch: Windows of a training step.
        context: Tokens of a window.
        steps: Training steps.
        runs: How often each is measured, after a warm-up.

    Raises:
        ValueError: A value is not possible.
    """

    servers: tuple[int, ...] = (1, 4)
    layers: int = 4
    hidden: int = 256
    inner: int = 512
    experts: int = 16
    k_best: int = 2
    texts: int = 1
    tokens: int = 48
    batch: int = 8
    context: int = 64
    steps: int = 4
    runs: int = 3

    def __post_init__(self) -> None:
        check_at_least(
            1, self, "layers", "inner", "experts", "k_best", "texts", "tokens", "batch", "steps", "runs"
        )  # fmt: skip
        check_at_least(2, self, "context")
        if self.hidden < HEAD_DIM or self.hidden % HEAD_DIM:
            raise ValueError(f"hidden={self.hidden}: a multiple of {HEAD_DIM}")
        if self.k_best > self.experts:
            raise ValueError(f"k_best={self.k_best}: a layer has {self.experts} experts")
        if not self.servers or min(self.servers) < 1 or max(self.servers) > self.layers * self.experts:
            raise ValueError(f"servers={self.servers}: each at least 1, and at most {self.layers * self.experts}")


def measure(config: TransformersConfig) -> dict[str, Any]:
    """Measure the model with its experts in this process, then with them at so many servers, then here again.

    Returns:
        What `--json` prints: tokens per second, medians over the runs, and for servers also how
        much of the local speed that is (the better of the two), and what a token costs.
    """
    before, served = _speeds(_model(config), config), dict[str, dict[str, float]]()
    for count in config.servers:
        with _attached(config, count) as (model, calls):
            served["1 server" if count == 1 else f"{count} servers"] = _speeds(model, config, calls)
    after = _speeds(_model(config), config)
    local = {name: max(before[name], after[name]) for name in before}
    for found in served.values():
        for what in ("generate", "train"):
            speed = f"{what}_tokens_per_s"
            found[f"{what}_of_local"] = round(found[speed] / local[speed], 3)
    return {**asdict(config), "local": local, **served}


def _model(config: TransformersConfig) -> Any:
    """The model, with the same parameters each time."""
    torch.manual_seed(0)
    return transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(
            vocab_size=VOCABULARY, hidden_size=config.hidden, intermediate_size=config.inner,
            num_hidden_layers=config.layers, num_attention_heads=config.hidden // HEAD_DIM,
            num_experts=config.experts, num_experts_per_tok=config.k_best,
            max_position_embeddings=max(config.context, config.tokens + 1), pad_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


class _Calls:
    """Counts the calls that experts have answered, and their bytes."""

    def __init__(self) -> None:
        self.calls, self.bytes = 0, 0

    def listen(self, event: Event) -> None:
        if isinstance(event, CallFinished):
            self.calls, self.bytes = self.calls + 1, self.bytes + event.bytes


@contextmanager
def _attached(config: TransformersConfig, servers: int) -> Iterator[tuple[Any, _Calls]]:
    """The model with its experts at servers, and what counts the calls to them."""
    model, calls = _model(config), _Calls()
    with Swarm("bench") as swarm:
        lkt.serve_experts(swarm, model, servers=servers, backups=0, isolation="process")
        lkt.attach(model, swarm, timeout=CALL_TIMEOUT)
        swarm.on_event(calls.listen)
        yield model, calls


def _speeds(model: Any, config: TransformersConfig, calls: _Calls | None = None) -> dict[str, float]:
    """Tokens per second, and with `calls` what a token costs."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=BackendConfig().lr)  # as servers have by default

    def write(tokens: int) -> int:
        begin = torch.randint(VOCABULARY, (config.texts, 1), generator=generator)  # so that every pass is of one token
        model.eval().generate(begin, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return config.texts * tokens

    def train(steps: int) -> int:
        model.train()
        for _ in range(steps):
            windows = torch.randint(VOCABULARY, (config.batch, config.context), generator=generator)
            model(windows, labels=windows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return steps * config.batch * config.context

    found = dict[str, float]()
    for what, work, amount, warm_up in (
        ("generate", write, config.tokens, WARM_UP_TOKENS), ("train", train, config.steps, 1)
    ):  # fmt: skip
        work(warm_up)
        speeds, tokens, before = [], 0, (calls.calls, calls.bytes) if calls is not None else (0, 0)
        for _ in range(config.runs):
            started = time.perf_counter()
            done = work(amount)
            speeds.append(done / (time.perf_counter() - started))
            tokens += done
        found[f"{what}_tokens_per_s"] = round(median(speeds), 1)
        if calls is not None:
            found[f"{what}_calls_per_token"] = round((calls.calls - before[0]) / tokens, 3)
            found[f"{what}_bytes_per_token"] = round((calls.bytes - before[1]) / tokens)
    return found
