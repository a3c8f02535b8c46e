"""Worker pool: a map over a source by ten workers, whose results come as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from concurrency_patterns import WorkerPool
from probes.harness import OURS, STANDARD_LIBRARY, Candidate, Finding, Probe, count, word

WORKERS = 10
ITEMS = 2_000
BOUND = 100

Fn = Callable[[int], Awaitable[int]]
# Maps a function over a source and gives the results one after the other.
Stream = Callable[[Fn, Iterable[int]], AsyncIterator[Any]]


async def ours(fn: Fn, source: Iterable[int]) -> AsyncIterator[Any]:
    """Ours."""
    async with WorkerPool(WORKERS) as pool, aclosing(pool.map(fn, source)) as results:
        async for result in results:
            yield result


async def aiometer(fn: Fn, source: Iterable[int]) -> AsyncIterator[Any]:
    """aiometer, which takes a list."""
    from aiometer import amap

    async with amap(fn, list(source), max_at_once=WORKERS) as results:
        async for result in results:
            yield result


async def aiostream(fn: Fn, source: Iterable[int]) -> AsyncIterator[Any]:
    """aiostream, in order."""
    from aiostream import stream

    mapped = stream.map(stream.iterate(source), fn, ordered=True, task_limit=WORKERS)
    async with mapped.stream() as results:
        async for result in results:
            yield result


async def asyncio_pool(fn: Fn, source: Iterable[int]) -> AsyncIterator[Any]:
    """asyncio-pool, which returns an exception like a result."""
    from asyncio_pool import AioPool

    async with AioPool(WORKERS) as pool:
        async for result in pool.itermap(fn, source, yield_when=asyncio.FIRST_COMPLETED):
            if isinstance(result, Exception):
                raise result
            yield result


async def semaphore(fn: Fn, source: Iterable[int]) -> AsyncIterator[Any]:
    """asyncio: a task for each item, and a semaphore."""
    slots = asyncio.Semaphore(WORKERS)

    async def one(item: int) -> int:
        async with slots:
            return await fn(item)

    for result in asyncio.as_completed([one(item) for item in source]):
        yield await result


class Run:
    """A source that counts what is read, and a function that counts what it has done."""

    def __init__(self) -> None:
        self.read = self.done = self.most_tasks = 0
        self.fails_at: int | None = None

    def source(self) -> Iterator[int]:
        """Yield the items."""
        for item in range(ITEMS):
            self.read += 1
            yield item

    async def fn(self, item: int) -> int:
        """Take a hundredth of a second, or fail."""
        self.most_tasks = max(self.most_tasks, len(asyncio.all_tasks()))
        await asyncio.sleep(0.01)
        if item == self.fails_at:
            raise ConnectionError("down")
        self.done += 1
        return item


async def reads_ahead(stream: Stream) -> Finding:
    """Take one result, and see how much of the source has been read."""
    run = Run()
    async with aclosing(stream(run.fn, run.source())) as results:
        await anext(results)
        return count(run.read, BOUND)


async def runs_ahead(stream: Stream) -> Finding:
    """Take one result, and nothing for three seconds."""
    run = Run()
    async with aclosing(stream(run.fn, run.source())) as results:
        await anext(results)
        await asyncio.sleep(3)
        return count(run.done, BOUND)


async def tasks(stream: Stream) -> Finding:
    """Take all results, and see how many tasks there were at most."""
    run = Run()
    async with aclosing(stream(run.fn, run.source())) as results:
        assert len([result async for result in results]) == ITEMS
    return count(run.most_tasks, BOUND)


async def failure(stream: Stream) -> Finding:
    """Let one item fail, and see whether others go on after the caller has been told."""
    run, right = Run(), "no"
    run.fails_at = 100
    try:
        async with aclosing(stream(run.fn, run.source())) as results:
            async for _ in results:
                pass
    except* ConnectionError:
        pass
    before = run.done
    await asyncio.sleep(0.5)
    return word(right, right if run.done == before else "yes")


CANDIDATES = [
    Candidate(OURS, ours, OURS),
    Candidate("aiometer", aiometer, "aiometer"),
    Candidate("aiostream", aiostream, "aiostream"),
    Candidate("asyncio (Semaphore, as_completed)", semaphore, STANDARD_LIBRARY),
    Candidate("asyncio-pool", asyncio_pool, "asyncio-pool"),
]
PROBES = [
    Probe(
        reads_ahead,
        zh="10 个工作者处理 2,000 项，第一个结果出来时：从来源读了几项？",
        zh_rule="至多 100，来源可以没有尽头",
        en="Ten workers, 2,000 items; when the first result comes, how many have been read?",
        en_rule="at most 100; a source may be endless",
    ),
    Probe(
        runs_ahead,
        zh="取了一个结果之后 3 秒什么也不取：已经做完几项？",
        zh_rule="至多 100，慢的使用者应当让工作者等",
        en="One result is taken, then none for 3 s: how many items have been done?",
        en_rule="at most 100; a slow reader makes the workers wait",
    ),
    Probe(
        tasks,
        zh="处理 2,000 项：最多同时有几个 asyncio 任务？",
        zh_rule="至多 100，内存只取决于工作者的个数",
        en="2,000 items: how many asyncio tasks are there at most?",
        en_rule="at most 100; the memory depends on the number of workers only",
    ),
    Probe(
        failure,
        zh="有一项失败，调用方已经收到异常：其余的还在做吗？",
        zh_rule="不再做，没有人会来取结果",
        en="One item fails, and the caller has been told: do others go on?",
        en_rule="no; nobody will come for their results",
    ),
]
