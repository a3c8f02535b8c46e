"""Concurrency limiting."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from concurrency_patterns.concurrency_limiter import ConcurrencyLimiter
from concurrency_patterns.errors import ConcurrencyLimitExceeded
from concurrency_patterns.testing import (
    CancellationFault,
    VirtualTimeLoop,
    explore_cancellation,
    run_virtual,
)


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


async def test_t1_a_heavy_waiter_cancelled_as_it_is_granted_gives_all_its_slots_back():
    """T1: the slots of a cancelled waiter go to those behind it, as many as it would have had."""
    limiter = ConcurrencyLimiter(3)
    await limiter.acquire(3)
    heavy = asyncio.create_task(limiter.acquire(2))
    light = [asyncio.create_task(limiter.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    limiter.release(3)
    heavy.cancel()

    async with asyncio.timeout(1):
        await asyncio.gather(*light)
    assert limiter.statistics().in_use == 3


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


def test_t2_cancelled_at_any_step_no_operation_loses_a_slot():
    """T2: weights, resize, close and drain: whoever is cancelled, all slots come back."""

    async def use(limiter, weight):
        with suppress(ConcurrencyLimitExceeded):
            async with limiter.slots(weight):
                await asyncio.sleep(1)

    async def manage(limiter):
        await asyncio.sleep(0.5)
        limiter.resize(4)
        await asyncio.sleep(1)
        limiter.resize(2)
        await asyncio.sleep(0.2)
        limiter.close()
        await limiter.drain()

    async def scenario(limiter):
        async with asyncio.TaskGroup() as group:
            for weight in (2, 1, 2, 1, 2):
                group.create_task(use(limiter, weight))
            group.create_task(manage(limiter))

    runs = explore_cancellation(
        lambda: ConcurrencyLimiter(2, max_queue=4, max_wait=3),
        scenario,
        lambda limiter: limiter.statistics().in_use == limiter.statistics().waiting == 0,
    )
    assert runs > 30


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


@pytest.mark.parametrize("timed", [False, True])
async def test_a_slot_that_is_released_inside_its_block_is_an_error_at_its_end(timed):
    """The end of the block does not give back what is not held any more."""
    limiter = ConcurrencyLimiter(1, timed=timed)
    with pytest.raises(RuntimeError, match="release without acquire"):
        async with limiter:
            limiter.release()

    assert limiter.statistics().in_use == 0


@pytest.mark.parametrize("weight", [0, -5, 1.5, math.nan, 1.0, True, "2"])
@pytest.mark.parametrize("use", ["acquire", "try_acquire", "release"])
async def test_a_weight_that_is_no_whole_number_from_one_is_refused(use, weight):
    """A bad weight is refused at once, by release too, and nothing has changed."""
    limiter = ConcurrencyLimiter(5)
    await limiter.acquire(2)
    kind = ValueError if type(weight) is int else TypeError

    with pytest.raises(kind, match="weight must be"):
        done = getattr(limiter, use)(weight)
        await done
    assert limiter.statistics().in_use == 2


@pytest.mark.parametrize("someone", ["waits", "drains"])
async def test_release_from_another_thread_is_refused(someone):
    """Where somebody would have to be woken, another thread gets a clear error."""
    limiter = ConcurrencyLimiter(1)
    await limiter.acquire()
    waiting = asyncio.create_task(limiter.acquire() if someone == "waits" else limiter.drain())
    await asyncio.sleep(0)
    before = limiter.statistics()

    for use in (limiter.release, limiter.close, lambda: limiter.resize(2)):
        with pytest.raises(RuntimeError, match=r"this ConcurrencyLimiter .*call_soon_threadsafe"):
            await asyncio.to_thread(use)
    assert limiter.statistics() == before
    asyncio.get_running_loop().call_soon(limiter.release)
    await waiting


async def test_release_from_another_thread_is_allowed_where_nobody_waits():
    """A thread that uses a slot may give it back when there is nobody to wake."""
    limiter = ConcurrencyLimiter(1)
    await limiter.acquire()
    await asyncio.to_thread(limiter.release)

    assert limiter.statistics().in_use == 0


async def test_a_waiter_that_is_cancelled_is_out_of_the_line_at_once():
    """In the very step of its cancellation, it stands in nobody's way."""
    limiter = ConcurrencyLimiter(4)
    await limiter.acquire(2)
    cancelled = asyncio.create_task(limiter.acquire(4))
    await asyncio.sleep(0)
    cancelled.cancel()

    assert limiter.try_acquire()
    cancelled = asyncio.create_task(limiter.acquire(4))
    await asyncio.sleep(0)
    cancelled.cancel()
    limiter.resize(3)


