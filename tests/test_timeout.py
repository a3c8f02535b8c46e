"""Deadlines, timeouts and cancellation."""

from __future__ import annotations

import asyncio
import gc
import inspect
import math
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from concurrency_patterns.circuit_breaker import CircuitBreaker, CircuitState
from concurrency_patterns.compose import compose
from concurrency_patterns.errors import DeadlineExceeded
from concurrency_patterns.fallback import Hedge
from concurrency_patterns.testing import explore_cancellation, run_virtual
from concurrency_patterns.timeout import (
    CancelOutcome,
    Timeout,
    TimeoutStatistics,
    bounded_cleanup,
    cancel_and_wait,
    deadline,
    move_on_after,
    remaining,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager


def now() -> float:
    """Return the time of the running loop."""
    return asyncio.get_running_loop().time()


def cancelling() -> int:
    """Return how many cancellations the current task has to honour."""
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_deadline_cuts_the_block_short() -> None:
    """A block that takes too long is cancelled when its time is over."""
    start = now()
    with pytest.raises(DeadlineExceeded, match=r"not done within 0\.5 s") as caught:
        async with deadline(0.5) as scope:
            await asyncio.sleep(10)
    assert now() - start == 0.5
    assert scope.expired
    assert caught.value.seconds == 0.5
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert cancelling() == 0


async def test_deadline_leaves_a_fast_block_alone() -> None:
    """A block that is done in time returns as if there were no deadline."""
    async with deadline(0.5) as scope:
        await asyncio.sleep(0.4)
    assert not scope.expired
    await asyncio.sleep(1)


async def test_inner_timeout_error_is_not_relabelled() -> None:
    """T29: A TimeoutError of the code inside passes through as it is."""
    mine = TimeoutError("the code's own")
    with pytest.raises(TimeoutError) as caught:
        async with deadline(5):
            raise mine
    assert caught.value is mine
    with pytest.raises(TimeoutError) as caught:
        async with move_on_after(5) as scope:
            raise mine
    assert caught.value is mine
    assert not scope.expired


async def test_outer_deadline_ends_an_inner_one() -> None:
    """A nested deadline never outlives the outer one, and the outer one is told as the cause."""
    start = now()
    with pytest.raises(DeadlineExceeded) as caught:
        async with deadline(1), deadline(60) as inner:
            assert remaining() == 1
            await asyncio.sleep(100)
    assert now() - start == 1
    assert caught.value.seconds == 1
    assert not inner.expired
    assert cancelling() == 0


async def test_inner_deadline_leaves_time_to_the_outer_one() -> None:
    """When a shorter inner deadline is over, the outer block goes on with what is left."""
    async with deadline(3):
        with pytest.raises(DeadlineExceeded) as caught:
            async with deadline(1):
                assert remaining() == 1
                await asyncio.sleep(100)
        assert caught.value.seconds == 1
        assert remaining() == 2
    assert remaining() is None


async def test_child_task_keeps_to_the_deadline_of_its_parent() -> None:
    """A deadline opened in a child task never outlives the one around the group of the task."""
    outcomes = []

    async def child() -> None:
        start = now()
        try:
            async with deadline(60) as inner:
                assert remaining() == 2
                await asyncio.sleep(100)
        except asyncio.CancelledError:  # a DeadlineExceeded would blame the 60 s
            outcomes.append((now() - start, inner.expired, cancelling()))
            raise

    async with move_on_after(2) as outer, asyncio.TaskGroup() as group:
        group.create_task(child())
    assert outer.expired
    assert outcomes == [(2, False, 1)]


async def fan_out(policy: Timeout) -> None:
    """Call something slow in two child tasks."""
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(policy.call(asyncio.sleep, 0.2))


async def fan_out_twice(policy: Timeout) -> None:
    """Call something slow in the child tasks of a child task."""
    async with asyncio.TaskGroup() as group:
        group.create_task(fan_out(policy))


async def gathered(policy: Timeout) -> None:
    """Call something slow in two gathered tasks."""
    await asyncio.gather(*(policy.call(asyncio.sleep, 0.2) for _ in range(2)))


async def directly(policy: Timeout) -> None:
    """Call something slow in the task itself."""
    await policy.call(asyncio.sleep, 0.2)


@pytest.mark.parametrize("work", [fan_out, fan_out_twice, gathered, directly])
async def test_impatient_caller_is_no_timeout_of_the_service(work: Callable[..., Any]) -> None:
    """When the caller's deadline ends a call, its Timeout neither counts nor tells its own."""
    told: list[object] = []
    timeout = Timeout(2)
    timeout.on_event = lambda *event: told.append(event)
    with pytest.raises(DeadlineExceeded, match=r"not done within 0\.1 s") as caught:
        async with deadline(0.1):
            await work(timeout)
    assert caught.value.seconds == 0.1
    assert timeout.statistics().timed_out == 0
    assert told == []


async def test_impatient_callers_do_not_open_the_breaker_of_a_healthy_service() -> None:
    """A breaker ignores what the deadline of the caller ends, in a child task, too."""
    breaker = CircuitBreaker()
    service = compose(Hedge(delay=0.05), breaker, Timeout(2))
    for _ in range(5):
        with pytest.raises(DeadlineExceeded):
            async with deadline(0.1):
                await service.call(asyncio.sleep, 0.2)
    assert breaker.state is CircuitState.CLOSED
    assert breaker.statistics().failed == 0
    assert await service.call(asyncio.sleep, 0.2, "answer") == "answer"


async def test_child_cleans_up_undisturbed_when_the_deadline_of_its_parent_is_over() -> None:
    """A child task gets one cancellation when the time is over, and not one from each deadline."""
    log = []

    async def child() -> None:
        async with deadline(60):
            try:
                await asyncio.sleep(100)
            finally:
                await asyncio.sleep(0.5)
                log.append("clean")

    async with move_on_after(1), asyncio.TaskGroup() as group:
        group.create_task(child())
    assert log == ["clean"]


async def test_task_left_behind_has_its_own_limit_alone() -> None:
    """A Timeout in a background task is not cut short by a deadline that its creator has left."""
    start = now()

    async def audit(seconds: float) -> str:
        return await Timeout(30).call(asyncio.sleep, seconds, "written")

    async with deadline(1):  # done at once
        tasks = [asyncio.create_task(audit(seconds)) for seconds in (5, 100)]
        await asyncio.sleep(0)
    assert await tasks[0] == "written"
    with pytest.raises(DeadlineExceeded, match=r"not done within 30 s"):
        await tasks[1]
    assert now() - start == 30


async def test_shielded_task_outlives_the_deadline_around_it() -> None:
    """What is shielded from the deadline's cancellation goes on to its own limit."""
    async with move_on_after(1):
        task = asyncio.create_task(Timeout(30).call(asyncio.sleep, 5, "written"))
        await asyncio.shield(task)
    assert await task == "written"


async def test_remaining_is_the_least_of_all_deadlines_around() -> None:
    """A longer deadline inside a shorter one does not hide it, also when one between is left."""
    async with deadline(3), deadline(60) as inner:
        assert (remaining(), inner.remaining()) == (3, 3)
        async with deadline(2) as shortest:
            task = asyncio.create_task(asyncio.sleep(0, remaining()))
            assert (remaining(), shortest.remaining()) == (2, 2)
        assert remaining() == 3
    assert await task == 2


async def test_task_that_outlives_the_scope_is_no_longer_bound() -> None:
    """A background task forgets a deadline that its creator has left."""
    seen = []

    async def background() -> None:
        seen.append(remaining())
        await asyncio.sleep(5)
        seen.append(remaining())

    async with deadline(2):
        task = asyncio.create_task(background())
        await asyncio.sleep(0)
    await task
    assert seen == [2, None]


async def test_chain_of_tasks_does_not_keep_old_scopes_alive() -> None:
    """Tasks that start one another, each in a deadline of its own, leave no chain of scopes."""
    depth = 0

    async def link(left: int) -> None:
        nonlocal depth
        await asyncio.sleep(0)
        async with deadline(10) as scope:
            outer, depth = scope._outer, 0
            while outer is not None:
                outer, depth = outer._outer, depth + 1
            if left:
                tasks.append(asyncio.create_task(link(left - 1)))
        await asyncio.sleep(0)

    tasks = [asyncio.create_task(link(50))]
    for task in tasks:  # grows while we go through it
        await task
    assert len(tasks) == 51
    assert depth <= 2


async def test_remaining_in_a_thread_is_that_of_the_caller() -> None:
    """Code in a thread sees the deadline of the task that started it."""
    async with deadline(3):
        left = await asyncio.to_thread(remaining)
    assert left is not None
    assert 2.5 < left <= 3
    assert await asyncio.to_thread(remaining) is None


def test_remaining_outside_of_a_loop() -> None:
    """Without any deadline there is nothing to tell, loop or not."""
    assert remaining() is None


async def test_deadline_crosses_into_the_loop_of_a_thread() -> None:
    """An event loop in a thread keeps to the deadline of the caller, on its own clock."""

    async def inner() -> float | None:
        async with deadline(60):
            return remaining()

    async with deadline(3):
        left = await asyncio.to_thread(asyncio.run, inner())
    assert left is not None
    assert 2 < left <= 3


async def test_deadline_ends_what_runs_in_the_loop_of_a_thread() -> None:
    """No cancellation reaches a thread, so a limit there ends with the deadline of the caller."""
    told: list[Any] = []
    timeout = Timeout(60)
    timeout.on_event = lambda _, data: told.append(data["seconds"])
    async with move_on_after(0.1):
        slow = timeout.call(asyncio.sleep, 100)
        thread = asyncio.create_task(asyncio.to_thread(asyncio.run, slow))
        await asyncio.shield(thread)
    with pytest.raises(DeadlineExceeded) as caught:
        await thread
    assert told == [caught.value.seconds]
    assert 0 < round(told[0], 6) <= 0.1


async def test_outer_cancellation_wins_over_the_deadline() -> None:
    """T29: A task that is cancelled in the same moment as its time runs out is cancelled."""

    async def work() -> None:
        async with deadline(1):
            await asyncio.sleep(10)

    task = asyncio.create_task(work())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


class Limits:
    """What the tests of the next function vary: how long the block is, and what disturbs it."""

    def __init__(self, limit: Callable[[float], AbstractAsyncContextManager[Any]]) -> None:
        self.limit = limit

    async def too_long(self) -> None:
        async with self.limit(1):
            await asyncio.sleep(5)

    async def in_time(self) -> None:
        async with self.limit(1):
            await asyncio.sleep(0.5)

    async def no_time_at_all(self) -> None:
        async with self.limit(0):
            await asyncio.sleep(0)

    async def done_in_the_last_moment(self) -> None:
        async with self.limit(1):
            await asyncio.sleep(1)

    async def inner_first(self) -> None:
        async with self.limit(2):
            try:
                async with self.limit(1):
                    await asyncio.sleep(5)
            except TimeoutError:
                await asyncio.sleep(5)

    async def both_at_once(self) -> None:
        async with self.limit(1), self.limit(1):
            await asyncio.sleep(5)

    async def swallows(self) -> None:
        async with self.limit(1):
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                await asyncio.sleep(0.5)

    async def converts(self) -> None:
        async with self.limit(1):
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                raise OSError("interrupted") from None

    async def cleans_up_too_long(self) -> None:
        async with self.limit(2), self.limit(1):
            try:
                await asyncio.sleep(5)
            finally:
                await asyncio.sleep(5)

    async def blocks_the_loop(self) -> None:
        async with self.limit(1):
            asyncio.get_running_loop().now += 3  # type: ignore[attr-defined]  # the virtual clock
            await asyncio.sleep(0)

    async def group(self) -> None:
        async with self.limit(1), asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(5))


