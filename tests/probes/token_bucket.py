"""Token bucket: the rate, the order, and what cancelled waiters leave behind.

Each is set to 10 a second with a capacity of 10, where that can be set.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from concurrency_patterns import TokenBucket
from probes.harness import (
    HANGS,
    OURS,
    Candidate,
    Finding,
    Probe,
    Unavailable,
    count,
    most_in_a_second,
    seconds,
    start,
    stop,
    word,
)

RATE = CAPACITY = 10
LONG = 60.0
SLACK = 0.15  # more than a token's 0.1 s, less than two
AT_ONCE = "refused at once"


@dataclass(frozen=True)
class Limiter:
    """A rate limiter.

    Attributes:
        acquire: Waits for so many tokens; returns ``False`` if they are refused.
        weights: Whether that may be more than one.
        queue: Whether it waits by itself; if not, it is asked again every 10 ms.
    """

    acquire: Callable[[int], Awaitable[object]]
    weights: bool = True
    queue: bool = True


Maker = Callable[[], Awaitable[Limiter]]


async def ours() -> Limiter:
    """Ours."""
    return Limiter(TokenBucket(RATE, CAPACITY).acquire)


async def aiolimiter() -> Limiter:
    """aiolimiter: a leaky bucket as a meter, which is a token bucket seen from the other side."""
    from aiolimiter import AsyncLimiter

    return Limiter(AsyncLimiter(CAPACITY, CAPACITY / RATE).acquire)


async def pyrate() -> Limiter:
    """pyrate-limiter as it is shown first: a log of the last second."""
    from pyrate_limiter import Duration, Rate
    from pyrate_limiter import Limiter as Other

    limiter = Other(Rate(RATE, Duration.SECOND))
    return Limiter(lambda n: limiter.try_acquire_async("probe", weight=n))


async def pyrate_bucket() -> Limiter:
    """pyrate-limiter's token bucket."""
    from pyrate_limiter import Duration, Rate, StateBucket
    from pyrate_limiter import Limiter as Other
    from pyrate_limiter import TokenBucket as Algorithm

    rate = Rate(RATE, Duration.SECOND, burst=CAPACITY)
    limiter = Other(StateBucket([rate], algorithm=Algorithm()))
    return Limiter(lambda n: limiter.try_acquire_async("probe", weight=n))


async def throttled(using: str = "token_bucket") -> Limiter:
    """throttled-py, which is told how long it may wait."""
    from throttled.asyncio import MemoryStore, Throttled, per_sec

    limiter = Throttled(
        key="probe",
        using=using,
        quota=per_sec(RATE, burst=CAPACITY),
        timeout=LONG,
        store=MemoryStore(),
    )

    async def acquire(n: int) -> bool:
        return not (await limiter.limit(cost=n)).limited

    return Limiter(acquire)


async def throttled_gcra() -> Limiter:
    """throttled-py's other algorithm."""
    return await throttled("gcra")


async def nopanic() -> Limiter:
    """nopanic as a block."""
    from nopanic import rate_limit

    limiter = rate_limit(RATE, per=1.0, burst=CAPACITY)

    async def acquire(_: int) -> None:
        async with limiter.guard():
            pass

    return Limiter(acquire, weights=False)


async def hyx() -> Limiter:
    """hyx as a block, which refuses instead of waiting."""
    from hyx.ratelimit import tokenbucket
    from hyx.ratelimit.exceptions import RateLimitExceeded

    bucket = tokenbucket(max_executions=RATE, per_time_secs=1, bucket_size=CAPACITY)

    async def acquire(_: int) -> None:
        while True:
            with contextlib.suppress(RateLimitExceeded):
                async with bucket:
                    return
            await asyncio.sleep(0.01)

    return Limiter(acquire, weights=False, queue=False)


async def take(limiter: Limiter, n: int = 1) -> float:
    """Wait for tokens, and return when they came."""
    if n > 1 and not limiter.weights:
        raise Unavailable("one token a call")
    await limiter.acquire(n)
    return asyncio.get_running_loop().time()


async def many(limiter: Limiter, calls: int) -> list[float]:
    """Ask for so many tokens at once, and return when they came."""
    return await asyncio.gather(*(take(limiter) for _ in range(calls)))


async def emptied(make: Maker) -> Limiter:
    """Make a limiter that waits, and take what it has."""
    limiter = await make()
    if not limiter.queue:
        raise Unavailable("never waits")
    await many(limiter, CAPACITY)
    return limiter


async def forty(make: Maker) -> Finding:
    """Take 40 tokens as fast as they come."""
    limiter = await make()
    begin = asyncio.get_running_loop().time()
    took = max(await many(limiter, 40)) - begin
    return Finding(f"{took:.1f} s", 2.9 <= took <= 3.3)


async def window(make: Maker) -> Finding:
    """Take 40 tokens, do nothing for 2 s, take 40 more."""
    limiter = await make()
    times = await many(limiter, 40)
    await asyncio.sleep(2)
    times += await many(limiter, 40)
    return count(most_in_a_second(times), CAPACITY + RATE)