@pytest.mark.parametrize(("weight", "seconds"), [(1, 0.0), (3, 1.0)])
async def test_a_newcomer_takes_the_place_of_a_cancelled_waiter(weight, seconds):
    """A line in which the only waiter has just been cancelled is not full."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    limiter = ConcurrencyLimiter(3, max_queue=1)
    await limiter.acquire(2)
    cancelled = asyncio.create_task(limiter.acquire(2))
    await asyncio.sleep(0)
    cancelled.cancel()
    loop.call_later(1, limiter.release, 2)

    await limiter.acquire(weight)
    assert loop.time() - start == seconds
    assert limiter.statistics().rejected == 0


async def test_the_repr_tells_the_bounds_that_are_set():
    """The repr is the expression that made the limiter, without what is the default."""
    assert repr(ConcurrencyLimiter(3)) == "ConcurrencyLimiter(limit=3)"
    bounded = ConcurrencyLimiter(3, max_queue=0, max_wait=0.5)
    assert repr(bounded) == "ConcurrencyLimiter(limit=3, max_queue=0, max_wait=0.5)"


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


async def test_a_heavy_caller_at_the_head_of_the_line_is_not_passed_by_light_ones():
    """Weights are served in order: a light newcomer waits behind a heavy one."""
    limiter = ConcurrencyLimiter(3)
    order = []

    async def use(name, weight):
        async with limiter.slots(weight):
            order.append(name)
            await asyncio.sleep(1)

    await asyncio.gather(use("first", 2), use("heavy", 3), use("light", 1))
    assert order == ["first", "heavy", "light"]


async def test_t3_a_heavy_head_that_is_cancelled_lets_the_light_ones_in_at_once():
    """T3: when the heavy head of the line gives up, those behind it that fit go in."""
    limiter = ConcurrencyLimiter(3)
    await limiter.acquire(2)
    heavy = asyncio.create_task(limiter.acquire(3))
    light = asyncio.create_task(limiter.acquire(1))
    await asyncio.sleep(0)
    heavy.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert light.done()
    assert limiter.statistics().in_use == 3


async def test_slots_given_back_to_a_heavy_one_let_a_light_one_behind_it_in():
    """If more was free than the first in line wants, those behind it get the rest at once."""
    limiter = ConcurrencyLimiter(3)
    await limiter.acquire(2)
    waiting = [asyncio.create_task(limiter.acquire(weight)) for weight in (2, 1)]
    await asyncio.sleep(0)
    limiter.release(2)
    await asyncio.gather(*waiting)

    assert limiter.statistics().in_use == 3


async def test_one_who_is_refused_and_cancelled_in_the_same_step_gives_nothing_back():
    """Who was refused holds no slot, whatever happens to it next."""
    limiter = ConcurrencyLimiter(1)
    await limiter.acquire()
    waiting = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(0)
    limiter.close()
    waiting.cancel()
    await asyncio.wait([waiting])

    assert waiting.cancelled()
    assert limiter.statistics().in_use == 1


async def test_more_than_the_limit_is_refused_at_once():
    """A weight that can never fit is refused, not waited for."""
    with pytest.raises(ValueError, match="weight must be at most the limit of 3, got 4"):
        await ConcurrencyLimiter(3).acquire(4)
    with pytest.raises(ValueError, match="weight must be at least 1, got 0"):
        ConcurrencyLimiter(3).try_acquire(0)


async def test_t41_a_limit_that_shrinks_while_all_is_in_use_returns_at_once():
    """T41: the new limit holds as slots come back; nobody is interrupted and nothing hangs."""
    limiter = ConcurrencyLimiter(4)
    inside = peak = 0

    async def use():
        nonlocal inside, peak
        async with limiter:
            inside += 1
            peak = max(peak, inside)
            await asyncio.sleep(1)
            inside -= 1

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(use())
        await asyncio.sleep(0.5)
        limiter.resize(1)
        assert limiter.statistics().in_use == 4
        await asyncio.sleep(1)
        assert limiter.statistics().in_use == inside == 1
    assert peak == 4


async def test_a_limit_that_grows_lets_waiters_in_at_once():
    """After growing, those in line get the new slots without anybody leaving."""
    limiter = ConcurrencyLimiter(1)
    await limiter.acquire()
    waiting = [asyncio.create_task(limiter.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    limiter.resize(3)
    await asyncio.sleep(0)

    assert [task.done() for task in waiting] == [True, True, False]
    limiter.resize(4)
    await waiting[2]


async def test_a_limit_below_what_is_waited_for_is_refused():
    """Shrinking below the weight of somebody in line would make them wait for ever."""
    limiter = ConcurrencyLimiter(3)
    await limiter.acquire(3)
    waiting = asyncio.create_task(limiter.acquire(2))
    await asyncio.sleep(0)

    with pytest.raises(ValueError, match=r"limit must be at least 2, .* got 1"):
        limiter.resize(1)
    limiter.release(3)
    await waiting


async def test_close_refuses_waiters_and_newcomers_and_drain_waits_for_those_inside():
    """After close nobody gets in; drain returns when the last one is out."""
    limiter = ConcurrencyLimiter(1)
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def use():
        async with limiter:
            await asyncio.sleep(2)

    inside = asyncio.create_task(use())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(use())
    await asyncio.sleep(0)
    limiter.close()

    with pytest.raises(ConcurrencyLimitExceeded) as refused:
        await waiting
    assert refused.value.reason == "closed"
    with pytest.raises(ConcurrencyLimitExceeded):
        await limiter.acquire()
    await limiter.drain()
    assert loop.time() - start == 2.0
    await inside


async def test_a_cancelled_drain_does_not_harm_another_one():
    """Two tasks may drain, and one of them may be cancelled."""
    limiter = ConcurrencyLimiter(1)
    await limiter.acquire()
    drains = [asyncio.create_task(limiter.drain()) for _ in range(2)]
    await asyncio.sleep(0)
    drains[0].cancel()
    await asyncio.sleep(0)
    limiter.release()

    async with asyncio.timeout(1):
        await drains[1]


async def test_drain_waits_for_those_who_came_in_the_meantime():
    """Who gets in before the drain has woken is waited for, too."""
    limiter = ConcurrencyLimiter(1)
    await limiter.acquire()
    drain = asyncio.create_task(limiter.drain())
    await asyncio.sleep(0)
    limiter.release()
    assert limiter.try_acquire()
    await asyncio.sleep(1)

    assert not drain.done()
    limiter.release()
    await drain


async def test_drain_waits_for_those_in_line():
    """Who waits is let in, and waited for; whoever gives up or is refused is not."""
    limiter = ConcurrencyLimiter(1, max_wait=3)
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def use(seconds):
        async with limiter:
            await asyncio.sleep(seconds)

    users = [asyncio.create_task(use(2)) for _ in range(4)]
    await asyncio.sleep(0)
    loop.call_later(1, users[1].cancel)
    await limiter.drain()

    assert loop.time() - start == 4.0
    outcomes = await asyncio.gather(*users, return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "NoneType",
        "CancelledError",
        "NoneType",
        "ConcurrencyLimitExceeded",
    ]


def test_t34_who_waited_on_a_loop_that_is_gone_waits_no_longer():
    """T34: waiters, their timer and drains of the old loop stand in nobody's way on the next."""
    limiter = ConcurrencyLimiter(1, max_wait=1)
    old = VirtualTimeLoop()
    for use in (limiter.acquire, limiter.acquire, limiter.drain):
        old.create_task(use())._log_destroy_pending = False
    old.run_until_complete(asyncio.sleep(0))
    old.close()

    async def main():
        await limiter.acquire()
        drain = asyncio.create_task(limiter.drain())
        with pytest.raises(ConcurrencyLimitExceeded, match="within 1 s"):
            await limiter.acquire()
        limiter.release()
        await drain

    run_virtual(main())


