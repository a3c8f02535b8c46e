"""Token bucket: what a token costs, what 10,000 waiters cost, and whether the rate is right."""

from __future__ import annotations

import asyncio
from collections import deque
from time import process_time
from typing import TYPE_CHECKING, Any

from benchmarks.harness import (
    OURS,
    Candidate,
    Case,
    awaits,
    blocks,
    calls,
    noop,
    on_loop,
    timed,
)
from concurrency_patterns import TokenBucket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.harness import Maker, Measure

    # Makes what one awaits for a token, for a rate a second and a capacity.
    Limiter = Callable[[int, int], Callable[[], Awaitable[object]]]

ENOUGH = 1_000_000_000  # tokens for a measure that must not wait


class Bound:
    """The least that can be done: one timer, and a future for each waiter.

    It has no burst limit: what was due while it slept goes out at once.
    """

    def __init__(self, rate: int, capacity: int) -> None:
        self._interval = 1 / rate
        self._granted = -capacity  # those of the full bucket are not due at any time
        self._start: float | None = None
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def acquire(self) -> asyncio.Future[None]:
        """Return what will be done when the token is there."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if self._timer is None:
            self._arm()
        return waiter

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        if self._start is None:
            self._start = loop.time()
        due = self._start + (self._granted + 1) * self._interval
        self._timer = loop.call_at(due, self._serve, self._start)

    def _serve(self, start: float) -> None:
        due = int((asyncio.get_running_loop().time() - start) / self._interval)
        while self._waiters and self._granted < due:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._granted += 1
        self._timer = None
        if self._waiters:
            self._arm()


def bound(rate: int, capacity: int) -> Callable[[], Awaitable[object]]:
    """One timer and futures."""
    return Bound(rate, capacity).acquire


def ours(rate: int, capacity: int) -> Callable[[], Awaitable[object]]:
    """Ours."""
    return TokenBucket(rate, capacity).acquire


def aiolimiter(rate: int, capacity: int) -> Callable[[], Awaitable[object]]:
    """aiolimiter: its capacity is also the number of tokens in its time period."""
    from aiolimiter import AsyncLimiter

    return AsyncLimiter(capacity, capacity / rate).acquire


def pyrate(rate: int, capacity: int, **options: int) -> Callable[[], Awaitable[object]]:
    """pyrate-limiter's token bucket."""
    from pyrate_limiter import Duration, Limiter, Rate, StateBucket
    from pyrate_limiter import TokenBucket as Algorithm

    limit = Rate(rate, Duration.SECOND, burst=capacity)
    limiter = Limiter(StateBucket([limit], algorithm=Algorithm()), **options)
    return lambda: limiter.try_acquire_async("benchmark")


def pyrate_exact(rate: int, capacity: int) -> Callable[[], Awaitable[object]]:
    """The same without its slack of 50 ms."""
    return pyrate(rate, capacity, buffer_ms=0)


def throttled(rate: int, capacity: int, algorithm: str = "token_bucket") -> Any:
    """throttled-py, which waits as long as it may."""
    from throttled.asyncio import Throttled, per_sec

    limiter = Throttled(
        key="benchmark", using=algorithm, quota=per_sec(rate, burst=capacity), timeout=60
    )
    return limiter.limit


def throttled_gcra(rate: int, capacity: int) -> Callable[[], Awaitable[object]]:
    """throttled-py's other algorithm, which does not count whole seconds."""
    limit: Callable[[], Awaitable[object]] = throttled(rate, capacity, "gcra")
    return limit


def nopanic(rate: int, capacity: int) -> Callable[[], Awaitable[object]]:
    """nopanic's decorator around a function that does nothing."""
    from nopanic import rate_limit

    return rate_limit(rate, per=1.0, burst=capacity)(noop)


def limits_hit(_: int, __: int) -> Callable[[], Awaitable[object]]:
    """limits, which never waits."""
    from limits import RateLimitItemPerSecond
    from limits.aio.storage import MemoryStorage
    from limits.aio.strategies import FixedWindowRateLimiter

    limiter = FixedWindowRateLimiter(MemoryStorage())
    item = RateLimitItemPerSecond(ENOUGH)
    return lambda: limiter.hit(item, "benchmark")


async def hyx_block() -> Measure:
    """hyx, which never waits."""
    from hyx.ratelimit import tokenbucket

    bucket = tokenbucket(max_executions=ENOUGH, per_time_secs=1)
    return blocks(lambda: bucket)


async def ours_block() -> Measure:
    """Ours as a block."""
    bucket = TokenBucket(ENOUGH, ENOUGH)
    return blocks(lambda: bucket)


def ours_try() -> Measure:
    """Ours without waiting: a plain call, with a loop running for its clock."""
    bucket = TokenBucket(ENOUGH, ENOUGH)
    take = calls(bucket.try_acquire)

    async def work(number: int) -> float:
        return take(number)

    return timed(work)


def at_once(limiter: Limiter) -> Maker:
    """Take tokens that are there."""

    async def make() -> Measure:
        return awaits(limiter(ENOUGH, ENOUGH))

    return make


