"""Rate limiting with a token bucket."""

from __future__ import annotations

import asyncio
import contextlib
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from concurrency_patterns.errors import RateLimitExceeded
from concurrency_patterns.testing import VirtualTimeLoop, explore_cancellation, run_virtual
from concurrency_patterns.timeout import deadline
from concurrency_patterns.token_bucket import TokenBucket, TokenBuckets


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
@pytest.mark.parametrize("held", [0, 1])
async def test_a_senseless_timeout_is_refused(longest, held):
    """A timeout must be zero or more; a wrong one takes no token and no place in line."""
    bucket = TokenBucket(rate=1, capacity=1)
    if held == 0:
        await bucket.acquire()
    with pytest.raises(ValueError, match="timeout must be"):
        await bucket.acquire(timeout=longest)
    assert bucket.statistics().waiting == 0
    assert bucket.statistics().tokens == held


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


async def test_a_wait_beyond_the_deadline_is_refused_at_once():
    """A deadline around the call counts like a timeout: what cannot be met is not waited for."""
    bucket = TokenBucket(rate=1, capacity=1)
    await bucket.acquire()
    start = asyncio.get_running_loop().time()

    async with deadline(0.5):
        with pytest.raises(RateLimitExceeded):
            await bucket.acquire()
    assert asyncio.get_running_loop().time() == start


@given(
    limit=st.integers(1, 8),
    pauses=st.lists(st.floats(0, 1.5), min_size=1, max_size=30),
)
def test_t5_a_strict_bucket_never_lets_more_than_its_limit_through_in_any_period(limit, pauses):
    """T5: in any second at most the limit starts, also after idling."""

    async def run():
        bucket = TokenBucket.strict(limit, per=1)
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
        assert sum(first <= time < first + 1 - 1e-6 for time in times) <= limit


async def test_a_strict_bucket_serves_in_order_and_at_full_rate():
    """The strict form lets its limit through in each period, first come, first served."""
    times = await grant_times(TokenBucket.strict(limit=2, per=1), [1] * 6)

    assert times == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


async def test_a_strict_bucket_refuses_a_wait_that_is_too_long():
    """The strict form knows when the tokens come back, round after round."""
    bucket = TokenBucket.strict(limit=2, per=1)
    await bucket.acquire()
    await asyncio.sleep(0.4)
    await bucket.acquire()
    ahead = [asyncio.create_task(bucket.acquire()) for _ in range(2)]
    await asyncio.sleep(0)

    with pytest.raises(RateLimitExceeded) as caught:
        await bucket.acquire(timeout=1.5)
    assert round(caught.value.retry_after, 6) == 1.6
    await bucket.acquire(timeout=1.7)
    await asyncio.gather(*ahead)


async def test_settling_gives_back_what_was_too_much():
    """Tokens that were estimated and not needed serve those who wait, at once."""
    bucket = TokenBucket(rate=1, capacity=10)
    await bucket.acquire(10)
    waiting = asyncio.create_task(bucket.acquire(4))
    await asyncio.sleep(0)
    bucket.settle(estimated=10, actual=6)
    await asyncio.sleep(0)

    assert waiting.done()
    assert bucket.statistics().tokens == 0


async def test_settling_takes_what_was_too_little_as_a_debt():
    """A call that cost more than it took makes the next ones wait until the debt is paid."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    bucket = TokenBucket(rate=1, capacity=10)
    await bucket.acquire(10)
    bucket.settle(estimated=10, actual=13)

    assert bucket.statistics().tokens == -3
    await bucket.acquire()
    assert loop.time() - start == 4.0


@pytest.mark.parametrize("bucket", [TokenBucket(1, 5), TokenBucket.strict(5, 5)], ids=repr)
async def test_settling_never_fills_the_bucket_above_its_capacity(bucket):
    """Giving back more than was taken does not mint tokens."""
    bucket.settle(estimated=5, actual=0)

    assert [bucket.try_acquire() for _ in range(6)] == [True] * 5 + [False]


async def test_a_strict_bucket_settles_too():
    """The strict form gives back and takes in excess as well."""
    bucket = TokenBucket.strict(limit=4, per=1)
    await bucket.acquire(4)
    bucket.settle(estimated=4, actual=1)
    assert bucket.statistics().tokens == 3
    bucket.settle(estimated=0, actual=5)
    assert bucket.statistics().tokens == -2
    await asyncio.sleep(1)
    assert bucket.statistics().tokens == 4


async def test_the_rate_can_change_while_calls_wait():
    """Those in line are served at the new rate from the moment of the change."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    bucket = TokenBucket(rate=1, capacity=1)
    await bucket.acquire()

    async def request():
        await bucket.acquire()
        return round(loop.time() - start, 6)

    waiting = [asyncio.create_task(request()) for _ in range(3)]
    await asyncio.sleep(1.5)
    bucket.set_rate(10)

    assert await asyncio.gather(*waiting) == [1.0, 1.55, 1.65]
    with pytest.raises(TypeError, match="strict"):
        TokenBucket.strict(1, 1).set_rate(2)


async def test_several_buckets_give_all_or_nothing():
    """A call waits until every bucket has enough, and takes from none before."""
    limits = TokenBuckets(requests=TokenBucket(1, 2), tokens=TokenBucket(100, 300))
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def call(tokens):
        await limits.acquire({"requests": 1, "tokens": tokens})
        return round(loop.time() - start, 6)

    # The second one waits for tokens, the third for its turn and then for a request.
    assert await asyncio.gather(call(300), call(100), call(10)) == [0.0, 1.0, 1.1]
    seen = limits.statistics()
    assert (seen["requests"].granted, seen["tokens"].waiting) == (3, 0)


