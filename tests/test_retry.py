"""Retry, backoff and retry budget."""

from __future__ import annotations

import asyncio
import gc
import inspect
import math
import random
import threading
import time
import weakref
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from concurrency_patterns.compose import compose
from concurrency_patterns.errors import CircuitOpen, DeadlineExceeded, RateLimitExceeded
from concurrency_patterns.retry import (
    DecorrelatedJitter,
    EqualJitter,
    Exponential,
    Fixed,
    FullJitter,
    GaveUp,
    Retry,
    RetryBudget,
    RetryBudgetStatistics,
    RetryStatistics,
    retry_report,
)
from concurrency_patterns.testing import explore_cancellation, run_virtual
from concurrency_patterns.timeout import deadline, remaining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def now() -> float:
    """Return the time of the running loop."""
    return asyncio.get_running_loop().time()


class Service:
    """Fails as often as told, and notes when it is called."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.times: list[float] = []
        self._start: float | None = None

    async def __call__(self) -> Any:
        """Return or raise the next outcome; the last one is for ever."""
        if self._start is None:
            self._start = now()
        self.times.append(round(now() - self._start, 6))
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, BaseException):
            raise outcome
        if inspect.isfunction(outcome):
            return await outcome()
        return outcome


# --- what is called, and when


async def test_chapter_workload() -> None:
    """Three attempts, with 0.5 s and 1.0 s between them."""
    service = Service(ConnectionError("1"), ConnectionError("2"), "answer")
    retry = Retry(on=ConnectionError, attempts=3, backoff=Exponential(base=0.5, factor=2))
    assert await retry.call(service) == "answer"
    assert service.times == [0.0, 0.5, 1.5]
    assert retry.statistics() == RetryStatistics(
        calls=1, retries=2, recovered=1, gave_up=0, out_of_budget=0
    )


@pytest.mark.parametrize("attempts", [1, 2, 3, 7])
async def test_attempts_are_counted_exactly(attempts: int) -> None:
    """T24: attempts=n calls n times, in every form."""
    retry = Retry(on=OSError, attempts=attempts, backoff=Fixed(0))
    service = Service(OSError("down"))

    @retry
    async def decorated() -> Any:
        return await service()

    @retry
    def plain() -> None:
        service.times.append(0)
        raise OSError("down")

    for call in (lambda: retry.call(service), decorated, lambda: in_block(retry, service)):
        service.times.clear()
        with pytest.raises(OSError, match="down"):
            await call()
        assert len(service.times) == attempts
    service.times.clear()
    with pytest.raises(OSError, match="down"):
        plain()
    assert len(service.times) == attempts


async def in_block(retry: Retry, fn: Callable[[], Any]) -> Any:
    """Call ``fn`` in the block form."""
    async for attempt in retry:
        async with attempt:
            return await fn()
    raise AssertionError("unreachable")


async def test_block_form_keeps_the_backoff() -> None:
    """The block form waits as call does, and numbers its attempts."""
    service = Service(OSError(), OSError(), "answer")
    retry = Retry(on=OSError, backoff=Exponential(base=0.5))
    numbers = []
    async for attempt in retry:
        async with attempt:
            numbers.append(attempt.number)
            answer = await service()
    assert (answer, numbers, service.times) == ("answer", [1, 2, 3], [0.0, 0.5, 1.5])
    assert retry.statistics() == RetryStatistics(1, 2, 1, 0, 0)


async def test_block_form_insists_on_its_block() -> None:
    """A loop without `async with attempt` would never end, so it is refused."""
    with pytest.raises(RuntimeError, match="async with attempt"):
        async for _ in Retry(on=OSError):
            pass
    with pytest.raises(TypeError, match="on_result"):
        async for _ in Retry(on=OSError, on_result=bool):
            pass
    async for attempt in Retry(on=OSError):
        async with attempt:
            with pytest.raises(RuntimeError, match="made once"):
                async with attempt:
                    pass
            break


async def test_arguments_and_name_are_kept() -> None:
    """A decorated function looks like itself and gets its arguments; so does a method."""
    retry = Retry(on=OSError)

    class Client:
        @retry
        async def get(self, path: str, *, fn: int = 0) -> tuple[str, int]:
            """Fetch it."""
            return path, fn

    assert await Client().get("/", fn=3) == ("/", 3)
    assert (Client.get.__name__, Client.get.__doc__) == ("get", "Fetch it.")
    assert inspect.iscoroutinefunction(Client.get)
    assert await retry.call(Client().get, "/x", fn=4) == ("/x", 4)


def test_plain_function_is_retried_with_real_sleep() -> None:
    """On a plain def the same policy waits with time.sleep."""
    calls = []

    @Retry(on=OSError, backoff=Fixed(0.01))
    def work() -> str:
        calls.append(time.monotonic())
        if len(calls) < 3:
            raise OSError("down")
        return "answer"

    assert work() == "answer"
    assert calls[2] - calls[0] >= 0.02


def test_plain_function_starts_no_attempt_too_late() -> None:
    """On a plain def max_elapsed cannot cancel, but no attempt begins after it."""
    calls = []

    @Retry(on=OSError, attempts=100, backoff=Fixed(0.02), max_elapsed=0.05)
    def work() -> None:
        calls.append(1)
        raise OSError("down")

    with pytest.raises(OSError, match="down") as caught:
        work()
    assert 1 <= len(calls) <= 3
    report = retry_report(caught.value)
    assert report is not None
    assert report.reason is GaveUp.ELAPSED


async def test_what_cannot_be_retried_is_refused() -> None:
    """Generators, and awaitables out of a plain function, are refused aloud."""
    retry = Retry(on=OSError)
    with pytest.raises(TypeError, match="generator"):

        @retry
        async def items() -> Any:
            yield 1

    with pytest.raises(TypeError, match="generator"):

        @retry
        def more_items() -> Any:
            yield 1

    with pytest.raises(TypeError, match="attempt_timeout"):
        Retry(on=OSError, attempt_timeout=1)(print)
    for policy in (retry, Retry(on=OSError, max_elapsed=1)):
        with pytest.raises(TypeError, match="returned an awaitable"):
            policy(lambda: asyncio.sleep(0))()
        future = asyncio.get_running_loop().create_future()
        with pytest.raises(TypeError, match="returned an awaitable"):
            policy(lambda future=future: future)()


# --- what is retried


async def test_other_errors_pass_through_untouched() -> None:
    """A bug is raised at once, without a note."""
    service = Service(ValueError("bug"))
    retry = Retry(on=OSError)
    with pytest.raises(ValueError, match="bug") as caught:
        await retry.call(service)
    assert service.times == [0.0]
    assert not hasattr(caught.value, "__notes__")
    assert retry_report(caught.value) is None
    assert retry.statistics().gave_up == 0


async def test_on_takes_classes_or_a_function() -> None:
    """What to retry is told by a class, a tuple of classes, or a function."""
    for on in (OSError, (ValueError, OSError), lambda error: "down" in str(error)):
        service = Service(ConnectionError("down"), "answer")
        assert await Retry(on=on, backoff=Fixed(0)).call(service) == "answer"


async def test_never_wins_over_on() -> None:
    """What never matches is not retried, although on matches it."""
    for never in (PermissionError, (PermissionError,), lambda e: isinstance(e, PermissionError)):
        service = Service(PermissionError("no"))
        with pytest.raises(PermissionError):
            await Retry(on=OSError, never=never).call(service)
        assert service.times == [0.0]


@pytest.mark.parametrize(
    "on", [BaseException, (BaseException,), asyncio.CancelledError, lambda _: True]
)
@pytest.mark.parametrize(
    "error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(), GeneratorExit()]
)
def test_the_end_is_never_retried(on: Any, error: BaseException) -> None:
    """T24: Cancellation and the end of the program are never retried, whatever on says."""
    for form in (lambda r, s: r.call(s), lambda r, s: r(s.__call__)(), in_block):
        service = Service(error)

        async def main(form: Any = form, service: Service = service) -> None:
            with pytest.raises(type(error)):
                await form(Retry(on=on, backoff=Fixed(0)), service)

        run_virtual(main())
        assert len(service.times) == 1


async def test_cancellation_in_the_wait_ends_at_once() -> None:
    """A task that is cancelled between two attempts makes no other attempt."""
    service = Service(OSError("down"))
    task = asyncio.create_task(Retry(on=Exception, backoff=Fixed(10)).call(service))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert service.times == [0.0]


async def test_cancellation_in_disguise_is_not_retried() -> None:
    """A function that turns its cancellation into another error does not keep the task alive."""
    calls = []

    async def converts() -> None:
        calls.append(now())
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            raise ConnectionError("interrupted") from None

    task = asyncio.create_task(Retry(on=ConnectionError, backoff=Fixed(0.1)).call(converts))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(ConnectionError) as caught:
        await task
    assert len(calls) == 1
    report = retry_report(caught.value)
    assert report is not None
    assert report.reason is GaveUp.CANCELLED


class Raiser:
    """Fails in a task group again and again; how the failure leaves the group is the subclass's."""

    def __init__(self) -> None:
        self.calls = 0

    async def child_fails(self) -> None:
        """Fail while the group waits for its children."""
        self.calls += 1
        async with asyncio.TaskGroup() as group:
            group.create_task(fails())
            group.create_task(asyncio.sleep(100))

    async def child_fails_in_the_body(self) -> None:
        """Fail while the body of the group still runs."""
        self.calls += 1
        async with asyncio.TaskGroup() as group:
            group.create_task(fails())
            await asyncio.sleep(100)

    async def body_fails(self) -> None:
        """Fail in the body itself."""
        self.calls += 1
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(100))
            await fails()

    async def nested(self) -> None:
        """Fail in a group inside the body of another one."""
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(100))
            await self.child_fails()

    async def unpacked(self) -> None:
        """Let the first leaf out alone."""
        try:
            await self.child_fails()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def translated(self) -> None:
        """Make an error of the own domain out of the group."""
        try:
            await self.child_fails()
        except* ConnectionError as group:
            raise ConnectionError("no answer") from group


