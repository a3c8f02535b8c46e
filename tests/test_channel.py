"""Producer–consumer on asyncio."""

from __future__ import annotations

import asyncio
import gc
from contextlib import contextmanager, suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from concurrency_patterns.channel import Channel, produce_consume
from concurrency_patterns.errors import ChannelClosed, ChannelEmpty, PatternError, QueueFull
from concurrency_patterns.testing import (
    Deadlock,
    VirtualTimeLoop,
    explore_cancellation,
    run_virtual,
)


async def test_items_come_out_in_order_and_the_iteration_ends_after_close():
    """What was sent before close is received in order, then the iteration ends."""
    channel = Channel(3)
    for number in range(3):
        channel.send_nowait(number)
    channel.close()

    assert [item async for item in channel] == [0, 1, 2]


async def test_a_full_channel_makes_the_sender_wait():
    """A send into a full channel returns when a receiver has made room."""
    channel = Channel(1)
    await channel.send("first")
    sender = asyncio.create_task(channel.send("second"))
    await asyncio.sleep(1)

    assert not sender.done()
    assert await channel.receive() == "first"
    await sender
    assert await channel.receive() == "second"


async def test_an_empty_channel_makes_the_receiver_wait():
    """A receive from an empty channel returns when something is sent."""
    channel = Channel(1)
    receiver = asyncio.create_task(channel.receive())
    await asyncio.sleep(1)

    assert not receiver.done()
    await channel.send("item")
    assert await receiver == "item"


async def test_waiting_senders_are_served_in_order():
    """Senders that wait are served first come, first served."""
    channel = Channel(1)
    senders = [asyncio.create_task(channel.send(number)) for number in range(5)]

    assert [await channel.receive() for _ in senders] == [0, 1, 2, 3, 4]
    await asyncio.gather(*senders)


async def test_waiting_receivers_are_served_in_order():
    """Receivers that wait are served first come, first served."""
    channel = Channel(5)
    got = []

    async def receive(name):
        got.append((name, await channel.receive()))

    receivers = [asyncio.create_task(receive(name)) for name in "abc"]
    await asyncio.sleep(0)
    for number in range(3):
        await channel.send(number)
    await asyncio.gather(*receivers)

    assert got == [("a", 0), ("b", 1), ("c", 2)]


async def test_every_receiver_that_waits_lets_a_sender_in():
    """As many senders go on at once as there are receivers that wait, whatever the capacity."""
    channel = Channel(1)
    await channel.send(0)
    senders = [asyncio.create_task(channel.send(number)) for number in (1, 2, 3)]
    await asyncio.sleep(0)
    receivers = [asyncio.create_task(channel.receive()) for _ in range(4)]
    await asyncio.sleep(0)  # the receivers come
    await asyncio.sleep(0)  # the senders go on

    assert all(sender.done() for sender in senders)
    assert await asyncio.gather(*receivers) == [0, 1, 2, 3]


async def test_a_receiver_that_leaves_takes_its_place_along():
    """What was let in for a receiver that is cancelled stays, and counts as any other item."""
    channel = Channel(1)
    await channel.send(0)
    senders = [asyncio.create_task(channel.send(number)) for number in (1, 2)]
    await asyncio.sleep(0)
    receivers = [asyncio.create_task(channel.receive()) for _ in range(3)]
    await asyncio.sleep(0)
    for receiver in receivers[1:]:
        receiver.cancel()
    await asyncio.wait(senders + receivers)

    assert await receivers[0] == 0
    with pytest.raises(QueueFull):
        channel.send_nowait(3)
    assert [channel.receive_nowait(), channel.receive_nowait()] == [1, 2]
    channel.send_nowait(3)
    assert channel.statistics().buffered == 1


async def test_a_newcomer_does_not_use_the_place_of_a_receiver_before_those_in_line():
    """What a receiver that waits lets in comes from the line, also if others send meanwhile."""
    channel = Channel(1)
    await channel.send(0)
    waits = asyncio.create_task(channel.send("waited"))
    await asyncio.sleep(0)
    receivers = [asyncio.create_task(channel.receive()) for _ in range(2)]
    newcomer = asyncio.create_task(channel.send("newcomer"))

    assert await asyncio.gather(*receivers) == [0, "waited"]
    await asyncio.gather(waits, newcomer)
    assert channel.receive_nowait() == "newcomer"


@pytest.mark.parametrize("overflow", ["wait", "reject", "drop_newest"])
async def test_receivers_that_were_cancelled_are_no_room(overflow):
    """A channel takes no more than its capacity for receivers that have left."""
    channel = Channel(1, overflow=overflow)
    receivers = [asyncio.create_task(channel.receive()) for _ in range(3)]
    await asyncio.sleep(0)
    for receiver in receivers:
        receiver.cancel()
    for number in range(5):
        with suppress(QueueFull):
            channel.send_nowait(number)

    assert channel.statistics().buffered == 1
    await asyncio.wait(receivers)
    assert channel.receive_nowait() == 0


async def test_a_sender_that_is_cancelled_with_a_slot_passes_it_on():
    """A slot that was promised goes to the next in line, or is free if there is none."""
    channel = Channel(1)
    channel.send_nowait(1)
    first, second = [asyncio.create_task(channel.send(number)) for number in (2, 3)]
    await asyncio.sleep(0)
    assert channel.receive_nowait() == 1
    first.cancel()
    await second

    third = asyncio.create_task(channel.send(4))
    await asyncio.sleep(0)
    assert channel.receive_nowait() == 3
    third.cancel()
    await asyncio.wait([third])
    channel.send_nowait(5)
    assert channel.receive_nowait() == 5


