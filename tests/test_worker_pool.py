"""Worker pool and bounded map."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import sys
import tracemalloc
import weakref
from contextlib import aclosing, suppress

import pytest

from concurrency_patterns.concurrency_limiter import ConcurrencyLimiter
from concurrency_patterns.errors import DeadlineExceeded, PatternError, PoolClosed, QueueFull
from concurrency_patterns.testing import assert_no_leaks, explore_cancellation, run_virtual
from concurrency_patterns.timeout import deadline, remaining
from concurrency_patterns.token_bucket import TokenBucket
from concurrency_patterns.worker_pool import WorkerPool, bounded_map


async def double(number):
    """Return twice the number after a tenth of a second."""
    await asyncio.sleep(0.1)
    return 2 * number


async def fail(number):
    """Raise an error of its own."""
    raise OSError(number)


async def test_the_chapters_workload_20_jobs_on_4_workers():
    """20 jobs of 0.1 s on 4 workers take 0.5 s, and each handle has its result."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    async with WorkerPool(workers=4) as pool:
        handles = [await pool.submit(double, number) for number in range(20)]

    assert [await handle for handle in handles] == [2 * number for number in range(20)]
    assert round(loop.time() - start, 6) == 0.5
    assert pool.statistics().succeeded == 20


async def test_an_error_belongs_to_its_handle_and_costs_no_worker():
    """What a task raises comes out of its handle as it is; the worker takes the next task."""

    class Odd(BaseException):
        """Not even an Exception."""

    async def raise_odd():
        raise Odd

    async def cancel_itself():
        raise asyncio.CancelledError

    async with WorkerPool(workers=1) as pool:
        failed = await pool.submit(fail, 1)
        odd = await pool.submit(raise_odd)
        cancelled = await pool.submit(cancel_itself)
        good = await pool.submit(double, 21)

        with pytest.raises(OSError, match="1"):
            await failed
        with pytest.raises(Odd):
            await odd
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await good == 42
    seen = pool.statistics()
    assert (seen.succeeded, seen.failed, seen.cancelled) == (1, 2, 1)