async def fails() -> None:
    """Fail at once."""
    raise ConnectionError("down")


RAISERS = [name for name in vars(Raiser) if not name.startswith("_")]


@pytest.mark.parametrize("name", RAISERS)
@pytest.mark.parametrize("form", ["call", "decorated", "block"])
async def test_failed_task_group_is_retried(form: str, name: str) -> None:
    """A group that cancels its own task because a child failed is no cancellation of the call."""
    raiser = Raiser()
    work = getattr(raiser, name)
    retry = Retry(on=ConnectionError, attempts=3, backoff=Fixed(0.1))
    forms = {
        "call": lambda: retry.call(work),
        "decorated": retry(work),
        "block": lambda: in_block(retry, work),
    }
    async with deadline(10):
        with pytest.raises((ExceptionGroup, ConnectionError)) as caught:
            await forms[form]()
        report = retry_report(caught.value)
        assert report is not None
        assert (raiser.calls, report.reason) == (3, GaveUp.ATTEMPTS)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize("name", RAISERS)
@pytest.mark.parametrize("at", ["while it runs", "while it fails", "while it cleans up"])
async def test_cancelled_task_group_is_not_retried(at: str, name: str) -> None:
    """If the call is cancelled, too, it ends, whatever its task groups make of that."""
    raiser = Raiser()
    retry = Retry(on=ConnectionError, attempts=3, backoff=Fixed(0.1))

    async def slow() -> None:
        try:
            await asyncio.sleep(1 if at != "while it runs" else 100)
        finally:
            if at == "while it fails":
                task.cancel()
            await asyncio.sleep(0.5)
            raise ConnectionError("down")

    with mock.patch(f"{__name__}.fails", slow):
        task = asyncio.create_task(retry.call(getattr(raiser, name)))
        if at != "while it fails":
            await asyncio.sleep(1.2)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert raiser.calls == 1


