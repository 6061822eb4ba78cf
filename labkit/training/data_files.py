"""The files of a data set: which there are, and their rows as tables (parquet, csv, json, arrow, folders of images).

Where a batch comes from: `datasets.load` reads a table for each split here; `columns` makes tensors of it. pyarrow is
imported when files are read and not before.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit.errors import DataNotFound

SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "validation", "valid", "val", "dev")}
TABLES = (".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz", ".json", ".jsonl", ".ndjson", ".arrow", ".feather")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
PANDAS_INDEX = "__index_level_"  # how pandas begins the name of an index without one, in parquet


@dataclass
class Split:
    """The rows of one split, from one file or several.

    Args:
        dataset: Name of the data set.
        name: Name of the split.
        table: The rows, a `pyarrow.Table`.
        kinds: What `datasets` says of columns, by name, where it wrote the files, such as
            `{"_type": "ClassLabel", "names": […]}`.
        parts: The files, in order, with the number of their rows. Empty if there are no files.
    """

    dataset: str
    name: str
    table: Any
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parts: Sequence[tuple[str, int]] = ()

    def __post_init__(self) -> None:
        self.table, self.kinds = _flat(self.table, self.kinds)
        names = [name for name in self.table.column_names if not is_unnamed(name)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{self.dataset}: {names.count(name)} columns of {self.files} are called {name!r}: rename one, or "
                    "remove it"
                )

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def files(self) -> str:
        """Where its rows come from, in words."""
        if not self.parts:
            return f"the split {self.name}"
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return self.parts[0][0] + more

    def where(self, row: int, thing: str = "row") -> str:
        """Where a row comes from, in words: its file, and its number there, counted from 0."""
        for file, rows in self.parts:
            if row < rows:
                return file if _suffix(Path(file)) in IMAGES else f"{thing} {row} of {file}"
            row -= rows
        return f"{thing} {row} of {self.files}"

    def column(self, name: str) -> Any:
        """One column as a `pyarrow.Array`, without the wrapping of `datasets`."""
        import pyarrow as pa

        column = self.table.column(self.table.column_names.index(name)).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        return column.storage if isinstance(column.type, pa.BaseExtensionType) else column


def is_path(text: str) -> bool:
    """Whether this is a path rather than a name: it ends as a table does, begins as a path does, or is there.

    A name without a folder is a name, whatever is here.
    """
    path = Path(text)
    return (
        _suffix(path) in TABLES
        or text.startswith((".", "~"))
        or path.is_absolute()
        or (len(path.parts) > 1 and path.exists())
    )


def is_unnamed(column: str) -> bool:
    """Whether a column has no name, which in a file of pandas means that it is an index."""
    return not column.strip() or column.startswith("Unnamed: ")


def read_splits(dataset: str, root: Path) -> dict[str, Split]:
    """The splits of a data set in `root`, or in the folder of its name there: "train", and "test" if there is one.

    Raises:
        DataNotFound: There are no such files, one cannot be read, or a split has no rows.
        ValueError: The files of a split do not fit together.
    """
    if root.is_file():
        return {"train": _read(dataset, "train", [root], root.parent)}
    for folder in (root, root / dataset, root / "data", root / dataset / "data"):
        found = {split: files for split, names in SPLITS.items() if (files := _files(folder, names))}
        if "train" in found:
            return {split: _read(dataset, split, files, folder) for split, files in found.items()}
    for folder in (root, root / dataset):  # not split: one file, or a folder of images for each class
        saved = (folder / "state.json").is_file()  # one `Dataset`, with as many files as it has
        tables = _tables_below(folder) if saved else [path for path in _listed(folder) if _suffix(path) in TABLES]
        if len(tables) == 1 or (tables and saved):
            return {"train": _read(dataset, "train", tables, folder)}
        if not tables and (files := [path for below in _listed(folder) if below.is_dir() for path in _images(below)]):
            return {"train": _read(dataset, "train", files, folder)}
    if _suffix(root) in TABLES and not root.exists():
        raise DataNotFound(f"no {dataset} here: there is no file {root}")
    looked = f"neither {root} nor {root / dataset} has both" if root.is_dir() else f"there is no folder {root} with"
    raise DataNotFound(
        f"no {dataset} here: {looked} train-*.parquet and test-*.parquet (or .csv, .json, .arrow, or folders train and "
        "test with a folder of images for each class)"
    )


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, in order, without what is hidden."""
    return sorted(path for path in folder.iterdir() if path.name[0] not in "._") if folder.is_dir() else []


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in (*TABLES, *IMAGES) if name.endswith(suffix)), "")


