"""The virtual clock and the cancellation explorer."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time

import pytest

from concurrency_patterns.compose import compose
from concurrency_patterns.retry import Fixed, Retry
from concurrency_patterns.testing import (
    CancellationFault,
    Chaos,
    Deadlock,
    FakeService,
    Leak,
    assert_no_leaks,
    explore_cancellation,
    run_virtual,
    virtual_time,
)


def test_an_hour_of_sleeping_takes_no_time_and_is_exact():
    """The clock jumps to each timer, so the measured time is exact and the real one short."""

    async def main():
        loop = asyncio.get_running_loop()
        start = loop.time()
        for _ in range(36_000):
            await asyncio.sleep(0.1)
        return loop.time() - start

    before = time.perf_counter()
    assert run_virtual(main()) == 3600.0
    assert time.perf_counter() - before < 30


def test_timers_fire_in_order():
    """What is due earlier happens earlier."""
    order = []

    async def main():
        async def after(seconds):
            await asyncio.sleep(seconds)
            order.append(seconds)

        await asyncio.gather(*(after(seconds) for seconds in (3, 1, 2)))

    run_virtual(main())
    assert order == [1, 2, 3]


def test_a_deadlock_is_told_with_the_names_of_the_tasks():
    """When nothing can wake any task, the error names them instead of hanging."""

    async def main():
        task = asyncio.create_task(asyncio.Event().wait(), name="waits for nothing")
        await task

    with pytest.raises(Deadlock, match="waits for nothing"):
        run_virtual(main())


@pytest.mark.parametrize(
    "factory", [None, lambda loop, coro, **options: asyncio.Task(coro, loop=loop)]
)
def test_in_a_deadlock_a_task_without_a_name_goes_by_what_it_runs(factory):
    """Neither "Task-49" nor "None", which some versions say, tells who waits."""

    async def waits():
        await asyncio.Event().wait()

    async def main():
        asyncio.get_running_loop().set_task_factory(factory)
        async with asyncio.TaskGroup() as group:
            group.create_task(waits())

    with pytest.raises(Deadlock, match=r"wait for ever: main, waits$"):
        run_virtual(main())


def test_timers_fire_however_long_the_clock_has_run():
    """After years a nanosecond is less than the step of the clock; timers fire all the same."""

    async def main():
        loop = asyncio.get_running_loop()
        for _ in range(40):
            await asyncio.sleep(86_400 * 365)
            start = loop.time()
            await asyncio.gather(asyncio.sleep(0.1), asyncio.sleep(0.2))
            assert round(loop.time() - start, 6) == 0.2

    run_virtual(main())


def test_a_thread_is_waited_for_in_real_time():
    """While a thread works, the clock does not jump over it."""

    async def main():
        async with asyncio.timeout(60):
            return await asyncio.to_thread(lambda: time.sleep(0.05) or "done")

    assert run_virtual(main()) == "done"


def test_a_thread_of_ones_own_can_wake_the_loop():
    """A thread that the loop does not know is waited for as well."""

    async def main():
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def work():
            time.sleep(0.05)
            loop.call_soon_threadsafe(woken.set)

        thread = threading.Thread(target=work)
        thread.start()
        async with asyncio.timeout(60):
            await woken.wait()
        thread.join()
        return "woken"

    assert run_virtual(main()) == "woken"


def test_a_child_process_is_waited_for_in_real_time():
    """While a child process works, the clock does not jump over it."""

    async def main():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "print('hello')", stdout=subprocess.PIPE
        )
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
        return out.strip()

    assert run_virtual(main()) == b"hello"


def test_inside_virtual_time_asyncio_run_has_a_virtual_clock():
    """A program that calls asyncio.run by itself runs on a virtual clock, and only inside."""

    async def main():
        await asyncio.sleep(3600)
        return type(asyncio.get_running_loop()).__name__

    async def outside():
        return type(asyncio.get_running_loop()).__name__

    with virtual_time():
        assert asyncio.run(main()) == "VirtualTimeLoop"
    assert asyncio.run(outside()) != "VirtualTimeLoop"


def test_the_explorer_passes_what_is_right():
    """The lock of asyncio is whole at every step; the explorer tells how many runs it made."""

    async def scenario(lock):
        async def use():
            async with lock:
                await asyncio.sleep(1)

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(use())

    assert explore_cancellation(asyncio.Lock, scenario, lambda lock: not lock.locked()) > 10


def test_the_explorer_names_the_task_the_step_and_the_line():
    """The fault tells which task was cancelled, when, and where it stood."""

    async def scenario(taken):
        taken.append(1)
        await asyncio.sleep(1)
        taken.pop()

    with pytest.raises(CancellationFault, match=r"task 0 \(scenario\).* step 1, at .*test_testing"):
        explore_cancellation(list, scenario, lambda taken: not taken)


def test_the_explorer_names_the_line_that_waits_and_not_the_one_that_called_it():
    """The place is the innermost line of the program, whatever awaits it and is awaited there."""

    class Waits:
        def __await__(self):
            yield from asyncio.sleep(1).__await__()  # here
            taken.pop()

    async def calls(_):
        await Waits()

    async def scenario(_):
        taken.append(1)
        await calls(_)

    taken = []
    here = f"{re.escape(__file__)}:{Waits.__await__.__code__.co_firstlineno + 1}"
    with pytest.raises(CancellationFault, match=rf"step 1, at {here}: "):
        explore_cancellation(taken.clear, scenario, lambda _: not taken)


def test_the_explorer_names_a_line_of_asyncio_if_there_is_no_other():
    """A task that runs nothing but asyncio's own code stands somewhere, too."""

    async def scenario(cancelled):
        async with asyncio.TaskGroup() as group:
            task = group.create_task(asyncio.sleep(1))
        if task.cancelled():
            cancelled.append(task)

    with pytest.raises(CancellationFault, match=r"task 1 \(sleep\) .*, at .*tasks\.py:\d+: "):
        explore_cancellation(list, scenario, lambda cancelled: not cancelled)


