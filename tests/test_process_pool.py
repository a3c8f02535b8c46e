"""Process pool: real processes, so the clock of these tests follows the real one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import process_workloads as work
import pytest

from concurrency_patterns.errors import PoolClosed, RemoteError, WorkerCrashed
from concurrency_patterns.process_pool import ProcessPool

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the faults are signals of POSIX")


@pytest.fixture(autouse=True)
def light_workers_and_none_left(monkeypatch):
    """A worker need not import pytest as its main module; after a test, none is left."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", None)
    yield
    assert multiprocessing.active_children() == []


def gone(pid):
    """Tell whether no such process is there, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# What it is for.


async def test_the_chapters_workload_20_items_3_workers_each_once(tmp_path):
    """20 items over 3 processes: each is handled exactly once, and the block ends."""
    async with ProcessPool(3) as pool:
        results = [result async for result in pool.map(work.pid_and, range(20))]

    assert [item for _, item in results] == list(range(20))
    assert os.getpid() not in {pid for pid, _ in results}
    assert pool.statistics().delivered == 20


async def test_submit_calls_with_positional_and_keyword_arguments():
    """``submit`` passes the arguments on and returns what the function returns."""
    async with ProcessPool(1) as pool:
        assert await pool.submit(divmod, 7, 3) == (2, 1)
        assert await pool.submit(sorted, [1, 3, 2], reverse=True) == [3, 2, 1]


async def test_leaving_the_block_waits_for_what_was_submitted():
    """A call that still runs in another task is finished before the pool ends."""
    async with ProcessPool(1) as pool:
        calls = [asyncio.create_task(pool.submit(work.nap, 0.1)) for _ in range(2)]
        await asyncio.sleep(0)
    assert [call.result() for call in calls] == [0.1, 0.1]


def test_three_event_loops_one_after_the_other():
    """A pool made outside of any loop starts nothing, and serves three ``asyncio.run``."""
    pool = ProcessPool(1)
    assert multiprocessing.active_children() == []

    async def main():
        async with pool:
            return await pool.submit(work.double, 21)

    assert [asyncio.run(main()) for _ in range(3)] == [42, 42, 42]


def test_a_second_event_loop_at_the_same_time_is_refused():
    """Submitting from another running loop raises instead of hanging."""
    pool = ProcessPool(1)

    async def other():
        with pytest.raises(RuntimeError, match="another event loop"):
            await pool.submit(work.double, 1)

    async def main():
        async with pool:
            await asyncio.to_thread(asyncio.run, other())

    asyncio.run(main())


@pytest.mark.parametrize("ordered", [True, False])
async def test_map_reads_an_endless_source_only_so_far_ahead(ordered):
    """No more items are read than results taken + workers + buffer."""
    read = 0

    def source():
        nonlocal read
        for number in itertools.count():
            read += 1
            yield number

    async with ProcessPool(2) as pool:
        results = pool.map(work.double, source(), ordered=ordered, buffer=3)
        for taken in range(1, 30):
            await anext(results)
            await asyncio.sleep(0)
            assert read <= taken + 2 + 3
        await results.aclose()
    assert read <= 29 + 2 + 3


async def test_results_that_nobody_takes_hold_the_source_back():
    """While the first result is not taken, the source waits, however fast the workers are."""
    read = []
    async with ProcessPool(2) as pool:
        results = pool.map(work.double, (read.append(n) or n for n in itertools.count()), buffer=1)
        await anext(results)
        await asyncio.sleep(0.1)
        assert len(read) == 3
        await results.aclose()


async def test_map_ordered_keeps_the_order_of_the_source(tmp_path):
    """The first item is finished last, and yet comes first."""
    job = functools.partial(work.first_waits_for, str(tmp_path / "go"), "last item")
    async with ProcessPool(2) as pool:
        assert [number async for number in pool.map(job, range(3))] == [0, 1, 2]


async def test_map_as_completed_yields_what_is_finished(tmp_path):
    """While the first item is still running, the others are yielded."""
    job = functools.partial(work.first_waits_for, str(tmp_path / "go"), "parent")
    seen = []
    async with ProcessPool(2) as pool:
        async for number in pool.map(job, range(3), ordered=False):
            seen.append(number)
            if len(seen) == 2:
                (tmp_path / "go").touch()
    assert seen == [1, 2, 0]


async def test_a_slow_source_does_not_hold_back_results():
    """A finished result is yielded while the source still waits for its next item."""
    more = asyncio.Event()
    closed = False

    async def source():
        nonlocal closed
        try:
            yield 1
            await more.wait()
            yield 2
        finally:
            closed = True

    async with ProcessPool(1) as pool:
        results = pool.map(work.double, source())
        assert await anext(results) == 2
        more.set()
        assert [result async for result in results] == [4]
    assert closed


async def test_an_error_of_the_source_comes_after_the_results():
    """What the source gave before it failed is handled; then its error is raised."""

    def source():
        yield 1
        yield 2
        raise OSError("no more")

    for ordered in (True, False):
        results = []
        async with ProcessPool(1) as pool:
            with pytest.raises(OSError, match="no more"):
                async for result in pool.map(work.double, source(), ordered=ordered):
                    results.append(result)
        assert results == [2, 4]


async def test_breaking_off_a_map_gives_up_its_items():
    """After ``break`` the workers are free for others at once."""
    async with ProcessPool(2) as pool:
        async for _ in pool.map(work.nap, [0, 60, 60, 60]):
            break
        async with asyncio.timeout(30):
            assert await pool.submit(work.double, 1) == 2


# When workers die.


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_killed_worker_costs_its_item_alone(ordered):
    """SIGKILL on item 5: that item ends in WorkerCrashed, the other eleven have results."""
    async with ProcessPool(2) as pool:
        answers = pool.map(work.double_or_die, range(12), ordered=ordered, return_exceptions=True)
        results = [result async for result in answers]
        statistics = pool.statistics()

    (error,) = [result for result in results if isinstance(result, Exception)]
    assert isinstance(error, WorkerCrashed)
    assert (error.exitcode, error.item) == (-signal.SIGKILL, 5)
    assert str(error) == "a worker process was killed by SIGKILL while it ran double_or_die for 5"
    results.remove(error)
    assert sorted(results) == [2 * n for n in range(12) if n != 5]
    assert (statistics.restarts, statistics.poisoned) == (1, 1)


async def test_os_exit_tells_its_exit_code():
    """``os._exit(3)`` fails its own call, and the next one finds a new worker."""
    async with ProcessPool(1) as pool:
        with pytest.raises(
            WorkerCrashed, match="ended with exit code 3 while it ran _exit"
        ) as info:
            await pool.submit(os._exit, 3)
        assert (info.value.exitcode, info.value.item) == (3, (3,))
        assert await pool.submit(work.double, 4) == 8


async def test_map_raises_the_crash_in_its_place():
    """Without ``return_exceptions`` the crash is raised after the results before it."""
    results = []
    async with ProcessPool(2) as pool:
        with pytest.raises(WorkerCrashed):
            async for result in pool.map(work.double_or_die, range(12)):
                results.append(result)
    assert results == [0, 2, 4, 6, 8]


async def test_a_lost_call_is_made_again_up_to_max_deliveries(tmp_path):
    """With ``max_deliveries=2`` the second delivery gives the result."""
    async with ProcessPool(1, max_deliveries=2) as pool:
        assert await pool.submit(work.die_once, str(tmp_path / "mark")) == "second delivery"
        statistics = pool.statistics()
    assert (statistics.delivered, statistics.redelivered, statistics.poisoned) == (2, 1, 0)


async def test_a_poison_item_is_given_up(tmp_path):
    """An item that kills every worker is delivered ``max_deliveries`` times and no more."""
    log = tmp_path / "log"
    async with ProcessPool(1, max_deliveries=3) as pool:
        with pytest.raises(WorkerCrashed, match="exit code 9"):
            await pool.submit(work.note_and_die, str(log))
        assert await pool.submit(work.double, 1) == 2
        assert pool.statistics().poisoned == 1
    assert log.read_text().count("called") == 3


async def test_a_worker_killed_while_idle_costs_nothing():
    """A worker that dies between two items is replaced, and no item is lost."""
    async with ProcessPool(1) as pool:
        pid = await pool.submit(os.getpid)
        os.kill(pid, signal.SIGKILL)
        while pool.statistics().restarts == 0:  # noqa: ASYNC110 -- the pool has no such event
            await asyncio.sleep(0.01)
        assert gone(pid)
        assert await pool.submit(os.getpid) != pid


async def test_a_child_of_the_worker_does_not_hide_its_death(tmp_path):
    """A forked child that lives on does not keep the pipe open."""
    log = tmp_path / "pid"
    async with ProcessPool(1) as pool:
        with pytest.raises(WorkerCrashed, match="exit code 4"):
            await pool.submit(work.fork_and_die, str(log))
    os.kill(int(log.read_text()), signal.SIGKILL)  # it was still there


async def test_workers_that_cannot_start_fail_the_items(monkeypatch, capfd):
    """When no worker comes up, each item fails with a hint; nothing waits for ever."""
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # a new interpreter finds no library
    async with ProcessPool(1) as pool:
        calls = (pool.submit(work.double, number) for number in range(3))
        errors = await asyncio.gather(*calls, return_exceptions=True)
        monkeypatch.undo()
        assert await pool.submit(work.double, 4) == 8  # later it may work again
    assert [type(error) for error in errors] == [WorkerCrashed] * 3
    assert "while it started" in str(errors[0])
    assert "__main__" in str(errors[0])
    capfd.readouterr()  # the interpreters' own complaints


async def test_no_process_to_be_had(monkeypatch):
    """When the system refuses a new process, the item fails with its error as the cause."""

    def refuse(_):
        raise BlockingIOError("no more processes")

    async with ProcessPool(1) as pool:
        monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", refuse)
        with pytest.raises(WorkerCrashed, match="could not be started") as info:
            await pool.submit(work.double, 1)
        assert isinstance(info.value.__cause__, BlockingIOError)


def test_a_script_without_a_main_guard_ends_with_a_hint(tmp_path):
    """Each worker would start workers of its own: the program is told, and does not hang."""
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio\n"
        "from concurrency_patterns.process_pool import ProcessPool\n"
        "async def main():\n"
        "    async with ProcessPool(1) as pool:\n"
        "        await pool.submit(abs, 1)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 1
    assert "WorkerCrashed" in ended.stderr.splitlines()[-1]
    assert 'needs `if __name__ == "__main__":`' in ended.stderr


# What cannot travel.


async def test_an_exception_comes_as_it_was_raised():
    """The type and arguments survive, and the worker's traceback is a note."""
    async with ProcessPool(1) as pool:
        with pytest.raises(LookupError) as info:
            await pool.submit(work.fail, "not here")
    assert info.value.args == ("not here",)
    assert "in fail" in info.value.__notes__[0]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (work.raise_two_arguments, "TwoArgumentsError: 7: seven"),
        (work.raise_lock, "HoldsALockError: locked"),
        (work.interrupt, "KeyboardInterrupt: stop"),
        (sys.exit, "SystemExit"),
        (work.stop_iteration, "StopIteration"),
        (work.make_lock, "the result of make_lock cannot be pickled: TypeError"),
        (work.make_brittle, "the result of make_brittle cannot be unpickled: ValueError: brittle"),
    ],
)
async def test_what_cannot_travel_is_told_as_a_remote_error(fn, message):
    """Only that call fails; the same worker serves the next one."""
    async with ProcessPool(1) as pool:
        pid = await pool.submit(os.getpid)
        with pytest.raises(RemoteError, match=message) as info:
            await pool.submit(fn)
        assert info.value.traceback
        assert await pool.submit(os.getpid) == pid


