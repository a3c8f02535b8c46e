"""Several policies act as one, and a harmful order is warned of."""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from concurrency_patterns.circuit_breaker import CircuitBreaker, CircuitState
from concurrency_patterns.compose import Composition, OrderWarning, compose, standard
from concurrency_patterns.concurrency_limiter import ConcurrencyLimiter
from concurrency_patterns.errors import (
    CircuitOpen,
    ConcurrencyLimitExceeded,
    DeadlineExceeded,
    LocalRejection,
)
from concurrency_patterns.fallback import Fallback, Hedge, StaleCache, constant
from concurrency_patterns.retry import Fixed, Retry
from concurrency_patterns.testing import explore_cancellation, run_virtual
from concurrency_patterns.timeout import Timeout
from concurrency_patterns.token_bucket import TokenBucket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Noted:
    """A policy that notes when it is entered and left."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    async def call(self, fn: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any) -> Any:
        """Call and note."""
        self.log.append(f"{self.name} in")
        try:
            return await fn(*args, **kwargs)
        finally:
            self.log.append(f"{self.name} out")


class Service:
    """A service that fails so many times and then works."""

    def __init__(self, failures: int = 0, takes: float = 0.0) -> None:
        self.failures, self.takes = failures, takes
        self.called = 0

    async def __call__(self, *args: object) -> object:
        """Answer or fail."""
        self.called += 1
        if self.takes:
            await asyncio.sleep(self.takes)
        if self.called <= self.failures:
            raise ConnectionError("down")
        return args


def retry(attempts: int = 3) -> Retry:
    """Retry connection errors after half a second."""
    return Retry(on=ConnectionError, attempts=attempts, backoff=Fixed(0.5))


async def test_the_first_policy_is_the_outermost() -> None:
    """The policies are entered from the first to the last, and left in reverse."""
    log: list[str] = []
    await compose(Noted("a", log), Noted("b", log), Noted("c", log)).call(Service())
    assert log == ["a in", "b in", "c in", "c out", "b out", "a out"]


async def test_arguments_and_result_pass_through() -> None:
    """Whatever the function takes, even an argument named ``fn``, arrives."""
    log: list[str] = []

    async def echo(*args: object, **kwargs: object) -> object:
        return args, kwargs

    result = await compose(Noted("a", log), retry()).call(echo, 1, fn=2, self=3)
    assert result == ((1,), {"fn": 2, "self": 3})


async def test_decorates_async_def() -> None:
    """The decorated function keeps its name, and each call goes through all the policies."""
    log: list[str] = []

    @compose(Noted("a", log), Noted("b", log))
    async def fetch(key: str) -> str:
        return key

    assert fetch.__name__ == "fetch"
    assert [await fetch("x"), await fetch("y")] == ["x", "y"]
    assert Counter(log) == {"a in": 2, "b in": 2, "b out": 2, "a out": 2}


async def test_a_composition_may_be_part_of_another() -> None:
    """Nested compositions are one flat list of policies."""
    log: list[str] = []
    inner = compose(Noted("b", log), Noted("c", log))
    whole = compose(Noted("a", log), inner, Noted("d", log))
    await whole.call(Service())
    assert log[:4] == ["a in", "b in", "c in", "d in"]
    assert len(whole.policies) == 4


async def test_the_default_order_gives_an_answer_whatever_happens() -> None:
    """All six policies in their order: it retries, and degrades when the circuit is open."""
    breaker = CircuitBreaker(failures=3)
    pipeline = compose(
        Fallback(constant("cached")),
        Timeout(10),
        retry(),
        breaker,
        ConcurrencyLimiter(2),
        TokenBucket(rate=100, capacity=100),
        Timeout(1),
    )
    assert await pipeline.call(Service(failures=2), "answer") == ("answer",)
    assert await pipeline.call(Service(failures=9)) == "cached"
    assert breaker.state is CircuitState.OPEN
    untouched = Service()
    assert await pipeline.call(untouched) == "cached"
    assert untouched.called == 0


async def test_an_open_circuit_is_not_waited_out() -> None:
    """T31: retry around an open breaker returns at once."""
    breaker = CircuitBreaker()
    breaker.isolate()
    loop = asyncio.get_running_loop()
    start = loop.time()
    for policy in (retry(), Retry(on=Exception, attempts=5)):
        with pytest.raises(CircuitOpen):
            await compose(policy, breaker).call(Service())
    breaker = CircuitBreaker(failures=1)
    with pytest.raises(ConnectionError):
        await breaker.call(Service(failures=1))
    with pytest.raises(CircuitOpen):
        await compose(Retry(on=Exception, attempts=5), breaker).call(Service())
    assert loop.time() == start


async def test_a_full_limiter_does_not_open_the_circuit() -> None:
    """T30: what the limiter inside refuses is no failure of the service."""
    breaker, limiter = CircuitBreaker(failures=1), ConcurrencyLimiter(1, max_queue=0)
    pipeline = compose(breaker, limiter)
    results = await asyncio.gather(
        *(pipeline.call(Service(takes=1)) for _ in range(5)), return_exceptions=True
    )
    assert sum(isinstance(result, ConcurrencyLimitExceeded) for result in results) == 4
    assert breaker.state is CircuitState.CLOSED


async def test_the_call_whose_retries_open_the_circuit_raises_the_services_error() -> None:
    """T23: the last attempt that reached the service tells what happened."""
    pipeline = compose(retry(attempts=3), CircuitBreaker(failures=3))
    with pytest.raises(ConnectionError):
        await pipeline.call(Service(failures=9))


async def test_whatever_the_retry_raises_the_services_error_is_kept() -> None:
    """T23: where the circuit opens before the last attempt, what the service said is at hand."""
    pipeline = compose(retry(attempts=5), CircuitBreaker(failures=2))
    service = Service(failures=9)
    with pytest.raises((ConnectionError, CircuitOpen)) as raised:
        await pipeline.call(service)
    said = (raised.value, raised.value.__cause__, raised.value.__context__)
    assert any(isinstance(error, ConnectionError) for error in said)
    assert service.called == 2


async def test_a_service_that_hangs_opens_the_circuit_by_the_inner_timeout_only() -> None:
    """The timeout inside the breaker counts; one outside cancels, which says nothing."""
    inside, outside = CircuitBreaker(failures=2), CircuitBreaker(failures=2)
    for pipeline in (compose(inside, Timeout(1)), compose(Timeout(1), outside)):
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                await pipeline.call(Service(takes=60))
    assert (inside.state, outside.state) == (CircuitState.OPEN, CircuitState.CLOSED)


async def most_starts_in_a_second(pipeline: Composition) -> int:
    """Send 50 calls to a service that stalls for 2 s, and count what starts in any second."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    starts = []

    async def service() -> None:
        starts.append(loop.time())
        await asyncio.sleep(2.0 if loop.time() - begin < 1.9 else 0.01)

    await asyncio.gather(*(pipeline.call(service) for _ in range(50)))
    return max(sum(t <= other < t + 1 for other in starts) for t in starts)