async def test_cancellation_of_long_ago_is_none_of_the_calls() -> None:
    """A task that ignored a cancellation before the call, or is in its clean-up, may retry."""
    calls: list[str] = []

    async def flaky(name: str) -> None:
        calls.append(name)
        raise ConnectionError("down")

    async def worker(retry: Callable[..., Any]) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            with pytest.raises(ConnectionError):
                await retry("in the clean-up")
        with pytest.raises(ConnectionError):
            await retry("after it")

    policy = Retry(on=ConnectionError, attempts=2, backoff=Fixed(0.1))
    forms: list[Callable[..., Any]] = [
        lambda name: policy.call(flaky, name),
        policy(flaky),
        lambda name: in_block(policy, lambda: flaky(name)),
    ]
    for form in forms:
        calls.clear()
        task = asyncio.create_task(worker(form))
        await asyncio.sleep(1)
        task.cancel()
        await task
        assert calls == ["in the clean-up"] * 2 + ["after it"] * 2


async def test_exception_group_is_matched_by_all_its_leaves() -> None:
    """A group is retried when each of its leaves would be."""
    good = ExceptionGroup("", [OSError(), ExceptionGroup("", [ConnectionError()])])
    mixed = ExceptionGroup("", [OSError(), ExceptionGroup("", [ValueError()])])
    for on in (OSError, lambda error: isinstance(error, OSError)):
        retry = Retry(on=on, backoff=Fixed(0))
        assert await retry.call(Service(good, "answer")) == "answer"
        with pytest.raises(ExceptionGroup) as caught:
            await retry.call(Service(mixed, "answer"))
        assert caught.value is mixed
    retry = Retry(on=OSError, never=ConnectionError, backoff=Fixed(0))
    with pytest.raises(ExceptionGroup):
        await retry.call(Service(good, "answer"))
    assert await Retry(on=ExceptionGroup, backoff=Fixed(0)).call(Service(mixed, 1)) == 1


async def test_bad_result_is_retried_and_returned_in_the_end() -> None:
    """A result can count as a failure; after the last attempt the caller gets it nevertheless."""
    retry = Retry(on=(), on_result=lambda status: status == 503, backoff=Fixed(1))
    service = Service(503, 200)
    assert await retry.call(service) == 200
    assert service.times == [0.0, 1.0]
    assert await retry.call(Service(503)) == 503
    assert retry(lambda: 200)() == 200
    assert retry.statistics() == RetryStatistics(3, 3, 1, 1, 0)


# --- giving up


async def test_last_original_exception_is_raised_with_its_history() -> None:
    """Giving up raises the last exception itself, with a note and the history."""
    errors = [OSError("first"), OSError("second"), OSError("third")]
    for form in (lambda r, s: r.call(s), lambda r, s: r(s.__call__)(), in_block):
        with pytest.raises(OSError, match="third") as caught:
            await form(Retry(on=OSError, backoff=Exponential(base=0.5)), Service(*errors))
        assert caught.value is errors[2]
        [note] = caught.value.__notes__
        assert note.startswith("retry: gave up after 3 attempts in 1.5 s")
        assert note.endswith(", reason: attempts")
        report = retry_report(caught.value)
        assert report is not None
        assert report.reason is GaveUp.ATTEMPTS
        assert [attempt.error for attempt in report.attempts] == errors
        assert [attempt.began for attempt in report.attempts] == [0.0, 0.5, 1.5]
        assert report.elapsed == 1.5
        del errors[2].__notes__


async def test_report_says_what_it_cannot_know() -> None:
    """All forms time the first attempt, but a decorated async def counts from its failure on."""

    async def fails() -> None:
        await asyncio.sleep(2)
        raise OSError("down")

    retry = Retry(on=OSError, attempts=2, backoff=Fixed(1))
    limited = Retry(on=OSError, attempts=2, backoff=Fixed(1), max_elapsed=100)
    for call in (lambda: retry.call(fails), lambda: in_block(retry, fails), limited(fails)):
        with pytest.raises(OSError, match="down") as caught:
            await call()
        report = retry_report(caught.value)
        assert report is not None
        assert [attempt.duration for attempt in report.attempts] == [2, 2]
        assert report.elapsed == 5
        assert caught.value.__notes__ == [
            "retry: gave up after 2 attempts in 5.0 s, reason: attempts"
        ]
    with pytest.raises(OSError, match="down") as caught:
        await retry(fails)()
    report = retry_report(caught.value)
    assert report is not None
    assert [(attempt.began, attempt.duration) for attempt in report.attempts] == [(0, None), (1, 2)]
    assert report.elapsed == 3
    assert caught.value.__notes__ == [
        "retry: gave up after 2 attempts in 3.0 s since the first failure, reason: attempts"
    ]


