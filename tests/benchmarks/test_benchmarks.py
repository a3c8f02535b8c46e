"""The benchmarks run, and what they write makes sense. How fast anything is, is not tested."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

import concurrency_patterns
from benchmarks.__main__ import PATTERNS, RESULTS, run
from benchmarks.harness import OURS, Candidate, Case, Unavailable, run_case

MODULES = {path.stem for path in Path(concurrency_patterns.__file__).parent.glob("*.py")}
NO_PATTERN = {"__init__", "errors", "observe", "testing", "process_worker"}


def given(*values: float) -> SimpleNamespace:
    """Make a measure that returns these seconds, one after the other, for any number."""
    rest = iter(values)
    return SimpleNamespace(make=lambda: lambda number: next(rest) * number)


def broken(error: Exception) -> SimpleNamespace:
    """Make what raises instead of a measure."""

    def make() -> None:
        raise error

    return SimpleNamespace(make=make)


def case(*candidates: Candidate) -> Case:
    """Make a case of them."""
    return Case(key="key", zh="题", en="title", candidates=candidates, quick=1)


def test_every_pattern_has_a_benchmark():
    """There is one benchmark for each module that is a pattern, of the same name."""
    assert set(PATTERNS) == MODULES - NO_PATTERN


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_benchmark_runs_and_reports_sane_figures(pattern):
    """Ours and the baseline are measured; all figures are finite and above zero."""
    result = json.loads(json.dumps(run(pattern, 1, quick=True)))

    assert result["cases"]
    for found in result["cases"]:
        first, *others = found["candidates"]
        assert first["ratio"]["median"] == 1
        measured = [c for c in [first, *others] if "failed" not in c]
        assert any(c.get("package") == OURS for c in measured) or others[0]["failed"]
        for candidate in measured:
            figures = [candidate["value"], *candidate["ratio"].values()]
            assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    assert len({found["key"] for found in result["cases"]}) == len(result["cases"])


def test_ratios_are_taken_within_each_round():
    """A machine that is ten times slower in one round does not change the ratio."""
    result = run_case(
        case(
            Candidate("slow", given(2, 20, 2).make),
            Candidate("fast", given(1, 10, 1).make, OURS, at_most=0.6),
        ),
        rounds=3,
        quick=True,
    )

    assert result["candidates"] == [
        {"name": "slow", "ratio": {"median": 1, "q1": 1, "q3": 1}, "value": 2},
        {
            "name": "fast",
            "package": OURS,
            "at_most": 0.6,
            "ratio": {"median": 0.5, "q1": 0.5, "q3": 0.5},
            "value": 1,
        },
    ]


def test_one_that_fails_does_not_end_the_others():
    """What is not installed, or breaks, is reported, and the rest is measured."""
    one = [1.0] * 100
    result = run_case(
        Case(
            key="key",
            zh="题",
            en="title",
            least=1,
            most=1,
            candidates=[
                Candidate("first", given(*one).make),
                Candidate("missing", broken(ImportError("No module named x")).make, "x"),
                Candidate("broken", broken(ValueError("/some/path")).make, "x"),
                Candidate("not made", broken(Unavailable("has no batches")).make, OURS),
                Candidate("last", given(*one).make, "y"),
            ],
        ),
        rounds=2,
    )

    assert [found.get("failed") for found in result["candidates"]] == [
        None,
        "not installed",
        "ValueError",
        "has no batches",
        None,
    ]


def test_one_of_ours_that_breaks_ends_the_run():
    """An error of our own is not written into a table."""
    with pytest.raises(ZeroDivisionError):
        run_case(case(Candidate("ours", broken(ZeroDivisionError()).make, OURS)), 1, quick=True)


def test_the_results_in_the_repository_are_complete():
    """The page has figures for every pattern, and from enough rounds."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))

    assert list(results["patterns"]) == PATTERNS
    assert {"cpu", "cores", "python", "system"} <= set(results["machine"])
    for pattern in results["patterns"].values():
        assert all(found["rounds"] >= 9 for found in pattern["cases"])
