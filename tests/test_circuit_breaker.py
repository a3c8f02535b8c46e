"""A service that keeps failing is left alone, and asked again by a few probes."""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import itertools
import re
import sys
import threading
import time
import traceback
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from concurrency_patterns.circuit_breaker import (
    TRANSITIONS,
    AnyOf,
    Circuit,
    CircuitBreaker,
    CircuitBreakers,
    CircuitBreakersStatistics,
    CircuitEvent,
    CircuitOpen,
    CircuitState,
    Consecutive,
    FailureRate,
    Permit,
    SlowCallRate,
)
from concurrency_patterns.errors import LocalRejection, RateLimitExceeded
from concurrency_patterns.retry import Exponential
from concurrency_patterns.testing import explore_cancellation, run_virtual

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class Service:
    """A service that works or not, as it is told, and counts what reaches it."""

    def __init__(self, works: bool = False, takes: float = 0.0) -> None:
        self.works, self.takes = works, takes
        self.called = 0

    async def __call__(self) -> str:
        """Answer or fail."""
        self.called += 1
        if self.takes:
            await asyncio.sleep(self.takes)
        if not self.works:
            raise ConnectionError("down")
        return "answer"


async def trip(breaker: CircuitBreaker, failures: int = 5) -> None:
    """Open the circuit."""
    for _ in range(failures):
        with pytest.raises(ConnectionError):
            await breaker.call(Service())


async def half_open(breaker: CircuitBreaker) -> None:
    """Open the circuit and wait until it is half-open."""
    await trip(breaker)
    await asyncio.sleep(30)


async def test_goes_through_all_three_states_with_the_chapters_numbers() -> None:
    """5 failures open it, after 30 s it is half-open, 3 successes close it."""
    breaker, service = CircuitBreaker(), Service()
    seen = [breaker.state]
    await trip(breaker)
    seen.append(breaker.state)
    await asyncio.sleep(29.9)
    seen.append(breaker.state)
    await asyncio.sleep(0.1)
    seen.append(breaker.state)
    service.works = True
    for _ in range(3):
        assert await breaker.call(service) == "answer"
        seen.append(breaker.state)
    assert seen == [CLOSED, OPEN, OPEN, HALF_OPEN, HALF_OPEN, HALF_OPEN, CLOSED]


async def test_the_failures_must_follow_each_other() -> None:
    """A success between the failures starts the count anew."""
    breaker, service = CircuitBreaker(failures=2), Service(works=True)
    for _ in range(5):
        await trip(breaker, 1)
        await breaker.call(service)
    assert breaker.state is CLOSED


async def test_an_open_circuit_calls_nobody() -> None:
    """Refused calls take no time and do not reach the service; the error says when to come back."""
    breaker, service = CircuitBreaker(), Service()
    await trip(breaker)
    await asyncio.sleep(10)
    with pytest.raises(CircuitOpen, match=r"open for another 20\.0 s") as refused:
        await breaker.call(service)
    assert service.called == 0
    assert refused.value.retry_after == pytest.approx(20)


async def test_a_call_after_retry_after_is_let_through() -> None:
    """Whoever waits as long as he is told is not refused again."""
    breaker = CircuitBreaker(open_for=0.3)
    await trip(breaker)
    await asyncio.sleep(0.1)
    with pytest.raises(CircuitOpen) as refused:
        await breaker.call(Service())
    assert refused.value.retry_after is not None
    await asyncio.sleep(refused.value.retry_after)
    assert await breaker.call(Service(works=True)) == "answer"


async def test_one_failed_probe_opens_it_again_for_the_whole_time() -> None:
    """A failure while half-open reopens the circuit, and the waiting begins anew."""
    breaker = CircuitBreaker()
    await half_open(breaker)
    await breaker.call(Service(works=True))
    await trip(breaker, 1)
    assert breaker.state is OPEN
    assert breaker.statistics().retry_after == pytest.approx(30)
    assert breaker.statistics().opened == 2


async def test_half_open_lets_exactly_the_probes_through() -> None:
    """T18: of ten callers at once, three reach the service; the others are refused."""
    breaker, service = CircuitBreaker(), Service(works=True, takes=1)
    await half_open(breaker)
    results = await asyncio.gather(
        *(breaker.call(service) for _ in range(10)), return_exceptions=True
    )
    assert service.called == 3
    assert [isinstance(result, CircuitOpen) for result in results] == [False] * 3 + [True] * 7
    assert breaker.state is CLOSED


async def test_not_more_probes_than_successes_are_missing() -> None:
    """T18: the calls that get through before the circuit closes are never more than the probes."""
    breaker, service = CircuitBreaker(), Service(works=True, takes=1)
    await half_open(breaker)
    await breaker.call(Service(works=True))
    results = await asyncio.gather(
        *(breaker.call(service) for _ in range(10)), return_exceptions=True
    )
    assert service.called == 2
    assert sum(isinstance(result, CircuitOpen) for result in results) == 8


async def test_a_late_success_does_not_close_an_open_circuit() -> None:
    """T19: a call that began while closed and succeeds while open changes nothing."""
    breaker = CircuitBreaker()
    slow = asyncio.create_task(breaker.call(Service(works=True, takes=5)))
    await asyncio.sleep(0)
    await trip(breaker)
    assert await slow == "answer"
    assert breaker.state is OPEN
    assert breaker.statistics().late == 1


async def test_late_failures_do_not_prolong_the_open_time() -> None:
    """T19: calls that began while closed and fail while open do not delay the probes."""
    breaker = CircuitBreaker()
    slow = asyncio.create_task(breaker.call(Service(takes=25)))
    await asyncio.sleep(0)
    await trip(breaker)
    with pytest.raises(ConnectionError):
        await slow
    await asyncio.sleep(5)
    assert breaker.state is HALF_OPEN


@pytest.mark.parametrize("works", [True, False])
async def test_late_results_are_no_probes(works: bool) -> None:
    """T19: a call that began while closed neither closes nor reopens a half-open circuit."""
    breaker = CircuitBreaker(probes=1)
    slow = asyncio.create_task(breaker.call(Service(works=works, takes=31)))
    await asyncio.sleep(0)
    await half_open(breaker)
    probe = asyncio.create_task(breaker.call(Service(works=True, takes=5)))
    await asyncio.wait([slow])
    slow.exception()
    assert breaker.state is HALF_OPEN
    await probe
    assert breaker.state is CLOSED


async def test_a_probe_of_an_older_half_open_era_does_not_count() -> None:
    """T19: it neither frees a place it does not hold nor helps to close the circuit."""
    breaker = CircuitBreaker(probes=2)
    await half_open(breaker)
    old = asyncio.create_task(breaker.call(Service(works=True, takes=35)))
    await asyncio.sleep(0)
    await half_open_again(breaker)
    new = asyncio.create_task(breaker.call(Service(works=True, takes=10)))
    await old
    assert breaker.state is HALF_OPEN
    assert breaker.statistics().probes_out == 1
    await new
    assert breaker.state is HALF_OPEN


async def half_open_again(breaker: CircuitBreaker) -> None:
    """Fail one probe and wait until the circuit is half-open once more."""
    await trip(breaker, 1)
    await asyncio.sleep(30)