async def test_a_sender_that_was_cancelled_a_moment_ago_takes_no_room():
    """A slot is not promised to a task that is cancelled already."""
    channel = Channel(1)
    channel.send_nowait(1)
    sender = asyncio.create_task(channel.send(2))
    await asyncio.sleep(0)
    sender.cancel()
    assert await channel.receive() == 1
    channel.send_nowait(3)
    await asyncio.wait([sender])

    assert channel.receive_nowait() == 3
    channel.send_nowait(4)
    assert channel.statistics().buffered == 1


@pytest.mark.parametrize("nowait", [False, True])
async def test_a_channel_that_holds_too_much_lets_no_sender_in(nowait):
    """What a cancelled receiver has left beyond the capacity must go before others come."""
    channel = Channel(1)
    receiver = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    channel.send_nowait(1)
    channel.send_nowait(2)
    receiver.cancel()
    await asyncio.wait([receiver])
    sender = asyncio.create_task(channel.send(3))
    await asyncio.sleep(0)

    assert (channel.receive_nowait() if nowait else await channel.receive()) == 1
    await asyncio.sleep(1)
    assert not sender.done()
    assert await channel.receive() == 2
    await sender
    assert channel.receive_nowait() == 3


async def test_nowait_refuses_what_would_wait():
    """The nowait forms raise QueueFull and ChannelEmpty instead of waiting."""
    channel = Channel(1)
    with pytest.raises(ChannelEmpty):
        channel.receive_nowait()
    channel.send_nowait(1)
    with pytest.raises(QueueFull, match="capacity 1"):
        channel.send_nowait(2)

    assert channel.statistics().peak == 1
    assert channel.receive_nowait() == 1


async def test_receive_nowait_makes_room_for_a_sender_that_waits():
    """The room that receive_nowait makes goes to the first sender in line."""
    channel = Channel(1)
    await channel.send("first")
    sender = asyncio.create_task(channel.send("second"))
    await asyncio.sleep(0)

    assert channel.receive_nowait() == "first"
    await sender
    assert channel.receive_nowait() == "second"


async def test_receive_nowait_does_not_take_what_is_promised_to_a_waiter():
    """An item that a waiting receiver was woken for cannot be snatched away."""
    channel = Channel(1)
    receiver = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    channel.send_nowait("promised")

    with pytest.raises(ChannelEmpty):
        channel.receive_nowait()
    assert await receiver == "promised"


async def test_t9_close_wakes_every_waiting_receiver():
    """T9: close wakes all receivers, not only one."""
    channel = Channel(1)
    receivers = [asyncio.create_task(channel.receive()) for _ in range(3)]
    await asyncio.sleep(0)
    channel.close()

    outcomes = await asyncio.gather(*receivers, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ChannelClosed] * 3


async def test_t9_close_wakes_every_waiting_sender_and_keeps_what_was_sent():
    """T9: close wakes all senders; what was in the channel can still be received."""
    channel = Channel(1)
    await channel.send("kept")
    senders = [asyncio.create_task(channel.send(number)) for number in range(3)]
    await asyncio.sleep(0)
    channel.close()

    outcomes = await asyncio.gather(*senders, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ChannelClosed] * 3
    assert [item async for item in channel] == ["kept"]


async def test_t9_a_receiver_of_a_closed_channel_ends_when_the_last_item_is_taken():
    """T9: what is promised to one receiver keeps the others until it has been taken."""
    channel = Channel(2)
    first, second = (asyncio.create_task(channel.receive()) for _ in range(2))
    await asyncio.sleep(0)
    channel.send_nowait("last")
    channel.close()
    with pytest.raises(ChannelEmpty):
        channel.receive_nowait()

    assert await first == "last"
    with pytest.raises(ChannelClosed):
        await second


async def test_t9_what_was_promised_as_the_channel_closed_is_not_left_in_it():
    """T9: each receiver of a closed channel waits for what the ones before it do not take."""
    channel = Channel(2)
    received = {}

    async def receive(name):
        received[name] = [item async for item in channel]

    cancelled, waiting = (asyncio.create_task(receive(name)) for name in "ab")
    await asyncio.sleep(0)
    channel.send_nowait("last")
    channel.close()
    late = asyncio.create_task(receive("c"))
    cancelled.cancel()
    await asyncio.wait([cancelled, waiting, late])

    assert received == {"b": ["last"], "c": []}


@pytest.mark.parametrize("in_batches", [False, True])
async def test_t9_a_newcomer_to_a_closed_channel_waits_for_what_may_come_back(in_batches):
    """T9: who comes after the close gets the item of a receiver that is cancelled then."""
    channel = Channel(2)
    items = channel.batches(max_size=2, max_wait=1) if in_batches else channel
    cancelled = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    newcomer = asyncio.create_task(anext(items))  # runs before the one that is cancelled
    channel.send_nowait("last")
    channel.close()
    cancelled.cancel()

    assert await newcomer == (["last"] if in_batches else "last")


async def test_nothing_gets_into_a_closed_channel_that_has_room():
    """T42: a closed channel refuses to take anything, however much room it has."""
    channel = Channel(3)
    channel.close()
    with pytest.raises(ChannelClosed):
        channel.send_nowait(1)
    with pytest.raises(ChannelClosed):
        await channel.send(1)


async def test_t9_a_receiver_of_a_closed_channel_gets_what_another_gives_back():
    """T9: an item that was promised to a receiver that is cancelled goes to the one behind it."""
    channel = Channel(2)
    receivers = [asyncio.create_task(channel.receive()) for _ in range(3)]
    await asyncio.sleep(0)
    channel.send_nowait(1)
    channel.send_nowait(2)
    channel.close()
    receivers[1].cancel()

    assert [await receivers[0], await receivers[2]] == [1, 2]


