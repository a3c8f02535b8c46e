"""Ask all libraries and write results.json: ``tox run -e probe``.

tox run -e probe                        all tables
tox run -e probe -- token_bucket        only this one, kept beside the others' earlier results
tox run -e probe -- --words             nobody: only write anew how questions and rules are worded
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from probes.harness import ask_process, observe, packages, python

RESULTS = Path(__file__).parent / "results.json"
TABLES = ["circuit_breaker", "token_bucket", "compose", "worker_pool", "process_pool"]
AT_ONCE = 2  # they wait more than they work


def table(name: str) -> Any:
    """Import the module of a table: its PROBES and its CANDIDATES."""
    return importlib.import_module(f"probes.{name}")


def described(name: str) -> list[dict[str, str]]:
    """Return what a table asks."""
    texts = ("zh", "zh_rule", "en", "en_rule")
    return [
        {"key": probe.key, **{text: getattr(probe, text) for text in texts}}
        for probe in table(name).PROBES
    ]


def run(name: str) -> dict[str, Any]:
    """Ask all candidates of a table, each question in a process of its own."""
    candidates = table(name).CANDIDATES
    questions = [(probe["key"], c.name) for c in candidates for probe in described(name)]

    def ask(question: tuple[str, str]) -> dict[str, Any]:
        command = [sys.executable, "-m", "probes", "--one", name, *question]
        finding = ask_process(command)
        print(f"{name:16} {question[0]:24} {question[1]:28} {finding}", flush=True)  # noqa: T201
        return asdict(finding)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = dict(zip(questions, threads.map(ask, questions), strict=True))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": python(),
        "packages": packages(candidates),
        "probes": [
            {**probe, "findings": {c.name: found[probe["key"], c.name] for c in candidates}}
            for probe in described(name)
        ],
    }


def reworded(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return the findings of a table with the questions as they are worded now."""
    findings = {probe["key"]: probe["findings"] for probe in found["probes"]}
    probes = [{**probe, "findings": findings[probe["key"]]} for probe in described(name)]
    return {**found, "probes": probes}


def one(name: str, key: str, candidate: str) -> None:
    """Ask one question, print the finding, and leave, whatever still runs."""
    warnings.simplefilter("ignore")  # of the peers
    probes = {probe.key: probe for probe in table(name).PROBES}
    candidates = {c.name: c for c in table(name).CANDIDATES}

    async def ask() -> None:
        finding = await observe(probes[key], candidates[candidate])
        print(json.dumps(asdict(finding)), flush=True)  # noqa: T201
        os._exit(0)

    asyncio.run(ask())


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="table", help=", ".join(TABLES))
    parser.add_argument("--words", action="store_true", help="keep the findings")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(*options.one)
    chosen = options.tables or TABLES
    if unknown := set(chosen) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in chosen:
        results[name] = reworded(name, results[name]) if options.words else run(name)
        results = {table: results[table] for table in TABLES if table in results}
        text = json.dumps(results, ensure_ascii=False, indent=1)
        RESULTS.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
