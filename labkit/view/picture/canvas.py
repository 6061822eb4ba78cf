"""A sheet to draw on: texts, lines and boxes in pixels, written as a PNG. `snapshot` and `heat_map` draw on it.

It uses only Matplotlib's object API, without pyplot or axes, and sets every property itself. So the user's `rcParams`,
backend and figures are neither changed nor taken into account, and any thread may draw.
"""

# x: pixels from the left; y: pixels from the top; a box: (x, y, width, height)

from __future__ import annotations

import io
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from labkit.forks import on_fork
from labkit.paths import user_path

FONT = "DejaVu Sans"  # comes with matplotlib
DPI = 100
INK, DIM, FAINT = "#1a1a1a", "#666666", "#d0d0d0"  # colours of text, of secondary text, and of lines between parts

Align = Literal["left", "center", "right"]
Boxes = npt.NDArray[np.float64]  # [n, 4]

_lock = threading.Lock()  # fonts are shared, and not safe between threads


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


on_fork(_renew_lock)  # a thread that does not exist there may hold it


class Picture:
    """A PNG image that a notebook shows: what `swarm.snapshot()` returns.

    Attributes:
        png: The bytes of the PNG file.
    """

    def __init__(self, png: bytes) -> None:
        self.png = png

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the image to a file.

        Args:
            path: Where to write it, such as "swarm.png".

        Returns:
            The path of the file.

        Raises:
            OSError: The file cannot be written.
        """
        path = user_path(path)
        path.write_bytes(self.png)
        return path

    def __repr__(self) -> str:
        return f"<picture: PNG of {len(self.png):,} bytes>"


class Sheet:
    """A white sheet of `width` × `height` pixels. Later artists lie above earlier ones; `png()` ends with the image."""

    def __init__(self, width: int, height: int) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("pictures are drawn by matplotlib: pip install matplotlib") from error
        self.width, self.height = width, height
        self._figure: Any  # matplotlib is only partly typed
        with _lock:
            self._figure = Figure((width / DPI, height / DPI), dpi=DPI, facecolor="white", linewidth=0, frameon=True)
        self._figure.set_layout_engine("none")
        _plain_style(self._figure.patch)
        self._drawn = 0

    def text(
        self, x: float, y: float, text: str, *, size: float = 11, color: str = INK, bold: bool = False,
        align: Align = "left",
    ) -> None:  # fmt: skip
        """Write a line of text, `size` pixels high, on the baseline `y` and aligned at `x`. It has no markup."""
        from matplotlib.font_manager import FontProperties
        from matplotlib.text import Text

        with _lock:
            font = FontProperties(
                family=FONT, style="normal", variant="normal", weight="bold" if bold else "normal", stretch="normal",
                size=size * 72 / DPI,
            )  # fmt: skip
            artist = Text(
                x, self.height - y, _drawable(text), color=color, fontproperties=font, usetex=False, parse_math=False,
                horizontalalignment=align, verticalalignment="baseline", antialiased=True,
            )  # fmt: skip
            self._add(artist)

    def line(
        self, x: npt.ArrayLike, y: npt.ArrayLike, *, color: str = INK, width: float = 1.0, dashed: bool = False,
        dots: bool = False,
    ) -> None:  # fmt: skip
        """Draw a line through points, interrupted where a point is NaN; or with `dots`, a dot at each point."""
        from matplotlib.lines import Line2D

        artist = Line2D(
            np.atleast_1d(x), self.height - np.atleast_1d(np.asarray(y, np.float64)), color=color, linewidth=width,
            linestyle="none" if dots else (0, (4, 3)) if dashed else "-", marker="o" if dots else "none",
            markersize=width, markeredgewidth=0, antialiased=True,
        )  # fmt: skip
        self._add(artist)

    def boxes(self, boxes: npt.ArrayLike, colors: Any, *, edge: str = "none", width: float = 1.0) -> None:
        """Draw filled boxes [n, 4]. `colors` is one colour, "none" (only edges), or a colour for each box, [n, 4]."""
        from matplotlib.collections import PolyCollection

        x, y, w, h = np.asarray(boxes, np.float64).reshape(-1, 4).T
        y = self.height - y
        corners: Any = np.stack([np.stack([x, x + w, x + w, x], 1), np.stack([y, y, y - h, y - h], 1)], 2)  # [n, 4, 2]
        artist = PolyCollection(
            corners, facecolors=colors, edgecolors=edge, linewidths=0 if edge == "none" else width, antialiaseds=False,
            linestyles="-",
        )  # fmt: skip
        self._add(artist)

    def hatch(self, boxes: npt.ArrayLike, color: str, width: float = 1.0) -> None:
        """Draw diagonal lines across boxes [n, 4], which can be told from any fill without seeing colours."""
        from matplotlib.collections import LineCollection

        x, y, w, h = np.asarray(boxes, np.float64).reshape(-1, 4).T
        strokes = []
        count = 7 if w.max(initial=0) > 24 else 3
        for share in np.arange(1, count + 1) * 2 / (count + 1):  # along two sides, from corner to corner
            low, high = min(share, 1.0), max(share - 1, 0.0)
            start, end = (x + high * w, self.height - y - low * h), (x + low * w, self.height - y - high * h)
            strokes.append(np.stack([np.stack(start, 1), np.stack(end, 1)], 1))
        lines: Any = np.concatenate(strokes)  # [strokes, 2, 2]
        self._add(LineCollection(lines, colors=color, linewidths=width, linestyles="-", antialiaseds=True))

    def png(self) -> bytes:
        """Draw everything and return the PNG file's bytes."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        with _lock:
            canvas: Any = FigureCanvasAgg(self._figure)
            canvas.draw()
            image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()

    def _add(self, artist: Any) -> None:
        from matplotlib.transforms import IdentityTransform

        self._drawn += 1
        artist.set_zorder(self._drawn)
        _plain_style(artist)
        artist.set_transform(IdentityTransform())  # pixels
        self._figure.add_artist(artist)


def cividis(shares: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Returns the colours [n, 4] of numbers from 0 to 1 in the cividis colour map."""
    from matplotlib import colormaps

    colors: npt.NDArray[np.float64] = np.asarray(colormaps["cividis"](np.asarray(shares, np.float64)))
    return colors


def text_width(text: str, size: float = 11, bold: bool = False) -> float:
    """Returns how many pixels wide a text is."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    with _lock:
        font = get_font(findfont(FontProperties(family=FONT, weight="bold" if bold else "normal")))
        font.set_size(size * 72 / DPI, DPI)
        font.set_text(_drawable(text))
        return float(font.get_width_height()[0]) / 64  # in 64ths of a pixel


def shorten(text: str, length: int) -> str:
    """Shorten a text to at most `length` characters, with … for what is left out in the middle."""
    if len(text) <= length:
        return text
    head = (length - 1) // 3
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def clip(text: str, length: int) -> str:
    """Shorten a text to at most `length` characters, with … for what is left out at the end."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _plain_style(artist: Any) -> None:
    """Remove what `plt.xkcd()` and the like have set globally."""
    artist.set_sketch_params(None)
    artist.set_path_effects([])


@cache
def _letters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(FONT)).get_charmap())


def _drawable(text: str) -> str:
    """Replace characters that our font cannot draw by ?: names are chosen by other people."""
    return "".join(letter if letter >= " " and ord(letter) in _letters() else "?" for letter in text)