async def test_a_failure_of_an_older_closed_era_does_not_count() -> None:
    """T19: after the circuit has closed again, old failures are not added to the new ones."""
    breaker = CircuitBreaker()
    old = [asyncio.create_task(breaker.call(Service(takes=40))) for _ in range(5)]
    await asyncio.sleep(0)
    await half_open(breaker)
    for _ in range(3):
        await breaker.call(Service(works=True))
    await asyncio.gather(*old, return_exceptions=True)
    assert breaker.state is CLOSED
    assert breaker.statistics().late == 5


async def test_a_cancelled_probe_gives_its_place_back() -> None:
    """T20: the next caller takes the place; the circuit stays half-open."""
    breaker = CircuitBreaker(probes=1)
    await half_open(breaker)
    probe = asyncio.create_task(breaker.call(Service(takes=60)))
    await asyncio.sleep(1)
    probe.cancel()
    await asyncio.wait([probe])
    assert breaker.state is HALF_OPEN
    assert await breaker.call(Service(works=True)) == "answer"
    assert breaker.state is CLOSED


async def test_an_ignored_probe_gives_its_place_back() -> None:
    """T20: an exception that counts as nothing frees the place."""
    breaker = CircuitBreaker(probes=1, ignore=KeyError)
    await half_open(breaker)
    with pytest.raises(KeyError):
        async with breaker:
            raise KeyError("not found")
    assert breaker.state is HALF_OPEN
    assert breaker.statistics().probes_out == 0


async def test_a_probe_that_hangs_loses_its_place() -> None:
    """T20: after the probe's time another caller is let through; the hung one counts no more."""
    breaker, hung = CircuitBreaker(probes=1, probe_timeout=10), Service(takes=100)
    await half_open(breaker)
    probe = asyncio.create_task(breaker.call(hung))
    await asyncio.sleep(9)
    with pytest.raises(CircuitOpen, match="all its probes are out") as refused:
        await breaker.call(Service(works=True))
    assert refused.value.retry_after == pytest.approx(1)
    await asyncio.sleep(1)
    await breaker.call(Service(works=True))
    assert breaker.state is CLOSED
    with pytest.raises(ConnectionError):
        await probe
    assert breaker.statistics().late == 1


async def test_a_hung_probe_may_hang_as_long_as_the_circuit_was_open() -> None:
    """T20: the probe's time is ``open_for`` unless told otherwise."""
    breaker = CircuitBreaker(open_for=7, probes=1)
    await trip(breaker)
    await asyncio.sleep(7)
    probe = asyncio.create_task(breaker.call(Service(takes=1000)))
    await asyncio.sleep(7)
    await breaker.call(Service(works=True))
    assert breaker.state is CLOSED
    probe.cancel()


async def test_cancelled_calls_are_neither_failures_nor_successes() -> None:
    """T21: cancelled calls do not open the circuit and do not break a row of failures."""
    breaker = CircuitBreaker(on=BaseException)
    await trip(breaker, 4)
    tasks = [asyncio.create_task(breaker.call(Service(takes=9))) for _ in range(20)]
    await asyncio.sleep(1)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert breaker.state is CLOSED
    assert breaker.statistics().ignored == 20
    await trip(breaker, 1)
    assert breaker.state is OPEN


async def disguise() -> None:
    """Turn a cancellation into an error of one's own, as some clients do."""
    try:
        await asyncio.sleep(9)
    except asyncio.CancelledError:
        raise ConnectionError("closed") from None


async def disguise_in_group() -> None:
    """Do so in a task of a group."""
    async with asyncio.TaskGroup() as group:
        group.create_task(disguise())


@pytest.mark.parametrize("fn", [disguise, disguise_in_group])
async def test_a_cancellation_in_disguise_does_not_count(fn: Any) -> None:
    """T21: what a function makes of its cancellation tells as little as the cancellation."""
    breaker = CircuitBreaker(failures=1)
    task = asyncio.create_task(breaker.call(fn))
    await asyncio.sleep(1)
    task.cancel()
    with suppress(ConnectionError, ExceptionGroup):
        await task
    assert (breaker.state, breaker.statistics().ignored) == (CLOSED, 1)


async def fail_in_group() -> None:
    """Have a task group whose child fails while the parent waits for it."""
    async with asyncio.TaskGroup() as group:
        group.create_task(Service(takes=1)())
        group.create_task(disguise())


async def test_a_failed_task_group_counts() -> None:
    """T21: a group cancels its own tasks when one fails; nobody has cancelled the call."""
    breaker = CircuitBreaker(failures=2)
    with pytest.raises(ExceptionGroup):
        await breaker.call(fail_in_group)
    await trip(breaker, 1)
    assert breaker.state is OPEN


@pytest.mark.skipif(
    sys.version_info < (3, 11, 3), reason="a failed group keeps later timeouts from their end"
)
async def test_a_timeout_behind_a_failed_task_group_counts() -> None:
    """T21: the mark that a failed group leaves on its task before 3.13 is no cancellation."""
    breaker = CircuitBreaker(failures=1)
    with pytest.raises(ExceptionGroup):
        await fail_in_group()
    with pytest.raises(TimeoutError):
        async with breaker, asyncio.timeout(1):
            await asyncio.sleep(9)
    assert breaker.state is OPEN


