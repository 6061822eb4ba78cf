"""Data sets: digits, parquet files in the hub's layout, and what happens without either."""

from __future__ import annotations

import io
from datetime import date
from decimal import Decimal
from importlib.metadata import PackageNotFoundError
from itertools import islice
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow import feather
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
    with pytest.raises(DataNotFound, match=r"'ylecun/mnist'.*data_dir=…"):
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


# ---------------------------------------------------------------- a data set comes out right, or is refused in words


def csv_files(folder, train, test=None):
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text(train)
    (folder / "test.csv").write_text(train if test is None else test)
    return folder


def parquet_files(folder, train, test=None):
    parquet(folder, "train", train)
    parquet(folder, "test", train if test is None else test)
    return folder


def refusal(folder, **options):
    """Why a folder is refused, in words."""
    with pytest.raises(ValueError) as raised:
        data.load("my", folder, **options)
    return str(raised.value)


FRAME = pd.DataFrame({"x": [1.5, 2.5, 3.5, 4.5], "label": [0, 1, 0, 1]})
INDEXES = {
    "numbers": FRAME,
    "shuffled": FRAME.iloc[[2, 0, 1, 3]],
    "concatenated": pd.concat([FRAME, FRAME]),
    "texts": FRAME.set_index(pd.Index(list("abcd"))),
    "dates": FRAME.set_index(pd.date_range("2020-01-01", periods=4)),
    "two levels": FRAME.set_index(pd.MultiIndex.from_product([[0, 1], [0, 1]])),
    "reset": FRAME.iloc[[2, 0, 1, 3]].reset_index(),
    "read again": pd.read_csv(io.StringIO(FRAME.to_csv())),
    "named": FRAME.set_index(pd.Index([7, 5, 6, 8], name="id")),
}


@pytest.mark.parametrize("frame", INDEXES.values(), ids=INDEXES)
def test_the_index_of_pandas_is_no_input(tmp_path, frame):
    for split in ("train", "test"):
        frame.to_csv(tmp_path / f"{split}.csv")
    (tmp_path / "again").mkdir()
    for split in ("train", "test"):
        frame.to_parquet(tmp_path / "again" / f"{split}.parquet")
    for folder in (tmp_path, tmp_path / "again"):
        table = data.load("my", folder)
        assert table.columns == ("x",) and table.train_x.flatten().tolist() == frame["x"].tolist()
    assert "an index" in repr(data.load("my", tmp_path)), "it says what it left out"


def test_a_column_called_index_that_is_no_running_number_is_an_input(tmp_path):
    assert data.load("glass", csv_files(tmp_path, "index,label\n1.51,0\n1.52,1\n")).columns == ("index",)
    assert data.load("glass", csv_files(tmp_path, "index,label\n3,0\n3,1\n")).columns == ("index",)


@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table"])
def test_json_in_any_form_that_pandas_writes(tmp_path, orient):
    for split in ("train", "test"):
        FRAME.to_json(tmp_path / f"{split}.json", orient=orient)
    table = data.load("my", tmp_path)
    assert table.columns == ("x",) and table.train_y.tolist() == [0, 1, 0, 1]


def test_json_lines_arrow_files_and_what_save_to_disk_leaves(tmp_path):
    for folder in ("lines", "arrow"):
        (tmp_path / folder).mkdir()
    splits = datasets.DatasetDict({split: datasets.Dataset.from_pandas(FRAME) for split in ("train", "test")})
    splits.save_to_disk(tmp_path / "disk")
    for split in ("train", "test"):
        FRAME.to_json(tmp_path / "lines" / f"{split}.jsonl", orient="records", lines=True)
        FRAME.to_feather(tmp_path / "arrow" / f"{split}.feather")
    for folder in ("lines", "arrow", "disk"):
        assert data.load("my", tmp_path / folder).train_x.flatten().tolist() == [1.5, 2.5, 3.5, 4.5], folder