async def test_t42_closing_twice_does_nothing():
    """T42: the second close changes nothing, and neither does one with nobody waiting."""
    channel = Channel(1)
    channel.close()
    channel.close()

    assert channel.statistics().closed
    with pytest.raises(ChannelClosed):
        await channel.send(1)
    with pytest.raises(ChannelClosed):
        channel.send_nowait(1)
    with pytest.raises(ChannelClosed):
        await channel.receive()
    with pytest.raises(ChannelClosed):
        channel.receive_nowait()


async def test_t12_an_item_that_arrives_as_the_receiver_times_out_is_not_lost():
    """T12: the item that came in the step of the time-out stays in the channel."""
    channel = Channel(1)

    async def receive_in_time():
        async with asyncio.timeout(1):
            return await channel.receive()

    receiver = asyncio.create_task(receive_in_time())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(1, channel.send_nowait, "late")

    with pytest.raises(TimeoutError):
        await receiver
    await asyncio.sleep(1)
    assert channel.receive_nowait() == "late"


async def test_statistics_tell_what_went_through():
    """The statistics count items and waiters, and remember the peak."""
    channel = Channel(2)
    for number in range(2):
        await channel.send(number)
    waiting = asyncio.create_task(channel.send(2))
    await asyncio.sleep(0)

    seen = channel.statistics()
    assert (seen.buffered, seen.peak, seen.sent, seen.waiting_senders) == (2, 2, 2, 1)
    await channel.receive()
    await waiting
    assert channel.statistics().received == 1

    receivers = [asyncio.create_task(channel.receive()) for _ in range(3)]
    await asyncio.sleep(0)
    assert channel.statistics().waiting_receivers == 1
    channel.close()
    await asyncio.gather(*receivers, return_exceptions=True)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_below_one_is_refused(capacity):
    """A channel that could hold nothing is refused when it is made."""
    with pytest.raises(ValueError, match=f"capacity must be at least 1, got {capacity}"):
        Channel(capacity)


@pytest.mark.parametrize("capacity", [1.5, "2", True, None])
def test_a_capacity_that_is_no_whole_number_is_refused(capacity):
    """A capacity of another type is refused when the channel is made."""
    with pytest.raises(TypeError, match="capacity must be an int"):
        Channel(capacity)


def test_t34_one_channel_serves_three_loops_one_after_the_other():
    """T34: a channel made without a loop works in three successive runs."""
    channel = Channel(1)

    async def pass_through(item):
        receiver = asyncio.create_task(channel.receive())
        await asyncio.sleep(0)
        await channel.send(item)
        return await receiver

    assert [run_virtual(pass_through(item)) for item in "abc"] == ["a", "b", "c"]


@contextmanager
def left_behind(*coroutines):
    """Let tasks wait on an event loop that is closed at the end of the block."""
    loop = VirtualTimeLoop()
    for coroutine in coroutines:
        loop.create_task(coroutine)._log_destroy_pending = False
    loop.run_until_complete(asyncio.sleep(0))
    yield
    loop.close()


def test_t34_what_was_promised_on_a_loop_that_is_gone_is_free_again():
    """T34: receivers that never woke on the old loop hold no item and no place on the next."""
    channel = Channel(1)
    batches = channel.batches(max_size=2, max_wait=1)
    with left_behind(channel.receive(), anext(batches), channel.receive()):
        for number in range(2):
            channel.send_nowait(number)

    async def use():
        received = [await channel.receive() for _ in range(2)]
        channel.send_nowait("another")
        with pytest.raises(QueueFull):
            channel.send_nowait("too much")
        channel.close()
        return [*received, await channel.receive()]

    assert run_virtual(use()) == [0, 1, "another"]


def test_t34_who_waited_on_a_loop_that_is_gone_waits_no_longer():
    """T34: senders and begun batches of the old loop stand in nobody's way on the next."""
    full, begun = Channel(1), Channel(1)
    for channel in (full, begun):
        channel.send_nowait("first")
    with left_behind(full.send("lost"), anext(begun.batches(max_size=2, max_wait=1))):
        pass

    async def use(channel):
        first = await channel.receive()
        await channel.send("second")
        channel.close()
        return [first, *[item async for item in channel]]

    assert run_virtual(use(full)) == run_virtual(use(begun)) == ["first", "second"]


def test_use_from_a_second_running_loop_is_refused():
    """A channel that one running loop uses refuses another loop with a clear error."""
    channel = Channel(1)
    refused = []

    async def first():
        await channel.send(1)
        await asyncio.to_thread(lambda: asyncio.run(second()))

    async def second():
        try:
            await channel.receive()
        except RuntimeError as error:
            refused.append(str(error))

    run_virtual(first())
    assert refused == ["this Channel is in use on another event loop; make one for each loop"]


@pytest.mark.parametrize("use", ["send_nowait", "receive_nowait", "close"])
async def test_use_from_another_thread_is_refused(use):
    """A thread beside the running loop gets a clear error, and nothing has changed."""
    channel = Channel(2)
    await channel.send("item")
    before = channel.statistics()
    arguments = ["another"] if use == "send_nowait" else []

    with pytest.raises(RuntimeError, match=r"this Channel .*call_soon_threadsafe"):
        await asyncio.to_thread(getattr(channel, use), *arguments)
    assert channel.statistics() == before


async def test_a_callback_of_the_loop_may_use_a_channel():
    """Where no task runs, on the loop itself, the forms that do not wait can be used."""
    channel = Channel(1)
    asyncio.get_running_loop().call_later(1, channel.send_nowait, "item")
    asyncio.get_running_loop().call_later(2, channel.close)

    assert [item async for item in channel] == ["item"]


