"""How many calls have started: slot first, then token, and the other way round."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING

from concurrency_patterns.compose import OrderWarning, compose
from concurrency_patterns.concurrency_limiter import ConcurrencyLimiter
from concurrency_patterns.testing import run_virtual
from concurrency_patterns.token_bucket import TokenBucket
from pictures import steps

if TYPE_CHECKING:
    from collections.abc import Callable

STALL = 2
SECONDS = 4


async def starts(*, slot_first: bool) -> list[tuple[float, float]]:
    """Return (time, calls started by then) for a service that stalls until second 2."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    points = [(0.0, 0.0)]
    slot, token = ConcurrencyLimiter(5), TokenBucket(rate=10, capacity=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OrderWarning)
        pipeline = compose(slot, token) if slot_first else compose(token, slot)

    async def service() -> None:
        now = loop.time() - begin
        points.append((now, points[-1][1] + 1))
        await asyncio.sleep(STALL - now if now < STALL else 0.01)

    tasks = [asyncio.create_task(pipeline.call(service)) for _ in range(60)]
    await asyncio.sleep(SECONDS)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return [point for point in points if point[0] < SECONDS]


def draw(text: Callable[[str, str], str]) -> str:
    """Draw both."""
    return steps(
        {
            text("先名额，后令牌", "slot, then token"): run_virtual(starts(slot_first=True)),
            text("先令牌，后名额", "token, then slot"): run_virtual(starts(slot_first=False)),
        },
        x=text("时间（秒）", "time (s)"),
        y=text("已经开始的调用", "calls started"),
    )
