"""10 fetches of one second each, through 3 slots."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from concurrency_patterns.concurrency_limiter import ConcurrencyLimiter
from concurrency_patterns.testing import run_virtual
from pictures import Bar, timeline

if TYPE_CHECKING:
    from collections.abc import Callable


async def fetches() -> list[tuple[float, float]]:
    """Return when each of the fetches held its slot."""
    limiter = ConcurrencyLimiter(3)
    loop = asyncio.get_running_loop()
    start = loop.time()
    inside = []

    async def fetch() -> None:
        async with limiter:
            entered = loop.time() - start
            await asyncio.sleep(1)
            inside.append((entered, loop.time() - start))

    await asyncio.gather(*(fetch() for _ in range(10)))
    return sorted(inside)


def draw(text: Callable[[str, str], str]) -> str:
    """Draw which fetch is in which slot."""
    slots: list[list[Bar]] = [[], [], []]
    for number, (entered, left) in enumerate(run_virtual(fetches())):
        free = next(slot for slot in slots if not slot or slot[-1].end <= entered)
        free.append(Bar(entered, left, str(number)))
    rows = {text(f"名额 {i}", f"slot {i}"): slot for i, slot in enumerate(slots, start=1)}
    return timeline(rows, x=text("时间（秒）", "time (s)"))
