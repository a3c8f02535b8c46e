"""An outage, as the callers see it: with nothing, and with a cache and a default."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from concurrency_patterns.compose import compose
from concurrency_patterns.fallback import Fallback, StaleCache, constant
from concurrency_patterns.testing import run_virtual
from pictures import Bar, timeline

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 30
DOWN, UP = 6, 24


async def answers() -> list[str]:
    """Return what each call of a second got: "primary", "stale" or "constant"."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    fallback, cache = Fallback(constant(None)), StaleCache(ttl=0, stale_ttl=9)

    async def service() -> str:
        if DOWN <= loop.time() - begin < UP:
            raise ConnectionError
        return "fresh"

    got = []
    for _ in range(SECONDS):
        old = cache.statistics().stale
        outcome = await fallback.outcome(compose(cache).call, service)
        got.append("stale" if cache.statistics().stale > old else outcome.source)
        await asyncio.sleep(1)
    return got


def spans(values: list[str]) -> list[tuple[str, int, int]]:
    """Put equal neighbours together: (value, start, end)."""
    found: list[tuple[str, int, int]] = []
    for second, value in enumerate(values):
        if found and found[-1][0] == value:
            found[-1] = (value, found[-1][1], second + 1)
        else:
            found.append((value, second, second + 1))
    return found


def draw(text: Callable[[str, str], str]) -> str:
    """Draw the service, and the answers without and with the two."""
    names = {
        "primary": (text("新的", "fresh"), ""),
        "stale": (text("旧的", "old"), "wait"),
        "constant": (text("默认", "default"), "wait"),
    }
    up, down = text("正常", "up"), text("不可用", "down")
    fresh, error = text("答案", "answers"), text("错误", "errors")
    return timeline(
        {
            text("服务", "service"): [
                Bar(0, DOWN, up),
                Bar(DOWN, UP, down, "bad"),
                Bar(UP, SECONDS, up),
            ],
            text("不降级", "without"): [
                Bar(0, DOWN, fresh),
                Bar(DOWN, UP, error, "bad"),
                Bar(UP, SECONDS, fresh),
            ],
            text("降级", "with"): [
                Bar(start, end, *names[value])
                for value, start, end in spans(run_virtual(answers()))
            ],
        },
        x=text("时间（秒）", "time (s)"),
    )
