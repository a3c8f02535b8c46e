"""Run each ``async def`` test on the virtual clock, and let none leave anything behind."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

from concurrency_patterns.testing import assert_no_leaks, run_virtual

if TYPE_CHECKING:
    from collections.abc import Coroutine


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Await an ``async def`` test; leave the others to pytest."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    run_virtual(_leaving_nothing(pyfuncitem.obj(**arguments)))
    return True


async def _leaving_nothing(test: Coroutine[Any, Any, object]) -> None:
    """T35: after a test no task runs any more, and no error was left unseen."""
    async with assert_no_leaks():
        await test