@pytest.mark.parametrize("still", [True, False])
def test_report_has_the_time_of_the_loop(still: bool) -> None:
    """The clock is that of the loop, also if somebody has put another one into asyncio's own."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        with mock.patch.object(loop, "time", (lambda: 5.0) if still else loop.time):
            with pytest.raises(ConnectionError) as caught:
                await Retry(on=ConnectionError, backoff=Fixed(0))(fails)()
            report = retry_report(caught.value)
            assert report is not None
            return report.elapsed

    assert (asyncio.run(main()) == 0) is still


def test_report_of_a_plain_function_is_complete() -> None:
    """On a plain def the first attempt is timed, too."""

    @Retry(on=OSError, attempts=2, backoff=Fixed(0))
    def fails() -> None:
        time.sleep(0.01)
        raise OSError("down")

    with pytest.raises(OSError, match="down") as caught:
        fails()
    report = retry_report(caught.value)
    assert report is not None
    assert [(attempt.duration or 0) >= 0.01 for attempt in report.attempts] == [True, True]
    assert report.elapsed >= 0.02


async def test_other_error_after_a_retry_is_reported() -> None:
    """When a later attempt fails in a way that is not retried, the history is there."""
    with pytest.raises(ValueError, match="bug") as caught:
        await Retry(on=OSError, backoff=Fixed(0)).call(Service(OSError(), ValueError("bug")))
    report = retry_report(caught.value)
    assert report is not None
    assert (report.reason, len(report.attempts)) == (GaveUp.ERROR, 2)


async def test_frozen_exception_is_raised_as_it_is() -> None:
    """An exception that cannot carry a note is still the one that is raised."""

    class FrozenError(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    with pytest.raises(FrozenError):
        await Retry(on=FrozenError, backoff=Fixed(0)).call(Service(FrozenError()))


@pytest.mark.parametrize("form", ["call", "decorated", "block", "sync", "timed"])
def test_nothing_is_left_for_the_garbage_collector(form: str) -> None:
    """Giving up makes no reference cycle: what the failed frames held is freed at once."""

    class Big:
        pass

    def fails() -> None:
        big = Big()
        alive.append(weakref.ref(big))
        raise OSError("down")

    async def fails_async() -> None:
        fails()

    async def main() -> None:
        retry = Retry(on=OSError, backoff=Fixed(0), max_elapsed=5 if form == "timed" else None)
        try:
            if form in {"call", "timed"}:
                await retry.call(fails_async)
            elif form == "decorated":
                await retry(fails_async)()
            elif form == "block":
                await in_block(retry, fails_async)
            else:
                retry(fails)()
        except OSError:
            pass
        left.extend(ref() for ref in alive)

    alive: list[weakref.ref[Big]] = []
    left: list[Big | None] = []
    gc.disable()
    try:
        run_virtual(main())
    finally:
        gc.enable()
    assert left == [None, None, None]


# --- time


@pytest.mark.parametrize("form", ["call", "block"])
async def test_max_elapsed_cancels_a_hanging_attempt(form: str) -> None:
    """T26: An attempt that hangs is cut short when the time for all of them is over."""
    start = now()
    service = Service(OSError("down"), lambda: asyncio.sleep(100))
    retry = Retry(on=OSError, attempts=9, backoff=Fixed(0.5), max_elapsed=2)
    with pytest.raises(DeadlineExceeded) as caught:
        await (retry.call(service) if form == "call" else in_block(retry, service))
    assert now() - start == 2
    report = retry_report(caught.value)
    assert report is not None
    assert report.reason is GaveUp.ELAPSED
    assert [type(attempt.error) for attempt in report.attempts] == [OSError, DeadlineExceeded]


async def test_no_attempt_begins_after_max_elapsed() -> None:
    """T26: If the next attempt would begin too late, there is no waiting for it."""
    start = now()
    service = Service(OSError("down"))
    retry = Retry(on=OSError, attempts=9, backoff=Fixed(0.5), max_elapsed=1.5)
    with pytest.raises(OSError, match="down") as caught:
        await retry.call(service)
    assert service.times == [0.0, 0.5, 1.0]
    assert now() - start == 1.0
    report = retry_report(caught.value)
    assert report is not None
    assert report.reason is GaveUp.ELAPSED


@pytest.mark.parametrize("bad", [OSError("down"), 503])
async def test_overslept_attempt_does_not_begin(bad: Any) -> None:
    """If a busy event loop wakes us after max_elapsed, no attempt begins any more."""
    loop = asyncio.get_running_loop()
    service = Service(bad)
    retry = Retry(
        on=OSError, on_result=lambda status: status == 503, backoff=Fixed(0.5), max_elapsed=1
    )

    def block_the_loop() -> None:
        loop.now += 5  # type: ignore[attr-defined]  # the tests run on a VirtualTimeLoop

    loop.call_later(0.4, block_the_loop)
    with pytest.raises((OSError, DeadlineExceeded)) as caught:
        await retry.call(service)
    assert service.times == [0.0]
    report = retry_report(caught.value)
    assert report is not None
    assert (report.reason, len(report.attempts)) == (GaveUp.ELAPSED, 1)


async def test_the_deadline_around_is_respected() -> None:
    """A retry does not wait for an attempt that would begin after the caller's deadline."""
    start = now()
    service = Service(OSError("down"))
    async with deadline(1):
        with pytest.raises(OSError, match="down") as caught:
            await Retry(on=OSError, attempts=9, backoff=Fixed(0.4)).call(service)
    assert service.times == [0.0, 0.4, 0.8]
    assert round(now() - start, 6) == 0.8
    report = retry_report(caught.value)
    assert report is not None
    assert report.reason is GaveUp.DEADLINE


@pytest.mark.parametrize("form", ["call", "block"])
async def test_each_attempt_can_have_a_limit(form: str) -> None:
    """An attempt that takes too long is cut short, and retried like a failure."""
    service = Service(lambda: asyncio.sleep(100), lambda: asyncio.sleep(0.5, "answer"))
    retry = Retry(on=OSError, backoff=Fixed(0.2), attempt_timeout=1)
    answer = await (retry.call(service) if form == "call" else in_block(retry, service))
    assert answer == "answer"
    assert service.times == [0.0, 1.2]
    with pytest.raises(DeadlineExceeded):
        await retry.call(Service(lambda: asyncio.sleep(100)))


async def test_attempt_sees_its_own_deadline() -> None:
    """Inside an attempt, remaining() is the least of all limits."""
    seen = []

    async def work() -> None:
        seen.append(round(remaining() or 0, 6))
        await asyncio.sleep(0.6)
        raise OSError("down")

    retry = Retry(on=OSError, backoff=Fixed(0.5), attempt_timeout=1, max_elapsed=1.9)
    with pytest.raises(OSError, match="down"):
        await retry.call(work)
    assert seen == [1.0, 0.8]


