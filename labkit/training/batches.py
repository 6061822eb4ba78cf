"""The batches of a run, made from data in any of several forms.

Where a batch comes from: a trainer takes the next one here, under the lock of its run.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from labkit.training.datasets import ClassificationData, batches

Batch = tuple[Tensor, Tensor]


def stream(data: Any, batch_size: int, seed: int) -> tuple[int | None, Generator[Batch, None, None]]:
    """Turn data into batches without end.

    Args:
        data: `(x, y)` tensors, a `ClassificationData` (its training part), a torch `Dataset` of pairs, or any iterable
            of batches `(x, y)`, such as a `DataLoader`, which is gone through again and again.
        batch_size: Rows of a batch, where the data are not batches already.
        seed: The same one gives the same batches, except where an iterable of the caller's decides.

    Returns:
        How many batches an epoch has, None if that is not known, and the batches.

    Raises:
        ValueError: The data have none of these forms, or there are none.
    """
    if isinstance(data, ClassificationData):
        data = (data.train_x, data.train_y)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        x, y = data
        return math.ceil(len(x) / batch_size), _pairs(batches(x, y, batch_size, generator))
    if _is_misfit(data):
        raise ValueError(
            f"data={type(data).__name__}: (x, y) as two torch tensors (torch.from_numpy makes one of an array), what "
            "lk.load(name) returns, a Dataset, or an iterable of batches"
        )
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size, shuffle=not isinstance(data, IterableDataset), generator=generator)
    if not isinstance(data, Iterable):
        raise ValueError(f"data: (x, y) tensors, a Dataset, or an iterable of batches, not {type(data).__name__}")
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        return None, _pairs(_repeat(data))
    if length == 0:
        raise ValueError("data: there are no batches in it")
    return length, _pairs(_repeat(data))


def _is_misfit(data: Any) -> bool:
    """Whether this could be iterated over, but surely is not data: a name, one tensor, a pair of arrays."""
    if isinstance(data, (tuple, list)):
        return len(data) == 2 and not any(isinstance(part, (Tensor, tuple, list)) for part in data)
    return isinstance(data, (str, bytes, Mapping, Tensor))


def _repeat(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError("data: there are no more batches in it; a generator, which can be used once, has to last")


def _pairs(found: Iterable[Any]) -> Generator[Batch, None, None]:
    for batch in found:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            what = f"{len(batch)} things" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
            raise ValueError(f"data: a batch is a pair (x, y), not {what}")
        yield batch[0], batch[1]
