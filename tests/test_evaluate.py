"""`lk.evaluate` and `lk.losses`: the right number for labels of any shape, or an error that says why not."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import labkit as lk
from labkit.training.datasets import ClassificationData
from labkit.training.fit import fit
from labkit.training.metrics import named

N, CLASSES, POSITIONS = 10, 5, 7
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
SCORES = torch.randn(N, CLASSES, generator=torch.Generator().manual_seed(1))
Y = torch.where(torch.arange(N) < 7, SCORES.argmax(1), (SCORES.argmax(1) + 1) % CLASSES)  # seven of ten are right
SEQUENCES = torch.randn(N, POSITIONS, CLASSES, generator=torch.Generator().manual_seed(2))
TOKENS = torch.where(torch.arange(POSITIONS) < 3, SEQUENCES.argmax(-1), (SEQUENCES.argmax(-1) + 1) % CLASSES)
LOGITS = torch.tensor([2.0, -1, 0.5, -3, 1, -0.2, 0.1, 4, -5, -1])
YES = torch.tensor([1, 0, 1, 0, 1, 0, 0, 0, 0, 0])  # eight of ten are right


class Says(nn.Module):
    """A model whose outputs for row i are `outputs[i]`; its input is the row's number."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, rows):
        return self.outputs[rows]


ROWS = torch.arange(N)


class Attributes(dict):
    """A dictionary whose entries are attributes, and which has no others, not even for `getattr` with a default."""

    __getattr__ = dict.__getitem__


def test_outputs_may_be_a_dictionary_that_knows_no_attributes_but_its_own():
    class Model(nn.Module):
        def forward(self, rows, labels):
            return Attributes(loss=F.cross_entropy(SCORES[rows], labels), logits=SCORES[rows])

    batches = [{"rows": ROWS, "labels": Y}]
    assert lk.evaluate(Model(), batches) == 0.7
    assert lk.evaluate(Model(), batches, metric="loss") == pytest.approx(F.cross_entropy(SCORES, Y).item())


