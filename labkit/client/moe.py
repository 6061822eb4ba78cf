"""The MoE layer: a mixture of experts whose experts live elsewhere (paper, section 3.1), as a torch module.

A batch enters the network here and comes back here. Gating scores are computed locally; `client/dispatch` finds and
calls the experts; the average over those that answered is plain autograd again, so the gate's gradient is exact.
"""

# b...: leading shape of the input; n: rows, or sequences, = all of them; seq: positions of a sequence; k: k_best;
# size: of one grid dimension; dim: of a row, or of a position

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.client.dispatch import DispatchConfig, Dispatched, dispatch_forward
from labkit.client.expert_client import for_the_wire
from labkit.client.frozen import stand_ins
from labkit.client.inputs import check_finite, check_tensors
from labkit.client.outside_graphs import outside_graphs
from labkit.client.passing import Passing, differentiable
from labkit.client.pooling import Pool, check_pool, pool_name, pooled
from labkit.client.session import Session, find_session
from labkit.expert_protocol import MAX_TENSORS
from labkit.expert_uid import check_grid, check_name
from labkit.suggest import one_of

ROUTINGS = ("softmax", "switch")
SEQ = -1  # a size of an output's shape where a layer over sequences has the positions of its input
_DROPPED_PENALTY = 1e9  # subtracted from the scores of dropped coordinates


