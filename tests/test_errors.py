"""The exceptions and the checks of arguments."""

from __future__ import annotations

import asyncio
import logging
import math
import pickle

import pytest

from concurrency_patterns import errors
from concurrency_patterns.errors import (
    CircuitOpen,
    ConcurrencyLimitExceeded,
    DeadlineExceeded,
    LocalRejection,
    PatternError,
    QueueFull,
    RateLimitExceeded,
    RemoteError,
    WorkerCrashed,
    check_count,
    check_positive,
    check_seconds,
    clock_of,
    comes_of_cancellation,
    decorate,
    notify,
)


def test_all_exceptions_form_one_tree():
    """Whoever catches PatternError catches every exception of the package."""
    kinds = [getattr(errors, name) for name in errors.__all__]

    assert all(issubclass(kind, PatternError) for kind in kinds)


@pytest.mark.parametrize(
    "kind", [RateLimitExceeded, ConcurrencyLimitExceeded, QueueFull, CircuitOpen]
)
def test_what_was_never_sent_is_a_local_rejection(kind):
    """What a policy refuses by itself can be told from a failure of the service."""
    assert issubclass(kind, LocalRejection)
    assert kind("refused").retry_after is None


def test_a_deadline_is_a_timeout_error():
    """Code that catches TimeoutError also catches DeadlineExceeded."""
    assert issubclass(DeadlineExceeded, TimeoutError)


@pytest.mark.parametrize(
    "error",
    [
        CircuitOpen("open", retry_after=3.0),
        ConcurrencyLimitExceeded("full", reason="wait"),
        DeadlineExceeded("late", seconds=2.0),
        WorkerCrashed("gone", exitcode=-9, item=("item",)),
        RemoteError("far away", traceback="Traceback"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_survives_the_trip_between_processes(error):
    """Pickling keeps the message and the fields."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 -- made two words ago

    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_the_least_is_refused(value):
    """The message names the parameter, the bound and the value."""
    with pytest.raises(ValueError, match=rf"^workers must be at least 1, got {value}$"):
        check_count("workers", value)


@pytest.mark.parametrize("value", [1.0, "1", True, None])
def test_a_count_that_is_no_int_is_refused(value):
    """A float, a string, a bool and None are no counts."""
    with pytest.raises(TypeError, match=r"^workers must be an int, got "):
        check_count("workers", value)


@pytest.mark.parametrize("value", [0, -0.5, math.nan, math.inf, -math.inf])
def test_what_is_not_above_zero_and_finite_is_refused(value):
    """Zero, negative, NaN and infinite values are refused where a positive one is wanted."""
    with pytest.raises(ValueError, match=r"^rate must be "):
        check_positive("rate", value)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_seconds_are_finite_and_not_negative(value):
    """Zero seconds are fine, negative, NaN and infinite ones are not."""
    check_seconds("delay", 0)
    with pytest.raises(ValueError, match=r"^delay must be "):
        check_seconds("delay", value)


@pytest.mark.parametrize("check", [check_positive, check_seconds])
@pytest.mark.parametrize("value", ["1", True, None])
def test_what_is_no_number_is_refused(check, value):
    """A string, a bool and None are no numbers."""
    with pytest.raises(TypeError, match=r"^delay must be a number, got "):
        check("delay", value)


def test_a_listener_is_told_the_kind_and_the_data():
    """The data of an event reach the listener as a dictionary; nobody need listen."""
    told = []
    notify(lambda *event: told.append(event), "module.happened", seconds=0.5)
    notify(None, "module.happened", seconds=0.5)

    assert told == [("module.happened", {"seconds": 0.5})]


@pytest.mark.parametrize("value", [10**400, -(10**400)])
@pytest.mark.parametrize("check", [check_positive, check_seconds])
def test_a_whole_number_that_no_float_can_hold_is_refused_like_an_infinite_one(check, value):
    """A huge int is refused by name and value, not by an overflow somewhere below."""
    with pytest.raises(ValueError, match="rate must be finite, got"):
        check("rate", value)


@pytest.mark.parametrize("hashable", [True, False])
def test_a_listener_that_raises_is_logged_once_for_each_type(caplog, hashable):
    """What a listener raises, even CancelledError, is logged once for each type, never raised."""

    class Listener:
        __hash__ = object.__hash__ if hashable else None

        def __call__(self, kind, data):
            raise data["error"]

    listener = Listener()
    for error in (KeyError("a"), KeyError("b"), OSError("c"), asyncio.CancelledError()):
        notify(listener, "module.happened", error=error)

    assert [record.exc_info[0] for record in caplog.records] == [
        KeyError,
        OSError,
        asyncio.CancelledError,
    ]
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


def test_a_listener_cannot_hold_back_the_end_of_the_program():
    """KeyboardInterrupt and SystemExit pass through a listener."""

    def leave(kind, data):
        raise SystemExit

    with pytest.raises(SystemExit):
        notify(leave, "module.happened")


async def test_what_comes_of_a_cancellation_is_known_by_its_context():
    """It comes of one if the task is being cancelled and one was handled when it was raised."""
    error, task = KeyError("no such connection"), asyncio.current_task()
    error.__context__ = asyncio.CancelledError()
    assert not comes_of_cancellation(error)
    task.cancel()
    try:
        assert comes_of_cancellation(error)
        assert not comes_of_cancellation(KeyError())
        late = TimeoutError()  # as asyncio.timeout makes it of its own cancellation
        late.__context__ = asyncio.CancelledError()
        assert not comes_of_cancellation(late)
        circle = KeyError()
        circle.__context__ = ValueError()
        circle.__context__.__context__ = circle
        assert not comes_of_cancellation(circle)
    finally:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        task.uncancel()


def test_without_a_task_nothing_comes_of_a_cancellation():
    """In plain code nothing is cancelled."""
    assert not comes_of_cancellation(asyncio.CancelledError())


async def test_the_clock_of_a_loop_shows_the_time_of_the_loop():
    """Another loop's own clock is asked; asyncio's is read as asyncio reads it."""
    virtual = asyncio.get_running_loop()
    assert clock_of(virtual)() == virtual.time()

    async def on_asyncios_own():
        loop = asyncio.get_running_loop()
        before, now, after = loop.time(), clock_of(loop)(), loop.time()
        assert before <= now <= after

    await asyncio.to_thread(asyncio.run, on_asyncios_own())


async def test_only_an_async_function_is_decorated():
    """A plain function is refused; each call of an async one goes through the policy."""

    async def call(fn, *args):
        return ["policy", await fn(*args)]

    async def echo(word):
        return word

    with pytest.raises(
        TypeError, match="fn must be an async function, got <built-in function len>"
    ):
        decorate(call, len)
    decorated = decorate(call, echo)
    assert (decorated.__name__, await decorated("hello")) == ("echo", ["policy", "hello"])
