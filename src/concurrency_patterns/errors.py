"""The foundation of all patterns: what they raise, and the few functions that they share."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import sys
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

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

P = ParamSpec("P")
T = TypeVar("T")

# How far to look back from an exception to those before it; a chain may be a circle.
CHAIN = 100


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


def clock_of(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """Return the clock of a loop; for asyncio's own loops what they read, which is much faster."""
    own = getattr(loop.time, "__func__", None) is asyncio.BaseEventLoop.time
    return time.monotonic if own else loop.time


def check_thread(owner: object, bound: asyncio.AbstractEventLoop | None) -> None:
    """Let ``owner`` be used, without waiting, only where its loop runs, or while it does not.

    A future that is set from another thread does not wake its loop, which may sleep for hours.

    Raises:
        RuntimeError: If the loop to which ``owner`` is bound is running in another thread.
    """
    if bound is not None and asyncio._get_running_loop() is not bound and bound.is_running():
        name = type(owner).__name__
        raise RuntimeError(
            f"this {name} is in use by an event loop in another thread; "
            "call it there, with loop.call_soon_threadsafe()"
        )


def cancel_requests() -> int:
    """Return how often the current task was cancelled, without having dealt with it."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop in this thread
        return 0
    return 0 if task is None else task.cancelling()


def comes_of_cancellation(error: BaseException, before: int | None = None) -> bool:
    """Tell whether a function made ``error`` of a cancellation of its task.

    Some clients turn every exception into one of their own, the :exc:`asyncio.CancelledError` too.
    (Before Python 3.13 a function that has dealt with a failed task group, and then fails in
    another way, is taken for one that was cancelled.)

    Args:
        error: What the function raised.
        before: What :func:`cancel_requests` was before the call, if that is known.
    """
    if sys.version_info < (3, 13):
        _take_back_requests_of_groups(error)
    if cancel_requests() <= (before or 0):
        return False
    # A request from before the call may be nobody's business any more: then the error must tell.
    return before is not None or _was_raised_for_cancellation(error)


def _take_back_requests_of_groups(error: BaseException) -> None:
    """Take back what failed task groups have left, as they do themselves from Python 3.13 on.

    A group whose child fails while it waits for all of them cancels its own task, to wake it up.
    Such a group is in the traceback of what it has raised: it stands in ``__aexit__``, and was not
    brought there by a cancellation.
    """
    task = asyncio.current_task() if cancel_requests() else None
    todo, seen = [error], set()
    while todo and task is not None:
        error = todo.pop()
        if id(error) in seen or isinstance(error, asyncio.CancelledError):
            continue  # what came before a cancellation does not explain it
        seen.add(id(error))
        todo += getattr(error, "exceptions", ())
        todo += filter(None, (error.__cause__, error.__context__))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code is not asyncio.TaskGroup.__aexit__.__code__:
                continue
            group, kind = frame.f_locals["self"], frame.f_locals["et"]
            woken = group._parent_cancel_requested and kind is not asyncio.CancelledError
            if woken and group._parent_task is task:
                group._parent_cancel_requested = False
                task.uncancel()


def _was_raised_for_cancellation(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(_was_raised_for_cancellation, error.exceptions))
    earlier: BaseException | None = error
    for _ in range(CHAIN):
        if isinstance(earlier, asyncio.CancelledError):
            return True
        # A timeout makes its error of a cancellation that it has asked for itself.
        if earlier is None or isinstance(earlier, TimeoutError):
            return False
        earlier = earlier.__context__
    return False


def decorate(
    call: Callable[..., Coroutine[Any, Any, Any]], fn: Callable[P, Awaitable[T]]
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Return ``fn``, an ``async def``, with each call of it made by a policy's ``call``."""
    if not inspect.iscoroutinefunction(fn):
        raise TypeError(f"fn must be an async function, got {fn!r}")

    @functools.wraps(fn)
    async def decorated(*args: P.args, **kwargs: P.kwargs) -> T:
        result: T = await call(fn, *args, **kwargs)
        return result

    return decorated


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
