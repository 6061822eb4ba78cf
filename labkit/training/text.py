"""Text for language models: read from files, the hub or Python itself, tokenized, and cut into windows.

Where a batch begins: `batches` draws windows of the training text, each with the tokens that come one later as its y.
"""

# Legend. t: positions of a window, `context` of them; n: windows.

from __future__ import annotations

import logging
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.errors import DataNotFound
from labkit.paths import user_path
from labkit.suggest import did_you_mean, one_of
from labkit.training.data_files import TABLES, Split, is_path, read_splits
from labkit.training.hub import from_hub
from labkit.training.tokens import Tokens, tokens_of

logger = logging.getLogger(__name__)

TEXTS = (".txt", ".text", ".md", ".tokens", ".raw")
TRAIN = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "test", "testing")  # the first that is there is measured on
ABOUT = ("readme", "license", "licence", "copying", "notice")  # files beside a text that are no part of it
CONTEXT = 64
TEST_SHARE = 0.1
WINDOWS = ("random", "consecutive")
WHOLE = ""  # the name of a text that is not split


@dataclass(frozen=True, eq=False)
class TextData:
    """Two texts as tokens, for training and for testing, in windows; what `lk.load("text")` returns.

    `lk.fit` takes its training text, in windows x and y [rows, context] int64, where y are the
    tokens one position later; `validate=` and `lk.evaluate` take all of the text for testing.

    Example:
        data = lk.load("text", "input.txt")
        model = MyLanguageModel(data.vocab_size, data.context)
        run = lk.fit(model, data, steps=2000, validate=data, metrics="perplexity")

    Args:
        name: Name of the text.
        train: The training text, [tokens] uint8 or int32.
        test: The text for testing, [tokens], of the same type.
        context: Positions of a window.
        windows: "random": each begins anywhere; or "consecutive": one after the other.
        splits: What the two texts are, such as ("train", "valid").
        tokens: How text becomes numbers.
    """

    name: str
    train: Tensor
    test: Tensor
    context: int
    windows: str
    splits: tuple[str, str]
    tokens: Tokens = field(repr=False)

    def __post_init__(self) -> None:
        for text, split in zip((self.train, self.test), self.splits, strict=True):
            if len(text) <= self.context:
                raise ValueError(
                    f"{self.name}: {split} has {len(text):,} tokens, and a window takes {self.context} and the one "
                    "after them: give a smaller context=, or more text"
                )

    @property
    def vocab_size(self) -> int:
        """How many tokens there are: each number is below it."""
        return self.tokens.size

    @property
    def vocab(self) -> tuple[str | bytes, ...]:
        """The tokens, in the order of their numbers: characters, bytes, or as a tokenizer calls them."""
        return self.tokens.vocab

    def encode(self, text: str) -> Tensor:
        """Text -> [tokens] int64. Raises `ValueError` for a character that has no number."""
        return torch.from_numpy(self.tokens.encode(text))

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """[tokens] -> text. Raises `ValueError` for a number that is no token's."""
        return self.tokens.decode(ids.tolist() if isinstance(ids, Tensor) else ids)

    @property
    def train_x(self) -> Tensor:
        """The training text in consecutive windows, [n, context] int64, without what is left at its end."""
        return self._consecutive(self.train, 0)

    @property
    def train_y(self) -> Tensor:
        """The tokens one position later than those of `train_x`."""
        return self._consecutive(self.train, 1)

    @property
    def test_x(self) -> Tensor:
        """The text for testing in consecutive windows, [n, context] int64, without what is left at its end."""
        return self._consecutive(self.test, 0)

    @property
    def test_y(self) -> Tensor:
        """The tokens one position later than those of `test_x`."""
        return self._consecutive(self.test, 1)

    def _consecutive(self, text: Tensor, later: int) -> Tensor:
        n = (len(text) - 1) // self.context
        return text[later : later + n * self.context].long().view(n, self.context)

    def starts(self, generator: torch.Generator | None) -> Tensor:
        """Where the windows of an epoch begin, [n]: as many as fit into the text beside each other.

        Args:
            generator: Draws those of the training text. None for the text for testing, whose windows are consecutive
                and in order.
        """
        text = self.test if generator is None else self.train
        n = (len(text) - 1) // self.context
        if generator is None:
            return torch.arange(n) * self.context
        if self.windows == "consecutive":
            return torch.randperm(n, generator=generator) * self.context
        return torch.randint(len(text) - self.context, (n,), generator=generator)

    def window(self, starts: Tensor, *, testing: bool) -> tuple[Tensor, Tensor]:
        """The windows that begin at some places: x and y, [rows, context] int64 each.

        Args:
            starts: The places, [rows].
            testing: Whether they are places of the text for testing.
        """
        text = self.test if testing else self.train
        at = starts[:, None] + torch.arange(self.context)  # [rows, t]
        return text[at].long(), text[at + 1].long()

    def __repr__(self) -> str:
        (train, test), sizes = self.splits, (f"{len(text):,}" for text in (self.train, self.test))
        return (
            f"TextData({self.name!r}, training: {next(sizes)} tokens of {train}; testing: {next(sizes)} of {test}; "
            f"{self.vocab_size:,} different ones; windows of {self.context})"
        )


