"""Several policies around one call, in an order that can be read and is checked.

A policy is known by its shape, an ``async def call(fn, ...)``, and not by its class: yours may
stand among ours.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from .circuit_breaker import CircuitBreaker
from .concurrency_limiter import ConcurrencyLimiter
from .errors import CircuitOpen, LocalRejection, check_positive
from .fallback import Fallback
from .retry import FullJitter, Retry, RetryBudget
from .timeout import Timeout
from .token_bucket import TokenBucket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from .fallback import Alternative

__all__ = ["Composition", "CompositionStatistics", "OrderWarning", "Policy", "compose", "standard"]

P = ParamSpec("P")
T = TypeVar("T")


class Policy(Protocol):
    """Whatever calls a function in its own way: later, again, not at all, not too often."""

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn`` with these arguments and return what it returns."""
        ...


class OrderWarning(UserWarning):
    """Two policies stand in an order in which they harm each other."""


def compose(*policies: Policy) -> Composition:
    """Put several policies around a call, the outermost first.

    Nested by hand, policies are hard to read and easy to put into a wrong order. The order that
    serves most calls is fallback, timeout for the whole, retry, circuit breaker, concurrency
    limiter, token bucket, timeout for one attempt. An order that is known to do harm is warned of
    with an :class:`OrderWarning`.

    Args:
        *policies: The policies, the outermost first. A composition may be one of them.

    Returns:
        A policy.

    Raises:
        ValueError: If there is no policy.
        TypeError: If one of them has no ``async def call(fn, ...)``.
    """
    composition = Composition(policies)
    for find in (_bad_orders, _twice, _waits_out):
        for message in find(composition.policies):
            warnings.warn(message, OrderWarning, stacklevel=2)
    return composition


def standard(
    *alternatives: Callable[..., Any] | Alternative,
    on: type[Exception] | tuple[type[Exception], ...] = (ConnectionError, TimeoutError),
    timeout: float = 2.0,
    deadline: float = 10.0,
    attempts: int = 3,
    concurrency: int = 20,
    rate: float | None = None,
    open_for: float = 30.0,
) -> Composition:
    """Put what serves most calls of an unreliable service around them, in the right order.

    From the outside to the inside: a fallback, if there is anybody to ask; a timeout for the whole;
    a retry with full jitter and a budget of its own; a circuit breaker; a concurrency limiter; a
    token bucket, if there is a rate; a timeout for each attempt. Make one for each service, and
    share it among all who call that service.

    Args:
        *alternatives: Who is asked when all else has failed, as in
            :class:`~concurrency_patterns.fallback.Fallback`; nobody means no fallback.
        on: The exceptions that are failures of the service, beside :exc:`TimeoutError`. They are
            retried, counted by the circuit breaker, and answered by the alternatives; all others
            pass through at once. What a policy refuses by itself is not retried.
        timeout: The time for one attempt, in seconds.
        deadline: The time for a call with all its attempts and waits, in seconds.
        attempts: How many attempts a call has at most.
        concurrency: How many attempts there are at the same time. Five times as many may wait;
            beyond them a call is refused.
        rate: How many attempts begin in a second, and at once after a pause at most a tenth of
            that; ``None`` for as many as there are.
        open_for: How long the circuit breaker leaves the service alone, in seconds.

    Returns:
        A policy; its ``policies`` are those named above.

    Raises:
        ValueError: If a number is out of its range, ``on`` is empty, or ``deadline`` too short.

    The order is that of Polly's standard resilience pipeline, but the slot comes before the token.
    """
    check_positive("timeout", timeout)
    check_positive("deadline", deadline)
    if deadline < timeout:
        raise ValueError(f"deadline must be at least timeout ({timeout!r}), got {deadline!r}")
    if on == ():
        raise ValueError(f"on must name at least one exception type, got {on!r}")
    failures = on if isinstance(on, tuple) else (on,)
    if not any(issubclass(TimeoutError, kind) for kind in failures):
        failures = (*failures, TimeoutError)
    policies: list[Policy] = []
    if alternatives:
        policies.append(Fallback(*alternatives, on=(*failures, LocalRejection)))
    policies += [
        Timeout(deadline),
        Retry(
            on=failures,
            never=LocalRejection,
            attempts=attempts,
            backoff=FullJitter(),
            budget=RetryBudget(),
        ),
        CircuitBreaker(on=failures, open_for=open_for),
        ConcurrencyLimiter(concurrency, max_queue=5 * concurrency),
    ]
    if rate is not None:
        check_positive("rate", rate)
        policies.append(TokenBucket(rate, capacity=max(1, int(rate / 10))))
    policies.append(Timeout(timeout))
    return Composition(tuple(policies))


