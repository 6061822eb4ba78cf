"""Data sets to train on: digits (part of scikit-learn), MNIST and others through `datasets` (the hub, or local files).

A batch begins here: `batches` draws it, and a trainer takes it. Files are read in `data_files`, their columns become
tensors in `columns`, `images` and `labels`; text is read in `text`. scikit-learn, `datasets` and PIL are imported
when a data set is asked for and not before, so that `import labkit` stays quick.
"""

# Legend. n: rows; dim: numbers in a row (an image's pixels in row-major order, channels last).

from __future__ import annotations

import gzip
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from labkit.paths import user_path
from labkit.suggest import suggest_options
from labkit.training.columns import inputs, left_out
from labkit.training.data_files import SPLITS, Split, is_path, read_splits
from labkit.training.hub import from_hub
from labkit.training.labels import classes, label_column
from labkit.training.text import TEXTS, TextData, load_text


@dataclass(frozen=True, eq=False)
class ClassificationData:
    """Rows of numbers and their classes, for training and for testing; what `lk.load` returns.

    Args:
        name: Name of the data set.
        train_x: Rows for training, [n, dim] float32.
        train_y: Their classes, [n] int64, each from 0 to `classes` - 1.
        test_x: Rows for testing, [n, dim] float32.
        test_y: Their classes, [n] int64.
        classes: Number of classes.
        labels: What each class was called, in the order of their numbers.
        columns: The columns that the rows are made of, in order.
        left_out: The columns that are no inputs, each with the reason.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """Numbers in a row."""
        return self.train_x.shape[1]

    def __repr__(self) -> str:
        sizes = f"{len(self.train_x)} + {len(self.test_x)} rows of {self.dim}"
        unused = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"ClassificationData({self.name!r}, {sizes}, {self.classes} classes{unused})"


@overload
def load(  # type: ignore[overload-overlap]  # "text" is a str, too, and comes first
    dataset: Literal["text"], data_dir: str | Path | None = None, *, columns: Sequence[str] | None = None,
    test_share: float | None = None, tokens: Any = None, context: int | None = None, windows: str | None = None,
    splits: Sequence[str] | None = None, subset: str | None = None,
) -> TextData: ...  # fmt: skip
@overload
def load(
    dataset: str | Path = "digits", data_dir: str | Path | None = None, *, seed: int = 0, label: str | None = None,
    columns: Sequence[str] | None = None, test_share: float | None = None,
) -> ClassificationData: ...  # fmt: skip
@suggest_options
def load(
    dataset: str | Path = "digits", data_dir: str | Path | None = None, *, seed: int = 0, label: str | None = None,
    columns: Sequence[str] | None = None, test_share: float | None = None, tokens: Any = None,
    context: int | None = None, windows: str | None = None, splits: Sequence[str] | None = None,
    subset: str | None = None,
) -> ClassificationData | TextData:  # fmt: skip
    """Load a data set: "digits", which needs no download, "mnist", "text", or a name on the hub.

    Its inputs are a column of images, whose pixels become 0 to 1, or columns of numbers,
    which stay as they are. Its labels are whole numbers, texts, or one-hot rows. Text, and
    the index of a pandas table, are no inputs; `left_out` tells. What cannot be used as it is
    meant is refused, with the column, the file and the row (counted from 0). "digits" is
    split here and standardised.

    "text" is text for a language model: `data_dir` is a file, a folder or a name on the hub,
    and the last five arguments are its own. It is cut into windows, whose y are the tokens
    one position later. Texts called `train` and `valid` (or `test`) are the two splits; of
    one text the end is for testing. Without `data_dir` it is the reference of the language
    that comes with Python, so nothing is downloaded.

    Example:
        data = lk.load("digits")
        run = lk.fit(model, data, epochs=5)
        lk.evaluate(model, data.test_x, data.test_y)

        flowers = lk.load("data/iris.csv", label="species", test_share=0.2)
        plays = lk.load("text", "plays.txt", context=64)
        plays.vocab_size, plays.decode(plays.train[:100])

    Args:
        dataset: Name of the data set, or a path, which is what `data_dir` may be. Default
            "digits".
        data_dir: A folder with `train` and `test` as parquet, csv, json or arrow files
            (`train.csv`, `test-0.parquet`), or as folders that hold a folder of images for
            each class; what `save_to_disk` of `datasets` leaves; a folder with a folder of
            the data set's name that has them; or one file. Then nothing is downloaded.
            Default None: from the hub, or from what was downloaded before. For "text" a
            file, a folder of texts (`train.txt`, `wiki.valid.tokens`), such tables, or a
            name on the hub.
        seed: For the split of "digits", and of `test_share`. Default 0.
        label: The column of labels. Default None: `label`, or the only one it can be.
        columns: The columns that are inputs, in order. Default None: the images, or all
            columns of numbers. For "text", the one that holds it, where it is in a table.
        test_share: The share of rows to hold out for testing, such as 0.2, of a data set that
            is not split. Default None: such a data set is refused; of a text, 0.1 at its end.
        tokens: "characters" (default), "bytes", or a tokenizer of `tokenizers` or
            `transformers`, or any with `encode` and `decode`.
        context: Positions of a window. Default 64.
        windows: Where the training windows of an epoch begin: "random" (default), anywhere,
            or "consecutive", one after the other, in a new order each epoch.
        splits: The names of the text to train on and of the one to test on. Default None:
            "train", and the one for validation or testing; without "train" those two.
        subset: Which configuration of a data set on the hub, if it has several.

    Returns:
        For "text" an object with `train` and `test`, [tokens], `vocab`, `vocab_size`,
        `encode`, `decode`, and all windows as `train_x`, `train_y`, `test_x` and `test_y`,
        [windows, context] int64. Else one with the rows `train_x` and `test_x`, [n, dim]
        float32, their classes `train_y` and `test_y`, [n] int64, the numbers `dim` and
        `classes`, and the names `labels` and `columns`.

    Raises:
        DataNotFound: The data set is not there, and cannot be downloaded. This comes within
            seconds.
        ValueError: The data set is of another form. It says what is wrong with which column.
    """
    of_text = {"tokens": tokens, "context": context, "windows": windows, "splits": splits, "subset": subset}
    if isinstance(dataset, str) and dataset == "text":
        if label is not None:
            raise ValueError("lk.load('text'): the y of text are its own next tokens: leave label out")
        return load_text(data_dir, columns=columns, test_share=test_share, **of_text)
    if given := [name for name, value in of_text.items() if value is not None]:
        raise ValueError(f"{', '.join(given)}: for text only, lk.load('text', {str(dataset)!r}, {given[0]}=…)")
    if str(dataset).lower().endswith(TEXTS):
        raise ValueError(f"lk.load({str(dataset)!r}): a text is loaded with lk.load('text', {str(dataset)!r})")
    from_path = isinstance(dataset, Path) or (isinstance(dataset, str) and is_path(dataset))
    if from_path:
        if data_dir is not None:
            raise ValueError(f"lk.load({str(dataset)!r}, {str(data_dir)!r}): one path, or a name and a path")
        dataset, data_dir = Path(dataset).name.split(".")[0] or str(dataset), dataset
    if not isinstance(dataset, str):
        raise ValueError(f"lk.load({dataset!r}): the name of a data set, such as 'digits', or a path")
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise ValueError(f"seed={seed!r}: a whole number")
    if dataset == "digits" and not from_path:
        if data_dir is not None or columns is not None or label is not None or test_share is not None:
            raise ValueError(
                "digits is part of scikit-learn, reads no files, and is split already: leave data_dir, label, columns "
                "and test_share out, or name another"
            )
        return _digits(seed)
    splits = (
        splits_of(*from_hub(dataset)) if data_dir is None else read_splits(dataset, user_path(data_dir, "data_dir"))
    )
    train, test = splits["train"], splits.get("test")
    if test is not None and test_share is not None:
        raise ValueError(f"{dataset} has rows for testing already ({test.files}): leave test_share out")
    if test is None and test_share is None:
        raise ValueError(
            f"{dataset} has {len(train)} rows for training ({train.files}) and none for testing: add them as "
            "test.csv or the like, or hold out a fifth of these with test_share=0.2"
        )
    parts = [train] if test is None else [train, test]
    label = label_column(train, label)
    names, y = classes(parts, label)
    used, x = inputs(parts, label, columns)
    if test is None:
        x, y = _hold_out(dataset, x[0], y[0], float(test_share or 0), seed)
    unused = left_out(train, [*used, label])
    return ClassificationData(
        dataset, x[0], y[0], x[1], y[1], len(names), labels=tuple(names), columns=tuple(used), left_out=tuple(unused)
    )


def batches(
    x: Tensor, y: Tensor, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches without end, epoch after epoch. Each epoch visits every row once; its last batch holds what is left.

    Args:
        x: [n, dim].
        y: [n].
        batch_size: Rows of a batch, at least 1.
        generator: Draws the order of the rows; the same seed gives the same batches.

    Raises:
        ValueError: `batch_size` is under 1, there are no rows, or `x` and `y` have different lengths.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x has {len(x)} rows and y has {len(y)}: batches need as many of each, and at least one")
    return _epochs(x, y, batch_size, generator)


def _epochs(
    x: Tensor, y: Tensor, batch_size: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        order = torch.randperm(len(x), generator=generator)  # [n]
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]  # [batch]
            yield x[rows], y[rows]  # [batch, dim], [batch]


# ---------------------------------------------------------------- where rows come from


def _digits(seed: int) -> ClassificationData:
    """1,797 handwritten digits of 8 x 8 pixels, a fifth of them for testing, standardised by the training rows."""
    x, y = _read_digits()
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    test = torch.zeros(len(rows), dtype=torch.bool)
    test[y[rows].argsort(stable=True)[::5]] = True  # each fifth of each class
    train_x, test_x = x[rows[~test]], x[rows[test]]
    # Some pixels are (nearly) always white: a floor of one grey level keeps a rare stroke there from dwarfing the rest.
    mean, scale = train_x.mean(0), train_x.std(0).clamp_min(1 / 16)  # [dim], [dim]
    train_x, test_x = (train_x - mean) / scale, (test_x - mean) / scale
    return ClassificationData("digits", train_x, y[rows[~test]], test_x, y[rows[test]], 10, labels=tuple("0123456789"))


def _read_digits() -> tuple[Tensor, Tensor]:
    """Pixels [n, dim], from 0 to 1, and classes [n].

    They are read from scikit-learn's own file. It takes seconds to import, and so it is imported only if the file is
    not where it should be.
    """
    try:
        file = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        with gzip.open(str(file)) as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
        x, y = table[:, :-1], table[:, -1]
    except (OSError, metadata.PackageNotFoundError):
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)


def _hold_out(dataset: str, x: Tensor, y: Tensor, share: float, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Split rows at random, the same share of each class as far as that goes: those for training, those for testing."""
    if not 0 < share < 1:
        raise ValueError(f"test_share={share}: a share of the rows, between 0 and 1, such as 0.2")
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    by_class = rows[y[rows].argsort(stable=True)]
    before = (torch.arange(len(rows), dtype=torch.float64) * share + 0.5).floor()
    held = (torch.arange(1, len(rows) + 1, dtype=torch.float64) * share + 0.5).floor() > before  # evenly spread
    train, test = by_class[~held].sort().values, by_class[held].sort().values
    if not (len(train) and len(test)):
        raise ValueError(f"{dataset}: test_share={share} of {len(y)} rows leaves none for training or for testing")
    return [x[train], x[test]], [y[train], y[test]]


def splits_of(name: str, loaded: Mapping[str, Any]) -> dict[str, Split]:
    """The splits of a `datasets.DatasetDict`: "train", and "test" if it has that, or one for validation."""
    import datasets

    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    if "train" not in loaded:
        raise ValueError(f"{name} has the splits {', '.join(loaded)}; labkit needs train, and test or validation")
    test = next((split for split in SPLITS["test"] if split in loaded and not _is_secret(loaded[split])), None)
    found = {}
    for split, source in {"train": "train", **({"test": test} if test else {})}.items():
        rows = loaded[source]
        if len(rows) == 0:
            raise ValueError(f"{name}: there are no rows in the split {source}")
        # As they are stored: images are decoded later, one by one.
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        found[split] = Split(name, source, rows.with_format("arrow")[:], rows.features.to_dict())
    return found


def _is_secret(rows: Any) -> bool:
    """Whether the labels of a split were not published, as is the custom of competitions: all are -1."""
    return len(rows) > 0 and "label" in rows.features and set(rows.unique("label")) == {-1}