def _images(folder: Path) -> list[Path]:
    below = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] not in "._"]
    return [path for path in below if _suffix(path) in IMAGES]


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of a split, under the first of its names that there are files for. Of one format."""
    for name in names:
        found = []
        for path in _listed(folder):
            stem = path.name.lower().split(".")[0]
            if (
                path.is_file()
                and _suffix(path) in TABLES
                and (stem == name or stem.startswith((f"{name}-", f"{name}_")))
            ):
                found.append(path)
            if path.is_dir() and stem == name:
                found += _tables_below(path) or _images(path)
        kinds = sorted({_suffix(path) for path in found if _suffix(path) in TABLES})
        if len(kinds) > 1:
            raise ValueError(f"the split {name} in {folder} is there as {' and as '.join(kinds)}: leave one of them")
        if found:
            return found
    return []


def _tables_below(folder: Path) -> list[Path]:
    """The tables in a folder; of what `Dataset.save_to_disk` has left those that count."""
    state = folder / "state.json"
    if state.is_file():
        listed = [folder / file["filename"] for file in json.loads(state.read_bytes()).get("_data_files", [])]
    else:
        listed = [file for file in _listed(folder) if file.name != "dataset_info.json"]
    return [file for file in listed if file.is_file() and _suffix(file) in TABLES]


def _read(dataset: str, split: str, files: Sequence[Path], folder: Path) -> Split:
    """The rows of some files of one format."""
    import pyarrow as pa

    if _suffix(files[0]) in IMAGES:
        return _image_folder(dataset, split, files, folder)
    tables, kinds = list[Any](), dict[str, Any]()
    for path in files:
        try:
            table, said = _READERS.get(_suffix(path).removesuffix(".gz"), _read_csv)(path)
        except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
            raise DataNotFound(f"{dataset}: {path} cannot be read: {error}") from error
        if tables and sorted(table.column_names) != sorted(tables[0].column_names):
            odd = sorted(set(table.column_names) ^ set(tables[0].column_names))
            raise ValueError(
                f"{dataset}: {files[0].name} and {path.name} have other columns: {', '.join(map(repr, odd))}"
            )
        if tables and said != kinds:
            odd = [name for name in {**said, **kinds} if said.get(name) != kinds.get(name)]
            raise ValueError(f"{dataset}: {files[0].name} and {path.name} say other things of the column {odd[0]!r}")
        tables, kinds = [*tables, table], said
    # (`save_to_disk` calls the files of all splits alike.)
    parts = [(path.relative_to(folder).as_posix(), table.num_rows) for path, table in zip(files, tables, strict=True)]
    if not any(rows for _, rows in parts):
        raise DataNotFound(f"{dataset}: there are no rows in {', '.join(map(str, files))}")
    return Split(dataset, split, _joined(dataset, tables, files), kinds, parts)


def _joined(dataset: str, tables: Sequence[Any], files: Sequence[Path]) -> Any:
    import pyarrow as pa

    names = tables[0].column_names
    if len(tables) == 1 or len(set(names)) < len(names):  # `Split` refuses the latter
        return tables[0]
    first = tables[0]
    for path, table in zip(files[1:], tables[1:], strict=True):
        for name in names:
            try:
                pa.concat_tables([first.select([name]), table.select([name])], promote_options="permissive")
            except pa.ArrowException:
                one, other = first.schema.field(name).type, table.schema.field(name).type
                raise ValueError(
                    f"{dataset}: the column {name!r} holds {one} in {files[0].name} and {other} in {path.name}"
                ) from None
    return pa.concat_tables([table.select(names) for table in tables], promote_options="permissive")


def _flat(table: Any, kinds: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make columns of records' fields (`place.x`), and values of categories. Encoded images and sounds stay."""
    import pyarrow as pa
    import pyarrow.types as types

    names, columns, said = list[str](), list[Any](), dict[str, Any]()
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = kinds.get(name, {})
        if types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if (
            plain := {"string_view": pa.large_string(), "binary_view": pa.large_binary()}.get(str(column.type))
        ) is not None:
            column = column.cast(plain)  # as polars writes them
        if types.is_struct(column.type) and {field.name for field in column.type} != {"bytes", "path"}:
            below = pa.Table.from_batches(pa.table({name: column}).to_batches()).flatten()
            inner, inner_kinds = _flat(below, {f"{name}.{key}": value for key, value in kind.items()})
            names, columns, said = [*names, *inner.column_names], [*columns, *inner.columns], {**said, **inner_kinds}
        else:
            names.append(name)
            columns.append(column)
            said[name] = kind if isinstance(kind, Mapping) else {}
    return pa.Table.from_arrays(columns, names=names), said