@pytest.mark.parametrize("cancelled_at", [None, 0, 0.5, 1, 1.5, 2])
@pytest.mark.parametrize("name", [name for name in vars(Limits) if not name.startswith("_")])
async def test_deadline_ends_a_block_as_asyncio_timeout_does(
    name: str, cancelled_at: float | None
) -> None:
    """T29: a deadline has the outcome of asyncio.timeout, whoever else cancels the task."""

    async def outcome(limit: Callable[[float], AbstractAsyncContextManager[Any]]) -> object:
        async def work() -> object:
            try:
                await getattr(Limits(limit), name)()
            except (TimeoutError, OSError) as error:
                told: object = TimeoutError if isinstance(error, TimeoutError) else type(error)
            else:
                told = "done"
            return told, cancelling(), remaining(), round(now() - start, 6)

        start = now()
        task = asyncio.create_task(work())
        if cancelled_at is not None:
            await asyncio.sleep(cancelled_at)
            task.cancel()
        await asyncio.wait([task])
        return "cancelled" if task.cancelled() else task.result()

    assert await outcome(deadline) == await outcome(asyncio.timeout)


async def test_scope_needs_a_task() -> None:
    """Outside of a task there is nothing to cut short, which is said at once."""
    failures: list[object] = []

    def callback() -> None:
        entering = deadline(1).__aenter__()
        try:
            entering.send(None)
        except RuntimeError as error:
            failures.append(str(error))

    asyncio.get_running_loop().call_soon(callback)
    await asyncio.sleep(0)
    assert failures == ["there is no task here that a deadline could cut short"]