async def test_submit_waits_while_the_queue_is_full():
    """With one worker and room for one, the third submit waits for the first task to end."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    async with WorkerPool(workers=1, queue_size=1) as pool:
        times = []
        for number in range(4):
            await pool.submit(double, number)
            times.append(round(loop.time() - start, 6))

    assert times == [0.0, 0.0, 0.1, 0.2]


async def test_cancelling_a_queued_task_means_that_it_never_starts():
    """A queued task that is cancelled does not run, and its place in the queue is free at once."""
    started = []

    async def start(number):
        started.append(number)
        await asyncio.sleep(1)

    async with WorkerPool(workers=1, queue_size=1) as pool:
        await pool.submit(start, 1)
        await asyncio.sleep(0)
        queued = await pool.submit(start, 2)
        assert queued.cancel()
        await asyncio.wait([queued])
        assert pool.statistics().queued == 0
        await pool.submit(start, 3)

    assert started == [1, 3]
    assert pool.statistics().cancelled == 1


async def test_cancelling_a_running_task_lets_it_clean_up_and_keeps_the_worker():
    """A running task that is cancelled cleans up; its worker takes the next task."""
    cleaned = []

    async def work():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.1)
            cleaned.append(True)

    async with WorkerPool(workers=1) as pool:
        handle = await pool.submit(work)
        await asyncio.sleep(1)
        assert handle.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handle
        assert cleaned == [True]
        assert await (await pool.submit(double, 1)) == 2


async def test_a_task_that_cancels_its_own_handle_does_not_harm_the_next_one():
    """A cancellation that comes too late to be delivered does not reach the next task."""
    handles = []

    async def cancel_own_handle():
        handles[0].cancel()
        return "done"

    async with WorkerPool(workers=1) as pool:
        handles.append(await pool.submit(cancel_own_handle))
        following = await pool.submit(double, 1)

        assert await following == 2
        assert handles[0].cancelled()


async def test_t38_submitting_to_a_pool_that_does_not_run_is_refused():
    """T38: before the block and after it, submit and map raise PoolClosed."""
    pool = WorkerPool(workers=1)
    with pytest.raises(PoolClosed):
        await pool.submit(double, 1)
    async with pool:
        pass
    with pytest.raises(PoolClosed):
        await pool.submit(double, 1)
    with pytest.raises(PoolClosed):
        await anext(pool.map(double, [1]))


async def test_leaving_the_block_normally_drains():
    """At the end of the block all submitted tasks are done."""
    async with WorkerPool(workers=2) as pool:
        handles = [await pool.submit(double, number) for number in range(10)]

    assert all(handle.done() for handle in handles)


async def test_leaving_the_block_with_an_exception_cancels():
    """An exception in the block cancels queued and running tasks, and comes out as it is."""
    with pytest.raises(OSError, match="block"):
        async with WorkerPool(workers=1) as pool:
            handles = [await pool.submit(asyncio.sleep, 3600) for _ in range(3)]
            await asyncio.sleep(1)
            raise OSError("block")

    assert all(handle.cancelled() for handle in handles)
    assert pool.statistics().cancelled == 3


async def test_a_submitter_that_waits_when_the_pool_closes_is_told():
    """Whoever waits for room while the block is left gets PoolClosed, not silence."""
    async with WorkerPool(workers=1, queue_size=1) as pool:
        for number in range(2):
            await pool.submit(double, number)
        await pool.submit(double, 2)
        waiting = asyncio.create_task(pool.submit(double, 3))
        await asyncio.sleep(0)

    with pytest.raises(PoolClosed):
        await waiting


async def test_t39_a_submitter_cancelled_while_it_waits_does_not_jam_the_pool():
    """T39: the pool goes on after a submitter in line was cancelled."""
    async with WorkerPool(workers=1, queue_size=1) as pool:
        for number in range(2):
            await pool.submit(double, number)
        waiting = asyncio.create_task(pool.submit(double, 2))
        await asyncio.sleep(0)
        waiting.cancel()
        async with asyncio.timeout(1):
            assert await (await pool.submit(double, 3)) == 6


class Watched:
    """A pool and the handles of its tasks, for the explorer."""

    def __init__(self, **options):
        self.pool = WorkerPool(**options)
        self.handles = []

    def is_whole(self):
        seen = self.pool.statistics()
        idle = (seen.workers, seen.busy, seen.queued) == (0, 0, 0)
        return idle and all(handle.done() for handle in self.handles)


def test_t2_cancelled_at_any_step_the_pool_ends_and_no_task_is_forgotten():
    """T2: whichever task is cancelled, every handle is done when the block is left."""

    async def scenario(watched):
        async with watched.pool as pool:
            for number in range(5):
                watched.handles.append(await pool.submit(double, number))
            for handle in watched.handles:
                await handle

    def setup():
        return Watched(workers=2, queue_size=1)

    assert explore_cancellation(setup, scenario, Watched.is_whole) > 20


@pytest.mark.parametrize("grace", [0, 0.05, None])
def test_t2_cancelled_at_any_step_every_option_leaves_the_pool_whole(grace):
    """T2: priorities, a limiter, a time limit, resizing and a bounded close lose no place."""

    async def scenario(watched):
        async with watched.pool as pool:
            watched.handles.append(await pool.submit(asyncio.sleep, 0.1))
            watched.handles.append(await pool.priority(-1).submit(double, 1))
            pool.resize(3)
            watched.handles.append(await pool.submit(asyncio.sleep, 9))  # takes too long
            pool.resize(1)
            watched.handles[0].cancel()
            await pool.close(grace=grace)

    def setup():
        return Watched(workers=2, queue_size=2, task_timeout=1, limiter=ConcurrencyLimiter(1))

    assert explore_cancellation(setup, scenario, Watched.is_whole) > 20


async def test_map_yields_in_order():
    """An ordered map yields in the order of the items, however long each takes."""

    async def sleep(seconds):
        await asyncio.sleep(seconds)
        return seconds

    async with WorkerPool(workers=3) as pool:
        assert [done async for done in pool.map(sleep, [3, 1, 2])] == [3, 1, 2]
        ready = [done async for done in pool.map(sleep, [3, 1, 2], ordered=False)]
        assert ready == [1, 2, 3]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
async def test_t16_map_reads_an_endless_source_only_a_bounded_way_ahead(ordered, asynchronous):
    """T16: the source is read at most twice the number of workers ahead of the results."""
    read = []

    def source():
        for number in itertools.count():
            read.append(number)
            yield number

    async def slow_source():
        for number in source():
            yield number

    taken = 0
    async with WorkerPool(workers=3) as pool:
        items = slow_source() if asynchronous else source()
        async with aclosing(pool.map(double, items, ordered=ordered)) as results:
            async for _ in results:
                taken += 1
                await asyncio.sleep(1)
                assert len(read) <= taken + 2 * 3
                if taken == 5:
                    break


@pytest.mark.parametrize("ordered", [True, False])
async def test_t43_a_finished_result_is_yielded_while_the_source_is_slow(ordered):
    """T43: a slow source does not hold back results that are there."""
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def source():
        for number in range(3):
            yield number
            await asyncio.sleep(10)

    async with WorkerPool(workers=4) as pool:
        times = [
            round(loop.time() - start, 6) async for _ in pool.map(double, source(), ordered=ordered)
        ]
    assert times == [0.1, 10.1, 20.1]


@pytest.mark.parametrize("ordered", [True, False])
async def test_an_error_ends_the_map_and_cancels_the_rest(ordered):
    """The first error comes out as it is, and nothing of the map runs on."""

    async def sleep_or_fail(number):
        if number == 1:
            raise OSError(number)
        await asyncio.sleep(3600)

    async with WorkerPool(workers=3) as pool:
        stream = pool.map(sleep_or_fail, [1, 2, 3, 4], ordered=ordered)
        with pytest.raises(OSError, match="1"):
            await anext(stream)
        assert pool.statistics().busy == 0


async def test_an_error_of_the_source_comes_after_the_results_of_what_it_gave():
    """What the source gave before it failed is yielded; then its error comes out."""

    def source():
        yield 1
        raise OSError("source")

    got = []
    async with WorkerPool(workers=2) as pool:
        with pytest.raises(OSError, match="source"):
            async for result in pool.map(double, source()):
                got.append(result)
    assert got == [2]


async def test_a_pool_cannot_be_entered_twice_at_the_same_time():
    """Entering a running pool again is refused."""
    pool = WorkerPool(workers=1)
    async with pool:
        with pytest.raises(RuntimeError, match="running already"):
            await pool.__aenter__()


def test_t34_one_pool_serves_three_loops_one_after_the_other():
    """T34: a pool made without a loop works in three successive runs."""
    pool = WorkerPool(workers=2)

    async def main():
        async with pool:
            return await (await pool.submit(double, 1))

    assert [run_virtual(main()) for _ in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"workers": 1, "queue_size": 0}])
def test_senseless_sizes_are_refused(arguments):
    """A pool without workers or without a queue is refused when it is made."""
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        WorkerPool(**arguments)


async def test_bounded_map_returns_all_results_in_order():
    """The results stand in the order of the items, whichever is ready first."""

    async def sleep(seconds):
        await asyncio.sleep(seconds)
        return seconds

    assert await bounded_map(sleep, [3, 1, 2], limit=2) == [3, 1, 2]


async def test_bounded_map_runs_at_most_limit_calls_and_tasks():
    """Never more than the limit run at the same time, and there are no tasks for the others."""
    running = peak = tasks = 0

    async def work(number):
        nonlocal running, peak, tasks
        running += 1
        peak = max(peak, running)
        tasks = max(tasks, len(asyncio.all_tasks()))
        await asyncio.sleep(1)
        running -= 1

    await bounded_map(work, range(100), limit=7)
    assert peak == 7
    assert tasks == 8


async def test_bounded_map_reads_an_asynchronous_source():
    """An asynchronous source works like an iterable, for several readers at once."""

    async def source():
        for number in range(5):
            await asyncio.sleep(0.1)
            yield number

    assert await bounded_map(double, source(), limit=3) == [0, 2, 4, 6, 8]


async def test_bounded_map_raises_the_first_error_and_cancels_the_rest():
    """The first error comes out as it is; the other calls are cancelled before."""
    cancelled = []

    async def work(number):
        if number == 0:
            await asyncio.sleep(1)
            raise OSError("first")
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.append(number)

    with pytest.raises(OSError, match="first"):
        await bounded_map(work, range(10), limit=3)
    assert sorted(cancelled) == [1, 2]


async def test_bounded_map_does_not_take_a_foreign_cancelled_error_for_a_result():
    """A call that raises CancelledError by itself is an error, not a missing result."""

    async def work(number):
        raise asyncio.CancelledError

    with pytest.raises(PatternError, match="by itself"):
        await bounded_map(work, range(3), limit=2)


async def test_bounded_map_refuses_a_limit_below_one():
    """A limit of zero is refused at once."""
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        await bounded_map(double, [], limit=0)


async def test_submit_nowait_refuses_when_the_queue_is_full():
    """Submitting without waiting raises QueueFull instead, and takes what there is room for."""
    async with WorkerPool(workers=1, queue_size=1) as pool:
        accepted = pool.submit_nowait(double, 1)
        with pytest.raises(QueueFull):
            pool.submit_nowait(double, 2)

        assert await accepted == 2


async def test_a_lower_priority_level_is_taken_first():
    """Workers take urgent tasks first, and tasks of one level in their order."""
    order = []

    async def note(name):
        order.append(name)

    async with WorkerPool(workers=1) as pool:
        await pool.submit(asyncio.sleep, 1)  # the worker is busy while the others are submitted
        await pool.priority(5).submit(note, "later")
        await pool.submit(note, "normal 1")
        await pool.submit(note, "normal 2")
        await pool.priority(-1).submit(note, "urgent")
        pool.priority(5).submit_nowait(note, "last")

    assert order == ["urgent", "normal 1", "normal 2", "later", "last"]


async def test_a_task_that_takes_too_long_fails_alone():
    """The time limit of the tasks fails the slow one and keeps the worker."""
    async with WorkerPool(workers=1, task_timeout=1) as pool:
        slow = await pool.submit(asyncio.sleep, 3600)
        quick = await pool.submit(double, 1)

        with pytest.raises(DeadlineExceeded):
            await slow
        assert await quick == 2


async def test_a_pool_with_a_limiter_starts_tasks_at_its_rate():
    """With a token bucket of 5 a second and ample workers, tasks start 0.2 s apart."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    times = []

    async def note():
        times.append(round(loop.time() - start, 6))

    async with WorkerPool(workers=4, limiter=TokenBucket(rate=5, capacity=1)) as pool:
        for _ in range(4):
            await pool.submit(note)

    assert times == [0.0, 0.2, 0.4, 0.6]