async def test_slot_first_then_token_keeps_the_rate_after_a_stall() -> None:
    """T32: at most ``capacity + rate`` calls start in any second."""
    limiter, bucket = ConcurrencyLimiter(5), TokenBucket(rate=10, capacity=1)
    assert await most_starts_in_a_second(compose(limiter, bucket)) <= 11


async def test_token_first_then_slot_breaks_the_rate_after_a_stall() -> None:
    """T32: the warning is right: the other order starts far more calls in a second."""
    limiter, bucket = ConcurrencyLimiter(5), TokenBucket(rate=10, capacity=1)
    with pytest.warns(OrderWarning, match="put the concurrency limiter outside"):
        pipeline = compose(bucket, limiter)
    assert await most_starts_in_a_second(pipeline) > 20


async def tokens_paid(*policies: Any) -> float:
    """Return how many tokens a call with three attempts has taken."""
    bucket = TokenBucket(rate=0.001, capacity=9)
    pipeline = compose(*(bucket if policy is TokenBucket else policy for policy in policies))
    with pytest.raises(ConnectionError):
        await pipeline.call(Service(failures=9))
    return round(9 - bucket.statistics().tokens)


async def test_each_attempt_pays_a_token() -> None:
    """T32: with the retry outside each attempt pays; inside, retries are free of any limit."""
    assert await tokens_paid(retry(), TokenBucket) == 3
    with pytest.warns(OrderWarning, match="put the retry outside of the token bucket"):
        assert await tokens_paid(TokenBucket, retry()) == 1


