"""Three steps and a clean-up under one deadline."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from concurrency_patterns.errors import DeadlineExceeded
from concurrency_patterns.testing import run_virtual
from concurrency_patterns.timeout import bounded_cleanup, deadline
from pictures import Bar, timeline

if TYPE_CHECKING:
    from collections.abc import Callable


async def run(names: list[str], text: Callable[[str, str], str]) -> dict[str, list[Bar]]:
    """Return when each step began and ended."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    rows: dict[str, list[Bar]] = {name: [] for name in names}

    async def step(name: str, seconds: float, label: str, kind: str = "") -> None:
        began = loop.time() - start
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            label, kind = text("被取消", "cancelled"), "bad"
            raise
        finally:
            rows[name].append(Bar(began, loop.time() - start, label, kind))

    try:
        async with deadline(2):
            try:
                await step(names[1], 0.8, "0.8")
                await step(names[2], 0.5, "0.5")
                await step(names[3], 60, "")
            finally:
                cleanup = step(names[4], 0.4, "0.4", "wait")
                await bounded_cleanup(cleanup, 1)
    except DeadlineExceeded:
        pass
    rows[names[0]].append(Bar(0, 2, "deadline(2)"))
    return rows


def draw(text: Callable[[str, str], str]) -> str:
    """Draw the steps on a timeline."""
    names = [
        text("期限", "limit"),
        text("连接", "connect"),
        text("查询", "query"),
        text("下载", "download"),
        text("清理", "clean up"),
    ]
    return timeline(run_virtual(run(names, text)), x=text("时间（秒）", "time (s)"))