async def test_own_timeout_error_of_the_function_is_judged_by_on() -> None:
    """Only our own limit is retried unasked; a TimeoutError of the function is like any error."""
    service = Service(TimeoutError("from the server"))
    with pytest.raises(TimeoutError, match="from the server"):
        await Retry(on=ConnectionError, attempt_timeout=1).call(service)
    assert service.times == [0.0]


# --- what the other side asks for


class BusyError(Exception):
    """A refusal with the header Retry-After."""

    def __init__(self, retry_after: Any) -> None:
        self.retry_after = retry_after


async def test_retry_after_is_honoured_up_to_the_cap() -> None:
    """The wait is at least what the server asked for, but not longer than the cap."""
    service = Service(BusyError(3), BusyError(0.1), BusyError(3600), "answer")
    retry = Retry(on=BusyError, attempts=4, backoff=Fixed(0.5), max_retry_after=10)
    assert await retry.call(service) == "answer"
    assert service.times == [0.0, 3.0, 3.5, 13.5]


@pytest.mark.parametrize("hint", [math.inf, 10**400])
async def test_endless_retry_after_is_capped(hint: float) -> None:
    """However much time an error asks for, the wait is the cap, as with a circuit breaker."""
    service = Service(BusyError(hint), "answer")
    await Retry(on=BusyError, backoff=Fixed(0.5), max_retry_after=10).call(service)
    assert service.times == [0.0, 10.0]


async def test_retry_after_that_raises_does_not_hide_the_error() -> None:
    """An error whose retry_after cannot be read is retried like one that has none."""

    class BrokenError(Exception):
        @property
        def retry_after(self) -> float:
            raise RuntimeError("no such header")

    service = Service(BrokenError())
    with pytest.raises(BrokenError):
        await Retry(on=BrokenError, backoff=Fixed(0.5)).call(service)
    assert service.times == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("leaves", "wait", "taken"),
    [
        ([BusyError(3), OSError(), BusyError(1)], 3, 1),
        ([BusyError(3600), BusyError(1)], 10, 1),
        ([CircuitOpen(retry_after=30), CircuitOpen(retry_after=20)], 30, 0),
        ([CircuitOpen(retry_after=30), OSError()], 30, 1),  # the other one reached the service
        ([CircuitOpen(retry_after=30), RateLimitExceeded()], None, 0),
        ([CircuitOpen(retry_after=99), OSError()], None, 0),
    ],
)
async def test_group_is_asked_for_its_longest_wait(
    leaves: list[Exception], wait: float | None, taken: int
) -> None:
    """A group waits for all its leaves, and costs no budget if none of them left this place."""
    budget = RetryBudget()
    retry = Retry(on=Exception, backoff=Fixed(1), max_elapsed=60, max_retry_after=10, budget=budget)
    service = Service(ExceptionGroup("", [ExceptionGroup("", leaves[:1]), *leaves[1:]]), "answer")
    if wait is None:
        with pytest.raises(ExceptionGroup) as caught:
            await retry.call(service)
        report = retry_report(caught.value)
        assert report is not None
        assert report.reason is GaveUp.REJECTED
    else:
        assert await retry.call(service) == "answer"
        assert service.times == [0, wait]
    assert budget.statistics().retries == taken


async def test_group_through_an_open_breaker_is_not_waited_out_without_a_limit() -> None:
    """As long as nobody says how long we may wait, a rejected leaf ends the call at once."""
    for leaves in ([CircuitOpen(retry_after=1)], [OSError(), CircuitOpen(retry_after=1)]):
        service = Service(ExceptionGroup("", leaves))
        with pytest.raises(ExceptionGroup):
            await Retry(on=Exception, backoff=Fixed(1)).call(service)
        assert service.times == [0]


@pytest.mark.parametrize("hint", [None, "Wed, 21 Oct 2026 07:28:00 GMT", math.nan, -1])
async def test_senseless_retry_after_is_ignored(hint: Any) -> None:
    """A retry_after that is no number of seconds changes nothing."""
    service = Service(BusyError(hint), "answer")
    await Retry(on=BusyError, backoff=Fixed(0.5)).call(service)
    assert service.times == [0.0, 0.5]


async def test_retry_after_beyond_the_limit_is_not_waited_for() -> None:
    """If the server asks for more time than there is, we give up at once."""
    start = now()
    with pytest.raises(BusyError):
        await Retry(on=BusyError, max_elapsed=5).call(Service(BusyError(30)))
    assert now() == start


@pytest.mark.parametrize(
    ("hint", "limit", "times"),
    [
        (2, None, [0.0]),  # nobody said for how long we may wait
        (None, 10, [0.0]),  # nobody knows when it gets better
        (20, 10, [0.0]),
        (2, 10, [0.0, 2.0]),
    ],
)
async def test_local_rejection_is_retried_only_if_it_fits(
    hint: float | None, limit: float | None, times: list[float]
) -> None:
    """An open breaker is not waited out, unless its time fits into the limit that was given."""
    service = Service(CircuitOpen("open", retry_after=hint), "answer")
    retry = Retry(on=CircuitOpen, backoff=Fixed(0.1), max_elapsed=limit)
    if len(times) == 1:
        with pytest.raises(CircuitOpen) as caught:
            await retry.call(service)
        report = retry_report(caught.value)
        assert report is not None
        assert report.reason is GaveUp.REJECTED
    else:
        assert await retry.call(service) == "answer"
    assert service.times == times
    service = Service(CircuitOpen("open", retry_after=0.1))
    with pytest.raises(CircuitOpen):
        await Retry(on=OSError, max_elapsed=10).call(service)
    assert service.times == [0.0]


# --- backoff


def first(backoff: Any, count: int) -> list[float]:
    """Return the first waits of one call."""
    return list(islice(backoff, count))


