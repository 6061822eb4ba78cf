"""Names of experts: `ffn.3.17` is the expert at coordinates (3, 17) of the grid `ffn`.

A uid is a grid name and one coordinate per grid dimension. A prefix is the beginning of a uid: `ffn`, `ffn.3`. Beam
search goes from the grid name to whole uids, one coordinate at a time (paper, section 3.2).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from labkit.contact import Contact

MAX_DIMENSIONS = 8
MAX_COORDINATE = 1 << 20
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_UID = re.compile(rf"({_NAME.pattern})((?:\.(?:0|[1-9][0-9]{{0,6}})){{1,{MAX_DIMENSIONS}}})")


@dataclass(frozen=True, slots=True)
class ExpertInfo:
    """A live expert, as the directory knows it.

    Args:
        uid: The expert.
        contact: The node that holds it.
        stamp: Changes with every declaration by its server.
        since: When its server began to declare experts, in milliseconds since 1970 by the server's own clock; 0 if that
            is not known.
        epoch: Grows each time that another server takes the expert over. The higher one wins everywhere.
        copies: The beginnings of the public keys (8 bytes each) of servers that hold a copy, the freshest first.
    """

    uid: str
    contact: Contact
    stamp: int = 0
    since: int = 0
    epoch: int = 0
    copies: tuple[bytes, ...] = ()


def check_name(name: str) -> str:
    """Returns `name`. Raises `ValueError` if it is not the name of a grid."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a grid name: a letter, then up to 63 letters, digits, - or _ (no dots)")
    return name


def make_uid(name: str, coordinates: Sequence[int]) -> str:
    """`make_uid("ffn", (3, 17)) == "ffn.3.17"`."""
    return ".".join((name, *map(str, coordinates)))


@lru_cache(maxsize=1 << 14)  # the same experts are named again and again
def split_uid(uid: str) -> tuple[str, tuple[int, ...]]:
    """`split_uid("ffn.3.17") == ("ffn", (3, 17))`. Raises `ValueError` for anything that is not a uid."""
    match = _UID.fullmatch(uid)
    if match is None:
        raise ValueError(f"{uid!r} is not an expert uid; a uid looks like ffn.3.17")
    coordinates = tuple(map(int, match[2].split(".")[1:]))
    if max(coordinates) > MAX_COORDINATE:
        raise ValueError(f"{uid!r} has a coordinate over {MAX_COORDINATE}")
    return match[1], coordinates


def parent(prefix: str) -> tuple[str, int]:
    """`parent("ffn.3.17") == ("ffn.3", 17)`."""
    head, _, last = prefix.rpartition(".")
    return head, int(last)


def check_grid(grid: Sequence[int]) -> tuple[int, ...]:
    """Returns `grid` as a tuple. Raises `ValueError` if these are not the sizes of a grid."""
    try:
        sizes = tuple(operator.index(size) for size in grid)
    except TypeError:
        raise ValueError(f"grid={grid!r}: the sizes of a grid are whole numbers, such as (4, 4)") from None
    if not 1 <= len(sizes) <= MAX_DIMENSIONS or min(sizes) < 1 or max(sizes) > MAX_COORDINATE:
        raise ValueError(
            f"grid={grid!r}: a grid has 1 to {MAX_DIMENSIONS} dimensions, each of 1 to {MAX_COORDINATE} coordinates"
        )
    return sizes


def grid_uids(name: str, grid: Sequence[int]) -> Iterator[str]:
    """Returns all uids of a grid; the last coordinate changes fastest."""
    return (make_uid(name, coordinates) for coordinates in product(*map(range, check_grid(grid))))


def check_inside(uids: Iterable[str], grid: Sequence[int]) -> None:
    """Raise `ValueError` unless all uids belong to one grid of these sizes."""
    sizes, names = check_grid(grid), set()
    for uid in uids:
        name, coordinates = split_uid(uid)
        names.add(name)
        if len(coordinates) != len(sizes) or any(c >= size for c, size in zip(coordinates, sizes, strict=True)):
            raise ValueError(f"{uid!r} is not in a grid of {' x '.join(map(str, sizes))}")
    if len(names) > 1:
        raise ValueError(f"uids of several grids: {', '.join(sorted(names))}")


def spread(uids: Iterable[str], servers: int) -> list[tuple[str, ...]]:
    """Divide experts among servers, as evenly as possible, along the diagonals of the grid.

    So no row or column of the grid is lost with one server, and beam search, which looks for the best row first, finds
    other experts in it. Raises `ValueError` if there are fewer experts than servers.
    """
    uids = sorted(uids, key=lambda uid: (split_uid(uid)[0], split_uid(uid)[1]))
    if not isinstance(servers, int) or not 1 <= servers <= len(uids):
        raise ValueError(f"servers={servers!r}: between 1 and the number of experts, {len(uids)}")
    uids.sort(key=lambda uid: sum(split_uid(uid)[1]) % servers)  # stable
    ends = [len(uids) * (i + 1) // servers for i in range(servers)]
    return [tuple(uids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def grid_for(experts: int) -> tuple[int, int]:
    """Returns the grid of so many experts that is nearest to a square: 16 -> (4, 4), 8 -> (2, 4), 7 -> (1, 7)."""
    if experts < 1:
        raise ValueError(f"experts={experts}: at least one")
    rows = next(r for r in range(math.isqrt(experts), 0, -1) if experts % r == 0)
    return rows, experts // rows
