"""12 items through a channel of capacity 2 to 3 consumers that are slower than the producer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from concurrency_patterns.channel import Channel
from concurrency_patterns.testing import run_virtual
from pictures import Bar, timeline

if TYPE_CHECKING:
    from collections.abc import Callable

ITEMS, CONSUMERS, CAPACITY = 12, 3, 2
MAKE, HANDLE = 0.1, 0.6


async def record() -> list[list[Bar]]:
    """Return the bars of the producer and of each consumer."""
    channel: Channel[int] = Channel(CAPACITY)
    loop = asyncio.get_running_loop()
    start = loop.time()
    rows: list[list[Bar]] = [[] for _ in range(1 + CONSUMERS)]

    def now() -> float:
        return round(loop.time() - start, 3)

    async def produce() -> None:
        for number in range(ITEMS):
            began = now()
            await asyncio.sleep(MAKE)
            made = now()
            rows[0].append(Bar(began, made))
            await channel.send(number)
            if now() > made:
                rows[0].append(Bar(made, now(), kind="wait"))
        channel.close()

    async def consume(row: list[Bar]) -> None:
        async for number in channel:
            began = now()
            await asyncio.sleep(HANDLE)
            row.append(Bar(began, now(), str(number)))

    async with asyncio.TaskGroup() as group:
        group.create_task(produce())
        for row in rows[1:]:
            group.create_task(consume(row))
    return rows


def draw(text: Callable[[str, str], str]) -> str:
    """Draw when the producer makes and waits, and which item each consumer has."""
    producer, *consumers = run_virtual(record())
    rows = {text("生产者", "producer"): producer}
    for number, row in enumerate(consumers, 1):
        rows[text(f"消费者 {number}", f"consumer {number}")] = row
    return timeline(rows, x=text("时间（秒）", "time (s)"), name_width=100)