async def test_a_timeout_inside_counts_and_one_outside_does_not() -> None:
    """T21: the caller's deadline says nothing about the service, the timeout of a call does."""
    breaker = CircuitBreaker(failures=1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await breaker.call(Service(takes=9))
    assert breaker.state is CLOSED
    with pytest.raises(TimeoutError):
        async with breaker, asyncio.timeout(1):
            await asyncio.sleep(9)
    assert breaker.state is OPEN


async def test_each_rejection_is_a_fresh_error_caused_by_the_last_failure() -> None:
    """T22: 1000 rejections share no instance, and their tracebacks do not grow."""
    breaker = CircuitBreaker()
    await trip(breaker, 4)
    last = ConnectionError("the last one")
    with pytest.raises(ConnectionError):
        async with breaker:
            raise last
    refused = []
    for _ in range(1000):
        try:
            await breaker.call(Service())
        except CircuitOpen as error:
            refused.append(error)
    assert len({id(error) for error in refused}) == 1000
    assert {error.__cause__ for error in refused} == {last}
    depths = {len(traceback.extract_tb(error.__traceback__)) for error in refused}
    assert len(depths) == 1
    assert len(traceback.extract_tb(last.__traceback__)) <= 2


async def test_a_refusal_is_gone_when_it_was_handled() -> None:
    """T22: no frame that it left keeps it alive until the next garbage collection."""
    breaker = CircuitBreaker()
    breaker.isolate()
    gc.disable()
    try:
        with pytest.raises(CircuitOpen) as refused:
            await breaker.call(Service())
        gone = weakref.ref(refused.value)
        del refused
        assert gone() is None
    finally:
        gc.enable()


async def test_the_call_that_opens_the_circuit_raises_its_own_exception() -> None:
    """T23: the caller sees what the service said, the very instance."""
    breaker, own = CircuitBreaker(failures=1), ConnectionError("mine")

    async def fail() -> None:
        raise own

    with pytest.raises(ConnectionError) as raised:
        await breaker.call(fail)
    assert raised.value is own
    assert breaker.state is OPEN


@pytest.mark.parametrize("error", [RateLimitExceeded("no"), LocalRejection(), CircuitOpen("inner")])
async def test_local_rejections_do_not_count(error: LocalRejection) -> None:
    """T30: a full limiter inside the breaker tells nothing about the service."""
    breaker = CircuitBreaker(failures=1, on=(Exception, LocalRejection))
    for _ in range(3):
        with pytest.raises(LocalRejection):
            async with breaker:
                raise error
    assert breaker.state is CLOSED
    assert breaker.statistics().ignored == 3


async def test_an_exception_group_counts_by_its_leaves() -> None:
    """A group counts if one failure is in it, not if it is all rejections and cancellations."""
    breaker = CircuitBreaker(failures=1, on=ConnectionError)
    with pytest.raises(BaseExceptionGroup):
        async with breaker:
            raise BaseExceptionGroup("", [RateLimitExceeded(), asyncio.CancelledError()])
    assert breaker.state is CLOSED
    with pytest.raises(ExceptionGroup):
        async with breaker:
            raise ExceptionGroup("", [ExceptionGroup("", [ConnectionError()]), RateLimitExceeded()])
    assert breaker.state is OPEN


async def test_only_the_named_exceptions_count() -> None:
    """``on`` names what counts, ``ignore`` what does not; ignored ones break no row."""
    breaker = CircuitBreaker(failures=2, on=OSError, ignore=(FileNotFoundError,))
    for error in (ConnectionError(), FileNotFoundError(), ValueError()):
        with pytest.raises(type(error)):
            async with breaker:
                raise error
    assert breaker.state is CLOSED
    await trip(breaker, 1)
    assert breaker.state is OPEN


async def test_results_may_count_as_failures() -> None:
    """A result that ``is_failure`` names is returned, and counted as a failure."""
    breaker = CircuitBreaker(failures=2, is_failure=lambda status: status >= 500)

    async def answer(status: int) -> int:
        return status

    assert [await breaker.call(answer, status) for status in (500, 200, 503, 503)] == [
        *(500, 200, 503, 503)
    ]
    assert breaker.state is OPEN
    with pytest.raises(CircuitOpen) as refused:
        await breaker.call(answer, 200)
    assert refused.value.__cause__ is None


async def test_a_probe_whose_result_cannot_be_judged_gives_its_place_back() -> None:
    """When ``is_failure`` raises, the caller sees it, and no place is lost."""
    breaker = CircuitBreaker(probes=1, is_failure=lambda result: len(result) / 0)
    await half_open(breaker)
    with pytest.raises(ZeroDivisionError):
        await breaker.call(Service(works=True))
    assert breaker.statistics().probes_out == 0
    assert breaker.state is HALF_OPEN


async def test_decorates_async_def() -> None:
    """The decorated coroutine function keeps its name and its arguments."""
    breaker = CircuitBreaker(failures=1)

    @breaker
    async def divide(a: int, *, by: int) -> float:
        return a / by

    assert divide.__name__ == "divide"
    assert await divide(6, by=3) == 2
    with pytest.raises(ZeroDivisionError):
        await divide(1, by=0)
    with pytest.raises(CircuitOpen):
        await divide(6, by=3)


def test_decorates_plain_def() -> None:
    """A plain function is guarded too, without an event loop."""
    breaker = CircuitBreaker(failures=1)

    @breaker
    def divide(a: int, *, by: int) -> float:
        return a / by

    assert divide(6, by=3) == 2
    with pytest.raises(ZeroDivisionError):
        divide(1, by=0)
    with pytest.raises(CircuitOpen):
        divide(6, by=3)
    assert breaker.statistics().rejected == 1


async def test_decorates_partials_and_callable_objects() -> None:
    """What is asynchronous by its ``__call__`` or under a partial is guarded as such."""
    for fn in (Service(), functools.partial(Service().__call__)):
        breaker = CircuitBreaker(failures=1)
        with pytest.raises(ConnectionError):
            await breaker(fn)()
        assert breaker.state is OPEN


async def test_a_plain_function_that_returns_an_awaitable_is_refused() -> None:
    """It would run out of the breaker's sight; that is an error, but none of the service's."""
    breaker = CircuitBreaker(failures=1)

    def fetch() -> object:
        return Service()()

    guarded = breaker(fetch)
    with pytest.raises(TypeError, match="returns an awaitable"):
        guarded()
    assert breaker.state is CLOSED


def test_a_generator_cannot_be_guarded() -> None:
    """A generator fails while it is iterated, so decorating one is refused."""

    def generate() -> object:
        yield

    async def generate_async() -> object:
        yield

    for fn in (generate, generate_async):
        with pytest.raises(TypeError, match="generator"):
            CircuitBreaker()(fn)


def test_with_guards_a_block_in_plain_code() -> None:
    """``with breaker`` counts the block's exception, and refuses to enter when open."""
    breaker = CircuitBreaker(failures=1)
    with pytest.raises(ConnectionError), breaker:
        raise ConnectionError
    with pytest.raises(CircuitOpen), breaker:
        pytest.fail("not reached")


async def test_blocks_of_several_tasks_keep_their_own_permits() -> None:
    """T19: in ``async with`` too, a block that began in an older era changes nothing."""
    breaker = CircuitBreaker(probes=2)

    async def block(seconds: float) -> None:
        async with breaker:
            await asyncio.sleep(seconds)

    old = asyncio.create_task(block(35))
    await asyncio.sleep(0)
    await half_open(breaker)
    probe = asyncio.create_task(block(10))
    await old
    assert breaker.statistics().probes_out == 1
    await probe
    assert breaker.state is HALF_OPEN
    await block(0)
    assert breaker.state is CLOSED


async def test_blocks_may_be_nested() -> None:
    """An inner block is a call of its own, also with another breaker around it."""
    inner, outer = CircuitBreaker(), CircuitBreaker()
    async with outer, inner, outer:
        pass
    assert outer.statistics().succeeded == 2
    assert inner.statistics().succeeded == 1


async def test_blocks_may_end_in_any_order() -> None:
    """T19: each end belongs to the breaker's own beginning, also when the outer one ends first."""
    one, other = CircuitBreaker(failures=1), CircuitBreaker(failures=1)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    one.__exit__(ValueError, ValueError(), None)  # never entered: too late to matter
    other.__exit__(ConnectionError, ConnectionError(), None)
    assert (one.state, other.state) == (CLOSED, OPEN)
    assert (one.statistics().succeeded, one.statistics().late) == (1, 1)


async def test_a_task_begun_in_a_block_does_not_end_it() -> None:
    """T19: it inherits the context, but its own blocks only are its own to end."""
    breaker = CircuitBreaker(failures=1)

    async def child() -> None:
        async with breaker:
            await asyncio.sleep(2)

    async with breaker:
        task = asyncio.create_task(child())
        await asyncio.sleep(1)
        breaker.reset()  # a new era: the parent's and the child's blocks are late
        async with breaker:
            pass
        await task
    assert (breaker.statistics().succeeded, breaker.statistics().late) == (3, 2)


async def test_a_probe_that_ends_in_another_task_keeps_its_place_for_its_time() -> None:
    """T20: the block that ends is not the one that began, so the place comes back by time only."""
    breaker = CircuitBreaker(probes=1, probe_timeout=10)
    await half_open(breaker)
    await asyncio.create_task(breaker.__aenter__())
    await asyncio.create_task(breaker.__aexit__(None, None, None))
    assert (breaker.statistics().probes_out, breaker.statistics().late) == (1, 1)
    await asyncio.sleep(10)
    await breaker.call(Service(works=True))
    assert breaker.state is CLOSED


async def test_blocks_in_callbacks_of_the_loop_are_no_tasks() -> None:
    """Where there is no task, a plain block belongs to the thread."""
    breaker, done = CircuitBreaker(), asyncio.Event()

    def callback() -> None:
        with breaker, breaker:
            done.set()

    asyncio.get_running_loop().call_soon(callback)
    await done.wait()
    assert breaker.statistics().succeeded == 2


async def test_isolated_by_hand_it_stays_open_until_reset() -> None:
    """``isolate`` refuses all calls for any time, ``reset`` lets them through again."""
    breaker, service = CircuitBreaker(), Service(works=True)
    breaker.isolate()
    await asyncio.sleep(3600)
    with pytest.raises(CircuitOpen, match="until it is reset") as refused:
        await breaker.call(service)
    assert refused.value.retry_after is None
    assert breaker.statistics().isolated
    breaker.reset()
    assert await breaker.call(service) == "answer"
    assert breaker.state is CLOSED


async def test_reset_forgets_the_failures() -> None:
    """After a reset the count begins at nothing."""
    breaker = CircuitBreaker()
    await trip(breaker, 4)
    breaker.reset()
    await trip(breaker, 4)
    assert breaker.state is CLOSED


async def test_failure_rate_sees_what_failures_in_a_row_miss() -> None:
    """A service that fails every second time opens the circuit by its rate."""
    row, rate = CircuitBreaker(), CircuitBreaker(trip=FailureRate(0.5, window=10))
    for number in range(10):
        assert rate.state is CLOSED
        for breaker in (row, rate):
            await asyncio.gather(
                breaker.call(Service(works=number % 2 == 0)), return_exceptions=True
            )
    assert (row.state, rate.state) == (CLOSED, OPEN)


@given(st.integers(1, 1000), st.data())
def test_a_rate_of_exactly_the_limit_opens(calls: int, data: st.DataObject) -> None:
    """If k of n calls fail, a limit of k/n is reached, and one of (k + 1)/n is not."""
    bad = data.draw(st.integers(1, calls))
    for limit, reached in ((bad / calls, True), (min(1.0, (bad + 1) / calls), bad == calls)):
        for window in ({"window": calls}, {"seconds": 9, "least": calls}):
            tally = FailureRate(limit, **window).tally()
            trips = [tally.record(number < bad, 0.0) for number in range(calls)]
            assert trips == [*[False] * (calls - 1), reached]


@pytest.mark.parametrize(("limit", "window"), [(0.07, 100), (0.14, 50), (0.28, 25), (0.55, 100)])
def test_a_rate_is_what_its_decimals_say(limit: float, window: int) -> None:
    """7 bad calls of 100 are 0.07, though the product of the two is not 7 in binary."""
    tally, bad = FailureRate(limit, window=window).tally(), round(limit * window)
    assert [tally.record(number < bad, 0.0) for number in range(window)][-1]


def test_failure_rate_waits_for_enough_calls_and_forgets_old_ones() -> None:
    """The rate means nothing below ``least`` calls, and looks at the last ``window`` only."""
    tally = FailureRate(0.5, window=4, least=3).tally()
    assert [tally.record(failed, 0.0) for failed in (True, True)] == [False, False]
    assert tally.record(True, 0.0)
    tally = FailureRate(0.5, window=4).tally()
    calls = [True, False, False, False, True, False, True]
    assert [tally.record(failed, 0.0) for failed in calls] == [False] * 6 + [True]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"failures": 0}, ValueError, "failures must be at least 1, got 0"),
        ({"failures": 2.5}, TypeError, "failures must be an int"),
        ({"open_for": 0}, ValueError, "open_for must be above 0, got 0"),
        ({"open_for": float("nan")}, ValueError, "open_for must be finite"),
        ({"open_for": float("inf")}, ValueError, "open_for must be finite"),
        ({"probes": -1}, ValueError, "probes must be at least 1, got -1"),
        ({"probe_timeout": -1}, ValueError, "probe_timeout must be above 0"),
        ({"on": 5}, TypeError, "on must be an exception type"),
        ({"ignore": (ValueError, "KeyError")}, TypeError, "ignore must be an exception type"),
        ({"is_failure": 500}, TypeError, "is_failure must be callable, got 500"),
        ({"trip": 0.5}, TypeError, "trip must be a trip rule"),
        ({"open_for": ()}, ValueError, "open_for must not be empty"),
        ({"open_for": (5, 0)}, ValueError, "open_for must be above 0, got 0"),
        ({"open_for": "30"}, TypeError, "open_for must be a number, got '3'"),
        ({"max_retry_after": 0}, ValueError, "max_retry_after must be above 0"),
        ({"shadow": "no"}, TypeError, "shadow must be a bool, got 'no'"),
    ],
)
def test_bad_arguments_are_refused_when_made(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    """Each bad argument is named with its value."""
    with pytest.raises(error, match=message):
        CircuitBreaker(**options)  # type: ignore[arg-type] -- bad on purpose


@pytest.mark.parametrize(
    "options",
    [
        *({"rate": 0}, {"rate": 1.1}, {"window": 0}, {"least": 0}, {"window": 3, "least": 4}),
        *({"seconds": 0}, {"seconds": 5, "window": 20}, {"least": 21}),
    ],
)
def test_a_bad_failure_rate_is_refused(options: dict[str, float]) -> None:
    """A rate is above 0 and at most 1; the least number of calls fits the window."""
    with pytest.raises(ValueError, match="must be"):
        FailureRate(**{"rate": 0.5, **options})  # type: ignore[arg-type] -- bad on purpose
    with pytest.raises(ValueError, match="must be"):
        SlowCallRate(**{"rate": 0.5, "slower_than": 1, **options})  # type: ignore[arg-type]


def test_a_bad_rule_is_refused() -> None:
    """Slow is longer than some time, and a combination has rules in it."""
    with pytest.raises(ValueError, match="slower_than must be above 0"):
        SlowCallRate(0.5, slower_than=0)
    with pytest.raises(ValueError, match="rules must not be empty"):
        AnyOf()
    with pytest.raises(TypeError, match="rules must be a trip rule"):
        Consecutive(1) | 5  # type: ignore[operator] -- bad on purpose


def test_made_at_import_and_used_on_three_loops() -> None:
    """T34: it needs no loop to be made; what it knows stays when the loop is gone."""
    breaker = CircuitBreaker()

    async def one_failure() -> CircuitState:
        await trip(breaker, 2)
        return breaker.state

    assert [run_virtual(one_failure()) for _ in range(2)] == [CLOSED, CLOSED]
    run_virtual(trip(breaker, 1))
    assert breaker.statistics().opened == 1


def test_a_clock_that_goes_back_does_not_keep_it_open_for_ever() -> None:
    """T8: on a clock that shows less, the waiting begins anew; it never grows."""
    circuit = Circuit(Consecutive(1), open_for=30, probes=1, probe_timeout=10)
    permit = circuit.admit(9000)
    assert permit is not None
    circuit.fail(permit, 9000, None)
    assert circuit.admit(10) is None
    assert circuit.retry_after(10) == 30
    assert circuit.admit(39) is None
    assert circuit.admit(40) is not None
    assert circuit.admit(3) is None
    assert circuit.admit(12) is None
    assert circuit.admit(13) is not None


def test_threads_are_not_held_up_by_each_other() -> None:
    """The breaker's lock is not held while the call runs."""
    breaker, inside = CircuitBreaker(), threading.Barrier(4, timeout=30)
    threads = [threading.Thread(target=breaker(inside.wait)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert breaker.statistics().succeeded == 4


def test_threads_change_the_state_one_at_a_time() -> None:
    """T19: no two threads are ever inside the state machine, which is not made for that."""
    breaker = CircuitBreaker(trip=FailureRate(1, window=3), open_for=0.001)
    inside, overlaps, seen = 0, 0, set()

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal inside, overlaps
            seen.add(name)
            overlaps += inside
            inside += 1
            time.sleep(0.0002)  # others get their turn here
            result = method(*args)
            inside -= 1
            return result

        return call

    changes = ("admit", "succeed", "fail", "give_back", "isolate", "reset")
    for name in changes:
        setattr(breaker._circuit, name, watched(name, getattr(breaker._circuit, name)))

    def use() -> None:
        for number in range(40):
            with suppress(ConnectionError, LocalRejection), breaker:
                if number % 4:
                    raise RateLimitExceeded if number % 4 == 1 else ConnectionError
            if number % 10 == 9:
                breaker.isolate()
                breaker.reset()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == 0
    assert seen == set(changes)


def test_of_many_threads_exactly_the_probes_get_through() -> None:
    """T18: threads too are let through up to the number of the probes."""
    breaker = CircuitBreaker(failures=1, open_for=0.01, probes=3)
    with pytest.raises(ConnectionError), breaker:
        raise ConnectionError
    while breaker.state is OPEN:
        time.sleep(0.001)
    release, reached, refused = threading.Event(), [], []

    def call() -> None:
        try:
            with breaker:
                reached.append(1)
                release.wait(30)
        except CircuitOpen:
            refused.append(1)

    breaker._circuit.probe_timeout = 30  # the threads may take their time to start
    threads = [threading.Thread(target=call) for _ in range(20)]
    for thread in threads:
        thread.start()
    while len(reached) + len(refused) < 20:
        time.sleep(0.001)
    release.set()
    for thread in threads:
        thread.join()
    assert (len(reached), len(refused)) == (3, 17)
    assert breaker.state is CLOSED


def test_no_cancellation_loses_a_place() -> None:
    """T2: whichever probe is cancelled at whichever step, all places come back."""

    async def scenario(breaker: CircuitBreaker) -> None:
        await half_open(breaker)
        async with asyncio.TaskGroup() as group:
            for works in (True, True, False):
                group.create_task(breaker.call(Service(works=works, takes=1)))
            group.create_task(probe_in_block(breaker))

    async def probe_in_block(breaker: CircuitBreaker) -> None:
        async with breaker:
            await asyncio.sleep(0.5)

    async def is_usable(breaker: CircuitBreaker) -> bool:
        await asyncio.sleep(30)
        for _ in range(3):
            await breaker.call(Service(works=True))
        return breaker.state is CLOSED and breaker.statistics().probes_out == 0

    def make() -> CircuitBreaker:  # no place comes back because its time is over
        return CircuitBreaker(probe_timeout=3600)

    assert explore_cancellation(make, scenario, is_usable) > 20


async def test_statistics_count_each_call_once() -> None:
    """Every call is a success, a failure, ignored or rejected."""
    breaker = CircuitBreaker()
    await breaker.call(Service(works=True))
    await trip(breaker)
    with pytest.raises(CircuitOpen):
        await breaker.call(Service())
    statistics = breaker.statistics()
    assert (statistics.succeeded, statistics.failed, statistics.rejected) == (1, 5, 1)
    assert (statistics.state, statistics.opened, statistics.ignored) == (OPEN, 1, 0)
    assert isinstance(statistics.last_failure, ConnectionError)


async def test_the_last_failure_is_forgotten_when_it_closes() -> None:
    """A closed circuit keeps no exception, and none of the frames behind it, alive."""
    breaker = CircuitBreaker(probes=1)
    await half_open(breaker)
    await breaker.call(Service(works=True))
    assert breaker.statistics().last_failure is None


def test_the_repr_shows_the_settings() -> None:
    """What a log prints tells how the breaker is set."""
    assert repr(CircuitBreaker()) == "CircuitBreaker(failures=5, open_for=30.0, probes=3)"
    assert "FailureRate(rate=0.5" in repr(CircuitBreaker(trip=FailureRate(0.5)))


def test_the_table_leads_out_of_every_state() -> None:
    """Each state can be isolated and reset, and no state is a trap."""
    for state in CircuitState:
        assert TRANSITIONS[state, CircuitEvent.ISOLATED] is OPEN
        assert TRANSITIONS[state, CircuitEvent.RESET] is CLOSED
    natural = {
        (state, event, to)
        for (state, event), to in TRANSITIONS.items()
        if event not in {CircuitEvent.ISOLATED, CircuitEvent.RESET}
    }
    assert natural == {
        (CLOSED, CircuitEvent.TRIPPED, OPEN),
        (OPEN, CircuitEvent.WAITED, HALF_OPEN),
        (HALF_OPEN, CircuitEvent.RECOVERED, CLOSED),
        (HALF_OPEN, CircuitEvent.PROBE_FAILED, OPEN),
    }


Point = tuple[float, float]


def points(text: str) -> list[Point]:
    """Return the points that an SVG attribute names."""
    numbers = [float(number) for number in re.findall(r"-?[0-9.]+", text)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def read_diagram(drawn: str) -> list[tuple[str, str, str]]:
    """Return from which box to which each arrow leads, and the text that follows it."""
    boxes: list[tuple[str, ElementTree.Element]] = []
    arrows: list[list[str]] = []
    shapes = list(ElementTree.fromstring(drawn))  # noqa: S314 -- our own picture
    for shape, after in itertools.zip_longest(shapes, shapes[1:]):
        kind = shape.get("class", "")
        if kind == "box":
            boxes.append((after.text, shape))
        elif kind == "arrow":
            arrows.append([box_at(boxes, points(shape.get("d"))[0])])
        elif kind == "head":
            arrows[-1] += [box_at(boxes, points(shape.get("points"))[0]), ""]
        elif arrows:
            arrows[-1][2] += f" {shape.text}"
    return [(start, text.strip(), end) for start, end, text in arrows]


def box_at(boxes: list[tuple[str, ElementTree.Element]], point: Point) -> str:
    """Return the text of the box that has the point on its edge."""
    (text,) = (
        text
        for text, box in boxes
        for x, y, width, height in [[float(box.get(a)) for a in ("x", "y", "width", "height")]]
        if x <= point[0] <= x + width and y <= point[1] <= y + height
    )
    return text


def test_the_diagram_shows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from the picture, its arrows are the transitions but those made by hand."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "conf"))
    picture = importlib.import_module("pictures.circuit_breaker")
    texts = {
        "too many failures": CircuitEvent.TRIPPED,
        "the wait is over": CircuitEvent.WAITED,
        "the probes succeed": CircuitEvent.RECOVERED,
        "a probe fails": CircuitEvent.PROBE_FAILED,
    }
    drawn = sorted(read_diagram(picture.draw(lambda _, english: english)))
    assert drawn == sorted(
        (state.value, text, TRANSITIONS[state, event].value)
        for text, event in texts.items()
        for state in CircuitState
        if (state, event) in TRANSITIONS
    )
    assert {event for _, event in TRANSITIONS} == {
        *texts.values(),
        *(CircuitEvent.ISOLATED, CircuitEvent.RESET),
    }


async def test_setting_the_wall_clock_changes_nothing() -> None:
    """T8: an hour back or forward neither prolongs nor ends the open time."""
    breaker = CircuitBreaker()
    await trip(breaker)
    await asyncio.sleep(29)
    for hours in (-1, 1):
        with mock.patch("time.time", return_value=time.time() + 3600 * hours):
            assert breaker.state is OPEN
    await asyncio.sleep(1)
    with mock.patch("time.time", return_value=time.time() - 3600):
        assert breaker.state is HALF_OPEN


async def test_a_rate_over_seconds_looks_at_all_calls_of_them() -> None:
    """However many calls come, those of the last seconds count, and older ones do not."""
    breaker = CircuitBreaker(trip=FailureRate(0.5, seconds=10, least=4))
    await trip(breaker, 3)
    await asyncio.sleep(11)
    for _ in range(40):
        await breaker.call(Service(works=True))
    await trip(breaker, 39)
    assert breaker.state is CLOSED
    await trip(breaker, 1)
    assert breaker.state is OPEN


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60),
    st.integers(1, 5),
)
def test_a_rate_over_seconds_agrees_with_a_list_of_calls(
    calls: list[tuple[bool, int]], least: int
) -> None:
    """It opens as a rate over all calls does whose tenth of the window is not over."""
    tally = FailureRate(0.6, seconds=10, least=least).tally()
    now, seen = 50, []
    for failed, wait in calls:
        now += wait
        seen.append((now, failed))
        looked_at = [bad for at, bad in seen if now - at <= 10]
        trips = len(looked_at) >= least and 5 * sum(looked_at) >= 3 * len(looked_at)
        assert tally.record(failed, float(now), 0.0) is trips


async def test_slow_calls_open_it_though_they_succeed() -> None:
    """Half of the last calls took longer than a second."""
    breaker = CircuitBreaker(trip=SlowCallRate(0.5, slower_than=1, window=4))
    for takes in (0.5, 1.0, 1.5, 2.0):
        assert breaker.state is CLOSED
        await breaker.call(Service(works=True, takes=takes))
    assert breaker.state is OPEN


async def test_slow_calls_may_overlap() -> None:
    """Each call is timed for itself, as a call, a block and a decorated function."""
    breaker = CircuitBreaker(trip=SlowCallRate(1, slower_than=1, seconds=60, least=3))

    async def block() -> None:
        async with breaker:
            await asyncio.sleep(2)

    slow = Service(works=True, takes=2)
    tasks = [asyncio.create_task(work) for work in (block(), breaker.call(slow), breaker(slow)())]
    await asyncio.sleep(1.5)
    assert breaker.state is CLOSED
    await asyncio.wait(tasks)
    assert breaker.state is OPEN
    assert breaker.statistics().succeeded == 3


async def test_rules_combined_open_it_when_one_of_them_does() -> None:
    """``|`` makes a rule of several, and every one of them sees every call."""
    rule = FailureRate(0.5, window=10) | Consecutive(3) | SlowCallRate(1, slower_than=5, window=2)
    row, rate, slow = (CircuitBreaker(trip=rule) for _ in range(3))
    await trip(row, 3)
    for number in range(10):
        assert rate.state is CLOSED
        await asyncio.gather(rate.call(Service(works=number % 2 == 0)), return_exceptions=True)
    for _ in range(2):
        await slow.call(Service(works=True, takes=6))
    assert (row.state, rate.state, slow.state) == (OPEN, OPEN, OPEN)
    assert repr(AnyOf(Consecutive(1), Consecutive(2))) == repr(Consecutive(1) | Consecutive(2))


async def test_a_rule_of_ones_own_plugs_in() -> None:
    """A rule needs a ``tally`` and nothing else."""

    class Total:
        timed = False
        steady = True

        def __init__(self) -> None:
            self.calls = 0

        def tally(self) -> Total:
            return Total()

        def settle(self, successes: int) -> None:
            self.calls += successes

        def record(self, failed: bool, now: float, seconds: float) -> bool:
            self.calls += 1
            return self.calls >= 10

    breaker = CircuitBreaker(trip=Consecutive(99) | Total())
    for _ in range(9):
        await breaker.call(Service(works=True))
    await trip(breaker, 1)
    assert breaker.state is OPEN
    assert breaker.statistics().succeeded == 9


async def open_times(breaker: CircuitBreaker, times: int) -> list[float]:
    """Let each probe fail, and return how long the circuit was open each time."""
    seen = []
    for _ in range(times):
        wait = breaker.statistics().retry_after
        assert wait is not None
        seen.append(round(wait, 3))
        await asyncio.sleep(wait)
        await trip(breaker, 1)
    return seen


@pytest.mark.parametrize("several", [(5, 10, 30), iter([5, 10, 30]), [5, 10, *[30] * 500]])
async def test_the_open_time_grows_while_the_probes_fail(several: Iterable[float]) -> None:
    """The open times come one after the other, the last one stays, and closing starts over."""
    breaker = CircuitBreaker(open_for=several, probes=1)
    await trip(breaker)
    assert await open_times(breaker, 4) == [5, 10, 30, 30]
    await asyncio.sleep(30)
    await breaker.call(Service(works=True))
    await trip(breaker)
    assert breaker.statistics().retry_after == pytest.approx(5)


async def test_the_open_time_may_be_an_endless_backoff() -> None:
    """The backoffs of ``retry`` fit as they are."""
    breaker = CircuitBreaker(open_for=Exponential(base=1, cap=4))
    await trip(breaker)
    assert await open_times(breaker, 5) == [1, 2, 4, 4, 4]


class Busy(Exception):  # noqa: N818 -- says what happened
    """A server that says when to come back."""

    def __init__(self, retry_after: object) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        (7, 7),
        (90.5, 90.5),
        (9000, 120),
        (float("inf"), 120),
        *[(bad, 30) for bad in (0, -1, None, "7", float("nan"))],
    ],
)
async def test_the_server_sets_the_open_time(asked: object, seconds: float) -> None:
    """``retry_after`` of the failure that opens it counts up to a cap, if it is a time at all."""
    breaker = CircuitBreaker(failures=1, max_retry_after=120)
    with pytest.raises(Busy):
        async with breaker:
            raise Busy(asked)
    assert breaker.statistics().retry_after == pytest.approx(seconds)