def test_exponential_backoff_grows_to_its_cap() -> None:
    """Each wait is longer by the factor, until the cap."""
    assert first(Exponential(base=0.5, factor=2, cap=3), 5) == [0.5, 1, 2, 3, 3]
    assert first(Exponential(base=5, cap=3), 2) == [3, 3]
    assert first(Fixed(0.3), 3) == [0.3] * 3


KINDS = [Exponential, FullJitter, EqualJitter, DecorrelatedJitter]


@pytest.mark.parametrize("kind", KINDS)
def test_no_overflow_at_attempt_2000(kind: Any) -> None:
    """T25: After 2000 failures the wait is finite and not above the cap."""
    for delay in first(kind(base=0.1, factor=10, cap=30), 2000):
        assert 0 <= delay <= 30
    if kind is Exponential:
        assert delay == 30


def test_jitter_keeps_to_its_limits() -> None:
    """Full jitter is in [0, t], equal jitter in [t/2, t], decorrelated in [base, factor * last]."""
    full, equal = FullJitter(base=1, cap=8), EqualJitter(base=1, cap=8)
    decorrelated = DecorrelatedJitter(base=1, cap=8)
    for _ in range(50):
        for wait, limit in zip(first(full, 5), (1, 2, 4, 8, 8), strict=True):
            assert 0 <= wait <= limit
        for wait, limit in zip(first(equal, 5), (1, 2, 4, 8, 8), strict=True):
            assert limit / 2 <= wait <= limit
        last = 1.0
        for wait in first(decorrelated, 5):
            assert 1 <= wait <= min(8, last * 3)
            last = wait


@pytest.mark.parametrize("kind", [FullJitter, EqualJitter, DecorrelatedJitter])
def test_jitter_can_be_repeated_exactly(kind: Any) -> None:
    """The same seed gives the same waits, without a seed they differ."""
    same = [first(kind(rng=random.Random(7)), 8) for _ in range(2)]  # noqa: S311 -- no secret
    assert same[0] == same[1]
    assert first(kind(), 8) != first(kind(), 8)


async def test_concurrent_calls_share_no_state() -> None:
    """T28: Each call has its own attempts and its own waits, though they use one policy."""
    retry = Retry(on=OSError, attempts=4, backoff=Exponential(base=1, factor=3, cap=99))
    services = [Service(*[OSError()] * 3, n) for n in range(20)]
    calls: list[Any] = [
        asyncio.create_task(in_block(retry, service) if number % 2 else retry.call(service))
        for number, service in enumerate(services)
    ]
    answers = await asyncio.gather(*calls)
    assert answers == list(range(20))
    assert all(service.times == [0, 1, 4, 13] for service in services)
    assert retry.statistics() == RetryStatistics(20, 60, 20, 0, 0)


async def test_concurrent_calls_decorrelate_their_own_waits() -> None:
    """T28: The last wait of one call has no part in the next wait of another one."""
    with mock.patch.object(random, "uniform", lambda _, high: high):
        retry = Retry(on=OSError, attempts=4, backoff=DecorrelatedJitter(base=1, cap=99))
        services = [Service(*[OSError()] * 3, n) for n in range(20)]
        await asyncio.gather(*(retry.call(service) for service in services))
    assert all(service.times == [0, 3, 12, 39] for service in services)


async def test_a_list_of_waits_is_a_backoff() -> None:
    """Anything iterable serves as backoff; its last wait is used again."""
    service = Service(OSError(), OSError(), OSError(), "answer")
    await Retry(on=OSError, attempts=4, backoff=[0.5, 2]).call(service)
    assert service.times == [0.0, 0.5, 2.5, 4.5]


# --- budget


async def outage(budget: RetryBudget | None, calls: int = 100) -> int:
    """Return the load on a service that is down, from calls made in one moment."""
    service = Service(OSError("down"))
    retry = Retry(on=OSError, attempts=3, backoff=Fixed(1), budget=budget)
    results = await asyncio.gather(
        *(retry.call(service) for _ in range(calls)), return_exceptions=True
    )
    assert all(isinstance(result, OSError) for result in results)
    return len(service.times)


async def test_budget_bounds_the_load_of_an_outage() -> None:
    """Without a budget an outage gets three times the load, with one a fifth more."""
    assert await outage(None) == 300
    budget = RetryBudget(ratio=0.2, min_per_second=0)
    assert await outage(budget) == 120
    assert budget.statistics() == RetryBudgetStatistics(calls=100, retries=20, refused=100)


async def test_empty_budget_raises_the_original_exception() -> None:
    """T27: An empty budget shows in statistics and report, and not as an error of its own."""
    budget = RetryBudget(ratio=0.0, min_per_second=0.1, window=10)
    retry = Retry(on=OSError, attempts=9, backoff=Fixed(0), budget=budget)
    service = Service(OSError("down"))
    with pytest.raises(OSError, match="down") as caught:
        await retry.call(service)
    assert len(service.times) == 2
    report = retry_report(caught.value)
    assert report is not None
    assert report.reason is GaveUp.BUDGET
    assert retry.statistics() == RetryStatistics(1, 1, 0, 1, 1)
    assert budget.statistics().refused == 1


async def test_local_rejection_costs_no_budget() -> None:
    """A call that was refused here never reached the service."""
    budget = RetryBudget(ratio=0.0, min_per_second=0.1, window=10)
    service = Service(*[RateLimitExceeded("wait", retry_after=0.1)] * 5, "answer")
    retry = Retry(on=RateLimitExceeded, attempts=9, backoff=Fixed(0), budget=budget, max_elapsed=5)
    assert await retry.call(service) == "answer"
    assert budget.statistics().retries == 0


