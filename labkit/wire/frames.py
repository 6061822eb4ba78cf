"""Messages as the frames that cross the wire, and back. No I/O and no pickle; all is checked before it is allocated.

On a batch's way `rpc_client` and `rpc_server` encode and decode their messages here.

    frame 0    prelude (12 bytes: magic, version, kind, request id), then a msgpack header
    frame 1…   one raw buffer a tensor, in the codec that the header names

The prelude is the same in every version of the protocol. A node that gets a message of another version answers with its
own version, so that both sides can say what is wrong.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from labkit.errors import MalformedMessage, MessageTooLarge
from labkit.wire.compression import CODECS, codec_name_for

VERSION = 3  # of the protocol; raise it when bodies or methods change in a way that an older node cannot read
MAGIC = b"LK"
MAX_NDIM = 8
SMALL_TENSOR = 1 << 14  # bytes; up to here copying a tensor is quicker than checking whether it is aligned
_PRELUDE = struct.Struct("!2sBBQ")

Frame = bytes | bytearray | memoryview


class Kind(IntEnum):
    """The kinds of message."""

    REQUEST = 1
    REPLY = 2
    ERROR = 3
    CANCEL = 4
    VERSION = 5  # "I speak another version": has a prelude only, and the version in it is the sender's


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """How to read a tensor frame."""

    dtype: str
    shape: tuple[int, ...]
    codec: str = "none"


class RequestHeader(msgspec.Struct, array_like=True):
    """The header of a request. `timeout_ms`: milliseconds left until the caller's deadline, not a wall-clock time."""

    method: str
    timeout_ms: int
    body: msgspec.Raw
    tensors: list[TensorSpec]


class ReplyHeader(msgspec.Struct, array_like=True):
    """The header of the answer to a request."""

    body: msgspec.Raw
    tensors: list[TensorSpec]


class ErrorHeader(msgspec.Struct, array_like=True):
    """The header of a failure. `code` is a key of `errors.BY_CODE`."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """Limits on a message that a peer may send.

    ZeroMQ itself refuses frames over `message_bytes`. It does not limit how many frames a message has, and delivers a
    message with its last frame only: a peer that never ends a message is not stopped here.

    Args:
        message_bytes: Bytes of all frames together, and bytes of all tensors after decoding, which may be eight times
            as large.
        header_bytes: Bytes of the first frame.
        tensors: How many tensors a message may have.
    """

    message_bytes: int = 256 << 20
    header_bytes: int = 8 << 20
    tensors: int = 64


class Message(NamedTuple):
    """A message with its prelude and header decoded, and its tensor frames still raw.

    `header` is None for CANCEL and VERSION. `size` is that of its frames, or of its tensors when they are decoded,
    whichever is more, in bytes.
    """

    version: int
    kind: Kind
    id: int
    header: RequestHeader | ReplyHeader | ErrorHeader | None
    payload: Sequence[Frame]
    size: int = 0


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_NUMPY = {
    torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64,
    torch.int32: np.int32, torch.int16: np.int16, torch.int8: np.int8, torch.uint8: np.uint8,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Kind, Any] = {
    Kind.REQUEST: msgspec.msgpack.Decoder(RequestHeader),
    Kind.REPLY: msgspec.msgpack.Decoder(ReplyHeader),
    Kind.ERROR: msgspec.msgpack.Decoder(ErrorHeader),
}
_KINDS = {kind.value: kind for kind in Kind}
_LIMITS = FrameLimits()


# ---------------------------------------------------------------- encoding


def encode_request(
    id: int, method: str, timeout: float, body: Any, tensors: Sequence[Tensor] = (), codec: str = "none"
) -> list[Frame]:
    """Returns the frames of a call. Raises `ValueError` for a tensor that cannot be sent.

    `timeout`: seconds left until the deadline.
    """
    specs, buffers = _encode_tensors(tensors, codec)
    timeout_ms = max(1, min(int(timeout * 1000), 1 << 40))
    return [_head(Kind.REQUEST, id, RequestHeader(method, timeout_ms, _raw(body), specs)), *buffers]


def encode_reply(id: int, body: Any, tensors: Sequence[Tensor] = (), codec: str = "none") -> list[Frame]:
    """Returns the frames of the answer to a call."""
    specs, buffers = _encode_tensors(tensors, codec)
    return [_head(Kind.REPLY, id, ReplyHeader(_raw(body), specs)), *buffers]


def encode_error(id: int, code: str, text: str) -> list[Frame]:
    """Returns the frames of a call's failure. The text is cut at 2,000 characters."""
    return [_head(Kind.ERROR, id, ErrorHeader(code, text[:2000]))]


def encode_cancel(id: int) -> list[Frame]:
    """Returns the frames that tell a server that the caller has given up."""
    return [_head(Kind.CANCEL, id, None)]


def encode_version(id: int) -> list[Frame]:
    """Returns the frames that tell a peer which version of the protocol this node speaks."""
    return [_head(Kind.VERSION, id, None)]


def _raw(body: Any) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(body))


def _head(kind: Kind, id: int, header: Any) -> bytes:
    prelude = _PRELUDE.pack(MAGIC, VERSION, kind, id)
    return prelude if header is None else prelude + _encoder.encode(header)


def _encode_tensors(tensors: Sequence[Tensor], codec: str) -> tuple[list[TensorSpec], list[Frame]]:
    specs: list[TensorSpec] = []
    buffers: list[Frame] = []
    for tensor in tensors:
        dtype = _DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            raise ValueError(f"a tensor of {tensor.dtype} cannot be sent; known are {', '.join(_DTYPES)}")
        if tensor.ndim > MAX_NDIM:
            raise ValueError(f"a tensor of {tensor.ndim} dimensions cannot be sent; at most {MAX_NDIM}")
        name = codec_name_for(tensor, codec)
        buffers.append(_buffer(tensor.detach(), name))
        specs.append(TensorSpec(dtype, tuple(tensor.shape), name))
    return specs, buffers


