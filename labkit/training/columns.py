"""Columns of a table as tensors: which columns are inputs, their numbers, and the classes of the labels.

Where a batch comes from: `datasets.load` has read the splits (`data_files`). What they hold is either used as it is
meant or refused with a `ValueError` that names the column, and the file and row where it is one row's fault.
"""

# Legend. n: rows; dim: numbers in a row.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labkit.suggest import did_you_mean
from labkit.training.data_files import Split, is_unnamed

INDEXES = ("index", "id", "idx")  # what people call an index of pandas, or a running number
SAMPLE = 1000  # rows by which a column of text is judged


def inputs(splits: Sequence[Split], label: str, wanted: Sequence[str] | None) -> tuple[list[str], list[Tensor]]:
    """The inputs: their columns, and for each split x: [n, dim] float32. The first split decides about the columns.

    Args:
        splits: The splits, the training rows first.
        label: The column of labels.
        wanted: The columns to use, or None: the images, or whatever is a number.

    Raises:
        ValueError: There are none, or one of them cannot be used.
    """
    from labkit.training.images import pixels

    train = splits[0]
    chosen = _named(train, label, wanted) if wanted is not None else _found(train, label)
    for split in splits[1:]:
        present = split.table.column_names
        missing = [name for name in chosen if name not in present]
        more = [] if wanted is not None else [
            name for name in present
            if name not in (*train.table.column_names, label) and kind_of(split, name) in ("number", "image")
            and not is_index(split, name)
        ]  # fmt: skip
        if missing or more:
            said = [f"no column {name!r}" for name in missing] + [f"a column {name!r} besides" for name in more]
            hint = "" if missing else f": remove it, or name those to use: columns={chosen!r}"
            raise ValueError(f"{train.dataset}: {split.files} has {' and '.join(said)}, unlike {train.files}{hint}")
        for name in chosen:
            kinds = kind_of(train, name), kind_of(split, name)
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"{train.dataset}: the column {name!r} holds {words(train, name)} in {train.files} and "
                    f"{words(split, name)} in {split.files}{_culprit(split, name) if kinds[0] == 'number' else ''}"
                )
    if kind_of(train, chosen[0]) == "image":
        return chosen, pixels(splits, chosen[0])
    tables = [[numbers(split, name) for name in chosen] for split in splits]
    for name, *columns in zip(chosen, *tables, strict=True):
        widths = [column.shape[1] for column in columns]
        if len(set(widths)) > 1:
            raise ValueError(
                f"{train.dataset}: a cell of the column {name!r} has {widths[0]} numbers in {train.files} and "
                f"{widths[1]} in {splits[1].files}"
            )
    return chosen, [torch.from_numpy(np.concatenate(table, axis=1)) for table in tables]


def left_out(train: Split, used: Sequence[str]) -> list[str]:
    """The columns that are not used, in words."""
    return [
        f"{name or 'a column without a name'} ({'an index' if is_index(train, name) else words(train, name)})"
        for name in train.table.column_names
        if name not in used
    ]


# ---------------------------------------------------------------- which columns


def kind_of(split: Split, name: str) -> str:
    """What a column holds: "image", "number" (or lists of equal length of them), "text", or "other"."""
    import pyarrow.types as types

    said, kind = split.kinds.get(name, {}).get("_type"), split.column(name).type
    if types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return "image" if said == "Image" or (said is None and _is_encoded_image(split, name)) else "other"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    while _is_list(kind):
        kind = kind.value_type
    return "number" if types.is_boolean(kind) or _is_number(kind) else "other"


def is_index(split: Split, name: str) -> bool:
    """Whether a column is the index of a table that pandas wrote, or a running number, and no property of its rows."""
    import pyarrow.types as types

    column = split.column(name)
    whole = types.is_integer(column.type)
    if is_unnamed(name):
        return whole or not _is_number(column.type)
    low = name.strip().lower()
    if not whole or not (low in INDEXES or low.startswith("level_")):
        return False
    return column.null_count == 0 and len(column.unique()) == len(column) > 1


def _found(train: Split, label: str) -> list[str]:
    """The columns that are inputs, where nobody has said which: the images, or all numbers."""
    others = [name for name in train.table.column_names if name != label and not is_index(train, name)]
    kinds = {name: kind_of(train, name) for name in others}
    images = [name for name in others if kinds[name] == "image"]
    if len(images) > 1:
        raise ValueError(
            f"{train.dataset}: {train.files} has several columns of images, {_listed(images)}: say which, such as "
            f"columns={images[:1]!r}"
        )
    if images:
        return images
    for name in others:
        if is_unnamed(name):
            raise ValueError(
                f"{train.dataset}: {train.files} has a column without a name that is no index, since it holds "
                f"{words(train, name)}: give it a name, or remove it"
            )
        if kinds[name] == "other":
            raise ValueError(
                f"{train.dataset}: the column {name!r} of {train.files} holds {words(train, name)}, and inputs are "
                f"numbers: make numbers of it, remove it, or name the columns to use: columns=[…]"
            )
        if kinds[name] == "text" and (culprit := _culprit(train, name)):
            raise ValueError(
                f"{train.dataset}: the column {name!r} holds numbers as text{culprit}: replace what is none "
                "and make numbers of the rest, or name the columns to use: columns=[…]"
            )
    if not (found := [name for name in others if kinds[name] == "number"]):
        raise ValueError(
            f"{train.dataset}: {train.files} has neither an image column nor columns of numbers besides the label "
            f"{label!r}; its columns are {_columns(train)}"
        )
    return found