def test_without_a_running_loop_a_channel_can_be_filled_and_emptied():
    """What does not wait needs no event loop, before the first and after the last."""
    channel = Channel(2)
    channel.send_nowait("before")
    assert run_virtual(channel.receive()) == "before"
    channel.send_nowait("after")
    channel.close()
    assert channel.receive_nowait() == "after"


def test_cancelled_at_any_step_an_item_is_handed_over_or_still_there():
    """T2: whichever task is cancelled at whichever step, no item is lost or doubled."""

    class Traffic:
        def __init__(self):
            self.channel = Channel(1)
            self.sent = []
            self.received = []

        async def send(self, item):
            await self.channel.send(item)
            self.sent.append(item)

        async def receive(self):
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    self.received.append(await self.channel.receive())

        def whole(self):
            left = []
            while True:
                try:
                    left.append(self.channel.receive_nowait())
                except ChannelEmpty:
                    break
            return sorted(self.received + left) == sorted(self.sent)

    async def scenario(traffic):
        async with asyncio.TaskGroup() as group:
            for item in range(4):
                group.create_task(traffic.send(item))
            for _ in range(4):
                group.create_task(traffic.receive())

    assert explore_cancellation(Traffic, scenario, Traffic.whole) > 30


@pytest.mark.parametrize("in_batches", [False, True])
def test_cancelled_at_any_step_a_closed_channel_is_emptied(in_batches):
    """T2, T9: while one receiver is left, it gets all that was sent before the close."""

    class Traffic:
        def __init__(self):
            self.channel = Channel(2)
            self.sent = []
            self.received = []
            self.ended = 0

        async def send(self):
            for number in range(5):
                await self.channel.send(number)
                self.sent.append(number)
                if number < 4:
                    await asyncio.sleep(0.5 * (number % 2))
            self.channel.close()  # in the step in which the last one is promised

        async def receive(self):
            async for item in self.channel:
                self.received.append(item)
            self.ended += 1

        async def receive_batches(self):
            async for batch in self.channel.batches(max_size=2, max_wait=1):
                self.received += batch
            self.ended += 1

        def whole(self):
            left = list(self.channel._buffer)
            conserved = sorted(self.received + left) == self.sent
            return conserved and not (left and self.ended)

    async def scenario(traffic):
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.receive_batches() if in_batches else traffic.receive())
            group.create_task(traffic.receive())
            sender = group.create_task(traffic.send())
            sender.add_done_callback(lambda _: traffic.channel.close())

    assert explore_cancellation(Traffic, scenario, Traffic.whole) > 40


async def test_an_item_that_its_receiver_did_not_take_counts_for_the_peak():
    """What was promised to a receiver that is cancelled in the same step stands in the channel."""
    channel = Channel(2)
    receiver = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    channel.send_nowait("item")
    assert channel.statistics().peak == 0
    receiver.cancel()
    await asyncio.sleep(0)

    seen = channel.statistics()
    assert (seen.buffered, seen.peak) == (1, 1)


async def test_an_item_that_passes_a_cancelled_receiver_counts_for_the_peak():
    """An item that nobody takes stands in the channel, though a receiver stood there before."""
    channel = Channel(1)
    receiver = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    receiver.cancel()
    await channel.send("item")

    assert channel.statistics().peak == 1
    await asyncio.wait([receiver])


async def test_an_item_on_its_way_does_not_count_for_the_peak():
    """The peak is what stood in the channel, without what was promised to a receiver."""
    channel = Channel(2)
    receiver = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    for number in range(2):
        await channel.send(number)
    assert channel.statistics().peak == 1
    assert await receiver == 0
    await channel.send(2)
    assert channel.statistics().peak == 2


async def test_an_item_that_its_receiver_did_not_take_takes_its_place_again():
    """A channel that is full of what a cancelled receiver left refuses to take more."""
    channel = Channel(1)
    receiver = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    channel.send_nowait("promised")
    receiver.cancel()
    await asyncio.sleep(0)

    with pytest.raises(QueueFull):
        channel.send_nowait("too much")
    assert channel.receive_nowait() == "promised"


async def test_t9_a_sender_that_was_about_to_send_is_told_of_the_close():
    """T9: nothing gets into a closed channel, not even what has been promised a place."""
    channel = Channel(1)
    await channel.send("first")
    sender = asyncio.create_task(channel.send("second"))
    await asyncio.sleep(0)
    assert channel.receive_nowait() == "first"
    channel.close()

    with pytest.raises(ChannelClosed):
        await sender
    assert channel.statistics().buffered == 0


async def test_the_chapters_workload_20_items_through_3_consumers():
    """20 items through 3 consumers: each is handled exactly once, and the program ends."""
    handled = []

    async def source():
        for number in range(20):
            yield number
            await asyncio.sleep(0.1)

    async def handle(item):
        await asyncio.sleep(0.2)
        handled.append(item)

    await produce_consume(source(), handle, consumers=3, capacity=10)

    assert sorted(handled) == list(range(20))


async def test_produce_consume_reads_the_source_only_as_fast_as_it_is_handled():
    """An endless source is read at most capacity + consumers items ahead of what is handled."""
    read = []
    handled = []

    def source():
        number = 0
        while True:
            read.append(number)
            yield number
            number += 1

    async def handle(item):
        handled.append(item)
        await asyncio.sleep(1)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(4.5):
            await produce_consume(source(), handle, consumers=2, capacity=3)
    assert len(read) <= len(handled) + 3 + 1


