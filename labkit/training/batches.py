"""The batches of a run, made from data in any of several forms, and the place in them that a run has reached.

Where a batch comes from: a trainer takes the next one from a `Stream`, under the lock of its run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from labkit.training.datasets import ClassificationData
from labkit.training.text import TextData

FORMS = (
    "(x, y) as two torch tensors or numpy arrays, (x1, x2, y) with several inputs, a dictionary of them, tokens [rows, "
    "positions], what lk.load(name) returns, a Dataset, or an iterable of batches, such as a DataLoader"
)
TARGETS = ("labels", "label", "targets", "target", "y")  # where a batch that is a dictionary keeps its y
MAX_LISTED = 8  # inputs whose numbers of rows an error lists
_END = object()


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model is called with, `model(*inputs, **keywords)`, and what its outputs are compared with.

    Args:
        inputs: The positional inputs.
        keywords: The inputs by keyword.
        target: Y; None if there is none.
        rows: How many rows it has.
        by_position: Whether y is a class for each position, so that scores are [rows, positions, classes] for sure.
    """

    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any]
    target: Any
    rows: int
    by_position: bool = False


def batch_of(raw: Any) -> Batch:
    """Take apart what a loop over a `DataLoader` gets.

    1. A tuple or list: the last part is y, and the others are inputs; a single part is both.
    2. A dictionary: keywords. Y is one of them, called as in `TARGETS`; the model gets it too if it takes it.
    3. A tensor: input and y, as for a language model. Any other object: an input, whose `y` is y.

    Raises:
        ValueError: It is one row, or nothing that a model could take.
    """
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):  # 2
        target = next((raw[name] for name in TARGETS if raw.get(name) is not None), None)
        return Batch((), dict(raw), target, rows_of(raw) or 1)
    if isinstance(raw, (tuple, list)) and not isinstance(raw, PackedSequence):  # 1
        if not raw:
            raise ValueError("data: a batch is empty")
        *inputs, target = (raw[0], raw[0]) if len(raw) == 1 else raw
        if isinstance(target, (int, float)):
            raise ValueError(
                "data: this is a row and no batch, since its y is a number and not a tensor; a DataLoader makes "
                "batches of rows"
            )
        rows = rows_of(inputs)
        return Batch(tuple(inputs), {}, target, rows_of(target) or 1 if rows is None else rows)
    if raw is None or isinstance(raw, (str, bytes, int, float)):
        raise ValueError(f"data: a batch is (x, y), a dictionary or a tensor, not a {type(raw).__name__}")
    target = raw if isinstance(raw, Tensor) else getattr(raw, "y", None)  # 3
    return Batch((raw,), {}, target, rows_of(raw) or 1)