async def test_the_longest_time_that_a_group_asks_for_counts() -> None:
    """Of the leaves of a group those are asked that count; what was refused locally is not one."""
    breaker = CircuitBreaker(failures=1, ignore=KeyError)
    ignored, refused = KeyError(), RateLimitExceeded(retry_after=99)
    ignored.retry_after = 88  # type: ignore[attr-defined] -- as some clients do
    with pytest.raises(ExceptionGroup):
        async with breaker:
            raise ExceptionGroup(
                "", [Busy(7), ExceptionGroup("", [Busy(77), ignored]), refused, ConnectionError()]
            )
    assert breaker.statistics().retry_after == pytest.approx(77)


async def test_a_retry_after_that_raises_is_none() -> None:
    """The caller sees the service's own exception, and the circuit is open for its usual time."""

    class Broken(Exception):  # noqa: N818 -- says what happened
        @property
        def retry_after(self) -> float:
            raise RuntimeError("no such header")

    breaker = CircuitBreaker(failures=1)
    with pytest.raises(Broken):
        async with breaker:
            raise Broken
    assert (breaker.state, breaker.statistics().opened) == (OPEN, 1)
    assert breaker.statistics().retry_after == pytest.approx(30)


async def test_only_the_failure_that_opens_it_sets_the_open_time() -> None:
    """What an earlier failure asked for is over when a later call opens the circuit."""
    breaker = CircuitBreaker(trip=FailureRate(0.5, window=2))
    with pytest.raises(Busy):
        async with breaker:
            raise Busy(5)
    await breaker.call(Service(works=True))
    assert breaker.state is OPEN
    assert breaker.statistics().retry_after == pytest.approx(30)