async def test_a_retry_inside_a_limiter_keeps_its_slot_while_it_waits() -> None:
    """The warning is right: while one call waits for its next attempt, nobody else gets in."""
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def second_is_served_after(pipeline: Composition) -> float:
        start = loop.time()
        failing = asyncio.create_task(pipeline.call(Service(failures=9)))
        await asyncio.sleep(0)
        await pipeline.call(Service())
        seconds = loop.time() - start
        await asyncio.gather(failing, return_exceptions=True)
        return seconds

    assert await second_is_served_after(compose(retry(), ConcurrencyLimiter(1))) == 0
    with pytest.warns(OrderWarning, match="put the retry outside of the concurrency limiter"):
        pipeline = compose(ConcurrencyLimiter(1), retry())
    assert await second_is_served_after(pipeline) == 1
    assert loop.time() - start == 2


async def test_the_same_limiter_twice_can_wait_for_itself() -> None:
    """The warning is right: calls that hold one slot each wait for each other's for ever."""
    limiter = ConcurrencyLimiter(2)
    with pytest.warns(OrderWarning, match="the same ConcurrencyLimiter twice"):
        pipeline = compose(limiter, limiter)
    assert await pipeline.call(Service()) == ()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3600):
            await asyncio.gather(*(pipeline.call(Service(takes=1)) for _ in range(3)))


async def test_the_same_breaker_twice_never_closes_again() -> None:
    """The warning is right: each probe takes the place that it needs further in."""
    breaker = CircuitBreaker(failures=1)
    with pytest.warns(OrderWarning, match="the same CircuitBreaker twice"):
        pipeline = compose(breaker, breaker)
    with pytest.raises(ConnectionError):
        await pipeline.call(Service(failures=1))
    await asyncio.sleep(30)
    for _ in range(9):
        await asyncio.gather(pipeline.call(Service()), return_exceptions=True)
    assert breaker.state is CircuitState.HALF_OPEN


TWICE = (ConcurrencyLimiter(1), CircuitBreaker())


