"""When the service fails, the next best answer is given, and says what it is."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest

from concurrency_patterns.errors import DeadlineExceeded, RateLimitExceeded
from concurrency_patterns.fallback import Alternative, Fallback, Outcome, constant
from concurrency_patterns.testing import explore_cancellation, run_virtual


async def works(key: str = "k") -> str:
    """Answer."""
    return f"fresh {key}"


async def fails(key: str = "k") -> str:
    """Fail as a service does that is not there."""
    raise ConnectionError(f"no {key}")


async def replica(key: str = "k") -> str:
    """Answer in the service's stead."""
    return f"replica {key}"


async def hangs(key: str = "k") -> str:
    """Never answer in time."""
    await asyncio.sleep(3600)
    return key


async def test_the_service_answers_while_it_works() -> None:
    """No alternative is asked when none is needed."""
    assert await Fallback(fails).call(works, "a") == "fresh a"


async def test_the_alternative_is_called_with_the_same_arguments() -> None:
    """Positional and keyword arguments are passed on as they are."""
    fallback = Fallback(replica)
    assert await fallback.call(fails, "a") == "replica a"
    assert await fallback.call(fails, key="b") == "replica b"


async def test_alternatives_are_asked_in_their_order() -> None:
    """A failing alternative leads to the next, whatever it raises."""
    asked = []

    def cache(key: str) -> str:
        asked.append(key)
        raise KeyError(key)

    assert await Fallback(cache, fails, constant("nothing"), replica).call(fails, "a") == "nothing"
    assert asked == ["a"]


async def test_plain_functions_and_values_may_answer() -> None:
    """An alternative need not be asynchronous; ``constant`` makes one of a value."""
    cached: dict[str, str] = {"a": "cached a"}
    fallback = Fallback(cached.__getitem__, constant(None))
    assert await fallback.call(fails, "a") == "cached a"
    assert await fallback.call(fails, "b") is None


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        TimeoutError(),
        DeadlineExceeded(),
        RateLimitExceeded(),
        ExceptionGroup("", [ConnectionError(), ExceptionGroup("", [TimeoutError()])]),
    ],
)
async def test_by_default_failures_of_the_service_are_covered(error: Exception) -> None:
    """Connections, timeouts, and refusals by a policy lead to an alternative; groups by leaves."""

    async def fail() -> str:
        raise error

    assert await Fallback(constant("default")).call(fail) == "default"


@pytest.mark.parametrize(
    "error", [ValueError(), KeyError(), ExceptionGroup("", [ConnectionError(), ValueError()])]
)
async def test_by_default_bugs_are_not_covered_up(error: Exception) -> None:
    """An exception that ``on`` does not name is raised as it is."""

    async def fail() -> str:
        raise error

    with pytest.raises(type(error)) as raised:
        await Fallback(constant("default")).call(fail)
    assert raised.value is error


async def test_on_names_what_leads_to_an_alternative() -> None:
    """``on`` replaces the default."""
    fallback = Fallback(constant("default"), on=LookupError)
    with pytest.raises(ConnectionError):
        await fallback.call(fails)

    async def miss() -> str:
        return {}["a"]

    assert await fallback.call(miss) == "default"


async def test_each_alternative_has_its_own_time_limit() -> None:
    """One that hangs is left after its time, and the next one has the whole time again."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    fallback = Fallback(hangs, Alternative(hangs, timeout=2.0), replica, timeout=0.5)
    assert await fallback.call(fails) == "replica k"
    assert loop.time() - start == pytest.approx(2.5)


async def test_an_alternative_that_hangs_says_so() -> None:
    """If it was the last one, the error tells its name and its limit."""
    with pytest.raises(DeadlineExceeded, match=r"hangs did not answer within 0\.5 s") as raised:
        await Fallback(hangs, timeout=0.5).call(fails)
    assert raised.value.seconds == 0.5
    assert isinstance(raised.value.__cause__, ConnectionError)


async def test_an_alternatives_own_timeout_error_is_not_relabelled() -> None:
    """T29: a ``TimeoutError`` that the alternative raises itself stays what it is."""
    own = TimeoutError("mine")

    async def times_out() -> str:
        raise own

    with pytest.raises(TimeoutError) as raised:
        await Fallback(times_out, timeout=5).call(fails)
    assert raised.value is own


async def test_when_nobody_answers_the_last_error_has_the_others_as_causes() -> None:
    """Nothing is lost: last alternative, first alternative, service."""

    def cache(key: str) -> str:
        raise KeyError(key)

    async def broken(_: str) -> str:
        raise OSError("disk") from ValueError("inner")

    with pytest.raises(OSError, match="disk") as raised:
        await Fallback(cache, broken).call(fails, "a")
    kinds, error = [], raised.value
    while error is not None:
        kinds.append(type(error))
        error = error.__cause__
    assert kinds == [OSError, ValueError, KeyError, ConnectionError]


async def test_the_same_error_from_all_makes_no_circle() -> None:
    """An alternative that raises the service's own error again does not become its own cause."""
    shared = ConnectionError("shared")

    async def fail() -> str:
        raise shared

    with pytest.raises(ConnectionError) as raised:
        await Fallback(fail, fail).call(fail)
    assert raised.value is shared
    assert shared.__cause__ is None


