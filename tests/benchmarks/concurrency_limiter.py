"""Concurrency limiter: what it costs to enter and to leave, alone and in a crowd."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from benchmarks.harness import OURS, Candidate, Case, blocks, cpu
from concurrency_patterns import ConcurrencyLimiter

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from benchmarks.harness import Maker, Measure

    # Returns what one enters, for a limit.
    Limiter = Callable[[int], Callable[[], AbstractAsyncContextManager[Any]]]


class Empty:
    """What ``async with`` costs by itself."""

    async def __aenter__(self) -> None:
        """Do nothing."""

    async def __aexit__(self, *error: object) -> None:
        """Do nothing."""


def empty(_: int) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """No limit at all."""
    block = Empty()
    return lambda: block


def semaphore(limit: int) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """asyncio.Semaphore."""
    block = asyncio.Semaphore(limit)
    return lambda: block


def ours(limit: int) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """Ours, with no bound on the line."""
    block = ConcurrencyLimiter(limit)
    return lambda: block


def ours_bounded(limit: int) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """Ours, with a bound on the line and on the wait."""
    block = ConcurrencyLimiter(limit, max_queue=10_000, max_wait=60)
    return lambda: block


def anyio_semaphore(limit: int) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """anyio's semaphore, which gives the loop a turn at each entry."""
    import anyio

    block = anyio.Semaphore(limit)
    return lambda: block


def anyio_fast(limit: int) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """anyio's semaphore without that turn."""
    import anyio

    block = anyio.Semaphore(limit, fast_acquire=True)
    return lambda: block


def anyio_capacity(limit: int) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """anyio's limiter, which knows its holders."""
    import anyio

    block = anyio.CapacityLimiter(limit)
    return lambda: block


def bulklink(limit: int) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """bulklink's bulkhead."""
    from bulklink import AsyncBulkhead

    return AsyncBulkhead(label="benchmark", parallelism=limit, waiting_room=10_000).slot


def nopanic(limit: int) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """nopanic's bulkhead as a block."""
    from nopanic import bulkhead

    return bulkhead(limit).guard


def hyx(limit: int) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """hyx's bulkhead."""
    from hyx.bulkhead import bulkhead

    block = bulkhead(max_concurrency=limit, max_capacity=10_000)
    return lambda: block


def alone(limiter: Limiter) -> Maker:
    """Enter and leave with nobody else around."""

    async def make() -> Measure:
        return blocks(limiter(10))

    return make


def crowd(limiter: Limiter, tasks: int) -> Maker:
    """So many tasks enter again and again, stay for one turn of the loop, and leave."""

    async def make() -> Measure:
        block = limiter(10)

        async def work(number: int) -> None:
            async def one() -> None:
                for _ in range(number // tasks):
                    async with block():
                        await asyncio.sleep(0)

            async with asyncio.TaskGroup() as group:
                for _ in range(tasks):
                    group.create_task(one())

        return cpu(work)

    return make


PEERS: list[tuple[str, Limiter, str]] = [
    ("anyio.Semaphore(fast_acquire=True)", anyio_fast, "anyio"),
    ("anyio.Semaphore", anyio_semaphore, "anyio"),
    ("anyio.CapacityLimiter", anyio_capacity, "anyio"),
    ("nopanic.bulkhead", nopanic, "nopanic"),
    ("hyx.bulkhead.bulkhead", hyx, "hyx"),
    ("bulklink.AsyncBulkhead", bulklink, "bulklink"),
]


def crowded(tasks: int) -> Case:
    """Make the case of so many tasks for 10 slots."""
    return Case(
        key=f"contended_{tasks}",
        zh=f"争用：{tasks} 个任务，10 个名额，占用一轮事件循环",
        en=f"Contended: {tasks} tasks, 10 slots, each held for one turn of the event loop",
        candidates=[
            Candidate("asyncio.Semaphore", crowd(semaphore, tasks)),
            Candidate("ConcurrencyLimiter", crowd(ours, tasks), OURS, at_most=1.0),
            Candidate("ConcurrencyLimiter(max_queue, max_wait)", crowd(ours_bounded, tasks), OURS),
            Candidate("(no limit)", crowd(empty, tasks)),
            *(Candidate(name, crowd(peer, tasks), package) for name, peer, package in PEERS),
        ],
        least=10 * tasks,
        slice=0.05,
        quick=2 * tasks,
    )


CASES = [
    Case(
        key="uncontended",
        zh="无争用的 async with",
        en="Uncontended async with",
        candidates=[
            Candidate("asyncio.Semaphore", alone(semaphore)),
            Candidate("ConcurrencyLimiter", alone(ours), OURS, at_most=0.7),
            Candidate("ConcurrencyLimiter(max_queue, max_wait)", alone(ours_bounded), OURS),
            Candidate("(no limit)", alone(empty)),
            *(Candidate(name, alone(peer), package) for name, peer, package in PEERS),
        ],
    ),
    crowded(100),
    crowded(1000),
]
