"""What the patterns raise, and the checks that refuse a bad argument at once."""

from __future__ import annotations

import asyncio
import logging
import math
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ChannelClosed",
    "ChannelEmpty",
    "CircuitOpen",
    "ConcurrencyLimitExceeded",
    "DeadlineExceeded",
    "LocalRejection",
    "PatternError",
    "PoolClosed",
    "QueueFull",
    "RateLimitExceeded",
    "RemoteError",
    "WorkerCrashed",
]


class PatternError(Exception):
    """The root of all exceptions of this package."""


class LocalRejection(PatternError):  # noqa: N818 -- says what happened, as StopIteration does
    """The call was refused here and never sent.

    It tells nothing about the service behind the policy, so a circuit breaker does not count it.

    Args:
        message: What was refused, and why.
        retry_after: Seconds after which a new attempt can succeed; ``None`` if nobody can tell.
    """

    def __init__(self, message: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimitExceeded(LocalRejection):
    """The tokens asked for do not arrive in the time allowed."""


class ConcurrencyLimitExceeded(LocalRejection):
    """No slot is free, and the caller may not wait, or may wait no longer.

    Args:
        message: What was refused, and why.
        reason: ``"queue"`` if too many wait already, ``"wait"`` if the wait took too long,
            ``"closed"`` if the limiter is closed.
    """

    def __init__(self, message: str = "", *, reason: str = "queue") -> None:
        super().__init__(message)
        self.reason = reason


class QueueFull(LocalRejection):
    """The queue holds as many items as it may, and the caller did not want to wait."""


class CircuitOpen(LocalRejection):
    """The circuit breaker is open, or all its probes are out.

    ``__cause__`` is the failure that was seen last.
    """

    def __init__(self, message: str = "", *, retry_after: float | None = None) -> None:
        # Refusals come in masses, so nothing is done here that can wait until one is printed.
        if message:
            super().__init__(message)
        self.retry_after = retry_after

    def __str__(self) -> str:
        message = super().__str__()
        if message or self.retry_after is None:
            return message
        return f"the circuit is open for another {self.retry_after:.1f} s"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class DeadlineExceeded(PatternError, TimeoutError):  # noqa: N818 -- gRPC's name
    """The time for the operation is over.

    Args:
        message: What took too long.
        seconds: The time that it was given.
    """

    def __init__(self, message: str = "", *, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class ChannelClosed(PatternError):  # noqa: N818 -- says what happened
    """Nothing can be sent into this channel any more, or nothing is left to receive."""


class ChannelEmpty(PatternError):  # noqa: N818 -- says what happened
    """The channel holds no item, and the caller did not want to wait."""


class PoolClosed(PatternError):  # noqa: N818 -- says what happened
    """The pool does not run: it was never entered, or it is closed."""


class WorkerCrashed(PatternError):  # noqa: N818 -- says what happened
    """A worker process died while it handled an item.

    Args:
        message: What happened.
        exitcode: The exit code of the process; ``-n`` if signal ``n`` killed it.
        item: The item of ``map`` that was lost, or the arguments that were given to ``submit``.
    """

    def __init__(
        self, message: str = "", *, exitcode: int | None = None, item: object = None
    ) -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.item = item


class RemoteError(PatternError):
    """A worker process raised an exception that cannot travel between processes.

    Args:
        message: The type and the text of the exception.
        traceback: The traceback in the worker, as text.
    """

    def __init__(self, message: str = "", *, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse what is not a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Refuse what is not a finite number above zero."""
    _check_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")


def check_seconds(name: str, value: float) -> None:
    """Refuse what is not a finite number of zero or more."""
    _check_finite(name, value)
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value!r}")


def _check_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        finite = False
    if not finite:
        raise ValueError(f"{name} must be finite, got {value!r}")


def check_loop(owner: object, bound: asyncio.AbstractEventLoop | None) -> asyncio.AbstractEventLoop:
    """Return the running loop, to which ``owner`` may now be bound.

    An object may serve one event loop after the other, but not two at the same time: a waiter
    on one loop cannot be woken from another.

    Raises:
        RuntimeError: If the loop to which ``owner`` is bound is still running elsewhere.
    """
    loop = asyncio.get_running_loop()
    if bound is not None and bound is not loop and bound.is_running():
        name = type(owner).__name__
        raise RuntimeError(f"this {name} is in use on another event loop; make one for each loop")
    return loop


def notify(
    listener: Callable[[str, dict[str, Any]], object] | None, kind: str, /, **data: Any
) -> None:
    """Tell a listener what happened, whatever it does with that.

    Nobody's call shall fail because somebody watches it: what the listener raises is logged, once
    for each listener and type of exception, and goes no further.

    Args:
        listener: Called with ``kind`` and a dictionary of ``data``; ``None`` for nobody.
        kind: What happened, as ``"<module>.<what>"`` in the past tense.
        **data: The details; durations in seconds.
    """
    if listener is not None:
        tell(listener, kind, data)


def tell(listener: Callable[..., object], *args: Any) -> None:
    """Call a listener, and log what it raises."""
    try:
        listener(*args)
    except (Exception, asyncio.CancelledError) as error:
        if _is_first(listener, type(error)):
            logging.getLogger("concurrency_patterns").exception(
                "the listener %r failed; further %ss of it are not logged",
                listener,
                type(error).__name__,
            )


_failed: weakref.WeakKeyDictionary[Any, set[type]] = weakref.WeakKeyDictionary()


def _is_first(listener: Any, error: type) -> bool:
    try:
        known = _failed.setdefault(listener, set())
    except TypeError:  # it has no hash, or takes no weak reference
        known = _failed.setdefault(type(listener), set())
    first = error not in known
    known.add(error)
    return first
