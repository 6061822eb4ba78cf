"""How well a mixture of experts trains over a slow and unreliable network (paper, section 4.2), in virtual time.

The trainers of a run share one model, and each batch goes the same way as in a real swarm (`virtual_training`). The
authors' published emulation differs: it trains no gate, does not delay the experts' gradients, and uses Adam's usual
settings, while the runner's are chosen for stale gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.client.moe import MixtureOfExperts
from labkit.experiments.convergence_config import ConvergenceConfig as ConvergenceConfig
from labkit.experiments.virtual_training import SWARM_NAME, run_task
from labkit.experiments.virtual_training import History as History
from labkit.server.layers import FeedForward
from labkit.training.datasets import ClassificationData, batches
from labkit.training.trainer import evaluate

EVALUATION_BATCH = 1000  # samples


def run(
    config: ConvergenceConfig, data: ClassificationData, progress: Callable[[int], None] = lambda updates: None
) -> History:
    """Do a run, as fast as this machine computes. On CPUs the same config and data give the same history.

    Args:
        config: The run.
        data: What to train on.
        progress: Called with the number of updates, after each update.

    Raises:
        ValueError: More samples are held out than there are, the device is not available, or so many calls fail that
            the run would hardly ever end.
    """
    if config.validation >= len(data.train_x):
        raise ValueError(f"validation={config.validation}: there are {len(data.train_x)} training samples in all")
    return run_task(config, partial(Classification, config, data), progress)


def make_model(config: ConvergenceConfig, dim: int, classes: int) -> nn.Module:
    """Make the trunk with its layers of experts, or the dense network."""
    torch.manual_seed(config.seed)
    if config.model == "dense":
        width = 2 * config.width
        blocks: list[nn.Module] = [FeedForward(width) for _ in range(config.layers)]
    else:
        width = config.width
        dispatch = config.dispatch()
        blocks = [
            MixtureOfExperts(width, config.grid, f"layer{layer}", swarm=SWARM_NAME, dispatch=dispatch)
            for layer in range(config.layers)
        ]
    return nn.Sequential(nn.Linear(dim, width), *blocks, nn.LayerNorm(width), nn.Linear(width, classes))


class Classification:
    """The task of a run: images and their classes.

    Args:
        config: The run.
        data: What to train on.
    """

    def __init__(self, config: ConvergenceConfig, data: ClassificationData) -> None:
        training = len(data.train_x) - config.validation
        x, y = data.test_x, data.test_y
        if config.validation:
            x, y = data.train_x[training:], data.train_y[training:]
        self._evaluation_data = x.to(config.device), y.to(config.device)
        self.model = make_model(config, data.dim, data.classes).to(config.device)
        generator = torch.Generator().manual_seed(config.seed)
        self.batches = batches(data.train_x[:training], data.train_y[:training], config.batch_size, generator)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(outputs, y)

    def measure(self) -> float:
        """Accuracy on the test set, or on what was held out."""
        return evaluate(self.model, *self._evaluation_data, batch_size=EVALUATION_BATCH)