def load_text(
    source: str | Path | None, *, tokens: Any = None, context: int | None = None, windows: str | None = None,
    splits: Sequence[str] | None = None, subset: str | None = None, columns: Sequence[str] | None = None,
    test_share: float | None = None,
) -> TextData:  # fmt: skip
    """`lk.load("text", source)`: see there.

    Raises:
        DataNotFound: There is no such text.
        ValueError: An argument cannot be used, or the text is too short.
    """
    tokens, context = "characters" if tokens is None else tokens, CONTEXT if context is None else context
    windows = WINDOWS[0] if windows is None else windows
    if isinstance(context, bool) or not isinstance(context, numbers.Integral) or context < 1:
        raise ValueError(f"context={context!r}: how many positions a window has, a whole number of at least 1")
    if windows not in WINDOWS:
        raise ValueError(one_of("windows", windows, WINDOWS))
    if splits is not None and (isinstance(splits, str) or len(splits) != 2 or splits[0] == splits[1]):
        raise ValueError(f"splits={splits!r}: the names of two, one to train on and one to test on: ('train', 'valid')")
    tokens_of(tokens, ["a"])  # what is none is refused before anything is read
    name, texts = _read(source, subset, columns, as_bytes=tokens == "bytes")
    named, (train, test) = _two(name, texts, splits, test_share)
    made = tokens_of(tokens, [train, test])
    ids = [made.encode(text) for text in (train, test)]
    small = made.size <= 256
    train_ids, test_ids = (torch.from_numpy(part.astype(np.uint8 if small else np.int32)) for part in ids)
    return TextData(name, train_ids, test_ids, int(context), windows, named, made)


# ---------------------------------------------------------------- which text is for what


def _two(
    name: str, texts: Mapping[str, str | bytes], splits: Sequence[str] | None, test_share: float | None
) -> tuple[tuple[str, str], tuple[str | bytes, str | bytes]]:
    """The text for training and the one for testing, and what they are."""
    there = ", ".join(split for split in texts if split != WHOLE) or "none"
    train = next((split for split in TRAIN if split in texts), None)
    test = next((split for split in HELD_OUT if split in texts), None)
    if splits is not None:
        if unknown := next((split for split in splits if split not in texts), None):
            raise ValueError(
                f"splits: {name} has none called {unknown!r}; it has {there}{did_you_mean(unknown, texts)}"
            )
        train, test = splits
    elif len(texts) == 1:  # whatever it is called
        (train,) = texts
        test = None
    elif train is None:
        train, test = sorted((split for split in texts if split in HELD_OUT), key=HELD_OUT.index)[:2]
        logger.warning("%s has no text called train: this is trained on %s, and tested on %s", name, train, test)
    assert train is not None
    if test is not None:
        if test_share is not None:
            raise ValueError(f"{name} has a text for testing already ({test}): leave test_share out")
        return (train, test), (texts[train], texts[test])
    share = TEST_SHARE if test_share is None else test_share
    if isinstance(share, bool) or not 0 < share < 1:
        raise ValueError(f"test_share={share}: a share of the text, between 0 and 1, such as 0.1")
    whole, held = texts[train], f"{share:.3g}"
    end = len(whole) - int(len(whole) * share)
    what = train or "the text"
    return (f"{what} but its end", f"the last {held} of {what}"), (whole[:end], whole[end:])


# ---------------------------------------------------------------- where a text comes from


