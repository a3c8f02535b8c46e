"""When the service fails, the next best answer is given, and says what it is."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import math
import random
import re
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrency_patterns.errors import CircuitOpen, DeadlineExceeded, RateLimitExceeded
from concurrency_patterns.fallback import (
    Alternative,
    Fallback,
    Hedge,
    Outcome,
    StaleCache,
    _Latencies,
    _Share,
    constant,
)
from concurrency_patterns.retry import RetryBudget
from concurrency_patterns.testing import explore_cancellation, run_virtual
from concurrency_patterns.timeout import deadline, remaining


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


async def test_an_alternative_sees_its_time_limit() -> None:
    """``remaining()`` tells it its limit, or what is left of a deadline around if that is less."""
    seen = []

    async def look() -> None:
        seen.append(remaining())

    for fallback in (Fallback(look), Fallback(look, timeout=2), Fallback(look, timeout=20)):
        async with deadline(10):
            await fallback.call(fails_alone)
    await Fallback(look, timeout=0.5).call(fails_alone)
    assert seen == [10, 2, 10, 0.5]


async def test_a_deadline_around_it_that_is_shorter_wins() -> None:
    """The call ends with that deadline, and not with the limit of the alternative."""
    asked = []
    with pytest.raises(DeadlineExceeded, match="not done within 1 s"):
        async with deadline(1):
            await Fallback(hangs, asked.append, timeout=2).call(fails)
    assert asked == []


async def test_an_alternatives_own_timeout_error_is_not_relabelled() -> None:
    """T29: a ``TimeoutError`` that the alternative raises itself stays what it is."""
    own = TimeoutError("mine")

    async def times_out() -> str:
        raise own

    with pytest.raises(TimeoutError) as raised:
        await Fallback(times_out, timeout=5).call(fails)
    assert raised.value is own


def shown(error: BaseException) -> list[str]:
    """Return the kinds of the exceptions that a traceback shows, the last one first."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    kinds = [re.match(r"[\w.]+(?=$|:)", line) for line in reversed(lines)]
    return [kind[0] for kind in kinds if kind]


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


async def test_what_made_an_alternative_fail_is_not_hidden() -> None:
    """What it handled when it failed stays in the traceback, before the errors of the others."""

    async def broken(_: str) -> str:
        try:
            await asyncio.wait_for(asyncio.sleep(60), 1)
        except TimeoutError:
            raise OSError("disk")  # noqa: B904 -- without "from", as it happens
        return ""

    with pytest.raises(OSError, match="disk") as raised:
        await Fallback(hangs, broken, timeout=5).call(fails, "a")
    assert shown(raised.value) == [
        "OSError",
        "TimeoutError",
        "asyncio.exceptions.CancelledError",
        "concurrency_patterns.errors.DeadlineExceeded",
        "ConnectionError",
    ]


async def test_an_error_that_cannot_be_changed_is_raised_as_it_is() -> None:
    """A class of exceptions that forbids to set attributes is chained like any other."""

    @dataclass(frozen=True)
    class FrozenError(Exception):
        key: str

    async def broken(key: str) -> str:
        raise FrozenError(key)

    with pytest.raises(FrozenError) as raised:
        await Fallback(broken).call(fails, "a")
    assert isinstance(raised.value.__cause__, ConnectionError)


async def test_the_same_error_from_all_makes_no_circle() -> None:
    """An alternative that raises the service's own error again does not become its own cause."""
    shared = ConnectionError("shared")

    async def fail() -> str:
        raise shared

    with pytest.raises(ConnectionError) as raised:
        await Fallback(fail, fail).call(fail)
    assert raised.value is shared
    assert shared.__cause__ is shared.__context__ is None


async def test_a_fallback_in_a_fallback_loses_no_error() -> None:
    """What was chained inside is not taken for that of an earlier call."""
    kept = KeyError("kept")

    def cache(number: str) -> str:
        raise kept

    fallback = Fallback(Fallback(cache)(is_late))
    for number in "12":
        with pytest.raises(KeyError):
            await fallback.call(fails, number)
        assert shown(kept) == ["KeyError", "TimeoutError", "ConnectionError"]
    assert str(kept.__cause__.__cause__) == "no 2"


async def is_late(key: str) -> str:
    """Fail in another way."""
    raise TimeoutError(key)


async def test_an_error_that_is_raised_again_and_again_leads_only_to_those_of_its_call() -> None:
    """What an alternative keeps and raises in each call does not collect the service's errors."""
    kept = KeyError("kept")

    def cache(number: str) -> str:
        raise kept

    fallback = Fallback(cache)
    for number in "123":
        with pytest.raises(KeyError):
            await fallback.call(fails, number)
    assert shown(kept) == ["KeyError", "ConnectionError"]
    assert str(kept.__cause__) == "no 3"


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


