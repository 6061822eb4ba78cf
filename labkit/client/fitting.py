"""Fitting a layer to a grid: its sizes, and the widths of rows, as the grid's servers declare them.

This comes before any batch: `Swarm.moe` refuses here what every expert would refuse later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from labkit.client.moe import SEQ, output_shapes
from labkit.directory.grids import GridInfo
from labkit.expert_protocol import TensorSchema
from labkit.suggest import nearest

ANY = -1  # a size of a schema where any will do
KINDS = {"ffn": 1, "transformer": 2}  # the dimensions of their rows, `hidden` the last, for servers without a schema
Out = int | Sequence[int | Sequence[int]]


def known_sizes(grids: Mapping[str, GridInfo], name: str) -> tuple[int, ...]:
    """The sizes of the grid `name` among those that are served. Raises `ValueError` if it is not one of them."""
    if name not in grids:
        if not grids:
            raise ValueError(f"no grid is served in this swarm; serve {name!r} first, or give its sizes: grid=…")
        close = nearest(name, grids)
        raise ValueError(
            f"nobody serves a grid {name!r} in this swarm, but {', '.join(sorted(grids))}; "
            + (f"did you mean {close!r}? Say " if close else "say ")
            + "which is meant with name=…, or, if it is still to be served, give its sizes: grid=…"
        )
    return grids[name].sizes


def fitting_outputs(
    dim: int, sizes: tuple[int, ...], out: Out | None, name: str, info: GridInfo, sequences: bool = False
) -> Out:
    """The widths, or shapes, of a layer's outputs over a grid.

    Args:
        dim: The width of the layer's input.
        sizes: The sizes of the grid, as the caller takes them to be.
        out: What the caller says of its outputs; None to go by what the grid declares, or else by `dim`.
        name: The name of the grid.
        info: What is declared of it.
        sequences: Whether the layer sends whole sequences.

    Raises:
        ValueError: The grid has other sizes, or its experts take or give something else.
    """
    if info.sizes != sizes:
        raise ValueError(f"grid={sizes}: the grid {name!r} has the sizes {info.sizes}; leave grid=… out")
    schema = info.schema
    inputs = schema.inputs if schema is not None else ()
    outputs = schema.outputs if schema is not None else ()
    width = info.options.get("hidden")
    if schema is None and info.kind in KINDS and isinstance(width, int):
        inputs = outputs = (TensorSchema("float32", (*[ANY] * (KINDS[info.kind] - 1), width)),)
    if inputs:
        _check_input(dim, name, inputs[0], sequences)
    if not outputs:
        return dim if out is None else out
    declared = [tensor.shape for tensor in outputs]
    if sequences:
        declared = [_of_sequence(shape, inputs[0].shape if inputs else ()) for shape in declared]
    first = 1 if sequences else 0  # the place of what is to be known: there are any number of positions
    if out is None:
        if declared == [(*[SEQ] * first, ANY)]:
            return dim  # any width in, and the same out
        if any(ANY in shape[first:] for shape in declared):
            raise ValueError(
                f"the experts of the grid {name!r} give {_shapes(declared)}; say with out=… what that is for "
                f"{'positions' if sequences else 'rows'} of width {dim}"
            )
        return declared
    wanted = output_shapes(out, sequences)
    if len(wanted) != len(declared) or any(
        len(one) != len(other) or any(a != b for a, b in zip(one, other, strict=True) if ANY not in (a, b))
        for one, other in zip(wanted, declared, strict=True)
    ):
        raise ValueError(f"out={out!r}: the experts of the grid {name!r} give {_shapes(declared)}; leave out=… out")
    return out


def _of_sequence(shape: tuple[int, ...], of_input: tuple[int, ...]) -> tuple[int, ...]:
    """An output's shape as a layer over sequences has it, from one that was seen: `SEQ` for the positions."""
    if len(of_input) == 1:  # it was seen with single positions
        return (SEQ, *shape)
    return (SEQ, *shape[1:]) if len(shape) > 1 and of_input and shape[0] == of_input[0] else shape


def _check_input(dim: int, name: str, tensor: TensorSchema, sequences: bool) -> None:
    shape = tensor.shape
    whole = len(shape) == 2 and shape[1] in (dim, ANY)
    if len(shape) != 1 and not (sequences and len(shape) == 2):
        raise ValueError(
            f"the experts of the grid {name!r} take {_shapes([shape])}, and a layer sends each row as one "
            + ("sequence of vectors" if sequences else "vector")
            + (f"; swarm.moe({dim}, sequences=True) sends whole sequences" if whole else "")
            + "; call them with swarm.expert(uid)"
        )
    if shape[-1] not in (dim, ANY):
        more = ", sequences=True" if sequences else ""
        raise ValueError(
            f"dim={dim}: the experts of the grid {name!r} take {'positions' if len(shape) == 2 else 'rows'} of width "
            f"{shape[-1]}, so write swarm.moe({shape[-1]}{more})"
        )


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    said = (f"[rows, {', '.join('any' if size == ANY else str(size) for size in shape)}]" for shape in shapes)
    return " and ".join(said)