class MixtureOfExperts(nn.Module):
    """A layer over the experts of a swarm: [..., dim] -> [..., out].

    `swarm.moe` makes one. Each row goes to the `k_best` live experts with the highest grid
    scores. Its output is the softmax-weighted mean over those that answered. `moe(x, y, …)`
    hands the experts further inputs [..., *] beside x, `moe(x, mask=m)` by keyword. A
    forward pass raises `NoExperts` or `NotEnoughExperts`, and a backward pass the latter; an
    output is never NaN.

    A backward pass trains the experts if it computes the gradients of the gate. So
    `requires_grad_(False)` freezes the experts, too, and `torch.autograd.grad(score, x)` asks
    them for the gradients of their inputs only.

    With `sequences=True` a row is a whole sequence: [..., seq, dim] -> [..., seq, out]. The
    gate decides once for each, and experts see [rows, seq, dim]. Further inputs, such as a
    mask [..., seq] of what is no padding, begin with the shape before seq. One batch may have
    longer sequences than another.

    Example:
        moe = swarm.moe(256, grid=(4, 4), k_best=4)
        moe(torch.randn(32, 256)).sum().backward()  # trains the experts, too

    Args:
        dim: Size of the last dimension of the input.
        grid: Sizes of the expert grid, such as (4, 4). The gate has one map for each
            dimension.
        name: Name of the grid, the first part of its experts' uids. Default "ffn".
        swarm: Name of the swarm, which has to be open when the layer is called. Default
            "default".
        out: Width of the output; default None: that of the input. Several widths where the
            experts have several outputs: then the layer returns a tuple of outputs. Of
            sequences a width is that of each position; a shape, as in `out=[(10,)]`, is that
            of the output for a whole sequence, and -1 stands in it for seq.
        routing: "softmax" (default), or "switch": weights are the gate's probabilities, as in
            the Switch Transformer; meant for k_best=1.
        jitter: In training, the gate's input is multiplied by random factors, 1 ± jitter.
            Default 0.
        grid_dropout: In training, the share of grid coordinates that a batch does without.
            Default 0.
        train_experts: Whether backward passes train the experts. Default None: those that
            compute the gradients of the gate.
        sequences: Whether rows are whole sequences. Default False.
        pool: What the gate decides on, for sequences: the "mean" (default) of the positions,
            or the "first" one, among those that `mask=` says are there, if it is an input. Or
            a function or module of x [n, seq, dim], and of those further inputs, by keyword,
            that it has parameters for; it returns [n, dim]. A mean sees the whole sequence,
            so the choice of experts tells each position something of those after it.
        dispatch: How many experts a row is sent to, and how long it waits: see
            `DispatchConfig`. By default four experts, or all if there are fewer.

    Attributes:
        balance_loss: Load-balancing loss of the last forward pass: a scalar tensor, 1 for an
            even load, whose gradient reaches the gate. None before the first pass.
        gate: The linear layer that gives the grid scores.
        train_experts: As above; it may be changed at any time.

    Raises:
        ValueError: A value cannot be used.
    """

    def __init__(
        self,
        dim: int,
        grid: Sequence[int],
        name: str = "ffn",
        *,
        swarm: str = "default",
        out: int | Sequence[int | Sequence[int]] | None = None,
        routing: str = "softmax",
        jitter: float = 0.0,
        grid_dropout: float = 0.0,
        train_experts: bool | None = None,
        sequences: bool = False,
        pool: Pool = "mean",
        dispatch: DispatchConfig | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.grid = check_grid(grid)
        self.name = check_name(name)
        self.swarm = swarm
        self.output_shapes = output_shapes(dim if out is None else out, sequences)
        self.dispatch = dispatch or DispatchConfig(k_best=min(4, math.prod(self.grid)))
        if routing not in ROUTINGS:
            raise ValueError(one_of("routing", routing, ROUTINGS))
        if not 0 <= jitter < 1 or not 0 <= grid_dropout < 1:
            raise ValueError(f"jitter={jitter!r}, grid_dropout={grid_dropout!r}: shares of at least 0 and below 1")
        if self.dispatch.k_best > math.prod(self.grid):
            raise ValueError(f"k_best={self.dispatch.k_best}, but the grid {self.grid} has only {math.prod(self.grid)}")
        if train_experts not in (None, True, False):
            raise ValueError(f"train_experts={train_experts!r}: True, False, or None for as the gate is trained")
        if sequences not in (True, False) or (pool != "mean" and not sequences):
            raise ValueError(f"sequences={sequences!r}, pool={pool!r}: True or False, and a pool for sequences only")
        self.sequences = sequences
        self.pool = check_pool(pool)
        self.routing = routing
        self.jitter = jitter
        self.grid_dropout = grid_dropout
        self.train_experts = train_experts
        self.gate = nn.Linear(dim, sum(self.grid))
        self.balance_loss: Tensor | None = None

    @outside_graphs
    def forward(self, x: Tensor, *others: Tensor, **keywords: Tensor) -> Any:
        """Compute one batch: 1. grid scores, 2. experts, 3. their weights, 4. the weighted mean.

        Args:
            x: Input [..., dim], on which the gate decides; or sequences [..., seq, dim].
            *others: Further inputs [..., *] for the experts.
            **keywords: Further inputs [..., *], which the experts get by keyword.

        Returns:
            The output [..., out], or [..., seq, out], on the device and of the dtype of x (under
                autocast, of its dtype). Where the experts have several outputs, a tuple of them.

        Raises:
            NoExperts: The grid has no live expert.
            NotEnoughExperts: A row got fewer than `k_min` answers.
            NonFiniteTensor: There is NaN or infinity among the further inputs, or in sequences.
            ValueError: It is in rows x, or shapes do not fit.
            SwarmClosed: The swarm is not open in this process.
        """
        check_tensors(f"the layer over the grid {self.name!r}", (x, *others), keywords)
        if x.shape[-1] != self.dim:
            raise ValueError(f"the input's last dimension is {self.dim} here; got a tensor of shape {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(
                f"the gate decides on floating-point numbers; got {x.dtype}. Hand tokens and the like over as further "
                "inputs"
            )
        if self.sequences and (x.ndim < 2 or x.shape[-2] == 0):
            raise ValueError(f"the input is [..., seq, {self.dim}] with at least one position; got {list(x.shape)}")
        row = x.shape[-2:] if self.sequences else x.shape[-1:]  # [dim] or [seq, dim]
        leading = x.shape[: -len(row)]  # b...
        further = (*others, *keywords.values())
        if any(other.shape[: len(leading)] != leading for other in further):
            got = ", ".join(str(list(other.shape)) for other in further)
            raise ValueError(f"all inputs begin with the same shape, {list(leading)} here; the further ones are {got}")
        n = math.prod(leading)
        inputs = [tensor.reshape(n, *tensor.shape[len(leading) :]) for tensor in (x, *further)]  # [n, ...]
        named = dict(zip(keywords, inputs[len(inputs) - len(keywords) :], strict=True))
        scores = self.grid_scores(inputs[0], **named)  # 1: [n, size] for each dimension
        session = find_session(self.swarm)
        sent, outputs = self._ask(session, inputs, tuple(keywords), scores)  # 2: [n, k, *out]
        weights = self.weights([score.to(outputs[0].dtype) for score in scores], sent)  # 3: [n, k]
        self.balance_loss = balance_loss(scores, sent)
        means = [weighted_mean(weights, output, x.dtype) for output in outputs]  # 4: [n, *out]
        shaped = tuple(mean.reshape(*leading, *mean.shape[1:]) for mean in means)
        return shaped if len(shaped) > 1 else shaped[0]

    def grid_scores(self, rows: Tensor, /, **further: Tensor) -> list[Tensor]:
        """The scores of each dimension's coordinates, [n, size] each.

        Args:
            rows: Rows [n, dim]; or sequences [n, seq, dim].
            **further: The inputs beside sequences, by keyword: a mask counts.
        """
        rows = pooled(self.pool, rows, further) if self.sequences else rows
        if self.training and self.jitter:
            rows = rows * torch.empty_like(rows).uniform_(1 - self.jitter, 1 + self.jitter)
        return list(self.gate(rows).split(self.grid, dim=1))

    def _ask(
        self, session: Session, inputs: Sequence[Tensor], keywords: tuple[str, ...], scores: Sequence[Tensor]
    ) -> tuple[Dispatched, tuple[Tensor, ...]]:
        searched = [score.detach().cpu() for score in scores]
        if self.training and self.grid_dropout:
            searched = [_drop(score, self.grid_dropout) for score in searched]
        local = [for_the_wire(tensor) for tensor in inputs]
        if self.sequences:
            check_finite(self.name, "inputs", local)
        else:
            check_finite(self.name, "further inputs", local[1:])  # (The search sees what x holds, by its scores.)
        shapes = [tuple(local[0].shape[1] if size == SEQ else size for size in shape) for shape in self.output_shapes]
        sent, outputs = session.run(
            dispatch_forward, session, self.dispatch, self.name, local, searched, shapes, keywords
        )
        passing = Passing(session, self.dispatch, sent, keywords, self.train_experts)
        if self.train_experts is None:
            passing.gate = stand_ins(self.gate.parameters())
        return sent, differentiable(passing, outputs, inputs)  # [n, k, *out], in full precision

    def weights(self, scores: Sequence[Tensor], sent: Dispatched) -> Tensor:
        """The weights of the experts that answered each row, differentiable; 0 for others.

        Args:
            scores: Grid scores, [n, size] for each dimension.
            sent: Which experts were asked, and which answered.

        Returns:
            Weights [n, k].
        """
        device = scores[0].device
        coordinates, answered = sent.coordinates.to(device), sent.answered.to(device)
        if self.routing == "switch":
            scores = [torch.log_softmax(score, dim=1) for score in scores]
        total = sum(score.gather(1, coordinates[:, :, d]) for d, score in enumerate(scores))
        assert isinstance(total, Tensor)  # [n, k], the scores of the chosen experts
        if self.routing == "switch":
            return total.exp() * answered
        # Rows without an answer must not reach the softmax: it would give NaN there.
        lowest = torch.finfo(total.dtype).min
        return torch.softmax(total.masked_fill(~answered, lowest), dim=1) * answered

    def extra_repr(self) -> str:
        shapes = [shape[1:] if self.sequences and shape[0] == SEQ else shape for shape in self.output_shapes]
        widths = ", ".join("x".join(map(str, shape)) for shape in shapes)
        out = "" if self.output_shapes == output_shapes(self.dim, self.sequences) else f"out={widths}, "
        if self.sequences:
            out += f"sequences=True, pool={pool_name(self.pool)}, "
        return (
            f"{self.dim}, {out}grid={self.grid}, name={self.name!r}, k_best={self.dispatch.k_best}, "
            f"swarm={self.swarm!r}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # The last batch's graph is no part of the layer, and cannot be copied.
        return {**self.__dict__, "balance_loss": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        older: dict[str, Any] = {
            "output_shapes": ((state["dim"],),), "train_experts": None, "sequences": False,
        }  # fmt: skip
        if "pool" not in state.get("_modules", {}):
            older["pool"] = "mean"
        super().__setstate__({**older, **state})  # type: ignore[no-untyped-call]


def output_shapes(out: int | Sequence[int | Sequence[int]], sequences: bool = False) -> tuple[tuple[int, ...], ...]:
    """The shape of one row of each output: `out` is a width, or several widths or shapes. Raises `ValueError`.

    Of sequences a width is that of each position, and `SEQ` in a shape stands for their number.
    """
    each = [out] if isinstance(out, int) else list(out)
    shapes = tuple((*([SEQ] if sequences else []), one) if isinstance(one, int) else tuple(one) for one in each)
    whole = all(
        isinstance(size, int) and (size >= 1 or (sequences and size == SEQ)) for shape in shapes for size in shape
    )
    if not (whole and 1 <= len(shapes) <= MAX_TENSORS):
        raise ValueError(f"out={out!r}: a width of at least 1, or 1 to {MAX_TENSORS} of them")
    return shapes


def weighted_mean(weights: Tensor, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [n, k] and outputs [n, k, *out] -> their mean [n, *out], of type `dtype` or, under autocast, of its type.

    It is computed in the precision of the answers: in half precision a large one is infinite, and NaN where its weight
    is 0. A mean beyond the range of the result's type is clamped to it, and has no gradient there.
    """
    device = outputs.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            narrow = dtype if dtype == torch.float64 else torch.get_autocast_dtype(device)
            return weighted_mean(weights, outputs, narrow)
    mean = torch.einsum("nk,nk...->n...", weights, outputs)
    return mean if mean.dtype == dtype else mean.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


def balance_loss(scores: Sequence[Tensor], sent: Dispatched) -> Tensor:
    """Load-balancing loss (Switch Transformer, eq. 4), averaged over the grid dimensions: size * Σ_i f_i P_i for each.

    f_i is the share of choices that fell on coordinate i, P_i its mean probability. The loss is 1 for an even load; its
    gradient reaches the gate through P.
    """
    device = scores[0].device
    chosen = (sent.choice >= 0).to(device)
    losses = []
    for d, score in enumerate(scores):
        n, size = score.shape
        probability = torch.softmax(score, dim=1, dtype=torch.float32).sum(0) / max(n, 1)  # P: [size]
        counts = torch.bincount(sent.coordinates[:, :, d].to(device)[chosen], minlength=size)
        losses.append(size * (counts / counts.sum().clamp(min=1) * probability).sum())
    return torch.stack(losses).mean()


def _drop(scores: Tensor, share: float) -> Tensor:
    """Put a share of the coordinates behind all others, for the whole batch: [n, size] -> [n, size].

    They are not excluded: where the others have too few live experts, these are better than none.
    """
    dropped = torch.rand(scores.shape[1]) < share
    return scores.double() - dropped * _DROPPED_PENALTY