def test_budget_comes_back_with_the_window() -> None:
    """What was spent is available again when the window has passed."""
    budget = RetryBudget(ratio=0.5, min_per_second=0, window=10)
    for _ in range(4):
        budget.deposit(0)
    assert [budget.withdraw(0) for _ in range(3)] == [True, True, False]
    assert not budget.withdraw(9)
    budget.deposit(11)
    budget.deposit(11)
    assert [budget.withdraw(11) for _ in range(2)] == [True, False]


class BudgetMachine(RuleBasedStateMachine):
    """The budget and plain lists of all that happened are told the same, and must agree."""

    @initialize(
        ratio=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        min_per_second=st.sampled_from([0.2, 1.0]),
        window=st.sampled_from([5.0, 10.0, 60.0]),
    )
    def make(self, ratio: float, min_per_second: float, window: float) -> None:
        self.budget = RetryBudget(ratio=ratio, min_per_second=min_per_second, window=window)
        self.now = 1000  # in tenths of a window
        self.newest: int | None = None
        self.calls: list[int] = []
        self.retries: list[int] = []
        self.counted = RetryBudgetStatistics(0, 0, 0)

    @rule(tenths=st.integers(-25, 25))
    def another_time_is_told(self, tenths: int) -> None:
        self.now += tenths

    def seconds(self) -> float:
        """Tell the time to the budget, and note when that counts."""
        if self.newest is not None and self.now <= self.newest - 10:
            self.newest = None  # another clock
            self.calls.clear()
            self.retries.clear()
        self.newest = self.now if self.newest is None else max(self.now, self.newest)
        return (self.now + 0.5) * self.budget.window / 10

    @rule(count=st.integers(1, 20))
    def calls_come(self, count: int) -> None:
        for _ in range(count):
            self.budget.deposit(self.seconds())
            self.calls.append(self.newest or 0)
        self.counted = replace(self.counted, calls=self.counted.calls + count)

    @rule(count=st.integers(1, 20))
    def retries_are_asked_for(self, count: int) -> None:
        asked = [self.budget.withdraw(self.seconds()) for _ in range(count)]
        newest = self.newest or 0
        calls = sum(time > newest - 10 for time in self.calls)
        retries = sum(time > newest - 10 for time in self.retries)
        allowed = self.budget.min_per_second * self.budget.window + self.budget.ratio * calls
        granted = min(count, max(0, math.floor(allowed + 1e-6) - retries))
        assert asked == [True] * granted + [False] * (count - granted)
        self.retries += [newest] * granted
        self.counted = replace(
            self.counted,
            retries=self.counted.retries + granted,
            refused=self.counted.refused + count - granted,
        )

    @invariant()
    def all_is_counted(self) -> None:
        if hasattr(self, "budget"):
            assert self.budget.statistics() == self.counted


TestBudgetAgreesWithItsModel = BudgetMachine.TestCase
TestBudgetAgreesWithItsModel.settings = settings(max_examples=50, deadline=None)
TestBudgetAgreesWithItsModel.__doc__ = "Whatever the clock does, a retry is granted when it is due."


def test_budget_survives_threads_that_come_in_the_wrong_order() -> None:
    """A thread that read the clock before another one, and comes after it, erases nothing."""
    budget = RetryBudget(ratio=0.1, min_per_second=0, window=10)
    for _ in range(1000):
        budget.deposit(101)
    budget.deposit(102.0001)
    budget.deposit(101.9999)
    assert sum(budget.withdraw(101.9999) for _ in range(500)) == 100
    assert not budget.withdraw(102.0001)


def test_budget_starts_anew_on_another_clock() -> None:
    """An event loop whose clock is far behind is not stuck with what another loop has spent."""
    budget = RetryBudget(ratio=0, min_per_second=0.1, window=10)
    assert [budget.withdraw(5000) for _ in range(2)] == [True, False]
    assert [budget.withdraw(7) for _ in range(2)] == [True, False]


def test_budget_is_safe_from_threads() -> None:
    """Threads that share a budget get exactly what it allows."""

    class SlowRatio(float):
        """Lets the other threads run between the count and the grant."""

        def __mul__(self, other: float) -> float:
            time.sleep(0.0005)
            return super().__mul__(other)

    budget = RetryBudget(ratio=SlowRatio(0), min_per_second=1, window=10)
    granted = []

    def work() -> None:
        granted.extend(budget.withdraw(1.0) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == 10


# --- construction


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
        ({"attempts": -1}, "attempts must be at least 1, got -1"),
        ({"attempts": 2.5}, "attempts must be an int, got 2.5"),
        ({"max_elapsed": 0}, "max_elapsed must be above 0, got 0"),
        ({"max_elapsed": math.nan}, "max_elapsed must be finite, got nan"),
        ({"attempt_timeout": -1}, "attempt_timeout must be above 0, got -1"),
        ({"max_retry_after": math.inf}, "max_retry_after must be finite, got inf"),
        ({"on": "OSError"}, "on must be exception classes or a function, got 'OSError'"),
        ({"on": (OSError, 3)}, "on must be exception classes or a function, got 3"),
        ({"on": int}, "on must be exception classes or a function, got <class 'int'>"),
        ({"never": "x"}, "never must be exception classes or a function, got 'x'"),
        ({"backoff": 3}, "backoff must be iterable"),
        ({"backoff": iter([1])}, "backoff must be iterable anew"),
        ({"backoff": []}, "backoff must hold at least one wait"),
        ({"backoff": [1, -1]}, "backoff must be 0 or more, got -1"),
        ({"budget": 5}, "budget must be a RetryBudget, got 5"),
        ({"budget": RetryBudget}, "budget must be a RetryBudget, got <class"),
        ({"on_result": 5}, "on_result must be a function, got 5"),
    ],
)
def test_bad_arguments_are_refused_when_made(arguments: dict[str, Any], message: str) -> None:
    """What makes no sense is refused where it is written, with its name and value."""
    with pytest.raises((ValueError, TypeError), match=message):
        Retry(**{"on": OSError, **arguments})


