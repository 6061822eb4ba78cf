"""Callbacks for other people's training loops, which show them in a swarm's dashboard and in its loggers.

`TransformersCallback` is for the Trainer of Hugging Face, `LightningCallback` for that of Lightning. Each library is
imported when its callback is asked for. `reporting` is what both do with the numbers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {"TransformersCallback": "trainer_callback", "LightningCallback": "lightning"}

if TYPE_CHECKING:
    from labkit.integrations.lightning import LightningCallback as LightningCallback
    from labkit.integrations.trainer_callback import TransformersCallback as TransformersCallback


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOMES)