def _read(
    source: str | Path | None, subset: str | None, columns: Sequence[str] | None, *, as_bytes: bool
) -> tuple[str, dict[str, str | bytes]]:
    """The name of a text, and its splits."""
    if columns is not None and (isinstance(columns, str) or len(columns) != 1):
        raise ValueError(f"columns={columns!r}: for text, a list with the one column that holds it: columns=['text']")
    if source is None:
        return "python", {WHOLE: _of_python()}
    path = user_path(source, "data_dir")
    name = path.name.split(".")[0] or path.name
    if path.is_file():
        if not path.name.lower().endswith(TABLES):
            return name, {WHOLE: _content([path], as_bytes)}
        return name, {WHOLE: _column(read_splits(name, path)["train"], columns)}
    if path.is_dir():
        if texts := _of_folder(path):
            return name, {split: _content(files, as_bytes) for split, files in texts.items()}
        try:
            tables = read_splits(name, path)
        except DataNotFound as error:
            raise DataNotFound(f"no text in {path}: it has no {', '.join(TEXTS)} file; and {error}") from None
        return name, {split: _column(table, columns) for split, table in tables.items()}
    if isinstance(source, Path) or is_path(source) or source.lower().endswith(TEXTS):
        raise DataNotFound(f"no text here: there is no file or folder {path}")
    full, loaded = from_hub(source, subset, files="its texts, train.txt and valid.txt")
    return full.rpartition("/")[2], _of_hub(full, loaded, columns)


def _of_python() -> str:
    """The language reference, which comes with Python as what `help` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions leave it out
        raise DataNotFound(
            "this Python comes without its reference, which lk.load('text') reads where no other text is named: "
            "name a file or folder, data_dir=…"
        ) from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def _of_folder(folder: Path) -> dict[str, list[Path]]:
    """The text files of each split, or all of them if none is called like a split."""
    here = sorted(path for path in folder.iterdir() if path.name[0] not in "._")
    files = [path for path in here if path.is_file() and path.name.lower().endswith(TEXTS)]
    found: dict[str, list[Path]] = {}
    for path in files:
        words = re.split(r"[^a-z]+", path.name.lower())
        if split := next((word for word in words if word in (*TRAIN, *HELD_OUT)), None):
            found.setdefault(split, []).append(path)
    for path in here:
        if path.is_dir() and path.name.lower() in (*TRAIN, *HELD_OUT):
            below = sorted(file for file in path.rglob("*") if file.name.lower().endswith(TEXTS) and file.is_file())
            if below:
                found.setdefault(path.name.lower(), []).extend(below)
    whole = [path for path in files if not path.name.lower().startswith(ABOUT)]
    return found or ({WHOLE: whole} if whole else {})


def _content(files: Iterable[Path], as_bytes: bool) -> str | bytes:
    """The files, one after the other."""
    parts = []
    for path in files:
        try:
            parts.append(path.read_bytes())
        except OSError as error:
            raise DataNotFound(f"{path} cannot be read: {error.strerror or error}") from error
    content = b"".join(parts)
    if as_bytes:
        return content
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        names = ", ".join(path.name for path in files)
        raise ValueError(
            f"{names}: byte {error.start} is no UTF-8, as text has to be; tokens='bytes' takes any"
        ) from None


def _of_hub(name: str, loaded: Any, columns: Sequence[str] | None) -> dict[str, str | bytes]:
    """The text of each split of a `datasets.DatasetDict`."""
    splits = loaded if isinstance(loaded, Mapping) else {WHOLE: loaded}
    return {
        split: _column(Split(name, split, rows.with_format("arrow")[:], rows.features.to_dict()), columns)
        for split, rows in splits.items()
    }


def _column(split: Split, columns: Sequence[str] | None) -> str:
    """The rows of the column that holds text, each on a line of its own."""
    import pyarrow.types as types

    names = [
        field.name for field in split.table.schema if types.is_string(field.type) or types.is_large_string(field.type)
    ]
    if columns is not None:
        (wanted,) = columns
    elif "text" in names or len(names) == 1:
        wanted = "text" if "text" in names else names[0]
    else:
        said = f"the columns {', '.join(names)} are" if names else "no column is"
        raise ValueError(f"{split.dataset}: {said} text in {split.files}; say which one it is: columns=['…']")
    if wanted not in names:
        raise ValueError(
            f"{split.dataset}: {split.files} has no column of text called {wanted!r}; it has "
            f"{', '.join(names) or 'none'}{did_you_mean(wanted, names)}"
        )
    rows = (str(row or "") for row in split.column(wanted).to_pylist())
    return "".join(row if row.endswith("\n") else f"{row}\n" for row in rows)
