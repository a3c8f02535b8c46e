"""Composition: what several policies around one call do to each other."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

from concurrency_patterns import (
    CircuitBreaker,
    ConcurrencyLimiter,
    Fallback,
    Retry,
    Timeout,
    TokenBucket,
    compose,
    constant,
)
from probes.harness import (
    OURS,
    Candidate,
    Finding,
    Probe,
    Service,
    Unavailable,
    count,
    most_in_a_second,
    raised_by,
    reaches,
    seconds,
    shim,
    start,
    word,
)

LONG = 60.0
OPEN_FOR = 2.0
FAILURES = 3
SILENT, WARNS = "no warning", "a warning"

Fn = Callable[[], Awaitable[Any]]


class Kit:
    """What a library has for composing; what it does not name, it does not offer."""

    def lack(self, *_: object, **__: object) -> Any:
        """Say that it is not offered."""
        raise Unavailable("not offered")

    retry = breaker = slots = bucket = timeout = fallback = lack
    warns = False  # whether it has one place where it sees the whole order

    def guard(self, fn: Fn, *policies: Any) -> Fn:
        """Put policies around whatever can be called and awaited, the first one outermost."""
        return self.around(shim(fn), *policies)

    def around(self, fn: Fn, *policies: Any) -> Fn:
        """Stack decorators."""
        wrapped: Any = fn
        for policy in reversed(policies):
            wrapped = policy(wrapped)
        called: Fn = wrapped
        return called


class Ours(Kit):
    """Ours."""

    warns = True

    def retry(self) -> Any:
        """Three attempts."""
        return Retry(on=Exception)

    def breaker(self) -> Any:
        """Open after three failures."""
        return CircuitBreaker(failures=FAILURES, open_for=OPEN_FOR)

    def slots(self, limit: int, *, wait: bool) -> Any:
        """So many at once."""
        return ConcurrencyLimiter(limit, max_queue=None if wait else 0)

    def bucket(self, rate: float, capacity: int) -> Any:
        """So many a second."""
        return TokenBucket(rate, capacity)

    def timeout(self) -> Any:
        """A second."""
        return Timeout(1.0)

    def fallback(self) -> Any:
        """A constant."""
        return Fallback(constant("cached"))

    def around(self, fn: Fn, *policies: Any) -> Fn:
        """Compose."""
        composed: Fn = compose(*policies)(fn)
        return composed


class NoPanic(Kit):
    """nopanic."""

    warns = True

    def retry(self) -> Any:
        """Three attempts."""
        from nopanic import retry

        return retry()

    def breaker(self) -> Any:
        """Open when three calls of three have failed."""
        from nopanic import circuit_breaker

        return circuit_breaker(failure_threshold=1.0, min_calls=FAILURES, reset_timeout=OPEN_FOR)

    def slots(self, limit: int, *, wait: bool) -> Any:
        """So many at once."""
        from nopanic import bulkhead

        return bulkhead(limit, max_wait=None if wait else 0)

    def bucket(self, rate: float, capacity: int) -> Any:
        """So many a second."""
        from nopanic import rate_limit

        return rate_limit(rate, per=1.0, burst=capacity)

    def timeout(self) -> Any:
        """A second."""
        from nopanic import timeout

        return timeout(1.0)

    def fallback(self) -> Any:
        """A constant."""
        from nopanic import fallback

        return fallback("cached")

    def around(self, fn: Fn, *policies: Any) -> Fn:
        """Compose."""
        from nopanic import compose as other

        composed: Fn = other(*policies)(fn)
        return composed


class Interlock(Kit):
    """interlock's pipeline; its retry needs tenacity."""

    warns = True

    def retry(self) -> Any:
        """Three attempts."""
        from interlock.integrations.tenacity import RetryStrategy

        return RetryStrategy()

    def breaker(self) -> Any:
        """Open when three calls of three have failed."""
        from interlock import BulkheadFullError, Config
        from interlock import CircuitBreaker as Other
        from interlock.pipeline import CircuitBreakerStrategy

        config = Config(
            failure_rate_threshold=1.0,
            minimum_number_of_calls=FAILURES,
            wait_duration_in_open=OPEN_FOR,
        )
        breaker = Other(name="probe", config=config, unreachable_exceptions=(BulkheadFullError,))
        return CircuitBreakerStrategy(breaker)

    def slots(self, limit: int, *, wait: bool) -> Any:
        """So many at once."""
        from interlock.pipeline import BulkheadStrategy

        return BulkheadStrategy(limit, max_wait=LONG if wait else 0)

    def timeout(self) -> Any:
        """A second."""
        from interlock.pipeline import TimeoutStrategy

        return TimeoutStrategy(1.0)

    def fallback(self) -> Any:
        """A constant."""
        from interlock.pipeline import FallbackStrategy

        return FallbackStrategy(lambda _: "cached")

    def around(self, fn: Fn, *policies: Any) -> Fn:
        """Compose."""
        from interlock import Pipeline

        composed: Fn = Pipeline(*policies)(fn)
        return composed