async def next_wait(make: Maker, cancelled: int) -> float:
    """Return how long one waits behind so many who wait and are cancelled."""
    await asyncio.sleep(1 - time.time() % 1)  # some count whole seconds of the wall clock
    limiter = await emptied(make)
    ahead = [start(take(limiter)) for _ in range(cancelled)]
    await asyncio.sleep(0)
    last = start(take(limiter))
    await asyncio.sleep(0.02)
    begin = asyncio.get_running_loop().time()
    await stop(*ahead)
    return await last - begin


async def cancelled_ahead(make: Maker) -> Finding:
    """Cancel the 10 that wait ahead of one."""
    waited, alone = await next_wait(make, 10), await next_wait(make, 0)
    return Finding(f"{waited:.1f} s, {alone:.1f} s", waited <= alone + SLACK)


async def cancelled_crowd(make: Maker) -> Finding:
    """Cancel 50 that wait, and then come."""
    await asyncio.sleep(1 - time.time() % 1)
    limiter = await emptied(make)
    crowd = [start(take(limiter)) for _ in range(50)]
    await asyncio.sleep(0.02)
    await stop(*crowd)
    begin = asyncio.get_running_loop().time()
    waited = await take(limiter) - begin
    alone = await next_wait(make, 0)
    return Finding(f"{waited:.1f} s, {alone:.1f} s", waited <= alone + SLACK)


async def heavy(make: Maker) -> Finding:
    """Ask for 8 tokens while five others never stop asking for one."""
    limiter = await emptied(make)

    async def light() -> None:
        while True:
            await take(limiter)

    loops = [start(light()) for _ in range(5)]
    await asyncio.sleep(0.02)
    begin = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(6):
            took = await take(limiter, 8) - begin
    except TimeoutError:
        return Finding("not within 6 s", False)
    finally:
        await stop(*loops)
    return seconds(took, 2.6)


async def over_capacity(make: Maker) -> Finding:
    """Ask for three times what the bucket holds."""
    limiter = await make()
    if not limiter.weights:
        raise Unavailable("one token a call")
    loop = asyncio.get_running_loop()
    begin = loop.time()
    try:
        async with asyncio.timeout(5) as limit:
            granted = await limiter.acquire(3 * CAPACITY) is not False
    except Exception as error:
        if limit.expired():
            return Finding(HANGS, False)
        if not isinstance(error, ValueError):
            raise
        granted = False
    if granted:
        return Finding("granted", False)
    took = loop.time() - begin
    return word(AT_ONCE, AT_ONCE if took < 0.1 else f"refused after {took:.1f} s")


CANDIDATES = [
    Candidate(OURS, ours, OURS),
    Candidate("aiolimiter", aiolimiter, "aiolimiter"),
    Candidate("hyx", hyx, "hyx"),
    Candidate("nopanic", nopanic, "nopanic"),
    Candidate("pyrate-limiter", pyrate, "pyrate-limiter"),
    Candidate("pyrate-limiter (TokenBucket)", pyrate_bucket, "pyrate-limiter"),
    Candidate("throttled-py", throttled, "throttled-py"),
    Candidate("throttled-py (GCRA)", throttled_gcra, "throttled-py"),
]
PROBES = [
    Probe(
        forty,
        zh="一次要 40 个令牌：多久拿完？",
        zh_rule="3.0 秒上下（2.9 到 3.3），10 个现成，30 个按每秒 10 个",
        en="40 tokens at once: how long until all have come?",
        en_rule="about 3.0 s (2.9 to 3.3); 10 are there, 30 come at 10 a second",
    ),
    Probe(
        window,
        zh="要 40 个，歇 2 秒，再要 40 个：任意一秒之内最多放行几个？",
        zh_rule="至多 20，即容量加上一秒的速率",
        en="40 tokens, 2 s of rest, 40 more: how many come within any one second?",
        en_rule="at most 20, the capacity and the rate of one second",
    ),
    Probe(
        cancelled_crowd,
        zh="50 个等待者都取消了：下一个等多久？没有过他们的话呢？",
        zh_rule="一样久（放宽 0.15 秒），取消了的不占令牌",
        en="50 waiters are cancelled: how long does the next wait, and how long without them?",
        en_rule="the same (give or take 0.15 s); whoever was cancelled has taken nothing",
    ),
    Probe(
        cancelled_ahead,
        zh="前面的 10 个等待者都取消了：已经在排队的那一个还要等多久？没有过他们的话呢？",
        zh_rule="一样久（放宽 0.15 秒），后面的马上前移",
        en="The ten ahead are cancelled: how long does the next wait, and how long without them?",
        en_rule="the same (give or take 0.15 s); those behind move up at once",
    ),
    Probe(
        heavy,
        zh="5 个任务不停地各取 1 个，有一个要 8 个：它等多久？",
        zh_rule="至多 2.6 秒；按次序只需 1.3 秒",
        en="Five tasks take one token again and again, one asks for 8: how long does it wait?",
        en_rule="at most 2.6 s; in turn it takes 1.3 s",
    ),
    Probe(
        over_capacity,
        zh="一次要容量的 3 倍：怎么样？",
        zh_rule="立即拒绝，这么多令牌永远等不到",
        en="Three times the capacity at once: what happens?",
        en_rule="refused at once; so many tokens will never be there",
    ),
]