async def breaks_when_cancelled(key: str = "k") -> str:
    """Turn a cancellation into another error, as some drivers do."""
    try:
        return await hangs(key)
    except asyncio.CancelledError:
        raise ConnectionError("closed") from None


async def breaks_in_a_group(key: str = "k") -> str:
    """Do the same in two tasks of a group."""
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(breaks_when_cancelled(key))
    return key


@pytest.mark.parametrize("disguised", [breaks_when_cancelled, breaks_in_a_group])
async def test_a_cancellation_in_disguise_asks_nobody(disguised: Any) -> None:
    """T21: if a cancelled function raises another error, that is raised, and nobody is asked."""
    asked: list[str] = []
    for fallback, fn in [
        (Fallback(asked.append), disguised),
        (Fallback(disguised, asked.append), fails),
        (Fallback(disguised, asked.append, timeout=60), fails),
    ]:
        task = asyncio.create_task(fallback.call(fn, "a"))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises((ConnectionError, ExceptionGroup)):
            task.result()
        statistics = fallback.statistics()
        assert (statistics.degraded, statistics.failed) == (0, 0)
    start = asyncio.get_running_loop().time()
    with pytest.raises((ConnectionError, ExceptionGroup)):
        async with deadline(1):
            await Fallback(asked.append).outcome(disguised, "a")
    assert asyncio.get_running_loop().time() == start + 1
    assert asked == []


async def test_the_limit_of_an_alternative_is_no_cancellation_of_the_call() -> None:
    """If its own limit ends an alternative that then raises another error, the next is asked."""
    assert await Fallback(breaks_when_cancelled, replica, timeout=1).call(fails) == "replica k"


async def fails_in_a_group(key: str = "k") -> str:
    """Fail in one task, while another breaks as it is cancelled for that."""
    async with asyncio.TaskGroup() as group:
        group.create_task(breaks_when_cancelled(key))
        group.create_task(fails(key))
    return key


async def is_late_in_a_group(key: str = "k") -> str:
    """Run into a time limit of its own in a task."""
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.wait_for(hangs(key), 1))
    return key


async def fails_after_a_group(key: str = "k") -> str:
    """Fail after a group has failed, which leaves a request to cancel behind before Python 3.13."""
    with contextlib.suppress(ExceptionGroup):
        await fails_in_a_group(key)
    raise ConnectionError


# Before Python 3.13 what a group leaves behind looks like a cancellation once the group is gone.
FAILED_GROUPS = [fails_in_a_group, is_late_in_a_group]
if sys.version_info >= (3, 13):
    FAILED_GROUPS.append(fails_after_a_group)


@pytest.mark.parametrize("failing", FAILED_GROUPS)
async def test_a_group_that_failed_is_no_cancellation(failing: Any) -> None:
    """A task group cancels the task that waits for it, which is not the end of the call."""
    assert await Fallback(replica).call(failing) == "replica k"
    assert await Fallback(failing, replica).call(fails) == "replica k"
    assert (await Fallback(replica).outcome(failing)).source == "replica"


async def test_a_fallback_in_a_cleanup_asks_the_alternatives() -> None:
    """The cancellation that came before the call is not one of the call."""
    answers = []

    async def interrupted() -> None:
        try:
            await hangs()
        finally:
            answers.append(await Fallback(replica).call(fails))

    task = asyncio.create_task(interrupted())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    assert answers == ["replica k"]


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

    async def slow_failure() -> str:
        await asyncio.sleep(1)
        raise ConnectionError

    async def scenario(fallback: Fallback) -> None:
        await fallback.call(slow_failure)

    async def outcomes(fallback: Fallback) -> None:
        async with asyncio.TaskGroup() as group:
            for fn in (works, slow_failure):
                group.create_task(fallback.outcome(fn))

    async def is_usable(fallback: Fallback) -> bool:
        return await fallback.call(fails) == "default"

    def make() -> Fallback:
        return Fallback(hangs, constant("default"), timeout=1)

    assert explore_cancellation(make, scenario, is_usable) > 3
    assert explore_cancellation(make, outcomes, is_usable) > 10


async def test_events_tell_who_answered() -> None:
    """A listener hears of each degraded answer, and of calls that nobody answered."""
    heard: list[tuple[str, Any]] = []
    fallback = Fallback({"a": 1}.__getitem__)
    fallback.on_event = lambda kind, data: heard.append((kind, data.get("source")))
    await fallback.call(works, "a")
    await fallback.call(fails, "a")
    with pytest.raises(KeyError):
        await fallback.call(fails, "b")
    assert heard == [("fallback.degraded", "__getitem__"), ("fallback.failed", None)]


