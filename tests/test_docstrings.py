"""What shift-tab shows in a notebook: the docstrings of everything public fit its tooltip and name every parameter."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import pytest

import labkit as lk
from labkit.launch.handle import ServerHandle
from labkit.training.run import Run
from labkit.training.validation import Best, TrainingStep, Validation
from labkit.view.log.loggers import RichLogger
from labkit.view.log.swarm_logging import Logging
from labkit.view.picture.canvas import Picture

WIDTH = 90  # characters of a line that fit into JupyterLab's tooltip
MADE_BY_LABKIT = (ServerHandle, Run, Picture)  # which users are given, and do not make themselves
PUBLIC = [
    *(getattr(lk, name) for name in lk.__all__ if name not in ("__version__", "losses")),
    lk.losses.cross_entropy, lk.losses.next_token, lk.losses.each_token, lk.losses.binary_cross_entropy,
    lk.losses.mse, lk.losses.mae,
    TrainingStep, Validation, Best, ServerHandle, Run, RichLogger,
    Logging, Picture,
]  # fmt: skip


def documented() -> Iterator[tuple[str, object]]:
    """Everything public with a docstring of its own: functions, classes, and the public members of classes."""
    for thing in PUBLIC:
        yield thing.__qualname__, thing
        if inspect.isclass(thing):
            members: dict[str, object] = {}
            for base in reversed(thing.__mro__):  # what is inherited from classes of ours, too
                members |= vars(base) if base.__module__.startswith("labkit") else {}
            for name, member in members.items():
                method = isinstance(member, (staticmethod, classmethod, property)) or inspect.isfunction(member)
                if method and not name.startswith("_"):
                    yield f"{thing.__qualname__}.{name}", getattr(member, "__func__", member)


def parameters(thing: object) -> list[str]:
    """What a user may pass, but for what begins with an underscore."""
    if (
        isinstance(thing, property)
        or thing in MADE_BY_LABKIT
        or (inspect.isclass(thing) and issubclass(thing, Exception))
    ):
        return []
    known = inspect.signature(thing).parameters  # type: ignore[arg-type]
    return [name for name in known if name not in ("self", "cls") and not name.startswith("_")]


@pytest.mark.parametrize(
    ("name", "thing"), list(documented()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_docstring_fits_the_tooltip_and_names_every_parameter(name, thing):
    text = inspect.getdoc(thing) or ""
    assert text, f"{name} has no docstring"
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []
    wanted = parameters(thing)
    named = set(re.findall(r"^    \*{0,2}(\w+)[:,]", text, re.MULTILINE))
    if "\nOptions" in text:
        named.add("options")  # each of them has a line
    if len(wanted) > 1:
        assert [parameter for parameter in wanted if parameter not in named] == []
