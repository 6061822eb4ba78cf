"""Did you mean …? What is nearest to a word that is not known, for the errors that say so."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeVar

OTHER_WORDS = {  # of other libraries, with ours
    "learning_rate": "lr", "validation_data": "validate", "val_data": "validate", "eval_data": "validate",
    "eval_dataset": "validate", "valid": "validate", "val": "validate", "criterion": "loss", "loss_function": "loss",
    "callback": "on_step", "callbacks": "on_step", "gradient_accumulation_steps": "accumulate",
    "accumulate_grad_batches": "accumulate", "max_grad_norm": "clip_grad_norm", "gradient_clip_val": "clip_grad_norm",
    "grad_clip": "clip_grad_norm", "early_stopping": "patience", "num_workers": "trainers", "workers": "trainers",
    "eval_steps": "every", "warmup_steps": "warmup", "bs": "batch_size",
    "k": "k_best", "top_k": "k_best", "topk": "k_best", "num_experts": "experts", "n_experts": "experts",
    "num_experts_per_tok": "k_best", "hidden_size": "hidden", "hidden_dim": "hidden", "d_model": "hidden",
    "num_heads": "heads", "n_heads": "heads", "host": "listen", "port": "listen", "address": "listen",
    "per_device_train_batch_size": "batch_size", "num_train_epochs": "epochs", "random_state": "seed",
}  # fmt: skip

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
    meant = OTHER_WORDS.get(unknown[0])
    close = f"; did you mean {meant!r}?" if meant in known else did_you_mean(unknown[0], known)
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
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.name not in ("self", "cls")]
    shown = [name for name in known if not name.startswith("_")]
    by_place = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    open_ended = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        if len(args) > len(by_place) and not open_ended:
            taken = [name for name in by_place if name in known]
            pair = "; x and y are one value, (x, y)" if "data" in taken else ""
            raise TypeError(
                f"{function.__name__} takes {', '.join(taken)} by their places, and everything else by name{pair}"
            )
        if unknown := options.keys() - set(known):
            what = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
            raise ValueError(no_option(what, unknown, shown))
        return function(*args, **options)

    return checked  # type: ignore[return-value]
