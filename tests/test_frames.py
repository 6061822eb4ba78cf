"""Messages become frames and messages again; whatever else arrives is refused before anything is allocated."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.errors import LabkitError, MalformedMessage, MessageTooLarge
from labkit.wire import frames as wire

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def round_trip(tensors: list[torch.Tensor], codec: str = "none") -> list[torch.Tensor]:
    message = wire.decode([bytes(frame) for frame in wire.encode_reply(1, None, tensors, codec)])
    assert isinstance(message.header, wire.ReplyHeader)
    return wire.decode_tensors(message.header.tensors, message.payload)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_a_tensor_of_any_dtype_and_shape_comes_back_exactly(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = (torch.randn(shape) * 10).to(dtype)
    (returned,) = round_trip([sent])
    assert returned.dtype == dtype
    assert torch.equal(returned, sent)


def test_a_view_that_is_not_contiguous_comes_back_exactly() -> None:
    sent = torch.arange(12.0).reshape(3, 4).T[1:]
    assert torch.equal(round_trip([sent])[0], sent)


def test_a_large_tensor_is_not_copied_on_its_way_in_or_out() -> None:
    sent = torch.zeros(100_000)
    frame = wire.encode_reply(1, None, [sent])[1]
    returned = wire.decode_tensors([wire.TensorSpec("float32", (100_000,))], [frame])[0]
    sent[7] = 1.0
    assert returned[7] == 1.0


def test_an_unaligned_frame_is_read_all_the_same() -> None:
    numbers = torch.arange(4, dtype=torch.float64)
    buffer = bytearray(1) + bytearray(numbers.numpy().tobytes())
    (returned,) = wire.decode_tensors([wire.TensorSpec("float64", (4,))], [memoryview(buffer)[1:]])
    assert torch.equal(returned, numbers)
    assert returned.data_ptr() % 8 == 0


def test_only_floating_point_tensors_are_compressed() -> None:
    halves, counts = round_trip([torch.randn(10), torch.arange(10)], "float16")
    assert halves.dtype == torch.float32
    assert torch.equal(counts, torch.arange(10))


def test_a_dtype_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(ValueError, match=r"torch\.complex64 cannot be sent"):
        wire.encode_reply(1, None, [torch.zeros(2, dtype=torch.complex64)])


def test_a_request_carries_what_is_left_of_its_deadline_in_milliseconds() -> None:
    message = wire.decode(wire.encode_request(3, "m", 1.5, {"a": 1}))
    assert isinstance(message.header, wire.RequestHeader)
    assert (message.id, message.header.method, message.header.timeout_ms) == (3, "m", 1500)
    assert wire.decode_body(message.header.body, dict[str, int]) == {"a": 1}


def test_another_version_is_recognised_whatever_follows_its_prelude() -> None:
    message = wire.decode([b"LK\x63\x01" + bytes(8) + b"all new in version 99"])
    assert (message.version, message.header) == (99, None)


def test_a_shape_that_claims_more_than_was_sent_is_refused_before_it_is_allocated() -> None:
    header = wire.encode_reply(1, None, [torch.ones(3)])[0]
    claim = bytes(header).replace(b"\x91\x03", b"\x91\xcf" + (1 << 39).to_bytes(8, "big"))  # two terabytes
    started = time.process_time()
    with pytest.raises(MalformedMessage, match="12 bytes for float32 of shape"):
        wire.decode([claim, bytes(12)])
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize(
    "limits",
    [wire.FrameLimits(message_bytes=100), wire.FrameLimits(header_bytes=10), wire.FrameLimits(tensors=1)],
)
def test_a_message_over_a_limit_is_too_large(limits: wire.FrameLimits) -> None:
    with pytest.raises(MessageTooLarge):
        wire.decode(wire.encode_reply(1, None, [torch.ones(30), torch.ones(30)]), limits)


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "blockwise8"])
def test_a_message_that_a_codec_makes_small_is_as_large_as_its_tensors_are_when_they_are_decoded(codec: str) -> None:
    frames = wire.encode_reply(1, None, [torch.ones(1000, dtype=torch.float64)] * 2, codec)
    assert sum(map(len, frames)) < 5000
    with pytest.raises(MessageTooLarge, match="tensors take 16000"):
        wire.decode(frames, wire.FrameLimits(message_bytes=15_999))
    assert wire.decode(frames, wire.FrameLimits(message_bytes=16_000)).size == 16_000


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_noise_is_refused_with_a_typed_error(frames: list[bytes]) -> None:
    with pytest.raises(LabkitError):
        wire.decode(frames)


@given(st.data())
def test_a_damaged_message_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in wire.encode_request(5, "method", 1, ["body", 1], [torch.ones(3, 2)])]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = frames[data.draw(st.integers(0, 1))]
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = wire.decode(frames)
        if isinstance(message.header, wire.RequestHeader):
            wire.decode_tensors(message.header.tensors, message.payload)
            wire.decode_body(message.header.body, list[str | int])
    except LabkitError:
        pass  # refused, as it should be
