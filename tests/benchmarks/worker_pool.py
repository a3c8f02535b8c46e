"""Worker pool and bounded map: what it costs to run one task, when so many may run at once."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from benchmarks.harness import OURS, Candidate, Case, cpu, noop
from concurrency_patterns import WorkerPool, bounded_map

if TYPE_CHECKING:
    from benchmarks.harness import Maker, Measure


def task_group(limit: int) -> Measure:
    """One task for each item, and a semaphore in each task."""

    async def work(number: int) -> None:
        semaphore = asyncio.Semaphore(limit)

        async def one(item: int) -> object:
            async with semaphore:
                return await noop(item)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in range(number)]
        assert len([task.result() for task in tasks]) == number

    return cpu(work)


def gather(limit: int) -> Measure:
    """The same with gather."""

    async def work(number: int) -> None:
        semaphore = asyncio.Semaphore(limit)

        async def one(item: int) -> object:
            async with semaphore:
                return await noop(item)

        assert len(await asyncio.gather(*(one(item) for item in range(number)))) == number

    return cpu(work)


def ours_bounded_map(limit: int) -> Measure:
    """Ours, as a list."""

    async def work(number: int) -> None:
        assert len(await bounded_map(noop, range(number), limit)) == number

    return cpu(work)


def ours_map(limit: int, *, ordered: bool) -> Measure:
    """Ours, as a stream."""

    async def work(number: int) -> None:
        async with WorkerPool(limit) as pool:
            results = [r async for r in pool.map(noop, range(number), ordered=ordered)]
        assert len(results) == number

    return cpu(work)


def ours_submit(limit: int) -> Measure:
    """Ours, with a handle for each task."""

    async def work(number: int) -> None:
        async with WorkerPool(limit) as pool:
            handles = [await pool.submit(noop, item) for item in range(number)]
        assert len([handle.result() for handle in handles]) == number

    return cpu(work)


def aiometer_amap(limit: int) -> Measure:
    """aiometer, as a stream."""
    import aiometer

    async def work(number: int) -> None:
        count = 0
        async with aiometer.amap(noop, range(number), max_at_once=limit) as results:
            async for _ in results:
                count += 1
        assert count == number

    return cpu(work)


def aiometer_run_all(limit: int) -> Measure:
    """aiometer, as a list."""
    import aiometer

    async def work(number: int) -> None:
        jobs = [functools.partial(noop, item) for item in range(number)]
        assert len(await aiometer.run_all(jobs, max_at_once=limit)) == number

    return cpu(work)


def aiojobs_spawn(limit: int) -> Measure:
    """aiojobs, with a handle for each task."""
    import aiojobs

    async def work(number: int) -> None:
        async with aiojobs.Scheduler(limit=limit, pending_limit=100) as scheduler:
            jobs = [await scheduler.spawn(noop(item)) for item in range(number)]
            assert len([await job.wait() for job in jobs]) == number

    return cpu(work)


def aiostream_map(limit: int) -> Measure:
    """aiostream, as a stream."""
    from aiostream import stream

    async def work(number: int) -> None:
        count = 0
        results = stream.map(stream.range(number), noop, ordered=True, task_limit=limit)
        async with results.stream() as streamer:
            async for _ in streamer:
                count += 1
        assert count == number

    return cpu(work)


def asyncio_pool_map(limit: int) -> Measure:
    """asyncio-pool, as a list."""
    from asyncio_pool import AioPool

    async def work(number: int) -> None:
        async with AioPool(limit) as pool:
            assert len(await pool.map(noop, range(number))) == number

    return cpu(work)


def anyio_group(limit: int) -> Measure:
    """anyio's task group with its limiter: one task for each item."""
    import anyio

    async def work(number: int) -> None:
        limiter = anyio.CapacityLimiter(limit)
        results = []

        async def one(item: int) -> None:
            async with limiter:
                results.append(await noop(item))

        async with anyio.create_task_group() as group:
            for item in range(number):
                group.start_soon(one, item)
        assert len(results) == number

    return cpu(work)


def nopanic_gather(limit: int) -> Measure:
    """nopanic's bulkhead around the function: one task for each item."""
    from nopanic import bulkhead

    async def work(number: int) -> None:
        one = bulkhead(limit)(noop)
        assert len(await asyncio.gather(*(one(item) for item in range(number)))) == number

    return cpu(work)


def bounded(limit: int) -> Case:
    """Make the case of so many at a time."""

    def made(make: object, **options: object) -> Maker:
        return functools.partial(make, limit, **options)  # type: ignore[operator]  # makers differ in their options

    return Case(
        key=f"limit_{limit}",
        zh=f"空任务，每次最多 {limit} 个，每轮至多 10,000 个任务",
        en=f"Empty tasks, at most {limit} at a time, up to 10,000 in a round",
        candidates=[
            Candidate("asyncio.TaskGroup + Semaphore", made(task_group)),
            Candidate("bounded_map", made(ours_bounded_map), OURS, at_most=1 / 8),
            Candidate("WorkerPool.map", made(ours_map, ordered=True), OURS, at_most=1 / 3),
            Candidate("WorkerPool.map(ordered=False)", made(ours_map, ordered=False), OURS),
            Candidate("WorkerPool.submit", made(ours_submit), OURS),
            Candidate("asyncio.gather + Semaphore", made(gather)),
            Candidate("asyncio_pool.AioPool.map", made(asyncio_pool_map), "asyncio-pool"),
            Candidate("asyncio.gather + nopanic.bulkhead", made(nopanic_gather), "nopanic"),
            Candidate("aiojobs.Scheduler.spawn", made(aiojobs_spawn), "aiojobs"),
            Candidate("aiometer.amap", made(aiometer_amap), "aiometer"),
            Candidate("aiometer.run_all", made(aiometer_run_all), "aiometer"),
            Candidate("anyio.create_task_group + CapacityLimiter", made(anyio_group), "anyio"),
            Candidate("aiostream.stream.map", made(aiostream_map), "aiostream"),
        ],
        least=1000,
        most=10_000,
        slice=0.2,
        quick=200,
    )


CASES = [bounded(10), bounded(100)]