def _buffer(tensor: Tensor, codec: str) -> memoryview:
    if codec == "none" and tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in _NUMPY and tensor.numel():
        return memoryview(tensor.resolve_neg().numpy().data).cast("B")
    raw = CODECS[codec].encode(tensor.cpu())
    return memoryview(raw.contiguous().reshape(-1).view(torch.uint8).numpy().data)


# ---------------------------------------------------------------- decoding


def decode(frames: Sequence[Frame], limits: FrameLimits = _LIMITS) -> Message:
    """Read a message's prelude and header, and check every tensor frame against the header.

    A message of another version comes back with its `version`, and with `header` None: only the prelude of it can be
    read.

    Raises:
        MalformedMessage: The frames are no labkit message.
        MessageTooLarge: The message is over the limits.
    """
    if not frames or len(frames[0]) < _PRELUDE.size:
        raise MalformedMessage("no prelude")
    head = memoryview(frames[0])
    magic, version, kind_number, id = _PRELUDE.unpack_from(head)
    if magic != MAGIC:
        raise MalformedMessage("not a labkit message")
    kind = _KINDS.get(kind_number)
    if kind is None:
        raise MalformedMessage(f"unknown kind {kind_number}")
    payload = frames[1:]
    if version != VERSION or kind in (Kind.CANCEL, Kind.VERSION):
        return Message(version, kind, id, None, ())
    total = sum(map(len, frames))
    if len(head) > limits.header_bytes or len(payload) > limits.tensors or total > limits.message_bytes:
        raise MessageTooLarge(
            f"a message of {total} bytes with a header of {len(head)} and {len(payload)} tensors is over the limit of "
            f"{limits.message_bytes}, {limits.header_bytes} and {limits.tensors}"
        )
    try:
        header = _decoders[kind].decode(head[_PRELUDE.size :])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"bad header: {error}") from None
    specs = [] if isinstance(header, ErrorHeader) else header.tensors
    if len(specs) != len(payload):
        raise MalformedMessage(f"{len(specs)} tensors announced, {len(payload)} frames sent")
    decoded = 0
    for spec, frame in zip(specs, payload, strict=True):
        decoded += _check(spec, frame)
    if decoded > limits.message_bytes:
        raise MessageTooLarge(
            f"a message of {total} bytes whose tensors take {decoded} is over the limit of {limits.message_bytes}"
        )
    return Message(version, kind, id, header, payload, max(total, decoded))


def peek_id(frames: Sequence[Frame]) -> int | None:
    """Returns the request id of a message that may be damaged behind its prelude; None if it has no prelude."""
    if not frames or len(frames[0]) < _PRELUDE.size:
        return None
    magic, _, _, id = _PRELUDE.unpack_from(memoryview(frames[0]))
    return id if magic == MAGIC else None


def decode_body(body: msgspec.Raw, type: Any) -> Any:
    """Decode a body as `type`. Raises `MalformedMessage`."""
    try:
        return _body_decoder(type).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise MalformedMessage(f"bad body: {error}") from None


@lru_cache(maxsize=256)
def _body_decoder(type: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(type)


def decode_tensors(specs: Sequence[TensorSpec], payload: Sequence[Frame]) -> list[Tensor]:
    """Returns the tensors, which share memory with their frames where codec and alignment allow it."""
    tensors = []
    for spec, frame in zip(specs, payload, strict=True):
        dtype = _DTYPES[spec.dtype]
        if len(frame) == 0:
            tensors.append(torch.empty(spec.shape, dtype=dtype))
        elif spec.codec == "none" and dtype in _NUMPY and len(frame) <= SMALL_TENSOR:
            # Copied by NumPy, which is quicker at it: ZeroMQ keeps small messages anywhere, so they may be unaligned.
            tensors.append(torch.from_numpy(np.frombuffer(frame, _NUMPY[dtype]).reshape(spec.shape).copy()))
        else:
            plain = spec.codec == "none" and dtype != torch.bool  # any bytes are a valid number, except for bool
            writable = bytearray(frame) if memoryview(frame).readonly else frame
            raw = torch.frombuffer(writable, dtype=dtype if plain else torch.uint8)
            if raw.data_ptr() % 8:
                raw = raw.clone()
            tensors.append(raw.view(spec.shape) if plain else CODECS[spec.codec].decode(raw, dtype, spec.shape))
    return tensors


def _check(spec: TensorSpec, frame: Frame) -> int:
    """Returns how many bytes the tensor in this frame takes when decoded. Raises `MalformedMessage`."""
    dtype = _DTYPES.get(spec.dtype)
    if dtype is None or spec.codec not in CODECS:
        raise MalformedMessage(f"unknown dtype {spec.dtype[:40]!r} or codec {spec.codec[:40]!r}")
    plain = spec.codec == "none"
    if not plain and not dtype.is_floating_point:
        raise MalformedMessage(f"codec {spec.codec} of {spec.dtype}")
    if len(spec.shape) > MAX_NDIM or any(size < 0 or size > 1 << 40 for size in spec.shape):
        raise MalformedMessage("bad shape")
    if len(frame) != CODECS[spec.codec].encoded_bytes(dtype, spec.shape):
        raise MalformedMessage(f"{len(frame)} bytes for {spec.dtype} of shape {spec.shape}")
    return len(frame) if plain else math.prod(spec.shape) * dtype.itemsize