async def test_a_cancelled_call_asks_nobody() -> None:
    """T21: cancellation passes through, in the service and in an alternative."""
    asked = []
    task = asyncio.create_task(Fallback(asked.append).call(hangs, "a"))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    task = asyncio.create_task(Fallback(hangs, asked.append, timeout=60).call(fails, "a"))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asked == []


async def test_a_timeout_around_it_wins() -> None:
    """An outer time limit ends the whole, however many alternatives are left."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await Fallback(hangs, replica, timeout=60).call(fails)


async def test_the_outcome_says_where_the_answer_came_from() -> None:
    """A degraded answer can be told from a real one."""
    fallback = Fallback(replica, constant(()))
    assert await fallback.outcome(works, "a") == Outcome("fresh a", False, "primary", None)
    outcome = await fallback.outcome(fails, "a")
    assert (outcome.value, outcome.degraded, outcome.source) == ("replica a", True, "replica")
    assert isinstance(outcome.error, ConnectionError)


async def test_sources_have_names() -> None:
    """The name is given, or that of the function, also under a partial."""

    class Cache:
        def __call__(self) -> str:
            return "cached"

    for alternative, name in [
        (replica, "replica"),
        (functools.partial(replica, "a"), "replica"),
        (Cache(), "Cache"),
        (constant(1), "constant"),
        (constant(1, source="empty page"), "empty page"),
        (Alternative(replica, source="Frankfurt"), "Frankfurt"),
    ]:
        assert (await Fallback(alternative).outcome(fails_alone)).source == name
    assert repr(Fallback(replica, constant(0))) == "Fallback(replica, constant)"


async def fails_alone() -> str:
    """Fail without arguments."""
    raise ConnectionError


async def test_decorates_async_def() -> None:
    """The decorated function keeps its name, and answers when it fails."""

    @Fallback(replica)
    async def fetch(key: str) -> str:
        return await fails(key)

    assert fetch.__name__ == "fetch"
    assert await fetch("a") == "replica a"


async def test_statistics_count_by_source() -> None:
    """Every call is counted once: answered by whom, or by nobody."""
    fallback = Fallback({"a": 1}.__getitem__, fails)
    await fallback.call(works, "a")
    await fallback.call(fails, "a")
    for key in ("b", "c"):
        with pytest.raises(ConnectionError):
            await fallback.call(fails, key)
    statistics = fallback.statistics()
    assert (statistics.primary, statistics.degraded, statistics.failed) == (1, 1, 2)
    assert statistics.sources == {"__getitem__": 1, "fails": 0}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (Fallback, ValueError, "alternatives must not be empty"),
        (lambda: Fallback("default"), TypeError, "use constant"),
        (lambda: Fallback(replica, timeout=0), ValueError, "timeout must be above 0, got 0"),
        (lambda: Alternative(replica, timeout=-1), ValueError, "timeout must be above 0, got -1"),
        (lambda: Fallback(replica, on=asyncio.CancelledError), TypeError, "on must be an Exc"),
        (lambda: Fallback(replica, on="ValueError"), TypeError, "on must be an Exc"),
        (lambda: Fallback(replica)(lambda: None), TypeError, "fn must be an async function"),
    ],
)
def test_bad_arguments_are_refused_when_made(
    make: Any, error: type[Exception], message: str
) -> None:
    """Each bad argument is named."""
    with pytest.raises(error, match=message):
        make()


def test_used_on_three_loops() -> None:
    """T34: made once, it serves one event loop after the other."""
    fallback = Fallback(replica)
    assert [run_virtual(fallback.call(fails)) for _ in range(3)] == ["replica k"] * 3


def test_no_cancellation_leaves_anything_behind() -> None:
    """T2: at whichever step a call is cancelled, the next one is answered."""

    async def scenario(fallback: Fallback) -> None:
        async def slow_failure() -> str:
            await asyncio.sleep(1)
            raise ConnectionError

        await fallback.call(slow_failure)

    async def is_usable(fallback: Fallback) -> bool:
        return await fallback.call(fails) == "default"

    def make() -> Fallback:
        return Fallback(hangs, constant("default"), timeout=1)

    assert explore_cancellation(make, scenario, is_usable) > 3
