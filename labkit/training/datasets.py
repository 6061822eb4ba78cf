"""Data sets to train on: digits (part of scikit-learn), MNIST and others through `datasets` (the hub, or local files).

A batch begins here: `batches` draws it, and a trainer takes it. scikit-learn, `datasets` and PIL are imported
when a data set is asked for and not before, so that `import labkit` stays quick.
"""

# Legend. n: rows; dim: numbers in a row (an image's pixels in row-major order, channels last).

from __future__ import annotations

import difflib
import glob
import gzip
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.errors import DataNotFound
from labkit.paths import user_path

HUB_NAMES = {"mnist": "ylecun/mnist"}  # short names of ours
HUB_TIMEOUT = 5.0  # seconds until the hub counts as out of reach


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
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def dim(self) -> int:
        """Numbers in a row."""
        return self.train_x.shape[1]

    def __repr__(self) -> str:
        sizes = f"{len(self.train_x)} + {len(self.test_x)} rows of {self.dim}"
        return f"ClassificationData({self.name!r}, {sizes}, {self.classes} classes)"


def load(dataset: str = "digits", data_dir: str | Path | None = None, *, seed: int = 0) -> ClassificationData:
    """Load a data set: "digits", which needs no download, "mnist", or a name on the hub.

    A data set has a `label` column and either an image column, whose pixels become 0 to 1, or
    columns of numbers, which stay as they are. It comes in two parts, for training and
    testing. "digits" is split here and standardised.

    Example:
        data = lk.load("digits")
        run = lk.fit(model, data, epochs=5)
        lk.evaluate(model, data.test_x, data.test_y)

    Args:
        dataset: Name of the data set. Default "digits".
        data_dir: A folder with `train-*.parquet` and `test-*.parquet`, or with a folder of
            the data set's name that has them. Then nothing is downloaded. Default None: from
            the hub, or from what was downloaded before.
        seed: For the split of "digits". Default 0.

    Returns:
        An object with the rows `train_x` and `test_x`, [n, dim] float32, their classes
            `train_y` and
        `test_y`, [n] int64, and the numbers `dim` and `classes`.

    Raises:
        DataNotFound: The data set is not there, and cannot be downloaded. This comes within
            seconds.
        ValueError: The data set is of another form.
    """
    if dataset == "digits":
        if data_dir is not None:
            raise ValueError("digits is part of scikit-learn and reads no files: leave data_dir out, or name another")
        return _digits(seed)
    splits = _from_hub(dataset) if data_dir is None else _from_files(dataset, user_path(data_dir, "data_dir"))
    with splits as (train, test):
        train_x, train_y = _tensors(train, dataset)
        test_x, test_y = _tensors(test, dataset)
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"{dataset}: train rows have {train_x.shape[1]} numbers, test rows {test_x.shape[1]}")
    classes = 1 + max(int(train_y.max()), int(test_y.max()))
    return ClassificationData(dataset, train_x, train_y, test_x, test_y, classes)


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
    return ClassificationData("digits", train_x, y[rows[~test]], test_x, y[rows[test]], 10)


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


@contextmanager
def _from_files(dataset: str, root: Path) -> Iterator[tuple[Any, Any]]:
    """The train and test split in parquet files under `root`, valid inside the `with` block."""
    for folder in (root, root / dataset):
        found = {split: sorted(map(str, folder.glob(f"{split}-*.parquet"))) for split in ("train", "test")}
        if all(found.values()):
            break
    else:
        looked = f"neither {root} nor {root / dataset} has both" if root.is_dir() else f"there is no folder {root} with"
        raise DataNotFound(f"no {dataset} here: {looked} train-*.parquet and test-*.parquet")

    import datasets

    # `datasets` unpacks parquet into a cache. That takes less than a second, so the cache need not outlive this.
    with tempfile.TemporaryDirectory(prefix="labkit-data-", ignore_cleanup_errors=True) as cache, _no_progress_bars():
        try:
            patterns = {split: [glob.escape(file) for file in files] for split, files in found.items()}
            loaded = datasets.load_dataset("parquet", data_files=patterns, cache_dir=cache)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataNotFound(f"the parquet files of {dataset} in {folder} cannot be read: {error}") from error
        yield loaded["train"], loaded["test"]


