"""The paper's language model (section 4.3) over a slow and unreliable network, in virtual time.

A Transformer whose feed-forward layers are mixtures of experts in a swarm, each token a row, beside a dense one that
computes as much for a token and waits as long. Runs are done by `virtual_training`, and listed here by size.
"""

# Legend. b: windows of a batch; t: positions; V: tokens that there are.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.client.moe import MixtureOfExperts
from labkit.experiments.convergence_config import ConvergenceConfig
from labkit.experiments.virtual_training import SWARM_NAME, History, run_task
from labkit.server.layers import check_size
from labkit.training.metrics import measure
from labkit.training.text import TextData, load_text

GRIDS = {16: (4, 4), 64: (8, 8), 256: (16, 16)}
DELAYS = {"": 0.0, "-100ms": 0.1, "-1s": 1.0}  # mean of a call, in virtual seconds
WINDOWS_AT_ONCE = 64  # of an evaluation
STD = 0.02  # of embeddings at the start, as GPT-2's


@dataclass(frozen=True)
class LanguageModelConfig(ConvergenceConfig):
    """One run; see `ConvergenceConfig`, of which `batch_size` counts windows, and `evaluate_every` validation losses.

    Args:
        context: Positions of a window.
        heads: Attention heads of a layer.
        splits: Which splits of the text to train on and to test on; None for those that `lk.load` takes.
        measured: Windows of the text for testing that are evaluated, spread evenly over it; 0 for all.

    Raises:
        ValueError: A value is not possible.
    """

    context: int = 64
    heads: int = 4
    splits: tuple[str, str] | None = None
    measured: int = 256

    def __post_init__(self) -> None:
        for name, least in {"context": 1, "heads": 1, "measured": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: a whole number of at least {least}")
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width={self.width}: a multiple of heads={self.heads}")
        if self.validation:
            raise ValueError(f"validation={self.validation}: a text has a part for testing already; leave it out")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> LanguageModelConfig:
        """Make a config of its fields as read from JSON."""
        splits = fields["splits"]
        return cls(**{**fields, "grid": tuple(fields["grid"]), "splits": None if splits is None else tuple(splits)})

    @property
    def rows(self) -> int:
        """Rows of a batch: each position of each window is one."""
        return self.batch_size * self.context

    def expert(self) -> tuple[str, dict[str, Any]]:
        """The kind of the experts, and their options."""
        return f"{__name__}:TokenFeedForward", {"hidden": self.width}

    def load(self, data_dir: str | Path | None) -> TextData:
        """The text, in windows of this run's."""
        return load_text(data_dir, context=self.context, splits=self.splits)


class TokenFeedForward(nn.Module):
    """The feed-forward part of a Transformer's layer: hidden -> inner -> hidden.

    Args:
        hidden: Width of a token.
        inner: Width in between; by default 4 * hidden.
    """

    def __init__(self, hidden: int, inner: int | None = None) -> None:
        super().__init__()
        check_size("hidden", hidden)
        inner = 4 * hidden if inner is None else check_size("inner", inner)
        self.takes = f"float32 [rows, {hidden}]"
        self.layers = nn.Sequential(nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return output


class CausalBlock(nn.Module):
    """One layer: attention to what came before, then a feed-forward part, each with a LayerNorm before and a residual.

    Args:
        width: Width of a token.
        heads: Attention heads.
        feed_forward: [b, t, width] -> the same.
    """

    def __init__(self, width: int, heads: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [b, heads, t, width / heads]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))  # [b, t, width]
        output: Tensor = x + self.feed_forward(self.norm(x))
        return output


class LanguageModel(nn.Module):
    """[b, t] tokens -> [b, t, V] scores of the next ones.

    Args:
        config: The run.
        vocab_size: V.
    """

    def __init__(self, config: LanguageModelConfig, vocab_size: int) -> None:
        super().__init__()
        width = config.width
        self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(config.context, width)
        self.blocks = nn.Sequential(
            *(CausalBlock(width, config.heads, _feed_forward(config, layer)) for layer in range(config.layers))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)
        for table in (self.token, self.position, self.head):
            nn.init.normal_(table.weight, std=STD)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.token(x) + self.position.weight[: x.shape[1]]  # [b, t, width]
        scores: Tensor = self.head(self.norm(self.blocks(embedded)))
        return scores


def _feed_forward(config: LanguageModelConfig, layer: int) -> nn.Module:
    """A layer of experts; of a dense model, one that computes as much as the `k_best` experts of a token."""
    if config.model == "dense":
        return TokenFeedForward(config.width, config.k_best * 4 * config.width)
    return MixtureOfExperts(config.width, config.grid, f"layer{layer}", swarm=SWARM_NAME, dispatch=config.dispatch())


class NextToken:
    """The task of a run: the next token of a text.

    Args:
        config: The run.
        data: The text.
    """

    def __init__(self, config: LanguageModelConfig, data: TextData) -> None:
        torch.manual_seed(config.seed)
        self.model: nn.Module = LanguageModel(config, data.vocab_size).to(config.device)
        self.batches = self._windows(config, data)
        x, y = data.test_x, data.test_y
        places = torch.arange(len(x))
        if 0 < config.measured < len(x):
            places = torch.linspace(0, len(x) - 1, config.measured).long()
        self._evaluation_data = x[places], y[places]

    @staticmethod
    def _windows(config: LanguageModelConfig, data: TextData) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(config.seed)
        while True:
            starts = torch.randint(len(data.train) - data.context, (config.batch_size,), generator=generator)
            yield data.window(starts, testing=False)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy, in nats a token."""
        return F.cross_entropy(outputs.flatten(0, 1), y.flatten())

    def measure(self) -> float:
        """The validation loss."""
        was_training = self.model.training
        found = measure(self.model.eval(), self._evaluation_data, {"loss": "loss"}, self.loss, WINDOWS_AT_ONCE)
        self.model.train(was_training)
        return found["loss"]


def run(config: LanguageModelConfig, data: TextData, progress: Callable[[int], None] = lambda updates: None) -> History:
    """Do a run, as fast as this machine computes. On CPUs the same config and data give the same history.

    Args:
        config: The run.
        data: The text, in windows of `config.context`.
        progress: Called with the number of updates, after each update.

    Raises:
        ValueError: The windows are of another size, the device is not available, or so many calls fail that the run
            would hardly ever end.
    """
    if data.context != config.context:
        raise ValueError(f"context={config.context}: the text that was loaded has windows of {data.context}")
    return run_task(config, partial(NextToken, config, data), progress)


# ---------------------------------------------------------------- which runs there are

SMALL = LanguageModelConfig(
    layers=2, width=64, context=32, batch_size=8, trainers=8, updates=1024, evaluate_every=128, latency=0.0, lr=1e-3,
    beta1=0.0, schedule="linear", warmup=32, clip_grad_norm=1.0,
)  # fmt: skip
# With four times the trainers gradients are four times as old: smaller steps, and more of them.
CROWD = replace(SMALL, trainers=32, updates=2048, evaluate_every=256, lr=2e-4)
LAPTOP = replace(CROWD, layers=4, width=128, context=64, batch_size=12)
WIKITEXT = replace(CROWD, splits=("valid", "test"))
SIZES = {"small": SMALL, "crowd": CROWD, "laptop": LAPTOP, "wikitext": WIKITEXT}


def plan(size: str, seeds: Iterable[int]) -> dict[str, LanguageModelConfig]:
    """List the runs of a size.

    Args:
        size: "small", with 8 trainers; "crowd", the same model with the paper's 32; "laptop", as large as nanoGPT's
            recipe for one; or "wikitext", as "crowd" on the two splits of WikiText-2 that are named valid and test.
        seeds: The runs that matter most are listed with each of these seeds, and the others with the first.

    Returns:
        The configs by the names of their files.

    Raises:
        ValueError: There is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}: {', '.join(SIZES)}")
    base, runs, seeds = SIZES[size], dict[str, LanguageModelConfig](), list(seeds)
    for place, seed in enumerate(seeds):
        for experts, grid in GRIDS.items():
            for word, latency in DELAYS.items():
                for loss in (0.0, 0.1):
                    matters = experts == 16 and latency == 1.0
                    if place == 0 or matters:
                        name = f"{size}-{experts}-experts{word}{'-failing' if loss else ''}-{seed}"
                        runs[name] = replace(base, grid=grid, latency=latency, loss=loss, seed=seed)
        for word, latency in DELAYS.items():
            if place == 0 or latency == 1.0:
                runs[f"{size}-dense{word}-{seed}"] = replace(base, model="dense", latency=latency, seed=seed)
        if place == 0:
            runs[f"{size}-dense-fresh-{seed}"] = replace(base, model="dense", trainers=1, seed=seed)
            runs[f"{size}-16-experts-fresh-{seed}"] = replace(base, trainers=1, seed=seed)
    return runs