async def test_the_time_limit_of_a_task_begins_after_the_limiter():
    """Waiting for the limiter does not use up the time of the task."""
    bucket = TokenBucket(rate=0.1, capacity=1)
    async with WorkerPool(workers=2, task_timeout=1, limiter=bucket) as pool:
        handles = [await pool.submit(double, number) for number in range(3)]

        assert [await handle for handle in handles] == [0, 2, 4]


async def test_a_pool_that_grows_runs_more_at_once():
    """New workers begin at once with what is queued."""
    async with WorkerPool(workers=1) as pool:
        for _ in range(4):
            await pool.submit(asyncio.sleep, 10)
        await asyncio.sleep(1)
        assert pool.statistics().busy == 1
        pool.resize(3)
        await asyncio.sleep(1)
        assert pool.statistics().busy == 3


async def test_t41_a_pool_that_shrinks_while_all_are_busy_does_not_wait():
    """T41: shrinking returns at once; the surplus workers end with their tasks."""
    async with WorkerPool(workers=4) as pool:
        handles = [await pool.submit(asyncio.sleep, 1) for _ in range(8)]
        await asyncio.sleep(0)
        pool.resize(1)
        assert pool.statistics().busy == 4
        await asyncio.sleep(1.5)
        assert pool.statistics().workers == pool.statistics().busy == 1

    assert all(handle.done() for handle in handles)


