"""The virtual clock and the cancellation explorer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from concurrency_patterns.testing import (
    CancellationFault,
    Deadlock,
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
