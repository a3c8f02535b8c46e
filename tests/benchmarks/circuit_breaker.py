"""Circuit breaker: what a call costs while it is closed, and what a refusal costs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from benchmarks.harness import (
    OURS,
    Candidate,
    Case,
    Unavailable,
    awaits,
    calls,
    generic,
    noop,
    plain_noop,
)
from concurrency_patterns import CircuitBreaker
from concurrency_patterns.circuit_breaker import FailureRate

if TYPE_CHECKING:
    from benchmarks.harness import Maker, Measure

# A breaker that stays open for an hour, and a way to guard a function with it.
Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
HOUR = 3600


def ours() -> Wrapper:
    """Ours, which counts failures in a row."""
    return CircuitBreaker(failures=5, open_for=HOUR)


def ours_window() -> Wrapper:
    """Ours with a failure rate over the last 100 calls."""
    return CircuitBreaker(trip=FailureRate(0.5, window=100, least=10), open_for=HOUR)


def aiobreaker() -> Wrapper:
    """aiobreaker."""
    from aiobreaker import CircuitBreaker as Other

    return Other(fail_max=5, timeout_duration=timedelta(seconds=HOUR))


def circuitbreaker() -> Wrapper:
    """circuitbreaker."""
    from circuitbreaker import circuit

    return circuit(failure_threshold=5, recovery_timeout=HOUR)


def pybreaker() -> Wrapper:
    """pybreaker, for plain functions."""
    from pybreaker import CircuitBreaker as Other

    return Other(fail_max=5, reset_timeout=HOUR)


async def purgatory() -> Wrapper:
    """purgatory as a decorator, which looks its breaker up by name at each call."""
    from purgatory import AsyncCircuitBreakerFactory

    factory = AsyncCircuitBreakerFactory(default_threshold=5, default_ttl=HOUR)
    wrapper: Wrapper = factory("benchmark")
    return wrapper


async def purgatory_held() -> Wrapper:
    """purgatory with a breaker that is held."""
    from purgatory import AsyncCircuitBreakerFactory

    factory = AsyncCircuitBreakerFactory(default_threshold=5, default_ttl=HOUR)
    breaker = await factory.get_breaker("benchmark")

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        async def call() -> Any:
            async with breaker:
                return await fn()

        return call

    return wrap


def purgatory_sync() -> Wrapper:
    """purgatory with a breaker that is held, for plain functions."""
    from purgatory import SyncCircuitBreakerFactory

    breaker = SyncCircuitBreakerFactory(default_threshold=5, default_ttl=HOUR).get_breaker("b")

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call() -> Any:
            with breaker:
                return fn()

        return call

    return wrap


async def hyx() -> Wrapper:
    """hyx, for asynchronous functions."""
    from hyx.circuitbreaker import consecutive_breaker

    return consecutive_breaker(
        exceptions=Exception, failure_threshold=5, recovery_time_secs=HOUR, recovery_threshold=3
    )


def nopanic() -> Wrapper:
    """nopanic: a failure rate over a window of time."""
    from nopanic import circuit_breaker

    return circuit_breaker(failure_threshold=0.5, min_calls=10, reset_timeout=HOUR)


def interlock() -> Wrapper:
    """interlock: a failure rate over the last 100 calls."""
    from interlock import CircuitBreaker as Other
    from interlock import Config

    config = Config(
        failure_rate_threshold=0.5,
        minimum_number_of_calls=10,
        window_size=100,
        wait_duration_in_open=HOUR,
    )
    return Other(name="benchmark", config=config)


def redress() -> Wrapper:
    """redress: a policy with nothing but a breaker."""
    from redress import AsyncPolicy
    from redress import CircuitBreaker as Other

    policy = AsyncPolicy(circuit_breaker=redress_breaker(Other))
    return lambda fn: lambda: policy.call(fn)


def redress_sync() -> Wrapper:
    """redress for plain functions."""
    from redress import CircuitBreaker as Other
    from redress import Policy

    policy = Policy(circuit_breaker=redress_breaker(Other))
    return lambda fn: lambda: policy.call(fn)


def redress_breaker(kind: Any) -> Any:
    """Make the breaker of redress so that it opens whatever fails."""
    from redress import ErrorClass

    return kind(failure_threshold=5, recovery_timeout_s=HOUR, trip_on=set(ErrorClass))


Source = Callable[[], Any]  # a wrapper, or what can be awaited for it
BOTH: list[tuple[str, Source, str]] = [
    ("circuitbreaker.circuit", circuitbreaker, "circuitbreaker"),
    ("nopanic.circuit_breaker", nopanic, "nopanic"),
    ("aiobreaker.CircuitBreaker", aiobreaker, "aiobreaker"),
    ("interlock.CircuitBreaker", interlock, "interlock-cb"),
]
PEERS: list[tuple[str, Source, str]] = [
    ("purgatory async with", purgatory_held, "purgatory"),
    ("purgatory decorator", purgatory, "purgatory"),
    ("hyx consecutive_breaker", hyx, "hyx"),
    *BOTH,
    ("redress.AsyncPolicy", redress, "redress"),
]
SYNC_PEERS: list[tuple[str, Source, str]] = [
    ("purgatory with", purgatory_sync, "purgatory"),
    *BOTH,
    ("pybreaker.CircuitBreaker", pybreaker, "pybreaker"),
    ("redress.Policy", redress_sync, "redress"),
]


async def failing() -> None:
    """Fail."""
    raise ConnectionError


def plain_failing() -> None:
    """Fail."""
    raise ConnectionError


async def made(source: Source) -> Wrapper:
    """Make a breaker."""
    wrapper = source()
    if not callable(wrapper):
        wrapper = await wrapper
    result: Wrapper = wrapper
    return result


def closed(source: Source) -> Maker:
    """Call through a closed breaker."""

    async def make() -> Measure:
        return awaits((await made(source))(noop))

    return make


def closed_sync(source: Source) -> Maker:
    """Call a plain function through a closed breaker."""
    return lambda: calls(source()(plain_noop))


def caught(call: Callable[[], Any]) -> Callable[[], Any]:
    """Catch what the call raises, as a caller has to."""

    async def guarded() -> None:
        try:  # noqa: SIM105 -- suppress() would cost more than what is measured
            await call()
        except Exception:  # noqa: BLE001, S110 -- the refusal of any library
            pass

    return guarded


def plain_caught(call: Callable[[], Any]) -> Callable[[], Any]:
    """Catch what the call raises, as a caller has to."""

    def guarded() -> None:
        try:  # noqa: SIM105 -- suppress() would cost more than what is measured
            call()
        except Exception:  # noqa: BLE001, S110 -- the refusal of any library
            pass

    return guarded


class Counted:
    """A service that fails, and knows how often it was called."""

    def __init__(self) -> None:
        self.called = 0

    def plain(self) -> None:
        """Fail."""
        self.called += 1
        raise ConnectionError

    def check_open(self) -> None:
        """Refuse to measure a breaker that did not open."""
        if self.called >= 20:
            raise Unavailable("did not open")


def refusal(source: Source) -> Maker:
    """Be refused by an open breaker."""

    async def make() -> Measure:
        service = Counted()

        async def call() -> None:
            service.plain()

        guarded = caught((await made(source))(call))
        for _ in range(20):
            await guarded()
        service.check_open()
        return awaits(guarded)

    return make


def refusal_sync(source: Source) -> Maker:
    """Be refused by an open breaker in front of a plain function."""

    def make() -> Measure:
        service = Counted()

        def call() -> None:
            service.plain()

        guarded = plain_caught(source()(call))
        for _ in range(20):
            guarded()
        service.check_open()
        return calls(guarded)

    return make


def ours_call() -> Measure:
    """Ours without a decorator."""
    breaker = CircuitBreaker()
    return awaits(lambda: breaker.call(noop))


def ours_block() -> Measure:
    """Ours as a block."""
    breaker = CircuitBreaker()

    async def call() -> None:
        async with breaker:
            await noop()

    return awaits(call)


CASES = [
    Case(
        key="closed",
        zh="async def，关闭状态，成功",
        en="async def, closed, success",
        candidates=[
            Candidate("await noop()", lambda: awaits(noop)),
            Candidate("@CircuitBreaker", closed(ours), OURS, at_most=4),
            Candidate("@CircuitBreaker(trip=FailureRate)", closed(ours_window), OURS, at_most=4),
            Candidate("CircuitBreaker.call", ours_call, OURS),
            Candidate("async with CircuitBreaker", ours_block, OURS),
            Candidate("(decorator that does nothing)", lambda: awaits(generic(noop))),
            *(Candidate(name, closed(peer), package) for name, peer, package in PEERS),
        ],
    ),
    Case(
        key="open",
        zh="async def，打开状态：拒绝一次",
        en="async def, open: one refusal",
        candidates=[
            Candidate("(bare raise)", lambda: awaits(caught(failing))),
            Candidate("@CircuitBreaker", refusal(ours), OURS, at_most=3),
            Candidate("@CircuitBreaker(trip=FailureRate)", refusal(ours_window), OURS),
            *(Candidate(name, refusal(peer), package) for name, peer, package in PEERS),
        ],
        quick=30,
    ),
    Case(
        key="closed_sync",
        zh="def，关闭状态，成功；供多线程使用",
        en="def, closed, success; safe for threads",
        candidates=[
            Candidate("noop()", lambda: calls(plain_noop)),
            Candidate("@CircuitBreaker", closed_sync(ours), OURS, at_most=12),
            Candidate(
                "@CircuitBreaker(trip=FailureRate)", closed_sync(ours_window), OURS, at_most=12
            ),
            *(Candidate(name, closed_sync(peer), package) for name, peer, package in SYNC_PEERS),
        ],
    ),
    Case(
        key="open_sync",
        zh="def，打开状态：拒绝一次",
        en="def, open: one refusal",
        candidates=[
            Candidate("(bare raise)", lambda: calls(plain_caught(plain_failing))),
            Candidate("@CircuitBreaker", refusal_sync(ours), OURS),
            *(Candidate(name, refusal_sync(peer), package) for name, peer, package in SYNC_PEERS),
        ],
        quick=30,
    ),
]