async def test_idle_workers_that_are_too_many_end_and_the_others_go_on():
    """Shrinking an idle pool leaves workers that still take tasks."""
    async with WorkerPool(workers=4) as pool:
        await asyncio.sleep(1)
        pool.resize(2)
        await asyncio.sleep(1)
        assert pool.statistics().workers == 2
        assert await (await pool.submit(double, 1)) == 2


async def test_close_with_a_grace_cancels_what_is_not_done_in_time():
    """A bounded close drains for its time and cancels the rest."""
    pool = WorkerPool(workers=1)
    async with pool:
        quick = await pool.submit(double, 1)
        slow = await pool.submit(asyncio.sleep, 3600)
        queued = await pool.submit(double, 2)
        await pool.close(grace=5)

        assert (quick.result(), slow.cancelled(), queued.cancelled()) == (2, True, True)
        with pytest.raises(PoolClosed):
            await pool.submit(double, 3)


async def test_a_submitter_that_waits_when_the_pool_is_cancelled_is_told():
    """Whoever waits for room when the block fails gets PoolClosed, not silence."""
    with pytest.raises(OSError, match="block"):
        async with WorkerPool(workers=1, queue_size=1) as pool:
            await pool.submit(asyncio.sleep, 3600)
            await asyncio.sleep(0)
            await pool.submit(asyncio.sleep, 3600)
            waiting = asyncio.create_task(pool.submit(double, 3))
            await asyncio.sleep(0)
            raise OSError("block")

    with pytest.raises(PoolClosed):
        await waiting