@dataclass(frozen=True, slots=True)
class CompositionStatistics:
    """What the policies of a composition have done.

    Attributes:
        policies: The statistics of each policy, the outermost first; ``None`` for one without any.
    """

    policies: tuple[object, ...]


class Composition:
    """Several policies that act as one; :func:`compose` makes it.

    Args:
        policies: The policies, the outermost first.

    Attributes:
        policies: The same, with the policies of nested compositions in the place of these.
    """

    def __init__(self, policies: tuple[Policy, ...]) -> None:
        if not policies:
            raise ValueError("policies must not be empty")
        flat: list[Policy] = []
        for number, policy in enumerate(policies):
            _check_policy(number, policy)
            flat.extend(policy.policies if isinstance(policy, Composition) else [policy])
        self.policies: tuple[Policy, ...] = tuple(flat)
        self._calls = [policy.call for policy in reversed(flat)]  # looked up once, not at each call

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn`` through all the policies.

        Returns:
            What the outermost policy returns.
        """
        return await self._around(fn)(*args, **kwargs)

    def __call__(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate an ``async def`` with all the policies."""
        if not inspect.iscoroutinefunction(fn):
            raise TypeError(f"fn must be an async function, got {fn!r}")
        chain = self._around(fn)

        @functools.wraps(fn)
        async def composed(*args: P.args, **kwargs: P.kwargs) -> T:
            return await chain(*args, **kwargs)

        return composed

    def describe(self) -> list[str]:
        """Return each policy with its settings, the outermost first."""
        return [_describe(policy) for policy in self.policies]

    def __repr__(self) -> str:
        return f"compose({', '.join(self.describe())})"

    def statistics(self) -> CompositionStatistics:
        """Return what each policy has done."""
        return CompositionStatistics(
            tuple(
                policy.statistics() if hasattr(policy, "statistics") else None
                for policy in self.policies
            )
        )

    def _around(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        chain: Callable[P, Awaitable[T]] = fn
        for call in self._calls:
            chain = functools.partial(call, chain)
        return chain


@dataclass(frozen=True, slots=True)
class _BadOrder:
    outer: str
    inner: str
    harm: str
    cure: str


# By the names of the classes: a policy may be a copy of ours in somebody's project.
_BAD_ORDERS = [
    _BadOrder(
        "Retry",
        "Retry",
        "their attempts multiply: three times three are nine calls of a service in trouble",
        "keep one of them",
    ),
    _BadOrder(
        "Retry",
        "Fallback",
        "the fallback answers before the retry sees a failure, so nothing is ever retried",
        "put the fallback outside of the retry",
    ),
    _BadOrder(
        "Retry",
        "StaleCache",
        "the cache gives an old answer before the retry sees a failure, so nothing is ever retried",
        "put the cache outside of the retry",
    ),
    _BadOrder(
        "CircuitBreaker",
        "Fallback",
        "the fallback answers before the breaker sees a failure, so it never opens",
        "put the fallback outside of the circuit breaker",
    ),
    _BadOrder(
        "CircuitBreaker",
        "StaleCache",
        "the cache gives an old answer before the breaker sees a failure, so it never opens",
        "put the cache outside of the circuit breaker",
    ),
    _BadOrder(
        "Hedge",
        "Retry",
        "both attempts of the hedge are retried: two times three are six calls of a slow service",
        "put the retry outside of the hedge",
    ),
    _BadOrder(
        "TokenBucket",
        "ConcurrencyLimiter",
        "calls take their tokens and then wait for a slot, so that after a stall they start all "
        "at once, faster than the rate",
        "put the concurrency limiter outside of the token bucket",
    ),
    _BadOrder(
        "TokenBucket",
        "Retry",
        "only the first attempt takes a token, so that a service in trouble gets more calls than "
        "the rate",
        "put the retry outside of the token bucket",
    ),
    _BadOrder(
        "ConcurrencyLimiter",
        "Retry",
        "a call keeps its slot while it waits for its next attempt, so that a few that fail keep "
        "all others out",
        "put the retry outside of the concurrency limiter",
    ),
]


def _bad_orders(policies: tuple[Policy, ...]) -> list[str]:
    found = []
    for bad in _BAD_ORDERS:
        outer = [number for number, policy in enumerate(policies) if _is_a(policy, bad.outer)]
        inner = [number for number, policy in enumerate(policies) if _is_a(policy, bad.inner)]
        if outer and inner and outer[0] < inner[-1]:
            found.append(f"{bad.inner} inside {bad.outer}: {bad.harm}; {bad.cure}")
    return found


def _twice(policies: tuple[Policy, ...]) -> list[str]:
    """Find what lets a call in a limited number of times, and is passed twice by each."""
    limited = [p for p in policies if _is_a(p, "ConcurrencyLimiter") or _is_a(p, "CircuitBreaker")]
    return [
        f"the same {type(policy).__name__} twice: each call enters it twice, so that it can stand "
        "in its own way for ever; keep one of them"
        for number, policy in enumerate(limited)
        if policy in limited[:number]
    ]


def _waits_out(policies: tuple[Policy, ...]) -> list[str]:
    """Find a retry that waits until the circuit breaker inside of it closes again.

    It does so if its ``on`` matches the breaker's refusal, and it has the time: it knows how much
    from its ``max_elapsed`` and from a timeout around it, and without either does not wait.
    """
    limits: list[float] = []
    waiting: list[float] = []  # how long each retry so far may wait for a breaker
    for policy in policies:
        if _is_a(policy, "Timeout"):
            limits.append(getattr(policy, "seconds", math.inf))
        elif _is_a(policy, "Retry") and _retries(policy, CircuitOpen):
            elapsed = getattr(policy, "max_elapsed", None)
            own = limits if elapsed is None else [*limits, elapsed]
            waiting.append(min(own, default=0.0))
        elif _is_a(policy, "CircuitBreaker"):
            open_for = getattr(policy, "open_for", math.inf)
            if any(open_for < limit for limit in waiting) and not getattr(policy, "shadow", False):
                return [
                    "CircuitBreaker inside Retry: the retry waits for the open breaker, "
                    f"{open_for:g} s, instead of failing fast; leave CircuitOpen out of its on, "
                    "or name it in its never"
                ]
    return []


def _retries(policy: Policy, kind: type[Exception]) -> bool:
    """Tell whether a retry names an exception by its class; a function is not asked."""

    def names(condition: object) -> bool:
        classes = condition if isinstance(condition, tuple) else (condition,)
        return any(isinstance(entry, type) and issubclass(kind, entry) for entry in classes)

    return names(getattr(policy, "on", ())) and not names(getattr(policy, "never", ()))


def _is_a(policy: Policy, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(policy).__mro__)


def _describe(policy: Policy) -> str:
    if type(policy).__repr__ is object.__repr__:
        return type(policy).__name__
    return repr(policy)


def _check_policy(number: int, policy: object) -> None:
    call = getattr(policy, "call", None)
    if isinstance(policy, type) or not inspect.iscoroutinefunction(call):
        raise TypeError(
            f"policies[{number}] must be an object with `async def call(fn, ...)`, got {policy!r}"
        )
