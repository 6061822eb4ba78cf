"""An expert's module as calls see it: tensors in, a list of tensors out, and errors that say whose fault it was.

On a batch's way the last step: `server/backend` calls the module here, and here alone. Knows nothing of training.

Legend: rows = samples of a batch, always dimension 0 of every tensor; the other dimensions are the expert's own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from labkit.errors import BadRequest
from labkit.expert_protocol import MAX_TENSORS, ExpertSchema, TensorSchema
from labkit.server.executor import ends_within
from labkit.server.schema import (
    ANY,
    describe_tensors,
    dtype_called,
    example_of,
    fits,
    floating_dtypes,
    in_words,
    rows_of,
    signature_of,
    trials,
    widened,
)
from labkit.server.user_code import CodeWantedOut, contained, describe_error
from labkit.server.validation import HALF_PRECISION, Schema, schema_of

logger = logging.getLogger(__name__)

MAX_WAYS = 64  # callers choose schemas, so we remember few
ABOUT_INPUTS = re.compile(
    r"shape|size|dimension|\bdims?\b|dtype|scalar type|not implemented for|expected|channels|broadcast|out of range|"
    r"must match|must be equal|elements",
    re.IGNORECASE,
)  # what torch's own errors about tensors of the wrong shape or type say


@dataclass(slots=True)
class _Way:
    """How inputs of one schema, which have worked, are handed to the module.

    Args:
        dtypes: What each input is cast to; None for as it is.
        changes: Whether the module changes inputs in place, so that it needs copies.
    """

    dtypes: list[torch.dtype | None]
    changes: bool


class ExpertModule:
    """The module of one expert.

    Floating-point inputs are cast to the dtype of the module's parameters if these have only one, except that float64
    is not narrowed. A module may change its inputs in place: then it gets copies.

    Args:
        uid: The expert, for errors.
        module: The module, on its device.
    """

    def __init__(self, uid: str, module: nn.Module) -> None:
        self.uid = uid
        self.module = module
        self.schema: ExpertSchema | None = None
        self.guesses: list[TensorSchema] = []  # what it may take: tried in vain
        self._trials_end = False  # whether trials came too late to matter
        self._takes = str(getattr(module, "takes", ""))  # what to send, for error texts
        self._takes_anything = getattr(module, "takes_anything", False)  # so that no call shows what it takes
        self._ways: dict[tuple[Schema, tuple[str, ...]], _Way] = {}  # newest last
        self._look_at_buffers()

    # ---------------------------------------------------------------- calls

    def __call__(self, inputs: Sequence[Tensor], keywords: tuple[str, ...] = ()) -> list[Tensor]:
        """Run the module: inputs [rows, ...] -> outputs [rows, ...].

        Raises `BadRequest` if it does not take such inputs, and what it raises itself where that is its own failure.
        """
        key = schema_of(inputs), keywords
        way = self._ways.get(key)
        if way is None:
            self._check_names(inputs, keywords)
        dtypes = self._dtypes(inputs, keywords) if way is None else way.dtypes
        cast = [t if dtype is None else t.to(dtype) for t, dtype in zip(inputs, dtypes, strict=True)]
        try:
            outputs, changed = self._run(inputs, cast, keywords, copies=way is None or way.changes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if way is None and self._is_refusal(error, describe_tensors(cast, keywords)):
                raise BadRequest(self._refusal(inputs, keywords, describe_error(error))) from error
            if way is None or way.changes or "a leaf Variable that requires grad" not in str(error):
                raise
            outputs, changed = self._run(inputs, cast, keywords, copies=True)  # this time it does change an input
        tensors = _tensors_of(outputs, inputs[0].shape[0])
        if way is not None:
            way.changes = way.changes or changed
        else:
            if len(self._ways) >= MAX_WAYS:
                del self._ways[next(iter(self._ways))]
            self._ways[key] = _Way(dtypes, changed)
            self._learn(cast, keywords, tensors)
            self._look_at_buffers()  # the pass may have made some
        return tensors

    def _run(
        self, inputs: Sequence[Tensor], cast: Sequence[Tensor], keywords: tuple[str, ...], *, copies: bool
    ) -> tuple[Any, bool]:
        """Run the module, on copies of the inputs if need be. Returns what it gives, and if it has changed an input."""
        # Copies are no leaves of the graph either, on which nothing could be done in place.
        handed = [c.clone() if copies and c is t else c for c, t in zip(cast, inputs, strict=True)]
        before = [t._version for t in handed]
        outputs = self._hand_over(handed, keywords)
        return outputs, before != [t._version for t in handed]

    def _hand_over(self, inputs: Sequence[Tensor], keywords: tuple[str, ...]) -> Any:
        places = len(inputs) - len(keywords)
        with contained():
            return self.module(*inputs[:places], **dict(zip(keywords, inputs[places:], strict=True)))

    def _dtypes(self, inputs: Sequence[Tensor], keywords: tuple[str, ...]) -> list[torch.dtype | None]:
        """What each input is to be cast to: see the class."""
        names = [t.name for t in describe_tensors(inputs, keywords)]
        known = self.schema.inputs if self.schema is not None else ()
        said = {(i, t.name): dtype_called(t.dtype) for i, t in enumerate(known)} if len(known) == len(inputs) else {}
        own = floating_dtypes(self.module)
        dtypes: list[torch.dtype | None] = []
        for i, tensor in enumerate(inputs):
            wanted = said.get((i, names[i]), own[0] if len(own) == 1 else None)
            may = tensor.dtype in (torch.float32, *HALF_PRECISION) and wanted is not None and wanted.is_floating_point
            dtypes.append(wanted if may and wanted != tensor.dtype else None)
        return dtypes

    def _check_names(self, inputs: Sequence[Tensor], keywords: tuple[str, ...]) -> None:
        """Raise `BadRequest` if the module does not take so many inputs, or no such keywords."""
        signature = signature_of(self.module)
        if signature is None:
            return
        try:
            signature.bind(*[None] * (len(inputs) - len(keywords)), **dict.fromkeys(keywords))
        except TypeError as error:
            raise BadRequest(self._refusal(inputs, keywords, str(error))) from None

    def _learn(self, inputs: Sequence[Tensor], keywords: tuple[str, ...], outputs: Sequence[Tensor]) -> None:
        if self._takes_anything:
            return
        schema = ExpertSchema(describe_tensors(inputs, keywords), describe_tensors(outputs))
        self.schema = schema if self.schema is None else widened(self.schema, schema)

    # ---------------------------------------------------------------- whose fault an error is

    def _is_refusal(self, error: Exception, given: tuple[TensorSchema, ...]) -> bool:
        """Whether what the module raised, for inputs that have never worked, says that it does not take such inputs.

        1. If it is known what it takes, that decides, except that a module may refuse a size where any would do.
        2. If something is known to be likely and these inputs are of that kind, it is the module's own failure.
        3. Else the error decides: it is about shapes and dtypes, or not.
        """
        said_no = isinstance(error, (ValueError, AssertionError))
        if isinstance(error, CodeWantedOut) or not (
            said_no or isinstance(error, (RuntimeError, TypeError, IndexError))
        ):
            return False
        if self.schema is not None:  # 1
            fit = fits(self.schema.inputs, given)
            return not fit or (said_no and any(ANY in tensor.shape for tensor in self.schema.inputs))
        if any(fits([guess], given) for guess in self.guesses):  # 2
            return False
        about_inputs = isinstance(error, RuntimeError) and ABOUT_INPUTS.search(str(error)) is not None  # 3
        return said_no or isinstance(error, IndexError) or about_inputs

    def _refusal(self, inputs: Sequence[Tensor], keywords: tuple[str, ...], said: str) -> str:
        takes = self._takes or (in_words(self.schema.inputs) if self.schema is not None else "")
        got = in_words(describe_tensors(inputs, keywords))
        if takes:
            return f"expert {self.uid} takes {takes}; got {got} ({said})"
        return f"expert {self.uid} does not take {got}: {said}"

    # ---------------------------------------------------------------- what it takes

    def find_schema(self, timeout: float | None = None) -> None:
        """Find out what the module takes and gives, from what it says itself or by a trial; see `server/schema`.

        A trial leaves no trace in buffers or in torch's random numbers. If all of them fail, or take longer than
        `timeout` seconds, nothing is known yet. Without a timeout, no thread is used.
        """
        if timeout is None:
            self._find_schema()
        elif not ends_within(timeout, self._find_schema):
            self._trials_end = True
            logger.info("expert %s was tried in vain for %g s, to see what it takes", self.uid, timeout)

    def _find_schema(self) -> None:
        device = next((t.device for t in (*self.module.parameters(), *self.module.buffers())), torch.device("cpu"))
        try:
            example = example_of(self.module)
            if example is not None:
                self._try([t.to(device) for t in example[0]], example[1])
                return
        except Exception as error:
            logger.warning("the example_inputs of expert %s do not work: %s", self.uid, describe_error(error))
            return
        for trial in trials(self.module):
            if self._trials_end:
                return
            self.guesses.append(trial)
            try:
                self._try([rows_of(trial, 0, str(device))])
                if ANY in trial.shape:
                    self._try([rows_of(trial, 1, str(device))])
                return
            except Exception as error:
                self.schema = None
                logger.debug("expert %s does not take %s: %s", self.uid, trial, error)

    def _try(self, inputs: list[Tensor], keywords: tuple[str, ...] = ()) -> None:
        """Run the module on these, leave no trace, and learn its schema from what it gives."""
        random, before = torch.get_rng_state(), _buffers_of(self.module)
        tensors: list[Tensor] = []
        try:
            with torch.no_grad():
                outputs = self._hand_over([t.clone() for t in inputs], keywords)
                tensors = _tensors_of(outputs, inputs[0].shape[0])
        finally:
            if not self._trials_end:  # else the module is in use
                _put_back(before)
                if not torch.equal(random, torch.get_rng_state()):
                    torch.set_rng_state(random)
        if not self._trials_end:
            self._learn(inputs, keywords, tensors)

    # ---------------------------------------------------------------- buffers

    def _look_at_buffers(self) -> None:
        module = self.module
        own = [t for t in (*module.parameters(), *module.buffers()) if not is_lazy(t)]
        self._has_buffers = any(True for _ in module.buffers())
        self.storages = {t.untyped_storage().data_ptr() for t in own}  # memory that training changes

    @contextmanager
    def buffers_restored(self, *, always: bool) -> Iterator[Callable[[], None]]:
        """Put the module's buffers (running statistics) back after the block: always, or only when it fails.

        The block may do so itself, with what it is given.
        """
        before = _buffers_of(self.module) if self._has_buffers else []
        failed = True
        try:
            yield partial(_put_back, before)
            failed = False
        finally:
            if before and (always or failed):
                _put_back(before)


def _buffers_of(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
    """Each buffer: the dictionary that holds it, its name there, itself, and a copy of its value."""
    return [
        (part._buffers, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]


def _put_back(before: list[tuple[dict[str, Any], str, Tensor, Tensor]]) -> None:
    """Undo what happened to the buffers: their values changed, or their shapes, or others took their places."""
    with torch.no_grad():
        for buffers, name, buffer, value in before:
            buffer.resize_(value.shape).copy_(value)
            buffers[name] = buffer


def _tensors_of(outputs: Any, rows: int) -> list[Tensor]:
    """What a module gave, as a list. Raises `TypeError` if that is not one to sixteen tensors with a row per row."""
    if isinstance(outputs, Tensor):
        tensors: list[Any] = [outputs]
    elif isinstance(outputs, Mapping):
        tensors = list(outputs.values())
    else:
        tensors = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    good = 1 <= len(tensors) <= MAX_TENSORS and all(
        isinstance(t, Tensor) and t.ndim >= 1 and t.shape[0] == rows and t.layout is torch.strided for t in tensors
    )
    if not good:
        got = ", ".join(str(list(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in tensors[:8])
        raise TypeError(
            f"an expert's module returns one tensor with a row per input row, or a tuple, a list or a dictionary of up "
            f"to {MAX_TENSORS} such tensors; this one returned {got or 'nothing'} for {rows} rows"
        )
    return tensors