def _named(train: Split, label: str, wanted: Sequence[str]) -> list[str]:
    """The columns that were asked for, if they can be used."""
    chosen = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in chosen:
        if name not in train.table.column_names:
            raise ValueError(f"{train.dataset}: {train.files} has no column {name!r}{_near(train, name)}")
        if name == label:
            raise ValueError(f"{train.dataset}: columns: {name!r} is the label, and no input")
        if chosen.count(name) > 1:
            raise ValueError(f"{train.dataset}: columns: {name!r} is there twice")
        if (kind := kind_of(train, name)) not in ("number", "image") or (kind == "image" and len(chosen) > 1):
            said = "images stand alone" if kind == "image" else f"it holds {words(train, name)}, and inputs are numbers"
            raise ValueError(f"{train.dataset}: columns: {name!r} cannot be an input: {said}")
    if not chosen:
        raise ValueError(f"{train.dataset}: columns=[]: name at least one, or leave it out")
    return chosen


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _columns(split: Split) -> str:
    return ", ".join(f"{name!r} ({words(split, name)})" for name in split.table.column_names)


def _near(split: Split, name: str) -> str:
    return did_you_mean(name, split.table.column_names) or f"; it has {_listed(split.table.column_names)}"


def words(split: Split, name: str) -> str:
    """What a column holds, in words."""
    import pyarrow.types as types

    kind = split.column(name).type
    said = {"number": "numbers", "image": "images", "text": "text"}.get(kind_of(split, name))
    if said is None:
        said = "no values" if types.is_null(kind) else "dates or times" if types.is_temporal(kind) else str(kind)
    return f"lists of {said}" if _is_list(kind) and said == "numbers" else said


def _is_number(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_encoded_image(split: Split, name: str) -> bool:
    """Whether the first value of bytes begins as an image does, or its file is called so."""
    from labkit.training.data_files import IMAGES

    for cell in split.column(name).drop_null()[:1].to_pylist():
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        marks = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"P5", b"P6")
        return (data or b"").startswith(marks) or str(path).lower().endswith(IMAGES)
    return False


def _culprit(split: Split, name: str) -> str:
    """Where the first value of a column of text is that is no number, if most of them are numbers. Else empty."""
    texts = [(row, text.strip()) for row, text in enumerate(split.column(name).to_pylist()) if text]
    sample = texts[:SAMPLE]
    if sum(_parses(text) for _, text in sample) * 2 < len(sample) or not sample:
        return ""
    row, text = next(((row, text) for row, text in texts if not _parses(text)), texts[0])
    return f", such as {text!r} in {split.where(row)}"


def _parses(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------- numbers


def numbers(split: Split, name: str) -> npt.NDArray[np.float32]:
    """One column of numbers, or of lists of equal length of them, as [n, dim]."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as types

    column, dim, row_of = split.column(name), 1, f"{split.dataset}: the column {name!r}"
    while True:
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(
                f"{row_of} has no value in {split.where(row // dim)} ({column.null_count} such values): fill them, or "
                "leave these rows out"
            )
        if isinstance(column.type, pa.BaseExtensionType):
            column = column.storage
        if not _is_list(column.type):
            break
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if (odd := np.flatnonzero(lengths != lengths[0])).size or lengths[0] == 0:
            row = int(odd[0]) if odd.size else 0
            raise ValueError(
                f"{row_of} has lists of different lengths, or empty ones, {lengths[row]} and {lengths[0]} numbers, "
                f"such as in {split.where(row // dim)}: make them equally long"
            )
        dim *= int(lengths[0])
        column = column.flatten()
    kind = column.type
    if types.is_decimal(kind):
        column = column.cast(pa.float64())
    values = column.to_numpy(zero_copy_only=False)  # [n * dim]
    with np.errstate(over="ignore"):
        small: npt.NDArray[np.float32] = values.astype(np.float32)
    if (bad := np.flatnonzero(~np.isfinite(small))).size:
        value = values[bad[0]]
        what = f"{value} (beyond float32)" if np.isfinite(value) else str(value)
        raise ValueError(
            f"{row_of} has the value {what} in {split.where(int(bad[0]) // dim)} ({bad.size} such values): "
            "replace them, or leave these rows out"
        )
    _check_precision(values, small, row_of, split)
    return small.reshape(-1, dim)


def _check_precision(values: npt.NDArray[Any], small: npt.NDArray[np.float32], row_of: str, split: Split) -> None:
    """Raises `ValueError` if values that differ are the same in float32: whole numbers, or half of the others."""
    if values.dtype.itemsize < 4 or values.dtype == np.float32 or np.abs(small).max(initial=0) <= 2**24:
        return
    before, after = len(np.unique(values)), len(np.unique(small))
    if after < (before if values.dtype.kind in "iu" else before / 2):
        raise ValueError(
            f"{row_of} of {split.files} has numbers up to {values.max()}, between which float32 cannot tell: subtract "
            "what they have in common, or remove it if it is an identifier"
        )
