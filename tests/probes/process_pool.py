"""Process pool: what is left when a worker dies, or cannot send what it should.

Two workers each, started by spawn where that can be chosen. Time is real: so are the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from process_workloads import make_lock, nap, raise_two_arguments

from concurrency_patterns import ProcessPool
from probes.harness import (
    HANGS,
    OURS,
    STANDARD_LIBRARY,
    Candidate,
    Finding,
    Probe,
    Unavailable,
    count,
    start,
    word,
)

WORKERS = 2
ITEMS = 2_000
BOUND = 100
ENOUGH = 10.0  # seconds in which everything is done that is done at all
ONLY_ONE = "only that call"


async def called(fn: Callable[..., Any], *args: Any) -> Any:
    """Call it, for aiomultiprocess, whose workers run coroutines."""
    return fn(*args)


@dataclass(frozen=True)
class Pool:
    """A pool that runs.

    Attributes:
        submit: Calls a function in another process.
        map: Maps ``nap`` over a source and gives the results one after the other.
        limited: Calls ``nap`` with a limit of a second, if the pool has a limit of its own.
    """

    submit: Callable[..., Awaitable[Any]]
    map: Callable[[Iterator[float]], AsyncIterator[Any]]
    limited: Callable[[float], Awaitable[Any]] | None = None


Maker = Callable[[], contextlib.AbstractAsyncContextManager[Pool]]


@contextlib.asynccontextmanager
async def ours() -> AsyncIterator[Pool]:
    """Ours."""
    async with ProcessPool(WORKERS) as pool, ProcessPool(WORKERS, task_timeout=1.0) as hasty:
        yield Pool(
            pool.submit,
            lambda source: pool.map(nap, source),
            lambda seconds: hasty.submit(nap, seconds),
        )


async def in_thread(results: Iterator[Any]) -> AsyncIterator[Any]:
    """Take results that block."""
    while True:
        yield await asyncio.to_thread(next, results)


@contextlib.asynccontextmanager
async def executor() -> AsyncIterator[Pool]:
    """concurrent.futures."""
    pool = ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"))

    async def results(source: Iterator[float]) -> AsyncIterator[Any]:
        mapped = await asyncio.to_thread(pool.map, nap, source)
        async for result in in_thread(mapped):
            yield result

    yield Pool(lambda fn, *args: asyncio.wrap_future(pool.submit(fn, *args)), results)


@contextlib.asynccontextmanager
async def loky() -> AsyncIterator[Pool]:
    """loky."""
    from loky import get_reusable_executor

    def submit(fn: Any, *args: Any) -> Awaitable[Any]:
        return asyncio.wrap_future(get_reusable_executor(max_workers=WORKERS).submit(fn, *args))

    async def results(source: Iterator[float]) -> AsyncIterator[Any]:
        pool = get_reusable_executor(max_workers=WORKERS)
        mapped = await asyncio.to_thread(pool.map, nap, source)
        async for result in in_thread(mapped):
            yield result

    yield Pool(submit, results)


@contextlib.asynccontextmanager
async def standard_pool() -> AsyncIterator[Pool]:
    """multiprocessing.Pool."""
    pool = multiprocessing.get_context("spawn").Pool(WORKERS)

    def submit(fn: Any, *args: Any) -> Awaitable[Any]:
        future: Future[Any] = Future()
        pool.apply_async(fn, args, callback=future.set_result, error_callback=future.set_exception)
        return asyncio.wrap_future(future)

    yield Pool(submit, lambda source: in_thread(pool.imap(nap, source)))


@contextlib.asynccontextmanager
async def pebble() -> AsyncIterator[Pool]:
    """pebble."""
    from pebble import ProcessPool as Other

    pool = Other(max_workers=WORKERS, context=multiprocessing.get_context("spawn"))

    async def results(source: Iterator[float]) -> AsyncIterator[Any]:
        mapped = await asyncio.to_thread(pool.map, nap, source)
        async for result in in_thread(mapped.result()):
            yield result

    yield Pool(
        lambda fn, *args: asyncio.wrap_future(pool.submit(fn, None, *args)),
        results,
        lambda seconds: asyncio.wrap_future(pool.submit(nap, 1.0, seconds)),
    )


@contextlib.asynccontextmanager
async def aiomultiprocess() -> AsyncIterator[Pool]:
    """aiomultiprocess, one coroutine at a time in each worker."""
    from aiomultiprocess import Pool as Other

    pool = Other(processes=WORKERS, childconcurrency=1)

    async def results(source: Iterator[float]) -> AsyncIterator[Any]:
        async for result in pool.starmap(called, [(nap, seconds) for seconds in source]):
            yield result

    yield Pool(lambda fn, *args: pool.apply(called, (fn, *args)), results)


async def settled(work: Awaitable[Any]) -> str:
    """Tell how a call ends, if it does in time."""
    try:
        async with asyncio.timeout(ENOUGH) as limit:
            await work
    except BaseException:  # noqa: BLE001 -- of whatever kind
        return HANGS if limit.expired() else "fails"
    return "ends"


async def damage(make: Maker, *fault: Any) -> Finding:
    """Run a fault beside a call that goes on, before two that wait, and call once more after."""
    async with make() as pool:
        await asyncio.gather(pool.submit(nap, 0.2), pool.submit(nap, 0.2))  # both workers are up
        others = [start(settled(pool.submit(nap, 0.5)))]
        culprit = start(settled(pool.submit(*fault)))
        others += [start(settled(pool.submit(nap, 0.1))) for _ in range(2)]
        ends = await asyncio.gather(culprit, *others)
        try:
            after = await settled(pool.submit(nap, 0.1))
        except Exception:  # noqa: BLE001 -- it does not even take the call
            after = "fails"
        return word(ONLY_ONE, told(ends[0], ends[1:], after))


def told(culprit: str, others: list[str], after: str) -> str:
    """Say in words how far the damage goes."""
    if HANGS in {culprit, *others, after}:
        return HANGS
    if after == "fails":
        return "the whole pool"
    if "fails" in others:
        return "all calls under way"
    return ONLY_ONE if culprit == "fails" else "no error"


async def worker_dies(make: Maker) -> Finding:
    """A worker is gone."""
    return await damage(make, os._exit, 9)


async def stubborn_exception(make: Maker) -> Finding:
    """An exception cannot be sent."""
    return await damage(make, raise_two_arguments)


async def unsendable_result(make: Maker) -> Finding:
    """A result cannot be sent."""
    return await damage(make, make_lock)


async def stuck_call(make: Maker) -> Finding:
    """Give up both calls that keep the workers, and see whether another call is served."""
    async with make() as pool:
        await asyncio.gather(pool.submit(nap, 0.2), pool.submit(nap, 0.2))
        if pool.limited is None:
            raise Unavailable("not offered")
        stuck = [start(settled(pool.limited(60.0))) for _ in range(WORKERS)]
        ends = await asyncio.gather(*stuck)
        if set(ends) != {"fails"}:
            return word("is stopped", "goes on")
        after = await settled(pool.limited(0.1))
        return word("is stopped", "is stopped" if after == "ends" else "goes on")


async def reads_ahead(make: Maker) -> Finding:
    """Take one result, and see how much of the source has been read."""
    read = 0

    def source() -> Iterator[float]:
        nonlocal read
        for _ in range(ITEMS):
            read += 1
            yield 0.001

    async with make() as pool, contextlib.aclosing(pool.map(source())) as results:
        await anext(results)
        return count(read, BOUND)


CANDIDATES = [
    Candidate(OURS, ours, OURS),
    Candidate("aiomultiprocess", aiomultiprocess, "aiomultiprocess"),
    Candidate("concurrent.futures", executor, STANDARD_LIBRARY),
    Candidate("loky", loky, "loky"),
    Candidate("multiprocessing.Pool", standard_pool, STANDARD_LIBRARY),
    Candidate("pebble", pebble, "pebble"),
]
PROBES = [
    Probe(
        worker_dies,
        zh="一个工作进程死了（os._exit）：哪些调用受影响？",
        zh_rule="只有它正在做的那一个；进程池继续工作",
        en="A worker process dies (os._exit): which calls are hit?",
        en_rule="only the one that it handled; the pool goes on",
    ),
    Probe(
        stubborn_exception,
        zh="函数抛出的异常还原不了（pickle）：哪些调用受影响？",
        zh_rule="只有那一个；进程池继续工作",
        en="A function raises an exception that cannot be unpickled: which calls are hit?",
        en_rule="only that one; the pool goes on",
    ),
    Probe(
        unsendable_result,
        zh="函数的结果发不出去（一把锁）：哪些调用受影响？",
        zh_rule="只有那一个；进程池继续工作",
        en="A function returns what cannot be sent (a lock): which calls are hit?",
        en_rule="only that one; the pool goes on",
    ),
    Probe(
        stuck_call,
        zh="给了 1 秒的调用卡了一分钟：工作进程怎么样？",
        zh_rule="被终止，下一个调用照常进行",
        en="A call that was given 1 s is stuck for a minute: what becomes of the worker?",
        en_rule="it is stopped, and the next call is served",
    ),
    Probe(
        reads_ahead,
        zh="来源有 2,000 项，第一个结果出来时：读了几项？",
        zh_rule="至多 100，来源可以没有尽头",
        en="A source of 2,000 items; when the first result comes, how many have been read?",
        en_rule="at most 100; a source may be endless",
    ),
]