async def test_the_shadow_mode_refuses_nobody() -> None:
    """It goes through the same states and counts what it would have refused."""
    real, shadow, service = CircuitBreaker(), CircuitBreaker(shadow=True), Service()
    states: list[tuple[CircuitState, CircuitState]] = []
    for number in range(60):
        service.works = number >= 30
        await asyncio.gather(real.call(service), return_exceptions=True)
        reached = service.called
        await asyncio.gather(shadow.call(service), return_exceptions=True)
        assert service.called == reached + 1
        states.append((real.state, shadow.state))
        await asyncio.sleep(1)
    assert all(one is other for one, other in states)
    assert {one for one, _ in states} == set(CircuitState)
    assert real.statistics().rejected == shadow.statistics().rejected > 20
    shadow.shadow = False
    await trip(shadow)
    with pytest.raises(CircuitOpen):
        await shadow.call(service)


async def test_isolated_by_hand_the_shadow_mode_refuses() -> None:
    """What a person orders is no measurement."""
    breaker = CircuitBreaker(shadow=True)
    breaker.isolate()
    with pytest.raises(CircuitOpen):
        await breaker.call(Service(works=True))


async def test_a_listener_hears_of_each_change_and_refusal() -> None:
    """The events come in order, with what led to them, when the state is the new one."""
    breaker, heard = CircuitBreaker(failures=2, probes=1), []

    def listen(kind: str, data: dict[str, object]) -> None:
        heard.append((kind, data, breaker.statistics().state))
        raise RuntimeError("a listener breaks no call")

    breaker.on_event = listen
    await trip(breaker, 2)
    with pytest.raises(CircuitOpen):
        await breaker.call(Service())
    await asyncio.sleep(30)
    await trip(breaker, 1)
    await asyncio.sleep(30)
    await breaker.call(Service(works=True))
    breaker.reset()
    breaker.isolate()
    breaker.reset()
    opened, half_opened, closed = (
        f"circuit_breaker.{what}" for what in ("opened", "half_opened", "closed")
    )
    assert [(kind, data.get("reason"), state) for kind, data, state in heard] == [
        (opened, "tripped", OPEN),
        ("circuit_breaker.rejected", None, OPEN),
        (half_opened, None, HALF_OPEN),
        (opened, "probe failed", OPEN),
        (half_opened, None, HALF_OPEN),
        (closed, "recovered", CLOSED),
        (opened, "isolated", OPEN),
        (closed, "reset", CLOSED),
    ]
    assert heard[0][1] == {"reason": "tripped", "failures": 2, "seconds": 30}
    assert heard[1][1] == {"retry_after": 30}
    assert heard[6][1]["seconds"] is None