@pytest.mark.parametrize("ordered", [True, False])
async def test_map_can_return_or_skip_errors(ordered):
    """An error can stand in the place of the result, or be left out."""

    async def odd(number):
        if number % 2:
            raise OSError(number)
        return number

    async with WorkerPool(workers=1) as pool:
        returned = [
            str(result)
            async for result in pool.map(odd, range(4), ordered=ordered, on_error="return")
        ]
        skipped = [
            result async for result in pool.map(odd, range(4), ordered=ordered, on_error="skip")
        ]
        with pytest.raises(ValueError, match="on_error must be"):
            await anext(pool.map(odd, range(4), on_error="ignore"))

    assert returned == ["0", "1", "2", "3"]
    assert skipped == [0, 2]


async def test_map_tells_a_cancelled_error_that_nobody_asked_for():
    """An item that raises CancelledError by itself is an error, not a missing result."""

    async def odd(number):
        raise asyncio.CancelledError

    async with WorkerPool(workers=2) as pool:
        with pytest.raises(PatternError, match="by itself"):
            await anext(pool.map(odd, range(4)))


@pytest.mark.parametrize("ordered", [True, False])
def test_t2_cancelled_at_any_step_a_map_leaves_no_task_and_the_pool_goes_on(ordered):
    """T2: whichever task of a map is cancelled, nothing of it runs on and no place is lost."""

    async def source():
        for number in range(4):
            yield number
            await asyncio.sleep(0.1)

    async def scenario(watched):
        async with watched.pool as pool:
            async for _ in pool.map(double, source(), ordered=ordered):
                watched.handles.append(await pool.submit(double, 1))
            async with aclosing(pool.map(double, range(9), ordered=ordered)) as results:
                async for _ in results:
                    break
            assert pool.statistics().queued == 0
            await (await pool.submit(double, 1))

    def setup():
        return Watched(workers=2)

    assert explore_cancellation(setup, scenario, Watched.is_whole) > 20


def test_t2_cancelled_at_any_step_bounded_map_returns_all_results_or_raises():
    """T2: whichever task is cancelled, a result is never missing silently."""

    async def slowly(number):
        await asyncio.sleep(0.1)
        return number

    async def source():
        for number in range(5):
            yield number

    async def scenario(results):
        results.append(await bounded_map(slowly, range(5), limit=2))
        results.append(await bounded_map(slowly, source(), limit=2))

    def are_whole(results):
        return all(result == [0, 1, 2, 3, 4] for result in results)

    assert explore_cancellation(list, scenario, are_whole) > 20


async def test_t40_the_memory_of_a_map_does_not_grow_with_its_items():
    """T40: between the source and the reader there are never more jobs than the window."""
    alive = weakref.WeakSet()

    class Item:
        def __init__(self):
            alive.add(self)

    async def take(item):
        return None

    most = 0
    async with WorkerPool(workers=3) as pool:
        async for _ in pool.map(take, (Item() for _ in range(20_000))):
            most = max(most, len(alive))
    assert most <= 2 * 3 + 3


