"""The three states of a circuit breaker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pictures import arrow, box, svg

if TYPE_CHECKING:
    from collections.abc import Callable


def draw(text: Callable[[str, str], str]) -> str:
    """Draw the states and what leads from one to the other."""
    return svg(
        250,
        box(66, 84, text("关闭", "closed"), width=104),
        box(414, 84, text("打开", "open"), width=104),
        box(240, 210, text("半开", "half-open"), width=104),
        arrow(
            (118, 76),
            (362, 76),
            text("连续失败达到阈值", "failures reach the threshold"),
            bend=36,
        ),
        arrow(
            (414, 106),
            (292, 214),
            text("等待结束", "the wait is over"),
            bend=34,
            offset=(24, 38),
            kind="note middle",
        ),
        arrow(
            (256, 188),
            (372, 106),
            text("探测失败", "a probe\nfails"),
            bend=14,
            offset=(-12, -10),
            kind="note end",
        ),
        arrow(
            (188, 214),
            (66, 106),
            text("探测成功", "probes succeed"),
            bend=34,
            offset=(-24, 38),
            kind="note middle",
        ),
    )
