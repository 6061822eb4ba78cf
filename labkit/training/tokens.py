"""Text as tokens: characters, bytes, or what a tokenizer of `tokenizers`, `transformers` or another library makes.

Where a batch of text comes from: `text.load_text` reads the texts, and has them encoded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from labkit.suggest import one_of

NAMES = ("characters", "bytes")
Ids = npt.NDArray[np.int64]  # [tokens]


class Tokens(Protocol):
    """How a text becomes numbers and comes back.

    Attributes:
        size: Numbers that there are: each is at least 0 and below it.
    """

    @property
    def size(self) -> int: ...

    @property
    def vocab(self) -> tuple[str | bytes, ...]:
        """The tokens, in the order of their numbers."""

    def encode(self, text: str | bytes) -> Ids:
        """Text -> [tokens]. Raises `ValueError` for what has no number."""

    def decode(self, ids: Sequence[int]) -> str:
        """[tokens] -> text. Raises `ValueError` for a number that is no token's."""


class Characters:
    """Each character that occurs in some texts is a token, in the order of Unicode.

    Args:
        texts: The texts.
    """

    def __init__(self, *texts: str) -> None:
        self._points = np.unique(np.concatenate([np.unique(_code_points(text)) for text in texts]))  # [size], sorted

    @property
    def size(self) -> int:
        """How many characters there are."""
        return len(self._points)

    @cached_property
    def vocab(self) -> tuple[str | bytes, ...]:
        """The characters, in the order of their numbers."""
        return tuple(map(chr, self._points))

    def encode(self, text: str | bytes) -> Ids:
        """Text -> [tokens]. Raises `ValueError` for a character that is not among them."""
        points = _code_points(text if isinstance(text, str) else text.decode())
        ids = np.searchsorted(self._points, points)
        unknown = (ids == self.size) | (self._points[np.minimum(ids, self.size - 1)] != points)
        if unknown.any():
            what = chr(points[unknown][0])
            raise ValueError(f"the character {what!r} does not occur in the text that was loaded, so it has no number")
        return ids.astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """[tokens] -> text."""
        return "".join(str(self.vocab[number]) for number in _checked(ids, self.size))


class Bytes:
    """Each byte of a text in UTF-8 is a token."""

    size = 256

    @cached_property
    def vocab(self) -> tuple[str | bytes, ...]:
        """The bytes, in the order of their numbers."""
        return tuple(bytes([number]) for number in range(self.size))

    def encode(self, text: str | bytes) -> Ids:
        """Text -> [tokens]."""
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """[tokens] -> text; bytes that are no UTF-8, as where a character is cut, become �."""
        return bytes(_checked(ids, self.size)).decode(errors="replace")


class Tokenizer:
    """A tokenizer of the user's, from whichever library it is.

    Args:
        tokenizer: Has `encode(text)`, which returns numbers or an object with `ids`, and `decode(ids)`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._most = -1  # the highest number seen

    @property
    def size(self) -> int:
        """How many tokens it says there are, or more if it gave higher numbers."""
        said = getattr(self.tokenizer, "n_vocab", None)  # tiktoken
        if hasattr(self.tokenizer, "get_vocab_size"):  # tokenizers
            said = self.tokenizer.get_vocab_size()
        elif hasattr(self.tokenizer, "__len__"):  # transformers
            said = len(self.tokenizer)
        return max(said or 0, self._most + 1)

    @cached_property
    def vocab(self) -> tuple[str | bytes, ...]:
        """The tokens as the tokenizer calls them; without names, as what each is decoded to."""
        if not hasattr(self.tokenizer, "get_vocab"):
            return tuple(str(self.tokenizer.decode([number])) for number in range(self.size))
        names = [""] * self.size
        for name, number in self.tokenizer.get_vocab().items():
            if number < len(names):
                names[number] = name
        return tuple(names)

    def encode(self, text: str | bytes) -> Ids:
        """Text -> [tokens], without what marks the beginning or end of a text."""
        options: dict[str, Any] = {}
        if hasattr(self.tokenizer, "get_vocab"):  # tokenizers and transformers
            options["add_special_tokens"] = False
            if hasattr(self.tokenizer, "model_max_length"):
                options["verbose"] = False  # this text becomes windows: it may be longer than what a model takes
        found = self.tokenizer.encode(text if isinstance(text, str) else text.decode(), **options)
        ids = np.asarray(getattr(found, "ids", found))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu") or (ids < 0).any():
            raise ValueError(
                f"tokens={type(self.tokenizer).__name__}: its encode(text) is to return a list of whole numbers, and "
                f"returned {type(found).__name__}"
            )
        self._most = max(self._most, int(ids.max(initial=-1)))
        return ids.astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """[tokens] -> text."""
        return str(self.tokenizer.decode(_checked(ids, self.size)))


def tokens_of(wanted: Any, texts: Sequence[str | bytes]) -> Tokens:
    """What `tokens=` of `lk.load` means, for some texts.

    Args:
        wanted: A name in `NAMES`, or a tokenizer.
        texts: The texts, of which the characters are taken.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(wanted, str):
        if wanted not in NAMES:
            raise ValueError(f"{one_of('tokens', wanted, NAMES)}, or a tokenizer, an object with encode and decode")
        return Characters(*map(str, texts)) if wanted == "characters" else Bytes()
    if isinstance(wanted, type) or not (hasattr(wanted, "encode") and hasattr(wanted, "decode")):
        raise ValueError(f"tokens={wanted!r}: one of {', '.join(NAMES)}, or a tokenizer, with encode and decode")
    return Tokenizer(wanted)


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _checked(ids: Sequence[int], size: int) -> list[int]:
    """The numbers as a list. Raises `ValueError` if one is no token's."""
    numbers = np.asarray(ids)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ValueError(f"the tokens of one text are needed, [tokens] whole numbers, not {list(numbers.shape)}")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= size):
        wrong = int(numbers.min()) if numbers.min() < 0 else int(numbers.max())
        raise ValueError(f"{wrong} is no token: there are {size}, from 0 to {size - 1}")
    return [int(number) for number in numbers]
