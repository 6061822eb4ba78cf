"""The sizes of requests: how many rows of a pass fit into one message to a server. Plain state, no I/O.

On a batch's way: `client/dispatch` cuts the rows of an expert into several requests, if one would be too large for a
message, or its answer would. The limit of a batch is the server's own affair.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.contact import Contact

HEADER_BYTES = 1 << 16  # of a message, at most; or a quarter of it, where messages are small
MAX_CONTACTS = 4096


def row_bytes(tensors: Sequence[Tensor]) -> int:
    """The bytes of one row of these tensors [rows, ...]."""
    return sum(math.prod(tensor.shape[1:]) * tensor.dtype.itemsize for tensor in tensors)


def shape_bytes(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
    """The bytes of one row of tensors of these shapes."""
    return sum(math.prod(shape) * dtype.itemsize for shape in shapes)


class MessageSizes:
    """How large messages may be: no larger than we accept ourselves, nor than a server has refused.

    A message counts as its frames or its decoded tensors, whichever is more, and no codec makes a tensor larger than it
    is without: so these sizes are right for all codecs.

    Args:
        limit: Bytes of a message that we send or accept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._limits: OrderedDict[Contact, int] = OrderedDict()  # of servers that accept less

    def most_rows(self, contact: Contact, bytes_per_row: int) -> int:
        """The most rows to send in one request; at least one.

        Args:
            contact: The server.
            bytes_per_row: Of the request, or of its answer, if that is larger.
        """
        limit = self._limits.get(contact, self._limit)
        room = limit - min(HEADER_BYTES, limit // 4)
        return max(1, room // max(1, bytes_per_row))

    def refused(self, contact: Contact, size: int) -> None:
        """Note that a server found a message of about `size` bytes too large: from now on they are half as large."""
        self._limits[contact] = max(1, min(size // 2, self._limits.get(contact, self._limit)))
        self._limits.move_to_end(contact)
        if len(self._limits) > MAX_CONTACTS:
            self._limits.popitem(last=False)
