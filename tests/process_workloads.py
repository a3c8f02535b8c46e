"""What the workers of test_process_pool run.

A new process imports this module by its name, so it must be light: pytest alone takes longer to
import than most of these tests take to run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path


def double(number):
    """Return twice the number."""
    return 2 * number


def pid_and(item):
    """Return the worker and the item."""
    return os.getpid(), item


def first_waits_for(path, who, number):
    """Return the number; 0 waits until ``who`` has made the file."""
    if number == 2 and who == "last item":
        Path(path).touch()
    while number == 0 and not Path(path).exists():
        time.sleep(0.001)
    return number


def loaded(names):
    """Return those of the modules that this process has imported."""
    return [name for name in names if name in sys.modules]


def nap(seconds):
    """Sleep and return."""
    time.sleep(seconds)
    return seconds


def give_or_die(item):
    """Return the item; die of "die"."""
    if item == "die":
        os._exit(9)
    return item


def fail_or_die(number):
    """Return the number; fail on 14, die on 18."""
    if number == 14:
        raise ValueError(number)
    if number == 18:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_soon_after_9(number):
    """Return the number; at 9 let the worker die when it has answered."""
    if number == 9:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return number


def fork_at_first(number):
    """Return the number, and -1 in a child process that is forked at 0; die on 5."""
    if number == 0 and os.fork() == 0:
        time.sleep(0.2)
        os.close(2)  # its pipe is closed, and it would say so
        return -1
    if number == 5:
        time.sleep(0.5)
        os._exit(7)
    return number


def double_or_die(number):
    """Return twice the number, but die on 5."""
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def die_once(path):
    """Die at the first call, return at the second."""
    try:
        with open(path, "x"):  # noqa: PTH123 -- atomic
            pass
    except FileExistsError:
        return "second delivery"
    os._exit(9)


def note_and_die(path):
    """Write a line, then die."""
    with open(path, "a") as file:  # noqa: PTH123
        file.write("called\n")
    os._exit(9)


def interrupt():
    """Do what Ctrl-C does."""
    raise KeyboardInterrupt("stop")


def stop_iteration():
    """Raise what a future refuses."""
    return next(iter(()))


def make_lock(_=None):
    """Return what cannot be pickled."""
    return threading.Lock()


def fail(text):
    """Raise a plain error."""
    raise LookupError(text)


class TwoArgumentsError(Exception):
    """Cannot be unpickled: its arguments are not those of ``__init__``."""

    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")


class HoldsALockError(Exception):
    """Cannot be pickled."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


def raise_two_arguments():
    """Raise what cannot be unpickled."""
    raise TwoArgumentsError(7, "seven")


def raise_lock():
    """Raise what cannot be pickled."""
    raise HoldsALockError("locked")


class Brittle:
    """Can be pickled, but unpickled only in a process that allows it."""

    def __reduce__(self):
        return unpickle_brittle, (os.getpid(),)


def unpickle_brittle(pid):
    """Fail in any other process."""
    if pid != os.getpid():
        raise ValueError("brittle")
    return Brittle()


def make_brittle(_=None):
    """Return what the parent cannot unpickle."""
    return Brittle()


class ExitWhenPickledError(Exception):
    """Ends the process that pickles it."""

    def __reduce__(self):
        sys.exit("pickled")


def raise_exit_when_pickled():
    """Raise what ends the worker that describes it."""
    raise ExitWhenPickledError("odd")


class ExitWhenReadError(Exception):
    """Ends any other process that unpickles it."""

    def __reduce__(self):
        return exit_in_another_process, (os.getpid(),)


def exit_in_another_process(pid):
    """Raise SystemExit."""
    if os.getpid() != pid:
        sys.exit("read")


def raise_exit_when_read():
    """Raise what would end the parent."""
    raise ExitWhenReadError("odd")


def return_exit_when_read():
    """Return what would end the parent."""
    return ExitWhenReadError("odd")


class PickledOnce:
    """An argument that cannot be pickled a second time."""

    def __init__(self, value):
        self.value = value
        self.pickled = False

    def __reduce__(self):
        if self.pickled:
            raise ValueError("once only")
        self.pickled = True
        return str, (self.value,)


class Nameless:
    """A function without a name, and not even a representation; it kills its process."""

    def __call__(self, _):
        os._exit(3)

    def __repr__(self):
        raise ValueError("nameless")


def blob(size):
    """Return many bytes."""
    return b"x" * size


def size_of(data):
    """Return how many bytes there are."""
    return len(data)


def fork_and_die(path):
    """Die, but leave a child behind that lives on."""
    child = os.fork()
    if child == 0:
        time.sleep(100)
        os._exit(0)
    Path(path).write_text(str(child))
    os._exit(4)


def note_and_fork(item):
    """Write down the number; at 2 the process forks, and its child returns, too."""
    path, number = item
    if number == 2 and (child := os.fork()):
        Path(f"{path} of the child").write_text(str(child))
    with open(path, "a") as file:  # noqa: PTH123 -- appends in one piece
        file.write(f"{number}\n")
    return number


def double_in_a_process(number):
    """Let another process double the number."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(double, (number,))


async def coroutine_function():
    """Do not belong here."""


class DieWhenRead:
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (6,)


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "bad result": make_lock,
    "brittle result": make_brittle,
    "bad error": raise_two_arguments,
    "interrupt": interrupt,
    "hang": lambda: time.sleep(600),
    "huge": lambda: b"x" * 2**23,
}


def double_or(item):
    """Return twice the number; if it comes with a fault, do that instead."""
    number, fault = item
    return FAULTS[fault]() if isinstance(fault, str) else 2 * number


def note(item):
    """Write down the number, take a moment, return it."""
    path, number, seconds = item
    with open(path, "a") as file:  # noqa: PTH123 -- appends in one piece
        file.write(f"{number}\n")
    time.sleep(seconds)
    return number


def spin(path):
    """Write down the own process, and compute for ever."""
    Path(path).write_text(str(os.getpid()))
    while True:
        pass


def wait_for(path, started=None):
    """Say that it runs, and wait for the file."""
    if started:
        Path(started).touch()
    while not Path(path).exists():
        time.sleep(0.001)
    return "done"


ready = []


def get_ready(word):
    """Be the initializer."""
    if word == "fail":
        raise LookupError("no database")
    ready.append(word)


def what_is_ready(_=None):
    """Return what the initializer has left."""
    return ready


def grow(_):
    """Return the same list each time, one longer."""
    ready.append(len(ready))
    return ready


def speak(text):
    """Write on both streams."""
    print(text)  # noqa: T201
    print(text, file=sys.stderr)  # noqa: T201
