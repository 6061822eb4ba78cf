"""Tensor codecs: round trips, their stated error bounds, and frames that are not what they claim."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from labkit.wire.compression import BLOCK_SIZE, CODECS, Codec, codec_for
from labkit.wire.frames import ReplyHeader, decode, decode_tensors, encode_reply

EVERY_DTYPE = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip
FLOATING = [dtype for dtype in EVERY_DTYPE if dtype.is_floating_point]
LOSSY = [name for name in CODECS if name != "none"]
finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.lists(finite32, max_size=2 * BLOCK_SIZE + 10).map(lambda values: torch.tensor(values, dtype=torch.float32))


def there_and_back(codec: Codec, tensor: Tensor) -> Tensor:
    raw = codec.encode(tensor)
    assert raw.dtype == torch.uint8
    assert raw.is_contiguous()
    assert len(raw) == codec.encoded_bytes(tensor.dtype, tuple(tensor.shape))
    result = codec.decode(raw, tensor.dtype, tuple(tensor.shape))
    assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
    return result


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3, 5)])
def test_none_gives_back_every_dtype_and_shape_exactly(dtype, shape):
    tensor = (torch.randn(shape, generator=torch.manual_seed(0)) * 50).to(dtype)
    assert torch.equal(there_and_back(CODECS["none"], tensor), tensor)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (BLOCK_SIZE,), (2, 3, BLOCK_SIZE)])
def test_lossy_codecs_take_every_floating_dtype_and_shape(name, dtype, shape):
    tensor = torch.randn(shape, generator=torch.manual_seed(0)).to(dtype)
    torch.testing.assert_close(there_and_back(CODECS[name], tensor), tensor, atol=0.02, rtol=2**-6)


NUMBERS = torch.linspace(-3, 3, 700)
ODD = {
    "one number of every second": NUMBERS[::2][:1],
    "one number of a column": NUMBERS.view(70, 10)[4:5, 3:4],
    "one number, expanded": NUMBERS[7].expand(1, 1, 1),
    "one number with the sign still to flip": torch.tensor([1 + 2j]).conj().imag,
    "without dimensions": NUMBERS[5],
    "empty, of every second": NUMBERS[::2][:0],
    "a block that is one number": NUMBERS[9].expand(BLOCK_SIZE),
    "rows that are one row": NUMBERS[:5].expand(4, 5),
    "transposed": NUMBERS.view(70, 10).T,
    "a slice": NUMBERS.view(70, 10)[3:9, ::3],
    "channels last": NUMBERS[:120].view(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("tensor", ODD.values(), ids=ODD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_codec_takes_tensors_laid_out_in_any_way_and_so_does_a_message(name, tensor, dtype):
    tensor = tensor.to(dtype)
    plain = tensor.resolve_neg().clone(memory_format=torch.contiguous_format)
    expected = there_and_back(CODECS[name], plain)
    assert torch.equal(there_and_back(CODECS[name], tensor), expected)
    message = decode([bytes(frame) for frame in encode_reply(1, None, [tensor], name)])
    assert isinstance(message.header, ReplyHeader)
    assert torch.equal(decode_tensors(message.header.tensors, message.payload)[0], expected)


@given(vectors)
def test_float16_stays_within_its_bound(x):
    in_range = x.clamp(-65504, 65504)
    error = (there_and_back(CODECS["float16"], x) - in_range).abs()
    assert (error <= (in_range.abs() * 2.0**-11).clamp_min(2.0**-25)).all()


@given(vectors)
def test_bfloat16_stays_within_its_bound(x):
    limit = torch.finfo(torch.bfloat16).max
    in_range = x.clamp(-limit, limit).double()
    error = (there_and_back(CODECS["bfloat16"], x).double() - in_range).abs()
    assert (error <= (in_range.abs() * 2.0**-8).clamp_min(2.0**-134)).all()


@given(vectors)
def test_blockwise8_stays_within_half_a_step_of_each_block(x):
    error = (there_and_back(CODECS["blockwise8"], x).double() - x.double()).abs()
    for block, block_error in zip(x.double().split(BLOCK_SIZE), error.split(BLOCK_SIZE), strict=True):
        if len(block):
            largest = block.abs().max()
            rounding = largest * 2.0**-22 + 2.0**-149  # of the float32 arithmetic itself
            assert block_error.max() <= largest / 254 + rounding


def test_blockwise8_is_a_quarter_of_float32_and_a_little():
    assert CODECS["blockwise8"].encoded_bytes(torch.float32, (1024, 1024)) == 1024 * 1024 * (1 + 4 / BLOCK_SIZE)
    assert CODECS["blockwise8"].encoded_bytes(torch.float32, (1,)) == 5


def test_one_outlier_spoils_only_its_own_block():
    x = torch.randn(3 * BLOCK_SIZE, generator=torch.manual_seed(0))
    x[BLOCK_SIZE] = 1e6
    error = (there_and_back(CODECS["blockwise8"], x) - x).abs()
    assert error[:BLOCK_SIZE].max() < 0.02
    assert error[2 * BLOCK_SIZE :].max() < 0.02


@pytest.mark.parametrize("name", LOSSY)
def test_a_finite_number_never_becomes_infinite(name):
    x = torch.tensor([3.4e38, -3.4e38, 1e30, 70000.0, 0.0])
    assert there_and_back(CODECS[name], x).isfinite().all()
    assert there_and_back(CODECS[name], x.double() * 1e60).isfinite().all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_number_never_becomes_finite(name, bad):
    x = torch.ones(BLOCK_SIZE)
    x[3] = bad
    assert not there_and_back(CODECS[name], x)[3].isfinite()


@pytest.mark.parametrize("name", CODECS)
def test_strides_and_gradients_do_not_matter(name):
    x = torch.randn(6, 8, generator=torch.manual_seed(0), requires_grad=True).t()[::2]
    result = there_and_back(CODECS[name], x)
    torch.testing.assert_close(result, x.detach(), atol=0.02, rtol=2**-7)
    assert not result.requires_grad


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_a_frame_may_begin_at_any_byte(name, offset):
    x = torch.randn(300, generator=torch.manual_seed(0))
    raw = CODECS[name].encode(x)
    received = torch.zeros(offset + len(raw), dtype=torch.uint8)
    received[offset:] = raw
    there, here = received[offset:], raw
    decode = CODECS[name].decode
    assert torch.equal(decode(there, torch.float32, (300,)), decode(here, torch.float32, (300,)))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("length", [0, 11, 13, 1000])
def test_a_frame_of_another_length_is_refused(name, length):
    codec = CODECS[name]
    with pytest.raises(ValueError, match="bytes"):
        codec.decode(torch.zeros(length, dtype=torch.uint8), torch.float32, (2, 4))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(-1, -4), (1 << 70, 0)])
def test_an_impossible_shape_is_refused(name, shape):
    with pytest.raises(ValueError, match="shape"):
        CODECS[name].decode(torch.zeros(4, dtype=torch.uint8), torch.float32, shape)


@given(st.sampled_from(sorted(CODECS)), st.sampled_from(EVERY_DTYPE), st.binary(max_size=40), st.integers(0, 40))
def test_decoding_whatever_a_peer_sends_gives_a_tensor_or_a_value_error(name, dtype, frame, n):
    raw = torch.tensor(list(frame), dtype=torch.uint8)
    try:
        result = CODECS[name].decode(raw, dtype, (n,))
    except ValueError:
        return
    assert (result.dtype, result.shape) == (dtype, (n,))


@pytest.mark.parametrize("name", LOSSY)
def test_integers_are_refused_by_lossy_codecs_and_pass_under_none(name):
    with pytest.raises(ValueError, match="int64"):
        CODECS[name].encode(torch.arange(3))
    assert codec_for(name, torch.int64).name == "none"
    assert codec_for(name, torch.float32).name == name


def test_an_unknown_codec_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"'zip'.*none, float16, bfloat16, blockwise8"):
        codec_for("zip", torch.float32)


def test_a_byte_that_is_no_bool_becomes_one():
    result = CODECS["none"].decode(torch.tensor([0, 1, 2, 255], dtype=torch.uint8), torch.bool, (4,))
    assert result.view(torch.uint8).tolist() == [0, 1, 1, 1]