def rows_of(value: Any) -> int | None:
    """How many rows are in the first tensor, array or list of numbers of a batch; None if there is none."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, (Tensor, np.ndarray)):
        return len(value) if value.ndim else 1
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        found = (rows_of(part) for part in value)
        return next((rows for rows in found if rows is not None), None)
    graphs = getattr(value, "num_graphs", None)
    return graphs if isinstance(graphs, int) else None


def moved(value: Any, device: torch.device) -> Any:
    """The same batch on a device; arrays become tensors."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, np.ndarray):
        return tensor_of(value).to(device)
    if isinstance(value, Mapping):
        named = {name: moved(part, device) for name, part in value.items()}
        return value if all(named[name] is part for name, part in value.items()) else named
    if isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence):
        parts = [moved(part, device) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value.to(device) if hasattr(value, "to") else value


def tensor_of(array: Any) -> Tensor:
    """An array as a tensor; float64, which is numpy's habit, becomes torch's default type. Raises `ValueError`."""
    if isinstance(array, Tensor):
        return array
    numbers = np.asarray(array)
    if numbers.dtype.kind not in "biuf":
        texts = [value for value in numbers.reshape(-1)[:1000].tolist() if isinstance(value, (str, bytes))]
        such = f", such as {texts[0]!r}: number classes with numpy.unique(y, return_inverse=True)[1]" if texts else ""
        what = "texts" if texts else f"an array of {numbers.dtype}"
        raise ValueError(f"data: {what} cannot become a tensor; numbers are needed{such}")
    tensor = torch.from_numpy(
        np.array(numbers, copy=not numbers.flags.writeable or min(numbers.strides, default=0) < 0)
    )
    if tensor.is_floating_point():
        return tensor.to(torch.get_default_dtype())
    return tensor.long() if numbers.dtype.kind in "iu" and numbers.itemsize > 1 else tensor


# ---------------------------------------------------------------- epochs


@dataclass(frozen=True)
class Source:
    """Data as epochs of batches.

    Args:
        epoch: Begins an epoch, after so many of its batches.
        length: Batches in an epoch; None if that is not known.
        generators: The random generators that decide what an epoch looks like, besides torch's global one.
    """

    epoch: Callable[[int], Iterator[Any]]
    length: int | None
    generators: tuple[torch.Generator, ...] = ()


def source_of(data: Any, batch_size: int, *, seed: int | None) -> Source:
    """Find out which form data have.

    Args:
        data: One of `FORMS`.
        batch_size: Rows of a batch, where the data are not batches already.
        seed: Of the order of the rows; None for the order that they have.

    Raises:
        ValueError: The data have none of these forms, or there are none.
    """
    if isinstance(data, ClassificationData):
        data = (data.train_x, data.train_y) if seed is not None else (data.test_x, data.test_y)
    generator = torch.Generator().manual_seed(seed or 0)
    if isinstance(data, TextData):
        return _of_text(data, batch_size, None if seed is None else generator)
    if isinstance(data, (tuple, list)) and len(data) >= 2 and all(_is_array(part) for part in data):
        return _of_tensors([tensor_of(part) for part in data], tuple, batch_size, None if seed is None else generator)
    if isinstance(data, Mapping) and data and all(map(_is_array, data.values())):
        names = list(data)
        parts = [tensor_of(part) for part in data.values()]
        return _of_tensors(
            parts, lambda rows: dict(zip(names, rows, strict=True)), batch_size, None if seed is None else generator
        )
    if isinstance(data, (Tensor, np.ndarray)) and _are_tokens(data):
        return _of_tensors([tensor_of(data)], tuple, batch_size, None if seed is None else generator)
    if _is_misfit(data):
        raise ValueError(f"data={type(data).__name__}: give {FORMS}")
    if isinstance(data, Dataset) or _is_map_style(data):
        shuffle = seed is not None and not isinstance(data, IterableDataset)
        data = DataLoader(data, batch_size, shuffle=shuffle, generator=generator)
    if not isinstance(data, Iterable):
        raise ValueError(f"data: {FORMS}; not {type(data).__name__}")
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        length = None
    if length == 0:
        raise ValueError("data: there are no batches in it")

    def epoch(skip: int) -> Iterator[Any]:
        batches = iter(data)
        for _ in islice(batches, skip):
            pass
        return batches

    return Source(epoch, length, _generators(data))


def _of_tensors(
    parts: Sequence[Tensor], form: Callable[[Iterator[Tensor]], Any], batch_size: int,
    generator: torch.Generator | None,
) -> Source:  # fmt: skip
    n = len(parts[0]) if parts[0].ndim else 0
    if n == 0 or any(part.ndim == 0 or len(part) != n for part in parts):
        *x, y = (f"{len(part)} rows" if part.ndim else "no rows" for part in parts)
        if len(x) > MAX_LISTED:
            raise ValueError(
                f"data: {len(parts)} tensors, of {x[0]}, {x[1]}, …: these would be inputs and y, with as many rows of "
                "each. Sequences of different lengths are put together in a DataLoader, whose collate_fn pads them"
            )
        raise ValueError(f"x has {', '.join(x)} and y has {y.removesuffix(' rows')}: as many of each, and at least one")

    def epoch(skip: int) -> Iterator[Any]:
        order = None if generator is None else torch.randperm(n, generator=generator)  # [n]
        return cut(order, skip)

    def cut(order: Tensor | None, skip: int) -> Iterator[Any]:
        for start in range(skip * batch_size, n, batch_size):
            rows = slice(start, start + batch_size) if order is None else order[start : start + batch_size]  # [batch]
            yield form(part[rows] for part in parts)

    return Source(epoch, math.ceil(n / batch_size), () if generator is None else (generator,))


def _of_text(data: TextData, batch_size: int, generator: torch.Generator | None) -> Source:
    def epoch(skip: int) -> Iterator[Any]:
        return cut(data.starts(generator), skip)  # [n]

    def cut(starts: Tensor, skip: int) -> Iterator[Any]:
        for start in range(skip * batch_size, len(starts), batch_size):
            x, y = data.window(starts[start : start + batch_size], testing=generator is None)
            yield Batch((x,), {}, y, len(x), by_position=True)

    n = (len(data.test if generator is None else data.train) - 1) // data.context
    return Source(epoch, math.ceil(n / batch_size), () if generator is None else (generator,))


def _is_array(part: Any) -> bool:
    return isinstance(part, (Tensor, np.ndarray)) or (hasattr(part, "__array__") and hasattr(part, "to_numpy"))


def _are_tokens(data: Any) -> bool:
    """Whether one tensor or array is all data, input and y: rows of whole numbers, as a language model takes them."""
    return data.ndim == 2 and data.dtype in (torch.int32, torch.int64, np.int32, np.int64)


def _is_map_style(data: Any) -> bool:
    """Whether these are rows to be put together by a `DataLoader`: a table of the hub, or a class without a base."""
    rows = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (tuple, list, DataLoader))
    return rows and (hasattr(data, "column_names") or not hasattr(data, "__iter__"))