async def test_an_argument_that_cannot_be_pickled_is_refused_at_once():
    """The call raises TypeError and nothing was delivered."""
    async with ProcessPool(1) as pool:
        with pytest.raises(TypeError, match=r"the call of double cannot be pickled.*lock"):
            await pool.submit(work.double, threading.Lock())
        with pytest.raises(TypeError, match="<lambda>"):
            await pool.submit(lambda: 1)
        results = pool.map(work.double, [1, threading.Lock(), 3])
        assert await anext(results) == 2
        with pytest.raises(TypeError, match="cannot be pickled"):
            await anext(results)
        assert pool.statistics().delivered == 1


async def test_an_argument_that_cannot_be_unpickled_fails_its_call():
    """The worker answers with the error instead of dying."""
    async with ProcessPool(1) as pool:
        with pytest.raises(RemoteError, match="the call cannot be unpickled: ValueError: brittle"):
            await pool.submit(work.double, work.Brittle())
        assert pool.statistics().restarts == 0


async def test_large_messages_in_both_directions():
    """Several megabytes go both ways at once; the event loop goes on meanwhile."""
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    size = 4 * 2**20
    async with ProcessPool(2) as pool:
        ticking = asyncio.create_task(tick())
        calls = (pool.submit(bytes.upper, b"x" * size) for _ in range(4))
        results = await asyncio.gather(*calls)
        ticking.cancel()
        assert len(await pool.submit(work.blob, 2**20)) == 2**20
        assert await pool.submit(work.size_of, bytes(2**20)) == 2**20
    assert results == [b"X" * size] * 4
    assert ticks >= 16  # the loop's transport reads at most 256 KiB in one step


