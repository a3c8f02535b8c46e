"""The states of a circuit breaker, drawn from its own table of transitions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from concurrency_patterns.circuit_breaker import TRANSITIONS, CircuitEvent, CircuitState
from pictures import arrow, box, svg

if TYPE_CHECKING:
    from collections.abc import Callable

BY_HAND = {CircuitEvent.ISOLATED, CircuitEvent.RESET}  # from every state; the text tells it


class Way(NamedTuple):
    """Where the arrow between two states runs, and where its text stands."""

    start: tuple[float, float]
    end: tuple[float, float]
    bend: float
    kind: str
    offset: tuple[float, float]


PLACES = {
    CircuitState.CLOSED: (66, 84),
    CircuitState.OPEN: (414, 84),
    CircuitState.HALF_OPEN: (240, 210),
}
WAYS = {
    (CircuitState.CLOSED, CircuitState.OPEN): Way((118, 76), (362, 76), 36, "note middle", (0, -8)),
    (CircuitState.OPEN, CircuitState.HALF_OPEN): Way(
        (414, 106), (292, 214), 34, "note middle", (24, 38)
    ),
    (CircuitState.HALF_OPEN, CircuitState.OPEN): Way(
        (256, 188), (372, 106), 14, "note end", (-12, -10)
    ),
    (CircuitState.HALF_OPEN, CircuitState.CLOSED): Way(
        (188, 214), (66, 106), 34, "note middle", (-24, 38)
    ),
}


def draw(text: Callable[[str, str], str]) -> str:
    """Draw the states and what leads from one to the other."""
    states = {
        CircuitState.CLOSED: text("关闭", "closed"),
        CircuitState.OPEN: text("打开", "open"),
        CircuitState.HALF_OPEN: text("半开", "half-open"),
    }
    events = {
        CircuitEvent.TRIPPED: text("连续失败达到上限", "too many failures"),
        CircuitEvent.WAITED: text("等待结束", "the wait is over"),
        CircuitEvent.RECOVERED: text("探测全部成功", "the probes succeed"),
        CircuitEvent.PROBE_FAILED: text("探测失败", "a probe\nfails"),
    }
    return svg(
        250,
        *(box(*PLACES[state], states[state], width=104) for state in CircuitState),
        *(
            arrow(
                way.start, way.end, events[event], bend=way.bend, kind=way.kind, offset=way.offset
            )
            for (before, event), after in TRANSITIONS.items()
            if event not in BY_HAND
            for way in [WAYS[before, after]]
        ),
    )
