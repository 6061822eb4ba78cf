"""Labels as classes: which column they are in, and a number from 0 on for each.

Where a batch comes from: `datasets.load` has read the splits (`data_files`), and asks here for their classes. Train and
test share the numbering.
"""

# Legend. n: rows.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.suggest import did_you_mean
from labkit.training.columns import kind_of, numbers, words
from labkit.training.data_files import Split

NAMES = ("label", "labels", "target", "targets", "class", "classes", "y", "category")  # what people call them


def label_column(split: Split, wanted: str | None) -> str:
    """The column of labels: the one that was asked for, `label`, or the only one that it can be.

    Raises:
        ValueError: There is none, or several may be it.
    """
    present: list[str] = split.table.column_names
    if wanted is not None:
        if wanted not in present:
            near = did_you_mean(wanted, present) or f"; its columns are {', '.join(map(repr, present))}"
            raise ValueError(f"{split.dataset}: {split.files} has no column {wanted!r}{near}")
        return wanted
    if "label" in present:
        return "label"
    classes = [name for name in present if split.kinds.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in present if name.strip().lower() in NAMES]
    begun = [name for name in present if name.lower().startswith(("label", "target"))]
    candidates = named or classes or begun
    if len(candidates) == 1:
        return candidates[0]
    columns = ", ".join(map(repr, present))
    if candidates:
        raise ValueError(
            f"{split.dataset}: {split.files} has no column 'label', and {', '.join(map(repr, candidates))} may be it: "
            f"say which, such as label={candidates[0]!r}"
        )
    header = ""
    if sum(name.strip().replace(".", "").isdecimal() for name in present) * 2 > len(present):
        header = " (if these are its first row: its first line should name the columns)"
    raise ValueError(
        f"{split.dataset}: {split.files} has no column 'label'; its columns are {columns}{header}: say which has the "
        "labels with label=…"
    )


def classes(splits: Sequence[Split], name: str) -> tuple[list[str], list[Tensor]]:
    """The classes: what each is called, and for each split y: [n] int64. The first split has all there are.

    Whole numbers stay as they are, if they count from 0 with no more gaps than classes. Others, and texts, are numbered
    in their order. A `ClassLabel` of `datasets` keeps its numbers and names.

    Raises:
        ValueError: A label is missing, no class, or only in another split than the first.
    """
    train, *others = splits
    for split in others:
        if name not in split.table.column_names:
            present = ", ".join(map(repr, split.table.column_names))
            raise ValueError(
                f"{split.dataset}: {split.files} has no column {name!r}, unlike {train.files}; it has {present}"
            )
    read = [_Labels(split, name) for split in splits]
    first = read[0]
    if first.names:
        known: dict[Any, int] = {value: number for number, value in enumerate(first.names)}
        found = [label.named(first.names) for label in read]
    else:
        texts = isinstance(first.values[0], str)
        found = [label.named(label.names) if texts else (label.values, label.inverse) for label in read]
        known = _numbered(first)
    y = []
    for split, (values, inverse) in zip(splits, found, strict=True):
        unseen = [value for value in values if value not in known]
        if unseen:
            rows = np.flatnonzero(inverse == values.index(unseen[0]))
            raise ValueError(
                f"{split.dataset}: the label {unseen[0]!r} in {split.where(int(rows[0]))} ({len(rows)} such rows) is "
                f"none of {train.files}, whose labels {name!r} are {_few(known)}"
                + (": -1 says that the labels were not published" if unseen[0] == -1 else "")
            )
        numbers_of = np.array([known[value] for value in values], dtype=np.int64)
        y.append(torch.from_numpy(numbers_of[inverse]))
    count = 1 + max(int(part.max()) for part in y)
    names = [str(number) for number in range(count)]
    for value, number in known.items():
        if number < count:
            names[number] = str(value)
    return names, y