def test_a_split_in_several_files_is_one_and_a_fault_is_found_in_its_file(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}-0.csv").write_text("x,label\n1,0\n2,1\n")
        (tmp_path / f"{split}-1.csv").write_text("x,label\n1.5,1\n2.5,0\n")
    assert data.load("my", tmp_path).train_x.flatten().tolist() == [1.0, 2.0, 1.5, 2.5]
    (tmp_path / "test-1.csv").write_text("x,label\n1.5,1\n,0\n")
    assert "'x' has no value in row 1 of test-1.csv" in refusal(tmp_path)
    (tmp_path / "train-1.csv").write_text("x,label\na,1\nb,0\n")
    assert "'x' holds int64 in train-0.csv and string in train-1.csv" in refusal(tmp_path)
    (tmp_path / "train-1.csv").write_text("z,label\n1,1\n2,0\n")
    assert "train-0.csv and train-1.csv" in refusal(tmp_path) and "'x', 'z'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("labels", "classes", "names"),
    [
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        ([-1, 1, 1], [0, 1, 1], ("-1", "1")),
        ([30, 10, 20], [2, 0, 1], ("10", "20", "30")),
        ([1, 2, 3], [0, 1, 2], ("1", "2", "3")),
        ([0, 2, 2], [0, 2, 2], ("0", "1", "2")),
        ([0.0, 1.0, 2.0], [0, 1, 2], ("0", "1", "2")),
        ([3.0, 4.0, 3.0], [0, 1, 0], ("3", "4")),
        ([True, False, True], [1, 0, 1], ("False", "True")),
        ([Decimal("1.0"), Decimal("0.0"), Decimal("1.0")], [1, 0, 1], ("0", "1")),
        ([10**15, 10**15 + 1, 10**15], [0, 1, 0], (f"{10**15}", f"{10**15 + 1}")),
        ([[0, 1, 0], [0, 0, 1], [1, 0, 0]], [1, 2, 0], ("0", "1", "2")),
    ],
    ids=str,
)
def test_labels_become_classes_from_0_on(tmp_path, labels, classes, names):
    table = data.load("my", parquet_files(tmp_path, {"x": [1.0, 2.0, 3.0], "label": labels}))
    assert (table.train_y.tolist(), table.labels, table.classes) == (classes, names, len(names))
    assert table.test_y.equal(table.train_y)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0.5, 1.0], "the label 'label' is 0.5 in row 0 of train-00000-of-00001.parquet"),
        ([0.0, float("nan")], "is missing (NaN) in row 1"),
        ([0, None], "is missing in row 1"),
        (["cat", ""], "is empty in row 1"),
        ([[0, 1], [1, 1]], "is [1, 1], which is not one-hot, in row 1"),
        ([[0, 1], [1]], "'label' has lists of different lengths"),
        ([date(2020, 1, 1), date(2020, 1, 2)], "holds dates or times"),
    ],
    ids=str,
)
def test_labels_that_are_no_classes_are_refused_with_their_row(tmp_path, labels, said):
    assert said in refusal(parquet_files(tmp_path, {"x": [1.0, 2.0], "label": labels}))


def test_train_and_test_share_the_numbers_of_their_classes(tmp_path):
    table = data.load("pets", csv_files(tmp_path, "x,label\n1,dog\n2,cat\n3,ape\n", "x,label\n1,cat\n2,cat\n"))
    assert table.train_y.tolist() == [2, 1, 0] and table.test_y.tolist() == [1, 1]
    assert "the label 'cow' in row 1 of test.csv" in refusal(
        csv_files(tmp_path, "x,label\n1,dog\n2,cat\n", "x,label\n1,cat\n2,cow\n")
    )
    assert "the label 3 in row 0 of test.csv" in refusal(
        csv_files(tmp_path, "x,label\n1,0\n2,1\n3,2\n", "x,label\n1,3\n")
    )


def test_named_classes_in_another_order_are_the_same_classes(tmp_path):
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = datasets.Features(x=datasets.Value("float32"), label=datasets.ClassLabel(names=names))
        parquet(tmp_path, split, {"x": [1.0, 2.0], "label": [0, 1]}, features)
    table = data.load("pets", tmp_path)
    assert (table.train_y.tolist(), table.test_y.tolist(), table.labels) == ([0, 1], [1, 0], ("cat", "dog"))


