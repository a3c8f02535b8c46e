"""Process pool: what it costs to send one item to another process and to get its answer.

All pools have two workers and are warm when the clock starts: a few items, then a pause in which
the second worker, too, comes up. Time is wall time: the work is done in other processes. Batches
run for about a second, as for the first 0.1 s the kernel still moves the processes about.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from operator import neg
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

from benchmarks.harness import OURS, Candidate, Case, Unavailable, timed
from concurrency_patterns import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.connection import Connection

    from benchmarks.harness import Maker, Measure

    # The function, the items, and how many are sent at once.
    Work = tuple[Callable[[Any], Any], Callable[[int], Iterable[Any]], int]

WORKERS = 2
WARM = 20  # items before the clock starts
SETTLE = 0.5  # seconds after them; the slowest pools need as long to start the second worker
SPAWN = multiprocessing.get_context("spawn")
PAYLOAD = bytes(range(250)) * 400


def small(number: int) -> Iterable[int]:
    """Make so many small items."""
    return range(number)


def large(number: int) -> Iterable[bytes]:
    """Make so many items of 100 kB; a copy each, as no two are the same in life."""
    return (PAYLOAD[i % 250 :] + PAYLOAD[: i % 250] for i in range(number))


async def async_neg(item: int) -> int:
    """For aiomultiprocess, whose workers run coroutines."""
    return -item


async def async_len(item: bytes) -> int:
    """For aiomultiprocess, whose workers run coroutines."""
    return len(item)


def consume(results: Iterable[Any], number: int) -> None:
    """Take all results."""
    assert sum(1 for _ in results) == number


def executor(work: Work) -> Maker:
    """concurrent.futures."""
    fn, items, chunk = work

    def run(number: int) -> float:
        with ProcessPoolExecutor(WORKERS, SPAWN) as pool:
            consume(pool.map(fn, items(WARM)), WARM)
            sleep(SETTLE)
            start = perf_counter()
            consume(pool.map(fn, items(number), chunksize=chunk), number)
            return perf_counter() - start

    return lambda: run


def ours(work: Work, **options: Any) -> Maker:
    """Ours."""
    fn, items, chunk = work
    options = {"chunksize": chunk} | options

    async def run(number: int) -> float:
        async with ProcessPool(WORKERS) as pool:
            assert len([r async for r in pool.map(fn, items(WARM))]) == WARM
            await asyncio.sleep(SETTLE)
            start = perf_counter()
            count = 0
            async for _ in pool.map(fn, items(number), **options):
                count += 1
            assert count == number
            return perf_counter() - start

    return lambda: timed(run)


def standard_pool(work: Work) -> Maker:
    """multiprocessing.Pool."""
    fn, items, chunk = work

    def run(number: int) -> float:
        with SPAWN.Pool(WORKERS) as pool:
            consume(pool.imap(fn, items(WARM)), WARM)
            sleep(SETTLE)
            start = perf_counter()
            consume(pool.imap(fn, items(number), chunksize=chunk), number)
            seconds = perf_counter() - start
            pool.close()
            pool.join()
            return seconds

    return lambda: run


def loky(work: Work) -> Maker:
    """loky."""
    fn, items, chunk = work

    def run(number: int) -> float:
        from loky import ProcessPoolExecutor as Other

        pool = Other(max_workers=WORKERS)
        try:
            consume(pool.map(fn, items(WARM)), WARM)
            sleep(SETTLE)
            start = perf_counter()
            consume(pool.map(fn, items(number), chunksize=chunk), number)
            return perf_counter() - start
        finally:
            pool.shutdown(wait=True)

    return lambda: run


def pebble(work: Work) -> Maker:
    """pebble."""
    fn, items, chunk = work

    def run(number: int) -> float:
        from pebble import ProcessPool as Other

        with Other(max_workers=WORKERS, context=SPAWN) as pool:
            consume(pool.map(fn, items(WARM)).result(), WARM)
            sleep(SETTLE)
            start = perf_counter()
            consume(pool.map(fn, items(number), chunksize=chunk).result(), number)
            return perf_counter() - start

    return lambda: run


def aiomultiprocess(work: Work) -> Maker:
    """aiomultiprocess, which has no batches."""
    fn, items, chunk = work
    replacement: Any = {neg: async_neg, len: async_len}[fn]

    async def run(number: int) -> float:
        from aiomultiprocess import Pool

        async with Pool(processes=WORKERS) as pool:
            assert len(await pool.map(replacement, list(items(WARM)))) == WARM
            await asyncio.sleep(SETTLE)
            start = perf_counter()
            assert len(await pool.map(replacement, list(items(number)))) == number
            return perf_counter() - start

    def make() -> Measure:
        if chunk > 1:
            raise Unavailable("has no batches")
        return timed(run)

    return make


def answer(pipe: Connection) -> None:
    """Answer through a pipe until it is closed: the worker of the bound."""
    try:
        while True:
            fn, items = pipe.recv()
            pipe.send([fn(item) for item in items])
    except EOFError:
        pass


def pipe_bound(work: Work) -> Maker:
    """A pipe for each worker, one batch under way in each, and nothing else: no failures."""
    fn, items, chunk = work

    def send_all(pipes: list[Any], number: int) -> int:
        source = iter(items(number))
        count = 0
        idle, busy = list(pipes), set()
        while True:
            for pipe in idle:
                batch = [item for _, item in zip(range(chunk), source, strict=False)]
                if batch:
                    pipe.send((fn, batch))
                    busy.add(pipe)
            if not busy:
                return count
            idle = list(wait(busy))
            for pipe in idle:
                count += len(pipe.recv())
                busy.discard(pipe)

    def run(number: int) -> float:
        pairs = [SPAWN.Pipe() for _ in range(WORKERS)]
        processes = [SPAWN.Process(target=answer, args=(theirs,)) for _, theirs in pairs]
        for process in processes:
            process.start()
        pipes = [ours for ours, _ in pairs]
        for _, theirs in pairs:
            theirs.close()
        try:
            send_all(pipes, WARM * WORKERS)
            sleep(SETTLE)
            start = perf_counter()
            assert send_all(pipes, number) == number
            return perf_counter() - start
        finally:
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join()

    return lambda: run


def loop(work: Work) -> Maker:
    """No other process at all."""
    fn, items, _ = work

    def run(number: int) -> float:
        start = perf_counter()
        consume(map(fn, items(number)), number)
        return perf_counter() - start

    return lambda: run


def first_executor() -> Measure:
    """From nothing to the first answer and back: concurrent.futures."""

    def run(number: int) -> float:
        start = perf_counter()
        for _ in range(number):
            with ProcessPoolExecutor(WORKERS, SPAWN) as pool:
                assert pool.submit(neg, 1).result() == -1
                answered = perf_counter()
        return answered - start

    return run


def first_ours() -> Measure:
    """From nothing to the first answer: ours."""

    async def run(number: int) -> float:
        start = perf_counter()
        for _ in range(number):
            async with ProcessPool(WORKERS) as pool:
                assert await pool.submit(neg, 1) == -1
                answered = perf_counter()
        return answered - start

    return timed(run)


def first_standard_pool() -> Measure:
    """From nothing to the first answer: multiprocessing.Pool."""

    def run(number: int) -> float:
        start = perf_counter()
        for _ in range(number):
            with SPAWN.Pool(WORKERS) as pool:
                assert pool.apply(neg, (1,)) == -1
                answered = perf_counter()
        return answered - start

    return run


def first_pebble() -> Measure:
    """From nothing to the first answer: pebble."""
    from pebble import ProcessPool as Other

    def run(number: int) -> float:
        start = perf_counter()
        for _ in range(number):
            with Other(max_workers=WORKERS, context=SPAWN) as pool:
                assert pool.schedule(neg, (1,)).result() == -1
                answered = perf_counter()
        return answered - start

    return run


def first_loky() -> Measure:
    """From nothing to the first answer: loky."""
    from loky import ProcessPoolExecutor as Other

    def run(number: int) -> float:
        start = perf_counter()
        for _ in range(number):
            pool = Other(max_workers=WORKERS)
            assert pool.submit(neg, 1).result() == -1
            answered = perf_counter()
            pool.shutdown(wait=True)
        return answered - start

    return run


def items(key: str, titles: tuple[str, str], work: Work, target: float, number: int) -> Case:
    """Make the case of items of one kind."""
    chunked = "" if work[2] == 1 else f"chunksize={work[2]}"
    named = f"({chunked})" if chunked else ""
    as_completed = f"ordered=False, {chunked}" if chunked else "ordered=False"
    automatic = Candidate("ProcessPool.map(chunksize=None)", ours(work, chunksize=None), OURS)
    return Case(
        key=key,
        zh=titles[0],
        en=titles[1],
        candidates=[
            Candidate(f"ProcessPoolExecutor.map{named}", executor(work)),
            Candidate(f"ProcessPool.map{named}", ours(work), OURS, at_most=target),
            Candidate(f"ProcessPool.map({as_completed})", ours(work, ordered=False), OURS),
            *([automatic] if chunked else []),
            Candidate("(a pipe for each worker)", pipe_bound(work)),
            Candidate("(no other process)", loop(work)),
            Candidate(f"multiprocessing.Pool.imap{named}", standard_pool(work)),
            Candidate(f"pebble.ProcessPool.map{named}", pebble(work), "pebble"),
            Candidate("aiomultiprocess.Pool.map", aiomultiprocess(work), "aiomultiprocess"),
            Candidate(f"loky.ProcessPoolExecutor.map{named}", loky(work), "loky"),
        ],
        unit="wall",
        least=number,
        most=number,
        quick=30 * work[2],
    )


CASES = [
    items("small", ("小项，逐个", "Small items, one by one"), (neg, small, 1), 0.5, 2000),
    items(
        "batches",
        ("一百万个小项，每批 100 个", "A million small items, batches of 100"),
        (neg, small, 100),
        0.5,
        1_000_000,
    ),
    items("large", ("100 kB 的项，逐个", "Items of 100 kB, one by one"), (len, large, 1), 0.6, 500),
    Case(
        key="first",
        zh="从零到第一个结果（spawn）",
        en="From nothing to the first result (spawn)",
        candidates=[
            Candidate("ProcessPoolExecutor", first_executor),
            Candidate("ProcessPool", first_ours, OURS, at_most=1.0),
            Candidate("multiprocessing.Pool", first_standard_pool),
            Candidate("pebble.ProcessPool", first_pebble, "pebble"),
            Candidate("loky.ProcessPoolExecutor", first_loky, "loky"),
        ],
        unit="wall",
        least=1,
        most=1,
        quick=1,
    ),
]