async def test_t10_a_producer_learns_that_its_last_consumer_was_cancelled():
    """T10: when all consumers are gone, a producer that waits for room is told."""
    unhandled = []

    async def handle(item):
        await asyncio.sleep(3600)

    run = asyncio.create_task(
        produce_consume(range(9), handle, consumers=1, capacity=2, unhandled=unhandled)
    )
    await asyncio.sleep(1)
    (consumer,) = (task for task in asyncio.all_tasks() if task.get_name() == "consumer 0")
    consumer.cancel()

    with pytest.raises(ExceptionGroup) as caught:
        await run
    assert caught.group_contains(ChannelClosed, match="all receivers are closed")
    assert sorted(unhandled) == [0, 1, 2, 3]


async def test_a_consumer_that_is_cancelled_at_the_end_is_no_silent_loss():
    """When the source has ended, too, an item that was not handled is an error."""

    async def handle(item):
        await asyncio.sleep(3600)

    run = asyncio.create_task(produce_consume(range(2), handle, consumers=2))
    await asyncio.sleep(1)
    (consumer,) = (task for task in asyncio.all_tasks() if task.get_name() == "consumer 0")
    consumer.cancel()
    await asyncio.sleep(1)
    (consumer,) = (task for task in asyncio.all_tasks() if task.get_name() == "consumer 1")
    consumer.cancel()

    with pytest.raises(PatternError, match="2 items were not handled"):
        await run


async def test_t10_a_consumers_crash_ends_the_producer_with_its_own_exception():
    """T10: when handling fails, the producer ends too, with that exception in a group."""

    async def handle(item):
        raise OSError(item)

    with pytest.raises(ExceptionGroup) as caught:
        await produce_consume(iter(int, 1), handle, consumers=3, capacity=1)
    assert isinstance(caught.value.exceptions[0], OSError)


async def test_a_source_that_fails_ends_the_consumers():
    """When the source fails, the consumers end, with that exception in a group."""

    async def source():
        yield 1
        raise OSError("source")

    async def handle(item):
        await asyncio.sleep(3600)

    with pytest.raises(ExceptionGroup) as caught:
        await produce_consume(source(), handle, consumers=3, capacity=1)
    assert [str(error) for error in caught.value.exceptions] == ["source"]


async def test_an_asynchronous_source_is_closed_when_handling_fails():
    """The source's own cleanup has run when produce_consume returns."""
    closed = []

    async def source():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    async def handle(item):
        raise OSError

    with pytest.raises(ExceptionGroup):
        await produce_consume(source(), handle, consumers=1, capacity=1)
    assert closed == [True]


async def test_a_handler_that_raises_cancelled_error_by_itself_is_an_error():
    """A CancelledError that nobody asked for is not taken for a silent end."""

    async def handle(item):
        raise asyncio.CancelledError

    with pytest.raises(ExceptionGroup) as caught:
        await produce_consume(range(3), handle, consumers=1, capacity=1)
    assert caught.group_contains(PatternError, match="by itself")


async def test_cancelling_produce_consume_cancels_what_it_runs():
    """A cancellation from outside ends producer and consumers and comes out as it is."""
    started = []

    async def handle(item):
        started.append(item)
        await asyncio.sleep(3600)

    task = asyncio.create_task(produce_consume(iter(int, 1), handle, consumers=2, capacity=1))
    await asyncio.sleep(1)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(started) == 2
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_the_textbook_sentinel_hangs_and_ours_does_not():
    """The textbook's join on a queue with a sentinel never returns."""

    async def textbook():
        queue = asyncio.Queue()
        await queue.put(None)
        await queue.get()
        await queue.join()

    with pytest.raises(Deadlock):
        run_virtual(textbook())


async def test_t11_the_last_of_several_senders_closes_the_channel():
    """T11: a sender that leaves early does not close the channel; the last one does."""
    channel = Channel(10)
    senders = [channel.sender() for _ in range(3)]

    async def produce(sender, count):
        with sender:
            for number in range(count):
                await sender.send(number)

    async with asyncio.TaskGroup() as group:
        for count, sender in enumerate(senders):
            group.create_task(produce(sender, count))
        received = [item async for item in channel]

    assert sorted(received) == [0, 0, 1]


async def test_a_closed_end_cannot_be_used_any_more():
    """A sender or receiver that was closed refuses, and closing it twice does nothing."""
    channel = Channel(1)
    first, _second = channel.sender(), channel.sender()
    first.close()
    first.close()

    assert not channel.statistics().closed
    with pytest.raises(ChannelClosed, match="this Sender is closed"):
        await first.send(1)
    with pytest.raises(ChannelClosed, match="this Sender is closed"):
        first.send_nowait(1)


async def test_a_sender_learns_that_all_receivers_are_gone():
    """When the last receiver leaves, a waiting sender gets an error, and the items can be told."""
    channel = Channel(1)
    receivers = [channel.receiver() for _ in range(2)]
    await channel.send("left")
    waiting = asyncio.create_task(channel.send("never sent"))
    await asyncio.sleep(0)
    receivers[0].close()
    assert not channel.statistics().closed
    with receivers[1]:
        pass

    with pytest.raises(ChannelClosed, match="all receivers are closed"):
        await waiting
    assert channel.receive_nowait() == "left"


async def test_a_receiver_iterates_until_the_channel_is_closed_and_empty():
    """A receiver receives, without waiting too, and its iteration ends with the channel."""
    channel = Channel(3)
    for number in range(3):
        channel.send_nowait(number)
    channel.close()
    with channel.receiver() as receiver:
        assert await receiver.receive() == 0
        assert receiver.receive_nowait() == 1
        assert [item async for item in receiver] == [2]