async def test_isolating_an_open_circuit_is_told_once() -> None:
    """Whoever watches sees that the circuit will not close by itself any more, and since when."""
    breaker, heard = CircuitBreaker(), []
    await trip(breaker)
    breaker.on_event = lambda kind, data: heard.append((kind, data["reason"]))
    for _ in range(2):
        breaker.isolate()
        assert breaker.statistics().opened == 1
    breaker.reset()
    assert heard == [("circuit_breaker.opened", "isolated"), ("circuit_breaker.closed", "reset")]


async def test_each_key_has_a_breaker_of_its_own() -> None:
    """One host that is down does not close the way to the others."""
    breakers = CircuitBreakers(lambda host: CircuitBreaker(failures=len(host)))
    await trip(breakers["a"], 1)
    assert breakers["a"].state is OPEN
    assert breakers["bb"].state is CLOSED
    assert breakers["a"] is breakers["a"]
    assert [key for key, _ in breakers.items()] == ["bb", "a"]
    assert "a" in breakers
    assert "c" not in breakers
    assert breakers.statistics() == CircuitBreakersStatistics(2, 1, 0, 0)


async def test_of_too_many_keys_the_closed_one_used_longest_ago_goes() -> None:
    """Open ones are passed over, so that a crowd of keys does not let callers through."""
    breakers = CircuitBreakers(lambda _: CircuitBreaker(failures=1), most=3)
    await trip(breakers["open"], 1)
    for key in "abacd":
        assert breakers[key] is not None
        assert len(breakers) <= 3
    assert [key for key, _ in breakers.items()] == ["open", "c", "d"]
    assert breakers.statistics().evicted == 2