def test_labels_in_a_column_of_another_name(tmp_path):
    assert data.load("my", csv_files(tmp_path, "x,target\n1,a\n2,b\n")).labels == ("a", "b")
    assert data.load("my", csv_files(tmp_path, "x,kind\n1,a\n2,b\n"), label="kind").labels == ("a", "b")
    assert "'x', 'kind'" in refusal(tmp_path) and "label=…" in refusal(tmp_path)
    assert "did you mean 'kind'" in refusal(tmp_path, label="kinds")
    assert "'target', 'y' may be it" in refusal(csv_files(tmp_path, "x,target,y\n1,0,1\n2,1,0\n"))
    assert "its first line should name the columns" in refusal(csv_files(tmp_path, "5.1,3.5,a\n4.9,3.0,b\n"))
    assert "test.csv has no column 'label'" in refusal(csv_files(tmp_path, "x,label\n1,0\n2,1\n", "x\n1\n2\n"))


def test_whatever_is_a_number_is_an_input(tmp_path):
    columns = {
        "flag": [True, False],
        "price": [Decimal("1.25"), Decimal("2.5")],
        "place": [{"lat": 1.5, "lon": 2}, {"lat": 2.5, "lon": 3}],
        "pair": [[1, 2], [3, 4]],
        "people": [1_400_000_001, 330_000_000],
        "label": [0, 1],
    }
    table = data.load("my", parquet_files(tmp_path, columns))
    assert table.columns == ("flag", "price", "place.lat", "place.lon", "pair", "people")
    assert table.train_x.tolist() == [[1, 1.25, 1.5, 2, 1, 2, 1.4e9], [0, 2.5, 2.5, 3, 3, 4, 3.3e8]]


def test_arrays_of_two_dimensions_are_flattened(tmp_path):
    features = datasets.Features(v=datasets.Array2D((2, 2), "float32"), label=datasets.Value("int8"))
    for split in ("train", "test"):
        parquet(tmp_path, split, {"v": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], "label": [0, 1]}, features)
    assert data.load("my", tmp_path).train_x.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, float("nan")], "'x' has the value nan in row 1 of train-00000-of-00001.parquet"),
        ([float("-inf"), 1.0], "'x' has the value -inf in row 0"),
        ([1.0, 1e300], "'x' has the value 1e+300 (beyond float32) in row 1"),
        ([1, None], "'x' has no value in row 1"),
        ([None, None], "'x' of train-00000-of-00001.parquet holds no values"),
        ([10**18, 10**18 + 1], "'x' of train-00000-of-00001.parquet has numbers up to 1000000000000000001"),
        ([[1, 2], [3]], "'x' has lists of different lengths, or empty ones, 1 and 2 numbers, such as in row 1"),
        ([[1, 2], [3, None]], "'x' has no value in row 1"),
        ([[1, 2], None], "'x' has no value in row 1"),
        ([date(2020, 1, 1), date(2020, 1, 2)], "'x' of train-00000-of-00001.parquet holds dates or times"),
        ([b"a", b"b"], "'x' of train-00000-of-00001.parquet holds binary"),
        (["1.5", "?"], "'x' holds numbers as text, such as '?' in row 1"),
        (["1,5", "2,5"], "'x' holds numbers as text, such as '1,5' in row 0"),
    ],
    ids=str,
)
def test_a_column_that_cannot_be_an_input_is_refused_with_its_row(tmp_path, values, said):
    folder = parquet_files(tmp_path, {"x": values, "z": [1, 2], "label": [0, 1]})
    assert said in refusal(folder)
    assert data.load("my", folder, columns=["z"]).columns == ("z",), "the others will do without it"


def test_the_columns_of_test_are_those_of_train_by_name(tmp_path):
    table = data.load("my", csv_files(tmp_path, "a,b,label\n1,2,0\n3,4,1\n", "b,label,a\n2.5,1.0,1.5\n"))
    assert table.test_x.tolist() == [[1.5, 2.5]] and table.test_y.tolist() == [1]
    for test, said in [
        ("a,B,label\n1,2,0\n", "test.csv has no column 'b' and a column 'B' besides"),
        ("a,b,c,label\n1,2,3,0\n", "test.csv has a column 'c' besides"),
        ("a,b,label\n1,x,0\n", "'b' holds numbers in train.csv and text in test.csv"),
    ]:
        assert said in refusal(csv_files(tmp_path, "a,b,label\n1,2,0\n3,4,1\n", test))
    csv_files(tmp_path, "a,b,label\n1,2,0\n", "a,b,c,label\n1,2,3,0\n")
    assert data.load("my", tmp_path, columns=["b", "a"]).test_x.tolist() == [[2, 1]]