def test_t34_drain_does_not_wait_for_what_was_held_on_a_loop_that_is_gone():
    """T34: a slot that was never given back ends with its event loop."""
    limiter = ConcurrencyLimiter(1)
    run_virtual(limiter.acquire())
    run_virtual(limiter.drain())


async def test_waiting_and_running_are_counted_apart():
    """A timed limiter tells how long callers waited for slots, and how long they used them."""
    limiter = ConcurrencyLimiter(1, timed=True)

    async def use():
        async with limiter:
            await asyncio.sleep(2)

    await asyncio.gather(use(), use(), use())
    seen = limiter.statistics()
    assert (seen.waits, seen.wait_time) == (2, 2.0 + 4.0)
    assert (seen.runs, seen.run_time) == (3, 6.0)


async def test_the_run_time_counts_each_slot_and_those_still_in_use():
    """Run time is in seconds of slots: a heavy caller counts as several, also while inside."""
    limiter = ConcurrencyLimiter(5, timed=True)
    await limiter.acquire(3)
    assert limiter.try_acquire(2)
    waiting = asyncio.create_task(limiter.acquire(2))
    await asyncio.sleep(1)
    assert limiter.statistics().run_time == 5.0

    limiter.release(3)
    await waiting
    await asyncio.sleep(1)
    assert (limiter.statistics().runs, limiter.statistics().run_time) == (3, 9.0)


