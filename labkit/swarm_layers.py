"""The layers of a swarm: `swarm.moe`, `swarm.expert`, and what they go by, the grids and experts that are served.

A batch enters the network in what is made here: see `client/moe` and `client/expert`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from labkit.client.dispatch_config import DispatchConfig
from labkit.client.expert import RemoteExpert
from labkit.client.fitting import fitting_outputs, known_sizes
from labkit.client.in_models import move_to
from labkit.client.moe import MixtureOfExperts
from labkit.directory.grids import GridInfo
from labkit.expert_uid import ExpertInfo, check_grid, split_uid
from labkit.suggest import suggest_options
from labkit.swarm_lifecycle import SwarmLifecycle


class SwarmLayers(SwarmLifecycle):
    """What `Swarm` has for models: layers that call its experts."""

    @suggest_options
    def moe(
        self, dim: int, grid: Sequence[int] | None = None, name: str = "ffn", *, k_best: int | None = None,
        k_min: int = 1, out: int | Sequence[int | Sequence[int]] | None = None, forward_timeout: float = 10.0,
        backward_timeout: float = 10.0, timeout_after_k_min: float | None = None, allow_zero_outputs: bool = False,
        codec: str = "none", routing: str = "softmax", jitter: float = 0.0, grid_dropout: float = 0.0,
        train_experts: bool | None = None, sequences: bool = False, pool: str | Callable[..., Tensor] = "mean",
    ) -> MixtureOfExperts:  # fmt: skip
        """Returns a mixture-of-experts layer, [..., dim] -> [..., out], over a grid of this swarm.

        With `sequences=True` it sends whole sequences, [..., seq, dim] -> [..., seq, out], each
        to `k_best` experts, with further inputs such as a mask of what is no padding.

        Example:
            layer = swarm.moe(256, grid=(4, 4), k_best=4)
            block = swarm.moe(256, name="transformer", sequences=True)
            block(x, mask=mask)  # x: [batch, seq, 256], mask: [batch, seq]

        Args:
            dim: Width of its inputs.
            grid: Sizes of the grid, by default those that its servers declare.
            name: The grid's name.
            k_best: Experts that each row is sent to; by default four, or all if there are fewer.
            k_min: Answers that each row needs.
            out: Width of its outputs, by default what the servers declare, or else `dim`;
                several widths for experts with several outputs.
            forward_timeout: Longest time of a forward pass, in seconds.
            backward_timeout: Longest time of a backward pass, in seconds.
            timeout_after_k_min: Seconds left to experts that no row needs any more; by default
                what their latencies justify, at most one or so.
            allow_zero_outputs: Whether a row with fewer than `k_min` answers gives zeros, rather
                than `NotEnoughExperts`.
            codec: How tensors are compressed on the wire: "none", "float16", "bfloat16" or
                "blockwise8".
            routing: Weights of the outputs: "softmax" over a row's experts, or "switch", the
                gate's probabilities.
            jitter: The gate's inputs are multiplied by random factors within 1 ± jitter while
                training.
            grid_dropout: Share of the grid's coordinates that are left out at random while
                training.
            train_experts: Whether backward passes train the experts; by default those that
                compute the gradients of the layer's gate, so not where it is frozen.
            sequences: Whether a row is a whole sequence, for experts such as "transformer",
                rather than each position by itself.
            pool: What the gate decides on, for sequences: the "mean" (default) of the positions,
                or the "first" one, among those that `mask=` says are there; or a function of x
                [n, seq, dim], and of further inputs by keyword, that returns [n, dim]. A mean
                sees what is still to come: for the prediction of next tokens take "first".

        Raises:
            ValueError: No such grid is served and `grid` is left out, its sizes or the width of
                its experts are others, or an option is impossible.
        """
        grids = self.grids()
        sizes = check_grid(grid) if grid is not None else known_sizes(grids, name)
        if name in grids:
            try:
                out = fitting_outputs(dim, sizes, out, name, grids[name], sequences)
            except ValueError:
                if any(split_uid(uid)[0] == name for uid in self.experts()):
                    raise  # else nobody serves it any more, and it may be served anew in another way
        config = DispatchConfig(
            min(4, math.prod(sizes)) if k_best is None else k_best, k_min, forward_timeout, backward_timeout,
            timeout_after_k_min, allow_zero_outputs, codec,
        )  # fmt: skip
        return MixtureOfExperts(
            dim, sizes, name, swarm=self.name, out=out, routing=routing, jitter=jitter, grid_dropout=grid_dropout,
            train_experts=train_experts, sequences=sequences, pool=pool, dispatch=config,
        )  # fmt: skip

    @suggest_options
    def expert(
        self, uid: str, *, timeout: float = 10.0, codec: str = "none", train_expert: bool | None = None
    ) -> RemoteExpert:
        """Returns one expert as a module, [rows, ...] -> [rows, ...].

        Example:
            expert = swarm.expert("ffn.0.3")
            expert(torch.randn(8, 256)), expert.schema

        Args:
            uid: The expert, such as "ffn.0.3".
            timeout: Seconds that a call may take.
            codec: How tensors are compressed on the wire, "none" by default.
            train_expert: Whether backward passes train the expert; by default unless it is
                frozen: `requires_grad_(False)`.
        """
        return RemoteExpert(uid, self.name, timeout=timeout, codec=codec, train_expert=train_expert)

    def attach(self, model: nn.Module) -> nn.Module:
        """Let a model that was loaded or copied call this swarm's experts. Returns the model."""
        return move_to(model, self.name)

    def grids(self) -> dict[str, GridInfo]:
        """Returns the grids of this swarm, by name: their sizes and the kind of their experts."""
        return self._portal.call(self._node.directory.grids)

    def experts(self) -> dict[str, ExpertInfo]:
        """Returns all experts that are alive, by uid: where each of them is served."""
        return self._portal.call(self._node.directory.experts_of, self.grids())

    def experts_alive(self) -> int:
        """Returns how many experts are alive, as far as that is known here; asks no other node."""
        return self._portal.call(self._count_known)

    async def _count_known(self) -> int:
        return len(self._node.directory.known())
