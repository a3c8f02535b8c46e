"""The layers that a call passes through, in the order in which ``compose`` holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from concurrency_patterns import (
    CircuitBreaker,
    ConcurrencyLimiter,
    Fallback,
    Retry,
    Timeout,
    TokenBucket,
    compose,
    constant,
)
from pictures import WIDTH, label, number, svg

if TYPE_CHECKING:
    from collections.abc import Callable

HEIGHT = 34
STEP = 14


def layers() -> list[str]:
    """Return the names of the policies in the default order, the outermost first."""
    pipeline = compose(
        Fallback(constant(None)),
        Timeout(5),
        Retry(on=ConnectionError),
        CircuitBreaker(),
        ConcurrencyLimiter(20),
        TokenBucket(rate=100, capacity=10),
        Timeout(1),
    )
    return [type(policy).__name__ for policy in pipeline.policies]


def draw(text: Callable[[str, str], str]) -> str:
    """Draw each layer inside of the one before, with what it is for."""
    purposes = [
        text("给次一等的答案", "a second-best answer"),
        text("总共等多久", "how long in all"),
        text("再试一次", "try again"),
        text("垮了就不打扰", "leave it alone"),
        text("先有名额", "first a slot"),
        text("再取令牌", "then a token"),
        text("一次等多久", "how long for one"),
    ]
    names = layers()
    parts = []
    bottom = 8 + (HEIGHT + 4) * (len(names) + 1)
    for i, (name, purpose) in enumerate(zip(names, purposes, strict=True)):
        left, top = 6 + STEP * i, 8 + (HEIGHT + 4) * i
        right = WIDTH - 6 - STEP * i
        below = bottom + 8 * (len(names) - i)
        parts += [
            f'<rect class="box" x="{left}" y="{top}" width="{right - left}" '
            f'height="{number(below - top)}" rx="8"/>',
            label(left + 10, top + 22, name),
            label(right - 10, top + 22, purpose, "note end"),
        ]
    top = 8 + (HEIGHT + 4) * len(names)
    parts.append(label(WIDTH / 2, top + 22, text("你的函数", "your function"), "middle"))
    return svg(bottom + 8 * len(names) + 8, *parts)
