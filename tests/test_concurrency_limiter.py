"""Concurrency limiting."""

from __future__ import annotations

import asyncio
import math

import pytest

from concurrency_patterns.concurrency_limiter import ConcurrencyLimiter
from concurrency_patterns.errors import ConcurrencyLimitExceeded
from concurrency_patterns.testing import CancellationFault, explore_cancellation, run_virtual


async def test_the_chapters_workload_10_fetches_at_3_a_time():
    """10 fetches of one second, 3 at a time: four seconds, never more than three inside."""
    limiter = ConcurrencyLimiter(3)
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def fetch():
        async with limiter:
            await asyncio.sleep(1)

    await asyncio.gather(*(fetch() for _ in range(10)))

    assert loop.time() - start == 4.0
    assert limiter.statistics().peak == 3
    assert limiter.statistics().in_use == 0


async def test_slots_are_granted_in_the_order_of_asking():
    """First come, first served."""
    limiter = ConcurrencyLimiter(1)
    order = []

    async def use(name):
        async with limiter:
            order.append(name)
            await asyncio.sleep(1)

    await asyncio.gather(*(use(name) for name in "abcd"))
    assert order == list("abcd")


async def test_a_newcomer_does_not_take_the_slot_of_one_who_waits():
    """A slot that was handed to a waiter cannot be snatched before the waiter runs."""
    limiter = ConcurrencyLimiter(1)
    await limiter.acquire()
    waiter = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(0)
    limiter.release()

    assert not limiter.try_acquire()
    await waiter
    limiter.release()
    assert limiter.try_acquire()
    limiter.release()


async def test_t1_release_then_cancel_the_woken_waiter_in_the_same_step():
    """T1: the slot of a waiter that is cancelled as it is granted goes to the next one."""
    limiter = ConcurrencyLimiter(1)
    await limiter.acquire()
    first = asyncio.create_task(limiter.acquire())
    second = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(0)
    limiter.release()
    first.cancel()

    async with asyncio.timeout(1):
        await second
    assert first.cancelled()
    assert limiter.statistics().in_use == 1
    limiter.release()


@pytest.mark.parametrize("max_wait", [None, 1.5])
def test_t2_cancelled_at_any_step_no_slot_is_lost(max_wait):
    """T2: whichever task is cancelled at whichever step, all slots come back."""

    async def use(limiter):
        try:
            async with limiter:
                await asyncio.sleep(1)
        except ConcurrencyLimitExceeded:
            pass

    async def scenario(limiter):
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(use(limiter))

    runs = explore_cancellation(
        lambda: ConcurrencyLimiter(2, max_wait=max_wait),
        scenario,
        lambda limiter: limiter.statistics().in_use == limiter.statistics().waiting == 0,
    )
    assert runs > 20


def test_the_explorer_finds_the_leak_of_a_limiter_made_of_two_semaphores():
    """A limiter that takes two semaphores one after the other loses a permit, and is found out."""

    class TwoSemaphores:
        def __init__(self):
            self.queue = asyncio.Semaphore(2)
            self.slots = asyncio.Semaphore(1)

        async def __aenter__(self):
            await self.queue.acquire()
            await self.slots.acquire()

        async def __aexit__(self, *_):
            self.slots.release()
            self.queue.release()

    async def use(limiter):
        async with limiter:
            await asyncio.sleep(1)

    async def scenario(limiter):
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(use(limiter))

    with pytest.raises(CancellationFault, match="the invariant does not hold"):
        explore_cancellation(
            TwoSemaphores,
            scenario,
            lambda limiter: limiter.queue._value == 2 and limiter.slots._value == 1,
        )


async def test_a_full_line_is_told_from_a_wait_that_is_too_long():
    """The error says whether the line was full or the wait too long."""
    limiter = ConcurrencyLimiter(1, max_queue=1, max_wait=2)
    await limiter.acquire()
    waiting = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(0)

    with pytest.raises(ConcurrencyLimitExceeded) as full:
        await limiter.acquire()
    assert full.value.reason == "queue"
    with pytest.raises(ConcurrencyLimitExceeded) as late:
        await waiting
    assert late.value.reason == "wait"
    assert limiter.statistics().rejected == 2
    assert limiter.statistics().waiting == 0


async def test_a_line_of_length_zero_lets_nobody_wait():
    """With max_queue=0 a caller gets a slot at once or an error."""
    limiter = ConcurrencyLimiter(1, max_queue=0)
    await limiter.acquire()

    with pytest.raises(ConcurrencyLimitExceeded):
        await limiter.acquire()


async def test_release_without_acquire_is_an_error():
    """A slot that nobody holds cannot be given back."""
    with pytest.raises(RuntimeError, match="release without acquire"):
        ConcurrencyLimiter(1).release()


async def test_an_error_inside_gives_the_slot_back_and_comes_out_as_it_is():
    """The caller's own exception passes through, and the slot is free again."""
    limiter = ConcurrencyLimiter(1)

    async def fail():
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        await limiter.call(fail)
    assert limiter.try_acquire()


async def test_a_timeout_of_the_caller_is_not_relabelled():
    """A TimeoutError from outside is not turned into a rejection of the limiter."""
    limiter = ConcurrencyLimiter(1, max_wait=10)
    await limiter.acquire()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await limiter.acquire()
    assert limiter.statistics().rejected == 0


async def test_a_decorated_function_holds_a_slot_while_it_runs():
    """Each call of a decorated function holds a slot."""
    limiter = ConcurrencyLimiter(2)

    @limiter
    async def inside():
        return limiter.statistics().in_use

    assert await inside() == 1
    assert limiter.statistics().in_use == 0
    with pytest.raises(TypeError, match="async function"):
        limiter(len)


@pytest.mark.parametrize(
    "arguments",
    [
        {"limit": 0},
        {"limit": 1, "max_queue": -1},
        {"limit": 1, "max_wait": -1},
        {"limit": 1, "max_wait": math.nan},
    ],
)
def test_senseless_bounds_are_refused(arguments):
    """Bad bounds are refused when the limiter is made."""
    with pytest.raises(ValueError, match="must be"):
        ConcurrencyLimiter(**arguments)


def test_t34_one_limiter_serves_three_loops_one_after_the_other():
    """T34: a limiter made without a loop works in three successive runs, waiters included."""
    limiter = ConcurrencyLimiter(1)

    async def use():
        async with limiter:
            await asyncio.sleep(1)

    async def main():
        await asyncio.gather(use(), use())
        return limiter.statistics().in_use

    assert [run_virtual(main()) for _ in range(3)] == [0, 0, 0]