class Prices:
    """A service whose answers can be told apart, that takes a second, and can be broken."""

    def __init__(self, takes: float = 1.0) -> None:
        self.takes = takes
        self.called = 0
        self.cancelled = 0
        self.error: BaseException | None = None

    async def __call__(self, *args: object, **kwargs: object) -> str:
        """Answer with the number of the call."""
        self.called += 1
        number = self.called
        try:
            await asyncio.sleep(self.takes)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return f"answer {number}"


async def test_a_fresh_answer_is_given_without_asking() -> None:
    """Within ``ttl`` the function is called once for each key, then again."""
    cache, prices = StaleCache(ttl=10, stale_ttl=100), Prices()
    assert [await cache.call(prices, "a"), await cache.call(prices, "a")] == ["answer 1"] * 2
    assert await cache.call(prices, "b") == "answer 2"
    await asyncio.sleep(9.5)  # a is 10.5 s old, b is 9.5 s old
    assert await cache.call(prices, "b") == "answer 2"
    assert await cache.call(prices, "a") == "answer 3"


async def test_an_old_answer_is_given_only_when_the_function_fails() -> None:
    """RFC 5861: after ``ttl`` the function is asked; if it fails, the old answer is given."""
    cache, prices = StaleCache(ttl=1, stale_ttl=60), Prices()
    await cache.call(prices)
    await asyncio.sleep(5)
    assert await cache.outcome(prices) == Outcome("answer 2", False, "primary", None)
    assert await cache.outcome(prices) == Outcome("answer 2", False, "cache", None)
    await asyncio.sleep(5)
    prices.error = ConnectionError("down")
    assert await cache.outcome(prices) == Outcome("answer 2", True, "stale", prices.error)
    prices.error = None
    assert await cache.call(prices) == "answer 4"


async def test_an_answer_can_be_too_old() -> None:
    """After ``ttl + stale_ttl`` the failure is raised, and the answer is forgotten."""
    cache, prices = StaleCache(ttl=10, stale_ttl=20), Prices(takes=0)
    await cache.call(prices)
    prices.error = ConnectionError("down")
    await asyncio.sleep(29.9)
    assert await cache.call(prices) == "answer 1"
    await asyncio.sleep(0.1)
    with pytest.raises(ConnectionError) as raised:
        await cache.call(prices)
    assert raised.value is prices.error
    assert cache.statistics().size == 0


async def test_a_bug_is_not_covered_up_by_an_old_answer() -> None:
    """An exception that ``on`` does not name is raised, also when there is an old answer."""
    cache, prices = StaleCache(ttl=0, stale_ttl=60), Prices()
    await cache.call(prices)
    prices.error = ValueError("bug")
    with pytest.raises(ValueError, match="bug"):
        await cache.call(prices)


async def test_exceptions_are_not_kept() -> None:
    """Each call after a failure asks anew; a traceback does not grow from call to call."""
    cache, prices = StaleCache(ttl=10, stale_ttl=10), Prices()
    prices.error = ConnectionError("down")
    depths = []
    for _ in range(5):
        with pytest.raises(ConnectionError) as raised:
            await cache.call(prices)
        depths.append(len(raised.traceback))
        prices.error = ConnectionError("down")
    assert prices.called == 5
    assert len(set(depths)) == 1


async def test_concurrent_calls_share_one_fetch() -> None:
    """Single flight: ten calls at the same time are one call of the function."""
    cache, prices = StaleCache(ttl=10, stale_ttl=10), Prices()
    assert await asyncio.gather(*(cache.call(prices, "a") for _ in range(10))) == ["answer 1"] * 10
    statistics = cache.statistics()
    assert (prices.called, statistics.fetched, statistics.joined) == (1, 1, 9)


async def test_concurrent_calls_share_a_failure() -> None:
    """All who wait get the error, and the next call asks anew."""
    cache, prices = StaleCache(ttl=10, stale_ttl=10), Prices()
    prices.error = ConnectionError("down")
    calls = (cache.call(prices) for _ in range(5))
    assert await asyncio.gather(*calls, return_exceptions=True) == [prices.error] * 5
    prices.error = None
    assert await cache.call(prices) == "answer 2"


async def test_followers_survive_a_cancelled_leader() -> None:
    """T36: the call that began the fetch is cancelled; the others get its answer."""
    cache, prices = StaleCache(ttl=10, stale_ttl=10), Prices()
    leader, *followers = [asyncio.create_task(cache.call(prices)) for _ in range(3)]
    await asyncio.sleep(0.5)
    leader.cancel()
    assert await asyncio.gather(*followers) == ["answer 1"] * 2
    assert leader.cancelled()
    assert (prices.called, prices.cancelled) == (1, 0)


