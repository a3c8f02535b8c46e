"""Compose: five policies as one, compared with the sum of the five alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.harness import OURS, Candidate, Case, awaits, noop
from concurrency_patterns import (
    CircuitBreaker,
    ConcurrencyLimiter,
    Fixed,
    Retry,
    Timeout,
    TokenBucket,
)
from concurrency_patterns.compose import compose

if TYPE_CHECKING:
    from benchmarks.harness import Measure

ENOUGH = 1_000_000_000


def five() -> list[Any]:
    """Make five policies, in the default order."""
    return [
        Retry(on=ConnectionError, backoff=Fixed(0)),
        CircuitBreaker(),
        ConcurrencyLimiter(10),
        TokenBucket(ENOUGH, ENOUGH),
        Timeout(60),
    ]


def sum_of_parts() -> Measure:
    """One bare call, and what each of the five adds to it when it is alone."""
    bare = awaits(noop)
    parts = [awaits(lambda policy=policy: policy.call(noop)) for policy in five()]

    def run(number: int) -> float:
        alone = bare(number)
        return alone + sum(part(number) - alone for part in parts)

    return run


def ours_decorator() -> Measure:
    """Ours as a decorator."""
    return awaits(compose(*five())(noop))


def ours_call() -> Measure:
    """Ours without a decorator."""
    policy = compose(*five())
    return awaits(lambda: policy.call(noop))


def nested() -> Measure:
    """Five decorators of ours, one upon the other."""
    fn: Any = noop
    for policy in reversed(five()):
        fn = policy(fn)
    return awaits(fn)


def nopanic() -> Measure:
    """nopanic's five."""
    from nopanic import backoff, bulkhead, circuit_breaker, compose, rate_limit, retry, timeout

    return awaits(
        compose(
            retry(on=ConnectionError, backoff=backoff.fixed(0)),
            circuit_breaker(),
            bulkhead(10),
            rate_limit(ENOUGH, per=1.0, burst=ENOUGH),
            timeout(60),
        )(noop)
    )


CASES = [
    Case(
        key="five",
        zh="重试、熔断器、并发限制、令牌桶、超时，一次成功",
        en="Retry, circuit breaker, concurrency limiter, token bucket, timeout; success at once",
        candidates=[
            Candidate("(sum of the parts)", sum_of_parts, OURS),
            Candidate("@compose", ours_decorator, OURS, at_most=1.3),
            Candidate("compose.call", ours_call, OURS, at_most=1.3),
            Candidate("(five decorators by hand)", nested, OURS),
            Candidate("await noop()", lambda: awaits(noop)),
            Candidate("nopanic.compose", nopanic, "nopanic"),
        ],
    ),
]
