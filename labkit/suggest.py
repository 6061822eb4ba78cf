"""Did you mean …? What is nearest to a word that is not known, for the errors that say so."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeVar

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Returns "; did you mean 'adam'?" for a word that is nearly one of the known ones, else an empty text."""
    close = nearest(word, known)
    return f"; did you mean {close!r}?" if close is not None else ""


def nearest(word: object, known: Iterable[str]) -> str | None:
    """Returns the known word that is nearest to this one; None if none is near."""
    if not isinstance(word, str):
        return None
    by_lower = {text.lower(): text for text in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def one_of(name: str, value: object, known: Iterable[str]) -> str:
    """Returns the text of an error about an option that is none of the known words."""
    known = list(known)
    return f"{name}={value!r}: one of {', '.join(known)}{did_you_mean(value, known)}"


def no_option(what: str, unknown: Iterable[str], known: Iterable[str]) -> str:
    """Returns the text of an error about options that `what` does not have."""
    known, unknown = list(known), sorted(unknown)
    close = did_you_mean(unknown[0], known)
    return f"{what} has no option {', '.join(unknown)}{f'{close} It' if close else '; it'} has {', '.join(known)}"


def suggest_fields(cls: C) -> C:
    """Let a dataclass answer an unknown keyword with the field that is nearest to it. Stands above `@dataclass`."""
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]
    known = [field.name for field in fields(cls) if field.init]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        if unknown := options.keys() - set(known):
            raise TypeError(no_option(cls.__name__, unknown, known))
        init(self, *args, **options)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def suggest_options(function: F) -> F:
    """Let a function or method answer an unknown keyword with the option that is nearest to it."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        if unknown := options.keys() - set(known):
            raise ValueError(no_option(function.__name__, unknown, known))
        return function(*args, **options)

    return checked  # type: ignore[return-value]
