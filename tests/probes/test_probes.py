"""Ours does what the rules ask, and what the page shows is what was asked."""

from __future__ import annotations

import asyncio
import datetime
import json
import sys
import time

import pytest

from concurrency_patterns.testing import run_virtual
from probes.__main__ import RESULTS, TABLES, described, reworded, table
from probes.harness import (
    HANGS,
    HOUR,
    OURS,
    Candidate,
    Finding,
    Probe,
    Unavailable,
    ask_process,
    observe,
    wall_clock,
)

QUESTIONS = [(name, probe) for name in TABLES for probe in table(name).PROBES]
REAL = {"process_pool"}  # other processes have no virtual clock


def ours(name: str) -> Candidate:
    """Return our candidate of a table, which comes first."""
    first: Candidate = table(name).CANDIDATES[0]
    assert first.name == OURS
    return first


@pytest.mark.parametrize(
    ("name", "probe"), QUESTIONS, ids=[f"{name}-{probe.key}" for name, probe in QUESTIONS]
)
def test_ours_does_what_the_rule_asks(name, probe):
    """Every column of every table reads right for ours."""
    run = asyncio.run if name in REAL else run_virtual

    assert run(observe(probe, ours(name))).right


def test_the_results_in_the_repository_are_those_of_the_probes():
    """The page shows each probe that there is, as it is worded, for each library."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))

    assert list(results) == TABLES
    for name in TABLES:
        stored = results[name]["probes"]
        names = [candidate.name for candidate in table(name).CANDIDATES]
        asked = [{k: v for k, v in probe.items() if k != "findings"} for probe in stored]
        assert asked == described(name)
        assert all(list(probe["findings"]) == names for probe in stored)


def test_the_results_in_the_repository_are_right_for_ours():
    """What was stored for ours is what the rules ask."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))

    wrong = [
        (name, probe["key"])
        for name, found in results.items()
        for probe in found["probes"]
        if probe["findings"][OURS]["right"] is not True
    ]
    assert wrong == []


def test_every_peer_was_installed():
    """No library is missing from the stored results for want of its package."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))

    assert all(all(found["packages"].values()) for found in results.values())


def test_other_words_keep_the_findings():
    """Questions and rules can be worded anew without asking anybody."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["compose"]
    old = [{**probe, "en": "as it was"} for probe in found["probes"]]

    assert reworded("compose", {**found, "probes": old}) == found


def asking(ask: object) -> Probe:
    """Make a probe of a function."""
    return Probe(ask, "", "", "", "")


async def test_a_probe_that_hangs_is_told():
    """What does not end in time hangs, which no rule asks for."""

    async def ask(_: object) -> None:
        await asyncio.Event().wait()

    assert await observe(asking(ask), ours("compose")) == Finding(HANGS, False)


async def test_what_is_not_offered_is_neither_right_nor_wrong():
    """The reason is shown instead of a verdict."""

    async def ask(_: object) -> None:
        raise Unavailable("never waits")

    assert await observe(asking(ask), ours("compose")) == Finding("never waits", None)


@pytest.mark.parametrize("error", [ValueError("mine"), TimeoutError("mine")])
async def test_a_probe_that_breaks_gives_no_verdict(error):
    """A fault of a probe ends the run; it is not held against a library."""

    async def ask(_: object) -> None:
        raise error

    with pytest.raises(type(error), match="mine"):
        await observe(asking(ask), ours("compose"))


def python(program: str) -> list[str]:
    """Return the command that runs a program."""
    return [sys.executable, "-c", program]


def test_the_last_line_of_the_process_is_its_finding():
    """What a library prints by itself does not matter."""
    program = """print('hello'); print('{"observed": "1", "right": true}')"""

    assert ask_process(python(program)) == Finding("1", True)


def test_a_process_that_hangs_is_ended():
    """An event loop that is blocked cannot end itself."""
    assert ask_process(python("while True: pass"), limit=0.2) == Finding(HANGS, False)


def test_a_process_that_breaks_gives_no_verdict():
    """Its traceback is told, and nothing is written."""
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        ask_process(python("1 / 0"))


def test_the_wall_clock_is_set_for_a_while():
    """Both ways to read it show the other hour, and afterwards the right one again."""
    real = time.time()
    with wall_clock() as move:
        move(HOUR)
        assert time.time() - real == pytest.approx(HOUR, abs=5)
        now, utc = datetime.datetime.now(datetime.UTC), datetime.datetime.utcnow
        assert now.timestamp() - real == pytest.approx(HOUR, abs=5)
        assert utc().replace(tzinfo=datetime.UTC) - now < datetime.timedelta(seconds=5)
    assert time.time() - real < 5
