"""Graceful degradation: when the service fails or dawdles, give the next best answer, and say so.

:class:`Fallback` asks somebody else. :class:`StaleCache` gives the answer of before. :class:`Hedge`
asks once more while the first answer is still awaited, and takes the one that comes first.
"""

from __future__ import annotations

import asyncio
import bisect
import contextvars
import functools
import inspect
import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar

from .errors import (
    DeadlineExceeded,
    LocalRejection,
    cancel_requests,
    check_count,
    check_loop,
    check_positive,
    check_seconds,
    comes_of_cancellation,
    decorate,
    notify,
)
from .timeout import move_on_after, without_deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence

__all__ = [
    "Alternative",
    "Fallback",
    "FallbackStatistics",
    "Hedge",
    "HedgeBudget",
    "HedgeStatistics",
    "Outcome",
    "StaleCache",
    "StaleCacheStatistics",
    "constant",
]

P = ParamSpec("P")
T = TypeVar("T")

PRIMARY, CACHE, STALE = "primary", "cache", "stale"

# The failures of a service. A bug is not among them: it is not to be covered up.
FAILURES = (ConnectionError, TimeoutError, LocalRejection)


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """An answer, and where it came from.

    Attributes:
        value: The answer.
        degraded: Whether it is less than what was asked for.
        source: ``"primary"``, or the name of the alternative; from a :class:`StaleCache` also
            ``"cache"`` or ``"stale"``.
        error: Why the primary function gave no answer; ``None`` if it did, or was not asked.
    """

    value: T
    degraded: bool
    source: str
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Alternative:
    """One alternative of a :class:`Fallback`, with a name and a time limit of its own.

    Args:
        fn: A function, asynchronous or not, that takes the arguments of the call.
        source: Its name in :class:`Outcome`; ``None`` means the name of the function.
        timeout: Its time limit in seconds; ``None`` means that of the :class:`Fallback`.
    """

    fn: Callable[..., Any]
    source: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn must be a function, got {self.fn!r}; use constant() for a value")
        if self.timeout is not None:
            check_positive("timeout", self.timeout)

    @property
    def name(self) -> str:
        """The name that :class:`Outcome` shows."""
        if self.source is not None:
            return self.source
        fn = self.fn
        while isinstance(fn, functools.partial):
            fn = fn.func
        return getattr(fn, "__name__", type(fn).__name__)


def constant(value: object, *, source: str = "constant") -> Alternative:
    """Make an alternative that always answers ``value``.

    Args:
        value: The answer. All callers get this very object, so it should not be changed.
        source: Its name in :class:`Outcome`.
    """

    def answer(*_: object, **__: object) -> object:
        return value

    return Alternative(answer, source=source)


@dataclass(frozen=True, slots=True)
class FallbackStatistics:
    """Where the answers came from.

    Attributes:
        primary: How many calls the primary function answered.
        degraded: How many calls an alternative answered.
        failed: How many calls nobody answered.
        sources: How many calls each alternative answered, by its name.
    """

    primary: int
    degraded: int
    failed: int
    sources: Mapping[str, int]


