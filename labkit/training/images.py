"""Encoded images as rows of pixels from 0 to 1.

Where a batch comes from: `columns` finds a column of images, and this decodes them. PIL is imported then.
"""

# Legend. n: images; dim: numbers of an image (its pixels in row-major order, channels last).

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labkit.training.data_files import Split

if TYPE_CHECKING:
    from PIL import Image

_GREY = {"1", "L", "LA", "La"}
_SIXTEEN_BITS = {"I;16", "I;16B", "I;16L", "I;16N"}


def pixels(splits: Sequence[Split], name: str) -> list[Tensor]:
    """The images of one column, in each split as [n, dim] float32 from 0 to 1.

    All images have one size. They are grey, or, if any of them has colours, red, green and blue. They are turned as
    their EXIF data say, as `datasets` does. Images of 16 bits keep their precision.

    Raises:
        ValueError: An image is missing, cannot be decoded, is transparent, or has another size. Says which.
    """
    images = [[_decoded(split, name, row, cell) for row, cell in enumerate(_cells(split, name))] for split in splits]
    first = images[0][0]
    has_colours = any(image.ndim == 3 for split in images for image in split)
    rows = []
    for split, decoded in zip(splits, images, strict=True):
        for row, image in enumerate(decoded):
            if image.shape[:2] != first.shape[:2]:
                sizes = " and ".join(f"{shape[1]} × {shape[0]}" for shape in (image.shape, first.shape))
                places = " and ".join((split.where(row, "image"), splits[0].where(0, "image")))
                raise ValueError(
                    f"{split.dataset}: the images of {name!r} have different sizes, {sizes} pixels, in {places}: "
                    "resize them to one size"
                )
            if has_colours and image.ndim == 2:
                decoded[row] = np.repeat(image[:, :, None], 3, axis=2)
        if len({image.dtype for image in decoded}) > 1:
            decoded = [image.astype(np.float32) / 255 if image.dtype == np.uint8 else image for image in decoded]
        x = torch.from_numpy(np.stack(decoded).reshape(len(decoded), -1)).to(torch.float32)  # [n, dim]
        rows.append(x.div_(255) if decoded[0].dtype == np.uint8 else x)
    return rows


def _cells(split: Split, name: str) -> list[dict[str, Any] | bytes | None]:
    cells: list[dict[str, Any] | bytes | None] = split.column(name).to_pylist()
    return cells


def _decoded(split: Split, name: str, row: int, cell: dict[str, Any] | bytes | None) -> npt.NDArray[Any]:
    """One image, as bytes or as float32 from 0 to 1: [height, width], or [height, width, 3]."""
    from PIL import Image, UnidentifiedImageError

    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    try:
        if data is None and not path:
            raise FileNotFoundError("it is missing")
        with Image.open(io.BytesIO(data) if data is not None else str(path)) as image:
            return _array(image)
    except Exception as error:  # of PIL's many decoders: SyntaxError, struct.error, OSError, …
        what = (
            "is no image that PIL can read" if isinstance(error, UnidentifiedImageError) else f"cannot be used: {error}"
        )
        raise ValueError(
            f"{split.dataset}: {split.where(row, 'image')} (column {name!r}) {what}. Mend it, or leave this row out"
        ) from error


def _array(image: Image.Image) -> npt.NDArray[Any]:
    """Its pixels. Raises `ValueError` where that would lose something."""
    from PIL import ImageOps

    image.load()
    if image.mode == "L" and image.format == "PNG" and not image.info:  # quickly: EXIF data and frames are in its info
        return np.asarray(image)
    if getattr(image, "is_animated", False) and image.format != "MPO":  # whose other pictures are previews
        raise ValueError("it has several frames; keep one of them")
    turned = ImageOps.exif_transpose(image)
    mode = turned.mode
    if mode in _SIXTEEN_BITS or (mode == "I" and image.format in ("PNG", "PPM")):  # whose 16 bits older PILs widen
        return np.asarray(turned).astype(np.float32) / 65535
    if mode in ("I", "F"):
        values = np.asarray(turned).astype(np.float32)
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"its pixels are numbers from {low:g} to {high:g}; scale them to 0 … 1, or 8 or 16 bits")
        return values
    if mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in turned.info:
        alpha = turned.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise ValueError("it is transparent in places; put it on a background, such as white, and save it without")
    return np.asarray(turned.convert("L" if mode in _GREY else "RGB"))