@pytest.mark.parametrize(
    ("outputs", "y", "right"),
    [
        (SCORES, Y, 0.7),
        (SCORES, Y[:, None], 0.7),
        (SCORES, Y.int(), 0.7),
        (SCORES, Y.to(torch.uint8), 0.7),
        (SCORES, Y.float(), 0.7),
        (SCORES, F.one_hot(Y, CLASSES), 0.7),
        (SCORES, F.one_hot(Y, CLASSES).float(), 0.7),
        (SCORES, Y.numpy(), 0.7),
        (SCORES, torch.where(ROWS < 5, Y, -100), 1.0),
        (SCORES.half(), Y, 0.7),
        (SCORES.where(ROWS[:, None] > 0, torch.nan), Y, 0.6),
        (SEQUENCES, TOKENS, 3 / 7),
        (SEQUENCES.transpose(1, 2), TOKENS, 3 / 7),
        (SEQUENCES, torch.where(torch.arange(POSITIONS) < 2, TOKENS, -100), 1.0),
        (LOGITS, YES, 0.8),
        (LOGITS, YES[:, None], 0.8),
        (LOGITS[:, None], YES, 0.8),
        (LOGITS[:, None], YES[:, None].float(), 0.8),
        (LOGITS, YES.bool(), 0.8),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_accuracy_is_the_share_of_labels_that_are_right(outputs, y, right, batch_size):
    assert lk.evaluate(Says(outputs), ROWS, y, batch_size=batch_size) == pytest.approx(right)


@pytest.mark.parametrize(
    ("outputs", "x", "y", "said"),
    [
        (SCORES, ROWS[:0], Y[:0], "x has 0 rows and y has 0"),
        (SCORES, ROWS, Y[:9], "x has 10 rows and y has 9"),
        (SCORES, ROWS, X, r"scores \[10, 5\] and y \[10, 3\] do not fit"),
        (SCORES, ROWS, Y + 1, "y has the class 5, and the model scores the classes 0 to 4"),
        (SCORES, ROWS, X[:, 0], "these are fractions"),
        (SCORES, ROWS, torch.ones(N, CLASSES), "not one-hot"),
        (SCORES, ROWS, torch.full((N,), -100), "no label counts"),
        (LOGITS.sigmoid(), ROWS, YES, "are they logits"),
        (LOGITS, ROWS, Y, "can only say yes or no"),
        (SEQUENCES[:, :5], ROWS, TOKENS[:, :5], "in the second or in the last dimension"),
        (SCORES, ROWS, ["a"] * N, "two tensors or arrays"),
    ],
)
def test_where_there_is_no_accuracy_the_error_says_why(outputs, x, y, said):
    with pytest.raises(ValueError, match=said):
        lk.evaluate(Says(outputs), x, y)


def test_a_loss_tells_probabilities_from_logits():
    assert lk.evaluate(Says(LOGITS.sigmoid()), ROWS, YES, loss=nn.BCELoss()) == 0.8
    assert lk.evaluate(Says(LOGITS.sigmoid()), ROWS, YES, loss=nn.BCEWithLogitsLoss()) == 0.3


@pytest.mark.parametrize(
    "data",
    [
        (ROWS, Y),
        (ROWS.numpy(), Y.numpy()),
        TensorDataset(ROWS, Y),
        DataLoader(TensorDataset(ROWS, Y), 4, shuffle=True),
        [{"rows": ROWS[:3], "labels": Y[:3]}, {"rows": ROWS[3:], "labels": Y[3:]}],
        ClassificationData("ten", X, Y[:1].repeat(N), ROWS, Y, CLASSES),
    ],
    ids=["tensors", "arrays", "Dataset", "DataLoader", "dictionaries", "the test part of lk.load"],
)
def test_data_may_have_any_form(data):
    assert lk.evaluate(Says(SCORES), data) == pytest.approx(0.7)


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_a_loss_is_that_of_all_labels_however_they_are_cut_into_batches(batch_size):
    def loss(outputs, y, **options):
        return lk.evaluate(Says(outputs), ROWS, y, metric="loss", batch_size=batch_size, **options)

    some = torch.where(torch.arange(POSITIONS) <= ROWS[:, None] % 7, TOKENS, -100)
    expected = F.cross_entropy(SEQUENCES.flatten(0, 1), some.flatten()).item()
    assert loss(SCORES, Y) == pytest.approx(F.cross_entropy(SCORES, Y).item())
    assert loss(SEQUENCES, some) == pytest.approx(expected)
    assert loss(LOGITS, YES, loss=lk.losses.mse) == pytest.approx(F.mse_loss(LOGITS, YES.float()).item())
    perplexity = lk.evaluate(Says(SEQUENCES), ROWS, some, metric="perplexity", batch_size=batch_size)
    assert perplexity == pytest.approx(math.exp(expected))


WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("batch_size", [1, 3, 256])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=WEIGHTS),
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=2, label_smoothing=0.1),
        functools.partial(F.cross_entropy, weight=WEIGHTS),
        nn.NLLLoss(weight=WEIGHTS),
    ],
)
def test_so_is_one_whose_classes_have_weights_or_do_not_count(loss, batch_size):
    found = lk.evaluate(Says(SCORES), ROWS, Y, metric="loss", loss=loss, batch_size=batch_size)
    assert found == pytest.approx(loss(SCORES, Y).item())


@pytest.mark.parametrize(
    ("loss", "outputs", "y", "said"),
    [
        (None, LOGITS, LOGITS, "With one number a row the loss is"),
        (nn.CrossEntropyLoss(), LOGITS, LOGITS, "With one number a row the loss is"),
        (None, LOGITS[:, None], torch.zeros(N), "With one number a row the loss is"),
        (None, LOGITS[:, None], YES[:, None].float(), "neither probabilities nor one-hot"),
        (None, SCORES, SCORES, "neither probabilities nor one-hot: for numbers the loss is lk.losses.mse"),
        (None, SEQUENCES[:, :5], TOKENS[:, :5], "in the second or in the last dimension"),
        (nn.CrossEntropyLoss(), SEQUENCES, TOKENS, "classes in the last dimension.*each_token takes these"),
        (F.nll_loss, SEQUENCES, TOKENS, r"functional\.nll_loss\(outputs\.transpose"),
        (F.mse_loss, LOGITS[:, None], LOGITS, r"outputs \[10, 1\] and y \[10\] have to have one shape"),
        (nn.HuberLoss(), LOGITS, LOGITS[:, None], r"outputs \[10\] and y \[10, 1\] have to have one shape"),
        (functools.partial(F.smooth_l1_loss, beta=2.0), LOGITS[:, None], LOGITS, "have to have one shape"),
        (nn.MSELoss(reduction="sum"), LOGITS, LOGITS, "reduction='sum' it is no mean"),
        (functools.partial(F.cross_entropy, reduction="sum"), SCORES, Y, "reduction='sum' it is no mean"),
        ("mse", LOGITS, LOGITS, "loss=lk.losses.mse"),
        ("msee", LOGITS, LOGITS, "did you mean 'mse'"),
        (nn.MSELoss, LOGITS, LOGITS, r"is a class; give an instance, loss=MSELoss\(\)"),
        (3, LOGITS, LOGITS, "loss=3: a function of outputs and y"),
    ],
)
def test_a_loss_that_would_be_another_number_is_refused_in_words(loss, outputs, y, said):
    with pytest.raises(ValueError, match=said):
        lk.evaluate(Says(outputs), ROWS, y, metric="loss", loss=loss)


