"""Data sets: digits, parquet files in the hub's layout, and what happens without either."""

from __future__ import annotations

import io
from importlib.metadata import PackageNotFoundError
from itertools import islice
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from labkit.errors import DataNotFound, LabkitError
from labkit.training import datasets as data


def parquet(folder, split, columns, features=None):
    folder.mkdir(exist_ok=True)
    path = folder / f"{split}-00000-of-00001.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def images(pixels, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    return {"image": [png(image) for image in pixels], "label": labels}, features


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """The hub behind a closed port, and no earlier downloads."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_digits_come_without_a_download_split_the_same_for_the_same_seed():
    digits, again, other = data.load(), data.load("digits", seed=0), data.load("digits", seed=1)
    assert (digits.train_x.shape, digits.test_x.shape) == ((1437, 64), (360, 64))
    assert (digits.train_x.dtype, digits.train_y.dtype) == (torch.float32, torch.int64)
    assert (digits.dim, digits.classes) == (64, 10)
    assert torch.equal(digits.train_x, again.train_x) and torch.equal(digits.test_y, again.test_y)
    assert not torch.equal(digits.train_y, other.train_y)


def test_digits_are_those_of_scikit_learn():
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    digits = data.load("digits")
    assert torch.cat([digits.train_y, digits.test_y]).bincount().equal(y.bincount())
    # To standardise keeps equal values equal.
    for pixel in (20, 43):
        values = torch.cat([digits.train_x[:, pixel], digits.test_x[:, pixel]])
        assert values.unique(return_counts=True)[1].equal(x[:, pixel].unique(return_counts=True)[1])


def test_digits_are_found_wherever_scikit_learn_keeps_them(monkeypatch, tmp_path):
    def unknown(name: str) -> None:
        raise PackageNotFoundError(name)

    before = data.load("digits")
    for elsewhere in (unknown, lambda name: SimpleNamespace(locate_file=tmp_path.joinpath)):
        monkeypatch.setattr("importlib.metadata.distribution", elsewhere)
        assert data.load("digits").test_x.equal(before.test_x)


def test_digits_are_standardised_and_every_class_is_in_both_splits():
    digits = data.load("digits")
    assert digits.train_x.mean().abs() < 1e-5
    assert 0.5 < digits.train_x.std() <= 1.0
    assert digits.test_y.bincount().min() > 30


def test_images_in_local_parquet_files_become_rows_of_pixels_from_0_to_1(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    parquet(tmp_path, "train", *images(pixels[:8], [3, 1, 4, 1, 5, 9, 2, 6]))
    parquet(tmp_path, "test", *images(pixels[8:], [5, 3, 5, 8]))
    mnist = data.load("mnist", tmp_path)
    assert (mnist.dim, mnist.classes) == (784, 10)
    torch.testing.assert_close(mnist.train_x, torch.from_numpy(pixels[:8].reshape(8, 784)).float() / 255)
    assert mnist.train_y.tolist() == [3, 1, 4, 1, 5, 9, 2, 6]
    assert mnist.test_y.tolist() == [5, 3, 5, 8]


def test_a_folder_of_the_data_sets_name_is_found_within_data_dir(tmp_path):
    pixels = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    parquet(tmp_path / "colours", "train", *images(pixels, [0, 1]))
    parquet(tmp_path / "colours", "test", *images(pixels, [1, 1]))
    colours = data.load("colours", str(tmp_path))
    assert repr(colours) == "ClassificationData('colours', 2 + 2 rows of 48, 2 classes)"


def test_a_folders_name_is_no_pattern(tmp_path):
    folder = tmp_path / "my data [v2] {a,b}"
    for split in ("train", "test"):
        parquet(folder, split, {"width": [1.5, 2.5], "label": [0, 1]})
    assert data.load("iris", folder).dim == 1


def test_columns_of_numbers_become_rows_in_the_order_of_the_columns(tmp_path):
    for split in ("train", "test"):
        parquet(tmp_path, split, {"width": [1.5, 2.5], "label": [0, 2], "height": [3, 4], "note": ["a", "b"]})
    table = data.load("iris", tmp_path)
    assert table.train_x.tolist() == [[1.5, 3.0], [2.5, 4.0]]
    assert table.classes == 3


@pytest.mark.parametrize("columns", [{"x": [1.0]}, {"label": [1]}, {"x": [1.0], "label": [-1]}])
def test_files_of_another_form_are_refused(tmp_path, columns):
    for split in ("train", "test"):
        parquet(tmp_path, split, columns)
    with pytest.raises(ValueError, match="other"):
        data.load("other", tmp_path)


def test_images_of_different_sizes_are_refused(tmp_path):
    columns = images([np.zeros((4, 4), dtype=np.uint8), np.zeros((4, 5), dtype=np.uint8)], [0, 1])
    parquet(tmp_path, "train", *columns)
    parquet(tmp_path, "test", *columns)
    with pytest.raises(ValueError, match="image 1"):
        data.load("mixed", tmp_path)


def test_a_folder_without_the_files_is_named_with_what_was_looked_for(tmp_path):
    with pytest.raises(DataNotFound) as raised:
        data.load("mnist", tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "train-*.parquet and test-*.parquet" in str(raised.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load("mnist", tmp_path / "nowhere")


def test_damaged_and_empty_files_are_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}-0.parquet").write_bytes(b"not parquet")
        parquet(tmp_path / "empty", split, {"x": [], "label": []})
    with pytest.raises(DataNotFound, match="empty"):
        data.load("mnist", tmp_path / "empty")
    with pytest.raises(DataNotFound, match="cannot be read"):
        data.load("mnist", tmp_path)


def test_without_the_hub_mnist_says_at_once_what_to_do(no_hub):
    with pytest.raises(DataNotFound, match=r"'ylecun/mnist'.*--data-dir"):
        data.load("mnist")
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_name_that_the_hub_cannot_have_is_refused(no_hub):
    with pytest.raises(LabkitError, match="no data set"):
        data.load("no such data set!")


def test_a_name_that_is_nearly_one_of_ours_is_asked_back(no_hub):
    with pytest.raises(DataNotFound, match="did you mean 'digits'"):
        data.load("digit")
    with pytest.raises(DataNotFound, match="did you mean 'mnist'"):
        data.load("MNIST")
    with pytest.raises(DataNotFound) as other:
        data.load("imdb")
    assert "did you mean" not in str(other.value)


def test_digits_with_a_folder_is_a_mistake_and_said_to_be_one(tmp_path):
    with pytest.raises(ValueError, match="data_dir"):
        data.load("digits", tmp_path)


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count).float()[:, None], torch.arange(count)


def test_each_epoch_visits_every_row_once_in_another_order():
    endless = data.batches(*rows(10), 4, torch.Generator().manual_seed(0))
    first, second = ([y for _, y in islice(endless, 3)] for _ in range(2))
    assert [len(y) for y in first] == [4, 4, 2]
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == list(range(10))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()


def test_the_same_seed_gives_the_same_batches_and_x_stays_with_its_y():
    one, two = (data.batches(*rows(10), 3, torch.Generator().manual_seed(5)) for _ in range(2))
    for (x, y), (same_x, same_y) in islice(zip(one, two, strict=True), 20):
        assert torch.equal(x, same_x) and torch.equal(y, same_y)
        assert torch.equal(x[:, 0].long(), y)


def test_a_batch_larger_than_the_data_is_the_whole_data():
    x, _ = next(data.batches(*rows(5), 100))
    assert len(x) == 5


@pytest.mark.parametrize(("x", "y", "batch_size"), [(3, 3, 0), (3, 2, 1), (0, 0, 1)])
def test_impossible_batches_are_refused_at_the_call(x, y, batch_size):
    with pytest.raises(ValueError):
        data.batches(torch.zeros(x, 1), torch.zeros(y), batch_size)