def _numbered(labels: _Labels) -> dict[Any, int]:
    values = sorted(labels.values)
    if values == [-1]:
        raise ValueError(f"{labels.about} is -1 in every row, which says that there is no class")
    if isinstance(values[0], str):
        return {value: number for number, value in enumerate(values)}
    if values[0] == 0 and values[-1] < 2 * len(values):
        return {value: int(value) for value in values}
    return {value: number for number, value in enumerate(values)}


def _few(known: Sequence[Any] | dict[Any, int]) -> str:
    values = [repr(value) for value in known]
    return ", ".join(values if len(values) <= 10 else [*values[:9], "…", values[-1]])


class _Labels:
    """The labels of one split: its different values, in order, and for each row the place of its value among them."""

    def __init__(self, split: Split, name: str) -> None:
        import pyarrow.types as types

        self.split, self.name = split, name
        self.about = f"{split.dataset}: the label {name!r}"
        said = split.kinds.get(name, {})
        self.names: list[Any] = list(said.get("names") or []) if said.get("_type") == "ClassLabel" else []
        column = split.column(name)
        if column.null_count:
            self._refuse(
                column.is_null().to_numpy(zero_copy_only=False), "is missing", "fill it, or leave this row out"
            )
        kind = kind_of(split, name)
        if kind == "text":
            texts = np.asarray(column.to_pylist(), dtype=object)
            self._refuse(np.array([not text.strip() for text in texts]), "is empty", "fill it, or leave this row out")
            rows: list[Any] = [str(text) for text in texts]
        elif kind == "number" and (types.is_boolean(column.type) or types.is_integer(column.type)):
            rows = column.to_pylist()
        elif kind == "number" and (types.is_floating(column.type) or types.is_decimal(column.type)):
            values = column.to_numpy(zero_copy_only=False).astype(np.float64)
            self._refuse(np.isnan(values), "is missing (NaN)", "fill it, or leave this row out")
            whole = np.isfinite(values) & (values == np.floor(values))
            self._refuse(
                ~whole, "is {}", "classes are whole numbers or texts; for numbers to predict, make (x, y) tensors"
            )
            rows = [int(value) for value in values]
        elif kind == "number":
            rows = self._from_one_hot()
        else:
            raise ValueError(
                f"{self.about} of {split.files} holds {words(split, name)}: classes are whole numbers or texts"
            )
        if self.names:
            low, high = 0, len(self.names)
            bad = np.array([isinstance(row, str) or not low <= row < high for row in rows])
            self._refuse(
                bad, "is {}, no class (-1: not published)", f"it has to be one of the {high} from 0 to {high - 1}"
            )
        self.values: list[Any] = sorted(set(rows))
        place = {value: number for number, value in enumerate(self.values)}
        self.inverse = np.array([place[row] for row in rows], dtype=np.int64)  # [n]

    def named(self, names: Sequence[Any]) -> tuple[list[Any], Any]:
        """The same with the names of these classes in place of numbers."""
        if self.values and isinstance(self.values[0], str):
            return self.values, self.inverse
        own = self.names or names  # its own names of classes may have another order
        return [own[value] if 0 <= value < len(own) else value for value in self.values], self.inverse

    def _from_one_hot(self) -> list[int]:
        """The places of the 1 in rows of zeros."""
        table = numbers(self.split, self.name)  # [n, classes]
        bad = (np.sort(table, axis=1) != np.eye(table.shape[1])[-1]).any(axis=1)
        self._refuse(bad, "is {}, which is not one-hot,", "it should be all 0 and one 1")
        self.names = self.names or list(range(table.shape[1]))
        places: list[int] = table.argmax(axis=1).tolist()
        return places

    def _refuse(self, bad: Any, what: str, hint: str) -> None:
        rows = np.flatnonzero(bad)
        if rows.size:
            row = int(rows[0])
            value = self.split.column(self.name)[row].as_py()
            raise ValueError(
                f"{self.about} {what.format(value)} in {self.split.where(row)} ({rows.size} such rows): {hint}"
            )
