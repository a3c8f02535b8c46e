"""Rate limiting with a token bucket."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrency_patterns.errors import RateLimitExceeded
from concurrency_patterns.testing import explore_cancellation, run_virtual
from concurrency_patterns.token_bucket import TokenBucket


async def grant_times(bucket, requests):
    """Return when each of the requests got its tokens, in seconds from now."""
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def request(n):
        await bucket.acquire(n)
        return round(loop.time() - start, 6)

    return await asyncio.gather(*(request(n) for n in requests))


async def test_the_chapters_workload_20_requests_at_5_a_second():
    """20 requests, 5 a second, full bucket of 5: five at once, the last one at 3.0 s."""
    times = await grant_times(TokenBucket(rate=5, capacity=5), [1] * 20)

    assert times[:5] == [0.0] * 5
    assert times[5:] == [round(0.2 * number, 6) for number in range(1, 16)]


async def test_an_idle_bucket_fills_up_to_its_capacity_and_no_further():
    """After any idle time at most the capacity goes out at once."""
    bucket = TokenBucket(rate=5, capacity=5)
    await asyncio.sleep(3600)

    assert [bucket.try_acquire() for _ in range(6)] == [True] * 5 + [False]


async def test_t4_a_heavy_request_is_not_starved_by_light_ones():
    """T4: requests are served in order, whatever their weight."""
    times = await grant_times(TokenBucket(rate=10, capacity=10), [10, 8, 1, 1, 1])

    assert times == [0.0, 0.8, 0.9, 1.0, 1.1]


async def test_t3_cancelled_waiters_let_those_behind_move_up_at_once():
    """T3: when the heavy head of the line is cancelled, the light one behind goes at once."""
    bucket = TokenBucket(rate=1, capacity=8)
    await bucket.acquire(7)
    heavy = asyncio.create_task(bucket.acquire(8))
    light = asyncio.create_task(bucket.acquire(1))
    await asyncio.sleep(0)
    assert not light.done()
    heavy.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert light.done()
    assert bucket.statistics().waiting == 0


async def test_a_newcomer_does_not_overtake_those_in_line():
    """Tokens that come free for a waiter cannot be snatched by a newcomer."""
    bucket = TokenBucket(rate=1, capacity=2)
    await bucket.acquire(2)
    waiter = asyncio.create_task(bucket.acquire(2))
    await asyncio.sleep(1.5)

    assert not bucket.try_acquire()
    await waiter


async def test_a_wait_that_would_take_too_long_is_refused_at_once():
    """An acquire with a timeout refuses early and tells when the tokens will be there."""
    bucket = TokenBucket(rate=1, capacity=1)
    await bucket.acquire()
    ahead = asyncio.create_task(bucket.acquire())
    await asyncio.sleep(0)
    start = asyncio.get_running_loop().time()

    with pytest.raises(RateLimitExceeded) as caught:
        await bucket.acquire(timeout=1.5)
    assert caught.value.retry_after == 2.0
    assert asyncio.get_running_loop().time() == start
    await bucket.acquire(timeout=2)
    await ahead
    assert bucket.statistics().rejected == 1


async def test_t6_more_than_the_capacity_is_refused_at_once():
    """T6: what the bucket can never hold is refused, not waited for."""
    bucket = TokenBucket(rate=5, capacity=5)

    with pytest.raises(ValueError, match="n must be at most the capacity of 5, got 6"):
        await bucket.acquire(6)
    with pytest.raises(ValueError, match="n must be at most the capacity of 5, got 6"):
        bucket.try_acquire(6)


@pytest.mark.parametrize("n", [0, -1])
async def test_less_than_one_token_is_refused(n):
    """A request for no tokens is a mistake and told so."""
    with pytest.raises(ValueError, match=f"n must be at least 1, got {n}"):
        await TokenBucket(rate=5, capacity=5).acquire(n)


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf])
def test_a_senseless_rate_is_refused(rate):
    """A rate must be a finite number above zero."""
    with pytest.raises(ValueError, match="rate must be"):
        TokenBucket(rate=rate, capacity=1)


@pytest.mark.parametrize("longest", [-1, math.nan])
async def test_a_senseless_timeout_is_refused(longest):
    """A timeout must be zero or more; a wrong one takes no token and no place in line."""
    bucket = TokenBucket(rate=1, capacity=1)
    await bucket.acquire()
    with pytest.raises(ValueError, match="timeout must be"):
        await bucket.acquire(timeout=longest)
    assert bucket.statistics().waiting == 0


def test_t2_cancelled_at_any_step_no_token_is_lost():
    """T2: after any cancellation the bucket holds what was not granted."""

    class Requests:
        def __init__(self):
            self.bucket = TokenBucket(rate=1, capacity=2)
            self.granted = 0

        async def one(self):
            await self.bucket.acquire()
            self.granted += 1

        async def whole(self):
            seen = self.bucket.statistics()
            return seen.granted == self.granted and seen.waiting == 0

    async def scenario(requests):
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(requests.one())

    assert explore_cancellation(Requests, scenario, Requests.whole) > 10


@given(
    rate=st.integers(1, 50),
    capacity=st.integers(1, 20),
    pauses=st.lists(st.floats(0, 2), min_size=1, max_size=40),
    window=st.floats(0.01, 3),
)
def test_t5_no_window_grants_more_than_capacity_plus_rate_times_window(
    rate, capacity, pauses, window
):
    """T5: any window of W seconds grants at most capacity + rate * W."""

    async def run():
        bucket = TokenBucket(rate=rate, capacity=capacity)
        loop = asyncio.get_running_loop()
        times = []

        async def request():
            await bucket.acquire()
            times.append(loop.time())

        async with asyncio.TaskGroup() as group:
            for pause in pauses:
                await asyncio.sleep(pause)
                for _ in range(3):
                    group.create_task(request())
        return times

    times = run_virtual(run())
    for first in times:
        inside = sum(first <= time < first + window for time in times)
        assert inside <= capacity + rate * window + 1e-6


async def test_t7_a_million_acquisitions_do_not_drift():
    """T7: after a million tokens at a rate that no binary fraction holds, not one is off."""
    bucket = TokenBucket(rate=0.1, capacity=1000)
    loop = asyncio.get_running_loop()
    start = loop.time()
    await bucket.acquire(1000)
    for _ in range(1000):
        await bucket.acquire(1000)

    assert round(loop.time() - start, 6) == 10_000_000.0


def test_t8_a_clock_that_steps_back_neither_mints_tokens_nor_gets_stuck():
    """T8: on a clock that starts anew the bucket is empty at worst, and fills again."""
    bucket = TokenBucket(rate=1, capacity=2)

    async def spend_late():
        await asyncio.sleep(3600)
        await bucket.acquire(2)

    run_virtual(spend_late())
    assert run_virtual(grant_times(bucket, [1, 1])) == [1.0, 2.0]


def test_t34_one_bucket_serves_three_loops_one_after_the_other():
    """T34: a bucket made without a loop works in three successive runs, waiters included."""
    bucket = TokenBucket(rate=1, capacity=1)

    for _ in range(3):
        assert run_virtual(grant_times(bucket, [1, 1]))[1] >= 1.0


async def test_call_and_decorator_take_a_token_each():
    """A call through the bucket and a decorated function take one token a call."""
    bucket = TokenBucket(rate=1, capacity=3)

    async def double(number):
        return 2 * number

    decorated = bucket(double)
    async with bucket:
        pass

    assert await bucket.call(double, 2) == 4
    assert await decorated(4) == 8
    assert decorated.__name__ == "double"
    assert bucket.statistics().tokens == 0


def test_a_plain_function_cannot_be_decorated():
    """Decorating what cannot wait is refused when it is decorated, not when it is called."""
    with pytest.raises(TypeError, match="async function"):
        TokenBucket(rate=1, capacity=1)(len)