@contextmanager
def _from_hub(dataset: str) -> Iterator[tuple[Any, Any]]:
    """The train and test split of a data set on the hub, or of its copy in the cache of an earlier download."""
    import datasets

    name = HUB_NAMES.get(dataset, dataset)
    close = difflib.get_close_matches(dataset.lower(), ["digits", *HUB_NAMES], n=1)
    hint = f"; did you mean {close[0]!r}?" if close and dataset not in HUB_NAMES else ""
    reachable = _hub_has(name, hint)
    offline_before = datasets.config.HF_HUB_OFFLINE
    # Offline, `datasets` looks into its cache at once; without this it tries the hub for half a minute first.
    datasets.config.HF_HUB_OFFLINE = offline_before or not reachable
    try:
        loaded = datasets.load_dataset(name)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        if reachable:
            raise DataNotFound(f"the hub's data set {name!r} could not be downloaded: {error}") from error
        raise DataNotFound(
            f"the hub cannot be reached for the data set {name!r}, and no earlier download of it is on this machine; "
            f"name a folder with its parquet files: data_dir=… (or --data-dir …){hint}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline_before
    test = next((split for split in ("test", "validation") if split in loaded), None)
    if "train" not in loaded or test is None:
        raise ValueError(f"{name} has the splits {', '.join(loaded)}; labkit needs train, and test or validation")
    yield loaded["train"], loaded[test]


def _hub_has(name: str, hint: str) -> bool:
    """Whether the hub answers for this data set: False if it is out of reach. Raises `DataNotFound` if it has none."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        huggingface_hub.HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, timeout=HUB_TIMEOUT)
    except (HfHubHTTPError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 404)
        if status >= 500:
            return False
        raise DataNotFound(
            f"the hub has no data set {name!r} (or not for you, status {status}); labkit itself knows digits and "
            f"mnist{hint}"
        ) from error
    except Exception:  # whichever HTTP library is under it today: no name, no route, refused, too slow, offline mode
        return False
    return True


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """In this block `datasets` shows no progress bars, which would flash up for local files."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


# ---------------------------------------------------------------- columns to tensors


def _tensors(rows: Any, name: str) -> tuple[Tensor, Tensor]:
    """One split of a `datasets` data set as x: [n, dim] float32 and y: [n] int64."""
    import datasets

    if "label" not in rows.features or len(rows) == 0:
        raise ValueError(f"{name} has no rows with a label; its columns are {', '.join(rows.features)}")
    images = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    numbers = [
        column
        for column, feature in rows.features.items()
        if column != "label" and getattr(feature, "dtype", "").startswith(("int", "uint", "float"))
    ]
    if images:
        encoded = rows.select_columns(images[:1]).cast_column(images[0], datasets.Image(decode=False))
        x = _pixels(encoded.with_format("arrow")[:][images[0]].to_pylist(), name)
    elif numbers:
        columns = rows.select_columns(numbers).with_format("numpy")[:]
        x = torch.from_numpy(np.stack([np.asarray(columns[column], dtype=np.float32) for column in numbers], axis=1))
    else:
        raise ValueError(f"{name} has neither an image column nor columns of numbers: {', '.join(rows.features)}")
    y = torch.tensor(np.asarray(rows.select_columns(["label"]).with_format("numpy")[:]["label"]), dtype=torch.int64)
    if int(y.min()) < 0:
        raise ValueError(f"{name} has rows without a class (label {int(y.min())})")
    return x, y


def _pixels(images: list[dict[str, Any]], name: str) -> Tensor:
    """Encoded images (`bytes`, or the `path` of a file), all of one size, as [n, dim] float32 from 0 to 1.

    Decoded one by one into one array: a tenth of the time that `datasets` takes to make an object of each.
    """
    from PIL import Image

    x: np.ndarray[Any, np.dtype[np.uint8]] | None = None  # [n, dim]
    size = mode = None
    for row, encoded in enumerate(images):
        source = encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])
        with Image.open(source) as image:
            wanted = "L" if image.mode in ("1", "L") else "RGB"
            if x is None:
                size, mode = image.size, wanted
                x = np.empty((len(images), size[0] * size[1] * (1 if mode == "L" else 3)), dtype=np.uint8)
            if image.size != size or wanted != mode:
                raise ValueError(f"{name}: image {row} is {image.size} {wanted}, the first one is {size} {mode}")
            x[row] = np.asarray(image.convert(wanted)).reshape(-1)
    assert x is not None  # a split without rows was refused before
    return torch.from_numpy(x).to(torch.float32).div_(255)