async def test_closed_scope_lets_go_of_its_task() -> None:
    """A task that outlives the scope in which it was created does not keep the creator alive."""

    async def creator() -> asyncio.Task[None]:
        async with deadline(1):
            return asyncio.create_task(asyncio.sleep(10))

    task = asyncio.create_task(creator())
    left = weakref.ref(task)
    child = await task
    del task
    await asyncio.sleep(0)
    assert left() is None
    child.cancel()


async def test_cancellation_passes_through_move_on_after() -> None:
    """move_on_after swallows its own cancellation and no other."""

    async def work() -> None:
        async with move_on_after(10):
            await asyncio.sleep(20)

    task = asyncio.create_task(work())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_asyncio_timeout_outside_is_respected() -> None:
    """A plain asyncio.timeout around a deadline ends it and is reported by asyncio."""
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(1), deadline(5):
            await asyncio.sleep(10)
    assert not isinstance(caught.value, DeadlineExceeded)
    assert remaining() is None
    assert cancelling() == 0


async def test_move_on_after_says_whether_it_was_cut_short() -> None:
    """move_on_after goes on behind the block and tells whether the time was over."""
    async with move_on_after(0.5) as late:
        await asyncio.sleep(1)
    async with move_on_after(0.5) as in_time:
        await asyncio.sleep(0.1)
    assert (late.expired, in_time.expired) == (True, False)
    assert cancelling() == 0


