"""Six calls through two slots: each waits in line, and then works."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from concurrency_patterns.compose import compose
from concurrency_patterns.concurrency_limiter import ConcurrencyLimiter
from concurrency_patterns.observe import Event, Measured, observe
from concurrency_patterns.testing import run_virtual
from pictures import Bar, timeline

if TYPE_CHECKING:
    from collections.abc import Callable


LEAST = 0.01  # seconds that can be seen
ROOM = 0.5  # seconds in which there is room for a word


async def calls() -> list[tuple[float, float, float]]:
    """Return of each call when it came, when it began to work, and when it ended."""
    events: list[Event] = []
    pipeline = compose(Measured(), ConcurrencyLimiter(2), Measured())
    observe("call", pipeline, events.append)
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def call(number: int) -> None:
        await asyncio.sleep(number * 0.2)
        await pipeline.call(asyncio.sleep, 1)

    await asyncio.gather(*(call(number) for number in range(6)))
    ended = [event for event in events if event.kind == "observe.call_ended"]
    whole = [event for event in ended if event.name == "call"]
    work = [event for event in ended if event.name == "call#2"]
    return [
        (end - outside.data["seconds"], end - inside.data["seconds"], end)
        for outside, inside in zip(whole, work, strict=True)
        for end in [outside.at - start]
    ]


def draw(text: Callable[[str, str], str]) -> str:
    """Draw the wait and the work of each call."""
    rows = {}
    wait, work = text("排队", "waits"), text("处理", "works")
    for number, (came, began, ended) in enumerate(sorted(run_virtual(calls())), start=1):
        waited = began - came
        bars = [Bar(began, ended, work)]
        if waited > LEAST:
            bars.insert(0, Bar(came, began, wait if waited > ROOM else "", "wait"))
        rows[text(f"调用 {number}", f"call {number}")] = bars
    return timeline(rows, x=text("时间（秒）", "time (s)"))