class Hyx(Kit):
    """hyx, whose decorators are stacked by hand."""

    def retry(self) -> Any:
        """Its defaults."""
        from hyx.retry import retry

        return retry()

    def breaker(self) -> Any:
        """Open after three failures."""
        from hyx.circuitbreaker import consecutive_breaker

        return consecutive_breaker(failure_threshold=FAILURES, recovery_time_secs=OPEN_FOR)

    def slots(self, limit: int, *, wait: bool) -> Any:
        """So many at once."""
        from hyx.bulkhead import bulkhead

        return bulkhead(limit, 1000 if wait else limit)

    def bucket(self, rate: float, capacity: int) -> Any:
        """So many a second."""
        from hyx.ratelimit import tokenbucket

        return tokenbucket(max_executions=rate, per_time_secs=1, bucket_size=capacity)

    def timeout(self) -> Any:
        """A second."""
        from hyx.timeout import timeout

        return timeout(1.0)


class Redress(Kit):
    """redress: one policy of a breaker around a retry."""

    def around(self, fn: Fn, *_: Any) -> Fn:
        """Put its policy around the function."""
        return lambda: self.policy.call(fn)

    def retry(self) -> Any:
        """Three attempts, its own waits."""
        from redress import AsyncPolicy, AsyncRetry, ErrorClass, default_classifier
        from redress import CircuitBreaker as Other
        from redress.strategies import decorrelated_jitter

        self.policy = AsyncPolicy(
            retry=AsyncRetry(
                classifier=default_classifier, strategy=decorrelated_jitter(), max_attempts=3
            ),
            circuit_breaker=Other(
                failure_threshold=FAILURES, recovery_timeout_s=OPEN_FOR, trip_on=set(ErrorClass)
            ),
        )

    def breaker(self) -> Any:
        """It is in the policy."""

    def timeout(self) -> Any:
        """A second for an attempt."""
        from redress import AsyncPolicy, AsyncRetry, default_classifier
        from redress.strategies import decorrelated_jitter

        self.policy = AsyncPolicy(
            retry=AsyncRetry(
                classifier=default_classifier,
                strategy=decorrelated_jitter(),
                attempt_timeout_s=1.0,
                max_attempts=1,
            )
        )


async def rate_after_stall(make: type[Kit]) -> Finding:
    """Send 50 calls to a service that stalls for 2 s: five slots, ten tokens a second."""
    kit = make()
    loop = asyncio.get_running_loop()
    begin = loop.time()
    starts: list[float] = []

    async def service() -> None:
        starts.append(loop.time())
        await asyncio.sleep(2.0 if loop.time() - begin < 1.9 else 0.01)

    call = kit.guard(service, kit.slots(5, wait=True), kit.bucket(10, 1))
    results = await asyncio.gather(*(call() for _ in range(50)), return_exceptions=True)
    if any(isinstance(result, Exception) for result in results):
        raise Unavailable("never waits")
    return count(most_in_a_second(starts), 11)


async def open_breaker(make: type[Kit]) -> Finding:
    """Call through a retry around a circuit that has just opened; each with its defaults."""
    kit = make()
    retry, breaker = kit.retry(), kit.breaker()
    for _ in range(FAILURES):
        await reaches(lambda service: kit.guard(service, breaker)(), Service(works=False))
    loop = asyncio.get_running_loop()
    begin = loop.time()
    await reaches(lambda service: kit.guard(service, retry, breaker)())
    return seconds(loop.time() - begin, 0.1)


async def full_bulkhead(make: type[Kit]) -> Finding:
    """Refuse five calls for want of a slot, inside a breaker; the service is well."""
    kit = make()
    service, policies = Service(takes=0.2), (kit.breaker(), kit.slots(1, wait=False))
    call = kit.guard(service, *policies)
    slow = start(hold(call))
    await asyncio.sleep(0.05)
    refused = await asyncio.gather(*(call() for _ in range(5)), return_exceptions=True)
    if not all(isinstance(result, Exception) for result in refused):
        raise AssertionError("nobody was refused")
    await slow
    closed = await reaches(lambda service: kit.guard(service, *policies)())
    return word("stays closed", "stays closed" if closed else "opens the circuit")


async def hold(call: Fn) -> Any:
    """Call, as a coroutine."""
    return await call()


async def own_exception(make: type[Kit]) -> Finding:
    """Let the last attempt of a retry open the circuit, and look at what the caller gets."""
    kit, service = make(), Service(works=False)
    retry, breaker = kit.retry(), kit.breaker()
    seen = await raised_by(kit.guard(service, retry, breaker), service)
    if await reaches(lambda service: kit.guard(service, breaker)()):
        raise Unavailable("not in this order")  # the breaker is outside and saw one failure
    return word("the service's", seen)


async def own_timeout(make: type[Kit]) -> Finding:
    """Raise a TimeoutError of the service's own inside a timeout that is far from over."""
    kit, service = make(), Service(works=False)
    service.error = TimeoutError("the service's own")
    return word("the service's", await raised_by(kit.guard(service, kit.timeout()), service))


