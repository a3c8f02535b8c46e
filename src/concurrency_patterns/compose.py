"""Several policies around one call, in an order that can be read and is checked.

A policy is known by its shape, an ``async def call(fn, ...)``, and not by its class: yours may
stand among ours.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

__all__ = ["Composition", "CompositionStatistics", "OrderWarning", "Policy", "compose"]

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
    for message in _bad_orders(composition.policies):
        warnings.warn(message, OrderWarning, stacklevel=2)
    return composition


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


# By the names of the classes, as no policy is imported here.
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
        "TokenBucket",
        "ConcurrencyLimiter",
        "calls take their tokens and then wait for a slot, so that after a stall they start all "
        "at once, faster than the rate",
        "put the concurrency limiter outside of the token bucket",
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
