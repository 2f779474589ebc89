"""Figures as pictures inside an HTML page: two drawings of each, one for a screen, one for a phone."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from entropy_pl.records import Json
from entropy_pl.reporting.figures import WIDTH, figures_of_width

PHONE = 3.73  # inches at 96 pixels: a phone of 390 pixels less the page's margins
SMALLEST = 9.0  # points: 12 pixels
SCROLLED = 8.0  # likewise, where the picture is never shown narrower than 52 rem


def picture(draw: Callable[[], Figure], words: str, *, scrolls: bool = False) -> Json:
    """A figure as the page's template takes it: drawings as ``data:`` addresses of SVG, texts as outlines.

    An address of its own keeps each drawing's ids apart from every other's, and no text of a record reaches the page's
    own markup.

    Args:
        draw: makes the figure, at whatever width :func:`.figures_of_width` says.
        words: for who cannot see it.
        scrolls: whether a phone shows the one for a screen, in a box to scroll, since it cannot be made narrower.

    Returns:
        ``wide`` and ``narrow`` (None if it scrolls), each ``{"source", "width", "height"}`` with pixels, ``words`` and
        ``scrolls``.
    """
    return {
        "wide": _drawing(draw, WIDTH, SCROLLED if scrolls else SMALLEST),
        "narrow": None if scrolls else _drawing(draw, PHONE, SMALLEST),
        "words": words,
        "scrolls": scrolls,
    }


def _drawing(draw: Callable[[], Figure], width: float, smallest: float) -> Json:
    with figures_of_width(width):
        figure = draw()
    for text in figure.findobj(Text):
        text.set_fontsize(max(text.get_fontsize(), smallest))
    file = io.BytesIO()
    # outlines: a phone has none of matplotlib's fonts; a fixed salt and no date: the same run gives the same page
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "entropy_pl"}):
        figure.savefig(file, format="svg", dpi=200, metadata={"Date": None})
    # a hundredth of a point is finer than any screen; matplotlib writes a millionth
    svg = re.sub(rb' d="[^"]*"', lambda path: re.sub(rb"(\.\d\d)\d+", rb"\1", path[0]), file.getvalue())
    wide, high = figure.get_size_inches()
    encoded = base64.b64encode(svg).decode()
    return {"source": f"data:image/svg+xml;base64,{encoded}", "width": round(96 * wide), "height": round(96 * high)}