def test_columns_are_chosen_by_name_or_the_choice_is_refused(tmp_path):
    csv_files(tmp_path, "width,note,label\n1,a,0\n2,b,1\n")
    assert "did you mean 'width'" in refusal(tmp_path, columns=["widht"])
    assert "'label' is the label" in refusal(tmp_path, columns=["label"])
    assert "'note' cannot be an input: it holds text" in refusal(tmp_path, columns=["note"])
    assert "name at least one" in refusal(tmp_path, columns=[])
    assert data.load("my", tmp_path).left_out == ("note (text)",)


def test_two_columns_of_one_name_are_refused(tmp_path):
    assert "2 columns of train.csv are called 'x'" in refusal(csv_files(tmp_path, "x,x,label\n1,2,0\n1,2,1\n"))


def test_arrow_types_that_other_libraries_write_and_two_columns_of_one_name_in_parquet(tmp_path):
    for split in ("train", "test"):
        texts = pa.array(["dog", "cat"], pa.string_view())
        table = pa.table({"x": pa.array([1, 2], pa.int8()), "note": texts, "label": texts.cast(pa.large_string())})
        feather.write_feather(table, tmp_path / f"{split}.feather", compression="uncompressed")
    assert (data.load("my", tmp_path).labels, data.load("my", tmp_path).columns) == (("cat", "dog"), ("x",))
    (tmp_path / "twice").mkdir()
    for split in ("train", "test"):
        table = pa.Table.from_arrays([pa.array([1, 2])] * 3, names=["x", "x", "label"])
        pq.write_table(table, tmp_path / "twice" / f"{split}.parquet")
    assert "2 columns of train.parquet are called 'x'" in refusal(tmp_path / "twice")


def test_csv_files_with_other_separators_and_with_faults(tmp_path):
    assert data.load("my", csv_files(tmp_path, "x;label\n1.5;0\n2.5;1\n")).train_x.tolist() == [[1.5], [2.5]]
    assert data.load("my", csv_files(tmp_path, "\ufeffx,label\n1.5,0\n")).columns == ("x",)
    for faulty in ("x,label\n1,2,3\n", "", "x,label\n"):
        assert "train.csv" in refusal(csv_files(tmp_path, faulty))
    (tmp_path / "train.csv").write_bytes("x,label\n1,é\n".encode("latin-1"))
    assert "train.csv cannot be read" in refusal(tmp_path)


def test_a_data_set_that_is_not_split_is_split_on_request(tmp_path):
    (tmp_path / "iris.csv").write_text("x,label\n" + "".join(f"{x},{x % 3}\n" for x in range(30)))
    assert "30 rows for training (iris.csv) and none for testing" in refusal(tmp_path)
    for place in (tmp_path, tmp_path / "iris.csv"):
        iris, again = (data.load("iris", place, test_share=0.2) for _ in range(2))
        assert (len(iris.train_y), iris.test_y.bincount().tolist()) == (24, [2, 2, 2])
        assert sorted(torch.cat([iris.train_x, iris.test_x]).flatten().tolist()) == list(range(30))
        assert iris.test_x.equal(again.test_x)
        assert not iris.test_x.equal(data.load("iris", place, test_share=0.2, seed=1).test_x)
    for share in (0, 1, 2, 0.001):
        assert f"test_share={float(share)}" in refusal(tmp_path, test_share=share)
    assert "leave test_share out" in refusal(csv_files(tmp_path, "x,label\n1,0\n"), test_share=0.5)


def picture(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format=format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def load_pictures(folder, *pictures):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        parquet(folder, split, {"image": list(pictures), "label": [0] * len(pictures)}, features)
    return data.load("pictures", folder)


GREY = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)
COLOURS = np.stack([GREY, 255 - GREY, GREY], axis=2)


