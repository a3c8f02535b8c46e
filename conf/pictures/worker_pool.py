"""10 jobs of different length on 3 workers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from concurrency_patterns.testing import run_virtual
from concurrency_patterns.worker_pool import WorkerPool
from pictures import Bar, timeline

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTHS = (3, 1, 2, 2, 4, 1, 2, 1, 3, 1)


async def jobs() -> dict[object, list[Bar]]:
    """Return what each of the workers did and when."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    done: dict[object, list[Bar]] = {}

    async def job(number: int) -> None:
        began = loop.time() - start
        await asyncio.sleep(LENGTHS[number])
        row = done.setdefault(asyncio.current_task(), [])
        row.append(Bar(began, loop.time() - start, str(number)))

    async with WorkerPool(workers=3) as pool:
        for number in range(len(LENGTHS)):
            await pool.submit(job, number)
    return done


def draw(text: Callable[[str, str], str]) -> str:
    """Draw which worker does which job."""
    rows = sorted(run_virtual(jobs()).values(), key=lambda row: row[0].text)
    names = (text(f"工作者 {i}", f"worker {i}") for i in range(1, len(rows) + 1))
    return timeline(dict(zip(names, rows, strict=True)), x=text("时间（秒）", "time (s)"))