class Fallback:
    """Give the next best answer when the best one cannot be had.

    A page without recommendations is better than no page. When the function fails with one of the
    exceptions in ``on``, the alternatives are asked one after the other, with the same arguments,
    until one answers: a replica, a cache, a :func:`constant`.

    A cancelled call is over, and nobody else is asked, not even if the function turns its
    cancellation into another error. If no alternative answers, the error of the last one is raised,
    with the earlier ones as its causes.

    Args:
        *alternatives: Functions, asynchronous or not, or :class:`Alternative` objects; in the order
            in which they are asked. Any :exc:`Exception` of one leads to the next.
        on: The exceptions of the primary function that ask for an alternative. By default the
            failures of connections, timeouts, and the refusals of our own policies; a bug is not
            covered up. An exception group must consist of such exceptions.
        timeout: The time limit of each alternative in seconds, which it sees as a
            :func:`~concurrency_patterns.timeout.deadline`; ``None`` for no limit. A function that
            is not asynchronous cannot be stopped.

    Raises:
        ValueError: If there is no alternative, or ``timeout`` is not above 0.
        TypeError: If an alternative is no function.

    Attributes:
        on_event: Called with the kind and the data of an event: ``fallback.degraded`` (``source``,
            ``error``), ``fallback.failed`` (``error``). ``None`` for nobody.

    The pattern is the fallback of Netflix's Hystrix; before that, graceful degradation.
    """

    def __init__(
        self,
        *alternatives: Callable[..., Any] | Alternative,
        on: type[Exception] | tuple[type[Exception], ...] = FAILURES,
        timeout: float | None = None,
    ) -> None:
        if not alternatives:
            raise ValueError("alternatives must not be empty: a fallback needs somebody to ask")
        if timeout is not None:
            check_positive("timeout", timeout)
        self._on = _exceptions(on)
        self._alternatives = [
            item if isinstance(item, Alternative) else Alternative(item) for item in alternatives
        ]
        self._timeout = timeout
        self._primary = self._failed = 0
        self._sources = {alternative.name: 0 for alternative in self._alternatives}
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None

    def __repr__(self) -> str:
        return f"Fallback({', '.join(alternative.name for alternative in self._alternatives)})"

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn``, and ask the alternatives if it fails.

        Returns:
            The first answer.

        Raises:
            Exception: What ``fn`` raised, if ``on`` does not name it; or the error of the last
                alternative.
        """
        requests = cancel_requests()
        try:
            value = await fn(*args, **kwargs)
        except Exception as error:
            if not _matches(error, self._on) or comes_of_cancellation(error, requests):
                raise
            errors = [error]
        else:
            self._primary += 1
            return value
        outcome: Outcome[T] = await self._ask(errors, requests, args, kwargs)
        return outcome.value

    async def outcome(
        self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Outcome[T]:
        """As :meth:`call`, but tell who answered.

        Returns:
            The answer, whether it is degraded, and its source.
        """
        requests = cancel_requests()
        try:
            value = await fn(*args, **kwargs)
        except Exception as error:
            if not _matches(error, self._on) or comes_of_cancellation(error, requests):
                raise
            errors = [error]
        else:
            self._primary += 1
            return Outcome(value, degraded=False, source=PRIMARY, error=None)
        return await self._ask(errors, requests, args, kwargs)

    def __call__(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate an ``async def`` so that the alternatives answer when it fails."""
        return decorate(self.call, fn)

    def statistics(self) -> FallbackStatistics:
        """Return where the answers came from so far."""
        return FallbackStatistics(
            primary=self._primary,
            degraded=sum(self._sources.values()),
            failed=self._failed,
            sources=dict(self._sources),
        )

    async def _ask(
        self,
        errors: list[Exception],
        requests: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Outcome[Any]:
        # Not called in an ``except``: behind a cancellation Python would mix up the contexts.
        original = errors[0]
        try:
            for alternative in self._alternatives:
                try:
                    value = await self._answer(alternative, args, kwargs)
                except Exception as error:
                    if comes_of_cancellation(error, requests):
                        raise
                    _link(error, errors[-1], self)
                    errors.append(error)
                else:
                    source = alternative.name
                    self._sources[source] += 1
                    if self.on_event is not None:
                        notify(self.on_event, "fallback.degraded", source=source, error=original)
                    return Outcome(value, degraded=True, source=source, error=original)
            self._failed += 1
            if self.on_event is not None:
                notify(self.on_event, "fallback.failed", error=errors[-1])
            raise errors[-1]
        finally:
            errors.clear()  # the traceback holds this frame: no cycle

    async def _answer(
        self, alternative: Alternative, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        seconds = self._timeout if alternative.timeout is None else alternative.timeout
        if seconds is None:
            return await _call(alternative.fn, args, kwargs)
        async with move_on_after(seconds):
            return await _call(alternative.fn, args, kwargs)
        message = f"{alternative.name} did not answer within {seconds} s"
        raise DeadlineExceeded(message, seconds=seconds)


async def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that may be asynchronous, or not."""
    value = fn(*args, **kwargs)
    return await value if inspect.isawaitable(value) else value


@dataclass(frozen=True, slots=True)
class StaleCacheStatistics:
    """What a :class:`StaleCache` has done.

    Attributes:
        size: How many answers it holds.
        hits: Calls answered with a fresh answer that it held.
        fetched: How often the function was called.
        joined: Calls that waited for a fetch which another call had begun.
        stale: Calls answered with an old answer, as the fetch failed.
        failed: Calls whose fetch failed, and for which there was no old answer.
        evicted: Answers thrown out because there were too many.
    """

    size: int
    hits: int
    fetched: int
    joined: int
    stale: int
    failed: int
    evicted: int


@dataclass(slots=True)
class _Entry:
    value: Any
    stored: float


@dataclass(slots=True, eq=False)
class _Flight:
    """A fetch under way, how many wait for it, and the fetches for which it waits itself."""

    task: asyncio.Task[Any] | None = None
    waiting: int = 0
    needed: list[_Flight] = field(default_factory=list)

    def needs(self, other: _Flight) -> bool:
        """Tell whether it cannot end before ``other`` has."""
        reached, ahead = {self}, [self]
        while ahead:
            new = set(ahead.pop().needed) - reached
            reached |= new
            ahead += new
        return other in reached


# The fetch that runs here, also in the tasks that it has begun.
_here: contextvars.ContextVar[_Flight | None] = contextvars.ContextVar("flight", default=None)


class StaleCache:
    """Keep answers for a while, and for a while longer in case the service fails.

    The prices of five minutes ago are better than an error. A fresh answer is given at once; an
    old one only if the function fails with one of the exceptions in ``on``. Only answers are kept,
    never exceptions.

    Calls for the same answer at the same time wait for one fetch (single flight). It runs in a task
    of its own and belongs to no caller: whoever is cancelled or runs out of time leaves, and the
    others go on waiting; when the last one has left, the fetch is cancelled. Therefore it does not
    see the deadline of a caller: put a :class:`~concurrency_patterns.timeout.Timeout` inside.

    An answer belongs to the function and its arguments; 1, 1.0 and True are different ones. A
    function that asks for the very answer that it is to give, by way of others or not, gets a
    :exc:`RuntimeError`, as it would wait for ever. All callers get the same object, so it
    should not be changed. When the cache is used on another event loop, it begins empty.

    Args:
        ttl: Seconds during which an answer is fresh; 0 to ask the function each time.
        stale_ttl: Seconds after that during which it is given if the function fails.
        max_size: How many answers are kept at most; the least recently used one goes first.
        key: Makes the key from the arguments; without it the arguments are the key.
        on: The failures for which an old answer is given; by default those of :class:`Fallback`.

    Raises:
        ValueError: If a number is out of its range, or nothing would ever be kept.
        TypeError: If ``key`` is no function.

    Attributes:
        on_event: Called with the kind and the data of an event: ``fallback.degraded`` (``source``,
            ``error``, ``seconds`` since the answer was fetched), ``fallback.failed`` (``error``).
            ``None`` for nobody.

    The directive is ``stale-if-error`` of RFC 5861, section 4; single flight is the name of Go's
    ``x/sync/singleflight``.
    """

    def __init__(
        self,
        ttl: float,
        stale_ttl: float,
        max_size: int = 1024,
        *,
        key: Callable[..., Hashable] | None = None,
        on: type[Exception] | tuple[type[Exception], ...] = FAILURES,
    ) -> None:
        check_seconds("ttl", ttl)
        check_seconds("stale_ttl", stale_ttl)
        if ttl + stale_ttl == 0:
            raise ValueError("ttl and stale_ttl must not both be 0: nothing would ever be kept")
        check_count("max_size", max_size)
        if key is not None and not callable(key):
            raise TypeError(f"key must be a function, got {key!r}")
        self.ttl = ttl
        self.stale_ttl = stale_ttl
        self.max_size = max_size
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._key = key
        self._on = _exceptions(on)
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._flights: dict[Hashable, _Flight] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hits = self._fetched = self._joined = self._stale = self._failed = self._evicted = 0

    def __repr__(self) -> str:
        return (
            f"StaleCache(ttl={self.ttl!r}, stale_ttl={self.stale_ttl!r}, max_size={self.max_size})"
        )

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the answer of ``fn``: a fresh one, or if ``fn`` fails an old one.

        Raises:
            TypeError: If the key is not hashable.
            Exception: What ``fn`` raised, if there is no old answer or ``on`` does not name it.
        """
        return (await self.outcome(fn, *args, **kwargs)).value

    async def outcome(
        self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Outcome[T]:
        """As :meth:`call`, but tell where the answer came from.

        Returns:
            The answer; ``degraded`` if it is an old one.
        """
        clock = self._bind().time
        key = self._key_of(fn, args, kwargs)
        entry = self._entries.get(key)
        if entry is not None and clock() - entry.stored < self.ttl:
            self._entries.move_to_end(key)
            self._hits += 1
            return Outcome(entry.value, degraded=False, source=CACHE, error=None)
        try:
            value = await self._fetch(key, functools.partial(fn, *args, **kwargs))
        except Exception as error:
            old = self._old_answer(key, error, clock()) if _matches(error, self._on) else None
            if old is None:
                raise
            return old
        return Outcome(value, degraded=False, source=PRIMARY, error=None)

    def __call__(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate an ``async def`` so that its answers are kept."""
        return decorate(self.call, fn)

    def clear(self) -> None:
        """Forget all answers; one that is being fetched reaches its callers, but is not kept."""
        self._entries.clear()
        self._flights.clear()

    def statistics(self) -> StaleCacheStatistics:
        """Return how the calls were answered so far."""
        return StaleCacheStatistics(
            size=len(self._entries),
            hits=self._hits,
            fetched=self._fetched,
            joined=self._joined,
            stale=self._stale,
            failed=self._failed,
            evicted=self._evicted,
        )

    def _bind(self) -> asyncio.AbstractEventLoop:
        loop = check_loop(self, self._loop)
        if loop is not self._loop:
            self._loop = loop
            self.clear()  # its clock may be another one, and no task of the old loop ends any more
        return loop

    def _key_of(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Hashable:
        made: object
        if self._key is None:
            made = args, tuple(sorted(kwargs.items()))
            key = _identity(functools.partial(fn, *args, **kwargs))
        else:
            made = self._key(*args, **kwargs)
            key = _identity(fn), made
        try:
            hash(key)
        except TypeError:
            raise TypeError(f"the key must be hashable, got {made!r}; give a key=...") from None
        return key

    def _old_answer(self, key: Hashable, error: Exception, now: float) -> Outcome[Any] | None:
        entry = self._entries.get(key)
        if entry is None or now - entry.stored >= self.ttl + self.stale_ttl:
            self._entries.pop(key, None)
            self._failed += 1
            if self.on_event is not None:
                notify(self.on_event, "fallback.failed", error=error)
            return None
        self._entries.move_to_end(key)
        self._stale += 1
        if self.on_event is not None:
            event = {"source": STALE, "error": error, "seconds": now - entry.stored}
            notify(self.on_event, "fallback.degraded", **event)
        return Outcome(entry.value, degraded=True, source=STALE, error=error)

    async def _fetch(self, key: Hashable, fetch: Callable[[], Awaitable[Any]]) -> Any:
        """Wait for the fetch that is under way, or begin one."""
        flight, here = self._flights.get(key), _here.get()
        if flight is None:
            flight = self._flights[key] = _Flight()
            self._fetched += 1
        elif here is not None and flight.needs(here):
            raise RuntimeError("a fetch asks the cache for the very answer that it fetches")
        else:
            self._joined += 1
        flight.waiting += 1
        needed = [] if here is None else here.needed
        needed.append(flight)
        try:
            if flight.task is None:
                flight.task = asyncio.create_task(
                    self._fly(key, flight, fetch), context=without_deadline()
                )
            await asyncio.wait([flight.task])  # a cancellation ends the wait, and not the task
        finally:
            needed.remove(flight)
            flight.waiting -= 1
            if flight.waiting == 0 and flight.task is not None:
                self._land(key, flight)  # who comes now begins a new one
                await _reap([flight.task])
        try:
            return flight.task.result()
        finally:
            del flight, here  # the traceback of its exception holds this frame: no cycle

    async def _fly(
        self, key: Hashable, flight: _Flight, fetch: Callable[[], Awaitable[Any]]
    ) -> Any:
        _here.set(flight)
        try:
            value = await fetch()
            if self._flights.get(key) is flight and self._loop is not None:
                self._store(key, value, self._loop.time())
            return value
        finally:
            self._land(key, flight)
            _here.set(None)
            del flight  # it knows this task, as did its context and does this frame: no cycle

    def _land(self, key: Hashable, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _store(self, key: Hashable, value: Any, now: float) -> None:
        self._entries[key] = _Entry(value, now)
        self._entries.move_to_end(key)
        if len(self._entries) > self.max_size:
            self._entries.popitem(last=False)
            self._evicted += 1


def _identity(value: object) -> Hashable:
    """Return what is the same for two functions that do the same: partials differ by identity.

    So do arguments that are equal and of different types, such as 1 and True.
    """
    if isinstance(value, functools.partial):
        return (
            _identity(value.func),
            tuple(map(_identity, value.args)),
            tuple((name, _identity(given)) for name, given in sorted(value.keywords.items())),
        )
    return type(value), value


class HedgeBudget(Protocol):
    """Says how many more attempts there may be.

    A :class:`~concurrency_patterns.retry.RetryBudget` is one: shared, it bounds the retries and the
    hedges together.
    """

    def deposit(self, now: float) -> None:
        """Count a call; it pays for a part of an attempt."""
        ...

    def withdraw(self, now: float) -> bool:
        """Take one attempt out of the budget, and tell whether it held one."""
        ...


@dataclass(frozen=True, slots=True)
class HedgeStatistics:
    """What a :class:`Hedge` has done.

    Attributes:
        calls: Calls begun.
        hedged: Calls for which a second attempt was begun.
        won: Calls that the second attempt answered.
        refused: Calls that would have got a second attempt, had the budget allowed it.
        delay: After how many seconds the second attempt begins now; ``None`` if it is not known.
    """

    calls: int
    hedged: int
    won: int
    refused: int
    delay: float | None


class Hedge:
    """Ask a second time if the answer is late, and take the one that comes first.

    One call in a hundred may hit a server that is just collecting garbage, and takes a hundred
    times as long. The second attempt most likely does not. The slower one is cancelled, and has
    ended before the answer is returned; one that refuses to end holds up the answer.

    An attempt that fails is no answer as long as the other one is under way. If both fail, the
    error of the one that ended last is raised, with the other one as its cause. If the
    first fails before the delay is over, its error is raised at once: to try again is the business
    of a :class:`~concurrency_patterns.retry.Retry`, which belongs outside. When the call is
    cancelled, both attempts are.

    Only for what may be done twice, such as reading.

    Args:
        delay: Seconds after which the second attempt begins.
        percentile: Begin it when the call takes longer than this share of the last 100 calls, such
            as 0.95. Until 10 are known, ``delay`` counts; without it there is no second attempt.
        budget: How many second attempts there may be for each call; 0.1 is one for ten calls, and
            up to ten are saved. When the service is slow for all, it must not get twice the load.
            Or a :class:`HedgeBudget`.

    Raises:
        ValueError: If neither ``delay`` nor ``percentile`` is given, or one is out of its range.

    Attributes:
        on_event: Called with the kind and the data of an event: ``hedge.started`` (``seconds``
            since the call), ``hedge.won`` (``which``: ``"first"`` or ``"second"``, when there were
            two). ``None`` for nobody.

    Hedged requests are J. Dean and L. A. Barroso's, "The Tail at Scale", Communications of the ACM
    56(2), 2013; their second request begins at the 95th percentile.
    """

    def __init__(
        self,
        *,
        delay: float | None = None,
        percentile: float | None = None,
        budget: float | HedgeBudget = 0.1,
    ) -> None:
        if delay is None and percentile is None:
            raise ValueError("delay or percentile must be given, got neither")
        if delay is not None:
            check_seconds("delay", delay)
        if percentile is not None:
            check_positive("percentile", percentile)
            if percentile >= 1:
                raise ValueError(f"percentile must be below 1, got {percentile!r}")
        self.delay = delay
        self.percentile = percentile
        self.budget = budget
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._allowance = _allowance(budget)
        self._latencies = _Latencies()
        self._calls = self._hedged = self._won = self._refused = 0

    def __repr__(self) -> str:
        shown = {"delay": self.delay, "percentile": self.percentile, "budget": self.budget}
        given = (f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return f"Hedge({', '.join(given)})"

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn``, and once more if it takes long.

        Returns:
            The first answer.

        Raises:
            Exception: What ``fn`` raised, if no attempt gave an answer.
        """
        clock = asyncio.get_running_loop().time
        start = clock()
        self._calls += 1
        self._allowance.deposit(start)
        delay = self._current_delay()
        if delay is None:
            value = await fn(*args, **kwargs)
            self._latencies.add(clock() - start)
            return value
        attempts = [_begin(fn, args, kwargs)]
        try:
            await asyncio.wait(attempts, timeout=delay)
            if not attempts[0].done() and self._may_hedge(clock()):
                attempts.append(_begin(fn, args, kwargs))
                if self.on_event is not None:
                    notify(self.on_event, "hedge.started", seconds=clock() - start)
            winner = await _first_answer(attempts, self)
            value = attempts[winner].result()
            if winner == 0 or not attempts[0].done():
                # If it lost, it would have taken longer still: it counts as slow either way.
                self._latencies.add(clock() - start)
            if len(attempts) > 1:
                self._won += winner
                if self.on_event is not None:
                    notify(self.on_event, "hedge.won", which=("first", "second")[winner])
            return value
        finally:
            await _reap(attempts)
            attempts.clear()  # the traceback of an exception in them holds this frame: no cycle

    def __call__(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate an ``async def`` so that it is called once more if it takes long."""
        return decorate(self.call, fn)

    def statistics(self) -> HedgeStatistics:
        """Return how many calls were hedged, and whether that helped."""
        return HedgeStatistics(
            calls=self._calls,
            hedged=self._hedged,
            won=self._won,
            refused=self._refused,
            delay=self._current_delay(),
        )

    def _current_delay(self) -> float | None:
        if self.percentile is not None and self._latencies.are_enough():
            return self._latencies.at(self.percentile)
        return self.delay

    def _may_hedge(self, now: float) -> bool:
        allowed = self._allowance.withdraw(now)
        self._hedged += allowed
        self._refused += not allowed
        return allowed


def _begin(
    fn: Callable[..., Awaitable[T]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> asyncio.Task[T]:
    async def attempt() -> T:
        return await fn(*args, **kwargs)

    return asyncio.create_task(attempt())


async def _first_answer(attempts: Sequence[asyncio.Task[Any]], hedge: Hedge) -> int:
    """Return the number of the attempt that answers first; if none does, of the one ended last."""
    await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
    first = next(number for number, task in enumerate(attempts) if task.done())
    failure = _failure(attempts[first])
    if failure is None or len(attempts) == 1:
        return first
    other = 1 - first
    await asyncio.wait([attempts[other]])
    error = _failure(attempts[other])
    if error is not None:
        _link(error, failure, hedge)
    return other


def _failure(task: asyncio.Task[Any]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def _reap(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel the tasks and wait until they have ended; hand on a cancellation that comes then."""
    for task in tasks:
        task.cancel()
    interruption: asyncio.CancelledError | None = None
    while running := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as error:
            interruption = error
            for task in running:
                task.cancel()
    for task in tasks:
        if not task.cancelled():
            task.exception()  # it was seen: nothing is to be logged
    if interruption is not None:
        try:
            raise interruption
        finally:
            del interruption


class _Share:
    """A budget that a part of each call pays into."""

    _saved_at_most = 10.0

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._saved = self._saved_at_most

    def deposit(self, _: float) -> None:
        self._saved = min(self._saved + self._ratio, self._saved_at_most)

    def withdraw(self, _: float) -> bool:
        if self._saved < 1 - 1e-9:  # ten times 0.1 is a little less than 1
            return False
        self._saved -= 1
        return True


def _allowance(budget: float | HedgeBudget) -> HedgeBudget:
    if isinstance(budget, int | float):
        check_positive("budget", budget)
        return _Share(budget)
    if not all(callable(getattr(budget, name, None)) for name in ("deposit", "withdraw")):
        raise TypeError(f"budget must be a number or have deposit and withdraw, got {budget!r}")
    return budget


class _Latencies:
    """The last latencies, in order of time and in order of size."""

    _kept = 100
    _enough = 10

    def __init__(self) -> None:
        self._by_time: deque[float] = deque()
        self._by_size: list[float] = []

    def add(self, seconds: float) -> None:
        self._by_time.append(seconds)
        bisect.insort(self._by_size, seconds)
        if len(self._by_time) > self._kept:
            oldest = self._by_time.popleft()
            del self._by_size[bisect.bisect_left(self._by_size, oldest)]

    def are_enough(self) -> bool:
        return len(self._by_size) >= self._enough

    def at(self, percentile: float) -> float:
        """Return the latency at the nearest rank."""
        return self._by_size[math.ceil(percentile * len(self._by_size) - 1e-9) - 1]


def _exceptions(on: type[Exception] | tuple[type[Exception], ...]) -> tuple[type[Exception], ...]:
    kinds = on if isinstance(on, tuple) else (on,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
        # Not BaseException: a cancelled call must not be answered.
        raise TypeError(f"on must be an Exception type or a tuple of them, got {on!r}")
    return kinds


def _matches(error: Exception, on: tuple[type[Exception], ...]) -> bool:
    if isinstance(error, on):
        return True
    return isinstance(error, ExceptionGroup) and all(
        _matches(leaf, on) for leaf in error.exceptions
    )


def _link(error: BaseException, before: BaseException, by: object) -> None:
    """Let the traceback of ``error`` show ``before`` behind what made ``error`` happen."""
    known = {id(link) for link in _shown(before)}
    tail = None
    for link in _shown(error):
        if id(link) in known:
            break
        tail = link
        if getattr(link, "_linked_by", None) == id(by):
            break  # raised again: what it was linked to then makes way
    if tail is not None:
        # In a way that works for a class that forbids it, such as a frozen dataclass.
        BaseException.__setattr__(tail, "__cause__", before)
        BaseException.__setattr__(tail, "_linked_by", id(by))


def _shown(error: BaseException | None) -> list[BaseException]:
    """Return the exceptions that a traceback of ``error`` shows, the newest first."""
    shown: list[BaseException] = []
    while error is not None and error not in shown:
        shown.append(error)
        hidden = error.__suppress_context__  # which a cause sees to
        error = error.__cause__ if hidden else error.__context__
    return shown