async def test_followers_survive_the_deadline_of_the_leader() -> None:
    """T36: what runs out of time is the call of the leader, and not the fetch."""
    cache, prices = StaleCache(ttl=10, stale_ttl=10), Prices()
    seen = []

    async def patient() -> str:
        seen.append(remaining())
        async with deadline(60):  # would be cut to half a second by a deadline around it
            return await prices()

    async def hurried() -> str:
        async with deadline(0.5):
            return await cache.call(patient)

    leader = asyncio.create_task(hurried())
    await asyncio.sleep(0.1)
    assert await cache.call(patient) == "answer 1"
    with pytest.raises(DeadlineExceeded):
        await leader
    assert seen == [None]


async def test_a_fetch_that_nobody_waits_for_is_cancelled() -> None:
    """When the last caller has left, the fetch has ended, and a new call begins another one."""
    cache, prices = StaleCache(ttl=10, stale_ttl=10), Prices()
    tasks = [asyncio.create_task(cache.call(prices)) for _ in range(2)]
    await asyncio.sleep(0.5)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert prices.cancelled == 1
    assert len(asyncio.all_tasks()) == 1
    assert await cache.call(prices) == "answer 2"


async def test_a_call_while_a_fetch_is_being_given_up_begins_another() -> None:
    """Nobody joins a fetch that is ending."""
    cache = StaleCache(ttl=10, stale_ttl=10)
    calls = 0

    async def slow_to_end() -> int:
        nonlocal calls
        calls += 1
        mine = calls
        try:
            await asyncio.sleep(1)
        finally:
            await asyncio.sleep(1)
        return mine

    leaving = asyncio.create_task(cache.call(slow_to_end))
    await asyncio.sleep(0.5)
    leaving.cancel()
    await asyncio.sleep(0.5)
    assert await cache.call(slow_to_end) == 2
    assert leaving.cancelled()


async def test_answers_belong_to_function_and_arguments() -> None:
    """Two functions, and the same function in two partials, do not get each other's answers."""
    cache = StaleCache(ttl=10, stale_ttl=10)
    assert await cache.call(works, "a") == "fresh a"
    assert await cache.call(replica, "a") == "replica a"
    assert await cache.call(functools.partial(works, "b")) == "fresh b"
    assert await cache.call(functools.partial(works, "c")) == "fresh c"
    assert await cache.call(functools.partial(works, "b")) == "fresh b"
    assert await cache.call(functools.partial(works, key="b")) == "fresh b"
    assert (cache.statistics().fetched, cache.statistics().hits) == (5, 1)


async def test_the_key_can_be_made_by_a_function() -> None:
    """``key`` sees the arguments; what it leaves out does not matter."""
    cache, prices = StaleCache(10, 10, key=lambda user, **_: user["id"]), Prices()
    assert await cache.call(prices, {"id": 1}, trace="x") == "answer 1"
    assert await cache.call(prices, {"id": 1}, trace="y") == "answer 1"
    with pytest.raises(TypeError, match=r"key must be hashable, got \(\(\[\],\), \(\)\)"):
        await StaleCache(10, 10).call(prices, [])


async def test_equal_arguments_of_different_types_are_different_arguments() -> None:
    """As in ``lru_cache(typed=True)``: 1, 1.0 and True are not the same question."""
    cache = StaleCache(10, 10)

    async def show(*args: object, **kwargs: object) -> str:
        return repr((*args, *kwargs.values()))

    for value, answer in (1, "(1,)"), (1.0, "(1.0,)"), (True, "(True,)"):
        assert await cache.call(show, value) == answer
    assert [await cache.call(show, x=value) for value in (1, 1.0)] == ["(1,)", "(1.0,)"]
    partial = functools.partial(show, 1)
    assert [await cache.call(partial), await cache.call(show, 1)] == ["(1,)"] * 2
    assert await cache.call(functools.partial(show, True)) == "(True,)"
    assert cache.statistics().hits == 3


async def test_the_least_recently_used_answer_goes_first() -> None:
    """There are never more than ``max_size`` answers."""
    cache, prices = StaleCache(60, 60, max_size=2), Prices()
    for key in ("a", "b", "a", "c", "a", "b"):
        await cache.call(prices, key)
    statistics = cache.statistics()
    assert (statistics.size, statistics.fetched, statistics.hits, statistics.evicted) == (
        2,
        4,
        2,
        2,
    )