def _is_misfit(data: Any) -> bool:
    """Whether this could be iterated over, but surely is not data: a name, one tensor or table, a pair of numbers."""
    if isinstance(data, (tuple, list)):
        batches = [isinstance(part, (Tensor, np.ndarray, tuple, list, Mapping)) for part in data]
        numbers = any(map(_is_numbers, data))
        return len(data) == 2 and (not all(batches) or sum(map(_is_array, data)) == 1 or numbers)
    return isinstance(data, (str, bytes, Mapping)) or _is_array(data)


def _is_numbers(part: Any) -> bool:
    """Whether this is a list of numbers, or of lists of them, which is to be a tensor."""
    while isinstance(part, (tuple, list)) and part:
        part = part[0]
    return isinstance(part, (int, float))


def _generators(data: Any) -> tuple[torch.Generator, ...]:
    """Those of a `DataLoader` and its samplers."""
    sampler, inner = getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None)
    found = [getattr(owner, "generator", None) for owner in (data, sampler, inner)]
    return tuple({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


class Stream:
    """Batches without end, epoch after epoch, and how far they have been taken.

    Args:
        data: One of `FORMS`. An iterable is gone through again and again.
        batch_size: Rows of a batch, where the data are not batches already.
        seed: The same one gives the same batches, except where an iterable of the caller's decides.

    Attributes:
        data: What was given.
        length: How many batches an epoch has, None if that is not known.

    Raises:
        ValueError: The data have none of these forms, or there are none.
    """

    def __init__(self, data: Any, batch_size: int, seed: int) -> None:
        self.data = data
        self._source = source_of(data, batch_size, seed=seed)
        self.length = self._source.length
        self._epoch = 0
        self._taken = 0  # batches of this epoch
        self._batches: Iterator[Any] | None = None  # of this epoch, once it has begun
        self._waiting: list[Batch] = []  # looked at and not taken
        self._began: dict[str, Any] | None = None  # what `_random` was when this epoch began
        self._error: Exception | None = None  # why there are no more: an iterator that has failed once is at its end

    def _random(self) -> dict[str, Any]:
        """The state of everything that an epoch's order may depend on."""
        return {"torch": torch.get_rng_state(), "own": [one.get_state() for one in self._source.generators]}

    def peek(self) -> Batch:
        """The next batch, which stays the next one. Raises `ValueError` as `next` does."""
        if not self._waiting:
            self._waiting.append(self._draw())
        return self._waiting[0]

    def next(self) -> Batch:
        """Take the next batch. Raises `ValueError` where there is none, or it is no batch."""
        batch = self._waiting.pop() if self._waiting else self._draw()
        self._taken += 1
        return batch

    def _draw(self) -> Batch:
        if self._error is not None:
            raise self._error
        try:
            return self._from_source()
        except Exception as error:
            self._error = error
            raise

    def _from_source(self) -> Batch:
        for _ in range(2):
            if self._batches is None:
                self._began = self._random()
                self._batches = self._source.epoch(0)
            raw = next(self._batches, _END)
            if raw is not _END:
                return batch_of(raw)
            if self._taken == 0:
                break
            self._batches, self._began, self._epoch, self._taken = None, None, self._epoch + 1, 0
        raise ValueError("data: there are no more batches in it; a generator, which can be used once, has to last")

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, as plain numbers and tensors."""
        begun = self._began is not None
        place = {"epoch": self._epoch, "taken": self._taken, "begun": begun, "length": self.length}
        return {**place, **(self._began or self._random())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place in the same data. An iterable is begun anew, and its batches up to there are skipped.

        Raises:
            ValueError: These are other data, as far as can be seen: they have another length, or other generators.
        """
        if state["length"] != self.length:
            before, now = (what or "an unknown number of" for what in (state["length"], self.length))
            raise ValueError(
                f"data: these have {now} batches an epoch, and those of the run that was saved had {before}; give the "
                "same data"
            )
        if len(state["own"]) != len(self._source.generators):
            raise ValueError("data: these are shuffled in another way than those of the run that was saved")
        for generator, saved in zip(self._source.generators, state["own"], strict=True):
            generator.set_state(saved)
        self._epoch, self._taken = state["epoch"], state["taken"]
        if not state["begun"]:
            return
        now = torch.get_rng_state()
        torch.set_rng_state(state["torch"])
        try:
            self._began = self._random()
            self._batches = self._source.epoch(self._taken)
        finally:
            torch.set_rng_state(now)

    def close(self) -> None:
        """End the epoch: a `DataLoader` may have processes."""
        batches, self._batches = self._batches, None
        close = getattr(batches, "close", None)
        if batches is not self.data and close is not None:
            close()


def one_pass(data: Any, batch_size: int) -> Iterator[Batch]:
    """The batches of one epoch, in the order that the data have; of `lk.load`'s data, those for testing.

    Raises:
        ValueError: The data have none of the forms, or there are none.
    """
    source, seen = source_of(data, batch_size, seed=None), False
    for raw in source.epoch(0):
        seen = True
        yield batch_of(raw)
    if not seen:
        raise ValueError("data: there are no batches in it; a generator can be gone through only once")