# Cancellation and the end.


async def test_cancelling_a_running_call_kills_its_worker():
    """The process is gone, another worker takes the next call."""
    async with ProcessPool(1) as pool:
        pid = await pool.submit(os.getpid)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await pool.submit(work.nap, 60)
        assert await pool.submit(os.getpid) != pid
        assert gone(pid)
        assert pool.statistics().restarts == 1


async def test_cancelling_a_waiting_call_only_takes_it_out_of_the_line():
    """The running call is not disturbed, the cancelled one never runs."""
    async with ProcessPool(1) as pool:
        await pool.submit(os.getpid)
        running = asyncio.create_task(pool.submit(work.nap, 0.1))
        waiting = asyncio.create_task(pool.submit(work.nap, 60))
        last = asyncio.create_task(pool.submit(work.double, 1))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([running, waiting, last])
        assert (running.result(), waiting.cancelled(), last.result()) == (0.1, True, 2)
        assert (pool.statistics().restarts, pool.statistics().delivered) == (0, 3)


async def test_an_exception_in_the_block_kills_the_workers():
    """The block ends at once with its own error; who still waits gets PoolClosed."""
    loop = asyncio.get_running_loop()
    with pytest.raises(ZeroDivisionError):
        async with ProcessPool(1) as pool:
            pid = await pool.submit(os.getpid)
            running = asyncio.create_task(pool.submit(work.nap, 60))
            waiting = asyncio.create_task(pool.submit(work.nap, 60))
            await asyncio.sleep(0.05)
            start = loop.time()
            raise ZeroDivisionError
    assert loop.time() - start < 20
    assert gone(pid)
    for call in (running, waiting):
        with pytest.raises(PoolClosed):
            await call