async def test_zero_seconds_run_to_the_first_wait() -> None:
    """With no time at all the block runs until it waits for the first time."""
    steps = []
    async with move_on_after(0) as scope:
        steps.append("before")
        await asyncio.sleep(1)
        steps.append("after")
    assert steps == ["before"]
    assert scope.expired


async def test_scope_serves_one_block() -> None:
    """A scope cannot be entered again: its clock has run."""
    scope = deadline(1)
    assert scope.remaining() == 1
    async with scope:
        pass
    with pytest.raises(RuntimeError, match="make a new one"):
        async with scope:
            pass


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, "1", None, True])
def test_bad_seconds_are_refused_at_once(seconds: float) -> None:
    """A time that makes no sense is refused where it is written."""
    for make in (deadline, move_on_after, Timeout):
        with pytest.raises((ValueError, TypeError), match=r"seconds must be .*got"):
            make(seconds)
    with pytest.raises(ValueError, match=r"seconds must be above 0, got 0"):
        Timeout(0)


async def test_timeout_limits_each_call() -> None:
    """Timeout gives each call the same time, as call and as decorator."""
    timeout = Timeout(1)

    @timeout
    async def work(seconds: float) -> str:
        """Do it."""
        assert remaining() == 1
        await asyncio.sleep(seconds)
        return "done"

    assert await work(0.5) == "done"
    with pytest.raises(DeadlineExceeded):
        await work(2)
    assert await timeout.call(asyncio.sleep, 0.1, "slept") == "slept"
    assert (work.__name__, work.__doc__) == ("work", "Do it.")
    assert inspect.iscoroutinefunction(work)
    assert timeout.statistics() == TimeoutStatistics(calls=3, timed_out=1)


async def test_timeout_serves_concurrent_calls() -> None:
    """Calls that run at the same time through one Timeout do not disturb each other."""
    timeout = Timeout(1)
    outcomes = await asyncio.gather(
        *(timeout.call(asyncio.sleep, seconds, seconds) for seconds in (0.5, 2, 0.9, 3)),
        return_exceptions=True,
    )
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "float",
        "DeadlineExceeded",
        "float",
        "DeadlineExceeded",
    ]


