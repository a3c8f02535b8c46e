"""Run the benchmarks and write results.json: ``tox run -e bench``.

tox run -e bench                        all of them
tox run -e bench -- channel retry       only these, kept beside the others' earlier results
tox run -e bench -- --quick             ours and the standard library, 3 rounds; not written
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness import close_loop, packages, run_case

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PATTERNS = [
    "channel",
    "process_pool",
    "worker_pool",
    "token_bucket",
    "concurrency_limiter",
    "retry",
    "timeout",
    "circuit_breaker",
    "fallback",
    "compose",
]


def run(pattern: str, rounds: int, *, quick: bool = False) -> dict[str, Any]:
    """Run the benchmark of one pattern."""
    cases = importlib.import_module(f"benchmarks.{pattern}").CASES
    results = []
    for case in cases:
        result = run_case(case, rounds, quick=quick)
        tell(f"{pattern}: {case.en}", result)
        results.append(result)
    close_loop()
    today = datetime.now(UTC).date().isoformat()
    return {"date": today, "packages": packages(cases), "cases": results}


def machine() -> dict[str, Any]:
    """Say where the measures were taken."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def tell(title: str, result: dict[str, Any]) -> None:
    """Print one case."""
    print(f"\n{title}")  # noqa: T201 -- a command
    for candidate in result["candidates"]:
        if "failed" in candidate:
            print(f"  {candidate['name']:42} {candidate['failed']}")  # noqa: T201
            continue
        ratio = candidate["ratio"]
        target = "".join(
            f"  {word} {candidate[name]:.3g}"
            for name, word in (("at_least", ">="), ("at_most", "<="))
            if name in candidate
        )
        spread = f"{ratio['median']:8.3g}  [{ratio['q1']:.3g} - {ratio['q3']:.3g}]"
        value = candidate["value"]
        time = "" if result["unit"] == "share" else f"  {1e6 * value:10.3g} us"
        print(f"  {candidate['name']:42} {spread:28}{time}{target}", flush=True)  # noqa: T201


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", metavar="pattern", help=", ".join(PATTERNS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    chosen = options.patterns or PATTERNS
    if unknown := set(chosen) - set(PATTERNS):
        parser.error(f"no such pattern: {', '.join(sorted(unknown))}")
    if options.quick:
        for pattern in chosen:
            run(pattern, 3, quick=True)
        return
    results: dict[str, Any] = {"machine": machine(), "patterns": {}}
    if RESULTS.exists():
        old = json.loads(RESULTS.read_text(encoding="utf-8"))
        if old["machine"] == results["machine"]:
            results = old
        elif options.patterns:
            sys.exit("the results in the repository are another machine's: run all patterns")
    for pattern in chosen:
        results["patterns"][pattern] = run(pattern, options.rounds)
        results["patterns"] = {
            name: results["patterns"][name] for name in PATTERNS if name in results["patterns"]
        }
        text = json.dumps(results, ensure_ascii=False, indent=1)
        RESULTS.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
