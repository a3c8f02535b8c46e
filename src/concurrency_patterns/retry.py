"""Try again what failed by bad luck, without making things worse.

:class:`Retry` says which failures are worth another attempt, how many there are, and how long all
of it may take. A backoff (:class:`FullJitter` and the others) says how long to wait in between. A
:class:`RetryBudget`, shared by all callers, keeps retries from multiplying an outage.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import inspect
import itertools
import math
import random
import threading
import time
import types
from collections import deque
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .errors import (
    DeadlineExceeded,
    LocalRejection,
    check_count,
    check_positive,
    check_seconds,
    clock_of,
    comes_of_cancellation,
    notify,
)
from .timeout import FailScope, remaining

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
    from types import TracebackType
    from typing import TypeAlias

    Condition: TypeAlias = (
        type[BaseException] | tuple[type[BaseException], ...] | Callable[[Exception], bool]
    )

__all__ = [
    "Attempt",
    "DecorrelatedJitter",
    "EqualJitter",
    "Exponential",
    "FailedAttempt",
    "Fixed",
    "FullJitter",
    "GaveUp",
    "Retry",
    "RetryBudget",
    "RetryBudgetStatistics",
    "RetryReport",
    "RetryStatistics",
    "retry_report",
]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Fixed:
    """Wait the same time before each attempt.

    Args:
        delay: The wait in seconds.
    """

    delay: float

    def __post_init__(self) -> None:
        check_seconds("delay", self.delay)

    def __iter__(self) -> Iterator[float]:
        return itertools.repeat(float(self.delay))


@dataclass(frozen=True)
class Exponential:
    """Wait longer after each failure: ``base``, ``base * factor``, ``base * factor ** 2`` ...

    All clients that failed together come back together; prefer one with jitter.

    Args:
        base: The first wait in seconds.
        factor: By how much each wait is longer than the one before, at least 1.
        cap: No wait is longer than this, in seconds.
    """

    base: float = 0.1
    factor: float = 2.0
    cap: float = 30.0

    def __post_init__(self) -> None:
        check_positive("base", self.base)
        check_positive("factor", self.factor)
        check_positive("cap", self.cap)
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor!r}")

    def __iter__(self) -> Iterator[float]:
        delay = min(self.base, self.cap)
        while True:
            yield delay
            delay = min(delay * self.factor, self.cap)  # capped at each step: no overflow


@dataclass(frozen=True)
class FullJitter(Exponential):
    """Wait a random time between 0 and the exponential wait.

    It spreads the clients the widest, and is the default. The name and the comparison of the
    kinds are M. Brooker's, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.

    Args:
        base: The upper limit of the first wait, in seconds.
        factor: By how much each upper limit is higher than the one before, at least 1.
        cap: No wait is longer than this, in seconds.
        rng: The source of randomness; pass ``random.Random(seed)`` to repeat a run exactly.
    """

    _: KW_ONLY
    rng: random.Random | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rng is not None and not isinstance(self.rng, random.Random):
            raise TypeError(f"rng must be a random.Random, got {self.rng!r}")

    def __iter__(self) -> Iterator[float]:
        return map(functools.partial(_uniform(self.rng), 0.0), super().__iter__())


@dataclass(frozen=True)
class EqualJitter(FullJitter):
    """Wait half of the exponential wait, and a random time up to the other half.

    For those who need some pause before each attempt. Named as in Brooker 2015.

    Args:
        base: The upper limit of the first wait, in seconds.
        factor: By how much each upper limit is higher than the one before, at least 1.
        cap: No wait is longer than this, in seconds.
        rng: The source of randomness; pass ``random.Random(seed)`` to repeat a run exactly.
    """

    def __iter__(self) -> Iterator[float]:
        uniform = _uniform(self.rng)
        return (uniform(delay / 2, delay) for delay in Exponential.__iter__(self))


@dataclass(frozen=True)
class DecorrelatedJitter(FullJitter):
    """Wait a random time between ``base`` and ``factor`` times the last wait.

    Each call has a last wait of its own. Named as in Brooker 2015, where ``factor`` is 3.

    Args:
        base: The lower limit of each wait, in seconds.
        factor: The upper limit is so many times the last wait, at least 1.
        cap: No wait is longer than this, in seconds.
        rng: The source of randomness; pass ``random.Random(seed)`` to repeat a run exactly.
    """

    factor: float = 3.0

    def __iter__(self) -> Iterator[float]:
        uniform = _uniform(self.rng)
        delay = self.base
        while True:
            delay = min(self.cap, uniform(self.base, delay * self.factor))
            yield delay


def _uniform(rng: random.Random | None) -> Callable[[float, float], float]:
    return random.uniform if rng is None else rng.uniform


class GaveUp(enum.Enum):
    """Why a call was not tried once more."""

    #: All attempts were used.
    ATTEMPTS = "attempts"
    #: ``max_elapsed`` is over, or the next attempt would begin after it.
    ELAPSED = "elapsed"
    #: The next attempt would begin after the deadline around the call.
    DEADLINE = "deadline"
    #: The error is not one to retry.
    ERROR = "error"
    #: A policy of ours refused the call, and there is no use in waiting for it.
    REJECTED = "rejected"
    #: The retry budget is empty.
    BUDGET = "budget"
    #: The task is being cancelled.
    CANCELLED = "cancelled"


class Retry:
    """Call again what failed, as often and as long as makes sense.

    One object may serve any number of calls, tasks and threads; each call keeps its own state.
    It is used as ``await retry.call(fn, ...)``, as ``@retry`` on ``async def`` and on ``def``, or
    as a block: ``async for attempt in retry:`` with ``async with attempt:`` inside.

    Only an :exc:`Exception` is ever retried, so never :exc:`~asyncio.CancelledError`,
    :exc:`KeyboardInterrupt`, :exc:`SystemExit` or :exc:`GeneratorExit`, whatever ``on`` says. If
    the task was cancelled during an attempt and the function made another error of that, it is not
    retried either. (Before Python 3.13 a failed ``asyncio.TaskGroup`` looks like that. It is
    told apart by its exception group, or an error raised from it; a function that has dealt with
    the group and then fails in another way is not retried there.)

    An exception group counts as a failure to retry when all its leaves do, and waits as long as
    the leaf that asks for most. A :class:`~concurrency_patterns.errors.LocalRejection` (an open
    circuit breaker, an empty token bucket), alone or in a group, is retried only if ``on`` names it
    and it knows when to come back (``retry_after``), at a time within ``max_elapsed`` or the
    :func:`~concurrency_patterns.timeout.deadline` around the call; with neither of them it is
    raised at once. It costs nothing of the budget, unless another part of its group was sent.

    When it gives up, it raises the last exception as it is, with a note that tells the attempts,
    the time and the reason; :func:`retry_report` gives the history.

    Args:
        on: What to retry: an exception class, a tuple of them, or a function that is given the
            exception. There is no default, as to retry everything is to retry bugs.
        attempts: How many calls there are at most, the first one included.
        backoff: The waits in seconds; anything that can be iterated anew for each call. When it
            ends, its last wait is used again. A wait that makes no sense (negative, not finite)
            ends the call with a :exc:`ValueError` that has the last exception as its context.
        never: What not to retry although ``on`` matches it; given as ``on`` is.
        on_result: Tells whether a result is as bad as a failure. After the last attempt it is
            returned nevertheless.
        max_elapsed: Seconds for all attempts and waits together. No attempt begins after them,
            and one that is still running then is cancelled (a plain ``def`` cannot be).
        attempt_timeout: Seconds for each attempt. One that takes longer is cancelled and counts
            as a failure to retry. Not for a plain ``def``.
        max_retry_after: The longest wait in seconds that an error can ask for. If the error has an
            attribute ``retry_after`` (seconds, as in the header of RFC 9110, section 10.2.3), the
            wait is at least that long, up to this limit.
        budget: A budget shared with other callers.

    Attributes:
        on_event: Called with the kind and the data of an event: ``retry.attempt_failed``
            (``number``, ``error``, and the ``delay`` before the next attempt),
            ``retry.recovered`` (``attempts``), ``retry.gave_up`` (``attempts``, ``reason``,
            ``error``); see :func:`~concurrency_patterns.observe.observe`.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If an argument is of a wrong kind.
    """

    def __init__(
        self,
        *,
        on: Condition,
        attempts: int = 3,
        backoff: Iterable[float] = FullJitter(),
        never: Condition = (),
        on_result: Callable[[Any], bool] | None = None,
        max_elapsed: float | None = None,
        attempt_timeout: float | None = None,
        max_retry_after: float = 60.0,
        budget: RetryBudget | None = None,
    ) -> None:
        check_count("attempts", attempts)
        if max_elapsed is not None:
            check_positive("max_elapsed", max_elapsed)
        if attempt_timeout is not None:
            check_positive("attempt_timeout", attempt_timeout)
        check_seconds("max_retry_after", max_retry_after)
        _check_backoff(backoff)
        if on_result is not None and not callable(on_result):
            raise TypeError(f"on_result must be a function, got {on_result!r}")
        if budget is not None and not isinstance(budget, RetryBudget):
            raise TypeError(f"budget must be a RetryBudget, got {budget!r}")
        self.on = on
        self.attempts = attempts
        self.backoff = backoff
        self.never = never
        self.on_result = on_result
        self.max_elapsed = max_elapsed
        self.attempt_timeout = attempt_timeout
        self.max_retry_after = max_retry_after
        self.budget = budget
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._matches_on = _predicate("on", on)
        self._classes = on if isinstance(on, tuple | type) else ()  # asked first, as it is cheap
        self._matches_never = None if never == () else _predicate("never", never)
        self._timed = max_elapsed is not None or attempt_timeout is not None
        self._plain = not self._timed and on_result is None and budget is None
        self._calls = 0
        self._retries = 0
        self._recovered = 0
        self._gave_up = 0
        self._out_of_budget = 0

    def __repr__(self) -> str:
        return _told(self)

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn`` until it succeeds or there is a reason to give up.

        Raises:
            Exception: The last exception of ``fn``.
            DeadlineExceeded: If the last attempt was cut short.
        """
        clock = asyncio.get_running_loop().time
        run = self._begin(clock(), asyncio.current_task())
        scope = None
        try:
            while True:
                try:
                    if self._timed:
                        async with (scope := run.scope(clock())):
                            result = await fn(*args, **kwargs)
                    else:
                        result = await fn(*args, **kwargs)
                except Exception as error:
                    wait = run.after_error(error, clock(), scope)
                    if wait is None:
                        raise
                else:
                    wait = run.after_result(result, clock())
                    if wait is None:
                        return result
                await (asyncio.sleep(wait) if wait else _one_turn())
                run.begin_attempt(clock())
        finally:
            del run  # this frame stays in the tracebacks that the run holds: no cycle

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """Wrap a function, ``async`` or not, so that each call of it is retried.

        A plain ``def`` waits with :func:`time.sleep`: call it in a thread, not in the event loop.

        Raises:
            TypeError: If ``fn`` is a generator function, or a plain one with ``attempt_timeout``.
        """
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(f"a generator cannot be retried, as its items are out: {fn!r}")
        if inspect.iscoroutinefunction(fn):
            return self._wrap_async(fn)  # type: ignore[return-value]  # as async as fn is
        if self.attempt_timeout is not None:
            raise TypeError(f"attempt_timeout cannot cut a plain function short: {fn!r}")
        return self._wrap_sync(fn)

    def _wrap_async(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        @functools.wraps(fn)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            return await self.call(fn, *args, **kwargs)

        @functools.wraps(fn)
        async def plain_wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            self._calls += 1
            task = asyncio.current_task()
            cancelling = 0 if task is None else task.cancelling()
            run = None
            try:
                while True:
                    try:  # most succeed at once: nothing is made for them, and no clock is read
                        result = await (fn(*args, **kwargs) if kwargs else fn(*args))  # type: ignore[call-arg]  # kwargs is empty
                    except Exception as error:
                        if run is None:
                            clock = clock_of(asyncio.get_running_loop())
                            run = _Run(self, clock(), task, cancelling, began_late=True)
                        wait = run.after_error(error, clock())
                        if wait is None:
                            raise
                    else:
                        if run is not None:
                            run.after_result(result, clock())
                        return result
                    await (asyncio.sleep(wait) if wait else _one_turn())
                    run.began = clock()
                    self._retries += 1
            finally:
                del run

        return plain_wrapper if self._plain else wrapper

    def _wrap_sync(self, fn: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(fn)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            start = time.monotonic()
            run = None
            if self._plain:
                self._calls += 1
            else:
                run = self._begin(start)
            try:
                while True:
                    try:
                        result = fn(*args, **kwargs) if kwargs else fn(*args)  # type: ignore[call-arg]  # kwargs is empty
                    except Exception as error:
                        if run is None:
                            run = _Run(self, start)
                        wait = run.after_error(error, time.monotonic())
                        if wait is None:
                            raise
                    else:
                        if result is not None:
                            _refuse_awaitable(fn, result)
                        if run is None:
                            return result
                        wait = run.after_result(result, time.monotonic())
                        if wait is None:
                            return result
                    time.sleep(wait)
                    run.begin_attempt(time.monotonic())
            finally:
                del run

        return wrapper

    def _begin(self, now: float, task: asyncio.Task[Any] | None = None) -> _Run:
        self._calls += 1
        if self.budget is not None:
            self.budget.deposit(now)
        return _Run(self, now, task, 0 if task is None else task.cancelling())

    def __aiter__(self) -> _Attempts:
        if self.on_result is not None:
            raise TypeError("on_result sees no result in a block; use call() or the decorator")
        return _Attempts(self)

    def statistics(self) -> RetryStatistics:
        """Return how many calls there were, and what became of them."""
        return RetryStatistics(
            self._calls, self._retries, self._recovered, self._gave_up, self._out_of_budget
        )


@dataclass(frozen=True, slots=True)
class RetryStatistics:
    """What a :class:`Retry` has counted.

    Attributes:
        calls: Calls begun.
        retries: Attempts after the first one of a call.
        recovered: Calls that succeeded after at least one failure.
        gave_up: Calls that failed although ``on`` matched the failure.
        out_of_budget: How many of these failed because the retry budget was empty.
    """

    calls: int
    retries: int
    recovered: int
    gave_up: int
    out_of_budget: int


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One attempt in a :class:`RetryReport`.

    Attributes:
        error: What was raised; ``None`` if the result was one that ``on_result`` refused.
        began: Seconds between the beginning of the call and the beginning of the attempt.
        duration: Seconds that the attempt took. ``None`` for the first attempt of a decorated
            ``async def`` without limits of time, ``on_result`` and budget: it looks at the clock
            only when something has failed, and the times are counted from there.
    """

    error: Exception | None
    began: float
    duration: float | None


@dataclass(frozen=True, slots=True)
class RetryReport:
    """The history of a call that was given up.

    Attributes:
        reason: Why it was not tried once more.
        attempts: All attempts in their order; the last one raised the exception.
        elapsed: Seconds from the beginning of the call to its end; from the first failure if the
            ``duration`` of the first attempt is ``None``.
    """

    reason: GaveUp
    attempts: tuple[FailedAttempt, ...]
    elapsed: float


def retry_report(error: BaseException) -> RetryReport | None:
    """Return the history of the call that raised ``error``, or ``None`` if nothing was retried."""
    kept = getattr(error, "__retry__", None)
    if kept is None:
        return None
    reason, history, elapsed, began_late = kept
    attempts = [FailedAttempt(*attempt) for attempt in history]
    attempts[-1] = replace(attempts[-1], error=error)  # type: ignore[arg-type]  # an Exception
    if began_late:
        attempts[0] = replace(attempts[0], duration=None)
    return RetryReport(reason, tuple(attempts), elapsed)


NO_LIMIT = math.inf
_NONE_YET: Any = object()  # the wait before the first one is drawn


class _Run:
    """One call: what it has tried, and whether and when it tries again.

    It is handed the time and never waits itself, so that ``async``, plain and block form share it.
    """

    __slots__ = (
        "_attempts",
        "_began_late",
        "_cancelling",
        "_delays",
        "_limited",
        "_policy",
        "_task",
        "_wait",
        "began",
        "start",
    )

    def __init__(
        self,
        policy: Retry,
        now: float,
        task: asyncio.Task[Any]
        | None = None,  # none for a plain def, which no cancellation reaches
        cancelling: int = 0,  # at the beginning; these cancellations are none of the call's
        *,
        began_late: bool = False,
    ) -> None:
        self._policy = policy
        self._task = task
        self._cancelling = cancelling
        self.start = self.began = now
        self._began_late = began_late  # only at the first failure
        self._attempts: list[tuple[Exception | None, float, float]] = []  # error, began, ended
        self._wait: float = _NONE_YET
        self._delays: Iterator[float] | None = None

    @property
    def _number(self) -> int:
        return len(self._attempts) + 1

    def is_timed(self) -> bool:
        """Tell whether the attempts need a :meth:`scope`."""
        return self._policy._timed

    def scope(self, now: float) -> FailScope:
        """Return the time limit of the attempt that begins now."""
        policy = self._policy
        limit = math.inf if policy.attempt_timeout is None else policy.attempt_timeout
        if policy.max_elapsed is not None:
            left = max(0.0, self.start + policy.max_elapsed - now)
            if left < limit:
                return FailScope(left, told=policy.max_elapsed)
        return FailScope(limit)

    def after_error(
        self, error: Exception, now: float, scope: FailScope | None = None
    ) -> float | None:
        """Return how long to wait for the next attempt; ``None`` if there is none."""
        policy, task = self._policy, self._task
        if not (
            isinstance(error, policy._classes)
            or (scope is not None and scope.expired)
            or policy._matches_on(error)
        ) or (policy._matches_never is not None and policy._matches_never(error)):
            if self._attempts:  # a bug at once is none of our business
                self._give_up(GaveUp.ERROR, error, now)
            return None
        if (
            task is not None
            and task.cancelling() > self._cancelling
            and comes_of_cancellation(error, self._cancelling)
        ):  # even if the function made another exception of it
            return self._give_up(GaveUp.CANCELLED, error, now)
        return self._next_wait(error, error, now)

    def after_result(self, result: object, now: float) -> float | None:
        """Return how long to wait for the next attempt; ``None`` if the result is final."""
        policy = self._policy
        if policy.on_result is not None and policy.on_result(result):
            return self._next_wait(result, None, now)
        if self._attempts:
            policy._recovered += 1
            notify(policy.on_event, "retry.recovered", attempts=self._number)
        return None

    def begin_attempt(self, now: float) -> None:
        """Count the next attempt; if the timer woke us too late for it, raise the last error."""
        policy = self._policy
        if policy.max_elapsed is not None and now >= self.start + policy.max_elapsed:
            last = self._attempts.pop()[0]
            error = last or DeadlineExceeded("max_elapsed is over and the result is still bad")
            self._give_up(GaveUp.ELAPSED, error, now)
            try:
                raise error
            finally:
                del error, last  # no cycle through this frame
        self.began = now
        policy._retries += 1

    def _next_wait(self, outcome: object, error: Exception | None, now: float) -> float | None:
        policy = self._policy
        if self._delays is None:
            self._delays = iter(policy.backoff)
            self._limited = policy.max_elapsed is not None or remaining() is not None
        left, limit = NO_LIMIT, GaveUp.ELAPSED
        if self._limited:
            left, limit = self._time_left(now)
            if left <= 0:
                return self._give_up(limit, error, now)
        if len(self._attempts) + 1 >= policy.attempts:
            return self._give_up(GaveUp.ATTEMPTS, error, now)
        self._wait = wait = next(self._delays, self._wait)
        if type(wait) is not float or not 0.0 <= wait < NO_LIMIT:
            _check_wait(wait)
        sent = True
        try:  # at little cost, as this is done for each failure
            asks = hasattr(outcome, "retry_after") or issubclass(type(outcome), ExceptionGroup)
        except Exception:  # noqa: BLE001 -- whoever reads it takes more care
            asks = True
        if asks:
            leaves = list(_leaves(outcome))
            refusals = [isinstance(leaf, LocalRejection) for leaf in leaves]
            sent = not all(refusals)
            wait = max(wait, *(self._wait_asked_for(leaf) for leaf in leaves))
            if any(refusals) and (wait >= left or left == NO_LIMIT):
                return self._give_up(GaveUp.REJECTED, error, now)
        if wait >= left:
            return self._give_up(limit, error, now)
        # What was refused here never reached the service: it costs no budget.
        if policy.budget is not None and sent and not policy.budget.withdraw(now):
            policy._out_of_budget += 1
            return self._give_up(GaveUp.BUDGET, error, now)
        self._attempts.append((error, self.began, now))
        if policy.on_event is not None:
            event = {"number": len(self._attempts), "error": error, "delay": wait}
            notify(policy.on_event, "retry.attempt_failed", **event)
        return wait

    def _give_up(self, reason: GaveUp, error: Exception | None, now: float) -> float | None:
        self._policy._gave_up += 1
        if error is not None:
            self._attach_report(error, reason, now)
        event = {"attempts": self._number, "reason": reason.value, "error": error}
        notify(self._policy.on_event, "retry.gave_up", **event)
        return None

    def _time_left(self, now: float) -> tuple[float, GaveUp]:
        """Return the seconds that are left, and what it is that ends then."""
        policy = self._policy
        elapsed_left = math.inf
        if policy.max_elapsed is not None:
            elapsed_left = self.start + policy.max_elapsed - now
        deadline_left = remaining()
        if deadline_left is not None and deadline_left < elapsed_left:
            return deadline_left, GaveUp.DEADLINE
        return elapsed_left, GaveUp.ELAPSED

    def _wait_asked_for(self, outcome: object) -> float:
        hint = None
        with contextlib.suppress(Exception):  # a hint that cannot be read is none
            hint = getattr(outcome, "retry_after", None)
        if not isinstance(hint, int | float) or not hint >= 0:  # NaN, too
            hint = None
        if isinstance(outcome, LocalRejection):  # no use in coming back before the time it gives
            return math.inf if hint is None else hint
        return 0.0 if hint is None else min(hint, self._policy.max_retry_after)

    def _attach_report(self, error: Exception, reason: GaveUp, now: float) -> None:
        elapsed = now - self.start
        tried = f"{self._number} attempt{'' if self._number == 1 else 's'} in {elapsed:.1f} s"
        if self._began_late:
            tried += " since the first failure"
        note = f"retry: gave up after {tried}, reason: {reason.value}"
        history = [
            (raised, began - self.start, ended - began)
            for raised, began, ended in [*self._attempts, (None, self.began, now)]
        ]
        with contextlib.suppress(AttributeError):  # an exception may be frozen
            error.add_note(note)
            # Without the error itself: that would be a cycle, and keep its frames alive.
            error.__retry__ = (reason, history, elapsed, self._began_late)  # type: ignore[attr-defined]  # ours


class _Attempts:
    """The iterator of the block form."""

    def __init__(self, policy: Retry) -> None:
        self._policy = policy
        self._run: _Run | None = None
        self._attempt: Attempt | None = None

    def __aiter__(self) -> _Attempts:
        return self

    async def __anext__(self) -> Attempt:
        clock = asyncio.get_running_loop().time
        if self._attempt is None:
            run = self._policy._begin(clock(), asyncio.current_task())
            self._attempt = Attempt(run, 1)
            return self._attempt
        last = self._attempt
        if last._run is not None:
            raise RuntimeError("the loop over a Retry needs `async with attempt:` inside")
        if last._next is None:
            raise StopAsyncIteration
        run, wait = last._next
        try:
            await (asyncio.sleep(wait) if wait else _one_turn())
            run.begin_attempt(clock())
            self._attempt = Attempt(run, last.number + 1)
        finally:
            last._next = None
            del run
        return self._attempt


class Attempt:
    """One turn of ``async for attempt in retry:``; the work goes inside ``async with attempt:``.

    Attributes:
        number: 1 for the first attempt.
    """

    def __init__(self, run: _Run, number: int) -> None:
        self.number = number
        self._entered = False
        self._run: _Run | None = run
        self._scope: FailScope | None = None
        self._next: tuple[_Run, float] | None = None

    async def __aenter__(self) -> Attempt:
        if self._run is None or self._entered:
            raise RuntimeError("an attempt is made once")
        self._entered = True
        if self._run.is_timed():
            self._scope = self._run.scope(asyncio.get_running_loop().time())
            await self._scope.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        run, self._run = self._run, None
        if run is None:
            raise RuntimeError("an attempt is made once")
        late: DeadlineExceeded | None = None
        try:
            if self._scope is not None:
                try:
                    await self._scope.__aexit__(kind, error, traceback)
                except DeadlineExceeded as raised:
                    error = late = raised
            now = asyncio.get_running_loop().time()
            if error is None:
                run.after_result(None, now)
            elif isinstance(error, Exception):
                wait = run.after_error(error, now, self._scope)
                if wait is not None:
                    self._next = (run, wait)
                    return True
                if late is not None:
                    raise late
            return False
        finally:
            del run, error, late


@dataclass(frozen=True, slots=True)
class RetryBudgetStatistics:
    """What a :class:`RetryBudget` has counted.

    Attributes:
        calls: First attempts of all callers.
        retries: Retries that it allowed.
        refused: Retries that it did not allow.
    """

    calls: int
    retries: int
    refused: int


class RetryBudget:
    """Keep retries from multiplying the load of a service that is down.

    Three attempts for each call are three times the load, at the worst moment. A budget shared by
    all callers allows retries only up to a share of the calls: single failures are retried, an
    outage is not. It may be shared by tasks, event loops and threads.

    Args:
        ratio: Retries allowed for each call; 0.2 is one for five calls.
        min_per_second: Retries that are always allowed, so that a quiet client can retry, too.
        window: Seconds over which calls and retries are counted.

    Raises:
        ValueError: If a number is out of its range, or nothing would ever be allowed.

    The form is Finagle's ``RetryBudget``; the Google SRE book, chapter 21 ("Handling Overload"),
    gives 10 percent as the share of a client.
    """

    _slices_in_window = 10

    def __init__(
        self, *, ratio: float = 0.2, min_per_second: float = 1.0, window: float = 10.0
    ) -> None:
        check_seconds("ratio", ratio)
        check_seconds("min_per_second", min_per_second)
        check_positive("window", window)
        if ratio == 0 and min_per_second * window < 1:
            raise ValueError("this budget would never allow a retry: raise ratio or min_per_second")
        self.ratio = ratio
        self.min_per_second = min_per_second
        self.window = window
        self._lock = threading.Lock()
        self._slices: deque[list[int]] = deque()  # number of the slice, calls, retries
        self._calls = 0
        self._retries = 0
        self._refused = 0

    def __repr__(self) -> str:
        return _told(self)

    def deposit(self, now: float) -> None:
        """Count a call; it pays for a part of a retry.

        Args:
            now: The time in seconds, on any clock that does not jump.
        """
        with self._lock:
            self._current_slice(now)[1] += 1
            self._calls += 1

    def withdraw(self, now: float) -> bool:
        """Take one retry out of the budget, if it holds one.

        Args:
            now: The time in seconds, on any clock that does not jump.

        Returns:
            Whether the retry is allowed.
        """
        with self._lock:
            current = self._current_slice(now)
            calls = sum(piece[1] for piece in self._slices)
            retries = sum(piece[2] for piece in self._slices)
            allowed = self.min_per_second * self.window + self.ratio * calls
            if retries + 1 > allowed + 1e-9:  # as 0.7 * 10 is a little less than 7
                self._refused += 1
                return False
            current[2] += 1
            self._retries += 1
            return True

    def statistics(self) -> RetryBudgetStatistics:
        """Return how many retries were allowed, and how many were not."""
        with self._lock:
            return RetryBudgetStatistics(self._calls, self._retries, self._refused)

    def _current_slice(self, now: float) -> list[int]:
        number = int(now * self._slices_in_window // self.window)
        slices = self._slices
        newest = slices[-1][0] if slices else number
        if number <= newest - self._slices_in_window:
            slices.clear()  # the time went far back: another event loop with a clock of its own
        else:  # a little: another thread read the clock after this one, and came first
            number = max(number, newest)
        while slices and slices[0][0] <= number - self._slices_in_window:
            slices.popleft()
        if not slices or slices[-1][0] != number:
            slices.append([number, 0, 0])
        return slices[-1]


def _told(policy: object) -> str:
    """Tell the arguments that differ from their defaults."""
    changed = (
        f"{option.name}={_named(value)}"
        for option in inspect.signature(type(policy)).parameters.values()
        if (value := getattr(policy, option.name)) != option.default
    )
    return f"{type(policy).__name__}({', '.join(changed)})"


def _named(value: object) -> str:
    """Name a class or a function, in a tuple, too, and show anything else as it is."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_named, value))})"
    return getattr(value, "__qualname__", None) or repr(value)


def _predicate(name: str, condition: Condition) -> Callable[[Exception], bool]:
    """Turn classes or a function into a function that also looks into exception groups."""
    every = all if name == "on" else any  # one leaf that must not be retried is enough
    classes: tuple[type[BaseException], ...] = ()
    if isinstance(condition, tuple | type):
        classes = condition if isinstance(condition, tuple) else (condition,)
    elif not callable(condition):
        raise TypeError(f"{name} must be exception classes or a function, got {condition!r}")
    for entry in classes:
        if not (isinstance(entry, type) and issubclass(entry, BaseException)):
            raise TypeError(f"{name} must be exception classes or a function, got {entry!r}")

    def matches(error: Exception) -> bool:
        if isinstance(error, classes):
            return True
        if isinstance(error, ExceptionGroup):
            return every(matches(leaf) for leaf in error.exceptions)
        return not isinstance(condition, tuple | type) and bool(condition(error))

    return matches


def _leaves(outcome: object) -> Iterator[object]:
    if isinstance(outcome, ExceptionGroup):
        for part in outcome.exceptions:
            yield from _leaves(part)
    else:
        yield outcome


def _check_backoff(backoff: Iterable[float]) -> None:
    try:
        first = iter(backoff)
    except TypeError:
        raise TypeError(
            f"backoff must be iterable, such as FullJitter(), got {backoff!r}"
        ) from None
    if first is backoff:
        raise TypeError(f"backoff must be iterable anew for each call, got {backoff!r}")
    if isinstance(backoff, list | tuple):
        for delay in backoff or [_NONE_YET]:
            _check_wait(delay)


def _check_wait(delay: float) -> None:
    if delay is _NONE_YET:
        raise ValueError("backoff must hold at least one wait, got none")
    check_seconds("backoff", delay)


def _refuse_awaitable(fn: object, result: object) -> None:
    """Refuse what would fail later, when nobody retries it."""
    if hasattr(result, "__await__"):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError(f"{fn!r} is no async def but returned an awaitable; use call() for it")


@types.coroutine
def _one_turn() -> Generator[None, None, None]:
    """Let the others run, in half the steps that asyncio.sleep(0) takes."""
    yield