async def test_a_call_that_waits_for_one_bucket_does_not_hold_the_other():
    """While a call waits for tokens, the bucket of requests stays as it is."""
    limits = TokenBuckets(requests=TokenBucket(1, 2), tokens=TokenBucket(1, 5))
    await limits.acquire({"tokens": 5})
    waiting = asyncio.create_task(limits.acquire({"requests": 2, "tokens": 5}))
    await asyncio.sleep(1)

    assert limits.statistics()["requests"].tokens == 2
    await waiting
    assert limits.statistics()["requests"].tokens == 0


async def test_several_buckets_refuse_what_takes_too_long_and_settle_by_name():
    """The slowest bucket decides how long the wait is; each is settled by its name."""
    limits = TokenBuckets(requests=TokenBucket(1, 1), tokens=TokenBucket(10, 100))
    await limits.acquire({"requests": 1, "tokens": 100})

    with pytest.raises(RateLimitExceeded) as caught:
        await limits.acquire({"requests": 1, "tokens": 50}, timeout=2)
    assert caught.value.retry_after == 5.0
    limits.settle("tokens", estimated=100, actual=40)
    await limits.acquire({"requests": 1, "tokens": 50}, timeout=2)


async def test_several_buckets_refuse_bad_costs():
    """Unknown names, nothing at all, and more than a bucket holds are refused at once."""
    limits = TokenBuckets(requests=TokenBucket(1, 1))
    for costs in ({}, {"words": 1}):
        with pytest.raises(ValueError, match="costs must name some of"):
            await limits.acquire(costs)
    with pytest.raises(ValueError, match="n must be at most the capacity of 1, got 2"):
        await limits.acquire({"requests": 2})
    with pytest.raises(ValueError, match="name must be one of"):
        limits.settle("words", 1, 1)
    with pytest.raises(ValueError, match="must not be empty"):
        TokenBuckets()


def test_t2_cancelled_at_any_step_several_buckets_lose_no_token():
    """T2: after any cancellation each bucket has what was not granted."""

    class Calls:
        def __init__(self):
            self.limits = TokenBuckets(a=TokenBucket(1, 2), b=TokenBucket(1, 2))
            self.granted = 0

        async def one(self):
            await self.limits.acquire({"a": 1, "b": 2})
            self.granted += 1

        async def whole(self):
            seen = self.limits.statistics()["a"]
            return seen.granted == self.granted and seen.waiting == 0

    async def scenario(calls):
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(calls.one())

    assert explore_cancellation(Calls, scenario, Calls.whole) > 10


class BucketMachine(RuleBasedStateMachine):
    """The bucket beside exact fractions that are refilled second by second."""

    def __init__(self):
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.bucket = TokenBucket(rate=4, capacity=6)
        self.tokens = Fraction(6)
        self.line = []  # (n, task), in order

    def settle(self, seconds=0):
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.loop.run_until_complete(asyncio.sleep(0))

    def grant(self):
        while self.line and self.tokens >= self.line[0][0]:
            self.tokens -= self.line.pop(0)[0]

    @rule(n=st.integers(1, 6))
    def acquire(self, n):
        self.line.append((n, self.loop.create_task(self.bucket.acquire(n))))
        self.grant()
        self.settle()

    @rule(quarters=st.integers(1, 9))
    def wait(self, quarters):
        for _ in range(quarters):  # one token comes in each quarter of a second
            self.tokens = min(self.tokens + 1, Fraction(6))
            self.grant()
        self.settle(quarters * 0.25)

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def cancel(self, data):
        entry = data.draw(st.sampled_from(self.line))
        self.line.remove(entry)
        entry[1].cancel()
        self.grant()
        self.settle()

    @invariant()
    def agrees(self):
        async def look():
            return self.bucket.statistics()

        seen = self.loop.run_until_complete(look())
        assert (seen.tokens, seen.waiting) == (self.tokens, len(self.line))

    def teardown(self):
        for _, task in self.line:
            task.cancel()
        self.settle()
        self.loop.close()


TestBucketAgreesWithItsModel = BucketMachine.TestCase
TestBucketAgreesWithItsModel.settings = settings(max_examples=50, deadline=None)
TestBucketAgreesWithItsModel.__doc__ = "Whatever happens in whatever order, tokens are conserved."


async def test_what_a_strict_bucket_was_given_back_does_not_count_twice():
    """Tokens settled at half time do not come back a second time when their period is over."""
    bucket = TokenBucket.strict(limit=5, per=1)
    await bucket.acquire(3)
    await asyncio.sleep(0.5)
    bucket.settle(estimated=3, actual=0)
    await asyncio.sleep(0.5)

    assert sum(bucket.try_acquire() for _ in range(20)) == 5


async def test_a_strict_bucket_keeps_what_it_promised_to_heavy_requests():
    """A request that would wait longer than its timeout is refused, however tokens come back."""
    loop = asyncio.get_running_loop()
    bucket = TokenBucket.strict(limit=3, per=1)
    for _ in range(3):
        await bucket.acquire()
        await asyncio.sleep(0.2)
    waits = []

    async def request(n):
        start = loop.time()
        with contextlib.suppress(RateLimitExceeded):
            await bucket.acquire(n, timeout=1.5)
            waits.append(loop.time() - start)

    await asyncio.gather(*(request(n) for n in (2, 2, 2, 2)))
    assert [round(wait, 6) for wait in waits] == [0.6]  # the next would wait 1.6 s
