"""The three states of a circuit breaker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pictures import arrow, box, svg

if TYPE_CHECKING:
    from collections.abc import Callable


def draw(text: Callable[[str, str], str]) -> str:
    """Draw the states and what leads from one to the other."""
    return svg(
        260,
        box(76, 84, text("关闭", "closed"), width=104),
        box(404, 84, text("打开", "open"), width=104),
        box(240, 212, text("半开", "half-open"), width=104),
        arrow(
            (128, 74), (352, 74), text("连续失败达到阈值", "failures reach the threshold"), bend=30
        ),
        arrow(
            (404, 106),
            (292, 218),
            text("等待\n结束", "the wait\nis over"),
            bend=-28,
            offset=(10, 14),
            kind="note",
        ),
        arrow(
            (262, 190),
            (356, 104),
            text("探测失败", "a probe\nfails"),
            bend=-12,
            offset=(-6, -2),
            kind="note end",
        ),
        arrow(
            (188, 218),
            (76, 106),
            text("探测都成功", "the probes\nsucceed"),
            bend=-28,
            offset=(-10, 16),
            kind="note end",
        ),
    )