class Waiters:
    """All wait at once; the CPU time until all are served, and how many were served out of turn."""

    rate = 10_000
    capacity = 100

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self.facts = {"out_of_order": 0}

    def __call__(self, number: int) -> float:
        """Serve so many."""
        seconds: float = on_loop(self._serve(number))
        return seconds

    async def _serve(self, number: int) -> float:
        acquire = self._limiter(self.rate, self.capacity)
        served: list[int] = []

        async def one(place: int) -> None:
            await acquire()
            served.append(place)

        start = process_time()
        async with asyncio.TaskGroup() as group:
            for place in range(number):
                group.create_task(one(place))
        seconds = process_time() - start
        breaks = sum(place != turn for turn, place in enumerate(served))
        self.facts["out_of_order"] = max(breaks, self.facts["out_of_order"])
        return seconds


def accuracy(limiter: Limiter, rate: int, capacity: int) -> Maker:
    """The share of the asked rate that 50 tasks get which never stop asking."""

    async def share(milliseconds: int) -> float:
        acquire = limiter(rate, capacity)
        loop = asyncio.get_running_loop()
        granted = 0
        last = 0.0

        async def ask() -> None:
            nonlocal granted, last
            while True:
                await acquire()
                granted += 1
                last = loop.time()

        start = loop.time()
        tasks = [loop.create_task(ask()) for _ in range(50)]
        await asyncio.sleep(milliseconds / 1000)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # The bucket was full: its capacity went out at once and says nothing about the rate.
        return max(0, granted - capacity) / (last - start) / rate if last > start else 0.0

    return lambda: timed(share)


def exactly(rate: int, capacity: int) -> Case:
    """Make the case of this rate."""
    peers: list[tuple[str, Limiter, str]] = [
        ("aiolimiter.AsyncLimiter", aiolimiter, "aiolimiter"),
        ("pyrate_limiter.TokenBucket(buffer_ms=0)", pyrate_exact, "pyrate-limiter"),
        ("pyrate_limiter.TokenBucket", pyrate, "pyrate-limiter"),
        ("nopanic.rate_limit", nopanic, "nopanic"),
        # Its token bucket counts whole seconds: nothing to see in a run that is shorter.
        ("throttled.Throttled(using='gcra')", throttled_gcra, "throttled-py"),
    ]
    return Case(
        key=f"rate_{rate}_capacity_{capacity}",
        zh=f"速率是否准确：每秒 {rate:,} 个，容量 {capacity}，50 个任务一直在等",
        en=f"Is the rate right: {rate:,} a second, capacity {capacity}, 50 tasks always waiting",
        candidates=[
            Candidate("(asked for)", lambda: lambda _: 1.0),
            Candidate(
                "TokenBucket",
                accuracy(ours, rate, capacity),
                OURS,
                at_least=0.99,
                at_most=1.01,
            ),
            Candidate("(one timer and futures)", accuracy(bound, rate, capacity)),
            *(
                Candidate(name, accuracy(peer, rate, capacity), package)
                for name, peer, package in peers
            ),
        ],
        unit="share",
        least=600,
        most=600,
        quick=100,
    )


CASES = [
    Case(
        key="uncontended",
        zh="取一个现成的令牌",
        en="Taking a token that is there",
        candidates=[
            Candidate("await noop()", lambda: awaits(noop)),
            Candidate("TokenBucket.acquire", at_once(ours), OURS, at_most=3.5),
            Candidate("TokenBucket.try_acquire", ours_try, OURS, at_most=2.5),
            Candidate("async with TokenBucket", ours_block, OURS),
            Candidate("hyx.ratelimit.tokenbucket", hyx_block, "hyx"),
            Candidate("nopanic.rate_limit", at_once(nopanic), "nopanic"),
            Candidate("aiolimiter.AsyncLimiter.acquire", at_once(aiolimiter), "aiolimiter"),
            Candidate("limits FixedWindowRateLimiter.hit", at_once(limits_hit), "limits"),
            Candidate("throttled.Throttled(using='gcra')", at_once(throttled_gcra), "throttled-py"),
            Candidate("throttled.Throttled", at_once(throttled), "throttled-py"),
            Candidate("pyrate_limiter.TokenBucket", at_once(pyrate), "pyrate-limiter"),
        ],
    ),
    Case(
        key="waiters",
        zh="10,000 个任务同时等（每秒 10,000 个，容量 100）：每个用去的 CPU 时间",
        en="10,000 tasks wait at once (10,000 a second, capacity 100): CPU time for each",
        candidates=[
            Candidate("(one timer and futures)", lambda: Waiters(bound)),
            Candidate("TokenBucket.acquire", lambda: Waiters(ours), OURS, at_most=1.25),
            Candidate("aiolimiter.AsyncLimiter.acquire", lambda: Waiters(aiolimiter), "aiolimiter"),
            Candidate("nopanic.rate_limit", lambda: Waiters(nopanic), "nopanic"),
            Candidate(
                "pyrate_limiter.TokenBucket(buffer_ms=0)",
                lambda: Waiters(pyrate_exact),
                "pyrate-limiter",
            ),
        ],
        least=10_000,
        most=10_000,
        quick=300,
    ),
    *(
        exactly(rate, capacity)
        for rate, capacity in ((100, 1), (1000, 1), (1000, 10), (10_000, 1), (10_000, 100))
    ),
]
