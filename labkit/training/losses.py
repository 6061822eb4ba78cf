"""Losses for `lk.fit`, `lk.losses`: each is the mean over what counts, and takes what models and data really give.

A loss is a function of a model's outputs and y. Outputs may be a tensor, or what models of Hugging Face return, whose
`logits` count.
"""

# n: rows; t: positions of a sequence; C: classes

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that does not count, as in torch
ONE_NUMBER = (
    "scores of classes have the shape [rows, classes]; these have {}. With one number a row the loss is "
    "lk.losses.binary_cross_entropy or lk.losses.mse"
)


def cross_entropy(outputs: Any, y: Tensor) -> Tensor:
    """Mean cross-entropy of class scores, in nats; the default loss of `lk.fit`.

    Example:
        run = lk.fit(model, data, loss=lk.losses.cross_entropy, epochs=5)

    Args:
        outputs: Scores [n, C], or [n, t, C] for sequences, or [n, C, ...] as in torch.
        y: Classes [n], [n, 1], [n, t] or [n, ...], where -100 does not count; or
            probabilities, or one-hot rows, in the shape of the scores.

    Returns:
        The mean over the labels that count, a scalar; 0 if none does.

    Raises:
        ValueError: The shapes do not fit together, or a label is none of the classes.
    """
    scores = scores_of(outputs)
    if scores.ndim >= 2 and y.shape == scores.shape:
        return F.cross_entropy(*probabilities_in_dim_1(scores, y))
    check_order(scores, y)
    return _mean_over_classes(scores, y)


def _mean_over_classes(scores: Tensor, y: Tensor) -> Tensor:
    scores, y = classes_in_dim_1(scores, y)
    if scores.shape[1] == 1:
        raise ValueError(ONE_NUMBER.format(list(scores.shape)))
    counts = y != IGNORED
    if not counts.any():
        return scores.sum() * 0.0
    check_classes(y, counts, scores.shape[1])
    return F.cross_entropy(scores, y)


def check_classes(y: Tensor, counts: Tensor, classes: int) -> None:
    """Raise `ValueError` if a label that counts is no class. (On a GPU torch ends the process's device for that.)"""
    if (wrong := y[counts & ((y < 0) | (y >= classes))]).numel():
        raise ValueError(f"y has the class {int(wrong[0])}, and the model scores the classes 0 to {classes - 1}")


def next_token(outputs: Any, y: Tensor) -> Tensor:
    """Mean cross-entropy of the next token: position i of the outputs predicts token i + 1.

    A batch that is one tensor of tokens is input and y, so data need no second copy of them.

    Example:
        tokens = torch.randint(0, 100, (1000, 64))
        run = lk.fit(model, (tokens, tokens), loss=lk.losses.next_token, epochs=5)

    Args:
        outputs: Scores [n, t, C].
        y: The tokens themselves, [n, t], not shifted; -100 does not count.

    Returns:
        The mean over the tokens that count, a scalar; 0 if none does.

    Raises:
        ValueError: The shapes do not fit together.
    """
    scores = scores_of(outputs)
    if scores.ndim != 3 or y.shape != scores.shape[:2] or y.shape[1] < 2:
        raise ValueError(
            f"next_token: scores [rows, positions, tokens] and y [rows, positions] of at least two positions; got "
            f"{list(scores.shape)} and {list(y.shape)}"
        )
    return _mean_over_classes(scores[:, :-1].transpose(1, 2), y[:, 1:])


def each_token(outputs: Any, y: Tensor) -> Tensor:
    """Mean cross-entropy of the class at each position: of the next token, if y is shifted.

    As `cross_entropy`, for sequences only: so it is clear which dimension has the classes,
    even where there are as many of them as positions.

    Example:
        x, y = tokens[:, :-1], tokens[:, 1:]
        run = lk.fit(model, (x, y), loss=lk.losses.each_token, epochs=5)

    Args:
        outputs: Scores [n, t, C].
        y: Classes [n, t]; -100 does not count, as at padding.

    Returns:
        The mean over the labels that count, a scalar; 0 if none does.

    Raises:
        ValueError: The shapes do not fit together, or a label is none of the classes.
    """
    scores = scores_of(outputs)
    if scores.ndim != 3 or y.shape != scores.shape[:2]:
        raise ValueError(
            f"the model returned {list(scores.shape)} for y {list(y.shape)}: scores [rows, positions, classes] are "
            "needed, and y [rows, positions]"
        )
    return _mean_over_classes(scores.transpose(1, 2), y)