@pytest.mark.parametrize(
    ("overflow", "kept", "dropped"),
    [("drop_oldest", [3, 4], [0, 1, 2]), ("drop_newest", [0, 1], [2, 3, 4])],
)
async def test_a_full_channel_drops_and_tells_what(overflow, kept, dropped):
    """The drop policies never wait; each dropped item is counted and reported."""
    told = []
    channel = Channel(2, overflow=overflow, on_drop=told.append)
    for number in range(4):
        await channel.send(number)
    channel.send_nowait(4)
    channel.close()

    assert channel.statistics().received == 0
    assert [item async for item in channel] == kept
    assert told == dropped
    assert channel.statistics().dropped == 3


async def test_what_on_drop_raises_is_logged_and_the_item_is_sent(caplog):
    """A failing on_drop harms neither the sender nor the listener to events."""

    def fail(item):
        raise OSError(item)

    channel = Channel(1, overflow="drop_oldest", on_drop=fail)
    told = []
    channel.on_event = lambda kind, data: told.append((kind, data["item"]))
    for number in range(2):
        await channel.send(number)

    assert channel.receive_nowait() == 1
    assert channel.statistics().buffered == 0
    assert told == [("channel.dropped", 0)]
    assert "OSError" in caplog.text


async def test_a_full_channel_can_reject_at_once():
    """With the policy reject, a send into a full channel raises instead of waiting."""
    channel = Channel(1, overflow="reject")
    await channel.send(1)

    with pytest.raises(QueueFull):
        await channel.send(2)


def test_an_unknown_overflow_policy_is_refused():
    """A policy that does not exist is refused when the channel is made."""
    with pytest.raises(ValueError, match=r"overflow must be 'wait', .* got 'drop'"):
        Channel(1, overflow="drop")


async def test_batches_are_bounded_by_size_and_by_time():
    """A batch is given out when it is full, when its time is over, or at the end."""
    channel = Channel(10)
    loop = asyncio.get_running_loop()
    start = loop.time()
    seen = []

    async def send():
        for number in range(5):
            await channel.send(number)
        await asyncio.sleep(3)
        await channel.send(5)
        await asyncio.sleep(3)
        await channel.send(6)
        channel.close()

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        async for batch in channel.batches(max_size=3, max_wait=1):
            seen.append((loop.time() - start, batch))

    assert seen == [(0.0, [0, 1, 2]), (1.0, [3, 4]), (4.0, [5]), (6.0, [6])]


@pytest.mark.parametrize(
    "arguments", [{"max_size": 0, "max_wait": 1}, {"max_size": 1, "max_wait": -1}]
)
def test_senseless_batches_are_refused_at_once(arguments):
    """A batch of nothing and a negative wait are refused before anything is received."""
    with pytest.raises(ValueError, match="max_"):
        Channel(1).batches(**arguments)


async def test_a_cancelled_batch_leaves_its_items_in_the_channel():
    """What a batch has gathered is still there, in order, when it is cancelled."""
    channel = Channel(1)
    handled = []

    async def consume():
        async for batch in channel.batches(max_size=5, max_wait=10):
            handled.append(batch)

    consumer = asyncio.create_task(consume())
    for number in range(3):
        await channel.send(number)
    await asyncio.sleep(1)
    seen = channel.statistics()
    assert (seen.buffered, seen.received) == (3, 0)
    consumer.cancel()
    await asyncio.wait([consumer])
    assert not channel._gathering  # nothing is left of who waited
    channel.close()

    assert handled == []
    assert [item async for item in channel] == [0, 1, 2]


