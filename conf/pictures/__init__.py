"""The helpers that draw the book's pictures as SVG.

A picture is 480 units wide, so that its text of 14 units can be read on a phone. It names no
colour: its classes (``line``, ``bar``, ``box``, ``note``, ...) get theirs in static/site.css,
where dark mode changes them. A module here has a function ``draw(text)``, and ``text("中文",
"English")`` picks the language.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise
from math import ceil, hypot
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH = 480


class Bar(NamedTuple):
    """A piece of work on a timeline; ``kind`` is "", "wait" or "bad"."""

    start: float
    end: float
    text: str = ""
    kind: str = ""


def number(value: float) -> str:
    """Write a coordinate or a tick as short as it can be."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def svg(height: float, *parts: str) -> str:
    """Put the parts together."""
    box = f"0 0 {WIDTH} {number(height)}"
    return f'<svg viewBox="{box}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'


def label(x: float, y: float, text: str, kind: str = "") -> str:
    """Write text at a place; ``kind`` is made of "middle", "end" and "note"."""
    lines = text.split("\n")
    top = y - 9 * (len(lines) - 1)
    return "".join(
        f'<text class="{kind}" x="{number(x)}" y="{number(top + 18 * i)}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )


def line(points: Sequence[tuple[float, float]], kind: str) -> str:
    """Draw a line through the points; ``kind`` is "line", "line second", "axis" or "grid"."""
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def ticks(least: float, most: float, count: int = 6) -> list[float]:
    """Return round values from ``least`` to ``most``."""
    rough = (most - least) / count
    size = next(
        size * scale
        for scale in (10.0**power for power in range(-6, 9))
        for size in (1, 2, 5)
        if size * scale >= rough * 0.999
    )
    first = ceil(least / size - 1e-9)
    return [i * size for i in range(first, int(most / size + 1e-9) + 1)]


def steps(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, height: float = 260
) -> str:
    """Draw values that jump: each series is a list of (time, value from then on).

    With two series, the second is dashed, and their names stand above the chart.
    """
    every = [point for points in series.values() for point in points]
    end, top = max(t for t, _ in every), max(v for _, v in every)
    start = min(t for t, _ in every)
    left, right, above, below = 44, WIDTH - 12, 50 if len(series) > 1 else 34, height - 44

    def across(t: float) -> float:
        return left + (t - start) / (end - start) * (right - left)

    def up(v: float) -> float:
        return below - v / top * (below - above)

    parts = [label(4, 14, y, "note"), label(right, height - 6, x, "note end")]
    for v in ticks(0, top, 5):
        parts.append(line([(left, up(v)), (right, up(v))], "grid"))
        parts.append(label(left - 8, up(v) + 5, number(v), "note end"))
    for t in ticks(start, end):
        parts.append(line([(across(t), below), (across(t), below + 5)], "axis"))
        parts.append(label(across(t), below + 20, number(t), "note middle"))
    parts.append(line([(left, below), (right, below)], "axis"))
    for i, (name, points) in enumerate(series.items()):
        kind = "line second" if i else "line"
        corners = [(across(points[0][0]), up(points[0][1]))]
        for (_, before), (t, after) in pairwise([*points, (end, points[-1][1])]):
            corners += [(across(t), up(before)), (across(t), up(after))]
        parts.append(line(corners, kind))
        if len(series) > 1:
            at = left + i * (right - left) / 2
            parts.append(line([(at, 33), (at + 26, 33)], kind))
            parts.append(label(at + 34, 38, name, "note"))
    return svg(height, *parts)


def timeline(rows: Mapping[str, Sequence[Bar]], *, x: str, name_width: float = 84) -> str:
    """Draw one row of bars for each name, above an axis of time."""
    bars = [bar for row in rows.values() for bar in row]
    start, end = min(bar.start for bar in bars), max(bar.end for bar in bars)
    left, right, row_height = name_width, WIDTH - 12, 34
    below = row_height * len(rows) + 8

    def across(t: float) -> float:
        return left + (t - start) / (end - start) * (right - left)

    parts = []
    for t in ticks(start, end):
        parts.append(line([(across(t), 4), (across(t), below)], "grid"))
        parts.append(label(across(t), below + 18, number(t), "note middle"))
    for i, (name, row) in enumerate(rows.items()):
        top = 8 + i * row_height
        parts.append(label(left - 10, top + 18, name, "end"))
        for bar in row:
            width = max(across(bar.end) - across(bar.start), 2)
            parts.append(
                f'<rect class="bar {bar.kind}" x="{number(across(bar.start))}" y="{top}" '
                f'width="{number(width)}" height="26" rx="3"/>'
            )
            parts.append(label(across(bar.start) + width / 2, top + 18, bar.text, "middle"))
    parts.append(line([(left, below), (right, below)], "axis"))
    parts.append(label(right, below + 38, x, "note end"))
    return svg(below + 46, *parts)


def box(x: float, y: float, text: str, *, width: float = 96, height: float = 44) -> str:
    """Draw a box with rounded corners around its middle: a state, a task, a queue."""
    return (
        f'<rect class="box" x="{number(x - width / 2)}" y="{number(y - height / 2)}" '
        f'width="{number(width)}" height="{number(height)}" rx="{number(min(height / 2, 16))}"/>'
        + label(x, y + 5, text, "middle")
    )


def arrow(
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    *,
    bend: float = 0,
    kind: str = "note middle",
    offset: tuple[float, float] = (0, -8),
) -> str:
    """Draw an arrow, bent to its left by ``bend``, with a text beside its middle."""
    (x1, y1), (x2, y2) = start, end
    length = hypot(x2 - x1, y2 - y1)
    across, down = (y2 - y1) / length, -(x2 - x1) / length
    middle_x, middle_y = (x1 + x2) / 2 + across * bend, (y1 + y2) / 2 + down * bend
    # The control point of a parabola lies twice as far out as its middle.
    control_x, control_y = middle_x + across * bend, middle_y + down * bend
    toward = hypot(x2 - control_x, y2 - control_y)
    dx, dy = (x2 - control_x) / toward, (y2 - control_y) / toward
    base_x, base_y = x2 - 9 * dx, y2 - 9 * dy
    corners = (
        (x2, y2),
        (base_x - 4.5 * dy, base_y + 4.5 * dx),
        (base_x + 4.5 * dy, base_y - 4.5 * dx),
    )
    points = " ".join(f"{number(px)},{number(py)}" for px, py in corners)
    path = " ".join(number(v) for v in (control_x, control_y, base_x, base_y))
    return (
        f'<path class="arrow" d="M{number(x1)} {number(y1)}Q{path}"/>'
        f'<polygon class="head" points="{points}"/>'
        + (label(middle_x + offset[0], middle_y + offset[1], text, kind) if text else "")
    )