async def test_a_map_that_outlives_its_pool_ends_with_pool_closed():
    """What was started is still yielded; then the map raises instead of waiting for ever."""
    got = []
    async with WorkerPool(workers=1) as pool:
        results = pool.map(double, range(10))
        got.append(await anext(results))
    with pytest.raises(PoolClosed):
        async for result in results:
            got.append(result)

    assert got == [0, 2, 4]


async def test_a_priority_serves_the_pool_again_after_it_was_reopened():
    """A submitter of one `async with` works in the next one."""
    pool = WorkerPool(workers=1)
    async with pool:
        urgent = pool.priority(-1)
    async with pool:
        assert await (await urgent.submit(double, 2)) == 4


def test_t2_a_worker_that_somebody_cancels_is_replaced():
    """T2: even when its only worker is cancelled, a pool runs every task that it has taken."""

    async def scenario(results):
        async with WorkerPool(workers=1) as pool:
            for number in range(3):
                handle = await pool.submit(double, number)
                with suppress(asyncio.CancelledError):
                    results.append(await handle)

    assert explore_cancellation(list, scenario, lambda _: True) > 10


async def test_t39_a_submitter_that_is_cancelled_when_it_gets_room_passes_it_on():
    """T39: room that was given to a submitter and cancelled in the same step is not lost."""
    async with WorkerPool(workers=1, queue_size=1) as pool:
        await pool.submit(asyncio.sleep, 1)
        await asyncio.sleep(0)
        queued = await pool.submit(double, 1)
        first = asyncio.create_task(pool.submit(double, 2))
        second = asyncio.create_task(pool.submit(double, 3))
        await asyncio.sleep(0)
        queued.add_done_callback(lambda _: first.cancel())
        queued.cancel()
        async with asyncio.timeout(10):
            assert await (await second) == 6
        assert first.cancelled()


async def test_a_task_cannot_close_its_own_pool():
    """It would wait for itself for ever: it gets an error at once, and the pool goes on."""
    async with WorkerPool(workers=1) as pool:
        handle = await pool.submit(pool.close)
        with pytest.raises(RuntimeError, match="wait for itself"):
            await handle
        assert await (await pool.submit(double, 1)) == 2


async def test_the_end_of_a_map_cancels_no_other_task():
    """While the source of a map cleans up, its worker may have taken another task."""

    async def source():
        try:
            for number in range(100):
                yield number
        finally:
            await asyncio.sleep(1)

    async def other():
        await asyncio.sleep(1.5)
        return "other"

    async with WorkerPool(workers=1) as pool:
        async with aclosing(pool.map(double, source())) as results:
            async for _ in results:
                handle = await pool.submit(other)
                break
        assert await handle == "other"


async def test_a_task_that_was_cancelled_in_the_queue_leaves_nothing_behind():
    """However often a queued task is given up, neither its arguments nor its place are kept."""

    class Argument:
        pass

    alive = weakref.WeakSet()
    async with WorkerPool(workers=1, queue_size=2) as pool:
        busy = await pool.submit(asyncio.sleep, 3600)
        for _ in range(100):
            argument = Argument()
            alive.add(argument)
            handle = await pool.submit(double, argument)
            del argument
            await asyncio.sleep(1)
            handle.cancel()
            await asyncio.wait([handle])
        del handle
        assert (len(alive), pool.statistics().queued) == (0, 0)
        busy.cancel()


async def test_use_from_another_thread_is_refused_and_takes_no_place():
    """A pool belongs to its event loop: from elsewhere nothing is submitted, and nothing lost."""
    async with WorkerPool(workers=1, queue_size=1) as pool:

        def without_loop():
            with pytest.raises(RuntimeError, match="no running event loop"):
                pool.submit_nowait(double, 1)

        async def on_another_loop():
            with pytest.raises(RuntimeError, match="another event loop"):
                await pool.submit(double, 1)

        await asyncio.to_thread(without_loop)
        await asyncio.to_thread(asyncio.run, on_another_loop())
        assert pool.statistics().queued == 0
        assert await (await pool.submit(double, 1)) == 2


