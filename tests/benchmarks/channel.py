"""Channel: what it costs to hand one item from a sender to a receiver."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from benchmarks.harness import OURS, Candidate, Case, cpu
from concurrency_patterns import Channel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.harness import Measure


async def traffic(
    send: Callable[[int], Awaitable[object]],
    receive: Callable[[], Awaitable[object]],
    pairs: int,
    number: int,
) -> None:
    """Send so many items through so many senders and receivers; the senders start first."""

    async def sender() -> None:
        for item in range(number // pairs):
            await send(item)

    async def receiver() -> None:
        for _ in range(number // pairs):
            await receive()

    async with asyncio.TaskGroup() as group:
        for _ in range(pairs):
            group.create_task(sender())
        for _ in range(pairs):
            group.create_task(receiver())


def queue(capacity: int, pairs: int) -> Measure:
    """asyncio.Queue."""

    async def work(number: int) -> None:
        queue: asyncio.Queue[int] = asyncio.Queue(capacity)
        await traffic(queue.put, queue.get, pairs, number)

    return cpu(work)


def channel(capacity: int, pairs: int) -> Measure:
    """Ours."""

    async def work(number: int) -> None:
        channel: Channel[int] = Channel(capacity)
        await traffic(channel.send, channel.receive, pairs, number)

    return cpu(work)


def anyio_stream(capacity: int, pairs: int) -> Measure:
    """anyio's memory object stream."""
    import anyio

    async def work(number: int) -> None:
        sender, receiver = anyio.create_memory_object_stream[int](capacity)
        async with sender, receiver:
            await traffic(sender.send, receiver.receive, pairs, number)

    return cpu(work)


def aiochannel(capacity: int, pairs: int) -> Measure:
    """aiochannel's channel."""
    from aiochannel import Channel as Other

    async def work(number: int) -> None:
        channel: Other[int] = Other(capacity)
        await traffic(channel.put, channel.get, pairs, number)

    return cpu(work)


def hand_over(capacity: int, pairs: int) -> Case:
    """Make the case of a channel of this size."""
    return Case(
        key=f"capacity_{capacity}_pairs_{pairs}",
        zh=f"传一项：容量 {capacity}，{pairs} 个发送方，{pairs} 个接收方",
        en=f"One item: capacity {capacity}, senders {pairs}, receivers {pairs}",
        candidates=[
            Candidate("asyncio.Queue", lambda: queue(capacity, pairs)),
            Candidate("Channel", lambda: channel(capacity, pairs), OURS, at_most=0.75),
            Candidate(
                "anyio.create_memory_object_stream",
                lambda: anyio_stream(capacity, pairs),
                "anyio",
            ),
            Candidate("aiochannel.Channel", lambda: aiochannel(capacity, pairs), "aiochannel"),
        ],
        least=960,
    )


# What ends an iteration over a queue, which cannot be closed before Python 3.13.
END = object()


def iterate_queue() -> Measure:
    """asyncio.Queue with a last item that ends the receiver."""

    async def work(number: int) -> None:
        queue: asyncio.Queue[object] = asyncio.Queue(100)

        async def sender() -> None:
            for item in range(number):
                await queue.put(item)
            await queue.put(END)

        async def receiver() -> None:
            while await queue.get() is not END:
                pass

        async with asyncio.TaskGroup() as group:
            group.create_task(sender())
            group.create_task(receiver())

    return cpu(work)


def iterate_channel() -> Measure:
    """Ours, closed by its sender."""

    async def work(number: int) -> None:
        channel: Channel[int] = Channel(100)

        async def sender() -> None:
            for item in range(number):
                await channel.send(item)
            channel.close()

        async def receiver() -> None:
            async for _ in channel:
                pass

        async with asyncio.TaskGroup() as group:
            group.create_task(sender())
            group.create_task(receiver())

    return cpu(work)


def iterate_anyio() -> Measure:
    """anyio's stream, closed by its sender."""
    import anyio

    async def work(number: int) -> None:
        sender, receiver = anyio.create_memory_object_stream[int](100)

        async def send() -> None:
            async with sender:
                for item in range(number):
                    await sender.send(item)

        async def receive() -> None:
            async with receiver:
                async for _ in receiver:
                    pass

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            group.create_task(receive())

    return cpu(work)


def iterate_aiochannel() -> Measure:
    """aiochannel's channel, closed by its sender."""
    from aiochannel import Channel as Other

    async def work(number: int) -> None:
        channel: Other[int] = Other(100)

        async def sender() -> None:
            for item in range(number):
                await channel.put(item)
            channel.close()

        async def receiver() -> None:
            async for _ in channel:
                pass

        async with asyncio.TaskGroup() as group:
            group.create_task(sender())
            group.create_task(receiver())

    return cpu(work)


CASES = [
    *(hand_over(capacity, pairs) for capacity in (1, 10, 100) for pairs in (1, 3)),
    Case(
        key="iterate",
        zh="传一项：接收方用 async for，发送方关闭；容量 100",
        en="One item: receiver in async for, sender closes; capacity 100",
        candidates=[
            Candidate("asyncio.Queue", iterate_queue),
            Candidate("Channel", iterate_channel, OURS),
            Candidate("anyio.create_memory_object_stream", iterate_anyio, "anyio"),
            Candidate("aiochannel.Channel", iterate_aiochannel, "aiochannel"),
        ],
        least=960,
    ),
]