def test_the_explorer_finds_a_queue_reader_that_drops_its_item():
    """A reader that awaits between taking an item and keeping it loses the item."""

    class Reader:
        def __init__(self):
            self.queue = asyncio.Queue()
            self.queue.put_nowait("item")
            self.kept = []

        def whole(self):
            return self.queue.qsize() + len(self.kept) == 1

    async def scenario(reader):
        item = await reader.queue.get()
        await asyncio.sleep(0)
        reader.kept.append(item)

    with pytest.raises(CancellationFault, match="invariant"):
        explore_cancellation(Reader, scenario, Reader.whole)


def test_the_explorer_finds_a_task_that_is_left_running():
    """A scenario that leaves a task behind when it is cancelled is a fault."""

    async def scenario(_):
        task = asyncio.create_task(asyncio.sleep(3600))
        await asyncio.sleep(1)
        task.cancel()

    with pytest.raises(CancellationFault, match="still running: sleep"):
        explore_cancellation(object, scenario, lambda _: True)


def test_the_explorer_finds_a_scenario_that_hangs_after_a_cancellation():
    """A lock that is not released when its holder is cancelled hangs, and is told as a fault."""

    async def scenario(lock):
        async def use():
            await lock.acquire()
            await asyncio.sleep(1)
            lock.release()

        await asyncio.wait([asyncio.create_task(use()) for _ in range(2)])

    with pytest.raises(CancellationFault, match=r"wait for ever|still running"):
        explore_cancellation(asyncio.Lock, scenario, lambda _: True)


def test_the_invariant_may_be_asynchronous():
    """An async invariant is awaited."""

    async def scenario(_):
        await asyncio.sleep(1)

    async def holds(_):
        await asyncio.sleep(1)
        return True

    assert explore_cancellation(object, scenario, holds) > 1