async def test_when_all_are_open_the_oldest_goes_and_that_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The bound holds even then, but not silently."""
    breakers, heard = CircuitBreakers(lambda _: CircuitBreaker(failures=1), most=2), []
    breakers.on_event = lambda kind, data: heard.append((kind, data))
    for key in "abc":
        await trip(breakers[key], 1)
    assert [key for key, _ in breakers.items()] == ["b", "c"]
    assert breakers.statistics() == CircuitBreakersStatistics(2, 2, 1, 1)
    assert heard == [("circuit_breaker.evicted", {"key": "a", "state": "open"})]
    assert "the open circuit breaker of 'a' was dropped" in caplog.text


async def test_a_storm_of_open_keys_is_logged_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each dropped breaker is told to the listener and counted, but few lines are written."""
    breakers, heard = CircuitBreakers(lambda _: CircuitBreaker(failures=1), most=1), []
    breakers.on_event = lambda kind, _: heard.append(kind)
    for key in range(121):
        await trip(breakers[key], 1)
        await asyncio.sleep(1)
    assert len(heard) == breakers.statistics().evicted_open == 120
    assert [record.args for record in caplog.records] == [(0, 1, 60), (60, 61, 60)]


async def test_a_new_key_looks_at_a_hundred_old_ones_at_most() -> None:
    """However many are open, a new key takes no longer, and the closed one is found in the end."""
    looked_at: set[int] = set()

    class Watched(CircuitBreaker):
        @property
        def state(self) -> CircuitState:
            looked_at.add(id(self))
            return super().state

    breakers = CircuitBreakers(lambda _: Watched(failures=1), most=1000)
    for key in range(999):
        await trip(breakers[key], 1)
    assert breakers["closed"].state is CLOSED
    for key in range(20):
        looked_at.clear()
        await trip(breakers[-1 - key], 1)
        assert len(looked_at) <= 100 + 2  # that of ``trip`` and that of the key that goes
    assert "closed" not in breakers
    assert breakers.statistics().evicted_open == 19


async def test_unused_keys_go_but_not_while_they_are_open() -> None:
    """After its idle time a closed or half-open breaker goes as soon as another is made."""
    breakers = CircuitBreakers(lambda _: CircuitBreaker(failures=1, open_for=100), idle=60)
    await trip(breakers["open"], 1)
    assert breakers["closed"].state is CLOSED
    await asyncio.sleep(59)
    assert breakers["new"].state is CLOSED
    assert len(breakers) == 3
    await asyncio.sleep(1)
    assert breakers["newer"].state is CLOSED
    assert [key for key, _ in breakers.items()] == ["open", "new", "newer"]
    await asyncio.sleep(40)
    assert breakers["newest"].state is CLOSED
    assert "open" not in breakers