async def token_per_attempt(make: type[Kit]) -> Finding:
    """Let three attempts fail that share a bucket of three tokens, and see if one is left."""
    kit, service = make(), Service(works=False)
    bucket = kit.bucket(0.2, 3)
    await reaches(lambda service: kit.guard(service, kit.retry(), bucket)(), service)
    if service.called < 3:
        raise AssertionError(f"{service.called} attempts")
    begin = asyncio.get_running_loop().time()
    served = await reaches(lambda service: kit.guard(service, bucket)())
    waited = asyncio.get_running_loop().time() - begin > 1
    paid = "one token an attempt"
    return word(paid, paid if waited or not served else "one token a call")


def says(kit: Kit, *policies: Any) -> Finding:
    """Compose, and listen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kit.guard(Service(), *policies)
    heard = any(issubclass(warning.category, UserWarning) for warning in caught)
    return word(WARNS, WARNS if heard else SILENT)


def listening(make: type[Kit]) -> Kit:
    """Make a kit, if it sees the whole order at all."""
    kit = make()
    if not kit.warns:
        raise Unavailable("not offered")
    return kit


async def token_before_slot(make: type[Kit]) -> Finding:
    """Put the bucket outside of the slots."""
    kit = listening(make)
    return says(kit, kit.bucket(10, 1), kit.slots(5, wait=True))


async def fallback_in_retry(make: type[Kit]) -> Finding:
    """Put a fallback inside a retry."""
    kit = listening(make)
    return says(kit, kit.retry(), kit.fallback())


async def retry_in_retry(make: type[Kit]) -> Finding:
    """Put a retry inside a retry."""
    kit = listening(make)
    return says(kit, kit.retry(), kit.retry())


CANDIDATES = [
    Candidate(OURS, Ours, OURS),
    Candidate("hyx", Hyx, "hyx"),
    Candidate("interlock-cb", Interlock, "interlock-cb"),
    Candidate("nopanic", NoPanic, "nopanic"),
    Candidate("redress", Redress, "redress"),
]
PROBES = [
    Probe(
        rate_after_stall,
        zh="先占名额，再取令牌（每秒 10 个，容量 1），服务卡住 2 秒后：一秒之内最多开始几个调用？",
        zh_rule="至多 11，即容量加上一秒的速率",
        en="Slot first, then token (10 a second, capacity 1), after a stall of 2 s: how many calls "
        "start within one second?",
        en_rule="at most 11, the capacity and the rate of one second",
    ),
    Probe(
        token_before_slot,
        zh="令牌桶放在并发限制外面，卡住之后会超速：组合时会说吗？",
        zh_rule="会，给出警告",
        en="The bucket outside of the slots, so that a stall breaks the rate: is there a warning?",
        en_rule="yes",
    ),
    Probe(
        fallback_in_retry,
        zh="降级放在重试里面，重试就不起作用了：组合时会说吗？",
        zh_rule="会，给出警告",
        en="A fallback inside a retry, which then never retries: is there a warning?",
        en_rule="yes",
    ),
    Probe(
        retry_in_retry,
        zh="重试里面又有重试，次数相乘：组合时会说吗？",
        zh_rule="会，给出警告",
        en="A retry inside a retry, whose attempts multiply: is there a warning?",
        en_rule="yes",
    ),
    Probe(
        open_breaker,
        zh="重试（默认设置，重试任何 Exception）包着刚打开的熔断器（打开 2 秒）：多久被拒绝？",
        zh_rule="至多 0.1 秒，等下去只占着调用方",
        en="A retry (defaults of each, any Exception) around a breaker that has just opened for "
        "2 s: how long until the caller is refused?",
        en_rule="at most 0.1 s; waiting only holds the caller",
    ),
    Probe(
        own_exception,
        zh="重试的最后一次使熔断器打开：调用方看到谁的异常？",
        zh_rule="服务的，原来那一个",
        en="The last attempt of a retry opens the breaker: whose exception does the caller see?",
        en_rule="the service's own, the same instance",
    ),
    Probe(
        full_bulkhead,
        zh="统计任何 Exception 的熔断器（默认）里面，名额满了，拒绝 5 个调用，服务没事：它会怎样？",
        zh_rule="仍然关闭，这是自己的限制，不是服务的失败",
        en="Five calls are refused for want of a slot inside a breaker that counts any Exception, "
        "as by default; the service is well: what does the breaker do?",
        en_rule="stays closed; it was our own limit, and no failure of the service",
    ),
    Probe(
        own_timeout,
        zh="服务自己抛出 TimeoutError，外面的超时还早：调用方看到谁的异常？",
        zh_rule="服务的，原来那一个",
        en="The service raises a TimeoutError of its own, the timeout around it is far from over: "
        "whose exception does the caller see?",
        en_rule="the service's own, the same instance",
    ),
    Probe(
        token_per_attempt,
        zh="令牌桶在重试里面，3 次都失败：用掉几个令牌？",
        zh_rule="每次尝试一个，每次都是对服务的一次调用",
        en="A bucket inside a retry, three attempts fail: how many tokens does that take?",
        en_rule="one an attempt; each is a call of the service",
    ),
]
