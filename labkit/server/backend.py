"""An expert backend: one expert's module, its optimizer and its limits.

A batch's way out ends here: `server/batch` hands merged rows to `ExpertBackend.compute` on the compute thread.
Everything here is synchronous, knows nothing of requests or the network, and is called by one thread at a time.

Legend: rows = samples of a batch, always dimension 0 of every tensor; the other dimensions are the expert's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import BadRequest, CheckpointError, NonFiniteTensor
from labkit.expert_protocol import Direction
from labkit.server.optimizer import BackendConfig, laid_out, make_optimizer, optimizer_slots, take_step
from labkit.server.validation import (
    Schema,
    check_finite,
    checked_rows,
    describe,
    norm_of,
    schema_of,
    squares_finite,
)

MAX_SCHEMAS = 64  # callers choose schemas, so we remember few


class ExpertBackend:
    """One expert: `forward` returns outputs; `backward` returns input gradients and trains (paper, Runtime).

    The module takes one or more tensors [rows, ...] and returns one tensor [rows, ...]; each row's output must not
    depend on the other rows, since the runtime merges requests. It runs in eval mode in both directions unless
    `config.train_mode`: then the forward pass that backward repeats is the same one, to the bit, and merging changes
    nothing. With `train_mode=True` dropout draws anew in each pass. Only a backward pass changes buffers.

    Not thread-safe: one caller at a time.

    Args:
        uid: The expert's uid.
        module: The expert. It is moved to the configured device.
        config: How it is trained and what it accepts.
        kind: A name for what the module is, written into checkpoints; by default the name of its class.
    """

    def __init__(self, uid: str, module: nn.Module, config: BackendConfig | None = None, *, kind: str = "") -> None:
        self.uid = uid
        self.config = config or BackendConfig()
        self.kind = kind or type(module).__qualname__
        self.module = module.to(self.config.device).train(self.config.train_mode)
        self.updates = 0  # optimizer steps
        self.rows_processed = 0  # rows of all passes, forward and backward
        self.takes = str(getattr(module, "takes", ""))  # what to send, for error texts
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._pending: dict[str, Tensor] = {}  # gradients of the passes since the last step, when accumulating
        self._pending_passes = 0
        self._working_schemas: dict[Schema, None] = {}  # of inputs that have worked, newest last
        self._has_buffers = any(True for _ in module.buffers())
        self.optimizer = make_optimizer(list(self._parameters.values()), self.config)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of parameters and buffers, without those of the optimizer."""
        return sum(t.nbytes for t in (*self.module.parameters(), *self.module.buffers()))

    @property
    def state_bytes(self) -> int:
        """Bytes of `state` once there have been updates, except for a few numbers."""
        slots = [slot for slot in optimizer_slots(self.config) if slot != "step"]
        return self.parameter_bytes + len(slots) * sum(p.nbytes for p in self._parameters.values())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Outputs [rows, ...] on the CPU, without a gradient. Changes nothing.

        Raises `BadRequest`, `NonFiniteTensor`.
        """
        self.check("forward", inputs)
        check_finite(inputs)
        return self.compute("forward", inputs)[0]

    def backward(self, *inputs_then_grad_output: Tensor) -> list[Tensor]:
        """Take one optimizer step for these rows, and return the input gradients.

        Args:
            *inputs_then_grad_output: The inputs of the forward pass and the gradient of its output, each [rows, ...].
                The outputs are computed again, since nothing is kept between calls.

        Returns:
            The gradients of the floating-point inputs in their order, on the CPU.

        Raises:
            BadRequest: The tensors do not fit the expert.
            NonFiniteTensor: There is NaN or infinity among the numbers, or gradients overflow.

        After an error parameters, buffers, optimizer state and counters are what they were, to the bit.
        """
        self.check("backward", inputs_then_grad_output)
        check_finite(inputs_then_grad_output)
        return self.compute("backward", inputs_then_grad_output)

    def check(self, direction: str, tensors: Sequence[Tensor]) -> int:
        """The number of rows. Raises `BadRequest` if the tensors' shapes cannot be a request at all. Cheap."""
        return checked_rows(self.uid, direction, tensors, self.config.max_batch_size)

    def compute(
        self, direction: Direction, tensors: Sequence[Tensor], forward_updates: float | None = None
    ) -> list[Tensor]:
        """Do `forward` or `backward` with tensors that went through `check` and `check_finite` already.

        `forward_updates`: `updates` at the forward pass that a backward pass belongs to, if that is known.
        """
        tensors = [t.to(self.config.device) for t in tensors]
        results = [self._forward(tensors)] if direction == "forward" else self._backward(tensors, forward_updates)
        self.rows_processed += tensors[0].shape[0]
        return [t.detach().cpu().contiguous() for t in results]

    def _forward(self, inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad(), self._buffers_restored(always=True):
            output = self._call(inputs)
            check_finite([output], f"finite inputs gave expert {self.uid} an output")
        return output

    def _backward(self, tensors: Sequence[Tensor], forward_updates: float | None) -> list[Tensor]:
        *inputs, grad_output = tensors
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad(), self._buffers_restored(always=False):
            # 1. The forward pass again, this time with a graph.
            output = self._call(leaves)
            if output.shape != grad_output.shape or not grad_output.is_floating_point():
                there, here = describe(schema_of([output])), describe(schema_of([grad_output]))
                raise BadRequest(
                    f"expert {self.uid} has output {there} for these inputs; the output gradient is {here}"
                )
            # 2. All gradients, without touching anything yet.
            parameters = list(self._parameters.values())
            grads: Sequence[Tensor | None] = [None] * (len(wanted) + len(parameters))
            if output.requires_grad:
                loss = _Weighed.apply(output, grad_output.to(output.dtype))  # type: ignore[no-untyped-call]
                grads = torch.autograd.grad(loss, [*wanted, *parameters], allow_unused=True)
            input_grads = [
                torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, grads, strict=False)
            ]
            check_finite(input_grads, f"finite inputs gave expert {self.uid} an input gradient")
            # 3. The step.
            staleness = 0.0 if forward_updates is None else max(0.0, self.updates - forward_updates)
            self._step(dict(zip(self._parameters, grads[len(wanted) :], strict=True)), staleness)
        return input_grads

    def _step(self, grads: dict[str, Tensor | None], staleness: float) -> None:
        """Add gradients to the pending ones and, when it is time, step. Raises `NonFiniteTensor` before any change.

        Of gradients that are accumulated the staleness of the last one counts.
        """
        total = dict(self._pending)
        for name, grad in grads.items():
            if grad is not None:
                total[name] = total[name] + grad if name in total else grad
        clip, norm = self.config.clip_grad_norm, 0.0
        if clip is not None and total:
            norm = norm_of(total.values())
        bounded = clip is not None and clip <= 255  # then the squares of what is clipped are finite, in float16 too
        kept = "exp_avg_sq" in optimizer_slots(self.config)
        if not (math.isfinite(norm) and (bounded or squares_finite(total.values(), kept=kept))):
            raise NonFiniteTensor(f"the parameter gradients of expert {self.uid} overflow; nothing was changed")
        if self.optimizer is None:
            return
        # From here on nothing is refused. A step that fails counts as no pass: what was pending still is.
        if self._pending_passes + 1 < self.config.accumulate:
            self._pending, self._pending_passes = total, self._pending_passes + 1
            return
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))  # as `torch.nn.utils.clip_grad_norm_`
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.updates, staleness)
        take_step(self.optimizer, [(p, total.get(name)) for name, p in self._parameters.items()], factor)
        self.updates += 1
        self._pending, self._pending_passes = {}, 0

    def _call(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run the module. What it raises for a schema that has never worked is the caller's fault: `BadRequest`."""
        schema = schema_of(inputs)
        try:
            output: Any = self.module(*inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if schema in self._working_schemas:
                raise
            takes = self.takes or (
                describe(next(iter(self._working_schemas))) if self._working_schemas else "something else"
            )
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise BadRequest(f"expert {self.uid} takes {takes}; got {describe(schema)} ({said})") from error
        if not isinstance(output, Tensor) or output.ndim < 1 or output.shape[0] != inputs[0].shape[0]:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"an expert's module returns one tensor with a row per input row; this one returned {got}")
        if schema not in self._working_schemas:
            if len(self._working_schemas) >= MAX_SCHEMAS:
                del self._working_schemas[next(iter(self._working_schemas))]
            self._working_schemas[schema] = None
            self._has_buffers = any(True for _ in self.module.buffers())  # the pass may have made some
        return output

    @contextmanager
    def _buffers_restored(self, *, always: bool) -> Iterator[None]:
        """Put the module's buffers (running statistics) back after the block: always, or only when it fails."""
        before = [(buffer, buffer.clone()) for buffer in self.module.buffers()] if self._has_buffers else ()
        failed = True
        try:
            yield
            failed = False
        finally:
            if always or failed:
                with torch.no_grad():
                    for buffer, value in before:
                        buffer.copy_(value)

    # ------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """Everything that training has changed, as named copies on the CPU: module, optimizer and counters."""
        tensors = {f"module.{name}": t for name, t in self._module_tensors().items()}
        for name, parameter in self._parameters.items():
            slots = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
            tensors |= {f"optimizer.{slot}.{name}": t for slot, t in slots.items() if isinstance(t, Tensor)}
        tensors |= {f"pending.{name}": t for name, t in self._pending.items()}
        tensors |= {f"counter.{name}": torch.tensor(value) for name, value in self._counters().items()}
        return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Become what `state()` described, to the bit.

        Raises `CheckpointError`, which names the tensor that is missing, superfluous or of another shape; then nothing
        has changed.
        """
        module = self._module_tensors()
        slots = optimizer_slots(self.config) if self.optimizer else ()
        # 1. What this expert can hold; of these, `module` and the counters have to be there.
        expected: dict[str, tuple[torch.Size, torch.dtype | None]] = {}
        for name, tensor in module.items():
            expected[f"module.{name}"] = tensor.shape, tensor.dtype
        for name in self._counters():
            expected[f"counter.{name}"] = torch.Size(), torch.int64
        required = set(expected)
        for name, parameter in self._parameters.items():
            expected[f"pending.{name}"] = parameter.shape, parameter.dtype
            for slot in slots:
                shape = torch.Size() if slot == "step" else parameter.shape
                expected[f"optimizer.{slot}.{name}"] = shape, None if slot == "step" else parameter.dtype
        # 2. What the state has.
        for name in sorted(required - set(state)):
            raise CheckpointError(f"the checkpoint has no {name}, which expert {self.uid} ({self.kind}) needs")
        for name, tensor in state.items():
            if name not in expected:
                hint = ""
                if name.startswith("optimizer."):
                    hint = f"; was it saved with another optimizer than {self.config.optimizer}?"
                raise CheckpointError(f"the checkpoint's {name} has no place in expert {self.uid} ({self.kind}){hint}")
            shape, dtype = expected[name]
            if tensor.shape != shape or (dtype is not None and tensor.dtype != dtype):
                here = f"{dtype or tensor.dtype} {list(shape)}"
                raise CheckpointError(
                    f"the checkpoint's {name} is {tensor.dtype} {list(tensor.shape)}; expert {self.uid} needs {here}"
                )
        for name in self._parameters:  # an optimizer keeps all of its tensors for a parameter, or none yet
            missing = [slot for slot in slots if f"optimizer.{slot}.{name}" not in state]
            if missing and len(missing) < len(slots):
                raise CheckpointError(
                    f"the checkpoint has no optimizer.{missing[0]}.{name}; expert {self.uid} needs it"
                )
        # 3. Take it over.
        with torch.no_grad():
            for name, tensor in module.items():
                tensor.copy_(state[f"module.{name}"])
        device = torch.device(self.config.device)
        self._pending = {
            name: state[f"pending.{name}"].to(device, copy=True)
            for name in self._parameters
            if f"pending.{name}" in state
        }
        self.updates, self.rows_processed, self._pending_passes = (
            int(state[f"counter.{name}"]) for name in self._counters()
        )
        if self.optimizer is not None:
            filled = {
                index: {slot: laid_out(state[f"optimizer.{slot}.{name}"].clone(), parameter) for slot in slots}
                for index, (name, parameter) in enumerate(self._parameters.items())
                if slots and f"optimizer.{slots[0]}.{name}" in state
            }
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": filled, "param_groups": groups})

    def _counters(self) -> dict[str, int]:
        return {"updates": self.updates, "rows": self.rows_processed, "pending_passes": self._pending_passes}

    def _module_tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.module.state_dict().items() if isinstance(t, Tensor)}


# ---------------------------------------------------------------- helpers


class _Weighed(torch.autograd.Function):
    """A number whose gradient by `output` is `grad_output`: what `autograd.grad` starts from without a look at shapes.

    To compare the shapes of an output and a gradient that is given, torch 2 imports sympy: most of a CPU-second in the
    first backward pass of each server.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, grad_output: Tensor) -> Tensor:
        ctx.grad_output = grad_output
        return torch.zeros((), device=output.device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.grad_output, None
