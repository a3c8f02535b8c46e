"""20 requests at 5 a second, from a full bucket of 5."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from concurrency_patterns.testing import run_virtual
from concurrency_patterns.token_bucket import TokenBucket
from pictures import steps

if TYPE_CHECKING:
    from collections.abc import Callable


async def times() -> list[float]:
    """Return when each of the requests went out."""
    bucket = TokenBucket(rate=5, capacity=5)
    loop = asyncio.get_running_loop()
    start = loop.time()
    went_out = []

    async def request() -> None:
        await bucket.acquire()
        went_out.append(round(loop.time() - start, 3))

    await asyncio.gather(*(request() for _ in range(20)))
    return went_out


def draw(text: Callable[[str, str], str]) -> str:
    """Draw how many have gone out at each moment."""
    points = [(0.0, 0.0), *((t, i + 1.0) for i, t in enumerate(run_virtual(times())))]
    return steps(
        {"": points},
        x=text("时间（秒）", "time (s)"),
        y=text("已放行的请求", "requests let through"),
    )
