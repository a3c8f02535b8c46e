"""A service that keeps failing is left alone, and asked again by a few probes."""

from __future__ import annotations

import asyncio
import functools
import importlib
import threading
import time
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concurrency_patterns.circuit_breaker import (
    TRANSITIONS,
    Circuit,
    CircuitBreaker,
    CircuitEvent,
    CircuitOpen,
    CircuitState,
    Consecutive,
    FailureRate,
)
from concurrency_patterns.errors import LocalRejection, RateLimitExceeded
from concurrency_patterns.testing import explore_cancellation, run_virtual

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
    [{"rate": 0}, {"rate": 1.1}, {"window": 0}, {"least": 0}, {"window": 3, "least": 4}],
)
def test_a_bad_failure_rate_is_refused(options: dict[str, float]) -> None:
    """A rate is above 0 and at most 1; the least number of calls fits the window."""
    with pytest.raises(ValueError, match="must be"):
        FailureRate(**{"rate": 0.5, **options})  # type: ignore[arg-type] -- bad on purpose


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

    assert explore_cancellation(CircuitBreaker, scenario, is_usable) > 20


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


def test_the_diagram_shows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture on the page has an arrow for each transition but those made by hand."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "conf"))
    picture = importlib.import_module("pictures.circuit_breaker")
    drawn = picture.draw(lambda _, english: english)
    assert drawn.count('class="arrow"') == len(picture.arrows()) == 4
    assert all(state.value in drawn for state in CircuitState)
    assert {((state, event), after) for state, event, after in picture.arrows()} == {
        transition
        for transition in TRANSITIONS.items()
        if transition[0][1] not in {CircuitEvent.ISOLATED, CircuitEvent.RESET}
    }


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