async def test_own_timeout_error_does_not_count_as_timed_out() -> None:
    """T29: A TimeoutError of the function itself is its own failure, not ours."""
    timeout = Timeout(1)

    async def fails() -> None:
        raise TimeoutError("from the server")

    with pytest.raises(TimeoutError, match="from the server"):
        await timeout.call(fails)
    assert timeout.statistics() == TimeoutStatistics(calls=1, timed_out=0)


def test_timeout_refuses_a_plain_function() -> None:
    """What does not wait cannot be cut short, so it is not wrapped."""
    with pytest.raises(TypeError, match="async function"):
        Timeout(1)(print)  # type: ignore[arg-type]


def test_timeout_lives_through_three_loops() -> None:
    """A Timeout made at import time serves one event loop after the other."""
    timeout = Timeout(1)
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            run_virtual(timeout.call(asyncio.sleep, 5))
    assert timeout.statistics().timed_out == 3


async def test_cancelled_operation_cleans_up() -> None:
    """The chapter's operation: works each second, is cancelled after 3 s, cleans up, says so."""
    log = []

    async def operation() -> None:
        try:
            while True:
                log.append("working")
                await asyncio.sleep(1)
        except asyncio.CancelledError:
            log.append("cleaning up")
            await asyncio.sleep(0.1)
            log.append("clean")
            raise

    task = asyncio.create_task(operation())
    await asyncio.sleep(2.5)
    start = now()
    assert await cancel_and_wait(task, grace=1) is CancelOutcome.CANCELLED
    assert round(now() - start, 9) == 0.1
    assert log == ["working", "working", "working", "cleaning up", "clean"]


async def test_cancel_and_wait_tells_how_the_task_ended() -> None:
    """A task can be cancelled, finish in spite of it, fail, refuse, or have ended before."""

    async def polite() -> None:
        await asyncio.sleep(100)

    async def finishes() -> str:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            return "result"
        return "never"

    async def fails() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            raise OSError("disk full")

    async def refuses() -> None:
        while now() < end:
            try:
                await asyncio.sleep(end - now())
            except asyncio.CancelledError:
                continue

    end = now() + 10
    tasks = [asyncio.create_task(work()) for work in (polite, finishes, fails, refuses)]
    await asyncio.sleep(0)
    outcomes = [await cancel_and_wait(task, grace=1) for task in tasks]
    assert [outcome.name for outcome in outcomes] == ["CANCELLED", "FINISHED", "FINISHED", "STUCK"]
    assert isinstance(tasks[2].exception(), OSError)
    assert await cancel_and_wait(tasks[0], grace=0) is CancelOutcome.CANCELLED
    assert await cancel_and_wait(tasks[1], grace=0) is CancelOutcome.FINISHED
    await tasks[3]


async def test_cancel_and_wait_retrieves_the_exception() -> None:
    """A task that fails while it is cancelled leaves no message in asyncio's log."""
    logged: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))

    async def fails() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            raise OSError("disk full")

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    assert await cancel_and_wait(task, grace=1) is CancelOutcome.FINISHED
    del task
    gc.collect()
    assert logged == []


async def test_cancel_and_wait_can_be_cancelled_itself() -> None:
    """The caller's own cancellation is raised, not taken for that of the task."""

    async def slow_cleanup() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(5)

    task = asyncio.create_task(slow_cleanup())
    await asyncio.sleep(0)
    caller = asyncio.create_task(cancel_and_wait(task, grace=10))
    await asyncio.sleep(1)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    assert not task.done()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_cancel_and_wait_refuses_nonsense() -> None:
    """A negative grace and the caller itself are refused before anything is cancelled."""
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(RuntimeError, match="its own end"):
        await cancel_and_wait(task, grace=1)
    with pytest.raises(ValueError, match="grace must be 0 or more, got -1"):
        await cancel_and_wait(task, grace=-1)
    assert cancelling() == 0


async def test_reason_reaches_the_task() -> None:
    """The reason is the message of the CancelledError inside the task."""
    heard = []

    async def work() -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError as error:
            heard.extend(error.args)
            raise

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await cancel_and_wait(task, grace=1, reason="shutdown")
    assert heard == ["shutdown"]


async def test_second_cancellation_does_not_cut_the_cleanup_short() -> None:
    """A bounded clean-up runs to its end whatever comes, and the cancellation is raised then."""
    log = []

    async def close() -> None:
        await asyncio.sleep(0.5)
        log.append("closed")

    async def work() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await bounded_cleanup(close(), 2)

    task = asyncio.create_task(work())
    await asyncio.sleep(1)
    for _ in range(4):
        task.cancel()
        await asyncio.sleep(0.1)
    await asyncio.wait([task])
    assert log == ["closed"]
    assert task.cancelled()