async def test_a_task_sees_the_context_of_its_submitter_and_no_other():
    """What one task sets, the next does not see; a deadline around the submission is known."""
    user = contextvars.ContextVar("user", default="nobody")

    async def handle(name):
        before = user.get()
        user.set(name)
        return before, remaining()

    async with WorkerPool(workers=1) as pool:
        assert await (await pool.submit(handle, "alice")) == ("nobody", None)
        user.set("bob")
        async with deadline(5):
            assert await (await pool.submit(handle, "carol")) == ("bob", 5.0)
            assert [result async for result in pool.map(handle, ["dave"])] == [("bob", 5.0)]
        assert user.get() == "bob"


async def test_leaving_the_pool_ends_the_reading_of_a_source():
    """A map whose source makes everybody wait does not read on when its pool is left."""
    closed = []

    async def source():
        try:
            yield 1
            await asyncio.sleep(3600)
        finally:
            closed.append(True)

    async with assert_no_leaks():
        async with WorkerPool(workers=1) as pool:
            results = pool.map(double, source())
            assert await anext(results) == 2
        assert closed == [True]
        with pytest.raises(PoolClosed):
            await anext(results)


def test_a_pool_that_was_never_left_can_be_entered_in_the_next_run():
    """What a loop that is gone left behind does not keep the pool from serving another one."""
    pool = WorkerPool(workers=1)

    async def enter():
        await pool.__aenter__()
        await pool.submit(asyncio.sleep, 3600)

    async def use():
        async with pool:
            return await (await pool.submit(double, 1))

    run_virtual(enter())
    assert run_virtual(use()) == 2


async def test_a_task_that_raises_stop_iteration_fails_alone():
    """A future refuses StopIteration; here it is a RuntimeError, as in any coroutine."""

    async def stop():
        raise StopIteration

    async with WorkerPool(workers=1) as pool:
        handle = await pool.submit(stop)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await handle
        assert await (await pool.submit(double, 1)) == 2


async def test_bounded_map_keeps_the_cause_of_an_error():
    """The error comes out as it was raised, with what it was raised from."""

    async def fail(_):
        raise OSError("failed") from KeyError("key")

    with pytest.raises(OSError, match="failed") as raised:
        await bounded_map(fail, range(3), limit=2)
    assert isinstance(raised.value.__cause__, KeyError)


async def test_bounded_map_closes_an_asynchronous_source():
    """Whether it was read to its end or not, the source is closed before the error comes out."""
    closed = []

    async def source():
        try:
            for number in range(10):
                yield number
        finally:
            closed.append(True)

    with pytest.raises(OSError, match="0"):
        await bounded_map(fail, source(), limit=2)
    assert closed == [True]


def test_t40_the_memory_of_bounded_map_is_that_of_its_results():
    """T40: a million items cost no more than the list that is returned."""

    async def nothing(_):
        return None

    tracemalloc.start()
    results = run_virtual(bounded_map(nothing, range(1_000_000), limit=10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(results) == 1_000_000
    assert peak < 2 * sys.getsizeof(results)


async def test_a_pool_with_a_concurrency_limiter_shares_its_slots():
    """Workers wait for the slots of a limiter that others use, too."""
    limiter = ConcurrencyLimiter(1)
    most = 0

    async def work():
        nonlocal most
        most = max(most, limiter.statistics().in_use)
        await asyncio.sleep(1)

    async with WorkerPool(workers=4, limiter=limiter) as pool:
        async with limiter:
            handles = [await pool.submit(work) for _ in range(3)]
            await asyncio.sleep(1)
            assert most == 0
        await asyncio.gather(*handles)
    assert most == 1


async def test_bad_arguments_are_refused_before_anything_is_read():
    """A map refuses them when it is made, not when it is first iterated; so does a submission."""
    source = iter(range(3))
    async with WorkerPool(workers=1) as pool:
        with pytest.raises(ValueError, match=r"^on_error must be"):
            pool.map(double, source, on_error="ignore")
        with pytest.raises(TypeError, match=r"^fn must be"):
            pool.map(None, source)
        with pytest.raises(TypeError, match=r"^fn must be"):
            await pool.submit(None)
        with pytest.raises(TypeError, match=r"^fn must be"):
            pool.submit_nowait(None)
        with pytest.raises(TypeError, match=r"^fn must be"):
            await bounded_map(None, source, limit=1)
        assert pool.statistics().queued == 0
    with pytest.raises(PoolClosed):
        pool.map(double, source)
    assert next(source) == 0