async def test_clear_forgets_also_what_is_under_way() -> None:
    """An answer that was asked for before ``clear`` reaches its caller, but is not kept."""
    cache, prices = StaleCache(60, 60), Prices()
    before = asyncio.create_task(cache.call(prices))
    await asyncio.sleep(0.5)
    cache.clear()
    assert await cache.call(prices) == "answer 2"
    assert await before == "answer 1"
    assert await cache.call(prices) == "answer 2"


class Snake:
    """Functions that ask a cache for each other's answers, the last one for that of the first."""

    def __init__(self, cache: StaleCache, length: int, *, in_group: bool = False) -> None:
        self.cache, self.length, self.in_group = cache, length, in_group

    async def bite(self, number: int) -> str:
        """Ask for the answer of the next one."""
        asking = self.cache.call(self.bite, (number + 1) % self.length)
        if not self.in_group:
            return await asking
        async with asyncio.TaskGroup() as group:
            return await group.create_task(asking)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("in_group", [False, True])
async def test_a_fetch_that_needs_itself_is_refused(length: int, in_group: bool) -> None:
    """Functions that need each other's answers would wait for ever, also by way of other tasks."""
    cache = StaleCache(60, 60)
    with pytest.raises((RuntimeError, ExceptionGroup)) as raised:
        await Snake(cache, length, in_group=in_group).bite(0)
    error: BaseException = raised.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert "the very answer" in str(error)
    assert len(asyncio.all_tasks()) == 1


async def test_fetches_that_were_begun_apart_do_not_wait_for_each_other() -> None:
    """One is refused; the other one gets its error, and so do the callers."""
    cache = StaleCache(60, 60)
    snake = Snake(cache, 2)
    calls = (cache.call(snake.bite, number) for number in range(2))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [RuntimeError] * 2


async def test_fetches_may_share_what_they_need() -> None:
    """An answer that two fetches need is no circle, nor is one that is needed once more later."""
    cache, prices = StaleCache(0, 60), Prices()

    async def page(name: str) -> str:
        await cache.call(prices)
        return name + " " + await cache.call(prices)

    calls = (cache.call(page, name) for name in "ab")
    assert await asyncio.gather(*calls) == ["a answer 2", "b answer 2"]

    async def fibonacci(number: int) -> int:
        before = (cache.call(fibonacci, number - step) for step in (1, 2))
        return sum(await asyncio.gather(*before)) if number > 1 else number

    assert await cache.call(fibonacci, 50) == 12586269025


async def test_a_task_that_a_fetch_has_left_behind_may_ask_for_its_answer() -> None:
    """When the fetch has ended, there is nothing that would wait for itself."""
    cache, left = StaleCache(0, 60), []

    async def renew() -> str:
        await asyncio.sleep(1)
        return await cache.call(fetch)

    async def fetch() -> str:
        if not left:
            left.append(asyncio.create_task(renew()))
        return "answer"

    await cache.call(fetch)
    assert await left[0] == "answer"


async def test_a_cache_tells_of_old_answers() -> None:
    """A listener hears of each old answer with its age, and of failures without one."""
    heard: list[Any] = []
    cache, prices = StaleCache(1, 10), Prices(takes=0)
    cache.on_event = lambda kind, data: heard.append((kind, data.get("seconds")))
    await cache.call(prices)
    prices.error = CircuitOpen("open")
    await asyncio.sleep(5)
    await cache.call(prices)
    await asyncio.sleep(10)
    with pytest.raises(CircuitOpen):
        await cache.call(prices)
    assert heard == [("fallback.degraded", 5), ("fallback.failed", None)]
    assert (cache.statistics().stale, cache.statistics().failed) == (1, 1)


def test_a_cache_decorates_and_begins_empty_on_a_new_loop() -> None:
    """T34: on three loops, one after the other, each with its own clock."""
    cache, prices = StaleCache(60, 60), Prices()

    @cache
    async def price(item: str) -> str:
        return await prices(item)

    async def twice() -> list[str]:
        return [await price("a"), await price("a")]

    assert price.__name__ == "price"
    assert [run_virtual(twice()) for _ in range(3)] == [[f"answer {i}"] * 2 for i in (1, 2, 3)]
    assert repr(cache) == "StaleCache(ttl=60, stale_ttl=60, max_size=1024)"


def test_no_cancellation_spoils_the_cache() -> None:
    """T2, T36: whoever is cancelled at whichever step, nothing hangs and no fetch goes on."""
    prices = Prices()

    async def scenario(cache: StaleCache) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(cache.call(prices, "a"))

    async def is_whole(cache: StaleCache) -> bool:
        answer = await cache.call(prices, "a")
        return answer.startswith("answer") and len(asyncio.all_tasks()) == 1

    assert explore_cancellation(lambda: StaleCache(10, 10), scenario, is_whole) > 5


