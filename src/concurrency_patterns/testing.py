"""Test concurrent code without waiting and without luck.

:func:`run_virtual` runs a program on a clock that jumps to the next timer, so that an hour of
sleeping takes milliseconds and every measured time is exact. :func:`explore_cancellation` runs a
scenario again and again, cancels each of its tasks at each step, and checks that nothing is lost.
:func:`assert_no_leaks` finds forgotten tasks and unseen errors; :class:`FakeService` and
:class:`Chaos` stand in for a service on a bad day.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import math
import random
import re
import selectors
import sys
import threading
from collections import deque
from concurrent.futures import thread as executor_threads
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast
from unittest import mock

from .errors import check_seconds, decorate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator

__all__ = [
    "CancellationFault",
    "Chaos",
    "ChaosStatistics",
    "Deadlock",
    "FakeService",
    "Leak",
    "VirtualTimeLoop",
    "assert_no_leaks",
    "explore_cancellation",
    "run_virtual",
    "virtual_time",
]

P = ParamSpec("P")
T = TypeVar("T")
# Not 0: no real clock starts there, so a program that prints ``loop.time()`` itself is found out.
START = 1000.0
RESOLUTION = 1e-9


class Deadlock(RuntimeError):  # noqa: N818 -- says what happened
    """Every task waits for another one, and nothing can wake them any more."""


class CancellationFault(AssertionError):  # noqa: N818 -- says what was found
    """The invariant did not hold after a task had been cancelled at some step."""


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for the next timer, moves the loop's clock to it."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        more = self.loop.begin_step()
        ready = super().select(0)
        if ready or more or (timeout is not None and timeout <= 0):
            return ready
        if self.loop.has_real_work():
            return self._wait_in_real_time(timeout)
        if timeout is None:
            names = ", ".join(sorted(_name(task) for task in asyncio.all_tasks(self.loop)))
            raise Deadlock(f"these tasks wait for ever: {names}")
        self.loop.jump()
        return ready

    def _wait_in_real_time(self, timeout: float | None) -> list[Any]:
        before = monotonic()
        ready = super().select(timeout)
        elapsed = monotonic() - before
        self.loop.now += timeout if timeout is not None and not ready else elapsed
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it.

    While a thread, a child process or a socket could still wake the loop, it waits in real time
    and the clock follows. When nothing at all can wake it, it raises :class:`Deadlock` with the
    names of the tasks that wait.

    The principle is that of Trio's ``MockClock`` and of discrete-event simulation: time passes
    only when there is nothing left to do.
    """

    def __init__(self) -> None:
        self.now = START
        self.on_step: Callable[[], None] | None = None
        self._held: deque[asyncio.Handle] = deque()
        self._calls_out = 0
        self._threads_before = set(threading.enumerate())
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now

    def jump(self) -> None:
        """Move the clock to the next timer."""
        # Rounding keeps 0.1 + 0.1 + 0.1 at 0.3; a nanosecond is the clock's resolution anyway.
        self.now = max(self.now, round(self._scheduled[0].when(), 9))  # type: ignore[attr-defined]  # asyncio's own
        # A timer fires when it is due by less than the resolution. After half a year a nanosecond
        # is less than the step between two numbers, and then none would.
        self._clock_resolution = max(RESOLUTION, math.ulp(self.now))

    def begin_step(self) -> bool:
        """Tell the listener, if there is one, that a step begins, and run one callback in it.

        Without a listener a step runs all callbacks that are ready, as in any event loop.

        Returns:
            Whether there is something to run in this step.
        """
        if self.on_step is None and not self._held:
            return False
        ready = self._ready  # type: ignore[attr-defined]  # asyncio's own
        ready.extendleft(reversed(self._held))
        self._held.clear()
        if self.on_step is not None:
            self.on_step()
            while len(ready) > 1:
                self._held.appendleft(ready.pop())
        return bool(ready)

    def has_real_work(self) -> bool:
        """Tell whether something outside of the loop could still wake it."""
        own_pipe = 1
        if self._calls_out or len(self._selector.get_map()) > own_pipe:  # type: ignore[attr-defined]  # as above
            return True
        idle = set(executor_threads._threads_queues)
        return bool(set(threading.enumerate()) - self._threads_before - idle)

    def run_in_executor(  # type: ignore[override]  # generic over func in the stub
        self, executor: Any, func: Any, *args: Any
    ) -> Any:
        """Run ``func`` in ``executor``; the clock does not jump until it has returned."""
        future = super().run_in_executor(executor, func, *args)
        self._calls_out += 1
        future.add_done_callback(self._call_returned)
        return future

    def _call_returned(self, _: object) -> None:
        self._calls_out -= 1

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 -- asyncio's own
        """Join the executor's threads in real time."""
        self._calls_out += 1
        try:
            await super().shutdown_default_executor()
        finally:
            self._calls_out -= 1


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` as :func:`asyncio.run` does, on a virtual clock.

    Args:
        main: The coroutine to run.

    Returns:
        What ``main`` returns.

    Raises:
        Deadlock: If all tasks wait and nothing can wake them.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


@contextlib.contextmanager
def virtual_time() -> Iterator[None]:
    """Give each :func:`asyncio.run` inside the ``with`` a virtual clock of its own."""
    with (
        mock.patch("asyncio.events.new_event_loop", VirtualTimeLoop),
        mock.patch("asyncio.new_event_loop", VirtualTimeLoop),
    ):
        yield


def explore_cancellation(
    setup: Callable[[], T],
    scenario: Callable[[T], Coroutine[Any, Any, object]],
    invariant: Callable[[T], bool | Awaitable[bool]],
) -> int:
    """Cancel each task of a scenario at each step of the event loop, and check what is left.

    Cancellation bugs hide in a single step: between the moment a permit is handed to a waiter
    and the moment the waiter wakes. Real tests meet that step by luck; this one visits them all:
    the event loop runs one callback at a time, and the task is cancelled between two of them.
    After each run the invariant is checked, and no task may be left running.

    Args:
        setup: Makes the object under test, with the event loop running.
        scenario: Uses the object, in any number of tasks.
        invariant: Tells whether the object is whole after the scenario; may be ``async``.

    Returns:
        How many runs were made.

    Raises:
        CancellationFault: If the invariant failed, a task was left, or everything hung. The
            message names the task, the step, and the line where the task stood.
    """
    runs = victim = step = 0
    while True:
        attempt = _Attempt(victim, step)
        attempt.run(setup, scenario, invariant)
        runs += 1
        if attempt.cancelled:
            step += 1
        elif victim < len(attempt.tasks):
            victim, step = victim + 1, 0
        else:
            return runs


class _Attempt:
    """One run of a scenario in which the task number ``victim`` is cancelled once.

    It is cancelled at the ``step``-th step of the loop after the task was created.
    """

    def __init__(self, victim: int, step: int) -> None:
        self.victim = victim
        self.step = step
        self.cancelled = False
        self.stood = ""
        self.tasks: list[asyncio.Task[Any]] = []
        self.steps_seen = 0

    def run(
        self,
        setup: Callable[[], T],
        scenario: Callable[[T], Coroutine[Any, Any, object]],
        invariant: Callable[[T], bool | Awaitable[bool]],
    ) -> None:
        async def main() -> None:
            loop = cast("VirtualTimeLoop", asyncio.get_running_loop())
            subject = setup()
            loop.set_task_factory(self._record)
            loop.on_step = self._maybe_cancel
            task = loop.create_task(scenario(subject))
            await asyncio.wait([task])
            loop.on_step = None
            loop.set_task_factory(None)
            left = [_function(task) for task in self.tasks if not task.done()]
            if left:
                raise CancellationFault(f"{self}: still running: {', '.join(left)}")
            for ended in self.tasks:
                if not ended.cancelled():
                    ended.exception()  # retrieved: how the scenario ends is not our question
            holds = invariant(subject)
            if inspect.isawaitable(holds):
                holds = await holds
            if not holds:
                raise CancellationFault(f"{self}: the invariant does not hold")

        try:
            run_virtual(main())
        except Deadlock as error:
            raise CancellationFault(f"{self}: {error}") from error

    def _record(
        self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=loop, **options)
        self.tasks.append(task)
        return task

    def _maybe_cancel(self) -> None:
        if self.cancelled or len(self.tasks) <= self.victim:
            return
        task = self.tasks[self.victim]
        if self.steps_seen == self.step and not task.done():
            self.cancelled = True
            self.stood = _place(task)
            task.cancel()
        self.steps_seen += 1

    def __str__(self) -> str:
        if not self.cancelled:
            return "without any cancellation"
        name = _function(self.tasks[self.victim])
        return f"task {self.victim} ({name}) cancelled at its step {self.step}, at {self.stood}"


def _place(task: asyncio.Task[Any]) -> str:
    """Return the line of the program at which a task waits.

    It is the innermost one outside of the standard library: to hear that everybody waits in
    ``asyncio.sleep`` helps nobody. ``Task.get_stack`` would tell the outermost one only.
    """
    place = ""
    waits: Any = task.get_coro()
    while frame := getattr(waits, "cr_frame", None) or getattr(waits, "gi_frame", None):
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if not place or module not in sys.stdlib_module_names:
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        waits = getattr(waits, "cr_await", None) or getattr(waits, "gi_yieldfrom", None)
    return place or "nowhere"


class Leak(AssertionError):  # noqa: N818 -- says what was found
    """Something was left behind: a running task, or an error that nobody looked at."""


@contextlib.asynccontextmanager
async def assert_no_leaks() -> AsyncIterator[None]:
    """Check that a block leaves no task running and no error unseen.

    A forgotten task goes on after the test and fails in another one, or never; an exception in a
    task that nobody awaits is a line in a log. Both are told here, at the place where they arise.

    Raises:
        Leak: If a task that was created in the block still runs, or asyncio reported an error
            there, such as an exception that was never retrieved. The message tells which.
    """
    loop = asyncio.get_running_loop()
    before = asyncio.all_tasks()
    reports: list[str] = []
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: reports.append(_told(context)))
    try:
        yield
        gc.collect()  # asyncio reports what was never retrieved when the task is collected
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(handler)
    running = sorted(_function(task) for task in asyncio.all_tasks() - before)
    if running:
        reports.append(f"still running: {', '.join(running)}")
    if reports:
        raise Leak("; ".join(reports))


def _told(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return f"{context['message']}: {error!r}" if error else str(context["message"])


@dataclass(frozen=True, slots=True)
class ChaosStatistics:
    """What a :class:`Chaos` has done.

    Attributes:
        calls: How many calls came by.
        faults: How many of them failed.
        delays: How many of them were delayed.
        results: How many of them got another result.
    """

    calls: int
    faults: int
    delays: int
    results: int


class Chaos:
    """Make a share of the calls fail, be slow, or return something wrong.

    Code for bad days is rarely run on good ones, so its faults are found in an outage. This is a
    policy that brings the bad days into a test. In a composition it stands innermost, in the
    place of the service. The same seed gives the same bad days.

    Args:
        fault_rate: The share of calls that fail, from 0 to 1.
        fault: What they raise: an exception class, or a function that makes an exception.
        latency_rate: The share of calls that are delayed, from 0 to 1.
        latency: How long these are delayed, in seconds.
        result_rate: The share of calls that return ``result`` instead of their own.
        result: What these return.
        seed: The seed of the random numbers.

    Raises:
        ValueError: If a share is not between 0 and 1, or ``latency`` negative.

    The kinds of faults are those of Polly's chaos strategies (Simmy); the idea is Netflix's chaos
    engineering.
    """

    def __init__(
        self,
        *,
        fault_rate: float = 0.0,
        fault: Callable[[], BaseException] = ConnectionError,
        latency_rate: float = 0.0,
        latency: float = 1.0,
        result_rate: float = 0.0,
        result: Any = None,
        seed: int = 0,
    ) -> None:
        rates = {
            "fault_rate": fault_rate,
            "latency_rate": latency_rate,
            "result_rate": result_rate,
        }
        for name, rate in rates.items():
            check_seconds(name, rate)
            if rate > 1:
                raise ValueError(f"{name} must be at most 1, got {rate!r}")
        check_seconds("latency", latency)
        self._rates = rates
        self._fault = fault
        self._latency = latency
        self._result = result
        self._random = random.Random(seed)  # noqa: S311 -- for tests, and repeatable
        self._calls = self._faults = self._delays = self._results = 0

    def __repr__(self) -> str:
        shares = ", ".join(f"{name}={rate!r}" for name, rate in self._rates.items() if rate)
        return f"Chaos({shares})"

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn``, or do what chance says.

        Args:
            fn: An asynchronous function.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What ``fn`` returns, or ``result``.
        """
        self._calls += 1
        if self._happens("latency_rate"):
            self._delays += 1
            await asyncio.sleep(self._latency)
        if self._happens("fault_rate"):
            self._faults += 1
            raise self._fault()
        if self._happens("result_rate"):
            self._results += 1
            return cast("T", self._result)
        return await fn(*args, **kwargs)

    def __call__(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate an ``async def`` so that a share of its calls goes wrong."""
        return decorate(self.call, fn)

    def statistics(self) -> ChaosStatistics:
        """Return what has been done so far."""
        return ChaosStatistics(self._calls, self._faults, self._delays, self._results)

    def _happens(self, name: str) -> bool:
        return self._random.random() < self._rates[name]


class FakeService:
    """A service that does what a script says, one step for each call.

    Args:
        *script: The steps: ``"ok"`` returns the arguments' first or ``"ok"``, ``"error"`` raises
            :exc:`ConnectionError`, ``"slow"`` returns after a while, ``"hang"`` never returns; an
            exception is raised as it is. After the last step, its kind is repeated.
        slow: How long a slow call takes, in seconds.

    Attributes:
        calls: The positional arguments of each call so far.

    Raises:
        ValueError: If there is no step, or an unknown one.
    """

    def __init__(self, *script: str | BaseException, slow: float = 1.0) -> None:
        known = {"ok", "error", "slow", "hang"}
        unknown = [s for s in script if not isinstance(s, BaseException) and s not in known]
        if not script or unknown:
            raise ValueError(f"script must be steps out of {sorted(known)}, got {script!r}")
        check_seconds("slow", slow)
        self.calls: list[tuple[Any, ...]] = []
        self._script = script
        self._slow = slow

    async def __call__(self, *args: Any) -> Any:
        """Do the next step of the script.

        Returns:
            The first argument, or ``"ok"`` if there is none.
        """
        step = self._script[min(len(self.calls), len(self._script) - 1)]
        self.calls.append(args)
        if isinstance(step, BaseException):
            raise step
        if step == "error":
            raise ConnectionError(f"call {len(self.calls)} failed, as the script says")
        if step == "slow":
            await asyncio.sleep(self._slow)
        if step == "hang":
            await asyncio.Future()
        return args[0] if args else "ok"


def _name(task: asyncio.Task[Any]) -> str:
    """Return the name that somebody gave to a task, or else the name of what it runs."""
    name = task.get_name()
    # Python 3.13.0 calls a task "None" if a task factory made it and nobody gave it a name.
    return _function(task) if re.fullmatch(r"Task-\d+|None", name) else name


def _function(task: asyncio.Task[Any]) -> str:
    """Return the name of what a task runs: its own name differs from run to run."""
    return getattr(task.get_coro(), "__name__", task.get_name())
