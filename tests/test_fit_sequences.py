"""`lk.fit` of models whose experts see whole sequences: tokens, windows, masks, and batches of different lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

import labkit as lk

WORDS, WIDTH = 12, 16


class LanguageModel(nn.Module):
    """Tokens [batch, seq] -> scores of the next one [batch, seq, WORDS]; one Transformer block of the swarm."""

    def __init__(self, swarm: lk.Swarm) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.block = swarm.moe(WIDTH, name="causal", sequences=True, pool="first", k_best=2)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        scores: Tensor = self.head(self.block(x) if mask is None else self.block(x, mask=mask))
        return scores


class Classifier(nn.Module):
    """Sequences [batch, seq, WIDTH] and a mask [batch, seq] -> scores [batch, 2]"""

    def __init__(self, swarm: lk.Swarm) -> None:
        super().__init__()
        self.block = swarm.moe(WIDTH, name="blocks", sequences=True, k_best=2)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.block(x, mask=mask) * mask[..., None]
        scores: Tensor = self.head(y.sum(1) / mask.sum(1, keepdim=True))
        return scores


def counting(rows: int, seq: int) -> Tensor:
    """Rows of numbers that go up by one, from anywhere, and begin again at 0: [rows, seq]"""
    return (torch.randint(WORDS, (rows, 1)) + torch.arange(seq)) % WORDS


class Ragged(Dataset[dict[str, Tensor]]):
    """Rows of 2 to 8 tokens each, and those that follow."""

    def __len__(self) -> int:
        return 128

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens = (row + torch.arange(3 + row % 7)) % WORDS
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    tokens = pad_sequence([row["tokens"] for row in rows], batch_first=True)
    return {"tokens": tokens, "mask": labels != -100, "labels": labels}


@pytest.fixture(scope="module")
def swarm() -> Iterator[lk.Swarm]:
    with lk.Swarm("sequences in lk.fit") as swarm:
        options: dict[str, Any] = {"hidden": WIDTH, "heads": 2, "grid": (3,), "isolation": "task", "backups": 0}
        swarm.serve("transformer", name="causal", causal=True, **options)
        swarm.serve("transformer", name="blocks", **options)
        yield swarm


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def windows() -> tuple[Tensor, Tensor]:
    tokens = counting(256, WORDS + 1)
    return tokens[:, :-1], tokens[:, 1:]  # as many positions as there are words


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (lambda: counting(256, 10), {"loss": lk.losses.next_token}),
        (windows, {"loss": lk.losses.each_token}),
        (lambda: DataLoader(Ragged(), 16, collate_fn=padded, shuffle=True), {}),
    ],
    ids=["tokens", "windows as long as there are words", "padded"],
)
def test_a_language_model_learns_to_count_with_causal_experts(swarm, data, options):
    model, rows = LanguageModel(swarm), data()
    run = lk.fit(
        model, rows, steps=40, batch_size=16, trainers=2, lr=0.03, validate=rows, every=20,
        metrics=["accuracy", "perplexity"], **options,
    ).wait()  # fmt: skip
    assert [validation.step for validation in run.validations] == [20, 40]
    found = run.validations[-1].metrics
    assert found["accuracy"] == 1.0 and found["perplexity"] == pytest.approx(math.exp(found["validation loss"]))
    assert run.evaluate(rows, metric="perplexity") == pytest.approx(found["perplexity"], rel=0.05)
    assert {step.samples for step in run.history} == {16}  # a sequence is one sample


def test_a_classifier_of_padded_sequences_learns_from_its_mask(swarm):
    x, y = torch.randn(192, 6, WIDTH), torch.randint(2, (192,))
    mask = torch.arange(6) < torch.randint(1, 7, (192, 1))
    x[..., 0] = torch.where(mask, y[:, None] * 2.0 - 1, 100 * torch.randn(192, 6))  # only what is no padding tells
    model = Classifier(swarm)
    run = lk.fit(model, (x, mask, y), steps=30, batch_size=32, trainers=2, lr=0.02).wait()
    assert run.evaluate((x, mask, y)) > 0.95
    assert lk.evaluate(model, {"x": x, "mask": mask, "y": y}) > 0.95


def test_the_loss_of_batches_of_different_lengths_is_that_of_all_labels(swarm):
    model, data = LanguageModel(swarm), DataLoader(Ragged(), 20, collate_fn=padded)
    (everything,) = DataLoader(Ragged(), len(Ragged()), collate_fn=padded)
    labels = everything.pop("labels").flatten()
    with torch.no_grad():
        scores = model.eval()(**everything).flatten(0, 1)
    assert lk.evaluate(model, data, metric="loss") == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-4)
    right = (scores.argmax(1) == labels)[labels != -100].float().mean().item()
    assert lk.evaluate(model, data) == pytest.approx(right)


def test_rows_of_different_lengths_that_nothing_pads_are_refused_in_words_whichever_trainer_meets_them_first(swarm):
    for _ in range(3):
        run = lk.fit(LanguageModel(swarm), Ragged(), steps=100, trainers=4)
        with pytest.raises(RuntimeError, match="equal size"):
            run.wait()
    rows = [Ragged()[row]["tokens"] for row in range(20)]
    with pytest.raises(ValueError, match=r"data: 20 tensors, of 2 rows, 3 rows, …: .* a DataLoader, whose collate_fn"):
        lk.fit(LanguageModel(swarm), rows, steps=1)
