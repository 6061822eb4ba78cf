"""labkit: train a mixture of experts over a swarm of slow, unreliable machines, and watch it, from a notebook.

    import labkit as lk

    swarm = lk.Swarm()
    swarm.serve("ffn", hidden=256, grid=(4, 4), servers=4)
    model = nn.Sequential(nn.Linear(784, 256), swarm.moe(256, grid=(4, 4), k_best=4), nn.Linear(256, 10))
    run = lk.fit(model, (x, y), epochs=1, trainers=8)
    swarm.dashboard()

Names are imported when they are first used, so that `import labkit` is quick.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Swarm": "swarm",
    "fit": "training.fit",
    "resume": "resuming",
    "JsonlLogger": "view.log.loggers",
    "WandbLogger": "view.log.loggers",
    "evaluate": "training.metrics",
    "TrainConfig": "training.trainer",
    "load": "training.datasets",
    "register_expert": "server.layers",
    "BackendConfig": "server.optimizer",
    "DispatchConfig": "client.dispatch",
    "MixtureOfExperts": "client.moe",
    "RemoteExpert": "client.expert",
    "RelayLimits": "relay.limits",
    "LabkitError": "errors",
    "DataNotFound": "errors",
    "JoinError": "errors",
    "ExpertsTaken": "errors",
    "InviteError": "errors",
    "NoExperts": "errors",
    "NotEnoughExperts": "errors",
    "RPCError": "errors",
    "ServerFailed": "errors",
    "SwarmClosed": "errors",
    "TrainingFailed": "errors",
}
_MODULES = {"losses": "training.losses"}
__all__ = ["__version__", *_HOME, *_MODULES]

if TYPE_CHECKING:
    from labkit.client.dispatch import DispatchConfig as DispatchConfig
    from labkit.client.expert import RemoteExpert as RemoteExpert
    from labkit.client.moe import MixtureOfExperts as MixtureOfExperts
    from labkit.errors import DataNotFound as DataNotFound
    from labkit.errors import ExpertsTaken as ExpertsTaken
    from labkit.errors import InviteError as InviteError
    from labkit.errors import JoinError as JoinError
    from labkit.errors import LabkitError as LabkitError
    from labkit.errors import NoExperts as NoExperts
    from labkit.errors import NotEnoughExperts as NotEnoughExperts
    from labkit.errors import RPCError as RPCError
    from labkit.errors import ServerFailed as ServerFailed
    from labkit.errors import SwarmClosed as SwarmClosed
    from labkit.errors import TrainingFailed as TrainingFailed
    from labkit.relay.limits import RelayLimits as RelayLimits
    from labkit.resuming import resume as resume
    from labkit.server.layers import register_expert as register_expert
    from labkit.server.optimizer import BackendConfig as BackendConfig
    from labkit.swarm import Swarm as Swarm
    from labkit.training import losses as losses
    from labkit.training.datasets import load as load
    from labkit.training.fit import fit as fit
    from labkit.training.metrics import evaluate as evaluate
    from labkit.training.trainer import TrainConfig as TrainConfig
    from labkit.view.log.loggers import JsonlLogger as JsonlLogger
    from labkit.view.log.loggers import WandbLogger as WandbLogger


def __getattr__(name: str) -> object:
    home = _HOME.get(name) or _MODULES.get(name)
    if home is None:
        # With the name, since Python suggests one itself where the name is missing: twice is too often.
        raise AttributeError(f"module 'labkit' has no attribute {name!r}{_meant(name)}", name=name)
    with quick_imports():
        module = importlib.import_module(f"labkit.{home}")
        value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def _meant(name: str) -> str:
    from labkit.suggest import did_you_mean

    return "" if name.startswith("_") else did_you_mean(name, __all__)


@contextmanager
def quick_imports() -> Iterator[None]:
    """In this block torch is imported in two thirds of the time, since nothing is collected as garbage.

    The collector would go through everything that has been imported, again and again, and find no garbage.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def __dir__() -> list[str]:
    return sorted(__all__)
