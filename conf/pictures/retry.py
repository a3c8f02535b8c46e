"""100 clients that failed together come back: with and without jitter."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import TYPE_CHECKING

from concurrency_patterns.retry import Exponential, FullJitter, Retry
from concurrency_patterns.testing import run_virtual
from pictures import steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SECONDS = 8


async def load(backoff: Iterable[float]) -> list[tuple[float, float]]:
    """Return how many retries arrive in each tenth of a second."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    arrived: list[float] = []

    async def fail() -> None:
        arrived.append(loop.time() - start)
        raise ConnectionError

    retry = Retry(on=ConnectionError, attempts=4, backoff=backoff)
    await asyncio.gather(*(retry.call(fail) for _ in range(100)), return_exceptions=True)
    retries = Counter(int(time * 10 + 1e-6) for time in sorted(arrived)[100:])
    return [(tenth / 10, float(retries[tenth])) for tenth in range(SECONDS * 10)]


def draw(text: Callable[[str, str], str]) -> str:
    """Draw the load of both."""
    jitter = FullJitter(base=1, rng=random.Random(7))  # noqa: S311 -- seeded: each build draws the same
    return steps(
        {
            text("有抖动", "with jitter"): run_virtual(load(jitter)),
            text("没有抖动", "without jitter"): run_virtual(load(Exponential(base=1))),
        },
        x=text("时间（秒）", "time (s)"),
        y=text("每 0.1 秒到达的重试", "retries that arrive in each 0.1 s"),
    )
