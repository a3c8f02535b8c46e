"""Give an operation a time, hand on what is left of it, and end what does not end by itself.

:func:`deadline` cuts a block short and fails, :func:`move_on_after` cuts it short and goes on,
:class:`Timeout` does it for a function. The deadline travels in a context variable, so that
everything called inside can ask how much time is :func:`remaining`. :func:`cancel_and_wait` ends
a task and says how it ended; :func:`bounded_cleanup` finishes what a cancellation must not break.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from .errors import DeadlineExceeded, check_positive, check_seconds, notify

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType

__all__ = [
    "CancelOutcome",
    "FailScope",
    "MoveOnScope",
    "Scope",
    "Timeout",
    "TimeoutStatistics",
    "bounded_cleanup",
    "cancel_and_wait",
    "deadline",
    "move_on_after",
    "remaining",
]

P = ParamSpec("P")
T = TypeVar("T")


def deadline(seconds: float) -> FailScope:
    """Fail if a block takes too long.

    Use it as ``async with deadline(5):``. The clock starts when the block is entered. When the
    time is over, the block is cancelled at the point where it waits. A :exc:`TimeoutError` that
    the block raises itself passes through as it is, and a cancellation from outside wins over the
    deadline.

    A deadline inside another one never ends later than the outer one: for what is inside, the end
    of the outer one is a cancellation from outside. It reaches a child task through what waits for
    it, as each cancellation does: an ``asyncio.TaskGroup``, :func:`asyncio.gather`. A task
    that nobody waits for, or that is shielded, goes on until its own deadline.

    Args:
        seconds: The time for the block; 0 lets it run to the first point where it waits.

    Returns:
        A scope for one ``async with``.

    Raises:
        DeadlineExceeded: From the block, when its time is over.
        ValueError: If ``seconds`` is negative or not finite.

    The model is the cancel scope of Trio (N. J. Smith, "Timeouts and cancellation for humans",
    2018); that a deadline travels with the call is gRPC's deadline propagation.
    """
    check_seconds("seconds", seconds)
    return FailScope(seconds)


def move_on_after(seconds: float) -> MoveOnScope:
    """Stop a block that takes too long, and go on behind it.

    It behaves as :func:`deadline` does, but raises nothing. Ask ``scope.expired`` afterwards
    whether the block was cut short.

    Args:
        seconds: The time for the block; 0 lets it run to the first point where it waits.

    Returns:
        A scope for one ``async with``.

    Raises:
        ValueError: If ``seconds`` is negative or not finite.
    """
    check_seconds("seconds", seconds)
    return MoveOnScope(seconds)


def remaining() -> float | None:
    """Tell how much time is left, to hand it on to a client or a query.

    Returns:
        Seconds until the nearest deadline, 0 if it is over, ``None`` if there is none. In a
        thread started by :func:`asyncio.to_thread` it is the deadline of the caller.
    """
    scope = _nearest_open(_current.get())
    return None if scope is None else scope.remaining()


class Scope:
    """A block with a time limit; :func:`deadline` and :func:`move_on_after` make one.

    Attributes:
        seconds: The time that was asked for; in the event loop of a thread no more than what the
            deadline around has left.
        expired: Whether the block was cut short because its time was over.
    """

    # It has a timer of its own, and not an asyncio.timeout inside, since most calls end in time
    # and pay for nothing but the scope. How it asks the task to end and takes its request back is
    # that of asyncio.timeout.
    __slots__ = (
        "_cancelling",
        "_loop",
        "_open",
        "_outer",
        "_task",
        "_timer",
        "_when",
        "expired",
        "seconds",
    )

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.expired = False
        self._open = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outer: Scope | None = None
        self._task: asyncio.Task[Any] | None = None

    def remaining(self) -> float:
        """Return the seconds that are left for this block and those around it, at least 0."""
        if self._loop is None:
            return self.seconds
        left = max(0.0, self._when - self._loop.time())
        outer = _nearest_open(self._outer)
        return left if outer is None else min(left, outer.remaining())

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    def _enter(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("there is no task here that a deadline could cut short")
        loop, now = self._begin(_nearest_open(_current.get()))
        self._task = task
        self._cancelling = task.cancelling()
        self._timer: asyncio.Handle | None
        if self._when > now:
            self._timer = loop.call_at(self._when, self._time_is_over)
        else:  # a timer would ring one turn of the loop too late
            self._timer = loop.call_soon(self._time_is_over)

    def _begin(self, outer: Scope | None) -> tuple[asyncio.AbstractEventLoop, float]:
        """Start the clock, and let everything inside see it."""
        if self._loop is not None:
            raise RuntimeError("a scope serves one `async with`; make a new one for each")
        self._loop = loop = asyncio.get_running_loop()
        now = loop.time()
        if outer is not None and outer._loop is not loop:
            # We are in a thread, where no cancellation comes from outside. The clocks may differ.
            self.seconds = min(self.seconds, outer.remaining())
        self._when = now + self.seconds
        self._outer = outer
        self._open = True
        _current.set(self)
        return loop, now

    def _time_is_over(self) -> None:
        self._timer = None
        if self._task is not None:
            self._task.cancel()

    def _leave(self, error: BaseException | None) -> bool:
        """End the block; return whether our own timer has cut it short."""
        self._open = False
        _current.set(self._outer)
        task, self._task = self._task, None  # a scope may outlive its task in those inside
        if self._timer is not None:
            self._timer.cancel()
        elif task is not None:
            # The count says whether the cancellation that comes here is ours alone. If somebody
            # else has asked for one too, it is theirs, and goes on.
            others = task.uncancel() > self._cancelling
            self.expired = not others and isinstance(error, asyncio.CancelledError)
        return self.expired


class FailScope(Scope):
    """The block of a :func:`deadline`.

    Args:
        seconds: The time for the block.
        told: The time that the error names, if the block has only what is left of it.
    """

    __slots__ = ("_told",)

    def __init__(self, seconds: float, told: float | None = None) -> None:
        super().__init__(seconds)
        self._told = told

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._leave(error):
            raise self._exceeded() from error

    def _exceeded(self) -> DeadlineExceeded:
        told = self.seconds if self._told is None else self._told
        return DeadlineExceeded(f"not done within {told:g} s", seconds=told)


class MoveOnScope(Scope):
    """The block of a :func:`move_on_after`."""

    __slots__ = ()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        return self._leave(error)


_current: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("deadline", default=None)


def without_deadline() -> contextvars.Context:
    """Return a copy of the context for a task on which several callers wait.

    It ends when nobody waits any more, and not with the deadline of the one who started it.
    """
    context = contextvars.copy_context()
    context.run(_current.set, None)
    return context


def _nearest_open(scope: Scope | None) -> Scope | None:
    """Return ``scope``, or if it has been left, the next one around it that is still open.

    A task inherits the scopes in which it was created. Once such a scope has been left, it says
    nothing about a task that goes on.
    """
    while scope is not None and not scope._open:
        scope = scope._outer
    if scope is not None:  # forget closed ones, or a chain of tasks would keep them all alive
        while scope._outer is not None and not scope._outer._open:
            scope._outer = scope._outer._outer
    return scope


class Timeout:
    """Give each call of a function a limited time.

    One object may serve any number of calls at the same time. The limit of a call is a
    :func:`deadline`: everything inside sees it, and it never outlives an outer one. A call that
    an outer one ends was cancelled, and has not timed out.

    Args:
        seconds: The time for one call.

    Attributes:
        on_event: Called with the kind and the data of an event: ``timeout.timed_out``
            (``seconds``, the time that the call was given); see
            :func:`~concurrency_patterns.observe.observe`.

    Raises:
        ValueError: If ``seconds`` is not above 0 or not finite.
    """

    def __init__(self, seconds: float) -> None:
        check_positive("seconds", seconds)
        self.seconds = seconds
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._calls = 0
        self._timed_out = 0

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn`` and wait for its result, no longer than the limit.

        Raises:
            DeadlineExceeded: If the time is over.
        """
        self._calls += 1
        scope = FailScope(self.seconds)
        scope._enter()  # not `async with`, which would make and await two coroutines more
        try:
            result = await fn(*args, **kwargs)
        except BaseException as error:
            if not scope._leave(error):
                raise
            self._timed_out += 1
            notify(self.on_event, "timeout.timed_out", seconds=scope.seconds)
            raise scope._exceeded() from error
        scope._leave(None)
        return result

    def __call__(
        self, fn: Callable[P, Coroutine[Any, Any, T]]
    ) -> Callable[P, Coroutine[Any, Any, T]]:
        """Wrap an ``async def`` function, so that each call of it has the limit.

        Raises:
            TypeError: If ``fn`` is not ``async``: what does not wait cannot be cut short.
        """
        if not inspect.iscoroutinefunction(fn):
            raise TypeError(f"Timeout can only wrap an async function, got {fn!r}")

        @functools.wraps(fn)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            return await self.call(fn, *args, **kwargs)

        return wrapper

    def statistics(self) -> TimeoutStatistics:
        """Return how many calls there were, and how many ran out of time."""
        return TimeoutStatistics(self._calls, self._timed_out)

    def __repr__(self) -> str:
        return f"Timeout({self.seconds!r})"


