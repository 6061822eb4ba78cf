"""Experts that no import finds, handed to a server process as code: classes of a notebook cell, lambdas, closures.

cloudpickle turns them into bytes, as Dask and joblib do. To read such bytes is to run what whoever wrote them wants. So
they are written here only for the child processes and the cluster workers that this user has started, and read only by
such a child, from its standard input. Nothing that came through the network of a swarm ever gets here;
`tests/test_layering.py` holds who imports this module and who calls `read`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

MODULE_LIMIT = 256 << 20  # bytes of one kind; what is larger has caught data by accident


@dataclass(frozen=True)
class HandedKind:
    """A kind of experts that is handed over as code.

    Args:
        name: Its name in checkpoints: the one under which it is registered, or that of its class or function.
        registered: Whether it has been given that name by `register_expert`.
        code: What `write` has made of its factory.
    """

    name: str
    registered: bool
    code: bytes

    @property
    def __name__(self) -> str:
        return self.name


def write(thing: Any) -> bytes:
    """Turn a factory, or options, into bytes for a process of one's own.

    Raises:
        ValueError: It cannot be; the text says why.
    """
    import cloudpickle  # here, since most swarms need none of it

    try:
        code: bytes = cloudpickle.dumps(thing)
    except Exception as error:  # whatever the pickling methods of the user's objects raise
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if len(code) > MODULE_LIMIT:
        raise ValueError(
            f"it takes {len(code) / 2**20:.0f} MiB with all that it refers to; let it load its data itself"
        )
    return code


def read(code: bytes) -> Any:
    """What `write` was given. Only for bytes of the process that has started this one.

    Raises:
        ValueError: It needs something that is not here.
    """
    import cloudpickle

    try:
        return cloudpickle.loads(code)
    except Exception as error:
        raise ValueError(
            f"what was handed over cannot be used in this process ({type(error).__name__}: {error}); a module of your "
            "own that it imports has to be there, too, and the same version of Python"
        ) from error


def is_by_value(module: str) -> bool:
    """Whether the user wants what is defined in this module handed over (`cloudpickle.register_pickle_by_value`)."""
    cloudpickle = sys.modules.get("cloudpickle")
    return cloudpickle is not None and module in cloudpickle.list_registry_pickle_by_value()