def binary_cross_entropy(outputs: Any, y: Tensor) -> Tensor:
    """Mean cross-entropy of yes and no, in nats; the outputs are logits, so no sigmoid before.

    Example:
        run = lk.fit(model, (x, y), loss=lk.losses.binary_cross_entropy, epochs=5)

    Args:
        outputs: Logits [n], [n, 1] or [n, ...].
        y: 0 and 1, or probabilities, in the same shape; a last dimension of 1 may be missing.

    Returns:
        The mean over all numbers, a scalar.

    Raises:
        ValueError: The shapes do not fit together.
    """
    scores, y = alike(scores_of(outputs), y, "binary_cross_entropy")
    return F.binary_cross_entropy_with_logits(scores, y)


def mse(outputs: Any, y: Tensor) -> Tensor:
    """Mean squared error.

    Example:
        run = lk.fit(model, (x, y), loss=lk.losses.mse, epochs=5)

    Args:
        outputs: Numbers [n], [n, 1] or [n, ...].
        y: As many, in the same shape; a last dimension of 1 may be missing on one side.

    Returns:
        The mean over all numbers, a scalar.

    Raises:
        ValueError: The shapes do not fit together.
    """
    return F.mse_loss(*alike(scores_of(outputs), y, "mse"))


def mae(outputs: Any, y: Tensor) -> Tensor:
    """Mean absolute error.

    Example:
        run = lk.fit(model, (x, y), loss=lk.losses.mae, epochs=5)

    Args:
        outputs: Numbers [n], [n, 1] or [n, ...].
        y: As many, in the same shape; a last dimension of 1 may be missing on one side.

    Returns:
        The mean over all numbers, a scalar.

    Raises:
        ValueError: The shapes do not fit together.
    """
    return F.l1_loss(*alike(scores_of(outputs), y, "mae"))


# ---------------------------------------------------------------- shapes


def scores_of(outputs: Any) -> Tensor:
    """The tensor among a model's outputs: they themselves, their `logits`, or the first of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, (tuple, list)) and outputs:
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model returned {_article(type(outputs).__name__)}, in which there is no tensor called logits; give a "
            "function of these outputs and y, such as loss=lambda outputs, y: …"
        )
    return found


def check_order(scores: Tensor, y: Tensor) -> None:
    """Raise `ValueError` where it cannot be seen whether scores are [n, C, t] or [n, t, C]."""
    if scores.ndim == 3 and scores.shape[1] == scores.shape[2] and y.shape == scores.shape[:2]:
        raise ValueError(
            f"scores {list(scores.shape)} and y {list(y.shape)}: are the classes in the second or in the last "
            "dimension? Give the loss that knows it, by which accuracy goes, too: loss=lk.losses.each_token for the "
            "last, or loss=torch.nn.functional.cross_entropy for the second"
        )


def probabilities_in_dim_1(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and probabilities [n, C, ...] of classes, from those or [n, t, C]. Raises `ValueError`."""
    y = y.to(scores.dtype)
    for dim in (1, -1):
        if scores.shape[dim] > 1 and bool((y >= 0).all() & ((y.sum(dim) - 1).abs() < 1e-2).all()):
            return scores.movedim(dim, 1), y.movedim(dim, 1)
    raise ValueError(
        f"y has the shape of the scores, {list(y.shape)}, and its rows are neither probabilities nor one-hot: for "
        "numbers the loss is lk.losses.mse, and where a row has several labels lk.losses.binary_cross_entropy"
    )


def classes_in_dim_1(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and classes as torch's losses take them: [n, C, ...] and [n, ...]. Raises `ValueError`."""
    if scores.ndim < 2 or y.is_complex():
        raise ValueError(ONE_NUMBER.format(list(scores.shape)))
    first = torch.Size((scores.shape[0], *scores.shape[2:]))
    if y.shape == (*scores.shape[:-1], 1) and y.shape != first:
        y = y.squeeze(-1)
    if y.shape != first and y.shape == scores.shape[:-1]:  # [n, t, C]
        scores = scores.movedim(-1, 1)
    elif y.shape != first:
        raise ValueError(
            f"scores {list(scores.shape)} and y {list(y.shape)} do not fit: one class a row, or a position"
        )
    if y.is_floating_point():
        if not torch.equal(y, y.round()):
            raise ValueError(
                "y: classes are whole numbers, and these are fractions; for numbers there is lk.losses.mse"
            )
        y = y.long()
    return scores, y if y.dtype in (torch.int64, torch.uint8) else y.long()


def alike(scores: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Both in one shape and type, where torch would pair [n, 1] and [n] each with each. Raises `ValueError`."""
    if scores.shape != y.shape:
        if scores.squeeze(-1).shape != y.squeeze(-1).shape:
            raise ValueError(f"{name}: outputs {list(scores.shape)} and y {list(y.shape)} have to have one shape")
        y = y.reshape(scores.shape)
    return scores, y.to(scores.dtype)


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