@dataclass(frozen=True, slots=True)
class TimeoutStatistics:
    """What a :class:`Timeout` has counted.

    Attributes:
        calls: Calls begun.
        timed_out: Calls cut short because their own time was over.
    """

    calls: int
    timed_out: int


class CancelOutcome(enum.Enum):
    """How a task ended that :func:`cancel_and_wait` was to end."""

    #: It accepted the cancellation.
    CANCELLED = "cancelled"
    #: It ended with a result or an exception, which the task still holds.
    FINISHED = "finished"
    #: It is still running: it ignores the cancellation, or needs longer than the grace.
    STUCK = "stuck"


async def cancel_and_wait(
    task: asyncio.Task[Any], grace: float, *, reason: str | None = None
) -> CancelOutcome:
    """Cancel a task, wait until it has cleaned up, and tell how it ended.

    ``task.cancel()`` only asks. To go on without waiting loses the clean-up, and to await the
    task mixes up its cancellation with one's own. Here a cancellation of the caller is raised as
    always, and no exception of the task is.

    Args:
        task: The task to end; one that has ended already is fine.
        grace: Seconds to wait at most.
        reason: The message of the :exc:`~asyncio.CancelledError` in the task.

    Returns:
        Whether it was cancelled, finished in another way, or is stuck.

    Raises:
        RuntimeError: If ``task`` is the caller itself.
        ValueError: If ``grace`` is negative or not finite.
    """
    check_seconds("grace", grace)
    if task is asyncio.current_task():
        raise RuntimeError("a task cannot wait for its own end")
    task.cancel(reason)
    if not task.done():
        await asyncio.wait([task], timeout=grace)
    if not task.done():
        return CancelOutcome.STUCK
    if task.cancelled():
        return CancelOutcome.CANCELLED
    task.exception()  # retrieved, so that asyncio does not log it; the caller has the task
    return CancelOutcome.FINISHED


