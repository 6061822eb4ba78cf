"""Files of tensors: safetensors, exact to the bit, with a checksum, and replaced atomically.

A batch passes by. Checkpoints of experts (`checkpoints`) and of whole runs (`training/run_folder`) are such files.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CHECKSUM = "crc32"  # the key of the checksum in a file's metadata
_TYPES = {  # as files name them
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
}  # fmt: skip
_QUICK_TYPES = {torch.float32, torch.float64, torch.int32, torch.int64}  # whose bytes Python can look at directly
READ_AT_ONCE = 16 << 20  # bytes of a file that is read as a whole: quicker, but it is in memory twice for a moment


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replace a file. When this returns, the tensors are on disk. A crash leaves the old file or the new one.

    Whoever may read the folder may read the file. Its group may write to the file if it may write to the folder and
    others may not.

    Args:
        path: The file, in a folder that exists.
        tensors: By name. They are not copied: leave them unchanged meanwhile.
        metadata: What the file says of itself; the checksum is added.

    Raises:
        OSError: It could not be written. The file that was there before is untouched.
        ValueError: There is a tensor of a type that no such file can hold.
    """
    plain = separate(tensors)
    # A folder, since safetensors writes to a file of a name of its own first. ~ is in no uid, so it is no expert's.
    aside = path.with_name(f".{path.stem}~{secrets.token_hex(8)}.tmp")
    aside.mkdir()
    try:
        file = aside / "state"
        safetensors.torch.save_file(plain, file, {**metadata, CHECKSUM: checksum(plain)})
        file.chmod(_file_mode(path.parent.stat().st_mode))
        with open(file, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(file, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path.name} cannot hold a tensor of {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_directory(path.parent)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Read a file. Changes nothing on disk.

    Returns:
        The tensors, the metadata, and whether the checksum there is that of the tensors.

    Raises:
        ValueError: It cannot be read as such a file, for whatever reason.
    """
    try:
        if path.stat().st_size <= READ_AT_ONCE:
            data = path.read_bytes()
            tensors = safetensors.torch.load(data)
            metadata, parts = _parts_of(data)
        else:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                # Copies, so that the file is not mapped any more when it is to be replaced.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            parts = {name: _bytes_of(tensor) for name, tensor in tensors.items()}
    except (safetensors.SafetensorError, msgspec.MsgspecError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return tensors, metadata, metadata.get(CHECKSUM) == _checksum(parts)


def _parts_of(data: bytes) -> tuple[dict[str, str], dict[str, memoryview]]:
    """The metadata of a file that could be read, and the bytes of each tensor."""
    start = 8 + int.from_bytes(data[:8], "little")
    head: dict[str, Any] = msgspec.json.decode(data[8:start])
    metadata: dict[str, str] = head.pop("__metadata__", None) or {}
    body = memoryview(data)[start:]
    return metadata, {name: body[slice(*tensor["data_offsets"])] for name, tensor in head.items()}


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytearray, str]:
    """The bytes of a file of tensors, as safetensors writes it, and their checksum.

    With dozens of small tensors, such as an expert has, safetensors itself takes several times as long.

    Args:
        tensors: By name, on the CPU and without gaps; see `separate`.
        metadata: What the file says of itself; the checksum is added.

    Raises:
        ValueError: There is a tensor of a type that no such file can hold.
    """
    data = {name: _bytes_of(tensor) for name, tensor in tensors.items()}
    crc32, at = _checksum(data), 0
    head: dict[str, object] = {"__metadata__": {**metadata, CHECKSUM: crc32}}
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so each is aligned
    for name in names:
        tensor, end = tensors[name], at + len(data[name])
        if tensor.dtype not in _TYPES:
            raise ValueError(f"no file of tensors can hold {tensor.dtype} ({name})")
        head[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = msgspec.json.encode(head)
    text += b" " * (-len(text) % 8)
    return bytearray().join([len(text).to_bytes(8, "little"), text, *(data[name] for name in names)]), crc32


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of the tensors' names and bytes: safetensors notices a file cut short, but not a changed bit."""
    return _checksum({name: _bytes_of(tensor) for name, tensor in tensors.items()})


def _checksum(data: Mapping[str, memoryview]) -> str:
    crc = 0
    for name in sorted(data):
        crc = zlib.crc32(data[name], zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _bytes_of(tensor: Tensor) -> memoryview:
    if tensor.dtype in _QUICK_TYPES and tensor.numel():
        return tensor.numpy().data.cast("B")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file can hold them: on the CPU, without gaps, no two in the same memory. Copies few if any."""
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _file_mode(directory: int) -> int:
    """The mode of a file in a directory of this mode.

    Where everybody may write, as in /tmp, that is to add files of their own, not to change ours.
    """
    open_to_all = directory & (stat.S_ISVTX | stat.S_IWOTH)
    return 0o600 | directory & (0o044 if open_to_all else 0o064)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write another file in this block, under the name that is yielded: at its end that takes the place of `path`.

    If the block raises, it is removed, and `path` is as it was.
    """
    aside = path.with_name(f".{secrets.token_hex(8)}~.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def link_file(path: Path, name: Path) -> None:
    """Give a file a second name, which may be another's by now; where that is impossible, copy it. Raises `OSError`."""
    with replacing(name) as aside:
        try:
            os.link(path, aside)  # nobody changes a file: each writes a new one and replaces the name
        except OSError:
            shutil.copy2(path, aside)


def sync_directory(directory: Path) -> None:
    """Make the new name itself durable, where the system lets one open a directory (Windows doesn't)."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        logger.debug("%s cannot be synced", directory)
    finally:
        os.close(descriptor)