async def test_cleanup_after_the_deadline_has_its_own_time() -> None:
    """A clean-up in a block whose time is over sees the time that it has been given."""

    async def close() -> float | None:
        await asyncio.sleep(1)
        return remaining()

    async def work() -> None:
        nonlocal left
        async with deadline(1):
            try:
                await asyncio.sleep(100)
            finally:
                left = await bounded_cleanup(close(), 3)

    left = None
    with pytest.raises(DeadlineExceeded):
        await work()
    assert left == 2


async def test_cleanup_is_bounded() -> None:
    """A clean-up that takes too long is cancelled; one that refuses is left behind."""

    async def hangs() -> None:
        await asyncio.sleep(100)

    async def refuses() -> None:
        end = now() + 10
        while now() < end:
            try:
                await asyncio.sleep(end - now())
            except asyncio.CancelledError:
                continue

    for work in (hangs, refuses):
        start = now()
        with pytest.raises(DeadlineExceeded, match="clean-up took more than 2 s"):
            await bounded_cleanup(work(), 2)
        assert now() - start == 2
    await asyncio.sleep(20)


async def test_cleanup_gives_its_result_or_its_failure() -> None:
    """Without a cancellation a clean-up returns and raises as if it were awaited directly."""

    async def fails() -> None:
        raise OSError("disk full")

    assert await bounded_cleanup(asyncio.sleep(0.1, "result"), 1) == "result"
    with pytest.raises(OSError, match="disk full"):
        await bounded_cleanup(fails(), 1)
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        await bounded_cleanup(fails(), 0)


async def test_failed_cleanup_does_not_hide_the_cancellation() -> None:
    """If the task was cancelled and the clean-up failed, both are told: the one from the other."""

    async def fails() -> None:
        await asyncio.sleep(1)
        raise OSError("disk full")

    task = asyncio.create_task(bounded_cleanup(fails(), 5))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert isinstance(caught.value.__cause__, OSError)


def test_cancellation_anywhere_leaves_no_deadline_behind() -> None:
    """Wherever a task is cancelled, deadlines are gone afterwards and the count is back at 0."""

    async def work(left: list[object]) -> None:
        try:
            async with deadline(5), move_on_after(1):
                await asyncio.sleep(0.5)
                await Timeout(0.1).call(asyncio.sleep, 0.2)
        except DeadlineExceeded:
            left.append(cancelling() or None)
        finally:
            left.append(remaining())

    async def scenario(left: list[object]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(work(left))
            group.create_task(work(left))

    def whole(left: list[object]) -> bool:
        return all(entry is None for entry in left)

    assert explore_cancellation(list, scenario, whole) > 5


def test_cancellation_anywhere_does_not_break_the_cleanup() -> None:
    """Wherever the owner is cancelled, a clean-up that has begun is finished."""

    class Log:
        begun = ended = 0

    async def close(log: Log) -> None:
        log.begun += 1
        try:
            await asyncio.sleep(0.2)
        finally:
            log.ended += 1

    async def scenario(log: Log) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.1, task.cancel)
        await bounded_cleanup(close(log), 1)

    assert explore_cancellation(Log, scenario, lambda log: log.begun == log.ended) > 3


def test_cancellation_anywhere_does_not_confuse_cancel_and_wait() -> None:
    """Wherever caller or task is cancelled, what is told of the task is true, and it cleans up."""

    class Told:
        begun = ended = 0
        true = True

    async def work(told: Told) -> None:
        told.begun += 1
        try:
            await asyncio.sleep(10)
        finally:
            told.ended += 1

    async def scenario(told: Told) -> None:
        task = asyncio.create_task(work(told))
        try:
            await asyncio.sleep(0.1)
            outcome = await cancel_and_wait(task, grace=1)
            told.true = outcome is CancelOutcome.CANCELLED and task.cancelled()
        finally:  # the explorer wants no task left
            task.cancel()
            await asyncio.wait([task])

    def whole(told: Told) -> bool:
        return told.true and told.begun == told.ended

    assert explore_cancellation(Told, scenario, whole) > 5