async def test_a_task_that_is_left_running_is_a_leak():
    """The leak names the function of the task."""
    with pytest.raises(Leak, match="still running: forgotten"):
        async with assert_no_leaks():

            async def forgotten():
                await asyncio.sleep(3600)

            task = asyncio.create_task(forgotten())
    task.cancel()


async def test_an_exception_that_nobody_retrieved_is_a_leak():
    """The leak tells the exception that would only have been logged."""

    async def fail():
        raise OSError("unseen")

    with pytest.raises(Leak, match=r"never retrieved.*unseen"):
        async with assert_no_leaks():
            asyncio.create_task(fail())  # noqa: RUF006 -- dropped on purpose
            await asyncio.sleep(1)


async def test_a_block_that_leaves_nothing_passes():
    """Tasks that ended, and tasks from before, are no leaks."""
    before = asyncio.create_task(asyncio.sleep(3600))
    async with assert_no_leaks():
        await asyncio.create_task(asyncio.sleep(1))
    before.cancel()
    assert not before.done()


async def test_an_error_in_the_block_comes_out_as_it_is():
    """The block's own exception is not replaced by a leak."""
    with pytest.raises(OSError, match="mine"):
        async with assert_no_leaks():
            raise OSError("mine")


async def test_chaos_does_the_same_with_the_same_seed():
    """About the share that was asked for goes wrong, and the same calls again with that seed."""

    async def outcomes():
        chaos = Chaos(fault_rate=0.3, result_rate=0.2, result="wrong", seed=7)
        seen = []
        for _ in range(100):
            try:
                seen.append(await chaos.call(FakeService("ok")))
            except ConnectionError:
                seen.append("fault")
        return seen, chaos.statistics()

    first, statistics = await outcomes()
    assert (first, statistics) == await outcomes()
    assert statistics.calls == 100
    assert first.count("fault") == statistics.faults
    assert first.count("wrong") == statistics.results
    assert 20 <= statistics.faults <= 40


async def test_chaos_delays_and_can_decorate():
    """A delayed call takes that much longer and then returns its own result."""
    loop = asyncio.get_running_loop()
    start = loop.time()

    @Chaos(latency_rate=1, latency=2)
    async def service():
        return "ok"

    assert await service() == "ok"
    assert loop.time() - start == 2.0
    with pytest.raises(TypeError, match="async function"):
        Chaos()(len)


async def test_chaos_stands_innermost_in_a_composition():
    """The other policies see its faults as those of the service: here, they are retried."""
    chaos = Chaos(fault_rate=0.5, seed=1)
    service = FakeService("ok")
    policy = compose(Retry(on=ConnectionError, attempts=20, backoff=Fixed(1)), chaos)

    assert [await policy.call(service) for _ in range(20)] == ["ok"] * 20
    seen = chaos.statistics()
    assert seen.faults > 0
    assert seen.calls == len(service.calls) + seen.faults
    assert policy.describe()[-1] == repr(chaos)


@pytest.mark.parametrize("arguments", [{"fault_rate": 1.1}, {"latency_rate": -1}, {"latency": -1}])
def test_senseless_chaos_is_refused(arguments):
    """Shares outside of 0 to 1 and negative delays are refused."""
    with pytest.raises(ValueError, match="must be"):
        Chaos(**arguments)


async def test_a_fake_service_does_what_its_script_says():
    """Each call is one step; the last one is repeated, and the calls are kept."""
    service = FakeService("error", "slow", "ok", KeyError("gone"), "hang", slow=3)
    loop = asyncio.get_running_loop()
    start = loop.time()

    with pytest.raises(ConnectionError):
        await service(1)
    assert await service(2) == 2
    assert loop.time() - start == 3.0
    assert await service() == "ok"
    with pytest.raises(KeyError):
        await service()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await service()
    assert service.calls == [(1,), (2,), (), (), (), ()]


@pytest.mark.parametrize("script", [(), ("fine",)])
def test_a_senseless_script_is_refused(script):
    """An empty script and an unknown step are refused."""
    with pytest.raises(ValueError, match="script must be steps out of"):
        FakeService(*script)