def test_the_times_add_up_over_successive_loops():
    """All counts go on with the next loop; slots still held at the end of one were in use."""
    limiter = ConcurrencyLimiter(1, timed=True)

    async def use():
        async with limiter:
            await asyncio.sleep(2)

    async def main():
        await asyncio.gather(use(), use())
        await limiter.acquire()
        await asyncio.sleep(3)

    for _ in range(2):
        run_virtual(main())
    run_virtual(use())
    seen = limiter.statistics()
    assert (seen.runs, seen.run_time, seen.waits, seen.wait_time) == (7, 16.0, 2, 4.0)


async def test_without_timed_nothing_reads_the_clock():
    """Unless it is timed, the limiter counts who waited and no seconds."""
    limiter = ConcurrencyLimiter(1)

    async def use():
        async with limiter:
            await asyncio.sleep(1)

    with mock.patch.object(asyncio.get_running_loop(), "time", side_effect=AssertionError):
        await limiter.acquire()
        limiter.release()
    await asyncio.gather(use(), use())
    seen = limiter.statistics()
    assert (seen.waits, seen.wait_time, seen.runs, seen.run_time) == (1, 0, 0, 0)


async def test_each_waiter_expires_at_its_own_time():
    """One timer serves all: who joined later is refused later, whatever became of those before."""
    limiter = ConcurrencyLimiter(1, max_wait=3)
    await limiter.acquire()
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def refused():
        with pytest.raises(ConcurrencyLimitExceeded) as error:
            await limiter.acquire()
        return error.value.reason, loop.time() - start

    first = asyncio.create_task(refused())
    await asyncio.sleep(1)
    granted = asyncio.create_task(limiter.acquire())
    cancelled = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(1)
    last = asyncio.create_task(refused())
    assert await first == ("wait", 3.0)
    cancelled.cancel()
    limiter.release()
    await granted
    assert await last == ("wait", 5.0)


async def test_t3_a_heavy_head_that_expires_lets_the_light_ones_in_at_once():
    """T3: when the wait of the heavy head is over, those behind it that fit go in."""
    limiter = ConcurrencyLimiter(3, max_wait=2)
    await limiter.acquire(2)
    heavy = asyncio.create_task(limiter.acquire(3))
    await asyncio.sleep(1)
    loop = asyncio.get_running_loop()
    start = loop.time()

    await limiter.acquire()
    assert loop.time() - start == 1.0
    with pytest.raises(ConcurrencyLimitExceeded):
        await heavy