@pytest.mark.parametrize(
    ("policies", "cure"),
    [
        ((retry(), retry()), "keep one of them"),
        ((retry(), Timeout(1), retry()), "keep one of them"),
        ((retry(), Fallback(constant(0))), "put the fallback outside"),
        ((compose(retry()), Fallback(constant(0))), "put the fallback outside"),
        ((retry(), StaleCache(1, 1)), "put the cache outside of the retry"),
        ((CircuitBreaker(), Fallback(constant(0))), "put the fallback outside of the circuit"),
        ((CircuitBreaker(), StaleCache(1, 1)), "put the cache outside of the circuit"),
        ((Hedge(delay=1), retry()), "put the retry outside of the hedge"),
        ((TokenBucket(1, 1), ConcurrencyLimiter(1)), "put the concurrency limiter outside"),
        ((TokenBucket(1, 1), retry()), "put the retry outside of the token bucket"),
        ((ConcurrencyLimiter(1), retry()), "put the retry outside of the concurrency limiter"),
        ((TWICE[0], compose(Timeout(1), TWICE[0])), "same ConcurrencyLimiter twice: .* keep one"),
        ((TWICE[1], Timeout(1), TWICE[1]), "same CircuitBreaker twice: .* keep one"),
    ],
)
def test_a_harmful_order_is_warned_of_with_its_cure(policies: Any, cure: str) -> None:
    """The warning names both policies, the harm and the cure, and points at the caller's line."""
    with pytest.warns(OrderWarning, match=cure) as caught:
        compose(*policies)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_good_order_is_not_warned_of() -> None:
    """The default order is silent, and so is the same kind twice where it makes sense."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = compose(
            Fallback(constant(0)),
            StaleCache(1, 1),
            Timeout(9),
            retry(),
            Hedge(delay=1),
            CircuitBreaker(),
            ConcurrencyLimiter(1),
            TokenBucket(1, 1),
            Timeout(1),
        )
    assert len(pipeline.policies) == 9


def everything(**options: Any) -> Retry:
    """Retry everything, also what a policy of ours refuses."""
    return Retry(on=Exception, attempts=9, backoff=Fixed(0.1), **options)


async def seconds_with_an_open_circuit(pipeline: Composition, breaker: CircuitBreaker) -> float:
    """Open the circuit, and tell how long the next call takes."""
    with pytest.raises(ConnectionError):
        await breaker.call(Service(failures=9))
    loop = asyncio.get_running_loop()
    start = loop.time()
    await asyncio.gather(pipeline.call(Service()), return_exceptions=True)
    return loop.time() - start


@pytest.mark.parametrize(
    "around", [(everything(max_elapsed=60),), (Timeout(60), everything()), (everything(), retry())]
)
async def test_waiting_for_an_open_circuit_is_warned_of_where_it_would_happen(around: Any) -> None:
    """A retry that names the refusal and has the time waits for it; with no limit it does not."""
    breaker = CircuitBreaker(failures=1, open_for=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline = compose(*around, breaker)
    warned = any("waits for the open breaker, 5 s" in str(warning.message) for warning in caught)
    assert (await seconds_with_an_open_circuit(pipeline, breaker) >= 5) is warned
    assert warned is (len(around) == 1 or isinstance(around[0], Timeout))


@pytest.mark.parametrize(
    "around",
    [
        (retry(),),
        (everything(),),
        (everything(max_elapsed=60, never=LocalRejection),),
        (everything(max_elapsed=4),),
        (Timeout(4), everything(max_elapsed=60)),
        (Retry(on=lambda _: False, max_elapsed=60),),
    ],
)
async def test_a_retry_that_does_not_wait_for_the_circuit_is_not_warned_of(around: Any) -> None:
    """It does not name the refusal, or has not the time; and indeed it does not wait."""
    breaker = CircuitBreaker(failures=1, open_for=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = compose(*around, breaker)
    assert await seconds_with_an_open_circuit(pipeline, breaker) < 0.1


async def test_a_cache_works_within_a_composition() -> None:
    """The same function through the same policies has the same answer, called or decorated."""
    cache, service = StaleCache(ttl=60, stale_ttl=60), Service()
    pipeline = compose(cache, retry(), Timeout(1))
    for _ in range(3):
        await pipeline.call(service, "a")
    await pipeline.call(service, "b")
    assert (service.called, cache.statistics().hits) == (2, 2)


async def test_a_hedge_takes_a_slot_for_each_attempt() -> None:
    """Both attempts pass through the policies inside; the slot of the loser comes back."""
    limiter = ConcurrencyLimiter(2)
    pipeline = compose(Hedge(delay=1), limiter)
    takes = iter([60.0, 1.0])

    async def service() -> None:
        await asyncio.sleep(next(takes))

    await pipeline.call(service)
    assert (limiter.statistics().peak, limiter.statistics().in_use) == (2, 0)


def test_standard_is_the_default_order() -> None:
    """Fallback and token bucket are there only if they have something to do."""

    def kinds(pipeline: Composition) -> list[str]:
        return [type(policy).__name__ for policy in pipeline.policies]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kinds(compose(standard(constant(0), rate=100))) == [
            "Fallback",
            "Timeout",
            "Retry",
            "CircuitBreaker",
            "ConcurrencyLimiter",
            "TokenBucket",
            "Timeout",
        ]
        assert kinds(compose(standard())) == [
            "Timeout",
            "Retry",
            "CircuitBreaker",
            "ConcurrencyLimiter",
            "Timeout",
        ]


async def test_standard_serves_an_unreliable_service() -> None:
    """It retries, stops at the deadline, leaves a dead service alone, and degrades."""
    loop = asyncio.get_running_loop()
    assert await standard().call(Service(failures=2), "answer") == ("answer",)
    pipeline = standard(constant("cached"), timeout=1, deadline=2.5)
    hanging = Service(takes=60)
    start = loop.time()
    assert await pipeline.call(hanging) == "cached"
    assert loop.time() - start <= 2.5
    breaker = next(policy for policy in pipeline.policies if isinstance(policy, CircuitBreaker))
    while breaker.state is CircuitState.CLOSED:
        await pipeline.call(hanging)
    before, start = hanging.called, loop.time()
    assert await pipeline.call(hanging) == "cached"
    assert (hanging.called, loop.time()) == (before, start)


async def test_standard_does_not_wait_for_an_open_circuit() -> None:
    """T31: whatever ``on`` says, a refused call is over at once, also shortly before a probe."""
    loop = asyncio.get_running_loop()
    for pipeline, later in ((standard(on=Exception), 21), (standard(on=Exception, deadline=60), 0)):
        breaker = next(policy for policy in pipeline.policies if isinstance(policy, CircuitBreaker))
        for _ in range(5):
            with pytest.raises(ConnectionError):
                await breaker.call(Service(failures=1))
        await asyncio.sleep(later)
        start = loop.time()
        with pytest.raises(CircuitOpen):
            await pipeline.call(Service())
        assert loop.time() == start


async def test_standard_takes_a_hanging_service_for_a_failing_one() -> None:
    """Its own timeout is retried, counted and answered, though ``on`` does not name it."""
    pipeline = standard(constant("cached"), on=ConnectionError, timeout=1)
    breaker = next(policy for policy in pipeline.policies if isinstance(policy, CircuitBreaker))
    hanging = Service(takes=60)
    assert await pipeline.call(hanging) == "cached"
    assert hanging.called == 3
    assert await pipeline.call(hanging) == "cached"
    assert breaker.state is CircuitState.OPEN


async def test_standard_retries_no_outage() -> None:
    """T27: beyond a few retries its budget allows one for five calls, not two for each."""
    pipeline, down = standard(open_for=0.001), Service(failures=10_000)
    for _ in range(200):
        with pytest.raises((ConnectionError, CircuitOpen)):
            await pipeline.call(down)
        await asyncio.sleep(0.002)
    assert down.called < 300


async def test_standard_lets_bugs_through() -> None:
    """What ``on`` does not name is not retried, opens no circuit, and is not answered."""
    pipeline = standard(constant("cached"))
    called = 0

    async def bug() -> None:
        nonlocal called
        called += 1
        raise KeyError("bug")

    for _ in range(6):
        with pytest.raises(KeyError):
            await pipeline.call(bug)
    assert called == 6


async def test_standard_bounds_the_queue() -> None:
    """Beyond the slots and five times as many that wait, a call is refused."""
    pipeline = standard(concurrency=2, deadline=100, timeout=50)
    results = await asyncio.gather(
        *(pipeline.call(Service(takes=1)) for _ in range(15)), return_exceptions=True
    )
    assert sum(isinstance(result, ConcurrencyLimitExceeded) for result in results) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on": ()}, "on must name at least one exception type"),
        ({"timeout": 0}, "timeout must be above 0, got 0"),
        ({"deadline": 1, "timeout": 2}, r"deadline must be at least timeout \(2\), got 1"),
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
        ({"concurrency": 0}, "limit must be at least 1, got 0"),
        ({"rate": 0}, "rate must be above 0, got 0"),
        ({"open_for": -1}, "open_for must be above 0, got -1"),
    ],
)
def test_bad_arguments_of_standard_are_refused(options: Any, message: str) -> None:
    """Each bad argument is named."""
    with pytest.raises(ValueError, match=message):
        standard(**options)


def test_describes_itself() -> None:
    """``describe`` gives one line a policy; the repr is the expression that made it."""
    log: list[str] = []
    pipeline = compose(Fallback(constant(0)), compose(CircuitBreaker()), Noted("a", log))
    assert pipeline.describe() == [
        "Fallback(constant)",
        "CircuitBreaker(failures=5, open_for=30.0, probes=3)",
        "Noted",
    ]
    assert repr(pipeline) == f"compose({', '.join(pipeline.describe())})"


def test_describes_every_policy_by_its_name() -> None:
    """Each line begins with the class, so that a reader sees the order in any log."""
    pipeline = standard(constant(0), rate=10)
    assert [line.partition("(")[0] for line in pipeline.describe()] == [
        type(policy).__name__ for policy in pipeline.policies
    ]
    assert "at 0x" not in repr(pipeline)


async def test_statistics_come_from_each_policy() -> None:
    """The statistics stand in the order of the policies."""
    breaker = CircuitBreaker()
    pipeline = compose(Noted("a", []), breaker)
    await pipeline.call(Service())
    assert pipeline.statistics().policies == (None, breaker.statistics())


class OnlyAContext:
    """Not a policy."""

    async def __aenter__(self) -> None:
        """Enter."""

    async def __aexit__(self, *_: object) -> None:
        """Leave."""


class PlainCall:
    """Has a ``call`` that is not asynchronous."""

    def call(self, fn: object) -> object:
        """Return the function."""
        return fn


@pytest.mark.parametrize("bad", [OnlyAContext(), PlainCall(), CircuitBreaker, None, lambda fn: fn])
def test_what_is_no_policy_is_refused(bad: Any) -> None:
    """An object without ``async def call`` is named with its place."""
    with pytest.raises(TypeError, match=r"policies\[1\] must be an object with"):
        compose(CircuitBreaker(), bad)


def test_bad_arguments_are_refused() -> None:
    """There must be a policy, and something asynchronous to decorate."""
    with pytest.raises(ValueError, match="policies must not be empty"):
        compose()
    with pytest.raises(TypeError, match="fn must be an async function"):
        compose(retry())(lambda: None)


def test_used_on_three_loops() -> None:
    """T34: one composition serves three event loops, one after the other."""
    pipeline = compose(retry(), CircuitBreaker(), ConcurrencyLimiter(1), TokenBucket(1, 1))
    assert [run_virtual(pipeline.call(Service(), "x")) for _ in range(3)] == [("x",)] * 3


def test_no_cancellation_loses_a_slot_or_a_place() -> None:
    """T2: at whichever step one of the calls is cancelled, all slots and places come back."""
    limiter = ConcurrencyLimiter(1)
    breakers: list[CircuitBreaker] = []

    def make() -> Composition:
        breakers.append(CircuitBreaker(failures=1, open_for=1, probes=2, probe_timeout=3600))
        return compose(Timeout(60), retry(), breakers[-1], limiter, TokenBucket(10, 1), Timeout(5))

    async def scenario(pipeline: Composition) -> None:
        await asyncio.gather(breakers[-1].call(Service(failures=1)), return_exceptions=True)
        await asyncio.sleep(1)  # half-open: both calls are probes
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(pipeline.call(Service(takes=1)))

    async def is_whole(pipeline: Composition) -> bool:
        await asyncio.sleep(1)
        await pipeline.call(Service())
        return limiter.statistics().in_use == 0 and breakers[-1].statistics().probes_out == 0

    assert explore_cancellation(make, scenario, is_whole) > 10


def test_no_cancellation_upsets_the_standard_composition() -> None:
    """T2: at whichever step a call is cancelled, slots come back and the circuit stays closed."""

    def make() -> Composition:
        return standard(
            lambda: "degraded", timeout=5, attempts=2, concurrency=1, rate=10, deadline=60
        )

    async def scenario(pipeline: Composition) -> None:
        async with asyncio.TaskGroup() as group:
            for failures in (0, 1):
                group.create_task(pipeline.call(Service(failures, takes=1)))

    async def is_whole(pipeline: Composition) -> bool:
        answer = await pipeline.call(Service())
        limiter = next(each for each in pipeline.policies if isinstance(each, ConcurrencyLimiter))
        breaker = next(each for each in pipeline.policies if isinstance(each, CircuitBreaker))
        slots = limiter.statistics()
        closed = breaker.state is CircuitState.CLOSED
        return answer == () and closed and (slots.in_use, slots.waiting) == (0, 0)

    assert explore_cancellation(make, scenario, is_whole) > 10
