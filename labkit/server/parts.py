"""A pass in parts of bounded size: cut, and put together as if there had been one. Plain functions of tensors.

On a batch's way: `server/backend` computes a request that has more rows than `max_batch_size` part by part.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from labkit.server.validation import HALF_PRECISION, describe, schema_of

T = TypeVar("T")
Parts = Sequence[Sequence[Tensor]]  # the tensors of each part, [rows of the part, ...]


def cut(tensors: Sequence[Tensor], most: int) -> Parts:
    """Tensors [rows, ...] in parts of at most `most` rows, equal within one row. Nothing is copied."""
    rows = tensors[0].shape[0]
    count = -(-rows // most)
    if count == 1:
        return [tensors]
    ends = [rows * i // count for i in range(count + 1)]
    return [[t[start:end] for t in tensors] for start, end in pairwise(ends)]


def together(answers: list[list[Tensor]]) -> list[Tensor]:
    """The tensors of all parts as if there had been one. Raises `TypeError` if they do not fit together."""
    if len(answers) == 1:
        return answers[0]
    schemas = {schema_of(tensors) for tensors in answers}
    if len(schemas) > 1:
        raise TypeError(f"an expert's outputs differ in more than rows: {' or '.join(map(describe, schemas))}")
    return [torch.cat(column) for column in zip(*answers, strict=True)]


def add_gradients(total: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    """Add gradients, by name, to those of other parts; in float32 if they are of half precision."""
    for name, grad in grads.items():
        if name in total:
            total[name].add_(grad)
        else:  # a copy, since autograd may give one tensor for several parameters
            wide = torch.float32 if grad.dtype in HALF_PRECISION else grad.dtype
            total[name] = grad.to(wide, copy=True)


def finish(parts: Generator[None, None, T]) -> T:
    """The result of what is computed with pauses, without any."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            result: T = end.value
            return result
