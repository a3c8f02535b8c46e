"""Graceful degradation: when the service fails, give the next best answer, and say so."""

from __future__ import annotations

import asyncio
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from .errors import DeadlineExceeded, LocalRejection, check_positive

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

__all__ = ["Alternative", "Fallback", "FallbackStatistics", "Outcome", "constant"]

P = ParamSpec("P")
T = TypeVar("T")

PRIMARY = "primary"


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """An answer, and where it came from.

    Attributes:
        value: The answer.
        degraded: Whether an alternative gave it.
        source: ``"primary"``, or the name of the alternative.
        error: Why the primary function gave no answer; ``None`` if it did.
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

    A cancelled call is cancelled; nobody else is asked. If no alternative answers, the error of the
    last one is raised, with the earlier ones as its causes.

    Args:
        *alternatives: Functions, asynchronous or not, or :class:`Alternative` objects; in the order
            in which they are asked. Any :exc:`Exception` of one leads to the next.
        on: The exceptions of the primary function that ask for an alternative. By default the
            failures of connections, timeouts, and the refusals of our own policies; a bug is not
            covered up. An exception group must consist of such exceptions.
        timeout: The time limit of each alternative in seconds; ``None`` for no limit. A function
            that is not asynchronous cannot be stopped.

    Raises:
        ValueError: If there is no alternative, or ``timeout`` is not above 0.
        TypeError: If an alternative is no function.

    The pattern is the fallback of Netflix's Hystrix; before that, graceful degradation.
    """

    def __init__(
        self,
        *alternatives: Callable[..., Any] | Alternative,
        on: type[Exception] | tuple[type[Exception], ...] = (
            ConnectionError,
            TimeoutError,
            LocalRejection,
        ),
        timeout: float | None = None,
    ) -> None:
        if not alternatives:
            raise ValueError("alternatives must not be empty: a fallback needs somebody to ask")
        if timeout is not None:
            check_positive("timeout", timeout)
        self._on = on if isinstance(on, tuple) else (on,)
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in self._on):
            # Not BaseException: a cancelled call must not be answered.
            raise TypeError(f"on must be an Exception type or a tuple of them, got {on!r}")
        self._alternatives = [
            item if isinstance(item, Alternative) else Alternative(item) for item in alternatives
        ]
        self._timeout = timeout
        self._primary = self._failed = 0
        self._sources = {alternative.name: 0 for alternative in self._alternatives}

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
        try:
            value = await fn(*args, **kwargs)
        except self._caught as error:
            if not self._matches(error):
                raise
            outcome: Outcome[T] = await self._ask_alternatives(error, args, kwargs)
            return outcome.value
        self._primary += 1
        return value

    async def outcome(
        self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Outcome[T]:
        """As :meth:`call`, but tell who answered.

        Returns:
            The answer, whether it is degraded, and its source.
        """
        try:
            value = await fn(*args, **kwargs)
        except self._caught as error:
            if not self._matches(error):
                raise
            return await self._ask_alternatives(error, args, kwargs)
        self._primary += 1
        return Outcome(value, degraded=False, source=PRIMARY, error=None)

    def __call__(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate an ``async def`` so that the alternatives answer when it fails."""
        if not inspect.iscoroutinefunction(fn):
            raise TypeError(f"fn must be an async function, got {fn!r}")

        @functools.wraps(fn)
        async def answered(*args: P.args, **kwargs: P.kwargs) -> T:
            return await self.call(fn, *args, **kwargs)

        return answered

    def statistics(self) -> FallbackStatistics:
        """Return where the answers came from so far."""
        return FallbackStatistics(
            primary=self._primary,
            degraded=sum(self._sources.values()),
            failed=self._failed,
            sources=dict(self._sources),
        )

    @property
    def _caught(self) -> tuple[type[Exception], ...]:
        return (*self._on, ExceptionGroup)

    def _matches(self, error: Exception) -> bool:
        if isinstance(error, self._on):
            return True
        return isinstance(error, ExceptionGroup) and all(map(self._matches, error.exceptions))

    async def _ask_alternatives(
        self, original: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Outcome[Any]:
        last = original
        try:
            for alternative in self._alternatives:
                try:
                    value = await self._ask(alternative, args, kwargs)
                except Exception as error:  # noqa: BLE001 -- whatever it is, the next one is asked
                    _add_cause(error, last)
                    last = error
                else:
                    self._sources[alternative.name] += 1
                    return Outcome(value, degraded=True, source=alternative.name, error=original)
            self._failed += 1
            raise last
        finally:
            del last  # the traceback holds this frame: no cycle

    async def _ask(
        self, alternative: Alternative, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        seconds = self._timeout if alternative.timeout is None else alternative.timeout
        try:
            async with asyncio.timeout(seconds) as scope:
                value = alternative.fn(*args, **kwargs)
                return await value if inspect.isawaitable(value) else value
        except TimeoutError:
            if not scope.expired():
                raise
            message = f"{alternative.name} did not answer within {seconds} s"
            raise DeadlineExceeded(message, seconds=seconds) from None


def _add_cause(error: BaseException, cause: BaseException) -> None:
    """Make ``cause`` the end of the chain of causes of ``error``, unless that closes a circle."""
    chain = _causes(error)
    if chain.keys().isdisjoint(_causes(cause)):
        list(chain.values())[-1].__cause__ = cause


def _causes(error: BaseException | None) -> dict[int, BaseException]:
    chain: dict[int, BaseException] = {}
    while error is not None and id(error) not in chain:
        chain[id(error)] = error
        error = error.__cause__
    return chain
