"""Stop calling a service that keeps failing, and find out by a few probes when it works again.

:class:`CircuitBreaker` is the policy and :class:`CircuitBreakers` has one for each key. What opens
it is a trip rule, such as :class:`FailureRate`. :class:`Circuit` is the state machine inside: it
knows nothing of tasks and threads and is handed the time.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
import threading
import time
from asyncio import current_task
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, cast

from .errors import (
    CircuitOpen,
    LocalRejection,
    check_count,
    check_positive,
    comes_of_cancellation,
    notify,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

__all__ = [
    "TRANSITIONS",
    "AnyOf",
    "Circuit",
    "CircuitBreaker",
    "CircuitBreakerStatistics",
    "CircuitBreakers",
    "CircuitBreakersStatistics",
    "CircuitEvent",
    "CircuitOpen",
    "CircuitState",
    "Consecutive",
    "FailureRate",
    "Permit",
    "SlowCallRate",
    "Tally",
    "TripRule",
]

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")
K = TypeVar("K", bound=Hashable)

# Timers may fire this much too early, so that much too early counts as in time.
EARLY = max(1e-6, time.get_clock_info("monotonic").resolution)
# How many open times are taken from an iterable, which may be endless; the last one stays.
LONGEST = 100
# How many keys are looked at to find one that may go: a new key must not take longer with many.
LOOKED_AT = 100
# Seconds between two warnings that an open breaker was dropped.
SILENCE = 60
# How many calls a rate looks at, unless told otherwise.
WINDOW = 20

_log = logging.getLogger("concurrency_patterns")


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


# What a refusal says; the usual one says for how long the circuit is still open.
REFUSALS: dict[Enum, str] = {
    CircuitEvent.ISOLATED: "the circuit is open until it is reset",
    CircuitState.HALF_OPEN: "the circuit is half-open and all its probes are out",
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
        rejected: How many calls were refused because the circuit was open; in shadow mode, how many
            would have been.
        late: How many successes and failures changed nothing, because they came too late or the
            shadow mode had let them through.
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
    nothing about the present, so it changes nothing. Whatever ``on`` says, a
    :class:`~concurrency_patterns.errors.LocalRejection` never counts, nor does a cancelled call,
    even if it has made another exception of its cancellation.

    Use it as ``await breaker.call(fn, ...)``, ``@breaker`` on ``async def`` and ``def``,
    ``async with breaker`` or ``with breaker``. A block ends in the task or thread in which it
    began; the end of one elsewhere means nothing, and a probe that ends so has its place until
    ``probe_timeout``. The breaker may be shared by tasks, threads and event loops.
    Time is the event loop's, and :func:`time.monotonic` outside of one.

    Args:
        failures: How many failures in a row open the circuit.
        open_for: Seconds for which it stays open. Several make it stay open longer each time that
            the probes fail, such as ``(5, 10, 30)`` or an
            :class:`~concurrency_patterns.retry.Exponential`; the last one stays, and after the
            circuit has closed they begin anew.
        probes: How many probes are let through at once, and must succeed, for it to close.
        probe_timeout: Seconds after which a probe that has not ended loses its place to another;
            ``None`` means ``open_for``, or the first of several.
        on: The exceptions that count as failures.
        ignore: Those among them that count as nothing.
        is_failure: Tells whether a returned result counts as a failure; it is returned
            all the same.
        trip: A rule that takes the place of ``failures``, such as :class:`FailureRate`.
        max_retry_after: The longest open time in seconds that a failure can ask for. If the
            exception that opens the circuit has an attribute ``retry_after`` (seconds, as in the
            header of RFC 9110, section 10.2.3), that takes the place of ``open_for``; of a group
            the longest one.
        shadow: Whether to refuse nobody and only measure what would have been refused.

    Attributes:
        on_event: Called with the kind and the data of what happened:
            ``circuit_breaker.opened`` (``reason``, ``failures``, ``seconds``),
            ``circuit_breaker.half_opened``, ``circuit_breaker.closed`` (``reason``) and
            ``circuit_breaker.rejected`` (``retry_after``).
        shadow: As above; may be changed at any time.

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
        open_for: float | Iterable[float] = 30.0,
        probes: int = 3,
        probe_timeout: float | None = None,
        on: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        ignore: type[BaseException] | tuple[type[BaseException], ...] = (),
        is_failure: Callable[[Any], bool] | None = None,
        trip: TripRule | None = None,
        max_retry_after: float = 300.0,
        shadow: bool = False,
    ) -> None:
        check_count("failures", failures)
        open_times = _open_times(open_for)
        check_count("probes", probes)
        if probe_timeout is None:
            probe_timeout = open_times[0]
        check_positive("probe_timeout", probe_timeout)
        check_positive("max_retry_after", max_retry_after)
        if is_failure is not None and not callable(is_failure):
            raise TypeError(f"is_failure must be callable, got {is_failure!r}")
        if not isinstance(shadow, bool):
            raise TypeError(f"shadow must be a bool, got {shadow!r}")
        self.shadow = shadow
        self.open_for = open_times[0]  # compose() compares it with the time of a retry
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._on = _exceptions("on", on)
        never = (asyncio.CancelledError, LocalRejection, _Unguarded)
        self._ignore = (*never, *_exceptions("ignore", ignore))
        self._is_failure = is_failure
        rule = Consecutive(failures) if trip is None else _rule("trip", trip)
        self._circuit = Circuit(rule, open_times, probes, probe_timeout, max_retry_after)
        # Held for a few instructions, never while the call runs and never over an ``await``.
        self._lock = threading.Lock()
        self._succeeded = self._failed = self._ignored = self._rejected = self._late = 0

    def __repr__(self) -> str:
        circuit = self._circuit
        rule, times = circuit.trip, circuit.open_times
        trip = f"failures={rule.failures}" if isinstance(rule, Consecutive) else f"trip={rule}"
        open_for = times[0] if len(times) == 1 else times[:5]
        shadow = ", shadow=True" if self.shadow else ""
        return f"CircuitBreaker({trip}, open_for={open_for}, probes={circuit.probes}{shadow})"

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
        # A steady success needs no lock: nobody but the count has to know of it.
        if permit.steady and self._is_failure is None:
            permit.successes += 1
        else:
            self._returned(permit, result)
        return result

    def __call__(self, fn: F) -> F:
        """Guard ``fn``, an ``async def`` or a plain ``def``, with this breaker."""
        if inspect.isasyncgenfunction(fn) or inspect.isgeneratorfunction(fn):
            raise TypeError(f"a circuit breaker cannot guard a generator, got {fn!r}")
        if inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
            getattr(fn, "__call__", None)  # noqa: B004 -- not whether fn is callable, but whether its __call__ is async
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
                permit.successes += 1
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
                if result is not None:
                    _refuse_awaitable(fn, result)
            except BaseException as error:
                self._raised(permit, error)
                raise
            if permit.steady and self._is_failure is None:
                permit.successes += 1
            else:
                self._returned(permit, result)
            return result

        return guarded

    def __enter__(self) -> None:
        permit = self._circuit.everyone or self._enter()
        _own_blocks().append(permit)

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
        permit = self._circuit.everyone or self._enter()
        blocks = _blocks.get()
        if blocks[0] is not current_task():
            blocks = _own_blocks()
        blocks.append(permit)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        blocks, permit = _blocks.get(), self._circuit.everyone
        if error is None and permit is not None and permit.steady and blocks[-1] is permit:
            del blocks[-1]  # what nearly every block comes to; pop() would take longer
            permit.successes += 1
        else:
            self.__exit__(kind, error, traceback)

    @property
    def state(self) -> CircuitState:
        """The state at this moment: an open circuit whose time is over is half-open."""
        return self._circuit.state_at(_now())

    def isolate(self) -> None:
        """Refuse all calls from now on, until :meth:`reset`; in shadow mode, too."""
        with self._lock:
            self._circuit.isolate(_now())
        self._report()

    def reset(self) -> None:
        """Close the circuit and forget what has been counted. Calls under way do not count."""
        with self._lock:
            self._circuit.reset(_now())
        self._report()

    def statistics(self) -> CircuitBreakerStatistics:
        """Return what the breaker has seen so far."""
        with self._lock:
            circuit, now = self._circuit, _now()
            return CircuitBreakerStatistics(
                state=circuit.state_at(now),
                isolated=circuit.isolated,
                succeeded=self._succeeded + circuit.steady_successes,
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
        circuit, loop = self._circuit, asyncio._get_running_loop()
        now = time.monotonic() if loop is None else loop.time()  # as _now(), without another call
        retry_after: float | None
        # While it is certainly open there is nothing to change, so a refusal needs no lock.
        if circuit.since <= now < circuit.until - EARLY and not circuit.refusal:
            retry_after = circuit.until - now
        else:
            with self._lock:
                permit = circuit.admit(now)
                retry_after = circuit.retry_after(now)
            self._report()
            if permit is not None:
                return permit
        self._rejected += 1
        if self.on_event is not None:
            notify(self.on_event, "circuit_breaker.rejected", retry_after=retry_after)
        if self.shadow and not circuit.isolated:
            return Permit(circuit)  # of no era: what it reports changes nothing
        # Refusals come in masses, and the __init__ would take longer than all the rest.
        refusal = CircuitOpen.__new__(CircuitOpen, circuit.refusal)
        refusal.retry_after = retry_after
        try:
            raise refusal from circuit.last_failure
        finally:
            del refusal  # no cycle through this frame

    def _leave(self) -> Permit:
        # The newest of our permits: blocks of one task end in the reverse order of their beginning.
        blocks = _blocks.get()
        for number in range(len(blocks) - 1, 0, -1):
            if blocks[number].circuit is self._circuit:
                left: Permit = blocks.pop(number)
                return left
        return Permit(self._circuit)  # left where it was not entered: too late to matter

    def _returned(self, permit: Permit, result: object) -> None:
        try:
            failed = self._is_failure is not None and self._is_failure(result)
        except BaseException:
            self._ignore_call(permit)
            raise
        if failed:
            self._fail(permit, None)
        else:
            self._succeed(permit)

    def _raised(self, permit: Permit, error: BaseException) -> None:
        if failures := self._failures(error):
            self._fail(permit, error, _time_asked_for(failures))
        else:
            self._ignore_call(permit)

    def _failures(self, error: BaseException) -> list[BaseException]:
        """Return what of it counts: itself, or leaves of a group."""
        if isinstance(error, BaseExceptionGroup):
            return [leaf for part in error.exceptions for leaf in self._failures(part)]
        if not isinstance(error, self._on) or isinstance(error, self._ignore):
            return []
        return [] if comes_of_cancellation(error) else [error]

    def _succeed(self, permit: Permit) -> None:
        if permit.steady:
            permit.successes += 1
            return
        with self._lock:
            self._succeeded += 1
            if not self._circuit.succeed(permit, _now()):
                self._late += 1
        if self._circuit.happened:
            self._report()

    def _fail(
        self, permit: Permit, error: BaseException | None, asked: float | None = None
    ) -> None:
        with self._lock:
            self._failed += 1
            if not self._circuit.fail(permit, _now(), error, asked):
                self._late += 1
        self._report()

    def _ignore_call(self, permit: Permit) -> None:
        with self._lock:
            self._ignored += 1
            self._circuit.give_back(permit)

    def _report(self) -> None:
        """Tell the listener what the circuit did; the lock is free again."""
        happened = self._circuit.happened
        while happened:
            try:
                kind, data = happened.popleft()
            except IndexError:  # another thread was faster
                return
            if self.on_event is not None:
                notify(self.on_event, kind, **data)


class Permit:
    """The right to make a call, given in one era of a :class:`Circuit` and worth nothing later.

    Args:
        circuit: The circuit that gave it.
        era: The era in which it was given; 0 is none.
        began: When the call began.
        expires: When a probe loses its place.

    Attributes:
        steady: Whether successes may be counted here, to be looked at with the next failure.
        successes: How many were.
    """

    __slots__ = ("began", "circuit", "era", "expires", "steady", "successes")

    def __init__(
        self, circuit: Circuit, era: int = 0, began: float = 0.0, expires: float = math.inf
    ) -> None:
        self.circuit = circuit
        self.era = era
        self.began = began
        self.expires = expires
        self.steady = False
        self.successes = 0


class Circuit:
    """The state machine of a circuit breaker, without any waiting: it is handed the time.

    Each change of state begins a new era with permits of its own. What a permit of an older era
    reports is not listened to, nor what a probe reports that has lost its place.

    Args:
        trip: Tells when the circuit opens.
        open_for: Seconds for which it stays open; several are for the first time and for each time
            that the probes have failed, and the last one stays.
        probes: How many probes are out at once, and must succeed.
        probe_timeout: Seconds after which a probe loses its place.
        max_retry_after: The longest open time in seconds that a failure can ask for.
    """

    def __init__(
        self,
        trip: TripRule,
        open_for: float | Iterable[float],
        probes: int,
        probe_timeout: float,
        max_retry_after: float = 300.0,
    ) -> None:
        self.trip = trip
        self.open_times = _open_times(open_for)
        self.probes = probes
        self.probe_timeout = probe_timeout
        self.max_retry_after = max_retry_after
        self.opened = 0
        self.era = 0
        self.failed = 0
        self.state = CircuitState.CLOSED
        #: The permit that all calls of a closed era share. ``None`` in the other states, and if
        #: the rule wants to know how long each call took.
        self.everyone: Permit | None = None
        #: What is raised says this, or for how long the circuit is still open.
        self.refusal = ""
        #: The kinds and data of the events that nobody has been told of.
        self.happened: deque[tuple[str, dict[str, Any]]] = deque()
        self._past_successes = 0
        self._out: set[Permit] = set()
        self._begin(CircuitState.CLOSED, 0.0)

    def _move(self, event: CircuitEvent, now: float, asked: float | None = None) -> None:
        before, isolated, failures = self.state, self.isolated, self.failed
        state = TRANSITIONS[before, event]
        self._begin(state, now, asked)
        if event is CircuitEvent.ISOLATED:
            self.until, self.refusal = math.inf, REFUSALS[event]
        if state is before and isolated is self.isolated:
            return
        if state is CircuitState.OPEN:
            self.opened += before is not state
            seconds = None if self.isolated else self._open_seconds
            data = {"reason": event.value, "failures": failures, "seconds": seconds}
            self.happened.append(("circuit_breaker.opened", data))
        elif state is CircuitState.HALF_OPEN:
            self.happened.append(("circuit_breaker.half_opened", {}))
        else:
            self.happened.append(("circuit_breaker.closed", {"reason": event.value}))

    def _begin(self, state: CircuitState, now: float, asked: float | None = None) -> None:
        if self.everyone is not None:
            self.everyone.steady = False
            self._past_successes += self.everyone.successes
            self.everyone = None
        self.state = state
        self.era += 1
        self.since = self.until = now
        self.refusal = REFUSALS.get(state, "")
        self.tally = self.trip.tally()
        self.succeeded = self.failed = self._settled = 0
        self._out = set()
        if state is CircuitState.CLOSED:
            self.last_failure: BaseException | None = None
            self._times_open = 0
            if not self.tally.timed:
                self.everyone = Permit(self, self.era)
                self.everyone.steady = self.tally.steady
        elif state is CircuitState.OPEN:
            self._open_seconds = self._open_time(asked)
            self.until = now + self._open_seconds

    def _open_time(self, asked: float | None) -> float:
        times, number = self.open_times, self._times_open
        self._times_open += 1
        if asked is not None:
            return min(asked, self.max_retry_after)
        return times[min(number, len(times) - 1)]

    @property
    def isolated(self) -> bool:
        """Whether the circuit is held open by hand."""
        return self.until == math.inf

    @property
    def probes_out(self) -> int:
        """How many probes are under way."""
        return len(self._out)

    @property
    def steady_successes(self) -> int:
        """How many successes were counted on permits and not reported."""
        return self._past_successes + (self.everyone.successes if self.everyone else 0)

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
            self._move(CircuitEvent.WAITED, now)
        if self.state is CircuitState.CLOSED:
            return self.everyone or Permit(self, self.era, now)
        if self.state is CircuitState.HALF_OPEN:
            return self._admit_probe(now)
        return None

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
        permit = Permit(self, self.era, now, now + self.probe_timeout)
        self._out.add(permit)
        return permit

    def _is_full(self) -> bool:
        # Not one probe more than the successes that are still needed.
        return (
            self.state is CircuitState.HALF_OPEN and len(self._out) + self.succeeded >= self.probes
        )

    def succeed(self, permit: Permit, now: float) -> bool:
        """Take note of a success, and tell whether it came in time to matter."""
        if permit.era != self.era:
            return False
        if self.state is CircuitState.CLOSED:
            self._record(permit, False, now)
        elif permit in self._out:
            self._out.remove(permit)
            self.succeeded += 1
            if self.succeeded == self.probes:
                self._move(CircuitEvent.RECOVERED, now)
        else:
            return False  # a probe that has lost its place
        return True

    def fail(
        self, permit: Permit, now: float, error: BaseException | None, asked: float | None = None
    ) -> bool:
        """Take note of a failure that asked for so many seconds, and tell whether it mattered."""
        closed = self.state is CircuitState.CLOSED
        if permit.era != self.era or not (closed or permit in self._out):
            return False
        self.last_failure = error
        self.failed += 1
        if closed:
            self._record(permit, True, now, asked)
        else:
            self._move(CircuitEvent.PROBE_FAILED, now, asked)
        return True

    def _record(self, permit: Permit, failed: bool, now: float, asked: float | None = None) -> None:
        if permit.successes != self._settled:
            self.tally.settle(permit.successes - self._settled)
            self._settled = permit.successes
        if self.tally.record(failed, now, now - permit.began):
            self._move(CircuitEvent.TRIPPED, now, asked)
        elif self.everyone is not None:
            self.everyone.steady = self.tally.steady

    def give_back(self, permit: Permit) -> None:
        """Free the place of a probe that says nothing."""
        self._out.discard(permit)

    def isolate(self, now: float) -> None:
        """Open the circuit until :meth:`reset`."""
        self._move(CircuitEvent.ISOLATED, now)

    def reset(self, now: float) -> None:
        """Close the circuit."""
        self._move(CircuitEvent.RESET, now)


class TripRule(Protocol):
    """When a circuit opens. The rule holds no state, so that breakers may share it."""

    def tally(self) -> Tally:
        """Begin to count; called at the beginning of each era."""


class Tally(Protocol):
    """What a :class:`TripRule` counts in one era."""

    @property
    def steady(self) -> bool:
        """Whether no success can open the circuit now, and it does not matter when one came.

        Then successes are not recorded one by one, but handed to :meth:`settle` before the next
        failure.
        """

    @property
    def timed(self) -> bool:
        """Whether it wants to know how long each call took; this never changes."""

    def record(self, failed: bool, now: float, seconds: float = 0.0) -> bool:
        """Count one call that took so many seconds, and tell whether the circuit must open."""

    def settle(self, successes: int) -> None:
        """Count successes that came while the tally was steady."""


class _Combinable:
    __slots__ = ()

    def __or__(self, other: TripRule) -> AnyOf:
        """Return the rule that opens when this one does or the other."""
        return AnyOf(cast("TripRule", self), other)


@dataclass(frozen=True, slots=True)
class Consecutive(_Combinable):
    """Open after so many failures in a row, with no success between them.

    Args:
        failures: How many.
    """

    failures: int

    def __post_init__(self) -> None:
        check_count("failures", self.failures)

    def tally(self) -> Tally:
        """Begin to count."""
        return _CountTally(1.0, self.failures, self.failures)


@dataclass(frozen=True, slots=True)
class FailureRate(_Combinable):
    """Open when too large a part of the last calls has failed.

    Failures in a row miss a service that fails every second time.

    Args:
        rate: The part that is too large, above 0 and at most 1.
        window: How many calls are looked at; ``None`` means 20, unless ``seconds`` are given.
        seconds: Look at the calls of so many seconds, however many they are; forgotten by tenths.
        least: How many calls must be there before the rate means anything; ``None`` means
            ``window``, and 20 with ``seconds``.

    Raises:
        ValueError: If a number is out of its range, or both windows are given.

    The windows are those of resilience4j: count-based and time-based.
    """

    rate: float
    window: int | None = None
    least: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_positive("rate", self.rate)
        if self.rate > 1:
            raise ValueError(f"rate must be at most 1, got {self.rate!r}")
        if self.window is not None:
            check_count("window", self.window)
        if self.least is not None:
            check_count("least", self.least)
        window = self.window or WINDOW
        if self.seconds is not None:
            check_positive("seconds", self.seconds)
            if self.window is not None:
                raise ValueError(f"window must be None where seconds are given, got {window!r}")
        elif self.least is not None and self.least > window:
            raise ValueError(f"least must be at most the window of {window}, got {self.least!r}")

    def tally(self) -> Tally:
        """Begin to count."""
        if self.seconds is not None:
            return _TimeTally(self.rate, self.seconds, self.least or WINDOW)
        window = self.window or WINDOW
        return _CountTally(self.rate, window, self.least or window)


@dataclass(frozen=True, slots=True)
class SlowCallRate(_Combinable):
    """Open when too large a part of the last calls was slow, whether they failed or not.

    A service that is about to fall gets slow first, and slow calls hold connections and memory.

    Args:
        rate: The part that is too large, above 0 and at most 1.
        slower_than: Seconds above which a call is slow.
        window: How many calls are looked at; ``None`` means 20, unless ``seconds`` are given.
        seconds: Look at the calls of so many seconds, however many they are; forgotten by tenths.
        least: How many calls must be there before the rate means anything; ``None`` means
            ``window``, and 20 with ``seconds``.

    Raises:
        ValueError: If a number is out of its range, or both windows are given.
    """

    rate: float
    slower_than: float
    window: int | None = None
    least: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_positive("slower_than", self.slower_than)
        self._rate()  # refuses bad numbers

    def _rate(self) -> FailureRate:
        return FailureRate(self.rate, self.window, self.least, self.seconds)

    def tally(self) -> Tally:
        """Begin to count."""
        return _SlowTally(self.slower_than, self._rate().tally())


class _CountTally:
    """The rate over the last calls, known by the numbers of the bad ones among them."""

    timed = False

    def __init__(self, rate: float, window: int, least: int) -> None:
        self._rate = rate
        self._window = window
        self._least = least
        self._calls = 0
        self._bad: deque[int] = deque()
        self.steady = True

    def settle(self, successes: int) -> None:
        self._calls += successes

    def record(self, failed: bool, now: float, seconds: float = 0.0) -> bool:
        self._calls += 1
        bad = self._bad
        if failed:
            bad.append(self._calls)
        while bad and bad[0] <= self._calls - self._window:
            bad.popleft()
        # Where there are enough calls, or no bad ones, a success cannot raise the rate.
        self.steady = not bad or self._calls >= self._least
        looked_at = min(self._calls, self._window)
        # Divided, as whoever writes 0.07 means 7 of 100; 0.07 * 100 is a little more than 7.
        return looked_at >= self._least and len(bad) / looked_at >= self._rate


class _TimeTally:
    """The rate over the last seconds: that of ten slots and the one that is filling."""

    timed = steady = False
    slots = 10

    def __init__(self, rate: float, seconds: float, least: int) -> None:
        self._rate = rate
        self._least = least
        self._slot = seconds / self.slots
        self._number = math.nan  # of the slot that is filling
        self._calls = self._bad = 0
        # The number of each slot, and how many calls and bad ones there were before it.
        self._begun: deque[tuple[float, int, int]] = deque()

    def settle(self, successes: int) -> None:
        raise NotImplementedError  # never steady

    def record(self, failed: bool, now: float, seconds: float = 0.0) -> bool:
        number = now // self._slot
        if number != self._number:
            self._begin(number)
        self._calls += 1
        self._bad += failed
        _, calls, bad = self._begun[0]
        calls = self._calls - calls
        return calls >= self._least and (self._bad - bad) / calls >= self._rate

    def _begin(self, number: float) -> None:
        self._number = number
        self._begun.append((number, self._calls, self._bad))
        # Newer ones than this are of another loop's clock.
        while not number - self.slots <= self._begun[0][0] <= number:
            self._begun.popleft()


class _SlowTally:
    """A rate whose bad calls are the slow ones."""

    timed = True
    steady = False

    def __init__(self, slower_than: float, rate: Tally) -> None:
        self._slower_than = slower_than
        self._rate = rate

    def settle(self, successes: int) -> None:
        raise NotImplementedError  # never steady

    def record(self, failed: bool, now: float, seconds: float = 0.0) -> bool:
        return self._rate.record(seconds > self._slower_than, now, seconds)


class AnyOf(_Combinable):
    """Open as soon as one of several rules does; ``rule | rule`` makes one, too.

    Args:
        *rules: The rules, such as :class:`Consecutive`, :class:`FailureRate` and
            :class:`SlowCallRate`.

    Raises:
        ValueError: If there is none.
        TypeError: If one is no rule.
    """

    __slots__ = ("rules",)

    def __init__(self, *rules: TripRule) -> None:
        if not rules:
            raise ValueError("rules must not be empty")
        self.rules = tuple(_rule("rules", rule) for rule in rules)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.rules))

    def tally(self) -> Tally:
        """Begin to count."""
        return _AnyTally([rule.tally() for rule in self.rules])


class _AnyTally:
    def __init__(self, tallies: list[Tally]) -> None:
        self._tallies = tallies
        self.timed = any(tally.timed for tally in tallies)

    @property
    def steady(self) -> bool:
        return all(tally.steady for tally in self._tallies)

    def settle(self, successes: int) -> None:
        for tally in self._tallies:
            tally.settle(successes)

    def record(self, failed: bool, now: float, seconds: float = 0.0) -> bool:
        # All of them must count: any() alone would stop at the first that is true.
        trips = [tally.record(failed, now, seconds) for tally in self._tallies]
        return any(trips)


@dataclass(frozen=True, slots=True)
class CircuitBreakersStatistics:
    """What a registry of circuit breakers holds.

    Attributes:
        breakers: How many breakers there are.
        not_closed: How many of them are open or half-open.
        evicted: How many were dropped so far.
        evicted_open: How many of those were open or half-open.
    """

    breakers: int
    not_closed: int
    evicted: int
    evicted_open: int


class CircuitBreakers(Generic[K]):
    """Have one circuit breaker for each host, tenant or shard, without keeping them for ever.

    With one breaker for all hosts, one that is down closes the way to the others. Here
    ``breakers[key]`` makes one when it is first asked for. When there are too many, the one that
    was used the longest ago goes; a closed one first, since it forgets no more than a few failures.
    If the hundred used longest ago are all open, the oldest of those goes, which is counted, and
    logged once a minute. One that nobody has used for ``idle`` seconds goes, too, but not while it
    is open.

    Calls under way keep the breaker that let them through. It may be shared by threads.

    Args:
        make: Makes the breaker of a key.
        most: How many breakers are kept.
        idle: Seconds after which one that is not used may go.

    Attributes:
        on_event: Called with the kind and the data of what happened:
            ``circuit_breaker.evicted`` (``key``, ``state``).

    Raises:
        ValueError: If ``most`` or ``idle`` is zero, negative or not finite.
        TypeError: If an argument is of the wrong type.
    """

    def __init__(
        self, make: Callable[[K], CircuitBreaker], *, most: int = 1000, idle: float = 600.0
    ) -> None:
        if not callable(make):
            raise TypeError(f"make must be callable, got {make!r}")
        check_count("most", most)
        check_positive("idle", idle)
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._make = make
        self._most = most
        self._idle = idle
        self._lock = threading.Lock()
        # Those used last are at the end, each with the time of that.
        self._breakers: OrderedDict[K, tuple[CircuitBreaker, float]] = OrderedDict()
        self._evicted = self._evicted_open = 0
        self._silent_until = -math.inf

    def __getitem__(self, key: K) -> CircuitBreaker:
        """Return the breaker of ``key``; make it if there is none."""
        with self._lock:
            entry = self._breakers.get(key)
            if entry is not None:
                return self._use(key, entry[0])
        new = self._make(key)  # without the lock: who knows what it does
        if not isinstance(new, CircuitBreaker):
            raise TypeError(f"make must return a CircuitBreaker, got {new!r}")
        gone: list[tuple[K, CircuitState]] = []
        with self._lock:
            entry = self._breakers.get(key)
            if entry is None:
                gone = self._make_room(_now())
            breaker = self._use(key, new if entry is None else entry[0])
        for old, state in gone:
            self._tell(old, state)
        return breaker

    def _use(self, key: K, breaker: CircuitBreaker) -> CircuitBreaker:
        self._breakers[key] = (breaker, _now())
        self._breakers.move_to_end(key)
        return breaker

    def __contains__(self, key: object) -> bool:
        return key in self._breakers

    def __len__(self) -> int:
        return len(self._breakers)

    def items(self) -> list[tuple[K, CircuitBreaker]]:
        """Return the keys and their breakers at this moment; that does not count as use."""
        with self._lock:
            return [(key, breaker) for key, (breaker, _) in self._breakers.items()]

    def statistics(self) -> CircuitBreakersStatistics:
        """Return how many breakers there are, and how many there were."""
        items = self.items()
        return CircuitBreakersStatistics(
            breakers=len(items),
            not_closed=sum(b.state is not CircuitState.CLOSED for _, b in items),
            evicted=self._evicted,
            evicted_open=self._evicted_open,
        )

    def _make_room(self, now: float) -> list[tuple[K, CircuitState]]:
        gone, passed = [], []
        for key, (breaker, used) in [*islice(self._breakers.items(), LOOKED_AT)]:
            full = len(self._breakers) >= self._most
            idle = not 0 <= now - used < self._idle
            if not full and not idle:
                break
            state = breaker.state
            if state is CircuitState.CLOSED or (idle and state is not CircuitState.OPEN):
                gone.append(self._drop(key, state))
            else:
                passed.append(key)
        if len(self._breakers) >= self._most:
            oldest = passed.pop(0)
            gone.append(self._drop(oldest, self._breakers[oldest][0].state))
        if len(passed) >= LOOKED_AT - 1:
            for key in passed:  # so that others are looked at the next time
                self._breakers.move_to_end(key)
        return gone

    def _drop(self, key: K, state: CircuitState) -> tuple[K, CircuitState]:
        del self._breakers[key]
        self._evicted += 1
        self._evicted_open += state is not CircuitState.CLOSED
        return key, state

    def _tell(self, key: K, state: CircuitState) -> None:
        if state is CircuitState.OPEN and (now := _now()) >= self._silent_until:
            self._silent_until = now + SILENCE
            _log.warning(
                "the open circuit breaker of %r was dropped: too many keys; %d so far, and more of "
                "them are not logged for %g s",
                key,
                self._evicted_open,
                SILENCE,
            )
        if self.on_event is not None:
            notify(self.on_event, "circuit_breaker.evicted", key=key, state=state.value)


class _Unguarded(TypeError):  # noqa: N818 -- never seen under this name
    """A plain function turned out to be asynchronous; no fault of the service."""


# A task or thread and the permits of the blocks that it is in. A task begun inside of a block gets
# the context of that, so it must see that the list is not its own.
_blocks: contextvars.ContextVar[Any] = contextvars.ContextVar("blocks", default=("nobody",))


def _own_blocks() -> list[Any]:
    loop = asyncio._get_running_loop()
    owner = (loop and current_task(loop)) or threading.get_ident()
    blocks: list[Any] = _blocks.get()
    if blocks[0] != owner:
        blocks = [owner]
        _blocks.set(blocks)
    return blocks


def _now() -> float:
    # get_running_loop() raises where there is none, which takes longer than the whole call.
    loop = asyncio._get_running_loop()  # one of the names that asyncio.events exports
    # What a real loop's clock shows is this, too.
    return time.monotonic() if loop is None else loop.time()


def _time_asked_for(failures: list[BaseException]) -> float | None:
    """Return the longest ``retry_after`` of several exceptions."""
    times = []
    for failure in failures:
        with suppress(Exception):  # it may be a property, and raise
            asked = getattr(failure, "retry_after", None)
            if isinstance(asked, int | float) and asked > 0:  # NaN is not
                times.append(asked)
    return max(times, default=None)


def _refuse_awaitable(fn: object, result: object) -> None:
    """Refuse what would fail later, out of the breaker's sight."""
    if hasattr(result, "__await__"):
        if inspect.iscoroutine(result):
            result.close()
        raise _Unguarded(f"{fn!r} returns an awaitable; guard an async def, or use call()")


def _open_times(open_for: float | Iterable[float]) -> tuple[float, ...]:
    times = tuple(islice(open_for, LONGEST)) if isinstance(open_for, Iterable) else (open_for,)
    if not times:
        raise ValueError("open_for must not be empty")
    for seconds in times:
        check_positive("open_for", seconds)
    return times


def _rule(name: str, rule: TripRule) -> TripRule:
    if not callable(getattr(rule, "tally", None)):
        raise TypeError(f"{name} must be a trip rule such as FailureRate, got {rule!r}")
    return rule


def _exceptions(
    name: str, value: type[BaseException] | tuple[type[BaseException], ...]
) -> tuple[type[BaseException], ...]:
    kinds = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        raise TypeError(f"{name} must be an exception type or a tuple of them, got {value!r}")
    return kinds