async def bounded_cleanup(cleanup: Coroutine[Any, Any, T], seconds: float) -> T:
    """Finish a clean-up although the task is being cancelled, in a limited time.

    An ``await`` in a ``finally`` block can be cancelled like any other: the second cancellation
    leaves the clean-up half done. Here it runs in a task of its own. A cancellation of the caller
    is held back until the clean-up has ended, and raised then. The deadlines around do not count,
    as they may be the reason for the clean-up.

    Args:
        cleanup: The coroutine to run to its end.
        seconds: The time for it; then it is cancelled, and left behind if it refuses.

    Returns:
        The result of the clean-up.

    Raises:
        DeadlineExceeded: If its time is over.
        ValueError: If ``seconds`` is not above 0 or not finite.

    It is a shield with a deadline, as in Trio's ``move_on_after(seconds, shield=True)``.
    """
    try:
        check_positive("seconds", seconds)
    except (TypeError, ValueError):
        cleanup.close()
        raise
    context = contextvars.copy_context()
    context.run(deadline(seconds)._begin, None)  # it sees the time that it has itself
    task = asyncio.create_task(cleanup, context=context)
    cancellation = await _wait_through(task, seconds)
    in_time = task.done()
    if not in_time:
        task.cancel()
        cancellation = await _wait_through(task, 0) or cancellation
    try:
        if cancellation is not None:
            # It must not get lost; a failure of the clean-up comes along as its cause.
            failed = task.done() and not task.cancelled()
            raise cancellation from (task.exception() if failed else None)
    finally:
        del cancellation  # no cycle through this frame
    if not in_time:
        raise DeadlineExceeded(f"the clean-up took more than {seconds:g} s", seconds=seconds)
    return task.result()


async def _wait_through(task: asyncio.Task[Any], seconds: float) -> asyncio.CancelledError | None:
    """Wait for ``task``; hold back a cancellation of the caller and return it."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    held = None
    try:
        while True:
            try:
                await asyncio.wait([task], timeout=max(0.0, end - loop.time()))
            except asyncio.CancelledError as error:
                held = error
            else:
                return held
    finally:
        del held