@pytest.mark.parametrize("max_wait", [10, 1])
async def test_batches_go_on_after_a_timeout(max_wait):
    """A time-out of the caller ends one wait for a batch and not the iteration."""
    channel = Channel(10)
    batches = channel.batches(max_size=3, max_wait=max_wait)
    await channel.send(1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await anext(batches)
    await channel.send(2)
    channel.close()

    assert [batch async for batch in batches] == [[1, 2]]


async def test_a_cancelled_batch_gives_its_items_to_those_who_wait():
    """Receivers behind a batch get what it had gathered, as if it had never been."""
    channel = Channel(3)
    batch = asyncio.create_task(anext(channel.batches(max_size=3, max_wait=10)))
    for number in range(2):
        await channel.send(number)
    await asyncio.sleep(1)
    receivers = [asyncio.create_task(channel.receive()) for _ in range(2)]
    await asyncio.sleep(1)
    batch.cancel()

    assert await asyncio.gather(*receivers) == [0, 1]


async def test_close_gives_out_every_batch_that_is_being_gathered():
    """Two receivers of batches do not wait for each other when the channel is closed."""
    channel = Channel(2)
    loop = asyncio.get_running_loop()

    async def consume():
        return [batch async for batch in channel.batches(max_size=3, max_wait=10)]

    consumers = [asyncio.create_task(consume()) for _ in range(2)]
    waiting = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    for number in range(5):
        await channel.send(number)
        await asyncio.sleep(1)
    start = loop.time()
    channel.close()

    assert await asyncio.gather(*consumers) == [[[1, 2]], [[3, 4]]]
    assert loop.time() - start == 0.0
    assert await waiting == 0  # the oldest item goes to whoever takes one first


@pytest.mark.parametrize("waits", [False, True])
async def test_a_batch_leaves_the_channel_as_large_as_it_was(waits):
    """The places that a batch did not take while it was gathered are not there after it."""
    channel = Channel(1)
    if not waits:
        channel.send_nowait(0)
    batch = asyncio.create_task(anext(channel.batches(1, 1)))
    await asyncio.sleep(0)
    if waits:
        channel.send_nowait(0)

    assert await batch == [0]
    channel.send_nowait(1)
    with pytest.raises(QueueFull):
        channel.send_nowait(2)


def test_a_batch_that_a_dead_loop_has_left_gives_nothing_back():
    """What was gathered on a loop that was closed with its tasks unfinished is nobody's."""
    channel = Channel(1)
    loop = VirtualTimeLoop()
    channel.send_nowait("item")
    loop.set_exception_handler(lambda *_: None)  # "Task was destroyed but it is pending!"
    batch = channel.batches(2, 60).__anext__()
    task = loop.create_task(batch)
    loop.run_until_complete(asyncio.sleep(1))
    loop.close()

    async def on_another_loop():
        nonlocal task, batch
        assert await channel.receive() == "item"
        task = batch = None
        gc.collect()
        await channel.send("more")
        return await channel.receive()

    assert run_virtual(on_another_loop()) == "more"


async def test_a_batch_may_be_larger_than_the_channel():
    """What a batch gathers takes no place: senders go on until the batch is full."""
    channel = Channel(1)

    senders = [asyncio.create_task(channel.send(number)) for number in range(4)]
    async with asyncio.timeout(1):
        assert await anext(channel.batches(max_size=3, max_wait=10)) == [0, 1, 2]
    await asyncio.gather(*senders)
    assert channel.statistics().buffered == 1


async def test_an_item_that_arrives_as_a_batch_is_given_out_is_not_lost():
    """The item that comes in the step in which the time is over goes into the next batch."""
    channel = Channel(10)
    loop = asyncio.get_running_loop()
    await channel.send("first")
    loop.call_later(1, channel.send_nowait, "second")
    loop.call_later(2, channel.close)

    batches = [batch async for batch in channel.batches(max_size=5, max_wait=1)]
    assert [item for batch in batches for item in batch] == ["first", "second"]


async def test_produce_consume_tells_what_was_not_handled():
    """After a failure, every item that was read is either handled or told as unhandled."""
    read, handled, unhandled = [], [], []

    def source():
        for number in range(100):
            read.append(number)
            yield number

    async def handle(item):
        await asyncio.sleep(0.1)
        if item == 7:
            raise OSError(item)
        handled.append(item)

    with pytest.raises(ExceptionGroup):
        await produce_consume(source(), handle, consumers=3, capacity=4, unhandled=unhandled)

    assert 7 in unhandled
    assert sorted(handled + unhandled) == read


async def test_produce_consume_adds_to_what_the_list_holds():
    """A list that is not empty keeps what it holds, and does not count as a failure."""
    unhandled = ["from before"]
    await produce_consume(range(3), asyncio.sleep, consumers=2, unhandled=unhandled)
    assert unhandled == ["from before"]

    async def fail(item):
        raise OSError(item)

    with pytest.raises(ExceptionGroup):
        await produce_consume([1], fail, consumers=1, unhandled=unhandled)
    assert unhandled == ["from before", 1]


def test_cancelled_at_any_step_no_item_of_produce_consume_is_lost():
    """T2: whichever task is cancelled, every item that was read is handled or told."""

    class Run:
        def __init__(self):
            self.read, self.handled, self.unhandled = [], [], []

        def source(self):
            for number in range(4):
                self.read.append(number)
                yield number

        async def handle(self, item):
            await asyncio.sleep(1)
            self.handled.append(item)

        def whole(self):
            return sorted(self.handled + self.unhandled) == self.read

    async def scenario(run):
        await produce_consume(
            run.source(), run.handle, consumers=2, capacity=1, unhandled=run.unhandled
        )

    assert explore_cancellation(Run, scenario, Run.whole) > 20


@pytest.mark.parametrize("overflow", ["wait", "reject", "drop_oldest", "drop_newest"])
def test_cancelled_at_any_step_the_ends_of_a_channel_lose_nothing(overflow):
    """T2, T11: with senders and receivers that come and go, each item is where it should be."""

    class Traffic:
        def __init__(self):
            self.dropped = []
            self.channel = Channel(1, overflow=overflow, on_drop=self.dropped.append)
            self.sent = []
            self.received = []

        async def send(self, sender, item):
            with sender, suppress(QueueFull):
                for number in (item, item + 1):
                    await sender.send(number)
                    self.sent.append(number)

        async def receive(self, receiver):
            async for number in receiver:
                self.received.append(number)
                await asyncio.sleep(0)

        def whole(self):
            assert self.channel.statistics().closed or not self.sent
            left = list(self.channel._buffer)
            return sorted(self.received + left + self.dropped) == sorted(self.sent)

    async def scenario(traffic):
        ends = []
        async with asyncio.TaskGroup() as group:
            for number in range(2):
                sender, receiver = traffic.channel.sender(), traffic.channel.receiver()
                ends += [
                    (group.create_task(traffic.send(sender, 10 * number)), sender),
                    (group.create_task(traffic.receive(receiver)), receiver),
                ]
            for task, end in ends:
                task.add_done_callback(lambda _, end=end: end.close())

    assert explore_cancellation(Traffic, scenario, Traffic.whole) > 20


class ChannelMachine(RuleBasedStateMachine):
    """The channel beside two lists that do the same in the plainest way."""

    def __init__(self):
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.buffer = []
        self.senders = []  # (item, task), in order
        self.receivers = []  # tasks, in order
        self.expected = []  # (task, item)
        self.number = 0
        self.closed = False

    @initialize(capacity=st.integers(1, 3))
    def make(self, capacity):
        self.capacity = capacity
        self.channel = Channel(capacity)

    def settle(self):
        self.loop.run_until_complete(asyncio.sleep(0.001))

    def match(self):
        while True:
            if self.receivers and self.buffer:
                self.expected.append((self.receivers.pop(0), self.buffer.pop(0)))
            elif self.senders and len(self.buffer) < self.capacity:
                self.buffer.append(self.senders.pop(0)[0])
            else:
                return

    @precondition(lambda self: not self.closed)
    @rule()
    def send(self):
        self.number += 1
        self.senders.append((self.number, self.loop.create_task(self.channel.send(self.number))))
        self.match()
        self.settle()

    @rule()
    def receive(self):
        task = self.loop.create_task(self.channel.receive())
        self.receivers.append(task)
        self.match()
        self.settle()
        if self.closed and task in self.receivers:
            self.receivers.remove(task)
            assert isinstance(task.exception(), ChannelClosed)

    @precondition(lambda self: not self.closed)
    @rule()
    def send_nowait(self):
        if self.senders or len(self.buffer) == self.capacity:
            with pytest.raises(QueueFull):
                self.channel.send_nowait(0)
        else:
            self.number += 1
            self.channel.send_nowait(self.number)
            self.buffer.append(self.number)
            self.match()
            self.settle()

    @rule()
    def receive_nowait(self):
        if self.buffer:
            assert self.channel.receive_nowait() == self.buffer.pop(0)
            self.match()
            self.settle()
        else:
            with pytest.raises(ChannelClosed if self.closed else ChannelEmpty):
                self.channel.receive_nowait()

    @precondition(lambda self: self.senders)
    @rule(data=st.data())
    def cancel_sender(self, data):
        entry = data.draw(st.sampled_from(self.senders))
        self.senders.remove(entry)
        entry[1].cancel()
        self.settle()

    @precondition(lambda self: self.receivers)
    @rule(data=st.data())
    def cancel_receiver(self, data):
        task = data.draw(st.sampled_from(self.receivers))
        self.receivers.remove(task)
        task.cancel()
        self.settle()

    @precondition(lambda self: not self.closed)
    @rule()
    def close(self):
        self.channel.close()
        self.closed = True
        self.settle()
        for task in [task for _, task in self.senders] + self.receivers:
            assert isinstance(task.exception(), ChannelClosed)
        self.senders.clear()
        self.receivers.clear()

    @invariant()
    def agrees(self):
        seen = self.channel.statistics()
        assert seen.buffered == len(self.buffer)
        assert (seen.waiting_senders, seen.waiting_receivers) == (
            len(self.senders),
            len(self.receivers),
        )
        assert [task.result() for task, _ in self.expected] == [item for _, item in self.expected]

    def teardown(self):
        for task in [task for _, task in self.senders] + self.receivers:
            task.cancel()
        self.settle()
        self.loop.close()


TestChannelAgreesWithItsModel = ChannelMachine.TestCase
TestChannelAgreesWithItsModel.settings = settings(max_examples=50, deadline=None)
TestChannelAgreesWithItsModel.__doc__ = "Whatever happens in whatever order, items are conserved."


class RestlessChannelMachine(RuleBasedStateMachine):
    """A channel whose tasks are disturbed at any step, not only when all have come to rest."""

    @initialize(
        capacity=st.integers(1, 3),
        overflow=st.sampled_from(["wait", "reject", "drop_oldest", "drop_newest"]),
    )
    def make(self, capacity, overflow):
        self.loop = VirtualTimeLoop()
        self.dropped = []
        self.channel = Channel(capacity, overflow=overflow, on_drop=self.dropped.append)
        self.tasks = []
        self.number = 0
        self.sent = []
        self.received = []

    def start(self, coroutine):
        self.tasks.append(self.loop.create_task(coroutine))

    @rule()
    def send(self):
        self.number += 1
        self.start(self.do_send(self.number))

    async def do_send(self, number):
        with suppress(ChannelClosed, QueueFull):
            await self.channel.send(number)
            self.sent.append(number)

    @rule()
    def receive(self):
        self.start(self.do_receive())

    async def do_receive(self):
        with suppress(ChannelClosed):
            self.received.append(await self.channel.receive())

    @rule(max_size=st.integers(1, 4))
    def receive_batch(self, max_size):
        self.start(self.do_receive_batch(max_size))

    async def do_receive_batch(self, max_size):
        with suppress(StopAsyncIteration):
            self.received += await anext(self.channel.batches(max_size, max_wait=1))

    @rule()
    def send_nowait(self):
        with suppress(ChannelClosed, QueueFull):
            self.channel.send_nowait(-1)
            self.sent.append(-1)

    @rule()
    def receive_nowait(self):
        with suppress(ChannelClosed, ChannelEmpty):
            self.received.append(self.channel.receive_nowait())

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel(self, data):
        data.draw(st.sampled_from(self.tasks)).cancel()

    @rule()
    def close(self):
        self.channel.close()

    @rule(seconds=st.sampled_from([0, 0, 1, 3]))
    def go_on(self, seconds):
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.tasks = [task for task in self.tasks if not task.done()]
        if seconds > 1:  # all are at rest, and each batch has been given out
            seen = self.channel.statistics()
            assert self.channel._promised == 0
            assert not (seen.waiting_receivers and (seen.buffered or seen.closed))
            assert not (seen.waiting_senders and (seen.buffered < seen.capacity or seen.closed))
            assert len(self.tasks) == seen.waiting_senders + seen.waiting_receivers

    @invariant()
    def conserves_the_items_and_their_order(self):
        whole = self.received + list(self.channel._buffer)
        if not self.dropped:
            assert whole == self.sent
        assert sorted(whole + self.dropped) == sorted(self.sent)

    def teardown(self):
        if hasattr(self, "loop"):
            for task in self.tasks:
                task.cancel()
            self.go_on(3)
            self.loop.close()


TestRestlessChannel = RestlessChannelMachine.TestCase
TestRestlessChannel.settings = settings(max_examples=100, deadline=None)
TestRestlessChannel.__doc__ = "Whatever is cancelled at whichever step, items are conserved."