class LimiterMachine(RuleBasedStateMachine):
    """The limiter beside a list that does the same in the plainest way."""

    def __init__(self):
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.limiter = ConcurrencyLimiter(3)
        self.limit = 3
        self.inside = []  # weights
        self.line = []  # (weight, task), in order

    def settle(self):
        self.loop.run_until_complete(asyncio.sleep(0.001))

    def grant(self):
        while self.line and sum(self.inside) + self.line[0][0] <= self.limit:
            self.inside.append(self.line.pop(0)[0])

    @rule(weight=st.integers(1, 3))
    def acquire(self, weight):
        if weight <= self.limit:
            task = self.loop.create_task(self.limiter.acquire(weight))
            self.line.append((weight, task))
            self.grant()
            self.settle()

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def release(self, data):
        weight = data.draw(st.sampled_from(self.inside))
        self.inside.remove(weight)
        self.limiter.release(weight)
        self.grant()
        self.settle()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def cancel(self, data):
        entry = data.draw(st.sampled_from(self.line))
        self.line.remove(entry)
        entry[1].cancel()
        self.grant()
        self.settle()

    @rule(limit=st.integers(1, 5))
    def resize(self, limit):
        if limit >= max((weight for weight, _ in self.line), default=1):
            self.limiter.resize(limit)
            self.limit = limit
            self.grant()
            self.settle()

    @invariant()
    def agrees(self):
        seen = self.limiter.statistics()
        assert (seen.in_use, seen.waiting) == (sum(self.inside), len(self.line))

    def teardown(self):
        for _, task in self.line:
            task.cancel()
        self.settle()
        self.loop.close()


TestLimiterAgreesWithItsModel = LimiterMachine.TestCase
TestLimiterAgreesWithItsModel.settings = settings(max_examples=50, deadline=None)
TestLimiterAgreesWithItsModel.__doc__ = "Whatever happens in whatever order, slots are conserved."


class RestlessLimiterMachine(RuleBasedStateMachine):
    """A limiter whose callers are disturbed at any step, not only when all have come to rest."""

    @initialize(max_queue=st.sampled_from([None, 2]), max_wait=st.sampled_from([None, 1.5]))
    def make(self, max_queue, max_wait):
        self.loop = VirtualTimeLoop()
        self.max_wait = max_wait
        self.limiter = ConcurrencyLimiter(3, max_queue, max_wait, timed=True)
        self.tasks = []
        self.inside = []  # weights

    async def acquire_and_tell(self, weight):
        with suppress(ConcurrencyLimitExceeded):
            await self.limiter.acquire(weight)
            self.inside.append(weight)

    @rule(weight=st.integers(1, 3))
    def acquire(self, weight):
        if weight <= self.limiter.statistics().limit:
            self.tasks.append(self.loop.create_task(self.acquire_and_tell(weight)))

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def release(self, data):
        weight = data.draw(st.sampled_from(self.inside))
        self.inside.remove(weight)
        self.limiter.release(weight)

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel(self, data):
        data.draw(st.sampled_from(self.tasks)).cancel()

    @rule()
    def drain(self):
        self.tasks.append(self.loop.create_task(self.limiter.drain()))

    @rule()
    def close(self):
        self.limiter.close()

    @rule(limit=st.integers(3, 5))
    def resize(self, limit):
        self.limiter.resize(limit)

    @rule(seconds=st.sampled_from([0, 0, 1, 3]))
    def go_on(self, seconds):
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.tasks = [task for task in self.tasks if not task.done()]
        if seconds > 0:  # all are at rest
            seen = self.limiter.statistics()
            assert seen.in_use == sum(self.inside)
            assert seen.in_use or not self.tasks
            if seen.waiting:
                assert seen.in_use + self.limiter._waiters[0][1] > seen.limit
                assert seconds == 1 or self.max_wait is None

    @invariant()
    def holds_what_is_inside(self):
        if hasattr(self, "limiter"):
            seen = self.limiter.statistics()
            assert sum(self.inside) <= seen.in_use <= seen.peak <= 5

    def teardown(self):
        if hasattr(self, "loop"):
            for task in self.tasks:
                task.cancel()
            self.go_on(3)
            self.loop.close()


TestRestlessLimiter = RestlessLimiterMachine.TestCase
TestRestlessLimiter.settings = settings(max_examples=100, deadline=None)
TestRestlessLimiter.__doc__ = "Whatever is cancelled at whichever step, slots are conserved."