def test_no_cancellation_spoils_an_old_answer() -> None:
    """T2: at whichever step calls of a failing service are cancelled, the old answer stays."""
    prices = Prices()

    async def scenario(cache: StaleCache) -> None:
        prices.error = None
        await cache.call(prices, "old")
        prices.error = ConnectionError("down")
        calls = (cache.call(prices, key) for key in ("old", "old", "none"))
        await asyncio.gather(*calls, return_exceptions=True)

    async def is_whole(cache: StaleCache) -> bool:
        had_an_answer = cache.statistics().size == 1
        prices.error = ConnectionError("down")
        with contextlib.suppress(ConnectionError):
            outcome = await cache.outcome(prices, "old")
            return outcome.source == "stale" and len(asyncio.all_tasks()) == 1
        return not had_an_answer

    assert explore_cancellation(lambda: StaleCache(0, 60), scenario, is_whole) > 10


def test_no_cancellation_spoils_a_cache_that_is_cleared() -> None:
    """T2: whoever is cancelled around a ``clear``, no fetch goes on, and no answer is mixed up."""
    prices = Prices()

    async def scenario(cache: StaleCache) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(cache.call(prices, "a"))
            await asyncio.sleep(0.5)
            cache.clear()
            group.create_task(cache.call(prices, "a"))

    async def is_whole(cache: StaleCache) -> bool:
        held = cache.statistics().size
        outcome = await cache.outcome(prices, "a")
        source = "cache" if held else "primary"
        return outcome.source == source and len(asyncio.all_tasks()) == 1

    assert explore_cancellation(lambda: StaleCache(10, 10), scenario, is_whole) > 10


class Replicas:
    """Attempts that take so many seconds, one after the other; a negative time fails after it."""

    def __init__(self, *takes: float) -> None:
        self.takes = list(takes)
        self.started: list[float] = []
        self.cancelled: list[int] = []
        self.running = 0

    async def __call__(self) -> int:
        """Answer with the number of the attempt."""
        number = len(self.started)
        self.started.append(asyncio.get_running_loop().time())
        takes = self.takes[number] if number < len(self.takes) else 0.0
        self.running += 1
        try:
            await asyncio.sleep(abs(takes))
        except asyncio.CancelledError:
            await asyncio.sleep(0.25)  # it takes a while to clean up
            self.cancelled.append(number)
            raise
        finally:
            self.running -= 1
        if takes < 0:
            raise ConnectionError(f"attempt {number}")
        return number


