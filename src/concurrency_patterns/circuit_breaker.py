"""Stop calling a service that keeps failing, and find out by a few probes when it works again.

:class:`CircuitBreaker` is the policy, :class:`Circuit` the state machine inside it: it knows
nothing of tasks and threads and is handed the time.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from .errors import CircuitOpen, LocalRejection, check_count, check_positive

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

__all__ = [
    "TRANSITIONS",
    "Circuit",
    "CircuitBreaker",
    "CircuitBreakerStatistics",
    "CircuitEvent",
    "CircuitOpen",
    "CircuitState",
    "Consecutive",
    "FailureRate",
    "Permit",
    "Tally",
    "TripRule",
]

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")

# Timers may fire this much too early, so that much too early counts as in time.
EARLY = max(1e-6, time.get_clock_info("monotonic").resolution)


class CircuitState(Enum):
    """Whether calls get through."""

    #: All calls get through.
    CLOSED = "closed"
    #: No call gets through.
    OPEN = "open"
    #: A few calls get through, as probes.
    HALF_OPEN = "half-open"


class CircuitEvent(Enum):
    """What makes the circuit change its state."""

    #: The trip rule has seen enough failures.
    TRIPPED = "tripped"
    #: The circuit was open for its time.
    WAITED = "waited"
    #: As many probes as needed have succeeded.
    RECOVERED = "recovered"
    #: A probe has failed.
    PROBE_FAILED = "probe failed"
    #: Somebody called :meth:`CircuitBreaker.isolate`.
    ISOLATED = "isolated"
    #: Somebody called :meth:`CircuitBreaker.reset`.
    RESET = "reset"


#: The whole behaviour as a table: in this state, on this event, the circuit goes to that state.
TRANSITIONS: dict[tuple[CircuitState, CircuitEvent], CircuitState] = {
    (CircuitState.CLOSED, CircuitEvent.TRIPPED): CircuitState.OPEN,
    (CircuitState.OPEN, CircuitEvent.WAITED): CircuitState.HALF_OPEN,
    (CircuitState.HALF_OPEN, CircuitEvent.RECOVERED): CircuitState.CLOSED,
    (CircuitState.HALF_OPEN, CircuitEvent.PROBE_FAILED): CircuitState.OPEN,
    **{(state, CircuitEvent.ISOLATED): CircuitState.OPEN for state in CircuitState},
    **{(state, CircuitEvent.RESET): CircuitState.CLOSED for state in CircuitState},
}


@dataclass(frozen=True, slots=True)
class CircuitBreakerStatistics:
    """What a circuit breaker has seen so far.

    Attributes:
        state: The state at this moment.
        isolated: Whether the circuit is held open by hand.
        succeeded: How many calls succeeded.
        failed: How many calls failed in a way that counts.
        ignored: How many calls were cancelled, refused locally, or ended with an ignored exception.
        rejected: How many calls were refused because the circuit was open.
        late: How many successes and failures came too late to change anything.
        opened: How often the circuit opened.
        probes_out: How many probes are under way.
        retry_after: Seconds until the next probe is let through; ``None`` if none is waited for.
        last_failure: The exception that failed last, until the circuit closes.
    """

    state: CircuitState
    isolated: bool
    succeeded: int
    failed: int
    ignored: int
    rejected: int
    late: int
    opened: int
    probes_out: int
    retry_after: float | None
    last_failure: BaseException | None


class CircuitBreaker:
    """Stop calling a service that keeps failing, and find out when it works again.

    Calls to a dead service cost time, connections and patience, and keep it from getting up.
    After some failures in a row the breaker opens: calls are refused at once. After a while it is
    half-open and lets a few probes through; when they succeed it closes, when one fails it opens
    again.

    A call counts in the era in which it began. What comes back after the state has changed says
    nothing about the present, so it changes nothing. A cancelled call and a
    :class:`~concurrency_patterns.errors.LocalRejection` never count, whatever ``on`` says.

    Use it as ``await breaker.call(fn, ...)``, ``@breaker`` on ``async def`` and ``def``,
    ``async with breaker`` or ``with breaker``. It may be shared by tasks, threads and event loops.
    Time is the event loop's, and :func:`time.monotonic` outside of one.

    Args:
        failures: How many failures in a row open the circuit.
        open_for: Seconds for which it stays open.
        probes: How many probes are let through at once, and must succeed, for it to close.
        probe_timeout: Seconds after which a probe that has not ended loses its place to another;
            ``None`` means ``open_for``.
        on: The exceptions that count as failures.
        ignore: Those among them that count as nothing.
        is_failure: Tells whether a returned result counts as a failure; it is returned
            all the same.
        trip: A rule that takes the place of ``failures``, such as :class:`FailureRate`.

    Raises:
        ValueError: If a number is zero, negative or not finite.
        TypeError: If an argument is of the wrong type.

    The pattern is Michael Nygard's (*Release It!*, 2007). The eras are the generations of
    Sony's gobreaker.
    """

    def __init__(
        self,
        *,
        failures: int = 5,
        open_for: float = 30.0,
        probes: int = 3,
        probe_timeout: float | None = None,
        on: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        ignore: type[BaseException] | tuple[type[BaseException], ...] = (),
        is_failure: Callable[[Any], bool] | None = None,
        trip: TripRule | None = None,
    ) -> None:
        check_count("failures", failures)
        check_positive("open_for", open_for)
        check_count("probes", probes)
        if probe_timeout is None:
            probe_timeout = open_for
        check_positive("probe_timeout", probe_timeout)
        if is_failure is not None and not callable(is_failure):
            raise TypeError(f"is_failure must be callable, got {is_failure!r}")
        if trip is not None and not callable(getattr(trip, "tally", None)):
            raise TypeError(f"trip must be a trip rule such as FailureRate, got {trip!r}")
        self._on = _exceptions("on", on)
        self._ignore = _exceptions("ignore", ignore)
        self._is_failure = is_failure
        self._circuit = Circuit(trip or Consecutive(failures), open_for, probes, probe_timeout)
        # Held for a few instructions, never while the call runs and never over an ``await``.
        self._lock = threading.Lock()
        self._succeeded = self._failed = self._ignored = self._rejected = self._late = 0

    def __repr__(self) -> str:
        circuit = self._circuit
        rule = circuit.trip
        trip = f"failures={rule.failures}" if isinstance(rule, Consecutive) else f"trip={rule}"
        return f"CircuitBreaker({trip}, open_for={circuit.open_for}, probes={circuit.probes})"

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn``, if the circuit lets it through.

        Returns:
            What ``fn`` returns.

        Raises:
            CircuitOpen: If the circuit is open, or all its probes are out. Its ``retry_after`` says
                when a place is free at the latest, its ``__cause__`` is the last failure.
        """
        permit = self._circuit.everyone or self._enter()
        try:
            result = await fn(*args, **kwargs)
        except BaseException as error:
            self._raised(permit, error)
            raise
        if permit.steady and self._is_failure is None:
            self._succeeded += 1
        else:
            self._returned(permit, result)
        return result

    def __call__(self, fn: F) -> F:
        """Guard ``fn``, an ``async def`` or a plain ``def``, with this breaker."""
        if inspect.isasyncgenfunction(fn) or inspect.isgeneratorfunction(fn):
            raise TypeError(f"a circuit breaker cannot guard a generator, got {fn!r}")
        if inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
            getattr(fn, "__call__", None)  # noqa: B004 -- an object whose __call__ is async def
        ):
            return cast("F", self._guard_async(fn))
        return cast("F", self._guard_sync(fn))

    def _guard_async(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        @wraps(fn)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            # As in call(), written out: another coroutine would cost more than the breaker does.
            permit = self._circuit.everyone or self._enter()
            try:
                result = await fn(*args, **kwargs)
            except BaseException as error:
                self._raised(permit, error)
                raise
            if permit.steady and self._is_failure is None:
                self._succeeded += 1
            else:
                self._returned(permit, result)
            return result

        return guarded

    def _guard_sync(self, fn: Callable[P, T]) -> Callable[P, T]:
        @wraps(fn)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            permit = self._circuit.everyone or self._enter()
            try:
                result = fn(*args, **kwargs)
                _refuse_awaitable(fn, result)
            except BaseException as error:
                self._raised(permit, error)
                raise
            if permit.steady and self._is_failure is None:
                self._succeeded += 1
            else:
                self._returned(permit, result)
            return result

        return guarded

    def __enter__(self) -> None:
        permit = self._circuit.everyone or self._enter()
        _entered.set((*_entered.get(), (self, permit)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        permit = self._leave()
        if error is None:
            self._succeed(permit)
        else:
            self._raised(permit, error)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    @property
    def state(self) -> CircuitState:
        """The state at this moment: an open circuit whose time is over is half-open."""
        return self._circuit.state_at(_now())

    def isolate(self) -> None:
        """Refuse all calls from now on, until :meth:`reset`."""
        with self._lock:
            self._circuit.isolate(_now())

    def reset(self) -> None:
        """Close the circuit and forget what has been counted. Calls under way do not count."""
        with self._lock:
            self._circuit.reset(_now())

    def statistics(self) -> CircuitBreakerStatistics:
        """Return what the breaker has seen so far."""
        with self._lock:
            circuit, now = self._circuit, _now()
            return CircuitBreakerStatistics(
                state=circuit.state_at(now),
                isolated=circuit.isolated,
                succeeded=self._succeeded,
                failed=self._failed,
                ignored=self._ignored,
                rejected=self._rejected,
                late=self._late,
                opened=circuit.opened,
                probes_out=circuit.probes_out,
                retry_after=circuit.retry_after(now),
                last_failure=circuit.last_failure,
            )

    def _enter(self) -> Permit:
        with self._lock:
            now = _now()
            permit = self._circuit.admit(now)
            if permit is not None:
                return permit
            self._rejected += 1
            state, cause = self._circuit.state, self._circuit.last_failure
            wait = self._circuit.retry_after(now)
        if state is CircuitState.HALF_OPEN:
            message = "the circuit is half-open and all its probes are out"
        elif wait is None:
            message = "the circuit is open until it is reset"
        else:
            message = f"the circuit is open for another {wait:.1f} s"
        raise CircuitOpen(message, retry_after=wait) from cause

    def _leave(self) -> Permit:
        # The newest of our entries: blocks of one task end in the reverse order of their beginning.
        entries = _entered.get()
        for index in reversed(range(len(entries))):
            if entries[index][0] is self:
                _entered.set(entries[:index] + entries[index + 1 :])
                return entries[index][1]
        return Permit()  # left in another context than entered: too late to matter

    def _returned(self, permit: Permit, result: object) -> None:
        if self._is_failure is None:
            self._succeed(permit)
            return
        try:
            failed = self._is_failure(result)
        except BaseException:
            self._ignore_call(permit)
            raise
        if failed:
            self._fail(permit, None)
        else:
            self._succeed(permit)

    def _raised(self, permit: Permit, error: BaseException) -> None:
        if self._counts(error):
            self._fail(permit, error)
        else:
            self._ignore_call(permit)

    def _counts(self, error: BaseException) -> bool:
        if isinstance(error, asyncio.CancelledError | LocalRejection | _Unguarded):
            return False
        if isinstance(error, BaseExceptionGroup):
            return any(self._counts(leaf) for leaf in error.exceptions)
        return isinstance(error, self._on) and not isinstance(error, self._ignore)

    def _succeed(self, permit: Permit) -> None:
        with self._lock:
            self._succeeded += 1
            if not self._circuit.succeed(permit, _now()):
                self._late += 1

    def _fail(self, permit: Permit, error: BaseException | None) -> None:
        with self._lock:
            self._failed += 1
            if not self._circuit.fail(permit, _now(), error):
                self._late += 1

    def _ignore_call(self, permit: Permit) -> None:
        with self._lock:
            self._ignored += 1
            self._circuit.give_back(permit)


class Permit:
    """The right to make a call, given in one era of a :class:`Circuit` and worth nothing later.

    It is known by its identity: an era that ends drops its permits.

    Args:
        expires: When a probe loses its place.

    Attributes:
        steady: Whether a success would change nothing, so that it need not be reported.
    """

    __slots__ = ("expires", "steady")

    def __init__(self, expires: float = math.inf) -> None:
        self.expires = expires
        self.steady = False


class Circuit:
    """The state machine of a circuit breaker, without any waiting: it is handed the time.

    Each change of state begins a new era with permits of its own. What a permit of an older era
    reports is not listened to, nor what a probe reports that has lost its place.

    Args:
        trip: Tells when the circuit opens.
        open_for: Seconds for which it stays open.
        probes: How many probes are out at once, and must succeed.
        probe_timeout: Seconds after which a probe loses its place.
    """

    def __init__(self, trip: TripRule, open_for: float, probes: int, probe_timeout: float) -> None:
        self.trip = trip
        self.open_for = open_for
        self.probes = probes
        self.probe_timeout = probe_timeout
        self.opened = 0
        #: The permit that all calls of a closed era share; ``None`` in the other states.
        self.everyone: Permit | None = None
        self._begin(CircuitState.CLOSED, 0.0)

    def _on_event(self, event: CircuitEvent, now: float) -> None:
        before, state = self.state, TRANSITIONS[self.state, event]
        self.opened += state is CircuitState.OPEN and before is not CircuitState.OPEN
        self._begin(state, now)

    def _begin(self, state: CircuitState, now: float) -> None:
        self.state = state
        self.since = now
        self.until = now + self.open_for if state is CircuitState.OPEN else math.inf
        self.tally = self.trip.tally()
        self.succeeded = 0
        self._out: set[Permit] = set()
        if self.everyone is not None:
            self.everyone.steady = False
        self.everyone = None
        if state is CircuitState.CLOSED:
            self.everyone = Permit()
            self.everyone.steady = self.tally.steady
            self.last_failure: BaseException | None = None

    @property
    def isolated(self) -> bool:
        """Whether the circuit is held open by hand."""
        return self.state is CircuitState.OPEN and self.until == math.inf

    @property
    def probes_out(self) -> int:
        """How many probes are under way."""
        return len(self._out)

    def state_at(self, now: float) -> CircuitState:
        """Return the state at the time ``now``."""
        if self.state is CircuitState.OPEN and now >= self.until - EARLY:
            return CircuitState.HALF_OPEN
        return self.state

    def retry_after(self, now: float) -> float | None:
        """Return in how many seconds a place for a probe is free at the latest."""
        if self.state_at(now) is CircuitState.OPEN:
            return None if self.isolated else max(0.0, self.until - now)
        if self._is_full():
            return max(0.0, min(permit.expires for permit in self._out) - now)
        return None

    def admit(self, now: float) -> Permit | None:
        """Return a permit for one call, or ``None`` if the call must not be made."""
        if now < self.since:
            self._set_clock_back(self.since - now)
        if self.state_at(now) is not self.state:
            self._on_event(CircuitEvent.WAITED, now)
        if self.state is CircuitState.HALF_OPEN:
            return self._admit_probe(now)
        return self.everyone

    def _set_clock_back(self, seconds: float) -> None:
        # Time never runs backwards: this is another loop's clock. What was begun begins anew.
        self.since -= seconds
        self.until -= seconds
        for permit in self._out:
            permit.expires -= seconds

    def _admit_probe(self, now: float) -> Permit | None:
        if self._is_full():
            self._out = {permit for permit in self._out if now < permit.expires - EARLY}
        if self._is_full():
            return None
        permit = Permit(now + self.probe_timeout)
        self._out.add(permit)
        return permit

    def _is_full(self) -> bool:
        # Not one probe more than the successes that are still needed.
        return (
            self.state is CircuitState.HALF_OPEN and len(self._out) + self.succeeded >= self.probes
        )

    def succeed(self, permit: Permit, now: float) -> bool:
        """Take note of a success, and tell whether it came in time to matter."""
        if permit is self.everyone:
            self._record(permit, False, now)
            return True
        if permit not in self._out:
            return False
        self._out.remove(permit)
        self.succeeded += 1
        if self.succeeded == self.probes:
            self._on_event(CircuitEvent.RECOVERED, now)
        return True

    def fail(self, permit: Permit, now: float, error: BaseException | None) -> bool:
        """Take note of a failure, and tell whether it came in time to matter."""
        if permit is self.everyone:
            self.last_failure = error
            self._record(permit, True, now)
            return True
        if permit not in self._out:
            return False
        self.last_failure = error
        self._on_event(CircuitEvent.PROBE_FAILED, now)
        return True

    def _record(self, permit: Permit, failed: bool, now: float) -> None:
        trips = self.tally.record(failed, now)
        permit.steady = self.tally.steady
        if trips:
            self._on_event(CircuitEvent.TRIPPED, now)

    def give_back(self, permit: Permit) -> None:
        """Free the place of a probe that says nothing."""
        self._out.discard(permit)

    def isolate(self, now: float) -> None:
        """Open the circuit until :meth:`reset`."""
        self._on_event(CircuitEvent.ISOLATED, now)
        self.until = math.inf

    def reset(self, now: float) -> None:
        """Close the circuit."""
        self._on_event(CircuitEvent.RESET, now)


class TripRule(Protocol):
    """When a circuit opens. The rule holds no state, so that breakers may share it."""

    def tally(self) -> Tally:
        """Begin to count; called at the beginning of each era."""


class Tally(Protocol):
    """What a :class:`TripRule` counts in one era.

    Attributes:
        steady: Whether one more success would change nothing.
    """

    steady: bool

    def record(self, failed: bool, now: float) -> bool:
        """Count one call, and tell whether the circuit must open."""


@dataclass(frozen=True, slots=True)
class Consecutive:
    """Open after so many failures in a row, with no success between them.

    Args:
        failures: How many.
    """

    failures: int

    def __post_init__(self) -> None:
        check_count("failures", self.failures)

    def tally(self) -> Tally:
        """Begin to count."""
        return _ConsecutiveTally(self.failures)


class _ConsecutiveTally:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._failed = 0
        self.steady = True

    def record(self, failed: bool, now: float) -> bool:
        self._failed = self._failed + 1 if failed else 0
        self.steady = self._failed == 0
        return self._failed >= self._limit


@dataclass(frozen=True, slots=True)
class FailureRate:
    """Open when too large a part of the last calls has failed.

    Failures in a row miss a service that fails every second time.

    Args:
        rate: The part that is too large, above 0 and at most 1.
        window: How many calls are looked at.
        least: How many calls must be there before the rate means anything; ``None`` means
            ``window``.
    """

    rate: float
    window: int = 20
    least: int | None = None

    def __post_init__(self) -> None:
        check_positive("rate", self.rate)
        if self.rate > 1:
            raise ValueError(f"rate must be at most 1, got {self.rate!r}")
        check_count("window", self.window)
        if self.least is not None:
            check_count("least", self.least)
            if self.least > self.window:
                raise ValueError(
                    f"least must be at most the window of {self.window}, got {self.least!r}"
                )

    def tally(self) -> Tally:
        """Begin to count."""
        return _RateTally(self.rate, self.window, self.least or self.window)


class _RateTally:
    steady = False

    def __init__(self, rate: float, window: int, least: int) -> None:
        self._rate = rate
        self._least = least
        self._calls: deque[bool] = deque(maxlen=window)
        self._failed = 0

    def record(self, failed: bool, now: float) -> bool:
        calls = self._calls
        if len(calls) == calls.maxlen:
            self._failed -= calls[0]
        calls.append(failed)
        self._failed += failed
        return len(calls) >= self._least and self._failed >= self._rate * len(calls)


class _Unguarded(TypeError):  # noqa: N818 -- never seen under this name
    """A plain function turned out to be asynchronous; no fault of the service."""


# The ``with`` blocks that this task or thread is in.
_entered: contextvars.ContextVar[tuple[tuple[CircuitBreaker, Permit], ...]] = (
    contextvars.ContextVar("entered", default=())
)


def _now() -> float:
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()  # what a real loop's clock shows, too


def _refuse_awaitable(fn: object, result: object) -> None:
    """Refuse what would fail later, out of the breaker's sight."""
    if hasattr(result, "__await__"):
        if inspect.iscoroutine(result):
            result.close()
        raise _Unguarded(f"{fn!r} returns an awaitable; guard an async def, or use call()")


def _exceptions(
    name: str, value: type[BaseException] | tuple[type[BaseException], ...]
) -> tuple[type[BaseException], ...]:
    kinds = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        raise TypeError(f"{name} must be an exception type or a tuple of them, got {value!r}")
    return kinds
