"""An inventory of the standard library's names, so that no build needs the network.

It is read off the modules themselves; only the page of a name must be known.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import os
import sys
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODULES = [
    "collections",
    "collections.abc",
    "concurrent.futures",
    "contextlib",
    "contextvars",
    "dataclasses",
    "enum",
    "functools",
    "itertools",
    "logging",
    "multiprocessing",
    "queue",
    "random",
    "threading",
    "time",
    "types",
    "typing",
]
ASYNCIO_PAGES = {  # where the documentation of what asyncio's modules hold stands
    "tasks": "task",
    "taskgroups": "task",
    "timeouts": "task",
    "threads": "task",
    "coroutines": "task",
    "locks": "sync",
    "queues": "queue",
    "runners": "runner",
    "exceptions": "exceptions",
    "futures": "future",
    "subprocess": "subprocess",
    "streams": "stream",
}
STANDARD_TYPES = {
    "bytearray",
    "bytes",
    "dict",
    "frozenset",
    "list",
    "memoryview",
    "range",
    "set",
    "str",
    "tuple",
}
HEADER = (
    "# Sphinx inventory version 2\n# Project: Python\n# Version: 3\n"
    "# The remainder of this file is compressed using zlib.\n"
)


def role(value: object) -> str:
    """Tell under which role Python's documentation lists ``value``."""
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if inspect.isroutine(value) else "data"


def names() -> Iterator[tuple[str, str, str]]:
    """Yield the name, the role and the page of everything public."""
    for name, value in vars(builtins).items():
        if inspect.isclass(value) and issubclass(value, BaseException):
            yield name, "exception", "exceptions"
        elif not name.startswith("_"):
            page = "stdtypes" if name in STANDARD_TYPES else "functions"
            yield name, role(value), page
    for name in ("None", "Ellipsis", "NotImplemented"):
        yield name, "data", "constants"
    asyncio = importlib.import_module("asyncio")
    for name in asyncio.__all__:
        value = getattr(asyncio, name)
        home = getattr(value, "__module__", "").removeprefix("asyncio.")
        page = ASYNCIO_PAGES.get(home, "eventloop")
        if name in {"Future", "Task"} or "task" in name:
            page = "future" if name == "Future" else "task"
        yield f"asyncio.{name}", role(value), f"asyncio-{page}"
        yield from methods(f"asyncio.{name}", value, f"asyncio-{page}")
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", None) or vars(module):
            value = getattr(module, name)
            if name.startswith("_") or inspect.ismodule(value):
                continue
            yield f"{module_name}.{name}", role(value), module_name
            yield from methods(f"{module_name}.{name}", value, module_name)
    yield "typing.Any", "data", "typing"


def methods(name: str, value: object, page: str) -> Iterator[tuple[str, str, str]]:
    """Yield the public methods of a class."""
    if inspect.isclass(value):
        for method in vars(value):
            if not method.startswith("_"):
                yield f"{name}.{method}", "method", page


def true_name(name: str) -> str:
    """Return the name under which the object of this name was defined."""
    module, _, last = name.rpartition(".")
    value = getattr(sys.modules.get(module), last, None)
    if not inspect.isclass(value):
        return name
    return f"{value.__module__}.{value.__qualname__}"


def write(path: Path) -> str:
    """Write the inventory to ``path``, and return its name."""
    found = {name: (role, f"library/{page}.html#{name}") for name, role, page in names()}
    for name, (role, place) in list(found.items()):
        # Where the class is really defined, as type hints tell it: _asyncio.Task.
        found.setdefault(true_name(name), (role, place))
    lines = [f"{name} py:{role} 1 {place} -\n" for name, (role, place) in found.items()]
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")  # the other language is being built at the same time
    new.write_bytes(HEADER.encode() + zlib.compress("".join(lines).encode()))
    new.replace(path)
    return str(path)