class Waits:
    """A backoff of somebody else."""

    def __init__(self, *waits: Any) -> None:
        self.waits = waits

    def __iter__(self) -> Iterator[Any]:
        return iter(self.waits)


@pytest.mark.parametrize(
    ("waits", "message"),
    [
        ([1, math.nan], "backoff must be finite, got nan"),
        ([1, math.inf], "backoff must be finite, got inf"),
        ([1, -1], "backoff must be 0 or more, got -1"),
        ([1, "2"], "backoff must be a number, got '2'"),
        ([], "backoff must hold at least one wait"),
    ],
)
async def test_bad_wait_is_refused_when_it_is_drawn(waits: list[Any], message: str) -> None:
    """A backoff of unknown kind that gives nonsense is told, together with the error at hand."""
    service = Service(OSError("down"))
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        await Retry(on=OSError, attempts=9, backoff=Waits(*waits), max_elapsed=5).call(service)
    assert repr(caught.value.__context__) == "OSError('down')"
    assert service.times == [0.0, 1.0][: len(waits) or 1]


async def test_last_wait_of_a_backoff_is_its_own() -> None:
    """A wait that an error asked for is not used again when the backoff has ended."""
    service = Service(BusyError(3), OSError(), "answer")
    await Retry(on=(BusyError, OSError), backoff=[0.5]).call(service)
    assert service.times == [0.0, 3.0, 3.5]


async def test_waits_of_any_number_type_serve() -> None:
    """Whole numbers are waits, too."""
    service = Service(OSError(), OSError(), "answer")
    await Retry(on=OSError, backoff=Waits(1, 2)).call(service)
    assert service.times == [0, 1, 3]


def test_repr_tells_what_is_not_default() -> None:
    """The repr is the expression that made it, without what is as always."""
    assert repr(Retry(on=OSError)) == "Retry(on=OSError)"

    def flaky(error: Exception) -> bool:
        return bool(error)

    flaky.__qualname__ = "flaky"
    retry = Retry(
        on=(OSError, ValueError),
        attempts=5,
        backoff=Fixed(1),
        never=flaky,
        max_elapsed=60,
        budget=RetryBudget(ratio=0.1),
    )
    assert repr(retry) == (
        "Retry(on=(OSError, ValueError), attempts=5, backoff=Fixed(delay=1), never=flaky, "
        "max_elapsed=60, budget=RetryBudget(ratio=0.1))"
    )
    assert compose(retry).describe() == [repr(retry)]


async def test_jitter_is_on_by_default() -> None:
    """Without any word about the backoff, clients that failed together do not come back so."""

    async def second_attempt() -> float:
        service = Service(OSError(), "answer")
        await Retry(on=OSError).call(service)
        return service.times[1]

    waits = await asyncio.gather(*(second_attempt() for _ in range(50)))
    assert len(set(waits)) > 40
    assert 0 <= min(waits) < max(waits) <= 0.1


def test_on_has_no_default() -> None:
    """To retry everything is to retry bugs, so one has to say what."""
    with pytest.raises(TypeError, match="on"):
        Retry()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(-1), "delay must be 0 or more, got -1"),
        (lambda: Exponential(base=0), "base must be above 0, got 0"),
        (lambda: FullJitter(factor=0.5), "factor must be at least 1, got 0.5"),
        (lambda: EqualJitter(cap=math.nan), "cap must be finite, got nan"),
        (lambda: DecorrelatedJitter(base=math.inf), "base must be finite, got inf"),
        (lambda: FullJitter(rng=7), "rng must be a random.Random, got 7"),  # type: ignore[arg-type]
        (lambda: EqualJitter(rng=random), "rng must be a random.Random, got <module"),  # type: ignore[arg-type]
        (lambda: RetryBudget(ratio=-0.1), "ratio must be 0 or more, got -0.1"),
        (lambda: RetryBudget(window=0), "window must be above 0, got 0"),
        (lambda: RetryBudget(min_per_second=math.nan), "min_per_second must be finite"),
        (lambda: RetryBudget(ratio=0, min_per_second=0), "would never allow a retry"),
    ],
)
def test_bad_backoff_and_budget_are_refused(make: Callable[[], object], message: str) -> None:
    """Backoffs and budgets refuse numbers out of their range."""
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_one_policy_serves_three_loops() -> None:
    """A policy with a budget, made at import time, serves one event loop after the other."""
    budget = RetryBudget(ratio=0.2, min_per_second=1)
    retry = Retry(on=OSError, budget=budget, backoff=Fixed(1))
    for _ in range(3):
        assert run_virtual(retry.call(Service(OSError(), OSError(), "answer"))) == "answer"
    assert retry.statistics().recovered == 3


@pytest.mark.parametrize("form", ["call", "decorated", "block"])
def test_cancellation_anywhere_stops_the_call(form: str) -> None:
    """Wherever a call is cancelled, it makes no other attempt and leaves no deadline."""

    class State:
        def __init__(self) -> None:
            self.late: list[object] = []

    async def one(state: State, retry: Retry) -> None:
        cancelled = False

        async def work() -> None:
            nonlocal cancelled
            if cancelled:
                state.late.append("an attempt after the cancellation")
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                cancelled = True
                raise
            raise OSError("down")

        forms = {
            "call": lambda: retry.call(work),
            "decorated": retry(work),
            "block": lambda: in_block(retry, work),
        }
        try:
            await forms[form]()
        except OSError:
            pass
        finally:
            state.late.append(remaining())

    async def scenario(state: State) -> None:
        retry = Retry(on=BaseException, backoff=Fixed(0.1), max_elapsed=1, attempt_timeout=0.5)
        async with asyncio.TaskGroup() as group:
            group.create_task(one(state, retry))
            group.create_task(one(state, Retry(on=lambda _: True, backoff=Fixed(0.1))))

    def whole(state: State) -> bool:
        return all(entry is None for entry in state.late)

    assert explore_cancellation(State, scenario, whole) > 10