@pytest.mark.parametrize(
    ("encoded", "pixels"),
    [
        (picture(GREY), GREY / 255),
        (picture(Image.fromarray(GREY > 100)), GREY > 100),
        (picture(COLOURS), COLOURS / 255),
        (picture(Image.fromarray(COLOURS).convert("P", palette=Image.Palette.ADAPTIVE)), COLOURS / 255),
        (picture(Image.fromarray(COLOURS).convert("RGBA")), COLOURS / 255),
        (picture(Image.fromarray(GREY).convert("LA")), GREY / 255),
        (picture(Image.fromarray(COLOURS).convert("CMYK"), "TIFF"), COLOURS / 255),
        (picture(np.array([[0, 300, 65535]], dtype=np.uint16)), np.array([0, 300, 65535]) / 65535),
        (picture(np.array([[0, 300, 65535]], dtype=np.uint16), "TIFF"), np.array([0, 300, 65535]) / 65535),
        (picture(np.array([[0, 0.25, 1]], dtype=np.float32), "TIFF"), np.array([0, 0.25, 1])),
    ],
    ids=["L", "1", "RGB", "P", "RGBA", "LA", "CMYK", "I;16", "I;16 TIFF", "F"],
)
def test_pixels_of_any_mode_come_out_from_0_to_1(tmp_path, encoded, pixels):
    expected = torch.as_tensor(np.asarray(pixels, dtype=np.float32)).flatten()
    torch.testing.assert_close(load_pictures(tmp_path, encoded).train_x[0], expected)


def test_grey_images_among_coloured_ones_and_bytes_among_wider_ones(tmp_path):
    mixed = load_pictures(tmp_path, picture(GREY), picture(COLOURS)).train_x
    assert mixed[0].reshape(2, 3, 3).eq(torch.from_numpy(GREY)[:, :, None] / 255).all()
    wide = load_pictures(tmp_path, picture(GREY), picture(GREY.astype(np.uint16) * 257)).train_x
    torch.testing.assert_close(wide[0], wide[1])


def test_an_image_is_turned_as_its_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # orientation: turn by 90 degrees
    turned = load_pictures(tmp_path, picture(GREY, exif=exif), picture(np.rot90(GREY, -1).copy())).train_x
    assert turned[0].equal(turned[1])


@pytest.mark.parametrize(
    ("encoded", "said"),
    [
        (None, "it is missing"),
        ({"bytes": b"\x89PNG broken", "path": None}, "is no image that PIL can read"),
        ({"bytes": b"", "path": None}, "is no image that PIL can read"),
        ({"bytes": picture(np.eye(50, dtype=np.uint8))["bytes"][:60],
          "path": None}, "truncated"),
        (picture(np.dstack([COLOURS, GREY])), "transparent in places"),
        (picture(np.array([[0.0, 300.0]], dtype=np.float32), "TIFF"), "numbers from 0 to 300"),
        (picture(np.array([[0, 70000]], dtype=np.int32), "TIFF"), "numbers from 0 to 70000"),
        (picture(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)]),
         "several frames"),
    ],
    ids=["null", "broken", "empty", "truncated", "transparent", "F", "I", "animated"],
)  # fmt: skip
def test_an_image_that_cannot_be_used_is_named_with_its_file_column_and_row(tmp_path, encoded, said):
    with pytest.raises(ValueError, match=said) as raised:
        load_pictures(tmp_path, picture(GREY), encoded)
    assert "image 1 of train-00000-of-00001.parquet (column 'image')" in str(raised.value)


def test_images_without_the_words_of_datasets_are_found_and_a_lost_file_is_named(tmp_path):
    for cells in ([picture(GREY), picture(GREY)], [picture(GREY)["bytes"]] * 2):
        for split in ("train", "test"):
            pd.DataFrame({"picture": cells, "label": [0, 1]}).to_parquet(tmp_path / f"{split}.parquet")
        assert data.load("my", tmp_path).columns == ("picture",)
    lost = [picture(GREY), {"bytes": None, "path": "lost.png"}]
    pd.DataFrame({"picture": lost, "label": [0, 1]}).to_parquet(tmp_path / "test.parquet")
    assert "image 1 of test.parquet (column 'picture')" in refusal(tmp_path) and "lost.png" in refusal(tmp_path)