async def elapsed(hedge: Hedge, replicas: Replicas) -> tuple[int, float]:
    """Return the answer and how long it took."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    return await hedge.call(replicas), loop.time() - start


async def test_a_quick_answer_is_not_hedged() -> None:
    """Within the delay there is one attempt."""
    hedge, replicas = Hedge(delay=1), Replicas(0.9)
    assert await elapsed(hedge, replicas) == (0, pytest.approx(0.9))
    assert len(replicas.started) == 1
    assert hedge.statistics().hedged == 0


async def test_a_late_answer_is_overtaken() -> None:
    """The second attempt wins; the first is cancelled and has ended before the answer is given."""
    hedge, replicas = Hedge(delay=1), Replicas(60, 0.5)
    assert await elapsed(hedge, replicas) == (1, pytest.approx(1.75))
    assert (replicas.cancelled, replicas.running, len(asyncio.all_tasks())) == ([0], 0, 1)
    assert (hedge.statistics().hedged, hedge.statistics().won) == (1, 1)


async def test_the_first_attempt_may_still_win() -> None:
    """The second attempt is the one that is cancelled then."""
    hedge, replicas = Hedge(delay=1), Replicas(1.5, 60)
    assert await elapsed(hedge, replicas) == (0, pytest.approx(1.75))
    assert replicas.cancelled == [1]
    assert (hedge.statistics().hedged, hedge.statistics().won) == (1, 0)


@pytest.mark.parametrize(("takes", "answer"), [((-1.2, 5), 1), ((5, -0.2), 0)])
async def test_a_failure_does_not_win_while_the_other_attempt_runs(
    takes: tuple[float, ...], answer: int
) -> None:
    """T44: the first to finish is not the winner when it failed."""
    replicas = Replicas(*takes)
    assert await Hedge(delay=1).call(replicas) == answer
    assert replicas.cancelled == []


async def test_when_both_fail_the_last_error_has_the_other_as_its_cause() -> None:
    """Nothing is lost, and nothing is logged about exceptions that nobody saw."""
    with pytest.raises(ConnectionError, match="attempt 0") as raised:
        await Hedge(delay=1).call(Replicas(-5, -1))
    assert str(raised.value.__cause__) == "attempt 1"


async def test_an_early_failure_is_raised_at_once() -> None:
    """To try again is the business of a retry."""
    hedge, replicas = Hedge(delay=1), Replicas(-0.5)
    with pytest.raises(ConnectionError):
        await hedge.call(replicas)
    assert len(replicas.started) == 1


@pytest.mark.parametrize("after", [0.5, 1.5])
async def test_an_outer_cancellation_reaps_both_attempts(after: float) -> None:
    """T44: when the cancelled call has ended, so have its attempts."""
    hedge, replicas = Hedge(delay=1), Replicas(60, 60)
    task = asyncio.create_task(hedge.call(replicas))
    await asyncio.sleep(after)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (replicas.running, len(asyncio.all_tasks())) == (0, 1)
    assert len(replicas.cancelled) == len(replicas.started)


async def test_a_second_cancellation_reaches_the_attempt_that_cleans_up() -> None:
    """As without a hedge: the cleanup is cut short, and the attempt has ended nevertheless."""
    hedge, replicas = Hedge(delay=1), Replicas(60, 0.5)
    task = asyncio.create_task(hedge.call(replicas))
    await asyncio.sleep(1.6)  # the second has won, the first cleans up
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (replicas.running, replicas.cancelled) == (0, [])


async def test_cancelled_by_a_deadline_the_deadline_is_told() -> None:
    """The attempts see the deadline around the call, and it ends them."""
    with pytest.raises(DeadlineExceeded):
        async with deadline(1.5):
            await Hedge(delay=1).call(Replicas(60, 60))
    assert len(asyncio.all_tasks()) == 1


async def test_an_attempt_that_cancels_itself_cancels_the_call() -> None:
    """A ``CancelledError`` out of the function passes through, as it would without a hedge."""

    async def quits() -> None:
        raise asyncio.CancelledError

    task = asyncio.create_task(Hedge(delay=1).call(quits))
    await asyncio.wait([task])
    assert task.cancelled()


async def test_the_budget_bounds_the_second_attempts() -> None:
    """A service that is slow for all does not get twice the load: ten, and one for ten calls."""
    hedge = Hedge(delay=0, budget=0.1)

    async def slow() -> None:
        await asyncio.sleep(1)

    for _ in range(100):
        await hedge.call(slow)
    statistics = hedge.statistics()
    assert (statistics.calls, statistics.hedged, statistics.refused) == (100, 19, 81)


async def test_a_retry_budget_may_be_the_budget() -> None:
    """One budget bounds retries and hedges together."""
    budget = RetryBudget(ratio=0.5, min_per_second=0.1, window=10)
    hedge, replicas = Hedge(delay=0, budget=budget), Replicas(*[1.0] * 9)
    for _ in range(3):
        await hedge.call(replicas)
    assert (budget.statistics().calls, budget.statistics().retries) == (3, 2)


@given(
    ratio=st.floats(0.01, 1),
    calls=st.lists(st.booleans(), max_size=300),
)
def test_the_budget_never_gives_more_than_its_share(ratio: float, calls: list[bool]) -> None:
    """After any calls, the second attempts are at most ten and the share of the calls."""
    share, hedged = _Share(ratio), 0
    for number, late in enumerate(calls, 1):
        share.deposit(0)
        hedged += late and share.withdraw(0)
        assert hedged <= 10 + ratio * number + 1e-6


@given(
    seconds=st.lists(st.floats(0, 1e6), min_size=1, max_size=250),
    percentile=st.floats(0.01, 0.99),
)
def test_the_percentile_is_that_of_the_last_hundred(
    seconds: list[float], percentile: float
) -> None:
    """The nearest rank of the last 100 latencies, however they came."""
    latencies = _Latencies()
    for value in seconds:
        latencies.add(value)
    last = sorted(seconds[-100:])
    assert latencies.at(percentile) == last[math.ceil(percentile * len(last) - 1e-9) - 1]


async def test_a_percentile_is_learned() -> None:
    """No second attempt before ten calls; then after the time that 95 of 100 calls take at most."""
    hedge = Hedge(percentile=0.9)
    assert await hedge.call(Replicas(5)) == 0
    assert hedge.statistics().delay is None
    for tenth in range(1, 10):
        await hedge.call(Replicas(tenth / 10))
    assert hedge.statistics().delay == pytest.approx(0.9)
    assert await elapsed(hedge, Replicas(60, 0.1)) == (1, pytest.approx(1.25))


async def test_overtaken_attempts_count_as_slow() -> None:
    """What the second attempt wins does not lower the percentile, or ever more would be hedged."""
    rng = random.Random(1)  # noqa: S311 -- no secret
    hedge = Hedge(percentile=0.95, budget=1)
    for _ in range(1000):
        first, second = (rng.uniform(0.1, 1.0) if rng.random() < 0.97 else 10.0 for _ in range(2))
        await hedge.call(Replicas(first, second))
    assert hedge.statistics().delay == pytest.approx(0.98, abs=0.05)
    assert 40 < hedge.statistics().hedged < 80


async def test_with_a_delay_a_percentile_begins_with_it() -> None:
    """Until ten latencies are known, ``delay`` counts."""
    hedge = Hedge(delay=2, percentile=0.5)
    assert hedge.statistics().delay == 2
    for _ in range(10):
        await hedge.call(Replicas(1))
    assert hedge.statistics().delay == pytest.approx(1)


async def test_a_hedge_tells_of_second_attempts() -> None:
    """A listener hears when a second attempt begins and which one wins."""
    heard: list[Any] = []
    hedge = Hedge(delay=1)
    hedge.on_event = lambda kind, data: heard.append((kind, *data.values()))
    await hedge.call(Replicas(60, 0.5))
    await hedge.call(Replicas(1.5, 60))
    await hedge.call(Replicas(0.5))
    started = ("hedge.started", 1.0)
    assert heard == [started, ("hedge.won", "second"), started, ("hedge.won", "first")]


def test_a_hedge_decorates_and_serves_three_loops() -> None:
    """T34: made once, it serves one event loop after the other."""
    hedge = Hedge(delay=0.1)

    @hedge
    async def answer(number: int) -> int:
        await asyncio.sleep(0.2)
        return number

    assert answer.__name__ == "answer"
    assert [run_virtual(answer(number)) for number in range(3)] == [0, 1, 2]
    assert repr(Hedge(percentile=0.95)) == "Hedge(percentile=0.95, budget=0.1)"


def test_no_cancellation_leaves_an_attempt_running() -> None:
    """T2, T44: whichever task is cancelled at whichever step, no attempt goes on."""
    made: list[Replicas] = []

    def make() -> Hedge:
        made.append(Replicas(3, 2))
        return Hedge(delay=1)

    async def scenario(hedge: Hedge) -> None:
        await hedge.call(made[-1])

    def is_still(_: Hedge) -> bool:
        return made[-1].running == 0

    assert explore_cancellation(make, scenario, is_still) > 5


def test_failures_leave_no_garbage() -> None:
    """What failed is freed at once: no cycle waits for the garbage collector."""

    class MarkedError(ConnectionError):
        alive = 0

        def __init__(self) -> None:
            MarkedError.alive += 1

        def __del__(self) -> None:
            MarkedError.alive -= 1

    async def fail() -> None:
        await asyncio.sleep(0.1)
        raise MarkedError

    async def main() -> int:
        left, cache = 0, StaleCache(1, 1)
        calls = [policy.call for policy in (cache, Hedge(delay=0.05), Fallback(fail))]
        for call in [*calls, functools.partial(cache.call, calls[0])]:
            with contextlib.suppress(MarkedError):
                await call(fail)
            await asyncio.sleep(0)
            left += MarkedError.alive
        return left

    gc.collect()
    gc.disable()
    try:
        assert run_virtual(main()) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StaleCache(-1, 1), ValueError, "ttl must be 0 or more, got -1"),
        (lambda: StaleCache(1, math.inf), ValueError, "stale_ttl must be finite, got inf"),
        (lambda: StaleCache(0, 0), ValueError, "nothing would ever be kept"),
        (lambda: StaleCache(1, 1, 0), ValueError, "max_size must be at least 1, got 0"),
        (lambda: StaleCache(1, 1, key="id"), TypeError, "key must be a function, got 'id'"),
        (lambda: StaleCache(1, 1, on=BaseException), TypeError, "on must be an Exception"),
        (lambda: StaleCache(1, 1)(time.time), TypeError, "fn must be an async function"),
        (Hedge, ValueError, "delay or percentile must be given"),
        (lambda: Hedge(delay=-1), ValueError, "delay must be 0 or more, got -1"),
        (lambda: Hedge(percentile=95), ValueError, "percentile must be below 1, got 95"),
        (lambda: Hedge(percentile=math.nan), ValueError, "percentile must be finite, got nan"),
        (lambda: Hedge(delay=1, budget=0), ValueError, "budget must be above 0, got 0"),
        (lambda: Hedge(delay=1, budget="10%"), TypeError, "budget must be a number or have"),
        (lambda: Hedge(delay=1)(time.time), TypeError, "fn must be an async function"),
    ],
)
def test_bad_arguments_of_cache_and_hedge_are_refused_when_made(
    make: Any, error: type[Exception], message: str
) -> None:
    """Each bad argument is named."""
    with pytest.raises(error, match=message):
        make()