def test_threads_share_the_breaker_of_a_key() -> None:
    """Whoever comes first makes it; nobody gets another one."""
    inside = threading.Barrier(8, timeout=30)

    def make(key: str) -> CircuitBreaker:
        inside.wait()
        return CircuitBreaker()

    breakers, got = CircuitBreakers(make), []
    threads = [threading.Thread(target=lambda: got.append(breakers["key"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, got))) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [({"most": 0}, ValueError), ({"idle": 0}, ValueError), ({"make": 5}, TypeError)],
)
def test_a_bad_registry_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    """The bounds are above zero, and the breakers are made by a function."""
    with pytest.raises(error, match=next(iter(options))):
        CircuitBreakers(**{"make": lambda _: CircuitBreaker(), **options})


def test_a_registry_takes_breakers_only() -> None:
    """What ``make`` returns is looked at when it is made, and not kept if it is no breaker."""
    breakers: CircuitBreakers[str] = CircuitBreakers(lambda _: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="make must return a CircuitBreaker, got None"):
        breakers["a"]
    assert len(breakers) == 0


def test_many_threads_lose_no_call() -> None:
    """T19: successes are counted without the lock, failures with it, and none is lost."""
    breaker = CircuitBreaker(trip=FailureRate(1, window=10_000))
    works, fails = breaker(lambda: None), breaker(lambda: 1 / 0)

    def call() -> None:
        for number in range(1000):
            if number % 10:
                works()
            else:
                with suppress(ZeroDivisionError):
                    fails()

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (breaker.statistics().succeeded, breaker.statistics().failed) == (7200, 800)


class Model:
    """A breaker as simple as can be: it keeps every call of the era and counts anew each time."""

    OPEN_TIMES = (10, 20)

    def __init__(self, rule: str) -> None:
        self.rule, self.now = rule, 0
        self.begin("closed")

    def begin(self, state: str) -> None:
        """Begin an era."""
        self.state, self.since, self.era = state, self.now, object()
        self.results: list[bool] = []
        self.probes: dict[object, int] = {}
        if state == "closed":
            self.times_open = 0

    def open(self, asked: int | None) -> None:
        """Open, for as long as the server asked or it is the turn of."""
        self.begin("open")
        self.until = self.now + (asked or self.OPEN_TIMES[min(self.times_open, 1)])
        self.times_open += 1

    def look(self) -> str:
        """Return the state."""
        return "half-open" if self.state == "open" and self.now >= self.until else self.state

    def enter(self) -> object:
        """Return a permit, or None."""
        if self.look() != self.state:
            self.begin("half-open")
        if self.state == "half-open":
            if len(self.probes) + len(self.results) >= 2:
                self.probes = {p: at for p, at in self.probes.items() if self.now < at + 10}
            if len(self.probes) + len(self.results) >= 2:
                return None
            permit = object()
            self.probes[permit] = self.now
            return permit
        return self.era if self.state == "closed" else None

    def leave(self, permit: object, failed: bool | None, asked: int | None = None) -> None:
        """Take note of a result; None says nothing."""
        if failed is None:
            self.probes.pop(permit, None)
        elif permit in self.probes:
            del self.probes[permit]
            self.results.append(failed)
            if failed:
                self.open(asked)
            elif len(self.results) == 2:
                self.begin("closed")
        elif permit is self.era:
            self.results.append(failed)
            if self.trips():
                self.open(asked)

    def trips(self) -> bool:
        """Look at all results of the era."""
        row, last = self.results[-2:], self.results[-5:]
        in_a_row = len(row) == 2 and all(row)
        rate = len(last) >= 3 and sum(last) >= 0.5 * len(last)
        return {"row": in_a_row, "rate": rate, "any": in_a_row or rate}[self.rule]


class BreakerMachine(RuleBasedStateMachine):
    """The circuit and the model are told the same, and must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Permit, object]] = []

    @initialize(name=st.sampled_from(["row", "rate", "any"]))
    def choose(self, name: str) -> None:
        """Choose the rule."""
        rate = FailureRate(0.5, window=5, least=3)
        rules = {"row": Consecutive(2), "rate": rate, "any": Consecutive(2) | rate}
        self.model = Model(name)
        self.circuit = Circuit(rules[name], Model.OPEN_TIMES, probes=2, probe_timeout=10)

    @rule()
    def enter(self) -> None:
        """Ask for a permit."""
        ours = self.circuit.admit(self.model.now)
        other = self.model.enter()
        assert (ours is None) == (other is None)
        if ours is not None:
            self.calls.append((ours, other))

    def take(self, which: int) -> tuple[Permit, object]:
        """Return one of the calls under way."""
        return self.calls.pop(which % len(self.calls))

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0, 9))
    def succeed(self, which: int) -> None:
        """End a call well, on the short way if the permit allows it."""
        ours, other = self.take(which)
        if ours.steady:
            ours.successes += 1
        else:
            self.circuit.succeed(ours, self.model.now)
        self.model.leave(other, failed=False)

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0, 9), asked=st.sampled_from([None, None, 5, 40]))
    def fail(self, which: int, asked: int | None) -> None:
        """End a call badly."""
        ours, other = self.take(which)
        self.circuit.fail(ours, self.model.now, Busy(asked), asked)
        self.model.leave(other, True, asked)

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0, 9))
    def ignore(self, which: int) -> None:
        """End a call in a way that says nothing."""
        ours, other = self.take(which)
        self.circuit.give_back(ours)
        self.model.leave(other, failed=None)

    @rule(seconds=st.sampled_from([1, 5, 10, 20]))
    def wait(self, seconds: int) -> None:
        """Let time pass."""
        self.model.now += seconds

    @rule()
    def reset(self) -> None:
        """Close it by hand."""
        self.circuit.reset(self.model.now)
        self.model.begin("closed")

    @invariant()
    def agree(self) -> None:
        """Compare all that can be seen."""
        if not hasattr(self, "model"):
            return
        now, circuit, model = self.model.now, self.circuit, self.model
        assert circuit.state_at(now).value == model.look()
        assert circuit.probes_out == len(model.probes)
        if model.look() == "open":
            assert circuit.retry_after(now) == model.until - now


def test_the_circuit_agrees_with_a_simple_model() -> None:
    """Whatever happens in whatever order, it is where the model is (T18 to T20)."""
    run_state_machine_as_test(BreakerMachine, settings=settings(deadline=None))


STEP = st.sampled_from(["enter", "succeed", "fail", "ignore", "wait 1", "wait 10", "reset"])


@given(st.lists(st.tuples(STEP, st.integers(0, 5)), max_size=60))
def test_the_state_machine_keeps_its_promises(steps: list[tuple[str, int]]) -> None:
    """At no time are more probes out than allowed, and an open circuit admits nobody."""
    circuit = Circuit(Consecutive(2), open_for=10, probes=2, probe_timeout=10)
    now, calls = 100.0, []
    for step, which in steps:
        before = circuit.state_at(now)
        if step == "enter":
            permit = circuit.admit(now)
            assert (permit is None) <= (before is not CLOSED)
            assert (permit is not None) <= (before is not OPEN)
            if permit is not None:
                calls.append(permit)
        elif step.startswith("wait"):
            now += float(step.split()[1])
        elif step == "reset":
            circuit.reset(now)
        elif calls:
            permit = calls.pop(which % len(calls))
            if step == "succeed":
                circuit.succeed(permit, now)
            elif step == "fail":
                circuit.fail(permit, now, None)
            else:
                circuit.give_back(permit)
        assert circuit.probes_out + circuit.succeeded <= circuit.probes
        assert circuit.probes_out == 0 or circuit.state is HALF_OPEN
        assert (circuit.everyone is not None) == (circuit.state is CLOSED)