def image_folder(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(GREY).save(root / name)
    return root


def test_folders_of_images_are_classes(tmp_path):
    image_folder(tmp_path, "train/dog/1.png", "train/dog/2.png", "train/cat/1.png", "test/dog/1.png")
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("no image")
    pets = data.load("pets", tmp_path)
    assert (pets.train_y.tolist(), pets.test_y.tolist(), pets.labels) == ([0, 1, 1], [1], ("cat", "dog"))
    image_folder(tmp_path, "test/cow/1.png")
    assert "the label 'cow' in " in refusal(tmp_path) and str(tmp_path / "test" / "cow" / "1.png") in refusal(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"broken")
    (tmp_path / "test" / "cow" / "1.png").unlink()
    assert f"{tmp_path / 'train' / 'cat' / '1.png'} (column 'image') is no image" in refusal(tmp_path)
    assert "has no class" in refusal(image_folder(tmp_path / "flat", "train/1.png"))


def test_a_folder_of_images_without_splits_is_split_on_request(tmp_path):
    image_folder(tmp_path, *(f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(5)))
    pets = data.load("pets", tmp_path, test_share=0.2)
    assert (pets.train_y.bincount().tolist(), pets.test_y.bincount().tolist()) == ([4, 4], [1, 1])


def test_of_the_hubs_splits_one_with_published_labels_is_for_testing(monkeypatch, no_hub):
    def split(labels):
        features = datasets.Features(x=datasets.Value("float64"), label=datasets.ClassLabel(names=["no", "yes"]))
        return datasets.Dataset.from_dict({"x": [1.0, 2.0], "label": labels}, features=features)

    hub = datasets.DatasetDict({"train": split([0, 1]), "test": split([-1, -1]), "validation": split([1, 1])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    assert data.load("glue").test_y.tolist() == [1, 1]
    hub["train"] = split([0, -1])
    assert "is -1, no class" in refusal_of_hub("glue") and "row 1 of the split train" in refusal_of_hub("glue")


def refusal_of_hub(name):
    with pytest.raises(ValueError) as raised:
        data.load(name)
    return str(raised.value)


# ---------------------------------------------------------------- paths in the place of names


@pytest.mark.parametrize("name", ["digits.csv", "iris.v2.csv"])
def test_a_path_may_stand_in_the_place_of_a_name(tmp_path, monkeypatch, name):
    (tmp_path / "my").mkdir()
    for file in (tmp_path / "my" / name, tmp_path / name):
        file.write_text("width,label\n1.5,a\n2.5,b\n3.5,a\n0.5,b\n")
    monkeypatch.chdir(tmp_path)
    for path in (name, f"my/{name}", f"./my/{name}", tmp_path / name, str(tmp_path / name)):
        table = data.load(path, test_share=0.5)
        assert (table.name, table.dim, table.labels) == (name.split(".")[0], 1, ("a", "b"))


def test_so_may_a_folder(tmp_path, monkeypatch):
    (tmp_path / "my" / "iris").mkdir(parents=True)
    for split in ("train", "test"):
        parquet(tmp_path / "my" / "iris", split, {"width": [1.5, 2.5], "label": [0, 1]})
    monkeypatch.chdir(tmp_path / "my")
    assert data.load("./iris").dim == data.load("../my/iris").dim == data.load(tmp_path / "my" / "iris").dim == 1


def test_a_path_to_nothing_is_said_to_be_one_and_two_of_them_are_refused(tmp_path):
    with pytest.raises(DataNotFound, match=r"no file .*nothing\.csv"):
        data.load(str(tmp_path / "nothing.csv"))
    with pytest.raises(ValueError, match="one path, or a name and a path"):
        data.load("a.csv", tmp_path)


def test_one_data_set_that_save_to_disk_left_can_be_split(tmp_path):
    rows = datasets.Dataset.from_dict({"width": [float(i) for i in range(10)], "label": [0, 1] * 5})
    rows.save_to_disk(tmp_path / "disk", num_shards=3)
    table = data.load(tmp_path / "disk", test_share=0.2)
    assert sorted(torch.cat([table.train_x, table.test_x]).flatten().tolist()) == [float(i) for i in range(10)]


def test_files_of_two_splits_that_are_called_alike_are_told_apart(tmp_path):
    train = datasets.Dataset.from_dict({"width": [1.0, 2.0], "label": [0, 1]})
    splits = datasets.DatasetDict(train=train, test=train.rename_column("width", "height"))
    splits.save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match=r"test/data-\S+ has no column 'width'.*unlike train/data-"):
        data.load("disk", tmp_path)