async def test_cancelling_the_block_while_it_waits_kills_the_workers():
    """A cancelled program does not wait for a worker that takes for ever."""

    async def main():
        async with ProcessPool(2) as pool:
            calls.append(asyncio.create_task(pool.submit(work.nap, 60)))
            await asyncio.sleep(0.3)

    calls = []
    task = asyncio.create_task(main())
    await asyncio.sleep(0.4)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(PoolClosed):
        await calls[0]


@pytest.mark.parametrize("delay", [0, 0.001, 0.02, 0.2])
async def test_cancelled_while_workers_start(delay):
    """Wherever the cancellation hits the start, no process and no socket is left."""

    async def main():
        async with ProcessPool(2) as pool:
            await pool.submit(work.nap, 60)

    task = asyncio.create_task(main())
    await asyncio.sleep(delay)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_output_of_a_worker_that_is_killed_later_is_kept(capfd):
    """What a worker printed in an earlier call is not lost with it."""
    async with ProcessPool(1) as pool:
        await pool.submit(print, "from the worker")
        with pytest.raises(WorkerCrashed):
            await pool.submit(os._exit, 1)
    assert capfd.readouterr().out == "from the worker\n"


async def test_outside_of_the_block_calls_are_refused():
    """Before and after ``async with``, and twice inside: clear errors."""
    pool = ProcessPool(1)
    with pytest.raises(PoolClosed):
        await pool.submit(work.double, 1)
    async with pool:
        with pytest.raises(RuntimeError, match="running already"):
            await pool.__aenter__()
    with pytest.raises(PoolClosed):
        await anext(pool.map(work.double, [1]))


async def test_bad_arguments_are_refused():
    """The message names the parameter and the value."""
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        ProcessPool(0)
    with pytest.raises(ValueError, match="max_deliveries must be at least 1, got 0"):
        ProcessPool(1, max_deliveries=0)
    with pytest.raises(
        ValueError, match="start_method must be 'spawn' or 'forkserver', got 'fork'"
    ):
        ProcessPool(1, start_method="fork")
    async with ProcessPool(1) as pool:
        with pytest.raises(TypeError, match="fn must be a plain function"):
            await pool.submit(work.coroutine_function)
        with pytest.raises(ValueError, match="buffer must be at least 0, got -1"):
            await anext(pool.map(work.double, [1], buffer=-1))


async def test_statistics_count_what_happens():
    """Workers, busy ones, waiting and delivered items."""
    async with ProcessPool(1) as pool:
        await pool.submit(work.double, 1)
        calls = [asyncio.create_task(pool.submit(work.nap, 0.05)) for _ in range(2)]
        await asyncio.sleep(0)
        statistics = pool.statistics()
        await asyncio.gather(*calls)
    assert (statistics.workers, statistics.busy, statistics.waiting) == (1, 1, 1)
    assert statistics.delivered == 2
    assert pool.statistics().workers == 0


async def test_forkserver_works_too():
    """The other start method that is allowed gives the same results."""
    async with ProcessPool(1, start_method="forkserver") as pool:
        assert [result async for result in pool.map(work.double, range(3))] == [0, 2, 4]
