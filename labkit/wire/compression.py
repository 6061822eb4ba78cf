"""Tensor codecs: how the numbers of a tensor become the bytes of a frame, and back.

`wire/frames` calls a codec for each tensor of a message. The message's header names the codec, dtype and shape. Pure
functions of tensors, no I/O. Bytes are little-endian, as everywhere that torch runs.

    none        the tensor's own bytes; every dtype, exact
    float16     relative error at most 2^-11, or 2^-25 in all below 2^-14; beyond ±65504 saturates
    bfloat16    relative error at most 2^-8, or 2^-134 in all below 2^-126; beyond ±3.39e38 saturates
    blockwise8  blocks of 256 numbers as int8 with one scale each: error at most m / 254 + m * 2^-22 + 2^-149, where m
                is max|x| of the block (half a step, and the rounding of float32)

An error bound is that of a float32 result; decoding to a narrower dtype adds that dtype's rounding. Finite numbers stay
finite (one that is too large for the codec becomes the largest that it has). NaN and infinity stay non-finite, so that
a receiver that refuses them still sees them. Under blockwise8 they turn their whole block into NaN, so a message sends
such a tensor with `none`: see `codec_name_for`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.suggest import did_you_mean

BLOCK_SIZE = 256  # numbers
_LEVELS = 127  # int8 runs from -127 to 127 here: symmetric, -128 stays unused


class Codec(Protocol):
    """Turns a tensor into raw bytes and back. Codecs have no state, so any thread may use them."""

    @property
    def name(self) -> str: ...

    def encode(self, tensor: Tensor) -> Tensor:
        """Returns the frame of `tensor` (any device, any strides): uint8, 1-D, contiguous, on the CPU.

        It may share the tensor's memory: do not change the tensor before the frame is sent. Raises `ValueError` for a
        dtype that the codec does not take.
        """
        ...

    def decode(self, raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Returns the tensor in a frame. It may share the frame's memory: clone it before writing to it.

        Args:
            raw: The frame: uint8, 1-D, on the CPU; it may be unaligned or read-only.
            dtype: Dtype of the tensor.
            shape: Shape of the tensor.

        Raises:
            ValueError: The frame's length is not `encoded_bytes(dtype, shape)`, or the codec does not take the dtype.
        """
        ...

    def encoded_bytes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        """Returns the size of such a tensor's frame. Raises `ValueError` as `encode` does. Allocates nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """The tensor's own bytes, copied only if the tensor is not contiguous or not on the CPU."""

    name: str = "none"

    def encode(self, tensor: Tensor) -> Tensor:
        return _bytes_of(tensor.detach())

    def decode(self, raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        _check_frame(self, raw, dtype, shape)
        if dtype == torch.bool:  # a peer may send bytes other than 0 and 1, which are no bools
            return (raw != 0).reshape(shape)
        return _view(raw, dtype).reshape(shape)

    def encoded_bytes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Cast:
    """Every number in a narrower floating dtype."""

    name: str
    wire_dtype: torch.dtype

    def encode(self, tensor: Tensor) -> Tensor:
        _check_floating(self, tensor.dtype)
        return _bytes_of(_cast(tensor.detach(), self.wire_dtype))

    def decode(self, raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        _check_frame(self, raw, dtype, shape)
        return _cast(_view(raw, self.wire_dtype), dtype).reshape(shape)

    def encoded_bytes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        _check_floating(self, dtype)
        return math.prod(shape) * self.wire_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Blockwise8:
    """Blocks of 256 numbers in row-major order, each number a whole multiple of its block's max|x| / 127.

    A frame holds max|x| of every block (float32), then every number (int8). It holds the maximum rather than the step,
    because the step, which is 127 times smaller, would lose bits where the numbers are tiny.
    """

    name: str = "blockwise8"

    def encode(self, tensor: Tensor) -> Tensor:
        _check_floating(self, tensor.dtype)
        n = tensor.numel()
        if n == 0:
            return torch.empty(0, dtype=torch.uint8)
        blocks = _in_blocks(_cast(tensor.detach(), torch.float32).reshape(-1))  # [blocks, BLOCK_SIZE]
        low, high = blocks.aminmax(dim=1, keepdim=True)
        largest = torch.maximum(-low, high)  # [blocks, 1]
        largest = torch.where(largest.isfinite(), largest, torch.nan)  # then the whole block becomes NaN
        # 0 / 0 in a block of zeros and anything / NaN are NaN; the int8 numbers of such blocks do not matter.
        steps = (blocks / largest).mul_(_LEVELS).round_().nan_to_num_(0.0, 0.0, 0.0)
        numbers = steps.to(torch.int8).view(-1)[:n]
        return torch.cat([_bytes_of(largest), _bytes_of(numbers)])

    def decode(self, raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        _check_frame(self, raw, dtype, shape)
        n = math.prod(shape)
        if n == 0:
            return torch.empty(shape, dtype=dtype)
        split = _blocks(n) * 4
        largest = _view(raw[:split], torch.float32)  # [blocks]
        blocks = _in_blocks(raw[split:].view(torch.int8).to(torch.float32))  # [blocks, BLOCK_SIZE]
        values = blocks.div_(_LEVELS).mul_(largest[:, None]).view(-1)[:n]
        return _cast(values, dtype).reshape(shape)

    def encoded_bytes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        _check_floating(self, dtype)
        n = math.prod(shape)
        return n + 4 * _blocks(n)


NONE = Plain()
_ALL: tuple[Codec, ...] = (NONE, Cast("float16", torch.float16), Cast("bfloat16", torch.bfloat16), Blockwise8())
CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}


def codec_for(name: str, dtype: torch.dtype) -> Codec:
    """Returns the codec called `name`, or `none` for a dtype that only `none` takes. Raises `ValueError`."""
    if name not in CODECS:
        raise ValueError(f"there is no codec {name!r}; choose one of {', '.join(CODECS)}{did_you_mean(name, CODECS)}")
    return CODECS[name] if dtype.is_floating_point else NONE


def codec_name_for(tensor: Tensor, name: str) -> str:
    """Returns the codec with which a message sends a tensor, where `name` is wanted: that, or `none`.

    `none` for what is no floating-point number, and for NaN or infinity in blocks, which would spread to other rows.
    """
    if not tensor.is_floating_point():
        return "none"
    spreads = name == Blockwise8().name and not math.isfinite(tensor.detach().sum())
    return "none" if spreads else name


# ---------------------------------------------------------------- helpers


def _blocks(n: int) -> int:
    return -(-n // BLOCK_SIZE)


def _in_blocks(flat: Tensor) -> Tensor:
    """[n] -> [blocks, BLOCK_SIZE], the last block padded with zeros."""
    missing = -len(flat) % BLOCK_SIZE
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK_SIZE)


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.resolve_neg().cpu().contiguous()
    # One number may keep any stride and still count as contiguous, but cannot be viewed as bytes then.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def _view(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `raw` read as `dtype`. A frame may begin at any byte, but torch wants numbers aligned."""
    aligned = raw.data_ptr() % dtype.itemsize == 0 and raw.storage_offset() % dtype.itemsize == 0
    return (raw if aligned else raw.clone()).view(dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `tensor` as `dtype`. Finite numbers beyond its range become its largest, not infinity."""
    target = torch.finfo(dtype)
    if torch.finfo(tensor.dtype).max <= target.max or tensor.numel() == 0:
        return tensor.to(dtype)
    low, high = tensor.aminmax()
    if low >= target.min and high <= target.max:  # nearly always, and much quicker than clamping
        return tensor.to(dtype)
    return torch.where(tensor.isinf(), tensor, tensor.clamp(target.min, target.max)).to(dtype)


def _check_floating(codec: Codec, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"the codec {codec.name} takes floating dtypes, not {dtype}; send it with 'none'")


def _check_frame(codec: Codec, raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if any(not 0 <= size < 1 << 63 for size in shape):
        raise ValueError(f"{list(shape)} is not the shape of a tensor")
    expected = codec.encoded_bytes(dtype, shape)
    if raw.dtype != torch.uint8 or raw.dim() != 1 or len(raw) != expected:
        what = f"{dtype} {list(shape)} under {codec.name}"
        raise ValueError(f"a frame of {what} is {expected} bytes, not {list(raw.shape)} {raw.dtype}")