# ---------------------------------------------------------------- one file: its table, and what `datasets` says of it


def _read_parquet(path: Path) -> tuple[Any, dict[str, Any]]:
    import pyarrow.parquet as pq

    return _described(pq.ParquetFile(path).read())


def _read_arrow(path: Path) -> tuple[Any, dict[str, Any]]:
    import pyarrow as pa

    with pa.OSFile(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        return _described((pa.ipc.open_file if is_file else pa.ipc.open_stream)(file).read_all())


def _described(table: Any) -> tuple[Any, dict[str, Any]]:
    """Without pandas' index, which its metadata name, and with what `datasets` wrote there."""
    metadata = table.schema.metadata or {}
    index = json.loads(metadata.get(b"pandas", b"{}")).get("index_columns", [])
    kept = [
        place
        for place, name in enumerate(table.column_names)
        if name not in index and not name.startswith(PANDAS_INDEX)
    ]
    info = json.loads(metadata.get(b"huggingface", b"{}")).get("info") or {}
    return table.select(kept), dict(info.get("features") or {})


def _read_csv(path: Path) -> tuple[Any, dict[str, Any]]:
    import pyarrow.csv as arrow_csv

    opened: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
        header = lines.readline()
    others = [mark for mark in "\t;|" if header.count(mark) > header.count(",")]
    parsing = arrow_csv.ParseOptions(delimiter=others[0] if others else ",", newlines_in_values=True)
    return arrow_csv.read_csv(path, parse_options=parsing), {}


def _read_json(path: Path) -> tuple[Any, dict[str, Any]]:
    """A list of records, one record a line, or one of the other forms in which pandas writes a table."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        found = json.loads(text)
    except ValueError:
        found = list(_json_lines(text))
    if isinstance(found, dict) and len(text.splitlines()) == 1 and path.suffix.lower() in (".jsonl", ".ndjson"):
        found = [found]  # one record
    if isinstance(found, dict):
        rows = found.get("data")
        if isinstance(rows, list) and isinstance(found.get("columns"), list):  # orient="split"
            found = [dict(zip(found["columns"], row, strict=True)) for row in rows]
        elif isinstance(rows, list) and all(isinstance(row, dict) for row in rows):  # orient="table"
            keys = (found.get("schema") or {}).get("primaryKey", [])
            found = [{key: value for key, value in row.items() if key not in keys} for row in rows]
        elif found and all(isinstance(value, dict) for value in found.values()):
            if all(key.isdecimal() for key in found) and not all(
                key.isdecimal() for row in found.values() for key in row
            ):
                return _table(list(found.values())), {}  # orient="index"
            found = {name: list(column.values()) for name, column in found.items()}
            if len({len(column) for column in found.values()}) > 1:
                raise ValueError("its columns have different lengths")  # orient="columns"
    return _table(found), {}


def _table(found: Any) -> Any:
    """A table of a list of records, or of a dictionary of columns. Raises `ValueError`."""
    import pyarrow as pa

    if isinstance(found, list) and all(isinstance(row, dict) for row in found):
        names = dict.fromkeys(name for row in found for name in row)
        found = {name: [row.get(name) for row in found] for name in names}
    if not (isinstance(found, dict) and all(isinstance(column, list) for column in found.values())):
        raise ValueError("it holds no records: [{column: value, …}, …], or one record a line")
    columns = {}
    for name, values in found.items():
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(f"the column {name!r} mixes kinds of values, or has too large ones: {error}") from error
    return pa.table(columns)


def _json_lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error


_READERS = {
    ".parquet": _read_parquet, ".arrow": _read_arrow, ".feather": _read_arrow, ".csv": _read_csv, ".tsv": _read_csv,
    ".json": _read_json, ".jsonl": _read_json, ".ndjson": _read_json,
}  # fmt: skip


def _image_folder(dataset: str, split: str, files: Sequence[Path], folder: Path) -> Split:
    """Images whose classes are the names of the folders that they are in."""
    import pyarrow as pa

    tops = {folder} | {folder / name for names in SPLITS.values() for name in names}
    for path in files:
        if path.parent in tops:
            raise ValueError(f"{dataset}: the image {path} has no class: put it into a folder of its class's name")
    table = pa.table(
        {
            "image": pa.array([{"bytes": None, "path": str(path)} for path in files]),
            "label": [path.parent.name for path in files],
        }
    )
    return Split(dataset, split, table, {}, [(str(path), 1) for path in files])
