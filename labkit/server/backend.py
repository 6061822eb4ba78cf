"""An expert backend: one expert's module, its optimizer and its limits.

A batch's way out ends here: `server/batch` hands merged rows to `ExpertBackend.compute` on the compute thread.
Everything here is synchronous, knows nothing of requests or the network, and is called by one thread at a time.

Legend: rows = samples of a batch, always dimension 0 of every tensor; the other dimensions are the expert's own.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor, nn

from labkit.errors import CheckpointError, MessageTooLarge, NonFiniteTensor
from labkit.expert_protocol import Direction, ExpertSchema
from labkit.server.expert_module import ExpertModule
from labkit.server.gradients import gradients_of_good_rows
from labkit.server.optimizer import BackendConfig, laid_out, make_optimizer, optimizer_slots, take_step
from labkit.server.parts import Parts, add_gradients, cut, finish, together
from labkit.server.user_code import contained
from labkit.server.validation import (
    NO_OPTIONS,
    CallOptions,
    check_finite,
    checked_rows,
    norm_of,
    rows_not_finite,
    squares_finite,
)

COUNTERS = ("updates", "rows", "pending_passes")  # in a state
ANSWER_LIMIT = 255 << 20  # bytes: what a message may have by default, with room for its header


class ExpertBackend:
    """One expert: `forward` returns outputs; `backward` returns input gradients and trains (paper, Runtime).

    The module takes one or more tensors [rows, ...] and returns one or more [rows, ...]; each row's output must not
    depend on the other rows, since the runtime merges requests, and a pass of more than `config.max_batch_size` rows is
    computed in parts. It runs in eval mode in both directions unless `config.train_mode`: then the forward pass that
    backward repeats is the same one, to the bit, and merging or cutting changes nothing. With `train_mode=True` dropout
    draws anew in each pass, and statistics of a batch are those of a part. Only a backward pass that trains changes
    buffers.

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
        with contained():
            self.module = module.to(self.config.device).train(self.config.train_mode)
        self.expert = ExpertModule(uid, self.module)
        self.updates = 0  # optimizer steps
        self.rows_processed = 0  # rows of all passes, forward and backward
        self.overflowed = False  # whether the last pass left rows out, since their numbers overflowed
        self.answer_limit = ANSWER_LIMIT  # bytes of all outputs of a request
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._pending: dict[str, Tensor] = {}  # gradients of the passes since the last step, when accumulating
        self._pending_passes = 0
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

    @property
    def schema(self) -> ExpertSchema | None:
        """What the expert takes and gives, as far as that is known."""
        return self.expert.schema

    def forward(self, *inputs: Tensor, keywords: tuple[str, ...] = ()) -> Tensor:
        """The output [rows, ...] on the CPU, without a gradient; of several the first. Changes nothing.

        A row that overflows is NaN or infinite; if all of them do, that is an error.

        `keywords`: the names of the last inputs, which are handed to the module by keyword.

        Raises `BadRequest`, `NonFiniteTensor`.
        """
        options = CallOptions(keywords=keywords)
        self.check("forward", inputs, options)
        check_finite(inputs)
        return self.compute("forward", inputs, options=options)[0]

    def backward(
        self, *inputs_then_grads: Tensor, outputs: int = 1, keywords: tuple[str, ...] = (), train: bool = True
    ) -> list[Tensor]:
        """Take one optimizer step for these rows, and return the input gradients.

        Args:
            *inputs_then_grads: The inputs of the forward pass and the gradients of its outputs, each [rows, ...].
                The outputs are computed again, since nothing is kept between calls.
            outputs: How many of the tensors are gradients of outputs.
            keywords: The names of the last inputs, which are handed to the module by keyword.
            train: Whether to take a step. Without it, only `rows_processed` changes.

        Returns:
            The gradients of the floating-point inputs in their order and dtypes, on the CPU. Rows whose gradient
                overflows are NaN, and the expert does not learn from them.

        Raises:
            BadRequest: The tensors do not fit the expert.
            NonFiniteTensor: There is NaN or infinity among the numbers, or the gradients of all rows or of the
                parameters overflow.

        After an error parameters, buffers, optimizer state and counters are what they were, to the bit.
        """
        options = CallOptions(outputs, keywords, train)
        self.check("backward", inputs_then_grads, options)
        check_finite(inputs_then_grads)
        return self.compute("backward", inputs_then_grads, options=options)

    def check(self, direction: str, tensors: Sequence[Tensor], options: CallOptions = NO_OPTIONS) -> int:
        """The number of rows. Raises `BadRequest` if the tensors' shapes cannot be a request at all. Cheap."""
        return checked_rows(self.uid, direction, tensors, options)

    def compute(
        self,
        direction: Direction,
        tensors: Sequence[Tensor],
        forward_updates: float | None = None,
        options: CallOptions = NO_OPTIONS,
    ) -> list[Tensor]:
        """Do `forward` or `backward` with tensors that went through `check` and `check_finite` already.

        `forward_updates`: `updates` at the forward pass that a backward pass belongs to, if that is known.
        """
        return finish(self.compute_in_parts(direction, tensors, forward_updates, options))

    def compute_in_parts(
        self,
        direction: Direction,
        tensors: Sequence[Tensor],
        forward_updates: float | None = None,
        options: CallOptions = NO_OPTIONS,
    ) -> Generator[None, None, list[Tensor]]:
        """As `compute`, with a pause (a `yield`) between any two parts of at most `max_batch_size` rows.

        The result is that of the undivided pass: outputs and input gradients are put together, and parameter gradients
        are added up for one step. In a pause of a backward pass, leave this expert alone; in one of a forward pass,
        other forward passes may be computed. To close it in a pause undoes what it has done.
        """
        parts = cut(tensors, self.config.max_batch_size)
        if direction == "forward":
            results = yield from self._forward(parts, options.keywords)
        else:
            results = yield from self._backward(parts, forward_updates, options)
        self.rows_processed += tensors[0].shape[0]
        return results

    def _forward(self, parts: Parts, keywords: tuple[str, ...]) -> Generator[None, None, list[Tensor]]:
        answers: list[list[Tensor]] = []
        rows = sum(len(part[0]) for part in parts)
        bad_rows = 0
        for part in parts:
            if answers:
                yield
            with torch.no_grad(), self.expert.buffers_restored(always=True):
                outputs = self.expert([t.to(self.config.device) for t in part], keywords)
                bad = rows_not_finite(outputs)
            bad_rows += 0 if bad is None else int(bad.sum())
            if bad_rows == rows:
                check_finite(outputs, f"finite inputs gave expert {self.uid} an output")
            size = sum(t.nbytes for t in outputs) * rows // len(part[0])
            if size > self.answer_limit:
                raise MessageTooLarge(
                    f"expert {self.uid} would answer {rows} rows with {size} bytes, over the limit of a message of "
                    f"{self.answer_limit}; send fewer rows at once"
                )
            answers.append([self._to_cpu(t) for t in outputs])
        self.overflowed = bad_rows > 0
        return together(answers)

    def _to_cpu(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU, without gaps, and in memory that no later step changes."""
        result = tensor.detach().cpu().contiguous()
        return result.clone() if result.untyped_storage().data_ptr() in self.expert.storages else result

    def _backward(
        self, parts: Parts, forward_updates: float | None, options: CallOptions
    ) -> Generator[None, None, list[Tensor]]:
        answers: list[list[Tensor]] = []
        total: dict[str, Tensor] = {}
        good_rows = 0
        with self.expert.buffers_restored(always=not options.train):
            for part in parts:
                if answers:
                    yield
                tensors = [t.to(self.config.device) for t in part]
                input_grads, grads, good = gradients_of_good_rows(self.expert, self._parameters, tensors, options)
                good_rows += good
                answers.append([self._to_cpu(grad) for grad in input_grads])
                if len(parts) == 1:
                    total = grads
                else:
                    add_gradients(total, grads)
            if good_rows == 0:
                check_finite(input_grads, f"finite inputs gave expert {self.uid} an input gradient")
            if options.train:
                staleness = 0.0 if forward_updates is None else max(0.0, self.updates - forward_updates)
                # (Gradients of half precision are added up in float32.)
                self._step({name: grad.to(self._parameters[name].dtype) for name, grad in total.items()}, staleness)
        self.overflowed = good_rows < sum(len(part[0]) for part in parts)
        return together(answers)

    def _step(self, grads: dict[str, Tensor], staleness: float) -> None:
        """Add gradients to the pending ones and, when it is time, step. Raises `NonFiniteTensor` before any change.

        Of gradients that are accumulated the staleness of the last one counts.
        """
        total = dict(self._pending)
        for name, grad in grads.items():
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

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Whether the expert can become what a state describes. Changes nothing.

        Raises `CheckpointError`, which names the tensor that is missing, superfluous or of another shape.
        """
        module = self._module_tensors()
        slots = optimizer_slots(self.config) if self.optimizer else ()
        # 1. What this expert can hold; of these, `module` and the counters have to be there.
        expected: dict[str, tuple[torch.Size, torch.dtype | None]] = {}
        for name, tensor in module.items():
            expected[f"module.{name}"] = tensor.shape, tensor.dtype
        for name in COUNTERS:
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

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Become what `state()` described, to the bit. Raises as `check_state` does; then nothing has changed."""
        self.check_state(state)
        slots = optimizer_slots(self.config) if self.optimizer else ()
        with torch.no_grad():
            for name, tensor in self._module_tensors().items():
                tensor.copy_(state[f"module.{name}"])
        device = torch.device(self.config.device)
        self._pending = {
            name: state[f"pending.{name}"].to(device, copy=True)
            for name in self._parameters
            if f"pending.{name}" in state
        }
        self.updates, self.rows_processed, self._pending_passes = (int(state[f"counter.{name}"]) for name in COUNTERS)
        if self.optimizer is not None:
            filled = {
                index: {slot: laid_out(state[f"optimizer.{slot}.{name}"].clone(), parameter) for slot in slots}
                for index, (name, parameter) in enumerate(self._parameters.items())
                if slots and f"optimizer.{slots[0]}.{name}" in state
            }
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": filled, "param_groups": groups})

    def _counters(self) -> dict[str, int]:
        return dict(zip(COUNTERS, (self.updates, self.rows_processed, self._pending_passes), strict=True))

    def _module_tensors(self) -> dict[str, Tensor]:
        with contained():
            return {name: t for name, t in self.module.state_dict().items() if isinstance(t, Tensor)}


def beginning(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an expert that has learnt nothing yet: that with the `state_dict` of its module."""
    state = {f"module.{name}": tensor.detach().to("cpu") for name, tensor in weights.items()}
    return state | {f"counter.{name}": torch.tensor(0) for name in COUNTERS}