def test_several_metrics_of_one_name_are_refused_since_only_one_would_be_shown():
    with pytest.raises(ValueError, match="several metrics are called '<lambda>'; give them names"):
        named([lambda outputs, y: 1.0, lambda outputs, y: 2.0])


class Largest:
    """A metric that needs all data, in the manner of torchmetrics."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.largest = -math.inf

    def update(self, outputs, y) -> None:
        self.largest = max(self.largest, outputs.max().item())

    def compute(self) -> torch.Tensor:
        return torch.tensor(self.largest)


def test_functions_and_objects_are_metrics_too():
    function = lk.evaluate(Says(LOGITS), ROWS, YES, metric=lambda outputs, y: outputs.mean(), batch_size=4)
    assert function == pytest.approx(LOGITS.mean().item())
    assert lk.evaluate(Says(LOGITS), ROWS, YES, metric=Largest(), batch_size=4) == 4.0
    with pytest.raises(ValueError, match=r"a tensor of shape \[10\]"):
        lk.evaluate(Says(LOGITS), ROWS, YES, metric=lambda outputs, y: outputs)
    with pytest.raises(ValueError, match="metric 'recall'"):
        lk.evaluate(Says(LOGITS), ROWS, YES, metric="recall")


def test_evaluating_changes_nothing_in_the_model():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert lk.evaluate(model, X, Y) == lk.evaluate(model, X, Y)
    assert model.training and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


# ---------------------------------------------------------------- losses


def test_next_token_compares_each_position_with_the_token_after_it():
    expected = F.cross_entropy(SEQUENCES[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert lk.losses.next_token(SEQUENCES, TOKENS).item() == pytest.approx(expected.item())


def test_each_token_compares_each_position_with_its_own_label_even_where_there_are_as_many_positions_as_classes():
    square, y = SEQUENCES[:, :5], torch.where(TOKENS[:, :5] == 1, -100, TOKENS[:, :5])  # 5 positions, 5 classes
    expected = F.cross_entropy(square.flatten(0, 1), y.flatten())
    assert lk.losses.each_token(square, y).item() == pytest.approx(expected.item())
    measured = [
        lk.evaluate(Says(square), ROWS, y, metric=metric, loss=lk.losses.each_token, batch_size=3)
        for metric in ("loss", "perplexity", "accuracy")
    ]
    right = (square.argmax(2) == y)[y != -100].float().mean()
    assert measured == pytest.approx([expected.item(), math.exp(expected), right.item()])
    second = lk.evaluate(Says(square), ROWS, TOKENS[:, :5], loss=nn.CrossEntropyLoss())
    assert second == pytest.approx((square.argmax(1) == TOKENS[:, :5]).float().mean().item())


def test_labels_that_a_loss_ignores_do_not_count_as_right_or_wrong():
    loss = nn.CrossEntropyLoss(ignore_index=2)
    right = (SCORES.argmax(1) == Y)[Y != 2].float().mean().item()
    assert lk.evaluate(Says(SCORES), ROWS, Y, loss=loss, batch_size=3) == pytest.approx(right)
    assert lk.evaluate(Says(SEQUENCES.transpose(1, 2)), ROWS, TOKENS, loss=loss) == pytest.approx(
        (SEQUENCES.argmax(2) == TOKENS)[TOKENS != 2].float().mean().item()
    )


@dataclasses.dataclass
class CausalLMOutput:
    """What a causal model of Hugging Face returns: it has compared the scores with the labels after them."""

    loss: torch.Tensor
    logits: torch.Tensor


def test_a_model_that_shifts_the_labels_itself_is_measured_so():
    class Causal(nn.Module):
        def forward(self, rows, labels):
            return CausalLMOutput(lk.losses.next_token(SEQUENCES[rows], labels), SEQUENCES[rows])

    batches = [{"rows": rows, "labels": TOKENS[rows]} for rows in ROWS.split(3)]
    right = (SEQUENCES[:, :-1].argmax(2) == TOKENS[:, 1:]).float().mean().item()
    assert lk.evaluate(Causal(), batches) == pytest.approx(right)
    assert lk.evaluate(Causal(), batches, metric="loss") == pytest.approx(lk.losses.next_token(SEQUENCES, TOKENS))


def test_one_hot_labels_of_positions_are_measured_as_classes_also_where_batches_have_different_lengths():
    one_hot = F.one_hot(TOKENS, SEQUENCES.shape[2]).float()
    batches = [(ROWS[:4], one_hot[:4, :3]), (ROWS[4:], one_hot[4:])]
    scores = torch.cat([SEQUENCES[:4, :3].flatten(0, 1), SEQUENCES[4:].flatten(0, 1)])
    tokens = torch.cat([TOKENS[:4, :3].flatten(), TOKENS[4:].flatten()])

    class Cut(nn.Module):
        def forward(self, rows):
            return SEQUENCES[rows][:, : 3 if rows[0] == 0 else None]

    assert lk.evaluate(Cut(), batches) == pytest.approx((scores.argmax(1) == tokens).float().mean().item())
    assert lk.evaluate(Cut(), batches, metric="loss") == pytest.approx(F.cross_entropy(scores, tokens).item())


LOSSES: list[tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]] = [
    (lk.losses.cross_entropy, SCORES, Y[:, None], F.cross_entropy(SCORES, Y)),
    (lk.losses.cross_entropy, SEQUENCES, TOKENS, F.cross_entropy(SEQUENCES.flatten(0, 1), TOKENS.flatten())),
    (lk.losses.cross_entropy, SCORES, torch.full((N,), -100), torch.tensor(0.0)),
    (lk.losses.cross_entropy, SCORES, F.one_hot(Y, CLASSES), F.cross_entropy(SCORES, Y)),
    (lk.losses.cross_entropy, SCORES, SCORES.softmax(1), F.cross_entropy(SCORES, SCORES.softmax(1))),
    (
        lk.losses.cross_entropy,
        SEQUENCES,
        F.one_hot(TOKENS, SEQUENCES.shape[2]).float(),
        F.cross_entropy(SEQUENCES.flatten(0, 1), TOKENS.flatten()),
    ),
    (lk.losses.mse, LOGITS[:, None], YES, F.mse_loss(LOGITS, YES.float())),
    (lk.losses.mae, LOGITS, YES[:, None], F.l1_loss(LOGITS, YES.float())),
    (lk.losses.binary_cross_entropy, LOGITS[:, None], YES, F.binary_cross_entropy_with_logits(LOGITS, YES.float())),
]


@pytest.mark.parametrize(("loss", "outputs", "y", "expected"), LOSSES)
def test_losses_pair_each_output_with_its_own_label(loss, outputs, y, expected):
    assert loss(outputs, y).item() == pytest.approx(expected.item())


def test_losses_refuse_shapes_that_torch_would_pair_each_with_each():
    with pytest.raises(ValueError, match=r"outputs \[10, 5\] and y \[10\]"):
        lk.losses.mse(SCORES, YES)
    for loss in (lk.losses.next_token, lk.losses.each_token):
        with pytest.raises(ValueError, match=r"scores \[rows, positions, \w+\].* y \[rows, positions\]"):
            loss(SCORES, Y)


def test_a_run_evaluates_with_its_own_loss():
    run = fit(nn.Linear(3, 1), (X, X.sum(1)), loss=lk.losses.mse, steps=1).wait()
    with torch.no_grad():
        expected = F.mse_loss(run.model(X).squeeze(1), X.sum(1)).item()
    assert run.evaluate(X, X.sum(1), metric="loss") == pytest.approx(expected)


def test_arrays_of_numpy_are_data():
    x, y = X.double().numpy(), np.asarray(Y)
    assert fit(nn.Linear(3, CLASSES), (x, y), steps=2).wait().steps == 2


@pytest.mark.parametrize("wrong", [3, 7, -1])
def test_a_label_that_is_none_of_the_classes_is_named_when_it_is_trained_on(wrong):
    y = torch.tensor([0, wrong, -100, 2])
    for scores, labels in ((torch.zeros(4, 3), y), (torch.zeros(1, 4, 3), y[None])):
        with pytest.raises(ValueError, match=f"y has the class {wrong}, and the model scores the classes 0 to 2"):
            lk.losses.cross_entropy(scores, labels)


@pytest.mark.parametrize("labels", [np.array(["b", "a"]), np.array(["b", 1], dtype=object)])
def test_labels_that_are_texts_are_refused_with_what_numbers_them(labels):
    with pytest.raises(ValueError, match=r"texts cannot become a tensor.*'b'.*numpy\.unique"):
        lk.fit(nn.Linear(2, 2), (np.ones((2, 2)), labels), steps=1)
